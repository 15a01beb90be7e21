"""What reweighting costs: blocks of uniform, weighted, and weighted and watched steps in turn, in one run.

    python scripts/bench_reweight.py --model tiny --block_size 128 --global_batch_size 32
    torchrun --nproc_per_node 2 -- scripts/bench_reweight.py
    torchrun --nproc_per_node 8 -- scripts/bench_reweight.py --model 124m --block_size 512 --global_batch_size 256

A block is as many steps as there are between two log lines. Prints each variant's time over uniform's of the same
round: median and quartiles, of the wall clock and (on a CPU) of the processor's time, which other programs on the
machine disturb less. Random tokens, no dropout, no accumulation.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import distributed
import train
from configurator import Parser
from data import DOMAINS
from distributed import print0
from errors import UserError, run
from model import GPT, SIZES
from reweight import STRATEGIES
from telemetry import WINDOW, Guard, Telemetry

# name -> (strategy or None for the one asked for, statistics collected and flushed as in train.py)
VARIANTS = {"uniform": ("uniform", False), "weighted": (None, False), "weighted, with telemetry": (None, True)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=SIZES, default="tiny", help="(default: tiny)")
    parser.add_argument("--vocab_size", type=int, default=320, help="(default: 320, bytes; gpt2: 50304)")
    parser.add_argument("--block_size", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--global_batch_size", type=int, default=32, help="sequences (default: 32)")
    parser.add_argument("--reweight", choices=[s for s in STRATEGIES if s != "uniform"], default="linupper",
                        help="strategy (default: linupper)")
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each variant (default: 30)")
    args = parser.parse_args()
    if args.rounds < 3:
        raise UserError(f"--rounds {args.rounds}: must be at least 3")
    rank, _, W = distributed.ranks()
    config = train.settle(train.TrainConfig(model=args.model, block_size=args.block_size, dropout=0.0,
                                            global_batch_size=args.global_batch_size, reweight_warmup_steps=0), W)
    G, T, n = config.global_batch_size, config.block_size, config.micro_batch_size
    device = distributed.setup(config.device)
    torch.manual_seed(0)
    raw = GPT(replace(SIZES[args.model], block_size=T, vocab_size=args.vocab_size)).to(device)
    if config.compile == "on":
        raw.compile()
    model = distributed.data_parallel(raw, raw.h, device, config.parallel)
    optimizer = train.make_optimizer(raw, config)
    tokens = torch.randint(args.vocab_size, (n, T + 1), device=device)
    pairs = np.stack([np.arange(G) % len(DOMAINS), np.arange(G)], axis=1)
    guard = Guard(device, 0.0, "skip")
    telemetry = Telemetry(SimpleNamespace(domains=DOMAINS, kinds=()), tempfile.mkdtemp(), 0, 0)

    def block(variant: str, model: torch.nn.Module) -> tuple[float, float]:
        """Wall and processor seconds of log_interval steps."""
        strategy, watched = VARIANTS[variant]
        settings = replace(config, reweight=strategy or args.reweight)
        distributed.barrier(device)
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(config.log_interval):
            out = train.train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], step, settings)
            if watched:
                telemetry.add(step + 1, pairs, *out, guard.limits(WINDOW + step))
                guard.add(step, out[2], optimizer.found_inf == 0)
        if watched:
            telemetry.flush()
            telemetry.histograms()
        distributed.barrier(device)
        return time.perf_counter() - wall, time.process_time() - cpu

    names = list(VARIANTS)
    for name in names:  # warm up
        block(name, model)
    seconds = np.zeros((args.rounds, len(names), 2))
    for i in range(args.rounds):
        for j in np.roll(range(len(names)), i):  # none is always first
            seconds[i, j] = block(names[j], model)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print0(f"{args.model}, T {T}, G {G}, {args.reweight}, {W} ranks, {what}, torch {torch.__version__}: "
           f"{np.median(seconds[:, 0, 0]) / config.log_interval * 1e3:.1f} ms per uniform step; time over uniform's:")
    for j, name in enumerate(names[1:], 1):
        for k, clock in enumerate(("wall", "processor") if device.type == "cpu" else ("wall",)):
            low, middle, high = np.quantile(seconds[:, j, k] / seconds[:, 0, k], [0.25, 0.5, 0.75])
            print0(f"  {name:<26}{clock:<10} {middle:.4f}  (quartiles {low:.4f} to {high:.4f}, {args.rounds} rounds)")
    del model
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
