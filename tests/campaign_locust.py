"""A fake Locust master that keeps the history of its loads: a campaign judges who started and ended what.

Like a real master it caches its statistics (the state included) for 2 s, takes a while for a stop, ends
a test at its run time whether or not Load Manager lives, and with hooks calls back and holds a lease."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from conftest import CALLBACK_TOKEN
from fake_locust import CSV_HEAD, FakeLocust

STATS_CACHE_S = 2.0
TICK_S = 0.1
NUMBERS_OF_A_LOAD = 1_000_000  # each load counts its requests from another million


@dataclass
class Load:
    """One test on one master, from its start to its end."""

    fake: str
    run_id: str
    users: int
    base: int
    form: dict[str, str]
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    ended_by: str = ""  # stop, run time, lease, restart, other test, its user
    stop_called: float | None = None
    is_strangers: bool = False
    said: set[int] = field(default_factory=set)  # numbers of requests that the master told
    lease_until: float = float("inf")

    @property
    def requests(self) -> int:
        return self.base + 1 + int(10 * ((self.ended or time.monotonic()) - self.began))

    @property
    def ends_at(self) -> float:
        """When the master ends it by itself."""
        after = self.form.get("lm_stop_after") or self.form.get("run_time")
        return self.began + float(after) if after else float("inf")

    def __str__(self) -> str:
        whose = "a stranger's" if self.is_strangers else self.run_id[:8]
        return f"{whose} on {self.fake}"


class CampaignLocust(FakeLocust):
    """`history` has all loads, the newest last; `broken` what must never happen to a master."""

    def __init__(
        self, number: int, hooks: bool, note: Callable[[str], None], control_plane: Callable[[], str]
    ):
        super().__init__(hooks=hooks)
        self.cache_s = STATS_CACHE_S
        self.name = f"c{number}"
        self.history: list[Load] = []
        self.broken: list[str] = []
        self.stop_takes_s = 0.2
        self.points: dict[tuple[str, str], Callable[[], None]] = {}  # once: (path, before or after)
        self.delays: dict[tuple[str, str], float] = {}
        self._number = number
        self._note, self._control_plane = note, control_plane
        self._lock = threading.RLock()
        self._stopping = False
        self._ended = threading.Event()
        self.odd_requests: int | None = None  # said instead of the load's number
        self.is_cut_off = False  # its hooks reach nobody
        threading.Thread(target=self._tick, daemon=True).start()
        if hooks:
            threading.Thread(target=self._push, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        super().close()

    @property
    def load(self) -> Load | None:
        """The load that runs now."""
        with self._lock:
            return self.history[-1] if self.history and self.history[-1].ended is None else None

    def reached(self, path: str, when: str) -> None:
        action = self.points.pop((path, when), None)
        if action is not None:
            action()
        self._ended.wait(self.delays.get((path, when), 0.0))

    def cut_off(self, fault: Callable[[Any], None]) -> None:
        """Neither is it reached, nor do its hooks reach Load Manager."""
        self.is_cut_off, self.faults["*"] = True, fault

    # ---- tests begin and end ----

    def swarm(self, form: dict[str, str]) -> None:
        with self._lock:
            load, run_id = self.load, form.get("run_id", "")
            if self._stopping:
                self.broken.append(f"{self.name}: swarm of {run_id[:8]} into a master that is just stopping")
            if load is not None and load.run_id != run_id:
                self.broken.append(f"{self.name}: swarm of {run_id[:8]} into the load of {load}")
                self._end(load, "other test")
                load = None
            if load is not None:
                load.users = self.users = int(form["user_count"])
                load.form = form
                return
            if any(one.run_id == run_id for one in self.history) and form["user_count"] != "1":
                self.broken.append(f"{self.name}: run {run_id[:8]} was started a second time")
            self._begin(Load(self.name, run_id, int(form["user_count"]), self._next_base(), form))

    def start_strangers_test(self) -> None:
        """As somebody does in Locust's own page; with hooks it registers itself."""
        with self._lock:
            if self.load is None and not self._stopping:
                self._begin(Load(self.name, "", 7, self._next_base(), {}, is_strangers=True))

    def end_strangers_test(self) -> None:
        with self._lock:
            if self.load is not None and self.load.is_strangers:
                self._end(self.load, "its user")

    def _next_base(self) -> int:
        return (self._number * 1000 + len(self.history) + 1) * NUMBERS_OF_A_LOAD

    def _begin(self, load: Load) -> None:
        self.history.append(load)
        if load.form.get("lm_lease"):
            load.lease_until = load.began + float(load.form["lm_lease"])
        self.state, self.users, self.run_id = "running", load.users, load.run_id
        self._note(f"{self.name}: load of {load} begins")
        if self.hooks and load.is_strangers:
            body = {
                "tenantId": "acme",
                "envId": "dev",
                "targetUsers": 7,
                "spawnRate": 7,
                "clusterId": self.name,
            }
            self._soon(lambda: self._register(load, body))
        elif self.hooks:
            self._soon(lambda: self._post("test-start", {"runId": load.run_id, "hooks": 1}))

    def runs_another(self, run_id: str) -> bool:
        with self._lock:
            load = self.load
            return load is not None and load.ended is None and load.run_id not in ("", run_id)

    def end_test(self) -> None:
        """What /stop does: it answers when the users are gone."""
        with self._lock:
            if self.stops_are_ignored > 0:
                self.stops_are_ignored -= 1
                return
            load = self.load
            if load is None:
                return
            load.stop_called = load.stop_called or time.monotonic()
            self._note(f"{self.name}: /stop while the load of {load} runs")
            self._stopping, self.state = True, "stopping"
        self._ended.wait(self.stop_takes_s)
        with self._lock:
            self._stopping = False
            if load.ended is None:
                self._end(load, "stop")
        if self.hooks and load.run_id:
            self._tell_end(load)

    def _end(self, load: Load, how: str) -> None:
        load.ended, load.ended_by = time.monotonic(), how
        self.state, self.users = "stopped", 0
        self.last_run_id, self.run_id = load.run_id, ""  # as the hooks: "" after a test of Locust's page
        self._note(f"{self.name}: load of {load} ended by {how}")

    def restart(self) -> None:
        """As if the master process had been replaced."""
        with self._lock:
            if self.load is not None:
                self._end(self.load, "restart")
            super().restart()
            self.history.append(Load(self.name, "", 0, self._next_base(), {}, ended=time.monotonic()))

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            with self._lock:
                load, now = self.load, time.monotonic()
                how = "" if load is None else "run time" if now > load.ends_at else ""
                if load is not None and now > load.lease_until and self.hooks:
                    how = "lease"
                if load is None or not how:
                    continue
                self._end(load, how)
            if self.hooks and load.run_id:
                self._soon(lambda load=load: self._tell_end(load))

    # ---- what it tells ----

    def cached_stats(self) -> tuple[dict[str, Any], dict[str, str]]:
        with self._lock:
            return super().cached_stats()

    def _count(self) -> None:
        self.requests = self._number_to_tell()

    def counted(self) -> dict[str, Any]:
        """All requests until the last full second, as our hooks tell them."""
        age_s = time.time() % 1
        number = self._number_to_tell()
        load = self.history[-1] if self.history else None
        if load is not None and load.ended is None and self.odd_requests is None:
            number = max(load.base, number - int(10 * age_s))
            load.said.add(number)
        return {"statsResets": 0, "counted": {"secondsAgo": age_s, "requests": number, "failures": 0}}

    def csv(self) -> str:
        with self._lock:
            self.requests = self._number_to_tell()
            return super().csv() if self.history else CSV_HEAD

    def hooks_state(self) -> dict[str, Any]:
        with self._lock:
            self.requests = self._number_to_tell()
            return super().hooks_state()

    def _number_to_tell(self) -> int:
        if not self.history:
            return 0
        load = self.history[-1]
        number = load.requests if self.odd_requests is None else self.odd_requests
        if load.users == 0:  # of a master that was just restarted
            number = 0
        load.said.add(number)
        return number

    def _metrics(self, load: Load) -> dict[str, Any]:
        with self._lock:
            number = load.requests
            load.said.add(number)
            return {
                "totalRps": 10.0,
                "totalRequests": number,
                "totalFailures": 0,
                "errorRate": 0.0,
                "currentUsers": load.users if load.ended is None else 0,
            }

    # ---- hooks ----

    def _soon(self, work: Callable[[], object]) -> None:
        threading.Thread(target=work, daemon=True).start()

    def _push(self) -> None:
        while not self._ended.wait(1.0):
            load = self.load
            if load is None or not load.run_id or self.odd_requests is not None:
                continue
            metrics = self._metrics(load)
            if self._post("metrics", {"runId": load.run_id, "metrics": metrics}) == 200:
                lease_s = load.form.get("lm_lease")
                load.lease_until = time.monotonic() + float(lease_s) if lease_s else float("inf")

    def _tell_end(self, load: Load) -> None:
        if self.odd_requests is not None:
            body: dict[str, Any] = {"runId": load.run_id}
        else:
            body = {"runId": load.run_id, "complete": True, "finalMetrics": self._metrics(load)}
        for _ in range(3):
            if self._post("test-stop", body) is not None or self._ended.wait(0.5):
                return

    def _register(self, load: Load, body: dict[str, Any]) -> None:
        for _ in range(5):
            status, answer = self._call("register-external", body)
            if status == 200:
                load.run_id = answer["runId"]
                with self._lock:
                    if self.load is load:
                        self.run_id = load.run_id
                self._note(f"{self.name}: the stranger's test is run {load.run_id[:8]}")
                return
            if load.ended is not None or self._ended.wait(1.0):
                return

    def _post(self, name: str, body: dict[str, Any]) -> int | None:
        return self._call(name, body)[0]

    def _call(self, name: str, body: dict[str, Any]) -> tuple[int | None, Any]:
        """Status and JSON; None when Load Manager does not answer."""
        if self.is_cut_off:
            return None, None
        parts = urlsplit(self._control_plane())
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
        headers = {"X-Locust-Token": CALLBACK_TOKEN, "Content-Type": "application/json"}
        try:
            connection.request("POST", f"/v1/internal/locust/{name}", json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None, None
        finally:
            connection.close()
