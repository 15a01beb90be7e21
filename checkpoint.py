"""Checkpoints as folders, `checkpoints/step_00000500/`: whole or absent, read without running code.

    model.pt, optimizer.pt    tensors, loaded with weights_only=True to the CPU
    state.json                step, model shape, data fingerprint, all settings and the sha256 of the other two files
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch.utils._pytree import tree_leaves

from distributed import print0
from errors import UserError
from files import sync, write_text
from model import GPT, GPTConfig

FILES = ("model.pt", "optimizer.pt")


class Writer:
    """Writes the checkpoints of a run in a thread of one rank, one at a time; the steps go on meanwhile.

    keep: the newest ones stay, and with `every` also those of its multiples.
    """

    def __init__(self, out_dir: Path, keep: int, every: int):
        self.out_dir, self.keep, self.every, self.thread, self.failure = Path(out_dir), keep, every, None, ""
        tidy(out_dir)

    def save(self, step: int, tensors: tuple[dict, dict], state: dict) -> None:
        """Begin to write the checkpoint of `step`, after the one before is done.

        tensors: a copy of the whole model and optimizer state, as distributed.get_state gives it. What goes wrong is
        in `failure`, and nothing is written after it.
        """
        self.wait()
        if not self.failure:
            self.thread = threading.Thread(target=self._write, args=(step, tensors, state))
            self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, step: int, tensors: tuple[dict, dict], state: dict) -> None:
        try:
            check_space(self.out_dir, tensors)
            save(self.out_dir, step, tensors, state, self.keep, self.every)
        except Exception as error:  # whatever it is, a run that goes on unsaved would be worse
            reason, found = getattr(error, "strerror", None) or repr(error).split("\\n")[0], steps(self.out_dir)
            free = shutil.disk_usage(self.out_dir).free / 1e9
            there = f"the newest there is of step {found[-1]}" if found else "there is none before it"
            self.failure = (f"the checkpoint of step {step} cannot be written to {self.out_dir} ({reason}; {free:.2f} "
                            f"GB are free); {there}; make room and give the same command again")


def save(out_dir: Path, step: int, tensors: tuple[dict, dict], state: dict, keep: int, every: int = 0) -> Path:
    """The checkpoint folder of `step`, complete once it has its name; older ones are deleted (see Writer)."""
    folder = checkpoint_folder(out_dir, step)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        sums = {name: write_tensors(temporary / name, part) for name, part in zip(FILES, tensors, strict=True)}
        write_text(temporary / "state.json", json.dumps({"step": step, **state, "sha256": sums}, indent=1))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(temporary)
    if folder.exists():  # a damaged one that an earlier one was used for
        discard(folder)
    os.replace(temporary, folder)
    sync(folder.parent)
    prune(out_dir, step, keep, every)
    return folder


def tidy(out_dir: Path) -> None:
    """Remove what a process left that was killed while it wrote or deleted."""
    for left in (Path(out_dir) / "checkpoints").glob("*.tmp"):
        shutil.rmtree(left)


def prune(out_dir: Path, step: int, keep: int, every: int) -> None:
    """Delete the checkpoints that are not to be kept after that of `step`."""
    for old in outdated(steps(out_dir), step, keep, every):
        discard(checkpoint_folder(out_dir, old))


def write_tensors(path: Path, tensors: dict) -> str:
    """torch.save to the disk -> sha256 of the file."""
    torch.save(tensors, path)  # by name: through a Python file it would hold up the steps of the main thread
    with open(path, "rb") as file:
        digest = sha256(file)
        os.fsync(file.fileno())
    return digest


def sha256(file: BinaryIO) -> str:
    """Of a file's content; other threads go on meanwhile."""
    digest = hashlib.sha256()
    while part := file.read(1 << 24):
        digest.update(part)
    return digest.hexdigest()


def check_space(out_dir: Path, tensors: tuple[dict, dict]) -> None:
    """OSError where the disk has no room for the tensors: to find out beforehand spares the disk's other users."""
    needed = sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
    free = shutil.disk_usage(out_dir).free
    if free < needed * 1.01:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed")


def outdated(found: list[int], step: int, keep: int, every: int) -> list[int]:
    """Of the checkpoints `found` those to delete after `step` was written.

    Those past `step` are damaged, or the run would have gone on from them.
    """
    kept = {s for s in found if s <= step}
    kept = {*sorted(kept)[-keep:], *(s for s in kept if every and s % every == 0)}
    return [s for s in found if s not in kept]


def discard(folder: Path) -> None:
    """Delete a checkpoint, which at no moment looks like a whole one with files missing."""
    temporary = folder.with_name(f"{folder.name}.old.tmp")
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def checkpoint_folder(out_dir: Path, step: int) -> Path:
    return Path(out_dir) / "checkpoints" / f"step_{step:08d}"


def steps(out_dir: Path) -> list[int]:
    """The steps with a checkpoint, ascending; folders with other names are left alone."""
    found = (re.fullmatch(r"step_(\d{8,})", p.name) for p in (Path(out_dir) / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def find_latest(out_dir: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    found = steps(out_dir)
    return checkpoint_folder(out_dir, found[-1]) if found else None


def find_resumable(out_dir: Path, identity: dict, resume: str, max_steps: int, accept: Iterable[str] = ()
                   ) -> tuple[Path | None, dict]:
    """The newest intact checkpoint and its state.json, or (None, {}); UserError if out_dir holds another run.

    identity: what must be the same for a run to go on, except for the keys `accept`; saved with each checkpoint and,
    for a run that was stopped before its first one, in config.json.
    """
    begun = Path(out_dir) / "config.json"
    if not steps(out_dir) and not begun.exists():
        return None, {}
    if resume == "never":
        raise UserError(f"{out_dir} already holds a run; choose another --out_dir, or use --resume auto")
    folder = newest_intact(out_dir)
    state = read_json(folder / "state.json" if folder else begun)
    there = state.get("identity", {})
    differ = [f"{key} {there.get(key)} there, {value} here" + (f" (--{FLAGS[key]} accepts it)" if key in FLAGS else "")
              for key, value in identity.items() if there.get(key) != value and key not in accept]
    if differ:
        raise UserError(f"{out_dir} holds another run: {'; '.join(differ)}; choose another --out_dir")
    if folder is None:
        return None, {}
    if state["step"] > max_steps:
        raise UserError(f"{folder} is past --max_steps {max_steps}; choose another --out_dir or more steps")
    if state["max_steps"] != max_steps:
        print0(f"--max_steps was {state['max_steps']:,}: the learning rate goes down to --min_lr at the new end")
    return folder, state


FLAGS = {"data": "allow_data_change"}  # key of the identity -> the flag that lets it differ


def newest_intact(out_dir: Path) -> Path | None:
    """The newest checkpoint whose files are what was written, with a warning of those that are not.

    None where there is no checkpoint; UserError where all are damaged: to start anew would be another run.
    """
    damage = ""
    for step in reversed(steps(out_dir)):
        folder = checkpoint_folder(out_dir, step)
        try:
            for name in FILES:
                verify(folder, name)
        except UserError as error:
            damage = damage or str(error).split(";")[0]
            continue
        if damage:
            print0(f"warning: {damage}; going on from {folder}")
        return folder
    if damage:
        raise UserError(f"{out_dir} has no intact checkpoint: {damage}; restore it, or choose another --out_dir")
    return None


def verify(folder: Path, name: str) -> None:
    """UserError if a file of a checkpoint is not the one that was written.

    Reads it once from the disk; loading it afterwards finds it in memory.
    """
    path = Path(folder) / name
    expected = read_json(Path(folder) / "state.json").get("sha256", {}).get(name)  # older checkpoints have none
    try:
        with open(path, "rb") as file:
            found = sha256(file) if expected else None
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if found != expected:
        raise damaged(path, "is damaged (its sha256 is not the one in state.json)")


def damaged(path: Path, reason: str) -> UserError:
    """What to say of a file of a checkpoint that is not what was written."""
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


def read_tensors(folder: Path, config: GPTConfig) -> tuple[dict, dict]:
    """Model and optimizer state on the CPU, for distributed.set_state; UserError if they are of another model."""
    saved = replace(read_shape(folder), dropout=config.dropout)  # no part of the shape
    if saved != config:
        differ = ", ".join(f"{k} {v} there, {getattr(config, k)} here"
                           for k, v in asdict(saved).items() if v != getattr(config, k))
        raise UserError(f"checkpoint {folder} is of another model: {differ}")
    return tuple(_read(folder, name) for name in FILES)


def read_shape(folder: Path) -> GPTConfig:
    """The shape of the checkpoint's model."""
    path = Path(folder) / "state.json"
    try:
        return GPTConfig(**read_json(path)["gpt"])
    except (KeyError, TypeError):
        raise UserError(f"{path} does not say the model's shape; restore it, or use the train.py that wrote it"
                        ) from None


def load_model(folder: Path) -> GPT:
    """The checkpoint's model, on the CPU."""
    verify(folder, "model.pt")
    shape, weights = read_shape(folder), _read(folder, "model.pt")
    try:
        with torch.device("meta"):  # no memory for a shape that state.json may have wrong
            fits = {k: v.shape for k, v in GPT(shape).state_dict().items()} == {k: v.shape for k, v in weights.items()}
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{folder}: model.pt has not the shape that state.json says; restore them, or remove {folder} "
                        "to go on from an earlier checkpoint")
    model = GPT(shape)
    model.load_state_dict(weights)
    return model


def _read(folder: Path, name: str) -> dict:
    path = Path(folder) / name
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        reason = "is missing"
    except pickle.UnpicklingError:  # weights_only=True refuses to run what else a file may hold
        reason = "is damaged or holds more than tensors"
    except Exception:  # a damaged file makes the reader raise anything
        reason = "is damaged"
    raise damaged(path, reason)
