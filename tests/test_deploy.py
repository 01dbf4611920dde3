"""The systemd unit: what it starts serves, and what it may touch is little."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from conftest import API_TOKEN, ROOT, base_config
from locust_process import find_free_port
from waiting import eventually

UNIT = (ROOT / "deploy" / "loadmanager.service").read_text()


def unit_value(key: str) -> str:
    return re.search(rf"^{key}=(.*)$", UNIT, re.M).group(1)


def installed(folder: Path, key: str) -> list[str]:
    """The unit's command for an installation in this folder, with this Python."""
    command = unit_value(key).replace("/opt/loadmanager", str(folder))
    return shlex.split(command.replace("/usr/bin/python3", sys.executable))


def test_units_command_serves_and_leaves_bytecode_for_the_next_start(tmp_path):
    shutil.copy(ROOT / "loadmanager.py", tmp_path)
    port = find_free_port()
    config = base_config(server={"port": port})
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    working_folder = unit_value("WorkingDirectory").replace("/opt/loadmanager", str(tmp_path))
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            installed(tmp_path, "ExecStart"), cwd=working_folder, env=environment, stderr=log
        )
    try:
        is_up = eventually(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5), 20)
        assert json.load(is_up) == {"status": "healthy"}
        environment["LOADMANAGER_TOKEN"] = API_TOKEN
        reload = installed(tmp_path, "ExecReload")
        answer = subprocess.run(reload, cwd=working_folder, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
    finally:
        server.terminate()
        assert server.wait(10) == 0, (tmp_path / "log").read_text()
    assert list(tmp_path.glob("__pycache__/loadmanager.*.pyc")), "no bytecode: each start compiles anew"


def test_units_exposure_is_ok_for_systemd():
    unit = ROOT / "deploy" / "loadmanager.service"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    told = subprocess.run(command, capture_output=True, text=True)
    exposure = re.search(r"Overall exposure level for loadmanager.service: ([\d.]+) (\w+)", told.stdout)
    assert exposure and exposure.group(2) == "OK", told.stdout[-2000:] + told.stderr


def test_server_started_as_a_script_gives_the_compilers_memory_back_and_keeps_its_process_id(tmp_path):
    program = tmp_path / "bin" / "lm of mine.py"
    program.parent.mkdir()
    shutil.copy(ROOT / "loadmanager.py", program)
    (tmp_path / "queue.py").write_text("raise SystemExit('a module of the working directory was taken')")
    port = find_free_port()
    (tmp_path / "config.json").write_text(json.dumps(base_config(server={"port": port})))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-X", "utf8", "bin/lm of mine.py", "-config", "config.json"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log)
    try:
        eventually(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5), 20)
        started = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
        assert started[1:4] == [b"-X", b"utf8", b"-c"], started
        assert started[-4:-1] == [str(program).encode(), b"-config", b"config.json"]
    finally:
        server.terminate()
        assert server.wait(10) == 0, (tmp_path / "log").read_text()


def test_server_whose_bytecode_cannot_be_kept_serves_as_a_script(tmp_path):
    port = find_free_port()
    (tmp_path / "config.json").write_text(json.dumps(base_config(server={"port": port})))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPYCACHEPREFIX"] = "/proc/nowhere"
    command = [sys.executable, str(ROOT / "loadmanager.py"), "-config", "config.json"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log)
    try:
        eventually(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5), 20)
        assert Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")[1].endswith(b"loadmanager.py")
    finally:
        server.terminate()
        assert server.wait(10) == 0, (tmp_path / "log").read_text()
