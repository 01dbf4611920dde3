"""A fake Locust master, shaped like Locust 2.47's answers, for faults a real one cannot be made to show.

fake = FakeLocust(hooks=True).start()
fake.faults["/swarm"] = hang          # until fake.faults.clear()
fake.swarms, fake.stops               # what it was asked, with monotonic moments
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

CSV_HEAD = (
    "Type,Name,Request Count,Failure Count,Median Response Time,Average Response Time,Min Response Time,"
    "Max Response Time,Average Content "
    "Size,Requests/s,Failures/s,50%,66%,75%,80%,90%,95%,98%,99%,99.9%,99.99%,100%"
)


@dataclass
class Call:
    method: str
    path: str
    form: dict[str, str]
    headers: dict[str, str]
    at: float = field(default_factory=time.monotonic)


class FakeLocust:
    """Requests grow by 10 at each reading while users run. hooks: answers our hooks' route."""

    def __init__(self, hooks: bool = True, workers: int = 2, stop_method: str = "POST", starts: bool = True):
        self.hooks = hooks
        self.worker_count = workers
        self.stop_method = stop_method
        self.starts = starts  # False: says success and starts nothing
        self.state = "ready"
        self.users = 0
        self.requests = 0
        self.run_id = ""
        self.last_run_id = ""
        self.stops_are_ignored = 0  # so many stops say success while load goes on
        self.endpoints: list[tuple[str, str]] = [("GET", "/api/items")]
        self.rate: float | None = None  # requests/s since the start, instead of 10 at each reading
        self.cache_s = 0.0  # how long an answer of /stats/requests is kept
        self.stamps = hooks  # hooks that say how old it is
        self.began_at = 0.0  # epoch seconds
        self._cached: tuple[float, dict[str, Any], dict[str, Any]] | None = None
        self.stats_changes: dict[str, Any] = {}  # merged over the Aggregated row
        self.top_changes: dict[str, Any] = {}  # merged over the whole document
        self.failures_csv: str | None = None  # None: there is no such route
        self.faults: dict[str, Callable[[FakeHandler], None]] = {}
        self.calls: list[Call] = []
        self.released = threading.Event()  # lets hanging answers go at the end
        self._server = _FakeServer(("127.0.0.1", 0), FakeHandler)
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> FakeLocust:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    # ---- what was asked ----

    @property
    def swarms(self) -> list[Call]:
        return [call for call in self.calls if call.path == "/swarm"]

    @property
    def stops(self) -> list[Call]:
        return [call for call in self.calls if call.path == "/stop"]

    # ---- what it does ----

    def reached(self, path: str, when: str) -> None:
        """A request is about to be carried out ("before"), or was and is not answered yet ("after")."""

    def swarm(self, form: dict[str, str]) -> None:
        if not self.starts:
            return
        if self.state != "running":
            self.requests = 0
            self.began_at = time.time()
        self.state, self.users = "running", int(form["user_count"])
        self.run_id = form.get("run_id", "")

    def runs_another(self, run_id: str) -> bool:
        """Whether a stop that names this run finds another one's test."""
        return bool(run_id) and self.run_id not in ("", run_id)

    def end_test(self) -> None:
        if self.stops_are_ignored > 0:
            self.stops_are_ignored -= 1
            return
        if self.users:
            self.last_run_id = self.run_id
        self.run_id, self.state, self.users = "", "stopped", 0

    def restart(self) -> None:
        """As if the master process had been replaced."""
        self.state, self.users, self.requests, self.run_id, self.last_run_id = "ready", 0, 0, "", ""
        self.boot = time.monotonic()

    boot = 0.0

    def workers(self) -> list[dict[str, Any]]:
        state = "running" if self.users else "ready"
        share = self.users // max(1, self.worker_count)
        return [
            {"id": f"host_{number}", "state": state, "user_count": share, "cpu_usage": 3.0, "memory_usage": 1}
            for number in range(self.worker_count)
        ]

    def _count(self) -> None:
        if not self.users:
            return
        self.requests = (
            self.requests + 10 if self.rate is None else int(self.rate * (time.time() - self.began_at))
        )

    def counted(self) -> dict[str, Any]:
        """As our hooks tell it: all requests until the last full second."""
        until = max(self.began_at, int(time.time()))
        requests = int((self.rate or 0) * (until - self.began_at)) if self.users else self.requests
        exact = {"secondsAgo": time.time() - until, "requests": requests, "failures": 0}
        return {"statsResets": 0, "counted": exact}

    def cached_stats(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The answer, which may be an earlier one, and its headers."""
        if self._cached is None or time.monotonic() - self._cached[0] > self.cache_s:
            self._cached = time.monotonic(), self.stats(), self.counted()
        made_at, document, counted = self._cached
        told = {"age": time.monotonic() - made_at, "madeAt": made_at, **counted}
        return document, {"X-LoadManager-Statistics": json.dumps(told)} if self.stamps else {}

    def stats(self) -> dict[str, Any]:
        self._count()
        each = self.requests // max(1, len(self.endpoints))
        rows = [self._row(method, name, each) for method, name in self.endpoints]
        total = {**self._row("", "Aggregated", self.requests), **self.stats_changes}
        document = {
            "state": self.state, "user_count": self.users, "worker_count": self.worker_count,
            "workers": self.workers(),
            "stats": [*rows[:500], total], "errors": [], "total_rps": 9.0, "current_rps": self.rate or 10.0,
            "fail_ratio": 0.0,
            "total_fail_per_sec": 0.0, "current_fail_per_sec": 0.0,
            "current_response_time_percentiles": {"response_time_percentile_0.5": 16,
                "response_time_percentile_0.95": 150},
        }  # fmt: skip
        return {**document, **self.top_changes}

    def _row(self, method: str, name: str, requests: int) -> dict[str, Any]:
        return {
            "method": method, "name": name, "num_requests": requests, "num_failures": 0,
            "min_response_time": 4.0,
            "max_response_time": 158.0, "avg_response_time": 60.83, "median_response_time": 33,
            "response_time_percentile_0.95": 150, "response_time_percentile_0.99": 160, "current_rps": 5.5,
            "current_fail_per_sec": 0.0, "total_rps": 9.28, "total_fail_per_sec": 0.0,
            "avg_content_length": 2.0,
        }  # fmt: skip

    def csv(self) -> str:
        if self.rate is not None:
            self._count()
        each = self.requests // max(1, len(self.endpoints))
        rows = [(method, name, each) for method, name in self.endpoints] + [("", "Aggregated", self.requests)]
        tail = f"0,33,60.83,4.0,158.0,2.0,{self.rate or 9.28},0.0,33,40,50,60,100,150,155,160,160,160,160"
        return "\r\n".join(
            [CSV_HEAD] + [f"{method},{name},{requests},{tail}" for method, name, requests in rows]
        )

    def hooks_state(self) -> dict[str, Any]:
        return {
            "hooks": 1, "locustVersion": "2.47.0", "bootId": f"boot-{self.boot}", "state": self.state,
            "userCount": self.users,
            "targetUserCount": self.users, "distributed": True, "runId": self.run_id,
            "lastRunId": self.last_run_id,
            "workers": [
                {"id": w["id"], "state": w["state"], "userCount": w["user_count"],
                    "cpuPercent": w["cpu_usage"]} for w in self.workers()
            ],
            **(self.counted() if self.stamps else {}), "testStartedAt": None, "numRequests": self.requests,
            "numFailures": 0, "callbacks": True, "flush": True, "host": "http://t",
        }  # fmt: skip


class _FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeLocust

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the other side gave up, as it should


class FakeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _FakeServer
    form: dict[str, str]

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def fake(self) -> FakeLocust:
        return self.server.fake

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        fake = self.fake
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        form = {name: values[-1] for name, values in parse_qs(body, keep_blank_values=True).items()}
        fake.calls.append(Call(self.command, path, form, dict(self.headers)))
        self.named_run = parse_qs(query).get("run_id", [""])[0]
        self.form = form  # for faults that go on to the good answer
        fault = fake.faults.get(path) or fake.faults.get("*")
        if fault is not None:
            fault(self)
            return
        self.answer_well(path, form)

    def answer_well(self, path: str, form: dict[str, str]) -> None:
        fake = self.fake
        fake.reached(path, "before")
        if path == "/swarm":
            fake.swarm(form)
            fake.reached(path, "after")
            self.send_json({"success": True, "message": "Swarming started", "host": "http://t"})
        elif path == "/stop" and self.command != fake.stop_method:
            self.send_text(405, "<h1>Method Not Allowed</h1>", "text/html")
        elif path == "/stop" and fake.hooks and fake.runs_another(self.named_run):
            self.send_text(409, json.dumps({"loadmanager_other_run": "another"}), "application/json")
        elif path == "/stop":
            fake.end_test()
            fake.reached(path, "after")
            self.send_json({"success": True, "message": "Test stopped"})
        elif path == "/stats/requests":
            document, headers = fake.cached_stats()
            self.send_text(200, json.dumps(document), "application/json", headers)
        elif path == "/stats/requests/csv":
            self.send_text(200, fake.csv(), "text/csv")
        elif path == "/stats/failures/csv" and fake.failures_csv is not None:
            self.send_text(200, fake.failures_csv, "text/csv")
        elif path == "/loadmanager/state" and fake.hooks:
            self.send_json(fake.hooks_state())
        elif path == "/":
            self.send_text(200, '<script>window.templateArgs = {"version": "2.47.0"}</script>', "text/html")
        else:
            self.send_text(404, "<h1>Not Found</h1>", "text/html")

    def send_json(self, document: Any) -> None:
        self.send_text(200, json.dumps(document), "application/json")

    def send_text(
        self, status: int, text: str, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        raw = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


# ---- faults ----------------------------------------------------------------


def hang(handler: FakeHandler) -> None:
    handler.fake.released.wait(60)
    handler.close_connection = True


def drip(handler: FakeHandler) -> None:
    """A byte every tenth of a second: each recv is in time, the whole never is."""
    text = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n" + b" " * 5000
    for index in range(len(text)):
        handler.wfile.write(text[index : index + 1])
        handler.wfile.flush()
        if handler.fake.released.wait(0.1):
            return


def close_silently(handler: FakeHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def answer_500(handler: FakeHandler) -> None:
    handler.send_text(500, "'Nope'", "text/html")


def answer_garbage(handler: FakeHandler) -> None:
    handler.send_text(200, "\x00\x01 not json {", "application/json")


def answer_list(handler: FakeHandler) -> None:
    handler.send_text(200, "[1, 2]", "application/json")


def answer_login_page(handler: FakeHandler) -> None:
    handler.send_text(200, "<html><form>log in</form></html>", "text/html")


def refuse(handler: FakeHandler) -> None:
    handler.send_json({"success": False, "message": "Invalid spawn_rate value: 'x' (must be a number)"})


def redirect_to(url: str) -> Callable[[FakeHandler], None]:
    return lambda handler: handler.send_text(302, "", "text/html", {"Location": url})


def answer_huge(handler: FakeHandler) -> None:
    """400 MB, for as long as anybody reads."""
    size = 400 * 1024 * 1024
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size
    )
    for _ in range(size // 65536):
        handler.wfile.write(b" " * 65536)


def fail_times(
    count: int, fault: Callable[[FakeHandler], None] = answer_500
) -> Callable[[FakeHandler], None]:
    """`fault` for the first `count` calls, then a good answer."""
    left = [count]

    def once(handler: FakeHandler) -> None:
        left[0] -= 1
        if left[0] >= 0:
            fault(handler)
        else:
            handler.answer_well(handler.path.partition("?")[0], handler.form)

    return once


NOT_FINITE = {
    "num_requests": math.nan,
    "avg_response_time": math.inf,
    "response_time_percentile_0.95": "fast",
    "median_response_time": None,
}
