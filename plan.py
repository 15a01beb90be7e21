"""What a run is going to do, in a few lines: printed at its start and by --dry_run."""

import numpy as np
import torch

import data
import memory
from model import GPT, GPTConfig


def describe(config, gpt: GPTConfig, sampler: data.DomainSampler, train: data.Split, W: int) -> str:
    """The plan of a settled TrainConfig on W ranks."""
    with torch.device("meta"):
        n = GPT(gpt).n_parameters()
    A = config.global_batch_size // (W * config.micro_batch_size)
    tokens = config.global_batch_size * config.block_size
    p = np.diff(sampler.cumulative, prepend=0)
    epochs = ", ".join(f"{d} {p[i]:.3f} x {config.max_steps * config.global_batch_size / train.n_windows[i]:.2f}"
                       for i, d in enumerate(train.domains) if p[i])
    parts = {name: size / 1e9 for name, size in memory.of_run(config, gpt, W).items() if size}
    weights = [config.reweight]
    if config.reweight != "uniform":
        way = f" (from {config.r_start}, {config.r_schedule}, {config.r_steps:,} steps)" if config.r_start else ""
        weights += [f"r {config.r}{way}", config.reweight_norm, f"after {config.reweight_warmup_steps:,} uniform steps"]
        weights += [f"at most {config.max_weight} / G"] if config.max_weight else []
        if A > 1 and config.reweight_scope == "global":
            weights.append("with a first pass for the losses (about a third more compute)")
    return (f"model      {config.model}: {n:,} parameters, vocabulary {gpt.vocab_size}\n"
            f"memory     {sum(parts.values()):.2f} GB per rank predicted for a step, without compile: " +
            ", ".join(f"{name} {size:.2f}" for name, size in parts.items()) +
            f" (loss_chunk {config.loss_chunk}, recompute {config.recompute})\n"
            f"batch      {config.global_batch_size} sequences x {config.block_size} tokens = {tokens:,} tokens a step: "
            f"{W} ranks ({config.parallel}) x {A} micro-steps x {config.micro_batch_size} sequences\n"
            f"run        {config.max_steps:,} steps, {tokens * config.max_steps:,} tokens, {config.device}, "
            f"{config.dtype}, compile {config.compile}, in {config.out_dir}\n"
            f"reweight   {', '.join(weights)}\n"
            f"mixture    {config.mixture} (probability x windows drawn / windows there): {epochs}")
