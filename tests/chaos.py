"""`make chaos`: episodes of faults and kills at chosen points, several at a time, then the invariants.

    python tests/chaos.py [--seed N] [--minutes M] [--jobs J] [EPISODE ...]

Exit status 0 when every invariant held. The same seed makes the same faults, not the same timing: what is
broken comes with its seed, and with a timeline and a log in tests/output/campaign."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from campaign_episodes import EPISODES  # noqa: E402

OUTPUT = HERE / "output" / "campaign"
EPISODE_S = 240  # none takes longer; one that does is broken


def run_one(name: str, seed: str) -> dict[str, Any]:
    """The episode's result; its report is kept when something is broken."""
    world = EPISODES[name](seed)
    if world.broken:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / f"{name}-{seed}.txt").write_text(world.report(), errors="replace")
    world.close()
    return {"broken": world.broken, "faults": world.faults, "checked": world.checked}


class Campaign:
    """Takes episodes in a random order until the time is over."""

    def __init__(self, seed: int, names: list[str], minutes: float, jobs: int):
        self.seed = seed
        self._names, self._jobs = names, jobs
        self._end = time.monotonic() + minutes * 60
        self._lock = threading.Lock()
        self._plan = self._shuffled()
        self.faults: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()
        self.episodes: Counter[str] = Counter()
        self.broken: list[str] = []

    def _shuffled(self) -> Iterator[tuple[str, str]]:
        chance = random.Random(self.seed)
        for number in range(10**6):
            names = list(self._names)
            chance.shuffle(names)
            for name in names:
                if number and time.monotonic() > self._end:  # each of them once at least
                    return
                yield name, f"{self.seed}.{number}"

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._jobs)]
        for thread in threads:
            thread.start()
            time.sleep(0.5)
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                name, seed = next(self._plan, (None, ""))
            if name is None:
                return
            result = self._episode(name, seed)
            with self._lock:
                self._count(name, seed, result)

    def _episode(self, name: str, seed: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "chaos.py"), "--one", name, "--seed", seed]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=EPISODE_S, check=False)
            return json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            tail = done.stderr[-1500:] if isinstance(error, (ValueError, IndexError)) else "hangs"
            return {"broken": [f"the episode itself: {tail}"], "faults": {}, "checked": {}}

    def _count(self, name: str, seed: str, result: dict[str, Any]) -> None:
        self.episodes[name] += 1
        self.faults.update(result["faults"])
        self.checked.update(result["checked"])
        self.broken += [f"{name} --seed {seed}: {line}" for line in result["broken"]]
        print(f"{name} {seed}: {len(result['broken'])} broken", flush=True)
        for line in result["broken"]:
            print(f"    {line[:900]}", flush=True)

    def print_counts(self) -> None:
        for title, counts in (("episodes", self.episodes), ("faults", self.faults), ("checks", self.checked)):
            print(f"\n{title}")
            for name, count in sorted(counts.items()):
                print(f"{count:8} {name}")
        totals = [sum(counts.values()) for counts in (self.episodes, self.faults, self.checked)]
        words = "{} episodes, {} faults, {} checks".format(*totals)
        print(f"\nseed {self.seed}: {words}, {len(self.broken)} broken")
        if self.broken:
            print(
                f"again: python tests/chaos.py --one EPISODE --seed SEED; timelines and logs: {OUTPUT.name}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--jobs", type=int, default=3, help="episodes at the same time")
    parser.add_argument(
        "--one", metavar="EPISODE", help="one episode in this process; prints its result as JSON"
    )
    parser.add_argument("episodes", nargs="*", metavar="EPISODE", help=f"of {', '.join(EPISODES)}")
    options = parser.parse_args()
    if options.one:
        result = run_one(options.one, options.seed)
        print(json.dumps(result))
        return 1 if result["broken"] else 0
    campaign = Campaign(int(options.seed), options.episodes or list(EPISODES), options.minutes, options.jobs)
    campaign.run()
    campaign.print_counts()
    return 1 if campaign.broken else 0


if __name__ == "__main__":
    sys.exit(main())
