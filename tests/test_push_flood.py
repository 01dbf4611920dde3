"""A token of one tenant's cluster that calls back without end: what is kept of it is bounded, and what it
said last is not lost."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing

import fake_locust as faults
import pytest
from conftest import cluster_config
from control_plane import ControlPlane
from waiting import eventually

import loadmanager

STEP_S, BURST = loadmanager.SAMPLE_STEP_S, loadmanager.SAMPLE_BURST


@pytest.fixture
def served(tmp_path, fake):
    fake.faults["*"] = faults.close_silently  # its own numbers would contradict those that are pushed
    with ControlPlane(tmp_path, [cluster_config(fake.url, tenantId="t", envId="e")]) as plane:
        yield plane


def kept(plane, run_id):
    """The number of requests in each pushed sample in the database, in the order of their times."""
    with closing(sqlite3.connect(plane.folder / "lm.db", timeout=10)) as connection:
        rows = connection.execute(
            "SELECT requests FROM samples WHERE run_id = ? AND source = 'push' ORDER BY at, rowid", (run_id,)
        ).fetchall()
    return [requests for (requests,) in rows]


def flood(plane, run_id, seconds, threads=4):
    """Push as fast as possible; how many, and the last number of requests. The last one comes alone."""
    until, counts = time.monotonic() + seconds, [0] * threads

    def push(index):
        while time.monotonic() < until:
            counts[index] += 1
            assert plane.push(run_id, sum(counts)) == 200

    pushing = [threading.Thread(target=push, args=(index,)) for index in range(threads)]
    for one in pushing:
        one.start()
    for one in pushing:
        one.join()
    last = sum(counts) + 1_000_000
    assert plane.push(run_id, last) == 200
    return sum(counts) + 1, last


def test_flood_of_callbacks_keeps_some_samples_a_second_and_the_last(served):
    run_id, began = served.external_run(), time.monotonic()
    pushed, last = flood(served, run_id, 4)
    lasted_s = time.monotonic() - began
    assert pushed > 500, "this was no flood"
    eventually(lambda: kept(served, run_id)[-1] == last, 2, what="the last one is kept")
    requests = kept(served, run_id)
    most = BURST + lasted_s / STEP_S + loadmanager._PushedSamples.AT_ONCE
    assert BURST < len(requests) <= most, (len(requests), pushed, lasted_s)
    assert served.run(run_id)["lastMetrics"]["totalRequests"] == last
    served.kill9()
    served.start()
    assert served.run(run_id)["lastMetrics"]["totalRequests"] == last


def test_last_callback_before_a_shutdown_or_the_end_is_kept(served):
    run_id = served.external_run()
    _, last = flood(served, run_id, 1)
    served.end()
    assert kept(served, run_id)[-1] == last
    served.start()
    _, last = flood(served, run_id, 1)
    ended = served.callback("test-stop", {"runId": run_id})
    assert ended.status == 200, ended.body
    served.wait_for(run_id, "Finished", within_s=30)
    assert kept(served, run_id)[-1] == last


class Clock:
    """A monotonic clock that stands."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loadmanager, "monotonic_s", clock)
    return clock


def sample(number, **values):
    nothing = loadmanager.Sample("r", *[None] * (len(loadmanager.Sample._fields) - 1))
    return nothing._replace(at=float(number), **values)


def test_hooks_that_push_every_second_or_catch_up_lose_no_sample(clock):
    pushed = loadmanager._PushedSamples()
    for second in range(100):
        clock.now += 1
        assert pushed.take(sample(second))
    assert all(pushed.take(sample(number)) for number in range(BURST)), (
        "hooks that were not heard for a while"
    )
    for second in range(100):
        clock.now += 1
        assert pushed.take(sample(second)) and not pushed.due(False)
    clock.now += 10
    assert not pushed.due(False) and not pushed._paid_until, "nothing is remembered of runs"


def test_extremes_and_the_last_one_of_a_flood_are_kept(clock):
    pushed = loadmanager._PushedSamples()
    kept = [one for one in (sample(n, p95_ms=20.0) for n in range(BURST + 1)) if pushed.take(one)]
    assert len(kept) == BURST + 1
    flood = [sample(1000 + n, p95_ms=9999.0 if n == 777 else 20.0, requests=n) for n in range(12_000)]
    assert not any(map(pushed.take, flood))
    assert pushed.due(False) == [], "its time has not come"
    clock.now += STEP_S
    kept = pushed.due(False)
    assert len(kept) <= pushed.AT_ONCE and kept[-1] == flood[-1] and flood[777] in kept
    assert not pushed.take(flood[0]) and pushed.due(True) == [flood[0]], "who reads finds what there is"
    assert not pushed.take(flood[1])
    clock.now += pushed.AT_ONCE * STEP_S
    assert pushed.due(False) == [flood[1]]


def test_histograms_that_say_any_time_are_kept_some_times_a_second(clock):
    """A flood whose numbers say that they are of one second after the other."""
    pushed = loadmanager._PushedSamples()
    flood = [pushed.takes_histograms(sample(n, source="push")) for n in range(1000)]
    assert sum(flood) == loadmanager.HISTOGRAMS_BURST + 1
    for second in range(100):
        clock.now += 1
        assert pushed.takes_histograms(sample(second, source="push")), "hooks that push every second"
    assert all(pushed.takes_histograms(sample(n, source="poll")) for n in range(1000))


def test_flood_of_histograms_keeps_some_a_second(served):
    run_id, began, now = served.external_run(), time.monotonic(), time.time()
    for number in range(300):
        timestamp = loadmanager.utc_text(now - 1000 + number)
        answer = served.push(run_id, number + 1, timestamp=timestamp, responseTimes={"5": number + 1})
        assert answer == 200

    def rows():
        with closing(sqlite3.connect(served.folder / "lm.db", timeout=10)) as connection:
            return connection.execute("SELECT COUNT(*) FROM histograms").fetchone()[0]

    lasted_s = time.monotonic() - began
    time.sleep(1)
    assert 1 <= rows() <= loadmanager.HISTOGRAMS_BURST + lasted_s / loadmanager.HISTOGRAMS_STEP_S + 2
