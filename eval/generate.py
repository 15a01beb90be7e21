"""Continuations of prompts, token by token; a key-value cache computes each token once.

    new = generate(model, prompts, max_tokens=100, n_vocab=tokenizer.n_vocab)      # greedy

B prompts, T tokens in the longest, C channels, V vocabulary of the tokenizer (the model's may be
padded).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError
from model import Cache, LanguageModel

NOT_FINITE = "the model's output is not finite: its run has diverged"


def likeliest(logits: Tensor) -> Tensor:
    """(B, V) -> (B,): greedy decoding."""
    return logits.argmax(-1)


def never(new: list[int]) -> bool:
    return False


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_tokens: int,
    n_vocab: int,
    pick: Callable[[Tensor], Tensor] = likeliest,
    finished: Callable[[list[int]], bool] = never,
) -> list[list[int]]:
    """Up to max_tokens new tokens for each of the B prompts, whose lengths may differ.

    The model is in eval mode. pick: (B, V) float32 logits -> (B,) ids. finished: called with the
    new tokens of a prompt after each one; where it is true, that token is the prompt's last.

    A prompt sees at most the last block_size tokens, fewer where the new ones need room: up to half
    of the context. When the context is full, generation goes on from its second half.
    """
    block_size = model.config.block_size
    new = [[] for _ in prompts]
    going = set(range(len(prompts)))  # prompts that are not finished
    while going:
        remaining = max_tokens - max(map(len, new))
        if remaining == 0:
            break
        # block_size + 1: the last token is not fed back.
        kept = block_size + 1 - min(remaining, (block_size + 1) // 2)
        rows = [(prompt + own)[-kept:] for prompt, own in zip(prompts, new, strict=True)]
        n_steps = min(remaining, block_size + 1 - max(map(len, rows)))
        for ids in next_tokens(model, rows, n_steps, n_vocab, pick):
            for i, token in enumerate(ids.tolist()):
                if i in going:
                    new[i].append(token)
                    if finished(new[i]):
                        going.remove(i)
            if not going:
                break
    return new


def next_tokens(
    model: LanguageModel,
    rows: list[list[int]],
    n_steps: int,
    n_vocab: int,
    pick: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """n_steps times (B,) ids: the next token of each row. The context has room for all of them."""
    device = model.wte.weight.device
    T = max(map(len, rows))
    padded = [row + [0] * (T - len(row)) for row in rows]
    idx = torch.tensor(padded, device=device)  # (B, T), padded on the right
    lengths = torch.tensor([len(row) for row in rows], device=device)  # (B,)
    slots = torch.arange(T + n_steps - 1, device=device)
    is_token = (slots < lengths[:, None]) | (slots >= T)  # (B, T + n_steps - 1), not padding
    mask = is_token[:, None, None]  # (B, 1, 1, T + n_steps - 1)
    caches = [Cache(len(slots)) for _ in model.h]
    hidden = model.hidden(idx, caches)  # (B, T, C)
    every_row = torch.arange(len(rows), device=device)
    last = hidden[every_row, lengths - 1]  # (B, C)
    for t in range(1, n_steps + 1):
        if not last.isfinite().all():
            raise UserError(NOT_FINITE)
        logits = F.linear(last, model.head[:n_vocab]).float()  # (B, V)
        ids = pick(logits)  # (B,)
        yield ids
        if t < n_steps:
            positions = (lengths + t - 1)[:, None]  # (B, 1)
            hidden = model.hidden(ids[:, None], caches, positions, mask[..., : T + t])
            last = hidden[:, 0]
