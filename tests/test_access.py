"""Who may do what: every route, every role, one's own tenant and another's; tokens, limits of loads, the
audit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, LoadManager, base_config, cluster_config, create_body
from control_plane import EventStream
from fake_locust import FakeLocust
from waiting import eventually

import loadmanager

ROLES = loadmanager.ROLES
TOKENS = {(role, tenant): f"{role}-of-{tenant}-token" for role in ROLES for tenant in ("acme", "beta")}


def api_tokens() -> list[dict[str, Any]]:
    return [
        {"name": f"{tenant}-{role}", "token": token, "role": role, "tenants": [tenant]}
        for (role, tenant), token in TOKENS.items()
    ]


def tenant_cluster(fake: FakeLocust, tenant: str, env: str = "dev", **more: Any) -> dict[str, Any]:
    return {"id": f"{tenant}-{env}", "tenantId": tenant, "envId": env, "baseUrl": fake.url, **more}


class Place:
    """A Load Manager with two tenants; each has a Finished run, beta also a Running one."""

    def __init__(self, folder):
        self.fakes = {tenant: FakeLocust().start() for tenant in ("acme", "beta")}
        clusters = [
            tenant_cluster(fake, tenant, callbackToken=f"callback-of-{tenant}")
            for tenant, fake in self.fakes.items()
        ]
        self.lm = LoadManager(
            folder,
            base_config(
                *clusters,
                security={"apiTokens": api_tokens()},
                orchestrator={"metricsPollIntervalSeconds": 1},
            ),
        ).start()
        self.finished = {tenant: self.finished_run(tenant) for tenant in self.fakes}
        self.baseline_run = self.finished_run("acme")
        self.lm.request("PUT", "/v1/baselines/acme/dev/browse", {"runId": self.baseline_run})
        self.lm.request("PUT", "/v1/baselines/beta/dev/browse", {"runId": self.finished["beta"]})
        self.others_run = self.start("beta")

    def start(self, tenant: str) -> str:
        return self.lm.create(tenantId=tenant).json["id"]

    def finished_run(self, tenant: str) -> str:
        run_id = self.start(tenant)
        self.lm.post(f"/v1/tests/{run_id}/stop")
        self.lm.wait_for(run_id, "Finished")
        return run_id

    def stop_all(self, tenant: str) -> None:
        self.lm.post("/v1/stop-all", {"tenantId": tenant})
        eventually(
            lambda: not self.lm.get(f"/v1/tests?tenantId={tenant}&status=Pending,Running,Stopping").json, 10
        )

    def end(self) -> None:
        self.lm.end()
        for fake in self.fakes.values():
            fake.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("access"))
    yield place
    assert "trace=" not in place.lm.log(), place.lm.log()[-3000:]
    place.end()


class Rule(NamedTuple):
    """How a route is asked, and what its answer to another tenant is.

    ask: (place, whose) -> path, body; own: good answers to who has the role; other: answers that
    are right for another tenant's; hidden: the answer must not have another's run in it."""

    ask: Callable[[Place, str], tuple[str, Any]]
    own: frozenset[int] = frozenset({200})
    other: frozenset[int] = frozenset({404})
    hidden: bool = True


def of_run(rest: str = "", body: Any = None, own: tuple[int, ...] = (200,), fresh: str = "") -> Rule:
    """A route of one run; fresh: who asks gets one made for it, finished or running."""

    def ask(place: Place, whose: str) -> tuple[str, Any]:
        if whose == "beta":
            return f"/v1/tests/{place.others_run}{rest}", body
        run_id = (
            place.start("acme")
            if fresh == "running"
            else place.finished_run("acme")
            if fresh == "finished"
            else place.finished["acme"]
        )
        return f"/v1/tests/{run_id}{rest}", body

    return Rule(ask, frozenset(own))


def plain(
    path: str, body: Any = None, own: tuple[int, ...] = (200,), other: tuple[int, ...] | None = None
) -> Rule:
    return Rule(
        lambda place, whose: (path.replace("WHOSE", whose), body(place, whose) if callable(body) else body),
        frozenset(own),
        frozenset(other or own),
    )


def compared(place: Place, whose: str) -> tuple[str, Any]:
    return f"/v1/tests/compare?baseline={place.finished['acme']}&candidate={place.finished[whose]}", None


def exported(place: Place, whose: str) -> dict[str, Any]:
    """A finished run of theirs as a file, under an id that is not taken."""
    file = place.lm.get(f"/v1/tests/{place.finished[whose]}/export").json
    file["run"]["id"] = str(uuid.uuid4())
    return file


def of_schedule(rest: str = "", body: Any = None, own: tuple[int, ...] = (200,)) -> Rule:
    """A route of one schedule, which is made for it."""

    def ask(place: Place, whose: str) -> tuple[str, Any]:
        made = place.lm.post("/v1/schedules", {"cron": "@yearly", "test": create_body(tenantId=whose)}).json
        return f"/v1/schedules/{made['id']}{rest}", body

    return Rule(ask, frozenset(own))


def a_sign_in(place: Place, whose: str) -> tuple[str, Any]:
    """A sign-in of theirs, the newest there is."""
    signed_in = place.lm.post("/session", {"token": TOKENS["viewer", whose]}, token=None)
    assert signed_in.status == 200, signed_in.body
    return f"/v1/sessions/{place.lm.get('/v1/sessions').json[0]['id']}", None


BASELINE = "/v1/baselines/WHOSE/dev/browse"
RULES = {
    "POST /v1/tests": plain("/v1/tests", lambda place, whose: create_body(tenantId=whose), (201,), (403,)),
    "GET /v1/tests": plain("/v1/tests?tenantId=WHOSE"),
    "GET /v1/tests/{id}": of_run(),
    "DELETE /v1/tests/{id}": of_run(own=(204,), fresh="finished"),
    "POST /v1/tests/{id}/stop": of_run("/stop", fresh="running"),
    "POST /v1/tests/{id}/rerun": of_run("/rerun", {}, (201,)),
    "POST /v1/tests/{id}/annotations": of_run("/annotations", {"text": "deploy"}, (201,)),
    **{f"GET /v1/tests/{{id}}{rest}": of_run(rest) for rest in (
        "/metrics", "/failures", "/annotations", "/report.html", "/report.md", "/junit.xml", "/summary.md",
        "/metrics.csv", "/requests.csv", "/scenario.csv",
        "/events")},
    **{f"GET /v1/tests/{{id}}{rest}": of_run(rest, own=(200, 404))
        for rest in ("/locust-report.html", "/histograms")},  # not every run has them
    "GET /v1/tests/{id}/export": of_run("/export"),
    "POST /v1/tests/import": plain("/v1/tests/import", lambda place, whose: exported(place, whose), (201,),
        (403,)),
    "POST /v1/tests/{id}/users": of_run("/users", {"targetUsers": 3}, fresh="running"),
    "GET /v1/scenarios": plain("/v1/scenarios"),
    "POST /v1/clusters/{id}/scale": plain("/v1/clusters/WHOSE-dev/scale", {"workers": 1}, (409,),
        (404,)),  # it has no launcher
    "GET /v1/clusters/{id}/logs": plain("/v1/clusters/WHOSE-dev/logs", None, (200,), (404,)),
    "GET /v1/schedules": plain("/v1/schedules"),
    "POST /v1/schedules": plain("/v1/schedules", lambda place,
        whose: {"cron": "@yearly", "test": create_body(tenantId=whose)}, (201,), (403,)),
    "GET /v1/schedules/{id}": of_schedule(),
    "PATCH /v1/schedules/{id}": of_schedule("", {"paused": True}),
    "POST /v1/schedules/{id}/run": of_schedule("/run", None, (201,)),
    "DELETE /v1/schedules/{id}": of_schedule("", None, (204,)),
    "GET /v1/notifications": plain("/v1/notifications"),
    "POST /v1/notifications/test": plain("/v1/notifications/test", {"id": "nobody"}, (400,)),
    "GET /v1/tests/compare": Rule(compared),
    "GET /v1/trends": plain("/v1/trends?tenantId=WHOSE"),
    "GET /v1/baselines/{tenantId}/{envId}/{scenarioId}": plain(BASELINE, None, (200,), (404,)),
    "PUT /v1/baselines/{tenantId}/{envId}/{scenarioId}": plain(BASELINE, lambda place,
        whose: {"runId": place.finished[whose]}, (200,), (403,)),
    "DELETE /v1/baselines/{tenantId}/{envId}/{scenarioId}": plain(BASELINE, None, (204, 404), (404,)),
    "GET /v1/events": plain("/v1/events"),
    "GET /metrics": plain("/metrics"),
    "GET /v1/clusters": plain("/v1/clusters"),
    "POST /v1/stop-all": plain("/v1/stop-all", lambda place, whose: {"tenantId": whose}),
    "GET /v1/audit": plain("/v1/audit?tenantId=WHOSE"),
    "GET /v1/sessions": plain("/v1/sessions"),
    "GET /v1/whoami": plain("/v1/whoami"),
    "DELETE /v1/sessions/{id}": Rule(a_sign_in, frozenset({204})),
    "POST /v1/admin/reload": plain("/v1/admin/reload", None, (403,)),  # the file is of all tenants
    "DELETE /session": plain("/session", None, (204,)),
    "POST /session/end": plain("/session/end", None, (204,)),
    # of anyone: they tell nothing of any tenant
    **{f"GET {path}": plain(path) for path in ("/", "/docs", "/openapi.json", "/session", "/health",
        "/ready")},
    **{f"GET {path}": plain(path, own=(404,)) for path in ("/session/oidc",
        "/session/oidc/callback")},  # not configured here
    "POST /session": plain("/session", {"token": "wrong"}, (401, 429)),
    # callbacks: with the token of acme's cluster
    **{f"POST /v1/internal/locust/{name}": plain(
        f"/v1/internal/locust/{name}",
        lambda place, whose: {"runId": place.others_run if whose == "beta" else place.finished["acme"],
            "metrics": {}}, (200,), (404,))
       for name in ("test-start", "test-stop", "metrics")},
    "POST /v1/internal/locust/register-external": plain(
        "/v1/internal/locust/register-external", lambda place, whose: {"tenantId": whose, "envId": "dev"},
        (200,), (403,)),
}  # fmt: skip


def status_and_body(
    place: Place, method: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[int, bytes]:
    if path.endswith("/events"):
        with EventStream(StreamAt(place.lm), path, headers, token=None) as stream:
            head = stream.head()
            status = int(head.split(" ")[1])
            return status, json.dumps(stream.next()).encode() if status == 200 else b""
    answer = place.lm.request(method, path, body, headers, token=None)
    return answer.status, answer.body


class StreamAt:
    def __init__(self, lm: LoadManager):
        self.port = int(lm.url.rsplit(":", 1)[1])


CASES = [
    (route, role, whose)
    for route in loadmanager.ROUTES
    for role in (None, *ROLES)
    for whose in ("acme", "beta")
]


@pytest.mark.parametrize(
    "route,role,whose",
    CASES,
    ids=lambda value: getattr(value, "path", None) and f"{value.method} {value.path}" or str(value),
)
def test_every_route_for_every_role_and_tenant(place, route, role, whose):
    name = f"{route.method} {route.path}"
    assert name in RULES, f"{name} has no rule here: say what another tenant gets from it"
    rule = RULES[name]
    allowed = {"anyone": (None, *ROLES), "locust": ()}.get(route.access) or (
        ROLES[ROLES.index(route.access) :] if route.access in ROLES else ()
    )
    if role in allowed or route.access == "locust":
        path, body = rule.ask(place, whose)
    else:
        path, body = rule.ask(place, "beta")  # it will not get there
    if route.access == "locust":
        headers = (
            {"X-Locust-Token": "callback-of-acme"}
            if role == "admin"
            else {"Authorization": f"Bearer {TOKENS.get((role, 'acme'))}"}
        )
        expected = (rule.other if whose == "beta" else rule.own) if role == "admin" else {401, 429}
    else:
        headers = {"Authorization": f"Bearer {TOKENS[role, 'acme']}"} if role else {}
        expected = {401, 429} if role is None else {403}
        if role in allowed:
            expected = rule.other if whose == "beta" else rule.own
    before = place.lm.get(f"/v1/tests/{place.others_run}").json
    status, answer = status_and_body(place, route.method, path, body, headers)
    assert status in expected, (
        f"{name} as {role} of acme on {whose}'s: {status}, right is {set(expected)}: {answer[:300]!r}"
    )
    after = place.lm.get(f"/v1/tests/{place.others_run}").json
    assert after["status"] == before["status"] == "Running" and after.get("annotations") is None, (
        "another tenant's run was changed"
    )
    if status < 300 and whose == "beta" and rule.hidden:
        assert place.others_run.encode() not in answer and place.finished["beta"].encode() not in answer, (
            "another tenant's run is shown"
        )
    if route.access != "anyone" and status < 300 and route.method != "GET":
        place.stop_all("acme")


def headers_but_of_time(answer):
    return {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}


def test_run_of_another_tenant_is_answered_as_one_that_is_not_there(place):
    bearer = {"token": TOKENS["operator", "acme"]}
    real, invented = (
        place.lm.get(f"/v1/tests/{place.others_run}", **bearer),
        place.lm.get("/v1/tests/0" + place.others_run[1:], **bearer),
    )
    assert (real.status, invented.status) == (404, 404)
    assert real.body.replace(place.others_run.encode(), b"") == invented.body.replace(
        b"0" + place.others_run[1:].encode(), b""
    )
    assert headers_but_of_time(real) == headers_but_of_time(invented)


def test_lists_have_only_one_s_own(place):
    for role in ROLES:
        for path in (
            "/v1/tests",
            "/v1/tests?tenantId=beta",
            "/v1/tests?search=beta",
            "/v1/trends",
            "/v1/clusters",
        ):
            answer = place.lm.get(path, token=TOKENS[role, "acme"])
            assert answer.status == 200 and b'"beta"' not in answer.body, (
                f"{path} as {role}: {answer.body[:300]!r}"
            )
    assert {run["tenantId"] for run in place.lm.get("/v1/tests").json} == {"acme", "beta"}, (
        "the administrator's own token sees all"
    )


def test_event_streams_tell_only_of_one_s_own(place):
    with EventStream(StreamAt(place.lm), "/v1/events", token=TOKENS["viewer", "acme"]) as stream:
        stream.head()
        stream.next("ready")
        place.lm.post(f"/v1/tests/{place.finished['beta']}/annotations", {"text": "seen by beta only"})
        place.lm.post(f"/v1/tests/{place.finished['acme']}/annotations", {"text": "seen by acme"})
        event = stream.next()
        assert event["event"] == "run" and event["data"]["tenantId"] == "acme"
    era, _, number = event["id"].partition("-")
    with EventStream(
        StreamAt(place.lm), "/v1/events", {"Last-Event-ID": f"{era}-1"}, token=TOKENS["viewer", "acme"]
    ) as stream:
        stream.head()
        for event in stream.events():
            assert (
                event["data"].get("tenantId", "acme") == "acme"
                and event["data"].get("id") != place.others_run
            )
            if event["id"] and int(event["id"].partition("-")[2]) >= int(number):
                break


def test_sign_in_has_the_scope_of_its_token(place):
    signed_in = place.lm.post("/session", {"token": TOKENS["viewer", "acme"]}, token=None)
    assert (signed_in.json["name"], signed_in.json["role"], signed_in.json["tenants"]) == (
        "acme-viewer",
        "viewer",
        ["acme"],
    )
    cookie = {"Cookie": signed_in.headers["set-cookie"].split(";")[0]}
    assert place.lm.get(f"/v1/tests/{place.others_run}", headers=cookie, token=None).status == 404
    assert b'"beta"' not in place.lm.get("/v1/tests", headers=cookie, token=None).body
    changing = {**cookie, "Origin": place.lm.url, "X-CSRF-Token": signed_in.json["csrfToken"]}
    answer = place.lm.post(
        f"/v1/tests/{place.finished['acme']}/annotations", {"text": "x"}, headers=changing, token=None
    )
    assert answer.status == 403 and "operator" in answer.json["message"]


def test_create_elsewhere_names_the_field(place):
    answer = place.lm.post("/v1/tests", create_body(tenantId="beta"), token=TOKENS["admin", "acme"])
    assert (
        answer.status == 403
        and "acme" in answer.json["fields"]["tenantId"]
        and list(answer.json["fields"]) == ["tenantId"]
    )
    nowhere = place.lm.post("/v1/tests", create_body(tenantId="no-such"), token=TOKENS["admin", "acme"])
    assert (nowhere.status, set(nowhere.json["fields"])) == (403, {"tenantId"}), (
        "the answer tells which tenants exist"
    )


def test_idempotency_key_of_another_is_not_ours(place):
    """The same key from two callers is two keys."""
    key = {"Idempotency-Key": "nightly"}
    first = place.lm.post("/v1/tests", create_body(), headers=key, token=TOKENS["operator", "acme"])
    second = place.lm.post("/v1/tests", create_body(), headers=key, token=TOKENS["admin", "acme"])
    assert first.status == 201 and second.status == 409 and second.json["activeRunId"] == first.json["id"]
    place.stop_all("acme")


# ---- tokens ----------------------------------------------------------------


def test_new_token_of_the_command_line_works_until_it_expires(load_manager, fake, tmp_path):
    def make(*options: str) -> tuple[str, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "loadmanager.py"), "token", "new", *options],
            capture_output=True,
            text=True,
            timeout=20,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        token, line = done.stdout.splitlines()
        return token, yaml.safe_load(line)[0]

    token, entry = make(
        "--name", "ci", "--role", "operator", "--tenant", "acme", "--env", "dev", "--expires-in", "1h"
    )
    assert entry["tokenSha256"] == hashlib.sha256(token.encode()).hexdigest() and token not in json.dumps(
        entry
    )
    short_token, short = make("--name", "short", "--role", "viewer", "--tenant", "*", "--expires-in", "3s")
    past = {"name": "past", "token": "long-past-token", "role": "admin", "expiresAt": "2020-01-31"}
    lm = load_manager(tenant_cluster(fake, "acme"), security={"apiTokens": [entry, short, past]})
    assert lm.get("/v1/tests", token=token).status == 200
    assert lm.get("/v1/tests", token="long-past-token").status == 401
    assert lm.get("/v1/tests", token=short_token).status == 200, "a token of 3 s was refused at once"
    eventually(
        lambda: lm.get("/v1/tests", token=short_token).status == 401,
        6,
        what="the token ends at its moment, remembered or not",
    )
    assert token not in lm.log() and short_token not in lm.log()


@pytest.mark.parametrize(
    "entries, words",
    [
        (
            [{"name": "a", "role": "viewer", "tenants": ["t"]}],
            "must have one of tokenSha256, token and tokenFile",
        ),
        (
            [{"name": "a", "role": "viewer", "tenants": ["t"], "token": "x", "tokenSha256": "0" * 64}],
            "must have one of",
        ),
        ([{"name": "a", "role": "viewer", "token": "x"}], "tenants: is missing"),
        (
            [{"name": "a", "role": "owner", "token": "x", "tenants": ["t"]}],
            "role: must be viewer or operator or admin",
        ),
        (
            [{"name": "a", "role": "admin", "token": "x"}, {"name": "a", "role": "admin", "token": "y"}],
            "name: a is taken",
        ),
        ([{"name": "api", "role": "admin", "token": "x"}], "api is taken"),
        (
            [{"name": "a", "role": "admin", "token": "x"}, {"name": "b", "role": "admin", "token": "x"}],
            "another token is the same",
        ),
        ([{"name": "a", "role": "admin", "token": API_TOKEN}], "another token is the same"),
        ([{"name": "a\nb", "role": "admin", "token": "x"}], "name: must be"),
        (
            [{"name": "a", "role": "admin", "token": "x", "expiresAt": "tomorrow"}],
            "expiresAt: must be an RFC 3339 time",
        ),
        (
            [{"name": "a", "role": "admin", "tokenSha256": "abc"}],
            "tokenSha256: must be 64 hexadecimal digits",
        ),
        ([{"name": "a", "role": "admin", "token": "x", "tenant": "t"}], "did you mean tenants?"),
        (
            [{"name": "a", "role": "viewer", "token": "x", "tenants": []}],
            "tenants: must be a list of names",
        ),
    ],
)
def test_wrong_declaration_of_a_token_is_a_problem_of_the_configuration(entries, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(base_config(security={"apiTokens": entries})))
    with pytest.raises(loadmanager.ConfigError) as caught:
        loadmanager.load_config(str(path), {})
    assert words in str(caught.value), caught.value


def test_token_of_some_environments_sees_only_these(load_manager, fake_locust):
    clusters = [tenant_cluster(fake_locust(), "acme", env) for env in ("dev", "prod")]
    lm = load_manager(
        *clusters,
        security={
            "apiTokens": [
                {
                    "name": "dev",
                    "token": "dev-token",
                    "role": "operator",
                    "tenants": ["acme"],
                    "environments": ["dev"],
                }
            ]
        },
    )
    prod, dev = lm.create(envId="prod").json, lm.create(envId="dev").json
    assert [run["id"] for run in lm.get("/v1/tests", token="dev-token").json] == [dev["id"]]
    assert [cluster["envId"] for cluster in lm.get("/v1/clusters", token="dev-token").json] == ["dev"]
    assert lm.get(f"/v1/tests/{prod['id']}", token="dev-token").status == 404
    answer = lm.post("/v1/tests", create_body(envId="prod"), token="dev-token")
    assert answer.status == 403 and "dev" in answer.json["fields"]["envId"]
    assert lm.post("/v1/stop-all", {}, token="dev-token").json["stopped"] == [dev["id"]]
    assert lm.run(prod["id"])["status"] == "Running"


def test_good_token_is_served_while_the_address_is_refused(lm):
    statuses = [lm.get("/v1/tests", token="wrong").status for _ in range(40)]
    assert statuses[0] == 401 and statuses[-1] == 429
    refused = lm.get("/v1/tests", token="wrong")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert lm.get("/v1/tests").status == 200, "others' wrong tokens locked the good one out"


def test_callback_token_of_a_cluster_reaches_only_its_runs(load_manager, fake_locust):
    guarded, common = fake_locust(), fake_locust()
    lm = load_manager(
        tenant_cluster(guarded, "acme", callbackToken="guarded-token"), tenant_cluster(common, "beta")
    )
    runs = {tenant: lm.create(tenantId=tenant).json["id"] for tenant in ("acme", "beta")}
    pushed = {"metrics": {"totalRequests": 5}}
    assert lm.callback("metrics", {"runId": runs["acme"], **pushed}, "guarded-token").status == 200
    assert lm.callback("metrics", {"runId": runs["beta"], **pushed}, "guarded-token").status == 404
    assert lm.callback("metrics", {"runId": runs["acme"], **pushed}, CALLBACK_TOKEN).status == 404
    assert lm.callback("metrics", {"runId": runs["beta"], **pushed}, CALLBACK_TOKEN).status == 200
    assert (
        lm.callback("register-external", {"tenantId": "acme", "envId": "dev"}, CALLBACK_TOKEN).status == 403
    )
    asked = eventually(lambda: [call for call in guarded.calls if call.path == loadmanager.HOOKS_PATH], 5)
    assert asked[0].headers["X-Locust-Token"] == "guarded-token", (
        "Locust is asked with another token than its hooks know"
    )


def test_callback_token_of_a_cluster_does_not_reach_a_run_that_waits_elsewhere(load_manager, fake_locust):
    lm = load_manager(
        tenant_cluster(fake_locust(), "acme", callbackToken="guarded-token"),
        tenant_cluster(fake_locust(), "beta"),
    )
    lm.create(tenantId="beta")
    waiting = lm.create(tenantId="beta", queue=True).json["id"]
    answer = lm.callback("metrics", {"runId": waiting, "metrics": {"totalRequests": 5}}, "guarded-token")
    assert answer.status == 404 and "lastMetrics" not in lm.run(waiting)


# ---- what loads may be -----------------------------------------------------


def test_limits_of_a_tenant_are_refused_with_every_field_at_once(load_manager, fake):
    limits = {
        "id": "acme",
        "maxUsers": 10,
        "maxDurationSeconds": 60,
        "allowedHosts": ["*.staging.example", "10.0.0.0/8:8080"],
    }
    lm = load_manager(
        tenant_cluster(fake, "acme"),
        tenants=[limits],
        environments=[{"tenantId": "acme", "id": "dev", "protected": True}],
    )
    answer = lm.create(targetUsers=11, host="http://prod.example")
    assert answer.status == 403 and set(answer.json["fields"]) == {
        "targetUsers",
        "durationSeconds",
        "host",
        "confirm",
    }, answer.json
    assert not fake.swarms and not lm.get("/v1/tests").json, "a refused load was kept or started"
    good = {"targetUsers": 10, "durationSeconds": 60, "host": "http://shop.staging.example"}
    unconfirmed = lm.create(**good)
    assert (
        unconfirmed.status == 400
        and set(unconfirmed.json["fields"]) == {"confirm"}
        and '"dev"' in unconfirmed.json["fields"]["confirm"]
    )
    assert lm.create(**good, confirm="prod").status == 400
    run = lm.create(**good, confirm="dev")
    assert run.status == 201 and run.json["host"] == "http://shop.staging.example"
    assert fake.swarms[0].form["host"] == "http://shop.staging.example"
    lm.post(f"/v1/tests/{run.json['id']}/stop")
    assert lm.post(f"/v1/tests/{run.json['id']}/rerun", {}).status == 400, (
        "a protected environment was loaded again without a word"
    )
    assert eventually(
        lambda: lm.post(f"/v1/tests/{run.json['id']}/rerun", {"confirm": "dev"}).status == 201, 10
    )
    assert lm.get("/v1/clusters").json[0]["protected"] is True


def test_target_that_is_not_known_is_refused_where_hosts_are_limited(load_manager, fake):
    lm = load_manager(
        tenant_cluster(fake, "acme"), tenants=[{"id": "acme", "allowedHosts": ["good.example"]}]
    )
    answer = lm.create()
    assert answer.status == 403 and "host is needed" in answer.json["fields"]["host"]
    assert lm.create(host="http://good.example").status == 201


@pytest.mark.parametrize(
    "host, patterns, allowed",
    [
        ("http://a.example", ["a.example"], True),
        ("https://A.EXAMPLE:443/x", ["a.example"], True),
        ("http://a.example.", ["a.example"], True),  # the same name, with its root
        ("http://b.a.example", ["*.a.example"], True),
        ("http://a.example", ["*.a.example"], False),
        ("http://evil-a.example", ["*.a.example", "a.example"], False),
        ("http://a.example.evil.example", ["a.example"], False),
        ("http://a.example@evil.example", ["a.example"], False),
        ("http://evil.example/a.example", ["a.example"], False),
        ("http://evil.example?a.example", ["a.example"], False),
        ("http://a.example:8080", ["a.example:8080"], True),
        ("http://a.example", ["a.example:8080"], False),
        ("https://a.example", ["a.example:443"], True),
        ("http://10.1.2.3", ["10.0.0.0/8"], True),
        ("http://11.1.2.3", ["10.0.0.0/8"], False),
        ("http://10.1.2.3.evil.example", ["10.0.0.0/8"], False),
        ("http://167838211", ["10.0.0.0/8"], False),
        ("http://0x0a.1.2.3", ["10.0.0.0/8"], False),
        ("http://[::1]:8080", ["[::1]:8080"], True),
        ("http://[::ffff:10.1.2.3]", ["11.0.0.0/8"], False),
        ("ftp://a.example", ["*"], False),
        ("http://anything.example", ["*"], True),
        ("http://a.example\r\nHost: evil", ["a.example"], False),
        ("", ["*"], False),
    ],
)
def test_hosts_a_load_may_aim_at(host, patterns, allowed):
    assert loadmanager.host_allowed(host, patterns) is allowed


def test_tenant_has_no_more_runs_and_users_than_it_may(load_manager, fake_locust):
    clusters = [{**tenant_cluster(fake_locust(), "acme"), "id": f"c{number}"} for number in range(3)]
    lm = load_manager(*clusters, tenants=[{"id": "acme", "maxConcurrentRuns": 2, "maxUsers": 12}])
    first = lm.create(targetUsers=5).json
    too_many_users = lm.create(targetUsers=8)
    assert too_many_users.status == 409 and "12 users" in too_many_users.json["message"]
    assert lm.create(targetUsers=5).status == 201
    third = lm.create(targetUsers=1)
    assert third.status == 409 and "2 runs" in third.json["message"]
    waiting = lm.create(targetUsers=1, queue=True).json
    assert waiting["status"] == "Pending" and waiting["queuePosition"] == 1
    lm.post(f"/v1/tests/{first['id']}/stop")
    lm.wait_for(waiting["id"], "Running")


def test_concurrent_creates_do_not_pass_a_limit_together(load_manager, fake_locust):
    from concurrent.futures import ThreadPoolExecutor

    clusters = [{**tenant_cluster(fake_locust(), "acme"), "id": f"c{number}"} for number in range(6)]
    lm = load_manager(*clusters, tenants=[{"id": "acme", "maxConcurrentRuns": 2}])
    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(lambda _: lm.create().status, range(8)))
    assert statuses == [201, 201] + [409] * 6


def test_stop_all_stops_all_clusters_at_once(load_manager, fake_locust):
    fakes = [fake_locust() for _ in range(4)]
    lm = load_manager(
        *({**tenant_cluster(fake, "acme"), "id": f"c{number}"} for number, fake in enumerate(fakes))
    )
    running = [lm.create().json["id"] for _ in fakes]
    queued = lm.create(queue=True).json["id"]
    all_asked = threading.Barrier(len(fakes))
    for fake in fakes:
        fake.faults["/stop"] = stop_once(all_asked)
    answer = lm.post("/v1/stop-all", {})
    assert (
        answer.status == 200 and answer.json["success"] and set(answer.json["stopped"]) == {*running, queued}
    )
    assert not all_asked.broken, "the clusters were stopped one after the other"
    assert all(lm.wait_for(run_id, "Finished")["stopReason"] == "user" for run_id in running)
    assert lm.run(queued)["status"] == "Failed" and all(len(fake.swarms) == 1 for fake in fakes), (
        "who waited was started meanwhile"
    )
    assert lm.post("/v1/stop-all", {}).json == {"success": True, "stopped": [], "failed": []}


def test_stop_all_stops_a_run_that_is_just_starting(load_manager, fake_locust):
    from concurrent.futures import ThreadPoolExecutor

    fake = fake_locust()
    lm = load_manager(tenant_cluster(fake, "acme"))

    def slow_swarm(handler: Any) -> None:
        time.sleep(1)
        handler.fake.swarm({"user_count": "5"})
        handler.send_json({"success": True, "message": "Swarming started"})

    fake.faults["/swarm"] = slow_swarm
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(lm.create)
        eventually(lambda: lm.get("/v1/tests?status=Pending").json, 5)
        answer = lm.post("/v1/stop-all", {})
        run_id = starting.result().json["id"]
    assert answer.json["stopped"] == [run_id] and fake.users == 0, (
        "the load goes on that began while all was stopped"
    )
    assert lm.wait_for(run_id, "Finished")["stopReason"] == "user"


def stop_once(all_asked: threading.Barrier) -> Callable[[Any], None]:
    """A stop that ends when all masters have got theirs."""

    def answer(handler: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            all_asked.wait(20)
        handler.fake.end_test()
        handler.send_json({"success": True, "message": "Test stopped"})

    return answer


def test_stop_all_of_the_command_line(lm):
    run_id = lm.create().json["id"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "loadmanager.py"),
            "stop",
            "--all",
            "--url",
            lm.url,
            "--token",
            API_TOKEN,
        ],
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0 and run_id in done.stdout, done.stderr
    assert lm.run(run_id)["status"] in ("Stopping", "Finished")


# ---- the dashboard ---------------------------------------------------------


def sign_in(browser: Any, lm: LoadManager, token: str) -> None:
    from selenium.webdriver.common.by import By

    browser.driver.get(lm.url + "/")
    eventually(lambda: browser.driver.find_elements(By.ID, "token"), 10)[0].send_keys(token + "\n")
    eventually(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#top .who"), 10)


def test_dashboard_shows_one_s_own_and_its_red_button_stops_it(place):
    from chromium import Chromium
    from selenium.webdriver.common.by import By

    run_id = place.start("acme")
    with Chromium() as browser:
        sign_in(browser, place.lm, TOKENS["viewer", "acme"])
        page = browser.driver.find_element(By.TAG_NAME, "body")
        eventually(lambda: "acme" in page.text, 10)
        assert "beta" not in page.text and not browser.driver.find_elements(By.ID, "stop-all"), (
            "a viewer is offered to stop"
        )
        browser.driver.find_element(By.ID, "sign-out").click()
        sign_in(browser, place.lm, TOKENS["operator", "acme"])
        page = browser.driver.find_element(By.TAG_NAME, "body")
        browser.driver.find_element(By.ID, "stop-all").click()
        dialog = eventually(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "dialog[open]"), 5)[0]
        assert place.lm.run(run_id)["status"] == "Running", "it did not ask"
        dialog.find_element(By.CSS_SELECTOR, "button.danger").click()
        place.lm.wait_for(run_id, "Finished")
        assert place.lm.run(place.others_run)["status"] == "Running"
        eventually(lambda: "1 stopped" in page.text, 5)
        assert not browser.complaints()


def test_dashboard_asks_before_it_loads_a_protected_environment(load_manager, fake):
    from chromium import Chromium
    from selenium.webdriver.common.by import By

    lm = load_manager(
        tenant_cluster(fake, "acme"), environments=[{"tenantId": "acme", "id": "dev", "protected": True}]
    )
    with Chromium() as browser:
        sign_in(browser, lm, API_TOKEN)
        browser.driver.find_element(By.ID, "start").click()
        form = eventually(lambda: browser.driver.find_elements(By.ID, "start-dialog"), 5)[0]
        form.find_element(By.CSS_SELECTOR, "input[list=scenarios], input[maxlength]").send_keys("browse")
        form.find_element(By.CSS_SELECTOR, "button.primary").click()
        question = eventually(
            lambda: next(
                (
                    one
                    for one in browser.driver.find_elements(By.CSS_SELECTOR, "dialog[open]")
                    if "protected" in one.text
                ),
                None,
            ),
            5,
        )
        assert not fake.swarms
        question.find_element(By.CSS_SELECTOR, "button.danger").click()
        eventually(lambda: len(fake.swarms) == 1, 5)


# ---- the audit -------------------------------------------------------------


def entries(lm: LoadManager, query: str = "", **how: Any) -> list[dict[str, Any]]:
    return lm.get(f"/v1/audit{query}", **how).json


def test_audit_tells_who_did_what_from_where_with_what_result(load_manager, fake_locust):
    lm = load_manager(
        tenant_cluster(fake_locust(), "acme"), tenant_cluster(fake_locust(), "beta"),
        security={"apiTokens": api_tokens()}, audit={"file": "audit.jsonl"},
    )  # fmt: skip
    run_id = lm.post(
        "/v1/tests",
        create_body(metadata={"password": "secret-of-the-body"}),
        token=TOKENS["operator", "acme"],
    ).json["id"]
    created = entries(lm)[0]
    at = created.pop("at")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", at)
    assert created == {
        "who": "acme-operator", "role": "operator", "address": "127.0.0.1", "action": "POST /v1/tests",
        "tenantId": "acme", "envId": "dev",
        "runId": run_id, "status": 201, "outcome": "done",
    }  # fmt: skip
    lm.get("/v1/tests", token="wrong-secret-token")
    lm.post("/session", {"token": "wrong-secret-token"}, token=None)
    lm.post("/session", {"token": TOKENS["viewer", "acme"]}, token=None)
    lm.get(f"/v1/tests/{run_id}", token=TOKENS["admin", "beta"])
    lm.post(f"/v1/tests/{run_id}/stop", token=TOKENS["viewer", "acme"])
    lm.post(f"/v1/tests/{run_id}/stop", token=TOKENS["admin", "acme"])
    lm.post("/v1/tests", {"tenantId": 5, "token": "secret-of-the-body"}, token=TOKENS["admin", "acme"])
    told = [
        (entry.get("who"), entry["action"], entry["status"], entry["outcome"])
        for entry in reversed(entries(lm))
    ][1:]
    assert told == [
        (None, "GET /v1/tests", 401, "refused"),
        (None, "POST /session", 401, "refused"),
        ("acme-viewer", "POST /session", 200, "done"),
        ("beta-admin", "GET /v1/tests/{id}", 404, "refused"),
        ("acme-viewer", "POST /v1/tests/{id}/stop", 403, "refused"),
        ("acme-admin", "POST /v1/tests/{id}/stop", 200, "done"),
        ("acme-admin", "POST /v1/tests", 400, "failed"),
    ]
    assert [entry["status"] for entry in entries(lm, f"?runId={run_id}&outcome=refused")] == [403, 404]
    assert entries(lm, "?who=nobody") == [] and len(entries(lm, "?action=/stop")) == 2
    assert {entry.get("tenantId") for entry in entries(lm, token=TOKENS["admin", "acme"])} == {"acme"}
    assert "beta-admin" in [entry["who"] for entry in entries(lm, token=TOKENS["admin", "acme"])], (
        "who tried one's runs is told"
    )
    assert entries(lm, token=TOKENS["admin", "beta"]) == []
    lines = [json.loads(line) for line in (lm.folder / "audit.jsonl").read_text().splitlines()]
    assert lines == list(reversed(entries(lm))), "the file is not the same as the audit"
    for text in (json.dumps(entries(lm)), (lm.folder / "audit.jsonl").read_text(), lm.log()):
        assert not re.search("secret|-token", text), text
    lm.restart()
    assert len(entries(lm)) == len(lines), "the audit did not survive a restart"
    page = lm.get("/v1/audit?limit=3")
    rest = lm.get(re.search("<(.*)>", page.headers["link"]).group(1))
    assert [*page.json, *rest.json] == entries(lm, "?limit=6")


def test_refusals_have_a_budget_for_each_address_and_in_all():
    budget = loadmanager.RefusalBudget()
    of_one = sum(budget.takes("10.0.0.1") for _ in range(1000))
    assert 30 <= of_one < 40
    assert budget.takes("10.0.0.2"), "another address has its own"
    of_a_network = sum(budget.takes(f"2001:db8::{number:x}") for number in range(1, 1000))
    assert 30 <= of_a_network < 40, "who has one address of IPv6 has its /64"
    in_all = 1 + of_one + of_a_network
    in_all += sum(budget.takes(f"10.{number // 250}.1.{number % 250}") for number in range(5000))
    assert 300 <= in_all < 350
    assert budget.take_skipped()[0] == 1 + 1000 + 999 + 5000 - in_all and budget.take_skipped() == (0, 0)


def test_flood_without_credentials_does_not_fill_the_audit(load_manager, fake, monkeypatch):
    """Sign-ins with bad bodies and wrong tokens, a provider's callback: some are written, the rest is
    counted."""
    lm = load_manager(cluster_config(fake.url))
    for _ in range(40):
        assert lm.post("/session", {"token": 1}, token=None).status == 400
        assert lm.post("/session", {"token": "wrong"}, token=None).status in (401, 429)
        assert lm.get("/session/oidc/callback?code=x", token=None).status in (400, 401, 404)
        assert lm.get("/v1/tests", token="wrong").status in (401, 429)
    written = lm.get("/v1/audit?limit=1000").json
    assert 25 <= len(written) <= 45, len(written)
    assert lm.create().status == 201, "who has a token is written as ever"
    assert lm.get("/v1/audit?limit=1").json[0]["action"] == "POST /v1/tests"


def test_refusals_that_were_too_many_are_one_entry(tmp_path, monkeypatch):
    """In the process itself: a minute is too long to wait."""
    monkeypatch.setattr(loadmanager.Api, "REFUSALS_REPORTED_S", 0.2)
    config = loadmanager.Config(
        security=loadmanager.SecurityConfig(api_token="a", callback_token="b"),
        server=loadmanager.ServerConfig(port=0),
        storage=loadmanager.StorageConfig(url="memory:"),
        folder=str(tmp_path),
    )
    service = loadmanager.Service(config, str(tmp_path / "config.json"))
    service.start()
    try:
        for _ in range(50):
            request = urllib.request.Request(
                service.url + "/session", b"{}", {"Content-Type": "application/json"}
            )
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(request, timeout=10)
        filter_ = loadmanager.AuditFilter(action="refusals")

        def told():
            return service._store.audit.entries(filter_, loadmanager.EVERYTHING, 10)

        [(_, entry)] = eventually(told, 10)
        assert entry.detail == "20 more refusals, of 1 address, were too many to write"
    finally:
        service._timer.close()
        service._loop.close()
        service._server.shutdown()
        service._server.server_close()
        service._store.close()


def test_old_entries_of_the_audit_go(load_manager, fake, monkeypatch):
    lm = load_manager(cluster_config(fake.url))
    for _ in range(3):
        lm.post("/v1/stop-all", {})
    lm.terminate()
    database = sqlite3.connect(lm.folder / "runs.db")
    day_s = 86400
    database.execute("UPDATE audit SET at = ? WHERE seq = 1", (time.time() - 366 * day_s,))
    database.execute("UPDATE audit SET at = ? WHERE seq = 2", (time.time() - 364 * day_s,))
    database.commit()
    database.close()
    lm.start()
    eventually(lambda: len(lm.get("/v1/audit").json) == 2, 10, what="an entry of more than a year is gone")
    lm.config["security"]["auditDays"] = 7
    lm.restart()
    eventually(lambda: len(lm.get("/v1/audit").json) == 1, 10)


def test_audit_is_aged_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(loadmanager.AuditLog, "ROWS_AT_ONCE", 3)
    store = loadmanager.Store(loadmanager.open_database("sqlite:///a.db", str(tmp_path)))
    for number in range(10):
        store.audit.add(loadmanager.AuditEntry(float(number), "", "", "", "x", "", "", "", 200, ""))
    assert (store.audit.forget(8.0), store.audit.forget(8.0)) == (8, 0)
    left = store.audit.entries(loadmanager.AuditFilter(), loadmanager.EVERYTHING, 100)
    assert [entry.at for _, entry in left] == [9.0, 8.0]
    store.close()
