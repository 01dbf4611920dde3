"""What a full disk leaves of a database, of its backups and of its restores: files that are whole, and words
that say so."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import ROOT, base_config

import loadmanager

PROGRAM = str(ROOT / "loadmanager.py")
# A copy that does not look first whether there is room, as when someone else fills the disk meanwhile.
UNCHECKED = """import sys, loadmanager
loadmanager._refuse_too_large = lambda *_: None
sys.exit(loadmanager.main(sys.argv[1:]))"""


@pytest.fixture
def folder(tmp_path):
    """A configuration and its database with one run."""
    made = tmp_path / "made"
    made.mkdir()
    config = {**base_config(), "storage": {"url": "sqlite:///lm.db"}}
    (made / "config.json").write_text(loadmanager.dump_json(config))
    store = loadmanager.Store(loadmanager.open_database("sqlite:///lm.db", str(made)))
    store.add(loadmanager._new_run(loadmanager.read_create(body(), ()), "test", "api"))
    store.close()
    return made


def body():
    return {"tenantId": "t", "envId": "e", "scenarioId": "s", "targetUsers": 1, "spawnRate": 1}


def fill(database: Path, samples: int, killed: bool = False) -> None:
    """Write samples of a run; `killed`: they are in the log of writes only, as a killed server leaves it."""
    lines = f"""import os, sqlite3
connection = sqlite3.connect({str(database)!r})
connection.execute("PRAGMA wal_autocheckpoint=0")
row = "INSERT INTO samples (run_id, at, source) VALUES ('r', ?, ?)"
connection.executemany(row, [(at, "x" * 1000) for at in range({samples})])
connection.commit()
{"os._exit(0)" if killed else "connection.close()"}"""
    subprocess.run([sys.executable, "-c", lines], check=True)


def count(database: Path, table: str) -> int:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]


def on_small_disk(tmp_path: Path, size_kib: int, script: str) -> tuple[CompletedProcess[str], Path]:
    """Run a script of a shell in a disk of its own, so small; how it ended, and a copy of the disk."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    words = (
        f"mount -t tmpfs -o size={size_kib}k tmpfs {disk} && cd {disk} || exit 90\n"
        f"{script}\nstatus=$?\ncp -a {disk}/. {kept}/; exit $status"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", words], capture_output=True, text=True, timeout=90)
    assert done.returncode != 90, done.stderr
    return done, kept


def test_restore_refuses_when_the_log_does_not_fit_into_the_whole_database(folder, tmp_path):
    copy = tmp_path / "copy.db"
    loadmanager.main(["backup", "-config", str(folder / "config.json"), str(copy)])
    fill(folder / "lm.db", 3000, killed=True)
    used = sum(path.stat().st_size for path in folder.iterdir()) // 1024 + 64
    room = copy.stat().st_size // 1024 + 200
    done, kept = on_small_disk(
        tmp_path,
        used + room,
        f"cp -a {folder}/. . && {sys.executable} {PROGRAM} restore -config config.json {copy}",
    )
    assert done.returncode == 1 and "the disk is full" in done.stderr, done
    assert "MiB are needed to move the log of writes into the database" in done.stderr, done.stderr
    assert (kept / "lm.db-wal").exists() and not list(kept.glob("*before-restore*")), list(kept.iterdir())
    assert (count(kept / "lm.db", "samples"), count(kept / "lm.db", "runs")) == (3000, 1)


@pytest.mark.parametrize("has_links", [True, False])
def test_restore_that_fails_at_its_last_step_leaves_database_and_log(folder, monkeypatch, has_links):
    """A damaged database is moved with its log: no log is emptied into it."""
    fill(folder / "lm.db", 10, killed=True)
    path = folder / "lm.db"
    path.write_bytes(b"no database at all " * 400)
    (folder / "copy").write_bytes(b"anything")
    before = {one.name: one.read_bytes() for one in folder.iterdir() if not one.name.endswith("-shm")}

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    held = loadmanager.HeldDatabase(str(path))
    try:
        with pytest.raises(OSError, match="No space left"):
            held.replace_by(str(folder / "copy"))
    finally:
        held.release()
    after = {one.name: one.read_bytes() for one in folder.iterdir() if not one.name.endswith("-shm")}
    after.pop("lm.db.lock")
    before.pop("lm.db.lock", None)
    assert after == before


def test_restore_refuses_a_whole_database_that_another_program_reads(folder, tmp_path):
    copy = tmp_path / "copy.db"
    loadmanager.main(["backup", "-config", str(folder / "config.json"), str(copy)])
    with closing(sqlite3.connect(folder / "lm.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM runs").fetchall()
        fill(folder / "lm.db", 10, killed=True)
        held = loadmanager.HeldDatabase(str(folder / "lm.db"))
        held._connect = lambda *args, **how: sqlite3.connect(*args, timeout=0.1, **how)
        try:
            with pytest.raises(loadmanager.StartupError, match="another program reads it"):
                held.replace_by(str(copy))
        finally:
            held.release()
    assert count(folder / "lm.db", "samples") == 10 and not list(folder.glob("*before-restore*"))


@pytest.mark.parametrize("program", [PROGRAM, "-c '" + UNCHECKED + "'"], ids=["looks first", "fills it"])
@pytest.mark.parametrize("command", ["backup", "restore"])
def test_full_disk_is_not_called_damage(folder, tmp_path, program, command):
    fill(folder / "lm.db", 3000)
    if command == "backup":
        start, arguments = "true", f"-config {folder}/config.json copy.db"
    else:
        start, arguments = f"cp {folder}/config.json .", f"-config config.json {folder}/lm.db"
    script = f"{start} && PYTHONPATH={ROOT} {sys.executable} {program} {command} {arguments}"
    done, kept = on_small_disk(tmp_path, 1024, script)
    assert done.returncode == 1 and "damaged" not in done.stderr, done
    assert f"the disk is full: {tmp_path}/disk has 1.0 MiB free, 4.0 MiB are needed" in done.stderr, (
        done.stderr
    )
    assert f" for a copy of {folder}/lm.db" in done.stderr and done.stderr.count("\n") == 1
    assert {path.name for path in kept.iterdir()} <= {"config.json", "lm.db.lock"}, list(kept.iterdir())


def test_backup_from_a_full_disk_says_which_is_full(folder, tmp_path):
    script = (
        f"cp -a {folder}/. . && rm -f lm.db-*; cat /dev/zero > filler; "
        f"{sys.executable} {PROGRAM} backup -config config.json {tmp_path}/copy.db"
    )
    done, _ = on_small_disk(tmp_path, 1024, script)
    assert done.returncode == 1 and "damaged" not in done.stderr, done
    assert f"the disk is full: {tmp_path}/disk has 0.0 MiB free" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("config.json", "lm.db.lock cannot be locked: No space left on device"),
        ("lm.db", "lm.db.lock cannot be locked: No space left on device"),
        ("lm.db.lock", "the disk is full: "),
    ],
)
def test_start_on_a_full_disk_is_refused_in_one_line(folder, tmp_path, there, words):
    files = " ".join(str(folder / name) for name in {"config.json", "lm.db", there} if there != "config.json")
    script = (
        f"cp -a {files or folder / there} . && cat /dev/zero > filler; "
        f"{sys.executable} {PROGRAM} -config config.json; status=$?; rm filler; (exit $status)"
    )
    done, kept = on_small_disk(tmp_path, 1024, script)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("cat: ")]
    assert done.returncode == 1 and len(errors) == 1 and words in errors[0], done
    if there != "config.json":
        assert count(kept / "lm.db", "runs") == 1


STUCK = """import sys, time, loadmanager
loadmanager.copy_database = lambda *_: (print("copying", flush=True), time.sleep(60))
loadmanager.main(sys.argv[1:])"""


def test_what_a_killed_backup_left_is_named_and_removed_but_not_one_at_work(folder, tmp_path):
    config, kept = str(folder / "config.json"), tmp_path / "backups"
    kept.mkdir()

    def begin(target):
        started = subprocess.Popen(
            [sys.executable, "-c", STUCK, "backup", "-config", config, str(target)],
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert started.stdout.readline() == b"copying\n"
        return started

    killed, working = begin(kept / "monday.db"), begin(kept / "tuesday.db")
    try:
        killed.kill()
        killed.wait()
        journal = kept / f"monday.db.{killed.pid}.loadmanager.part-journal"
        journal.write_bytes(b"of SQLite")
        (kept / "of-others.1.part").write_bytes(b"x")
        left = [kept / f"monday.db.{killed.pid}.loadmanager.part", journal]
        assert loadmanager.abandoned_parts(str(kept)) == [str(path) for path in left]
        [finding] = loadmanager.abandoned_findings(str(kept))
        assert finding.level == "warning" and left[0].name in finding.found, finding
        loadmanager.main(["backup", "-config", config, str(kept / "wednesday.db")])
        names = {path.name for path in kept.iterdir()}
        assert names == {"of-others.1.part", "wednesday.db", f"tuesday.db.{working.pid}.loadmanager.part"}
    finally:
        working.kill()
        working.wait()


def test_what_a_killed_restore_left_is_removed_by_the_next(folder, tmp_path):
    copy = tmp_path / "copy.db"
    config = str(folder / "config.json")
    loadmanager.main(["backup", "-config", config, str(copy)])
    left = folder / "lm.db.99999999.loadmanager.part"
    left.write_bytes(b"a part")
    assert loadmanager.main(["restore", "-config", config, str(copy)]) == 0
    assert not left.exists() and not list(folder.glob("*.part*"))
