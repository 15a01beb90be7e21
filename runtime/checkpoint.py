"""Checkpoints as folders, `checkpoints/step_00000500/`: whole or absent, read without running code.

model.pt, optimizer.pt    tensors, loaded with weights_only=True to the CPU
state.json                step, model shape, data fingerprint, all settings, sha256 of the others

Where n ranks share one copy of the model, each of them writes its rows: model_00000.pt and
optimizer_00000.pt, and so on (runtime/parts.py). No rank ever has more than its own.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cli import UserError, print_error
from families import Shape, build_empty, shape_from
from files import sync, write_text
from model import LanguageModel
from recipe import TrainConfig, with_added_keys
from runtime import distributed, parts
from runtime.distributed import Team, print0
from runtime.parts import Share, State

KINDS = ("model", "optimizer")  # of the files with tensors
LOGS = ("metrics.jsonl", "samples.bin")  # what the steps append to in the run folder
# Keys of the identity that a flag lets differ.
FLAGS = {"data": "allow_data_change"}


class Found(NamedTuple):
    """Where a run continues: the newest intact checkpoint, or step 0 without one."""

    folder: Path | None = None
    step: int = 0
    evaluated: bool = False  # whether the evaluation that was due at this step was made
    state: dict = {}  # the content of state.json


# Writing


class Writer:
    """Writes a run's checkpoints in a thread, one at a time, while the steps go on.

    Each rank that has a part of the state writes it, and rank 0 makes a checkpoint of the parts.

    team: the ranks with a part; None: this process alone.
    keep: how many of the newest ones stay; every: those at its multiples stay too (0: none).
    folder_lock: stays locked while the thread writes, even if the run has ended with an error.
    failure: why a checkpoint could not be written; nothing is written after that.
    """

    def __init__(
        self,
        out_dir: Path,
        keep: int,
        every: int,
        folder_lock: IO | None = None,
        team: Team | None = None,
    ):
        self.out_dir, self.keep, self.every = Path(out_dir), keep, every
        self.folder_lock = folder_lock
        self.team = team or Team(1)
        self.share = Share(self.team.rank, self.team.n)
        self.thread, self.failure = None, ""
        if self.share.i == 0:
            tidy(out_dir)

    def begin(self, step: int) -> bool:
        """Make room for the parts of a checkpoint, on rank 0; False: it cannot be written."""
        self.wait()
        if not self.failure:
            try:
                begin(self.out_dir, step)
            except OSError as error:
                self.failure = self.why_not_written(step, reason_of(error))
        return not self.failure

    def save(self, step: int, tensors: State, state: dict) -> None:
        """Begin to write this rank's part of the checkpoint that rank 0 has begun.

        tensors: a copy of this rank's rows, as Trainer.state_dict gives it.
        """
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, tensors, state))
        self.thread.start()

    def is_writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, step: int, tensors: State, state: dict) -> None:
        is_rank_0 = self.share.i == 0
        try:
            # Apart, since what others have written already would no longer be free.
            self.together(lambda: check_space(self.out_dir, tensors, self.share.n))
            of_all = self.together(lambda: write_part(self.out_dir, step, tensors, self.share))
            if is_rank_0:
                hashes = {name: digest for own in of_all for name, digest in own.items()}
                complete(self.out_dir, step, hashes, state, self.keep, self.every)
        except Exception as error:  # whatever it is: to go on without checkpoints would be worse
            if is_rank_0:
                shutil.rmtree(temporary_folder(self.out_dir, step), ignore_errors=True)
            self.failure = self.why_not_written(step, reason_of(error))

    def together(self, work: Callable[[], Any]) -> list:
        """What `work` gives on each rank with a part; an error of one of them is raised on all."""
        result, reason = None, ""
        try:
            result = work()
        except Exception as error:
            reason = reason_of(error)
        of_all = self.team.gather((result, reason))
        for _, reason in of_all:
            if reason:
                raise OSError(errno.EIO, reason)
        return [result for result, _ in of_all]

    def why_not_written(self, step: int, reason: str) -> str:
        free = shutil.disk_usage(self.out_dir).free / 1e9
        existing = steps(self.out_dir)
        newest = "there is none before it"
        if existing:
            newest = f"the newest one is of step {existing[-1]}"
        return (
            f"the checkpoint of step {step} cannot be written to {self.out_dir} ({reason}; "
            f"{free:.2f} GB are free); {newest}; make room and give the same command again"
        )


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or repr(error).split("\\n")[0]


def save(out_dir: Path, step: int, tensors: State, state: dict, keep: int, every: int = 0) -> Path:
    """Write the checkpoint of `step`, whose tensors are not spread over ranks."""
    begin(out_dir, step)
    try:
        hashes = write_part(out_dir, step, tensors, parts.ALL)
        return complete(out_dir, step, hashes, state, keep, every)
    except BaseException:
        shutil.rmtree(temporary_folder(out_dir, step), ignore_errors=True)
        raise


def begin(out_dir: Path, step: int) -> None:
    """Make the empty folder that gets the parts of a checkpoint."""
    temporary = temporary_folder(out_dir, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def write_part(out_dir: Path, step: int, tensors: State, share: Share) -> dict[str, str]:
    """Write a part of the model and of the optimizer -> sha256 of each file."""
    hashes = {}
    for kind, of_kind in zip(KINDS, tensors, strict=True):
        name = f"{kind}.pt" if share.n == 1 else f"{kind}_{share.i:05d}.pt"
        hashes[name] = write_tensors(temporary_folder(out_dir, step) / name, of_kind)
    return hashes


def complete(
    out_dir: Path, step: int, hashes: dict[str, str], state: dict, keep: int, every: int
) -> Path:
    """Give a checkpoint whose parts are written its name; then delete outdated ones."""
    folder, temporary = checkpoint_folder(out_dir, step), temporary_folder(out_dir, step)
    hashes = dict(sorted(hashes.items()))
    content = {"step": step, **state, "model_sha256": hash_of_model(hashes), "sha256": hashes}
    write_text(temporary / "state.json", json.dumps(content, indent=1))
    sync(temporary)
    # First the log: a checkpoint that survives a power cut must not miss the lines before it.
    sync_logs(out_dir)
    if folder.exists():  # damaged, so that the run continued from an earlier one
        discard(folder)
    os.replace(temporary, folder)
    sync(folder.parent)
    tidy(out_dir)
    prune(out_dir, step, keep, every)
    return folder


def sync_logs(out_dir: Path) -> None:
    """Make what the steps have logged survive a power cut."""
    for name in LOGS:
        path = Path(out_dir) / name
        if path.exists():
            sync(path)
    sync(out_dir)


def write_tensors(path: Path, tensors: dict) -> str:
    """torch.save to the disk -> sha256 of the file."""
    # By name: writing through a Python file object would hold up the steps of the main thread.
    torch.save(tensors, path)
    with open(path, "rb") as file:
        digest = sha256(file)
        os.fsync(file.fileno())
    return digest


def sha256(file: BinaryIO) -> str:
    """Hash of a file's content; other threads go on meanwhile."""
    digest = hashlib.sha256()
    while part := file.read(1 << 24):
        digest.update(part)
    return digest.hexdigest()


def check_space(out_dir: Path, tensors: State, n_parts: int) -> None:
    """OSError if the disk lacks room for all parts: better than to fill it for others.

    tensors: one of the parts, which have almost the same size.
    """
    own = sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))
    needed = n_parts * own
    free = shutil.disk_usage(out_dir).free
    if free < needed * 1.01:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed")


# Deleting


OWN_LEFTOVER = re.compile(r"step_\d{8}\.(old\d*\.)?tmp")


def tidy(out_dir: Path) -> None:
    """Remove what a killed process left half-written or half-deleted; nothing of other programs."""
    for path in (Path(out_dir) / "checkpoints").glob("*.tmp"):
        if OWN_LEFTOVER.fullmatch(path.name):
            remove(path)


def remove(folder: Path) -> None:
    """Delete a folder, or say that it is tried again: the next save and the next start do."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warn_not_deleted(folder, error)


def warn_not_deleted(folder: Path, error: OSError) -> None:
    print_error(
        f"warning: {folder} cannot be deleted ({error.strerror}); it takes room until a later "
        "checkpoint or start deletes it"
    )


def prune(out_dir: Path, step: int, keep: int, every: int) -> None:
    """Delete the checkpoints that are outdated after that of `step`."""
    for old in outdated(steps(out_dir), step, keep, every):
        folder = checkpoint_folder(out_dir, old)
        try:
            discard(folder)
        except OSError as error:
            warn_not_deleted(folder, error)


def outdated(existing: list[int], step: int, keep: int, every: int) -> list[int]:
    """Which of the existing checkpoints to delete after `step` was written.

    Those past `step` are damaged, or the run would have continued from them.
    """
    intact = sorted(s for s in existing if s <= step)
    kept = set(intact[-keep:])
    if every:
        kept.update(s for s in intact if s % every == 0)
    return [s for s in existing if s not in kept]


def discard(folder: Path) -> None:
    """Delete a checkpoint, which never looks like a whole one with files missing."""
    n = 0
    while (temporary := folder.with_name(f"{folder.name}.old{n or ''}.tmp")).exists():
        n += 1  # an earlier one that could not be deleted
    os.replace(folder, temporary)
    remove(temporary)


# Finding


def checkpoint_folder(out_dir: Path, step: int) -> Path:
    return Path(out_dir) / "checkpoints" / f"step_{step:08d}"


def temporary_folder(out_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written until it is complete."""
    folder = checkpoint_folder(out_dir, step)
    return folder.with_name(f"{folder.name}.tmp")


def steps(out_dir: Path) -> list[int]:
    """The steps with a checkpoint, ascending; folders with other names are ignored."""
    existing = []
    for folder in (Path(out_dir) / "checkpoints").glob("step_*"):
        if match := re.fullmatch(r"step_(\d{8,})", folder.name):
            existing.append(int(match[1]))
    return sorted(existing)


def find_latest(out_dir: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    existing = steps(out_dir)
    return checkpoint_folder(out_dir, existing[-1]) if existing else None


def find_resumable(
    out_dir: Path, identity: dict, resume: str, max_steps: int, accept: Iterable[str] = ()
) -> Found:
    """Where the run in out_dir continues; UserError if out_dir holds another run.

    identity: what must be the same for a run to continue, except for the keys in `accept`. It is
    saved with each checkpoint and, for a run that stopped before its first one, in config.json.

    All ranks call it. One rank of each node reads the folder, since the tensors take long to read.
    """
    folder, state = distributed.do_for_others(
        lambda: newest_state(out_dir, resume), distributed.does_for_node()
    )
    if not state:
        return Found()
    saved = with_added_keys(state.get("identity", {}))
    differences = []
    for key, value in identity.items():
        if saved.get(key) != value and key not in accept:
            hint = f" (--{FLAGS[key]} accepts it)" if key in FLAGS else ""
            differences.append(f"{key} {saved.get(key)} there, {value} here{hint}")
    if differences:
        raise UserError(
            f"{out_dir} holds another run: {'; '.join(differences)}; choose another --out_dir"
        )
    if folder is None:
        return Found()
    if state["step"] > max_steps:
        raise UserError(
            f"{folder} is past --max_steps {max_steps}; choose another --out_dir or more steps"
        )
    if state["max_steps"] != max_steps:
        print0(
            f"--max_steps was {state['max_steps']:,}: the learning rate goes down to --min_lr "
            "at the new end"
        )
    return Found(folder, state["step"], state.get("evaluated", True), state)


def newest_state(out_dir: Path, resume: str) -> tuple[Path | None, dict]:
    """The newest intact checkpoint and its state; without one, None and config.json, or {}."""
    config_json = Path(out_dir) / "config.json"
    if not steps(out_dir) and not config_json.exists():
        return None, {}
    if resume == "never":
        raise UserError(
            f"{out_dir} already holds a run; choose another --out_dir, or use --resume auto"
        )
    folder = newest_intact(out_dir)
    return folder, read_json(folder / "state.json" if folder else config_json)


def already_finished(found: Found, config: TrainConfig) -> bool:
    """Whether the last step is saved and evaluated.

    Deletes what a kill left between the last checkpoint and the deletion of the older ones.
    """
    if found.step < config.max_steps or not found.evaluated:
        return False
    if distributed.ranks().rank == 0:
        tidy(config.out_dir)
        prune(config.out_dir, found.step, config.keep_checkpoints, config.keep_every)
    print0(
        f"{config.out_dir} is finished: step {found.step:,} of {config.max_steps:,}; nothing to do"
    )
    return True


def newest_intact(out_dir: Path) -> Path | None:
    """The newest undamaged checkpoint, with a warning that names a damaged newer one.

    None where there is no checkpoint; UserError where all are damaged, since to start from scratch
    would be another run.
    """
    damage = ""
    for step in reversed(steps(out_dir)):
        folder = checkpoint_folder(out_dir, step)
        try:
            verify(folder)
        except UserError as error:
            damage = damage or str(error).split(";")[0]
            continue
        if damage:
            print0(f"warning: {damage}; going on from {folder}")
        return folder
    if damage:
        raise UserError(
            f"{out_dir} has no intact checkpoint: {damage}; restore it, or choose another --out_dir"
        )
    return None


# Reading


def verify(folder: Path, kinds: Iterable[str] = KINDS) -> None:
    """UserError if a file of a checkpoint is not the one that was written.

    This reads all of them from the disk; to load them afterwards takes them from the page cache.
    """
    state = read_json(Path(folder) / "state.json")
    names = [name for kind in kinds for name in part_files(state, kind)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: verify_file(folder, name, state), names))


def verify_file(folder: Path, name: str, state: dict) -> None:
    path = Path(folder) / name
    expected = hashes_of(state).get(name)  # None in older checkpoints
    actual = None
    try:
        with open(path, "rb") as file:
            if expected:
                actual = sha256(file)
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if actual != expected:
        raise damaged(path, "is damaged (its sha256 is not the one in state.json)")


def hashes_of(state: dict) -> dict[str, str]:
    """sha256 by file name, from the content of state.json; older checkpoints have none."""
    hashes = state.get("sha256", {})
    return hashes if isinstance(hashes, dict) else {}


def part_files(state: dict, kind: str) -> list[str]:
    """The files of a kind, in the order of the parts; state: the content of state.json."""
    pattern = re.compile(rf"{kind}(_\d{{5}})?\.pt")
    return sorted(filter(pattern.fullmatch, hashes_of(state))) or [f"{kind}.pt"]


def hash_of_model(hashes: dict[str, str]) -> str:
    """One sha256 for all weights: that of model.pt, or of the hashes of its parts."""
    of_parts = [hashes[name] for name in part_files({"sha256": hashes}, "model")]
    if len(of_parts) == 1:
        return of_parts[0]
    return hashlib.sha256("".join(of_parts).encode()).hexdigest()


def model_sha256(state: dict) -> str | None:
    """The hash of a checkpoint's weights; None where it is too old. state: its state.json."""
    return state.get("model_sha256") or hashes_of(state).get("model.pt")


def damaged(path: Path, reason: str) -> UserError:
    """The error for a file of a checkpoint that is not what was written."""
    return UserError(f"{path} {reason}; remove {path.parent} to go on from an earlier checkpoint")


def read_json(path: Path) -> dict:
    """A JSON file of a run folder that holds an object; UserError where it does not."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or make it again") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is damaged (it holds no settings); restore it or make it again")
    return content


def read_parts(folder: Path, config: Shape) -> list[State]:
    """All parts of model and optimizer on the CPU; UserError if they are of another model."""
    saved = asdict(replace(read_shape(folder), dropout=config.dropout))  # dropout may differ
    expected = asdict(config)
    differences = [
        f"{key} {saved[key]} there, {expected.get(key)} here"
        for key in saved
        if saved[key] != expected.get(key)
    ]
    if differences:
        raise UserError(f"checkpoint {folder} is of another model: {', '.join(differences)}")
    weights, moments = (load_parts(folder, kind) for kind in KINDS)
    return list(zip(weights, moments, strict=True))


def load_parts(folder: Path, kind: str) -> list[dict]:
    """The tensors of all files of a kind."""
    state = read_json(Path(folder) / "state.json")
    return [load_tensors(folder, name) for name in part_files(state, kind)]


def read_shape(folder: Path) -> Shape:
    """The shape of the checkpoint's model."""
    path = Path(folder) / "state.json"
    try:
        return shape_from(read_json(path)["gpt"])
    except (KeyError, TypeError):
        raise UserError(
            f"{path} does not say the model's shape; restore it, or use the train.py that wrote it"
        ) from None


def read_weights(folder: Path) -> dict[str, list[Tensor]]:
    """Each parameter's rows in each part; UserError where they are not those of the shape.

    Nothing is read before it is used. If there are several ranks, all of them call it.
    """
    distributed.do_for_others(lambda: verify(folder, ["model"]), distributed.does_for_node())
    of_parts = load_parts(folder, "model")
    weights = {}
    for part in of_parts:
        for name, rows in part.items():
            weights.setdefault(name, []).append(rows)
    if not matches(read_shape(folder), weights):
        names = "model.pt does" if len(of_parts) == 1 else "the parts of the model do"
        raise UserError(
            f"{folder}: {names} not match the shape in state.json; restore them, or remove "
            f"{folder} to go on from an earlier checkpoint"
        )
    return weights


def load_model(folder: Path) -> LanguageModel:
    """The checkpoint's whole model, on the CPU. If there are several ranks, all of them call it."""
    weights = read_weights(folder)
    model = build_empty(read_shape(folder)).to_empty(device="cpu")
    parts.fill(model, weights.items())
    return model


def matches(shape: Shape, weights: dict[str, list[Tensor]]) -> bool:
    """Whether the weights are those of a model of this shape, which may be nonsense."""
    try:
        expected = build_empty(shape).state_dict()
        sizes = {}
        for name, of_parts in weights.items():
            sizes[name] = (sum(map(len, of_parts)), *of_parts[0].shape[1:])
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError, AttributeError):
        return False
    return sizes == {name: tuple(weight.shape) for name, weight in expected.items()}


def load_tensors(folder: Path, name: str) -> dict:
    """The tensors of a file, on the CPU; mapped, so that the ranks of a node share the memory."""
    path = Path(folder) / name
    if path.is_file() and path.stat().st_size == 0:  # scripts/reproduce.sh empties it
        raise UserError(
            f"{path} was dropped when the run was finished, to save room, so the run cannot "
            f"continue; start from its weights with --init_from {folder} and a new --out_dir"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        reason = "is missing"
    except pickle.UnpicklingError:  # weights_only=True refuses to run code
        reason = "is damaged or holds more than tensors"
    except Exception:  # a damaged file makes the reader raise anything
        reason = "is damaged"
    raise damaged(path, reason)
