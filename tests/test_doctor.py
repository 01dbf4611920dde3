"""`doctor` says what is wrong with an installation and what to do, changes nothing and tells no token."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from email.utils import formatdate
from time import time

import psycopg
import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, base_config, cluster_config
from fake_locust import hang
from locust_process import LocustCluster, find_free_port
from test_store import new_run, postgres_url  # noqa: F401 - a fixture

import loadmanager

LOCUST_TOKEN = "bearer-of-the-proxy-0123456789"


@pytest.fixture
def doctor(tmp_path):
    """doctor(cluster..., section={...}): exit status and findings; text= writes the file as it stands."""

    def examine(*clusters, text=None, mode=0o600, arguments=("--json",), **sections):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(base_config(*clusters, **sections)) if text is None else text)
        path.chmod(mode)
        before = sorted(os.listdir(tmp_path))
        done = subprocess.run(
            [sys.executable, str(ROOT / "loadmanager.py"), "doctor", "-config", str(path), *arguments],
            capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip
        assert sorted(os.listdir(tmp_path)) == before, "it has made or removed files"
        assert "Traceback" not in done.stderr, done.stderr
        for token in (API_TOKEN, CALLBACK_TOKEN, LOCUST_TOKEN):
            assert token not in done.stdout + done.stderr
        return done.returncode, json.loads(done.stdout)["findings"] if "--json" in arguments else done.stdout

    return examine


def of(findings, subject, level=None):
    return [
        f"{one['found']}; {one['advice']}"
        for one in findings
        if one["subject"] == subject and level in (None, one["level"])
    ]


def test_all_is_well_with_a_cluster_that_answers(doctor, fake):
    status, findings = doctor(cluster_config(fake.url))
    assert status == 0
    assert {one["level"] for one in findings} == {"ok"}, findings
    assert "2.47.0" in of(findings, "cluster one")[0] and "2 worker(s)" in of(findings, "cluster one")[0]
    assert {call.method for call in fake.calls} == {"GET"}


def test_each_finding_is_one_line(doctor, fake):
    status, text = doctor(cluster_config(fake.url), arguments=())
    assert status == 0
    assert all(line.split()[0] in ("ok", "warning", "problem") for line in text.splitlines())


def test_real_locust_with_a_worker_and_hooks(doctor):
    with LocustCluster(ROOT / "locust" / "locustfile.py", workers=1) as locust:
        status, findings = doctor(cluster_config(locust.base_url))
    assert status == 0, findings
    told = of(findings, "cluster one", "ok")
    assert "1 worker(s)" in told[0] and ": ready" in told[0]
    assert told[1].startswith("has our hooks") and told[2].startswith("its clock agrees")


def test_cluster_that_cannot_be_reached_is_a_problem(doctor, fake):
    gone = cluster_config(f"http://127.0.0.1:{find_free_port()}", "gone", envId="other")
    status, findings = doctor(cluster_config(fake.url), gone)
    assert status == 1
    assert of(findings, "cluster gone", "problem") and not of(findings, "cluster one", "problem")


def test_clusters_that_hang_are_asked_at_once(doctor, fake_locust):
    hanging = [fake_locust() for _ in range(6)]
    for fake in hanging:
        fake.faults["*"] = hang
    clusters = [
        cluster_config(fake.url, f"c{number}", envId=f"e{number}") for number, fake in enumerate(hanging)
    ]
    began = time()
    status, findings = doctor(*clusters)
    assert status == 1 and time() - began < 15
    assert all(of(findings, f"cluster c{number}", "problem") for number in range(6))


def test_missing_hooks_and_workers_are_warnings(doctor, fake_locust):
    status, findings = doctor(cluster_config(fake_locust(hooks=False).url))
    assert status == 0 and "hooks" in of(findings, "cluster one", "warning")[0]
    status, findings = doctor(cluster_config(fake_locust(workers=0).url))
    assert status == 0 and "no worker" in of(findings, "cluster one", "warning")[0]


@pytest.mark.parametrize(("ahead_s", "warns"), [(60, "ahead of"), (-60, "behind"), (2, "")])
def test_clock_that_differs_by_more_than_five_seconds_is_a_warning(doctor, fake, ahead_s, warns):
    def answer(handler):
        handler.date_time_string = lambda timestamp=None: formatdate(time() + ahead_s, usegmt=True)
        handler.answer_well("/", {})

    fake.faults["/"] = answer
    status, findings = doctor(cluster_config(fake.url))
    told = of(findings, "cluster one", "warning")
    assert status == 0 and bool(told) == bool(warns) and all(warns in text for text in told)


def test_token_that_a_proxy_sends_back_is_not_printed(doctor, fake):
    fake.faults["*"] = lambda handler: handler.send_text(403, handler.headers["Authorization"], "text/plain")
    status, findings = doctor(cluster_config(fake.url, authToken=LOCUST_TOKEN))
    assert status == 1
    assert "Bearer ***" in of(findings, "cluster one", "problem")[0]


def test_damaged_database_is_a_problem(doctor, tmp_path):
    (tmp_path / "runs.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 8192)
    (tmp_path / "runs.db").chmod(0o600)
    status, findings = doctor()
    assert status == 1 and "damaged" in of(findings, "database", "problem")[0]


def test_pages_that_were_overwritten_are_found(doctor, tmp_path):
    with sqlite3.connect(tmp_path / "runs.db") as database:
        database.execute("CREATE TABLE t (x)")
        database.executemany("INSERT INTO t VALUES (?)", [("y" * 500,) for _ in range(200)])
    database.close()
    with (tmp_path / "runs.db").open("r+b") as file:
        file.seek(4096 * 4)
        file.write(b"\xee" * 4096)
    status, findings = doctor()
    assert status == 1 and "damaged" in of(findings, "database", "problem")[0]


def test_running_load_manager_is_all_well(lm):
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "doctor", "--json", "-config",
         str(lm.folder / "config.json")], capture_output=True, text=True, timeout=60,
        env={**os.environ, "LOADMANAGER_SERVER_PORT": lm.url.rpartition(":")[2]},
    )  # fmt: skip
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 0, findings
    assert "a Load Manager answers" in of(findings, "port", "ok")[0]
    assert "is whole" in of(findings, "database", "ok")[0]


def test_port_taken_by_a_stranger_is_a_problem(doctor):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        status, findings = doctor(server={"port": stranger.getsockname()[1]})
    assert status == 1 and "is taken by what is no Load Manager" in of(findings, "port", "problem")[0]


def test_configuration_with_a_token_that_others_can_read_is_a_warning(doctor):
    status, findings = doctor(mode=0o644)
    assert status == 0 and "chmod" in of(findings, "permissions", "warning")[0]


def test_database_that_others_can_read_is_a_warning(doctor, tmp_path):
    sqlite3.connect(tmp_path / "runs.db").close()
    (tmp_path / "runs.db").touch()
    (tmp_path / "runs.db").chmod(0o644)
    status, findings = doctor()
    assert status == 0 and "runs.db is readable by others" in of(findings, "permissions", "warning")[0]


def test_every_problem_of_a_bad_configuration_is_told(doctor):
    status, findings = doctor(server={"port": "many"}, limits={"nonsense": 1})
    told = " ".join(of(findings, "configuration", "problem"))
    assert status == 1 and "server.port" in told and "limits.nonsense" in told


@pytest.mark.parametrize("text", ["{", "[]"])
def test_configuration_that_cannot_be_read_is_exit_2(doctor, text):
    status, findings = doctor(text=text)
    assert status == 2 and findings[0]["level"] == "problem"


@pytest.mark.parametrize(("free", "level"), [(2 << 30, "ok"), (500 << 20, "warning"), (50 << 20, "problem")])
def test_little_free_space_is_told(monkeypatch, tmp_path, free, level):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert loadmanager.disk_finding(str(tmp_path)).level == level


def postgres(url):
    return {"storage": {"url": url}}


def test_postgresql_is_asked_and_nothing_of_it_is_changed(doctor, postgres_url):  # noqa: F811
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS looked WITH (FORCE)")
        connection.execute("CREATE DATABASE looked")
        url = postgres_url.replace("/postgres", "/looked")
        status, findings = doctor(**postgres(url))
        told = of(findings, "database", "ok")
        assert status == 0 and "answers: PostgreSQL" in told[0] and "connections are used" in told[1], (
            findings
        )
        assert "has no tables yet" in told[2]
        with psycopg.connect(url) as looked:
            assert looked.execute(
                "SELECT COUNT(*) FROM pg_tables WHERE schemaname = 'public'"
            ).fetchone() == (0,)
        store = loadmanager.Store(loadmanager.open_database(url, ""))
        try:
            store.add(new_run())
            status, findings = doctor(**postgres(url))
            told = " ".join(of(findings, "database", "ok"))
            assert status == 0 and "a Load Manager serves from it" in told and "1 run(s)" in told, findings
            store.add(new_run())
            assert store.lead.is_ours
        finally:
            store.close()
        with psycopg.connect(url, autocommit=True) as looked:
            looked.execute("INSERT INTO artefacts VALUES ('gone', 'x', 'y')")
            status, findings = doctor(**postgres(url))
            told = of(findings, "database", "warning")
            assert status == 0 and "1 artefacts belong to none of its 2 run(s)" in told[0], findings
            looked.execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'")
            status, findings = doctor(**postgres(url))
            assert status == 1 and "has schema 999, must be" in of(findings, "database", "problem")[0], (
                findings
            )
            connection.execute("ALTER DATABASE looked CONNECTION LIMIT 1")
            looked.execute("UPDATE meta SET value = '1' WHERE key = 'schema_version'")
        status, findings = doctor(**postgres(url))
        assert "may have 1" in of(findings, "database", "warning")[0], findings


def test_files_of_secrets_are_looked_at(doctor, tmp_path):
    secret = tmp_path / "token.txt"
    secret.write_text("a-token-of-a-file-0123456789")
    security = {"apiToken": None, "apiTokenFile": "token.txt", "locustCallbackToken": CALLBACK_TOKEN}
    config = base_config()
    config["security"] = {name: value for name, value in security.items() if value}
    for mode, level, words in ((0o644, "warning", "chmod o-rwx"), (0o600, "ok", "is not readable by others")):
        secret.chmod(mode)
        status, findings = doctor(text=json.dumps(config))
        told = [text for text in of(findings, "permissions", level) if "token.txt (apiTokenFile)" in text]
        assert status == 0 and told and words in told[0], findings
        assert "a-token-of-a-file" not in json.dumps(findings)


@pytest.mark.parametrize("kind", ["missing", "without Locust", "with Locust"])
def test_python_of_a_launcher_is_asked_for_its_locust(doctor, tmp_path, kind):
    (tmp_path / "locustfile.py").write_text("")
    python = tmp_path / "python"
    if kind != "missing":
        start = "exec" if kind == "with Locust" else "exec env -i"
        more = "" if kind == "with Locust" else "-I -S"
        python.write_text(f'#!/bin/sh\n{start} {sys.executable} {more} "$@"\n')
        python.chmod(0o755)
    cluster = cluster_config(None, launcher={"locustfile": "locustfile.py", "python": str(python)})
    cluster.pop("baseUrl", None)
    status, findings = doctor(cluster)
    if kind == "with Locust":
        assert status == 0 and "with Locust 2." in of(findings, "cluster one", "ok")[0], findings
    else:
        words = "cannot be started" if kind == "missing" else "has no Locust"
        told = of(findings, "cluster one", "problem")
        assert status == 1 and words in told[0] and "launcher.python" in told[0], findings
