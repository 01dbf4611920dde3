"""Runs written into a database before Load Manager starts on it: many, long, failed, oddly named."""

from __future__ import annotations

import math
import random
import time
import uuid
from pathlib import Path

import loadmanager as lm

HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'
ODD_NAMES = (
    HOSTILE,
    "\"quotes' & ampersands; --",
    "emoji \U0001f680\U0001f525 \u5b57 \u05e2\u05d1",
    "long-" + "name" * 60,
    "</title></style></textarea><b>bold",
    "javascript:alert(1)",
    "{{7*7}} ${7*7}",
    "'; DROP TABLE runs; --",
)


class SeededRuns:
    """with SeededRuns(path) as runs: runs.finished(...); the file is complete afterwards."""

    def __init__(self, path: Path) -> None:
        self._store = lm.Store(lm.open_database(f"sqlite:///{path}", str(path.parent)))
        self._noise = random.Random(7)  # the same runs each time: a trend must not change now and then

    def __enter__(self) -> SeededRuns:
        return self

    def __exit__(self, *exc_info) -> None:
        self._store.close()

    def finished(
        self,
        scenario: str = "checkout",
        age_s: float = 3600.0,
        seconds: float = 300.0,
        samples: int = 60,
        endpoints: int = 4,
        fail_percent: float = 0.0,
        status: lm.RunStatus = lm.RunStatus.FINISHED,
        **facts,
    ) -> str:
        """A final run that began `age_s` ago; the id."""
        started = time.time() - age_s
        run = lm.Run(
            str(uuid.uuid4()),
            facts.pop("tenant_id", "tenant-1"),
            facts.pop("env_id", "dev"),
            facts.pop("cluster_id", "local"),
            scenario,
            200,
            10.0,
            lm.RunStatus.PENDING,
            started - 1,
            duration_s=int(seconds),
            created_by="api",
            **facts.pop("at_create", {}),
        )
        self._store.add(run)
        self._store.transition(run.id, lm.RunStatus.RUNNING, durable=False, started_at=started)
        for index in range(samples):
            self._store.add_snapshot(
                run.id,
                _snapshot(self._noise, started, seconds, index / max(1, samples - 1), fail_percent, 0),
                "poll",
            )
        final = _snapshot(
            self._noise, started, seconds, 1.0, fail_percent, endpoints, facts.pop("endpoint_names", None)
        )
        for warning in facts.pop("warnings", ()):
            self._store.add_warning(run.id, "cpu_high", warning, started + seconds / 3)
        if status is lm.RunStatus.FINISHED:
            self._store.transition(run.id, lm.RunStatus.STOPPING, durable=False, stop_reason="duration")
        self._store.transition(run.id, status, final, durable=False, finished_at=started + seconds, **facts)
        return run.id

    def running(
        self, scenario: str, age_s: float, samples: int, cluster_id: str, tenant_id: str, env_id: str
    ) -> str:
        """A run that began `age_s` ago and goes on; the id."""
        started = time.time() - age_s
        run = lm.Run(
            str(uuid.uuid4()), tenant_id, env_id, cluster_id, scenario, 5, 5.0, lm.RunStatus.PENDING,
            started - 1, created_by="api",
        )  # fmt: skip
        self._store.add(run)
        self._store.transition(run.id, lm.RunStatus.RUNNING, durable=False, started_at=started)
        for index in range(samples):
            snapshot = _snapshot(self._noise, started, age_s, index / max(1, samples), 0, 0)
            self._store.add_snapshot(run.id, snapshot, "poll")
        return run.id


def _snapshot(
    noise: random.Random,
    started: float,
    seconds: float,
    share: float,
    fail_percent: float,
    endpoints: int,
    names: tuple[str, ...] | None = None,
) -> lm.Snapshot:
    users = min(200, int(1 + share * seconds * 10))
    wave = 1 + 0.15 * math.sin(share * 40) + noise.uniform(-0.05, 0.05)
    rps = users * 0.9 * wave
    requests = int(share * seconds * 180)
    p50, p95 = 24 * wave, 80 * wave * (3 if 0.6 < share < 0.65 else 1)
    names = names or tuple(f"/api/items/{number}" for number in range(endpoints))
    rows = tuple(
        _endpoint(number, name, requests // max(1, len(names)), fail_percent)
        for number, name in enumerate(names)
    )
    return lm.Snapshot(
        started + share * seconds,
        rps,
        requests,
        int(requests * fail_percent / 100),
        fail_percent,
        p50 * 1.2,
        p50,
        p95,
        p95 * 1.8,
        users,
        rows or None,
        rps * fail_percent / 100,
        p50,
        p95,
    )


def _endpoint(number: int, name: str, requests: int, fail_percent: float) -> lm.EndpointStats:
    failures = int(requests * fail_percent / 100) if number % 2 else 0
    return lm.EndpointStats(
        ("GET", "POST", "PUT")[number % 3],
        name,
        requests,
        failures,
        30.5 + number,
        2.0,
        900.0 + number,
        24.0 + number,
        requests / 300,
        80.0 + number,
        140.0 + number,
    )


def failing() -> dict:
    return {
        "status": lm.RunStatus.FAILED,
        "failure_reason": "cluster local answered nothing for 60 s: connection refused",
        "fail_percent": 12.5,
        "warnings": ("worker w-1 used 97% CPU: response times may be its own, not the target's",),
    }
