"""A run as a file: exported, imported elsewhere, and made from what a headless Locust wrote."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import subprocess
import sys
import time

import pytest
from conftest import API_TOKEN, ROOT, cluster_config
from hypothesis import HealthCheck, given, settings, strategies
from target import Target

import loadmanager

PLACE = {"tenantId": "acme", "envId": "dev", "scenarioId": "shop"}


def metrics(requests, ms):
    row = {"method": "GET", "name": "/a", "numRequests": requests, "numFailures": 1, "avgResponseTime": ms,
        "medianResponseTime": ms, "p95ResponseTime": ms,
           "p99ResponseTime": ms, "requestsPerSec": 10, "minResponseTime": 1, "maxResponseTime": ms,
           "responseTimes": {str(ms): requests}}  # fmt: skip
    return {"totalRequests": requests, "totalFailures": 1, "totalRps": 10, "errorRate": 1,
        "avgResponseMs": ms, "p50ResponseMs": ms, "p95ResponseMs": ms,
            "p99ResponseMs": ms, "currentUsers": 5, "responseTimes": {str(ms): requests},
            "requestStats": {"GET_/a": row}}  # fmt: skip


@pytest.fixture
def finished(lm):
    """A final run with everything a run can have, on a Locust that a fake stands in for."""
    run = lm.create(
        metadata={"release": "1.2"},
        thresholds=["p95 < 500", "GET /a: p95 < 5 after 1s", {"expr": "errorRate < 0.1", "warnOnly": True}],
    ).json
    for requests in (40, 80):
        assert lm.callback("metrics", {"runId": run["id"], "metrics": metrics(requests, 120)}).status == 200
        time.sleep(1.0)  # histograms are kept at most once a second
    assert lm.post(f"/v1/tests/{run['id']}/annotations", {"text": "cache emptied"}).status == 201
    assert (
        lm.callback(
            "test-stop", {"runId": run["id"], "finalMetrics": metrics(100, 120), "complete": True}
        ).status
        == 200
    )
    return lm.wait_for(run["id"], "Finished")


def test_a_run_is_the_same_after_it_was_carried_elsewhere(lm, finished, load_manager):
    exported = lm.get(f"/v1/tests/{finished['id']}/export")
    assert exported.status == 200 and exported.json["run"] == finished
    elsewhere = load_manager(cluster_config("http://127.0.0.1:9"))
    imported = elsewhere.post("/v1/tests/import", exported.body)
    assert imported.status == 201, imported.body
    assert imported.headers["location"] == f"/v1/tests/{finished['id']}"
    came = imported.json
    assert came.pop("importedAt")
    assert came == finished
    for path in ("metrics", "histograms", "failures", "requests.csv", "junit.xml", "annotations"):
        there, here = (one.get(f"/v1/tests/{finished['id']}/{path}").body for one in (elsewhere, lm))
        assert there == here, f"{path} is not the same after the import"
    again = elsewhere.get(f"/v1/tests/{finished['id']}/export").json
    assert again["run"].pop("importedAt") == imported.json["importedAt"]
    assert {**again, "exportedAt": ""} == {**exported.json, "exportedAt": ""}
    elsewhere.restart()
    assert elsewhere.run(finished["id"]) == imported.json


def test_a_run_is_imported_once(lm, finished):
    exported = lm.get(f"/v1/tests/{finished['id']}/export").body
    assert lm.post("/v1/tests/import", exported).status == 409
    assert lm.request("DELETE", f"/v1/tests/{finished['id']}").status == 204
    assert lm.post("/v1/tests/import", exported).status == 201


def test_a_run_that_is_not_final_is_not_exported(lm):
    run = lm.create().json
    assert lm.get(f"/v1/tests/{run['id']}/export").status == 409


def test_every_key_of_a_run_can_be_imported():
    everything = {
        field.name: 1 for field in dataclasses.fields(loadmanager.Run)
        if field.default != () and field.name not in ("status", "comparison", "metadata", "plan")
    }  # fmt: skip
    run = loadmanager.Run(**everything, status=loadmanager.RunStatus.FAILED, comparison={}, metadata={},
        load_changes=(loadmanager.LoadChange(1.0, 2, 3.0, "me"),),
                          plan=loadmanager.LoadProfile("http://t", ("A",), ("b",), ("c",), {"d": 1},
                              (loadmanager.Stage(1, 1.0, 1),)),
                          warnings=(loadmanager.Warning_("c", 1.0, "m"),),
                          annotations=(loadmanager.Annotation(1.0, "a"),),
                          thresholds=(loadmanager.parse_threshold("p95 < 5"),))  # fmt: skip
    missing = set(loadmanager.run_to_json(run)) - set(loadmanager.IMPORTED_RUN_KEYS)
    assert not missing, f"a run with {missing} could be exported, and not be imported again"


WRONG = [
    (lambda file: file.update(version=2), "version"),
    (lambda file: file.update(format="k6"), "format"),
    (lambda file: file.update(more=1), "more"),
    (lambda file: file.update(run=[]), "run"),
    (lambda file: file["run"].update(id="../../etc/passwd"), "run.id"),
    (lambda file: file["run"].update(status="Running"), "run.status"),
    (lambda file: file["run"].update(colour="red"), "run.colour"),
    (lambda file: file["run"].update(tenantId=""), "run.tenantId"),
    (lambda file: file["run"].update(finishedAt="1999-01-01T00:00:00Z"), "finishedAt"),
    (lambda file: file["run"].update(finishedAt="9999-01-01T00:00:00Z"), "finishedAt"),
    (
        lambda file: file["run"].update(thresholds=[{"expr": "nope < 1", "result": "passed"}]),
        "run.thresholds",
    ),
    (lambda file: file["run"].update(comparison={"with": "baseline", "regressions": 5}), "run.regressions"),
    (lambda file: file["run"].update(warnings=[{"code": "x"}]), "run.warnings"),
    (lambda file: file["run"]["lastMetrics"].update(totalRequests=-1), "lastMetrics.totalRequests"),
    (lambda file: file["run"]["lastMetrics"].update(totalRequests=10**30), "lastMetrics.totalRequests"),
    (lambda file: file["samples"][0].update(totalRps="fast"), "samples[0].totalRps"),
    (lambda file: file["samples"][0].update(source="rumour"), "samples[0].source"),
    (lambda file: file["samples"][0].update(timestamp="yesterday"), "samples[0].timestamp"),
    (lambda file: file.update(samples={}), "samples"),
    (lambda file: file["histograms"][0].update(isWhole=1), "histograms[0]"),
    (lambda file: file["histograms"][0]["rows"][0].pop(), "histograms[0].rows"),
    (lambda file: file["histograms"][0]["rows"][0][5].append(-1), "histograms[0].rows"),
    (lambda file: file["failures"].update(failures=[{}]), "failures"),
]


def test_a_file_with_something_wrong_is_refused_and_nothing_is_kept(lm, finished):
    exported = lm.get(f"/v1/tests/{finished['id']}/export").body
    lm.request("DELETE", f"/v1/tests/{finished['id']}")
    for number, (change, field) in enumerate(WRONG):
        file = json.loads(exported)
        change(file)
        refused = lm.post("/v1/tests/import", file)
        assert refused.status == 400 and field in refused.json["fields"], (
            f"change {number} of {field}: {refused.body!r}"
        )
    for raw in (b"", b"[]", b"null", b"{", b'{"format": NaN}', b'{"format": []}', exported[:-9]):
        assert lm.post("/v1/tests/import", raw).status == 400, raw[:50]
    assert lm.get("/v1/tests").json == []
    assert lm.post("/v1/tests/import", exported).status == 201, "what was exported is taken"


# ---- a headless Locust's own files ------------------------------------------


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """Folder and target count of a real headless Locust that wrote --json-file and --csv."""
    folder = tmp_path_factory.mktemp("headless")
    with Target(fail_ratio=0.2) as target:
        done = subprocess.run(
            [sys.executable, "-m", "locust", "-f", str(ROOT / "locust" / "locustfile.py"), "--headless", "-u",
                "20", "-r", "20", "-t", "4s", "--stop-timeout", "5",
             "--host", target.url, "--json-file", "out", "--csv", "out", "--only-summary"],
            cwd=folder, capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode in (0, 1) and (folder / "out.json").exists(), done.stderr.decode()[-2000:]
        yield folder, target.total


def total_of_csv(folder):
    with (folder / "out_stats.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def cli(lm, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), *words, "--url", lm.url, "--token", API_TOKEN],
        capture_output=True,
        timeout=60,
        cwd=lm.folder,
    )


@pytest.mark.parametrize("name", ["out.json", "out_stats.csv"])
def test_the_files_of_a_headless_locust_become_a_run_with_its_numbers(lm, headless, name):
    folder, target_total = headless
    where = ["--tenant", "acme", "--env", "dev", "--scenario", "shop"]
    assert cli(lm, "import", str(folder / name)).returncode == 2, "whose run it was must be said"
    done = cli(lm, "import", str(folder / name), *where, "--json")
    assert done.returncode == 0, done.stderr.decode()
    run = json.loads(done.stdout)
    total = total_of_csv(folder)
    requests = (
        int(total["Request Count"])
        if name.endswith(".csv")
        else sum(row["num_requests"] for row in json.loads((folder / name).read_text()))
    )
    numbers = run["lastMetrics"]
    assert numbers["totalRequests"] == requests
    assert 0.7 * target_total < requests <= target_total, (
        "Locust writes its CSV once a second, the last time before the end"
    )
    if requests == int(total["Request Count"]):
        assert numbers["totalFailures"] == int(total["Failure Count"])
        for ours, column in (("p50ResponseMs", "50%"), ("p95ResponseMs", "95%"), ("p99ResponseMs", "99%")):
            assert numbers[ours] == float(total[column]), column
        assert numbers["avgResponseMs"] == pytest.approx(float(total["Average Response Time"]))
    assert numbers["totalRps"] == pytest.approx(float(total["Requests/s"]), rel=0.3)
    assert (run["status"], run["scenarioId"], run["trust"]) == ("Finished", "shop", "ok")
    assert lm.get(f"/v1/tests/{run['id']}/metrics").json["points"][-1]["totalRequests"] == requests
    assert cli(lm, "import", str(folder / name), *where).returncode == 1, (
        "the same file twice would be two runs of one test"
    )
    if name.endswith(".json"):
        assert lm.get(f"/v1/tests/{run['id']}/histograms").json["totals"]["requests"] == requests
    else:
        assert run["targetUsers"] == 20
        assert lm.get(f"/v1/tests/{run['id']}/failures").json["failures"]
    compared = lm.get(f"/v1/tests/compare?baseline={run['id']}&candidate={run['id']}").json
    assert (compared["regressions"], compared["judgement"]) == ([], "cannot tell")
    assert compared["message"] == "not enough runs to tell: 1 of 5"


def test_the_command_line_carries_a_run_from_one_server_to_another(lm, finished, load_manager, tmp_path):
    path = tmp_path / "run.json"
    assert cli(lm, "export", "latest", "-o", str(path)).returncode == 0
    elsewhere = load_manager(cluster_config("http://127.0.0.1:9"))
    done = cli(elsewhere, "import", str(path))
    assert (done.returncode, done.stdout.decode().strip()) == (
        0,
        f"run {finished['id']} of browse is imported",
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=strategies.data())
def test_a_file_of_locust_with_anything_in_it_is_taken_or_refused(headless, data):
    """Any value of the file replaced by any JSON: a run whose numbers fit the database, or InvalidInput."""
    stats = json.loads((headless[0] / "out.json").read_text())
    anything = strategies.recursive(
        strategies.none() | strategies.booleans() | strategies.floats(allow_nan=False,
            allow_infinity=False) | strategies.integers(-(10**30), 10**30) | strategies.text(max_size=5),
        lambda inner: strategies.lists(inner,
            max_size=3) | strategies.dictionaries(strategies.text("0123456789.-e", max_size=6), inner,
            max_size=3), max_leaves=5,
    )  # fmt: skip
    entry = data.draw(strategies.sampled_from(copy.deepcopy(stats)))
    entry[data.draw(strategies.sampled_from(sorted(entry)))] = data.draw(anything)
    try:
        found = loadmanager.read_import({"format": "locust-json", **PLACE, "stats": [entry]}, time.time())
    except loadmanager.InvalidInput as refused:
        assert refused.extra["fields"]
        return
    assert loadmanager.RunState(found.run, None).row()
    assert all(
        -(2**63) < number < 2**63 for sample in found.samples for number in (sample.requests, sample.failures)
    )


@settings(max_examples=100, deadline=None)
@given(text=strategies.text(max_size=200), history=strategies.text(max_size=200))
def test_any_text_as_csv_is_refused(text, history):
    with pytest.raises(loadmanager.InvalidInput):
        loadmanager.read_import(
            {
                "format": "locust-csv",
                **PLACE,
                "stats": text,
                "history": history,
                "startedAt": 1.0,
                "finishedAt": "2",
            },
            time.time(),
        )
