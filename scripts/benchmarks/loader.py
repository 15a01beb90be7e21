"""What reading costs: opening many shards, drawing and reading batches, and resident memory.

    python scripts/bench.py loader                                # 10,000 shards of 40,000 tokens
    python scripts/bench.py loader --shards 500 --batches 2000

The shards are random tokens in a temporary folder.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from cli import UserError
from data import open_data, read_batch
from scripts.benchmarks.common import new_parser, quartiles, write_random_shards

T, B = 1024, 32  # tokens of a window, windows of a batch


def main(argv: list[str]) -> None:
    parser = new_parser("loader", __doc__)
    parser.add_argument("--shards", type=int, default=10_000, help="(default: 10,000)")
    parser.add_argument("--batches", type=int, default=10_000, help="(default: 10,000)")
    args = parser.parse_args(argv)
    if min(args.shards, args.batches) < 100 or args.shards > 10**6:  # 80 kB each
        raise UserError(
            f"--shards {args.shards} --batches {args.batches}: at least 100, "
            "and at most a million shards"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), args.shards)
        measure(folder, args.shards, args.batches)


def measure(folder: str, n_shards: int, n_batches: int) -> None:
    began = time.perf_counter()
    run_data = open_data(folder, T, "uniform", B, seed=0, eval_windows=1)
    print(f"opening {n_shards:,} shards: {time.perf_counter() - began:.3f} s")

    draw_ms, read_ms, resident = [], [], []
    tenth = n_batches // 10
    for step in range(n_batches):
        began = time.perf_counter()
        pairs = run_data.sampler.draw(step)
        drawn = time.perf_counter()
        read_batch(run_data.train, pairs)
        draw_ms.append(1e3 * (drawn - began))
        read_ms.append(1e3 * (time.perf_counter() - drawn))
        if (step + 1) % tenth == 0:
            resident.append(f"{resident_mb():.0f}")
    low, middle, high = quartiles(np.array(read_ms))
    print(f"batch of {B} x {T}: {middle:.3f} ms (quartiles {low:.3f} to {high:.3f})")
    print(f"drawing its windows: {np.median(draw_ms):.3f} ms")
    print(f"resident MB after each tenth of the batches: {', '.join(resident)}")


def resident_mb() -> float:
    """Memory of this process now, in MB of 1,024 kB; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
