"""Whether a machine is fit for training; the header of scripts/check_node.sh says what this gives.

    python scripts/check_node.py                   # all stages; settings come from the environment
    python scripts/check_node.py STAGE LINES.json  # one stage here, as the first form starts it

A stage is a function that returns lines of the table. Those for several ranks run under torchrun.
G sequences of a step, B of a micro-batch, A = G / B micro-steps, T tokens, W ranks.
"""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils import collect_env

from cli import UserError, nearest, run
from corpus.manifest import DOMAINS
from files import write_text
from model import GPTConfig
from recipe import TrainConfig
from runtime import checkpoint, distributed, doctor, memory
from runtime.metrics import read_lines, versions
from scripts.benchmarks.common import (
    default_device,
    quartiles,
    table_row,
    take_turns,
    write_random_shards,
)
from scripts.benchmarks.memory import Case, make_trainer, measure, predict
from scripts.benchmarks.train import (
    Bench,
    bench_shape,
    datasheet_flops,
    matmul_flops,
    named_shape,
    read_flags,
)
from step import View

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).resolve()
PASS, FAIL, NOT_HERE = "pass", "fail", "not here"

# Limits of the verdicts. Figures in brackets were measured on a CPU, with 6 layers of width 384.
#
# Sums in another order move a float32 gradient by about 1e-6 of its norm (8e-7). TF32 rounds to 11
# bits of the 24, which moves it by 4e-4 or more (9e-4): switched on by mistake, it is found.
FLOAT32 = 1e-4
# Ways to compute in bfloat16 round at different places, so that two of them may lie as far apart as
# each lies from float32. So each is held against float32's gradient, and may be this many times as
# far from it as plain bfloat16 is in the same run (7.6e-3, and compiled as well).
BFLOAT16 = 1.5
# A bfloat16 is rounded by up to 2^-9 of itself. In a sample's loss, the mean over its tokens, less
# than an eighth of that is left (5e-6).
BFLOAT16_LOSS = 2.0**-12
# Training apart: the first updates have almost the same size for every weight, also where rounding
# decides on a gradient's sign. Each step may move losses and norms by two roundings.
STEPS_COMPARED = 5
BFLOAT16_STEP = 2.0**-8
# memory.USABLE leaves a tenth of the card free, for a prediction that is too low by as much.
MEMORY = 0.1


class Line(NamedTuple):
    """A line of the table; numbers are for report.json."""

    check: str
    verdict: str
    result: str
    numbers: dict = {}


class NotHere(Exception):
    """What this machine lacks for a stage."""


class Scale(NamedTuple):
    """How large the models of the checks are. size: as bench.py's --sizes."""

    size: str
    G: int
    T: int
    n_vocab: int
    short_T: int  # for the checks that also run on a CPU or without bfloat16
    rounds: int  # of variants that take turns
    cost_limit: float  # a step with linupper over a uniform one
    resumed: dict  # flags of the run that is resumed
    memory_cases: dict  # name -> size, B, T, settings


CHUNK, FULL = {"loss_chunk": memory.CHUNK}, {"recompute": "full"}
ON_GPU = Scale(
    size="124m",
    G=32,
    T=512,
    n_vocab=50257,
    short_T=128,
    rounds=16,
    cost_limit=1.01,
    resumed={"model": "124m", "n_layer": 2, "global_batch_size": 8},
    memory_cases={
        "124m, 32 x 512": ("124m", 32, 512, {}),
        "124m, 32 x 512, loss_chunk, recompute full": ("124m", 32, 512, CHUNK | FULL),
        "774m, 8 x 512, loss_chunk": ("774m", 8, 512, CHUNK),
    },
)
# The same code in a minute. Where a step takes milliseconds, the weights' own time shows.
ON_CPU = Scale(
    size="1x2x32",
    G=4,
    T=16,
    n_vocab=257,
    short_T=16,
    rounds=6,
    cost_limit=2.0,
    resumed={"model": "tiny", "n_layer": 1, "block_size": 16, "global_batch_size": 4},
    memory_cases={"4x8x256, 4 x 128": ("4x8x256", 4, 128, {})},
)


class Place(NamedTuple):
    """Where a stage works. data: random tokens; out: the results; folder: gone afterwards."""

    scale: Scale
    data: Path
    out: Path
    folder: Path


class Stage(NamedTuple):
    """limit_s: seconds before it is stopped; it starts only while half of them are left."""

    work: Callable[[Place], list[Line]]
    limit_s: float
    all_ranks: bool = False


# The stages


def check_versions(place: Place) -> list[Line]:
    """What --doctor finds; its whole text goes to the stage's log."""
    config = TrainConfig(
        model="tiny" if place.scale is ON_CPU else "124m",
        data_dir=str(place.data),
        out_dir=str(place.out),
    )
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        doctor.examine(config)
    print(text.getvalue())
    found = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    wrong = [line for line in found if line.startswith("wrong ")]
    of_random_data = "warning its tokenizer "  # random tokens have none
    warnings = [
        line for line in found if line.startswith("warning ") and of_random_data not in line
    ]
    parts = [f"wrong: {len(wrong)}, warnings: {len(warnings)}", *wrong, *warnings]
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        parts = [f"bfloat16 {'yes' if has_bf16 else 'no'}", f"NCCL {nccl}", *parts]
    return [Line("doctor", FAIL if wrong else PASS, "; ".join(parts))]


def check_step(place: Place) -> list[Line]:
    """The published batch: its speed, and what reweighting costs, in steps that take turns."""
    scale = place.scale
    rows, line = bench(
        place, scale.size, scale.G, scale.T, ["linupper"], rounds=scale.rounds, steps=10
    )
    return [line, judge_cost(rows[1]["over_uniform"]["wall"], scale.cost_limit)]


def judge_cost(over_uniform: tuple[float, float, float], limit: float) -> Line:
    """Fails only where the lower quartile of the rounds is above the limit: noise is no failure."""
    low, middle, high = over_uniform
    result = f"{middle:.4f} (quartiles {low:.4f} to {high:.4f}), limit {limit}"
    return Line("linupper over uniform", verdict(low <= limit), result, {"quartiles": over_uniform})


def check_compile(place: Place) -> list[Line]:
    """Compiled against plain, and the chunked head against the plain one, in bfloat16."""
    device = default_device()
    gpt = shape_of(place.scale, place.scale.size, place.scale.T)
    plain = {"reweight": "uniform", "dtype": "bfloat16"}
    exact = plain | {"dtype": "float32"}
    B = micro_batch(gpt, place.scale.G, device, dtype="float32", loss_chunk=0)
    chunk = B * gpt.block_size // 8
    ways = {
        "compile on": plain | {"compile": "on"},
        f"loss_chunk {chunk}": plain | {"loss_chunk": chunk},
    }
    tokens = random_tokens(gpt, B)
    of_exact = losses_and_gradient(Case(gpt, B, exact), tokens, device)
    of_plain = losses_and_gradient(Case(gpt, B, plain), tokens, device)
    lines = []
    for name, settings in ways.items():
        of_way = losses_and_gradient(Case(gpt, B, settings), tokens, device)
        lines.append(judge_bfloat16(f"{name} against plain", of_way, of_plain, of_exact))
    return lines


class Computed(NamedTuple):
    """What one backward pass gives: (n,) losses and weights, and the whole gradient in a row."""

    losses: Tensor
    weights: Tensor
    gradient: Tensor


def judge_bfloat16(check: str, way: Computed, plain: Computed, exact: Computed) -> Line:
    """Losses within a rounding of the plain ones, the gradient as near float32's as theirs is."""
    losses = largest_difference(way.losses, plain.losses)
    of_way = distance(way.gradient, exact.gradient)
    of_plain = distance(plain.gradient, exact.gradient)
    limit = BFLOAT16 * of_plain + FLOAT32
    result = (
        f"losses {losses:.1e} apart (limit {BFLOAT16_LOSS:.1e}); gradient {of_way:.2e} of its norm "
        f"from float32's, plain {of_plain:.2e} (limit {limit:.2e})"
    )
    numbers = {"losses": losses, "gradient": of_way, "plain_gradient": of_plain}
    is_near = losses <= BFLOAT16_LOSS and of_way <= limit
    return Line(check, verdict(is_near), result, numbers)


def check_float32(place: Place) -> list[Line]:
    """This device against the CPU, without TF32."""
    scale = place.scale
    gpt = shape_of(scale, scale.size, scale.short_T)
    settings = {"reweight": "uniform"}
    tokens = random_tokens(gpt, 2)
    device = default_device()
    here = losses_and_gradient(Case(gpt, 2, settings), tokens, device)
    on_cpu = settings | {"device": "cpu"}
    there = losses_and_gradient(Case(gpt, 2, on_cpu), tokens, torch.device("cpu"))
    return [judge_float32(f"float32, {device.type} against cpu", here, there)]


def judge_float32(check: str, one: Computed, other: Computed) -> Line:
    differences = {
        "losses": largest_difference(one.losses, other.losses),
        "weights": largest_difference(one.weights, other.weights),
        "gradient": distance(one.gradient, other.gradient),
    }
    listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    is_near = all(value <= FLOAT32 for value in differences.values())
    return Line(check, verdict(is_near), f"apart: {listed} (limit {FLOAT32:.0e})", differences)


def check_layouts(place: Place) -> list[Line]:
    """DDP and FSDP on all ranks against one process, in float32 with weights over all ranks."""
    rank, _, W = distributed.ranks()
    gpt = shape_of(place.scale, place.scale.size, place.scale.short_T)
    B = 2
    tokens = random_tokens(gpt, B * W)
    if rank == 0:  # before it joins the others, as if it were alone
        with mock.patch.dict(os.environ, distributed.SINGLE_PROCESS):
            alone = losses_and_gradient(Case(gpt, B, A=W), tokens, default_device())
    device = default_device()
    own_tokens = tokens[rank * B : (rank + 1) * B]
    lines = []
    for parallel in ("ddp", "fsdp"):
        case = Case(gpt, B, {"parallel": parallel}, W=W)
        together = losses_and_gradient(case, own_tokens, device)
        if rank == 0:
            lines.append(judge_float32(f"{parallel} on {W} against one process", together, alone))
    return lines


def check_network(place: Place) -> list[Line]:
    """An all-reduce of one number and of megabytes, as --doctor measures it under torchrun."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        doctor.network(TrainConfig())
    result = text.getvalue().removeprefix("network").strip()
    return [Line("all-reduce", verdict("GB/s" in result), result)]


def check_memory(place: Place) -> list[Line]:
    """The predicted peak of a step against the measured one, without compile, which needs less."""
    device = default_device()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    lines = []
    for name, (size, B, T, settings) in place.scale.memory_cases.items():
        case = Case(shape_of(place.scale, size, T), B, {"dtype": dtype, **settings})
        predicted = predict(case, device.type)
        if predicted > memory.USABLE * memory.device_bytes(device.type):
            line = Line(f"memory of {name}", NOT_HERE, f"{predicted / 1e9:.1f} GB do not fit")
        else:
            line = judge_memory(f"memory of {name}", predicted, measure(case)["peak"])
        lines.append(line)
        gc.collect()
    return lines


def judge_memory(check: str, predicted: float, measured: float) -> Line:
    ratio = predicted / measured
    result = (
        f"predicted {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB, "
        f"ratio {ratio:.3f} (limits {1 - MEMORY} to {1 + MEMORY})"
    )
    numbers = {"predicted": predicted, "measured": measured}
    return Line(check, verdict(abs(ratio - 1) <= MEMORY), result, numbers)


def check_resume(place: Place) -> list[Line]:
    """A run of four steps, and twice its last two again from its checkpoint, dropout included."""
    folders = [place.folder / name for name in ("unbroken", "again", "once_more")]
    unbroken, *resumed = folders
    train(place, unbroken)
    for folder in resumed:
        shutil.copytree(unbroken, folder)
        shutil.rmtree(checkpoint.checkpoint_folder(folder, 4))
    for folder in resumed:
        train(place, folder)
    return [judge_resume([outcome(folder) for folder in folders])]


# train.py with sums in a fixed order: attention's and the embedding's gradient on a GPU are
# otherwise added up as the threads come. What has no such form only warns.
TRAIN_IN_ORDER = (
    "import torch, train; "
    "torch.use_deterministic_algorithms(True, warn_only=True); "
    "train.run(train.main)"
)


def train(place: Place, out_dir: Path) -> None:
    """train.py in a process of its own, which goes on where out_dir is."""
    settings = {
        "block_size": 512,
        "dropout": 0.1,
        "recompute": "selective",
        "reweight": "linupper",
        "reweight_warmup_steps": 0,
        "warmup_steps": 0,
        "max_steps": 4,
        "checkpoint_interval": 2,
        "eval_windows": 1,
        "log_interval": 1,
        **place.scale.resumed,
        "data_dir": place.data,
        "out_dir": out_dir,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", TRAIN_IN_ORDER, *flags]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def outcome(out_dir: Path) -> dict[str, Tensor]:
    """The numbers of the last two steps, and the weights after them."""
    records = [line for line in read_lines(out_dir / "metrics.jsonl") if line["kind"] == "train"]
    keys = ("loss", "weighted_loss", "grad_norm")
    numbers = [[record[key] for key in keys] for record in records if record["step"] > 2]
    weights = checkpoint.load_model(checkpoint.checkpoint_folder(out_dir, 4)).state_dict()
    flat_weights = torch.cat([weight.flatten() for weight in weights.values()])
    return {"metrics": torch.tensor(numbers, dtype=torch.float64), "weights": flat_weights}


def judge_resume(outcomes: list[dict[str, Tensor]]) -> Line:
    """Bit for bit the same in the unbroken run and in both that were resumed."""
    unbroken, *resumed = outcomes
    differences = []
    for again in resumed:
        for name, values in unbroken.items():
            if not torch.equal(values, again[name]):
                differences.append(f"{name} {largest_difference(again[name], values):.1e}")
    result = f"apart: {', '.join(differences)}" if differences else "bit for bit the same, twice"
    return Line("resume with dropout and recompute", verdict(not differences), result)


def check_graphs(place: Place) -> list[Line]:
    """--compile graphs against on: five steps' losses and norms, then the time of both in turn.

    Without a GPU, which graphs need, on against off.
    """
    device = default_device()
    ways = ("on", "graphs") if device.type == "cuda" else ("off", "on")
    scale = place.scale
    gpt = shape_of(scale, scale.size, scale.T)
    B = micro_batch(gpt, scale.G, device, loss_chunk=0, copies=2)
    flags = ["--dtype=bfloat16", "--loss_chunk=0", "--warmup_steps=0", "--log_interval=5"]
    benches, numbers = [], []
    for way in ways:
        _, config = bench_config(place, scale.size, B, B, scale.T, [f"--compile={way}", *flags])
        one = Bench(config, gpt, device)
        benches.append(one)
        numbers.append(first_steps(one))
    blocks = [partial(one.block, "uniform") for one in benches]
    for block in blocks:
        block()
    seconds = take_turns(blocks, scale.rounds, device)[:, :, 0]
    for one in benches:
        one.stream.close()
    over = quartiles(seconds[:, 1] / seconds[:, 0])
    return [judge_steps(f"compile {ways[1]} against {ways[0]}", *numbers, over)]


def first_steps(bench: Bench) -> tuple[Tensor, Tensor]:
    """(STEPS_COMPARED, n) losses and (STEPS_COMPARED,) norms of the gradient."""
    losses, norms = [], []
    for _ in range(STEPS_COMPARED):
        result = bench.trainer.step(bench.steps, next(bench.stream))
        bench.steps += 1
        losses.append(result.losses.clone())
        norms.append(result.grad_norm.clone())
    return torch.stack(losses), torch.stack(norms)


def judge_steps(
    check: str,
    one: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    over: tuple[float, float, float],
) -> Line:
    """Losses and norms of both within BFLOAT16_STEP a step; the time is not judged."""
    losses, norms = map(largest_difference, other, one)
    limit = STEPS_COMPARED * BFLOAT16_STEP
    low, middle, high = over
    result = (
        f"apart: losses {losses:.1e}, norms {norms:.1e} (limit {limit:.1e}); "
        f"time {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
    )
    numbers = {"losses": losses, "norms": norms, "time": over}
    return Line(check, verdict(losses <= limit and norms <= limit), result, numbers)


def check_trace(place: Place) -> list[Line]:
    """Three steps with their parts named, for https://ui.perfetto.dev."""
    path = place.out / "trace.json.gz"
    scale = place.scale
    rows, _ = bench(place, scale.size, scale.G, scale.T, rounds=1, steps=3, profile=path)
    parts = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in rows[0]["parts_s"].items())
    result = f"{path}, {path.stat().st_size / 1e6:.1f} MB; ms a step: {parts}"
    return [Line(f"trace of {scale.size}", PASS, result)]


def check_speed(place: Place, row: tuple[str, int, int, bool]) -> list[Line]:
    """Uniform steps of a size; row: see SPEEDS_ON_GPU."""
    size, G, T, at_once = row
    _, line = bench(place, size, G, T, at_once=at_once)
    return [line]


# Stages by name, the most informative first.
CHECKS = {
    "versions": Stage(check_versions, 60),
    "step": Stage(check_step, 180),
    "compile": Stage(check_compile, 120),
    "layouts": Stage(check_layouts, 120, all_ranks=True),
    "network": Stage(check_network, 60, all_ranks=True),
    "memory": Stage(check_memory, 60),
    "float32": Stage(check_float32, 60),
    "resume": Stage(check_resume, 150),
    "graphs": Stage(check_graphs, 120),
    "trace": Stage(check_trace, 90),
}
# Stage -> size, G, T, at_once. The published batch of 124m belongs to the stage "step".
SPEEDS_ON_GPU = {
    "speed_124m_large": ("124m", 64, 1024, True),
    "speed_355m": ("355m", 48, 512, False),
    "speed_774m": ("774m", 48, 512, False),
    "speed_1.5b": ("1.5b", 48, 512, False),
    "speed_355m_large": ("355m", 64, 1024, True),
    "speed_774m_large": ("774m", 64, 1024, True),
    "speed_1.5b_large": ("1.5b", 64, 1024, True),
}
SPEEDS_ON_CPU = {"speed_2x2x32": ("2x2x32", 8, 16, True)}


def stages(on_cpu: bool) -> dict[str, Stage]:
    speeds = SPEEDS_ON_CPU if on_cpu else SPEEDS_ON_GPU
    by_speed = {name: Stage(partial(check_speed, row=row), 200) for name, row in speeds.items()}
    return CHECKS | by_speed


# What stages share


def verdict(is_good: bool) -> str:
    return PASS if is_good else FAIL


def shape_of(scale: Scale, size: str, T: int) -> GPTConfig:
    """A model without dropout, with the vocabulary that train.py gives it (recipe.model_shape)."""
    vocab_size = 64 * -(-scale.n_vocab // 64)
    return replace(named_shape(size), block_size=T, vocab_size=vocab_size, dropout=0.0)


def micro_batch(
    gpt: GPTConfig,
    G: int,
    device: torch.device,
    dtype: str = "bfloat16",
    loss_chunk: int = memory.CHUNK,
    copies: int = 1,
    at_once: bool = False,
) -> int:
    """The largest divisor of G that fits on the device by prediction; NotHere if none does.

    copies: of the model and its activations at the same time. at_once: a step is one micro-batch.
    """
    usable = memory.USABLE * memory.device_bytes(device.type)
    divisors = [B for B in range(G, 0, -1) if G % B == 0]
    for B in divisors:
        A = 1 if at_once else G // B
        settings = {"device": device.type, "dtype": dtype, "loss_chunk": loss_chunk}
        needed = copies * sum(memory.predict(gpt, B, A, **settings).values())
        if needed <= usable:
            return B
    raise NotHere(f"memory: 1 x {gpt.block_size} needs {needed / 1e9:.1f} GB by prediction")


def random_tokens(gpt: GPTConfig, n: int) -> Tensor:
    """(n, T + 1) on the CPU, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(gpt.vocab_size, (n, gpt.block_size + 1), generator=generator)


def losses_and_gradient(case: Case, tokens: Tensor, device: torch.device) -> Computed:
    """One forward and backward pass of a fresh model, the same one for every case of its shape.

    (n, T + 1) tokens of this rank. All ranks call it and get the losses and weights of all.
    """
    torch.manual_seed(1)
    trainer, batch = make_trainer(case, device)
    x, y = tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)
    losses, weights = trainer.backward(0, x, y, View(), batch.pairs)
    gradients = [distributed.full(p.grad).flatten() for p in trainer.raw.parameters()]
    return Computed(
        distributed.gather(losses), distributed.gather(weights), torch.cat(gradients).cpu()
    )


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in norms."""
    return ((a - b).norm() / b.norm()).item()


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| over the largest |b|."""
    return ((a.cpu() - b.cpu()).abs().max() / b.abs().max().cpu()).item()


def bench_config(
    place: Place, size: str, G: int, B: int, T: int, flags: list[str]
) -> tuple[Namespace, TrainConfig]:
    """bench.py's own flags and the config of a step of G sequences."""
    own = ["--sizes", size, "--micro_batch", str(B), "--micro_steps", str(G // B)]
    args, config = read_flags([*own, f"--block_size={T}", *flags])
    sizes = {"micro_batch_size": B, "global_batch_size": G, "data_dir": str(place.data)}
    return args, replace(config, **sizes)


def bench(
    place: Place,
    size: str,
    G: int,
    T: int,
    strategies: list[str] | None = None,
    rounds: int = 3,
    steps: int = 5,
    profile: Path | None = None,
    at_once: bool = False,
) -> tuple[list[dict], Line]:
    """bench.py's rows, uniform first, and a line about the speed of the uniform step.

    steps: of a round. at_once: all sequences of a step that fit, up to G, in one micro-batch.
    """
    device = default_device()
    gpt = shape_of(place.scale, size, T)
    B = micro_batch(gpt, G, device, at_once=at_once)
    G = B if at_once else G
    flags = [f"--rounds={rounds}", f"--log_interval={steps}"]
    args, config = bench_config(place, size, G, B, T, flags)
    args.reweight, args.profile = strategies or [], profile
    rows = bench_shape(config, size, args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peaks = {
        "of the datasheet": datasheet_flops(name, config.dtype),
        "of a measured matrix product": matmul_flops(device, config.dtype),
    }
    accumulated = "" if G == B else f" as {G // B} micro-batches of {B}"
    check = f"speed of {size}, {G} x {T}{accumulated}"
    return rows, speed_line(check, rows[0], peaks, config)


def speed_line(check: str, row: dict, peaks: dict[str, float | None], config: TrainConfig) -> Line:
    parts = [f"{row['tokens_per_s']:,.0f} tokens/s", f"{1e3 * row['step_s']:.1f} ms a step"]
    for name, peak in peaks.items():
        if peak:
            utilization = row["flops_per_s"] / peak
            parts.append(f"MFU {100 * utilization:.1f} % {name} ({peak / 1e12:.4g} TFLOP/s)")
    if row["peak_memory_bytes"]:
        parts.append(f"peak {row['peak_memory_bytes'] / 1e9:.1f} GB")
    parts.append(f"{config.dtype}, compile {config.compile}, no dropout")
    return Line(check, PASS, ", ".join(parts), {"row": row, "peaks": peaks})


# Running them


class Settings(NamedTuple):
    """From the environment. picked: the stages to run, in their order."""

    on_cpu: bool
    picked: dict[str, Stage]
    budget_s: float
    out: Path


def main() -> None:
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        header = (ROOT / "scripts/check_node.sh").read_text().split("\nset -")[0]
        print(re.sub("^# ?", "", header.partition("\n")[2], flags=re.MULTILINE))
        return
    if arguments and (len(arguments) != 2 or arguments[0] not in CHECKS | stages(is_on_cpu())):
        raise UserError(f"{arguments[0]}: no arguments; settings are variables (--help lists them)")
    if arguments:
        return work(arguments[0], Path(arguments[1]))
    settings = read_settings()
    machine = describe_machine(settings.on_cpu)
    settings.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = run_all(settings, machine)
    text = report(machine, results)
    write_text(settings.out / "report.md", text)
    content = {"machine": machine, "stages": results}
    write_text(settings.out / "report.json", json.dumps(content, indent=1))
    print(f"\n{text}\nIn {settings.out}: report.md, report.json, and a log of each stage")
    if any(line["verdict"] == FAIL for result in results.values() for line in result["lines"]):
        sys.exit(1)


def is_on_cpu() -> bool:
    return os.environ.get("CHECK") == "cpu"


def read_settings() -> Settings:
    check = os.environ.get("CHECK", "")
    if check not in ("", "cpu"):
        raise UserError(f"CHECK={check}: must be cpu, or not set")
    if not check and not torch.cuda.is_available():
        raise UserError(
            f"no GPU that torch {torch.__version__} can use; python train.py --doctor says more, "
            "and CHECK=cpu runs the same code on a CPU"
        )
    default_budget = 520 if check or torch.cuda.device_count() == 1 else 900
    budget = os.environ.get("BUDGET_S") or str(default_budget)
    if not re.fullmatch("[1-9][0-9]{0,6}", budget):
        raise UserError(f"BUDGET_S={budget}: must be a number of seconds, such as {default_budget}")
    picked = pick(stages(bool(check)), os.environ.get("STAGES", ""))
    out = Path(os.environ.get("OUT") or "runs/check_node").expanduser()
    return Settings(bool(check), picked, float(budget), out)


def pick(known: dict[str, Stage], names: str) -> dict[str, Stage]:
    """The stages of a list with commas; none: all. A name stands for those it begins, up to a _."""
    if not names:
        return known
    picked = set()
    for name in filter(None, re.split("[, ]+", names)):
        meant = [stage for stage in known if stage == name or stage.startswith(f"{name}_")]
        if not meant:
            hint = nearest(name, known)
            raise UserError(
                f"STAGES={names}: no stage {name!r}{hint}; known are {', '.join(known)}"
            )
        picked.update(meant)
    return {name: stage for name, stage in known.items() if name in picked}


def describe_machine(on_cpu: bool) -> dict:
    """What results depend on; those of two machines are not put into one table."""
    n_gpus = 0 if on_cpu else torch.cuda.device_count()
    about = versions()
    return {
        "cards": [torch.cuda.get_device_name(i) for i in range(n_gpus)],
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) if n_gpus else None,
        "cuda": torch.version.cuda if n_gpus else None,
        "cpu_cores": os.cpu_count(),
        "node": os.uname().nodename,
        "commit": about["git_commit"],
        **about["versions"],
    }


def run_all(settings: Settings, machine: dict) -> dict[str, dict]:
    """The results of all stages that have one, those of the picked stages that lacked one new."""
    deadline = time.monotonic() + settings.budget_s
    results = {}
    for name, stage in stages(settings.on_cpu).items():
        path = settings.out / f"{name}.json"
        earlier = read_earlier(path, machine)
        if name in settings.picked and (not earlier or earlier["try_again"]):
            earlier = attempt(name, stage, settings, machine, deadline)
            write_text(path, json.dumps(earlier, indent=1))
            for line in earlier["lines"]:
                print(f"{line['verdict']:<9}{name}: {line['check']}: {line['result']}", flush=True)
        if earlier:
            results[name] = earlier
    return results


def read_earlier(path: Path, machine: dict) -> dict:
    """The result of an earlier start; empty if there is none."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    other = [key for key in machine if earlier["machine"].get(key) != machine[key]]
    if other:
        was, now = earlier["machine"].get(other[0]), machine[other[0]]
        raise UserError(
            f"{path} was measured with {other[0]} {was}, here it is {now}; give another folder "
            f"(OUT={path.parent}_2), or delete this one"
        )
    return earlier


def attempt(name: str, stage: Stage, settings: Settings, machine: dict, deadline: float) -> dict:
    """Run a stage in a process of its own; its lines, or one that says why there are none.

    try_again: it came to no verdict of its own, so that a second start runs it once more.
    """
    began = time.monotonic()
    left = deadline - began
    n_gpus = len(machine["cards"])
    command, lines, try_again = [], [], False
    if stage.all_ranks and n_gpus == 1:
        lines = [Line(name, NOT_HERE, "one GPU")]
    elif left < stage.limit_s / 2:
        lines = [Line(name, NOT_HERE, f"time: {max(0, left):.0f} s of BUDGET_S left")]
        try_again = True
    else:
        path = settings.out / f"tmp_{name}.json"
        command = [str(SCRIPT), name, str(path)]
        if stage.all_ranks:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, f"--nproc_per_node={n_gpus or 2}", "--", *command]
        limit_s = min(stage.limit_s, left)
        print(f"== {name} (at most {limit_s:.0f} s)", flush=True)
        path.unlink(missing_ok=True)  # of a start that was interrupted
        code = run_process(command, settings, name, limit_s)
        if path.exists():
            lines = [Line(*values) for values in json.loads(path.read_text())]
            path.unlink()
        if code is None and limit_s < stage.limit_s:
            lines.append(Line(name, NOT_HERE, "time: stopped when BUDGET_S was used up"))
        elif code != 0:
            log = settings.out / f"{name}.log"
            reason = f"no end after {limit_s:.0f} s" if code is None else why(code, log)
            lines.append(Line(name, FAIL, f"{reason}; see {log}"))
        try_again = code != 0
    return {
        "lines": [line._asdict() for line in lines],
        "seconds": round(time.monotonic() - began, 1),
        "command": command,
        "try_again": try_again,
        "machine": machine,
    }


def run_process(command: list[str], settings: Settings, name: str, limit_s: float) -> int | None:
    """The exit code of a stage; None if it had to be stopped. Its output goes to its log."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Stages compile the same code, and so does a second start.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.out.absolute() / "compiled"))
    if settings.on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with open(settings.out / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a stage and its children. torchrun's ranks are in sessions of their own: it ends them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def why(code: int, log: Path) -> str:
    """The first line of a log that names an error, or how the process ended."""
    text = log.read_text(errors="replace")
    errors = re.findall(
        r"^(?:\[rank\d+\]:)? *((?:[\w.]*(?:Error|Exception)|error)\b.*)$", text, re.M
    )
    if errors:
        return errors[0][:300]
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def work(name: str, path: Path) -> None:
    """Run a stage here; rank 0 writes its lines."""
    scale = ON_CPU if is_on_cpu() else ON_GPU
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        write_random_shards(data, len(DOMAINS), scale.n_vocab)
        place = Place(scale, data, path.parent, Path(folder))
        try:
            lines = stages(is_on_cpu())[name].work(place)
        except NotHere as reason:
            lines = [Line(name, NOT_HERE, str(reason))]
    if distributed.ranks().rank == 0:
        write_text(path, json.dumps(lines))
    distributed.cleanup()


# The report


def report(machine: dict, results: dict[str, dict]) -> str:
    """A Markdown table under what it was measured with."""
    cards = machine["cards"]
    card = f"{len(cards)} x {cards[0]}" if cards else f"CPU, {machine['cpu_cores']} cores"
    cuda = f", driver {machine['driver']}, CUDA {machine['cuda']}" if cards else ""
    commit = (machine["commit"] or "unknown")[:12]
    settings = [f"{key}={os.environ[key]}" for key in SETTINGS if os.environ.get(key)]
    rows = []
    for name, result in results.items():
        for line in result["lines"]:
            text = line["result"].replace("|", "/")
            rows.append(table_row([name, line["check"], line["verdict"], text]))
    verdicts = [line["verdict"] for result in results.values() for line in result["lines"]]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in (PASS, FAIL, NOT_HERE))
    seconds = sum(result["seconds"] for result in results.values())
    return "\n".join(
        [
            f"{card}{cuda}, torch {machine['torch']}, Python {machine['python']}, commit {commit}",
            "",
            f"`{' '.join([*settings, 'bash scripts/check_node.sh'])}`: {counts}, {seconds:.0f} s",
            "",
            "| stage | check | verdict | result |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


SETTINGS = ("CHECK", "STAGES", "BUDGET_S", "OUT")


if __name__ == "__main__":
    run(main)
