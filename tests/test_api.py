"""The wire contract over HTTP: every route, every kind of bad input, callbacks, paging, keys, queue."""

from __future__ import annotations

import gzip
import json
import re
import threading
import uuid
from types import SimpleNamespace

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, cluster_config, create_body, read_answers
from fake_locust import hang
from waiting import eventually, holds_for

import loadmanager

BEARER = f"Host: lm\r\nAuthorization: Bearer {API_TOKEN}\r\n".encode()


def finished_run(lm, **changes):
    run = lm.create(**changes).json
    lm.post(f"/v1/tests/{run['id']}/stop")
    return lm.wait_for(run["id"], "Finished")


# ---- the contract ----------------------------------------------------------


def test_health_needs_no_token_and_says_only_healthy(lm):
    answer = lm.get("/health", token=None)
    assert (answer.status, answer.json) == (200, {"status": "healthy"})


def test_created_run_has_the_contract_s_keys_and_types(lm):
    answer = lm.create(durationSeconds=60, metadata={"ticket": "PERF-1"}, spawnRate=2.5)
    run = answer.json
    assert answer.status == 201 and answer.headers["location"] == f"/v1/tests/{run['id']}"
    uuid.UUID(run["id"])
    wanted = {
        "tenantId": "acme", "envId": "dev", "scenarioId": "browse", "targetUsers": 5, "spawnRate": 2.5,
        "durationSeconds": 60,
        "status": "Running", "locustClusterId": "one", "metadata": {"ticket": "PERF-1"}, "source": "api",
    }  # fmt: skip
    assert {name: run.get(name) for name in wanted} == wanted
    for moment in ("startedAt", "createdAt"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", run[moment]), (
            f"{moment} is not RFC 3339 in UTC: {run[moment]}"
        )
    absent = {"finishedAt", "stopReason", "failureReason", "lastMetrics", "queuePosition"} & set(run)
    assert not absent, f"keys without a value are there: {absent}"


def test_swarm_form_carries_the_run_and_its_end(lm, fake):
    run = lm.create(durationSeconds=60).json
    form = fake.swarms[0].form
    assert form["run_id"] == run["id"] and form["tenant_id"] == "acme" and form["env_id"] == "dev"
    assert (form["user_count"], form["run_time"], form["lm_stop_after"], form["lm_lease"]) == (
        "5",
        "65",
        "65",
        "",
    )


def test_running_test_shows_locust_s_own_numbers(lm):
    run = lm.create().json
    metrics = eventually(lambda: lm.run(run["id"]).get("lastMetrics"), 10)
    assert (
        metrics["p95ResponseMs"] == 150 and metrics["p99ResponseMs"] == 160 and metrics["p50ResponseMs"] == 33
    )
    assert metrics["totalRps"] == 10.0, "totalRps of a running test is the current rate"
    assert metrics["requestStats"]["GET_/api/items"]["p95ResponseTime"] == 150
    assert set(metrics["requestStats"]["GET_/api/items"]) == set(loadmanager.ENDPOINT_KEYS)


def test_stop_answers_the_original_s_words_and_run_finishes(lm, fake):
    run = lm.create().json
    answer = lm.post(f"/v1/tests/{run['id']}/stop")
    assert (answer.status, answer.json) == (200, {"success": True, "message": "Test stopped successfully"})
    assert fake.users == 0, "Locust was not stopped when the stop was answered"
    run = lm.wait_for(run["id"], "Finished")
    assert run["stopReason"] == "user" and run["lastMetrics"]["totalRps"] == 9.28, (
        "the final rate is the whole run's average"
    )


def test_second_stop_is_a_conflict_that_names_the_status(lm):
    run = finished_run(lm)
    answer = lm.post(f"/v1/tests/{run['id']}/stop")
    assert answer.status == 409 and "Finished" in answer.json["message"]


def test_list_is_an_array_newest_first_and_filters(lm):
    first, second = finished_run(lm), finished_run(lm, scenarioId="checkout")
    listed = lm.get("/v1/tests").json
    assert [run["id"] for run in listed] == [second["id"], first["id"]]
    assert [run["id"] for run in lm.get("/v1/tests?tenantId=acme&envId=dev&status=Finished").json] == [
        second["id"],
        first["id"],
    ]
    assert lm.get("/v1/tests?status=Running").json == [] == lm.get("/v1/tests?tenantId=other").json


def test_pages_of_a_list_join_to_the_whole(lm):
    ids = [finished_run(lm)["id"] for _ in range(5)][::-1]
    path, seen = "/v1/tests?limit=2&tenantId=acme", []
    while path:
        answer = lm.get(path)
        assert len(answer.json) <= 2
        seen += [run["id"] for run in answer.json]
        link = re.search(r'<([^>]+)>; rel="next"', answer.headers.get("link", ""))
        path = link.group(1) if link else None
    assert seen == ids


def test_rerun_starts_the_same_again(lm):
    old = finished_run(lm, metadata={"a": 1}, durationSeconds=30)
    answer = lm.post(f"/v1/tests/{old['id']}/rerun")
    assert answer.status == 201 and answer.json["id"] != old["id"]
    for name in ("scenarioId", "targetUsers", "spawnRate", "durationSeconds", "metadata"):
        assert answer.json[name] == old[name], f"{name} differs"


def test_only_a_final_run_can_be_deleted(lm):
    run = lm.create().json
    assert lm.request("DELETE", f"/v1/tests/{run['id']}").status == 409
    lm.post(f"/v1/tests/{run['id']}/stop")
    lm.wait_for(run["id"], "Finished")
    assert lm.request("DELETE", f"/v1/tests/{run['id']}").status == 204
    assert lm.get(f"/v1/tests/{run['id']}").status == 404 and lm.get("/v1/tests").json == []


def test_history_is_downsampled_to_max_points_and_keeps_extremes(lm):
    run_id = lm.create().json["id"]
    for number in range(300):
        metrics = {"totalRequests": number, "totalRps": 5.0, "p95ResponseMs": 20, "currentUsers": 5}
        if number == 137:
            metrics["p95ResponseMs"] = 9999
        assert lm.callback("metrics", {"runId": run_id, "metrics": metrics}).status == 200
    series = lm.get(f"/v1/tests/{run_id}/metrics?maxPoints=50").json
    assert len(series["points"]) <= 50 and series["downsampled"] and series["total"] > 100
    assert max(point["p95ResponseMs"] or 0 for point in series["points"]) == 9999, "the peak was lost"
    whole = lm.get(f"/v1/tests/{run_id}/metrics?maxPoints=100000").json
    assert not whole["downsampled"] and len(whole["points"]) == whole["total"]
    assert lm.get(f"/v1/tests/{run_id}/metrics?from=2099-01-01T00:00:00Z").json["points"] == []
    packed = lm.get(f"/v1/tests/{run_id}/metrics?maxPoints=100000", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip" and packed.headers["vary"] == "Accept-Encoding"
    assert len(json.loads(gzip.decompress(packed.body))["points"]) >= whole["total"]


def test_clusters_tell_what_they_are_doing(lm):
    run = lm.create().json
    (cluster,) = lm.get("/v1/clusters").json
    assert (
        cluster["activeRunId"] == run["id"]
        and cluster["state"] == "running"
        and len(cluster["workers"]) == 2
        and cluster["hooks"] is True
    )


# ---- exclusive clusters, queue, keys ---------------------------------------


def test_busy_cluster_is_a_conflict_that_names_the_active_run(lm):
    run = lm.create().json
    answer = lm.create()
    assert (
        answer.status == 409
        and answer.json["activeRunId"] == run["id"]
        and answer.json["error"] == "cluster busy"
    )


def test_eight_creates_at_once_make_one_swarm(lm, fake):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(lm.create().status)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [201] + [409] * 7 and len(fake.swarms) == 1


def test_ten_stops_at_once_stop_once(lm, fake):
    run_id = lm.create().json["id"]
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(lm.post(f"/v1/tests/{run_id}/stop").status))
        for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [409] * 9 and len(fake.stops) == 1


def test_first_free_of_several_clusters_takes_the_run(load_manager, fake_locust):
    lm = load_manager(cluster_config(fake_locust().url, "one"), cluster_config(fake_locust().url, "two"))
    assert [lm.create().json["locustClusterId"] for _ in range(2)] == ["one", "two"]
    assert lm.create().status == 409


def test_queued_runs_start_in_order(lm):
    running = lm.create().json["id"]
    waiting = [lm.create(queue=True).json for _ in range(3)]
    assert [(run["status"], run["queuePosition"]) for run in waiting] == [
        ("Pending", 1),
        ("Pending", 2),
        ("Pending", 3),
    ]
    lm.post(f"/v1/tests/{waiting[1]['id']}/stop")
    assert lm.run(waiting[1]["id"])["status"] == "Failed" and lm.run(waiting[2]["id"])["queuePosition"] == 2
    for run_id in (running, waiting[0]["id"]):
        lm.wait_for(run_id, "Running")
        assert lm.create().status == 409, "somebody overtook the queue"
        lm.post(f"/v1/tests/{run_id}/stop")
    assert "queuePosition" not in lm.wait_for(waiting[2]["id"], "Running")


def test_queue_survives_a_restart(lm):
    running = lm.create().json["id"]
    waiting = lm.create(queue=True).json["id"]
    lm.kill9()
    lm.restart()
    assert lm.run(waiting)["queuePosition"] == 1
    lm.post(f"/v1/tests/{running}/stop")
    lm.wait_for(waiting, "Running")


def test_same_idempotency_key_answers_the_same_run_also_after_a_restart(lm, fake):
    key = {"Idempotency-Key": "nightly"}
    first = lm.post("/v1/tests", create_body(), headers=key)
    lm.kill9()
    lm.restart()
    again = lm.post("/v1/tests", create_body(), headers=key)
    assert (
        again.status == 201
        and again.json["id"] == first.json["id"]
        and again.headers["idempotent-replayed"] == "true"
    )
    assert "idempotent-replayed" not in first.headers and len(fake.swarms) == 1
    assert lm.post("/v1/tests", create_body(targetUsers=6), headers=key).status == 422


def test_same_idempotency_key_at_once_makes_one_run(lm, fake):
    ids = []

    def send():
        answer = lm.post("/v1/tests", create_body(), headers={"Idempotency-Key": "k"})
        ids.append(answer.json["id"])

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 1 and len(fake.swarms) == 1


def test_two_retries_of_one_key_after_a_conflict_make_one_run():
    """The first holds the key's lock while the second waits for it; the third comes after the first went."""
    api = loadmanager.Api.__new__(loadmanager.Api)
    api._creating, api._creating_lock = {}, threading.Lock()
    kept, calls, inside, most = {}, [], [], []
    go_on = [threading.Event(), threading.Event(), threading.Event()]

    class Stub:
        def recall(self, key, now):
            return kept.get(key)

        def create(self, run_request, name, idempotency):
            number = len(calls)
            calls.append(number)
            inside.append(number)
            most.append(len(inside))
            assert go_on[number].wait(10)
            inside.remove(number)
            if number == 0:
                raise loadmanager.Conflict("busy")
            kept[idempotency[0]] = (idempotency[1], f"run-{number}")
            return SimpleNamespace(id=f"run-{number}")

    api.orchestrator = Stub()
    api.store = SimpleNamespace(idempotency=api.orchestrator)
    api.run_response = lambda run_id, status, replayed=False: run_id
    answers = []

    def send():
        request = SimpleNamespace(principal=SimpleNamespace(name="ci"), run_id="", note="")
        try:
            answers.append(api.create_once("k", {}, None, request))
        except loadmanager.Conflict:
            answers.append("409")

    threads = [threading.Thread(target=send) for _ in range(3)]
    threads[0].start()
    eventually(lambda: calls == [0], 5)
    threads[1].start()
    eventually(lambda: threads[1].is_alive() and api._creating, 5)
    holds_for(lambda: calls == [0], 0.3, what="the second waits")
    go_on[0].set()
    eventually(lambda: calls == [0, 1], 5)
    threads[2].start()
    holds_for(lambda: calls == [0, 1], 0.5, what="the third waits for the second")
    go_on[1].set()
    go_on[2].set()
    for thread in threads:
        thread.join(10)
    assert answers == ["409", "run-1", "run-1"] and max(most) == 1 and api._creating == {}


# ---- bad bodies ------------------------------------------------------------

BAD_FIELDS = [
    (field_, value)
    for field_, values in {
        "tenantId": [..., None, 5, "", " \n", True, [], "a\u0000b", "x" * 300],
        "envId": [..., None, {}, ""],
        "scenarioId": [..., None, 1.5, ""],
        "targetUsers": [..., None, "5", 0, -1, 1.5, True, 10**30],
        "spawnRate": [..., None, "fast", 0, 0.05, -1, False, 1e300],
        "durationSeconds": ["5m", 0, -5, 1.5, True, 10**18],
        "metadata": ["text", [1], {"a": "x" * 70_000}],
        "queue": ["yes", 1],
        "tenantID": ["acme"],
    }.items()
    for value in values
]


@pytest.mark.parametrize("field_,value", BAD_FIELDS, ids=lambda value: repr(value)[:24])
def test_bad_field_is_refused_by_name(lm_shared, field_, value):
    answer = lm_shared.create(**{field_: value})
    assert answer.status == 400, f"{field_}={value!r:.60} answered {answer.status}"
    assert list(answer.json["fields"]) == [field_] and answer.json["message"]


def test_all_bad_fields_are_named_at_once(lm_shared):
    answer = lm_shared.create(tenantId="", targetUsers="many", spawnRate=0, extra=1)
    assert set(answer.json["fields"]) == {"tenantId", "targetUsers", "spawnRate", "extra"}


BAD_BODIES = {
    "empty": b"",
    "cut": b'{"tenantId": "ac',
    "not utf-8": b'{"tenantId": "\xff"}',
    "a list": b"[]",
    "a word": b"null",
    "NaN": json.dumps(create_body()).replace("5}", "NaN}").encode(),
    "Infinity": json.dumps(create_body()).replace("5}", "Infinity}").encode(),
    "1e400": json.dumps(create_body()).replace("5}", "1e400}").encode(),
    "5,000 digits": b'{"targetUsers": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "key twice": b'{"tenantId": "acme", "tenantId": "acme"}',
    "lone surrogate": json.dumps(create_body(scenarioId="X")).replace("X", "\\ud800").encode(),
    "surrogate in metadata": json.dumps(create_body(metadata={"a": "X"})).replace("X", "\\udfff").encode(),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body_is_400_and_nothing_breaks(lm_shared, name):
    answer = lm_shared.post("/v1/tests", BAD_BODIES[name])
    assert answer.status == 400 and answer.json["message"], f"{name}: {answer}"
    assert lm_shared.get("/v1/tests").json == [], "something was created"


@pytest.fixture(scope="module")
def lm_shared(tmp_path_factory):
    """One Load Manager for requests that must change nothing; its cluster refuses connections."""
    from conftest import LoadManager, base_config

    manager = LoadManager(
        tmp_path_factory.mktemp("shared"), base_config(cluster_config("http://127.0.0.1:1"))
    )
    manager.start()
    yield manager
    assert manager.get("/health", token=None).status == 200, "Load Manager did not survive its bad requests"
    assert "trace=" not in manager.log(), f"a request ended in an exception:\n{manager.log()[-3000:]}"
    manager.end()


def test_unknown_tenant_and_environment_are_named(lm_shared):
    assert lm_shared.create(tenantId="nobody").json["fields"].keys() == {"tenantId"}
    answer = lm_shared.create(envId="nowhere")
    assert answer.status == 400 and "dev" in answer.json["fields"]["envId"], (
        "the message names the environments there are"
    )


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=x",
        "limit=1e3",
        "status=running",
        "cursor=zzz",
        "tenantID=a",
        "limit=2&limit=3",
        "tenantId=%ff",
    ],
)
def test_bad_query_is_refused_by_name(lm_shared, query):
    answer = lm_shared.get(f"/v1/tests?{query}")
    named = "UTF-8" if "%" in query else query.split("=")[0]
    assert answer.status == 400 and named in answer.json["message"], answer


def test_body_that_is_not_json_is_400_whatever_its_type_says(lm_shared):
    """With a token any type is taken, as curl -d sends a form's: what counts is the body."""
    answer = lm_shared.post("/v1/tests", b"<run/>", headers={"Content-Type": "application/xml"})
    assert answer.status == 400 and "not valid JSON" in answer.json["message"]


# ---- the protocol ----------------------------------------------------------

RAW = {
    "100 MB announced": (
        b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Content-Length: 100000000\r\n\r\nabc",
        413,
    ),
    "oversize with Expect": (
        b"POST /v1/tests HTTP/1.1\r\n"
        + BEARER
        + b"Expect: 100-continue\r\nContent-Length: 100000000\r\n\r\n",
        413,
    ),
    "Expect without a token": (
        b"POST /v1/tests HTTP/1.1\r\nHost: lm\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        401,
    ),
    "negative length": (b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Content-Length: -1\r\n\r\n", 400),
    "length +5": (b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Content-Length: +5\r\n\r\n", 400),
    "length 1_0": (b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Content-Length: 1_0\r\n\r\n", 400),
    "two lengths": (
        b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        400,
    ),
    "chunked": (
        b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        501,
    ),
    "chunked with length": (
        b"POST /v1/tests HTTP/1.1\r\n"
        + BEARER
        + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        400,
    ),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/0.9": (b"GET /\r\n", 400),
    "HTTP/9.9": (b"GET /health HTTP/9.9\r\nHost: lm\r\n\r\n", 505),
    "bare CR": (b"GET /health HTTP/1.1\r\nHost: lm\rX: y\r\n\r\n", 400),
    "NUL": (b"GET /health HTTP/1.1\r\nHost: l\0m\r\n\r\n", 400),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "folded header": (b"GET /health HTTP/1.1\r\nHost: lm\r\n folded\r\n\r\n", 400),
    "100 kB URL": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: lm\r\n\r\n", 431),
    "5,000 headers": (b"GET /health HTTP/1.1\r\nHost: lm\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 431),
    "2 MB without newline": (b"A" * 2_000_000, 431),
    "absolute URI": (b"GET http://other/health HTTP/1.1\r\nHost: lm\r\n\r\n", 400),
    "token twice": (b"GET /v1/tests HTTP/1.1\r\n" + BEARER + b"Authorization: Bearer x\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", RAW)
def test_malformed_request_gets_one_json_error_and_is_closed(lm_shared, name):
    sent, status = RAW[name]
    received = lm_shared.raw(sent, until_closed=True)
    assert received.startswith(b"HTTP/1.1 %d " % status), f"{name}: {received[:200]!r}"
    assert len(re.findall(rb"HTTP/1.1 \d{3} ", received)) == 1, f"{name}: more than one answer: {received!r}"
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]


def test_body_behind_a_refused_request_is_never_a_request(lm_shared):
    inner = b"GET /health HTTP/1.1\r\nHost: lm\r\n\r\n"
    received = lm_shared.raw(
        b"POST /v1/tests HTTP/1.1\r\nHost: lm\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner,
        until_closed=True,
    )
    assert received.startswith(b"HTTP/1.1 401 ") and b"healthy" not in received


def test_pipelined_requests_are_answered_in_order(lm_shared):
    with lm_shared.connect() as sock:
        sock.sendall(
            b"GET /health HTTP/1.1\r\nHost: lm\r\n\r\n"
            + b"GET /v1/tests HTTP/1.1\r\n"
            + BEARER
            + b"\r\n"
            + b"GET /nothing HTTP/1.1\r\nHost: lm\r\n\r\n"
        )
        received = read_answers(sock, 3)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"200", b"404"]


def test_continue_is_sent_before_a_body_that_will_be_read(lm_shared):
    with lm_shared.connect() as sock:
        sock.sendall(
            b"POST /v1/tests HTTP/1.1\r\n" + BEARER + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert read_answers(sock).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("method,path,status,allow", [
    ("PUT", "/v1/tests", 405, "GET, HEAD, OPTIONS, POST"), ("GET", "/v1/tests/x/stop", 405, "OPTIONS, POST"),
    ("TRACE", "/health", 405, "GET, HEAD, OPTIONS"), ("get", "/health", 405, "GET, HEAD, OPTIONS"),
    ("OPTIONS", "/v1/tests", 204, "GET, HEAD, OPTIONS, POST"),
])  # fmt: skip
def test_other_methods_name_the_allowed_ones(lm_shared, method, path, status, allow):
    received = lm_shared.raw(
        f"{method} {path} HTTP/1.1\r\nHost: lm\r\nConnection: close\r\n\r\n".encode(), until_closed=True
    )
    assert received.startswith(b"HTTP/1.1 %d " % status) and f"\r\nAllow: {allow}\r\n".encode() in received, (
        received
    )


def test_head_has_the_length_and_no_body(lm_shared):
    answer = lm_shared.request("HEAD", "/v1/tests")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "2", b"")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tests/../../etc/passwd",
        "/v1/tests/%2e%2e",
        "/v1/tests/%00",
        "//v1/tests",
        "/v1/tests/a%2fb",
        "/v1/tests/%ff",
        "/v2/tests",
    ],
)
def test_odd_paths_are_404(lm_shared, path):
    assert lm_shared.get(path).status == 404


def test_health_answers_beside_slow_senders_and_idle_connections(lm_shared):
    held = [lm_shared.connect() for _ in range(500)]
    try:
        for sock in held[:200]:
            sock.sendall(b"POST /v1/tests HTTP/1.1\r\nHost: l")
        for _ in range(20):  # a slow sender is let go later than this gives up
            assert lm_shared.get("/health", token=None, timeout_s=8).status == 200
    finally:
        for sock in held:
            sock.close()


# ---- credentials -----------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        f"Bearer {API_TOKEN[:-1]}",
        f"Bearer {API_TOKEN}x",
        f"Bearer {API_TOKEN.upper()}",
        f"Basic {API_TOKEN}",
        "Bearer t\xf6k",
    ],
)
def test_wrong_credentials_are_401(load_manager, header):
    lm = load_manager()
    headers = {} if header is None else {"Authorization": header}
    answer = lm.request("GET", "/v1/tests", headers=headers, token=None)
    assert (
        answer.status == 401
        and answer.headers["www-authenticate"].startswith("Bearer")
        and answer.json["error"] == "unauthorized"
    )


def test_every_route_but_health_refuses_without_a_token(load_manager):
    lm = load_manager()
    for route in loadmanager.ROUTES:
        if route.access != "anyone":
            answer = lm.request(route.method, route.path.replace("{id}", "x"), token=None)
            assert answer.status in (401, 429), (
                f"{route.method} {route.path} answered {answer.status} without a token"
            )


def test_many_wrong_tokens_are_slowed_and_the_right_one_is_served(load_manager):
    lm = load_manager()
    statuses = [lm.get("/v1/tests", token="wrong").status for _ in range(60)]
    assert statuses[0] == 401 and statuses[-1] == 429, statuses
    assert int(lm.get("/v1/tests", token="wrong").headers["retry-after"]) >= 1
    assert lm.get("/v1/tests").status == 200


def test_token_in_the_query_is_not_taken(load_manager):
    assert load_manager().get(f"/v1/tests?token={API_TOKEN}", token=None).status == 401


# ---- callbacks -------------------------------------------------------------

METRICS = {
    "timestamp": "2026-01-01T00:00:00Z", "totalRps": 12.5, "totalRequests": 100, "totalFailures": 2,
    "errorRate": 2.0, "avgResponseMs": 20.5,
    "p50ResponseMs": 18, "p95ResponseMs": 60, "p99ResponseMs": 90, "currentUsers": 5,
    "requestStats": {"GET_/a_b": {"method": "GET", "name": "/a_b", "numRequests": 100, "numFailures": 2,
        "avgResponseTime": 20.5,
                                  "minResponseTime": 3, "maxResponseTime": 99, "medianResponseTime": 18,
                                  "requestsPerSec": 12.5}},
}  # fmt: skip


@pytest.mark.parametrize("token", ["", "wrong", API_TOKEN])
def test_callback_with_a_wrong_token_is_401(lm, token):
    assert lm.callback("metrics", {"runId": "x", "metrics": METRICS}, token).status == 401


def test_bearer_token_is_not_a_callback_token(lm):
    assert lm.post("/v1/internal/locust/metrics", {"runId": "x", "metrics": METRICS}).status == 401


@pytest.mark.parametrize("name", ["test-start", "test-stop", "metrics"])
def test_callback_for_an_unknown_run_is_404(lm, name):
    assert lm.callback(name, {"runId": str(uuid.uuid4()), "metrics": METRICS}).status == 404


def test_pushed_metrics_are_shown_as_they_came(lm):
    run_id = lm.create().json["id"]
    pushed = {**METRICS, "timestamp": "2099-01-01T00:00:00Z", "totalRequests": 10**9}
    assert lm.callback("metrics", {"runId": run_id, "metrics": pushed}).json == {"success": True}
    points = lm.get(f"/v1/tests/{run_id}/metrics?maxPoints=100000").json["points"]
    (point,) = [point for point in points if point["source"] == "push"]
    assert point["totalRequests"] == 10**9 and point["p95ResponseMs"] == 60
    assert point["timestamp"] < "2099", "a moment in the future was believed"


def test_older_metrics_are_kept_but_not_shown_as_newest(lm):
    run_id = lm.create().json["id"]
    newest = eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    assert lm.callback("metrics", {"runId": run_id, "metrics": METRICS}).status == 200
    assert lm.run(run_id)["lastMetrics"]["timestamp"] >= newest["timestamp"]
    points = lm.get(f"/v1/tests/{run_id}/metrics?maxPoints=100000").json["points"]
    assert any(point["timestamp"].startswith("2026-01-01T00:00:00") for point in points)


def test_test_stop_with_complete_numbers_finishes_the_run_with_them(lm):
    run_id = lm.create().json["id"]
    body = {"runId": run_id, "tenantId": "acme", "envId": "dev", "finalMetrics": METRICS, "complete": True}
    assert lm.callback("test-stop", body).json == {"success": True}
    run = lm.wait_for(run_id, "Finished")
    assert run["stopReason"] == "locust" and run["lastMetrics"]["totalRequests"] == 100
    assert run["lastMetrics"]["requestStats"]["GET_/a_b"]["maxResponseTime"] == 99


def test_test_stop_of_the_original_s_hooks_finishes_and_stops_what_still_runs(lm, fake):
    run_id = lm.create().json["id"]
    assert (
        lm.callback(
            "test-stop", {"runId": run_id, "finalMetrics": {**METRICS, "totalRequests": 10**6}}
        ).status
        == 200
    )
    run = lm.wait_for(run_id, "Finished")
    assert run["lastMetrics"]["totalRequests"] == 10**6, (
        "Locust's report had fewer requests, yet replaced the numbers"
    )
    assert fake.users == 0, "the load went on without a run"


def test_final_run_never_changes_whatever_is_called_back(lm):
    run_id = finished_run(lm)["id"]
    before = lm.get(f"/v1/tests/{run_id}").body
    for name in ("test-start", "test-stop", "metrics"):
        answer = lm.callback(
            name, {"runId": run_id, "metrics": METRICS, "finalMetrics": METRICS, "complete": True}
        )
        assert (answer.status, answer.json) == (200, {"success": True}), f"late {name}"
    assert lm.get(f"/v1/tests/{run_id}").body == before


def test_callback_for_another_tenant_s_run_is_404_and_changes_nothing(lm):
    run_id = lm.create().json["id"]
    assert lm.callback("test-stop", {"runId": run_id, "tenantId": "other"}).status == 404
    assert lm.callback("test-stop", {"runId": run_id, "envId": "prod"}).status == 404
    assert lm.run(run_id)["status"] == "Running"


@pytest.mark.parametrize("field_,value", [
    ("totalRequests", "many"), ("totalRequests", -1), ("totalRequests", True), ("totalRequests", 1.5),
    ("errorRate", 101), ("totalRps", [1]),
    ("timestamp", "yesterday"), ("timestamp", 5), ("requestStats", []), ("p95ResponseMs", "1"),
])  # fmt: skip
def test_bad_metrics_are_refused_by_field(lm, field_, value):
    run_id = lm.create().json["id"]
    answer = lm.callback("metrics", {"runId": run_id, "metrics": {**METRICS, field_: value}})
    assert answer.status == 400 and list(answer.json["fields"]) == [f"metrics.{field_}"]


def test_metrics_that_are_not_numbers_are_refused(lm):
    run_id = lm.create().json["id"]
    for word in ("NaN", "Infinity", "1e999"):
        body = json.dumps({"runId": run_id, "metrics": METRICS}).replace("12.5,", f"{word},", 1).encode()
        assert lm.callback("metrics", body).status == 400, word


def test_external_test_registers_once_and_is_stopped_like_any_other(lm, fake):
    fake.swarm({"user_count": "4"})
    body = {"tenantId": "acme", "envId": "dev", "targetUsers": 4, "spawnRate": 2}
    first = lm.callback("register-external", body)
    assert first.status == 200 and set(first.json) == {"runId", "message"}
    assert lm.callback("register-external", body).json["runId"] == first.json["runId"], (
        "a second active run on one cluster"
    )
    run = lm.run(first.json["runId"])
    assert (run["status"], run["source"], run["scenarioId"], run["targetUsers"]) == (
        "Running",
        "ui",
        "ui-started-test",
        4,
    )
    fake.run_id = run["id"]
    assert lm.post(f"/v1/tests/{run['id']}/stop").status == 200 and fake.users == 0


def test_external_test_of_an_unknown_tenant_is_400(lm):
    assert lm.callback("register-external", {"tenantId": "nobody", "envId": "dev"}).json["fields"].keys() == {
        "tenantId"
    }


def test_stop_callback_that_beats_the_create_s_answer_is_not_undone(lm, fake):
    """Locust starts and ends the test before /swarm is answered."""

    def quick_test(handler):
        run_id = handler.fake.calls[-1].form["run_id"]
        assert lm.callback("test-start", {"runId": run_id}).status == 200
        assert (
            lm.callback("test-stop", {"runId": run_id, "finalMetrics": METRICS, "complete": True}).status
            == 200
        )
        handler.send_json({"success": True, "message": "Swarming started"})

    fake.faults["/swarm"] = quick_test
    answer = lm.create()
    assert answer.status == 201 and answer.json["status"] in ("Stopping", "Finished"), answer
    assert lm.wait_for(answer.json["id"], "Finished")["lastMetrics"]["totalRequests"] == 100


def test_hanging_cluster_delays_no_other_s_numbers(load_manager, fake_locust):
    well, ill = fake_locust(), fake_locust()
    lm = load_manager(
        cluster_config(well.url, "well"),
        cluster_config(ill.url, "ill", envId="ill"),
        orchestrator={"lostAfterSeconds": 60},
    )
    run_id = lm.create().json["id"]
    assert lm.create(envId="ill").status == 201
    ill.faults["*"] = hang
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)

    times = set()

    def go_on() -> bool:
        times.add(lm.run(run_id)["lastMetrics"]["timestamp"])
        return len(times) >= 4

    eventually(go_on, 3 * loadmanager.LOCUST_CALL_S, what="numbers of the healthy cluster go on")
    asked = [call.at for call in ill.calls]
    assert len(asked) < len(well.calls) / 2, "the other one did not hang"


def test_callback_token_alone_opens_no_other_route(lm):
    assert lm.get("/v1/tests", token=CALLBACK_TOKEN).status == 401
