"""More of a run's life on real Locust: time as the target saw it, ends that Locust makes, an old Locust."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CALLBACK_TOKEN, cluster_config
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import LOCUSTFILE, PLAIN, RULES, assert_equals_csv, start_run
from waiting import eventually

import loadmanager

OLD_LOCUST = "2.32.0"  # /stop is GET there, no /worker-count, run_time timers outlive their test


class TimedTarget(Target):
    """Knows when its last request came."""

    last_at = 0.0

    def _count(self, path: str) -> None:
        self.last_at = time.time()
        super()._count(path)


@pytest.fixture
def target():
    with TimedTarget() as target:
        yield target


@pytest.fixture
def pair(load_manager, target):
    """pair() -> (lm, locust): a Load Manager and a master with two workers that know each other."""
    started = []

    def start(locustfile=LOCUSTFILE, hooks=True, python=sys.executable):
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
        locust = LocustCluster(
            locustfile,
            2,
            environment if hooks else {},
            hosts,
            worker_args=hosts,
            web_port=port,
            python=python,
        ).start()
        started.append(locust)
        return lm, locust

    yield start
    for locust in started:
        locust.stop()


def oldest_python() -> str:
    """The oldest Python of this machine that OLD_LOCUST runs on: the hooks must, too."""
    for minor in (9, 10):
        found = [shutil.which(f"python3.{minor}")]
        found += sorted(map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")))
        for python in filter(None, found):
            if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
                return python
    return sys.executable


@pytest.fixture(scope="session")
def old_python(pytestconfig) -> str:
    """The interpreter of a virtual environment with OLD_LOCUST, kept in pytest's cache folder between
    runs."""
    folder = Path(pytestconfig.cache.mkdir(f"locust-{OLD_LOCUST}"))
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([oldest_python(), "-m", "venv", "--clear", str(folder)], check=True, timeout=60)
        # It names no bounds for what broke it later.
        pinned = [f"locust=={OLD_LOCUST}", "setuptools<81"]
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned]
        subprocess.run(install, check=True, timeout=100)
        done.touch()
    return str(python)


def assert_only_cut_off_requests_are_missing(final, target) -> None:
    """Locust counts a request when its answer is there: what the stop cut off, at most one a user, reached
    the target and is in no report."""
    counted = final["lastMetrics"]["totalRequests"]
    assert 0 <= target.total - counted <= final["targetUsers"], (
        f"the target got {target.total} requests, the run has {counted}"
    )


def started_at(run) -> float:
    return loadmanager.time_of(run, "startedAt")


def test_target_gets_its_last_request_at_the_deadline(pair, target):
    lm, _ = pair(PLAIN, hooks=False)
    run = start_run(lm, durationSeconds=4)
    lm.wait_for(run["id"], "Finished")
    late = target.last_at - (started_at(run) + 4)
    assert -0.5 < late < 1.5, f"the last request came {late:+.2f} s from the deadline"


def test_run_that_locust_s_own_time_ends_is_finished_with_its_numbers(pair):
    lm, locust = pair()
    # As somebody would in Locust's page: a test with a run time of its own, which Load Manager only follows.
    locust.swarm(user_count=4, spawn_rate=4, run_time="4s")
    (run,) = eventually(lambda: lm.get("/v1/tests?status=Running").json, 10, what="the test registers itself")
    final = lm.wait_for(run["id"], "Finished")
    assert final["stopReason"] == "locust"
    assert_equals_csv(final, locust)


def test_adopted_run_is_not_swarmed_again(pair, target):
    lm, locust = pair()
    run = start_run(lm, durationSeconds=8)
    began = locust.get("/loadmanager/state")["testStartedAt"]
    seen = eventually(lambda: target.total, 10)
    lm.kill9()
    lm.restart()
    adopted = lm.run(run["id"])
    state = locust.get("/loadmanager/state")
    assert adopted["status"] == "Running" and adopted["startedAt"] == run["startedAt"]
    assert state["testStartedAt"] == began and state["runId"] == run["id"], "a second swarm replaced the test"
    final = lm.wait_for(run["id"], "Finished")
    late = target.last_at - (started_at(run) + 8)
    assert target.total > seen and late < 1.5, f"the last request came {late:+.2f} s after the deadline"
    assert len(re.findall("Sending spawn jobs", locust.log())) == 1
    assert_only_cut_off_requests_are_missing(final, target)


@pytest.mark.timeout(240)  # the first time, the old Locust is installed
@pytest.mark.parametrize("hooks", [True, False], ids=["with-hooks", "without-hooks"])
def test_old_locust_is_started_measured_and_stopped(old_python, pair, target, hooks):
    lm, locust = pair(LOCUSTFILE if hooks else PLAIN, hooks=hooks, python=old_python)
    run = start_run(lm)
    eventually(lambda: (lm.run(run["id"]).get("lastMetrics") or {}).get("totalRequests"), 10)
    assert lm.post(f"/v1/tests/{run['id']}/stop").status == 200
    final = lm.wait_for(run["id"], "Finished")
    assert final["stopReason"] == "user"
    eventually(
        lambda: locust.stats()["user_count"] == 0,
        5,
        what="no users are left (the statistics are cached for 2 s)",
    )
    assert final["lastMetrics"]["totalRequests"] == int(locust.csv_rows()[-1]["Request Count"])
    assert_only_cut_off_requests_are_missing(final, target)
