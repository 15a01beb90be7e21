"""What a training step needs at its peak, per rank and in bytes, from the shapes alone. docs/memory.md derives it.

    python memory.py                     # the table of docs/memory.md: what fits on which card

n = B * T tokens of a micro-batch, C channels, H heads, V vocabulary, L layers, A micro-steps, W ranks. e: bytes of an
element in matrix products, 2 or 4. Of plain PyTorch without torch.compile, which needs less.
"""

import os
from dataclasses import replace

import torch

import distributed
from model import SIZES, GPTConfig

CHUNK = 2_048  # rows of logits at a time where loss_chunk is chosen here
USABLE = 0.9  # of a device's memory; the rest is for CUDA's context, the libraries' workspaces and holes


def predict(gpt: GPTConfig, B: int, A: int = 1, W: int = 1, parallel: str = "ddp", device: str = "cuda",
            dtype: str = "bfloat16", loss_chunk: int = 0, recompute: str = "none") -> dict[str, float]:
    """Bytes of each part at the moment of a step at which their sum is largest."""
    L, C, T, n = gpt.n_layer, gpt.n_embd, gpt.block_size, B * gpt.block_size
    fsdp, bf16, e = parallel == "fsdp" and W > 1, dtype == "bfloat16", 2 if dtype == "bfloat16" else 4
    shards = W if fsdp else 1
    matrices, table, root = 12 * C * C, gpt.vocab_size * C, (gpt.vocab_size + T + 2) * C  # parameters
    N = L * (matrices + 13 * C) + root
    kept, saved, work = block_activations(gpt, device, bf16, recompute)

    always = {"weights and moments": 12 * N / shards}
    if fsdp:  # the embeddings and ln_f; this block, the next one, the gradients of this and of the last one
        always["fetched"] = 4 * root + 4 * e * matrices
    held = 4 * N / shards if A > 1 or W > 1 and not fsdp else 0  # gradients that are there before backward
    grown = max(held, 4 * (N - root) / shards + 4 * root)  # and at its end
    doubled = 4 * table if held and not fsdp else 0  # the head's part of the table's, until the embedding's joins it
    copies = 2 * matrices * (L if recompute == "none" else 1) if bf16 and not fsdp else 0  # of float32 weights
    noise = (1 if device == "cuda" else 4) * (gpt.dropout > 0)  # of the first dropout
    moments = [
        {"activations": n * (L * kept + (4 + e + noise) * C + 8), "logits": head(gpt, n, bf16, loss_chunk),
         "gradients": held, "bfloat16 weights": copies},
        # the last block, the first in backward
        {"activations": n * ((L - 1) * kept + saved + work), "bfloat16 weights": copies,
         "gradients": held + 4 * table + (0 if fsdp else 16 * C * C)},
        # the first block; of its gradients only the MLP's second matrix has one
        {"activations": n * (saved + work), "bfloat16 weights": 2 * matrices * (copies > 0),
         "gradients": grown + doubled - (0 if held or fsdp else 32 * C * C)},
        {"activations": n * 4 * C, "gradients": grown + doubled + 4 * table},  # the embedding
    ]
    return {**always, **max(moments, key=lambda parts: sum(parts.values()))}


def block_activations(gpt: GPTConfig, device: str, bf16: bool, recompute: str) -> tuple[int, int, int]:
    """Bytes per token that a block keeps from forward to its backward, has in backward, and works with besides."""
    C, H, T, e, noisy = gpt.n_embd, gpt.n_head, gpt.block_size, 2 if bf16 else 4, gpt.dropout > 0
    # In float32: the inputs of both LayerNorms, their statistics. In e: the inputs of c_attn, c_proj, c_fc and c_proj
    # (4 C), q, k, v, and gelu's input (4 C). Attention keeps a float32 per head.
    saved = (8 + 14 * e) * C + 16 + 4 * H
    if noisy and device == "cuda":  # masks of one byte
        saved += 2 * C
    elif noisy:  # and on a CPU attention with dropout is not fused: three (B, H, T, T)
        saved += 2 * e * C + 12 * H * T - 4 * H
    kept = {"none": saved, "full": 4 * C, "selective": (4 + 10 * e) * C + 4 * H - noisy * (e * C + 4 * H)}[recompute]
    work = (4 + 4 * e + 2 * bf16) * C  # gradients of the block's output and of gelu's input
    if recompute != "none":
        work += 2 * bf16 * C + (e * C if recompute == "selective" or noisy else 0)
    return kept, saved, work


def head(gpt: GPTConfig, n: int, bf16: bool, chunk: int) -> int:
    """Bytes for the losses of n tokens: three float32 per logit, or the gradient of the weight."""
    V, table = gpt.vocab_size, gpt.vocab_size * gpt.n_embd
    copy = 2 * table if bf16 else 0
    if 0 < chunk < n:  # the gradients of two chunks and their sum
        return max(12 * V * chunk + 4 * table + copy, 4 * V * chunk + 8 * table + copy, 12 * table)
    return max(12 * V * n, 4 * V * n + 4 * table) + copy


def of_run(config, gpt: GPTConfig, W: int) -> dict[str, float]:
    """`predict` for a settled TrainConfig."""
    B, A = config.micro_batch_size, config.global_batch_size // (W * config.micro_batch_size)
    return predict(gpt, B, A, W, config.parallel, config.device, config.dtype, config.loss_chunk, config.recompute)


def settle_loss_chunk(config, gpt: GPTConfig, W: int):
    """The TrainConfig with rows in place of loss_chunk = -1: 0, or CHUNK where all logits would not fit."""
    if config.loss_chunk != -1:
        return config
    plain = replace(config, loss_chunk=0)
    fits = sum(of_run(plain, gpt, W).values()) <= USABLE * device_bytes(config.device)
    return plain if fits else replace(config, loss_chunk=CHUNK)


def device_bytes(device: str) -> float:
    """Memory of this rank's device; its share of the machine's where that is no GPU of its own."""
    if device == "cuda":
        return torch.cuda.get_device_properties(distributed.ranks().local_rank).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# The columns and, for each cell, the settings of its numbers.
CARDS = (24, 40, 80, 141)  # GB
WAYS = ({}, {"loss_chunk": CHUNK}, {"loss_chunk": CHUNK, "recompute": "selective"},
        {"loss_chunk": CHUNK, "recompute": "full"})


def largest_batch(gpt: GPTConfig, gigabytes: float, **settings) -> int:
    """The most sequences of a micro-batch that fit; 0: not one."""
    B = 0
    while sum(predict(gpt, B + 1, A=2, **settings).values()) <= USABLE * gigabytes * 1e9:
        B += 1
    return B


def main() -> None:
    print("| size | T | dropout | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|--:|--:|" + "---|" * len(CARDS))
    for T, dropout, sizes in ((1024, 0.0, ("124m", "210m", "355m", "684m", "774m", "1.5b")),
                              (512, 0.1, ("124m", "210m", "684m"))):
        for size in sizes:
            gpt = replace(SIZES[size], block_size=T, vocab_size=50304, dropout=dropout)
            cells = (" / ".join(str(largest_batch(gpt, card, **way)) for way in WAYS) for card in CARDS)
            print(f"| {size} | {T} | {dropout} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
