#!/usr/bin/env python3
"""Load Manager: a control plane for Locust load testing, in one file.

It starts and stops tests on Locust clusters over a REST API, for many tenants and
environments; collects metrics by polling Locust and from hooks inside Locust; stops each
test on time; remembers every run. Python 3.11 or newer. A YAML configuration needs
PyYAML, a JSON one needs nothing.

    python loadmanager.py -config config.yaml        serve
    python loadmanager.py check -config config.yaml  say every problem of a configuration
    python loadmanager.py run --help                 start a run; --help lists all commands

The sections, each using only names of the sections above it (`grep -n '^# [0-9]*\\. '`):

 1. VOCABULARY      words, units and limits every other section speaks in
 2. ERRORS          what can go wrong, with the HTTP status it becomes
 3. CONFIG          the configuration file: keys, defaults, checks, environment
 4. MODEL           run, snapshot, sample, and their translation to the wire's JSON
 5. VERDICT         did it pass: thresholds, their windows, and two runs compared
 6. RULES           pure decisions: valid requests, scenarios, idle clusters, downsampling
 7. TIME            the steady clock and the one thread that waits for moments
 8. STORE           every run in memory, written through to SQLite or PostgreSQL
 9. LOCUST CLIENT   every call to a Locust master
10. LAUNCHER        Locust clusters started on this machine, and their guard
11. ORCHESTRATOR    starts, monitors, stops, adopts and ends runs
12. SCHEDULES       runs that start by themselves, at moments of a clock on a wall
13. NOTIFICATIONS   what is told to people and programs, at least once
14. REPORTS         a run as a page, as Markdown, as CSV, as JUnit
15. EXCHANGE        a run as a file to carry: export, import, files of a headless Locust
16. HTTP SERVER     connections, strict parsing, one loop for what is in memory
17. EVENTS          changes of runs, told to event streams
18. ACCESS          who a token says the caller is, and how much they may ask
19. SIGN ON         tokens and sign-ins of an identity provider
20. SESSIONS        browsers that signed in, and what they must prove
21. HTTP API        routes, authentication, handlers
22. SERVICE         the whole program put together, and its configuration checked
23. TERMINAL        text, tables and a live view that any terminal can show
24. API CLIENT      which server a command talks to, and requests to it
25. COMMAND LINE    commands, what they take, and what they print
26. DASHBOARD PAGE  what a browser gets at / and at /docs
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import csv
import functools
import gzip
import hashlib
import heapq
import hmac
import html
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

# ============================================================================
# 1. VOCABULARY - words, units and limits every other section speaks in
# ============================================================================

VERSION = "1.0.0"
JSON_TYPE = "application/json"


class RunStatus(str, Enum):
    """Where a run is in its life. The five words of the wire; there are no others."""

    PENDING = "Pending"
    RUNNING = "Running"
    STOPPING = "Stopping"
    FINISHED = "Finished"
    FAILED = "Failed"


# The whole lifecycle. Store.transition() refuses what is not in here.
TRANSITIONS = {
    RunStatus.PENDING: {RunStatus.RUNNING, RunStatus.FAILED},
    RunStatus.RUNNING: {RunStatus.STOPPING, RunStatus.FAILED},
    RunStatus.STOPPING: {RunStatus.FINISHED, RunStatus.FAILED},
    RunStatus.FINISHED: set(),
    RunStatus.FAILED: set(),
}
FINAL = frozenset({RunStatus.FINISHED, RunStatus.FAILED})


class Stage(NamedTuple):
    """A stretch of a run with its own load."""

    users: int
    spawn_rate: float  # users/s
    duration_s: int


STOP_REASONS = ("duration", "user", "threshold", "locust", "lost", "shutdown")
SOURCES = ("api", "ui", "schedule")
NOTIFY_EVENTS = ("started", "finished", "passed", "failed", "aborted", "lost", "scheduleMissed")
ROLES = ("viewer", "operator", "admin")  # each may do what those before it may

# Facts of Locust that the orchestrator builds on (measured on 2.47.0 unless said).
WORKER_REPORT_S = 3.0  # a worker reports its requests every 3 s
STATS_CACHE_S = 2.0  # /stats/requests is cached this long, state included
RUN_TIME_CANCELLED_SINCE = (2, 47)  # before, an old run_time timer kills the next test
MAX_LOCUST_ROWS = 500  # /stats/requests cuts the endpoints here
IDLE_STATES = frozenset({"ready", "stopped"})
LOADED_STATES = frozenset({"spawning", "running"})
CPU_LIMIT_PERCENT = 90.0

RUN_TIME_GRACE_S = 5  # given to Locust beyond the duration, so that we stop first
LOCUST_CALL_S = 10.0  # the whole of one call to a Locust master
LOCUST_STOP_S = 75.0  # /stop blocks until users are gone: stop_timeout + 60 in Locust
LOCUST_ANSWER_BYTES = 8 * 1024 * 1024
IDLE_WAIT_S = 10.0  # how long a create waits for a cluster that is just stopping
STOP_ANSWER_S = 10.0  # how long a stop request waits for the run's end
FINAL_READ_S = 10.0  # how long a run waits for its final numbers
START_SETTLES_S = LOCUST_CALL_S + STATS_CACHE_S + 0.5  # after it, an unanswered start has come or never will
LOOK_S = 5.0  # the whole of one look at a cluster
FIRST_LOOKS_S = 60.0  # so long after its start a run is looked at more often
FIRST_LOOK_INTERVAL_S = 2.0
REPEAT_LOOK_S = 0.3  # after an answer of Locust's cache that was read before
REPLACE_EVERY_S = 15.0  # lost workers of a cluster are replaced
WORKERS_PATIENCE_S = 30.0  # for the workers of a cluster that was just launched
LOG_BYTES = 20 * 1024 * 1024  # of one process of a launched cluster; the end is kept
MAX_LOG_LINES = 2000
MAX_WORKERS = 1000
RETRY_STEPS_S = (0.5, 1.0, 2.0, 4.0, 5.0)  # between tries of a stop; the last repeats

MAX_BODY_BYTES = 1024 * 1024
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
MAX_TEXT = 256  # characters of an id or a name
MAX_METADATA_BYTES = 64 * 1024
MAX_USERS = 100_000_000
MAX_SPAWN_RATE = 1_000_000.0
MAX_DURATION_S = 366 * 24 * 3600
IDEMPOTENCY_KEEP_S = 24 * 3600
MAX_ANNOTATION = 1000  # characters
MAX_ANNOTATIONS = 200  # of one run
MAX_THRESHOLDS = 50  # of one run
MAX_STAGES = 100  # of one run
MAX_LOAD_CHANGES = 1000  # of one run
MAX_SCHEDULES = 1000
MAX_DELIVERIES = 2000  # of notifications that are kept; those that wait are never dropped
DELIVERIES_KEEP_S = 7 * 24 * 3600
MAX_NAMES = 100  # user classes or tags of one run
MAX_THRESHOLD = 1000  # characters of one threshold
LOCUST_WINDOW_S = 10.0  # what Locust's own current percentiles cover
ABORT_LOOK_S = 2.0  # how often a run is looked at that a threshold may abort
MAX_BUCKETS = 5000  # different response times of one endpoint; Locust's rounding makes some hundred
NOISE_BLOCKS = 20  # time blocks of a run by which it is judged how much it scatters

# Exit statuses of the commands; 99 is what k6 has for thresholds.
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_THRESHOLDS, EXIT_INTERRUPTED = 0, 1, 2, 3, 99, 130
DEFAULT_CONFIG = "config.yaml"


def log(event: str, **facts: object) -> None:
    """Write one line to stderr: moment, event, facts. Control characters are escaped,
    so that no input can forge a line; never pass a token or a header."""
    line = " ".join([event] + [f"{name}={_log_word(value)}" for name, value in facts.items()])
    moment = utc_text(time.time())
    try:
        sys.stderr.write(f"{moment} {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # the terminal is gone; the runs go on


def _log_word(value: object) -> str:
    text = str(value)
    if text.isprintable() and " " not in text and '"' not in text and text:
        return text
    return json.dumps(text)


def utc_text(epoch_s: float) -> str:
    """RFC 3339 in UTC with milliseconds, e.g. `2026-11-23T12:00:00.123Z`."""
    whole, millis = divmod(math.floor(epoch_s * 1000 + 0.01), 1000)  # a moment read back is the same moment
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{millis:03d}Z"


RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def parse_utc(text: object) -> float:
    """Epoch seconds of an RFC 3339 text with offset; ValueError for anything else."""
    import datetime

    match = RFC3339.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError("allowed is an RFC 3339 moment such as 2026-11-23T12:00:00Z")
    year, month, day, hour, minute, second, fraction, offset = match.groups()
    if int(year) < 1970:
        raise ValueError("allowed is a moment from 1970 on")
    if second == "60":  # a leap second is the end of its minute
        second = "59"
    zone = 0 if offset in "Zz" else (int(offset[1:3]) * 3600 + int(offset[4:]) * 60)
    zone = -zone if offset[0] == "-" else zone
    moment = datetime.datetime(
        int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=datetime.UTC
    )
    return moment.timestamp() - zone + float(fraction or 0)


# ============================================================================
# 2. ERRORS - what can go wrong, with the HTTP status it becomes
# ============================================================================


class LoadManagerError(Exception):
    """Root of every error a caller may see.

    http_status: the status of the answer; error: its short name; extra: more keys of
    the answer's body; retry_after_s: becomes Retry-After."""

    http_status = 500
    error = "internal error"
    caller: Any = None  # the Principal that was refused, where only who raises this knows it

    def __init__(self, message: str, retry_after_s: int | None = None, **extra: object):
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.extra = extra


class InvalidInput(LoadManagerError):
    """Something in the request is not allowed; `fields` names all of it at once."""

    http_status, error = 400, "invalid input"

    def __init__(self, message: str, fields: dict[str, str] | None = None):
        super().__init__(message, **({"fields": fields} if fields else {}))


class InvalidValue(ValueError):
    """A value that is refused with words of its own, which go to the caller as they are."""


class Unauthorized(LoadManagerError):
    http_status, error = 401, "unauthorized"


class Forbidden(LoadManagerError):
    """Not allowed to this caller; `fields` names what of the request is not."""

    http_status, error = 403, "forbidden"

    def __init__(self, message: str, fields: dict[str, str] | None = None):
        super().__init__(message, **({"fields": fields} if fields else {}))


class NotFound(LoadManagerError):
    http_status, error = 404, "not found"


class NotYours(NotFound):
    """It is there, and the caller may not know: answered as what is not there."""


class MethodNotAllowed(LoadManagerError):
    http_status, error = 405, "method not allowed"

    def __init__(self, message: str, allow: str):
        super().__init__(message)
        self.allow = allow


class Conflict(LoadManagerError):
    http_status, error = 409, "conflict"


class ClusterBusy(Conflict):
    """Another test has the cluster: ours (`activeRunId`) or one we did not start."""

    error = "cluster busy"


class TooLarge(LoadManagerError):
    http_status, error = 413, "body too large"


class UnsupportedMediaType(LoadManagerError):
    http_status, error = 415, "unsupported media type"


class KeyReused(LoadManagerError):
    http_status, error = 422, "idempotency key reused"


class TooManyRequests(LoadManagerError):
    http_status, error = 429, "too many requests"


class NotReady(LoadManagerError):
    """Shutting down, or the store cannot be written at the moment."""

    http_status, error = 503, "not ready"


class KeysNeeded(NotReady):
    """Whether a token counts cannot be said before keys were read: `read_soon` has it done,
    and calls what it is given once that is over."""

    def __init__(self, read_soon: Callable[[Callable[[], None]], None]):
        super().__init__(
            "the identity provider's keys are being read; try again in a moment", retry_after_s=1
        )
        self.read_soon = read_soon


class ProviderFailed(LoadManagerError):
    http_status, error = 502, "identity provider failed"


class LocustError(LoadManagerError):
    """Root of what a Locust master can do to us. `maybe_taken`: the request may have
    been carried out although no good answer came."""

    http_status, error = 502, "Locust failed"
    maybe_taken = False


class LocustUnreachable(LocustError):
    error = "Locust unreachable"


class LocustRefused(LocustError):
    """Locust said no. It says so with HTTP 200 and success: false, so the body is read."""

    error = "Locust refused"


class DeliveryFailed(LoadManagerError):
    """A notification could not be delivered when it was asked for."""

    http_status, error = 502, "not delivered"


class LocustBadAnswer(LocustError):
    error = "Locust answered nonsense"
    maybe_taken = True


class LocustTimeout(LocustError):
    http_status, error = 504, "Locust did not answer in time"
    maybe_taken = True


class ConfigError(Exception):
    """Every problem of a configuration at once: `problems`, a line each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class StartupError(Exception):
    """The program cannot start: one line that says what to do; exit status 1."""


class CommandError(Exception):
    """A command cannot go on: one line that says what to do, and the exit status."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.message = message
        self.exit_status = exit_status


class ServerGone(CommandError):
    """The server of a command does not answer. `maybe_taken`: the request was sent."""

    def __init__(self, message: str, maybe_taken: bool):
        super().__init__(message, EXIT_UNREACHABLE)
        self.maybe_taken = maybe_taken


class ServerRefused(CommandError):
    """The server of a command answered with an error: its HTTP status and its JSON."""

    EXITS = {
        409: EXIT_FAILED,
        401: EXIT_UNREACHABLE,
        403: EXIT_UNREACHABLE,
        429: EXIT_UNREACHABLE,
        503: EXIT_UNREACHABLE,
    }

    def __init__(self, message: str, http_status: int, document: dict[str, Any]):
        super().__init__(
            message, self.EXITS.get(http_status, EXIT_USAGE if http_status < 500 else EXIT_FAILED)
        )
        self.http_status = http_status
        self.document = document


# ============================================================================
# 3. CONFIG - the configuration file: keys, defaults, checks, environment
# ============================================================================
# A section is a frozen dataclass; each field is declared once by setting(), which holds the
# key's name in the file, its default, its check and its meaning. The loader, the
# environment overrides, `check` and the README's table all read these declarations.

REQUIRED = object()
RESERVED_NAMES = ("api", "anonymous", "locust", "schedule", "sso")  # of callers that are no token of a list
EXAMPLE_TOKENS = ("change-me-api-token", "change-me-callback-token")


@dataclass(frozen=True)
class Check:
    """One kind of value: `allowed` in words; `accept` converts or raises ValueError."""

    allowed: str
    accept: Callable[[Any], Any]
    from_text: Callable[[str], Any] = str  # how an environment variable's text is read
    schema: dict[str, Any] = field(
        default_factory=lambda: {"type": "string"}, compare=False
    )  # for the API's document


def text_value(allowed: str = "a non-empty string", pattern: str | None = None, empty: bool = False) -> Check:
    def accept(value: Any) -> str:
        if not isinstance(value, str) or (not value and not empty) or not value.isprintable():
            raise ValueError
        if value and pattern and not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Check(allowed, accept, schema={"type": "string"} if empty else {"type": "string", "minLength": 1})


def number_value(lowest: float, highest: float, whole: bool = False) -> Check:
    kind = "a whole number" if whole else "a number"

    def accept(value: Any) -> float:
        good = isinstance(value, int) or (isinstance(value, float) and not whole)
        if isinstance(value, bool) or not good or not lowest <= value <= highest:
            raise ValueError
        return value

    def from_text(text: str) -> Any:
        try:
            return int(text) if re.fullmatch(r"-?[0-9]{1,15}", text) else float(text)
        except ValueError:
            return text

    schema = {"type": "integer" if whole else "number", "minimum": lowest, "maximum": highest}
    return Check(f"{kind} from {_plain(lowest)} to {_plain(highest)}", accept, from_text, schema)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _accept_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


BOOLEAN = Check(
    "true or false",
    _accept_boolean,
    lambda text: {"true": True, "false": False}.get(text.lower(), text),
    {"type": "boolean"},
)


def one_of(*words: str) -> Check:
    return replace(
        text_value(" or ".join(words), "|".join(words)), schema={"type": "string", "enum": list(words)}
    )


def _accept_base_url(value: Any) -> str:
    """http(s)://host[:port][/path] without user, query, fragment or odd characters:
    what goes into a request line unquoted must not be able to break it."""
    if not isinstance(value, str) or not re.fullmatch(
        r"https?://[A-Za-z0-9._\-\[\]:]+(/[A-Za-z0-9._~/\-]*)?", value
    ):
        raise ValueError
    parts = urlsplit(value)
    if not parts.hostname or parts.port == 0:  # .port raises ValueError beyond 65535
        raise ValueError
    return value.rstrip("/")


def _accept_host_names(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError
    names = [name.strip().lower() for name in names]
    if not all(re.fullmatch(r"[a-z0-9._-]{1,253}", name) for name in names):
        raise ValueError
    return tuple(names)


def _accept_names(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_NAMES:
        raise ValueError
    if not all(
        isinstance(name, str) and re.fullmatch(r"[^\s,<>]{1,128}", name) and name.isprintable()
        for name in names
    ):
        raise ValueError
    return tuple(dict.fromkeys(names))


def _accept_arguments(value: Any) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= 100
        or not all(isinstance(word, str) and "\0" not in word for word in value)
        or not value[0]
    ):
        raise ValueError
    return tuple(value)


def _accept_options(value: Any) -> dict[str, Any]:
    """Custom arguments of a locustfile, by the names of the command line or of Python."""
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        raise ValueError
    options = {str(name).lstrip("-").replace("-", "_"): entry for name, entry in value.items()}
    for name, entry in options.items():
        if (
            not re.fullmatch(r"[A-Za-z]\w{0,99}", name, re.ASCII)
            or type(entry) not in (str, int, float, bool)
            or len(str(entry)) > 4000
        ):
            raise ValueError
        if type(entry) is float and not math.isfinite(entry):
            raise ValueError
        if name in SWARM_FIELDS:
            raise ValueError(f"{name} is not a custom option")
    return options


def _accept_stages(value: Any) -> tuple[Stage, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_STAGES:
        raise ValueError
    checks = {"targetUsers": USERS, "spawnRate": SPAWN_RATE, "durationSeconds": DURATION}
    stages = []
    for stage in value:
        if not isinstance(stage, dict) or set(stage) != set(checks):
            raise ValueError
        stages.append(Stage(*(check.accept(stage[name]) for name, check in checks.items())))
    if sum(stage.duration_s for stage in stages) > MAX_DURATION_S:
        raise ValueError
    return tuple(stages)


SWARM_FIELDS = frozenset(  # of Locust's /swarm form; ours and its own
    "user_count spawn_rate host run_time user_classes shape_class profile run_id tenant_id env_id lm_stop_after lm_lease lm_push lm_tags lm_exclude_tags"
    " tags exclude_tags num_users users".split()
)
USERS = number_value(1, MAX_USERS, whole=True)
SPAWN_RATE = number_value(0.1, MAX_SPAWN_RATE)
DURATION = number_value(1, MAX_DURATION_S, whole=True)
NAMES = Check(
    f"a list of 1 to {MAX_NAMES} names", _accept_names, schema={"type": "array", "items": {"type": "string"}}
)
OPTIONS = Check(
    f"an object of at most {MAX_NAMES} custom arguments of the locustfile: names to texts, numbers, true or false",
    _accept_options,
    schema={"type": "object"},
)
STAGES = Check(
    f"a list of 1 to {MAX_STAGES} objects with targetUsers (from 1), spawnRate (from 0.1) and durationSeconds (from 1)", _accept_stages,
    schema={"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": MAX_STAGES},
)  # fmt: skip
ARGUMENT_LIST = Check(
    "a list of program and arguments, which no shell reads",
    _accept_arguments,
    schema={"type": "array", "items": {"type": "string"}},
)


def _accept_mail_address(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(
        r"(?:[^<>@\s]+(?: [^<>@\s]+)* )?<?[^<>@\s,;]{1,64}@[A-Za-z0-9.\-]{1,255}>?", value
    ):
        raise ValueError
    return value


def _accept_mail_addresses(value: Any) -> tuple[str, ...]:
    addresses = [value] if isinstance(value, str) else value
    if not isinstance(addresses, list) or not 1 <= len(addresses) <= MAX_NAMES:
        raise ValueError
    return tuple(_accept_mail_address(address) for address in addresses)


def _accept_events(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not set(names) <= set(NOTIFY_EVENTS):
        raise ValueError
    return tuple(names)


def _accept_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError
    return value


MAPPING = Check("a mapping", _accept_mapping, schema={"type": "object"})
MAIL_ADDRESS = Check("a mail address", _accept_mail_address)
MAIL_ADDRESSES = Check("a list of mail addresses", _accept_mail_addresses)
EVENT_NAMES = Check("a list of " + ", ".join(NOTIFY_EVENTS), _accept_events)
RAW_LIST = Check(
    "a list",
    lambda value: value if isinstance(value, list) else _accept_names(None),
    schema={"type": "array"},
)


def _accept_words(value: Any) -> tuple[str, ...]:
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not words:
        raise ValueError
    if not all(
        isinstance(word, str) and word and len(word) <= MAX_TEXT and word.isprintable() for word in words
    ):
        raise ValueError
    return tuple(words)


def _accept_networks(value: Any) -> tuple[str, ...]:
    return tuple(
        str(ipaddress.ip_network(word, strict=False))
        for word in (_accept_words(value) if value != [] else ())
    )


def _accept_expiry(value: Any) -> float:
    """RFC 3339, or a day, which ends at its start in UTC; YAML makes dates of either."""
    import datetime

    if isinstance(value, datetime.date):
        value = (
            value.isoformat()
            if not isinstance(value, datetime.datetime) or value.tzinfo
            else f"{value.isoformat()}Z"
        )
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        value += "T00:00:00Z"
    return parse_utc(value)


HOST_PATTERN = re.compile(
    r"(?P<name>\*|(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\]|[0-9.]+/[0-9]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*/[0-9]+)(?::(?P<port>[0-9]{1,5}))?"
)


def _accept_host_patterns(value: Any) -> tuple[str, ...]:
    patterns = _accept_words(value)
    for pattern in patterns:
        match = HOST_PATTERN.fullmatch(pattern)
        if match is None or not 0 < int(match.group("port") or 1) < 65536:
            raise ValueError
        if "/" in match.group("name"):
            ipaddress.ip_network(match.group("name"), strict=False)
    return patterns


def _accept_role_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(word, str) and word and role in ROLES for word, role in value.items()
    ):
        raise ValueError
    return value


def _accept_jwt_algorithms(value: Any) -> tuple[str, ...]:
    words = _accept_words(value)
    if not set(words) <= set(JWT_ALGORITHMS):
        raise ValueError
    return words


JWT_ALGORITHMS = {  # RFC 7518 and 8037: the algorithm and the kind of key it takes
    "HS256": "oct", "RS256": "RSA", "RS384": "RSA", "RS512": "RSA", "ES256": "EC", "ES384": "EC", "ES512": "EC", "EdDSA": "OKP",
}  # fmt: skip
BASE_URL = Check("http(s)://host[:port][/path]", _accept_base_url)
WORDS = Check("a list of names", _accept_words)
NETWORKS = Check("a list of addresses or networks such as 10.0.0.0/8", _accept_networks)
EXPIRY = Check("an RFC 3339 moment or a day such as 2027-01-31", _accept_expiry)
HOST_PATTERNS = Check(
    "a list of host, *.host, address or network, each with or without :port", _accept_host_patterns
)
ROLE_MAP = Check("a mapping of words of the claim to " + ", ".join(ROLES), _accept_role_map)
ALGORITHMS = Check("a list of " + ", ".join(JWT_ALGORITHMS), _accept_jwt_algorithms)
HOST_NAMES = Check("a list of host names without ports", _accept_host_names)
ID_TEXT = text_value(f"a string of 1 to {MAX_TEXT} printable characters", r"(?s:.{1,%d})" % MAX_TEXT)
URL_TEXT = text_value("an http(s) URL", r"https?://[^\s/@?#]+[^\s@#]*")
STORAGE_URL = text_value(
    "memory: or sqlite:///file or postgresql://user@host/database", r"memory:|sqlite:///.+|postgres(ql)?://.+"
)


def setting(name: str, default: Any, check: Any, about: str, secret: bool = False) -> Any:
    """Declare a configuration key: its name in the file, default (REQUIRED: none), check
    (a Check, a section class, or [section class] for a list of them) and meaning."""
    meta = {"name": name, "check": check, "about": about, "secret": secret, "default": default}
    if isinstance(check, list):
        return field(default=(), metadata=meta)
    if default is REQUIRED:
        return field(default="", metadata=meta)
    if isinstance(check, type) and default is not None:
        return field(default_factory=check, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ServerTlsConfig:
    """https of our own. The files are read again when they change."""

    cert_file: str = setting(
        "certFile", REQUIRED, text_value("a file name"), "our certificate and those that signed it, PEM"
    )
    key_file: str = setting(
        "keyFile", REQUIRED, text_value("a file name"), "its private key, PEM, without a password"
    )
    client_ca_file: str | None = setting(
        "clientCaFile",
        None,
        text_value("a file name"),
        "every client must show a certificate signed by one of these",
    )


@dataclass(frozen=True)
class ServerConfig:
    """Where Load Manager listens."""

    host: str = setting("host", "127.0.0.1", text_value("a host name or address"), "address to listen on")
    port: int = setting(
        "port", 8080, number_value(0, 65535, whole=True), "port to listen on; 0 takes a free one"
    )
    max_connections: int = setting(
        "maxConnections",
        4000,
        number_value(16, 100_000, whole=True),
        "open connections; beyond, the idlest is closed",
    )
    public_url: str | None = setting(
        "publicUrl",
        None,
        BASE_URL,
        "the address browsers use, when another than host and port (a proxy, a DNS name)",
    )
    allowed_hosts: tuple[str, ...] = setting(
        "allowedHosts", (), HOST_NAMES, "more host names under which a browser may sign in"
    )
    tls: ServerTlsConfig | None = setting("tls", None, ServerTlsConfig, "serve https instead of http")
    trusted_proxies: tuple[str, ...] = setting(
        "trustedProxies", (), NETWORKS, "proxies whose X-Forwarded-For tells the client's address"
    )


@dataclass(frozen=True)
class TlsConfig:
    """How an https Locust is trusted."""

    ca_file: str | None = setting(
        "caFile", None, text_value("a file name"), "certificates to trust instead of the system's"
    )
    insecure_skip_verify: bool = setting(
        "insecureSkipVerify", False, BOOLEAN, "accept any certificate (a risk)"
    )


@dataclass(frozen=True)
class LauncherConfig:
    """A cluster whose processes, or whose workers, Load Manager starts itself."""

    type: str = setting(
        "type",
        "process",
        one_of("process", "command"),
        "process: master and workers are processes of this machine; command: workers come by commands of yours",
    )
    locustfile: str | None = setting(
        "locustfile",
        None,
        text_value("a file name"),
        "process: the locustfile, relative to this file; needed",
    )
    workers: int = setting(
        "workers", 2, number_value(1, MAX_WORKERS, whole=True), "process: worker processes at the start"
    )
    users_per_worker: int | None = setting(
        "usersPerWorker",
        None,
        USERS,
        "a run brings up as many workers as its users need; default: workers are not counted",
    )
    max_workers: int = setting(
        "maxWorkers", 32, number_value(1, MAX_WORKERS, whole=True), "never more workers than these"
    )
    scale_timeout_s: float = setting(
        "scaleTimeoutSeconds",
        60.0,
        number_value(1, 3600),
        "how long a run waits for its workers, and a command may take",
    )
    idle_s: float | None = setting(
        "idleSeconds",
        None,
        number_value(1, 86400),
        "after so long without a run the cluster is stopped (process) or scaled to 0 (command); default: never",
    )
    replace_lost_workers: bool = setting(
        "replaceLostWorkers",
        False,
        BOOLEAN,
        "command: scale again when workers of a run are lost; processes are always restarted",
    )
    scale: tuple[str, ...] = setting(
        "scale", (), ARGUMENT_LIST, "command: program and arguments that make the workers {workers} in number"
    )
    status: tuple[str, ...] = setting(
        "status",
        (),
        ARGUMENT_LIST,
        "command: program and arguments that print how many workers there are, or a line for each",
    )
    host: str | None = setting("host", None, BASE_URL, "target given to Locust as --host")
    python: str | None = setting(
        "python",
        None,
        text_value("a file name"),
        "the Python that has Locust; default: the one running Load Manager",
    )


@dataclass(frozen=True)
class ClusterConfig:
    """One Locust master with its workers."""

    id: str = setting("id", REQUIRED, ID_TEXT, "unique name of the cluster")
    base_url: str | None = setting(
        "baseUrl", None, BASE_URL, "the Locust master's web address; absent with a launcher"
    )
    tenant_id: str = setting("tenantId", REQUIRED, ID_TEXT, "tenant it serves")
    env_id: str = setting("envId", REQUIRED, ID_TEXT, "environment it serves")
    auth_token: str = setting(
        "authToken",
        "",
        text_value("a string", empty=True),
        "sent to Locust as a Bearer token, for a proxy",
        secret=True,
    )
    username: str = setting(
        "username", "", text_value("a string", empty=True), "for a Locust with --web-login"
    )
    password: str = setting(
        "password", "", text_value("a string", empty=True), "for a Locust with --web-login", secret=True
    )
    tls: TlsConfig = setting("tls", {}, TlsConfig, "for an https baseUrl")
    callback_token: str = setting(
        "callbackToken",
        "",
        text_value("a string", empty=True),
        "secret of this cluster's callbacks, instead of locustCallbackToken",
        secret=True,
    )
    launcher: LauncherConfig | None = setting(
        "launcher", None, LauncherConfig, "start the cluster on this machine"
    )


@dataclass(frozen=True)
class ApiTokenConfig:
    """A token of the API, and what its bearer may do."""

    name: str = setting(
        "name",
        REQUIRED,
        text_value("1 to 64 of A-Z a-z 0-9 . _ @ -", r"[A-Za-z0-9._@-]{1,64}"),
        "who it is: runs and the audit name it",
    )
    token_sha256: str = setting(
        "tokenSha256",
        "",
        text_value("64 hexadecimal digits", r"[0-9A-Fa-f]{64}", empty=True),
        "SHA-256 of the token; `token new` prints it",
    )
    token: str = setting(
        "token",
        "",
        text_value("a string", empty=True),
        "the token itself, instead of tokenSha256",
        secret=True,
    )
    role: str = setting(
        "role",
        REQUIRED,
        one_of(*ROLES),
        "viewer reads, operator also starts and stops, admin also reads the audit",
    )
    tenants: tuple[str, ...] = setting(
        "tenants", (), WORDS, "the tenants it sees and touches; * for all; an admin without has all"
    )
    environments: tuple[str, ...] = setting(
        "environments", (), WORDS, "the environments of these; absent: all"
    )
    expires_at: float | None = setting("expiresAt", None, EXPIRY, "refused from this moment on")


@dataclass(frozen=True)
class JwtConfig:
    """JSON Web Tokens (RFC 7519) of a single sign-on, as Bearer tokens."""

    issuer: str = setting("issuer", REQUIRED, text_value(), "what the claim iss must be")
    audience: str = setting("audience", REQUIRED, text_value(), "what the claim aud must be or hold")
    jwks_url: str | None = setting("jwksUrl", None, URL_TEXT, "where the issuer's public keys are")
    jwks_file: str | None = setting(
        "jwksFile",
        None,
        text_value("a file name"),
        "a file with the issuer's public keys (JWKS), where there is no network",
    )
    secret: str = setting(
        "secret", "", text_value("a string", empty=True), "the shared secret of HS256", secret=True
    )
    algorithms: tuple[str, ...] = setting(
        "algorithms",
        (),
        ALGORITHMS,
        "accepted signatures; default HS256 with a secret, else RS256, ES256, EdDSA",
    )
    leeway_s: float = setting("leewaySeconds", 30.0, number_value(0, 600), "how far clocks may differ")
    tenants_claim: str = setting(
        "tenantsClaim",
        "tenants",
        text_value(),
        "the claim with the tenants, a list or words; * for all; a.b for a nested one",
    )
    name_claim: str = setting(
        "nameClaim", "sub", text_value(), "the claim that names the caller in runs and the audit, after sso:"
    )
    role_claim: str = setting(
        "roleClaim", "role", text_value(), "the claim with the role or roles; the highest counts"
    )
    role_map: dict[str, str] | None = setting(
        "roleMap", None, ROLE_MAP, "what words of that claim mean; without, they are the roles themselves"
    )


@dataclass(frozen=True)
class OidcConfig:
    """Signing in to the dashboard by OpenID Connect (authorization code with PKCE)."""

    issuer: str = setting(
        "issuer", REQUIRED, URL_TEXT, "the provider; its /.well-known/openid-configuration is read"
    )
    client_id: str = setting("clientId", REQUIRED, text_value(), "our name there")
    client_secret: str = setting(
        "clientSecret",
        "",
        text_value("a string", empty=True),
        "our secret there; none for a public client",
        secret=True,
    )
    redirect_url: str = setting(
        "redirectUrl", REQUIRED, URL_TEXT, "our /session/oidc/callback as browsers reach it"
    )
    scopes: str = setting(
        "scopes",
        "openid profile email",
        text_value(),
        "what is asked for, joined by blanks; openid must be one",
    )


@dataclass(frozen=True)
class TenantConfig:
    """What the loads of a tenant may be."""

    id: str = setting("id", REQUIRED, ID_TEXT, "the tenant")
    max_users: int | None = setting("maxUsers", None, USERS, "users of all its runs at the same time")
    max_concurrent_runs: int | None = setting(
        "maxConcurrentRuns", None, number_value(1, 100_000, whole=True), "runs at the same time"
    )
    max_duration_s: int | None = setting(
        "maxDurationSeconds",
        None,
        number_value(1, MAX_DURATION_S, whole=True),
        "the longest run; one without an end is refused",
    )
    allowed_hosts: tuple[str, ...] = setting(
        "allowedHosts", (), HOST_PATTERNS, "the only targets its loads may aim at"
    )


@dataclass(frozen=True)
class EnvironmentConfig:
    """What loads on one environment of a tenant need."""

    tenant_id: str = setting("tenantId", REQUIRED, ID_TEXT, "whose environment")
    id: str = setting("id", REQUIRED, ID_TEXT, "the environment")
    protected: bool = setting("protected", False, BOOLEAN, "a start must say confirm: <the environment's id>")
    allowed_hosts: tuple[str, ...] = setting(
        "allowedHosts", (), HOST_PATTERNS, "the only targets loads on it may aim at"
    )


@dataclass(frozen=True)
class AuditConfig:
    """Who did what, kept in the database and, if asked, in a file."""

    file: str | None = setting(
        "file", None, text_value("a file name"), "also append each entry to this file, as a line of JSON"
    )


@dataclass(frozen=True)
class LimitsConfig:
    """How much one caller may ask. A normal user never meets the defaults."""

    requests_per_s: float = setting(
        "requestsPerSecond", 1_000_000.0, number_value(1, 10_000_000), "requests of one token in a second"
    )
    event_streams: int = setting(
        "eventStreams",
        1000,
        number_value(1, 100_000, whole=True),
        "event streams of one token at the same time",
    )
    body_bytes: int = setting(
        "bodyBytes",
        MAX_BODY_BYTES,
        number_value(1024, 64 * MAX_BODY_BYTES, whole=True),
        "the largest body of a request",
    )
    callback_bytes: int = setting(
        "callbackBytes",
        8 * MAX_BODY_BYTES,
        number_value(1024, 64 * MAX_BODY_BYTES, whole=True),
        "the largest body of a callback from Locust",
    )


@dataclass(frozen=True)
class SecurityConfig:
    """Who may call."""

    callback_token: str = setting(
        "locustCallbackToken",
        "",
        text_value("a string", empty=True),
        "shared secret of callbacks from Locust",
        secret=True,
    )
    api_token: str = setting(
        "apiToken", "", text_value("a string", empty=True), "Bearer token of an administrator", secret=True
    )
    api_tokens: tuple[ApiTokenConfig, ...] = setting(
        "apiTokens", (), [ApiTokenConfig], "more tokens, each with a role and tenants"
    )
    jwt: JwtConfig | None = setting("jwt", None, JwtConfig, "accept the tokens of a single sign-on")
    oidc: OidcConfig | None = setting("oidc", None, OidcConfig, "sign in to the dashboard by OpenID Connect")
    allow_anonymous: bool = setting("allowAnonymous", False, BOOLEAN, "serve without tokens (a risk)")

    @property
    def is_open(self) -> bool:
        """Anybody may call: no way to prove who one is, is configured."""
        return not (self.api_token or self.api_tokens or self.jwt or self.oidc)


@dataclass(frozen=True)
class OrchestratorConfig:
    """How runs are watched."""

    poll_interval_s: float = setting(
        "metricsPollIntervalSeconds",
        2.0,
        number_value(0.1, 3600),
        "seconds between two readings of a cluster; Locust itself has new numbers every 2 s",
    )
    start_timeout_s: float = setting(
        "startTimeoutSeconds",
        15.0,
        number_value(1, 3600),
        "seconds for Locust to prove that the test started",
    )
    lost_after_s: float = setting(
        "lostAfterSeconds",
        60.0,
        number_value(1, 86400),
        "seconds of silence after which a cluster counts as lost",
    )
    lease_s: float = setting(
        "leaseSeconds",
        300.0,
        number_value(0, 86400),
        "a run without duration ends when unheard for so long; 0: never",
    )
    on_shutdown: str = setting(
        "onShutdown", "leave", one_of("leave", "stop"), "what SIGTERM does to running loads"
    )


@dataclass(frozen=True)
class StorageConfig:
    """Where runs are kept."""

    url: str = setting(
        "url",
        "sqlite:///loadmanager.db",
        STORAGE_URL,
        "a relative SQLite file lies beside this file",
        secret=True,
    )
    retention_days: float = setting(
        "retentionDays",
        90.0,
        number_value(0, 36500),
        "days after which a final run and its samples go; 0: never",
    )


@dataclass(frozen=True)
class ScenarioConfig:
    """What a scenarioId means: all that a create may leave out."""

    id: str = setting("id", REQUIRED, ID_TEXT, "the scenarioId")
    description: str = setting("description", "", text_value("a string", empty=True), "for those who choose")
    host: str | None = setting("host", None, BASE_URL, "the target system")
    user_classes: tuple[str, ...] = setting("userClasses", (), NAMES, "the user classes to run; default: all")
    tags: tuple[str, ...] = setting("tags", (), NAMES, "run only tasks with one of these tags")
    exclude_tags: tuple[str, ...] = setting("excludeTags", (), NAMES, "run no tasks with one of these tags")
    locustfile: str | None = setting(
        "locustfile", None, text_value("a file name"), "what a launched cluster runs, relative to this file"
    )
    options: dict[str, Any] | None = setting("options", None, OPTIONS, "custom arguments of the locustfile")
    target_users: int | None = setting("targetUsers", None, USERS, "users at the same time")
    spawn_rate: float | None = setting("spawnRate", None, SPAWN_RATE, "users started per second")
    duration_s: int | None = setting("durationSeconds", None, DURATION, "how long")
    stages: tuple[Stage, ...] = setting("stages", (), STAGES, "instead of the three numbers")
    thresholds: tuple[Any, ...] = setting("thresholds", (), RAW_LIST, "as on create")
    tenants: tuple[str, ...] = setting("tenants", (), NAMES, "who may run it; default: all")


@dataclass(frozen=True)
class ScheduleConfig:
    """A run that starts by itself."""

    id: str = setting("id", REQUIRED, ID_TEXT, "unique name of the schedule")
    description: str | None = setting(
        "description", None, text_value("a string", empty=True), "for those who read it"
    )
    cron: str | None = setting(
        "cron", None, text_value(), "when: five fields such as 0 2 * * mon-fri, or @daily"
    )
    timezone: str | None = setting(
        "timezone", None, text_value(), "IANA name of the clock that cron means; default: UTC"
    )
    run_at: str | None = setting(
        "runAt", None, text_value(), "instead of cron: once, an RFC 3339 moment in quotes"
    )
    policy: str | None = setting(
        "concurrencyPolicy",
        None,
        one_of("Forbid", "Queue", "Replace"),
        "while its last run is still active: not again, wait, or stop that one; default: Forbid",
    )
    deadline_s: float | None = setting(
        "startingDeadlineSeconds",
        None,
        number_value(1, 7 * 86400),
        "how late a missed run may still start; default: 300",
    )
    paused: bool | None = setting("paused", None, BOOLEAN, "never for now")
    test: dict[str, Any] = setting("test", REQUIRED, MAPPING, "the body of a create")


@dataclass(frozen=True)
class SmtpConfig:
    """The mail server of an email notification."""

    host: str = setting("host", "", text_value("a host name"), "the mail server")
    port: int = setting("port", 587, number_value(1, 65535, whole=True), "its port")
    security: str = setting(
        "security", "starttls", one_of("starttls", "tls", "none"), "how the connection is protected"
    )
    username: str = setting("username", "", text_value("a string", empty=True), "to sign in with")
    password: str = setting(
        "password", "", text_value("a string", empty=True), "to sign in with", secret=True
    )
    ca_file: str | None = setting(
        "caFile", None, text_value("a file name"), "certificates to trust instead of the system's"
    )


@dataclass(frozen=True)
class NotificationConfig:
    """Who is told of what."""

    id: str = setting("id", REQUIRED, ID_TEXT, "unique name of the notification")
    type: str = setting(
        "type",
        REQUIRED,
        one_of("slack", "webhook", "email"),
        "slack: an incoming webhook; webhook: any receiver",
    )
    url: str = setting("url", "", URL_TEXT, "slack and webhook: where to", secret=True)
    secret: str = setting(
        "secret",
        "",
        text_value("whsec_ and base64", empty=True),
        "webhook: signs each message, as Standard Webhooks do",
        secret=True,
    )
    smtp: SmtpConfig = setting("smtp", {}, SmtpConfig, "email: the mail server")
    sender: str = setting("from", "", MAIL_ADDRESS, "email: who it is from")
    to: tuple[str, ...] = setting("to", (), MAIL_ADDRESSES, "email: who gets it")
    on: tuple[str, ...] = setting(
        "events",
        NOTIFY_EVENTS[1:],
        EVENT_NAMES,
        "what is told; default: every end, and schedules that were missed",
    )
    tenants: tuple[str, ...] = setting("tenants", (), NAMES, "only of these; default: all")
    environments: tuple[str, ...] = setting("environments", (), NAMES, "only of these; default: all")
    scenarios: tuple[str, ...] = setting("scenarios", (), NAMES, "only of these; default: all")
    allow_private: bool = setting(
        "allowPrivateAddresses",
        False,
        BOOLEAN,
        "slack and webhook: also call this machine and private networks",
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration. `folder` is where relative files of it lie."""

    server: ServerConfig = setting("server", {}, ServerConfig, "where Load Manager listens")
    clusters: tuple[ClusterConfig, ...] = setting(
        "locustClusters", (), [ClusterConfig], "the Locust clusters"
    )
    schedules: tuple[ScheduleConfig, ...] = setting(
        "schedules", (), [ScheduleConfig], "runs that start by themselves"
    )
    notifications: tuple[NotificationConfig, ...] = setting(
        "notifications", (), [NotificationConfig], "who is told of what"
    )
    scenarios: tuple[ScenarioConfig, ...] = setting(
        "scenarios", (), [ScenarioConfig], "what scenarioIds mean"
    )
    security: SecurityConfig = setting("security", {}, SecurityConfig, "who may call")
    orchestrator: OrchestratorConfig = setting("orchestrator", {}, OrchestratorConfig, "how runs are watched")
    storage: StorageConfig = setting("storage", {}, StorageConfig, "where runs are kept")
    tenants: tuple[TenantConfig, ...] = setting("tenants", (), [TenantConfig], "limits of tenants")
    environments: tuple[EnvironmentConfig, ...] = setting(
        "environments", (), [EnvironmentConfig], "protected environments"
    )
    audit: AuditConfig = setting("audit", {}, AuditConfig, "who did what")
    limits: LimitsConfig = setting("limits", {}, LimitsConfig, "how much one caller may ask")
    folder: str = "."


def config_keys(section: type = Config, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every leaf key as (path, declaration): the README's table and the checks' source."""
    for entry in _declared(section):
        check, name = entry["check"], f"{path}{entry['name']}"
        if isinstance(check, list):
            yield from config_keys(check[0], f"{name}[].")
        elif isinstance(check, type):
            yield from config_keys(check, f"{name}.")
        else:
            yield name, entry


def _declared(section: type) -> list[dict[str, Any]]:
    return [{**item.metadata, "field": item.name} for item in fields(section) if item.metadata]


def load_config(path: str, environ: dict[str, str] | None = None) -> Config:
    """Read, check and return the configuration in file `path`; ConfigError lists every problem."""
    config, problems = read_config(path, environ)
    if problems:
        raise ConfigError(problems)
    return config


def read_config(path: str, environ: dict[str, str] | None = None) -> tuple[Config, list[str]]:
    """The configuration in file `path`, with defaults for what is wrong in it, and its problems;
    ConfigError when nothing of the file can be read."""
    environ = dict(os.environ) if environ is None else environ
    document = _read_config_file(path)
    if not isinstance(document, dict):
        raise ConfigError([f"{path}: must be a mapping of sections such as server: and locustClusters:"])
    reader = _ConfigReader(os.path.dirname(os.path.abspath(path)), environ)
    config = replace(reader.section(Config, document, ""), folder=reader.folder)
    add_problems(reader.problems, _whole_config_problems(config))
    return config, reader.problems


def add_problems(problems: list[str], more: Iterable[str]) -> None:
    """Add problems, but for those of keys that have one already, or of what holds such a key:
    the default that stands for a bad value would have them say what is not so."""
    known = {problem.partition(": ")[0] for problem in problems}
    for problem in list(more):
        path = problem.partition(": ")[0]
        if not any(is_part_of(path, one) or is_part_of(one, path) for one in known):
            problems.append(problem)


def is_part_of(path: str, whole: str) -> bool:
    """Whether a key's path is `whole` or within it."""
    return path == whole or path.startswith((f"{whole}.", f"{whole}["))


def _read_config_file(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            raw = file.read(4 * 1024 * 1024)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: is not UTF-8 text"]) from None
    try:
        return _parse_yaml(text) if not path.endswith(".json") else _parse_json_config(text)
    except ImportError:
        pass
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    try:
        return _parse_json_config(text)
    except (ValueError, RecursionError):
        raise ConfigError(
            [
                f"{path}: reading YAML needs the package PyYAML (pip install pyyaml); a JSON configuration needs no package"
            ]
        ) from None


def _parse_yaml(text: str) -> Any:
    """Safe YAML that refuses duplicate keys; ValueError with line and column."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                    raise ValueError(
                        f"line {key_node.start_mark.line + 1}: key {key_node.value!r} stands twice"
                    )
                seen.add(key_node.value if isinstance(key_node.value, str) else id(key_node))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506 - the loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(
            f"{where}not valid YAML: {getattr(error, 'problem', None) or error}".split("\n")[0]
        ) from None
    except TypeError:
        raise ValueError("not valid YAML: a key must be a plain word") from None


def _parse_json_config(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_duplicate_keys)


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:MAX_TEXT]!r} stands twice")
    return mapping


class _ConfigReader:
    """Turns the document into dataclasses and collects every problem on the way."""

    def __init__(self, folder: str, environ: dict[str, str]):
        self.folder = folder
        self.environ = environ
        # LOADMANAGER_SERVER_PORT and LOADMANAGER_SECURITY_API_TOKEN, with or without inner underscores.
        self.overrides = {
            name.removeprefix("LOADMANAGER_").replace("_", ""): value
            for name, value in environ.items()
            if name.startswith("LOADMANAGER_")
        }
        self.problems: list[str] = []

    def section(self, cls: type, document: Any, path: str) -> Any:
        declared = _declared(cls)
        if document is None:
            document = {}
        if not isinstance(document, dict):
            self.problems.append(f"{path.rstrip('.')}: allowed is a mapping, got {_shown(document)}")
            return cls()
        self._unknown_keys(declared, document, path)
        values = {}
        for entry in declared:
            value = self._key(entry, document, path)
            if value is not REQUIRED:
                values[entry["field"]] = value
        return cls(**values)

    def _unknown_keys(self, declared: list[dict[str, Any]], document: dict[Any, Any], path: str) -> None:
        names = [entry["name"] for entry in declared]
        names += [entry["name"] + "File" for entry in declared if entry["secret"]]
        for name in document:
            if name not in names:
                import difflib

                near = difflib.get_close_matches(str(name), names, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(names)}"
                self.problems.append(f"{path}{_printable(name)}: unknown key; {hint}")

    def _key(self, entry: dict[str, Any], document: dict[str, Any], path: str) -> Any:
        """The value of one key; REQUIRED where the default is to be used."""
        name, check = entry["name"], entry["check"]
        where, value = f"{path}{name}", document.get(name, REQUIRED)
        if isinstance(check, list):
            return self._list(check[0], value, where)
        if isinstance(check, type):
            if value in (REQUIRED, None) and entry["default"] is None:
                return None
            return self.section(check, {} if value is REQUIRED else value, f"{where}.")
        value = self._from_elsewhere(entry, document, where, value)
        if value is REQUIRED or (value is None and entry["default"] is not REQUIRED):
            if entry["default"] is REQUIRED:
                self.problems.append(f"{where}: is missing; allowed is {check.allowed}")
            return REQUIRED
        try:
            return check.accept(value)
        except (ValueError, TypeError):
            shown = "something else" if entry["secret"] else _shown(value)
            self.problems.append(f"{where}: allowed is {check.allowed}, got {shown}")
            return REQUIRED

    def _list(self, cls: type, value: Any, where: str) -> tuple[Any, ...]:
        if value is REQUIRED or value is None:
            return ()
        if not isinstance(value, list):
            self.problems.append(f"{where}: allowed is a list, got {_shown(value)}")
            return ()
        return tuple(self.section(cls, item, f"{where}[{index}].") for index, item in enumerate(value))

    def _from_elsewhere(self, entry: dict[str, Any], document: dict[str, Any], where: str, value: Any) -> Any:
        """Apply the File twin of a secret, ${NAME} and LOADMANAGER_... to a value."""
        if entry["secret"] and entry["name"] + "File" in document:
            value = self._secret_file(where + "File", document[entry["name"] + "File"], value)
        if "[" not in where:
            override = self.overrides.get(where.replace(".", "").upper())
            if override is not None:
                return entry["check"].from_text(override)
            if entry["secret"]:
                override = self.overrides.get(where.replace(".", "").upper() + "FILE")
                if override is not None:
                    return self._secret_file(where + "File", override, REQUIRED)
        if not isinstance(value, str) or "${" not in value:
            return value
        return entry["check"].from_text(self._expand(value, where))

    def _secret_file(self, where: str, name: Any, beside: Any) -> Any:
        if beside is not REQUIRED:
            self.problems.append(f"{where}: allowed is this or {where.removesuffix('File')}, not both")
        if not isinstance(name, str) or not name or "\0" in name:
            self.problems.append(f"{where}: allowed is a file name, got {_shown(name)}")
            return REQUIRED
        name = self._expand(name, where)
        try:
            with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                return file.read(65536).strip()
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(
                f"{where}: {name} cannot be read: {getattr(error, 'strerror', None) or error}"
            )
            return REQUIRED

    def _expand(self, value: str, where: str) -> str:
        def one(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(3)
            if self.environ.get(name) or (name in self.environ and match.group(2) is None):
                return self.environ[name]
            if default is None:
                self.problems.append(f"{where}: environment variable {name} is not set")
            return default or ""

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}", one, value)


def _printable(value: object) -> str:
    text = str(value)[:80]
    return text if text.isprintable() else repr(text)


def _shown(value: object) -> str:
    return repr(value)[:80]


def host_to_call(host: str) -> str:
    """How programs on this machine call a server that listens on `host`, within a URL."""
    here = "127.0.0.1" if host in ("0.0.0.0", "::", "localhost", "") else host
    return f"[{here}]" if ":" in here else here


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def token_digest(token: str) -> bytes:
    """SHA-256 of a token: what is kept, and compared in the same time whatever was sent."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _whole_config_problems(config: Config) -> Iterator[str]:
    """Problems that no key has alone."""
    yield from _cluster_problems(config)
    yield from _token_problems(config)
    yield from _sign_on_problems(config)
    yield from _twice("tenants", [(item.id,) for item in config.tenants])
    yield from _twice("environments", [(item.tenant_id, item.id) for item in config.environments])
    tls = config.server.tls
    for name, file in (
        (("certFile", tls.cert_file), ("keyFile", tls.key_file), ("clientCaFile", tls.client_ca_file))
        if tls
        else ()
    ):
        if file and not os.path.isfile(os.path.join(config.folder, file)):
            yield f"server.tls.{name}: {file} is not a file"


def _twice(where: str, ids: list[tuple[str, ...]]) -> Iterator[str]:
    for index, item in enumerate(ids):
        if item in ids[:index]:
            yield f"{where}[{index}].id: {'/'.join(item)} is already {where}[{ids.index(item)}]; allowed is a unique id"


def _token_problems(config: Config) -> Iterator[str]:
    """No missing, shipped, doubled or half-declared token."""
    security = config.security
    all_guarded = bool(config.clusters) and all(cluster.callback_token for cluster in config.clusters)
    needed = {
        "apiToken": security.is_open,
        "locustCallbackToken": not security.callback_token and not all_guarded,
    }
    for name, token in (("apiToken", security.api_token), ("locustCallbackToken", security.callback_token)):
        if needed[name] and not security.allow_anonymous:
            yield f"security.{name}: is missing or empty; set it, or security.allowAnonymous: true to serve without"
        if token in EXAMPLE_TOKENS and not is_loopback(config.server.host):
            yield f"security.{name}: is the shipped example's; listening on {config.server.host} needs one of your own"
    names, digests = list(RESERVED_NAMES), [token_digest(security.api_token)] if security.api_token else []
    for index, item in enumerate(security.api_tokens):
        where = f"security.apiTokens[{index}]"
        if item.name in names:
            yield f"{where}.name: {item.name} is taken; allowed is a unique name other than {', '.join(RESERVED_NAMES)}"
        if bool(item.token) == bool(item.token_sha256):
            yield f"{where}: allowed is one of tokenSha256, token and tokenFile"
        if not item.tenants and item.role and item.role != "admin":
            yield f'{where}.tenants: is missing; allowed is a list of tenants, or ["*"] for all'
        digest = bytes.fromhex(item.token_sha256) if item.token_sha256 else token_digest(item.token)
        if digest in digests and (item.token or item.token_sha256):
            yield f"{where}: another token is the same; each needs one of its own"
        names.append(item.name)
        digests.append(digest)


def _sign_on_problems(config: Config) -> Iterator[str]:
    """What the keys of security.jwt and security.oidc ask of each other."""
    jwt, oidc = config.security.jwt, config.security.oidc
    if jwt:
        sources = [
            name
            for name, value in (
                ("jwksUrl", jwt.jwks_url),
                ("jwksFile", jwt.jwks_file),
                ("secret", jwt.secret),
            )
            if value
        ]
        if len(sources) != 1:
            yield f"security.jwt: allowed is one of jwksUrl, jwksFile and secretFile; there are {len(sources)}"
        wrong = [name for name in jwt.algorithms if (JWT_ALGORITHMS[name] == "oct") != bool(jwt.secret)]
        if wrong:
            yield f"security.jwt.algorithms: {', '.join(wrong)}: HS256 needs secretFile, all others jwksUrl or jwksFile"
        if jwt.secret and len(jwt.secret.encode()) < 32:
            yield "security.jwt.secret: is too short; allowed are 32 bytes or more (RFC 7518, 3.2)"
    urls = {
        "jwt.jwksUrl": jwt and jwt.jwks_url,
        "oidc.issuer": oidc and oidc.issuer,
        "oidc.redirectUrl": oidc and oidc.redirect_url,
    }
    for name, url in urls.items():
        if url and not url.startswith("https:") and not is_loopback(urlsplit(url).hostname or ""):
            yield f"security.{name}: allowed is https, or http on this machine"
    if oidc and not urlsplit(oidc.redirect_url).path.endswith("/session/oidc/callback"):
        yield "security.oidc.redirectUrl: allowed is our address with /session/oidc/callback"
    if oidc and "openid" not in oidc.scopes.split():
        yield "security.oidc.scopes: openid is missing"


def _launcher_problems(cluster: ClusterConfig, where: str) -> Iterator[str]:
    launcher = cluster.launcher
    is_process = launcher is not None and launcher.type == "process"
    if not cluster.base_url and not is_process:
        yield f"{where}.baseUrl: is missing; allowed is {BASE_URL.allowed}, or a launcher of type process"
    if cluster.base_url and is_process:
        yield f"{where}.baseUrl: allowed is this or a launcher of type process, not both"
    if launcher is None:
        return
    if is_process and not launcher.locustfile:
        yield f"{where}.launcher.locustfile: is missing; allowed is a file name"
    if is_process and launcher.workers > launcher.max_workers:
        yield f"{where}.launcher.workers: {launcher.workers} is more than maxWorkers, {launcher.max_workers}"
    if not is_process and not launcher.scale:
        yield f"{where}.launcher.scale: is missing; allowed is {ARGUMENT_LIST.allowed}"
    if not is_process and launcher.scale and not any("{workers}" in word for word in launcher.scale):
        yield f"{where}.launcher.scale: does not say {{workers}}, which stands for their number"


def _cluster_problems(config: Config) -> Iterator[str]:
    seen: dict[str, int] = {}
    for index, cluster in enumerate(config.clusters):
        where = f"locustClusters[{index}]"
        if cluster.id in seen:
            yield f"{where}.id: {cluster.id!r} is already locustClusters[{seen[cluster.id]}]; allowed is a unique id"
        seen.setdefault(cluster.id, index)
        yield from _launcher_problems(cluster, where)
        if cluster.tls.ca_file and not os.path.isfile(os.path.join(config.folder, cluster.tls.ca_file)):
            yield f"{where}.tls.caFile: {cluster.tls.ca_file} is not a file"


# ============================================================================
# 4. MODEL - run, snapshot, sample, and their translation to the wire's JSON
# ============================================================================
# Ours is snake_case with units; the wire's camelCase is met only here and in CONFIG.


class Scope(NamedTuple):
    """What somebody may see and touch: tenants and their environments; None: all."""

    tenants: frozenset[str] | None = None
    environments: frozenset[str] | None = None

    def covers(self, tenant_id: str, env_id: str) -> bool:
        return (self.tenants is None or tenant_id in self.tenants) and (
            self.environments is None or env_id in self.environments
        )


EVERYTHING = Scope()


class Threshold(NamedTuple):
    """A limit declared before the run, and what became of it."""

    expr: str  # the canonical form, from the fields below
    metric: str  # a key of TOTAL_METRICS or ENDPOINT_METRICS
    op: str
    limit: float
    endpoint: str | None = None  # "METHOD name"; None: the totals
    is_pattern: bool = False  # a * in endpoint stands for any text
    over_s: float | None = None  # must hold in every window of this length
    after_s: float | None = None  # what was before, since the start, does not count
    abort_on_fail: bool = False
    delay_s: float = 0.0  # how long it must fail without a break before it aborts
    warn_only: bool = False
    value: float | None = None
    result: str = "pending"  # passed or failed when the run is final
    first_failed_at: float | None = None  # epoch seconds
    message: str | None = None


def threshold_to_json(threshold: Threshold) -> dict[str, Any]:
    wire: dict[str, Any] = {"expr": threshold.expr, "value": threshold.value, "result": threshold.result}
    if threshold.first_failed_at is not None:
        wire["firstFailedAt"] = utc_text(threshold.first_failed_at)
    if threshold.message:
        wire["message"] = threshold.message
    if threshold.abort_on_fail:
        wire.update(abortOnFail=True, delaySeconds=threshold.delay_s)
    if threshold.warn_only:
        wire["warnOnly"] = True
    return wire


class LoadProfile(NamedTuple):
    """What of a locustfile is run, and against what, beyond users and time."""

    host: str | None = None
    user_classes: tuple[str, ...] = ()  # empty: all
    tags: tuple[str, ...] = ()
    exclude_tags: tuple[str, ...] = ()
    options: dict[str, Any] | None = None
    stages: tuple[Stage, ...] = ()
    locustfile: str | None = None  # for a launched cluster


def plan_to_json(plan: LoadProfile) -> dict[str, Any]:
    wire = {
        "host": plan.host,
        "userClasses": list(plan.user_classes),
        "tags": list(plan.tags),
        "excludeTags": list(plan.exclude_tags),
        "options": plan.options,
    }
    wire["stages"] = [stage_to_json(stage) for stage in plan.stages]
    return {name: value for name, value in wire.items() if value}


def stage_to_json(stage: Stage) -> dict[str, Any]:
    return {"targetUsers": stage.users, "spawnRate": stage.spawn_rate, "durationSeconds": stage.duration_s}


def plan_from_record(entry: list[Any]) -> LoadProfile:
    host, user_classes, tags, exclude_tags, options, stages, locustfile = entry
    return LoadProfile(
        host,
        tuple(user_classes),
        tuple(tags),
        tuple(exclude_tags),
        options,
        tuple(Stage(*stage) for stage in stages),
        locustfile,
    )


class LoadChange(NamedTuple):
    """Users of a running load that somebody changed: epoch seconds, users, users/s, who."""

    at: float
    users: int
    spawn_rate: float
    by: str


def load_change_to_json(change: LoadChange) -> dict[str, Any]:
    return {
        "at": utc_text(change.at),
        "targetUsers": change.users,
        "spawnRate": change.spawn_rate,
        "by": change.by,
    }


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a caller asks for."""

    tenant_id: str
    env_id: str
    scenario_id: str
    target_users: int
    spawn_rate: float  # users/s
    duration_s: int | None = None
    metadata: dict[str, Any] | None = None
    queue: bool = False  # wait for a free cluster instead of a 409
    thresholds: tuple[Threshold, ...] = ()
    compare_with: str | None = None  # one of COMPARE_WITH
    plan: LoadProfile = LoadProfile()
    confirm: str | None = None  # the id of a protected environment


class Warning_(NamedTuple):
    """Something a reader of the numbers should know: code, epoch seconds, a sentence."""

    code: str
    at: float
    message: str


class Baseline(NamedTuple):
    """The run that others of its tenant, environment and scenario are compared with."""

    tenant_id: str
    env_id: str
    scenario_id: str
    run_id: str
    set_at: float  # epoch seconds
    set_by: str

    @property
    def place(self) -> tuple[str, str, str]:
        return self.tenant_id, self.env_id, self.scenario_id


def baseline_to_json(baseline: Baseline) -> dict[str, Any]:
    return {
        "tenantId": baseline.tenant_id,
        "envId": baseline.env_id,
        "scenarioId": baseline.scenario_id,
        "runId": baseline.run_id,
        "setAt": utc_text(baseline.set_at),
        "setBy": baseline.set_by,
    }


class AuditEntry(NamedTuple):
    """Somebody did, or was refused, something. A field that does not apply is empty."""

    at: float  # epoch seconds
    who: str
    role: str
    address: str
    action: str  # method and path of the route, e.g. POST /v1/tests/{id}/stop
    tenant_id: str
    env_id: str
    run_id: str
    http_status: int
    detail: str  # why it was refused or failed

    @property
    def outcome(self) -> str:
        return (
            "done"
            if self.http_status < 400
            else "refused"
            if self.http_status in (401, 403, 404)
            else "failed"
        )


AUDIT_KEYS = {
    "who": "who", "role": "role", "address": "address", "action": "action", "tenantId": "tenant_id", "envId": "env_id",
    "runId": "run_id", "status": "http_status", "detail": "detail", "outcome": "outcome",
}  # fmt: skip


def audit_to_json(entry: AuditEntry) -> dict[str, Any]:
    wire = {
        "at": utc_text(entry.at),
        **{name: getattr(entry, attribute) for name, attribute in AUDIT_KEYS.items()},
    }
    return {name: value for name, value in wire.items() if value != ""}


class Delivery(NamedTuple):
    """A message to one channel, and how it fares. Moments are epoch seconds."""

    id: str
    channel_id: str
    event: str
    run_id: str
    tenant_id: str
    created_at: float
    title: str  # what a phone shows
    facts: dict[str, Any]
    attempts: int = 0
    next_at: float = 0.0
    ended_at: float | None = None  # taken, or given up
    problem: str | None = None  # why the last try failed

    @property
    def outcome(self) -> str:
        if self.ended_at is None:
            return "waiting"
        return "given up" if self.problem else "delivered"


def delivery_to_json(delivery: Delivery) -> dict[str, Any]:
    wire: dict[str, Any] = {
        "id": delivery.id, "channelId": delivery.channel_id, "event": delivery.event, "title": delivery.title, "attempts": delivery.attempts,
        "createdAt": utc_text(delivery.created_at), "outcome": delivery.outcome,
    }  # fmt: skip
    optional = {
        "runId": delivery.run_id or None,
        "problem": delivery.problem,
        "endedAt": delivery.ended_at and utc_text(delivery.ended_at),
    }
    optional["nextAt"] = (
        utc_text(delivery.next_at) if delivery.ended_at is None and delivery.attempts else None
    )
    wire.update((name, value) for name, value in optional.items() if value is not None)
    return wire


class Annotation(NamedTuple):
    """A moment somebody marked: epoch seconds, their words."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """One load test on one cluster. Moments are epoch seconds of our clock."""

    id: str
    tenant_id: str
    env_id: str
    cluster_id: str  # "" while it waits in the queue
    scenario_id: str
    target_users: int
    spawn_rate: float
    status: RunStatus
    created_at: float
    duration_s: int | None = None
    metadata: dict[str, Any] | None = None
    created_by: str = ""
    source: str = "api"
    started_at: float | None = None
    finished_at: float | None = None
    stop_reason: str | None = None
    failure_reason: str | None = None
    queued: bool = False
    queue_position: int | None = None  # 1 is the next; kept in memory only
    warnings: tuple[Warning_, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    compare_with: str | None = None  # one of COMPARE_WITH
    comparison: dict[str, Any] | None = None  # what came of it
    locustfile_sha256: str | None = None  # known from the hooks
    verdict: str | None = None  # passed or failed, once final and if there was something to judge
    imported_at: float | None = None  # it came from a file
    plan: LoadProfile = LoadProfile()
    load_changes: tuple[LoadChange, ...] = ()
    cleanup: bool = False  # not on the wire: its load may still run, stop it when the cluster is back
    seq: int = 0  # order of creation, the list's cursor

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def deadline_at(self) -> float | None:
        """When it must stop by our clock, once started."""
        if self.started_at is None or self.duration_s is None:
            return None
        return self.started_at + self.duration_s


# Warnings that put the numbers in doubt; the others say something else about the run.
DOUBTS = frozenset(
    {
        "workers_lost",
        "workers_missing",
        "cpu_high",
        "users_not_reached",
        "users_changed",
        "stats_reset",
        "final_numbers_missing",
    }
)


def doubts_of(run: Run) -> list[str]:
    """Why the numbers of a run may not be those of the load that was asked for."""
    reasons = [warning.message for warning in run.warnings if warning.code in DOUBTS]
    if run.status is RunStatus.FAILED:
        reasons.append(f"the run failed: {run.failure_reason}")
    return reasons


def judgement_to_json(run: Run) -> dict[str, Any]:
    """Thresholds, verdict, comparison and trust, as far as the run has them."""
    wire: dict[str, Any] = {}
    if run.thresholds:
        wire["thresholds"] = [threshold_to_json(threshold) for threshold in run.thresholds]
    optional = {"verdict": run.verdict, "compareWith": run.compare_with, "comparison": run.comparison}
    wire.update((name, value) for name, value in optional.items() if value is not None)
    if run.is_final:
        doubts = doubts_of(run)
        wire["trust"] = "doubtful" if doubts else "ok"
        wire["trustReasons"] = doubts
    return wire


def run_to_json(run: Run) -> dict[str, Any]:
    """The run as JSON-able dict, without lastMetrics; keys without a value are absent."""
    wire: dict[str, Any] = {
        "id": run.id,
        "tenantId": run.tenant_id,
        "envId": run.env_id,
        "locustClusterId": run.cluster_id,
        "scenarioId": run.scenario_id,
        "targetUsers": run.target_users,
        "spawnRate": run.spawn_rate,
        "status": run.status.value,
        "createdAt": utc_text(run.created_at),
        "createdBy": run.created_by,
        "source": run.source,
    }
    optional = {
        "durationSeconds": run.duration_s,
        "startedAt": run.started_at and utc_text(run.started_at),
        "finishedAt": run.finished_at and utc_text(run.finished_at),
        "stopReason": run.stop_reason,
        "failureReason": run.failure_reason,
        "queuePosition": run.queue_position,
        "metadata": run.metadata,
        "locustfileSha256": run.locustfile_sha256,
        "importedAt": run.imported_at and utc_text(run.imported_at),
    }
    wire.update((name, value) for name, value in optional.items() if value is not None)
    wire.update(plan_to_json(run.plan))
    if run.load_changes:
        wire["usersChanges"] = [load_change_to_json(change) for change in run.load_changes]
    if run.warnings:
        wire["warnings"] = [
            {"code": w.code, "at": utc_text(w.at), "message": w.message} for w in run.warnings
        ]
    if run.annotations:
        wire["annotations"] = [annotation_to_json(annotation) for annotation in run.annotations]
    wire.update(judgement_to_json(run))
    return wire


def annotation_to_json(annotation: Annotation) -> dict[str, Any]:
    return {"at": utc_text(annotation.at), "text": annotation.text}


def run_to_fields(run: Run) -> dict[str, Any]:
    """What the store keeps of a run, as JSON has it."""
    record = {name: getattr(run, name) for name in Run.__slots__ if name != "queue_position"}
    record["status"] = run.status.value
    return record


def run_from_record(text: str) -> Run:
    record = json.loads(text)
    record["status"] = RunStatus(record["status"])
    record["warnings"] = tuple(Warning_(*entry) for entry in record["warnings"])
    record["annotations"] = tuple(Annotation(*entry) for entry in record.get("annotations", ()))
    record["thresholds"] = tuple(Threshold(*entry) for entry in record.get("thresholds", ()))
    record["plan"] = plan_from_record(record["plan"]) if "plan" in record else LoadProfile()
    record["load_changes"] = tuple(LoadChange(*entry) for entry in record.get("load_changes", ()))
    known = set(Run.__slots__)
    return Run(**{name: value for name, value in record.items() if name in known})


class EndpointStats(NamedTuple):
    """One row of Locust's statistics; ms and req/s over the whole run. None: Locust gave no figure."""

    method: str
    name: str
    requests: int | None
    failures: int | None
    avg_ms: float | None
    min_ms: float | None
    max_ms: float | None
    p50_ms: float | None
    per_s: float | None
    p95_ms: float | None
    p99_ms: float | None
    times: dict[int, int] | None = None  # requests by whole ms, where the hooks carry them


class Snapshot(NamedTuple):
    """What one cluster reported at one moment; latencies cover the whole run so far.

    Every figure is Locust's own; None where it gave none, never an estimate, never 0."""

    taken_at: float  # epoch seconds
    rps: float | None  # current rate while running, whole-run average in a final one
    requests: int | None
    failures: int | None
    error_percent: float | None
    avg_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    users: int | None
    endpoints: tuple[EndpointStats, ...] | None = None
    fails_per_s: float | None = None
    window_p50_ms: float | None = None  # of about the last 10 s
    window_p95_ms: float | None = None
    times: dict[int, int] | None = None  # requests by whole ms, where the hooks carry them
    counted_at: float | None = None  # the hooks: until then (epoch seconds) all requests are counted,
    counted_requests: int | None = None  # and these are they
    counted_failures: int | None = None
    resets: int | None = None  # of Locust's statistics since the test began; None: not known


# The wire's keys, read in both directions; in the order of the tuples' fields.
ENDPOINT_KEYS = {
    "method": "method",
    "name": "name",
    "numRequests": "requests",
    "numFailures": "failures",
    "avgResponseTime": "avg_ms",
    "minResponseTime": "min_ms",
    "maxResponseTime": "max_ms",
    "medianResponseTime": "p50_ms",
    "requestsPerSec": "per_s",
    "p95ResponseTime": "p95_ms",
    "p99ResponseTime": "p99_ms",
}
SNAPSHOT_KEYS = {
    "totalRps": "rps",
    "totalRequests": "requests",
    "totalFailures": "failures",
    "errorRate": "error_percent",
    "avgResponseMs": "avg_ms",
    "p50ResponseMs": "p50_ms",
    "p95ResponseMs": "p95_ms",
    "p99ResponseMs": "p99_ms",
    "currentUsers": "users",
}


def snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    wire: dict[str, Any] = {"timestamp": utc_text(snapshot.taken_at)}
    for name, attribute in SNAPSHOT_KEYS.items():
        wire[name] = getattr(snapshot, attribute)
    if snapshot.endpoints is not None:
        wire["requestStats"] = {
            f"{row.method}_{row.name}": {
                name: getattr(row, attribute) for name, attribute in ENDPOINT_KEYS.items()
            }
            for row in snapshot.endpoints
        }
    return wire


class Sample(NamedTuple):
    """One kept point of a run's history; the order of the fields is the table's."""

    run_id: str
    at: float
    rps: float | None
    fails_per_s: float | None
    requests: int | None
    failures: int | None
    error_percent: float | None
    avg_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    window_p50_ms: float | None
    window_p95_ms: float | None
    users: int | None
    source: str  # poll, push (from the hooks) or final
    counted_at: float | None = None  # as in a Snapshot
    counted_requests: int | None = None
    counted_failures: int | None = None


class Histogram(NamedTuple):
    """Requests of one endpoint, or of the totals, by how long they took: to the ms up to 1 s and in
    three digits above it where the hooks kept exact times; else in Locust's own two digits."""

    requests: int
    failures: int
    total_ms: float
    times: dict[int, int]  # whole ms -> requests; those without a time are not in it


Endpoint = tuple[str, str]  # method, name
Histograms = dict[Endpoint | None, Histogram]  # None: the totals


class HistogramPoint(NamedTuple):
    """All histograms of a run from its start to a moment (epoch seconds)."""

    at: float
    histograms: Histograms


def histograms_of(snapshot: Snapshot) -> Histograms | None:
    """What a snapshot carries of response times; None: nothing, or not of the totals."""
    if snapshot.times is None:
        return None
    found: Histograms = {None: _histogram(snapshot)}
    for row in snapshot.endpoints or ():
        if row.times is not None:
            found[row.method, row.name] = _histogram(row)
    return found


def _histogram(row: Snapshot | EndpointStats) -> Histogram:
    times = row.times or {}
    return Histogram(row.requests or 0, row.failures or 0, (row.avg_ms or 0.0) * sum(times.values()), times)


def histograms_to_record(now: Histograms, before: Histograms | None) -> str:
    """What came since `before`, or all when that is None, as the JSON text that the store keeps."""
    rows = []
    for key, histogram in now.items():
        part = since(histogram, before.get(key)) if before else histogram
        if part is not None and part.requests:
            pairs = [number for pair in part.times.items() for number in pair]
            rows.append(
                [*(key or (None, None)), part.requests, part.failures, round(part.total_ms, 3), pairs]
            )
    return dump_json(rows)


def histograms_from_record(text: str, before: Histograms | None) -> Histograms:
    """The histograms that stood at a record: what it holds, on top of `before`."""
    found = dict(before or {})
    for method, name, requests, failures, total_ms, pairs in json.loads(text):
        key = None if method is None else (method, name)
        part = Histogram(requests, failures, total_ms, dict(zip(pairs[::2], pairs[1::2])))
        found[key] = _sum(found[key], part) if key in found else part
    return found


def _sum(one: Histogram, other: Histogram) -> Histogram:
    times = dict(one.times)
    for ms, requests in other.times.items():
        times[ms] = times.get(ms, 0) + requests
    return Histogram(
        one.requests + other.requests, one.failures + other.failures, one.total_ms + other.total_ms, times
    )


def since(newer: Histogram, older: Histogram | None) -> Histogram | None:
    """What came between two moments; None when the counters went back meanwhile."""
    if older is None:
        return newer
    times = {ms: more for ms, requests in newer.times.items() if (more := requests - older.times.get(ms, 0))}
    part = Histogram(
        newer.requests - older.requests,
        newer.failures - older.failures,
        max(0.0, newer.total_ms - older.total_ms),
        times,
    )
    gone = older.times.keys() - newer.times.keys()
    return (
        None
        if gone or part.requests < 0 or part.failures < 0 or any(more < 0 for more in times.values())
        else part
    )


def percentile_ms(times: dict[int, int], ratio: float) -> int | None:
    """As Locust does it (calculate_response_time_percentile, 2.47.0); ratio 0..1, None without requests."""
    requests = sum(times.values())
    seen, wanted = 0, int(requests * ratio)
    for ms in sorted(times, reverse=True):
        seen += times[ms]
        if requests - seen <= wanted:
            return ms
    return None


def histogram_to_json(histogram: Histogram) -> dict[str, Any]:
    times = histogram.times
    return {
        "requests": histogram.requests,
        "failures": histogram.failures,
        "avgResponseMs": histogram.total_ms / sum(times.values()) if times else None,
        **{f"p{which}ResponseMs": percentile_ms(times, which / 100) for which in (50, 95, 99)},
        "responseTimes": {str(ms): times[ms] for ms in sorted(times)},
    }


SAMPLE_KEYS = {
    "totalRps": "rps",
    "failuresPerSec": "fails_per_s",
    "totalRequests": "requests",
    "totalFailures": "failures",
    "errorRate": "error_percent",
    "avgResponseMs": "avg_ms",
    "p50ResponseMs": "p50_ms",
    "p95ResponseMs": "p95_ms",
    "p99ResponseMs": "p99_ms",
    "currentP50Ms": "window_p50_ms",
    "currentP95Ms": "window_p95_ms",
    "currentUsers": "users",
    "source": "source",
}


def sample_of(run_id: str, snapshot: Snapshot, source: str) -> Sample:
    shared = {name: getattr(snapshot, name) for name in Sample._fields if name in Snapshot._fields}
    return Sample(run_id, snapshot.taken_at, source=source, **shared)


def sample_to_json(sample: Sample) -> dict[str, Any]:
    return {
        "timestamp": utc_text(sample.at),
        **{name: getattr(sample, attribute) for name, attribute in SAMPLE_KEYS.items()},
    }


def dump_json(value: object) -> str:
    """Strict, compact JSON; ValueError for NaN and Infinity, which are not JSON."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


STRICT_JSON = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicate_keys)
CALLBACK_JSON = json.JSONDecoder(parse_constant=_no_constant)  # half the time: 1,000 pushes a second


def parse_json(raw: bytes, unique_keys: bool = True) -> Any:
    """Strict JSON of a request body, or InvalidInput: UTF-8, no NaN, no duplicate keys,
    bounded depth, and no lone surrogates, which SQLite could not store."""
    if not raw:
        raise InvalidInput("the body is empty; allowed is a JSON object")
    try:
        value = (STRICT_JSON if unique_keys else CALLBACK_JSON).decode(raw.decode("utf-8"))
        if b"\\u" in raw or b"\\U" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on a lone surrogate
        return value
    except UnicodeDecodeError:
        raise InvalidInput("the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise InvalidInput("the body holds a lone surrogate, which is not a character") from None
    except RecursionError:
        raise InvalidInput("the body is nested too deeply") from None
    except ValueError as error:
        words = (
            "a number has too many digits" if "integer string conversion" in str(error) else str(error)[:200]
        )
        raise InvalidInput(f"the body is not valid JSON: {words}") from None


class Failure(NamedTuple):
    """Requests of one endpoint that failed with one error."""

    method: str
    name: str
    error: str
    occurrences: int
    first_seen_at: float | None  # epoch seconds
    last_seen_at: float | None


class TaskException(NamedTuple):
    """An exception that scenarios raised outside of requests."""

    count: int
    message: str
    traceback: str
    nodes: str


def failures_to_json(failures: Iterable[Failure], exceptions: Iterable[TaskException]) -> dict[str, Any]:
    return {
        "failures": [
            {
                "method": failure.method,
                "name": failure.name,
                "error": failure.error,
                "occurrences": failure.occurrences,
                "firstSeen": failure.first_seen_at and utc_text(failure.first_seen_at),
                "lastSeen": failure.last_seen_at and utc_text(failure.last_seen_at),
            }
            for failure in failures
        ],
        "exceptions": [exception._asdict() for exception in exceptions],
    }


@dataclass(frozen=True, slots=True)
class Worker:
    """One Locust worker as its master sees it."""

    id: str
    state: str
    users: int
    cpu_percent: float | None


class Abilities(NamedTuple):
    """What a Locust can be asked to run. None: it does not say."""

    user_classes: tuple[str, ...] | None = None
    can_choose: bool = False  # it was started with --class-picker
    options: tuple[str, ...] | None = None  # custom arguments
    tags: tuple[str, ...] | None = None  # None: tags cannot be chosen


@dataclass(frozen=True, slots=True)
class Reading:
    """What a Locust master says of itself at one moment.

    `cached`: from /stats/requests, which Locust keeps for STATS_CACHE_S or longer. It was made at
    `made_at` (epoch seconds), or up to `uncertainty_s` before: the hooks tell exactly, Locust does not.
    `is_cached_repeat`: an earlier reading had the same answer of Locust's cache.
    `hooks`: our hooks answered; only then the fields below it are known."""

    state: str
    users: int
    distributed: bool
    workers: tuple[Worker, ...]
    requests: int
    cached: bool
    snapshot: Snapshot | None = None
    hooks: bool = False
    run_id: str = ""
    last_run_id: str = ""
    boot_id: str = ""
    locustfile_sha256: str | None = None
    version: str = ""
    target_users: int | None = None
    test_started_at: float | None = None  # epoch seconds
    callbacks: bool = False  # the hooks know where to call back
    flush: bool = False  # numbers are complete as soon as the test has stopped
    host: str | None = None
    failures: tuple[Failure, ...] = ()
    abilities: Abilities | None = None  # None: it does not say
    made_at: float = 0.0
    uncertainty_s: float = 0.0
    is_cached_repeat: bool = False
    resets: int | None = None  # of the statistics since the test began, where the hooks tell

    @property
    def made_after(self) -> float:
        """It tells nothing of what was before this; epoch seconds."""
        return self.made_at - self.uncertainty_s

    @property
    def live_workers(self) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.state != "missing")

    @property
    def is_loaded(self) -> bool:
        return self.state in LOADED_STATES or self.users > 0


# ============================================================================
# 5. VERDICT - did it pass: thresholds, their windows, and two runs compared
# ============================================================================
# Pure. Figures are Locust's own, or made from its histograms as it makes them; what has no
# data fails and says so. Nothing here reads a store or a clock.

# ---- thresholds: what they may say ------------------------------------------
# expr: [endpoint ":"] metric op number [unit] ["over" seconds] ["after" seconds]

TOTAL_METRICS = {  # what may be judged of the totals, and where it stands in a Snapshot
    "totalRequests": "requests",
    "totalFailures": "failures",
    "totalRps": "rps",
    "errorRate": "error_percent",
    "avgResponseMs": "avg_ms",
    "p50ResponseMs": "p50_ms",
    "p95ResponseMs": "p95_ms",
    "p99ResponseMs": "p99_ms",
}
ENDPOINT_METRICS = {  # the same of an endpoint, in EndpointStats; errorRate comes from its counts
    **{name: attribute for name, attribute in TOTAL_METRICS.items() if name not in ("totalRps", "errorRate")},
    "totalRps": "per_s",
    "errorRate": "error_percent",
    "minResponseMs": "min_ms",
    "maxResponseMs": "max_ms",
}
PERCENTILE_RATIOS = {"p50ResponseMs": 0.5, "p95ResponseMs": 0.95, "p99ResponseMs": 0.99}
WINDOW_PERCENTILES = {"p50ResponseMs": "window_p50_ms", "p95ResponseMs": "window_p95_ms"}
COUNTED = ("totalRequests", "totalFailures", "totalRps", "errorRate")  # from counters: any window has them
METRIC_WORDS = {  # how people know them from elsewhere; lower case, only letters and digits
    **{name.lower(): name for name in ENDPOINT_METRICS},
    **{
        f"p{which}{rest}": f"p{which}ResponseMs"
        for which in (50, 95, 99)
        for rest in ("", "ms", "responsetime", "responsetimems")
    },
    **dict.fromkeys(("median", "med", "medianresponsetime"), "p50ResponseMs"),
    **dict.fromkeys(("avg", "mean", "avgms", "avgresponsetime", "averageresponsetime"), "avgResponseMs"),
    **dict.fromkeys(("min", "minresponsetime"), "minResponseMs"),
    **dict.fromkeys(("max", "maxresponsetime"), "maxResponseMs"),
    **dict.fromkeys(("errorrate", "errorpercent", "failurerate", "failrate"), "errorRate"),
    **dict.fromkeys(("rps", "requestspersec", "requestspersecond"), "totalRps"),
    **dict.fromkeys(("requests", "numrequests"), "totalRequests"),
    **dict.fromkeys(("failures", "errors", "numfailures"), "totalFailures"),
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, limit: value < limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    ">=": lambda value, limit: value >= limit,
    "==": lambda value, limit: value == limit,
}
SAME_COMPARISON = {"≤": "<=", "≥": ">=", "=": "=="}
TIME_UNITS = {"ms": 1.0, "s": 1000.0}
DURATION_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
NUMBER_WORD = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?", re.ASCII)


class _Scanner:
    """Reads one expression word by word; a refusal names the position, counted from 1."""

    def __init__(self, text: str, at: int = 0):
        self.text = text
        self.at = at

    def take(self, pattern: str) -> str:
        """What stands next and fits, "" if nothing does; spaces before it are passed."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        match = re.compile(pattern, re.ASCII).match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match.group() if match else ""

    def expected(self, what: str, at: int | None = None) -> InvalidValue:
        at = self.at if at is None else at
        found = _shown(self.text[at : at + 20]) if at < len(self.text) else "the end"
        return InvalidValue(f"{_shown(self.text)}, position {at + 1}: expected {what}, found {found}")


def parse_threshold(text: str) -> Threshold:
    """The threshold that an expression means; InvalidValue names the position and what was expected."""
    if len(text) > MAX_THRESHOLD or not text.isprintable():
        raise InvalidValue(f"a threshold has at most {MAX_THRESHOLD} characters, all of them printable")
    scanner = _Scanner(text)
    endpoint, is_pattern = _scan_endpoint(scanner)
    metric_at, metric, scale = _scan_metric(scanner)
    op = scanner.take(r"<=|>=|==|[<>=≤≥]")
    if not op:
        raise scanner.expected("one of " + ", ".join(COMPARISONS))
    limit = _scan_limit(scanner, metric, scale)
    over_s, after_s = _scan_windows(scanner)
    threshold = Threshold(
        "", metric, SAME_COMPARISON.get(op, op), limit, endpoint, is_pattern, over_s, after_s
    )
    why = _why_not(threshold)
    if why:
        raise InvalidValue(f"{_shown(text)}, position {metric_at + 1}: {why}")
    return threshold._replace(expr=canonical_form(threshold))


def _scan_endpoint(scanner: _Scanner) -> tuple[str | None, bool]:
    """The endpoint before the last colon, and whether it is a pattern. In double quotes, as a
    JSON string, it is a name as it stands."""
    if scanner.take(r'"'):
        try:
            endpoint, end = json.JSONDecoder().raw_decode(scanner.text, scanner.at - 1)
        except ValueError:
            raise scanner.expected("the end of the quoted endpoint, a JSON string") from None
        scanner.at = end
        if not scanner.take(":"):
            raise scanner.expected("a colon after the endpoint")
        if not endpoint or not endpoint.isprintable():
            raise scanner.expected("a name of printable characters", 0)
        return endpoint, False
    end = scanner.text.rfind(":")
    if end < 0:
        return None, False
    endpoint = scanner.text[:end].strip()
    if not endpoint:
        raise scanner.expected("the name of an endpoint before the colon", 0)
    scanner.at = end + 1
    return endpoint, "*" in endpoint


def _scan_metric(scanner: _Scanner) -> tuple[int, str, float]:
    """Position, name and scale of the metric; a ratio of 0..1 becomes percent."""
    scanner.take("")
    at = scanner.at
    word = scanner.take(r"p\s*\(\s*[0-9]{1,3}(\.[0-9]{1,3})?\s*\)|[A-Za-z][A-Za-z0-9_.\-]*")
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    if plain in ("failratio", "errorratio"):
        return at, "errorRate", 100.0
    if plain not in METRIC_WORDS:
        raise scanner.expected("one of " + ", ".join(ENDPOINT_METRICS), at)
    return at, METRIC_WORDS[plain], 1.0


def _scan_limit(scanner: _Scanner, metric: str, scale: float) -> float:
    scanner.take("")
    at = scanner.at
    number = scanner.take(NUMBER_WORD.pattern)
    if not number:
        raise scanner.expected("a number from 0")
    unit = scanner.take(r"ms(?![A-Za-z])|s(?![A-Za-z])|%|/s(?![A-Za-z])|rps(?![A-Za-z])")
    allowed = (
        ("ms", "s")
        if metric.endswith("Ms")
        else ("%",)
        if metric == "errorRate"
        else ("/s", "rps")
        if metric == "totalRps"
        else ()
    )
    if unit and unit not in allowed:
        raise scanner.expected(f"{' or '.join(allowed) or 'no unit'} for {metric}", scanner.at - len(unit))
    limit = round(float(number) * scale * TIME_UNITS.get(unit, 1.0), 9)
    if limit >= 1e12:
        raise scanner.expected("a number below 1000000000000", at)
    return limit


def _scan_windows(scanner: _Scanner) -> tuple[float | None, float | None]:
    """The seconds of `over` and of `after`, in either order, each once; nothing may follow."""
    found: dict[str, float] = {}
    while True:
        scanner.take("")
        at = scanner.at
        word = scanner.take(r"(over|after)(?![A-Za-z])")
        if not word:
            break
        if word in found:
            raise scanner.expected(f"{word} only once", at)
        found[word] = _scan_duration(scanner)
    scanner.take("")
    if scanner.at < len(scanner.text):
        raise scanner.expected(
            " or ".join([*(word for word in ("over", "after") if word not in found), "the end"])
        )
    return found.get("over"), found.get("after")


def _scan_duration(scanner: _Scanner) -> float:
    scanner.take("")
    at = scanner.at
    number = scanner.take(NUMBER_WORD.pattern)
    unit = scanner.take(r"(min|[smh])(?![A-Za-z])")
    if not number or not unit:
        raise scanner.expected("a time such as 30s or 2m", at if not number else None)
    seconds = float(number) * DURATION_UNITS[unit]
    if not 1 <= seconds <= MAX_DURATION_S:
        raise scanner.expected("a time from 1s to 366 days", at)
    return seconds


def _why_not(threshold: Threshold) -> str | None:
    """Why Locust's numbers cannot answer this threshold, or None."""
    metric, over_s = threshold.metric, threshold.over_s
    if threshold.endpoint is None and metric not in TOTAL_METRICS:
        return f"Locust gives {metric} only for an endpoint: write 'GET /path: {metric} ...'"
    if (over_s or threshold.after_s) and metric not in TOTAL_METRICS:
        return f"{metric} is known of a whole run only, not over a window or after a warm-up"
    return None


def needs_histograms(threshold: Threshold) -> bool:
    """Whether only histograms tell: Locust itself has windows of counters of the totals, and
    its own current percentiles, of LOCUST_WINDOW_S."""
    if not threshold.over_s and not threshold.after_s:
        return False
    if threshold.endpoint is not None:
        return True
    is_locusts = threshold.over_s == LOCUST_WINDOW_S and threshold.metric in WINDOW_PERCENTILES
    return threshold.metric not in COUNTED and not is_locusts


def canonical_form(threshold: Threshold) -> str:
    """The one way a threshold is printed; reading it again gives the same threshold."""
    endpoint = threshold.endpoint
    if endpoint is not None:
        is_odd = not threshold.is_pattern and (re.search(r'[*":]', endpoint) or endpoint != endpoint.strip())
        endpoint = json.dumps(endpoint, ensure_ascii=False) if is_odd else endpoint
    words = [f"{endpoint}:"] if endpoint is not None else []
    words += [threshold.metric, threshold.op, _decimal(threshold.limit)]
    words += [f"over {_decimal(threshold.over_s)}s"] if threshold.over_s else []
    words += [f"after {_decimal(threshold.after_s)}s"] if threshold.after_s else []
    return " ".join(words)


def _decimal(number: float) -> str:
    """Up to nine decimals, no exponent, nothing superfluous."""
    text = f"{number:.9f}"
    return text.rstrip("0").rstrip(".")


THRESHOLD_KEYS = (
    "expr",
    "metric",
    "op",
    "value",
    "endpoint",
    "over",
    "after",
    "warnOnly",
    "abortOnFail",
    "delaySeconds",
)


def _accept_threshold(value: Any) -> Threshold:
    """A threshold as expression, as {"expr", ...}, or in the long form {"metric", "op", "value", ...}."""
    if isinstance(value, str):
        return parse_threshold(value)
    if not isinstance(value, dict):
        raise InvalidValue(f"allowed is an expression or an object, got {_shown(value)}")
    unknown = [name for name in value if name not in THRESHOLD_KEYS]
    if unknown:
        raise InvalidValue(f"unknown key {_shown(unknown[0])}; allowed are {', '.join(THRESHOLD_KEYS)}")
    given = {name: entry for name, entry in value.items() if entry is not None}
    flags = {name: given.pop(name, False) for name in ("warnOnly", "abortOnFail")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InvalidValue(f"{name}: allowed is true or false, got {_shown(flag)}")
    delay_s = _threshold_number(given.pop("delaySeconds", 0), "delaySeconds", 3600)
    if "expr" in given and len(given) > 1:
        raise InvalidValue(
            f"beside expr stands {', '.join(sorted(set(given) - {'expr'}))}; allowed is either expr or metric, op, value"
        )
    threshold = _long_form(given) if "expr" not in given else parse_threshold(_threshold_text(given, "expr"))
    abort = flags["abortOnFail"]
    if abort and threshold.metric in ("totalRequests", "totalFailures") and threshold.op in (">", ">=", "=="):
        raise InvalidValue(
            f"{threshold.expr}: a count that must be reached is known only at the end; abortOnFail is not allowed"
        )
    return threshold._replace(warn_only=flags["warnOnly"], abort_on_fail=abort, delay_s=float(delay_s))


def _threshold_text(given: dict[str, Any], name: str) -> str:
    if not isinstance(given.get(name), str) or not given[name]:
        raise InvalidValue(f"{name}: allowed is a text, got {_shown(given.get(name))}")
    return given[name]


def _threshold_number(value: Any, name: str, highest: float) -> float:
    if type(value) not in (int, float) or not 0 <= value <= highest:
        raise InvalidValue(f"{name}: allowed is a number from 0 to {_plain(highest)}, got {_shown(value)}")
    return value


def _long_form(given: dict[str, Any]) -> Threshold:
    """The long form, by way of the expression it stands for: one grammar, one set of refusals."""
    endpoint = _threshold_text(given, "endpoint") if "endpoint" in given else None
    limit = _threshold_number(given.get("value"), "value", 1e12 - 1)
    words = [json.dumps(endpoint, ensure_ascii=False) + ":"] if endpoint is not None else []
    words += [_threshold_text(given, "metric"), _threshold_text(given, "op"), _decimal(limit)]
    for name in ("over", "after"):
        if name in given:
            time_ = given[name]
            words.append(
                f"{name} {time_}"
                if isinstance(time_, str)
                else f"{name} {_decimal(_threshold_number(time_, name, MAX_DURATION_S))}s"
            )
    return parse_threshold(" ".join(words))


def _accept_thresholds(value: Any) -> tuple[Threshold, ...]:
    if not isinstance(value, list) or len(value) > MAX_THRESHOLDS:
        raise ValueError
    thresholds = []
    for index, entry in enumerate(value):
        try:
            thresholds.append(_accept_threshold(entry))
        except InvalidValue as error:
            raise InvalidValue(f"[{index}]: {error}") from None
    return tuple(thresholds)


THRESHOLDS = Check(
    f'a list of at most {MAX_THRESHOLDS} expressions such as "p95ResponseMs < 500", or objects with the keys {", ".join(THRESHOLD_KEYS)}',
    _accept_thresholds,
    schema={"type": "array", "maxItems": MAX_THRESHOLDS, "items": {"type": ["string", "object"]}},
)


def undecided(threshold: Threshold) -> Threshold:
    """The threshold as it was declared."""
    return threshold._replace(value=None, result="pending", first_failed_at=None, message=None)


# ---- comparison of runs -----------------------------------------------------
# What differs between two runs of the same thing is more than what differs within them: the
# machine, its neighbours, the hour. So a run is judged against several comparable ones. Each
# figure is a random effect (DerSimonian and Laird 1986): how far runs lie apart, and how exact
# each of them is, from its own time blocks (Woodruff 1952 for percentiles; Kish's design effect,
# as requests of one moment are alike). A figure has changed when it lies outside of where the
# next run would be expected (prediction interval: Higgins, Thompson, Spiegelhalter 2009), all
# figures together with false alarms in FAMILY_FALSE_ALARMS of the comparisons of equal runs
# (Holm 1979, weighted), and by more than its tolerance.

COMPARED = (
    "totalRequests",
    "totalRps",
    "errorRate",
    "avgResponseMs",
    "p50ResponseMs",
    "p95ResponseMs",
    "p99ResponseMs",
)
TOLERABLE = COMPARED[1:]
MIN_REQUESTS = {
    "avgResponseMs": 20,
    "p50ResponseMs": 20,
    "p95ResponseMs": 100,
    "p99ResponseMs": 500,
}  # fewer say nothing
COMPARE_WITH = ("baseline", "previous", "history")  # what a run may ask for
ENOUGH_RUNS = 5  # comparable ones, before their scatter is known
HISTORY_RUNS = 10  # the newest comparable ones are looked at
FAMILY_FALSE_ALARMS = 0.02  # of the comparisons of equal runs, over all figures together
CERTAINTY = 0.95  # of the intervals that are shown
ROUNDING_STEPS = 1.5  # of Locust's rounding that a time must change by where only that is known
LEAST_SCATTER = 0.01  # between runs; five runs that are more alike are so by chance
ASSUMED_SCATTER = {  # while too few runs are known: more than equal runs on a busy machine differ
    "totalRps": 0.15, "errorRate": 0.03, "avgResponseMs": 0.15,
    "p50ResponseMs": 0.15, "p95ResponseMs": 0.25, "p99ResponseMs": 0.40,
}  # fmt: skip
WEIGHTS = {  # of an endpoint's figures within the family: those that tell most get the most of its false alarms
    "errorRate": 2.0, "avgResponseMs": 4.0, "p50ResponseMs": 4.0, "p95ResponseMs": 2.0, "p99ResponseMs": 1.0,
}  # fmt: skip
BLOCK_DEGREES = 20.0  # of freedom that the scatter within runs is taken to have
KNOWN = 1e3  # degrees of freedom of a scatter that is taken as known


class Tolerance(NamedTuple):
    """How much worse a figure may be: percent of the reference, or in its own unit."""

    amount: float
    is_percent: bool

    def __str__(self) -> str:
        return _decimal(self.amount) + ("%" if self.is_percent else "")


DEFAULT_TOLERANCES = {
    "avgResponseMs": Tolerance(5, True),
    "p50ResponseMs": Tolerance(5, True),
    "p95ResponseMs": Tolerance(10, True),
    "p99ResponseMs": Tolerance(20, True),
    "errorRate": Tolerance(0.5, False),
    "totalRps": Tolerance(10, True),
}


def _accept_tolerances(text: Any) -> dict[str, Tolerance]:
    tolerances: dict[str, Tolerance] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*:\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*(%?)\s*", part, re.ASCII)
        if not match or match.group(1) not in TOLERABLE or match.group(1) in tolerances:
            raise ValueError
        tolerances[match.group(1)] = Tolerance(float(match.group(2)), bool(match.group(3)))
    return tolerances


TOLERANCES = Check(
    f"metric:number or metric:number%, joined by commas; metrics are {', '.join(TOLERABLE)}",
    _accept_tolerances,
)


class Figure(NamedTuple):
    """A figure of one run, and the variance that it has within the run (of `_scaled`)."""

    value: float
    variance: float


Figures = dict[str, Figure]  # by metric
TimeBlocks = dict[Endpoint | None, list[Histogram]]


class RunFigures(NamedTuple):
    """What a run's comparison is made from. is_exact: of the hooks' exact times, all of them."""

    rows: dict[Endpoint | None, Figures]
    counts: dict[Endpoint | None, tuple[int, int]]  # requests, failures
    is_exact: bool


def _scaled(metric: str, value: float) -> float:
    """The scale on which runs scatter alike: logarithm; of an error rate, its arcsine."""
    if metric == "errorRate":
        return math.asin(math.sqrt(min(1.0, max(0.0, value / 100))))
    return math.log(max(value, 0.5) if metric.endswith("Ms") else max(value, 1e-9))


def _unscaled(metric: str, scaled: float) -> float:
    if metric == "errorRate":
        return 100 * math.sin(min(math.pi / 2, max(0.0, scaled))) ** 2
    return math.exp(min(scaled, 60.0))


def quantile_ms(
    times: dict[int, int], ratio: float, step_ms: Callable[[float], float] | None = None
) -> float:
    """The percentile with its place within the bucket: times are taken as spread evenly over it.
    step_ms: how wide the bucket at a time is, unless it is the hooks'."""
    wanted, seen = ratio * sum(times.values()), 0
    for ms in sorted(times):
        if seen + times[ms] >= wanted and times[ms]:
            width = (step_ms or _bucket_ms)(ms)
            return max(0.0, ms - width / 2 + width * (wanted - seen) / times[ms])
        seen += times[ms]
    return float(max(times, default=0))


def _bucket_ms(ms: float) -> float:
    """How wide the hooks' bucket is: 1 ms up to 1 s, then three digits."""
    return 1.0 if ms < 1000 else 10.0 ** (len(str(int(ms))) - 3)


def locust_step_ms(value: float) -> float:
    """How far apart the response times are that Locust can report near a value: it keeps two digits."""
    return 1.0 if value < 100 else 10.0 if value < 1000 else 100.0 * 10 ** (len(str(int(value))) - 4)


def _is_rounded(times: dict[int, int]) -> bool:
    """Whether the times have Locust's two digits, as those of its own files and of older hooks."""
    return any(ms >= 100 for ms in times) and all(ms % locust_step_ms(ms) == 0 for ms in times)


def figures_of_blocks(parts: list[Histogram]) -> Figures:
    """The figures of one endpoint's time blocks; without requests there are none."""
    whole = functools.reduce(_sum, parts)
    found: Figures = {}
    if whole.requests:
        spread = _design_effect([(part.requests, part.failures) for part in parts])
        found["errorRate"] = _error_figure(whole.requests, whole.failures, spread)
    if not whole.times:
        return found
    found["avgResponseMs"] = _average_figure(whole, parts)
    for metric, ratio in PERCENTILE_RATIOS.items():
        found[metric] = _percentile_figure(whole.times, parts, ratio)
    return found


def _error_figure(requests: int, failures: int, spread: float = 1.0) -> Figure:
    return Figure(100.0 * failures / requests, spread / (4 * requests + 2))


def _average_figure(whole: Histogram, parts: list[Histogram]) -> Figure:
    count = sum(whole.times.values())
    mean = whole.total_ms / count
    if mean <= 0:
        return Figure(mean, 1.0)
    variance = max(0.0, sum(ms * ms * n for ms, n in whole.times.items()) / count - mean * mean) / count
    blocks = [(sum(part.times.values()), part.total_ms) for part in parts if part.times]
    if len(blocks) > 2:
        between = sum(n * (total / n - mean) ** 2 for n, total in blocks) / (len(blocks) - 1) / count
        variance = max(variance, between)
    return Figure(mean, variance / mean**2)


def _percentile_figure(times: dict[int, int], parts: list[Histogram], ratio: float) -> Figure:
    step_ms = locust_step_ms if _is_rounded(times) else _bucket_ms
    value, count = quantile_ms(times, ratio, step_ms), sum(times.values())
    blocks = [(sum(part.times.values()), _requests_above(part, value)) for part in parts]
    error = math.sqrt(ratio * (1 - ratio) * _design_effect(blocks) / count)
    sides = [min(1.0, max(0.0, ratio + sign * error)) for sign in (-1, 1)]
    low, high = (_scaled("Ms", quantile_ms(times, side, step_ms)) for side in sides)
    variance = max(((high - low) / 2) ** 2, _jackknife(times, parts, ratio))
    return Figure(value, variance + _grain(value, step_ms(value)))


def _jackknife(times: dict[int, int], parts: list[Histogram], ratio: float) -> float:
    """The variance of a percentile's logarithm when each time block in turn is left out: one burst that
    makes all of a p99 shows only so."""
    known = [part.times for part in parts if part.times]
    if len(known) < 3:
        return 0.0
    found = []
    for part in known:
        rest = dict(times)
        for ms, requests in part.items():
            rest[ms] -= requests
        found.append(_scaled("Ms", quantile_ms(rest, ratio)))
    return (len(found) - 1) ** 2 / len(found) * _variance(found)


def _grain(value: float, step_ms: float) -> float:
    """The variance, relative to the value, that rounding to steps makes."""
    return (step_ms / max(value, 1.0)) ** 2 / 12


def _requests_above(part: Histogram, limit: float) -> int:
    return sum(requests for ms, requests in part.times.items() if ms > limit)


def _design_effect(blocks: list[tuple[int, int]]) -> float:
    """How many times more the counts (n, of them k) scatter than chance makes them; at least 1."""
    n, k = sum(n for n, _ in blocks), sum(k for _, k in blocks)
    known = [block for block in blocks if block[0]]
    if len(known) < 3 or not 0 < k < n:
        return 1.0
    ratio = k / n
    chance = sum((k - n * ratio) ** 2 / (n * ratio * (1 - ratio)) for n, k in known)
    return max(1.0, chance / (len(known) - 1))


def last_of_each_step(points: Iterable[HistogramPoint], step_s: float) -> list[HistogramPoint]:
    return list({math.floor(point.at / step_s): point for point in points}.values())


def time_blocks_of(points: list[HistogramPoint], total_requests: int | None) -> TimeBlocks | None:
    """A run's histograms by time block, from those of points in time; None when they do not hold
    all of its requests, as when a Locust without hooks ended it."""
    if not points or points[-1].histograms.get(None, Histogram(0, 0, 0, {})).requests != total_requests:
        return None
    found: TimeBlocks = {key: [] for key in points[-1].histograms}
    for before, point in zip([HistogramPoint(0, {}), *points], points):
        for key, histogram in point.histograms.items():
            part = since(histogram, before.histograms.get(key))
            if part is None:
                return None
            if part.requests:
                found[key].append(part)
    return {key: parts for key, parts in found.items() if parts}


def run_figures(run: dict[str, Any], blocks: TimeBlocks | None) -> RunFigures:
    """What a run is compared by, from its JSON and its time blocks. Without these, and of endpoints
    that have none, the figures are Locust's own, with its two digits."""
    rows, counts = {}, {}
    for key, stats in _locust_rows(run):
        counts[key] = stats.get("requests") or 0, stats.get("failures") or 0
        own = {
            metric: Figure(stats[metric], _grain(stats[metric], locust_step_ms(stats[metric])))
            for metric in (*PERCENTILE_RATIOS, "avgResponseMs")
            if stats.get(metric) is not None
        }
        if counts[key][0]:
            own["errorRate"] = _error_figure(*counts[key])
        rows[key] = figures_of_blocks(blocks[key]) if blocks and key in blocks else own
    rps = ((run.get("lastMetrics") or {}).get("totalRps")) or 0.0
    if None in rows and rps > 0:
        within = rows[None].get("avgResponseMs", Figure(0.0, 0.0)).variance  # users wait for each answer
        rows[None]["totalRps"] = Figure(rps, within)
    is_exact = bool(blocks) and not any(_is_rounded(part.times) for part in blocks.get(None, ()))
    return RunFigures(rows, counts, is_exact)


def _locust_rows(run: dict[str, Any]) -> Iterator[tuple[Endpoint | None, dict[str, Any]]]:
    """The totals and endpoints of a run's JSON, by the names of figures."""
    metrics = run.get("lastMetrics")
    if not metrics:
        return
    yield (
        None,
        {**metrics, "requests": metrics.get("totalRequests"), "failures": metrics.get("totalFailures")},
    )
    names = {attribute: name for name, attribute in ENDPOINT_KEYS.items()}
    for row in (metrics.get("requestStats") or {}).values():
        found = {
            metric: row.get(names[ENDPOINT_METRICS[metric]])
            for metric in (*PERCENTILE_RATIOS, "avgResponseMs")
        }
        counts = {"requests": row.get("numRequests"), "failures": row.get("numFailures")}
        yield (row["method"], row["name"]), {**found, **counts}


def run_figures_to_record(figures: RunFigures) -> bytes:
    """As it is kept beside a run."""
    rows = [
        [*(key or (None, None)), *figures.counts[key], {metric: list(one) for metric, one in row.items()}]
        for key, row in figures.rows.items()
    ]
    return dump_json([figures.is_exact, rows]).encode()


def run_figures_from_record(record: bytes) -> RunFigures:
    is_exact, kept = json.loads(record)
    rows: dict[Endpoint | None, Figures] = {}
    counts: dict[Endpoint | None, tuple[int, int]] = {}
    for method, name, requests, failures, figures in kept:
        key = None if name is None else (method, name)
        counts[key] = requests, failures
        rows[key] = {metric: Figure(*one) for metric, one in figures.items()}
    return RunFigures(rows, counts, is_exact)


# ---- comparison: Student's t, for any degrees of freedom --------------------


def t_tail(t: float, degrees: float) -> float:
    """The probability that Student's t is larger (one-sided)."""
    if t < 0:
        return 1.0 - t_tail(-t, degrees)
    return 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(probability: float, degrees: float) -> float:
    """The t that is exceeded with this probability (at most 0.5), by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > probability and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > probability else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny, c, d = 1e-300, 1.0, 1.0 / (1 - (a + b) * x / (a + 1) or 1e-300)
    result = d
    for m in range(1, 300):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            result *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return min(1.0, front * result / a)


# ---- comparison: one figure against where equal runs would lie --------------


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: list[float]) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


class Shift(NamedTuple):
    """How far a figure lies from the reference, on its scale, and what equal runs make of it."""

    reference: float
    shift: float
    deviation: float  # standard deviation of the shift between equal runs
    degrees: float  # of freedom of the deviation

    def p_worse(self, metric: str) -> float:
        """The probability that equal runs differ as much, in the worse direction."""
        sign = -1 if metric == "totalRps" else 1
        return t_tail(sign * self.shift / self.deviation, self.degrees)

    def value_at(self, metric: str, shift: float) -> float:
        return _unscaled(metric, self.reference + shift)


def shift_of(metric: str, reference: list[Figure], now: Figure, scatter: list[Figure]) -> Shift:
    """How far `now` is from the mean of the reference runs. scatter: of the comparable runs that tell
    how far runs lie apart; with fewer than ENOUGH_RUNS that is assumed."""
    places = [_scaled(metric, one.value) for one in reference]
    shift = _scaled(metric, now.value) - _mean(places)
    within = now.variance + _mean([one.variance for one in reference]) / len(reference)
    between, spread = _scatter_between(metric, scatter)
    both = 1 + 1 / len(reference)
    variance = between * both + within
    # Satterthwaite: what is uncertain is the spread of the few runs, not only its part between them.
    uncertain = (spread * both) ** 2 / max(1, len(scatter) - 1) + within**2 / BLOCK_DEGREES
    degrees = min(KNOWN, variance**2 / uncertain) if uncertain else KNOWN
    return Shift(_mean(places), shift, math.sqrt(variance), degrees)


def _scatter_between(metric: str, scatter: list[Figure]) -> tuple[float, float]:
    """The variance between runs beyond that within them, and the whole one that was seen; 0: assumed."""
    if len(scatter) < ENOUGH_RUNS:
        return ASSUMED_SCATTER[metric] ** 2, 0.0
    spread = _variance([_scaled(metric, one.value) for one in scatter])
    between = spread - _mean([one.variance for one in scatter])
    return max(between, LEAST_SCATTER**2), spread


def alarms_among(p_values: list[tuple[float, float]], rate: float) -> set[int]:
    """Which of the tests (p-value, weight) are alarms, so that any is a false one in at most `rate`
    of the families: Holm's step-down, with weights."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index][0] / p_values[index][1])
    left = math.fsum(weight for _, weight in p_values)
    found = set()
    for index in order:
        p_value, weight = p_values[index]
        if p_value > rate * weight / left:
            break
        found.add(index)
        left -= weight
    return found


# ---- comparison: all figures of two runs, or of a run and its history -------

REGRESSION, IMPROVEMENT, NOISE, CANNOT_TELL = "regression", "improvement", "within noise", "cannot tell"
JUDGEMENTS = (REGRESSION, IMPROVEMENT, NOISE, CANNOT_TELL)
NO_REGRESSION = "no regression"


class ComparedRun(NamedTuple):
    """A run as JSON, and the figures to compare it by."""

    document: dict[str, Any]
    figures: RunFigures


def compared_run(document: dict[str, Any], blocks: TimeBlocks | None = None) -> ComparedRun:
    return ComparedRun(document, run_figures(document, blocks))


class _Judge:
    """One comparison: collects the figures, then judges all of them together."""

    def __init__(
        self, reference: list[ComparedRun], candidate: ComparedRun, scatter: list[ComparedRun],
        tolerances: dict[str, Tolerance], unfair: str | None,
    ):  # fmt: skip
        self.reference, self.candidate, self.scatter = reference, candidate, scatter
        self.tolerances = tolerances
        self.unfair = unfair  # why nothing can be told, or None
        self.is_exact = all(run.figures.is_exact for run in (*reference, candidate))
        self.entries: list[dict[str, Any]] = []
        self._tests: list[tuple[dict[str, Any], Shift, float]] = []

    def judge(self) -> list[dict[str, Any]]:
        """An entry for each figure of each endpoint, the totals first."""
        keys = {key for run in (*self.reference, self.candidate) for key in run.figures.rows}
        for key in sorted(keys, key=lambda key: (key is not None, key or ())):
            for metric in COMPARED:
                if key is None or metric != "totalRps":
                    self._add(key, metric)
        self._decide()
        return self.entries

    def _add(self, key: Endpoint | None, metric: str) -> None:
        if metric == "totalRequests":
            before = [
                float(run.figures.counts[key][0]) for run in self.reference if key in run.figures.counts
            ]
            now = self.candidate.figures.counts.get(key)
            entry = self._entry(key, metric, _mean(before) if before else None, now and float(now[0]))
            self._cannot_tell(
                entry, "not judged: the number of requests follows from the load and its duration"
            )
            return
        found = [
            self._figures(runs, key, metric) for runs in (self.reference, [self.candidate], self.scatter)
        ]
        if not found[0] or not found[1]:
            values = [figures[0].value if figures else None for figures in found[:2]]
            self._cannot_tell(self._entry(key, metric, *values), "not in both")
            return
        shift = shift_of(metric, found[0], found[1][0], found[2])
        entry = self._entry(key, metric, shift.value_at(metric, 0.0), found[1][0].value)
        why = self.unfair or self._too_few_requests(key, metric)
        if why:
            self._cannot_tell(entry, why)
            return
        entry["runs"] = len(found[2])
        weight = WEIGHTS.get(metric, 1.0) * (0.5 if key is None else 1.0)
        self._tests.append((entry, shift, weight))

    def _figures(self, runs: list[ComparedRun], key: Endpoint | None, metric: str) -> list[Figure]:
        rows = (run.figures.rows.get(key, {}) for run in runs)
        return [row[metric] for row in rows if metric in row]

    def _too_few_requests(self, key: Endpoint | None, metric: str) -> str | None:
        runs = [run for run in (*self.reference, self.candidate) if key in run.figures.counts]
        seen, least = min(run.figures.counts[key][0] for run in runs), MIN_REQUESTS.get(metric, 0)
        return f"too few requests: {seen}, {least} are needed" if seen < least else None

    def _entry(
        self, key: Endpoint | None, metric: str, before: float | None, after: float | None
    ) -> dict[str, Any]:
        endpoint = None if key is None else " ".join(part for part in key if part)
        entry = {"key": key, "endpoint": endpoint, "metric": metric, **_change(before, after)}
        self.entries.append(entry)
        return entry

    def _cannot_tell(self, entry: dict[str, Any], why: str) -> None:
        entry.update(judgement=CANNOT_TELL, reason=why)

    def _decide(self) -> None:
        worse = [(shift.p_worse(entry["metric"]), weight) for entry, shift, weight in self._tests]
        better = [(1.0 - p_value, weight) for p_value, weight in worse]
        alarms = alarms_among(worse, FAMILY_FALSE_ALARMS)
        gains = alarms_among(better, FAMILY_FALSE_ALARMS)
        in_all = math.fsum(weight for *_, weight in self._tests)
        for index, (entry, shift, weight) in enumerate(self._tests):
            self._add_interval(entry, shift, FAMILY_FALSE_ALARMS * weight / in_all)
            entry["pValue"] = worse[index][0]
            is_beyond = index in alarms or index in gains
            if is_beyond and self._is_beyond_tolerance(entry):
                entry["judgement"] = REGRESSION if index in alarms else IMPROVEMENT
                entry["reason"] = self._reason(entry)
            elif entry["runs"] < ENOUGH_RUNS:
                self._cannot_tell(entry, f"not enough runs to tell: {entry['runs']} of {ENOUGH_RUNS}")
            else:
                entry["judgement"] = NOISE
                entry["reason"] = "within the tolerance" if is_beyond else "as equal runs differ"

    def _add_interval(self, entry: dict[str, Any], shift: Shift, level: float) -> None:
        metric = entry["metric"]
        half = t_quantile((1 - CERTAINTY) / 2, shift.degrees) * shift.deviation
        sides = [shift.value_at(metric, shift.shift + sign * half) - entry["baseline"] for sign in (-1, 1)]
        entry["interval"] = [round(side, 4) for side in sides]
        half = t_quantile(level, shift.degrees) * shift.deviation
        entry["equalRuns"] = [round(shift.value_at(metric, sign * half), 4) for sign in (-1, 1)]

    def _is_beyond_tolerance(self, entry: dict[str, Any]) -> bool:
        tolerance = self.tolerances[entry["metric"]]
        allowed = entry["baseline"] * tolerance.amount / 100 if tolerance.is_percent else tolerance.amount
        if entry["metric"].endswith("Ms") and not self.is_exact:
            step = locust_step_ms(max(entry["baseline"], entry["candidate"]))
            allowed = max(allowed, ROUNDING_STEPS * step)
        return abs(entry["change"]) > allowed

    def _reason(self, entry: dict[str, Any]) -> str:
        low, high = (_decimal(round(side, 2)) for side in entry["equalRuns"])
        few = entry["runs"] < ENOUGH_RUNS
        rest = f"are assumed to be, as only {entry['runs']} of {ENOUGH_RUNS} are known" if few else "are"
        return f"beyond {low} to {high}, where equal runs {rest}"


def _change(before: float | None, after: float | None) -> dict[str, Any]:
    known = before is not None and after is not None
    return {
        "baseline": before,
        "candidate": after,
        "change": after - before if known else None,
        "changePercent": 100.0 * (after - before) / before if known and before else None,
    }


def figure_sentence(entry: dict[str, Any]) -> str:
    """A figure of a comparison in words: what became of it, and how it is judged."""
    where = f"{entry['endpoint'] or 'totals'}: {entry['metric']}"
    if entry["change"] is None:
        return f"{where}: {entry['judgement']}: {entry['reason']}"
    percent = f" ({entry['changePercent']:+.1f}%)" if entry["changePercent"] is not None else ""
    figures = f"{_decimal(round(entry['baseline'], 2))} to {_decimal(round(entry['candidate'], 2))}"
    return f"{where} went from {figures}{percent}: {entry['judgement']}, {entry['reason']}"


def compare_runs(
    reference: list[ComparedRun], candidate: ComparedRun, tolerances: dict[str, Tolerance] | None = None,
    scatter: list[ComparedRun] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A run against one or more reference runs. scatter: comparable runs that tell how far runs lie
    apart, those of the reference unless given."""
    wanted = {**DEFAULT_TOLERANCES, **(tolerances or {})}
    scatter = reference if scatter is None else scatter
    documents = [run.document for run in reference]
    differences = list(
        dict.fromkeys(words for one in documents for words in unfairness(one, candidate.document))
    )
    unreliable = list(_unreliable_data([*documents, candidate.document]))
    unfair = "different load: " + "; ".join(differences) if differences else None
    judge = _Judge(reference, candidate, scatter, wanted, unfair or (unreliable[0] if unreliable else None))
    entries = judge.judge()
    regressions = [entry for entry in entries if entry["judgement"] == REGRESSION]
    endpoints = _endpoint_entries(entries, reference, candidate)
    changed = [
        f"endpoint {one['method']} {one['name']} is {one['state']}" for one in endpoints if "state" in one
    ]
    found = {
        "baseline": documents[-1]["id"],
        "runs": [document["id"] for document in documents],
        "candidate": candidate.document["id"],
        "tolerances": {name: str(tolerance) for name, tolerance in wanted.items()},
        "noiseJudged": len(scatter) >= ENOUGH_RUNS,
        "runsKnown": len(scatter),
        "runsNeeded": ENOUGH_RUNS,
        "exactTimes": judge.is_exact,
        "falseAlarmRate": FAMILY_FALSE_ALARMS,
        "totals": {entry["metric"]: _shown_entry(entry) for entry in entries if entry["key"] is None},
        "endpoints": endpoints,
        "differences": [*differences, *changed],
        "warnings": unreliable,
        "noise": _sentences(entries, NOISE, IMPROVEMENT),
        "regressions": [_shown_regression(entry) for entry in regressions],
        "figures": [_shown_figure(entry) for entry in entries],
    }
    found["judgement"], found["message"] = _overall(entries, found)
    return found


def _sentences(entries: list[dict[str, Any]], *judgements: str) -> list[str]:
    """Those that changed by more than their tolerance is worth a sentence, or improved."""
    return [
        figure_sentence(entry)
        for entry in entries
        if entry["judgement"] in judgements and abs(entry["changePercent"] or 0.0) >= 5.0
    ]


def _overall(entries: list[dict[str, Any]], found: dict[str, Any]) -> tuple[str, str]:
    """What the whole comparison comes to, and a sentence."""
    judged = [entry for entry in entries if entry["judgement"] != CANNOT_TELL]
    count = len(found["regressions"])
    if count:
        return REGRESSION, f"{count} of {len(judged)} figures got worse"
    if judged and found["noiseJudged"]:
        return NO_REGRESSION, f"none of {len(judged)} figures got worse"
    reasons = [
        entry["reason"] for entry in entries if entry["metric"] != "totalRequests" and "reason" in entry
    ]
    return CANNOT_TELL, reasons[0] if reasons else "there are no numbers"


def _endpoint_entries(
    entries: list[dict[str, Any]], reference: list[ComparedRun], candidate: ComparedRun
) -> list[dict[str, Any]]:
    found: dict[Endpoint, dict[str, Any]] = {}
    before = {key for run in reference for key in run.figures.rows}
    for entry in entries:
        key = entry["key"]
        if key is None:
            continue
        row = found.setdefault(key, {"method": key[0], "name": key[1]})
        if (key in before) != (key in candidate.figures.rows):
            row["state"] = "gone" if key in before else "new"
        row.setdefault("metrics", {})[entry["metric"]] = _shown_entry(entry)
    return list(found.values())


def _shown_entry(entry: dict[str, Any]) -> dict[str, Any]:
    hidden = ("key", "endpoint", "metric", "runs")
    return {name: value for name, value in entry.items() if name not in hidden}


def _shown_figure(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("key", "runs")}


def _shown_regression(entry: dict[str, Any]) -> dict[str, Any]:
    return {**_shown_figure(entry), "message": figure_sentence(entry)}


PLAN_NAMES = ("userClasses", "tags", "excludeTags", "options", "stages")
ASKED_FOR = {  # what two runs must share for a fair comparison, in words
    "tenantId": "tenant", "envId": "environment", "scenarioId": "scenario", "targetUsers": "users", "spawnRate": "spawn rate",
    "locustfileSha256": "locustfile (its hash)", "locustClusterId": "cluster", "userClasses": "user classes",
    "tags": "tags", "excludeTags": "excluded tags", "options": "options", "stages": "stages",
}  # fmt: skip


def unfairness(baseline: dict[str, Any], candidate: dict[str, Any]) -> Iterator[str]:
    """Sentences on what differs between the two beyond their results."""
    for name, words in ASKED_FOR.items():
        one, other = baseline.get(name), candidate.get(name)
        if one != other and (one is not None and other is not None or name in PLAN_NAMES):
            yield f"{words} differs: {_in_words(one)} and {_in_words(other)}"
    for role, run in (("baseline", baseline), ("candidate", candidate)):
        changes = run.get("usersChanges") or ()
        if changes:
            users = ", ".join(str(change.get("targetUsers")) for change in changes[:5])
            yield f"users were changed during the {role} ({run['id'][:8]}), to {users}"
    lasted = [_lasted_s(run) for run in (baseline, candidate)]
    if None not in lasted and abs(lasted[0] - lasted[1]) > max(2.0, 0.1 * max(lasted)):
        yield f"duration differs: {lasted[0]:.0f} s and {lasted[1]:.0f} s"


def _in_words(value: Any) -> str:
    return (
        "none"
        if value is None
        else str(value)
        if isinstance(value, (str, int, float))
        else dump_json(value)[:200]
    )


def _lasted_s(run: dict[str, Any]) -> float | None:
    if not run.get("startedAt") or not run.get("finishedAt"):
        return None
    return parse_utc(run["finishedAt"]) - parse_utc(run["startedAt"])


def _unreliable_data(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Why the numbers of the runs, the last of them the candidate, are not to be compared."""
    for index, run in enumerate(runs):
        role = "candidate" if index == len(runs) - 1 else f"baseline ({run['id'][:8]})"
        if run["status"] not in ("Finished", "Failed"):
            yield f"the {role} is still {run['status']}: its numbers are not final"
        for reason in run.get("trustReasons") or ():
            yield f"unreliable data of the {role}: {reason}"
        if not run.get("lastMetrics"):
            yield f"the {role} has no numbers"


MAX_KEPT_FIGURES = 60  # of a comparison, in the run


def comparison_summary(compared_with: str, comparison: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps of its comparison: of many figures those that say most."""
    names = (
        "baseline", "runs", "tolerances", "differences", "warnings", "noise", "noiseJudged", "judgement",
        "message", "runsKnown", "runsNeeded", "exactTimes",
    )  # fmt: skip
    ranks = {REGRESSION: 0, IMPROVEMENT: 1}
    figures = comparison["figures"]
    kept = sorted(
        range(len(figures)),
        key=lambda index: (
            ranks.get(figures[index]["judgement"], 2 + (figures[index]["endpoint"] is not None)), index,
        ),
    )[:MAX_KEPT_FIGURES]  # fmt: skip
    return {
        "with": compared_with,
        **{name: comparison[name] for name in names},
        "figures": [figures[index] for index in sorted(kept)],
        "figuresCut": len(figures) - len(kept),
        "regressions": [one["message"] for one in comparison["regressions"]],
    }


def is_comparable(other: Run, run: Run) -> bool:
    """Whether a run may serve as what is normal for another: the same load, reliable, no regression."""
    asked = ("tenant_id", "env_id", "scenario_id", "cluster_id", "locustfile_sha256", "target_users", "spawn_rate", "duration_s", "plan")  # fmt: skip
    if other.status is not RunStatus.FINISHED or doubts_of(other) or other.load_changes:
        return False
    if (other.comparison or {}).get("regressions"):
        return False
    return all(getattr(other, name) == getattr(run, name) for name in asked)


def no_comparison(compared_with: str, why: str) -> dict[str, Any]:
    return {
        "with": compared_with, "baseline": None, "regressions": [], "judgement": CANNOT_TELL, "message": why,
    }  # fmt: skip


# ---- thresholds: whether they hold ------------------------------------------


def _holds(threshold: Threshold, value: float) -> bool:
    return COMPARISONS[threshold.op](value, threshold.limit)


def _worst(threshold: Threshold, found: list[tuple[float, Any]]) -> tuple[float, Any]:
    """Of several values the one that is farthest on the wrong side."""
    if threshold.op == "==":
        return max(found, key=lambda pair: abs(pair[0] - threshold.limit))
    return (max if threshold.op in ("<", "<=") else min)(found, key=lambda pair: pair[0])


def push_interval(thresholds: Iterable[Threshold]) -> str:
    """How often the hooks are to push for these thresholds, in seconds as text: a fifth of the
    shortest window that is made from histograms, 1 s to 10 s; "" where none is."""
    windows = [threshold.over_s or 50.0 for threshold in thresholds if needs_histograms(threshold)]
    return f"{min(10.0, max(1.0, min(windows) / 5)):g}" if windows else ""


def _is_meant(threshold: Threshold, method: str, name: str) -> bool:
    """An endpoint goes by "METHOD name", or by its name alone."""
    names = (f"{method} {name}".strip(), name)
    if not threshold.is_pattern:
        return threshold.endpoint in names
    pieces = (threshold.endpoint or "").split("*")
    return any(_fits(name, pieces) for name in names)


def _fits(name: str, pieces: list[str]) -> bool:
    """Whether the name is the pieces in order with any text between; no regular expression,
    which a pattern of many stars could keep busy for hours."""
    first, *middle, last = pieces
    if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
        return False
    at, end = len(first), len(name) - len(last)
    for piece in middle:
        found = name.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def _value_of_row(metric: str, row: EndpointStats) -> float | None:
    if metric == "errorRate":
        return (
            None
            if not row.requests or row.failures is None
            else min(100.0, 100.0 * row.failures / row.requests)
        )
    value = getattr(row, ENDPOINT_METRICS[metric])
    return value if row.requests else None


def whole_run_value(threshold: Threshold, snapshot: Snapshot | None) -> tuple[float | None, str | None]:
    """The value for the whole run so far, and a sentence: whose it is, or why there is none."""
    if snapshot is None:
        return None, "no numbers came from Locust"
    if threshold.endpoint is None:
        value = getattr(snapshot, TOTAL_METRICS[threshold.metric])
        has_requests = bool(snapshot.requests) or threshold.metric in ("totalRequests", "totalFailures")
        return (value, None) if value is not None and has_requests else (None, "there was no request")
    rows = [row for row in snapshot.endpoints or () if _is_meant(threshold, row.method, row.name)]
    if not rows:
        return None, "there is no such endpoint"
    found = [(value, row) for row in rows if (value := _value_of_row(threshold.metric, row)) is not None]
    if not found:
        return None, "the endpoint had no request"
    value, row = _worst(threshold, found)
    return value, f"of {row.method} {row.name}" if threshold.is_pattern else None


# Windows of counters. Numbers of now are known only roughly: Locust keeps an answer for 2 s, and its
# workers report every 3 s, so that a rate made of two of them may be wrong by half over 10 s. Rates and
# counts are made of the hooks' exact counts, else they are Locust's own rate, which covers 10 s; what
# neither tells is not known. A proportion, as errorRate, does not depend on the time.

RATE_SETTLES_S = 5.0  # Locust's rate ends 2 s before its last request, and workers report every 3 s
TIMED = ("totalRequests", "totalFailures", "totalRps")
LOCUST_RATES = {"totalRequests": "rps", "totalRps": "rps", "totalFailures": "fails_per_s"}


def window_value(threshold: Threshold, newest: Sample, anchor: Sample) -> float | None:
    """The value between two samples, from their counters; None when they do not tell.

    Counts of a window are those of its length, where the samples are farther apart."""
    if newest.requests is None or anchor.requests is None or newest.at <= anchor.at:
        return None
    requests = newest.requests - anchor.requests
    failures = (newest.failures or 0) - (anchor.failures or 0)
    if requests < 0 or failures < 0:
        return None  # the statistics were reset
    if threshold.metric == "errorRate":
        return min(100.0, 100.0 * failures / requests) if requests else None
    seconds = newest.at - anchor.at
    length = min(threshold.over_s or seconds, seconds)
    counts = {
        "totalRequests": requests * length / seconds,
        "totalFailures": failures * length / seconds,
        "totalRps": requests / seconds,
    }
    return counts[threshold.metric]


def _at_counted(sample: Sample) -> Sample:
    """The sample as of the second until which all requests are counted, if that is known."""
    if sample.counted_at is None:
        return sample
    return sample._replace(
        at=sample.counted_at, requests=sample.counted_requests, failures=sample.counted_failures
    )


def newest_window(threshold: Threshold, samples: list[Sample], started_at: float) -> float | None:
    """The value of the window that ends with the last of the samples; None before a whole
    window has passed since the start or the warm-up, or when it has no data."""
    newest, over_s = samples[-1], threshold.over_s
    begin = started_at + (threshold.after_s or 0.0)
    if over_s and threshold.metric in WINDOW_PERCENTILES:
        is_whole = newest.at >= begin + over_s
        return getattr(newest, WINDOW_PERCENTILES[threshold.metric]) if is_whole else None
    if threshold.metric in TIMED:
        if newest.counted_at is None:
            return _locusts_rate(threshold, samples, begin)
        samples = [_at_counted(sample) for sample in samples if sample.counted_at is not None]
        newest = samples[-1]
    if over_s is None:  # only `after`: from then to now
        anchor = next((sample for sample in samples if sample.at >= begin), newest)
        return window_value(threshold, newest, anchor)
    if newest.at < begin + over_s:
        return None
    last = bisect.bisect_right(samples, newest.at - over_s, key=lambda sample: sample.at) - 1
    is_known = last >= 0 and samples[last].at >= started_at
    return window_value(threshold, newest, samples[last]) if is_known else None


def _locusts_rate(threshold: Threshold, samples: list[Sample], begin: float) -> float | None:
    """A rate or count of a window by Locust's own rate, which covers the 10 s before a sample; None for
    a shorter window. What lies before `begin` does not count: of a warm-up nothing may be left in it."""
    newest, over_s = samples[-1], threshold.over_s
    if any(sample.counted_at is not None for sample in samples):
        return None  # the hooks tell exactly, with the next sample
    settles_s = RATE_SETTLES_S if threshold.after_s else 0.0
    first_at = begin + LOCUST_WINDOW_S + settles_s
    if over_s:
        if over_s < LOCUST_WINDOW_S or newest.at < begin + over_s + settles_s:
            return None
        first_at = max(first_at, newest.at - over_s + LOCUST_WINDOW_S)
    elif threshold.metric != "totalRps":  # a count since the warm-up: some seconds more or less
        anchor = next((sample for sample in samples if sample.at >= begin), newest)
        return window_value(threshold, newest, anchor)
    name = LOCUST_RATES[threshold.metric]
    inside = [sample for sample in samples if sample.at >= first_at - 0.001]
    rates = [rate for sample in inside if (rate := getattr(sample, name)) is not None]
    if not rates:
        return None
    return sum(rates) / len(rates) * (1 if threshold.metric == "totalRps" else over_s or 0.0)


def judge_windows(
    threshold: Threshold, samples: list[Sample], moments: tuple[float, float]
) -> tuple[float | None, float | None]:
    """The worst value of all windows, and the moment at which one failed first."""
    started_at, finished_at = moments
    live = [sample for sample in samples if started_at <= sample.at <= finished_at + 0.001]
    if threshold.metric in TIMED and any(sample.counted_at is not None for sample in live):
        live = [sample for sample in live if sample.counted_at is not None]
    if threshold.over_s is None:
        value = newest_window(threshold, live, started_at) if live else None
        return value, None
    found: list[tuple[float, float]] = []
    for end in range(1, len(live) + 1):
        first_at = live[end - 1].at - threshold.over_s - COUNTS_LAG_S
        begin = bisect.bisect_right(live, first_at, hi=end, key=lambda sample: sample.at)
        value = newest_window(threshold, live[max(0, begin - 1) : end], started_at)
        if value is not None:
            found.append((value, live[end - 1].at))
    if not found:
        return None, None
    first = next((at for value, at in found if not _holds(threshold, value)), None)
    return _worst(threshold, found)[0], first


COUNTS_LAG_S = 10.0  # how far exact counts may be behind the sample that carries them


def _why_no_window(threshold: Threshold, samples: list[Sample]) -> str:
    """Why none of a threshold's windows has a value."""
    is_exact = any(sample.counted_at is not None for sample in samples)
    if threshold.metric in TIMED and (threshold.over_s or LOCUST_WINDOW_S) < LOCUST_WINDOW_S and not is_exact:
        return (
            f"Locust's own rate covers {LOCUST_WINDOW_S:g} s; a shorter window is made of what "
            "loadmanager_hooks count by the second, and they told nothing"
        )
    return "no whole window had data"


class HistogramWindow:
    """The windows of one threshold over a run's histograms, taken in as they come.

    A window ends with each of them, and began with an earlier one, at least over_s before."""

    ANCHORS = 60  # kept within over_s: a window is longer than it by a sixtieth at most, or by one push

    def __init__(self, threshold: Threshold, started_at: float):
        self.threshold = threshold
        self._begin = started_at + (threshold.after_s or 0.0)
        self._anchors = deque([] if threshold.after_s else [HistogramPoint(started_at, {})])
        self._newest_at = -math.inf

    def value(self, point: HistogramPoint) -> float | None:
        """The value of the window that ends with `point`; None before there is one, and without data."""
        if point.at <= max(self._begin, self._newest_at):
            return None
        self._newest_at = point.at
        meant = HistogramPoint(
            point.at, {key: one for key, one in point.histograms.items() if self._means(key)}
        )
        anchor = self._anchor(meant)
        self._keep(meant)
        return None if anchor is None else self._between(anchor, meant)

    def _means(self, key: Endpoint | None) -> bool:
        if key is None or self.threshold.endpoint is None:
            return key is None and self.threshold.endpoint is None
        return _is_meant(self.threshold, *key)

    def _anchor(self, point: HistogramPoint) -> HistogramPoint | None:
        begin = point.at - (self.threshold.over_s or 0.0)
        while len(self._anchors) > 1 and self.threshold.over_s and self._anchors[1].at <= begin:
            self._anchors.popleft()
        return self._anchors[0] if self._anchors and self._anchors[0].at <= begin else None

    def _keep(self, point: HistogramPoint) -> None:
        over_s = self.threshold.over_s
        if not self._anchors or (over_s and point.at - self._anchors[-1].at >= over_s / self.ANCHORS):
            self._anchors.append(point)

    def _between(self, anchor: HistogramPoint, point: HistogramPoint) -> float | None:
        found = []
        for key, histogram in point.histograms.items():
            part = since(histogram, anchor.histograms.get(key))
            value = part and _value_of_histogram(self.threshold.metric, part, point.at - anchor.at)
            if value is not None:
                found.append((value, None))
        return _worst(self.threshold, found)[0] if found else None


def _value_of_histogram(metric: str, part: Histogram, seconds: float) -> float | None:
    if metric in PERCENTILE_RATIOS:
        return percentile_ms(part.times, PERCENTILE_RATIOS[metric])
    if metric == "avgResponseMs":
        return part.total_ms / sum(part.times.values()) if part.times else None
    if metric == "errorRate":
        return min(100.0, 100.0 * part.failures / part.requests) if part.requests else None
    return {
        "totalRequests": part.requests,
        "totalFailures": part.failures,
        "totalRps": part.requests / seconds,
    }[metric]


class Window(NamedTuple):
    """What became of a threshold's windows: the value that counts, when one failed first, why there is no value."""

    value: float | None
    first_failed_at: float | None = None
    message: str | None = "no whole window had data"


def judge_histogram_windows(
    thresholds: Iterable[Threshold], points: Iterable[HistogramPoint], moments: tuple[float, float]
) -> dict[Threshold, Window]:
    """The windows of those thresholds that need histograms, in one pass over a run's history."""
    started_at, finished_at = moments
    windows = [HistogramWindow(one, started_at) for one in dict.fromkeys(thresholds) if needs_histograms(one)]
    found = {window.threshold: Window(None) for window in windows}
    seen = False
    for point in points if windows else ():
        seen = True
        for window in windows:
            over_s = window.threshold.over_s
            if over_s and point.at > finished_at + 0.001:
                continue  # while a run stops its rates fall; a warm-up's rest counts to the very end
            value = window.value(point)
            if value is not None:
                found[window.threshold] = _next_window(
                    window.threshold, found[window.threshold], value, point.at
                )
    if not seen:
        why = "Locust has no such window; it is made from the histograms that loadmanager_hooks pushes, and none came"
        return {one: window._replace(message=why) for one, window in found.items()}
    return found


def _next_window(threshold: Threshold, so_far: Window, value: float, at: float) -> Window:
    if not threshold.over_s:
        return Window(value)  # from the warm-up to now
    first = at if so_far.first_failed_at is None and not _holds(threshold, value) else so_far.first_failed_at
    known = so_far.value
    return Window(value if known is None else _worst(threshold, [(known, None), (value, None)])[0], first)


def judge_threshold(
    threshold: Threshold, snapshot: Snapshot | None, samples: list[Sample], moments: tuple[float, float],
    first_seen: float | None, window: Window | None = None,
) -> Threshold:  # fmt: skip
    """The threshold with its result, from a run's final numbers and its history.

    moments: start and end; first_seen: when it was first seen to fail during the run; window:
    of one that needs histograms. What has no data has failed, and says so."""
    first = first_seen
    if threshold.over_s or threshold.after_s:
        if window is None:
            why = _why_no_window(threshold, samples)
            window = Window(*judge_windows(threshold, samples, moments), message=why)
        value, first = window.value, window.first_failed_at or first_seen
        message = None if value is not None else window.message
    else:
        value, message = whole_run_value(threshold, snapshot)
    if value is not None and _holds(threshold, value):
        return threshold._replace(value=value, result="passed", message=message)
    if value is None:
        message = f"no data: {message}"
    return threshold._replace(
        value=value, result="failed", first_failed_at=first or moments[1], message=message
    )


def verdict_of(
    thresholds: tuple[Threshold, ...], comparison: dict[str, Any] | None, has_failed: bool
) -> str | None:
    """passed or failed; None when there is nothing to judge by."""
    compared = comparison is not None and comparison.get("judgement", NO_REGRESSION) != CANNOT_TELL
    if not thresholds and not compared:
        return None
    missed = any(one.result == "failed" and not one.warn_only for one in thresholds)
    regressed = comparison is not None and bool(comparison["regressions"])
    return "failed" if missed or regressed or has_failed else "passed"


class ThresholdWatch:
    """Holds the numbers of a going run against its thresholds. Used by the poller and by
    pushes: `note` takes its own lock."""

    def __init__(self, thresholds: tuple[Threshold, ...]):
        self.thresholds = thresholds
        self.may_abort = any(one.abort_on_fail for one in thresholds)
        self.first_failed: list[float | None] = [None] * len(thresholds)
        self._failing_since: list[float | None] = [None] * len(thresholds)
        self._keep_s = max((one.over_s or 0.0 for one in thresholds), default=0.0) + COUNTS_LAG_S
        self._lock = threading.Lock()
        # Since a warm-up ended: its first sample, and mean and number of Locust's rates.
        self._anchors: list[Sample | None] = [None] * len(thresholds)
        self._rates = [(0.0, 0)] * len(thresholds)
        self._windows: dict[int, HistogramWindow] = {}
        self.samples: list[Sample] = []  # of the last _keep_s seconds, and one before

    def note(self, snapshot: Snapshot, started_at: float) -> Threshold | None:
        """Take new numbers; the threshold that now aborts the run, or None."""
        with self._lock:
            is_newest = not self.samples or snapshot.taken_at > self.samples[-1].at
            histograms = histograms_of(snapshot) if any(map(needs_histograms, self.thresholds)) else None
            if is_newest:
                self.samples.append(sample_of("", snapshot, ""))
            while len(self.samples) > 1 and self.samples[1].at <= snapshot.taken_at - self._keep_s:
                del self.samples[0]
            aborting = []
            for index, threshold in enumerate(self.thresholds):
                if needs_histograms(threshold):
                    value = (
                        self._histogram_value(
                            index, HistogramPoint(snapshot.taken_at, histograms), started_at
                        )
                        if histograms
                        else None
                    )
                else:
                    value = self._value(index, threshold, snapshot, started_at) if is_newest else None
                if self._aborts(index, threshold, value, snapshot.taken_at):
                    aborting.append(threshold)
            return aborting[0] if aborting else None

    def _histogram_value(self, index: int, point: HistogramPoint, started_at: float) -> float | None:
        if index not in self._windows:
            self._windows[index] = HistogramWindow(self.thresholds[index], started_at)
        return self._windows[index].value(point)

    def _aborts(self, index: int, threshold: Threshold, value: float | None, at: float) -> bool:
        """Note whether it fails now; True when it has failed so long that it aborts."""
        if value is None:
            return False
        if _holds(threshold, value):
            self._failing_since[index] = None
            return False
        failing_since = self._failing_since[index] = self._failing_since[index] or at
        self.first_failed[index] = self.first_failed[index] or failing_since
        return threshold.abort_on_fail and at - failing_since >= threshold.delay_s

    def _value(self, index: int, threshold: Threshold, snapshot: Snapshot, started_at: float) -> float | None:
        if threshold.over_s:
            return newest_window(threshold, self.samples, started_at)
        if threshold.after_s is None:
            return whole_run_value(threshold, snapshot)[0]
        return self._since_warm_up(index, threshold, started_at + threshold.after_s)

    def _since_warm_up(self, index: int, threshold: Threshold, begin: float) -> float | None:
        """The value from the end of the warm-up to now; as newest_window(), without all its samples."""
        newest, anchor = self.samples[-1], self._anchors[index]
        is_timed = threshold.metric in TIMED
        if is_timed and anchor and anchor.counted_at is not None and newest.counted_at is None:
            return None
        counted = _at_counted(newest) if is_timed else newest
        if counted.at < begin:
            return None
        if anchor is None or (is_timed and anchor.counted_at is None and newest.counted_at is not None):
            anchor = self._anchors[index] = newest
        if threshold.metric != "totalRps" or newest.counted_at is not None:
            return window_value(threshold, counted, _at_counted(anchor) if is_timed else anchor)
        if newest.rps is None or newest.at < begin + LOCUST_WINDOW_S + RATE_SETTLES_S:
            return None
        mean, count = self._rates[index]
        self._rates[index] = (mean * count + newest.rps) / (count + 1), count + 1
        return self._rates[index][0]


# ============================================================================
# 6. RULES - pure decisions: valid requests, scenarios, idle clusters, downsampling
# ============================================================================


@dataclass(frozen=True)
class BodyKey:
    """One key of a request body: the name it gets here, its check, whether it must be there."""

    to: str
    check: Check
    required: bool = False


def _accept_metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(dump_json(value)) > MAX_METADATA_BYTES:
        raise ValueError
    return value


METADATA = Check(
    f"an object of at most {MAX_METADATA_BYTES // 1024} KiB of JSON",
    _accept_metadata,
    schema={"type": "object"},
)
PLAN_KEYS = {
    "host": BodyKey("host", BASE_URL),
    "userClasses": BodyKey("user_classes", NAMES),
    "tags": BodyKey("tags", NAMES),
    "excludeTags": BodyKey("exclude_tags", NAMES),
    "options": BodyKey("options", OPTIONS),
    "stages": BodyKey("stages", STAGES),
}
LOAD_KEYS = {  # stages, or a scenario of the configuration, stand for them
    "targetUsers": BodyKey("target_users", USERS),
    "spawnRate": BodyKey("spawn_rate", SPAWN_RATE),
    "durationSeconds": BodyKey("duration_s", DURATION),
}
CREATE_KEYS = {
    "tenantId": BodyKey("tenant_id", ID_TEXT, required=True),
    "envId": BodyKey("env_id", ID_TEXT, required=True),
    "scenarioId": BodyKey("scenario_id", ID_TEXT, required=True),
    **LOAD_KEYS,
    "metadata": BodyKey("metadata", METADATA),
    "queue": BodyKey("queue", BOOLEAN),
    "thresholds": BodyKey("thresholds", THRESHOLDS),
    "compareWith": BodyKey("compare_with", one_of(*COMPARE_WITH)),
    "confirm": BodyKey("confirm", ID_TEXT),
    **PLAN_KEYS,
}
SCALE_KEYS = {"workers": BodyKey("workers", number_value(0, MAX_WORKERS, whole=True), required=True)}
USERS_KEYS = {
    "targetUsers": BodyKey("target_users", USERS, required=True),
    "spawnRate": BodyKey("spawn_rate", SPAWN_RATE),
}
ANNOTATION_TEXT = text_value(
    f"a text of 1 to {MAX_ANNOTATION} printable characters", r"(?s:.{1,%d})" % MAX_ANNOTATION
)
RERUN_KEYS = {
    name: BodyKey(entry.to, entry.check)
    for name, entry in CREATE_KEYS.items()
    if name in ("queue", "metadata", "confirm")
}
CALLBACK_KEYS = {
    "runId": BodyKey("run_id", ID_TEXT, required=True),
    "tenantId": BodyKey("tenant_id", text_value("a string", empty=True)),
    "envId": BodyKey("env_id", text_value("a string", empty=True)),
}
REGISTER_KEYS = {
    "tenantId": BodyKey("tenant_id", ID_TEXT, required=True),
    "envId": BodyKey("env_id", ID_TEXT, required=True),
    "scenarioId": BodyKey("scenario_id", text_value("a string", empty=True)),
    "targetUsers": BodyKey("target_users", number_value(0, MAX_USERS, whole=True)),
    "spawnRate": BodyKey("spawn_rate", number_value(0, MAX_SPAWN_RATE)),
    "clusterId": BodyKey("cluster_id", text_value("a string", empty=True)),
}


def check_body(body: Any, keys: dict[str, BodyKey], strict: bool = True) -> dict[str, Any]:
    """The body's values by our names, or InvalidInput with every bad key at once.

    A key with null is as good as absent when it is optional. Unknown keys are refused
    when `strict`; callbacks are not strict, as the original's were not."""
    if not isinstance(body, dict):
        raise InvalidInput("the body is not a JSON object; allowed are the keys " + ", ".join(keys))
    problems: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name in body if strict else ():
        if name not in keys:
            problems[name[:MAX_TEXT]] = "unknown key; allowed are " + ", ".join(keys)
    for name, entry in keys.items():
        value = body.get(name)
        if value is None:
            if entry.required:
                problems[name] = (
                    f"is {'null' if name in body else 'missing'}; allowed is {entry.check.allowed}"
                )
            continue
        try:
            values[entry.to] = entry.check.accept(value)
        except InvalidValue as error:
            problems[name] = str(error)
        except (ValueError, TypeError, OverflowError, RecursionError):
            problems[name] = f"allowed is {entry.check.allowed}, got {_shown(value)}"
    if problems:
        raise InvalidInput(_joined(problems), problems)
    return values


def plan_of(values: dict[str, Any]) -> LoadProfile:
    """The plan among checked values, taken out of them."""
    return LoadProfile(**{name: values.pop(name) for name in LoadProfile._fields if name in values})


def read_create(body: Any, scenarios: tuple[ScenarioConfig, ...]) -> RunRequest:
    """What a create asks for, with what its scenario gives; InvalidInput with every bad key."""
    try:
        given = check_body(body, CREATE_KEYS)
    except InvalidInput as error:
        wrong = error.extra.get("fields", {})
        if wrong and not scenarios and not body.get("stages"):
            wrong.update((name, why) for name, why in _missing_load(body).items() if name not in wrong)
            raise InvalidInput(_joined(wrong), wrong) from None
        raise
    if "stages" in given and any(entry.to in given for entry in LOAD_KEYS.values()):
        raise InvalidInput(
            "stages: stand for targetUsers, spawnRate and durationSeconds; allowed are either",
            {"stages": "stand for targetUsers, spawnRate and durationSeconds; allowed are either"},
        )
    values = {**_of_scenario(given, scenarios), **given}
    stages = values.get("stages")
    if stages:
        values.update(
            target_users=max(stage.users for stage in stages),
            spawn_rate=stages[0].spawn_rate,
            duration_s=sum(stage.duration_s for stage in stages),
        )
    missing = _missing_load({name: values.get(entry.to) for name, entry in LOAD_KEYS.items()})
    if missing:
        raise InvalidInput(_joined(missing), missing)
    return RunRequest(plan=plan_of(values), **values)


def _missing_load(given: dict[str, Any]) -> dict[str, str]:
    """What a create without stages must say of its load, and does not."""
    return {
        name: f"is missing; allowed is {entry.check.allowed}"
        for name, entry in LOAD_KEYS.items()
        if given.get(name) is None and name != "durationSeconds"
    }


def _joined(problems: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in problems.items())[:2000]


def _of_scenario(given: dict[str, Any], scenarios: tuple[ScenarioConfig, ...]) -> dict[str, Any]:
    """What the scenario gives where the create is silent; {} without scenarios in the configuration."""
    allowed = {
        scenario.id: scenario for scenario in scenarios if is_scenario_for(scenario, given["tenant_id"])
    }
    if not scenarios:
        return {}
    scenario = allowed.get(given["scenario_id"])
    if scenario is None:
        why = f"there is no such scenario; there are {', '.join(sorted(allowed)) or 'none for this tenant'}"
        raise InvalidInput(f"scenarioId: {why}", {"scenarioId": why})
    names = {entry.to for entry in (*LOAD_KEYS.values(), *PLAN_KEYS.values())} | {"locustfile"}
    found = {name: getattr(scenario, name) for name in names if getattr(scenario, name) not in (None, ())}
    if scenario.thresholds:
        found["thresholds"] = THRESHOLDS.accept(list(scenario.thresholds))
    if any(entry.to in given for entry in LOAD_KEYS.values()):
        found.pop("stages", None)
    if "stages" in given:
        found = {
            name: value
            for name, value in found.items()
            if name not in {entry.to for entry in LOAD_KEYS.values()}
        }
    if found.get("options") and given.get("options"):
        given["options"] = {**found["options"], **given["options"]}
    return found


def is_scenario_for(scenario: ScenarioConfig, tenant_id: str) -> bool:
    return not scenario.tenants or tenant_id in scenario.tenants


def scenario_problems(config: Config) -> Iterator[str]:
    """What is wrong in the configuration's scenarios beyond single keys."""
    seen: set[str] = set()
    for index, scenario in enumerate(config.scenarios):
        where = f"scenarios[{index}]"
        if scenario.id in seen:
            yield f"{where}.id: {scenario.id!r} stands twice; allowed is a unique id"
        seen.add(scenario.id)
        if scenario.stages and (scenario.target_users or scenario.spawn_rate or scenario.duration_s):
            yield f"{where}.stages: stand for targetUsers, spawnRate and durationSeconds; allowed are either"
        try:
            THRESHOLDS.accept(list(scenario.thresholds))
        except ValueError as error:
            yield (
                f"{where}.thresholds: {error}"
                if isinstance(error, InvalidValue)
                else f"{where}.thresholds: allowed is {THRESHOLDS.allowed}"
            )
        if scenario.locustfile and not os.path.isfile(os.path.join(config.folder, scenario.locustfile)):
            yield f"{where}.locustfile: {scenario.locustfile} is not a file"


def scenario_to_json(scenario: ScenarioConfig) -> dict[str, Any]:
    plan = LoadProfile(
        scenario.host,
        scenario.user_classes,
        scenario.tags,
        scenario.exclude_tags,
        scenario.options,
        scenario.stages,
    )
    wire: dict[str, Any] = {"id": scenario.id, **plan_to_json(plan)}
    optional = {
        "description": scenario.description, "targetUsers": scenario.target_users, "spawnRate": scenario.spawn_rate, "durationSeconds": scenario.duration_s,
        "thresholds": [one.expr for one in THRESHOLDS.accept(list(scenario.thresholds))], "tenants": list(scenario.tenants),
    }  # fmt: skip
    wire.update((name, value) for name, value in optional.items() if value)
    return wire


def plan_refusal(plan: LoadProfile, abilities: Abilities | None) -> tuple[str, str] | None:
    """The field of a plan that a Locust cannot do, and why; None when it can, or does not say."""
    if (plan.tags or plan.exclude_tags) and (abilities is None or abilities.tags is None):
        return (
            "tags",
            "the cluster's Locust does not take tags with a start: its locustfile does not import today's loadmanager_hooks",
        )
    if abilities is None:
        return None
    classes = abilities.user_classes
    if plan.user_classes and classes is not None:
        unknown = [name for name in plan.user_classes if name not in classes]
        if unknown:
            return (
                "userClasses",
                f"the cluster has no user class {', '.join(unknown)}; it has {', '.join(classes)}",
            )
        if not abilities.can_choose and set(plan.user_classes) != set(classes):
            return (
                "userClasses",
                f"the cluster's Locust was started without --class-picker and runs all it has: {', '.join(classes)}",
            )
    unknown = [
        name for name in plan.options or () if abilities.options is not None and name not in abilities.options
    ]
    if unknown:
        return (
            "options",
            f"the cluster's locustfile has no custom argument {', '.join(unknown)}; it has {', '.join(abilities.options or ()) or 'none'}",
        )
    for field_name, names in (("tags", plan.tags), ("excludeTags", plan.exclude_tags)):
        unknown = [name for name in names if name not in (abilities.tags or ())]
        if unknown:
            return (
                field_name,
                f"the cluster has no task with tag {', '.join(unknown)}; it has {', '.join(abilities.tags or ()) or 'none'}",
            )
    return None


def workers_for(users: int, launcher: LauncherConfig | None) -> int | None:
    """How many workers a run of so many users gets; None: they are not counted."""
    if launcher is None or launcher.users_per_worker is None:
        return None
    return max(1, min(launcher.max_workers, math.ceil(users / launcher.users_per_worker)))


class LoadTarget(NamedTuple):
    """The load a run should have, and since when (epoch seconds)."""

    users: int
    spawn_rate: float
    since: float


def load_target(run: Run, now: float) -> LoadTarget:
    """What the run should have at a moment: its stages as they come, and changes by people,
    of which the newest holds until the next stage."""
    began = run.started_at if run.started_at is not None else now
    target = LoadTarget(run.target_users, run.spawn_rate, began)
    at = began
    for stage in run.plan.stages:
        if at <= now or stage is run.plan.stages[0]:
            target = LoadTarget(stage.users, stage.spawn_rate, at)
        at += stage.duration_s
    if run.load_changes and target.since <= run.load_changes[-1].at:
        last = run.load_changes[-1]
        return LoadTarget(last.users, last.spawn_rate, last.at)
    return target


def stage_starts(run: Run) -> Iterator[float]:
    """Seconds after the start at which each stage but the first begins."""
    at = 0.0
    for stage in run.plan.stages[:-1]:
        at += stage.duration_s
        yield at


def check_query(query: str, allowed: dict[str, Check]) -> dict[str, Any]:
    """The query's values, or InvalidInput with every bad parameter at once."""
    problems: dict[str, str] = {}
    values: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=50)
    except (ValueError, UnicodeDecodeError):
        raise InvalidInput("the query string is not valid UTF-8 or has too many parameters") from None
    for name, text in pairs:
        check = allowed.get(name)
        if check is None:
            problems[name[:MAX_TEXT]] = "unknown parameter; allowed are " + (", ".join(allowed) or "none")
        elif name in values:
            problems[name] = "stands twice"
        elif text:
            try:
                values[name] = check.accept(check.from_text(text))
            except InvalidValue as error:
                problems[name] = str(error)
            except (ValueError, TypeError, OverflowError):
                problems[name] = f"allowed is {check.allowed}, got {_shown(text)}"
    if problems:
        raise InvalidInput("; ".join(f"{name}: {why}" for name, why in problems.items())[:2000], problems)
    return values


def _accept_moment(value: Any) -> float:
    """RFC 3339, or epoch seconds, as a number or its digits."""
    if type(value) in (int, float) and 0 <= value < 1e11:
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,6})?", value):
        return float(value)
    return parse_utc(value)


MOMENT = Check("an RFC 3339 moment or epoch seconds", _accept_moment)
ANNOTATION_KEYS = {"text": BodyKey("text", ANNOTATION_TEXT, required=True), "at": BodyKey("at", MOMENT)}


def _is_measure(value: Any) -> bool:
    return value is None or ((type(value) is float or type(value) is int) and 0 <= value < 1e18)


def _is_count(value: Any) -> bool:
    return (
        value is None
        or (type(value) is int and 0 <= value < 1 << 62)
        or (type(value) is float and value.is_integer() and 0 <= value < 1e18)
    )


def _is_percent(value: Any) -> bool:
    return _is_measure(value) and (value is None or value <= 100)


NUMBER_KINDS = {  # what a number of the callbacks may be, and how that is said
    _is_measure: "a number from 0, or null",
    _is_count: "a whole number from 0, or null",
    _is_percent: "a number from 0 to 100, or null",
}
COUNTS = ("totalRequests", "totalFailures", "currentUsers", "numRequests", "numFailures")


# What comes from a Locust, pushed or polled, is held against the same limits: a number that the
# database cannot hold, or a text that is no Unicode, must not reach it by either way.

MAX_LOCUST_NAME = 2000  # characters of an endpoint's name, a worker's id, a host
MAX_LOCUST_ERROR = 2000  # characters of a failure's or an exception's text
MAX_TRACEBACK = 10_000
MAX_LOCUST_ENDPOINTS = 5000  # of one report, as many as the hooks push at the end
MAX_LOCUST_WORKERS = 5000
MAX_LOCUST_FAILURES = 1000  # different failures, or exceptions, of one run
MAX_LOCUST_CHOICES = 1000  # user classes, tags or options that a Locust has
MAX_COUNTS_AGO_S = 60.0
LAST_TIMESTAMP_S = 253402300799.0  # the end of the year 9999, in epoch seconds


def storable_text(value: Any, limit: int = MAX_LOCUST_NAME) -> str:
    """A Locust's text as every database and JSON reader takes it: no lone surrogate, no NUL. One that is
    too long keeps its beginning and a hash, so that different texts stay different; "" for None."""
    if not isinstance(value, str):
        value = "" if value is None else repr(value)[: limit + 1]
    text = value.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")
    if len(text) <= limit:
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: limit - 10]}…#{mark}"


def measure_or_none(value: Any) -> float | None:
    """Locust's number from 0, or None for null, NaN, Infinity, words, lists and what no database holds."""
    return value if _is_measure(value) else None


def count_or_none(value: Any) -> int | None:
    """Locust's whole number from 0; as measure_or_none()."""
    measure = measure_or_none(value)
    return None if measure is None else int(measure)


def timestamp_or_none(value: Any) -> float | None:
    """Epoch seconds that a calendar has, or None."""
    return value if _is_measure(value) and value is not None and value <= LAST_TIMESTAMP_S else None


def _number_kinds(names: Iterable[str]) -> tuple[tuple[str, Callable[[Any], bool]], ...]:
    return tuple(
        (name, _is_count if name in COUNTS else _is_percent if name == "errorRate" else _is_measure)
        for name in names
    )


SNAPSHOT_NUMBERS = _number_kinds(SNAPSHOT_KEYS)
ENDPOINT_NUMBERS = _number_kinds(name for name in ENDPOINT_KEYS if name not in ("method", "name"))


def check_metrics(body: dict[str, Any], name: str, now: float) -> Snapshot | None:
    """The snapshot in callback key `name`, None when absent; InvalidInput with every bad
    field at once. A moment in the future becomes `now`: their clock may be wrong."""
    metrics = body.get(name)
    if metrics is None:
        return None
    if not isinstance(metrics, dict):
        raise InvalidInput(f"{name}: allowed is an object", {name: "allowed is an object"})
    problems: dict[str, str] = {}
    numbers = _checked_numbers(metrics, SNAPSHOT_NUMBERS, name, problems)
    try:
        taken_at = parse_utc(metrics["timestamp"]) if metrics.get("timestamp") is not None else now
    except (ValueError, OverflowError) as error:
        problems[f"{name}.timestamp"] = str(error)
        taken_at = now
    endpoints = _checked_endpoints(metrics.get("requestStats"), f"{name}.requestStats", problems)
    times = _checked_times(metrics.get("responseTimes"), f"{name}.responseTimes", problems)
    if problems:
        raise InvalidInput("; ".join(f"{where}: {why}" for where, why in problems.items())[:2000], problems)
    return with_counts(Snapshot(min(taken_at, now), *numbers, endpoints, times=times), metrics)


def with_counts(snapshot: Snapshot, document: dict[str, Any]) -> Snapshot:
    """The snapshot with the exact counts that the hooks tell beside its numbers, as far as they are there."""
    snapshot = snapshot._replace(resets=count_or_none(document.get("statsResets")))
    counted = document.get("counted")
    if not isinstance(counted, dict):
        return snapshot
    ago_s = measure_or_none(counted.get("secondsAgo"))
    requests, failures = (count_or_none(counted.get(name)) for name in ("requests", "failures"))
    if ago_s is None or ago_s > MAX_COUNTS_AGO_S or requests is None or failures is None:
        return snapshot
    return snapshot._replace(
        counted_at=snapshot.taken_at - ago_s, counted_requests=requests, counted_failures=failures
    )


def _is_whole_ms(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _checked_times(times: Any, where: str, problems: dict[str, str]) -> dict[int, int] | None:
    """Requests by whole ms, from JSON whose keys are digits."""
    if times is None:
        return None
    if isinstance(times, dict) and len(times) <= MAX_BUCKETS:
        found = {
            int(ms): requests
            for ms, requests in times.items()
            if _is_whole_ms(ms) and type(requests) is int and 0 <= requests < 1 << 53
        }
        if len(found) == len(times):
            return found
    problems[where] = f"allowed is an object of at most {MAX_BUCKETS} entries: whole ms to number of requests"
    return None


def _checked_numbers(
    entry: dict[str, Any],
    kinds: tuple[tuple[str, Callable[[Any], bool]], ...],
    where: str,
    problems: dict[str, str],
) -> list[Any]:
    """The entry's numbers in the order of `kinds`; what is wrong goes to `problems`."""
    numbers = []
    for name, is_good in kinds:
        value = entry.get(name)
        if not is_good(value):
            problems[f"{where}.{name}"] = f"allowed is {NUMBER_KINDS[is_good]}, got {_shown(value)}"
        elif type(value) is float and is_good is _is_count:
            value = int(value)
        numbers.append(value)
    return numbers


def _checked_endpoints(stats: Any, where: str, problems: dict[str, str]) -> tuple[EndpointStats, ...] | None:
    if stats is None:
        return None
    if not isinstance(stats, dict):
        problems[where] = "allowed is an object with an entry for each endpoint"
        return None
    rows = []
    for entry_name, entry in stats.items():
        place = f"{where}.{entry_name[:MAX_TEXT]}"
        if not isinstance(entry, dict):
            problems[place] = "allowed is an object"
            continue
        key_method, _, key_name = entry_name.partition("_")
        method, name = entry.get("method", key_method), entry.get("name", key_name)
        if type(method) is not str or type(name) is not str:
            problems[place] = "allowed are strings for method and name"
        numbers = _checked_numbers(entry, ENDPOINT_NUMBERS, place, problems)
        times = _checked_times(entry.get("responseTimes"), f"{place}.responseTimes", problems)
        rows.append(EndpointStats(storable_text(method), storable_text(name), *numbers, times))
        if len(problems) > 20:
            return None
    return tuple(rows)


def host_allowed(host: str, patterns: Iterable[str]) -> bool:
    """Whether the target `host`, an http(s) URL, is one of `patterns`: a name, *.name, an address or
    a network, with :port for only that port. Names are compared, never resolved."""
    parts = _split_target(host)
    return parts is not None and any(_is_target(*parts, pattern) for pattern in patterns)


def _split_target(url: str) -> tuple[str, int] | None:
    """Host in lower case and port; None for what is no plain http(s) URL."""
    try:
        _accept_base_url(url)
        parts = urlsplit(url)
        return (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None


def _is_target(name: str, port: int, pattern: str) -> bool:
    match = HOST_PATTERN.fullmatch(pattern)
    if match is None or (match.group("port") and int(match.group("port")) != port):
        return False
    wanted = match.group("name").lower().strip("[]").rstrip(".")
    if wanted == "*":
        return True
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        pass  # one of them is a name
    if wanted.startswith("*."):
        return name.endswith(wanted[1:]) and len(name) > len(wanted) - 1
    return name == wanted


def load_refusals(
    request: RunRequest,
    tenant: TenantConfig | None,
    environment: EnvironmentConfig | None,
    own_hosts: Iterable[str | None],
) -> dict[str, str]:
    """Why a load may not be started, by the key of the request: limits of the tenant, hosts of
    both, the confirmation of a protected environment. own_hosts: where the clusters that may
    take it aim by themselves; None where that is not known."""
    problems: dict[str, str] = {}
    if tenant and tenant.max_users is not None and request.target_users > tenant.max_users:
        problems["targetUsers"] = f"tenant {tenant.id} may have {tenant.max_users} users at most"
    if (
        tenant
        and tenant.max_duration_s is not None
        and (request.duration_s or math.inf) > tenant.max_duration_s
    ):
        problems["durationSeconds"] = (
            f"tenant {tenant.id} may load for {tenant.max_duration_s} s at most, and must say how long"
        )
    hosts = [request.plan.host] if request.plan.host else list(own_hosts)
    for patterns in (
        tenant.allowed_hosts if tenant else (),
        environment.allowed_hosts if environment else (),
    ):
        refused = [host for host in hosts if patterns and not (host and host_allowed(host, patterns))]
        if refused:
            what = (
                _printable(refused[0])
                if refused[0]
                else "the cluster's own target is not known; host is needed"
            )
            problems["host"] = f"{what}; allowed are {', '.join(patterns)}"
    if environment and environment.protected and request.confirm != environment.id:
        problems["confirm"] = (
            f'environment {environment.id} is protected; allowed is "{environment.id}", to say that it is meant'
        )
    return problems


class Idleness(Enum):
    """What a cluster is doing, seen by somebody who wants to start a test there."""

    IDLE = "idle"
    LOADED = "runs a test"
    SETTLING = "is still stopping, or its workers are not ready"
    NO_WORKERS = "has no worker connected"


def idleness(reading: Reading, workers_wanted: int = 1) -> Idleness:
    """Only IDLE may be swarmed: a swarm while Locust is stopping makes load that /stop
    cannot stop, and one without workers does nothing and says success (2.47.0)."""
    if reading.is_loaded:
        return Idleness.LOADED
    if reading.state not in IDLE_STATES:
        return Idleness.SETTLING
    if not reading.distributed:
        return Idleness.IDLE
    if len(reading.live_workers) < workers_wanted:
        return Idleness.NO_WORKERS
    if any(worker.state != "ready" for worker in reading.live_workers):
        return Idleness.SETTLING
    return Idleness.IDLE


def watch_warnings(
    target: LoadTarget, before: Reading | None, now_reading: Reading, most_workers: int, wanted_for_s: float
) -> Iterator[tuple[str, str]]:
    """Code and sentence of what one reading of a running test makes worth a warning.

    before: the reading before; most_workers: the most seen in this run; wanted_for_s: how long
    the target should have been reached, negative before."""
    live = len(now_reading.live_workers)
    if now_reading.distributed and live < most_workers:
        yield (
            "workers_lost",
            f"{most_workers - live} of {most_workers} workers lost; numbers of their last seconds are missing",
        )
    hot = [worker for worker in now_reading.live_workers if (worker.cpu_percent or 0) > CPU_LIMIT_PERCENT]
    if hot:
        yield (
            "cpu_high",
            f"worker {hot[0].id} used {hot[0].cpu_percent:.0f}% CPU: response times may be its own, not the target's",
        )
    if before and now_reading.requests < before.requests:
        yield (
            "stats_reset",
            f"Locust's counters went back from {before.requests} to {now_reading.requests} requests",
        )
    if wanted_for_s > 30 and now_reading.users < target.users:
        yield (
            "users_not_reached",
            f"{now_reading.users} of {target.users} users are running {wanted_for_s:.0f} s after all should have been",
        )
    if now_reading.snapshot and len(now_reading.snapshot.endpoints or ()) >= MAX_LOCUST_ROWS:
        yield (
            "endpoints_cut",
            f"Locust reports only the first {MAX_LOCUST_ROWS} endpoints while running; the final numbers have all",
        )


RESET_TOLERANCE_S = 5.0  # a worker's first report may set the beginning of the statistics back by 3 s


def reset_suspected(final: Snapshot, last: Snapshot | None, started_at: float) -> str | None:
    """Why final numbers are not those of the whole run, as a sentence, or None: Locust's statistics were
    reset, or are another test's.

    last: the newest numbers before; started_at: of the run, epoch seconds."""
    if final.resets:
        times = "once" if final.resets == 1 else f"{final.resets} times"
        return f"Locust's statistics were reset {times} during the run; the numbers are those since then"
    if last is None:
        return None
    before, after = last.requests or 0, final.requests or 0
    if after < before:
        return f"Locust's counters went back from {before} to {after} requests: its statistics were reset"
    known = {(row.method, row.name): row.requests or 0 for row in final.endpoints or ()}
    for row in last.endpoints or () if len(known) < MAX_LOCUST_ENDPOINTS else ():
        if known.get((row.method, row.name), 0) < (row.requests or 0):
            name = f"{row.method} {row.name}".strip()
            return f"Locust's counters of {name} went back: its statistics were reset, or are another test's"
    if after <= before or not final.rps:
        return None
    # Locust's average is over the time from the beginning of its statistics to its last request, and a
    # request came after the newest numbers before: so late at least they began.
    began_at = last.taken_at - STATS_CACHE_S - WORKER_REPORT_S - after / final.rps
    if began_at <= started_at + RESET_TOLERANCE_S:
        return None
    return f"Locust's statistics began {began_at - started_at:.0f} s after the run: they were reset"


EXTREMES = (  # what downsampling keeps of each bucket
    (min, "rps"),
    (max, "rps"),
    (min, "p95_ms"),
    (max, "p95_ms"),
    (max, "fails_per_s"),
    (max, "window_p95_ms"),
    (max, "users"),
)


def downsample(samples: list[Sample], most: int) -> list[Sample]:
    """At most `most` of the samples, none invented: first, last, and each bucket's extremes."""
    if len(samples) <= most:
        return samples
    buckets = (most - 2) // len(EXTREMES)
    if buckets < 1:
        step = (len(samples) - 1) / max(1, most - 1)
        return [samples[round(index * step)] for index in range(most)] if most > 1 else samples[-1:]
    keep = {0, len(samples) - 1}
    for bucket in range(buckets):
        first = bucket * len(samples) // buckets
        last = (bucket + 1) * len(samples) // buckets
        for choose, name in EXTREMES:
            known = [index for index in range(first, last) if getattr(samples[index], name) is not None]
            if known:
                keep.add(choose(known, key=lambda index: getattr(samples[index], name)))
    return [samples[index] for index in sorted(keep)]


def thin_to_step(samples: list[Sample], step_s: float) -> list[Sample]:
    """The last sample of every step of `step_s` seconds."""
    by_step = {math.floor(sample.at / step_s): sample for sample in samples}
    return list(by_step.values())


# ============================================================================
# 7. TIME - the steady clock and the one thread that waits for moments
# ============================================================================


def monotonic_s() -> float:
    """Seconds that neither a set clock moves nor a suspended machine stops (Linux)."""
    return _monotonic_clock()


if hasattr(time, "CLOCK_BOOTTIME"):
    _monotonic_clock = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
else:
    _monotonic_clock = time.monotonic


class ScheduledCall:
    """A moment somebody waits for; cancel() when it is no longer wanted."""

    __slots__ = ("due", "action", "cancelled")

    def __init__(self, due: float, action: Callable[[], object]):
        self.due = due
        self.action = action
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.action = _nothing

    def __lt__(self, other: ScheduledCall) -> bool:
        return self.due < other.due


def _nothing() -> None:
    pass


class Timer(threading.Thread):
    """One thread with a heap for every deadline: 1,000 of them cost 0.1 MiB, where
    threading.Timer takes a thread each. Actions must be short: in_thread() is for more."""

    MAX_WAIT_S = 1.0  # after a suspend the overdue are noticed within this
    THREAD_RETRY_S = 1.0

    def __init__(self) -> None:
        super().__init__(name="timer", daemon=True)
        self._changed = threading.Condition()
        self._heap: list[ScheduledCall] = []
        self._closed = False
        self._awake_s = 0.0
        self._ticked_at = monotonic_s()

    def at(self, due: float, action: Callable[[], object]) -> ScheduledCall:
        """Call `action` when monotonic_s() reaches `due`."""
        scheduled = ScheduledCall(due, action)
        with self._changed:
            heapq.heappush(self._heap, scheduled)
            if self._heap[0] is scheduled:
                self._changed.notify()
        return scheduled

    def after(self, delay_s: float, action: Callable[[], object]) -> ScheduledCall:
        return self.at(monotonic_s() + delay_s, action)

    def in_thread(self, delay_s: float, name: str, work: Callable[[], None]) -> ScheduledCall:
        """Run `work` in a thread of its own after `delay_s`; later, when no thread can be had then."""

        def start() -> None:
            try:
                start_thread(name, work)
            except NotReady as error:
                log("work waits for a thread", work=name, why=error.message)
                self.in_thread(self.THREAD_RETRY_S, name, work)

        return self.after(delay_s, start)

    def awake_s(self) -> float:
        """Seconds for which this process has been running: a clock that stands still while the
        process or the machine is suspended. Only differences mean something."""
        return self._awake_s + min(2 * self.MAX_WAIT_S, monotonic_s() - self._ticked_at)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        while not self._closed:
            for scheduled in self._due():
                try:
                    scheduled.action()
                except Exception as error:  # noqa: BLE001 - the edge: a timer must go on
                    log_unforeseen("timer", error)

    def _due(self) -> list[ScheduledCall]:
        with self._changed:
            if not self._closed and (not self._heap or self._heap[0].due > monotonic_s()):
                wait_s = self._heap[0].due - monotonic_s() if self._heap else self.MAX_WAIT_S
                self._changed.wait(max(0.0, min(wait_s, self.MAX_WAIT_S)))
            now, due = monotonic_s(), []
            # It wakes at least every second: what is far beyond that was spent suspended.
            self._awake_s += min(2 * self.MAX_WAIT_S, now - self._ticked_at)
            self._ticked_at = now
            while self._heap and (self._heap[0].cancelled or self._heap[0].due <= now):
                due.append(heapq.heappop(self._heap))
            return due


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Run `work` in a daemon thread; what it raises is logged and counted, never lost silently.
    NotReady when the system gives no thread (a limit of processes, or of memory)."""

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the edge: threads must not die unseen
            log_unforeseen(name, error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NotReady(f"no thread can be started: {error}", retry_after_s=5) from None
    return thread


UNFORESEEN: dict[str, int] = {}  # how many unforeseen exceptions met the edge of a thread, by its name


def log_unforeseen(where: str, error: BaseException, **facts: object) -> None:
    """The edge of every thread: log an exception that nobody foresaw with its trace, and count it."""
    import traceback

    trace = "".join(traceback.format_exception(error))
    kind = where.partition(" ")[0]  # "watch 5f0c1a2b" is counted as watch
    UNFORESEEN[kind] = UNFORESEEN.get(kind, 0) + 1
    log("unforeseen error", where=where, error=repr(error)[:500], **facts, trace=trace[-4000:])


# ============================================================================
# 8. STORE - every run in memory, written through to SQLite or PostgreSQL
# ============================================================================
# Reads are answered from a dict under Store._lock, which is held for memory only. One
# writer thread speaks SQL: it writes what changed in batches, one commit for all who
# wait (a commit for each sample: 4,200 rows/s; in batches: 38,000). Lifecycle changes
# wait for their commit before they are answered; samples do not. A new run, and that a
# run is over, is shown to readers, streams and receivers when it is on disk.
# Locks: Store._lock, then DatabaseWriter._changed, never the other way round.

CLOCK_STEP_S = 1.0  # a wall clock that moves by more against the monotonic one was set
MAX_EPOCH_S = 1e11  # times beyond, in the year 5138, are no times of a run

TABLES = {  # the columns that are written, the first of them its key where a row is replaced by a later one
    "runs": ("id", "seq", "record", "metrics"),
    "samples": Sample._fields,
    "histograms": ("run_id", "at", "is_whole", "content"),
    "idempotency": ("key", "body_hash", "run_id", "created_at"),
    "artefacts": ("run_id", "name", "content"),
    "baselines": Baseline._fields,
    "audit": ("seq", *AuditEntry._fields),
    "schedules": ("id", "record"),
    "outbox": ("id", "created_at", "record"),
    "cleanups": ("run_id", "cluster_id"),
}


def insert_into(table: str, on_conflict: str = "") -> str:
    """The statement that inserts a row of TABLES, its columns by their names: their order in an
    old file is another one than in a new one."""
    columns = TABLES[table]
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) {on_conflict}".rstrip()


def _keep_cleanups_of_runs(database: Any) -> None:
    """Until version 6 a clean-up was a fact of its run, and lost with it."""
    found = database.query("SELECT id, record FROM runs WHERE record LIKE ?", ('%"cleanup":true%',))
    for run_id, record in found:
        run = json.loads(record)
        if run.get("cleanup") is True and run.get("cluster_id"):
            database.execute(
                insert_into("cleanups", "ON CONFLICT (run_id) DO NOTHING"), (run_id, run["cluster_id"])
            )


# What each version added, on SQLite and PostgreSQL alike. A version that was released is never
# changed: a new one is added, whose statements bring every older file to it, also with
# ALTER TABLE ... ADD COLUMN. IF NOT EXISTS: files of before version 6 may have tables of later ones.
MIGRATIONS: dict[int, tuple[str | Callable[[Any], None], ...]] = {
    1: (
        "CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY, seq BIGINT NOT NULL, record TEXT NOT NULL,"
        " metrics TEXT)",
        "CREATE TABLE IF NOT EXISTS samples (run_id TEXT NOT NULL, at DOUBLE PRECISION NOT NULL,"
        " rps DOUBLE PRECISION, fails_per_s DOUBLE PRECISION, requests BIGINT, failures BIGINT,"
        " error_percent DOUBLE PRECISION, avg_ms DOUBLE PRECISION, p50_ms DOUBLE PRECISION,"
        " p95_ms DOUBLE PRECISION, p99_ms DOUBLE PRECISION, window_p50_ms DOUBLE PRECISION,"
        " window_p95_ms DOUBLE PRECISION, users BIGINT, source TEXT NOT NULL)",
        "CREATE INDEX IF NOT EXISTS samples_of_run ON samples (run_id, at)",
        "CREATE TABLE IF NOT EXISTS idempotency (key TEXT PRIMARY KEY, body_hash TEXT NOT NULL,"
        " run_id TEXT NOT NULL, created_at DOUBLE PRECISION NOT NULL)",
    ),
    2: (
        "CREATE TABLE IF NOT EXISTS artefacts (run_id TEXT NOT NULL, name TEXT NOT NULL,"
        " content TEXT NOT NULL, PRIMARY KEY (run_id, name))",
    ),
    3: (
        "CREATE TABLE IF NOT EXISTS baselines (tenant_id TEXT NOT NULL, env_id TEXT NOT NULL,"
        " scenario_id TEXT NOT NULL, run_id TEXT NOT NULL, set_at DOUBLE PRECISION NOT NULL,"
        " set_by TEXT NOT NULL, PRIMARY KEY (tenant_id, env_id, scenario_id))",
    ),
    4: (
        "CREATE TABLE IF NOT EXISTS histograms (run_id TEXT NOT NULL, at DOUBLE PRECISION NOT NULL,"
        " is_whole BIGINT NOT NULL, content TEXT NOT NULL)",
        "CREATE INDEX IF NOT EXISTS histograms_of_run ON histograms (run_id, at)",
    ),
    5: (
        "CREATE TABLE IF NOT EXISTS audit (seq BIGINT PRIMARY KEY, at DOUBLE PRECISION NOT NULL,"
        " who TEXT NOT NULL, role TEXT NOT NULL, address TEXT NOT NULL, action TEXT NOT NULL,"
        " tenant_id TEXT NOT NULL, env_id TEXT NOT NULL, run_id TEXT NOT NULL, http_status BIGINT NOT NULL,"
        " detail TEXT NOT NULL)",
        "CREATE INDEX IF NOT EXISTS audit_of_run ON audit (run_id)",
    ),
    6: (
        "CREATE TABLE IF NOT EXISTS schedules (id TEXT PRIMARY KEY, record TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS outbox (id TEXT PRIMARY KEY, created_at DOUBLE PRECISION NOT NULL,"
        " record TEXT NOT NULL)",
    ),
    7: (
        "CREATE TABLE IF NOT EXISTS cleanups (run_id TEXT PRIMARY KEY, cluster_id TEXT NOT NULL)",
        _keep_cleanups_of_runs,
    ),
    8: (
        "ALTER TABLE samples ADD COLUMN counted_at DOUBLE PRECISION",
        "ALTER TABLE samples ADD COLUMN counted_requests BIGINT",
        "ALTER TABLE samples ADD COLUMN counted_failures BIGINT",
    ),
}


def _schema_version_of(database: Any) -> int:
    """The version the database has, 0 for a new one; StartupError when it is not a number."""
    try:
        rows = database.query("SELECT value FROM meta WHERE key = 'schema_version'")
    except database.errors:
        return 0
    if rows and not re.fullmatch("[0-9]{1,6}", str(rows[0][0])):
        raise StartupError(f"the database has schema {rows[0][0]!r}, which no Load Manager wrote")
    return int(rows[0][0]) if rows else 0


def _refuse_newer(version: int) -> None:
    """StartupError for a database that a newer Load Manager wrote; it is not changed."""
    if version > max(MIGRATIONS):
        raise StartupError(
            f"the database has schema {version}, written by a newer Load Manager; this one reads up to "
            f"{max(MIGRATIONS)}; it is left untouched"
        )


class DatabaseGone(OSError):
    """The database's file is not where it was opened, and cannot be written there again."""


class LeadershipLost(Exception):
    """Another Load Manager leads on this database: nothing of ours may be written any more."""


class SqliteDatabase:
    """One SQLite file, locked for this process; StartupError when it cannot be used.

    Locked are a file beside it, whose content says by whom, and the database itself: it may
    have other names, and the file beside it be removed. Both are flock(), which SQLite's own
    locks do not meet. Closing such a file would drop SQLite's locks on it: it stays open."""

    is_leading = True  # as long as the lock is held, which only the end of this process gives back
    SIDE_FILES = ("-wal", "-shm")

    def __init__(self, path: str):
        import sqlite3

        self._sqlite3 = sqlite3
        self.path = path if path == ":memory:" else os.path.realpath(path)
        self.errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
        self._locks: list[int] = []  # descriptors
        self._opened: dict[str, tuple[int, int] | None] = {}  # its files, and which they were
        self._begun = self._committed = 0  # number of a batch
        self._checking: Any = None  # a second connection while it is opened: see abandon()
        self._is_new = path == ":memory:" or not os.path.exists(path)
        self._found_beside = [end for end in self.SIDE_FILES if os.path.exists(self.path + end)]
        if path != ":memory:":
            self._refuse_unusable()
            self._lock_for_this_process()
        try:
            self._open()
        except sqlite3.Error as error:
            self.abandon()
            raise StartupError(f"database {path}: {self._why(error)}; it is left untouched") from None
        except StartupError:
            self.abandon()
            raise

    def _refuse_unusable(self) -> None:
        if os.path.isdir(self.path):
            raise StartupError(f"database {self.path}: is a directory; must be a file")
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise StartupError(f"database {self.path}: the folder {folder} does not exist")
        existing = self.path if os.path.exists(self.path) else folder
        if not os.access(existing, os.W_OK) or not os.access(folder, os.W_OK):
            raise StartupError(f"database {self.path}: {existing} is read-only")

    # ---- locks -------------------------------------------------------------

    def _lock_for_this_process(self) -> None:
        """Locks that the system drops with the process, so that kill -9 leaves none."""
        for path in (self.path + ".lock", self.path):
            try:
                self._lock(path)
            except BlockingIOError:
                self._unlock()
                raise StartupError(
                    f"database {self.path}: is in use by another Load Manager, process {self._owner()}"
                ) from None
            except OSError as error:
                self._unlock()
                raise StartupError(f"database {self.path}: cannot be locked: {error.strerror}") from None
        os.ftruncate(self._locks[0], 0)
        os.pwrite(self._locks[0], str(os.getpid()).encode(), 0)

    def _lock(self, path: str) -> None:
        descriptor = open_private(path, os.O_RDWR | os.O_CREAT)
        self._locks.append(descriptor)
        try:
            import fcntl
        except ImportError:  # Windows: SQLite's own locks are all there is
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _owner(self) -> str:
        try:
            with open(self.path + ".lock") as file:
                return file.read(20).strip() or "unknown"
        except OSError:
            return "unknown"

    def _unlock(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks = []

    # ---- opening -----------------------------------------------------------

    def _open(self) -> None:
        if self.path != ":memory:" and not self._is_new:
            self._check_without_writing()
        self._connection = self._connect(self.path)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=FULL")
        self._note_files()

    def _connect(self, name: str, **how: Any) -> Any:
        return self._sqlite3.connect(name, timeout=5, isolation_level=None, check_same_thread=False, **how)

    def _check_without_writing(self) -> None:
        """StartupError for a file that is not ours, newer or damaged. Without a log of writes
        beside it the file is all there is, and reading it makes no file; else the log belongs
        to it, and a connection that may only read leaves both as they are."""
        has_log = any(
            os.path.exists(self.path + end) and os.path.getsize(self.path + end)
            for end in self.SIDE_FILES[:1]
        )
        mode = "mode=ro" if has_log else "mode=ro&immutable=1"
        checking = self._connect(f"file:{quote(self.path)}?{mode}", uri=True)
        self._connection = self._checking = checking
        self._check_content()
        _refuse_newer(_schema_version_of(self))
        if not has_log:  # it cannot see what is written from now on, nor keep others from anything
            checking.close()
            self._checking = None

    def _check_content(self) -> None:
        tables = {name for (name,) in self.query("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "meta" not in tables:
            raise StartupError(f"database {self.path}: is not a Load Manager database; it is left untouched")
        if self.query("PRAGMA quick_check(1)") != [("ok",)]:
            raise StartupError(
                f"database {self.path}: is damaged; restore a copy, or move it away to start empty"
            )

    def _why(self, error: Exception) -> str:
        text = str(error)
        if "locked" in text:
            return "is locked by another process"
        if "not a database" in text or "malformed" in text:
            return f"is damaged or not a database ({text})"
        return text

    def opened(self) -> None:
        """What it holds could be read: from now on it may be changed."""
        if self._checking is not None:
            self._checking.close()
            self._checking = None

    def abandon(self) -> None:
        """Close a database that is refused, and leave its files as they were found: as long as
        the second connection is open SQLite does not move its log of writes into the file."""
        for connection in (getattr(self, "_connection", None), self._checking):
            if connection is not None:
                connection.close()
        if self.path != ":memory:" and self._locks:
            for end in self.SIDE_FILES:
                if end not in self._found_beside and os.path.exists(self.path + end):
                    os.unlink(self.path + end)
        self._unlock()

    # ---- is it still there? ------------------------------------------------

    def _note_files(self) -> None:
        if self.path != ":memory:":
            names = [self.path, *(self.path + end for end in self.SIDE_FILES)]
            self._opened = {name: _file_id(name) for name in names}

    def check(self) -> None:
        """Write the file again where it or its log was deleted under us, from what is still open:
        what is written to a deleted file is gone with this process. DatabaseGone when that
        cannot be."""
        now = {name: _file_id(name) for name in self._opened}
        if all(found in (None, now[name]) for name, found in self._opened.items()):
            self._opened = now
            return
        if now[self.path] not in (None, self._opened[self.path]):
            raise DatabaseGone(
                f"{self.path} was replaced by another file; restart Load Manager to use that one"
            )
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise DatabaseGone(
                f"the folder {folder} is gone; make it again, and the database is written there"
            )
        self._write_again()
        gone = [name for name, found in now.items() if found != self._opened[name]]
        log("database was deleted, written again", files=", ".join(map(os.path.basename, gone)))

    def _write_again(self) -> None:
        """Put a copy of what is open in the file's place. The old connection removes a log of the
        file's name when it is closed: it is, before the new one makes its own."""
        copy, held = f"{self.path}.{os.getpid()}", list(self._locks)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(copy)
        try:
            os.close(open_private(copy, os.O_RDWR | os.O_CREAT))
            self.execute("VACUUM INTO ?", (copy,))
            self._lock(copy)
            os.fsync(self._locks[-1])
            if _file_id(self.path + ".lock") != _id_of(os.fstat(held[0])):  # it was deleted, too
                self._lock(self.path + ".lock")
                os.pwrite(self._locks[-1], str(os.getpid()).encode(), 0)
            os.rename(copy, self.path)
        except (self._sqlite3.Error, OSError) as error:
            for descriptor in self._locks[len(held) :]:
                os.close(descriptor)
            self._locks = held
            with contextlib.suppress(OSError):
                os.unlink(copy)
            raise DatabaseGone(f"{self.path} was deleted and cannot be written again: {error}") from None
        self._connection.close()
        new = self._locks[len(held) :]  # of the file, and of the one beside it if that is new
        os.close(held[1])
        if len(new) > 1:
            os.close(held[0])
        self._locks = [new[1] if len(new) > 1 else held[0], new[0]]
        self._connection = self._connect(self.path)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=FULL")
        self.query("SELECT COUNT(*) FROM meta")  # its log is there from the first reading on
        _sync_folder(self.path)
        self._note_files()

    # ---- statements --------------------------------------------------------

    def take_lead(self) -> None:
        """Lead from now on: the lock of the file says so."""

    def begin(self, number: int) -> None:
        """Begin the transaction that writes batch `number`."""
        self.check()
        self.execute("BEGIN")
        self._begun = number

    def commit(self) -> None:
        """Commit, to a file that will be found again."""
        self.execute("COMMIT")
        self._committed = self._begun
        self.check()

    def recover(self, number: int) -> bool:
        """Leave a transaction that failed; whether batch `number` was committed all the same."""
        self.rollback()
        self.check()
        return self._committed == number

    def is_fault_of_row(self, error: BaseException) -> bool:
        """Whether what is written, rather than the database, is to blame."""
        if isinstance(error, self._sqlite3.ProgrammingError):
            return "binding" in str(error)
        of_row = (self._sqlite3.DataError, self._sqlite3.IntegrityError, self._sqlite3.InterfaceError)
        return isinstance(error, of_row) or not isinstance(error, (*self.errors, MemoryError))

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        return self._connection.execute(sql, values)

    def execute_many(self, sql: str, rows: list[Any]) -> None:
        self._connection.executemany(sql, rows)

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, values).fetchall()

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()
        self._unlock()


def open_private(path: str, flags: int) -> int:
    """The descriptor of a file that only we may read, whatever the umask says, also where it was
    made with more rights before."""
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
    with contextlib.suppress(OSError, AttributeError):  # of another owner, or on a system without rights
        if os.fstat(descriptor).st_mode & 0o177:
            os.fchmod(descriptor, 0o600)
    return descriptor


def _file_id(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return _id_of(found)


def _id_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _sync_folder(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class PostgresDatabase:
    """A PostgreSQL database, held by an advisory lock so that only one Load Manager leads on it.

    The lock goes with the connection, and we learn late that a connection is gone. So each who
    takes the lock counts an epoch in the table meta, and each transaction of ours begins with an
    update of that row which asks for our epoch: another's makes it LeadershipLost, and while our
    transaction is open no one can begin a new one."""

    LOCK_WAIT_S = 2.0  # the server notices some time later that the one before us has ended
    LOCK_ID = 0x4C4D4752  # any number that no one else uses: "LMGR"
    ANSWER_S = 4.0  # a statement that takes longer is given up: packets may be dropped without a word
    READ_S = 15.0  # likewise one that reads a history
    OPENING_S = 600.0  # likewise one that brings old tables to a new version
    # Both ends notice a peer that is gone: the server must give the lock back.
    PATIENCE: dict[str, Any] = {
        "keepalives": 1,
        "keepalives_idle": 2,
        "keepalives_interval": 1,
        "keepalives_count": 3,
    }
    SERVER_PATIENCE = "-c tcp_keepalives_idle=2 -c tcp_keepalives_interval=1 -c tcp_keepalives_count=3"
    CHUNK = 500  # rows that are sent at once

    def __init__(self, url: str):
        try:
            import psycopg
        except ImportError:
            raise StartupError(
                "storage.url: postgresql needs the package psycopg: pip install 'psycopg[binary]'"
            ) from None
        self._psycopg = psycopg
        self.url = url
        self.errors: tuple[type[Exception], ...] = (psycopg.Error, OSError)
        self._epoch = ""  # number and a word of ours: no one else's can be the same
        self._epochs: set[str] = set()  # of ours; which was committed last is known when it is read
        self._is_open = False
        self._backend: tuple[Any, ...] | None = None  # of the connection that has, or had, the lock
        self.is_leading = False
        self._deadline = _Deadline(self._cut)
        try:
            self._connect()
            self._refuse_encoding()
        except psycopg.Error as error:
            raise StartupError(f"database {self.shown}: {str(error).strip().splitlines()[0]}") from None

    @property
    def shown(self) -> str:
        """The address without its password."""
        return re.sub(r"://([^:/@]*):[^@]*@", r"://\1@", self.url)

    # ---- connection and lock -----------------------------------------------

    def _connect(self) -> None:
        given = self._psycopg.conninfo.conninfo_to_dict(self.url).get("options") or ""
        self._connection = self._psycopg.connect(
            self.url,
            autocommit=True,
            connect_timeout=3,
            client_encoding="utf8",
            application_name="loadmanager",
            options=f"{given} {self.SERVER_PATIENCE}".strip(),
            tcp_user_timeout=int(self.ANSWER_S * 1000),
            **self.PATIENCE,
        )
        give_up_at = monotonic_s() + self.LOCK_WAIT_S
        while not self.query("SELECT pg_try_advisory_lock(?)", (self.LOCK_ID,))[0][0]:
            self._end_our_old_connection()
            if monotonic_s() < give_up_at:
                time.sleep(0.1)
                continue
            self._connection.close()
            raise StartupError(f"database {self.shown}: is in use by another Load Manager")
        self.execute(f"SET statement_timeout = {self._patience_s(self.READ_S) * 1000:.0f}")
        self._backend = self.query(
            "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )[0]

    def _end_our_old_connection(self) -> None:
        """The server may believe for long in a connection that we have given up."""
        if self._backend is not None:
            self.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ? AND backend_start = ?",
                self._backend,
            )

    def _refuse_encoding(self) -> None:
        encoding = self.query("SHOW server_encoding")[0][0]
        if encoding != "UTF8":
            raise StartupError(
                f"database {self.shown}: its encoding is {encoding}, must be UTF8; make another with "
                "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
            )

    def _cut(self) -> None:
        """End a statement that is not answered; called by another thread while it waits."""
        with contextlib.suppress(Exception):
            descriptor = os.dup(self._connection.fileno())
            with socket.socket(fileno=descriptor) as cut:
                cut.shutdown(socket.SHUT_RDWR)

    # ---- leading -----------------------------------------------------------

    def take_lead(self, number: int = 0) -> None:
        """Count a new epoch, ours, within the transaction that opens the database or finds it again."""
        found = self.query("SELECT value FROM meta WHERE key = 'leader' FOR UPDATE")
        count = int(found[0][0].partition(".")[0]) + 1 if found else 1
        self._epoch = f"{count}.{secrets.token_hex(6)}"
        self._epochs.add(self._epoch)
        self.execute("DELETE FROM meta WHERE key = 'leader'")
        row = ("leader", f"{self._epoch}/{number}")
        self.execute("INSERT INTO meta (key, value) VALUES (?, ?)", row)

    def check(self) -> None:
        """LeadershipLost when another one leads; any error when the database does not answer."""
        self._led(self.query("SELECT value FROM meta WHERE key = 'leader'"))

    def _led(self, rows: list[tuple[Any, ...]]) -> int:
        """The number of the last batch that was committed in our epoch, or LeadershipLost."""
        epoch, _, number = (rows[0][0] if rows else "/0").partition("/")
        if epoch not in self._epochs:
            self.is_leading = False
            theirs, ours = epoch.partition(".")[0] or "none", self._epoch.partition(".")[0]
            raise LeadershipLost(
                f"another Load Manager leads on {self.shown} since: its epoch is {theirs}, ours was {ours}"
            )
        return int(number)

    def begin(self, number: int) -> None:
        """Begin the transaction that writes batch `number`; LeadershipLost when another one leads."""
        self.execute("BEGIN")
        done = self.execute(
            "UPDATE meta SET value = ? WHERE key = 'leader' AND value LIKE ?",
            (f"{self._epoch}/{number}", f"{self._epoch}/%"),
        )
        if done.rowcount != 1:
            self._led(self.query("SELECT value FROM meta WHERE key = 'leader'"))

    def commit(self) -> None:
        self.execute("COMMIT")

    def recover(self, number: int) -> bool:
        """Leave a transaction that failed; whether batch `number` was committed all the same. A
        broken connection is replaced by a new one, which leads only when no one led since."""
        if not self._connection.broken and not self._connection.closed:
            self.rollback()
            return False
        self.is_leading = False
        try:
            self._connect()
        except StartupError as error:
            self._look_who_leads()
            raise OSError(str(error)) from None
        self.execute("BEGIN")
        committed = self._led(self.query("SELECT value FROM meta WHERE key = 'leader' FOR UPDATE"))
        self.take_lead(committed)
        self.execute("COMMIT")
        self._epochs = {self._epoch}
        self.is_leading = True
        log("database is back", epoch=self._epoch.partition(".")[0])
        return committed == number

    def _look_who_leads(self) -> None:
        """LeadershipLost when the one who holds the lock has begun an epoch of its own."""
        with self._psycopg.connect(
            self.url, autocommit=True, connect_timeout=3, **self.PATIENCE
        ) as connection:
            self._led(connection.execute("SELECT value FROM meta WHERE key = 'leader'").fetchall())

    def is_fault_of_row(self, error: BaseException) -> bool:
        """Whether what is written, rather than the database, is to blame."""
        psycopg, state = self._psycopg, getattr(error, "sqlstate", None) or ""
        if isinstance(error, psycopg.ProgrammingError):
            return not state  # it was not even sent: a value of a type that no column takes
        is_row = isinstance(error, (psycopg.DataError, psycopg.IntegrityError)) or state.startswith("54")
        return is_row or not isinstance(error, (*self.errors, MemoryError, LeadershipLost))

    # ---- statements --------------------------------------------------------

    def opened(self) -> None:
        """What it holds could be read, and we lead."""
        self._is_open = self.is_leading = True
        self.execute(f"SET statement_timeout = {self.READ_S * 1000:.0f}")

    def _patience_s(self, seconds: float) -> float:
        return seconds if self._is_open else self.OPENING_S

    def abandon(self) -> None:
        self.close()

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        with self._deadline.within(self._patience_s(self.ANSWER_S)):
            return self._connection.execute(sql.replace("?", "%s"), values)

    def execute_many(self, sql: str, rows: list[Any]) -> None:
        with self._connection.cursor() as cursor:
            for start in range(0, len(rows), self.CHUNK):
                with self._deadline.within(self._patience_s(self.ANSWER_S)):
                    cursor.executemany(sql.replace("?", "%s"), rows[start : start + self.CHUNK])

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        seconds = self.ANSWER_S if " FROM meta " in sql else self.READ_S
        with self._deadline.within(self._patience_s(seconds)):
            return self._connection.execute(sql.replace("?", "%s"), values).fetchall()

    def rollback(self) -> None:
        self._connection.rollback()

    def close(self) -> None:
        self._deadline.close()
        self._connection.close()


class _Deadline:
    """Calls `cut` when what is done `within` some seconds takes longer. psycopg has no such time
    of its own, and a peer that is silent keeps a thread for ever."""

    TICK_S = 0.25

    def __init__(self, cut: Callable[[], None]):
        self._cut = cut
        self._lock = threading.Lock()
        self._due = math.inf
        self._closed = False
        start_thread("database-deadline", self._watch)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        with self._lock:
            self._due = monotonic_s() + seconds
        try:
            yield
        finally:
            with self._lock:
                self._due = math.inf

    def _watch(self) -> None:
        while not self._closed:
            time.sleep(self.TICK_S)
            with self._lock:
                if monotonic_s() > self._due:
                    self._due = math.inf
                    self._cut()

    def close(self) -> None:
        self._closed = True


Database = SqliteDatabase | PostgresDatabase


def open_database(url: str, folder: str) -> Database:
    """Open the database of storage.url, or StartupError. Its tables are brought to the newest
    version by the store that reads it."""
    if url.startswith("postgres"):
        return PostgresDatabase(url)
    if url == "memory:":
        return SqliteDatabase(":memory:")
    return SqliteDatabase(os.path.join(folder, url.removeprefix("sqlite:///")))


def open_tables(database: Database, read: Callable[[Database], None]) -> None:
    """Bring the tables to the newest version and `read` them in one transaction: what cannot be
    read is refused with StartupError, and left as it was."""
    shown = getattr(database, "shown", None) or getattr(database, "path", "")
    try:
        database.execute("BEGIN")
        _migrate(database)
        read(database)
        database.take_lead()
        database.execute("COMMIT")
        database.opened()
    except database.errors as error:
        _give_back(database)
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise StartupError(f"database {shown}: cannot be opened: {why}; it is left untouched") from None
    except BaseException:
        _give_back(database)
        raise


def _give_back(database: Database) -> None:
    with contextlib.suppress(*database.errors):
        database.rollback()
    with contextlib.suppress(*database.errors):
        database.abandon()


def _migrate(database: Database) -> None:
    """Bring the tables to the newest version, within a transaction: old or new, never between."""
    database.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    version = _schema_version_of(database)
    _refuse_newer(version)
    for number in sorted(MIGRATIONS):
        if number > version:
            _take_step(database, number)
    _refuse_missing_columns(database)
    database.execute("DELETE FROM meta WHERE key IN ('schema_version', 'opened_at')")
    kept = [("schema_version", str(max(MIGRATIONS))), ("opened_at", utc_text(time.time()))]
    database.execute_many("INSERT INTO meta (key, value) VALUES (?, ?)", kept)


def _take_step(database: Database, version: int) -> None:
    for step in MIGRATIONS[version]:
        if isinstance(step, str):
            database.execute(step)
        else:
            step(database)


def _refuse_missing_columns(database: Database) -> None:
    """StartupError when a table is another one than its version says: each insert would fail."""
    for table, columns in TABLES.items():
        found = [item[0] for item in database.execute(f"SELECT * FROM {table} WHERE 1 = 0").description]
        missing = [column for column in columns if column not in found]
        if missing:
            raise StartupError(
                f"the database's table {table} has no column {', '.join(missing)}: another program made or "
                "changed it; restore a copy of the database, or move it away to start empty; it is left "
                "untouched"
            )


class _Ticket:
    """A caller who waits for the writer: done when all written before it is durable."""

    __slots__ = ("ready", "read", "result", "error", "run_id")

    def __init__(self, read: Callable[[Database], Any] | None = None, run_id: str | None = None):
        self.ready = threading.Event()
        self.read = read
        self.run_id = run_id  # whose row must be among what was written
        self.result: Any = None
        self.error: str | None = None

    def settle(self, error: str | None) -> None:
        self.error = self.error or error
        self.ready.set()


class Numbers:
    """What a run's newest numbers are, and as JSON, which is made once and when it is asked for."""

    __slots__ = ("snapshot", "source", "_json")

    def __init__(self, snapshot: Snapshot | None, source: str, json_: bytes | None = None):
        self.snapshot = snapshot  # None: of a final run, 3 KiB as bytes against 10 as objects
        self.source = source  # poll, push or final
        self._json = json_

    def json(self) -> bytes:
        found = self._json
        if found is None:
            found = self._json = storable_json(snapshot_to_json(self.snapshot))  # type: ignore[arg-type]
        return found

    def brief(self) -> dict[str, Any]:
        """As JSON, without the endpoints' rows, which can be 500."""
        snapshot = self.snapshot
        if snapshot is not None:
            return snapshot_to_json(snapshot._replace(endpoints=None))
        found = json.loads(self.json())
        found.pop("requestStats", None)
        return found

    def compact(self) -> None:
        self.json()
        self.snapshot = None


class RunState(NamedTuple):
    """A run as it was when its row was asked for: a later change is another row."""

    run: Run
    numbers: Numbers | None

    def row(self) -> tuple[str, int, str, str | None]:
        run, numbers = self
        record = storable_json(run_to_fields(run)).decode()
        return run.id, run.seq, record, numbers.json().decode() if numbers else None


def storable_json(value: Any) -> bytes:
    """JSON of anything. What neither JSON nor a database can hold is replaced, so that one odd
    number in a run's metadata does not keep the run from being kept."""
    try:
        return dump_json(value).encode()
    except (ValueError, OverflowError, RecursionError):
        return dump_json(_storable(value)).encode()


def _storable(value: Any, depth: int = 0) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if value.bit_length() < 10_000 else None  # Python does not write longer ones
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if depth > 100:
        return None
    if isinstance(value, dict):
        return {_storable(str(key)): _storable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item, depth + 1) for item in value]
    return value


@dataclass
class _Batch:
    """What is to be written; a later state of the same run replaces the earlier."""

    gone: dict[str, None] = field(default_factory=dict)  # runs to be deleted with all they have
    runs: dict[str, RunState] = field(default_factory=dict)
    baselines: dict[tuple[str, str, str], Baseline | None] = field(
        default_factory=dict
    )  # None: none any more
    documents: dict[tuple[str, str], tuple[Any, ...] | None] = field(
        default_factory=dict
    )  # table and id -> the rest of the row; None: deleted
    artefacts: dict[tuple[str, str], str] = field(default_factory=dict)  # run id, name -> packed content
    keys: dict[str, tuple[str, str, float]] = field(default_factory=dict)  # as Store._keys
    packed_histograms: list[tuple[str, float, int, str]] = field(default_factory=list)  # rows as they are
    histograms: list[tuple[str, HistogramPoint, bool]] = field(default_factory=list)  # run id; its last ones
    samples: list[Sample] = field(default_factory=list)
    audit: list[tuple[int, AuditEntry]] = field(default_factory=list)
    when_durable: list[Callable[[], None]] = field(default_factory=list)
    tickets: list[_Ticket] = field(default_factory=list)
    since: float = math.inf  # monotonic: when the oldest of its rows was saved

    ROWS = (
        "gone", "runs", "baselines", "documents", "artefacts", "keys",
        "packed_histograms", "histograms", "samples", "audit",
    )  # fmt: skip

    def __bool__(self) -> bool:
        return self.has_rows or bool(self.tickets or self.when_durable)

    @property
    def has_rows(self) -> bool:
        return any(getattr(self, name) for name in self.ROWS)

    def forget(self, run_id: str) -> None:
        """Nothing of a run that is deleted is written any more."""
        self.runs.pop(run_id, None)
        self.keys = {key: known for key, known in self.keys.items() if known[1] != run_id}
        self.artefacts = {place: content for place, content in self.artefacts.items() if place[0] != run_id}
        for name in ("packed_histograms", "histograms", "samples"):
            rows = getattr(self, name)
            if rows:
                setattr(self, name, [row for row in rows if row[0] != run_id])

    def join(self, later: _Batch, limits: dict[str, int]) -> _Batch:
        """This one, which could not be written, together with what came since."""
        for run_id in later.gone:
            self.forget(run_id)
        for name in (*self.ROWS, "when_durable"):
            mine, theirs = getattr(self, name), getattr(later, name)
            if isinstance(mine, dict):
                setattr(self, name, {**mine, **theirs})
            else:
                setattr(self, name, mine[-limits.get(name, sys.maxsize) :] + theirs)
        self.tickets = later.tickets
        self.since = min(self.since, later.since)
        return self

    def rows(self) -> list[tuple[str, Any]]:
        """Every single row with the name of its list."""
        found: list[tuple[str, Any]] = []
        for name in self.ROWS:
            kept = getattr(self, name)
            found += [(name, row) for row in (kept.items() if isinstance(kept, dict) else kept)]
        return found

    @classmethod
    def of_rows(cls, rows: list[tuple[str, Any]]) -> _Batch:
        batch = cls()
        for name, row in rows:
            kept = getattr(batch, name)
            if isinstance(kept, dict):
                kept[row[0]] = row[1]
            else:
                kept.append(row)
        return batch


def _whose(name: str, row: Any) -> str:
    """The run, or what else, a row of a batch is about."""
    if name in ("gone", "runs"):
        return row[0]
    if name == "keys":
        return row[1][1]
    if name == "audit":
        return row[1].run_id
    if name in ("baselines", "documents", "artefacts"):
        return "/".join(row[0])
    return row[0]


def _packed(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content)).decode()  # text: one type for both databases


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def _goes_on(before: HistogramPoint, point: HistogramPoint) -> bool:
    """Whether the later counters contain the earlier ones."""
    now = point.histograms
    return all(
        key in now and since(now[key], histogram) is not None for key, histogram in before.histograms.items()
    )


class _RowWriter:
    """Makes the rows of a batch and writes them, within a transaction."""

    HISTOGRAM_STEP_S = 0.9  # not more often
    WHOLE_EVERY = 60  # the others hold what came since the one before
    OF_RUNS = {
        "runs": "id", "samples": "run_id", "histograms": "run_id", "idempotency": "run_id",
        "artefacts": "run_id",
    }  # fmt: skip

    def __init__(self, database: Database):
        self._database = database
        self._histograms: dict[str, tuple[HistogramPoint, int]] = {}  # the newest of each run, its number

    def forget_written(self) -> None:
        """Which histograms are in the database is not known any more: the next hold all."""
        self._histograms.clear()

    def write(self, batch: _Batch) -> None:
        many = self._database.execute_many
        if batch.gone:
            ids = [(run_id,) for run_id in batch.gone]
            for table, column in self.OF_RUNS.items():
                many(f"DELETE FROM {table} WHERE {column} = ?", ids)
        rows: list[Any] = [*batch.packed_histograms, *self._histogram_rows(batch)]
        if rows:
            many(insert_into("histograms"), rows)
        if batch.runs:
            self._write_runs(batch)
        if batch.baselines:
            self._write_baselines(batch)
        self._write_documents(batch)
        if batch.artefacts:
            later = "ON CONFLICT (run_id, name) DO UPDATE SET content = excluded.content"
            rows = [(*place, content) for place, content in batch.artefacts.items()]
            many(insert_into("artefacts", later), rows)
        if batch.samples:
            many(insert_into("samples"), [_finite_sample(sample) for sample in batch.samples])
        if batch.keys:
            later = (
                "ON CONFLICT (key) DO UPDATE SET body_hash = excluded.body_hash,"
                " run_id = excluded.run_id, created_at = excluded.created_at"
            )
            many(insert_into("idempotency", later), [(key, *known) for key, known in batch.keys.items()])
        if batch.audit:
            rows = [(seq, *entry) for seq, entry in batch.audit]
            many(insert_into("audit", "ON CONFLICT (seq) DO NOTHING"), rows)

    def _histogram_rows(self, batch: _Batch) -> Iterator[tuple[str, float, int, str]]:
        """Rows of the table; one that holds everything since the start comes first, after a
        restart, after a reset of Locust's statistics, and every WHOLE_EVERY rows."""
        for run_id, point, are_last in batch.histograms:
            before, number = self._histograms.get(run_id, (None, 0))
            if before is not None and (
                point.at <= before.at or (not are_last and point.at - before.at < self.HISTOGRAM_STEP_S)
            ):
                continue
            is_whole = before is None or number % self.WHOLE_EVERY == 0 or not _goes_on(before, point)
            content = histograms_to_record(point.histograms, None if is_whole else before.histograms)
            yield run_id, point.at, int(is_whole), _packed(content.encode())
            self._histograms[run_id] = point, number + 1

    def _write_runs(self, batch: _Batch) -> None:
        later = "ON CONFLICT (id) DO UPDATE SET record = excluded.record, metrics = excluded.metrics"
        self._database.execute_many(
            insert_into("runs", later), [state.row() for state in batch.runs.values()]
        )
        for run_id, state in batch.runs.items():
            if state.run.is_final:
                self._histograms.pop(run_id, None)

    def _write_baselines(self, batch: _Batch) -> None:
        places = "DELETE FROM baselines WHERE tenant_id = ? AND env_id = ? AND scenario_id = ?"
        self._database.execute_many(places, list(batch.baselines))
        kept = [baseline for baseline in batch.baselines.values() if baseline is not None]
        if kept:
            self._database.execute_many(insert_into("baselines"), kept)

    def _write_documents(self, batch: _Batch) -> None:
        for (table, id_), row in batch.documents.items():
            self._database.execute(f"DELETE FROM {table} WHERE {TABLES[table][0]} = ?", (id_,))
            if row is not None:
                self._database.execute(insert_into(table), (id_, *row))


def _finite_sample(sample: Sample) -> Sample:
    """Without NaN and infinity, which JSON has not; what is pushed was checked when it came."""
    if sample.source == "push" or all(
        math.isfinite(value) for value in sample[2:-1] if isinstance(value, float)
    ):
        return sample
    odd = [
        name
        for name, value in zip(sample._fields, sample, strict=True)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    empty: dict[str, Any] = dict.fromkeys(odd)
    return sample._replace(**empty)


class DatabaseWriter(threading.Thread):
    """The only thread that writes, and that no error ends. What the database does not take is kept
    and tried again every second, so a full disk loses nothing once there is room; a row that it
    can never take is left out and logged. Meanwhile `problem` says why."""

    LAZY_S = 0.5  # how long samples that no one waits for may stay unwritten
    CHECK_S = 1.0  # how often the database is asked whether it is there when nothing is written
    LATE_S = 3.0  # a database that does not answer for longer, and a change that waits longer, is late
    WAIT_S = 8.0
    LIMITS = {"samples": 500_000, "histograms": 5_000, "audit": 100_000}  # kept while the disk is full

    def __init__(self, database: Database, audit_file: str | None = None):
        super().__init__(name="journal", daemon=True)
        self._database = database
        self._rows = _RowWriter(database)
        self._audit_file = audit_file
        self._changed = threading.Condition()
        self._batch = _Batch()
        self._in_hand: _Batch | None = None
        self._in_doubt: _Batch | None = None  # its COMMIT was sent and not answered
        self._number = 0  # of the newest transaction
        self._closing = False
        self._failure: str | None = None  # why the last attempt failed
        self._checked_at = monotonic_s()
        self._busy_since: float | None = None
        self._left_out: dict[tuple[str, str], int] = {}  # rows by list and run
        self.rows_left_out = 0
        self.lost: str | None = None  # why we do not lead any more
        self.on_lost: Callable[[str], None] = end_without_lead

    # ---- what is to be written ---------------------------------------------

    def one_commit(self) -> threading.Condition:
        """What is saved within is written in one commit, or not at all."""
        return self._changed

    def _next(self) -> _Batch:
        """The batch that a row is added to; under _changed."""
        batch = self._batch
        if batch.since == math.inf:
            batch.since = monotonic_s()
        return batch

    def save(self, state: RunState) -> None:
        with self._changed:
            self._next().runs[state.run.id] = state

    def when_durable(self, then: Callable[[], None]) -> None:
        """Call `then` in the writer's thread when all that was saved before is on disk."""
        with self._changed:
            self._next().when_durable.append(then)

    def add_audit(self, seq: int, entry: AuditEntry) -> None:
        with self._changed:
            self._next().audit.append((seq, entry))

    def save_history(
        self, state: RunState, samples: list[Sample], histograms: list[tuple[float, int, str]]
    ) -> None:
        """A run with its whole history, for one commit."""
        run_id = state.run.id
        rows = [(run_id, at, is_whole, _packed(text.encode())) for at, is_whole, text in histograms]
        with self._changed:
            self._next().runs[run_id] = state
            self._batch.samples += samples
            self._batch.packed_histograms += rows

    def save_document(self, table: str, id_: str, row: tuple[Any, ...] | None) -> None:
        """A row of `schedules`, `outbox` or `cleanups`; None deletes it."""
        with self._changed:
            self._next().documents[table, id_] = row

    def save_key(self, key: str, known: tuple[str, str, float]) -> None:
        with self._changed:
            self._next().keys[key] = known

    def save_artefact(self, run_id: str, name: str, content: bytes) -> None:
        packed = _packed(content)
        with self._changed:
            self._next().artefacts[run_id, name] = packed

    def save_baseline(self, place: tuple[str, str, str], baseline: Baseline | None) -> None:
        with self._changed:
            self._next().baselines[place] = baseline

    def forget(self, run_id: str) -> None:
        with self._changed:
            self._next().forget(run_id)
            self._batch.gone[run_id] = None

    def add_sample(self, sample: Sample) -> None:
        with self._changed:
            self._next().samples.append(sample)

    def add_histograms(self, run_id: str, point: HistogramPoint, are_last: bool) -> None:
        with self._changed:
            self._next().histograms.append((run_id, point, are_last))

    # ---- waiting -----------------------------------------------------------

    def wait_durable(self, timeout_s: float | None = None, run_id: str | None = None) -> None:
        """Return when all that was saved before is on disk; NotReady when it cannot be, or when
        the row of this run could not be written."""
        problem = self.lost or self._failure
        if problem is not None:
            raise NotReady(f"the database cannot be written: {problem}", retry_after_s=5)
        self._enqueue(_Ticket(run_id=run_id), self.WAIT_S if timeout_s is None else timeout_s)

    def read(self, work: Callable[[Database], Any], timeout_s: float = 30.0) -> Any:
        """The result of `work` on the database, after everything saved before it."""
        return self._enqueue(_Ticket(work), timeout_s).result

    def _enqueue(self, ticket: _Ticket, timeout_s: float) -> _Ticket:
        with self._changed:
            if self._closing:
                raise NotReady("Load Manager is shutting down", retry_after_s=5)
            self._batch.tickets.append(ticket)
            self._changed.notify()
        give_up_at = monotonic_s() + timeout_s
        while not ticket.ready.wait(min(1.0, max(0.0, give_up_at - monotonic_s()))):
            if monotonic_s() >= give_up_at or not self.is_alive():
                raise NotReady("the database did not answer in time", retry_after_s=5)
        if ticket.error:
            raise NotReady(f"the database cannot be written: {ticket.error}", retry_after_s=5)
        return ticket

    @property
    def problem(self) -> str | None:
        """Why nothing can be written at the moment, or None. Asked by any thread, without a lock."""
        if self.lost is not None:
            return self.lost
        if self._failure is not None:
            return self._failure
        if not self.is_alive() and not self._closing:
            return "the thread that writes has ended; restart Load Manager"
        now, busy = monotonic_s(), self._busy_since
        if busy is not None and now - busy > self.LATE_S:
            return f"it has not answered for {now - busy:.0f} s"
        in_hand = self._in_hand
        oldest = min(self._batch.since, in_hand.since if in_hand is not None else math.inf)
        if now - oldest > self.LATE_S:
            return f"a change has waited for {now - oldest:.0f} s to be written"
        return None

    def close(self) -> None:
        """Write what is left and close the database."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join(4)

    # ---- the thread --------------------------------------------------------

    def run(self) -> None:
        while not self._work_safely():
            pass
        try:
            self._database.close()
        except Exception as error:  # noqa: BLE001 - nothing is left to be written
            log("database not closed cleanly", error=error)

    def _work_safely(self) -> bool:
        """One turn of the thread, which no error ends; whether it was the last."""
        try:
            return self._work()
        except BaseException as error:  # noqa: BLE001 - the edge: this thread must go on
            try:
                self._fail(error)
            except BaseException as second:  # noqa: BLE001
                log("failure not dealt with", error=repr(error), second=repr(second))
                time.sleep(1.0)
        return self._closing

    def _work(self) -> bool:
        """Write what there is, or check that the database is there; whether it was the last time."""
        last = self._take_batch()
        batch = self._in_hand
        assert batch is not None
        is_due = monotonic_s() - self._checked_at >= self.CHECK_S
        if self.lost is not None:
            self._settle(batch, self.lost)
        elif batch or is_due or self._failure is not None:
            self._busy_since = monotonic_s()
            self._write_or_check(is_due)
        self._in_hand = self._busy_since = None
        return last

    def _take_batch(self) -> bool:
        with self._changed:
            if not self._batch.tickets and not self._closing:
                self._changed.wait(self.LAZY_S)
            self._in_hand, self._batch = self._batch, _Batch()
            return self._closing

    def _write_or_check(self, is_due: bool) -> None:
        if self._failure is not None:
            self._recover()
        batch = self._in_hand
        assert batch is not None
        if batch.has_rows:
            self._write(batch)
        elif is_due or self._failure is not None:
            self._database.check()
        self._checked_at = monotonic_s()
        self._in_hand = _Batch(tickets=batch.tickets)  # the rest is done, and must not be done twice
        self._failure = self._busy_since = None
        self._call_all(batch.when_durable)
        self._read_all(batch)
        self._settle(batch, None)

    def _write(self, batch: _Batch) -> None:
        """Write a batch in one transaction, but for rows that the database can never take."""
        self._number += 1
        database = self._database
        try:
            database.begin(self._number)
            self._rows.write(batch)
        except Exception as error:
            if not database.is_fault_of_row(error):
                raise
            database.rollback()
            self._rows.forget_written()
            database.begin(self._number)
            self._write_in_parts(batch, batch.rows())
        self._in_doubt = batch
        database.commit()
        self._in_doubt = None
        self._append_audit(batch)

    def _write_in_parts(self, batch: _Batch, rows: list[tuple[str, Any]]) -> None:
        """Write the rows of a batch of which one or more cannot be written: half of them, and half
        of the half, until the bad one is alone and left out."""
        self._busy_since = monotonic_s()
        self._database.execute("SAVEPOINT part")
        try:
            self._rows.write(_Batch.of_rows(rows))
        except Exception as error:
            if not self._database.is_fault_of_row(error):
                raise
            self._database.execute("ROLLBACK TO SAVEPOINT part")
            self._rows.forget_written()
            if len(rows) == 1:
                self._leave_out(batch, *rows[0], error)
            else:
                middle = len(rows) // 2
                self._write_in_parts(batch, rows[:middle])
                self._write_in_parts(batch, rows[middle:])
        self._database.execute("RELEASE SAVEPOINT part")

    def _leave_out(self, batch: _Batch, name: str, row: Any, error: Exception) -> None:
        whose, why = _whose(name, row), str(error).strip().partition("\n")[0] or repr(error)
        self.rows_left_out += 1
        count = self._left_out[name, whose] = self._left_out.get((name, whose), 0) + 1
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th...
            log("row cannot be written, left out", rows=name, run=whose, times=count, why=why[:300])
        if len(self._left_out) > 10_000:
            self._left_out.clear()
        if name == "runs":
            for ticket in batch.tickets:
                if ticket.run_id == whose:
                    ticket.error = f"this run cannot be written: {why[:300]}"

    def _call_all(self, actions: list[Callable[[], None]]) -> None:
        for action in actions:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the edge: the others must be called
                log("not reported as durable", error=repr(error))

    def _read_all(self, batch: _Batch) -> None:
        """Do the reads that were asked for. One that fails has its own answer; what was written is."""
        for ticket in batch.tickets:
            if ticket.read is None:
                continue
            try:
                self._busy_since = monotonic_s()
                ticket.result = ticket.read(self._database)
            except Exception as error:  # noqa: BLE001 - its caller is told
                ticket.error = str(error).strip() or repr(error)

    def _append_audit(self, batch: _Batch) -> None:
        """The committed entries as lines of JSON. The file is opened for each batch, so that it
        may be rotated; what cannot be written there is in the database all the same."""
        if not batch.audit or self._audit_file is None:
            return
        lines = b"".join(storable_json(audit_to_json(entry)) + b"\n" for _, entry in batch.audit)
        try:
            with open(open_private(self._audit_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
                file.write(lines)
        except OSError as error:
            why = error.strerror or error
            log("audit file not written", file=self._audit_file, entries=len(batch.audit), why=why)

    def _settle(self, batch: _Batch, error: str | None) -> None:
        for ticket in batch.tickets:
            ticket.settle(error)

    # ---- what fails --------------------------------------------------------

    def _recover(self) -> None:
        """Have the database take statements again, and know what became of a COMMIT without answer."""
        was_committed = self._database.recover(self._number)
        batch, self._in_doubt = self._in_doubt, None
        if batch is None:
            return
        if was_committed:
            self._append_audit(batch)
            self._call_all(batch.when_durable)
        else:
            assert self._in_hand is not None
            self._in_hand = batch.join(self._in_hand, self.LIMITS)

    def _fail(self, error: BaseException) -> None:
        """Keep what is in hand for another try, and answer those who wait."""
        batch, self._in_hand = self._in_hand or _Batch(), None
        self._busy_since = None
        if isinstance(error, LeadershipLost):
            self._lose(batch, str(error))
            return
        why = (str(error).strip() or repr(error)).partition("\n")[0]
        if self._failure is None:
            trace = {} if isinstance(error, self._database.errors) else {"trace": _trace_of(error)}
            log("database cannot be written", error=why, **trace)
        self._failure = why
        self._rows.forget_written()  # which of them are written is not known
        tickets, batch.tickets = batch.tickets, []
        if batch is not self._in_doubt:
            with self._changed:
                self._batch = batch.join(self._batch, self.LIMITS)
        for ticket in tickets:
            ticket.settle(why)
        if not self._closing:
            time.sleep(1.0)

    def _lose(self, batch: _Batch, why: str) -> None:
        """Never write again: what the one who leads now has written is not overwritten."""
        self.lost = why
        self._settle(batch, why)
        self.on_lost(why)


def _trace_of(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))[-2000:]


EXIT_LEAD_LOST = 4


def end_without_lead(why: str) -> None:
    """End this process at once: another one commands the runs now. A supervisor starts it again,
    when it is refused as long as the other one leads."""
    log("ending: this Load Manager leads no more", why=why, status=EXIT_LEAD_LOST)
    os._exit(EXIT_LEAD_LOST)


class StoredRun:
    """A run in memory with its newest numbers: `run` for those who decide, `shown` for all who
    only look. They differ as long as a new or a final run is not on disk. The answer is made once
    for each change: `head` is the run's JSON without the closing brace, the numbers have their
    own; kept apart, neither is stored twice and a new sample does not remake the run."""

    __slots__ = ("run", "shown", "numbers", "final_numbers", "numbers_at", "head", "clock_shift_s")

    def __init__(self, run: Run, metrics: bytes | None = None, is_durable: bool = True):
        self.run = run
        self.shown: Run | None = run if is_durable else None
        self.numbers = Numbers(None, "", metrics) if metrics else None
        self.final_numbers: Numbers | None = None  # not shown yet
        self.numbers_at = -math.inf
        self.head: bytes | None = None
        self.clock_shift_s = 0.0  # by how much the wall clock was set back during the run

    def state(self) -> RunState:
        """What is to be kept of it now."""
        return RunState(self.run, self.final_numbers or self.numbers)

    def change(self, run: Run) -> None:
        """Take a change; one of a final run is shown by show() when it is durable."""
        self.run = run
        if self.shown is not None and not run.is_final:
            self.shown = run
            self.head = None

    def show(self, run: Run) -> None:
        """Show `run`, which is on disk, or a newer state of it that may be shown before."""
        self.shown = run if run.is_final or self.run.is_final else self.run
        self.head = None
        if run.is_final:
            self.numbers = self.final_numbers or self.numbers
            self.final_numbers = None
            if self.numbers:
                self.numbers.compact()

    def wire(self) -> bytes:
        return b"".join(self.wire_parts())

    def wire_parts(self) -> tuple[bytes, ...]:
        """The answer in pieces, so that a list of 10,000 is copied once."""
        head, numbers = self.head, self.numbers
        if head is None:
            assert self.shown is not None
            head = self.head = storable_json(run_to_json(self.shown))[:-1]
        return (head, b',"lastMetrics":', numbers.json(), b"}") if numbers else (head, b"}")

    def brief(self) -> bytes:
        """As wire(), without the endpoints' rows."""
        assert self.shown is not None
        wire = run_to_json(self.shown)
        if self.numbers is not None:
            wire["lastMetrics"] = self.numbers.brief()
        return storable_json(wire)


def _decoded_histograms(rows: Iterable[tuple[float, int, str]]) -> Iterator[HistogramPoint]:
    so_far: Histograms | None = None
    for at, is_whole, content in rows:
        so_far = histograms_from_record(_unpacked(content).decode(), None if is_whole else so_far)
        yield HistogramPoint(at, so_far)


FAILURES, LOCUST_REPORT = "failures.json", "locust-report.html"  # what is kept beside a run
RUN_FIGURES = "figures.json"  # too: what it is compared by


class RunFilter(NamedTuple):
    """Which runs a list has; None: all."""

    tenant_id: str | None = None
    env_id: str | None = None
    statuses: frozenset[str] | None = None
    scope: Scope = EVERYTHING  # what the caller may see
    search: str | None = None  # lower case; somewhere in the run's id, names or creator

    def takes(self, run: Run) -> bool:
        return (
            (self.tenant_id is None or run.tenant_id == self.tenant_id)
            and (self.env_id is None or run.env_id == self.env_id)
            and (self.statuses is None or run.status.value in self.statuses)
            and self.scope.covers(run.tenant_id, run.env_id)
            and (self.search is None or self._finds(run))
        )

    def _finds(self, run: Run) -> bool:
        words = (run.scenario_id, run.tenant_id, run.env_id, run.cluster_id, run.created_by, run.id)
        return any(self.search in word.lower() for word in words)  # type: ignore[operator]


class AuditFilter(NamedTuple):
    """Which entries of the audit are wanted; None: all."""

    who: str | None = None
    tenant_id: str | None = None
    run_id: str | None = None
    action: str | None = None  # somewhere in it
    outcome: str | None = None  # done, refused or failed
    from_at: float | None = None
    to_at: float | None = None
    before_seq: int | None = None

    OUTCOMES = {
        "done": "http_status < 400",
        "refused": "http_status IN (401, 403, 404)",
        "failed": "http_status >= 400 AND http_status NOT IN (401, 403, 404)",
    }

    def where(self, scope: Scope) -> tuple[str, list[Any]]:
        """The condition and its values; of a scope with limits only what is within them."""
        exact = {"who = ?": self.who, "tenant_id = ?": self.tenant_id, "run_id = ?": self.run_id}
        exact |= {"at >= ?": self.from_at, "at <= ?": self.to_at, "seq < ?": self.before_seq}
        parts = [(condition, [value]) for condition, value in exact.items() if value is not None]
        if self.action is not None:
            parts.append(
                (
                    "LOWER(action) LIKE ? ESCAPE '!'",
                    ["%" + re.sub("([!%_])", r"!\1", self.action.lower()) + "%"],
                )
            )
        if self.outcome is not None:
            parts.append((self.OUTCOMES[self.outcome], []))
        for column, allowed in (("tenant_id", scope.tenants), ("env_id", scope.environments)):
            if allowed is not None:
                parts.append((f"{column} IN ({', '.join('?' * len(allowed)) or 'NULL'})", sorted(allowed)))
        return " AND ".join(condition for condition, _ in parts) or "1 = 1", [
            value for _, values in parts for value in values
        ]


class Store:
    """All runs. Every method may be called from any thread; a status changes only in transition()."""

    def __init__(self, database: Database, audit_file: str | None = None):
        self._lock = threading.RLock()  # guards _records, _keys and the records' fields
        self._records: dict[str, StoredRun] = {}  # oldest first
        self._keys: dict[str, tuple[str, str, float]] = {}  # Idempotency-Key -> body hash, run id, moment
        self.comparer = Comparer(self)
        self._baselines: dict[tuple[str, str, str], Baseline] = {}
        self._schedules: dict[str, str] = {}  # id -> record, as they were at the start
        self._deliveries: dict[str, Delivery] = {}  # oldest first
        self._cleanups: dict[str, str] = {}  # run whose load may still be running -> its cluster
        self.deliveries_for: Callable[[Run, Snapshot | None], list[Delivery]] | None = (
            None  # what a transition is to tell
        )
        self._waiting: dict[str, Delivery] = {}  # those that have not ended
        self._unsettled: set[str] = set()  # those that are not to be sent yet
        self._forgot_at = -math.inf  # monotonic: when old ones were last looked for
        self.deliveries_ready: Callable[[], None] | None = None  # some of them are
        self._next_seq = self._next_audit_seq = 1
        self._clock_offset_s = time.time() - monotonic_s()
        self.listeners: list[Callable[[Run], None]] = []  # called under the lock: only note it
        open_tables(database, self._load)
        self._database = database
        self._writer = DatabaseWriter(database, audit_file)
        self._writer.start()

    def _load(self, database: Database) -> None:
        try:
            # Row by row: all rows at once would double the memory that 10,000 runs take.
            for run_id, record, metrics in database.execute(
                "SELECT id, record, metrics FROM runs ORDER BY seq"
            ):
                run = run_from_record(record)
                self._records[run_id] = StoredRun(run, metrics.encode() if metrics else None)
                self._next_seq = run.seq + 1
                if not run.is_final:
                    self._go_on_after_newest_sample(database, self._records[run_id])
            for key, body_hash, run_id, at in database.query(
                "SELECT key, body_hash, run_id, created_at FROM idempotency"
            ):
                if run_id in self._records:
                    self._keys[key] = (body_hash, run_id, at)
            for row in database.query(
                "SELECT tenant_id, env_id, scenario_id, run_id, set_at, set_by FROM baselines"
            ):
                self._baselines[row[0], row[1], row[2]] = Baseline(*row)
            self._schedules = dict(database.query("SELECT id, record FROM schedules"))
            for _, record in database.query("SELECT id, record FROM outbox ORDER BY created_at"):
                delivery = Delivery(*json.loads(record))
                self._deliveries[delivery.id] = delivery
                if delivery.ended_at is None:
                    self._waiting[delivery.id] = delivery
            self._cleanups = dict(database.query("SELECT run_id, cluster_id FROM cleanups"))
            self._next_audit_seq = 1 + (database.query("SELECT MAX(seq) FROM audit")[0][0] or 0)
        except database.errors as error:
            raise StartupError(f"the database cannot be read: {error}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise StartupError(
                f"the database holds a run that cannot be read ({error!r}); it is left untouched"
            ) from None

    # ---- reading -----------------------------------------------------------

    def get(self, run_id: str) -> Run:
        """The run, or NotFound."""
        run = self.find(run_id)
        if run is None:
            raise NotFound(f"there is no run {run_id[:MAX_TEXT]}")
        return run

    def find(self, run_id: str) -> Run | None:
        record = self._records.get(run_id)
        return record.run if record else None

    def wire(self, run_id: str) -> bytes:
        """The run's answer as JSON bytes, or NotFound."""
        with self._lock:
            return self._shown_record(run_id).wire()

    def brief(self, run_id: str) -> bytes:
        """As wire(), without the endpoints' rows."""
        with self._lock:
            return self._shown_record(run_id).brief()

    def newest_sample(self, run_id: str) -> Sample | None:
        """The newest numbers of a run that is going on; None when there are none."""
        with self._lock:
            record = self._records.get(run_id)
            numbers = record.numbers if record else None
        if numbers is None or numbers.snapshot is None:
            return None
        return sample_of(run_id, numbers.snapshot, numbers.source)

    def newest_numbers(self, run_id: str) -> Snapshot | None:
        """The newest numbers of a run with its endpoints, whatever process saw them; None when there are none."""
        with self._lock:
            numbers = self._record(run_id).numbers
        if numbers is None or numbers.snapshot is not None:
            return numbers.snapshot if numbers else None
        return check_metrics({"lastMetrics": json.loads(numbers.json())}, "lastMetrics", math.inf)

    def list_runs(self, wanted: RunFilter = RunFilter()) -> list[Run]:
        """The runs as they are shown, newest first."""
        with self._lock:
            shown = [record.shown for record in reversed(self._records.values())]
        return [run for run in shown if run is not None and wanted.takes(run)]

    def list_wire(
        self, wanted: RunFilter, limit: int | None, before_seq: int | None, brief: bool = False
    ) -> tuple[list[tuple[bytes, ...]], int | None]:
        """Up to `limit` answers in pieces, newest first, from before `before_seq`; and the last one's
        seq if there are more. The search goes without the lock, which callbacks wait for."""
        with self._lock:
            records = list(self._records.values())
        found: list[StoredRun] = []
        for record in reversed(records):
            run = record.shown
            if run is not None and (before_seq is None or run.seq < before_seq) and wanted.takes(run):
                found.append(record)
                if limit is not None and len(found) > limit:
                    break
        is_more = limit is not None and len(found) > limit
        found = found[:limit]
        with self._lock:
            page = [(record.brief(),) if brief else record.wire_parts() for record in found]
        return page, found[-1].run.seq if is_more else None

    def active_runs(self) -> list[Run]:
        with self._lock:
            return [record.run for record in self._records.values() if not record.run.is_final]

    def samples(self, run_id: str, from_at: float = 0.0, to_at: float = 1e12) -> list[Sample]:
        """The run's history between two moments, oldest first; NotReady when it cannot be read."""
        columns = ", ".join(Sample._fields)
        rows = self._writer.read(
            lambda database: database.query(
                f"SELECT {columns} FROM samples WHERE run_id = ? AND at >= ? AND at <= ? ORDER BY at",
                (run_id, from_at, to_at),
            )
        )
        return [Sample(*row) for row in rows]

    def artefact(self, run_id: str, name: str) -> bytes | None:
        """What was kept beside a run under this name, or None."""
        rows = self._writer.read(
            lambda database: database.query(
                "SELECT content FROM artefacts WHERE run_id = ? AND name = ?", (run_id, name)
            )
        )
        return _unpacked(rows[0][0]) if rows else None

    def histograms(self, run_id: str, to_at: float = 1e12) -> Iterator[HistogramPoint]:
        """The run's histograms up to a moment, each from its start, oldest first, decoded one
        by one as they are taken; NotReady when they cannot be read."""
        return _decoded_histograms(self._histogram_rows(run_id, to_at))

    def histogram_records(self, run_id: str) -> list[tuple[float, int, str]]:
        """The run's histograms as they are kept: epoch seconds, whether it holds all since the
        start or what came since the one before, and its record."""
        return [
            (at, is_whole, _unpacked(content).decode())
            for at, is_whole, content in self._histogram_rows(run_id)
        ]

    def _histogram_rows(self, run_id: str, to_at: float = 1e12) -> list[tuple[float, int, str]]:
        return self._writer.read(
            lambda database: database.query(
                "SELECT at, is_whole, content FROM histograms WHERE run_id = ? AND at <= ? ORDER BY at",
                (run_id, to_at),
            )
        )

    def time_blocks(self, run_id: str, total_requests: int | None) -> TimeBlocks | None:
        """The histograms of a run by time block; None when they do not hold all its requests."""
        run = self.find(run_id)
        if run is None or run.started_at is None:
            return None
        lasted_s = (run.finished_at or time.time()) - run.started_at
        return time_blocks_of(
            last_of_each_step(self.histograms(run_id), max(1.0, lasted_s / NOISE_BLOCKS)), total_requests
        )

    @property
    def problem(self) -> str | None:
        """Why nothing can be written at the moment, or None."""
        return self._writer.problem

    @property
    def is_leading(self) -> bool:
        """Whether this process leads on the database: False as long as its connection to PostgreSQL
        is gone, and for ever once another Load Manager has led. Who does not lead commands nothing."""
        return self._database.is_leading and self._writer.lost is None

    @property
    def rows_left_out(self) -> int:
        """How many rows could never be written; the log says which and why."""
        return self._writer.rows_left_out

    def recall_key(self, key: str, now: float) -> tuple[str, str] | None:
        """Body hash and run id of an Idempotency-Key used in the last 24 h."""
        with self._lock:
            known = self._keys.get(key)
        if known is None or known[2] < now - IDEMPOTENCY_KEEP_S:
            return None
        return known[0], known[1]

    # ---- writing -----------------------------------------------------------

    def add(self, run: Run, idempotency: tuple[str, str] | None = None) -> Run:
        """Keep a new run; returns it once durable, and shows it from then on. NotReady, and nothing
        is kept, when it cannot be written. idempotency: the key and the hash of its body."""
        with self._lock, self._writer.one_commit():
            run, record = self._new_record(run)
            self._writer.save(record.state())
            if idempotency:
                key, body_hash = idempotency
                self._keys[key] = (body_hash, run.id, run.created_at)
                self._writer.save_key(key, self._keys[key])
        self._wait_for_new(run.id)
        return run

    def _new_record(self, run: Run) -> tuple[Run, StoredRun]:
        """A record that is shown when what is saved with it is durable; under the lock."""
        run = replace(run, seq=self._next_seq)
        self._next_seq += 1
        record = self._records[run.id] = StoredRun(run, is_durable=False)
        self._writer.when_durable(functools.partial(self._show, record, run))
        return run, record

    def _wait_for_new(self, run_id: str, timeout_s: float | None = None) -> None:
        try:
            self._writer.wait_durable(timeout_s, run_id)
        except NotReady:
            self._drop(run_id)
            raise

    def add_imported(
        self,
        run: Run,
        snapshot: Snapshot | None,
        samples: list[Sample],
        histograms: list[tuple[float, int, str]],
        failures: bytes | None,
    ) -> None:
        """Keep a run from a file with its history; returns once durable. Conflict when there
        is a run of its id; NotReady, and nothing is kept, when it cannot be written."""
        with self._lock, self._writer.one_commit():
            if run.id in self._records:
                raise Conflict(f"there is a run {run.id} already")
            run, record = self._new_record(run)
            if snapshot is not None:
                record.final_numbers = Numbers(snapshot, "final")
            self._writer.save_history(record.state(), samples, histograms)
            if failures is not None:
                self._writer.save_artefact(run.id, FAILURES, failures)
        self._wait_for_new(run.id, 60.0)

    def transition(
        self,
        run_id: str,
        to: RunStatus,
        snapshot: Snapshot | None = None,
        durable: bool = True,
        cleanup_on: str | None = None,
        **changes: Any,
    ) -> Run:
        """Move a run to another status, the only way it changes; Conflict when TRANSITIONS
        does not have it. With `durable` it returns after the commit; a commit that fails is
        tried again by the writer, and the change stands. Readers see a final status, and its
        notifications are sent, when it is on disk. cleanup_on: the cluster on which its load may
        still be running, kept in the same commit."""
        with self._lock, self._writer.one_commit():
            record = self._record(run_id)
            run = record.run
            if to not in TRANSITIONS[run.status]:
                raise Conflict(
                    f"run {run_id} is {run.status.value}, cannot become {to.value}", status=run.status.value
                )
            if to is RunStatus.RUNNING:
                record.clock_shift_s = 0.0
            elif changes.get("finished_at") is not None:
                changes["finished_at"] += self._clock_shift_s(record)
            if snapshot is not None:
                snapshot = self._in_run_time(record, snapshot)
                self._keep_sample(run_id, snapshot, "final")
                if to in FINAL:
                    record.final_numbers = Numbers(snapshot, "final")
                else:
                    record.numbers = Numbers(snapshot, "final")
            run = self._save(
                record, replace(run, status=to, **{"queued": False, "queue_position": None, **changes})
            )
            newest = record.numbers.snapshot if record.numbers else None
            self._keep_deliveries_of(run, snapshot or newest)
            if cleanup_on:
                self.keep_cleanup(run_id, cleanup_on)
        if durable:
            self.wait_durable_or_log()
        return run

    def _keep_deliveries_of(self, run: Run, snapshot: Snapshot | None) -> None:
        found = self.deliveries_for(run, snapshot) if self.deliveries_for else []
        if not found:
            return
        for delivery in found:
            self.keep_delivery(delivery)
        ids = {delivery.id for delivery in found}
        self._unsettled |= ids
        self._writer.when_durable(functools.partial(self._settle_deliveries, ids))

    def update(self, run_id: str, **changes: Any) -> Run | None:
        """Change facts other than the status. A final run keeps every byte of its answer:
        only `cleanup`, which is not in it, may still change."""
        with self._lock:
            record = self._records.get(run_id)
            if record is None or (record.run.is_final and set(changes) != {"cleanup"}):
                return record and record.run
            return self._save(record, replace(record.run, **changes))

    def set_queue_position(self, run_id: str, position: int) -> None:
        """Note a waiting run's place; one that was just given a cluster waits no more."""
        with self._lock:
            record = self._records.get(run_id)
            if record is not None and record.run.queued and record.run.queue_position != position:
                self._save(record, replace(record.run, queue_position=position))

    def add_warning(self, run_id: str, code: str, message: str, now: float) -> bool:
        """Note a warning once per code; False when it was there, or the run is final."""
        with self._lock:
            record = self._records.get(run_id)
            if (
                record is None
                or record.run.is_final
                or any(known.code == code for known in record.run.warnings)
            ):
                return False
            self._save(
                record, replace(record.run, warnings=(*record.run.warnings, Warning_(code, now, message)))
            )
            return True

    def keep_artefact(self, run_id: str, name: str, content: bytes) -> None:
        """Keep a file beside a run; it goes with the run."""
        if run_id in self._records:
            self._writer.save_artefact(run_id, name, content)

    def annotate(self, run_id: str, annotation: Annotation) -> None:
        """Mark a moment of a run, also of a final one: the one thing a person may still add
        to it. Conflict when it has MAX_ANNOTATIONS."""
        with self._lock:
            record = self._record(run_id)
            if len(record.run.annotations) >= MAX_ANNOTATIONS:
                raise Conflict(f"run {run_id} has {MAX_ANNOTATIONS} annotations, the most there may be")
            annotations = tuple(sorted((*record.run.annotations, annotation)))
            self._save(record, replace(record.run, annotations=annotations))
        self._writer.wait_durable()

    def _keep_sample(self, run_id: str, snapshot: Snapshot, source: str, is_last: bool = True) -> None:
        self._writer.add_sample(sample_of(run_id, snapshot, source))
        histograms = histograms_of(snapshot)
        if histograms is not None:
            self._writer.add_histograms(run_id, HistogramPoint(snapshot.taken_at, histograms), is_last)

    def add_snapshot(self, run_id: str, snapshot: Snapshot, source: str, is_last: bool = False) -> bool:
        """Keep a sample of a run that is not final; shown as its newest unless it is older
        than the one shown. False: the run is final or gone, nothing was kept."""
        with self._lock:
            record = self._records.get(run_id)
            if record is None or record.run.is_final:
                return False
            snapshot = self._in_run_time(record, snapshot)
            self._keep_sample(run_id, snapshot, source, is_last)
            if snapshot.taken_at >= record.numbers_at:
                record.numbers = Numbers(snapshot, source)
                record.numbers_at = snapshot.taken_at
                self._writer.save(record.state())
                self._tell(record.run)
            return True

    # ---- time within a run ----

    def _clock_shift_s(self, record: StoredRun) -> float:
        """Seconds by which the wall clock was set back since the run began: added to its times,
        they go on from where they were, and a run's history is in the order in which it came."""
        offset_s = time.time() - monotonic_s()
        step_s, self._clock_offset_s = self._clock_offset_s - offset_s, offset_s
        if abs(step_s) > CLOCK_STEP_S:
            log("clock was set", by_seconds=round(-step_s, 1))
            for one in self._records.values():
                if not one.run.is_final:
                    one.clock_shift_s = max(0.0, one.clock_shift_s + step_s)
        return record.clock_shift_s

    def _in_run_time(self, record: StoredRun, snapshot: Snapshot) -> Snapshot:
        shift_s, taken_at = self._clock_shift_s(record), snapshot.taken_at
        if not 0 <= taken_at < MAX_EPOCH_S:  # also NaN
            taken_at = time.time()
        if shift_s or taken_at != snapshot.taken_at:
            return snapshot._replace(taken_at=taken_at + shift_s)
        return snapshot

    def run_time(self, run_id: str, at: float) -> float:
        """A time of the wall clock as the run's history has it: see _clock_shift_s."""
        with self._lock:
            record = self._records.get(run_id)
            return at + (self._clock_shift_s(record) if record else 0.0)

    def _go_on_after_newest_sample(self, database: Database, record: StoredRun) -> None:
        """The clock may have been set back while we were away."""
        newest = database.query("SELECT MAX(at) FROM samples WHERE run_id = ?", (record.run.id,))[0][0]
        if newest is not None:
            record.clock_shift_s = max(0.0, newest - time.time())

    def delete(self, run_id: str) -> None:
        """Remove a final run with its samples; Conflict for one that is not final."""
        with self._lock:
            run = self._record(run_id).run
            if not run.is_final:
                raise Conflict(
                    f"run {run_id} is {run.status.value}; only a Finished or Failed run can be deleted"
                )
            if self._is_baseline(run):
                raise Conflict(
                    f"run {run_id} is the baseline of {run.tenant_id}/{run.env_id}/{run.scenario_id}; name another or none first"
                )
            self._drop(run_id)
        self._writer.wait_durable()

    def delete_older(self, before_at: float) -> int:
        """Remove final runs that finished before a moment; how many."""
        with self._lock:
            final = (run for run in self.list_runs() if run.is_final and not self._is_baseline(run))
            old = {
                run.id
                for run in final
                if max(run.finished_at or run.created_at, run.imported_at or 0.0) < before_at
            }
            self._drop(*old)
        return len(old)

    # ---- schedules and deliveries ----

    def schedule_records(self) -> list[str]:
        """The schedules as they were kept when the store was opened."""
        return list(self._schedules.values())

    def keep_schedule(self, schedule_id: str, record: str | None) -> None:
        """Keep a schedule's record, None: no longer."""
        self._writer.save_document("schedules", schedule_id, None if record is None else (record,))

    def keep_delivery(self, delivery: Delivery) -> None:
        """Keep a new delivery, or how an old one fares."""
        record = storable_json(list(delivery)).decode()
        with self._lock:
            self._deliveries[delivery.id] = delivery
            if delivery.ended_at is None:
                self._waiting[delivery.id] = delivery
            else:
                self._waiting.pop(delivery.id, None)
            self._writer.save_document("outbox", delivery.id, (delivery.created_at, record))
            if len(self._deliveries) > MAX_DELIVERIES or monotonic_s() - self._forgot_at > 600:
                self._forgot_at = monotonic_s()
                self._forget_deliveries(time.time() - DELIVERIES_KEEP_S)

    def _forget_deliveries(self, before_at: float) -> None:
        """Forget ended ones that are old, or too many: some more than that, to look seldom."""
        ended = [one for one in self._deliveries.values() if one.ended_at is not None]
        over = len(self._deliveries) - MAX_DELIVERIES
        over += MAX_DELIVERIES // 20 if over > 0 else 0
        for index, one in enumerate(ended):
            if index < over or (one.ended_at or 0) < before_at:
                del self._deliveries[one.id]
                self._writer.save_document("outbox", one.id, None)

    def _settle_deliveries(self, ids: set[str]) -> None:
        """What they report is on disk: they may be sent."""
        with self._lock:
            self._unsettled -= ids
        if self.deliveries_ready:
            self.deliveries_ready()

    def waiting_deliveries(self, channel_id: str | None = None) -> list[Delivery]:
        """Those of a channel, or of all, that are to be sent."""
        with self._lock:
            return [
                one
                for one in self._waiting.values()
                if channel_id in (None, one.channel_id) and one.id not in self._unsettled
            ]

    def list_deliveries(self, most: int) -> list[Delivery]:
        """The newest first."""
        with self._lock:
            return list(reversed(self._deliveries.values()))[:most]

    # ---- load whose run is over ----

    def keep_cleanup(self, run_id: str, cluster_id: str) -> None:
        """Keep that load of an ended run may still be running on a cluster, also when the run is
        deleted before that load was stopped."""
        with self._lock:
            self._cleanups[run_id] = cluster_id
            self._writer.save_document("cleanups", run_id, (cluster_id,))

    def drop_cleanup(self, run_id: str) -> None:
        """Forget it: the run's load is stopped."""
        with self._lock:
            if self._cleanups.pop(run_id, None) is not None:
                self._writer.save_document("cleanups", run_id, None)

    def cleanups(self) -> dict[str, str]:
        """The cluster of each ended run whose load may still be running there."""
        with self._lock:
            return dict(self._cleanups)

    # ---- baselines ----

    def find_baseline(self, place: tuple[str, str, str]) -> Baseline | None:
        """The baseline of a tenant, environment and scenario, or None."""
        return self._baselines.get(place)

    def set_baseline(self, baseline: Baseline) -> None:
        """Name a run as baseline; NotFound when it is gone meanwhile."""
        with self._lock:
            self._record(baseline.run_id)
            self._baselines[baseline.place] = baseline
            self._writer.save_baseline(baseline.place, baseline)
        self._writer.wait_durable()

    def drop_baseline(self, place: tuple[str, str, str]) -> None:
        """Have no baseline there; NotFound when there is none."""
        with self._lock:
            if self._baselines.pop(place, None) is None:
                raise NotFound("there is no baseline of " + "/".join(place))
            self._writer.save_baseline(place, None)
        self._writer.wait_durable()

    def _is_baseline(self, run: Run) -> bool:
        baseline = self._baselines.get((run.tenant_id, run.env_id, run.scenario_id))
        return baseline is not None and baseline.run_id == run.id

    def previous_run(self, run: Run) -> Run | None:
        """The newest Finished run before this one of the same tenant, environment and scenario."""
        place = (run.tenant_id, run.env_id, run.scenario_id)
        for other in self.list_runs():
            same = (other.tenant_id, other.env_id, other.scenario_id) == place
            if same and other.seq < run.seq and other.status is RunStatus.FINISHED:
                return other
        return None

    def comparable_runs(self, run: Run, limit: int) -> list[Run]:
        """The newest Finished runs before this one that asked for the same load of the same cluster with
        the same locustfile, reliable and without a regression, oldest first. A baseline that was named
        begins anew: what was before it is another system."""
        baseline = self.find_baseline((run.tenant_id, run.env_id, run.scenario_id))
        begin = self.find(baseline.run_id) if baseline else None
        first = begin.seq if begin is not None and begin.seq < run.seq else 0
        found = []
        for other in self.list_runs():
            if first <= other.seq < run.seq and is_comparable(other, run):
                found.append(other)
                if len(found) == limit:
                    break
        return found[::-1]

    # ---- audit ----

    def audit(self, entry: AuditEntry) -> None:
        """Append an entry; it is on disk within half a second."""
        with self._lock:
            self._writer.add_audit(self._next_audit_seq, entry)
            self._next_audit_seq += 1

    def audit_entries(self, wanted: AuditFilter, scope: Scope, limit: int) -> list[tuple[int, AuditEntry]]:
        """Up to `limit` entries with their numbers, newest first; NotReady when they cannot be read."""
        condition, values = wanted.where(scope)
        columns = ", ".join(("seq", *AuditEntry._fields))
        rows = self._writer.read(
            lambda database: database.query(
                f"SELECT {columns} FROM audit WHERE {condition} ORDER BY seq DESC LIMIT {int(limit)}",
                tuple(values),
            )
        )
        return [(row[0], AuditEntry(*row[1:])) for row in rows]

    def wait_durable(self) -> None:
        """Return when all that was kept before is on disk; NotReady when it cannot be."""
        self._writer.wait_durable()

    def wait_durable_or_log(self) -> None:
        try:
            self._writer.wait_durable()
        except NotReady as error:
            log("change not yet on disk", why=error.message)

    def close(self) -> None:
        self._writer.close()

    def _record(self, run_id: str) -> StoredRun:
        record = self._records.get(run_id)
        if record is None:
            raise NotFound(f"there is no run {run_id[:MAX_TEXT]}")
        return record

    def _shown_record(self, run_id: str) -> StoredRun:
        record = self._record(run_id)
        if record.shown is None:
            raise NotFound(f"there is no run {run_id[:MAX_TEXT]}")
        return record

    def _save(self, record: StoredRun, run: Run) -> Run:
        if run.cleanup and not record.run.cleanup:
            self.keep_cleanup(run.id, run.cluster_id)
        elif record.run.cleanup and not run.cleanup:
            self.drop_cleanup(run.id)
        with self._writer.one_commit():
            record.change(run)
            self._writer.save(record.state())
            if run.is_final:
                self._writer.when_durable(functools.partial(self._show, record, run))
        if not run.is_final:
            self._tell(run)
        return run

    def _show(self, record: StoredRun, run: Run) -> None:
        """Readers see `run`, which is on disk."""
        with self._lock:
            if self._records.get(run.id) is record:
                record.show(run)
                self._tell(run)

    def _drop(self, *run_ids: str) -> None:
        with self._lock:
            gone = set(run_ids)
            self._keys = {key: known for key, known in self._keys.items() if known[1] not in gone}
            for run_id in run_ids:
                record = self._records.pop(run_id, None)
                self._writer.forget(run_id)
                if record:
                    self._tell(record.run)  # who then does not find the run knows that it is gone

    def _tell(self, run: Run) -> None:
        for listener in self.listeners:
            listener(run)


class Comparer:
    """Compares stored runs. What a final run is compared by is made once, and kept beside it."""

    MAX_KEPT = 500  # runs whose figures stay in memory

    def __init__(self, store: Store):
        self._store = store
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, RunFigures] = OrderedDict()

    def compared(self, run: Run, document: dict[str, Any] | None = None) -> ComparedRun:
        """A run with its figures. document: its JSON when that is not what the store has yet."""
        if document is not None or not run.is_final:
            document = document or json.loads(self._store.wire(run.id))
            return ComparedRun(document, self._made(document))
        document = json.loads(self._store.wire(run.id))
        with self._lock:
            figures = self._kept.get(run.id)
        if figures is None:
            figures = self._read(run.id)
            if figures is None:
                figures = self._made(document)
                self._store.keep_artefact(run.id, RUN_FIGURES, run_figures_to_record(figures))
        with self._lock:
            self._kept[run.id] = figures
            self._kept.move_to_end(run.id)
            while len(self._kept) > self.MAX_KEPT:
                self._kept.popitem(last=False)
        return ComparedRun(document, figures)

    def _read(self, run_id: str) -> RunFigures | None:
        try:
            record = self._store.artefact(run_id, RUN_FIGURES)
            return None if record is None else run_figures_from_record(record)
        except NotReady as error:
            log("figures of a run not read", run=run_id, why=error.message)
            return None

    def _made(self, document: dict[str, Any]) -> RunFigures:
        requests = (document.get("lastMetrics") or {}).get("totalRequests")
        try:
            return run_figures(document, self._store.time_blocks(document["id"], requests))
        except NotReady as error:
            log("histograms not read for a comparison", run=document["id"], why=error.message)
            return run_figures(document, None)

    def history(self, run: Run, limit: int = HISTORY_RUNS) -> list[ComparedRun]:
        """The comparable runs before a run, with their figures, oldest first."""
        return [self.compared(other) for other in self._store.comparable_runs(run, limit)]

    def against(
        self, reference: list[Run], candidate: Run, tolerances: dict[str, Tolerance] | None = None,
        document: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A run against one run, with the scatter of its comparable ones, or against several."""
        compared = [self.compared(run) for run in reference]
        scatter = compared
        if len(reference) == 1:
            known = self._store.comparable_runs(candidate, HISTORY_RUNS)
            kin = [run for run in known if is_comparable(run, reference[0])]
            scatter = [self.compared(run) for run in kin] or compared
        return compare_runs(compared, self.compared(candidate, document), tolerances, scatter)

    def judgement(self, run: Run, document: dict[str, Any]) -> dict[str, Any]:
        """What a run keeps of the comparison that it asked for. document: its JSON as it will be final."""
        asked = run.compare_with or ""
        reference = self._reference(run, asked)
        if not reference:
            words = {"baseline": "baseline", "previous": "earlier finished run"}
            why = (
                f"there is no {words[asked]}"
                if asked in words
                else f"not enough runs to tell: 0 of {ENOUGH_RUNS}"
            )
            return no_comparison(asked, f"not compared: {why}")
        return comparison_summary(asked, self.against(reference, run, document=document))

    def _reference(self, run: Run, asked: str) -> list[Run]:
        if asked == "history":
            return self._store.comparable_runs(run, HISTORY_RUNS)
        if asked == "previous":
            found = self._store.previous_run(run)
        else:
            baseline = self._store.find_baseline((run.tenant_id, run.env_id, run.scenario_id))
            found = self._store.find(baseline.run_id) if baseline else None
        return [found] if found else []


# ============================================================================
# 9. LOCUST CLIENT - every call to a Locust master
# ============================================================================
# Locust's field names end here; a Reading or Snapshot comes out. Every call is bounded
# in time as a whole (a timer shuts the socket, as timeouts of the library count for each
# recv only) and in size. No redirect is followed: a token must not travel to other hosts.


HOOKS_PATH = "/loadmanager/state"  # a route that our hooks add to the master's web server
STATS_HEADER = "x-loadmanager-statistics"  # which they add to /stats/requests: its age and exact counts


class StatsTimes:
    """When Locust made the statistics that it answered. It keeps an answer for 2 s, longer when making
    one is slow, and does not say. Safe from any thread; times are monotonic seconds."""

    REPEATS_FOR_S = 16.0  # then what is the same was made again: an idle Locust has nothing new

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: object = None  # which one it was
        self._first_at = -math.inf  # when that one came first
        self._made_after = -math.inf
        self._asked_at = -math.inf

    def note(self, answer: object, asked_at: float, answered_at: float) -> tuple[float, float, bool]:
        """When an answer was made, how long before that it may have been, and whether it came before."""
        with self._lock:
            if answer == self._answer and asked_at - self._first_at < self.REPEATS_FOR_S:
                self._asked_at = max(self._asked_at, asked_at)
                return self._first_at, self._first_at - self._made_after, True
            # It is new since the last call, and the one before was kept for its time.
            least = max(asked_at - STATS_CACHE_S, self._asked_at, self._made_after + STATS_CACHE_S)
            self._answer, self._first_at, self._asked_at = answer, answered_at, asked_at
            self._made_after = min(least, answered_at)
            return answered_at, answered_at - self._made_after, False


class LocustClient:
    """Speaks to one Locust master (2.0 to 2.47). Safe from any thread."""

    HOOKS_ABSENT_S = 30.0  # how long a 404 of the hooks' route is believed

    def __init__(self, config: ClusterConfig, callback_token: str, folder: str, timer: Timer):
        self.config = config
        self._callback_token = callback_token
        self._folder = folder
        self._timer = timer
        self._lock = threading.Lock()  # guards what follows
        self._idle_connections: list[http.client.HTTPConnection] = []
        self._addresses: tuple[str, float] | None = None
        self._cookie = ""
        self._stop_method = "POST"  # since 2.47.0; GET before
        self._version: tuple[int, ...] | None = None
        self._hooks_absent_until = 0.0
        self._stats_times = StatsTimes()
        self.base_url = config.base_url or ""

    def moved_to(self, base_url: str) -> None:
        """A launched cluster has a new address: nothing known of the old one holds."""
        with self._lock:
            self.base_url = base_url
            self._idle_connections.clear()
            self._version, self._hooks_absent_until = None, 0.0
            self._stats_times = StatsTimes()

    # ---- what a master can be asked ----------------------------------------

    def read_state(self, timeout_s: float = LOCUST_CALL_S) -> Reading:
        """The state of now from the hooks' route, else the cached one of the statistics."""
        if monotonic_s() >= self._hooks_absent_until:
            reading = self._read_hooks(timeout_s)
            if reading is not None:
                return reading
            self._hooks_absent_until = monotonic_s() + self.HOOKS_ABSENT_S
        return self.read_stats(timeout_s)

    def read_stats(self, timeout_s: float = LOCUST_CALL_S) -> Reading:
        """State and numbers from /stats/requests, up to STATS_CACHE_S old."""
        asked_at = monotonic_s()
        status, headers, body = self._call("GET", "/stats/requests", None, timeout_s)
        document = self._decoded("/stats/requests", status, headers, body)
        if not isinstance(document.get("state"), str) or not isinstance(document.get("stats"), list):
            raise LocustBadAnswer(
                f"{self._where('/stats/requests')} has no state and stats: is it a Locust master?"
            )
        with self._parsing("/stats/requests"):
            return self._dated(_reading_of_stats(document, time.time()), headers, body, asked_at)

    def _dated(self, reading: Reading, headers: dict[str, str], body: bytes, asked_at: float) -> Reading:
        """The reading with the time at which Locust made it, from the hooks or as far as it can be told."""
        assert reading.snapshot is not None
        answered_at = monotonic_s()
        told = _told_by_hooks(headers.get(STATS_HEADER, ""))
        age_s = measure_or_none(told.get("age"))
        if age_s is None:
            answer: object = hashlib.sha256(body).digest()
            made, uncertainty_s, is_repeat = self._stats_times.note(answer, asked_at, answered_at)
        else:
            *_, is_repeat = self._stats_times.note(told.get("madeAt"), asked_at, answered_at)
            made, uncertainty_s = answered_at - age_s, answered_at - asked_at
        made_at = time.time() - (monotonic_s() - made)
        snapshot = with_counts(reading.snapshot._replace(taken_at=made_at), told)
        return replace(
            reading,
            snapshot=snapshot,
            made_at=made_at,
            uncertainty_s=uncertainty_s,
            is_cached_repeat=is_repeat,
        )

    def read_final(self, timeout_s: float = LOCUST_CALL_S) -> Snapshot:
        """The whole test's numbers as Locust's own CSV has them: not cached, not cut."""
        status, headers, body = self._call("GET", "/stats/requests/csv", None, timeout_s)
        if status != 200 or "html" in headers.get("content-type", "").lower():
            raise LocustBadAnswer(
                f"{self._where('/stats/requests/csv')} answered HTTP {status} without a CSV report"
            )
        with self._parsing("/stats/requests/csv"):
            return _snapshot_of_csv(body.decode("utf-8", "replace"), time.time())

    def read_failures(self) -> tuple[Failure, ...]:
        """Failed requests by endpoint and error, of now."""
        status, _, body = self._call("GET", "/stats/failures/csv", None, 2.0)
        if status != 200:
            return ()
        with self._parsing("/stats/failures/csv"):
            return _most_frequent_failures(map(_failure_of_csv, read_csv(body.decode("utf-8", "replace"))))

    def read_exceptions(self) -> tuple[TaskException, ...]:
        """Exceptions of tasks outside of requests, of now."""
        document = self._json("GET", "/exceptions", timeout_s=2.0)
        with self._parsing("/exceptions"):
            rows = _objects_in(document.get("exceptions"))
            return tuple(map(_exception_of_json, rows[:MAX_LOCUST_FAILURES]))

    def read_report(self) -> bytes:
        """Locust's own HTML report, about 1 MB."""
        status, headers, body = self._call("GET", "/stats/report", None, 3.0)
        if status != 200 or b"<html" not in body[:2000]:
            raise LocustBadAnswer(f"{self._where('/stats/report')} answered HTTP {status} without a report")
        return body

    def swarm(self, form: dict[str, Any]) -> None:
        """Start a test, or change the users of a running one; LocustRefused with its words."""
        answer = self._json("POST", "/swarm", form)
        if answer.get("success") is not True:
            raise LocustRefused(f"Locust refused: {_printable(answer.get('message') or answer)}")

    def read_logs(self, lines: int) -> list[dict[str, Any]]:
        """The last lines of master and workers (2.20 and newer); LocustRefused when it has none."""
        status, _, body = self._call("GET", "/logs", None, 5.0)
        try:
            with self._parsing("/logs"):
                return _logs_of_json(json.loads(body), lines) if status == 200 else []
        except LocustBadAnswer:
            raise LocustRefused(
                f"{self._where('/logs')} answered HTTP {status}, and no logs: this Locust does not tell them"
            ) from None

    def read_abilities(self) -> Abilities | None:
        """What it can run, as its page says: for a Locust without our hooks. None: the page does not tell."""
        _, _, page = self._call("GET", "/", None, 3.0)
        text = page.decode("utf-8", "replace")
        with self._parsing("/"):
            classes = _json_in_page(text, "available_user_classes")
            options = _json_in_page(text, "extra_options")
            if not isinstance(classes, list) and not isinstance(options, dict):
                return None
            can_choose = re.search(r'"show_userclass_picker":\s*true', text) is not None
            return Abilities(
                _choices(classes) if isinstance(classes, list) else None,
                can_choose,
                _choices(options) if isinstance(options, dict) else None,
            )

    def stop(self) -> None:
        """Stop the test; returns when Locust says that users are gone."""
        for _ in range(2):
            status, headers, body = self._call(self._stop_method, "/stop", {}, LOCUST_STOP_S)
            # 2.20 wraps its own 405 in a 500.
            if status != 405 and not (status == 500 and body[:3] == b"405"):
                break
            self._stop_method = "GET" if self._stop_method == "POST" else "POST"
        answer = self._decoded("/stop", status, headers, body)
        if answer.get("success") is not True:
            raise LocustRefused(f"Locust refused to stop: {_printable(answer.get('message') or answer)}")

    def version(self) -> tuple[int, ...]:
        """(2, 47, 0); () when it cannot be found out. There is no API for it before the hooks: the page tells."""
        if self._version is None:
            try:
                _, _, body = self._call("GET", "/", None, 3.0)
            except LocustError:
                return ()
            match = re.search(rb'version[\\"&#;34:\s]{1,20}(\d+(?:\.\d+)+)', body)
            self._version = _version_numbers(match.group(1).decode()) if match else ()
        return self._version

    # ---- how it is asked ---------------------------------------------------

    def _read_hooks(self, timeout_s: float) -> Reading | None:
        status, headers, body = self._call("GET", HOOKS_PATH, None, timeout_s)
        if status != 200 or "json" not in headers.get("content-type", ""):
            return None
        try:
            with self._parsing(HOOKS_PATH):
                reading = _reading_of_hooks(json.loads(body))
        except LocustBadAnswer:
            return None
        self._version = _version_numbers(reading.version)
        return reading

    def _json(
        self, method: str, path: str, form: dict[str, Any] | None = None, timeout_s: float = LOCUST_CALL_S
    ) -> dict[str, Any]:
        status, headers, body = self._call(method, path, form, timeout_s)
        return self._decoded(path, status, headers, body)

    def _decoded(self, path: str, status: int, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        where = self._where(path)
        if status != 200:
            words = _printable(body[:120].decode("utf-8", "replace").strip())
            raise LocustBadAnswer(f"{where} answered HTTP {status}: {words}")
        if "html" in headers.get("content-type", "").lower() or body[:1] == b"<":
            raise LocustBadAnswer(f"{where} answered HTML: does it want authentication, or is it not Locust?")
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise LocustBadAnswer(f"{where} answered what is not JSON") from None
        if not isinstance(document, dict):
            raise LocustBadAnswer(f"{where} answered JSON that is not an object")
        return document

    def _where(self, path: str) -> str:
        return f"Locust at {self.base_url}{path}"

    @contextlib.contextmanager
    def _parsing(self, path: str) -> Iterator[None]:
        """The one edge around reading what a Locust sent: whatever goes wrong is its invalid answer, for
        which every caller is ready, and no exception that would end a thread."""
        try:
            yield
        except LocustError:
            raise
        except Exception as error:
            what = type(error).__name__
            raise LocustBadAnswer(f"{self._where(path)} sent what cannot be read ({what})") from None

    def _call(
        self, method: str, path: str, form: dict[str, Any] | None, timeout_s: float
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; signs in once when Locust asks for it."""
        status, headers, body = self._send(method, path, form, timeout_s)
        if 300 <= status < 400:
            location = headers.get("location", "")
            wants_login = _url_path(location).rstrip("/").endswith("/login")
            if wants_login and self.config.username:
                self._sign_in(timeout_s)
                status, headers, body = self._send(method, path, form, timeout_s)
            if 300 <= status < 400:
                hint = (
                    "it asks for a sign-in: set username and password of the cluster"
                    if wants_login
                    else "redirects are not followed"
                )
                raise LocustRefused(f"{self._where(path)} redirects to {_printable(location)}; {hint}")
        return status, headers, body

    def _sign_in(self, timeout_s: float) -> None:
        """Log in as a browser would: the login page names the form's address."""
        _, _, page = self._send("GET", "/login", None, timeout_s)
        match = re.search(rb'username_?[pP]assword_?[cC]allback[\\"&#;34:\s]{1,20}(/[A-Za-z0-9_./\-]*)', page)
        target = match.group(1).decode() if match else "/login_submit"
        base_path = urlsplit(self.base_url).path
        target = target.removeprefix(base_path) if base_path else target
        form = {"username": self.config.username, "password": self.config.password}
        status, headers, _ = self._send("POST", target, form, timeout_s)
        cookie = headers.get("set-cookie", "").split(";")[0]
        if not cookie or status >= 400 or _url_path(headers.get("location", "")).endswith("/login"):
            raise LocustRefused(
                f"{self._where(target)} did not accept the username and password of the cluster"
            )
        self._cookie = cookie

    def _send(
        self, method: str, path: str, form: dict[str, Any] | None, timeout_s: float
    ) -> tuple[int, dict[str, str], bytes]:
        """One exchange on a kept or new connection, bounded as a whole by `timeout_s`."""
        expired = threading.Event()
        connection = self._kept_connection()
        sent = False
        holder: list[http.client.HTTPConnection] = [connection] if connection else []

        def expire() -> None:
            expired.set()
            for held in holder:
                _shut(held.sock)

        alarm = self._timer.after(timeout_s, expire)
        try:
            if connection is None:
                connection = self._new_connection(timeout_s)
                holder.append(connection)
                connection.connect()
            if expired.is_set():
                raise TimeoutError
            body = urlencode(form, doseq=True) if form is not None and method == "POST" else None
            sent = True
            connection.request(
                method, (urlsplit(self.base_url).path or "") + path, body, self._headers(path, body)
            )
            response = connection.getresponse()
            raw = response.read(LOCUST_ANSWER_BYTES + 1)
            if expired.is_set():
                raise TimeoutError
            if len(raw) > LOCUST_ANSWER_BYTES:
                raise LocustBadAnswer(
                    f"{self._where(path)} answered more than {LOCUST_ANSWER_BYTES >> 20} MiB"
                )
            headers = {name.lower(): value for name, value in response.getheaders()}
            if response.isclosed() and not response.will_close:
                self._keep(connection)
                connection = None
            return response.status, headers, raw
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._explained(error, path, expired.is_set(), sent, timeout_s) from None
        finally:
            alarm.cancel()
            if connection is not None:
                connection.close()

    def _explained(
        self, error: Exception, path: str, expired: bool, sent: bool, timeout_s: float
    ) -> LocustError:
        """What a network error means to the person who reads it."""
        where = self._where(path)
        if isinstance(error, LocustError):
            return error
        if expired or isinstance(error, TimeoutError):
            failure: LocustError = LocustTimeout(f"{where} did not answer within {timeout_s:g} s")
        else:
            failure = LocustUnreachable(f"{where}: {_network_words(error)}")
        failure.maybe_taken = sent
        return failure

    def _headers(self, path: str, body: str | None) -> dict[str, str]:
        headers = {"Accept": "application/json", "Connection": "keep-alive"}
        if path == HOOKS_PATH and self._callback_token:
            headers["X-Locust-Token"] = self._callback_token  # renews the lease of the test
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        if self.config.auth_token:
            headers["Authorization"] = f"Bearer {self.config.auth_token}"
        if self._cookie:
            headers["Cookie"] = self._cookie
        return headers

    def _kept_connection(self) -> http.client.HTTPConnection | None:
        """A connection that Locust has not closed meanwhile, or None."""
        while True:
            with self._lock:
                if not self._idle_connections:
                    return None
                connection = self._idle_connections.pop()
            if connection.sock is not None and not _readable(connection.sock):
                return connection
            connection.close()

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle_connections) < 4 and connection.host in self.base_url:
                self._idle_connections.append(connection)
                return
        connection.close()

    def _new_connection(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.base_url)
        if not parts.hostname:
            raise OSError("the cluster is not up yet")
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=self._tls_context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        connection._create_connection = self._connect  # the library's own seam; bounds name look-ups
        return connection

    @functools.cached_property
    def _tls_context(self) -> Any:
        import ssl

        tls = self.config.tls
        context = ssl.create_default_context(cafile=tls.ca_file and os.path.join(self._folder, tls.ca_file))
        if tls.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _connect(self, address: tuple[str, int], timeout: float, source: Any = None) -> socket.socket:
        return socket.create_connection((self._address(address[0], timeout), address[1]), timeout, source)

    def _address(self, host: str, timeout_s: float) -> str:
        """The host's address. getaddrinfo knows no time limit, so a name is looked up in a
        thread that may be left behind; an answer is believed for a minute."""
        if re.fullmatch(r"[0-9.]+|.*:.*", host):
            return host
        with self._lock:
            if self._addresses and self._addresses[1] > monotonic_s():
                return self._addresses[0]
        found: list[Any] = []

        def look_up() -> None:
            try:
                found.append(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
            except OSError as error:
                found.append(error)

        try:
            start_thread("dns", look_up).join(min(timeout_s, 5.0))
        except NotReady as error:
            raise OSError(error.message) from None
        if not found:
            raise OSError(f"the name {host} could not be looked up within {min(timeout_s, 5.0):g} s")
        if isinstance(found[0], OSError):
            raise OSError(f"the name {host} is not known ({found[0].strerror})")
        with self._lock:
            self._addresses = (found[0], monotonic_s() + 60)
        return found[0]


def _url_path(url: str) -> str:
    """The path of a URL that another program wrote; "" when it is none."""
    try:
        return urlsplit(url).path
    except ValueError:
        return ""


def _shut(sock: socket.socket | None) -> None:
    """End whatever waits on the socket, in whichever thread."""
    try:
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _readable(sock: socket.socket) -> bool:
    """On an idle connection: the other side closed it (or sent what nobody asked for)."""
    import select

    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return True


def _network_words(error: Exception) -> str:
    name = type(error).__name__
    if name == "SSLCertVerificationError":
        return f"its certificate is not trusted: {getattr(error, 'verify_message', error)}"
    if name.startswith("SSL"):
        reason = str(getattr(error, "reason", "") or error)
        plain = "WRONG_VERSION_NUMBER" in reason or "HTTP_REQUEST" in reason or "RECORD_LAYER" in reason
        return "it speaks plain HTTP, not https" if plain else f"TLS failed: {reason}"
    if isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
        return "closed the connection without an answer"
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection: is the master running?"
    if isinstance(error, http.client.HTTPException):
        return f"answered what is not HTTP ({name})"
    return str(getattr(error, "strerror", None) or error) or name


def _version_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", text)[:3])


def _whole(value: Any) -> int:
    return count_or_none(value) or 0


def _objects_in(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; what else is in it, and what is no list, is left out."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


csv.field_size_limit(LOCUST_ANSWER_BYTES)  # 128 KiB before; an answer as a whole is bounded


def read_csv(text: str) -> list[dict[str, Any]]:
    """The rows of a CSV report by column. A bare CR or NUL, which the csv module refuses, becomes a space."""
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error:
        plain = re.sub(r"\r(?!\n)|\0", " ", text)
    try:
        return list(csv.DictReader(io.StringIO(plain)))
    except csv.Error as error:
        raise LocustBadAnswer(f"Locust's CSV report cannot be read: {error}") from None


def _told_by_hooks(header: str) -> dict[str, Any]:
    """What the hooks say of the statistics in a header; empty without it."""
    try:
        told = json.loads(header) if header else {}
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _reading_of_stats(document: dict[str, Any], now: float) -> Reading:
    snapshot = _snapshot_of_stats(document, now)
    return Reading(
        state=storable_text(document["state"], MAX_TEXT),
        users=_whole(document.get("user_count")),
        distributed=isinstance(document.get("workers"), list),
        workers=_workers_of_json(document.get("workers"), "user_count", "cpu_usage"),
        requests=snapshot.requests or 0,
        cached=True,
        snapshot=snapshot,
        failures=_most_frequent_failures(map(_failure_of_stats, _objects_in(document.get("errors")))),
    )


def _workers_of_json(workers: Any, users_key: str, cpu_key: str) -> tuple[Worker, ...]:
    return tuple(
        Worker(
            storable_text(entry.get("id"), MAX_TEXT),
            storable_text(entry.get("state"), MAX_TEXT),
            _whole(entry.get(users_key)),
            measure_or_none(entry.get(cpu_key)),
        )
        for entry in _objects_in(workers)[:MAX_LOCUST_WORKERS]
    )


def _most_frequent_failures(failures: Iterable[Failure]) -> tuple[Failure, ...]:
    """All of them, in Locust's order, or the MAX_LOCUST_FAILURES that occurred most often."""
    found = tuple(failures)
    if len(found) <= MAX_LOCUST_FAILURES:
        return found
    return tuple(sorted(found, key=lambda failure: -failure.occurrences)[:MAX_LOCUST_FAILURES])


def _failure_of_stats(row: dict[str, Any]) -> Failure:
    return Failure(
        storable_text(row.get("method")),
        storable_text(row.get("name")),
        storable_text(row.get("error"), MAX_LOCUST_ERROR),
        _whole(row.get("occurrences")),
        timestamp_or_none(row.get("first_seen")),
        timestamp_or_none(row.get("last_seen")),
    )


def _failure_of_csv(row: dict[str, Any]) -> Failure:
    return Failure(
        storable_text(row.get("Method")),
        storable_text(row.get("Name")),
        storable_text(row.get("Error"), MAX_LOCUST_ERROR),
        _csv_count(row.get("Occurrences")),
        _csv_timestamp(row.get("First Seen")),
        _csv_timestamp(row.get("Last Seen")),
    )


def _exception_of_json(row: dict[str, Any]) -> TaskException:
    return TaskException(
        _whole(row.get("count")),
        storable_text(row.get("msg"), MAX_LOCUST_ERROR),
        storable_text(row.get("traceback"), MAX_TRACEBACK),
        storable_text(row.get("nodes")),
    )


def _logs_of_json(document: Any, lines: int) -> list[dict[str, Any]]:
    """The last lines of the master's log and of each worker's."""
    processes = [("master", document["master"]), *document["workers"].items()]
    return [
        {
            "process": storable_text(name, MAX_TEXT),
            "lines": [storable_text(line, MAX_LOCUST_ERROR) for line in entries[-lines:]],
        }
        for name, entries in processes[:MAX_LOCUST_WORKERS]
        if isinstance(entries, list)
    ]


def _csv_timestamp(text: Any) -> float | None:
    try:
        return timestamp_or_none(
            parse_utc(text if not isinstance(text, str) or text[-1:] in "Zz" or "+" in text else text + "Z")
        )
    except (ValueError, OverflowError):
        return None


def _snapshot_of_stats(document: dict[str, Any], now: float) -> Snapshot:
    rows = _objects_in(document["stats"])
    # The total is the last row: a user's own endpoint may carry the name "Aggregated" too.
    total = rows.pop() if rows and rows[-1].get("name") in ("Aggregated", "Total") else {}
    requests, failures = count_or_none(total.get("num_requests")), count_or_none(total.get("num_failures"))
    window = document.get("current_response_time_percentiles")
    window = window if isinstance(window, dict) else {}
    current = document.get(
        "current_rps", document.get("total_rps")
    )  # total_rps is the current one before 2.46
    return Snapshot(
        taken_at=now,
        rps=measure_or_none(current),
        requests=requests,
        failures=failures,
        error_percent=_error_percent(requests, failures),
        avg_ms=measure_or_none(total.get("avg_response_time")) if requests else None,
        p50_ms=measure_or_none(total.get("median_response_time")) if requests else None,
        p95_ms=_percentile(total, "0.95") if requests else None,
        p99_ms=_percentile(total, "0.99") if requests else None,
        users=count_or_none(document.get("user_count")),
        endpoints=tuple(map(_endpoint_of_stats, rows[:MAX_LOCUST_ENDPOINTS])),
        fails_per_s=measure_or_none(
            document.get(
                "current_fail_per_sec", document.get("fail_per_sec", total.get("current_fail_per_sec"))
            )
        ),
        window_p50_ms=measure_or_none(window.get("response_time_percentile_0.5")),
        window_p95_ms=measure_or_none(window.get("response_time_percentile_0.95")),
    )


def _error_percent(requests: int | None, failures: int | None) -> float | None:
    if not requests or failures is None:
        return None if requests is None else 0.0
    return min(100.0, 100.0 * failures / requests)


def _percentile(row: dict[str, Any], which: str) -> float | None:
    older = {"0.95": "ninety_fifth_response_time", "0.99": "ninety_ninth_response_time"}[which]
    return measure_or_none(row.get(f"response_time_percentile_{which}", row.get(older)))


def _endpoint_of_stats(row: dict[str, Any]) -> EndpointStats:
    requests = _whole(row.get("num_requests"))
    per_s = measure_or_none(row.get("current_rps", row.get("total_rps")))
    return EndpointStats(
        method=storable_text(row.get("method")),
        name=storable_text(row.get("name")),
        requests=requests,
        failures=_whole(row.get("num_failures")),
        avg_ms=measure_or_none(row.get("avg_response_time")) if requests else None,
        min_ms=measure_or_none(row.get("min_response_time")) if requests else None,
        max_ms=measure_or_none(row.get("max_response_time")) if requests else None,
        p50_ms=measure_or_none(row.get("median_response_time")) if requests else None,
        p95_ms=_percentile(row, "0.95") if requests else None,
        p99_ms=_percentile(row, "0.99") if requests else None,
        per_s=per_s,
    )


def _snapshot_of_csv(text: str, now: float) -> Snapshot:
    """The final snapshot from Locust's CSV report; LocustBadAnswer when it is not one."""
    rows = read_csv(text)
    if not rows or rows[-1].get("Name") != "Aggregated":
        raise LocustBadAnswer("Locust's CSV report has no row Aggregated")
    *endpoints, total = (_endpoint_of_csv(row) for row in rows)
    if len(endpoints) > MAX_LOCUST_ENDPOINTS:
        endpoints = sorted(endpoints, key=lambda row: -(row.requests or 0))[:MAX_LOCUST_ENDPOINTS]
    return Snapshot(
        taken_at=now,
        rps=total.per_s,
        requests=total.requests,
        failures=total.failures,
        error_percent=_error_percent(total.requests, total.failures),
        avg_ms=total.avg_ms,
        p50_ms=_csv_number(rows[-1].get("50%")) if total.requests else None,
        p95_ms=total.p95_ms,
        p99_ms=total.p99_ms,
        users=0,
        endpoints=tuple(endpoints),
        fails_per_s=_csv_number(rows[-1].get("Failures/s")),
    )


def _endpoint_of_csv(row: dict[str, Any]) -> EndpointStats:
    requests = _csv_count(row.get("Request Count"))

    def measured(column: str) -> float | None:
        return _csv_number(row.get(column)) if requests else None

    return EndpointStats(
        method=storable_text(row.get("Type")),
        name=storable_text(row.get("Name")),
        requests=requests,
        failures=_csv_count(row.get("Failure Count")),
        avg_ms=measured("Average Response Time"),
        min_ms=measured("Min Response Time"),
        max_ms=measured("Max Response Time"),
        p50_ms=measured("Median Response Time"),
        p95_ms=measured("95%"),
        p99_ms=measured("99%"),
        per_s=_csv_number(row.get("Requests/s")),
    )


def _csv_number(text: Any) -> float | None:
    """A CSV cell's number; None for N/A."""
    try:
        return measure_or_none(float(text))
    except (TypeError, ValueError, OverflowError):
        return None


def _csv_count(text: Any) -> int:
    """A CSV cell's whole number; 0 for what is none."""
    return _whole(_csv_number(text))


def _reading_of_hooks(document: dict[str, Any]) -> Reading:
    sha256 = document.get("locustfileSha256")
    return Reading(
        state=storable_text(document["state"], MAX_TEXT),
        users=_whole(document.get("userCount")),
        distributed=bool(document.get("distributed")),
        workers=_workers_of_json(document.get("workers"), "userCount", "cpuPercent"),
        requests=_whole(document.get("numRequests")),
        cached=False,
        hooks=bool(document["hooks"]),
        run_id=storable_text(document.get("runId"), MAX_TEXT),
        last_run_id=storable_text(document.get("lastRunId"), MAX_TEXT),
        boot_id=storable_text(document.get("bootId"), MAX_TEXT),
        locustfile_sha256=storable_text(sha256, MAX_TEXT)[:64] if sha256 else None,
        version=storable_text(document.get("locustVersion"), MAX_TEXT),
        target_users=count_or_none(document.get("targetUserCount")),
        test_started_at=timestamp_or_none(document.get("testStartedAt")),
        callbacks=bool(document.get("callbacks")),
        flush=bool(document.get("flush")),
        host=storable_text(document["host"]) if isinstance(document.get("host"), str) else None,
        abilities=_abilities_of_hooks(document),
        made_at=time.time(),
        resets=count_or_none(document.get("statsResets")),
    )


def _abilities_of_hooks(document: dict[str, Any]) -> Abilities | None:
    classes, options, tags = (document.get(name) for name in ("availableUserClasses", "options", "tags"))
    if not isinstance(classes, list) or not isinstance(options, list) or not isinstance(tags, list):
        return None  # hooks of an earlier version
    return Abilities(_choices(classes), bool(document.get("classPicker")), _choices(options), _choices(tags))


def _choices(names: Iterable[Any]) -> tuple[str, ...]:
    """Names of what a Locust can be asked to run."""
    return tuple(storable_text(name, MAX_TEXT) for name in itertools.islice(names, MAX_LOCUST_CHOICES))


def _json_in_page(page: str, name: str) -> Any:
    """A value of window.templateArgs in Locust's page (2.47.0); None when it is not there."""
    match = re.search(rf'"{name}":\s*', page)
    try:
        return json.JSONDecoder().raw_decode(page, match.end())[0] if match else None
    except (ValueError, RecursionError):
        return None


# ============================================================================
# 10. LAUNCHER - Locust clusters started on this machine, and their guard
# ============================================================================
# Each launched cluster has a guard: a small process of ours that starts the master and
# workers as its children and restarts what dies. Load Manager holds the guard's standard
# input; when that closes, be it by kill -9, the guard ends its children and itself. The
# children in turn die with the guard (Linux), so no orphan is left by any death.

GUARD_COMMAND = "guard-cluster"
GUARD_WORDS = "guard: "  # begins what the guard writes into a log
GUARD_ENDED = GUARD_WORDS + "ended"
GUARD_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0, 30.0)


class LaunchedCluster:
    """A Locust master and its workers as processes of this machine."""

    def __init__(self, config: ClusterConfig, folder: str, callback_token: str):
        assert config.launcher is not None
        self.config = config
        self._launcher = config.launcher
        self._folder = folder
        self._callback_token = callback_token
        self._guard: Any = None
        self.base_url = ""
        self.locustfile = ""  # the one it runs
        self.workers = self._launcher.workers  # how many it should have
        self.problem: str | None = None  # why it cannot be started, as a sentence
        self.started_at = -math.inf  # steady seconds

    @property
    def is_running(self) -> bool:
        return self._guard is not None

    @property
    def is_starting(self) -> bool:
        return self.problem is None and monotonic_s() - self.started_at < WORKERS_PATIENCE_S

    def start(self, control_plane_url: str, locustfile: str | None = None) -> None:
        """Start the guard, for the cluster's locustfile or another; `problem` says why when
        that is not possible."""
        import subprocess

        self.locustfile = locustfile or self._launcher.locustfile or ""
        self.problem = self._missing()
        if self.problem:
            log("cluster not launched", cluster=self.config.id, why=self.problem)
            return
        web_port, master_port = _free_port(), _free_port()
        self.base_url = f"http://127.0.0.1:{web_port}"
        self.workers = self._launcher.workers
        os.makedirs(self._log_folder, exist_ok=True)
        plan = {**self._commands(web_port, master_port), "logs": self._log_start, "workers": self.workers}
        self._guard = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), GUARD_COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=self._folder,
            env=self._environment(control_plane_url),
            start_new_session=True,  # Ctrl-C in our terminal is ours to handle
        )
        self._tell_guard(plan)
        self.started_at = monotonic_s()
        log(
            "cluster launched",
            cluster=self.config.id,
            url=self.base_url,
            workers=self.workers,
            logs=self._log_folder,
        )

    def scale(self, workers: int) -> None:
        """Have so many workers from now on; OSError when the guard is gone."""
        self._tell_guard({"workers": workers})
        self.workers = workers

    def _tell_guard(self, document: dict[str, Any]) -> None:
        self._guard.stdin.write(json.dumps(document).encode() + b"\n")
        self._guard.stdin.flush()

    def read_logs(self, lines: int) -> list[dict[str, Any]]:
        """The last lines of each process, the master's first."""
        names = ["master", *(f"worker-{number + 1}" for number in range(self.workers))]
        return [
            {"process": name, "lines": _last_lines(f"{self._log_start}-{name}.log", lines)} for name in names
        ]

    def why_dead(self) -> str | None:
        """What the master said last when it has ended, and where its log is; None while it runs."""
        try:
            lines = _last_lines(f"{self._log_start}-master.log", 50)
        except OSError:
            return None
        if not lines or not lines[-1].startswith(GUARD_ENDED):
            return None
        said = next((line for line in reversed(lines) if not line.startswith(GUARD_WORDS)), "nothing")
        return f"Locust ended, and said last: {_printable(said)}; its log is {self._log_start}-master.log"

    def stop(self, wait_s: float = 3.0) -> None:
        """End all its processes."""
        import subprocess

        if self._guard is None:
            return
        try:
            self._guard.stdin.close()
            self._guard.wait(wait_s)
        except (OSError, subprocess.TimeoutExpired):
            self._guard.kill()  # its children die with it
            self._guard.wait(1)
        self._guard = None

    def _missing(self) -> str | None:
        locustfile = os.path.join(self._folder, self.locustfile)
        if not os.path.isfile(locustfile):
            return f"the locustfile {locustfile} does not exist"
        if self._launcher.python is None and not _locust_is_installed():
            return f"Locust is not installed for {sys.executable}: pip install locust, or set launcher.python to a Python that has it"
        return None

    @property
    def _log_folder(self) -> str:
        return os.path.join(self._folder, "loadmanager-logs")

    @property
    def _log_start(self) -> str:
        """How the names of its log files begin."""
        return os.path.join(self._log_folder, quote(self.config.id, safe=""))

    def _commands(self, web_port: int, master_port: int) -> dict[str, list[str]]:
        python = self._launcher.python or sys.executable
        locust = [python, "-m", "locust", "-f", os.path.join(self._folder, self.locustfile)]
        host = ["--host", self._launcher.host] if self._launcher.host else []
        master = [
            *locust,
            "--master",
            "--master-bind-host",
            "127.0.0.1",
            "--master-bind-port",
            str(master_port),
            "--class-picker",
        ]
        master += ["--web-host", "127.0.0.1", "--web-port", str(web_port), *host]
        return {
            "master": master,
            "worker": [
                *locust,
                "--worker",
                "--master-host",
                "127.0.0.1",
                "--master-port",
                str(master_port),
                *host,
            ],
        }

    def _environment(self, control_plane_url: str) -> dict[str, str]:
        ours = {
            "CONTROL_PLANE_URL": control_plane_url,
            "CONTROL_PLANE_TOKEN": self._callback_token,
            "TENANT_ID": self.config.tenant_id,
            "ENV_ID": self.config.env_id,
            "CLUSTER_ID": self.config.id,
        }
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LOADMANAGER_", "LOCUST_"))
        }
        kept.pop("RUN_ID", None)
        return {**kept, "METRICS_PUSH_INTERVAL": "2", **ours}


def _locust_is_installed() -> bool:
    """A folder named locust/ beside us looks like a package too, but has no origin."""
    import importlib.util

    spec = importlib.util.find_spec("locust")
    return spec is not None and spec.origin is not None


def _last_lines(path: str, count: int) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 400 * count))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def run_command(words: tuple[str, ...], facts: dict[str, object], timeout_s: float) -> str:
    """What a program of the user's prints; LocustUnreachable when it fails or takes longer.
    {name} in a word becomes that fact; no shell reads it."""
    import subprocess

    for name, value in facts.items():
        words = tuple(word.replace(f"{{{name}}}", str(value)) for word in words)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOADMANAGER_")}
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            env=environment,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise LocustUnreachable(f"{words[0]} did not end within {timeout_s:g} s") from None
    except OSError as error:
        raise LocustUnreachable(f"{words[0]} cannot be started: {error.strerror}") from None
    output = done.stdout[:65536].decode("utf-8", "replace")
    if done.returncode:
        said = (done.stderr[-2000:].decode("utf-8", "replace") or output).strip().splitlines()
        raise LocustUnreachable(
            f"{words[0]} ended with status {done.returncode}: {_printable(said[-1]) if said else 'it said nothing'}"
        )
    return output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def guard_cluster() -> int:
    """The guard's main: start the commands of the plan on standard input, restart what
    dies, and end all of it when standard input closes."""
    import select

    stdin = sys.stdin.fileno()
    pending = b""
    while b"\n" not in pending:
        pending += os.read(stdin, 65536) or b"null\n"
    first, _, pending = pending.partition(b"\n")
    plan = json.loads(first)
    if plan is None:
        return 0
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # our end is the end of standard input
    guarded = _GuardedCluster(plan)
    try:
        while True:
            guarded.keep_running()
            ready, _, _ = select.select([stdin], [], [], 0.25)
            received = os.read(stdin, 4096) if ready else b""
            if ready and not received:
                return 0
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                guarded.scale(json.loads(line)["workers"])
    finally:
        guarded.end()


class _GuardedCluster:
    """The guard's children: a master, and workers whose number may change."""

    def __init__(self, plan: dict[str, Any]):
        self._plan = plan
        self._master = _GuardedProcess(plan["master"], f"{plan['logs']}-master.log")
        self._workers: list[_GuardedProcess] = []
        self.scale(plan["workers"])

    def scale(self, workers: int) -> None:
        while len(self._workers) > workers:
            self._workers.pop().end()
        for number in range(len(self._workers), workers):
            self._workers.append(
                _GuardedProcess(self._plan["worker"], f"{self._plan['logs']}-worker-{number + 1}.log")
            )

    def keep_running(self) -> None:
        restarted = self._master.keep_running()
        for worker in self._workers:
            if restarted:
                worker.end()  # Locust workers do not register with a new master
            worker.keep_running()

    def end(self) -> None:
        for child in (self._master, *self._workers):
            child.terminate()
        for child in (self._master, *self._workers):
            child.end()


class _GuardedProcess:
    """One child of the guard, restarted with a growing pause when it dies."""

    def __init__(self, command: list[str], log_file: str):
        self._command = command
        self._log_file = log_file
        self._process: Any = None
        self._deaths = 0
        self._look_at_log_at = 0.0
        self._start_at = 0.0
        self._started_at = 0.0

    def keep_running(self) -> bool:
        """Start it when it is not running and its pause is over; True for a start after a death."""
        now = monotonic_s()
        if self._process is not None:
            if self._process.poll() is None:
                self._shorten_log(now)
                return False
            self._deaths = 0 if now - self._started_at > 60 else self._deaths
            pause_s = GUARD_BACKOFF_S[min(self._deaths, len(GUARD_BACKOFF_S) - 1)]
            self._start_at = now + pause_s
            self._deaths += 1
            with open(self._log_file, "a") as output:
                output.write(
                    f"{GUARD_ENDED} with status {self._process.returncode}, starting it again in {pause_s:g} s\n"
                )
            self._process = None
        if now < self._start_at:
            return False
        self._start()
        return self._deaths > 0

    def _shorten_log(self, now: float) -> None:
        """Keep the last twentieth of a log that became too long; its writer appends."""
        if now < self._look_at_log_at:
            return
        self._look_at_log_at = now + 10
        try:
            if os.path.getsize(self._log_file) > LOG_BYTES:
                with open(self._log_file, "rb+") as file:
                    file.seek(-LOG_BYTES // 20, os.SEEK_END)
                    end = file.read()
                    file.truncate(0)
                with open(self._log_file, "ab") as file:
                    file.write(end)
        except OSError:
            pass  # a full disk must not end the guard

    def _start(self) -> None:
        import subprocess

        self._started_at = monotonic_s()
        with open(self._log_file, "ab") as output:
            output.write(f"{GUARD_WORDS}started at {utc_text(time.time())}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_die_with_parent,
            )

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def end(self) -> None:
        """Gone when this returns: asked first, killed after 1 s."""
        import subprocess

        if self._process is None:
            return
        self.terminate()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _die_with_parent() -> None:
    """In the child, before it becomes Locust: SIGKILL when the guard dies (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# ============================================================================
# 11. ORCHESTRATOR - starts, monitors, stops, adopts and ends runs
# ============================================================================
# Five classes. ClusterPool knows who has which cluster. RunStarter starts a test, RunMonitor
# watches one active run, RunStopper ends runs and stops loads; Orchestrator is what the others
# call. Every active run has two threads from before its start on: one watches its cluster, so
# that a master that hangs delays no other run, and one ends the run, so that hanging statistics
# delay no stop and a stop never waits for a thread. A cluster's `operation` lock is held through
# a start, a stop or a change of users there, as a start into a stopping Locust makes load that
# nobody can stop. No lock but that one is held while talking to Locust.


# ---- clusters and who has them ----------------------------------------------


class Cluster:
    """One configured cluster and what is known of it."""

    def __init__(
        self, config: ClusterConfig, client: LocustClient, launched: LaunchedCluster | None, timer: Timer
    ):
        self.config = config
        self.id = config.id
        self.client = client
        self.launched = launched
        self._timer = timer
        self.operation = threading.RLock()  # a start, a stop or a change of users is going on
        self._seen_awake_s = timer.awake_s()  # when it answered last
        self.stopped_at = -math.inf  # our last stop there
        self.problem: str | None = None
        self.had_workers = False
        self.workers_wanted = 1  # for the run that is starting
        self.patient_until = -math.inf  # until then workers may be missing
        self.idle_since = monotonic_s()
        self.scaled_at = -math.inf

    @property
    def is_asleep(self) -> bool:
        """A launched cluster that was stopped as nobody needed it."""
        return self.launched is not None and not self.launched.is_running and self.launched.problem is None

    def scale(self, workers: int) -> None:
        """Scale to `workers` workers; returns when that is under way. LocustUnreachable when it cannot be."""
        launcher = self.config.launcher
        assert launcher is not None
        self.scaled_at = monotonic_s()
        self.workers_wanted, self.patient_until = workers, self.scaled_at + launcher.scale_timeout_s
        try:
            if self.launched:
                self.launched.scale(workers)
            else:
                facts: dict[str, object] = {"workers": workers, "clusterId": self.id}
                run_command(launcher.scale, facts, launcher.scale_timeout_s)
        except OSError as error:
            raise LocustUnreachable(
                f"cluster {self.id} cannot be scaled: {error.strerror or error}"
            ) from None
        log("cluster scaled", cluster=self.id, workers=workers)

    def count_workers(self) -> str:
        """How many workers the user's status command knows of, in words; "" when there is none."""
        launcher = self.config.launcher
        if launcher is None or not launcher.status:
            return ""
        try:
            timeout_s = min(10.0, launcher.scale_timeout_s)
            output = run_command(launcher.status, {"clusterId": self.id}, timeout_s).split("\n")
        except LocustError as error:
            return f"; the status command: {error.message}"
        lines = [line for line in output if line.strip()]
        count = int(lines[0]) if len(lines) == 1 and lines[0].strip().isdecimal() else len(lines)
        return f"; the status command counts {count}"

    def seen(self) -> None:
        """Its Locust answered, or called back."""
        self._seen_awake_s = self._timer.awake_s()

    def silent_s(self, asked_at: float) -> float:
        """Seconds since it was last seen, and since it was asked in vain (`asked_at` of
        Timer.awake_s()): time in which nobody asked, or this process was suspended, is no silence."""
        return self._timer.awake_s() - max(asked_at, self._seen_awake_s)

    def _note_reading(self, reading: Reading) -> Reading:
        self.seen()
        self.problem = None
        self.had_workers = self.had_workers or bool(reading.live_workers)
        return reading

    def read_state(self, timeout_s: float = LOCUST_CALL_S) -> Reading:
        return self._note_reading(self.client.read_state(timeout_s))

    def read_stats(self, timeout_s: float = LOCUST_CALL_S) -> Reading:
        return self._note_reading(self.client.read_stats(timeout_s))

    def is_loaded(self, min_workers: int | None = None) -> bool:
        """A test runs there, or (where asked for) it has so many workers already."""
        try:
            reading = self.read_state(5.0)
        except LocustError:
            return False
        return reading.is_loaded or (min_workers is not None and len(reading.live_workers) >= min_workers)

    def runs_another_test(self) -> ClusterBusy:
        return ClusterBusy(
            f"cluster {self.id} runs a test that Load Manager did not start; stop it in Locust's own page"
        )


class Reservation(NamedTuple):
    """Who has a cluster: a run, or the clean-up after one that has ended."""

    run_id: str
    tenant_id: str
    users: int
    is_cleanup: bool = False


@dataclass
class CleanUp:
    """The load of a run that has ended may still be running on a cluster."""

    run_id: str
    cluster_id: str
    certain_at: float  # monotonic seconds: before, a start may still be on its way to Locust
    was_stopped: bool = False  # a stop was sent and Locust confirmed it


class ClusterPool:
    """Who has which cluster, and who waits for one. A cluster is had by one run at a time, and a
    run has one cluster: reserve() is the only place that decides it."""

    WAIT_STEP_S = 0.1  # an end of a run is seen within this by those who wait for its cluster

    def __init__(self, config: Config, store: Store, timer: Timer):
        self._store = store
        self._timer = timer
        self._config = config
        self._changed = threading.Condition(threading.RLock())  # guards what follows
        self._reserved: dict[str, Reservation] = {}  # by cluster
        self._queue: list[str] = []  # ids of waiting runs, the next first
        self._cleanups: dict[str, CleanUp] = {}  # by run
        self._limits = {tenant.id: tenant for tenant in config.tenants}
        self.users_of: Callable[[str], int] = lambda run_id: 0  # users an active run has now
        self.clusters = {item.id: self._cluster(item) for item in config.clusters}

    def _cluster(self, item: ClusterConfig) -> Cluster:
        token, folder = item.callback_token or self._config.security.callback_token, self._config.folder
        is_process = item.launcher is not None and item.launcher.type == "process"
        launched = LaunchedCluster(item, folder, token) if is_process else None
        return Cluster(item, LocustClient(item, token, folder, self._timer), launched, self._timer)

    def find(self, cluster_id: str) -> Cluster | None:
        return self.clusters.get(cluster_id)

    def serving(self, tenant_id: str, env_id: str) -> list[Cluster]:
        """The clusters of a tenant and environment; InvalidInput when there is none."""
        tenants = [cluster for cluster in self.clusters.values() if cluster.config.tenant_id == tenant_id]
        serving = [cluster for cluster in tenants if cluster.config.env_id == env_id]
        if not tenants:
            why = "no cluster serves this tenant"
            raise InvalidInput(f"no cluster serves tenant {tenant_id!r}", {"tenantId": why})
        if not serving:
            known = ", ".join(sorted({cluster.config.env_id for cluster in tenants}))
            why = f"no cluster of the tenant serves this environment; there are {known}"
            raise InvalidInput(f"envId {env_id!r}: {why}", {"envId": why})
        return serving

    # ---- reservations

    def reserve(self, run: Run, candidates: list[Cluster], wait_s: float = 0.0) -> Cluster | None:
        """The first free one of the clusters, now reserved for the run; None when there is none,
        when another run is before it in the queue, or when the run has a cluster already.

        wait_s: how long to wait for a cluster whose run is just ending."""
        give_up_at = monotonic_s() + wait_s
        with self._changed:
            while True:
                if self._has_one(run.id):
                    return None
                free = [cluster for cluster in candidates if self._may_take(cluster, run)]
                if free and self.over_limit(run) is None:
                    self._reserved[free[0].id] = Reservation(run.id, run.tenant_id, run.target_users)
                    return free[0]
                left_s = give_up_at - monotonic_s()
                if left_s <= 0 or not self._is_one_ending(candidates, run.tenant_id):
                    return None
                self._changed.wait(min(left_s, self.WAIT_STEP_S))

    def reserve_as_is(self, run: Run, candidates: list[Cluster]) -> Cluster | None:
        """The first cluster that no run has, for a test that runs there already."""
        with self._changed:
            for cluster in candidates:
                if cluster.id not in self._reserved:
                    self._reserved[cluster.id] = Reservation(run.id, run.tenant_id, run.target_users)
                    return cluster
        return None

    def reserve_again(self, run: Run, cluster: Cluster) -> None:
        """Give a run that an earlier process left the cluster that it has."""
        with self._changed:
            self._reserved[cluster.id] = Reservation(run.id, run.tenant_id, run.target_users)

    def reserve_for_cleanup(self, cluster: Cluster) -> bool:
        """Take a free cluster for the clean-ups that wait there."""
        with self._changed:
            waiting = self.cleanups_on(cluster)
            if not waiting or cluster.id in self._reserved:
                return False
            self._reserved[cluster.id] = Reservation(
                waiting[0].run_id, cluster.config.tenant_id, 0, is_cleanup=True
            )
            return True

    def release(self, cluster: Cluster, run_id: str) -> None:
        """Give a cluster back; nothing happens when the run does not have it."""
        with self._changed:
            reservation = self._reserved.get(cluster.id)
            if reservation is not None and reservation.run_id == run_id:
                del self._reserved[cluster.id]
                cluster.idle_since = monotonic_s()
                self._changed.notify_all()

    def release_all_of(self, run_id: str) -> None:
        for cluster in self.clusters.values():
            self.release(cluster, run_id)

    def active_run_id(self, cluster: Cluster) -> str | None:
        """The run that has the cluster; None also while it is cleaned up."""
        with self._changed:
            reservation = self._reserved.get(cluster.id)
            return reservation.run_id if reservation and not reservation.is_cleanup else None

    def is_unused_for(self, cluster: Cluster, seconds: float) -> bool:
        with self._changed:
            is_free = cluster.id not in self._reserved and not self.cleanups_on(cluster)
            return is_free and monotonic_s() - cluster.idle_since >= seconds

    def _has_one(self, run_id: str) -> bool:
        return any(one.run_id == run_id and not one.is_cleanup for one in self._reserved.values())

    def _may_take(self, cluster: Cluster, run: Run) -> bool:
        """It is free, and nobody who waits for it goes first."""
        if cluster.id in self._reserved:
            return False
        if run.id in self._queue:
            return True  # next_starts() asks for them in their order
        waiting = (queued for queued in self._queue if not self._has_one(queued))
        return not any(self._may_use(queued, cluster) for queued in waiting)

    def _may_use(self, run_id: str, cluster: Cluster) -> bool:
        run, config = self._store.find(run_id), cluster.config
        if run is None or (run.tenant_id, run.env_id) != (config.tenant_id, config.env_id):
            return False
        return cluster.launched is not None or not run.plan.locustfile

    def _is_one_ending(self, candidates: list[Cluster], tenant_id: str) -> bool:
        """One of these clusters, or what keeps the tenant at its limit, is about to be free."""
        wanted = {cluster.id for cluster in candidates}
        for cluster_id, one in self._reserved.items():
            if cluster_id not in wanted and one.tenant_id != tenant_id:
                continue
            run = self._store.find(one.run_id)
            if one.is_cleanup or run is None or run.is_final or run.status is RunStatus.STOPPING:
                return True
        return False

    def busy(self, candidates: list[Cluster]) -> ClusterBusy:
        """Why none of the clusters is free."""
        first = candidates[0]
        active = next(filter(None, map(self.active_run_id, candidates)), None)
        which = f"cluster {first.id} has" if len(candidates) == 1 else f"all {len(candidates)} clusters have"
        what = "an active run" if active else "the load of an ended run to clean up"
        words = f'{which} {what}; stop it, wait, or create with "queue": true'
        extra: dict[str, Any] = {"activeRunId": active} if active else {}
        return ClusterBusy(words, **extra)

    # ---- limits of tenants

    def over_limit(self, run: Run) -> str | None:
        """Why its tenant may not have this run beside those it has, or None."""
        limits = self._limits.get(run.tenant_id)
        if limits is None:
            return None
        others = self._others_of_tenant(run)
        if limits.max_concurrent_runs is not None and len(others) >= limits.max_concurrent_runs:
            return f"tenant {limits.id} may have {limits.max_concurrent_runs} runs at the same time"
        return self.over_users(run, run.target_users)

    def over_users(self, run: Run, users: int) -> str | None:
        """Why its tenant may not have so many users in this run beside those of its others, or None."""
        limits = self._limits.get(run.tenant_id)
        if limits is None or limits.max_users is None:
            return None
        users += sum(max(one.users, self.users_of(one.run_id)) for one in self._others_of_tenant(run))
        if users <= limits.max_users:
            return None
        return f"tenant {limits.id} may have {limits.max_users} users at the same time; it would have {users}"

    def _others_of_tenant(self, run: Run) -> list[Reservation]:
        with self._changed:
            return [
                one for one in self._reserved.values()
                if one.tenant_id == run.tenant_id and one.run_id != run.id and not one.is_cleanup
            ]  # fmt: skip

    def limit_reached(self, run: Run) -> Conflict | None:
        why = self.over_limit(run)
        return Conflict(f'{why}; stop one, wait, or create with "queue": true') if why else None

    # ---- the queue

    def enqueue(self, run_id: str) -> None:
        with self._changed:
            if run_id not in self._queue:
                self._queue.append(run_id)
            self._number_queue()

    def leave_queue(self, run_id: str) -> bool:
        """Take a waiting run out of the queue; False when a cluster was just given to it."""
        with self._changed:
            if run_id not in self._queue or self._has_one(run_id):
                return False
            self._queue.remove(run_id)
            self._number_queue()
            return True

    def next_starts(self) -> list[tuple[Run, Cluster]]:
        """Reserve free clusters for those who wait, first come first served: runs to start now.
        A run stays in the queue until it was started there, or is over."""
        with self._changed:
            self._queue = [run_id for run_id in self._queue if self._still_waits(run_id)]
            starts: list[tuple[Run, Cluster]] = []
            served: set[tuple[str, str]] = set()
            for run_id in self._queue:
                run = self._store.get(run_id)
                place = (run.tenant_id, run.env_id)
                if place in served or self._has_one(run_id):
                    continue  # one that is just being started leaves other free clusters to the next
                served.add(place)
                mine = [cluster for cluster in self.clusters.values() if self._may_use(run_id, cluster)]
                cluster = self.reserve(run, mine)
                if cluster:
                    starts.append((run, cluster))
                    served.discard(place)
            self._number_queue()
            return starts

    def is_queue_empty(self) -> bool:
        with self._changed:
            return not self._queue

    def _still_waits(self, run_id: str) -> bool:
        run = self._store.find(run_id)
        return run is not None and run.status is RunStatus.PENDING and run.queued

    def _number_queue(self) -> None:
        """Keep everybody's queuePosition; each (tenant, environment) has a queue of its own."""
        places: dict[tuple[str, str], int] = {}
        for run_id in self._queue:
            run = self._store.find(run_id)
            if run is None:
                continue
            place = (run.tenant_id, run.env_id)
            places[place] = places.get(place, 0) + 1
            self._store.set_queue_position(run_id, places[place])

    # ---- clean-ups that wait

    def add_cleanup(self, run_id: str, cluster_id: str, certain_s: float) -> None:
        with self._changed:
            self._cleanups[run_id] = CleanUp(run_id, cluster_id, monotonic_s() + certain_s)

    def drop_cleanup(self, run_id: str) -> None:
        with self._changed:
            self._cleanups.pop(run_id, None)

    def cleanups_on(self, cluster: Cluster) -> list[CleanUp]:
        with self._changed:
            return [one for one in self._cleanups.values() if one.cluster_id == cluster.id]


# ---- one active run ----------------------------------------------------------


class StopOutcome:
    """What becomes of one stop, for whoever waits for it."""

    def __init__(self) -> None:
        self.settled = threading.Event()  # the run is final, or the stop failed for now
        self.is_confirmed = False  # Locust said that its users are gone
        self.error: LocustError | None = None

    def settle(self, error: LocustError | None = None) -> None:
        if not self.settled.is_set():
            self.error = error
            self.settled.set()


class LoadGoesOn(LocustError):
    """Locust says that it stopped, and users are still there."""

    error = "Locust cannot be stopped"


class RunMonitor:
    """What is known of one active run, and its two threads. Its methods are the only writers of
    its fields, under its lock; callbacks, readings and scheduled calls come to them.

    The `watch` thread looks at the cluster on the interval and does what is posted to it; the
    `end` thread waits for the one thing it is to do: stop the load and end the run."""

    def __init__(self, run: Run, cluster: Cluster, end: RunStopper):
        self.run_id = run.id
        self.cluster = cluster
        self._end = end
        self._store = end.store
        self._timer = end.timer
        self._rules = end.rules
        self._lock = threading.RLock()  # guards the fields that follow
        self._wake = threading.Event()
        self._tasks: deque[Callable[[], None]] = deque()  # for the watch thread
        self._due = math.inf  # the next look, monotonic seconds
        self._unheard_since = math.inf  # the first of the looks in vain, by Timer.awake_s()
        self._end_work: Callable[[], None] | None = None
        self._end_wanted = threading.Event()
        self.started = monotonic_s()
        self.deadline: float | None = None  # monotonic seconds
        self.over = threading.Event()  # the run is final, or being stopped
        self.final = threading.Event()  # the run is final, and that is on disk
        self.stop_outcome = StopOutcome()
        self.scheduled: list[ScheduledCall] = []
        self.was_sent = False  # the start was sent to Locust
        self.calls_back = False  # its hooks have called back
        self.start_seen = False  # Locust said that the test began
        self.users_seen = False  # a user or a request was seen
        self.max_workers = 0
        self.last_users = 0  # the users that ran when they were last counted
        self.target = load_target(run, time.time())
        self.last: Reading | None = None
        self.last_requests = 0
        self.pushed_at = -math.inf  # when the newest push was made, epoch seconds
        self.boot_id = ""
        self.rebalanced_at = -math.inf
        self.certain_at = -math.inf  # before, a change of users that was not answered may still come
        self.rebalance_due = False  # workers came or went
        self.scaled = False  # their number was changed by hand
        self.failures: tuple[Failure, ...] = ()  # of the last reading
        self.reported: Snapshot | None = None  # complete final numbers, from the hooks
        self.was_reported = threading.Event()
        self.judge = ThresholdWatch(run.thresholds)

    @property
    def age_s(self) -> float:
        return monotonic_s() - self.started

    @property
    def wanted_for_s(self) -> float:
        """How long all users should be there; negative while they are started."""
        return time.time() - self.target.since - self.target.users / (self.target.spawn_rate or 1)

    def remaining_s(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - monotonic_s())

    # ---- threads

    def start_threads(self, first: Callable[[], None] | None = None) -> None:
        """Have both threads before anything is sent to Locust; NotReady when they cannot be had.
        first: what the watch thread does before it watches."""
        name = self.run_id[:8]
        try:
            start_thread(f"end {name}", self._step(self._end_when_told))
            if first:
                self.post(first)
            start_thread(f"watch {name}", self._step(self._watch))
        except NotReady:
            self.close()
            raise

    def _step(self, work: Callable[[], None]) -> Callable[[], None]:
        return functools.partial(self._end.run_step, self.run_id, work)

    def post(self, task: Callable[[], None]) -> None:
        """Have the watch thread do something that may wait for Locust."""
        self._tasks.append(task)
        self._wake.set()

    def end_with(self, work: Callable[[], None]) -> None:
        """Have the end thread do `work`, now; the first one counts."""
        with self._lock:
            self._end_work = self._end_work or work
        self.stop_watching()
        self._end_wanted.set()

    def stop_watching(self) -> None:
        self.over.set()
        self._wake.set()
        for scheduled in self.scheduled:
            scheduled.cancel()

    def close(self) -> None:
        """Let both threads go: the run is final, or was not started."""
        self.stop_watching()
        self._end_wanted.set()

    def _end_when_told(self) -> None:
        self._end_wanted.wait()
        if self._end_work is not None:
            self._end_work()

    def _watch(self) -> None:
        while not self.over.is_set():
            if self._tasks:
                self._tasks.popleft()()
                continue
            wait_s = self._due - monotonic_s()
            if wait_s > 0:
                self._wake.wait(None if wait_s == math.inf else wait_s)
                self._wake.clear()
            else:
                self._look_once()

    # ---- from the start on

    def arm(self, run: Run, remaining_s: float | None) -> None:
        """Watch a Running run from now on, and stop it when its time is over."""
        with self._lock:
            self.started = monotonic_s()
            self.deadline = None if remaining_s is None else self.started + remaining_s
            self._due = self.started + min(1.0, self._rules.poll_interval_s)
        if self.deadline is not None:
            self._schedule(self.deadline, functools.partial(self._end.begin_stop, run.id, "duration"))
        elapsed_s = time.time() - (run.started_at or time.time())
        for start_s in stage_starts(run):
            if start_s > elapsed_s:
                at = self.started + start_s - elapsed_s
                self._schedule(at, functools.partial(self.post, self.begin_stage))
        proof_at = self.started + self._rules.start_timeout_s
        self._schedule(proof_at, functools.partial(self.post, self._check_proof))
        self._wake.set()

    def _schedule(self, due: float, action: Callable[[], object]) -> None:
        """Call `action` at a point in time (monotonic seconds) unless the run is over before."""

        def guarded() -> None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the edge: a deadline that was missed ends the run
                log_unforeseen("timer", error, run=self.run_id)
                self.end_with(functools.partial(self._end.fail_unforeseen, self.run_id, error))

        self.scheduled.append(self._timer.at(due, guarded))

    def set_deadline(self, remaining_s: float | None) -> None:
        """What is left of its time, for the start that is about to be sent."""
        self.deadline = None if remaining_s is None else monotonic_s() + remaining_s

    def adopted(self, run: Run, requests: int) -> None:
        """What is known of a run that an earlier process started."""
        with self._lock:
            self.was_sent = True
            self.last_requests = requests
            self.users_seen = requests > 0
            self.start_seen = self.users_seen or time.time() - (run.started_at or 0) > 3

    def note_start(self, reading: Reading) -> None:
        with self._lock:
            self.start_seen = self.start_seen or reading.is_loaded
            self.users_seen = self.users_seen or (reading.users > 0 and reading.is_loaded)
            self.boot_id = self.boot_id or reading.boot_id
            if reading.is_loaded and reading.users:
                self.last_users = reading.users

    def note_test_start(self) -> None:
        """The hooks saw the test begin."""
        with self._lock:
            self.start_seen = self.calls_back = True
        self.cluster.seen()

    def note_push(self, snapshot: Snapshot) -> None:
        """The hooks pushed numbers, which the store has taken."""
        with self._lock:
            self.start_seen = self.calls_back = True
            self.users_seen = self.users_seen or bool(snapshot.users or snapshot.requests)
            if snapshot.taken_at >= self.pushed_at:
                self.last_requests = snapshot.requests or self.last_requests
                self.pushed_at = snapshot.taken_at
            self.last_users = snapshot.users or self.last_users
        self.cluster.seen()
        self._judge(snapshot)

    def note_complete_end(self, snapshot: Snapshot) -> None:
        """The hooks saw the test end and sent its complete final numbers."""
        with self._lock:
            self.reported = snapshot
        self.was_reported.set()

    # ---- looking

    def _look_once(self) -> None:
        run = self._store.find(self.run_id)
        if run is None or run.status is not RunStatus.RUNNING:
            self._due = math.inf
            return
        asked_at = self._timer.awake_s()
        try:
            self._look(run)
            self._unheard_since = math.inf
        except LocustError as error:
            self._unheard_since = min(self._unheard_since, asked_at)
            self._not_heard(run, error)
        self._due = max(self._due + self._interval_s(), monotonic_s())

    def _interval_s(self) -> float:
        """Until the next look: short at first, so that a run of some seconds has a picture too."""
        interval = self._rules.poll_interval_s
        if self.age_s < FIRST_LOOKS_S:
            interval = min(interval, FIRST_LOOK_INTERVAL_S if self.users_seen else 1.0)
        if self.last is not None and self.last.is_cached_repeat:
            interval = min(interval, REPEAT_LOOK_S)  # Locust's cache is about to be over
        return min(interval, ABORT_LOOK_S) if self.judge.may_abort else interval

    def _look(self, run: Run) -> None:
        """One look: the uncached state first where it matters, then the numbers."""
        cluster = self.cluster
        if not self.users_seen or self._lease_needs_us(run):
            state = cluster.read_state(self._look_timeout_s)
            self.note_start(state)
            if state.hooks and self._is_over(run, state):
                self._ended_by_locust(state)
                return
            if not self.users_seen and not state.snapshot:
                return
        reading = cluster.read_stats(self._look_timeout_s)
        self.note_start(reading)
        if self.over.is_set():
            return
        if not reading.is_loaded and self.age_s < STATS_CACHE_S + 0.2:
            return  # from before the start: the cache still holds what was before it
        if self._is_over(run, reading):
            self._confirm_end(run, reading)
            return
        self._note_reading(run, reading)

    @property
    def _look_timeout_s(self) -> float:
        """A look must not outlast the silence after which a cluster is lost."""
        return min(LOOK_S, max(2.0, self._rules.lost_after_s))

    def _lease_needs_us(self, run: Run) -> bool:
        return run.duration_s is None and self._rules.lease_s > 0

    def _is_over(self, run: Run, reading: Reading) -> bool:
        """Locust no longer runs this test, as far as this reading tells."""
        if reading.hooks and reading.run_id and reading.run_id != run.id:
            return True  # another test has taken its place
        is_idle = not reading.is_loaded and reading.state in IDLE_STATES
        return self.start_seen and self.age_s > 2 and is_idle

    def _confirm_end(self, run: Run, first: Reading) -> None:
        """No decision on one cached reading: look again when the cache must be new."""
        if self.over.wait(0.0 if first.requests < self.last_requests else STATS_CACHE_S + 0.3):
            return
        second = self.cluster.read_state(self._look_timeout_s)
        if self._is_over(run, second):
            self._ended_by_locust(second)

    def _note_reading(self, run: Run, reading: Reading) -> None:
        with self._lock:
            workers_before, before = self.max_workers, self.last
            self.max_workers = max(self.max_workers, len(reading.live_workers))
            self.last, self.failures = reading, reading.failures
        for code, sentence in watch_warnings(
            self.target, before, reading, self.max_workers, self.wanted_for_s
        ):
            self._end.warn(run.id, code, sentence)
        if reading.snapshot and reading.snapshot.requests is not None and not reading.is_cached_repeat:
            self._note_numbers(run, reading, reading.snapshot)
        if before is not None:
            self._mind_users(run, before, reading, workers_before)
        self._replace_lost(reading)

    def _note_numbers(self, run: Run, reading: Reading, snapshot: Snapshot) -> None:
        """Keep a reading's numbers, unless they may be older than those of a push and are fewer: a cached
        reading must not set the counters back. A reset shows in the next one."""
        with self._lock:
            may_be_older = reading.uncertainty_s > 0 and reading.made_after <= self.pushed_at
            if may_be_older and reading.requests < self.last_requests:
                return
            self.last_requests = reading.requests if snapshot.taken_at >= self.pushed_at else self.last_requests
        self._store.add_snapshot(run.id, snapshot, "poll")
        self._judge(snapshot)

    def _judge(self, snapshot: Snapshot) -> None:
        """Hold new numbers against the thresholds; stop the run when one says so."""
        run = self._store.find(self.run_id)
        is_judged = run is not None and run.status is RunStatus.RUNNING and run.thresholds
        if run is None or not is_judged or run.started_at is None:
            return
        failed = self.judge.note(snapshot, run.started_at)
        if failed is not None and self._end.begin_stop(run.id, "threshold"):
            log("run aborted by a threshold", run=run.id, threshold=failed.expr)

    def _not_heard(self, run: Run, error: LocustError) -> None:
        cluster = self.cluster
        if cluster.problem is None:
            log("cluster does not answer", cluster=cluster.id, run=run.id, why=error.message)
        cluster.problem = error.message
        silent_s = cluster.silent_s(self._unheard_since)
        if silent_s >= self._rules.lost_after_s:
            reason = f"cluster {cluster.id} was silent for {silent_s:.0f} s: {error.message}"
            self._end.fail(run.id, reason, stop_reason="lost", cleanup=True)

    def _check_proof(self) -> None:
        """startTimeoutSeconds are over: is there a start at all, if nobody saw a user?"""
        if self.users_seen:
            return
        why = "Locust accepted the start, but no test began"
        try:
            reading = self.cluster.read_state(5.0)
            self.note_start(reading)
            if idleness(reading) is Idleness.NO_WORKERS:
                why = "no worker is connected to the master"
            elif reading.state == "running" and reading.users == 0:
                self.start_seen = False
                why = "Locust says it is running, but has no user; is a host set? The workers' logs have the reason"
        except LocustError as error:
            why = error.message
        if self.users_seen or self.start_seen or self.over.is_set():
            return
        timeout_s = self._rules.start_timeout_s
        self._end.fail(self.run_id, f"no user was started within {timeout_s:g} s: {why}", cleanup=True)

    def _ended_by_locust(self, reading: Reading) -> None:
        """Locust no longer runs the test: it ended it, or is another process now."""
        run = self._store.find(self.run_id)
        if run is None or run.status is not RunStatus.RUNNING:
            return
        is_another = bool(self.boot_id and reading.boot_id and self.boot_id != reading.boot_id)
        if is_another or reading.state == "ready" or reading.requests < self.last_requests:
            reason = f"Locust of cluster {self.cluster.id} was restarted under the run; the numbers are those before"
            if reading.distributed and not reading.live_workers:
                reason += ". Workers of the old master may load the target for another minute"
            self._end.fail(run.id, reason, stop_reason="lost")
            return
        if reading.distributed and reading.workers and not reading.live_workers:
            self._end.claim_end(self, "lost", "all workers of the cluster were lost")
            return
        self._end.claim_end(self, "locust")

    # ---- users and workers

    def _mind_users(self, run: Run, before: Reading, reading: Reading, workers_before: int) -> None:
        """Rebalance the users after workers came or went; note users changed in Locust's page."""
        wanted = self.target.users
        came = workers_before and any(worker.state == "ready" for worker in reading.live_workers)
        went = reading.users < wanted and len(reading.live_workers) < len(before.live_workers)
        self.rebalance_due = bool(self.rebalance_due or came or went)
        is_short = self.scaled and reading.users < wanted and self.wanted_for_s > 5
        if is_short and before.users == reading.users and monotonic_s() - self.rebalanced_at > 10:
            self.scaled, self.rebalance_due = False, True  # a worker came and went between two looks
        if reading.state != "running" or monotonic_s() - self.rebalanced_at < 5:
            return
        if reading.live_workers and self.rebalance_due:
            self.rebalance_due = not self._rebalance_if_heard(run)
            return
        self._note_users_changed(run, before, reading)

    def _note_users_changed(self, run: Run, before: Reading, reading: Reading) -> None:
        """The number of users is stable, and not the one asked for: it was changed in Locust's page."""
        wanted = self.target.users
        is_stable = before.users == reading.users and before.state == "running" and self.wanted_for_s > 5
        has_all = len(before.live_workers) == len(reading.live_workers) == self.max_workers
        if not (is_stable and has_all and 0 < reading.users != wanted):
            return
        if reading.users < wanted and self.rebalanced_at == -math.inf and not self._changed_by_hand(reading):
            return
        self._end.warn(
            run.id, "users_changed", f"users were changed in Locust from {wanted} to {reading.users}"
        )
        self.target = self.target._replace(users=reading.users)
        if self.deadline is not None:
            self.rebalance_due = not self._rebalance_if_heard(run)  # Locust forgot run_time with the change

    def _rebalance_if_heard(self, run: Run) -> bool:
        """As rebalance(); False, to be tried again, when Locust does not answer."""
        try:
            self.rebalance(run, self.target)
        except LocustError as error:
            log("users not rebalanced", run=run.id, cluster=self.cluster.id, why=error.message)
            return False
        return True

    def _changed_by_hand(self, reading: Reading) -> bool:
        """Fewer users than asked may be a cluster that cannot; the hooks know what was asked."""
        try:
            state = self.cluster.read_state(self._look_timeout_s)
        except LocustError:
            return False
        return state.target_users is not None and state.target_users == reading.users

    def rebalance(self, run: Run, target: LoadTarget) -> bool:
        """Start again with the same run and its remaining time: Locust balances users over the
        workers it has only then (2.47.0). False when the run is about to end anyway."""
        cluster = self.cluster
        remaining = self.remaining_s()
        if remaining is not None and remaining < 2:
            return False
        with cluster.operation:
            current = self._store.find(run.id)
            if current is None or current.status is not RunStatus.RUNNING:
                return False
            if not self._still_runs():
                return False  # it just ended: a start would begin it again
            self.rebalanced_at = monotonic_s()
            form = swarm_form(run, cluster, target, self.remaining_s(), self._rules)
            try:
                cluster.client.swarm(form)
            except LocustError as error:
                if error.maybe_taken:
                    self.certain_at = monotonic_s() + START_SETTLES_S
                raise
            self.target = target
        log("users rebalanced", run=run.id, cluster=cluster.id, users=target.users)
        return True

    def _still_runs(self) -> bool:
        """Whether Locust runs the test: of a cached state only one from after the start counts."""
        while True:
            age_s = self.age_s
            reading = self.cluster.read_state(self._look_timeout_s)
            if reading.is_loaded or not reading.cached or age_s > STATS_CACHE_S + 0.5:
                return reading.is_loaded
            if self.over.wait(0.3):
                return False

    def change_users(self, users: int, spawn_rate: float | None, by: str) -> LoadChange | None:
        """Give Locust another number of users; None when the run is about to end. LocustError
        when Locust does not take it."""
        run = self._store.get(self.run_id)
        change = LoadChange(time.time(), users, spawn_rate or self.target.spawn_rate or 1, by)
        target = LoadTarget(change.users, change.spawn_rate, change.at)
        return change if self.rebalance(run, target) else None

    def begin_stage(self, tries: int = 0) -> None:
        """Give Locust the load that the run should have now; tried again while it does not answer."""
        run = self._store.find(self.run_id)
        if run is None or run.status is not RunStatus.RUNNING:
            return
        target = load_target(run, time.time() + 0.05)
        try:
            self.rebalance(run, target)
            log("stage begins", run=run.id, users=target.users, spawn_rate=target.spawn_rate)
        except LocustError as error:
            if tries < len(RETRY_STEPS_S):
                again = functools.partial(self.post, functools.partial(self.begin_stage, tries + 1))
                self._schedule(monotonic_s() + RETRY_STEPS_S[tries], again)
                return
            words = f"a stage of {target.users} users could not begin: {error.message}"
            self._end.warn(run.id, "users_not_reached", words)

    def workers_scaled(self, workers: int) -> None:
        """Their number was changed by hand: those that go now are not lost."""
        with self._lock:
            self.max_workers = min(self.max_workers, workers)
            self.scaled = True

    def _replace_lost(self, reading: Reading) -> None:
        """Have lost workers of a cluster with a scale command started again."""
        cluster, launcher = self.cluster, self.cluster.config.launcher
        if launcher is None or cluster.launched or not launcher.replace_lost_workers:
            return
        if monotonic_s() - cluster.scaled_at < REPLACE_EVERY_S:
            return
        if len(reading.live_workers) < cluster.workers_wanted:
            cluster.scaled_at = monotonic_s()
            self._timer.in_thread(0.0, "replace workers", self._scale_again)

    def _scale_again(self) -> None:
        try:
            self.cluster.scale(self.cluster.workers_wanted)
        except LocustError as error:
            log("lost workers not replaced", cluster=self.cluster.id, why=error.message)


# ---- did it pass, and against what -------------------------------------------


class RunJudge:
    """Thresholds with their results, the comparison and the verdict of a run that is about to be final."""

    def __init__(self, store: Store):
        self._store = store

    def judgement(
        self,
        run: Run,
        monitor: RunMonitor | None,
        final: Snapshot | None,
        finished_at: float,
        has_failed: bool,
    ) -> dict[str, Any]:
        """What the run keeps of it: changes for its transition.

        Made before the transition, as a final run never changes; and nothing that goes wrong here
        keeps a run from ending: it is logged, and the verdict is that of the numbers in memory."""
        if not run.thresholds and not run.compare_with:
            return {}
        try:
            snapshot = final or self._store.newest_numbers(run.id)
            thresholds = self._judged_thresholds(run, monitor, snapshot, finished_at)
            comparison = (
                self._comparison(run, snapshot, finished_at, has_failed) if run.compare_with else None
            )
            verdict = verdict_of(thresholds, comparison, has_failed)
        except Exception as error:  # noqa: BLE001 - an end must not depend on it
            log_unforeseen("judgement", error, run=run.id)
            return {"verdict": "failed"}
        return {"thresholds": thresholds, "comparison": comparison, "verdict": verdict}

    def _judged_thresholds(
        self, run: Run, monitor: RunMonitor | None, snapshot: Snapshot | None, finished_at: float
    ) -> tuple[Threshold, ...]:
        live = monitor.judge if monitor else ThresholdWatch(run.thresholds)
        # Windows end with the last numbers of the Running run: while it stops, rates fall.
        moments = (run.started_at or finished_at, live.samples[-1].at if live.samples else finished_at)
        windows: dict[Threshold, Window] = {}
        try:
            has_windows = any(one.over_s or one.after_s for one in run.thresholds)
            samples = self._store.samples(run.id) if has_windows else []
            if any(map(needs_histograms, run.thresholds)):
                windows = judge_histogram_windows(run.thresholds, self._store.histograms(run.id), moments)
        except NotReady as error:
            log("history not read for the verdict", run=run.id, why=error.message)
            samples = list(live.samples)
            windows = judge_histogram_windows(run.thresholds, (), moments)
        return tuple(
            judge_threshold(one, snapshot, samples, moments, live.first_failed[index], windows.get(one))
            for index, one in enumerate(run.thresholds)
        )

    def _comparison(
        self, run: Run, snapshot: Snapshot | None, finished_at: float, has_failed: bool
    ) -> dict[str, Any]:
        """The run against what it asked to be compared with, as the run keeps it."""
        if has_failed:
            return no_comparison(run.compare_with or "", "not compared: the run failed")
        document = run_to_json(run)
        document.update(
            status=RunStatus.FINISHED.value, finishedAt=utc_text(finished_at), trustReasons=doubts_of(run)
        )
        document["lastMetrics"] = snapshot_to_json(snapshot) if snapshot else None
        return self._store.comparer.judgement(run, document)


# ---- ending runs -------------------------------------------------------------


class RunStopper:
    """Ends runs: stops their load with retries until its users are gone, reads the final numbers,
    concludes, keeps the details; and cleans up load whose run has ended without that."""

    QUIET_WAIT_S = 6.0
    CLEANUP_EVERY_S = 3.0  # while the cluster does not answer
    CLEANUP_LOOK_S = 1.0  # while a start may still be on its way
    REPORT_WAIT_S = 2.0  # for the final numbers of hooks that have called back before
    FAIL_AGAIN_S = 3.0

    def __init__(self, config: Config, store: Store, timer: Timer, pool: ClusterPool, judge: RunJudge):
        self.rules = config.orchestrator
        self.store = store
        self.timer = timer
        self.pool = pool
        self._judge = judge
        self.monitors: dict[str, RunMonitor] = {}  # of active runs
        self.is_closing = False
        self.on_free: Callable[[], None] = lambda: None  # a cluster is free again

    # ---- the edge

    def run_step(self, run_id: str, work: Callable[[], None]) -> None:
        """The edge around every thread that works for a run: what nobody foresaw ends the run as
        Failed, gives its cluster back, has its load stopped, and is logged and counted."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the edge
            log_unforeseen(threading.current_thread().name, error, run=run_id)
            self.fail_unforeseen(run_id, error)

    def fail_unforeseen(self, run_id: str, error: Exception) -> None:
        """End a run after an exception that nobody foresaw; again until that succeeds."""
        monitor = self.monitors.get(run_id)
        may_be_loaded = monitor is None or monitor.was_sent
        try:
            reason = f"an error inside Load Manager: {error!r:.300}; its log has the trace"
            run = self.store.find(run_id)
            is_unanswered = run is not None and run.status is RunStatus.PENDING
            certain_s = START_SETTLES_S if is_unanswered else 0.0
            self.fail(run_id, reason, cleanup=may_be_loaded, certain_s=certain_s)
        except Exception as second:  # noqa: BLE001 - the edge of the edge
            log_unforeseen("edge", second, run=run_id)
        run = self.store.find(run_id)
        if run is None or run.is_final:
            self._let_go(run_id)
        else:
            again = functools.partial(self.fail_unforeseen, run_id, error)
            self.timer.in_thread(self.FAIL_AGAIN_S, "edge", again)

    # ---- stopping

    def begin_stop(self, run_id: str, reason: str) -> RunMonitor | None:
        """Claim the stop of a Running run: the first who asks gets its monitor, others None. The
        end thread is there already, and Locust is asked before the claim is durable: neither a
        lack of threads nor a full disk keeps a load running."""
        monitor = self.monitors.get(run_id)
        if monitor is None:
            return None
        try:
            self.store.transition(run_id, RunStatus.STOPPING, durable=False, stop_reason=reason)
        except (Conflict, NotFound):
            return None
        monitor.end_with(functools.partial(self.carry_out_stop, monitor))
        return monitor

    def claim_end(self, monitor: RunMonitor, reason: str, failure: str | None = None) -> bool:
        """Locust ended the test: Running becomes Stopping, and the end thread concludes, as Failed
        where there is a `failure`. False when the run is not Running."""
        is_on_time = monitor.deadline is not None and monotonic_s() > monitor.deadline - 1.5
        reason = "duration" if is_on_time and reason == "locust" else reason
        try:
            self.store.transition(monitor.run_id, RunStatus.STOPPING, durable=False, stop_reason=reason)
        except (Conflict, NotFound):
            return False
        monitor.end_with(functools.partial(self._finish, monitor, time.time(), failure))
        return True

    def carry_out_stop(self, monitor: RunMonitor) -> None:
        """Stop the load, with retries until it is stopped or the cluster is lost; then end the run."""
        run_id, cluster, outcome = monitor.run_id, monitor.cluster, monitor.stop_outcome
        began, asked_at = monotonic_s(), self.timer.awake_s()
        tries, unconfirmed, undying = 0, 0, 0
        while not monitor.was_reported.is_set():
            try:
                self.stop_load(cluster, run_id)
                break
            except LoadGoesOn as error:
                undying += 1
                failure: LocustError = error
            except LocustError as error:
                unconfirmed += isinstance(error, LocustTimeout) and cluster.stopped_at >= began
                failure = error
            log("stop failed, trying again", run=run_id, cluster=cluster.id, why=failure.message)
            if unconfirmed >= 3:
                words = "Locust accepted the stop, but could not be asked for its users"
                self.warn(run_id, "stop_unconfirmed", f"{words}: {failure.message}")
                break
            if undying >= 2 or cluster.silent_s(asked_at) >= self.rules.lost_after_s:
                outcome.settle(failure)
                words = "cannot be stopped" if undying >= 2 else "was lost while it was to be stopped"
                reason = f"cluster {cluster.id} {words}: {failure.message}"
                self.fail(run_id, reason, stop_reason="lost", cleanup=True)
                return
            if tries >= 1:
                outcome.settle(failure)
            monitor.was_reported.wait(RETRY_STEPS_S[min(tries, len(RETRY_STEPS_S) - 1)])
            tries += 1
        outcome.is_confirmed = True
        self._finish(monitor, time.time())

    def stop_load(self, cluster: Cluster, run_id: str) -> None:
        """Stop the test on the cluster, for this run, and see that its users are gone; LoadGoesOn
        when they are not, another LocustError when Locust does not answer."""
        with cluster.operation:
            cluster.client.stop()
            cluster.seen()
            cluster.stopped_at = monotonic_s()
            try:
                self._wait_until_quiet(cluster)
            except LoadGoesOn:
                # Load from a start into a stopping Locust: state is "stopped", /stop does
                # nothing. Only a new start makes it stoppable (2.47.0).
                cure = {"user_count": 1, "spawn_rate": 1, "run_id": run_id}
                cluster.client.swarm({**cure, "lm_stop_after": "10", "lm_lease": ""})
                cluster.client.stop()
                self._wait_until_quiet(cluster)
            cluster.stopped_at = monotonic_s()

    def _wait_until_quiet(self, cluster: Cluster) -> None:
        give_up_at = monotonic_s() + self.QUIET_WAIT_S
        while True:
            reading = cluster.read_state(5.0)
            if not reading.is_loaded:
                return
            if monotonic_s() > give_up_at:
                words = f"Locust answered the stop with success, but {reading.users} users go on"
                raise LoadGoesOn(words)
            time.sleep(0.05 if reading.hooks else 0.5)

    # ---- the end of a run

    def _finish(self, monitor: RunMonitor, quiet_at: float, failure: str | None = None) -> None:
        """Read the final numbers and end the run; its details are kept after that, as nothing that
        is kept about a run may stand before its end. The cluster is free when they are read."""
        final = self._final_numbers(monitor, quiet_at)
        if final is not None:
            self._doubt_if_reset(monitor.run_id, final)
            # Locust's report has no users, and after the stop there are none: those that it had.
            final = final._replace(users=monitor.last_users or self._users_shown(monitor.run_id))
        if failure:
            self._end_as_failed(monitor.run_id, failure, {"stop_reason": "lost"}, final)
        else:
            self._conclude(monitor, final, quiet_at)
        monitor.final.set()
        monitor.stop_outcome.settle()
        self._keep_details(monitor)
        self._look_for_late_load(monitor)
        self._let_go(monitor.run_id)

    def _look_for_late_load(self, monitor: RunMonitor) -> None:
        """A change of users that Locust did not answer may be carried out after the stop, which
        would begin the test again: have its load looked for as long."""
        certain_s = monitor.certain_at - monotonic_s()
        if certain_s > 0:
            self._add_cleanup(monitor.run_id, monitor.cluster, certain_s)

    def _doubt_if_reset(self, run_id: str, final: Snapshot) -> None:
        """Warn when final numbers are not those of the whole run: they stay Locust's own."""
        run = self.store.find(run_id)
        if run is None or run.started_at is None:
            return
        why = reset_suspected(final, self.store.newest_numbers(run_id), run.started_at)
        if why:
            self.warn(run_id, "stats_reset", why)

    def _users_shown(self, run_id: str) -> int:
        newest = self.store.newest_sample(run_id)
        return (newest.users if newest else None) or 0

    def _final_numbers(self, monitor: RunMonitor, quiet_at: float) -> Snapshot | None:
        """The final numbers when they can be complete, within FINAL_READ_S; None, with a warning,
        when they are not this run's any more.

        Workers report every 3 s: only with the hooks' flush, or standalone, is a reading right
        after the stop complete (Locust 2.47.0)."""
        give_up_at = monotonic_s() + FINAL_READ_S
        reading = self._read_at_end(monitor)
        if monitor.calls_back:
            monitor.was_reported.wait(self.REPORT_WAIT_S)
        if monitor.reported is not None:
            return monitor.reported
        is_complete = reading is not None and ((reading.hooks and reading.flush) or not reading.distributed)
        report_s = WORKER_REPORT_S + 0.6
        wait_s = 0.0 if is_complete else quiet_at + report_s - time.time()
        if monitor.was_reported.wait(min(max(0.0, wait_s), report_s)):
            return monitor.reported
        return self._read_final(monitor, reading, give_up_at)

    def _read_at_end(self, monitor: RunMonitor) -> Reading | None:
        cluster = monitor.cluster
        try:
            reading = cluster.read_state(5.0)
            if reading.is_loaded and (not reading.hooks or reading.run_id == monitor.run_id):
                self.stop_load(cluster, monitor.run_id)  # a callback said it stopped, and it did not
            return reading
        except LocustError as error:
            log("cluster not read at the end", cluster=cluster.id, run=monitor.run_id, why=error.message)
            return None

    def _read_final(self, monitor: RunMonitor, reading: Reading | None, give_up_at: float) -> Snapshot | None:
        """Locust's CSV report; None, with a warning, when it is not this run's any more."""
        why = "Locust did not answer"
        if (
            reading is not None
            and reading.hooks
            and monitor.run_id not in (reading.run_id, reading.last_run_id, "")
        ):
            why = "another test has begun in Locust meanwhile"
            give_up_at = -math.inf
        for pause_s in (0.0, 0.5, 1.5):
            timeout_s = min(5.0, give_up_at - monotonic_s() - pause_s)
            if timeout_s < 0.1:
                break
            if monitor.was_reported.wait(pause_s):
                return monitor.reported
            try:
                final = monitor.cluster.client.read_final(timeout_s)
            except LocustError as error:
                why = error.message
                continue
            if (final.requests or 0) >= self.last_requests(monitor.run_id):
                return final._replace(resets=reading.resets if reading else None)
            why = "Locust's statistics were reset"
            break
        words = f"the numbers are the last ones seen, not the final ones: {why}"
        self.warn(monitor.run_id, "final_numbers_missing", words)
        return None

    def last_requests(self, run_id: str) -> int:
        document = json.loads(self.store.wire(run_id)).get("lastMetrics") or {}
        return document.get("totalRequests") or 0

    def _conclude(self, monitor: RunMonitor, final: Snapshot | None, finished_at: float) -> None:
        """Stopping becomes Finished, or Failed when Locust ended a test that never began."""
        run = self.store.find(monitor.run_id)
        if run is None or run.is_final:
            return
        began = monitor.users_seen or final is None or (final.requests or 0) > 0
        if run.stop_reason == "locust" and not began and monitor.age_s < self.rules.start_timeout_s:
            reason = "Locust ended the test without starting a user: is a host set? Its log tells"
            self._end_as_failed(run.id, reason, {}, final)
            return
        self._note_users_never_reached(run, monitor)
        finished_at = max(finished_at, run.started_at or 0)
        judged = self._judge.judgement(self.store.get(run.id), monitor, final, finished_at, has_failed=False)
        changes = {"finished_at": finished_at, **judged}
        try:
            self.store.transition(run.id, RunStatus.FINISHED, snapshot=final, **changes)
        except Conflict:
            return
        log("run finished", run=run.id, cluster=run.cluster_id, why=run.stop_reason)

    def _note_users_never_reached(self, run: Run, monitor: RunMonitor) -> None:
        last, target = monitor.last, monitor.target
        is_ours = target.users == load_target(run, time.time()).users  # changed by no one in Locust's page
        if last and is_ours and monitor.wanted_for_s > 5 and last.users < target.users:
            words = f"{last.users} of {target.users} users were running at the last reading"
            self.warn(run.id, "users_not_reached", words)

    def fail(
        self,
        run_id: str,
        reason: str,
        stop_reason: str | None = None,
        cleanup: bool = False,
        certain_s: float = 0.0,
        snapshot: Snapshot | None = None,
    ) -> None:
        """End a run as Failed and give its cluster back.

        cleanup: its load is stopped as soon as that is possible; certain_s: for how long a start
        may still be on its way to Locust, so that load must be looked for."""
        run = self.store.find(run_id)
        if run is None or run.is_final:
            return
        cluster = self.pool.find(run.cluster_id) if cleanup else None
        changes: dict[str, Any] = {"stop_reason": stop_reason} if stop_reason else {}
        if cluster:
            # First: who gets the cluster next must find the clean-up there.
            self.pool.add_cleanup(run_id, cluster.id, certain_s)
            changes["cleanup_on"] = cluster.id
        is_ended = self._end_as_failed(run_id, reason, changes, snapshot)
        monitor = self.monitors.get(run_id)
        if monitor and monitor.failures:
            kept = dump_json(failures_to_json(monitor.failures, ())).encode()
            self.store.keep_artefact(run_id, FAILURES, kept)
        self._let_go(run_id)
        if cluster and is_ended:
            self.clean_up_soon(cluster)
        elif cluster:
            self.pool.drop_cleanup(run_id)

    def _end_as_failed(
        self, run_id: str, reason: str, changes: dict[str, Any], snapshot: Snapshot | None
    ) -> bool:
        run = self.store.find(run_id)
        if run is None or run.is_final:
            return False
        monitor, now = self.monitors.get(run_id), time.time()
        judged = self._judge.judgement(run, monitor, snapshot, now, has_failed=True)
        changes = {**changes, **judged, "failure_reason": reason, "finished_at": now}
        try:
            self.store.transition(run_id, RunStatus.FAILED, snapshot=snapshot, **changes)
        except (Conflict, NotFound):
            return False
        log("run failed", run=run_id, cluster=run.cluster_id, why=reason)
        return True

    def _let_go(self, run_id: str) -> None:
        """Let go of everything that was kept for an active run; its cluster is free."""
        monitor = self.monitors.pop(run_id, None)
        self.pool.release_all_of(run_id)
        if monitor:
            monitor.final.set()
            monitor.stop_outcome.settle()
            monitor.close()
        self.on_free()

    def warn(self, run_id: str, code: str, message: str) -> None:
        if self.store.add_warning(run_id, code, message, time.time()):
            log("warning", run=run_id, code=code, message=message)

    # ---- details

    def _keep_details(self, monitor: RunMonitor) -> None:
        """Keep what Locust knows beyond numbers, before its next test clears it."""
        client, run_id = monitor.cluster.client, monitor.run_id
        failures = self._detail(run_id, client.read_failures) or monitor.failures
        exceptions = self._detail(run_id, client.read_exceptions) or ()
        report = self._detail(run_id, client.read_report)
        kept = dump_json(failures_to_json(failures, exceptions)).encode()
        self.store.keep_artefact(run_id, FAILURES, kept)
        if report:
            self.store.keep_artefact(run_id, LOCUST_REPORT, report)

    def _detail(self, run_id: str, read: Callable[[], Any]) -> Any:
        """What `read` gives, or None: an end must not depend on it, whatever goes wrong is logged."""
        try:
            return read()
        except LocustError as error:
            log("details not kept", run=run_id, why=error.message)
        except Exception as error:  # noqa: BLE001 - see above
            log_unforeseen("details", error, run=run_id)
        return None

    def failures(self, run: Run) -> dict[str, Any]:
        """Failures and exceptions of a run: kept ones of a run that is over, else Locust's of now."""
        kept = self.store.artefact(run.id, FAILURES)
        if kept is not None:
            return json.loads(kept)
        monitor = self.monitors.get(run.id)
        if monitor is None:
            return failures_to_json((), ())
        client = monitor.cluster.client
        if not run.is_final:
            return failures_to_json(client.read_failures() or monitor.failures, client.read_exceptions())
        # Its details are just being kept: whatever Locust answers, a final run has an answer.
        failures = self._detail(run.id, client.read_failures) or monitor.failures
        return failures_to_json(failures, self._detail(run.id, client.read_exceptions) or ())

    # ---- load whose run is over

    def clean_up_soon(self, cluster: Cluster, delay_s: float = 0.0) -> None:
        work = functools.partial(self._clean_up_reserved, cluster)
        self.timer.in_thread(delay_s, f"clean-up {cluster.id}", work)

    def clean_up_late_start(self, run: Run) -> None:
        """A test began whose run we had given up: a load without a run."""
        cluster = self.pool.find(run.cluster_id)
        if cluster is None:
            return
        self._add_cleanup(run.id, cluster, 0.0)

    def _add_cleanup(self, run_id: str, cluster: Cluster, certain_s: float) -> None:
        self.pool.add_cleanup(run_id, cluster.id, certain_s)
        self.store.keep_cleanup(run_id, cluster.id)
        self.clean_up_soon(cluster)

    def _clean_up_reserved(self, cluster: Cluster) -> None:
        """Clean up when no run has the cluster; a start that has it cleans up first, too."""
        if self.is_closing or not self.pool.cleanups_on(cluster):
            return
        if not self.pool.reserve_for_cleanup(cluster):
            self.clean_up_soon(cluster, self.CLEANUP_EVERY_S)
            return
        cleaned_for = self.pool.cleanups_on(cluster)[0].run_id
        next_s: float | None = self.CLEANUP_EVERY_S
        try:
            next_s = self.clean_up(cluster)
        except LocustError as error:
            if cluster.problem is None:
                log("load of an ended run not stopped yet", cluster=cluster.id, why=error.message)
            cluster.problem = error.message
        except Exception as error:  # noqa: BLE001 - the edge: it is tried again
            log_unforeseen("clean-up", error, cluster=cluster.id)
        finally:
            self.pool.release(cluster, cleaned_for)
        if next_s is not None:
            self.clean_up_soon(cluster, next_s)
        self.on_free()

    def clean_up(self, cluster: Cluster) -> float | None:
        """Look at a reserved cluster once, and stop the load of runs that are over, unless another
        test runs there now. Seconds until the next look; None when nothing is left to clean up."""
        is_down = cluster.launched is not None and not cluster.launched.is_running  # its load ended with it
        with cluster.operation:
            for one in self.pool.cleanups_on(cluster):
                if is_down:
                    self._cleaned_up(one)
                    continue
                reading = cluster.read_state(5.0)
                is_anothers = reading.hooks and reading.is_loaded and reading.run_id != one.run_id
                if not is_anothers and (reading.is_loaded or not one.was_stopped):
                    self.stop_load(cluster, one.run_id)
                    one.was_stopped = True
                if monotonic_s() >= one.certain_at:
                    self._cleaned_up(one)
        return self.CLEANUP_LOOK_S if self.pool.cleanups_on(cluster) else None

    def _cleaned_up(self, one: CleanUp) -> None:
        self.store.drop_cleanup(one.run_id)
        self.pool.drop_cleanup(one.run_id)
        log("load of an ended run is stopped", cluster=one.cluster_id, run=one.run_id)


# ---- starting runs -----------------------------------------------------------


def swarm_form(
    run: Run, cluster: Cluster, target: LoadTarget, remaining_s: float | None, rules: OrchestratorConfig
) -> dict[str, Any]:
    """The form of Locust's /swarm. All custom arguments go every time, as Locust keeps old ones.

    remaining_s: what is left of the run's time; None: it has no duration."""
    ends_in = "" if remaining_s is None else str(math.ceil(remaining_s) + RUN_TIME_GRACE_S)
    lease = str(rules.lease_s) if run.duration_s is None and rules.lease_s else ""
    form: dict[str, Any] = {
        "user_count": target.users,
        "spawn_rate": target.spawn_rate or 1,
        "run_id": run.id,
        "tenant_id": run.tenant_id,
        "env_id": run.env_id,
        "lm_stop_after": ends_in,
        "lm_lease": lease,
        "lm_push": push_interval(run.thresholds),
        "lm_tags": ",".join(run.plan.tags),
        "lm_exclude_tags": ",".join(run.plan.exclude_tags),
    }
    form.update(
        (name, str(value).lower() if isinstance(value, bool) else value)
        for name, value in (run.plan.options or {}).items()
    )
    host = run.plan.host or (cluster.config.launcher.host if cluster.config.launcher else None)
    if host:
        form["host"] = host
    if run.plan.user_classes:
        form["user_classes"] = run.plan.user_classes
    if ends_in and cluster.client.version() >= RUN_TIME_CANCELLED_SINCE:
        form["run_time"] = ends_in
    return form


class ClusterScaling:
    """Launched clusters are started, put to sleep and woken, and workers scaled, here."""

    SLEEP_LOOK_S = 1.0

    def __init__(self, pool: ClusterPool, timer: Timer):
        self._pool = pool
        self._timer = timer
        self._control_plane_url = ""
        self.is_closing = False

    def launch_all(self, control_plane_url: str) -> None:
        """Launch the clusters that are always there; the others start when a run needs them."""
        self._control_plane_url = control_plane_url
        for cluster in self._pool.clusters.values():
            launcher = cluster.config.launcher
            if cluster.launched and not (launcher and launcher.idle_s):
                self.launch(cluster, None)
        self._timer.after(self.SLEEP_LOOK_S, self._look_for_sleepers)

    def launch(self, cluster: Cluster, locustfile: str | None) -> None:
        launched = cluster.launched
        assert launched is not None
        launched.start(self._control_plane_url, locustfile)
        cluster.client.moved_to(launched.base_url)
        cluster.problem = launched.problem
        cluster.workers_wanted = launched.workers
        cluster.patient_until = monotonic_s() + WORKERS_PATIENCE_S

    def bring_up(self, cluster: Cluster, run: Run) -> None:
        """Wake the cluster, with the scenario's locustfile, and ask for the workers that the run
        needs; whether they came is seen when it is idle."""
        launched, launcher = cluster.launched, cluster.config.launcher
        if launched and not launched.problem:
            wanted_file = run.plan.locustfile or (launcher.locustfile if launcher else None)
            if launched.is_running and launched.locustfile != wanted_file:
                if cluster.is_loaded():
                    raise cluster.runs_another_test()
                launched.stop()
            if not launched.is_running:
                self.launch(cluster, wanted_file)
        workers = workers_for(run.target_users, launcher)
        if workers is None or (launched and launched.problem):
            return
        if launched:
            if workers > launched.workers:
                cluster.scale(workers)
        elif not cluster.is_loaded(min_workers=workers):
            cluster.scale(workers)

    def scale(self, cluster: Cluster, workers: int) -> None:
        """Change the number of workers now; users of a running load are rebalanced as they come
        and go. Conflict for a cluster whose workers are not ours, LocustError when it fails."""
        launcher = cluster.config.launcher
        if launcher is None:
            raise Conflict(f"cluster {cluster.id} has no launcher: its workers are started elsewhere")
        lowest = 1 if cluster.launched else 0
        if not lowest <= workers <= launcher.max_workers:
            why = f"must be a whole number from {lowest} to {launcher.max_workers} (maxWorkers)"
            raise InvalidInput(f"workers: {why}", {"workers": why})
        if cluster.is_asleep:
            if not cluster.operation.acquire(timeout=IDLE_WAIT_S):
                raise LocustTimeout(f"cluster {cluster.id} is being started or stopped")
            try:
                self.launch(cluster, None)
            finally:
                cluster.operation.release()
        cluster.idle_since = monotonic_s()
        cluster.scale(workers)  # a command of the user's may take long: it must delay no stop

    def _look_for_sleepers(self) -> None:
        if self.is_closing:
            return
        for cluster in self._pool.clusters.values():
            launcher = cluster.config.launcher
            if not launcher or not launcher.idle_s or cluster.is_asleep:
                continue
            if self._pool.is_unused_for(cluster, launcher.idle_s):
                self._timer.in_thread(0.0, "sleep", functools.partial(self._put_to_sleep, cluster))
        self._timer.after(self.SLEEP_LOOK_S, self._look_for_sleepers)

    def _put_to_sleep(self, cluster: Cluster) -> None:
        """Stop a launched cluster, or scale away the workers of another, unless it is in use."""
        launcher = cluster.config.launcher
        assert launcher is not None
        if not cluster.operation.acquire(blocking=False):
            return
        try:
            is_down = cluster.launched is None and cluster.workers_wanted == 0
            if is_down or cluster.is_asleep or not self._pool.is_unused_for(cluster, launcher.idle_s or 0):
                return
            if cluster.is_loaded():
                return
            if cluster.launched:
                cluster.launched.stop()
                log("cluster sleeps", cluster=cluster.id)
            else:
                cluster.scale(0)
        except LocustError as error:
            cluster.idle_since = monotonic_s()  # not again at once
            cluster.problem = error.message
            log("cluster not put to sleep", cluster=cluster.id, why=error.message)
        finally:
            cluster.operation.release()


class RunStarter:
    """Starts a test on a reserved cluster: brings the cluster up, waits until it is idle, checks
    the load profile, keeps the run, starts it and has it watched."""

    def __init__(self, stopper: RunStopper, scaling: ClusterScaling):
        self._stopper = stopper
        self._store = stopper.store
        self._pool = stopper.pool
        self._rules = stopper.rules
        self._scaling = scaling

    def monitor_of(self, run: Run, cluster: Cluster, first: Callable[[], None] | None = None) -> RunMonitor:
        """A monitor for a run, with its threads; NotReady when they cannot be had."""
        monitor = RunMonitor(run, cluster, self._stopper)
        self._stopper.monitors[run.id] = monitor
        try:
            monitor.start_threads(first)
        except NotReady:
            self.drop_monitor(run.id)
            raise
        return monitor

    def drop_monitor(self, run_id: str) -> None:
        """Forget the monitor of a run that was not started."""
        monitor = self._stopper.monitors.pop(run_id, None)
        if monitor:
            monitor.close()

    def start(
        self, cluster: Cluster, run: Run, monitor: RunMonitor, idempotency: tuple[str, str] | None = None
    ) -> Run:
        """Start the run on its cluster, which is reserved for it, and keep it if it is not kept yet.
        LocustError, ClusterBusy, InvalidInput or NotReady when that is not possible."""
        if not cluster.operation.acquire(timeout=IDLE_WAIT_S):
            raise LocustTimeout(f"cluster {cluster.id} is still busy with an earlier stop")
        try:
            self._scaling.bring_up(cluster, run)
            reading = self._wait_until_idle(cluster)
            self._check_plan(cluster, run.plan, reading)
            run = replace(run, cluster_id=cluster.id, queued=False, queue_position=None)
            if self._store.find(run.id) is None:
                run = self._store.add(run, idempotency)
            elif not self._leaves_queue(run):
                raise Conflict(f"run {run.id} was cancelled")
            monitor.set_deadline(run.duration_s)
            monitor.was_sent = True
            form = swarm_form(run, cluster, monitor.target, monitor.remaining_s(), self._rules)
            cluster.client.swarm(form)
        finally:
            cluster.operation.release()
        self._note_what_was_found(cluster, run, reading)
        return self.started(run.id)

    def _leaves_queue(self, run: Run) -> bool:
        """Keep where a waiting run starts; False when it was cancelled meanwhile."""
        kept = self._store.update(run.id, cluster_id=run.cluster_id, queued=False, queue_position=None)
        if kept is None or kept.is_final:
            return False
        self._store.wait_durable_or_log()
        return True

    def _note_what_was_found(self, cluster: Cluster, run: Run, reading: Reading) -> None:
        if reading.locustfile_sha256:
            self._store.update(run.id, locustfile_sha256=reading.locustfile_sha256)
        live = len(reading.live_workers)
        if cluster.workers_wanted > live and reading.distributed:
            words = f"{live} of {cluster.workers_wanted} workers came in time{cluster.count_workers()}"
            self._stopper.warn(run.id, "workers_missing", words)
        if not reading.hooks:
            self._stopper.warn(run.id, "hooks_absent", _hooks_absent_sentence(run))

    def started(self, run_id: str) -> Run:
        """Locust took the start: Pending becomes Running, once, whoever hears it first."""
        try:
            run = self._store.transition(run_id, RunStatus.RUNNING, started_at=time.time())
        except Conflict:
            return self._store.get(run_id)  # a callback was faster, or it is over already
        monitor = self._stopper.monitors.get(run_id)
        if monitor:
            monitor.arm(run, run.duration_s)
        log(
            "run started",
            run=run.id,
            cluster=run.cluster_id,
            users=run.target_users,
            duration_s=run.duration_s,
        )
        return self._store.get(run_id)

    def _check_plan(self, cluster: Cluster, plan: LoadProfile, reading: Reading) -> None:
        """InvalidInput when the cluster's Locust cannot run what is planned."""
        abilities = reading.abilities
        is_special = plan.user_classes or plan.options or plan.tags or plan.exclude_tags
        if abilities is None and not reading.hooks and is_special:
            abilities = cluster.client.read_abilities()
        refusal = plan_refusal(plan, abilities)
        if refusal:
            raise InvalidInput(f"{refusal[0]}: {refusal[1]}", {refusal[0]: refusal[1]})

    def _wait_until_idle(self, cluster: Cluster) -> Reading:
        """The reading of an idle cluster, waiting (bounded) for one that is starting or still
        stopping. ClusterBusy when another test runs there, LocustError otherwise."""
        if cluster.launched and cluster.launched.problem:
            raise LocustUnreachable(f"cluster {cluster.id} is not launched: {cluster.launched.problem}")
        give_up_at = max(monotonic_s() + IDLE_WAIT_S, cluster.patient_until)
        self._clean_up_first(cluster, give_up_at)
        while True:
            state, reading, error = self._look_for_idle(cluster)
            if state is Idleness.IDLE and reading:
                cluster.patient_until = -math.inf
                return reading
            if error and cluster.launched and (why := cluster.launched.why_dead()):
                raise LocustUnreachable(f"cluster {cluster.id} does not run: {why}")
            is_patient = monotonic_s() < give_up_at
            if error and not (is_patient and cluster.launched):
                raise error
            if state is Idleness.LOADED and not self._is_from_before_stop(cluster, reading):
                raise cluster.runs_another_test()
            if not is_patient or self._is_hopeless(cluster, state):
                counted = cluster.count_workers() if state is Idleness.NO_WORKERS else ""
                words = state.value if state else "does not answer"
                raise LocustUnreachable(f"cluster {cluster.id} {words}{counted}")
            time.sleep(0.1 if reading is None or not reading.cached else 0.5)

    def _is_from_before_stop(self, cluster: Cluster, reading: Reading | None) -> bool:
        """A cached state may still be that of the test we stopped there."""
        is_cached = reading is not None and reading.cached
        return is_cached and monotonic_s() - cluster.stopped_at < STATS_CACHE_S + 0.5

    def _is_hopeless(self, cluster: Cluster, state: Idleness | None) -> bool:
        """No worker is there, and none is on its way."""
        if state is not Idleness.NO_WORKERS or cluster.launched or monotonic_s() < cluster.patient_until:
            return False
        just_stopped = monotonic_s() - cluster.stopped_at < IDLE_WAIT_S
        return not (just_stopped and cluster.had_workers)

    def _clean_up_first(self, cluster: Cluster, give_up_at: float) -> None:
        """Stop the load of runs that have ended here, before another is started."""
        while self._pool.cleanups_on(cluster):
            next_s = self._stopper.clean_up(cluster)
            if next_s is None:
                return
            if monotonic_s() + next_s > give_up_at:
                left_s = max(one.certain_at for one in self._pool.cleanups_on(cluster)) - monotonic_s()
                raise ClusterBusy(
                    f"a start on cluster {cluster.id} was interrupted, and its load may still come; try again in {left_s:.0f} s",
                    retry_after_s=math.ceil(max(1.0, left_s)),
                )
            time.sleep(next_s)

    def _look_for_idle(self, cluster: Cluster) -> tuple[Idleness | None, Reading | None, LocustError | None]:
        wanted = max(1, cluster.workers_wanted) if monotonic_s() < cluster.patient_until else 1
        try:
            reading = cluster.read_state()
        except LocustError as error:
            cluster.problem = error.message
            return None, None, error
        return idleness(reading, wanted), reading, None


# ---- the orchestrator --------------------------------------------------------


class Orchestrator:
    """Creates, stops, adopts and registers runs. Public methods may be called from any thread and
    may wait for Locust."""

    QUEUE_RETRY_S = 3.0

    def __init__(self, config: Config, store: Store, timer: Timer):
        self.config = config
        self.rules = config.orchestrator
        self.store = store
        self.timer = timer
        self.pool = ClusterPool(config, store, timer)
        self._judge = RunJudge(store)
        self._stopper = RunStopper(config, store, timer, self.pool, self._judge)
        self._scaling = ClusterScaling(self.pool, timer)
        self._starter = RunStarter(self._stopper, self._scaling)
        self._monitors = self._stopper.monitors
        self._stopper.on_free = self._dispatch_queue
        self.pool.users_of = self._users_of
        self._queue_retry: ScheduledCall | None = None
        self._is_closing = False
        self._tenants = {tenant.id: tenant for tenant in config.tenants}
        self._environments = {(item.tenant_id, item.id): item for item in config.environments}

    @property
    def clusters(self) -> dict[str, Cluster]:
        return self.pool.clusters

    def _users_of(self, run_id: str) -> int:
        monitor = self._monitors.get(run_id)
        return monitor.target.users if monitor else 0

    # ---- start and end of the program

    def launch_clusters(self, control_plane_url: str) -> None:
        self._scaling.launch_all(control_plane_url)

    def reconcile(self) -> None:
        """Settle what an earlier process left: waits (bounded) for overdue stops only."""
        for run_id, cluster_id in self.store.cleanups().items():
            self.pool.add_cleanup(run_id, cluster_id, START_SETTLES_S)
        overdue: list[RunMonitor] = []
        for run in self.store.active_runs():
            if run.queued:
                self.pool.enqueue(run.id)
                continue
            monitor = self._take_over_or_later(run)
            if monitor and run.deadline_at and run.deadline_at <= time.time():
                overdue.append(monitor)
        for cluster in self.clusters.values():
            if self.pool.cleanups_on(cluster):
                self._stopper.clean_up_soon(cluster)
        give_up_at = monotonic_s() + 2
        for monitor in overdue:
            monitor.final.wait(max(0.0, give_up_at - monotonic_s()))
        self._forget_old()
        self._dispatch_queue()

    def _take_over_or_later(self, run: Run) -> RunMonitor | None:
        try:
            return self._take_over(run)
        except NotReady as error:
            log("run waits for a thread that watches it", run=run.id, why=error.message)
            self.timer.after(1.0, functools.partial(self._take_over_or_later, run))
            return None

    def _take_over(self, run: Run) -> RunMonitor | None:
        """A monitor for a run that an earlier process left; its watch thread settles what became of it."""
        log("run found after a restart", run=run.id, status=run.status.value, cluster=run.cluster_id)
        cluster = self.pool.find(run.cluster_id)
        if cluster is None:
            words = f"cluster {run.cluster_id} is gone from the configuration: stop its load by hand"
            self._stopper.fail(run.id, words)
            return None
        self.pool.reserve_again(run, cluster)
        monitor = self._starter.monitor_of(run, cluster, functools.partial(self._reconcile, run))
        monitor.adopted(run, self._stopper.last_requests(run.id))
        return monitor

    def _reconcile(self, run: Run) -> None:
        monitor, run = self._monitors[run.id], self.store.get(run.id)
        if monitor.cluster.launched:
            words = (
                "its cluster ended with the Load Manager that had launched it; the numbers are its last ones"
            )
            self._stopper.fail(run.id, words)
        elif run.status is RunStatus.PENDING:
            self._reconcile_pending(run, monitor)
        elif run.status is RunStatus.STOPPING:
            monitor.end_with(functools.partial(self._stopper.carry_out_stop, monitor))
        elif run.deadline_at is not None and run.deadline_at <= time.time():
            self._stopper.begin_stop(run.id, "duration")
        else:
            self._adopt(run, monitor)

    def _adopt(self, run: Run, monitor: RunMonitor) -> None:
        """Go on watching with what is left of its time: never more than its duration,
        whatever the clock did meanwhile."""
        remaining = None
        if run.deadline_at is not None and run.duration_s is not None:
            remaining = min(run.deadline_at - time.time(), float(run.duration_s))
        monitor.arm(run, remaining)
        if run.plan.stages:
            monitor.post(monitor.begin_stage)  # a stage may have begun meanwhile
        log("run adopted", run=run.id, cluster=run.cluster_id, remaining_s=remaining)

    def _reconcile_pending(self, run: Run, monitor: RunMonitor) -> None:
        """Its start was interrupted: adopted when Locust runs it already. Otherwise the start may
        still be on its way, so that the cluster is looked at until it cannot be any more."""
        why = "Load Manager ended before the start was confirmed"
        try:
            reading = monitor.cluster.read_state()
            if reading.hooks and reading.run_id == run.id:
                started_at = min(reading.test_started_at or time.time(), time.time())
                run = self.store.transition(run.id, RunStatus.RUNNING, started_at=started_at)
                self._adopt(run, monitor)
                return
        except LocustError as error:
            why += f", and {error.message}"
        self._stopper.fail(run.id, why, cleanup=True, certain_s=START_SETTLES_S)

    def shutdown(self) -> None:
        """Refuse new runs, end what must end with us, within about 4 s."""
        self._is_closing = self._stopper.is_closing = self._scaling.is_closing = True
        active = (RunStatus.RUNNING, RunStatus.STOPPING)
        ending = [run for run in self.store.active_runs() if run.status in active and self._ends_with_us(run)]
        for run in ending:
            self._stopper.begin_stop(run.id, "shutdown")
        give_up_at = monotonic_s() + 3.2
        for run in ending:
            monitor = self._monitors.get(run.id)
            is_final = monitor is None or monitor.final.wait(max(0.0, give_up_at - monotonic_s()))
            if not is_final and self.clusters[run.cluster_id].launched:
                words = "Load Manager was stopped, and its launched cluster with it"
                self._stopper.fail(run.id, words, stop_reason="shutdown")
        for cluster in self.clusters.values():
            if cluster.launched:
                cluster.launched.stop(2.0)

    def _ends_with_us(self, run: Run) -> bool:
        cluster = self.pool.find(run.cluster_id)
        return cluster is not None and (self.rules.on_shutdown == "stop" or cluster.launched is not None)

    def _forget_old(self) -> None:
        """Remove what storage.retentionDays says, now and every hour."""
        if not self.config.storage.retention_days:
            return
        gone = self.store.delete_older(time.time() - self.config.storage.retention_days * 86400)
        if gone:
            log("old runs removed", runs=gone)
        self.timer.in_thread(3600, "retention", self._forget_old)

    # ---- creating

    def create(
        self,
        request: RunRequest,
        created_by: str,
        source: str = "api",
        idempotency: tuple[str, str] | None = None,
    ) -> Run:
        """Start a run on the first free cluster of its tenant and environment, or queue it. Waits
        (bounded) for a cluster whose run is just ending.

        Raises InvalidInput (no cluster serves them), ClusterBusy, NotReady, and LocustError with
        `runId` of the run that is kept as Failed."""
        if self._is_closing:
            raise NotReady("Load Manager is shutting down", retry_after_s=5)
        candidates = self._candidates(request)
        run = _new_run(request, created_by, source)
        refusal: LoadManagerError | None = None
        left, wait_s = list(candidates), 0.0 if request.queue else IDLE_WAIT_S
        while cluster := self.pool.reserve(run, left, wait_s):
            left.remove(cluster)
            wait_s = 0.0
            try:
                return self._start_reserved(cluster, run, idempotency)
            except ClusterBusy as error:
                refusal = refusal or error
            except LocustError as error:
                if self.store.find(run.id) is not None or not left:
                    raise self._kept_as_failed(cluster, run, error, idempotency) from None
                refusal = error  # nothing was sent: another cluster may take it
        if request.queue:
            return self._enqueue(run, idempotency)
        if isinstance(refusal, LocustError):
            raise self._kept_as_failed(candidates[0], run, refusal, idempotency)
        raise refusal or self.pool.limit_reached(run) or self.pool.busy(candidates)

    def _candidates(self, request: RunRequest) -> list[Cluster]:
        """The clusters that may take the run; InvalidInput or Forbidden when none may."""
        candidates = self.pool.serving(request.tenant_id, request.env_id)
        self.refuse_unsafe(request)
        if not request.plan.locustfile:
            return candidates
        launched = [cluster for cluster in candidates if cluster.launched]
        if not launched:
            why = "its scenario names a locustfile, which only a launched cluster can be started with; this tenant and environment has none"
            raise InvalidInput(f"scenarioId: {why}", {"scenarioId": why})
        return launched

    def _start_reserved(self, cluster: Cluster, run: Run, idempotency: tuple[str, str] | None = None) -> Run:
        """Start a run on the cluster that is reserved for it. Whatever is raised, the cluster is
        given back, unless the run was kept and the start sent: then who catches it fails the run."""
        try:
            monitor = self._starter.monitor_of(run, cluster)
            return self._starter.start(cluster, run, monitor, idempotency)
        except LoadManagerError:
            if self.store.find(run.id) is None or not self._was_sent(run.id):
                self._give_back(cluster, run.id)
            raise
        except Exception as error:
            if self.store.find(run.id) is None:
                self._give_back(cluster, run.id)
            else:
                self._stopper.fail_unforeseen(run.id, error)
            raise

    def _give_back(self, cluster: Cluster, run_id: str) -> None:
        self._starter.drop_monitor(run_id)
        self.pool.release(cluster, run_id)
        self._dispatch_queue()

    def _was_sent(self, run_id: str) -> bool:
        monitor = self._monitors.get(run_id)
        return monitor is not None and monitor.was_sent

    def _kept_as_failed(
        self, cluster: Cluster, run: Run, error: LocustError, idempotency: tuple[str, str] | None
    ) -> LocustError:
        """Keep the run that could not be started, with the reason, and name it in the error."""
        if self.store.find(run.id) is None:
            self.store.add(replace(run, cluster_id=cluster.id), idempotency)
        self._fail_start(run.id, error)
        error.extra["runId"] = run.id
        return error

    def _fail_start(self, run_id: str, error: LocustError) -> None:
        """The start of a kept run failed; where Locust may have taken it, its load is looked for as
        long as the start may be on its way: a late test-start would be a load without a run."""
        may_be_taken = error.maybe_taken and self._was_sent(run_id)
        is_answered = isinstance(error, LocustBadAnswer)
        certain_s = STATS_CACHE_S + 0.5 if is_answered else START_SETTLES_S
        self._stopper.fail(run_id, error.message, cleanup=may_be_taken, certain_s=certain_s)

    def rerun(self, run_id: str, changes: dict[str, Any], created_by: str) -> Run:
        """Start again what a run was asked for."""
        old = self.store.get(run_id)
        request = RunRequest(
            old.tenant_id, old.env_id, old.scenario_id, old.target_users, old.spawn_rate, old.duration_s,
            old.metadata, thresholds=tuple(undecided(threshold) for threshold in old.thresholds),
            compare_with=old.compare_with, plan=old.plan,
        )  # fmt: skip
        return self.create(replace(request, **changes), created_by)

    def refuse_unsafe(self, request: RunRequest) -> None:
        """Forbidden for a load that its tenant or environment may not have; InvalidInput where
        only the confirmation is missing."""
        tenant = self._tenants.get(request.tenant_id)
        place = (request.tenant_id, request.env_id)
        serving = [
            cluster.config for cluster in self.clusters.values()
            if (cluster.config.tenant_id, cluster.config.env_id) == place
        ]  # fmt: skip
        own_hosts = [config.launcher.host if config.launcher else None for config in serving]
        problems = load_refusals(request, tenant, self._environments.get(place), own_hosts)
        if problems:
            kind = InvalidInput if set(problems) == {"confirm"} else Forbidden
            raise kind("; ".join(f"{name}: {why}" for name, why in problems.items()), problems)

    # ---- the queue

    def _enqueue(self, run: Run, idempotency: tuple[str, str] | None) -> Run:
        run = self.store.add(replace(run, queued=True), idempotency)
        self.pool.enqueue(run.id)
        self._dispatch_queue()
        return self.store.get(run.id)

    def _dispatch_queue(self) -> None:
        """Start waiting runs on the clusters that are free; again in a while when some still wait."""
        if self._is_closing:
            return
        for run, cluster in self.pool.next_starts():
            try:
                self._starter.monitor_of(run, cluster, functools.partial(self._start_queued, run, cluster))
            except NotReady as error:
                log("queued run still waits", run=run.id, why=error.message)
                self.pool.release(cluster, run.id)
        if self._queue_retry is None and not self.pool.is_queue_empty():
            self._queue_retry = self.timer.in_thread(self.QUEUE_RETRY_S, "queue", self._retry_queue)

    def _retry_queue(self) -> None:
        self._queue_retry = None
        self._dispatch_queue()

    def _start_queued(self, run: Run, cluster: Cluster) -> None:
        """Start the queue's first, in its watch thread; one whose cluster is not ready still waits."""
        try:
            self._starter.start(cluster, run, self._monitors[run.id])
        except InvalidInput as error:
            self._stopper.fail(run.id, error.message)  # waiting does not make it possible
        except LoadManagerError as error:
            if isinstance(error, LocustError) and self._was_sent(run.id):
                self._fail_start(run.id, error)
                return
            log("queued run still waits", run=run.id, why=error.message)
            # No dispatch: the same cluster would be tried again at once, without end.
            self._starter.drop_monitor(run.id)
            self.pool.release(cluster, run.id)

    # ---- a run that is going on

    def change_users(self, run_id: str, users: int, spawn_rate: float | None, by: str) -> Run:
        """Give a running load another number of users; returns when Locust took it. Conflict
        when the run is not Running, LocustError when Locust does not."""
        run = self.store.get(run_id)
        monitor = self._monitors.get(run_id)
        if run.status is not RunStatus.RUNNING or monitor is None:
            words = f"run {run_id} is {run.status.value}; only the users of a Running one can be changed"
            raise Conflict(words, status=run.status.value)
        if len(run.load_changes) >= MAX_LOAD_CHANGES:
            raise Conflict(
                f"the users of run {run_id} were changed {MAX_LOAD_CHANGES} times, the most there may be"
            )
        why = self.pool.over_users(run, users)
        if why:
            raise Forbidden(f"targetUsers: {why}", {"targetUsers": why})
        change = monitor.change_users(users, spawn_rate, by)
        if change is None:
            raise Conflict(f"run {run_id} is about to end; its users are not changed any more")
        self.store.update(run_id, load_changes=(*self.store.get(run_id).load_changes, change))
        log("users changed", run=run_id, users=users, by=by)
        return self.store.get(run_id)

    # ---- stopping

    def stop(self, run_id: str, reason: str, wait_s: float = STOP_ANSWER_S) -> None:
        """Stop a run; returns when it is final, or Locust confirmed and its final numbers are not
        read in time. Conflict when it is not running, LocustError when Locust did not do it yet: it
        is tried until it does."""
        run = self.store.get(run_id)
        if self.pool.leave_queue(run.id):
            self._stopper.fail(run_id, "cancelled while it waited in the queue", stop_reason=reason)
            return
        monitor = self._stopper.begin_stop(run_id, reason)
        if monitor is None:
            raise self._not_stoppable(self.store.get(run_id))
        outcome = monitor.stop_outcome
        if not outcome.settled.wait(wait_s) and not outcome.is_confirmed:
            words = f"Locust did not confirm the stop within {wait_s:g} s; it is tried until it does"
            raise LocustTimeout(words)
        if outcome.error:
            words = f"{outcome.error.message}; the stop is tried again until it succeeds"
            raise type(outcome.error)(words)

    def stop_all(self, sees: Callable[[Run], bool]) -> dict[str, str | None]:
        """Stop every run that `sees` takes, all clusters at once. By run: None once it is final or
        Locust confirmed, else why not yet; what could not be stopped is tried until it is."""
        wanted = [run for run in self.store.active_runs() if sees(run)]
        outcomes: dict[str, str | None] = {
            run.id: f"did not stop within {STOP_ANSWER_S:g} s; it is tried until it does" for run in wanted
        }
        for run in wanted:  # first, as they would take what gets free
            if self.pool.leave_queue(run.id):
                self._stopper.fail(run.id, "cancelled while it waited in the queue", stop_reason="user")
        left, give_up_at = [run.id for run in wanted], monotonic_s() + STOP_ANSWER_S
        while left and monotonic_s() < give_up_at:
            for run_id in left:
                self._stopper.begin_stop(run_id, "user")  # again: one that was Pending may be Running now
            time.sleep(0.05)
            for run_id in list(left):
                is_settled, why = self._stop_result(run_id)
                if is_settled:
                    outcomes[run_id] = why
                    left.remove(run_id)
        return outcomes

    def _stop_result(self, run_id: str) -> tuple[bool, str | None]:
        """Whether the stop of a run came to something, and why it failed."""
        monitor, run = self._monitors.get(run_id), self.store.find(run_id)
        if run is None or run.is_final:
            return True, None
        if monitor is None or not monitor.stop_outcome.settled.is_set():
            return False, None
        error = monitor.stop_outcome.error
        return True, error.message if error else None

    def _not_stoppable(self, run: Run) -> Conflict:
        words = {
            RunStatus.PENDING: "is still starting; try again in a moment",
            RunStatus.STOPPING: "is already being stopped; the stop is tried until it succeeds",
            RunStatus.RUNNING: "is being taken over after a restart; try again in a moment",
        }.get(run.status, f"is {run.status.value}; only a Running run can be stopped")
        return Conflict(f"run {run.id} {words}", status=run.status.value)

    # ---- what Locust calls back

    def locust_started(self, run_id: str) -> None:
        """The hooks of a run's cluster saw its test start."""
        run = self.store.get(run_id)
        if run.status is RunStatus.PENDING and run.cluster_id and not run.queued:
            run = self._starter.started(run_id)
        monitor = self._monitors.get(run_id)
        if monitor:
            monitor.note_test_start()
        elif run.status is RunStatus.FAILED and time.time() - (run.finished_at or 0) < 120:
            self._stopper.clean_up_late_start(run)

    def locust_measured(self, run_id: str, snapshot: Snapshot) -> None:
        """A push of numbers from the hooks."""
        if not self.store.add_snapshot(run_id, snapshot, "push"):
            return
        monitor = self._monitors.get(run_id)
        if monitor:
            monitor.note_push(snapshot)

    def locust_stopped(self, run_id: str, snapshot: Snapshot | None, complete: bool) -> None:
        """The hooks saw the test end. `complete` numbers (ours flush the workers) are the final
        ones; others are kept until Locust's own report confirms or completes them."""
        run = self.store.get(run_id)
        if run.status is RunStatus.PENDING and run.cluster_id and not run.queued:
            self._starter.started(run_id)
        monitor = self._monitors.get(run_id)
        if monitor is None or self.store.get(run_id).is_final:
            return
        monitor.cluster.seen()
        if snapshot is not None:
            self.store.add_snapshot(run_id, snapshot, "push", is_last=True)
            if complete:
                monitor.note_complete_end(snapshot)
        self._stopper.claim_end(monitor, "locust")  # or our own stop is going on

    def register_external(
        self, request: RunRequest, cluster_id: str | None, reaches: Callable[[str], bool]
    ) -> tuple[str, bool]:
        """The id of the run for a test started in Locust's own page, and whether it is new.
        Conflict when the cluster is just being started or stopped, Forbidden when the caller's
        token `reaches` none of the clusters that it may be on."""
        candidates = self._reached(request, cluster_id, reaches)
        if self._is_closing:
            raise NotReady("Load Manager is shutting down", retry_after_s=5)
        run = replace(_new_run(request, "locust", "ui"), status=RunStatus.RUNNING, started_at=time.time())
        if len(candidates) > 1:
            candidates = sorted(candidates, key=self._runs_unreserved_test, reverse=True)
        cluster = self.pool.reserve_as_is(run, candidates)
        if cluster is None:
            return self._active_there(candidates[0]), False
        try:
            monitor = self._starter.monitor_of(run, cluster)
            run = self.store.add(replace(run, cluster_id=cluster.id))
        except NotReady:
            self._give_back(cluster, run.id)
            raise
        monitor.was_sent = monitor.start_seen = True
        monitor.arm(run, None)
        log("run registered from Locust's page", run=run.id, cluster=cluster.id)
        return run.id, True

    def _reached(
        self, request: RunRequest, cluster_id: str | None, reaches: Callable[[str], bool]
    ) -> list[Cluster]:
        """The clusters that a test of Locust's page may be on."""
        serving = self.pool.serving(request.tenant_id, request.env_id)
        candidates = [cluster for cluster in serving if reaches(cluster.id)]
        if not candidates:
            why = "the callback token is not that of a cluster of this tenant and environment"
            raise Forbidden(why, {"tenantId": why})
        named = [cluster for cluster in candidates if cluster_id in (None, "", cluster.id)]
        if not named:
            why = "is not a cluster of this tenant and environment"
            raise InvalidInput(f"clusterId: {why}", {"clusterId": why})
        return named

    def _runs_unreserved_test(self, cluster: Cluster) -> bool:
        if self.pool.active_run_id(cluster) is not None:
            return False
        try:
            return cluster.read_state(2.0).is_loaded
        except LocustError:
            return False

    def _active_there(self, cluster: Cluster) -> str:
        run = self.store.find(self.pool.active_run_id(cluster) or "")
        if run is None or run.status not in (RunStatus.PENDING, RunStatus.RUNNING):
            words = f"cluster {cluster.id} is just being started or stopped; register again in a moment"
            raise Conflict(words)
        return run.id

    # ---- what is there

    def failures(self, run: Run) -> dict[str, Any]:
        """Failures and exceptions of a run: kept ones of a run that is over, else Locust's of now."""
        return self._stopper.failures(run)

    def scale_cluster(self, cluster: Cluster, workers: int) -> None:
        """Change a cluster's number of workers now; Conflict, InvalidInput or LocustError when it fails."""
        self._scaling.scale(cluster, workers)
        monitor = self._monitors.get(self.pool.active_run_id(cluster) or "")
        if monitor:
            monitor.workers_scaled(workers)

    def read_logs(self, cluster: Cluster, lines: int) -> list[dict[str, Any]]:
        """The last lines of the processes of a cluster: a launched one's files, else what Locust itself tells."""
        if cluster.launched:
            return cluster.launched.read_logs(lines)
        return cluster.client.read_logs(lines)

    def list_clusters(self, seen_by: Callable[[Cluster], bool]) -> list[dict[str, Any]]:
        """The clusters as JSON-able dicts; all are asked at once, for 2 s at most."""
        wanted = [cluster for cluster in self.clusters.values() if seen_by(cluster)]
        answers: dict[str, Reading | str] = {}

        def ask(cluster: Cluster) -> None:
            if cluster.is_asleep:
                answers[cluster.id] = ""
                return
            try:
                answers[cluster.id] = cluster.read_state(2.0)
            except LocustError as error:
                answers[cluster.id] = error.message

        threads = [start_thread("ask", functools.partial(ask, cluster)) for cluster in wanted]
        give_up_at = monotonic_s() + 2.2
        for thread in threads:
            thread.join(max(0.0, give_up_at - monotonic_s()))
        return [
            self._cluster_to_json(cluster, answers.get(cluster.id, "did not answer within 2 s"))
            for cluster in wanted
        ]

    def _cluster_to_json(self, cluster: Cluster, answer: Reading | str) -> dict[str, Any]:
        place = (cluster.config.tenant_id, cluster.config.env_id)
        environment = self._environments.get(place)
        return {
            **_cluster_to_json(cluster, answer),
            "activeRunId": self.pool.active_run_id(cluster),
            "protected": environment is not None and environment.protected,
        }


def _new_run(request: RunRequest, created_by: str, source: str) -> Run:
    import uuid

    return Run(
        id=str(uuid.uuid4()),
        tenant_id=request.tenant_id,
        env_id=request.env_id,
        cluster_id="",
        scenario_id=request.scenario_id,
        target_users=request.target_users,
        spawn_rate=request.spawn_rate,
        status=RunStatus.PENDING,
        created_at=time.time(),
        duration_s=request.duration_s,
        metadata=request.metadata,
        thresholds=request.thresholds,
        compare_with=request.compare_with,
        plan=request.plan,
        created_by=created_by,
        source=source,
    )


def _hooks_absent_sentence(run: Run) -> str:
    if run.duration_s is None:
        return "the locustfile does not import loadmanager_hooks: this load will not stop by itself if Load Manager ends"
    return "the locustfile does not import loadmanager_hooks: numbers come from polling only"


def _cluster_to_json(cluster: Cluster, answer: Reading | str) -> dict[str, Any]:
    reading = answer if isinstance(answer, Reading) else None
    problem = cluster.problem if reading else str(answer) or None
    if cluster.launched and cluster.launched.problem:
        problem = cluster.launched.problem
    return {
        "id": cluster.id,
        "tenantId": cluster.config.tenant_id,
        "envId": cluster.config.env_id,
        "baseUrl": cluster.client.base_url,
        "launcher": cluster.config.launcher.type if cluster.config.launcher else None,
        "state": reading.state if reading else "asleep" if cluster.is_asleep else "unreachable",
        "workersWanted": cluster.workers_wanted if cluster.config.launcher else None,
        "userCount": reading.users if reading else None,
        "workers": [
            {"id": w.id, "state": w.state, "userCount": w.users, "cpuPercent": w.cpu_percent}
            for w in reading.workers
        ]
        if reading
        else [],
        "hooks": reading.hooks if reading else None,
        "locustVersion": reading.version or None if reading else None,
        "problem": problem,
    }


# ============================================================================
# 12. SCHEDULES - runs that start by themselves, at moments of a clock on a wall
# ============================================================================
# A moment is taken once: the run's Idempotency-Key is made of the schedule and the moment,
# and is kept with the run in one commit, so that no death of ours doubles or loses one.

CRON_NAMES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip
MONTH_NAMES = {
    name: index + 1 for index, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())
}
DAY_NAMES = {name: index for index, name in enumerate("sun mon tue wed thu fri sat".split())}
CRON_FIELDS = (  # name, least, most, names
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, MONTH_NAMES),
    ("day of week", 0, 7, DAY_NAMES),  # 0 and 7 are Sunday
)
CRON_HORIZON_MONTHS = 8 * 12 + 1  # 29 February may be 8 years away


class Cron(NamedTuple):
    """A cron expression: what each field allows. Where both day fields say something other
    than *, a day that fits either is meant, as cron does."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 is Sunday
    either_day: bool

    def takes_day(self, day: Any) -> bool:
        """Whether a date (datetime.date) is meant."""
        if day.month not in self.months:
            return False
        by_number, by_name = day.day in self.days, (day.weekday() + 1) % 7 in self.weekdays
        return by_number or by_name if self.either_day else by_number and by_name

    def days_from(self, first: Any) -> Iterator[Any]:
        """Yield the days that are meant from a date on; a month that is not meant costs one step."""
        import calendar
        import datetime

        year, month, months_without = first.year, first.month, 0
        while months_without < CRON_HORIZON_MONTHS and year <= datetime.MAXYEAR:
            months_without += 1
            days = range(1, calendar.monthrange(year, month)[1] + 1) if month in self.months else ()
            for day in (datetime.date(year, month, number) for number in days):
                if day >= first and self.takes_day(day):
                    months_without = 0
                    yield day
            year, month = (year, month + 1) if month < 12 else (year + 1, 1)

    def after(self, local: Any) -> Iterator[Any]:
        """Yield the local times (naive datetime) after one, ascending."""
        import datetime

        for day in self.days_from(local.date()):
            for hour in self.hours:
                for minute in self.minutes:
                    moment = datetime.datetime.combine(day, datetime.time(hour, minute))
                    if moment > local:
                        yield moment


def parse_cron(text: str) -> Cron:
    """The expression's meaning; InvalidValue names the field and what is allowed there."""
    words = CRON_NAMES.get(text.strip().lower(), text).split()
    if len(words) != 5:
        names = ", ".join(name for name, *_ in CRON_FIELDS)
        raise InvalidValue(
            f"{_shown(text)}: allowed are five fields ({names}) or one of {', '.join(CRON_NAMES)}"
        )
    values = [_cron_field(word, *field_) for word, field_ in zip(words, CRON_FIELDS)]
    minutes, hours, days, months, weekdays = values
    either_day = not {words[2], words[4]} & {"*", "*/1"}
    cron = Cron(
        tuple(sorted(minutes)),
        tuple(sorted(hours)),
        days,
        months,
        frozenset(day % 7 for day in weekdays),
        either_day,
    )
    longest = max(MONTH_DAYS[month] for month in months)
    if not either_day and min(days) > longest:
        raise InvalidValue(f"{_shown(text)}: there is no such day in these months")
    return cron


MONTH_DAYS = dict(zip(range(1, 13), (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)))


def _cron_field(word: str, name: str, least: int, most: int, names: dict[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        match = re.fullmatch(
            r"(\*|[0-9]{1,2}|[A-Za-z]{3})(?:-([0-9]{1,2}|[A-Za-z]{3}))?(?:/([0-9]{1,2}))?", part
        )
        if not match or (match.group(1) == "*" and match.group(2)):
            raise InvalidValue(
                f"{name} {_shown(part)}: allowed is *, a value, a range such as {least}-{most}, each with /step, joined by commas"
            )
        first, last, step = match.groups()
        begin = least if first == "*" else _cron_value(first, name, least, most, names)
        end = most if first == "*" or (step and not last) else begin
        end = _cron_value(last, name, least, most, names) if last else end
        if first == "*" and most == 7:
            end = 6
        if begin > end or step == "0" or step == "00":
            raise InvalidValue(f"{name} {_shown(part)}: a range goes upwards, and its step is 1 or more")
        found.update(range(begin, end + 1, int(step or 1)))
    return frozenset(found)


def _cron_value(word: str, name: str, least: int, most: int, names: dict[str, int]) -> int:
    value = names.get(word.lower()) if word.isalpha() else int(word)
    if value is None or not least <= value <= most:
        allowed = f"{least} to {most}" + (f" or {', '.join(names)}" if names else "")
        raise InvalidValue(f"{name} {_shown(word)}: allowed is {allowed}")
    return value


def time_zone(name: str) -> Any:
    """The zoneinfo of an IANA name; InvalidValue when it is none, or this machine has no zones."""
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        if name == "UTC":
            import datetime

            return datetime.UTC
        hint = (
            ""
            if zoneinfo.available_timezones()
            else "; this machine has no time zones: install tzdata (a package of the system, or of Python)"
        )
        raise InvalidValue(
            f"{_shown(name)} is no time zone; allowed are IANA names such as Europe/Berlin{hint}"
        ) from None


def times_after(cron: Cron, zone: Any, after: float) -> Iterator[float]:
    """Yield the times (epoch seconds) after one. Of a local clock that is put forward: a time
    that does not exist is the first moment that does. One that is put back: the first of two."""
    import datetime

    def local_at(epoch_s: float) -> Any:
        return datetime.datetime.fromtimestamp(epoch_s, zone)

    around_s = 4 * 3600  # no clock is put forward or back by more
    is_changing = local_at(after - around_s).utcoffset() != local_at(after + around_s).utcoffset()
    last, start = after, local_at(after).replace(tzinfo=None)
    for local in cron.after(start - datetime.timedelta(seconds=around_s if is_changing else 0)):
        moment = _moment_of(local, zone)
        if moment > last:
            last = moment
            yield moment


def next_times(cron: Cron, zone: Any, after: float, count: int = 1) -> list[float]:
    """The first `count` of times_after()."""
    return list(itertools.islice(times_after(cron, zone, after), count))


def _moment_of(local: Any, zone: Any) -> float:
    import datetime

    moment = local.replace(tzinfo=zone).timestamp()
    if datetime.datetime.fromtimestamp(moment, zone).replace(tzinfo=None) == local:
        return moment
    low, high = (
        local.replace(tzinfo=zone, fold=1).timestamp(),
        moment,
    )  # the clock is put forward between the two
    offset = datetime.datetime.fromtimestamp(low, zone).utcoffset()
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if datetime.datetime.fromtimestamp(middle, zone).utcoffset() == offset
            else (low, middle)
        )
    return high


# ---- a schedule ----


@dataclass(frozen=True)
class Schedule:
    """When which run is to start, and what became of the last time. Moments are epoch seconds."""

    id: str
    tenant_id: str
    env_id: str
    test: dict[str, Any]  # the body of a create
    created_at: float
    created_by: str
    cron: str | None = None
    timezone: str = "UTC"
    run_at: float | None = None
    policy: str = "Forbid"
    deadline_s: float = 300.0  # how late a missed run may still start
    paused: bool = False
    description: str = ""
    read_only: bool = False  # it stands in the configuration
    taken_at: float | None = None  # the last moment that was dealt with
    not_before: float | None = None  # since a clock was set back: what came up to here is dealt with
    clock_era: int = 0  # how often that happened: a time that comes twice is another one
    last_run_id: str | None = None
    last_outcome: str | None = None

    @property
    def since(self) -> float:
        """The time up to which all is dealt with."""
        if self.not_before is not None:
            return self.not_before
        return self.created_at if self.taken_at is None else self.taken_at

    @property
    def awaits_run_at(self) -> bool:
        """Whether its one time (runAt) was not dealt with."""
        return self.run_at is not None and (self.taken_at is None or self.taken_at < self.run_at)

    def first_due(self) -> float | None:
        """The first time that was not dealt with, come or not; None for one that is paused or done."""
        if self.paused:
            return None
        if self.cron is None:
            return self.run_at if self.awaits_run_at else None
        return next(iter(self.next_after(self.since)), None)

    def next_after(self, after: float, count: int = 1) -> list[float]:
        """The times to come; none for one that is paused or done."""
        if self.paused:
            return []
        if self.cron is None:
            is_to_come = self.run_at is not None and self.awaits_run_at and self.run_at > after
            return [self.run_at] if is_to_come and self.run_at is not None else []
        after = max(after, self.not_before or 0.0)
        return next_times(parse_cron(self.cron), time_zone(self.timezone), after, count)


def schedule_to_json(schedule: Schedule, upcoming: Iterable[float]) -> dict[str, Any]:
    """A schedule as JSON; upcoming: its next times (epoch seconds)."""
    wire: dict[str, Any] = {
        "id": schedule.id, "tenantId": schedule.tenant_id, "envId": schedule.env_id, "test": schedule.test, "concurrencyPolicy": schedule.policy,
        "startingDeadlineSeconds": schedule.deadline_s, "paused": schedule.paused, "readOnly": schedule.read_only, "timezone": schedule.timezone,
        "createdAt": utc_text(schedule.created_at), "createdBy": schedule.created_by, "next": [utc_text(at) for at in upcoming],
    }  # fmt: skip
    optional = {
        "description": schedule.description or None, "cron": schedule.cron, "runAt": schedule.run_at and utc_text(schedule.run_at),
        "lastTime": schedule.taken_at and utc_text(schedule.taken_at), "lastRunId": schedule.last_run_id, "lastOutcome": schedule.last_outcome,
    }  # fmt: skip
    wire.update((name, value) for name, value in optional.items() if value is not None)
    return wire


def schedule_from_record(text: str) -> Schedule:
    record = json.loads(text)
    known = {item.name for item in fields(Schedule)}
    return Schedule(**{name: value for name, value in record.items() if name in known})


def schedule_to_record(schedule: Schedule) -> str:
    return dump_json({item.name: getattr(schedule, item.name) for item in fields(Schedule)})


def _accept_cron(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    parse_cron(value)
    return value


def _accept_zone(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError
    time_zone(value)
    return value


def _accept_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


SCHEDULE_KEYS = {
    "description": BodyKey("description", text_value("a string", empty=True)),
    "test": BodyKey(
        "test", Check("the body of a create", _accept_object, schema={"type": "object"}), required=True
    ),
    "cron": BodyKey(
        "cron",
        Check("five fields such as 0 2 * * mon-fri, or @daily", _accept_cron, schema={"type": "string"}),
    ),
    "timezone": BodyKey(
        "timezone", Check("an IANA name such as Europe/Berlin", _accept_zone, schema={"type": "string"})
    ),
    "runAt": BodyKey("run_at", MOMENT),
    "concurrencyPolicy": BodyKey("policy", one_of("Forbid", "Queue", "Replace")),
    "startingDeadlineSeconds": BodyKey("deadline_s", number_value(1, 7 * 86400)),
    "paused": BodyKey("paused", BOOLEAN),
}
CHANGE_KEYS = {name: BodyKey(entry.to, entry.check) for name, entry in SCHEDULE_KEYS.items()}


def read_schedule(
    body: Any, scenarios: tuple[ScenarioConfig, ...], before: Schedule | None = None
) -> Schedule:
    """The schedule a body asks for, or one changed by it; InvalidInput with every bad key."""
    problems: dict[str, str] = {}
    values: dict[str, Any] = {}
    try:
        values = check_body(body, SCHEDULE_KEYS if before is None else CHANGE_KEYS)
    except InvalidInput as error:
        problems = error.extra.get("fields", {})
        if not problems:
            raise
    if isinstance(body.get("test"), dict):
        try:
            request = read_create(body["test"], scenarios)
            values.update(tenant_id=request.tenant_id, env_id=request.env_id)
        except InvalidInput as error:
            wrong = error.extra.get("fields") or {"": error.message}
            problems.update((f"test.{name}".rstrip("."), why) for name, why in wrong.items())
    both = [name for name in ("cron", "runAt") if body.get(name) is not None]
    if len(both) == 2 or (before is None and not both):
        problems.setdefault("cron", "allowed is either cron or runAt")
    if problems:
        raise InvalidInput(_joined(problems), problems)
    if before is not None:
        if both:
            values = {"cron": None, "run_at": None, **values}
        return replace(before, **values)
    import uuid

    return Schedule(id=str(uuid.uuid4()), created_at=time.time(), created_by="", **values)


def schedule_problems(config: Config, problems: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong in the configuration's schedules; problems: what is known to be wrong
    elsewhere, of which a schedule is not to blame."""
    seen: set[str] = set()
    wrong = {problem.partition(": ")[0] for problem in problems}
    for index, item in enumerate(config.schedules):
        where = f"schedules[{index}]"
        if item.id in seen:
            yield f"{where}.id: {item.id!r} stands twice; allowed is a unique id"
        seen.add(item.id)
        is_scenario_wrong = any(
            isinstance(item.test, dict)
            and scenario.id == item.test.get("scenarioId")
            and is_part_of(path, f"scenarios[{number}]")
            for number, scenario in enumerate(config.scenarios)
            for path in wrong
        )
        try:
            schedule = _configured_schedule(item, config.scenarios)
        except InvalidInput as error:
            fields_ = error.extra.get("fields") or {"": error.message}
            for name, why in fields_.items():
                if not (is_scenario_wrong and name.startswith("test")):
                    yield f"{where}.{name}: {why}"
            continue
        if not any(path.startswith("locustClusters") for path in wrong):
            yield from _place_problems(config, schedule, where)


def _place_problems(config: Config, schedule: Schedule, where: str) -> Iterator[str]:
    """Why no cluster may ever take the runs of a schedule."""
    environments = {item.env_id for item in config.clusters if item.tenant_id == schedule.tenant_id}
    if schedule.env_id not in environments:
        name = "envId" if environments else "tenantId"
        there_are = environments or {item.tenant_id for item in config.clusters}
        known = ", ".join(sorted(there_are)) or "none"
        yield f"{where}.test.{name}: no cluster serves {_shown(getattr(schedule, 'env_id' if environments else 'tenant_id'))}; there are {known}"
        return
    place = (schedule.tenant_id, schedule.env_id)
    hosts = [
        item.launcher.host if item.launcher else None
        for item in config.clusters
        if (item.tenant_id, item.env_id) == place
    ]
    tenant = next((item for item in config.tenants if item.id == schedule.tenant_id), None)
    environment = next((item for item in config.environments if (item.tenant_id, item.id) == place), None)
    request = read_create(schedule.test, config.scenarios)
    for name, why in load_refusals(request, tenant, environment, hosts).items():
        yield f"{where}.test.{name}: {why}"


def _configured_schedule(item: ScheduleConfig, scenarios: tuple[ScenarioConfig, ...]) -> Schedule:
    body = {
        "description": item.description, "test": item.test, "cron": item.cron, "timezone": item.timezone, "runAt": item.run_at,
        "concurrencyPolicy": item.policy, "startingDeadlineSeconds": item.deadline_s, "paused": item.paused,
    }  # fmt: skip
    schedule = read_schedule({name: value for name, value in body.items() if value is not None}, scenarios)
    return replace(schedule, id=item.id, created_by="configuration", read_only=True)


class _Upcoming(NamedTuple):
    """The next times of a schedule: computed once, and again when it changes or one has come."""

    schedule: Schedule  # the state of it that they are of
    due_at: float | None  # the first that was not dealt with; it may have come
    times: list[float]  # the next ones


class Scheduler:
    """Starts the runs of schedules on time. Public methods may be called from any thread."""

    LOOK_S = 20.0  # at most between two looks at the local clock, which people and NTP change
    RETRY_S = 1.0  # after a failure of our own
    SHOWN_TIMES = 5

    def __init__(
        self,
        config: Config,
        store: Store,
        orchestrator: Orchestrator,
        on_missed: Callable[[Schedule, str], None],
    ):
        self._config = config
        self._store = store
        self._engine = orchestrator
        self._on_missed = on_missed
        self._lock = threading.Lock()  # guards _schedules, _upcoming and _firing, and the order of writes
        self._schedules: dict[str, Schedule] = {}
        self._upcoming: dict[str, _Upcoming] = {}
        self._firing: set[str] = set()
        self._clock: tuple[float, float] = (time.time(), monotonic_s())  # read together
        self._look_now = threading.Event()
        self._closed = False
        self.failures = 0  # exceptions that were not foreseen

    def start(self) -> None:
        """Load what there is; what was missed meanwhile starts once, if it is not too late."""
        kept: dict[str, Schedule] = {}
        for record in self._store.schedule_records():
            try:
                schedule = schedule_from_record(record)
                kept[schedule.id] = after_set_back(schedule, time.time(), None)
            except (ValueError, TypeError) as error:
                log("schedule cannot be read; it is left as it is", record=record[:200], error=repr(error))
        for item in self._config.schedules:
            known, schedule = kept.pop(item.id, None), _configured_schedule(item, self._config.scenarios)
            self._schedules[item.id] = schedule if known is None else _with_memory_of(known, schedule)
            self._store.keep_schedule(item.id, schedule_to_record(self._schedules[item.id]))
        self._schedules.update((id_, schedule) for id_, schedule in kept.items() if not schedule.read_only)
        start_thread("schedules", self._run)

    def close(self) -> None:
        self._closed = True
        self._look_now.set()

    # ---- what there is -----------------------------------------------------

    def list(self) -> list[Schedule]:
        with self._lock:
            return sorted(
                self._schedules.values(),
                key=lambda schedule: (schedule.tenant_id, schedule.env_id, schedule.created_at),
            )

    def get(self, schedule_id: str) -> Schedule:
        """The schedule, or NotFound."""
        with self._lock:
            schedule = self._schedules.get(schedule_id)
        if schedule is None:
            raise NotFound(f"there is no schedule {schedule_id[:MAX_TEXT]}")
        return schedule

    def to_json(self, schedule: Schedule) -> dict[str, Any]:
        """A schedule with its next times, which are only looked up."""
        return schedule_to_json(schedule, self._upcoming_of(schedule, time.time()).times)

    def _upcoming_of(self, schedule: Schedule, now: float) -> _Upcoming:
        with self._lock:
            kept = self._upcoming.get(schedule.id)
        if kept is None or kept.schedule is not schedule or (kept.times and kept.times[0] <= now):
            kept = _Upcoming(schedule, schedule.first_due(), schedule.next_after(now, self.SHOWN_TIMES))
            with self._lock:
                if self._schedules.get(schedule.id) is schedule:
                    self._upcoming[schedule.id] = kept
        return kept

    def add(self, schedule: Schedule) -> None:
        """Keep a new one; Conflict when there are too many, NotReady when it cannot be written."""
        with self._lock:
            if len(self._schedules) >= MAX_SCHEDULES:
                raise Conflict(f"there are {MAX_SCHEDULES} schedules, the most there may be")
            self._put(schedule)
        try:
            self._store.wait_durable()
        except NotReady:
            self._remove(schedule.id)  # who made it is answered 503, and tries again
            raise
        self._look_now.set()

    def change(self, schedule_id: str, body: Any) -> Schedule:
        """Change one; Conflict for one of the configuration, NotFound for one that is gone."""
        self._own(schedule_id)

        def changed(before: Schedule) -> Schedule:
            schedule = read_schedule(body, self._config.scenarios, before)
            if before.paused and not schedule.paused and schedule.cron:
                schedule = replace(schedule, taken_at=time.time(), not_before=None)
            return schedule  # what was missed while it was paused is not made up for

        schedule = self._update(schedule_id, changed)
        if schedule is None:
            raise NotFound(f"there is no schedule {schedule_id[:MAX_TEXT]}")
        self._store.wait_durable()
        self._look_now.set()
        return schedule

    def delete(self, schedule_id: str) -> None:
        self._own(schedule_id)
        self._remove(schedule_id)
        self._store.wait_durable()

    def _own(self, schedule_id: str) -> Schedule:
        schedule = self.get(schedule_id)
        if schedule.read_only:
            raise Conflict(f"schedule {schedule_id} stands in the configuration; change it there")
        return schedule

    def _update(self, schedule_id: str, change: Callable[[Schedule], Schedule]) -> Schedule | None:
        """Change one from its present state; None when it is gone, and stays so."""
        with self._lock:
            before = self._schedules.get(schedule_id)
            if before is None:
                return None
            schedule = change(before)
            if schedule is not before:
                self._put(schedule)
            return schedule

    def _put(self, schedule: Schedule) -> None:
        self._schedules[schedule.id] = schedule
        self._store.keep_schedule(schedule.id, schedule_to_record(schedule))

    def _remove(self, schedule_id: str) -> None:
        with self._lock:
            self._schedules.pop(schedule_id, None)
            self._upcoming.pop(schedule_id, None)
            self._store.keep_schedule(schedule_id, None)

    # ---- time --------------------------------------------------------------

    def _run(self) -> None:
        """Deal with every time that has come, until close(). Nothing ends this thread."""
        wait_s = 0.0
        while not self._closed:
            self._wait(wait_s)
            try:
                wait_s = self._look()
            except Exception as error:  # noqa: BLE001 - the edge: schedules must go on
                self._note_failure("schedules not looked at", error)
                wait_s = self.RETRY_S

    def _wait(self, wait_s: float) -> None:
        """Wait for so long or until a look is wanted; by the second, so that a clock that was set,
        and what is overdue after a suspend, is noticed soon."""
        until = monotonic_s() + wait_s
        while (left_s := until - monotonic_s()) > 0 and not self._look_now.wait(min(1.0, left_s)):
            if abs(self._clock_moved_s()) >= MIN_CLOCK_STEP_S:
                break
        self._look_now.clear()

    def _clock_moved_s(self) -> float:
        """By how much the local clock was set forward (or back, then negative) since the last look."""
        wall, steady = self._clock
        return (time.time() - wall) - (monotonic_s() - steady)

    def _look(self) -> float:
        """Deal with what is due; the seconds until the next look."""
        now, set_back_s = time.time(), self._set_back_s()
        waits = [self.LOOK_S]
        if set_back_s:
            with self._lock:
                self._upcoming.clear()
        for schedule in [] if self._closed else self.list():
            try:
                waits.append(self._look_at(schedule, now, set_back_s))
            except Exception as error:  # noqa: BLE001 - the edge: the others must go on
                self._note_failure("schedule not looked at", error, schedule=schedule.id)
                waits.append(self.RETRY_S)
        return max(0.01, min(waits))

    def _set_back_s(self) -> float:
        """By how much the local clock was set back since the last look; 0 when it was not."""
        set_back_s = -self._clock_moved_s()
        self._clock = (time.time(), monotonic_s())
        if set_back_s < MIN_CLOCK_STEP_S:
            return 0.0
        log("the clock was set back", seconds=f"{set_back_s:.0f}")
        return set_back_s

    def _look_at(self, schedule: Schedule, now: float, set_back_s: float) -> float:
        """Start its run if that is due; the seconds until its next time."""
        if set_back_s:
            settled = self._update(schedule.id, lambda one: after_set_back(one, now, set_back_s))
            if settled is None:
                return self.LOOK_S
            schedule = settled
        upcoming = self._upcoming_of(schedule, now)
        if upcoming.due_at is not None and upcoming.due_at <= now:
            due = latest_due(schedule, now)
            if due is not None:
                self._take(schedule, due)
        return upcoming.times[0] - now if upcoming.times else self.LOOK_S

    def _take(self, schedule: Schedule, due: float) -> None:
        with self._lock:
            if schedule.id in self._firing:
                return
            self._firing.add(schedule.id)
        try:
            start_thread(f"schedule-{schedule.id[:8]}", functools.partial(self._fire, schedule, due))
        except BaseException:  # no thread to be had: the next look tries again
            with self._lock:
                self._firing.discard(schedule.id)
            raise

    def _fire(self, schedule: Schedule, due: float) -> None:
        """Start the run of one time, or say why not."""
        try:
            try:
                outcome, run_id = self._outcome(schedule, due)
            except Exception as error:  # noqa: BLE001 - the edge: the schedule must go on
                self._note_failure("schedule failed", error, schedule=schedule.id)
                outcome, run_id = (
                    "not started: an error of Load Manager itself; its log has the details",
                    None,
                )
            self._update(
                schedule.id,
                lambda now: replace(
                    now,
                    taken_at=due,
                    not_before=None,
                    last_run_id=run_id or now.last_run_id,
                    last_outcome=outcome,
                ),
            )
            if run_id is None:
                log("schedule missed", schedule=schedule.id, why=outcome)
                self._on_missed(schedule, outcome)
        finally:
            with self._lock:
                self._firing.discard(schedule.id)
            self._look_now.set()  # the next time may have come meanwhile

    def _outcome(self, schedule: Schedule, due: float) -> tuple[str, str | None]:
        """What became of one time, in words, and the run's id if one was started."""
        late_s = time.time() - due
        if late_s > schedule.deadline_s:
            why = f"missed: Load Manager was away at {utc_text(due)}, and came back {late_s:.0f} s later"
            return why, None
        era = f":{schedule.clock_era}" if schedule.clock_era else ""
        return self._start_run(schedule, f"schedule:{schedule.id}:{due:.0f}{era}")

    def _note_failure(self, what: str, error: Exception, **facts: object) -> None:
        import traceback

        self.failures += 1
        log(what, **facts, error=repr(error), failures=self.failures, trace=traceback.format_exc())

    def _start_run(self, schedule: Schedule, key: str) -> tuple[str, str | None]:
        """Outcome in words, and the run's id if one was started."""
        known = self._store.recall_key(key, time.time())
        if known is not None:
            return "started", known[1]
        try:
            request = read_create(schedule.test, self._config.scenarios)
            request = replace(request, queue=request.queue or schedule.policy == "Queue")
            active = self._active_run(schedule)
            if active and schedule.policy == "Forbid":
                return f"skipped: its run {active} is still active", None
            if active and schedule.policy == "Replace":
                self._engine.stop(active, "user")
            run = self._engine.create(request, f"schedule {schedule.id}", "schedule", (key, ""))
            self._note(schedule, run.id, 201, "")
        except LoadManagerError as error:
            self._note(schedule, str(error.extra.get("runId", "")), error.http_status, error.message)
            return f"not started: {error.message}", None
        return "started", run.id

    def _note(self, schedule: Schedule, run_id: str, http_status: int, detail: str) -> None:
        """A start that nobody asked for just now is in the audit like any other."""
        action = f"schedule of {schedule.created_by}" if schedule.created_by else "schedule"
        entry = AuditEntry(
            time.time(),
            f"schedule {schedule.id}",
            "",
            "",
            action,
            schedule.tenant_id,
            schedule.env_id,
            run_id,
            http_status,
            detail,
        )
        self._store.audit(entry)

    def _active_run(self, schedule: Schedule) -> str | None:
        run = self._store.find(schedule.last_run_id or "")
        return run.id if run is not None and not run.is_final else None

    def run_now(self, schedule_id: str, by: str) -> Run:
        """Start its run at once, whatever its policy; the errors of a create."""
        schedule = self.get(schedule_id)
        run = self._engine.create(read_create(schedule.test, self._config.scenarios), by, "schedule")
        self._update(
            schedule_id, lambda now: replace(now, last_run_id=run.id, last_outcome=f"started by {by}")
        )
        return run


def _with_memory_of(known: Schedule, schedule: Schedule) -> Schedule:
    """A schedule of the configuration with what became of it so far."""
    names = ("created_at", "taken_at", "not_before", "clock_era", "last_run_id", "last_outcome")
    return replace(schedule, **{name: getattr(known, name) for name in names})


def latest_due(schedule: Schedule, now: float) -> float | None:
    """The newest time that has come and was not dealt with: of many missed ones only this."""
    if schedule.paused:
        return None
    if schedule.cron is None:
        is_due = schedule.run_at is not None and schedule.run_at <= now and schedule.awaits_run_at
        return schedule.run_at if is_due else None
    cron, zone, since_ = parse_cron(schedule.cron), time_zone(schedule.timezone), schedule.since
    for span_s in (3600.0, 86400.0, 32 * 86400.0, CRON_HORIZON_MONTHS * 31 * 86400.0):
        come = itertools.takewhile(lambda at: at <= now, times_after(cron, zone, max(since_, now - span_s)))
        newest = deque(come, maxlen=1)
        if newest:
            return newest[0]
        if since_ >= now - span_s:
            return None
    return None


MIN_CLOCK_STEP_S = 1.0  # NTP slews less between two looks


def after_set_back(schedule: Schedule, now: float, set_back_s: float | None) -> Schedule:
    """A schedule once the clock was set back behind what it has dealt with; None: not known by how much.

    Its next time is the first that comes more than half an interval after the last one did in
    truth: a nightly run does not start twice in one night, a minutely one does not wait for an hour."""
    if schedule.cron is None or schedule.since <= now:
        return schedule
    if schedule.taken_at is None:
        not_before = now
    elif set_back_s is not None and schedule.not_before is not None:
        not_before = schedule.not_before - set_back_s
    else:
        cron, zone = parse_cron(schedule.cron), time_zone(schedule.timezone)
        interval_s = sum(next_times(cron, zone, schedule.taken_at)) - schedule.taken_at
        taken_at = now if set_back_s is None else min(now, schedule.taken_at - set_back_s)
        not_before = taken_at + interval_s / 2
    return replace(schedule, not_before=not_before, clock_era=schedule.clock_era + 1)


# ============================================================================
# 13. NOTIFICATIONS - what is told to people and programs, at least once
# ============================================================================
# A delivery is written in the commit of the transition it tells of, and is tried by a thread
# of its channel until the receiver has taken it: no run waits, no death of ours loses one.

RETRY_DELIVERY_S = (
    1.0,
    5.0,
    15.0,
    60.0,
    300.0,
    900.0,
)  # after the first try, the second...; the last repeats
GIVE_UP_DELIVERY_S = 24 * 3600.0
DELIVERY_CALL_S = 10.0
LONGEST_RETRY_S = 1.2 * max(RETRY_DELIVERY_S)
SENDERS = 4  # threads of a channel: a receiver that is slow to answer has so many requests at once


def events_of(run: Run) -> tuple[str, ...]:
    """What a run's new status is called, the most telling first; () for what nobody is told."""
    if run.status is RunStatus.RUNNING:
        return ("started",)
    if not run.is_final or run.imported_at is not None:
        return ()
    if run.stop_reason == "lost":
        return ("lost", "failed")
    if run.status is RunStatus.FAILED:
        return ("failed",)
    words = [
        word
        for word, is_so in (
            ("aborted", run.stop_reason == "threshold"),
            (run.verdict or "", run.verdict is not None),
        )
        if is_so
    ]
    return (*words, "finished")


TITLES = {
    "started": "started", "finished": "finished", "passed": "PASSED", "failed": "FAILED", "aborted": "ABORTED by a threshold", "lost": "LOST its cluster",
    "scheduleMissed": "schedule missed",
}  # fmt: skip


def notification_title(event: str, run: Run, snapshot: Snapshot | None) -> str:
    """One line that reads well in a phone's notification."""
    title = f"{TITLES[event]}: {run.scenario_id} on {run.tenant_id}/{run.env_id}"
    if event == "started":
        minutes = f" for {run.duration_s} s" if run.duration_s else ""
        return f"{title}, {run.target_users} users{minutes}"
    figures = []
    if snapshot is not None and snapshot.requests:
        numbers = (
            ("p95", snapshot.p95_ms, " ms"),
            ("errors", snapshot.error_percent, " %"),
            ("", snapshot.rps, " req/s"),
        )
        figures = [f"{name} {value:,.4g}{unit}".strip() for name, value, unit in numbers if value is not None]
    return title + (": " + ", ".join(figures) if figures else "")


def run_details(run: Run) -> list[str]:
    """Why, in sentences, most important first."""
    lines = [run.failure_reason] if run.failure_reason else []
    for threshold in run.thresholds:
        if threshold.result == "failed":
            value = "no data" if threshold.value is None else f"was {_decimal(round(threshold.value, 3))}"
            lines.append(f"{threshold.expr}: {value}")
    lines += list((run.comparison or {}).get("regressions") or ())
    return lines + [
        f"doubtful: {reason}"
        for reason in doubts_of(run)
        if run.status is RunStatus.FINISHED and run.is_final
    ]


class Channel:
    """One receiver: sends a delivery, or raises OSError, LoadManagerError or smtplib's errors."""

    def __init__(self, config: NotificationConfig, folder: str):
        self.config = config
        self._folder = folder

    def wants(self, event: str, tenant_id: str, env_id: str, scenario_id: str) -> bool:
        config = self.config
        return event in config.on and all(
            not allowed or name in allowed
            for allowed, name in (
                (config.tenants, tenant_id),
                (config.environments, env_id),
                (config.scenarios, scenario_id),
            )
        )

    def send(self, delivery: Delivery) -> None:
        if self.config.type == "email":
            self._send_mail(delivery)
        elif self.config.type == "slack":
            self._post({"text": message_text(delivery)}, delivery, {})
        else:
            body = {
                "type": f"run.{delivery.event}",
                "timestamp": utc_text(delivery.created_at),
                "data": delivery.facts,
            }
            self._post(body, delivery, None)

    def _post(self, document: dict[str, Any], delivery: Delivery, headers: dict[str, str] | None) -> None:
        body = dump_json(document).encode()
        if headers is None:
            headers = signature_headers(self.config.secret, delivery.id, time.time(), body)
        status, answer = post_to(self.config.url, body, headers, self.config.allow_private)
        if not 200 <= status < 300:
            raise DeliveryRefused(
                f"HTTP {status} {_printable(answer[:80].decode('utf-8', 'replace').strip())}".strip(),
                is_final=status == 410,
            )

    def _send_mail(self, delivery: Delivery) -> None:
        import email.message
        import email.utils
        import smtplib
        import ssl

        config, smtp = self.config, self.config.smtp
        message = email.message.EmailMessage()
        message["Subject"] = " ".join(delivery.title.split())
        message["From"], message["To"] = config.sender, ", ".join(config.to)
        message["Date"] = email.utils.formatdate(delivery.created_at)
        message["Message-ID"] = (
            f"<{delivery.id}@{config.sender.rpartition('@')[2].strip('>') or 'loadmanager'}>"  # the same at each try
        )
        message.set_content(message_text(delivery))
        context = ssl.create_default_context(
            cafile=os.path.join(self._folder, smtp.ca_file) if smtp.ca_file else None
        )
        if smtp.security == "tls":
            connection: smtplib.SMTP = smtplib.SMTP_SSL(
                smtp.host, smtp.port, timeout=DELIVERY_CALL_S, context=context
            )
        else:
            connection = smtplib.SMTP(smtp.host, smtp.port, timeout=DELIVERY_CALL_S)
        with connection:
            if smtp.security == "starttls":
                connection.starttls(context=context)
            if smtp.username:
                connection.login(smtp.username, smtp.password)
            connection.send_message(message)


class DeliveryRefused(OSError):
    """The receiver answered, and did not take it."""

    def __init__(self, message: str, is_final: bool = False):
        super().__init__(message)
        self.is_final = is_final


def message_text(delivery: Delivery) -> str:
    """Title, details and link as plain text."""
    lines = [delivery.title, *delivery.facts.get("details", ())]
    link = delivery.facts.get("link")
    return "\n".join([*lines, *([link] if link else [])])


def signature_headers(secret: str, message_id: str, at: float, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks 1.0; unsigned without a secret."""
    headers = {"webhook-id": message_id, "webhook-timestamp": str(int(at))}
    if secret:
        signed = f"{message_id}.{int(at)}.".encode() + body
        digest = hmac.new(webhook_key(secret), signed, hashlib.sha256).digest()
        headers["webhook-signature"] = "v1," + base64.b64encode(digest).decode()
    return headers


def webhook_key(secret: str) -> bytes:
    """The key of a whsec_ secret; ValueError when it is none."""
    return base64.b64decode(secret.removeprefix("whsec_"), validate=True)


def post_to(url: str, body: bytes, headers: dict[str, str], allow_private: bool) -> tuple[int, bytes]:
    """Status and the answer's beginning. The address that is connected to is the one that was
    checked; redirects are not followed, as they could lead anywhere."""
    import ssl

    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = allowed_address(parts.hostname or "", port, allow_private)
    give_up_at = monotonic_s() + DELIVERY_CALL_S
    sock: Any = socket.create_connection(address, timeout=DELIVERY_CALL_S)
    try:
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
        connection = http.client.HTTPConnection(parts.hostname or "", port, timeout=DELIVERY_CALL_S)
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(
            "POST",
            target,
            body,
            {"Content-Type": JSON_TYPE, "User-Agent": f"loadmanager/{VERSION}", **headers},
        )
        sock.settimeout(max(0.1, give_up_at - monotonic_s()))
        response = connection.getresponse()
        return response.status, response.read(1000)
    except http.client.HTTPException as error:
        raise OSError(f"answered no HTTP: {error!r}") from None
    finally:
        sock.close()


def allowed_address(host: str, port: int, allow_private: bool) -> tuple[str, int]:
    """An address of the host that may be called; OSError when all are of this machine or of a
    private network, which a webhook of somebody else's must not reach."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"{host} cannot be found: {getattr(error, 'strerror', None) or error}") from None
    good = [
        address
        for address in found
        if allow_private or ipaddress.ip_address(address.partition("%")[0]).is_global
    ]
    if not good:
        raise OSError(f"{host} is a private address ({found[0]}); allowed only with allowPrivateAddresses")
    return good[0], port


class Notifier:
    """Turns changes into deliveries, and delivers them."""

    def __init__(self, config: Config, store: Store):
        self._store = store
        self._public_url = (
            config.server.public_url or f"http://{host_to_call(config.server.host)}:{config.server.port}"
        ).rstrip("/")
        self.channels = {item.id: Channel(item, config.folder) for item in config.notifications}
        self._changed = threading.Condition()
        self._closed = False
        self._names_secrets = [
            value
            for item in config.notifications
            for value in (item.secret, item.smtp.password, urlsplit(item.url).path)
            if len(value) > 3
        ]
        self._picking = threading.Lock()  # guards _in_hand; the store's lock may be taken within
        self._in_hand: dict[str, Delivery] = {}
        if self.channels:
            store.deliveries_for = self._of_transition
            store.deliveries_ready = self._wake

    def start(self) -> None:
        self._end_unreachable()
        for channel in self.channels.values():
            for _ in range(SENDERS):
                start_thread(f"notify-{channel.config.id}", functools.partial(self._deliver_all, channel))

    def _end_unreachable(self) -> None:
        """End what waits for a channel that the configuration has no more: it would wait for ever."""
        for one in self._store.waiting_deliveries():
            if one.channel_id not in self.channels:
                problem = f"there is no notification {one.channel_id} in the configuration any more"
                self._store.keep_delivery(one._replace(ended_at=time.time(), problem=problem))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ---- what is to be told ------------------------------------------------

    def _of_transition(self, run: Run, snapshot: Snapshot | None) -> list[Delivery]:
        """Called under the store's lock, before the commit of a transition."""
        events = events_of(run)
        found = []
        for channel in self.channels.values():
            wanted = [
                event for event in events if channel.wants(event, run.tenant_id, run.env_id, run.scenario_id)
            ]
            if wanted:
                found.append(self._of_run(channel, wanted[0], run, snapshot))
        return found

    def _of_run(self, channel: Channel, event: str, run: Run, snapshot: Snapshot | None) -> Delivery:
        facts = run_to_json(run)
        facts["lastMetrics"] = snapshot_to_json(snapshot._replace(endpoints=None)) if snapshot else None
        facts.update(
            details=run_details(run) if run.is_final else [], link=f"{self._public_url}/#/runs/{run.id}"
        )
        return _new_delivery(
            channel, event, notification_title(event, run, snapshot), facts, run.id, run.tenant_id
        )

    def schedule_missed(self, schedule: Schedule, why: str) -> None:
        """Tell that a schedule did not start its run."""
        scenario_id = str(schedule.test.get("scenarioId"))
        for channel in self.channels.values():
            if channel.wants("scheduleMissed", schedule.tenant_id, schedule.env_id, scenario_id):
                name = schedule.description or schedule.id
                title = f"{TITLES['scheduleMissed']}: {name}, {scenario_id} on {schedule.tenant_id}/{schedule.env_id}"
                facts = {
                    "scheduleId": schedule.id,
                    "tenantId": schedule.tenant_id,
                    "envId": schedule.env_id,
                    "details": [why],
                    "link": f"{self._public_url}/",
                }
                self._store.keep_delivery(
                    _new_delivery(channel, "scheduleMissed", title, facts, "", schedule.tenant_id)
                )
        self._wake()

    def test(self, channel_id: str) -> None:
        """Send a message now; NotFound, or LocustError-like failures as Unreachable with the reason."""
        channel = self.channels.get(channel_id)
        if channel is None:
            raise InvalidInput(
                f"id: allowed are {', '.join(self.channels) or 'none: there are no notifications'}",
                {"id": "is no notification of the configuration"},
            )
        facts = {"details": ["This is a test."], "link": f"{self._public_url}/"}
        delivery = _new_delivery(channel, "finished", f"Load Manager can reach {channel_id}", facts, "", "")
        problem, _ = self._try(channel, delivery)
        if problem:
            raise DeliveryFailed(f"notification {channel_id}: {problem}")

    # ---- delivering --------------------------------------------------------

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _deliver_all(self, channel: Channel) -> None:
        """One thread of a channel: what is due is sent, each thing by one of them."""
        while not self._closed:
            delivery, wait_s = self._pick(channel)
            if delivery is None:
                with self._changed:
                    self._changed.wait(wait_s)
                continue
            try:
                self._deliver(channel, delivery)
            except Exception as error:  # noqa: BLE001 - the edge: a channel's thread must go on
                log("notification failed", channel=channel.config.id, error=repr(error))
                time.sleep(1)
            finally:
                with self._picking:
                    self._in_hand.pop(delivery.id, None)

    def _pick(self, channel: Channel) -> tuple[Delivery | None, float]:
        """What is to be sent next, or None and the seconds until there may be something. What was
        not tried yet comes first: a receiver that refuses some delays no others. Of one run one
        thing after the other is sent, that its end does not come before its start."""
        with self._picking:
            now, wait_s = time.time(), 2.0
            runs = {one.run_id for one in self._in_hand.values() if one.channel_id == channel.config.id}
            best: Delivery | None = None
            for one in self._store.waiting_deliveries(channel.config.id):
                left_s = one.next_at - now
                if 0 < left_s <= LONGEST_RETRY_S:  # more: the clock was set back
                    wait_s = min(wait_s, left_s)
                elif one.id not in self._in_hand and not (one.run_id and one.run_id in runs):
                    if best is None or _is_sooner(one, best):
                        best = one
            if best is not None:
                self._in_hand[best.id] = best
            return best, wait_s

    def _deliver(self, channel: Channel, delivery: Delivery) -> None:
        problem, is_final = self._try(channel, delivery)
        now, attempts = time.time(), delivery.attempts + 1
        pause_s = RETRY_DELIVERY_S[min(attempts, len(RETRY_DELIVERY_S)) - 1]
        pause_s *= (
            0.8 + 0.4 * secrets.randbelow(1000) / 1000
        )  # receivers that come back are not met by all at once
        ended = problem is None or is_final or now - delivery.created_at > GIVE_UP_DELIVERY_S
        changed = delivery._replace(
            attempts=attempts, next_at=now + pause_s, ended_at=now if ended else None, problem=problem
        )
        self._store.keep_delivery(changed)
        if problem and (attempts == 1 or ended):
            log(
                "notification not delivered",
                channel=channel.config.id,
                about=delivery.event,
                run=delivery.run_id,
                why=problem,
                given_up=ended,
            )

    def _try(self, channel: Channel, delivery: Delivery) -> tuple[str | None, bool]:
        """Why it could not be delivered, in words without secrets, and whether another try is hopeless."""
        import smtplib

        try:
            channel.send(delivery)
            return None, False
        except smtplib.SMTPResponseException as error:
            said = (
                error.smtp_error.decode("utf-8", "replace")
                if isinstance(error.smtp_error, bytes)
                else str(error.smtp_error)
            )
            words = f"SMTP {error.smtp_code} {said}"
        except (smtplib.SMTPException, OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, DeliveryRefused) and error.is_final:
                return self._without_secrets(words), True
        except Exception as error:  # noqa: BLE001 - the edge: this delivery is tried again, others go on
            words = f"unforeseen: {error!r}"
        return self._without_secrets(words), False

    def _without_secrets(self, text: str) -> str:
        for secret in self._names_secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]


def _is_sooner(one: Delivery, other: Delivery) -> bool:
    """Whether `one` is sent before `other` when both are due."""
    return (one.attempts > 0, one.next_at, one.created_at) < (
        other.attempts > 0,
        other.next_at,
        other.created_at,
    )


def _new_delivery(
    channel: Channel, event: str, title: str, facts: dict[str, Any], run_id: str, tenant_id: str
) -> Delivery:
    return Delivery(
        "msg_" + secrets.token_hex(12),
        channel.config.id,
        event,
        run_id,
        tenant_id,
        time.time(),
        _printable_line(title),
        facts,
    )


def _printable_line(text: str) -> str:
    """No line breaks and no control characters: mail headers and phones show it as it is."""
    return "".join(char if char.isprintable() else " " for char in text)[:300]


def notification_problems(config: Config) -> Iterator[str]:
    """What is wrong in the configuration's notifications beyond single keys."""
    seen: set[str] = set()
    for index, item in enumerate(config.notifications):
        where = f"notifications[{index}]"
        if item.id in seen:
            yield f"{where}.id: {item.id!r} stands twice; allowed is a unique id"
        seen.add(item.id)
        if item.type == "email":
            yield from _mail_problems(item, where)
        elif not item.url:
            yield f"{where}.url: is missing; allowed is an http(s) URL"
        if item.secret:
            try:
                webhook_key(item.secret)
            except ValueError:
                yield f"{where}.secret: allowed is whsec_ and base64, as Standard Webhooks have it"


def _mail_problems(item: NotificationConfig, where: str) -> Iterator[str]:
    if not item.smtp.host:
        yield f"{where}.smtp.host: is missing; allowed is a host name"
    if not item.to:
        yield f"{where}.to: is missing; allowed is a list of mail addresses"
    if not item.sender:
        yield f"{where}.from: is missing; allowed is a mail address"
    if item.smtp.username and item.smtp.security == "none":
        yield f"{where}.smtp.security: a password is not sent in plain text; allowed is starttls or tls"


# ============================================================================
# 14. REPORTS - a run as a page, as Markdown, as CSV, as JUnit
# ============================================================================
# Pure: the run as on the wire, its samples and failures go in, text comes out. Names come
# from users and from Locust: each is escaped for where it goes. The page has no script and
# needs nothing from anywhere, so that it opens from a mail attachment and prints.

# The colours of Locust's own page, which its users know by heart.
SERIES_COLOURS = {
    "rps": "#00ca5a",
    "fails": "#ff6d6d",
    "p50": "#eeb457",
    "p95": "#9966cc",
    "users": "#4a90d9",
}
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
CHART_WIDTH, CHART_HEIGHT = 860, 230
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 56, 12, 28, 26

REPORT_CSS = """
:root { --ink: #1c2733; --dim: #5d6b79; --line: #d8dfe6; --back: #fff; --soft: #f4f6f8; --bad: #c62828; --good: #1b7f3b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --dim: #9aa7b3; --line: #34414d; --back: #141a20; --soft: #1c242c; --bad: #ff8a80; --good: #69d58c; }
}
@media print {
  :root { --ink: #000; --dim: #444; --line: #bbb; --back: #fff; --soft: #f4f4f4; --bad: #b00; --good: #070; }
  section { break-inside: avoid; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
.dim { color: var(--dim); } .bad { color: var(--bad); } .good { color: var(--good); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; margin: 1rem 0; }
.facts div { background: var(--soft); border-radius: .4rem; padding: .5rem .75rem; } .facts b { display: block; font-size: 1.2rem; }
.box { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; } .text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 11px; } .grid { stroke: var(--line); stroke-width: 1; }
.mark { stroke: var(--dim); stroke-dasharray: 4 3; }
"""


# ---- the load, as asked for and as changed -----------------------------------


def load_words(run: dict[str, Any]) -> str:
    """`10 users at 2/s, changed to 20 users at 2/s after 8s by api`: the load of a run as JSON."""
    if run.get("stages"):
        words = ", then ".join(_users_words(stage) for stage in run["stages"])
    else:
        words = _users_words(run)
    return words + "".join(
        f", changed to {_users_words(change)} after {_after_words(run, change)} by {change['by']}"
        for change in run.get("usersChanges") or ()
    )


def _users_words(load: dict[str, Any]) -> str:
    return f"{_figure(load['targetUsers'])} users at {load['spawnRate']:g}/s"


def _after_words(run: dict[str, Any], change: dict[str, Any]) -> str:
    return duration_text(parse_utc(change["at"]) - parse_utc(run.get("startedAt") or run["createdAt"]))


def users_words(run: dict[str, Any]) -> str:
    """`10→20`: the users asked for, and those they were changed to last."""
    changes = run.get("usersChanges")
    return f"{run['targetUsers']:,}" + (f"→{changes[-1]['targetUsers']:,}" if changes else "")


def peak_users(samples: list[Sample]) -> int | None:
    """The most users of the samples: after the end Locust says 0."""
    return max((sample.users for sample in samples if sample.users is not None), default=None)


# ---- the page of a report ----------------------------------------------------


def report_html(run: dict[str, Any], samples: list[Sample], failures: dict[str, Any]) -> str:
    """The run as one self-contained page."""
    sections = [
        _report_head(run),
        _report_facts(run, samples),
        _report_load_changes(run),
        _report_verdict(run),
        _report_warnings(run),
        _report_charts(run, samples),
        _report_table(
            "Endpoints", ENDPOINT_TITLES, list(_endpoint_cells(run)), text_columns=2, total_last=True
        ),
        _report_failures(failures),
        _report_annotations(run),
        _report_metadata(run),
        f'<p class="dim">Load Manager {VERSION}; every figure is Locust\'s own.</p>',
    ]
    title = html.escape(f"{run['scenarioId']} - {run['status']}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>{title}</title>"
        f"<style>{REPORT_CSS}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _report_head(run: dict[str, Any]) -> str:
    where = f"{run['tenantId']} / {run['envId']} on {run.get('locustClusterId') or 'no cluster'}"
    words = run["status"] + (f" ({run['stopReason']})" if run.get("stopReason") else "")
    kind = (
        "bad"
        if run["status"] == "Failed" or run.get("verdict") == "failed"
        else "good"
        if run["status"] == "Finished"
        else "dim"
    )
    reason = f'<p class="bad">{html.escape(run["failureReason"])}</p>' if run.get("failureReason") else ""
    return (
        f'<header><h1>{html.escape(run["scenarioId"])}</h1><p><strong class="{kind}">{html.escape(words)}</strong> '
        f'<span class="dim">{html.escape(where)} · {html.escape(_period(run))} · run {html.escape(run["id"])}</span></p>{reason}</header>'
    )


def _period(run: dict[str, Any]) -> str:
    started, finished = run.get("startedAt"), run.get("finishedAt")
    if not started:
        return f"created {run['createdAt']}"
    if not finished:
        return f"since {started}"
    return f"{started} to {finished} ({duration_text(parse_utc(finished) - parse_utc(started))})"


def duration_text(seconds: float) -> str:
    """As people write it: 45s, 5m 3s, 1h 30m 0s."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}h {minutes}m {rest}s" if hours else f"{minutes}m {rest}s" if minutes else f"{rest}s"


def _figure(value: Any, digits: int = 0) -> str:
    """A number for people; a dash for what Locust did not give."""
    return "–" if value is None else f"{value:,.{digits}f}"


def _report_facts(run: dict[str, Any], samples: list[Sample]) -> str:
    metrics = run.get("lastMetrics") or {}
    facts = [
        ("requests", _figure(metrics.get("totalRequests"))),
        ("failed", f"{_figure(metrics.get('errorRate'), 2)} %"),
        ("requests/s", _figure(metrics.get("totalRps"), 1)),
        ("average", f"{_figure(metrics.get('avgResponseMs'), 1)} ms"),
        ("median", f"{_figure(metrics.get('p50ResponseMs'))} ms"),
        ("95 %", f"{_figure(metrics.get('p95ResponseMs'))} ms"),
        ("99 %", f"{_figure(metrics.get('p99ResponseMs'))} ms"),
        ("users asked for", f"{_figure(run['targetUsers'])} at {run['spawnRate']:g}/s"),
        ("users, at most", _figure(peak_users(samples))),
    ]
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for name, value in facts)
        + "</div>"
    )


def _report_verdict(run: dict[str, Any]) -> str:
    if not run.get("thresholds"):
        return ""
    rows = [
        [one.get("expr", ""), _threshold_value(one), one.get("result", ""), one.get("message", "")]
        for one in run["thresholds"]
    ]
    trust = f" · trust {run['trust']}" if run.get("trust") else ""
    return _report_table(
        f"Verdict: {run.get('verdict', 'pending')}{trust}",
        ["Threshold", "Value", "Result", ""],
        rows,
        text_columns=4,
    )


def _threshold_value(threshold: dict[str, Any]) -> str:
    value = threshold.get("value")
    return _figure(value, 2) if isinstance(value, (int, float)) else str(value or "–")


def _report_warnings(run: dict[str, Any]) -> str:
    rows = [[one["at"], one["code"], one["message"]] for one in run.get("warnings", [])]
    return _report_table("Warnings", ["When", "Code", "What"], rows, text_columns=3) if rows else ""


def _report_load_changes(run: dict[str, Any]) -> str:
    rows = [
        [change["at"], _users_words(change), change["by"], _after_words(run, change)]
        for change in run.get("usersChanges") or ()
    ]
    return _report_table("Changes of the load", ["When", "Changed to", "By", "After"], rows, text_columns=4)


def _report_annotations(run: dict[str, Any]) -> str:
    rows = [[one["at"], one["text"]] for one in run.get("annotations", [])]
    return _report_table("Annotations", ["When", "What"], rows, text_columns=2) if rows else ""


def _report_metadata(run: dict[str, Any]) -> str:
    if not run.get("metadata"):
        return ""
    text = json.dumps(run["metadata"], indent=2, ensure_ascii=False)
    return f"<section><h2>Metadata</h2><pre>{html.escape(text)}</pre></section>"


def _report_failures(failures: dict[str, Any]) -> str:
    rows = [[one["method"], one["name"], one["error"], one["occurrences"]] for one in failures["failures"]]
    text = (
        _report_table("Failures", ["Method", "Name", "Error", "Occurrences"], rows, text_columns=3)
        if rows
        else ""
    )
    for one in failures["exceptions"]:
        text += f"<section><h2>{_figure(one['count'])} × {html.escape(one['message'])}</h2><pre>{html.escape(one['traceback'])}</pre></section>"
    if failures.get("problem"):
        text += f'<p class="bad">Failures could not be read: {html.escape(failures["problem"])}</p>'
    return text


ENDPOINT_TITLES = [
    "Type",
    "Name",
    "Requests",
    "Fails",
    "Median",
    "95 %",
    "99 %",
    "Average",
    "Min",
    "Max",
    "req/s",
]


def _endpoint_cells(run: dict[str, Any]) -> Iterator[list[Any]]:
    """The rows of Locust's table, the total last."""
    metrics = run.get("lastMetrics") or {}
    for row in (metrics.get("requestStats") or {}).values():
        times = [
            row.get(name)
            for name in (
                "medianResponseTime",
                "p95ResponseTime",
                "p99ResponseTime",
                "avgResponseTime",
                "minResponseTime",
                "maxResponseTime",
            )
        ]
        yield [
            row["method"],
            row["name"],
            row["numRequests"],
            row["numFailures"],
            *map(_figure, times),
            _figure(row.get("requestsPerSec"), 2),
        ]
    if metrics:
        times = [
            metrics.get(name) for name in ("p50ResponseMs", "p95ResponseMs", "p99ResponseMs", "avgResponseMs")
        ]
        yield [
            "",
            "Aggregated",
            metrics.get("totalRequests"),
            metrics.get("totalFailures"),
            *map(_figure, times),
            "",
            "",
            _figure(metrics.get("totalRps"), 2),
        ]


def _report_table(
    title: str, titles: list[str], rows: list[list[Any]], text_columns: int = 0, total_last: bool = False
) -> str:
    if not rows:
        return ""

    def cells(tag: str, values: list[Any]) -> str:
        return "".join(
            f"<{tag}{' class=text' if index < text_columns else ''}>{html.escape(_cell_text(value))}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(
        f"<tr{' class=total' if total_last and index == len(rows) - 1 else ''}>{cells('td', row)}</tr>"
        for index, row in enumerate(rows)
    )
    return f'<section><h2>{html.escape(title)}</h2><div class="box"><table><thead><tr>{cells("th", titles)}</tr></thead><tbody>{body}</tbody></table></div></section>'


def _cell_text(value: Any) -> str:
    return _figure(value) if isinstance(value, (int, float)) or value is None else str(value)


# ---- charts ----------------------------------------------------------------


class Line(NamedTuple):
    """One series of a chart: what it is, its colour, its points as (seconds, value or None)."""

    label: str
    colour: str
    points: list[tuple[float, float | None]]


def line_points(samples: list[Sample], name: str) -> list[tuple[float, float]]:
    """A figure's points (epoch seconds, value) as one line, as the dashboard draws it.

    Polls are up to 2 s older than pushes, and both in one line make a zigzag: a figure that enough
    pushes have is not taken from polls. A final sample's rps is the whole run's and its users are
    gone: it is drawn only where a run was too short for Locust to give a rate."""
    known = [sample for sample in samples if getattr(sample, name) is not None]
    ends_at = next((sample.at for sample in samples if sample.source == "final"), math.inf)
    live = [sample for sample in known if sample.at < ends_at]
    pushed = sum(sample.source == "push" for sample in live)
    dropped = "poll" if pushed and 3 * pushed >= len(live) else "push"
    points = [(sample.at, getattr(sample, name)) for sample in live if sample.source != dropped]
    if name == "users":
        while points and points[-1][1] == 0 and ends_at < math.inf:
            points.pop()
    elif name != "rps" or not any(sample.rps for sample in live):
        points += [(sample.at, getattr(sample, name)) for sample in known if sample.at >= ends_at][-1:]
    return points


def _report_charts(run: dict[str, Any], samples: list[Sample]) -> str:
    if not samples:
        return "" if run.get("startedAt") else "<p>This run never began, so there are no measurements.</p>"
    start = parse_utc(run["startedAt"]) if run.get("startedAt") else samples[0].at

    def line(label: str, colour: str, *names: str) -> Line:
        found = (line_points(samples, name) for name in names)
        points = next((one for one in found if one), [])
        return Line(label, SERIES_COLOURS[colour], [(at - start, value) for at, value in points])

    marks = [(parse_utc(one["at"]) - start, one["text"]) for one in run.get("annotations", [])]
    marks += [
        (parse_utc(one["at"]) - start, f"{_users_words(one)}, by {one['by']}")
        for one in run.get("usersChanges") or ()
    ]
    return "".join(
        [
            _chart(
                "Requests per second",
                [line("requests/s", "rps", "rps"), line("failures/s", "fails", "fails_per_s")],
                marks,
            ),
            _chart(
                "Response times (ms)",
                [
                    line("median", "p50", "window_p50_ms", "p50_ms"),
                    line("95 %", "p95", "window_p95_ms", "p95_ms"),
                ],
                marks,
            ),
            _chart("Users", [line("users", "users", "users")], marks),
        ]
    )


def _chart(title: str, lines: list[Line], marks: list[tuple[float, str]]) -> str:
    """One inline SVG: grid, lines, legend, annotations."""
    xs = [x for line in lines for x, _ in line.points]
    if not xs:
        return ""
    last = max(xs[-1], max(xs), 1.0)
    top = _round_up(max((y for line in lines for _, y in line.points if y is not None), default=1.0))
    width, height = CHART_WIDTH - CHART_LEFT - CHART_RIGHT, CHART_HEIGHT - CHART_TOP - CHART_BOTTOM

    def at(x: float, y: float) -> str:
        return (
            f"{CHART_LEFT + width * min(max(x, 0), last) / last:.1f},{CHART_TOP + height * (1 - y / top):.1f}"
        )

    parts = [f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for step in range(5):
        y = CHART_TOP + height * step / 4
        parts.append(
            f'<line class="grid" x1="{CHART_LEFT}" x2="{CHART_WIDTH - CHART_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{CHART_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(top * (4 - step) / 4)}</text>'
        )
        x = CHART_LEFT + width * step / 4
        anchor = "start" if step == 0 else "end" if step == 4 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{CHART_HEIGHT - 8}" text-anchor="{anchor}">{duration_text(last * step / 4)}</text>'
        )
    for x, text in marks:
        place = CHART_LEFT + width * min(max(x, 0), last) / last
        parts.append(
            f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{CHART_TOP}" y2="{CHART_TOP + height}"><title>{html.escape(text)}</title></line>'
        )
    for number, line in enumerate(lines):
        points = " ".join(at(x, y) for x, y in line.points if y is not None)
        parts.append(
            f'<polyline fill="none" stroke="{line.colour}" stroke-width="2" stroke-linejoin="round" points="{points}"/>'
        )
        x = CHART_LEFT + number * 110
        parts.append(
            f'<rect x="{x}" y="8" width="12" height="4" fill="{line.colour}"/><text x="{x + 18}" y="14">{html.escape(line.label)}</text>'
        )
    return f"<section><h2>{html.escape(title)}</h2>" + "".join(parts) + "</svg></section>"


def _round_up(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten: an axis people can read."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= value)


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


# ---- for CI: JUnit and a summary ---------------------------------------------


def junit_xml(run: dict[str, Any]) -> str:
    """The run as JUnit XML: a test case for its end, for each threshold, for the comparison."""
    cases = [
        _junit_case(
            run,
            "the run finished",
            run.get("failureReason") or "it failed" if run["status"] == "Failed" else None,
        )
    ]
    for one in run.get("thresholds", ()):
        why = f"is {_threshold_value(one)}" + (f" ({one['message']})" if one.get("message") else "")
        is_failed = one["result"] == "failed" and not one.get("warnOnly")
        cases.append(
            _junit_case(run, one["expr"], why if is_failed else None, skipped=one["result"] == "pending")
        )
    comparison = run.get("comparison")
    if comparison and comparison["baseline"]:
        cases += _junit_comparison(run, comparison)
    lasted_s = (
        parse_utc(run["finishedAt"]) - parse_utc(run["startedAt"])
        if run.get("startedAt") and run.get("finishedAt")
        else 0.0
    )
    facts = [
        ("runId", run["id"]),
        ("trust", run.get("trust", "")),
        ("trustReasons", "; ".join(run.get("trustReasons", ()))),
    ]
    properties = "".join(f'<property name="{name}" value="{_xml(value)}"/>' for name, value in facts)
    failures, skipped = sum("<failure" in case for case in cases), sum("<skipped" in case for case in cases)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuites><testsuite name="{_xml("load test " + run["scenarioId"])}" tests="{len(cases)}" failures="{failures}" errors="0" '
        f'skipped="{skipped}" time="{lasted_s:.3f}" timestamp="{run["createdAt"]}">'
        f"<properties>{properties}</properties>{''.join(cases)}</testsuite></testsuites>\n"
    )


def _junit_comparison(run: dict[str, Any], comparison: dict[str, Any]) -> Iterator[str]:
    """A case for the whole, and one for each figure; those of which nothing can be told are skipped."""
    name = f"no regression against {comparison['with']} {comparison['baseline']}"
    if comparison.get("judgement") == CANNOT_TELL:
        yield _junit_case(run, name, comparison.get("message"), skipped=True)
    else:
        yield _junit_case(run, name, "; ".join(comparison["regressions"]) or None)
    for one in comparison.get("figures") or ():
        name = f"{one['endpoint'] or 'totals'}: {one['metric']} against {comparison['with']}"
        is_skipped = one["judgement"] == CANNOT_TELL
        why = figure_sentence(one) if is_skipped or one["judgement"] == REGRESSION else None
        yield _junit_case(run, name, why, is_skipped)


def _junit_case(run: dict[str, Any], name: str, why: str | None, skipped: bool = False) -> str:
    inner = ""
    if skipped:
        inner = f'<skipped message="{_xml(why)}"/>' if why else "<skipped/>"
    elif why is not None:
        inner = f'<failure message="{_xml(why)}">{_xml(why)}</failure>'
    return f'<testcase classname="{_xml(run["scenarioId"])}" name="{_xml(name)}">{inner}</testcase>'


def _xml(text: object) -> str:
    """Text for XML; characters that XML cannot hold at all become a question mark."""
    return html.escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", str(text)))


def summary_md(run: dict[str, Any]) -> str:
    """The verdict as Markdown for a job's summary on GitHub or GitLab."""
    metrics = run.get("lastMetrics") or {}
    words = run.get("verdict") or run["status"]
    lines = [f"## Load test {_md(run['scenarioId'])}: {words}", ""]
    lines.append(
        f"{_md(run['tenantId'])} / {_md(run['envId'])}, {_md(load_words(run))}, {_period(run)}, run `{run['id']}`"
    )
    if run.get("failureReason"):
        lines += ["", f"> {_md(run['failureReason'])}"]
    if run.get("thresholds"):
        rows = [[one["expr"], _threshold_value(one), _result_words(one)] for one in run["thresholds"]]
        lines += ["", *_md_table(["Threshold", "Value", "Result"], rows, 3)]
    if run.get("trust"):
        lines += ["", f"Trust: **{run['trust']}**", *(f"- {_md(reason)}" for reason in run["trustReasons"])]
    comparison = run.get("comparison")
    if comparison:
        lines += ["", *_comparison_md(comparison)]
    lines += ["", *_md_table(ENDPOINT_TITLES, list(_endpoint_cells(run)), 2)] if metrics else []
    return "\n".join(lines) + "\n"


def _result_words(threshold: dict[str, Any]) -> str:
    words = threshold["result"] + (" (warning only)" if threshold.get("warnOnly") else "")
    return f"{words}: {threshold['message']}" if threshold.get("message") else words


def _comparison_md(comparison: dict[str, Any]) -> Iterator[str]:
    if comparison["baseline"] is None:
        yield _md(comparison["message"])
        return
    against = f"`{comparison['baseline']}`"
    if len(comparison.get("runs") or ()) > 1:
        against = f"{len(comparison['runs'])} runs, the newest {against}"
    found = len(comparison["regressions"])
    words = comparison.get("judgement") or (f"{found} regressions" if found else NO_REGRESSION)
    message = f": {_md(comparison['message'])}" if comparison.get("message") else ""
    yield f"Compared with {comparison['with']} {against}: **{words}**{message}"
    for kind in ("regressions", "differences", "warnings"):
        yield from (f"- {kind[:-1]}: {_md(sentence)}" for sentence in comparison[kind])
    if comparison.get("figures"):
        yield ""
        yield from _md_table(FIGURE_TITLES, [_figure_cells(one) for one in comparison["figures"]], 2)
    if comparison.get("figuresCut"):
        yield f"and {comparison['figuresCut']} more figures"


FIGURE_TITLES = ["Endpoint", "Figure", "Before", "Now", "Change", "Equal runs", "Judgement"]


def _figure_cells(one: dict[str, Any]) -> list[Any]:
    low, high = one.get("equalRuns") or (None, None)
    return [
        one["endpoint"] or "(all)",
        one["metric"],
        _figure(one["baseline"], 2),
        _figure(one["candidate"], 2),
        "" if one["changePercent"] is None else f"{one['changePercent']:+.1f} %",
        "" if low is None else f"{_figure(low, 2)} to {_figure(high, 2)}",
        one["judgement"] + (f": {one['reason']}" if one["judgement"] == CANNOT_TELL else ""),
    ]


# ---- Markdown and CSV ------------------------------------------------------


def report_md(run: dict[str, Any], samples: list[Sample], failures: dict[str, Any]) -> str:
    """The run as Markdown for a merge request."""
    metrics = run.get("lastMetrics") or {}
    words = run["status"] + (f" ({run['stopReason']})" if run.get("stopReason") else "")
    lines = [
        f"## Load test {_md(run['scenarioId'])}: {words}"
        + (f", verdict {run['verdict']}" if run.get("verdict") else ""),
        "",
        f"{_md(run['tenantId'])} / {_md(run['envId'])}, {_md(load_words(run))}, {_period(run)}, run `{run['id']}`",
        "",
        f"**{_figure(metrics.get('totalRequests'))} requests**, {_figure(metrics.get('errorRate'), 2)} % failed, "
        f"{_figure(metrics.get('totalRps'), 1)} req/s, median {_figure(metrics.get('p50ResponseMs'))} ms, "
        f"p95 {_figure(metrics.get('p95ResponseMs'))} ms, p99 {_figure(metrics.get('p99ResponseMs'))} ms, "
        f"at most {_figure(peak_users(samples))} users",
    ]
    if run.get("failureReason"):
        lines += ["", f"> {_md(run['failureReason'])}"]
    lines += [f"- warning {one['code']}: {_md(one['message'])}" for one in run.get("warnings", [])]
    if run.get("thresholds"):
        rows = [
            [one.get("expr", ""), _threshold_value(one), one.get("result", "")] for one in run["thresholds"]
        ]
        lines += ["", *_md_table(["Threshold", "Value", "Result"], rows, 3)]
    lines += ["", *_md_table(ENDPOINT_TITLES, list(_endpoint_cells(run)), 2)]
    if failures["failures"]:
        rows = [
            [one["method"], one["name"], one["error"], one["occurrences"]]
            for one in failures["failures"][:50]
        ]
        lines += ["", *_md_table(["Method", "Name", "Error", "Occurrences"], rows, 3)]
    return "\n".join(lines) + "\n"


def _md(text: Any) -> str:
    """Text as text in Markdown: nothing in it becomes markup, a link or a mention."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~>-])", r"\\\1", str(text).replace("\r", " ").replace("\n", " "))
    return escaped.replace("<", "&lt;").replace("@", "@\u200b").replace("://", ":\u200b//")


def _md_table(titles: list[str], rows: list[list[Any]], text_columns: int) -> list[str]:
    rule = ["---" if index < text_columns else "---:" for index in range(len(titles))]
    body = ["| " + " | ".join(_md(_cell_text(value)) for value in row) + " |" for row in rows]
    return ["| " + " | ".join(titles) + " |", "| " + " | ".join(rule) + " |", *body]


def metrics_csv(samples: list[Sample]) -> str:
    """Every sample, a line each."""
    return _csv_text(["timestamp", *SAMPLE_KEYS], (sample_to_json(sample).values() for sample in samples))


def requests_csv(run: dict[str, Any]) -> str:
    """The endpoints of the newest numbers, the total last."""
    metrics = run.get("lastMetrics") or {}
    rows = [[row.get(name) for name in ENDPOINT_KEYS] for row in (metrics.get("requestStats") or {}).values()]
    if metrics:
        names = (
            "totalRequests",
            "totalFailures",
            "avgResponseMs",
            None,
            None,
            "p50ResponseMs",
            "totalRps",
            "p95ResponseMs",
            "p99ResponseMs",
        )
        rows.append(["", "Aggregated", *(metrics.get(name) if name else None for name in names)])
    return _csv_text(list(ENDPOINT_KEYS), rows)


def _csv_text(titles: list[str], rows: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(titles)
    for row in rows:
        writer.writerow([_csv_cell(value) for value in row])
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula gets a quote before it (OWASP ASVS 1.2.10)."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
        return "'" + value
    return value


# ============================================================================
# 15. EXCHANGE - a run as a file to carry: export, import, files of a headless Locust
# ============================================================================
# A run leaves an air-gapped network as one JSON file and is compared elsewhere. What comes
# in is a stranger's: everything is checked, and nothing of it may count for more than it is.

EXPORT_FORMAT, EXPORT_VERSION = "loadmanager-run", 1
LOCUST_JSON, LOCUST_CSV = "locust-json", "locust-csv"
IMPORT_BYTES = 64 * 1024 * 1024
MAX_IMPORTED_SAMPLES = 500_000
LATEST_MOMENT_S = 4_102_444_800.0  # the year 2100
IMPORT_NAMESPACE = "b0f6c0de-5d5c-4f0e-9d0b-6c6f6164746d"  # of ids made from a file's content


class ImportedRun(NamedTuple):
    """A run from a file, checked."""

    run: Run
    snapshot: Snapshot | None
    samples: list[Sample]
    histograms: list[tuple[float, int, str]]  # epoch seconds, whether it is whole, its record
    failures: dict[str, Any] | None


def export_parts(
    run: dict[str, Any],
    samples: list[Sample],
    histograms: list[tuple[float, int, str]],
    failures: dict[str, Any],
) -> Iterator[str]:
    """The export of a run in pieces of JSON: one document, with all samples."""
    head = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "loadManager": VERSION,
        "exportedAt": utc_text(time.time()),
        "run": run,
        "failures": failures,
    }
    yield dump_json(head)[:-1] + ',"samples":['
    yield ",".join(dump_json(sample_to_json(sample)) for sample in samples)
    yield '],"histograms":['
    yield ",".join(
        f'{{"timestamp":"{utc_text(at)}","isWhole":{"true" if is_whole else "false"},"rows":{text}}}'
        for at, is_whole, text in histograms
    )
    yield "]}"


def _only(allowed: str, is_good: Callable[[Any], bool]) -> Check:
    def accept(value: Any) -> Any:
        if not is_good(value):
            raise ValueError
        return value

    return Check(allowed, accept)


def _long_text(most: int) -> Check:
    return _only(
        f"a text of at most {most} characters",
        lambda value: isinstance(value, str) and len(value) <= most and "\0" not in value,
    )


def _list_of(keys: dict[str, BodyKey], most: int, make: Callable[[dict[str, Any]], Any]) -> Check:
    """A list of objects with these keys; each becomes what `make` makes of its values."""

    def accept(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError
        found = []
        for index, entry in enumerate(value):
            try:
                found.append(make(check_body(entry, keys)))
            except (InvalidInput, InvalidValue) as error:
                raise InvalidValue(
                    f"[{index}]: {error.message if isinstance(error, InvalidInput) else error}"
                ) from None
        return tuple(found)

    return Check(f"a list of at most {most} objects with the keys {', '.join(keys)}", accept)


def _accept_run_id(value: Any) -> str:
    import uuid

    if not isinstance(value, str) or str(uuid.UUID(value)) != value:
        raise ValueError
    return value


def _imported_threshold(values: dict[str, Any]) -> Threshold:
    return parse_threshold(values.pop("expr"))._replace(**values)


LONG_TEXT = _long_text(4000)
ANY_JSON = _only("JSON", lambda value: True)
MEASURE = _only(NUMBER_KINDS[_is_measure], _is_measure)
TEXTS = _only(
    "a list of texts",
    lambda value: (
        isinstance(value, list) and len(value) <= 10_000 and all(isinstance(one, str) for one in value)
    ),
)
RUN_ID = Check("a UUID", _accept_run_id)
USERS_OR_NONE = number_value(0, MAX_USERS, whole=True)
WARNING_KEYS = {
    "code": BodyKey("code", ID_TEXT, required=True),
    "at": BodyKey("at", MOMENT, required=True),
    "message": BodyKey("message", LONG_TEXT, required=True),
}
JUDGED_KEYS = {
    "expr": BodyKey("expr", _long_text(MAX_THRESHOLD), required=True),
    "value": BodyKey("value", MEASURE),
    "result": BodyKey("result", one_of("passed", "failed"), required=True),
    "firstFailedAt": BodyKey("first_failed_at", MOMENT),
    "message": BodyKey("message", LONG_TEXT),
    "abortOnFail": BodyKey("abort_on_fail", BOOLEAN),
    "delaySeconds": BodyKey("delay_s", number_value(0, 3600)),
    "warnOnly": BodyKey("warn_only", BOOLEAN),
}
LOAD_CHANGE_KEYS = {
    "at": BodyKey("at", MOMENT, required=True),
    "targetUsers": BodyKey("users", USERS, required=True),
    "spawnRate": BodyKey("spawn_rate", SPAWN_RATE, required=True),
    "by": BodyKey("by", LONG_TEXT, required=True),
}


def _is_figure(one: Any) -> bool:
    """Whether it is an entry of a comparison's `figures`."""
    names = ("endpoint", "metric", "baseline", "candidate", "change", "changePercent", "judgement", "reason")
    if not isinstance(one, dict) or not set(names) <= set(one) <= {*names, *FIGURE_RANGES, "pValue"}:
        return False
    ranges = [one[name] for name in FIGURE_RANGES if name in one]
    numbers = [one[name] for name in names[2:6]] + [one.get("pValue")]
    return (
        (one["endpoint"] is None or isinstance(one["endpoint"], str))
        and one["metric"] in COMPARED
        and one["judgement"] in JUDGEMENTS
        and isinstance(one["reason"], str)
        and all(value is None or _is_measure(value) or type(value) in (int, float) for value in numbers)
        and all(isinstance(pair, list) and len(pair) == 2 and all(type(one) in (int, float) for one in pair) for pair in ranges)
    )  # fmt: skip


FIGURE_RANGES = ("interval", "equalRuns")
KEPT_FIGURES = _only(
    f"a list of at most {MAX_KEPT_FIGURES} figures",
    lambda value: isinstance(value, list) and len(value) <= MAX_KEPT_FIGURES and all(map(_is_figure, value)),
)
COMPARISON_KEYS = {
    "with": BodyKey("with", one_of(*COMPARE_WITH), required=True),
    "baseline": BodyKey("baseline", RUN_ID),
    "tolerances": BodyKey("tolerances", _only("an object of texts", lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()))),
    **{name: BodyKey(name, TEXTS) for name in ("differences", "warnings", "noise", "regressions", "runs")},
    **{name: BodyKey(name, BOOLEAN) for name in ("noiseJudged", "exactTimes")},
    **{name: BodyKey(name, number_value(0, 100_000, whole=True)) for name in ("runsKnown", "runsNeeded", "figuresCut")},
    "judgement": BodyKey("judgement", one_of(REGRESSION, NO_REGRESSION, CANNOT_TELL)),
    "message": BodyKey("message", LONG_TEXT),
    "figures": BodyKey("figures", KEPT_FIGURES),
}  # fmt: skip
COMPARISON = Check(
    "an object with the keys " + ", ".join(COMPARISON_KEYS),
    lambda value: {"baseline": None, "regressions": [], **check_body(value, COMPARISON_KEYS)},
)
IMPORTED_RUN_KEYS = {  # every key of a final run's JSON; those without an attribute are derived, and ignored
    "id": BodyKey("id", RUN_ID, required=True),
    "tenantId": BodyKey("tenant_id", ID_TEXT, required=True),
    "envId": BodyKey("env_id", ID_TEXT, required=True),
    "locustClusterId": BodyKey("cluster_id", text_value("a string", empty=True), required=True),
    "scenarioId": BodyKey("scenario_id", ID_TEXT, required=True),
    "targetUsers": BodyKey("target_users", USERS_OR_NONE, required=True),
    "spawnRate": BodyKey("spawn_rate", number_value(0, MAX_SPAWN_RATE), required=True),
    "status": BodyKey("status", one_of(*sorted(status.value for status in FINAL)), required=True),
    "createdAt": BodyKey("created_at", MOMENT, required=True),
    "createdBy": BodyKey("created_by", LONG_TEXT),
    "source": BodyKey("source", one_of(*SOURCES)),
    "durationSeconds": BodyKey("duration_s", number_value(1, MAX_DURATION_S, whole=True)),
    "startedAt": BodyKey("started_at", MOMENT),
    "finishedAt": BodyKey("finished_at", MOMENT, required=True),
    "stopReason": BodyKey("stop_reason", one_of(*STOP_REASONS)),
    "failureReason": BodyKey("failure_reason", LONG_TEXT),
    "metadata": BodyKey("metadata", METADATA),
    "locustfileSha256": BodyKey("locustfile_sha256", text_value("64 hexadecimal digits", "[0-9a-f]{64}")),
    "warnings": BodyKey("warnings", _list_of(WARNING_KEYS, 100, lambda values: Warning_(values["code"], values["at"], values["message"]))),
    "annotations": BodyKey("annotations", _list_of({**ANNOTATION_KEYS, "at": BodyKey("at", MOMENT, required=True)}, MAX_ANNOTATIONS, lambda values: Annotation(values["at"], values["text"]))),
    "thresholds": BodyKey("thresholds", _list_of(JUDGED_KEYS, MAX_THRESHOLDS, _imported_threshold)),
    "verdict": BodyKey("verdict", one_of("passed", "failed")),
    "compareWith": BodyKey("compare_with", one_of(*COMPARE_WITH)),
    "comparison": BodyKey("comparison", COMPARISON),
    **PLAN_KEYS,
    "usersChanges": BodyKey("load_changes", _list_of(LOAD_CHANGE_KEYS, MAX_LOAD_CHANGES, lambda values: LoadChange(values["at"], values["users"], values["spawn_rate"], values["by"]))),
    "importedAt": BodyKey("", MOMENT),
    "trust": BodyKey("", ANY_JSON),
    "trustReasons": BodyKey("", ANY_JSON),
    "queuePosition": BodyKey("", ANY_JSON),
    "lastMetrics": BodyKey("", ANY_JSON),
}  # fmt: skip
SAMPLE_NUMBERS = tuple(
    (name, _is_count if name in COUNTS else _is_percent if name == "errorRate" else _is_measure)
    for name in SAMPLE_KEYS
    if name != "source"
)
CARRIED_KEYS = {  # of a file of Locust: what it does not say itself
    "tenantId": BodyKey("tenant_id", ID_TEXT, required=True),
    "envId": BodyKey("env_id", ID_TEXT, required=True),
    "scenarioId": BodyKey("scenario_id", ID_TEXT, required=True),
    "targetUsers": BodyKey("target_users", USERS_OR_NONE),
    "spawnRate": BodyKey("spawn_rate", number_value(0, MAX_SPAWN_RATE)),
    "startedAt": BodyKey("started_at", MOMENT),
    "finishedAt": BodyKey("finished_at", MOMENT),
    "metadata": BodyKey("metadata", METADATA),
}
EXPORT_KEYS = {
    name: BodyKey(name, ANY_JSON)
    for name in ("format", "version", "loadManager", "exportedAt", "run", "failures", "samples", "histograms")
}
LOCUST_JSON_KEYS = {"format": BodyKey("format", ANY_JSON), **CARRIED_KEYS, "stats": BodyKey("stats", _only("a list, what Locust's --json-file holds", lambda value: isinstance(value, list)), required=True)}  # fmt: skip
CSV_TEXT = _only("the text of a CSV file", lambda value: isinstance(value, str))
LOCUST_CSV_KEYS = {
    "format": BodyKey("format", ANY_JSON),
    **CARRIED_KEYS,
    "stats": BodyKey("stats", CSV_TEXT, required=True),
    "history": BodyKey("history", CSV_TEXT),
    "failures": BodyKey("failures", CSV_TEXT),
    "exceptions": BodyKey("exceptions", CSV_TEXT),
}


def read_import(body: Any, now: float) -> ImportedRun:
    """The run in the body of an import; InvalidInput names what is wrong in it."""
    readers = {EXPORT_FORMAT: _read_export, LOCUST_JSON: _read_locust_json, LOCUST_CSV: _read_locust_csv}
    kind = body.get("format") if isinstance(body, dict) else None
    if not isinstance(kind, str) or kind not in readers:
        why = f"allowed is {', '.join(readers)}, got {_shown(kind)}"
        raise InvalidInput(f"format: {why}", {"format": why})
    found = readers[kind](body, now)
    run = found.run
    for name, at in (
        ("createdAt", run.created_at),
        ("startedAt", run.started_at or 0.0),
        ("finishedAt", run.finished_at or 0.0),
    ):
        if not 0 <= at <= LATEST_MOMENT_S:
            raise _bad(name, "allowed is a moment before the year 2100")
    if (run.finished_at or 0.0) < (run.started_at or 0.0):
        raise _bad("finishedAt", "is before startedAt")
    _check_sizes(found)
    return found


def _check_sizes(found: ImportedRun) -> None:
    """Refuse numbers that no database column takes, wherever they were computed from."""
    if found.snapshot is not None:
        check_metrics({"stats": snapshot_to_json(found.snapshot)}, "stats", math.inf)
    problems: dict[str, str] = {}
    for sample in found.samples:
        if not 0 <= sample.at <= LATEST_MOMENT_S:
            raise _bad("samples", f"allowed are moments before the year 2100, got {_shown(sample.at)}")
        _checked_numbers(
            sample_to_json(sample), SAMPLE_NUMBERS, f"samples at {utc_text(sample.at)}", problems
        )
        if problems:
            raise InvalidInput("; ".join(f"{where}: {why}" for where, why in problems.items()), problems)


# ---- our own export ----


def _read_export(body: dict[str, Any], now: float) -> ImportedRun:
    check_body(body, EXPORT_KEYS)
    if body.get("version") != EXPORT_VERSION:
        why = f"allowed is {EXPORT_VERSION}, got {_shown(body.get('version'))}"
        raise InvalidInput(f"version: {why}", {"version": why})
    document = body.get("run")
    try:
        values = check_body(document, IMPORTED_RUN_KEYS)
    except InvalidInput as error:
        fields = {f"run.{name}": why for name, why in error.extra.get("fields", {}).items()} or {
            "run": error.message
        }
        raise InvalidInput("run: " + error.message, fields) from None
    values.pop("", None)
    values["status"] = RunStatus(values["status"])
    run = Run(plan=plan_of(values), **values, imported_at=now)
    snapshot = check_metrics(document, "lastMetrics", math.inf)
    samples = _read_samples(body.get("samples"), run.id)
    return ImportedRun(
        run,
        snapshot,
        samples,
        list(_read_histograms(body.get("histograms"))),
        _read_failures(body.get("failures")),
    )


def _read_samples(rows: Any, run_id: str) -> list[Sample]:
    if rows is None:
        return []
    if not isinstance(rows, list) or len(rows) > MAX_IMPORTED_SAMPLES:
        raise _bad("samples", f"allowed is a list of at most {MAX_IMPORTED_SAMPLES} points")
    samples = []
    problems: dict[str, str] = {}
    for index, row in enumerate(rows):
        place = f"samples[{index}]"
        if not isinstance(row, dict) or set(row) - {"timestamp", *SAMPLE_KEYS}:
            raise _bad(place, f"allowed is an object with the keys timestamp, {', '.join(SAMPLE_KEYS)}")
        numbers = _checked_numbers(row, SAMPLE_NUMBERS, place, problems)
        if row.get("source") not in ("poll", "push", "final"):
            problems[f"{place}.source"] = "allowed is poll, push or final"
        if problems:
            raise InvalidInput("; ".join(f"{where}: {why}" for where, why in problems.items()), problems)
        samples.append(
            Sample(run_id, _moment_at(row.get("timestamp"), f"{place}.timestamp"), *numbers, row["source"])
        )
    return sorted(samples, key=lambda sample: sample.at)


def _read_histograms(rows: Any) -> Iterator[tuple[float, int, str]]:
    if rows is None:
        return
    if not isinstance(rows, list) or len(rows) > MAX_IMPORTED_SAMPLES:
        raise _bad("histograms", f"allowed is a list of at most {MAX_IMPORTED_SAMPLES} entries")
    for index, row in enumerate(rows):
        place = f"histograms[{index}]"
        if (
            not isinstance(row, dict)
            or set(row) != {"timestamp", "isWhole", "rows"}
            or not isinstance(row["isWhole"], bool)
        ):
            raise _bad(
                place, "allowed is an object with the keys timestamp, isWhole (true or false) and rows"
            )
        if not isinstance(row["rows"], list) or not all(map(_is_histogram_row, row["rows"])):
            raise _bad(
                f"{place}.rows",
                "allowed is a list of [method, name, requests, failures, total ms, [ms, requests, ...]]",
            )
        yield _moment_at(row["timestamp"], f"{place}.timestamp"), int(row["isWhole"]), dump_json(row["rows"])


def _is_histogram_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 6:
        return False
    method, name, requests, failures, total_ms, pairs = row
    is_named = (method is None and name is None) or (type(method) is str and type(name) is str)
    counted = all(type(number) is int and 0 <= number < 1 << 53 for number in (requests, failures))
    is_measured = total_ms is not None and _is_measure(total_ms)
    return is_named and counted and is_measured and isinstance(pairs, list) and len(pairs) % 2 == 0 and len(pairs) <= 2 * MAX_BUCKETS and all(
        type(number) is int and 0 <= number < 1 << 53 for number in pairs
    )  # fmt: skip


FAILURE_KEYS = {
    "method": BodyKey("method", LONG_TEXT, required=True),
    "name": BodyKey("name", LONG_TEXT, required=True),
    "error": BodyKey("error", _long_text(100_000), required=True),
    "occurrences": BodyKey("occurrences", number_value(0, 1e15, whole=True), required=True),
    "firstSeen": BodyKey("first_seen_at", MOMENT),
    "lastSeen": BodyKey("last_seen_at", MOMENT),
}
EXCEPTION_KEYS = {
    "count": BodyKey("count", number_value(0, 1e15, whole=True), required=True),
    **{name: BodyKey(name, _long_text(100_000), required=True) for name in ("message", "traceback", "nodes")},
}
FAILURES_KEYS = {
    "failures": BodyKey(
        "failures",
        _list_of(
            FAILURE_KEYS,
            10_000,
            lambda values: Failure(**{"first_seen_at": None, "last_seen_at": None, **values}),
        ),
    ),
    "exceptions": BodyKey(
        "exceptions", _list_of(EXCEPTION_KEYS, 10_000, lambda values: TaskException(**values))
    ),
}


def _read_failures(document: Any) -> dict[str, Any] | None:
    if document is None:
        return None
    values = check_body(document, FAILURES_KEYS)
    return failures_to_json(values.get("failures", ()), values.get("exceptions", ()))


def _bad(place: str, why: str) -> InvalidInput:
    return InvalidInput(f"{place}: {why}", {place: why})


def _moment_at(value: Any, place: str) -> float:
    try:
        return parse_utc(value)
    except (ValueError, TypeError, OverflowError):
        raise _bad(place, f"allowed is {MOMENT.allowed}, got {_shown(value)}") from None


# ---- files of a headless Locust ----


def _run_of_file(
    values: dict[str, Any], body: dict[str, Any], began: float, ended: float, most_users: int, now: float
) -> Run:
    """The run a file of Locust tells of. Its id is made from the content, so that a file is imported once."""
    import uuid

    return Run(
        id=str(uuid.uuid5(uuid.UUID(IMPORT_NAMESPACE), hashlib.sha256(dump_json(body).encode()).hexdigest())),
        tenant_id=values["tenant_id"], env_id=values["env_id"], cluster_id="", scenario_id=values["scenario_id"],
        target_users=values.get("target_users", most_users), spawn_rate=values.get("spawn_rate", 0),
        status=RunStatus.FINISHED, created_at=began, started_at=began, finished_at=ended, metadata=values.get("metadata"),
        created_by="locust", source="ui", stop_reason="locust", imported_at=now,
    )  # fmt: skip


def _read_locust_json(body: dict[str, Any], now: float) -> ImportedRun:
    """What `locust --json-file` wrote (2.47.0): a list with an object for each endpoint."""
    values = check_body(body, LOCUST_JSON_KEYS)
    entries = [_LocustEntry(entry, f"stats[{index}]") for index, entry in enumerate(values["stats"])]
    if not entries or not any(entry.requests for entry in entries):
        raise _bad("stats", "holds no request; allowed is what Locust's --json-file holds")
    began, ended = min(entry.began for entry in entries), max(entry.ended for entry in entries)
    if ended > LATEST_MOMENT_S:
        raise _bad("stats", f"allowed are moments before the year 2100, got {_shown(ended)}")
    lasted_s = ended - began
    histograms: Histograms = {(entry.method, entry.name): entry.histogram for entry in entries}
    total = functools.reduce(_sum, histograms.values())
    snapshot = _snapshot_of_entries(entries, total, lasted_s, ended)
    run = _run_of_file(
        values, body, values.get("started_at", began), values.get("finished_at", ended), 0, now
    )
    histograms[None] = total
    return ImportedRun(
        run,
        snapshot,
        _samples_of_entries(entries, run.id),
        [(ended, 1, histograms_to_record(histograms, None))],
        None,
    )


class _LocustEntry:
    """One entry of Locust's JSON file, checked."""

    def __init__(self, entry: Any, place: str):
        if not isinstance(entry, dict):
            raise _bad(place, "allowed is an object")
        self._entry, self._place = entry, place
        self.method, self.name = (
            self._take(name, lambda value: isinstance(value, str) or value is None, "a text") or ""
            for name in ("method", "name")
        )
        self.requests = int(self._number("num_requests"))
        self.none_requests = int(self._number("num_none_requests"))
        total_ms = self._number("total_response_time")
        self.began, self.ended = self._number("start_time"), self._number("last_request_timestamp")
        self.min_ms, self.max_ms = self._number("min_response_time"), self._number("max_response_time")
        self.per_second, self.fails_per_second = (
            self._counts(name) for name in ("num_reqs_per_sec", "num_fail_per_sec")
        )
        self.histogram = Histogram(
            self.requests, int(self._number("num_failures")), total_ms, self._counts("response_times")
        )
        self.ended = max(self.ended, self.began)

    def _take(self, name: str, is_good: Callable[[Any], bool], allowed: str) -> Any:
        value = self._entry.get(name)
        if not is_good(value):
            raise _bad(f"{self._place}.{name}", f"allowed is {allowed}, got {_shown(value)}")
        return value

    def _number(self, name: str) -> float:
        return self._take(name, _is_measure, "a number from 0, or null") or 0

    def _counts(self, name: str) -> dict[int, int]:
        """Whole ms, or whole seconds, to a number of requests."""
        given = self._take(
            name, lambda value: isinstance(value, dict) and len(value) <= MAX_IMPORTED_SAMPLES, "an object"
        )
        found: dict[int, int] = {}
        for key, count in given.items():
            if (
                not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", key)
                or type(count) is not int
                or not 0 <= count < 1 << 53
            ):
                raise _bad(
                    f"{self._place}.{name}",
                    f"allowed are numbers to whole numbers, got {_shown(key)}: {_shown(count)}",
                )
            found[round(float(key))] = found.get(round(float(key)), 0) + count
        return found

    @property
    def median_ms(self) -> float | None:
        """As Locust does it: the middle one, within the exact least and most."""
        times, before = self.histogram.times, 0
        middle = (sum(times.values()) - 1) // 2
        for ms in sorted(times):
            before += times[ms]
            if before > middle:
                return max(self.min_ms, min(self.max_ms, ms))
        return None

    def row(self, lasted_s: float) -> EndpointStats:
        times, has_times = self.histogram.times, bool(self.histogram.times)
        return EndpointStats(
            self.method, self.name, self.requests, self.histogram.failures, self.histogram.total_ms / sum(times.values()) if has_times else None,
            self.min_ms if has_times else None, self.max_ms if has_times else None, self.median_ms, self.requests / lasted_s if lasted_s else None,
            percentile_ms(times, 0.95), percentile_ms(times, 0.99),
        )  # fmt: skip


def _snapshot_of_entries(
    entries: list[_LocustEntry], total: Histogram, lasted_s: float, ended: float
) -> Snapshot:
    percentiles = [percentile_ms(total.times, ratio) for ratio in PERCENTILE_RATIOS.values()]
    average = total.total_ms / sum(total.times.values()) if total.times else None
    error_percent = 100.0 * total.failures / total.requests
    per_s = total.requests / lasted_s if lasted_s else None
    return Snapshot(
        ended,
        per_s,
        total.requests,
        total.failures,
        error_percent,
        average,
        *percentiles,
        0,
        tuple(entry.row(lasted_s) for entry in entries),
    )


def _samples_of_entries(entries: list[_LocustEntry], run_id: str) -> list[Sample]:
    """A sample for each second that had requests; percentiles of moments are not in the file."""
    per_second: dict[int, list[int]] = {}
    for entry in entries:
        for which, counts in enumerate((entry.per_second, entry.fails_per_second)):
            for second, count in counts.items():
                per_second.setdefault(second, [0, 0])[which] += count
    samples, requests, failures = [], 0, 0
    for second in sorted(per_second):
        requests, failures = requests + per_second[second][0], failures + per_second[second][1]
        percent = min(100.0, 100.0 * failures / requests) if requests else None
        now = per_second[second]
        samples.append(
            Sample(
                run_id,
                float(second),
                float(now[0]),
                float(now[1]),
                requests,
                failures,
                percent,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                "poll",
            )
        )
    return samples


def _read_locust_csv(body: dict[str, Any], now: float) -> ImportedRun:
    """What `locust --csv` wrote: the texts of _stats.csv and, if there are, of the other files."""
    values = check_body(body, LOCUST_CSV_KEYS)
    history = _csv_rows(values.get("history", ""), "history")
    totals = [row for row in history if row.get("Name") == "Aggregated"]
    moments = [moment for row in totals if (moment := _csv_number(row.get("Timestamp"))) is not None]
    began, ended = (
        values.get("started_at", min(moments, default=None)),
        values.get("finished_at", max(moments, default=None)),
    )
    if began is None or ended is None or max(began, ended) > LATEST_MOMENT_S:
        raise _bad(
            "startedAt",
            "is missing; allowed is startedAt with finishedAt, or history, the text of _stats_history.csv, which has them",
        )
    try:
        snapshot = _snapshot_of_csv(values["stats"], ended)
    except (LocustBadAnswer, csv.Error, ValueError, OverflowError):
        raise _bad("stats", "is not the text of Locust's _stats.csv") from None
    users = [int(_csv_number(row.get("User Count")) or 0) for row in totals]
    run = _run_of_file(values, body, began, ended, max(users, default=0), now)
    samples = [
        _sample_of_history(row, run.id, is_current=len(totals) < len(history))
        for row in totals
        if _csv_number(row.get("Timestamp")) is not None
    ]
    failures = tuple(map(_failure_of_csv, _csv_rows(values.get("failures", ""), "failures")))
    exceptions = tuple(
        TaskException(
            int(_csv_number(row.get("Count")) or 0),
            row.get("Message") or "",
            row.get("Traceback") or "",
            row.get("Nodes") or "",
        )
        for row in _csv_rows(values.get("exceptions", ""), "exceptions")
    )
    return ImportedRun(run, snapshot, samples, [], failures_to_json(failures, exceptions))


def _csv_rows(text: str, place: str) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise _bad(place, f"is not CSV: {error}") from None


def _sample_of_history(row: dict[str, Any], run_id: str, is_current: bool) -> Sample:
    """One row of _stats_history.csv; with --csv-full-history its percentiles are the current ones."""
    p50, p95, p99 = (_csv_number(row.get(column)) for column in ("50%", "95%", "99%"))
    requests, failures = (
        int(_csv_number(row.get(f"Total {what} Count")) or 0) for what in ("Request", "Failure")
    )
    whole_run = (None, None, None) if is_current else (p50, p95, p99)
    return Sample(
        run_id, _csv_number(row.get("Timestamp")) or 0.0, _csv_number(row.get("Requests/s")), _csv_number(row.get("Failures/s")), requests, failures,
        _error_percent(requests, failures), _csv_number(row.get("Total Average Response Time")), *whole_run,
        *((p50, p95) if is_current else (None, None)), int(_csv_number(row.get("User Count")) or 0), "poll",
    )  # fmt: skip


# ============================================================================
# 16. HTTP SERVER - connections, strict parsing, one loop for what is in memory
# ============================================================================
# ThreadingHTTPServer accepts; its process_request parks the connection in one selector
# loop instead of a thread of its own. The loop answers what is in memory right there, and
# hands what waits (Locust, disk) to a thread each. A thread for each connection would
# convoy on the interpreter lock (64 connections: p99 over 300 ms), and a slow sender
# would hold one; so 500 half-sent requests cost 0.2 MiB. A head that was parsed before is
# not parsed again: clients send the same bytes over and over.

REASONS = {
    200: "OK", 201: "Created", 204: "No Content", 302: "Found", 400: "Bad Request", 401: "Unauthorized",
    403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict", 413: "Content Too Large",
    415: "Unsupported Media Type", 422: "Unprocessable Content", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip

MAX_UNSENT_BYTES = 1024 * 1024  # of an event stream whose client reads too slowly
IDLE_CONNECTION_S = 70.0
HEAD_DEADLINE_S = 15.0  # from a request's first byte to the end of its head
BODY_DEADLINE_S = 30.0
WRITE_STALL_S = 30.0
HANDSHAKE_DEADLINE_S = 10.0
LINGER_S = 2.0  # reading on after an answer that closes the connection
MAX_WAITING_REQUESTS = 256  # threads for requests that wait; stops have a reserve


class BadRequest(LoadManagerError):
    """The bytes are not a request that we take; the connection is closed after the answer."""

    error = "bad request"

    def __init__(self, message: str, http_status: int = 400):
        super().__init__(message)
        self.http_status = http_status
        self.error = REASONS[http_status].lower()


class RequestHead:
    """A parsed request head; immutable but for `matched`, where the API keeps its route."""

    __slots__ = (
        "method",
        "path",
        "query",
        "headers",
        "content_length",
        "keep_alive",
        "wants_continue",
        "matched",
    )

    def __init__(self, method: str, target: str, headers: dict[str, str], version: str):
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = headers
        self.content_length = _content_length(headers)
        connection = headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (version == "1.1" or "keep-alive" in connection)
        self.wants_continue = headers.get("expect", "").lower() == "100-continue"
        self.matched: Any = None


REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
ONLY_ONCE = frozenset(
    {
        "host",
        "content-length",
        "authorization",
        "x-locust-token",
        "content-type",
        "idempotency-key",
        "transfer-encoding",
    }
)


def parse_head(raw: bytes) -> RequestHead:
    """The head of a request up to and with its empty line, or BadRequest.

    Strict where laxness is how requests are smuggled (RFC 9112): no bare CR or LF, no
    folded lines, no repeated length, no Transfer-Encoding."""
    return _parse_head_cached(raw) if len(raw) <= 1024 else _parse_head(raw)


def _parse_head(raw: bytes) -> RequestHead:
    lines = raw[:-4].split(b"\r\n")
    match = REQUEST_LINE.fullmatch(lines[0])
    if not match:
        raise BadRequest("the request line is not METHOD SP target SP HTTP/1.1")
    method, target, major, minor = (part.decode("ascii") for part in match.groups())
    if major != "1":
        raise BadRequest("allowed are HTTP/1.1 and HTTP/1.0", 505)
    if len(lines) > MAX_HEADERS + 1:
        raise BadRequest(f"more than {MAX_HEADERS} headers", 431)
    headers = _parse_headers(lines[1:])
    if minor != "0" and "host" not in headers:
        raise BadRequest("the header Host is missing")
    if "transfer-encoding" in headers:
        known_length = "content-length" in headers
        raise BadRequest(
            "Transfer-Encoding is not supported; send Content-Length", 400 if known_length else 501
        )
    if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        raise BadRequest("the request target must be a path that begins with /")
    return RequestHead(method, target, headers, "1.1" if minor != "0" else "1.0")


_parse_head_cached = functools.lru_cache(maxsize=2048)(_parse_head)


def _parse_headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        match = HEADER_LINE.fullmatch(line)
        if not match:
            raise BadRequest("a header line is not Name: value, or has control characters")
        name, value = match.group(1).decode("ascii").lower(), match.group(2).decode("latin-1").rstrip(" \t")
        if name in headers and name in ONLY_ONCE:
            raise BadRequest(f"the header {name} stands twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _content_length(headers: dict[str, str]) -> int:
    text = headers.get("content-length")
    if text is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise BadRequest("Content-Length must be digits only")
    return int(text)


class Request:
    """A whole request as a handler gets it. tenant_id, env_id, run_id and note: what it turned
    out to be about, for the audit."""

    __slots__ = (
        "head",
        "route",
        "params",
        "body",
        "query",
        "principal",
        "address",
        "tenant_id",
        "env_id",
        "run_id",
        "note",
    )

    def __init__(self, head: RequestHead, route: Any, params: dict[str, str], principal: Any, address: str):
        self.head = head
        self.route = route
        self.params = params
        self.principal = principal
        self.address = address
        self.body = b""
        self.query: dict[str, Any] = {}
        self.tenant_id = self.env_id = self.run_id = self.note = ""


class Response:
    """Status, body and headers of an answer.

    opens: makes it a stream without end; called in the loop's thread with the connection,
    once the head is sent, to keep it and push() to it."""

    __slots__ = ("http_status", "body", "content_type", "headers", "opens")

    def __init__(
        self, body: bytes | list[bytes] = b"", http_status: int = 200, content_type: str = JSON_TYPE, headers: dict[str, str] | None = None,
        opens: Callable[[Connection], None] | None = None,
    ):  # fmt: skip
        self.http_status = http_status
        self.body = body
        self.content_type = content_type
        self.headers = headers
        self.opens = opens

    def to_bytes(self, keep_alive: bool, with_body: bool = True) -> bytes:
        """Head and body in one piece: two writes would stall a client 40 ms. A body in pieces
        (30 MB of a long list) is copied only here."""
        body = self.body if isinstance(self.body, list) else [self.body]
        parts = [_head_start(self.http_status, self.content_type, keep_alive), _date_line(int(time.time()))]
        for name, value in (self.headers or {}).items():
            parts.append(f"{name}: {_header_value(value)}\r\n".encode("latin-1"))
        if self.http_status != 204 and self.opens is None:
            parts.append(b"Content-Length: %d\r\n" % sum(map(len, body)))
        parts.append(b"\r\n")
        if with_body:
            parts += body
        return b"".join(parts)


@functools.lru_cache(maxsize=256)
def _head_start(http_status: int, content_type: str, keep_alive: bool) -> bytes:
    lines = [f"HTTP/1.1 {http_status} {REASONS[http_status]}"]
    if http_status != 204:
        lines.append(f"Content-Type: {content_type}")
    lines += ["Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
    lines.append("Connection: keep-alive" if keep_alive else "Connection: close")
    return ("\r\n".join(lines) + "\r\n").encode("latin-1")


@functools.lru_cache(maxsize=2)
def _date_line(epoch_s: int) -> bytes:
    from email.utils import formatdate

    return f"Date: {formatdate(epoch_s, usegmt=True)}\r\n".encode()


def _header_value(value: str) -> str:
    """Refuses what would end the header (the library's send_header does not check)."""
    if not value.isprintable():
        raise ValueError("a header value has control characters")
    return value


def error_response(error: LoadManagerError) -> Response:
    headers = {}
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"error": error.error, "message": error.message, **error.extra}
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":"))  # ASCII: an odd input stays sendable
    return Response(text.encode(), error.http_status, headers=headers)


class TlsFiles:
    """Our certificate and key. They are read again when they change; connections that are
    open go on with what they began with."""

    def __init__(self, config: ServerTlsConfig, folder: str):
        """StartupError when they cannot be used."""
        names = {
            "certFile": config.cert_file,
            "keyFile": config.key_file,
            "clientCaFile": config.client_ca_file,
        }
        self._paths = {name: os.path.join(folder, path) for name, path in names.items() if path}
        self._seen = self._marks()
        self._context = self._read()

    def wrap(self, sock: socket.socket) -> TlsSocket:
        """The socket with TLS, its handshake still to come; OSError when it is closed already."""
        return TlsSocket(self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False))

    def refresh(self) -> None:
        """Read the files again if they have changed; what cannot be used is logged, and the
        certificate of before stays."""
        marks = self._marks()
        if marks == self._seen:
            return
        self._seen = marks
        try:
            self._context = self._read()
            log("certificate read again", file=self._paths["certFile"])
        except StartupError as error:
            log("certificate not read again; the one before is kept", why=error)

    def _marks(self) -> list[Any]:
        marks: list[Any] = []
        for path in self._paths.values():
            try:
                found = os.stat(path)
                marks.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                marks.append(None)
        return marks

    def _read(self) -> Any:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        name = "certFile"
        try:
            context.load_cert_chain(
                self._paths["certFile"], self._paths["keyFile"], password=lambda: ""
            )  # a prompt would hang
            if "clientCaFile" in self._paths:
                name = "clientCaFile"
                context.load_verify_locations(self._paths[name])
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            both = " with keyFile" if name == "certFile" else ""
            raise StartupError(
                f"server.tls.{name}: {self._paths[name]}{both} cannot be used: {why}"
            ) from None
        return context


class TlsSocket:
    """A socket with TLS that a Connection uses like a plain one: where it would have to wait,
    it raises BlockingIOError."""

    def __init__(self, tls: Any):
        import ssl

        self._tls = tls
        self._waits = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self._wants_write = ssl.SSLWantWriteError

    def handshake(self) -> int:
        """0 when it is done, else what to wait for; OSError when it failed."""
        try:
            self._tls.do_handshake()
            return 0
        except self._waits as waits:
            return selectors.EVENT_WRITE if isinstance(waits, self._wants_write) else selectors.EVENT_READ

    def recv(self, size: int) -> bytes:
        try:
            received = self._tls.recv(size)
            while self._tls.pending():  # what is decrypted already, no selector tells of
                received += self._tls.recv(size)
            return received
        except self._waits:
            raise BlockingIOError from None

    def send(self, raw: Any) -> int:
        try:
            return self._tls.send(raw)
        except self._waits:
            raise BlockingIOError from None

    def send_plain(self, raw: bytes) -> None:
        """Say something without TLS to a client that does not speak it."""
        try:
            socket.socket.send(self._tls, raw)
        except OSError:
            pass

    def shutdown(self, how: int) -> None:
        try:
            self._tls.unwrap()  # says that we end; the other side's answer is not waited for
        except (OSError, ValueError):
            pass
        self._tls.shutdown(how)

    def fileno(self) -> int:
        return self._tls.fileno()

    def close(self) -> None:
        self._tls.close()


class Connection:
    """One client's connection, owned by the loop's thread."""

    __slots__ = (
        "loop", "sock", "address", "buffer", "request", "parts", "missing", "busy", "out", "closing", "deadline", "mask",
        "waiting_since", "streams", "on_close", "shakes_hands",
    )  # fmt: skip

    def __init__(self, loop: ConnectionLoop, sock: socket.socket | TlsSocket, address: str):
        self.loop = loop
        self.sock: socket.socket | TlsSocket | None = sock
        self.shakes_hands = isinstance(sock, TlsSocket)
        self.address = address
        self.buffer = b""
        self.request: Request | None = None  # its body is being read
        self.parts: list[bytes] = []
        self.missing = 0  # bytes of the body still to come
        self.busy = False  # a thread works on its request
        self.out: Any = b""  # still to be sent: a memoryview, so that 30 MB are not copied for each write
        self.closing = False  # close when `out` is sent
        self.deadline = monotonic_s() + (HANDSHAKE_DEADLINE_S if self.shakes_hands else IDLE_CONNECTION_S)
        self.mask = 0
        self.waiting_since = monotonic_s()  # idle or half-sent since then
        self.streams = False  # an event stream: nothing more is read, its end is the connection's
        self.on_close: Callable[[], None] = _nothing

    # ---- reading -----------------------------------------------------------

    def on_event(self, mask: int) -> None:
        if self.shakes_hands:
            self._shake_hands()
            return
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ and self.sock is not None:
            self._receive()

    def _shake_hands(self) -> None:
        """Go on with the TLS handshake as far as it goes without waiting."""
        try:
            wanted = self.sock.handshake()  # type: ignore[union-attr]
        except (OSError, ValueError) as error:
            self.loop.tell_failed_handshake(self.address, error)
            if getattr(error, "reason", None) == "HTTP_REQUEST":
                answer = error_response(BadRequest("this port speaks https, and was sent plain HTTP"))
                self.sock.send_plain(answer.to_bytes(False))  # type: ignore[union-attr]
            self.close()
            return
        if wanted:
            self.loop.watch(self, wanted)
            return
        self.shakes_hands = False
        self.deadline = monotonic_s() + IDLE_CONNECTION_S
        self.loop.watch(self, selectors.EVENT_READ)
        self._receive()

    def _receive(self) -> None:
        try:
            received = self.sock.recv(65536)  # type: ignore[union-attr]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not received:
            self.close()
        elif self.closing or self.streams:
            pass  # lingering, or a stream: what is still sent to us is thrown away
        elif self.request is not None:
            self._take_body(received)
            self.advance()
        else:
            self.buffer = self.buffer + received if self.buffer else received
            self.advance()

    def advance(self) -> None:
        """Handle every whole request that has arrived, in order."""
        while (
            not self.busy and not self.closing and not self.streams and self.sock is not None and not self.out
        ):
            if self.request is None and not self._begin_request():
                return
            if self.request is not None:
                if self.missing:
                    return
                self._handle()

    def _begin_request(self) -> bool:
        """Take one head off the buffer; False when none is complete."""
        buffer = self.buffer
        while buffer[:2] == b"\r\n":
            buffer = self.buffer = buffer[2:]
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._check_unfinished_head()
            return False
        end += 4
        raw, self.buffer = (buffer, b"") if end == len(buffer) else (buffer[:end], buffer[end:])
        try:
            head = parse_head(raw) if end <= MAX_HEAD_BYTES else self._refuse_long_head()
        except LoadManagerError as error:
            self.send(error_response(error).to_bytes(False), close=True)
            return False
        self._admit(head)
        return True

    def _refuse_long_head(self) -> RequestHead:
        raise BadRequest(f"the request head is over {MAX_HEAD_BYTES} bytes", 431)

    def _check_unfinished_head(self) -> None:
        if not self.buffer:
            return
        line, newline, _ = self.buffer.partition(b"\r\n")
        try:
            if len(self.buffer) > MAX_HEAD_BYTES:
                self._refuse_long_head()
            if newline and not REQUEST_LINE.fullmatch(line) or not self.buffer[:1].isalpha():
                raise BadRequest("this is not an HTTP/1.1 request")
        except BadRequest as error:
            self.send(error_response(error).to_bytes(False), close=True)
            return
        if self.deadline > monotonic_s() + HEAD_DEADLINE_S:
            self.deadline = self.waiting_since = monotonic_s()
            self.deadline += HEAD_DEADLINE_S

    def _admit(self, head: RequestHead) -> None:
        """Route and authenticate before a byte of the body is read; a body that is refused
        is never taken for a request, as the connection is closed."""
        try:
            request = self.loop.api.admit(head, self.address)
        except KeysNeeded as needed:
            self._admit_later(head, needed)
            return
        except LoadManagerError as error:
            unread = head.content_length > 0
            keep = head.keep_alive and not unread
            self.send(error_response(error).to_bytes(keep, head.method != "HEAD"), close=not keep)
            return
        self.request = request
        self.missing = head.content_length
        self.parts = []
        if self.missing:
            self.deadline = monotonic_s() + BODY_DEADLINE_S
            if head.wants_continue and not self.buffer:
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            received, self.buffer = self.buffer, b""
            if received:
                self._take_body(received)

    def _admit_later(self, head: RequestHead, needed: KeysNeeded) -> None:
        """Admit once keys were read, which others need not wait for; the body stays unread."""
        self.busy = True
        self.deadline = math.inf
        self.loop.watch(self, 0)
        needed.read_soon(functools.partial(self.loop.call, functools.partial(self._admit_again, head)))

    def _admit_again(self, head: RequestHead) -> None:
        self.busy = False
        if self.sock is None:
            return
        self.deadline = monotonic_s() + IDLE_CONNECTION_S
        self.loop.watch(self, selectors.EVENT_READ)
        self._admit(head)
        self.advance()

    def _take_body(self, received: bytes) -> None:
        part = received[: self.missing]
        self.parts.append(part)
        self.missing -= len(part)
        if len(received) > len(part):
            self.buffer = received[len(part) :]

    def _handle(self) -> None:
        request, self.request = self.request, None
        assert request is not None
        request.body = b"".join(self.parts) if self.parts else b""
        if not request.route.waits:
            self.answer(request, self.loop.api.respond(request))
            return
        self.busy = True
        self.deadline = math.inf
        self.loop.watch(self, 0)
        self.loop.work_on(self, request)

    # ---- writing -----------------------------------------------------------

    def answer(self, request: Request, response: Response) -> None:
        """Send the response to the request in hand."""
        self.busy = False
        if response.opens is not None and request.head.method != "HEAD":
            self._open_stream(response)
            return
        keep = request.head.keep_alive and not self.loop.draining
        self.send(response.to_bytes(keep, request.head.method != "HEAD"), close=not keep)

    def _open_stream(self, response: Response) -> None:
        assert response.opens is not None
        self.streams = True
        self.buffer = b""
        self._write(response.to_bytes(False))
        if self.sock is not None:
            response.opens(self)

    def push(self, raw: bytes) -> None:
        """Append to a stream. A client that leaves too much unread is dropped: it can come
        back and resume, whereas its backlog would grow for ever."""
        if self.out and len(self.out) + len(raw) > MAX_UNSENT_BYTES:
            log("slow event stream dropped", address=self.address, unsent=len(self.out))
            self.close()
            return
        self._write(raw)

    def send(self, raw: bytes, close: bool = False) -> None:
        self.closing = self.closing or close
        self._write(raw)

    def _write(self, raw: bytes) -> None:
        if self.sock is None:
            return
        if self.out:
            self.out = memoryview(bytes(self.out) + raw)
            return
        try:
            sent = self.sock.send(raw)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(raw):
            self.out = memoryview(raw)[sent:]
            self.deadline = monotonic_s() + WRITE_STALL_S
            self.loop.watch(self, selectors.EVENT_WRITE)
        else:
            self._sent()

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self.out[: 1 << 18])  # type: ignore[union-attr]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        self.out = self.out[sent:]
        self.deadline = monotonic_s() + WRITE_STALL_S
        if not self.out:
            self._sent()
            self.advance()

    def _sent(self) -> None:
        if self.closing:
            self._close_gently()
            return
        if self.request is None:
            self.waiting_since = monotonic_s()
            self.deadline = math.inf if self.streams else self.waiting_since + IDLE_CONNECTION_S
        self.loop.watch(self, selectors.EVENT_READ)

    def _close_gently(self) -> None:
        """Say that no more comes, and read on for a moment: a close with unread bytes would
        reset the connection, and the client might never see our answer."""
        try:
            self.sock.shutdown(socket.SHUT_WR)  # type: ignore[union-attr]
        except OSError:
            self.close()
            return
        self.deadline = monotonic_s() + LINGER_S
        self.buffer = b""
        self.loop.watch(self, selectors.EVENT_READ)

    def close(self) -> None:
        sock, self.sock = self.sock, None
        if sock is not None:
            self.loop.forget(self, sock)
            sock.close()
            self.on_close()


class ConnectionLoop(threading.Thread):
    """The one thread that reads and writes all connections."""

    def __init__(self, api: Any, most_connections: int, tls: TlsFiles | None = None):
        super().__init__(name="connections", daemon=True)
        self.api = api
        self._tls = tls
        self._told_of_handshake_at = -math.inf
        self.draining = False
        self._most_connections = most_connections
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._waiting = 0  # requests that threads work on
        self._closed = False

    # ---- from any thread ---------------------------------------------------

    def call(self, work: Callable[[], None]) -> None:
        """Run `work` in the loop's thread."""
        self._calls.append(work)
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # enough wake-ups are under way
        except OSError:
            pass  # the loop has ended

    def adopt(self, sock: socket.socket, address: str) -> None:
        self.call(functools.partial(self._add, sock, address))

    def drain(self, wait_s: float) -> None:
        """Answer what is in hand, close what is idle; returns when all is answered or time is up."""
        self.draining = True
        self.call(self._close_idle)
        give_up_at = monotonic_s() + wait_s
        while self._connections and monotonic_s() < give_up_at:
            time.sleep(0.02)

    def close(self) -> None:
        self._closed = True
        self.call(_nothing)

    # ---- in the loop's thread ----------------------------------------------

    def run(self) -> None:
        sweep_at = monotonic_s() + 1
        while not self._closed:
            for event, mask in self._selector.select(1.0):
                if event.data is None:
                    self._make_calls()
                    continue
                try:
                    event.data.on_event(mask)
                except Exception as error:  # noqa: BLE001 - the edge: one connection must not end all
                    import traceback

                    log("connection failed", error=repr(error), trace=traceback.format_exc())
                    event.data.close()
            if monotonic_s() >= sweep_at:
                self._sweep()
                sweep_at = monotonic_s() + 1

    def _make_calls(self) -> None:
        try:
            while len(self._wake_reader.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            pass
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception as error:  # noqa: BLE001 - the edge
                log("connection loop call failed", error=repr(error))

    def _add(self, sock: socket.socket, address: str) -> None:
        if len(self._connections) >= self._most_connections:
            self._make_room()
        try:
            connection = Connection(self, self._tls.wrap(sock) if self._tls else sock, address)
        except (OSError, ValueError):  # it went away before its handshake
            sock.close()
            return
        self._connections.add(connection)
        self.watch(connection, selectors.EVENT_READ)

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its client; the newest is served."""
        waiting = [item for item in self._connections if not item.busy and not item.out and not item.streams]
        if waiting:
            min(waiting, key=lambda connection: connection.waiting_since).close()

    def watch(self, connection: Connection, mask: int) -> None:
        """Wait for what `mask` says; 0: for nothing, while a thread works on its request."""
        if connection.mask == mask or connection.sock is None:
            return
        if not connection.mask:
            self._selector.register(connection.sock, mask, connection)
        elif not mask:
            self._selector.unregister(connection.sock)
        else:
            self._selector.modify(connection.sock, mask, connection)
        connection.mask = mask

    def forget(self, connection: Connection, sock: socket.socket) -> None:
        if connection.mask:
            self._selector.unregister(sock)
            connection.mask = 0
        self._connections.discard(connection)

    def work_on(self, connection: Connection, request: Request) -> None:
        """Have a thread make the response to a request that waits for Locust or the disk."""
        if self._waiting >= MAX_WAITING_REQUESTS and not request.route.reserved:
            self._answered(
                connection,
                request,
                error_response(NotReady("too many requests are waiting", retry_after_s=1)),
            )
            return
        self._waiting += 1

        def work() -> None:
            response = self.api.respond(request)
            self.call(functools.partial(self._worked, connection, request, response))

        try:
            threading.Thread(target=work, name="request", daemon=True).start()
        except RuntimeError:
            self._worked(connection, request, error_response(NotReady("no thread is free", retry_after_s=1)))

    def _worked(self, connection: Connection, request: Request, response: Response) -> None:
        self._waiting -= 1
        self._answered(connection, request, response)

    def _answered(self, connection: Connection, request: Request, response: Response) -> None:
        connection.answer(request, response)
        connection.advance()

    def tell_failed_handshake(self, address: str, error: Exception) -> None:
        """Log it, but not each of a flood."""
        if monotonic_s() - self._told_of_handshake_at >= 1.0:
            self._told_of_handshake_at = monotonic_s()
            log(
                "TLS handshake failed",
                address=address,
                why=getattr(error, "reason", None) or _network_words(error),
            )

    def _sweep(self) -> None:
        now = monotonic_s()
        if self._tls:
            self._tls.refresh()
        for connection in [item for item in self._connections if item.deadline < now]:
            connection.close()

    def _close_idle(self) -> None:
        for connection in list(self._connections):
            if not connection.busy and not connection.out:
                connection.close()


class ApiServer(ThreadingHTTPServer):
    """Accepts connections and parks them in the loop."""

    request_queue_size = 512  # the default of 5 makes bursts wait for SYN retries
    allow_reuse_address = os.name == "posix"

    def __init__(self, host: str, port: int, loop: ConnectionLoop):
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.loop = loop
        self._spare = os.open(os.devnull, os.O_RDONLY)
        super().__init__((host, port), BaseHTTPRequestHandler)

    def server_bind(self) -> None:
        """As in TCPServer: HTTPServer's own asks DNS for our name, which may take forever."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            self._drop_one()
            raise

    def _drop_one(self) -> None:
        """Out of file descriptors: take the connection with a spare one and close it, or the
        accept loop would spin on it."""
        os.close(self._spare)
        try:
            super().get_request()[0].close()
        except OSError:
            time.sleep(0.05)
        self._spare = os.open(os.devnull, os.O_RDONLY)

    def process_request(self, request: Any, client_address: Any) -> None:
        request.setblocking(False)
        try:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass
        self.loop.adopt(request, client_address[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        log("connection not accepted", address=client_address[0], error=repr(sys.exc_info()[1]))


# ============================================================================
# 17. EVENTS - changes of runs, told to event streams
# ============================================================================
# The store tells of a change under its lock; note() only writes down which run. A round in
# the loop's thread, at most every ROUND_S, sends the newest state of each changed run once,
# however often it changed. As an event is a whole state, no events are kept for those who
# come back: what they missed is the newest state of the runs that changed since.


class Stream:
    """One client's event stream. scope: what it may see; is_allowed: False once its
    sign-in or its token has ended; owner: whose streams are counted together."""

    __slots__ = ("connection", "run_id", "scope", "resume_id", "is_allowed", "owner")

    def __init__(
        self,
        run_id: str | None,
        scope: Scope,
        resume_id: str | None,
        is_allowed: Callable[[], bool],
        owner: str,
    ):
        self.connection: Connection | None = None
        self.run_id = run_id  # None: all runs
        self.scope = scope
        self.owner = owner
        self.resume_id = resume_id  # Last-Event-ID
        self.is_allowed = is_allowed

    def push(self, raw: bytes) -> None:
        if raw and self.connection is not None:
            self.connection.push(raw)


class Change(NamedTuple):
    """The newest change of one run."""

    seq: int
    place: tuple[str, str]  # tenant and environment


class EventFeed:
    """Tells streams of changes. note() comes from any thread, all else runs in the loop's.

    Events: `run` (the run's JSON; in the feed of all runs without requestStats), `sample`
    (one point of its series; only in the stream of one run), `deleted` {"id"}, and at the
    start `ready`, or `reset` where a Last-Event-ID cannot be resumed: read all anew."""

    ROUND_S = 0.25
    HEARTBEAT_S = 15.0
    MAX_REMEMBERED = 5000  # runs whose last change is known; older ids cannot be resumed
    MAX_REPLAYED = 500

    def __init__(
        self, store: Store, loop: ConnectionLoop, timer: Timer, most_streams: int, most_of_one: int = 1000
    ):
        self._store = store
        self._loop = loop
        self._timer = timer
        self._most_streams = most_streams
        self._most_of_one = most_of_one
        self._era = secrets.token_hex(4)  # ids of an earlier process are not ours
        self._lock = threading.Lock()  # guards _noted and _round_is_due
        self._noted: dict[str, tuple[str, str]] = {}  # changed run -> its tenant and environment
        self._round_is_due = False
        self._next_round_at = 0.0
        self._seq = 0
        self._changes: OrderedDict[str, Change] = OrderedDict()  # by run, the newest last
        self._forgotten_seq = 0  # changes up to this one are no longer in _changes
        self._streams: dict[str | None, set[Stream]] = {}  # by run, None: of all runs
        self._sampled_at: dict[str, float] = {}  # of runs with a stream of their own
        self._beating = False
        store.listeners.append(self.note)

    # ---- from any thread ---------------------------------------------------

    def note(self, run: Run) -> None:
        """A run has changed or is gone; called under the store's lock."""
        with self._lock:
            self._noted[run.id] = run.tenant_id, run.env_id
            if self._round_is_due:
                return
            self._round_is_due = True
        wait_s = self._next_round_at - monotonic_s()
        if wait_s <= 0:
            self._loop.call(self._round)
        else:
            self._timer.after(wait_s, functools.partial(self._loop.call, self._round))

    # ---- streams come and go -----------------------------------------------

    def response(self, stream: Stream) -> Response:
        """The answer that opens a stream; NotReady when there are too many, TooManyRequests when
        too many are of one owner."""
        open_streams = self._all_streams()
        if len(open_streams) >= self._most_streams:
            raise NotReady(
                f"{self._most_streams} event streams are open, the most there may be", retry_after_s=10
            )
        if sum(other.owner == stream.owner for other in open_streams) >= self._most_of_one:
            raise TooManyRequests(
                f"{self._most_of_one} event streams of this token are open, the most there may be",
                retry_after_s=10,
            )
        headers = {"X-Accel-Buffering": "no"}  # nginx would keep events back
        return Response(
            content_type="text/event-stream", headers=headers, opens=functools.partial(self._join, stream)
        )

    def _join(self, stream: Stream, connection: Connection) -> None:
        stream.connection = connection
        connection.on_close = functools.partial(self._leave, stream)
        self._streams.setdefault(stream.run_id, set()).add(stream)
        if not self._beating:
            self._beating = True
            self._timer.after(self.HEARTBEAT_S, functools.partial(self._loop.call, self._beat))
        stream.push(b"retry: 1000\n\n" + self._welcome(stream))

    def _leave(self, stream: Stream) -> None:
        streams = self._streams.get(stream.run_id, set())
        streams.discard(stream)
        if not streams:
            self._streams.pop(stream.run_id, None)
            self._sampled_at.pop(stream.run_id or "", None)

    def close_refused(self) -> None:
        """End the streams whose sign-in has ended."""
        for stream in self._all_streams():
            if not stream.is_allowed() and stream.connection is not None:
                stream.connection.close()

    def _all_streams(self) -> list[Stream]:
        return [stream for streams in self._streams.values() for stream in streams]

    def _welcome(self, stream: Stream) -> bytes:
        """What a new stream gets first: what it missed, or that it must read all anew; the
        stream of one run gets the run."""
        missed = None if stream.resume_id is None else self._missed(stream)
        if missed is not None:
            return b"".join(missed)
        start = b"ready" if stream.resume_id is None else b"reset"
        first = self._event(start, b"{}", self._seq)
        return first + self._run_event(stream.run_id, self._seq) if stream.run_id else first

    def _missed(self, stream: Stream) -> list[bytes] | None:
        """Events since the stream's Last-Event-ID; None when that is too long ago, or
        nothing of ours."""
        era, _, number = (stream.resume_id or "").partition("-")
        if era != self._era or not re.fullmatch("[0-9]{1,15}", number):
            return None
        since = int(number)
        if since < self._forgotten_seq or since > self._seq:
            return None
        missed = []
        for run_id, change in reversed(self._changes.items()):
            if change.seq <= since:
                break
            if stream.run_id in (None, run_id) and stream.scope.covers(*change.place):
                missed.append((run_id, change.seq))
            if len(missed) > self.MAX_REPLAYED:
                return None
        return [self._run_event(run_id, seq, brief=stream.run_id is None) for run_id, seq in reversed(missed)]

    # ---- rounds ------------------------------------------------------------

    def _round(self) -> None:
        with self._lock:
            noted, self._noted = self._noted, {}
            self._round_is_due = False
            self._next_round_at = monotonic_s() + self.ROUND_S
        changed = [(run_id, self._remember(run_id, place)) for run_id, place in noted.items()]
        self._tell_followers_of_all(changed)
        for run_id, change in changed:
            if run_id in self._streams:
                raw = self._sample_event(run_id) + self._run_event(run_id, change.seq)
                for stream in list(self._streams[run_id]):
                    stream.push(raw)

    def _remember(self, run_id: str, place: tuple[str, str]) -> Change:
        self._seq += 1
        change = self._changes[run_id] = Change(self._seq, place)
        self._changes.move_to_end(run_id)
        if len(self._changes) > self.MAX_REMEMBERED:
            self._forgotten_seq = self._changes.popitem(last=False)[1].seq
        return change

    def _tell_followers_of_all(self, changed: list[tuple[str, Change]]) -> None:
        streams = self._streams.get(None)
        if not streams:
            return
        events = [
            (change.place, self._run_event(run_id, change.seq, brief=True)) for run_id, change in changed
        ]
        told: dict[Scope, bytes] = {}  # the same bytes for all who see the same
        for stream in list(streams):
            if stream.scope not in told:
                told[stream.scope] = b"".join(event for place, event in events if stream.scope.covers(*place))
            stream.push(told[stream.scope])

    def _beat(self) -> None:
        """A comment to every stream: proxies keep it open, and a dead client is noticed."""
        self._beating = False
        self.close_refused()
        for stream in self._all_streams():
            self._beating = True
            stream.push(b": heartbeat\n\n")
        if self._beating:
            self._timer.after(self.HEARTBEAT_S, functools.partial(self._loop.call, self._beat))

    # ---- one event's bytes -------------------------------------------------

    def _run_event(self, run_id: str, seq: int, brief: bool = False) -> bytes:
        try:
            wire = self._store.brief(run_id) if brief else self._store.wire(run_id)
        except NotFound:
            return self._event(b"deleted", dump_json({"id": run_id}).encode(), seq)
        return self._event(b"run", wire, seq)

    def _sample_event(self, run_id: str) -> bytes:
        """The run's newest point; empty when it was told before."""
        sample = self._store.newest_sample(run_id)
        if sample is None or sample.at <= self._sampled_at.get(run_id, 0.0):
            return b""
        self._sampled_at[run_id] = sample.at
        return b"event: sample\ndata: " + dump_json(sample_to_json(sample)).encode() + b"\n\n"

    def _event(self, name: bytes, data: bytes, seq: int) -> bytes:
        return b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (self._era.encode(), seq, name, data)


# ============================================================================
# 18. ACCESS - who a token says the caller is, and how much they may ask
# ============================================================================
# Tokens are kept and compared as hashes, all of them for each try, so that neither the
# time nor the number of tries tells anything of them. What a token says is remembered
# under the header's exact bytes (good ones only): a request then costs one look-up.


@dataclass(frozen=True)
class Principal:
    """Who calls. ends_at: epoch seconds after which it counts no more. clusters: those whose
    runs a callback may touch; None: those without a callbackToken of their own."""

    name: str
    role: str
    scope: Scope = EVERYTHING
    ends_at: float = math.inf
    clusters: frozenset[str] | None = None

    def may_touch(self, tenant_id: str, env_id: str) -> bool:
        return self.scope.covers(tenant_id, env_id)


ANONYMOUS = Principal("anonymous", "admin")  # where no token is configured
NOBODY = Principal("", "")  # who has not proven anything


def scope_of(tenants: Iterable[str], environments: Iterable[str] = ()) -> Scope:
    """The scope that names of tenants and environments mean: * is all of them."""
    tenants, environments = frozenset(tenants), frozenset(environments)
    return Scope(
        None if "*" in tenants else tenants, None if not environments or "*" in environments else environments
    )


class ApiTokens:
    """The API tokens of the configuration."""

    def __init__(self, security: SecurityConfig):
        self._owners: list[tuple[bytes, Principal]] = []
        if security.api_token:
            self._owners.append((token_digest(security.api_token), Principal("api", "admin")))
        for item in security.api_tokens:
            digest = bytes.fromhex(item.token_sha256) if item.token_sha256 else token_digest(item.token)
            scope = scope_of(item.tenants or ("*",), item.environments)
            ends_at = math.inf if item.expires_at is None else item.expires_at
            self._owners.append((digest, Principal(item.name, item.role, scope, ends_at)))

    def owner(self, token: str) -> Principal | None:
        """Whose token it is; None for a wrong one, and for one that has expired."""
        given, found = token_digest(token), None
        for digest, principal in self._owners:
            if hmac.compare_digest(given, digest):
                found = principal
        return found if found is None or found.ends_at > time.time() else None


class CallbackTokens:
    """The secrets of Locust's callbacks: one for all clusters, or a cluster's own."""

    def __init__(self, config: Config):
        own = [
            (token_digest(item.callback_token), item.id) for item in config.clusters if item.callback_token
        ]
        self.guarded = frozenset(
            cluster_id for _, cluster_id in own
        )  # clusters that the common token does not reach
        common = config.security.callback_token
        self._common = token_digest(common) if common else None
        self._is_open = not common and config.security.allow_anonymous
        self._own = [(digest, frozenset(id_ for other, id_ in own if other == digest)) for digest, _ in own]

    def owner(self, token: str) -> Principal | None:
        given, found = token_digest(token), None
        if self._is_open or (self._common is not None and hmac.compare_digest(given, self._common)):
            found = Principal("locust", "locust")
        for digest, clusters in self._own:
            if hmac.compare_digest(given, digest):
                found = Principal("locust", "locust", clusters=clusters)
        return found

    def may_touch(self, principal: Principal, cluster_id: str) -> bool:
        return (
            cluster_id not in self.guarded if principal.clusters is None else cluster_id in principal.clusters
        )


class FailedAttempts:
    """Counts wrong tokens for each address. Only wrong ones are ever refused for it: the
    right token is served whatever others did from the same address."""

    MOST = 30
    WINDOW_S = 60.0

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, float]] = {}

    def note(self, address: str) -> int | None:
        """Count one; the seconds to wait when there were too many."""
        now = monotonic_s()
        who = (
            ":".join(address.split(":")[:4]) if ":" in address else address
        )  # IPv6: who has one address has its /64
        count, since = self._counts.get(who, (0, now))
        if now - since > self.WINDOW_S:
            count, since = 0, now
        if len(self._counts) > 10_000:
            self._counts.clear()
        self._counts[who] = (count + 1, since)
        return max(1, math.ceil(since + self.WINDOW_S - now)) if count >= self.MOST else None


class RateCounter:
    """What one caller asked for in this second; only the loop's thread counts."""

    __slots__ = ("second", "count")

    def __init__(self) -> None:
        self.second = 0
        self.count = 0

    def note(self, most_per_s: float) -> None:
        """Count one request; TooManyRequests beyond the limit."""
        second = int(monotonic_s())
        if second != self.second:
            self.second, self.count = second, 0
        self.count += 1
        if self.count > most_per_s:
            raise TooManyRequests(f"over {most_per_s:g} requests of this token in a second", retry_after_s=1)


class Caller(NamedTuple):
    """Who sent a header, until when that is believed (epoch seconds) without a look at the token:
    the key that signed it may be withdrawn."""

    principal: Principal
    usage: RateCounter
    until: float

    KEEP_S = 300.0


class RefusalBudget:
    """How many refusals are written to the audit: a flood must not fill the disk."""

    BURST, PER_S = 1000.0, 20.0

    def __init__(self) -> None:
        self._left, self._at = self.BURST, monotonic_s()
        self.skipped = 0  # since the last one written

    def takes(self) -> bool:
        now = monotonic_s()
        self._left, self._at = min(self.BURST, self._left + (now - self._at) * self.PER_S), now
        if self._left < 1:
            self.skipped += 1
            return False
        self._left -= 1
        return True


def client_address(peer: str, forwarded_for: str | None, proxies: tuple[Any, ...]) -> str:
    """The address of who asks: the last one in X-Forwarded-For that no trusted proxy has,
    if the connection comes from a trusted proxy; what others put in front is not believed."""
    if forwarded_for is None or not _is_within(peer, proxies):
        return peer
    address = peer
    for word in reversed(forwarded_for.split(",")):
        try:
            address = str(ipaddress.ip_address(word.strip()))
        except ValueError:
            return address
        if not _is_within(address, proxies):
            return address
    return address


def _is_within(address: str, networks: tuple[Any, ...]) -> bool:
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    known = getattr(known, "ipv4_mapped", None) or known
    return any(known in network for network in networks)


# ============================================================================
# 19. SIGN ON - tokens and sign-ins of an identity provider
# ============================================================================
# JSON Web Tokens (RFC 7519, 8725) and OpenID Connect. The configuration says which
# algorithms count, never the token, and a key is used only with the algorithms of its
# kind: neither "none" nor a public key taken for a shared secret gets in. HS256 needs the
# standard library alone, all others PyJWT. The loop never waits for the provider.

PROVIDER_CALL_S = 10.0
PROVIDER_ANSWER_BYTES = 1024 * 1024
MAX_NUMERIC_DATE = 253402300799  # the end of the year 9999: 1e400 would be a token for ever
KEY_CURVES = {"ES256": ("P-256",), "ES384": ("P-384",), "ES512": ("P-521",), "EdDSA": ("Ed25519", "Ed448")}


def _url_parts(url: str) -> SplitResult:
    """As urlsplit, but nothing instead of a ValueError for what is no URL."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


class TokenRefused(Exception):
    """A signed token that does not count, and why, as a sentence without anything of the token."""


def fetch_json(
    url: str, form: dict[str, str] | None = None, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object at an identity provider's URL; ProviderFailed otherwise. No redirect is
    followed: what we send must not travel on."""
    import urllib.error
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    where = url.partition("?")[0]
    near = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    body = None if form is None else urlencode(form).encode()
    request = urllib.request.Request(
        url, body, {"Accept": JSON_TYPE, "User-Agent": f"loadmanager/{VERSION}", **(headers or {})}
    )
    try:
        with urllib.request.build_opener(NoRedirect, *near).open(request, timeout=PROVIDER_CALL_S) as answer:
            raw = answer.read(PROVIDER_ANSWER_BYTES + 1)
        document = parse_json(raw, unique_keys=False) if len(raw) <= PROVIDER_ANSWER_BYTES else None
    except urllib.error.HTTPError as error:
        raise ProviderFailed(f"the identity provider answered {where} with HTTP {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ProviderFailed(
            f"the identity provider cannot be asked at {where}: {_network_words(getattr(error, 'reason', error))}"
        ) from None
    except InvalidInput:
        document = None
    if not isinstance(document, dict):
        raise ProviderFailed(f"the identity provider's answer at {where} is not a JSON object")
    return document


class KeySource:
    """An issuer's public keys (JWKS, RFC 7517), read in the background."""

    STALE_S = 600.0  # read again after this even if nobody asks for a new key
    RETRY_S = 10.0  # after a failure
    MAX_WAITING = 1000

    def __init__(self, read: Callable[[], dict[str, Any]], every_s: float = 60.0):
        self._read = read
        self._every_s = every_s  # a key that is not known has them read again, so often at most
        self._lock = threading.Lock()  # guards what follows
        self._keys: list[dict[str, Any]] = []
        self._is_reading = False
        self._next_at = -math.inf
        self._read_at = -math.inf
        self._waiting: list[Callable[[], None]] = []

    def find(self, kid: str | None, algorithm: str) -> Any:
        """The key of this id for this algorithm, None when there is none, or more than one.
        KeysNeeded when it may be among keys that are not read yet."""
        fitting = [entry for entry in self._keys if _key_fits(entry, kid, algorithm)]
        if monotonic_s() - self._read_at > self.STALE_S:
            self.read_soon(_nothing, is_asked=False)
        if not fitting and self._may_read():
            raise KeysNeeded(self.read_soon)
        return _public_key(fitting[0], algorithm) if len(fitting) == 1 else None

    def _may_read(self) -> bool:
        with self._lock:
            if len(self._waiting) >= self.MAX_WAITING:
                raise NotReady("the identity provider's keys are being read", retry_after_s=1)
            return self._is_reading or monotonic_s() >= self._next_at

    def read_soon(self, then: Callable[[], None], is_asked: bool = True) -> None:
        """Read the keys in a thread, and call `then` once that is over, well or not. is_asked:
        for a key that is not known, which counts."""
        with self._lock:
            is_too_soon = is_asked and not self._is_reading and monotonic_s() < self._next_at
            if not is_too_soon:
                self._waiting.append(then)
                if is_asked and not self._is_reading:
                    self._next_at = monotonic_s() + self._every_s
                was_reading, self._is_reading = self._is_reading, True
        if is_too_soon:
            then()
        elif not was_reading:
            start_thread("keys", self._read_now)

    def _read_now(self) -> None:
        self._read_at = monotonic_s()
        try:
            keys = self._read().get("keys")
            if not isinstance(keys, list):
                raise ProviderFailed("the identity provider's keys are not a JWKS, an object with keys")
            self._keys = [entry for entry in keys if isinstance(entry, dict)]
            log("keys of the identity provider read", keys=len(self._keys))
        except (LoadManagerError, OSError) as error:
            log("keys of the identity provider not read", why=getattr(error, "message", error))
            self._read_at += self.RETRY_S - self.STALE_S
            self._next_at = min(self._next_at, monotonic_s() + self.RETRY_S)
        with self._lock:
            waiting, self._waiting, self._is_reading = self._waiting, [], False
        for then in waiting:
            then()


def _key_fits(entry: dict[str, Any], kid: str | None, algorithm: str) -> bool:
    curves = KEY_CURVES.get(algorithm)
    return (
        entry.get("kty") == JWT_ALGORITHMS[algorithm]
        and (kid is None or entry.get("kid") == kid)
        and entry.get("use", "sig") == "sig"
        and entry.get("alg", algorithm) == algorithm
        and (curves is None or entry.get("crv") in curves)
    )


def _public_key(entry: dict[str, Any], algorithm: str) -> Any:
    import jwt

    try:
        return jwt.PyJWK(entry, algorithm=algorithm).key
    except (jwt.exceptions.PyJWTError, ValueError, TypeError, KeyError):
        return None


def read_jwks_file(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(PROVIDER_ANSWER_BYTES), unique_keys=False)
    except OSError as error:
        raise ProviderFailed(f"{path} cannot be read: {error.strerror or error}") from None
    except InvalidInput as error:
        raise ProviderFailed(f"{path}: {error.message}") from None


def require_pyjwt(algorithms: Iterable[str]) -> None:
    """StartupError when algorithms need PyJWT and it is not there."""
    wanted = [name for name in algorithms if JWT_ALGORITHMS[name] != "oct"]
    try:
        import jwt

        if wanted and not jwt.algorithms.has_crypto:
            raise ImportError
    except ImportError:
        if wanted:
            raise StartupError(
                f"security: {', '.join(wanted)} need the package PyJWT with cryptography: pip install 'PyJWT[crypto]'"
            ) from None


class JwtVerifier:
    """Decides whether a signed token counts. keys, or secret: what its signature is checked with."""

    MAX_CHARACTERS = 16 * 1024

    def __init__(
        self,
        issuer: str,
        audience: str,
        algorithms: tuple[str, ...],
        leeway_s: float,
        keys: KeySource | None,
        secret: str = "",
    ):
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._leeway_s = leeway_s
        self._keys = keys
        self._secret = secret.encode()

    def claims(self, token: str) -> dict[str, Any]:
        """What a token claims, once its signature, issuer, audience and times are good;
        TokenRefused otherwise, KeysNeeded when its key may still have to be read."""
        parts = token.split(".")
        if len(parts) != 3 or len(token) > self.MAX_CHARACTERS:
            raise TokenRefused("the token is not a signed JWT")
        header, claims = _jwt_object(parts[0]), _jwt_object(parts[1])
        algorithm = header.get("alg")
        if algorithm not in self._algorithms:
            raise TokenRefused(f"the token's algorithm is not one of {', '.join(self._algorithms)}")
        if "crit" in header:
            raise TokenRefused("the token has critical extensions, none of which is known")
        if not self._is_signed(header, algorithm, f"{parts[0]}.{parts[1]}".encode(), _base64url(parts[2])):
            raise TokenRefused("the token's signature is wrong, or its key is not known")
        self._check_claims(claims, time.time())
        return claims

    def _is_signed(self, header: dict[str, Any], algorithm: str, signed: bytes, signature: bytes) -> bool:
        if algorithm == "HS256":
            return bool(self._secret) and hmac.compare_digest(
                hmac.new(self._secret, signed, hashlib.sha256).digest(), signature
            )
        kid = header.get("kid")
        if self._keys is None or not (kid is None or isinstance(kid, str)):
            return False
        key = self._keys.find(kid, algorithm)
        if key is None:
            return False
        import jwt

        return bool(jwt.get_algorithm_by_name(algorithm).verify(signed, key, signature))

    def _check_claims(self, claims: dict[str, Any], now: float) -> None:
        audience = claims.get("aud")
        if claims.get("iss") != self._issuer:
            raise TokenRefused("the token is of another issuer")
        if audience != self._audience and not (isinstance(audience, list) and self._audience in audience):
            raise TokenRefused("the token is for another audience")
        moments = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
        if "exp" not in moments:
            raise TokenRefused("the token has no expiry (exp)")
        if any(isinstance(at, bool) or not isinstance(at, (int, float)) for at in moments.values()):
            raise TokenRefused("the token's times are not numbers")
        if not all(0 <= at <= MAX_NUMERIC_DATE for at in moments.values()):
            raise TokenRefused("the token's times (exp, nbf, iat) must be from 1970 to 9999, in seconds")
        if moments["exp"] <= now - self._leeway_s:
            raise TokenRefused("the token has expired")
        if max(moments.get("nbf", 0), moments.get("iat", 0)) > now + self._leeway_s:
            raise TokenRefused("the token is not valid yet")


def _base64url(text: str) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9_-]*", text) or len(text) % 4 == 1:
        raise TokenRefused("the token is not a signed JWT")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _jwt_object(part: str) -> dict[str, Any]:
    try:
        value = parse_json(_base64url(part))
    except InvalidInput:
        value = None
    if not isinstance(value, dict):
        raise TokenRefused("the token is not a signed JWT")
    return value


class ClaimsMap:
    """What claims mean here: a name, a role, tenants."""

    def __init__(self, config: JwtConfig):
        self._config = config

    def principal(self, claims: dict[str, Any], ends_at: float) -> Principal:
        """Who the claims say it is. Forbidden without a role; without tenants nothing is seen."""
        config = self._config
        name = claim_of(claims, config.name_claim)
        if not isinstance(name, str) or not name or not name.isprintable():
            raise TokenRefused(f"the token has no {config.name_claim}")
        words = words_of(claim_of(claims, config.role_claim))
        roles = [
            role
            for role in ROLES
            if any(
                (config.role_map or {}).get(word, word if config.role_map is None else None) == role
                for word in words
            )
        ]
        who = Principal(
            "sso:" + name[:MAX_TEXT],
            roles[-1] if roles else "",
            scope_of(words_of(claim_of(claims, config.tenants_claim))),
            ends_at,
        )
        if not roles:
            refused = Forbidden(
                f"the sign-on gives no role here: the claim {config.role_claim} has none of those that count"
            )
            refused.caller = who
            raise refused
        return who


def claim_of(claims: dict[str, Any], path: str) -> Any:
    """A claim by its name, else by the dots in it: realm_access.roles."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def words_of(value: Any) -> list[str]:
    """The words of a claim, a list of texts or a text of words."""
    if isinstance(value, str):
        return [word for word in re.split(r"[\s,]+", value) if word]
    return [word for word in value if isinstance(word, str) and word] if isinstance(value, list) else []


class JwtTokens:
    """Bearer tokens that an identity provider signed."""

    def __init__(self, config: JwtConfig, folder: str):
        algorithms = jwt_algorithms(config)
        require_pyjwt(algorithms)
        keys: KeySource | None = None
        if config.jwks_url:
            keys = KeySource(functools.partial(fetch_json, config.jwks_url))
        elif config.jwks_file:
            keys = KeySource(
                functools.partial(read_jwks_file, os.path.join(folder, config.jwks_file)), every_s=1.0
            )
        if keys:
            keys.read_soon(_nothing, is_asked=False)
        self._verifier = JwtVerifier(
            config.issuer, config.audience, algorithms, config.leeway_s, keys, config.secret
        )
        self._map = ClaimsMap(config)
        self._leeway_s = config.leeway_s

    def owner(self, token: str) -> Principal:
        """Whose token it is; TokenRefused, Forbidden or KeysNeeded otherwise."""
        claims = self._verifier.claims(token)
        return self._map.principal(claims, claims["exp"] + self._leeway_s)


PUBLIC_ALGORITHMS = ("RS256", "ES256", "EdDSA")


def jwt_algorithms(config: JwtConfig) -> tuple[str, ...]:
    """The signatures that are accepted of Bearer tokens."""
    return config.algorithms or (("HS256",) if config.secret else PUBLIC_ALGORITHMS)


def sign_on_algorithms(mapping: JwtConfig | None) -> tuple[str, ...]:
    """The signatures that are accepted of ID tokens: a provider's, never of a shared secret."""
    named = tuple(name for name in (mapping.algorithms if mapping else ()) if name != "HS256")
    return named or PUBLIC_ALGORITHMS


class OpenIdSignOn:
    """Signing in by OpenID Connect: authorization code with PKCE (RFC 7636).

    Nothing is kept for a sign-in that was begun: its state is in a cookie that we signed, and
    nonce and verifier are derived from it with a key that only this process has."""

    KEEP_S = 600  # between leaving for the provider and coming back
    DOCUMENT_S = 3600.0

    def __init__(self, config: OidcConfig, mapping: JwtConfig | None):
        algorithms = sign_on_algorithms(mapping)
        require_pyjwt(algorithms)
        self._config = config
        self._issuer = config.issuer.rstrip("/")
        self._algorithms = algorithms
        self._leeway_s = mapping.leeway_s if mapping else 30.0
        self._map = ClaimsMap(mapping or JwtConfig())
        self._key = secrets.token_bytes(32)
        self._document: tuple[float, dict[str, Any]] = (-math.inf, {})
        self._keys = KeySource(lambda: fetch_json(self._discovered()["jwks_uri"]))

    def begin(self) -> tuple[str, str]:
        """Where to send the browser, and the state for its cookie; ProviderFailed."""
        ends_at = str(int(time.time()) + self.KEEP_S)
        state = f"{secrets.token_urlsafe(24)}.{ends_at}"
        challenge = hashlib.sha256(self._derived("verifier", state).encode()).digest()
        query = {
            "response_type": "code", "client_id": self._config.client_id, "redirect_uri": self._config.redirect_url, "scope": self._config.scopes,
            "state": state, "nonce": self._derived("nonce", state), "code_challenge": _unpadded(challenge), "code_challenge_method": "S256",
        }  # fmt: skip
        endpoint = self._discovered()["authorization_endpoint"]
        return (
            f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}",
            f"{state}.{self._derived('cookie', state)}",
        )

    def finish(self, query: dict[str, str], cookie: str | None) -> Principal:
        """Who came back from the provider; Unauthorized, Forbidden or ProviderFailed."""
        state, _, seal = (cookie or "").rpartition(".")
        is_ours = hmac.compare_digest(seal.encode("latin-1"), self._derived("cookie", state).encode())
        if not is_ours or not hmac.compare_digest(state.encode("latin-1"), query.get("state", "").encode()):
            raise Unauthorized("this sign-in was not begun in this browser; begin again")
        if int(state.rpartition(".")[2]) < time.time():
            raise Unauthorized("this sign-in took too long; begin again")
        if "error" in query or not query.get("code"):
            raise Unauthorized(
                f"the identity provider refused the sign-in: {_printable(query.get('error', 'no code'))}"
            )
        if query.get("iss", self._issuer).rstrip("/") != self._issuer:  # RFC 9207
            raise Unauthorized("the answer is of another identity provider")
        answer = self._exchange(query["code"], self._derived("verifier", state))
        try:
            return self._principal(answer, self._derived("nonce", state))
        except TokenRefused as error:
            raise Unauthorized(f"the sign-in does not count: {error}") from None

    def _exchange(self, code: str, verifier: str) -> dict[str, Any]:
        config, document = self._config, self._discovered()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": config.redirect_url,
            "code_verifier": verifier,
            "client_id": config.client_id,
        }
        headers = {}
        methods = document.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if config.client_secret and "client_secret_basic" in methods:
            pair = f"{quote(config.client_id, safe='')}:{quote(config.client_secret, safe='')}"  # RFC 6749, 2.3.1
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        elif config.client_secret:
            form["client_secret"] = config.client_secret
        return fetch_json(document["token_endpoint"], form, headers)

    def _principal(self, answer: dict[str, Any], nonce: str) -> Principal:
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise TokenRefused("there is no ID token")
        claims = self._id_claims(token)
        given = claims.get("nonce")
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), nonce.encode()):
            raise TokenRefused("the ID token is for another sign-in")
        if claims.get("azp", self._config.client_id) != self._config.client_id:
            raise TokenRefused("the ID token is for another client")
        return self._map.principal({**self._user_info(answer, claims), **claims}, math.inf)

    def _id_claims(self, token: str) -> dict[str, Any]:
        verifier = JwtVerifier(
            self._discovered()["issuer"], self._config.client_id, self._algorithms, self._leeway_s, self._keys
        )
        try:
            return verifier.claims(token)
        except KeysNeeded as needed:
            were_read = threading.Event()
            needed.read_soon(were_read.set)
            were_read.wait(PROVIDER_CALL_S + 1)
        try:
            return verifier.claims(token)
        except KeysNeeded:
            raise ProviderFailed("the identity provider's keys cannot be read") from None

    def _user_info(self, answer: dict[str, Any], claims: dict[str, Any]) -> dict[str, Any]:
        """What the provider tells of the user beyond the ID token; {} where it does not."""
        endpoint, token = self._discovered().get("userinfo_endpoint"), answer.get("access_token")
        if not isinstance(endpoint, str) or not isinstance(token, str) or not re.fullmatch("[!-~]+", token):
            return {}
        try:
            told = fetch_json(endpoint, None, {"Authorization": f"Bearer {token}"})
        except ProviderFailed as error:
            log("user info not read", why=error.message)
            return {}
        return told if told.get("sub") == claims.get("sub") else {}  # OpenID Connect Core, 5.3.2

    def _discovered(self) -> dict[str, Any]:
        read_at, document = self._document
        if monotonic_s() - read_at < self.DOCUMENT_S:
            return document
        document = fetch_json(f"{self._issuer}/.well-known/openid-configuration")
        if str(document.get("issuer", "")).rstrip("/") != self._issuer:
            raise ProviderFailed("the identity provider's configuration is of another issuer")
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            parts = _url_parts(str(document.get(name)))
            if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
                raise ProviderFailed(f"the identity provider's {name} is not an https URL")
        self._document = monotonic_s(), document
        return document

    def _derived(self, purpose: str, state: str) -> str:
        return _unpadded(
            hmac.new(
                self._key, f"{purpose}:{state}".encode("utf-8", "surrogateescape"), hashlib.sha256
            ).digest()
        )


def _unpadded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def sign_on_cookie(server: ServerConfig, value: str) -> str:
    """The Set-Cookie value of a sign-in that was begun. Lax: the provider sends the browser back."""
    return f"{_sign_on_cookie_name(server)}={value}; Path=/session/oidc; Max-Age={OpenIdSignOn.KEEP_S}; HttpOnly; SameSite=Lax{secure_mark(server)}"


def _sign_on_cookie_name(server: ServerConfig) -> str:
    return f"loadmanager_signon_{server.port}"


def sign_on_state(head: RequestHead, server: ServerConfig) -> str | None:
    return cookie_of(head, _sign_on_cookie_name(server))


def cookie_of(head: RequestHead, name: str) -> str | None:
    for part in head.headers.get("cookie", "").split(";"):
        if part.strip().startswith(name + "="):
            return part.strip()[len(name) + 1 :]
    return None


def secure_mark(server: ServerConfig) -> str:
    """A cookie's Secure, where browsers reach us by https only."""
    is_https = server.tls is not None or (server.public_url or "").startswith("https:")
    return "; Secure" if is_https else ""


# ============================================================================
# 20. SESSIONS - browsers that signed in, and what they must prove
# ============================================================================
# A browser sends its cookie with whatever any page makes it send. So a cookie alone only
# reads, under a host name that is ours (another's name may be made to point here: DNS
# rebinding), and what changes something must come from our own page: Origin and a CSRF
# token. A Bearer token needs none of this, as no browser adds it by itself.

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True)
class Session:
    """One sign-in. ends_at: steady seconds."""

    principal: Principal
    csrf_token: str
    ends_at: float


class Sessions:
    """The sign-ins of this process, by the hash of their secret; a restart ends them."""

    MOST = 1000
    KEEP_S = 12 * 3600.0

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _by_digest
        self._by_digest: OrderedDict[bytes, Session] = OrderedDict()  # the oldest first

    def begin(self, principal: Principal) -> tuple[Session, str]:
        """A new session and the secret for its cookie; beyond MOST the oldest ends."""
        secret = secrets.token_urlsafe(32)
        keep_s = min(self.KEEP_S, principal.ends_at - time.time())
        session = Session(principal, secrets.token_urlsafe(32), monotonic_s() + keep_s)
        with self._lock:
            self._by_digest[hashlib.sha256(secret.encode()).digest()] = session
            while len(self._by_digest) > self.MOST:
                self._by_digest.popitem(last=False)
        return session, secret

    def find(self, secret: str | None) -> Session | None:
        if secret is None:
            return None
        session = self._by_digest.get(hashlib.sha256(secret.encode("latin-1")).digest())
        return session if session and session.ends_at > monotonic_s() else None

    def is_alive(self, secret: str) -> bool:
        return self.find(secret) is not None

    def end(self, secret: str | None) -> None:
        with self._lock:
            self._by_digest.pop(hashlib.sha256((secret or "").encode("latin-1")).digest(), None)


def session_to_json(session: Session) -> dict[str, Any]:
    return {
        "signedIn": True,
        "name": session.principal.name,
        "role": session.principal.role,
        "tenants": None
        if session.principal.scope.tenants is None
        else sorted(session.principal.scope.tenants),
        "csrfToken": session.csrf_token,
        "expiresInSeconds": max(0, math.floor(session.ends_at - monotonic_s())),
    }


def _cookie_name(server: ServerConfig) -> str:
    """With the port: cookies do not tell ports apart, and two Load Managers may share a host."""
    return f"loadmanager_{server.port}"


def session_cookie(server: ServerConfig, secret: str) -> str:
    """The Set-Cookie value; an empty secret removes the cookie."""
    age_s = int(Sessions.KEEP_S) if secret else 0
    return f"{_cookie_name(server)}={secret}; Path=/; Max-Age={age_s}; HttpOnly; SameSite=Strict{secure_mark(server)}"


def session_secret(head: RequestHead, server: ServerConfig) -> str | None:
    """What the session's cookie says, or None."""
    return cookie_of(head, _cookie_name(server))


def check_host(head: RequestHead, server: ServerConfig) -> None:
    """Forbidden under a host name that is not ours. An address in digits is: nobody can
    make another's page look as if it came from there."""
    name = (_url_parts("//" + head.headers.get("host", "")).hostname or "").rstrip(".")
    ours = {"localhost", server.host.lower(), *server.allowed_hosts}
    if server.public_url:
        ours.add(urlsplit(server.public_url).hostname or "")
    if name in ours or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise Forbidden(
            f"the host name {_printable(name)} is not ours; server.publicUrl or server.allowedHosts may add it"
        ) from None


def check_same_origin(head: RequestHead, server: ServerConfig, required: bool) -> None:
    """Forbidden for a request that another site's page made. required: also without Origin,
    which browsers always send with what changes something."""
    origin = head.headers.get("origin")
    if origin is None and not required:
        return
    check_host(head, server)
    parts, public = _url_parts(origin or ""), _url_parts(server.public_url or "")
    is_public = bool(server.public_url) and (parts.scheme, parts.netloc.lower()) == (
        public.scheme,
        public.netloc.lower(),
    )
    is_here = (
        parts.scheme in ("http", "https") and parts.netloc.lower() == head.headers.get("host", "").lower()
    )
    if not is_public and not is_here:
        raise Forbidden(
            "the header Origin is missing or another site's; only our own pages may do this with a cookie"
        )


def check_csrf(head: RequestHead, session: Session) -> None:
    given = head.headers.get("x-csrf-token", "").encode("latin-1")
    if not hmac.compare_digest(given, session.csrf_token.encode()):
        raise Forbidden("the header X-CSRF-Token is missing or wrong; GET /session gives it")


# ============================================================================
# 21. HTTP API - routes, authentication, handlers
# ============================================================================


NO_SUCH_PATH = "there is no such path"


@dataclass(frozen=True)
class Route:
    """One line of the API. access: anyone, locust (X-Locust-Token), or the least role.

    waits: the handler waits for Locust or the disk, and gets a thread. query: the allowed
    parameters. body: the allowed keys, None for no body. For the API's document: answer,
    the schema of a good answer's JSON; success, its status; media, its type when it is not
    JSON; errors, statuses beyond those every route has; more_body, keys that the handler
    checks itself."""

    method: str
    path: str
    handler: Callable[[Api, Request], Response]
    access: str
    summary: str
    waits: bool = True
    reserved: bool = False  # served even when all threads are taken
    query: dict[str, Check] = field(default_factory=dict)
    body: dict[str, BodyKey] | None = None
    most_body_bytes: int = MAX_BODY_BYTES
    answer: str = "Success"
    success: int = 200
    media: str = JSON_TYPE
    errors: tuple[int, ...] = ()
    more_body: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def is_audited(self) -> bool:
        """What changes something is, but for the callbacks of runs that go on."""
        if self.method in SAFE_METHODS:
            return self.handler is get_oidc_callback
        return self.access != "locust" or self.handler is locust_register


def json_response(value: object, http_status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(value).encode(), http_status, headers=headers)


SUCCESS = Response(b'{"success":true}')
HEALTHY = Response(b'{"status":"healthy"}')


def get_health(api: Api, request: Request) -> Response:
    problem = api.store.problem
    if problem is None:
        return HEALTHY
    return json_response(
        {"status": "unhealthy", "message": f"the database cannot be written: {problem}"}, 503
    )


def post_test(api: Api, request: Request) -> Response:
    body = parse_json(request.body)
    api.check_named_place(request, body)  # first: what there is in another tenant is nobody's business
    run_request = read_create(body, api.config.scenarios)
    api.check_place(request, run_request.tenant_id, run_request.env_id)
    key = request.head.headers.get("idempotency-key")
    if key is None:
        run = api.orchestrator.create(run_request, request.principal.name)
        request.run_id = run.id
        return api.run_response(run.id, 201)
    if not 1 <= len(key) <= 255 or not key.isprintable():
        raise InvalidInput("Idempotency-Key: allowed are 1 to 255 printable characters")
    return api.create_once(f"{request.principal.name}:{key}", body, run_request, request)


def get_tests(api: Api, request: Request) -> Response:
    query = request.query
    search = query["search"].lower() if "search" in query else None
    wanted = RunFilter(
        query.get("tenantId"), query.get("envId"), query.get("status"), request.principal.scope, search
    )
    limit = query.get("limit")
    page, last_seq = api.store.list_wire(wanted, limit, query.get("cursor"), query.get("brief", False))
    headers = {}
    if last_seq is not None:
        again = {name: value for name, value in parse_qsl(request.head.query) if name != "cursor"}
        again["cursor"] = _cursor_text(last_seq)
        headers["Link"] = f'</v1/tests?{urlencode(again)}>; rel="next"'
    pieces = [b"["]
    for number, parts in enumerate(page):
        pieces += (b",", *parts) if number else parts
    return Response([*pieces, b"]"], headers=headers)


def get_test(api: Api, request: Request) -> Response:
    run_id = request.params["id"]
    api.visible_run(request)
    return Response(api.store.wire(run_id))


def delete_test(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    api.store.delete(run.id)
    log("run deleted", run=run.id, by=request.principal.name)
    return Response(http_status=204)


def post_stop(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    log("stop asked for", run=run.id, by=request.principal.name)
    api.orchestrator.stop(run.id, "user")
    return json_response({"success": True, "message": "Test stopped successfully"})


def post_users(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    values = check_body(parse_json(request.body), USERS_KEYS)
    api.orchestrator.change_users(
        run.id, values["target_users"], values.get("spawn_rate"), request.principal.name
    )
    return api.run_response(run.id, 200)


def get_scenarios(api: Api, request: Request) -> Response:
    scope = request.principal.scope
    tenants = {
        cluster.tenant_id
        for cluster in api.config.clusters
        if scope.covers(cluster.tenant_id, cluster.env_id)
    }
    shown = [
        scenario
        for scenario in api.config.scenarios
        if not scenario.tenants or tenants & set(scenario.tenants)
    ]
    if scope.tenants is not None:  # other tenants are not named
        shown = [
            replace(scenario, tenants=tuple(name for name in scenario.tenants if name in scope.tenants))
            for scenario in shown
        ]
    return json_response([scenario_to_json(scenario) for scenario in shown])


def post_rerun(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    changes = check_body(parse_json(request.body), RERUN_KEYS) if request.body else {}
    again = api.orchestrator.rerun(run.id, changes, request.principal.name)
    request.run_id, request.note = again.id, f"again {run.id}"
    return api.run_response(again.id, 201)


def post_stop_all(api: Api, request: Request) -> Response:
    """Stop every run the caller may touch. Always 200: what is not stopped yet is in `failed`."""
    wanted = check_body(parse_json(request.body), STOP_ALL_KEYS) if request.body else {}
    request.tenant_id, request.env_id = wanted.get("tenant_id", ""), wanted.get("env_id", "")

    def is_meant(run: Run) -> bool:
        named = run.tenant_id == wanted.get("tenant_id", run.tenant_id) and run.env_id == wanted.get(
            "env_id", run.env_id
        )
        return named and request.principal.may_touch(run.tenant_id, run.env_id)

    log("stop of all asked for", by=request.principal.name, **wanted)
    outcomes = api.orchestrator.stop_all(is_meant)
    stopped = [run_id for run_id, why in outcomes.items() if why is None]
    failed = [{"runId": run_id, "message": why} for run_id, why in outcomes.items() if why is not None]
    request.note = f"{len(stopped)} stopped, {len(failed)} not yet"
    return json_response({"success": not failed, "stopped": stopped, "failed": failed})


def get_audit(api: Api, request: Request) -> Response:
    query, limit = request.query, request.query.get("limit", 100)
    wanted = AuditFilter(
        query.get("who"), query.get("tenantId"), query.get("runId"), query.get("action"), query.get("outcome"),
        query.get("from"), query.get("to"), query.get("cursor"),
    )  # fmt: skip
    found = api.store.audit_entries(wanted, request.principal.scope, limit + 1)
    headers = {}
    if len(found) > limit:
        again = {name: value for name, value in parse_qsl(request.head.query) if name != "cursor"}
        again["cursor"] = _cursor_text(found[limit - 1][0])
        headers["Link"] = f'</v1/audit?{urlencode(again)}>; rel="next"'
    return json_response([audit_to_json(entry) for _, entry in found[:limit]], headers=headers)


def get_metrics(api: Api, request: Request) -> Response:
    run, query = api.visible_run(request), request.query
    samples = api.store.samples(run.id, query.get("from", 0.0), query.get("to", 1e12))
    total = len(samples)
    if "step" in query:
        samples = thin_to_step(samples, query["step"])
    samples = downsample(samples, query.get("maxPoints", 500))
    points = [sample_to_json(sample) for sample in samples]
    return json_response(
        {"runId": run.id, "total": total, "downsampled": len(points) < total, "points": points}
    )


def get_export(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    if not run.is_final:
        raise Conflict(
            f"run {run.id} is {run.status.value}; only a Finished or Failed run can be exported",
            status=run.status.value,
        )
    document = json.loads(api.store.wire(run.id))
    parts = export_parts(
        document,
        api.store.samples(run.id),
        api.store.histogram_records(run.id),
        api.orchestrator.failures(run),
    )
    return api.file_response(request, "export.json", JSON_TYPE, "".join(parts))


def post_import(api: Api, request: Request) -> Response:
    found = read_import(parse_json(request.body), time.time())
    api.check_place(request, found.run.tenant_id, found.run.env_id)
    request.run_id = found.run.id
    failures = dump_json(found.failures).encode() if found.failures else None
    api.store.add_imported(found.run, found.snapshot, found.samples, found.histograms, failures)
    log("run imported", run=found.run.id, by=request.principal.name)
    return api.run_response(found.run.id, 201)


def get_histograms(api: Api, request: Request) -> Response:
    """Response times between two moments: what stood at the later minus what stood at the earlier."""
    run, query = api.visible_run(request), request.query
    start, end = HistogramPoint(run.started_at or run.created_at, {}), None
    for point in api.store.histograms(run.id, query.get("to", 1e12)):
        if point.at <= query.get("from", 0.0):
            start = point
        end = point
    if end is None:
        raise NotFound("there are no histograms in this time: loadmanager_hooks inside Locust push them")
    parts = {key: since(histogram, start.histograms.get(key)) for key, histogram in end.histograms.items()}
    if None in parts.values():
        raise Conflict("Locust's statistics were reset in this time")
    endpoints = [
        {"method": key[0], "name": key[1], **histogram_to_json(part)}
        for key, part in parts.items()
        if key and part
    ]
    totals = histogram_to_json(parts[None])  # type: ignore[arg-type]
    return json_response(
        {
            "runId": run.id,
            "from": utc_text(start.at),
            "to": utc_text(end.at),
            "totals": totals,
            "endpoints": endpoints,
        }
    )


def get_failures(api: Api, request: Request) -> Response:
    return json_response(api.orchestrator.failures(api.visible_run(request)))


def post_annotation(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    values = check_body(parse_json(request.body), ANNOTATION_KEYS)
    annotation = Annotation(values.get("at", time.time()), values["text"])
    api.store.annotate(run.id, annotation)
    return json_response(annotation_to_json(annotation), 201)


def get_annotations(api: Api, request: Request) -> Response:
    return json_response(
        [annotation_to_json(annotation) for annotation in api.visible_run(request).annotations]
    )


def get_report_html(api: Api, request: Request) -> Response:
    return api.file_response(
        request,
        "report.html",
        "text/html; charset=utf-8",
        report_html(*api.report_parts(request)),
        REPORT_POLICY,
    )


def get_report_md(api: Api, request: Request) -> Response:
    return api.file_response(
        request, "report.md", "text/markdown; charset=utf-8", report_md(*api.report_parts(request))
    )


def get_metrics_csv(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    return api.file_response(
        request, "metrics.csv", "text/csv; charset=utf-8", metrics_csv(api.store.samples(run.id))
    )


def get_requests_csv(api: Api, request: Request) -> Response:
    run = json.loads(api.store.wire(api.visible_run(request).id))
    return api.file_response(request, "requests.csv", "text/csv; charset=utf-8", requests_csv(run))


def get_locust_report(api: Api, request: Request) -> Response:
    run = api.visible_run(request)
    report = api.store.artefact(run.id, LOCUST_REPORT)
    if report is None:
        raise NotFound("Locust's own report was not kept: it is read when a run ends, if Locust answers then")
    policy = (
        "sandbox allow-scripts; default-src 'unsafe-inline' data:"  # its scripts must not reach our origin
    )
    return api.file_response(
        request, "locust-report.html", "text/html; charset=utf-8", report.decode("utf-8", "replace"), policy
    )


def get_junit(api: Api, request: Request) -> Response:
    run = json.loads(api.store.wire(api.visible_run(request).id))
    return api.file_response(request, "junit.xml", XML_TYPE, junit_xml(run))


def get_summary(api: Api, request: Request) -> Response:
    run = json.loads(api.store.wire(api.visible_run(request).id))
    return api.file_response(request, "summary.md", MARKDOWN_TYPE, summary_md(run))


def get_comparison(api: Api, request: Request) -> Response:
    missing = {name: "is missing" for name in ("baseline", "candidate") if name not in request.query}
    if missing:
        raise InvalidInput(f"{' and '.join(missing)}: missing; must be ids of runs", missing)
    candidate = api.allowed_run(request, request.query["candidate"])
    comparer, names = api.store.comparer, request.query["baseline"]
    if names == ("history",):
        reference = api.store.comparable_runs(candidate, HISTORY_RUNS)
    else:
        reference = [api.allowed_run(request, name) for name in names]
    if not reference:
        raise NotFound(f"there is no comparable run before {candidate.id}")
    return json_response(comparer.against(reference, candidate, request.query.get("tolerance")))


def _place(api: Api, request: Request) -> tuple[str, str, str]:
    place = (request.params["tenantId"], request.params["envId"], request.params["scenarioId"])
    try:
        api.check_place(request, *place[:2])
    except Forbidden:
        if request.head.method == "PUT":
            raise
        raise NotYours("there is no baseline of " + "/".join(place)) from None
    return place


def get_baseline(api: Api, request: Request) -> Response:
    place = _place(api, request)
    baseline = api.store.find_baseline(place)
    if baseline is None:
        raise NotFound("there is no baseline of " + "/".join(place))
    return json_response(baseline_to_json(baseline))


def put_baseline(api: Api, request: Request) -> Response:
    place = _place(api, request)
    run_id = check_body(parse_json(request.body), BASELINE_KEYS)["run_id"]
    run = api.store.find(run_id)
    if run is None or (run.tenant_id, run.env_id, run.scenario_id) != place:
        raise InvalidInput(
            f"runId: there is no run {_printable(run_id)} of " + "/".join(place),
            {"runId": "is not a run of this tenant, environment and scenario"},
        )
    if run.status is not RunStatus.FINISHED:
        raise Conflict(
            f"run {run.id} is {run.status.value}; only a Finished run can be a baseline",
            status=run.status.value,
        )
    baseline = Baseline(*place, run.id, time.time(), request.principal.name)
    api.store.set_baseline(baseline)
    log("baseline named", run=run.id, by=request.principal.name)
    return json_response(baseline_to_json(baseline))


def delete_baseline(api: Api, request: Request) -> Response:
    api.store.drop_baseline(_place(api, request))
    return Response(http_status=204)


def get_trends(api: Api, request: Request) -> Response:
    query, metric = request.query, request.query.get("metric", "p95ResponseMs")
    wanted = RunFilter(
        query.get("tenantId"), query.get("envId"), frozenset({"Finished"}), request.principal.scope
    )
    runs = [run for run in api.store.list_runs(wanted) if query.get("scenarioId") in (None, run.scenario_id)][
        : query.get("limit", 100)
    ]
    points = []
    for run in reversed(runs):
        document = json.loads(api.store.brief(run.id)) if api.store.find(run.id) else {}
        facts = {
            name: document.get(name)
            for name in (
                "scenarioId",
                "createdAt",
                "startedAt",
                "finishedAt",
                "targetUsers",
                "verdict",
                "trust",
            )
        }
        points.append({"runId": run.id, **facts, "value": (document.get("lastMetrics") or {}).get(metric)})
    return json_response({"metric": metric, "points": points})


def get_openapi(api: Api, request: Request) -> Response:
    return json_response(openapi_document())


def get_docs(api: Api, request: Request) -> Response:
    page, headers = docs_page()
    return Response(page, content_type="text/html; charset=utf-8", headers=headers)


@functools.cache
def docs_page() -> tuple[bytes, dict[str, str]]:
    """The reference as a page: the document is put into it as text, and shown by its script."""
    page = DOCS_PAGE.replace("/*css*/", DOCS_CSS).replace("/*js*/", DOCS_JS).encode()
    return page, _page_headers(DOCS_CSS, DOCS_JS)


def _page_headers(css: str, js: str) -> dict[str, str]:
    """The policy names a page's one style and one script by their hashes: nothing else can
    run, whatever gets into the page."""

    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = (
        f"default-src 'none'; script-src {hashed(js)}; style-src {hashed(css)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Vary": "Accept-Encoding"}
    return {**headers, "Cross-Origin-Opener-Policy": "same-origin"}


def get_clusters(api: Api, request: Request) -> Response:
    return json_response(
        api.orchestrator.list_clusters(
            lambda cluster: request.principal.may_touch(cluster.config.tenant_id, cluster.config.env_id)
        )
    )


def _shown_schedule(api: Api, schedule: Schedule, http_status: int = 200) -> Response:
    return json_response(api.scheduler.to_json(schedule), http_status)


def get_schedules(api: Api, request: Request) -> Response:
    mine = [one for one in api.scheduler.list() if request.principal.may_touch(one.tenant_id, one.env_id)]
    return json_response([api.scheduler.to_json(schedule) for schedule in mine])


def post_schedule(api: Api, request: Request) -> Response:
    body = parse_json(request.body)
    api.check_named_place(request, body.get("test") if isinstance(body, dict) else None)
    schedule = read_schedule(body, api.config.scenarios)
    api.check_place(request, schedule.tenant_id, schedule.env_id)
    api.orchestrator.refuse_unsafe(read_create(schedule.test, api.config.scenarios))
    schedule = replace(schedule, created_by=request.principal.name)
    if schedule.run_at is not None and schedule.run_at < time.time() - schedule.deadline_s:
        raise InvalidInput(
            "runAt: is over for longer than startingDeadlineSeconds",
            {"runAt": "is over for longer than startingDeadlineSeconds"},
        )
    api.scheduler.add(schedule)
    return _shown_schedule(api, schedule, 201)


def get_schedule(api: Api, request: Request) -> Response:
    return _shown_schedule(api, api.visible_schedule(request))


def patch_schedule(api: Api, request: Request) -> Response:
    before, body = api.visible_schedule(request), parse_json(request.body)
    api.check_named_place(request, body.get("test") if isinstance(body, dict) else None)
    changed = read_schedule(body, api.config.scenarios, before)
    api.check_place(request, changed.tenant_id, changed.env_id)
    api.orchestrator.refuse_unsafe(read_create(changed.test, api.config.scenarios))
    return _shown_schedule(api, api.scheduler.change(before.id, body))


def delete_schedule(api: Api, request: Request) -> Response:
    api.scheduler.delete(api.visible_schedule(request).id)
    return Response(http_status=204)


def post_schedule_run(api: Api, request: Request) -> Response:
    schedule = api.visible_schedule(request)
    return api.run_response(api.scheduler.run_now(schedule.id, request.principal.name).id, 201)


def get_notifications(api: Api, request: Request) -> Response:
    scope = request.principal.scope
    channels = [
        {"id": item.id, "type": item.type, "events": list(item.on)} for item in api.config.notifications
    ]

    def is_mine(one: Delivery) -> bool:
        run = api.store.find(one.run_id)
        return scope.covers(one.tenant_id, run.env_id) if run else scope == EVERYTHING

    deliveries = [one for one in api.store.list_deliveries(200) if is_mine(one)]
    return json_response({"channels": channels, "deliveries": [delivery_to_json(one) for one in deliveries]})


def post_notification_test(api: Api, request: Request) -> Response:
    api.notifier.test(check_body(parse_json(request.body), NOTIFICATION_TEST_KEYS)["id"])
    return SUCCESS


def post_scale(api: Api, request: Request) -> Response:
    cluster = api.visible_cluster(request)
    workers = check_body(parse_json(request.body), SCALE_KEYS)["workers"]
    api.orchestrator.scale_cluster(cluster, workers)
    log("scale asked for", cluster=cluster.id, workers=workers, by=request.principal.name)
    return json_response(api.orchestrator.list_clusters(lambda one: one is cluster)[0])


def get_logs(api: Api, request: Request) -> Response:
    cluster = api.visible_cluster(request)
    return json_response(
        {
            "clusterId": cluster.id,
            "logs": api.orchestrator.read_logs(cluster, request.query.get("lines", 200)),
        }
    )


def get_events(api: Api, request: Request) -> Response:
    return api.event_stream(request, None)


def get_run_events(api: Api, request: Request) -> Response:
    return api.event_stream(request, api.visible_run(request).id)


def get_session(api: Api, request: Request) -> Response:
    session = api.session_of(request.head)
    if session is not None:
        return json_response({**session_to_json(session), "anonymous": False})
    if api.is_open:
        return json_response(
            {"signedIn": True, "anonymous": True, "name": ANONYMOUS.name, "role": ANONYMOUS.role}
        )
    return json_response({"signedIn": False, "anonymous": False, "singleSignOn": api.sign_on is not None})


def post_session(api: Api, request: Request) -> Response:
    check_same_origin(request.head, api.config.server, required=False)
    session, secret = api.sign_in(_sign_in_token(request), request.address)
    request.principal = session.principal
    log("signed in", name=session.principal.name, address=request.address)
    return json_response(
        session_to_json(session), headers={"Set-Cookie": session_cookie(api.config.server, secret)}
    )


def get_oidc(api: Api, request: Request) -> Response:
    if api.sign_on is None:
        raise NotFound("security.oidc is not configured")
    location, state = api.sign_on.begin()
    return Response(
        http_status=302,
        headers={"Location": location, "Set-Cookie": sign_on_cookie(api.config.server, state)},
    )


def get_oidc_callback(api: Api, request: Request) -> Response:
    """The browser is back from the identity provider."""
    if api.sign_on is None:
        raise NotFound("security.oidc is not configured")
    request.principal = api.sign_on.finish(request.query, sign_on_state(request.head, api.config.server))
    secret = api.begin_session(request.principal)
    log("signed in", name=request.principal.name, address=request.address)
    home = urlsplit(api.config.security.oidc.redirect_url).path.removesuffix("session/oidc/callback")
    return Response(
        http_status=302, headers={"Location": home, "Set-Cookie": session_cookie(api.config.server, secret)}
    )


def _sign_in_token(request: Request) -> str:
    """The token of a sign-in, as JSON or as a form."""
    content_type = request.head.headers.get("content-type", JSON_TYPE).split(";")[0].strip().lower()
    if content_type == "application/x-www-form-urlencoded":
        body: Any = dict(parse_qsl(request.body.decode("utf-8", "replace")))
    elif content_type == JSON_TYPE:
        body = parse_json(request.body)
    else:
        raise UnsupportedMediaType(
            f"Content-Type {_printable(content_type)}: allowed is {JSON_TYPE} or a form"
        )
    return check_body(body, SIGN_IN_KEYS)["token"]


def end_session(api: Api, request: Request) -> Response:
    api.sign_out(request.head)
    return Response(http_status=204, headers={"Set-Cookie": session_cookie(api.config.server, "")})


def get_dashboard(api: Api, request: Request) -> Response:
    folder = os.environ.get("LOADMANAGER_PAGE_DIR")  # someone works on the page: each reload reads the files
    page, packed, headers = build_dashboard_page(folder) if folder else dashboard_page()
    if "gzip" in request.head.headers.get("accept-encoding", ""):
        page, headers = packed, {**headers, "Content-Encoding": "gzip"}
    return Response(page, content_type="text/html; charset=utf-8", headers=headers)


@functools.cache
def dashboard_page() -> tuple[bytes, bytes, dict[str, str]]:
    return build_dashboard_page(None)


def build_dashboard_page(folder: str | None) -> tuple[bytes, bytes, dict[str, str]]:
    """Build the page of its constants, or of a folder's files: it, it packed by gzip, its headers."""
    css, js = page_parts(folder)
    page = DASHBOARD_PAGE.replace("/*css*/", css).replace("/*js*/", js).encode()
    return page, gzip.compress(page, 9), _page_headers(css, js)


def locust_test_start(api: Api, request: Request) -> Response:
    run_id, _ = api.callback(request)
    api.orchestrator.locust_started(run_id)
    api.store.wait_durable()
    return SUCCESS


def locust_test_stop(api: Api, request: Request) -> Response:
    run_id, body = api.callback(request)
    snapshot = check_metrics(body, "finalMetrics", time.time())
    api.orchestrator.locust_stopped(run_id, snapshot, body.get("complete") is True)
    api.store.wait_durable()
    return SUCCESS


def locust_metrics(api: Api, request: Request) -> Response:
    run_id, body = api.callback(request)
    snapshot = check_metrics(body, "metrics", time.time())
    if snapshot is None:
        raise InvalidInput(
            "metrics: is missing; allowed is an object", {"metrics": "is missing; allowed is an object"}
        )
    api.orchestrator.locust_measured(run_id, snapshot)
    return SUCCESS


def locust_register(api: Api, request: Request) -> Response:
    values = check_body(parse_json(request.body), REGISTER_KEYS, strict=False)
    request.tenant_id, request.env_id = values["tenant_id"], values["env_id"]
    run_request = RunRequest(
        values["tenant_id"],
        values["env_id"],
        values.get("scenario_id") or "ui-started-test",
        values.get("target_users", 0),
        values.get("spawn_rate", 0),
    )
    run_id, is_new = api.orchestrator.register_external(
        run_request, values.get("cluster_id"), functools.partial(api.reaches, request)
    )
    request.run_id = run_id
    message = "External test registered" if is_new else "The cluster's active run is this test"
    return json_response({"runId": run_id, "message": message})


def _cursor_text(seq: int) -> str:
    return base64.urlsafe_b64encode(f"run-{seq}".encode()).decode().rstrip("=")


def _accept_cursor(text: Any) -> int:
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
    match = re.fullmatch(r"run-([0-9]{1,18})", raw)
    if not match:
        raise ValueError
    return int(match.group(1))


def _accept_statuses(text: Any) -> frozenset[str]:
    words = frozenset(text.split(","))
    if not words <= {status.value for status in RunStatus}:
        raise ValueError
    return words


LIST_QUERY = {
    "tenantId": text_value("a string"),
    "envId": text_value("a string"),
    "status": Check(
        "one or more, joined by commas, of " + ", ".join(status.value for status in RunStatus),
        _accept_statuses,
    ),
    "search": text_value(f"a string of 1 to {MAX_TEXT} printable characters", r"(?s:.{1,%d})" % MAX_TEXT),
    "brief": BOOLEAN,
    "limit": number_value(1, 1000, whole=True),
    "cursor": Check("the cursor of a Link header", _accept_cursor),
}
METRICS_QUERY = {
    "from": MOMENT,
    "to": MOMENT,
    "step": number_value(0.1, 86400),
    "maxPoints": number_value(1, 100_000, whole=True),
}
NOTIFICATION_TEST_KEYS = {"id": BodyKey("id", ID_TEXT, required=True)}
LOGS_QUERY = {"lines": number_value(1, MAX_LOG_LINES, whole=True)}


def _accept_reference_runs(text: Any) -> tuple[str, ...]:
    names = tuple(ID_TEXT.accept(name) for name in text.split(","))
    if len(names) > 50 or len(set(names)) < len(names):
        raise ValueError
    return names


HISTOGRAMS_QUERY = {"from": MOMENT, "to": MOMENT}
AUDIT_QUERY = {
    **{name: text_value("a string") for name in ("who", "tenantId", "runId", "action")},
    "outcome": one_of(*AuditFilter.OUTCOMES),
    "from": MOMENT,
    "to": MOMENT,
    "limit": number_value(1, 1000, whole=True),
    "cursor": LIST_QUERY["cursor"],
}
OIDC_QUERY = {  # what providers send back; all but the first five mean nothing to us
    name: text_value("a string", empty=True)
    for name in (
        "code",
        "state",
        "iss",
        "error",
        "error_description",
        "error_uri",
        "session_state",
        "scope",
        "authuser",
        "prompt",
        "hd",
    )
}
STOP_ALL_KEYS = {"tenantId": BodyKey("tenant_id", ID_TEXT), "envId": BodyKey("env_id", ID_TEXT)}
REFERENCE_RUNS = Check(
    "ids of at most 50 runs, joined by commas, or history: the newest comparable ones", _accept_reference_runs
)
COMPARE_QUERY = {"baseline": REFERENCE_RUNS, "candidate": ID_TEXT, "tolerance": TOLERANCES}
TRENDS_QUERY = {
    **{name: text_value("a string") for name in ("tenantId", "envId", "scenarioId")},
    "metric": one_of(*COMPARED),
    "limit": number_value(1, 1000, whole=True),
}
BASELINE_KEYS = {"runId": BodyKey("run_id", ID_TEXT, required=True)}
BASELINE_PATH = "/v1/baselines/{tenantId}/{envId}/{scenarioId}"
XML_TYPE = "application/xml; charset=utf-8"
DOWNLOAD_QUERY = {"download": one_of("0", "1")}
CALLBACK_BYTES = 8 * 1024 * 1024  # statistics of thousands of endpoints

SIGN_IN_KEYS = {"token": BodyKey("token", text_value("an API token"), required=True)}
SIGN_IN_BYTES = 16 * 1024

STARTING = (409, 422, 502, 503, 504)  # what a start may meet beyond bad input
LOCUST_ANSWERS = (409, 502, 503, 504)
METRICS_SCHEMA = {"$ref": "#/components/schemas/Metrics"}
HTML_TYPE, CSV_TYPE, MARKDOWN_TYPE = (
    "text/html; charset=utf-8",
    "text/csv; charset=utf-8",
    "text/markdown; charset=utf-8",
)
EVENT_TYPE = "text/event-stream"

ROUTES = (
    Route("GET", "/", get_dashboard, "anyone", "The dashboard", waits=False, media=HTML_TYPE),
    Route("GET", "/docs", get_docs, "anyone", "This reference, to try calls in", waits=False, media=HTML_TYPE),
    Route("GET", "/openapi.json", get_openapi, "anyone", "This reference as OpenAPI 3.1", waits=False, answer="Document"),
    Route("GET", "/session", get_session, "anyone", "Who is signed in, and the CSRF token", waits=False, answer="Session"),
    Route(
        "POST", "/session", post_session, "anyone", "Sign in with an API token; sets a cookie", waits=False,
        most_body_bytes=SIGN_IN_BYTES, answer="Session", errors=(401, 403, 415, 429, 503), more_body={"token": {"type": "string"}},
    ),
    Route("GET", "/session/oidc", get_oidc, "anyone", "Sign in by OpenID Connect: leave for the provider", success=302, errors=(404, 502)),
    Route(
        "GET", "/session/oidc/callback", get_oidc_callback, "anyone", "Sign in by OpenID Connect: back from the provider",
        query=OIDC_QUERY, success=302, errors=(401, 403, 404, 502),
    ),
    Route("DELETE", "/session", end_session, "viewer", "Sign out", waits=False, success=204),
    Route("POST", "/session/end", end_session, "viewer", "Sign out", waits=False, success=204),
    Route("GET", "/health", get_health, "anyone", "Is Load Manager alive", waits=False, answer="Health", errors=(503,)),
    Route("POST", "/v1/tests", post_test, "operator", "Create and start a run", body=CREATE_KEYS, answer="Run", success=201, errors=STARTING),
    Route("GET", "/v1/tests", get_tests, "viewer", "List runs, newest first", query=LIST_QUERY, answer="Runs"),
    Route("GET", "/v1/tests/{id}", get_test, "viewer", "One run with its newest numbers", waits=False, answer="Run"),
    Route("DELETE", "/v1/tests/{id}", delete_test, "operator", "Delete a final run and its history", success=204, errors=(409, 503)),
    Route("POST", "/v1/tests/{id}/stop", post_stop, "operator", "Stop a run", reserved=True, answer="Stopped", errors=LOCUST_ANSWERS),
    Route(
        "POST", "/v1/tests/{id}/rerun", post_rerun, "operator", "Start the same again", body=RERUN_KEYS, answer="Run", success=201, errors=STARTING
    ),
    Route(
        "POST", "/v1/tests/{id}/users", post_users, "operator", "Change the users of a running load", body=USERS_KEYS, answer="Run", errors=LOCUST_ANSWERS
    ),
    Route("GET", "/v1/scenarios", get_scenarios, "viewer", "The scenarios of the configuration", waits=False, answer="Scenarios"),
    Route("GET", "/v1/tests/{id}/metrics", get_metrics, "viewer", "The run's time series", query=METRICS_QUERY, answer="Series", errors=(503,)),
    Route(
        "GET", "/v1/tests/{id}/histograms", get_histograms, "viewer", "Response times between two moments",
        query=HISTOGRAMS_QUERY, answer="Histograms", errors=(409, 503),
    ),
    Route("GET", "/v1/tests/{id}/failures", get_failures, "viewer", "Failed requests and exceptions", answer="Failures", errors=LOCUST_ANSWERS),
    Route(
        "POST", "/v1/tests/{id}/annotations", post_annotation, "operator", "Mark a moment of the run",
        body=ANNOTATION_KEYS, answer="Annotation", success=201, errors=(409, 503),
    ),
    Route("GET", "/v1/tests/{id}/annotations", get_annotations, "viewer", "The marked moments", waits=False, answer="Annotations"),
    Route("GET", "/v1/tests/{id}/report.html", get_report_html, "viewer", "The run as one page", query=DOWNLOAD_QUERY, media=HTML_TYPE, errors=(503,)),
    Route("GET", "/v1/tests/{id}/report.md", get_report_md, "viewer", "The run as Markdown", query=DOWNLOAD_QUERY, media=MARKDOWN_TYPE, errors=(503,)),
    Route("GET", "/v1/tests/{id}/junit.xml", get_junit, "viewer", "The verdict as JUnit XML", query=DOWNLOAD_QUERY, media=XML_TYPE),
    Route("GET", "/v1/tests/{id}/summary.md", get_summary, "viewer", "The verdict as Markdown", query=DOWNLOAD_QUERY, media=MARKDOWN_TYPE),
    Route("GET", "/v1/tests/compare", get_comparison, "viewer", "Two runs compared", query=COMPARE_QUERY, answer="Comparison", errors=(404,)),
    Route("GET", "/v1/tests/{id}/export", get_export, "viewer", "A final run with all samples as one file", query=DOWNLOAD_QUERY, answer="Export", errors=(409, 503)),
    Route(
        "POST", "/v1/tests/import", post_import, "operator", "Keep a run from a file: an export, or what a headless Locust wrote",
        body={"format": BodyKey("format", one_of(EXPORT_FORMAT, LOCUST_JSON, LOCUST_CSV), required=True)}, most_body_bytes=IMPORT_BYTES,
        answer="Run", success=201, errors=(409, 503), more_body={name: {} for name in (*EXPORT_KEYS, *LOCUST_CSV_KEYS) if name != "format"},
    ),
    Route("GET", "/v1/trends", get_trends, "viewer", "One figure over the Finished runs, oldest first", query=TRENDS_QUERY, answer="Trend"),
    Route("GET", BASELINE_PATH, get_baseline, "viewer", "The run that others are compared with", waits=False, answer="Baseline"),
    Route("PUT", BASELINE_PATH, put_baseline, "operator", "Name a Finished run as baseline", body=BASELINE_KEYS, answer="Baseline", errors=(409, 503)),
    Route("DELETE", BASELINE_PATH, delete_baseline, "operator", "Have no baseline", success=204, errors=(503,)),
    Route("GET", "/v1/tests/{id}/metrics.csv", get_metrics_csv, "viewer", "All samples as CSV", query=DOWNLOAD_QUERY, media=CSV_TYPE, errors=(503,)),
    Route("GET", "/v1/tests/{id}/requests.csv", get_requests_csv, "viewer", "The endpoints as CSV", query=DOWNLOAD_QUERY, media=CSV_TYPE),
    Route(
        "GET", "/v1/tests/{id}/locust-report.html", get_locust_report, "viewer", "Locust's own report",
        query=DOWNLOAD_QUERY, media=HTML_TYPE, errors=(503,),
    ),
    Route("GET", "/v1/tests/{id}/events", get_run_events, "viewer", "Changes of one run as Server-Sent Events", waits=False, media=EVENT_TYPE, errors=(503,)),
    Route("GET", "/v1/events", get_events, "viewer", "Changes of all runs as Server-Sent Events", waits=False, media=EVENT_TYPE, errors=(503,)),
    Route("POST", "/v1/stop-all", post_stop_all, "operator", "Stop every run you may touch", reserved=True, body=STOP_ALL_KEYS, answer="StoppedAll"),
    Route("GET", "/v1/audit", get_audit, "admin", "Who did what, newest first", query=AUDIT_QUERY, answer="Audit", errors=(503,)),
    Route("GET", "/v1/schedules", get_schedules, "viewer", "The schedules and their next five times", answer="Schedules"),
    Route("POST", "/v1/schedules", post_schedule, "operator", "Have a run start by itself", body=SCHEDULE_KEYS, answer="Schedule", success=201, errors=(409, 503)),
    Route("GET", "/v1/schedules/{id}", get_schedule, "viewer", "One schedule", waits=False, answer="Schedule"),
    Route("PATCH", "/v1/schedules/{id}", patch_schedule, "operator", "Change, pause or resume a schedule", body=CHANGE_KEYS, answer="Schedule", errors=(409, 503)),
    Route("DELETE", "/v1/schedules/{id}", delete_schedule, "operator", "Have a schedule no more", success=204, errors=(409, 503)),
    Route("POST", "/v1/schedules/{id}/run", post_schedule_run, "operator", "Start its run now", answer="Run", success=201, errors=STARTING),
    Route("GET", "/v1/notifications", get_notifications, "admin", "Who is told of what, and the newest deliveries", waits=False, answer="Notifications"),
    Route("POST", "/v1/notifications/test", post_notification_test, "admin", "Send a message now", body=NOTIFICATION_TEST_KEYS, errors=(502,)),
    Route("GET", "/v1/clusters", get_clusters, "viewer", "The clusters and what they are doing", answer="Clusters"),
    Route("POST", "/v1/clusters/{id}/scale", post_scale, "operator", "Change a cluster's number of workers", body=SCALE_KEYS, answer="Cluster", errors=LOCUST_ANSWERS),
    Route("GET", "/v1/clusters/{id}/logs", get_logs, "operator", "The last log lines of a cluster's processes", query=LOGS_QUERY, answer="Logs", errors=LOCUST_ANSWERS),
    Route(
        "POST", "/v1/internal/locust/test-start", locust_test_start, "locust", "A test began",
        body=CALLBACK_KEYS, most_body_bytes=CALLBACK_BYTES, reserved=True,
    ),
    Route(
        "POST", "/v1/internal/locust/test-stop", locust_test_stop, "locust", "A test ended", body=CALLBACK_KEYS,
        most_body_bytes=CALLBACK_BYTES, reserved=True, more_body={"finalMetrics": METRICS_SCHEMA, "complete": {"type": "boolean"}},
    ),
    Route(
        "POST", "/v1/internal/locust/metrics", locust_metrics, "locust", "Numbers of a running test", body=CALLBACK_KEYS,
        most_body_bytes=CALLBACK_BYTES, waits=False, more_body={"metrics": METRICS_SCHEMA},
    ),
    Route(
        "POST", "/v1/internal/locust/register-external", locust_register, "locust", "A test began in Locust's own page",
        body=REGISTER_KEYS, answer="Registered", errors=(409, 503),
    ),
)  # fmt: skip


# ---- the API's document: OpenAPI 3.1, all of it from ROUTES ----------------


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        **({"required": required.split()} if required else {}),
    }


def _array(name: str) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}}


_TEXT, _WHOLE, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_MOMENT = {"type": "string", "format": "date-time", "description": "RFC 3339, UTC"}
_MEASURE = {"type": ["number", "null"], "description": "null: Locust gave no figure"}
_COUNT = {"type": ["integer", "null"]}
_NAME_OR_NULL = {"type": ["string", "null"]}

_TEXTS = {"type": "array", "items": _TEXT}
_PLAN = {
    "host": _TEXT,
    "userClasses": _TEXTS,
    "tags": _TEXTS,
    "excludeTags": _TEXTS,
    "options": {"type": "object"},
    "stages": _array("Stage"),
}

_RANGE = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_CHANGE = {
    **dict.fromkeys(("baseline", "candidate", "change", "changePercent"), _MEASURE),
    "judgement": {"enum": list(JUDGEMENTS)}, "reason": _TEXT, "pValue": {"type": "number"},
    "interval": {**_RANGE, "description": "of the change, in the figure's unit: 95 of 100 such intervals hold the true one"},
    "equalRuns": {**_RANGE, "description": "beyond it the figure of a run is no longer one of an equal run"},
}  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "Error": _object("error message", error=_TEXT, message=_TEXT, fields={"type": "object", "additionalProperties": _TEXT}, activeRunId=_TEXT, runId=_TEXT),
    "Success": _object("success", success=_FLAG),
    "Stopped": _object("success message", success=_FLAG, message=_TEXT),
    "StoppedAll": _object("success stopped failed", success=_FLAG, stopped={"type": "array", "items": _TEXT}, failed={"type": "array", "items": _object("runId message", runId=_TEXT, message=_TEXT)}),
    "AuditEntry": _object("at action status outcome", at=_MOMENT, **{name: _WHOLE if name == "status" else _TEXT for name in AUDIT_KEYS}),
    "Audit": _array("AuditEntry"),
    "Registered": _object("runId message", runId=_TEXT, message=_TEXT),
    "Health": _object("status", status={"enum": ["healthy", "unhealthy"]}, message=_TEXT),
    "Session": _object(signedIn=_FLAG, anonymous=_FLAG, singleSignOn=_FLAG, name=_TEXT, role=_TEXT, tenants={"type": ["array", "null"], "items": _TEXT}, csrfToken=_TEXT, expiresInSeconds=_WHOLE),
    "Document": {"type": "object"},
    "EndpointStats": _object("method name", **{name: _TEXT if name in ("method", "name") else _COUNT if name in COUNTS else _MEASURE for name in ENDPOINT_KEYS}),
    "Metrics": _object(
        timestamp=_MOMENT,
        **{name: _COUNT if name in COUNTS else _MEASURE for name in SNAPSHOT_KEYS},
        requestStats={"type": "object", "additionalProperties": {"$ref": "#/components/schemas/EndpointStats"}},
    ),
    "Warning": _object("code at message", code=_TEXT, at=_MOMENT, message=_TEXT),
    "Annotation": _object("at text", at=_MOMENT, text=_TEXT),
    "Annotations": _array("Annotation"),
    "Run": _object(
        "id tenantId envId locustClusterId scenarioId targetUsers spawnRate status createdAt createdBy source",
        id=_TEXT, tenantId=_TEXT, envId=_TEXT, locustClusterId=_TEXT, scenarioId=_TEXT, targetUsers=_WHOLE, spawnRate={"type": "number"},
        durationSeconds=_WHOLE, status={"enum": [status.value for status in RunStatus]}, createdAt=_MOMENT, createdBy=_TEXT, source={"enum": list(SOURCES)},
        startedAt=_MOMENT, finishedAt=_MOMENT, stopReason={"enum": list(STOP_REASONS)}, failureReason=_TEXT, queuePosition=_WHOLE,
        metadata={"type": "object"}, warnings=_array("Warning"), annotations=_array("Annotation"), lastMetrics=METRICS_SCHEMA,
        thresholds=_array("Threshold"), verdict={"enum": ["passed", "failed"]}, compareWith={"enum": list(COMPARE_WITH)},
        comparison={"type": "object"}, locustfileSha256=_TEXT, importedAt=_MOMENT, **_PLAN, usersChanges=_array("UsersChange"), trust={"enum": ["ok", "doubtful"]}, trustReasons={"type": "array", "items": _TEXT},
    ),
    "UsersChange": _object("at targetUsers spawnRate by", at=_MOMENT, targetUsers=_WHOLE, spawnRate={"type": "number"}, by=_TEXT),
    "Stage": _object("targetUsers spawnRate durationSeconds", targetUsers=_WHOLE, spawnRate={"type": "number"}, durationSeconds=_WHOLE),
    "Scenario": _object(
        "id", id=_TEXT, description=_TEXT, targetUsers=_WHOLE, spawnRate={"type": "number"}, durationSeconds=_WHOLE, thresholds=_TEXTS, tenants=_TEXTS, **_PLAN
    ),
    "Scenarios": _array("Scenario"),
    "Schedule": _object(
        "id tenantId envId test concurrencyPolicy startingDeadlineSeconds paused readOnly timezone createdAt createdBy next",
        id=_TEXT, tenantId=_TEXT, envId=_TEXT, test={"type": "object"}, concurrencyPolicy=_TEXT, startingDeadlineSeconds={"type": "number"}, paused=_FLAG, readOnly=_FLAG,
        timezone=_TEXT, createdAt=_MOMENT, createdBy=_TEXT, next={"type": "array", "items": _MOMENT}, description=_TEXT, cron=_TEXT, runAt=_MOMENT, lastTime=_MOMENT,
        lastRunId=_TEXT, lastOutcome=_TEXT,
    ),
    "Schedules": _array("Schedule"),
    "Delivery": _object(
        "id channelId event title attempts createdAt outcome", id=_TEXT, channelId=_TEXT, event={"enum": list(NOTIFY_EVENTS)}, title=_TEXT, attempts=_WHOLE, createdAt=_MOMENT,
        outcome={"enum": ["waiting", "delivered", "given up"]}, runId=_TEXT, problem=_TEXT, endedAt=_MOMENT, nextAt=_MOMENT,
    ),
    "Notifications": _object(
        "channels deliveries", channels={"type": "array", "items": _object("id type events", id=_TEXT, type=_TEXT, events=_TEXTS)}, deliveries=_array("Delivery")
    ),
    "Threshold": _object(
        "expr value result", expr=_TEXT, value=_MEASURE, result={"enum": ["passed", "failed", "pending"]}, firstFailedAt=_MOMENT,
        message=_TEXT, abortOnFail=_FLAG, delaySeconds={"type": "number"}, warnOnly=_FLAG,
    ),
    "Runs": _array("Run"),
    "Baseline": _object("tenantId envId scenarioId runId setAt setBy", tenantId=_TEXT, envId=_TEXT, scenarioId=_TEXT, runId=_TEXT, setAt=_MOMENT, setBy=_TEXT),
    "Change": _object("baseline candidate change changePercent judgement reason", **_CHANGE),
    "Changes": {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Change"}},
    "Figure": _object("endpoint metric judgement reason", endpoint=_NAME_OR_NULL, metric=_TEXT, message=_TEXT, **_CHANGE),
    "Comparison": _object(
        "baseline runs candidate tolerances noiseJudged runsKnown runsNeeded exactTimes falseAlarmRate judgement message totals endpoints figures differences warnings noise regressions",
        baseline=_TEXT, candidate=_TEXT, tolerances={"type": "object", "additionalProperties": _TEXT}, totals={"$ref": "#/components/schemas/Changes"},
        runs={"type": "array", "items": _TEXT, "description": "the reference: one run, or several"}, judgement={"enum": [REGRESSION, NO_REGRESSION, CANNOT_TELL]}, message=_TEXT,
        runsKnown={"type": "integer", "description": "comparable runs that tell how far equal runs lie apart"}, runsNeeded=_WHOLE, exactTimes=_FLAG, falseAlarmRate=_MEASURE,
        endpoints={"type": "array", "items": _object("method name metrics", method=_TEXT, name=_TEXT, state={"enum": ["new", "gone"]}, metrics={"$ref": "#/components/schemas/Changes"})},
        differences={"type": "array", "items": _TEXT}, warnings={"type": "array", "items": _TEXT}, figures=_array("Figure"),
        noiseJudged={"type": "boolean", "description": "enough comparable runs are known"}, noise={"type": "array", "items": _TEXT}, regressions=_array("Figure"),
    ),
    "Trend": _object("metric points", metric=_TEXT, points={"type": "array", "items": _object("runId value", runId=_TEXT, value=_MEASURE, scenarioId=_TEXT, targetUsers=_WHOLE, createdAt=_MOMENT, startedAt=_NAME_OR_NULL, finishedAt=_NAME_OR_NULL, verdict=_NAME_OR_NULL, trust=_TEXT)}),
    "Point": _object("timestamp", timestamp=_MOMENT, **{name: _TEXT if name == "source" else _COUNT if name in COUNTS else _MEASURE for name in SAMPLE_KEYS}),
    "Series": _object("runId total downsampled points", runId=_TEXT, total=_WHOLE, downsampled=_FLAG, points=_array("Point")),
    "Histogram": _object(
        "requests failures responseTimes", requests=_WHOLE, failures=_WHOLE, avgResponseMs=_MEASURE, p50ResponseMs=_MEASURE, p95ResponseMs=_MEASURE,
        p99ResponseMs=_MEASURE, method=_TEXT, name=_TEXT, responseTimes={"type": "object", "additionalProperties": _WHOLE, "description": "whole ms to requests"},
    ),
    "Histograms": _object("runId from to totals endpoints", runId=_TEXT, to=_MOMENT, totals={"$ref": "#/components/schemas/Histogram"}, endpoints=_array("Histogram"), **{"from": _MOMENT}),
    "Export": _object(
        "format version run samples histograms failures", format={"enum": [EXPORT_FORMAT]}, version=_WHOLE, loadManager=_TEXT, exportedAt=_MOMENT,
        run={"$ref": "#/components/schemas/Run"}, samples=_array("Point"), histograms={"type": "array", "items": {"type": "object"}}, failures={"$ref": "#/components/schemas/Failures"},
    ),
    "Failures": _object(
        "failures exceptions",
        failures={"type": "array", "items": _object("method name error occurrences", method=_TEXT, name=_TEXT, error=_TEXT, occurrences=_WHOLE, firstSeen=_NAME_OR_NULL, lastSeen=_NAME_OR_NULL)},
        exceptions={"type": "array", "items": _object("count message traceback nodes", count=_WHOLE, message=_TEXT, traceback=_TEXT, nodes=_TEXT)},
    ),
    "Cluster": _object(
        "id tenantId envId state workers",
        id=_TEXT, tenantId=_TEXT, envId=_TEXT, baseUrl=_TEXT, launcher=_NAME_OR_NULL, state=_TEXT, workersWanted=_COUNT, userCount=_COUNT, hooks={"type": ["boolean", "null"]},
        locustVersion=_NAME_OR_NULL, activeRunId=_NAME_OR_NULL, problem=_NAME_OR_NULL, protected=_FLAG,
        workers={"type": "array", "items": _object("id state userCount", id=_TEXT, state=_TEXT, userCount=_WHOLE, cpuPercent=_MEASURE)},
    ),
    "Clusters": _array("Cluster"),
    "Logs": _object("clusterId logs", clusterId=_TEXT, logs={"type": "array", "items": _object("process lines", process=_TEXT, lines=_TEXTS)}),
}  # fmt: skip


@functools.cache
def openapi_document() -> dict[str, Any]:
    """The API as OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Load Manager",
            "version": VERSION,
            "description": "Control plane for Locust load testing.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API token"},
                "locust": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-Locust-Token",
                    "description": "security.locustCallbackToken",
                },
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": route.handler.__name__ + ("_delete" if route.method == "DELETE" else ""),
        "x-access": route.access,
        "parameters": _parameters(route),
        "responses": _responses(route),
        "security": {"anyone": [], "locust": [{"locust": []}]}.get(route.access, [{"bearer": []}]),
    }
    if route.body is not None or route.more_body:
        schema = _body_schema(route)
        operation["requestBody"] = {
            "required": bool(schema.get("required")),
            "content": {JSON_TYPE: {"schema": schema}},
        }
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    in_query = [
        {"name": name, "in": "query", "required": False, "schema": check.schema, "description": check.allowed}
        for name, check in route.query.items()
    ]
    if route.handler is post_test:
        key_schema = {"type": "string", "minLength": 1, "maxLength": 255}
        in_query.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": key_schema,
                "description": "the same key and body get the same run, for 24 h",
            }
        )
    return in_path + in_query


def _body_schema(route: Route) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, entry in (route.body or {}).items():
        schema = {**entry.check.schema, "description": entry.check.allowed}
        properties[name] = schema if entry.required else {"anyOf": [schema, {"type": "null"}]}
    properties.update(route.more_body)
    required = [name for name, entry in (route.body or {}).items() if entry.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _responses(route: Route) -> dict[str, Any]:
    good: dict[str, Any] = {"description": REASONS[route.success]}
    if route.success not in (204, 302):
        schema = {"$ref": f"#/components/schemas/{route.answer}"} if route.media == JSON_TYPE else _TEXT
        good["content"] = {route.media: {"schema": schema}}
    statuses = {400, *route.errors}
    statuses |= {401, 403, 429} if route.access != "anyone" else set()
    statuses |= {404} if "{" in route.path or route.access == "locust" else set()
    statuses |= {413, 415} if route.body is not None else {413}
    error = {"content": {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    if route.answer == "Health":
        statuses.discard(503)
    answers = {str(status): {"description": REASONS[status], **error} for status in sorted(statuses)}
    if route.answer == "Health":
        answers["503"] = {**good, "description": REASONS[503]}
    return {str(route.success): good, **answers}


class Router:
    """Finds the route of a method and path; knows a path's other methods for 405."""

    def __init__(self, routes: Iterable[Route]):
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        by_path: dict[str, dict[str, Route]] = {}
        for route in routes:
            by_path.setdefault(route.path, {})[route.method] = route
        for path, methods in by_path.items():
            if "GET" in methods:
                methods["HEAD"] = methods["GET"]
            if "{" in path:
                self._patterns.append((re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path)), methods))
            else:
                self._exact[path] = methods

    def match(self, method: str, path: str) -> tuple[Route | None, dict[str, str], str]:
        """Route, path parameters and the Allow list; the route is None for OPTIONS.
        NotFound or MethodNotAllowed otherwise."""
        methods, params = self._methods(path)
        allow = ", ".join(sorted({*methods, "OPTIONS"}))
        if method == "OPTIONS":
            return None, {}, allow
        if method not in methods:
            raise MethodNotAllowed(f"{_printable(method)} is not allowed here; allowed are {allow}", allow)
        return methods[method], params, allow

    def _methods(self, path: str) -> tuple[dict[str, Route], dict[str, str]]:
        if path in self._exact:
            return self._exact[path], {}
        for pattern, methods in self._patterns:
            match = pattern.fullmatch(path)
            if match:
                return methods, {name: _path_text(value) for name, value in match.groupdict().items()}
        raise NotFound(NO_SUCH_PATH)


def _path_text(segment: str) -> str:
    """A decoded path segment; NotFound for what no id of ours can be."""
    try:
        text = unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise NotFound(NO_SUCH_PATH) from None
    if not text.isprintable() or text in (".", ".."):
        raise NotFound(NO_SUCH_PATH)
    return text


class Api:
    """Admits requests (route, credentials, size) and has the handlers answer them."""

    MAX_CALLERS = 10_000  # headers that are remembered

    def __init__(
        self,
        config: Config,
        store: Store,
        orchestrator: Orchestrator,
        feed: EventFeed,
        scheduler: Scheduler,
        notifier: Notifier,
    ):
        self.config = config
        self.store = store
        self.orchestrator = orchestrator
        self.scheduler = scheduler
        self.notifier = notifier
        self._feed = feed
        self._sessions = Sessions()
        self._router = Router(ROUTES)
        self._failed = FailedAttempts()
        self._refusals = RefusalBudget()
        self._tokens = ApiTokens(config.security)
        self._callback_tokens = CallbackTokens(config)
        security = config.security
        self._jwt = JwtTokens(security.jwt, config.folder) if security.jwt else None
        self.sign_on = OpenIdSignOn(security.oidc, security.jwt) if security.oidc else None
        self._callers: dict[str, Caller] = {}  # by a good header Authorization
        self._callback_callers: dict[str, Principal] = {}  # by a good header X-Locust-Token
        self._usages: dict[str, RateCounter] = {}  # by the caller's name
        self._proxies = tuple(ipaddress.ip_network(text) for text in config.server.trusted_proxies)
        self._body_limits = {
            MAX_BODY_BYTES: config.limits.body_bytes,
            CALLBACK_BYTES: config.limits.callback_bytes,
        }
        self.is_open = config.security.is_open  # anybody may call
        self._creating: dict[str, list[Any]] = {}  # Idempotency-Keys in work: their lock, how many wait
        self._creating_lock = threading.Lock()

    # ---- before the body ---------------------------------------------------

    def admit(self, head: RequestHead, address: str) -> Request:
        """The request with its route and caller, or the error to answer."""
        if head.matched is None:
            head.matched = self._router.match(head.method, head.path)
        route, params, allow = head.matched
        if self._proxies:
            address = client_address(address, head.headers.get("x-forwarded-for"), self._proxies)
        if route is None:
            return Request(head, _options_route(allow), {}, NOBODY, address)
        principal = NOBODY
        try:
            principal = self._principal(head, route, address)
            self._check_role(principal, route)
        except (Unauthorized, Forbidden) as error:
            request = Request(head, route, params, error.caller or principal, address)
            self._note_refusal(request, error)
            raise
        if head.content_length:
            self._check_body_head(head, route)
        return Request(head, route, params, principal, address)

    def _check_body_head(self, head: RequestHead, route: Route) -> None:
        """TooLarge or UnsupportedMediaType before a byte of the body is read."""
        most = self._body_limits.get(route.most_body_bytes, route.most_body_bytes)
        if head.content_length > most:
            raise TooLarge(f"the body has {head.content_length} bytes; allowed are {most}")
        if route.body is not None:
            content_type = head.headers.get("content-type", JSON_TYPE).split(";")[0].strip().lower()
            if content_type != JSON_TYPE and not content_type.endswith("+json"):
                raise UnsupportedMediaType(f"Content-Type {_printable(content_type)}: allowed is {JSON_TYPE}")

    def _principal(self, head: RequestHead, route: Route, address: str) -> Principal:
        if route.access == "anyone":
            return NOBODY
        return self._locust(head, address) if route.access == "locust" else self._caller(head, address)

    def _check_role(self, principal: Principal, route: Route) -> None:
        if route.access in ROLES and ROLES.index(principal.role) < ROLES.index(route.access):
            raise Forbidden(f"this needs the role {route.access}; the token has {principal.role}")

    def _locust(self, head: RequestHead, address: str) -> Principal:
        given = head.headers.get("x-locust-token", "")
        principal = self._callback_callers.get(given)
        if principal is not None:
            return principal
        principal = self._callback_tokens.owner(given)
        if principal is None:
            raise self._refused(address, "the header X-Locust-Token is missing or wrong")
        if len(self._callback_callers) < self.MAX_CALLERS:  # with allowAnonymous any token is good
            self._callback_callers[given] = principal
        return principal

    def _caller(self, head: RequestHead, address: str) -> Principal:
        """By Bearer token or by the cookie of a sign-in; a token in the request goes first."""
        given, limit = head.headers.get("authorization"), self.config.limits.requests_per_s
        known = self._callers.get(given) if given else None
        if known is not None and known.until > time.time():
            known.usage.note(limit)
            return known.principal
        principal = self._new_caller(head, given, address)
        if len(self._usages) >= self.MAX_CALLERS:
            self._usages.clear()
        usage = self._usages.setdefault(principal.name, RateCounter())
        if given and not self.is_open:
            if len(self._callers) >= self.MAX_CALLERS:
                self._callers.clear()
            self._callers[given] = Caller(
                principal, usage, min(principal.ends_at, time.time() + Caller.KEEP_S)
            )
        usage.note(limit)
        return principal

    def _new_caller(self, head: RequestHead, given: str | None, address: str) -> Principal:
        if self.is_open:
            if head.method not in SAFE_METHODS:
                check_same_origin(head, self.config.server, required=False)
            return ANONYMOUS
        if given is None and session_secret(head, self.config.server) is not None:
            return self._by_cookie(head)
        scheme, _, token = (given or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise self._refused(address, "send the header Authorization: Bearer <token> with a valid token")
        return self._owner_of(token.strip(), address)

    def _owner_of(self, token: str, address: str) -> Principal:
        """Whose token it is, one of ours or one that the identity provider signed; Unauthorized,
        TooManyRequests, Forbidden or KeysNeeded otherwise."""
        principal = self._tokens.owner(token)
        if principal is not None:
            return principal
        if self._jwt is None or token.count(".") != 2:
            raise self._refused(address, "this is not a valid API token")
        try:
            return self._jwt.owner(token)
        except TokenRefused as error:
            raise self._refused(address, str(error)) from None

    # ---- browsers that signed in -------------------------------------------

    def session_of(self, head: RequestHead) -> Session | None:
        return self._sessions.find(session_secret(head, self.config.server))

    def _by_cookie(self, head: RequestHead) -> Principal:
        session = self.session_of(head)
        if session is None:
            raise Unauthorized("the sign-in has ended; sign in again")
        try:
            check_host(head, self.config.server)
            if head.method not in SAFE_METHODS:
                check_same_origin(head, self.config.server, required=True)
                check_csrf(head, session)
        except Forbidden as error:
            error.caller = session.principal
            raise
        return session.principal

    def sign_in(self, token: str, address: str) -> tuple[Session, str]:
        """A new session and its secret for the owner of an API token, or Unauthorized."""
        try:
            return self._sessions.begin(ANONYMOUS if self.is_open else self._owner_of(token, address))
        except KeysNeeded as needed:  # the loop does not wait: who signs in tries again
            needed.read_soon(_nothing)
            raise

    def begin_session(self, principal: Principal) -> str:
        """The secret of a new session of somebody who has proven who they are."""
        return self._sessions.begin(principal)[1]

    def sign_out(self, head: RequestHead) -> None:
        self._sessions.end(session_secret(head, self.config.server))
        self._feed.close_refused()

    def event_stream(self, request: Request, run_id: str | None) -> Response:
        """A stream of events of one run, or of all the caller may see."""
        headers = request.head.headers
        secret = (
            None
            if self.is_open or "authorization" in headers
            else session_secret(request.head, self.config.server)
        )
        principal = request.principal

        def is_allowed() -> bool:
            return self._sessions.is_alive(secret) if secret else principal.ends_at > time.time()

        return self._feed.response(
            Stream(run_id, principal.scope, headers.get("last-event-id"), is_allowed, principal.name)
        )

    def _refused(self, address: str, message: str) -> LoadManagerError:
        wait_s = self._failed.note(address)
        if wait_s is not None:
            return TooManyRequests("too many wrong tokens from this address", retry_after_s=wait_s)
        return Unauthorized(message)

    # ---- with the body -----------------------------------------------------

    def respond(self, request: Request) -> Response:
        """The handler's answer; every error becomes a JSON answer, never a traceback."""
        failure: LoadManagerError | None = None
        try:
            if request.head.query:
                request.query = check_query(request.head.query, request.route.query)
            response = request.route.handler(self, request)
        except LoadManagerError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the edge: a bug is logged and answered 500
            log_unforeseen("request", error, route=request.route.path)
            failure = LoadManagerError("an error of Load Manager itself; its log has the details")
        if failure is not None:
            response = error_response(failure)
            if isinstance(failure, (Unauthorized, Forbidden, NotYours)):
                self._note_refusal(request, failure)
                return response
        if request.route.is_audited:
            unwritten = self._note_done(request, response.http_status, failure)
            if unwritten is not None and response.http_status < 300:
                return error_response(unwritten)
        return response

    # ---- the audit ---------------------------------------------------------

    def _note_done(
        self, request: Request, http_status: int, failure: LoadManagerError | None
    ) -> NotReady | None:
        """What changed something, or was to, is in the audit, and on disk, before it is answered;
        the answer for what was done and cannot be written: a 2xx says that it survives a crash."""
        if failure is not None:
            request.run_id = request.run_id or str(failure.extra.get("runId", ""))
        detail = (
            request.note if failure is None else ", ".join(failure.extra.get("fields", ())) or failure.message
        )
        self.store.audit(self._entry(request, http_status, detail))
        if not request.route.waits:
            return None
        try:
            self.store.wait_durable()
        except NotReady as error:
            log("change not yet on disk", route=request.route.path, why=error.message)
            words = f"this was done, but is not on disk yet, and a crash would lose it: {error.message}"
            extra = {"runId": request.run_id} if request.run_id else {}
            return NotReady(words, retry_after_s=5, **extra)
        return None

    def _note_refusal(self, request: Request, failure: LoadManagerError) -> None:
        if not self._refusals.takes():
            return
        request.principal = failure.caller or request.principal
        skipped, self._refusals.skipped = self._refusals.skipped, 0
        more = f" ({skipped} refusals before this one were too many to write)" if skipped else ""
        self.store.audit(self._entry(request, failure.http_status, failure.message + more))

    def _entry(self, request: Request, http_status: int, detail: str) -> AuditEntry:
        """An entry with what of the request may be known: never a header, a query or a body."""
        run_id = request.run_id or (
            request.params.get("id", "") if request.route.path.startswith("/v1/tests/") else ""
        )
        run = self.store.find(run_id)
        tenant_id = request.tenant_id or request.params.get("tenantId", "") or (run.tenant_id if run else "")
        env_id = request.env_id or request.params.get("envId", "") or (run.env_id if run else "")
        texts = (audit_text(text) for text in (tenant_id, env_id, run_id))
        who, action = request.principal, f"{request.route.method} {request.route.path}"
        return AuditEntry(
            time.time(), who.name, who.role, request.address, action, *texts, http_status, audit_text(detail)
        )

    # ---- what handlers share -----------------------------------------------

    def check_place(self, request: Request, tenant_id: str, env_id: str) -> None:
        """Forbidden when the caller may not touch this environment of this tenant."""
        request.tenant_id, request.env_id = tenant_id, env_id
        scope = request.principal.scope
        if scope.covers(tenant_id, env_id):
            return
        is_tenant = scope.tenants is not None and tenant_id not in scope.tenants
        name, value = ("tenantId", tenant_id) if is_tenant else ("envId", env_id)
        allowed = ", ".join(sorted((scope.tenants if is_tenant else scope.environments) or ())) or "none"
        why = f"the token may not use {_shown(value)}; allowed are {allowed}"
        raise Forbidden(f"{name}: {why}", {name: why})

    def check_named_place(self, request: Request, body: Any) -> None:
        """check_place() of a body that nobody has checked, as far as it names one."""
        named = [body.get(name) if isinstance(body, dict) else None for name in ("tenantId", "envId")]
        if all(isinstance(name, str) for name in named):
            self.check_place(request, *named)

    def visible_run(self, request: Request) -> Run:
        """The run of the path, NotFound also for one that the caller may not see."""
        return self.allowed_run(request, request.params["id"])

    def allowed_run(self, request: Request, run_id: str) -> Run:
        run = self.store.get(run_id)
        if not request.principal.may_touch(run.tenant_id, run.env_id):
            request.run_id = run.id
            raise NotYours(f"there is no run {run.id}")
        return run

    def visible_schedule(self, request: Request) -> Schedule:
        """The schedule of the path, NotFound also for another tenant's."""
        schedule = self.scheduler.get(request.params["id"])
        if not request.principal.may_touch(schedule.tenant_id, schedule.env_id):
            request.tenant_id, request.env_id = schedule.tenant_id, schedule.env_id
            raise NotYours(f"there is no schedule {request.params['id'][:MAX_TEXT]}")
        request.tenant_id, request.env_id, request.note = (
            schedule.tenant_id,
            schedule.env_id,
            f"schedule {schedule.id}",
        )
        return schedule

    def visible_cluster(self, request: Request) -> Cluster:
        """The cluster of the path, NotFound also for another tenant's."""
        cluster = self.orchestrator.clusters.get(request.params["id"])
        none = f"there is no cluster {request.params['id'][:MAX_TEXT]}"
        if cluster is None:
            raise NotFound(none)
        request.tenant_id, request.env_id, request.note = (
            cluster.config.tenant_id,
            cluster.config.env_id,
            f"cluster {cluster.id}",
        )
        if not request.principal.may_touch(request.tenant_id, request.env_id):
            raise NotYours(none)
        return cluster

    def reaches(self, request: Request, cluster_id: str) -> bool:
        """Whether a callback's token is one of this cluster."""
        return self._callback_tokens.may_touch(request.principal, cluster_id)

    def report_parts(self, request: Request) -> tuple[dict[str, Any], list[Sample], dict[str, Any]]:
        """What a report is made of: the run as on the wire, its history, its failures."""
        run = self.visible_run(request)
        try:
            failures = self.orchestrator.failures(run)
        except LocustError as error:
            failures = {**failures_to_json((), ()), "problem": error.message}
        return json.loads(self.store.wire(run.id)), downsample(self.store.samples(run.id), 600), failures

    def file_response(
        self,
        request: Request,
        name: str,
        content_type: str,
        text: str,
        policy: str = "default-src 'none'; sandbox",
    ) -> Response:
        """A text shown in the browser, or saved with ?download=1 under a name with the run's id."""
        kind = "attachment" if request.query.get("download") == "1" else "inline"
        headers = {
            "Content-Disposition": f'{kind}; filename="{request.params["id"][:36]}-{name}"',
            "Content-Security-Policy": policy,
        }
        return Response(text.encode("utf-8", "replace"), content_type=content_type, headers=headers)

    def run_response(self, run_id: str, http_status: int, replayed: bool = False) -> Response:
        headers = {"Location": f"/v1/tests/{run_id}"}
        if replayed:
            headers["Idempotent-Replayed"] = "true"
        return Response(self.store.wire(run_id), http_status, headers=headers)

    @contextlib.contextmanager
    def _one_at_a_time(self, key: str) -> Iterator[None]:
        """Let one request of a key go on after the other: the lock is that of all who wait, and
        goes with the last of them."""
        with self._creating_lock:
            waiting = self._creating.setdefault(key, [threading.Lock(), 0])
            waiting[1] += 1
        try:
            with waiting[0]:
                yield
        finally:
            with self._creating_lock:
                waiting[1] -= 1
                if not waiting[1]:
                    del self._creating[key]

    def create_once(self, key: str, body: Any, run_request: RunRequest, request: Request) -> Response:
        """Create under an Idempotency-Key: the same key and body get the same run."""
        body_hash = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._one_at_a_time(key):
            known = self.store.recall_key(key, time.time())
            if known is None:
                run = self.orchestrator.create(
                    run_request, request.principal.name, idempotency=(key, body_hash)
                )
                request.run_id = run.id
                return self.run_response(run.id, 201)
        known_hash, run_id = known
        if known_hash != body_hash:
            raise KeyReused("this Idempotency-Key was used with another body")
        request.run_id, request.note = run_id, "replayed"
        return self.run_response(run_id, 201, replayed=True)

    def callback(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Run id and body of a callback, or NotFound for an unknown run or one of another
        tenant or environment than the callback says."""
        body = parse_json(request.body, unique_keys=False)
        values = check_body(body, CALLBACK_KEYS, strict=False)
        run = self.store.get(values["run_id"])
        place = (run.tenant_id, run.env_id)
        may_be_on = (
            [run.cluster_id]
            if run.cluster_id
            else [item.id for item in self.config.clusters if (item.tenant_id, item.env_id) == place]
        )
        if not any(self.reaches(request, cluster_id) for cluster_id in may_be_on):
            raise NotYours(f"there is no run {run.id}")
        if values.get("tenant_id", run.tenant_id) not in (run.tenant_id, ""):
            raise NotFound(f"there is no run {run.id} of this tenant")
        if values.get("env_id", run.env_id) not in (run.env_id, ""):
            raise NotFound(f"there is no run {run.id} of this environment")
        return run.id, body


def audit_text(text: str, most: int = 500) -> str:
    """A text that both databases and a terminal take: what is not printable is escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:most]
    )


@functools.lru_cache(maxsize=64)
def _options_route(allow: str) -> Route:
    def options(api: Api, request: Request) -> Response:
        return Response(http_status=204, headers={"Allow": allow})

    return Route("OPTIONS", "*", options, "anyone", "The methods of a path", waits=False)


# ============================================================================
# 22. SERVICE - the whole program put together, and its configuration checked
# ============================================================================


def checked_config(path: str) -> Config:
    """The configuration of a file, checked as a whole; ConfigError lists every problem."""
    config, problems = read_config(path)
    add_problems(problems, scenario_problems(config))
    add_problems(problems, notification_problems(config))
    add_problems(problems, schedule_problems(config, problems))
    if problems:
        raise ConfigError(problems)
    return config


def start_problems(config: Config) -> Iterator[str]:
    """What of a good configuration cannot be used here: certificates, packages that are missing."""
    security = config.security
    checks: list[Callable[[], object]] = []
    if config.server.tls:
        checks.append(functools.partial(TlsFiles, config.server.tls, config.folder))
    if security.jwt:
        checks.append(functools.partial(require_pyjwt, jwt_algorithms(security.jwt)))
    if security.oidc:
        checks.append(functools.partial(require_pyjwt, sign_on_algorithms(security.jwt)))
    for check in checks:
        try:
            check()
        except StartupError as error:
            yield str(error)


def serve(config_path: str) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit status."""
    try:
        config = checked_config(config_path)
    except ConfigError as error:
        return _print_problems(error)
    _raise_file_limit()
    ending = _EndSignal()
    try:
        service = Service(config)
    except StartupError as error:
        print(f"loadmanager: {error}", file=sys.stderr)
        return 1
    service.start()
    ending.wait()
    log("ending", signal=ending.name)
    service.stop()
    log("ended")
    os._exit(0)  # everything is written; threads may still wait for a hung Locust


class Service:
    """The whole program, put together; StartupError when it cannot be."""

    STOP_S = 4.8

    def __init__(self, config: Config):
        tls = TlsFiles(config.server.tls, config.folder) if config.server.tls else None
        self._loop = ConnectionLoop(None, config.server.max_connections, tls)
        try:
            self._server = ApiServer(config.server.host, config.server.port, self._loop)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {config.server.host}:{config.server.port}: {error.strerror or error}"
            ) from None
        try:
            audit_file = os.path.join(config.folder, config.audit.file) if config.audit.file else None
            self._store = Store(open_database(config.storage.url, config.folder), audit_file)
        except BaseException:
            self._server.server_close()
            raise
        self._timer = Timer()
        self._engine = Orchestrator(config, self._store, self._timer)
        feed = EventFeed(
            self._store,
            self._loop,
            self._timer,
            config.server.max_connections // 2,
            config.limits.event_streams,
        )
        self._notifier = Notifier(config, self._store)
        self._scheduler = Scheduler(config, self._store, self._engine, self._notifier.schedule_missed)
        self._loop.api = Api(config, self._store, self._engine, feed, self._scheduler, self._notifier)
        self.url = (
            f"{'https' if tls else 'http'}://{host_to_call(config.server.host)}:{self._server.server_port}"
        )
        self._callbacks = (
            LocalCallbacks(self._loop.api) if tls and any(item.launcher for item in config.clusters) else None
        )

    def start(self) -> None:
        self._timer.start()
        if self._callbacks:
            self._callbacks.start()
        self._engine.launch_clusters(self._callbacks.url if self._callbacks else self.url)
        self._engine.reconcile()
        self._notifier.start()
        self._scheduler.start()
        self._loop.start()
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
        log(f"Load Manager {VERSION} listening", url=self.url)

    def stop(self) -> None:
        """Finish the requests in hand, write everything, and be gone within 5 s."""
        last_resort = threading.Timer(self.STOP_S, os._exit, (0,))
        last_resort.daemon = True
        last_resort.start()
        self._loop.draining = True
        self._scheduler.close()
        self._notifier.close()
        self._server.shutdown()
        self._server.server_close()
        self._engine.shutdown()
        self._loop.drain(1.0)
        self._loop.close()
        self._timer.close()
        self._store.close()


class LocalCallbacks:
    """Plain HTTP on a loopback port of its own, for callbacks of launched clusters alone: our
    certificate need not name this machine's loopback address, nor be one they trust."""

    def __init__(self, api: Api):
        self._api = api
        self._loop = ConnectionLoop(self, 256)
        self._server = ApiServer("127.0.0.1", 0, self._loop)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._loop.start()
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="accept-callbacks", daemon=True
        ).start()

    def admit(self, head: RequestHead, address: str) -> Request:
        request = self._api.admit(head, address)
        if request.route.access != "locust":
            raise NotFound(NO_SUCH_PATH)
        return request

    def respond(self, request: Request) -> Response:
        return self._api.respond(request)


class _EndSignal:
    """Waits for a signal that ends the program; the second one ends it at once."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._came.is_set():
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        self._came.set()

    def wait(self) -> None:
        while not self._came.wait(3600):
            pass


def _raise_file_limit() -> None:
    """As many open files as the system allows: a connection needs one."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ImportError, ValueError, OSError):
        pass


def check_config(config_path: str) -> int:
    """Print every problem of a configuration; 0 when there is none, 2 otherwise."""
    try:
        config = checked_config(config_path)
        problems = list(start_problems(config))
        if problems:
            raise ConfigError(problems)
    except ConfigError as error:
        return _print_problems(error)
    print(
        f"{config_path}: good; {len(config.clusters)} cluster(s), listening on {config.server.host}:{config.server.port}"
    )
    for cluster in config.clusters:
        if (
            cluster.launcher
            and cluster.launcher.locustfile
            and not os.path.isfile(os.path.join(config.folder, cluster.launcher.locustfile))
        ):
            print(
                f"{config_path}: note: cluster {cluster.id}: {cluster.launcher.locustfile} does not exist yet"
            )
    return 0


def _print_problems(error: ConfigError) -> int:
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return 2


# ============================================================================
# 23. TERMINAL - text, tables and a live view that any terminal can show
# ============================================================================
# Names come from users and from Locust: printable() lets none of them move the cursor,
# colour or reorder the line. Widths are in columns: a Chinese letter takes two.

COLOURS = {
    "green": "32",
    "red": "31",
    "orange": "33",
    "blue": "34",
    "violet": "35",
    "grey": "90",
    "bold": "1",
}
PAINT = re.compile(r"(\x1b\[[0-9;]*m)")  # only ours: text of others has no escape character left
JOINERS = "\u200d\u200c"  # parts of emoji and of Persian words: invisible, and harmless


def printable(value: object) -> str:
    """The text with every character that is no visible one written as its escape."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in JOINERS else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def one_line(value: object, most: int = 500) -> str:
    """A text of others within a message of ours."""
    text = " ".join(str(value).split())
    return printable(text if len(text) <= most else text[: most - 1] + "…")


def columns_of(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii() and "\x1b" not in text:
        return len(text)
    return sum(map(_columns_of_char, PAINT.sub("", text)))


def _columns_of_char(char: str) -> int:
    if char.isascii():
        return 1
    import unicodedata

    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def clip(text: str, columns: int) -> str:
    """The text within so many columns; a cut is shown by an ellipsis, colours stay closed."""
    if columns_of(text) <= columns and len(text) <= 8 * max(columns, 20):
        return text
    kept, used, cut = [], 0, False
    for part in PAINT.split(text):
        if PAINT.fullmatch(part):
            kept.append(part)
            continue
        for char in part[: 4 * columns] if not cut else "":
            used += _columns_of_char(char)
            if used > columns - 1:
                cut = True
                kept.append("…" if columns > 0 else "")
                break
            kept.append(char)
    return "".join(kept)


def fill(text: str, columns: int, right: bool = False) -> str:
    """The text cut or filled to exactly so many columns."""
    text = clip(text, columns)
    space = " " * (columns - columns_of(text))
    return space + text if right else text + space


def pack(facts: Iterable[str], columns: int | None) -> list[str]:
    """Facts side by side, on as few lines as fit; columns None: all on one."""
    lines: list[str] = []
    for fact in facts:
        joined = f"{lines[-1]}   {fact}" if lines else fact
        if lines and (columns is None or columns_of(joined) <= columns):
            lines[-1] = joined
        else:
            lines.append(fact)
    return lines


class Column(NamedTuple):
    """A column of a table. drop: narrow terminals lose the highest first; 0 stays and is cut."""

    heading: str
    right: bool = False
    drop: int = 0


def table(columns: tuple[Column, ...], rows: list[list[str]], width: int | None = None) -> list[str]:
    """Lines of a table, at most `width` columns wide (None: as wide as it is)."""
    chosen = list(range(len(columns)))
    widths = [
        max([columns_of(column.heading), *(columns_of(row[index]) for row in rows)])
        for index, column in enumerate(columns)
    ]
    while width is not None and sum(widths[index] + 2 for index in chosen) - 2 > width:
        last = max(chosen, key=lambda index: columns[index].drop)
        over = sum(widths[index] + 2 for index in chosen) - 2 - width
        widest = max((index for index in chosen if columns[index].drop == 0), key=lambda index: widths[index])
        least = (
            28 if columns[last].drop > 3 else 16
        )  # a name that still tells is worth more than the lesser numbers
        if widths[widest] - over >= min(least, widths[widest]):
            widths[widest] -= over
        elif columns[last].drop > 0:
            chosen.remove(last)
        else:
            widths[widest] = max(widths[widest] - over, 4)
            break
    lines = [[column.heading for column in columns], *rows]
    return [
        "  ".join(fill(line[index], widths[index], columns[index].right) for index in chosen).rstrip()
        for line in lines
    ]


class Screen:
    """Where a command prints: a terminal, with a live view redrawn in place, or a pipe.

    A pipe whose reader has gone (| head) makes it silent: a run is followed all the same."""

    def __init__(self, stream: Any, environ: dict[str, str]):
        self._stream = stream
        self.is_terminal = _is_terminal(stream, environ)
        self._has_colours = self.is_terminal and not environ.get("NO_COLOR")
        self._drawn: list[str] = []  # the live view's lines as they stand on the terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self._can_draw = (stream.encoding or "ascii").lower().replace("-", "") in ("utf8", "utf16", "cp65001")

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows now: people resize windows."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns, rows = 80, 24
        return columns or 80, rows or 24

    @property
    def columns(self) -> int | None:
        """How wide a table may be; None: no terminal, no limit."""
        return self.size[0] if self.is_terminal else None

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self._has_colours and colour else text

    def bar(self, ratio: float, columns: int) -> str:
        full = round(max(0.0, min(1.0, ratio)) * columns)
        done, rest = ("█", "░") if self._can_draw else ("#", "-")
        return self.paint(done * full, "green") + self.paint(rest * (columns - full), "grey")

    def print(self, *lines: str) -> None:
        """Lines that stay; a live view goes."""
        self._write(self._erased() + "".join(line + "\n" for line in lines))

    def draw(self, lines: list[str]) -> None:
        """The live view anew, in place of the one before."""
        columns, rows = self.size
        # One column less: some terminals wrap as soon as the last one is written.
        shown = [clip(line, columns - 1) for line in lines[: max(1, rows - 1)]]
        self._write(self._erased() + "".join(line + "\n" for line in shown))
        self._drawn = shown

    def raw(self, data: bytes) -> None:
        """A document of the server, as it is; on a terminal without control characters."""
        text = data.decode("utf-8", "replace")
        if self.is_terminal:
            text = "\n".join(printable(line) for line in text.replace("\r\n", "\n").expandtabs().split("\n"))
        self._write(text if text.endswith("\n") else text + "\n")

    def json(self, data: bytes) -> None:
        """The API's JSON; on a terminal control characters are written as JSON escapes."""
        text = data.decode("utf-8", "replace").rstrip("\n")
        if self.is_terminal and not text.isprintable():
            text = "".join(
                char if char.isprintable() or char in "\n\t" else json.dumps(char)[1:-1] for char in text
            )
        self._write(text + "\n")

    def _erased(self) -> str:
        """What takes the live view away. In a window made narrower its lines have wrapped."""
        columns, rows = self.size
        height = sum(max(1, math.ceil(columns_of(line) / columns)) for line in self._drawn)
        self._drawn = []
        return f"\x1b[{min(height, rows - 1)}A\r\x1b[J" if height else ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())


def _is_terminal(stream: Any, environ: dict[str, str]) -> bool:
    return stream.isatty() and environ.get("TERM", "dumb") != "dumb"


def count_text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def decimal_text(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def percent_text(value: float | None) -> str:
    """Few failures of many are not shown as none."""
    return "<0.01%" if value is not None and 0 < value < 0.005 else f"{decimal_text(value, 2)}%"


def clock_words(seconds: float) -> str:
    """Seconds as `0:42`, `1:05:00`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ============================================================================
# 24. API CLIENT - which server a command talks to, and requests to it
# ============================================================================
# Commands are clients like any other: they know the API and the configuration file, and
# nothing of the orchestrator. Every failure is a CommandError: one line and an exit status.


class ServerAddress(NamedTuple):
    """A running Load Manager and how to call it. token "": none is sent."""

    url: str
    token: str
    ca_file: str | None = None
    token_command: str | None = None  # prints a new token when this one is refused


def find_server(options: Any, environ: dict[str, str]) -> ServerAddress:
    """The server a command talks to: from its options, else the environment, else a
    configuration file. CommandError and ConfigError say what is wrong."""
    url = _given_url(options.url or environ.get("LOADMANAGER_URL"))
    token = _given_token(options, environ)
    ca_file = options.ca_file or environ.get("LOADMANAGER_CA_FILE") or None
    command = environ.get("LOADMANAGER_TOKEN_COMMAND") or None if token is None else None
    if command is not None:
        token = token_of_command(command)
    if url is not None and token is not None:
        return ServerAddress(url, token, ca_file, command)
    here = [
        os.path.join(folder, DEFAULT_CONFIG) for folder in (".", os.path.dirname(os.path.abspath(__file__)))
    ]
    path = options.config or next(filter(os.path.isfile, here), None)
    if path is None:
        return ServerAddress(url or f"http://127.0.0.1:{ServerConfig().port}", token or "", ca_file)
    try:
        configured = _configured_server(path, need_url=url is None, need_token=token is None)
    except (ConfigError, CommandError):
        if url is None or options.config:
            raise
        configured = ServerAddress("", "")  # found by chance, and not needed
    if token is None:
        token = configured.token if options.config or _is_near(url, configured.url) else ""
    return ServerAddress(url or configured.url, token, ca_file, command)


def token_of_command(command: str) -> str:
    """The token that a command prints; its words are taken as they stand, no shell reads them."""
    import shlex
    import subprocess

    name = "LOADMANAGER_TOKEN_COMMAND"
    try:
        words = shlex.split(command)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60, check=False
        )
    except (ValueError, IndexError) as error:
        raise CommandError(f"{name}: cannot be split into words: {error}", EXIT_USAGE) from None
    except OSError as error:
        raise CommandError(
            f"{name}: {words[0]} cannot be run: {error.strerror or error}", EXIT_USAGE
        ) from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{name}: printed no token within 60 s", EXIT_UNREACHABLE) from None
    token = done.stdout.decode("ascii", "replace").strip()
    if done.returncode or not re.fullmatch("[!-~]+", token):
        raise CommandError(
            f"{name}: ended with {done.returncode} and printed {'no' if not token else 'something else than a'} token",
            EXIT_UNREACHABLE,
        )
    return token


def _is_near(url: str | None, configured_url: str) -> bool:
    """The token of a configuration found by chance goes to its own server or to this
    machine, not to any address that somebody names."""
    return url in (None, configured_url) or is_loopback(urlsplit(url).hostname or "")


def _given_url(url: str | None) -> str | None:
    try:
        return BASE_URL.accept(url) if url else None
    except ValueError:
        raise CommandError(f"--url: allowed is {BASE_URL.allowed}, got {_shown(url)}", EXIT_USAGE) from None


def _given_token(options: Any, environ: dict[str, str]) -> str | None:
    """The token of the options or of the environment, None when there is none."""
    token = options.token
    if token is None and options.token_file:
        try:
            with open(options.token_file, encoding="utf-8") as file:
                token = file.read(65536).strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise CommandError(
                f"--token-file: {options.token_file} cannot be read: {why}", EXIT_USAGE
            ) from None
    token = environ.get("LOADMANAGER_TOKEN") or None if token is None else token
    if token is not None and not re.fullmatch("[!-~]*", token):
        raise CommandError(
            "the token has characters that no token has; allowed are printable ASCII characters", EXIT_USAGE
        )
    return token


def _configured_server(path: str, need_url: bool, need_token: bool) -> ServerAddress:
    """Address and token in a configuration file. Nothing else of it is judged: secrets of
    Locust clusters may not be readable for those who type commands."""
    document = _read_config_file(path)
    sections = document if isinstance(document, dict) else {}
    reader = _ConfigReader(os.path.dirname(os.path.abspath(path)), dict(os.environ))
    server = reader.section(ServerConfig, sections.get("server"), "server.")
    security = reader.section(SecurityConfig, sections.get("security"), "security.")
    wanted = ("server.host", "server.port") * need_url + ("security.apiToken",) * need_token
    problems = [f"{path}: {problem}" for problem in reader.problems if problem.startswith(wanted)]
    if problems:
        raise ConfigError(problems)
    if need_url and server.port == 0:
        raise CommandError(
            f"{path}: server.port is 0, any free one: say which with --url or LOADMANAGER_URL", EXIT_USAGE
        )
    scheme = "https" if server.tls else "http"
    return ServerAddress(f"{scheme}://{host_to_call(server.host)}:{server.port}", security.api_token)


class ApiAnswer(NamedTuple):
    """A good answer of the server."""

    http_status: int
    headers: Any  # http.client.HTTPMessage
    body: bytes

    def json(self, *keys: str) -> dict[str, Any]:
        """The body, an object with these keys, or CommandError: what answers is not Load Manager."""
        value = self._value()
        if not isinstance(value, dict) or any(key not in value for key in keys):
            raise self._strange()
        return value

    def json_list(self, *keys: str) -> list[dict[str, Any]]:
        """As json(), for a list of objects."""
        value = self._value()
        if not isinstance(value, list) or any(
            not isinstance(item, dict) or key not in item for item in value for key in keys
        ):
            raise self._strange()
        return value

    def _value(self) -> Any:
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise self._strange() from None

    @staticmethod
    def _strange() -> CommandError:
        return CommandError(
            "what answers there is not Load Manager: check the address (--url, LOADMANAGER_URL)",
            EXIT_UNREACHABLE,
        )


class ApiClient:
    """Requests to a running Load Manager, over one connection that is kept. Not for several threads."""

    CONNECT_S = 5.0
    ANSWER_S = 20.0
    LOCUST_ANSWER_S = 150.0  # a create or a stop waits for Locust

    def __init__(self, server: ServerAddress):
        self._server = server
        self._token = server.token
        parts = urlsplit(server.url)
        self._is_https = parts.scheme == "https"
        self._host, self._port, self._prefix = parts.hostname or "", parts.port, parts.path
        self._connection: http.client.HTTPConnection | None = None
        self.clock_offset_s = 0.0  # the server's clock minus ours

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, path: str, **query: Any) -> ApiAnswer:
        """The answer to a GET; parameters that are None are left out."""
        given = {name: value for name, value in query.items() if value is not None}
        return self.request("GET", path + ("?" + urlencode(given) if given else ""))

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> ApiAnswer:
        """A good answer; ServerGone without one, ServerRefused for one that is an error.

        What changes something is sent on a new connection: on a kept one that the server
        just closed nobody could tell whether it was carried out."""
        if method != "GET":
            self.close()
        is_kept = self._connection is not None
        try:
            answer = self._exchange(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            was_connected = self._connection is not None
            self.close()
            if is_kept and not isinstance(error, TimeoutError):
                return self.request(method, path, body, headers)
            raise ServerGone(f"{self._server.url} {_client_words(error)}", was_connected) from None
        except BaseException:  # Ctrl-C in the middle of an answer: the rest must not be read as another's
            self.close()
            raise
        if answer.http_status == 401 and self._has_new_token():
            return self.request(method, path, body, headers)
        if answer.http_status >= 300:
            raise self._refusal(f"{method} {path.partition('?')[0]}", answer)
        return answer

    def _has_new_token(self) -> bool:
        """Whether the token command printed another token than the one that was refused."""
        if self._server.token_command is None:
            return False
        before, self._token = self._token, token_of_command(self._server.token_command)
        return self._token != before

    def _exchange(self, method: str, path: str, body: Any, headers: dict[str, str] | None) -> ApiAnswer:
        connection = self._connect()
        sent = {"Accept": "*/*", "User-Agent": f"loadmanager/{VERSION}", **(headers or {})}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            sent["Content-Type"] = JSON_TYPE
        connection.sock.settimeout(self.ANSWER_S if method == "GET" else self.LOCUST_ANSWER_S)
        connection.request(
            method, self._prefix + path, None if body is None else dump_json(body).encode(), sent
        )
        response = connection.getresponse()
        answer = ApiAnswer(response.status, response.headers, response.read())
        if response.will_close:
            self.close()
        self._note_clock(response.headers.get("Date"))
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is None:
            if self._is_https:
                context = self._tls_context()
                connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=self.CONNECT_S, context=context
                )
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=self.CONNECT_S)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection = connection
        return self._connection

    def _tls_context(self) -> Any:
        import ssl

        try:
            context = ssl.create_default_context(cafile=self._server.ca_file)
        except OSError as error:
            why = error.strerror or error
            raise CommandError(
                f"--ca-file: {self._server.ca_file} has no certificates: {why}", EXIT_USAGE
            ) from None
        own = os.environ.get("LOADMANAGER_CLIENT_CERT")
        try:
            if own:
                context.load_cert_chain(own, password=lambda: "")
        except (OSError, ValueError) as error:
            raise CommandError(
                f"LOADMANAGER_CLIENT_CERT: {own} has no certificate with its key: {getattr(error, 'strerror', None) or error}",
                EXIT_USAGE,
            ) from None
        return context

    def _note_clock(self, date: str | None) -> None:
        """How far our clocks are apart: moments of the server are shown as ages."""
        import email.utils

        try:
            offset_s = email.utils.parsedate_to_datetime(date or "").timestamp() + 0.5 - time.time()
        except (ValueError, TypeError):
            return
        self.clock_offset_s = offset_s if abs(offset_s) > 2 else 0.0  # the header has whole seconds

    def _refusal(self, asked: str, answer: ApiAnswer) -> CommandError:
        try:
            document = json.loads(answer.body)
            message = one_line(document["message"])
        except (ValueError, TypeError, KeyError, RecursionError):
            where = one_line(self._server.url)
            return CommandError(
                f"{where} answered {asked} with HTTP {answer.http_status}, not as Load Manager does; is it its address?",
                EXIT_UNREACHABLE,
            )
        if answer.http_status == 404 and message == NO_SUCH_PATH:
            message = f"the server does not offer this ({asked}): it may be an older Load Manager"
        elif answer.http_status == 401:
            was = "the token was refused" if self._token else "no token was sent"
            message = f"not allowed, {was}; give one with --token-file, --token, LOADMANAGER_TOKEN or a configuration (-config)"
        elif answer.http_status == 403:
            message = f"not allowed: {message}"
        return ServerRefused(message, answer.http_status, document)


def _client_words(error: Exception) -> str:
    """What happened to a request of ours, and what to do."""
    if isinstance(error, TimeoutError):
        return "did not answer in time; is the address right, and the server well?"
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection: is Load Manager running there? (--url, LOADMANAGER_URL)"
    if isinstance(error, socket.gaierror):
        return f"cannot be found: {error.strerror}; check the host name (--url, LOADMANAGER_URL)"
    return f"cannot be reached: {one_line(_network_words(error))}"


# ============================================================================
# 25. COMMAND LINE - commands, what they take, and what they print
# ============================================================================
# Each command is a line of COMMANDS: help, completion and the README come from it. With
# --json the API's JSON is all that goes to stdout; notices and errors go to stderr.

PROGRAM = "loadmanager.py"
EXITS = {
    EXIT_DONE: "done; the run passed",
    EXIT_FAILED: "the run failed, or the server could not do what was asked",
    EXIT_USAGE: "usage or configuration: nothing was started",
    EXIT_UNREACHABLE: "the server cannot be reached, or does not allow it",
    EXIT_THRESHOLDS: "thresholds failed, a regression, or numbers that cannot be trusted (--require-trusted)",
    EXIT_INTERRUPTED: "Ctrl-C; `run` and `rerun` have asked the server to stop the run",
}
VARIABLES = {
    "LOADMANAGER_URL": "the server; --url goes first, then this, then a configuration file",
    "LOADMANAGER_TOKEN": "the API token; --token and --token-file go first",
    "LOADMANAGER_TOKEN_COMMAND": "a program and its arguments that prints the token; run again when the token is refused; without a shell",
    "LOADMANAGER_CLIENT_CERT": "our certificate and its key in one file, for a server that wants one",
    "LOADMANAGER_CA_FILE": "certificates to trust for an https server; --ca-file goes first",
    "NO_COLOR": "set to anything: no colours",
}
LATEST = "latest"
MIN_PREFIX = 6  # characters of a run's id
RUN_KEYS = (
    "id",
    "status",
    "tenantId",
    "envId",
    "scenarioId",
    "locustClusterId",
    "targetUsers",
    "spawnRate",
    "createdAt",
)
FINAL_WORDS = tuple(status.value for status in FINAL)
FOLLOW_S = 0.5  # between two looks at a run
MAX_ENDPOINTS = 100  # rows of a summary; --json and reports have all
STOP_PATIENCE_S = 90.0  # how long a starting run is asked to stop


def say(text: str) -> None:
    """One line to stderr."""
    try:
        print(f"loadmanager: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads it


# ---- values as people write them -------------------------------------------


def duration_value(text: str) -> int:
    """Seconds of `90s`, `5m`, `1h30m`, `2d` or `90`."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    if not re.fullmatch("([0-9]{1,9}d)?([0-9]{1,9}h)?([0-9]{1,9}m)?([0-9]{1,9}s)?", text) or not text:
        raise ValueError("a duration such as 90s, 5m or 1h30m")
    return sum(int(number) * units[unit] for number, unit in re.findall("([0-9]+)([dhms])", text))


def count_value(text: str) -> int:
    """A count written as `1000`, `1_000`, `1k` or `1.5k`."""
    match = re.fullmatch(r"([0-9]{1,3}(?:[_,][0-9]{3})+|[0-9]{1,12}(?:\.[0-9]{1,6})?)([kKM]?)", text)
    number = (
        float(re.sub("[_,]", "", match.group(1)))
        * {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}[match.group(2)]
        if match
        else 0.5
    )
    if number != int(number):
        raise ValueError("a whole number such as 1000, 1_000 or 1k")
    return int(number)


def rate_value(text: str) -> float:
    """Users per second, written as `10`, `0.5` or `10/s`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(?:/s)?", text)
    if not match:
        raise ValueError("users per second, such as 10 or 0.5")
    return float(match.group(1))


def metadata_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError("name=value")
    return name, value


def stage_value(text: str) -> dict[str, Any]:
    """A stage written as USERS:RATE:TIME."""
    parts = text.split(":")
    if len(parts) != 3:
        raise ValueError("users, users per second and a time, such as 50:5:60s")
    return {
        "targetUsers": count_value(parts[0]),
        "spawnRate": rate_value(parts[1]),
        "durationSeconds": duration_value(parts[2]),
    }


def key_value(text: str) -> str:
    if not re.fullmatch("[!-~]{1,255}", text):
        raise ValueError("1 to 255 printable ASCII characters")
    return text


def run_value(text: str) -> str:
    if text != LATEST and len(text) < MIN_PREFIX:
        raise ValueError(f"a run's id, at least its first {MIN_PREFIX} characters, or {LATEST}")
    return text


# ---- commands without a server ---------------------------------------------


def command_serve(options: Any) -> int:
    return serve(options.config or DEFAULT_CONFIG)


def command_check(options: Any) -> int:
    return check_config(options.config or DEFAULT_CONFIG)


def command_completion(options: Any) -> int:
    print(completion_script(options.shell), end="")
    return EXIT_DONE


# ---- asking the server -----------------------------------------------------


def open_client(options: Any) -> ApiClient:
    return ApiClient(find_server(options, dict(os.environ)))


def open_screen(options: Any) -> Screen:
    """Where a command's text goes: with --json to stderr, as stdout is for the JSON alone."""
    return Screen(sys.stderr if options.json else sys.stdout, dict(os.environ))


def print_json(data: bytes) -> None:
    Screen(sys.stdout, dict(os.environ)).json(data)


def run_path(run_id: str, rest: str = "") -> str:
    return f"/v1/tests/{quote(run_id, safe='')}{rest}"


def find_run(client: ApiClient, text: str) -> str:
    """The full id of a run given as an id, the beginning of one, or `latest`."""
    if text == LATEST:
        runs = client.get("/v1/tests", limit=1, brief="true").json_list(*RUN_KEYS)
        if not runs:
            raise CommandError("there is no run yet", EXIT_USAGE)
        return runs[0]["id"]
    if len(text) >= 36:
        return text
    found = client.get("/v1/tests", search=text, limit=1000, brief="true").json_list(*RUN_KEYS)
    ids = [run["id"] for run in found if run["id"].startswith(text.lower())]
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise CommandError(
            f"there is no run whose id begins with {printable(text)}; see `{PROGRAM} list`", EXIT_USAGE
        )
    raise CommandError(
        f"{printable(text)} begins {len(ids)} ids: {', '.join(ids[:5])}; give more of it", EXIT_USAGE
    )


def command_list(options: Any) -> int:
    client = open_client(options)
    query = {
        "tenantId": options.tenant,
        "envId": options.env,
        "status": options.status,
        "search": options.search,
    }
    answer = client.get("/v1/tests", **query, limit=options.limit, brief=None if options.json else "true")
    if options.json:
        print_json(answer.body)
        return EXIT_DONE
    screen = open_screen(options)
    runs = answer.json_list(*RUN_KEYS)
    now = time.time() + client.clock_offset_s
    screen.print(
        *paint_head(screen, table(LIST_COLUMNS, [list_row(run, now) for run in runs], screen.columns))
    )
    if "next" in (answer.headers.get("Link") or ""):
        say(
            "there are more: give a larger --limit, at most 1000, or say which with --search, --status, --tenant, --env"
        )
    return EXIT_DONE


def command_show(options: Any) -> int:
    client = open_client(options)
    answer = client.get(run_path(find_run(client, options.run)))
    if options.json:
        print_json(answer.body)
    else:
        screen = open_screen(options)
        run = with_peak_users(client, answer.json(*RUN_KEYS))
        screen.print(*run_lines(run, screen, time.time() + client.clock_offset_s))
    return EXIT_DONE


def with_peak_users(client: ApiClient, run: dict[str, Any]) -> dict[str, Any]:
    """A final run with `peakUsers`, the most users of its samples; as it is where they cannot be read."""
    if run["status"] not in FINAL_WORDS:
        return run
    try:
        points = client.get(run_path(run["id"], "/metrics"), maxPoints=500).json("points")["points"]
    except CommandError:
        return run
    known = [point["currentUsers"] for point in points if point.get("currentUsers") is not None]
    return {**run, "peakUsers": max(known, default=None)}


def command_clusters(options: Any) -> int:
    answer = open_client(options).get("/v1/clusters")
    if options.json:
        print_json(answer.body)
        return EXIT_DONE
    screen = open_screen(options)
    screen.print(
        *paint_head(
            screen,
            table(
                CLUSTER_COLUMNS,
                [cluster_row(cluster) for cluster in answer.json_list("id", "workers")],
                screen.columns,
            ),
        )
    )
    return EXIT_DONE


SCENARIO_COLUMNS = (
    Column("SCENARIO"),
    Column("USERS", right=True),
    Column("TIME", right=True),
    Column("HOST", drop=2),
    Column("DESCRIPTION", drop=1),
)


def scenario_row(scenario: dict[str, Any]) -> list[str]:
    stages = scenario.get("stages") or [scenario]
    users = [stage["targetUsers"] for stage in stages if stage.get("targetUsers")]
    seconds = sum(stage.get("durationSeconds") or 0 for stage in stages)
    shown = [
        scenario["id"],
        str(max(users)) if users else "",
        clock_words(seconds) if seconds else "",
        scenario.get("host", ""),
        scenario.get("description", ""),
    ]
    return [printable(value) for value in shown]


def command_scenarios(options: Any) -> int:
    answer = open_client(options).get("/v1/scenarios")
    if options.json:
        print_json(answer.body)
        return EXIT_DONE
    screen = open_screen(options)
    screen.print(
        *paint_head(
            screen,
            table(
                SCENARIO_COLUMNS,
                [scenario_row(scenario) for scenario in answer.json_list("id")],
                screen.columns,
            ),
        )
    )
    return EXIT_DONE


def command_users(options: Any) -> int:
    client = open_client(options)
    run_id = find_run(client, options.run)
    body = {"targetUsers": options.users, "spawnRate": options.spawn_rate}
    answer = client.request(
        "POST", run_path(run_id, "/users"), {name: value for name, value in body.items() if value is not None}
    )
    return tell_done(options, answer, f"run {run_id} goes to {options.users} users")


SCHEDULE_COLUMNS = (
    Column("SCHEDULE"), Column("WHEN"), Column("NEXT"), Column("SCENARIO"), Column("TENANT/ENV", drop=2), Column("LAST", drop=1),
)  # fmt: skip


def schedule_row(schedule: dict[str, Any]) -> list[str]:
    when = f"{schedule['cron']} {schedule['timezone']}" if schedule.get("cron") else schedule.get("runAt", "")
    coming = "paused" if schedule["paused"] else (schedule["next"] or ["never again"])[0]
    place = f"{schedule['tenantId']}/{schedule['envId']}"
    return [
        printable(value)
        for value in (
            schedule["id"],
            when,
            coming,
            schedule["test"].get("scenarioId"),
            place,
            schedule.get("lastOutcome", ""),
        )
    ]


def command_schedules(options: Any) -> int:
    client = open_client(options)
    if options.action == "list":
        answer = client.get("/v1/schedules")
        if options.json:
            print_json(answer.body)
        else:
            screen = open_screen(options)
            rows = [schedule_row(schedule) for schedule in answer.json_list("id", "next", "test", "paused")]
            screen.print(*paint_head(screen, table(SCHEDULE_COLUMNS, rows, screen.columns)))
        return EXIT_DONE
    if options.action == "create":
        answer = client.request("POST", "/v1/schedules", schedule_body(options))
        return tell_done(options, answer, f"schedule {answer.json('id')['id']} is created")
    if not options.schedule:
        raise CommandError(f"schedules {options.action}: say which; see `{PROGRAM} schedules`", EXIT_USAGE)
    path = f"/v1/schedules/{quote(options.schedule, safe='')}"
    if options.action in ("pause", "resume"):
        return tell_done(
            options,
            client.request("PATCH", path, {"paused": options.action == "pause"}),
            f"schedule {options.schedule}: {options.action}d",
        )
    if options.action == "delete":
        return tell_done(options, client.request("DELETE", path), f"schedule {options.schedule} is deleted")
    answer = client.request("POST", f"{path}/run")
    return tell_done(options, answer, started_line(answer.json(*RUN_KEYS)))


def schedule_body(options: Any) -> dict[str, Any]:
    test = {
        "tenantId": options.tenant, "envId": options.env, "scenarioId": options.scenario, "targetUsers": options.users,
        "spawnRate": options.spawn_rate, "durationSeconds": options.duration, "thresholds": options.threshold or None,
    }  # fmt: skip
    body = {
        "cron": options.cron, "timezone": options.timezone, "runAt": options.at, "concurrencyPolicy": options.policy, "description": options.description,
        "test": {name: value for name, value in test.items() if value is not None},
    }  # fmt: skip
    return {name: value for name, value in body.items() if value is not None}


def cluster_path(cluster_id: str, what: str) -> str:
    return f"/v1/clusters/{quote(cluster_id, safe='')}/{what}"


def command_scale(options: Any) -> int:
    answer = open_client(options).request(
        "POST", cluster_path(options.cluster, "scale"), {"workers": options.workers}
    )
    return tell_done(options, answer, f"cluster {options.cluster} goes to {options.workers} workers")


def command_logs(options: Any) -> int:
    answer = open_client(options).get(cluster_path(options.cluster, "logs"), lines=options.lines)
    if options.json:
        print_json(answer.body)
        return EXIT_DONE
    screen = open_screen(options)
    for log_ in answer.json("logs")["logs"]:
        screen.print(f"---- {printable(log_['process'])}", *(printable(line) for line in log_["lines"]))
    return EXIT_DONE


def command_stop(options: Any) -> int:
    if (options.run is None) != options.all:
        raise CommandError("allowed is a RUN or --all", EXIT_USAGE)
    client = open_client(options)
    if options.all:
        return stop_all(options, client)
    run_id = find_run(client, options.run)
    answer = client.request("POST", run_path(run_id, "/stop"))
    return tell_done(options, answer, f"run {run_id} is stopped")


def stop_all(options: Any, client: ApiClient) -> int:
    """Stop every run that the token may touch; EXIT_FAILED when one goes on."""
    answer = client.request("POST", "/v1/stop-all", {})
    outcome = answer.json("stopped", "failed")
    tell_done(
        options,
        answer,
        f"{len(outcome['stopped'])} stopped" + "".join(f"\n  {run_id}" for run_id in outcome["stopped"]),
    )
    for item in outcome["failed"]:
        say(f"run {item.get('runId')} goes on: {item.get('message')}")
    return EXIT_FAILED if outcome["failed"] else EXIT_DONE


def command_token(options: Any) -> int:
    """Print a new token, once, and the line of the configuration that knows its hash."""
    if not options.tenant and options.role != "admin":
        raise CommandError("--tenant: is missing; allowed is a tenant, or * for all", EXIT_USAGE)
    token = "lm_" + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {
        "name": options.name,
        "tokenSha256": token_digest(token).hex(),
        "role": options.role,
    }
    if options.tenant:
        entry["tenants"] = options.tenant
    if options.env:
        entry["environments"] = options.env
    if options.expires_in:
        entry["expiresAt"] = utc_text(time.time() + options.expires_in)
    reader = _ConfigReader(".", {})
    reader.section(ApiTokenConfig, entry, "")
    if reader.problems:
        raise CommandError("; ".join(f"--{problem}" for problem in reader.problems), EXIT_USAGE)
    if options.json:
        print_json(dump_json({"token": token, "entry": entry}).encode())
        return EXIT_DONE
    line = json.dumps(entry, ensure_ascii=False)  # YAML takes JSON as it is
    say("this is the only time that the token is shown; below it, the line for security.apiTokens")
    print(f"{token}\n- {line}")
    return EXIT_DONE


def command_delete(options: Any) -> int:
    client = open_client(options)
    run_id = find_run(client, options.run)
    return tell_done(options, client.request("DELETE", run_path(run_id)), f"run {run_id} is deleted")


def tell_done(options: Any, answer: ApiAnswer, sentence: str) -> int:
    """Done, and said: the API's JSON where it is asked for and there is any."""
    if not options.json:
        open_screen(options).print(sentence)
    elif answer.body:
        print_json(answer.body)
    return EXIT_DONE


def command_metrics(options: Any) -> int:
    query = {"from": options.since, "to": options.until, "step": options.step}
    if options.csv and any(value is not None for value in query.values()):
        raise CommandError(
            "--csv has all points; --from, --to and --step are for the table and for --json", EXIT_USAGE
        )
    check_can_write(options.output)
    client = open_client(options)
    run_id = find_run(client, options.run)
    if options.csv:
        return put_document(client.get(run_path(run_id, "/metrics.csv")).body, options.output)
    answer = client.get(run_path(run_id, "/metrics"), **query, maxPoints=options.max_points)
    if options.output:
        return put_document(answer.body, options.output)
    if options.json:
        print_json(answer.body)
        return EXIT_DONE
    screen = open_screen(options)
    document = answer.json("points", "total", "downsampled")
    screen.print(
        *paint_head(
            screen,
            table(METRICS_COLUMNS, [metrics_row(point) for point in document["points"]], screen.columns),
        )
    )
    if document["downsampled"]:
        say(
            f"{len(document['points'])} of {document['total']} points; --max-points shows more, --json and --csv have all figures"
        )
    return EXIT_DONE


REPORT_PATHS = {
    "html": "/report.html",
    "md": "/report.md",
    "csv": "/requests.csv",
    "locust": "/locust-report.html",
    "junit": "/junit.xml",
    "summary": "/summary.md",
}


def command_report(options: Any) -> int:
    if (
        options.format in ("html", "locust")
        and options.output is None
        and _is_terminal(sys.stdout, dict(os.environ))
    ):
        raise CommandError("a terminal cannot show an HTML report; name a file: -o report.html", EXIT_USAGE)
    check_can_write(options.output)
    client = open_client(options)
    run_id = find_run(client, options.run)
    return put_document(client.get(run_path(run_id, REPORT_PATHS[options.format])).body, options.output)


def command_export(options: Any) -> int:
    check_can_write(options.output)
    client = open_client(options)
    run_id = find_run(client, options.run)
    return put_document(client.get(run_path(run_id, "/export")).body, options.output)


def command_import(options: Any) -> int:
    body = import_body(options)
    answer = open_client(options).request("POST", "/v1/tests/import", body)
    if options.json:
        print_json(answer.body)
        return EXIT_DONE
    run = answer.json(*RUN_KEYS)
    open_screen(options).print(f"run {run['id']} of {run['scenarioId']} is imported")
    return EXIT_DONE


def import_body(options: Any) -> dict[str, Any]:
    """What is sent of a file: an export as it is, files of Locust with what the options say."""
    given = {"tenantId": options.tenant, "envId": options.env, "scenarioId": options.scenario}
    if options.file.endswith("_stats.csv"):
        start = options.file.removesuffix("_stats.csv")
        others = {
            name: read_text(f"{start}_{suffix}.csv")
            for name, suffix in CSV_FILES.items()
            if os.path.isfile(f"{start}_{suffix}.csv")
        }
        return {"format": LOCUST_CSV, **_needed(given), "stats": read_text(options.file), **others}
    try:
        document = json.loads(read_text(options.file))
    except (ValueError, RecursionError):
        raise CommandError(
            f"{options.file} is neither JSON nor named ..._stats.csv; allowed is an export, or a file of Locust's --json-file or --csv",
            EXIT_USAGE,
        ) from None
    if isinstance(document, list):
        return {"format": LOCUST_JSON, **_needed(given), "stats": document}
    if isinstance(document, dict) and not any(given.values()):
        return document
    raise CommandError(
        "--tenant, --env and --scenario are for files of Locust; an export has its own", EXIT_USAGE
    )


CSV_FILES = {
    "history": "stats_history",
    "failures": "failures",
    "exceptions": "exceptions",
}  # beside _stats.csv


def _needed(given: dict[str, str | None]) -> dict[str, str | None]:
    if not all(given.values()):
        raise CommandError(
            "a file of Locust does not say whose run it was: give --tenant, --env and --scenario", EXIT_USAGE
        )
    return given


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", EXIT_USAGE
        ) from None


def put_document(data: bytes, path: str | None) -> int:
    """A document into a file, or to stdout."""
    if path is None or path == "-":
        Screen(sys.stdout, dict(os.environ)).raw(data)
        return EXIT_DONE
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}", EXIT_USAGE) from None
    say(f"{path} written, {len(data):,} bytes")
    return EXIT_DONE


def check_can_write(*paths: str | None) -> None:
    """CommandError for a file that could not be written later: better now than after the run."""
    for path in paths:
        if path is None or path == "-":
            continue
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise CommandError(f"{path} cannot be written: no such folder, or not allowed", EXIT_USAGE)


def command_compare(options: Any) -> int:
    client = open_client(options)
    baseline, candidate = find_run(client, options.baseline), find_run(client, options.candidate)
    try:
        answer = client.get(
            "/v1/tests/compare", baseline=baseline, candidate=candidate, tolerance=options.tolerance
        )
    except ServerRefused as error:
        if error.http_status == 404 and (
            "no run compare" in error.message or "does not offer" in error.message
        ):
            raise CommandError(
                "the server does not offer comparisons: it may be an older Load Manager", EXIT_USAGE
            ) from None
        raise
    comparison = answer.json("regressions")
    if options.json:
        print_json(answer.body)
    else:
        screen = open_screen(options)
        screen.print(*comparison_lines(comparison, screen))
    return EXIT_THRESHOLDS if comparison["regressions"] and options.fail_on_regression else EXIT_DONE


# ---- starting and following runs -------------------------------------------


class CtrlC:
    """Ctrl-C and SIGTERM of a command that starts a run. While `held`, the first one waits:
    a run whose id has not come yet could be stopped by nobody. The second always raises."""

    def __init__(self) -> None:
        self.count = 0
        self.held = True

    def __enter__(self) -> CtrlC:
        # What was started with a signal ignored, as shells do in the background, goes on ignoring it.
        heeded = [
            number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN
        ]
        self._before = [(number, signal.signal(number, self._handle)) for number in heeded]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1
        if not self.held or self.count > 1:
            raise KeyboardInterrupt
        os.write(
            2, b"loadmanager: the run is stopped as soon as it has started; Ctrl-C again leaves at once\n"
        )

    def release(self) -> None:
        """From now on the first one raises too; it does so here if it came before."""
        self.held = False
        if self.count:
            raise KeyboardInterrupt


class Follower:
    """Follows one run until it is over, and shows it. A server that goes away is asked again
    for `patience_s`: the run goes on without it."""

    def __init__(self, client: ApiClient, run_id: str, screen: Screen, options: Any):
        self._client = client
        self._run_id = run_id
        self._screen = screen
        self._quiet = options.quiet
        self._every_s = options.every
        self._patience_s = options.patience
        self._gone_since: float | None = None
        self._told_at = -math.inf
        self._told_status = ""
        self.answer: ApiAnswer | None = None  # the newest
        self.status = "started"

    def until_final(self) -> dict[str, Any]:
        """The run, once it is Finished or Failed; CommandError when the server stays away."""
        while True:
            run = self._look()
            if run is not None:
                self._show(run)
                if self.status in FINAL_WORDS:
                    return run
            time.sleep(FOLLOW_S)

    def _look(self) -> dict[str, Any] | None:
        """The run now; None while the server does not answer."""
        try:
            self.answer = self._client.get(run_path(self._run_id))
            run = self.answer.json(*RUN_KEYS)
        except CommandError as error:
            if isinstance(error, ServerRefused) and error.http_status == 404:
                raise CommandError(
                    f"{error.message}; it was {self.status} when last seen", EXIT_FAILED
                ) from None
            if isinstance(error, ServerRefused) and error.http_status in (401, 403):
                raise CommandError(f"{error.message}; {self.whereabouts()}", error.exit_status) from None
            self._missed(error)
            return None
        if self._gone_since is not None:
            self._gone_since = None
            self.notice("the server answers again")
        self.status = run["status"]
        return run

    def _missed(self, error: CommandError) -> None:
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
            self.notice(f"{error.message}; the run goes on, trying again for {clock_words(self._patience_s)}")
        if now - self._gone_since >= self._patience_s:
            raise CommandError(
                f"{error.message}; gave up after {clock_words(now - self._gone_since)}; {self.whereabouts()}",
                EXIT_UNREACHABLE,
            )

    def whereabouts(self) -> str:
        """What is known of the run, and what somebody who leaves can do."""
        if self.status in FINAL_WORDS:
            return f"run {self._run_id} is {self.status}"
        return f"run {self._run_id} is still {self.status}; stop it with: {PROGRAM} stop {self._run_id}"

    def notice(self, text: str) -> None:
        if self._screen.is_terminal:
            self._screen.draw([])
        say(text)

    def _show(self, run: dict[str, Any]) -> None:
        now = time.time() + self._client.clock_offset_s
        if self._quiet:
            return
        if self._screen.is_terminal:
            if self.status in FINAL_WORDS:
                self._screen.draw([])  # the summary takes its place
            else:
                columns, rows = self._screen.size
                self._screen.draw(live_lines(run, self._screen, now, columns - 1, rows - 1))
        elif time.monotonic() - self._told_at >= self._every_s or self.status != self._told_status:
            self._told_at, self._told_status = time.monotonic(), self.status
            self._screen.print(plain_line(run, now))


def command_run(options: Any) -> int:
    check_start(options)
    client = open_client(options)
    body = create_body(options)
    key = options.idempotency_key or secrets.token_hex(16)

    return start_and_follow(options, client, lambda: create_once_for_all(client, body, key))


def create_once_for_all(client: ApiClient, body: dict[str, Any], key: str) -> ApiAnswer:
    """Create a run. When the answer is lost it is asked for again: with the same
    Idempotency-Key the same run is answered, not a second one."""
    for seconds in (0.5, 1.5, 0.0):
        try:
            return client.request("POST", "/v1/tests", body, {"Idempotency-Key": key})
        except ServerGone as error:
            if seconds == 0.5 and not error.maybe_taken:
                raise
            last = error
        time.sleep(seconds)
    raise CommandError(
        f"{last.message}; the run may have been started: see `{PROGRAM} list`", EXIT_UNREACHABLE
    )


def create_body(options: Any) -> dict[str, Any]:
    metadata, custom = dict(options.meta), dict(options.option)
    for name, pairs, given in (("--meta", metadata, options.meta), ("--option", custom, options.option)):
        if len(pairs) < len(given):
            raise CommandError(f"{name}: a name stands twice; allowed is each once", EXIT_USAGE)
    body = {
        "tenantId": options.tenant,
        "envId": options.env,
        "scenarioId": options.scenario,
        "targetUsers": options.users,
        "spawnRate": options.spawn_rate,
        "durationSeconds": options.duration,
        "metadata": metadata or None,
        "thresholds": options.threshold or None,
        "compareWith": options.compare_with or ("baseline" if options.fail_on_regression else None),
        "queue": options.queue or None,
        "host": options.host,
        "confirm": options.confirm,
        "userClasses": options.user_class or None,
        "tags": options.tag or None,
        "excludeTags": options.exclude_tag or None,
        "options": custom or None,
        "stages": options.stage or None,
    }
    return {name: value for name, value in body.items() if value is not None}


def check_start(options: Any) -> None:
    """CommandError for what could not be done when the run is over."""
    if options.detach and (options.junit or options.summary or options.require_trusted):
        raise CommandError(
            "--detach does not wait for the end; give --junit, --summary and --require-trusted to `wait`",
            EXIT_USAGE,
        )
    check_can_write(options.junit, options.summary)


def command_rerun(options: Any) -> int:
    check_start(options)
    client = open_client(options)
    run_id = find_run(client, options.run)
    body = {
        **({"queue": True} if options.queue else {}),
        **({"confirm": options.confirm} if options.confirm else {}),
    }
    return start_and_follow(options, client, lambda: client.request("POST", run_path(run_id, "/rerun"), body))


def start_and_follow(options: Any, client: ApiClient, start: Callable[[], ApiAnswer]) -> int:
    """Start a run, follow it unless --detach, and tell how it ended; the exit status."""
    screen = open_screen(options)
    with CtrlC() as ctrl_c:
        try:
            answer = start()
        except ServerRefused as error:
            raise refused_start(error) from None
        except KeyboardInterrupt:
            say(f"left while the run was starting: it may run; see `{PROGRAM} list`")
            return EXIT_INTERRUPTED
        run = answer.json(*RUN_KEYS)
        follower = Follower(client, run["id"], screen, options)
        follower.status = run["status"]
        try:
            ctrl_c.release()
            if options.detach:
                return tell_done(options, answer, started_line(run))
            if not options.quiet:
                screen.print(started_line(run))
            return tell_end(options, client, screen, follower.until_final(), follower.answer)
        except KeyboardInterrupt:
            return stop_and_wait(options, client, screen, follower, run["id"])


def refused_start(error: ServerRefused) -> CommandError:
    """The refusal of a start, with what to do about it."""
    message = error.message
    active = error.document.get("activeRunId")
    if active:
        message += f"; wait for it with --queue, or stop it: {PROGRAM} stop {one_line(active)}"
    kept = error.document.get("runId")
    if kept and str(kept) not in message:
        message += f"; kept as failed run {one_line(kept)}"
    return CommandError(message, error.exit_status)


def stop_and_wait(options: Any, client: ApiClient, screen: Screen, follower: Follower, run_id: str) -> int:
    """After Ctrl-C: the run is stopped, and its end waited for; the second one leaves at once."""
    try:
        follower.notice(f"stopping run {run_id}; Ctrl-C again leaves at once")
        ask_to_stop(client, run_id)
        run = follower.until_final()
        tell_end(options, client, screen, run, follower.answer)
    except KeyboardInterrupt:
        client.close()
        follower.notice(f"left; {follower.whereabouts()}")
    return EXIT_INTERRUPTED


def ask_to_stop(client: ApiClient, run_id: str) -> None:
    """Have the server stop a run; returns when it does, or the run is over by itself."""
    give_up_at, told = time.monotonic() + STOP_PATIENCE_S, False
    while True:
        try:
            client.request("POST", run_path(run_id, "/stop"))
            return
        except ServerRefused as error:
            if error.http_status in (502, 504):
                say(error.message)  # the server goes on trying
                return
            starting = error.http_status == 409 and error.document.get("status") == RunStatus.PENDING.value
            if error.http_status == 409 and not starting:
                return  # somebody else was first
            if not starting and error.http_status != 503 or time.monotonic() > give_up_at:
                raise
        except ServerGone as error:
            if time.monotonic() > give_up_at:
                raise CommandError(
                    f"{error.message}; run {run_id} could not be stopped and may go on", EXIT_UNREACHABLE
                ) from None
            if not told:
                say(f"{error.message}; trying to stop the run for {clock_words(STOP_PATIENCE_S)}")
            told = True
        time.sleep(0.5)


def tell_end(
    options: Any, client: ApiClient, screen: Screen, run: dict[str, Any], answer: ApiAnswer | None
) -> int:
    """Tell how a run ended, write the files that were asked for; the exit status."""
    if options.json and answer is not None:
        print_json(answer.body)
    elif options.quiet:
        screen.print(end_line(run))
    else:
        shown = with_peak_users(client, run)
        screen.print(*run_lines(shown, screen, time.time() + client.clock_offset_s))
    exit_status, why = judge(run, options.require_trusted)
    if why:
        say(why)
    for path, document in ((options.junit, "/junit.xml"), (options.summary, "/summary.md")):
        if path is None:
            continue
        try:
            put_document(client.get(run_path(run["id"], document)).body, path)
        except CommandError as error:
            say(f"{path} was not written: {error.message}")
            exit_status = exit_status or error.exit_status
    return exit_status


def judge(run: dict[str, Any], require_trusted: bool) -> tuple[int, str]:
    """The exit status a run that is over deserves, and why it is not 0."""
    if run["status"] == RunStatus.FAILED.value:
        return EXIT_FAILED, f"the run failed: {one_line(run.get('failureReason') or 'no reason is known')}"
    if run.get("verdict") == "failed":
        failed = [threshold_words(entry) for entry in run.get("thresholds") or () if threshold_failed(entry)]
        worse = (run.get("comparison") or {}).get("regressions") or ()
        words = ["thresholds failed: " + "; ".join(failed)] if failed else []
        words += ["got worse: " + "; ".join(map(one_line, worse))] if worse else []
        return EXIT_THRESHOLDS, "; ".join(words) or "the verdict is failed"
    if require_trusted and "trust" not in run:
        return (
            EXIT_USAGE,
            "--require-trusted: the server does not offer this: it may be an older Load Manager",
        )
    if require_trusted and run["trust"] != "ok":
        reasons = "; ".join(one_line(warning["message"]) for warning in run.get("warnings") or ())
        return EXIT_THRESHOLDS, f"the numbers cannot be trusted: {reasons}"
    return EXIT_DONE, ""


def command_watch(options: Any) -> int:
    return follow_only(options, quiet=False)


def command_wait(options: Any) -> int:
    return follow_only(options, quiet=True)


def follow_only(options: Any, quiet: bool) -> int:
    """Follow a run that is there; Ctrl-C leaves it running."""
    options.quiet = quiet
    check_can_write(options.junit, options.summary)
    client, screen = open_client(options), open_screen(options)
    follower = Follower(client, find_run(client, options.run), screen, options)
    try:
        return tell_end(options, client, screen, follower.until_final(), follower.answer)
    except KeyboardInterrupt:
        follower.notice(f"left; {follower.whereabouts()}")
        return EXIT_INTERRUPTED


# ---- what a run looks like -------------------------------------------------

STATUS_COLOURS = {
    "Pending": "blue",
    "Running": "green",
    "Stopping": "orange",
    "Finished": "bold",
    "Failed": "red",
}
LIST_COLUMNS = (
    Column("RUN", drop=0), Column("STATUS"), Column("SCENARIO"), Column("TENANT/ENV", drop=3), Column("CLUSTER", drop=6),
    Column("USERS", True, drop=2), Column("REQ/S", True, drop=4), Column("FAILURES", True, drop=5), Column("P95 MS", True, drop=4),
    Column("TIME", True, drop=1), Column("CREATED", True, drop=7),
)  # fmt: skip
CLUSTER_COLUMNS = (
    Column("CLUSTER"), Column("TENANT/ENV", drop=2), Column("STATE"), Column("USERS", True, drop=1), Column("WORKERS", True, drop=1),
    Column("CPU %", True, drop=3), Column("RUN"), Column("PROBLEM"),
)  # fmt: skip
METRICS_COLUMNS = (
    Column("TIME"), Column("USERS", True, 1), Column("REQ/S", True), Column("FAIL/S", True, 1), Column("REQUESTS", True, 4),
    Column("FAILURES", True, 4), Column("P50 MS", True, 2), Column("P95 MS", True), Column("P99 MS", True, 3),
)  # fmt: skip
# In the order of Locust's own page, which its users know.
ENDPOINT_COLUMNS = (
    Column("TYPE", drop=5), Column("NAME"), Column("REQUESTS", True), Column("FAILS", True, 1), Column("P50 MS", True, 3),
    Column("P95 MS", True, 2), Column("P99 MS", True, 4), Column("AVG MS", True, 6), Column("MIN MS", True, 7), Column("MAX MS", True, 7),
    Column("REQ/S", True, 3),
)  # fmt: skip


def paint_head(screen: Screen, lines: list[str]) -> list[str]:
    return [screen.paint(lines[0], "grey"), *lines[1:]]


def list_row(run: dict[str, Any], now: float) -> list[str]:
    metrics = run.get("lastMetrics") or {}
    return [
        run["id"][:8] if len(run["id"]) == 36 else printable(run["id"]),
        run["status"] + verdict_words(run),
        printable(run["scenarioId"]),
        printable(f"{run['tenantId']}/{run['envId']}"),
        printable(run["locustClusterId"] or "-"),
        users_words(run),
        decimal_text(metrics.get("totalRps")),
        count_text(metrics.get("totalFailures")),
        count_text(metrics.get("p95ResponseMs")),
        clock_words(elapsed_s(run, now)) if run.get("startedAt") else "-",
        local_moment(run["createdAt"]),
    ]


def verdict_words(run: dict[str, Any]) -> str:
    """`, passed` or `, failed, doubtful`: what is known of how good the run was."""
    words = [run["verdict"]] if run.get("verdict") else []
    words += ["doubtful"] if run.get("trust") == "doubtful" else []
    return "".join(f", {word}" for word in words)


def cluster_row(cluster: dict[str, Any]) -> list[str]:
    workers = cluster["workers"]
    cpu = [worker["cpuPercent"] for worker in workers if worker["cpuPercent"] is not None]
    return [
        printable(cluster["id"]),
        printable(f"{cluster['tenantId']}/{cluster['envId']}"),
        printable(cluster["state"]),
        count_text(cluster["userCount"]),
        count_text(len(workers)),
        count_text(max(cpu, default=None)),
        (cluster["activeRunId"] or "-")[:8],
        one_line(cluster["problem"] or "-"),
    ]


def metrics_row(point: dict[str, Any]) -> list[str]:
    names = (
        "currentUsers",
        "totalRps",
        "failuresPerSec",
        "totalRequests",
        "totalFailures",
        "p50ResponseMs",
        "p95ResponseMs",
        "p99ResponseMs",
    )
    figures = [
        decimal_text(point.get(name))
        if name in ("totalRps", "failuresPerSec")
        else count_text(point.get(name))
        for name in names
    ]
    return [local_moment(point["timestamp"]), *figures]


def endpoint_row(row: dict[str, Any]) -> list[str]:
    names = (
        "medianResponseTime",
        "p95ResponseTime",
        "p99ResponseTime",
        "avgResponseTime",
        "minResponseTime",
        "maxResponseTime",
    )
    return [
        one_line(row["method"]),
        one_line(row["name"]),
        count_text(row["numRequests"]),
        count_text(row["numFailures"]),
        *(count_text(row.get(name)) for name in names),
        decimal_text(row.get("requestsPerSec")),
    ]


def endpoint_lines(
    run: dict[str, Any], screen: Screen, columns: int | None, most: int | None = None
) -> list[str]:
    """The table of endpoints; of more than `most` those with the most requests."""
    rows = list(((run.get("lastMetrics") or {}).get("requestStats") or {}).values())
    if not rows:
        return []
    shown = (
        rows
        if most is None or len(rows) <= most
        else sorted(rows, key=lambda row: -(row["numRequests"] or 0))[: max(0, most - 1)]
    )
    lines = paint_head(screen, table(ENDPOINT_COLUMNS, [endpoint_row(row) for row in shown], columns))
    lines = [
        screen.paint(line, "red") if row is not None and row["numFailures"] else line
        for line, row in zip(lines, [None, *shown])
    ]
    return lines + ([f"… and {len(rows) - len(shown)} more endpoints"] if len(shown) < len(rows) else [])


def local_moment(text: str) -> str:
    """A moment of the API in local time, `11-23 14:05:09`."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(parse_utc(text)))


def elapsed_s(run: dict[str, Any], now: float) -> float:
    """Seconds since the run's start, of a final run its whole time."""
    if not run.get("startedAt"):
        return 0.0
    end = parse_utc(run["finishedAt"]) if run.get("finishedAt") else now
    return max(0.0, end - parse_utc(run["startedAt"]))


def latest_users(run: dict[str, Any]) -> int:
    """The users wanted now: those asked for, or those they were changed to last."""
    return ((run.get("usersChanges") or [run])[-1])["targetUsers"]


def figure_facts(run: dict[str, Any], screen: Screen) -> list[str]:
    """The newest figures in the colours of Locust's own page."""
    metrics = run.get("lastMetrics") or {}
    users = f"users {count_text(metrics.get('currentUsers'))}/{count_text(latest_users(run))}"
    if run["status"] in FINAL_WORDS:  # they are gone: those it had
        users = f"users {count_text(run.get('peakUsers'))} at most, of {users_words(run)}"
    failures = (
        f"failures {count_text(metrics.get('totalFailures'))} ({percent_text(metrics.get('errorRate'))})"
    )
    return [
        screen.paint(users, "blue"),
        f"requests {count_text(metrics.get('totalRequests'))}",
        screen.paint(f"{decimal_text(metrics.get('totalRps'))} req/s", "green"),
        screen.paint(failures, "red" if metrics.get("totalFailures") else ""),
        screen.paint(f"p50 {count_text(metrics.get('p50ResponseMs'))} ms", "orange"),
        screen.paint(f"p95 {count_text(metrics.get('p95ResponseMs'))} ms", "violet"),
        f"p99 {count_text(metrics.get('p99ResponseMs'))} ms",
    ]


def time_words(run: dict[str, Any], now: float) -> str:
    """`0:42 of 5:00`, or what the run waits for."""
    if run["status"] == RunStatus.PENDING.value:
        position = run.get("queuePosition")
        return f"waits in the queue, position {position}" if position else "is starting"
    of = f" of {clock_words(run['durationSeconds'])}" if run.get("durationSeconds") else ""
    return clock_words(elapsed_s(run, now)) + of


def run_title(run: dict[str, Any], screen: Screen) -> str:
    status = screen.paint(run["status"], STATUS_COLOURS.get(run["status"], ""))
    where = f" on {run['locustClusterId']}" if run["locustClusterId"] else ""
    return (
        f"{status}  {printable(run['scenarioId'])}  "
        + printable(f"{run['tenantId']}/{run['envId']}{where}")
        + f"  run {run['id'][:8]}"
    )


def live_lines(run: dict[str, Any], screen: Screen, now: float, columns: int, rows: int) -> list[str]:
    """What a terminal of this size shows of a run that goes on."""
    progress = time_words(run, now)
    if run.get("durationSeconds") and run.get("startedAt"):
        room = min(40, columns - columns_of(progress) - 2)
        bar = screen.bar(elapsed_s(run, now) / run["durationSeconds"], room) if room >= 5 else ""
        progress = f"{bar}  {progress}" if bar else progress
    lines = [run_title(run, screen), progress, *pack(figure_facts(run, screen), columns)]
    lines += [screen.paint(line, "orange") for line in warning_lines(run)[-3:]]
    lines += threshold_lines(run, screen)
    room_for_endpoints = rows - len(lines) - 2
    if room_for_endpoints >= 2:
        lines += ["", *endpoint_lines(run, screen, columns, room_for_endpoints)]
    return lines


def plain_line(run: dict[str, Any], now: float) -> str:
    """A run that goes on, in one line of a log."""
    metrics = run.get("lastMetrics") or {}
    start = f"{utc_text(now)[:19]}Z {run['status']} {time_words(run, now)}"
    if not metrics:
        return start
    return (
        f"{start} users {count_text(metrics.get('currentUsers'))}/{count_text(latest_users(run))} requests {count_text(metrics.get('totalRequests'))}"
        f" {decimal_text(metrics.get('totalRps'))} req/s failures {count_text(metrics.get('totalFailures'))} ({percent_text(metrics.get('errorRate'))})"
        f" p50 {count_text(metrics.get('p50ResponseMs'))} p95 {count_text(metrics.get('p95ResponseMs'))} p99 {count_text(metrics.get('p99ResponseMs'))} ms"
    )


def started_line(run: dict[str, Any]) -> str:
    where = printable(run["locustClusterId"])
    how = f"started on {where}" if run["status"] != RunStatus.PENDING.value else time_words(run, 0)
    return f"run {run['id']} {how}"


def end_line(run: dict[str, Any]) -> str:
    return f"run {run['id']} is {run['status']}{end_words(run)}"


def end_words(run: dict[str, Any]) -> str:
    """` (duration), passed`: why it ended, and how good it was."""
    reason = f" ({one_line(run['stopReason'])})" if run.get("stopReason") else ""
    return reason + verdict_words(run)


def run_lines(run: dict[str, Any], screen: Screen, now: float) -> list[str]:
    """All that a person wants to know of a run."""
    facts = {
        "run": run["id"],
        "scenario": f"{run['scenarioId']}, {run['tenantId']}/{run['envId']}"
        + (f" on {run['locustClusterId']}" if run["locustClusterId"] else ""),
        "load": load_words(run)
        + (f"; for {clock_words(run['durationSeconds'])}" if run.get("durationSeconds") else ""),
        "time": " to ".join(local_moment(run[name]) for name in ("startedAt", "finishedAt") if run.get(name))
        or "not started",
        "metadata": ", ".join(
            f"{name}={value if isinstance(value, str) else dump_json(value)}"
            for name, value in (run.get("metadata") or {}).items()
        ),
    }
    status = screen.paint(run["status"], STATUS_COLOURS.get(run["status"], "")) + end_words(run)
    lines = [f"{'status':<9}{status}, {time_words(run, now)}"] + [
        f"{name:<9}{one_line(fact)}" for name, fact in facts.items() if fact
    ]
    lines += (
        [f"{'failed':<9}{screen.paint(one_line(run['failureReason']), 'red')}"]
        if run.get("failureReason")
        else []
    )
    if run.get("lastMetrics"):
        lines += ["", *pack(figure_facts(run, screen), screen.columns)]
        lines += endpoint_lines(run, screen, screen.columns, MAX_ENDPOINTS)
    lines += threshold_lines(run, screen)
    if run.get("comparison"):
        lines += ["", *comparison_lines(run["comparison"], screen)]
    return lines + [screen.paint(line, "orange") for line in warning_lines(run)]


def warning_lines(run: dict[str, Any]) -> list[str]:
    return [f"warning: {one_line(warning['message'])}" for warning in run.get("warnings") or ()]


def threshold_failed(entry: dict[str, Any]) -> bool:
    return (
        "failed" in (entry.get("result"), entry.get("status"))
        or entry.get("passed") is False
        or entry.get("ok") is False
    )


def threshold_words(entry: dict[str, Any]) -> str:
    value = entry.get("value")
    words = (
        f"{entry.get('expr')}, is {value:,.6g}" if isinstance(value, (int, float)) else str(entry.get("expr"))
    )
    return one_line(f"{words} ({entry['message']})" if entry.get("message") else words)


def threshold_lines(run: dict[str, Any], screen: Screen) -> list[str]:
    lines = []
    for entry in run.get("thresholds") or ():
        word, colour = ("failed", "red") if threshold_failed(entry) else ("passed", "green")
        if run["status"] not in FINAL_WORDS and word == "passed":
            word = "holds"
        lines.append(f"threshold {screen.paint(word, colour)}: {threshold_words(entry)}")
    return lines


CHANGE_COLUMNS = (
    Column("ENDPOINT"), Column("FIGURE"), Column("BEFORE", True), Column("NOW", True), Column("CHANGE", True),
    Column("EQUAL RUNS", True), Column("JUDGEMENT"),
)  # fmt: skip
JUDGEMENT_COLOURS = {REGRESSION: "red", IMPROVEMENT: "green", NO_REGRESSION: "green", CANNOT_TELL: "orange"}


def figure_row(one: dict[str, Any]) -> list[str]:
    percent, (low, high) = one.get("changePercent"), one.get("equalRuns") or (None, None)
    return [
        one_line(one.get("endpoint") or "(all)"),
        one_line(one.get("metric") or ""),
        decimal_text(one.get("baseline"), 2),
        decimal_text(one.get("candidate"), 2),
        "-" if percent is None else f"{percent:+,.1f}%",
        "-" if low is None else f"{decimal_text(low, 2)} to {decimal_text(high, 2)}",
        one_line(one.get("judgement") or ""),
    ]


def sentence_of(entry: Any) -> str:
    return one_line(entry.get("message") or dump_json(entry) if isinstance(entry, dict) else entry)


def comparison_lines(comparison: dict[str, Any], screen: Screen) -> list[str]:
    """What the server says of two runs: changes, unfairness, regressions, and what it comes to."""
    runs = comparison.get("runs") or [comparison.get("baseline")]
    against = one_line(runs[-1]) if len(runs) == 1 else f"{len(runs)} runs, the newest {one_line(runs[-1])}"
    candidate = comparison.get("candidate")
    lines = [f"compared with {against}" + (f": {one_line(candidate)}" if candidate else "")]
    rows = [figure_row(one) for one in comparison.get("figures") or ()]
    lines += paint_head(screen, table(CHANGE_COLUMNS, rows, screen.columns)) if rows else []
    if comparison.get("figuresCut"):
        lines.append(f"and {comparison['figuresCut']} more figures")
    for name, colour in (("differences", "orange"), ("warnings", "orange"), ("regressions", "red")):
        lines += [
            screen.paint(f"{name[:-1]}: {sentence_of(entry)}", colour) for entry in comparison.get(name) or ()
        ]
    judgement = comparison.get("judgement") or (
        REGRESSION if comparison.get("regressions") else NO_REGRESSION
    )
    message = f": {one_line(comparison['message'])}" if comparison.get("message") else ""
    return [*lines, screen.paint(f"{judgement}{message}", JUDGEMENT_COLOURS.get(judgement, ""))]


# ---- the table of commands -------------------------------------------------


class Argument(NamedTuple):
    """An argument of a command: its names, and what argparse is told of it. value: converts
    its text or raises ValueError with what is allowed; completes: what a shell offers."""

    names: tuple[str, ...]
    options: dict[str, Any]
    value: Callable[[str], Any] | None = None
    completes: str = ""  # file, run or nothing

    @property
    def is_flag(self) -> bool:
        return self.options.get("action") == "store_true"

    @property
    def is_positional(self) -> bool:
        return not self.names[0].startswith("-")

    @property
    def offered(self) -> list[str]:
        """What completion offers for it: its name, or the words it may be."""
        if self.is_positional:
            return self.options.get("choices") or ([LATEST] if self.completes == "run" else [])
        return [next((name for name in self.names if name.startswith("--")), self.names[0])]


def argument(
    *names: str, value: Callable[[str], Any] | None = None, completes: str = "", **options: Any
) -> Argument:
    return Argument(names, options, value, completes)


@dataclass(frozen=True)
class Command:
    """One line of COMMANDS. calls_server: takes --url, --token and the like too."""

    name: str
    function: Callable[[Any], int]
    about: str
    example: str
    arguments: tuple[Argument, ...] = ()
    calls_server: bool = True

    @property
    def all_arguments(self) -> tuple[Argument, ...]:
        return (
            self.arguments
            + (SERVER_ARGUMENTS if self.calls_server else ())
            + (CONFIG_ARGUMENT,) * (self.name != "completion")
        )


CONFIG_ARGUMENT = argument(
    "-config",
    "--config",
    "-c",
    metavar="FILE",
    completes="file",
    help=f"the configuration; default: {DEFAULT_CONFIG}",
)
SERVER_ARGUMENTS = (
    argument(
        "--url",
        metavar="URL",
        help="the server; default: LOADMANAGER_URL, else the configuration's server.host and port",
    ),
    argument(
        "--token",
        metavar="TOKEN",
        help="the API token, which others on this machine can read here; see --token-file",
    ),
    argument(
        "--token-file",
        metavar="FILE",
        completes="file",
        help="a file with the API token; default: LOADMANAGER_TOKEN, else the configuration's",
    ),
    argument("--ca-file", metavar="FILE", completes="file", help="certificates to trust for an https server"),
    argument("--json", action="store_true", help="print the API's JSON, and nothing else, on stdout"),
)
RUN_ARGUMENT = argument(
    "run",
    metavar="RUN",
    value=run_value,
    completes="run",
    help="a run's id, its first 6 or more characters, or latest",
)
TENANT, ENV = ("--tenant", "--tenant-id"), ("--env", "--env-id")
OUTPUT = argument("-o", "--output", metavar="FILE", completes="file", help="write to a file; default: stdout")
FOLLOW_ARGUMENTS = (
    argument(
        "--junit", metavar="FILE", completes="file", help="when it is over, write its thresholds as JUnit XML"
    ),
    argument(
        "--summary", metavar="FILE", completes="file", help="when it is over, write its summary in Markdown"
    ),
    argument("--require-trusted", action="store_true", help="exit 99 too when the numbers are doubtful"),
    argument(
        "--every",
        metavar="TIME",
        value=duration_value,
        default=10,
        help="time between two lines in a pipe; default: 10s",
    ),
    argument(
        "--patience",
        metavar="TIME",
        value=duration_value,
        default=300,
        help="how long a server that went away is asked again; default: 5m",
    ),
)
CONFIRM_ARGUMENT = argument(
    "--confirm", metavar="ENV", help="the id of the environment again, if it is protected"
)
START_ARGUMENTS = (
    argument("--queue", action="store_true", help="wait for a free cluster instead of being refused"),
    argument("--detach", action="store_true", help="only start it"),
    argument("-q", "--quiet", action="store_true", help="only say how it ended"),
    *FOLLOW_ARGUMENTS,
)

COMMANDS = (
    Command("serve", command_serve, "serve the API until SIGTERM; the default", "serve -config config.yaml", calls_server=False),
    Command("check", command_check, "say every problem of a configuration", "check -config config.yaml", calls_server=False),
    Command(
        "run", command_run, "start a run and follow it; Ctrl-C stops it",
        "run --tenant tenant-1 --env dev --scenario browse --users 1k --spawn-rate 50 -d 5m --threshold 'p95ResponseMs < 500'",
        (
            argument(*TENANT, required=True, metavar="ID", help="whose run it is"),
            argument(*ENV, required=True, metavar="ID", help="the environment to load"),
            argument("--scenario", "--scenario-id", required=True, metavar="NAME", help="what is run"),
            argument("-u", "--users", metavar="N", value=count_value, help="users at the same time: 1000, 1_000 or 1k; default: the scenario's"),
            argument("-r", "--spawn-rate", metavar="RATE", value=rate_value, help="users started per second; default: the scenario's"),
            argument("-d", "--duration", metavar="TIME", value=duration_value, help="90s, 5m, 1h30m; default: until it is stopped"),
            argument("--meta", action="append", default=[], metavar="K=V", value=metadata_value, help="kept with the run; repeatable"),
            argument("--stage", action="append", default=[], metavar="N:RATE:TIME", value=stage_value, help="instead of -u, -r and -d, e.g. 50:5:60s; repeatable"),
            argument("--host", metavar="URL", help="the target system; default: the scenario's, or the cluster's"),
            argument("--user-class", action="append", default=[], metavar="NAME", help="run only this user class; repeatable"),
            argument("--tag", action="append", default=[], metavar="TAG", help="run only tasks with this tag; repeatable"),
            argument("--exclude-tag", action="append", default=[], metavar="TAG", help="run no tasks with this tag; repeatable"),
            argument("--option", action="append", default=[], metavar="K=V", value=metadata_value, help="a custom argument of the locustfile; repeatable"),
            argument("--threshold", action="append", default=[], metavar="EXPR", help="what must hold, e.g. 'errorRate < 1'; repeatable"),
            argument("--fail-on-regression", action="store_true", help="compare with the baseline; exit 99 when it got worse"),
            argument("--compare-with", choices=COMPARE_WITH, help="what to compare with; default with --fail-on-regression: baseline"),
            CONFIRM_ARGUMENT,
            argument("--idempotency-key", metavar="KEY", value=key_value, help="the same key within 24 h answers the same run, e.g. a CI job's id"),
            *START_ARGUMENTS,
        ),
    ),
    Command(
        "list", command_list, "the runs, newest first", "list --tenant tenant-1 --status Running,Stopping",
        (
            argument(*TENANT, metavar="ID", help="only this tenant's"),
            argument(*ENV, metavar="ID", help="only of this environment"),
            argument("--status", metavar="WORDS", help="one or more, joined by commas, of " + ", ".join(status.value for status in RunStatus)),
            argument("--search", metavar="TEXT", help="only with this text in scenario, tenant, environment, cluster or id"),
            argument("--limit", metavar="N", value=count_value, default=20, help="how many; default: 20"),
        ),
    ),
    Command("show", command_show, "one run with its numbers", "show latest", (RUN_ARGUMENT,)),
    Command("watch", command_watch, "follow a run to its end; Ctrl-C leaves it running", "watch latest", (RUN_ARGUMENT, *FOLLOW_ARGUMENTS)),
    Command(
        "wait", command_wait, "wait for the end of a run, in silence", "wait latest --junit junit.xml", (RUN_ARGUMENT, *FOLLOW_ARGUMENTS)
    ),
    Command(
        "stop", command_stop, "stop a run, or take it out of the queue", "stop latest",
        (
            argument("run", metavar="RUN", nargs="?", value=run_value, completes="run", help="a run's id, its first 6 or more characters, or latest"),
            argument("--all", action="store_true", help="every run that the token may touch"),
        ),
    ),
    Command(
        "users", command_users, "change the users of a running load", "users latest -u 200 -r 20",
        (
            RUN_ARGUMENT,
            argument("-u", "--users", required=True, metavar="N", value=count_value, help="users from now on"),
            argument("-r", "--spawn-rate", metavar="RATE", value=rate_value, help="users started, or ended, per second; default: as before"),
        ),
    ),
    Command("scenarios", command_scenarios, "the scenarios of the configuration", "scenarios"),
    Command("rerun", command_rerun, "start the same again and follow it", "rerun latest --queue", (RUN_ARGUMENT, CONFIRM_ARGUMENT, *START_ARGUMENTS)),
    Command("delete", command_delete, "delete a run that is over, and its history", "delete 1b4e28ba", (RUN_ARGUMENT,)),
    Command(
        "metrics", command_metrics, "a run's numbers over time", "metrics latest --max-points 50",
        (
            RUN_ARGUMENT,
            argument("--from", dest="since", metavar="MOMENT", help="from this moment on: RFC 3339 or epoch seconds"),
            argument("--to", dest="until", metavar="MOMENT", help="to this moment"),
            argument("--step", metavar="TIME", value=duration_value, help="one point in this time"),
            argument("--max-points", metavar="N", value=count_value, default=30, help="how many points, extremes kept; default: 30"),
            argument("--csv", action="store_true", help="as CSV, all points"),
            OUTPUT,
        ),
    ),
    Command(
        "report", command_report, "a run's report", "report latest --format html -o report.html",
        (
            RUN_ARGUMENT,
            argument("--format", choices=list(REPORT_PATHS), default="md", help="locust: Locust's own page; csv: the endpoints; summary: for CI; default: md"),
            OUTPUT,
        ),
    ),
    Command("export", command_export, "a run with all samples as one file, to carry elsewhere", "export latest -o run.json", (RUN_ARGUMENT, OUTPUT)),
    Command(
        "import", command_import, "keep a run from a file: an export, or what a headless Locust wrote",
        "import results_stats.csv --tenant tenant-1 --env dev --scenario browse",
        (
            argument("file", metavar="FILE", help="an export, a file of Locust's --json-file, or the _stats.csv of its --csv with those beside it"),
            argument(*TENANT, metavar="ID", help="of a file of Locust: whose run it was"),
            argument(*ENV, metavar="ID", help="the environment that was loaded"),
            argument("--scenario", "--scenario-id", metavar="NAME", help="what was run"),
        ),
    ),
    Command(
        "schedules", command_schedules, "runs that start by themselves",
        "schedules create --cron '0 2 * * mon-fri' --timezone Europe/Berlin --tenant tenant-1 --env dev --scenario browse -u 100 -r 10 -d 10m",
        (
            argument("action", nargs="?", default="list", choices=["list", "create", "pause", "resume", "run", "delete"], help="default: list"),
            argument("schedule", nargs="?", metavar="SCHEDULE", help="its id, for pause, resume, run and delete"),
            argument("--cron", metavar="EXPR", help="create: five fields, or @daily"),
            argument("--at", metavar="MOMENT", help="create: once, instead of --cron: RFC 3339"),
            argument("--timezone", metavar="NAME", help="create: the clock that cron means; default: UTC"),
            argument("--policy", choices=["Forbid", "Queue", "Replace"], help="create: while its last run is active; default: Forbid"),
            argument("--description", metavar="TEXT", help="create: for those who read it"),
            argument(*TENANT, metavar="ID", help="create: whose runs"),
            argument(*ENV, metavar="ID", help="create: the environment to load"),
            argument("--scenario", "--scenario-id", metavar="NAME", help="create: what is run"),
            argument("-u", "--users", metavar="N", value=count_value, help="create: users; default: the scenario's"),
            argument("-r", "--spawn-rate", metavar="RATE", value=rate_value, help="create: users started per second; default: the scenario's"),
            argument("-d", "--duration", metavar="TIME", value=duration_value, help="create: how long; default: the scenario's"),
            argument("--threshold", action="append", default=[], metavar="EXPR", help="create: what must hold; repeatable"),
        ),
    ),
    Command(
        "scale", command_scale, "change a cluster's number of workers", "scale local 4",
        (
            argument("cluster", metavar="CLUSTER", help="the cluster's id"),
            argument("workers", metavar="N", value=count_value, help="workers from now on"),
        ),
    ),
    Command(
        "logs", command_logs, "the last log lines of a cluster's processes", "logs local --lines 50",
        (
            argument("cluster", metavar="CLUSTER", help="the cluster's id"),
            argument("--lines", metavar="N", value=count_value, default=50, help="of each process; default: 50"),
        ),
    ),
    Command("clusters", command_clusters, "the clusters and what they are doing", "clusters"),
    Command(
        "compare", command_compare, "what changed between two runs", "compare 1b4e28ba latest --fail-on-regression",
        (
            argument("baseline", metavar="BASELINE", value=run_value, completes="run", help="the run to measure by, as for show"),
            argument("candidate", metavar="CANDIDATE", value=run_value, completes="run", help="the run to judge"),
            argument("--tolerance", metavar="LIST", help="what still counts as the same, e.g. p95ResponseMs:10%%,errorRate:0.5"),
            argument("--fail-on-regression", action="store_true", help="exit 99 when it got worse"),
        ),
    ),
    Command(
        "token", command_token, "make an API token", "token new --name ci --role operator --tenant tenant-1",
        (
            argument("what", choices=["new"], help="new: print a token, and the line of the configuration with its hash"),
            argument("--name", required=True, metavar="NAME", help="who it is for: runs and the audit name it"),
            argument("--role", required=True, choices=list(ROLES), help="viewer reads, operator also starts and stops, admin also reads the audit"),
            argument(*TENANT, action="append", metavar="ID", help="a tenant that it may touch, or * for all; repeatable"),
            argument(*ENV, action="append", metavar="ID", help="an environment; default: all of its tenants; repeatable"),
            argument("--expires-in", metavar="TIME", value=duration_value, help="refused after this time, e.g. 90d; default: never"),
            argument("--json", action="store_true", help="print JSON"),
        ),
        calls_server=False,
    ),
    Command(
        "completion", command_completion, "completion for a shell", "completion bash > /etc/bash_completion.d/loadmanager",
        (argument("shell", choices=["bash", "zsh"], help="bash or zsh"),), calls_server=False,
    ),
)  # fmt: skip


def command_parser() -> Any:
    """argparse for COMMANDS: errors in one line, an example in every help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            self.exit(EXIT_USAGE, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")

    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(
        prog=PROGRAM, description="A control plane for Locust load testing.", epilog=help_epilog(), **how
    )
    add_argument(parser, CONFIG_ARGUMENT)
    parser.add_argument("--version", action="version", version=f"Load Manager {VERSION}")
    parser.set_defaults(function=command_serve)
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=Parser
    )
    for command in COMMANDS:
        sub = subparsers.add_parser(
            command.name, help=command.about, description=f"{command.about[0].upper()}{command.about[1:]}.",
            epilog=f"example:\n  python {PROGRAM} {command.example}", **how,
        )  # fmt: skip
        sub.set_defaults(function=command.function)
        for entry in command.all_arguments:
            add_argument(sub, entry, default_known=entry is CONFIG_ARGUMENT)
    return parser


def add_argument(parser: Any, entry: Argument, default_known: bool = False) -> None:
    """Tell argparse of an argument. default_known: what stands before the command counts."""
    import argparse

    def convert(text: str) -> Any:
        try:
            return entry.value(text)  # type: ignore[misc]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"allowed is {error}, got {_shown(text)}") from None

    options = {
        **entry.options,
        **({"type": convert} if entry.value else {}),
        **({"default": argparse.SUPPRESS} if default_known else {}),
    }
    parser.add_argument(*entry.names, **options)


def help_epilog() -> str:
    lines = ["exit status:", *(f"  {number:<4}{about}" for number, about in EXITS.items())]
    lines += ["", "environment:", *(f"  {name:<20}{about}" for name, about in VARIABLES.items())]
    return "\n".join([*lines, "", f"Each command has a help of its own: {PROGRAM} run --help"])


# ---- completion ------------------------------------------------------------

BASH_COMPLETION = r"""# bash completion of Load Manager: eval "$(python loadmanager.py completion bash)"
_loadmanager() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" index
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "${COMP_WORDS[index]}" in @names@) command="${COMP_WORDS[index]}"; break ;; esac
    done
    local IFS=$' \t\n'
    COMPREPLY=()
    case "$command $before" in
@values@
    esac
    case "$command" in
@commands@
    esac
}
complete -F _loadmanager loadmanager loadmanager.py
"""
BASH_VALUES = {
    "file": "local IFS=$'\\n'; compopt -o filenames 2>/dev/null || true; COMPREPLY=($(compgen -f -- \"$word\")); return ;;",
    "words": 'COMPREPLY=($(compgen -W "@words@" -- "$word")); return ;;',
    "none": "return ;;",
}
ZSH_COMPLETION = r"""#compdef loadmanager loadmanager.py
# zsh completion of Load Manager: source <(python loadmanager.py completion zsh)
_loadmanager() {
    local command="" before="${words[CURRENT-1]}" word
    local -a offered
    for word in "${(@)words[2,CURRENT-1]}"; do
        case "$word" in (@names@) command="$word"; break ;; esac
    done
    case "$command $before" in
@values@
    esac
    case "$command" in
@commands@
    esac
    _describe 'Load Manager' offered
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _loadmanager loadmanager loadmanager.py
"""
ZSH_VALUES = {"file": "_files; return ;;", "words": "compadd -- @words@; return ;;", "none": "return ;;"}


def completion_script(shell: str) -> str:
    """What makes a shell complete commands, options and their values, from COMMANDS."""
    is_zsh = shell == "zsh"
    script = ZSH_COMPLETION if is_zsh else BASH_COMPLETION
    parts = {
        "@names@": "|".join(command.name for command in COMMANDS),
        "@values@": "\n".join(completion_values(is_zsh)),
        "@commands@": "\n".join(completion_words(is_zsh)),
    }
    for mark, text in parts.items():
        script = script.replace(mark, text)
    return script


def completion_values(is_zsh: bool) -> Iterator[str]:
    """A case for what may follow the options that take a value."""
    endings = ZSH_VALUES if is_zsh else BASH_VALUES
    options = {ending: [] for ending in (endings["file"], endings["none"])}
    options[endings["file"]] = [f'" {name}"' for name in CONFIG_ARGUMENT.names]  # before the command
    for command in COMMANDS:
        for entry in command.all_arguments:
            if entry.is_flag or entry.is_positional:
                continue
            ending = endings["file" if entry.completes == "file" else "none"]
            if "choices" in entry.options:
                ending = endings["words"].replace("@words@", " ".join(entry.options["choices"]))
            options.setdefault(ending, []).extend(f'"{command.name} {name}"' for name in entry.names)
    for ending, names in options.items():
        yield f"        {'(' if is_zsh else ''}{'|'.join(names)}) {ending}"


def completion_words(is_zsh: bool) -> Iterator[str]:
    """A case for the words that each command takes; first for the commands themselves."""
    offers = {
        "": [(command.name, command.about) for command in COMMANDS]
        + [("--config", "the configuration"), ("--version", "the version")]
    }
    for command in COMMANDS:
        known = [
            (word, str(entry.options.get("help")))
            for entry in command.all_arguments
            for word in entry.offered
        ]
        offers[command.name] = [*known, ("--help", "help and an example")]
    for name, words in offers.items():
        if is_zsh:
            described = " ".join(
                "'" + f"{word}:{about}".replace("%%", "%").replace("'", "’") + "'" for word, about in words
            )
            yield f"        ('{name}') offered=({described}) ;;"
        else:
            yield f'''        "{name}") COMPREPLY=($(compgen -W "{" ".join(word for word, _ in words)}" -- "$word")) ;;'''


# ---- the program -----------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [GUARD_COMMAND]:
        return guard_cluster()
    config_path = plain_start(arguments)
    if config_path is not None:
        return serve(config_path)
    options = command_parser().parse_args(arguments)
    try:
        return options.function(options)
    except ConfigError as error:
        return _print_problems(error)
    except CommandError as error:
        say(error.message)
        return error.exit_status
    except UnicodeEncodeError:
        say("an argument is not UTF-8 text; nothing else is sent")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def plain_start(arguments: list[str]) -> str | None:
    """The configuration of a start as services do it, which needs no parser; None for all else."""
    rest = arguments[1:] if arguments[:1] == ["serve"] else arguments
    if not rest:
        return DEFAULT_CONFIG
    if len(rest) == 2 and rest[0] in CONFIG_ARGUMENT.names and not rest[1].startswith("-"):
        return rest[1]
    return None


# ============================================================================
# 26. DASHBOARD PAGE - what a browser gets at / and at /docs
# ============================================================================
# A client like any other: no data inside; it reads the JSON API and the event streams,
# and writes what it got with textContent only. It loads nothing else, from nowhere.

PAGE_CSS = r"""
/* ---- colours ---- */
:root {
  color-scheme: light dark;
  --ground: #f4f6f8; --panel: #ffffff; --raised: #f8fafb; --line: #e0e5eb; --line-strong: #c6ced8;
  --text: #18202b; --soft: #5b6778; --accent: #0b62d0; --on-accent: #ffffff; --accent-wash: #e8f0fc;
  --good: #0a7a3d; --good-wash: #e2f5ea; --bad: #c0262d; --bad-wash: #fdeaea; --warn: #8a5a00; --warn-wash: #fdf2dc;
  --calm: #4a5a70; --calm-wash: #e9edf2; --shadow: 0 1px 2px rgba(20, 30, 45, .05); --shade: rgba(16, 24, 36, .45);
  --rps: #00ca5a; --failures: #ff6d6d; --p50: #ff9f00; --p95: #9966cc; --p99: #c2185b; --users: #0099ff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0e1319; --panel: #161d26; --raised: #1b232e; --line: #26303d; --line-strong: #3a4757;
    --text: #e3e8ef; --soft: #93a0b2; --accent: #62a8ff; --on-accent: #08131f; --accent-wash: #17293f;
    --good: #4ade88; --good-wash: #10301f; --bad: #ff8585; --bad-wash: #3a1b1f; --warn: #f2b84b; --warn-wash: #33270f;
    --calm: #a9b6c8; --calm-wash: #222c39; --shadow: none; --shade: rgba(0, 0, 0, .6);
    --p95: #b085e0; --p99: #f06292;
  }
}

/* ---- page ---- */
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
[hidden] { display: none !important; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.skip { position: absolute; left: -999px; top: 4px; z-index: 9; background: var(--panel); padding: 6px 10px; }
.skip:focus { left: 8px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
main { max-width: 1480px; margin: 0 auto; padding: 16px 20px 48px; }
main:focus { outline: none; }
#top {
  display: flex; align-items: center; gap: 10px; padding: 8px 20px; background: var(--panel);
  border-bottom: 1px solid var(--line); position: sticky; top: 0; z-index: 5;
}
#top .brand { font-weight: 650; font-size: 15px; color: inherit; text-decoration: none; white-space: nowrap; }
#top .space { flex: 1; }
#top .quiet { color: var(--soft); font-size: 13px; font-weight: 550; }
#top .who { color: var(--soft); font-size: 13px; }
.live { display: inline-flex; align-items: center; gap: 6px; color: var(--soft); font-size: 12px; }
.live::before { content: ""; width: 8px; height: 8px; border-radius: 50%; background: var(--line-strong); }
.live.on::before { background: var(--rps); }
.live.off::before { background: var(--failures); }
#lost { background: var(--warn-wash); color: var(--warn); text-align: center; padding: 7px 16px; font-weight: 550; border-bottom: 1px solid var(--line); position: sticky; top: 47px; z-index: 4; }
main > p.back { margin: 0 0 8px; }
h1 { font-size: 20px; line-height: 1.25; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 14px; margin: 0; font-weight: 650; }
h2 .count { color: var(--soft); font-weight: 400; margin-left: 4px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-top: 22px; }
main > h1.unseen + section { margin-top: 4px; }
section > .head { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; margin-bottom: 8px; }
section > .head .space { flex: 1; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; box-shadow: var(--shadow); }
.soft { color: var(--soft); }
.empty { padding: 20px 16px; text-align: center; color: var(--soft); }
.empty p { margin: 0 0 10px; }
.empty p:last-child { margin: 0; }
.name { unicode-bidi: isolate; overflow-wrap: anywhere; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12.5px; }

/* ---- buttons and fields ---- */
button, .button {
  font: inherit; font-weight: 550; line-height: 1.3; padding: 5px 12px; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--line-strong); background: var(--panel); color: var(--text); white-space: nowrap; display: inline-block;
}
button:hover, .button:hover { background: var(--raised); text-decoration: none; }
button:disabled { opacity: .5; cursor: default; }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.primary:hover { filter: brightness(1.08); }
button.danger { color: var(--bad); border-color: currentColor; }
button.danger.primary { background: var(--bad); border-color: var(--bad); color: var(--panel); }
button.small { padding: 2px 8px; font-size: 12.5px; }
button.plain { border-color: transparent; background: none; color: var(--soft); }
button.plain:hover { color: var(--text); background: var(--raised); }
input, select, textarea {
  font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line-strong); border-radius: 6px;
  padding: 5px 9px; min-width: 0; max-width: 100%;
}
input::placeholder, textarea::placeholder { color: var(--soft); opacity: .85; }
input[type=checkbox] { accent-color: var(--accent); width: 16px; height: 16px; margin: 0; }
label.field { display: block; }
label.field > span, .field > .label { display: block; font-size: 12.5px; font-weight: 550; color: var(--soft); margin-bottom: 3px; }
label.field > input, label.field > select, label.field > textarea { width: 100%; }
label.check { display: flex; align-items: center; gap: 8px; }
.hint, label.field > .hint { color: var(--soft); font-size: 12.5px; font-weight: 400; margin: 2px 0 0; }
p.hint:empty { display: none; }
.wrong, label.field > .wrong { color: var(--bad); font-size: 12.5px; font-weight: 400; margin: 3px 0 0; overflow-wrap: anywhere; }
label.field > .wrong:empty { display: none; }
input[aria-invalid=true], textarea[aria-invalid=true], select[aria-invalid=true] { border-color: var(--bad); }

/* ---- states ---- */
.badge {
  display: inline-flex; align-items: center; gap: 6px; padding: 1px 9px; border-radius: 10px; font-size: 12.5px; font-weight: 600;
  white-space: nowrap; background: var(--calm-wash); color: var(--calm);
}
.badge.good { background: var(--good-wash); color: var(--good); }
.badge.bad { background: var(--bad-wash); color: var(--bad); }
.badge.warn { background: var(--warn-wash); color: var(--warn); }
.badge.busy { background: var(--good-wash); color: var(--good); }
.badge.busy::before { content: ""; width: 7px; height: 7px; border-radius: 50%; background: currentColor; animation: pulse 1.8s infinite; }
@keyframes pulse { 50% { opacity: .3; } }
@media (prefers-reduced-motion: reduce) { .badge.busy::before { animation: none; } }
.note { margin: 10px 0 0; padding: 8px 12px; border-radius: 6px; background: var(--calm-wash); color: var(--text); overflow-wrap: anywhere; }
.note.bad { background: var(--bad-wash); color: var(--bad); }
.note.warn { background: var(--warn-wash); color: var(--warn); }
.note ul { margin: 0; padding-left: 18px; }
.meter { height: 6px; border-radius: 3px; background: var(--calm-wash); overflow: hidden; min-width: 44px; }
.meter > div { height: 100%; width: 0; background: var(--accent); border-radius: 3px; transition: width .4s linear; }
.meter.hot > div { background: var(--bad); }
.meter.over > div { background: var(--line-strong); }
@media (prefers-reduced-motion: reduce) { .meter > div { transition: none; } }

/* ---- tables ---- */
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.scroll:focus-visible { outline-offset: -2px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 6px 12px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); vertical-align: middle; }
tbody tr:last-child td, tfoot tr:last-child td { border-bottom: 0; }
thead th { font-size: 12px; font-weight: 600; color: var(--soft); background: var(--raised); position: relative; }
thead tr:first-child th:first-child { border-top-left-radius: 8px; }
thead tr:first-child th:last-child { border-top-right-radius: 8px; }
tbody tr:hover td { background: var(--raised); }
td.num, th.num { text-align: right; }
td.wide { white-space: normal; min-width: 104px; max-width: 420px; overflow-wrap: anywhere; }
.two { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
td.acts { text-align: right; }
td.acts button + button { margin-left: 4px; }
td.fails { color: var(--bad); font-weight: 600; }
tfoot td { font-weight: 650; background: var(--raised); border-top: 1px solid var(--line-strong); }
tfoot tr td:first-child { border-bottom-left-radius: 8px; } tfoot tr td:last-child { border-bottom-right-radius: 8px; }
th button { all: unset; cursor: pointer; font: inherit; color: inherit; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
th button::after { content: "\2195"; opacity: .35; margin-left: 4px; font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\2193"; opacity: 1; }
pre { margin: 0; font: 12px/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.bar input[type=search] { width: 230px; }
.pages { display: flex; gap: 8px; align-items: center; justify-content: flex-end; padding: 8px 12px; border-top: 1px solid var(--line); color: var(--soft); }

/* ---- clusters ---- */
.clusters { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 10px; }
.cluster { padding: 10px 14px; display: flex; flex-direction: column; gap: 7px; min-width: 0; }
.clusters > .empty { grid-column: 1 / -1; }
.cluster .row { display: flex; gap: 8px; align-items: center; justify-content: space-between; min-width: 0; }
.cluster .row > .name { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.cluster .title { font-weight: 650; }
.cluster dl { display: grid; grid-template-columns: repeat(3, auto) 1fr; gap: 0 16px; margin: 0; }
.cluster dt { color: var(--soft); font-size: 12px; grid-row: 1; } .cluster dd { margin: 0; font-weight: 600; grid-row: 2; }
.cluster dd.cpu { display: flex; align-items: center; gap: 8px; } .cluster dd.cpu .meter { flex: 1; }
.cluster .problem { color: var(--bad); font-size: 12.5px; overflow-wrap: anywhere; }

/* ---- a run ---- */
.run-head { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: flex-start; }
.run-head > .what { flex: 1 1 320px; min-width: 0; }
.run-head .badges { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 5px 0 6px; }
.labelled { display: inline-flex; align-items: center; gap: 6px; font-size: 13px; }
.facts { color: var(--soft); margin-top: 4px; display: flex; flex-wrap: wrap; gap: 2px 14px; }
.facts b { font-weight: 550; color: var(--text); }
.time { display: grid; grid-template-columns: auto 1fr auto; gap: 12px; align-items: center; margin-top: 12px; color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); margin-top: 14px; overflow: hidden; }
.tile { padding: 9px 14px; min-width: 0; border: solid var(--line); border-width: 0 1px 1px 0; margin: 0 -1px -1px 0; }
.tile .label { font-size: 12px; color: var(--soft); display: flex; gap: 6px; align-items: center; white-space: nowrap; }
.tile .label i { width: 9px; height: 9px; border-radius: 2px; flex: none; }
.tile .value { font-size: 21px; line-height: 1.3; font-weight: 600; white-space: nowrap; }
.tile .value small { font-size: 12px; color: var(--soft); font-weight: 400; margin-left: 3px; }
.charts { display: grid; grid-template-columns: 1fr; gap: 10px; margin-top: 12px; }
@media (min-width: 1100px) { .charts { grid-template-columns: 1fr 1fr; } .charts > :first-child { grid-column: 1 / -1; } }
.chart { padding: 8px 10px 4px; position: relative; min-width: 0; display: flex; flex-direction: column; }
.chart .head { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: center; padding: 0 4px 4px; }
.chart h3 { font-size: 13px; font-weight: 600; margin: 0; }
.chart .legend { display: flex; flex-wrap: wrap; gap: 2px 4px; margin-left: auto; }
.legend button { all: unset; cursor: pointer; font-size: 12px; color: var(--soft); display: inline-flex; gap: 5px; align-items: center; padding: 1px 6px; border-radius: 4px; }
.legend button:hover { background: var(--raised); }
.legend button:focus-visible { outline: 2px solid var(--accent); }
.legend button[aria-pressed=false] { opacity: .45; text-decoration: line-through; }
.legend i { width: 10px; height: 3px; border-radius: 2px; }
.legend b { color: var(--text); font-weight: 600; min-width: 2.4em; text-align: right; }
.chart canvas { display: block; width: 100%; height: 190px; flex: 1 0 auto; touch-action: pan-y; cursor: crosshair; border-radius: 4px; }
.charts > :first-child canvas { height: 220px; }
.tip {
  position: absolute; z-index: 3; pointer-events: none; background: var(--panel); border: 1px solid var(--line-strong); border-radius: 6px;
  padding: 6px 9px; font-size: 12px; box-shadow: 0 4px 14px rgba(0, 0, 0, .16); max-width: 260px;
}
.tip div { display: flex; gap: 6px; align-items: center; } .tip div b { margin-left: auto; padding-left: 12px; }
.tip i { width: 8px; height: 8px; border-radius: 2px; flex: none; } .tip .mark { color: var(--soft); overflow-wrap: anywhere; white-space: normal; }
.tabs { display: flex; gap: 2px; border-bottom: 1px solid var(--line); overflow-x: auto; margin-top: 22px; }
.tabs button { border: 0; background: none; border-radius: 6px 6px 0 0; padding: 7px 13px; color: var(--soft); border-bottom: 2px solid transparent; }
.tabs button[aria-selected=true] { color: var(--text); border-bottom-color: var(--accent); }
.tabs button .n { margin-left: 6px; padding: 0 6px; border-radius: 8px; background: var(--calm-wash); font-size: 12px; }
.tabs button .n.bad { background: var(--bad-wash); color: var(--bad); }
.tabpanel { margin-top: 10px; }
.tabpanel td.wide { min-width: 160px; }
.tabpanel .bar { margin-bottom: 8px; }
.trends { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 10px; margin-bottom: 10px; }
.trend { padding: 8px 14px 6px; }
.trend .label { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft); } .trend .label b { color: var(--text); }
.trend svg { display: block; width: 100%; height: 56px; overflow: visible; }
.details { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 10px; }
.details .panel { padding: 12px 16px; min-width: 0; }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 8px 0 0; }
.pairs dt { color: var(--soft); max-width: 180px; overflow-wrap: anywhere; } .pairs dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }

.gap { margin-top: 16px; }
.strong { font-weight: 600; }
.lead { margin: 0 0 8px; }
.note ul { display: grid; gap: 2px; }
ul.note { padding-left: 30px; }
td.bar-cell { width: 150px; padding-left: 0; padding-right: 0; }
.change-bar { display: block; position: relative; width: 140px; height: 8px; border-radius: 4px; background: var(--calm-wash); }
.change-bar::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; width: 1px; background: var(--line-strong); }
.change-bar i { position: absolute; top: 0; bottom: 0; border-radius: 2px; background: var(--calm); }
.change-bar i.bad { background: var(--bad); } .change-bar i.good { background: var(--good); } .change-bar i.warn { background: var(--warn); }
td.title { font-weight: 600; }
details.more > summary { cursor: pointer; } details.more > div { color: var(--soft); }

/* ---- dialogs, sign-in, toasts ---- */
dialog { border: 1px solid var(--line); border-radius: 10px; background: var(--panel); color: var(--text); padding: 0; width: min(600px, calc(100vw - 24px)); box-shadow: 0 18px 50px rgba(0, 0, 0, .3); }
dialog::backdrop { background: var(--shade); }
dialog form { padding: 18px 20px; display: grid; gap: 12px; }
dialog h2 { font-size: 16px; overflow-wrap: anywhere; }
dialog p { margin: 0; overflow-wrap: anywhere; }
dialog .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
dialog h3 { font-size: 14px; margin: 6px 0 0; border-top: 1px solid var(--line); padding-top: 12px; }
dialog .two-columns { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
dialog form > details { border: 1px solid var(--line); border-radius: 6px; }
dialog form > details > summary { cursor: pointer; padding: 6px 10px; font-weight: 550; font-size: 13px; }
dialog form > details > .inside { display: grid; gap: 12px; padding: 4px 10px 12px; }
.stages { display: grid; gap: 6px; margin-bottom: 8px; }
.stage { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.stage input { width: 72px; }
dialog .ends { display: flex; justify-content: flex-end; gap: 8px; margin-top: 4px; }
.sign-in { max-width: 400px; margin: 12vh auto 0; padding: 24px; display: grid; gap: 14px; }
.sign-in p { margin: 0; }
#toasts { position: fixed; right: 16px; bottom: 16px; display: grid; gap: 8px; z-index: 20; width: min(420px, calc(100vw - 32px)); }
.toast { background: var(--panel); border: 1px solid var(--line-strong); border-left: 4px solid var(--accent); border-radius: 6px; padding: 9px 12px; box-shadow: 0 6px 20px rgba(0, 0, 0, .2); display: flex; gap: 10px; align-items: flex-start; overflow-wrap: anywhere; }
.toast.bad { border-left-color: var(--bad); }
.toast span { flex: 1; min-width: 0; }

@media (min-width: 901px) { td.again { color: transparent; } }
@media (max-width: 900px) {
  /* Rows as cards: the first cell is the title, each other one carries its column's name. */
  .scroll:has(> table.cards) { background: none; border: 0; box-shadow: none; overflow: visible; }
  table.cards, table.cards tbody { display: block; }
  table.cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table.cards tr {
    display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 6px 14px; align-items: start;
    background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; margin-bottom: 8px;
  }
  table.cards td {
    display: block; padding: 0; border: 0; text-align: left; white-space: normal; min-width: 0; max-width: none;
    width: auto; overflow-wrap: anywhere;
  }
  table.cards tbody tr:hover td { background: none; }
  table.cards td[data-label]:not([data-label=""])::before {
    content: attr(data-label); display: block; color: var(--soft); font: 400 12px/1.4 system-ui, sans-serif;
  }
  table.cards tr > td:first-child { grid-column: 1 / -1; font-weight: 600; font-size: 15px; }
  table.cards tr > td[data-label]:first-child::before { display: none; }
  table.cards td.acts { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
  table.cards td.acts > span { display: contents; }
  table.cards td.acts:empty { display: none; }
  td.acts button + button { margin-left: 0; }
  .runs table.cards td:nth-child(3), .runs table.cards td:nth-child(11), .schedules table.cards td:nth-child(3) { grid-column: span 2; }
  .comparison table.cards tr {
    grid-template-columns: 1.5fr .85fr .8fr .8fr .8fr .9fr 1.7fr; padding: 6px 12px; margin-bottom: 4px; align-items: center;
  }
  .comparison table.cards tr > td:first-child { grid-column: auto; font-size: 14px; }
  .comparison table.cards td:last-child::before { display: none !important; }
  .comparison .change-bar { width: 100%; }
}
@media (min-width: 641px) and (max-width: 900px) {
  .runs table.cards tr > td:first-child, .schedules table.cards tr > td:first-child { grid-column: 1 / -4; }
  .runs table.cards td.acts, .schedules table.cards td.acts { grid-column: -4 / -1; grid-row: 1; justify-content: end; }
}
@media (max-width: 640px) {
  main { padding: 12px 10px 40px; }
  #top { padding: 8px 10px; flex-wrap: wrap; } #top .who { display: none; } .live { font-size: 0; gap: 0; }
  .tile { padding: 7px 10px; } .tile .value { font-size: 18px; }
  .tiles { grid-template-columns: repeat(3, 1fr); }
  .bar input[type=search] { width: 100%; } .bar { width: 100%; } .bar select { flex: 1 1 28%; }
  dialog .three { grid-template-columns: 1fr 1fr; }
  dialog .two-columns { grid-template-columns: 1fr; }
  th, td { padding: 6px 9px; }
  .chart .legend { margin-left: 0; }
  .runs table.cards tr, .comparison table.cards tr { grid-template-columns: 1fr 1fr 1fr; }
  .comparison table.cards tr > td:first-child, .comparison table.cards td:last-child { grid-column: span 2; }
  .comparison table.cards td:nth-child(2)::before { display: none !important; }
}
"""

PAGE_TOOLS_JS = r"""
"use strict";

// ---- elements: text only ever goes in as text ----

const $ = (id) => document.getElementById(id);

/** An element. `on*` are listeners, the rest attributes; children are nodes or text. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function setText(element, text) {
  text = String(text);
  if (element.textContent !== text) element.textContent = text;
}

function setClass(element, text) {
  if (element.className !== text) element.className = text;
}

let sayTimer = 0;
function say(text) {
  // to screen readers
  clearTimeout(sayTimer);
  sayTimer = setTimeout(() => setText($("said"), text), 100);
}

function toast(text, kind) {
  const box = h(
    "div",
    {class: "toast " + (kind || "")},
    h("span", {}, text),
    h("button", {class: "plain small", "aria-label": "Dismiss", onclick: () => box.remove()}, "\u00d7"),
  );
  $("toasts").append(box);
  while ($("toasts").children.length > 4) $("toasts").firstChild.remove();
  setTimeout(() => box.remove(), kind === "bad" ? 15000 : 6000);
}

// ---- numbers and moments ----

const NONE = "\u2013";
const formats = [0, 1, 2].map((digits) => new Intl.NumberFormat("en-US", {minimumFractionDigits: digits, maximumFractionDigits: digits}));

const isNumber = (value) => typeof value === "number" && isFinite(value);
const count = (value) => (isNumber(value) ? formats[0].format(value) : NONE);
const rate = (value) => (isNumber(value) ? formats[value >= 1000 ? 0 : value >= 10 ? 1 : 2].format(value) : NONE);
const millis = (value) => (isNumber(value) ? formats[value < 10 && value % 1 ? 1 : 0].format(value) : NONE);
const percent = (value) =>
  isNumber(value) ? (value > 0 && value < 0.01 ? "<0.01" : formats[value >= 10 ? 1 : value ? 2 : 0].format(value)) + "%" : NONE;

const signed = (value, digits) => (value >= 0 ? "+" : "\u2212") + formats[digits].format(Math.abs(value));
const signedPercent = (share) => signed(share * 100, 1) + "%";

/** Seconds as 1:02:03 or 2:03. */
function clock(seconds) {
  const s = Math.max(0, Math.round(seconds)),
    pad = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(s / 3600),
    rest = pad(s % 60);
  return hours ? hours + ":" + pad(Math.floor(s / 60) % 60) + ":" + rest : Math.floor(s / 60) + ":" + rest;
}

/** Seconds as a person writes them: 1h30m. */
function span(seconds) {
  const s = Math.round(seconds),
    parts = [
      [86400, "d"],
      [3600, "h"],
      [60, "m"],
      [1, "s"],
    ];
  let rest = s,
    text = "";
  for (const [size, letter] of parts) {
    if (rest >= size) {
      text += Math.floor(rest / size) + letter;
      rest %= size;
    }
  }
  return text || "0s";
}

/** Seconds of 90, 90s, 5m, 1h30m; NaN for anything else. */
function parseSpan(text) {
  text = text.trim().toLowerCase().replace(/\s+/g, "");
  if (/^\d+$/.test(text)) return Number(text);
  const match = /^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?$/.exec(text);
  if (!text || !match) return NaN;
  return [86400, 3600, 60, 1].reduce((sum, size, index) => sum + size * Number(match[index + 1] || 0), 0);
}

let clockSkew = 0; // ms that the server's clock is ahead of ours
const now = () => Date.now() + clockSkew;
const at = (text) => (text ? Date.parse(text) : NaN); // epoch ms

const timeParts = {day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit"};
const timeFormat = new Intl.DateTimeFormat("en-GB", timeParts);
const yearFormat = new Intl.DateTimeFormat("en-GB", {...timeParts, year: "numeric"});
const zoneFormat = new Intl.DateTimeFormat("en-GB", {...timeParts, year: "numeric", timeZoneName: "short"});
/** The browser's time zone, for the heads of columns. */
const ZONE = zoneFormat.formatToParts(new Date()).find((part) => part.type === "timeZoneName").value;

/** A time with its date, in the browser's zone: 25 Nov, 03:11:38; of another year with the year. */
function moment(text) {
  const when = new Date(at(text));
  if (isNaN(when)) return NONE;
  return (when.getFullYear() === new Date(now()).getFullYear() ? timeFormat : yearFormat).format(when);
}

/** The same where no head of a column names the zone: 25 Nov 2026, 03:11:38 UTC. */
function zonedMoment(text) {
  const when = new Date(at(text));
  return isNaN(when) ? NONE : zoneFormat.format(when);
}

/** When a schedule fires, in the schedule's own zone: Thu 26 Nov 2026, 02:00 CET. */
function scheduledTime(text, timeZone) {
  const parts = {weekday: "short", day: "numeric", month: "short", year: "numeric"};
  const format = {...parts, hour: "2-digit", minute: "2-digit", timeZoneName: "short", timeZone};
  try {
    return new Intl.DateTimeFormat("en-GB", format).format(new Date(text));
  } catch (error) {
    return zonedMoment(text); // a zone that this browser does not know
  }
}

// ---- the API ----

let session = null;

class ApiError extends Error {
  constructor(status, body) {
    super(body.message || body.error || "HTTP " + status);
    this.status = status;
    this.body = body;
  }
}

/** Answer of one call as {data, link}; ApiError for an error answer, TypeError when nothing answered. */
async function api(method, path, body) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (method !== "GET" && session && session.csrfToken) headers["X-CSRF-Token"] = session.csrfToken;
  let response;
  try {
    response = await fetch(path, {method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store"});
  } catch (error) {
    live.unreachable();
    throw error;
  }
  live.reachable();
  const skew = Date.parse(response.headers.get("Date")) - Date.now();
  if (isFinite(skew)) clockSkew = Math.abs(skew) > 2000 ? skew : 0;
  const text = await response.text();
  let data = null;
  try {
    data = text ? JSON.parse(text) : null;
  } catch (error) {
    data = {message: text.slice(0, 300)};
  }
  if (response.status === 401 && path !== "/session") showSignIn(data && data.message);
  if (!response.ok) throw new ApiError(response.status, data || {});
  return {data, link: response.headers.get("Link")};
}

const get = async (path) => (await api("GET", path)).data;
const runPath = (id, rest) => "/v1/tests/" + encodeURIComponent(id) + (rest || "");

/** Do what a button asks for; a failure is told, not thrown. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return undefined;
    toast(error instanceof ApiError ? error.message : "Load Manager did not answer.", "bad");
    return undefined;
  }
}

// ---- live events ----

const live = {
  source: null,
  path: "",
  view: null,
  timer: 0,
  tries: 0,
  isLost: false,
  dark: 0,

  follow(path, view) {
    this.stop();
    this.path = path;
    this.view = view;
    this.tries = 0;
    this.connect();
  },
  connect() {
    clearTimeout(this.timer);
    if (this.source) this.source.close();
    const source = (this.source = new EventSource(this.path));
    source.onopen = () => {
      this.tries = 0;
      const wasLost = this.isLost;
      this.reachable();
      if (wasLost) this.view.refresh();
    };
    source.onerror = () => {
      if (this.source === source) this.failed(source);
    };
    for (const kind of ["run", "sample", "deleted"]) {
      source.addEventListener(kind, (event) => this.view.onEvent(kind, JSON.parse(event.data)));
    }
    source.addEventListener("ready", () => this.view.onReady && this.view.onReady());
    source.addEventListener("reset", () => this.view.refresh());
  },
  /** A broken stream is opened again: at once by the browser, or, where the server said no, by us. */
  async failed(source) {
    this.unreachable();
    if (source.readyState !== EventSource.CLOSED) return;
    this.source = null;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.retry(), Math.min(10000, 1000 * 2 ** this.tries++));
  },
  async retry() {
    const view = this.view;
    try {
      session = await get("/session");
      if (!session.signedIn) {
        showSignIn("Your sign-in has ended.");
        return;
      }
    } catch (error) {
      /* still away */
    }
    if (this.view === view && view) this.connect();
  },
  unreachable() {
    if (!this.view || this.isLost) return;
    this.isLost = true;
    setText($("lost"), "Connection to Load Manager lost. What you see may be old; trying again\u2026");
    $("lost").hidden = false;
    this.show();
  },
  reachable() {
    const streaming = this.source && this.source.readyState === EventSource.OPEN;
    if (this.isLost && streaming) {
      this.isLost = false;
      $("lost").hidden = true;
      say("Connected again.");
    }
    this.show();
  },
  show() {
    const mark = $("live");
    if (!mark) return;
    setText(mark, this.isLost ? "Offline" : "Live");
    setClass(mark, "live " + (this.isLost ? "off" : "on"));
  },
  stop() {
    clearTimeout(this.timer);
    if (this.source) this.source.close();
    this.source = this.view = null;
    this.isLost = false;
    $("lost").hidden = true;
  },
};

// A browser has six connections to a server for all its tabs: hidden ones give theirs back.
document.addEventListener("visibilitychange", () => {
  clearTimeout(live.dark);
  if (!live.view) return;
  if (document.hidden) {
    live.dark = setTimeout(() => {
      if (live.source) live.source.close();
      live.source = null;
    }, 20000);
  } else if (!live.source) {
    live.connect();
    live.view.refresh();
  }
});

// ---- what a run says ----

const ACTIVE = ["Pending", "Running", "Stopping"];
const isActive = (run) => ACTIVE.includes(run.status);
const STATUS_CLASS = {Pending: "warn", Running: "busy", Stopping: "warn", Finished: "", Failed: "bad"};

function showStatus(badge, run) {
  setText(badge, run.status === "Pending" && run.queuePosition ? "Queued, no. " + run.queuePosition : run.status);
  setClass(badge, "badge " + (STATUS_CLASS[run.status] || ""));
}

const capital = (word) => word[0].toUpperCase() + word.slice(1);

/** Did it pass? Of the thresholds and the comparison; the status only says how the run ended. */
function showVerdict(badge, run) {
  badge.hidden = !run.verdict;
  setText(badge, run.verdict ? capital(run.verdict) : "");
  setClass(badge, "badge " + (run.verdict === "passed" ? "good" : run.verdict === "failed" ? "bad" : ""));
}

/** May the numbers be relied on? alsoGood: say it too when they may. */
function showTrust(badge, run, alsoGood) {
  const isGood = run.trust === "ok";
  badge.hidden = !run.trust || (isGood && !alsoGood);
  setText(badge, isGood ? "Reliable" : run.trust === "doubtful" ? "Unreliable" : run.trust || "");
  setClass(badge, "badge " + (isGood ? "good" : "warn"));
  badge.title = (run.trustReasons || []).join("; ");
}

/** A badge beside the word that says what it is about. */
const labelled = (label, badge) => h("span", {class: "labelled"}, h("span", {class: "soft"}, label + " "), badge);

// ---- the load of a run: what was asked for, and what it was changed to ----

/** Users as asked for and as changed: 20 \u2192 40. */
function usersText(run) {
  const users = [run.targetUsers, ...(run.usersChanges || []).map((change) => change.targetUsers)].map(count);
  return (users.length > 4 ? [users[0], "\u2026", users.at(-1)] : users).join(" \u2192 ");
}

const perSecond = (value) => rate(value).replace(/\.0+$/, "") + "/s";

/** A change of the users: 40 users at 10/s after 0:08, by api. */
function changeText(run, change) {
  const after = clock((at(change.at) - at(run.startedAt || run.createdAt)) / 1000);
  return count(change.targetUsers) + " users at " + perSecond(change.spawnRate) + " after " + after + ", by " + change.by;
}

/** The most users of the samples: a final reading is taken when they are gone. */
function peakUsers(points) {
  const known = points.map((point) => point.currentUsers).filter(isNumber);
  return known.length ? known.reduce((most, users) => Math.max(most, users), 0) : null;
}

/** Did the run ever make load? Without a start there is nothing to chart. */
const hasBegun = (run) => Boolean(run.startedAt || run.lastMetrics);

/** Seconds since the start (until the end), of how many; NaN when unknown. */
function timing(run) {
  const started = at(run.startedAt),
    ended = run.finishedAt ? at(run.finishedAt) : now();
  return {elapsed: (ended - started) / 1000, total: run.durationSeconds === undefined ? NaN : run.durationSeconds};
}

function timingText(run) {
  const {elapsed, total} = timing(run);
  if (isNaN(elapsed)) return NONE;
  if (!isActive(run)) return span(elapsed);
  return clock(elapsed) + (isNaN(total) ? "" : " / " + clock(total));
}

function meter(label) {
  const bar = h("div", {}),
    box = h("div", {class: "meter", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100}, bar);
  return {
    box,
    set(share) {
      const value = Math.round(1000 * Math.min(1, Math.max(0, share || 0))) / 10;
      bar.style.width = value + "%";
      box.setAttribute("aria-valuenow", Math.round(value));
    },
  };
}
"""

PAGE_FORMS_JS = r"""
// ---- dialogs ----

/**
 * Open a dialog with a form in it; it goes when it is closed. submit(dialog) is called when the form is sent.
 * kind "danger": Enter alone cancels.
 */
function openDialog(title, body, button, submit, {kind = "", id = null, checked = true} = {}) {
  const isDanger = kind === "danger";
  const send = h("button", {class: "primary " + kind, autofocus: !isDanger}, button);
  const cancel = h("button", {type: "button", autofocus: isDanger, onclick: () => dialog.close("")}, "Cancel");
  const onsubmit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    await submit(dialog);
    send.disabled = false;
  };
  const ends = h("div", {class: "ends"}, cancel, send);
  const form = h("form", {novalidate: !checked, onsubmit}, h("h2", {id: "dialog-title"}, title), body, ends);
  const dialog = h("dialog", {"aria-labelledby": "dialog-title", id}, form);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask before a dangerous act; resolves to true when it is confirmed. */
function confirmed(title, text, button, kind) {
  return new Promise((resolve) => {
    const dialog = openDialog(title, h("p", {class: "soft"}, text), button, (one) => one.close("yes"), {kind});
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"));
  });
}

// ---- acts on runs ----

const runWords = (run) => "\u201c" + run.scenarioId + "\u201d (" + run.tenantId + " / " + run.envId + ")";
const openRun = (id) => (location.hash = "#/runs/" + encodeURIComponent(id));

async function stopRun(run) {
  const text = runWords(run) + " ends now; its numbers so far are kept.";
  if (!(await confirmed("Stop this test?", text, "Stop test", "danger"))) return;
  if (await attempt(() => api("POST", runPath(run.id, "/stop")))) toast("Stopped.");
}

async function stopAll() {
  const text = "Every running, starting and waiting test that you may touch ends now.";
  if (!(await confirmed("Stop all tests?", text, "Stop all tests", "danger"))) return;
  const answer = await attempt(() => api("POST", "/v1/stop-all", {}));
  if (!answer) return;
  const {stopped, failed} = answer.data;
  if (failed.length) toast(stopped.length + " stopped, " + failed.length + " not yet: " + failed[0].message, "bad");
  else toast(stopped.length ? stopped.length + " stopped." : "Nothing was running.");
}

/** Call with a body; where a protected environment asks for it, confirm and call again with confirm: envId. */
async function callConfirmed(method, path, body, envId, add = (one) => ({...one, confirm: envId})) {
  try {
    return await api(method, path, body);
  } catch (error) {
    const wrong = (error instanceof ApiError && error.body.fields) || {};
    if (!wrong.confirm && !wrong["test.confirm"]) throw error;
    const text = "This test loads a protected environment. Is that meant?";
    const title = "\u201c" + envId + "\u201d is protected";
    if (!(await confirmed(title, text, "Load " + envId, "danger"))) throw error;
    return api(method, path, add(body));
  }
}

async function rerun(run) {
  const users = count(run.targetUsers) + " users";
  const text = runWords(run) + " with " + users + ". It waits in the queue if the cluster is busy.";
  if (!(await confirmed("Start the same test again?", text, "Start test"))) return;
  const answer = await attempt(() => callConfirmed("POST", runPath(run.id, "/rerun"), {queue: true}, run.envId));
  if (answer) openRun(answer.data.id);
}

async function deleteRun(run) {
  const text = runWords(run) + " of " + zonedMoment(run.createdAt) + " and all its numbers are removed for good.";
  if (!(await confirmed("Delete this run?", text, "Delete run", "danger"))) return;
  if (await attempt(() => api("DELETE", runPath(run.id)))) {
    toast("Deleted.");
    if (location.hash.startsWith("#/runs/")) location.hash = "#/";
  }
}

function annotate(run) {
  const text = h("input", {required: true, maxlength: 200, autofocus: true, placeholder: "deployed version 2.1"});
  const body = h("label", {class: "field"}, h("span", {}, "What happened"), text);
  openDialog("Mark this point in time", body, "Mark", async (dialog) => {
    if (await attempt(() => api("POST", runPath(run.id, "/annotations"), {text: text.value}))) dialog.close();
  });
}

function changeUsers(run) {
  const last = (run.usersChanges || []).at(-1) || run;
  const common = {required: true, autocomplete: "off"};
  const users = h("input", {...common, inputmode: "numeric", value: last.targetUsers, autofocus: true, id: "new-users"});
  const started = h("input", {...common, inputmode: "decimal", value: last.spawnRate});
  const field = (label, input) => h("label", {class: "field"}, h("span", {}, label), input);
  const fields = h("div", {class: "three"}, field("Users", users), field("Started per s", started));
  openDialog("Change the users", fields, "Change", async (dialog) => {
    const body = {targetUsers: Number(users.value), spawnRate: Number(started.value)};
    if (await attempt(() => api("POST", runPath(run.id, "/users"), body))) dialog.close();
  });
}

// ---- what people type, as JSON; and back ----

const linesOf = (text) => text.split("\n").map((one) => one.trim()).filter(Boolean);
const wordsOf = (text) => text.split(",").map((one) => one.trim()).filter(Boolean);
const plainText = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** Lines of key=value as an object, undefined for none; throws for a line without =. */
function parsePairs(text) {
  const pairs = {};
  for (const line of linesOf(text)) {
    const sign = line.indexOf("=");
    if (sign < 1) throw new Error("each line is key=value; this one is not: " + line);
    pairs[line.slice(0, sign).trim()] = line.slice(sign + 1).trim();
  }
  return Object.keys(pairs).length ? pairs : undefined;
}

const pairsText = (pairs) => Object.entries(pairs || {}).map(([key, value]) => key + "=" + plainText(value)).join("\n");

/** One threshold a line, as its sentence; {"metric": ...} on a line is the long form. */
function parseThresholds(text) {
  const found = linesOf(text).map((line) => (line.startsWith("{") ? JSON.parse(line) : line));
  return found.length ? found : undefined;
}

/** Users, users/s and duration of texts: {load, problems} by the names of a create. */
function parseLoad(texts, isDurationNeeded) {
  const load = {targetUsers: Number(texts.targetUsers), spawnRate: Number(texts.spawnRate)},
    problems = {};
  if (!Number.isInteger(load.targetUsers) || load.targetUsers < 1) problems.targetUsers = "a whole number from 1";
  if (!(load.spawnRate >= 0.1)) problems.spawnRate = "a number from 0.1";
  if (texts.durationSeconds.trim() || isDurationNeeded) load.durationSeconds = parseSpan(texts.durationSeconds);
  if ("durationSeconds" in load && !(load.durationSeconds >= 1)) {
    const open = isDurationNeeded ? "" : "; empty: until it is stopped";
    problems.durationSeconds = "like 90s, 5m or 1h30m" + open;
  }
  return {load, problems};
}

// ---- forms ----

/** Fields by name, each with its label and a place for what is wrong with it. */
class Fields {
  constructor(inputs) {
    this.inputs = inputs;
    this.slots = {};
    for (const [name, input] of Object.entries(inputs)) input.setAttribute("name", name);
  }
  row(name, label, hint) {
    this.slots[name] = h("span", {class: "wrong"});
    const tag = this.inputs[name].matches("input, select, textarea") ? "label" : "div";
    const about = hint ? h("span", {class: "hint"}, hint) : null;
    return h(tag, {class: "field"}, h("span", {}, label), this.inputs[name], about, this.slots[name]);
  }
  /** Show what is wrong by field; returns the sentences about fields that are not here. */
  showProblems(problems) {
    const rest = {...problems};
    for (const [name, slot] of Object.entries(this.slots)) {
      const why = problems[name] || "";
      delete rest[name];
      setText(slot, why);
      if (!why) this.inputs[name].removeAttribute("aria-invalid");
      else this.inputs[name].setAttribute("aria-invalid", "true");
      const folded = why && slot.closest("details");
      if (folded) folded.open = true;
    }
    return Object.entries(rest).map(([name, why]) => name + ": " + why);
  }
}

/** Rows of users, users/s and duration, for a load in stages. */
class StageRows {
  constructor(stages) {
    this.rows = h("div", {class: "stages"});
    this.box = h("div", {}, this.rows, h("button", {type: "button", class: "small", onclick: () => this.add()}, "Add a stage"));
    for (const stage of stages) this.add(stage);
  }
  add(stage) {
    const last = this.values().at(-1) || {targetUsers: 10, spawnRate: 1, durationSeconds: "1m"};
    const values = stage ? {...stage, durationSeconds: span(stage.durationSeconds)} : last;
    const input = (name, label) =>
      h("input", {"data-name": name, "aria-label": label, value: values[name], autocomplete: "off", size: 6});
    const remove = h("button", {type: "button", class: "small plain", "aria-label": "Remove the stage"}, "\u00d7");
    const inputs = [input("targetUsers", "Users"), input("spawnRate", "Started per s"), input("durationSeconds", "Duration")];
    const row = h("div", {class: "stage"}, inputs[0], " users at ", inputs[1], "/s for ", inputs[2], remove);
    remove.addEventListener("click", () => row.remove());
    this.rows.append(row);
  }
  values() {
    const inputsOf = (row) => [...row.querySelectorAll("input")].map((one) => [one.dataset.name, one.value]);
    return [...this.rows.children].map((row) => Object.fromEntries(inputsOf(row)));
  }
  /** The stages as JSON; throws with the stage that is wrong. */
  read() {
    if (!this.rows.children.length) throw new Error("at least one stage");
    return this.values().map((texts, index) => {
      const {load, problems} = parseLoad(texts, true);
      for (const why of Object.values(problems)) throw new Error("stage " + (index + 1) + ": " + why);
      return load;
    });
  }
}

const LIST_FIELDS = ["userClasses", "tags", "excludeTags"];
const PAIR_FIELDS = ["metadata", "options"];

/** The fields of a create, for a start and for a schedule. given: the body to begin with. */
class TestForm extends Fields {
  /** A form with what the server knows of clusters, scenarios and the last run. */
  static async load(given) {
    const asked = ["/v1/clusters", "/v1/tests?brief=true&limit=100", "/v1/scenarios"];
    const known = await Promise.all(asked.map((path) => get(path).catch(() => [])));
    return new TestForm(given, ...known);
  }

  constructor(given, clusters, recent, known) {
    const last = given || recent[0] || {};
    const places = [...new Map(clusters.map((one) => [JSON.stringify([one.tenantId, one.envId]), one])).values()];
    const isNew = (one) => one.tenantId === last.tenantId && one.envId === last.envId;
    if (given && !places.some(isNew)) places.push({tenantId: given.tenantId, envId: given.envId});
    const start = given || {targetUsers: last.targetUsers || 10, spawnRate: last.spawnRate || 1, durationSeconds: 300};
    const text = (name, more) => h("input", {autocomplete: "off", spellcheck: "false", value: start[name], ...more});
    const list = (name, hint) => text(name, {value: (start[name] || []).join(", "), placeholder: hint});
    const area = (value, hint) => h("textarea", {rows: 2, placeholder: hint, spellcheck: "false"}, value);
    const choice = (pairs, chosen) =>
      h("select", {}, pairs.map(([value, label]) => h("option", {value, selected: value === chosen}, label)));
    const stages = new StageRows(start.stages || []);
    super({
      place: choice(places.map((one, index) => [index, one.tenantId + " / " + one.envId]), given && places.findIndex(isNew)),
      scenarioId: text("scenarioId", {list: "scenarios", maxlength: 256, placeholder: "checkout"}),
      profile: choice([["constant", "Constant users"], ["stages", "In stages"]], start.stages ? "stages" : "constant"),
      targetUsers: text("targetUsers", {inputmode: "numeric"}),
      spawnRate: text("spawnRate", {inputmode: "decimal"}),
      durationSeconds: text("durationSeconds", {value: start.durationSeconds && span(start.durationSeconds), placeholder: "until stopped"}),
      stages: stages.box,
      thresholds: area((start.thresholds || []).map(plainText).join("\n"), "p95ResponseMs < 500\nerrorRate < 1"),
      compareWith: choice([["", "Nothing"], ["baseline", "The baseline"], ["previous", "The run before"]], start.compareWith || ""),
      userClasses: list("userClasses", "all"),
      tags: list("tags", "all"),
      excludeTags: list("excludeTags", "none"),
      host: text("host", {type: "url", placeholder: "the cluster's own"}),
      metadata: area(pairsText(start.metadata), "version=2.1"),
      options: area(pairsText(start.options), "think-time=2"),
    });
    Object.assign(this, {given, places, known, stages, start});
    this.scenarios = known.length ? known.map((one) => one.id) : [...new Set(recent.map((run) => run.scenarioId))];
    this.first = Object.fromEntries(PAIR_FIELDS.map((name) => [name, this.inputs[name].value]));
    this.hasOwnLoad = Boolean(given && (given.targetUsers || given.stages));
    this.box = this.build();
    this.showProfile();
    if (given) this.fill();
  }

  build() {
    const {scenarioId, profile} = this.inputs;
    this.about = h("p", {class: "hint", id: "scenario-about"});
    scenarioId.addEventListener("input", () => this.fill());
    profile.addEventListener("change", () => this.showProfile());
    const row = (...all) => this.row(...all);
    const none = "There is no cluster you may use: the configuration's locustClusters names them.";
    this.constant = h("div", {class: "three load"}, row("targetUsers", "Users"), row("spawnRate", "Users started per s"), row("durationSeconds", "Duration"));
    this.staged = row("stages", "Stages, one after the other");
    const folded = (title, names, ...inside) =>
      h("details", {open: names.some((name) => this.given && this.given[name])}, h("summary", {}, title), h("div", {class: "inside"}, inside));
    return [
      this.places.length ? null : h("p", {class: "note warn"}, none),
      row("place", "Tenant / environment"),
      row("scenarioId", "Scenario"),
      h("datalist", {id: "scenarios"}, this.scenarios.map((name) => h("option", {value: name}))),
      this.about,
      row("profile", "Load"),
      this.constant,
      this.staged,
      folded("Thresholds and comparison", ["thresholds", "compareWith"],
        row("thresholds", "Thresholds, one on each line", "The verdict is failed when one does not hold at the end."),
        row("compareWith", "Compare with")),
      folded("What is run, and against what", [...LIST_FIELDS, "host", "options"],
        h("div", {class: "three"}, row("userClasses", "User classes"), row("tags", "Tags"), row("excludeTags", "Tags left out")),
        row("host", "Target system"),
        row("options", "Custom options of the locustfile, key=value on each line")),
      folded("Metadata", ["metadata"], row("metadata", "Metadata, key=value on each line")),
    ];
  }

  get scenario() {
    return this.known.find((one) => one.id === this.inputs.scenarioId.value.trim());
  }

  /** Put in what the chosen scenario of the configuration gives; its stages stand for the three numbers. */
  fill() {
    const {inputs, scenario} = this,
      {stages = [], thresholds = []} = scenario || {};
    const facts = [scenario && scenario.description, stages.length ? stages.length + " stages" : ""];
    setText(this.about, facts.filter(Boolean).join("; "));
    for (const name of ["targetUsers", "spawnRate", "durationSeconds"]) {
      const value = !stages.length && scenario && scenario[name];
      if (value && !(this.hasOwnLoad && inputs[name].value)) inputs[name].value = name === "durationSeconds" ? span(value) : value;
    }
    const own = [...inputs.profile.options].find((option) => option.value === "scenario");
    if (stages.length && !own) inputs.profile.prepend(h("option", {value: "scenario"}, "The stages of the scenario"));
    if (!stages.length && own) own.remove();
    if (stages.length && !this.hasOwnLoad) inputs.profile.value = "scenario";
    inputs.thresholds.placeholder = thresholds.join("\n") || "p95ResponseMs < 500\nerrorRate < 1";
    inputs.host.placeholder = (scenario && scenario.host) || "the cluster's own";
    this.showProfile();
  }

  showProfile() {
    const profile = this.inputs.profile.value;
    this.constant.hidden = profile !== "constant";
    this.staged.hidden = profile !== "stages";
    for (const name of ["targetUsers", "spawnRate", "durationSeconds"]) this.inputs[name].disabled = profile !== "constant";
    if (profile === "stages" && !this.stages.values().length) this.stages.add();
  }

  /** The body of a create as it was typed, and what is wrong with it by field. */
  read() {
    const {inputs} = this,
      problems = {},
      place = this.places[inputs.place.value] || {};
    const body = {...this.given, tenantId: place.tenantId, envId: place.envId, scenarioId: inputs.scenarioId.value.trim()};
    const set = (name, work) => {
      try {
        body[name] = work();
      } catch (error) {
        problems[name] = error instanceof SyntaxError ? "this line is no JSON: " + error.message : error.message;
      }
      if (body[name] === undefined || body[name] === "") delete body[name];
    };
    const listOf = (text) => (wordsOf(text).length ? wordsOf(text) : undefined);
    for (const name of ["host", "compareWith"]) set(name, () => inputs[name].value.trim());
    for (const name of LIST_FIELDS) set(name, () => listOf(inputs[name].value));
    for (const name of PAIR_FIELDS) {
      const isChanged = inputs[name].value !== this.first[name]; // else numbers and lists stay what they are
      set(name, () => (isChanged ? parsePairs(inputs[name].value) : this.start[name]));
    }
    set("thresholds", () => parseThresholds(inputs.thresholds.value));
    for (const name of ["targetUsers", "spawnRate", "durationSeconds", "stages"]) delete body[name];
    if (inputs.profile.value === "stages") set("stages", () => this.stages.read());
    if (inputs.profile.value === "constant") {
      const texts = (name) => [name, inputs[name].value];
      const {load, problems: wrong} = parseLoad(Object.fromEntries(["targetUsers", "spawnRate", "durationSeconds"].map(texts)));
      Object.assign(body, load);
      Object.assign(problems, wrong);
    }
    return {body, problems};
  }
}

/**
 * Send a form: what is wrong is shown at its fields, the first of them gets the focus.
 * check() gives the problems found here, send() calls the server; true when it was taken.
 */
async function sendForm(dialog, forms, alertBox, problems, send) {
  const show = (wrong, message) => {
    const rest = forms.flatMap(([form, prefix]) => {
      const own = Object.entries(wrong).filter(([name]) => name.startsWith(prefix) && (prefix || !name.includes(".")));
      return form.showProblems(Object.fromEntries(own.map(([name, why]) => [name.slice(prefix.length), why])));
    });
    setText(alertBox, [...rest, message].filter(Boolean).join("; "));
    const bad = dialog.querySelector("[aria-invalid]");
    if (bad) (bad.matches("div") ? bad.querySelector("input") || bad : bad).focus();
  };
  show(problems, "");
  if (Object.keys(problems).length) return null;
  try {
    return await send();
  } catch (error) {
    const body = error.body || {};
    show(body.fields || {}, body.fields ? "" : error instanceof ApiError ? error.message : "Load Manager did not answer.");
    if (body.activeRunId) {
      const link = {href: "#/runs/" + encodeURIComponent(body.activeRunId), onclick: () => dialog.close()};
      alertBox.append(" ", h("a", link, "Open the run that has it"));
    }
    return null;
  }
}

async function startDialog() {
  const form = await TestForm.load();
  const queue = h("input", {type: "checkbox"});
  const problem = h("div", {class: "wrong", role: "alert"});
  const wait = h("label", {class: "check"}, queue, "Wait in the queue if the cluster is busy");
  const submit = async (dialog) => {
    const {body, problems} = form.read();
    if (queue.checked) body.queue = true;
    const answer = await sendForm(dialog, [[form, ""]], problem, problems, () => callConfirmed("POST", "/v1/tests", body, body.envId));
    if (!answer) return;
    dialog.close();
    openRun(answer.data.id);
  };
  openDialog("Start a test", [...form.box, wait, problem], "Start test", submit, {id: "start-dialog", checked: false});
  form.inputs.scenarioId.focus();
}

// ---- schedules ----

const POLICIES = [
  ["Forbid", "Leave this one out"],
  ["Queue", "Wait until the other has ended"],
  ["Replace", "Stop the other and start"],
];
const CRON_EXAMPLES = ["0 2 * * *", "0 2 * * mon-fri", "0 6 * * mon", "30 * * * *", "@hourly", "@daily", "@weekly", "@monthly"];
const schedulePath = (id, rest) => "/v1/schedules/" + encodeURIComponent(id) + (rest || "");
const scheduleName = (one) => one.description || one.test.scenarioId + " on " + one.tenantId + " / " + one.envId;

/** A time as a field of the browser wants it: local, without a zone. */
function localInput(text) {
  const when = new Date(at(text));
  return isNaN(when) ? "" : new Date(when - when.getTimezoneOffset() * 60000).toISOString().slice(0, 16);
}

function scheduleFields(given) {
  const option = (value, label, chosen) => h("option", {value, selected: value === chosen}, label);
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
  return new Fields({
    description: h("input", {value: given.description, maxlength: 200, autocomplete: "off", placeholder: "nightly checkout"}),
    kind: h("select", {}, option("cron", "Repeatedly, by cron", ""), option("runAt", "Once", given.runAt && "runAt")),
    cron: h("input", {value: given.cron || "", list: "crons", autocomplete: "off", spellcheck: "false", placeholder: "0 2 * * mon-fri"}),
    timezone: h("input", {value: given.timezone || zone, list: "zones", autocomplete: "off", spellcheck: "false"}),
    runAt: h("input", {type: "datetime-local", value: localInput(given.runAt)}),
    concurrencyPolicy: h("select", {}, POLICIES.map(([value, label]) => option(value, label, given.concurrencyPolicy))),
  });
}

/** Make a schedule, or change the given one. */
async function scheduleDialog(given, done) {
  const form = await TestForm.load(given && given.test);
  const fields = scheduleFields(given || {}),
    {inputs} = fields;
  const zones = Intl.supportedValuesOf ? ["UTC", ...Intl.supportedValuesOf("timeZone")] : ["UTC"];
  const list = (id, values) => h("datalist", {id}, values.map((value) => h("option", {value})));
  const again = h("div", {class: "two-columns"}, fields.row("cron", "When, as cron", "minute hour day month weekday"), fields.row("timezone", "Time zone"));
  const once = fields.row("runAt", "At, in this browser's zone (" + ZONE + ")");
  const showKind = () => {
    again.hidden = inputs.kind.value !== "cron";
    once.hidden = !again.hidden;
  };
  inputs.kind.addEventListener("change", showKind);
  showKind();
  const coming = given && given.next.length ? "Next: " + given.next.map((one) => scheduledTime(one, given.timezone)).join("; ") : "";
  const problem = h("div", {class: "wrong", role: "alert"});
  const body = [
    fields.row("description", "Name"),
    fields.row("kind", "Start"),
    again,
    once,
    list("crons", CRON_EXAMPLES),
    list("zones", zones),
    coming ? h("p", {class: "hint"}, coming) : null,
    fields.row("concurrencyPolicy", "If another run of it is still running"),
    h("h3", {}, "The test"),
    form.box,
    problem,
  ];
  const submit = async (dialog) => {
    const {body: wanted, problems} = readSchedule(inputs, form, given);
    const forms = [[fields, ""], [form, "test."]];
    const confirm = (one) => ({...one, test: {...one.test, confirm: one.test.envId}});
    const [method, path] = given ? ["PATCH", schedulePath(given.id)] : ["POST", "/v1/schedules"];
    const send = () => callConfirmed(method, path, wanted, wanted.test.envId, confirm);
    const answer = await sendForm(dialog, forms, problem, problems, send);
    if (!answer) return;
    const [next] = answer.data.next;
    toast("Saved. " + (next ? "Next: " + scheduledTime(next, answer.data.timezone) + "." : "It does not start by itself now."));
    dialog.close();
    done();
  };
  openDialog(given ? "Change the schedule" : "New schedule", body, given ? "Save" : "Create schedule", submit, {id: "schedule-dialog", checked: false});
}

/** The body of a schedule as it was typed, and what is wrong with it by field. */
function readSchedule(inputs, form, given) {
  const {body: test, problems: wrong} = form.read();
  const problems = Object.fromEntries(Object.entries(wrong).map(([name, why]) => ["test." + name, why]));
  const body = {test, concurrencyPolicy: inputs.concurrencyPolicy.value};
  if (inputs.description.value.trim() || given) body.description = inputs.description.value.trim();
  if (inputs.kind.value === "cron") {
    body.cron = inputs.cron.value.trim();
    body.timezone = inputs.timezone.value.trim();
    if (!body.cron) problems.cron = "five fields such as 0 2 * * mon-fri, or @daily";
  } else {
    const when = new Date(inputs.runAt.value);
    if (isNaN(when)) problems.runAt = "a date and a time";
    else body.runAt = when.toISOString();
  }
  return {body, problems};
}

async function deleteSchedule(one, done) {
  const text = "\u201c" + scheduleName(one) + "\u201d starts no more runs; those it started stay.";
  if (!(await confirmed("Delete this schedule?", text, "Delete schedule", "danger"))) return;
  if (await attempt(() => api("DELETE", schedulePath(one.id)))) toast("Deleted.");
  done();
}
"""

PAGE_OVERVIEW_JS = r"""
// ---- sign-in ----

function showSignIn(message) {
  live.stop();
  if (view && view.close) view.close();
  view = null;
  session = null;
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  showTop();
  document.title = "Sign in \u2013 Load Manager";
  const token = h("input", {type: "password", id: "token", required: true, autocomplete: "current-password", autofocus: true, spellcheck: "false"});
  const problem = h("div", {class: "wrong", role: "alert"}, message && message.includes("Authorization") ? "" : message || "");
  const signOn = h("a", {class: "button", id: "sign-on", href: "session/oidc", hidden: true}, "Single sign-on");
  async function submit(event) {
    event.preventDefault();
    setText(problem, "");
    try {
      session = (await api("POST", "/session", {token: token.value.trim()})).data;
      start();
    } catch (error) {
      setText(problem, error instanceof ApiError ? error.message : "Load Manager did not answer.");
      token.select();
    }
  }
  $("main").replaceChildren(
    h(
      "form",
      {class: "panel sign-in", onsubmit: submit, novalidate: true},
      h("h1", {}, "Sign in"),
      h("p", {class: "soft"}, "With an API token of this Load Manager. It is not kept in the browser: you get a cookie for 12 hours."),
      h("label", {class: "field"}, h("span", {}, "API token"), token),
      problem,
      h("button", {class: "primary"}, "Sign in"),
      signOn,
    ),
  );
  token.focus();
  get("/session").then((known) => (signOn.hidden = !known.singleSignOn), () => {});
}

async function signOut() {
  await attempt(() => api("DELETE", "/session"));
  showSignIn("");
}

const mayAct = () => session && session.role !== "viewer";

function showTop() {
  $("top").replaceChildren(
    h("a", {class: "brand", href: "#/"}, "Load Manager"),
    ...(session
      ? [
          h("span", {class: "live on", id: "live"}, "Live"),
          h("span", {class: "space"}),
          h("a", {class: "quiet", href: "docs", title: "Reference of the API, to try it"}, "API"),
          mayAct() ? h("button", {class: "primary", id: "start", onclick: startDialog}, "Start a test") : null,
          mayAct() ? h("button", {class: "danger", id: "stop-all", onclick: stopAll}, "Stop all") : null,
          h("span", {class: "who"}, session.anonymous ? "no sign-in needed" : session.name + ", " + session.role),
          session.anonymous ? null : h("button", {class: "plain", id: "sign-out", onclick: signOut}, "Sign out"),
        ].filter(Boolean)
      : []),
  );
}

// ---- tables ----

function scrollBox(label, table) {
  return h("div", {class: "scroll panel", tabindex: 0, role: "region", "aria-label": label}, table);
}

/**
 * A table that is built again when it changes. heads: [text, class]; rows: lists of [text or node, class].
 * On a narrow screen each row is a card, its first cell the title.
 */
function plainTable(label, heads, rows) {
  const cell = ([content, kind], index) =>
    h("td", {class: kind || null, "data-label": heads[index][0]}, content instanceof Node ? content : String(content));
  const head = heads.map(([text, kind]) => h("th", {scope: "col", class: kind || null}, text));
  const body = rows.map((cells) => h("tr", {}, cells.map(cell)));
  return scrollBox(label, h("table", {class: "cards"}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

/** Rows of a tbody kept by key, so that an update keeps focus and selection. */
class Rows {
  constructor(body, make) {
    this.body = body;
    this.make = make;
    this.known = new Map();
  }
  show(items, keyOf) {
    const wanted = new Set(items.map(keyOf));
    for (const [key, row] of this.known) {
      if (!wanted.has(key)) {
        row.element.remove();
        this.known.delete(key);
      }
    }
    let place = this.body.firstElementChild;
    for (const item of items) {
      let row = this.known.get(keyOf(item));
      if (!row) this.known.set(keyOf(item), (row = this.make(item)));
      row.update(item);
      if (row.element === place) place = place.nextElementSibling;
      else this.body.insertBefore(row.element, place);
    }
  }
}

const RUN_COLUMNS = [
  ["Scenario"],
  ["Status"],
  ["Verdict"],
  ["Environment"],
  ["Cluster"],
  ["Users", "num"],
  ["RPS", "num"],
  ["Failures", "num"],
  ["95%ile (ms)", "num"],
  ["Time", "num"],
  ["Started (" + ZONE + ")"],
];

function runRow(first) {
  let run = first;
  const link = h("a", {href: "#/runs/" + encodeURIComponent(run.id), class: "name two"});
  const [badge, verdict, trust] = [0, 1, 2].map(() => h("span", {class: "badge"}));
  const [place, cluster, none] = ["", " soft", " soft"].map((kind) => h("span", {class: "name two" + kind}));
  const [users, rps, failures, p95, time, started] = Array.from({length: 6}, () => h("span"));
  const bar = meter("Progress");
  const act = (label, work, kind) => h("button", {class: "small " + (kind || ""), onclick: () => work(run)}, label);
  const [stop, again, remove] = [act("Stop", stopRun), act("Run again", rerun), act("Delete", deleteRun, "plain")];
  const contents = [link, badge, [verdict, " ", trust, none], place, cluster, users, rps, failures, p95, [time, bar.box], started];
  const kinds = {0: "wide", 3: "wide", 4: "wide"};
  const cells = contents.map((content, index) => {
    const [label, kind] = RUN_COLUMNS[index];
    return h("td", {class: kind || kinds[index] || null, "data-label": label}, content);
  });
  const element = h("tr", {"data-run": run.id}, cells, h("td", {class: "acts"}, mayAct() ? [stop, again, remove] : []));
  return {
    element,
    update(newRun) {
      run = newRun;
      const numbers = run.lastMetrics || {};
      showStatus(badge, run);
      showVerdict(verdict, run);
      showTrust(trust, run);
      setText(none, verdict.hidden && trust.hidden ? NONE : "");
      setText(link, run.scenarioId);
      setText(place, run.tenantId + " / " + run.envId);
      setText(cluster, run.locustClusterId || NONE);
      for (const cut of [link, place, cluster]) cut.title = cut.textContent.length > 40 ? cut.textContent : "";
      setText(users, isActive(run) && isNumber(numbers.currentUsers) ? count(numbers.currentUsers) + " / " + usersText(run) : usersText(run));
      setText(rps, rate(numbers.totalRps));
      setText(failures, percent(numbers.errorRate));
      setClass(cells[7], numbers.errorRate > 0 ? "num fails" : "num");
      setText(p95, millis(numbers.p95ResponseMs));
      setText(time, timingText(run));
      const {elapsed, total} = timing(run);
      bar.box.hidden = !isActive(run) || isNaN(elapsed / total);
      bar.set(elapsed / total);
      setText(started, moment(run.startedAt || run.createdAt));
      started.title = run.startedAt || run.createdAt;
      stop.hidden = !isActive(run);
      stop.disabled = run.status === "Stopping";
      again.hidden = remove.hidden = isActive(run);
    },
  };
}

function runTable(label) {
  const body = h("tbody");
  const heads = [...RUN_COLUMNS, [h("span", {class: "unseen"}, "Actions"), "num"]];
  const head = heads.map(([text, kind]) => h("th", {scope: "col", class: kind || null}, text));
  const table = h("table", {class: "cards"}, h("thead", {}, h("tr", {}, head)), body);
  return {box: scrollBox(label, table), rows: new Rows(body, runRow)};
}

// ---- overview ----

const PAGE_SIZE = 25;
const MOST_ROWS = 200; // of running tests

class Overview {
  constructor() {
    this.active = new Map();
    this.recent = [];
    this.cursors = [""]; // of the pages up to the one shown
    this.next = null;
    this.asked = 0;
    this.filters = {search: "", status: "", place: ""};
    this.build();
    this.timers = [setInterval(() => this.tick(), 1000), setInterval(() => document.hidden || (this.loadClusters(), this.loadSchedules()), 5000)];
  }

  build() {
    document.title = "Load Manager";
    const change = (name) => (event) => {
      this.filters[name] = event.target.value;
      this.cursors = [""];
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.loadRuns(), name === "search" ? 200 : 0);
    };
    this.search = h("input", {
      type: "search",
      id: "filter",
      placeholder: "Filter runs  ( / )",
      "aria-label": "Filter runs by scenario, tenant, cluster or id",
      oninput: change("search"),
    });
    this.status = h(
      "select",
      {"aria-label": "Status", onchange: change("status")},
      [
        ["", "All states"],
        ["Pending,Running,Stopping", "Running"],
        ["Finished", "Finished"],
        ["Failed", "Failed"],
      ].map(([value, text]) => h("option", {value}, text)),
    );
    this.place = h("select", {"aria-label": "Tenant and environment", onchange: change("place")}, h("option", {value: ""}, "All tenants"));
    this.clear = h("button", {class: "plain", hidden: true, onclick: () => this.clearFilters()}, "Clear");
    this.clusterBox = h("div", {class: "clusters"});
    this.clusterRows = new Rows(this.clusterBox, clusterCard);
    this.running = runTable("Running tests");
    this.finished = runTable("Recent runs");
    this.runningEmpty = h("div", {class: "panel empty"}, h("p", {}, "Nothing is running."));
    this.recentEmpty = h("div", {class: "panel empty", hidden: true});
    this.runningCount = h("span", {class: "count"});
    this.scheduleSection = h("section", {"aria-labelledby": "h-schedules", class: "schedules", hidden: true});
    this.newer = h("button", {class: "small", onclick: () => this.turn(-1)}, "Newer");
    this.older = h("button", {class: "small", onclick: () => this.turn(1)}, "Older");
    this.pageText = h("span");
    this.pages = h("div", {class: "pages"}, this.pageText, this.newer, this.older);
    this.runningSection = h(
      "section",
      {"aria-labelledby": "h-running", class: "runs"},
      h("div", {class: "head"}, h("h2", {id: "h-running"}, "Running", this.runningCount)),
      this.running.box,
      this.runningEmpty,
    );
    this.recentSection = h(
      "section",
      {"aria-labelledby": "h-recent", class: "runs"},
      h("div", {class: "head"}, h("h2", {id: "h-recent"}, "Recent runs")),
      this.finished.box,
      this.recentEmpty,
      this.pages,
    );
    $("main").replaceChildren(
      h("h1", {class: "unseen"}, "Load tests"),
      h("section", {"aria-labelledby": "h-clusters"}, h("div", {class: "head"}, h("h2", {id: "h-clusters"}, "Clusters")), this.clusterBox),
      h("section", {}, h("div", {class: "bar", role: "search"}, this.search, this.status, this.place, this.clear)),
      this.runningSection,
      this.recentSection,
      this.scheduleSection,
    );
    this.running.box.hidden = true;
  }

  open() {
    live.follow("/v1/events", this);
    this.fallback = setTimeout(() => this.refresh(), 700);
  }
  close() {
    this.timers.forEach(clearInterval);
    clearTimeout(this.fallback);
    clearTimeout(this.later);
    clearTimeout(this.typing);
    this.closed = true;
  }
  onReady() {
    clearTimeout(this.fallback);
    this.refresh();
  }
  refresh() {
    this.loadRuns();
    this.loadClusters();
    this.loadSchedules();
  }

  async loadSchedules() {
    const schedules = await get("/v1/schedules").catch(() => null);
    const text = JSON.stringify(schedules);
    if (this.closed || !schedules || text === this.scheduleText) return;
    this.scheduleText = text;
    const heads = [["Schedule"], ["When"], ["Next"], ["Environment"], ["Last run"], ["", "num"]];
    const rows = schedules.map((one) => [
      [h("span", {class: "name"}, scheduleName(one)), "wide title"],
      [this.scheduleTimes(one), "wide"],
      [this.scheduleNext(one)],
      [one.tenantId + " / " + one.envId, "name"],
      [this.scheduleLast(one), "wide"],
      [h("span", {}, mayAct() ? this.scheduleActs(one) : []), "acts"],
    ]);
    const add = h("button", {id: "new-schedule", onclick: () => scheduleDialog(null, () => this.loadSchedules())}, "New schedule");
    const head = h("div", {class: "head"}, h("h2", {id: "h-schedules"}, "Schedules"), h("span", {class: "space"}), mayAct() ? add : null);
    const empty = h("div", {class: "panel empty"}, "No schedule: a schedule starts a test by itself, every night for example.");
    this.scheduleSection.replaceChildren(head, rows.length ? plainTable("Schedules", heads, rows) : empty);
    this.scheduleSection.hidden = false;
  }

  scheduleTimes(one) {
    if (!one.cron) return "once";
    return h("span", {}, h("code", {}, one.cron), " ", h("span", {class: "soft"}, one.timezone));
  }

  scheduleNext(one) {
    if (one.paused) return h("span", {class: "badge warn"}, "Paused");
    const [next, ...later] = one.next.map((time) => scheduledTime(time, one.timezone));
    if (!next) return h("span", {class: "soft"}, "does not start again");
    if (!later.length) return next;
    return h("details", {class: "more"}, h("summary", {}, next), later.map((time) => h("div", {}, time)));
  }

  scheduleLast(one) {
    if (!one.lastTime && !one.lastOutcome) return NONE;
    const words = [one.lastOutcome, one.lastTime && scheduledTime(one.lastTime, one.timezone)].filter(Boolean).join(", ");
    return one.lastRunId ? h("a", {href: "#/runs/" + encodeURIComponent(one.lastRunId)}, words) : words;
  }

  scheduleActs(one) {
    const again = () => this.loadSchedules();
    const act = (text, work) => h("button", {class: "small", onclick: async () => (await attempt(work), again())}, text);
    const start = act("Run now", async () => openRun((await api("POST", schedulePath(one.id, "/run"))).data.id));
    if (one.readOnly) return [h("span", {class: "hint"}, "from the configuration "), start];
    return [
      start,
      act(one.paused ? "Resume" : "Pause", () => api("PATCH", schedulePath(one.id), {paused: !one.paused})),
      h("button", {class: "small", onclick: () => scheduleDialog(one, again)}, "Edit"),
      h("button", {class: "small plain", onclick: () => deleteSchedule(one, again)}, "Delete"),
    ];
  }

  clearFilters() {
    this.filters = {search: "", status: "", place: ""};
    this.search.value = this.status.value = this.place.value = "";
    this.cursors = [""];
    this.loadRuns();
  }

  query(statuses, limit) {
    const wanted = new URLSearchParams({brief: "true", limit, status: statuses});
    if (this.filters.search.trim()) wanted.set("search", this.filters.search.trim());
    if (this.filters.place) {
      const [tenant, env] = JSON.parse(this.filters.place);
      wanted.set("tenantId", tenant);
      wanted.set("envId", env);
    }
    return wanted;
  }

  /** Does the run pass the filters? As the server decides, for what events bring. */
  takes(run) {
    const word = this.filters.search.trim().toLowerCase();
    const place = !this.filters.place || this.filters.place === JSON.stringify([run.tenantId, run.envId]);
    return (
      place &&
      (!word ||
        [run.scenarioId, run.tenantId, run.envId, run.locustClusterId, run.createdBy, run.id].some((text) => text.toLowerCase().includes(word)))
    );
  }

  async loadRuns() {
    const asked = ++this.asked,
      wants = this.filters.status;
    const older = this.query(wants && !wants.includes("Running") ? wants : "Finished,Failed", PAGE_SIZE);
    if (this.cursors.at(-1)) older.set("cursor", this.cursors.at(-1));
    try {
      const [active, recent] = await Promise.all([
        !wants || wants.includes("Running") ? api("GET", "/v1/tests?" + this.query(ACTIVE.join(","), MOST_ROWS)) : {data: []},
        wants.includes("Running") ? {data: [], link: null} : api("GET", "/v1/tests?" + older),
      ]);
      if (asked !== this.asked || this.closed) return;
      this.active = new Map(active.data.map((run) => [run.id, run]));
      this.recent = recent.data;
      const next = /[?&]cursor=([^&>]+)/.exec(recent.link || "");
      this.next = next && decodeURIComponent(next[1]);
      this.show();
    } catch (error) {
      if (error instanceof ApiError && error.status !== 401) toast(error.message, "bad");
    }
  }

  async loadClusters() {
    try {
      const clusters = await get("/v1/clusters");
      if (this.closed) return;
      this.clusters = clusters;
      this.clusterRows.show(clusters.length ? clusters : [null], (one) => (one ? one.id : ""));
      const places = [...new Set(clusters.map((one) => JSON.stringify([one.tenantId, one.envId])))];
      for (const place of places.slice(this.place.options.length - 1)) this.place.append(h("option", {value: place}, JSON.parse(place).join(" / ")));
    } catch (error) {
      /* the banner says it */
    }
  }

  turn(step) {
    if (step < 0) this.cursors.pop();
    else this.cursors.push(this.next);
    this.loadRuns();
  }

  onEvent(kind, data) {
    if (kind === "deleted") {
      if (this.active.delete(data.id) || this.recent.some((run) => run.id === data.id)) this.loadLater();
      return;
    }
    if (kind !== "run" || (!this.takes(data) && !this.active.has(data.id))) return;
    const known = this.active.get(data.id);
    if (!known || known.status !== data.status) this.loadClustersLater();
    if (isActive(data) && this.takes(data)) {
      const wants = this.filters.status;
      if (wants && !wants.includes("Running")) return;
      if (!known) this.active = new Map([[data.id, data], ...this.active]);
      else this.active.set(data.id, data);
      this.showLater();
      return;
    }
    if (known) say(data.scenarioId + " is " + data.status);
    this.active.delete(data.id);
    const index = this.recent.findIndex((run) => run.id === data.id);
    if (index >= 0) this.recent[index] = data;
    else this.loadLater();
    this.showLater();
  }

  showLater() {
    if (!this.drawing)
      this.drawing = requestAnimationFrame(() => {
        this.drawing = 0;
        this.show();
      });
  }
  loadLater() {
    clearTimeout(this.later);
    this.later = setTimeout(() => this.loadRuns(), 150);
  }
  loadClustersLater() {
    clearTimeout(this.laterClusters);
    this.laterClusters = setTimeout(() => this.loadClusters(), 300);
  }
  tick() {
    if (this.active.size) this.show();
  }

  show() {
    if (this.closed) return;
    const filtered = this.filters.search.trim() || this.filters.status || this.filters.place,
      wants = this.filters.status;
    const active = [...this.active.values()];
    this.clear.hidden = !filtered;
    this.running.rows.show(active.slice(0, MOST_ROWS), (run) => run.id);
    this.finished.rows.show(this.recent, (run) => run.id);
    setText(this.runningCount, active.length > MOST_ROWS ? "the newest " + MOST_ROWS : active.length || "");
    this.running.box.hidden = !active.length;
    this.runningEmpty.hidden = active.length > 0;
    this.runningSection.hidden = wants && !wants.includes("Running");
    this.recentSection.hidden = wants.includes("Running");
    this.finished.box.hidden = !this.recent.length;
    this.recentEmpty.hidden = this.recent.length > 0;
    setText(this.recentEmpty, filtered ? "No run matches the filters." : "No finished run yet. Start a test, and its numbers stay here.");
    this.newer.disabled = this.cursors.length < 2;
    this.older.disabled = !this.next;
    this.pages.hidden = this.newer.disabled && this.older.disabled;
    setText(this.pageText, "Page " + this.cursors.length);
  }
}

// What a cluster's state means for who wants to start a test: word, colour, more.
const CLUSTER_STATES = {
  ready: ["Idle", "good", "ready for a test"],
  stopped: ["Idle", "good", "ready for a test"],
  asleep: ["Asleep", "", "starts when a run needs it"],
  spawning: ["Starting users", "busy", "a test that Load Manager did not start"],
  running: ["Running", "busy", "a test that Load Manager did not start"],
  stopping: ["Stopping", "warn", "a test is just ending"],
  cleanup: ["Stopping", "warn", "a test is just ending"],
  unreachable: ["Unreachable", "bad", ""],
  missing: ["Missing", "bad", ""],
};

function clusterState(one) {
  const isIdle = one.state === "ready" || one.state === "stopped";
  if (isIdle && one.activeRunId) return ["In use", "busy", ""];
  if (isIdle && one.workers.length && one.workers.every((worker) => worker.state === "missing")) return ["No workers", "bad", ""];
  return CLUSTER_STATES[one.state] || [capital(one.state), "warn", ""];
}

function clusterCard(first) {
  if (!first)
    return {element: h("div", {class: "panel empty"}, "No cluster is configured: locustClusters in the configuration names them."), update() {}};
  const name = h("span", {class: "name title"}),
    badge = h("span", {class: "badge"}),
    place = h("span", {class: "name soft"});
  const workers = h("dd"),
    users = h("dd"),
    cpu = h("span"),
    bar = meter("Highest CPU of a worker"),
    link = h("a", {class: "name", hidden: true}),
    idle = h("span", {class: "soft"});
  const problem = h("div", {class: "problem", hidden: true});
  const element = h(
    "div",
    {class: "panel cluster"},
    h("div", {class: "row"}, name, badge),
    h("div", {class: "row"}, place),
    h(
      "dl",
      {},
      h("dt", {}, "Workers"),
      workers,
      h("dt", {}, "Users"),
      users,
      h("dt", {}, "CPU"),
      h("dd", {class: "cpu"}, cpu, bar.box),
      h("dt", {}, ""),
      h("dd"),
    ),
    h("div", {class: "row"}, link, idle),
    problem,
  );
  return {
    element,
    update(one) {
      setText(name, one.id);
      name.title = one.id;
      setText(place, one.tenantId + " / " + one.envId);
      const [word, kind] = clusterState(one);
      setText(badge, word);
      setClass(badge, "badge " + kind);
      badge.title = "Locust says: " + one.state;
      const alive = one.workers.filter((worker) => worker.state !== "missing");
      setText(workers, one.state === "unreachable" ? NONE : alive.length + (alive.length < one.workers.length ? " of " + one.workers.length : ""));
      setText(users, count(one.userCount));
      const hottest = Math.max(...alive.map((worker) => worker.cpuPercent).filter(isNumber));
      setText(cpu, isFinite(hottest) ? Math.round(hottest) + "%" : NONE);
      bar.box.hidden = !isFinite(hottest);
      setClass(bar.box, hottest > 90 ? "meter hot" : "meter");
      bar.set(hottest / 100);
      link.hidden = !one.activeRunId;
      idle.hidden = Boolean(one.activeRunId) || one.state === "unreachable";
      setText(idle, clusterState(one)[2] || "");
      if (one.activeRunId) {
        const run = view && view.active && view.active.get(one.activeRunId);
        link.href = "#/runs/" + encodeURIComponent(one.activeRunId);
        setText(link, run ? run.scenarioId : "run " + one.activeRunId.slice(0, 8));
      }
      problem.hidden = !one.problem;
      setText(problem, one.problem || "");
    },
  };
}
"""

PAGE_CHARTS_JS = r"""
// ---- charts ----

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400];

/** A round step that gives about `most` ticks up to `top`. */
function niceStep(top, most) {
  const raw = top / most,
    power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw);
}

function shortNumber(value) {
  if (value >= 1e6) return formats[value % 1e6 ? 1 : 0].format(value / 1e6) + "M";
  if (value >= 1e4) return formats[value % 1e3 ? 1 : 0].format(value / 1e3) + "k";
  return value % 1 ? String(Math.round(value * 100) / 100) : formats[0].format(value);
}

/** Charts over one time axis (seconds since the start): same zoom, same hover. */
class ChartGroup {
  constructor(onZoom) {
    this.onZoom = onZoom;
    this.charts = [];
    this.points = []; // {t, ...values}, by time
    this.other = []; // points of another run, drawn faintly below
    this.marks = []; // {t, text, kind}
    this.end = 1;
    this.zoom = null; // [from, to]
    this.hover = null;
    this.resize = new ResizeObserver(() => this.draw());
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    this.onTheme = () => this.draw();
    this.theme.addEventListener("change", this.onTheme);
    this.reset = h("button", {class: "small", hidden: true, onclick: () => this.setZoom(null)}, "Reset zoom");
  }
  add(chart) {
    this.charts.push(chart);
    this.resize.observe(chart.canvas);
    return chart;
  }
  close() {
    this.resize.disconnect();
    this.theme.removeEventListener("change", this.onTheme);
  }
  range() {
    return this.zoom || [0, Math.max(1, this.end)];
  }
  setZoom(zoom) {
    this.zoom = zoom;
    this.reset.hidden = !zoom;
    say(zoom ? "Zoomed to " + clock(zoom[0]) + " to " + clock(zoom[1]) : "Whole run");
    this.onZoom(zoom);
    this.draw();
  }
  setHover(t, from) {
    this.hover = t;
    this.hoverFrom = from;
    this.draw();
  }
  draw() {
    if (!this.drawing)
      this.drawing = requestAnimationFrame(() => {
        this.drawing = 0;
        this.charts.forEach((chart) => chart.draw());
      });
  }
  /** A series' value at a point, or the nearest one within 15 s: not every sample has every figure. */
  value(key, index) {
    const points = this.points,
      close = (point) => point && Math.abs(point.t - points[index].t) <= 15;
    for (let away = 0; close(points[index - away]) || close(points[index + away]); away++) {
      for (const point of [points[index - away], points[index + away]]) if (close(point) && isNumber(point[key])) return point[key];
    }
    return null;
  }
  /** The point nearest to t. */
  nearest(t) {
    const points = this.points;
    let low = 0,
      high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle].t < t) low = middle + 1;
      else high = middle;
    }
    if (low > 0 && t - points[low - 1].t < points[low].t - t) low--;
    return low;
  }
}

class Chart {
  /** series: [{key, label, color (a CSS variable), dash}]; format: of one value. */
  constructor(group, title, unit, series, format) {
    Object.assign(this, {group, title, unit, series: series.map((one) => ({...one, on: true})), format});
    this.canvas = h("canvas", {
      tabindex: 0,
      role: "img",
      onkeydown: (event) => this.onKey(event),
      onpointerdown: (event) => this.onDown(event),
      onpointermove: (event) => this.onMove(event),
      onpointerup: (event) => this.onUp(event),
      onpointercancel: () => {
        this.drag = null;
      },
      onpointerleave: () => {
        if (!this.drag) group.setHover(null);
      },
      ondblclick: () => group.setZoom(null),
      onblur: () => group.setHover(null),
    });
    this.tip = h("div", {class: "tip", hidden: true, "aria-hidden": true});
    this.values = this.series.map(() => h("b"));
    const legend = this.series.map((one, index) => {
      const swatch = h("i");
      swatch.style.background = "var(" + one.color + ")";
      const button = h(
        "button",
        {
          "aria-pressed": true,
          title: "Show or hide",
          onclick: () => {
            one.on = !one.on;
            button.setAttribute("aria-pressed", one.on);
            this.draw();
          },
        },
        swatch,
        one.label,
        this.values[index],
      );
      return button;
    });
    this.box = h(
      "div",
      {class: "panel chart"},
      h("div", {class: "head"}, h("h3", {}, title), h("div", {class: "legend"}, legend)),
      this.canvas,
      this.tip,
    );
    group.add(this);
  }

  // The plot's place inside the canvas, in CSS pixels.
  area() {
    return {left: 46, right: this.canvas.clientWidth - 10, top: 8, bottom: this.canvas.clientHeight - 20};
  }
  xOf(t) {
    const {left, right} = this.area(),
      [from, to] = this.group.range();
    return left + ((t - from) / (to - from)) * (right - left);
  }
  tOf(x) {
    const {left, right} = this.area(),
      [from, to] = this.group.range();
    return from + ((Math.min(right, Math.max(left, x)) - left) / (right - left)) * (to - from);
  }

  onDown(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = [event.offsetX, event.offsetX];
  }
  onMove(event) {
    if (this.drag) this.drag[1] = event.offsetX;
    this.group.setHover(this.tOf(event.offsetX), this);
  }
  onUp() {
    const drag = this.drag;
    this.drag = null;
    if (drag && Math.abs(drag[0] - drag[1]) > 6) {
      const range = drag.map((x) => this.tOf(x)).sort((a, b) => a - b);
      if (range[1] - range[0] >= 1) this.group.setZoom(range);
    }
    this.draw();
  }
  onKey(event) {
    const group = this.group,
      [from, to] = group.range(),
      points = group.points;
    if ((event.key === "ArrowLeft" || event.key === "ArrowRight") && points.length) {
      const index = group.hover === null ? points.length - 1 : group.nearest(group.hover) + (event.key === "ArrowLeft" ? -1 : 1);
      const point = points[Math.min(points.length - 1, Math.max(0, index))];
      group.setHover(Math.min(to, Math.max(from, point.t)), this);
      say(clock(point.t) + ": " + this.series.map((one) => one.label + " " + this.format(group.value(one.key, points.indexOf(point)))).join(", "));
    } else if (event.key === "+" || event.key === "-") {
      const centre = group.hover === null ? (from + to) / 2 : group.hover,
        half = (to - from) * (event.key === "+" ? 0.25 : 1);
      const range = [Math.max(0, centre - half), Math.min(group.end, centre + half)];
      group.setZoom(range[1] - range[0] >= group.end * 0.999 ? null : range[1] - range[0] >= 1 ? range : group.zoom);
    } else if (event.key === "Escape" || event.key === "0") {
      group.setHover(null);
      if (group.zoom) group.setZoom(null);
    } else return;
    event.preventDefault();
  }

  draw() {
    const canvas = this.canvas,
      width = canvas.clientWidth,
      height = canvas.clientHeight,
      ratio = devicePixelRatio || 1;
    if (!width) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, sans-serif";
    this.drawGrid(pen);
    this.drawMarks(pen);
    this.drawLines(pen, this.visibleOther, true);
    this.drawLines(pen, this.visible, false);
    this.drawHover(pen);
    this.showValues();
  }

  shown(points) {
    const [from, to] = this.group.range();
    const first = points.findIndex((point) => point.t >= from);
    let last = points.length;
    while (last > 0 && points[last - 1].t > to) last--;
    return first < 0 ? [] : points.slice(Math.max(0, first - 1), last + 1);
  }

  drawGrid(pen) {
    const {left, right, top, bottom} = this.area(),
      [from, to] = this.group.range();
    this.visible = this.shown(this.group.points);
    this.visibleOther = this.shown(this.group.other);
    let most = 0;
    for (const points of [this.visible, this.visibleOther]) {
      for (const one of this.series) if (one.on) for (const point of points) if (point[one.key] > most) most = point[one.key];
    }
    const top_ = most > 0 ? most * 1.02 : 1,
      step = niceStep(top_, 4),
      high = Math.ceil(top_ / step) * step;
    this.yOf = (value) => bottom - (value / high) * (bottom - top);
    pen.strokeStyle = css("--line");
    pen.fillStyle = css("--soft");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.beginPath();
    for (let value = 0; value <= high + step / 2; value += step) {
      const y = Math.round(this.yOf(value)) + 0.5;
      pen.moveTo(left, y);
      pen.lineTo(right, y);
      pen.fillText(shortNumber(Math.round(value * 1000) / 1000), left - 6, y);
    }
    pen.stroke();
    pen.textBaseline = "top";
    const every = TIME_STEPS.find((one) => (to - from) / one <= (right - left) / 74) || 86400;
    for (let t = Math.ceil(from / every) * every; t <= to; t += every) {
      const x = this.xOf(t);
      pen.textAlign = x < left + 14 ? "left" : x > right - 16 ? "right" : "center";
      pen.fillText(clock(t), x, bottom + 5);
    }
  }

  drawMarks(pen) {
    const {left, right, top, bottom} = this.area();
    for (const mark of this.group.marks) {
      const x = Math.round(this.xOf(mark.t)) + 0.5;
      if (x < left || x > right) continue;
      pen.strokeStyle = pen.fillStyle = css(mark.kind === "warn" ? "--warn" : "--accent");
      pen.setLineDash([3, 3]);
      pen.beginPath();
      pen.moveTo(x, top);
      pen.lineTo(x, bottom);
      pen.stroke();
      pen.setLineDash([]);
      pen.beginPath();
      pen.moveTo(x - 4, top - 6);
      pen.lineTo(x + 4, top - 6);
      pen.lineTo(x, top + 1);
      pen.fill();
    }
  }

  drawLines(pen, points, faint) {
    const {left, right, top, bottom} = this.area();
    // A hole in the samples stays a hole: longer than several times the usual distance.
    const gaps = points
      .slice(1)
      .map((point, index) => point.t - points[index].t)
      .sort((a, b) => a - b);
    const hole = Math.max(35, 6 * (gaps[gaps.length >> 1] || 0), 1.5 * (gaps[Math.floor(gaps.length * 0.98)] || 0));
    pen.save();
    pen.beginPath();
    pen.rect(left, top - 2, right - left, bottom - top + 4);
    pen.clip();
    pen.lineWidth = faint ? 1.25 : 1.75;
    pen.globalAlpha = faint ? 0.75 : 1;
    pen.lineJoin = "round";
    for (const one of this.series) {
      if (!one.on) continue;
      pen.strokeStyle = pen.fillStyle = css(one.color);
      pen.setLineDash(faint ? [2, 3] : one.dash || []);
      pen.beginPath();
      let before = null,
        alone = 0;
      for (const point of points) {
        if (!isNumber(point[one.key])) continue;
        const x = this.xOf(point.t),
          y = this.yOf(point[one.key]);
        if (before !== null && point.t - before <= hole) pen.lineTo(x, y);
        else {
          pen.moveTo(x, y);
          alone++;
        }
        before = point.t;
      }
      pen.stroke();
      if (alone && points.length < 4)
        for (const point of points) if (isNumber(point[one.key])) pen.fillRect(this.xOf(point.t) - 2, this.yOf(point[one.key]) - 2, 4, 4);
    }
    pen.setLineDash([]);
    pen.restore();
  }

  drawHover(pen) {
    const {left, right, top, bottom} = this.area(),
      group = this.group;
    if (this.drag && Math.abs(this.drag[0] - this.drag[1]) > 3) {
      const [a, b] = this.drag.map((x) => Math.min(right, Math.max(left, x))).sort((p, q) => p - q);
      pen.globalAlpha = 0.16;
      pen.fillStyle = css("--accent");
      pen.fillRect(a, top, b - a, bottom - top);
      pen.globalAlpha = 1;
    }
    this.index = group.hover === null || !group.points.length ? null : group.nearest(group.hover);
    const point = this.index === null ? null : group.points[this.index];
    this.tip.hidden = !point || group.hoverFrom !== this;
    if (!point) return;
    const x = Math.min(right, Math.max(left, this.xOf(point.t)));
    pen.strokeStyle = css("--line-strong");
    pen.beginPath();
    pen.moveTo(Math.round(x) + 0.5, top);
    pen.lineTo(Math.round(x) + 0.5, bottom);
    pen.stroke();
    for (const one of this.series) {
      const value = group.value(one.key, this.index);
      if (!one.on || value === null) continue;
      pen.fillStyle = css(one.color);
      pen.beginPath();
      pen.arc(x, this.yOf(value), 3.5, 0, 7);
      pen.fill();
    }
    if (!this.tip.hidden) this.showTip(point, x);
  }

  showTip(point, x) {
    const near = (this.group.range()[1] - this.group.range()[0]) / 80;
    const rows = this.series
      .filter((one) => one.on)
      .map((one) => {
        const swatch = h("i");
        swatch.style.background = "var(" + one.color + ")";
        const value = this.group.value(one.key, this.index);
        return h("div", {}, swatch, one.label, h("b", {}, this.format(value) + (value === null ? "" : this.unit)));
      });
    const marks = this.group.marks
      .filter((mark) => Math.abs(mark.t - this.group.hover) <= near)
      .slice(0, 3)
      .map((mark) => h("div", {class: "mark"}, "\u25be " + mark.text));
    this.tip.replaceChildren(h("div", {class: "soft"}, clock(point.t)), ...rows, ...marks);
    const box = this.canvas.offsetLeft,
      width = this.tip.offsetWidth;
    this.tip.style.left = (x + 14 + width > this.canvas.clientWidth ? Math.max(0, box + x - width - 14) : box + x + 14) + "px";
    this.tip.style.top = this.canvas.offsetTop + 12 + "px";
  }

  showValues() {
    const points = this.group.points,
      index_ = this.index === null ? points.length - 1 : this.index;
    const said = this.series.map((one, index) => {
      const text = this.format(points.length ? this.group.value(one.key, index_) : null);
      setText(this.values[index], text);
      return one.label + " " + text;
    });
    if (this.index === null)
      this.canvas.setAttribute(
        "aria-label",
        this.title + " over time. Newest: " + said.join(", ") + ". Arrow keys read values, plus and minus zoom, Escape resets.",
      );
  }
}

/** A small line of one figure over runs, the newest at the right; items: [{value, label, isThis}]. */
function trendLine(title, color, items, format) {
  const known = items.filter((item) => isNumber(item.value));
  const most = Math.max(...known.map((item) => item.value), 0) || 1;
  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
    element.append(...children);
    return element;
  };
  const x = (index) => (known.length > 1 ? 2 + (96 * index) / (known.length - 1) : 50),
    y = (value) => 38 - (34 * value) / most;
  const drawn = {fill: "none", stroke: "var(" + color + ")", "vector-effect": "non-scaling-stroke", "stroke-linecap": "round"};
  const line = svg("polyline", {...drawn, "stroke-width": 1.75, points: known.map((item, index) => x(index) + "," + y(item.value)).join(" ")});
  const dots = known.map((item, index) =>
    svg(
      "path",
      {...drawn, "stroke-width": item.isThis ? 10 : 6, d: "M" + x(index) + " " + y(item.value) + "h0"},
      svg("title", {}, item.label + ": " + format(item.value)),
    ),
  );
  const mine = known.find((item) => item.isThis);
  const label = title + " over " + known.length + " runs; this one " + (mine ? format(mine.value) : NONE);
  const picture = svg("svg", {viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": label}, line, ...dots);
  return h("div", {class: "panel trend"}, h("div", {class: "label"}, title, h("b", {}, mine ? format(mine.value) : NONE)), picture);
}
"""

PAGE_RUN_JS = r"""
// ---- the page of a run ----

// Locust's own columns in Locust's order.
const ENDPOINT_COLUMNS = [
  ["Type", "method", String],
  ["Name", "name", String],
  ["# Requests", "numRequests", count],
  ["# Fails", "numFailures", count],
  ["Median (ms)", "medianResponseTime", millis],
  ["95%ile (ms)", "p95ResponseTime", millis],
  ["99%ile (ms)", "p99ResponseTime", millis],
  ["Average (ms)", "avgResponseTime", millis],
  ["Min (ms)", "minResponseTime", millis],
  ["Max (ms)", "maxResponseTime", millis],
  ["RPS", "requestsPerSec", rate],
];
// What the charts draw of a sample.
const DRAWN = ["totalRps", "failuresPerSec", "currentUsers", "p50ResponseMs", "p95ResponseMs", "p99ResponseMs", "currentP50Ms", "currentP95Ms"];

/**
 * Samples as one line for each figure. Polls are up to 2 s older than pushes (Locust caches its statistics), and both
 * in one line make a zigzag: a figure that enough pushes have is not taken from polls. In a final sample rps is the
 * whole run's average and the users are gone: it is drawn only where a run was too short for Locust to give a rate.
 */
function seriesOf(samples) {
  const numberOf = (source, key) => samples.reduce((sum, one) => sum + (one.source === source && isNumber(one[key])), 0);
  const dropped = (key) => (2 * numberOf("push", key) >= numberOf("poll", key) && numberOf("push", key) ? "poll" : "push");
  const drops = DRAWN.map((key) => [key, dropped(key)]);
  const final = samples.findLast((one) => one.source === "final");
  const isFinal = (one) => final && at(one.timestamp) >= at(final.timestamp); // hooks push their last numbers too
  const hasRate = samples.some((one) => !isFinal(one) && one.totalRps > 0);
  const lastWithUsers = samples.findLastIndex((one) => !isFinal(one) && one.currentUsers > 0);
  return samples.map((one, index) => {
    const kept = {...one};
    if (isFinal(one) && hasRate) kept.totalRps = null;
    if (final && (index > lastWithUsers || isFinal(one))) kept.currentUsers = null;
    for (const [key, source] of drops) if (one.source === source) kept[key] = null;
    return kept;
  });
}

/** Samples as the charts' points, by seconds since the start (epoch ms). */
function pointsOf(samples, start) {
  const kept = seriesOf(samples);
  // Locust's page charts the last seconds' percentiles; where only whole-run ones are known, those.
  const windowed = kept.some((sample) => isNumber(sample.currentP95Ms));
  return kept
    .map((sample) => ({
      t: (at(sample.timestamp) - start) / 1000,
      rps: sample.totalRps,
      failures: sample.failuresPerSec,
      users: sample.currentUsers,
      p99: sample.p99ResponseMs,
      p50: windowed ? sample.currentP50Ms : sample.p50ResponseMs,
      p95: windowed ? sample.currentP95Ms : sample.p95ResponseMs,
    }))
    .filter((point) => point.t > -5);
}

/** What was asked of Locust, and each change of it, as pairs of words. */
function loadFacts(run) {
  const stage = (one) => count(one.targetUsers) + " users at " + perSecond(one.spawnRate) + " for " + span(one.durationSeconds);
  const asked = run.stages ? run.stages.map(stage).join("; ") : count(run.targetUsers) + " users at " + perSecond(run.spawnRate);
  const list = (name) => (run[name] || []).join(", ");
  return [
    ["Asked for", asked],
    ...(run.usersChanges || []).map((change) => ["Changed to", changeText(run, change)]),
    ["Duration", run.durationSeconds === undefined ? "until stopped" : span(run.durationSeconds)],
    ["Target system", run.host],
    ["User classes", list("userClasses")],
    ["Tags", list("tags")],
    ["Tags left out", list("excludeTags")],
    ["Options", pairsText(run.options).split("\n").join(", ")],
  ];
}

// ---- two runs compared ----

// Figures of a comparison: label, format, and which way is worse (0: neither).
const FIGURES = {
  totalRps: ["Requests/s", rate, -1],
  errorRate: ["Failures", percent, 1],
  p50ResponseMs: ["Median", (value) => millis(value) + " ms", 1],
  p95ResponseMs: ["95%ile", (value) => millis(value) + " ms", 1],
  p99ResponseMs: ["99%ile", (value) => millis(value) + " ms", 1],
  avgResponseMs: ["Average", (value) => millis(value) + " ms", 1],
  totalRequests: ["Requests", count, 0],
};
const JUDGEMENT_CLASS = {regression: "bad", improvement: "good", "within noise": "", "cannot tell": "warn"};

/** Does a sentence or an entry of the comparison's lists speak of this figure? */
function speaksOf(entry, endpoint, metric) {
  if (typeof entry === "string") return entry.startsWith((endpoint || "totals") + ": " + metric + " ");
  return entry.metric === metric && (entry.endpoint || null) === endpoint;
}

/** How a figure is judged: the server's own word, or what its lists say of it. */
function judgementOf(compared, figure) {
  if (compared.judgement && figure.judgement) return {word: String(figure.judgement), why: String(figure.reason || "")};
  const found = (name) => (compared[name] || []).find((entry) => speaksOf(entry, figure.endpoint, figure.metric));
  const words = (entry) => String(entry.message || entry);
  const tolerance = (compared.tolerances || {})[figure.metric];
  if (found("regressions")) return {word: "regression", why: words(found("regressions"))};
  if (found("noise")) return {word: "within noise", why: words(found("noise"))};
  if (found("warnings")) return {word: "cannot tell", why: words(found("warnings"))};
  if (!isNumber(figure.change)) return {word: "cannot tell", why: "one of the two runs has no such figure"};
  return tolerance ? {word: "within tolerance", why: "may get worse by " + tolerance} : {word: "not judged", why: ""};
}

/** The figures of a comparison in one list: the server's, or made of totals and endpoints. */
function figuresOf(compared) {
  if (compared.figures) return compared.figures;
  const listed = (metrics, endpoint) =>
    Object.keys(FIGURES).filter((name) => (metrics || {})[name]).map((metric) => ({endpoint, metric, ...metrics[metric]}));
  const name = (one) => [one.method, one.name].filter(Boolean).join(" ");
  return [...listed(compared.totals, null), ...(compared.endpoints || []).flatMap((one) => listed(one.metrics, name(one)))];
}

/** The change as a bar from the middle: to the right is more; `most` percent fill a half. */
function changeBar(figure, word, most) {
  const share = figure.changePercent;
  if (!isNumber(share)) return h("span");
  const bar = h("i", {class: JUDGEMENT_CLASS[word] || ""});
  const half = Math.max(0.5, Math.min(50, (50 * Math.abs(share)) / most));
  bar.style.width = half + "%";
  bar.style[share < 0 ? "right" : "left"] = "50%";
  return h("span", {class: "change-bar", "aria-hidden": true}, bar);
}

/** A change in words: of an error rate in points of percent, of the others in percent of the baseline. */
function changeWords(figure) {
  if (figure.metric === "errorRate" && isNumber(figure.change)) return signed(figure.change, 2) + " pp";
  return isNumber(figure.changePercent) ? signedPercent(figure.changePercent / 100) : NONE;
}

function figureCells(compared, figure, isAgain, most) {
  const [label, format] = FIGURES[figure.metric] || [figure.metric, rate],
    {word, why} = judgementOf(compared, figure);
  const badge = h("span", {class: "badge " + (JUDGEMENT_CLASS[word] || ""), title: why}, capital(word));
  const range = Array.isArray(figure.interval) ? [format(figure.baseline + figure.interval[0]), format(figure.baseline + figure.interval[1])] : null;
  const now = h("span", {}, format(figure.candidate));
  if (range) now.title = "between " + range.join(" and ") + " with 95 % certainty";
  return [
    [figure.endpoint || "All requests", "wide name" + (figure.endpoint ? "" : " strong") + (isAgain ? " again" : "")],
    [label],
    [format(figure.baseline), "num"],
    [now, "num"],
    [changeWords(figure), "num"],
    [changeBar(figure, word, most), "bar-cell"],
    [h("span", {}, badge, why && word === "cannot tell" ? h("span", {class: "hint"}, " " + why) : null), "wide"],
  ];
}

/** The head, table and notes of a comparison. isWhole: with every figure of every endpoint. */
function comparisonParts(compared, whole, isWhole, showWhole) {
  const runs = compared.runs || [];
  const link = compared.baseline ? h("a", {href: "#/runs/" + encodeURIComponent(compared.baseline)}, "run " + compared.baseline.slice(0, 8)) : null;
  const against = runs.length > 1 ? [runs.length + " runs, the newest ", link] : [compared.with ? compared.with + " " : "", link];
  const bad = (compared.regressions || []).length;
  const word = compared.judgement || (!compared.baseline ? "cannot tell" : bad ? "regression" : "no regression");
  const kind = JUDGEMENT_CLASS[word] === undefined ? "good" : JUDGEMENT_CLASS[word];
  const head = h("div", {class: "head"}, h("h2", {}, "Compared with ", against), h("span", {class: "badge " + kind}, capital(word)));
  const keyOf = (one) => (one.endpoint || "") + " " + one.metric;
  const kept = new Map((compared.figures || []).map((one) => [keyOf(one), one]));
  const all = (isWhole || !compared.figures ? figuresOf(whole) : compared.figures).map((one) => kept.get(keyOf(one)) || one);
  const ranks = (one) => !one.endpoint || ["regression", "improvement"].includes(judgementOf(compared, one).word);
  const shown = isWhole ? all : all.filter(ranks);
  const heads = [["Endpoint"], ["Figure"], ["Baseline", "num"], ["Now", "num"], ["Change", "num"], [""], ["Judgement"]];
  const most = Math.max(20, ...shown.map((one) => Math.abs(one.changePercent || 0)));
  const rows = shown.map((one, index) => figureCells(compared, one, index > 0 && shown[index - 1].endpoint === one.endpoint, most));
  const more = all.length - shown.length + (isWhole ? 0 : compared.figuresCut || 0);
  const button = more > 0 ? h("div", {class: "pages"}, h("button", {class: "small", onclick: showWhole}, "Show all figures")) : null;
  const unsaid = (entry) => !all.some((one) => speaksOf(entry, one.endpoint || null, one.metric));
  const sentence = (entry) => h("li", {}, String(entry.message || entry));
  const notes = [...(compared.differences || []), ...(compared.warnings || []).filter(unsaid)];
  const lost = [...(compared.regressions || []), ...(compared.noise || [])].filter(unsaid); // of a baseline that is gone
  return [
    head,
    compared.message ? h("p", {class: "soft lead"}, compared.message) : null,
    lost.length ? h("ul", {class: "note bad"}, lost.map(sentence)) : null,
    shown.length ? plainTable("Comparison", heads, rows) : null,
    button,
    notes.length ? h("div", {class: "note warn"}, h("ul", {}, notes.map(sentence))) : null,
  ].filter(Boolean);
}

const FEW_ENDPOINTS = 100;
const MOST_LIVE_POINTS = 2000;

class RunView {
  constructor(id) {
    this.id = id;
    this.run = null;
    this.whole = []; // the points of the whole run
    this.tab = "endpoints";
    this.sort = {column: 1, up: true};
    this.all = false;
    this.failures = this.exceptions = this.workers = null;
    $("main").replaceChildren(h("p", {class: "empty"}, "Loading\u2026"));
  }

  open() {
    live.follow(runPath(this.id, "/events"), this);
    this.refresh();
    this.timers = [
      setInterval(() => this.tick(), 1000),
      setInterval(() => document.hidden || (this.run && isActive(this.run) && this.loadSides()), 5000),
    ];
  }
  close() {
    (this.timers || []).forEach(clearInterval);
    if (this.group) this.group.close();
    this.closed = true;
  }

  async refresh() {
    const series = this.loadSeries();
    try {
      const run = await get(runPath(this.id));
      if (!this.closed) this.show(run);
    } catch (error) {
      if (error instanceof ApiError && error.status === 404 && !this.closed) this.gone("There is no such run. It may have been deleted.");
    }
    await series;
    this.loadSides();
  }

  gone(text) {
    live.stop();
    this.close();
    document.title = "Load Manager";
    $("main").replaceChildren(h("div", {class: "empty"}, h("p", {}, text), h("a", {href: "#/"}, "All runs")));
  }

  onEvent(kind, data) {
    if (this.closed) return;
    if (kind === "deleted") this.gone("This run was deleted.");
    else if (kind === "sample") this.addSample(data);
    else this.show(data);
  }

  // ---- series ----

  async loadSeries(zoom) {
    const query = new URLSearchParams({maxPoints: 1000});
    if (zoom) {
      query.set("from", (this.start + zoom[0] * 1000) / 1000 - 1);
      query.set("to", (this.start + zoom[1] * 1000) / 1000 + 1);
    }
    for (const name of zoom ? ["from", "to"] : []) query.set(name, Number(query.get(name)).toFixed(3));
    let answer;
    try {
      answer = await get(runPath(this.id, "/metrics?" + query));
    } catch (error) {
      return;
    }
    if (this.closed) return;
    this.loaded = true;
    if (zoom) {
      if (this.group.zoom === zoom) this.detail = answer.points;
    } else {
      const last = answer.points.length ? at(answer.points.at(-1).timestamp) : 0;
      this.whole = answer.points.concat(this.whole.filter((point) => point.live && at(point.timestamp) > last));
    }
    this.plot();
  }

  addSample(point) {
    const last = this.whole.at(-1);
    if (last && at(point.timestamp) <= at(last.timestamp)) return;
    this.whole.push({...point, live: true});
    if (this.whole.length > MOST_LIVE_POINTS && !this.thinning) {
      this.thinning = true;
      this.whole = this.whole.map((one) => ({...one, live: false}));
      this.loadSeries().then(() => {
        this.thinning = false;
      });
    }
    this.plot();
  }

  plot() {
    const run = this.run;
    if (!run || !this.group) return;
    this.group.points = pointsOf(this.group.zoom && this.detail ? this.detail : this.whole, this.start);
    this.setEnd();
    this.group.draw();
    this.showNumbers(run.lastMetrics || {});
    this.showEmptiness();
  }

  /** A run without measurements says so: three empty charts and nine dashes say nothing. */
  showEmptiness() {
    const {parts, run} = this,
      isEmpty = this.loaded && !this.whole.length;
    const waits = run.status === "Pending" ? "The test has not begun; its numbers will be here." : "Waiting for the first numbers of Locust.";
    const never = hasBegun(run) ? "Locust gave no numbers of this run." : "This run never began, so there are no measurements.";
    parts.charts.hidden = isEmpty;
    parts.tiles.hidden = isEmpty && !run.lastMetrics;
    parts.empty.hidden = !isEmpty;
    setText(parts.empty, isActive(run) ? waits : never);
    this.tabBar.hidden = isEmpty && !isActive(run) && !run.lastMetrics;
    if (this.tabBar.hidden && this.tab !== "details") this.choose("details");
  }

  setEnd() {
    const last = this.group.points.at(-1),
      ended = at(this.run.finishedAt);
    const until = isActive(this.run) ? (now() - this.start) / 1000 : isNaN(ended) ? 0 : (ended - this.start) / 1000;
    const others = this.group.other.at(-1);
    this.group.end = Math.max(1, until, last ? last.t : 0, others ? others.t : 0);
  }

  // ---- what is beside the charts ----

  async loadSides() {
    if (this.closed || !this.run) return;
    const quiet = (path) => get(path).catch(() => null);
    const [failures, clusters] = await Promise.all([quiet(runPath(this.id, "/failures")), isActive(this.run) ? quiet("/v1/clusters") : null]);
    if (this.closed) return;
    this.failures = (failures && failures.failures) || null;
    this.exceptions = (failures && failures.exceptions) || null;
    const cluster = (clusters || []).find((one) => one.id === this.run.locustClusterId);
    this.workers = cluster ? cluster.workers : isActive(this.run) ? this.workers : null;
    this.showTabs();
  }

  // ---- building ----

  build(run) {
    this.start = at(run.startedAt || run.createdAt);
    const parts = (this.parts = {});
    const make = (name, tag, attributes, ...children) => (parts[name] = h(tag, attributes, ...children));
    const act = (name, label, work, kind) => make(name, "button", {class: kind || "", onclick: () => work(this.run)}, label);
    this.group = new ChartGroup((zoom) => {
      this.detail = null;
      this.plot();
      if (zoom) this.loadSeries(zoom);
    });
    this.bar = meter("Time");
    const tiles = [
      ["Users", "--users", "users"],
      ["RPS", "--rps", "rps"],
      ["Failures", "--failures", "errors"],
      ["Median", "--p50", "p50", "ms"],
      ["95%ile", "--p95", "p95", "ms"],
      ["99%ile", "--p99", "p99", "ms"],
      ["Average", null, "avg", "ms"],
      ["# Requests", null, "requests"],
      ["# Fails", null, "fails"],
    ];
    const tile = ([label, color, name, unit]) => {
      const swatch = color ? h("i") : null;
      if (swatch) swatch.style.background = "var(" + color + ")";
      return h(
        "div",
        {class: "tile"},
        h("div", {class: "label"}, swatch, make(name + "Label", "span", {}, label)),
        h("div", {class: "value"}, make(name, "span", {}, NONE), unit ? h("small", {}, unit) : null),
      );
    };
    const charts = [
      new Chart(
        this.group,
        "Total Requests per Second",
        "",
        [
          {key: "rps", label: "RPS", color: "--rps"},
          {key: "failures", label: "Failures/s", color: "--failures"},
        ],
        rate,
      ),
      new Chart(
        this.group,
        "Response Times (ms)",
        " ms",
        [
          {key: "p50", label: "50th percentile", color: "--p50"},
          {key: "p95", label: "95th percentile", color: "--p95"},
          {key: "p99", label: "99th, whole run", color: "--p99", dash: [4, 3]},
        ],
        millis,
      ),
      new Chart(this.group, "Number of Users", "", [{key: "users", label: "Users", color: "--users"}], count),
    ];
    const tabs = [
      ["endpoints", "Endpoints"],
      ["failures", "Failures"],
      ["exceptions", "Exceptions"],
      ["workers", "Workers"],
      ["history", "History"],
      ["details", "Details"],
    ];
    this.tabButtons = new Map(
      tabs.map(([name, label]) => [
        name,
        h(
          "button",
          {role: "tab", id: "tab-" + name, "aria-controls": "tabpanel", onclick: () => this.choose(name)},
          label,
          h("span", {class: "n", hidden: true}),
        ),
      ]),
    );
    $("main").replaceChildren(
      h("p", {class: "back"}, h("a", {href: "#/"}, "\u2190 All runs")),
      h(
        "div",
        {class: "run-head"},
        h(
          "div",
          {class: "what"},
          h("h1", {}, make("title", "span", {class: "name"})),
          h(
            "div",
            {class: "badges"},
            labelled("Status", make("status", "span", {class: "badge"})),
            make("verdictBox", "span", {hidden: true}, labelled("Verdict", make("verdict", "span", {class: "badge"}))),
            make("trustBox", "span", {hidden: true}, labelled("Data", make("trust", "span", {class: "badge"}))),
          ),
          make("facts", "div", {class: "facts"}),
        ),
        h(
          "div",
          {class: "bar"},
          mayAct() ? [act("stop", "Stop", stopRun, "danger"), act("users_", "Change users", changeUsers), act("mark", "Mark moment", annotate), act("again", "Run again", rerun)] : [],
          make("report", "a", {class: "button", id: "report", href: runPath(run.id, "/report.html"), target: "_blank", rel: "noopener"}, "Report"),
          mayAct() ? act("remove", "Delete", deleteRun, "plain") : null,
        ),
      ),
      make("reason", "div", {class: "note bad", hidden: true}),
      make("warnings", "div", {class: "note warn", hidden: true}),
      make("queued", "div", {class: "note", hidden: true}),
      make("time", "div", {class: "time"}, make("elapsed", "span"), this.bar.box, make("left", "span")),
      make("tiles", "div", {class: "panel tiles"}, tiles.map(tile)),
      make("empty", "div", {class: "panel empty gap", hidden: true}),
      make("thresholds", "section", {hidden: true}),
      make("comparison", "section", {class: "comparison", hidden: true}),
      make(
        "charts",
        "section",
        {"aria-label": "Charts"},
        h(
          "div",
          {class: "head"},
          h("h2", {}, "Charts"),
          h("span", {class: "hint"}, "drag to zoom"),
          this.group.reset,
          make("beside", "span", {class: "hint", hidden: true}),
        ),
        h(
          "div",
          {class: "charts"},
          charts.map((chart) => chart.box),
        ),
      ),
      (this.tabBar = h("div", {class: "tabs", role: "tablist", "aria-label": "Tables", onkeydown: (event) => this.onTabKey(event)}, ...this.tabButtons.values())),
      make("panel", "div", {class: "tabpanel", id: "tabpanel", role: "tabpanel", tabindex: -1}),
    );
    this.buildEndpoints();
    this.choose("endpoints");
  }

  buildEndpoints() {
    const body = h("tbody"),
      heads = ENDPOINT_COLUMNS.map(([label], index) =>
        h("th", {scope: "col", class: index > 1 ? "num" : ""}, h("button", {onclick: () => this.sortBy(index)}, label)),
      );
    this.total = ENDPOINT_COLUMNS.map((_, index) => h("td", {class: index > 1 ? "num" : ""}));
    this.heads = heads;
    this.endpointRows = new Rows(body, () => {
      const cells = ENDPOINT_COLUMNS.map((_, index) => h("td", {class: index > 1 ? "num" : index === 1 ? "wide name" : ""}));
      return {
        element: h("tr", {}, cells),
        update(row) {
          ENDPOINT_COLUMNS.forEach(([, key, format], index) => setText(cells[index], format(row[key])));
          setClass(cells[3], row.numFailures > 0 ? "num fails" : "num");
        },
      };
    });
    this.more = h("button", {
      class: "small",
      hidden: true,
      onclick: () => {
        this.all = true;
        this.showEndpoints();
      },
    });
    this.wordField = h("input", {
      type: "search",
      id: "endpoint-filter",
      placeholder: "Filter endpoints  ( / )",
      "aria-label": "Filter endpoints by name",
      oninput: () => this.showEndpoints(),
    });
    this.endpointBox = h(
      "div",
      {},
      h("div", {class: "bar", hidden: true}, this.wordField),
      scrollBox("Endpoints", h("table", {}, h("thead", {}, h("tr", {}, heads)), body, h("tfoot", {}, h("tr", {}, this.total)))),
      h("div", {class: "pages"}, this.more),
    );
    this.noEndpoints = h("div", {class: "panel empty"}, "No requests yet.");
  }

  sortBy(column) {
    this.sort = {column, up: this.sort.column === column ? !this.sort.up : column < 2};
    this.showEndpoints();
  }

  onTabKey(event) {
    const names = [...this.tabButtons.keys()],
      step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!step) return;
    const name = names[(names.indexOf(this.tab) + step + names.length) % names.length];
    this.choose(name);
    this.tabButtons.get(name).focus();
  }

  choose(name) {
    this.tab = name;
    for (const [one, button] of this.tabButtons) {
      button.setAttribute("aria-selected", one === name);
      button.tabIndex = one === name ? 0 : -1;
    }
    this.parts.panel.setAttribute("aria-labelledby", "tab-" + name);
    this.parts.panel.replaceChildren();
    this.showTabs();
  }

  // ---- showing ----

  show(run) {
    const before = this.run;
    if (before && before.status !== run.status) say(run.scenarioId + " is now " + run.status);
    this.run = run;
    if (!this.parts) this.build(run);
    const started = at(run.startedAt || run.createdAt);
    const ended = before && isActive(before) && !isActive(run);
    document.title = run.scenarioId + " \u2013 " + run.status + " \u2013 Load Manager";
    this.showHead(run);
    this.showNumbers(run.lastMetrics || {});
    this.showThresholds(run);
    this.showComparison(run);
    this.group.marks = [
      ...(run.annotations || []).map((one) => ({t: (at(one.at) - started) / 1000, text: one.text})),
      ...(run.usersChanges || []).map((one) => ({t: (at(one.at) - started) / 1000, text: count(one.targetUsers) + " users, by " + one.by})),
      ...(run.warnings || []).map((one) => ({t: (at(one.at) - started) / 1000, text: one.message, kind: "warn"})),
    ];
    this.group.draw();
    if (started !== this.start) {
      this.start = started;
      this.plot();
    }
    if (!before) this.plot();
    if (ended) {
      this.loadSeries();
      this.loadSides();
    }
    this.showTabs();
    this.tick();
  }

  showHead(run) {
    const parts = this.parts;
    setText(parts.title, run.scenarioId);
    showStatus(parts.status, run);
    showVerdict(parts.verdict, run);
    showTrust(parts.trust, run, true);
    parts.verdictBox.hidden = parts.verdict.hidden;
    parts.trustBox.hidden = parts.trust.hidden || !hasBegun(run);
    const fact = (label, value) => h("span", {}, label + " ", h("b", {class: "name"}, value));
    const facts = [
      fact("Tenant", run.tenantId),
      fact("Environment", run.envId),
      run.locustClusterId ? fact("Cluster", run.locustClusterId) : null,
      run.stages ? fact("Stages", run.stages.map((one) => count(one.targetUsers)).join(" \u2192 ") + " users") : null,
      run.stages ? null : fact("Users", usersText(run) + " at " + perSecond(run.spawnRate)),
      fact(run.startedAt ? "Started" : "Created", zonedMoment(run.startedAt || run.createdAt)),
      run.createdBy ? fact("By", run.createdBy) : null,
      run.stopReason ? fact("Ended by", run.stopReason) : null,
    ].filter(Boolean);
    if (JSON.stringify(facts.map((one) => one.textContent)) !== this.factText) {
      this.factText = JSON.stringify(facts.map((one) => one.textContent));
      parts.facts.replaceChildren(...facts);
    }
    parts.reason.hidden = !run.failureReason;
    setText(parts.reason, run.failureReason || "");
    const warnings = run.warnings || [];
    parts.warnings.hidden = !warnings.length;
    if (parts.warnings.childElementCount !== 1 || parts.warnings.firstChild.childElementCount !== warnings.length) {
      parts.warnings.replaceChildren(
        h(
          "ul",
          {},
          warnings.map((one) => h("li", {}, h("span", {class: "soft"}, moment(one.at) + "  "), one.message)),
        ),
      );
    }
    parts.queued.hidden = !(run.status === "Pending" && run.queuePosition);
    setText(parts.queued, "Waiting for a free cluster; number " + (run.queuePosition || "") + " in the queue.");
    if (!parts.stop) return;
    parts.stop.hidden = !isActive(run);
    parts.stop.disabled = run.status === "Stopping";
    setText(parts.stop, run.status === "Stopping" ? "Stopping\u2026" : run.queuePosition ? "Cancel" : "Stop");
    parts.mark.hidden = !["Running", "Stopping"].includes(run.status);
    parts.users_.hidden = run.status !== "Running";
    parts.again.hidden = parts.remove.hidden = isActive(run);
  }

  showNumbers(numbers) {
    const parts = this.parts,
      live_ = this.run.status === "Running" || this.run.status === "Stopping";
    const users = live_ ? numbers.currentUsers : peakUsers(this.whole);
    setText(parts.users, count(isNumber(users) ? users : numbers.currentUsers));
    setText(parts.usersLabel, live_ || !isNumber(users) ? "Users" : "Users, at most");
    setText(parts.rps, rate(numbers.totalRps));
    setText(parts.errors, percent(numbers.errorRate));
    for (const [name, key] of [
      ["p50", "p50ResponseMs"],
      ["p95", "p95ResponseMs"],
      ["p99", "p99ResponseMs"],
      ["avg", "avgResponseMs"],
    ])
      setText(parts[name], millis(numbers[key]));
    setText(parts.requests, count(numbers.totalRequests));
    setText(parts.fails, count(numbers.totalFailures));
  }

  showThresholds(run) {
    const box = this.parts.thresholds,
      list = run.thresholds || [];
    box.hidden = !list.length;
    const text = JSON.stringify(list);
    if (text === this.thresholdText) return;
    this.thresholdText = text;
    const word = (one) => String(one.result === undefined || one.result === null ? "not yet known" : one.result);
    const kind = (one) => ({passed: "good", failed: "bad"})[word(one)] || "";
    const value = (one) => (isNumber(one.value) ? rate(one.value) : NONE);
    const why = (one) => String(one.message || one.reason || "");
    const heads = [["Threshold"], ["Value", "num"], ["Result"], ["First failed (" + ZONE + ")"], ...(list.some(why) ? [["Why"]] : [])];
    const rows = list.map((one) => [
      [String(one.expr) + (one.warnOnly ? " (warning only)" : ""), "wide name mono"],
      [value(one), "num"],
      [h("span", {class: "badge " + kind(one)}, capital(word(one)))],
      [one.firstFailedAt ? moment(one.firstFailedAt) : NONE],
      ...(list.some(why) ? [[why(one), "wide soft"]] : []),
    ]);
    box.replaceChildren(h("div", {class: "head"}, h("h2", {}, "Thresholds")), plainTable("Thresholds", heads, rows));
  }

  async showComparison(run) {
    const compared = run.comparison,
      text = JSON.stringify(compared || null);
    this.parts.comparison.hidden = !compared;
    if (text === this.comparisonText) return;
    this.comparisonText = text;
    if (!compared) return;
    this.fillComparison(compared);
    if (!compared.baseline || (compared.figures && !compared.figuresCut)) return;
    const wanted = new URLSearchParams({baseline: compared.baseline, candidate: run.id});
    const tolerance = Object.entries(compared.tolerances || {}).map(([name, limit]) => name + ":" + limit).join(",");
    if (tolerance) wanted.set("tolerance", tolerance);
    const whole = await get("/v1/tests/compare?" + wanted).catch(() => null); // the baseline may be deleted by now
    if (!whole || this.closed || this.comparisonText !== text) return;
    // What was judged when the run ended stays; the server's answer of now adds the figures that were not kept.
    const {figures, judgement, message} = compared;
    this.fillComparison({...whole, ...compared, figures, judgement, message}, whole);
  }

  fillComparison(compared, whole) {
    this.parts.comparison.replaceChildren(...comparisonParts(compared, whole || compared, this.allFigures, () => {
      this.allFigures = true;
      this.fillComparison(compared, whole);
    }));
  }

  showTabs() {
    if (!this.parts) return;
    const rows = Object.keys((this.run.lastMetrics || {}).requestStats || {}).length;
    const numbers = {
      endpoints: rows,
      failures: this.failures && this.failures.length,
      exceptions: this.exceptions && this.exceptions.length,
      workers: this.workers && this.workers.length,
    };
    for (const [name, button] of this.tabButtons) {
      const mark = button.querySelector(".n");
      mark.hidden = !isNumber(numbers[name]) || numbers[name] === 0;
      setText(mark, numbers[name] || 0);
      setClass(mark, name === "failures" || name === "exceptions" ? "n bad" : "n");
    }
    if (this.tab === "endpoints") this.showEndpoints();
    else if (this.tab === "details") this.showDetails();
    else if (this.tab === "history") this.showHistory();
    else this.showSimple();
  }

  showEndpoints() {
    if (this.tab !== "endpoints") return;
    const numbers = this.run.lastMetrics || {},
      rows = Object.values(numbers.requestStats || {}),
      {column, up} = this.sort;
    const box = rows.length ? this.endpointBox : this.noEndpoints;
    if (this.parts.panel.firstChild !== box) this.parts.panel.replaceChildren(box);
    const key = ENDPOINT_COLUMNS[column][1],
      word = this.wordField.value.trim().toLowerCase();
    const order = (a, b) =>
      column < 2 ? String(a[key]).localeCompare(String(b[key])) : (isNumber(a[key]) ? a[key] : -1) - (isNumber(b[key]) ? b[key] : -1);
    const wanted = rows.filter((row) => !word || (row.method + " " + row.name).toLowerCase().includes(word));
    wanted.sort((a, b) => (up ? order(a, b) : order(b, a)) || String(a.name).localeCompare(String(b.name)));
    this.heads.forEach((head, index) => {
      if (index === column) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    this.wordField.parentNode.hidden = rows.length < 8;
    this.more.parentNode.hidden = this.more.hidden = this.all || wanted.length <= FEW_ENDPOINTS;
    setText(this.more, "Show all " + wanted.length);
    this.endpointRows.show(this.all ? wanted : wanted.slice(0, FEW_ENDPOINTS), (row) => row.method + " " + row.name);
    const bound = (choose, name) => {
      const values = rows.map((row) => row[name]).filter(isNumber);
      return values.length ? choose(...values) : null;
    };
    const total = {
      method: "",
      name: "Aggregated",
      numRequests: numbers.totalRequests,
      numFailures: numbers.totalFailures,
      medianResponseTime: numbers.p50ResponseMs,
      p95ResponseTime: numbers.p95ResponseMs,
      p99ResponseTime: numbers.p99ResponseMs,
      avgResponseTime: numbers.avgResponseMs,
      minResponseTime: bound(Math.min, "minResponseTime"),
      maxResponseTime: bound(Math.max, "maxResponseTime"),
      requestsPerSec: numbers.totalRps,
    };
    ENDPOINT_COLUMNS.forEach(([, name, format], index) => setText(this.total[index], format(total[name])));
  }

  showSimple() {
    const what = {
      failures: [
        this.failures,
        ["# Failures", "Method", "Name", "Message", "First (" + ZONE + ")", "Last (" + ZONE + ")"],
        (one) => [
          [count(one.occurrences), "num fails"],
          [one.method],
          [one.name, "wide name"],
          [one.error, "wide name"],
          [moment(one.firstSeen)],
          [moment(one.lastSeen)],
        ],
        "No request has failed.",
        "What failed is not known here.",
      ],
      exceptions: [
        this.exceptions,
        ["# Occurrences", "Message", "Traceback", "Nodes"],
        (one) => [
          [count(one.count), "num"],
          [one.message, "wide name"],
          [h("pre", {}, String(one.traceback || "")), "wide"],
          [[].concat(one.nodes || []).join(", "), "wide"],
        ],
        "No exception in the locustfile.",
        "Exceptions are not known here.",
      ],
      workers: [
        this.workers,
        ["Worker", "State", "# users", "CPU usage"],
        (one) => [
          [one.id, "wide name"],
          [h("span", {class: "badge " + ({running: "good", ready: "good", missing: "bad", spawning: "good"}[one.state] || "")}, one.state)],
          [count(one.userCount), "num"],
          [isNumber(one.cpuPercent) ? Math.round(one.cpuPercent) + "%" : NONE, one.cpuPercent > 90 ? "num fails" : "num"],
        ],
        "This Locust runs without workers.",
        isActive(this.run) ? "Waiting for the cluster to answer." : "Workers are shown while a test runs.",
      ],
    }[this.tab];
    const [list, labels, cellsOf, none, unknown] = what,
      text = this.tab + JSON.stringify(list);
    if (this.simpleText === text && this.parts.panel.firstChild) return;
    this.simpleText = text;
    if (!list || !list.length) {
      this.parts.panel.replaceChildren(h("div", {class: "panel empty"}, list ? none : unknown));
      return;
    }
    const heads = labels.map((label) => [label, label.startsWith("#") || label === "CPU usage" ? "num" : ""]);
    this.parts.panel.replaceChildren(plainTable(this.tab, heads, list.slice(0, 500).map(cellsOf)));
  }

  // ---- earlier runs of the same scenario ----

  async loadHistory() {
    this.historyAsked = now();
    const {tenantId, envId, scenarioId} = this.run;
    const wanted = new URLSearchParams({brief: "true", limit: 100, status: "Finished,Failed", tenantId, envId, search: scenarioId});
    const runs = await get("/v1/tests?" + wanted).catch(() => null);
    if (this.closed || !runs) return;
    this.history = runs.filter((run) => run.scenarioId === scenarioId && run.id !== this.id).slice(0, 25);
    this.showTabs();
  }

  /** Draw another run's lines below this one's, both from their start; null: none. */
  async overlay(run) {
    this.besideId = run && run.id;
    const answer = run && (await attempt(() => get(runPath(run.id, "/metrics?maxPoints=1000"))));
    if (this.closed || this.besideId !== (run && run.id)) return;
    this.group.other = answer ? pointsOf(answer.points, at(run.startedAt || run.createdAt)) : [];
    const beside = this.parts.beside;
    beside.hidden = !answer;
    if (run) {
      const remove = h("button", {class: "small plain", onclick: () => this.overlay(null)}, "Remove");
      beside.replaceChildren("dotted: the run of " + moment(run.startedAt || run.createdAt) + " ", remove);
      beside.scrollIntoView({block: "nearest"});
    }
    this.setEnd();
    this.group.draw();
    this.showTabs();
  }

  showHistory() {
    if (!this.history || now() - this.historyAsked > 60000) this.loadHistory();
    const mine = this.run.lastMetrics || {};
    const text = "history" + JSON.stringify([this.history, this.besideId, mine.p95ResponseMs, mine.totalRps]);
    if (this.simpleText === text && this.parts.panel.firstChild) return;
    this.simpleText = text;
    if (!this.history || !this.history.length) {
      this.parts.panel.replaceChildren(
        h("div", {class: "panel empty"}, this.history ? "No other run of this scenario has ended yet." : "Loading\u2026"),
      );
      return;
    }
    const num = (label) => [label, "num"];
    const heads = [
      ["Started (" + ZONE + ")"],
      ["Status"],
      ["Verdict"],
      num("Users"),
      num("Time"),
      num("RPS"),
      num("Failures"),
      num("Median (ms)"),
      num("95%ile (ms)"),
      num("99%ile (ms)"),
    ];
    const rows = this.history.map((run) => this.historyRow(run, mine));
    const over = [this.run, ...this.history].filter((run) => run.lastMetrics).sort((a, b) => at(a.createdAt) - at(b.createdAt));
    const trend = (title, color, key, format) =>
      trendLine(
        title,
        color,
        over.map((run) => ({value: run.lastMetrics[key], label: moment(run.createdAt), isThis: run === this.run})),
        format,
      );
    const trends = [
      trend("95%ile (ms)", "--p95", "p95ResponseMs", millis),
      trend("RPS", "--rps", "totalRps", rate),
      trend("Failures", "--failures", "errorRate", percent),
    ];
    this.parts.panel.replaceChildren(
      h("div", {class: "trends"}, trends),
      plainTable("Earlier runs", [...heads, num("\u0394 95%ile"), num("\u0394 RPS"), num("Charts")], rows),
      h("p", {class: "hint"}, "\u0394: this run against that one."),
    );
  }

  historyRow(run, mine) {
    const numbers = run.lastMetrics || {},
      [status, verdict, trust] = [0, 1, 2].map(() => h("span")),
      shown = run.id === this.besideId;
    showStatus(status, run);
    showVerdict(verdict, run);
    showTrust(trust, run);
    const change = (key) => (numbers[key] > 0 && isNumber(mine[key]) ? signedPercent(mine[key] / numbers[key] - 1) : NONE);
    return [
      [h("a", {href: "#/runs/" + encodeURIComponent(run.id)}, moment(run.startedAt || run.createdAt))],
      [status],
      [verdict.hidden && trust.hidden ? NONE : h("span", {}, verdict, " ", trust)],
      [usersText(run), "num"],
      [timingText(run), "num"],
      [rate(numbers.totalRps), "num"],
      [percent(numbers.errorRate), numbers.errorRate > 0 ? "num fails" : "num"],
      [millis(numbers.p50ResponseMs), "num"],
      [millis(numbers.p95ResponseMs), "num"],
      [millis(numbers.p99ResponseMs), "num"],
      [change("p95ResponseMs"), "num"],
      [change("totalRps"), "num"],
      [h("button", {class: "small", "aria-pressed": shown, onclick: () => this.overlay(shown ? null : run)}, shown ? "Hide" : "Overlay"), "num"],
    ];
  }

  showDetails() {
    const run = this.run,
      text = "details" + JSON.stringify({...run, lastMetrics: null});
    if (this.simpleText === text && this.parts.panel.firstChild) return;
    this.simpleText = text;
    const pairs = (list) =>
      h(
        "dl",
        {class: "pairs"},
        list
          .filter(([, value]) => value !== undefined && value !== "")
          .map(([label, value]) => [h("dt", {class: "name"}, label), h("dd", {class: "name"}, String(value))]),
      );
    const metadata = Object.entries(run.metadata || {});
    const annotations = run.annotations || [];
    this.parts.panel.replaceChildren(
      h(
        "div",
        {class: "details"},
        h(
          "div",
          {class: "panel"},
          h("h2", {}, "Run"),
          pairs([
            ["Id", run.id],
            ["Source", run.source],
            ["Created", zonedMoment(run.createdAt)],
            ["Started", run.startedAt && zonedMoment(run.startedAt)],
            ["Finished", run.finishedAt && zonedMoment(run.finishedAt)],
            ["Stop reason", run.stopReason],
          ]),
        ),
        h("div", {class: "panel"}, h("h2", {}, "Load"), pairs(loadFacts(run))),
        h(
          "div",
          {class: "panel"},
          h("h2", {}, "Metadata"),
          metadata.length ? pairs(metadata.map(([key, value]) => [key, plainText(value)])) : h("p", {class: "soft"}, "None."),
        ),
        annotations.length
          ? h(
              "div",
              {class: "panel"},
              h("h2", {}, "Marked points in time"),
              pairs(annotations.map((one) => [clock((at(one.at) - this.start) / 1000), one.text])),
            )
          : null,
      ),
    );
  }

  tick() {
    const run = this.run;
    if (!run || !this.parts || this.closed) return;
    const {elapsed, total} = timing(run),
      parts = this.parts;
    parts.time.hidden = isNaN(elapsed);
    setText(parts.elapsed, isActive(run) ? clock(elapsed) : "Ran " + span(elapsed));
    this.bar.box.hidden = isNaN(total);
    this.bar.set(elapsed / total);
    setClass(this.bar.box, isActive(run) ? "meter" : "meter over");
    setText(
      parts.left,
      isNaN(total)
        ? isActive(run)
          ? "no deadline: runs until it is stopped"
          : ""
        : isActive(run)
          ? clock(Math.max(0, total - elapsed)) + " left of " + span(total)
          : "of " + span(total),
    );
    if (isActive(run) && !this.group.zoom) {
      this.setEnd();
      this.group.draw();
    }
  }
}

// ---- start ----

let view = null;

function route() {
  if (!session) return;
  if (view && view.close) view.close();
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  const match = /^#\/runs\/([^/]+)$/.exec(location.hash);
  let id = null;
  try {
    id = match && decodeURIComponent(match[1]);
  } catch (error) {
    /* not one of ours */
  }
  view = id ? new RunView(id) : new Overview();
  view.open();
  scrollTo(0, 0);
}

async function start() {
  try {
    const known = await get("/session");
    session = known.signedIn ? known : null;
  } catch (error) {
    $("main").replaceChildren(h("p", {class: "empty"}, "Load Manager did not answer. Trying again\u2026"));
    setTimeout(start, 2000);
    return;
  }
  showTop();
  if (session) route();
  else showSignIn("");
}

addEventListener("hashchange", () => {
  route();
  $("main").focus({preventScroll: true}); // so that the keyboard goes on from the new page
});
addEventListener("keydown", (event) => {
  if (
    event.key !== "/" ||
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) ||
    document.querySelector("dialog[open]")
  )
    return;
  const filter = $("filter") || $("endpoint-filter");
  if (filter) {
    event.preventDefault();
    filter.focus();
  }
});
start();
"""

# The parts, and the files they are with LOADMANAGER_PAGE_DIR (see tests/page.py).
PAGE_PARTS = {
    "PAGE_CSS": "page.css",
    "PAGE_TOOLS_JS": "tools.js",
    "PAGE_FORMS_JS": "forms.js",
    "PAGE_OVERVIEW_JS": "overview.js",
    "PAGE_CHARTS_JS": "charts.js",
    "PAGE_RUN_JS": "run.js",
}
PAGE_JS = "\n".join((PAGE_TOOLS_JS, PAGE_FORMS_JS, PAGE_OVERVIEW_JS, PAGE_CHARTS_JS, PAGE_RUN_JS))


def page_parts(folder: str | None) -> tuple[str, str]:
    """The page's CSS and JavaScript: the constants, or what the files of a folder hold now."""
    if not folder:
        return PAGE_CSS, PAGE_JS
    texts = []
    for name in PAGE_PARTS.values():
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            texts.append(file.read())
    return texts[0], "\n".join(texts[1:])


DASHBOARD_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Load Manager</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M1 13h3V8H1zm5.5 0h3V3h-3zM12 13h3V6h-3z' fill='%2300b052'/%3E%3C/svg%3E">
<style>/*css*/</style>
</head>
<body>
<a class="skip" href="#main">Skip to content</a>
<header id="top"></header>
<div id="lost" role="status" hidden></div>
<main id="main" tabindex="-1"><noscript><p class="note bad">This page needs JavaScript. The API works without it.</p></noscript></main>
<div id="toasts" role="alert"></div>
<div id="said" class="unseen" role="status" aria-live="polite"></div>
<script>/*js*/</script>
</body>
</html>
"""


DOCS_CSS = r"""
:root { color-scheme: light dark; --ink: #17212b; --dim: #5b6875; --line: #d9e0e6; --back: #fff; --soft: #f4f6f8; --accent: #0b62d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5eaef; --dim: #9aa7b3; --line: #33404c; --back: #12181e; --soft: #1b232b; --accent: #6aa9ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.25rem; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; } a { color: var(--accent); } .dim { color: var(--dim); }
.token { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 1rem 0; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; } summary { cursor: pointer; padding: .6rem .8rem; overflow-wrap: anywhere; }
summary b { display: inline-block; min-width: 4.5rem; } summary code { font-size: 1em; } .inside { padding: 0 .8rem .8rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
input, textarea, button { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: .35rem; padding: .35rem .5rem; max-width: 100%; }
textarea { width: 100%; min-height: 6rem; font-family: ui-monospace, monospace; } button { cursor: pointer; background: var(--accent); color: #fff; border: 0; }
@media (prefers-color-scheme: dark) { button { color: #06121f; } }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
pre { background: var(--soft); border-radius: .35rem; padding: .6rem; overflow: auto; max-height: 26rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

DOCS_JS = r"""
"use strict";

// ---- elements: everything is set as text, never as markup ----

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

function table(titles, rows) {
  const head = make("tr", "", ...titles.map((title) => make("th", title)));
  const body = rows.map((row) => make("tr", "", ...row.map((cell) => make("td", cell))));
  return make("table", "", make("thead", "", head), make("tbody", "", ...body));
}

// ---- the document's schemas, in words ----

let documentOfApi;

function resolved(schema) {
  const name = schema && schema.$ref && schema.$ref.split("/").pop();
  return name ? documentOfApi.components.schemas[name] : schema || {};
}

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "array") return "array of " + kind(schema.items);
  return [].concat(schema.type || "anything").join(" or ");
}

function properties(schema) {
  const whole = resolved(schema);
  const required = new Set(whole.required || []);
  return Object.entries(whole.properties || {}).map(([name, one]) => {
    const words = one.description || (one.anyOf && one.anyOf[0].description) || "";
    return [name + (required.has(name) ? " (required)" : ""), kind(one), words];
  });
}

function example(schema) {
  const whole = resolved(schema);
  const values = {};
  for (const [name, one] of Object.entries(whole.properties || {})) {
    if (!(whole.required || []).includes(name)) continue;
    values[name] = kind(one) === "string" ? name : one.minimum === undefined ? {} : Math.max(1, one.minimum);
  }
  return JSON.stringify(values, null, 2);
}

// ---- one route ----

function route(path, method, operation) {
  const inside = make("div");
  inside.className = "inside";
  inside.append(make("p", "Who may: " + operation["x-access"]));
  const inputs = {};
  if (operation.parameters.length) {
    inside.append(table(["Parameter", "In", "Allowed"], operation.parameters.map((one) => [one.name, one.in, one.description || kind(one.schema)])));
  }
  const body = operation.requestBody && operation.requestBody.content["application/json"].schema;
  if (body) inside.append(make("h3", "Body"), table(["Key", "Type", "Allowed"], properties(body)));
  inside.append(make("h3", "Answers"), answers(operation));
  inside.append(...tryIt(path, method, operation, body, inputs));
  return make("details", "", make("summary", "", make("b", method.toUpperCase()), make("code", path), " ", make("span", operation.summary)), inside);
}

function answers(operation) {
  const rows = Object.entries(operation.responses).map(([status, answer]) => {
    const content = Object.entries(answer.content || {}).map(([type, one]) => (type === "application/json" ? kind(one.schema) : type));
    return [status, answer.description, content.join(", ")];
  });
  return table(["Status", "", "Body"], rows);
}

function tryIt(path, method, operation, body, inputs) {
  const parts = [make("h3", "Try it")];
  for (const one of operation.parameters) {
    const input = make("input");
    input.placeholder = input.ariaLabel = one.name;
    inputs[one.name] = {input, place: one.in};
    parts.push(input, " ");
  }
  const text = body && make("textarea");
  if (text) {
    text.value = example(body);
    text.ariaLabel = "Body";
    parts.push(text);
  }
  const output = make("pre");
  output.hidden = true;
  const button = make("button", "Send");
  button.addEventListener("click", () => send(path, method, operation, inputs, text, output));
  return [...parts, make("p", "", button), output];
}

// ---- sending ----

async function send(path, method, operation, inputs, text, output) {
  const headers = {};
  const query = new URLSearchParams();
  let url = path;
  for (const [name, {input, place}] of Object.entries(inputs)) {
    if (place === "path") url = url.replace("{" + name + "}", encodeURIComponent(input.value));
    else if (input.value && place === "query") query.set(name, input.value);
    else if (input.value) headers[name] = input.value;
  }
  const token = document.getElementById("token").value;
  if (token && operation["x-access"] === "locust") headers["X-Locust-Token"] = token;
  else if (token) headers.Authorization = "Bearer " + token;
  if (text) headers["Content-Type"] = "application/json";
  output.hidden = false;
  output.textContent = "…";
  try {
    const answer = await fetch(url + (query.size ? "?" + query : ""), {method: method.toUpperCase(), headers, body: text ? text.value : undefined});
    output.textContent = answer.status + " " + answer.statusText + "\n" + pretty(await firstOf(answer));
  } catch (error) {
    output.textContent = "not sent: " + error.message;
  }
}

// An event stream has no end: a few seconds of it are shown.
async function firstOf(answer) {
  if (!(answer.headers.get("content-type") || "").startsWith("text/event-stream")) return answer.text();
  const reader = answer.body.getReader();
  setTimeout(() => reader.cancel(), 3000);
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) text += new TextDecoder().decode(part.value);
  return text;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function start() {
  documentOfApi = await (await fetch("/openapi.json")).json();
  const routes = document.getElementById("routes");
  for (const [path, methods] of Object.entries(documentOfApi.paths)) {
    for (const [method, operation] of Object.entries(methods)) routes.append(route(path, method, operation));
  }
  const schemas = document.getElementById("schemas");
  for (const [name, schema] of Object.entries(documentOfApi.components.schemas)) {
    const rows = properties(schema);
    if (rows.length) schemas.append(make("details", "", make("summary", "", make("code", name)), table(["Key", "Type", ""], rows)));
  }
}

start();
"""

DOCS_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load Manager: API reference</title>
<link rel="icon" href="data:,">
<style>/*css*/</style>
</head>
<body>
<h1>Load Manager: API reference</h1>
<p class="dim">Made from the route table; also as <a href="/openapi.json">OpenAPI 3.1</a>. Back to the <a href="/">dashboard</a>.</p>
<label class="token">Token for trying calls <input id="token" type="password" autocomplete="off" size="32"></label>
<main id="routes"></main>
<h2>Schemas</h2>
<div id="schemas"></div>
<script>/*js*/</script>
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
