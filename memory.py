"""What a training step needs at most, per rank and in bytes, from the shapes alone. docs/memory.md derives it.

    python memory.py                     # the table of docs/memory.md: what fits on which card

n = B * T tokens of a micro-batch, C channels, H heads, V vocabulary, L layers, A micro-steps, W ranks.
"""

from model import GPTConfig


def predict(gpt: GPTConfig, B: int, A: int = 1, W: int = 1, parallel: str = "ddp", device: str = "cuda",
            dtype: str = "bfloat16", loss_chunk: int = 0, recompute: str = "none") -> dict[str, float]:
    """Bytes of each part at the moment of a step when their sum, the peak, is largest."""
    L, C, T, n = gpt.n_layer, gpt.n_embd, gpt.block_size, B * gpt.block_size
    bf16, fsdp, shards = dtype == "bfloat16", parallel == "fsdp" and W > 1, W if parallel == "fsdp" else 1
    e = 2 if bf16 else 4  # bytes of an element in a block's matrix products
    kept, saved, work = block_activations(gpt, device, bf16, recompute)
    matrices, table, root = 12 * C * C, gpt.vocab_size * C, (gpt.vocab_size + T + 2) * C  # parameters
    N = L * (matrices + 13 * C) + root

    always = {"weights and moments": 12 * N / shards, "fetched": (4 * root + FETCHED * e * matrices) * fsdp}
    held = 4 * N / shards * (A > 1 or W > 1 and not fsdp)  # gradients that are there before backward
    copies = 2 * (L if recompute == "none" else 1) * matrices * (bf16 and not fsdp)  # of float32 weights
    edges = n * ((4 + e + (1 if device == "cuda" else 4) * (gpt.dropout > 0)) * C + 8)  # ln_f, the head, first dropout
    first = max(held, 4 * (N - root) / shards + 4 * root)  # gradients when the first block's backward is done
    doubled = 4 * table * (held > 0 and not fsdp)  # two gradients of the table, while the sum of both is not done
    moments = [
        {"activations": n * L * kept + edges, "logits": logits(gpt.vocab_size, table, n, loss_chunk, 2*table*bf16),
         "gradients": held, "bfloat16 copies": copies + 2 * table * (bf16 and not loss_chunk)},
        {"activations": n * ((L - 1) * kept + saved + work), "gradients": held + 4 * table + 16 * C * C,
         "bfloat16 copies": copies},  # the last block, whose backward is the first
        {"activations": n * (saved + work), "gradients": first + doubled - 4 * 8 * C * C, "bfloat16 copies": 24 * C * C * bf16},
        {"activations": n * 4 * C, "gradients": first + doubled + 4 * table},
    ]
    return {**always, **max(moments, key=lambda parts: sum(parts.values()))}


FETCHED = 4


def logits(V: int, table: int, n: int, chunk: int, copy: int) -> int:
    if not 0 < chunk < n:
        return max(12 * V * n, 4 * V * n + 4 * table)
    return max(12 * V * chunk + 4 * table + copy, 4 * V * chunk + 8 * table + copy, 12 * table)


def block_activations(gpt: GPTConfig, device: str, bf16: bool, recompute: str) -> tuple[int, int, int]:
    """Bytes per token that a block keeps from forward to its backward, has in backward, and works with besides."""
    C, H, T, e, noise = gpt.n_embd, gpt.n_head, gpt.block_size, 2 if bf16 else 4, gpt.dropout > 0
    statistics = 16 + 4 * H
    saved = (8 + 14 * e) * C + statistics
    if noise:
        saved += 2 * C if device == "cuda" else 2 * e * C + 12 * H * T - 4 * H
    kept = {"none": saved, "full": 4 * C,
            "selective": (4 + (9 if noise else 10) * e) * C + (0 if noise else 4 * H)}[recompute]
    work = (4 + 4 * e) * C + (e * C if recompute == "selective" or noise and recompute == "full" else 0) + bf16 * 2 * C * (1 if recompute == "none" else 2)
    return kept, saved, work
