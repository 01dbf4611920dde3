"""Runs made more than once: `repeat` on create and in schedules, and the commands that use it."""

from __future__ import annotations

import itertools

import pytest
from conftest import cluster_config, create_body
from stand_in_api import RUN_ID, StandInApi, run_document
from test_cli import cli
from waiting import eventually


def runs_of(lm, first_id):
    """The first run and those made after it, oldest first."""
    return [run for run in reversed(lm.get("/v1/tests").json) if first_id in (run["id"], run.get("repeatOf"))]


def all_finished(lm, first_id, count):
    runs = runs_of(lm, first_id)
    return runs if len(runs) == count and all(run["status"] == "Finished" for run in runs) else None


def test_a_create_with_repeat_makes_its_runs_one_after_another(lm, fake):
    first = lm.create(durationSeconds=1, repeat=3, metadata={"build": "7"}).json
    assert first["repeat"] == 3
    runs = eventually(lambda: all_finished(lm, first["id"], 3), 40)
    assert [run.get("repeat") for run in runs] == [3, 2, None]
    assert [run.get("repeatOf") for run in runs] == [None, first["id"], first["id"]]
    assert all(run["metadata"] == {"build": "7"} for run in runs)
    assert all(before["finishedAt"] <= after["startedAt"] for before, after in itertools.pairwise(runs))


def test_a_run_that_a_user_stopped_is_not_repeated(lm, fake):
    first = lm.create(repeat=2).json
    assert lm.post(f"/v1/tests/{first['id']}/stop").status == 200
    lm.wait_for(first["id"], "Finished")
    second = lm.create(durationSeconds=1, repeat=2).json
    eventually(lambda: all_finished(lm, second["id"], 2), 40)
    assert len(runs_of(lm, first["id"])) == 1


def test_repeats_go_on_after_a_restart(lm, fake):
    first = lm.create(durationSeconds=2, repeat=2).json
    lm.wait_for(first["id"], "Running")
    lm.kill9()
    lm.start()
    eventually(lambda: all_finished(lm, first["id"], 2), 40)


@pytest.mark.parametrize("repeat", [0, 51, 1.5, "3", True])
def test_a_wrong_repeat_is_refused(lm, repeat):
    answer = lm.create(repeat=repeat)
    assert answer.status == 400 and "repeat" in answer.json["fields"]


def test_a_schedule_may_repeat_its_runs(load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    made = lm.post("/v1/schedules", {"test": create_body(durationSeconds=1, repeat=2), "cron": "@daily"})
    assert made.status == 201, made.body
    first = lm.post(f"/v1/schedules/{made.json['id']}/run").json
    eventually(lambda: all_finished(lm, first["id"], 2), 40)


# ---- the command, against a stand-in for the server --------------------------------


def ended(run_id, judgement=None, **more):
    """A run as the server tells it at its end."""
    figure = {"endpoint": "GET /a", "metric": "p50ResponseMs", "baseline": 100.0, "candidate": 120.0,
        "change": 20.0,
              "changePercent": 20.0, "judgement": judgement, "reason": "beyond 95 to 105"}  # fmt: skip
    words = "GET /a: p50ResponseMs went from 100 to 120 (+20.0%)"
    message = "not enough runs to tell: 2 of 5" if judgement == "cannot tell" else "1 of 1 figures got worse"
    comparison = {"with": "history", "baseline": RUN_ID, "runs": [RUN_ID], "figures": [figure],
        "judgement": judgement, "message": message,
                  "regressions": [words] if judgement == "regression" else []}  # fmt: skip
    verdicts = {"regression": "failed", "no regression": "passed"}
    found = {"verdict": verdicts[judgement]} if judgement in verdicts else {}
    return run_document(
        id=run_id, trust="ok", trustReasons=[], compareWith="history", comparison=comparison, **found, **more
    )


ARGUMENTS = (
    "run",
    "--tenant",
    "t",
    "--env",
    "e",
    "--scenario",
    "s",
    "-u",
    "1",
    "-r",
    "1",
    "--compare-with",
    "history",
)


@pytest.fixture
def api():
    with StandInApi() as api:
        yield api


def answer_creates(api, *judgements, **more):
    """Each create is answered by the next of these runs, which is over at once."""
    ids = [f"{index:08d}-2fa1-41d2-883f-0016d3cca427" for index in range(len(judgements))]
    runs = [ended(run_id, judgement, **more) for run_id, judgement in zip(ids, judgements, strict=True)]
    for run in runs:
        api.answers["GET", f"/v1/tests/{run['id']}"] = (200, run)
    api.answers["POST", "/v1/tests"] = [(201, run) for run in runs]


def creates(api):
    return [
        (headers, body)
        for method, path, headers, body in api.asked
        if (method, path) == ("POST", "/v1/tests")
    ]


def test_run_repeat_makes_so_many_runs_and_ends_as_the_last(api):
    answer_creates(api, "cannot tell", "cannot tell", "no regression")
    done = cli(api.url, *ARGUMENTS, "--repeat", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not enough runs to tell: 2 of 5") == 2
    keys = [headers["Idempotency-Key"] for headers, _ in creates(api)]
    assert len(set(keys)) == 3


def test_run_repeat_ends_with_the_first_that_fails(api):
    answer_creates(api, "no regression", "regression", "no regression")
    assert cli(api.url, *ARGUMENTS, "--repeat", "3").returncode == 99
    assert len(creates(api)) == 2


def test_detached_the_server_repeats(api):
    answer_creates(api, "no regression")
    assert cli(api.url, *ARGUMENTS, "--repeat", "3", "--detach").returncode == 0
    assert [body["repeat"] for _, body in creates(api)] == [3]


@pytest.mark.parametrize(
    ("second", "status", "words"),
    [
        ("regression", 99, "confirmed: 1 figures got worse again"),
        ("no regression", 0, "not confirmed"),
        ("cannot tell", 99, "not refuted"),
    ],
)
def test_a_regression_is_confirmed_by_another_run(api, second, status, words):
    answer_creates(api, "regression", second)
    done = cli(api.url, *ARGUMENTS, "--confirm-regression")
    assert done.returncode == status and words in done.stderr, done.stderr
    assert len(creates(api)) == 2


def test_what_failed_by_a_threshold_needs_no_confirmation(api):
    threshold = {"expr": "p95ResponseMs < 5", "value": 9.0, "result": "failed"}
    answer_creates(api, "regression", thresholds=[threshold])
    assert cli(api.url, *ARGUMENTS, "--confirm-regression").returncode == 99
    assert len(creates(api)) == 1


def test_a_comparison_that_cannot_tell_exits_0_and_99_where_that_is_required(api):
    answer_creates(api, "cannot tell", "cannot tell")
    done = cli(api.url, *ARGUMENTS)
    assert (
        done.returncode == 0 and "the comparison cannot tell: not enough runs to tell: 2 of 5" in done.stderr
    )
    assert cli(api.url, *ARGUMENTS, "--require-trusted").returncode == 99


def test_a_comparison_without_any_earlier_run_is_told_also_by_quiet(api):
    """What the server keeps of a run whose baseline was never named."""
    message = "not compared: there is no baseline"
    nothing = {"with": "baseline", "baseline": None, "regressions": [], "judgement": "cannot tell"}
    run = run_document(id=RUN_ID, trust="ok", trustReasons=[], comparison={**nothing, "message": message})
    api.answers["POST", "/v1/tests"] = (201, run)
    api.answers["GET", f"/v1/tests/{RUN_ID}"] = (200, run)
    done = cli(api.url, *ARGUMENTS)
    assert "None" not in done.stdout and f"cannot tell: {message}" in done.stdout
    quiet = cli(api.url, *ARGUMENTS, "--quiet")
    assert quiet.returncode == 0 and f"the comparison cannot tell: {message}" in quiet.stderr
    assert cli(api.url, *ARGUMENTS, "--require-trusted").returncode == 99


@pytest.mark.parametrize(
    "arguments", [("--repeat", "0"), ("--repeat", "x"), ("--detach", "--confirm-regression")]
)
def test_wrong_arguments_exit_with_2(api, arguments):
    assert cli(api.url, *ARGUMENTS, *arguments).returncode == 2
