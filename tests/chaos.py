"""`make chaos`: clients, faults of Locust and `kill -9` of Load Manager at random, then the invariants.

    python tests/chaos.py [--seed N] [--seconds S]

Exit status 0 when all held. The same seed makes the same faults, not the same timing."""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import fake_locust as faults  # noqa: E402
from conftest import LoadManager, base_config, cluster_config, create_body  # noqa: E402
from fake_locust import FakeLocust  # noqa: E402

PATHS = ("/swarm", "/stop", "/stats/requests", "/loadmanager/state", "/stats/requests/csv")
FAULTS = (faults.answer_500, faults.close_silently, faults.answer_garbage, faults.hang)
QUIET_WITHIN_S = 120


class Clients:
    """Threads that create, stop and list; they remember what they were answered."""

    def __init__(self, manager: LoadManager, environments: int, seed: int, count: int = 6):
        self._manager, self._environments = manager, environments
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self.answered: set[str] = set()  # ids of 2xx answers, and of runs that errors named
        self.finals: dict[str, str] = {}  # a final run as first seen
        self.broken: list[str] = []
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(seed * 100 + number),), daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(45)

    def _work(self, chance: random.Random) -> None:
        mine: list[str] = []
        while not self._stopping.wait(chance.random() * 0.3):
            try:
                self._act(chance, mine)
            except (OSError, http.client.HTTPException, ValueError):
                self._stopping.wait(0.1)  # Load Manager was killed just now

    def _act(self, chance: random.Random, mine: list[str]) -> None:
        what = chance.random()
        if what < 0.4:
            body = create_body(
                envId=f"e{chance.randrange(self._environments)}",
                durationSeconds=chance.choice([1, 2, 3]),
                queue=chance.random() < 0.1,
            )
            answer = self._manager.post("/v1/tests", body)
            run_id = answer.json.get("id") or answer.json.get("runId")
            if run_id:
                with self._lock:
                    self.answered.add(run_id)
                mine.append(run_id)
        elif what < 0.6 and mine:
            answer = self._manager.post(f"/v1/tests/{chance.choice(mine)}/stop")
        else:
            answer = self._manager.get("/v1/tests")
            for run in answer.json if answer.status == 200 else ():
                self.see(run)
        if answer.status == 500:
            self.broken.append(f"500: {answer.body!r}")

    def see(self, run: dict[str, Any]) -> None:
        """A final run must stay the same in every byte."""
        if run["status"] not in ("Finished", "Failed"):
            return
        text = json.dumps(run, sort_keys=True)
        with self._lock:
            first = self.finals.setdefault(run["id"], text)
        if first != text:
            self.broken.append(f"a final run changed:\n{first}\n{text}")


def disturb(manager: LoadManager, fakes: list[FakeLocust], chance: random.Random, seconds: float) -> int:
    """Faults and kills for so long; how many kills."""
    kills, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(chance.random() * 2)
        what, fake = chance.random(), chance.choice(fakes)
        if what < 0.25:
            manager.kill9()
            kills += 1
            time.sleep(chance.random() * 1.5)
            manager.start()
        elif what < 0.65:
            fake.faults[chance.choice(PATHS)] = chance.choice(FAULTS)
        elif what < 0.75:
            fake.restart()
        else:
            fake.faults.clear()
    return kills


def heal(fakes: list[FakeLocust]) -> None:
    for fake in fakes:
        fake.faults.clear()
        fake.released.set()
        fake.released = threading.Event()


def wait_until_quiet(manager: LoadManager, fakes: list[FakeLocust]) -> float | None:
    """Seconds until no run is active and no load is left; None when that does not come."""
    began = time.monotonic()
    while time.monotonic() - began < QUIET_WITHIN_S:
        active = [
            run
            for run in manager.get("/v1/tests").json
            if run["status"] in ("Pending", "Running", "Stopping")
        ]
        if not active and not any(fake.users for fake in fakes):
            return time.monotonic() - began
        time.sleep(0.5)
    return None


def broken_invariants(manager: LoadManager, fakes: list[FakeLocust], clients: Clients) -> list[str]:
    runs = {run["id"]: run for run in manager.get("/v1/tests").json}
    for run in runs.values():
        clients.see(run)
    broken = list(clients.broken)
    broken += [f"run {run_id} was answered and is not listed" for run_id in clients.answered - set(runs)]
    for fake in fakes:
        swarmed = [call.form.get("run_id") for call in fake.swarms if call.form.get("user_count") != "1"]
        broken += [
            f"run {run_id} was swarmed {swarmed.count(run_id)} times"
            for run_id in set(swarmed)
            if swarmed.count(run_id) > 1
        ]
    broken += [line[:500] for line in manager.log().splitlines() if "trace=" in line]
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--seconds", type=float, default=45)
    options = parser.parse_args()
    fakes = [FakeLocust(hooks=number != 2).start() for number in range(3)]
    clusters = [
        cluster_config(fake.url, f"c{number}", envId=f"e{number}") for number, fake in enumerate(fakes)
    ]
    rules = {"lostAfterSeconds": 4, "metricsPollIntervalSeconds": 0.3}
    with tempfile.TemporaryDirectory() as folder:
        manager = LoadManager(Path(folder), base_config(*clusters, orchestrator=rules)).start()
        try:
            clients = Clients(manager, len(fakes), options.seed)
            kills = disturb(manager, fakes, random.Random(options.seed), options.seconds)
            heal(fakes)
            clients.stop()
            quiet_s = wait_until_quiet(manager, fakes)
            broken = broken_invariants(manager, fakes, clients)
        finally:
            manager.end()
            for fake in fakes:
                fake.close()
    if quiet_s is None:
        broken.append(f"runs or loads were left {QUIET_WITHIN_S} s after the last fault")
    swarms = sum(len(fake.swarms) for fake in fakes)
    print(
        f"seed {options.seed}: {len(clients.answered)} runs answered, {swarms} swarms, {kills} kills, quiet after {quiet_s or -1:.0f} s, {len(broken)} broken"
    )
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
