"""`make bench`: figures of this machine, each beside the one to reach. Nothing is asserted: machines are
noisy, so compare within one run (the bare interpreter and /health are measured in the same run)."""

from __future__ import annotations

import http.client
import json
import os
import re
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import gate_simulation
from locust_process import LocustCluster
from target import Target

ROOT = Path(__file__).resolve().parent.parent
TOKEN, CALLBACK = "bench-api", "bench-callback"
FOLDER = Path(tempfile.mkdtemp(prefix="bench-"))


# ---- fake masters: one selector thread for hundreds --------------------------


class Fakes(threading.Thread):
    """So many fake Locust masters without hooks on free ports; some hang: they accept and never answer."""

    def __init__(self, count: int, hanging: int = 0):
        super().__init__(daemon=True)
        self.selector = selectors.DefaultSelector()
        self.users: dict[int, int] = {}
        self.requests: dict[int, int] = {}
        self.stopped_at: dict[int, float] = {}
        self.swarmed_at: dict[int, float] = {}
        self.hanging: set[int] = set()
        self.ports = []
        for _ in range(count):
            listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            listener.setblocking(False)
            self.ports.append(listener.getsockname()[1])
            self.selector.register(listener, selectors.EVENT_READ, None)
        self.will_hang = set(self.ports[:hanging])
        self.start()

    def hang_now(self) -> None:
        self.hanging = self.will_hang

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(1):
                if key.data is None:
                    connection, _ = key.fileobj.accept()
                    connection.setblocking(False)
                    self.selector.register(
                        connection, selectors.EVENT_READ, [key.fileobj.getsockname()[1], b""]
                    )
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
        connection.send(self._answer(port, head.split(b" ")[1].decode(), body.decode()))

    def _answer(self, port: int, path: str, body: str) -> bytes:
        now = time.monotonic()
        if path == "/swarm":
            self.users[port], self.requests[port] = int(parse_qs(body)["user_count"][0]), 0
            self.swarmed_at.setdefault(port, now)
            return self._json({"success": True, "message": "Swarming started"})
        if path == "/stop":
            self.stopped_at.setdefault(port, now)
            self.users[port] = 0
            return self._json({"success": True})
        if path == "/stats/requests":
            return self._json(self._stats(port))
        return b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno"

    def _stats(self, port: int) -> dict[str, Any]:
        users = self.users.get(port, 0)
        self.requests[port] = self.requests.get(port, 0) + 10
        row = {"method": "GET", "num_requests": self.requests[port], "num_failures": 0, "avg_response_time": 5.0, "min_response_time": 1, "max_response_time": 9,
               "median_response_time": 5, "response_time_percentile_0.95": 8, "response_time_percentile_0.99": 9, "current_rps": 10.0, "total_rps": 10.0}  # fmt: skip
        rows = [{**row, "name": f"/api/{number}"} for number in range(10)]
        return {"state": "running" if users else "ready", "user_count": users, "workers": [{"id": "w", "state": "running" if users else "ready", "user_count": users, "cpu_usage": 1}],
                "stats": [*rows, {**row, "method": "", "name": "Aggregated"}], "current_rps": 10.0, "total_rps": 10.0, "fail_ratio": 0.0}  # fmt: skip

    @staticmethod
    def _json(document: Any) -> bytes:
        raw = json.dumps(document).encode()
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
            + raw
        )


# ---- the program under measurement -------------------------------------------


class Program:
    def __init__(
        self,
        name: str,
        ports: list[int] = (),
        poll_s: float = 1.0,
        database: str = "memory:",
        clusters: list[dict[str, Any]] | None = None,
    ):
        self.folder = FOLDER / name
        self.folder.mkdir()
        config = {
            "server": {"port": 0}, "security": {"apiToken": TOKEN, "locustCallbackToken": CALLBACK}, "storage": {"url": database},
            "orchestrator": {"metricsPollIntervalSeconds": poll_s, "lostAfterSeconds": 600},
            "locustClusters": clusters or [{"id": f"c{n}", "tenantId": "t", "envId": f"e{n}", "baseUrl": f"http://127.0.0.1:{port}"} for n, port in enumerate(ports)],
        }  # fmt: skip
        (self.folder / "config.json").write_text(json.dumps(config))
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "loadmanager.py"), "-config", str(self.folder / "config.json")],
            stderr=subprocess.PIPE,
            text=True,
        )
        line = ""
        while "listening url=" not in line:
            line = self.process.stderr.readline()
        self.url = line.strip().rsplit("=", 1)[1]
        self.port = urlsplit(self.url).port
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(10)

    def call(self, method: str, path: str, body: Any = None, callback: bool = False) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"X-Locust-Token": CALLBACK} if callback else {"Authorization": f"Bearer {TOKEN}"}
        headers["Content-Type"] = "application/json"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse().read()
        connection.close()
        return json.loads(answer) if answer else None

    def create(self, number: int, duration_s: int | None = None) -> dict[str, Any]:
        body = {
            "tenantId": "t",
            "envId": f"e{number}",
            "scenarioId": "bench",
            "targetUsers": 5,
            "spawnRate": 5,
        }
        return self.call("POST", "/v1/tests", body | ({"durationSeconds": duration_s} if duration_s else {}))

    def resident_mib(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text).group(1)) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(what: str, figure: str, to_reach: str = "") -> None:
    print(f"  {what:<62}{figure:>24}   {to_reach}", flush=True)


def both(values: list[float], unit: str, digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f} {unit}"


# ---- figures -----------------------------------------------------------------


def wrk(
    program: Program, path: str, connections: int, headers: dict[str, str], script: Path | None = None
) -> str:
    command = ["wrk", "-t1", f"-c{connections}", "-d3s", "--latency"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    command += (["-s", str(script)] if script else []) + [program.url + path]
    text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))
    half, most = (re.search(rf"{percent}%\s+(\S+)", text).group(1) for percent in (50, 99))
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return f"{rate:,.0f} /s  {half} {most}" + (f"  {bad.group(1)} REFUSED" if bad else "")


def http_figures() -> None:
    if not shutil.which("wrk"):
        row("requests and callbacks per second", "skipped", "needs wrk (apt-get install wrk)")
        return
    fakes = Fakes(1)
    with Program("http", fakes.ports, poll_s=10, database="sqlite:///bench.db") as program:
        run_id = program.create(0)["id"]
        metrics = {"timestamp": "2026-01-01T00:00:00Z", "totalRps": 5.5, "totalRequests": 100, "totalFailures": 0, "errorRate": 0, "avgResponseMs": 2.5,
                   "p50ResponseMs": 2, "p95ResponseMs": 3, "p99ResponseMs": 4, "currentUsers": 5}  # fmt: skip
        endpoint = {
            "method": "GET",
            "numRequests": 10,
            "numFailures": 0,
            "avgResponseTime": 1.5,
            "minResponseTime": 1,
            "maxResponseTime": 3,
            "medianResponseTime": 2,
            "requestsPerSec": 5.5,
        }
        for connections in (1, 16, 64, 256):
            goal = {
                1: "Go 15,150; reach >= 12,100",
                16: "Go 33,488; >= 67,000",
                64: "Go 31,740; >= 63,500",
                256: "Go 30,931; >= 61,900",
            }[connections]
            row(
                f"status reads, {connections} connections: rate, p50, p99",
                wrk(program, f"/v1/tests/{run_id}", connections, {"Authorization": f"Bearer {TOKEN}"}),
                goal,
            )
        row("  beside it GET /health, 64 connections", wrk(program, "/health", 64, {}))
        for rows_, name in ((0, "totals only"), (3, "3 endpoints")):
            stats = {f"GET_/{number}": {**endpoint, "name": f"/{number}"} for number in range(rows_)}
            body = json.dumps(
                {"runId": run_id, "metrics": metrics | ({"requestStats": stats} if rows_ else {})}
            )
            script = FOLDER / f"push{rows_}.lua"
            script.write_text(
                f'wrk.method = "POST"\nwrk.body = {json.dumps(body)}\nwrk.headers["Content-Type"] = "application/json"\nwrk.headers["X-Locust-Token"] = "{CALLBACK}"\n'
            )
            for connections in (1, 16, 64) if rows_ == 0 else (16,):
                goal = {16: "Go 20,704; >= 20,704", 64: "Go 22,621; >= 22,621"}.get(connections, "")
                row(
                    f"callbacks, {connections} connections, {name}, sample kept",
                    wrk(program, "/v1/internal/locust/metrics", connections, {}, script),
                    goal,
                )


def half_sent_figures() -> None:
    with Program("half") as program:
        held = [socket.create_connection(("127.0.0.1", program.port)) for _ in range(500)]
        for sock in held:
            sock.sendall(b"POST /v1/tests HTTP/1.1\r\nHost: x")
        times = []
        for _ in range(100):
            began = time.perf_counter()
            program.call("GET", "/health")
            times.append((time.perf_counter() - began) * 1000)
        row("/health beside 500 half-sent requests, median / max", both(times, "ms"), "max <= 20 ms")
        for sock in held:
            sock.close()


def auto_stop_figures(hanging: int) -> None:
    fakes = Fakes(50 + hanging, hanging)
    with Program(f"autostop{hanging}", fakes.ports) as program:
        runs = {}
        threads = []

        def create(number: int) -> None:
            run = program.create(number, None if number < hanging else 6)
            runs[fakes.ports[number]] = run

        for number in range(50 + hanging):
            threads.append(threading.Thread(target=create, args=(number,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        fakes.hang_now()
        wanted = fakes.ports[hanging:]
        give_up_at = time.monotonic() + 20
        while not all(port in fakes.stopped_at for port in wanted) and time.monotonic() < give_up_at:
            time.sleep(0.05)
        offset = time.time() - time.monotonic()
        late = []
        for port in wanted:
            if port in fakes.stopped_at:
                deadline = runs[port]["startedAtMs"] / 1000 + 6
                late.append((fakes.stopped_at[port] + offset - deadline) * 1000)
        missing = len(wanted) - len(late)
        row(
            f"auto-stop lateness, 50 runs{f', {hanging} more hang' if hanging else ''}, median / max",
            both(late, "ms") + (f", {missing} NOT STOPPED" if missing else ""),
            "<= 5 / <= 25 ms",
        )


def polling_figures() -> None:
    fakes = Fakes(200, hanging=20)
    with Program("poll", fakes.ports) as program:
        latencies = []
        for number in range(200):
            began = time.monotonic()
            run = program.create(number)
            latencies.append((fakes.swarmed_at[fakes.ports[number]] - began) * 1000)
            assert run["status"] == "Running", run
        fakes.hang_now()
        time.sleep(6)
        cpu, began, ages = program.cpu_s(), time.monotonic(), []
        for _ in range(8):
            time.sleep(0.7)
            now = time.time()
            for run in program.call("GET", "/v1/tests"):
                if int(run["envId"][1:]) >= 20 and "lastMetrics" in run:
                    stamp = run["lastMetrics"]["timestamp"]
                    ages.append(
                        now
                        - (
                            time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))
                            - time.timezone
                            + float("0" + stamp[19:].rstrip("Z"))
                        )
                    )
        share = 100 * (program.cpu_s() - cpu) / (time.monotonic() - began)
        ages.sort()
        row(
            "newest sample's age, 200 clusters, 10% hang, median / p99",
            f"{statistics.median(ages):.2f} / {ages[int(len(ages) * 0.99)]:.2f} s",
            "<= 0.6 / <= 1.1 s",
        )
        row("CPU of polling them each second (with 1.4 lists/s)", f"{share:.1f} % of a core", "<= 6 %")
        row(
            "create until /swarm at the master, with its idle check",
            both(latencies, "ms"),
            "<= 1 ms beyond the check",
        )


FILL = """
import sys, time
sys.path.insert(0, sys.argv[1])
import loadmanager as lm
store = lm.Store(lm.open_database("sqlite:///" + sys.argv[2], "."))
rows = tuple(lm.EndpointStats("GET", f"/api/items/{n}", 1000, 3, 12.345, 1.5, 99.5, 11, 33.25, 40, 90) for n in range(12))
for number in range(10_000):
    run = lm.replace(lm._new_run(lm.RunRequest("t", "e", "bench", 5, 5.0, 60, {"ticket": f"PERF-{number}"}), "bench", "api"), cluster_id="c0", seq=number + 1, status=lm.RunStatus.FINISHED,
        started_at=time.time(), finished_at=time.time(), stop_reason="duration")
    numbers = lm.Numbers(lm.Snapshot(time.time(), 3.5, 12000, 36, 0.3, 12.3, 11, 33, 40, 5, rows), "final")
    store._writer.save(lm.RunState(run, numbers))
store._writer.wait_durable(60)
store.close()
"""


def ten_thousand_figures() -> None:
    with Program("empty") as program:
        row("memory, idle", f"{program.resident_mib():.0f} MiB", "<= 30 MiB")
    database = FOLDER / "many.db"
    subprocess.run([sys.executable, "-c", FILL, str(ROOT), str(database)], check=True, timeout=120)
    with Program("many", database=f"sqlite:///{database}") as program:
        whole, page = [], []
        for _ in range(5):
            began = time.perf_counter()
            size = len(program.call("GET", "/v1/tests"))
            whole.append((time.perf_counter() - began) * 1000)
        connection = http.client.HTTPConnection("127.0.0.1", program.port)
        raw = []
        for path, times in (("/v1/tests", raw), ("/v1/tests?limit=50", page)):
            for _ in range(7):
                began = time.perf_counter()
                connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
                body = connection.getresponse().read()
                times.append((time.perf_counter() - began) * 1000)
                del body
        row(
            f"list of {size:,} runs, whole, median", f"{statistics.median(raw):.0f} ms", "Go 209 ms; <= 60 ms"
        )
        row("a page of 50 of them, median", f"{statistics.median(page):.2f} ms", "Go 208 ms; <= 1 ms")
        row(
            "memory with 10,000 runs, after listing them all",
            f"{program.resident_mib():.0f} MiB",
            "Go 230; <= 120 MiB",
        )


def start_figures() -> None:
    bare, ours = [], []
    for number in range(7):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append((time.perf_counter() - began) * 1000)
        with Program(f"start{number}") as program:
            program.call("GET", "/health")
            ours.append((time.perf_counter() - program.began) * 1000)
    row(
        "start to first /health; bare python -c pass",
        f"{statistics.median(ours):.0f} ms; {statistics.median(bare):.0f} ms",
        "<= 2.5 x bare",
    )


def cold_start_figures() -> None:
    """A sleeping cluster of real Locust: from the create to the first request at the target."""
    times, warm = [], []
    with Target() as target:
        launcher = {
            "type": "process",
            "locustfile": str(ROOT / "locust" / "locustfile.py"),
            "workers": 2,
            "host": target.url,
            "idleSeconds": 1,
        }
        with Program(
            "cold", clusters=[{"id": "local", "tenantId": "t", "envId": "e0", "launcher": launcher}]
        ) as program:
            for _ in range(5):
                for found in (times, warm):
                    seen, began = target.total, time.perf_counter()
                    run = program.create(0)
                    while target.total == seen and time.perf_counter() - began < 30:
                        time.sleep(0.002)
                    found.append((time.perf_counter() - began) * 1000)
                    program.call("POST", f"/v1/tests/{run['id']}/stop")
                    while program.call("GET", f"/v1/tests/{run['id']}")["status"] not in (
                        "Finished",
                        "Failed",
                    ):
                        time.sleep(0.02)
                give_up_at = time.monotonic() + 20
                while (
                    program.call("GET", "/v1/clusters")[0]["state"] != "asleep"
                    and time.monotonic() < give_up_at
                ):
                    time.sleep(0.1)
    row(
        "create to first request, launched cluster asleep; awake",
        f"{statistics.median(times):.0f} ms; {statistics.median(warm):.0f} ms",
    )


def page_figures() -> None:
    """In a real Chromium: a run of eight hours opened, its charts drawn, a pushed number on the screen."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        row("the page in a browser", "no chromium here")
        return
    sys.path.insert(0, str(ROOT))
    from chromium import Chromium
    from control_plane import ControlPlane
    from seeded_runs import SeededRuns

    folder = FOLDER / "page"
    folder.mkdir()
    with SeededRuns(folder / "lm.db") as runs:
        long_id = runs.finished("soak", age_s=30_000, seconds=28_800, samples=28_800)
    place = {"id": "one", "baseUrl": "http://127.0.0.1:9", "tenantId": "t", "envId": "e"}
    with ControlPlane(folder, [place]) as plane, Chromium() as browser:
        sign_in(browser, plane)
        opened = [seconds_to_open(browser, f"{plane.url}/#/runs/{long_id}") for _ in range(7)]
        frames = browser.driver.execute_script(FRAMES_JS)
        delays = pushed_delays(browser, plane)
    row("a run of 8 h opened (28,800 samples), median / most", both(opened, "s", 2), "<= 1 s")
    row("its three charts drawn once, median / most", both(frames, "ms"), "<= 16 ms")
    row("a pushed number on the screen, median / most", both(delays, "s", 2), "<= 1 s")


FRAMES_JS = """const took = []; for (let t = 0; t < 28800; t += 300) { view.group.hover = t;
    const from = performance.now(); view.group.charts.forEach((chart) => chart.draw()); took.push(performance.now() - from); }
    return took"""
SEEN_JS = """window.seen = {}; const tile = view.parts.requests; new MutationObserver(() => {
    window.seen[tile.textContent] = Date.now() / 1000; }).observe(tile, {childList: true, characterData: true, subtree: true});"""


def sign_in(browser: Any, plane: Any) -> None:
    from conftest import API_TOKEN

    browser.size(1400, 1000)
    browser.driver.get(plane.url)
    ask = "fetch('/session', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify({token: arguments[0]})})"
    browser.driver.execute_async_script(f"const done = arguments[1]; {ask}.then(() => done())", API_TOKEN)


def until(browser: Any, script: str, *arguments: Any) -> Any:
    """What the script gives, once that is true; TimeoutError after 20 s."""
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        found = browser.driver.execute_script(script, *arguments)
        if found:
            return found
        time.sleep(0.01)
    raise TimeoutError(script)


def seconds_to_open(browser: Any, url: str) -> float:
    browser.driver.get("about:blank")
    began = time.time()
    browser.driver.get(url)
    drawn = "return typeof view !== 'undefined' && view && view.group && view.group.points.length > 400 && Date.now() / 1000"
    return until(browser, drawn) - began


def pushed_delays(browser: Any, plane: Any) -> list[float]:
    run_id = plane.external_run()
    browser.driver.get("about:blank")
    browser.driver.get(f"{plane.url}/#/runs/{run_id}")
    until(browser, "return typeof view !== 'undefined' && view && view.parts && true")
    browser.driver.execute_script(SEEN_JS)
    delays = []
    for number in range(777_001, 777_021):
        pushed_at = time.time()
        plane.push(run_id, number)
        delays.append(until(browser, "return window.seen[arguments[0]]", f"{number:,}") - pushed_at)
    return delays


LOAD = """
import loadmanager_hooks
from locust import FastHttpUser, events, task

class Caller(FastHttpUser):
    @task
    def call(self):
        self.client.get("/api/items")

if WITHOUT:
    @events.init.add_listener
    def without(environment, **_):
        if loadmanager_hooks._worker_hooks:
            environment.events.request.remove_listener(loadmanager_hooks._worker_hooks.exact.on_request)
"""
TIMED = """
import time, types
from locust import User
import loadmanager_hooks as hooks
Stats = types.SimpleNamespace(total=types.SimpleNamespace(response_times={}))
exact = hooks.ExactTimes(types.SimpleNamespace(stats=Stats))
times = [20 + number % 300 for number in range(1000)]
best = 1e9
for _ in range(20):
    began = time.perf_counter()
    for ms in times:
        exact.on_request("GET", "/api/items", ms + 0.25, response_length=1, exception=None, context={}, start_time=0.0, url="")
    best = min(best, (time.perf_counter() - began) / 1000)
print(best * 1e6)
"""


def hooks_figures() -> None:
    """What exact response times cost a worker that is busy all the time: processor time per request."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "locust")}
    done = subprocess.run(
        [sys.executable, "-c", TIMED], env=environment, capture_output=True, text=True, timeout=60
    )
    alone_us = float(done.stdout)
    rates: dict[bool, list[float]] = {True: [], False: []}
    costs: dict[bool, list[float]] = {True: [], False: []}
    command = [sys.executable, str(ROOT / "tests" / "target.py")]
    target = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = target.stdout.readline().strip()
        for without in (True, False) * 4:
            rate, cost = _worker_cost(LOAD.replace("WITHOUT", str(without)), url)
            rates[without].append(rate)
            costs[without].append(cost)
    finally:
        target.terminate()
        target.wait(10)
    before, after = min(costs[True]), min(costs[False])
    row("exact times: one request's, by itself", f"{alone_us:.2f} us")
    row(
        "  a busy worker's processor time per request, without and with",
        f"{1e6 * before:.0f}; {1e6 * after:.0f} us ({100 * (after / before - 1):+.1f} %)", "< 2 %",
    )  # fmt: skip
    row(
        "  its requests/s, the best of four, without and with",
        f"{max(rates[True]):.0f}; {max(rates[False]):.0f} /s",
    )


def _worker_cost(locustfile: str, url: str) -> tuple[float, float]:
    """Requests/s and processor seconds per request of the one worker of a real Locust."""
    hosts = ["--host", url]
    environment = {"PYTHONPATH": str(ROOT / "locust")}
    with LocustCluster(locustfile, 1, environment, hosts, worker_args=hosts) as locust:
        locust.swarm(10, 100)
        time.sleep(2)
        pid, counts = locust.workers[0].pid, []
        for _ in range(2):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            processor_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            counts.append((int(locust.csv_rows()[-1]["Request Count"]), processor_s, time.monotonic()))
            time.sleep(6 if len(counts) == 1 else 0)
        locust.post("/stop")
    requests, processor_s, seconds = (after - before for before, after in zip(*counts))
    return requests / seconds, processor_s / max(1, requests)


def main() -> int:
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    try:
        if sys.argv[1:] == ["gate"]:  # only these
            hooks_figures()
            gate_simulation.figures(250)
            return 0
        start_figures()
        cold_start_figures()
        http_figures()
        half_sent_figures()
        auto_stop_figures(0)
        auto_stop_figures(5)
        polling_figures()
        ten_thousand_figures()
        page_figures()

        hooks_figures()
        gate_simulation.figures(250)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
