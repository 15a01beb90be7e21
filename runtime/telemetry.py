"""What the steps of a run did: statistics, histograms, skipped steps, recorded samples.

A step only appends its tensors. `send` begins to bring the steps since the last one to the host, in
one gather, and only `read` waits for them to arrive. K steps, G samples of a global batch, n of
them on this rank, W ranks.

RUN/samples.bin (--record_samples): rows of SAMPLE, no header. To print them:
python eval/inspect_samples.py --run RUN
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from files import write_bytes
from runtime import distributed
from runtime.metrics import no_room

# One sample of one step. domain: index into the domains of the training split; weight: times G.
SAMPLE = np.dtype(
    [("step", "<u4"), ("domain", "u1"), ("window", "<u4"), ("loss", "<f4"), ("weight", "<f4")]
)
BINS = 50  # of a histogram
BOUND = 2.0  # the paper's analysis assumes that no weight exceeds 2 / G
MAX_SKIPPED = 20  # skipped steps in a row before the run ends


class StepResult(NamedTuple):
    """What a step gives; all tensors stay on the device."""

    losses: Tensor  # (n,) sample losses of this rank in nats
    weights: Tensor  # (n,) weights of this rank's samples; over all ranks they sum to 1
    grad_norm: Tensor  # norm of the gradient before clipping
    limits: Tensor  # (2,) largest norm that is taken, largest norm that is no spike
    taken: Tensor  # bool; False: parameters and moments are as before, on all ranks


class PendingStep(NamedTuple):
    """A step that has not been brought to the host yet."""

    step: int
    pairs: np.ndarray  # (G, 2) domain and window
    samples: Tensor  # (2, n) losses and weights of this rank
    norms: Tensor  # (3,) gradient norm, largest that is taken, largest that is no spike


class SentSteps(NamedTuple):
    """K steps that are on their way to the host."""

    steps: np.ndarray  # (K,)
    pairs: np.ndarray  # (K, G, 2) domain and window
    samples: Tensor  # (W, K, 2, n) losses and weights
    norms: Tensor  # (K, 3)
    arrived: torch.cuda.Event | None  # None: they are there


class Telemetry:
    """Collects on every rank. Steps count from 1: step s is the one that ends with s steps done."""

    def __init__(
        self,
        split: data.Split,
        out_dir: str | Path,
        start: int,
        record_every: int,
        on_nonfinite: str = "skip",
    ):
        self.split, self.out_dir = split, Path(out_dir)
        self.record_every = record_every
        self.may_skip = MAX_SKIPPED if on_nonfinite == "skip" else 1
        self.pending: list[PendingStep] = []
        self.sent: SentSteps | None = None
        self.seen: list[np.ndarray] = []  # (2, K * G) losses and weights since the last histogram
        self.skipped: list[int] = []  # the skipped steps in a row up to the newest step
        self.failure = ""  # why samples.bin could not be written
        self.path = None
        if distributed.ranks().rank == 0:
            self.path = self.out_dir / "samples.bin"
            drop_samples_after(start, self.path)

    def add(self, step: int, pairs: np.ndarray, result: StepResult) -> None:
        """Append one step: (G, 2) domain and window of its global batch, and what it gave."""
        samples = torch.stack([result.losses, result.weights])
        norms = torch.stack([result.grad_norm, *result.limits])
        self.pending.append(PendingStep(step, pairs, samples, norms))

    def send(self) -> None:
        """Begin to bring the pending steps to the host, without waiting for the device.

        All ranks call it. What was sent before must have been read.
        """
        steps = np.array([p.step for p in self.pending])
        pairs = np.stack([p.pairs for p in self.pending])
        own = torch.stack([p.samples for p in self.pending])  # (K, 2, n)
        samples = distributed.gather(own.flatten()).view(-1, *own.shape)
        norms = torch.stack([p.norms for p in self.pending])
        (samples, norms), arrived = distributed.to_host([samples, norms])
        self.pending = []
        self.sent = SentSteps(steps, pairs, samples, norms, arrived)

    def read(self) -> tuple[dict, list[dict]]:
        """(statistics of the steps that were sent, a record per event); the same on all ranks.

        Events are skipped steps and gradient spikes. The statistics leave out the skipped steps,
        and are {} if all were skipped. This waits for the device.
        """
        steps, pairs, samples, norms, arrived = self.sent
        self.sent = None
        if arrived:
            arrived.synchronize()
        losses, weights = samples.permute(2, 1, 0, 3).flatten(2).double().numpy()  # (K, G) each
        norms, limits, spikes = norms.double().numpy().T  # (K,) each

        taken = np.isfinite(norms) & (norms <= limits)  # (K,)
        events = []
        for k in np.flatnonzero(~np.isfinite(norms) | (norms > spikes)):
            samples = culprits(losses[k], pairs[k], self.split.domains)
            events.append(
                event_record(int(steps[k]), losses[k], samples, norms[k], spikes[k], bool(taken[k]))
            )
        for step, was_taken in zip(steps.tolist(), taken, strict=True):
            self.skipped = [] if was_taken else [*self.skipped, step]
        if not taken.any():
            return {}, events

        steps, pairs, losses, weights = (x[taken] for x in (steps, pairs, losses, weights))
        G = losses.shape[1]
        self.seen.append(np.stack([losses.ravel(), weights.ravel() * G]))
        if self.path and self.record_every:
            self._record(steps, pairs, losses, weights)
        statistics = weight_statistics(losses, weights, pairs[..., 0], self.split.domains)
        if self.split.kinds:
            kind = self.split.kind_of(pairs.reshape(-1, 2)).reshape(losses.shape)
            statistics |= shares(losses, weights, kind, self.split.kinds, "kind")
        statistics["grad_norm"] = float(norms[taken].mean())
        return statistics, events

    def flush(self) -> tuple[dict, list[dict]]:
        """Send and read."""
        self.send()
        return self.read()

    @property
    def too_many_skipped(self) -> bool:
        """Whether as many steps in a row were skipped as may be."""
        return len(self.skipped) >= self.may_skip

    def why_stopped(self) -> str:
        """The error message when too many steps were skipped."""
        first = self.skipped[0]
        which = f"step {first}"
        if self.may_skip > 1:
            which = f"{len(self.skipped)} steps in a row, from step {first} on"
        return (
            f"loss or gradient not finite, or its norm too large, in {which} (lines of kind skip "
            f"and spike in {self.out_dir}/metrics.jsonl name the samples); the state before is "
            f"saved as step {first - 1}; start a new --out_dir with a lower --learning_rate or a "
            "larger --warmup_steps"
        )

    def _record(
        self, steps: np.ndarray, pairs: np.ndarray, losses: np.ndarray, weights: np.ndarray
    ) -> None:
        """Append the samples of the steps that are due to samples.bin."""
        G = losses.shape[1]
        due = steps % self.record_every == 0
        rows = np.zeros((due.sum(), G), SAMPLE)
        rows["step"] = steps[due, None]
        rows["domain"] = pairs[due, :, 0]
        rows["window"] = pairs[due, :, 1]
        rows["loss"] = losses[due]
        rows["weight"] = weights[due] * G
        try:
            with open(self.path, "ab") as file:
                file.write(rows.tobytes())
        except OSError as error:
            self.failure = no_room(self.path, error)

    def histograms(self) -> dict:
        """Of the losses (nats) and weights (times G) since the last call; {} without a step."""
        if not self.seen:
            return {}
        losses, weights = np.concatenate(self.seen, axis=1)
        self.seen = []
        return {"loss": histogram(losses), "weight": histogram(weights)}


def drop_samples_after(step: int, path: Path) -> None:
    """Remove the rows past a checkpoint: the resumed run is about to take these steps again."""
    if path.exists():
        rows = np.fromfile(path, SAMPLE)
        write_bytes(path, rows[rows["step"] <= step].tobytes())


def histogram(values: np.ndarray) -> dict:
    """Counts in BINS equal bins from low to high."""
    counts, edges = np.histogram(values, BINS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


def culprits(losses: np.ndarray, pairs: np.ndarray, domains: tuple[str, ...]) -> list[dict]:
    """The samples of a step whose loss is not finite; every sample where all are finite."""
    bad = ~np.isfinite(losses)
    chosen = np.flatnonzero(bad) if bad.any() else range(len(losses))
    samples = []
    for i in chosen:
        domain, window = pairs[i]
        loss = float(losses[i])
        if not math.isfinite(loss):
            loss = str(losses[i])  # JSON has no nan
        samples.append({"domain": domains[domain], "window": int(window), "loss": loss})
    return samples


def event_record(
    step: int, losses: np.ndarray, samples: list[dict], norm: float, spike: float, taken: bool
) -> dict:
    """The record of a step that was skipped or whose gradient norm is a spike.

    kind "skip": loss or gradient not finite; "spike": a finite norm above `spike`, taken or not.
    """
    if math.isfinite(norm):
        return {
            "kind": "spike",
            "step": step,
            "grad_norm": norm,
            "limit": spike,
            "skipped": not taken,
            "samples": samples,
        }
    reason = "gradient" if np.isfinite(losses).all() else "loss"
    return {"kind": "skip", "step": step, "reason": reason, "samples": samples}


def shares(
    losses: np.ndarray, weights: np.ndarray, group: np.ndarray, names: tuple[str, ...], label: str
) -> dict:
    """(K, G) losses, weights and group indices -> statistics of each group that was drawn.

    Its mean share of the weight, its share of the samples, and its mean loss.
    """
    weight_share, sample_share, mean_loss = {}, {}, {}
    for i, name in enumerate(names):
        members = group == i
        if members.any():
            weight_share[name] = float(weights[members].sum() / len(weights))
            sample_share[name] = float(members.mean())
            mean_loss[name] = float(losses[members].mean())
    return {
        f"weight_by_{label}": weight_share,
        f"samples_by_{label}": sample_share,
        f"loss_by_{label}": mean_loss,
    }


def weight_statistics(
    losses: np.ndarray, weights: np.ndarray, domain: np.ndarray, domains: tuple[str, ...]
) -> dict:
    """(K, G) losses, weights and domain indices -> means over the K steps.

    ess: effective sample size 1 / sum w^2 as a fraction of G. max_weight: the largest of all steps,
    times G. above_bound: the share of steps with a weight above BOUND / G. entropy: of the weights
    in nats, at most log G; KL(w || uniform) = log G - entropy. correlation: of weight and loss; 0
    where all weights are equal.
    """
    G = losses.shape[1]
    centered_weights = weights - weights.mean(1, keepdims=True)
    centered_losses = losses - losses.mean(1, keepdims=True)
    spread = np.sqrt((centered_weights**2).sum(1) * (centered_losses**2).sum(1))
    spread = np.where(spread > 1e-9, spread, np.inf)
    logs = np.log(np.where(weights > 0, weights, 1))
    per_step = {
        "loss": losses.mean(1),
        "weighted_loss": (weights * losses).sum(1),
        "ess": 1 / (weights**2).sum(1) / G,
        "above_bound": weights.max(1) * G > BOUND * (1 + 1e-6),  # a weight capped there is not
        "entropy": -(weights * logs).sum(1),
        "correlation": (centered_weights * centered_losses).sum(1) / spread,
    }
    statistics = {key: float(values.mean()) for key, values in per_step.items()}
    statistics["max_weight"] = float(weights.max() * G)
    return statistics | shares(losses, weights, domain, domains, "domain")
