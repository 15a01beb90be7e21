# Sourced by the other scripts: the virtual environment .venv with the packages of $1, made at first use. An
# active environment (venv, conda) that has the main ones is used as it is. PYTHON names the interpreter of .venv
# (default python3; 3.10 or later).
there='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ("torch", "tiktoken", "tyro"))))'
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ] && [ "${VIRTUAL_ENV:-}" != "$PWD/.venv" ] && python -c "$there"; then
  return
fi
if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "error: Python 3.10 or later is needed, this is $("${PYTHON:-python3}" --version); set PYTHON=/path/to/python3" >&2
  exit 2
fi
if [ ! -e .venv/bin/activate ]; then
  echo "== environment .venv"
  "${PYTHON:-python3}" -m venv .venv || { echo "error: no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
fi
source .venv/bin/activate
if ! cat requirements*.txt | cmp -s - ".venv/$1.installed"; then
  echo "== installing $1 (about 2 minutes)"
  python -m pip install -q --disable-pip-version-check -r "$1"
  cat requirements*.txt > ".venv/$1.installed"
fi
