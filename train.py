"""Pretrain GPT-2 with loss-based sample reweighting (Sow et al., ICLR 2025).

    python train.py config/tiny_cpu.py --reweight linupper                       # a laptop
    torchrun --nproc_per_node 8 train.py config/gpt2_124m_linupper.py            # a node
    python train.py config/gpt2_124m_linupper.py --dry_run                       # says what it would do
    python train.py --doctor                                                     # what a bug report needs

Arguments are config files (their assignments) and flags; later files win over earlier ones, flags over files. A second
start of the same command continues.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import checkpoint
import data
import distributed
import doctor
import memory
import pretrained
from configurator import parse
from distributed import print0
from errors import UserError, run
from eval.perplexity import evaluate, validation_windows
from manifest import data_hash, read_manifest
from metrics import Metrics, versions
from model import GPT, SIZES
from plan import describe
from preemption import FAILED, Stop, command
from reweight import NORMS, STRATEGIES, domain_means, sample_weights, track_domain_losses
from telemetry import Guard, Telemetry


@dataclass(frozen=True)
class TrainConfig:
    # model and data
    model: Literal[("auto", *SIZES)] = "auto"  # size, a row of SIZES in model.py; auto: that of init_from, or 124m
    init_from: str = ""  # weights to start from: gpt2, gpt2-medium, ..., a Hugging Face folder, a run; empty: random
    block_size: int = 512  # tokens per sequence
    dropout: float = 0.1  # probability, as published
    data_dir: str = "data/slimpajama"  # folder made by prepare_slimpajama.py
    out_dir: str = ""  # run folder; empty: runs/MODEL_MIXTURE_REWEIGHT_seedSEED
    mixture: Literal[tuple(data.MIXTURES)] = "uniform"  # probabilities of the domains, a row of MIXTURES in data.py
    seed: int = 42  # of weights, data order and dropout
    # reweighting
    reweight: Literal[tuple(STRATEGIES)] = "uniform"  # strategy, an entry of STRATEGIES in reweight.py
    r: float = 0.4  # temperature of the weights; large: towards the plain mean
    r_start: float = 0.0  # 0: r is constant; else r goes from here to r over r_steps, after the uniform steps
    r_steps: int = 0  # steps from r_start to r
    r_schedule: Literal["linear", "cosine"] = "linear"  # way from r_start to r
    delta: float = 1.0  # normalised losses lie in [-delta, delta]
    reweight_norm: Literal[tuple(NORMS)] = "minmax"  # what a loss is compared with, an entry of NORMS in reweight.py
    max_weight: float = 0.0  # largest weight of a sample, times the batch; at least 1; 0: no cap
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
    on_nonfinite: Literal["skip", "stop"] = "skip"  # loss or gradient not finite: skip the step, or stop before it
    skip_grad_norm: float = 0.0  # skip a step whose gradient norm is above so many of its running medians; 0: log it
    # evaluation, checkpoints, logs
    eval_interval: int = 500  # steps
    eval_windows: int = 256  # fixed validation windows per domain
    checkpoint_interval: int = 1_000  # steps
    keep_checkpoints: int = 2  # the newest ones; older ones are deleted
    keep_every: int = 0  # steps; checkpoints of its multiples are never deleted; 0: none
    resume: Literal["auto", "never"] = "auto"  # continue the run in out_dir, or refuse a folder that holds one
    allow_data_change: bool = False  # continue it although the data is not what it was
    log_interval: int = 10  # steps
    record_samples: int = 0  # every so many steps, loss and weight of each sample to samples.bin; 0: never
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is written in any case
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 on cuda
    compile: Literal["auto", "on", "graphs", "off"] = "auto"  # torch.compile; graphs: CUDA graphs too; auto: on cuda
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several ranks: a whole model on each, or 1/ranks of it
    loss_chunk: int = -1  # logits' rows that exist at a time; 0: all; -1: 2,048 where all would not fit in memory
    recompute: Literal["none", "selective", "full"] = "none"  # in backward, of a block: all but matrix products, or all
    timeout_s: float = 600.0  # seconds that a rank waits for the others before all end; after a 20th it is told
    dry_run: bool = False  # print the plan and exit

    def __post_init__(self):
        positive = ("block_size", "r", "delta", "global_batch_size", "max_steps", "learning_rate", "eval_interval",
                    "eval_windows", "checkpoint_interval", "keep_checkpoints", "log_interval", "timeout_s")
        for field in fields(self):
            value, lowest = getattr(self, field.name), -1 if field.name == "loss_chunk" else 0
            if isinstance(value, int | float) and not (value > 0 if field.name in positive else value >= lowest):
                allowed = "above 0" if field.name in positive else f"{lowest} or more"
                raise UserError(f"--{field.name} {value}: must be {allowed}")
            if isinstance(value, int | float) and value >= 2**(bits := 63 if field.name == "seed" else 31):
                raise UserError(f"--{field.name} {value}: must be below 2**{bits}")
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr {self.min_lr}: must not be above --learning_rate {self.learning_rate}")
        for name in ("dropout", "beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be below 1")
        if 0 < self.max_weight < 1:
            raise UserError(f"--max_weight {self.max_weight}: must be at least 1 (the weights' mean), or 0 for no cap")
        if 0 < self.skip_grad_norm <= 1:
            raise UserError(f"--skip_grad_norm {self.skip_grad_norm}: must be above 1 (the median), or 0 to skip none")
        if bool(self.r_start) != bool(self.r_steps):
            raise UserError(f"--r_start {self.r_start} --r_steps {self.r_steps}: give both, or none for a constant r")


# A resumed run may change these; everything else is part of what is being measured.
MAY_CHANGE = {"data_dir", "out_dir", "micro_batch_size", "max_steps", "eval_interval", "eval_windows", "resume",
              "checkpoint_interval", "keep_checkpoints", "keep_every", "log_interval", "wandb", "device", "compile",
              "dry_run", "on_nonfinite", "record_samples", "parallel", "loss_chunk", "recompute", "allow_data_change",
              "timeout_s"}


def settle(config: TrainConfig, world_size: int) -> TrainConfig:
    """Put values in place of "auto", 0 and "" and check what depends on the machine."""
    device = config.device
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[device]:
        raise UserError(f"--device {device}: there is none here; use --device auto or cpu")
    if config.compile == "graphs" and (device != "cuda" or config.parallel == "fsdp"):
        raise UserError(f"--compile graphs --device {device} --parallel {config.parallel}: CUDA graphs need cuda and "
                        "parameters that stay in place (ddp); use --compile on")
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and on_node > torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} GPUs here, but torchrun started {on_node} processes; "
                        "lower --nproc_per_node")
    G, B = config.global_batch_size, config.micro_batch_size or config.global_batch_size // world_size
    if B == 0 or G % (B * world_size):
        raise UserError(f"--global_batch_size {G} is not a multiple of {B or 1} sequences x {world_size} ranks; use " +
                        (f"a multiple of {world_size}" if G % world_size else f"--micro_batch_size {G // world_size}"))
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    pick = {"dtype": "bfloat16" if bf16 else "float32", "compile": "on" if device == "cuda" else "off"}
    pick["model"] = f"from_{Path(config.init_from).name}" if config.init_from else "124m"
    config = replace(config, **{key: value for key, value in pick.items() if getattr(config, key) == "auto"})
    out_dir = config.out_dir or f"runs/{config.model}_{config.mixture}_{config.reweight}_seed{config.seed}"
    return replace(config, device=device, micro_batch_size=B, out_dir=out_dir)


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step: linear from 1e-7 over warmup_steps, then a cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        return 1e-7 + (config.learning_rate - 1e-7) * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def r_at(step: int, config: TrainConfig) -> float:
    """Temperature of a step's weights: r, or on the way from r_start to r."""
    if not config.r_start:
        return config.r
    done = min(1.0, max(0.0, (step - config.reweight_warmup_steps) / config.r_steps))
    if config.r_schedule == "cosine":
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return config.r_start + (config.r - config.r_start) * done


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on biases and LayerNorm."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=True)


def make_trainable(raw: GPT, config: TrainConfig, device: torch.device) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """The model as the settings want it, compiled and data-parallel, and its optimizer; `raw` is changed in place."""
    raw.loss_chunk, raw.recompute = config.loss_chunk, config.recompute
    if config.compile != "off":
        raw.compile(mode="reduce-overhead" if config.compile == "graphs" else None)
    if config.compile == "graphs":  # gradients of their own: a micro-step's would lie where the next one writes
        for parameter in raw.parameters():
            parameter.grad = torch.zeros_like(parameter)
    model = distributed.data_parallel(raw, raw.h, device, config.parallel, config.dtype)
    return model, make_optimizer(raw, config)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, step: int,
               config: TrainConfig, expected: Tensor | None = None, limit: Tensor | float = math.inf
               ) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on this rank's n = G / W sequences x, y (n, T); nothing waits for the device.

    expected: (n,) losses that the samples' own are compared with before they are weighted. -> (n,) sample losses in
    nats, (n,) weights (over all ranks they sum to 1), gradient norm before clipping. If that is not finite or above
    `limit`, the step was skipped (optimizer.found_inf is 1): parameters and moments are as before, on all ranks.
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

    def own_weights(losses: Tensor, i: int = 0) -> Tensor:  # (m,) from sample i on -> (m,), among the m of every rank
        m = len(losses)
        if expected is not None:
            losses = losses - expected[i:i + m]
        everyones = sample_weights(distributed.gather(losses), strategy, r_at(step, config), config.delta,
                                   config.reweight_norm, config.max_weight)
        return everyones[rank * m:(rank + 1) * m]

    weights = None  # not known before the forward pass
    if strategy == "uniform":  # needs nobody else's losses
        weights = torch.full((n,), 1 / (W * n), device=x.device)
    elif config.reweight_scope == "global" and len(starts) > 1:
        with torch.no_grad():  # a pass of its own: the weights need all G losses before the first backward
            weights = own_weights(torch.cat([sample_losses(i) for i in starts]))
    used = []
    for i in starts:
        with distributed.no_sync(model, skip=i != starts[-1]):
            losses = sample_losses(i)
            w = own_weights(losses.detach(), i) / len(starts) if weights is None else weights[i:i + B]
            # 0 * loss is NaN where a loss is not finite, so that the gradient is NaN on every rank after its average.
            # The one place for the factor W: gradients are averaged over the ranks, we want the sum of their parts.
            (W * ((w + 0 * losses.detach()) * losses).sum()).backward()
        used.append(torch.stack([losses.detach(), w]))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    grad_norm = distributed.full(grad_norm)
    # Read on the device: 1 makes the fused step change nothing.
    optimizer.found_inf = (~(grad_norm.isfinite() & (grad_norm <= limit))).float()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=config.compile != "graphs")
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


def identity(config: TrainConfig, manifest: dict, W: int) -> dict:
    """What must be the same for a run to go on: data, settings, and with scope "micro" who is weighted with whom."""
    settings = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    together = config.micro_batch_size * W if config.reweight_scope == "micro" else 0
    return {**settings, "tokenizer": manifest["tokenizer"]["sha256"][:16], "data": data_hash(manifest),
            "samples weighted together": together}


def main() -> None:
    if "--doctor" in sys.argv:
        return doctor.examine(parse(TrainConfig, __doc__, [arg for arg in sys.argv[1:] if arg != "--doctor"]))
    rank, _, W = distributed.ranks()
    config = settle(parse(TrainConfig, __doc__, sys.argv[1:]), W)
    manifest = read_manifest(config.data_dir)
    train, val = (data.Split(config.data_dir, manifest, split, config.block_size) for split in ("train", "val"))
    sampler = data.DomainSampler(data.mixture_weights(config.mixture, train), train.n_windows,
                                 config.global_batch_size, config.seed)
    val_windows = validation_windows(val, config.eval_windows)
    out_dir, this = Path(config.out_dir), identity(config, manifest, W)
    resumed, state = checkpoint.find_resumable(out_dir, this, config.resume, config.max_steps,
                                               accept=["data"] if config.allow_data_change else [])
    start, evaluated_before = state.get("step", 0), state.get("evaluated", bool(resumed))
    # A multiple of 64 makes the head's matrix product fast; the padding rows are never a target.
    gpt = replace(SIZES.get(config.model, SIZES["124m"]), block_size=config.block_size, dropout=config.dropout,
                  vocab_size=-(-manifest["tokenizer"]["n_vocab"] // 64) * 64)
    if config.init_from:
        gpt = pretrained.source_config(str(resumed or config.init_from), gpt, config.model, manifest["tokenizer"])
    config = memory.settle_loss_chunk(config, gpt, W)
    print0(describe(config, gpt, sampler, train, W))
    if config.dry_run:
        return
    if start == config.max_steps and evaluated_before:
        if rank == 0:  # a kill may have come between the last checkpoint and the deletion of older ones
            checkpoint.tidy(out_dir)
            checkpoint.prune(out_dir, start, config.keep_checkpoints, config.keep_every)
        print0(f"{out_dir} is finished: step {start:,} of {config.max_steps:,}; nothing to do")
        return

    device = distributed.setup(config.device, config.timeout_s)
    distributed.describe_network(device)
    stop, watchdog = Stop(config.timeout_s), distributed.Watchdog(start, config.timeout_s)
    starts = distributed.gather(torch.tensor([start], device=device)).tolist()
    if len(set(starts)) > 1:
        raise UserError(f"the ranks found checkpoints of different steps ({sorted(set(starts))}); --out_dir {out_dir} "
                        "must be one folder that all nodes see")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    raw = (pretrained.load_source(config.init_from, gpt) if config.init_from and not resumed else GPT(gpt)).to(device)
    model, optimizer = make_trainable(raw, config, device)
    tracked = torch.zeros(2, len(train.domains), device=device)  # for reweight_norm = "domain"
    guard = Guard(device, config.skip_grad_norm, config.on_nonfinite)
    if resumed:
        distributed.set_state(raw, optimizer, checkpoint.read_tensors(resumed, gpt))
        tracked.copy_(torch.tensor(state["domain_losses"]))
        guard.norms.copy_(torch.tensor(state["grad_norms"]))
        print0(f"resumed from {resumed}")
    telemetry = Telemetry(train, out_dir, start, config.record_samples, config.on_nonfinite)
    metrics = writer = None
    if rank == 0:
        metrics = Metrics(out_dir, {**asdict(config), "world_size": W, "identity": this}, start, config.max_steps)
        writer = checkpoint.Writer(out_dir, config.keep_checkpoints, config.keep_every)
        stop.parts = [writer, metrics, telemetry]
    tokens, logged_step, logged_time = config.global_batch_size * config.block_size, start, time.perf_counter()

    def log(record: dict) -> None:
        if metrics:
            metrics.log(record)

    def report(done: int) -> None:
        """Log what the steps since the last report did."""
        nonlocal logged_step, logged_time
        statistics, odd = telemetry.flush()
        for record in odd:
            log(record)
        now = time.perf_counter()
        if statistics:
            log({"kind": "train", "step": done, **statistics, "lr": lr_at(done - 1, config),
                 "r": r_at(done - 1, config), "tokens": done * tokens,
                 "tokens_per_s": (done - logged_step) * tokens / (now - logged_time)})
        logged_step, logged_time = done, now

    def save(step: int, evaluated: bool = True) -> None:
        if writer:
            writer.wait()
        tensors = distributed.get_state(raw, optimizer)
        if rank == 0:
            stop.reason = stop.reason or train.changed() or val.changed()
        if rank == 0 and not stop.reason:
            writer.save(step, tensors, {
                "gpt": asdict(gpt), "max_steps": config.max_steps, "identity": this, "evaluated": evaluated,
                "data_dir": config.data_dir, "tokenizer_sha256": manifest["tokenizer"]["sha256"],
                "domain_losses": tracked.tolist(), "grad_norms": guard.norms.tolist(), "versions": versions(),
            })

    stream = batches(train, sampler, config, start)
    for step in range(start, config.max_steps + 1):  # one round more than steps, so that the last one is evaluated too
        began, last = time.perf_counter(), step == config.max_steps
        watchdog.at(step, 0)
        halt = stop()
        if halt and telemetry.pending:
            report(step)
        if len(telemetry.skipped) >= telemetry.may_skip:
            before = telemetry.skipped[0] - 1
            save(before)  # a skipped step changed nothing, so this is the state before the first of them
            stop.reason = stop.reason or telemetry.why_stopped(out_dir)
            break
        evaluated = (step == start and evaluated_before) or not (last or step % config.eval_interval == 0)
        if not evaluated and not halt:
            record = evaluate(raw, val, val_windows, config.micro_batch_size, config.dtype, stop)
            evaluated, halt = bool(record), stop.agreed
            if evaluated:
                log({"kind": "eval", "step": step, **record})
                if histograms := telemetry.histograms():
                    log({"kind": "histogram", "step": step, **histograms})
        due = last or halt or step % config.checkpoint_interval == 0 and not telemetry.skipped
        if due and halt != FAILED and (step > start or resumed and evaluated and not evaluated_before):
            save(step, evaluated)
        logged_time += time.perf_counter() - began  # evaluation and saving are not training time
        if last or halt:
            break

        watchdog.at(step, 1)
        x, y, pairs = next(stream)
        watchdog.at(step, 2)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)  # (n, T)
        expected = None
        if config.reweight_norm == "domain":
            domain = torch.from_numpy(pairs[:, 0].copy()).to(device, non_blocking=True)  # (G,)
            expected = domain_means(tracked)[domain[rank * len(x):(rank + 1) * len(x)]]
        limits, done = guard.limits(step), step + 1
        losses, weights, grad_norm = train_step(model, optimizer, x, y, step, config, expected, limits[0])
        taken = optimizer.found_inf == 0  # a skipped step changes nothing
        guard.add(step, grad_norm, taken)
        if config.reweight_norm == "domain":
            after = track_domain_losses(tracked, distributed.gather(losses), domain)
            tracked = torch.where(taken, after, tracked)
        telemetry.add(done, pairs, losses, weights, grad_norm, limits)
        if done % config.log_interval == 0 or done % config.checkpoint_interval == 0 or done == config.max_steps:
            report(done)
    if writer:
        writer.wait()
    if metrics:
        metrics.close()
    watchdog.close()
    del model  # the wrapper of the gradients must go before the process group does
    distributed.cleanup()
    if stop.failure:
        raise UserError(stop.failure)
    if halt and not (last and evaluated):
        print0(f"stopped by {stop.name} at step {step:,}; resume with: {command()}")
        return
    print0(f"finished: {out_dir}; per-domain table: python eval/perplexity.py --run {out_dir}")


if __name__ == "__main__":
    run(distributed.reported(main))
