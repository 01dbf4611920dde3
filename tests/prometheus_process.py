"""A real Prometheus as a process, with the configuration and the alert rules that the program writes."""

from __future__ import annotations

import json
import math
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from locust_process import find_free_port
from waiting import eventually

import loadmanager


class Prometheus:
    """`with Prometheus(folder, "127.0.0.1:8080", token) as prometheus: prometheus.query("up")`"""

    def __init__(self, folder: Path, target: str, token: str):
        self.folder = folder
        files = loadmanager.grafana_files()
        config = files["prometheus/prometheus.yml"].replace("127.0.0.1:8080", target)
        config = config.replace("scrape_interval: 10s", "scrape_interval: 1s")
        config = "global: {evaluation_interval: 1s}\n" + config
        (folder / "prometheus.yml").write_text(config)
        (folder / "loadmanager.rules.yml").write_text(files["prometheus/loadmanager.rules.yml"])
        (folder / "loadmanager.token").write_text(token)
        self.url = f"http://127.0.0.1:{find_free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        with (self.folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self.folder}/prometheus.yml",
                    f"--storage.tsdb.path={self.folder}/tsdb",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            eventually(self._has_scraped, 30, what="Prometheus has scraped")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _has_scraped(self) -> bool:
        (target,) = self.get("targets")["activeTargets"]
        assert target["health"] == "up", f"{target['lastError']}\n{self.log()}"
        return True

    def log(self) -> str:
        return (self.folder / "prometheus.log").read_text(errors="replace")

    def get(self, path: str, **parameters: Any) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.loads(response.read())["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def value(self, expression: str) -> float:
        (series,) = self.query(expression)
        return float(series["value"][1])

    def numbers_between(self, expression: str, start: float, end: float) -> list[float]:
        """Every number of every series in a time range, but for NaN."""
        found = self.get("query_range", query=expression, start=start, end=end, step=1)["result"]
        numbers = [float(text) for series in found for _, text in series["values"]]
        return [number for number in numbers if not math.isnan(number)]
