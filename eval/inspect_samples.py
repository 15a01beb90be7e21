"""The text of the samples that got the most and the least weight, per domain, of a run with --record_samples.

    python eval/inspect_samples.py --run runs/a --top 2 --from_step 1000

Reads RUN/samples.bin and the data folder of the run.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import data
import tokenizer
from checkpoint import read_json
from configurator import Parser
from errors import UserError, run
from manifest import read_manifest
from telemetry import SAMPLE


def read_samples(run_dir: Path, from_step: int) -> np.ndarray:
    """The recorded rows (dtype telemetry.SAMPLE) from a step on; UserError where there are none."""
    path = run_dir / "samples.bin"
    if not path.is_file():
        raise UserError(f"{path} not found; train with --record_samples N (every N steps)")
    raw = path.read_bytes()
    rows = np.frombuffer(raw[:len(raw) // SAMPLE.itemsize * SAMPLE.itemsize], SAMPLE)  # a kill may cut the last row
    rows = rows[rows["step"] >= from_step]
    if not len(rows):
        raise UserError(f"{path} has no sample from step {from_step} on; lower --from_step")
    return rows


def describe(row: np.ndarray, split: data.Split, decode, chars: int) -> str:
    """One sample: where it is, its loss and weight, its kind where it has one, the start of its text."""
    pair = (int(row["domain"]), int(row["window"]))
    kind = split.kind_of(np.array([pair]))[0] if split.kinds else -1
    text = decode(split.window(*pair)[:-1].tolist()).replace("\n", "\\n")
    label = f", {split.kinds[kind]}" if kind >= 0 else ""
    return (f"  weight {row['weight']:.3f} x 1/G, loss {row['loss']:.3f}, step {row['step']}, window {pair[1]}{label}\n"
            f"    {text[:chars]}{'...' if len(text) > chars else ''}")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder of train.py")
    parser.add_argument("--data_dir", help="data folder (default: the one the run was trained on)")
    parser.add_argument("--top", type=int, default=2, help="samples at each end, per domain (default: 2)")
    parser.add_argument("--from_step", type=int, default=0, help="leave out earlier steps (default: 0)")
    parser.add_argument("--chars", type=int, default=300, help="of each text (default: 300)")
    args = parser.parse_args()
    if args.top < 1 or args.chars < 1:
        raise UserError(f"--top {args.top} --chars {args.chars}: both must be above 0")
    if not (args.run / "config.json").is_file():
        raise UserError(f"--run {args.run}: no config.json there; give a run folder of train.py")
    config = read_json(args.run / "config.json")
    rows = read_samples(args.run, args.from_step)
    data_dir = args.data_dir or config["data_dir"]
    manifest = read_manifest(data_dir)
    split = data.Split(data_dir, manifest, "train", config["block_size"])
    if rows["domain"].max() >= len(split.domains) or (rows["window"] >= split.n_windows[rows["domain"]]).any():
        raise UserError(f"{data_dir} does not hold the samples of {args.run}; give the --data_dir it was trained on")
    decode = tokenizer.load(manifest["tokenizer"]["name"]).decode
    print(f"{args.run}: {config['reweight']}, {len(rows):,} samples of steps {rows['step'].min()} to "
          f"{rows['step'].max()}")
    for d, name in enumerate(split.domains):
        mine = np.sort(rows[rows["domain"] == d], order=["weight", "loss"])  # linupper has ties
        if len(mine):
            print(f"\n== {name}: {len(mine):,} samples, mean weight {mine['weight'].mean():.3f} x 1/G, mean loss "
                  f"{mine['loss'].mean():.3f}")
            for title, ends in (("most weight", mine[::-1][:args.top]), ("least weight", mine[:args.top])):
                print(title, *(describe(row, split, decode, args.chars) for row in ends), sep="\n")


if __name__ == "__main__":
    run(main)
