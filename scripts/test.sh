#!/usr/bin/env bash
# Formatting, lint and all tests on all cores, in an environment of their own.
#   bash scripts/test.sh [pytest arguments]
# MINI_SLIMPAJAMA=FOLDER adds the tests on real text (SlimPajama's schema, train/ and validation/ inside).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements-dev.txt
echo "== lint"
ruff format --check --quiet . || { echo "error: not formatted; run: ruff format ." >&2; exit 1; }
ruff check .
echo "== tests"
# The tests of a file run in one process, so that what they share is made once. The files run in alphabetical order,
# whose last ones are short: no process works on alone at the end.
python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@" tests
