"""Several Load Managers on one PostgreSQL: one leads, the others pass on, and one takes over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import psycopg
import pytest
from conftest import API_TOKEN, ROOT, base_config, cluster_config, create_body
from locust_process import LocustCluster, find_free_port
from standby_campaign import CommandProxy
from target import Target
from tcp_proxy import TcpProxy
from test_store import postgres_url  # noqa: F401 - a fixture
from waiting import eventually, holds_for

import loadmanager


@pytest.fixture
def empty_postgres(postgres_url):  # noqa: F811
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for table in ("meta", *loadmanager.TABLES):
            connection.execute(f"DROP TABLE IF EXISTS {table} CASCADE")
    return postgres_url


def on_port(url, port):
    """The database's URL by way of a proxy's port."""
    parts = urlsplit(url)
    user = f"{parts.username}@" if parts.username else ""
    return parts._replace(netloc=f"{user}127.0.0.1:{port}").geturl() if port else url


@pytest.fixture
def member(load_manager, empty_postgres, monkeypatch):
    """Starts a Load Manager that may lead or stand by, and returns once it answers."""

    def start(cluster_url, database_port=None, environment=None, cluster=None, **server):
        import conftest

        port = find_free_port()
        url = f"http://127.0.0.1:{port}"
        # A standby listens without saying so: wait for its own words.
        listening = conftest.LoadManager._listening

        def answers(self, seen):
            return url if "standing by" in self.log()[seen:] else listening(self, seen)

        monkeypatch.setattr(conftest.LoadManager, "_listening", answers)
        return load_manager(
            cluster_config(cluster_url, **(cluster or {})),
            environment=environment,
            server={"port": port, **server},
            storage={"url": on_port(empty_postgres, database_port)},
            standby={"enabled": True, "advertisedUrl": url},
        )

    return start


def status_of(manager):
    try:
        return manager.get("/ready", token=None).json["status"]
    except OSError:
        return "nobody answers"


def both(member, url, **server):
    leader = member(url, **server)
    standby = member(url, **server)
    assert status_of(leader) == "leading"
    eventually(lambda: status_of(standby) == "standby", 10, what="the second stands by")
    return leader, standby


def cut_leader(url):
    """End the connection that has the lock, as an administrator would."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s",
            (loadmanager.PostgresDatabase.LOCK_ID,),
        )


def test_leader_leads_and_stops_on_time_where_the_database_has_no_second_connection(
    load_manager, fake, empty_postgres
):
    port = find_free_port()
    role = "CREATE ROLE one LOGIN; GRANT CREATE ON SCHEMA public TO one"
    proof = "FROM pg_stat_activity WHERE application_name = 'loadmanager-lead'"
    with psycopg.connect(empty_postgres, autocommit=True) as connection:
        connection.execute(role)
        try:
            leader = load_manager(
                cluster_config(fake.url),
                server={"port": port},
                storage={"url": empty_postgres.replace("lm@", "one@")},
                standby={"enabled": True, "advertisedUrl": f"http://127.0.0.1:{port}"},
            )
            run_id = leader.create(durationSeconds=6).json["id"]
            connection.execute("ALTER ROLE one CONNECTION LIMIT 1")
            assert connection.execute(f"SELECT pg_terminate_backend(pid) {proof}").fetchall() == [(True,)]
            holds_for(lambda: leader.get("/v1/tests").status == 200, 5)
            run = leader.wait_for(run_id, "Finished")
            assert run["finishedAtMs"] - run["startedAtMs"] < 7000, run
            leader.end()
        finally:
            connection.execute("DROP OWNED BY one; DROP ROLE one")


def test_standby_passes_reads_creates_and_stops_on(member, fake):
    leader, standby = both(member, fake.url)
    created = standby.create()
    assert created.status == 201, created.body
    run_id = created.json["id"]
    assert standby.run(run_id)["id"] == leader.run(run_id)["id"] == run_id
    assert standby.post(f"/v1/tests/{run_id}/stop").status == 200
    assert standby.get("/health", token=None).status == 200
    assert standby.get("/v1/tests", token="wrong").status == 401


def test_request_is_passed_on_only_once(member, fake):
    _, standby = both(member, fake.url)
    sent = f"GET /v1/tests HTTP/1.1\r\nHost: x\r\n{loadmanager.STANDBY_HOP}: 1\r\n\r\n".encode()
    answer = standby.raw(sent, until_closed=True)
    assert b" 503 " in answer.splitlines()[0] and b"Retry-After: 2" in answer, answer


def test_standby_leads_after_kill_and_stops_the_run_of_a_real_locust_on_time(member):
    with (
        Target() as target,
        LocustCluster(
            ROOT / "locust" / "locustfile.py", workers=1, extra_args=["--host", target.url]
        ) as locust,
    ):
        leader, standby = both(member, locust.base_url)
        run_id = leader.create(durationSeconds=15).json["id"]
        leader.wait_for(run_id, "Running")
        leader.kill9()
        eventually(lambda: status_of(standby) == "leading", 5, what="the standby leads within 5 s")
        assert standby.run(run_id)["status"] == "Running"
        run = standby.wait_for(run_id, "Finished", within_s=30)
        assert run["id"] == run_id
        eventually(lambda: locust.stats()["user_count"] == 0, 10, what="no load is left")


def test_standby_passes_a_large_body_on(member, fake):
    leader, standby = both(member, fake.url)
    document = {"format": "locust-json", "large": "x" * 20_000_000}
    for member_ in (leader, standby):
        answer = member_.post("/v1/tests/import", document, timeout_s=60)
        assert answer.status == 400 and "large" in answer.body.decode(), (answer.status, answer.body[:300])


def test_leader_learns_the_address_of_who_asked_a_standby(member, fake):
    """The standby is a proxy as any other: it is believed where it is named, and what a client claims is
    not."""
    _, standby = both(member, fake.url, trustedProxies=["127.0.0.1"])
    address = ("127.0.0.1", int(standby.url.rpartition(":")[2]))
    with socket.create_connection(address, source_address=("127.0.0.3", 0)) as peer:
        peer.sendall(
            b"GET /v1/tests HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 10.9.8.7\r\n"
            b"Authorization: Bearer wrong\r\n\r\n"
        )
        assert b" 401 " in peer.recv(65536)
    entries = standby.get("/v1/audit").json
    assert [one["address"] for one in entries if one.get("status") == 401] == ["127.0.0.3"], entries


@pytest.fixture
def front():
    """What a standby answers with, without a leader."""
    front = loadmanager.StandbyFront("127.0.0.1", 0)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    yield front
    front.shutdown()
    front.server_close()


def asked(front, sent):
    """The answer to some bytes."""
    with socket.create_connection(("127.0.0.1", front.server_port), timeout=10) as peer:
        peer.sendall(sent)
        received = b""
        while piece := peer.recv(65536):
            received += piece
    return received


def test_silent_connections_keep_no_one_out_of_a_standby(front, monkeypatch):
    monkeypatch.setattr(loadmanager, "STANDBY_MAX_UNREAD", 20)
    silent = [socket.create_connection(("127.0.0.1", front.server_port)) for _ in range(60)]
    try:
        for _ in range(20):
            assert b" 200 " in asked(front, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: len(front.unread) <= 21, 5, what="the oldest silent ones gave way")
    finally:
        for one in silent:
            one.close()


def test_streams_of_events_leave_places_of_a_standby_for_other_requests(member, fake, monkeypatch):
    monkeypatch.setattr(loadmanager, "STANDBY_MAX_STREAMS", 2)
    leader = member(fake.url)
    front = loadmanager.StandbyFront("127.0.0.1", 0)
    front.leader_url, front.problem = leader.url, None
    threading.Thread(target=front.serve_forever, daemon=True).start()
    head = f"HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {API_TOKEN}\r\n\r\n".encode()
    streams = [socket.create_connection(("127.0.0.1", front.server_port), timeout=10) for _ in range(2)]
    try:
        for stream in streams:
            stream.sendall(b"GET /v1/events " + head)
            assert b" 200 " in stream.recv(65536)
        assert b" 503 " in asked(front, b"GET /v1/events " + head)
        assert b" 200 " in asked(front, b"GET /v1/tests " + head)
    finally:
        for stream in streams:
            stream.close()
        front.shutdown()
        front.server_close()


@pytest.mark.parametrize(
    "head",
    [
        b"X-Note: a\rAuthorization: Bearer stolen\r\n",
        b"Content-Length: 0\r\nContent-Length: 5\r\n",
    ],
)
def test_standby_refuses_a_head_that_can_be_read_in_two_ways(front, head):
    front.leader_url, front.problem = "http://127.0.0.1:9", None
    answer = asked(front, b"GET /v1/tests HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
    assert b" 400 " in answer.splitlines()[0], answer


def test_standby_says_that_the_leader_s_address_cannot_be_used(front, capfd):
    front.leader_url, front.problem = "http://127.0.0.1:99999", None
    assert b" 503 " in asked(front, b"GET /v1/tests HTTP/1.1\r\nHost: x\r\n\r\n")
    eventually(lambda: "address of the leader cannot be used" in capfd.readouterr().err, 5)


def test_answer_of_the_leader_may_take_longer_than_the_request_may(member, fake, front, monkeypatch):
    monkeypatch.setattr(loadmanager.StandbyFront, "REQUEST_S", 0.5)

    def answer_late(handler):
        time.sleep(2.5)
        handler.answer_well("/swarm", handler.form)

    fake.faults["/swarm"] = answer_late
    leader = member(fake.url)
    front.leader_url, front.problem = leader.url, None
    body = loadmanager.dump_json(create_body()).encode()
    head = f"POST /v1/tests HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {API_TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    assert b" 201 " in asked(front, head.encode() + body)


def test_request_that_drips_loses_its_place_at_a_standby(monkeypatch):
    monkeypatch.setattr(loadmanager.StandbyFront, "REQUEST_S", 1.0)
    front = loadmanager.StandbyFront("127.0.0.1", 0)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    try:
        with socket.create_connection(("127.0.0.1", front.server_port), timeout=10) as peer:
            give_up_at = time.monotonic() + 10
            with pytest.raises(ConnectionError):
                while time.monotonic() < give_up_at:
                    peer.sendall(b"G")
                    time.sleep(0.05)
        eventually(lambda: not front.unread, 5, what="nothing is kept of it")
    finally:
        front.shutdown()
        front.server_close()


def test_stop_of_the_former_leader_is_not_sent_again(load_manager):
    """It was killed after its stop, before it wrote so: the hooks say that the test has ended."""
    stops = []
    with (
        Target() as target,
        LocustCluster(
            ROOT / "locust" / "locustfile.py", workers=1, extra_args=["--host", target.url]
        ) as locust,
    ):
        way = CommandProxy(int(locust.base_url.rpartition(":")[2]), stops.append)
        manager = load_manager(cluster_config(f"http://127.0.0.1:{way.port}"))
        run_id, ends_at = manager.create(durationSeconds=8).json["id"], time.monotonic() + 8.5
        has_numbers = lambda: manager.run(run_id).get("lastMetrics", {}).get("totalRequests")  # noqa: E731
        eventually(has_numbers, 7, what="requests are made")
        manager.kill9()
        stop_by_hand(locust)
        time.sleep(max(0.0, ends_at - time.monotonic()))  # its time is over when the next one starts
        manager.start()
        run = manager.wait_for(run_id, "Finished", "Failed")
        assert (run["status"], run["stopReason"]) == ("Finished", "duration"), run
        assert run["lastMetrics"]["totalRequests"] > 0, "its final numbers were not read"
        assert stops == ["swarm"], stops
        way.__exit__()


def stop_by_hand(locust):
    import urllib.request

    with urllib.request.urlopen(f"{locust.base_url}/stop", b"", timeout=10) as answer:
        assert b"true" in answer.read()


def test_workers_are_not_scaled_without_proof_of_the_lead(monkeypatch, tmp_path):
    """The user's command is a command to the cluster, as a start is."""

    class NoProof:
        def prove(self):
            raise loadmanager.LocustUnreachable("no proof")

    monkeypatch.setattr(loadmanager.LocustClient, "lead", NoProof())
    ran = tmp_path / "ran"
    launcher = {
        "type": "command",
        "scale": ["touch", str(ran), "{workers}"],
        "usersPerWorker": 1,
        "maxWorkers": 9,
    }
    (tmp_path / "config.json").write_text(
        loadmanager.dump_json(base_config(cluster_config("http://127.0.0.1:9", launcher=launcher)))
    )
    config = loadmanager.checked_config(str(tmp_path / "config.json"))
    timer = loadmanager.Timer()
    client = loadmanager.LocustClient(config.clusters[0], "", str(tmp_path))
    cluster = loadmanager.Cluster(config.clusters[0], client, None, timer)
    with pytest.raises(loadmanager.LocustUnreachable, match="no proof"):
        cluster.scale(2)
    assert not ran.exists(), "the command was run"


@pytest.mark.timeout(300)
def test_short_campaign_of_kills_and_cuts_breaks_nothing():
    """tests/standby_campaign.py, short: `make standby` for the long one."""
    command = [sys.executable, str(ROOT / "tests" / "standby_campaign.py")]
    done = subprocess.run(
        [*command, "--kills", "2", "--cuts", "2", "--seed", "1"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 broken" in done.stdout and "2 kills, 2 cuts" in done.stdout, done.stdout


def test_former_leader_that_was_cut_off_answers_no_reads(member, fake, empty_postgres):
    """What it knows is old: a run that was made at the one that took over, it would call unknown."""
    with TcpProxy(urlsplit(empty_postgres).port) as proxy:
        leader = member(fake.url, database_port=proxy.port)
        standby = member(fake.url)
        assert leader.get("/v1/tests").status == 200
        proxy.drop()
        proxy.cut()
        eventually(lambda: status_of(standby) == "leading", 10, what="the standby leads")
        assert standby.create(durationSeconds=30).status == 201
        until, answers = time.monotonic() + 3, set()
        while time.monotonic() < until and leader.process.poll() is None:
            try:
                answers.add(leader.get("/v1/tests").status)
            except OSError:
                break
        assert answers <= {503}, "the former leader answered from what it knew"
        proxy.forward()
        assert leader.process.wait(20) == loadmanager.EXIT_LEAD_LOST, leader.log()


@pytest.mark.parametrize("round_trip_s", [0.2, 0.4])
def test_reads_and_stops_do_not_wait_for_a_database_far_away(member, fake, empty_postgres, round_trip_s):
    """A batch of the writer takes several round trips: longer than a proof of the lead is good for."""
    with TcpProxy(urlsplit(empty_postgres).port) as proxy:
        leader = member(fake.url, database_port=proxy.port)
        proxy.delay_s = round_trip_s / 2
        created = leader.create(durationSeconds=6)
        assert created.status == 201, created.body
        run_id, answers = created.json["id"], []
        until = time.monotonic() + 5
        while time.monotonic() < until:
            answer = leader.get(f"/v1/tests/{run_id}")
            answers.append(answer.status if answer.status == 200 else answer.body)
            time.sleep(0.05)
        assert set(answers) == {200}, "a leader with a slow database refused reads"
        leader.wait_for(run_id, "Finished", within_s=20)
        lasted_s = fake.stops[0].at - fake.swarms[0].at
        assert lasted_s < 6 + 2 * round_trip_s + 0.5, "the stop waited for the database"


def epoch_in(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT value FROM meta WHERE key = 'leader'").fetchone()[0].split("/")[0]


def test_former_leader_that_was_frozen_commands_and_writes_nothing(member, fake, empty_postgres):
    leader, standby = both(member, fake.url)
    run_id = leader.create(durationSeconds=12).json["id"]
    leader.wait_for(run_id, "Running")
    os.kill(leader.process.pid, signal.SIGSTOP)
    try:
        cut_leader(empty_postgres)
        eventually(lambda: status_of(standby) == "leading", 10, what="the standby leads")
        standby.wait_for(run_id, "Finished", within_s=30)
        assert len(fake.stops) == 1, "the run was not stopped exactly once by the one that took over"
        following = standby.create(durationSeconds=60).json["id"]
        standby.wait_for(following, "Running")
        epoch, starts = epoch_in(empty_postgres), len(fake.swarms)
    finally:
        os.kill(leader.process.pid, signal.SIGCONT)  # the end of its run is overdue for it
    status = leader.process.wait(15)
    assert status == loadmanager.EXIT_LEAD_LOST, leader.log()
    holds_for(lambda: standby.run(following)["status"] == "Running", 1)
    assert (len(fake.stops), len(fake.swarms)) == (1, starts), "the former leader commanded Locust"
    assert epoch_in(empty_postgres) == epoch, "the former leader counted an epoch"
    assert standby.run(run_id)["stopReason"] == "duration"


def test_standby_leads_when_the_leader_is_frozen(member, fake):
    """Its connection stays open, as its system answers for it."""
    leader, standby = both(member, fake.url)
    run_id = leader.create(durationSeconds=600).json["id"]
    leader.wait_for(run_id, "Running")
    os.kill(leader.process.pid, signal.SIGSTOP)
    try:
        eventually(lambda: status_of(standby) == "leading", 30, what="the standby leads")
        assert standby.run(run_id)["status"] == "Running"
    finally:
        os.kill(leader.process.pid, signal.SIGCONT)
    assert leader.process.wait(15) == loadmanager.EXIT_LEAD_LOST, leader.log()
    assert standby.run(run_id)["status"] == "Running" and not fake.stops


@pytest.mark.parametrize("hooks", [True, False])
def test_load_that_a_frozen_leader_begins_after_a_take_over_is_stopped(
    member, fake_locust, empty_postgres, hooks
):
    """It stood still while it sent the start. The one that took over looks for such load, not for ever."""
    fake = fake_locust(hooks=hooks)
    with StartHeldUp(urlsplit(fake.url).port) as way:
        leader = member(f"http://127.0.0.1:{way.port}")
        standby = member(fake.url)
        creating = threading.Thread(target=leader.create, kwargs={"durationSeconds": 60}, daemon=True)
        creating.start()
        assert way.is_held.wait(15), "no start was sent"
        os.kill(leader.process.pid, signal.SIGSTOP)
        try:
            cut_leader(empty_postgres)
            eventually(lambda: status_of(standby) == "leading", 10, what="the standby leads")
            run_id = standby.get("/v1/tests").json[0]["id"]
            standby.wait_for(run_id, "Failed", within_s=20)
            eventually(
                lambda: "load of an ended run is stopped" in standby.log(), 30, what="it was looked for"
            )
            stops = len(fake.stops)
            way.let_go()
            eventually(lambda: fake.swarms, 10, what="the start reaches Locust")
        finally:
            os.kill(leader.process.pid, signal.SIGCONT)
        assert leader.process.wait(25) == loadmanager.EXIT_LEAD_LOST, leader.log()
        assert len(fake.stops) > stops, "the load runs on, and no one knows of it\n" + leader.log()
        assert "load that began too late is stopped" in leader.log()


class StartHeldUp(TcpProxy):
    """Forwards no start until let_go(): as if the process had stood still just before it sent it."""

    def __init__(self, target_port):
        self.is_held = threading.Event()
        super().__init__(target_port)

    def saw(self, received):
        if b"POST /swarm" in received:
            self.drop()
            self.is_held.set()

    def let_go(self):
        self.forward()


def with_clock_ahead(folder, seconds):
    """The environment of a process whose wall clock is that far ahead."""
    (folder / "sitecustomize.py").write_text(
        f"import time\nreal = time.time\ntime.time = lambda: real() + {seconds}\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_run_ends_after_its_duration_whatever_the_clock_of_who_takes_over_says(
    member, fake, tmp_path, ahead_s
):
    leader = member(fake.url)
    standby = member(fake.url, environment=with_clock_ahead(tmp_path, ahead_s))
    run_id = leader.create(durationSeconds=14).json["id"]
    leader.wait_for(run_id, "Running")
    time.sleep(1)
    leader.kill9()
    run = standby.wait_for(run_id, "Finished", within_s=40)
    lasted_s = fake.stops[0].at - fake.swarms[0].at
    assert 13 < lasted_s < 20, f"a run of 14 s was stopped after {lasted_s:.1f} s"
    assert run["stopReason"] == "duration" and len(fake.stops) == 1
    assert [one["code"] for one in run["warnings"]] == ["clocks_differ"]
    assert 13 < (run["finishedAtMs"] - run["startedAtMs"]) / 1000 < 20


def test_run_lasts_as_long_when_the_clock_of_the_database_was_set(load_manager, fake, empty_postgres):
    lm = load_manager(cluster_config(fake.url), storage={"url": empty_postgres})
    run_id = lm.create(durationSeconds=8).json["id"]
    run = lm.wait_for(run_id, "Running")
    lm.kill9()
    with psycopg.connect(empty_postgres, autocommit=True) as connection:
        moved = "UPDATE meta SET value = (value::float + 3600)::text WHERE key = 'leader_clock'"
        assert connection.execute(moved).rowcount == 1
    lm.restart()
    assert lm.run(run_id)["startedAtMs"] == run["startedAtMs"] and not lm.run(run_id).get("warnings")
    ended = lm.wait_for(run_id, "Finished")
    assert 7.5 < (ended["finishedAtMs"] - run["startedAtMs"]) / 1000 < 11, ended


def test_load_on_a_cluster_that_a_member_lacks_is_stopped_when_the_cluster_comes_back(member, fake):
    leader = member(fake.url)
    other = member(fake.url, cluster={"id": "another", "envId": "another"})
    run_id, waiting = leader.create(durationSeconds=600).json["id"], leader.create(queue=True).json["id"]
    leader.wait_for(run_id, "Running")
    leader.kill9()
    run = other.wait_for(run_id, "Failed", within_s=20)
    assert "is gone from the configuration" in run["failureReason"]
    waited = other.wait_for(waiting, "Failed", within_s=10)
    assert "gone from the configuration" in waited["failureReason"], "it would wait for ever"
    assert not fake.stops
    other.config["locustClusters"].append({**leader.config["locustClusters"][0]})
    (other.folder / "config.json").write_text(loadmanager.dump_json(other.config))
    os.kill(other.process.pid, signal.SIGHUP)
    eventually(lambda: fake.stops, 30, what="the load is stopped")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"storage": {"url": "sqlite:///x.db"}}, "storage.url"),
        ({"standby": {"enabled": True}}, "standby.advertisedUrl"),
        ({"server": {"port": 0}}, "server.port"),
    ],
)
def test_standby_that_cannot_be_is_refused(tmp_path, change, named):
    sections = {
        "server": {"port": 8080},
        "storage": {"url": "postgresql://lm@127.0.0.1/x"},
        "standby": {"enabled": True, "advertisedUrl": "http://127.0.0.1:8080"},
        **change,
    }
    (tmp_path / "config.json").write_text(loadmanager.dump_json(base_config(**sections)))
    command = [sys.executable, str(ROOT / "loadmanager.py"), "-config", str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
