"""Backup of a database that is in use, and restore of it: what is refused leaves everything as it was."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, cluster_config
from control_plane import ControlPlane


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
