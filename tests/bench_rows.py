"""The rows of `make bench`: what a figure is, the figure, a ratio to something measured in the same run, the
goal, and whether it is reached."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp(prefix="bench-"))


class Rows:
    """Everything printed so far; `brief`: everything is so short that only its working is shown."""

    brief = False
    reached = 0
    missed: list[str] = []
    count = 0
    title = ""


def scaled(full: float, brief: float) -> float:
    """So long, or so many: in a test only a taste of it."""
    return brief if Rows.brief else full


def head(title: str) -> None:
    Rows.title = title.partition(":")[0]
    print(f"\n{title}  [load {os.getloadavg()[0]:.1f}]", flush=True)


def row(what: str, figure: str, goal: str = "", reached: bool | None = None, ratio: str = "") -> None:
    """Print one figure; `reached` None: nothing is asked of it."""
    Rows.count += 1
    word = "" if reached is None else "reached" if reached else "NOT REACHED"
    if reached:
        Rows.reached += 1
    elif reached is False:
        Rows.missed.append(f"{Rows.title}: {what.strip()}")
    print(f"  {what:<66} {figure:>26}  {ratio:<40}{goal:<36} {word}".rstrip(), flush=True)


def summary() -> None:
    asked = Rows.reached + len(Rows.missed)
    print(f"\n{Rows.reached} of {asked} goals reached")
    for what in Rows.missed:
        print(f"  not: {what}")


def both(values: list[float], unit: str, digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f} {unit}"


# ---- the load generator ------------------------------------------------------


class Load:
    """What wrk found: requests/s, ms at the median and the 99th percentile, refused requests."""

    def __init__(self, text: str):
        self.rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))
        self.p50_ms, self.p99_ms = (
            _milliseconds(re.search(rf"^\s+{percent}%\s+(\S+)", text, re.M).group(1)) for percent in (50, 99)
        )
        bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
        self.refused = int(bad.group(1)) if bad else 0
        self.requests = int(re.search(r"(\d+) requests in", text).group(1))

    def __str__(self) -> str:
        refused = f" {self.refused} REFUSED" if self.refused else ""
        return f"{self.rate:,.0f} /s {self.p50_ms:.2f} {self.p99_ms:.1f} ms{refused}"


def _milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def wrk(
    url: str, connections: int, headers: dict[str, str], body: str | None = None, seconds: float = 3
) -> Load:
    """GET, or POST the JSON body, as fast as it is answered."""
    seconds = int(scaled(seconds, 1))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    if body is not None:
        script = FOLDER / "post.lua"
        quoted = body.replace("\\", "\\\\").replace('"', '\\"')
        script.write_text(f'wrk.method = "POST"\nwrk.body = "{quoted}"\n')
        command += ["-H", "Content-Type: application/json", "-s", str(script)]
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=seconds + 20, check=True)
    return Load(done.stdout)
