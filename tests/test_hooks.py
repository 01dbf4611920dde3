"""locust/loadmanager_hooks.py inside real Locust processes, with a recording control plane."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.error
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from locust_process import LocustCluster
from target import Target
from waiting import eventually, holds_for

import loadmanager

LOCUST_DIRECTORY = Path(__file__).resolve().parent.parent / "locust"
TOKEN = "callback-token-of-this-test"
PUSH_INTERVAL_S = 0.5
WORKER_REPORT_S = 3.5  # Locust's workers report every 3 s

LOCUSTFILE = """
from locust import HttpUser, constant_pacing, task
import loadmanager_hooks

class Visitor(HttpUser):
    wait_time = constant_pacing(0.1)

    @task(2)
    def browse(self):
        self.client.get("/api/items")

    @task
    def open_item(self):
        self.client.get("/api/items/7", name="/api/items/{id}")

    @task
    def add(self):
        self.client.post("/api/items", json={"name": "x"})
"""

Call = namedtuple("Call", "name body token at")


class ControlPlane:
    """Records the callbacks. `answers`: name -> (HTTP status, body); `hang_s`: before every answer."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._let_go = threading.Event()
        self.reset()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        self._let_go.set()  # whoever still hangs
        self._let_go = threading.Event()
        self.calls: list[Call] = []
        self.hang_s = 0.0
        self.drip_s = 0.0  # between two bytes of the answer
        self.answers = {"register-external": (200, {"runId": "external-1", "message": "registered"})}

    def stop(self) -> None:
        self.reset()
        self._server.shutdown()
        self._server.server_close()

    def named(self, name: str, run_id: str | None = None) -> list[Call]:
        return [
            call
            for call in list(self.calls)
            if call.name == name and run_id in (None, call.body.get("runId"))
        ]

    def first(self, name: str, run_id: str | None = None, within_s: float = 10.0) -> Call:
        return eventually(
            lambda: self.named(name, run_id), within_s, what=f"{name} of {run_id or 'any run'}"
        )[0]

    def _handler(control_plane):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = self.path.removeprefix("/v1/internal/locust/")
                control_plane.calls.append(
                    Call(name, body, self.headers.get("X-Locust-Token"), time.monotonic())
                )
                if control_plane.hang_s:
                    control_plane._let_go.wait(control_plane.hang_s)
                status, answer = control_plane.answers.get(name, (200, {"success": True}))
                data = json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    for byte in data if control_plane.drip_s else ():
                        self.wfile.write(bytes([byte]))
                        control_plane._let_go.wait(control_plane.drip_s)
                    self.wfile.write(b"" if control_plane.drip_s else data)
                except OSError:
                    pass  # the hooks did not wait

            def log_message(self, format, *args) -> None:
                pass

        return Handler


def hook_variables(control_plane: ControlPlane, **more: str) -> dict[str, str]:
    return {
        "CONTROL_PLANE_URL": control_plane.url,
        "CONTROL_PLANE_TOKEN": TOKEN,
        "TENANT_ID": "tenant-env",
        "ENV_ID": "env-env",
        "CLUSTER_ID": "cluster-env",
        "METRICS_PUSH_INTERVAL": str(PUSH_INTERVAL_S),
        "PYTHONPATH": str(LOCUST_DIRECTORY),
        **more,
    }


def start_run(
    cluster: LocustCluster,
    target: Target,
    run_id: str,
    user_count: int = 4,
    spawn_rate: float = 50,
    lm_stop_after: str = "",
    lm_lease: str = "",
    **fields,
) -> None:
    """As Load Manager does it."""
    answer = cluster.swarm(
        user_count,
        spawn_rate,
        host=target.url,
        run_id=run_id,
        tenant_id="tenant-form",
        env_id="env-form",
        lm_stop_after=lm_stop_after,
        lm_lease=lm_lease,
        **fields,
    )
    assert answer["success"], answer


def state_of(cluster: LocustCluster, **headers: str) -> dict:
    return cluster.get("/loadmanager/state", headers=headers)


def is_idle(cluster: LocustCluster) -> bool:
    state = state_of(cluster)
    return (
        state["state"] in ("ready", "stopped")
        and not state["userCount"]
        and not state["runId"]
        and all(worker["state"] == "ready" for worker in state["workers"])
    )


def wait_for_load(cluster: LocustCluster, user_count: int = 4) -> None:
    eventually(
        lambda: state_of(cluster)["userCount"] == user_count and state_of(cluster)["numRequests"] > 0,
        what=f"{user_count} users at work",
    )


def assert_equals_csv(final: dict, rows: list[dict[str, str]]) -> None:
    """Row for row what Locust's own report says."""
    assert rows[-1]["Name"] == "Aggregated"
    total = rows[-1]
    expected = {
        "totalRequests": total["Request Count"],
        "totalFailures": total["Failure Count"],
        "totalRps": total["Requests/s"],
        "avgResponseMs": total["Average Response Time"],
        "p50ResponseMs": total["50%"],
        "p95ResponseMs": total["95%"],
        "p99ResponseMs": total["99%"],
    }
    assert {key: final[key] for key in expected} == {
        key: pytest.approx(float(value), abs=1e-9) for key, value in expected.items()
    }
    columns = {
        "numRequests": "Request Count",
        "numFailures": "Failure Count",
        "avgResponseTime": "Average Response Time",
        "minResponseTime": "Min Response Time",
        "maxResponseTime": "Max Response Time",
        "medianResponseTime": "Median Response Time",
        "requestsPerSec": "Requests/s",
        "p95ResponseTime": "95%",
        "p99ResponseTime": "99%",
    }
    assert set(final["requestStats"]) == {f"{row['Type']}_{row['Name']}" for row in rows[:-1]}
    for row in rows[:-1]:
        endpoint = final["requestStats"][f"{row['Type']}_{row['Name']}"]
        assert (endpoint["method"], endpoint["name"]) == (row["Type"], row["Name"])
        assert {key: endpoint[key] for key in columns} == {
            key: pytest.approx(float(row[column]), abs=1e-9) for key, column in columns.items()
        }


@pytest.fixture(scope="module")
def control_plane_process():
    control_plane = ControlPlane()
    yield control_plane
    control_plane.stop()


@pytest.fixture(scope="module")
def target():
    with Target() as target:
        yield target


@pytest.fixture(scope="module")
def master_process(control_plane_process):
    with LocustCluster(LOCUSTFILE, workers=2, env=hook_variables(control_plane_process)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def standalone_process(control_plane_process):
    with LocustCluster(LOCUSTFILE, workers=0, env=hook_variables(control_plane_process)) as cluster:
        yield cluster


@pytest.fixture
def control_plane(control_plane_process, target):
    control_plane_process.reset()
    target.delay_s = target.fail_ratio = 0.0
    return control_plane_process


@pytest.fixture
def master(master_process, control_plane):
    """A master with two workers, idle before and after."""
    yield master_process
    make_idle(master_process)


@pytest.fixture
def standalone(standalone_process, control_plane):
    yield standalone_process
    make_idle(standalone_process)


def make_idle(cluster: LocustCluster) -> None:
    cluster.post("/stop")
    eventually(lambda: is_idle(cluster), what="an idle Locust")


# ---- the course of a run ----


def test_run_is_announced_measured_and_ended_under_the_id_of_the_form(master, control_plane, target):
    start_run(master, target, "run-course")

    def has_pushed_all_users() -> bool:
        pushes = control_plane.named("metrics", "run-course")
        return len(pushes) >= 3 and pushes[-1].body["metrics"]["currentUsers"] == 4

    eventually(has_pushed_all_users, what="three pushes, the last one with all users")
    master.post("/stop")
    end = control_plane.first("test-stop", "run-course")

    calls = [call for call in control_plane.calls if call.body.get("runId") == "run-course"]
    assert [call.name for call in calls] == ["test-start", *["metrics"] * (len(calls) - 2), "test-stop"]
    assert calls[0].body == {
        "runId": "run-course",
        "tenantId": "tenant-form",
        "envId": "env-form",
        "hooks": 1,
    }
    assert {call.token for call in calls} == {TOKEN}
    assert (end.body["tenantId"], end.body["envId"], end.body["complete"]) == (
        "tenant-form",
        "env-form",
        True,
    )
    pushed = [call.body["metrics"] for call in calls if call.name == "metrics"]
    assert all(metrics["timestamp"].endswith("Z") for metrics in pushed)
    assert max(metrics["currentUsers"] for metrics in pushed) == 4
    requests = [metrics["totalRequests"] for metrics in pushed] + [end.body["finalMetrics"]["totalRequests"]]
    assert requests == sorted(requests)


@pytest.mark.parametrize("ended_by", ["stop", "run_time"])
def test_final_numbers_of_a_master_equal_locusts_own_report(master, control_plane, target, ended_by):
    target.fail_ratio = 0.1
    target.counts.clear()
    start_run(
        master, target, f"run-{ended_by}", user_count=6, **({"run_time": 3} if ended_by == "run_time" else {})
    )
    if ended_by == "stop":
        control_plane.first("metrics")
        eventually(lambda: target.total > 100)
        master.post("/stop")
    end = control_plane.first("test-stop", f"run-{ended_by}")
    final = end.body["finalMetrics"]

    assert end.body["complete"] is True
    assert final["currentUsers"] == 0
    assert final["errorRate"] == pytest.approx(100 * final["totalFailures"] / final["totalRequests"])
    assert 0 <= target.total - final["totalRequests"] <= 6, "all but the requests that the stop cut off"
    assert sum(final["responseTimes"].values()) == final["totalRequests"]
    for row in final["requestStats"].values():
        assert sum(row["responseTimes"].values()) == row["numRequests"]
    # Nothing comes after it, not even with the workers' next regular reports.
    at_end = master.csv_rows()
    assert_equals_csv(final, at_end)
    holds_for(lambda: master.csv_rows() == at_end, WORKER_REPORT_S if ended_by == "stop" else 0.5)


def test_final_numbers_of_a_standalone_locust_equal_its_own_report(standalone, control_plane, target):
    start_run(standalone, target, "run-standalone")
    control_plane.first("metrics")
    standalone.post("/stop")
    end = control_plane.first("test-stop", "run-standalone")
    assert end.body["complete"] is True
    assert_equals_csv(end.body["finalMetrics"], standalone.csv_rows())


def test_figures_that_locust_does_not_have_are_null(master, control_plane, target):
    start_run(master, target, "run-empty", user_count=0)
    control_plane.first("metrics")
    master.post("/stop")
    end = control_plane.first("test-stop", "run-empty")
    final = end.body["finalMetrics"]
    assert [final[key] for key in ("avgResponseMs", "p50ResponseMs", "p95ResponseMs", "p99ResponseMs")] == [
        None
    ] * 4
    assert (final["totalRequests"], final["requestStats"], end.body["complete"]) == (0, {}, True)


def test_final_numbers_without_the_flush_of_a_worker_are_not_called_complete(control_plane, target):
    # The workers load the same scenarios without the hooks: their last reports come up to 3 s later.
    locustfile = "import os, sys\n" + LOCUSTFILE.replace(
        "import loadmanager_hooks", "if '--worker' not in sys.argv:\n    import loadmanager_hooks"
    )
    with LocustCluster(locustfile, workers=2, env=hook_variables(control_plane)) as cluster:
        target.counts.clear()
        start_run(cluster, target, "run-unflushed")
        control_plane.first("metrics", "run-unflushed")
        cluster.post("/stop")
        end = control_plane.first("test-stop", "run-unflushed")
        assert end.body["complete"] is False
        assert 0 <= target.total - end.body["finalMetrics"]["totalRequests"] <= 4, (
            "they were waited for all the same"
        )


def test_final_numbers_survive_a_next_test_that_clears_the_statistics(master, control_plane, target):
    start_run(master, target, "run-before")
    control_plane.first("metrics", "run-before")
    control_plane.answers["test-stop"] = (503, {})  # what is sent a second later is still this run's
    master.post("/stop")
    requests = int(master.csv_rows()[-1]["Request Count"])
    start_run(master, target, "run-after")
    eventually(lambda: len(control_plane.named("test-stop", "run-before")) == 2)
    assert {
        call.body["finalMetrics"]["totalRequests"] for call in control_plane.named("test-stop", "run-before")
    } == {requests}
    assert control_plane.first("test-start", "run-after")


@pytest.mark.parametrize("workers", [2, 0])
def test_locust_that_is_terminated_sends_complete_final_numbers_first(control_plane, target, workers):
    with LocustCluster(LOCUSTFILE, workers=workers, env=hook_variables(control_plane)) as cluster:
        target.counts.clear()
        start_run(cluster, target, "run-terminated")
        eventually(lambda: target.total > 40)
        assert cluster.terminate_master() == 0
        eventually(
            lambda: all(worker.poll() is not None for worker in cluster.workers), what="workers ended too"
        )
    (end,) = control_plane.named("test-stop", "run-terminated")
    assert end.body["complete"] is True
    assert 0 <= target.total - end.body["finalMetrics"]["totalRequests"] <= 4


# ---- which run is it? ----


def test_test_started_in_the_ui_after_a_run_registers_as_external(master, control_plane, target):
    start_run(master, target, "run-api")
    control_plane.first("test-start")
    master.post("/stop")
    control_plane.first("test-stop", "run-api")
    control_plane.calls.clear()

    master.swarm(3, 50, host=target.url)  # Locust's UI has no run_id field
    assert control_plane.first("register-external").body == {
        "tenantId": "tenant-env",
        "envId": "env-env",
        "scenarioId": "ui-started-test",
        "targetUsers": 3,
        "spawnRate": 50.0,
        "clusterId": "cluster-env",
    }
    control_plane.first("metrics", "external-1")
    master.post("/stop")
    control_plane.first("test-stop", "external-1")
    assert not control_plane.named("test-start")
    assert {call.body["runId"] for call in control_plane.named("metrics")} == {"external-1"}


def test_id_of_a_start_that_locust_refused_is_not_used_by_the_next_test(standalone, control_plane, target):
    refused = standalone.post("/swarm", run_id="run-stale", user_count="many", spawn_rate=1)
    assert refused["success"] is False
    standalone.swarm(2, 50, host=target.url)
    control_plane.first("register-external")
    assert not control_plane.named("test-start")


def test_external_test_is_offered_until_the_control_plane_takes_it(standalone, control_plane, target):
    control_plane.answers["register-external"] = (503, {"error": "starting"})
    standalone.swarm(2, 50, host=target.url)
    eventually(lambda: len(control_plane.named("register-external")) >= 2)
    assert not control_plane.named("metrics"), "without an id there is nothing to push to"
    control_plane.answers["register-external"] = (200, {"runId": "external-2"})
    control_plane.first("metrics", "external-2")
    assert state_of(standalone)["runId"] == "external-2"


def test_change_of_users_is_no_new_run(standalone, control_plane, target):
    start_run(standalone, target, "run-rescaled", user_count=2)
    wait_for_load(standalone, 2)
    start_run(standalone, target, "run-rescaled", user_count=5)
    wait_for_load(standalone, 5)
    standalone.post("/stop")
    control_plane.first("test-stop", "run-rescaled")
    assert len(control_plane.named("test-start", "run-rescaled")) == 1
    standalone.swarm(2, 50, host=target.url)
    assert control_plane.first("register-external"), "the id sent with the change is not left behind"


def test_id_sent_with_a_change_of_users_right_before_the_end_is_not_left_behind(control_plane, target):
    # Started without the form (as a key in Locust's terminal does), so nothing else clears it.
    locustfile = (
        LOCUSTFILE
        + """
from locust import events

@events.init.add_listener
def _(environment, web_ui, **kwargs):
    @web_ui.app.route("/start-by-key")
    def start_by_key():
        environment.runner.start(1, 10)
        return "{}"
"""
    )
    with LocustCluster(locustfile, workers=0, env=hook_variables(control_plane)) as cluster:
        start_run(cluster, target, "run-changed")
        control_plane.first("test-start", "run-changed")
        start_run(cluster, target, "run-changed", user_count=5)
        cluster.post("/stop")
        control_plane.first("test-stop", "run-changed")
        cluster.get("/start-by-key")
        control_plane.first("register-external")
    assert len(control_plane.named("test-start", "run-changed")) == 1


def test_id_of_the_form_goes_before_run_id_of_the_environment(control_plane, target):
    with LocustCluster(LOCUSTFILE, workers=0, env=hook_variables(control_plane, RUN_ID="run-env")) as cluster:
        start_run(cluster, target, "run-form")
        control_plane.first("test-start", "run-form")
        cluster.post("/stop")
        control_plane.first("test-stop", "run-form")
        cluster.swarm(2, 50, host=target.url)
        assert control_plane.first("test-start", "run-env").body["tenantId"] == "tenant-env"
    assert not control_plane.named("register-external")


# ---- a control plane that fails does not touch the load ----


def test_stop_does_not_wait_for_a_control_plane_that_hangs(master, control_plane, target):
    control_plane.hang_s = 20.0
    start_run(master, target, "run-hang")
    wait_for_load(master)
    control_plane.first("test-start")
    before = time.monotonic()
    master.post("/stop")
    assert time.monotonic() - before < control_plane.hang_s - 1, "the stop waited for the control plane"
    requests = int(master.csv_rows()[-1]["Request Count"])
    control_plane.hang_s = 0.0  # it recovers: the end still gets there
    end = control_plane.first("test-stop", "run-hang", within_s=15)
    assert end.body["finalMetrics"]["totalRequests"] == requests


def test_answer_that_drips_is_given_up_in_time(standalone, control_plane, target):
    control_plane.drip_s = 1.0  # an answer takes 18 s, and never 5 s without a byte
    start_run(standalone, target, "run-drip")
    control_plane.first("test-start", "run-drip")
    first = control_plane.named("test-start", "run-drip")[0]
    push = control_plane.first("metrics", "run-drip")
    assert push.at - first.at < 8.0


def test_start_and_end_reach_a_control_plane_that_was_away(standalone, control_plane, target):
    control_plane.answers.update({"test-start": (503, {}), "test-stop": (502, {})})
    start_run(standalone, target, "run-away")
    eventually(lambda: len(control_plane.named("test-start")) == 2, what="a second attempt")
    standalone.post("/stop")
    control_plane.first("test-stop", "run-away")
    del control_plane.answers["test-stop"]
    eventually(lambda: len(control_plane.named("test-stop", "run-away")) == 2, what="a second attempt")
    first, second = control_plane.named("test-stop", "run-away")
    assert first.body == second.body


def test_refused_pushes_warn_once_and_the_load_goes_on(control_plane, target):
    control_plane.answers["metrics"] = (404, {"error": "unknown run"})
    with LocustCluster(LOCUSTFILE, workers=0, env=hook_variables(control_plane)) as cluster:
        start_run(cluster, target, "run-unknown")
        eventually(lambda: len(control_plane.named("metrics")) >= 3)
        assert state_of(cluster)["state"] == "running"
        log = cluster.log()
    assert log.count("metrics refused") == 1
    assert TOKEN not in log


def test_outage_warns_once(target):
    gone = ControlPlane()
    gone.stop()
    env = hook_variables(gone, METRICS_PUSH_INTERVAL="0.2")
    with LocustCluster(LOCUSTFILE, workers=0, env=env) as cluster:
        start_run(cluster, target, "run-outage", user_count=2)
        wait_for_load(cluster, 2)
        holds_for(lambda: cluster.log().count("loadmanager: control plane") <= 1, 1.0)
        assert cluster.log().count("loadmanager: control plane") == 1
        assert state_of(cluster)["state"] == "running"


def test_without_a_control_plane_the_hooks_are_silent(target):
    with LocustCluster(LOCUSTFILE, workers=0, env={"PYTHONPATH": str(LOCUST_DIRECTORY)}) as cluster:
        start_run(cluster, target, "run-alone", user_count=2)
        wait_for_load(cluster, 2)
        assert (state_of(cluster)["callbacks"], state_of(cluster)["runId"]) == (False, "run-alone")
        cluster.post("/stop")
        assert state_of(cluster)["lastRunId"] == "run-alone"
        assert "loadmanager" not in cluster.log()


# ---- a load never outlives its controller ----


def test_run_ends_by_itself_when_its_time_is_up(master, control_plane, target):
    start_run(master, target, "run-timed", lm_stop_after="2.5")
    started = control_plane.first("test-start").at
    end = control_plane.first("test-stop", "run-timed")
    assert 2.3 < end.at - started
    assert end.body["complete"] is True
    eventually(lambda: is_idle(master))


def test_change_of_users_replaces_the_time_that_is_left(standalone, control_plane, target):
    start_run(standalone, target, "run-extended", user_count=2, lm_stop_after="60")
    wait_for_load(standalone, 2)
    start_run(standalone, target, "run-extended", user_count=3, lm_stop_after="1")
    control_plane.first("test-stop", "run-extended", within_s=30)  # of the 60 s it had


def test_time_of_an_ended_run_does_not_end_the_next(standalone, control_plane, target):
    start_run(standalone, target, "run-short", lm_stop_after="2")
    wait_for_load(standalone)
    standalone.post("/stop")
    start_run(standalone, target, "run-next")
    wait_for_load(standalone)
    holds_for(lambda: state_of(standalone)["runId"] == "run-next", 2.5)


@pytest.mark.parametrize("field", ["run_time", "lm_stop_after"])
def test_time_limit_ends_a_run_that_is_still_ramping_up(master, control_plane, target, field):
    # Without the hooks, run_time leaves the ramp of a master going on until all users run.
    start_run(master, target, f"run-ramp-{field}", user_count=20, spawn_rate=2, **{field: 2})
    control_plane.first("test-stop", f"run-ramp-{field}")
    holds_for(lambda: state_of(master)["userCount"] == 0, 1.5)


def test_stop_right_behind_a_start_leaves_no_load_and_keeps_the_workers(control_plane, target):
    # A slow listener makes the workers find "stop" waiting when they have just read "start".
    locustfile = (
        LOCUSTFILE
        + """
import gevent
from locust import events
from locust.runners import WorkerRunner

@events.test_start.add_listener
def prepare(environment, **kwargs):
    if isinstance(environment.runner, WorkerRunner):
        gevent.sleep(0.5)
"""
    )
    with LocustCluster(locustfile, workers=2, env=hook_variables(control_plane)) as cluster:
        for run_id in ("run-quick-1", "run-quick-2"):  # only a second start finds a stopped worker
            start_run(cluster, target, run_id)
            control_plane.first("test-start", run_id)
            cluster.post("/stop")
            eventually(lambda: is_idle(cluster) and len(state_of(cluster)["workers"]) == 2)
        requests = target.total
        holds_for(lambda: target.total == requests, 1.0)
        assert [worker.poll() for worker in cluster.workers] == [None, None]


def test_run_whose_control_plane_is_gone_ends_with_its_lease(control_plane, target):
    control_plane.answers["metrics"] = (503, {})
    with LocustCluster(LOCUSTFILE, workers=0, env=hook_variables(control_plane)) as cluster:
        start_run(cluster, target, "run-leased", lm_lease="1.5")
        wait_for_load(cluster)
        control_plane.first("test-stop", "run-leased")
        assert is_idle(cluster)
        assert cluster.log().count("nothing heard from the control plane for 1.5 s") == 1


def test_lease_is_renewed_by_pushes(standalone, control_plane, target):
    start_run(standalone, target, "run-pushed", lm_lease="2")
    wait_for_load(standalone)
    holds_for(lambda: state_of(standalone)["state"] == "running", 3.0)


def test_lease_is_renewed_by_reading_the_state_with_the_token_only(standalone, control_plane, target):
    control_plane.answers["metrics"] = (503, {})
    start_run(standalone, target, "run-read", lm_lease="4")
    wait_for_load(standalone)
    holds_for(lambda: state_of(standalone, **{"X-Locust-Token": TOKEN})["state"] == "running", 5.0)
    eventually(
        lambda: state_of(standalone, **{"X-Locust-Token": "another"})["state"] == "stopped", within_s=20
    )


# ---- the state route ----


def test_state_route_tells_what_runs_here(master, control_plane, target):
    idle = state_of(master)
    assert (idle["hooks"], idle["distributed"], idle["callbacks"], idle["flush"]) == (1, True, True, True)
    assert idle["state"] in ("ready", "stopped") and idle["runId"] == "" and idle["testStartedAt"] is None
    assert idle["userClasses"] == ["Visitor"]
    assert idle["locustfileSha256"] == hashlib.sha256(LOCUSTFILE.encode()).hexdigest()

    start_run(master, target, "run-seen")
    wait_for_load(master)
    running = eventually(lambda: state_of(master)["state"] == "running" and state_of(master))
    assert (running["runId"], running["userCount"], running["targetUserCount"]) == ("run-seen", 4, 4)
    assert running["host"] == target.url and running["bootId"] == idle["bootId"]
    assert abs(running["testStartedAt"] - time.time()) < 10
    assert [worker["userCount"] for worker in running["workers"]] == [2, 2]
    assert {worker["state"] for worker in running["workers"]} == {"running"}
    assert all(set(worker) == {"id", "state", "userCount", "cpuPercent"} for worker in running["workers"])

    master.post("/stop")
    assert (state_of(master)["runId"], state_of(master)["lastRunId"]) == ("", "run-seen")
    assert state_of(master)["state"] == "stopped", "not cached, unlike Locust's own"


def test_stop_that_names_another_run_is_refused(master, control_plane, target):
    """A stop that hung in a network, or was sent by a Load Manager that has ended, comes too late."""
    start_run(master, target, "run-now")
    wait_for_load(master)
    with pytest.raises(urllib.error.HTTPError) as refused:
        master.post("/stop?run_id=run-before")
    assert refused.value.code == 409 and b"run-now" in refused.value.read()
    assert state_of(master)["state"] == "running"
    client = client_of(master)
    assert client.stop("run-before") is False and state_of(master)["runId"] == "run-now"
    assert client.stop("run-now") is True and state_of(master)["runId"] == ""
    assert client.stop("run-before") is True, "nothing runs: there is nothing to refuse"

    master.swarm(4, 50, host=target.url)  # in Locust's page: its id is none that a start brought
    wait_for_load(master)
    assert client.stop("run-before") is True and state_of(master)["state"] == "stopped"


def client_of(master):
    config = loadmanager.ClusterConfig(id="c", tenant_id="t", env_id="e", base_url=master.base_url)
    return loadmanager.LocustClient(config, "", "")


def test_state_says_stopping_until_the_run_has_ended(master, control_plane, target):
    start_run(master, target, "run-stopping")
    wait_for_load(master)
    stop = threading.Thread(target=master.post, args=("/stop",))
    stop.start()
    seen = []
    while stop.is_alive():
        state = state_of(master)
        seen.append((state["state"], state["runId"]))
        stop.join(0.02)
    stop.join()
    assert ("stopping", "run-stopping") in seen
    assert not [state for state in seen if state == ("stopped", "run-stopping")]


def test_state_route_and_stale_ids_follow_the_base_path(control_plane, target):
    with LocustCluster(
        LOCUSTFILE, workers=0, env=hook_variables(control_plane), base_path="/team/locust"
    ) as cluster:
        assert cluster.base_url.endswith("/team/locust")
        assert state_of(cluster)["distributed"] is False
        cluster.post("/swarm", run_id="run-stale", user_count="many", spawn_rate=1)
        cluster.swarm(2, 50, host=target.url)
        control_plane.first("register-external")


# ---- the shipped scenarios ----


def test_shipped_locustfile_runs_without_failures_and_few_names(control_plane, target):
    target.counts.clear()
    locustfile = LOCUST_DIRECTORY / "locustfile.py"
    with LocustCluster(locustfile, workers=0, env=hook_variables(control_plane)) as cluster:
        start_run(cluster, target, "run-shipped", user_count=40, spawn_rate=100)
        eventually(
            lambda: len(target.counts) == 3 and state_of(cluster)["numRequests"] > 60, what="all paths hit"
        )
        cluster.post("/stop")
    final = control_plane.first("test-stop", "run-shipped").body["finalMetrics"]
    assert final["totalFailures"] == 0
    assert set(final["requestStats"]) == {"GET_/", "GET_/api/items", "GET_/api/items/{id}", "POST_/api/items"}
