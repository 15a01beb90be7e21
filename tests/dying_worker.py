"""train.py whose rank 1 is killed in its first life, before step 6; for tests/test_nodes.py.

torchrun --max_restarts 1 [...] -- tests/dying_worker.py [FLAGS OF train.py]
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from cli import run
from runtime import distributed
from step import Trainer

take_step = Trainer.step


def fatal_step(trainer, step, batch):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (6, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(trainer, step, batch)


if __name__ == "__main__":
    Trainer.step = fatal_step
    run(distributed.reported(train.main))
