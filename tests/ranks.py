"""A script as the ranks of one run: processes forked from a server that has imported torch already.

A rank starts in a twentieth of a second, and torchrun's would take three. Each rank is a process
that a test can signal and kill. Tests about torchrun itself start the real one.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Ranks:
    """The running ranks of one command.

    args: the script and its arguments.
    out, err: files that get the output of all ranks; without err, out gets both.
    patch: Python statements that each rank runs before the script; they see this module's names
        and `rank`.
    """

    context = multiprocessing.get_context("forkserver")

    def __init__(
        self,
        world_size: int,
        args: list,
        port: int,
        out: Path,
        err: Path | None = None,
        patch: str = "",
    ):
        self.out, err = out, err or out
        for path in (out, err):
            path.write_text("")
        self.context.set_forkserver_preload(["ranks", "train", "torch._dynamo"])
        with pytest.MonkeyPatch.context() as env:  # the server must find these modules
            env.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")
            forkserver.ensure_running()
        shared = (world_size, [str(arg) for arg in args], port, str(out), str(err), patch)
        self.processes = []
        for rank in range(world_size):
            process = self.context.Process(target=rank_main, args=(rank, *shared), daemon=True)
            process.start()
            self.processes.append(process)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 60) -> list[int]:
        """The exit codes, -n for signal n; what still runs after `seconds` is killed."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.signal(9)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def wait_as_torchrun(self, seconds: float) -> int:
        """0, or the exit code of the rank that failed first; the others are stopped."""
        until = time.monotonic() + seconds
        running = {process.sentinel: process for process in self.processes}
        code = 0
        while running and code == 0 and time.monotonic() < until:
            for sentinel in connection.wait(list(running), timeout=1):
                process = running.pop(sentinel)
                process.join()
                code = code or process.exitcode
        self.signal(9)
        if code == 0 and running:
            raise TimeoutError(f"still running after {seconds} s: {self.output()}")
        return code

    def output(self) -> str:
        return self.out.read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.output()
            time.sleep(0.01)


def torchrun(out: Path, *args, patch: str = "") -> Ranks:
    """The real torchrun in a forked process; it starts workers as it always does.

    out: a file for the output of all; wait() gives torchrun's exit code.
    """
    import torch.distributed.run

    return Ranks(1, [torch.distributed.run.__file__, *args], 0, out, patch=patch)


def rank_main(
    rank: int, world_size: int, args: list[str], port: int, out: str, err: str, patch: str
) -> None:
    """What a rank's process does: set what torchrun would have set, then run the script."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    gc.freeze()  # the server's modules are not looked through again
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
    os.chdir(ROOT)
    sys.argv = args
    exec(patch, {**globals(), "rank": rank})
    runpy.run_path(args[0], run_name="__main__")


def slow_read(seconds: float) -> None:
    """Make this rank late with its fifth training batch."""
    import data

    read = data.read_batch
    calls = 0

    def slow(split, pairs, pin=False):
        nonlocal calls
        is_training = len(pairs) == 4
        calls += is_training
        if is_training and calls == 5:
            time.sleep(seconds)
        return read(split, pairs, pin)

    data.read_batch = slow


def no_check_of_space() -> None:
    """Let the free space of the disk look sufficient."""
    from runtime import checkpoint

    checkpoint.check_space = lambda *_: None


def one_layer() -> None:
    """Make the tiny models smaller: most of a step's time is spent on Python, layer by layer."""
    from dataclasses import replace

    from families import SIZES

    for name in ("tiny", "llama_tiny"):
        SIZES[name] = replace(SIZES[name], n_layer=1)
