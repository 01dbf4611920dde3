"""The real Load Manager as a process on a free port, and plain HTTP to it."""
from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, Mapping

from waiting import eventually

PROGRAM = Path(__file__).resolve().parent.parent / "loadmanager.py"
API_TOKEN = "api-token-of-this-test"
CALLBACK_TOKEN = "callback-token-of-this-test"
sys.path.insert(0, str(PROGRAM.parent))  # for tests that import the module itself


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ControlPlane:
    """`folder` keeps the configuration, the database and the log; `config` overrides sections."""

    def __init__(self, folder: Path, clusters: list[dict] | None = None, port: int | None = None, **config: dict) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._config = {"server": {"port": self.port}, "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
                        "storage": {"url": "sqlite:///lm.db"}, "orchestrator": {"metricsPollIntervalSeconds": 0.5},
                        "locustClusters": clusters or []}
        for section, values in config.items():
            self._config[section].update(values)

    def start(self) -> ControlPlane:
        path = self.folder / "config.json"
        path.write_text(json.dumps(self._config))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, str(PROGRAM), "-config", str(path)], stdout=log, stderr=log,
                                            cwd=self.folder, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        eventually(lambda: self.call("GET", "/health", token=None)[0] == 200, within_s=20, what="Load Manager answers")
        return self

    __enter__ = start

    def __exit__(self, *exc_info) -> None:
        self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(15)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def call(self, method: str, path: str, body: Any = None, token: str | None = API_TOKEN,
             headers: Mapping[str, str] | None = None) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, JSON (or bytes) and headers. body: bytes as they are, anything else as JSON."""
        sent = dict(headers or {})
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        is_json = raw and answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(raw) if is_json else raw, answer.headers

    def external_run(self, tenant: str = "t", env: str = "e", cluster: str | None = None) -> str:
        """A run as if somebody had started it in Locust's own page; the id."""
        body = {"tenantId": tenant, "envId": env, "targetUsers": 5, "spawnRate": 5, **({"clusterId": cluster} if cluster else {})}
        status, answer, _ = self.callback("register-external", body)
        assert status == 200, answer
        return answer["runId"]

    def push(self, run_id: str, requests: int, **metrics: Any) -> int:
        """Numbers as the hooks push them; the answer's status."""
        numbers = {"totalRps": 10.0, "totalRequests": requests, "totalFailures": 0, "errorRate": 0.0, "currentUsers": 5, **metrics}
        return self.callback("metrics", {"runId": run_id, "metrics": numbers})[0]

    def callback(self, name: str, body: Any) -> tuple[int, Any, http.client.HTTPMessage]:
        return self.call("POST", f"/v1/internal/locust/{name}", body, token=None, headers={"X-Locust-Token": CALLBACK_TOKEN})


class EventStream:
    """A plain reader of Server-Sent Events. `comments` has the heartbeats."""

    def __init__(self, plane: ControlPlane, path: str, headers: Mapping[str, str] | None = None, token: str | None = API_TOKEN,
                 receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", plane.port))
        sent = {"Host": f"127.0.0.1:{plane.port}", **({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        self.sock.sendall((f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in sent.items()) + "\r\n").encode("latin-1"))
        self.comments: list[str] = []
        self._rest = b""

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exc_info) -> None:
        self.sock.close()

    def head(self) -> str:
        while b"\r\n\r\n" not in self._rest:
            received = self.sock.recv(65536)
            assert received, "the connection was closed before the head"
            self._rest += received
        head, self._rest = self._rest.split(b"\r\n\r\n", 1)
        return head.decode("latin-1")

    def events(self) -> Iterator[dict[str, Any]]:
        """Each event as {"id", "event", "data", "at"}, until the server ends the stream."""
        while True:
            while b"\n\n" in self._rest:
                block, self._rest = self._rest.split(b"\n\n", 1)
                fields = dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))
                self.comments += [line for line in block.decode().split("\n") if line.startswith(":")]
                if "event" in fields:
                    yield {"id": fields.get("id"), "event": fields["event"], "data": json.loads(fields["data"]), "at": time.time()}
                elif self.comments:
                    yield {"id": None, "event": "comment", "data": None, "at": time.time()}
            received = self.sock.recv(1 << 20)
            if not received:
                return
            self._rest += received

    def next(self, kind: str | None = None) -> dict[str, Any]:
        """The next event (of that kind); AssertionError when the stream ends before it."""
        for event in self.events():
            if event["event"] == kind or (kind is None and event["event"] != "comment"):
                return event
        raise AssertionError(f"the stream ended before an event {kind}")
