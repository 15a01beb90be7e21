"""The recipe of a run: every setting, what it may be, and what makes two runs the same."""

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from cli import UserError
from corpus.manifest import data_hash
from data import MIXTURES, probabilities
from families import SIZES, Shape, resized
from reweight import NORMS, STRATEGIES

# Of matrix products. tf32: float32 numbers, multiplied with 10 bits of precision on tensor cores.
DTYPES = ("float32", "tf32", "bfloat16")
# Which samples a step's weights go to: their own; any sample; any sample of the same domain.
CONTROLS = ("none", "shuffled", "within")


@dataclass(frozen=True)
class TrainConfig:
    """All settings; each is a flag of the same name."""

    # Model and data: what is trained, and on what.
    model: Literal[("auto", *SIZES)] = "auto"  # size; auto: that of --init_from, otherwise 124m
    n_layer: int = 0  # layers of the model; 0: those of --model
    n_head: int = 0  # attention heads; 0: those of --model
    n_embd: int = 0  # width, a multiple of the heads; 0: that of --model
    init_from: str = ""  # start from gpt2, gpt2-medium, a Hugging Face folder or a run; "": random
    block_size: int = 512  # tokens per sequence
    dropout: float = 0.1  # probability; the paper uses 0.1; a Llama has none
    data_dir: str = "data/slimpajama"  # folder made by prepare_slimpajama.py
    out_dir: str = ""  # run folder; "": runs/MODEL_MIXTURE_REWEIGHT_seedSEED
    mixture: str = "uniform"  # of domains: uniform, natural, doge, doremi, c4cc or cc=0.5,c4=0.5
    data_order: Literal["shuffled", "file"] = "shuffled"  # of a domain's windows; published: file
    seed: int = 42  # of the initial weights, the order of the data and dropout

    # Reweighting: how much each sample of a step counts.
    reweight: Literal[tuple(STRATEGIES)] = "uniform"  # strategy (STRATEGIES, reweight.py)
    r: float = 0.4  # temperature of the weights; the larger, the closer to uniform
    r_start: float = 0.0  # r right after the uniform steps, from where it moves to --r; 0: --r
    r_steps: int = 0  # steps that r takes from --r_start to --r
    r_schedule: Literal["linear", "cosine"] = "linear"  # shape of that move
    delta: float = 1.0  # normalized losses lie in [-delta, delta]
    reweight_norm: Literal[tuple(NORMS)] = "minmax"  # what a loss is compared with (reweight.py)
    max_weight: float = 0.0  # cap on a weight, as a multiple of 1 / global batch; 0: no cap
    reweight_unit: Literal["token", "byte"] = "token"  # losses are compared per token or byte
    reweight_ref: str = ""  # subtract a reference's losses: a run folder, or eval/score_windows.py
    reweight_control: Literal[CONTROLS] = "none"  # shuffle the weights; within: in each domain
    reweight_warmup_steps: int = 1_000  # uniform steps before the strategy starts
    reweight_scope: Literal["global", "micro"] = "global"  # weights per global or micro-batch

    # Batch and optimizer: AdamW or Muon with a cosine schedule.
    global_batch_size: int = 32  # sequences per optimizer step, over all ranks and micro-steps
    micro_batch_size: int = 0  # sequences per rank and forward pass; 0: global batch / ranks
    max_steps: int = 20_000  # optimizer steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, at AdamW's rate
    learning_rate: float = 5e-4  # highest learning rate
    min_lr: float = 1e-4  # learning rate at the last step
    warmup_steps: int = 500  # steps of warm-up, from 1e-7
    warmup_shape: Literal["linear", "quadratic"] = "linear"  # quadratic: steep, then flat
    weight_decay: float = 0.01  # on matrices only
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    on_nonfinite: Literal["skip", "stop"] = "skip"  # on a loss or gradient not finite
    skip_grad_norm: float = 0.0  # skip steps above this many median gradient norms; 0: none

    # Evaluation, checkpoints and logs: intervals are in optimizer steps.
    eval_interval: int = 500  # steps between evaluations
    eval_windows: int = 256  # validation windows per domain, always the same ones
    checkpoint_interval: int = 1_000  # steps between checkpoints
    keep_checkpoints: int = 2  # keep this many of the newest checkpoints
    keep_every: int = 0  # also keep the checkpoints at multiples of this many steps; 0: none
    resume: Literal["auto", "never"] = "auto"  # continue the run in --out_dir, or refuse to
    allow_data_change: bool = False  # continue a run although its data has changed
    log_interval: int = 10  # steps between log lines
    record_samples: int = 0  # write each sample's loss and weight every this many steps; 0: never
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is written in any case

    # Machine: how it is computed; results stay the same up to rounding.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, mps or cpu
    dtype: Literal[("auto", *DTYPES)] = "auto"  # of matrix products; auto: bfloat16 on cuda
    compile: Literal["auto", "on", "graphs", "off"] = "auto"  # auto: on cuda; graphs: CUDA graphs
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp"] = "ddp"  # ddp: each rank holds the model
    loss_chunk: int = -1  # rows of logits computed at once; 0: all; -1: all if they fit, else 2,048
    recompute: Literal["none", "selective", "full"] = "none"  # activations recomputed in backward
    timeout_s: float = 600.0  # seconds a rank waits for the others; a warning comes after 1/20
    dry_run: bool = False  # print the plan and exit
    doctor: bool = False  # print what a bug report needs, check this machine and the data, and exit

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                check_range(field.name, value)
        check_combinations(self)


POSITIVE = {
    "block_size",
    "r",
    "delta",
    "global_batch_size",
    "max_steps",
    "learning_rate",
    "eval_interval",
    "eval_windows",
    "checkpoint_interval",
    "keep_checkpoints",
    "log_interval",
    "timeout_s",
}

# Keys that say how a run is carried out, not what it computes.
EXECUTION_KEYS = {
    "out_dir",
    "micro_batch_size",
    "eval_interval",
    "eval_windows",
    "resume",
    "checkpoint_interval",
    "keep_checkpoints",
    "keep_every",
    "log_interval",
    "wandb",
    "device",
    "compile",
    "dry_run",
    "doctor",
    "on_nonfinite",
    "record_samples",
    "parallel",
    "loss_chunk",
    "recompute",
    "allow_data_change",
    "timeout_s",
}
# A resumed run may also be longer, and its data folder and reference may have moved: hashes of
# their contents are compared.
MAY_CHANGE = EXECUTION_KEYS | {"max_steps", "data_dir", "reweight_ref"}


def check_range(name: str, value: float) -> None:
    """UserError where a number is too small or too large for its key."""
    lowest = -1 if name == "loss_chunk" else 0
    if name in POSITIVE and not value > 0:
        raise UserError(f"--{name} {value}: must be above 0")
    if not value >= lowest:  # also refuses nan
        raise UserError(f"--{name} {value}: must be {lowest} or more")
    bits = 63 if name == "seed" else 31
    if value >= 2**bits:
        raise UserError(f"--{name} {value}: must be below 2**{bits}")


def check_combinations(config: TrainConfig) -> None:
    """UserError where keys are out of range or contradict each other."""
    for name in ("dropout", "beta1", "beta2"):
        if getattr(config, name) >= 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be below 1")
    probabilities(config.mixture)  # raises if it is none
    if config.init_from and any(own_shape(config)):
        raise UserError(
            f"--n_layer {config.n_layer} --n_head {config.n_head} --n_embd {config.n_embd}: "
            "--init_from has a shape of its own; leave one of the two out"
        )
    if config.min_lr > config.learning_rate:
        raise UserError(
            f"--min_lr {config.min_lr}: must not be above --learning_rate {config.learning_rate}"
        )
    if 0 < config.max_weight < 1:
        raise UserError(
            f"--max_weight {config.max_weight}: must be at least 1 (the weights' mean), "
            "or 0 for no cap"
        )
    if 0 < config.skip_grad_norm <= 1:
        raise UserError(
            f"--skip_grad_norm {config.skip_grad_norm}: must be above 1 (the median), "
            "or 0 to skip none"
        )
    if config.optimizer == "muon" and config.parallel != "ddp":
        raise UserError(
            f"--optimizer muon --parallel {config.parallel}: Muon needs whole matrices on every "
            "rank; use --parallel ddp or --optimizer adamw"
        )
    if bool(config.r_start) != bool(config.r_steps):
        raise UserError(
            f"--r_start {config.r_start} --r_steps {config.r_steps}: give both, "
            "or none for a constant r"
        )
    check_temperatures(config)


def check_temperatures(config: TrainConfig) -> None:
    """UserError where the weights' divisions are not finite in float32 (reweight.py)."""
    if torch.tensor(1.0).div(config.delta).isinf():
        raise UserError(
            f"--delta {config.delta}: 1 / delta is not finite in float32; use a larger --delta"
        )
    largest = torch.tensor(max(1.0, config.delta))  # value that a strategy gives a loss
    temperatures = {"r": config.r, "r_start": config.r_start or config.r}
    for name, r in temperatures.items():
        if largest.div(r).isinf():
            raise UserError(
                f"--{name} {r} --delta {config.delta}: the larger of 1 and delta, divided by "
                f"{name}, is not finite in float32; use a larger --{name} or a smaller --delta"
            )


def settle(config: TrainConfig, world_size: int) -> TrainConfig:
    """Replace "auto", 0 and "" by values and check what depends on the machine.

    loss_chunk = -1 stays: it depends on the model's shape (runtime/memory.py).
    """
    check_nodes(config, world_size)
    device = settle_device(config)
    micro_batch_size = settle_micro_batch(config, world_size)
    settled = {"device": device, "micro_batch_size": micro_batch_size}
    if config.model == "auto":
        source = Path(config.init_from).name
        settled["model"] = f"from_{source}" if config.init_from else "124m"
    if config.model in SIZES and SIZES[config.model].family == "llama":
        if config.dropout == TrainConfig.dropout:  # the default; LlamaConfig refuses any other
            settled["dropout"] = 0.0
    if config.dtype == "auto":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        settled["dtype"] = "bfloat16" if has_bf16 else "float32"
    if config.compile == "auto":
        settled["compile"] = "on" if device == "cuda" else "off"
    config = replace(config, **settled)
    if not config.out_dir:
        name = f"{config.model}_{config.mixture}_{config.reweight}_seed{config.seed}"
        config = replace(config, out_dir=f"runs/{name}")
    return config


def settle_device(config: TrainConfig) -> str:
    """The device type to use; UserError where this machine lacks what the config asks for."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    device = config.device
    if device == "auto":
        device = next(name for name, is_available in available.items() if is_available)
    if not available[device]:
        raise UserError(f"--device {device}: there is none here; use --device auto or cpu")
    if config.dtype == "tf32" and device != "cuda":
        raise UserError(f"--dtype tf32 --device {device}: needs cuda; use --dtype float32")
    if config.compile == "graphs" and (device != "cuda" or config.parallel != "ddp"):
        raise UserError(
            f"--compile graphs --device {device} --parallel {config.parallel}: CUDA graphs need "
            "cuda and parameters that stay in place (ddp); use --compile on"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"{torch.cuda.device_count()} GPUs here, but torchrun started {processes} processes; "
            "lower --nproc_per_node"
        )
    if device == "cuda":
        # The first question to a GPU opens a context on the current one, which is else the first.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
            # Blocks that grow: without them, batches of several sizes leave holes in the memory.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return device


def check_nodes(config: TrainConfig, world_size: int) -> None:
    """UserError if hsdp cannot put a copy of the model on each node."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if config.parallel == "hsdp" and world_size % ranks_per_node:
        raise UserError(
            f"--parallel hsdp: {ranks_per_node} ranks on this node, but {world_size} in all; start "
            "as many ranks on every node, or use --parallel fsdp"
        )


def settle_micro_batch(config: TrainConfig, world_size: int) -> int:
    """Sequences per rank and forward pass; UserError if the global batch does not divide."""
    global_batch = config.global_batch_size
    micro_batch = config.micro_batch_size or global_batch // world_size
    if micro_batch and global_batch % (micro_batch * world_size) == 0:
        return micro_batch
    if global_batch % world_size:
        remedy = f"a multiple of {world_size}"
    else:
        remedy = f"--micro_batch_size {global_batch // world_size}"
    raise UserError(
        f"--global_batch_size {global_batch} is not a multiple of {micro_batch or 1} sequences x "
        f"{world_size} ranks; use {remedy}"
    )


def identity(
    config: TrainConfig, manifest: dict, world_size: int, reference: str | None = None
) -> dict:
    """What must stay the same for a run to continue: settings, data, samples weighted together.

    reference: sha256 of the reference model.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    weighted_together = 0  # with scope "global" the layout does not matter
    if config.reweight_scope == "micro":
        weighted_together = config.micro_batch_size * world_size
    return {
        **settings,
        "mixture probabilities": probabilities(config.mixture),
        "tokenizer": manifest["tokenizer"]["sha256"][:16],
        "data": data_hash(manifest),
        "reference": reference,
        "samples weighted together": weighted_together,
    }


def with_added_keys(saved: dict) -> dict:
    """An identity saved by an earlier version, with the keys that were added to identities since.

    The numbers of a mixture are taken from today's MIXTURES.
    """
    added = {
        "n_layer": 0,
        "n_head": 0,
        "n_embd": 0,
        "data_order": "shuffled",
        "reweight_unit": "token",
        "reweight_control": "none",
        "optimizer": "adamw",
        "warmup_shape": "linear",
        "reference": None,
        "mixture probabilities": None,
    }
    mixture = saved.get("mixture")
    if mixture in MIXTURES:
        added["mixture probabilities"] = probabilities(mixture)
    return added | saved


def model_shape(config: TrainConfig, manifest: dict) -> Shape:
    """The shape of a model that is trained from scratch.

    The vocabulary is padded to a multiple of 64, which makes the head's matrix product fast; the
    rows that fill it up are never a target.
    """
    shape = SIZES.get(config.model, SIZES["124m"])
    return replace(
        resized(shape, *own_shape(config)),
        block_size=config.block_size,
        dropout=config.dropout,
        vocab_size=64 * math.ceil(manifest["tokenizer"]["n_vocab"] / 64),
    )


def own_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Layers, heads and width that are set by keys of their own; 0: not set."""
    return config.n_layer, config.n_head, config.n_embd


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate: from 1e-7 up over warmup_steps, then a cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        risen = step / config.warmup_steps
        if config.warmup_shape == "quadratic":
            risen = 1 - (1 - risen) ** 2
        return 1e-7 + (config.learning_rate - 1e-7) * risen
    decay_steps = max(1, config.max_steps - config.warmup_steps)
    progress = (step - config.warmup_steps) / decay_steps
    height = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.learning_rate - config.min_lr) * height


def r_at(step: int, config: TrainConfig) -> float:
    """Temperature of a step's weights: r, or on the way from r_start to r."""
    if not config.r_start:
        return config.r
    progress = (step - config.reweight_warmup_steps) / config.r_steps
    progress = min(1.0, max(0.0, progress))
    if config.r_schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.r_start + (config.r - config.r_start) * progress
