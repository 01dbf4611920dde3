"""Load Manager as a process that is measured: what it takes of the machine, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
API_TOKEN, CALLBACK_TOKEN = "measured-api", "measured-callback"
SECURITY = {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN}
AS_SCRIPT = (str(ROOT / "loadmanager.py"),)
AS_MODULE = ("-m", "loadmanager")
TICKS = os.sysconf("SC_CLK_TCK")


def clusters_of(ports: list[int]) -> list[dict[str, Any]]:
    """A cluster of its own environment (e0, e1...) for each port."""
    return [
        {"id": f"c{number}", "tenantId": "t", "envId": f"e{number}", "baseUrl": f"http://127.0.0.1:{port}"}
        for number, port in enumerate(ports)
    ]


def cached_environment() -> dict[str, str]:
    """The environment of a user: Python keeps its bytecode."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**environment, "PYTHONPATH": str(ROOT)}


class Program:
    """`with Program(folder, config) as program:`; its log is in folder/log."""

    def __init__(self, folder: Path, config: dict[str, Any], command: tuple[str, ...] = AS_SCRIPT):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = {"server": {"port": 0}, "security": SECURITY, **config}
        (folder / "config.json").write_text(json.dumps(config))
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command, "-config", str(folder / "config.json")],
            stderr=subprocess.PIPE, text=True, env=cached_environment(),
        )  # fmt: skip
        self.url = self._listening()
        self.port = urlsplit(self.url).port or 0
        threading.Thread(target=self._keep_log, daemon=True).start()

    def _listening(self) -> str:
        seen = ""
        while "listening url=" not in seen.rpartition("\n")[2]:
            line = self.process.stderr.readline()
            if not line:
                raise RuntimeError(f"Load Manager ended before it listened:\n{seen}")
            seen = f"{seen}\n{line.strip()}"
        return seen.rpartition("url=")[2]

    def _keep_log(self) -> None:
        with (self.folder / "log").open("w") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # ---- requests ----

    def connect(self, timeout_s: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def call(self, method: str, path: str, body: Any = None, callback: bool = False) -> Any:
        """What it answers, on a connection of its own."""
        connection = self.connect()
        try:
            return self.call_on(connection, method, path, body, callback)[1]
        finally:
            connection.close()

    def call_on(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None,
        callback: bool = False,
    ) -> tuple[int, Any]:  # fmt: skip
        """Status and JSON of one request on a connection that stays open."""
        headers = {"X-Locust-Token": CALLBACK_TOKEN} if callback else {"Authorization": f"Bearer {API_TOKEN}"}
        headers["Content-Type"] = "application/json"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        raw = response.read()
        is_json = raw and response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(raw) if is_json else raw.decode()

    def create(self, number: int, duration_s: int | None = None) -> dict[str, Any]:
        """A run on the cluster of environment e<number>."""
        place = {"tenantId": "t", "envId": f"e{number}", "scenarioId": "bench"}
        body: dict[str, Any] = {**place, "targetUsers": 5, "spawnRate": 5}
        return self.call("POST", "/v1/tests", body | ({"durationSeconds": duration_s} if duration_s else {}))

    # ---- what it takes ----

    def resident_mib(self) -> float:
        return self._status("VmRSS") / 1024

    def proportional_mib(self) -> float:
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s+(\d+)", text, re.M).group(1)) / 1024

    def threads(self) -> int:
        return self._status("Threads")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_s(self) -> float:
        return process_cpu_s(self.process.pid)

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.M).group(1))


def process_cpu_s(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
