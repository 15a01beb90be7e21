"""What is measured on the checkpoints of scripts/study_when.py; each result is kept in a file."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from corpus.manifest import read_manifest
from data import Split, read_batch, validation_windows
from files import write_text
from model import LanguageModel
from runtime import checkpoint
from scripts.probe_utility import Probe, Samples, examine

TEMPERATURES = np.linspace(0.8, 1.2, 17)
CHUNK = 8  # windows per forward pass
PROBE_BATCHES = 8  # of each fold


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Calibration


def calibrated_loss(folder: Path, per_domain: int) -> float:
    """Validation loss of a checkpoint whose logits are divided by the best temperature.

    Mean of the domains in nats per token, on `per_domain` windows of each. The temperature of one
    half of the windows is fitted on the other half.
    """
    file = folder / "calibrated.json"
    if file.exists():
        return json.loads(file.read_text())["loss"]
    state = checkpoint.read_json(folder / "state.json")
    data_dir = Path(state["data_dir"])
    split = Split(data_dir, read_manifest(data_dir), "val", state["gpt"]["block_size"])
    pairs = validation_windows(split, per_domain)
    losses = losses_at_temperatures(checkpoint.load_model(folder).to(device()), split, pairs)
    loss = cross_fitted(losses, pairs[:, 0])
    write_text(file, json.dumps({"loss": loss}))
    return loss


@torch.no_grad()
def losses_at_temperatures(model: LanguageModel, split: Split, pairs: np.ndarray) -> np.ndarray:
    """(M, 2) windows -> (M, K) their losses at each of TEMPERATURES."""
    model.eval()
    losses = []
    for part in np.split(pairs, range(CHUNK, len(pairs), CHUNK)):
        x, y, _ = read_batch(split, part)
        logits = model(x.to(device())).float()
        targets = y.to(device())
        columns = [window_losses(logits / t, targets) for t in TEMPERATURES]
        losses.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(losses).double().numpy()


def window_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T, V) and (B, T) -> (B,) mean loss of each window."""
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def cross_fitted(losses: np.ndarray, domain: np.ndarray) -> float:
    """(M, K) losses at K temperatures -> mean of the domains, each half at the other's best."""
    halves = np.arange(len(domain)) % 2
    chosen = np.empty(len(domain))
    for half in (0, 1):
        others = domain_mean(losses[halves != half], domain[halves != half])
        chosen[halves == half] = losses[halves == half, others.argmin()]
    return float(domain_mean(chosen, domain))


def domain_mean(losses: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """(M, ...) -> (...) mean over the domains of the means of their windows."""
    return np.mean([losses[domain == d].mean(0) for d in np.unique(domain)], axis=0)


# Probe


def probed(folder: Path, reference: Path | None) -> list[Samples]:
    """The folds of the probe of a checkpoint."""
    file = folder / "probe.npz"
    if not file.exists():
        probe = Probe(folder, device(), None, str(reference) if reference else None)
        folds = examine(probe, PROBE_BATCHES)
        arrays = {name: np.stack([getattr(f, name) for f in folds]) for name in Samples._fields}
        temporary = folder / "probe.tmp.npz"
        np.savez(temporary, **arrays)
        temporary.replace(file)
    with np.load(file) as saved:
        arrays = [saved[name] for name in Samples._fields]
    return [Samples(*fold) for fold in zip(*arrays, strict=True)]
