"""Installations that are broken in one way each: `doctor` says what is broken, and what to do. A table of
what it said is printed at the end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, base_config, cluster_config
from fake_locust import FakeLocust
from locust_process import find_free_port

import loadmanager


class Broken(NamedTuple):
    """An installation with one fault, and what must be said of it."""

    name: str
    breaks: Callable[[Any], Any]  # what of a Site
    status: int
    level: str
    subject: str
    found: str
    advice: str


class Site:
    """A good installation in a folder, which one function breaks; `prepare` is done within a mount
    namespace of its own, where a small or read-only disk can be had without harm."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "config.json"
        self.config = base_config()
        self.text: str | None = None
        self.mode = 0o600
        self.python = [sys.executable]
        self.prepare = ""
        self.closing: list[Callable[[], Any]] = []

    def cluster(self, **how: Any) -> FakeLocust:
        fake = FakeLocust(**how).start()
        self.closing.append(fake.close)
        self.config["locustClusters"] = [cluster_config(fake.url)]
        return fake

    def disk(self, options: str, then: str = "true") -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        self.config["storage"] = {"url": f"sqlite:///{disk}/runs.db"}
        self.prepare = f"mount -t tmpfs -o {options} tmpfs {disk} && cd {disk} && {then} && cd / && "

    def examine(self) -> tuple[int, list[dict[str, Any]]]:
        if self.path.suffix == ".json" or self.text is not None:
            self.path.write_text(json.dumps(self.config) if self.text is None else self.text)
            self.path.chmod(self.mode)
        words = [*self.python, str(ROOT / "loadmanager.py"), "doctor", "--json", "-config", str(self.path)]
        if self.prepare:
            words = ["unshare", "-rm", "sh", "-c", self.prepare + 'exec "$@"', "sh", *words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=90, cwd=self.folder)
        assert "Traceback" not in done.stderr and done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)["findings"]


def unreadable(site: Site) -> None:
    site.path = site.folder / "config.yaml"
    site.path.mkdir()


def wrong_yaml(site: Site) -> None:
    site.path, site.text = site.folder / "config.yaml", "server:\n  port: 1\n port: [\n"


def no_yaml(site: Site) -> None:
    site.path, site.text = site.folder / "config.yaml", "server: {port: 0}\n"
    site.python = [sys.executable, "-S", "-E"]


def damaged(site: Site) -> None:
    store = loadmanager.Store(loadmanager.open_database("sqlite:///runs.db", str(site.folder)))
    store.close()
    file = site.folder / "runs.db"
    with file.open("r+b") as written:
        written.seek(4096)
        written.write(b"\xee" * 8192)


def newer(site: Site) -> None:
    database = loadmanager.open_database("sqlite:///runs.db", str(site.folder))
    store = loadmanager.Store(database)
    store.history.read(lambda one: one.execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'"))
    store.close()


def taken_port(site: Site) -> None:
    stranger = socket.create_server(("127.0.0.1", 0))
    site.closing.append(stranger.close)
    site.config["server"] = {"port": stranger.getsockname()[1]}


def unreachable(site: Site) -> None:
    site.config["locustClusters"] = [cluster_config(f"http://127.0.0.1:{find_free_port()}")]


def clock_off(site: Site) -> None:
    def answer(handler: Any) -> None:
        handler.date_time_string = lambda timestamp=None: formatdate(time() - 300, usegmt=True)
        handler.answer_well("/", {})

    site.cluster().faults["/"] = answer


def old_locust(site: Site) -> None:
    page = '<script>window.templateArgs = {"version": "2.0.0"}</script>'
    site.cluster(hooks=False).faults["/"] = lambda handler: handler.send_text(200, page, "text/html")


def readable_by_others(site: Site) -> None:
    site.mode = 0o644


def postgresql_away(site: Site) -> None:
    site.config["storage"] = {"url": f"postgresql://lm:hunter2@127.0.0.1:{find_free_port()}/runs"}


FULL = "dd if=/dev/zero of=fill bs=64k count=1000 2>/dev/null; true"
INSTALLATIONS = (
    Broken(
        "configuration that cannot be read",
        unreadable,
        2,
        "problem",
        "configuration",
        "directory",
        "correct it",
    ),
    Broken("YAML with a mistake", wrong_yaml, 2, "problem", "configuration", "line", "correct it"),
    Broken(
        "PyYAML is missing", no_yaml, 2, "problem", "configuration", "needs the package PyYAML", "correct it"
    ),
    Broken(
        "database cannot be written",
        lambda site: site.disk("ro,size=200m"),
        1,
        "problem",
        "database",
        "cannot be written",
        "let the user",
    ),
    Broken(
        "database is damaged", damaged, 1, "problem", "database", "is damaged", "put a backup in its place"
    ),
    Broken(
        "database of a newer version",
        newer,
        1,
        "problem",
        "database",
        "has schema 999, must be",
        "Load Manager that wrote it",
    ),
    Broken(
        "disk is full",
        lambda site: site.disk("size=2m", FULL),
        1,
        "problem",
        "disk",
        "0 MiB are free",
        "free some space",
    ),
    Broken(
        "port is in use",
        taken_port,
        1,
        "problem",
        "port",
        "is taken by what is no Load Manager",
        "server.port",
    ),
    Broken("cluster cannot be reached", unreachable, 1, "problem", "cluster one", "refused", "start it"),
    Broken(
        "cluster without our hooks",
        lambda site: site.cluster(hooks=False),
        0,
        "warning",
        "cluster one",
        "does not have our hooks",
        "import loadmanager_hooks",
    ),
    Broken("clock is off", clock_off, 0, "warning", "cluster one", "s behind ours", "NTP"),
    Broken(
        "Locust is too old",
        old_locust,
        1,
        "problem",
        "cluster one",
        "its Locust 2.0.0 is too old",
        "pip install",
    ),
    Broken(
        "tokens that others can read",
        readable_by_others,
        0,
        "warning",
        "permissions",
        "readable by others",
        "chmod o-rwx",
    ),
    Broken(
        "PostgreSQL is away", postgresql_away, 1, "problem", "database", "cannot be used", "start the server"
    ),
)


@pytest.fixture(scope="module")
def told(request) -> Iterator[list[tuple[str, str, str]]]:
    """What was said of each installation; printed at the end, whatever pytest captures."""
    rows: list[tuple[str, str, str]] = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        for name, found, advice in rows:
            print(f"{name:<34} {found[:110]}\n{'':<34} -> {advice[:110]}")


@pytest.mark.parametrize("broken", INSTALLATIONS, ids=lambda one: one.name.replace(" ", "-"))
def test_doctor_says_what_is_broken_and_what_to_do(tmp_path, told, broken):
    site = Site(tmp_path)
    broken.breaks(site)
    try:
        status, findings = site.examine()
    finally:
        for close in site.closing:
            close()
    match = [one for one in findings if one["subject"] == broken.subject and broken.found in one["found"]]
    assert match, f"doctor does not say that {broken.name}: {findings}"
    assert match[0]["level"] == broken.level and broken.advice in (match[0]["advice"] or ""), match
    assert status == broken.status, findings
    others = [one for one in findings if one["level"] == "problem" and one not in match]
    assert not others, f"what is not broken is said to be: {others}"
    assert "hunter2" not in json.dumps(findings)
    told.append((broken.name, match[0]["found"].replace(str(tmp_path) + os.sep, ""), match[0]["advice"]))
