"""A PostgreSQL server of its own, on a free port, as an unprivileged user when we are root.

with PostgresServer() as server: server.url()"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg
from locust_process import find_free_port
from waiting import eventually


class PostgresServer:
    def __init__(self) -> None:
        # Not below the tests' folder: only root may enter that, and the server is not root's.
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = find_free_port()
        self._binaries = _binaries()
        self._as_user: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, user: str = "lm", port: int | None = None) -> str:
        """port: of a proxy before it."""
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres"

    def copied(self) -> PostgresServer:
        """Another server with all that this one has committed: `with` it, it serves. What is written here
        later it lacks, as a standby that lagged."""
        copy = PostgresServer()
        copy._give_to_nobody()
        backup = [
            self._binaries / "pg_basebackup",
            "-D",
            copy.folder / "data",
            "-c",
            "fast",
            "-d",
            self.url(),
        ]
        subprocess.run(backup, check=True, capture_output=True, cwd=copy.folder, **copy._as_user)
        return copy

    def __enter__(self) -> PostgresServer:
        self._give_to_nobody()
        data = self.folder / "data"
        if not data.exists():
            self._make(data)
        options = ["-p", str(self.port), "-c", f"unix_socket_directories={self.folder}"]
        options += ["-c", "listen_addresses=127.0.0.1", "-F"]
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", data, *options],
                stdout=log, stderr=log, cwd=self.folder, **self._as_user,
            )  # fmt: skip
        eventually(lambda: psycopg.connect(self.url()).close() is None, 30, what="PostgreSQL answers")
        return self

    def _make(self, data: Path) -> None:
        subprocess.run(
            [self._binaries / "initdb", "-D", data, "-U", "lm", "-A", "trust", "-N"],
            check=True, capture_output=True, cwd=self.folder, **self._as_user,
        )  # fmt: skip

    def __exit__(self, *exc_info) -> None:
        assert self._process
        self._process.send_signal(signal.SIGINT)  # a fast shutdown: clients are disconnected
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _give_to_nobody(self) -> None:
        """PostgreSQL refuses to be root's."""
        if os.getuid() != 0:
            return
        nobody = pwd.getpwnam("nobody")
        os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid}


def _binaries() -> Path:
    found = shutil.which("initdb") or next(
        iter(sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)), None
    )
    assert found, "PostgreSQL is not installed: see tests/packages.sh"
    return Path(found).resolve().parent
