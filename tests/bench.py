"""`make bench`: figures of this machine, each beside its goal, and whether it is reached.

    python tests/bench.py [--only PART,PART...] [--brief]

Nothing is asserted: machines are noisy. So compare within one run: a ratio is to something measured in the
same run, such as the bare interpreter, or Flask with the same answers. "original" are figures of the original
program in Go, measured beside an earlier Load Manager on a machine of two cores (issue 13): goals come
from them, and they are here for orientation. All parts end by themselves, together within 10 minutes."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import gate_simulation  # noqa: E402
from bench_hooks import hooks_figures  # noqa: E402
from bench_page import page_figures  # noqa: E402
from bench_reads import callback_figures, half_sent_figures, read_figures  # noqa: E402
from bench_rows import FOLDER, Rows, both, has_wrk, head, row, scaled, summary, wrk  # noqa: E402
from fake_masters import Fakes  # noqa: E402
from measured_program import (  # noqa: E402
    API_TOKEN,
    AS_MODULE,
    AS_SCRIPT,
    ROOT,
    Program,
    cached_environment,
    clusters_of,
)
from target import Target  # noqa: E402


def program(name: str, ports: list[int] = (), database: str = "memory:", **more: Any) -> Program:
    """Load Manager with a cluster for each port, from cached bytecode as `make run` has it."""
    config = {
        "storage": {"url": database}, "locustClusters": clusters_of(list(ports)),
        "orchestrator": {"metricsPollIntervalSeconds": 1, "lostAfterSeconds": 600}, **more,
    }  # fmt: skip
    return Program(FOLDER / name, config, AS_MODULE)


# ---- start and memory --------------------------------------------------------


def timed_ms(command: list[str], environment: dict[str, str], times: int = 7) -> float:
    """The median of so many starts."""
    found = []
    for _ in range(int(scaled(times, 2))):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
        found.append((time.perf_counter() - began) * 1000)
    return statistics.median(found)


def start_figures() -> None:
    head("start and memory")
    environment = cached_environment()
    command = [sys.executable, "-c", "import loadmanager"]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)  # the cache
    bare_ms = timed_ms(["-c", "pass"], environment)
    row("python -c pass", f"{bare_ms:.0f} ms")
    for name, command, goal_ms in (("module", AS_MODULE, 150), ("script", AS_SCRIPT, None)):
        times, memory = [], []
        for number in range(int(scaled(5, 2))):
            with Program(
                FOLDER / f"{name}{number}", {"storage": {"url": "sqlite:///lm.db"}}, command
            ) as started:
                started.call("GET", "/health")
                times.append((time.perf_counter() - started.began) * 1000)
                time.sleep(0.3)
                memory.append(started.resident_mib())
        ms, mib = statistics.median(times), statistics.median(memory)
        is_fast = None if goal_ms is None else ms <= goal_ms
        goal = f"<= {goal_ms} ms" if goal_ms else "one-file way"
        row(
            f"start to first /health, as a {name}",
            f"{ms:.0f} ms",
            goal,
            is_fast,
            f"{ms / bare_ms:.1f} x bare Python",
        )
        row("  its memory, idle", f"{mib:.0f} MiB", "<= 30 MiB", mib <= 30, "original 9")
    with program("commands") as served:
        environment |= {"LOADMANAGER_URL": served.url, "LOADMANAGER_TOKEN": API_TOKEN}
        for command in (["list"], ["--help"], ["--version"]):
            ms = timed_ms(["-m", "loadmanager", *command], environment)
            row(
                f"command {command[0]}, as a module",
                f"{ms:.0f} ms",
                "<= 120 ms",
                ms <= 120,
                f"{ms / bare_ms:.1f} x bare Python",
            )


# ---- runs --------------------------------------------------------------------


def auto_stop_figures() -> None:
    head("lateness of stops, 50 runs of 6 s")
    for hanging in (0, 5):
        late, missing = lateness_ms(hanging)
        beside = f", {hanging} others hang" if hanging else ""
        figure = both(late, "ms") + (f", {missing} NOT STOPPED" if missing else "")
        is_reached = not missing and statistics.median(late) <= 5 and max(late) <= 25
        row(f"median / max{beside}", figure, "<= 5 / <= 25 ms", is_reached, "original 968 / 1,001 ms")


def lateness_ms(hanging: int) -> tuple[list[float], int]:
    """How late each load was stopped whose cluster answers, and how many were not within 20 s."""
    count, duration_s = int(scaled(50, 5)) + hanging, int(scaled(6, 2))
    fakes, runs = Fakes(count, hanging), {}
    with program(f"stops{hanging}", fakes.ports) as served:

        def create(number: int) -> None:
            run = served.create(number, None if number < hanging else duration_s)
            runs[fakes.ports[number]] = run

        threads = [threading.Thread(target=create, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fakes.hang_now()
        wanted = fakes.ports[hanging:]
        give_up_at = time.monotonic() + 20
        while not all(port in fakes.stopped_at for port in wanted) and time.monotonic() < give_up_at:
            time.sleep(0.05)
    offset = time.time() - time.monotonic()
    late = [
        (fakes.stopped_at[port] + offset - runs[port]["startedAtMs"] / 1000 - duration_s) * 1000
        for port in wanted
        if port in fakes.stopped_at
    ]
    return late, len(wanted) - len(late)


def create_figures() -> None:
    head("creates, durable, one after the other, each on a cluster of its own")
    fakes = Fakes(int(scaled(200, 10)))
    to_swarm, to_answer = [], []
    with program("creates", fakes.ports, "sqlite:///lm.db") as served:
        connection = served.connect()
        for number, port in enumerate(fakes.ports):
            fakes.asked_at.pop(port, None)
            body = {
                "tenantId": "t",
                "envId": f"e{number}",
                "scenarioId": "bench",
                "targetUsers": 5,
                "spawnRate": 5,
            }
            began = time.monotonic()
            status, run = served.call_on(connection, "POST", "/v1/tests", body)
            ended = time.monotonic()
            assert status == 201, run
            check_s = fakes.answered_at[port] - fakes.asked_at[port]  # at the master, the idle check alone
            to_swarm.append((fakes.swarmed_at[port] - began - check_s) * 1000)
            to_answer.append((ended - began - check_s) * 1000)
    plain_ms = plain_call_ms(fakes.ports[0])
    for what, values, most, original in (
        ("to /swarm at the master", to_swarm, 1, 0.5),
        ("to the answer", to_answer, 2, 1.0),
    ):
        middle = statistics.median(values)
        ratio = f"{middle / plain_ms:.1f} x a plain call; original {original}"
        row(
            f"request {what}, without the idle check, median / max",
            both(values, "ms", 2),
            f"median <= {most} ms",
            middle <= most,
            ratio,
        )


def plain_call_ms(port: int) -> float:
    """A call of a fake master on a new connection, by http.client."""
    times = []
    for _ in range(50):
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/loadmanager/state")
        connection.getresponse().read()
        connection.close()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def plain_poll_us(port: int) -> float:
    """Processor time of the simplest poll: http.client on a kept connection, and json."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began = 0.0
    for number in range(400):
        if number == 100:
            began = time.thread_time()
        connection.request("GET", "/stats/requests")
        json.loads(connection.getresponse().read())
    return 1e6 * (time.thread_time() - began) / 300


def polling_figures() -> None:
    clusters = int(scaled(200, 20))
    head(f"polling {clusters} masters each second, a tenth of them hang")
    fakes = Fakes(clusters, hanging=clusters // 10)
    with program("polls", fakes.ports) as served:
        for number in range(clusters):
            served.create(number)
        fakes.hang_now()
        time.sleep(scaled(6, 2))
        seconds = scaled(8, 2)
        cpu_s, began = served.cpu_s(), time.monotonic()
        time.sleep(seconds)
        spent, seconds = served.cpu_s() - cpu_s, time.monotonic() - began
        ages = sorted(sample_ages_s(served, clusters // 10))
        one = served.call("GET", "/v1/tests?limit=1")[0]["id"]
        bearer = {"Authorization": f"Bearer {API_TOKEN}"}
        load = wrk(f"{served.url}/v1/tests/{one}", 64, bearer) if has_wrk() else None
    share, each_us = 100 * spent / seconds, 1e6 * spent / seconds / clusters
    plain_us = plain_poll_us(fakes.ports[-1])
    row("processor time of all", f"{share:.1f} % of a core", "<= 6 %", share <= 6)
    row(
        "  of one poll",
        f"{each_us:.0f} us",
        "<= 425 us (the original)",
        each_us <= 425,
        f"{each_us / plain_us:.1f} x http.client and json",
    )
    middle, most = statistics.median(ages), ages[int(len(ages) * 0.99)]
    row(
        "age of the newest sample, median / p99",
        f"{middle:.2f} / {most:.2f} s",
        "<= 0.6 / <= 1.1 s",
        middle <= 0.6 and most <= 1.1,
        "original 7.7 / 12.7 s",
    )
    if load:
        row(
            "status reads beside it, 64 connections",
            str(load),
            "p99 <= 18.9 ms, the original's",
            load.p99_ms <= 18.9,
        )


def sample_ages_s(served: Program, hanging: int) -> list[float]:
    ages = []
    for _ in range(int(scaled(8, 2))):
        time.sleep(0.7)
        now = time.time()
        for run in served.call("GET", "/v1/tests"):
            if int(run["envId"][1:]) >= hanging and "lastMetrics" in run:
                ages.append(now - run["lastMetrics"]["timestampMs"] / 1000)
    return ages


# ---- many runs ---------------------------------------------------------------

FILL = """
import sys, time
sys.path.insert(0, sys.argv[1])
import loadmanager as lm
store = lm.Store(lm.open_database("sqlite:///" + sys.argv[2], "."))
figures = (1000, 3, 12.345, 1.5, 99.5, 11, 33.25, 40, 90)
rows = tuple(lm.EndpointStats("GET", f"/api/items/{n}", *figures) for n in range(12))
for number in range(int(sys.argv[3]), int(sys.argv[4])):
    ticket = {"ticket": f"PERF-{number}"}
    request = lm.RunRequest("t", "e", "bench", 5, 5.0, duration_s=60, metadata=ticket)
    run = lm.replace(
        lm._new_run(request, "bench", "api"), cluster_id="c0", seq=number + 1,
        status=lm.RunStatus.FINISHED, started_at=time.time(), finished_at=time.time(), stop_reason="duration",
    )
    numbers = lm.Numbers(lm.Snapshot(time.time(), 3.5, 12000, 36, 0.3, 12.3, 11, 33, 40, 5, rows), "final")
    store._writer.save(lm.RunState(run, numbers))
store._writer.wait_durable(60)
store.close()
"""


def fill(database: Path, first: int, end: int) -> None:
    command = [sys.executable, "-c", FILL, str(ROOT), str(database), str(first), str(end)]
    subprocess.run(command, check=True, timeout=120)


def many_runs_figures() -> None:
    count = int(scaled(10_000, 500))
    head(f"{count:,} runs")
    database = FOLDER / "many.db"
    fill(database, 0, count)
    with program("many", database=f"sqlite:///{database}") as served:
        connection = served.connect()
        for what, path, goal_ms, original_ms in (
            ("list of them all", "/v1/tests", 60, 541),
            ("a page of 50", "/v1/tests?limit=50", 1, 401),
            ("a filter without a match", "/v1/tests?tenantId=nobody&limit=50", 1, 0.7),
        ):
            ms = read_ms(connection, path)
            goal = f"<= {goal_ms} ms"
            row(f"{what}, median", f"{ms:.2f} ms", goal, ms <= goal_ms, f"original {original_ms} ms")
        mib = served.resident_mib()
        row("memory after that", f"{mib:.0f} MiB", "<= 120 MiB", mib <= 120, "original 245")
    more = int(scaled(50_000, 1000))
    fill(database, count, more)
    with program("most", database=f"sqlite:///{database}") as served:
        served.call("GET", "/health")
        seconds, mib = time.perf_counter() - served.began, served.resident_mib()
    row(f"start with {more:,} runs", f"{seconds:.2f} s", "<= 1.5 s", seconds <= 1.5)
    row("  its memory", f"{mib:.0f} MiB", "<= 100 MiB", mib <= 100)


def read_ms(connection: http.client.HTTPConnection, path: str) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        connection.request("GET", path, headers={"Authorization": f"Bearer {API_TOKEN}"})
        connection.getresponse().read()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


# ---- launched clusters -------------------------------------------------------


def cold_start_figures() -> None:
    """A sleeping cluster of real Locust: from the create to the first request at the target."""
    head("a launched cluster of real Locust")
    asleep, awake = [], []
    with Target() as target:
        launcher = {
            "type": "process", "locustfile": str(ROOT / "locust" / "locustfile.py"), "workers": 2,
            "host": target.url, "idleSeconds": 1,
        }  # fmt: skip
        places = [{"id": "local", "tenantId": "t", "envId": "e0", "launcher": launcher}]
        with program("cold", locustClusters=places) as served:
            for _ in range(int(scaled(3, 1))):
                asleep.append(first_request_ms(served, target))
                awake.append(first_request_ms(served, target))
                wait_until(lambda: served.call("GET", "/v1/clusters")[0]["state"] == "asleep")
    row("create to the first request at the target, asleep", f"{statistics.median(asleep):.0f} ms")
    row("  awake", f"{statistics.median(awake):.0f} ms")


def first_request_ms(served: Program, target: Target) -> float:
    seen, began = target.total, time.perf_counter()
    run = served.create(0)
    wait_until(lambda: target.total > seen, 0.002)
    ms = (time.perf_counter() - began) * 1000
    served.call("POST", f"/v1/tests/{run['id']}/stop")
    wait_until(lambda: served.call("GET", f"/v1/tests/{run['id']}")["status"] in ("Finished", "Failed"))
    return ms


def wait_until(condition: Any, every_s: float = 0.05) -> None:
    give_up_at = time.monotonic() + 30
    while not condition() and time.monotonic() < give_up_at:
        time.sleep(every_s)


def gate_figures() -> None:
    """All worlds with few pairs, as there is much else; `python tests/gate_simulation.py 1000` has more."""
    print()
    gate_simulation.figures(int(scaled(15, 2)), names=["quiet"] if Rows.brief else gate_simulation.WORLDS)


LAST_START_S = 480  # no part begins later, and none takes more than two minutes: 10 minutes in all
PARTS = {
    "start": start_figures,
    "reads": read_figures,
    "callbacks": callback_figures,
    "half": half_sent_figures,
    "stops": auto_stop_figures,
    "creates": create_figures,
    "polls": polling_figures,
    "many": many_runs_figures,
    "page": page_figures,
    "hooks": hooks_figures,
    "cold": cold_start_figures,
    "gate": gate_figures,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Figures of this machine, each beside its goal.")
    parser.add_argument("--only", default="", metavar="PART,...", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--brief", action="store_true", help="so short that only its working is shown")
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name] or list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--only must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    Rows.brief = options.brief
    began = time.monotonic()
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    try:
        for name in chosen:
            if time.monotonic() - began > LAST_START_S:
                print(f"\n{name}: left out, it would end too late; make bench ONLY={name}")
                continue
            PARTS[name]()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    summary()
    print(f"{time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
