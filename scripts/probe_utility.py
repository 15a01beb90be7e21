"""Do a strategy's weights go to the samples that help? A forecast from one checkpoint.

    python scripts/probe_utility.py --run runs/124m_uniform_uniform_seed42
    python scripts/probe_utility.py --run RUN/checkpoints/step_00002000 --reweight_ref runs/small

The utility of a training sample is how much the validation loss (mean of the domains) falls per
unit of learning rate along the sample's gradient, preconditioned as AdamW does it. By symmetry it
is how much the sample's loss falls along the preconditioned gradient of the validation loss, so
two more forward passes give it for all samples (a central difference). Weights help where the
weighted mean utility is above the plain mean.

This is the direction alone. Weights also average over fewer samples, which costs the more the
smaller the effective sample size (ess); train.py --reweight_control shuffled measures that cost.
Works on checkpoints of AdamW, without dropout and in float32. It takes a minute on a small model.
"""

import json
import math
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from cli import Parser, UserError, run
from corpus import tokenizer
from data import RunData, open_data, read_batch, validation_windows
from eval.models import find_run
from files import write_text
from model import LanguageModel
from recipe import with_added_keys
from reweight import STRATEGIES, sample_weights
from runtime import checkpoint, parts, reference

FOLDS = 8  # independent repetitions: other validation windows, other training batches
BATCH = 16  # windows per forward pass
FALL = 0.002  # nats by which the validation loss would fall on a step of the finite difference
QUARTERS = 4  # of the samples, by loss


class Choice(NamedTuple):
    """What decides the weights."""

    strategy: str
    r: float
    unit: str = "token"
    has_reference: bool = False

    def title(self) -> str:
        seen = "loss minus the reference's" if self.has_reference else "loss"
        return f"{self.strategy}, {seen} per {self.unit}"


class Samples(NamedTuple):
    """The training samples of a fold, S of them: its batches one after the other."""

    domain: np.ndarray  # (S,)
    loss: np.ndarray  # (S,) nats per token
    reference: np.ndarray  # (S,) the same of the reference model; 0 without one
    tokens_per_byte: np.ndarray  # (S,)
    utility: np.ndarray  # (S,) fall of the validation loss per unit of learning rate

    def seen(self, choice: Choice) -> np.ndarray:
        """(S,) what the weights of a choice see."""
        losses = self.loss - self.reference if choice.has_reference else self.loss
        return losses * self.tokens_per_byte if choice.unit == "byte" else losses


class Probe:
    """A checkpoint, its data, and AdamW's preconditioner at that step."""

    def __init__(self, folder: Path, device: torch.device, data_dir: str | None, ref: str | None):
        state = checkpoint.read_json(folder / "state.json")
        self.settings, self.step = with_added_keys(state["identity"]), state["step"]
        if self.settings["optimizer"] != "adamw":
            raise UserError(f"--run {folder}: needs a run of --optimizer adamw")
        self.model = checkpoint.load_model(folder).to(device).eval()
        self.device = device
        self.optimizer = parts.joined(checkpoint.load_parts(folder, "optimizer"))
        self.data = self.open(data_dir or state["data_dir"], state["tokenizer_sha256"])
        data_dir = data_dir or state["data_dir"]
        lengths = tokenizer.byte_lengths(state["tokenizer_sha256"], data_dir)
        self.byte_lengths = torch.from_numpy(lengths)
        self.reference = None
        if ref:
            reference.check_run(ref, self.settings["block_size"], state["tokenizer_sha256"])
            self.reference = checkpoint.load_model(reference.find_folder(ref)).to(device).eval()

    def open(self, data_dir: str, tokenizer_sha256: str) -> RunData:
        """The run's data, with all validation windows."""
        s = self.settings
        data = open_data(
            data_dir,
            s["block_size"],
            s["mixture"],
            s["global_batch_size"],
            s["seed"],
            eval_windows=1,
            data_order=s["data_order"],
        )
        if data.train.tokenizer_sha256 != tokenizer_sha256:
            raise UserError(f"--data_dir {data_dir} has another tokenizer than the run")
        return data._replace(val_windows=validation_windows(data.val, None))

    def fold(self, k: int, batches: int, windows: int) -> Samples:
        """Fold k of FOLDS: `batches` steps from the checkpoint on, `windows` a domain."""
        direction = self.validation_direction(k, windows)
        first = self.step + k * batches
        pairs = np.concatenate([self.data.sampler.draw(first + i) for i in range(batches)])
        losses, ref, tokens_per_byte = self.look(pairs)
        fall = sum((g * d).sum().item() for g, d in direction)
        epsilon = FALL / fall
        self.move(direction, -epsilon)
        below, _, _ = self.look(pairs)
        self.move(direction, 2 * epsilon)
        above, _, _ = self.look(pairs)
        self.move(direction, -epsilon)
        return Samples(pairs[:, 0], losses, ref, tokens_per_byte, (above - below) / (2 * epsilon))

    def validation_direction(self, k: int, windows: int) -> list[tuple[Tensor, Tensor]]:
        """(gradient of the validation loss, preconditioned gradient) of each parameter."""
        of_fold = []
        for d in range(len(self.data.val.domains)):
            own = self.data.val_windows[self.data.val_windows[:, 0] == d][k::FOLDS]
            chosen = np.linspace(0, len(own) - 1, min(windows, len(own))).astype(int)
            of_fold.append(own[chosen])
        self.model.zero_grad()
        n_domains = sum(len(pairs) > 0 for pairs in of_fold)
        for pairs in of_fold:
            for part in np.split(pairs, range(BATCH, len(pairs), BATCH)):
                if len(part):
                    x, y, _ = read_batch(self.data.val, part)
                    losses = self.model(x.to(self.device), y.to(self.device)).mean(1)
                    (losses.sum() / len(pairs) / n_domains).backward()
        direction = [(p.grad, d) for p, d in preconditioned(self.model, self.optimizer)]
        self.model.zero_grad()
        return direction

    @torch.no_grad()
    def move(self, direction: list[tuple[Tensor, Tensor]], distance: float) -> None:
        """Move the parameters by distance * preconditioned gradient."""
        for parameter, (_, d) in zip(self.model.parameters(), direction, strict=True):
            parameter.add_(d, alpha=distance)

    @torch.no_grad()
    def look(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(S, 2) training windows -> (S,) losses, the reference's (or 0) and tokens per byte."""
        columns = []
        for part in np.split(pairs, range(BATCH, len(pairs), BATCH)):
            x, y, _ = read_batch(self.data.train, part)
            n_bytes = self.byte_lengths[y].sum(1).clamp(min=1)
            x, y = x.to(self.device), y.to(self.device)
            losses = self.model(x, y).double().mean(1).cpu()
            ref = torch.zeros(len(part))
            if self.reference:
                ref = self.reference(x, y).double().mean(1).cpu()
            columns.append(torch.stack([losses, ref, y.size(1) / n_bytes]))
        losses, ref, tokens_per_byte = torch.cat(columns, dim=1).numpy()
        return losses, ref, tokens_per_byte


def preconditioned(model: LanguageModel, optimizer: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, its gradient over AdamW's sqrt(v) + eps), with v after a step of that gradient.

    Without the gradient in v, rows of tokens that training has not seen would count for all.
    """
    settings = {}
    for group in optimizer["param_groups"]:
        settings |= {name: group for name in group["params"]}
    for name, parameter in model.named_parameters():
        moments, group = optimizer["state"][name], settings[name]
        beta2 = group["betas"][1]
        old = moments["exp_avg_sq"].to(parameter.device)
        v = beta2 * old + (1 - beta2) * parameter.grad**2
        v = v / (1 - beta2 ** (float(moments["step"]) + 1))
        yield parameter, parameter.grad / (v.sqrt() + group["eps"])


# What the weights do


class Found(NamedTuple):
    """Of a choice of weights. gain is the change of the mean utility, over that of all samples."""

    choice: Choice
    ess: float  # effective sample size, as a share of the batch
    gain: float
    error: float  # standard error of gain

    def verdict(self) -> str:
        """Of a two-sided t test at 5 % over the folds."""
        if abs(self.gain) < stdtrit(FOLDS - 1, 0.975) * self.error:
            return "cannot tell"
        return "helps" if self.gain > 0 else "hurts"


def weights_of(samples: Samples, choice: Choice, G: int) -> np.ndarray:
    """(S,) weights; those of each batch of G sum to 1."""
    weights = []
    for seen in samples.seen(choice).reshape(-1, G):
        w = sample_weights(torch.from_numpy(seen), choice.strategy, choice.r)
        weights.append(w.double().numpy())
    return np.concatenate(weights)


def judge(folds: list[Samples], G: int, choice: Choice) -> Found:
    """What a choice of weights would do, on batches of G samples."""
    changes, sizes = [], []
    for samples in folds:
        batches = len(samples.loss) // G
        w = weights_of(samples, choice, G)
        changes.append((w * samples.utility).sum() / batches - samples.utility.mean())
        sizes.append(batches / (w**2).sum() / G)
    plain = np.mean([samples.utility.mean() for samples in folds])
    change = float(np.mean(changes))
    error = float(np.std(changes, ddof=1)) / math.sqrt(FOLDS)
    return Found(choice, float(np.mean(sizes)), change / plain, error / abs(plain))


def choices(probe: Probe, r: float) -> list[Choice]:
    """All strategies with all that their weights can see."""
    strategies = [name for name in STRATEGIES if name != "uniform"]
    is_bytes = probe.data.manifest["tokenizer"]["name"] == "bytes"
    units = ["token"] if is_bytes else ["token", "byte"]
    references = [False, True] if probe.reference else [False]
    return [Choice(s, r, unit, ref) for ref, unit, s in product(references, units, strategies)]


def groups(probe: Probe, folds: list[Samples]) -> Iterator[tuple[str, float, float, float]]:
    """(name, share of the samples, utility over that of all, standard error) of each group.

    The groups are the domains, and the quarters of each batch by loss.
    """
    G = probe.settings["global_batch_size"]
    masks = {}
    for d, name in enumerate(probe.data.train.domains):
        masks[name] = [samples.domain == d for samples in folds]
    ranks = []
    for samples in folds:
        rank = samples.loss.reshape(-1, G).argsort(1).argsort(1).reshape(-1)
        ranks.append(rank * QUARTERS // G)
    for q in range(QUARTERS):
        masks[f"quarter {q + 1} by loss"] = [rank == q for rank in ranks]
    plain = np.mean([samples.utility.mean() for samples in folds])
    for name, members in masks.items():
        means = []
        for samples, mask in zip(folds, members, strict=True):
            if mask.any():
                means.append(samples.utility[mask].mean() / plain)
        if len(means) > 1:
            share = float(np.mean(np.concatenate(members)))
            error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
            yield name, share, float(np.mean(means)), error


def as_text(probe: Probe, found: list[Found], of_groups: list) -> str:
    """Two tables: what each choice of weights does, and who has the utility."""
    width = max(len(f.choice.title()) for f in found) + 2
    lines = [
        f"step {probe.step:,}: change of the mean utility, as a share of what uniform weights have",
        f"{'weights':<{width}}{'ess':>6}{'change':>10}{'± error':>10}  verdict",
    ]
    for f in found:
        numbers = f"{f.ess:>6.2f}{f.gain:>+10.1%}{f.error:>10.1%}"
        lines.append(f"{f.choice.title():<{width}}{numbers}  {f.verdict()}")
    lines.append(f"\n{'samples':<{width}}{'share':>8}{'utility':>10}{'± error':>10}  (1: of all)")
    for name, share, utility, error in of_groups:
        lines.append(f"{name:<{width}}{share:>8.1%}{utility:>10.2f}{error:>10.2f}")
    return "\n".join(lines)


def write(path: Path, probe: Probe, found: list[Found], of_groups: list) -> None:
    """The tables as JSON."""
    weights = [f._asdict() | {"choice": f.choice._asdict(), "verdict": f.verdict()} for f in found]
    samples = [dict(zip(("name", "share", "utility", "error"), g, strict=True)) for g in of_groups]
    content = {"step": probe.step, "weights": weights, "samples": samples}
    write_text(path, json.dumps(content, indent=1))


def examine(probe: Probe, batches: int) -> list[Samples]:
    """All folds of a probe, of `batches` training batches each."""
    samples = batches * probe.settings["global_batch_size"]
    per_domain = math.ceil(samples / len(probe.data.val.domains))
    return [probe.fold(k, batches, per_domain) for k in range(FOLDS)]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder, or one of its checkpoints")
    parser.add_argument("--data_dir", help="data folder (default: the one of the run)")
    parser.add_argument("--reweight_ref", metavar="RUN", help="also weigh against this reference")
    parser.add_argument("--r", type=float, help="temperature (default: that of the run)")
    parser.add_argument(
        "--batches", type=int, default=16, help=f"of each of the {FOLDS} folds (default: 16)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="also write the numbers as JSON")
    args = parser.parse_args()
    if args.batches < 1:
        raise UserError(f"--batches {args.batches}: must be above 0")
    if args.r is not None and not 0 < args.r < math.inf:
        raise UserError(f"--r {args.r}: must be above 0")
    _, folder = find_run(args.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = Probe(folder, device, args.data_dir, args.reweight_ref)
    folds = examine(probe, args.batches)
    G, r = probe.settings["global_batch_size"], args.r or probe.settings["r"]
    found = [judge(folds, G, choice) for choice in choices(probe, r)]
    of_groups = list(groups(probe, folds))
    print(as_text(probe, found, of_groups))
    if args.to:
        write(args.to, probe, found, of_groups)


if __name__ == "__main__":
    run(main)
