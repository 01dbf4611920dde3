"""Who has a cluster, what becomes of interrupted starts and ends, and the edge around every thread of a
run."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import sys
import threading
import time

import fake_locust as faults
import pytest
from conftest import API_TOKEN, ROOT, LoadManager, base_config, cluster_config, create_body
from waiting import eventually, holds_for

import loadmanager


@pytest.fixture
def caching_locust(fake_locust):
    """Its statistics are up to 2 s old, as Locust's are, and it does not say how old."""

    def start(hooks):
        fake = fake_locust(hooks=hooks)
        fake.cache_s, fake.stamps = 2.0, False
        return fake

    return start


@pytest.fixture
def patched_load_manager(tmp_path):
    """Starts a Load Manager whose module was changed by some lines of Python first."""
    started = []

    def start(patch, *clusters, **sections):
        manager = LoadManager(tmp_path, base_config(*clusters, **sections))
        script = tmp_path / "patched.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport loadmanager as "
            f"lm\n{patch}\nsys.exit(lm.main())\n"
        )
        manager._command = [sys.executable, str(script)]
        started.append(manager)
        return manager.start()

    yield start
    for manager in started:
        manager.end()


RAISE_ONCE = """
def raise_once(holder, name):
    whole, left = getattr(holder, name), [1]
    def once(*given, **named):
        if left:
            left.pop()
            raise ZeroDivisionError("nobody foresaw this")
        return whole(*given, **named)
    setattr(holder, name, once)
"""


def slowly(seconds, answers_first=False):
    """The answer comes `seconds` late; answers_first: as things were when it was asked."""

    def fault(handler):
        path = handler.path.partition("?")[0]
        if path == "/loadmanager/state" and answers_first:
            document = handler.fake.hooks_state()
            handler.fake.released.wait(seconds)
            handler.send_json(document)
            return
        handler.fake.released.wait(seconds)
        handler.answer_well(path, handler.fake.calls[-1].form)

    return fault


def in_thread(work):
    thread = threading.Thread(target=lambda: _without_errors(work), daemon=True)
    thread.start()
    return thread


def _without_errors(work):
    try:
        work()
    except (OSError, AssertionError):
        pass


# ---- one run, one cluster ----------------------------------------------------


def test_queued_run_starts_on_one_cluster_when_two_become_free_at_once(load_manager, fake_locust):
    fakes = [fake_locust(), fake_locust()]
    lm = load_manager(*(cluster_config(fake.url, f"c{n}") for n, fake in enumerate(fakes)))
    running = [lm.create().json["id"] for _ in fakes]
    queued = lm.create(queue=True).json
    assert queued["status"] == "Pending" and queued["queuePosition"] == 1
    for fake in fakes:
        fake.faults["/loadmanager/state"] = slowly(0.5)  # is it idle? Both starts would ask
    for thread in [
        in_thread(lambda run_id=run_id: lm.post(f"/v1/tests/{run_id}/stop")) for run_id in running
    ]:
        thread.join(20)
    lm.wait_for(queued["id"], "Running")
    holds_for(lambda: sum(fake.users > 0 for fake in fakes) <= 1, 4, what="the run has one cluster")
    starts = [call for fake in fakes for call in fake.swarms if call.form["run_id"] == queued["id"]]
    assert len(starts) == 1, "the run was started on two clusters"
    assert lm.create().status == 201, "the second cluster is free"


def test_clean_up_of_a_lost_run_does_not_stop_the_next_run(lm, fake):
    lost = lm.create().json["id"]
    fake.faults["*"] = faults.close_silently
    lm.wait_for(lost, "Failed")
    fake.end_test()
    fake.faults.clear()
    fake.faults["/loadmanager/state"] = slowly(1.0, answers_first=True)  # the clean-up looks at this
    seen = len(fake.calls)
    eventually(lambda: len(fake.calls) > seen, 10, every_s=0.01)
    fake.faults.clear()
    run = eventually(lambda: (answer := lm.create()).status == 201 and answer.json, 15)
    holds_for(lambda: fake.users == 5 and lm.run(run["id"])["status"] == "Running", 5)


@pytest.mark.parametrize("hooks", [True, False])
def test_start_that_a_kill_interrupted_leaves_no_load(load_manager, fake_locust, hooks):
    """The start was on its way when Load Manager was killed, and Locust carries it out later."""
    fake = fake_locust(hooks=hooks)
    lm = load_manager(cluster_config(fake.url))

    is_carried_out = threading.Event()

    def carried_out_late(handler):
        form = dict(handler.fake.calls[-1].form)
        handler.fake.released.wait(3)
        handler.fake.swarm(form)
        is_carried_out.set()

    fake.faults["/swarm"] = carried_out_late
    in_thread(lm.create)
    eventually(lambda: fake.swarms, 10, every_s=0.01)
    lm.kill9()
    fake.faults.clear()
    lm.restart()
    assert is_carried_out.wait(10), "the start is not carried out"
    eventually(lambda: fake.users == 0, 15, what="its load is stopped")
    (run,) = lm.get("/v1/tests").json
    assert run["status"] == "Failed" and "before the start was confirmed" in run["failureReason"]
    holds_for(lambda: fake.users == 0, 1)
    eventually(lambda: lm.create().status == 201, 20, what="the cluster is usable again")


def test_load_of_a_lost_run_that_was_deleted_is_stopped_after_a_restart_too(lm, fake):
    lost = lm.create().json["id"]
    fake.faults["*"] = faults.close_silently
    lm.wait_for(lost, "Failed")
    assert lm.request("DELETE", f"/v1/tests/{lost}").status == 204
    lm.kill9()
    lm.restart()
    assert fake.users == 5
    fake.faults.clear()
    eventually(lambda: fake.users == 0, 10, what="the load of the deleted run is stopped")


# ---- stops and ends ------------------------------------------------------------


def test_stop_answers_when_the_run_is_final_and_the_next_create_takes_the_cluster(lm, fake):
    run_id = lm.create().json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    fake.faults["/stats/requests/csv"] = slowly(1.0)
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    run = lm.run(run_id)
    assert run["status"] == "Finished" and run["lastMetrics"]["currentUsers"] == 5, run
    assert lm.create().status == 201


def test_create_waits_for_a_cluster_whose_run_is_just_ending(lm, fake):
    ending = lm.create(durationSeconds=1).json["id"]
    fake.faults["/stop"] = slowly(2.0)
    lm.wait_for(ending, "Stopping")
    answer = lm.create()
    assert answer.status == 201, answer
    assert lm.run(ending)["status"] == "Finished" and len(fake.swarms) == 2


def test_create_does_not_wait_for_a_cluster_whose_run_goes_on(lm, fake):
    running = lm.create().json["id"]
    answer = lm.post("/v1/tests", create_body(), timeout_s=loadmanager.IDLE_WAIT_S - 2)
    assert answer.status == 409 and answer.json["activeRunId"] == running


def test_pause_of_the_process_is_no_silence_of_the_cluster(lm, fake):
    run_id = lm.create().json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    lm.process.send_signal(signal.SIGSTOP)
    time.sleep(4.5)  # longer than lostAfterSeconds; a stopped process has no condition to wait for
    failing = faults.fail_times(2, faults.close_silently)
    fake.faults["*"] = failing
    seen = len(fake.calls)
    lm.process.send_signal(signal.SIGCONT)
    eventually(lambda: len(fake.calls) >= seen + 4, 10, what="the cluster is asked again")
    assert lm.run(run_id)["status"] == "Running", lm.run(run_id).get("failureReason")


def test_users_are_changed_in_the_first_second_of_a_run_without_hooks(load_manager, caching_locust):
    fake = caching_locust(hooks=False)
    lm = load_manager(cluster_config(fake.url))
    run_id = lm.create().json["id"]
    answer = lm.post(f"/v1/tests/{run_id}/users", {"targetUsers": 9})
    assert answer.status == 200, answer
    assert fake.users == 9 and answer.json["usersChanges"][0]["targetUsers"] == 9


def test_change_of_users_that_locust_carries_out_after_the_stop_leaves_no_load(lm, fake):
    run_id = lm.create(durationSeconds=14).json["id"]

    is_carried_out = threading.Event()

    def carried_out_late(handler):
        handler.fake.released.wait(15)
        handler.fake.swarm(handler.form)
        is_carried_out.set()

    fake.faults["/swarm"] = carried_out_late
    assert lm.post(f"/v1/tests/{run_id}/users", {"targetUsers": 9}).status == 504
    lm.wait_for(run_id, "Finished", within_s=30)
    fake.faults.clear()
    assert is_carried_out.wait(30)
    eventually(lambda: fake.users == 0, 10, what="its load is stopped")


@pytest.mark.parametrize("hooks", [True, False])
def test_run_of_some_seconds_has_points_and_its_users(load_manager, fake_locust, hooks):
    fake = fake_locust(hooks=hooks)
    lm = load_manager(cluster_config(fake.url), orchestrator={"metricsPollIntervalSeconds": 10})
    run_id = lm.create(durationSeconds=5).json["id"]
    run = lm.wait_for(run_id, "Finished")
    points = lm.get(f"/v1/tests/{run_id}/metrics").json["points"]
    assert len([point for point in points if point["currentUsers"] == 5]) >= 2, points
    assert run["lastMetrics"]["currentUsers"] == 5


def test_numbers_of_the_test_before_in_locust_s_cache_are_not_those_of_a_run(load_manager, caching_locust):
    fake = caching_locust(hooks=True)
    lm = load_manager(cluster_config(fake.url))
    before = lm.create().json["id"]
    eventually(lambda: (lm.run(before).get("lastMetrics") or {}).get("totalRequests", 0) >= 30, 20)
    fake.cached_stats()  # a page that is open in a browser asks, too
    assert lm.post(f"/v1/tests/{before}/stop").status == 200
    run = lm.wait_for(lm.create(durationSeconds=5).json["id"], "Finished")
    assert run["trust"] == "ok", run["trustReasons"]


def test_run_without_duration_and_hooks_is_measured_through_locust_s_cache(load_manager, caching_locust):
    lm = load_manager(cluster_config(caching_locust(hooks=False).url))
    run_id = lm.create().json["id"]
    eventually(lambda: (lm.run(run_id).get("lastMetrics") or {}).get("totalRequests", 0) >= 30, 15)


def test_end_long_before_the_deadline_is_named(lm, fake):
    run_id = lm.create(durationSeconds=60).json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    fake.end_test()
    run = lm.wait_for(run_id, "Finished")
    assert run["stopReason"] == "locust" and run["trust"] == "doubtful"
    assert any("before its duration was over" in reason for reason in run["trustReasons"]), run


def test_what_is_kept_about_a_run_is_waited_for(lm, fake):
    run_id = lm.create().json["id"]

    def report_that_takes_a_while(handler):
        handler.fake.released.wait(1.0)
        handler.send_text(200, "<html>Locust's own</html>", "text/html")

    fake.faults["/stats/report"] = report_that_takes_a_while
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    report = lm.get(f"/v1/tests/{run_id}/locust-report.html")
    assert report.status == 200 and b"Locust's own" in report.body


# ---- no thread to be had -------------------------------------------------------

NO_THREADS = """
import os, threading
start = threading.Thread.start
def refused(self):
    if os.path.exists("no-threads"):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = refused
"""


def test_runs_are_stopped_on_time_when_no_thread_can_be_had(patched_load_manager, fake):
    lm = patched_load_manager(NO_THREADS, cluster_config(fake.url))
    run_id = lm.create(durationSeconds=2).json["id"]
    (lm.folder / "no-threads").touch()
    eventually(lambda: fake.users == 0, 5, what="the load is stopped at its deadline")
    run = lm.wait_for(run_id, "Finished", within_s=5)
    assert run["stopReason"] == "duration"
    (lm.folder / "no-threads").unlink()
    eventually(lambda: lm.create().status == 201, 5, what="the cluster is free")


def test_nothing_is_started_when_no_thread_can_be_had(patched_load_manager, fake_locust):
    fakes = [fake_locust(), fake_locust()]
    clusters = [cluster_config(fake.url, f"c{n}") for n, fake in enumerate(fakes)]
    lm = patched_load_manager(NO_THREADS, *clusters)
    running = lm.create(durationSeconds=3).json["id"]
    lm.create()
    queued = lm.create(queue=True).json["id"]
    (lm.folder / "no-threads").touch()
    refused = lm.create(tenantId="acme")
    assert refused.status in (409, 503), refused
    lm.wait_for(running, "Finished")
    holds_for(lambda: lm.run(queued)["status"] == "Pending", 1, what="it waits for a thread")
    (lm.folder / "no-threads").unlink()
    lm.wait_for(queued, "Running")


# ---- the edge around every thread of a run ---------------------------------------

FAIL_TO_SAVE_THE_END = """
save, left = lm.DatabaseWriter.save, [1]

def save_but_once(self, state):
    if left and state.run.is_final:
        left.pop()
        raise RuntimeError("nobody foresaw this")
    return save(self, state)

lm.DatabaseWriter.save = save_but_once
"""


@pytest.mark.parametrize(
    "patch",
    [
        "raise_once(lm.RunMonitor, '_look')",
        "raise_once(lm.RunMonitor, '_record_reading')",
        "lm.RunLoad._is_all_well = lambda *_: False\nraise_once(lm.RunLoad, '_mind_users')",
        "raise_once(lm.RunMonitor, '_ask')",
        "raise_once(lm.RunMonitor, '_polled')",
        "raise_once(lm.PollLoop, '_receive')",
        "raise_once(lm.LoadStopper, 'stop_load')",
        "raise_once(lm.RunStopper, '_final_numbers')",
        "raise_once(lm.RunStopper, '_conclude')",
        FAIL_TO_SAVE_THE_END,
    ],
)
def test_unforeseen_error_in_a_thread_of_a_run_fails_it_stops_its_load_and_frees_the_cluster(
    patched_load_manager, fake, patch
):
    lm = patched_load_manager(f"{RAISE_ONCE}\n{patch}", cluster_config(fake.url))
    run_id = lm.create(durationSeconds=3).json["id"]
    run = lm.wait_for(run_id, "Failed")
    assert "inside Load Manager" in run["failureReason"] and "nobody foresaw" in run["failureReason"]
    eventually(lambda: fake.users == 0, 20, what="its load is stopped")
    assert lm.log().count("unforeseen error") == 1 and "Traceback" in lm.log()
    again = eventually(lambda: (answer := lm.create(durationSeconds=1)).status == 201 and answer.json, 20)
    lm.wait_for(again["id"], "Finished")


@pytest.mark.parametrize("name", ["read_failures", "read_exceptions", "read_report"])
def test_unforeseen_error_in_what_is_kept_about_a_run_does_not_keep_it_from_ending(
    patched_load_manager, fake, name
):
    lm = patched_load_manager(
        f"{RAISE_ONCE}\nraise_once(lm.LocustClient, {name!r})", cluster_config(fake.url)
    )
    run_id = lm.create().json["id"]
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    assert lm.run(run_id)["status"] == "Finished"
    eventually(lambda: "unforeseen error" in lm.log(), 5)
    assert lm.create().status == 201 and lm.get(f"/v1/tests/{run_id}/failures").status == 200


def test_unforeseen_error_in_a_verdict_does_not_keep_a_run_from_ending(patched_load_manager, fake):
    lm = patched_load_manager(f"{RAISE_ONCE}\nraise_once(lm, 'judge_threshold')", cluster_config(fake.url))
    run_id = lm.create(thresholds=["errorRate < 50"]).json["id"]
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    run = lm.run(run_id)
    assert run["status"] == "Finished" and run["verdict"] == "failed", run


def test_unforeseen_error_in_a_start_fails_the_run_and_frees_the_cluster(patched_load_manager, fake):
    lm = patched_load_manager(f"{RAISE_ONCE}\nraise_once(lm, 'swarm_form')", cluster_config(fake.url))
    body = json.dumps(create_body()).encode()
    head = (
        f"POST /v1/tests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_TOKEN}\r\nContent-Type: "
        "application/json"
    )
    answer = lm.raw(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert b" 500 " in answer and b"its log has the details" in answer  # no answer that the document has
    (run,) = lm.get("/v1/tests").json
    assert run["status"] == "Failed" and "inside Load Manager" in run["failureReason"]
    eventually(lambda: lm.create().status == 201, 20)


def test_unforeseen_error_in_the_timer_or_a_clean_up_is_tried_again(patched_load_manager, fake):
    patch = "raise_once(lm.LoadStopper, 'clean_up')\nraise_once(lm.RunStopper, 'begin_stop')"
    lm = patched_load_manager(f"{RAISE_ONCE}\n{patch}", cluster_config(fake.url))
    lost = lm.create().json["id"]
    fake.faults["*"] = faults.close_silently
    lm.wait_for(lost, "Failed")
    fake.faults.clear()
    eventually(lambda: fake.users == 0, 15, what="the load of the lost run is stopped")
    run_id = eventually(
        lambda: (answer := lm.create(durationSeconds=1)).status == 201 and answer.json["id"], 15
    )
    run = lm.wait_for(run_id, "Failed", within_s=15)  # its deadline met the error
    assert "inside Load Manager" in run["failureReason"]
    eventually(lambda: fake.users == 0, 10, what="its load is stopped all the same")


def test_unforeseen_error_while_free_clusters_are_given_out_leaves_none_reserved(
    patched_load_manager, fake_locust
):
    """The second of two waiting runs meets it, when the first has been given a cluster."""
    second_time = """
original, asked = lm.ClusterPool._may_use, []
def may_use(self, run_id, cluster):
    waiting = self._queue[1:2]
    if waiting == [run_id] and self._has_one(self._queue[0]) and not asked:
        asked.append(run_id)
        raise RuntimeError("nobody foresaw this")
    return original(self, run_id, cluster)
lm.ClusterPool._may_use = may_use
"""
    fakes = [fake_locust(), fake_locust()]
    lm = patched_load_manager(second_time, *(cluster_config(one.url, f"c{i}") for i, one in enumerate(fakes)))
    running = [lm.create().json["id"] for _ in fakes]
    waiting = [lm.create(queue=True, durationSeconds=1).json["id"] for _ in fakes]
    for run_id in running:
        lm.post(f"/v1/tests/{run_id}/stop")
    for run_id in waiting:
        lm.wait_for(run_id, "Finished")


def test_unforeseen_error_behind_a_handler_is_answered(patched_load_manager, fake):
    lm = patched_load_manager(f"{RAISE_ONCE}\nraise_once(lm.AuditLog, 'add')", cluster_config(fake.url))
    body = json.dumps(create_body()).encode()
    head = (
        f"POST /v1/tests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_TOKEN}\r\nContent-Type: "
        "application/json"
    )
    answer = lm.raw(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert b" 500 " in answer and b"its log has the details" in answer
    assert "Exception in thread" not in lm.log() and "unforeseen error" in lm.log()


@pytest.mark.parametrize("fault", [faults.answer_500, faults.close_silently, faults.answer_garbage])
def test_run_ends_although_its_master_cannot_be_asked_for_users_any_more(load_manager, fake_locust, fault):
    """A master without hooks takes each stop, and its statistics fail for good."""
    fake = fake_locust(hooks=False)
    lm = load_manager(cluster_config(fake.url))
    run_id = lm.create(durationSeconds=2).json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    fake.faults["/stats/requests"] = fault
    run = lm.wait_for(run_id, "Finished", within_s=60)
    assert "stop_unconfirmed" in [warning["code"] for warning in run["warnings"]] and fake.users == 0


STOP = b"POST /v1/tests/%s/stop HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n"


@pytest.mark.parametrize("is_being_stopped", [True, False])
def test_a_users_own_test_that_began_while_load_manager_was_away_is_not_stopped_for_the_run_before(
    lm, fake, is_being_stopped
):
    run_id = lm.create(durationSeconds=60 if is_being_stopped else 3).json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    if is_being_stopped:
        fake.faults["/stop"] = faults.hang
        threading.Thread(
            target=lambda: lm.raw(STOP % (run_id.encode(), API_TOKEN.encode())), daemon=True
        ).start()
        eventually(lambda: fake.stops, 10)
        with contextlib.closing(sqlite3.connect(lm.folder / "runs.db")) as database:
            kept = lambda: database.execute("SELECT record FROM runs").fetchone()[0]  # noqa: E731
            eventually(lambda: "Stopping" in kept(), 10, what="that it is being stopped is on disk")
    lm.kill9()
    fake.faults.clear()
    fake.end_test()  # by itself, at its time
    fake.swarm({"user_count": "7"})
    stops = len(fake.stops)
    time.sleep(3)  # the deadline of the other case passes
    lm.restart()
    run = lm.wait_for(run_id, "Finished")
    assert run["stopReason"] == ("user" if is_being_stopped else "duration")
    holds_for(lambda: fake.users == 7 and len(fake.stops) == stops, 2, what="the user's test is let alone")


@pytest.mark.parametrize("patch", ["raise_once(lm.Timer, '_due')", "raise_once(lm.Scheduler, '_wait')"])
def test_unforeseen_error_in_a_thread_that_waits_for_times_does_not_end_it(patched_load_manager, fake, patch):
    lm = patched_load_manager(f"{RAISE_ONCE}\n{patch}", cluster_config(fake.url))
    soon = {"runAt": loadmanager.utc_text(time.time() + 2), "test": create_body(durationSeconds=1)}
    assert lm.post("/v1/schedules", soon).status == 201
    (run,) = eventually(lambda: lm.get("/v1/tests").json, 20, what="the schedule starts its run")
    assert lm.wait_for(run["id"], "Finished")["stopReason"] == "duration"
    assert "nobody foresaw" in lm.log() and "Exception in thread" not in lm.log()


def test_final_numbers_are_not_those_of_a_test_that_began_before_they_were_read(load_manager, fake_locust):
    """A user starts a test in Locust's own page just as the final numbers of a run are read."""
    fake = fake_locust(hooks=True)
    lm = load_manager(cluster_config(fake.url))
    run_id = lm.create().json["id"]
    eventually(
        lambda: (lm.run(run_id).get("lastMetrics") or {}).get("totalRequests"), what="numbers of the run"
    )

    def begin_another(path, when):
        if path == "/stats/requests/csv" and fake.state != "running":
            fake.swarm({"user_count": "3"})
            fake.requests = 1_000_000

    fake.reached = begin_another
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    run = lm.wait_for(run_id, "Finished")
    assert 0 < run["lastMetrics"]["totalRequests"] < 1_000_000, "they are of the other test"
    warnings = {warning["code"]: warning["message"] for warning in run["warnings"]}
    assert "another test has begun" in warnings["final_numbers_missing"], warnings
