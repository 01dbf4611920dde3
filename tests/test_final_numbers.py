"""The numbers of old runs are on disk only: answers, lists, events and changes are as from memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
import requests
import sseclient
from conftest import API_TOKEN, CALLBACK_TOKEN, cluster_config
from test_store import new_run, open_store, postgres_url, snapshot  # noqa: F401 - fixtures
from waiting import eventually

import loadmanager as lm

HEADERS = {"Authorization": f"Bearer {API_TOKEN}"}


@pytest.fixture
def little_room(monkeypatch) -> None:
    """Two runs' numbers have room in memory."""
    size = len(lm.Numbers(snapshot(1000), "final").json())
    monkeypatch.setattr(lm.FinalNumbers, "MEMORY_BYTES", 0)
    monkeypatch.setattr(lm.FinalNumbers, "MIN_BYTES", 2 * size + 10)


def ended(store: lm.Store, requests_made: int, **changes) -> lm.Run:
    run = store.add(new_run(**changes))
    store.transition(run.id, lm.RunStatus.RUNNING, started_at=1000.0)
    store.transition(run.id, lm.RunStatus.STOPPING, stop_reason="user")
    return store.transition(
        run.id, lm.RunStatus.FINISHED, snapshot=snapshot(requests_made), finished_at=1060.0
    )


def in_memory(store: lm.Store, runs: list[lm.Run]) -> list[bool]:
    return [store.numbers.are_in_memory(run.id) for run in runs]


def listed(store: lm.Store, brief: bool) -> list[dict]:
    page, _ = store.list_json(lm.RunFilter(), None, None, brief)
    return [json.loads(b"".join(pieces)) for pieces in page]


def numbers_of(document: dict) -> int:
    return document["lastMetrics"]["totalRequests"]


@pytest.mark.usefixtures("little_room")
def test_old_runs_are_answered_and_listed_from_disk_as_from_memory(open_store):  # noqa: F811
    store = open_store()
    runs = [ended(store, number) for number in range(1000, 1006)]
    active = store.add(new_run())
    store.add_snapshot(active.id, snapshot(7), "poll")
    assert in_memory(store, [*runs, active]) == [False] * 4 + [True] * 3
    for brief in (False, True):
        assert [numbers_of(one) for one in listed(store, brief)] == [7, *range(1005, 999, -1)]
    assert all("requestStats" in one["lastMetrics"] for one in listed(store, False))
    assert numbers_of(json.loads(store.run_json(runs[0].id))) == 1000
    assert in_memory(store, runs)[0], "it is soon asked for again"
    assert numbers_of(json.loads(store.brief(runs[1].id))) == 1001
    newest = store.newest_numbers(runs[2].id)
    assert newest is not None and newest.requests == 1002
    assert [numbers_of(one) for one in store.numbers.documents(runs, lm.StoredRun.brief).values()] == [
        *range(1000, 1006)
    ]
    before = [store.run_json(run.id) for run in runs]
    store.close()
    again = open_store()
    assert in_memory(again, [*runs, active]) == [False] * 4 + [True] * 3, "the newest, and what is going on"
    assert [again.run_json(run.id) for run in runs] == before
    assert numbers_of(json.loads(again.run_json(active.id))) == 7


@pytest.mark.usefixtures("little_room")
def test_a_change_of_an_old_run_keeps_its_numbers_and_a_deletion_takes_them(open_store):  # noqa: F811
    store = open_store()
    runs = [ended(store, number) for number in range(1000, 1005)]
    store.annotate(runs[0].id, lm.Annotation(1001.0, "a deploy"))
    store.record_thinned(runs[1].id, 60)
    with store._lock:  # as when the numbers have to leave between the recall and the change
        record = store._runs.get(runs[2].id)
        record.numbers = lm.ON_DISK
        store._save(record, lm.replace(record.run, history_step_s=10))
    lm.RunRemoval(store).remove(runs[4].id)
    assert numbers_of(json.loads(store.run_json(runs[0].id))) == 1000
    store.close()
    again = open_store()
    documents = listed(again, False)
    assert [numbers_of(one) for one in documents] == [1003, 1002, 1001, 1000]
    assert [one.get("historyStepSeconds") for one in documents] == [None, 10, 60, None]
    assert documents[-1]["annotations"][0]["text"] == "a deploy"


@pytest.mark.usefixtures("little_room")
def test_a_run_without_numbers_has_none_and_needs_no_database(open_store):  # noqa: F811
    store = open_store()
    run = store.add(new_run())
    store.transition(run.id, lm.RunStatus.FAILED, finished_at=5.0)
    store.close()
    again = open_store()
    assert in_memory(again, [run]) == [True] and "lastMetrics" not in json.loads(again.run_json(run.id))


@pytest.mark.usefixtures("little_room")
def test_a_run_that_ends_while_the_database_is_away_is_not_compared(open_store, monkeypatch):  # noqa: F811
    store = open_store()
    first, *_ = [ended(store, number) for number in range(1000, 1004)]
    store.baselines.name(lm.Baseline("acme", "dev", "browse", first.id, 11.0, "me"))
    candidate = ended(store, 1005, compare_with="baseline")
    document = json.loads(store.run_json(candidate.id))
    assert store.comparer.judgement(candidate, document)["baseline"]
    other = ended(store, 1006, compare_with="baseline")
    assert in_memory(store, [first]) == [False]

    def away(*args, **kwargs):
        raise lm.NotReady("the database did not answer in time")

    monkeypatch.setattr(store._writer, "read", away)
    judged = store.comparer.judgement(other, json.loads(store.run_json(other.id)))
    assert judged["judgement"] == lm.CANNOT_TELL and "did not answer in time" in judged["message"]


@pytest.mark.usefixtures("little_room")
def test_a_run_that_is_deleted_while_its_numbers_are_read_is_not_answered_without_them(open_store):  # noqa: F811
    store = open_store()
    runs = [ended(store, number) for number in range(1000, 1004)]
    release, answers = threading.Event(), {}

    def ask():
        with pytest.raises(lm.NotFound):
            store.run_json(runs[0].id)
        answers["one"] = "NotFound"

    waiting = [
        threading.Thread(target=store.history.read, args=(lambda database: release.wait(20),)),
        threading.Thread(target=ask),
        threading.Thread(target=lambda: answers.update(all=listed(store, False))),
        threading.Thread(
            target=lambda: answers.update(some=store.numbers.documents(runs, lm.StoredRun.brief))
        ),
        threading.Thread(target=lm.RunRemoval(store).remove, args=(runs[0].id,)),
    ]
    for thread in waiting:
        thread.start()
        time.sleep(0.1)
    release.set()
    for thread in waiting:
        thread.join()
    assert answers["one"] == "NotFound"
    assert [numbers_of(one) for one in answers["all"]] == [1003, 1002, 1001]
    assert list(answers["some"]) == [run.id for run in runs[1:]]


def test_a_database_that_goes_back_gets_the_numbers_that_a_later_state_of_the_run_has_not():
    """They had left memory when the run was changed."""
    run, recent = new_run(), lm._RecentBatches()
    numbers = lm.Numbers(snapshot(1000), "final")
    for number, of_state in enumerate((None, numbers, None), 1):
        recent.add(number, lm._Batch(runs={run.id: lm.RunState(run, of_state)}))
    assert recent.since(1, {}).runs[run.id].numbers is numbers


# ---- over HTTP ---------------------------------------------------------------


@pytest.fixture
def service(tmp_path, little_room) -> Iterator[lm.Service]:
    config = tmp_path / "config.json"
    document = {
        "server": {"port": 0},
        "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
        "storage": {"url": "sqlite:///runs.db"},
        "locustClusters": [cluster_config("http://127.0.0.1:9")],
    }
    config.write_text(json.dumps(document))
    served = lm.Service(lm.checked_config(str(config)), str(config))
    served.start()
    yield served
    served._server.shutdown()  # stop() would end this process
    served._server.server_close()
    served._loop.close()
    served._timer.close()
    served._store.close()


def get(service: lm.Service, path: str) -> requests.Response:
    return requests.get(service.url + path, headers=HEADERS, timeout=20)


def test_an_old_run_waits_for_a_slow_database_and_nothing_else_does(service):
    store = service._store
    runs = [ended(store, number) for number in range(1000, 1005)]
    release, answers = threading.Event(), []
    threads = [
        threading.Thread(target=store.history.read, args=(lambda database: release.wait(20),)),
        threading.Thread(target=lambda: answers.append(get(service, f"/v1/tests/{runs[0].id}"))),
        threading.Thread(target=lambda: answers.append(get(service, "/v1/tests"))),
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    try:
        begun = time.monotonic()
        assert get(service, f"/v1/tests/{runs[4].id}").json()["lastMetrics"]["totalRequests"] == 1004
        assert get(service, "/v1/tests?limit=2").status_code == get(service, "/v1/whoami").status_code == 200
        assert time.monotonic() - begun < 5 and not answers
    finally:
        release.set()
        for thread in threads:
            thread.join()
    one, many = sorted((answer.json() for answer in answers), key=lambda answer: isinstance(answer, list))
    assert numbers_of(one) == 1000 and [numbers_of(run) for run in many] == [*range(1004, 999, -1)]


def test_streams_get_an_old_run_with_its_numbers(service):
    store = service._store
    runs = [ended(store, number) for number in range(1000, 1005)]
    with (
        requests.get(
            f"{service.url}/v1/tests/{runs[0].id}/events", headers=HEADERS, stream=True, timeout=20
        ) as one,
        requests.get(f"{service.url}/v1/events", headers=HEADERS, stream=True, timeout=20) as everything,
    ):
        of_one, of_all = sseclient.SSEClient(one).events(), sseclient.SSEClient(everything).events()
        assert next(of_one).event == next(of_all).event == "ready"
        assert numbers_of(json.loads(next(of_one).data)) == 1000
        eventually(lambda: not service._loop.api.store.numbers.are_in_memory(runs[1].id))
        store.annotate(runs[1].id, lm.Annotation(1001.0, "a deploy"))
        changed = next(event for event in of_all if event.event == "run" and runs[1].id in event.data)
        assert numbers_of(json.loads(changed.data)) == 1001
        with store._lock:  # its numbers leave before the round
            record = store._runs.get(runs[2].id)
            for listener in store.listeners:
                listener(record.run)
            store.numbers.forget(runs[2].id)
            record.numbers = lm.ON_DISK
        assert next(of_all).event == "reset", "who reads again gets what the loop does not wait for"
