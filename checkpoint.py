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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent (temporary name, fsync, rename)."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """write_bytes of a text."""
    write_bytes(path, text.encode())


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


def read_tensors(folder: Path, config: GPTConfig) -> tuple[dict, dict]:
    """Model and optimizer state on the CPU, for distributed.set_state; UserError if they are of another model."""
    saved = replace(GPTConfig(**read_state(folder)["gpt"]), dropout=config.dropout)  # dropout is no part of the shape
    if saved != config:
        differ = ", ".join(f"{k} {v} there, {getattr(config, k)} here"
                           for k, v in asdict(saved).items() if v != getattr(config, k))
        raise UserError(f"checkpoint {folder} is of another model: {differ}")
    return _read(folder, "model.pt"), _read(folder, "optimizer.pt")


def load_model(folder: Path) -> GPT:
    """The checkpoint's model, on the CPU."""
    model = GPT(GPTConfig(**read_state(folder)["gpt"]))
    model.load_state_dict(_read(folder, "model.pt"))
    return model


def _read(folder: Path, name: str) -> dict:
    try:
        return torch.load(Path(folder) / name, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{Path(folder) / name} is missing") from None
