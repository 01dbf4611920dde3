"""When Locust made the numbers that it answers, and what is made of them: windows, counters, resets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import LoadManager, cluster_config
from fake_locust import FakeLocust
from locust_process import LocustCluster
from waiting import eventually

import loadmanager
from loadmanager import Sample, Snapshot, StatsTimes

# ---- when an answer of Locust's cache was made ----


def readings(poll_s: float, cache_s: float = 2.0, until: float = 30.0, phase: float = 0.7):
    """(when Locust made it, what StatsTimes says of it) for polls of a cache, by a clock of the test."""
    times, at, made, found = StatsTimes(), phase, -100.0, []
    while at < until:
        if at - made > cache_s:
            made = at + 0.01
        found.append((made, times.record(made, at, at + 0.02)))
        at += poll_s
    return found


@pytest.mark.parametrize("poll_s", [0.1, 0.5, 1.0, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("cache_s", [2.0, 4.0])
def test_the_time_of_a_cached_answer_lies_within_what_is_said_of_it(poll_s: float, cache_s: float) -> None:
    seen = set()
    for made, (said, uncertainty_s, is_repeat) in readings(poll_s, cache_s):
        assert said - uncertainty_s <= made <= said
        assert uncertainty_s <= 2.1
        assert is_repeat == (made in seen)
        seen.add(made)


def test_polls_that_are_more_frequent_know_the_time_better() -> None:
    uncertain_s = [uncertainty_s for _, (_, uncertainty_s, _) in readings(0.5)[8:]]
    assert max(uncertain_s) < 0.6


# ---- windows of what is polled or pushed ----


def sample(at: float, requests: int, rps: float | None = None, counted: tuple | None = None) -> Sample:
    counted_at, counted_requests, counted_failures = counted or (None, None, None)
    known = {"run_id": "r", "at": at, "requests": requests, "failures": 0, "rps": rps, "source": "poll"}
    unknown = {name: None for name in Sample._fields if name not in known}
    exact = {
        "counted_at": counted_at,
        "counted_requests": counted_requests,
        "counted_failures": counted_failures,
    }
    return Sample(**{**unknown, **known, **exact})


def cached_samples(poll_s: float, rps: float | None = 100.0, until: int = 60) -> list[Sample]:
    """100 requests/s behind a cache of 2 s and workers' reports of 3 s; times as a poller sees them."""
    samples, at, made = [], 1.0, -10.0
    while at < until:
        if at - made > 2.0:
            made = at
            samples.append(sample(at, 100 * int(made // 3 * 3), rps))
        at += poll_s
    return samples


def judged(expr: str, samples: list[Sample], until: float = 60.0) -> loadmanager.Threshold:
    """What came of it: at the end from the kept samples, and the same while they came."""
    threshold = loadmanager.parse_threshold(expr)
    watch, values = loadmanager.ThresholdWatch((threshold,)), []
    for one in samples:
        snapshot = Snapshot(
            one.at, one.rps, one.requests, 0, None, None, None, None, None, None, None, 0.0,
            counted_at=one.counted_at, counted_requests=one.counted_requests,
            counted_failures=one.counted_failures,
        )  # fmt: skip
        watch.record_sample(snapshot, 0.0)
    final = loadmanager.judge_threshold(threshold, None, samples, (0.0, until), None)
    if final.result == "passed":
        assert watch.first_failed == [None], "it was seen to fail while the run went on"
    return final._replace(message=final.message or str(values or ""))


@pytest.mark.parametrize("poll_s", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("window", ["over 10s", "over 30s", "after 10s", "over 10s after 5s"])
def test_an_exact_rate_behind_a_cache_is_judged_as_it_is(poll_s: float, window: str) -> None:
    samples = cached_samples(poll_s)
    assert judged(f"totalRps >= 99.9 {window}", samples).result == "passed"
    assert judged(f"totalRps <= 100.1 {window}", samples).result == "passed"


@pytest.mark.parametrize("poll_s", [0.5, 1.0, 2.0, 3.0])
def test_a_count_over_a_window_is_that_of_its_length(poll_s: float) -> None:
    samples = cached_samples(poll_s)
    assert judged("totalRequests <= 1001 over 10s", samples).result == "passed"
    assert judged("totalRequests >= 999 over 10s", samples).result == "passed"


def test_a_window_that_polled_counters_cannot_tell_says_so() -> None:
    found = judged("totalRps > 50 over 5s", cached_samples(0.5))
    assert (found.result, found.value) == ("failed", None)
    assert "loadmanager_hooks" in (found.message or "")


@pytest.mark.parametrize("push_s", [1.0, 2.0])
@pytest.mark.parametrize("window", ["over 2s", "over 5s", "over 10s", "after 10s"])
def test_exact_counts_of_the_hooks_give_exact_windows_of_any_length(push_s: float, window: str) -> None:
    samples = []
    for step in range(1, int(60 / push_s)):
        at = step * push_s
        complete = at // 3 * 3  # until the workers' last reports
        samples.append(sample(at, int(100 * complete), 80.0, (complete, int(100 * complete), 0)))
        samples.append(sample(at + 0.3, int(100 * complete), 80.0))  # a poll that tells nothing exact
    for expr in (f"totalRps >= 99.9 {window}", f"totalRps <= 100.1 {window}"):
        assert judged(expr, samples).result == "passed"


def test_a_rate_that_really_falls_is_seen_in_polled_numbers() -> None:
    samples = [one._replace(rps=100.0 if one.at < 30 else 40.0) for one in cached_samples(2.0)]
    assert judged("totalRps > 50 over 10s", samples).result == "failed"


def test_the_warm_up_is_not_in_a_rate_after_it() -> None:
    samples = [one._replace(rps=5.0 if one.at < 20 else 100.0) for one in cached_samples(1.0)]
    assert judged("totalRps > 99 after 9s", samples).result == "passed"


# ---- statistics that were reset ----


def final_numbers(
    requests: int, rps: float, endpoints: dict[str, int] | None = None, **more: Any
) -> Snapshot:
    rows = tuple(
        loadmanager.EndpointStats("GET", name, count, 0, *[None] * 7)
        for name, count in (endpoints or {}).items()
    )
    return Snapshot(160.0, rps, requests, 0, None, None, None, None, None, None, rows, **more)


BEFORE = final_numbers(5800, 100.0, {"/a": 5800})._replace(taken_at=158.0)

SLOW = final_numbers(3, 0.1, {"/slow": 3})._replace(taken_at=151.0)  # a request each 12 s


@pytest.mark.parametrize(
    ("final", "last"),
    [
        (final_numbers(6000, 100.0, {"/a": 6000}), BEFORE),
        (final_numbers(5800, 100.0, {"/a": 5800}), BEFORE),
        (final_numbers(6000, 100.0, {"/a": 6000}, resets=0), BEFORE),
        (final_numbers(6000, 100.0), None),
        (final_numbers(0, 0.0), None),
        (final_numbers(4, 4 / 50, {"/slow": 4}), SLOW),
    ],
)
def test_whole_final_numbers_are_not_suspected(final: Snapshot, last: Snapshot | None) -> None:
    assert loadmanager.reset_suspected(final, last, 100.0) is None


@pytest.mark.parametrize(
    ("final", "words"),
    [
        (final_numbers(0, 0.0), "went back from 5800 to 0"),
        (final_numbers(300, 100.0, {"/a": 300}), "went back"),
        (final_numbers(9000, 600.0, {"/a": 9000}), "began 38 s after the run"),  # another, faster test
        (final_numbers(6000, 100.0, {"/b": 6000}), "GET /a went back"),
        (final_numbers(6000, 100.0, {"/a": 6000}, resets=1), "reset once"),
    ],
)
def test_final_numbers_after_a_reset_are_suspected(final: Snapshot, words: str) -> None:
    assert words in (loadmanager.reset_suspected(final, BEFORE, 100.0) or "")


# ---- in the program ----


def test_exactly_100_requests_per_second_are_judged_as_100_at_any_poll_interval(
    load_manager: Callable[..., LoadManager], fake_locust: Callable[..., FakeLocust]
) -> None:
    runs = []
    for poll_s in (0.5, 1, 2, 3):
        with_hooks, without = fake_locust(hooks=True), fake_locust(hooks=False)
        for fake in (with_hooks, without):
            fake.rate, fake.cache_s = 100.0, 2.0
        lm = load_manager(
            cluster_config(with_hooks.url, "hooks"),
            cluster_config(without.url, "bare", envId="bare"),
            orchestrator={"metricsPollIntervalSeconds": poll_s},
        )
        exact = [
            f"totalRps {op} {limit} {window}"
            for op, limit in ((">=", 98), ("<=", 102))
            for window in ("over 10s", "after 4s")
        ]
        short = ["totalRps >= 98 over 5s", "totalRps <= 102 over 5s", "totalRequests <= 510 over 5s"]
        for env_id, thresholds in (("dev", [*exact, *short]), ("bare", exact)):
            created = lm.create(envId=env_id, durationSeconds=22, thresholds=thresholds)
            runs.append((lm, created.json["id"], poll_s))
    for lm, run_id, poll_s in runs:
        run = lm.wait_for(run_id, "Finished", within_s=60)
        missed = [one for one in run["thresholds"] if one["result"] != "passed"]
        assert not missed, f"poll every {poll_s} s on {run['locustClusterId']}"
        points = lm.get(f"/v1/tests/{run_id}/metrics").json["points"]
        counts = [point["totalRequests"] for point in points]
        assert counts == sorted(counts)
        live = [point for point in points if point["source"] == "poll"]
        assert len({point["totalRequests"] for point in live}) == len(live), "a cached answer was kept twice"
        assert len(live) >= 7


SCENARIO = """
import loadmanager_hooks
from locust import User, task, constant_throughput

class Steady(User):
    wait_time = constant_throughput(10)

    @task
    def call(self):
        self.environment.events.request.fire(
            request_type="GET", name="/steady", response_time=5, response_length=1, exception=None,
            context={},
        )
"""


@pytest.mark.parametrize("has_hooks", [True, False])
def test_statistics_reset_in_locusts_page_make_the_numbers_doubtful(
    load_manager: Callable[..., LoadManager], has_hooks: bool
) -> None:
    scenario = SCENARIO if has_hooks else SCENARIO.replace("import loadmanager_hooks", "")
    path = {"PYTHONPATH": str(loadmanager.__file__).rpartition("/")[0] + "/locust"}
    with LocustCluster(scenario, workers=1, env=path) as cluster:
        lm = load_manager(cluster_config(cluster.base_url), orchestrator={"startTimeoutSeconds": 15})
        run_id = lm.create(durationSeconds=300, targetUsers=5, spawnRate=5).json["id"]

        def has_counted(requests: int) -> bool:
            return (lm.run(run_id).get("lastMetrics") or {}).get("totalRequests", 0) > requests

        if has_hooks:  # so early that no counter is seen to go back: only the hooks know of it
            eventually(lambda: int(cluster.csv_rows()[-1]["Request Count"]) > 0, 20)
            cluster.post("/stats/reset")
            eventually(lambda: has_counted(150), 30)
        else:  # after the last sample
            eventually(lambda: has_counted(150), 30)
            cluster.post("/stats/reset")
        assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
        run = lm.wait_for(run_id, "Finished", within_s=30)
        assert run["trust"] == "doubtful"
        assert any("reset" in reason for reason in run["trustReasons"]), run["trustReasons"]


def test_a_run_that_is_not_reset_is_trusted_without_hooks(load_manager: Callable[..., LoadManager]) -> None:
    with LocustCluster(SCENARIO.replace("import loadmanager_hooks", ""), workers=2) as cluster:
        lm = load_manager(cluster_config(cluster.base_url), orchestrator={"startTimeoutSeconds": 15})
        run_id = lm.create(durationSeconds=8, targetUsers=5, spawnRate=5).json["id"]
        run = lm.wait_for(run_id, "Finished", within_s=40)
        assert run["trust"] == "ok", run["trustReasons"]
