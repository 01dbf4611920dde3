"""Requests per second, for `make bench`: ours, and in the same run what a user would take instead."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_rows import FOLDER, Load, both, has_wrk, head, row, scaled, wrk
from fake_masters import Fakes
from measured_program import API_TOKEN, AS_MODULE, CALLBACK_TOKEN, Program, clusters_of

CONNECTIONS = 64
BEARER = {"Authorization": f"Bearer {API_TOKEN}"}
RUNS = 60
OTHERS = {
    "waitress": "Flask, waitress of 8 threads",
    "flask": "Flask, its own server",
    "fastapi": "FastAPI, uvicorn with uvloop",
    "bare": "a socket and ready bytes, no parsing, no token",
}
FRAMEWORKS = ("waitress", "flask", "fastapi")
NUMBERS = {
    "timestamp": "2026-01-01T00:00:00Z", "totalRps": 5.5, "totalRequests": 100, "totalFailures": 0,
    "errorRate": 0, "avgResponseMs": 2.5, "p50ResponseMs": 2, "p95ResponseMs": 3, "p99ResponseMs": 4,
    "currentUsers": 5,
}  # fmt: skip
ENDPOINT = {
    "method": "GET", "numRequests": 10, "numFailures": 0, "avgResponseTime": 1.5, "minResponseTime": 1,
    "maxResponseTime": 3, "medianResponseTime": 2, "requestsPerSec": 5.5,
}  # fmt: skip


@contextlib.contextmanager
def serving_runs() -> Iterator[tuple[Program, list[dict[str, Any]]]]:
    """Runs that have ended, with the numbers of ten endpoints each."""
    from seeded_runs import SeededRuns

    folder = FOLDER / "reads"
    folder.mkdir()
    with SeededRuns(folder / "lm.db") as runs:
        for number in range(RUNS):
            runs.finished("bench", age_s=9000 - number, samples=2, endpoints=10)
    with Program(folder, {"storage": {"url": "sqlite:///lm.db"}}, AS_MODULE) as program:
        yield program, program.call("GET", "/v1/tests")


@contextlib.contextmanager
def other_server(kind: str, file: Path) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("bench_servers.py")), kind, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = process.stdout.readline().strip()
        give_up_at = time.monotonic() + 10
        while not answers(url) and time.monotonic() < give_up_at:
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether anything comes back; the listener is there before its server is."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as sock:
        sock.settimeout(0.5)
        sock.sendall(b"GET /v1/tests HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        try:
            return bool(sock.recv(1))
        except TimeoutError:
            return False


def read_figures() -> None:
    head("reads: requests/s, median and 99th percentile of the time")
    if not has_wrk():
        row("requests per second", "skipped: needs wrk (apt-get install wrk)")
        return
    with serving_runs() as (program, runs):
        file = FOLDER / "runs.json"
        file.write_text(json.dumps(runs))
        one, page = f"/v1/tests/{runs[0]['id']}", "/v1/tests?limit=50"
        size = len(json.dumps(runs[0], separators=(",", ":")))
        health = wrk(program.url + "/health", CONNECTIONS, {})
        row(f"GET /health, {CONNECTIONS} connections", str(health))
        for connections in (1, 16, 64, 256) if scaled(1, 0) else (64,):
            load = wrk(program.url + one, connections, BEARER)
            goal, is_reached = "", None
            if connections == CONNECTIONS:
                goal = ">= 25,518 /s, p99 <= 18.9 ms"  # twice the original's rate; its p99
                is_reached = load.rate >= 25_518 and load.p99_ms <= 18.9
            ratio = f"{load.rate / health.rate:.2f} x /health"
            row(
                f"status of a run ({size:,} bytes), {connections} connections",
                str(load),
                goal,
                is_reached,
                ratio,
            )
        for what, path in (("status of a run", one), ("list, a page of 50", page)):
            beside_others(program, file, what, path)


def beside_others(program: Program, file: Path, what: str, path: str) -> None:
    """All in turn, three times; the best of each: what disturbs a machine for a moment does not count."""
    rounds: dict[str, list[Load]] = {kind: [] for kind in ("ours", *OTHERS)}
    with contextlib.ExitStack() as stack:
        urls = {kind: stack.enter_context(other_server(kind, file)) for kind in OTHERS}
        urls["ours"] = program.url
        for _ in range(int(scaled(3, 1))):
            for kind, loads in rounds.items():
                loads.append(wrk(urls[kind] + path, CONNECTIONS, BEARER, seconds=2))
    loads = {kind: max(found, key=lambda load: load.rate) for kind, found in rounds.items()}
    ours = loads.pop("ours")
    best = max(loads[kind].rate for kind in FRAMEWORKS)
    ratio = f"{ours.rate / best:.1f} x the best framework"
    head(f"what a user would take instead: {what}, {CONNECTIONS} connections")
    row("Load Manager", str(ours), "more than any framework", ours.rate > best, ratio)
    for kind, load in loads.items():
        row(f"  {OTHERS[kind]}", str(load), "", None, f"ours {ours.rate / load.rate:.2f} x")


def callback_figures() -> None:
    head("callbacks: requests/s, median and 99th percentile; `lastMetrics` has the last one")
    if not has_wrk():
        row("callbacks per second", "skipped: needs wrk (apt-get install wrk)")
        return
    fakes = Fakes(1)
    config = {
        "storage": {"url": "sqlite:///bench.db"}, "locustClusters": clusters_of(fakes.ports),
        "orchestrator": {"metricsPollIntervalSeconds": 10, "lostAfterSeconds": 600},
    }  # fmt: skip
    with Program(FOLDER / "callbacks", config, AS_MODULE) as program:
        run_id = program.create(0)["id"]
        health = wrk(program.url + "/health", CONNECTIONS, {})
        cases = ((0, 1), (0, 64), (10, 1), (10, 16), (10, 64)) if scaled(1, 0) else ((10, 64),)
        for endpoints, connections in cases:
            stats = {f"GET_/{number}": {**ENDPOINT, "name": f"/{number}"} for number in range(endpoints)}
            body = json.dumps({"runId": run_id, "metrics": {**NUMBERS, "requestStats": stats}})
            cpu_s = program.cpu_s()
            load = wrk(
                program.url + "/v1/internal/locust/metrics",
                connections,
                {"X-Locust-Token": CALLBACK_TOKEN},
                body,
            )
            each_us = 1e6 * (program.cpu_s() - cpu_s) / max(1, load.requests)
            what = f"{endpoints or 'no'} endpoints, {connections} connections"
            goal, is_reached = "", None
            if (endpoints, connections) == (10, 64):
                goal = ">= 10,499 /s, CPU each <= 144 us"  # the original's
                is_reached = load.rate >= 10_499 and each_us <= 144
            ratio = f"CPU each {each_us:.0f} us; {load.rate / health.rate:.2f} x /health"
            row(what, str(load), goal, is_reached, ratio)


def half_sent_figures() -> None:
    head("beside 500 half-sent requests")
    with Program(FOLDER / "half", {"storage": {"url": "memory:"}}, AS_MODULE) as program:
        held = [socket.create_connection(("127.0.0.1", program.port)) for _ in range(500)]
        for sock in held:
            sock.sendall(b"POST /v1/tests HTTP/1.1\r\nHost: x")
        times = []
        for _ in range(100):
            began = time.perf_counter()
            program.call("GET", "/health")
            times.append((time.perf_counter() - began) * 1000)
        row("/health, median / max", both(times, "ms"), "max <= 20 ms", max(times) <= 20)
        for sock in held:
            sock.close()
