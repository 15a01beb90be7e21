"""When does reweighting help? Its difference from uniform against T, G, r and the normalization.

    python scripts/study_regime.py --data_dir data/mini_bytes --to results/study_regime

It takes an hour on 2 CPU cores. Trains the tiny model (config/tiny_cpu.py, 1,000 steps) with
uniform and linupper, one setting varied at a time, by train.py itself; finished runs are kept.
Compares at equal steps. It also splits the weights' distance from uniform, KL(w || uniform), into
the part between domains (some are merely harder) and the part within them (a sample is hard for its
domain). Writes table.md and regime.png.
"""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, UserError, run
from corpus.manifest import DOMAINS, read_manifest
from eval.plots import COLOURS, pyplot
from runtime.metrics import read_lines

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Point:
    """One run: sequence length T, global batch G, strategy and its settings."""

    T: int = 128
    G: int = 16
    reweight: str = "linupper"
    r: float = 0.4
    norm: str = "minmax"
    seed: int = 42

    def uniform(self) -> "Point":
        """The baseline at the same T, G and seed."""
        return Point(T=self.T, G=self.G, reweight="uniform", seed=self.seed)

    def name(self) -> str:
        settings = "" if self.reweight == "uniform" else f"_r{self.r}_{self.norm}"
        return f"T{self.T}_G{self.G}_{self.reweight}{settings}_seed{self.seed}"


BASE = Point()
VARIED = {  # panel -> the points along it
    "T (tokens per sequence)": [replace(BASE, T=T) for T in (32, 128, 256)],
    "G (sequences per step)": [replace(BASE, G=G) for G in (4, 16, 32)],
    "r (temperature)": [replace(BASE, r=r) for r in (0.1, 0.4, 1.0, 4.0)],
    "normalisation": [replace(BASE, norm=norm) for norm in ("minmax", "quantile", "domain")],
    "normalisation, T = 256": [replace(BASE, T=256, norm=norm) for norm in ("minmax", "domain")],
    "seed": [replace(BASE, seed=seed) for seed in (42, 43)],
}
LABELS = {"T (tokens per sequence)": "T", "G (sequences per step)": "G", "r (temperature)": "r"}


def train(point: Point, data_dir: str, steps: int, to: Path) -> list[dict]:
    """The records of metrics.jsonl of a run, which is trained first if it is not finished yet."""
    out = to / "runs" / point.name()
    settings = {
        "data_dir": data_dir,
        "out_dir": out,
        "block_size": point.T,
        "global_batch_size": point.G,
        "reweight": point.reweight,
        "r": point.r,
        "reweight_norm": point.norm,
        "seed": point.seed,
        "max_steps": steps,
        "warmup_steps": steps // 20,
        "reweight_warmup_steps": steps // 20,
        "eval_interval": steps,
        "eval_windows": 128,
        "checkpoint_interval": steps,
        "device": "cpu",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "train.py", "config/tiny_cpu.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"{point.name()}: {done.stderr.strip().splitlines()[-1]}")
    return read_lines(out / "metrics.jsonl")


def final_loss(records: list[dict]) -> float:
    """Mean over domains of the last evaluation, in nats per byte."""
    losses = [record["mean_loss"] for record in records if record["kind"] == "eval"]
    return losses[-1]


def weights_of(point: Point, records: list[dict]) -> dict[str, float]:
    """Of all reweighted steps together: "ess", "kl" and "between".

    That is the effective sample size, KL(w || uniform) in nats, and its part between domains. The
    chain rule: KL(w || uniform) = KL(weight per domain || samples per domain) + the mean KL within
    domains.
    """
    lines = []
    for record in records:
        if record["kind"] == "train" and record["ess"] < 1 - 1e-6:
            lines.append(record)
    weight = mean_by_domain(lines, "weight_by_domain")
    samples = mean_by_domain(lines, "samples_by_domain")
    between = 0.0
    for domain in DOMAINS:
        if weight[domain]:
            between += weight[domain] * math.log(weight[domain] / samples[domain])
    return {
        "ess": fmean(line["ess"] for line in lines),
        "kl": math.log(point.G) - fmean(line["entropy"] for line in lines),
        "between": between,
    }


def mean_by_domain(lines: list[dict], key: str) -> dict[str, float]:
    """The mean over log lines of a share per domain; a domain that was not drawn counts as 0."""
    means = {}
    for domain in DOMAINS:
        means[domain] = sum(line[key].get(domain, 0) for line in lines) / len(lines)
    return means


COLUMNS = {  # title -> alignment
    "varied": "---",
    "T": "--:",
    "G": "--:",
    "r": "--:",
    "norm": "---",
    "seed": "--:",
    "uniform": "--:",
    "linupper": "--:",
    "behind uniform": "--:",
    "ess": "--:",
    "KL": "--:",
    "between domains": "--:",
}


def table(results: dict[Point, list[dict]]) -> str:
    """A row per reweighted run."""
    rows = []
    for panel, points in VARIED.items():
        varied = panel.split(" (")[0]
        rows += [[varied, *cells(point, results)] for point in points]
    lines = [f"| {' | '.join(row)} |" for row in [COLUMNS, *rows]]
    lines.insert(1, f"|{'|'.join(COLUMNS.values())}|")
    return "\n".join(lines)


def cells(point: Point, results: dict[Point, list[dict]]) -> list[str]:
    """A row of the table, without its first cell."""
    baseline = final_loss(results[point.uniform()])
    loss = final_loss(results[point])
    weights = weights_of(point, results[point])
    return [
        str(point.T),
        str(point.G),
        str(point.r),
        point.norm,
        str(point.seed),
        f"{baseline:.4f}",
        f"{loss:.4f}",
        f"{loss - baseline:+.4f}",
        f"{weights['ess']:.2f}",
        f"{weights['kl']:.3f}",
        f"{weights['between'] / weights['kl']:.0%}",
    ]


def figure(results: dict[Point, list[dict]], path: Path) -> None:
    """Above: how far linupper ends behind uniform. Below: KL(w || uniform) and its two parts."""
    plt = pyplot()
    panels = {panel: points for panel, points in VARIED.items() if panel != "seed"}
    fig, axes = plt.subplots(
        2,
        len(panels),
        figsize=(2.2 * len(panels), 4.4),
        sharey="row",
        sharex="col",
        layout="constrained",
    )
    for (panel, points), (above, below) in zip(panels.items(), axes.T, strict=True):
        draw_gaps(above, points, results)
        draw_weights(below, points, results)
        key = LABELS.get(panel, "norm")
        values = [str(getattr(point, key)) for point in points]
        below.set_xticks(range(len(points)), values, fontsize=8)
        below.set_xlabel(panel, fontsize=8)
    axes[0, 0].set_ylabel("linupper minus uniform\n(validation nats per byte)", fontsize=8)
    axes[1, 0].set_ylabel("KL(w || uniform) (nats)", fontsize=8)
    axes[0, 0].margins(y=0.15)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    fig.savefig(path)


def draw_gaps(ax, points: list[Point], results: dict[Point, list[dict]]) -> None:
    """A bar per point: its final loss minus that of uniform."""
    gaps = []
    for point in points:
        baseline = final_loss(results[point.uniform()])
        gaps.append(final_loss(results[point]) - baseline)
    x = range(len(points))
    bars = ax.bar(x, gaps, 0.6, color=COLOURS[1], edgecolor="white", hatch="///")
    ax.bar_label(bars, [f"{gap:+.3f}" for gap in gaps], fontsize=7, padding=1)
    ax.grid(axis="x", visible=False)
    ax.axhline(0, color="black", lw=0.8)


def draw_weights(ax, points: list[Point], results: dict[Point, list[dict]]) -> None:
    """A stacked bar per point: KL(w || uniform) between domains and within them."""
    between, within = [], []
    for point in points:
        weights = weights_of(point, results[point])
        between.append(weights["between"])
        within.append(weights["kl"] - weights["between"])
    x = range(len(points))
    ax.bar(x, between, 0.6, color=COLOURS[0], edgecolor="white", label="between domains")
    ax.bar(
        x,
        within,
        0.6,
        between,
        color=COLOURS[5],
        edgecolor="white",
        hatch="...",
        label="within domains",
    )
    ax.grid(axis="x", visible=False)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--data_dir", required=True, help="real text as bytes, made by prepare_slimpajama.py"
    )
    parser.add_argument(
        "--to", type=Path, default="results/study_regime", help="folder (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of every run (default: 1000)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)"
    )
    args = parser.parse_args()
    if args.steps < 40 or args.jobs < 1:
        raise UserError(f"--steps {args.steps} --jobs {args.jobs}: at least 40 steps and 1 job")
    tokenizer = read_manifest(args.data_dir)["tokenizer"]["name"]
    if tokenizer != "bytes":
        raise UserError(
            f"--data_dir {args.data_dir} has tokenizer {tokenizer}; "
            "prepare it with --tokenizer bytes"
        )
    points = {}  # an ordered set
    for row in VARIED.values():
        for point in row:
            points |= {point.uniform(): None, point: None}
    longest_first = sorted(points, key=lambda point: -point.T * point.G)
    to, data_dir = args.to.resolve(), str(Path(args.data_dir).resolve())
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; give a folder that can be made") from None
    with ThreadPoolExecutor(args.jobs) as pool:
        records = pool.map(lambda point: train(point, data_dir, args.steps, to), longest_first)
        results = dict(zip(longest_first, records, strict=True))
    text = table(results)
    (to / "table.md").write_text(text + "\n")
    figure(results, to / "regime.png")
    print(text, to / "table.md", to / "regime.png", sep="\n")


if __name__ == "__main__":
    run(main)
