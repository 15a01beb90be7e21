"""Pretrain GPT-2 with loss-based sample reweighting (Sow et al., ICLR 2025).

    python train.py config/tiny_cpu.py --reweight linupper                       # a laptop
    torchrun --nproc_per_node 8 train.py config/gpt2_124m_linupper.py            # a node
    python train.py config/gpt2_124m_linupper.py --dry_run                       # says what it would do

Arguments are config files (their assignments) and flags; later ones win. A second start of the same command continues.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import checkpoint
import data
import distributed
from configurator import parse
from distributed import print0
from errors import UserError, run
from eval.perplexity import evaluate, validation_windows
from metrics import Metrics
from model import GPT, SIZES, GPTConfig
from reweight import STRATEGIES, sample_weights, weight_statistics


@dataclass(frozen=True)
class TrainConfig:
    # model and data
    model: Literal[tuple(SIZES)] = "124m"  # size, a row of SIZES in model.py
    block_size: int = 512  # tokens per sequence
    dropout: float = 0.1  # probability, as published
    data_dir: str = "data/slimpajama"  # folder made by prepare_slimpajama.py
    out_dir: str = ""  # run folder; empty: runs/MODEL_MIXTURE_REWEIGHT_seedSEED
    mixture: Literal[tuple(data.MIXTURES)] = "uniform"  # probabilities of the domains, a row of MIXTURES in data.py
    seed: int = 42  # of weights, data order and dropout
    # reweighting
    reweight: Literal[tuple(STRATEGIES)] = "uniform"  # strategy, an entry of STRATEGIES in reweight.py
    r: float = 0.4  # temperature of the weights; large: towards the plain mean
    delta: float = 1.0  # normalised losses lie in [-delta, delta]
    reweight_warmup_steps: int = 1_000  # uniform steps before the strategy starts
    reweight_scope: Literal["global", "micro"] = "global"  # weights over the global batch, or over each micro-step
    # batch and optimizer
    global_batch_size: int = 32  # sequences per optimizer step, over all ranks and micro-steps
    micro_batch_size: int = 0  # sequences per rank and forward pass; 0: global_batch_size / ranks, no accumulation
    max_steps: int = 20_000  # optimizer steps
    learning_rate: float = 5e-4  # peak
    min_lr: float = 1e-4  # at the last step, by cosine
    warmup_steps: int = 500  # linear, from 1e-7
    weight_decay: float = 0.01  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    # evaluation, checkpoints, logs
    eval_interval: int = 500  # steps
    eval_windows: int = 256  # fixed validation windows per domain
    checkpoint_interval: int = 1_000  # steps
    keep_checkpoints: int = 2  # the newest ones; older ones are deleted
    resume: Literal["auto", "never"] = "auto"  # continue the run in out_dir, or refuse a folder that holds one
    log_interval: int = 10  # steps
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is written in any case
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 on cuda
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on cuda
    dry_run: bool = False  # print the plan and exit

    def __post_init__(self):
        positive = ("block_size", "r", "delta", "global_batch_size", "max_steps", "learning_rate", "eval_interval",
                    "eval_windows", "checkpoint_interval", "keep_checkpoints", "log_interval")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (value > 0 if field.name in positive else value >= 0):
                allowed = "above 0" if field.name in positive else "0 or more"
                raise UserError(f"--{field.name} {value}: must be {allowed}")
        for name in ("dropout", "beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be below 1")


# A resumed run may change these; everything else is part of what is being measured.
MAY_CHANGE = {"data_dir", "out_dir", "micro_batch_size", "max_steps", "eval_interval", "eval_windows", "resume",
              "checkpoint_interval", "keep_checkpoints", "log_interval", "wandb", "device", "dtype", "compile",
              "dry_run"}


def settle(config: TrainConfig, world_size: int) -> TrainConfig:
    """Put values in place of "auto", 0 and "" and check what depends on the machine."""
    device = config.device
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[device]:
        raise UserError(f"--device {device}: there is none here; use --device auto or cpu")
    if device == "cuda" and distributed.ranks().local_rank >= torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} GPUs here, but torchrun started more processes; "
                        "lower --nproc_per_node")
    G, B = config.global_batch_size, config.micro_batch_size or config.global_batch_size // world_size
    if B == 0 or G % (B * world_size):
        fits = [b for b in range(1, G // world_size + 1) if G % (b * world_size) == 0]
        raise UserError(f"--global_batch_size {G} is not a multiple of {B or 1} sequences x {world_size} ranks; " +
                        (f"use --micro_batch_size {fits[-1]}" if fits else f"use a multiple of {world_size}"))
    pick = {"dtype": "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32",
            "compile": "on" if device == "cuda" else "off"}
    out_dir = config.out_dir or f"runs/{config.model}_{config.mixture}_{config.reweight}_seed{config.seed}"
    return replace(config, device=device, micro_batch_size=B, out_dir=out_dir,
                   **{key: value for key, value in pick.items() if getattr(config, key) == "auto"})


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step: linear from 1e-7 over warmup_steps, then a cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        return 1e-7 + (config.learning_rate - 1e-7) * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on biases and LayerNorm."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=True)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int,
               config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on this rank's n = G / W sequences x, y (n, T); nothing waits for the device.

    -> (n,) sample losses in nats, (n,) weights (over all ranks they sum to 1), gradient norm before clipping.
    """
    n, B, (rank, _, W) = len(x), config.micro_batch_size, distributed.ranks()
    starts = range(0, n, B)  # of the A = n / B micro-batches
    strategy = config.reweight if step >= config.reweight_warmup_steps else "uniform"

    def sample_losses(i: int) -> Tensor:  # (B,)
        # Dropout noise belongs to the step and the micro-batch's first sample: both passes, any W and A, and a resumed
        # run see the same.
        torch.manual_seed(((config.seed * 1_000_003 + step) * 1_000_003 + rank * n + i) % 2**63)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return model(x[i:i + B], y[i:i + B]).mean(1)

    def own_weights(losses: Tensor) -> Tensor:  # (m,) -> (m,), weighted among the m of every rank
        m = len(losses)
        if strategy == "uniform":  # needs nobody else's losses
            return torch.full_like(losses, 1 / (W * m))
        return sample_weights(distributed.gather(losses), strategy, config.r, config.delta)[rank * m:(rank + 1) * m]

    weights = None
    if config.reweight_scope == "global" and len(starts) > 1 and strategy != "uniform":
        with torch.no_grad():  # a pass of its own: the weights need all G losses before the first backward
            weights = own_weights(torch.cat([sample_losses(i) for i in starts]))
    used = []
    for i in starts:
        with distributed.no_sync(model, skip=i != starts[-1]):
            losses = sample_losses(i)
            w = own_weights(losses.detach()) / len(starts) if weights is None else weights[i:i + B]
            # The one place for the factor W: gradients are averaged over the ranks, we want the sum of their parts.
            (W * (w * losses).sum()).backward()
        used.append(torch.stack([losses.detach(), w]))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return *torch.cat(used, dim=1), grad_norm


def batches(split: data.Split, sampler: data.DomainSampler, config: TrainConfig, first_step: int) -> Iterator:
    """(x, y, pairs) of each step: this rank's (n, T) sequences and the global batch's (G, 2) domains and windows."""
    rank, _, W = distributed.ranks()
    n = config.global_batch_size // W

    def read(step: int):
        pairs = sampler.draw(step)
        x, y, _ = data.read_batch(split, pairs[rank * n:(rank + 1) * n], pin=config.device == "cuda")
        return x, y, pairs

    return data.prefetch(read, range(first_step, config.max_steps))


def resume_from(config: TrainConfig, data_hash: str) -> tuple[Path | None, int]:
    """The checkpoint to continue from and its step, or (None, 0); UserError if it belongs to another experiment."""
    folder = checkpoint.find_latest(config.out_dir)
    if folder is None:
        return None, 0
    if config.resume == "never":
        raise UserError(f"{config.out_dir} already holds a run; choose another --out_dir, or use --resume auto")
    state = checkpoint.read_state(folder)
    there = {**state["config"], "data": state["data_hash"]}
    here = {**asdict(config), "data": data_hash}
    differ = [f"{key} {there[key]} there, {here[key]} here" for key in here
              if key not in MAY_CHANGE and there.get(key) != here[key]]
    if differ:
        raise UserError(f"{config.out_dir} holds another run: {'; '.join(differ)}; choose another --out_dir")
    if state["step"] > config.max_steps:
        raise UserError(f"{folder} is past --max_steps {config.max_steps}; choose another --out_dir or more steps")
    return folder, state["step"]


def describe(config: TrainConfig, gpt: GPTConfig, sampler: data.DomainSampler, train: data.Split, W: int) -> str:
    """The plan in a few lines."""
    with torch.device("meta"):
        n = GPT(gpt).n_parameters()
    A = config.global_batch_size // (W * config.micro_batch_size)
    tokens = config.global_batch_size * config.block_size
    p = np.diff(sampler.cumulative, prepend=0)
    epochs = ", ".join(f"{d} {p[i]:.3f} x {config.max_steps * config.global_batch_size / train.n_windows[i]:.2f}"
                       for i, d in enumerate(train.domains) if p[i])
    second_pass = A > 1 and config.reweight != "uniform" and config.reweight_scope == "global"
    return (f"model      {config.model}: {n:,} parameters, vocabulary {gpt.vocab_size}, {16 * n / 1e9:.2f} GB per rank "
            f"for weights, gradients and AdamW (activations come on top)\n"
            f"batch      {config.global_batch_size} sequences x {config.block_size} tokens = {tokens:,} tokens a step: "
            f"{W} ranks x {A} micro-steps x {config.micro_batch_size} sequences\n"
            f"run        {config.max_steps:,} steps, {tokens * config.max_steps:,} tokens, {config.device}, "
            f"{config.dtype}, compile {config.compile}, in {config.out_dir}\n"
            f"reweight   {config.reweight}, r {config.r}, after {config.reweight_warmup_steps:,} uniform steps" +
            (", with a first pass for the losses (about a third more compute)" if second_pass else "") +
            f"\nmixture    {config.mixture} (probability x windows drawn / windows there): {epochs}")


def versions() -> dict:
    """What a result depends on besides the config."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent)
    return {"git_commit": git.stdout.strip() or None, "command": " ".join(sys.argv),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}


def main() -> None:
    rank, _, W = distributed.ranks()
    config = settle(parse(TrainConfig, __doc__, sys.argv[1:]), W)
    manifest = data.read_manifest(config.data_dir)
    train, val = (data.Split(config.data_dir, manifest, split, config.block_size) for split in ("train", "val"))
    sampler = data.DomainSampler(data.mixture_weights(config.mixture, train), train.n_windows,
                                 config.global_batch_size, config.seed)
    val_windows = validation_windows(val, config.eval_windows)
    # A multiple of 64 makes the head's matrix product fast; the padding rows are never a target.
    gpt = replace(SIZES[config.model], block_size=config.block_size, dropout=config.dropout,
                  vocab_size=-(-manifest["tokenizer"]["n_vocab"] // 64) * 64)
    print0(describe(config, gpt, sampler, train, W))
    fingerprint, out_dir = data.data_hash(manifest), Path(config.out_dir)
    resumed, start = resume_from(config, fingerprint)
    if config.dry_run:
        return
    if start == config.max_steps:
        print0(f"{out_dir} is finished: step {start:,} of {config.max_steps:,}; nothing to do")
        return

    device = distributed.setup(config.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    raw = GPT(gpt).to(device)
    optimizer = make_optimizer(raw, config)
    if resumed:
        checkpoint.load(resumed, raw, optimizer)
        print0(f"resumed from {resumed}")
    if config.compile == "on":
        raw.compile()
    model = distributed.data_parallel(raw, device)
    metrics = None
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(out_dir / "config.json", json.dumps({**asdict(config), **versions()}, indent=1))
        metrics = Metrics(out_dir, asdict(config), start, config.max_steps)

    stream, logged_step, logged_time = batches(train, sampler, config, start), start, time.perf_counter()
    for step in range(start, config.max_steps + 1):  # one round more than steps, so that the last one is evaluated too
        last = step == config.max_steps
        if (last or step % config.eval_interval == 0) and not (resumed and step == start):
            began = time.perf_counter()
            record = evaluate(raw, val, val_windows, config.micro_batch_size, config.dtype)
            if metrics:
                metrics.log({"kind": "eval", "step": step, **record})
            logged_time += time.perf_counter() - began  # evaluation is not training time
        if (last or step % config.checkpoint_interval == 0) and step > start and metrics:
            began = time.perf_counter()
            checkpoint.save(out_dir, step, raw, optimizer, {"config": asdict(config), "data_hash": fingerprint,
                            "tokenizer_sha256": manifest["tokenizer"]["sha256"]}, config.keep_checkpoints)
            logged_time += time.perf_counter() - began
        if last:
            break

        x, y, pairs = next(stream)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)  # (n, T)
        losses, weights, grad_norm = train_step(model, optimizer, x, y, step, config)
        done = step + 1
        if done % config.log_interval == 0 or done == config.max_steps:
            losses, weights = distributed.gather(losses), distributed.gather(weights)  # (G,), in draw order
            record = weight_statistics(losses, weights, torch.from_numpy(pairs[:, 0].copy()), train.domains)
            if not math.isfinite(record["loss"]):
                raise UserError(f"the loss is {record['loss']} at step {done}; start again from {out_dir}/checkpoints "
                                "with a lower --learning_rate or a larger --warmup_steps")
            tokens, now = config.global_batch_size * config.block_size, time.perf_counter()
            if metrics:
                metrics.log({"kind": "train", "step": done, **record, "lr": lr_at(step, config),
                             "grad_norm": grad_norm.item(), "tokens": done * tokens,
                             "tokens_per_s": (done - logged_step) * tokens / (now - logged_time)})
            logged_step, logged_time = done, now
    if metrics:
        metrics.close()
    print0(f"finished: {out_dir}; per-domain table: python eval/perplexity.py --run {out_dir}")
    del model  # the wrapper of the gradients must go before the process group does
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
