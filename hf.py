"""Hugging Face's GPT-2, in and out: its shape, its weights, and a GPT2LMHeadModel with ours.

Its Conv1D matrices are our Linear ones transposed; all names are the same.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from cli import UserError

# What GPT has no setting for: key of a Hugging Face GPT-2's config -> the values that give what GPT
# computes.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
# The names of the tied matrix in a GPT2LMHeadModel. A file has it under either one or under both.
EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


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


def read_shape(name_or_folder: str) -> dict[str, int]:
    """The fields of GPTConfig, from config.json alone; UserError if GPT can't compute it."""
    transformers = import_transformers()
    try:
        content, _ = transformers.GPT2Config.get_config_dict(name_or_folder)
        config = transformers.GPT2Config.from_dict(content)
    except Exception as error:  # raised by the hub, or about the file or its content
        raise cannot_open(name_or_folder, error) from None
    kind = content.get("model_type")
    if not kind:
        raise UserError(
            f"{name_or_folder} has no config.json that names a model_type; only gpt2 can be "
            "opened here"
        )
    if kind != "gpt2":
        raise UserError(f"{name_or_folder} is a model of type {kind}; only gpt2 can be opened here")
    fixed = {**FIXED, "n_inner": (None, 4 * config.n_embd)}
    for key, allowed in fixed.items():
        if getattr(config, key) not in allowed:
            raise UserError(
                f"{name_or_folder} has {key} {getattr(config, key)}; only "
                f"{' or '.join(map(str, allowed))} is computed here"
            )
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "vocab_size": config.vocab_size,
    }


def read_weights(name_or_folder: str) -> dict[str, Tensor]:
    """The weights under GPT's names and in its orientation.

    UserError if some are missing, or if the head is another matrix than the embedding.
    """
    model_class = import_transformers().GPT2LMHeadModel
    try:
        model, report = model_class.from_pretrained(
            name_or_folder,
            tie_word_embeddings=False,  # or a head that differs could replace the embedding
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # raised by the hub, or by the reader of a damaged file
        raise cannot_open(name_or_folder, error) from None
    head, embedding = model.lm_head.weight, model.transformer.wte.weight
    missing = set(report["missing_keys"])
    if HEAD in missing:
        missing.remove(HEAD)
    elif EMBEDDING in missing:
        missing.remove(EMBEDDING)
        model.transformer.wte.weight = head
    elif not torch.equal(head, embedding):
        raise UserError(
            f"{name_or_folder}: its {HEAD} and {EMBEDDING} differ, and only a head tied to the "
            "embedding is computed here; give a model with a tied head"
        )
    if missing:
        first, *others = sorted(missing)
        more = f" and {len(others)} more" if others else ""
        raise UserError(f"{name_or_folder}: its weights lack {first}{more}; restore the file")
    return transposed(model.transformer.state_dict())


def to_gpt2(shape, weights: dict[str, Tensor], n_vocab: int, eot_token: int) -> nn.Module:
    """A GPT2LMHeadModel with a GPT's weights, without vocabulary rows from n_vocab on.

    shape: the GPT's GPTConfig.
    """
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=n_vocab,
        n_positions=shape.block_size,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        resid_pdrop=shape.dropout,
        bos_token_id=eot_token,
        eos_token_id=eot_token,
    )
    model = transformers.GPT2LMHeadModel(config)
    weights = transposed(weights)
    weights["wte.weight"] = weights["wte.weight"][:n_vocab]
    model.transformer.load_state_dict(weights)
    return model


def transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the matrices of TRANSPOSED turned round; its own inverse."""
    return {name: p.T if name.endswith(TRANSPOSED) else p for name, p in weights.items()}


def cannot_open(name_or_folder: str, error: Exception) -> UserError:
    """The error for a Hugging Face GPT-2 that cannot be opened."""
    if Path(name_or_folder).exists():
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return UserError(
            f"{name_or_folder} cannot be opened as a Hugging Face GPT-2 ({reason}); it must be a "
            "folder with config.json and model.safetensors"
        )
    return UserError(
        f"{name_or_folder} is neither a folder here nor a GPT-2 that the Hugging Face hub gives; "
        "without internet, download config.json and model.safetensors of "
        f"https://huggingface.co/{name_or_folder} elsewhere and give the folder that holds them"
    )
