"""Connects a Locust to Load Manager. In any locustfile:

    import loadmanager_hooks

On the master (or a standalone Locust) it tells the control plane when a test starts and ends, pushes
metrics meanwhile, answers GET /loadmanager/state in Locust's web UI, and stops a test whose time is
up or whose controller is gone. On workers it sends the last numbers to the master before the test
ends there, so that the final numbers are complete.

Nothing here ever blocks or breaks a load: listeners only take notes and start greenlets, every call
has a total time limit, and a control plane that is away costs one warning in the log.

Environment: CONTROL_PLANE_URL, CONTROL_PLANE_TOKEN (without both nothing is called), RUN_ID, TENANT_ID,
ENV_ID, CLUSTER_ID, METRICS_PUSH_INTERVAL (seconds, default 2), CONTROL_PLANE_CA_FILE (certificates to trust),
CONTROL_PLANE_CLIENT_CERT (our certificate with its key).
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import logging
import math
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import gevent
import gevent.event
import requests
from locust.runners import MasterRunner, WorkerRunner

from locust import events  # first: importing locust makes requests, time and threading cooperative

if TYPE_CHECKING:
    from locust.env import Environment
    from locust.runners import WorkerNode
    from locust.stats import StatsEntry
    from locust.web import WebUI

    Json = dict[str, Any]  # an object of JSON
    Endpoint = tuple[str, str] | None  # method and name; None: all, or those beyond a limit
    Times = dict[int, int]  # ms -> requests

HOOKS_VERSION = 1  # of the state route and the callbacks

CALL_TIMEOUT_S = 5.0  # one callback: connect, send and read together
QUIT_TIMEOUT_S = 3.0  # the same when the process is about to end, where it delays the end
REPORTER_GRACE_S = 0.5  # also then, for the delivery that is already under way
START_ATTEMPTS = 8  # of test-start
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)  # after the first, second... failed attempt; the last one repeats
FINAL_RETRY_FOR_S = 60.0
LATE_REPORTS_S = 4.0  # workers without these hooks report every 3 s
GUARD_TICK_S = 0.25
# A request is in the master's numbers when its worker has reported, up to 3 s later, in Locust's own
# rates 2 s after that: of the first second of a test there are users, of the first 3 s some requests,
# from 5 s on all.
PUSH_INTERVAL_S = 2.0
FIRST_PUSH_S = 1.0  # after the start, so that a run of some seconds has points
SILENT_WORKER_S = 8.0  # without a report for so long it is lost, and nothing waits for its numbers
STATS_HEADER = "X-LoadManager-Statistics"  # of /stats/requests: how old they are, in JSON
STOP_AGAIN_AFTER_S = 5.0
RAMP_SETTLES_S = 0.1
MAX_PUSHED_ENDPOINTS = 500  # as many as Locust's own /stats/requests shows
MAX_FINAL_ENDPOINTS = 5000
MAX_HISTOGRAMS = 100  # endpoints, those with the most requests, whose response times go along
MAX_EXACT_ENDPOINTS = 500  # whose exact times a process keeps, those seen first
MAX_NOTED_TIMES = 1000  # of an endpoint, before they are counted
MAX_EXACT_BUCKETS = 50_000  # of all of them; from then on new ones have Locust's two digits, at most 400 each

ARGUMENTS = (
    "run_id",
    "tenant_id",
    "env_id",
    "lm_stop_after",
    "lm_lease",
    "lm_push",
    "lm_traceparent",
)  # fields of the /swarm form
TAG_ARGUMENTS = (
    "lm_tags",
    "lm_exclude_tags",
)  # these too; workers get them with the spawn message, so they stay
ACTIVE_STATES = ("spawning", "running")
TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
FLUSH_MARK = "loadmanager_flush"  # in the report a worker sends at its test_stop
TIMES_MARK = "loadmanager_times"  # in every report: rows of method, name, {ms: requests}

log = logging.getLogger("loadmanager")

# ---- settings and small conversions ----


def _seconds(text: str, default: float = 0.0) -> float:
    """A positive finite number of seconds, else `default`."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return default
    return value if math.isfinite(value) and value > 0 else default


def _number(value: object) -> float | None:
    """The number, or None when it is none that JSON knows (a custom request event may report NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _text(value: object) -> str:
    """Text that survives strict JSON readers: no lone surrogates, no NUL."""
    return str(value or "").encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Settings:
    """The environment variables, read when Locust is initialised: a locustfile may set them itself."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        def variable(name: str) -> str:
            return (environ.get(name) or "").strip()

        self.url = variable("CONTROL_PLANE_URL").rstrip("/")
        self.token = variable("CONTROL_PLANE_TOKEN")
        self.ca_file = variable("CONTROL_PLANE_CA_FILE")
        self.client_cert = variable("CONTROL_PLANE_CLIENT_CERT")
        self.run_id = variable("RUN_ID")
        self.tenant_id = variable("TENANT_ID")
        self.env_id = variable("ENV_ID")
        self.cluster_id = variable("CLUSTER_ID")
        interval = variable("METRICS_PUSH_INTERVAL")
        self.push_interval_s = max(0.1, _seconds(interval, PUSH_INTERVAL_S))
        self.callbacks = bool(self.url and self.token)
        if interval and not _seconds(interval):
            log.warning(
                "METRICS_PUSH_INTERVAL=%r is not a number of seconds, using %g", interval, PUSH_INTERVAL_S
            )
        if self.url and not self.url.lower().startswith(("http://", "https://")):
            log.warning("CONTROL_PLANE_URL=%r is not an http(s) URL, no callbacks", self.url)
            self.callbacks = False
        elif not self.callbacks and (self.url or self.token):
            log.warning("CONTROL_PLANE_URL and CONTROL_PLANE_TOKEN are needed both, no callbacks")


# ---- numbers: Locust's own, never derived ----


def metrics_of(
    environment: Environment,
    final: bool = False,
    exact: ExactTimes | None = None,
    counts: ExactCounts | None = None,
) -> Json:
    """Rates are the current ones, in the final numbers the whole run's; all else covers the whole run."""
    total = environment.stats.total
    entries = list(environment.stats.entries.values())
    shown = MAX_FINAL_ENDPOINTS if final else MAX_PUSHED_ENDPOINTS
    if len(entries) > shown:
        entries = sorted(entries, key=lambda entry: entry.num_requests, reverse=True)[:shown]
    metrics: Json = {
        "timestamp": _utc_now(),
        "totalRps": _rate(total, final),
        "totalRequests": total.num_requests,
        "totalFailures": total.num_failures,
        "errorRate": _number(total.fail_ratio * 100) if total.num_requests else None,
        "avgResponseMs": _average_ms(total),
        "p50ResponseMs": _percentile_ms(total, 0.5),
        "p95ResponseMs": _percentile_ms(total, 0.95),
        "p99ResponseMs": _percentile_ms(total, 0.99),
        "currentUsers": environment.runner.user_count,
        "responseTimes": _response_times(total, None if exact is None else exact.of(None, total)),
        "requestStats": {
            f"{_text(entry.method)}_{_text(entry.name)}": _endpoint_metrics(entry, final) for entry in entries
        },
    }
    busiest = sorted(entries, key=lambda entry: entry.num_requests, reverse=True)[:MAX_HISTOGRAMS]
    for entry in busiest:
        row = metrics["requestStats"][f"{_text(entry.method)}_{_text(entry.name)}"]
        of_entry = None if exact is None else exact.of((entry.method, entry.name), entry)
        row["responseTimes"] = _response_times(entry, of_entry)
    cut = len(environment.stats.entries) - len(entries)
    if cut > 0:
        metrics["endpointsCut"] = cut
    if counts is not None:
        metrics.update(counts.to_json())
    return metrics


def _endpoint_metrics(entry: StatsEntry, final: bool) -> Json:
    return {
        "method": _text(entry.method),
        "name": _text(entry.name),
        "numRequests": entry.num_requests,
        "numFailures": entry.num_failures,
        "avgResponseTime": _average_ms(entry),
        "minResponseTime": _number(entry.min_response_time),
        "maxResponseTime": _number(entry.max_response_time) if entry.response_times else None,
        "medianResponseTime": _number(entry.median_response_time) if entry.response_times else None,
        "requestsPerSec": _rate(entry, final),
        "p95ResponseTime": _percentile_ms(entry, 0.95),
        "p99ResponseTime": _percentile_ms(entry, 0.99),
    }


def _response_times(entry: StatsEntry, exact: Times | None) -> dict[str, int]:
    """Requests by whole ms, since the start: exact ones, or the counts from which Locust makes its
    percentiles."""
    counts: dict[str, int] = {}
    for ms, requests_ in list((entry.response_times if exact is None else exact).items()):
        if _number(ms) is not None and ms >= 0:
            counts[str(round(ms))] = counts.get(str(round(ms)), 0) + requests_
    return counts


def _rate(entry: StatsEntry, final: bool) -> float | None:
    return _number(entry.total_rps if final else entry.current_rps)


def _average_ms(entry: StatsEntry) -> float | None:
    # Locust says 0 without response times; that would be a very fast system.
    return _number(entry.avg_response_time) if entry.response_times else None


def _percentile_ms(entry: StatsEntry, ratio: float) -> float | None:
    return _number(entry.get_response_time_percentile(ratio)) if entry.response_times else None


# ---- exact counts ----


class ExactCounts:
    """Requests up to a second of which nothing is missing, and whether the statistics were reset.

    Workers report every 3 s, each in its own rhythm: the numbers of now lack up to 3 s of each, and a rate
    made of two of them is wrong by as much. Locust also counts by the second; until the last second before
    the oldest of the workers' last reports all requests are there."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._reported_at: dict[str, float] = {}  # worker -> when it reported last
        self.test_started()

    def test_started(self) -> None:
        """Locust has just cleared its statistics."""
        self._total = self._environment.stats.total
        self._began_at = self._total.start_time
        self._resets = 0

    def on_worker_report(self, client_id: str) -> None:
        self._reported_at[client_id] = time.time()

    def resets(self) -> int:
        """How often the statistics were reset since the test began: by Locust's page, by --reset-stats or by
        the locustfile. Reports of workers may set their beginning back, a reset sets it to now."""
        total = self._environment.stats.total
        if total is not self._total or total.start_time > self._began_at:
            self._resets += 1
        self._total, self._began_at = total, total.start_time
        return self._resets

    def to_json(self) -> Json:
        document: Json = {"statsResets": self.resets()}
        now, until = time.time(), self._complete_until()
        total = self._environment.stats.total
        if until > total.start_time:
            document["counted"] = {
                "secondsAgo": now - until,
                "requests": total.num_requests - _since(total.num_reqs_per_sec, until, now),
                "failures": total.num_failures - _since(total.num_fail_per_sec, until, now),
            }
        return document

    def _complete_until(self) -> int:
        runner, now = self._environment.runner, time.time()
        oldest = now
        for worker in list(runner.clients.values()) if isinstance(runner, MasterRunner) else ():
            reported_at = self._reported_at.get(worker.id, now - 3)
            if worker.state in ACTIVE_STATES and now - reported_at < SILENT_WORKER_S:
                oldest = min(oldest, reported_at)
        return int(oldest - 0.2)  # a report may have been under way for a moment

    def stamp(self, response: Any) -> None:
        """Say how old the statistics are that Locust answers: it keeps an answer for 2 s or longer."""
        made = getattr(response, "loadmanager_made", None)
        if made is None:  # just made
            made = response.loadmanager_made = time.monotonic(), self.to_json()
        made_at, counted = made
        age = {"age": time.monotonic() - made_at, "madeAt": made_at}
        response.headers[STATS_HEADER] = json.dumps({**age, **counted})


def _since(by_second: dict[int, int], begin: int, now: float) -> int:
    """What was counted from a second on; clocks of workers may be some seconds ahead."""
    return sum(by_second.get(second, 0) for second in range(begin, int(now) + 10))


# ---- exact response times ----


class ExactTimes:
    """Requests by response time, to the ms up to 1 s and in three digits above it; Locust keeps two digits.

    A worker notes its requests and sends them with each of Locust's own reports; the master adds them up; a
    standalone Locust only notes. Kept in step with Locust's statistics: these get a new dict of response
    times at each start, reset and report, and then ours begin again too."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._origin: object = None  # Locust's dict that ours goes with
        self.clear()

    def clear(self) -> None:
        self._times: dict[Endpoint, Times] = {}
        self._total: Times = {}  # the master's; elsewhere made when needed
        self._buckets = 0
        self._incomplete: set[Endpoint] = set()
        self._noted: dict[Endpoint, list[float]] = {}  # response times that are not counted yet

    def _follow_locust(self) -> None:
        """Begin again where Locust did, and count what was noted."""
        origin = self._environment.stats.total.response_times
        if origin is not self._origin:
            self._origin = origin
            self.clear()
        noted, self._noted = self._noted, {}
        for key, times in noted.items():
            for ms, requests_ in _counted(times).items():
                if ms >= 0:
                    self._add(key, ms if ms < 1000 else _rounded(ms, 3), requests_)

    def on_request(self, request_type: str, name: str, response_time: float, **_kwargs: object) -> None:
        """Note it, and count later, many at once: this runs within each request of the load."""
        times = self._noted.get((request_type, name))
        is_other = self._environment.stats.total.response_times is not self._origin
        if is_other or times is None or len(times) >= MAX_NOTED_TIMES:
            if is_other or times or len(self._noted) >= MAX_EXACT_ENDPOINTS:
                self._follow_locust()
            times = self._noted.setdefault((request_type, name), [])
        times.append(response_time)

    def _add(self, key: Endpoint, ms: int, requests_: int) -> None:
        if key not in self._times and len(self._times) >= MAX_EXACT_ENDPOINTS:
            key = None
        self._count(self._times.setdefault(key, {}), ms, requests_)

    def _count(self, times: Times, ms: int, requests_: int) -> None:
        if ms not in times and self._buckets >= MAX_EXACT_BUCKETS:
            ms = _rounded(ms, 2)
        self._buckets += ms not in times
        times[ms] = times.get(ms, 0) + requests_

    def take(self) -> list[list[Any]]:
        """What came since the last report, as rows for the next; called before Locust takes its own."""
        self._follow_locust()
        rows: list[list[Any]] = [[*(key or (None, None)), times] for key, times in self._times.items()]
        self.clear()
        return rows

    def add_report(self, rows: Iterable[list[Any]] | None) -> None:
        """A worker's report, after Locust has added it to its statistics."""
        self._follow_locust()
        for method, name, times in rows or ():
            key = None if name is None else (method, name)
            for ms, requests_ in times.items():
                self._add(key, ms, requests_)
                self._count(self._total, ms, requests_)

    def of(self, key: Endpoint, entry: StatsEntry) -> Times | None:
        """The times of an endpoint, of all for None. When a worker without these hooks takes part, or the
        endpoint is beyond the limit, they are not all: None, then and for the rest of the test."""
        self._follow_locust()
        times = self._times.get(key, {}) if key else self._total or self._sum()
        known = sum(entry.response_times.values())
        if abs(sum(times.values()) - known) > max(2, known // 100):
            self._incomplete.add(key)
        return None if key in self._incomplete else times

    def _sum(self) -> Times:
        total: Times = {}
        for times in self._times.values():
            for ms, requests_ in times.items():
                total[ms] = total.get(ms, 0) + requests_
        return total


def _counted(times: list[float]) -> Counter[int]:
    """How often each whole ms; what is None or NaN is left out, as Locust counts no time of it either."""
    try:
        return Counter(map(round, times))
    except (TypeError, ValueError, OverflowError):
        return Counter(round(ms) for ms in times if _number(ms) is not None)


def _rounded(ms: int, digits: int) -> int:
    return round(ms, min(0, digits - len(str(ms))))


# ---- what can be run ----


class Scenes:
    """The tasks of the user classes, and which of them a test runs: Locust itself filters by tags once
    in the life of a process."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._whole: dict[type[Any], list[Any]] = {}  # holder of tasks -> its tasks

    def tags(self) -> list[str]:
        found: set[str] = set()
        for user_class in self._classes():
            for holder in self._holders(user_class):
                for task in self._whole.get(holder, holder.tasks):
                    found |= set(getattr(task, "locust_tag_set", ()))
        return sorted(map(_text, found))

    def choose(self) -> None:
        """At test_start: only tasks with the tags of this test."""
        options = self._environment.parsed_options
        tags, exclude_tags = (
            set(filter(None, str(getattr(options, name, "") or "").split(","))) for name in TAG_ARGUMENTS
        )
        for holder, tasks in self._whole.items():
            holder.tasks = list(tasks)
        self._whole = {}
        if not tags and not exclude_tags:
            return
        from locust.user.task import filter_tasks_by_tags

        for user_class in self._classes():
            for holder in self._holders(user_class):
                self._whole[holder] = list(holder.tasks)
        for user_class in self._classes():
            filter_tasks_by_tags(user_class, tags or None, exclude_tags or None)

    def _classes(self) -> list[type[Any]]:
        available = getattr(self._environment, "available_user_classes", None) or {}
        return list(available.values()) or list(self._environment.user_classes)

    def _holders(self, holder: type[Any], seen: set[type[Any]] | None = None) -> Iterator[type[Any]]:
        """A user class or TaskSet and all TaskSets within it."""
        seen = set() if seen is None else seen
        if holder in seen:
            return
        seen.add(holder)
        yield holder
        for task in list(self._whole.get(holder, getattr(holder, "tasks", ()) or ())):
            if hasattr(task, "tasks"):
                yield from self._holders(task, seen)


class Options:
    """The custom arguments and the host, without those that starts of ours brought: values of the /swarm
    form would stay."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        classes = (getattr(environment, "available_user_classes", None) or {}).values()
        self._class_hosts = {
            user_class: user_class.host for user_class in (*environment.user_classes, *classes)
        }
        self.remember()

    def remember(self) -> None:
        known, ours = _default_options(), (*ARGUMENTS, *TAG_ARGUMENTS)
        options = vars(self._environment.parsed_options) if self._environment.parsed_options else {}
        self._kept = {
            name: copy.deepcopy(value)
            for name, value in options.items()
            if known and name not in known and name not in ours
        }
        self._host = self._environment.host

    def names(self) -> list[str]:
        return sorted(self._kept)

    def restore(self) -> None:
        if self._environment.parsed_options:
            vars(self._environment.parsed_options).update(copy.deepcopy(self._kept))
        self._environment.host = self._host
        if self._host is None:  # Locust has put the host of the test before on the classes
            for user_class, host in self._class_hosts.items():
                user_class.host = host


def _default_options() -> set[str]:
    """Names of Locust's own arguments; empty when this Locust does not tell."""
    try:
        from locust.argument_parser import default_args_dict

        return set(default_args_dict())
    except Exception:  # noqa: BLE001 - an old Locust
        return set()


# ---- calls to the control plane ----


class Answer:
    """What a callback came to. `status` 0: no answer."""

    def __init__(self, status: int = 0, body: Json | None = None, problem: str = "") -> None:
        self.status, self.body, self.problem = status, body or {}, problem
        self.ok = 200 <= status < 300
        is_passing = status == 0 or status >= 500 or status in (408, 425, 429)
        self.away = not self.ok and is_passing  # worth another try


class ControlPlane:
    def __init__(self, settings: Settings) -> None:
        self._base = settings.url + "/v1/internal/locust/"
        self._token = settings.token
        self._verify = settings.ca_file or True
        self._cert = settings.client_cert or None
        self._away = False

    def post(self, call: str, body: Json, timeout_s: float = CALL_TIMEOUT_S, traceparent: str = "") -> Answer:
        """Never raises, and never takes longer than `timeout_s`."""
        answer = self._post(call, body, timeout_s, traceparent)
        if answer.away and not self._away:
            log.warning("control plane: %s: %s; trying again without further warnings", call, answer.problem)
        elif not answer.away and self._away:
            log.info("control plane: answers again")
        self._away = answer.away
        return answer

    def _post(self, call: str, body: Json, timeout_s: float, traceparent: str) -> Answer:
        headers = {"Content-Type": "application/json", "X-Locust-Token": self._token}
        if traceparent:
            headers["traceparent"] = traceparent
        limit = gevent.Timeout(timeout_s)  # in all; the timeout of requests is per read
        limit.start()
        try:
            with requests.post(
                self._base + call,
                data=json.dumps(body, allow_nan=False).encode(),
                headers=headers,
                timeout=timeout_s,
                allow_redirects=False,  # the token is for this address only
                verify=self._verify,
                cert=self._cert,
                stream=True,
            ) as response:
                text = response.raw.read(65536, decode_content=True)
                status = response.status_code
        except gevent.Timeout as exc:
            if exc is not limit:
                raise
            return Answer(problem=f"no answer within {timeout_s:g} s")
        except Exception as exc:  # noqa: BLE001 - whatever it is, the load goes on
            return Answer(problem=self._without_token(f"{type(exc).__name__}: {exc}"))
        finally:
            limit.close()
        try:
            answered = json.loads(text)
        except ValueError:
            answered = None
        shown = text[:300].decode("utf-8", "replace")
        said = answered if isinstance(answered, dict) else {}
        return Answer(status, said, f"HTTP {status} {shown}".strip())

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "***")[:300]


# ---- one test ----


class Run:
    """One test in this Locust, from its test_start until its final numbers are delivered."""

    def __init__(self, hooks: Hooks, arguments: dict[str, str]) -> None:
        settings = hooks.settings
        self._hooks = hooks
        self._environment = hooks.environment
        self.id = arguments["run_id"] or settings.run_id  # "": external, until the control plane gave an id
        self.is_named = bool(arguments["run_id"])  # by its start, so that Load Manager knows it by this id
        self.tenant_id = arguments["tenant_id"] or settings.tenant_id
        self.env_id = arguments["env_id"] or settings.env_id
        # W3C Trace Context of whoever asked for the run; our calls carry it back
        traceparent = arguments["lm_traceparent"]
        self.traceparent = traceparent if TRACEPARENT.fullmatch(traceparent) else ""
        self.started_at = time.time()
        self.stopping = False  # test_stopping was seen
        self.ended = gevent.event.Event()
        self.final: Json = {}  # metrics
        self.complete = False  # all workers' last reports are in `final`
        self.closed = False  # the final numbers are delivered, or given up
        self._stop_at = math.inf  # monotonic clock, as the lease
        self._lease_s = 0.0
        self._renewed_at = time.monotonic()
        self._push_interval_s = settings.push_interval_s
        self._warned: set[str] = set()
        self._reporter: gevent.Greenlet | None = None
        self.take_limits(arguments)

    def start(self) -> None:
        gevent.spawn(_logged, self._guard)
        if self._hooks.settings.callbacks:
            self._reporter = gevent.spawn(_logged, self._report)
        else:
            self.closed = True

    def take_limits(self, arguments: dict[str, str]) -> None:
        """From the start, and from a change of users: the newest that was given counts."""
        if _seconds(arguments["lm_stop_after"]):
            self._stop_at = time.monotonic() + _seconds(arguments["lm_stop_after"])
        if _seconds(arguments["lm_lease"]):
            self._lease_s = _seconds(arguments["lm_lease"])
            self.renew()
        if _seconds(arguments["lm_push"]):  # this run's thresholds have short windows
            self._push_interval_s = min(self._push_interval_s, max(0.1, _seconds(arguments["lm_push"])))

    def renew(self) -> None:
        self._renewed_at = time.monotonic()

    def end(self, complete: bool) -> None:
        """Keep the numbers of now: a next test may clear them as soon as the listener returns."""
        self.keep_final(complete)
        self.ended.set()

    def keep_final(self, complete: bool) -> None:
        metrics = metrics_of(self._environment, True, self._hooks.exact, self._hooks.counts)
        # Fewer requests than before: they were reset after the end.
        if metrics["totalRequests"] >= self.final.get("totalRequests", 0):
            self.final, self.complete = metrics, complete

    # The guard: the test ends in time, whatever becomes of the control plane.

    def _guard(self) -> None:
        runner = self._environment.runner
        was_active, idle_since = False, None
        while not self.ended.wait(GUARD_TICK_S):
            self._hooks.take_changed_limits(self)
            self._hooks.counts.resets()  # looked for often, so that none hides behind another
            now = time.monotonic()
            if now >= self._stop_at:
                self._stop(f"run {self.id or '(external)'}: its time is up, stopping the test")
            elif self._lease_s and now >= self._renewed_at + self._lease_s:
                self._stop(
                    f"run {self.id or '(external)'}: nothing heard from the control plane for "
                    f"{self._lease_s:g} s, stopping the test"
                )
            # A master can be set to stopped without a test_stop; without this the run would never end here.
            was_active = was_active or runner.state in ACTIVE_STATES
            idle = (
                was_active
                and not self.stopping
                and runner.state not in ACTIVE_STATES
                and not runner.user_count
            )
            idle_since = (idle_since or now) if idle else None
            if idle_since and now - idle_since > 10:
                self.end(complete=False)

    def _stop(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning(reason)
        stop_load(self._environment)
        self.ended.wait(STOP_AGAIN_AFTER_S)

    # The reporter: the only greenlet of this run that calls the control plane.

    def _report(self) -> None:
        now = time.monotonic()
        attempts, announce_at = 0, now  # math.inf: done
        push_at = now + min(FIRST_PUSH_S, self._push_interval_s)
        if not self.id:
            self._wait_for_earlier_runs()
        while not self.ended.is_set():
            if time.monotonic() >= announce_at:
                announced = self._announce()
                attempts += 1
                # An external test is offered as long as it runs; the id is needed for all the rest.
                done = announced or (self.id and attempts >= START_ATTEMPTS)
                announce_at = math.inf if done else time.monotonic() + _retry_delay_s(attempts)
            if time.monotonic() >= push_at:
                self._push()
                push_at = max(push_at + self._push_interval_s, time.monotonic())
            self.ended.wait(max(0.0, min(announce_at, push_at) - time.monotonic()))
        if not self.complete:
            self._wait_for_late_reports()
        self._deliver_final()

    def _wait_for_earlier_runs(self) -> None:
        """Before their test-stop the control plane could take this test for one of them."""
        deadline = time.monotonic() + FINAL_RETRY_FOR_S + 2 * CALL_TIMEOUT_S
        while self._hooks.has_open_run_before(self) and time.monotonic() < deadline:
            if self.ended.wait(0.1):
                return

    def _announce(self) -> bool:
        """Tell of the start; False: another try is worth it."""
        if self.id:
            answer = self._post("test-start", {**self._identity(), "hooks": HOOKS_VERSION})
            return not answer.away
        answer = self._post("register-external", self._external_identity())
        run_id = answer.body.get("runId")
        if answer.ok and isinstance(run_id, str) and run_id:
            self.id = run_id
            log.info("control plane: this test is run %s", run_id)
        return bool(self.id)

    def _push(self) -> None:
        if self.id:
            metrics = metrics_of(self._environment, False, self._hooks.exact, self._hooks.counts)
            self._post("metrics", {"runId": self.id, "metrics": metrics})

    def _wait_for_late_reports(self) -> None:
        deadline = time.monotonic() + LATE_REPORTS_S
        while (
            self._hooks.is_newest(self)
            and not self._hooks.all_workers_flushed()
            and time.monotonic() < deadline
        ):
            gevent.sleep(0.1)
        if self._hooks.is_newest(self):
            self.keep_final(complete=self._hooks.all_workers_flushed())

    def _deliver_final(self) -> None:
        deadline = time.monotonic() + FINAL_RETRY_FOR_S
        attempts = 0
        while self.id and not self._post_final().ok and time.monotonic() < deadline:
            attempts += 1
            gevent.sleep(_retry_delay_s(attempts))
        self.closed = True

    def deliver_now(self) -> None:
        """One last attempt while the process ends; greenlets die with it."""
        if self._reporter:
            self._reporter.join(timeout=REPORTER_GRACE_S)  # its own delivery is most likely under way
        if self.closed:
            return
        self.closed = True
        if self._reporter:
            self._reporter.kill(block=True, timeout=1)
        if self._hooks.is_newest(self):
            self.keep_final(complete=self._hooks.all_workers_flushed())
        if self.id:
            self._post_final(QUIT_TIMEOUT_S)

    def _post_final(self, timeout_s: float = CALL_TIMEOUT_S) -> Answer:
        body = {**self._identity(), "complete": self.complete}
        if self.final:
            body["finalMetrics"] = self.final
        answer = self._post("test-stop", body, timeout_s)
        if answer.status == 413 and self.final:  # better the totals than nothing
            body["finalMetrics"] = {
                **self.final,
                "requestStats": {},
                "endpointsCut": len(self.final["requestStats"]),
            }
            answer = self._post("test-stop", body, timeout_s)
        if not answer.ok and not answer.away:  # refused: asking again changes nothing
            return Answer(status=200)
        return answer

    def _identity(self) -> Json:
        return {"runId": self.id, "tenantId": self.tenant_id, "envId": self.env_id}

    def _external_identity(self) -> Json:
        runner, options = self._environment.runner, self._environment.parsed_options
        body = {
            "tenantId": self.tenant_id,
            "envId": self.env_id,
            "scenarioId": "ui-started-test",
            "targetUsers": getattr(runner, "target_user_count", None) or getattr(options, "num_users", None),
            "spawnRate": getattr(runner, "spawn_rate", None) or getattr(options, "spawn_rate", None),
            "clusterId": self._hooks.settings.cluster_id,
        }
        return {key: value for key, value in body.items() if value or key in ("tenantId", "envId")}

    def _post(self, call: str, body: Json, timeout_s: float = CALL_TIMEOUT_S) -> Answer:
        answer = self._hooks.control_plane.post(call, body, timeout_s, self.traceparent)
        if answer.ok and call == "metrics":
            self.renew()
        warning = f"control plane: {call} refused: {answer.problem}"
        if not answer.ok and not answer.away and f"{call} {answer.status}" not in self._warned:
            self._warned.add(f"{call} {answer.status}")
            log.warning(warning)
        return answer


def _retry_delay_s(attempts: int) -> float:
    return RETRY_AFTER_S[min(attempts, len(RETRY_AFTER_S)) - 1]


def _logged(function: Callable[[], None]) -> None:
    """An exception that leaves a greenlet would change Locust's exit status."""
    try:
        function()
    except Exception:  # noqa: BLE001
        log.exception("loadmanager_hooks: %s failed; the load is not affected", function.__name__)


def stop_load(environment: Environment) -> None:
    """What POST /stop does. Blocks until the users are gone; not for listeners."""
    runner, web_ui = environment.runner, environment.web_ui
    if getattr(environment.parsed_options, "headless", False):
        runner.quit()  # no one could start another test: end as after --run-time
        return
    _end_ramp(web_ui)
    if runner.state == "stopped" and runner.user_count and hasattr(runner, "update_state"):
        # A test started while Locust was stopping: its own stop() would do nothing.
        runner.update_state("running")
    runner.stop()


def _end_ramp(web_ui: WebUI | None) -> None:
    """POST /stop does this too, but run_time does not: a master whose ramp is still under way then
    goes on sending users to its workers, and ends up running all of them (seen with 2.20 to 2.47)."""
    ramp = getattr(web_ui, "_swarm_greenlet", None)
    if ramp is not None and ramp is not gevent.getcurrent():
        ramp.kill(block=True, timeout=1)


# ---- the master's or standalone Locust's side ----


class Hooks:
    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.settings = Settings()
        self.control_plane = ControlPlane(self.settings)
        self.boot_id = str(uuid.uuid4())
        self.distributed = isinstance(environment.runner, MasterRunner)
        self.locustfile_sha256 = _locustfile_sha256(environment)
        self.scenes = Scenes(environment)
        self.exact = ExactTimes(environment)
        self.counts = ExactCounts(environment)
        self.options = Options(environment)
        self.last_run_id = ""
        self._runs: list[Run] = []  # oldest first: the newest one, and earlier ones not closed yet
        self._worker_ids: set[str] = set()  # connected when the test began to stop
        self._flushed_ids: set[str] = set()

    # events

    def on_test_start(self) -> None:
        self.scenes.choose()
        self.counts.test_started()
        # A start while the test before was still stopping: its numbers are gone now, those of
        # test_stopping stay.
        for earlier in self._runs:
            if not earlier.ended.is_set() and not earlier.stopping:
                earlier.ended.set()
        self._runs = [earlier for earlier in self._runs if not earlier.closed or not earlier.ended.is_set()]
        self._worker_ids, self._flushed_ids = set(), set()
        arguments = self._take_arguments()
        if not arguments["run_id"]:
            self.options.remember()  # what someone chose in Locust's own page stays, as it does without us
        run = Run(self, arguments)
        self._runs.append(run)
        run.start()

    def on_test_stopping(self) -> None:
        self._worker_ids = {worker.id for worker in self._workers()}
        self._flushed_ids = set()
        _end_ramp(self.environment.web_ui)
        if self.distributed:
            # Spawn messages on their way must not reach a worker behind its stop message: its users
            # would go on (2.47).
            gevent.sleep(RAMP_SETTLES_S)
        for run in self._runs:
            if not run.ended.is_set() and not run.stopping:
                run.stopping = True
                run.keep_final(complete=False)

    def on_test_stop(self) -> None:
        run = next((run for run in self._runs if not run.ended.is_set()), None)  # the oldest that did not end
        if run is None:
            return
        self.last_run_id = run.id  # "" after a test of Locust's page: its numbers are no run's
        if not run.stopping:  # an old Locust does not say when it begins to stop
            self._worker_ids = {worker.id for worker in self._workers()}
        if self.is_newest(run):
            run.end(complete=self.all_workers_flushed())
        else:
            run.ended.set()
        self.take_changed_limits(run)  # a change of users just before: its fields must not stay

    def on_worker_report(self, client_id: str, data: Json) -> None:
        self.counts.on_worker_report(client_id)
        self.exact.add_report(data.get(TIMES_MARK))
        if data.get(FLUSH_MARK):
            self._flushed_ids.add(client_id)

    def on_quitting(self) -> None:
        if not self.distributed and self._running() is not None:
            self.environment.runner.stop()  # Locust does it right after; now the numbers are complete
        for run in list(self._runs):
            if not run.ended.is_set():
                run.end(complete=False)
            run.deliver_now()

    # runs

    def is_newest(self, run: Run) -> bool:
        """The statistics are this run's."""
        return self._runs[-1] is run

    def has_open_run_before(self, run: Run) -> bool:
        return any(not earlier.closed for earlier in self._runs[: self._runs.index(run)])

    def all_workers_flushed(self) -> bool:
        return not self.distributed or (bool(self._worker_ids) and self._worker_ids <= self._flushed_ids)

    def _running(self) -> Run | None:
        return next((run for run in reversed(self._runs) if not run.ended.is_set()), None)

    def _workers(self) -> list[WorkerNode]:
        return list(self.environment.runner.clients.values()) if self.distributed else []

    # the fields of the /swarm form: Locust keeps them until they are overwritten

    def _take_arguments(self) -> dict[str, str]:
        """The fields, and clear them, so that the next test does not get them too."""
        options = vars(self.environment.parsed_options) if self.environment.parsed_options else {}
        arguments = {}
        for name in ARGUMENTS:
            arguments[name] = str(options.get(name) or "").strip()
            if name in options:
                options[name] = ""
        return arguments

    def take_changed_limits(self, run: Run) -> None:
        """A change of users sends the fields again, for the same run."""
        if run.id and getattr(self.environment.parsed_options, "run_id", "") == run.id:
            run.take_limits(self._take_arguments())

    # the web UI

    def add_to_web_ui(self, web_ui: WebUI) -> None:
        import flask

        base_path = getattr(self.environment.parsed_options, "web_base_path", None) or None
        routes = flask.Blueprint("loadmanager", __name__, url_prefix=base_path)

        def get_state() -> flask.Response:
            run = self._running()
            if run and self._knows_token(flask.request.headers.get("X-Locust-Token", "")):
                run.renew()
            answer = flask.jsonify(self.state())
            answer.headers["Cache-Control"] = "no-store"
            return answer

        only_logged_in = getattr(web_ui, "auth_required_if_enabled", lambda view: view)
        routes.add_url_rule("/loadmanager/state", "state", only_logged_in(get_state), methods=["GET"])
        web_ui.app.register_blueprint(routes)

        stats_path = (base_path or "").rstrip("/") + "/stats/requests"

        @web_ui.app.after_request
        def stamp_statistics(response: flask.Response) -> flask.Response:
            if flask.request.path == stats_path and response.status_code == 200:
                _quietly(self.counts.stamp, response)
            return response

        self._refuse_late_stops(web_ui, (base_path or "").rstrip("/") + "/stop")
        swarm_path = (base_path or "").rstrip("/") + "/swarm"

        @web_ui.app.before_request
        def forget_stale_arguments() -> None:
            # The UI's form does not have our fields: whatever is left is of a start that never came about.
            request = flask.request
            if request.method != "POST" or request.path != swarm_path:
                return
            if "run_id" not in request.form:
                self._take_arguments()
                vars(self.environment.parsed_options).update(dict.fromkeys(TAG_ARGUMENTS, ""))
            elif self._running() is None:
                # what the form does not name is as at Locust's start, not as in the test before
                self.options.restore()

    def _refuse_late_stops(self, web_ui: WebUI, stop_path: str) -> None:
        """A stop that names its run, and that was long on its way, does not end the next one's test."""
        import flask

        @web_ui.app.before_request
        def refuse_stop_of_another_run() -> flask.typing.ResponseReturnValue | None:
            named = flask.request.args.get("run_id", "")
            run = self._running() if flask.request.path == stop_path and named else None
            if run is None or not run.is_named or run.id == named:
                return None
            words = f"not stopped: run {run.id} is running, and not {named}"
            return flask.jsonify(success=False, message=words, loadmanager_other_run=run.id), 409

    def _knows_token(self, given: str) -> bool:
        wanted = self.settings.token
        return not wanted or hmac.compare_digest(
            given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace")
        )

    def state(self) -> Json:
        runner, total, run = self.environment.runner, self.environment.stats.total, self._running()
        state = runner.state
        if state == "stopped" and run and run.stopping:
            state = "stopping"  # a master says stopped up to 1 s too early: a start now would mix two tests
        return {
            "hooks": HOOKS_VERSION,
            "locustVersion": _locust_version(),
            "bootId": self.boot_id,
            "state": state,
            "userCount": runner.user_count,
            "targetUserCount": getattr(runner, "target_user_count", None),
            "distributed": self.distributed,
            "workers": [
                {
                    "id": worker.id,
                    "state": worker.state,
                    "userCount": getattr(worker, "user_count", None),
                    "cpuPercent": _number(getattr(worker, "cpu_usage", None)),
                }
                for worker in self._workers()
            ],
            "runId": run.id if run else "",
            "lastRunId": self.last_run_id,
            "testStartedAt": run.started_at if run else None,
            "numRequests": total.num_requests,
            "numFailures": total.num_failures,
            **self.counts.to_json(),
            "callbacks": self.settings.callbacks,
            "flush": True,
            "host": _text(self.environment.host),
            "userClasses": [user_class.__name__ for user_class in self.environment.user_classes],
            "availableUserClasses": self._class_names(),
            "classPicker": bool(getattr(self.environment, "available_user_classes", None)),
            "options": self.options.names(),
            "tags": self.scenes.tags(),
            "locustfileSha256": self.locustfile_sha256,
        }

    def _class_names(self) -> list[str]:
        available = getattr(self.environment, "available_user_classes", None)
        return sorted(available or (user_class.__name__ for user_class in self.environment.user_classes))


def _locust_version() -> str:
    import locust

    return str(getattr(locust, "__version__", "") or getattr(locust, "version", ""))


def _locustfile_sha256(environment: Environment) -> str:
    """Of one file: its own SHA-256. Of several: that of their sums in the order of loading. "": not
    readable."""
    paths = getattr(environment, "parsed_locustfiles", None)
    if not paths:
        paths = str(getattr(environment.parsed_options, "locustfile", "") or "").split(",")
    try:
        sums = []
        for path in paths:
            with open(str(path).strip(), "rb") as locustfile:
                sums.append(hashlib.sha256(locustfile.read()).hexdigest())
    except OSError:
        return ""
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


# ---- the workers' side ----


class WorkerHooks:
    def __init__(self, environment: Environment) -> None:
        self._runner = environment.runner
        self._scenes = Scenes(environment)
        self.exact = ExactTimes(environment)
        self._flushing = False

    def on_test_start(self) -> None:
        """Say at once what Locust says as soon as the first user is made.

        A "stop" that comes in between would find a stopped worker and do nothing: its users then start
        all the same, and the master, which counts them as gone, breaks (2.32) or sends the worker away
        (2.47)."""
        self._scenes.choose()
        if self._runner.state == "stopped" and hasattr(self._runner, "update_state"):
            self._runner.update_state("spawning")

    def on_test_stop(self) -> None:
        """Send the last numbers before "stopped": Locust's own last report comes up to 3 s later."""
        send_stats = getattr(self._runner, "_send_stats", None)
        if send_stats is None:
            return
        self._flushing = True
        try:
            send_stats()
        except Exception as exc:  # noqa: BLE001 - the master is gone: no one to tell
            log.debug("last report not sent: %s", exc)
        finally:
            self._flushing = False

    def on_report_to_master(self, data: Json) -> None:
        data[TIMES_MARK] = self.exact.take()
        if self._flushing:
            data[FLUSH_MARK] = True


# ---- listeners ----
# At module level: Locust fires `quitting` in reverse order, so this one comes after the master's own,
# which waits for the workers' last reports. And report_to_master comes before Locust's own listener.

_hooks: Hooks | None = None
_worker_hooks: WorkerHooks | None = None


@events.init_command_line_parser.add_listener
def _add_arguments(parser: Any, **_kwargs: object) -> None:
    for name in (*ARGUMENTS, *TAG_ARGUMENTS):
        option = "--" + name.replace("_", "-")
        try:
            # A default of None would make Locust send it otherwise; the UI's form need not show them.
            parser.add_argument(
                option,
                type=str,
                default="",
                include_in_web_ui=False,
                help="set by Load Manager in the /swarm form",
            )
        except Exception as exc:  # noqa: BLE001 - the locustfile has one of that name: its value will do
            log.debug("%s not added: %s", option, exc)


@events.init.add_listener
def _on_init(environment: Environment, **_kwargs: object) -> None:
    global _hooks, _worker_hooks
    try:
        if isinstance(environment.runner, WorkerRunner):
            _worker_hooks = WorkerHooks(environment)
            environment.events.request.add_listener(_worker_hooks.exact.on_request)
            return
        _hooks = Hooks(environment)
        if not _hooks.distributed:
            environment.events.request.add_listener(_hooks.exact.on_request)
        # Here, and so after Locust's own listener: a worker has flushed when its numbers are in the
        # statistics.
        environment.events.worker_report.add_listener(_on_worker_report)
        if getattr(environment, "web_ui", None) is not None:
            _hooks.add_to_web_ui(environment.web_ui)
    except Exception:  # noqa: BLE001 - an exception in init would end the process
        log.exception("loadmanager_hooks: not all of it works; the load is not affected")


def _quietly(listener: Callable[..., None], *args: object) -> None:
    """An exception that leaves a listener would change Locust's exit status."""
    try:
        listener(*args)
    except Exception:  # noqa: BLE001
        log.exception("loadmanager_hooks: %s failed; the load is not affected", listener.__name__)


@events.test_start.add_listener
def _on_test_start(**_kwargs: object) -> None:
    if _worker_hooks:
        _quietly(_worker_hooks.on_test_start)
    if _hooks:
        _quietly(_hooks.on_test_start)


@events.test_stop.add_listener
def _on_test_stop(**_kwargs: object) -> None:
    if _worker_hooks:
        _quietly(_worker_hooks.on_test_stop)
    if _hooks:
        _quietly(_hooks.on_test_stop)


if hasattr(events, "test_stopping"):

    @events.test_stopping.add_listener
    def _on_test_stopping(**_kwargs: object) -> None:
        if _hooks:
            _quietly(_hooks.on_test_stopping)


@events.report_to_master.add_listener
def _on_report_to_master(data: Json, **_kwargs: object) -> None:
    if _worker_hooks:
        _quietly(_worker_hooks.on_report_to_master, data)


def _on_worker_report(client_id: str, data: Json, **_kwargs: object) -> None:
    if _hooks:
        _quietly(_hooks.on_worker_report, client_id, data)


@events.quitting.add_listener
def _on_quitting(**_kwargs: object) -> None:
    if _hooks:
        _quietly(_hooks.on_quitting)
