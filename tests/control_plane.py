"""Load Manager as conftest.py runs it, with its callbacks and its event streams."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conftest import API_TOKEN, CALLBACK_TOKEN, LoadManager


class ControlPlane(LoadManager):
    """`with ControlPlane(folder, clusters, server={...})`: a configuration of JSON, sections overridden by
    keyword."""

    def __init__(
        self, folder: Path, clusters: list[dict] | None = None, port: int = 0, **sections: dict
    ) -> None:
        config: dict[str, Any] = {
            "server": {"port": port},
            "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
            "storage": {"url": "sqlite:///lm.db"},
            "orchestrator": {"metricsPollIntervalSeconds": 0.5},
            "locustClusters": clusters or [],
        }
        for section, values in sections.items():
            config[section].update(values)
        super().__init__(folder, config)

    def __enter__(self) -> ControlPlane:
        self.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.end()

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = API_TOKEN,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or bytes) and headers by lower-case name."""
        answer = self.request(method, path, body, dict(headers or {}), token)
        is_json = answer.body and answer.headers["content-type"] == "application/json"
        return answer.status, answer.json if is_json else answer.body, answer.headers

    def external_run(self, tenant: str = "t", env: str = "e") -> str:
        """A run as if somebody had started it in Locust's own page; the id."""
        answer = self.callback(
            "register-external", {"tenantId": tenant, "envId": env, "targetUsers": 5, "spawnRate": 5}
        )
        assert answer.status == 200, answer.body
        return answer.json["runId"]

    def push(self, run_id: str, requests: int, **metrics: Any) -> int:
        """Numbers as the hooks push them; the answer's status."""
        numbers = {
            "totalRps": 10.0,
            "totalRequests": requests,
            "totalFailures": 0,
            "errorRate": 0.0,
            "currentUsers": 5,
            **metrics,
        }
        return self.callback("metrics", {"runId": run_id, "metrics": numbers}).status


class EventStream:
    """A plain reader of Server-Sent Events. `comments` has the heartbeats."""

    def __init__(
        self,
        plane: ControlPlane,
        path: str,
        headers: Mapping[str, str] | None = None,
        token: str | None = API_TOKEN,
        receive_buffer: int | None = None,
    ) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", plane.port))
        sent = {
            "Host": f"127.0.0.1:{plane.port}",
            **({"Authorization": f"Bearer {token}"} if token else {}),
            **(headers or {}),
        }
        self.sock.sendall(
            (
                f"GET {path} HTTP/1.1\r\n"
                + "".join(f"{name}: {value}\r\n" for name, value in sent.items())
                + "\r\n"
            ).encode("latin-1")
        )
        self.comments: list[str] = []
        self._rest = b""
        self.is_chunked = False
        self.has_ended = False  # by the last chunk
        self._chunks = b""  # what came of chunks that are not whole

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
        self.is_chunked = b"Transfer-Encoding: chunked" in head
        if self.is_chunked:
            self._chunks, self._rest = self._rest, b""
            self._take_chunks()
        return head.decode("latin-1")

    def _take_chunks(self) -> None:
        """Move the content of the whole chunks that came to the rest."""
        while b"\r\n" in self._chunks:
            size, _, content = self._chunks.partition(b"\r\n")
            length = int(size, 16)
            if len(content) < length + 2:
                return
            assert content[length : length + 2] == b"\r\n", content[length : length + 20]
            self._rest += content[:length]
            self._chunks = content[length + 2 :]
            self.has_ended = self.has_ended or length == 0

    def events(self) -> Iterator[dict[str, Any]]:
        """Each event as {"id", "event", "data", "at"}, until the server ends the stream."""
        while True:
            while b"\n\n" in self._rest:
                block, self._rest = self._rest.split(b"\n\n", 1)
                fields = dict(
                    line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":")
                )
                self.comments += [line for line in block.decode().split("\n") if line.startswith(":")]
                if "event" in fields:
                    yield {
                        "id": fields.get("id"),
                        "event": fields["event"],
                        "data": json.loads(fields["data"]),
                        "at": time.time(),
                    }
                elif self.comments:
                    yield {"id": None, "event": "comment", "data": None, "at": time.time()}
            received = self.sock.recv(1 << 20)
            if not received:
                return
            if self.is_chunked:
                self._chunks += received
                self._take_chunks()
            else:
                self._rest += received

    def next(self, kind: str | None = None) -> dict[str, Any]:
        """The next event (of that kind); AssertionError when the stream ends before it."""
        for event in self.events():
            if event["event"] == kind or (kind is None and event["event"] != "comment"):
                return event
        raise AssertionError(f"the stream ended before an event {kind}")
