"""Backup of a database that is in use, and restore of it: what is refused leaves everything as it was."""

from __future__ import annotations

import json
import operator
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import fake_locust as faults
import pytest
from conftest import ROOT, cluster_config
from control_plane import ControlPlane
from waiting import eventually


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [arguments[0], "-config", str(folder / "config.json"), *arguments[1:]]
    return subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), *words], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def served(tmp_path, fake):
    folder = tmp_path / "served"
    folder.mkdir()
    with ControlPlane(folder, [cluster_config(fake.url, tenantId="t", envId="e")]) as plane:
        yield plane


def test_backup_while_serving_is_restored_into_a_fresh_folder(served, tmp_path):
    run_id = served.external_run()
    made = command(served.folder, "backup", str(tmp_path / "copy.db"))
    assert made.returncode == 0 and "1 run(s)" in made.stdout, made
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert command(served.folder, "backup", str(tmp_path / "copy.db")).returncode == 2
    assert command(served.folder, "backup", "--force", str(tmp_path / "copy.db")).returncode == 0
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text(json.dumps({**served.config, "server": {"port": 0}}))
    restored = command(fresh, "restore", str(tmp_path / "copy.db"))
    assert restored.returncode == 0, restored
    with ControlPlane(fresh) as second:
        assert second.run(run_id)["id"] == run_id


def test_restore_is_refused_while_serving_and_keeps_the_former_when_not(served, tmp_path):
    served.external_run()
    copy = str(tmp_path / "copy.db")
    assert command(served.folder, "backup", copy).returncode == 0
    refused = command(served.folder, "restore", copy)
    assert refused.returncode == 2 and "in use by another Load Manager" in refused.stderr, refused
    served.end()
    restored = command(served.folder, "restore", copy)
    assert restored.returncode == 0 and ".before-restore-" in restored.stdout, restored
    assert len(list(served.folder.glob("lm.db.before-restore-*"))) == 1


@pytest.mark.parametrize("kind", ["damaged", "foreign", "newer"])
def test_a_file_that_cannot_be_used_leaves_the_database_untouched(served, tmp_path, kind):
    copy = tmp_path / "copy.db"
    assert command(served.folder, "backup", str(copy)).returncode == 0
    served.end()
    before = (served.folder / "lm.db").read_bytes()
    if kind == "damaged":
        copy.write_bytes(copy.read_bytes()[:5000])
    else:
        change = (
            "DROP TABLE runs"
            if kind == "foreign"
            else "UPDATE meta SET value='9999' WHERE key='schema_version'"
        )
        with closing(sqlite3.connect(copy)) as connection, connection:
            connection.execute(change)
    refused = command(served.folder, "restore", str(copy))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused
    assert (served.folder / "lm.db").read_bytes() == before
    assert not list(served.folder.glob("*.part*")) and not list(served.folder.glob("*before-restore*"))


@pytest.mark.parametrize("url", ["memory:", "postgresql://u@127.0.0.1/x"])
def test_other_storage_says_what_to_use_instead(served, url):
    served.end()
    config = {**served.config, "storage": {"url": url}}
    (served.folder / "config.json").write_text(json.dumps(config))
    for name in ("backup", "restore"):
        refused = command(served.folder, name, "x.db")
        assert refused.returncode == 2 and "pg_dump / pg_restore" in refused.stderr, refused


def test_backup_into_a_missing_folder_is_one_line(served, tmp_path):
    refused = command(served.folder, "backup", str(tmp_path / "none" / "copy.db"))
    assert refused.returncode == 2 and "No such file" in refused.stderr, refused


def samples_in(path: Path, run_id: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute(
            "SELECT at, requests FROM samples WHERE run_id = ? ORDER BY at, rowid", (run_id,)
        ).fetchall()


def test_backups_during_a_stream_of_writes_hold_all_up_to_a_moment(served, fake, tmp_path):
    run_id, stop, pushed = served.external_run(), threading.Event(), []
    fake.faults["*"] = faults.close_silently  # its own numbers would contradict those that are pushed

    def push() -> None:
        while not stop.is_set():
            assert served.push(run_id, len(pushed) + 1) == 200
            pushed.append(len(pushed) + 1)

    pusher = threading.Thread(target=push)
    pusher.start()
    try:
        written = []
        for number in range(4):
            enough = len(samples_in(served.folder / "lm.db", run_id)) + 20

            def is_written(enough=enough):
                return len(samples_in(served.folder / "lm.db", run_id)) >= enough

            eventually(is_written, 60, what="numbers are written")
            written.append(enough)
            made = command(served.folder, "backup", str(tmp_path / f"{number}.db"))
            assert made.returncode == 0, made
    finally:
        stop.set()
        pusher.join()
    served.end()
    whole = samples_in(served.folder / "lm.db", run_id)
    assert len(whole) > 80 and len(pushed) > 80
    lengths = []
    for number in range(4):
        copied = samples_in(tmp_path / f"{number}.db", run_id)
        assert copied == whole[: len(copied)], "the copy is not what was there at a moment"
        lengths.append(len(copied))
    assert lengths == sorted(lengths) and all(map(operator.ge, lengths, written)), (lengths, written)
    restored = command(served.folder, "restore", str(tmp_path / "3.db"))
    assert restored.returncode == 0 and samples_in(served.folder / "lm.db", run_id) == whole[: lengths[3]]


def test_restore_over_a_damaged_database_with_a_log_keeps_both_beside_it(served, tmp_path):
    run_id = served.external_run()
    assert command(served.folder, "backup", str(tmp_path / "copy.db")).returncode == 0
    served.restart()  # so that the log holds a part of the database only
    later = [served.push(run_id, number) for number in range(1, 30)]
    assert set(later) == {200}
    eventually(
        lambda: (served.folder / "lm.db-wal").stat().st_size > 0,
        what="what was pushed is in the log of writes",
    )
    served.kill9()
    damaged = b"no database at all " * 400
    log_of_writes = (served.folder / "lm.db-wal").read_bytes()
    assert log_of_writes, "the killed server left no log, so that this test proves nothing"
    (served.folder / "lm.db").write_bytes(damaged)
    restored = command(served.folder, "restore", str(tmp_path / "copy.db"))
    assert restored.returncode == 0, restored
    former = next(served.folder.glob("lm.db.before-restore-*Z"))
    assert former.read_bytes() == damaged
    assert Path(f"{former}-wal").read_bytes() == log_of_writes
    assert not (served.folder / "lm.db-wal").exists(), "a log of another database is applied to this one"
    served.start()
    assert served.run(run_id)["id"] == run_id


def test_restore_refuses_a_database_with_a_trigger(served, tmp_path):
    """It would change what is written later."""
    copy = tmp_path / "copy.db"
    assert command(served.folder, "backup", str(copy)).returncode == 0
    served.end()
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("CREATE TRIGGER no BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'no'); END")
    refused = command(served.folder, "restore", str(copy))
    assert refused.returncode == 2 and "the trigger 'no'" in refused.stderr, refused


def test_a_newer_database_is_named(served, tmp_path):
    copy = tmp_path / "copy.db"
    assert command(served.folder, "backup", str(copy)).returncode == 0
    served.end()
    for path in (copy, served.folder / "lm.db"):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE meta SET value='9999' WHERE key='schema_version'")
    words = "has schema 9999, written by a newer Load Manager"
    assert f"{copy} {words}" in command(served.folder, "restore", str(copy)).stderr
    assert f"{served.folder / 'lm.db'} {words}" in command(served.folder, "serve").stderr
