"""train.py as one rank of several without torchrun, in a process that a server with torch in memory has forked.

Starting takes a quarter of a second instead of three, and each rank is a process of its own to be killed.
"""

import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train  # noqa: E402, F401  the server imports it, and every rank finds it imported
from runtime import checkpoint  # noqa: E402


def rank_main(rank: int, world_size: int, port: int, args: list[str], log: str, fault: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(ROOT)
    sys.argv = args
    if fault:
        FAULTS[fault](rank)
    runpy.run_path(args[0], run_name="__main__")


def slow_reads(seconds: float):
    """The last batches of the last rank take their time, once."""

    def patch(rank: int) -> None:
        read, calls = data.read_batch, [0]

        def slow(split, pairs, pin=False):
            calls[0] += len(pairs) == 4  # a training batch, not one of the evaluation
            if rank == 1 and calls[0] == 5:
                calls[0] += 1
                time.sleep(seconds)
            return read(split, pairs, pin)

        data.read_batch = slow

    return patch


def nothing_checked(rank: int) -> None:
    checkpoint.check_space = lambda *_: None


FAULTS = {
    "slow rank": slow_reads(4),
    "hanging rank": slow_reads(600),
    "free space guessed wrong": nothing_checked,
}


class Run:
    """The ranks of one run, their common output, and what became of them."""

    context = multiprocessing.get_context("forkserver")

    def __init__(
        self, out: Path, world_size: int, args: list, log: Path, port: int, fault: str = ""
    ):
        self.out, self.log = out, log
        log.write_text("")
        self.context.set_forkserver_preload(["fault_worker"])
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # or the server does not find it, and says nothing
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            forkserver.ensure_running()
        self.ranks = [
            self.context.Process(
                target=rank_main,
                args=(rank, world_size, port, [str(a) for a in args], str(log), fault),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].is_alive():
                os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = 60) -> list[int]:
        """The exit codes of the ranks, -n for signal n; what still runs after `seconds` is killed."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        self.signal(9)
        for process in self.ranks:
            process.join()
        return [process.exitcode for process in self.ranks]

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.output()
            time.sleep(0.01)
