"""Load Manager with faults from within: `python tests/campaign_server.py -config FILE`.

Every function of loadmanager.py is wrapped before main() is called, so that a campaign can have it raise an
exception nobody foresaw, sleep, or kill the process, in a thread of its choice; the database can be slow,
refuse, or kill at a commit; threads and descriptors can be limited. Commands are lines of JSON on the Unix
socket that $CAMPAIGN_CONTROL names. The product knows nothing of it."""

from __future__ import annotations

import ctypes
import fnmatch
import functools
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import loadmanager  # noqa: E402

# What writes the log, and edges that are the last resort of a thread: an exception there can only end it.
LAST_RESORTS = {"log", "_log_word", "utc_text", "monotonic_s", "main", "serve", "start_thread", "dump_json"}
RUN_PART = re.compile(r"[- ][0-9a-f]{8}(?:-.*)?$|[- ]\d+$")


class Unforeseen(Exception):
    """An exception that no line of Load Manager names."""


class Fault:
    """One fault: where, in which thread, what, and how many times."""

    def __init__(self, command: dict[str, Any]):
        self.function = command.get("function", "*")
        self.thread = command.get("thread", "*")
        self.when = command.get("when", "before")
        self.what = command["do"]
        self.seconds = command.get("seconds", 0.0)
        self.skip = command.get("skip", 0)
        self.times = command.get("times", 1)
        self._lock = threading.Lock()

    def meant(self, name: str, when: str) -> bool:
        if when != self.when or not fnmatch.fnmatchcase(name, self.function):
            return False
        if not fnmatch.fnmatchcase(thread_kind(), self.thread):
            return False
        with self._lock:
            self.skip -= 1
            if self.skip >= 0 or self.times <= 0:
                return False
            self.times -= 1
            return True

    def apply(self, name: str) -> None:
        HITS.append(f"{self.what} {self.when} {name} in {thread_kind()}")
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "sleep":
            time.sleep(self.seconds)
        if self.what == "raise":
            raise Unforeseen(f"injected {self.when} {name}")


FAULTS: list[Fault] = []
HITS: list[str] = []
OBSERVED: set[tuple[str, str]] = set()
OBSERVING = False


def thread_kind() -> str:
    """The thread's name without the run that it works for."""
    return RUN_PART.sub("", threading.current_thread().name)


def visit(name: str, when: str) -> None:
    for fault in list(FAULTS):
        if fault.meant(name, when):
            fault.apply(name)


def wrapped(name: str, function: types.FunctionType) -> Any:
    @functools.wraps(function)
    def with_faults(*args: Any, **kwargs: Any) -> Any:
        if OBSERVING:
            OBSERVED.add((thread_kind(), name))
        if not FAULTS:
            return function(*args, **kwargs)
        visit(name, "before")
        result = function(*args, **kwargs)
        visit(name, "after")
        return result

    return with_faults


def functions_of(module: types.ModuleType) -> Iterator[tuple[Any, str, str, types.FunctionType]]:
    """Owner, attribute, qualified name and function of everything that is written in the module."""
    for owner in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
        if owner is not module and owner.__module__ != module.__name__:
            continue
        for attribute, value in list(vars(owner).items()):
            is_ours = isinstance(value, types.FunctionType) and value.__module__ == module.__name__
            if is_ours and not attribute.startswith("__") and attribute not in LAST_RESORTS:
                yield owner, attribute, value.__qualname__, value


def wrap_all(module: types.ModuleType) -> None:
    for owner, attribute, name, function in list(functions_of(module)):
        setattr(owner, attribute, wrapped(name, function))


# ---- the database --------------------------------------------------------------


class Database:
    """What the next statements meet."""

    slow_s = 0.0  # for each statement
    error: str | None = None  # instead of each statement that writes
    kill_at: str | None = None  # such as COMMIT
    kill_when = "before"
    skip = 0


class FaultyConnection(sqlite3.Connection):
    def execute(self, sql: str, *values: Any) -> Any:
        return self._with_faults(sql, lambda: sqlite3.Connection.execute(self, sql, *values))

    def executemany(self, sql: str, *values: Any) -> Any:
        return self._with_faults(sql, lambda: sqlite3.Connection.executemany(self, sql, *values))

    def _with_faults(self, sql: str, work: Any) -> Any:
        word = sql.split(maxsplit=1)[0].upper()
        is_killer = Database.kill_at == word and self._is_now()
        if is_killer and Database.kill_when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if Database.slow_s:
            time.sleep(Database.slow_s)
        if Database.error and word in ("BEGIN", "COMMIT", "INSERT", "UPDATE", "DELETE"):
            HITS.append("database refused")
            raise sqlite3.OperationalError(Database.error)
        result = work()
        if is_killer:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    @staticmethod
    def _is_now() -> bool:
        Database.skip -= 1
        return Database.skip < 0


def patch_sqlite() -> None:
    sqlite3.connect = functools.partial(sqlite3.connect, factory=FaultyConnection)  # type: ignore[assignment]


# ---- limits --------------------------------------------------------------------


def become_bound_by_thread_limits(uid: int) -> None:
    """Root is bound by no RLIMIT_NPROC: take another uid, and only the capability to read files as before.

    Must be called before the first thread, as capabilities belong to threads."""
    if os.getuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    reads_files = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    data = (ctypes.c_uint32 * 6)(reads_files, reads_files, 0, 0, 0, 0)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def limit(what: str, spare: int | None) -> dict[str, Any]:
    """Leave room for `spare` more threads or descriptors; None lifts the limit."""
    kind = {"threads": resource.RLIMIT_NPROC, "descriptors": resource.RLIMIT_NOFILE}[what]
    _, hard = resource.getrlimit(kind)
    if spare is None:
        resource.setrlimit(kind, (hard, hard))
        return {}
    folder = "/proc/self/task" if what == "threads" else "/proc/self/fd"
    used = [int(name) for name in os.listdir(folder)]
    soft = len(used) + spare if what == "threads" else max(used) + 1 + spare
    resource.setrlimit(kind, (soft, hard))
    return {"limit": soft}


# ---- commands ------------------------------------------------------------------


def obey(command: dict[str, Any]) -> Any:
    global OBSERVING
    what = command["do"]
    if what in ("raise", "sleep", "kill"):
        FAULTS.append(Fault(command))
    elif what == "clear":
        FAULTS.clear()
        Database.slow_s, Database.error, Database.kill_at = 0.0, None, None
    elif what == "observe":
        OBSERVING = True
    elif what == "observed":
        OBSERVING = False
        return sorted(OBSERVED)
    elif what == "hits":
        return HITS
    elif what == "threads":
        return sorted(thread.name for thread in threading.enumerate())
    elif what == "stacks":
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return {
            f"{names.get(ident)} {ident}": traceback.format_stack(frame)[-6:]
            for ident, frame in sys._current_frames().items()
        }
    elif what == "database":
        Database.slow_s, Database.error = command.get("slow_s", 0.0), command.get("error")
        Database.kill_when, Database.skip = command.get("when", "before"), command.get("skip", 0)
        Database.kill_at = command.get("kill_at")
    elif what == "limit":
        return limit(command["what"], command.get("spare"))
    else:
        raise ValueError(what)
    return None


def listen(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4)
    threading.Thread(target=serve_commands, args=(listener,), name="campaign", daemon=True).start()


def serve_commands(listener: socket.socket) -> None:
    """One caller at a time, who keeps the connection: there may be no descriptor for another."""
    while True:
        sock, _ = listener.accept()
        with sock, sock.makefile("rw") as lines:
            for line in lines:
                try:
                    answer = {"result": obey(json.loads(line))}
                except Exception as error:  # noqa: BLE001 - the campaign is told
                    answer = {"error": repr(error)}
                lines.write(json.dumps(answer) + "\n")
                lines.flush()


if __name__ == "__main__":
    become_bound_by_thread_limits(int(os.environ.get("CAMPAIGN_UID", "0")) or 65534)
    patch_sqlite()
    wrap_all(loadmanager)
    control = os.environ["CAMPAIGN_CONTROL"]
    if os.path.exists(control):
        os.unlink(control)  # of the process before, which was killed
    listen(control)
    sys.exit(loadmanager.main())
