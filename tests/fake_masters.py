"""Hundreds of fake Locust masters in one selector thread: cheap beside what is measured.

fakes = Fakes(50, hooks=25)           # 25 of them answer our hooks' route
fakes.stopped_at[fakes.ports[0]]      # monotonic moments by port"""

from __future__ import annotations

import json
import re
import selectors
import socket
import threading
import time
from typing import Any
from urllib.parse import parse_qs

ENDPOINTS = 10


class Fakes(threading.Thread):
    """So many fake Locust masters on free ports; the first ones hang when told: they accept and never answer.

    The last `hooks` of them answer the hooks' route. `receiver_port` takes notifications."""

    def __init__(self, count: int, hanging: int = 0, hooks: int = 0):
        super().__init__(daemon=True)
        self.selector = selectors.DefaultSelector()
        self.users: dict[int, int] = {}
        self.requests: dict[int, int] = {}
        self.run_ids: dict[int, str] = {}
        self.stopped_at: dict[int, float] = {}
        self.swarmed_at: dict[int, float] = {}
        self.asked_at: dict[int, float] = {}  # the first question while idle, since it was taken away
        self.answered_at: dict[int, float] = {}  # the last answer while idle
        self.received = 0  # requests at receiver_port
        self.hanging: set[int] = set()
        self.ports = [self._listen() for _ in range(count)]
        self.receiver_port = self._listen()
        self.will_hang = set(self.ports[:hanging])
        self.with_hooks = set(self.ports[count - hooks :])
        self.start()

    def _listen(self) -> int:
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, None)
        return listener.getsockname()[1]

    def hang_now(self) -> None:
        self.hanging = self.will_hang

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(1):
                if key.data is None:
                    connection, _ = key.fileobj.accept()
                    connection.setblocking(False)
                    state = [key.fileobj.getsockname()[1], b""]
                    self.selector.register(connection, selectors.EVENT_READ, state)
                else:
                    self._serve(key.fileobj, key.data)

    def _serve(self, connection: socket.socket, state: list[Any]) -> None:
        try:
            received = connection.recv(65536)
        except OSError:
            received = b""
        if not received:
            self.selector.unregister(connection)
            connection.close()
            return
        port, buffer = state[0], state[1] + received
        head, found, body = buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if not found or len(body) < (int(length.group(1)) if length else 0):
            state[1] = buffer
            return
        state[1] = b""
        if port in self.hanging:
            return
        is_idle = not self.users.get(port)
        if is_idle:
            self.asked_at.setdefault(port, time.monotonic())
        connection.send(self._answer(port, head.split(b" ")[1].decode(), body.decode()))
        if is_idle and not self.users.get(port):
            self.answered_at[port] = time.monotonic()

    def _answer(self, port: int, path: str, body: str) -> bytes:
        now = time.monotonic()
        if port == self.receiver_port:
            self.received += 1
            return _json({})
        if path == "/swarm":
            form = parse_qs(body)
            self.users[port], self.requests[port] = int(form["user_count"][0]), 0
            self.run_ids[port] = form.get("run_id", [""])[0]
            self.swarmed_at[port] = now
            self.stopped_at.pop(port, None)
            return _json({"success": True, "message": "Swarming started"})
        if path.startswith("/stop?"):
            self.stopped_at.setdefault(port, now)
            self.users[port] = 0
            return _json({"success": True})
        if path == "/stats/requests":
            return _json(self._stats(port))
        if path == "/loadmanager/state" and port in self.with_hooks:
            return _json(self._hooks_state(port))
        return b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno"

    def _stats(self, port: int) -> dict[str, Any]:
        users = self.users.get(port, 0)
        self.requests[port] = self.requests.get(port, 0) + 10
        row = {
            "method": "GET", "num_requests": self.requests[port], "num_failures": 0, "avg_response_time": 5.0,
            "min_response_time": 1, "max_response_time": 9, "median_response_time": 5, "current_rps": 10.0,
            "response_time_percentile_0.95": 8, "response_time_percentile_0.99": 9, "total_rps": 10.0,
        }  # fmt: skip
        rows = [{**row, "name": f"/api/{number}"} for number in range(ENDPOINTS)]
        state = "running" if users else "ready"
        return {
            "state": state, "user_count": users, "fail_ratio": 0.0, "current_rps": 10.0, "total_rps": 10.0,
            "workers": [{"id": "w", "state": state, "user_count": users, "cpu_usage": 1}],
            "stats": [*rows, {**row, "method": "", "name": "Aggregated"}],
        }  # fmt: skip

    def _hooks_state(self, port: int) -> dict[str, Any]:
        users = self.users.get(port, 0)
        state = "running" if users else "ready"
        run_id = self.run_ids.get(port, "")
        return {
            "hooks": 1, "locustVersion": "2.47.0", "bootId": f"boot-{port}", "state": state,
            "userCount": users, "targetUserCount": users, "distributed": True, "host": "http://t",
            "runId": run_id if users else "", "lastRunId": "" if users else run_id, "testStartedAt": None,
            "workers": [{"id": "w", "state": state, "userCount": users, "cpuPercent": 1}],
            "numRequests": self.requests.get(port, 0), "numFailures": 0, "callbacks": True, "flush": True,
        }  # fmt: skip


def _json(document: Any) -> bytes:
    raw = json.dumps(document).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(raw) + raw
