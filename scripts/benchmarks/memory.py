"""Peak memory of a training step, predicted and measured, and what saving memory costs.

    python scripts/bench.py memory                  # all cases on this device
    python scripts/bench.py memory --what head      # one model with more and more tokens at a time
    python scripts/bench.py memory --what time      # loss_chunk and recompute against plain steps
    python scripts/bench.py memory --what fits      # largest batch per card, as in docs/memory.md

Each case is a process of its own (W of them under torchrun) that makes a model and its optimizer
and takes two steps. Measured is the largest sum of bytes that torch's allocator had handed out at a
time, model included: on a GPU torch.cuda.max_memory_allocated, on a CPU from the allocations that
torch.profiler records. `resident` is what the process grew by as the kernel counts it, which adds
libraries, threads and fragmentation. Random tokens.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from cli import UserError
from data import Batch
from families import SIZES, Shape, build
from llama import LlamaConfig
from model import GPTConfig
from recipe import TrainConfig, settle
from runtime import distributed, memory
from runtime.distributed import print0
from scripts.benchmarks.common import (
    default_device,
    new_parser,
    table_row,
    take_turns,
    with_quartiles,
)
from step import Trainer

BENCH = Path(__file__).resolve().parents[1] / "bench.py"


class Case(NamedTuple):
    """One prediction to check. B: sequences of a micro-batch, A: micro-steps, W: ranks."""

    gpt: Shape
    B: int
    settings: dict = {}  # keys of TrainConfig
    A: int = 1
    W: int = 1


# 30M parameters, 19M of them in the table of the vocabulary
SMALL = GPTConfig(
    n_layer=6,
    n_head=6,
    n_embd=384,
    block_size=256,
    vocab_size=50304,
)
DEEP = GPTConfig(
    n_layer=12,
    n_head=8,
    n_embd=256,
    block_size=256,
    vocab_size=320,
)
WIDE = GPTConfig(
    n_layer=4,
    n_head=8,
    n_embd=768,
    block_size=128,
    vocab_size=320,
)
LLAMA = LlamaConfig(
    n_layer=6,
    n_head=6,
    n_embd=384,
    n_kv_head=2,
    n_ffn=1024,
    block_size=256,
    vocab_size=32000,
)
BF16 = {"dtype": "bfloat16"}
CHUNK = {"loss_chunk": 128}
SELECTIVE = {"recompute": "selective"}
FULL = {"recompute": "full"}
FSDP = {"parallel": "fsdp"}
CASES = {
    "small": Case(SMALL, 4),
    "small, loss_chunk 128": Case(SMALL, 4, CHUNK),
    "small, loss_chunk 128, full": Case(SMALL, 4, CHUNK | FULL),
    "small, 2 micro-steps": Case(SMALL, 2, A=2),
    "small, bfloat16": Case(SMALL, 4, BF16),
    "small, bfloat16, loss_chunk 128": Case(SMALL, 4, BF16 | CHUNK),
    "small, ddp": Case(SMALL, 2, W=2),
    "small, fsdp": Case(SMALL, 2, FSDP, W=2),
    "deep": Case(DEEP, 8),
    "deep, selective": Case(DEEP, 8, SELECTIVE),
    "deep, full": Case(DEEP, 8, FULL),
    "deep, dropout": Case(replace(DEEP, dropout=0.1), 8),
    "deep, bfloat16": Case(DEEP, 8, BF16),
    "deep, bfloat16, selective": Case(DEEP, 8, BF16 | SELECTIVE),
    "deep, bfloat16, full": Case(DEEP, 8, BF16 | FULL),
    "wide": Case(WIDE, 2),
    "wide, ddp": Case(WIDE, 2, W=2),
    "wide, fsdp": Case(WIDE, 2, FSDP, W=2),
    "wide, fsdp, 2 micro-steps": Case(WIDE, 2, FSDP, A=2, W=2),
    "wide, 8 layers, fsdp": Case(replace(WIDE, n_layer=8), 2, FSDP, W=2),
    "llama": Case(LLAMA, 4),
    "llama, selective": Case(LLAMA, 4, SELECTIVE),
    "llama, full": Case(LLAMA, 4, FULL),
    "llama, bfloat16, loss_chunk 128": Case(LLAMA, 4, BF16 | CHUNK),
    "llama, bfloat16, loss_chunk 128, full": Case(LLAMA, 4, BF16 | CHUNK | FULL),
    "llama, 2 micro-steps": Case(LLAMA, 2, A=2),
    "llama, fsdp": Case(LLAMA, 2, FSDP, W=2),
}
FLAT = replace(SMALL, n_layer=1, block_size=512)
HEAD = {
    f"{512 * B} tokens, loss_chunk {chunk}": Case(FLAT, B, {"loss_chunk": chunk})
    for B in (1, 2, 4, 8)
    for chunk in (0, 256)
}
TIMED = {
    "plain": {},
    "loss_chunk 256": {"loss_chunk": 256},
    "selective": SELECTIVE,
    "full": FULL,
    "loss_chunk 256, full": {"loss_chunk": 256} | FULL,
}
# The table of docs/memory.md: a column per card, and in each cell a number per way to save memory.
CARDS = (24, 40, 80, 141)  # GB
WAYS = (
    {},
    {"loss_chunk": memory.CHUNK},
    {"loss_chunk": memory.CHUNK} | SELECTIVE,
    {"loss_chunk": memory.CHUNK} | FULL,
)


def main(argv: list[str]) -> None:
    parser = new_parser("memory", __doc__)
    parser.add_argument(
        "--what",
        choices=("prediction", "head", "time", "fits"),
        default="prediction",
        help="(default: prediction)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of --what time (default: 9)")
    parser.add_argument(
        "--case",
        choices=CASES | HEAD,
        metavar="NAME",
        help="measure this row of a table in this process and print its bytes as JSON",
    )
    args = parser.parse_args(argv)
    if args.rounds < 3:
        raise UserError(f"--rounds {args.rounds}: must be at least 3")
    if args.case:
        measured = measure((CASES | HEAD)[args.case])
        print0(json.dumps(measured))
        distributed.cleanup()
    elif args.what == "time":
        print_times(args.rounds)
    elif args.what == "fits":
        print_what_fits()
    else:
        print_predictions(CASES if args.what == "prediction" else HEAD)


def print_predictions(cases: dict[str, Case]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | predicted MB | measured MB | predicted / measured | resident MB |")
    print("|---|--:|--:|--:|--:|")
    for name, case in cases.items():
        predicted = predict(case, device)
        measured = measure_in_processes(name, case.W)
        peak, resident = measured["peak"], measured["resident"]
        numbers = (
            f"{predicted / 1e6:.1f}",
            f"{peak / 1e6:.1f}",
            f"{predicted / peak:.3f}",
            f"{resident / 1e6:.0f}",
        )
        print(table_row([name, *numbers]), flush=True)


def predict(case: Case, device: str) -> float:
    """The predicted peak of a case in bytes per rank."""
    settings = {"dtype": "float32", **case.settings}
    parts = memory.predict(case.gpt, case.B, case.A, case.W, device=device, **settings)
    return sum(parts.values())


def measure_in_processes(name: str, W: int) -> dict:
    """What `measure` gives for a case, in W new processes."""
    command = [str(BENCH), "memory", "--case", name]
    if W > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={W}", "--"]
        command = launcher + command
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict:
    """Peak of a step and growth of this process in bytes, over making a model and two steps.

    All ranks call it. With FSDP on a CPU, the profiler misses what gloo's threads free, so that a
    sum over several steps drifts upwards. The peak is then what parameters and moments hold, and
    above it the median peak of three single steps.
    """
    device = default_device()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident_before = resident_pages * os.sysconf("SC_PAGE_SIZE")

    def two_steps() -> None:
        trainer, batch = make_trainer(case, device)
        trainer.step(1, batch)  # makes the moments
        trainer.step(1, batch)

    if device.type == "cpu" and case.settings.get("parallel") == "fsdp":
        trainer, batch = make_trainer(case, device)
        trainer.step(1, batch)
        local_bytes = sum(p.to_local().nbytes for p in trainer.raw.parameters())
        peaks = [peak_bytes(lambda: trainer.step(1, batch)) for _ in range(3)]
        peak = 3 * local_bytes + int(median(peaks))
    else:
        peak = peak_bytes(two_steps)
    most_resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak, "resident": most_resident - resident_before}


def make_trainer(case: Case, device: torch.device) -> tuple[Trainer, Batch]:
    """A fresh model with its optimizer, and random tokens for its steps."""
    settings = {
        "dtype": "float32",
        "reweight": "linupper",
        "reweight_warmup_steps": 0,
        "compile": "off",
        "loss_chunk": 0,
        **case.settings,
    }
    n = case.A * case.B
    config = TrainConfig(global_batch_size=n * case.W, micro_batch_size=case.B, **settings)
    config = settle(config, case.W)
    trainer = Trainer(build(case.gpt), config, n_domains=1, device=device)
    size = (n, case.gpt.block_size + 1)
    tokens = torch.randint(case.gpt.vocab_size, size, device=device)
    pairs = np.zeros((n * case.W, 2), dtype=np.int64)
    domain = torch.from_numpy(pairs[:, 0])
    return trainer, Batch(tokens[:, :-1], tokens[:, 1:], domain, pairs)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator had handed out at a time while `work` ran."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    in_order = [n_bytes for _, n_bytes in sorted(changes)]
    return int(np.cumsum(in_order).max())


def print_times(rounds: int) -> None:
    """Time of each way to save memory over that of plain steps; on a CPU processor time."""
    device = default_device()
    variants = []
    for settings in TIMED.values():
        trainer, batch = make_trainer(Case(SMALL, 4, settings), device)
        variants.append(partial(trainer.step, 1, batch))
    for variant in variants:
        variant()
    clock = 0 if device.type == "cuda" else 1
    seconds = take_turns(variants, rounds, device)[:, :, clock]
    plain = seconds[:, 0]
    tokens = 4 * SMALL.block_size
    print(f"plain: {np.median(plain):.3f} s a step of {tokens} tokens; time over plain's:")
    for name, own in zip(TIMED, seconds.T, strict=True):
        print(f"  {name:<24} {with_quartiles(own / plain)}")


def print_what_fits() -> None:
    cards = [f"{card} GB" for card in CARDS]
    print(table_row(["size", "T", "dropout", *cards]))
    print("|---|--:|--:|" + "---|" * len(CARDS))
    for size in ("124m", "210m", "355m", "684m", "774m", "1.5b"):
        print_row_of_what_fits(size, T=1024, dropout=0.0)
    for size in ("124m", "210m", "684m"):  # as published
        print_row_of_what_fits(size, T=512, dropout=0.1)
    for size in ("llama_1b", "llama_1.4b"):
        print_row_of_what_fits(size, T=4096, dropout=0.0)


def print_row_of_what_fits(size: str, T: int, dropout: float) -> None:
    gpt = replace(SIZES[size], block_size=T, dropout=dropout)
    if gpt.family == "gpt2":
        gpt = replace(gpt, vocab_size=50304)
    cells = []
    for card in CARDS:
        batches = [str(largest_batch(gpt, card, **way)) for way in WAYS]
        cells.append(" / ".join(batches))
    print(table_row([size, T, dropout, *cells]))


def largest_batch(gpt: Shape, gigabytes: float, **settings) -> int:
    """The most sequences of a micro-batch that fit on a card; 0: not one."""
    usable = memory.USABLE * gigabytes * 1e9
    B = 0
    while True:
        parts = memory.predict(gpt, B + 1, A=2, **settings)
        if sum(parts.values()) > usable:
            return B
        B += 1
