"""The families of models, GPT-2 (model.py) and Llama (llama.py), as the rest of the code sees them.

A size is a row of SIZES; a family is a shape, its model and its place in hf.py and
runtime/memory.py.
"""

import math
from dataclasses import replace

import torch

import hf
import llama
import model
from cli import UserError
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig, LanguageModel

Shape = GPTConfig | LlamaConfig
SIZES: dict[str, Shape] = {**model.SIZES, **llama.SIZES}
# A shape's `family` -> the classes of shape and model, and the name in texts.
FAMILIES = {"gpt2": (GPTConfig, GPT, "GPT-2"), "llama": (LlamaConfig, Llama, "Llama")}


def build(shape: Shape) -> LanguageModel:
    """A model of this shape with random weights."""
    _, model_class, _ = FAMILIES[shape.family]
    return model_class(shape)


def build_empty(shape: Shape) -> LanguageModel:
    """A model on "meta": it takes no memory, whatever the shape."""
    with torch.device("meta"):
        return build(shape)


def shape_from(fields: dict) -> Shape:
    """The shape that a checkpoint's state.json says; old ones are GPT-2's and name no family.

    KeyError or TypeError if it is none.
    """
    shape_class, _, _ = FAMILIES[fields.get("family", "gpt2")]
    return shape_class(**fields)


def from_pretrained(name_or_folder: str) -> LanguageModel:
    """A Hugging Face GPT-2 or Llama (hub name or folder); UserError if it cannot be opened."""
    shape = shape_from(hf.read_shape(name_or_folder, *FAMILIES))
    _, model_class, _ = FAMILIES[shape.family]
    return model_class.from_pretrained(name_or_folder)


def resized(shape: Shape, n_layer: int, n_head: int, n_embd: int) -> Shape:
    """The shape with other layers, heads or width; 0: the shape's own.

    A Llama's MLP keeps its proportion to the width. UserError where the numbers do not fit.
    """
    n_layer, n_head = n_layer or shape.n_layer, n_head or shape.n_head
    n_embd = n_embd or shape.n_embd
    is_llama = isinstance(shape, LlamaConfig)
    multiple = 2 * n_head if is_llama else n_head  # rotary positions turn a head's numbers in pairs
    if n_embd % multiple:
        twice = "twice " if is_llama else ""
        raise UserError(
            f"--n_embd {n_embd}: is not a multiple of {twice}--n_head {n_head}; "
            f"use {multiple * max(1, round(n_embd / multiple))}"
        )
    own = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    if is_llama:
        own["n_ffn"] = 64 * math.ceil(shape.n_ffn * n_embd / shape.n_embd / 64)
        own["n_kv_head"] = n_head if shape.n_kv_head == shape.n_head else shape.n_kv_head
        if n_head % own["n_kv_head"]:
            raise UserError(
                f"--n_head {n_head}: must be a multiple of the {shape.n_kv_head} heads of keys and "
                "values that --model has"
            )
    return replace(shape, **own)


def describe(shape: Shape) -> str:
    """Layers, heads and width, and what else a Llama's shape has."""
    text = f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}"
    if not isinstance(shape, LlamaConfig):
        return text
    head = "tied" if shape.tied else "not tied"
    return (
        f"{text}, {shape.n_kv_head} heads of keys and values, MLP of {shape.n_ffn}, "
        f"rotary base {shape.rope_theta:g}, head {head} (Llama)"
    )
