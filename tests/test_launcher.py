"""Launched clusters whose guard is killed, or whose disk is full."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LoadManager
from target import Target
from test_lifecycle import LOCUSTFILE, RULES, descendants, is_running, start_run
from waiting import eventually

import loadmanager


@pytest.fixture
def launched(load_manager: Callable[..., LoadManager]) -> Any:
    with Target() as target:
        launcher = {"type": "process", "locustfile": str(LOCUSTFILE), "workers": 1, "host": target.url}
        cluster = {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher}
        yield lambda: load_manager(cluster, orchestrator={**RULES, "lostAfterSeconds": 60})


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def guard_of(lm: LoadManager) -> int | None:
    assert lm.process is not None
    below = descendants(lm.process.pid)
    return next((pid for pid in below if loadmanager.GUARD_COMMAND in command_of(pid)), None)


def test_a_killed_guard_fails_its_run_with_the_reason_and_the_cluster_comes_back(
    launched: Callable[[], LoadManager],
) -> None:
    lm = launched()
    run = start_run(lm, durationSeconds=120)
    eventually(lambda: (lm.run(run["id"]).get("lastMetrics") or {}).get("totalRequests"), 20)
    guard = guard_of(lm)
    assert guard is not None and lm.process is not None
    before = descendants(lm.process.pid)
    os.kill(guard, signal.SIGKILL)
    failed = eventually(lambda: (found := lm.run(run["id"]))["status"] == "Failed" and found, 20)
    assert "guard" in failed["failureReason"] and "-9" in failed["failureReason"], failed["failureReason"]
    assert failed["lastMetrics"]["totalRequests"], "the numbers before are kept"
    eventually(lambda: not [pid for pid in before if is_running(pid)], 5, what="its processes are gone")
    again = start_run(lm, durationSeconds=2)
    assert lm.wait_for(again["id"], "Finished")["trust"] == "ok"
    assert guard_of(lm) not in (None, guard)


def test_a_guard_that_was_killed_while_idle_is_there_for_the_next_run(
    launched: Callable[[], LoadManager],
) -> None:
    lm = launched()
    eventually(lambda: lm.get("/v1/clusters").json[0]["state"] == "ready", 30)
    guard = eventually(lambda: guard_of(lm), 5)
    os.kill(guard, signal.SIGKILL)
    eventually(lambda: guard_of(lm) not in (None, guard), 10, what="another guard")
    run = start_run(lm, durationSeconds=1)
    lm.wait_for(run["id"], "Finished")


def test_processes_end_with_a_load_manager_whose_guard_was_started_again(
    launched: Callable[[], LoadManager],
) -> None:
    lm = launched()
    guard = eventually(lambda: guard_of(lm), 10)
    os.kill(guard, signal.SIGKILL)
    eventually(lambda: guard_of(lm) not in (None, guard), 10, what="another guard")
    eventually(lambda: lm.get("/v1/clusters").json[0]["state"] == "ready", 30)
    assert lm.process is not None
    below = descendants(lm.process.pid)
    lm.kill9()
    eventually(lambda: not [pid for pid in below if is_running(pid)], 10, what="no process is left")


def test_a_full_disk_ends_no_launched_cluster(launched: Callable[[], LoadManager], tmp_path: Path) -> None:
    logs = tmp_path / "lm0" / "loadmanager-logs"
    logs.mkdir(parents=True)
    for name in ("master", "worker-1"):
        (logs / f"local-{name}.log").symlink_to("/dev/full")
    lm = launched()
    run = start_run(lm, durationSeconds=2)
    assert lm.wait_for(run["id"], "Finished")["lastMetrics"]["totalRequests"]
    guard = guard_of(lm)
    assert guard is not None
    for name in ("master", "worker-1"):  # the disk has room again
        (logs / f"local-{name}.log").unlink()
    worker = next(pid for pid in descendants(guard) if "--worker" in command_of(pid))
    os.kill(worker, signal.SIGKILL)
    log = logs / "local-worker-1.log"
    eventually(lambda: log.exists() and "could not be written" in log.read_text(), 10)
    assert guard_of(lm) == guard


def test_what_a_process_says_is_in_its_log_and_a_long_log_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    log = loadmanager._GuardedLog(str(path))
    for number in range(30):
        log.write(b"%d " % number + b"x" * (1 << 20) + b"\n")
    assert path.stat().st_size <= loadmanager.LOG_BYTES + (2 << 20)
    assert path.read_bytes().rstrip(b"x\n").endswith(b"29 ")
