"""Trends: what is normal in a series of runs, after which run it changed, and the series as a CSV."""

from __future__ import annotations

import csv
import io
import math
import os
import random
import shutil
import subprocess

import pytest
from conftest import cluster_config
from locust_process import find_free_port

import loadmanager

PLACE = {"tenantId": "acme", "envId": "dev", "scenarioId": "shop"}


def series(seed, *levels):
    """`levels`: (value, runs); each run scatters by 3 %."""
    draw = random.Random(seed)
    return [round(value * math.exp(draw.gauss(0, 0.03)), 1) for value, runs in levels for _ in range(runs)]


SERIES = {  # with what apache-otava 0.8.0 finds in them
    "none": ([(100, 40)], []),
    "up": ([(100, 20), (112, 20)], [20]),
    "up and back": ([(100, 20), (130, 15), (100, 15)], [20, 35]),
    "small": ([(100, 40), (104, 40)], [40]),
    "three": ([(200, 15), (150, 15), (190, 15), (400, 15)], [15, 30, 45]),
}


@pytest.mark.parametrize("name", SERIES)
def test_change_points_are_those_of_otava(name):
    levels, expected = SERIES[name]
    values = series(1, *levels)
    assert [index for index, _ in loadmanager.change_points("avgResponseMs", values)] == expected
    analysis = pytest.importorskip("otava.analysis", reason="its answers of 0.8.0 are above")
    found, _ = analysis.compute_change_points(values, window_len=50, max_pvalue=0.001, min_magnitude=0.0)
    assert [point.index for point in found] == expected


def test_series_without_a_change_have_no_change_points():
    found = sum(
        bool(loadmanager.change_points("p95ResponseMs", series(seed, (100, 40)))) for seed in range(100)
    )
    assert found <= 4


def test_locusts_rounding_is_no_change():
    assert loadmanager.change_points("p50ResponseMs", [110.0] * 10 + [120.0] * 2 + [110.0] * 5) == []
    assert [
        index for index, _ in loadmanager.change_points("p50ResponseMs", [110.0] * 10 + [140.0] * 10)
    ] == [10]


@pytest.mark.parametrize("values", [[], [1.0], [0.0] * 12, [5.0] * 3])
def test_short_and_flat_series_have_no_change_points(values):
    assert loadmanager.change_points("errorRate", values) == []


def test_normal_range_begins_anew_after_a_change():
    values = series(3, (100, 10), (150, 10))
    points = [{"runId": f"r{index}", "value": value} for index, value in enumerate(values)]
    changes = loadmanager.trend_of("p95ResponseMs", points)
    assert [(one["afterRunId"], one["runId"]) for one in changes] == [("r9", "r10")]
    assert changes[0]["changePercent"] == pytest.approx(50, abs=5)
    known = [index for index, point in enumerate(points) if point["normal"]]
    assert known == [*range(5, 10), *range(15, 20)], "five runs of a level are needed"
    assert all(
        points[index]["normal"][0] < values[index] < points[index]["normal"][1] for index in (5, 9, 15, 19)
    )


# ---- over HTTP, with imported runs ------------------------------------------------


def imported(lm, index, ms):
    stats = [{"method": "GET", "name": "/a", "num_requests": 100, "num_failures": 0,
        "total_response_time": ms * 100, "min_response_time": ms,
              "max_response_time": ms, "response_times": {str(round(ms)): 100}, "num_none_requests": 0,
              "start_time": 1767225600 + 60 * index,
              "last_request_timestamp": 1767225650 + 60 * index, "num_reqs_per_sec": {},
              "num_fail_per_sec": {}}]  # fmt: skip
    moments = {name: f"2026-01-01T{index // 60:02}:{index % 60:02}:{second}Z" for name,
        second in (("startedAt", "00"), ("finishedAt", "50"))}  # fmt: skip
    answer = lm.post("/v1/tests/import", {"format": "locust-json", **PLACE, **moments, "stats": stats})
    assert answer.status == 201, answer.body
    return answer.json["id"]


@pytest.fixture
def lm(load_manager):
    return load_manager(cluster_config(f"http://127.0.0.1:{find_free_port()}"))


@pytest.fixture
def runs(lm):
    return [imported(lm, index, ms) for index, ms in enumerate(series(5, (50, 10), (80, 10)))]


def test_trend_tells_the_run_after_which_it_changed(lm, runs):
    trend = lm.get("/v1/trends?tenantId=acme&envId=dev&scenarioId=shop&metric=avgResponseMs").json
    assert [point["runId"] for point in trend["points"]] == runs
    assert [(one["afterRunId"], one["runId"]) for one in trend["changePoints"]] == [(runs[9], runs[10])]
    assert trend["points"][9]["normal"] and trend["points"][10]["normal"] is None
    assert lm.get("/v1/trends?tenantId=acme&envId=dev&scenarioId=none").json == {
        "metric": "p95ResponseMs", "points": [], "changePoints": [],
    }  # fmt: skip


OTAVA = """
tests:
  shop:
    type: csv
    file: {file}
    time_column: time
    attributes: [run]
    metrics:
      average: {{column: avgResponseMs, direction: -1}}
      endpoint: {{column: GET /a p95ResponseMs, direction: -1}}
"""


def test_runs_of_a_scenario_are_one_csv_that_otava_reads(lm, runs, tmp_path):
    answer = lm.get(f"/v1/tests/{runs[0]}/scenario.csv")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode())))
    assert [row["run"] for row in rows] == runs
    assert float(rows[0]["avgResponseMs"]) == pytest.approx(series(5, (50, 1))[0])
    assert rows[0]["GET /a p95ResponseMs"] and rows[0]["time"].startswith("2026-01-01T00:00:00")
    otava = shutil.which("otava")
    if otava is None:
        pytest.skip("apache-otava is not installed; the CSV itself is good")
    (tmp_path / "runs.csv").write_bytes(answer.body)
    (tmp_path / "otava.yaml").write_text(OTAVA.format(file=tmp_path / "runs.csv"))
    told = subprocess.run(
        [otava, "analyze", "shop", "--since", "2025-12-01"],
        env={**os.environ, "OTAVA_CONFIG": str(tmp_path / "otava.yaml")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "+6" in told.stdout or "+5" in told.stdout, told.stdout
