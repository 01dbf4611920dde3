"""`make gate`: the comparison on real Locust. Equal runs, and runs of which one endpoint is slower by 10 %
and by
20 %, each judged against the five equal runs before it; counts of false alarms and of what was found.

    python tests/gate_campaign.py [--pairs 40] [--seed 1] [--keep FOLDER]

40 pairs of each kind take about 25 minutes: runs of 10 s with some 2,000 requests, 15 users, endpoints of 30
and 100 ms. Nothing is asserted: what a machine in use does is the subject."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # loadmanager.py

from conftest import CALLBACK_TOKEN, ROOT, LoadManager, base_config, cluster_config
from gate_simulation import interval
from locust_process import LocustCluster, find_free_port
from target import Target
from waiting import eventually

LOCUSTFILE = """
import loadmanager_hooks
from locust import HttpUser, constant, task

class Shopper(HttpUser):
    wait_time = constant(0.01)

    @task
    def browse(self):
        self.client.get("/api/items")
        self.client.get("/api/slow")
"""
FACTORS = {"equal": 1.0, "10 % slower": 1.1, "20 % slower": 1.2}
HISTORY = 5


class Service(Target):
    """Two endpoints with scatter; /api/slow takes `factor` times as long."""

    factor = 1.0

    def _count(self, path: str) -> None:
        super()._count(path)
        base_s = 0.1 * self.factor if path == "/api/slow" else 0.03
        time.sleep(base_s * random.lognormvariate(0, 0.15))


def serve() -> None:
    """The target as a process of its own: prints its URL, takes factors as lines."""
    with Service() as service:
        print(service.url, flush=True)
        for line in sys.stdin:
            service.factor = float(line)


class Campaign:
    def __init__(self, folder: Path, keep: Path | None):
        self.folder, self.keep = folder, keep
        self.equal: list[str] = []  # ids
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in FACTORS}

    def __enter__(self) -> Campaign:
        command = [sys.executable, __file__, "--serve"]
        self.target = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        url = self.target.stdout.readline().strip()
        hooks = (ROOT / "locust" / "loadmanager_hooks.py").read_text()
        (self.folder / "loadmanager_hooks.py").write_text(hooks)
        (self.folder / "locustfile.py").write_text(LOCUSTFILE)
        (self.folder / "lm").mkdir()
        port = find_free_port()
        rules = {"startTimeoutSeconds": 15, "lostAfterSeconds": 60}
        cluster = cluster_config(f"http://127.0.0.1:{port}")
        self.lm = LoadManager(self.folder / "lm", base_config(cluster, orchestrator=rules)).start()
        environment = {
            "CONTROL_PLANE_URL": self.lm.url, "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN, "TENANT_ID": "acme",
            "ENV_ID": "dev",
            "METRICS_PUSH_INTERVAL": "1",
        }  # fmt: skip
        hosts = ["--host", url]
        self.locust = LocustCluster(
            self.folder / "locustfile.py", 1, environment, hosts, worker_args=hosts, web_port=port
        ).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.locust.stop()
        self.lm.end()
        self.target.terminate()
        self.target.wait(10)

    def run(self, kind: str, number: int) -> None:
        self.target.stdin.write(f"{FACTORS[kind]}\n")
        self.target.stdin.flush()
        body = {"tenantId": "acme", "envId": "dev", "scenarioId": "shop", "targetUsers": 15, "spawnRate": 15,
            "durationSeconds": 10}  # fmt: skip
        created = eventually(lambda: self._created(body), 60)
        run = eventually(lambda: self._final(created["id"]), 90)
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            export = self.lm.get(f"/v1/tests/{run['id']}/export").body
            (self.keep / f"{number:03d}-{kind.split()[0]}.json").write_bytes(export)
        told = "history" if len(self.equal) < HISTORY else self._judge(kind, run)
        if kind == "equal" and run["status"] == "Finished" and run["trust"] == "ok":
            self.equal.append(run["id"])
        numbers = run.get("lastMetrics") or {}
        print(
            f"{number:4} {kind:12} {numbers.get('totalRequests')} requests, average "
                f"{numbers.get('avgResponseMs') or 0:.1f} ms, "
            f"load {os.getloadavg()[0]:.1f}: {told}", flush=True,
        )  # fmt: skip

    def _created(self, body: dict[str, Any]) -> dict[str, Any] | None:
        answer = self.lm.post("/v1/tests", body)
        return answer.json if answer.status == 201 else None

    def _final(self, run_id: str) -> dict[str, Any] | None:
        run = self.lm.get(f"/v1/tests/{run_id}").json
        return run if run["status"] in ("Finished", "Failed") else None

    def _judge(self, kind: str, run: dict[str, Any]) -> str:
        reference = ",".join(self.equal[-HISTORY:])
        found = self.lm.get(f"/v1/tests/compare?baseline={reference}&candidate={run['id']}").json
        counts = self.counts[kind]
        counts["pairs"] += 1
        counts[found["judgement"]] += 1
        counts["on the endpoint"] += any(
            "/api/slow" in (one["endpoint"] or "") for one in found["regressions"]
        )
        worst = min(found["regressions"], key=lambda one: one["pValue"], default=None)
        return found["judgement"] + (f": {worst['message']}" if worst else f": {found['message']}")

    def tell(self) -> None:
        for kind, counts in self.counts.items():
            pairs = counts["pairs"]
            if not pairs:
                continue
            what = "false alarms" if kind == "equal" else "found"
            print(
                f"{kind:12} {what}: {counts['regression']} of {pairs}, "
                    f"{interval(counts['regression'], pairs)}; "
                f"on the endpoint itself: {counts['on the endpoint']}; cannot tell: {counts['cannot tell']}"
            )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the runs")
    parser.add_argument("--keep", type=Path, help="folder for the runs' exports")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    draw = random.Random(options.seed)
    kinds = ["equal"] * HISTORY
    for _ in range(options.pairs):
        kinds += draw.sample(list(FACTORS), len(FACTORS))
    print(
        f"{options.pairs} pairs of each kind, seed {options.seed}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    with (
        tempfile.TemporaryDirectory(prefix="campaign-") as folder,
        Campaign(Path(folder), options.keep) as campaign,
    ):
        try:
            for number, kind in enumerate(kinds):
                campaign.run(kind, number)
        finally:
            campaign.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
