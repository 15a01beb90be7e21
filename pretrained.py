"""Weights to start a run from, --init_from: a Hugging Face GPT-2 (hub name or folder), or another run of train.py.

Only the weights are taken: the optimizer, the data order and the step start anew. Layers, heads, width and vocabulary
are the source's. So the released GPT-2 stays at 50257 rows: zero rows that fill it up to 50304 would enter the softmax.
"""

from dataclasses import replace
from pathlib import Path

import checkpoint
import tokenizer
from errors import UserError
from model import GPT, SIZES, GPTConfig, pretrained_config


def source_config(source: str, gpt: GPTConfig, size: str, data_tokenizer: dict) -> GPTConfig:
    """The shape of the model at `source` with the block size and dropout of `gpt`; no weights are read.

    size: --model, of which the shape must agree where it is one of SIZES. data_tokenizer: from the manifest.
    UserError where these do not fit the source.
    """
    if folder := checkpoint_at(source):
        there = checkpoint.read_shape(folder)
        fits = checkpoint.read_json(folder / "state.json").get("tokenizer_sha256") == data_tokenizer["sha256"]
    else:
        there, name = pretrained_config(source), data_tokenizer["name"]
        fits = there.vocab_size == data_tokenizer["n_vocab"] and tokenizer.is_that_of(name, source)
    if not fits:
        raise UserError(f"--init_from {source} (vocabulary {there.vocab_size}) has another tokenizer than the data "
                        f"({data_tokenizer['name']}, {data_tokenizer['n_vocab']}); give data prepared with the model's "
                        "tokenizer, or another model")
    if size in SIZES and shape(SIZES[size]) != shape(there):
        raise UserError(f"--model {size} has {shape(SIZES[size])}, but --init_from {source} has {shape(there)}; use "
                        "--model auto")
    if gpt.block_size > there.block_size:
        raise UserError(f"--block_size {gpt.block_size}: --init_from {source} has {there.block_size} positions; use "
                        f"--block_size {there.block_size} or less")
    return replace(there, block_size=gpt.block_size, dropout=gpt.dropout)


def load_source(source: str, gpt: GPTConfig) -> GPT:
    """A model of the shape that source_config gave, with the weights at `source`, on the CPU."""
    folder = checkpoint_at(source)
    weights = (checkpoint.load_model(folder) if folder else GPT.from_pretrained(source)).state_dict()
    model = GPT(gpt)
    model.load_state_dict({**weights, "wpe.weight": weights["wpe.weight"][:gpt.block_size]})
    return model


def checkpoint_at(source: str) -> Path | None:
    """The checkpoint that a path names, or the newest one of a run folder; None where it is neither."""
    return Path(source) if (Path(source) / "state.json").is_file() else checkpoint.find_latest(Path(source))


def shape(gpt: GPTConfig) -> str:
    return f"{gpt.n_layer} layers, {gpt.n_head} heads, width {gpt.n_embd}"
