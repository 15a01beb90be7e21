"""Shared by the tests: the root on the path, a small data folder, commands run as a user runs
them.
"""

import contextlib
import io
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# No network; one thread, so that sums have one order. Set before torch and the hub's library are
# imported.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", HF_DATASETS_OFFLINE="1")


def command(
    *args, ranks: int = 1, process: bool = False, patch: str = ""
) -> subprocess.CompletedProcess:
    """`python ARGS` from the root, as a user runs it; several ranks as torchrun would start them.

    One rank runs in this process unless `process` asks for its own, and several are forked from a
    server that has imported torch (tests/ranks.py): importing it anew takes three seconds.

    patch: Python statements that each of several ranks runs first.
    """
    args = list(map(str, args))
    if ranks > 1:
        return run_ranks(args, ranks, patch)
    if not process:
        return run_here(args)
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def run_ranks(args: list[str], world_size: int, patch: str) -> subprocess.CompletedProcess:
    """The script as several ranks; the output of all, and the exit code of the first to fail."""
    from ranks import Ranks

    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        ranks = Ranks(world_size, args, free_port(), out, err, patch)
        code = ranks.wait_as_torchrun(300)
        return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())


def run_here(args: list[str]) -> subprocess.CompletedProcess:
    """The script as __main__ in this process; an exception that is not an exit goes to the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd(), list(sys.path)
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    sys.argv = args
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.path[:] = before[0], before[2]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(before[1])
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def expect_ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expect_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, one line on standard error that has these words, no traceback."""
    lines = [
        line
        for line in re.split(r"[\r\n]|\x1b\[A", done.stderr)
        if line.strip() and not re.search(r"\d+/\d+ \[", line)
    ]
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("error: "), done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    for word in words:
        assert word in lines[-1], (word, lines[-1])


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """The embedded sample as bytes, prepared once."""
    out = tmp_path_factory.mktemp("data") / "sample"
    expect_ok(
        command("prepare_slimpajama.py", "--source", "sample", "--tokenizer", "bytes", "--out", out)
    )
    return out


@pytest.fixture(scope="session")
def real_text() -> Path:
    """A folder of real text in SlimPajama's schema, train/ and validation/, from the variable
    MINI_SLIMPAJAMA.
    """
    folder = os.environ.get("MINI_SLIMPAJAMA", "")
    if not Path(folder, "validation").is_dir():
        pytest.skip("MINI_SLIMPAJAMA names no folder with real text")
    return Path(folder)


def write_shards(
    folder: Path, tokens: dict[str, dict[str, np.ndarray]], shard_tokens: int = 10**9
) -> Path:
    """A data folder with given token streams, through the real writer: {domain: {split: (n,)
    ids}}.
    """
    import json

    from corpus import tokenizer
    from corpus.manifest import SCHEMA
    from corpus.shards import ShardWriter

    folder.mkdir(exist_ok=True)
    domains = {}
    for domain, splits in tokens.items():
        for split, ids in splits.items():
            writer = ShardWriter(folder, domain, split, shard_tokens)
            writer.add(ids.astype(np.uint16), len(ids))
            domains.setdefault(domain, {})[split] = writer.close()
    t = tokenizer.load("bytes")
    largest = max(int(ids.max()) for splits in tokens.values() for ids in splits.values())
    described = {
        "name": t.name,
        "sha256": t.sha256,
        "n_vocab": max(t.n_vocab, largest + 1),
        "eot_token": t.eot_token,
    }
    manifest = {
        "schema": SCHEMA,
        "tokenizer": described,
        "dtype": "uint16",
        "source": {},
        "domains": domains,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def changed(content, place: tuple, value):
    """Nested dictionaries and lists with another value at a place; the value ... removes it."""
    if not place:
        return {} if value is ... else value
    copy = dict(content) if isinstance(content, dict) else list(content)
    first, *rest = place
    if rest:
        copy[first] = changed(content[first], rest, value)
    elif value is ...:
        del copy[first]
    else:
        copy[first] = value
    return copy
