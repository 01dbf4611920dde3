"""`make soak MINUTES=120`: a Load Manager as busy as it gets, for long: is anything not flat?

    python tests/soak.py [--minutes M] [--name NAME]

50 runs at once: 45 of fake masters that answer as Locust does, half of them with hooks, most started again
and again with durations of 1 to 3 minutes, a tenth for as long as the soak; 4 of schedules that fire each
minute; one of a real Locust that Load Manager launched. Besides the callbacks of them, 20 event streams, a
webhook for each end, and a retention that removes what is older than 6 minutes. Each second it takes memory,
descriptors, threads, processor time and the time of a /health, each fifth what /metrics says; and how late
each stop was. It leaves a table, and tests/output/NAME.svg and .csv. Exit status 1 when something broke, or
when it was long enough to tell that something rises."""

from __future__ import annotations

import argparse
import csv
import random
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from fake_masters import Fakes  # noqa: E402
from measured_program import API_TOKEN, AS_MODULE, ROOT, Program, clusters_of  # noqa: E402
from soak_plot import Series, draw, judge, table  # noqa: E402
from target import Target  # noqa: E402

OUTPUT = ROOT / "tests" / "output"
FAKES, SCHEDULED, LASTING, STREAMS = 49, 4, 5, 20  # of the fakes, the last are the schedules'
RETENTION_S = 360
WARM_UP_S = RETENTION_S + 120  # from then on as many runs are removed as begin
CALLBACK_EVERY_S = 2.0  # of each run, as the hooks do

# Name, unit, and the growth an hour that counts as flat.
FIGURES = (
    ("resident memory", "MiB", 2.0),
    ("proportional memory", "MiB", 2.0),
    ("descriptors", "", 2.0),
    ("threads", "", 1.0),
    ("processor time", "% of a core", 5.0),
    ("time of a /health", "ms", 2.0),
    ("writer lag", "ms", 20.0),
    ("oldest poll of a run", "s", 0.5),
    ("lateness of stops", "ms", 5.0),
    ("runs known", "", 10.0),
)


class Recorder:
    """What was measured, by figure, and what broke."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.points: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in FIGURES}
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []

    def note(self, name: str, value: float) -> None:
        self.points[name].append((time.monotonic() - self.began, value))

    def breaks(self, what: str) -> None:
        self.broken.append(f"{time.monotonic() - self.began:.0f} s: {what}")


class Place:
    """One environment, where a run is started again whenever the one before has ended."""

    def __init__(self, env_id: str, port: int | None, lasts_s: int | None):
        self.env_id, self.port, self.lasts_s = env_id, port, lasts_s
        self.run: dict[str, Any] | None = None
        self.look_at = 0.0  # monotonic

    @property
    def duration_s(self) -> int:
        return self.lasts_s or random.randint(60, 180)


class Soak:
    def __init__(self, program: Program, fakes: Fakes, seconds: float):
        self._program, self._fakes, self._seconds = program, fakes, seconds
        self.recorder = Recorder()
        self._over = threading.Event()
        ports = fakes.ports[: FAKES - SCHEDULED]
        self._places = [
            Place(f"e{number}", port, int(seconds) + 300 if number % 9 == 0 else None)
            for number, port in enumerate(ports)
        ] + [Place("real", None, None)]
        self._requests = 0

    def run(self) -> None:
        """Everything at once until the time is over."""
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            for work in (self._drive, self._call_back, self._read_streams)
        ]
        for thread in threads:
            thread.start()
        self._sample()
        self._over.set()
        for thread in threads:
            thread.join(30)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - told at the end
            self.recorder.breaks(f"{work.__name__}: {error!r}")

    # ---- runs ----

    def _drive(self) -> None:
        connection = self._program.connect()
        while not self._over.wait(0.5):
            for place in self._places:
                if time.monotonic() >= place.look_at and not self._over.is_set():
                    self._look(connection, place)

    def _look(self, connection: Any, place: Place) -> None:
        if place.run is None:
            self._start(connection, place)
            return
        _, run = self._program.call_on(connection, "GET", f"/v1/tests/{place.run['id']}")
        if run.get("status") not in ("Finished", "Failed"):
            place.look_at = time.monotonic() + 1
            if time.time() > place.run["startedAtMs"] / 1000 + place.run["durationSeconds"] + 30:
                self.recorder.breaks(f"run of {place.env_id} is {run.get('status')} 30 s after its time")
                place.run = None
            return
        self.recorder.counts[f"runs {run['status']}"] += 1
        if run["status"] == "Failed":
            self.recorder.breaks(f"run of {place.env_id} failed: {run.get('failureReason')}")
        if place.port is not None and place.port in self._fakes.stopped_at:
            stopped = self._fakes.stopped_at[place.port] - time.monotonic() + time.time()
            deadline = place.run["startedAtMs"] / 1000 + place.run["durationSeconds"]
            self.recorder.note("lateness of stops", (stopped - deadline) * 1000)
        place.run = None

    def _start(self, connection: Any, place: Place) -> None:
        body = {
            "tenantId": "t", "envId": place.env_id, "scenarioId": "soak", "targetUsers": 5, "spawnRate": 5,
            "durationSeconds": place.duration_s,
        }  # fmt: skip
        status, run = self._program.call_on(connection, "POST", "/v1/tests", body)
        if status != 201:
            self.recorder.breaks(f"create at {place.env_id}: HTTP {status} {run}")
            place.look_at = time.monotonic() + 5
            return
        place.run = run
        place.look_at = time.monotonic() + body["durationSeconds"]

    # ---- callbacks ----

    def _call_back(self) -> None:
        connection = self._program.connect()
        while not self._over.is_set():
            began = time.monotonic()
            for place in self._places:
                run = place.run
                if run is not None and place.port is not None and not self._over.is_set():
                    self._push(connection, run["id"])
            self._over.wait(max(0.1, CALLBACK_EVERY_S - (time.monotonic() - began)))

    def _push(self, connection: Any, run_id: str) -> None:
        self._requests += 100
        row = {
            "method": "GET", "numRequests": self._requests, "numFailures": 0, "avgResponseTime": 5.5,
            "minResponseTime": 1, "maxResponseTime": 30, "medianResponseTime": 5, "requestsPerSec": 5.5,
            "responseTimes": {str(ms): 10 * ms for ms in range(1, 30)},
        }  # fmt: skip
        metrics = {
            "totalRps": 55.0, "totalRequests": 10 * self._requests, "totalFailures": 0, "errorRate": 0.0,
            "avgResponseMs": 5.5, "p50ResponseMs": 5, "p95ResponseMs": 20, "p99ResponseMs": 28,
            "currentUsers": 5, "responseTimes": row["responseTimes"],
            "requestStats": {f"GET_/api/{number}": {**row, "name": f"/api/{number}"} for number in range(10)},
        }  # fmt: skip
        body = {"runId": run_id, "metrics": metrics}
        path = "/v1/internal/locust/metrics"
        status, answer = self._program.call_on(connection, "POST", path, body, callback=True)
        self.recorder.counts["callbacks"] += 1
        if status >= 500:
            self.recorder.breaks(f"callback: HTTP {status} {answer}")

    # ---- event streams ----

    def _read_streams(self) -> None:
        """All streams in this thread; what ends is opened again, those of a run with another run."""
        selector = selectors.DefaultSelector()
        for number in range(STREAMS):
            selector.register(self._open_stream(number), selectors.EVENT_READ, number)
        while not self._over.is_set():
            for key, _ in selector.select(0.5):
                received = key.fileobj.recv(1 << 16)
                self.recorder.counts["events"] += received.count(b"\nevent: ") + received.startswith(b"event")
                if received:
                    continue
                self.recorder.counts["streams opened again"] += 1
                selector.unregister(key.fileobj)
                key.fileobj.close()
                selector.register(self._open_stream(key.data), selectors.EVENT_READ, key.data)
        for key in list(selector.get_map().values()):
            key.fileobj.close()

    def _open_stream(self, number: int) -> socket.socket:
        runs = [place.run["id"] for place in self._places if place.run is not None]
        path = f"/v1/tests/{random.choice(runs)}/events" if number % 2 and runs else "/v1/events"
        sock = socket.create_connection(("127.0.0.1", self._program.port), 10)
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_TOKEN}\r\n\r\n"
        sock.sendall(head.encode())
        return sock

    # ---- samples ----

    def _sample(self) -> None:
        connection = self._program.connect()
        cpu_s, at = self._program.cpu_s(), time.monotonic()
        next_at = at
        for number in range(int(self._seconds)):
            next_at += 1
            time.sleep(max(0.0, next_at - time.monotonic()))
            if self._program.process.poll() is not None:
                self.recorder.breaks(f"Load Manager ended with {self._program.process.returncode}")
                return
            note = self.recorder.note
            began = time.monotonic()
            self._program.call_on(connection, "GET", "/health")
            note("time of a /health", (time.monotonic() - began) * 1000)
            note("resident memory", self._program.resident_mib())
            note("proportional memory", self._program.proportional_mib())
            note("descriptors", self._program.descriptors())
            note("threads", self._program.threads())
            now_cpu_s, now = self._program.cpu_s(), time.monotonic()
            note("processor time", 100 * (now_cpu_s - cpu_s) / (now - at))
            cpu_s, at = now_cpu_s, now
            if number % 5 == 4:
                self._scrape(connection)

    def _scrape(self, connection: Any) -> None:
        text = self._program.call_on(connection, "GET", "/metrics")[1]
        self.recorder.note("writer lag", 1000 * max(values_of(text, "loadmanager_writer_lag_seconds")))
        ages = values_of(text, "loadmanager_run_poll_age_seconds")
        if ages:
            self.recorder.note("oldest poll of a run", max(ages))
        summary = self._program.call_on(connection, "GET", "/v1/tests?limit=1000")[1]
        self.recorder.note("runs known", len(summary))
        errors = values_of(text, "loadmanager_unforeseen_errors_total")
        self.recorder.counts["unforeseen errors"] = int(sum(errors))


def values_of(text: str, name: str) -> list[float]:
    """All values of one metric in Prometheus' text."""
    return [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " ")
    ]


def configuration(fakes: Fakes, target_url: str) -> dict[str, Any]:
    locustfile = str(ROOT / "locust" / "locustfile.py")
    launcher = {"type": "process", "locustfile": locustfile, "workers": 1, "host": target_url}
    real = {"id": "real", "tenantId": "t", "envId": "real", "launcher": launcher}
    load = {"targetUsers": 5, "spawnRate": 5, "durationSeconds": 40}
    test = {"tenantId": "t", "scenarioId": "scheduled", **load}
    schedules = [
        {"id": f"s{number}", "cron": "* * * * *", "test": {**test, "envId": f"e{number}"}}
        for number in range(FAKES - SCHEDULED, FAKES)
    ]
    receiver = {
        "id": "hook", "type": "webhook", "url": f"http://127.0.0.1:{fakes.receiver_port}/",
        "allowPrivateAddresses": True, "secret": "whsec_c29hay1zb2FrLXNvYWstc29hay1zb2Fr",
    }  # fmt: skip
    return {
        "storage": {"url": "sqlite:///soak.db", "retentionDays": RETENTION_S / 86400},
        "orchestrator": {"metricsPollIntervalSeconds": 1, "lostAfterSeconds": 60},
        "locustClusters": [*clusters_of(fakes.ports), real], "schedules": schedules,
        "notifications": [receiver],
    }  # fmt: skip


def report(recorder: Recorder, name: str, seconds: float) -> bool:
    """Print the table, keep the plot and the figures; whether all is well."""
    is_long = seconds >= 2.5 * WARM_UP_S
    judged_from = WARM_UP_S if is_long else seconds / 2
    measured = [
        Series(figure, unit, allowed, recorder.points[figure])
        for figure, unit, allowed in FIGURES
        if len(recorder.points[figure]) > 1
    ]
    judged = [
        Series(one.name, one.unit, one.allowed, [point for point in one.points if point[0] >= judged_from])
        for one in measured
    ]
    verdicts = [judge(one) for one in judged if len(one.points) > 4]
    print(f"\njudged from {judged_from / 60:.1f} min to {seconds / 60:.1f} min, by Theil-Sen over medians")
    if not is_long:
        print(f"still warming up: what rises is told from {2.5 * WARM_UP_S / 60:.0f} minutes on")
    print(table(verdicts))
    for what, count in sorted(recorder.counts.items()):
        print(f"{count:>10,} {what}")
    for line in recorder.broken[:20]:
        print(f"broken: {line}")
    OUTPUT.mkdir(exist_ok=True)
    title = f"{FAKES + 1} runs at once, {STREAMS} event streams, {seconds / 60:.0f} minutes"
    draw(OUTPUT / f"{name}.svg", title, measured, judged_from)
    with (OUTPUT / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("figure", "unit", "second", "value"))
        writer.writerows((s.name, s.unit, round(at, 1), round(v, 3)) for s in measured for at, v in s.points)
    print(f"drawn: tests/output/{name}.svg")
    unforeseen = recorder.counts["unforeseen errors"]
    rises = is_long and any(one.word == "RISING" for one in verdicts)
    return not recorder.broken and not unforeseen and not rises


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=3.0, help="it ends by itself after these; default 3")
    parser.add_argument("--name", default="soak", help="of the files in tests/output")
    options = parser.parse_args()
    seconds = max(20.0, options.minutes * 60)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    fakes = Fakes(FAKES, hooks=FAKES // 2)
    try:
        with Target() as target, Program(folder, configuration(fakes, target.url), AS_MODULE) as program:
            soak = Soak(program, fakes, seconds)
            soak.run()
        soak.recorder.counts["notifications received"] = fakes.received
        well = report(soak.recorder, options.name, seconds)
        if not well:
            shutil.copy(folder / "log", OUTPUT / f"{options.name}.log")
            print(f"its log: tests/output/{options.name}.log")
        return 0 if well else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
