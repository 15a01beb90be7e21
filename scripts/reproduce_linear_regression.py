"""The toy regression of Sow et al. (ICLR 2025): minibatch SGD with every strategy.

    python scripts/reproduce_linear_regression.py            # a minute on 2 busy CPU cores

Claim of the paper: linupper converges fastest, quadratic is also ahead of uniform. The weights come
from `reweight.sample_weights`, as in pretraining. Loss of a sample: (x theta - y)^2 / 2; a step:
theta -= lr * sum_i w_i grad l_i, on fresh samples. Within a seed all strategies start at 0 and see
the same samples.

A strategy that prefers high losses makes longer steps in the same direction, so the answer depends
on lr. Every setting is run with one small lr for all, with uniform's best lr for all, and with each
strategy's own best: the one whose mean test loss is first at the setting's target, on other seeds
than those reported. Writes table.md and curves.png.

S strategies, L learning rates, R runs (seeds), G samples per step, d dimensions.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from cli import Parser, UserError, run
from eval.plots import pyplot, style
from reweight import STRATEGIES, sample_weights

G = 32  # the published global batch at 124M
# Test loss at theta = 0 above that of the true parameters, in every run: half the variance of
# x theta_true.
START = 0.5
LOSSES = (0.05, 0.005, 0.0005)  # to be reached: 10 %, 1 % and 0.1 % of START
LR_KINDS = ("small, for all", "uniform's best, for all", "own best")
SMALL = 1 / 8  # of uniform's best


@dataclass(frozen=True)
class Setting:
    """A regression problem.

    rare: share of samples that alone show the second half of the features; 0: all samples show all.
    target: test loss above its floor, for choosing lr and for the verdict; one of LOSSES.
    """

    d: int = 50
    noise: float = 0.1  # standard deviation of the label noise; that of x theta_true is 1
    r: float = 0.4
    power: float = 0.0  # eigenvalue k of the features' covariance is proportional to k^-power
    corrupt: float = 0.0  # share of training labels with extra noise of standard deviation 5
    rare: float = 0.0
    target: float = 0.005

    def scales(self) -> Tensor:
        """(d,) variances of the features where they are shown; their mean is 1."""
        scales = torch.arange(1, self.d + 1.0) ** -self.power
        return scales / scales.mean()

    def covariance(self) -> Tensor:
        """(d,) diagonal of E[x x^T]."""
        if not self.rare:
            return self.scales()
        common = torch.arange(self.d) < self.d // 2
        shown = torch.where(common, 1 - self.rare, self.rare)  # share of samples
        return 2 * self.scales() * shown

    def draw(self, theta_true: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(R, d) -> (R, G, d) features and (R, G) labels of one step."""
        shape = (len(theta_true), G)
        x = torch.randn(*shape, self.d, generator=generator)
        x = x * self.scales().sqrt()
        if self.rare:
            is_rare = torch.rand(*shape, 1, generator=generator) < self.rare
            second_half = torch.arange(self.d) >= self.d // 2
            x = x * math.sqrt(2) * (is_rare == second_half)
        noise = self.noise * torch.randn(shape, generator=generator)
        if self.corrupt:
            is_corrupt = torch.rand(shape, generator=generator) < self.corrupt
            extra = 5 * is_corrupt * torch.randn(shape, generator=generator)
            noise = noise + extra
        y = torch.einsum("rgd,rd->rg", x, theta_true) + noise
        return x, y


class Result(NamedTuple):
    """What the strategies did in a setting with each learning rate.

    With g the weighted gradient and t that of the test loss (exact expectations over x), the
    effective step is g t / t t: 1 for uniform, but for the noise of the batch. The gain does not
    depend on lr: it is the share of the test loss that a step of the best length along -g would
    remove.
    """

    lr: Tensor  # (S, L)
    losses: Tensor  # (steps + 1, S, L, R) test loss above its floor
    effective: Tensor  # (steps, S, L, R) effective step
    gain: Tensor  # (steps, S, L, R)


# Nothing that favours a strategy: isotropic features, more of them than samples in a batch as in a
# language model, label noise that leaves the target in reach, r of the published runs.
BASE = Setting()
SETTINGS = {  # each differs from the base by what its name says
    "base": BASE,
    "no noise": replace(BASE, noise=0.0),
    "noise 1": replace(BASE, noise=1.0, target=0.05),
    "2 % corrupt labels": replace(BASE, corrupt=0.02, target=0.05),
    "d = 10": replace(BASE, d=10),
    "d = 200": replace(BASE, d=200),
    "r = 0.1": replace(BASE, r=0.1),
    "r = 1": replace(BASE, r=1.0),
    "eigenvalues 1/k": replace(BASE, power=1.0),
    "10 % rare group": replace(BASE, rare=0.1),
    "3 % rare group": replace(BASE, rare=0.03),
    "3 % rare group, r = 1": replace(BASE, rare=0.03, r=1.0),
}
SHOWN = ("base", "noise 1", "2 % corrupt labels", "10 % rare group")  # in the figure


def gradient(theta: Tensor, x: Tensor, y: Tensor, r: float) -> Tensor:
    """(S, L, R, d) parameters, (R, G, d), (R, G) -> (S, L, R, d) gradients sum_i w_i grad l_i.

    Row s is weighted by strategy s.
    """
    error = torch.einsum("rgd,slrd->slrg", x, theta) - y
    weights = []
    for strategy, losses in zip(STRATEGIES, error**2 / 2, strict=True):
        weigh = partial(sample_weights, strategy=strategy, r=r)
        weights.append(torch.vmap(torch.vmap(weigh))(losses))  # (L, R, G)
    return torch.einsum("slrg,rgd->slrd", torch.stack(weights) * error, x)


def train(setting: Setting, lr: Tensor, runs: int, steps: int, seed: int) -> Result:
    """SGD with (S, L) learning rates; the runs differ in theta_true and in their samples."""
    generator = torch.Generator().manual_seed(seed)
    covariance = setting.covariance()
    theta_true = torch.randn(runs, setting.d, generator=generator)
    variance = (theta_true**2 * covariance).sum(-1, keepdim=True)
    theta_true *= (2 * START / variance).sqrt()
    theta = torch.zeros(*lr.shape, runs, setting.d)
    losses, effective, gain = [], [], []
    for step in range(steps + 1):
        error = theta - theta_true
        t = error * covariance
        loss = (error * t).sum(-1) / 2
        losses.append(loss)
        if step == steps:
            break
        x, y = setting.draw(theta_true, generator)
        g = gradient(theta, x, y, setting.r)
        along = (g * t).sum(-1)
        curvature = (g**2 * covariance).sum(-1)
        effective.append(along / (t**2).sum(-1))
        gain.append(along**2 / (2 * loss * curvature))
        theta = theta - lr[:, :, None, None] * g
    return Result(lr, torch.stack(losses), torch.stack(effective), torch.stack(gain))


def steps_to(losses: Tensor, target: float) -> Tensor:
    """(steps + 1, ...) -> (...): the first step at or below target; steps + 1 if there is none."""
    hit = losses <= target
    first = hit.int().argmax(0)
    return torch.where(hit.any(0), first, len(losses)).float()


def choose_lr(setting: Setting, runs: int, steps: int) -> Tensor:
    """(S, 3) learning rates, in the order of LR_KINDS."""
    covariance = setting.covariance()
    limit = 2 / (covariance.max() + covariance.sum() / G)  # about where uniform SGD diverges
    grid = limit * 2 ** (torch.arange(-20, 1) / 3)
    lr = grid.expand(len(STRATEGIES), -1)
    losses = train(setting, lr, runs, steps, seed=1).losses
    # The mean over seeds: a single seed may pass the target by chance.
    losses = losses.nan_to_num(math.inf).mean(-1)
    # Below 1, so it decides only between equal numbers of steps.
    last = losses[-1].clamp(max=START)
    fastest = (steps_to(losses, setting.target) + last).argmin(-1)
    best = grid[fastest]  # (S,)
    index = list(STRATEGIES).index("uniform")
    uniform = best[index].expand_as(best)
    return torch.stack([SMALL * uniform, uniform, best], dim=1)


# Tables


def ahead(a: Tensor, b: Tensor) -> str:
    """Whether a takes fewer steps than b, (R,) each, paired by seed: "yes", "no" or "tie".

    A tie is within two standard errors. A seed that does not arrive counts with all its steps and
    one more.
    """
    difference = a - b
    margin = 2 * difference.std() / math.sqrt(len(a))
    if difference.mean() < -margin:
        return "yes"
    return "no" if difference.mean() > margin else "tie"


def fastest(counts: dict[str, Tensor]) -> str:
    """Whether linupper is ahead of every other strategy of the paper."""
    others = ("uniform", "quadratic", "extremes")
    verdicts = {ahead(counts["linupper"], counts[other]) for other in others}
    if "no" in verdicts:
        return "no"
    return "tie" if "tie" in verdicts else "yes"


def steps_cell(counts: Tensor, steps: int) -> str:
    """Mean and spread of (R,) numbers of steps, or how many seeds did not arrive."""
    missed = int((counts > steps).sum())
    if missed == len(counts):
        return "not reached"
    if missed:
        return f"not reached by {missed} of {len(counts)}"
    return f"{counts.mean():.1f} ± {counts.std():.1f}"


def loss_cell(losses: Tensor) -> str:
    """Mean and spread of (R,) test losses."""
    if not losses.mean() < START:
        return "diverged"
    if losses.mean() < 1e-6:
        return "< 1e-6"
    return f"{losses.mean():.1e} ± {losses.std():.0e}"


def mean_cell(values: Tensor, until: Tensor) -> str:
    """The mean of (steps, R) values where `until` holds; - where it never does."""
    mean = values[until].mean()
    return "-" if mean.isnan() else f"{mean:.2f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    return "\n".join(lines)


def verdict_table(results: dict[str, Result], steps: int) -> str:
    """Steps to the target per setting, kind of lr and strategy; whether the paper's claims hold."""
    rows = []
    for name, result in results.items():
        reached = steps_to(result.losses, SETTINGS[name].target)  # (S, L, R)
        for k, kind in enumerate(LR_KINDS):
            counts = dict(zip(STRATEGIES, reached[:, k], strict=True))
            row = [name, kind]
            row += [steps_cell(count, steps) for count in counts.values()]
            row.append(fastest(counts))
            row.append(ahead(counts["quadratic"], counts["uniform"]))
            rows.append(row)
    head = [
        "setting",
        "lr",
        *STRATEGIES,
        "linupper fastest",
        "quadratic ahead of uniform",
    ]
    return markdown(head, rows)


def full_table(results: dict[str, Result], steps: int) -> str:
    """All that was measured, a row per setting, kind of lr and strategy."""
    rows = []
    for name, result in results.items():
        target = SETTINGS[name].target
        for k, kind in enumerate(LR_KINDS):
            for i, strategy in enumerate(STRATEGIES):
                row = [name, kind, strategy]
                row += measurements(result, i, k, target)
                rows.append(row)
    head = [
        "setting",
        "lr",
        "strategy",
        "value of lr",
        "effective step",
        "gain",
        *(f"steps to {target}" for target in LOSSES),
        f"test loss at step {steps}",
    ]
    return markdown(head, rows)


def measurements(result: Result, i: int, k: int, target: float) -> list[str]:
    """The cells of full_table for strategy i with learning rate k."""
    losses = result.losses[:, i, k]  # (steps + 1, R)
    steps = len(losses) - 1
    before_target = torch.arange(steps)[:, None] < steps_to(losses, target)  # (steps, R)
    return [
        f"{result.lr[i, k]:.3g}",
        mean_cell(result.effective[:, i, k], before_target),
        mean_cell(result.gain[:, i, k], before_target),
        *(steps_cell(steps_to(losses, loss), steps) for loss in LOSSES),
        loss_cell(losses[-1]),
    ]


def tables(results: dict[str, Result], steps: int) -> str:
    """Both tables, each below a paragraph that explains it."""
    other_targets = []
    for name, setting in SETTINGS.items():
        if setting.target != BASE.target:
            other_targets.append(f"{name}: {setting.target}")
    about_verdicts = (
        f"Steps until the test loss is {BASE.target} above its floor ({', '.join(other_targets)}), "
        f"from {START}: mean ± std of seeds. Fastest: of uniform, linupper, quadratic, extremes; "
        "the paper does not compare upper."
    )
    about_all = (
        f"Base: {BASE}, {G} samples per step. Effective step and gain: means until the target is "
        "reached."
    )
    parts = [
        about_verdicts,
        verdict_table(results, steps),
        about_all,
        full_table(results, steps),
    ]
    return "\n\n".join(parts)


# The figure


def figure(results: dict[str, Result], path: Path) -> None:
    """Test loss against steps. Above: one small lr for all strategies; below: each at its best."""
    plt = pyplot()
    plt.rcParams["text.parse_math"] = True  # the labels of a logarithmic axis are formulas
    fig, axes = plt.subplots(
        2,
        len(SHOWN),
        figsize=(10, 4.8),
        sharey="col",
        layout="constrained",
    )
    for (above, below), name in zip(axes.T, SHOWN, strict=True):
        losses, target = results[name].losses, SETTINGS[name].target
        draw_curves(above, losses[:, :, LR_KINDS.index("small, for all")], target)
        draw_curves(below, losses[:, :, LR_KINDS.index("own best")], target)
        title = name
        if name == "base":
            title = f"{name}: d = {BASE.d}, noise {BASE.noise}, r = {BASE.r}"
        above.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
    axes[0, 0].set_ylabel("one small lr for all", fontsize=9)
    axes[1, 0].set_ylabel("each strategy's best lr", fontsize=9)
    fig.supylabel("test loss above its floor (squared error / 2)", fontsize=9)
    fig.supxlabel("SGD step", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(STRATEGIES))
    fig.savefig(path)
    plt.close(fig)


def draw_curves(ax, losses: Tensor, target: float) -> None:
    """(steps + 1, S, R) test losses: each strategy's mean, and 10th to 90th percentile of seeds."""
    for i, strategy in enumerate(STRATEGIES):
        look = style(i)
        own = losses[:, i]  # (steps + 1, R)
        low, high = own.quantile(torch.tensor([0.1, 0.9]), dim=-1)
        ax.plot(own.mean(-1), label=strategy, lw=1.4, **look)
        ax.fill_between(range(len(own)), low, high, color=look["color"], alpha=0.15, lw=0)
    ax.axhline(target, color="0.4", lw=0.7)
    ax.set_yscale("log")
    ax.set_ylim(target / 15, 1.5 * START)
    # From the start to well after the slowest strategy has arrived.
    arrivals = steps_to(losses.mean(-1), target).tolist()
    ends = [1.8 * n for n in arrivals if n < len(losses)]
    ax.set_xlim(0, max([4, *ends]))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("results/linear_regression"),
        help="folder for table.md and curves.png (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=20, help="runs per point, each with its own data (default: 20)"
    )
    parser.add_argument("--steps", type=int, default=600, help="of every run (default: 600)")
    args = parser.parse_args()
    if args.seeds < 2 or args.steps < 1:
        raise UserError(
            f"--seeds {args.seeds} --steps {args.steps}: at least 2 seeds, for a spread, and 1 step"
        )
    try:
        args.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--to {args.to}: {error.strerror}; give a folder that can be made"
        ) from None
    # The tensors are small: on busy cores threads waited for each other, ten times as long.
    torch.set_num_threads(1)
    results = {}
    for name, setting in SETTINGS.items():
        lr = choose_lr(setting, args.seeds, args.steps)
        results[name] = train(setting, lr, args.seeds, args.steps, seed=0)
    text = tables(results, args.steps)
    table = args.to / "table.md"
    curves = args.to / "curves.png"
    table.write_text(text + "\n")
    figure(results, curves)
    print(text, table, curves, sep="\n")


if __name__ == "__main__":
    run(main)
