"""`migrate`: everything of one database in another, and a Load Manager that serves the same from it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import psycopg
import pytest
import year
from conftest import ROOT, cluster_config
from control_plane import ControlPlane
from test_store import entry, new_run, postgres_url  # noqa: F401 - a fixture
from waiting import eventually

import loadmanager as lm


@pytest.fixture
def target(postgres_url):  # noqa: F811
    """An empty database of a real PostgreSQL."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS moved WITH (FORCE)")
        connection.execute("CREATE DATABASE moved")
    return postgres_url.replace("/postgres", "/moved")


@pytest.fixture
def filled(tmp_path):
    """A SQLite file with rows in every table; its URL and the ids of its runs."""
    store = lm.Store(lm.open_database("sqlite:///full.db", str(tmp_path)))
    runs = [year.kept_run(store, 1_700_000_000.0 + 1000 * n, random.Random(n), 40 + 30 * n) for n in range(3)]
    lm.HistoryThinner(store).thin_run(runs[0], 10)
    keyed = store.add(new_run(tenant_id="t", env_id="e"), ("key-1", "hash"))
    store.transition(
        keyed.id,
        lm.RunStatus.FAILED,
        failure_reason="odd \u2713 ' \\ %s ?",
        finished_at=5.0,
        cleanup_on="one",
    )
    failure = {"method": "GET", "name": "/a", "error": "500 \u2713", "occurrences": 3}
    kept = {"failures": [failure], "exceptions": []}
    store.keep_attachment(runs[1].id, lm.FAILURES, lm.dump_json(kept).encode())
    store.baselines.name(lm.Baseline("acme", "dev", "browse", runs[1].id, 11.0, "me"))
    for number in range(450):
        store.audit.add(entry(who=f"user-{number}", at=time.time()))
    planned = lm.Schedule("nightly", "t", "e", {}, 1.0, "me", run_at=2.0, paused=True)
    store.schedules.keep("nightly", lm.schedule_to_record(planned))
    store.outbox.keep(lm.Delivery("msg_1", "hook", "failed", keyed.id, "t", 1.7e9, "failed", {"a": 1}))
    store.wait_durable()
    store.close()
    return f"sqlite:///{tmp_path}/full.db", [*(run.id for run in runs), keyed.id]


def migrate(source, target, *more):
    words = ["migrate", "--from", source, "--to", target, *more]
    return subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), *words], capture_output=True, text=True, timeout=120
    )


def rows(url):
    """All of each table but `meta`, whatever database it is in."""
    found = {}
    with closing(
        sqlite3.connect(url[10:]) if url.startswith("sqlite") else psycopg.connect(url)
    ) as connection:
        for table, columns in lm.TABLES.items():
            found[table] = sorted(
                connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall(), key=repr
            )
    return found


def refused(done, words):
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def served(folder, url, fake, ids):
    folder.mkdir(exist_ok=True)
    clusters = [cluster_config(fake.url, tenantId="t", envId="e")]
    with ControlPlane(
        folder, clusters, storage={"url": url, "retentionDays": 0, "thinAfterDays": 0, "thinMoreAfterDays": 0}
    ) as plane:
        found = {}
        for one in ids:
            for what in ("", "/metrics.csv", "/export", "/histograms", "/failures"):
                answer = plane.get(f"/v1/tests/{one}{what}")
                found[one, what] = answer.status, re.sub(rb'"exportedAt": ?"[^"]*"', b"", answer.body)
        found["audit"] = plane.get("/v1/audit?limit=500&who=user-3").body
        found["list"] = plane.get("/v1/tests").body
        return found


def test_everything_is_in_postgresql_and_back_and_is_served_the_same(tmp_path, filled, target, fake):
    source, ids = filled
    assert all(rows(source).values()), "a table is empty, so that its copy proves nothing"
    before = rows(source)
    done = migrate(source, target)
    assert done.returncode == 0 and "every row is there" in done.stdout, done
    print(done.stdout)
    for table, content in before.items():
        line = next(line.split() for line in done.stdout.splitlines() if line.startswith(table + " "))
        assert line[1:] == [str(len(content)), str(len(content)), "0", str(len(content))], line
    assert rows(target) == before == rows(source)
    again = migrate(source, target)
    assert again.returncode == 0 and "nothing was changed" in again.stdout, again
    assert rows(target) == before
    back = migrate(target, f"sqlite:///{tmp_path}/back.db")
    assert back.returncode == 0 and rows(f"sqlite:///{tmp_path}/back.db") == before, back
    first = served(tmp_path / "a", source, fake, ids)
    assert sum(status == 200 for status, _ in list(first.values())[:-2]) >= 4 * 3, first
    assert served(tmp_path / "b", target, fake, ids) == first


def test_one_that_was_killed_goes_on_and_nothing_serves_from_half_of_it(tmp_path, filled, target):
    source, _ = filled
    words = ["migrate", "--from", source, "--to", target]
    program = subprocess.Popen(
        [sys.executable, "-c", KILLED_AFTER_SAMPLES, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert program.wait(60) == -signal.SIGKILL
    kept = rows(target)
    assert kept["samples"] and not kept["runs"]

    def opened():
        with pytest.raises(lm.StartupError, match="holds a part of .*interrupted; run it again"):
            lm.Store(lm.open_database(target, ""))
        return True

    eventually(opened, what="a part of a database is refused")
    done = migrate(source, target)
    assert done.returncode == 0, done
    line = next(line.split() for line in done.stdout.splitlines() if line.startswith("samples "))
    assert line[2] == "0" and line[3] == line[1], "what was there was copied again"
    assert rows(target) == rows(source)
    lm.Store(lm.open_database(target, "")).close()


KILLED_AFTER_SAMPLES = """
import os, signal, sys
import loadmanager as lm
copy_rows = lm.DatabaseCopy._copy_rows
lm.DatabaseCopy._copy_rows = lambda *words: os.kill(os.getpid(), signal.SIGKILL)
lm.main(sys.argv[1:])
"""


def test_databases_that_are_in_use_are_refused(filled, target, tmp_path):
    source, _ = filled
    for used, other in ((source, target), (target, source)):
        store = lm.Store(lm.open_database(used, ""))
        try:
            refused(migrate(used, other), "is in use by another Load Manager")
            refused(migrate(other, used), "is in use by another Load Manager")
        finally:
            store.close()


def test_a_target_with_other_runs_is_refused_unless_told(filled, target):
    source, _ = filled
    store = lm.Store(lm.open_database(target, ""))
    other = store.add(new_run())
    store.close()
    before = rows(target)
    refused(migrate(source, target), "--replace")
    assert rows(target) == before
    done = migrate(source, target, "--replace")
    assert done.returncode == 0 and rows(target) == rows(source), done
    assert other.id not in json.dumps(rows(target)["runs"])


def test_a_run_that_changed_in_the_target_is_not_overwritten(filled, target):
    source, ids = filled
    assert migrate(source, target).returncode == 0
    store = lm.Store(lm.open_database(target, ""))
    lm.HistoryThinner(store).thin_run(store.get(ids[2]), 60)
    store.close()
    before = rows(target)
    refused(migrate(source, target), "has otherwise")
    assert rows(target) == before


def dumped(path):
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("version", [3, 999])
def test_another_schema_is_refused_and_left_alone(filled, target, tmp_path, where, version):
    source, _ = filled
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        connection.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(version),))
    before = dumped(path)
    other = f"sqlite:///{path}"
    done = migrate(other, target) if where == "source" else migrate(source, other)
    refused(done, f"has schema {version}")
    assert str(path) in done.stderr and dumped(path) == before


def test_words_that_name_no_two_databases_are_one_line(filled, tmp_path):
    source, _ = filled
    refused(migrate(source, source), "two databases")
    refused(migrate("memory:", source), "--from must be")
    refused(migrate("mysql://x", source), "--from must be")
    refused(migrate(f"sqlite:///{tmp_path}/none.db", source), "does not exist")
    refused(migrate(source, "postgresql://lm:secret@127.0.0.1:1/x"), "127.0.0.1")
    assert "secret" not in migrate(source, "postgresql://lm:secret@127.0.0.1:1/x").stderr
    assert not os.path.exists(tmp_path / "none.db")
