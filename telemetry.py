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
from metrics import no_room

# One sample of one step. domain: index into the domains of the training split; weight: times G.
SAMPLE = np.dtype([("step", "<u4"), ("domain", "u1"), ("window", "<u4"), ("loss", "<f4"), ("weight", "<f4")])
BINS = 50  # of a histogram
WINDOW = 100  # newest steps of which the median gradient norm is taken
SPIKE = 10.0  # a gradient norm beyond so many medians is told
MAX_SKIPPED = 20  # steps in a row that change nothing before the run ends
NONE = torch.finfo(torch.float32).max  # a norm that is not there (yet)


class Guard:
    """Decides on the device, without asking the host, whether a step is taken: see `limits`.

    norms: (WINDOW,) of the steps taken last, that of step s at s % WINDOW; saved with each checkpoint.
    """

    def __init__(self, device: torch.device, skip_grad_norm: float, on_nonfinite: str):
        self.skip_grad_norm, self.stop = skip_grad_norm, on_nonfinite == "stop"
        self.norms = torch.full((WINDOW,), NONE, device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)

    def limits(self, step: int) -> Tensor:
        """(2,): the largest norm with which step `step` (from 0) is taken, and above which its norm is a spike.

        With on_nonfinite = "stop" no norm is small enough once one was not finite, until the host sees it.
        """
        spike = torch.full((), math.inf, device=self.norms.device)
        if step >= WINDOW // 2:  # the median's place follows from the step: to ask the device for it would wait
            spike = (self.skip_grad_norm or SPIKE) * self.norms.sort().values[(min(step, WINDOW) - 1) // 2]
        limit = spike if self.skip_grad_norm else torch.full_like(spike, math.inf)
        return torch.stack([limit.masked_fill(self.halted, -1.0), spike])

    def add(self, step: int, norm: Tensor, taken: Tensor) -> None:
        """The norm of step `step`, and whether it was taken."""
        self.norms[step % WINDOW] = torch.where(taken, norm, self.norms[step % WINDOW])
        if self.stop:
            self.halted |= ~norm.isfinite()


class Telemetry:
    """Collects on every rank. Steps count from 1: step s is the one that ends with s steps done."""

    def __init__(self, split: data.Split, out_dir: str | Path, start: int, record_every: int,
                 on_nonfinite: str = "skip"):
        self.split, self.record_every, self.may_skip = split, record_every, MAX_SKIPPED if on_nonfinite == "skip" else 1
        self.pending: list[tuple[int, np.ndarray, Tensor, Tensor]] = []
        self.seen: list[np.ndarray] = []  # (2, K * G) losses and weights since the last histogram
        self.failure = ""  # why samples.bin could not be written
        self.skipped: list[int] = []  # the skipped steps in a row up to the newest step
        self.path = Path(out_dir) / "samples.bin" if distributed.ranks().rank == 0 else None
        if self.path and self.path.exists():  # a resumed run takes the steps after its checkpoint again
            kept = np.fromfile(self.path, SAMPLE)
            write_bytes(self.path, kept[kept["step"] <= start].tobytes())

    def add(self, step: int, pairs: np.ndarray, losses: Tensor, weights: Tensor, grad_norm: Tensor, limits: Tensor
            ) -> None:
        """One step: (G, 2) domain and window of the global batch; (n,) losses and weights of this rank; the gradient's
        norm and what Guard.limits gave for it."""
        self.pending.append((step, pairs, torch.stack([losses, weights]), torch.stack([grad_norm, *limits])))

    def flush(self) -> tuple[dict, list[dict]]:
        """(statistics of the steps since the last call, a record for each odd one), the same on every rank.

        Odd is a step that was skipped, since its gradient's norm was not finite or above the limit, and a spike.
        Statistics leave out the skipped ones, and are {} if all were.
        """
        steps, pairs, values, norms = zip(*self.pending, strict=True)
        self.pending = []
        values = distributed.gather(torch.stack(values).flatten()).view(-1, len(steps), 2, values[0].size(1))
        values = values.permute(1, 2, 0, 3).flatten(2).cpu().double().numpy()  # (W, K, 2, n) -> (K, 2, G)
        norms, limits, spikes = np.array(torch.stack(norms).tolist()).T  # (K,) each
        pairs, steps, good = np.stack(pairs), np.array(steps), np.isfinite(norms) & (norms <= limits)  # (K,)
        odd = [odd_record(int(steps[k]), pairs[k], values[k, 0], self.split.domains, norms[k], spikes[k], bool(good[k]))
               for k in np.flatnonzero(~np.isfinite(norms) | (norms > spikes))]
        for step, fine in zip(steps.tolist(), good, strict=True):
            self.skipped = [] if fine else [*self.skipped, step]
        if not good.any():
            return {}, odd
        (losses, weights), pairs = values[good].swapaxes(0, 1), pairs[good]  # (K, G) each, (K, G, 2)
        self.seen.append(np.stack([losses.ravel(), weights.ravel() * losses.shape[1]]))
        if self.path and self.record_every:
            self._record(steps[good], pairs, losses, weights)
        record = weight_statistics(losses, weights, pairs[..., 0], self.split.domains)
        if self.split.kinds:
            kind = self.split.kind_of(pairs.reshape(-1, 2)).reshape(losses.shape)
            record |= shares(losses, weights, kind, self.split.kinds, "kind")
        return {**record, "grad_norm": float(norms[good].mean())}, odd

    def why_stopped(self, out_dir: Path) -> str:
        """What to say when `skipped` has as many steps as may be skipped in a row."""
        first = self.skipped[0]
        what = f"{len(self.skipped)} steps in a row, from step {first} on" if self.may_skip > 1 else f"step {first}"
        return (f"loss or gradient not finite, or its norm too large, in {what} (lines of kind skip and spike in "
                f"{out_dir}/metrics.jsonl name the samples); the state before is saved as step {first - 1}; start a "
                "new --out_dir with a lower --learning_rate or a larger --warmup_steps")

    def _record(self, steps: np.ndarray, pairs: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        due = steps % self.record_every == 0
        rows = np.zeros((due.sum(), losses.shape[1]), SAMPLE)
        rows["step"], rows["domain"], rows["window"] = steps[due, None], pairs[due, :, 0], pairs[due, :, 1]
        rows["loss"], rows["weight"] = losses[due], weights[due] * losses.shape[1]
        try:
            with open(self.path, "ab") as file:
                file.write(rows.tobytes())
        except OSError as error:
            self.failure = no_room(self.path, error)

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


def odd_record(step: int, pairs: np.ndarray, losses: np.ndarray, domains: tuple[str, ...], norm: float, limit: float,
               taken: bool) -> dict:
    """A spike, or why a step was skipped, with the samples whose loss is not finite or, where all are, every sample.

    kind "skip": loss or gradient not finite; "spike": a finite norm above `limit`, taken or not.
    """
    bad = ~np.isfinite(losses)
    culprits = np.flatnonzero(bad if bad.any() else ~bad)
    samples = [{"domain": domains[pairs[i, 0]], "window": int(pairs[i, 1]),
                "loss": float(losses[i]) if math.isfinite(losses[i]) else str(losses[i])} for i in culprits]
    if math.isfinite(norm):
        return {"kind": "spike", "step": step, "grad_norm": norm, "limit": limit, "skipped": not taken,
                "samples": samples}
    return {"kind": "skip", "step": step, "reason": "loss" if bad.any() else "gradient", "samples": samples}


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
