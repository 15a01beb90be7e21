"""GPT-2 in plain torch: one class per layer kind, one row per size; llama.py shares what it can.

B sequences, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary, S tokens seen so far.
Parameter names follow Hugging Face's GPT-2, so that weights move in both directions (hf.py).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import hf


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2; the defaults are the released vocabulary and context."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    family: str = "gpt2"  # of FAMILIES (families.py)


SIZES: dict[str, GPTConfig] = {
    "tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128),  # for a CPU, with the bytes tokenizer
    "124m": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "210m": GPTConfig(n_layer=24, n_head=16, n_embd=768),
    "355m": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "684m": GPTConfig(n_layer=36, n_head=24, n_embd=1200),
    "774m": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1.5b": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Cache:
    """Keys and values that one attention layer has seen: generation computes each token once."""

    def __init__(self, size: int):
        self.size, self.used, self.kv = size, 0, None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) of new tokens -> (B, H, S, D) of all."""
        if self.kv is None:
            B, H, _, D = k.shape
            self.kv = k.new_empty(2, B, H, self.size, D)
        new = slice(self.used, self.used + k.size(2))
        self.kv[0, :, :, new] = k
        self.kv[1, :, :, new] = v
        self.used = new.stop
        return self.kv[0, :, :, : self.used], self.kv[1, :, :, : self.used]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        # Split before the heads: the gradient is then assembled faster on a CPU.
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout, multiple=8 if x.is_cuda else 1)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, multiple: int
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, H, T, D) queries -> (B, H, T, D); without a mask, causal.

    Keys and values may have fewer heads: each one then serves as many query heads in a row. D is
    padded to a multiple with zeros, which change nothing: fused GPU kernels want multiples of
    8.
    """
    D = q.size(-1)
    if D % multiple:
        padding = (0, -D % multiple)
        q, k, v = F.pad(q, padding), F.pad(k, padding), F.pad(v, padding)
    causal, grouped = mask is None, q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=1 / math.sqrt(D), enable_gqa=grouped
    )
    return y[..., :D]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the precision of its input, even where FSDP casts its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.type_as(x), self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


# What recompute = "selective" keeps of a block. Attention with dropout is recomputed: if it were
# kept, it would not draw its noise a second time, and all noise after it would differ.
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = LayerNorm(config.n_embd), MLP(config)

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        recompute: str = "none",
    ) -> Tensor:
        if recompute != "none":
            has_noise = self.training and self.attn.dropout > 0
            return recomputed(self, recompute, has_noise, x)
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


def recomputed(block: nn.Module, recompute: str, has_noise: bool, *inputs) -> Tensor:
    """A block's forward that keeps few activations: backward computes the others again."""
    options = {"use_reentrant": False, "preserve_rng_state": has_noise}
    if recompute == "selective":
        kept = MATMULS if has_noise else MATMULS + ATTENTION
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(block.forward, *inputs, **options)  # not block(): FSDP's hooks must run once


class LanguageModel(nn.Module):
    """What GPT and Llama (llama.py) share: a token embedding wte, blocks h, the norm ln_f, a head.

    Two attributes trade time for memory and leave the result unchanged. loss_chunk: rows of the (B
    * T, V) logits computed at once for losses; 0: all. recompute: activations of a block that
    backward computes again: "none", "selective" (all but matrix products and attention), "full"
    (all).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.loss_chunk, self.recompute = config, 0, "none"
        self.token_losses = token_losses  # which step.py may compile

    @property
    def head(self) -> Tensor:
        """(V, C): logits are its products with the last hidden state."""
        return self.wte.weight

    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), smaller for matrices that end on the residual stream."""
        for name, p in self.named_parameters():
            self.init_weight(name, p)

    def init_weight(self, name: str, p: Tensor) -> None:
        """init_weights for the parameter of this name."""
        if p.dim() >= 2:
            residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
            ends_on_residual = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=residual_std if ends_on_residual else 0.02)
        else:
            is_gain = "ln_" in name and name.endswith("weight")
            nn.init.constant_(p, 1.0 if is_gain else 0.0)

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def through_blocks(
        self, x: Tensor, caches: list[Cache] | None, mask: Tensor | None, *inputs
    ) -> Tensor:
        """(B, T, C) embedded tokens -> (B, T, C) after all blocks.

        inputs: what each block takes beside x.
        """
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for i, block in enumerate(self.h):
            if caches is None:
                x = block(x, *inputs, recompute=recompute)
            else:
                x = block(x, *inputs, caches[i], mask)
        return x

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; with targets -> (B, T) float32 token losses in nats."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return F.linear(x, self.head)
        losses = self.token_losses(x.flatten(0, 1), self.head, targets.flatten(), self.loss_chunk)
        return losses.view_as(targets).clone()  # FSDP's hooks need an output that is not a view

    def to_pretrained(self, n_vocab: int, eot_token: int) -> nn.Module:
        """transformers' model with these weights and the first n_vocab token rows."""
        return hf.to_pretrained(self.config, self.state_dict(), n_vocab, eot_token)


class GPT(LanguageModel):
    """GPT-2 with learned positions, pre-LayerNorm and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        self.init_weights()

    def hidden(
        self,
        idx: Tensor,
        caches: list[Cache] | None = None,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, C) last hidden state; logits are its product with the head.

        caches: one per block; idx are then the tokens after those in it, at `position` (B, T), and
        see the slots where `mask` (B, 1, T, S) is true. The first tokens of an empty cache need
        neither.
        """
        T = idx.size(1)
        block_size = self.config.block_size
        assert T <= block_size, f"{T} tokens, but the model has {block_size} positions"
        positions = self.wpe.weight[:T] if position is None else self.wpe(position)
        x = self.wte(idx) + positions  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        return self.ln_f(self.through_blocks(x, caches, mask))

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT":
        """A Hugging Face GPT-2 (hub name or folder); UserError if it cannot be opened."""
        model = cls(GPTConfig(**hf.read_shape(name_or_folder, "gpt2")))
        model.load_state_dict(hf.read_weights(name_or_folder, model.config))
        return model


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """(N, C) hidden states, (V, C) head, (N,) targets -> (N,) float32 losses in nats.

    chunk: rows of logits computed at once, in forward and again in backward; 0: all N, kept.
    """
    if 0 < chunk < len(x):
        # Compiled, the gradients of all chunks would exist at once, to be added up in one kernel.
        # Not a decorator: that would import the compiler with this file.
        return torch.compiler.disable(chunked_losses)(x, weight, targets, chunk)
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")


def chunked_losses(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """token_losses of chunk after chunk."""

    def losses(x: Tensor, targets: Tensor) -> Tensor:
        # Autocast does not cache the bfloat16 copy of a view: each chunk makes its own, and the
        # chunks' gradients are added up in float32.
        return token_losses(x, weight.view_as(weight), targets, chunk=0)

    parts = []
    for x_part, target_part in zip(x.split(chunk), targets.split(chunk), strict=True):
        part = checkpoint(
            losses, x_part, target_part, use_reentrant=False, preserve_rng_state=False
        )
        parts.append(part)
    return torch.cat(parts)
