"""Thresholds, verdict and trust on real Locust: a target made slow halfway aborts the run."""

from __future__ import annotations

import time

import pytest
from conftest import CALLBACK_TOKEN, cluster_config
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import LOCUSTFILE, RULES
from waiting import eventually

import loadmanager


@pytest.fixture(scope="module")
def target():
    with Target() as target:
        yield target


@pytest.fixture
def lm(load_manager, target):
    """A Load Manager and a real master with a worker that know each other."""
    port = find_free_port()
    lm = load_manager(cluster_config(f"http://127.0.0.1:{port}"), orchestrator=RULES)
    environment = {
        "CONTROL_PLANE_URL": lm.url,
        "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
        "TENANT_ID": "acme",
        "ENV_ID": "dev",
    }  # pushes every 10 s unless a run asks for more
    hosts = ["--host", target.url]
    target.delay_s = target.fail_ratio = 0.0
    locust = LocustCluster(LOCUSTFILE, 1, environment, hosts, worker_args=hosts, web_port=port).start()
    yield lm
    locust.stop()


def run_to_its_end(lm, thresholds, duration_s=6, while_running=lambda: None, **more):
    body = {
        "tenantId": "acme",
        "envId": "dev",
        "scenarioId": "shop",
        "targetUsers": 4,
        "spawnRate": 4,
        "durationSeconds": duration_s,
        "thresholds": thresholds,
        **more,
    }
    created = lm.post("/v1/tests", body)
    assert created.status == 201, created.body
    while_running()
    return eventually(lambda: final(lm, created.json["id"]), duration_s + 30, what="the run is final")


def final(lm, run_id):
    run = lm.get(f"/v1/tests/{run_id}").json
    return run if run["status"] in ("Finished", "Failed") else None


def test_a_target_made_slow_halfway_aborts_the_run_within_its_window_and_delay(lm, target):
    slow_at = []

    def make_slow():
        eventually(lambda: target.total > 20, 15, what="load arrives")
        target.delay_s = 0.4
        slow_at.append(time.time())

    window_s, delay_s = 10, 2
    entry = {"expr": "p(95) < 200ms over 10s", "abortOnFail": True, "delaySeconds": delay_s}
    run = run_to_its_end(
        lm, [entry, "errorRate < 50", "GET /api/*: p95 < 200 over 6s", "p99 < 200 after 1s"], 90, make_slow
    )
    took_s = time.time() - slow_at[0]
    assert (run["status"], run["stopReason"], run["verdict"]) == ("Finished", "threshold", "failed")
    aborting, other, of_endpoints, after_warm_up = run["thresholds"]
    assert (
        aborting["expr"] == "p95ResponseMs < 200 over 10s"
        and aborting["result"] == "failed"
        and aborting["value"] >= 200
    )
    assert "firstFailedAt" in aborting
    assert other["result"] == "passed"
    assert of_endpoints["result"] == "failed" and of_endpoints["value"] >= 200
    assert slow_at[0] < loadmanager.parse_utc(of_endpoints["firstFailedAt"]) < time.time()
    assert after_warm_up["result"] == "failed" and after_warm_up["value"] >= 400
    assert took_s < window_s + delay_s + 30, f"aborted {took_s:.1f} s after the target became slow"


def test_final_numbers_of_locust_decide_and_the_answer_never_changes_again(lm):
    windowed = [
        "GET /api/items: p95 < 60s over 2s",
        "p99 < 60s after 2s",
        "GET /api/*: totalRps < 1000 over 2s",
    ]
    run = run_to_its_end(
        lm,
        [
            *windowed,
            "p95 < 60s",
            "GET /nope: p95 < 5",
            "totalRequests > 0",
            {"expr": "totalRequests < 1", "warnOnly": True},
        ],
    )
    by_expr = {one["expr"]: one for one in run["thresholds"]}
    assert by_expr["p95ResponseMs < 60000"]["value"] == run["lastMetrics"]["p95ResponseMs"]
    assert by_expr["totalRequests > 0"]["value"] == run["lastMetrics"]["totalRequests"]
    assert by_expr["GET /nope: p95ResponseMs < 5"]["message"] == "no data: there is no such endpoint"
    assert by_expr["totalRequests < 1"]["warnOnly"] and by_expr["totalRequests < 1"]["result"] == "failed"
    assert [(one["result"], one.get("message")) for one in run["thresholds"][:3]] == [("passed", None)] * 3
    histograms = lm.get(f"/v1/tests/{run['id']}/histograms").json
    for name in ("p50ResponseMs", "p95ResponseMs", "p99ResponseMs"):
        assert histograms["totals"][name] == run["lastMetrics"][name], (
            "the histogram is not the one of Locust's own percentiles"
        )
    assert (
        histograms["totals"]["requests"]
        == run["lastMetrics"]["totalRequests"]
        == sum(one["requests"] for one in histograms["endpoints"])
    )
    half = loadmanager.parse_utc(histograms["from"]) + 3
    parts = [
        lm.get(f"/v1/tests/{run['id']}/histograms?{which}={half}").json["totals"] for which in ("to", "from")
    ]
    assert (
        sum(part["requests"] for part in parts) == histograms["totals"]["requests"]
        and parts[0]["requests"]
        and parts[1]["requests"]
    )
    assert run["verdict"] == "failed"
    assert (run["trust"], run["trustReasons"]) == ("ok", [])
    before = lm.get(f"/v1/tests/{run['id']}").body
    lm.restart()
    assert lm.get(f"/v1/tests/{run['id']}").body == before
    again = lm.post(f"/v1/tests/{run['id']}/rerun", {})
    assert again.status == 201, again.body
    assert [(one["expr"], one["result"]) for one in again.json["thresholds"]] == [
        (expr, "pending") for expr in by_expr
    ]
    eventually(lambda: final(lm, again.json["id"]), 30, what="the rerun is final")


def test_a_run_that_cannot_start_has_failed_its_thresholds_and_is_doubtful(load_manager):
    lm = load_manager(cluster_config(f"http://127.0.0.1:{find_free_port()}"), orchestrator=RULES)
    refused = lm.post(
        "/v1/tests",
        {
            "tenantId": "acme",
            "envId": "dev",
            "scenarioId": "s",
            "targetUsers": 1,
            "spawnRate": 1,
            "thresholds": ["p95 < 5"],
        },
    )
    assert refused.status == 502
    run = lm.get(f"/v1/tests/{refused.json['runId']}").json
    assert (run["verdict"], run["trust"], run["thresholds"][0]["result"]) == ("failed", "doubtful", "failed")
    assert run["thresholds"][0]["message"] == "no data: no numbers came from Locust"


def test_a_wrong_threshold_is_refused_with_its_position(load_manager):
    lm = load_manager(cluster_config(f"http://127.0.0.1:{find_free_port()}"), orchestrator=RULES)
    refused = lm.post(
        "/v1/tests",
        {
            "tenantId": "acme",
            "envId": "dev",
            "scenarioId": "s",
            "targetUsers": 1,
            "spawnRate": 1,
            "thresholds": ["p95 < 5", "p95 ! 5"],
        },
    )
    assert refused.status == 400
    assert refused.json["fields"] == {
        "thresholds": "[1]: 'p95 ! 5', position 5: expected one of <, <=, >, >=, ==, found '! 5'"
    }
