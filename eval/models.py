"""The model that an evaluation is about: a checkpoint of a run, or a Hugging Face GPT-2 (--run, --hf)."""

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import tokenizer
from errors import UserError
from model import GPT


class Evaluated(NamedTuple):
    """On the CPU; `about` is what a record says of it: step or hf, and dtype, that of the matrix products."""
    model: GPT
    tokens: tokenizer.Tokenizer
    about: dict
    data_dir: str | None  # that the run was trained on


def find_run(path: str) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) from either one."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        folder = folder.resolve()
        return folder.parents[1] if folder.parent.name == "checkpoints" else folder, folder
    newest = checkpoint.find_latest(folder)
    if newest is None:
        raise UserError(f"--run {path}: no checkpoint there; give a run folder (it has checkpoints/) or a checkpoint")
    return folder, newest


def add_flags(parser: ArgumentParser, result: str) -> None:
    """--run or --hf, --dtype, and --to, by default RUN/eval/`result`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder, or one of its checkpoints")
    source.add_argument("--hf", metavar="NAME_OR_FOLDER", help="a Hugging Face GPT-2 instead, such as gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the matrix products (default: on a GPU the run's, else float32)")
    parser.add_argument("--to", type=Path, metavar="FILE",
                        help=f"JSON file for the result (default: RUN/eval/{result}; with --hf none)")


def open_model(args) -> Evaluated:
    """What --run or --hf names; UserError if it does not open, or if its tokenizer is none of ours."""
    if args.hf:
        model = GPT.from_pretrained(args.hf)
        for tokens in map(tokenizer.load, tokenizer.NAMES):
            if tokens.n_vocab == model.config.vocab_size and tokenizer.is_that_of(tokens.name, args.hf):
                return Evaluated(model, tokens, {"hf": args.hf, "dtype": args.dtype or "float32"}, None)
        raise UserError(f"--hf {args.hf} has a tokenizer of {model.config.vocab_size} tokens that is none of "
                        f"{', '.join(tokenizer.NAMES)}; evaluate it with the harness itself: lm_eval --model hf")
    _, folder = find_run(args.run)
    state = checkpoint.read_json(folder / "state.json")
    if lacking := [key for key in ("step", "gpt", "identity", "data_dir", "tokenizer_sha256") if key not in state]:
        raise UserError(f"{folder}/state.json has no {', '.join(lacking)}: another version of train.py wrote it; "
                        "evaluate it with that one (git_commit in the run's config.json)")
    dtype = state["identity"]["dtype"] if torch.cuda.is_available() else "float32"
    tokens = tokenizer.find(state["tokenizer_sha256"])
    return Evaluated(checkpoint.load_model(folder), tokens, {"step": state["step"], "dtype": args.dtype or dtype},
                     state["data_dir"])


def result_path(args, result: str) -> Path | None:
    """The file of --to, or RUN/eval/`result`, in a folder that is there; UserError now if it cannot be written."""
    if args.to is None and args.hf:
        return None
    path = args.to or find_run(args.run)[0] / "eval" / result
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give --to a file in a folder that can be made") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'its folder cannot be written to'}; give --to a "
                        f"file, such as results/{result}")
    return path
