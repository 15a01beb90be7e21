"""GPT-2 in plain torch: one class per layer kind, one row per size.

B sequences, T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary, S tokens seen so far.
Parameter names follow Hugging Face's GPT-2, so that weights move in both directions; its Conv1D matrices are our
Linear ones transposed.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from errors import UserError


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


class Cache:
    """Keys and values of the tokens that one attention layer has seen, so that generation computes each token once."""

    def __init__(self, size: int):
        self.size, self.used, self.kv = size, 0, None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) of new tokens -> (B, H, S, D) of all."""
        if self.kv is None:
            self.kv = k.new_empty(2, *k.shape[:2], self.size, k.shape[3])
        start, self.used = self.used, self.used + k.size(2)
        self.kv[0, :, :, start:self.used], self.kv[1, :, :, start:self.used] = k, v
        return self.kv[0, :, :, :self.used], self.kv[1, :, :, :self.used]


# What recompute = "selective" keeps of a block. Attention with dropout is computed again: kept, it would not draw its
# noise a second time, and the noise that comes after it would be another.
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
             for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=2)  # cut before the heads: its gradient is put together faster on a CPU
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout, multiple=8 if x.is_cuda else 1)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, multiple: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, H, T, D) queries -> (B, H, T, D); without a mask, causal.

    D is filled up to a multiple with zeros, which change nothing: the fused kernels for GPUs want multiples of 8.
    """
    D = q.size(-1)
    if D % multiple:
        q, k, v = (F.pad(x, (0, -D % multiple)) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=1 / math.sqrt(D))
    return y[..., :D]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the precision of its input, also where FSDP hands out its parameters in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), self.bias.type_as(x), self.eps)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None,
                recompute: str = "none") -> Tensor:
        if recompute != "none":
            noisy, options = self.training and self.attn.dropout > 0, {}
            if recompute == "selective":
                kept = MATMULS if noisy else MATMULS + ATTENTION
                options = {"context_fn": partial(create_selective_checkpoint_contexts, kept)}
            # not self(x): FSDP's hooks on the block must run once
            return checkpoint(self.forward, x, use_reentrant=False, preserve_rng_state=noisy, **options)
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with learned positions, pre-LayerNorm and a head tied to the token embedding.

    Two attributes trade time for memory and leave the result alone. loss_chunk: rows of the (B * T, V) logits that
    exist at a time where losses are asked for; 0: all. recompute: what backward computes again of each block; "none",
    "selective" (all but matrix products and attention), "full" (all).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.loss_chunk, self.recompute = config, 0, "none"
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
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

    def hidden(self, idx: Tensor, caches: list[Cache] | None = None, position: Tensor | None = None,
               mask: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, C), of which the logits are a linear function.

        caches: one per block; idx are then the tokens after those in it, at `position` (B, T), and see the slots where
        `mask` (B, 1, T, S) is true. The first tokens of an empty cache need neither.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens, but the model has {self.config.block_size} positions"
        x = self.wte(idx) + (self.wpe.weight[:T] if position is None else self.wpe(position))  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for i, block in enumerate(self.h):
            x = block(x, recompute=recompute) if caches is None else block(x, caches[i], mask)
        return self.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits, or with (B, T) targets -> (B, T) float32 token losses in nats."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return F.linear(x, self.wte.weight)
        losses = token_losses(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.loss_chunk)
        return losses.view_as(targets).clone()  # FSDP hooks onto what is returned, which must not be a view

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT":
        """A GPT with the weights of a Hugging Face GPT-2 (hub name or folder); UserError if there are none."""
        config, transformers = pretrained_config(name_or_folder), import_transformers()
        try:
            source, found = transformers.GPT2LMHeadModel.from_pretrained(name_or_folder, output_loading_info=True)
        except Exception as error:  # of the hub, or of the reader of a damaged file
            raise not_opened(name_or_folder, error) from None
        if lacking := sorted(found["missing_keys"]):
            raise UserError(f"{name_or_folder}: its weights lack {lacking[0]}" +
                            (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "") + "; restore the file")
        model = cls(config)
        model.load_state_dict(conv1d_transposed(source.transformer.state_dict()))
        return model

    def to_pretrained(self, n_vocab: int, eot_token: int) -> nn.Module:
        """transformers' GPT2LMHeadModel with these weights, without the rows of the vocabulary from n_vocab on."""
        transformers, c = import_transformers(), self.config
        target = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=n_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            embd_pdrop=c.dropout, attn_pdrop=c.dropout, resid_pdrop=c.dropout, bos_token_id=eot_token,
            eos_token_id=eot_token))
        weights = conv1d_transposed(self.state_dict())
        target.transformer.load_state_dict({**weights, "wte.weight": weights["wte.weight"][:n_vocab]})
        return target


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """(N, C) hidden states, (V, C) weight of the head, (N,) targets -> (N,) float32 losses in nats.

    chunk: rows of logits that exist at a time, forward and backward, which makes them again; 0: all N, kept.
    """
    if 0 < chunk < len(x):
        # Compiled, the gradients of all chunks would exist at a time, to be added up in one kernel. Not a decorator:
        # that would import the compiler with this file.
        return torch.compiler.disable(chunked_losses)(x, weight, targets, chunk)
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")


def chunked_losses(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """token_losses of chunk after chunk."""
    def losses(x: Tensor, targets: Tensor) -> Tensor:
        # A view, which autocast does not keep a bfloat16 copy of: each chunk has its own, and their gradients are
        # added up in float32.
        return token_losses(x, weight.view_as(weight), targets, chunk=0)

    return torch.cat([checkpoint(losses, *rows, use_reentrant=False, preserve_rng_state=False)
                      for rows in zip(x.split(chunk), targets.split(chunk), strict=True)])


def conv1d_transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with those matrices transposed that Hugging Face keeps the other way round; its own inverse."""
    return {name: p.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p
            for name, p in weights.items()}


# What GPT has no setting for: key of a Hugging Face GPT-2's config -> the values that give what GPT computes.
HF_FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
            "add_cross_attention": (False,)}


def pretrained_config(name_or_folder: str) -> GPTConfig:
    """The shape of a Hugging Face GPT-2, from its config.json alone; UserError if there is none that GPT computes."""
    transformers = import_transformers()
    try:
        content, _ = transformers.GPT2Config.get_config_dict(name_or_folder)
        kind, c = content.get("model_type"), transformers.GPT2Config.from_dict(content)
    except Exception as error:  # of the hub, the file or its content
        raise not_opened(name_or_folder, error) from None
    if kind != "gpt2":
        what = f"is a model of type {kind}" if kind else "has no config.json that names a model_type"
        raise UserError(f"{name_or_folder} {what}; only gpt2 can be opened here")
    for key, allowed in {**HF_FIXED, "n_inner": (None, 4 * c.n_embd)}.items():
        if getattr(c, key) not in allowed:
            raise UserError(f"{name_or_folder} has {key} {getattr(c, key)}; only {' or '.join(map(str, allowed))} is "
                            "computed here")
    return GPTConfig(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size)


def import_transformers():
    """The library, without its remarks; only moving weights in and out needs it."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install -r requirements-eval.txt") from None
    transformers.logging.set_verbosity_error()
    return transformers


def not_opened(name_or_folder: str, error: Exception) -> UserError:
    """What to say of a Hugging Face GPT-2 that does not open."""
    if Path(name_or_folder).exists():
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return UserError(f"{name_or_folder} cannot be opened as a Hugging Face GPT-2 ({reason}); it must be a folder "
                         "with config.json and model.safetensors")
    return UserError(f"{name_or_folder} is neither a folder here nor a GPT-2 that the Hugging Face hub gives; without "
                     f"internet, download config.json and model.safetensors of https://huggingface.co/{name_or_folder} "
                     "elsewhere and give the folder that holds them")
