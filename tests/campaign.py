"""What a campaign is made of: Load Manager with faults from within, masters, clients, and a judge.

with World("name", seed) as world: world.create(); world.kill(); ...   # an episode, see campaign_episodes.py
broken = world.judge()                                                 # [] when every invariant held"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from campaign_locust import CampaignLocust, Load
from conftest import (
    API_TOKEN,
    ROOT,
    Answer,
    LoadManager,
    assert_documented,
    base_config,
    cluster_config,
    create_body,
)
from waiting import eventually

FINAL = ("Finished", "Failed")
LOST_AFTER_S = 4
LEASE_S = 6
FREE_WITHIN_S = 20.0  # then each cluster takes a run: a clean-up of the last one may be going on
QUIET_WITHIN_S = 30.0  # after the last fault; 20 s, and room for a busy machine
NOTIFIED_WITHIN_S = 45.0  # a refused delivery is tried again after 1, 5 and 15 s
END_SLACK_S = 4.0  # a load may end so much after its deadline: /stop takes a second, the machine is busy
BACK_SLACK_S = 9.0  # or so much after the end of a fault that was in the way
UNAVAILABLE = (OSError, http.client.HTTPException, ValueError)


class FaultyManager(LoadManager):
    """Load Manager under campaign_server.py. `command(do=...)` talks to its inside."""

    def __init__(self, folder: Path, config: dict[str, Any], uid: int):
        self._control_path = str(folder / "control.sock")
        if os.getuid() == 0:
            os.chown(folder, uid, -1)
        environment = {"CAMPAIGN_CONTROL": self._control_path, "CAMPAIGN_UID": str(uid)}
        super().__init__(folder, config, environment)
        self._command = [self._command[0], str(ROOT / "tests" / "campaign_server.py")]
        self._control: Any = None
        self._control_lock = threading.Lock()
        self.is_up = threading.Event()

    def start(self, preexec: Callable[[], None] | None = None) -> FaultyManager:
        super().start(preexec)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self._control_path)
        self._control = sock.makefile("rw")
        self.is_up.set()
        return self

    def kill9(self) -> None:
        self.is_up.clear()
        super().kill9()

    def command(self, **command: Any) -> Any:
        with self._control_lock:
            self._control.write(json.dumps(command) + "\n")
            self._control.flush()
            answer = json.loads(self._control.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def ask(self, method: str, path: str, body: Any = None, timeout_s: float = 45, **headers: str) -> Answer:
        """One request, without a look at its schema."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        sent = {
            "Authorization": f"Bearer {API_TOKEN}",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        if body is not None:
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), sent)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


class Receiver:
    """A webhook's receiver that refuses a part of what it gets; `told` has the runs whose end it took."""

    def __init__(self, seed: str, refuses: float = 0.1):
        self.told: set[str] = set()
        receiver, chance = self, random.Random(seed)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                is_refused = chance.random() < refuses
                if not is_refused:
                    receiver.told.add(body["data"].get("id", ""))
                self.send_response(503 if is_refused else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class World:
    """One Load Manager, its masters, and everything that was seen of them."""

    def __init__(
        self, name: str, seed: str, masters: int = 2, hooks: list[bool] | None = None, **sections: Any
    ):
        self.name, self.seed = name, seed
        self.chance = random.Random(f"{name}/{seed}")
        self.began = time.monotonic()
        self.timeline: list[str] = []
        self.faults: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()
        self.broken: list[str] = []
        self.unforeseen = False  # exceptions were injected: a 500 may be
        self._lock, self._life = threading.Lock(), threading.RLock()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._disturbed: list[list[float]] = []  # begin and end of what may delay the end of a load
        self._asked: dict[str, set[str]] = {}  # scenario -> ids it was answered
        self._accepted: set[str] = set()  # ids of 201
        self._deleted: set[str] = set()
        self._stop_asked: set[str] = set()
        self._scheduled: set[str] = set()  # scenarios that schedules start
        self._finals: dict[str, tuple[str, float]] = {}
        self._started: dict[str, set[str]] = {}
        self._numbers: set[tuple[str, int]] = set()
        self._permanent: Counter[str] = Counter()
        self._expects_unhealthy = False  # the database is gone: 503 until a restart is right
        self.folder = Path(tempfile.mkdtemp(prefix=f"campaign-{name}-"))
        hooks = hooks if hooks is not None else [self.chance.random() < 0.6 for _ in range(masters)]
        self.receiver = Receiver(seed)
        self.fakes: list[CampaignLocust] = []
        for number, has_hooks in enumerate(hooks):
            fake = CampaignLocust(number, has_hooks, self.note, lambda: self.manager.url)
            self.fakes.append(fake)
            fake.start()
        self.manager = FaultyManager(
            self.folder, self._config(sections), 50000 + self.chance.randrange(10000)
        )

    def _config(self, sections: dict[str, Any]) -> dict[str, Any]:
        clusters = [cluster_config(fake.url, fake.name) for fake in self.fakes]
        rules = {
            "metricsPollIntervalSeconds": 0.5,
            "startTimeoutSeconds": 4,
            "lostAfterSeconds": LOST_AFTER_S,
            "leaseSeconds": LEASE_S,
        }
        hook = {"id": "hook", "type": "webhook", "url": self.receiver.url, "allowPrivateAddresses": True}
        return base_config(*clusters, **{"orchestrator": rules, "notifications": [hook], **sections})

    def __enter__(self) -> World:
        self.note(
            "hooks: " + ", ".join(f"{fake.name} {'yes' if fake.hooks else 'no'}" for fake in self.fakes)
        )
        self.manager.start()
        self._permanent = self._threads_that_stay()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self.manager.process and os.kill(self.manager.process.pid, signal.SIGCONT)
        self.manager.end()
        for fake in self.fakes:
            fake.close()
        self.receiver.close()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _threads_that_stay(self) -> Counter[str]:
        """Names of the threads that an idle server has, over a second."""
        seen = [Counter(self.manager.command(do="threads")) for _ in range(3) if not self._ended.wait(0.5)]
        return seen[0] & seen[1] & seen[2] if len(seen) == 3 else Counter()

    # ---- what is noted ----

    def note(self, text: str) -> None:
        with self._lock:
            self.timeline.append(f"{time.monotonic() - self.began:7.2f} {text}")

    def fault(self, kind: str, detail: str = "") -> None:
        self.faults[kind] += 1
        self.note(f"FAULT {kind} {detail}")

    @contextlib.contextmanager
    def disturbance(self) -> Iterator[None]:
        """While it lasts, and a little longer, loads may outlive their deadline."""
        with self._lock:
            span = [time.monotonic(), float("inf")]
            self._disturbed.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    def wait(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def between(self, low: float, high: float) -> float:
        return self.chance.uniform(low, high)

    def a_fake(self) -> CampaignLocust:
        return self.chance.choice(self.fakes)

    # ---- requests ----

    def ask(self, method: str, path: str, body: Any = None, **how: Any) -> Answer:
        answer = self.manager.ask(method, path, body, **how)
        self.checked["answers are no 500"] += 1
        if answer.status >= 500 and answer.status not in (502, 503, 504) and not self.unforeseen:
            self.broken.append(f"{method} {path} answered {answer.status}: {answer.body[:300]!r}")
        if len(answer.body) < 20_000 and not path.startswith("/v1/tests?"):
            try:
                assert_documented(method, path, answer)
            except Exception as error:  # noqa: BLE001 - the judge tells it
                if answer.status != 500:
                    self.broken.append(f"undocumented answer: {str(error)[:300]}")
        return answer

    def create(self, with_key: bool | None = None, **changes: Any) -> str | None:
        """A run with a scenario of its own; its id. With a key it is asked again when the answer is lost."""
        with self._lock:
            scenario = f"s{len(self._asked)}"
            self._asked[scenario] = set()
            with_key = self.chance.random() < 0.5 if with_key is None else with_key
        changes.setdefault("durationSeconds", self.chance.choice([1, 2, 3, 4]))
        body = create_body(scenarioId=scenario, targetUsers=10, spawnRate=100, **changes)
        body = {name: value for name, value in body.items() if value is not None}
        headers = {"Idempotency_Key": f"key-{scenario}"} if with_key else {}
        for _ in range(3 if with_key else 1):
            asked_at = time.monotonic()
            try:
                answer = self.ask("POST", "/v1/tests", body, **headers)
            except UNAVAILABLE as error:
                self.note(f"create {scenario}: no answer ({type(error).__name__})")
                self.manager.is_up.wait(15)
                continue
            run_id = answer.json.get("id") or answer.json.get("runId")
            told = run_id[:8] if run_id else answer.json.get("message")
            self.note(f"create {scenario}: {answer.status} {told}")
            if answer.status == 503 and with_key:
                self.wait(0.5)
                continue
            if run_id:
                self._asked[scenario].add(run_id)
            if answer.status in (200, 201):
                self._accepted.add(run_id)
                self.see(answer.json, asked_at)
            return run_id
        return None

    def stop(self, run_id: str) -> int | None:
        self._stop_asked.add(run_id)
        try:
            answer = self.ask("POST", f"/v1/tests/{run_id}/stop")
        except UNAVAILABLE:
            self.note(f"stop {run_id[:8]}: no answer")
            return None
        self.note(f"stop {run_id[:8]}: {answer.status}")
        return answer.status

    def delete(self, run_id: str) -> int | None:
        try:
            status = self.ask("DELETE", f"/v1/tests/{run_id}").status
        except UNAVAILABLE:
            self._deleted.add(run_id)  # perhaps
            return None
        self.note(f"delete {run_id[:8]}: {status}")
        if status in (200, 204):
            self._deleted.add(run_id)
        return status

    def runs(self) -> list[dict[str, Any]]:
        """All runs as they are listed now; every look is remembered."""
        asked_at = time.monotonic()
        answer = self.ask("GET", "/v1/tests?limit=1000")
        if answer.status != 200:
            return []
        for run in answer.json:
            self.see(run, asked_at)
        return answer.json

    def run(self, run_id: str) -> dict[str, Any]:
        asked_at = time.monotonic()
        answer = self.ask("GET", f"/v1/tests/{run_id}")
        if answer.status == 200:
            self.see(answer.json, asked_at)
        return answer.json

    def active(self) -> list[dict[str, Any]]:
        """Runs that are not final; none while Load Manager is away."""
        with contextlib.suppress(*UNAVAILABLE):
            return [run for run in self.runs() if run["status"] not in FINAL]
        return []

    def health(self) -> int:
        return self.ask("GET", "/health", timeout_s=10).status

    def see(self, run: dict[str, Any], asked_at: float) -> None:
        """Remember what was shown; a final run must stay the same in every byte."""
        run_id, text = run["id"], _final_text(run)
        with self._lock:
            if run.get("startedAt"):
                self._started.setdefault(run_id, set()).add(run["startedAt"])
            number = (run.get("lastMetrics") or {}).get("totalRequests")
            if number is not None:
                self._numbers.add((run_id, number))
            first = self._finals.get(run_id)
            if run["status"] in FINAL:
                if first is None:
                    self._finals[run_id] = text, time.monotonic()
                    why = run.get("failureReason") or run.get("stopReason")
                    self.timeline.append(
                        f"{time.monotonic() - self.began:7.2f} run {run_id[:8]} seen {run['status']}: {why}"
                    )
                elif first[0] != text:
                    self.broken.append(f"final run {run_id[:8]} changed: {_difference(first[0], text)}")
            elif first is not None and asked_at > first[1]:
                self.broken.append(f"final run {run_id[:8]} is {run['status']} again")

    # ---- clients ----

    def start(self, work: Callable[[], object], every_s: float = 0.0) -> None:
        """A thread that does it once, or again and again until the episode is over."""

        def loop() -> None:
            while not self._ended.is_set():
                try:
                    work()
                except UNAVAILABLE:
                    self.wait(0.1)  # Load Manager was killed just now
                except Exception as error:  # noqa: BLE001 - a bug of the campaign is no success
                    self.broken.append(f"the campaign itself: {error!r}")
                if not every_s or self._ended.wait(every_s):
                    return

        thread = threading.Thread(target=loop, daemon=True)
        self._threads.append(thread)
        thread.start()

    def start_watcher(self, every_s: float = 0.3) -> None:
        self.start(self.runs, every_s)

    def start_clients(self, count: int, **changes: Any) -> None:
        """Threads that create, stop and delete."""
        for number in range(count):
            chance = random.Random(f"{self.seed}/{number}")
            self.start(lambda chance=chance: self._act(chance, changes), 0.2 + chance.random() * 0.5)

    def _act(self, chance: random.Random, changes: dict[str, Any]) -> None:
        what = chance.random()
        if what < 0.55:
            self.create(queue=chance.random() < 0.5, **changes)
            return
        runs = self.runs()
        active = [run["id"] for run in runs if run["status"] not in FINAL]
        final = [run["id"] for run in runs if run["status"] in FINAL]
        if what < 0.8 and active:
            self.stop(chance.choice(active))
        elif what < 0.86 and final:
            self.delete(chance.choice(final))

    # ---- faults of the process ----

    def kill(self, back_after_s: float = 0.0, why: str = "") -> None:
        """kill -9, and a restart in a thread of its own: whoever calls this may be a master."""
        with self._life:
            if not self.manager.is_up.is_set():
                return
            self.fault("kill -9", why)
            self.manager.kill9()
        self.start(lambda: self._bring_back(back_after_s))

    def _bring_back(self, after_s: float = 0.0) -> None:
        with self.disturbance():
            self._ended.wait(after_s)
            with self._life:
                process = self.manager.process
                if not self.manager.is_up.is_set() or (process is not None and process.poll() is not None):
                    self.manager.is_up.clear()
                    self.manager.start()
                    self.note("Load Manager is back")

    def expect_death(self, back_after_s: float = 0.0) -> None:
        """Bring it back when it has killed itself at a chosen point."""

        def look() -> None:
            process = self.manager.process
            while not self._ended.wait(0.05):
                if process is not None and process.poll() is not None:
                    with self._life:
                        if self.manager.process is not process:
                            return  # brought back already
                        self.fault("kill -9", "from within")
                        self.manager.is_up.clear()
                    self._bring_back(back_after_s)
                    return

        self.start(look)

    def freeze(self, seconds: float) -> None:
        """SIGSTOP for so long."""
        with self.disturbance(), self._life:
            assert self.manager.process is not None
            self.fault("SIGSTOP", f"for {seconds:.1f} s")
            os.kill(self.manager.process.pid, signal.SIGSTOP)
            self._ended.wait(seconds)
            os.kill(self.manager.process.pid, signal.SIGCONT)

    def inside(self, **command: Any) -> Any:
        """A fault from within; None when Load Manager is just away."""
        with self._life:
            try:
                return self.manager.command(**command)
            except (OSError, ValueError):
                return None

    # ---- looks in mid-episode ----

    def check_it_still_works(self) -> None:
        """While something odd goes on: a create is written, /health tells the truth."""
        self.checked["a create is written in mid-fault"] += 1
        began = time.monotonic()
        answer = self.ask("GET", "/v1/tests?limit=1", timeout_s=10)
        if answer.status != 200:
            self.broken.append(f"a list in mid-fault: {answer.status}")
        run_id = self.create(with_key=False, durationSeconds=1, queue=True)
        took_s = time.monotonic() - began
        if run_id is None or took_s > 12:
            self.broken.append(f"a create in mid-fault took {took_s:.1f} s: {self.timeline[-1]}")

    def check_health_knows(self) -> None:
        """The database refuses everything just now."""
        self.checked["/health knows of a database that refuses"] += 1
        try:
            eventually(lambda: self.health() == 503, 8, 0.3)
        except AssertionError:
            self.broken.append("/health is 200 while the database refuses every write")

    def check_schedules(self) -> None:
        self.checked["a schedule fires once"] += len(self._scheduled)
        found = Counter(run["scenarioId"] for run in self.runs())
        for scenario in self._scheduled:
            if found[scenario] > 1:
                self.broken.append(f"{scenario} was started {found[scenario]} times")

    # ---- the end ----

    def heal(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.inside(do="clear")
        for fake in self.fakes:
            fake.faults.clear()
            fake.is_cut_off = False
            fake.delays.clear()
            fake.points.clear()
            fake.stats_changes.clear()
            fake.top_changes.clear()
            fake.odd_requests = None
            fake.failures_csv = None
            fake.stops_are_ignored = 0
            fake.released.set()
            fake.released = threading.Event()
        self.note("healed")

    def judge(self) -> list[str]:
        """Let everything come to rest, then look at each invariant."""
        with self.disturbance():
            self.heal()
            self._bring_back()
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
        self._ended.clear()
        self._bring_back()  # a kill may have come just before
        if self._expects_unhealthy:
            self._restart_at_rest()
        self._check_quiet()
        self._check_clusters_are_free()
        self._check_inside()
        self._check_notified()
        self.runs()
        self._restart_at_rest()
        self._check_masters()
        self._check_runs()
        self._check_log()
        self._ended.set()
        self.broken += [line for fake in self.fakes for line in fake.broken]
        self.broken = list(dict.fromkeys(self.broken))
        return self.broken

    def _check_quiet(self) -> None:
        self.checked["after quiet no run is active and no load is left"] += 1
        for fake in self.fakes:
            fake.end_strangers_test()
        give_up_at = time.monotonic() + QUIET_WITHIN_S
        while True:
            active = self.active()
            for run in active:
                if run["status"] == "Running" and not run.get("durationSeconds") or run.get("queuePosition"):
                    self.start(lambda run_id=run["id"]: self.stop(run_id))
            loads = [fake.load for fake in self.fakes if fake.load]
            if not active and not loads:
                return
            if time.monotonic() > give_up_at:
                break
            self._ended.wait(0.5)
        for run in active:
            self.broken.append(
                f"run {run['id'][:8]} is {run['status']} {QUIET_WITHIN_S:.0f} s after the last fault"
            )
        for load in loads:
            self.broken.append(f"the load of {load} is left {QUIET_WITHIN_S:.0f} s after the last fault")
        self.note(f"stacks: {json.dumps(self.inside(do='stacks'), indent=1)}")

    def _check_clusters_are_free(self) -> None:
        """Each cluster takes a run and ends it: no claim is left."""
        self.checked["each cluster is free after quiet"] += 1
        for fake in self.fakes:
            if fake.load:
                return  # told already
        give_up_at = time.monotonic() + FREE_WITHIN_S
        found = [self._try_create(give_up_at) for _ in self.fakes]
        places = Counter(run.get("locustClusterId") for run in found if run["status"] != "Failed")
        if len(places) < len(self.fakes):
            told = [(run.get("locustClusterId"), run.get("status"), run.get("message")) for run in found]
            self.broken.append(f"not every cluster takes a run after quiet: {told}")
        for run in found:
            if run.get("id"):
                self.stop(run["id"])
                with contextlib.suppress(AssertionError):
                    eventually(lambda run=run: self.run(run["id"])["status"] in FINAL, 20, 0.3)
                    continue
                self.broken.append(f"run {run['id'][:8]} does not end after quiet")

    def _try_create(self, give_up_at: float) -> dict[str, Any]:
        """A run, once a cluster is free: a clean-up may just have one."""
        while True:
            run_id = self.create(with_key=False, durationSeconds=60)
            if run_id is not None:
                return self.run(run_id)
            if time.monotonic() > give_up_at:
                return {"status": "Failed", "message": self.timeline[-1]}
            self._ended.wait(1)

    def _check_inside(self) -> None:
        self.checked["/health is good once all is well"] += 1
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.health() == 200, 10)
            self.checked["no thread is gone"] += 1
            threads = Counter(self.inside(do="threads") or ())
            gone = self._permanent - threads
            if gone:
                self.broken.append(f"threads are gone: {sorted(gone)}")
            return
        self.broken.append(f"/health answers {self.health()} after quiet")

    def _check_notified(self) -> None:
        ended = {run["id"] for run in self.runs() if run["status"] in FINAL}
        self.checked["every ended run is notified"] += len(ended)
        with contextlib.suppress(AssertionError):
            eventually(lambda: ended <= self.receiver.told, NOTIFIED_WITHIN_S, 0.3)
            return
        missing = sorted(run_id[:8] for run_id in ended - self.receiver.told)
        self.broken.append(f"{len(missing)} ended runs are not notified: {missing}")

    def _restart_at_rest(self) -> None:
        if self.chance.random() < 0.5:
            self.manager.kill9()
            self.note("kill -9 at rest")
        else:
            status, took_s = self.manager.terminate()
            self.note(f"SIGTERM at rest: exit {status} after {took_s:.1f} s")
            if status != 0:
                self.broken.append(f"SIGTERM at rest ended with {status} after {took_s:.1f} s")
        self.manager.start()

    def _check_runs(self) -> None:
        listed = self.runs()
        ids = Counter(run["id"] for run in listed)
        self.checked["every accepted run is listed once"] += len(self._accepted)
        for run_id in self._accepted - self._deleted:
            if ids[run_id] != 1:
                self.broken.append(f"run {run_id[:8]} was answered 2xx and is listed {ids[run_id]} times")
        scenarios = Counter(run["scenarioId"] for run in listed)
        for scenario, count in scenarios.items():
            if scenario in self._asked and count > 1:
                self.broken.append(f"{scenario} was asked for once and is {count} runs")
            if scenario not in self._asked and scenario not in self._scheduled | {"ui-started-test"}:
                self.broken.append(f"nobody asked for the run of {scenario}")
        self.checked["a final run stays the same, also over a kill"] += len(self._finals)
        self.checked["startedAt stays the same"] += len(self._started)
        for run_id, times in self._started.items():
            if len(times) > 1:
                self.broken.append(f"run {run_id[:8]} started at {sorted(times)}")
        self._check_numbers(listed)
        for run in listed:
            self._check_reason(run)

    def _check_numbers(self, listed: list[dict[str, Any]]) -> None:
        """What is shown was told by that master in that run."""
        said: dict[str, set[int]] = {}
        for load in self._loads():
            said.setdefault(load.run_id, set()).update(load.said)
        warned = {run["id"] for run in listed if run.get("trust") not in (None, "ok") or run.get("warnings")}
        self.checked["numbers shown were told in that run"] += len(self._numbers)
        for run_id, number in self._numbers:
            if number and number not in said.get(run_id, ()) and run_id not in warned:
                self.broken.append(
                    f"run {run_id[:8]} showed {number} requests, which its master never told in it"
                )

    def _check_reason(self, run: dict[str, Any]) -> None:
        loads = [load for load in self._loads() if load.run_id == run["id"]]
        reason = run.get("stopReason")
        self.checked["why it ended is what happened"] += 1
        if reason == "locust" and any(load.ended_by == "stop" for load in loads):
            self.broken.append(f"run {run['id'][:8]} was stopped by a call and says that Locust ended it")
        if reason == "user" and run["id"] not in self._stop_asked:
            self.broken.append(f"run {run['id'][:8]} says that a user stopped it, and nobody did")
        early = [
            load
            for load in loads
            if load.ended_by == "stop"
            and run.get("durationSeconds")
            and load.stop_called is not None
            and load.stop_called - load.began < run["durationSeconds"] - 0.9
        ]
        if early and run["status"] == "Finished" and run["id"] not in self._stop_asked:
            self.broken.append(f"the load of {early[0]} was stopped before its time, and nobody asked for it")
        if run["status"] == "Finished" and not loads:
            self.broken.append(f"run {run['id'][:8]} is Finished and no master ever had its load")

    def _loads(self) -> list[Load]:
        """All but those of one user, which end a load that does not heed a stop."""
        return [load for fake in self.fakes for load in fake.history if load.users > 1]

    def _check_masters(self) -> None:
        places: dict[str, list[Load]] = {}
        for load in self._loads():
            places.setdefault(load.run_id, []).append(load)
            self._check_end(load)
        self.checked["each run has one load"] += len(places)
        for run_id, loads in places.items():
            if run_id and len([load for load in loads if not load.is_strangers]) > 1:
                self.broken.append(f"run {run_id[:8]} has {len(loads)} loads: {', '.join(map(str, loads))}")

    def _check_end(self, load: Load) -> None:
        """A load ends at its deadline, or when what was in the way is over; a stranger's is let alone."""
        self.checked["each load ends in time"] += 1
        if load.is_strangers and load.stop_called and load.run_id not in self._stop_asked:
            self.broken.append(f"the load of {load} was stopped, and nobody asked for it")
        allowed = load.form.get("lm_stop_after")
        if load.is_strangers or not allowed or load.ended is None:
            return
        deadline = load.began + float(allowed) - 5  # the grace that is given to Locust
        latest = deadline + END_SLACK_S
        for begin, end in sorted(self._disturbed):
            if begin < latest and end > deadline - 3:
                latest = max(latest, end + BACK_SLACK_S)
        if load.ended > latest:
            late = load.ended - deadline
            self.broken.append(
                f"the load of {load} ended {late:.1f} s after its deadline, by {load.ended_by}"
            )

    def _check_log(self) -> None:
        self.checked["no trace in the log but of injected exceptions"] += 1
        for line in self.manager.log().splitlines():
            if ("trace=" in line or "Traceback" in line) and "Unforeseen" not in line:
                self.broken.append(
                    "the log has a trace: " + re.sub(r"\s+", " ", line.replace("\\n", " "))[-700:]
                )

    # ---- what is told of it ----

    def report(self) -> str:
        """Timeline and log, for whoever looks for the reason."""
        return "\n".join(
            [
                f"episode {self.name}, seed {self.seed}",
                *self.broken,
                "",
                "---- timeline, seconds",
                *self.timeline,
                "---- log",
                self.manager.log(),
            ]
        )


def _final_text(run: dict[str, Any]) -> str:
    """The run in one form, whichever route showed it: a list may leave the endpoints out."""
    metrics = {
        name: value for name, value in (run.get("lastMetrics") or {}).items() if name != "requestStats"
    }
    return json.dumps({**run, "lastMetrics": metrics or None}, sort_keys=True)


def _difference(before: str, after: str) -> str:
    one, other = json.loads(before), json.loads(after)
    changed = [
        f"{name} {one.get(name)!r} -> {other.get(name)!r}"
        for name in sorted(set(one) | set(other))
        if one.get(name) != other.get(name)
    ]
    return "; ".join(changed)[:600]
