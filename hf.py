"""Hugging Face's GPT-2 and Llama, in and out: the shape, the weights, and a model with ours.

GPT-2's Conv1D matrices are our Linear ones transposed; all names are the same. A Llama's matrices
that read the same input are one here, and its names are GPT-2's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cli import UserError

# What our models have no setting for: key of a Hugging Face config -> the values that give what is
# computed here.
FIXED_GPT2 = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
FIXED_LLAMA = {
    "hidden_act": ("silu", "swish"),
    "rms_norm_eps": (1e-5,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
HEAD = "lm_head.weight"  # in both families, in a file without its own copy if it is tied
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# A Llama's weight in a block here -> those of which it is made there, one below the other.
LLAMA_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}


def import_transformers():
    """The library, with its warnings off; only moving weights in and out needs it."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed: pip install -r requirements-eval.txt"
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def read_shape(name_or_folder: str, *families: str) -> dict:
    """The fields of our shape, from config.json alone; UserError if we can't compute it.

    families: those of FAMILIES (families.py) that are accepted.
    """
    transformers = import_transformers()
    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(name_or_folder)
        kind = content.get("model_type")
        if kind in families:
            config = getattr(transformers, KINDS[kind].config_class).from_dict(content)
    except Exception as error:  # raised by the hub, or about the file or its content
        raise cannot_open(name_or_folder, error) from None
    accepted = " or ".join(families)
    if not kind:
        raise UserError(
            f"{name_or_folder} has no config.json that names a model_type; only {accepted} can be "
            "opened here"
        )
    if kind not in families:
        raise UserError(
            f"{name_or_folder} is a model of type {kind}; only {accepted} can be opened here"
        )
    shape, fixed = KINDS[kind].read_config(config)
    for key, (value, allowed) in fixed.items():
        if value not in allowed:
            raise UserError(
                f"{name_or_folder} has {key} {value}; only "
                f"{' or '.join(map(str, allowed))} is computed here"
            )
    return {"family": kind, **shape}


def read_gpt2_config(config) -> tuple[dict, dict]:
    """The fields of GPTConfig, and what must be as it is here: key -> value, allowed values."""
    fixed = {key: (getattr(config, key), allowed) for key, allowed in FIXED_GPT2.items()}
    fixed["n_inner"] = (config.n_inner, (None, 4 * config.n_embd))
    shape = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "vocab_size": config.vocab_size,
    }
    return shape, fixed


def read_llama_config(config) -> tuple[dict, dict]:
    """The same for the fields of LlamaConfig."""
    fixed = {key: (getattr(config, key), allowed) for key, allowed in FIXED_LLAMA.items()}
    n_embd, n_head = config.hidden_size, config.num_attention_heads
    fixed["head_dim"] = (getattr(config, "head_dim", None), (None, n_embd / n_head))
    # transformers 5 has one key for the base and the scaling, version 4 two.
    rope = getattr(config, "rope_parameters", None)
    rope = rope or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    fixed["rope scaling"] = (scaling, ("default",))
    shape = {
        "n_layer": config.num_hidden_layers,
        "n_head": n_head,
        "n_embd": n_embd,
        "n_kv_head": config.num_key_value_heads,
        "n_ffn": config.intermediate_size,
        "rope_theta": rope["rope_theta"],
        "tied": config.tie_word_embeddings,
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }
    return shape, fixed


def read_weights(name_or_folder: str, shape) -> dict[str, Tensor]:
    """The weights under our names and in our form, from one file or from the parts of an index.

    shape: what read_shape said. UserError if some are missing, or if the head should be the
    embedding and is another matrix.
    """
    kind = KINDS[shape.family]
    model_class = getattr(import_transformers(), kind.model_class)
    try:
        model, report = model_class.from_pretrained(
            name_or_folder,
            tie_word_embeddings=False,  # or a head that differs could replace the embedding
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # raised by the hub, or by the reader of a damaged file
        raise cannot_open(name_or_folder, error) from None
    embeddings = model.get_input_embeddings()
    head, embedding = model.lm_head.weight, embeddings.weight
    missing = set(report["missing_keys"])
    if getattr(shape, "tied", True):
        if HEAD in missing:
            missing.remove(HEAD)
        elif kind.embedding in missing:
            missing.remove(kind.embedding)
            embeddings.weight = head
        elif not torch.equal(head, embedding):
            raise UserError(
                f"{name_or_folder}: its {HEAD} and {kind.embedding} differ, and its head must be "
                "tied to the embedding (config.json); give a model with a tied head"
            )
    if missing:
        first, *others = sorted(missing)
        more = f" and {len(others)} more" if others else ""
        raise UserError(f"{name_or_folder}: its weights lack {first}{more}; restore the file")
    weights = kind.from_theirs(model.base_model.state_dict(), shape)
    if not getattr(shape, "tied", True):
        weights[HEAD] = head
    return weights


def to_pretrained(shape, weights: dict[str, Tensor], n_vocab: int, eot_token: int) -> nn.Module:
    """transformers' model with our weights, without vocabulary rows from n_vocab on."""
    transformers = import_transformers()
    kind = KINDS[shape.family]
    settings = kind.settings_of(shape)
    settings |= {"vocab_size": n_vocab, "bos_token_id": eot_token, "eos_token_id": eot_token}
    config = getattr(transformers, kind.config_class)(**settings)
    model = getattr(transformers, kind.model_class)(config)
    weights = dict(weights)
    head = weights.pop(HEAD, None)
    weights["wte.weight"] = weights["wte.weight"][:n_vocab]
    model.base_model.load_state_dict(kind.to_theirs(weights, shape))
    if head is not None:
        model.lm_head.load_state_dict({"weight": head[:n_vocab]})
    return model


def gpt2_settings(shape) -> dict:
    """Keys of a GPT2Config, but for the vocabulary."""
    return {
        "n_positions": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
    }


def llama_settings(shape) -> dict:
    """Keys of transformers' LlamaConfig, but for the vocabulary."""
    return {
        "max_position_embeddings": shape.block_size,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "intermediate_size": shape.n_ffn,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        # Version 5 reads the second, version 4 the first.
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
    }


def llama_names(n_layer: int) -> dict[str, list[str]]:
    """A Llama's weight here -> the weights of a LlamaModel of which it is made."""
    names = {"wte.weight": ["embed_tokens.weight"], "ln_f.weight": ["norm.weight"]}
    for i in range(n_layer):
        for ours, parts in LLAMA_BLOCK.items():
            names[f"h.{i}.{ours}.weight"] = [f"layers.{i}.{part}.weight" for part in parts]
    return names


def llama_from_theirs(weights: dict[str, Tensor], shape) -> dict[str, Tensor]:
    """A LlamaModel's weights as Llama has them."""
    names = llama_names(shape.n_layer)
    return {name: torch.cat([weights[part] for part in names[name]]) for name in names}


def llama_to_theirs(weights: dict[str, Tensor], shape) -> dict[str, Tensor]:
    """Llama's weights as a LlamaModel has them."""
    kv = shape.n_embd // shape.n_head * shape.n_kv_head
    rows = {"attn.c_attn.weight": [shape.n_embd, kv, kv], "mlp.c_fc.weight": [shape.n_ffn] * 2}
    theirs = {}
    for name, parts in llama_names(shape.n_layer).items():
        layer = name.split(".", maxsplit=2)[-1]
        split = weights[name].split(rows.get(layer, len(weights[name])))
        theirs |= zip(parts, split, strict=True)
    return theirs


def transposed(weights: dict[str, Tensor], shape=None) -> dict[str, Tensor]:
    """GPT-2's weights with the matrices of TRANSPOSED turned round; its own inverse."""
    return {name: p.T if name.endswith(TRANSPOSED) else p for name, p in weights.items()}


def cannot_open(name_or_folder: str, error: Exception) -> UserError:
    """The error for a Hugging Face model that cannot be opened."""
    if Path(name_or_folder).exists():
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return UserError(
            f"{name_or_folder} cannot be opened as a Hugging Face model ({reason}); it must be a "
            "folder with config.json and model.safetensors"
        )
    return UserError(
        f"{name_or_folder} is neither a folder here nor a model that the Hugging Face hub gives; "
        "without internet, download config.json and model.safetensors of "
        f"https://huggingface.co/{name_or_folder} elsewhere and give the folder that holds them"
    )


class Kind(NamedTuple):
    """How a family is read and written."""

    config_class: str  # of transformers
    model_class: str
    embedding: str  # name of the token embedding in a file
    read_config: Callable  # their config -> our shape's fields, and what must be as it is here
    settings_of: Callable  # our shape -> keys of their config
    from_theirs: Callable  # weights of their model without its head, our shape -> ours
    to_theirs: Callable  # and back


KINDS = {
    "gpt2": Kind(
        "GPT2Config",
        "GPT2LMHeadModel",
        "transformer.wte.weight",
        read_gpt2_config,
        gpt2_settings,
        transposed,
        transposed,
    ),
    "llama": Kind(
        "LlamaConfig",
        "LlamaForCausalLM",
        "model.embed_tokens.weight",
        read_llama_config,
        llama_settings,
        llama_from_theirs,
        llama_to_theirs,
    ),
}
