"""Charts of runs, as PNG files and for the page of eval/report.py.

    python eval/plots.py runs/a runs/b --to figures       # weights.png alone needs no run

Reads RUN/config.json, RUN/metrics.jsonl and RUN/eval/perplexity.json, and prints the name of each
file that it wrote.

A Chart is data: the lines of one panel, a line per run. loss_charts, training_charts and
share_charts make charts from runs. `panels` draws several in one figure, for a PNG file, and
`panel` draws a single one, for the page. All functions that draw return a matplotlib figure.
"""

import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from cli import Parser, UserError
from cli import run as run_command
from corpus.manifest import in_order
from eval import perplexity
from eval.runs import Column, RunFolder, baselines, columns_of, controls, read_runs
from reweight import STRATEGIES, normalize_losses, sample_weights
from runtime.telemetry import BOUND

# Okabe and Ito's colors, safe for color-blind readers. In black and white, lines, markers and
# hatches tell runs apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "os^Dv<>"
TITLE_WIDTH = 32  # characters in a line of a title, so that it stays above its own panel
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
# A panel of the page: size and ends of the axes (left, bottom, right, top) in points, colors of
# text and grid.
PANEL = (344, 212)
PANEL_AXES = (46, 42, 326, 202)
MUTED = "#5c6670"
RULE = "#d8dde2"

TEMPERATURES = (0.1, 0.4, 1.0)
POINTS = 120  # of a line, at most: ten runs on a page stay below 1 MB
BINS = 50  # of a histogram

Columns = list[Column]


class Line(NamedTuple):
    """A run in a chart."""

    setting: int  # index of the run's column in the tables; runs of a column look alike
    x: np.ndarray
    y: np.ndarray


class Chart(NamedTuple):
    """The lines of a panel: at most POINTS points each, all of them finite; no empty line."""

    title: str
    lines: list[Line]
    low: float | None = None  # ends of the y axis; None: a little beyond the values
    high: float | None = None
    x: str = "step"  # what the x axis shows


# Charts of runs


def loss_charts(columns: Columns) -> list[Chart]:
    """Validation loss in nats per token: the mean of the domains, then each domain.

    From the end of the learning rate's warm-up on: before it, all curves fall alike from the same
    height, which would take the room of all that differs.
    """
    mean = after_warmup(columns, over_steps(columns, "eval", "mean_loss"))
    charts = [make_chart("mean of the domains", mean)]
    for domain in groups_in(columns, "eval", "domains"):
        lines = over_steps(columns, "eval", "domains", domain, "loss")
        charts.append(make_chart(domain, after_warmup(columns, lines)))
    return charts


def gap_charts(columns: Columns) -> list[Chart]:
    """Mean validation loss minus that of the uniform run, and the gain over the control.

    The control's own line in the first chart is the cost of averaging over fewer samples. [] where
    no run has a uniform run or a control to compare with.
    """
    settings = {run: run.settings for _, run in runs_in(columns)}
    charts = []
    for title, pairs, sign in (
        ("loss minus uniform", baselines(settings), 1),
        ("gain in direction: shuffled control minus strategy", controls(settings), -1),
    ):
        lines = []
        for setting, run in runs_in(columns):
            if run in pairs:
                x, difference = loss_difference(run, pairs[run])
                lines.append(Line(setting, x, sign * difference))
        chart = make_chart(title, lines)
        if chart.lines:
            charts.append(chart)
    return charts


def loss_difference(run: RunFolder, other: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """Steps after warm-up at which both were evaluated, and how much higher the run's loss is."""
    of_other = {record["step"]: record["mean_loss"] for record in other.records("eval")}
    x, y = [], []
    for record in run.records("eval"):
        step = record["step"]
        if step in of_other and step >= max(1, run.config.get("warmup_steps", 0)):
            x.append(step)
            y.append(record["mean_loss"] - of_other[step])
    return np.array(x, float), np.array(y, float)


def after_warmup(columns: Columns, lines: list[Line]) -> list[Line]:
    """The lines, a run each, from the end of its warm-up on, if two points are left."""
    later_lines = []
    for (_, run), line in zip(runs_in(columns), lines, strict=True):
        is_later = line.x >= max(1, run.config.get("warmup_steps", 0))
        later = Line(line.setting, line.x[is_later], line.y[is_later])
        later_lines.append(later if len(later.x) > 1 else line)
    return later_lines


def training_charts(columns: Columns) -> list[Chart]:
    """Loss, effective sample size, largest weight, and histograms at the last evaluation."""
    loss = over_steps(columns, "train", "loss")
    largest = over_steps(columns, "train", "max_weight")
    of_losses = histogram_lines(columns, "loss")
    of_weights = histogram_lines(columns, "weight")
    charts = [
        make_chart("training loss, unweighted (nats)", loss),
        sample_size_chart(columns),
        make_chart("largest weight (1: the mean)", largest, low=0),
        bound_chart(columns),
        make_chart("% of samples by loss, last evaluation", of_losses, low=0, x="loss"),
        make_chart("% of samples by weight, last evaluation", of_weights, low=0, x="weight"),
    ]
    return [chart for chart in charts if chart.lines]


def sample_size_chart(columns: Columns) -> Chart:
    """1 / sum of squared weights, as a share of the global batch."""
    lines = over_steps(columns, "train", "ess")
    return make_chart("effective sample size (share of the batch)", lines, low=0, high=1.05)


def bound_chart(columns: Columns) -> Chart:
    """How often a run breaks the assumption of the paper's analysis."""
    lines = over_steps(columns, "train", "above_bound")
    title = f"share of steps with a weight above {BOUND:g} / G"
    return make_chart(title, lines, low=0, high=1.05)


def share_charts(columns: Columns, label: str) -> list[Chart]:
    """Share of the weight over share of the samples: a chart per domain or kind of document.

    label: "domain" or "kind". All charts have the same y axis; [] where no run logged the shares.
    """
    charts = []
    for group in groups_in(columns, "train", f"samples_by_{label}"):
        charts.append(make_chart(group, share_lines(columns, label, group)))
    lines = [line for chart in charts for line in chart.lines]
    if not lines:
        return []
    low = min(line.y.min() for line in lines) - 0.05
    high = max(line.y.max() for line in lines) + 0.05
    return [chart._replace(low=low, high=high) for chart in charts]


def make_chart(title: str, lines: list[Line], **options) -> Chart:
    """A Chart from lines of any length; options: its fields low, high and x."""
    drawn = []
    for line in lines:
        finite = np.flatnonzero(np.isfinite(line.y))
        if len(finite) == 0:
            continue
        every = math.ceil(len(finite) / POINTS)
        kept = np.append(finite[:-1:every], finite[-1])
        drawn.append(Line(line.setting, line.x[kept], line.y[kept]))
    return Chart(title, drawn, **options)


def runs_in(columns: Columns) -> Iterator[tuple[int, RunFolder]]:
    """Each run with the index of its column."""
    for setting, column in enumerate(columns):
        for run in column.runs:
            yield setting, run


def groups_in(columns: Columns, kind: str, key: str) -> tuple[str, ...]:
    """The names of the domains or kinds of document that records have under `key`."""
    groups = set()
    for _, run in runs_in(columns):
        for record in run.records(kind):
            groups.update(record.get(key, ()))
    return in_order(groups)


def over_steps(columns: Columns, kind: str, *keys: str, default: float | None = None) -> list[Line]:
    """A line per run: the value that its records of this kind have under `keys`, one in another.

    default: where only the last key is absent. A record without a value is left out. Values of
    training become running means.
    """
    lines = []
    for setting, run in runs_in(columns):
        x, y = [], []
        for record in run.records(kind):
            value = look_up(record, keys, default)
            if value is not None:
                x.append(record["step"])
                y.append(value)
        if kind == "train":
            y = smooth(y)
        lines.append(Line(setting, np.array(x, float), np.array(y, float)))
    return lines


def look_up(record: dict, keys: tuple[str, ...], default: float | None) -> float | None:
    *outer_keys, last_key = keys
    for key in outer_keys:
        record = record.get(key)
        if record is None:
            return None
    return record.get(last_key, default)


def share_lines(columns: Columns, label: str, group: str) -> list[Line]:
    """Share of the weight over share of the samples of one domain or kind."""
    # A record has no entry for a group of which no sample was drawn.
    weights = over_steps(columns, "train", f"weight_by_{label}", group, default=0.0)
    samples = over_steps(columns, "train", f"samples_by_{label}", group, default=0.0)
    lines = []
    for weight, sample in zip(weights, samples, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = weight.y / sample.y
        lines.append(Line(weight.setting, weight.x, ratio))
    return lines


def histogram_lines(columns: Columns, of: str) -> list[Line]:
    """Percent of the samples in bins that the runs share, at the last evaluation.

    of: "loss" or "weight". A run whose samples are all alike gets no line.
    """
    histograms = []
    for setting, run in runs_in(columns):
        records = run.records("histogram")
        if not records:
            continue
        histogram = records[-1][of]
        if np.count_nonzero(histogram["counts"]) > 1:
            histograms.append((setting, histogram))
    if not histograms:
        return []
    low = min(histogram["low"] for _, histogram in histograms)
    high = max(histogram["high"] for _, histogram in histograms)
    edges = np.linspace(low, high, BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    lines = []
    for setting, histogram in histograms:
        percent = percent_in_bins(histogram, edges)
        lines.append(Line(setting, middles, percent))
    return lines


def percent_in_bins(histogram: dict, edges: np.ndarray) -> np.ndarray:
    """(BINS,) percent of a histogram's samples, as if each of its own bins were filled evenly."""
    total = np.cumsum([0, *histogram["counts"]])
    percent_below = 100 * total / total[-1]
    own_edges = np.linspace(histogram["low"], histogram["high"], len(total))
    return np.diff(np.interp(edges, own_edges, percent_below))


def smooth(values: Sequence[float]) -> np.ndarray:
    """Running mean over a twentieth of the values.

    The window is shorter at both ends, so that every mean is centered on its value.
    """
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


# Drawing


def pyplot():
    """matplotlib.pyplot for a machine without a screen; sets our style, also for Figure itself.

    The import is slow, so it waits for the first figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 150,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "savefig.bbox": "tight",
            "text.parse_math": False,
        }
    )
    return plt


def style(i: int) -> dict:
    """Color and dashes of the line of setting i; the first 49 differ."""
    return {"color": COLOURS[i % 7], "linestyle": LINES[(i + i // 7) % 7]}


def panels(charts: list[Chart], names: list[str], y_label: str) -> Figure:
    """Charts side by side in one figure, below a legend with the names of the settings."""
    pyplot()
    across = min(4, len(charts))
    rows = math.ceil(len(charts) / across)
    width = max(2.5 * across, 5)
    height = 2.2 * rows + 0.4
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).flatten()
    line_of = {}  # an example for each setting
    for ax, chart in zip(axes, charts, strict=False):
        draw(ax, chart, MARKERS)
        settings = [line.setting for line in chart.lines]
        line_of.update(zip(settings, ax.lines, strict=True))
        if len(charts) > 1:
            ax.set_title(textwrap.fill(chart.title, TITLE_WIDTH), fontsize=9)
    for ax in axes[len(charts) :]:
        ax.set_visible(False)

    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    settings = sorted(line_of)
    figure.legend(
        [line_of[i] for i in settings],
        [names[i] for i in settings],
        loc="outside upper center",
        ncols=min(4, len(names)),
    )
    return figure


def panel(chart: Chart) -> Figure:
    """A chart by itself, small enough for a phone and without its title; it needs a line."""
    pyplot()
    width, height = PANEL
    left, bottom, right, top = PANEL_AXES
    figure = Figure((width / 72, height / 72), frameon=False)
    ax = figure.add_axes(
        (
            left / width,
            bottom / height,
            (right - left) / width,
            (top - bottom) / height,
        ),
        frameon=False,
    )
    draw(ax, chart)
    first = min(line.x[0] for line in chart.lines)
    last = max(line.x[-1] for line in chart.lines)
    if first == last:
        last = first + 1
    ax.set_xlim(first, last)
    ax.grid(axis="x", visible=False)
    ax.grid(axis="y", color=RULE, alpha=1, linewidth=1)
    ax.tick_params(length=0, labelsize=11, labelcolor=MUTED)
    ax.tick_params("x", pad=9)
    ax.tick_params("y", pad=6)
    ax.set_xlabel(chart.x, fontsize=11, color=MUTED, labelpad=4)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    return figure


def draw(ax: Axes, chart: Chart, markers: str = "") -> None:
    """The lines of a chart; those of few points with markers.

    Line i has the group id "line-i", by which a page finds it.
    """
    for i, line in enumerate(chart.lines):
        x, y = line.x, line.y
        if len(x) == 1:  # SVG draws a dot where a line has two equal points
            x, y = x.repeat(2), y.repeat(2)
        ax.plot(
            x,
            y,
            marker=markers[line.setting % 7] if markers and len(x) < 30 else "",
            markersize=2.5,
            linewidth=1.2,
            gid=f"line-{i}",
            **style(line.setting),
        )
    if chart.lines:
        ax.set_ylim(y_limits(chart))
    # Few enough ticks for labels of five digits.
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=chart.x == "step"))


def y_limits(chart: Chart) -> tuple[float, float]:
    """The ends of the y axis.

    The first tenth of a run does not count: the untrained model's loss would squeeze all the rest.
    """
    values = []
    for line in chart.lines:
        y = line.y
        if chart.x == "step":
            y = y[line.x >= 0.1 * line.x[-1]]
        values.append(y)
    values = np.concatenate(values)
    largest = np.abs(values).max()
    margin = 0.08 * np.ptp(values) + 1e-3 * largest + 1e-9
    low, high = chart.low, chart.high
    if low is None:
        low = values.min() - margin
    if high is None:
        high = values.max() + margin
    return low, high


def domain_perplexity(columns: Columns, results: dict[RunFolder, dict]) -> Figure:
    """Validation perplexity per domain, a bar per run; a run without a value leaves a gap."""
    pyplot()
    domains = set()
    for result in results.values():
        domains.update(result["domains"])
    domains = in_order(domains)
    size = (max(8, 1.1 * len(domains)), 3.2)
    figure = Figure(size, layout="constrained")
    ax = figure.subplots()
    runs = list(runs_in(columns))
    width = 0.8 / len(runs)
    for i, (setting, run) in enumerate(runs):
        left = np.arange(len(domains)) - 0.4 + i * width
        heights = perplexities(results.get(run), domains)
        bars = ax.bar(
            left,
            heights,
            width,
            align="edge",
            color=COLOURS[setting % 7],
            hatch=HATCHES[setting % 7],
            edgecolor="white",
            alpha=0.85,
        )
        name, members = columns[setting]
        if results.keys().isdisjoint(members):
            name += " (missing)"
        if run is members[0]:
            bars.set_label(name)
        if len(runs) <= 3:
            texts = ["missing" if math.isnan(ppl) else f"{ppl:.2f}" for ppl in heights]
            ax.bar_label(bars, texts, fontsize=6.5, padding=1)
    ax.set_xticks(range(len(domains)), domains)
    ax.set_ylabel("validation perplexity per token")
    ax.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=min(4, len(columns)))
    return figure


def perplexities(result: dict | None, domains: Sequence[str]) -> list[float]:
    """A result's perplexity of each domain; NaN where it has none."""
    if result is None:
        return [math.nan] * len(domains)
    values = []
    for domain in domains:
        entry = result["domains"].get(domain)
        values.append(entry["ppl"] if entry else math.nan)
    return values


def weights() -> Figure:
    """Weight against loss of each strategy for 101 evenly spread losses, by temperature."""
    pyplot()
    losses = torch.linspace(0, 1, 101)
    h = normalize_losses(losses)
    size = (2 * len(STRATEGIES), 2.5)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(1, len(STRATEGIES), sharex=True)
    for ax, (name, f) in zip(axes, STRATEGIES.items(), strict=True):
        for i, r in enumerate(TEMPERATURES):
            weight = sample_weights(losses, name, r) * len(losses)
            ax.plot(
                h,
                weight,
                label=f"weight, r = {r}",
                linewidth=1.4,
                **style(i),
            )
        ax.plot(h, f(h, 1.0), label="f(h)", color="0.6", linewidth=1)
        bound = f"{BOUND:g}: assumed by the paper's analysis"
        ax.axhline(BOUND, label=bound, color="0.3", linewidth=0.8, linestyle=":")
        ax.set_title(name, fontsize=9)
        ax.set_ylim(bottom=-0.1)

    axes[0].set_ylabel("weight x N, and f(h)")
    figure.supxlabel("normalized loss h (-1: lowest of the batch, 1: highest)", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=5,
    )
    return figure


# The command


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--to", required=True, help="folder for the PNG and PDF files")
    args = parser.parse_args()
    runs = read_runs(args.runs)
    for run in runs:
        if not run.records("eval"):
            raise UserError(f"{run.path}: no evaluation in metrics.jsonl; train it first")
    to = Path(args.to)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; give a folder that can be made") from None
    save(weights(), to / "weights.png")
    if runs:
        plot_runs(runs, to)


def plot_runs(runs: list[RunFolder], to: Path) -> None:
    """All figures that need runs."""
    columns = columns_of(perplexity.settings(runs))
    names = [column.name for column in columns]

    figure = panels(loss_charts(columns), names, "validation loss (nats per token)")
    save(figure, to / "loss_curves.png")

    charts = gap_charts(columns)
    if charts:
        save(panels(charts, names, "nats per token"), to / "gap_to_uniform.png")

    for label in ("domain", "kind"):
        charts = share_charts(columns, label)
        if charts:
            figure = panels(charts, names, "share of weight / share of samples")
            save(figure, to / f"weight_by_{label}.png")

    charts = [sample_size_chart(columns), bound_chart(columns)]
    save(panels(charts, names, "share"), to / "effective_sample_size.png")

    results = perplexity.read_all(runs)
    if results:
        figure = domain_perplexity(columns, results)
        save(figure, to / "domain_perplexity.png")


def save(figure: Figure, path: Path) -> None:
    """As PNG and, for papers, as PDF."""
    for file in (path, path.with_suffix(".pdf")):
        figure.savefig(file)
        print(file)


if __name__ == "__main__":
    run_command(main)
