"""Llama in plain torch: RMSNorm, rotary positions, SwiGLU, grouped queries; no bias, no dropout.

B sequences, T tokens, C channels (n_embd), H query heads, K key and value heads, D = C / H,
V vocabulary, S tokens seen so far. Attention, losses, cache and recomputation are model.py's.
Matrices that read the same input are one: c_attn is Hugging Face's q_proj, k_proj and v_proj, one
below the other, c_fc gate_proj and up_proj (hf.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf
from cli import UserError
from model import Cache, LanguageModel, attend, recomputed

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (1 or B, T, 1, D / 2) float32


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama; the defaults are Llama 2's."""

    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int  # heads of keys and values; fewer than n_head: grouped queries
    n_ffn: int  # width of the MLP
    rope_theta: float = 1e4  # base of the rotary positions
    tied: bool = False  # the head is the token embedding
    block_size: int = 4096
    vocab_size: int = 32000
    dropout: float = 0.0  # as a GPTConfig has it; here always 0
    family: str = "llama"

    def __post_init__(self):
        if self.dropout:
            raise UserError(f"--dropout {self.dropout}: a Llama has none; use --dropout 0")


SIZES: dict[str, LlamaConfig] = {
    "llama_tiny": LlamaConfig(n_layer=4, n_head=4, n_embd=128, n_kv_head=4, n_ffn=384),
    # Llama 3.2 1B, but for the scaling of its rotary positions, which only long contexts need
    "llama_1b": LlamaConfig(
        n_layer=16,
        n_head=32,
        n_embd=2048,
        n_kv_head=8,
        n_ffn=8192,
        rope_theta=5e5,
        tied=True,
        vocab_size=128256,
    ),
    "llama_1.4b": LlamaConfig(n_layer=24, n_head=16, n_embd=2048, n_kv_head=16, n_ffn=5632),
    "llama_7b": LlamaConfig(n_layer=32, n_head=32, n_embd=4096, n_kv_head=32, n_ffn=11008),
}


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_size = config.n_embd // config.n_head  # D
        kv = config.n_kv_head * self.head_size
        self.widths = [config.n_embd, kv, kv]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, cache: Cache | None, mask: Tensor | None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(self.widths, dim=2)
        q = rotate(q.view(B, T, -1, self.head_size), rotation).transpose(1, 2)  # (B, H, T, D)
        k = rotate(k.view(B, T, -1, self.head_size), rotation).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(q, k, v, mask, dropout=0.0, multiple=8 if x.is_cuda else 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def rotation_at(position: Tensor, config: LlamaConfig) -> Rotation:
    """(1 or B, T) positions -> the angles by which their queries and keys are turned.

    Pair i of D / 2 turns by position / rope_theta^(2 i / D) (Su et al., arXiv 2104.09864).
    """
    D = config.n_embd // config.n_head
    exponents = torch.arange(0, D, 2, device=position.device).float() / D  # (D / 2,)
    angles = position[:, :, None, None] / config.rope_theta**exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """(B, T, H, D) with number i of a head turned together with number i + D / 2."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)  # their products are float32, also in bfloat16
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_ffn, bias=False)
        self.c_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * up)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the precision of its input, even where FSDP casts its parameters."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.ln_1, self.attn = RMSNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = RMSNorm(config.n_embd), MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        recompute: str = "none",
    ) -> Tensor:
        if recompute != "none":
            return recomputed(self, recompute, False, x, rotation)
        x = x + self.attn(self.ln_1(x), rotation, cache, mask)
        return x + self.mlp(self.ln_2(x))


class Llama(LanguageModel):
    """Llama 2 and 3: rotary positions, pre-RMSNorm, a head of its own or tied to the embedding."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @property
    def head(self) -> Tensor:
        """(V, C): logits are its products with the last hidden state."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def hidden(
        self,
        idx: Tensor,
        caches: list[Cache] | None = None,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, C) last hidden state, with the arguments of GPT.hidden."""
        T, block_size = idx.size(1), self.config.block_size
        assert T <= block_size, f"{T} tokens, but the model has {block_size} positions"
        if position is None:
            position = torch.arange(T, device=idx.device)[None]  # (1, T)
        x = self.wte(idx)  # (B, T, C)
        rotation = rotation_at(position, self.config)
        return self.ln_f(self.through_blocks(x, caches, mask, rotation))

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "Llama":
        """A Hugging Face Llama (hub name or folder); UserError if it cannot be opened."""
        model = cls(LlamaConfig(**hf.read_shape(name_or_folder, "llama")))
        model.load_state_dict(hf.read_weights(name_or_folder, model.config))
        return model
