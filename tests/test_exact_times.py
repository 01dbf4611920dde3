"""Exact response times: kept by the hooks in real Locust's workers, and what Load Manager makes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from locust_process import LocustCluster
from target import Target
from test_hooks import LOCUST_DIRECTORY, ControlPlane, assert_equals_csv, hook_variables, start_run
from waiting import eventually

TIMES = [4.4, 58.7, 101.2, 147.0, 152.9, 999.6, 1234.4, 58760.0]  # ms
EXACT = {"4": 1, "59": 1, "101": 1, "147": 1, "153": 1, "1000": 1, "1230": 1, "58800": 1}
LOCUSTFILE = f"""
import loadmanager_hooks
from locust import User, constant, task

class Reporter(User):
    wait_time = constant(0.05)

    @task
    def report(self):
        for ms in {TIMES}:
            self.environment.events.request.fire(
                request_type="GET", name="/timed", response_time=ms, response_length=0, exception=None,
                context={{}},
            )
        self.environment.events.request.fire(
            request_type="GET", name="/none", response_time=None, response_length=0, exception=None,
            context={{}},
        )
"""


@pytest.fixture(scope="module")
def target():
    with Target() as target:
        yield target


@pytest.fixture
def control_plane():
    control_plane = ControlPlane()
    yield control_plane
    control_plane.stop()


def final_of(cluster, control_plane, run_id, at_least=100):
    eventually(lambda: control_plane.named("metrics")[-1].body["metrics"]["totalRequests"] > at_least)
    cluster.post("/stop")
    end = control_plane.first("test-stop", run_id)
    assert end.body["complete"] is True
    return end.body["finalMetrics"]


def scaled(counts, times):
    return {ms: requests * times for ms, requests in counts.items()}


@pytest.mark.parametrize("workers", [0, 2], ids=["standalone", "distributed"])
def test_times_are_kept_to_the_ms_and_to_three_digits_while_figures_stay_locusts(
    workers, control_plane, target
):
    with LocustCluster(LOCUSTFILE, workers, hook_variables(control_plane)) as cluster:
        start_run(cluster, target, "exact", user_count=2)
        final = final_of(cluster, control_plane, "exact")
        row = final["requestStats"]["GET_/timed"]
        rounds, rest = divmod(row["numRequests"], len(TIMES))
        assert rest == 0
        assert row["responseTimes"] == final["responseTimes"] == scaled(EXACT, rounds)
        assert final["requestStats"]["GET_/none"]["responseTimes"] == {}
        assert row["medianResponseTime"] == 150, "Locust's own two digits"
        final["requestStats"].pop("GET_/none")  # without a time; the CSV has zeros there
        rows = cluster.csv_rows()
        assert_equals_csv(final, [row for row in rows if row["Name"] != "/none"])


def test_times_follow_a_reset_of_locusts_statistics(control_plane, target):
    with LocustCluster(LOCUSTFILE, 1, hook_variables(control_plane)) as cluster:
        start_run(cluster, target, "reset", user_count=1)
        eventually(lambda: control_plane.named("metrics")[-1].body["metrics"]["totalRequests"] > 200)
        cluster.post("/stats/reset")
        eventually(lambda: control_plane.named("metrics")[-1].body["metrics"]["totalRequests"] < 200)
        final = final_of(cluster, control_plane, "reset")
        timed = final["requestStats"]["GET_/timed"]
        assert timed["responseTimes"] == scaled(EXACT, timed["numRequests"] // len(TIMES))


def test_a_second_run_begins_with_no_times(control_plane, target):
    with LocustCluster(LOCUSTFILE, 1, hook_variables(control_plane)) as cluster:
        for run_id in ("first", "second"):
            control_plane.calls.clear()
            start_run(cluster, target, run_id, user_count=1)
            eventually(lambda: control_plane.named("metrics"))
            timed = final_of(cluster, control_plane, run_id)["requestStats"]["GET_/timed"]
            assert timed["responseTimes"] == scaled(EXACT, timed["numRequests"] // len(TIMES))


def test_with_a_worker_that_has_older_hooks_the_times_are_locusts(control_plane, target, tmp_path):
    """Its requests are in Locust's statistics only: half of the exact times would be no histogram."""
    shutil.copy(LOCUST_DIRECTORY / "loadmanager_hooks.py", tmp_path)
    older = LOCUSTFILE.replace(
        "import loadmanager_hooks", "import loadmanager_hooks\nloadmanager_hooks.TIMES_MARK = 'x'"
    )
    (tmp_path / "older.py").write_text(older)
    with LocustCluster(LOCUSTFILE, 1, hook_variables(control_plane)) as cluster:
        cluster._worker_args = ["-f", str(tmp_path / "older.py")]
        cluster.add_worker()
        start_run(cluster, target, "mixed", user_count=2)
        timed = final_of(cluster, control_plane, "mixed")["requestStats"]["GET_/timed"]
    assert sum(timed["responseTimes"].values()) == timed["numRequests"]
    assert set(timed["responseTimes"]) == {"4", "59", "100", "150", "1000", "1200", "59000"}


LIMITS = """
from locust import User  # makes ssl and threads cooperative before requests takes them
import json, types
import loadmanager_hooks as hooks
class Stats: total = types.SimpleNamespace(response_times={})
environment = types.SimpleNamespace(stats=Stats)
exact = hooks.ExactTimes(environment)
for endpoint in range(2000):
    for ms in range(0, 3000, 7):
        exact.on_request("GET", str(endpoint), ms + 0.4)
for odd in (None, float("nan"), float("inf"), -5, "x"):
    exact.on_request("GET", "0", odd)
buckets = sum(map(len, exact._times.values()))
rows = exact.take()
total = hooks.ExactTimes(environment)
total.add_report(rows)
requests = sum(sum(times.values()) for _, _, times in rows)
print(json.dumps([len(rows), buckets, requests, sum(total._total.values()), len(exact.take())]))
"""


def test_memory_for_times_is_bounded_and_no_request_is_lost():
    environment = {**os.environ, "PYTHONPATH": str(LOCUST_DIRECTORY)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows, buckets, requests, in_total, left = json.loads(done.stdout.splitlines()[-1])
    assert rows == 501, "500 endpoints, and one row for all others"
    assert buckets <= 50_000 + 501 * 400
    assert requests == in_total == 2000 * 429
    assert left == 0, "what was taken is gone"
