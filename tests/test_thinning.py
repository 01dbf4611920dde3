"""History that thins with age, and retention by count, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import json
import random

import pytest
import year
from conftest import cluster_config
from control_plane import ControlPlane
from seeded_runs import SeededRuns
from test_store import new_run, open_store, postgres_url  # noqa: F401 - fixtures
from waiting import eventually

import loadmanager as lm

DAY_S = 86400.0
AFTER_S = {10: 7 * DAY_S, 60: 30 * DAY_S}
VALUES = [name for name in lm.Sample._fields if name not in ("run_id", "at", "source")]


def described(store, run):
    """All that a person sees of a run, but that its history is thinned."""
    document = json.loads(store.run_json(run.id))
    document.pop("historyStepSeconds", None)
    return document, lm.run_figures_to_record(store.comparer.compared(store.get(run.id)).figures)


def sums_at(store, run):
    return {point.at: point.histograms for point in store.history.histograms(run.id)}


def assert_same_sums(before, after):
    for at, found in after.items():
        assert found.keys() == before[at].keys()
        for key, histogram in found.items():
            known = before[at][key]
            assert (histogram.requests, histogram.failures) == (known.requests, known.failures)
            assert histogram.times == known.times
            assert abs(histogram.total_ms - known.total_ms) < 0.1


@pytest.mark.parametrize("step_s", [10, 60])
def test_thinned_history_keeps_extremes_sums_figures_and_verdict(open_store, step_s):  # noqa: F811
    store = open_store()
    run = year.kept_run(store, 1_700_000_003.0, random.Random(1), 300)
    samples, sums, shown = store.history.samples(run.id), sums_at(store, run), described(store, run)
    assert len(samples) > 300 and len(sums) > 290
    lm.HistoryThinner(store).thin_run(run, step_s)
    thinned, kept = store.history.samples(run.id), sums_at(store, run)
    steps = {int(one.at // step_s) for one in samples}
    windows = {int(one.at // (step_s * 10)) for one in samples}
    assert len(thinned) <= len(steps) + len(windows) * len(lm.KEPT_EXTREMES) < len(samples) / 3
    assert set(thinned) <= set(samples), "a sample was invented"
    assert {int(one.at // step_s) for one in thinned} == steps, "a step has no sample"
    for name in VALUES:
        values = [getattr(one, name) for one in samples if getattr(one, name) is not None]
        left = [getattr(one, name) for one in thinned if getattr(one, name) is not None]
        assert not values or max(values) == max(left), f"the highest {name} is gone"
    assert min(one.rps for one in samples) == min(one.rps for one in thinned)
    assert thinned[-1] == samples[-1]
    assert len(kept) == len({at // step_s for at in sums}) and max(kept) == max(sums)
    assert_same_sums(sums, kept)
    assert json.loads(store.run_json(run.id))["historyStepSeconds"] == step_s
    assert described(store, run) == shown
    store.close()
    again = open_store()  # and as another process reads it, which makes no figures again
    assert described(again, run) == shown
    assert_same_sums(sums, sums_at(again, run))


def test_thinning_again_or_more_keeps_what_thinning_once_had_kept(open_store):  # noqa: F811
    store = open_store()
    runs = [year.kept_run(store, 1_700_000_003.0, random.Random(1), 200) for _ in range(2)]
    thinner = lm.HistoryThinner(store)
    thinner.thin_run(runs[0], 60)
    for step_s in (10, 10, 60, 60):
        thinner.thin_run(runs[1], step_s)
    rows = [[one._replace(run_id="") for one in store.history.samples(run.id)] for run in runs]
    assert rows[0] == rows[1]
    assert sums_at(store, runs[0]).keys() == sums_at(store, runs[1]).keys()
    assert_same_sums(sums_at(store, runs[0]), sums_at(store, runs[1]))


def test_thinning_that_is_cut_off_leaves_a_history_that_adds_up_and_is_done_again(open_store):  # noqa: F811
    store = open_store()
    run = year.kept_run(store, 1_700_000_003.0, random.Random(2), 350)
    sums, shown = sums_at(store, run), described(store, run)
    thinner, changed = lm.HistoryThinner(store), []
    replace = thinner._replace

    def cut_off(*words):
        changed.append(len(words[1][0]))
        if len(changed) == 3:
            raise lm.NotReady("the database went away")
        replace(*words)

    thinner._replace = cut_off
    with pytest.raises(lm.NotReady):
        thinner.thin(1_700_000_003.0 + 8 * DAY_S, AFTER_S)
    assert store.get(run.id).history_step_s is None
    assert_same_sums(sums, sums_at(store, run))
    assert max(changed) <= 2 * 10 * lm.THIN_WINDOW_STEPS, "one transaction changes too much"
    thinner._replace = replace
    assert thinner.thin(1_700_000_003.0 + 8 * DAY_S, AFTER_S) == 1
    assert len(sums_at(store, run)) == len({at // 10 for at in sums})
    assert_same_sums(sums, sums_at(store, run))
    assert described(store, run) == shown


def test_a_reset_of_the_counters_loses_no_requests_by_thinning(open_store):  # noqa: F811
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.RUNNING, durable=False, started_at=1000.0)
    for part, seed in ((0, 5), (1, 6)):
        for one in year.snapshots(1000.0 + 33 * part, 33, random.Random(seed)):
            store.add_snapshot(run.id, one, "poll")
    store.transition(run.id, lm.RunStatus.FAILED, finished_at=1070.0)
    sums = sums_at(store, run)
    lm.HistoryThinner(store).thin_run(store.get(run.id), 60)
    kept = sums_at(store, run)
    assert 1033.0 in kept, "what was counted before the reset is gone"
    assert_same_sums(sums, kept)
    assert len(kept) <= 4


def test_runs_thin_by_age_but_not_active_ones_nor_baselines(open_store):  # noqa: F811
    store = open_store()
    ended = {}
    for name, age_days in (("young", 1), ("week", 8), ("month", 31), ("baseline", 40)):
        run = store.add(new_run(scenario_id=name))
        store.transition(run.id, lm.RunStatus.FAILED, finished_at=1e9 - age_days * DAY_S)
        ended[name] = run
    imported = lm.replace(
        new_run(), status=lm.RunStatus.FINISHED, finished_at=10.0, imported_at=1e9 - 9 * DAY_S
    )
    store.add_imported(imported, None, [], [], None)
    active = store.add(new_run(created_at=1.0))
    store.baselines.name(lm.Baseline("acme", "dev", "baseline", ended["baseline"].id, 11.0, "me"))
    assert lm.HistoryThinner(store).thin(1e9, AFTER_S) == 3
    steps = {name: store.get(run.id).history_step_s for name, run in ended.items()}
    assert steps == {"young": None, "week": 10, "month": 60, "baseline": None}
    assert store.get(imported.id).history_step_s == 10 and store.get(active.id).history_step_s is None
    assert lm.HistoryThinner(store).thin(1e9, AFTER_S) == 0
    assert lm.HistoryThinner(store).thin(1e9 + 90 * DAY_S, {10: 0.0, 60: 0.0}) == 0


def test_retention_by_count_keeps_the_newest_of_each_environment(open_store):  # noqa: F811
    store = open_store()
    runs = {}
    for env in ("dev", "prod"):
        for number in range(5):
            run = runs[env, number] = store.add(new_run(env_id=env))
            store.transition(run.id, lm.RunStatus.FAILED, durable=False, finished_at=10.0 + number)
    active = store.add(new_run())
    baseline = runs["dev", 0]
    store.baselines.name(lm.Baseline("acme", "dev", baseline.scenario_id, baseline.id, 11.0, "me"))
    assert lm.RunRemoval(store).remove_over(2) == 2 + 3
    kept = {runs[env, number].id for env, number in (("dev", 3), ("dev", 4), ("prod", 3), ("prod", 4))}
    assert {run.id for run in store.list_runs()} == {*kept, active.id, baseline.id}
    assert lm.RunRemoval(store).remove_over(2) == 0
    store.close()
    assert {run.id for run in open_store().list_runs()} == {*kept, active.id, baseline.id}


def test_many_runs_are_removed_in_steps_of_which_none_takes_long(open_store, monkeypatch):  # noqa: F811
    store = open_store()
    monkeypatch.setattr(lm.RunRemoval, "AT_ONCE", 3)
    for _ in range(8):
        run = store.add(new_run())
        store.transition(run.id, lm.RunStatus.FAILED, durable=False, finished_at=10.0)
    store.wait_durable()
    gone, write = [], store._writer._rows.write

    def note(batch):
        gone.append(len(batch.gone))
        write(batch)

    store._writer._rows.write = note
    assert lm.RunRemoval(store).remove_older(100.0) == 8
    store.wait_durable()
    assert sum(gone) == 8 and max(gone) <= 3 and not store.list_runs()


def test_what_an_older_one_packed_can_be_read():
    content = b'[["GET","/a",2,0,7.5,[3,1,4,1]]]'
    old = lm.base64.b85encode(lm.zlib.compress(content)).decode()
    assert lm._unpacked(old) == content == lm._unpacked(lm._packed(content))
    assert (
        lm._histogram_text(old) == lm._histogram_text(lm._packed_dense(content.decode())) == content.decode()
    )


def test_a_server_thins_and_counts_by_its_configuration_and_says_so(tmp_path, fake):
    folder = tmp_path / "served"
    folder.mkdir()
    with SeededRuns(folder / "lm.db") as seeded:
        gone = seeded.finished(tenant_id="t", env_id="e", age_s=41 * DAY_S)
        month = seeded.finished(tenant_id="t", env_id="e", age_s=40 * DAY_S, samples=300)
        week = seeded.finished(tenant_id="t", env_id="e", age_s=8 * DAY_S, samples=300)
        young = seeded.finished(tenant_id="t", env_id="e", age_s=3600.0, samples=300)
    storage = {"url": "sqlite:///lm.db", "retentionRuns": 3}
    clusters = [cluster_config(fake.url, tenantId="t", envId="e")]
    with ControlPlane(folder, clusters, storage=storage) as plane:
        eventually(
            lambda: (
                [plane.run(one).get("historyStepSeconds") for one in (month, week, young)] == [60, 10, None]
            ),
            30,
            what="old runs are thinned, and say so",
        )
        assert plane.get(f"/v1/tests/{gone}").status == 404
        totals = [
            plane.get(f"/v1/tests/{one}/metrics?maxPoints=10000").json["total"]
            for one in (month, week, young)
        ]
        assert totals[0] < totals[1] < totals[2]


def test_a_run_whose_history_cannot_be_read_does_not_keep_the_others_from_thinning(open_store):  # noqa: F811
    store = open_store()
    runs = [year.kept_run(store, 1e9 + number, random.Random(number), 30) for number in range(2)]
    store.history.change(
        runs[0].id,
        lambda database: database.execute(
            "UPDATE histograms SET content = '.x' WHERE run_id = ?", (runs[0].id,)
        ),
    )
    assert lm.HistoryThinner(store).thin(1e9 + 40 * DAY_S, AFTER_S) == 1
    assert store.get(runs[0].id).history_step_s is None and len(store.history.samples(runs[0].id)) > 30
    assert store.get(runs[1].id).history_step_s == 60
