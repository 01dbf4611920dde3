"""What README.md shows works: its examples are run as they stand, its tables are the program's own."""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import loadmanager
from target import Target
from waiting import eventually

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def shipped_program(tmp_path):
    """The program with the shipped config.yaml, on a free port and with a database of its own; yields its URL."""
    with Target() as target:
        environment = {
            **os.environ,
            "TARGET_URL": target.url,
            "LOADMANAGER_SERVER_PORT": "0",
            "LOADMANAGER_STORAGE_URL": f"sqlite:///{tmp_path}/readme.db",
        }
        log_file = tmp_path / "log"
        with log_file.open("w") as log:
            program = subprocess.Popen(
                [sys.executable, "loadmanager.py", "-config", "config.yaml"], cwd=ROOT, env=environment, stderr=log
            )
        try:
            listening = eventually(lambda: re.search(r"listening url=(\S+)", log_file.read_text()), 20, what="the program listens")
            yield listening.group(1)
        finally:
            program.send_signal(signal.SIGTERM)
            program.wait(10)


def test_every_example_of_the_api_works_as_it_stands(shipped_program, tmp_path):
    script = re.search(r"## The API by example.*?```bash\n(.*?)```", README, re.S).group(1)
    script = script.replace("http://127.0.0.1:8080", shipped_program).replace("curl -sS ", "curl -sS --fail-with-body ")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"an example failed:\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    assert '"status":"Running"' in done.stdout, "the created run did not answer Running"
    assert '"status":"Pending"' in done.stdout, "the second run did not wait in the queue"
    assert "Test stopped successfully" in done.stdout, "the stop was not confirmed"
    assert done.stdout.rstrip().endswith('{"status":"healthy"}'), "the last example is not the health check"


def test_every_example_of_the_command_line_works_as_it_stands(shipped_program, tmp_path):
    script = re.search(r"## Command line.*?```bash\n(.*?)```", README, re.S).group(1)
    script = script.replace("http://127.0.0.1:8080", shipped_program).replace("-d 5m", "-d 4s")
    script = script.replace("python loadmanager.py", f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'loadmanager.py'))}")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"an example failed:\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    assert "Finished (duration)" in done.stdout and "is stopped" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert json.loads((tmp_path / "run.json").read_text())["stopReason"] == "user"


def test_tables_of_the_command_line_are_the_program_s():
    section = re.search(r"\n## Command line\n(.*?)\n## ", README, re.S).group(1)
    shown = set(re.findall(r"^\| `([^`]+)` \| (.*?) \|", section, re.M))
    real = {(command.name, command.about) for command in loadmanager.COMMANDS}
    real |= {(str(number), about) for number, about in loadmanager.EXITS.items()} | set(loadmanager.VARIABLES.items())
    assert shown == real, f"only in README: {shown - real}; missing in README: {real - shown}"


def test_table_of_routes_is_the_route_table():
    shown = set(re.findall(r"^\| `([A-Z]+) (/\S*)` \| (\w+) \|", README, re.M))
    real = {(route.method, route.path, route.access) for route in loadmanager.ROUTES}
    assert shown == real, f"only in README: {shown - real}; missing in README: {real - shown}"


def test_table_of_configuration_keys_is_the_program_s():
    shown = set(re.findall(r"^\| `([a-zA-Z\[\].]+)` \| (?:`[^`]*`|required|) ?\| ", README, re.M))
    real = {path for path, _ in loadmanager.config_keys()}
    assert shown == real, f"only in README: {shown - real}; missing in README: {real - shown}"
