"""Faults of Locust, of the process and of the machine: nothing hangs, answers 500, loses a run or leaves a
load."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import fake_locust as faults
import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, base_config, cluster_config, create_body
from waiting import eventually, holds_for

import loadmanager


def failed_create(lm, status, words):
    """The create is refused with this status and words, and its run is kept as Failed."""
    answer = lm.post("/v1/tests", create_body(), timeout_s=30)  # a hanging master holds its answer for 60 s
    assert answer.status == status, answer
    run = lm.run(answer.json["runId"])
    assert run["status"] == "Failed" and words in run["failureReason"], run
    return run


# ---- Locust at the start ---------------------------------------------------


def test_master_that_is_down_is_502_at_once_and_the_cluster_stays_free(load_manager):
    lm = load_manager(cluster_config("http://127.0.0.1:1"))
    answer = lm.post("/v1/tests", create_body(), timeout_s=loadmanager.IDLE_WAIT_S - 2)
    assert answer.status == 502, "it waited for a master that is not there"
    failed_create(lm, 502, "refused the connection")


def test_hanging_swarm_is_504_and_its_load_is_stopped_until_confirmed(lm, fake):
    def take_and_hang(handler):
        handler.fake.swarm(handler.fake.calls[-1].form)
        faults.hang(handler)

    fake.faults["/swarm"] = take_and_hang
    failed_create(lm, 504, "did not answer within")
    fake.faults.clear()
    eventually(lambda: fake.users == 0 and fake.stops, 10, what="the load that was taken is stopped")


@pytest.mark.parametrize("fault,words", [
    (faults.answer_500, "HTTP 500"), (faults.close_silently, "without an answer"),
    (faults.answer_garbage, "not JSON"),
    (faults.answer_list, "not an object"), (faults.answer_login_page, "authentication"),
    (faults.refuse, "must be a number"),
])  # fmt: skip
def test_swarm_that_fails_is_502_with_the_reason(lm, fake, fault, words):
    fake.faults["/swarm"] = fault
    failed_create(lm, 502, words)
    fake.faults.clear()
    eventually(lambda: lm.create().status == 201, 15, what="the cluster is usable again")


def test_dripping_master_is_504_in_bounded_time(lm, fake):
    fake.faults["*"] = faults.drip
    failed_create(lm, 504, "did not answer within")


def test_huge_answer_is_not_read(lm, fake):
    run_id = lm.create().json["id"]
    fake.faults["/stats/requests"] = faults.answer_huge
    seen = len(fake.calls)
    eventually(lambda: sum(call.path == "/stats/requests" for call in fake.calls[seen:]) >= 2, 20)
    resident = next(line for line in open(f"/proc/{lm.process.pid}/status") if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 150_000, f"memory grew: {resident}"
    fake.faults.clear()
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)


def test_redirect_is_not_followed_and_no_token_leaves(load_manager, fake):
    seen = []

    class Collector(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, args=(0.05,), daemon=True).start()
    try:
        fake.faults["*"] = faults.redirect_to(f"http://127.0.0.1:{collector.server_port}/x")
        lm = load_manager(cluster_config(fake.url, authToken="secret"))
        failed_create(lm, 502, "redirects are not followed")
        assert not seen, f"the redirect was followed: {seen}"
    finally:
        collector.shutdown()
        collector.server_close()


def test_success_without_a_start_fails_the_run(load_manager, fake_locust):
    lm = load_manager(cluster_config(fake_locust(hooks=False, starts=False).url))
    run = lm.wait_for(lm.create().json["id"], "Failed", within_s=15)
    assert "no user was started within 3 s" in run["failureReason"]


def test_master_without_workers_is_502(load_manager, fake_locust):
    lm = load_manager(cluster_config(fake_locust(workers=0).url))
    failed_create(lm, 502, "no worker")


def test_test_that_somebody_else_runs_is_409_and_untouched(lm, fake):
    fake.swarm({"user_count": "7"})
    answer = lm.create()
    assert answer.status == 409 and "did not start" in answer.json["message"]
    assert fake.users == 7 and not fake.stops and lm.get("/v1/tests").json == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_stop_works_whichever_method_locust_takes(load_manager, fake_locust, method):
    fake = fake_locust(stop_method=method)
    lm = load_manager(cluster_config(fake.url))
    for _ in range(2):
        run_id = lm.create().json["id"]
        assert lm.post(f"/v1/tests/{run_id}/stop").status == 200 and fake.users == 0
        lm.wait_for(run_id, "Finished")


def test_https_to_a_plain_http_port_is_502_that_says_so(load_manager, fake):
    lm = load_manager(cluster_config(fake.url.replace("http:", "https:")))
    failed_create(lm, 502, "plain HTTP")


def test_unknown_host_name_is_502_in_bounded_time(load_manager):
    failed_create(
        load_manager(cluster_config("http://no-such-host.invalid:8089")), 502, "no-such-host.invalid"
    )


# ---- Locust while the test runs --------------------------------------------


def test_numbers_that_are_none_become_null_and_answers_stay_strict_json(lm, fake):
    fake.stats_changes = faults.NOT_FINITE
    fake.top_changes = {"current_rps": float("inf"), "user_count": 5}
    run_id = lm.create().json["id"]

    def null_metrics():
        raw = lm.get(f"/v1/tests/{run_id}").body.decode()
        assert "NaN" not in raw and "Infinity" not in raw
        return json.loads(raw).get("lastMetrics")

    fake.stats_changes = {**faults.NOT_FINITE, "num_requests": 10}
    metrics = eventually(null_metrics, 10)
    assert (
        metrics["totalRps"] is None
        and metrics["avgResponseMs"] is None
        and metrics["p95ResponseMs"] is None
        and metrics["p50ResponseMs"] is None
    )


def test_missing_percentiles_are_null_and_never_derived(lm, fake):
    row = fake._row("", "Aggregated", 10)
    fake._row = lambda method, name, requests: (
        {k: v for k, v in row.items() if "percentile" not in k} | {"method": method, "name": name}
    )
    run_id = lm.create().json["id"]
    metrics = eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    assert (
        metrics["p50ResponseMs"] == 33
        and metrics["p95ResponseMs"] is None
        and metrics["p99ResponseMs"] is None
    )


def test_600_endpoints_with_hostile_names_stay_whole(lm, fake):
    names = [f"/<script>{number}</script>" for number in range(596)] + [
        "=cmd()",
        "a\r\nb",
        "🦗",
        '"quoted",x',
    ]
    fake.endpoints = [("GET", name) for name in names]
    run_id = lm.create().json["id"]
    shown = eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)["requestStats"]
    assert len(shown) == 500 and "GET_/<script>7</script>" in shown
    eventually(lambda: "endpoints_cut" in [w["code"] for w in lm.run(run_id).get("warnings", [])], 10)


def test_reset_of_the_statistics_is_a_warning_and_the_run_goes_on(lm, fake):
    run_id = lm.create().json["id"]
    eventually(lambda: (lm.run(run_id).get("lastMetrics") or {}).get("totalRequests", 0) > 20, 10)
    fake.requests = 0
    eventually(lambda: "stats_reset" in [w["code"] for w in lm.run(run_id).get("warnings", [])], 10)
    assert lm.run(run_id)["status"] == "Running"


def test_restarted_master_fails_the_run_and_keeps_its_numbers(lm, fake):
    run_id = lm.create().json["id"]
    seen = eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)["totalRequests"]
    fake.restart()
    run = lm.wait_for(run_id, "Failed")
    assert "restarted" in run["failureReason"] and run["lastMetrics"]["totalRequests"] >= seen


def test_test_that_locust_ends_is_finished_with_its_final_numbers(lm, fake):
    run_id = lm.create().json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    fake.end_test()
    run = lm.wait_for(run_id, "Finished")
    assert run["stopReason"] == "locust" and run["lastMetrics"]["totalRequests"] == fake.requests


def test_silent_cluster_loses_the_run_and_its_load_is_stopped_when_it_is_back(lm, fake):
    run_id = lm.create().json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    fake.faults["*"] = faults.close_silently
    run = lm.wait_for(run_id, "Failed", within_s=20)
    assert run["stopReason"] == "lost" and "unreachable" in run["failureReason"]
    assert fake.users == 5
    fake.faults.clear()
    eventually(lambda: fake.users == 0, 8, what="the lost run's load is stopped once its cluster is back")
    eventually(lambda: lm.create().status == 201, 10)


def test_stop_that_fails_is_tried_until_it_succeeds(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), orchestrator={"lostAfterSeconds": 60})
    run_id = lm.create().json["id"]
    fake.faults["/stop"] = faults.fail_times(3)
    answer = lm.post(f"/v1/tests/{run_id}/stop")
    assert answer.status in (200, 502), answer
    again = lm.post(f"/v1/tests/{run_id}/stop")
    assert again.status == 409
    run = lm.wait_for(run_id, "Finished", within_s=15)
    assert run["stopReason"] == "user" and fake.users == 0 and len(fake.stops) == 4


def test_load_that_goes_on_after_a_stop_is_caught_by_a_new_swarm(lm, fake):
    run_id = lm.create().json["id"]
    fake.stops_are_ignored = 1
    lm.post(f"/v1/tests/{run_id}/stop")
    lm.wait_for(run_id, "Finished", within_s=25)
    assert fake.users == 0 and fake.swarms[-1].form["user_count"] == "1"


def test_load_that_cannot_be_stopped_fails_the_run_loudly(load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    run_id = lm.create().json["id"]
    fake.stops_are_ignored = 1000
    threading.Thread(target=lambda: lm.post(f"/v1/tests/{run_id}/stop", timeout_s=60), daemon=True).start()
    run = lm.wait_for(run_id, "Failed", within_s=50)
    assert "cannot be stopped" in run["failureReason"]
    fake.stops_are_ignored = 0
    eventually(lambda: fake.users == 0, 20, what="it is stopped as soon as that works")


def test_run_stops_on_time_while_statistics_hang(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), orchestrator={"lostAfterSeconds": 60})
    began = time.monotonic()
    run_id = lm.create(durationSeconds=3).json["id"]
    fake.faults["/stats/requests"] = faults.hang
    eventually(lambda: fake.stops, 8)
    assert 2.9 < fake.stops[0].at - began < 4.0, f"stopped after {fake.stops[0].at - began:.2f} s of 3"
    fake.faults.clear()
    lm.wait_for(run_id, "Finished", within_s=20)


def test_master_away_at_the_deadline_is_stopped_when_it_is_back(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), orchestrator={"lostAfterSeconds": 3})
    run_id = lm.create(durationSeconds=1).json["id"]
    fake.faults["*"] = faults.close_silently
    run = lm.wait_for(run_id, "Failed", within_s=20)
    assert "lost" in run["failureReason"]
    fake.faults.clear()
    eventually(lambda: fake.users == 0, 8)


# ---- the process -----------------------------------------------------------


def test_killed_while_running_the_run_is_adopted_and_stopped_at_its_deadline(lm, fake):
    run = lm.create(durationSeconds=6).json
    began = time.monotonic()
    lm.kill9()
    lm.restart()
    back_s = time.monotonic() - began
    again = lm.run(run["id"])
    assert again["startedAt"] == run["startedAt"] and len(fake.swarms) == 1
    assert again["status"] == "Running" or back_s > 5
    lm.wait_for(run["id"], "Finished")
    assert 5.5 < fake.stops[0].at - began < max(8.0, back_s + 3), "its time began again"


def test_deadline_that_passed_while_down_is_stopped_at_the_start(lm, fake):
    run_id = lm.create(durationSeconds=1).json["id"]
    lm.kill9()
    time.sleep(1.2)  # the deadline passes: there is nobody to ask
    lm.restart()
    assert fake.users == 0, "the overdue load ran on when Load Manager was up"
    assert lm.wait_for(run_id, "Finished")["stopReason"] == "duration"


def test_killed_in_the_swarm_the_run_ends_or_is_adopted_and_no_load_is_left_without_a_run(lm, fake):
    def take_and_hang(handler):
        handler.fake.swarm(handler.fake.calls[-1].form)
        faults.hang(handler)

    fake.faults["/swarm"] = take_and_hang
    threading.Thread(target=lambda: _ignore_errors(lm.create), daemon=True).start()
    eventually(lambda: fake.users == 5, 10)
    lm.kill9()
    fake.faults.clear()
    lm.restart()
    (run,) = eventually(lambda: [r for r in lm.get("/v1/tests").json if r["status"] != "Pending"], 10)
    assert run["status"] == "Running" and fake.run_id == run["id"], "the hooks name the run: it is adopted"


def test_killed_before_the_swarm_the_run_is_failed_and_the_cluster_free(lm, fake):
    fake.faults["/swarm"] = faults.hang
    threading.Thread(target=lambda: _ignore_errors(lm.create), daemon=True).start()
    eventually(lambda: fake.swarms, 10)
    lm.kill9()
    fake.faults.clear()
    lm.restart()
    (run,) = eventually(lambda: [r for r in lm.get("/v1/tests").json if r["status"] != "Pending"], 10)
    assert run["status"] == "Failed" and "before the start was confirmed" in run["failureReason"]
    eventually(lambda: lm.create().status == 201, 10)


def _ignore_errors(work):
    try:
        work()
    except OSError:
        pass


def test_killed_during_a_stop_the_run_still_ends_finished(lm, fake):
    run_id = lm.create().json["id"]
    fake.faults["/stop"] = faults.hang
    threading.Thread(
        target=lambda: _ignore_errors(lambda: lm.post(f"/v1/tests/{run_id}/stop")), daemon=True
    ).start()
    eventually(lambda: fake.stops, 10)
    eventually(lambda: lm.run(run_id)["status"] == "Stopping", 5)
    database = sqlite3.connect(lm.folder / "runs.db")
    eventually(lambda: "Stopping" in database.execute("SELECT record FROM runs").fetchone()[0], 10)
    database.close()
    lm.kill9()
    fake.faults.clear()
    lm.restart()
    assert lm.wait_for(run_id, "Finished")["stopReason"] == "user" and fake.users == 0


def test_cluster_gone_from_the_configuration_fails_its_run(lm, fake):
    run_id = lm.create().json["id"]
    lm.kill9()
    lm.config["locustClusters"] = []
    lm.restart()
    run = lm.wait_for(run_id, "Failed")
    assert "gone from the configuration" in run["failureReason"] and "by hand" in run["failureReason"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_cleanly_and_leaves_loads_running(lm, fake, number):
    run_id = lm.create().json["id"]
    idle = lm.connect()
    status, _ = lm.terminate(number)
    idle.close()
    assert status == 0 and fake.users == 5
    assert "Traceback" not in lm.log()
    lm.restart()
    assert lm.run(run_id)["status"] == "Running"


def test_on_shutdown_stop_ends_the_loads(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), orchestrator={"onShutdown": "stop"})
    run_id = lm.create().json["id"]
    status, _ = lm.terminate()
    assert status == 0 and fake.users == 0
    lm.restart()
    assert lm.run(run_id)["stopReason"] == "shutdown"


def test_create_in_hand_at_sigterm_is_answered_whole(lm, fake):
    def slowly(handler):
        handler.fake.released.wait(1.0)
        handler.answer_well("/swarm", handler.fake.calls[-1].form)

    fake.faults["/swarm"] = slowly
    answers = []
    thread = threading.Thread(target=lambda: answers.append(lm.create()))
    thread.start()
    eventually(lambda: fake.swarms, 10)
    status, _ = lm.terminate()
    thread.join(10)
    assert status == 0 and answers[0].status in (201, 503), answers


def test_port_in_use_is_one_line_and_exit_1(lm, tmp_path):
    config = base_config(server={"port": int(lm.url.rsplit(":", 1)[1])})
    done = run_program(tmp_path, config)
    assert (
        done.returncode == 1 and "cannot listen on 127.0.0.1" in done.stderr and done.stderr.count("\n") == 1
    )
    assert lm.get("/health").status == 200


def test_second_load_manager_on_the_same_database_is_refused(lm, tmp_path):
    config = base_config(storage={"url": f"sqlite:///{lm.folder}/runs.db"})
    done = run_program(tmp_path, config)
    assert done.returncode == 1 and f"process {lm.process.pid}" in done.stderr
    assert lm.create().status == 201, "the first one was harmed"


def test_full_disk_refuses_creates_lets_stops_work_and_recovers(load_manager, fake, tmp_path):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))

    lm = load_manager(cluster_config(fake.url), preexec=small_files)
    run_id = lm.create().json["id"]
    filler = {"runId": run_id, "metrics": {"totalRequests": 1}}

    def is_full():
        for _ in range(300):
            lm.callback("metrics", filler)
        return lm.get("/health").status == 503

    eventually(is_full, 30, what="the database's file is full")
    assert "cannot be written" in lm.get("/health").json["message"]
    stopped = lm.post(f"/v1/tests/{run_id}/stop")
    assert fake.users == 0, "the load was not stopped"
    assert stopped.status == 503 and "not on disk yet" in stopped.json["message"], stopped
    refused = lm.create()
    assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
    resource.prlimit(lm.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    eventually(lambda: lm.get("/health").status == 200, 10, what="it recovers by itself")
    assert lm.create().status == 201
    lm.kill9()
    lm.restart()
    assert lm.run(run_id)["status"] == "Finished", "the stop of the full time was lost"


def run_program(folder, config, *arguments, environment=None, name="config.json"):
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    command = [sys.executable, str(ROOT / "loadmanager.py"), *arguments, "-config", str(folder / name)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, **(environment or {})},
        cwd=folder,
    )


# ---- the database ----------------------------------------------------------


def make_newer(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        database.execute("INSERT INTO meta VALUES ('schema_version', '999')")


def make_foreign(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE customers (name TEXT)")


BAD_DATABASES = {
    "not a database": (lambda path: path.write_bytes(b"hello " * 1000), "not a database"),
    "newer": (make_newer, "newer Load Manager"),
    "somebody else's": (make_foreign, "not a Load Manager database"),
    "a directory": (lambda path: path.mkdir(), "is a directory"),
}


@pytest.mark.parametrize("kind", BAD_DATABASES)
def test_bad_database_is_refused_by_name_and_left_untouched(tmp_path, kind):
    make, words = BAD_DATABASES[kind]
    path = tmp_path / "runs.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    done = run_program(tmp_path, base_config())
    assert done.returncode == 1 and words in done.stderr and "runs.db" in done.stderr + "runs.db", done.stderr
    assert "Traceback" not in done.stderr
    assert before is None or path.read_bytes() == before, "the file was changed"


def test_damaged_database_is_refused(lm, fake):
    for _ in range(40):
        run_id = lm.create(metadata={"pad": "x" * 3000}).json["id"]
        lm.post(f"/v1/tests/{run_id}/stop")
        lm.wait_for(run_id, "Finished")
    lm.terminate()
    path = lm.folder / "runs.db"
    content = bytearray(path.read_bytes())
    content[20_000:60_000] = os.urandom(40_000)
    path.write_bytes(content)
    done = run_program(lm.folder, lm.config)
    assert done.returncode == 1 and "damaged" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert path.read_bytes() == bytes(content)


# ---- the configuration -----------------------------------------------------

CLUSTER = {"id": "a", "tenantId": "t", "envId": "e", "baseUrl": "http://h:1"}
BAD_CONFIGS = [
    ({"server": {"port": 70000}}, "server.port: must be a whole number from 0 to 65535, got 70000"),
    ({"server": {"port": "x"}}, "server.port:"),
    ({"server": {"port": True}}, "server.port:"),
    ({"server": {"port": -1}}, "server.port:"),
    ({"server": {"prot": 1}}, "server.prot: unknown key; did you mean port?"),
    ({"serverr": {}}, "serverr: unknown key; did you mean server?"),
    ({"server": []}, "server: must be a mapping"),
    ({"locustClusters": {"id": "a"}}, "locustClusters: must be a list"),
    ({"locustClusters": [CLUSTER, {**CLUSTER}]}, "locustClusters[1].id: 'a' is already locustClusters[0]"),
    ({"locustClusters": [CLUSTER, {"id": "b"}]}, "locustClusters[1].tenantId: is missing"),
    ({"locustClusters": [{**CLUSTER, "baseUrl": ...}]}, "locustClusters[0].baseUrl: is missing"),
    (
        {"locustClusters": [{**CLUSTER, "baseUrl": "ftp://h"}]},
        "locustClusters[0].baseUrl: must be http(s)://",
    ),
    ({"locustClusters": [{**CLUSTER, "baseUrl": "http://h/\r\nX: y"}]}, "locustClusters[0].baseUrl:"),
    ({"locustClusters": [{**CLUSTER, "baseUrl": "http://u:p@h"}]}, "locustClusters[0].baseUrl:"),
    ({"locustClusters": ["a"]}, "locustClusters[0]: must be a mapping"),
    ({"orchestrator": {"metricsPollIntervalSeconds": 0}}, "orchestrator.metricsPollIntervalSeconds:"),
    ({"orchestrator": {"metricsPollIntervalSeconds": -1}}, "orchestrator.metricsPollIntervalSeconds:"),
    ({"orchestrator": {"metricsPollIntervalSeconds": "often"}}, "orchestrator.metricsPollIntervalSeconds:"),
    ({"orchestrator": {"onShutdown": "maybe"}}, "orchestrator.onShutdown: must be leave or stop"),
    ({"security": {"apiToken": ""}}, "security.apiToken: is missing or empty"),
    ({"security": {"locustCallbackToken": ...}}, "security.locustCallbackToken: is missing or empty"),
    ({"security": {"apiToken": 12345}}, "security.apiToken: must be a string"),
    ({"security": {"apiTokenFile": "/no/such/file"}}, "security.apiTokenFile: /no/such/file cannot be read"),
    (
        {"security": {"apiToken": "change-me-api-token"}, "server": {"host": "0.0.0.0"}},
        "security.apiToken: is the shipped example's",
    ),
    ({"storage": {"url": "mysql://x"}}, "storage.url: must be memory: or sqlite:///file"),
    (
        {"security": {"apiToken": "${NOT_SET_ANYWHERE}"}},
        "security.apiToken: environment variable NOT_SET_ANYWHERE is not set",
    ),
]


def merged(changes):
    config = base_config(server={"port": 0})
    for section, values in changes.items():
        if isinstance(values, dict) and isinstance(config.get(section), dict):
            config[section] = {k: v for k, v in {**config[section], **values}.items() if v is not ...}
        elif isinstance(values, list):
            config[section] = [
                {k: v for k, v in item.items() if v is not ...} if isinstance(item, dict) else item
                for item in values
            ]
        else:
            config[section] = values
    return config


@pytest.mark.parametrize("changes,words", BAD_CONFIGS, ids=[words[:50] for _, words in BAD_CONFIGS])
def test_configuration_mistake_is_named_with_its_key(tmp_path, changes, words):
    for arguments in ((), ("check",)):
        done = run_program(tmp_path, merged(changes), *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and API_TOKEN not in done.stderr and "12345" not in done.stderr


def test_all_configuration_mistakes_are_named_at_once(tmp_path):
    done = run_program(
        tmp_path,
        merged(
            {
                "server": {"port": "x", "hots": 1},
                "orchestrator": {"leaseSeconds": -5},
                "security": {"apiToken": ""},
            }
        ),
        "check",
    )
    assert len(done.stderr.strip().splitlines()) == 4, done.stderr
    for key in ("server.port", "server.hots", "orchestrator.leaseSeconds", "security.apiToken"):
        assert f"{key}:" in done.stderr


def test_no_mistake_of_the_configuration_hides_another_or_is_told_of_a_second_key(tmp_path):
    """A bad cron hid a missing spawnRate, one bad key all checks of several keys; a schedule that nobody
    would ever serve was good."""
    test = {"tenantId": "acme", "envId": "dev", "scenarioId": "browse", "targetUsers": 5}
    good = {**test, "spawnRate": 1}
    changes = {
        "server": {"port": "x"},
        "locustClusters": [
            {"id": "one", "tenantId": "acme", "envId": "dev", "baseUrl": "ftp://x"},
            {"id": "one", "tenantId": "acme", "envId": "dev", "baseUrl": "http://127.0.0.1:1"},
        ],
        "schedules": [
            {"id": "a", "cron": "61 * * * *", "test": test},
            {"id": "a", "timezone": "Mars/Olympus", "test": {**good, "targetUsers": "many"}},
        ],
        "notifications": [{"id": "n", "type": "slack"}],
        "security": {"apiTokens": [{"name": "ci", "role": "boss", "token": "x"}]},
    }
    expected = {
        "server.port", "locustClusters[0].baseUrl", "locustClusters[1].id", "security.apiTokens[0].role",
        "notifications[0].url",
        "schedules[0].cron", "schedules[0].test.spawnRate", "schedules[1].id", "schedules[1].timezone",
        "schedules[1].cron",
        "schedules[1].test.targetUsers",
    }  # fmt: skip
    done = run_program(tmp_path, merged(changes), "check")
    assert {line.partition(": ")[0] for line in done.stderr.splitlines()} == expected, done.stderr
    started = run_program(tmp_path, merged(changes))
    assert started.stderr == done.stderr, "check and the start say the same"


@pytest.mark.parametrize(
    "change,words",
    [
        ({"envId": "prod"}, "schedules[0].test.envId: no cluster serves 'prod'; there are dev"),
        ({"tenantId": "beta"}, "schedules[0].test.tenantId: no cluster serves 'beta'; there are acme"),
        ({"targetUsers": 501}, "schedules[0].test.targetUsers: tenant acme may have 500 users at most"),
    ],
)
def test_schedule_that_can_never_start_is_a_mistake(tmp_path, change, words):
    test = {"tenantId": "acme", "envId": "dev", "scenarioId": "browse", "targetUsers": 5, "spawnRate": 1}
    changes = {
        "locustClusters": [
            {"id": "one", "tenantId": "acme", "envId": "dev", "baseUrl": "http://127.0.0.1:1"}
        ],
        "tenants": [{"id": "acme", "maxUsers": 500}],
        "schedules": [{"id": "a", "cron": "@daily", "test": {**test, **change}}],
    }
    for arguments in ((), ("check",)):
        done = run_program(tmp_path, merged(changes), *arguments)
        assert (done.returncode, done.stderr.strip()) == (2, words)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "a: [",
        "a: 1\na: 2\n",
        "\t- x",
        "!!python/object/apply:os.system ['true']",
        "server: {port: 1}: 2",
        b"\xff\xfe\x00",
        b"\x00\x01\x02",
    ],
)
def test_file_that_is_no_configuration_is_refused_without_a_traceback(tmp_path, text):
    done = run_program(tmp_path, text, "check", name="config.yaml")
    assert done.returncode == 2 and done.stderr.strip() and "Traceback" not in done.stderr, done.stderr


def test_missing_file_is_exit_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "-config", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2 and "none.yaml: cannot be read" in done.stderr
    assert "; -config names another file" in done.stderr, "it does not say what to do"


def test_values_come_from_environment_and_files(load_manager, tmp_path):
    (tmp_path / "token").write_text("from-a-file\n")
    lm = load_manager(
        security={"apiToken": "${MY_TOKEN:-nothing}", "locustCallbackToken": "x"},
        environment={"MY_TOKEN": "from-the-environment", "LOADMANAGER_ORCHESTRATOR_LEASE_SECONDS": "7"},
    )
    assert lm.get("/v1/tests", token="from-the-environment").status == 200
    lm.config["security"] = {"apiTokenFile": str(tmp_path / "token"), "locustCallbackToken": CALLBACK_TOKEN}
    lm.restart()
    assert lm.get("/v1/tests", token="from-a-file").status == 200
    lm.environment["LOADMANAGER_SECURITY_API_TOKEN"] = "overridden"
    lm.restart()
    assert lm.get("/v1/tests", token="overridden").status == 200


def test_one_file_and_a_json_config_start_with_no_package_installed(tmp_path):
    """A bare copy in an empty folder, in an isolated Python that sees no site-packages."""
    (tmp_path / "loadmanager.py").write_bytes((ROOT / "loadmanager.py").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(base_config()))
    (tmp_path / "config.yaml").write_text("server: {port: 0}\nlocustClusters:\n")
    program = subprocess.Popen(
        [sys.executable, "-I", "-S", "loadmanager.py", "-config", "config.json"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "listening" in program.stderr.readline()
    finally:
        program.terminate()
        program.wait(10)
        program.stderr.close()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "loadmanager.py", "check", "-config", "config.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2 and "PyYAML" in done.stderr, done.stderr


def test_locust_that_is_not_installed_is_named_and_the_rest_works(tmp_path):
    (tmp_path / "loadmanager.py").write_bytes((ROOT / "loadmanager.py").read_bytes())
    (tmp_path / "locustfile.py").write_text("")
    launched = {"id": "l", "tenantId": "acme", "envId": "dev", "launcher": {"locustfile": "locustfile.py"}}
    (tmp_path / "config.json").write_text(json.dumps(base_config(launched)))
    program = subprocess.Popen(
        [sys.executable, "-I", "-S", "loadmanager.py", "-config", "config.json"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first, second = program.stderr.readline(), program.stderr.readline()
        assert "pip install locust" in first and "listening" in second, first + second
    finally:
        program.terminate()
        program.wait(10)
        program.stderr.close()


def test_log_never_holds_a_token_and_no_line_can_be_forged(lm):
    lm.create(scenarioId="x", metadata={"a": "b"})
    lm.get("/v1/tests", token="wrong-secret-token")
    lm.callback("register-external", {"tenantId": "acme\n2026 forged", "envId": "dev"})
    text = lm.log()
    assert (
        API_TOKEN not in text
        and CALLBACK_TOKEN not in text
        and "wrong-secret-token" not in text
        and "\n2026 forged" not in text
    )


def test_out_of_file_descriptors_it_goes_on(load_manager):
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

    lm = load_manager(preexec=few_files)
    held = []
    try:
        for _ in range(80):
            held.append(lm.connect())
        holds_for(lambda: lm.process.poll() is None, 0.5)
    finally:
        for sock in held:
            sock.close()
    eventually(lambda: lm.get("/health").status == 200, 10)
