"""GPT-2 in plain torch: one class per layer kind, one row per size.

B sequences, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary.
Parameter names follow Hugging Face's GPT-2, so that weights move in both directions; its Conv1D matrices are our
Linear ones transposed.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2; the defaults are the released vocabulary and context."""
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0


SIZES: dict[str, GPTConfig] = {
    "tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128),      # for a CPU, with the bytes tokenizer
    "124m": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "210m": GPTConfig(n_layer=24, n_head=16, n_embd=768),
    "355m": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "684m": GPTConfig(n_layer=36, n_head=24, n_embd=1200),
    "774m": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1.5b": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with learned positions, pre-LayerNorm and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), biases zero, and the 2 n_layer matrices that end on the residual stream smaller."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            else:
                on_residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if on_residual else 0.02)

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits, or with (B, T) targets -> (B, T) float32 token losses in nats."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens, but the model has {self.config.block_size} positions"
        x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets).clone()  # FSDP hooks onto what is returned, which must not be a view

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT":
        """A GPT with the weights of a Hugging Face GPT-2 (hub name or local folder); needs `transformers`."""
        from transformers import GPT2LMHeadModel  # only here: training needs no transformers
        source = GPT2LMHeadModel.from_pretrained(name_or_folder)
        c = source.config
        model = cls(GPTConfig(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size))
        weights = {name: p.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p
                   for name, p in source.transformer.state_dict().items()}
        model.load_state_dict(weights)
        return model
