"""Schedules that are due while the database, a real PostgreSQL, is away: they start once, when it is back or
at the one that takes over, and are missed when their deadline is over."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from urllib.parse import urlsplit

import pytest
from conftest import cluster_config
from tcp_proxy import TcpProxy
from test_notifications import Receiver
from test_schedules import in_seconds, runs_of, schedule
from test_standby import empty_postgres, member, on_port, status_of  # noqa: F401 - fixtures
from test_store import postgres_url  # noqa: F401 - a fixture
from waiting import eventually, holds_for

import loadmanager


class Database(TcpProxy):
    """The way to a database, which can be taken away and be given back. goes_at_commit: it goes by itself
    when the first run of a schedule is committed, and that is not answered yet."""

    goes_at_commit = False
    _sees_run = _sees_commit = False

    def saw(self, received: bytes) -> None:
        if self.goes_at_commit:
            if self._sees_commit:
                self.goes_at_commit = False
                self.drop()
                self.cut()
            self._sees_run = self._sees_run or b"schedule:" in received
            self._sees_commit = self._sees_run and b"COMMIT" in received

    @contextlib.contextmanager
    def away(self):
        self.drop()
        self.cut()
        try:
            yield
        finally:
            self.forward()


@pytest.fixture
def database(empty_postgres):  # noqa: F811
    with Database(urlsplit(empty_postgres).port) as way:
        way.url = on_port(empty_postgres, way.port)
        yield way


def wait_until(at):
    time.sleep(max(0.0, at - time.time()))


def due_of(made):
    return loadmanager.parse_utc(made["runAt"])


def settled(lm, made):
    """A schedule once its time was dealt with."""

    def found():
        one = lm.get(f"/v1/schedules/{made['id']}").json
        return one if one.get("lastOutcome") else None

    return eventually(found, 20, what="its time was dealt with")


def starts_by_run(fake):
    return Counter(call.form["run_id"] for call in fake.swarms)


def test_run_due_while_the_database_is_away_starts_when_it_is_back_or_is_missed(load_manager, fake, database):
    receiver = Receiver()
    with contextlib.closing(receiver):
        lm = load_manager(
            cluster_config(fake.url),
            storage={"url": database.url},
            notifications=[
                {"id": "hook", "type": "webhook", "url": receiver.url, "events": ["scheduleMissed"],
                    "allowPrivateAddresses": True}
            ],
        )  # fmt: skip
        in_time = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=60)
        too_late = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=1)
        with database.away():
            wait_until(due_of(too_late) + 3)
            assert not fake.swarms and not receiver.messages, "what is not on disk is not reported"
        started = settled(lm, in_time)
        assert started["lastOutcome"] == "started", started
        [run] = runs_of(lm)
        assert run["id"] == started["lastRunId"] and run["createdBy"] == f"schedule {in_time['id']}"
        missed = settled(lm, too_late)
        assert missed["lastOutcome"].startswith("missed: not started within 1 s: the database"), missed
        [told] = eventually(receiver.bodies, 10, what="the one that was missed is reported")
        assert "missed: not started within 1 s" in str(told), told
        holds_for(lambda: len(runs_of(lm)) == len(fake.swarms) == len(receiver.messages) == 1, 2)
        assert lm.log().count("schedule is due, and tried until its run can be kept") == 2


def test_active_run_is_not_replaced_while_its_successor_cannot_be_kept(load_manager, fake, database):
    lm = load_manager(cluster_config(fake.url), storage={"url": database.url})
    made = schedule(lm, cron="0 0 1 1 *", concurrencyPolicy="Replace")
    first = lm.post(f"/v1/schedules/{made['id']}/run").json["id"]
    lm.wait_for(first, "Running")
    assert lm.request("PATCH", f"/v1/schedules/{made['id']}", {"runAt": in_seconds(1.5)}).status == 200
    due = due_of(lm.get(f"/v1/schedules/{made['id']}").json)
    with database.away():
        wait_until(due + 2)
        assert not fake.stops, "the run was stopped, and its successor cannot start"
    second = eventually(
        lambda: next((run["id"] for run in runs_of(lm) if run["id"] != first), None), 20, what="the next run"
    )
    lm.wait_for(second, "Running")
    assert lm.run(first)["status"] == "Finished" and starts_by_run(fake) == {first: 1, second: 1}


def test_kill_while_the_database_is_away_neither_loses_nor_doubles_the_run(load_manager, fake, database):
    lm = load_manager(cluster_config(fake.url), storage={"url": database.url})
    made = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=60)
    with database.away():
        wait_until(due_of(made) + 1.5)
        lm.kill9()
    lm.restart()
    assert settled(lm, made)["lastOutcome"] == "started"
    lm.kill9()
    lm.restart()
    holds_for(lambda: len(runs_of(lm)) == len(fake.swarms) == 1, 2)


def test_shutdown_while_a_run_is_due_leaves_it_to_the_next_start(load_manager, fake, database):
    lm = load_manager(cluster_config(fake.url), storage={"url": database.url})
    made = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=60)
    with database.away():
        wait_until(due_of(made) + 1)
        lm.process.terminate()
        lm.process.wait(10)
    lm.restart()
    assert settled(lm, made)["lastOutcome"] == "started"
    holds_for(lambda: len(runs_of(lm)) == len(fake.swarms) == 1, 2)


@pytest.mark.parametrize("offset_s", [-0.6, -0.05, 0.0, 0.03, 0.1])
def test_standby_that_takes_over_as_a_run_is_due_starts_it_once(
    member, fake, empty_postgres, database, offset_s  # noqa: F811
):  # fmt: skip
    """The leader loses the database around that time, and finds it again when the other one leads."""
    leader = member(fake.url, database_port=database.port)
    standby = member(fake.url)
    eventually(lambda: status_of(standby) == "standby", 10)
    made = schedule(leader, runAt=in_seconds(2), startingDeadlineSeconds=60)
    wait_until(due_of(made) + offset_s)
    with database.away():
        eventually(lambda: status_of(standby) == "leading", 15, what="the standby leads")
        assert settled(standby, made)["lastOutcome"] == "started"
    assert leader.process.wait(20) == loadmanager.EXIT_LEAD_LOST, leader.log()
    holds_for(lambda: len(runs_of(standby)) == 1, 3)
    [run] = runs_of(standby)
    assert starts_by_run(fake) == {run["id"]: 1} or run["status"] == "Failed", (run, starts_by_run(fake))
    assert all(count == 1 for count in starts_by_run(fake).values()) and len(starts_by_run(fake)) <= 1


@pytest.mark.parametrize("offset_s", [-0.02, 0.0, 0.01, 0.02, 0.04, 0.08])
def test_database_that_goes_at_the_very_time_starts_the_run_once(load_manager, fake, database, offset_s):
    lm = load_manager(cluster_config(fake.url), storage={"url": database.url})
    made = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=60)
    wait_until(due_of(made) + offset_s)
    with database.away():
        time.sleep(2)
    assert settled(lm, made)["lastOutcome"] == "started"
    holds_for(lambda: len(runs_of(lm)) == len(fake.swarms) == 1, 2)


def test_run_whose_commit_was_not_answered_starts_once(load_manager, fake, database):
    lm = load_manager(cluster_config(fake.url), storage={"url": database.url})
    made = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=60)
    database.goes_at_commit = True
    eventually(lambda: not database.goes_at_commit, 10, what="the run was committed")
    time.sleep(2)
    database.forward()
    assert settled(lm, made)["lastOutcome"] == "started"
    holds_for(lambda: len(runs_of(lm)) == len(fake.swarms) == 1, 2)


def test_run_whose_commit_was_not_answered_is_known_to_the_standby_that_takes_over(
    member, fake, empty_postgres, database  # noqa: F811
):  # fmt: skip
    """Whether it was sent to Locust, that one cannot know: it is Failed rather than started twice."""
    leader = member(fake.url, database_port=database.port)
    standby = member(fake.url)
    eventually(lambda: status_of(standby) == "standby", 10)
    made = schedule(leader, runAt=in_seconds(1), startingDeadlineSeconds=60)
    database.goes_at_commit = True
    eventually(lambda: status_of(standby) == "leading", 15, what="the standby leads")
    assert settled(standby, made)["lastOutcome"] == "started"
    database.forward()
    assert leader.process.wait(20) == loadmanager.EXIT_LEAD_LOST, leader.log()
    [run] = runs_of(standby)
    assert run["status"] == "Failed" and "before the start was confirmed" in run["failureReason"], run
    assert not fake.swarms
