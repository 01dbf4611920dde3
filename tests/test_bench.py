"""`make bench` and `make soak` work: each part of them, so brief that its figures mean nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import PARTS
from soak_plot import Series, judge

TESTS = Path(__file__).resolve().parent


def printed(*command: str) -> str:
    """What a program of this folder prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(TESTS / command[0]), *command[1:]], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_bench_prints_its_figures(part):
    text = printed("bench.py", "--brief", "--only", part)
    assert re.search(r"\d+ of \d+ goals reached", text)
    rows = [line for line in text.splitlines() if line.startswith("  ") and re.search(r"\d", line)]
    assert rows, text
    assert "REFUSED" not in text and "skipped" not in text and "NOT STOPPED" not in text, text


def test_bench_names_its_parts_when_asked_for_another():
    done = subprocess.run(
        [sys.executable, str(TESTS / "bench.py"), "--only", "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "got nonsense" in done.stderr and "page" in done.stderr


def test_soak_ends_by_itself_with_a_table_and_a_plot():
    text = printed("soak.py", "--minutes", "0.5", "--name", "soak-test")
    assert "resident memory" in text and "broken" not in text
    plot = (TESTS / "output" / "soak-test.svg").read_text()
    assert plot.startswith("<svg") and plot.count("<polyline") > 8 and len(plot) < 100_000


@pytest.mark.parametrize(("growth", "word"), [(0.0, "flat"), (5.0, "RISING"), (-5.0, "flat")])
def test_robust_slope_tells_what_rises_and_is_not_moved_by_outliers(growth, word):
    noise = [0.3, -0.2, 0.1, -0.4, 0.25, -0.05, 0.0]
    points = [(t, 100 + growth * t / 3600 + noise[t % 7] + 500 * (t % 97 == 0)) for t in range(7200)]
    verdict = judge(Series("memory", "MiB", 1.0, [(float(at), value) for at, value in points]))
    assert verdict.word == word and abs(verdict.slope - growth) < 0.5
