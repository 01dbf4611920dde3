"""Odd content in what a Locust answers when it is polled: held against the limits of what is pushed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import LoadManager, cluster_config
from fake_locust import CSV_HEAD, FakeHandler, FakeLocust
from locust_process import LocustCluster
from waiting import eventually

import loadmanager

FAILURES_HEAD = "Method,Name,Error,Occurrences,First Seen,Last Seen"


@pytest.fixture
def client(fake_locust: Callable[..., FakeLocust]) -> Iterator[tuple[loadmanager.LocustClient, FakeLocust]]:
    fake = fake_locust(hooks=False)
    config = loadmanager.ClusterConfig(id="one", tenant_id="acme", env_id="dev", base_url=fake.url)
    yield loadmanager.LocustClient(config, "", "."), fake


def answers(text: str, content_type: str = "application/json") -> Callable[[FakeHandler], None]:
    return lambda handler: handler.send_text(200, text, content_type)


def assert_storable(value: Any) -> None:
    """Every number fits a database, every text is Unicode without NUL and of bounded length."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        value.encode("utf-8")
        assert "\0" not in value
        assert len(value) <= loadmanager.MAX_TRACEBACK
    elif isinstance(value, (int, float)):
        assert math.isfinite(value) and abs(value) < 1 << 63
    elif isinstance(value, dict):
        for name, entry in value.items():
            assert_storable(name)
            assert_storable(entry)
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            assert_storable(getattr(value, one.name))
    else:
        assert isinstance(value, (tuple, list)), type(value)
        assert len(value) <= loadmanager.MAX_LOCUST_ENDPOINTS
        for entry in value:
            assert_storable(entry)


ODD = {
    "2^63": 1 << 63,
    "2^70": 1 << 70,
    "400 digits": 10**400,
    "negative": -5,
    "NaN": math.nan,
    "Infinity": math.inf,
    "word": "fast",
    "list": [1, [2]],
    "object": {"a": 1},
    "true": True,
    "null": None,
    "lone surrogate": "a\ud800b",
    "NUL": "a\0b",
    "1 MB": "x" * (1 << 20),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_statistics_with_an_odd_value_in_any_place_are_bounded(
    client: tuple[loadmanager.LocustClient, FakeLocust], odd: Any
) -> None:
    locust, fake = client
    fake.users = 2
    good = fake.stats()
    good["errors"] = [
        {"method": "GET", "name": "/", "error": "e", "occurrences": 1, "first_seen": 1.0, "last_seen": 2.0}
    ]
    for name in list(good):
        for document in everywhere(good, name, odd):
            fake.faults["/stats/requests"] = answers(json.dumps(document))
            try:
                reading = locust.read_stats()
            except loadmanager.LocustBadAnswer:
                continue
            assert_storable(reading)
            loadmanager.dump_json(loadmanager.snapshot_to_json(reading.snapshot)).encode()
            loadmanager.dump_json(loadmanager.failures_to_json(reading.failures, ())).encode()


def everywhere(good: dict[str, Any], name: str, odd: Any) -> Iterator[dict[str, Any]]:
    """The document with `odd` for the key, and for each key of the first object below it."""
    yield {**good, name: odd}
    below = good[name]
    if isinstance(below, dict):
        yield {**good, name: dict.fromkeys(below, odd)}
    for index in range(len(below) if isinstance(below, list) else 0):
        for key in below[index] if isinstance(below[index], dict) else ():
            rows = list(below)
            rows[index] = {**below[index], key: odd}
            yield {**good, name: rows}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_the_hooks_state_with_an_odd_value_in_any_place_is_bounded(
    client: tuple[loadmanager.LocustClient, FakeLocust], odd: Any
) -> None:
    locust, fake = client
    good = {
        **fake.hooks_state(),
        "locustfileSha256": "0" * 64,
        "availableUserClasses": ["U"],
        "options": ["o"],
        "tags": ["t"],
    }
    for name in good:
        for document in everywhere(good, name, odd):
            fake.faults["/loadmanager/state"] = answers(json.dumps(document))
            locust._hooks_absent_until = 0.0
            assert_storable(locust.read_state())


def test_a_hundred_thousand_workers_rows_and_errors_are_cut(
    client: tuple[loadmanager.LocustClient, FakeLocust],
) -> None:
    locust, fake = client
    count = 20_000  # 100,000 of each are over the limit of an answer, 8 MiB, and refused as a whole
    fake.top_changes = {
        "workers": [{"id": str(n)} for n in range(count)],
        "stats": [{"name": str(n), "num_requests": 1} for n in range(count)],
        "errors": [{"name": str(n), "occurrences": n} for n in range(count)],
    }
    reading = locust.read_stats()
    assert_storable(reading)
    assert len(reading.failures) == loadmanager.MAX_LOCUST_FAILURES
    assert max(failure.occurrences for failure in reading.failures) == count - 1


CELLS = ["1" * 400, "1e400", "-5", "nan", "N/A", "", "9" * 5000, str(1 << 63), "fast", "a\0b", "x" * 200_000]


@pytest.mark.parametrize("cell", CELLS, ids=[cell[:10] or "empty" for cell in CELLS])
def test_a_csv_report_with_an_odd_cell_is_bounded(
    client: tuple[loadmanager.LocustClient, FakeLocust], cell: str
) -> None:
    locust, fake = client
    columns = CSV_HEAD.count(",") + 1
    for index in range(columns):
        row = ["1"] * columns
        row[index] = cell
        total = ["", "Aggregated", *["1"] * (columns - 2)]
        if index > 1:
            total[index] = cell
        text = io.StringIO()
        csv.writer(text).writerows([row, total])
        fake.faults["/stats/requests/csv"] = answers(f"{CSV_HEAD}\r\n{text.getvalue()}", "text/csv")
        assert_storable(locust.read_final())


def test_failures_with_bare_returns_nul_quotes_and_long_texts_are_read(
    client: tuple[loadmanager.LocustClient, FakeLocust],
) -> None:
    locust, fake = client
    rows = [
        'GET,/quoted,"he said ""no""\nand left",3,1.5,2.5',
        "GET,/return,one\rtwo,4,2026-11-25T01:02:03,2026-11-25T01:02:04",
        "GET,/nul,one\0two,5,,",
        f"GET,/long,{'x' * 200_000},6,,",
        "GET,/short",
    ]
    fake.faults["/stats/failures/csv"] = answers("\r\n".join([FAILURES_HEAD, *rows]), "text/csv")
    failures = {failure.name: failure for failure in locust.read_failures()}
    assert set(failures) == {"/quoted", "/return", "/nul", "/long", "/short"}
    assert failures["/quoted"].error == 'he said "no"\nand left'
    assert failures["/return"].occurrences == 4
    assert len(failures["/long"].error) == loadmanager.MAX_LOCUST_ERROR
    assert_storable(tuple(failures.values()))


GARBAGE = {
    "deep": "[" * 200_000,
    "deep object": '{"stats":' * 5000,
    "long number": '{"state": "ready", "stats": [], "user_count": ' + "9" * 5000 + "}",
    "list": "[]",
    "no": "",
    "null": "null",
    "text": '"x"',
    "odd parts": '{"state": "ready", "stats": [[1]], "workers": {"a": 1}, "errors": 5,'
    ' "exceptions": {"x": 1},'
    ' "master": 5, "workers": 5, "hooks": 1}',
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_whatever_is_answered_is_read_or_refused_as_a_locust_error(
    client: tuple[loadmanager.LocustClient, FakeLocust], text: str
) -> None:
    locust, fake = client
    fake.faults["*"] = answers(text)
    calls = [
        locust.read_state, locust.read_stats, locust.read_final, locust.read_failures, locust.read_exceptions,
        locust.read_report, locust.read_abilities, locust.version, lambda: locust.read_logs(10),
        lambda: locust.stop("r"), lambda: locust.swarm({"user_count": 1}),
    ]  # fmt: skip
    for call in calls:
        try:
            assert_storable(call()) if call != locust.read_report else call()
        except loadmanager.LocustError:
            pass  # the one exception that callers are ready for


def test_a_version_of_many_digits_is_no_exception(
    client: tuple[loadmanager.LocustClient, FakeLocust],
) -> None:
    locust, fake = client
    fake.faults["/"] = answers('"version": "' + "9" * 6000 + '.1"', "text/html")
    assert_storable(locust.version())


def test_different_long_names_stay_different() -> None:
    one, other = ("/path?" + "x" * 5000 + end for end in "ab")
    cut = loadmanager.storable_text(one), loadmanager.storable_text(other)
    assert cut[0] != cut[1]
    assert len(cut[0]) == loadmanager.MAX_LOCUST_NAME
    assert loadmanager.storable_text("short") == "short"


def test_pushed_and_polled_names_are_cut_alike() -> None:
    name = "/" + "y" * 5000
    pushed = loadmanager.check_metrics(
        {"metrics": {"requestStats": {f"GET_{name}": {"method": "GET", "name": name}}}}, "metrics", 1.0
    )
    polled = loadmanager._endpoint_of_stats({"method": "GET", "name": name, "num_requests": 1})
    assert pushed is not None and pushed.endpoints is not None
    assert pushed.endpoints[0].name == polled.name


def test_a_run_ends_whatever_its_locust_tells_of_it(
    load_manager: Callable[..., LoadManager], fake_locust: Callable[..., FakeLocust]
) -> None:
    fake = fake_locust(hooks=False)
    lm = load_manager(cluster_config(fake.url))
    fake.stats_changes = {"num_failures": 1 << 63, "avg_response_time": 10**400}
    fake.endpoints = [("GET", "a\ud800b")]
    fake.faults["/stats/failures/csv"] = answers(
        f"{FAILURES_HEAD}\r\nGET,/,{'x' * 140_000}\ry,3,,", "text/csv"
    )
    fake.faults["/exceptions"] = answers('{"exceptions": [{"count": 1e400, "msg": "a\\ud800b"}]}')
    run_id = lm.create(durationSeconds=2).json["id"]
    eventually(lambda: lm.run(run_id).get("lastMetrics"), 10)
    assert lm.get(f"/v1/tests/{run_id}/failures").status == 200
    assert lm.wait_for(run_id, "Finished")["stopReason"] == "duration"
    assert lm.get(f"/v1/tests/{run_id}/failures").json["failures"][0]["occurrences"] == 3
    assert lm.get(f"/v1/tests/{run_id}/report.html").status == 200
    assert lm.create(durationSeconds=1).status == 201  # the cluster is free, and the database writes


LONG_FAILURES = """
from locust import HttpUser, task, constant

class Shopper(HttpUser):
    wait_time = constant(0.05)

    @task
    def buy(self):
        with self.client.get("/long", catch_response=True) as r:
            r.failure("unexpected: " + "word\\r" * 30000 + str(len(r.text or "")))
"""


def test_failure_texts_of_140_kilobytes_do_not_keep_a_real_run_from_ending(
    load_manager: Callable[..., LoadManager],
) -> None:
    with LocustCluster(LONG_FAILURES, workers=1, extra_args=["--host", "http://127.0.0.1:9"]) as cluster:
        lm = load_manager(cluster_config(cluster.base_url))
        run_id = lm.create(durationSeconds=3, targetUsers=1, spawnRate=1).json["id"]
        eventually(lambda: (lm.run(run_id).get("lastMetrics") or {}).get("totalFailures"), 20)
        assert lm.get(f"/v1/tests/{run_id}/failures").status == 200
        lm.wait_for(run_id, "Finished", within_s=30)
        kept = lm.get(f"/v1/tests/{run_id}/failures").json["failures"]
        assert kept and kept[0]["error"].startswith("CatchResponseError('unexpected: word")
        assert len(kept[0]["error"]) == loadmanager.MAX_LOCUST_ERROR
        assert lm.get(f"/v1/tests/{run_id}/report.html").status == 200
