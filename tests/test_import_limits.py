"""Big and hostile imports: read by a child process, one at a time, within limits."""

from __future__ import annotations

import json
import threading
import uuid

import pytest
from waiting import eventually

import loadmanager

RUN = {
    "tenantId": "acme", "envId": "dev", "locustClusterId": "one", "scenarioId": "shop", "targetUsers": 5,
    "spawnRate": 5, "status": "Finished",
    "createdAt": "2026-11-23T12:00:00.123Z", "startedAt": "2026-11-23T12:00:01.456Z",
    "finishedAt": "2026-11-23T13:00:00.789Z",
}  # fmt: skip


def export(count: int, **changes: object) -> bytes:
    """An export of so many samples, with endpoints, histograms and failures."""
    rows = [
        {
            "timestamp": loadmanager.utc_text(1_764_000_000 + number), "totalRps": 12.25,
            "failuresPerSec": 0.5, "totalRequests": number,
            "totalFailures": 12, "errorRate": 0.25, "avgResponseMs": 12.5, "p50ResponseMs": 12,
            "p95ResponseMs": 34, "p99ResponseMs": None,
            "currentP50Ms": 12, "currentP95Ms": 34, "currentUsers": 10, "source": "poll",
        }
        for number in range(count)
    ]  # fmt: skip
    entry = {"method": "GET", "name": "/a", "numRequests": 5, "numFailures": 1}
    stats = {f"GET_/{number}": {**entry, "name": f"/{number}"} for number in range(1200)}
    document = {
        "format": "loadmanager-run", "version": 1, "run": {"id": str(uuid.uuid4()), **RUN,
            "lastMetrics": {"totalRequests": 5, "requestStats": stats}},
        "samples": rows, "histograms": [{"timestamp": RUN["finishedAt"], "isWhole": True,
            "rows": [[None, None, 5, 1, 50.0, [10, 5]]]}],
        "failures": {"failures": [{"method": "GET", "name": "/a", "error": "é" * 100, "occurrences": 3}],
            "exceptions": []}, **changes,
    }  # fmt: skip
    return json.dumps(document).encode()


def test_child_finds_what_this_process_would_find(monkeypatch):
    body = export(2345)
    assert len(body) > loadmanager.SMALL_IMPORT_BYTES
    here = loadmanager.read_import(loadmanager.parse_json(body), 5.0)
    reads = []
    monkeypatch.setattr(loadmanager, "read_import", lambda *how: reads.append(how))
    assert loadmanager.ImportReader().read(body, 5.0) == here
    assert not reads, "a big import was read by this process"


@pytest.mark.parametrize(
    "body, words",
    [
        (
            b'{"format": "loadmanager-run", "x": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}",
            "nested too deeply",
        ),
        (b'{"format": "loadmanager-run", "x": 1' + b"0" * 400_000 + b"}", "too many digits"),
        (export(2000, version=2), "version: "),
        (export(2000, histograms=[{"bad": 1}]), r"histograms\[0\]"),
        (export(2000, samples=[{"timestamp": "x"}] * 20_000), r"samples\[0\]"),
        (b'{"format": "nothing", "x": [' + b"1," * 300_000 + b"1]}", "format: "),
        (b"\xff" * 300_000, "not UTF-8"),
    ],
    ids=["deep", "digits", "version", "histograms", "samples", "format", "bytes"],
)
def test_child_refuses_in_the_words_of_a_small_import(body, words):
    with pytest.raises(loadmanager.InvalidInput, match=words):
        loadmanager.ImportReader().read(body, 5.0)


def test_import_that_takes_too_much_memory_is_ended(monkeypatch, tmp_path):
    """The limits are the child's own: it runs a copy of the program with lower ones."""
    source = open(loadmanager.__file__, encoding="utf-8").read()
    limit = "IMPORT_MEMORY_BYTES = 1536 * 1024 * 1024"
    assert limit in source
    program = tmp_path / "loadmanager.py"
    program.write_text(source.replace(limit, "IMPORT_MEMORY_BYTES = 150 * 1024 * 1024"), encoding="utf-8")
    monkeypatch.setattr(loadmanager, "__file__", str(program))
    body = b'{"format": "loadmanager-run", "x": [' + b'{"a":[]},' * 2_000_000 + b"1]}"
    with pytest.raises(loadmanager.TooLarge, match="takes more than"):
        loadmanager.ImportReader().read(body, 5.0)


def test_imports_are_read_one_at_a_time_and_few_wait(monkeypatch):
    reader = loadmanager.ImportReader()
    at_work, most, go_on = [], [], threading.Event()

    def read_slowly(body, now):
        at_work.append(1)
        most.append(len(at_work))
        go_on.wait(10)
        at_work.pop()

    monkeypatch.setattr(reader, "_read_in_child", read_slowly)
    body = b"x" * 1_000_000
    threads = [
        threading.Thread(target=reader.read, args=(body, 5.0), daemon=True)
        for _ in range(1 + loadmanager.MAX_IMPORTS_WAITING)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: not reader._places._value)
    with pytest.raises(loadmanager.NotReady) as refusal:
        reader.read(body, 5.0)
    assert refusal.value.retry_after_s == 5
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(most) == len(threads) and max(most) == 1


def test_big_import_is_kept_with_all_it_holds(lm):
    body = export(2000)
    answer = lm.post("/v1/tests/import", body)
    assert answer.status == 201, answer.body
    run_id = answer.json["id"]
    again = lm.get(f"/v1/tests/{run_id}/export").json
    given = json.loads(body)
    assert again["samples"] == given["samples"] and again["histograms"] == given["histograms"]
    assert again["failures"]["failures"][0]["error"] == "é" * 100
    assert len(again["run"]["lastMetrics"]["requestStats"]) == 1200
    refused = lm.post("/v1/tests/import", export(2000, version=7))
    assert refused.status == 400 and refused.json["fields"] == {
        "version": again and refused.json["fields"]["version"]
    }
