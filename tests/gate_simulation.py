"""Simulated runs for the comparison: how often equal runs are called a regression, how often a slower one is
found.

    python tests/gate_simulation.py [pairs] [seed]

Each pair is a run and its history of five. A run is made as a machine makes it: its level differs from run
to run,
its seconds are alike, bursts slow all of it. What is counted is what users see: the judgement of a whole
comparison."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import loadmanager

BLOCKS = 10  # seconds of a run
REQUESTS = 1000  # of an endpoint in a run
BASES = {"/fast": 30.0, "/slow": 100.0}  # ms
HISTORY = 5


class World(NamedTuple):
    """How far runs lie apart: relative standard deviations."""

    between: float = 0.01  # of a run's level, all its endpoints alike
    own: float = 0.005  # of an endpoint's level within a run
    block: float = 0.01  # of a second's level
    correlation: float = 0.0  # of one second with the next
    burst: float = 0.0  # probability of a burst in a second
    tails: float = math.inf  # degrees of freedom of the runs' levels
    walk: float = 0.0  # step of a random walk from run to run
    memory: float = 0.0  # correlation of one run's level with the next one's
    endpoints: int = 2


WORLDS = {
    "quiet": World(),
    "busy machine": World(between=0.04, own=0.01, block=0.04, correlation=0.7, burst=0.05),
    "autocorrelated within": World(block=0.06, correlation=0.9),
    "bursts": World(burst=0.1),
    "heavy tails": World(between=0.02, tails=3.0),
    "drift": World(walk=0.005),
    "runs alike in time": World(between=0.03, memory=0.7),
    "ten endpoints": World(between=0.02, endpoints=10),
}


def levels(world: World, draw: random.Random) -> list[float]:
    """The levels of a history and of the run after it, as logarithms."""
    found, walked, last = [], 0.0, draw.gauss(0, 1)
    for _ in range(HISTORY + 1):
        fresh = draw.gauss(0, 1)
        if world.tails < math.inf:
            fresh /= math.sqrt(draw.gammavariate(world.tails / 2, 2) / world.tails)
        last = world.memory * last + math.sqrt(1 - world.memory**2) * fresh
        walked += draw.gauss(0, world.walk)
        found.append(world.between * last + walked)
    return found


def names_of(world: World) -> dict[str, float]:
    if world.endpoints == 2:
        return BASES
    return {f"/{index}": 20.0 * 1.25**index for index in range(world.endpoints)}


def a_run(world: World, draw: random.Random, level: float, slower: dict[str, float], run_id: str):
    """A run with its time blocks, of an endpoint `slower` by that proportion."""
    seconds, state = [], draw.gauss(0, 1)
    for _ in range(BLOCKS):
        state = world.correlation * state + math.sqrt(1 - world.correlation**2) * draw.gauss(0, 1)
        burst = draw.uniform(0.1, 1.0) if draw.random() < world.burst else 0.0
        seconds.append(level + world.block * state + burst)
    names = names_of(world)
    blocks: dict = {None: []}
    own = {name: draw.gauss(0, world.own) + math.log1p(slower.get(name, 0.0)) for name in names}
    in_block = max(5, REQUESTS * 2 // len(names) // BLOCKS)
    for second in seconds:
        parts = []
        for name, base in names.items():
            times: dict[int, int] = {}
            for _ in range(in_block):
                ms = round(base * math.exp(second + own[name] + draw.gauss(0, 0.15)))
                ms = ms if ms < 1000 else round(ms, 3 - len(str(ms)))
                times[ms] = times.get(ms, 0) + 1
            part = loadmanager.Histogram(in_block, 0, float(sum(ms * n for ms, n in times.items())), times)
            blocks.setdefault(("GET", name), []).append(part)
            parts.append(part)
        blocks[None].append(loadmanager.functools.reduce(loadmanager._sum, parts))
    document = document_of(blocks, run_id)
    return loadmanager.ComparedRun(document, loadmanager.run_figures(document, blocks))


def document_of(blocks: dict, run_id: str) -> dict:
    """The run's JSON, as far as a comparison reads it."""
    wholes = {key: loadmanager.functools.reduce(loadmanager._sum, parts) for key, parts in blocks.items()}
    rows = {f"GET_{key[1]}": {"method": "GET", "name": key[1], "numRequests": whole.requests,
        "numFailures": 0}
            for key, whole in wholes.items() if key}  # fmt: skip
    requests = wholes[None].requests
    rate = requests / (wholes[None].total_ms / 1000 / 15)  # 15 users without a pause
    metrics = {"totalRequests": requests, "totalFailures": 0, "totalRps": rate, "requestStats": rows}
    return {"id": run_id, "status": "Finished", "lastMetrics": metrics}


def judged(world: World, seed: int, effect: float = 0.0) -> dict:
    """The comparison of a run, one endpoint slower by `effect`, with its history."""
    draw = random.Random(f"{world}{seed}{effect}")
    found = levels(world, draw)
    victim = list(names_of(world))[-1]
    history = [a_run(world, draw, level, {}, f"h{index}") for index, level in enumerate(found[:-1])]
    return loadmanager.compare_runs(history, a_run(world, draw, found[-1], {victim: effect}, "now"))


def count(world: World, pairs: int, seed: int, effect: float = 0.0, any_size: bool = False) -> int:
    """In how many pairs a regression was found; any_size: however small."""
    found = 0
    tolerances = loadmanager.DEFAULT_TOLERANCES
    if any_size:
        loadmanager.DEFAULT_TOLERANCES = {name: loadmanager.Tolerance(0, True) for name in tolerances}
    try:
        for pair in range(pairs):
            found += judged(world, seed * 1_000_000 + pair, effect)["judgement"] == loadmanager.REGRESSION
    finally:
        loadmanager.DEFAULT_TOLERANCES = tolerances
    return found


def interval(found: int, of: int) -> str:
    """The proportion in percent with its 95 % interval (Wilson)."""
    z, share = 1.96, found / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return f"{100 * share:.1f} % ({100 * max(0, centre - half):.1f} to {100 * (centre + half):.1f})"


def figures(pairs: int = 1000, seed: int = 1, names: Iterable[str] = tuple(WORLDS)) -> None:
    stated = 100 * loadmanager.FAMILY_FALSE_ALARMS
    print(
        f"comparison, simulated: history of {HISTORY}, {pairs} pairs each, seed {seed}, stated rate "
        f"{stated:g} %"
    )
    print(
        "  "
        f"{'':24}{'false alarms at any size':>28}{'with tolerances':>24}{'5 %':>8}{'10 %':>8}{'20 %':>8} "
        "slower found"
    )
    for name in names:
        world = WORLDS[name]
        any_size = interval(count(world, pairs, seed, any_size=True), pairs)
        kept = interval(count(world, pairs, seed), pairs)
        some = max(20, pairs // 5)
        found = [f"{100 * count(world, some, seed, effect) / some:7.0f}%" for effect in (0.05, 0.1, 0.2)]
        print(f"  {name:24}{any_size:>28}{kept:>24}{''.join(found)}", flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    figures(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    print(f"{time.monotonic() - began:.0f} s")
