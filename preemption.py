"""Stop a run in good order: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) end it at one step on all ranks.

The first signal only sets a flag. All ranks learn of it one step later, save and leave with exit code 0; a later
signal ends the process at once, which leaves every file whole, since files are renamed into place.
"""

import os
import shlex
import signal
import sys
import time

import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_S = 2.0  # Slurm signals torchrun and its workers, and torchrun passes it on: so soon it is the same signal
FAILED = 1000  # no signal: a rank cannot go on (a full disk), and the others shall leave with it


class Stop:
    """Every rank makes one after the process group, and calls it equally often: each step, each batch of an evaluation.

    agreed: 0 to go on, else what all ranks know of: a signal's number, or FAILED.
    parts: what can fail on this rank and then says why in its `failure`: a full disk. reason: the same of the loop.
    """

    def __init__(self, timeout_s: float):
        self.asked, self.asked_at, self.agreed, self.agree = 0, 0.0, 0, distributed.Agreement(timeout_s)
        self.parts, self.reason = [], ""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if not self.asked:
            self.asked, self.asked_at = number, time.monotonic()
            if distributed.ranks().rank == 0:  # not print: the signal may have come in the middle of one
                os.write(2, f"\n{signal.Signals(number).name}: stopping with a checkpoint; once more stops at once\n"
                         .encode())
        elif time.monotonic() - self.asked_at > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __call__(self) -> int:
        self.agreed = self.agreed or self.agree(FAILED if self.failure else self.asked)
        return self.agreed

    @property
    def failure(self) -> str:
        """Why this rank cannot go on, or nothing."""
        found = self.reason or next((part.failure for part in self.parts if part.failure), "")
        return found or ("another rank cannot go on; its own error says why" if self.agreed == FAILED else "")

    @property
    def name(self) -> str:
        return signal.Signals(self.agreed).name


def command() -> str:
    """What was typed to start this run; torchrun's flags for several nodes are not known here."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {shlex.join(sys.argv)}"
    nodes = distributed.ranks().world_size // int(os.environ["LOCAL_WORLD_SIZE"])
    several = f"--nnodes {nodes} ... " if nodes > 1 else ""
    return f"torchrun {several}--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} -- {shlex.join(sys.argv)}"
