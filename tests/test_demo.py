"""What `make demo` says at its end is true: its command serves the demo's database."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from urllib.parse import urlsplit

import demo
from conftest import ROOT
from locust_process import find_free_port
from waiting import eventually


def answered(address: str, token: str) -> list | None:
    """The runs that are served there, or None while nobody listens."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    try:
        connection.request("GET", "/v1/tests", headers={"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return json.loads(response.read())
    except ConnectionRefusedError:
        return None
    finally:
        connection.close()


def test_command_at_the_end_of_the_demo_serves_its_run_at_the_address_with_the_token(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "FOLDER", tmp_path / ".demo")
    (tmp_path / "locust").symlink_to(ROOT / "locust")
    (tmp_path / "loadmanager.py").symlink_to(ROOT / "loadmanager.py")
    started: list[demo.Program] = []
    monkeypatch.setattr(demo, "DURATION_S", 2)
    try:
        demo.demo(started)
    finally:
        for program in reversed(started):
            program.end()
    told = demo.how_to_see_it().replace("8080", str(find_free_port()))
    command = re.search(r"^  (LOADMANAGER_SERVER_PORT=.*)$", told, re.M).group(1)
    address, token = re.search(r"at (http://\S+) with the token (\S+)$", told).groups()
    command = command.replace(".venv/bin/python", sys.executable)
    server = subprocess.Popen(
        ["sh", "-c", f"{command.replace('LOADMANAGER', 'exec env LOADMANAGER', 1)}"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        runs = eventually(lambda: answered(address, token), 20, what="the demo's run is served")
    finally:
        server.terminate()
        server.wait(15)
    assert [run["scenarioId"] for run in runs] == ["demo"]
