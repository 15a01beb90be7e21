#!/usr/bin/env bash
# Lint and all tests, in an environment of their own. Under 8 minutes on 2 CPU cores, installation included.
#   bash scripts/test.sh [pytest arguments]
# MINI_SLIMPAJAMA=FOLDER adds the tests on real text (SlimPajama's schema, train/ and validation/ inside).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements-dev.txt
echo "== lint"
ruff check .
echo "== tests"
python -m pytest -q "$@" tests
