#!/usr/bin/env bash
# Runs the tests with the lowest versions that setup.py allows together, or with the newest that the registry gives.
# usage: tests/versions.sh lowest|newest [pytest arguments]
# PYTHON=python3.13  makes the environment with that Python; setup.py says which is the lowest
# VENV=folder        makes it there, or goes on with it, instead of in a temporary folder
# DRY_RUN=1          only lists what pip would install
set -euo pipefail
which=${1:?lowest or newest}
shift
[ "$which" = lowest ] || [ "$which" = newest ] || { echo "the first argument must be lowest or newest, got $which" >&2; exit 2; }
cd "$(dirname "$0")/.."
venv=${VENV:-$(mktemp -d)}
[ -n "${VENV:-}" ] || trap 'rm -rf "$venv"' EXIT
[ -x "$venv/bin/python" ] || "${PYTHON:-python}" -m venv "$venv"
"$venv/bin/python" -m pip install -q --upgrade pip "setuptools>=77"
if [ "$which" = lowest ]; then
  "$venv/bin/python" - >"$venv/constraints.txt" <<'PY'
from distutils.core import run_setup  # setuptools'

import setuptools

for requirement in run_setup("setup.py", stop_after="init").install_requires:
    print(requirement.replace(">=", "=="))
PY
else
  : >"$venv/constraints.txt"
fi
"$venv/bin/python" -m pip install ${DRY_RUN:+--dry-run} -q --upgrade --upgrade-strategy eager -c "$venv/constraints.txt" -e ".[test]"
[ -z "${DRY_RUN:-}" ] || exit 0
"$venv/bin/python" -m pip list
"$venv/bin/python" -m pytest "$@"
