"""What an evaluation costs beyond the model's forward passes.

    python scripts/bench.py eval --data_dir data/sample
    python scripts/bench.py eval --data_dir data/slimpajama --model 124m --block_size 512

The loop of eval/perplexity.py, which also reads its windows, against bare forward passes over the
same batches in memory. Prints the loop's speed over the bare one's in the same round. Random
weights.
"""

from argparse import Namespace

import numpy as np
import torch

from cli import UserError
from corpus.manifest import read_manifest
from data import Split, read_batch, validation_windows
from eval.perplexity import score
from families import SIZES, build
from recipe import TrainConfig, model_shape
from scripts.benchmarks.common import (
    default_device,
    describe,
    new_parser,
    take_turns,
    with_quartiles,
)

BATCHES = 20  # in each round


def main(argv: list[str]) -> None:
    args = read_flags(argv)
    device = default_device()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    manifest = read_manifest(args.data_dir)
    split = Split(args.data_dir, manifest, "val", args.block_size)
    all_pairs = validation_windows(split, None)
    chosen = np.linspace(0, len(all_pairs) - 1, BATCHES * args.batch_size)
    pairs = all_pairs[chosen.astype(int)]  # (BATCHES * batch_size, 2)

    torch.manual_seed(0)
    config = TrainConfig(model=args.model, block_size=args.block_size, dropout=0.0)
    model = build(model_shape(config, manifest)).to(device)
    batches = []
    for first in range(0, len(pairs), args.batch_size):
        x, y, _ = read_batch(split, pairs[first : first + args.batch_size])
        batches.append((x.to(device), y.to(device)))

    @torch.no_grad()
    def bare() -> None:
        model.eval()
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                model(x, y)

    def perplexity() -> None:
        score(model, split, pairs, args.batch_size, dtype)

    bare()
    perplexity()
    seconds = take_turns([bare, perplexity], args.rounds, device)[:, :, 0]
    speed = seconds[:, 0] / seconds[:, 1]
    sizes = f"{args.model}, T {args.block_size}, batch {args.batch_size}, {dtype}"
    print(f"{sizes}, {describe(device)}")
    print(f"perplexity / bare forward: {with_quartiles(speed)}")


def read_flags(argv: list[str]) -> Namespace:
    parser = new_parser("eval", __doc__)
    parser.add_argument("--data_dir", required=True, help="folder made by prepare_slimpajama.py")
    parser.add_argument("--model", choices=SIZES, default="tiny", help="(default: tiny)")
    parser.add_argument(
        "--block_size", type=int, default=128, help="tokens per window (default: 128)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="windows per forward pass (default: 32)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    args = parser.parse_args(argv)
    if min(args.block_size, args.batch_size, args.rounds) < 1:
        raise UserError("--block_size, --batch_size and --rounds must be above 0")
    return args
