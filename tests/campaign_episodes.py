"""The episodes of a campaign: each brings some faults together in a world of its own, at chosen points.

World.judge() at the end heals, waits for quiet and looks at every invariant."""

from __future__ import annotations

import functools
import sqlite3
import time
from collections.abc import Callable

import fake_locust as faults
from campaign import FINAL, LOST_AFTER_S, UNAVAILABLE, World
from conftest import create_body
from waiting import eventually

Episode = Callable[[str], World]
EPISODES: dict[str, Episode] = {}
BRIEF: list[str] = []  # those of `make test`


def episode(is_brief: bool = False) -> Callable[[Callable[[str], World]], Callable[[str], World]]:
    """Add a function to the table; its name is the episode's."""

    def add(function: Callable[[str], World]) -> Callable[[str], World]:
        EPISODES[function.__name__] = function
        if is_brief:
            BRIEF.append(function.__name__)
        return function

    return add


STATE_PATHS = ("/loadmanager/state", "/stats/requests")
FAULTS = (faults.answer_500, faults.close_silently, faults.answer_garbage, faults.hang)


def slow_states(world: World, low: float, high: float) -> None:
    for fake in world.fakes:
        for path in STATE_PATHS:
            fake.delays[path, "before"] = world.between(low, high)
    world.fault("slow state of the masters")


# ---- who has which cluster ---------------------------------------------------------


@episode(is_brief=True)
def queued_runs_and_clusters_that_become_free_together(seed: str) -> World:
    world = World("queue", seed, hooks=[True, True, False])
    with world:
        slow_states(world, 0.2, 0.7)
        world.start_watcher()
        for _ in range(2):
            first = [world.create(durationSeconds=None) for _ in world.fakes]
            for _ in range(world.chance.randint(1, 3)):
                world.create(queue=True, durationSeconds=2)
            for run_id in first:
                if run_id:
                    world.fault("stops at the same time")
                    world.start(functools.partial(world.stop, run_id))
            world.wait(world.between(2, 5))
        world.judge()
    return world


@episode()
def many_clients(seed: str) -> World:
    """No fault but other clients."""
    world = World("clients", seed, masters=3)
    with world:
        slow_states(world, 0, 0.3)
        world.start_watcher()
        world.start_clients(5)
        world.fault("clients against each other")
        world.wait(12)
        world.judge()
    return world


@episode()
def a_lost_cluster_comes_back_to_new_runs(seed: str) -> World:
    world = World("lost", seed, masters=2)
    with world:
        world.start_watcher()
        lost = world.create(durationSeconds=None) or ""
        fake = next((fake for fake in world.fakes if fake.load), world.fakes[0])
        with world.disturbance():
            fake.cut_off(world.chance.choice([faults.close_silently, faults.answer_500]))
            world.fault("master lost", fake.name)
            within_s = LOST_AFTER_S + 15
            eventually(
                lambda: world.run(lost)["status"] in FINAL, within_s, 0.2, "a silent cluster's run ends"
            )
            world.wait(world.between(0, 2))
            for path in STATE_PATHS:
                fake.delays[path, "before"] = world.between(0, 1)
            fake.faults.clear()
            fake.is_cut_off = False
        for _ in range(4):  # right when the clean-up comes
            world.create(durationSeconds=world.chance.choice([3, 5]), queue=world.chance.random() < 0.5)
            world.wait(world.between(0, 1))
        if world.chance.random() < 0.5:
            world.kill(why="while cleaning up")
        world.wait(5)
        world.judge()
    return world


@episode(is_brief=True)
def a_lost_run_is_deleted_before_its_clean_up(seed: str) -> World:
    world = World("deleted", seed, masters=2)
    with world:
        lost = world.create(durationSeconds=world.chance.choice([None, 40])) or ""
        fake = next((fake for fake in world.fakes if fake.load), world.fakes[0])
        world.wait(world.chance.choice([0.0, 2.5]))
        fake.cut_off(faults.close_silently)
        world.fault("master lost", fake.name)
        eventually(
            lambda: world.run(lost)["status"] in FINAL, LOST_AFTER_S + 15, 0.2, "a silent cluster's run ends"
        )
        world.fault("delete before the clean-up")
        world.delete(lost)
        if world.chance.random() < 0.7:
            world.kill(world.between(0, 1), "after the delete")
            world.manager.is_up.wait(20)
            world.wait(1)
        world.judge()
    return world


@episode()
def a_users_own_tests_on_the_masters(seed: str) -> World:
    world = World("strangers", seed, hooks=[True, True])
    with world:
        world.start_watcher()
        world.start_clients(3)
        for _ in range(5):
            fake = world.a_fake()
            fake.start_strangers_test()
            world.fault("a test of somebody else", fake.name)
            if world.chance.random() < 0.3:
                world.kill(world.between(0, 1))
            world.wait(world.between(1, 3))
            fake.end_strangers_test()
        world.judge()
    return world


# ---- kills at chosen points ---------------------------------------------------------


@episode(is_brief=True)
def killed_inside_swarm(seed: str) -> World:
    world = World("swarm", seed, hooks=[True, False])
    with world:
        world.start_watcher()
        for _ in range(3):
            fake, when = world.a_fake(), world.chance.choice(["before", "after"])
            slow_s = world.chance.choice([0.0, world.between(0, 1), world.between(1, 4)])
            back_s = world.chance.choice([0.0, 0.0, world.between(0, 2)])
            why = f"{when} {fake.name} took /swarm, which takes {slow_s:.1f} s"
            fake.points["/swarm", when] = functools.partial(world.kill, back_s, why)
            fake.delays["/swarm", when] = slow_s
            for _ in world.fakes:
                world.create(durationSeconds=world.chance.choice([4, 30, 30, None]))
            world.wait(world.between(0, 2))
            world.manager.is_up.wait(20)
            fake.delays.clear()
            for run in world.active():
                world.start(functools.partial(world.stop, run["id"]))
            world.wait(world.between(1, 3))
        world.judge()
    return world


@episode()
def killed_inside_stop(seed: str) -> World:
    world = World("stop", seed, hooks=[True, False])
    with world:
        world.start_watcher(0.1)
        for _ in range(3):
            fake, when = world.a_fake(), world.chance.choice(["before", "after"])
            fake.stop_takes_s = world.between(0.1, 1.2)
            kill = functools.partial(
                world.kill, world.chance.choice([0.0, 1.0]), f"{when} /stop of {fake.name}"
            )
            fake.points["/stop", when] = kill
            fake.delays["/stop", when] = world.between(0, 1)
            for _ in world.fakes:
                world.create(durationSeconds=2)
            world.wait(2.2)
            for run in world.active():
                if world.chance.random() < 0.5:
                    world.start(functools.partial(world.stop, run["id"]))
            world.wait(world.between(1, 3))
            world.manager.is_up.wait(20)
            fake.delays.clear()
        world.judge()
    return world


@episode()
def killed_inside_the_final_read(seed: str) -> World:
    world = World("final", seed, hooks=[True, False])
    with world:
        world.start_watcher(0.1)
        for _ in range(2):
            fake = world.a_fake()
            path = world.chance.choice(
                ["/stats/requests/csv", "/stats/failures/csv", "/stats/report", "/exceptions"]
            )
            fake.points[path, "before"] = functools.partial(world.kill, 0.0, f"inside {path} of {fake.name}")
            for _ in world.fakes:
                world.create(durationSeconds=1)
            world.wait(world.between(5, 7))
            world.manager.is_up.wait(20)
        world.judge()
    return world


@episode()
def killed_between_commits_of_a_slow_database(seed: str) -> World:
    world = World("commits", seed, hooks=[True, False])
    with world:
        world.start_watcher(0.05)
        for _ in range(3):
            slow_s = world.chance.choice([0.0, 0.05, 0.2])
            when, skip = world.chance.choice(["before", "after"]), world.chance.randint(2, 14)
            word = world.chance.choice(["COMMIT", "BEGIN"])
            world.expect_death(0.0)
            with world.disturbance():
                world.fault("slow database", f"{slow_s} s a statement; kill {when} {word} number {skip}")
                world.inside(do="database", slow_s=slow_s, kill_at=word, when=when, skip=skip)
                for _ in world.fakes:
                    world.start(functools.partial(world.create, durationSeconds=1, queue=True))
                world.wait(1.0)
                for run in world.active():
                    if world.chance.random() < 0.5:
                        world.start(functools.partial(world.stop, run["id"]))
                world.wait(world.between(4, 6))
                world.manager.is_up.wait(20)
                world.inside(do="clear")
        world.judge()
    return world


# ---- what a polled Locust may say ----------------------------------------------------

ODD_NUMBERS = (2**63, 2**63 - 1, 2**64, 10**400, -5, float("nan"), float("inf"), -(2**63) - 1)
ODD_TEXTS = (
    "\ud800 alone",
    "x" * 200_000,
    "a\rb",
    "nul \x00 byte",
    "\N{PILE OF POO}" * 300,
    '"; DROP TABLE runs; --',
)
ODD_KINDS = ("total", "row", "name", "failures", "csv", "state", "worker")
ODD_NUMBER_KEYS = ("num_requests", "num_failures", "avg_response_time", "median_response_time", "current_rps")


@episode(is_brief=True)
def odd_numbers_and_texts_in_polled_answers(seed: str) -> World:
    world = World("odd", seed, hooks=[False, True])
    with world:
        world.start_watcher()
        world.create(durationSeconds=6)
        world.create(durationSeconds=6)
        world.wait(1.0)
        for fake in world.fakes:
            for kind in world.chance.sample(ODD_KINDS, 2):
                text, number = world.chance.choice(ODD_TEXTS), world.chance.choice(ODD_NUMBERS)
                world.fault(f"odd {kind}", f"{fake.name} {text[:12]!r} {str(number)[:24]}")
                say_odd(world, fake, kind, text, number)
        world.wait(3)
        world.check_it_still_works()
        world.wait(3)
        world.judge()
    return world


def say_odd(world: World, fake: faults.FakeLocust, kind: str, text: str, number: float) -> None:
    """From now on one part of the master's answers is odd."""
    row_key = world.chance.choice(ODD_NUMBER_KEYS)
    if kind == "total":
        fake.stats_changes[row_key] = number
    elif kind == "row":
        fake.top_changes["stats"] = [
            {**fake._row("GET", "/x", 1), row_key: number},
            fake._row("", "Aggregated", 1),
        ]
    elif kind == "name":
        fake.endpoints = [("GET", text), ("", "Aggregated"), ("GET", "/x")]
    elif kind == "failures":
        error = {"method": "GET", "name": text, "error": text, "occurrences": number, "first_seen": number}
        fake.top_changes["errors"] = [error]
    elif kind == "csv":
        fake.failures_csv = f'Method,Name,Error,Occurrences\r\nGET,/x,"{text}",{number}\r\nGET,/y,a\rb,1\r\n'
    elif kind == "state":
        fake.top_changes["user_count"] = number
    elif kind == "worker":
        fake.top_changes["workers"] = [
            {"id": text, "state": "running", "user_count": number, "cpu_usage": number}
        ]


@episode()
def counters_that_go_back_and_masters_that_restart(seed: str) -> World:
    world = World("back", seed, masters=2)
    with world:
        world.start_watcher()
        for _ in range(3):
            world.create(durationSeconds=4)
            world.create(durationSeconds=4)
            world.wait(world.between(1, 3))
            fake = world.a_fake()
            if world.chance.random() < 0.5:
                world.fault("counters go back", fake.name)
                fake.odd_requests = world.chance.choice([0, 1, 17])
            else:
                world.fault("master restarted", fake.name)
                fake.restart()
            world.wait(world.between(1, 4))
            fake.odd_requests = None
        world.judge()
    return world


@episode()
def a_master_one_of_whose_answers_always_fails(seed: str) -> World:
    """Whatever it is that fails for good, a run ends and its load with it."""
    world = World("failing", seed, hooks=[True, False])
    with world:
        world.start_watcher()
        for _ in world.fakes:
            world.create(durationSeconds=3)
        world.wait(2.5)
        for fake in world.fakes:
            path = world.chance.choice(
                ["/stats/requests", "/stats/requests/csv", "/loadmanager/state", "/exceptions"]
            )
            fault = world.chance.choice([faults.answer_500, faults.close_silently, faults.answer_garbage])
            fake.faults[path] = fault
            world.fault(f"{fault.__name__} for good", f"{fake.name} {path}")
        world.wait(2)
        world.checked["a run ends although a part of its master's answers fail"] += 1
        try:
            eventually(lambda: not world.active(), LOST_AFTER_S + 30, 0.5)
        except AssertionError:
            told = [(run["id"][:8], run["status"], run.get("locustClusterId")) for run in world.active()]
            world.broken.append(f"runs do not end while one answer of their master fails: {told}")
        world.judge()
    return world


# ---- the process and its machine ------------------------------------------------------


@episode()
def frozen_for_longer_than_the_patience(seed: str) -> World:
    """One failed call right after a pause is no silence of a cluster."""
    world = World("frozen", seed, masters=2)
    with world:
        runs = [world.create(durationSeconds=40) for _ in world.fakes]
        world.wait(2.5)
        with world.disturbance():
            for fake in world.fakes:
                for path in STATE_PATHS:
                    fake.faults[path] = faults.fail_times(
                        world.chance.choice([1, 1, 2]), faults.close_silently
                    )
            world.fault("one failed call after a pause")
            world.freeze(LOST_AFTER_S + world.between(0.5, 2))
        world.wait(3)
        world.checked["a pause of ours loses no run"] += 1
        for run_id in filter(None, runs):
            run = world.run(run_id)
            if run["status"] != "Running":
                world.broken.append(
                    f"run {run_id[:8]} is {run['status']} after a pause: {run.get('failureReason')}"
                )
            world.start(functools.partial(world.stop, run_id))
        world.wait(2)
        world.judge()
    return world


@episode()
def no_threads_to_be_had(seed: str) -> World:
    world = World("threads", seed, masters=3)
    with world:
        world.start_watcher()
        for _ in world.fakes:
            world.create(durationSeconds=world.chance.choice([3, 3, 4]))
        world.wait(1)
        with world.disturbance():
            spare = world.chance.choice([0, 0, 1, 2])
            world.fault("no more threads", f"{spare} spare")
            world.inside(do="limit", what="threads", spare=spare)
            for _ in range(4):
                world.start(functools.partial(world.create, durationSeconds=2))
            world.wait(world.between(3, 6))
            world.inside(do="limit", what="threads", spare=None)
        world.unforeseen = True  # a request may be answered 500 while there is no thread for it
        world.judge()
    return world


@episode()
def no_descriptors_to_be_had(seed: str) -> World:
    """Connections that say nothing take every descriptor; deadlines come all the same."""
    world = World("descriptors", seed, masters=2)
    with world:
        runs = [world.create(durationSeconds=4) for _ in world.fakes]
        world.wait(1)
        world.inside(do="limit", what="descriptors", spare=world.chance.choice([4, 8, 16]))
        world.fault("idle connections take all descriptors")
        idle = []
        for _ in range(100):
            try:
                idle.append(world.manager.connect())
            except OSError:
                break
        world.wait(9)
        world.checked["stopped in time without descriptors for callers"] += 1
        for run_id, fake in zip(runs, world.fakes, strict=True):
            if run_id and fake.load:
                world.broken.append(f"the load of {fake.load} goes on while callers hold all descriptors")
        for sock in idle:
            sock.close()
        world.inside(do="limit", what="descriptors", spare=None)
        world.judge()
    return world


@episode()
def a_database_that_refuses(seed: str) -> World:
    world = World("database", seed, masters=2)
    with world:
        world.start_watcher()
        world.create(durationSeconds=3)
        world.wait(0.5)
        kind = world.chance.choice(["full", "locked", "disk I/O"])
        with world.disturbance():
            world.fault(f"database {kind}")
            if kind == "locked":
                lock_database(world, world.between(7, 9))
            else:
                words = {"full": "database or disk is full", "disk I/O": "disk I/O error"}[kind]
                world.inside(do="database", error=words)
                world.start(functools.partial(world.create, durationSeconds=2))
                world.wait(4)
                world.check_health_knows()
                world.inside(do="clear")
        world.judge()
    return world


def lock_database(world: World, seconds: float) -> None:
    """Another process's transaction, for so long."""
    other = sqlite3.connect(world.folder / "runs.db", isolation_level=None, timeout=5)
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        world.note("the database is held by Load Manager alone")
        return
    world.start(functools.partial(world.create, durationSeconds=2))
    world.wait(seconds)
    world.check_health_knows()
    other.execute("ROLLBACK")
    other.close()


@episode()
def the_database_vanishes(seed: str) -> World:
    """What is answered 201 after its file is gone must be there after a restart, or not be answered so."""
    world = World("vanished", seed, masters=2)
    with world:
        world.create(durationSeconds=1)
        world.wait(1)
        for path in world.folder.glob("runs.db*"):
            path.unlink()
        world.fault("database deleted")
        before = set(world._accepted)
        world.create(durationSeconds=1, with_key=False)
        world.wait(2)
        is_known = world.health() != 200
        accepted = world._accepted - before
        world._accepted -= before  # they were in the file that somebody deleted
        world.checked["a deleted database is no place to answer 201 from"] += 1
        if accepted and not is_known:
            world.note("201 and healthy with a deleted database: the restart tells")
        if is_known:
            world.note("/health says that the database is gone")
            world._expects_unhealthy = True
        world.judge()
    return world


# ---- exceptions nobody foresaw ---------------------------------------------------------


@episode()
def exceptions_in_every_thread(seed: str) -> World:
    """First it is seen which function runs in which thread, then some of them raise."""
    world = World("unforeseen", seed, masters=2)
    with world:
        world.unforeseen = True
        world.inside(do="observe")
        now = time.time()
        schedule(world, now + 2)
        world.start_watcher(0.5)
        run_id = world.create(durationSeconds=2)
        world.create(durationSeconds=2)
        world.create(durationSeconds=1, queue=True)
        if run_id:
            world.start(functools.partial(world.stop, run_id))
        eventually(lambda: not world.active(), 30, 0.3, "the first runs end")
        places = [tuple(place) for place in world.inside(do="observed") or ()]
        world.note(f"{len(places)} places in {len({thread for thread, _ in places})} threads")
        for _ in range(3):
            threads = sorted({thread for thread, _ in places} - {"campaign", "MainThread"})
            for thread in world.chance.sample(threads, min(3, len(threads))):
                function = world.chance.choice([name for kind, name in places if kind == thread])
                when = world.chance.choice(["before", "before", "after"])
                world.fault(f"exception in {thread}", f"{when} {function}")
                world.inside(
                    do="raise", thread=thread, function=function, when=when, skip=world.chance.randint(0, 3)
                )
            if world.chance.random() < 0.5:
                schedule(world, time.time() + 1)
            for _ in range(3):
                world.start(functools.partial(world.create, durationSeconds=2, queue=True))
            world.wait(world.between(3, 5))
            for run in world.active():
                if world.chance.random() < 0.4:
                    world.start(functools.partial(world.stop, run["id"]))
        world.wait(1)
        for line in world.inside(do="hits") or ():
            world.note(f"hit: {line}")
        world.judge()
    return world


def schedule(world: World, at: float) -> None:
    """A run by a schedule, once."""
    scenario = f"scheduled-{len(world._scheduled)}"
    world._scheduled.add(scenario)
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at + 1))
    test = create_body(scenarioId=scenario, targetUsers=10, spawnRate=100, durationSeconds=1)
    body = {
        "runAt": text,
        "concurrencyPolicy": world.chance.choice(["Forbid", "Queue", "Replace"]),
        "test": test,
    }
    try:
        answer = world.ask("POST", "/v1/schedules", body)
        world.note(f"schedule {scenario} at {text}: {answer.status}")
    except UNAVAILABLE:
        world.note(f"schedule {scenario}: no answer")


@episode()
def schedules_and_kills(seed: str) -> World:
    """A schedule that fires starts one run, whatever is killed around it."""
    world = World("schedules", seed, masters=3)
    with world:
        world.start_watcher()
        for _ in range(3):
            for _ in range(world.chance.randint(1, 3)):
                schedule(world, time.time() + world.between(0.5, 2))
            world.wait(world.between(1, 2.5))
            if world.chance.random() < 0.7:
                world.kill(world.chance.choice([0.0, 2.0]), "while schedules fire")
            world.wait(2)
            world.manager.is_up.wait(20)
        world.wait(3)
        world.check_schedules()
        world.judge()
    return world


# ---- everything at once ----------------------------------------------------------------


@episode()
def storm(seed: str) -> World:
    world = World("storm", seed, masters=3)
    with world:
        world.start_watcher()
        world.start_clients(4)
        end = time.monotonic() + 15
        while time.monotonic() < end:
            disturb(world)
            world.wait(world.between(0.2, 1.5))
        world.judge()
    return world


def disturb(world: World) -> None:
    """One fault of any kind."""
    what, fake = world.chance.random(), world.a_fake()
    if what < 0.2:
        world.kill(world.chance.choice([0.0, 0.0, world.between(0, 1.5)]), "at random")
    elif what < 0.35:
        path, when = world.chance.choice(
            [("/swarm", "before"), ("/swarm", "after"), ("/stop", "before"), ("/stop", "after")]
        )
        fake.points[path, when] = functools.partial(world.kill, 0.0, f"{when} {path} of {fake.name}")
    elif what < 0.65:
        path = world.chance.choice(
            ["/swarm", "/stop", "/stats/requests", "/loadmanager/state", "/stats/requests/csv"]
        )
        fault = world.chance.choice(FAULTS)
        fake.faults[path] = fault
        world.fault(fault.__name__, f"{fake.name} {path}")
        world.start(functools.partial(clear_later, world, fake, world.between(0.5, 4)))
    elif what < 0.72:
        fake.restart()
        world.fault("master restarted", fake.name)
    elif what < 0.85:
        fake.delays[world.chance.choice(["/swarm", "/stop", *STATE_PATHS]), "before"] = world.between(0, 2)
        world.fault("slow master", fake.name)
        world.start(functools.partial(clear_later, world, fake, world.between(1, 4)))
    elif what < 0.93:
        with world.disturbance():
            world.fault("slow database")
            world.inside(do="database", slow_s=world.between(0.02, 0.2))
            world.wait(world.between(0.5, 2))
            world.inside(do="clear")
    else:
        schedule(world, time.time() + 1)


def clear_later(world: World, fake: faults.FakeLocust, seconds: float) -> None:
    with world.disturbance():
        world.wait(seconds)
        fake.faults.clear()
        fake.delays.clear()  # type: ignore[attr-defined]
        fake.released.set()
