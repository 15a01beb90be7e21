"""Peak memory of a training step against memory.py's prediction, the head's share, and what saving memory costs.

    python scripts/bench_memory.py                       # all cases of this device: predicted, measured
    python scripts/bench_memory.py --what head           # the same model with more and more tokens at a time
    python scripts/bench_memory.py --what time           # time of loss_chunk and recompute over that without them

Each case is a process of its own (W of them under torchrun) that makes a model and its optimizer and takes two steps of
train.py. Measured is the largest sum of bytes that torch's allocator had given out at a time, model included: on a GPU
torch.cuda.max_memory_allocated, on a CPU from the allocations that torch.profiler records. `resident` is what the
process grew by, as the kernel counts it, which adds libraries, threads and holes. Random tokens.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import distributed
import memory
import train
from configurator import Parser
from distributed import print0
from errors import UserError, run
from model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50304)  # 30M parameters, 19M in the table
DEEP = GPTConfig(n_layer=12, n_head=8, n_embd=256, block_size=256, vocab_size=320)
WIDE = GPTConfig(n_layer=4, n_head=8, n_embd=768, block_size=128, vocab_size=320)
# case -> shape, B, A, W, settings
CASES = {
    "small": (SMALL, 4, 1, 1, {}),
    "small, loss_chunk 128": (SMALL, 4, 1, 1, {"loss_chunk": 128}),
    "small, loss_chunk 128, full": (SMALL, 4, 1, 1, {"loss_chunk": 128, "recompute": "full"}),
    "small, 2 micro-steps": (SMALL, 2, 2, 1, {}),
    "small, bfloat16": (SMALL, 4, 1, 1, {"dtype": "bfloat16"}),
    "small, bfloat16, loss_chunk 128": (SMALL, 4, 1, 1, {"dtype": "bfloat16", "loss_chunk": 128}),
    "small, ddp": (SMALL, 2, 1, 2, {}),
    "small, fsdp": (SMALL, 2, 1, 2, {"parallel": "fsdp"}),
    "deep": (DEEP, 8, 1, 1, {}),
    "deep, selective": (DEEP, 8, 1, 1, {"recompute": "selective"}),
    "deep, full": (DEEP, 8, 1, 1, {"recompute": "full"}),
    "deep, dropout": (replace(DEEP, dropout=0.1), 8, 1, 1, {}),
    "deep, bfloat16": (DEEP, 8, 1, 1, {"dtype": "bfloat16"}),
    "deep, bfloat16, selective": (DEEP, 8, 1, 1, {"dtype": "bfloat16", "recompute": "selective"}),
    "deep, bfloat16, full": (DEEP, 8, 1, 1, {"dtype": "bfloat16", "recompute": "full"}),
    "wide": (WIDE, 2, 1, 1, {}),
    "wide, ddp": (WIDE, 2, 1, 2, {}),
    "wide, fsdp": (WIDE, 2, 1, 2, {"parallel": "fsdp"}),
    "wide, fsdp, 2 micro-steps": (WIDE, 2, 2, 2, {"parallel": "fsdp"}),
    "wide, 8 layers, fsdp": (replace(WIDE, n_layer=8), 2, 1, 2, {"parallel": "fsdp"}),
    "wide, 8 layers, fsdp, 2 micro-steps": (replace(WIDE, n_layer=8), 2, 2, 2, {"parallel": "fsdp"}),
    "wide, fsdp, bfloat16": (WIDE, 2, 1, 2, {"parallel": "fsdp", "dtype": "bfloat16"}),
}
FLAT = replace(SMALL, n_layer=1, block_size=512)
HEAD = {f"{512 * B} tokens, loss_chunk {chunk}": (FLAT, B, 1, 1, {"loss_chunk": chunk})
        for B in (1, 2, 4, 8) for chunk in (0, 256)}
TIMED = {"plain": {}, "loss_chunk 256": {"loss_chunk": 256}, "selective": {"recompute": "selective"},
         "full": {"recompute": "full"}, "loss_chunk 256, full": {"loss_chunk": 256, "recompute": "full"}}


def stepper(gpt: GPTConfig, B: int, A: int, W: int, settings: dict) -> tuple[Callable[[], None], torch.optim.AdamW]:
    """What takes one step with a fresh model, and its optimizer."""
    settings = {"dtype": "float32", "reweight": "linupper", "reweight_warmup_steps": 0, "compile": "off", **settings}
    config = train.settle(train.TrainConfig(global_batch_size=B * A * W, micro_batch_size=B, **settings), W)
    device = torch.device(config.device, distributed.ranks().local_rank if config.device == "cuda" else None)
    model, optimizer = train.make_trainable(GPT(gpt).to(device), config, device)
    tokens = torch.randint(gpt.vocab_size, (B * A, gpt.block_size + 1), device=device)
    return lambda: train.train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], 1, config), optimizer


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that torch's allocator had given out at a time while `work` ran."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(np.cumsum([b for _, b in changes]).max())


def measure(case: tuple) -> dict:
    """Peak and growth of this process, in bytes, over making a model and two steps; on every rank.

    On a CPU the profiler misses what gloo's threads give back for FSDP, and a sum over several steps drifts upwards.
    There it is what the parameters and their two moments hold, and the median peak of three single steps above that.
    """
    def work():
        step, _ = stepper(*case)
        step()  # makes the moments
        step()

    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    kib = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    if device.type == "cpu" and case[-1].get("parallel") == "fsdp":
        step, optimizer = stepper(*case)
        step()
        held = sum(3 * p.to_local().nbytes for group in optimizer.param_groups for p in group["params"])
        peak = held + int(median(peak_bytes(step) for _ in range(3)))
    else:
        peak = peak_bytes(work)
    return {"peak": peak, "resident": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kib) * 1024}


def in_a_process(name: str, W: int) -> dict:
    """What `measure` gives for a case of this file in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={W}", "--"] if W > 1 else []
    done = subprocess.run([sys.executable, *launcher, __file__, "--case", name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(cases: dict[str, tuple]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | predicted MB | measured MB | predicted / measured | resident MB |\n|---|--:|--:|--:|--:|")
    for name, (gpt, B, A, W, settings) in cases.items():
        expected = sum(memory.predict(gpt, B, A, W, device=device, **{"dtype": "float32", **settings}).values())
        found = in_a_process(name, W)
        print(f"| {name} | {expected / 1e6:.1f} | {found['peak'] / 1e6:.1f} | {expected / found['peak']:.3f} | "
              f"{found['resident'] / 1e6:.0f} |", flush=True)


def times(rounds: int) -> None:
    """Each way's time over the plain one's of the same round, in turn; on a CPU of the processor."""
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    steps = [stepper(SMALL, 4, 1, 1, settings)[0] for settings in TIMED.values()]
    seconds = np.zeros((rounds, len(steps)))
    for i in range(-1, rounds):  # the round before the first warms up
        for j in np.roll(range(len(steps)), i):  # none is always first
            distributed.barrier(device)
            began = clock()
            steps[j]()
            distributed.barrier(device)
            seconds[max(i, 0), j] = clock() - began
    print(f"plain: {np.median(seconds[:, 0]):.3f} s a step of {4 * SMALL.block_size} tokens; time over plain's:")
    for j, name in enumerate(TIMED):
        low, middle, high = np.quantile(seconds[:, j] / seconds[:, 0], [0.25, 0.5, 0.75])
        print(f"  {name:<24} {middle:.3f}  (quartiles {low:.3f} to {high:.3f}, {rounds} rounds)")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--what", choices=("prediction", "head", "time"), default="prediction",
                        help="(default: prediction)")
    parser.add_argument("--rounds", type=int, default=9, help="of --what time (default: 9)")
    parser.add_argument("--case", choices={**CASES, **HEAD}, help="measure one case here and print its bytes as JSON")
    args = parser.parse_args()
    if args.rounds < 3:
        raise UserError(f"--rounds {args.rounds}: must be at least 3")
    if args.case:
        print0(json.dumps(measure({**CASES, **HEAD}[args.case])))
        distributed.cleanup()
    elif args.what == "time":
        times(args.rounds)
    else:
        table(CASES if args.what == "prediction" else HEAD)


if __name__ == "__main__":
    run(main)
