"""What the steps of a run did to the data: statistics, histograms, skipped steps, records of samples.

A step only appends its tensors. Nothing waits for the device until `flush`, which brings the steps since the last one
to the host in one gather. K steps, G samples of a global batch, n of them on this rank, W ranks.

RUN/samples.bin (--record_samples): rows of SAMPLE, no header; python eval/inspect_samples.py --run RUN prints them.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import distributed
from files import write_bytes

# One sample of one step. domain: index into the domains of the training split; weight: times G.
SAMPLE = np.dtype([("step", "<u4"), ("domain", "u1"), ("window", "<u4"), ("loss", "<f4"), ("weight", "<f4")])
BINS = 50  # of a histogram


class Telemetry:
    """Collects on every rank. Steps count from 1: step s is the one that ends with s steps done."""

    def __init__(self, split: data.Split, out_dir: str | Path, start: int, record_every: int):
        self.split, self.record_every = split, record_every
        self.pending: list[tuple[int, np.ndarray, Tensor, Tensor]] = []
        self.seen: list[np.ndarray] = []  # (2, K * G) losses and weights since the last histogram
        self.skipped: list[int] = []  # the skipped steps in a row up to the newest step
        self.path = Path(out_dir) / "samples.bin" if distributed.ranks().rank == 0 else None
        if self.path and self.path.exists():  # a resumed run takes the steps after its checkpoint again
            kept = np.fromfile(self.path, SAMPLE)
            write_bytes(self.path, kept[kept["step"] <= start].tobytes())

    def add(self, step: int, pairs: np.ndarray, losses: Tensor, weights: Tensor, grad_norm: Tensor) -> None:
        """One step: (G, 2) domain and window of the global batch; (n,) losses and weights of this rank."""
        self.pending.append((step, pairs, torch.stack([losses, weights]), grad_norm))

    def flush(self) -> tuple[dict, list[dict]]:
        """(statistics of the steps since the last call, a record for each skipped one), the same on every rank.

        A step is skipped if its gradient's norm is not finite; statistics leave it out, and are {} if all were.
        """
        steps, pairs, values, norms = zip(*self.pending, strict=True)
        self.pending = []
        values = distributed.gather(torch.stack(values).flatten()).view(-1, len(steps), 2, values[0].size(1))
        values = values.permute(1, 2, 0, 3).flatten(2).cpu().double().numpy()  # (W, K, 2, n) -> (K, 2, G)
        norms, pairs, steps = np.array(torch.stack(norms).tolist()), np.stack(pairs), np.array(steps)
        good = np.isfinite(norms)  # (K,)
        skips = [skip_record(int(steps[k]), pairs[k], values[k, 0], self.split.domains) for k in np.flatnonzero(~good)]
        for step, fine in zip(steps.tolist(), good, strict=True):
            self.skipped = [] if fine else [*self.skipped, step]
        if not good.any():
            return {}, skips
        (losses, weights), pairs = values[good].swapaxes(0, 1), pairs[good]  # (K, G) each, (K, G, 2)
        self.seen.append(np.stack([losses.ravel(), weights.ravel() * losses.shape[1]]))
        if self.path and self.record_every:
            self._record(steps[good], pairs, losses, weights)
        record = weight_statistics(losses, weights, pairs[..., 0], self.split.domains)
        if self.split.kinds:
            kind = self.split.kind_of(pairs.reshape(-1, 2)).reshape(losses.shape)
            record |= shares(losses, weights, kind, self.split.kinds, "kind")
        return {**record, "grad_norm": float(norms[good].mean())}, skips

    def _record(self, steps: np.ndarray, pairs: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        due = steps % self.record_every == 0
        rows = np.zeros((due.sum(), losses.shape[1]), SAMPLE)
        rows["step"], rows["domain"], rows["window"] = steps[due, None], pairs[due, :, 0], pairs[due, :, 1]
        rows["loss"], rows["weight"] = losses[due], weights[due] * losses.shape[1]
        with open(self.path, "ab") as file:
            file.write(rows.tobytes())

    def histograms(self) -> dict:
        """Of the losses (nats) and weights (times G) since the last call, or since this process began; {}: no step."""
        if not self.seen:
            return {}
        losses, weights = np.concatenate(self.seen, axis=1)
        self.seen = []
        return {"loss": histogram(losses), "weight": histogram(weights)}


def histogram(values: np.ndarray) -> dict:
    """Counts in BINS equal bins from low to high."""
    counts, edges = np.histogram(values, BINS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


def skip_record(step: int, pairs: np.ndarray, losses: np.ndarray, domains: tuple[str, ...]) -> dict:
    """Why a step was skipped: the samples whose loss is not finite or, where all are, every sample of the step."""
    bad = ~np.isfinite(losses)
    culprits = np.flatnonzero(bad if bad.any() else ~bad)
    return {"kind": "skip", "step": step, "reason": "loss" if bad.any() else "gradient",
            "samples": [{"domain": domains[pairs[i, 0]], "window": int(pairs[i, 1]),
                         "loss": float(losses[i]) if math.isfinite(losses[i]) else str(losses[i])} for i in culprits]}


def shares(losses: np.ndarray, weights: np.ndarray, group: np.ndarray, names: tuple[str, ...], label: str) -> dict:
    """(K, G) losses, weights and group indices -> per group that was drawn: its mean share of the weight, its share of
    the samples, and its mean loss."""
    out = {f"weight_by_{label}": {}, f"samples_by_{label}": {}, f"loss_by_{label}": {}}
    for i, name in enumerate(names):
        mine = group == i
        if mine.any():
            values = (weights[mine].sum() / len(weights), mine.mean(), losses[mine].mean())
            for key, value in zip(out, values, strict=True):
                out[key][name] = float(value)
    return out


def weight_statistics(losses: np.ndarray, weights: np.ndarray, domain: np.ndarray, domains: tuple[str, ...]) -> dict:
    """(K, G) losses, weights and domain indices of K steps -> means over the steps (max_weight: the largest).

    ess: effective sample size 1 / sum w^2 as a fraction of G. max_weight: times G. entropy: of the weights, nats,
    at most log G; KL(w || uniform) = log G - entropy. correlation: of weight and loss; 0 where the weights are alike.
    """
    G = losses.shape[1]
    w, c = weights - weights.mean(1, keepdims=True), losses - losses.mean(1, keepdims=True)
    spread = np.sqrt((w**2).sum(1) * (c**2).sum(1))
    means = {"loss": losses.mean(1), "weighted_loss": (weights * losses).sum(1), "ess": 1 / (weights**2).sum(1) / G,
             "entropy": -(weights * np.log(np.where(weights > 0, weights, 1))).sum(1),
             "correlation": (w * c).sum(1) / np.where(spread > 1e-9, spread, np.inf)}
    return {**{key: float(value.mean()) for key, value in means.items()}, "max_weight": float(weights.max() * G),
            **shares(losses, weights, domain, domains, "domain")}
