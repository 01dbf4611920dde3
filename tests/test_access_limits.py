"""Limits of one caller that end nobody else's: sessions, wrong tokens; and what clients of the original
send."""

from __future__ import annotations

import json
import re
import time

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, create_body

import loadmanager


def test_flood_of_sign_ins_ends_only_the_oldest_of_one_s_own():
    sessions = loadmanager.Sessions()
    administrator = loadmanager.Principal("api", "admin")
    _, secret = sessions.begin(administrator)
    viewer = loadmanager.Principal("viewer", "viewer")
    secrets = [sessions.begin(viewer)[1] for _ in range(1001)]
    assert sessions.is_alive(secret), "a viewer's sign-ins ended the administrator's"
    alive = [sessions.is_alive(one) for one in secrets]
    assert alive.count(True) == sessions.MAX_PER_USER and all(alive[-sessions.MAX_PER_USER :])


def test_sessions_in_all_are_bounded_at_the_cost_of_who_has_most(monkeypatch):
    monkeypatch.setattr(loadmanager.Sessions, "MAX_SESSIONS", 20)
    sessions = loadmanager.Sessions()
    single = sessions.begin(loadmanager.Principal("single", "viewer"))[1]
    for number in range(40):
        sessions.begin(loadmanager.Principal(f"many{number % 3}", "viewer"))
    assert len(sessions._by_digest) == 20 and sessions.is_alive(single)


@pytest.mark.parametrize(
    "one, other, together",
    [
        ("2001:db8::1", "2001:db8:0:0:ffff::9", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
    ],
)
def test_wrong_tokens_of_one_network_are_counted_together(one, other, together):
    attempts = loadmanager.FailedAttempts()
    for _ in range(attempts.MAX_FAILURES):
        attempts.record_failure(one)
    assert (attempts.record_failure(other) is not None) is together


def test_flood_of_addresses_frees_no_one_who_guesses():
    attempts = loadmanager.FailedAttempts()
    for _ in range(attempts.MAX_FAILURES + 5):
        attempts.record_failure("10.0.0.1")
    for number in range(attempts.MAX_ADDRESSES + 500):
        attempts.record_failure(f"10.{1 + number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(attempts._counts) <= attempts.MAX_ADDRESSES
    assert attempts.record_failure("10.0.0.1") is not None, "at 10,000 addresses all counts were forgotten"


# ---- clients of the original -------------------------------------------------


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def test_body_is_json_whatever_its_type_says_when_a_token_comes_with_it(lm):
    answer = lm.post("/v1/tests", json.dumps(create_body()).encode(), headers=FORM)
    assert answer.status == 201, answer.body
    pushed = lm.request(
        "POST", "/v1/internal/locust/metrics", json.dumps({"runId": answer.json["id"],
            "metrics": {}}).encode(),
        {**FORM, "X-Locust-Token": CALLBACK_TOKEN}, token=None,
    )  # fmt: skip
    assert pushed.status == 200
    assert lm.post("/v1/tests", b"tenantId=acme", headers=FORM).status == 400


def test_body_with_a_cookie_must_say_that_it_is_json(lm):
    signed_in = lm.post("/session", {"token": API_TOKEN}, token=None)
    headers = {
        "Cookie": signed_in.headers["set-cookie"].split(";")[0],
        "Origin": lm.url,
        "X-CSRF-Token": signed_in.json["csrfToken"],
    }
    body = json.dumps(create_body()).encode()
    assert lm.post("/v1/tests", body, headers={**headers, **FORM}, token=None).status == 415
    assert lm.post("/v1/tests", body, headers=headers, token=None).status == 201


def test_run_of_locust_s_own_page_says_where_it_came_from(lm):
    run_id = lm.callback("register-external", {"tenantId": "acme", "envId": "dev"}).json["runId"]
    metadata = lm.run(run_id)["metadata"]
    assert metadata["source"] == "locust-ui"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", metadata["registeredAt"])
    assert abs(loadmanager.parse_utc(metadata["registeredAt"]) - time.time()) < 3600


def test_number_of_400_digits_is_an_invalid_one(lm):
    for text in ("1" + "0" * 400, "1e400"):
        body = json.dumps(create_body()).replace('"targetUsers": 5', f'"targetUsers": {text}').encode()
        answer = lm.post("/v1/tests", body)
        assert answer.status == 400 and "targetUsers" in answer.json["fields"], answer.body[:300]


def test_times_of_a_run_are_whole_seconds_and_exact_beside_them(lm):
    run = lm.create().json
    pushed_at = "2026-11-23T12:00:00.123Z"
    lm.callback("metrics", {"runId": run["id"], "metrics": {"timestamp": pushed_at, "totalRequests": 5}})
    lm.post(f"/v1/tests/{run['id']}/stop")
    run = lm.wait_for(run["id"], "Finished")
    for document, name in ((run, "startedAt"), (run, "finishedAt"), (run["lastMetrics"], "timestamp")):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document[name]), document[name]
        assert int(loadmanager.parse_utc(document[name])) == document[name + "Ms"] // 1000
    assert loadmanager.time_of(run, "finishedAt") == run["finishedAtMs"] / 1000
    assert re.search(r"\.\d{3}Z$", run["createdAt"]), "other times stay exact"
    exported = lm.get(f"/v1/tests/{run['id']}/export").body
    lm.request("DELETE", f"/v1/tests/{run['id']}")
    again = lm.post("/v1/tests/import", exported).json
    assert (again["startedAtMs"], again["finishedAtMs"]) == (run["startedAtMs"], run["finishedAtMs"])
    assert again["lastMetrics"] == run["lastMetrics"]
