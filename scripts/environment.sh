# Sourced by the other scripts: the virtual environment .venv with the packages of $1, made at first use. An active
# environment (venv, conda) that has them is used as it is. PYTHON names the interpreter of .venv (default
# python3; 3.10 or later).
PYTHON=${PYTHON:-python3}
if [ "$("$PYTHON" -c 'import sys; print(sys.version_info >= (3, 10))' 2>/dev/null || true)" != True ]; then
  echo "error: PYTHON=$PYTHON is not Python 3.10 or later; set PYTHON=/path/to/python3" >&2
  exit 2
fi
if [ ! -f "${1:-}" ]; then
  echo "error: ${1:-no file of requirements given}: expected requirements.txt or one like it" >&2
  exit 2
fi
has_all='
import re, sys
from importlib.metadata import version
def check(path):
    for line in open(path):
        if line.startswith("-r "): check(line[3:].strip())
        elif name := re.match(r"[\w.-]+", line): version(name[0])
check(sys.argv[1])'
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ] && [ "${VIRTUAL_ENV:-}" != "$PWD/.venv" ] &&
  python -c "$has_all" "$1" 2> /dev/null; then
  return
fi
if [ ! -e .venv/bin/activate ]; then
  echo "== environment .venv"
  "$PYTHON" -m venv .venv || { echo "error: .venv cannot be made; on Debian: apt install python3-venv" >&2; exit 2; }
fi
source .venv/bin/activate
if ! cat requirements*.txt | cmp -s - ".venv/$1.installed"; then
  echo "== installing $1 (about 2 minutes)"
  python -m pip install -q --disable-pip-version-check -r "$1" ||
    { echo "error: pip could not install $1 (its reason is above); the same command tries again" >&2; exit 2; }
  cat requirements*.txt > ".venv/$1.installed"
fi
