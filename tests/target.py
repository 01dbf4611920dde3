"""A small fast HTTP server for Locust to load. In a test: `with Target() as target: target.url`.
As a process: `python tests/target.py --port 0` prints its URL and serves until SIGTERM."""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ITEM_PATH = re.compile(r"^/api/items/[^/]+$")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    target: Target

    def handle_error(self, request, client_address) -> None:
        pass  # Locust cuts requests off when it stops; that is no news


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True  # TCP_NODELAY, else each answer waits for a delayed ACK
    wbufsize = -1  # headers and body leave in one packet
    server: _Server

    def _answer(self) -> None:
        target = self.server.target
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            self.rfile.read(length)
        path = self.path.split("?", 1)[0]
        target._count(path)
        if target.delay_s > 0:
            time.sleep(target.delay_s)
        if target.fail_ratio > 0 and random.random() < target.fail_ratio:
            status, answer = 500, {"error": "asked to fail"}
        else:
            status, answer = 200, {"path": path, "items": []}
        body = json.dumps(answer).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, format, *args) -> None:
        pass


class Target:
    """Answers every request 200 JSON; `delay_s` and `fail_ratio` (0..1) may be set at any time.

    `counts` has the requests per path, with /api/items/<anything> counted as "/api/items/{id}"."""

    def __init__(
        self, port: int = 0, host: str = "127.0.0.1", delay_s: float = 0.0, fail_ratio: float = 0.0
    ) -> None:
        self.delay_s = delay_s
        self.fail_ratio = fail_ratio
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards counts
        self._server = _Server((host, port), _Handler)
        self._server.target = self
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="target", daemon=True
        )

    @property
    def total(self) -> int:
        with self._lock:
            return sum(self.counts.values())

    def start(self) -> Target:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    __enter__ = start

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def _count(self, path: str) -> None:
        with self._lock:
            self.counts["/api/items/{id}" if ITEM_PATH.match(path) else path] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--fail-ratio", type=float, default=0.0, help="0..1 of the answers are 500")
    options = parser.parse_args()
    ended = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: ended.set())
    with Target(options.port, delay_s=options.delay, fail_ratio=options.fail_ratio) as target:
        print(target.url, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
