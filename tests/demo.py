"""`make demo`: a real load test, end to end, on this machine.

Starts a small target and a Load Manager that launches a Locust master with two workers,
creates a 20 s test, shows it live, prints its table, stops everything. Exit status 0, or
1 with what failed."""

from __future__ import annotations

import http.client
import json
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
DURATION_S = 20
START_WITHIN_S = 40


class DemoFailed(Exception):
    """What failed, as a sentence, with the end of the log that tells why."""


class Program:
    """A process of the demo, its output in a log file; ended by its own id."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self.log_file = FOLDER / f"{name}.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=FOLDER, stdout=log, stderr=log, start_new_session=True
            )

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for(self, pattern: str) -> str:
        """The pattern's group in the log, once it is there."""
        deadline = time.monotonic() + START_WITHIN_S
        while time.monotonic() < deadline:
            match = re.search(pattern, self.log())
            if match:
                return match.group(1)
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise DemoFailed(f"{self.name} did not start; its log ends with:\n{self.log()[-1500:]}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(8)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Client:
    def __init__(self, url: str, token: str):
        self._parts = urlsplit(url)
        self._token = token

    def call(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection(self._parts.hostname, self._parts.port, timeout=40)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except OSError as error:
            raise DemoFailed(f"Load Manager does not answer: {error}") from None
        finally:
            connection.close()
        if response.status >= 400:
            raise DemoFailed(f"{method} {path} answered {response.status}: {answer['message']}")
        return answer


def write_config(target_url: str, token: str) -> Path:
    config = {
        "server": {"host": "127.0.0.1", "port": 0},
        "security": {"apiToken": token, "locustCallbackToken": secrets.token_hex(16)},
        "orchestrator": {"metricsPollIntervalSeconds": 1},
        "storage": {"url": "sqlite:///demo.db"},
        "locustClusters": [{
            "id": "local-demo", "tenantId": "tenant-1", "envId": "dev",
            "launcher": {"type": "process", "locustfile": "../locust/locustfile.py", "workers": 2,
                "host": target_url},
        }],
    }  # fmt: skip
    path = FOLDER / "config.json"
    path.write_text(json.dumps(config, indent=2))
    return path


def follow(client: Client, run: dict[str, Any]) -> dict[str, Any]:
    """Show the run until it is final: one line redrawn on a terminal, a line every 5 s elsewhere."""
    live, shown_at = sys.stdout.isatty(), 0.0
    deadline = time.monotonic() + DURATION_S + 40
    while run["status"] not in ("Finished", "Failed"):
        if time.monotonic() > deadline:
            raise DemoFailed(f"the run is still {run['status']}")
        time.sleep(0.5)
        run = client.call("GET", f"/v1/tests/{run['id']}")
        if live:
            print(f"\r\033[K  {progress(run)}", end="", flush=True)
        elif time.monotonic() - shown_at >= 5:
            print(f"  {progress(run)}", flush=True)
            shown_at = time.monotonic()
    print("\r\033[K" if live else "", end="")
    return run


def progress(run: dict[str, Any]) -> str:
    metrics = run.get("lastMetrics") or {}
    return (
        f"{run['status']:<9} users {shown(metrics.get('currentUsers'))}  requests "
        f"{shown(metrics.get('totalRequests'))}  "
        f"failures {shown(metrics.get('totalFailures'))}  {shown(metrics.get('totalRps'), 1)} req/s "
        f" p95 {shown(metrics.get('p95ResponseMs'))} ms"
    )


def shown(value: Any, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(metrics: dict[str, Any]) -> None:
    print(
        "\n  "
        f"{'endpoint':<28}{'requests':>10}{'failures':>10}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'req/s':>9}"
    )
    for row in metrics["requestStats"].values():
        cells = (
            row["numRequests"],
            row["numFailures"],
            row["medianResponseTime"],
            row["p95ResponseTime"],
            row["p99ResponseTime"],
        )
        print_row(f"{row['method']} {row['name']}", cells, row["requestsPerSec"])
    cells = tuple(
        metrics[name]
        for name in ("totalRequests", "totalFailures", "p50ResponseMs", "p95ResponseMs", "p99ResponseMs")
    )
    print_row("Aggregated", cells, metrics["totalRps"])


def print_row(name: str, cells: tuple[Any, ...], per_s: float | None) -> None:
    requests, failures, *percentiles = cells
    print(
        f"  {name:<28}{requests:>10}{failures:>10}"
        + "".join(f"{shown(cell):>9}" for cell in percentiles)
        + f"{shown(per_s, 2):>9}"
    )


def demo(started: list[Program]) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    token = secrets.token_hex(16)
    print("Starting a small target, Load Manager, and a Locust master with two workers ...", flush=True)
    target = Program("target", [sys.executable, str(ROOT / "tests" / "target.py"), "--port", "0"])
    started.append(target)
    config = write_config(target.wait_for(r"(http://\S+)"), token)
    manager = Program("loadmanager", [sys.executable, str(ROOT / "loadmanager.py"), "-config", str(config)])
    started.append(manager)
    url = manager.wait_for(r"listening url=(\S+)")
    client = Client(url, token)
    body = {
        "tenantId": "tenant-1",
        "envId": "dev",
        "scenarioId": "demo",
        "targetUsers": 20,
        "spawnRate": 10,
        "durationSeconds": DURATION_S,
    }
    run = client.call("POST", "/v1/tests", body)
    print(f"Run {run['id']} is {run['status']} on {url}: 20 users, {DURATION_S} s", flush=True)
    run = follow(client, run)
    if run["status"] != "Finished" or not run.get("lastMetrics", {}).get("totalRequests"):
        raise DemoFailed(
            f"the run ended {run['status']}: "
            f"{run.get('failureReason', 'without requests')}\n{manager.log()[-2000:]}"
        )
    print(
        f"Run {run['id']} is {run['status']} (stopReason {run['stopReason']}), started "
        f"{run['startedAt']}, finished {run['finishedAt']}"
    )
    print_table(run["lastMetrics"])
    for warning in run.get("warnings", []):
        print(f"  warning {warning['code']}: {warning['message']}")


def ends_of_locust_s_logs() -> str:
    """What the launched Locust said last, which is where a locustfile that does not load is explained."""
    ends = ""
    for path in sorted(FOLDER.glob("loadmanager-logs/*.log")):
        lines = path.read_text(errors="replace").splitlines()
        ends += f"\n{path.relative_to(ROOT)} ends with:\n  " + "\n  ".join(lines[-8:]) if lines else ""
    return ends


def main() -> int:
    started: list[Program] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        demo(started)
        status = 0
    except DemoFailed as error:
        print(f"\nThe demo failed: {error}{ends_of_locust_s_logs()}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        status = 1
    finally:
        for program in reversed(started):
            program.end()
    if status == 0:
        print(how_to_see_it())
    return status


def how_to_see_it() -> str:
    """The command that serves the demo's database, and where to open it with which token."""
    token = json.loads((FOLDER / "config.json").read_text())["security"]["apiToken"]
    return (
        f"\nEverything is stopped. The run and its samples lie in {FOLDER.name}/demo.db. To look at "
        "them in a browser,\n"
        f"  LOADMANAGER_SERVER_PORT=8080 .venv/bin/python loadmanager.py -config {FOLDER.name}/config.json\n"
        f"and sign in at http://127.0.0.1:8080 with the token {token}"
    )


if __name__ == "__main__":
    sys.exit(main())
