"""Checkpoints as folders, `checkpoints/step_00000500/`: whole or absent, read without running code.

    model.pt, optimizer.pt    tensors, loaded with weights_only=True to the CPU
    state.json                step, model shape, data fingerprint and all settings, for people and for the guards
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from errors import UserError
from model import GPT, GPTConfig


def write_text(path: Path, text: str) -> None:
    """Write a file that is either whole or absent (temporary name, fsync, rename)."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(out_dir: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict, keep: int) -> Path:
    """Write the checkpoint of `step` under out_dir and delete all but the `keep` newest; call on one rank."""
    folder = checkpoint_folder(out_dir, step)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(model.state_dict(), temporary / "model.pt")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    write_text(temporary / "state.json", json.dumps({"step": step, "gpt": asdict(model.config), **state}, indent=1))
    for path in (temporary / "model.pt", temporary / "optimizer.pt", temporary):
        _sync(path)
    if folder.exists():  # the same step again, after a resume
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    _sync(folder.parent)
    for old in steps(out_dir)[:-keep]:
        shutil.rmtree(checkpoint_folder(out_dir, old))
    return folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoint_folder(out_dir: Path, step: int) -> Path:
    return Path(out_dir) / "checkpoints" / f"step_{step:08d}"


def steps(out_dir: Path) -> list[int]:
    """The steps with a checkpoint, ascending."""
    folder = Path(out_dir) / "checkpoints"
    return sorted(int(p.name.removeprefix("step_")) for p in folder.glob("step_*") if not p.name.endswith(".tmp"))


def find_latest(out_dir: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    found = steps(out_dir)
    return checkpoint_folder(out_dir, found[-1]) if found else None


def read_state(folder: Path) -> dict:
    """A checkpoint's state.json."""
    try:
        return json.loads((Path(folder) / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a readable checkpoint ({error})") from None


def load(folder: Path, model: GPT, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's tensors into the model and the optimizer; UserError where they do not fit."""
    saved = replace(GPTConfig(**read_state(folder)["gpt"]), dropout=model.config.dropout)  # no part of the shape
    if saved != model.config:
        differ = ", ".join(f"{k} {v} there, {getattr(model.config, k)} here"
                           for k, v in asdict(saved).items() if v != getattr(model.config, k))
        raise UserError(f"checkpoint {folder} is of another model: {differ}")
    model.load_state_dict(_read(folder, "model.pt"))
    if optimizer is not None:
        optimizer.load_state_dict(_read(folder, "optimizer.pt"))


def load_model(folder: Path) -> GPT:
    """The checkpoint's model, on the CPU."""
    model = GPT(GPTConfig(**read_state(folder)["gpt"]))
    load(folder, model)
    return model


def _read(folder: Path, name: str) -> dict:
    try:
        return torch.load(Path(folder) / name, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{Path(folder) / name} is missing") from None
