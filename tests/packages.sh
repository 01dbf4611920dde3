#!/usr/bin/env bash
# Installs the Debian packages that tests and figures use, where they are missing and we may.
set -eu
declare -A needed=([initdb]=postgresql [chromium]=chromium [chromedriver]=chromium-driver [wrk]=wrk [zsh]=zsh [openssl]=openssl [node]=nodejs [promtool]=prometheus [systemd-analyze]=systemd [ip]=iproute2 [docker-compose]=docker-compose)
missing=()
for program in "${!needed[@]}"; do
  command -v "$program" >/dev/null || ls /usr/lib/postgresql/*/bin/"$program" >/dev/null 2>&1 || missing+=("${needed[$program]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]}; install them, or the tests that need them fail" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# docker-compose checks a file without a docker; what it recommends is the whole daemon
[[ " ${missing[*]} " == *" docker-compose "* ]] && without=(--no-install-recommends) || without=()
apt-get install -y -qq "${without[@]}" "${missing[@]}" >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq "${without[@]}" "${missing[@]}" >/dev/null; }
