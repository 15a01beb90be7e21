"""What the runs of scripts/study_when.py show: numbers per row and seed, verdicts, table, figures.

A gap is a validation loss minus that of the uniform run of the same regime and seed, in nats per
token, mean of the domains.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from eval.plots import COLOURS, HATCHES, MARKERS, pyplot
from files import write_text
from runtime.metrics import read_lines
from scripts.when.plans import Setting

SURE = 0.05  # largest p of a verdict
REPEATED = "repeated data"  # the axis of figure C
LABELLED = "labelled corpus"  # the axis of figure D


class Branch(NamedTuple):
    """A strategy or a control against the uniform run of the same seed."""

    gap: float  # at the step that the row asks for
    uniform: float  # the uniform run's loss there
    gaps: dict[int, float]  # step -> gap
    of_domains: dict[str, float]  # domain -> gap
    calibrated: dict[int, float]  # step -> gap of the losses at a fitted temperature
    ess: float  # mean effective sample size, as a share of the batch
    shares: dict[str, float]  # kind of text -> share of weight over share of samples


class OneSeed(NamedTuple):
    """A row of the table for one seed."""

    strategy: Branch
    controls: dict[str, Branch]
    predicted: float | None  # direction according to the probe

    def cost(self) -> float | None:
        """What averaging over fewer samples costs: the control's gap."""
        shuffled = self.controls.get("shuffled")
        return shuffled.gap if shuffled else None

    def direction(self) -> float | None:
        """How much lower the strategy's loss is than its control's."""
        cost = self.cost()
        return None if cost is None else cost - self.strategy.gap


Rows = list[tuple[Setting, dict[int, OneSeed]]]  # the numbers of each seed


# Reading


def read_branch(folder: Path, uniform: Path, start: int, at: int) -> Branch:
    """A branch that began at step `start`, by its loss at step `at`."""
    own, baseline = evaluations(folder), evaluations(uniform)
    gaps = {}
    for step, record in own.items():
        if step in baseline:
            gaps[step] = record["mean_loss"] - baseline[step]["mean_loss"]
    of_domains = {}
    for domain, values in own[at]["domains"].items():
        of_domains[domain] = values["loss"] - baseline[at]["domains"][domain]["loss"]
    lines = [r for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    lines = [line for line in lines if start < line["step"] <= at]
    return Branch(
        gaps[at],
        baseline[at]["mean_loss"],
        gaps,
        of_domains,
        {},
        float(np.mean([line["ess"] for line in lines])),
        shares_of(lines),
    )


def evaluations(folder: Path) -> dict[int, dict]:
    """Step -> the evaluation there."""
    records = read_lines(folder / "metrics.jsonl")
    return {record["step"]: record for record in records if record["kind"] == "eval"}


def shares_of(lines: list[dict]) -> dict[str, float]:
    """Kind of text -> its share of the weight over its share of the samples, of all log lines."""
    weight, samples = {}, {}
    for line in lines:
        for kind, share in line.get("samples_by_kind", {}).items():
            samples[kind] = samples.get(kind, 0) + share
            weight[kind] = weight.get(kind, 0) + line["weight_by_kind"][kind]
    return {kind: weight[kind] / samples[kind] for kind in samples if samples[kind]}


# Verdicts


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    text = f"{np.mean(values):+.4f}"
    return f"{text} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else text


def verdict(gaps: list[float]) -> str:
    """Of a two-sided t test over the seeds that the gap is not 0."""
    if len(gaps) < 2:
        return "one seed"
    if np.ptp(gaps) == 0:
        return "level" if gaps[0] == 0 else "cannot tell"
    if ttest_1samp(gaps, 0).pvalue >= SURE:
        return "cannot tell"
    return "ahead" if np.mean(gaps) < 0 else "behind"


def p_value(gaps: list[float]) -> str:
    if len(gaps) < 2 or np.ptp(gaps) == 0:
        return ""
    return f"{ttest_1samp(gaps, 0).pvalue:.3f}"


# Table

COLUMNS = {  # title -> alignment
    "axis": "---",
    "setting": "---",
    "seeds": "--:",
    "ess": "--:",
    "uniform": "--:",
    "gap": "--:",
    "cost (shuffled)": "--:",
    "gain in direction": "--:",
    "predicted": "--:",
    "gap, calibrated": "--:",
    "domains ahead": "--:",
    "p": "--:",
    "verdict": "---",
}


def table(rows: Rows) -> str:
    """Markdown, a row per setting that has a seed."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(COLUMNS.values())}|"]
    for setting, seeds in rows:
        if seeds:
            lines.append(f"| {' | '.join(cells(setting, list(seeds.values())))} |")
    return "\n".join(lines)


def cells(setting: Setting, seeds: list[OneSeed]) -> list[str]:
    gaps = [seed.strategy.gap for seed in seeds]
    domains = seeds[0].strategy.of_domains
    ahead = [d for d in domains if all(seed.strategy.of_domains[d] < 0 for seed in seeds)]
    return [
        setting.axis,
        setting.label,
        str(len(seeds)),
        f"{np.mean([seed.strategy.ess for seed in seeds]):.2f}",
        f"{np.mean([seed.strategy.uniform for seed in seeds]):.4f}",
        spread(gaps),
        spread(known([seed.cost() for seed in seeds])),
        spread(known([seed.direction() for seed in seeds])),
        spread(known([seed.predicted for seed in seeds])),
        spread(known([calibrated_gap(seed.strategy) for seed in seeds])),
        f"{len(ahead)} of {len(domains)}",
        p_value(gaps),
        verdict(gaps),
    ]


def known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def calibrated_gap(branch: Branch) -> float | None:
    """At the last step."""
    return branch.calibrated[max(branch.calibrated)] if branch.calibrated else None


# Figures


def figure_predictions(rows: Rows) -> Figure | None:
    """A: the probe's forecast of the gain in direction against the measured one, a point a row."""
    by_axis = {}
    for setting, seeds in rows:
        pairs = [(s.predicted, s.direction()) for s in seeds.values()]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            by_axis.setdefault(setting.axis, []).append(np.array(pairs))
    if not by_axis:
        return None
    pyplot()
    figure = Figure((5.6, 4.2), layout="constrained")
    ax = figure.subplots()
    for i, (axis, points) in enumerate(by_axis.items()):
        means = np.array([pairs.mean(0) for pairs in points])
        errors = [np.ptp(pairs[:, 1]) / 2 for pairs in points]
        ax.errorbar(
            *means.T,
            yerr=errors,
            label=axis,
            color=COLOURS[i % 7],
            marker=MARKERS[i % 7],
            markerfacecolor="none" if i >= 7 else None,
            linestyle="",
            markersize=5,
            linewidth=0.8,
        )
    low, high = ax.get_xlim()
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    ax.axhline(0, color="0.3", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.3", linewidth=0.8, zorder=0)
    ax.set_xlim(low, high)
    ax.set_xlabel("gain in direction that the probe predicts at the branch (nats per token)")
    ax.set_ylabel("measured: control minus strategy")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def figure_parts(rows: Rows) -> Figure | None:
    """B: gaps of the rows with both controls over the steps, and the parts that make them up."""
    panels = {}
    for setting, seeds in rows:
        if len(setting.controls) == 2 and seeds and not setting.read_at:
            panels[setting.label] = list(seeds.values())
    if not panels:
        return None
    pyplot()
    figure = Figure((3.4 * len(panels) + 0.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (label, seeds) in zip(axes, panels.items(), strict=True):
        draw_parts(ax, seeds)
        ax.set_title(label, fontsize=9)
    axes[0].set_ylabel("nats per token")
    figure.supxlabel("training step", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def draw_parts(ax, seeds: list[OneSeed]) -> None:
    """Means over the seeds; the gap with the range of the seeds."""
    steps = sorted(seeds[0].strategy.gaps)
    gap = over_seeds([seed.strategy.gaps for seed in seeds], steps)
    shuffled = over_seeds([seed.controls["shuffled"].gaps for seed in seeds], steps)
    within = over_seeds([seed.controls["within"].gaps for seed in seeds], steps)
    lines = {
        "gap to uniform": gap,
        "cost of fewer samples": shuffled,
        "direction between domains": within - shuffled,
        "direction within domains": gap - within,
    }
    for i, (name, values) in enumerate(lines.items()):
        mean = values.mean(0)
        ax.plot(steps, mean, label=name, color=COLOURS[i], marker=MARKERS[i], markersize=3)
        ax.fill_between(steps, values.min(0), values.max(0), color=COLOURS[i], alpha=0.15, lw=0)
    steps = sorted(seeds[0].strategy.calibrated)
    if steps:
        values = over_seeds([seed.strategy.calibrated for seed in seeds], steps)
        ax.plot(
            steps,
            values.mean(0),
            label="gap at fitted temperatures",
            color=COLOURS[6],
            marker="x",
            linestyle=":",
        )
    ax.axhline(0, color="0.3", linewidth=0.8, zorder=0)


def over_seeds(series: list[dict[int, float]], steps: list[int]) -> np.ndarray:
    """(S, K): a row per seed."""
    return np.array([[values[step] for step in steps] for values in series])


def figure_epochs(rows: Rows) -> Figure | None:
    """C: gap, cost and gain in direction against the epochs of the data."""
    chosen, epochs = [], []
    for setting, seeds in rows:
        if setting.axis == REPEATED and seeds:
            chosen.append(list(seeds.values()))
            epochs.append(float(setting.regime.split()[0]))
    if not chosen:
        return None
    pyplot()
    figure = Figure((4.6, 3.4), layout="constrained")
    ax = figure.subplots()
    series = {
        "gap to uniform": [[s.strategy.gap for s in seeds] for seeds in chosen],
        "cost of fewer samples": [[s.cost() for s in seeds] for seeds in chosen],
        "gap at fitted temperatures": [
            [calibrated_gap(s.strategy) for s in seeds] for seeds in chosen
        ],
    }
    for i, (name, values) in enumerate(series.items()):
        means = [np.mean(v) for v in values]
        low, high = [min(v) for v in values], [max(v) for v in values]
        ax.plot(epochs, means, label=name, color=COLOURS[i], marker=MARKERS[i], markersize=4)
        ax.fill_between(epochs, low, high, color=COLOURS[i], alpha=0.15, lw=0)
    ax.axhline(0, color="0.3", linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    ax.set_xticks(epochs, [f"{x:g}" for x in epochs])
    ax.minorticks_off()
    ax.set_xlabel("epochs over the training data")
    ax.set_ylabel("linupper (nats per token)")
    ax.legend(fontsize=8)
    return figure


def figure_kinds(rows: Rows) -> Figure | None:
    """D: share of weight over share of samples of each kind of text, on the labelled corpus."""
    chosen = {}
    for setting, seeds in rows:
        if setting.axis == LABELLED and seeds:
            chosen[setting.label.split(": ")[1]] = [s.strategy.shares for s in seeds.values()]
    if not chosen:
        return None
    pyplot()
    figure = Figure((4.8, 3.2), layout="constrained")
    ax = figure.subplots()
    kinds = list(next(iter(chosen.values()))[0])
    width = 0.8 / len(chosen)
    for i, (name, shares) in enumerate(chosen.items()):
        means = [np.mean([share[kind] for share in shares]) for kind in kinds]
        x = np.arange(len(kinds)) + (i - (len(chosen) - 1) / 2) * width
        bars = ax.bar(
            x, means, width, label=name, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white"
        )
        ax.bar_label(bars, [f"{mean:.2f}" for mean in means], fontsize=7, padding=1)
    ax.axhline(1, color="0.3", linewidth=0.8)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    ax.set_ylabel("share of weight / share of samples")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


# Files

FIGURES = {
    "predicted_and_measured": figure_predictions,
    "parts_of_the_gap": figure_parts,
    "repeated_data": figure_epochs,
    "weight_by_kind": figure_kinds,
}


def write(rows: Rows, to: Path) -> list[Path]:
    """table.md, results.json and the figures that have data, into a folder -> the files."""
    files = [to / "table.md", to / "results.json"]
    write_text(files[0], table(rows) + "\n")
    write_text(files[1], json.dumps([as_json(*row) for row in rows], indent=1))
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure:
            files.append(to / f"{name}.png")
            figure.savefig(files[-1])
    return files


def as_json(setting: Setting, seeds: dict[int, OneSeed]) -> dict:
    """A row with all its numbers."""
    numbers = {}
    for seed, found in seeds.items():
        numbers[seed] = {
            "strategy": found.strategy._asdict(),
            "controls": {name: branch._asdict() for name, branch in found.controls.items()},
            "predicted": found.predicted,
        }
    return {**setting._asdict(), "seeds": numbers}
