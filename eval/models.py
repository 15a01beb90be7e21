"""Opening the model that is evaluated: a checkpoint of a run, or a Hugging Face GPT-2 or Llama."""

import hashlib
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from cli import UserError
from corpus import tokenizer
from corpus.manifest import read_manifest
from families import from_pretrained
from model import LanguageModel
from recipe import DTYPES
from runtime import checkpoint
from runtime.memory import CHUNK


class Evaluated(NamedTuple):
    """A model to evaluate."""

    model: LanguageModel  # on the CPU
    tokens: tokenizer.Tokenizer
    about: dict  # what a record says of it: step or hf, and dtype, that of the matrix products
    data_dir: str | None  # the data that the run was trained on


def find_run(path: str) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) from the path of either."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        folder = folder.resolve()
        is_in_run = folder.parent.name == "checkpoints"
        return (folder.parents[1] if is_in_run else folder), folder
    newest = checkpoint.find_latest(folder)
    if newest is None:
        raise UserError(
            f"--run {path}: no checkpoint in it; give a run folder (it has checkpoints/) or a "
            "checkpoint"
        )
    return folder, newest


def add_flags(parser: ArgumentParser, result: str) -> None:
    """Add --run or --hf, --dtype, and --to, by default RUN/eval/`result`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder, or one of its checkpoints")
    source.add_argument(
        "--hf", metavar="NAME_OR_FOLDER", help="a Hugging Face GPT-2 or Llama instead, such as gpt2"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the matrix products (default: on a GPU that of the run, otherwise float32)",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help=f"JSON file for the result (default: RUN/eval/{result}; with --hf none)",
    )


def open_model(args: Namespace) -> Evaluated:
    """The model of --run or --hf; UserError if it does not open or its tokenizer is not ours.

    Sets the precision of matrix products in float32.
    """
    if args.hf:
        evaluated = open_hf(args.hf, args.dtype, getattr(args, "data_dir", None))
    else:
        evaluated = open_run(args.run, args.dtype)
    evaluated.model.loss_chunk = CHUNK  # all logits of 32 x 1,024 tokens would take 20 GB
    is_tf32 = evaluated.about["dtype"] == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    return evaluated


def open_run(run: str, dtype: str | None) -> Evaluated:
    """The newest checkpoint of a run, or the checkpoint that is given."""
    run_dir, folder = find_run(run)
    path = folder / "state.json"
    state = checkpoint.read_json(path)
    expected = ("step", "gpt", "identity", "data_dir", "tokenizer_sha256")
    missing = [key for key in expected if key not in state]
    if missing:
        raise UserError(
            f"{path} has no {', '.join(missing)}: another version of train.py wrote it; "
            "evaluate it with that one (git_commit in the run's config.json)"
        )
    of_run = state["identity"]["dtype"] if torch.cuda.is_available() else "float32"
    tokens = tokenizer.find(state["tokenizer_sha256"], run_dir, state["data_dir"])
    about = {
        "step": state["step"],
        "model_sha256": checkpoint.model_sha256(state),
        "dtype": dtype or of_run,
    }
    return Evaluated(checkpoint.load_model(folder), tokens, about, state["data_dir"])


def open_hf(name: str, dtype: str | None, data_dir: str | None = None) -> Evaluated:
    """A Hugging Face model whose tokenizer is one of ours, the data's, or a file in its folder."""
    model = from_pretrained(name)
    n_rows = model.config.vocab_size
    for tokens in candidates(name, data_dir):
        fits = tokenizer.has_rows_for(tokens.n_vocab, n_rows)
        if fits and tokenizer.matches_hf_tokenizer(tokens, name):
            about = {
                "hf": name,
                "model_sha256": hash_of_parameters(model),
                "dtype": dtype or "float32",
            }
            return Evaluated(model, tokens, about, None)
    raise UserError(
        f"--hf {name} has a vocabulary of {n_rows} rows and a tokenizer that is none of "
        f"{', '.join(tokenizer.NAMES)}; evaluate it with the harness itself: lm_eval --model hf"
    )


def candidates(name: str, data_dir: str | None) -> Iterator[tokenizer.Tokenizer]:
    """The tokenizers that a Hugging Face model may have."""
    yield from map(tokenizer.load, tokenizer.NAMES)
    if data_dir:
        yield tokenizer.find(read_manifest(data_dir)["tokenizer"]["sha256"], data_dir)
    elif (Path(name) / "tokenizer.json").is_file():
        with suppress(UserError):  # one that does not say how a text ends
            yield tokenizer.load(name)


def hash_of_parameters(model: LanguageModel) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy())
    return digest.hexdigest()


def result_path(args: Namespace, result: str) -> Path | None:
    """The file of --to, or RUN/eval/`result`; makes its folder. None with --hf and no --to.

    UserError if the file cannot be written, before any work is done.
    """
    if args.to is None and args.hf:
        return None
    path = args.to or find_run(args.run)[0] / "eval" / result
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give --to a file in a folder that can be made"
        ) from None
    reason = ""
    if path.is_dir():
        reason = "is a folder"
    elif not os.access(path.parent, os.W_OK):
        reason = "its folder cannot be written to"
    if reason:
        raise UserError(f"{path}: {reason}; give --to a file, such as results/{result}")
    return path
