"""How fast a training step is, where its time goes, and what reweighting costs.

    python scripts/bench.py train --sizes tiny --micro_batch 32 --block_size 128
    python scripts/bench.py train --sizes 124m 355m --micro_batch 8 16 --reweight linupper extremes
    python scripts/bench.py train --sizes 6x6x384 --block_size 256 --profile trace.json
    torchrun --nproc_per_node 8 -- scripts/bench.py train --sizes 1.5b --parallel fsdp

All other flags are train.py's, also from a config file; dropout is off unless they turn it on.
Uniform and each strategy take turns in blocks of --log_interval steps, with batches and telemetry.
Then one block of each is timed part by part, and --profile writes one as a trace for
https://ui.perfetto.dev. With several ranks, parts and memory are those of rank 0.

MFU, model FLOPs utilization, is that of PaLM (arXiv 2204.02311, appendix B) as nanoGPT counts it: a
token costs 6 N + 12 L C T floating-point operations, with N parameters without the positions, L
layers, C width, T tokens. The count does not change with a first pass for the losses, with
recomputed activations or with the causal half of attention that is skipped.
"""

import gc
import json
import os
import re
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial, wraps
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import step
from cli import UserError, parse
from corpus.manifest import DOMAINS, read_manifest
from data import batches, open_data
from families import SIZES, Shape, build
from files import write_text
from model import GPTConfig
from recipe import TrainConfig, model_shape, settle
from reweight import STRATEGIES
from runtime import distributed, memory
from runtime.distributed import print0
from runtime.metrics import versions
from runtime.telemetry import Telemetry
from scripts.benchmarks.common import (
    describe,
    new_parser,
    quartiles,
    table_row,
    take_turns,
    write_random_shards,
)

# Words of a GPU's name -> its dense bfloat16 peak in TFLOP/s from the vendor's datasheet. The first
# that fits counts.
PEAKS = {
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
PARTS = ("data", "forward", "gather and weights", "backward", "optimizer", "telemetry", "rest")

# Flags of train.py that this benchmark replaces by its own, which take several values or none.
REPLACED = {
    "--model": "--sizes",
    "--micro_batch_size": "--micro_batch",
    "--data_dir": "--data",
    "--global_batch_size": "--micro_batch times --micro_steps and ranks",
}


def main(argv: list[str]) -> None:
    args, config = read_flags(argv)
    world_size = distributed.ranks().world_size
    device = distributed.setup(config.device)
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peaks = {
        "datasheet": datasheet_flops(device_name, config.dtype),
        "matrix product": matmul_flops(device, config.dtype),
    }
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            if not args.data:
                n_vocab = args.n_vocab or (257 if size.endswith("tiny") else 50257)
                write_random_shards(Path(folder), len(DOMAINS), n_vocab)
            for B in args.micro_batch:
                sizes = {
                    "data_dir": args.data or folder,
                    "micro_batch_size": B,
                    "global_batch_size": B * args.micro_steps * world_size,
                }
                rows += bench_shape(replace(config, **sizes), size, args, device)
    print0(
        f"{world_size} ranks, {config.dtype}, T {config.block_size}, {describe(device)}; a matrix "
        f"product reaches {peaks['matrix product'] / 1e12:.3f} TFLOP/s\n\n{report(rows, peaks)}"
    )
    if args.to and distributed.ranks().rank == 0:
        result = {
            **versions(),
            "device": device_name,
            "ranks": world_size,
            "threads": torch.get_num_threads(),
            "config": asdict(config),
            "micro_steps": args.micro_steps,
            "peak_flops": peaks,
            "rows": rows,
        }
        write_text(args.to, json.dumps(result, indent=1))
    distributed.cleanup()


def read_flags(argv: list[str]) -> tuple[Namespace, TrainConfig]:
    """The benchmark's own flags, and train.py's for a step that reweights from the start."""
    parser = new_parser("train", __doc__)
    shapes = f"{', '.join(SIZES)}, or LAYERSxHEADSxWIDTH"
    parser.add_argument(
        "--sizes", nargs="+", default=["124m"], metavar="SIZE", help=f"{shapes} (default: 124m)"
    )
    parser.add_argument(
        "--micro_batch", nargs="+", type=int, default=[8], help="sequences per rank (default: 8)"
    )
    parser.add_argument(
        "--micro_steps", type=int, default=1, help="of that size in a step (default: 1)"
    )
    parser.add_argument(
        "--reweight",
        nargs="+",
        choices=[name for name in STRATEGIES if name != "uniform"],
        default=["linupper"],
        help="strategies to compare with uniform (default: linupper)",
    )
    parser.add_argument(
        "--n_vocab", type=int, default=0, help="of the random tokens (default: 50257; tiny: 257)"
    )
    parser.add_argument("--data", default="", help="prepared data instead of random tokens")
    parser.add_argument("--rounds", type=int, default=10, help="blocks per strategy (default: 10)")
    parser.add_argument("--to", type=Path, help="JSON file for all results")
    parser.add_argument(
        "--profile", type=Path, help="file for a trace of the last strategy, size and micro-batch"
    )
    args, flags = parser.parse_known_args(argv)
    for flag in flags:
        name = flag.split("=")[0]
        if name in REPLACED:
            raise UserError(f"{flag}: here it is {REPLACED[name]}")
    if min(args.rounds, args.micro_steps, *args.micro_batch) < 1:
        raise UserError("--rounds, --micro_steps and --micro_batch must be at least 1")
    for size in args.sizes:
        named_shape(size)  # a wrong one is refused before anything is measured

    config = parse(TrainConfig, __doc__, ["--dropout=0", *flags])
    world_size = distributed.ranks().world_size
    config = replace(
        config,
        reweight_warmup_steps=0,
        max_steps=2**31 - 1,
        global_batch_size=args.micro_steps * world_size,
        micro_batch_size=1,
        eval_windows=1,
    )
    return args, settle(config, world_size)


def named_shape(size: str) -> Shape:
    """A row of SIZES, or the shape that LAYERSxHEADSxWIDTH says."""
    if size in SIZES:
        return SIZES[size]
    numbers = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", size)
    layers, heads, width = map(int, numbers.groups()) if numbers else (0, 0, 0)
    if min(layers, heads, width) < 1 or width % heads:
        raise UserError(
            f"--sizes {size}: must be one of {', '.join(SIZES)}, or LAYERSxHEADSxWIDTH like 6x6x384"
        )
    return GPTConfig(layers, heads, width)


def bench_shape(
    config: TrainConfig, size: str, args: Namespace, device: torch.device
) -> list[dict]:
    """A row of results per strategy, uniform first, for a model size and a micro-batch."""
    from_data = model_shape(config, read_manifest(config.data_dir))
    gpt = replace(
        named_shape(size),
        block_size=from_data.block_size,
        dropout=from_data.dropout,
        vocab_size=from_data.vocab_size,
    )
    bench = Bench(config, gpt, device)
    strategies = ["uniform", *args.reweight]
    with closing(bench.stream):
        try:
            rows = measure(bench, strategies, args.rounds)
        except torch.OutOfMemoryError:
            name = torch.cuda.get_device_name(device)
            raise UserError(
                f"{size} with --micro_batch {config.micro_batch_size} does not fit into {name}; "
                "give less"
            ) from None
        is_last = (size, config.micro_batch_size) == (args.sizes[-1], args.micro_batch[-1])
        if args.profile and is_last:
            bench.trace(strategies[-1], args.profile)
    del bench
    torch._dynamo.reset()  # compiled code refers to its model; the next shape needs the room
    gc.collect()
    return [{"size": size, "micro_batch": config.micro_batch_size} | row for row in rows]


# Measuring


class Bench:
    """A trainer and its batches, as train.py makes them."""

    def __init__(self, config: TrainConfig, gpt: Shape, device: torch.device):
        config = memory.settle_loss_chunk(config, gpt, distributed.ranks().world_size)
        run_data = open_data(
            config.data_dir,
            config.block_size,
            config.mixture,
            config.global_batch_size,
            config.seed,
            config.eval_windows,
        )
        torch.manual_seed(config.seed)
        n_domains = len(run_data.train.domains)
        self.config, self.gpt, self.device = config, gpt, device
        self.trainer = step.Trainer(build(gpt), config, n_domains, device)
        rank, _, world_size = distributed.ranks()
        pin = device.type == "cuda"
        self.stream = batches(run_data, 0, config.max_steps, rank, world_size, pin)
        self.telemetry = Telemetry(
            run_data.train, tempfile.gettempdir(), 0, record_every=0, on_nonfinite="skip"
        )
        self.steps = 0

    def block(self, strategy: str, clock: "Clock | None" = None) -> None:
        """log_interval steps."""
        self.trainer.config = replace(self.trainer.config, reweight=strategy)
        for _ in range(self.config.log_interval):
            with clock.part("data") if clock else nullcontext():
                batch = next(self.stream)
            result = self.trainer.step(self.steps, batch)
            self.steps += 1
            self.telemetry.add(self.steps, batch.pairs, result)
        self.telemetry.flush()
        self.telemetry.seen.clear()

    def parts(self, strategy: str) -> dict[str, float]:
        """Seconds per step of each of PARTS."""
        clock = Clock(self.device)
        with clock.watch(self.trainer):
            block = partial(self.block, strategy, clock)
            wall = take_turns([block], 1, self.device)[0, 0, 0]
        seconds = clock.seconds()
        seconds["rest"] = wall - sum(seconds.values())
        return {part: seconds[part] / self.config.log_interval for part in PARTS}

    def trace(self, strategy: str, path: Path) -> None:
        """Write one block with its parts named in Chrome's trace format, from rank 0."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        clock = Clock(self.device)
        with clock.watch(self.trainer), profile(activities=activities) as profiler:
            self.block(strategy, clock)
            distributed.barrier(self.device)
        if distributed.ranks().rank == 0:
            temporary = path.with_name(f"tmp_{path.name}")
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, path)


class Clock:
    """Times the parts of a step on the device. A part inside another counts as the outer one."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.inside = False
        self.spans = []  # (part, begin, end)

    def now(self) -> "float | torch.cuda.Event":
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
        self.inside = True
        begin = self.now()
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
    def watch(self, trainer: step.Trainer) -> Iterator[None]:
        """Inside, the functions that a step calls are timed; the step itself stays as it is."""
        functions = {
            "forward": [(type(trainer.model), "__call__")],
            "backward": [(Tensor, "backward")],
            "gather and weights": [(distributed, "gather"), (step, "sample_weights")],
            "optimizer": [
                (torch.nn.utils, "get_total_norm"),
                (trainer.optimizer, "step"),
                (trainer.optimizer, "zero_grad"),
            ],
            "telemetry": [
                (step.Guard, "limits"),
                (step.Guard, "add"),
                (Telemetry, "add"),
                (Telemetry, "flush"),
            ],
        }
        with ExitStack() as stack:
            for name, places in functions.items():
                for owner, attribute in places:
                    function = self.timed(name, getattr(owner, attribute))
                    stack.enter_context(mock.patch.object(owner, attribute, function))
            yield

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, all its spans together. Call it once the device has finished."""
        totals = defaultdict(float)
        for name, begin, end in self.spans:
            totals[name] += begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
        return totals


def measure(bench: Bench, strategies: list[str], rounds: int) -> list[dict]:
    """A row of results per strategy, measured in blocks that take turns; uniform comes first."""
    blocks = [partial(bench.block, strategy) for strategy in strategies]
    for block in blocks:
        block()
    reset_peak_memory(bench.device)
    seconds = take_turns(blocks, rounds, bench.device) / bench.config.log_interval
    peak = peak_memory(bench.device)
    tokens = bench.config.global_batch_size * bench.config.block_size
    flops_per_rank = memory.flops_per_token(bench.gpt) * tokens / distributed.ranks().world_size
    rows = []
    for j, strategy in enumerate(strategies):
        step_s, processor_s = np.median(seconds[:, j], axis=0).tolist()
        over_uniform = seconds[:, j] / seconds[:, 0]  # (rounds, 2)
        row = {
            "reweight": strategy,
            "step_s": step_s,
            "processor_s": processor_s,
            "tokens_per_s": tokens / step_s,
            "over_uniform": {
                "wall": quartiles(over_uniform[:, 0]),
                "processor": quartiles(over_uniform[:, 1]),
            },
            "peak_memory_bytes": peak,
            "parts_s": bench.parts(strategy),
            "flops_per_s": flops_per_rank / step_s,
        }
        rows.append(row)
    return rows


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not on every system
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes since the reset: of tensors on a GPU, else of this process (Linux only)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])


# Floating-point operations


def matmul_flops(device: torch.device, dtype: str) -> float:
    """The most FLOP/s that a square matrix product reaches on this device, in the step's dtype."""
    n = 8192 if device.type == "cuda" else 1024
    of_numbers = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a = torch.randn(n, n, device=device, dtype=of_numbers)
    seconds = take_turns([lambda: a @ a], 20, device)[:, 0, 0]
    return 2 * n**3 / seconds.min()


def datasheet_flops(device_name: str, dtype: str) -> float | None:
    """The peak of a known GPU; None for any other, and for float32, whose rate depends on TF32."""
    known = [peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)]
    return known[0] * 1e12 if known and dtype == "bfloat16" else None


# Printing


def report(rows: list[dict], peaks: dict[str, float | None]) -> str:
    """Two Markdown tables: speed, and the parts of a step."""
    names = ["size", "micro-batch", "reweight"]
    speed_columns = [
        "ms a step",
        "of the processor",
        "tokens/s",
        *(f"MFU, {name}" for name in peaks),
        "peak GB",
        "over uniform: wall (quartiles)",
        "processor",
    ]
    part_columns = list(PARTS)
    part_columns[0] = f"ms a step: {PARTS[0]}"
    rule = "|---|--:|---|"
    speed = [table_row(names + speed_columns), rule + "--:|" * len(speed_columns)]
    parts = [table_row(names + part_columns), rule + "--:|" * len(part_columns)]
    for row in rows:
        name = [row["size"], row["micro_batch"], row["reweight"]]
        speed.append(table_row(name + speed_cells(row, peaks)))
        parts.append(table_row(name + [f"{1e3 * row['parts_s'][part]:.2f}" for part in PARTS]))
    return "\n".join([*speed, "", *parts])


def speed_cells(row: dict, peaks: dict[str, float | None]) -> list[str]:
    low, middle, high = row["over_uniform"]["wall"]
    utilization = []
    for peak in peaks.values():
        utilization.append(f"{100 * row['flops_per_s'] / peak:.1f} %" if peak else "-")
    peak_bytes = row["peak_memory_bytes"]
    return [
        f"{1e3 * row['step_s']:.1f}",
        f"{1e3 * row['processor_s']:.1f}",
        f"{row['tokens_per_s']:,.0f}",
        *utilization,
        f"{peak_bytes / 1e9:.2f}" if peak_bytes else "-",
        f"{middle:.4f} ({low:.4f} to {high:.4f})",
        f"{row['over_uniform']['processor'][1]:.4f}",
    ]
