"""Encoding by the library `fastokens`, several times as fast, and checked against the reference.

The reference is tiktoken for gpt2 and `tokenizers` for a tokenizer.json. While data is prepared, it
encodes one document in CHECK_EVERY as well, and a difference stops the preparation. Where fastokens
is not installed or refuses a file, the reference does all.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus import tokenizer as tokenizers
from corpus.hf_tokenizer import CUT_PROBE, TokenizerFile
from corpus.manifest import dtype_for

CHECK_EVERY = 1000  # documents


class Encoder(NamedTuple):
    """How a preparation makes tokens."""

    encode: Callable[[str], np.ndarray]  # text -> (n,) ids, of the type of the shards
    # the slower encoder that it is compared with, made when it is first needed; None: it is this
    reference: Callable[[], Callable[[str], np.ndarray]] | None
    about: str  # what encodes, for the plan
    cut: str | None  # where a large text may be cut


def file_of(entry: dict, folder: Path) -> TokenizerFile | None:
    """The file of a tokenizer, from its copy in a data folder; None for ours."""
    if entry["name"] in tokenizers.NAMES:
        return None
    return tokenizers.find(entry["sha256"], folder).file


def make_encoder(entry: dict, file: TokenizerFile | None) -> Encoder:
    """The encoder of a tokenizer. entry: the manifest's."""
    if entry["name"] == "gpt2":
        return fast_or_reference(
            gpt2_spec, cache(lambda: tokenizers.load("gpt2").encode_to_numpy), "tiktoken", entry
        )._replace(cut=tokenizers.GPT2_CUT)
    if file is None:
        tokens = tokenizers.load(entry["name"])
        return Encoder(tokens.encode_to_numpy, None, "Python", tokens.cut)
    encoder = fast_or_reference(file.spec_to_run, lambda: file.encode, "tokenizers", entry)
    return encoder._replace(cut=file.cut())


def describe(entry: dict, file: TokenizerFile | None) -> str:
    """The line of the plan about a tokenizer and what encodes."""
    if entry["name"] == "gpt2" and not why_not():
        about = fast_about("tiktoken")  # without the half second in which it opens
    else:
        about = make_encoder(entry, file).about
    return (
        f"tokenizer {entry['name']}: {entry['n_vocab']:,} tokens, {dtype_for(entry['n_vocab'])}, "
        f"by {about}"
    )


def fast_about(reference: str) -> str:
    version = importlib.metadata.version("fastokens")
    return f"fastokens {version}, one document in {CHECK_EVERY:,} compared with {reference}"


def fast_or_reference(
    make_spec: Callable[[], str],
    reference: Callable[[], Callable[[str], np.ndarray]],
    name: str,
    entry: dict,
) -> Encoder:
    """fastokens where it opens the tokenizer, otherwise the reference, called `name`."""
    reason = why_not()
    if not reason:
        try:
            encode = open_fastokens(make_spec(), np.dtype(dtype_for(entry["n_vocab"])))
        except Exception as error:  # a refused file raises ValueError, a bug in it anything
            reason = f"fastokens refuses the file: {str(error).splitlines()[0]}"
    if reason:
        return Encoder(reference(), None, f"{name} ({reason})", None)
    return Encoder(encode, reference, fast_about(name), None)


def why_not() -> str:
    """Why fastokens cannot be used; "" if it can."""
    try:
        import fastokens  # noqa: F401
    except ImportError as error:
        return f"fastokens cannot be used: {error}"
    return ""


def open_fastokens(spec: str, dtype: np.dtype) -> Callable[[str], np.ndarray]:
    """text -> ids by a tokenizer.json; ValueError where fastokens refuses it."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # each worker has one core
    import fastokens

    encode_batch = fastokens.Tokenizer.from_json_str(spec).encode_batch_flat

    def encode(text: str) -> np.ndarray:
        try:
            ids, _ = encode_batch([text], split_special_tokens=True)
        except UnicodeEncodeError:
            return encode(tokenizers.replace_surrogates(text))
        return np.frombuffer(ids, "<u4").astype(dtype)

    encode(CUT_PROBE)
    return encode


def first_difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The first place at which two rows of ids differ, from 0."""
    n = min(len(ours), len(theirs))
    different = np.flatnonzero(ours[:n] != theirs[:n])
    return int(different[0]) if len(different) else n


def gpt2_spec() -> str:
    """GPT-2's tokenizer as a tokenizer.json, without the special token: it is plain text here."""
    bpe, encoder = tokenizers.gpt2_files()
    lines = bpe.read_text(encoding="utf-8").split("\n")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {
        "type": "BPE",
        "vocab": json.loads(encoder.read_text(encoding="utf-8")),
        "merges": [line for line in lines if line and not line.startswith("#version")],
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {**byte_level, "use_regex": True},
            "decoder": byte_level,
            "model": model,
        }
    )
