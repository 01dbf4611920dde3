"""The life of a run on real Locust: a master with two workers running locust/locustfile.py with the hooks."""

from __future__ import annotations

import signal
import time

import pytest
from conftest import CALLBACK_TOKEN, ROOT, cluster_config
from locust_process import LocustCluster, find_free_port
from target import Target
from waiting import eventually, holds_for

import loadmanager

LOCUSTFILE = ROOT / "locust" / "locustfile.py"
# Without it Locust cuts requests off in the middle when it stops: the target has seen them, Locust
# never counts them.
REQUESTS_ARE_FINISHED = ("--stop-timeout", "5")
RULES = {"metricsPollIntervalSeconds": 1, "startTimeoutSeconds": 10, "lostAfterSeconds": 8}
PLAIN = """
from locust import HttpUser, constant, task

class Visitor(HttpUser):
    wait_time = constant(0.05)

    @task
    def items(self):
        self.client.get("/api/items")
"""


@pytest.fixture
def target():
    with Target() as target:
        yield target


@pytest.fixture
def pair(load_manager, target):
    """Starts a Load Manager and a Locust cluster that know each other: pair() -> (lm, cluster)."""
    started = []

    def start(
        locustfile=LOCUSTFILE,
        workers=2,
        host=True,
        extra_args=(),
        base_path="",
        hooks=True,
        cluster=None,
        kind=LocustCluster,
        **rules,
    ):
        port = find_free_port()
        lm = load_manager(
            cluster_config(f"http://127.0.0.1:{port}{base_path}", **(cluster or {})),
            orchestrator={**RULES, **rules},
        )
        environment = {
            "CONTROL_PLANE_URL": lm.url,
            "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
            "TENANT_ID": "acme",
            "ENV_ID": "dev",
            "METRICS_PUSH_INTERVAL": "1",
        }
        hosts = ["--host", target.url] if host else []
        locust = kind(
            locustfile,
            workers,
            environment if hooks else {},
            [*hosts, *extra_args],
            worker_args=hosts,
            base_path=base_path,
            web_port=port,
        ).start()
        started.append(locust)
        return lm, locust

    yield start
    for locust in started:
        locust.stop()


def start_run(lm, **changes):
    answer = lm.create(**changes)
    assert answer.status == 201, answer
    return answer.json


def assert_equals_csv(run, locust):
    """Every number of the final snapshot is the one of Locust's own CSV report."""
    *rows, total = locust.csv_rows()
    metrics = run["lastMetrics"]
    shown = {(row["method"], row["name"]): row for row in metrics["requestStats"].values()}
    assert set(shown) == {(row["Type"], row["Name"]) for row in rows}
    columns = {
        "numRequests": "Request Count", "numFailures": "Failure Count",
        "medianResponseTime": "Median Response Time", "avgResponseTime": "Average Response Time",
        "minResponseTime": "Min Response Time", "maxResponseTime": "Max Response Time",
        "p95ResponseTime": "95%", "p99ResponseTime": "99%", "requestsPerSec": "Requests/s",
    }  # fmt: skip
    for row in rows:
        for key, column in columns.items():
            ours = shown[(row["Type"], row["Name"])][key]
            assert ours == pytest.approx(float(row[column]), rel=1e-6), (
                f"{row['Name']} {column}: {ours} against Locust's {row[column]}"
            )
    totals = {"totalRequests": "Request Count", "totalFailures": "Failure Count", "p50ResponseMs": "50%",
        "p95ResponseMs": "95%",
              "p99ResponseMs": "99%", "avgResponseMs": "Average Response Time",
              "totalRps": "Requests/s"}  # fmt: skip
    for key, column in totals.items():
        assert metrics[key] == pytest.approx(float(total[column]), rel=1e-6), (
            f"Aggregated {column}: {metrics[key]} against {total[column]}"
        )


def test_run_is_measured_stopped_on_time_and_ends_with_locust_s_own_numbers(pair, target):
    lm, locust = pair(extra_args=REQUESTS_ARE_FINISHED)
    run = start_run(lm, targetUsers=20, spawnRate=20, durationSeconds=6)
    began = time.time()
    assert run["status"] == "Running"
    eventually(lambda: (lm.run(run["id"]).get("lastMetrics") or {}).get("currentUsers") == 20, 8)
    final = lm.wait_for(run["id"], "Finished")
    assert final["stopReason"] == "duration" and "warnings" not in final
    assert_equals_csv(final, locust)
    assert final["lastMetrics"]["totalRequests"] == sum(target.counts.values()), (
        "requests that reached the target are missing in the numbers"
    )
    took = loadmanager.time_of(final, "finishedAt") - began
    assert 5 < took < 6 + loadmanager.RUN_TIME_GRACE_S + 10, f"the run of 6 s took {took:.1f} s"
    points = lm.get(f"/v1/tests/{run['id']}/metrics").json["points"]
    assert {"poll", "push", "final"} <= {point["source"] for point in points}


def test_stop_by_user_leaves_no_users_and_complete_numbers(pair, target):
    lm, locust = pair(extra_args=REQUESTS_ARE_FINISHED)
    run = start_run(lm, targetUsers=20, spawnRate=20)
    eventually(lambda: locust.stats()["user_count"] == 20, 10)
    assert lm.post(f"/v1/tests/{run['id']}/stop").status == 200
    assert locust.get("/loadmanager/state")["userCount"] == 0, "users were left when the stop was answered"
    final = lm.wait_for(run["id"], "Finished")
    assert final["stopReason"] == "user"
    assert_equals_csv(final, locust)
    assert final["lastMetrics"]["totalRequests"] == sum(target.counts.values())


def test_locustfile_without_hooks_has_complete_numbers_too(pair, target):
    lm, locust = pair(PLAIN, hooks=False)
    run = start_run(lm, durationSeconds=4)
    final = lm.wait_for(run["id"], "Finished")
    assert [warning["code"] for warning in final["warnings"]] == ["hooks_absent"]
    assert_equals_csv(final, locust)
    # The next test at once: nothing of the first is mixed in.
    second = start_run(lm, durationSeconds=2)
    assert_equals_csv(lm.wait_for(second["id"], "Finished"), locust)


def test_standalone_locust_works_as_a_cluster_of_one(pair):
    lm, locust = pair(workers=0)
    run = start_run(lm, durationSeconds=3)
    assert_equals_csv(lm.wait_for(run["id"], "Finished"), locust)


def test_test_started_in_locust_s_page_is_tracked_and_can_be_stopped(pair):
    lm, locust = pair()
    first = start_run(lm, durationSeconds=2)
    lm.wait_for(first["id"], "Finished")
    locust.swarm(user_count=6, spawn_rate=6)
    (run,) = eventually(lambda: lm.get("/v1/tests?status=Running").json, 10, what="the test registers itself")
    assert run["source"] == "ui" and run["targetUsers"] == 6 and run["id"] != first["id"]
    assert lm.create().json["activeRunId"] == run["id"]
    eventually(lambda: lm.run(run["id"]).get("lastMetrics"), 10)
    assert lm.post(f"/v1/tests/{run['id']}/stop").status == 200
    assert_equals_csv(lm.wait_for(run["id"], "Finished"), locust)
    locust.swarm(user_count=3, spawn_rate=3)
    (again,) = eventually(lambda: lm.get("/v1/tests?status=Running").json, 10)
    eventually(
        lambda: (lm.run(again["id"]).get("lastMetrics") or {}).get("totalRequests"),
        10,
        what="a request: a test that ends without one has failed",
    )
    locust.post("/stop")
    assert lm.wait_for(again["id"], "Finished")["stopReason"] == "locust"


def test_killed_worker_is_a_warning_and_its_users_are_spread_again(pair):
    lm, locust = pair()
    run = start_run(lm, targetUsers=10, spawnRate=10)
    eventually(lambda: locust.stats()["user_count"] == 10, 10)
    eventually(lambda: lm.run(run["id"]).get("lastMetrics"), 10)
    locust.kill_worker(0)
    eventually(lambda: "workers_lost" in [w["code"] for w in lm.run(run["id"]).get("warnings", [])], 20)
    eventually(
        lambda: locust.stats()["user_count"] == 10, 15, what="all users run on the worker that is left"
    )
    assert lm.run(run["id"])["status"] == "Running"
    lm.post(f"/v1/tests/{run['id']}/stop")
    lm.wait_for(run["id"], "Finished")


def test_all_workers_killed_ends_the_run_with_the_reason(pair):
    lm, locust = pair()
    run = start_run(lm)
    eventually(lambda: lm.run(run["id"]).get("lastMetrics"), 10)
    locust.kill_worker(0)
    locust.kill_worker(1)
    final = eventually(
        lambda: (lambda r: r if r["status"] in ("Failed", "Finished") else None)(lm.run(run["id"])), 30
    )
    said = final.get("failureReason", "") + str(final.get("warnings", ""))
    assert "workers" in said and "lost" in said, final


def test_restarted_master_fails_the_run_and_the_next_one_works(pair):
    lm, locust = pair()
    run = start_run(lm)
    seen = eventually(lambda: (lm.run(run["id"]).get("lastMetrics") or {}).get("totalRequests"), 10)
    locust.kill_master()
    locust.restart_master()
    final = lm.wait_for(run["id"], "Failed", within_s=30)
    assert final["stopReason"] == "lost" and final["lastMetrics"]["totalRequests"] >= seen
    for worker in range(2):
        locust.kill_worker(worker)
        locust.add_worker(wait=False)
    again = eventually(
        lambda: (lambda a: a.json if a.status == 201 else None)(lm.create(durationSeconds=2)), 30
    )
    lm.wait_for(again["id"], "Finished")


def test_load_ends_on_time_although_load_manager_was_killed(pair):
    lm, locust = pair()
    run = start_run(lm, durationSeconds=4)
    began = time.monotonic()
    eventually(
        lambda: locust.get("/loadmanager/state")["userCount"], 5, every_s=0.05, what="the load has begun"
    )
    lm.kill9()
    eventually(lambda: locust.get("/loadmanager/state")["userCount"] == 0, 30, what="Locust stops by itself")
    took = time.monotonic() - began
    assert took > 3.5, f"the load of 4 s ended after {took:.1f} s"
    lm.restart()
    final = lm.wait_for(run["id"], "Finished")
    assert final["stopReason"] == "duration" and final["startedAt"] == run["startedAt"]
    assert_equals_csv(final, locust)


def test_killed_and_restarted_load_manager_adopts_the_run(pair):
    lm, locust = pair()
    run = start_run(lm, durationSeconds=8)
    began = time.monotonic()
    eventually(lambda: locust.stats()["user_count"] == 5, 10)
    lm.kill9()
    lm.restart()
    again = lm.run(run["id"])
    assert again["status"] == "Running" and again["startedAt"] == run["startedAt"]
    final = lm.wait_for(run["id"], "Finished")
    assert time.monotonic() - began > 7.5 and final["stopReason"] == "duration"
    assert_equals_csv(final, locust)


def test_load_without_duration_ends_when_its_lease_is_not_renewed(pair):
    lm, locust = pair(leaseSeconds=4)
    run = start_run(lm)
    eventually(lambda: locust.stats()["user_count"] == 5, 10)
    holds_for(
        lambda: (
            lm.run(run["id"])["status"] == "Running" and locust.get("/loadmanager/state")["userCount"] == 5
        ),
        6,
        what="a renewed lease goes on",
    )
    lm.kill9()
    eventually(lambda: locust.get("/loadmanager/state")["userCount"] == 0, 15, what="the lease ends the load")
    lm.restart()
    lm.wait_for(run["id"], "Finished")


def test_users_changed_in_locust_s_page_do_not_unlimit_the_test(pair):
    lm, locust = pair()
    run = start_run(lm, durationSeconds=12)
    eventually(lambda: (lm.run(run["id"]).get("lastMetrics") or {}).get("currentUsers") == 5, 10)
    locust.swarm(user_count=9, spawn_rate=9)  # as the page's Edit does: Locust forgets run_time with it
    lm.kill9()
    eventually(
        lambda: locust.get("/loadmanager/state")["userCount"] == 0, 25, what="the hooks' own timer ends it"
    )
    lm.restart()
    lm.wait_for(run["id"], "Finished")


def test_master_without_workers_is_502(pair):
    lm, locust = pair()
    for worker in range(2):
        locust.workers[worker].send_signal(signal.SIGTERM)
    # one that ended before it could say so stays in the list, as missing
    workers_left = "the master knows of no worker"
    eventually(
        lambda: {one["state"] for one in locust.get("/loadmanager/state")["workers"]} <= {"missing"},
        30,
        what=workers_left,
    )
    answer = lm.create()
    assert answer.status == 502 and "no worker" in answer.json["message"]


def test_test_without_a_host_fails_with_the_reason(pair):
    lm, locust = pair(host=False, startTimeoutSeconds=5)
    run = start_run(lm, durationSeconds=60)
    final = lm.wait_for(run["id"], "Failed", within_s=20)
    assert "host" in final["failureReason"]
    eventually(
        lambda: locust.get("/loadmanager/state")["state"] == "stopped", 10, what="Locust is not left running"
    )


def test_somebody_else_s_test_is_left_alone(pair):
    lm, locust = pair(PLAIN, hooks=False)
    locust.swarm(user_count=3, spawn_rate=3)
    eventually(lambda: locust.stats()["user_count"] == 3, 10)
    assert lm.create().status == 409
    assert locust.stats()["user_count"] == 3


def test_base_path_of_locust_s_page_is_kept(pair):
    lm, locust = pair(base_path="/lo")
    run = start_run(lm, durationSeconds=2)
    assert_equals_csv(lm.wait_for(run["id"], "Finished"), locust)


LOGIN = (
    PLAIN
    + """
from flask import redirect, request
from flask_login import UserMixin, login_user
from locust import events

class Person(UserMixin):
    def get_id(self):
        return "lm"

@events.init.add_listener
def login(environment, **kwargs):
    if not environment.web_ui:
        return
    environment.web_ui.app.config["SECRET_KEY"] = "for-this-test"
    environment.web_ui.login_manager.user_loader(lambda _: Person())
    environment.web_ui.auth_args = {"username_password_callback": "/sign_in_here"}

    @environment.web_ui.app.route("/sign_in_here", methods=["POST"])
    def sign_in():
        if (request.form["username"], request.form["password"]) == ("lm", "secret"):
            login_user(Person())
            return redirect("/")
        return redirect("/login")
"""
)


class LocustWithLogin(LocustCluster):
    def wait_ready(self, workers=None):
        eventually(lambda: self.request("GET", "/login"), 30)


def test_web_login_is_answered_with_the_cluster_s_name_and_password(pair):
    lm, locust = pair(
        LOGIN,
        hooks=False,
        workers=0,
        extra_args=["--web-login"],
        kind=LocustWithLogin,
        cluster={"username": "lm", "password": "secret"},
    )
    run = start_run(lm, durationSeconds=2)
    assert lm.wait_for(run["id"], "Finished")["lastMetrics"]["totalRequests"] > 0


def test_web_login_with_a_wrong_password_is_502_that_says_so(pair):
    lm, locust = pair(
        LOGIN,
        hooks=False,
        workers=0,
        extra_args=["--web-login"],
        kind=LocustWithLogin,
        cluster={"username": "lm", "password": "wrong"},
    )
    answer = lm.create()
    assert answer.status == 502 and "password" in answer.json["message"], answer


# ---- clusters that Load Manager launches -----------------------------------


@pytest.fixture
def launched(load_manager, target):
    launcher = {"type": "process", "locustfile": str(LOCUSTFILE), "workers": 2, "host": target.url}
    return load_manager(
        {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher}, orchestrator=RULES
    )


def descendants(pid):
    """Ids of all processes below one, from /proc."""
    import pathlib

    children: dict[int, list[int]] = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_launched_cluster_takes_a_run_at_once_and_is_gone_after_sigterm(launched, target):
    run = start_run(launched, durationSeconds=3)
    final = launched.wait_for(run["id"], "Finished")
    cut_off = sum(target.counts.values()) - final["lastMetrics"]["totalRequests"]
    assert 0 <= cut_off <= final["targetUsers"] and final["lastMetrics"]["totalRequests"], (
        "at most one request of each user was under way at the stop"
    )
    again = start_run(launched)
    eventually(lambda: (launched.run(again["id"]).get("lastMetrics") or {}).get("totalRequests"), 10)
    processes = descendants(launched.process.pid)
    assert len(processes) >= 4, "a guard, a master and two workers"
    status, _ = launched.terminate()
    assert status == 0
    eventually(lambda: not [pid for pid in processes if is_running(pid)], 10, what="no process is left")
    launched.restart()
    assert launched.run(again["id"])["stopReason"] == "shutdown"


def test_launched_cluster_leaves_no_orphan_after_kill_9_and_its_run_is_ended(launched):
    run = start_run(launched)
    processes = descendants(launched.process.pid)
    launched.kill9()
    eventually(lambda: not [pid for pid in processes if is_running(pid)], 8, what="no process is left")
    launched.restart()
    assert "launched" in launched.wait_for(run["id"], "Failed")["failureReason"]
    assert launched.create(durationSeconds=1).status == 201


def test_worker_of_a_launched_cluster_that_dies_is_started_again(launched):
    run = start_run(launched)
    (cluster,) = launched.get("/v1/clusters").json
    before = {worker["id"] for worker in cluster["workers"]}
    import os

    workers = [
        pid
        for pid in descendants(launched.process.pid)
        if b"--worker" in open(f"/proc/{pid}/cmdline", "rb").read()
    ]
    os.kill(workers[0], signal.SIGKILL)
    eventually(
        lambda: (
            {w["id"] for w in launched.get("/v1/clusters").json[0]["workers"] if w["state"] != "missing"}
            - before
        ),
        15,
        what="a new worker is there",
    )
    assert launched.run(run["id"])["status"] == "Running"


def test_launched_cluster_whose_locustfile_does_not_load_says_what_locust_said(load_manager, tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_here\n")
    launcher = {"locustfile": str(tmp_path / "broken.py"), "workers": 1}
    lm = load_manager(
        {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher}, orchestrator=RULES
    )
    answer = lm.create()
    assert (
        answer.status == 502
        and "nothing_here" in answer.json["message"]
        and "local-master.log" in answer.json["message"]
    ), answer
