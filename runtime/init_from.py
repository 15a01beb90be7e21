"""The weights that a run starts with: random ones, or those of --init_from.

--init_from is a Hugging Face GPT-2 or Llama (hub name or folder) or another run of train.py. Only
the weights are taken: the optimizer, the data order and the step start anew. Layers, heads, width
and vocabulary are the source's. So the released GPT-2 stays at 50257 rows: zero rows that pad it to
50304 would enter the softmax. A source that is padded keeps the rows that it was trained with.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import hf
from cli import UserError
from corpus import tokenizer
from families import (
    FAMILIES,
    SIZES,
    Shape,
    build_empty,
    describe,
    from_pretrained,
    shape_from,
)
from recipe import TrainConfig, model_shape
from runtime import checkpoint
from runtime.parts import Weights


def starting_shape(config: TrainConfig, manifest: dict, resumed: Path | None) -> Shape:
    """The shape of a run's model; UserError if --init_from does not fit the settings or data.

    resumed: the checkpoint that the run continues from. No weights are read.
    """
    shape = model_shape(config, manifest)
    if not config.init_from:
        return shape
    source = str(resumed or config.init_from)
    source_shape = read_shape(source, manifest["tokenizer"], config.data_dir)
    wanted = SIZES.get(config.model)
    if wanted and describe(wanted) != describe(source_shape):
        raise UserError(
            f"--model {config.model} has {describe(wanted)}, but --init_from {source} has "
            f"{describe(source_shape)}; use --model auto"
        )
    if shape.block_size > source_shape.block_size:
        raise UserError(
            f"--block_size {shape.block_size}: --init_from {source} has {source_shape.block_size} "
            f"positions; use --block_size {source_shape.block_size} or less"
        )
    return replace(source_shape, block_size=shape.block_size, dropout=shape.dropout)


def read_shape(source: str, data_tokenizer: dict, data_dir: str) -> Shape:
    """The shape of the model at `source`; UserError if its tokenizer is not the data's.

    data_tokenizer: the manifest's entry.
    """
    name = data_tokenizer["name"]
    if folder := checkpoint_at(source):
        shape = checkpoint.read_shape(folder)
        state = checkpoint.read_json(folder / "state.json")
        fits = state.get("tokenizer_sha256") == data_tokenizer["sha256"]
    else:
        shape = shape_from(hf.read_shape(source, *FAMILIES))
        fits = tokenizer.has_rows_for(data_tokenizer["n_vocab"], shape.vocab_size)
        if fits:
            tokens = tokenizer.find(data_tokenizer["sha256"], data_dir)
            fits = tokenizer.matches_hf_tokenizer(tokens, source)
    if not fits:
        raise UserError(
            f"--init_from {source} (vocabulary {shape.vocab_size}) has another tokenizer than the "
            f"data ({name}, {data_tokenizer['n_vocab']}); give data prepared with the model's "
            "tokenizer, or another model"
        )
    return shape


def starting_weights(config: TrainConfig, shape: Shape) -> Weights:
    """The weights that a new run starts with, one tensor at a time."""
    if not config.init_from:
        yield from random_weights(shape)
        return
    for name, of_parts in source_weights(config.init_from).items():
        if name == "wpe.weight":  # GPT-2's positions
            of_parts = [torch.cat(of_parts)[: shape.block_size]]
        yield name, of_parts


def source_weights(source: str) -> dict[str, list[Tensor]]:
    """Each parameter of the model at `source`, whole or in the parts of a checkpoint."""
    if folder := checkpoint_at(source):
        return checkpoint.read_weights(folder)
    weights = from_pretrained(source).state_dict()
    return {name: [weight] for name, weight in weights.items()}


def random_weights(shape: Shape) -> Weights:
    """Those of families.build, the same numbers, without the room for all of them at once."""
    model = build_empty(shape)
    for layer in model.modules():  # torch's layers draw random numbers when they are made
        if hasattr(layer, "reset_parameters"):
            copy.deepcopy(layer).to_empty(device="cpu").reset_parameters()
    for name, parameter in model.named_parameters():
        weight = torch.empty_like(parameter, device="cpu")
        model.init_weight(name, weight)
        yield name, [weight]


def checkpoint_at(source: str) -> Path | None:
    """The checkpoint that a path names, or the newest one of a run folder; else None."""
    if (Path(source) / "state.json").is_file():
        return Path(source)
    return checkpoint.find_latest(Path(source))
