"""`install --prefix`: from one copied file to a server; upgraded without losing what users wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from locust_process import find_free_port
from waiting import eventually

import loadmanager

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def install(program: Path, prefix: Path | str, *more: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(program), "install", "--prefix", str(prefix), *more]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)


@pytest.fixture
def one_file(tmp_path) -> Path:
    """The program alone, as it was copied to a machine."""
    folder = tmp_path / "copied"
    folder.mkdir()
    return Path(shutil.copy(ROOT / "loadmanager.py", folder))


def as_it_is(folder: Path) -> dict[str, bytes]:
    """All files below a folder, bytecode aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_one_else_may_write_what_is_installed_whatever_the_umask(one_file, tmp_path):
    """Who may write a bytecode file runs code as the service."""
    prefix = tmp_path / "new" / "prefix"
    done = install(one_file, prefix, preexec_fn=lambda: os.umask(0))
    assert done.returncode == 0, done.stderr
    loose = [path for path in (tmp_path / "new").rglob("*") if path.stat().st_mode & 0o022]
    assert not loose and not prefix.parent.stat().st_mode & 0o022, loose


def test_installed_program_serves_from_bytecode_in_any_folder(one_file, tmp_path):
    prefix = tmp_path / "prefix"
    done = install(one_file, prefix)
    assert done.returncode == 0, done.stderr
    one_file.unlink()
    launcher, config, port = prefix / "bin/loadmanager", prefix / "config.yaml", find_free_port()
    assert f"{launcher} check -config {config}" in done.stdout, "the next steps do not say how to check"
    assert list(prefix.glob("__pycache__/loadmanager.*.pyc")), "not compiled: the first start is a slow one"
    checked = subprocess.run([launcher, "check", "-config", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with (tmp_path / "log").open("wb") as log:
        environment = {**ENVIRONMENT, "LOADMANAGER_SERVER_PORT": str(port)}
        server = subprocess.Popen([launcher, "-config", config], cwd="/", env=environment, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: urllib.request.urlopen(f"{url}/health", timeout=5), 20)
        assert b"-c" in Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0"), "not from bytecode"
        token = (prefix / "secrets/api-token").read_text().strip()
        asked = urllib.request.Request(f"{url}/v1/clusters", headers={"Authorization": f"Bearer {token}"})
        assert [one["id"] for one in json.load(urllib.request.urlopen(asked))] == ["staging-1"]
    finally:
        server.terminate()
        assert server.wait(10) == 0, (tmp_path / "log").read_text()


def test_secrets_and_configuration_are_for_their_owner_only(one_file, tmp_path):
    prefix = tmp_path / "prefix"
    # the widest umask must not open them, the narrowest must not hide the program from the service
    for umask in (0o000, 0o077):
        shutil.rmtree(prefix, ignore_errors=True)
        assert install(one_file, prefix, umask=umask).returncode == 0
        modes = {
            name: stat.S_IMODE((prefix / name).stat().st_mode)
            for name in ("config.yaml", *loadmanager.TOKEN_FILES, "loadmanager.py", "bin/loadmanager")
        }
        assert list(modes.values()) == [0o600, 0o600, 0o600, 0o644, 0o755], modes
    tokens = {(prefix / name).read_text() for name in loadmanager.TOKEN_FILES}
    assert len(tokens) == 2 and min(map(len, tokens)) > 32, "both tokens must be random"


def test_upgrade_keeps_what_users_wrote_and_the_former_program(one_file, tmp_path):
    prefix = tmp_path / "prefix"
    assert install(one_file, prefix).returncode == 0
    installed = as_it_is(prefix)
    (prefix / "config.yaml").write_text("mine")
    (prefix / "secrets/api-token").write_text("my token")
    one_file.write_bytes(one_file.read_bytes().replace(b'VERSION = "1.0.0"', b'VERSION = "1.0.1"'))
    done = install(one_file, prefix)
    assert done.returncode == 0 and "systemctl restart" in done.stdout, done.stderr
    now = as_it_is(prefix)
    assert now["config.yaml"] == b"mine" and now["secrets/api-token"] == b"my token"
    assert now["config.yaml.new"] == installed["config.yaml"]
    assert now["loadmanager.py.former"] == installed["loadmanager.py"]
    version = subprocess.run([prefix / "bin/loadmanager", "--version"], capture_output=True, text=True)
    assert version.stdout == "Load Manager 1.0.1\n", version.stderr
    again = install(one_file, prefix)
    assert again.returncode == 0 and as_it_is(prefix) == now, "a second upgrade to the same changed something"
    assert not list(prefix.rglob("*.part")), "parts of files were left"


def test_dry_run_says_all_and_writes_nothing(one_file, tmp_path):
    prefix = tmp_path / "prefix"
    dry = install(one_file, prefix, "--dry-run")
    assert dry.returncode == 0 and not prefix.exists()
    real = install(one_file, prefix).stdout.partition("\n\n")[0].splitlines()
    assert dry.stdout.splitlines() == [f"would be {line}" for line in real]
    before = as_it_is(prefix)
    (prefix / "config.yaml").write_text("mine")
    assert f"kept: {prefix}/config.yaml" in install(one_file, prefix, "--dry-run").stdout
    assert as_it_is(prefix) == {**before, "config.yaml": b"mine"}


def test_hooks_beside_the_program_make_a_cluster_that_load_manager_launches(tmp_path):
    prefix = tmp_path / "prefix"
    assert install(ROOT / "loadmanager.py", prefix).returncode == 0
    assert (prefix / "locust/loadmanager_hooks.py").read_bytes() == (
        ROOT / "locust/loadmanager_hooks.py"
    ).read_bytes()
    (prefix / "locust/locustfile.py").write_text("# mine")
    (prefix / "locust/loadmanager_hooks.py").write_text("# old")
    assert install(ROOT / "loadmanager.py", prefix).returncode == 0
    assert (prefix / "locust/locustfile.py").read_text() == "# mine", "a test of the user's was overwritten"
    assert (prefix / "locust/loadmanager_hooks.py.former").read_text() == "# old"
    config, _ = loadmanager.read_config(str(prefix / "config.yaml"))
    assert [cluster.is_launched for cluster in config.clusters] == [True]


@pytest.mark.parametrize(
    "in_the_way, told",
    [
        ("prefix", "{prefix} is in the way: must be a folder, got a file"),
        ("prefix/config.yaml/x", "{prefix}/config.yaml is in the way: must be a file, got a folder"),
        ("prefix/bin", "{prefix}/bin is in the way: must be a folder, got a file"),
    ],
)
def test_what_is_in_the_way_is_named_before_anything_is_written(one_file, tmp_path, in_the_way, told):
    prefix, path = tmp_path / "prefix", tmp_path / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    done = install(one_file, prefix)
    assert done.returncode == 1 and done.stderr == f"loadmanager: {told.format(prefix=prefix)}\n"
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file != one_file]
    assert left == [path] and path.read_text() == "mine"


def test_prefix_that_cannot_be_written_is_named(one_file):
    done = install(one_file, "/proc/loadmanager")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "/proc" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_prefix_of_another_user_is_refused_without_a_trace():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for their owner only
        os.chmod(folder, 0o755)
        one_file = shutil.copy(ROOT / "loadmanager.py", folder)
        prefix = Path(folder) / "of-root"
        prefix.mkdir(mode=0o755)
        command = ["/usr/bin/python3", "-B", one_file, "install", "--prefix", str(prefix)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=ENVIRONMENT, user=65534, group=65534
        )
        told = f"{prefix} is not writable; choose another --prefix, or install as a user who may"
        assert (done.returncode, done.stderr) == (1, f"loadmanager: --prefix {prefix}: {told}\n")
        assert not list(prefix.iterdir())


@pytest.mark.parametrize("prefix", ["/tmp/a b", "/tmp/%h", "/tmp/a$b", "/tmp/'", ""])
def test_prefix_that_a_unit_would_misread_is_refused(one_file, prefix):
    done = install(one_file, prefix)
    assert done.returncode == 2 and "--prefix must be a folder named with letters" in done.stderr


def test_unit_of_an_installation_is_the_shipped_one_with_its_own_paths():
    unit = loadmanager.service_unit("/opt/loadmanager", "/usr/bin/python3", "loadmanager")
    assert unit == (ROOT / "deploy/loadmanager.service").read_text()
    at_home = loadmanager.service_unit("/home/me/lm", "/home/me/a venv/bin/python", "me")
    assert 'ExecStart="/home/me/a venv/bin/python" -m loadmanager -config /home/me/lm/config.yaml' in at_home
    assert "ProtectHome=read-only" in at_home and "User=me" in at_home


@pytest.mark.parametrize(
    "prefix, python", [("/opt/lm@2", "/usr/bin/python3"), ("/home/me/lm", "/home/me/a %b/python")]
)
def test_unit_of_an_installation_is_read_by_systemd(tmp_path, prefix, python):
    unit = tmp_path / "loadmanager.service"
    unit.write_text(loadmanager.service_unit(prefix, python, "loadmanager"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    told = subprocess.run(command, capture_output=True, text=True)
    # the programs and folders are not on this machine; the lines must be understood
    wrong = [line for line in told.stderr.splitlines() if str(unit) in line]
    assert not wrong, wrong


def test_files_that_the_readme_of_installing_names_are_there():
    text = (ROOT / "deploy/README.md").read_text()
    named = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(
        r"`(kubernetes/[\w.]*|compose/[\w.]+)`", text
    )
    assert len(named) > 4 and not [name for name in named if not (ROOT / "deploy" / name).exists()]
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_tables_of_the_readme_of_installing_are_what_is_installed(tmp_path):
    assert install(ROOT / "loadmanager.py", tmp_path / "prefix").returncode == 0
    rows = re.findall(r"^\| (`.*?) \| (replaced|never)", (ROOT / "deploy/README.md").read_text(), re.M)
    told = {name: what for names, what in rows for name in re.findall(r"`([^`]+)`", names)}
    for entry in loadmanager.files_to_install(str(tmp_path / "prefix")):
        what = told.get(entry.name) or told.get(entry.name.partition("/")[0] + "/")
        assert what == ("replaced" if entry.is_ours else "never"), entry.name
        assert (tmp_path / "prefix" / entry.name).is_file(), entry.name
