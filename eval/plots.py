"""Figures of runs: loss curves, perplexity per domain, what weight each strategy gives to a loss, and to which data.

    python eval/plots.py runs/a runs/b --to figures       # weights.png alone needs no run

Reads RUN/config.json, RUN/metrics.jsonl, RUN/eval/perplexity.json; prints the files that it wrote.
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from configurator import Parser
from errors import UserError, run
from eval.runs import read_runs, run_names
from manifest import in_order
from metrics import read_lines
from reweight import STRATEGIES, normalize_losses, sample_weights

# Okabe and Ito's colours, safe for colour-blind readers; lines, markers and hatches tell runs apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS, HATCHES = "os^Dv<>", ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
TEMPERATURES = (0.1, 0.4, 1.0)


def pyplot():
    """matplotlib without a screen, in our style; imported here so that importing this file draws nothing."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "savefig.bbox": "tight"})
    return plt


def style(i: int) -> dict:
    return {"color": COLOURS[i % 7], "linestyle": LINES[(i + i // 7) % 7]}  # the first 49 differ


def loss_curves(names: list[str], metrics: list[list[dict]], path: Path) -> Path:
    """Validation loss against steps: the mean, then each domain."""
    plt = pyplot()
    evals = [[r for r in records if r["kind"] == "eval"] for records in metrics]
    held = in_order({d for records in evals for r in records for d in r["domains"]})
    rows = len(held) // 4 + 1  # one panel more than domains
    fig, axes = plt.subplots(rows, 4, figsize=(10, 2.1 * rows + 0.4), sharex=True, layout="constrained")
    for ax, domain in zip(axes.flat, [None, *held], strict=False):
        shown = []  # losses after the first tenth of the run
        for i, (name, records) in enumerate(zip(names, evals, strict=True)):
            points = [(r["step"], r["mean_loss"] if domain is None else r["domains"][domain]["loss"])
                      for r in records if domain is None or domain in r["domains"]]
            ax.plot([step for step, _ in points], [loss for _, loss in points], label=name, marker=MARKERS[i % 7],
                    markersize=2.5, lw=1.2, **style(i))
            shown += [loss for step, loss in points if step > 0.1 * records[-1]["step"]]
        ax.set_title(domain or "mean of the domains", fontsize=9, fontweight=None if domain else "bold")
        if shown:  # the untrained model's loss would squeeze all that matters
            margin = 0.1 * (max(shown) - min(shown)) + 1e-3
            ax.set_ylim(min(shown) - margin, max(shown) + margin)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))  # few enough for labels of five digits
    for ax in axes.flat[len(held) + 1:]:
        ax.set_visible(False)
    fig.supxlabel("optimizer step", fontsize=9)
    fig.supylabel("validation loss (nats per token)", fontsize=9)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(names)))
    fig.savefig(path)
    plt.close(fig)
    return path


def domain_perplexity(names: list[str], results: list[dict | None], path: Path) -> Path:
    """Perplexity per domain, a bar per run; a run without a value leaves a gap, not a bar of height 0."""
    plt = pyplot()
    held = in_order({d for r in results if r for d in r["domains"]})
    fig, ax = plt.subplots(figsize=(max(8, 1.1 * len(held)), 3.2), layout="constrained")
    width = 0.8 / len(names)
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        at = [x - 0.4 + (i + 0.5) * width for x in range(len(held))]
        ppl = [result["domains"][d]["ppl"] if result and d in result["domains"] else math.nan for d in held]
        bars = ax.bar(at, ppl, width, label=name if result else f"{name} (missing)", color=COLOURS[i % 7], alpha=0.85,
                      hatch=HATCHES[i % 7], edgecolor="white")
        if len(names) <= 3:
            ax.bar_label(bars, ["missing" if math.isnan(p) else f"{p:.2f}" for p in ppl], fontsize=6.5, padding=1)
    ax.set_xticks(range(len(held)), held)
    ax.set_ylabel("validation perplexity per token")
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside upper center", ncols=min(4, len(names)))
    fig.savefig(path)
    plt.close(fig)
    return path


def smooth(values: list[float]) -> np.ndarray:
    """Running mean over a twentieth of the values; shorter at both ends, so that every value stands over its step."""
    half = max(1, len(values) // 40)
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    at = np.arange(len(values))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[end] - total[first]) / (end - first)


def shares_over_time(names: list[str], metrics: list[list[dict]], label: str, path: Path) -> Path:
    """Share of the weight that each domain (or kind) gets, over its share of the samples; a panel per run."""
    plt = pyplot()
    lines = [[r for r in records if r["kind"] == "train" and f"samples_by_{label}" in r] for records in metrics]
    there = {name for records in lines for r in records for name in r[f"samples_by_{label}"]}
    kinds = [name for name in ("ordinary", "redundant", "noise") if name in there]
    groups = [*in_order(there - set(kinds)), *kinds]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.6 * columns + 0.4, 2.2 * rows + 0.6), sharex=True, sharey=True,
                             layout="constrained", squeeze=False)
    for ax, name, records in zip(axes.flat, names, lines, strict=False):
        for i, group in enumerate(groups):
            weight, samples = (smooth([r[f"{key}_by_{label}"].get(group, 0.0) for r in records])
                               for key in ("weight", "samples"))
            ratio = np.divide(weight, samples, out=np.full_like(weight, np.nan), where=samples > 0)
            ax.plot([r["step"] for r in records], ratio, label=group, lw=1.2, **style(i))
        ax.axhline(1, color="0.6", lw=0.8)
        ax.set_title(name, fontsize=9)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
    for ax in axes.flat[len(names):]:
        ax.set_visible(False)
    fig.supxlabel("optimizer step", fontsize=9)
    fig.supylabel("share of weight / share of samples", fontsize=9)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center",
               ncols=min(len(groups), 4 if columns < 3 else 7))
    fig.savefig(path)
    plt.close(fig)
    return path


def effective_sample_size(names: list[str], metrics: list[list[dict]], path: Path) -> Path:
    """1 / sum of squared weights as a share of the global batch, over the steps; a line per run."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
    for i, (name, records) in enumerate(zip(names, metrics, strict=True)):
        lines = [r for r in records if r["kind"] == "train"]
        ax.plot([r["step"] for r in lines], smooth([r["ess"] for r in lines]), label=name, lw=1.3, **style(i))
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("effective sample size / G")
    fig.legend(loc="outside upper center", ncols=min(4, len(names)))
    fig.savefig(path)
    plt.close(fig)
    return path


def weights(path: Path) -> Path:
    """Weight against loss of each strategy for 101 evenly spread losses, by temperature."""
    plt = pyplot()
    losses = torch.linspace(0, 1, 101)
    h = normalize_losses(losses)
    fig, axes = plt.subplots(1, len(STRATEGIES), figsize=(2 * len(STRATEGIES), 2.5), sharex=True, layout="constrained")
    for ax, (name, f) in zip(axes, STRATEGIES.items(), strict=True):
        for i, r in enumerate(TEMPERATURES):
            ax.plot(h, sample_weights(losses, name, r) * len(losses), label=f"weight, r = {r}", lw=1.4, **style(i))
        ax.plot(h, f(h, 1.0), label="f(h)", color="0.6", lw=1)
        ax.set_title(name, fontsize=9)
        ax.set_ylim(bottom=-0.1)
    axes[0].set_ylabel("weight x N, and f(h)")
    fig.supxlabel("normalised loss h (-1: lowest of the batch, 1: highest)", fontsize=9)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    fig.savefig(path)
    plt.close(fig)
    return path


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--to", required=True, help="folder for the PNG files")
    args = parser.parse_args()
    configs, results = read_runs(args.runs)
    metrics = [read_lines(Path(folder) / "metrics.jsonl") for folder in args.runs]
    empty = [folder for folder, records in zip(args.runs, metrics, strict=True)
             if not any(r["kind"] == "eval" for r in records)]
    if empty:
        raise UserError(f"{empty[0]}: no evaluation in metrics.jsonl; train it first")
    to = Path(args.to)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; give a folder that can be made") from None
    print(weights(to / "weights.png"))
    if args.runs:
        names = run_names(configs)
        print(loss_curves(names, metrics, to / "loss_curves.png"))
        print(shares_over_time(names, metrics, "domain", to / "weight_by_domain.png"))
        if any("weight_by_kind" in r for records in metrics for r in records):
            print(shares_over_time(names, metrics, "kind", to / "weight_by_kind.png"))
        print(effective_sample_size(names, metrics, to / "effective_sample_size.png"))
        if any(results):  # with no run evaluated there is nothing to draw; stderr has said so
            print(domain_perplexity(names, results, to / "domain_perplexity.png"))


if __name__ == "__main__":
    run(main)
