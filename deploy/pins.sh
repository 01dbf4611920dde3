#!/bin/sh
# `make pins`: renews the lock files (exact versions, and the hashes of every file of each release, so
# that they hold for Python 3.11 and newer on any machine). The *.in files beside them say what is wanted.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
lock() {
  out=$1; shift
  "$folder/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command "make pins" --output-file "$folder/lock" "$@"
  cp "$folder/lock" "$out"; rm "$folder/lock"
}
# the tests' lock first: it covers the others, which take their versions from it
lock tests/requirements.txt tests/requirements.in deploy/run.in deploy/requirements.in
for name in deploy/run deploy/requirements locust/requirements; do
  lock "$name.txt" --constraint tests/requirements.txt "$name.in"
done
