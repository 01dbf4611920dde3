"""Real Locust processes for tests: a master with its workers, or one standalone Locust.

    with LocustCluster("locust/locustfile.py", workers=2, env={"TENANT_ID": "t"}) as cluster:
        cluster.post("/swarm", user_count=4, spawn_rate=4, host=target.url)
        eventually(lambda: cluster.stats()["user_count"] == 4)

Free ports, every wait has a deadline, each process is ended by its own pid, and a Locust
that dies early shows its log."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

try:
    from waiting import eventually
except ImportError:  # imported as tests.locust_process
    from tests.waiting import eventually

READY_WITHIN_S = 30.0  # a loaded machine starts Locust slowly
END_WITHIN_S = 10.0

# Variables the hooks read: a test sets them itself, whatever the developer's shell has.
HOOK_VARIABLES = (
    "CONTROL_PLANE_URL",
    "CONTROL_PLANE_TOKEN",
    "RUN_ID",
    "TENANT_ID",
    "ENV_ID",
    "METRICS_PUSH_INTERVAL",
    "CLUSTER_ID",
    "CONTROL_PLANE_CA_FILE",
    "CONTROL_PLANE_CLIENT_CERT",
)


def find_free_port() -> int:
    """One below those that the system gives to outgoing connections: of these one could take it before it is
    listened at."""
    while True:
        port = secrets.randbelow(20_000) + 12_000
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


class LocustCluster:
    """A Locust master with `workers` worker processes; workers=0: standalone.

    `locustfile` is a path, or the text of a locustfile. `extra_args` go to the master
    (or standalone), `worker_args` to the workers."""

    def __init__(
        self,
        locustfile: str | Path,
        workers: int = 2,
        env: Mapping[str, str] | None = None,
        extra_args: Iterable[str] = (),
        *,
        worker_args: Iterable[str] = (),
        base_path: str = "",
        python: str = sys.executable,
        web_port: int | None = None,
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="locust-"))
        self._locustfile = self._find_locustfile(locustfile)
        self._worker_count = workers
        self._extra_args, self._worker_args = list(extra_args), list(worker_args)
        self._python = python
        self._env = {
            name: value
            for name, value in os.environ.items()
            if name not in HOOK_VARIABLES and not name.startswith("LOCUST_")
        }
        self._env.update(env or {})
        self._env.update(PYTHONUNBUFFERED="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        self._web_port = web_port or find_free_port()
        self._bind_port = find_free_port()
        if base_path:
            self._extra_args += ["--web-base-path", base_path]
        self.base_url = f"http://127.0.0.1:{self._web_port}{base_path}"
        self.master: subprocess.Popen | None = None  # the standalone process when workers=0
        self.workers: list[subprocess.Popen] = []
        self._logs: list[tuple[str, Path]] = []

    # ---- life ----

    def start(self) -> LocustCluster:
        try:
            self._start_master()
            for _ in range(self._worker_count):
                self.add_worker(wait=False)
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    __enter__ = start

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def wait_ready(self, workers: int | None = None) -> None:
        """Return when the web UI answers and `workers` workers (default: all living ones) are ready."""
        wanted = sum(worker.poll() is None for worker in self.workers) if workers is None else workers

        def ready() -> bool:
            self._check_alive()
            return self._connected_workers() >= wanted

        eventually(ready, within_s=READY_WITHIN_S, what=f"Locust ready with {wanted} workers")

    def stop(self) -> None:
        """End all processes: SIGTERM, after END_WITHIN_S SIGKILL."""
        processes = [process for process in [*self.workers, self.master] if process]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            _end(process)
        shutil.rmtree(self._directory, ignore_errors=True)

    def terminate_master(self) -> int:
        """SIGTERM to the master; returns its exit status."""
        assert self.master
        self.master.send_signal(signal.SIGTERM)
        return _end(self.master)

    def kill_master(self) -> None:
        """kill -9."""
        assert self.master
        self.master.kill()
        self.master.wait(END_WITHIN_S)

    def restart_master(self) -> None:
        """A new master on the same ports; it waits for the web UI, not for workers (Locust's do not come
        back)."""
        if self.master and self.master.poll() is None:
            self.terminate_master()
        self._start_master()
        eventually(
            lambda: self._check_alive() or self.stats(),
            within_s=READY_WITHIN_S,
            what="the new master's web UI",
        )

    def kill_worker(self, index: int) -> None:
        """kill -9."""
        self.workers[index].kill()
        self.workers[index].wait(END_WITHIN_S)

    def add_worker(self, wait: bool = True) -> subprocess.Popen:
        worker = self._spawn(
            f"worker-{len(self.workers)}",
            [
                "--worker",
                "--master-host",
                "127.0.0.1",
                "--master-port",
                str(self._bind_port),
                *self._worker_args,
            ],
        )
        self.workers.append(worker)
        if wait:
            alive = sum(process.poll() is None for process in self.workers)
            eventually(lambda: self._connected_workers() >= alive, within_s=READY_WITHIN_S)
        return worker

    # ---- its web API ----

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        return json.loads(self.request("GET", path, headers=headers))

    def post(self, path: str, **fields: Any) -> Any:
        """POST a form; falls back to GET, which Locust before 2.47 wants for /stop and /stats/reset."""
        body = urllib.parse.urlencode(fields).encode()
        try:
            answer = self.request("POST", path, body)
        except urllib.error.HTTPError as exc:
            if exc.code not in (405, 500) or fields:
                raise
            answer = self.request("GET", path)
        return json.loads(answer) if answer.lstrip().startswith(b"{") else answer.decode()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        request = urllib.request.Request(
            self.base_url + path, data=body, method=method, headers=dict(headers or {})
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.read()

    def swarm(self, user_count: int = 4, spawn_rate: float = 10, **fields: Any) -> Any:
        return self.post("/swarm", user_count=user_count, spawn_rate=spawn_rate, **fields)

    def stats(self) -> dict:
        """Locust's own statistics; cached by Locust for 2 s, the state included."""
        return self.get("/stats/requests")

    def csv_rows(self) -> list[dict[str, str]]:
        """Locust's own report, uncached; the last row is Aggregated."""
        return list(csv.DictReader(io.StringIO(self.request("GET", "/stats/requests/csv").decode())))

    def log(self) -> str:
        """What all processes of this cluster have written so far."""
        return "\n".join(
            f"---- {name}\n{path.read_text(errors='replace')}" for name, path in self._logs if path.exists()
        )

    # ---- inside ----

    def _find_locustfile(self, locustfile: str | Path) -> Path:
        if isinstance(locustfile, Path) or "\n" not in locustfile:
            return Path(locustfile).resolve()
        path = self._directory / "locustfile.py"
        path.write_text(locustfile)
        return path

    def _start_master(self) -> None:
        mode = []
        if self._worker_count:
            mode = ["--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(self._bind_port)]
        self.master = self._spawn(
            "master" if mode else "standalone",
            [*mode, "--web-host", "127.0.0.1", "--web-port", str(self._web_port), *self._extra_args],
        )

    def _spawn(self, name: str, args: list[str]) -> subprocess.Popen:
        path = self._directory / f"{len(self._logs)}-{name}.log"
        self._logs.append((name, path))
        with path.open("wb") as log:
            return subprocess.Popen(
                [self._python, "-m", "locust", "-f", str(self._locustfile), *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._env,
                cwd=self._directory,
            )

    def _connected_workers(self) -> int:
        try:
            return self.get("/worker-count")["worker_count"]  # not cached
        except urllib.error.HTTPError as exc:
            if exc.code not in (404, 500):  # Locust before 2.37 does not have it
                raise
            return len(self.stats().get("workers", []))

    def _check_alive(self) -> None:
        """DiedEarly, with the log, when a process that should run has ended."""
        for process in [self.master, *self.workers]:
            if process and process.poll() not in (None, -signal.SIGKILL):
                raise LocustDiedEarly(f"Locust ended with {process.returncode}:\n{self.log()}")


class LocustDiedEarly(BaseException):
    """Not an Exception: `eventually` must not wait on."""


def _end(process: subprocess.Popen) -> int:
    try:
        return process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(END_WITHIN_S)
