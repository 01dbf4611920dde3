"""Two runs compared: pure, over HTTP, and with real Locust against the same and a slower target."""

from __future__ import annotations

import random
from collections import Counter
from xml.etree import ElementTree

import pytest
from conftest import CALLBACK_TOKEN, cluster_config
from gate_simulation import WORLDS, count
from gate_simulation import a_run as a_simulated_run
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import RULES
from waiting import eventually

import loadmanager

LOCUSTFILE = """
import loadmanager_hooks
from locust import HttpUser, constant, task

class Shopper(HttpUser):
    wait_time = constant(0.5)  # little to do: what is measured is not the machine

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
        f"GET_{name}": {"method": "GET", "name": name, "numRequests": n, "numFailures": f,
            "avgResponseTime": 100.0, "minResponseTime": 1.0, "maxResponseTime": 9.0,
                        "medianResponseTime": 100.0, "requestsPerSec": rps, "p95ResponseTime": ms,
                        "p99ResponseTime": ms}
        for name, (n, f, ms) in endpoints.items()
    }  # fmt: skip
    metrics = {"totalRequests": requests, "totalFailures": errors, "totalRps": rps,
        "errorRate": 100 * errors / requests, "avgResponseMs": 100.0,
               "p50ResponseMs": 100.0, "p95ResponseMs": p95, "p99ResponseMs": p95,
               "requestStats": rows}  # fmt: skip
    return {"id": run_id, "tenantId": "t", "envId": "e", "scenarioId": "s", "targetUsers": 5, "spawnRate": 1,
        "status": "Finished",
            "startedAt": "2026-01-01T00:00:00.000Z", "finishedAt": "2026-01-01T00:01:00.000Z",
            "trustReasons": [], "lastMetrics": metrics, **more}  # fmt: skip


def compared(run, blocks=None):
    return loadmanager.ComparedRun(run, loadmanager.run_figures(run, blocks))


def history(count=5, **how):
    """Equal runs, whose figures scatter by some percent."""
    runs = (a_run(f"h{index}", p95=how.get("p95", 200.0) * (0.98 + 0.01 * index)) for index in range(count))
    return [
        compared({**run, **{name: value for name, value in how.items() if name != "p95"}}) for run in runs
    ]


def judgements(found, endpoint=None):
    return {one["metric"]: one["judgement"] for one in found["figures"] if one["endpoint"] == endpoint}


def regressed(candidate, tolerance=None, reference=None):
    wanted = loadmanager.TOLERANCES.accept(tolerance) if tolerance else None
    found = loadmanager.compare_runs(reference or history(), compared(candidate), wanted)
    return {(one["endpoint"], one["metric"]) for one in found["regressions"]}


def test_the_same_numbers_are_no_regression():
    found = loadmanager.compare_runs(history(), compared(a_run("b")))
    assert (found["regressions"], found["differences"], found["warnings"]) == ([], [], [])
    assert (found["judgement"], found["message"]) == ("no regression", "none of 11 figures got worse")
    p95 = found["totals"]["p95ResponseMs"]
    assert p95["baseline"] == pytest.approx(200, rel=0.01) and p95["candidate"] == 200.0
    assert p95["judgement"] == "within noise"
    assert p95["interval"][0] < 0 < p95["interval"][1]
    assert p95["equalRuns"][0] < 200 < p95["equalRuns"][1]


def test_every_shown_figure_is_judged_or_says_why_not():
    found = loadmanager.compare_runs(history(), compared(a_run("b")))
    shown = [found["totals"], *(one["metrics"] for one in found["endpoints"])]
    for figures in shown:
        for name, one in figures.items():
            assert one["judgement"] in loadmanager.JUDGEMENTS and one["reason"], name
    assert judgements(found)["totalRequests"] == "cannot tell"
    assert set(judgements(found)) == set(loadmanager.COMPARED)


@pytest.mark.parametrize(
    ("after", "tolerance", "expected"),
    [
        ({"p95": 260.0}, None, {(None, "p95ResponseMs"), ("GET /a", "p95ResponseMs")}),
        ({"p95": 215.0}, None, set()),
        ({"p95": 260.0}, "p95ResponseMs:40%,p99ResponseMs:40%", set()),
        ({"p95": 260.0}, "p95ResponseMs:30,p99ResponseMs:40%",
            {(None, "p95ResponseMs"), ("GET /a", "p95ResponseMs")}),
        ({"p95": 100.0}, None, set()),
        ({"errors": 40}, None, {(None, "errorRate"), ("GET /a", "errorRate")}),
        ({"errors": 8}, None, set()),
        ({"rps": 70.0}, None, {(None, "totalRps")}),
        ({"rps": 95.0}, None, set()),
    ],
)  # fmt: skip
def test_what_is_worse_than_its_tolerance_and_than_equal_runs_is_a_regression(after, tolerance, expected):
    found = regressed(a_run("b", **after), tolerance)
    assert {one for one in found if one[1] != "p99ResponseMs"} == expected


def test_what_got_better_is_an_improvement():
    found = loadmanager.compare_runs(history(), compared(a_run("b", p95=100.0)))
    assert judgements(found)["p95ResponseMs"] == "improvement"
    assert found["judgement"] == "no regression"


def test_figures_that_differ_from_run_to_run_must_change_by_more():
    wild = [
        compared(a_run(f"h{index}", p95=p95)) for index, p95 in enumerate((150.0, 250.0, 200.0, 170.0, 230.0))
    ]
    assert regressed(a_run("b", p95=260.0), reference=wild) == set()
    assert (None, "p95ResponseMs") in regressed(a_run("b", p95=2000.0), reference=wild)


def test_a_baseline_alone_tells_only_of_what_is_far_beyond_any_scatter():
    alone = history(1)
    found = loadmanager.compare_runs(alone, compared(a_run("b", p95=260.0)))
    assert (found["judgement"], found["message"]) == ("cannot tell", "not enough runs to tell: 1 of 5")
    assert judgements(found)["p95ResponseMs"] == "cannot tell"
    found = loadmanager.compare_runs(alone, compared(a_run("b", p95=2000.0)))
    assert found["judgement"] == "regression"
    assert "as only 1 of 5 are known" in found["regressions"][0]["message"]
    assert loadmanager.verdict_of((), loadmanager.comparison_summary("baseline", found), False) == "failed"


def test_what_nothing_can_be_told_of_is_no_verdict():
    found = loadmanager.compare_runs(history(2), compared(a_run("b")))
    assert found["message"] == "not enough runs to tell: 2 of 5"
    assert loadmanager.verdict_of((), loadmanager.comparison_summary("history", found), False) is None


def test_a_change_within_locusts_rounding_is_none():
    assert regressed(a_run("b", p95=3.0), reference=history(p95=2.0)) == set()


def test_endpoints_with_few_requests_are_not_judged_and_it_is_said():
    few = [compared(a_run(f"h{index}", endpoints={"/a": (50, 0, 100.0)})) for index in range(5)]
    found = loadmanager.compare_runs(few, compared(a_run("b", endpoints={"/a": (50, 0, 900.0)})))
    assert found["regressions"] == []
    p95 = found["endpoints"][0]["metrics"]["p95ResponseMs"]
    assert (p95["judgement"], p95["reason"]) == ("cannot tell", "too few requests: 50, 100 are needed")


def test_new_and_gone_endpoints_are_named():
    old = [compared(a_run(f"h{index}", endpoints={"/old": (500, 0, 1.0)})) for index in range(5)]
    found = loadmanager.compare_runs(old, compared(a_run("b", endpoints={"/new": (500, 0, 1.0)})))
    assert [(one["name"], one["state"]) for one in found["endpoints"]] == [("/new", "new"), ("/old", "gone")]
    assert "endpoint GET /new is new" in found["differences"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"targetUsers": 9}, "users"),
        ({"scenarioId": "x"}, "scenario"),
        ({"finishedAt": "2026-01-01T00:02:00.000Z"}, "duration"),
        ({"locustfileSha256": "2"}, "locustfile"),
        ({"tags": ["slow"]}, "tags"),
        ({"usersChanges": [{"at": "2026-01-01T00:00:30.000Z", "targetUsers": 20}]}, "users were changed"),
    ],
)
def test_a_different_load_is_named_and_nothing_is_told_of_it(changes, word):
    known = history(locustfileSha256="1")
    other = {**a_run("b", p95=900.0), "locustfileSha256": "1", **changes}
    found = loadmanager.compare_runs(known, compared(other))
    assert (found["judgement"], found["regressions"]) == ("cannot tell", [])
    assert found["message"].startswith("different load: ") and word in found["message"]
    assert any(sentence.startswith(word) for sentence in found["differences"])


def test_unreliable_data_is_named_and_nothing_is_told_of_it():
    found = loadmanager.compare_runs(
        history(), compared(a_run("b", p95=900.0, trustReasons=["a worker was lost"]))
    )
    assert found["warnings"] == ["unreliable data of the candidate: a worker was lost"]
    assert (found["judgement"], found["message"]) == ("cannot tell", found["warnings"][0])


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


# ---- the method, against other people's implementations and by simulation ------


@pytest.mark.parametrize("degrees", [1.0, 2.5, 4.0, 9.7, 30.0, 1000.0])
@pytest.mark.parametrize("t", [-3.0, 0.0, 0.1, 1.0, 2.5, 6.0, 25.0])
def test_students_t_is_scipys(t, degrees):
    stats = pytest.importorskip("scipy.stats")
    expected = float(stats.t.sf(t, degrees))
    assert loadmanager.t_tail(t, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    if expected < 0.5:
        assert loadmanager.t_quantile(expected, degrees) == pytest.approx(t, rel=1e-6)


def test_exact_percentiles_are_numpys_within_their_bucket():
    numpy = pytest.importorskip("numpy")
    draw = random.Random(1)
    times = [draw.lognormvariate(4.6, 0.5) for _ in range(5000)]
    counts = Counter(round(ms) for ms in times)
    for ratio in (0.5, 0.95, 0.99):
        expected = float(numpy.quantile(times, ratio))
        assert loadmanager.quantile_ms(counts, ratio) == pytest.approx(expected, abs=1.0)


def test_holms_alarms_are_within_the_rate_of_the_whole_family():
    p_values = [(0.001, 1.0), (0.008, 1.0), (0.04, 1.0), (0.5, 1.0)]
    assert loadmanager.alarms_among(p_values, 0.05) == {0, 1}, "0.05/4, 0.05/3, then 0.05/2 is missed"
    assert loadmanager.alarms_among([(0.02, 3.0), (0.02, 1.0)], 0.05) == {0, 1}
    assert loadmanager.alarms_among([(0.03, 3.0), (0.02, 1.0)], 0.05) == {0, 1}
    assert loadmanager.alarms_among([], 0.05) == set()


@pytest.mark.parametrize("name", ["quiet", "busy machine", "ten endpoints"])
def test_equal_runs_raise_no_more_false_alarms_than_stated(name):
    """Seeded. With twice the stated rate more than 8 of 100 would be seen in one of 60 tries only."""
    assert count(WORLDS[name], 100, seed=7) <= 8


@pytest.mark.parametrize(("effect", "at_least"), [(0.2, 19), (0.1, 15)])
def test_a_slower_endpoint_is_found_on_a_quiet_machine(effect, at_least):
    assert count(WORLDS["quiet"], 20, seed=7, effect=effect) >= at_least


@pytest.mark.parametrize(
    ("times", "is_exact"),
    [
        ({20: 200, 100: 2}, True),
        ({20: 90, 103: 40}, True),
        ({20: 90, 110: 40, 1300: 1}, False),
        ({20: 9}, True),
    ],
)
def test_times_are_called_rounded_only_where_they_show_it(times, is_exact):
    """A block of exact times with two requests of just 100 ms made a whole run one of Locust's two digits."""
    requests = sum(times.values())
    parts = [loadmanager.Histogram(requests, 0, 1.0, times), loadmanager.Histogram(3, 0, 60.0, {20: 3})]
    assert loadmanager.run_figures({}, {None: parts}).is_exact is is_exact


def test_figures_survive_the_store_and_a_file():
    draw = random.Random(3)
    figures = a_simulated_run(WORLDS["quiet"], draw, 0.0, {}, "a").figures
    again = loadmanager.run_figures_from_record(loadmanager.run_figures_to_record(figures))
    assert again == figures and again.is_exact


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
        "targetUsers": 12,
        "spawnRate": 12,
        "durationSeconds": 6,
        **more,
    }
    created = lm.post("/v1/tests", body)
    assert created.status == 201, created.body
    return eventually(lambda: final(lm, created.json["id"]), 40, what="the run is final")


def trusted(lm, **more):
    """A run whose data are reliable: on a machine in use one may have had too few users, and is left out of
    the history then."""
    for _ in range(4):
        run = finished(lm, **more)
        if run["trust"] == "ok":
            return run
    raise AssertionError(f"four doubtful runs; the last: {run['trustReasons']}")


def final(lm, run_id):
    run = lm.get(f"/v1/tests/{run_id}").json
    return run if run["status"] in ("Finished", "Failed") else None


def test_equal_runs_are_no_regression_and_a_slower_endpoint_is_found(lm, target):
    """Runs of 6 s on a machine in use: by how much equal ones differ is learned from them, whatever that is.
    What is asked of the last run, fifty times slower, no noise can hide."""
    first = trusted(lm, compareWith="baseline", thresholds=["errorRate < 1"])
    assert first["comparison"]["message"] == "not compared: there is no baseline"
    assert first["verdict"] == "passed"
    assert len(first["locustfileSha256"]) == 64
    named = lm.request("PUT", PLACE, {"runId": first["id"]})
    assert (named.status, named.json["runId"]) == (200, first["id"])
    assert lm.request("DELETE", f"/v1/tests/{first['id']}").status == 409

    same = [trusted(lm, compareWith="baseline")]
    assert same[0]["comparison"]["runsKnown"] == 1
    assert (same[0]["comparison"]["judgement"], same[0].get("verdict")) == ("cannot tell", None)
    same += [trusted(lm, compareWith="history") for _ in range(4)]
    assert [run["comparison"]["runsKnown"] for run in same[1:]] == [2, 3, 4, 5]
    told = same[-1]["comparison"]
    assert told["exactTimes"] and told["noiseJudged"]
    assert same[-1]["verdict"] == ("failed" if told["regressions"] else "passed")

    target.slow_s = 1.0
    slower = trusted(lm, compareWith="history")
    assert slower["verdict"] == "failed" and slower["comparison"]["judgement"] == "regression"
    worse = {one["endpoint"] for one in slower["comparison"]["figures"] if one["judgement"] == "regression"}
    assert "GET /api/slow" in worse, slower["comparison"]["figures"]
    answer = lm.get(f"/v1/tests/compare?baseline={first['id']}&candidate={slower['id']}").json
    told = {(one["endpoint"], one["metric"]): one for one in answer["figures"]}
    slow = told["GET /api/slow", "p50ResponseMs"]
    assert slow["judgement"] == "regression", slow
    several = ",".join(run["id"] for run in (first, *same))
    answer = lm.get(f"/v1/tests/compare?baseline={several}&candidate={slower['id']}").json
    assert answer["runsKnown"] == 6 and answer["judgement"] == "regression"
    last = lm.get(f"/v1/tests/compare?baseline=history&candidate={slower['id']}").json
    assert last["runs"] == slower["comparison"]["runs"]

    cases = {
        case.attrib["name"]: case
        for case in ElementTree.fromstring(lm.get(f"/v1/tests/{slower['id']}/junit.xml").body).iter(
            "testcase"
        )
    }
    whole = cases[f"no regression against history {same[-1]['id']}"]
    assert whole.find("failure") is not None, ElementTree.tostring(whole)
    for one in slower["comparison"]["figures"]:
        case = cases[f"{one['endpoint'] or 'totals'}: {one['metric']} against history"]
        assert (case.find("failure") is not None) == (one["judgement"] == "regression"), (
            one,
            ElementTree.tostring(case),
        )
    assert cases["totals: totalRequests against history"].find("skipped") is not None
    summary = lm.get(f"/v1/tests/{slower['id']}/summary.md").body.decode()
    assert summary.startswith("## Load test shop: failed")
    assert "| GET /api/slow | " in summary
    points = lm.get("/v1/trends?tenantId=acme&envId=dev&scenarioId=shop&metric=p95ResponseMs").json["points"]
    ours = [first["id"], *(run["id"] for run in same), slower["id"]]
    assert [point["runId"] for point in points if point["runId"] in ours] == ours
    values = {point["runId"]: point["value"] for point in points}
    assert values[first["id"]] == first["lastMetrics"]["p95ResponseMs"]

    lm.restart()
    assert lm.get(PLACE).json == named.json
    assert lm.get(f"/v1/tests/compare?baseline={several}&candidate={slower['id']}").json == answer
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
