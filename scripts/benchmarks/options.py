"""What each option of reweighting, and the optimizer, costs in a step.

    python train.py config/tiny_cpu.py --out_dir runs/reference
    python eval/score_windows.py --run runs/reference --to scores.npz -- config/tiny_cpu.py
    python scripts/bench.py options --run runs/reference --scores scores.npz config/tiny_cpu.py

All other flags are train.py's: those of the base, which is made a linupper run from its first step
on. Each variant changes one option of it. Variants take turns in blocks of ten steps.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cli import parse
from data import RunData, batches
from model import GPT
from recipe import TrainConfig, model_shape, settle
from runtime import reference
from runtime.plan import open_data
from scripts.benchmarks.common import (
    default_device,
    describe,
    new_parser,
    quartiles,
    table_row,
    take_turns,
)
from step import Trainer

STEPS = 10  # of a block


def main(argv: list[str]) -> None:
    parser = new_parser("options", __doc__)
    parser.add_argument("--run", required=True, help="run folder of a reference model")
    parser.add_argument("--scores", type=Path, required=True, help="file of eval/score_windows.py")
    parser.add_argument("--rounds", type=int, default=20, help="blocks per variant (default: 20)")
    args, flags = parser.parse_known_args(argv)
    config = parse(TrainConfig, __doc__, flags)
    config = replace(config, reweight="linupper", reweight_warmup_steps=0)
    config = settle(config, world_size=1)
    data = open_data(config)
    device = default_device()

    changes = {
        "linupper": {},
        "uniform": {"reweight": "uniform"},
        "band": {"reweight": "band"},
        "control shuffled": {"reweight_control": "shuffled"},
        "control within": {"reweight_control": "within"},
        "unit byte": {"reweight_unit": "byte"},
        "reference by file": {"reweight_ref": str(args.scores)},
        "reference by run": {"reweight_ref": args.run},
        "muon": {"optimizer": "muon"},
    }
    variants = [block(replace(config, **change), data, device) for change in changes.values()]
    for variant in variants:
        variant()
    seconds = take_turns(variants, args.rounds, device)[:, :, 0]
    print(f"{config.model}, {config.global_batch_size} x {config.block_size}, {describe(device)}\n")
    print(table_row(["variant", "ms per step", "over linupper (quartiles)"]))
    print(table_row(["---", "--:", "---"]))
    for name, own in zip(changes, seconds.T, strict=True):
        low, middle, high = quartiles(own / seconds[:, 0])
        ms = 1e3 * np.median(own) / STEPS
        print(table_row([name, f"{ms:.1f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]))


def block(config: TrainConfig, data: RunData, device: torch.device) -> Callable[[], None]:
    """A function that takes STEPS steps of a run of its own, always on the same batches."""
    torch.manual_seed(config.seed)
    seen = reference.what_weights_see(config, data, device)
    shape = model_shape(config, data.manifest)
    trainer = Trainer(GPT(shape), config, len(data.train.domains), device, *seen)
    stream = batches(data, 0, STEPS, rank=0, world_size=1, pin=device.type == "cuda")
    steps = list(stream)

    def take() -> None:
        for step, batch in enumerate(steps):
            trainer.step(step, batch)

    return take
