"""Two runs compared: pure, over HTTP, and with real Locust against the same and a slower target."""

from __future__ import annotations

import random
from collections import Counter
from xml.etree import ElementTree

import pytest
from conftest import CALLBACK_TOKEN, cluster_config
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import RULES
from waiting import eventually

import loadmanager

LOCUSTFILE = """
import loadmanager_hooks
from locust import HttpUser, constant, task

class Shopper(HttpUser):
    wait_time = constant(0.01)

    @task
    def browse(self):
        self.client.get("/api/items")
        self.client.get("/api/slow")
"""
PLACE = "/v1/baselines/acme/dev/shop"


class HalfSlowTarget(Target):
    """Only /api/slow takes `slow_s` more."""

    slow_s = 0.0

    def _count(self, path: str) -> None:
        super()._count(path)
        if path == "/api/slow" and self.slow_s:
            import time

            time.sleep(self.slow_s)


def a_run(run_id="a", p95=200.0, errors=0, requests=2000, rps=100.0, endpoints=None, **more):
    endpoints = {"/a": (requests, errors, p95)} if endpoints is None else endpoints
    rows = {
        f"GET_{name}": {"method": "GET", "name": name, "numRequests": n, "numFailures": f, "avgResponseTime": 100.0, "minResponseTime": 1.0, "maxResponseTime": 9.0,
                        "medianResponseTime": 100.0, "requestsPerSec": rps, "p95ResponseTime": ms, "p99ResponseTime": ms}
        for name, (n, f, ms) in endpoints.items()
    }  # fmt: skip
    metrics = {"totalRequests": requests, "totalFailures": errors, "totalRps": rps, "errorRate": 100 * errors / requests, "avgResponseMs": 100.0,
               "p50ResponseMs": 100.0, "p95ResponseMs": p95, "p99ResponseMs": p95, "requestStats": rows}  # fmt: skip
    return {"id": run_id, "tenantId": "t", "envId": "e", "scenarioId": "s", "targetUsers": 5, "spawnRate": 1, "status": "Finished",
            "startedAt": "2026-01-01T00:00:00.000Z", "finishedAt": "2026-01-01T00:01:00.000Z", "trustReasons": [], "lastMetrics": metrics, **more}  # fmt: skip


def regressed(before, after, tolerance=None):
    wanted = loadmanager.TOLERANCES.accept(tolerance) if tolerance else None
    return {
        (one["endpoint"], one["metric"])
        for one in loadmanager.compare_runs(before, after, wanted)["regressions"]
    }


def test_the_same_numbers_are_no_regression():
    found = loadmanager.compare_runs(a_run("a"), a_run("b"))
    assert (found["regressions"], found["differences"], found["warnings"]) == ([], [], [])
    assert found["totals"]["p95ResponseMs"] == {
        "baseline": 200.0,
        "candidate": 200.0,
        "change": 0.0,
        "changePercent": 0.0,
    }


@pytest.mark.parametrize(
    ("after", "tolerance", "expected"),
    [
        ({"p95": 260.0}, None, {(None, "p95ResponseMs"), ("GET /a", "p95ResponseMs")}),
        ({"p95": 220.0}, None, set()),
        ({"p95": 260.0}, "p95ResponseMs:40%", set()),
        ({"p95": 260.0}, "p95ResponseMs:30", {(None, "p95ResponseMs"), ("GET /a", "p95ResponseMs")}),
        ({"p95": 100.0}, None, set()),
        ({"errors": 40}, None, {(None, "errorRate"), ("GET /a", "errorRate")}),
        ({"errors": 8}, None, set()),
        ({"rps": 70.0}, None, {(None, "totalRps")}),
        ({"rps": 95.0}, None, set()),
    ],
)
def test_what_is_worse_than_its_tolerance_is_a_regression(after, tolerance, expected):
    assert regressed(a_run("a"), a_run("b", **after), tolerance) == expected


def test_a_change_within_locusts_rounding_is_none():
    assert regressed(a_run(p95=3.0), a_run(p95=5.0)) == set()
    assert regressed(a_run(p95=100.0), a_run(p95=120.0)) == set()


def test_few_errors_by_chance_are_none():
    assert regressed(a_run(requests=100, errors=0), a_run(requests=100, errors=2)) == set()


def test_endpoints_with_few_requests_are_not_judged_and_it_is_said():
    found = loadmanager.compare_runs(
        a_run(endpoints={"/a": (50, 0, 100.0)}), a_run(endpoints={"/a": (50, 0, 900.0)})
    )
    assert found["regressions"] == []
    assert "GET /a: p95ResponseMs not judged: 50 requests, 100 are needed" in found["warnings"]


def test_new_and_gone_endpoints_are_named():
    found = loadmanager.compare_runs(
        a_run(endpoints={"/old": (500, 0, 1.0)}), a_run(endpoints={"/new": (500, 0, 1.0)})
    )
    assert [(one["name"], one["state"]) for one in found["endpoints"]] == [("/new", "new"), ("/old", "gone")]


def test_what_makes_a_comparison_unfair_is_said():
    other = a_run(
        "b",
        targetUsers=9,
        scenarioId="x",
        finishedAt="2026-01-01T00:02:00.000Z",
        trustReasons=["a worker was lost"],
    )
    found = loadmanager.compare_runs(a_run("a", locustfileSha256="1"), {**other, "locustfileSha256": "2"})
    for word in ("scenario", "users", "duration", "locustfile"):
        assert any(sentence.startswith(word) for sentence in found["differences"]), word
    assert found["warnings"] == ["the candidate's numbers are doubtful: a worker was lost"]


@pytest.mark.parametrize(
    "text",
    [
        "p95ResponseMs",
        "p95ResponseMs:x",
        "p95ResponseMs:-1",
        "nope:1",
        "p95ResponseMs:1,p95ResponseMs:2",
        ",",
        "p95ResponseMs:1%%",
    ],
)
def test_a_wrong_tolerance_is_refused(text):
    with pytest.raises(ValueError):
        loadmanager.TOLERANCES.accept(text)


@pytest.mark.parametrize("name", ["plain", 'a<b>&"c"', "]]> <!-- x", "emoji \U0001f600"])
def test_junit_is_xml_whatever_the_names_are(name):
    thresholds = [
        {
            "expr": f"{name}: p95ResponseMs < 5",
            "value": None,
            "result": "failed",
            "message": "no data: \x00 \ufffe",
        }
    ]
    run = a_run(
        scenarioId=name,
        createdAt="2026-01-01T00:00:00.000Z",
        thresholds=thresholds,
        verdict="failed",
        trust="ok",
    )
    suite = ElementTree.fromstring(loadmanager.junit_xml(run)).find("testsuite")
    assert suite.attrib["failures"] == "1"
    assert [case.attrib["name"] for case in suite.iter("testcase")] == [
        "the run finished",
        f"{name}: p95ResponseMs < 5",
    ]


def stretches(shifts, seed, requests=200):
    """A run in stretches; in each the response times are drawn around 100 ms plus its shift."""
    draw = random.Random(seed)
    parts = []
    for shift in shifts:
        times = Counter(max(1, int(round(draw.gauss(100 + shift, 15), -1))) for _ in range(requests))
        parts.append(
            loadmanager.Histogram(requests, 0, float(sum(ms * n for ms, n in times.items())), dict(times))
        )
    return parts


def alarms(shifts_before, shifts_after, ratio, times=100):
    """In how many of so many pairs of runs the second is said to be slower."""
    p_values = [
        loadmanager.quantile_test(
            stretches(shifts_before(2 * seed), 2 * seed),
            stretches(shifts_after(2 * seed + 1), 2 * seed + 1),
            ratio,
        )
        for seed in range(times)
    ]
    return sum(p_value is not None and p_value <= loadmanager.NOISE_P_VALUE for p_value in p_values)


@pytest.mark.parametrize("ratio", [0.5, 0.95, 0.99])
def test_runs_alike_are_noise_and_slower_ones_are_not(ratio):
    assert alarms(lambda seed: [0] * 20, lambda seed: [0] * 20, ratio) <= 3
    assert alarms(lambda seed: [0] * 20, lambda seed: [30] * 20, ratio) >= 97


def test_a_run_that_scatters_in_itself_is_no_proof_of_a_change():
    def scattered(seed):
        return [random.Random(seed * 1000 + index).choice([0, 60]) for index in range(20)]

    assert alarms(scattered, scattered, 0.5) <= 5, "the stretches of both runs differ more than the runs do"


def test_a_change_within_the_noise_is_told_and_is_no_regression():
    def at(shifts, seed):
        return {None: stretches(shifts, seed), ("GET", "/a"): stretches(shifts, seed)}

    quiet = at([0] * 20, 1), at([0] * 20, 2)
    found = loadmanager.compare_runs(a_run("a"), a_run("b", p95=260.0), None, quiet)
    assert found["regressions"] == [] and found["noiseJudged"] is True
    assert [sentence.partition(";")[0] for sentence in found["noise"]] == [
        f"{where}: p95ResponseMs went from 200 to 260 (+30.0%)" for where in ("totals", "GET /a")
    ]
    assert found["totals"]["p95ResponseMs"]["pValue"] > loadmanager.NOISE_P_VALUE
    slower = loadmanager.compare_runs(
        a_run("a"), a_run("b", p95=260.0), None, (at([0] * 20, 1), at([60] * 20, 2))
    )
    assert {(one["endpoint"], one["metric"]) for one in slower["regressions"]} == {
        (None, "p95ResponseMs"),
        ("GET /a", "p95ResponseMs"),
    }
    assert (
        loadmanager.compare_runs(a_run("a"), a_run("b", p95=260.0), None, (None, quiet[1]))["noiseJudged"]
        is False
    )


# ---- real Locust -------------------------------------------------------------


@pytest.fixture
def target():
    with HalfSlowTarget(delay_s=0.02) as target:
        yield target


@pytest.fixture
def lm(load_manager, target, tmp_path):
    locustfile = tmp_path / "locustfile.py"
    locustfile.write_text(LOCUSTFILE)
    (tmp_path / "loadmanager_hooks.py").write_text(
        (loadmanager_folder() / "locust" / "loadmanager_hooks.py").read_text()
    )
    port = find_free_port()
    lm = load_manager(cluster_config(f"http://127.0.0.1:{port}"), orchestrator=RULES)
    environment = {
        "CONTROL_PLANE_URL": lm.url,
        "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
        "TENANT_ID": "acme",
        "ENV_ID": "dev",
        "METRICS_PUSH_INTERVAL": "1",
    }
    hosts = ["--host", target.url]
    locust = LocustCluster(locustfile, 1, environment, hosts, worker_args=hosts, web_port=port).start()
    yield lm
    locust.stop()


def loadmanager_folder():
    from pathlib import Path

    return Path(loadmanager.__file__).parent


def finished(lm, **more):
    body = {
        "tenantId": "acme",
        "envId": "dev",
        "scenarioId": "shop",
        "targetUsers": 3,
        "spawnRate": 3,
        "durationSeconds": 6,
        **more,
    }
    created = lm.post("/v1/tests", body)
    assert created.status == 201, created.body
    return eventually(lambda: final(lm, created.json["id"]), 40, what="the run is final")


def final(lm, run_id):
    run = lm.get(f"/v1/tests/{run_id}").json
    return run if run["status"] in ("Finished", "Failed") else None


def test_same_target_no_regression_and_a_slower_endpoint_is_found(lm, target):
    first = finished(lm, compareWith="baseline", thresholds=["errorRate < 1"])
    assert first["comparison"]["message"] == "not compared: there is no baseline"
    assert first["verdict"] == "passed"
    assert len(first["locustfileSha256"]) == 64
    named = lm.request("PUT", PLACE, {"runId": first["id"]})
    assert (named.status, named.json["runId"]) == (200, first["id"])
    assert lm.request("DELETE", f"/v1/tests/{first['id']}").status == 409

    # Other work on the machine slows a run, too: of three against the same target one must be without regression.
    same = []
    while not same or (same[-1]["comparison"]["regressions"] and len(same) < 3):
        same.append(finished(lm, compareWith="baseline"))
    assert (same[-1]["comparison"]["regressions"], same[-1]["verdict"]) == ([], "passed")

    target.slow_s = 0.3
    slower = finished(lm, compareWith="baseline")
    assert slower["verdict"] == "failed" and slower["comparison"]["baseline"] == first["id"]
    generous = ",".join(
        f"{metric}:400%" for metric in ("avgResponseMs", "p50ResponseMs", "p95ResponseMs", "p99ResponseMs")
    )
    answer = lm.get(
        f"/v1/tests/compare?baseline={first['id']}&candidate={slower['id']}&tolerance={generous}"
    ).json
    assert answer["noiseJudged"], "the hooks carried the histograms of both runs"
    worse = {one["endpoint"] for one in answer["regressions"] if one["endpoint"]}
    assert worse == {"GET /api/slow"}, answer["regressions"]

    case = ElementTree.fromstring(lm.get(f"/v1/tests/{slower['id']}/junit.xml").body).find(".//testcase[2]")
    assert (
        case.attrib["name"] == f"no regression against baseline {first['id']}"
        and case.find("failure") is not None
    )
    assert lm.get(f"/v1/tests/{slower['id']}/summary.md").body.startswith(b"## Load test shop: failed")
    points = lm.get("/v1/trends?tenantId=acme&envId=dev&scenarioId=shop&metric=p95ResponseMs").json["points"]
    assert [point["runId"] for point in points] == [first["id"], *(run["id"] for run in same), slower["id"]]
    assert points[0]["value"] == first["lastMetrics"]["p95ResponseMs"]

    lm.restart()
    assert lm.get(PLACE).json == named.json
    assert lm.request("DELETE", PLACE).status == 204
    assert lm.get(PLACE).status == 404
    assert lm.request("DELETE", f"/v1/tests/{first['id']}").status == 204


def test_only_a_finished_run_of_the_place_becomes_a_baseline(load_manager):
    lm = load_manager(cluster_config(f"http://127.0.0.1:{find_free_port()}"), orchestrator=RULES)
    refused = lm.post(
        "/v1/tests",
        {"tenantId": "acme", "envId": "dev", "scenarioId": "shop", "targetUsers": 1, "spawnRate": 1},
    )
    failed_id = refused.json["runId"]
    assert lm.request("PUT", PLACE, {"runId": failed_id}).status == 409
    assert lm.request("PUT", "/v1/baselines/acme/dev/other", {"runId": failed_id}).status == 400
    assert lm.request("PUT", PLACE, {"runId": "nope"}).status == 400
    assert lm.request("DELETE", PLACE).status == 404
    assert lm.get("/v1/tests/compare?baseline=nope&candidate=nope").status == 404
    assert set(lm.get("/v1/tests/compare").json["fields"]) == {"baseline", "candidate"}
    assert lm.get(f"/v1/tests/compare?baseline={failed_id}&candidate={failed_id}&tolerance=x").status == 400
    assert lm.get(f"/v1/tests/compare?baseline={failed_id}&candidate={failed_id}").json["regressions"] == []
