"""Continuations of prompts, token by token, each token computed once (key-value cache).

    new = generate(model, prompts, max_tokens=100, n_vocab=tokenizer.n_vocab)      # greedy

B prompts, T tokens in the longest, V vocabulary of the tokenizer (the model's may be padded).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from model import GPT, Cache

NOT_FINITE = "the model's output is not finite: its run has diverged"


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_tokens: int, n_vocab: int,
             pick: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
             finished: Callable[[list[int]], bool] = lambda new: False) -> list[list[int]]:
    """Up to max_tokens new tokens for each of the B prompts, whose lengths may differ; the model is in eval mode.

    pick: (B, V) float32 logits -> (B,) ids. finished: told the new tokens of a prompt after each one; true ends it,
    and that token is its last. A prompt sees at most the last block_size tokens, fewer where the new ones need room:
    up to half of the context. When that is full, it goes on from its second half.
    """
    block_size, device = model.config.block_size, model.wte.weight.device
    new, going = [[] for _ in prompts], set(range(len(prompts)))
    while going and (remaining := max_tokens - max(map(len, new))):
        kept = block_size + 1 - min(remaining, (block_size + 1) // 2)  # plus 1: the last token is not fed back
        rows = [(p + n)[-kept:] for p, n in zip(prompts, new, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], device=device)  # (B,)
        T = max(map(len, rows))
        steps = min(remaining, block_size + 1 - T)
        idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (B, T), padded on the right
        slots = torch.arange(T + steps - 1, device=device)
        mask = ((slots < lengths[:, None]) | (slots >= T))[:, None, None]  # (B, 1, 1, T + steps - 1): all but padding
        caches = [Cache(len(slots)) for _ in model.h]
        x = model.hidden(idx, caches)[torch.arange(len(rows), device=device), lengths - 1]  # (B, C)
        for t in range(1, steps + 1):
            if not x.isfinite().all():
                raise UserError(NOT_FINITE)
            ids = pick(F.linear(x, model.wte.weight[:n_vocab]).float())  # (B,)
            for i, token in enumerate(ids.tolist()):
                if i in going:
                    new[i].append(token)
                    if finished(new[i]):
                        going.remove(i)
            if not going or t == steps:
                break
            x = model.hidden(ids[:, None], caches, (lengths + t - 1)[:, None], mask[..., :T + t])[:, 0]
    return new
