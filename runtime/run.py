"""Everything around the steps of a run: signals, watchdog, metrics, checkpoints; closed in order.

with FolderLock(out_dir) as lock:
    ...                              # read the run folder
    with Run(..., lock) as run:
        ...                          # build the model; nothing is written to the folder yet
        run.open_files(telemetry)
        ...                          # the steps
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

import files
from cli import UserError
from corpus.hf_tokenizer import pass_copy_on
from recipe import lr_at, r_at
from runtime import checkpoint, distributed
from runtime.metrics import Metrics, cannot_write, versions
from runtime.plan import Plan
from runtime.telemetry import Telemetry
from runtime.watch import FAILED, Stop, Watchdog, command

LOCK_WAIT_S = 10.0  # a killed torchrun leaves its workers behind for a while


class FolderLock:
    """A context manager that keeps other runs out of a run folder; rank 0 holds it for all ranks.

    The lock is on a file of its own that is never replaced, OUT/.lock. It is taken before anything
    else in the folder is read, and makes the folder where there is none; a start that is refused
    later on removes the folder that it made. UserError on all ranks if another run has the lock.

    refusal: why the folder may not be written, on all ranks; a finished run has no need to.
    """

    def __init__(self, out_dir: str | Path):
        self.path = Path(out_dir) / ".lock"
        self.refusal = ""
        self.file, self.made_folder = None, False  # of rank 0 alone
        self.is_in_use = lambda: False  # whether a checkpoint is being written

    def __enter__(self) -> "FolderLock":
        is_holder = distributed.ranks().rank == 0
        self.refusal = distributed.do_for_others(self._take, is_holder)
        return self

    def _take(self) -> str:
        """Take the lock; the reason why it cannot be written, or ""."""
        folder = self.path.parent
        busy = f"another run trains in {folder}"
        try:
            self.made_folder = not folder.exists()
            for _ in range(10):
                folder.mkdir(parents=True, exist_ok=True)
                self.file = files.lock(self.path, busy, wait=LOCK_WAIT_S)
                if self._is_in_folder():
                    break
        except OSError as error:
            return cannot_write(folder, error)
        return ""

    def _is_in_folder(self) -> bool:
        """Whether the locked file is still there; a start that was refused has removed its own."""
        if not self.path.exists():
            return False
        return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))

    def __exit__(self, kind, error, traceback) -> None:
        if not self.file:
            return
        if kind and self.made_folder:
            with suppress(OSError):
                self._remove_unused_folder()
        # After an exception a checkpoint may still be written: then the writer alone has the file.
        if not self.is_in_use():
            self.file.close()
        self.file = None

    def _remove_unused_folder(self) -> None:
        """Leave nothing behind where nothing but the lock was written."""
        folder = self.path.parent
        if os.listdir(folder) == [self.path.name]:
            self.path.unlink()
            folder.rmdir()


class Run:
    """A context manager. After an exception it closes nothing: a failing rank must not wait.

    step: at which it ends.
    """

    def __init__(self, plan: Plan, device: torch.device, lock: FolderLock):
        self.config, self.data, self.shape, self.identity, self.found = plan
        self.device, self.lock = device, lock
        self.out_dir = Path(self.config.out_dir)
        self.step, self.finished = self.found.step, False
        self.metrics = None  # of rank 0 alone
        self.writer = None  # of the ranks with a part of the state
        self.logged_step, self.logged_time = self.found.step, time.perf_counter()

    def __enter__(self) -> "Run":
        if self.lock.refusal:
            raise UserError(self.lock.refusal)
        self.stop = Stop(self.config.timeout_s)
        self.watchdog = Watchdog(self.found.step, self.config.timeout_s)
        check_same_on_all_ranks(
            {
                **self.identity,
                "max_steps": self.config.max_steps,
                "checkpoint step": self.found.step,
                "checkpoint sha256": self.found.state.get("sha256", {}),
                "torch": torch.__version__,
                "code": code_hash(),
            },
            self.out_dir,
        )
        return self

    def open_files(self, telemetry: Telemetry) -> None:
        """Begin to write to the run folder, once nothing can refuse the run any more."""
        config = self.config
        rank, _, world_size = distributed.ranks()
        team = distributed.Team(distributed.n_shards(config.parallel, world_size), config.timeout_s)
        if rank < team.n:
            self.writer = checkpoint.Writer(
                self.out_dir, config.keep_checkpoints, config.keep_every, self.lock.file, team
            )
            self.stop.parts = [self.writer]
        if rank == 0:
            self.copy_tokenizer()
            saved = {**asdict(config), "world_size": world_size, "identity": self.identity}
            self.metrics = Metrics(self.out_dir, saved, self.found.step, config.max_steps)
            self.lock.is_in_use = self.writer.is_writing
            self.stop.parts += [self.metrics, telemetry]
        self.logged_time = time.perf_counter()

    def copy_tokenizer(self) -> None:
        """Keep a copy of a tokenizer that is a file, so that evaluation needs no data folder."""
        sha256 = self.data.manifest["tokenizer"]["sha256"]
        try:
            pass_copy_on(Path(self.config.data_dir), self.out_dir, sha256)
        except OSError as error:
            raise UserError(cannot_write(self.out_dir, error)) from None

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            return
        if self.writer:
            self.writer.wait()
        if self.metrics:
            self.metrics.close()
        self.watchdog.close()
        distributed.cleanup()

    def end(self, step: int, finished: bool) -> None:
        """Note at which step the run ends, and whether that was its last one, evaluated."""
        self.step, self.finished = step, finished

    def fail(self, reason: str) -> None:
        """Note why the run cannot go on."""
        self.stop.reason = self.stop.reason or reason

    def outcome(self) -> str:
        """The last line of a run; UserError if it failed."""
        if self.stop.failure:
            raise UserError(self.stop.failure)
        if self.finished:
            table = f"python eval/perplexity.py --run {self.out_dir}"
            return f"finished: {self.out_dir}; per-domain table: {table}"
        return f"stopped by {self.stop.name} at step {self.step:,}; resume with: {command()}"

    # Logging

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Time inside is not training time."""
        began = time.perf_counter()
        yield
        self.logged_time += time.perf_counter() - began

    def log(self, record: dict) -> None:
        if self.metrics:
            self.metrics.log(record)

    def log_steps(self, telemetry: Telemetry, wait: bool = True) -> None:
        """Log what the steps since the last call did.

        This waits for the device. With wait = False it leaves a GPU's numbers on their way to the
        host, for the next call.
        """
        if telemetry.pending and not telemetry.sent:
            telemetry.send()
        if not telemetry.sent or (telemetry.sent.arrived and not wait):
            return
        step = int(telemetry.sent.steps[-1])
        statistics, events = telemetry.read()
        for event in events:
            self.log(event)
        now = time.perf_counter()
        if statistics:
            tokens_per_step = self.config.global_batch_size * self.config.block_size
            new_tokens = (step - self.logged_step) * tokens_per_step
            self.log(
                {
                    "kind": "train",
                    "step": step,
                    **statistics,
                    "lr": lr_at(step - 1, self.config),
                    "r": r_at(step - 1, self.config),
                    "tokens": step * tokens_per_step,
                    "tokens_per_s": new_tokens / (now - self.logged_time),
                }
            )
        self.logged_step, self.logged_time = step, now

    def log_eval(self, step: int, record: dict, histograms: dict) -> None:
        """Log an evaluation, and the histograms of the steps since the last one."""
        self.log({"kind": "eval", "step": step, **record})
        if histograms:
            self.log({"kind": "histogram", "step": step, **histograms})

    # Checkpoints

    def save(self, step: int, state_dict: Callable, evaluated: bool = True) -> None:
        """Begin to write the checkpoint of `step`, unless the run has failed. All ranks call it.

        state_dict: that of the Trainer.
        evaluated: whether the evaluation that is due at this step was made.
        """
        if self.stop.agreed == FAILED:
            return
        is_rank_0 = distributed.ranks().rank == 0
        may_save = distributed.do_for_others(lambda: self.begin_to_save(step), is_rank_0)
        if not may_save or not self.writer:
            return
        tensors, numbers = state_dict()
        state = {
            "gpt": asdict(self.shape),
            "max_steps": self.config.max_steps,
            "identity": self.identity,
            "evaluated": evaluated,
            "data_dir": self.config.data_dir,
            "tokenizer_sha256": self.data.manifest["tokenizer"]["sha256"],
            **numbers,
            "sampler": self.data.sampler.state(step),
            "versions": versions(),
        }
        self.writer.save(step, tensors, state)

    def begin_to_save(self, step: int) -> bool:
        """Whether the checkpoint of `step` can be written; rank 0 decides."""
        self.fail(self.data.train.changed() or self.data.val.changed())
        return not self.stop.reason and self.writer.begin(step)


def check_same_on_all_ranks(own: dict, out_dir: Path) -> None:
    """UserError on every rank if an entry differs between the ranks, with its values."""
    of_all = distributed.gather_objects(own)
    for key in own:
        ranks_of = {}  # value -> the ranks that have it
        for rank, values in enumerate(of_all):
            ranks_of.setdefault(json.dumps(values.get(key)), []).append(str(rank))
        if len(ranks_of) > 1:
            listed = "; ".join(
                f"{value:.80} on {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks)}"
                for value, ranks in ranks_of.items()
            )
            raise UserError(
                f"the ranks do not run the same thing: {key} is {listed}; start all ranks with the "
                f"same command, code and data, and an --out_dir ({out_dir}) that all nodes see"
            )


def code_hash() -> str:
    """Fingerprint of the code that trains."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in [*sorted(root.glob("*.py")), *sorted(root.glob("runtime/*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
