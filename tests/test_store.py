"""The store on SQLite and on a real PostgreSQL: what was kept is there again, and a run moves only along
its table."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, LoadManager, base_config, cluster_config
from postgres_process import PostgresServer
from tcp_proxy import TcpProxy
from waiting import eventually

import loadmanager as lm


@pytest.fixture(scope="session")
def postgres_url():
    with PostgresServer() as server:
        yield server.url()


@pytest.fixture(params=["sqlite", "postgresql"])
def open_store(request, tmp_path):
    """open_store() -> Store on the same database each time."""
    stores = []
    if request.param == "postgresql":
        import psycopg

        url = request.getfixturevalue("postgres_url")
        with psycopg.connect(url, autocommit=True) as connection:
            for table in ("meta", *lm.TABLES):
                connection.execute(f"DROP TABLE IF EXISTS {table} CASCADE")
    else:
        url = "sqlite:///store.db"

    def open_it():
        store = lm.Store(lm.open_database(url, str(tmp_path)))
        stores.append(store)
        return store

    open_it.url = url
    yield open_it
    for store in stores:
        store.close()


def new_run(**changes):
    request = lm.RunRequest(
        "acme", "dev", "browse", 5, 5.0, duration_s=60, metadata={"ticket": "PERF-1 🦗", "nul": "a\u0000b"}
    )
    return lm.replace(lm._new_run(request, "tester", "api"), cluster_id="one", **changes)


def snapshot(requests, at=None):
    row = lm.EndpointStats("GET", "/a", requests, 0, 1.5, 1, 2, 1, 3.5, 2, None)
    return lm.Snapshot(at or time.time(), 3.5, requests, 0, 0.0, 1.5, 1, 2, None, 5, (row,))


def entry(who="ci", tenant="acme", status=201, **changes):
    fields = {
        "at": 1000.0,
        "who": who,
        "role": "operator",
        "address": "::1",
        "action": "POST /v1/tests/{id}/stop",
        "tenant_id": tenant,
        "env_id": "dev",
        "run_id": "r1",
    }
    return lm.AuditEntry(**{**fields, "http_status": status, "detail": "100% of 'it' 🦗", **changes})


def test_audit_is_appended_and_found_by_what_is_asked_for(open_store):
    store = open_store()
    kept = [
        entry(),
        entry("ops", status=403),
        entry("ops", "beta", 409, at=2000.0),
        entry("", "", 401, run_id="", action="GET /v1/tests"),
    ]
    for one in kept:
        store.audit.add(one)
    store.close()
    store = open_store()
    store.audit.add(entry("last"))

    def found(scope=lm.EVERYTHING, limit=100, **wanted):
        return [
            (seq, one.who, one.http_status)
            for seq, one in store.audit.entries(lm.AuditFilter(**wanted), scope, limit)
        ]

    assert found() == [(5, "last", 201), (4, "", 401), (3, "ops", 409), (2, "ops", 403), (1, "ci", 201)]
    assert store.audit.entries(lm.AuditFilter(who="ci"), lm.EVERYTHING, 9)[0][1] == kept[0]
    assert [seq for seq, *_ in found(limit=2, before_seq=4)] == [3, 2]
    assert [seq for seq, *_ in found(outcome="refused")] == [4, 2] and [
        seq for seq, *_ in found(outcome="failed")
    ] == [3]
    assert (
        [seq for seq, *_ in found(action="/STOP")] == [5, 3, 2, 1]
        and found(action="%") == []
        and found(action="_v1") == []
    )
    assert [seq for seq, *_ in found(from_at=1500.0)] == [3] and found(to_at=999.0) == []
    assert [seq for seq, *_ in found(lm.Scope(frozenset({"beta"})))] == [3]
    assert found(lm.Scope(frozenset())) == [] and found(lm.Scope(None, frozenset({"prod"}))) == []
    assert found(who="' OR 1=1 --") == []


def test_everything_kept_is_there_after_reopening(open_store):
    store = open_store()
    run = store.add(new_run(), ("key", "hash"))
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1000.5)
    store.add_warning(run.id, "workers_lost", "one of two", 1001.0)
    for number in range(1, 4):
        store.add_snapshot(run.id, snapshot(number, 1000.0 + number), "poll")
    store.transition(run.id, lm.RunStatus.STOPPING, stop_reason="user")
    store.transition(run.id, lm.RunStatus.FINISHED, snapshot=snapshot(9, 1010.0), finished_at=1010.0)
    before, samples = store.run_json(run.id), store.history.samples(run.id)
    store.close()
    again = open_store()
    assert again.run_json(run.id) == before
    assert again.history.samples(run.id) == samples and [sample.requests for sample in samples] == [
        1,
        2,
        3,
        9,
    ]
    assert again.idempotency.recall("key", time.time()) == ("hash", run.id)
    assert again.add(new_run()).seq > run.seq


@pytest.mark.parametrize("status", list(lm.RunStatus))
def test_only_the_transitions_of_the_table_are_possible(open_store, status):
    store = open_store()
    paths = {
        lm.RunStatus.PENDING: [], lm.RunStatus.RUNNING: [lm.RunStatus.RUNNING],
        lm.RunStatus.STOPPING: [lm.RunStatus.RUNNING, lm.RunStatus.STOPPING],
        lm.RunStatus.FINISHED: [lm.RunStatus.RUNNING, lm.RunStatus.STOPPING, lm.RunStatus.FINISHED],
        lm.RunStatus.FAILED: [lm.RunStatus.FAILED],
    }  # fmt: skip
    for to in lm.RunStatus:
        run = store.add(new_run())
        for step in paths[status]:
            store.transition(run.id, step)
        if to in lm.TRANSITIONS[status]:
            assert store.transition(run.id, to).status is to
        else:
            with pytest.raises(lm.Conflict, match=status.value):
                store.transition(run.id, to)


def test_final_run_keeps_every_byte(open_store):
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.FAILED, failure_reason="x", finished_at=1.0)
    before = store.run_json(run.id)
    assert not store.add_snapshot(run.id, snapshot(1), "push")
    assert not store.add_warning(run.id, "cpu_high", "x", 1.0)
    store.update(run.id, scenario_id="other")
    store.update(run.id, cleanup=False)
    assert store.run_json(run.id) == before


def test_ten_threads_on_one_run_lose_no_sample_and_stop_it_once(open_store):
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING)
    stopped = []

    def work(number):
        for step in range(50):
            store.add_snapshot(run.id, snapshot(number * 100 + step), "poll")

    def stop():
        try:
            store.transition(run.id, lm.RunStatus.STOPPING)
            stopped.append(1)
        except lm.Conflict:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.history.samples(run.id)) == 500
    threads = [threading.Thread(target=stop) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stopped) == 1


def test_deleted_run_is_gone_with_its_samples(open_store):
    store = open_store()
    run = store.add(new_run(), ("key", "hash"))
    store.add_snapshot(run.id, snapshot(1), "poll")
    store.transition(run.id, lm.RunStatus.FAILED, finished_at=5.0)
    lm.RunRemoval(store).remove(run.id)
    store.close()
    again = open_store()
    assert (
        again.find(run.id) is None
        and again.history.samples(run.id) == []
        and again.idempotency.recall("key", time.time()) is None
    )


def test_old_final_runs_go_and_young_and_active_ones_stay(open_store):
    store = open_store()
    old, young, active = store.add(new_run()), store.add(new_run()), store.add(new_run(created_at=1.0))
    store.transition(old.id, lm.RunStatus.FAILED, finished_at=10.0)
    store.transition(young.id, lm.RunStatus.FAILED, finished_at=1000.0)
    assert lm.RunRemoval(store).remove_older(500.0) == 1
    assert {run.id for run in store.list_runs()} == {young.id, active.id}


def test_a_baseline_does_not_age_out_and_an_imported_run_ages_from_its_import(open_store):
    store = open_store()
    baseline, other = store.add(new_run()), store.add(new_run())
    for run in (baseline, other):
        store.transition(run.id, lm.RunStatus.FAILED, finished_at=10.0)
    store.baselines.name(
        lm.Baseline(baseline.tenant_id, baseline.env_id, baseline.scenario_id, baseline.id, 11.0, "me")
    )
    imported = lm.replace(new_run(), status=lm.RunStatus.FINISHED, finished_at=10.0, imported_at=1000.0)
    store.add_imported(imported, None, [], [], None)
    assert lm.RunRemoval(store).remove_older(500.0) == 1
    assert {run.id for run in store.list_runs()} == {baseline.id, imported.id}
    store.baselines.drop((baseline.tenant_id, baseline.env_id, baseline.scenario_id))
    assert lm.RunRemoval(store).remove_older(500.0) == 1


def test_histograms_schedules_and_deliveries_are_kept_by_both_databases(open_store):
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    for number, at in enumerate((2.0, 2.5, 4.0)):
        store.add_snapshot(
            run.id,
            snapshot(1)._replace(
                taken_at=at, requests=number + 1, failures=0, avg_ms=5.0, times={5: number + 1}
            ),
            "push",
        )
    store.add_snapshot(
        run.id,
        snapshot(1)._replace(taken_at=4.1, requests=9, failures=0, avg_ms=5.0, times={5: 9}),
        "push",
        is_last=True,
    )
    schedule = lm.schedule_to_record(
        lm.Schedule("nightly", "acme", "dev", {}, 1.0, "me", run_at=2.0, paused=True)
    )
    store.schedules.keep("nightly", schedule)
    store.schedules.keep("gone", "{}")
    store.schedules.keep("gone", None)
    delivery = lm.Delivery(
        "msg_1", "hook", "finished", run.id, "acme", time.time(), "finished: x", {"a": "\u202e"}
    )
    store.outbox.keep(delivery)
    store.outbox.keep(delivery._replace(attempts=2, problem="HTTP 500"))
    store.close()
    again = open_store()
    assert [(point.at, point.histograms[None].times) for point in again.history.histograms(run.id)] == [
        (2.0, {5: 1}),
        (4.0, {5: 3}),
        (4.1, {5: 9}),
    ], "one a second, and the last"
    assert again.schedules.at_start() == [schedule]
    assert again.outbox.waiting("hook") == [delivery._replace(attempts=2, problem="HTTP 500")]


def test_second_load_manager_on_one_database_is_refused(open_store):
    open_store()
    with pytest.raises(lm.StartupError, match="in use by another Load Manager"):
        open_store()


def test_newer_schema_is_refused(open_store, tmp_path):
    open_store().close()
    database = lm.open_database(open_store.url, str(tmp_path))
    database.execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'")
    database.close()
    with pytest.raises(lm.StartupError, match="newer Load Manager"):
        open_store()


# What the first version made, and what it wrote into it.
FIRST_VERSION = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE runs (id TEXT PRIMARY KEY, seq BIGINT NOT NULL, record TEXT NOT NULL, metrics TEXT)",
    "CREATE TABLE samples (run_id TEXT NOT NULL, at DOUBLE PRECISION NOT NULL, rps DOUBLE PRECISION,"
    " fails_per_s DOUBLE PRECISION, requests BIGINT, failures BIGINT, error_percent DOUBLE PRECISION,"
    " avg_ms DOUBLE PRECISION, p50_ms DOUBLE PRECISION, p95_ms DOUBLE PRECISION, p99_ms DOUBLE PRECISION,"
    " window_p50_ms DOUBLE PRECISION, window_p95_ms DOUBLE PRECISION, users BIGINT, source TEXT NOT NULL)",
    "CREATE TABLE idempotency (key TEXT PRIMARY KEY, body_hash TEXT NOT NULL, run_id TEXT NOT NULL,"
    " created_at DOUBLE PRECISION NOT NULL)",
    "INSERT INTO meta VALUES ('schema_version', '1')",
)
OLD_RUN = {
    "tenant_id": "acme", "env_id": "dev", "cluster_id": "one", "scenario_id": "browse", "target_users": 5,
    "spawn_rate": 5.0, "status": "Failed", "created_at": 1000.0, "finished_at": 1060.0, "warnings": [],
}  # fmt: skip


def columns_of(database):
    return {
        table: {item[0] for item in database.execute(f"SELECT * FROM {table} WHERE 1 = 0").description}
        for table in lm.TABLES
    }


def raw_database(open_store, folder):
    """The database as any program opens it, without tables being made."""
    if open_store.url.startswith("postgresql"):
        return lm.PostgresDatabase(open_store.url)
    return lm.SqliteDatabase(str(folder / "store.db"))


def make_first_version(open_store, folder, left_out=""):
    old = raw_database(open_store, folder)
    for statement in FIRST_VERSION:
        old.execute(statement.replace(left_out, "") if left_out else statement)
    for number, changes in enumerate(({}, {"cleanup": True}, {"metadata": {"x": '"cleanup":true'}}), 1):
        record = lm.dump_json({**OLD_RUN, "id": f"run-{number}", "seq": number, **changes})
        old.execute("INSERT INTO runs (id, seq, record) VALUES (?, ?, ?)", (f"run-{number}", number, record))
    old.execute("INSERT INTO samples (run_id, at, requests, source) VALUES ('run-1', 1001.0, 7, 'poll')")
    old.close()


def test_file_of_the_first_version_is_brought_to_the_newest(open_store, tmp_path):
    make_first_version(open_store, tmp_path)
    store = open_store()
    assert [run.id for run in store.list_runs()] == ["run-3", "run-2", "run-1"]
    assert [sample.requests for sample in store.history.samples("run-1")] == [7]
    assert store.cleanups.all() == {"run-2": "one"}, "what was a fact of the run is one of its own"
    run = store.add(new_run(), ("key", "hash"))
    store.add_snapshot(run.id, snapshot(3), "poll")
    store.keep_attachment(run.id, "a.txt", b"a")
    store.audit.add(entry())
    store.cleanups.drop("run-2")
    store.wait_durable_or_log()
    store.close()
    again = open_store()
    assert (
        again.find(run.id) == run
        and again.history.attachment(run.id, "a.txt") == b"a"
        and again.cleanups.all() == {}
    )
    again.close()
    database = raw_database(open_store, tmp_path)
    assert columns_of(database) == {table: set(columns) for table, columns in lm.TABLES.items()}
    database.close()


def test_column_that_a_new_version_needs_is_added_to_an_old_file(open_store, tmp_path, monkeypatch):
    make_first_version(open_store, tmp_path)
    newest = max(lm.MIGRATIONS) + 1
    added = "ALTER TABLE samples ADD COLUMN workers BIGINT"
    monkeypatch.setitem(lm.MIGRATIONS, newest, (added,))
    monkeypatch.setitem(lm.TABLES, "samples", ("workers", *lm.TABLES["samples"]))  # in another order, too
    database = lm.open_database(open_store.url, str(tmp_path))
    lm.open_tables(database, lambda _: None)
    row = (3, *lm.sample_of("run-1", snapshot(8, 1002.0), "poll"))
    database.execute(lm.insert_into("samples"), row)
    found = database.query("SELECT requests, workers FROM samples ORDER BY at")
    database.close()
    assert found == [(7, None), (8, 3)]
    again = lm.open_database(open_store.url, str(tmp_path))
    lm.open_tables(again, lambda _: None)  # not added once more
    again.close()
    monkeypatch.undo()
    with pytest.raises(lm.StartupError, match=f"schema {newest}, written by a newer Load Manager"):
        open_store()


def test_database_that_lacks_a_column_is_refused_and_left_as_it_was(open_store, tmp_path):
    make_first_version(open_store, tmp_path, left_out=" error_percent DOUBLE PRECISION,")
    with pytest.raises(lm.StartupError, match="table samples has no column error_percent"):
        open_store()
    database = raw_database(open_store, tmp_path)
    assert database.query("SELECT value FROM meta WHERE key = 'schema_version'") == [("1",)]
    with pytest.raises(database.errors):
        database.query("SELECT * FROM cleanups")
    database.close()


def test_cleanup_outlives_its_run(open_store):
    store = open_store()
    deleted, retained, stopped = (store.add(new_run()) for _ in range(3))
    store.transition(deleted.id, lm.RunStatus.FAILED, finished_at=5.0, cleanup_on="one")
    store.transition(retained.id, lm.RunStatus.FAILED, finished_at=5.0)
    store.cleanups.keep(retained.id, "two")
    store.transition(stopped.id, lm.RunStatus.FAILED, finished_at=5.0, cleanup_on="three")
    store.cleanups.drop(stopped.id)
    lm.RunRemoval(store).remove(deleted.id)
    assert lm.RunRemoval(store).remove_older(100.0) == 2
    expected = {deleted.id: "one", retained.id: "two"}
    assert store.cleanups.all() == expected
    store.close()
    assert open_store().cleanups.all() == expected


def test_transition_is_in_one_commit_with_its_deliveries_and_cleanup(open_store):
    """Whenever the writer takes what there is, it takes all of a transition or nothing."""
    store = open_store()
    run = store.add(new_run())
    written = []
    write = store._writer._rows.write

    def look(batch):
        if run.id in batch.runs:
            written.append(set(batch.documents))
        write(batch)

    def slowly(run, snapshot):
        store._writer._changed.notify()  # the writer would take what there is by now
        time.sleep(2 * store._writer.LAZY_S)
        return [lm.Delivery("msg_1", "hook", "failed", run.id, "acme", time.time(), "failed", {})]

    store._writer._rows.write = look
    store.wait_durable()
    store.outbox.of_transition = slowly
    store.transition(run.id, lm.RunStatus.FAILED, finished_at=5.0, cleanup_on="one")
    assert written == [{("outbox", "msg_1"), ("cleanups", run.id)}] and store.cleanups.all() == {
        run.id: "one"
    }


# ---- one Load Manager leads on a PostgreSQL database -------------------------


@pytest.fixture
def led(postgres_url, monkeypatch):
    """led(port=None) -> a store on an empty database, over another port if given; `store.told` is
    why it does not lead any more."""
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for table in ("meta", *lm.TABLES):
            connection.execute(f"DROP TABLE IF EXISTS {table} CASCADE")
    stores = []

    def open_it(port=None):
        url = postgres_url if port is None else re.sub(r":\d+/", f":{port}/", postgres_url)
        store = lm.Store(lm.open_database(url, ""))
        store.told = []
        store._writer.on_lost = store.told.append
        stores.append(store)
        return store

    open_it.url = postgres_url
    yield open_it
    for store in stores:
        store.close()


def administer(url, sql):
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(sql).fetchall()


OURS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'loadmanager'"


def port_of(url):
    return int(re.search(r":(\d+)/", url)[1])


def test_who_lost_its_connection_to_another_never_writes_again(led, monkeypatch):
    """The first is held up while the second takes over, and finishes the first one's run."""
    with TcpProxy(port_of(led.url)) as proxy:
        first = led(proxy.port)
        run = first.add(new_run())
        first.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
        assert first.lead.is_ours
        proxy.drop()
        administer(led.url, OURS)
        second = led()
        assert second.find(run.id).status is lm.RunStatus.RUNNING
        second.transition(run.id, lm.RunStatus.FAILED, finished_at=2.0, failure_reason="by the second")
        first.transition(run.id, lm.RunStatus.STOPPING, durable=False, stop_reason="user")
        with pytest.raises(lm.NotReady):
            first.add(new_run())
        proxy.cut()
        proxy.forward()
        eventually(lambda: first.told, 15, what="the first learns that it does not lead")
        assert not first.lead.is_ours and "another Load Manager leads" in first.problem
        with pytest.raises(lm.NotReady, match="another Load Manager leads"):
            first.add(new_run())
        with pytest.raises(lm.NotReady):
            first.wait_durable()
        assert second.lead.is_ours and second.add(new_run())
        kept = administer(led.url, "SELECT record FROM runs ORDER BY seq")
        assert [json.loads(record)["status"] for (record,) in kept] == ["Failed", "Pending"]


def test_epoch_stops_a_writer_that_believes_in_its_connection(led):
    """Also where both have a good connection: the transaction itself asks for the epoch."""
    store = led()
    run = store.add(new_run())
    administer(led.url, "UPDATE meta SET value = '99.other/0' WHERE key = 'leader' RETURNING 1")
    with pytest.raises(lm.NotReady, match="another Load Manager leads"):
        store.add(new_run())
    eventually(lambda: store.told, 5)
    assert [row[0] for row in administer(led.url, "SELECT id FROM runs")] == [run.id]


def test_connection_left_in_the_middle_of_many_rows_is_made_again(led):
    """psycopg 3.2 took a connection that was cut there for a good one, that "cannot exit pipeline mode"."""
    store = led()

    def leave_busy(database):
        connection = database._connection.pgconn
        connection.enter_pipeline_mode()
        connection.send_query_params(b"SELECT 1", None)
        database.execute("SELECT 1")

    with pytest.raises(lm.NotReady, match="pipeline"):
        store._writer.read(leave_busy, 5)
    run = eventually(lambda: store.add(new_run()), 5, what="a run is taken again")
    kept = [row[0] for row in administer(led.url, "SELECT id FROM runs")]
    assert kept.count(run.id) == 1 and store.lead.is_ours


def test_connection_that_ends_is_made_again_and_leads_by_a_new_epoch(led):
    store = led()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    epoch = administer(led.url, "SELECT value FROM meta WHERE key = 'leader'")[0][0].partition(".")[0]
    for number in range(1, 6):
        store.add_snapshot(run.id, snapshot(number, 1000.0 + number), "poll")
        administer(led.url, OURS)
        eventually(lambda: store.lead.is_ours and store.problem is None, 10, what="it leads again")
    eventually(lambda: store.add(new_run()), 10)
    assert [one.requests for one in store.history.samples(run.id)] == [1, 2, 3, 4, 5], "each sample once"
    after = administer(led.url, "SELECT value FROM meta WHERE key = 'leader'")[0][0].partition(".")[0]
    assert int(after) > int(epoch) and store.told == []


def test_commit_without_an_answer_is_neither_lost_nor_done_twice(led):
    store = led()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    store.wait_durable()
    database, real = store._database, store._database.commit
    how = ["answer lost", "request lost"]

    def commit():
        if how:
            if how.pop(0) == "answer lost":
                real()
            administer(led.url, OURS)
        real()

    database.commit = commit
    for number in (1, 2):
        store.add_snapshot(run.id, snapshot(number, 1000.0 + number), "poll")
        eventually(lambda number=number: len(how) == 2 - number, 5)
        eventually(lambda: store.problem is None, 10)
    assert [one.requests for one in store.history.samples(run.id)] == [1, 2]


def test_batches_that_are_kept_for_a_failover_take_bounded_memory():
    """A run's numbers may have 500 endpoints, each a row."""
    recent, big = lm._RecentBatches(), snapshot(7, 1001.0)._replace(endpoints=("endpoint",) * 500)
    for number in range(1, 1001):
        batch = lm._Batch()
        batch.runs["r"] = lm.RunState(new_run(), lm.Numbers(big, "poll"))
        recent.add(number, batch)
    assert len(recent._kept) == recent.MAX_ROWS // 501
    assert recent.is_complete_since(970) and not recent.is_complete_since(900)


@pytest.mark.parametrize("copied", ["before the lead", "during the lead"])
def test_what_a_lagging_copy_lacks_is_written_again(tmp_path, capfd, copied):
    """PostgreSQL fails over to a copy without the last commits: a client was told that they are on disk."""
    with PostgresServer() as server, TcpProxy(server.port) as proxy:
        url = server.url(port=proxy.port)
        lm.Store(lm.open_database(url, "")).close()
        copy = server.copied() if copied == "before the lead" else None
        store = lm.Store(lm.open_database(url, ""), audit_file=str(tmp_path / "audit.log"))
        store.told = []
        store._writer.on_lost = store.told.append
        old = store.add(new_run())
        copy = copy or server.copied()
        run = store.add(new_run(), ("key", "hash"))
        store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
        store.add_snapshot(run.id, snapshot(7, 1001.0), "poll")
        store.transition(old.id, lm.RunStatus.FAILED, finished_at=2.0)
        lm.RunRemoval(store).remove(old.id)
        with copy:
            proxy.target_port = copy.port
            proxy.cut()
            eventually(lambda: "database went back" in capfd.readouterr().err, 20, what="it is logged")
            eventually(lambda: store.problem is None and store.lead.is_ours, 10, what="it leads on the copy")
            store.wait_durable()
            kept = administer(copy.url(), "SELECT id, record FROM runs")
            assert [(id_, json.loads(record)["status"]) for id_, record in kept] == [(run.id, "Running")]
            assert administer(copy.url(), "SELECT key, run_id FROM idempotency") == [("key", run.id)]
            assert [one.requests for one in store.history.samples(run.id)] == [7], "each sample once"
            assert store.add(new_run()) and store.told == []
            store.close()


def test_dropped_packets_are_noticed_refused_and_recovered_from(led):
    with TcpProxy(port_of(led.url)) as proxy:
        store = led(proxy.port)
        run = store.add(new_run())
        proxy.drop()
        eventually(lambda: store.problem, 8, what="a problem is known though nothing is written")
        eventually(lambda: not store.lead.is_ours, 10)
        for _ in range(3):
            with pytest.raises(lm.NotReady):
                store.add(new_run())
        assert [one.id for one in store.list_runs()] == [run.id], "what is in memory is answered"
        proxy.forward()
        eventually(lambda: store.problem is None, 10, what="it recovers")
        assert store.lead.is_ours and store.add(new_run()) and store.told == []


def test_program_ends_with_a_status_of_its_own_when_another_leads(load_manager, fake_locust, led):
    fake = fake_locust()
    manager = load_manager(cluster_config(fake.url), storage={"url": led.url})
    assert manager.create().status == 201
    administer(led.url, "UPDATE meta SET value = '99.other/0' WHERE key = 'leader' RETURNING 1")
    assert manager.process.wait(15) == lm.EXIT_LEAD_LOST
    assert "leads no more" in manager.log() and "Traceback" not in manager.log()


def test_database_of_another_encoding_is_refused(postgres_url):
    administer_none = lm.PostgresDatabase(postgres_url)
    administer_none.execute("DROP DATABASE IF EXISTS ascii")
    administer_none.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
    administer_none.close()
    with pytest.raises(lm.StartupError, match="its encoding is SQL_ASCII, must be UTF8"):
        lm.open_database(postgres_url.replace("/postgres", "/ascii"), "")


# ---- the file of SQLite, and what may happen to it ---------------------------


def reopened(folder):
    store = lm.Store(lm.open_database("sqlite:///data/store.db", str(folder)))
    runs = {run.id for run in store.list_runs()}
    store.close()
    return runs


@pytest.mark.parametrize("gone", ["store.db", "store.db-wal", "*", "store.db.lock"])
def test_database_that_is_deleted_under_us_is_written_again(tmp_path, gone):
    folder = tmp_path / "data"
    folder.mkdir()
    store = lm.Store(lm.open_database("sqlite:///data/store.db", str(tmp_path)))
    run = store.add(new_run())
    store.add_snapshot(run.id, snapshot(1), "poll")
    store.wait_durable()
    for path in folder.glob(gone):
        path.unlink()
    later = store.add(new_run())
    assert [one.requests for one in store.history.samples(run.id)] == [1] and store.problem is None
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy / "data")  # as kill -9 leaves it
    assert reopened(copy) == {run.id, later.id}
    with pytest.raises(lm.StartupError, match="in use by another"):
        lm.open_database("sqlite:///data/store.db", str(tmp_path))
    store.close()
    assert reopened(tmp_path) == {run.id, later.id}


def test_folder_that_is_deleted_under_us_is_a_problem_until_it_is_back(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    store = lm.Store(lm.open_database("sqlite:///data/store.db", str(tmp_path)))
    run = store.add(new_run())
    shutil.rmtree(folder)
    eventually(lambda: "is gone" in (store.problem or ""), 5, what="noticed though nothing is written")
    with pytest.raises(lm.NotReady, match="is gone"):
        store.add(new_run())
    folder.mkdir()
    eventually(lambda: store.problem is None, 5)
    later = store.add(new_run())
    store.close()
    assert reopened(tmp_path) == {run.id, later.id}


def test_database_that_was_replaced_is_not_overwritten(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    store = lm.Store(lm.open_database("sqlite:///data/store.db", str(tmp_path)))
    store.add(new_run())
    (folder / "other").write_bytes(b"restored")
    (folder / "other").rename(folder / "store.db")
    eventually(lambda: "replaced by another file" in (store.problem or ""), 5)
    with pytest.raises(lm.NotReady, match="replaced by another file"):
        store.add(new_run())
    store.close()
    assert (folder / "store.db").read_bytes() == b"restored"


@pytest.mark.parametrize("how", ["symbolic link", "hard link", "lock removed", "link to the folder"])
def test_second_load_manager_on_one_file_is_refused_by_whatever_name(tmp_path, how):
    folder = tmp_path / "data"
    folder.mkdir()
    url = "sqlite:///data/store.db"
    store = lm.Store(lm.open_database(url, str(tmp_path)))
    run = store.add(new_run())
    if how == "symbolic link":
        (tmp_path / "link.db").symlink_to(folder / "store.db")
        url = "sqlite:///link.db"
    elif how == "hard link":
        os.link(folder / "store.db", tmp_path / "link.db")
        url = "sqlite:///link.db"
    elif how == "lock removed":
        (folder / "store.db.lock").unlink()
    else:
        (tmp_path / "folder").symlink_to(folder)
        url = "sqlite:///folder/store.db"
    command = "import sys, loadmanager as lm; lm.Store(lm.open_database(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, url, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )
    assert done.returncode == 1 and "in use by another Load Manager" in done.stderr, done.stderr
    later = store.add(new_run())
    store.close()
    assert reopened(tmp_path) == {run.id, later.id}


DAMAGES = {
    "a record": lambda path: _change(path, "UPDATE runs SET record = '{' WHERE seq = 2"),
    "a schema": lambda path: _change(path, "UPDATE meta SET value = 'x' WHERE key = 'schema_version'"),
    "a newer one": lambda path: _change(path, "UPDATE meta SET value = '999' WHERE key = 'schema_version'"),
    "pages": lambda path: _overwrite(path, 4096 * 3, os.urandom(4096 * 3)),
    "the end": lambda path: _overwrite(path, path.stat().st_size - 8192, os.urandom(8192)),
    "the head": lambda path: _overwrite(path, 0, os.urandom(100)),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096),
    "an older one": lambda path: _change(
        path,
        "UPDATE meta SET value = '6' WHERE key = 'schema_version'",
        "ALTER TABLE samples DROP COLUMN avg_ms",
    ),
}


def _change(path, *statements):
    with_log = path.with_name(path.name + "-wal").exists()
    with sqlite3.connect(path) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
        if with_log:
            for end in ("", "-wal", "-shm"):  # as it is while the log of writes is not empty
                shutil.copy(f"{path}{end}", f"{path}{end}.kept")
    database.close()
    for end in ("", "-wal", "-shm"):
        if os.path.exists(f"{path}{end}.kept"):
            os.replace(f"{path}{end}.kept", f"{path}{end}")


def _overwrite(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    ("damage", "with_log"),
    # The log of writes has a whole head: with it a file with a damaged one can be read.
    [(damage, False) for damage in DAMAGES] + [(damage, True) for damage in DAMAGES if damage != "the head"],
)
def test_damaged_file_that_is_refused_is_left_as_it_was(tmp_path, damage, with_log):
    store = lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    for _ in range(20):
        store.add(new_run(metadata={"pad": "x" * 3000}))
    path = tmp_path / "store.db"
    if with_log:  # as kill -9 leaves it
        store._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        store.add(new_run())
        left = {end: Path(f"{path}{end}").read_bytes() for end in ("", "-wal")}
        store.close()
        for end, content in left.items():
            Path(f"{path}{end}").write_bytes(content)
    else:
        store.close()
    DAMAGES[damage](path)
    if not with_log:
        Path(f"{path}-wal").unlink(missing_ok=True)
        Path(f"{path}-shm").unlink(missing_ok=True)
    (tmp_path / "store.db.lock").unlink(missing_ok=True)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir() if not one.name.endswith("-shm")}
    names = {one.name for one in tmp_path.iterdir()}
    with pytest.raises(lm.StartupError):
        lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    assert {one.name for one in tmp_path.iterdir()} - {"store.db.lock"} == names
    assert {name: (tmp_path / name).read_bytes() for name in before} == before, "a file was changed"


def test_files_can_be_read_by_their_owner_only_whatever_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        (tmp_path / "old.db").write_bytes(b"")
        (tmp_path / "audit.log").write_bytes(b"")
        for name in ("new.db", "old.db"):
            database = lm.open_database(f"sqlite:///{name}", str(tmp_path))
            store = lm.Store(database, str(tmp_path / "audit.log"))
            store.add(new_run())
            store.audit.add(entry())
            store.wait_durable()
            if name == "new.db":
                (tmp_path / name).unlink()
                store.add(new_run())  # written again
            found = {one.name: oct(one.stat().st_mode & 0o777) for one in tmp_path.glob(name + "*")}
            assert len(found) == 4 and set(found.values()) == {"0o600"}, found
            store.close()
        assert (tmp_path / "audit.log").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


# ---- the clock -----------------------------------------------------------------


def test_numbers_go_on_when_the_clock_is_set_back(open_store, monkeypatch):
    clock, steady = [1_000_000.0], [500.0]
    monkeypatch.setattr(lm.time, "time", lambda: clock[0])
    monkeypatch.setattr(lm, "_monotonic_clock", lambda: steady[0])
    store = open_store()
    run = store.add(new_run(created_at=clock[0]))
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=clock[0])
    for number in range(1, 6):
        if number == 3:
            clock[0] -= 3600
        clock[0] += 0.5
        steady[0] += 0.5
        store.add_snapshot(run.id, snapshot(number, clock[0]), "poll")
        assert json.loads(store.run_json(run.id))["lastMetrics"]["totalRequests"] == number
    ended = store.transition(
        run.id, lm.RunStatus.FAILED, snapshot=snapshot(9, clock[0]), finished_at=clock[0]
    )
    samples = store.history.samples(run.id)
    assert [one.requests for one in samples] == [1, 2, 3, 4, 5, 9], "in the order in which they came"
    assert 0 <= ended.finished_at - run.created_at < 10 and samples[-1].at <= ended.finished_at + 1
    young = store.add(new_run(created_at=clock[0]))
    assert [one.id for one in store.list_runs()] == [young.id, run.id]
    assert lm.RunRemoval(store).remove_older(clock[0] - 60) == 0


def test_numbers_go_on_when_the_clock_was_set_back_while_we_were_away(open_store, monkeypatch):
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=time.time())
    store.add_snapshot(run.id, snapshot(1, time.time() + 3600), "poll")
    store.close()
    again = open_store()
    for number in (2, 3):
        assert again.add_snapshot(run.id, snapshot(number, time.time()), "poll")
        assert json.loads(again.run_json(run.id))["lastMetrics"]["totalRequests"] == number
    assert [one.requests for one in again.history.samples(run.id)] == [1, 2, 3]


# ---- the writer goes on, whatever it is given -------------------------------

BAD_NUMBERS = {
    "2^63": 2**63, "400 digits": int("9" * 400), "5000 digits": 10**5000,
    "NaN": float("nan"), "infinity": float("-inf"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_sample_that_cannot_be_written_keeps_nothing_else_from_being_written(open_store, bad, capfd):
    store = open_store()
    sick, healthy = store.add(new_run()), store.add(new_run())
    for run in (sick, healthy):
        store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    store.add_snapshot(healthy.id, snapshot(1, 1001.0), "poll")
    number = BAD_NUMBERS[bad]
    changes = {"rps": number} if isinstance(number, float) else {"requests": number}
    store.add_snapshot(sick.id, snapshot(1, 1001.0)._replace(**changes), "poll")
    store.add_snapshot(sick.id, snapshot(2, 1002.0), "poll")
    store.add_snapshot(healthy.id, snapshot(2, 1002.0), "poll")
    later = store.add(new_run())  # a create that waits is answered
    assert [one.requests for one in store.history.samples(healthy.id)] == [1, 2]
    kept = store.history.samples(sick.id)
    if isinstance(number, float):
        assert [(one.requests, one.rps) for one in kept] == [(1, None), (2, 3.5)]
    else:
        assert [one.requests for one in kept] == [2] and store.rows_left_out == 1
        told = capfd.readouterr().err
        assert "row cannot be written" in told and sick.id in told and "samples" in told
    assert store.problem is None and b"lastMetrics" in store.run_json(sick.id)
    store.close()
    again = open_store()
    assert {run.id for run in again.list_runs()} == {sick.id, healthy.id, later.id}


def test_text_and_numbers_that_json_has_not_do_not_keep_a_run_from_being_kept(open_store):
    store = open_store()
    odd = {"name": "a\ud800b", "n": float("nan"), "deep": [{"x": float("inf")}], "long": 10**5000}
    run = store.add(new_run(metadata=odd))
    store.keep_attachment(run.id, "a", b"x")
    row = lm.EndpointStats("GET", "/\udfff", 1, 0, 1.5, 1, 2, 1, 3.5, 2, None)
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    store.add_snapshot(run.id, snapshot(1, float("nan"))._replace(endpoints=(row,)), "poll")
    store.transition(run.id, lm.RunStatus.FAILED, finished_at=2.0, failure_reason="\udc80 text")
    shown = json.loads(store.run_json(run.id))
    assert shown["status"] == "Failed" and shown["metadata"]["n"] is None and shown["lastMetrics"]
    store.close()
    again = open_store()
    assert json.loads(again.run_json(run.id)) == shown


def test_a_poisoned_row_of_each_kind_leaves_all_other_rows(open_store):
    """Each row is of its own: a schedule, a delivery, an attachment, a key, an audit entry."""
    store = open_store()
    run = store.add(new_run())
    with store._lock, store._writer.one_commit():
        bad = "\ud800"
        store.schedules.keep(bad, "{}")
        store.keep_attachment(run.id, bad, b"x")
        store._writer.save_key(bad, ("hash", run.id, 1.0))
        store.audit.add(entry(detail=bad))
        store._writer.save_document("outbox", "bad", (1.0, object()))
        store._writer.save_baseline(("a", "b", bad), lm.Baseline("a", "b", bad, run.id, 1.0, "me"))
        bad_point = lm.HistogramPoint(1.0, {None: object()})
        store._writer.add_sample(lm.sample_of(run.id, snapshot(1), "poll"), None, bad_point, True)
        store.schedules.keep("good", "{}")
        store.keep_attachment(run.id, "good", b"good")
        store._writer.save_key("good", ("hash", run.id, time.time()))
        store.audit.add(entry("good"))
    store.transition(run.id, lm.RunStatus.FAILED, finished_at=1.0)
    assert store.rows_left_out == 7 and store.problem is None
    assert store.history.attachment(run.id, "good") == b"good"
    store.close()
    again = open_store()
    assert again.schedules.at_start() == ["{}"] and again.idempotency.recall("good", time.time()) == (
        "hash",
        run.id,
    )
    assert [one.who for _, one in again.audit.entries(lm.AuditFilter(), lm.EVERYTHING, 9)] == ["good"]
    assert again.find(run.id).status is lm.RunStatus.FAILED


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), SystemExit(3), AttributeError("y")])
@pytest.mark.parametrize("where", ["begin", "commit", "check"])
def test_no_error_ends_the_thread_that_writes(tmp_path, monkeypatch, error, where):
    monkeypatch.setattr(lm.DatabaseWriter, "CHECK_S", 0.1)
    store = lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    store.add_snapshot(run.id, snapshot(1), "poll")
    store.wait_durable()
    database, failures = store._database, []
    real = getattr(database, where)

    def fail(*given):
        if len(failures) < 1:
            failures.append(1)
            raise error
        return real(*given)

    setattr(database, where, fail)
    store.add_snapshot(run.id, snapshot(2), "poll")
    eventually(lambda: failures, 5)
    eventually(lambda: store.problem is None, 5, what="it goes on")
    assert store.add(new_run()).id
    assert [one.requests for one in store.history.samples(run.id)] == [1, 2], "each sample once"
    store.close()


def test_create_whose_row_cannot_be_written_is_answered_and_not_kept(open_store, monkeypatch):
    store = open_store()
    real = lm.RunState.row

    def row(state):
        if state.run.scenario_id == "poison":
            raise ValueError("no row of it")
        return real(state)

    monkeypatch.setattr(lm.RunState, "row", row)
    with pytest.raises(lm.NotReady, match="no row of it"):
        store.add(new_run(scenario_id="poison"), ("key", "hash"))
    assert store.idempotency.recall("key", time.time()) is None and store.list_runs() == []
    run = store.add(new_run())
    store.close()
    again = open_store()
    assert [one.id for one in again.list_runs()] == [run.id]
    assert again.idempotency.recall("key", time.time()) is None


def test_key_of_a_create_that_could_not_be_written_is_not_kept(tmp_path):
    """The disk is full while the create waits, and has room again afterwards."""
    store = lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    database, full = store._database, [True]
    real = database.execute_many

    def execute_many(sql, rows):
        if full[0]:
            raise database._sqlite3.OperationalError("database or disk is full")
        real(sql, rows)

    database.execute_many = execute_many
    with pytest.raises(lm.NotReady, match="disk is full"):
        store.add(new_run(), ("key", "hash"))
    with pytest.raises(lm.NotReady, match="disk is full"):
        store.add(new_run(), ("key", "hash"))
    full[0] = False
    eventually(lambda: store.problem is None, 5)
    store.wait_durable()
    assert database.query("SELECT * FROM idempotency") == [] == database.query("SELECT * FROM runs")
    assert store.idempotency.recall("key", time.time()) is None
    assert store.add(new_run(), ("key", "hash"))
    store.close()


def test_reading_that_fails_does_not_write_the_batch_twice(open_store):
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    store.add_snapshot(run.id, snapshot(1), "poll")
    with pytest.raises(lm.NotReady, match="no such|does not exist"):
        store._writer.read(lambda database: database.query("SELECT * FROM nowhere"))
    assert len(store.history.samples(run.id)) == 1 and store.problem is None


# ---- what is final is shown when it is on disk -------------------------------


def slow_down(store, seconds):
    """Each COMMIT takes so long."""
    database = store._database
    real = database.commit

    def commit():
        time.sleep(seconds)
        real()

    database.commit = commit


def test_final_state_is_shown_when_it_is_on_disk_and_not_before(tmp_path):
    """As a reader of the file sees it, who is as far as the next process after kill -9."""
    path = tmp_path / "store.db"
    store = lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1.0)
    store.add_snapshot(run.id, snapshot(1, 5.0), "poll")
    store.transition(run.id, lm.RunStatus.STOPPING, stop_reason="user")
    before = store.run_json(run.id)
    told, too_early, seen = [], [], []
    store.listeners.append(lambda changed: told.append(json.loads(store.run_json(changed.id))["status"]))
    store.outbox.of_transition = lambda run, numbers: [
        lm.Delivery("msg_1", "hook", "finished", run.id, "acme", time.time(), "finished", {})
    ]
    slow_down(store, 0.5)

    def on_disk():
        with sqlite3.connect(path) as reader:
            return json.loads(reader.execute("SELECT record FROM runs").fetchone()[0])["status"]

    def end():
        store.transition(
            run.id, lm.RunStatus.FINISHED, snapshot=snapshot(9, 10.0), finished_at=10.0, verdict="passed"
        )

    thread = threading.Thread(target=end)
    thread.start()
    eventually(lambda: store.find(run.id).is_final, 5)
    with pytest.raises(lm.Conflict):
        store.transition(run.id, lm.RunStatus.FINISHED)  # those who decide see the newest
    while thread.is_alive():
        views = (
            store.run_json(run.id),
            store.brief(run.id),
            b"".join(store.list_json(lm.RunFilter(), 9, None)[0][0]),
        )
        statuses = {json.loads(view)["status"] for view in views} | {store.list_runs()[0].status.value}
        statuses |= {"Finished"} if store.outbox.waiting("hook") else set()
        if "Finished" in statuses and on_disk() != "Finished":
            too_early.append(statuses)
        if views[0] == before:
            seen.append(views[0])
        time.sleep(0.005)
    thread.join()
    assert too_early == [] and len(seen) > 10, "the state before was shown meanwhile"
    final = json.loads(store.run_json(run.id))
    assert (final["status"], final["lastMetrics"]["totalRequests"]) == ("Finished", 9)
    assert told[-1] == "Finished" and "Finished" not in told[:-1]
    assert [one.id for one in store.outbox.waiting("hook")] == ["msg_1"]
    store.close()


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import loadmanager
commit = loadmanager.SqliteDatabase.commit
def slow(self):
    time.sleep({seconds})
    commit(self)
loadmanager.SqliteDatabase.commit = slow
sys.argv[0] = "loadmanager.py"
sys.exit(loadmanager.main())
"""


@pytest.mark.parametrize("kill_when", ["seen final", "stop answered"])
def test_what_was_seen_is_the_same_after_kill_9_with_a_slow_database(tmp_path, fake_locust, kill_when):
    fake = fake_locust()
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT), seconds=0.7))
    manager = LoadManager(tmp_path, base_config(cluster_config(fake.url)))
    fast = manager._command
    manager._command = [sys.executable, str(script)]
    try:
        manager.start()
        run_id = manager.create().json["id"]
        eventually(lambda: manager.run(run_id).get("lastMetrics"), 10)
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(manager.post(f"/v1/tests/{run_id}/stop").status)
        )
        thread.start()
        if kill_when == "stop answered":
            thread.join()
            assert answers == [200]
            seen = manager.run(run_id)
        else:
            seen = eventually(lambda: (r := manager.run(run_id))["status"] == "Finished" and r, 20, 0.005)
            thread.join()
        manager.kill9()
        manager._command = fast
        manager.start()
        after = manager.wait_for(run_id, "Finished")
        assert after["stopReason"] == "user"
        if seen["status"] == "Finished":
            assert after == seen
    finally:
        manager.end()


def test_new_run_is_shown_when_it_is_on_disk(tmp_path):
    store = lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    slow_down(store, 0.5)
    thread = threading.Thread(target=lambda: store.add(new_run()))
    thread.start()
    eventually(lambda: store.active_runs(), 5)
    assert store.list_runs() == [] and store.list_json(lm.RunFilter(), None, None) == ([], None)
    with pytest.raises(lm.NotFound):
        store.run_json(store.active_runs()[0].id)
    thread.join()
    assert len(store.list_runs()) == 1
    store.close()


def test_writer_that_is_late_is_not_healthy(tmp_path, monkeypatch):
    monkeypatch.setattr(lm.DatabaseWriter, "LATE_S", 0.2)
    store = lm.Store(lm.open_database("sqlite:///store.db", str(tmp_path)))
    assert store.problem is None
    slow_down(store, 1.0)
    thread = threading.Thread(target=lambda: store.add(new_run()))
    thread.start()
    eventually(lambda: "has not answered for" in (store.problem or ""), 5)
    thread.join()
    eventually(lambda: store.problem is None, 5)
    store.close()


def test_clock_set_back_shortens_no_run_and_lengthens_none(open_store, monkeypatch):
    """Adopted with at most its duration, whatever the wall clock says."""
    store = open_store()
    run = store.add(new_run())
    in_an_hour = time.time() + 3600  # our clock was an hour ahead
    run = store.transition(run.id, lm.RunStatus.RUNNING, started_at=in_an_hour)
    config = lm.Config(
        clusters=(lm.ClusterConfig(id="one", tenant_id="acme", env_id="dev", base_url="http://127.0.0.1:1"),)
    )
    timer = lm.Timer()
    engine = lm.Orchestrator(config, store, timer)
    adopter = engine._adopter
    adopter._adopt(run, adopter._take_over(run))
    assert engine._monitors[run.id].load.remaining_s() <= 60
    engine._monitors[run.id].threads.over.set()


def test_program_runs_on_postgresql_and_finds_its_runs_again(load_manager, fake_locust, postgres_url):
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for table in ("meta", *lm.TABLES):
            connection.execute(f"DROP TABLE IF EXISTS {table} CASCADE")
    fake = fake_locust()
    manager = load_manager(cluster_config(fake.url), storage={"url": postgres_url})
    run_id = manager.create().json["id"]
    eventually(lambda: manager.run(run_id).get("lastMetrics"), 10)
    manager.kill9()
    manager.restart()
    assert manager.run(run_id)["status"] == "Running"
    assert manager.post(f"/v1/tests/{run_id}/stop").status == 200


@pytest.mark.parametrize("words", [[], ["check"]])
def test_missing_psycopg_is_named(tmp_path, words):
    (tmp_path / "config.json").write_text(
        lm.dump_json(base_config(storage={"url": "postgresql://lm:secret@127.0.0.1:1/x"}))
    )
    command = [
        sys.executable,
        "-I",
        "-S",
        str(ROOT / "loadmanager.py"),
        *words,
        "-config",
        str(tmp_path / "config.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode in (1, 2) and "psycopg" in done.stderr and "Traceback" not in done.stderr


def test_postgresql_that_does_not_answer_is_one_line_without_the_password(tmp_path):
    (tmp_path / "config.json").write_text(
        lm.dump_json(base_config(storage={"url": "postgresql://lm:secret@127.0.0.1:1/x"}))
    )
    command = [sys.executable, str(ROOT / "loadmanager.py"), "-config", str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (
        done.returncode == 1
        and "secret" not in done.stderr
        and "Traceback" not in done.stderr
        and "127.0.0.1" in done.stderr
    )


def test_transition_whose_notifications_fail_is_not_made_and_is_told_when_tried_again(open_store):
    store = open_store()
    run = store.add(new_run())
    told = lm.Delivery("msg_1", "hook", "failed", run.id, "acme", time.time(), "failed", {"a": 1})
    outcomes = [ZeroDivisionError("nobody foresaw this"), [told]]

    def deliveries(run, snapshot):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    store.outbox.of_transition = deliveries
    with pytest.raises(ZeroDivisionError):
        store.transition(run.id, lm.RunStatus.FAILED, failure_reason="x")
    assert store.find(run.id).status is lm.RunStatus.PENDING
    store.transition(run.id, lm.RunStatus.FAILED, failure_reason="x")
    assert [one.id for one in store.outbox.newest(9)] == ["msg_1"]


def test_what_a_delivery_told_is_kept_until_it_ended_and_no_longer(open_store):
    """2,000 ended ones are kept: with a comparison in each that was 75 MiB."""
    store = open_store()
    one = lm.Delivery(
        "msg_1", "hook", "failed", "r", "acme", time.time(), "failed", {"comparison": "x" * 999}
    )
    store.outbox.keep(one)
    store.outbox.keep(one._replace(ended_at=time.time()))
    assert [kept.facts for kept in store.outbox.newest(9)] == [{}]
    store.close()
    assert [(kept.title, kept.facts) for kept in open_store().outbox.newest(9)] == [("failed", {})]
