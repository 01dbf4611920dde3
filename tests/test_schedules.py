"""Runs that start by themselves: what cron means, clocks that are put forward and back, and schedules over
restarts."""

from __future__ import annotations

import datetime
import json
import random
import subprocess
import sys
import threading
import time
from zoneinfo import ZoneInfo

import pytest
from conftest import API_TOKEN, ROOT, cluster_config, create_body
from croniter import croniter
from waiting import eventually, holds_for

import loadmanager

UTC = ZoneInfo("UTC")


def random_field(draw, name, least, most, names):
    def value():
        return draw.choice([*names]) if names and draw.random() < 0.3 else str(draw.randint(least, most))

    parts = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.random()
        if kind < 0.3:
            parts.append(value())
        elif kind < 0.6:
            low = draw.randint(least, most - 1)
            high = draw.randint(low + 1, most)  # the oracle takes 5-5 for everything
            parts.append(f"{low}-{high}" + (f"/{draw.randint(1, 9)}" if draw.random() < 0.5 else ""))
        else:
            parts.append(
                f"*/{draw.randint(2, min(most, 30))}"
                if draw.random() < 0.8 or most == 7
                else f"{draw.randint(least, most)}/{draw.randint(1, 9)}"
            )
    return ",".join(parts)


def random_expression(draw):
    words = [random_field(draw, *field) if draw.random() < 0.6 else "*" for field in loadmanager.CRON_FIELDS]
    return " ".join(words)


def test_next_times_are_those_of_a_well_kept_cron_library():
    """4,000 random expressions at random moments of 30 years; day and weekday together mean either, as in
    cron."""
    draw = random.Random(20261123)
    compared = 0
    while compared < 4000:
        text, start = random_expression(draw), draw.randint(946684800, 1893456000)
        try:
            cron = loadmanager.parse_cron(text)
        except loadmanager.InvalidValue as refused:
            assert "no such day" in str(refused), f"{text}: {refused}"
            continue
        if cron.either_day and (len(cron.weekdays) == 7 or len(cron.days) == 31):
            # such as 0-7: every day by its name, and cron programs differ in whether that counts as *
            continue
        ours = loadmanager.next_times(cron, UTC, start, 3)
        try:
            oracle = croniter(text, datetime.datetime.fromtimestamp(start, UTC))
            theirs = [oracle.get_next(float) for _ in ours]
        except Exception as error:  # noqa: BLE001 - it gives up where a day is too rare
            assert "failed to find" in str(error), f"{text}: {error}"
            continue
        assert ours == theirs, f"{text} after {datetime.datetime.fromtimestamp(start, UTC)}"
        compared += 1


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("@daily", "0 0 * * *"),
        ("@hourly", "0 * * * *"),
        ("@WEEKLY", "0 0 * * sun"),
        ("@yearly", "0 0 1 jan *"),
        ("0 0 * * 7", "0 0 * * 0"),
    ],
)
def test_names_mean_the_same_as_numbers(name, same):
    assert loadmanager.parse_cron(name) == loadmanager.parse_cron(same)._replace(
        either_day=loadmanager.parse_cron(name).either_day
    )


def local_times(text, zone, start, count):
    zone = ZoneInfo(zone)
    after = datetime.datetime.fromisoformat(start).replace(tzinfo=zone).timestamp()
    found = loadmanager.next_times(loadmanager.parse_cron(text), zone, after, count)
    return [datetime.datetime.fromtimestamp(at, zone).isoformat() for at in found]


def test_a_time_that_does_not_exist_runs_at_the_next_moment_that_does():
    assert local_times("30 2 * * *", "Europe/Berlin", "2027-03-27T12:00", 2) == [
        "2027-03-28T03:00:00+02:00",
        "2027-03-29T02:30:00+02:00",
    ]
    assert local_times("*/20 2 * * *", "Europe/Berlin", "2027-03-28T00:00", 2) == [
        "2027-03-28T03:00:00+02:00",
        "2027-03-29T02:00:00+02:00",
    ]
    assert local_times("15 2 * * *", "Australia/Lord_Howe", "2027-10-02T12:00", 1) == [
        "2027-10-03T02:30:00+11:00"
    ], "clocks there go by half an hour"
    assert local_times("0 0 * * *", "America/Sao_Paulo", "2018-11-03T12:00", 1) == [
        "2018-11-04T01:00:00-02:00"
    ], "midnight does not exist"


def test_a_time_that_exists_twice_runs_once():
    assert local_times("30 2 * * *", "Europe/Berlin", "2027-10-30T12:00", 2) == [
        "2027-10-31T02:30:00+02:00",
        "2027-11-01T02:30:00+01:00",
    ]
    zone = ZoneInfo("Europe/Berlin")
    between = datetime.datetime(2027, 10, 31, 2, 40, fold=0, tzinfo=zone).timestamp()
    second = datetime.datetime(2027, 10, 31, 2, 10, fold=1, tzinfo=zone).timestamp()
    for after in (between, second):
        [at] = loadmanager.next_times(loadmanager.parse_cron("30 2 * * *"), zone, after)
        assert datetime.datetime.fromtimestamp(at, zone).isoformat() == "2027-11-01T02:30:00+01:00", (
            "the second half past two is not another one"
        )


@pytest.mark.parametrize(
    "zone",
    [
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "Asia/Kolkata",
        "Africa/Casablanca",
        "Pacific/Apia",
    ],
)
def test_moments_of_a_year_ascend_and_each_wall_time_comes_once(zone):
    zone_, began, seen = ZoneInfo(zone), 1798761600.0, []
    for at in loadmanager.next_times(loadmanager.parse_cron("*/30 * * * *"), zone_, began, 366 * 48):
        seen.append(datetime.datetime.fromtimestamp(at, zone_).replace(tzinfo=None))
    assert len(seen) == len(set(seen)), "a wall time came twice"
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "five fields"), ("* * * *", "five fields"), ("* * * * * *", "five fields"),
        ("60 * * * *", "minute '60': must be 0 to 59"),
        ("* 24 * * *", "hour"), ("* * 0 * *", "day of month"), ("* * * 13 *", "month"),
        ("* * * foo *", "jan"), ("* * * * 8", "0 to 7"),
        ("5-1 * * * *", "upwards"), ("*/0 * * * *", "1 or more"), ("*-5 * * * *", "must be *"),
        ("1,,2 * * * *", "must be *"),
        ("0 0 30 2 *", "no such day"), ("@never", "five fields"), ("0 0 L * *", "must be *"),
        ("0 0 * * 1#2", "must be *"), ("\u0661 * * * *", "must be *"),
    ],
)  # fmt: skip
def test_a_wrong_expression_is_refused_with_its_field(text, says):
    with pytest.raises(loadmanager.InvalidValue) as refused:
        loadmanager.parse_cron(text)
    assert says in str(refused.value)


# ---- a server ---------------------------------------------------------------


def in_seconds(seconds):
    return loadmanager.utc_text(time.time() + seconds)


def schedule(lm, **more):
    made = lm.post("/v1/schedules", {"test": create_body(durationSeconds=30), **more})
    assert made.status == 201, made.body
    return made.json


def runs_of(lm):
    return [run for run in lm.get("/v1/tests").json if run["source"] == "schedule"]


def test_a_run_starts_once_at_its_moment(lm):
    made = schedule(lm, runAt=in_seconds(1.2), description="once")
    assert len(made["next"]) == 1
    [run] = eventually(lambda: runs_of(lm), 6, what="the run of the schedule")
    assert 1.0 < loadmanager.parse_utc(run["createdAt"]) - loadmanager.parse_utc(made["createdAt"]) < 2.5
    assert run["createdBy"] == f"schedule {made['id']}"
    after = eventually(
        lambda: (lambda one: one if one.get("lastRunId") else None)(
            lm.get(f"/v1/schedules/{made['id']}").json
        ),
        5,
    )
    assert (after["lastRunId"], after["lastOutcome"], after["next"]) == (run["id"], "started", [])
    holds_for(lambda: len(runs_of(lm)) == 1, 1.5)
    [told] = [entry for entry in lm.get("/v1/audit").json if entry.get("runId") == run["id"]]
    assert (told["who"], told["action"], told["outcome"]) == (
        f"schedule {made['id']}",
        "schedule of api",
        "done",
    )


def test_a_moment_missed_while_away_is_made_up_for_once_and_only_in_time(lm):
    late = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=60)
    too_late = schedule(lm, runAt=in_seconds(1), startingDeadlineSeconds=1)
    lm.kill9()
    eventually(lambda: time.time() > loadmanager.parse_utc(late["runAt"]) + 2.5, 10)
    lm.restart()
    [run] = eventually(lambda: runs_of(lm), 6, what="the missed run")
    assert run["createdBy"] == f"schedule {late['id']}"
    missed = eventually(
        lambda: (lambda one: one if one.get("lastOutcome") else None)(
            lm.get(f"/v1/schedules/{too_late['id']}").json
        ),
        5,
    )
    assert missed["lastOutcome"].startswith("missed: ")
    lm.kill9()
    lm.restart()
    holds_for(lambda: len(runs_of(lm)) == 1, 2)


def stop_active(lm):
    """Stop the active runs; how many there were. The stop of one that is just starting is refused (409), and
    its start waits for the clean-up of an interrupted one for up to 13 s: the caller asks again."""
    active = lm.get("/v1/tests?status=Pending,Running,Stopping").json
    for run in active:
        lm.post(f"/v1/tests/{run['id']}/stop")
    return len(active)


def test_kill_9_around_the_moment_neither_loses_nor_doubles_the_run(lm):
    for offset in (0.0, 0.02, 0.06, 0.15):
        before = len(runs_of(lm))
        # Queue: a killed start is cleaned up first.
        made = schedule(lm, runAt=in_seconds(0.8), concurrencyPolicy="Queue")
        due = loadmanager.parse_utc(made["runAt"])
        while time.time() < due + offset:
            time.sleep(0.005)
        lm.kill9()
        lm.restart()
        eventually(
            lambda before=before: len(runs_of(lm)) == before + 1,
            20,
            what=f"one run of the schedule that was due {offset} s before the kill",
        )
        path = f"/v1/schedules/{made['id']}"
        eventually(lambda path=path: lm.get(path).json.get("lastRunId"), 20)
        eventually(lambda: not stop_active(lm), 40, what="every run is stopped")


@pytest.mark.parametrize(
    ("policy", "outcome"), [("Forbid", "skipped: its run"), ("Queue", "started"), ("Replace", "started")]
)
def test_what_happens_while_the_last_run_is_active(lm, policy, outcome):
    made = schedule(lm, runAt=in_seconds(0.5), concurrencyPolicy=policy)
    [first] = eventually(lambda: runs_of(lm), 5)
    eventually(lambda: lm.get(f"/v1/schedules/{made['id']}").json.get("lastRunId"), 5)
    changed = lm.request("PATCH", f"/v1/schedules/{made['id']}", {"cron": "* * * * *"})
    assert changed.status == 200 and len(changed.json["next"]) == 5
    lm.request("PATCH", f"/v1/schedules/{made['id']}", {"paused": True})
    # the next minute is too far for a test: the same path, by hand
    now = loadmanager.utc_text(time.time() + 0.5)
    again = lm.post(
        "/v1/schedules", {"test": create_body(durationSeconds=30), "runAt": now, "concurrencyPolicy": policy}
    ).json
    last = eventually(
        lambda: (lambda one: one if one.get("lastOutcome") else None)(
            lm.get(f"/v1/schedules/{again['id']}").json
        ),
        10,
    )
    if policy == "Queue":
        assert last["lastOutcome"] == "started" and lm.run(last["lastRunId"])["queuePosition"] == 1
    else:
        assert "active run" in last["lastOutcome"], "a run of somebody else is not replaced"
    assert lm.run(first["id"])["status"] == "Running"


def test_a_minutely_schedule_replaces_queues_or_skips_its_own_active_run(tmp_path):
    """The policies themselves, at the level of the scheduler: a minute is too long to wait for thrice."""
    store = loadmanager.Store(loadmanager.open_database("memory:", str(tmp_path)))
    config = loadmanager.Config()
    active = loadmanager.Run(
        "r1", "acme", "dev", "one", "browse", 1, 1.0, loadmanager.RunStatus.PENDING, time.time()
    )
    store.add(active)
    store.transition("r1", loadmanager.RunStatus.RUNNING, started_at=time.time())

    class Orders:
        """Takes down what the scheduler orders; the engine itself is tested with a server."""

        def __init__(self):
            self.seen = []

        def stop(self, run_id, reason):
            self.seen.append(("stop", run_id))

        def create(self, request, by, source, idempotency):
            self.seen.append(("create", request.queue, source, idempotency[0]))
            return active

    for policy, orders in (
        ("Forbid", []),
        ("Queue", [("create", True, "schedule", "schedule:s:60")]),
        ("Replace", [("stop", "r1"), ("create", False, "schedule", "schedule:s:60")]),
    ):
        engine, missed = Orders(), []
        scheduler = loadmanager.Scheduler(
            config, store, engine, lambda _, why, missed=missed: missed.append(why)
        )
        made = loadmanager.read_schedule(
            {"cron": "* * * * *", "concurrencyPolicy": policy, "test": create_body()}, ()
        )
        scheduler._fire(loadmanager.replace(made, id="s", last_run_id="r1", deadline_s=1e12), 60.0)
        assert engine.seen == orders, policy
        assert bool(missed) == (policy == "Forbid")
    store.close()


def test_schedules_are_changed_paused_run_and_deleted(lm):
    made = schedule(lm, cron="0 2 * * mon-fri", timezone="Europe/Berlin")
    assert all(
        datetime.datetime.fromisoformat(at.replace("Z", "+00:00"))
        .astimezone(ZoneInfo("Europe/Berlin"))
        .strftime("%H:%M")
        == "02:00"
        for at in made["next"]
    )
    path = f"/v1/schedules/{made['id']}"
    paused = lm.request("PATCH", path, {"paused": True}).json
    assert (paused["paused"], paused["next"], paused["cron"]) == (True, [], "0 2 * * mon-fri")
    assert (
        lm.request("PATCH", path, {"paused": False, "timezone": "Asia/Kolkata"}).json["next"] != made["next"]
    )
    started = lm.post(f"{path}/run")
    assert (started.status, started.json["source"]) == (201, "schedule")
    lm.restart()
    kept = lm.get("/v1/schedules").json
    assert [one["id"] for one in kept] == [made["id"]] and kept[0]["timezone"] == "Asia/Kolkata"
    assert lm.request("DELETE", path).status == 204
    assert lm.get(path).status == 404 and lm.get("/v1/schedules").json == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cron": "* * * *"}, "cron"), ({"cron": None}, "cron"), ({"runAt": "2027-01-01T00:00:00Z"}, "cron"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"timezone": "../../etc/passwd"}, "timezone"), ({"concurrencyPolicy": "Maybe"}, "concurrencyPolicy"),
        ({"startingDeadlineSeconds": 0}, "startingDeadlineSeconds"),
        ({"test": {}}, "test.tenantId"), ({"test": create_body(targetUsers=0)}, "test.targetUsers"),
        ({"test": []}, "test"), ({"colour": 1}, "colour"), ({"paused": "yes"}, "paused"),
        ({"cron": None, "runAt": "1970-01-01T00:00:01Z"}, "runAt"),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_refused(lm, change, field):
    body = {"cron": "@daily", "test": create_body(), **change}
    refused = lm.post("/v1/schedules", body)
    assert refused.status == 400 and field in refused.json["fields"], refused.body


def test_schedules_of_the_configuration_run_and_are_changed_there(load_manager, fake):
    lm = load_manager(
        cluster_config(fake.url),
        schedules=[{"id": "nightly", "runAt": in_seconds(2), "test": create_body(durationSeconds=5)}],
    )
    [shown] = lm.get("/v1/schedules").json
    assert (shown["id"], shown["readOnly"]) == ("nightly", True)
    assert lm.request("PATCH", "/v1/schedules/nightly", {"paused": True}).status == 409
    assert lm.request("DELETE", "/v1/schedules/nightly").status == 409
    eventually(lambda: runs_of(lm), 8, what="the run of the configured schedule")
    lm.restart()
    holds_for(lambda: len(runs_of(lm)) == 1, 1.5)


def test_a_wrong_schedule_in_the_configuration_is_a_refusal_to_start(tmp_path):
    path = tmp_path / "config.json"
    entry = {"id": "a", "cron": "61 * * * *", "test": {"tenantId": "acme"}}
    path.write_text(
        json.dumps({"security": {"apiToken": "a", "locustCallbackToken": "b"}, "schedules": [entry]})
    )
    checked = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "check", "-config", str(path)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert checked.returncode == 2 and "schedules[0].cron: minute '61': must be 0 to 59" in checked.stderr, (
        checked.stderr
    )


def test_schedules_on_the_command_line(lm):
    def cli(*words):
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "loadmanager.py"),
                "schedules",
                *words,
                "--url",
                lm.url,
                "--token",
                API_TOKEN,
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = json.loads(
        cli(
            "create",
            "--cron",
            "@daily",
            "--timezone",
            "Europe/Berlin",
            "--tenant",
            "acme",
            "--env",
            "dev",
            "--scenario",
            "browse",
            "-u",
            "5",
            "-r",
            "5",
            "--json",
        )
    )
    assert made["id"] in cli() and "@daily Europe/Berlin" in cli("list")
    cli("pause", made["id"])
    assert "paused" in cli()
    cli("resume", made["id"])
    assert "started" in cli("run", made["id"])
    cli("delete", made["id"])
    assert made["id"] not in cli()


def scheduler_of(tmp_path, *schedules, engine=None):
    """A scheduler that was not started, with these schedules, and its store."""
    store = loadmanager.Store(loadmanager.open_database("memory:", str(tmp_path)))
    for made in schedules:
        store.schedules.keep(made.id, loadmanager.schedule_to_record(made))
    scheduler = loadmanager.Scheduler(loadmanager.Config(), store, engine, lambda schedule, why: None)
    for made in schedules:
        scheduler._put(made)
    return scheduler, store


def made_schedule(id_="s", **more):
    made = loadmanager.read_schedule({"test": create_body(), **more}, ())
    return loadmanager.replace(made, id=id_, created_at=time.time())


def test_a_rare_day_is_found_by_months(monkeypatch):
    """29 February: eight years are 97 months, of which eight are looked into, and not 2,923 days."""
    looked_at = []
    takes_day = loadmanager.Cron.takes_day
    monkeypatch.setattr(
        loadmanager.Cron, "takes_day", lambda cron, day: looked_at.append(day) or takes_day(cron, day)
    )
    start = datetime.datetime(2097, 1, 1, tzinfo=UTC).timestamp()  # 2100 is no leap year
    found = loadmanager.next_times(loadmanager.parse_cron("0 0 29 2 *"), UTC, start, 5)
    years = [datetime.datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d") for at in found]
    assert years == ["2104-02-29", "2108-02-29", "2112-02-29", "2116-02-29", "2120-02-29"]
    assert len(looked_at) < 24 * 31, f"{len(looked_at)} days were looked at"


def test_next_times_are_computed_once_and_again_when_one_has_come_or_it_changes(tmp_path, monkeypatch):
    computed = []
    next_times = loadmanager.next_times
    monkeypatch.setattr(loadmanager, "next_times", lambda *how: computed.append(how) or next_times(*how))
    scheduler, store = scheduler_of(tmp_path, made_schedule(cron="0 0 29 2 *"))
    first = scheduler.to_json(scheduler.get("s"))
    assert len(first["next"]) == 5
    computed.clear()
    assert scheduler.to_json(scheduler.get("s")) == first and not computed, "a list computed them again"
    scheduler.change("s", {"cron": "@hourly"})
    changed = scheduler.to_json(scheduler.get("s"))
    assert computed and changed["next"] != first["next"]
    computed.clear()
    an_hour_later = time.time() + 3600
    monkeypatch.setattr(loadmanager.time, "time", lambda: an_hour_later)
    assert scheduler.to_json(scheduler.get("s"))["next"][0] == changed["next"][1] and computed
    store.close()


def test_a_schedule_deleted_during_a_change_does_not_come_back(tmp_path, monkeypatch):
    scheduler, store = scheduler_of(tmp_path, made_schedule(cron="@daily"))
    read_schedule, deleting = (
        loadmanager.read_schedule,
        threading.Thread(target=scheduler.delete, args=("s",)),
    )

    def read_slowly(*how):
        changed = read_schedule(*how)
        deleting.start()
        deleting.join(0.5)  # it comes in between, or has to wait until the change is over
        return changed

    monkeypatch.setattr(loadmanager, "read_schedule", read_slowly)
    try:
        scheduler.change("s", {"description": "changed"})
    except loadmanager.NotFound:
        pass  # the delete was first
    deleting.join(10)
    assert not deleting.is_alive() and scheduler.list() == []
    kept = store._writer.read(lambda database: database.query("SELECT id FROM schedules"))
    assert kept == [], "it would be back after a restart"
    store.close()


def test_a_schedule_deleted_while_its_run_starts_does_not_come_back(tmp_path):
    class Orders:
        def create(self, *how):
            scheduler.delete("s")
            raise loadmanager.Conflict("busy")

    scheduler, store = scheduler_of(tmp_path, made_schedule(cron="* * * * *"), engine=Orders())
    scheduler._fire(scheduler.get("s"), time.time())
    assert scheduler.list() == []
    store.close()


def test_an_unforeseen_exception_costs_one_time_of_one_schedule(tmp_path, capsys, monkeypatch):
    """It is logged with its trace and counted; the schedule has its next time, and the others go on."""

    class Orders:
        started = []

        def create(self, request, by, *how):
            self.started.append(by)
            raise ZeroDivisionError("nobody named it")

    engine = Orders()
    due = time.time() - 1
    at = loadmanager.utc_text(due)
    one, other = made_schedule("one", runAt=at), made_schedule("other", runAt=at)
    broken, latest_due = made_schedule("broken", runAt=at), loadmanager.latest_due

    def fail_for_one(schedule, now):
        return 1 // 0 if schedule.id == "broken" else latest_due(schedule, now)

    monkeypatch.setattr(loadmanager, "latest_due", fail_for_one)
    scheduler, store = scheduler_of(tmp_path, one, broken, other, engine=engine)
    scheduler.start()
    outcomes = eventually(
        lambda: (lambda told: all(told) and told)(
            [scheduler.get(id_).last_outcome for id_ in ("one", "other")]
        ),
        10,
    )
    assert all("an error of Load Manager itself" in outcome for outcome in outcomes)
    assert sorted(engine.started) == ["schedule one", "schedule other"]
    assert scheduler.failures >= 3
    told = capsys.readouterr().err
    assert "nobody named it" in told and "schedule=broken" in told and "trace=" in told
    scheduler.close()
    store.close()


def test_no_thread_to_be_had_delays_a_schedule_and_does_not_lose_it(tmp_path, monkeypatch):
    class Orders:
        started = []

        def create(self, request, by, *how):
            self.started.append(by)
            raise loadmanager.Conflict("busy")

    engine, failing = Orders(), [2]
    start_thread = loadmanager.start_thread

    def start_or_not(name, work):
        if name.startswith("schedule-") and failing[0]:
            failing[0] -= 1
            raise RuntimeError("can't start new thread")
        return start_thread(name, work)

    monkeypatch.setattr(loadmanager, "start_thread", start_or_not)
    at = loadmanager.utc_text(time.time() - 1)
    scheduler, store = scheduler_of(tmp_path, made_schedule("one", runAt=at), engine=engine)
    scheduler.start()
    eventually(lambda: engine.started == ["schedule one"], 10)
    assert failing == [0] and scheduler.failures == 2
    scheduler.close()
    store.close()


SET_CLOCK = """
import os, time
real = time.time
def moved():
    try:
        with open(os.environ["CLOCK_FILE"]) as file:
            return real() + float(file.read() or 0)
    except OSError:
        return real()
time.time = moved
"""


def test_a_clock_set_back_by_an_hour_silences_no_schedule_and_repeats_none(load_manager, fake, tmp_path):
    """A minutely schedule goes on within its minute; a nightly one whose time comes again does not start
    twice."""
    (tmp_path / "sitecustomize.py").write_text(SET_CLOCK)
    clock = tmp_path / "clock"

    def set_clock(text):
        """The server's clock shows that time now."""
        (tmp_path / "new").write_text(str(loadmanager.parse_utc(text) - time.time()))
        (tmp_path / "new").replace(clock)

    set_clock("2027-03-03T11:59:55Z")
    lm = load_manager(
        cluster_config(fake.url),
        environment={"PYTHONPATH": str(tmp_path), "CLOCK_FILE": str(clock)},
        schedules=[
            {"id": "minutely", "cron": "* * * * *", "test": create_body(durationSeconds=1),
                "concurrencyPolicy": "Queue"},
            {"id": "nightly", "cron": "0 12 * * *", "test": create_body(durationSeconds=1),
                "concurrencyPolicy": "Queue"},
        ],
    )  # fmt: skip

    def starts(id_):
        return sum(run["createdBy"] == f"schedule {id_}" for run in runs_of(lm))

    def shown(id_):
        return next(one for one in lm.get("/v1/schedules").json if one["id"] == id_)

    def started_at(id_, text):
        """The id of its run, once the schedule has dealt with that time."""
        one = shown(id_)
        assert one.get("lastTime", "") != text or one["lastOutcome"] == "started", one
        return one.get("lastRunId") if one.get("lastTime") == text else None

    noon = "2027-03-03T12:00:00.000Z"
    first = eventually(lambda: started_at("minutely", noon), 20)
    eventually(lambda: started_at("nightly", noon), 10)
    set_clock("2027-03-03T11:00:05Z")
    eventually(lambda: "the clock was set back" in lm.log(), 10)
    holds_for(lambda: starts("minutely") == 1, 1)
    set_clock("2027-03-03T11:01:01Z")
    eventually(lambda: started_at("minutely", "2027-03-03T11:01:00.000Z"), 10, what="it goes on")
    set_clock("2027-03-03T11:59:58Z")
    second = eventually(
        lambda: shown("minutely").get("lastTime") == noon and started_at("minutely", noon), 20
    )
    assert second != first, "12:00 came twice, an hour apart: that is two times"
    holds_for(lambda: starts("nightly") == 1, 2, what="the nightly schedule starts once")
    assert shown("nightly")["next"][0] == "2027-03-04T12:00:00.000Z"
    lm.restart()
    assert shown("nightly")["next"][0] == "2027-03-04T12:00:00.000Z"


@pytest.mark.parametrize(
    ("cron", "taken", "now", "set_back_s", "next_"),
    [
        ("* * * * *", "12:00:00", "11:59:57", 5, "12:01:00"),  # within its minute: 12:00 is not another one
        ("* * * * *", "12:00:00", "11:00:02", 3600, "11:01:00"),
        ("0 * * * *", "12:00:00", "11:30:00", 3600, "12:00:00"),  # an hour of truth after the first 12:00
        ("0 * * * *", "12:00:00", "11:58:00", 300, "13:00:00"),
        ("0 9-12 * * *", "12:00:00", "11:30:00", 3600, "09:00:00"),  # tomorrow
        ("* * * * *", "12:00:00", "11:00:20", None, "11:01:00"),  # it was set back while we were away
    ],
)
def test_the_next_time_after_a_clock_was_set_back_is_an_interval_after_the_last(
    cron, taken, now, set_back_s, next_
):
    def at(text):
        return loadmanager.parse_utc(f"2027-03-03T{text}Z")

    before = loadmanager.replace(made_schedule(cron=cron), created_at=at("00:00:00"), taken_at=at(taken))
    settled = loadmanager.after_set_back(before, at(now), set_back_s)
    assert loadmanager.utc_text(settled.next_after(at(now))[0])[11:19] == next_
