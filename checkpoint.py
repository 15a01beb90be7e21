"""Checkpoints as folders, `checkpoints/step_00000500/`: whole or absent, read without running code.

    model.pt, optimizer.pt    tensors, loaded with weights_only=True to the CPU
    state.json                step, model shape, data fingerprint and all settings, for people and for the guards
"""

import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from distributed import print0
from errors import UserError
from files import sync, write_text
from model import GPT, GPTConfig


def save(out_dir: Path, step: int, tensors: tuple[dict, dict], state: dict, keep: int) -> Path:
    """Write the checkpoint of `step` under out_dir and delete all but the `keep` newest; call on one rank.

    tensors: whole model and optimizer state, as distributed.get_state gives them.
    """
    folder = checkpoint_folder(out_dir, step)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(tensors[0], temporary / "model.pt")
    torch.save(tensors[1], temporary / "optimizer.pt")
    write_text(temporary / "state.json", json.dumps({"step": step, **state}, indent=1))
    for path in (temporary / "model.pt", temporary / "optimizer.pt", temporary):
        sync(path)
    if folder.exists():  # the same step again, after a resume
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    sync(folder.parent)
    for old in steps(out_dir)[:-keep]:
        shutil.rmtree(checkpoint_folder(out_dir, old))
    return folder


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


def find_resumable(out_dir: Path, identity: dict, resume: str, max_steps: int) -> tuple[Path | None, int]:
    """The checkpoint to continue from and its step, or (None, 0); UserError if out_dir holds another run.

    identity: what must be the same for a run to go on; saved with each checkpoint and, for a run that was stopped
    before its first one, in config.json.
    """
    folder, begun = find_latest(out_dir), Path(out_dir) / "config.json"
    if folder is None and not begun.exists():
        return None, 0
    if resume == "never":
        raise UserError(f"{out_dir} already holds a run; choose another --out_dir, or use --resume auto")
    state = read_json(folder / "state.json" if folder else begun)
    there = state.get("identity", {})
    differ = [f"{key} {there.get(key)} there, {value} here" for key, value in identity.items()
              if there.get(key) != value]
    if differ:
        raise UserError(f"{out_dir} holds another run: {'; '.join(differ)}; choose another --out_dir")
    if folder is None:
        return None, 0
    if state["step"] > max_steps:
        raise UserError(f"{folder} is past --max_steps {max_steps}; choose another --out_dir or more steps")
    if state["max_steps"] != max_steps:
        print0(f"--max_steps was {state['max_steps']:,}: the learning rate goes down to --min_lr at the new end")
    return folder, state["step"]


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
    return _read(folder, "model.pt"), _read(folder, "optimizer.pt")


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
    raise UserError(f"{path} {reason}; remove {folder} to go on from an earlier checkpoint")
