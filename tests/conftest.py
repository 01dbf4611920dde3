"""Fixtures: the real program as a process, and fake Locust masters for what a real one cannot show."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema
import pytest
from fake_locust import FakeLocust
from waiting import eventually

import loadmanager

ROOT = Path(__file__).resolve().parent.parent
API_TOKEN = "test-api-token"
CALLBACK_TOKEN = "test-callback-token"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class LoadManager:
    """`python loadmanager.py -config ...` as a process, in a folder of its own."""

    def __init__(self, folder: Path, config: dict[str, Any], environment: dict[str, str] | None = None):
        self.folder = folder
        self.config = config
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.tls: ssl.SSLContext | None = None  # how its https is trusted
        self._log_file = folder / "loadmanager.log"
        self._command: list[str] = [sys.executable, str(ROOT / "loadmanager.py")]

    # ---- life ----

    def start(self, preexec: Callable[[], None] | None = None) -> LoadManager:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        seen = len(self.log())
        with self._log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "-config", str(self.folder / "config.json")],
                stderr=log, stdout=log, env=self.environment, cwd=self.folder, preexec_fn=preexec,
            )  # fmt: skip
        found = eventually(
            lambda: self._listening(seen), 20, what=f"Load Manager listens; its log:\n{self.log()[seen:]}"
        )
        self.url = found
        port = urlsplit(found).port
        self.config.setdefault("server", {})["port"] = port  # a restart comes back at the same address
        return self

    def _listening(self, seen: int) -> str | None:
        match = re.search(r'listening(?: url=|", "url": ")([^\s"]+)', self.log()[seen:])
        if match is None and self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"Load Manager ended with {self.process.returncode}:\n{self.log()}")
        return match.group(1) if match else None

    def kill9(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self, with_signal: int = signal.SIGTERM) -> tuple[int, float]:
        """Exit status and seconds it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(with_signal)
        return self.process.wait(15), time.monotonic() - began

    def restart(self) -> LoadManager:
        if self.process is not None and self.process.poll() is None:
            self.terminate()
        return self.start()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(8)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log(self) -> str:
        return self._log_file.read_text(errors="replace") if self._log_file.exists() else ""

    # ---- talking to it ----

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
        token: str | None = API_TOKEN, timeout_s: float = 40,
    ) -> Answer:  # fmt: skip
        """One request; a body that is not bytes is sent as JSON; token None sends none."""
        parts = urlsplit(self.url)
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=self.tls
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        sent = dict(headers or {})
        if token is not None and "Authorization" not in sent:
            sent["Authorization"] = f"Bearer {token}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            answer = Answer(
                response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
            )
        finally:
            connection.close()
        assert_documented(method, path, answer)
        return answer

    def get(self, path: str, **how: Any) -> Answer:
        return self.request("GET", path, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> Answer:
        return self.request("POST", path, body, **how)

    def callback(self, name: str, body: Any, token: str = CALLBACK_TOKEN) -> Answer:
        return self.request(
            "POST", f"/v1/internal/locust/{name}", body, {"X-Locust-Token": token}, token=None
        )

    def create(self, **changes: Any) -> Answer:
        return self.post("/v1/tests", create_body(**changes))

    def run(self, run_id: str) -> dict[str, Any]:
        return self.get(f"/v1/tests/{run_id}").json

    def wait_for(self, run_id: str, *statuses: str, within_s: float = 20) -> dict[str, Any]:
        """The run, once its status is one of these."""

        def reached() -> dict[str, Any] | None:
            run = self.run(run_id)
            if run["status"] not in statuses and run["status"] in ("Finished", "Failed"):
                raise AssertionError(f"the run is final as {run['status']}: {run.get('failureReason')}")
            return run if run["status"] in statuses else None

        return eventually(
            reached, within_s, what=f"run is {' or '.join(statuses)}; log:\n{self.log()[-2500:]}"
        )

    def connect(self) -> socket.socket:
        parts = urlsplit(self.url)
        sock = socket.create_connection((parts.hostname, parts.port), 10)
        sock.settimeout(10)
        return sock

    def raw(self, sent: bytes, until_closed: bool = False) -> bytes:
        """What comes back for these bytes: one answer, or all until the connection is closed."""
        with self.connect() as sock:
            sock.sendall(sent)
            return read_answers(sock, until_closed=until_closed)


DOCUMENT = loadmanager.openapi_document()
TEMPLATES = [
    (re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), operations)
    for path, operations in DOCUMENT["paths"].items()
]
TEMPLATES.sort(
    key=lambda template: template[0].pattern.count("[^/]+")
)  # /v1/tests/compare before /v1/tests/{id}


def assert_documented(method: str, path: str, answer: Answer) -> None:
    """Every answer that any test gets is one that the API's document has, of its type and schema."""
    operations = next(
        (operations for pattern, operations in TEMPLATES if pattern.fullmatch(path.partition("?")[0])), {}
    )
    operation = operations.get(method.lower())
    if operation is None:
        return  # an odd path or method: 404 or 405, which tests look at themselves
    described = operation["responses"].get(str(answer.status))
    assert described is not None, (
        f"{method} {path} answered {answer.status}, which the document does not have: {answer.body[:300]!r}"
    )
    contents = described.get("content", {})
    if contents:
        assert answer.headers["content-type"] in contents, (
            f"{method} {path}: {answer.headers['content-type']} instead of {' or '.join(contents)}"
        )
    for media, content in contents.items():
        is_plain = "content-encoding" not in answer.headers and len(answer.body) < 200_000
        if media == loadmanager.JSON_TYPE and is_plain:
            jsonschema.validate(answer.json, {**content["schema"], "components": DOCUMENT["components"]})


def read_answers(sock: socket.socket, count: int = 1, until_closed: bool = False) -> bytes:
    """Bytes of `count` answers with Content-Length, or of all until the other side closes."""
    received = b""
    while True:
        if not until_closed and _answers_in(received) >= count:
            return received
        try:
            more = sock.recv(65536)
        except ConnectionResetError:
            return received
        if not more:
            return received
        received += more


def _answers_in(received: bytes) -> int:
    count = 0
    while b"\r\n\r\n" in received:
        head, _, rest = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(length.group(1)) if length else 0
        if len(rest) < size:
            return count
        count, received = count + 1, rest[size:]
    return count


def create_body(**changes: Any) -> dict[str, Any]:
    body = {"tenantId": "acme", "envId": "dev", "scenarioId": "browse", "targetUsers": 5, "spawnRate": 5}
    body.update(changes)
    return {name: value for name, value in body.items() if value is not ...}


def base_config(*clusters: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "server": {"port": 0},
        "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
        "orchestrator": {"metricsPollIntervalSeconds": 0.5, "startTimeoutSeconds": 3, "lostAfterSeconds": 3},
        "storage": {"url": "sqlite:///runs.db"},
        "locustClusters": list(clusters),
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    return config


def cluster_config(url: str, cluster_id: str = "one", **more: Any) -> dict[str, Any]:
    return {"id": cluster_id, "tenantId": "acme", "envId": "dev", "baseUrl": url, **more}


@pytest.fixture
def load_manager(tmp_path: Path) -> Iterator[Callable[..., LoadManager]]:
    """Starts Load Managers: load_manager(cluster_config(url), orchestrator={...})."""
    started: list[LoadManager] = []

    def start(
        *clusters: dict[str, Any],
        environment: dict[str, str] | None = None,
        preexec: Any = None,
        **sections: Any,
    ) -> LoadManager:
        folder = tmp_path / f"lm{len(started)}"
        folder.mkdir(exist_ok=True)  # a test may have put something into it
        manager = LoadManager(folder, base_config(*clusters, **sections), environment)
        started.append(manager)
        return manager.start(preexec)

    yield start
    for manager in started:
        manager.end()


@pytest.fixture
def fake_locust() -> Iterator[Callable[..., FakeLocust]]:
    """Starts fake Locust masters: fake_locust(hooks=True)."""
    started: list[FakeLocust] = []

    def start(**how: Any) -> FakeLocust:
        fake = FakeLocust(**how).start()
        started.append(fake)
        return fake

    yield start
    for fake in started:
        fake.close()


@pytest.fixture
def fake(fake_locust: Callable[..., FakeLocust]) -> FakeLocust:
    """An idle fake master with hooks."""
    return fake_locust(hooks=True)


@pytest.fixture
def lm(load_manager: Callable[..., LoadManager], fake: FakeLocust) -> LoadManager:
    """A Load Manager with one cluster, that fake master."""
    return load_manager(cluster_config(fake.url))
