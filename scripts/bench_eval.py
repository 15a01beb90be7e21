"""What evaluation costs beyond the model: blocks of both in turn, in one run.

    python scripts/bench_eval.py --data_dir data/sample
    python scripts/bench_eval.py --data_dir data/slimpajama --model 124m --block_size 512

Perplexity: eval/perplexity.py's loop, reading included, against bare forward passes over the same batches held in
memory. Prints rates over the bare one of the same round, median and quartiles. Random weights.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import data
import distributed
from configurator import Parser
from errors import UserError, run
from eval.perplexity import validation_windows, window_losses
from manifest import read_manifest
from model import GPT, SIZES

BATCHES = 20  # of a block

def perplexity_variants(model: GPT, args, dtype: str) -> dict[str, Callable[[], None]]:
    """Two ways through the same windows, the bare one first."""
    device = next(model.parameters()).device
    split = data.Split(args.data_dir, read_manifest(args.data_dir), "val", args.block_size)
    pairs = validation_windows(split, None)
    pairs = pairs[np.linspace(0, len(pairs) - 1, BATCHES * args.batch_size).astype(int)]
    held = [[t.to(device) for t in data.read_batch(split, pairs[i:i + args.batch_size])[:2]]
            for i in range(0, len(pairs), args.batch_size)]

    @torch.no_grad()
    def bare() -> None:
        model.eval()
        for x, y in held:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                model(x, y)

    return {"bare forward": bare, "perplexity": lambda: window_losses(model, split, pairs, args.batch_size, dtype)}


def compare(variants: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> None:
    """Time the variants in turn and print each one's rate over the first one's."""
    names, seconds = list(variants), np.zeros((rounds + 1, len(variants)))
    for i in range(rounds + 1):  # the first round warms up
        for j in np.roll(range(len(names)), i):  # none is always first
            distributed.barrier(device)
            began = time.perf_counter()
            variants[names[j]]()
            distributed.barrier(device)
            seconds[i, j] = time.perf_counter() - began
    for j, name in enumerate(names[1:], 1):
        low, middle, high = np.quantile(seconds[1:, 0] / seconds[1:, j], [0.25, 0.5, 0.75])
        print(f"{name} / {names[0]}: {middle:.3f}  (quartiles {low:.3f} to {high:.3f}, {rounds} rounds)")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="data folder made by prepare_slimpajama.py")
    parser.add_argument("--model", choices=SIZES, default="tiny", help="(default: tiny)")
    parser.add_argument("--block_size", type=int, default=128, help="tokens per window (default: 128)")
    parser.add_argument("--batch_size", type=int, default=32, help="windows per forward pass (default: 32)")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each variant (default: 15)")
    args = parser.parse_args()
    if min(args.block_size, args.batch_size, args.rounds) < 1:
        raise UserError("--block_size, --batch_size and --rounds must be above 0")
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    vocabulary = -(-read_manifest(args.data_dir)["tokenizer"]["n_vocab"] // 64) * 64
    torch.manual_seed(0)
    model = GPT(replace(SIZES[args.model], block_size=args.block_size, vocab_size=vocabulary)).to(device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, T {args.block_size}, batch {args.batch_size}, {dtype}, {what}, torch {torch.__version__}")
    compare(perplexity_variants(model, args, dtype), args.rounds, device)


if __name__ == "__main__":
    run(main)
