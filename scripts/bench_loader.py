"""What reading costs: opening many shards, batches on warm and on cold data, resident memory.

    python scripts/bench_loader.py                                # 10,000 shards of 40,000 tokens in a temporary folder
    python scripts/bench_loader.py --shards 500 --batches 2000
"""

import json
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import data
from configurator import Parser
from corpus.shards import npy_header
from errors import UserError, run
from manifest import DOMAINS, SCHEMA, read_manifest

TOKENS, T, B = 40_000, 1024, 32


def write_shards(folder: Path, n: int, n_vocab: int = 50257) -> None:
    """n shards of random tokens below n_vocab, dealt out to the domains."""
    rng, domains = np.random.default_rng(0), {d: {"train": []} for d in DOMAINS}
    for i in range(n):
        domain = DOMAINS[i % len(DOMAINS)]
        name = f"{domain}/train_{i:05d}.npy"
        (folder / domain).mkdir(exist_ok=True)
        content = npy_header(TOKENS) + rng.integers(0, n_vocab, TOKENS, dtype=np.uint16).tobytes()
        (folder / name).write_bytes(content)
        domains[domain]["train"].append({"file": name, "tokens": TOKENS, "documents": 1, "bytes": TOKENS,
                                         "file_bytes": len(content), "sha256": f"{i:064d}"})
    (folder / "manifest.json").write_text(json.dumps({
        "schema": SCHEMA, "tokenizer": {"name": "gpt2", "sha256": "", "n_vocab": n_vocab, "eot_token": n_vocab - 1},
        "dtype": "uint16", "source": {}, "domains": domains}))


def resident() -> float:
    """MB of memory of this process now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=int, default=10_000, help="(default: 10,000)")
    parser.add_argument("--batches", type=int, default=10_000, help="(default: 10,000)")
    args = parser.parse_args()
    if min(args.shards, args.batches) < 100 or args.shards > 10**6:  # 80 kB each
        raise UserError(f"--shards {args.shards} --batches {args.batches}: at least 100, and a million shards at most")
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), args.shards)
        begin = time.perf_counter()
        split = data.Split(name, read_manifest(name), "train", T)
        print(f"opening {args.shards:,} shards: {time.perf_counter() - begin:.3f} s")
        weights = data.mixture_weights("uniform", split)
        sampler = data.DomainSampler(weights, split.n_windows, B, seed=0)
        held, times, draws = [], [], []
        for step in range(args.batches):
            begin = time.perf_counter()
            pairs = sampler.draw(step)
            middle = time.perf_counter()
            data.read_batch(split, pairs)
            times.append(time.perf_counter() - middle)
            draws.append(middle - begin)
            if step % (args.batches // 10) == args.batches // 10 - 1:
                held.append(resident())
        q = np.quantile(times, [0.25, 0.5, 0.75]) * 1e3
        print(f"batch of {B} x {T}: {q[1]:.3f} ms (quartiles {q[0]:.3f} to {q[2]:.3f})")
        print(f"drawing its windows: {np.median(draws) * 1e3:.3f} ms")
        print("resident MB after each tenth of the batches: " + ", ".join(f"{m:.0f}" for m in held))


if __name__ == "__main__":
    run(main)
