"""`make year`: what a year of runs takes on disk. Every hour a run of 10 minutes with 20 endpoints and
our hooks is kept through the store's own code; every simulated day the store's own code thins what is
due. Sizes and times are printed; nothing is asserted.

`python tests/year.py --runs 8760 [--url postgresql://...] [--kinds 6]`: of so many different runs the
numbers are simulated second by second; the others repeat them at their own times. `--real-every 20`:
of the runs of one kind that are thinned only every 20th is by the store's own code, the others get
what that made of the first of their kind: the same statements, in a fraction of the time."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import loadmanager as lm

DAY_S, RUN_S, ENDPOINTS, RPS = 86400.0, 600, 20, 200
AFTER_S = {lm.THIN_STEP_S: 7 * DAY_S, lm.THIN_MORE_STEP_S: 30 * DAY_S}
GIB = 1 << 30


def snapshots(started_at: float, seconds: int, random_: random.Random) -> Iterator[lm.Snapshot]:
    """What hooks push each second of a run: counters since its start, with exact times."""
    times: list[dict[int, int]] = [{} for _ in range(ENDPOINTS)]
    total: dict[int, int] = {}
    failures = [0] * ENDPOINTS
    for second in range(1, seconds + 1):
        for number in range(ENDPOINTS):
            for _ in range(random_.randint(RPS // ENDPOINTS - 3, RPS // ENDPOINTS + 3)):
                ms = int(random_.lognormvariate(2.5 + number * 0.12, 0.5)) + 1
                ms = ms if ms <= 1000 else int(float(f"{ms:.3g}"))
                times[number][ms] = times[number].get(ms, 0) + 1
                total[ms] = total.get(ms, 0) + 1
                failures[number] += random_.random() < 0.002
        yield _snapshot(started_at + second, second, times, total, failures)


def _snapshot(
    at: float, second: int, times: list[dict[int, int]], total: dict[int, int], failures: list[int]
) -> lm.Snapshot:
    rows = tuple(
        lm.EndpointStats(
            "GET", f"/api/v1/resource/{number}/items", sum(known.values()), failures[number],
            *_figures(known),
            sum(known.values()) / second, _quantile(known, 0.95), _quantile(known, 0.99), dict(known),
        )
        for number, known in enumerate(times)
    )  # fmt: skip
    requests, failed = sum(total.values()), sum(failures)
    average, _, _, median = _figures(total)
    p95, p99 = _quantile(total, 0.95), _quantile(total, 0.99)
    return lm.Snapshot(
        at, RPS + second % 7, requests, failed, 100 * failed / requests, average, median, p95, p99,
        min(100, second * 10), rows, 0.4, median + second % 5, p95 + second % 11, dict(total),
        counted_at=at, counted_requests=requests, counted_failures=failed,
    )  # fmt: skip


def _figures(times: dict[int, int]) -> tuple[float, float, float, float]:
    """Average, lowest, highest and median of response times, ms."""
    requests = sum(times.values())
    average = sum(ms * count for ms, count in times.items()) / max(1, requests)
    return average, min(times, default=0), max(times, default=0), _quantile(times, 0.5)


def _quantile(times: dict[int, int], share: float) -> float:
    left = share * sum(times.values())
    for ms in sorted(times):
        left -= times[ms]
        if left <= 0:
            return ms
    return 0


def kept_run(store: lm.Store, started_at: float, random_: random.Random, seconds: int = RUN_S) -> lm.Run:
    """A run whose numbers came second by second, ended and on disk."""
    request = lm.RunRequest("acme", "dev", "browse", 100, 10.0, seconds, {"build": "1.2.3"})
    run = store.add(lm.replace(lm._new_run(request, "year", "api"), cluster_id="one", created_at=started_at))
    store.transition(run.id, lm.RunStatus.RUNNING, durable=False, started_at=started_at)
    newest = None
    for newest in snapshots(started_at, seconds, random_):
        store.add_snapshot(run.id, newest, "poll")
    store.transition(run.id, lm.RunStatus.STOPPING, durable=False, stop_reason="duration")
    return store.transition(run.id, lm.RunStatus.FINISHED, newest, finished_at=started_at + seconds)


def keep_again(store: lm.Store, like: tuple, started_at: float, kind: int) -> None:
    """A run with the history of another one, at its own time."""
    run, snapshot, samples, histograms, figures = like
    later_s = started_at - run.started_at
    again = lm.replace(
        run,
        id=str(uuid.uuid4()),
        created_at=started_at,
        started_at=started_at,
        finished_at=started_at + RUN_S,
        metadata={"kind": kind},
    )
    store.add_imported(
        again, snapshot._replace(taken_at=snapshot.taken_at + later_s),
        [sample._replace(run_id=again.id, at=sample.at + later_s) for sample in samples],
        [(at + later_s, is_whole, text) for at, is_whole, text in histograms], None,
    )  # fmt: skip
    store.keep_attachment(again.id, lm.RUN_FIGURES, figures)  # as of a run that was compared when it ended


def templates(count: int) -> list[tuple]:
    """So many different runs, as the store has them."""
    with tempfile.TemporaryDirectory(prefix="year-") as folder:
        store = lm.Store(lm.open_database("sqlite:///kinds.db", folder))
        found = []
        for number in range(count):
            run = kept_run(store, time.time() - 2 * RUN_S, random.Random(number))
            snapshot = store.newest_numbers(run.id)
            store.comparer.compared(run)
            figures = store.history.attachment(run.id, lm.RUN_FIGURES)
            found.append(
                (
                    run,
                    snapshot,
                    store.history.samples(run.id),
                    store.history.histogram_records(run.id),
                    figures,
                )
            )
        store.close()
    return found


class RepeatingThinner(lm.HistoryThinner):
    """Computes every so manieth run of a kind, and repeats for the others what came of the first."""

    def __init__(self, store: lm.Store, real_every: int):
        super().__init__(store, share=1.0)
        self._real_every = real_every
        self._seen: dict[tuple[int, int], int] = {}
        self._known: dict[tuple[int, int], tuple[list, list]] = {}
        self.computed = self.repeated = 0

    def thin_run(self, run: lm.Run, step_s: int) -> None:
        kind = run.metadata["kind"], step_s
        count = self._seen[kind] = self._seen.get(kind, -1) + 1
        if count % self._real_every == 0:
            self.computed += 1
            super().thin_run(run, step_s)
            if self._real_every > 1:
                self._known.setdefault(kind, self._rows_of(run))
        else:
            self.repeated += 1
            self._store.history.change(
                run.id, lambda database: self._repeat(database, run, *self._known[kind])
            )
            self._store.record_thinned(run.id, step_s)

    def _rows_of(self, run: lm.Run) -> tuple[list, list]:
        samples = [one._replace(at=one.at - run.started_at) for one in self._store.history.samples(run.id)]
        rows = self._store.history._histogram_rows(run.id)
        return samples, [(at - run.started_at, is_whole, content) for at, is_whole, content in rows]

    def _repeat(self, database: lm.Database, run: lm.Run, samples: list, histograms: list) -> None:
        for table in ("samples", "histograms"):
            database.execute(f"DELETE FROM {table} WHERE run_id = ?", (run.id,))
        began = run.started_at
        database.execute_many(
            lm.insert_into("samples"), [one._replace(run_id=run.id, at=began + one.at) for one in samples]
        )
        rows = [(run.id, began + at, is_whole, content) for at, is_whole, content in histograms]
        database.execute_many(lm.insert_into("histograms"), rows)


def simulate(url: str, folder: str, runs: int, kinds: int, real_every: int) -> None:
    """Keep so many hourly runs, thin them day by day, and print what they take."""
    begun = time.monotonic()
    known = templates(kinds)
    print(f"{kinds} runs simulated second by second: {time.monotonic() - begun:.0f} s", flush=True)
    database = lm.open_database(url, folder)
    store = lm.Store(database)
    thinner = RepeatingThinner(store, real_every)
    first_at = (time.time() // 3600 - runs) * 3600
    kept_s = thinned_s = longest_s = 0.0
    for number in range(runs):
        at = first_at + number * 3600
        before = time.monotonic()
        keep_again(store, known[number % kinds], at, number % kinds)
        kept_s += time.monotonic() - before
        if number % 24 == 23 or number == runs - 1:
            before = time.monotonic()
            done = thinner.thin(at + RUN_S, AFTER_S)
            took_s = time.monotonic() - before
            thinned_s, longest_s = thinned_s + took_s, max(longest_s, took_s)
            if number % 240 == 239 or number == runs - 1:
                size = store.database_bytes() or 0
                print(f"{number + 1:>6} runs: {size / (1 << 20):8.1f} MiB; thinned today {done}", flush=True)
    steps: dict[int, int] = {}
    for run in store.list_runs():
        steps[run.history_step_s or 1] = steps.get(run.history_step_s or 1, 0) + 1
    rows = store.history.read(lambda one: [one.query(f"SELECT COUNT(*) FROM {t}")[0][0] for t in lm.TABLES])
    size = store.database_bytes() or 0
    store.close()
    print(f"thinned by the store's code: {thinner.computed}; repeated: {thinner.repeated}")
    print(
        "runs by seconds between samples:", ", ".join(f"{step} s: {n}" for step, n in sorted(steps.items()))
    )
    print(
        "rows:",
        ", ".join(f"{table} {count:,}" for table, count in zip(lm.TABLES, rows, strict=True) if count),
    )
    print(f"keeping: {kept_s:.0f} s; thinning: {thinned_s:.0f} s, the longest day {longest_s:.1f} s")
    print(f"database: {size / (1 << 20):.1f} MiB, {size / GIB:.3f} GiB of the 1 GiB a year may take")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8760)
    parser.add_argument("--kinds", type=int, default=6)
    parser.add_argument("--real-every", type=int, default=1)
    parser.add_argument("--url", default="sqlite:///year.db")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="year-", dir=os.environ.get("TMPDIR")) as folder:
        simulate(options.url, folder, options.runs, options.kinds, options.real_every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
