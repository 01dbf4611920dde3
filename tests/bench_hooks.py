"""What the hooks cost a busy worker, for `make bench`: with and without them in turn, in one worker of a real
Locust that has more to do than its processor gives, so that only the hooks differ."""

from __future__ import annotations

import json
import math
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench_rows import FOLDER, head, row, scaled
from locust_process import LocustCluster

ROOT = Path(__file__).resolve().parent.parent
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
USERS = 20
PAIRS, SLICE_S = 150, 0.25  # short: what neighbours on the machine do is alike in both halves of a pair
REACHED = 0.02

LOAD = """
import json, os, random, time
import gevent
import msgpack
import loadmanager_hooks
from locust import FastHttpUser, events, task

class Caller(FastHttpUser):
    @task
    def call(self):
        self.client.get(PATHS[random.randrange(len(PATHS))])

PATHS = ["/api/items", "/api/items/7", "/api/search", "/api/cart", "/login"]

@events.init.add_listener
def measure(environment, **_):
    hooks = loadmanager_hooks._worker_hooks
    if hooks:
        gevent.spawn(measure_in_turn, environment, hooks)

def measure_reports(hooks, results):
    # Processor time of what the hooks do at a report, each 3 s: take the rows, and pack them for the wire.
    report = hooks.on_report_to_master
    def timed(data):
        begin = time.process_time()
        report(data)
        size = len(msgpack.packb(data[loadmanager_hooks.TIMES_MARK]))
        print(json.dumps(["report", time.process_time() - begin, size]), file=results, flush=True)
    hooks.on_report_to_master = timed

def measure_in_turn(environment, hooks):
    while environment.runner.state != "running":
        gevent.sleep(0.1)
    gevent.sleep(1)
    listeners, on_request = environment.events.request._handlers, hooks.exact.on_request
    with open(RESULTS, "a") as results:
        measure_reports(hooks, results)
        for number in range(2 * PAIRS):
            on = number % 4 in (1, 2)  # without, with, with, without: a drift is of neither
            listeners[:] = [one for one in listeners if one != on_request] + on * [on_request]
            begin = time.monotonic(), time.process_time(), Count.requests
            gevent.sleep(SLICE_S)
            end = time.monotonic(), time.process_time(), Count.requests
            print(json.dumps([on, *(b - a for a, b in zip(begin, end))]), file=results, flush=True)
        gevent.sleep(3.5)  # one whole report
        print("over", file=results, flush=True)
        results.flush()

class Count:
    requests = 0

@events.request.add_listener
def count(**_):
    Count.requests += 1
"""


class FastTarget(threading.Thread):
    """A target that costs next to nothing: one thread, one answer."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._selector.register(self._listener.accept()[0], selectors.EVENT_READ)
                    continue
                try:
                    if key.fileobj.recv(65536):
                        key.fileobj.sendall(ANSWER)
                        continue
                except OSError:
                    pass
                self._selector.unregister(key.fileobj)
                key.fileobj.close()


Slice = tuple[bool, float, float, float]  # with hooks or not, seconds, processor seconds, requests


def measured() -> tuple[list[Slice], list[tuple[float, int]]]:
    """Slices in turn; and the processor seconds and bytes of each report."""
    results, pairs = FOLDER / "hooks.txt", int(scaled(PAIRS, 8))
    names = {"RESULTS": str(results), "PAIRS": pairs, "SLICE_S": SLICE_S}
    constants = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    hosts = ["--host", FastTarget().url]
    environment = {"PYTHONPATH": str(ROOT / "locust")}
    results.touch()
    with LocustCluster(constants + LOAD, 1, environment, hosts, worker_args=hosts) as locust:
        locust.swarm(USERS, 100)
        give_up_at = time.monotonic() + 30 + 4 * pairs * SLICE_S
        while not results.read_text().endswith("over\n"):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"the worker did not measure:\n{locust.log()[-2000:]}")
            time.sleep(0.2)
        locust.post("/stop")
    lines = [json.loads(line) for line in results.read_text().splitlines()[:-1]]
    slices = [tuple(line) for line in lines if line[0] != "report"]
    return slices, [tuple(line[1:]) for line in lines if line[0] == "report"]


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The middle and its 95 % interval, by signed ranks (Hodges and Lehmann): not moved by disturbed
    pairs."""
    count = len(ratios)
    means = sorted((one + other) / 2 for at, one in enumerate(ratios) for other in ratios[at:])
    spread = 1.96 * math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    cut = max(0, min(round(count * (count + 1) / 4 - spread), len(means) // 2))
    return statistics.median(means), means[cut], means[-1 - cut]


def pairs_of(slices: list[Slice], figure: Callable) -> tuple[list[float], list[float]]:
    """The figure without and with hooks, pair by pair."""
    pairs = [sorted(slices[at : at + 2]) for at in range(0, len(slices), 2)]
    return [figure(*without[1:]) for without, _ in pairs], [figure(*with_[1:]) for _, with_ in pairs]


def hooks_figures() -> None:
    head("the hooks in a worker of a real Locust that is busy all the time")
    slices, reports = measured()
    cpu = pairs_of(slices, lambda _, cpu_s, requests: 1e6 * cpu_s / requests)
    rate = pairs_of(slices, lambda seconds, _, requests: requests / seconds)
    busy = statistics.median(cpu_s / seconds for _, seconds, cpu_s, _ in slices)
    row("the worker's processor", f"{100 * busy:.0f} % of a core", "as much as it gets")
    for what, (without, with_), sign in (
        ("processor time per request, without; with", cpu, 1),
        ("requests/s, without; with", rate, -1),
    ):
        cost = [sign * (after / before - 1) for before, after in zip(without, with_, strict=True)]
        middle, low, high = interval(cost)
        unit = "us" if sign > 0 else "/s"
        figures = f"{statistics.median(without):.1f}; {statistics.median(with_):.1f} {unit}"
        ratio = f"{100 * middle:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
        row(f"  {what}, {len(cost)} pairs", figures, "cost < 2 %", middle < REACHED, ratio)
    seconds = statistics.median(seconds for seconds, _ in reports)
    size = statistics.median(size for _, size in reports) / 1024
    row(
        "  its report each 3 s",
        f"{1000 * seconds:.2f} ms, {size:.1f} KiB",
        "",
        None,
        f"{100 * seconds / 3:+.2f} %",
    )
