"""Tokenizers in Hugging Face's format: tokenizer.json, read by the library `tokenizers`.

A data folder keeps a copy in DATA/tokenizer, and a run in RUN/tokenizer: tokenizer.json as it was
given, and a tokenizer_config.json that names the token that ends a text. So neither needs the
original.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import files
from cli import UserError, nearest
from corpus.manifest import TOKENIZER, dtype_for

FILE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # may name the end of a text
# Tokens that models end a text with, for files that nothing beside them explains
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
# Whether a text may be cut before a space is tried on this one.
CUT = r"[^\W_](?= [^\W_])"
CUT_PROBE = "Naïve readers count 3141 words of x1 or 日本 text 42 times a day"
BLANK = "\u2581"  # what sentencepiece writes for a space


class TokenizerFile:
    """A tokenizer.json. UserError where it does not open or nothing says how a text ends.

    Special tokens in a text are encoded as plain text, and none is added.
    """

    def __init__(self, given: str | Path, eot: str | None = None):
        self.path = find_file(given)
        self.content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.spec = read_spec(self.path, self.content)
        self.backend = open_backend(self.path, self.spec)
        self.vocab = self.backend.get_vocab(with_added_tokens=True)  # token -> id
        if not self.vocab:
            raise damaged(self.path, "it has no vocabulary")
        self.n_vocab = max(self.vocab.values()) + 1
        self.dtype = np.dtype(dtype_for(self.n_vocab))
        self.eot = find_eot(self, eot)
        self.eot_token = self.vocab[self.eot]

    def encode(self, text: str) -> np.ndarray:
        """(n,) ids. A lone surrogate is an error: no document has one."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def special(self) -> set[str]:
        added = self.spec.get("added_tokens") or []
        return {token["content"] for token in added if token.get("special")}

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a token's characters stand for bytes, as GPT-2 writes them."""
        return any(kind == "ByteLevel" for kind in types_of(self.spec, ("decoder",)))

    @cached_property
    def adds_up(self) -> bool:
        """Whether the bytes of a text's tokens are always those of the text."""
        if not self.is_byte_level or self.spec.get("normalizer"):
            return False
        adds_space = '"add_prefix_space": true' in json.dumps(self.spec.get("pre_tokenizer"))
        has_all_bytes = all(character in self.vocab for character in byte_characters().values())
        return has_all_bytes and not adds_space

    @cached_property
    def tokens(self) -> list[bytes]:
        """The text of each id; nothing for an id that no token has."""
        texts = [b""] * self.n_vocab
        added = {token["content"] for token in self.spec.get("added_tokens") or []}
        for token, i in self.vocab.items():
            texts[i] = token.encode() if token in added else self._text_of(token)
        return texts

    def _text_of(self, token: str) -> bytes:
        if self.is_byte_level:
            try:
                return bytes(map(BYTE_OF.__getitem__, token))
            except KeyError:
                return token.encode()
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        if is_byte and self.spec["model"].get("byte_fallback"):
            return bytes.fromhex(token[3:5])
        return token.replace(BLANK, " ").removeprefix("##").encode()

    def byte_lengths(self) -> np.ndarray:
        """(n_vocab,) bytes of text of each id; 0 for special tokens, which stand for no text."""
        lengths = np.array([len(token) for token in self.tokens])
        for token in self.special:
            lengths[self.vocab[token]] = 0
        unknown = self.spec["model"].get("unk_token")
        if unknown in self.vocab:
            lengths[self.vocab[unknown]] = 1  # it stands for some text, of which no more is known
        lengths[self.eot_token] = 0
        return lengths

    def cut(self) -> str | None:
        """A pattern of the places where a large text may be cut; None if there are none.

        Tokenizers that put a space before each text have none.
        """
        words = CUT_PROBE.split(" ")
        whole = self.encode(CUT_PROBE).tolist()
        for i in range(1, len(words)):
            first, second = " ".join(words[:i]), " " + " ".join(words[i:])
            if self.encode(first).tolist() + self.encode(second).tolist() != whole:
                return None
        return CUT

    def spec_to_run(self) -> str:
        """The file without what shortens, fills or frames a text, for another library."""
        return json.dumps(plain(self.spec), ensure_ascii=False)


def find_file(given: str | Path) -> Path:
    """The tokenizer.json that a path names, itself or its folder."""
    path = Path(given)
    if path.is_dir():
        path = path / FILE
        if not path.is_file():
            raise UserError(
                f"--tokenizer {given}: no {FILE} in it; a folder of Hugging Face's that has only a "
                "model of sentencepiece gets one from transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
    return path


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is no tokenizer that can be used ({reason}); restore it")


def read_spec(path: Path, content: bytes) -> dict:
    """The content of a tokenizer.json."""
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"broken JSON, {error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise damaged(path, "it has no model")
    if spec["model"].get("dropout"):
        raise UserError(
            f"{path} has a dropout of {spec['model']['dropout']}, so a text has no fixed tokens; "
            "set model.dropout in it to null"
        )
    return spec


def plain(spec: dict) -> dict:
    return {**spec, "truncation": None, "padding": None, "post_processor": None}


def open_backend(path: Path, spec: dict) -> Any:
    """The tokenizer of the library `tokenizers`."""
    import tokenizers  # only here: gpt2 and bytes do without

    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(plain(spec), ensure_ascii=False))
        backend.encode_special_tokens = True
        backend.encode("a", add_special_tokens=False)
    except Exception as error:  # the library raises Exception itself
        raise damaged(path, str(error).split("\n")[0]) from None
    return backend


def find_eot(file: TokenizerFile, given: str | None) -> str:
    """The token that ends a text: --eot, or what the files beside say, or one of ENDS."""
    if given is not None:
        if given not in file.vocab:
            raise UserError(
                f"--eot {given}: no token of {file.path}{nearest(given, file.special)} "
                f"({special_tokens(file)})"
            )
        return given
    for name in SETTINGS:
        token = eos_of(file.path.with_name(name))
        if token in file.vocab:
            return token
    found = [token for token in ENDS if token in file.special]
    if len(found) != 1:
        raise UserError(
            f"{file.path} does not say which token ends a text ({special_tokens(file)}); give it: "
            "--eot TOKEN"
        )
    return found[0]


def special_tokens(file: TokenizerFile) -> str:
    names = sorted(file.special, key=file.vocab.__getitem__)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"special tokens: {', '.join(names[:20]) or 'none'}{more}"


def eos_of(path: Path) -> str | None:
    """The eos_token of one of SETTINGS; None where there is none."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text()).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    return token.get("content") if isinstance(token, dict) else token


def types_of(value: Any, keys: tuple[str, ...] | None = None) -> Iterator[str]:
    """Each "type" in a part of a tokenizer.json; keys: only below these."""
    if isinstance(value, list):
        for item in value:
            yield from types_of(item)
    if isinstance(value, dict):
        if keys is None and isinstance(value.get("type"), str):
            yield value["type"]
        for key, item in value.items():
            if keys is None or key in keys:
                yield from types_of(item)


# The copy of a data or run folder


def write_copy(folder: Path, content: bytes, eot: str) -> None:
    """Write FOLDER/tokenizer: the bytes of a tokenizer.json, and which token ends a text."""
    target = folder / TOKENIZER
    target.mkdir(parents=True, exist_ok=True)
    files.write_text(target / SETTINGS[0], json.dumps({"eos_token": eot}) + "\n")
    files.write_bytes(target / FILE, content)


def pass_copy_on(source: Path, to: Path, sha256: str) -> None:
    """Copy the tokenizer that a data folder keeps to a run folder; nothing if it keeps none."""
    path = source / TOKENIZER / FILE
    if path.is_file() and not has_sha256(to / TOKENIZER / FILE, sha256):
        write_copy(to, path.read_bytes(), str(eos_of(path.with_name(SETTINGS[0]))))


def has_sha256(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def find_copy(folder: Path, sha256: str) -> TokenizerFile | None:
    """The tokenizer that a folder keeps; None if it keeps none with this hash."""
    path = folder / TOKENIZER / FILE
    return TokenizerFile(path) if has_sha256(path, sha256) else None


# Bytes as characters


def byte_characters() -> dict[int, str]:
    """The character that GPT-2 writes for each byte.

    It is the character of that number, or one from 256 on where that character has no shape of its
    own.
    """
    characters = {}
    hidden = []
    for byte in range(256):
        character = chr(byte)
        if character.isprintable() and character != " ":
            characters[byte] = character
        else:
            hidden.append(byte)
    for i, byte in enumerate(hidden):
        characters[byte] = chr(256 + i)
    return characters


BYTE_OF = {character: byte for byte, character in byte_characters().items()}
