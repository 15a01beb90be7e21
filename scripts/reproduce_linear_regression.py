"""The toy regression of Sow et al. (ICLR 2025): linear regression by minibatch SGD with every strategy.

    python scripts/reproduce_linear_regression.py            # a minute on 2 busy CPU cores

Claim of the paper: linupper converges fastest, quadratic is also ahead of uniform. The weights come from
`reweight.sample_weights`, as in pretraining. Loss of a sample: (x theta - y)^2 / 2; a step:
theta -= lr * sum_i w_i grad l_i, on fresh samples. Within a seed all strategies start at 0 and see the same samples.

A strategy that prefers high losses makes longer steps in the same direction, so the answer hangs on lr. Every setting
is run with one small lr for all, with uniform's best lr for all, and with each strategy's own best: the one whose mean
test loss is first at the setting's target, on other seeds than those reported. Writes table.md and curves.png.

S strategies, L learning rates, R runs (seeds), G samples per step, d dimensions.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from configurator import Parser
from errors import UserError, run
from eval.plots import pyplot, style
from reweight import STRATEGIES, sample_weights

G = 32  # the published global batch at 124M
START = 0.5  # test loss at theta = 0 above that of the true parameters, in every run: half the variance of x theta_true
LOSSES = (0.05, 0.005, 0.0005)  # to be reached: 10 %, 1 % and 0.1 % of START
LR_KINDS = ("small, for all", "uniform's best, for all", "own best")
SMALL = 1 / 8  # of uniform's best


@dataclass(frozen=True)
class Setting:
    d: int = 50
    noise: float = 0.1     # standard deviation of the label noise; that of x theta_true is 1
    r: float = 0.4
    power: float = 0.0     # eigenvalue k of the features' covariance is proportional to k^-power
    corrupt: float = 0.0   # share of the training labels with noise of standard deviation 5 on top
    rare: float = 0.0      # share of samples that alone show the second half of the features; 0: all show all
    target: float = 0.005  # test loss above its floor, for choosing lr and for the verdict; one of LOSSES

    def scales(self) -> Tensor:
        """(d,) variances of the features where they are shown; their mean is 1."""
        scales = torch.arange(1, self.d + 1.0) ** -self.power
        return scales / scales.mean()

    def covariance(self) -> Tensor:
        """(d,) diagonal of E[x x^T]."""
        if not self.rare:
            return self.scales()
        common = torch.arange(self.d) < self.d // 2
        return 2 * self.scales() * torch.where(common, 1 - self.rare, self.rare)

    def draw(self, theta_true: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(R, d) -> (R, G, d) features and (R, G) labels of one step."""
        shape = (len(theta_true), G)
        x = torch.randn(*shape, self.d, generator=generator) * self.scales().sqrt()
        if self.rare:
            rare = torch.rand(*shape, 1, generator=generator) < self.rare
            x = x * math.sqrt(2) * (rare == (torch.arange(self.d) >= self.d // 2))
        noise = self.noise * torch.randn(shape, generator=generator)
        if self.corrupt:
            hit = torch.rand(shape, generator=generator) < self.corrupt
            noise = noise + 5 * hit * torch.randn(shape, generator=generator)
        return x, torch.einsum("rgd,rd->rg", x, theta_true) + noise


# Nothing that favours a strategy: isotropic features, more of them than samples in a batch as in a language model, a
# label noise that leaves the target in reach, r of the published runs.
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
    """(S, L, R, d) parameters, (R, G, d), (R, G) -> (S, L, R, d): sum_i w_i grad l_i, strategy s in row s."""
    error = torch.einsum("rgd,slrd->slrg", x, theta) - y
    weights = torch.stack([torch.vmap(torch.vmap(partial(sample_weights, strategy=strategy, r=r)))(losses)
                           for strategy, losses in zip(STRATEGIES, error**2 / 2, strict=True)])
    return torch.einsum("slrg,rgd->slrd", weights * error, x)


def train(setting: Setting, lr: Tensor, runs: int, steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(S, L) lr -> (steps + 1, S, L, R) test loss above its floor; (steps, S, L, R) effective step and gain.

    With g the weighted and t the test loss' gradient (exact expectations over x), the effective step is g t / t t:
    1 for uniform, but for the noise of the batch. The gain is what depends on no lr: the share of the test loss that a
    step of the best length along -g would remove.
    """
    generator, covariance = torch.Generator().manual_seed(seed), setting.covariance()
    theta_true = torch.randn(runs, setting.d, generator=generator)
    theta_true *= (2 * START / (theta_true**2 * covariance).sum(-1, keepdim=True)).sqrt()
    theta = torch.zeros(*lr.shape, runs, setting.d)
    losses, effective, gain = [], [], []
    for step in range(steps + 1):
        t = (theta - theta_true) * covariance
        losses.append(((theta - theta_true) * t).sum(-1) / 2)
        if step < steps:
            g = gradient(theta, *setting.draw(theta_true, generator), setting.r)
            effective.append((g * t).sum(-1) / (t**2).sum(-1))
            gain.append((g * t).sum(-1) ** 2 / (2 * losses[-1] * (g**2 * covariance).sum(-1)))
            theta = theta - lr[:, :, None, None] * g
    return torch.stack(losses), torch.stack(effective), torch.stack(gain)


def steps_to(losses: Tensor, target: float) -> Tensor:
    """(steps + 1, ...) -> (...): the first step at or below target, steps + 1 where there is none."""
    hit = losses <= target
    return torch.where(hit.any(0), hit.int().argmax(0), len(losses)).float()


def choose_lr(setting: Setting, runs: int, steps: int) -> Tensor:
    """(S, 3) learning rates, in the order of LR_KINDS."""
    covariance = setting.covariance()
    limit = 2 / (covariance.max() + covariance.sum() / G)  # about where uniform SGD diverges
    grid = limit * 2 ** (torch.arange(-20, 1) / 3)
    losses = train(setting, grid.expand(len(STRATEGIES), -1), runs, steps, seed=1)[0]
    losses = losses.nan_to_num(math.inf).mean(-1)  # over seeds: a single seed may pass the target by chance
    last = losses[-1].clamp(max=START)  # below 1, so it decides only between equal numbers of steps
    best = grid[(steps_to(losses, setting.target) + last).argmin(-1)]
    uniform = best[list(STRATEGIES).index("uniform")].expand_as(best)
    return torch.stack([SMALL * uniform, uniform, best], dim=1)


def ahead(a: Tensor, b: Tensor) -> str:
    """Whether a takes fewer steps than b, (R,) each, paired by seed: a tie is within two standard errors.

    A seed that does not arrive counts with all its steps and one more.
    """
    difference = a - b
    margin = 2 * difference.std() / math.sqrt(len(a))
    return "yes" if difference.mean() < -margin else "no" if difference.mean() > margin else "tie"


def steps_cell(counts: Tensor, steps: int) -> str:
    missed = int((counts > steps).sum())
    if missed:
        return "not reached" if missed == len(counts) else f"not reached by {missed} of {len(counts)}"
    return f"{counts.mean():.1f} ± {counts.std():.1f}"


def loss_cell(losses: Tensor) -> str:
    if not losses.mean() < START:
        return "diverged"
    return "< 1e-6" if losses.mean() < 1e-6 else f"{losses.mean():.1e} ± {losses.std():.0e}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def tables(results: dict[str, tuple[Tensor, ...]], steps: int) -> str:
    """The verdict per setting and kind of lr, then everything per strategy."""
    names, verdicts, full = list(STRATEGIES), [], []
    for name, (lr, losses, effective, gain) in results.items():
        for k, kind in enumerate(LR_KINDS):
            counts = dict(zip(names, steps_to(losses[:, :, k], SETTINGS[name].target), strict=True))
            against = {ahead(counts["linupper"], counts[other]) for other in ("uniform", "quadratic", "extremes")}
            verdicts.append([name, kind, *(steps_cell(counts[s], steps) for s in names),
                             next(v for v in ("no", "tie", "yes") if v in against),
                             ahead(counts["quadratic"], counts["uniform"])])
            for i, strategy in enumerate(names):
                until = torch.arange(steps)[:, None] < counts[strategy]  # (steps, R): before the target is reached
                means = (f"{x[:, i, k][until].mean():.2f}".replace("nan", "-") for x in (effective, gain))
                full.append([name, kind, strategy, f"{lr[i, k]:.3g}", *means,
                             *(steps_cell(steps_to(losses[:, i, k], target), steps) for target in LOSSES),
                             loss_cell(losses[-1, i, k])])
    targets = ", ".join(f"{name}: {s.target}" for name, s in SETTINGS.items() if s.target != BASE.target)
    return "\n\n".join([
        f"Steps until the test loss is {BASE.target} above its floor ({targets}), from {START}: mean ± std of seeds. "
        "Fastest: of uniform, linupper, quadratic, extremes; the paper does not compare upper.",
        markdown(["setting", "lr", *names, "linupper fastest", "quadratic ahead of uniform"], verdicts),
        f"Base: {BASE}, {G} samples per step. Effective step and gain: means until the target is reached.",
        markdown(["setting", "lr", "strategy", "value of lr", "effective step", "gain",
                  *(f"steps to {target}" for target in LOSSES), f"test loss at step {steps}"], full)])


def figure(results: dict[str, tuple[Tensor, ...]], path: Path) -> None:
    """Test loss against steps, mean and 10th to 90th percentile of seeds: one small lr for all, each its best lr."""
    plt = pyplot()
    fig, axes = plt.subplots(2, len(SHOWN), figsize=(10, 4.8), sharey="col", layout="constrained")
    for column, name in zip(axes.T, SHOWN, strict=True):
        losses, target = results[name][1], SETTINGS[name].target
        for ax, k in zip(column, (0, 2), strict=True):
            for i, strategy in enumerate(STRATEGIES):
                low, high = losses[:, i, k].quantile(torch.tensor([0.1, 0.9]), dim=-1)
                ax.plot(losses[:, i, k].mean(-1), label=strategy, lw=1.4, **style(i))
                ax.fill_between(range(len(losses)), low, high, color=style(i)["color"], alpha=0.15, lw=0)
            ax.axhline(target, color="0.4", lw=0.7)
            ax.set_yscale("log")
            ax.set_ylim(target / 15, 1.5 * START)
            arrived = [n for n in steps_to(losses[:, :, k].mean(-1), target).tolist() if n < len(losses)]
            ax.set_xlim(0, max([4, *(1.8 * n for n in arrived)]))  # from the start to well after the slowest
            ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
        column[0].set_title(f"{name}: d = {BASE.d}, noise {BASE.noise}, r = {BASE.r}" if name == "base" else name,
                            fontsize=9)
    axes[0, 0].set_ylabel("one small lr for all", fontsize=9)
    axes[1, 0].set_ylabel("each strategy's best lr", fontsize=9)
    fig.supylabel("test loss above its floor (squared error / 2)", fontsize=9)
    fig.supxlabel("SGD step", fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STRATEGIES))
    fig.savefig(path)
    plt.close(fig)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--to", type=Path, default=Path("results/linear_regression"),
                        help="folder for table.md and curves.png (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="runs per point, each with its own data (default: 20)")
    parser.add_argument("--steps", type=int, default=600, help="SGD steps of every run (default: 600)")
    args = parser.parse_args()
    if args.seeds < 2 or args.steps < 1:
        raise UserError(f"--seeds {args.seeds} --steps {args.steps}: at least 2 seeds, for a spread, and 1 step")
    try:
        args.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {args.to}: {error.strerror}; give a folder that can be made") from None
    torch.set_num_threads(1)  # tensors are small: on busy cores threads waited for each other, ten times as long
    results = {}
    for name, setting in SETTINGS.items():
        lr = choose_lr(setting, args.seeds, args.steps)
        results[name] = (lr, *train(setting, lr, args.seeds, args.steps, seed=0))
    text = tables(results, args.steps)
    (args.to / "table.md").write_text(text + "\n")
    figure(results, args.to / "curves.png")
    print(text, args.to / "table.md", args.to / "curves.png", sep="\n")


if __name__ == "__main__":
    run(main)
