"""`make bundle`: the archive installs and runs a real test in a network namespace that has no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

MAKER = ROOT / "deploy" / "bundle.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
pytestmark = pytest.mark.timeout(300)

# What an operator types on the host, and a target beside it. The addresses are those of the example
# configuration: in a namespace of its own every port is free.
OFFLINE = """
set -eu
ip link set lo up
if ip -brief addr | grep -v '^lo '; then echo "there is a network"; exit 9; fi
cd {folder}
./install.sh {prefix}
python3 {target} --port 8000 & target=$!
{prefix}/bin/loadmanager check -config {prefix}/config.yaml
{prefix}/bin/loadmanager -config {prefix}/config.yaml & server=$!
trap 'kill $server $target; wait $server' EXIT
export LOADMANAGER_URL=http://127.0.0.1:8080
for _ in $(seq 150); do
  {prefix}/bin/loadmanager clusters --token-file {prefix}/secrets/api-token 2>/dev/null && break || sleep 0.2
done
{prefix}/bin/loadmanager run --tenant tenant-1 --env dev --scenario offline -u 4 -r 4 -d 5s \\
  --token-file {prefix}/secrets/api-token --threshold 'errorRate < 1' --threshold 'totalRequests > 3' --quiet
{prefix}/bin/loadmanager show latest --json --token-file {prefix}/secrets/api-token >{result}
"""


def make_bundle(out: Path, *more: str) -> Path:
    command = [sys.executable, str(MAKER), "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [archive] = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def unpacked(archive, tmp_path) -> Path:
    with tarfile.open(archive) as bundle:
        bundle.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


def install(unpacked: Path, prefix: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [unpacked / "install.sh", prefix], capture_output=True, text=True, env={**ENVIRONMENT, **environment}
    )


def test_bundle_runs_a_real_test_where_there_is_no_network(unpacked, tmp_path):
    prefix, result = tmp_path / "prefix", tmp_path / "run.json"
    places = {"folder": unpacked, "prefix": prefix, "target": ROOT / "tests/target.py", "result": result}
    script = OFFLINE.format(**{name: shlex.quote(str(path)) for name, path in places.items()})
    isolated = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [*isolated, "sh", "-c", script], stdout=log, stderr=log, env=ENVIRONMENT, timeout=200
        )
    told = (tmp_path / "log").read_text(errors="replace")
    assert done.returncode == 0, told[-4000:]
    run = json.loads(result.read_text())
    assert (run["status"], run["stopReason"], run["verdict"]) == ("Finished", "duration", "passed"), run
    assert run["lastMetrics"]["totalRequests"] > 3 and run["trust"] == "ok", run
    # Locust came out of the bundle, not from this machine
    locust = subprocess.run(
        [prefix / "venv/bin/python", "-c", "import locust, yaml; print(locust.__file__, yaml.__file__)"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert locust.stdout.count(f"{prefix}/venv/lib") == 2, locust.stdout + locust.stderr


def test_same_content_is_the_same_archive(archive, unpacked, tmp_path):
    again = make_bundle(tmp_path / "again", "--wheels", str(unpacked / "wheels"))
    assert again.read_bytes() == archive.read_bytes()
    digest = (archive.parent / f"{archive.name}.sha256").read_text()
    assert digest == f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n"


def test_sums_cover_every_file_of_the_bundle(unpacked):
    sums = (unpacked / "SHA256SUMS").read_text().splitlines()
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {line.split("  ")[1] for line in sums} == there - {"SHA256SUMS"}
    assert {"loadmanager.py", "locust/loadmanager_hooks.py", "deploy/loadmanager.service"} <= there
    assert {"deploy/grafana/dashboards/loadmanager-run.json", "config.yaml", "install.sh"} <= there
    pins = (unpacked / "requirements.txt").read_text().splitlines()
    assert len(pins) == len(list((unpacked / "wheels").iterdir()))
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ]+ --hash=sha256:[0-9a-f]{64}", line) for line in pins), pins


@pytest.mark.parametrize("what", ["a changed wheel", "a file that is missing", "a changed program"])
def test_damaged_bundle_is_found_and_nothing_is_installed(unpacked, tmp_path, what):
    wheel = next((unpacked / "wheels").glob("locust-*.whl"))
    if what == "a file that is missing":
        wheel.unlink()
    else:
        damaged = wheel if what == "a changed wheel" else unpacked / "loadmanager.py"
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    done = install(unpacked, tmp_path / "prefix")
    assert done.returncode == 1 and "the bundle is damaged" in done.stderr, done.stderr
    assert not (tmp_path / "prefix").exists()


def test_wheel_that_pip_would_take_without_its_pin_is_refused_by_its_hash(unpacked, tmp_path):
    """Who also forged SHA256SUMS meets the pins; both lie in the bundle: its own checksum comes first."""
    pins = unpacked / "requirements.txt"
    pins.write_text(re.sub(r"(pyyaml==.*sha256:)[0-9a-f]{64}", rf"\g<1>{'0' * 64}", pins.read_text()))
    lines = (unpacked / "SHA256SUMS").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.endswith("  requirements.txt\n")]
    (unpacked / "SHA256SUMS").write_text("".join(kept))
    done = install(unpacked, tmp_path / "prefix")
    assert done.returncode == 1 and "do not match the hashes" in done.stderr.lower(), done.stderr
    assert not (tmp_path / "prefix/loadmanager.py").exists()


def test_other_python_and_a_prefix_in_the_way_are_told_before_anything_is_written(unpacked, tmp_path):
    in_the_way = tmp_path / "in-the-way"
    in_the_way.write_text("mine")
    done = install(unpacked, in_the_way)
    assert done.returncode == 1 and "is in the way: must be a folder, got a file" in done.stderr
    other = tmp_path / "python-of-mine"
    other.write_text('#!/bin/sh\necho "3.99 riscv64"\n')
    other.chmod(0o755)
    done = install(unpacked, tmp_path / "prefix", PYTHON=str(other))
    assert done.returncode == 1 and "is 3.99 riscv64; set PYTHON" in done.stderr, done.stderr
    assert not (tmp_path / "prefix").exists() and shutil.which("unshare")


def test_bundle_without_wheels_is_told(tmp_path):
    command = [sys.executable, str(MAKER), "--out", str(tmp_path / "out"), "--wheels", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "must hold the wheel of Locust" in done.stderr
    assert not list((tmp_path / "out").glob("*.tar.gz"))
