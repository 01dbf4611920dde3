#!/bin/sh
# Installs Load Manager and Locust from this unpacked bundle, without a network:
#     ./install.sh /opt/loadmanager
# The same again upgrades. PYTHON names another python3 than the one of PATH.
set -eu
fail() { echo "install.sh: $*" >&2; exit 1; }
[ $# -eq 1 ] || { echo "usage: $0 PREFIX" >&2; exit 2; }
case $1 in /*) prefix=$1 ;; *) prefix=$PWD/$1 ;; esac
cd "$(dirname "$0")"
python=${PYTHON:-python3}

sha256sum --check --quiet --strict SHA256SUMS || fail "the bundle is damaged: fetch it again; nothing was installed"
is_python=$("$python" -c 'import sys, platform; print("%d.%d" % sys.version_info[:2], platform.machine())') \
  || fail "$python cannot be started; set PYTHON"
needed=$(cat python-version)
[ "$is_python" = "$needed" ] || fail "the wheels need Python $needed, $python is $is_python; set PYTHON, or make a bundle for it"
# what the prefix lacks is told before the wheels are unpacked into it
"$python" loadmanager.py install --prefix "$prefix" --dry-run >/dev/null

"$python" -m venv --upgrade "$prefix/venv" || fail "no venv could be made (Debian: apt-get install python3-venv)"
"$prefix/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links wheels \
  --require-hashes --requirement requirements.txt || fail "the wheels could not be installed"
exec "$prefix/venv/bin/python" loadmanager.py install --prefix "$prefix"
