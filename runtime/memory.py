"""Before a run starts: the peak memory of a step, and the plan that --dry_run prints.

The prediction is per rank and in bytes, from the shapes alone; docs/memory.md derives it. What
torch.compile saves of it is known less well.

n = B * T tokens of a micro-batch, C channels, H heads, F width of the MLP (GPT-2: 4 C), K width of
the keys (GPT-2: C), V vocabulary, L layers, A micro-steps, W ranks, e bytes of an element in matrix
products (2 or 4).
"""

import os
from dataclasses import replace
from functools import cache

import torch

from data import RunData
from families import Shape, build_empty
from recipe import TrainConfig
from runtime import distributed

CHUNK = 2_048  # rows of logits computed at once where loss_chunk is chosen here
USABLE = 0.9  # of a device's memory; the rest is for CUDA's context, workspaces and fragmentation

H100_FLOPS = 989e12  # FLOP/s of dense matrix products in bfloat16
SHARE_OF_PEAK = 0.4  # assumed where a plan gives hours


def predict(
    gpt: Shape,
    B: int,
    A: int = 1,
    W: int = 1,
    parallel: str = "ddp",
    device: str = "cuda",
    dtype: str = "bfloat16",
    loss_chunk: int = 0,
    recompute: str = "none",
    optimizer: str = "adamw",
    compiled: bool = False,
) -> dict[str, float]:
    """Bytes of each part at the moment of a step at which their sum is largest."""
    L, C, T = gpt.n_layer, gpt.n_embd, gpt.block_size
    n = B * T
    fsdp, bf16 = parallel != "ddp" and W > 1, dtype == "bfloat16"
    e = 2 if bf16 else 4
    shards = distributed.n_shards(parallel, W)
    block_matrices, block_vectors, mlp_in, mlp_out, root = parameters(gpt)
    table = gpt.vocab_size * C  # of the token embedding
    N = L * (block_matrices + block_vectors) + root
    kept, saved, work = block_activations(gpt, device, bf16, recompute)
    if compiled:  # which also recomputes norms and activation functions
        kept = min(kept, kept_by_compiler(gpt, e))

    # Gradients before backward (of an earlier micro-step, or DDP's buckets), and at its end.
    gradients_before = 4 * N / shards if A > 1 or (W > 1 and not fsdp) else 0
    gradients_after = max(gradients_before, 4 * (N - root) / shards + 4 * root)
    # The head's part of the embedding's gradient, until the embedding's own part joins it.
    gradients_after += 4 * table if gradients_before and not fsdp else 0
    copied_blocks = L if recompute == "none" else 1  # of float32 weights, by autocast
    bf16_copies = 2 * block_matrices * copied_blocks if bf16 and not fsdp else 0
    mask_bytes = 1 if device == "cuda" else 4  # of a number in the first dropout
    mask = mask_bytes if gpt.dropout > 0 else 0

    at_the_head = {
        "activations": n * (L * kept + (4 + e + mask) * C + 8),
        "logits": head(gpt, n, bf16, loss_chunk, compiled),
        "gradients": gradients_before,
        "bfloat16 weights": bf16_copies,
    }
    in_the_last_block = {  # the first one in backward
        "activations": n * ((L - 1) * kept + saved + work),
        "bfloat16 weights": bf16_copies,
        "gradients": gradients_before + 4 * table + (0 if fsdp else 4 * mlp_out),
    }
    missing = 4 * (block_matrices - mlp_out)  # its MLP's second matrix comes first
    if gradients_before or fsdp:
        missing = 0
    in_the_first_block = {
        "activations": n * (saved + work),
        "bfloat16 weights": 2 * block_matrices if bf16_copies else 0,
        "gradients": gradients_after - missing,
    }
    at_the_embedding = {"activations": n * 4 * C, "gradients": gradients_after + 4 * table}
    moments = [at_the_head, in_the_last_block, in_the_first_block, at_the_embedding]
    always = {"weights and moments": 12 * N / shards}
    if optimizer == "muon":
        always["weights and moments"] -= 4 * L * block_matrices  # it keeps one moment, not two
        moments.append(update_by_muon(L * block_matrices, mlp_in, C, N))
    if fsdp:  # embeddings and ln_f; this block and the next one, two blocks' gradients
        fetched_blocks = 4 if parallel != "zero2" else L + 2
        always["fetched"] = 4 * root + fetched_blocks * e * block_matrices
    return always | max(moments, key=lambda parts: sum(parts.values()))


@cache
def parameters(gpt: Shape) -> tuple[int, int, int, int, int]:
    """Of a block's matrices, of its vectors, of its MLP's first and second matrix, and outside."""
    model = build_empty(replace(gpt, n_layer=1))
    block = model.h[0]
    n_block = sum(p.numel() for p in block.parameters())
    matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    mlp_in, mlp_out = block.mlp.c_fc.weight.numel(), block.mlp.c_proj.weight.numel()
    return matrices, n_block - matrices, mlp_in, mlp_out, model.n_parameters() - n_block


def update_by_muon(n_matrices: int, n_largest: int, C: int, N: int) -> dict[str, float]:
    """Bytes in the update: parameters of the blocks' matrices, of the largest one and of all."""
    copies = 8 * n_matrices  # of the matrices and their momentum, for a step that is skipped
    newton_schulz = 8 * n_largest + 4 * C * C  # of the largest matrix
    return {"gradients": 4 * N, "Muon": copies + newton_schulz}


def block_activations(gpt: Shape, device: str, bf16: bool, recompute: str) -> tuple[int, int, int]:
    """Bytes per token of a block: kept until its backward, present in it, temporary in it."""
    if gpt.family == "llama":
        return llama_activations(gpt, device, bf16, recompute)
    C, H, T = gpt.n_embd, gpt.n_head, gpt.block_size
    e = 2 if bf16 else 4
    has_noise = gpt.dropout > 0
    # In float32: the inputs of both LayerNorms and their statistics, and a number per attention
    # head. In e: the inputs of c_attn, c_proj, c_fc and c_proj (4 C), q, k, v, and gelu's input (4
    # C).
    saved = (8 + 14 * e) * C + 16 + 4 * H
    if has_noise and device == "cuda":  # masks of one byte
        saved += 2 * C
    elif has_noise:  # attention with dropout is not fused on a CPU: three (B, H, T, T)
        saved += 2 * e * C + 12 * H * T - 4 * H
    kept = saved
    if recompute == "full":
        kept = 4 * C
    elif recompute == "selective":
        kept = (4 + 10 * e) * C + 4 * H
        if has_noise:
            kept -= e * C + 4 * H
    work = (4 + 4 * e) * C  # gradients of the block's output and of gelu's input
    if bf16:
        work += 2 * C if recompute == "none" else 4 * C
    if recompute == "selective" or (recompute == "full" and has_noise):
        work += e * C
    return kept, saved, work


def llama_activations(gpt: Shape, device: str, bf16: bool, recompute: str) -> tuple[int, int, int]:
    """block_activations of a Llama."""
    C, H, F = gpt.n_embd, gpt.n_head, gpt.n_ffn
    K = C // H * gpt.n_kv_head
    e = 2 if bf16 else 4
    # In float32: the inputs of both RMSNorms and their statistics, and a number per attention
    # head. In e: the inputs of c_attn, c_proj and c_fc (3 C), q, k, v before and after they are
    # turned (2 C + 3 K), c_fc's output (2 F), silu's (F) and its product, the input of c_proj (F).
    saved = (8 + 5 * e) * C + 3 * e * K + 4 * e * F + 8 + 4 * H
    if device != "cuda":  # not fused there: RMSNorm also keeps its result before the gain
        saved += 8 * C
    kept = saved
    if recompute == "full":
        kept = 4 * C
    elif recompute == "selective":
        kept = (4 + 4 * e) * C + 2 * e * (K + F) + 4 * H
    work = 4 * C + 3 * e * F  # gradients of the block's output, of up, and of silu and its input
    if bf16:
        work += 2 * C if recompute == "none" else 4 * C
    return kept, saved, work


def kept_by_compiler(gpt: Shape, e: int) -> int:
    """Bytes per token that torch.compile keeps of a block until its backward.

    The block's input in float32; in e: q, k, v, the results of attention and of its product, the
    input of the activation function. A number per attention head.
    """
    C = gpt.n_embd
    if gpt.family == "llama":
        K = C // gpt.n_head * gpt.n_kv_head
        return (4 + 3 * e) * C + 2 * e * (K + gpt.n_ffn) + 4 * gpt.n_head
    return (4 + 9 * e) * C + 4 * gpt.n_head


def head(gpt: Shape, n: int, bf16: bool, chunk: int, compiled: bool = False) -> int:
    """Bytes for the losses of n tokens: three float32 per logit, or the gradient of the weight.

    Compiled and in one piece: four bytes per logit in all.
    """
    V = gpt.vocab_size
    table = V * gpt.n_embd
    bf16_copy = 2 * table if bf16 else 0
    if 0 < chunk < n:
        logits = 12 * V * chunk + 4 * table + bf16_copy
        two_gradients_and_sum = 12 * table
        gradients = 4 * V * chunk + 8 * table + bf16_copy
        return max(logits, gradients, two_gradients_and_sum)
    if compiled:
        return 4 * V * n + bf16_copy
    return max(12 * V * n, 4 * V * n + 4 * table) + bf16_copy


def predict_for_config(config: TrainConfig, gpt: Shape, W: int) -> dict[str, float]:
    """`predict` for a settled config."""
    B = config.micro_batch_size
    A = config.global_batch_size // (W * B)
    return predict(
        gpt,
        B,
        A,
        W,
        config.parallel,
        config.device,
        config.dtype,
        config.loss_chunk,
        config.recompute,
        config.optimizer,
        config.compile != "off",
    )


def settle_loss_chunk(config: TrainConfig, gpt: Shape, W: int) -> TrainConfig:
    """Replace loss_chunk = -1 by 0, or by CHUNK where all logits would not fit."""
    if config.loss_chunk != -1:
        return config
    all_at_once = replace(config, loss_chunk=0)
    needed = sum(predict_for_config(all_at_once, gpt, W).values())
    if needed <= USABLE * device_bytes(config.device):
        return all_at_once
    return replace(config, loss_chunk=CHUNK)


def device_bytes(device: str) -> float:
    """Memory of this rank's GPU; elsewhere this rank's share of the machine's memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(distributed.ranks().local_rank).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# The plan


def describe(config: TrainConfig, gpt: Shape, data: RunData, W: int) -> str:
    """What a settled config is going to do on W ranks, in a few lines."""
    n_parameters = build_empty(gpt).n_parameters()
    A = config.global_batch_size // (W * config.micro_batch_size)
    tokens = config.global_batch_size * config.block_size
    return "\n".join(
        [
            f"model      {config.model}: {n_parameters:,} parameters, vocabulary {gpt.vocab_size}",
            f"memory     {describe_memory(config, gpt, W)}",
            f"batch      {config.global_batch_size} sequences x {config.block_size} tokens = "
            f"{tokens:,} tokens a step: {W} ranks ({config.parallel}) x {A} micro-steps x "
            f"{config.micro_batch_size} sequences",
            f"run        {config.max_steps:,} steps, {tokens * config.max_steps:,} tokens, "
            f"{config.device}, {config.dtype}, compile {config.compile}, seed {config.seed}, "
            f"in {config.out_dir}",
            f"compute    {describe_compute(gpt, tokens * config.max_steps)}",
            f"optimizer  {describe_optimizer(config)}",
            f"reweight   {describe_weights(config, A)}",
            f"mixture    {describe_mixture(config, data)}",
        ]
    )


def flops_per_token(gpt: Shape) -> int:
    """6 N + 12 L C T, forward and backward; N without what is only looked up.

    That is GPT-2's positions, and a Llama's embedding where the head is another matrix.
    """
    model = build_empty(gpt)
    N = model.n_parameters()
    if gpt.family == "gpt2":
        N -= model.wpe.weight.numel()
    elif not gpt.tied:
        N -= model.wte.weight.numel()
    return 6 * N + 12 * gpt.n_layer * gpt.n_embd * gpt.block_size


def describe_compute(gpt: Shape, tokens: int) -> str:
    flops = flops_per_token(gpt) * tokens
    hours = flops / (SHARE_OF_PEAK * H100_FLOPS) / 3600
    shown = f"{hours:,.1f}" if hours >= 1 else f"{hours:.1g}"
    return (
        f"{flops:.2e} FLOP without a first pass or recomputation, {shown} H100 hours at "
        f"{SHARE_OF_PEAK:.0%} of the bfloat16 peak"
    )


def describe_memory(config: TrainConfig, gpt: Shape, W: int) -> str:
    parts = predict_for_config(config, gpt, W)
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    peak = sum(parts.values()) / 1e9
    return (
        f"{peak:.2f} GB per rank predicted for a step, compile {config.compile}: {listed} "
        f"(loss_chunk {config.loss_chunk}, recompute {config.recompute})"
    )


def describe_optimizer(config: TrainConfig) -> str:
    names = {"adamw": "AdamW", "muon": "Muon for the blocks' matrices and AdamW for the rest"}
    is_linear = config.warmup_shape == "linear"
    warmup = "warm-up" if is_linear else f"{config.warmup_shape} warm-up"
    parts = [
        f"{names[config.optimizer]}, learning rate {config.learning_rate} to {config.min_lr} after "
        f"{config.warmup_steps:,} steps of {warmup}",
        f"weight decay {config.weight_decay}",
        f"betas {config.beta1} and {config.beta2}",
        f"clip {config.grad_clip}" if config.grad_clip else "no clipping",
        f"dropout {config.dropout}",
    ]
    if config.skip_grad_norm:
        parts.append(f"steps above {config.skip_grad_norm} median gradient norms skipped")
    return ", ".join(parts)


def describe_weights(config: TrainConfig, A: int) -> str:
    if config.reweight == "uniform":
        return "uniform"
    r = f"r {config.r}"
    if config.r_start:
        r += f" (from {config.r_start}, {config.r_schedule}, {config.r_steps:,} steps)"
    uniform_steps = f"after {config.reweight_warmup_steps:,} uniform steps"
    parts = [config.reweight, r, f"delta {config.delta}", config.reweight_norm, uniform_steps]
    parts.append(f"at most {config.max_weight} / G" if config.max_weight else "no cap")
    parts.append(f"over each {config.reweight_scope} batch")
    if config.reweight_unit == "byte":
        parts.append("losses per byte")
    if config.reweight_control != "none":
        place = "all samples" if config.reweight_control == "shuffled" else "each domain"
        parts.append(f"shuffled among those of {place}, as a control")
    if A > 1 and config.reweight_scope == "global":
        parts.append("with a first pass for the losses (about a third more compute)")
    return ", ".join(parts)


def describe_mixture(config: TrainConfig, data: RunData) -> str:
    """The mixture, with each domain's probability and the epochs that the run makes of it."""
    samples = config.max_steps * config.global_batch_size
    domains = []
    for i, domain in enumerate(data.train.domains):
        if p := data.sampler.weights[i]:
            epochs = p * samples / data.train.n_windows[i]
            domains.append(f"{domain} {p:.3f} ({epochs:.2f} epochs)")
    return f"{config.mixture}: {', '.join(domains)}; windows {config.data_order}"
