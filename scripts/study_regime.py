"""When does reweighting help? The difference from uniform at equal steps against T, G, r and the normalisation.

    python scripts/study_regime.py --data_dir data/mini_bytes --to results/study_regime       # an hour of CPU, 2 cores

Trains the tiny model (config/tiny_cpu.py, 1,000 steps) with uniform and linupper, one setting varied at a time, by
train.py itself; finished runs are kept. Also tells which part of the weights' distance from uniform, KL(w || uniform),
lies between domains (some are merely harder) and which within them (a sample is hard for its domain).
Writes table.md and regime.png.
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

from configurator import Parser
from errors import UserError, run
from eval.plots import COLOURS, pyplot
from manifest import DOMAINS, read_manifest
from metrics import read_lines

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
    """The records of metrics.jsonl of a run, trained now if it is not there yet."""
    out = to / "runs" / point.name()
    flags = {"data_dir": data_dir, "out_dir": out, "block_size": point.T, "global_batch_size": point.G,
             "reweight": point.reweight, "r": point.r, "reweight_norm": point.norm, "seed": point.seed,
             "max_steps": steps, "warmup_steps": steps // 20, "reweight_warmup_steps": steps // 20,
             "eval_interval": steps, "eval_windows": 128, "checkpoint_interval": steps, "device": "cpu"}
    command = [sys.executable, "train.py", "config/tiny_cpu.py", *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise UserError(f"{point.name()}: {done.stderr.strip().splitlines()[-1]}")
    return read_lines(out / "metrics.jsonl")


def final_loss(records: list[dict]) -> float:
    """Mean over domains of the last evaluation, nats per byte."""
    return [r["mean_loss"] for r in records if r["kind"] == "eval"][-1]


def weights_of(point: Point, records: list[dict]) -> dict[str, float]:
    """Of all reweighted steps as one pool: effective sample size, KL(w || uniform) and its part between domains (nats).

    Chain rule: KL(w || uniform) = KL(weight per domain || samples per domain) + the mean KL within the domains.
    """
    lines = [r for r in records if r["kind"] == "train" and r["ess"] < 1 - 1e-6]
    weight, samples = ({d: sum(r[key].get(d, 0) for r in lines) / len(lines) for d in DOMAINS}
                       for key in ("weight_by_domain", "samples_by_domain"))
    return {"ess": fmean(r["ess"] for r in lines), "kl": math.log(point.G) - fmean(r["entropy"] for r in lines),
            "between": sum(weight[d] * math.log(weight[d] / samples[d]) for d in DOMAINS if weight[d])}


def table(results: dict[Point, list[dict]]) -> str:
    """A row per reweighted run."""
    lines = ["| varied | T | G | r | norm | seed | uniform | linupper | behind uniform | ess | KL | between domains |",
             "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for panel, points in VARIED.items():
        for p in points:
            base, loss, w = final_loss(results[p.uniform()]), final_loss(results[p]), weights_of(p, results[p])
            cells = (panel.split(" (")[0], p.T, p.G, p.r, p.norm, p.seed, f"{base:.4f}", f"{loss:.4f}",
                     f"{loss - base:+.4f}", f"{w['ess']:.2f}", f"{w['kl']:.3f}", f"{w['between'] / w['kl']:.0%}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def figure(results: dict[Point, list[dict]], path: Path) -> None:
    """Above: how far linupper ends behind uniform. Below: KL(w || uniform), between and within domains."""
    plt = pyplot()
    panels = {panel: points for panel, points in VARIED.items() if panel != "seed"}
    fig, axes = plt.subplots(2, len(panels), figsize=(2.2 * len(panels), 4.4), sharey="row", sharex="col",
                             layout="constrained")
    for (panel, points), (above, below) in zip(panels.items(), axes.T, strict=True):
        x = range(len(points))
        gaps = [final_loss(results[p]) - final_loss(results[p.uniform()]) for p in points]
        bars = above.bar(x, gaps, 0.6, color=COLOURS[1], edgecolor="white", hatch="///")
        above.bar_label(bars, [f"{gap:+.3f}" for gap in gaps], fontsize=7, padding=1)
        kl, between = ([weights_of(p, results[p])[key] for p in points] for key in ("kl", "between"))
        below.bar(x, between, 0.6, color=COLOURS[0], edgecolor="white", label="between domains")
        below.bar(x, [a - b for a, b in zip(kl, between, strict=True)], 0.6, between, color=COLOURS[5],
                  edgecolor="white", hatch="...", label="within domains")
        key = LABELS.get(panel, "norm")
        below.set_xticks(x, [str(getattr(p, key)) for p in points], fontsize=8)
        below.set_xlabel(panel, fontsize=8)
        for ax in (above, below):
            ax.grid(axis="x", visible=False)
        above.axhline(0, color="black", lw=0.8)
    axes[0, 0].set_ylabel("linupper minus uniform\n(validation nats per byte)", fontsize=8)
    axes[1, 0].set_ylabel("KL(w || uniform) (nats)", fontsize=8)
    axes[0, 0].margins(y=0.15)
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    fig.savefig(path)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="real text as bytes, made by prepare_slimpajama.py")
    parser.add_argument("--to", type=Path, default=Path("results/study_regime"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of every run (default: 1000)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)")
    args = parser.parse_args()
    if args.steps < 40 or args.jobs < 1:
        raise UserError(f"--steps {args.steps} --jobs {args.jobs}: at least 40 steps and 1 job")
    tokenizer = read_manifest(args.data_dir)["tokenizer"]["name"]
    if tokenizer != "bytes":
        raise UserError(f"--data_dir {args.data_dir} has tokenizer {tokenizer}; prepare it with --tokenizer bytes")
    points = dict.fromkeys(p for row in VARIED.values() for q in row for p in (q.uniform(), q))
    longest_first = sorted(points, key=lambda p: -p.T * p.G)
    to = args.to.resolve()
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; give a folder that can be made") from None
    with ThreadPoolExecutor(args.jobs) as pool:
        records = pool.map(lambda p: train(p, str(Path(args.data_dir).resolve()), args.steps, to), longest_first)
        results = dict(zip(longest_first, records, strict=True))
    text = table(results)
    (to / "table.md").write_text(text + "\n")
    figure(results, to / "regime.png")
    print(text, to / "table.md", to / "regime.png", sep="\n")


if __name__ == "__main__":
    run(main)
