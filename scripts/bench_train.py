"""How fast a step is, where its time goes, and what reweighting costs: real steps of train.py, minutes.

    python scripts/bench_train.py --sizes tiny --micro_batch 32 --block_size 128
    python scripts/bench_train.py --sizes 124m 355m --micro_batch 8 16 --block_size 1024 --reweight linupper extremes
    torchrun --nproc_per_node 8 -- scripts/bench_train.py --sizes 1.5b --micro_batch 4 --parallel fsdp --to 1.5b.json
    python scripts/bench_train.py --sizes 6x6x384 --micro_batch 8 --block_size 256 --profile trace.json

Every other flag is train.py's, also from a config file; dropout is off unless they say otherwise. Uniform and each
strategy take turns in blocks of --log_interval steps, batches and telemetry included. Then a block of each is taken
apart, and --profile writes one for https://ui.perfetto.dev. Of several ranks, parts and memory are those of rank 0.

MFU, model FLOPs utilisation, is PaLM's (arXiv 2204.02311, appendix B) as nanoGPT counts it: a token costs
6 N + 12 L C T floating-point operations; N parameters without the positions, L layers, C width, T tokens. A first pass
for the losses, recomputed activations and the causal half of attention that is skipped do not change that count.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cache, wraps
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import data
import distributed
import memory
import train
from configurator import Parser, parse
from distributed import print0
from errors import UserError, run
from files import write_text
from manifest import read_manifest
from metrics import versions
from model import GPT, SIZES, GPTConfig
from reweight import STRATEGIES
from scripts.bench_loader import write_shards
from telemetry import Guard, Telemetry

# Words of a GPU's name -> its dense bfloat16 peak in TFLOP/s from the vendor's datasheet; the first that fits counts.
PEAKS = {"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312,
         "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}
PARTS = ("data", "forward", "gather and weights", "backward", "optimizer", "telemetry", "rest")

# Flags of train.py that go by another name here, since they take several values or none.
OURS = {"--model": "--sizes", "--micro_batch_size": "--micro_batch", "--data_dir": "--data",
        "--global_batch_size": "--micro_batch times --micro_steps and ranks"}


class Clock:
    """Time of the parts of steps, on the device's own clock; a part inside another counts as the outer one."""

    def __init__(self, device: torch.device):
        self.cuda, self.inside, self.spans = device.type == "cuda", False, []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.inside:
            yield
            return
        self.inside, begin = True, self.now()
        with record_function(name):
            yield
        self.spans.append((name, begin, self.now()))
        self.inside = False

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def wrapper(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)
        return wrapper

    @contextmanager
    def watch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, the functions that a step calls are timed; the step itself stays as it is."""
        functions = {"forward": [(type(model), "__call__")], "backward": [(Tensor, "backward")],
                     "gather and weights": [(distributed, "gather"), (train, "sample_weights")],
                     "optimizer": [(torch.nn.utils, "clip_grad_norm_"), (optimizer, "step"), (optimizer, "zero_grad")],
                     "telemetry": [(Guard, "limits"), (Guard, "add"), (Telemetry, "add"), (Telemetry, "flush")]}
        with ExitStack() as stack:
            for name, places in functions.items():
                for owner, attribute in places:
                    function = self.timed(name, getattr(owner, attribute))
                    stack.enter_context(mock.patch.object(owner, attribute, function))
            yield

    def seconds(self) -> dict[str, float]:
        """Of each part, all its spans together; the device's work is done."""
        out = defaultdict(float)
        for name, begin, end in self.spans:
            out[name] += begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
        return out


class Bench:
    """A model, its optimizer and its batches, as train.py makes them."""

    def __init__(self, config: train.TrainConfig, gpt: GPTConfig, manifest: dict, device: torch.device):
        config = memory.settle_loss_chunk(config, gpt, distributed.ranks().world_size)
        self.config, self.device, self.step = config, device, 0
        torch.manual_seed(config.seed)
        self.raw = GPT(gpt).to(device)
        self.model, self.optimizer = train.make_trainable(self.raw, config, device)
        split = data.Split(config.data_dir, manifest, "train", config.block_size)
        sampler = data.DomainSampler(data.mixture_weights(config.mixture, split), split.n_windows,
                                     config.global_batch_size, config.seed)
        self.stream = train.batches(split, sampler, config, 0)
        self.guard = Guard(device, config.skip_grad_norm, config.on_nonfinite)
        self.telemetry = Telemetry(split, tempfile.gettempdir(), 0, 0, config.on_nonfinite)

    def block(self, strategy: str, clock: Clock | None = None) -> tuple[float, float]:
        """Wall and processor seconds of log_interval steps."""
        config = replace(self.config, reweight=strategy)
        distributed.barrier(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(config.log_interval):
            with clock.part("data") if clock else nullcontext():
                x, y, pairs = next(self.stream)
                x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            limits = self.guard.limits(self.step)
            out = train.train_step(self.model, self.optimizer, x, y, self.step, config, limit=limits[0])
            self.guard.add(self.step, out[2], self.optimizer.found_inf == 0)
            self.step += 1
            self.telemetry.add(self.step, pairs, *out, limits)
        self.telemetry.flush()
        self.telemetry.seen.clear()
        distributed.barrier(self.device)
        return time.perf_counter() - wall, time.process_time() - cpu

    def parts(self, strategy: str) -> dict[str, float]:
        """Seconds a step of each of PARTS."""
        clock = Clock(self.device)
        with clock.watch(self.model, self.optimizer):
            wall, _ = self.block(strategy, clock)
        seconds = clock.seconds()
        seconds["rest"] = wall - sum(seconds.values())
        return {part: seconds[part] / self.config.log_interval for part in PARTS}

    def trace(self, strategy: str, path: Path) -> None:
        """One block with its parts named, in Chrome's trace format, from rank 0."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        clock = Clock(self.device)
        with clock.watch(self.model, self.optimizer), profile(activities=activities) as profiler:
            self.block(strategy, clock)
        if distributed.ranks().rank == 0:
            temporary = path.with_name(f"tmp_{path.name}")
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, path)


def measure(bench: Bench, strategies: list[str], rounds: int) -> list[dict]:
    """A row of results per strategy, uniform first; blocks of each in turn, none always first."""
    for strategy in strategies:  # warm up
        bench.block(strategy)
    reset_peak_memory(bench.device)
    seconds = np.zeros((rounds, len(strategies), 2))
    for i in range(rounds):
        for j in np.roll(range(len(strategies)), i):
            seconds[i, j] = bench.block(strategies[j])
    memory, config, steps = peak_memory(bench.device), bench.config, bench.config.log_interval
    tokens, rows = config.global_batch_size * config.block_size, []
    for j, strategy in enumerate(strategies):
        step, host = np.median(seconds[:, j], axis=0) / steps
        over = {clock: np.quantile(seconds[:, j, k] / seconds[:, 0, k], [0.25, 0.5, 0.75]).tolist()
                for k, clock in enumerate(("wall", "processor"))}
        rows.append({"reweight": strategy, "step_s": step, "processor_s": host, "tokens_per_s": tokens / step,
                     "over_uniform": over, "peak_memory_bytes": memory, "parts_s": bench.parts(strategy),
                     "flops_per_s": flops_per_token(bench.raw.config) * tokens / step / distributed.ranks().world_size})
    return rows


@cache
def n_parameters(gpt: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(gpt).n_parameters()


def flops_per_token(gpt: GPTConfig) -> int:
    """6 N + 12 L C T, forward and backward; N without the positions, which are looked up and not multiplied."""
    N = n_parameters(gpt) - gpt.block_size * gpt.n_embd
    return 6 * N + 12 * gpt.n_layer * gpt.n_embd * gpt.block_size


def matmul_flops(device: torch.device, dtype: str) -> float:
    """The most FLOP/s that a square matrix product reaches here and now, in the dtype of the step."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=getattr(torch, dtype)), float("inf")
    for _ in range(20):
        distributed.barrier(device)
        begin = time.perf_counter()
        a @ a
        distributed.barrier(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def datasheet_flops(device_name: str, dtype: str) -> float | None:
    """The peak of a known GPU; None for any other, and for float32, whose rate depends on TF32."""
    known = [peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)]
    return known[0] * 1e12 if known and dtype == "bfloat16" else None


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not on every system
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes of this rank at most since the reset: of tensors on a GPU, else of the whole process (Linux only)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else None


def shape(size: str, block_size: int, n_vocab: int, dropout: float) -> GPTConfig:
    """A row of SIZES, or LAYERSxHEADSxWIDTH; vocabulary padded as in train.py."""
    if size in SIZES:
        gpt = SIZES[size]
    else:
        try:
            layers, heads, width = map(int, size.split("x"))
        except ValueError:
            layers = heads = width = 0
        if min(layers, heads, width) < 1 or width % heads:
            raise UserError(f"--sizes {size}: must be one of {', '.join(SIZES)}, or LAYERSxHEADSxWIDTH like 6x6x384")
        gpt = GPTConfig(layers, heads, width)
    return replace(gpt, block_size=block_size, vocab_size=-(-n_vocab // 64) * 64, dropout=dropout)


def lines(row: dict, datasheet: float | None) -> list[str]:
    """The two rows that stand for a strategy in the tables of speed and of parts."""
    name = f"| {row['size']} | {row['micro_batch']} | {row['reweight']} |"
    wall, cpu = row["over_uniform"]["wall"], row["over_uniform"]["processor"]
    memory = f"{row['peak_memory_bytes'] / 1e9:.2f}" if row["peak_memory_bytes"] else "-"
    mfu = " | ".join(f"{100 * row['flops_per_s'] / peak:.1f} %" if peak else "-"
                     for peak in (datasheet, row["matmul_flops"]))
    return [f"{name} {row['step_s'] * 1e3:.1f} | {row['processor_s'] * 1e3:.1f} | {row['tokens_per_s']:,.0f} | {mfu} | "
            f"{memory} | {wall[1]:.4f} ({wall[0]:.4f} to {wall[2]:.4f}) | {cpu[1]:.4f} |",
            f"{name} " + " | ".join(f"{1e3 * row['parts_s'][part]:.2f}" for part in PARTS) + " |"]


def report(result: dict) -> str:
    """Two Markdown tables."""
    speed, parts = zip(*(lines(row, result["datasheet_flops"]) for row in result["rows"]), strict=True)
    head = "| size | micro-batch | reweight |"
    speed_head = (f"{head} ms a step | of the processor | tokens/s | MFU, datasheet | MFU, matrix product | peak GB | "
                  "over uniform: wall (quartiles) | processor |")
    parts_head = f"{head} ms a step: {' | '.join(PARTS)} |"
    rule = "|---|--:|---|"
    return "\n".join([speed_head, rule + "--:|" * 8, *speed, "", parts_head, rule + "--:|" * len(PARTS), *parts])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["124m"], metavar="SIZE",
                        help=f"{', '.join(SIZES)}, or LAYERSxHEADSxWIDTH (default: 124m)")
    parser.add_argument("--micro_batch", nargs="+", type=int, default=[8], help="sequences per rank (default: 8)")
    parser.add_argument("--micro_steps", type=int, default=1, help="of that size in a step (default: 1)")
    parser.add_argument("--reweight", nargs="+", choices=[s for s in STRATEGIES if s != "uniform"],
                        default=["linupper"], help="strategies to compare with uniform (default: linupper)")
    parser.add_argument("--n_vocab", type=int, default=0, help="of the random tokens (default: 50257; tiny: 257)")
    parser.add_argument("--data", default="", help="prepared data instead of random tokens")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each strategy (default: 10)")
    parser.add_argument("--to", type=Path, help="JSON file of all results")
    parser.add_argument("--profile", type=Path, help="trace of one block of the last strategy, size and micro-batch")
    args, flags = parser.parse_known_args()
    for flag in flags:
        if ours := OURS.get(flag.split("=")[0]):
            raise UserError(f"{flag}: it is {ours} here")
    if min(args.rounds, args.micro_steps, *args.micro_batch) < 1:
        raise UserError("--rounds, --micro_steps and --micro_batch must be at least 1")
    W = distributed.ranks().world_size
    config = parse(train.TrainConfig, __doc__, ["--dropout=0", *flags])
    config = replace(config, reweight_warmup_steps=0, max_steps=2**31 - 1)
    for size in args.sizes:
        shape(size, config.block_size, 64, 0.0)  # a wrong one is told before anything is measured
    config = train.settle(replace(config, global_batch_size=args.micro_steps * W, micro_batch_size=1), W)
    device = distributed.setup(config.device)
    distributed.describe_network(device)
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = {**versions(), "device": name, "ranks": W, "threads": torch.get_num_threads(), "config": asdict(config),
              "micro_steps": args.micro_steps, "datasheet_flops": datasheet_flops(name, config.dtype), "rows": []}
    for size in args.sizes:
        n_vocab = args.n_vocab or (257 if size == "tiny" else 50257)
        with tempfile.TemporaryDirectory() as folder:
            if not args.data:
                write_shards(Path(folder), len(data.DOMAINS), n_vocab)
            manifest = read_manifest(args.data or folder)
            gpt = shape(size, config.block_size, manifest["tokenizer"]["n_vocab"], config.dropout)
            for B in args.micro_batch:
                common = {"size": size, "parameters": n_parameters(gpt), "micro_batch": B,
                          "matmul_flops": matmul_flops(device, config.dtype)}
                bench = Bench(replace(config, data_dir=args.data or folder, micro_batch_size=B,
                                      global_batch_size=B * args.micro_steps * W), gpt, manifest, device)
                try:
                    rows = measure(bench, ["uniform", *args.reweight], args.rounds)
                except torch.OutOfMemoryError:
                    raise UserError(f"{size} with --micro_batch {B} does not fit into {name}; give less") from None
                result["rows"] += [{**common, **row} for row in rows]
                if args.profile and (size, B) == (args.sizes[-1], args.micro_batch[-1]):
                    bench.trace(args.reweight[-1], args.profile)
                bench.stream.close()
                del bench  # its memory, before the next one is made
    what = f"{result['threads']} threads, " if device.type == "cpu" else ""
    print0(f"{name}, {W} ranks, {what}{config.dtype}, T {config.block_size}, torch {torch.__version__}; a matrix "
           f"product reaches {common['matmul_flops'] / 1e12:.3f} TFLOP/s\n\n{report(result)}")
    if args.to and distributed.ranks().rank == 0:
        write_text(args.to, json.dumps(result, indent=1))
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
