"""What a frozen reference model loses on the windows of a run (--reweight_ref).

The weights then see how much higher a sample's loss is than the reference's: text that is hard for
every model, such as noise, has no excess. Two forms, with the same numbers up to rounding: another
run, whose model makes one more forward pass in each step, or a file that eval/score_windows.py has
made beforehand, which costs nothing in the step.

n samples of this rank, T tokens.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from corpus import tokenizer
from data import Batch, RunData
from recipe import TrainConfig
from runtime import checkpoint, distributed


class About(NamedTuple):
    """Which model a reference is; part of a run's identity."""

    model_sha256: str
    trained_on: str | None  # hash of the data that the reference was trained on

    def describe(self, source: str, data_hash: str) -> str:
        """For the plan."""
        place = "this data" if self.trained_on == data_hash else "other data"
        return f"{source}, trained on {place}"


# A file


class Scored(NamedTuple):
    """The content of a file of eval/score_windows.py."""

    about: About
    data: str  # hash of the data that the windows are of
    block_size: int
    windows: dict[str, np.ndarray]  # domain -> (k,) windows, ascending
    losses: dict[str, np.ndarray]  # domain -> (k,) float32 loss of each in nats per token


class FromFile:
    """Looks up the reference's losses by domain and window."""

    def __init__(self, path: str, domains: tuple[str, ...], device: torch.device):
        scored = read_file(path)
        nothing = np.zeros(0)
        self.path, self.domains, self.device = path, domains, device
        self.windows = [scored.windows.get(domain, nothing) for domain in domains]
        self.losses = [scored.losses.get(domain, nothing) for domain in domains]

    def __call__(self, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """(n,) losses of this rank's samples; UserError where the file lacks a window."""
        rank, n = distributed.ranks().rank, len(x)
        own = batch.pairs[rank * n : (rank + 1) * n]
        losses = np.empty(n, dtype=np.float32)
        for i, (domain, window) in enumerate(own.tolist()):
            windows = self.windows[domain]
            place = int(np.searchsorted(windows, window))
            if place == len(windows) or windows[place] != window:
                raise UserError(
                    f"--reweight_ref {self.path} has no loss of window {window:,} of "
                    f"{self.domains[domain]}; make it with eval/score_windows.py and the flags of "
                    "this run"
                )
            losses[i] = self.losses[domain][place]
        return torch.from_numpy(losses).to(self.device, non_blocking=True)


def read_file(path: str) -> Scored:
    """UserError where it is no file of eval/score_windows.py."""
    try:
        with np.load(path) as saved:
            about = json.loads(str(saved["about"]))
            domains = about["domains"]
            windows = {domain: saved[f"windows/{domain}"] for domain in domains}
            losses = {domain: saved[f"losses/{domain}"] for domain in domains}
            model = About(about["model_sha256"], about["trained_on"])
            return Scored(model, about["data"], about["block_size"], windows, losses)
    except Exception as error:  # a damaged archive makes the reader raise anything
        raise UserError(
            f"--reweight_ref {path} is no file of eval/score_windows.py "
            f"({type(error).__name__}); make it again, or give a run folder"
        ) from None


# A run


class FromRun:
    """Scores the windows of each step with the frozen model of another run."""

    def __init__(self, folder: Path, config: TrainConfig, device: torch.device):
        self.model = checkpoint.load_model(folder).to(device).eval()
        self.config = config

    @torch.no_grad()
    def __call__(self, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """(n, T) inputs and targets -> (n,) losses."""
        bf16 = self.config.dtype == "bfloat16"
        losses = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            for first in range(0, len(x), self.config.micro_batch_size):
                rows = slice(first, first + self.config.micro_batch_size)
                losses.append(self.model(x[rows], y[rows]).mean(1))
        return torch.cat(losses)


# Either


def look_at(config: TrainConfig, data: RunData, data_hash: str) -> About | None:
    """What --reweight_ref names; UserError where it does not suit the run. None without one."""
    source = config.reweight_ref
    if not source:
        return None
    if Path(source).is_file():
        return check_file(source, config.block_size, data_hash)
    return check_run(source, config.block_size, data.train.tokenizer_sha256)


def check_file(source: str, block_size: int, data_hash: str) -> About:
    scored = read_file(source)
    for what, there, here in (
        ("data", scored.data, data_hash),
        ("block_size", scored.block_size, block_size),
    ):
        if there != here:
            raise UserError(
                f"--reweight_ref {source} was made for {what} {there}, this run has {here}; make "
                "it again with eval/score_windows.py"
            )
    return scored.about


def check_run(source: str, block_size: int, tokenizer_sha256: str) -> About:
    state = checkpoint.read_json(find_folder(source) / "state.json")
    if state.get("tokenizer_sha256") != tokenizer_sha256:
        raise UserError(
            f"--reweight_ref {source} has another tokenizer than the data; give a run on data of "
            "the same tokenizer"
        )
    context = state["gpt"]["block_size"]
    if context < block_size:
        raise UserError(
            f"--reweight_ref {source} has a context of {context} tokens, shorter than "
            f"--block_size {block_size}; give another run or a shorter --block_size"
        )
    return About(checkpoint.model_sha256(state) or "", state.get("identity", {}).get("data"))


def find_folder(source: str) -> Path:
    """The checkpoint that a path names: itself, or the newest one of a run folder."""
    folder = Path(source)
    if (folder / "state.json").is_file():
        return folder
    newest = checkpoint.find_latest(folder)
    if newest is None:
        raise UserError(
            f"--reweight_ref {source}: no checkpoint in it; give a run folder, a checkpoint or a "
            "file of eval/score_windows.py"
        )
    return newest


def what_weights_see(
    config: TrainConfig, data: RunData, device: torch.device
) -> tuple[Tensor | None, FromFile | FromRun | None]:
    """The last two arguments of a Trainer: bytes of each token, and the reference."""
    byte_lengths = None
    if config.reweight_unit == "byte":
        byte_lengths = torch.from_numpy(
            tokenizer.byte_lengths(data.train.tokenizer_sha256, config.data_dir)
        )
    return byte_lengths, load(config, data, device)


def load(config: TrainConfig, data: RunData, device: torch.device) -> FromFile | FromRun | None:
    """What Trainer.step calls for the reference's losses."""
    source = config.reweight_ref
    if not source:
        return None
    if Path(source).is_file():
        return FromFile(source, data.train.domains, device)
    return FromRun(find_folder(source), config, device)
