"""`make bundle`: one archive with all that a host without a network needs, the same bytes each time.

    python deploy/bundle.py --out dist                      for this Python and machine
    python deploy/bundle.py --out dist --python-version 3.12
    python deploy/bundle.py --out dist --wheels DIR         from wheels that are there already

Inside: loadmanager.py, hooks, dashboards, unit, container and Kubernetes files, wheels of PyYAML and
Locust with all they need (requirements.txt pins them by hash), install.sh, SHA256SUMS."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE_AT = 1577836800  # 2020-01-01: the archive does not depend on when it is made
FOLDERS = ("deploy", "locust")
FILES = ("loadmanager.py", "README.md", "LICENSE", "config.yaml", ".dockerignore")
LEFT_OUT = ("__pycache__", "bundle.py", "bundle-install.sh", "pins.sh", "dashboard.png")


class BundleError(Exception):
    """What could not be bundled, as a sentence."""


def download_wheels(folder: Path, python_version: str) -> None:
    """Fetch the wheels, built ones only: a host without a network has no compiler. BundleError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--python-version", python_version]
    command += ["--requirement", str(ROOT / "deploy/run.txt")]
    if subprocess.run(command).returncode:
        raise BundleError("pip could not download the wheels; its words are above")


def requirements_of(wheels: dict[str, bytes]) -> str:
    """The wheels as requirements that pip takes from nowhere else and with no other content."""
    lines = []
    for name, content in wheels.items():
        project, version, *_ = name.split("-")
        project = re.sub(r"[-_.]+", "-", project).lower()
        lines.append(f"{project}=={version} --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    return "".join(sorted(lines))


def source_files() -> Iterator[tuple[str, bytes]]:
    for name in FILES:
        yield name, (ROOT / name).read_bytes()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and not any(part in LEFT_OUT for part in path.parts):
                if path.suffix != ".pyc":
                    yield str(path.relative_to(ROOT)), path.read_bytes()
    yield "install.sh", (ROOT / "deploy/bundle-install.sh").read_bytes()


def content_of_bundle(wheels_folder: Path, python_version: str) -> dict[str, bytes]:
    """Every file of the bundle. BundleError when there are no wheels."""
    wheels = {path.name: path.read_bytes() for path in sorted(wheels_folder.glob("*.whl"))}
    if not any(name.startswith("locust-") for name in wheels):
        raise BundleError(
            f"{wheels_folder} must hold the wheel of Locust and all it needs, got {len(wheels)} wheels"
        )
    files = dict(source_files())
    files |= {f"wheels/{name}": content for name, content in wheels.items()}
    files["requirements.txt"] = requirements_of(wheels).encode()
    files["python-version"] = f"{python_version} {machine()}\n".encode()
    sums = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    files["SHA256SUMS"] = "".join(sums).encode()
    return files


def machine() -> str:
    return sysconfig.get_platform().rpartition("-")[2]


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    """Write a tar.gz whose bytes depend on the content alone."""
    top = path.name.removesuffix(".tar.gz")
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=MADE_AT) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name in sorted(files):
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mtime = len(files[name]), MADE_AT
                entry.mode = 0o755 if name.endswith(".sh") else 0o644
                archive.addfile(entry, io.BytesIO(files[name]))


def bundle(out: Path, python_version: str, wheels: Path | None) -> Path:
    """Make the archive, and beside it its checksum. BundleError."""
    version = re.search(r'^VERSION = "(.+)"$', (ROOT / "loadmanager.py").read_text(), re.M)
    assert version, "loadmanager.py does not say its VERSION"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if wheels is None:
            wheels = Path(folder)
            download_wheels(wheels, python_version)
        files = content_of_bundle(wheels, python_version)
    path = out / f"loadmanager-{version[1]}-python{python_version}-{machine()}.tar.gz"
    write_archive(path, files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="One archive for a host without a network.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where to; default: dist")
    this = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser.add_argument("--python-version", default=this, metavar="3.X", help=f"the host's; default: {this}")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take the wheels from there")
    options = parser.parse_args()
    if not re.fullmatch(r"3\.[0-9]{2}", options.python_version):
        parser.error(f"--python-version must be like 3.11, got {options.python_version}")
    try:
        path = bundle(options.out, options.python_version, options.wheels)
    except (BundleError, OSError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB\n{path}.sha256")
    return 0


if __name__ == "__main__":
    sys.exit(main())
