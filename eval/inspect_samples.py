"""Show which text got the most and the least weight, per domain, in a run with --record_samples.

    python eval/inspect_samples.py --run runs/a --top 2 --from_step 1000

Reads RUN/samples.bin and the data folder of the run.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import data
from cli import Parser, UserError, run
from corpus import tokenizer
from corpus.manifest import read_manifest
from runtime.checkpoint import read_json
from runtime.telemetry import SAMPLE


def read_samples(run_dir: Path, from_step: int) -> np.ndarray:
    """The recorded rows (dtype telemetry.SAMPLE) from a step on; UserError where there are none."""
    path = run_dir / "samples.bin"
    if not path.is_file():
        raise UserError(f"{path} not found; train with --record_samples N (every N steps)")
    content = path.read_bytes()
    n_whole = len(content) // SAMPLE.itemsize  # a kill may cut the last row short
    rows = np.frombuffer(content, SAMPLE, count=n_whole)
    rows = rows[rows["step"] >= from_step]
    if not len(rows):
        raise UserError(f"{path} has no sample from step {from_step} on; lower --from_step")
    return rows


def open_data(
    args: Namespace, config: dict, rows: np.ndarray
) -> tuple[data.Split, Callable[[list[int]], str]]:
    """The split that the rows come from, and its decoder; UserError where it cannot be that."""
    data_dir = args.data_dir or config["data_dir"]
    manifest = read_manifest(data_dir)
    split = data.Split(data_dir, manifest, "train", config["block_size"])
    domain, window = rows["domain"], rows["window"]
    is_known = domain.max() < len(split.domains)
    if not is_known or (window >= split.n_windows[domain]).any():
        raise UserError(
            f"{data_dir} does not hold the samples of {args.run}; give the --data_dir it was "
            "trained on"
        )
    return split, tokenizer.find(manifest["tokenizer"]["sha256"], data_dir).decode


def describe(
    row: np.ndarray, split: data.Split, decode: Callable[[list[int]], str], chars: int
) -> str:
    """A sample for the terminal: weight, loss, place, kind (if any), and the start of its text."""
    domain, window = int(row["domain"]), int(row["window"])
    label = ""
    if split.kinds:
        kind = split.kind_of(np.array([(domain, window)]))[0]
        label = f", {split.kinds[kind]}" if kind >= 0 else ""
    text = decode(split.window(domain, window)[:-1].tolist()).replace("\n", "\\n")
    if len(text) > chars:
        text = f"{text[:chars]}..."
    numbers = f"weight {row['weight']:.3f} x 1/G, loss {row['loss']:.3f}"
    return f"  {numbers}, step {row['step']}, window {window}{label}\n    {text}"


def parse_args() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder of train.py")
    parser.add_argument("--data_dir", help="data folder (default: the one the run was trained on)")
    parser.add_argument(
        "--top", type=int, default=2, help="samples at each end, per domain (default: 2)"
    )
    parser.add_argument(
        "--from_step", type=int, default=0, help="leave out earlier steps (default: 0)"
    )
    parser.add_argument(
        "--chars", type=int, default=300, help="characters of each text (default: 300)"
    )
    args = parser.parse_args()
    if args.top < 1 or args.chars < 1:
        raise UserError(f"--top {args.top} --chars {args.chars}: both must be above 0")
    if not (args.run / "config.json").is_file():
        raise UserError(f"--run {args.run}: no config.json in it; give a run folder of train.py")
    return args


def main() -> None:
    args = parse_args()
    config = read_json(args.run / "config.json")
    rows = read_samples(args.run, args.from_step)
    split, decode = open_data(args, config, rows)
    steps = f"steps {rows['step'].min()} to {rows['step'].max()}"
    print(f"{args.run}: {config['reweight']}, {len(rows):,} samples of {steps}")
    for domain, name in enumerate(split.domains):
        of_domain = rows[rows["domain"] == domain]
        if not len(of_domain):
            continue
        weight, loss = of_domain["weight"].mean(), of_domain["loss"].mean()
        means = f"mean weight {weight:.3f} x 1/G, mean loss {loss:.3f}"
        print(f"\n== {name}: {len(of_domain):,} samples, {means}")
        rising = np.sort(of_domain, order=["weight", "loss"])  # linupper gives equal weights
        ends = {
            "most weight": rising[::-1][: args.top],
            "least weight": rising[: args.top],
        }
        for title, samples in ends.items():
            print(title)
            for row in samples:
                print(describe(row, split, decode, args.chars))


if __name__ == "__main__":
    run(main)
