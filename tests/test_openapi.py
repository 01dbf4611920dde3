"""The API's document: it has every route, real answers match it, and machine-made requests find no hole."""

from __future__ import annotations

import json
from collections import Counter

import hypothesis
import jsonschema
import pytest
import schemathesis
from conftest import API_TOKEN, CALLBACK_TOKEN, LoadManager, base_config, cluster_config, create_body
from fake_locust import FakeLocust
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from waiting import eventually

import loadmanager

DOCUMENT = loadmanager.openapi_document()
STREAMS = [route.path for route in loadmanager.ROUTES if route.media == loadmanager.EVENT_TYPE]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    fake = FakeLocust().start()
    manager = LoadManager(tmp_path_factory.mktemp("openapi"), base_config(cluster_config(fake.url))).start()
    manager.fake = fake
    yield manager
    assert "trace=" not in manager.log(), f"a request ended in an exception:\n{manager.log()[-3000:]}"
    manager.end()
    fake.close()


def validated(manager, method, path, template, body=None, headers=None, token=API_TOKEN):
    """The answer, once it is proven to be what the document says of it."""
    answer = manager.request(method, path, body, headers, token=token)
    described = DOCUMENT["paths"][template][method.lower()]["responses"]
    assert str(answer.status) in described, (
        f"{method} {path} answered {answer.status}, which the document does not have"
    )
    for media, content in described[str(answer.status)].get("content", {}).items():
        assert answer.headers["content-type"] == media
        if media == "application/json":
            schema = {**content["schema"], "components": DOCUMENT["components"]}
            jsonschema.validate(answer.json, schema, format_checker=jsonschema.FormatChecker())
    return answer


def test_every_route_is_in_the_document_with_its_credentials():
    for route in loadmanager.ROUTES:
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert operation["summary"] == route.summary and operation["x-access"] == route.access
        assert bool(operation["security"]) == (route.access != "anyone")
        assert {
            parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"
        } == set(route.query)
    ids = Counter(
        operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()
    )
    assert max(ids.values()) == 1, ids.most_common(2)


def test_document_is_served_and_valid(manager):
    served = manager.get("/openapi.json", token=None).json
    assert served == json.loads(json.dumps(DOCUMENT))
    from openapi_spec_validator import validate

    validate(served)


def test_answers_of_a_whole_life_match_the_document(manager):
    run = validated(
        manager, "POST", "/v1/tests", "/v1/tests", create_body(durationSeconds=600, metadata={"a": [1, None]})
    ).json
    one = f"/v1/tests/{run['id']}"
    eventually(lambda: manager.run(run["id"]).get("lastMetrics"), 10)
    validated(manager, "POST", "/v1/tests", "/v1/tests", create_body())
    validated(manager, "POST", "/v1/tests", "/v1/tests", {"tenantId": 5})
    validated(manager, "POST", f"{one}/annotations", "/v1/tests/{id}/annotations", {"text": "deploy"})
    for name in (
        "",
        "/metrics",
        "/failures",
        "/annotations",
        "/report.html",
        "/report.md",
        "/metrics.csv",
        "/requests.csv",
        "/locust-report.html",
    ):
        validated(manager, "GET", one + name, "/v1/tests/{id}" + name)
    for path in ("/", "/docs", "/openapi.json", "/health", "/session", "/v1/tests", "/v1/clusters"):
        validated(manager, "GET", path, path)
    validated(manager, "POST", f"{one}/stop", "/v1/tests/{id}/stop")
    manager.wait_for(run["id"], "Finished")
    validated(manager, "POST", f"{one}/stop", "/v1/tests/{id}/stop")
    again = validated(manager, "POST", f"{one}/rerun", "/v1/tests/{id}/rerun").json
    callbacks = {
        "test-start": {},
        "metrics": {"metrics": {"totalRequests": 1}},
        "test-stop": {"finalMetrics": {"totalRequests": 1}, "complete": True},
    }
    for name, more in callbacks.items():
        path = f"/v1/internal/locust/{name}"
        validated(
            manager,
            "POST",
            path,
            path,
            {"runId": again["id"], **more},
            {"X-Locust-Token": CALLBACK_TOKEN},
            token=None,
        )
        validated(
            manager,
            "POST",
            path,
            path,
            {"runId": "none", **more},
            {"X-Locust-Token": CALLBACK_TOKEN},
            token=None,
        )
        validated(manager, "POST", path, path, {}, {"X-Locust-Token": "wrong"}, token=None)
    manager.wait_for(again["id"], "Finished")
    validated(manager, "DELETE", one, "/v1/tests/{id}")
    validated(manager, "GET", one, "/v1/tests/{id}")


SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# One test for each operation, made here: under xdist, schemathesis' own parametrize ran only the
# first of them.
OPERATIONS = [(route.method, route.path) for route in loadmanager.ROUTES if route.path not in STREAMS]


@pytest.mark.parametrize("method,path", OPERATIONS)
def test_machine_made_requests_are_answered_as_documented(manager, method, path):
    """Valid and invalid requests made from the document: none is answered 500, and none otherwise than
    documented."""
    operation = SCHEMA[path][method]
    headers = (
        {"X-Locust-Token": CALLBACK_TOKEN}
        if path.startswith("/v1/internal")
        else {"Authorization": f"Bearer {API_TOKEN}"}
    )
    headers = {} if path.startswith("/session") else headers
    cases = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if operation.body or operation.query or operation.path_parameters:
        cases = cases | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    answered = []

    @hypothesis.settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def send(case):
        answered.append(
            case.call_and_validate(base_url=manager.url, headers=headers, checks=CHECKS).status_code
        )

    send()
    print(f"{method} {path}: {len(answered)} requests, {dict(Counter(answered))}")
    assert answered, "no request was made"


def test_call_can_be_tried_on_the_reference_page(manager):
    """In a real browser: the page asks no other host, and its call is answered."""
    from chromium import Chromium
    from selenium.webdriver.common.by import By

    with Chromium() as browser:
        browser.driver.get(manager.url + "/docs")
        cards = eventually(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#routes details"), 10)
        assert len(cards) == len(loadmanager.ROUTES)
        browser.driver.find_element(By.ID, "token").send_keys(API_TOKEN)
        card = next(card for card in cards if card.text.startswith("GET") and "/v1/clusters" in card.text)
        card.find_element(By.TAG_NAME, "summary").click()
        card.find_element(By.TAG_NAME, "button").click()
        shown = eventually(
            lambda: (lambda text: text if "{" in text else None)(card.find_element(By.TAG_NAME, "pre").text),
            10,
        )
        assert shown.startswith("200") and '"activeRunId"' in shown
        asked = [url for url in browser.requests() if url.startswith("http")]
        assert asked and all(url.startswith(manager.url) for url in asked), asked
        assert not browser.complaints()
        browser.screenshot("docs")
