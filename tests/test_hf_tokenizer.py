"""Tokenizers in Hugging Face's format, from text to shards, training and export; and the fast
encoder, against the reference.
"""

import json
import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import command, expect_error, expect_ok
from test_tokenizer import TRICKY
from test_train import records, run

from cli import UserError
from corpus import fast, sample, tokenizer
from corpus.documents import Segment, read
from corpus.hf_tokenizer import TokenizerFile, byte_characters
from corpus.manifest import data_hash, read_manifest

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("fastokens")

EOT = "<|endoftext|>"
SIZES = {"32k": 32_000, "128k": 128_256}
# Of Llama 3's kind: letters with a sign before them, at most three digits.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added(token: str, i: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, "special": True, **flags}


def train_byte_level(pattern: str | None, n_tokens: int) -> dict:
    """The content of a tokenizer.json, trained on the synthetic sample."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    if pattern:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        steps.insert(0, split)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [record["text"] for _, record in sample.documents(0)]
    made.train_from_iterator(texts[::20], trainer)
    return json.loads(made.to_str())


def byte_level(n_vocab: int, pattern: str | None = None) -> dict:
    """A tokenizer of n_vocab tokens, whose learned ones have the highest ids."""
    spec = train_byte_level(pattern, 1000)
    vocab = spec["model"]["vocab"]
    n_above = len(vocab) + 1  # the learned tokens and end-of-text
    fillers = {f"filler{i}": i for i in range(n_vocab - n_above)}
    shift = len(fillers)
    spec["model"]["vocab"] = {**fillers, **{token: i + shift for token, i in vocab.items()}}
    spec["added_tokens"] = [added(EOT, n_vocab - 1)]
    return spec


def sentencepiece_like() -> dict:
    """As Llama 2 has it: a space before each text, bytes for unknown characters, <s> in front."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800, special_tokens=tokens, show_progress=False
    )
    made.train_from_iterator([r["text"] for _, r in sample.documents(0)][::20], trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    spec["pre_tokenizer"] = None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    kinds = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    spec["decoder"] = {"type": "Sequence", "decoders": kinds}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    return spec


def save(folder: Path, spec: dict, config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Path]:
    """Folders of tokenizers, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    specs = {
        "32k": byte_level(SIZES["32k"]),
        "128k": byte_level(SIZES["128k"], PATTERN),
        "sentencepiece": sentencepiece_like(),
    }
    return {name: save(root / name, spec) for name, spec in specs.items()}


KINDS = ("32k", "128k", "sentencepiece")


def encoder_of(name: str, kinds: dict[str, Path]) -> fast.Encoder:
    if name == "gpt2":
        return fast.make_encoder(tokenizer.describe("gpt2"), None)
    tokens = tokenizer.load(str(kinds[name]))
    return fast.make_encoder(tokenizer.entry_of(tokens), tokens.file)


# The fast encoder


def classes() -> list[str]:
    """Three characters of each category, and those that patterns name."""
    of_category: dict[tuple, list[str]] = {}
    for i in range(0x110000):
        if not 0xD800 <= i < 0xE000:
            key = unicodedata.category(chr(i)), chr(i).isspace()
            of_category.setdefault(key, []).append(chr(i))
    found = set(" \n\r\t\x1c'a1.sSlLvVeErRdDmM\u017f\u212a_/<>|")
    for members in of_category.values():
        found |= {members[0], members[len(members) // 2], members[-1]}
    return sorted(found)


def odd_texts(rng: random.Random, step: int, n_random: int):
    """Every step-th code point, all pairs of classes of characters, random characters."""
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000][::step]
    for form in ("{}", "a{}b", " {} ", "1{}\n"):
        for i in range(0, len(points), 64):
            yield "".join(form.format(c) for c in points[i : i + 64])
    characters = classes()
    for a in characters:
        yield "\x00".join(a + b for b in characters)
        yield "".join(f"x{a}{a}{b}y" for b in characters)
    likely = characters + list("etaoin shrdlu") * 4
    for _ in range(n_random // 2000):
        yield "".join(rng.choices(likely, k=1000))
        yield "".join(rng.choices(points, k=1000))
    yield from TRICKY
    yield f"a{EOT}b<s>c</s><unk> {EOT}"


@pytest.mark.parametrize("name", ["gpt2", *KINDS])
def test_the_fast_encoder_gives_the_references_ids(name, kinds):
    encoder = encoder_of(name, kinds)
    assert "fastokens" in encoder.about and encoder.reference
    assert_same(encoder, odd_texts(random.Random(0), 101, 40_000))


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", *KINDS])
def test_the_fast_encoder_on_all_code_points_and_real_text(name, kinds, real_text):
    encoder = encoder_of(name, kinds)
    assert_same(encoder, odd_texts(random.Random(1), 1, 2_000_000))
    assert_same(encoder, real_texts(real_text))


def real_texts(folder: Path):
    for path in sorted(folder.glob("*/*.jsonl.zst")):
        segment = Segment(str(path), "train", 0, None, path.stat().st_size)
        for _, _, line in read({"source": "files"}, segment):
            yield json.loads(line)["text"]


def assert_same(encoder: fast.Encoder, texts) -> None:
    reference = encoder.reference()
    for text in texts:
        ours, theirs = encoder.encode(text), reference(text)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), text[:200]


def prepare(out, *flags, source="sample"):
    return command(
        "prepare_slimpajama.py", "--source", source, "--workers", 1, "--out", out, *flags
    )


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A twentieth of the synthetic sample."""
    path = tmp_path_factory.mktemp("few") / "train.jsonl"
    some = [record for _, record in sample.documents(0)][::20]
    path.write_text("".join(json.dumps(record) + "\n" for record in some))
    return path


def prepare_file(path, out, *flags):
    return prepare(out, "--input", path, "--split", "train=train", *flags, source="files")


def records_file(path: Path, n: int) -> Path:
    meta = {"redpajama_set_name": "RedPajamaC4"}
    lines = [json.dumps({"text": f"text {i} is here", "meta": meta}) + "\n" for i in range(n)]
    path.write_text("".join(lines))
    return path


def test_a_difference_stops_the_preparation_and_names_the_document(tmp_path, monkeypatch):
    path = records_file(tmp_path / "train.jsonl", 30)
    right = fast.open_fastokens

    def wrong(spec, dtype):
        encode = right(spec, dtype)
        return lambda text: encode(text.replace("17", "71"))

    monkeypatch.setattr(fast, "open_fastokens", wrong)
    monkeypatch.setattr(fast, "CHECK_EVERY", 9)  # documents 9, 18 and 27
    done = prepare_file(path, tmp_path / "out")
    expect_error(done, f"{path}, line 18", "fastokens", "the tokens differ from number 1 on")
    monkeypatch.setattr(fast, "open_fastokens", right)
    expect_ok(prepare_file(path, tmp_path / "out"))


def test_without_fastokens_the_reference_gives_the_same_shards(kinds, few, tmp_path, monkeypatch):
    def refuse(spec, dtype):
        raise ValueError("unsupported model")

    def prepared(name: str) -> tuple[str, bytes]:
        text = expect_ok(prepare_file(few, tmp_path / name, "--tokenizer", kinds["128k"]))
        return text, (tmp_path / name / "manifest.json").read_bytes()

    expect_ok(prepare_file(few, tmp_path / "fast", "--tokenizer", kinds["128k"], "--dry_run"))
    text, expected = prepared("fast")
    assert "by fastokens" in text and "one document in 1,000 compared with tokenizers" in text
    with monkeypatch.context() as patch:
        patch.setattr(fast, "open_fastokens", refuse)
        refused = prepared("refused")
    monkeypatch.setitem(sys.modules, "fastokens", None)
    not_installed = prepared("not installed")
    for text, manifest in (refused, not_installed):
        assert "by tokenizers (fastokens " in text
        assert manifest == expected


@pytest.mark.parametrize(
    "name, expected", [("gpt2", "8cd683ca704b1ae6"), ("bytes", "4f446fdfa318c17c")]
)
def test_shards_of_gpt2_and_bytes_are_what_they_always_were(name, expected, tmp_path):
    expect_ok(prepare(tmp_path / "out", "--tokenizer", name))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["dtype"] == "uint16" and data_hash(manifest) == expected
    assert not (tmp_path / "out" / "tokenizer").exists()


# From text to export


@pytest.fixture(scope="module", params=["32k", "128k"])
def trained(request, kinds, tmp_path_factory):
    """(name, data folder, run folder) after two steps."""
    root = tmp_path_factory.mktemp(request.param)
    data, out = root / "data", root / "run"
    expect_ok(prepare(data, "--tokenizer", kinds[request.param]))
    flags = ("--max_steps=2", "--reweight=linupper", "--reweight_unit=byte", "--n_embd=16")
    expect_ok(run(data, out, *flags, "--model=auto", "--n_layer=1", "--n_head=1"))
    return request.param, data, out


def test_shards_hold_the_tokens(trained, kinds):
    name, data, _ = trained
    manifest = read_manifest(data)
    n_vocab = SIZES[name]
    dtype = "uint32" if n_vocab > 2**16 else "uint16"
    assert manifest["dtype"] == dtype and manifest["tokenizer"]["n_vocab"] == n_vocab
    original = (kinds[name] / "tokenizer.json").read_bytes()
    assert (data / "tokenizer" / "tokenizer.json").read_bytes() == original
    plain = tokenizers.Tokenizer.from_file(str(kinds[name] / "tokenizer.json"))
    plain.encode_special_tokens = True
    expected = []
    for split, record in sample.documents(0):
        if split == "train" and record["meta"]["redpajama_set_name"] == "RedPajamaArXiv":
            ids = plain.encode(record["text"], add_special_tokens=False).ids
            expected += [*ids, n_vocab - 1]
    shards = [np.load(data / shard["file"]) for shard in manifest["domains"]["arxiv"]["train"]]
    found = np.concatenate(shards)
    assert found.dtype == dtype and found.tolist() == expected
    assert (found >= 2**16).mean() > 0.9 if name == "128k" else found.max() < 2**16


def test_verify_counts_ids_and_bytes(trained, tmp_path):
    _, data, _ = trained
    text = expect_ok(command("prepare_slimpajama.py", "--verify", data))
    assert "are as the manifest says" in text
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["domains"]["c4"]["val"][0]["bytes"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    expect_error(command("prepare_slimpajama.py", "--verify", copy), "c4: val holds")


def test_training_and_evaluation(trained):
    _, _, out = trained
    rows = records(out, "train")
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    text = expect_ok(command("eval/perplexity.py", "--run", out, "--windows", 1))
    assert "arxiv" in text


def test_samples_and_export_need_the_run_alone(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, data, out = trained
    moved = data.with_name("moved")
    os.rename(data, moved)
    try:
        text = expect_ok(command("eval/sample.py", "--run", out, "--max_tokens", 5))
        expect_ok(command("scripts/export_hf.py", "--run", out, "--to", tmp_path / "hf"))
    finally:
        os.rename(moved, data)
    assert "== 1 of 1" in text
    ours = tokenizer.load(str(moved if not data.exists() else data / "tokenizer"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == SIZES[name]
    assert (theirs.eos_token_id, theirs.decode([ours.eot_token])) == (ours.eot_token, EOT)
    for text in (*TRICKY[:-4], f"a{EOT}b"):
        ids = ours.encode_to_numpy(text).tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text


def test_an_exported_model_is_evaluated_with_its_own_tokenizer(trained, tmp_path):
    pytest.importorskip("transformers")
    _, data, out = trained
    expect_ok(command("scripts/export_hf.py", "--run", out, "--to", tmp_path / "hf"))
    flags = ("--hf", tmp_path / "hf", "--data_dir", data, "--windows", 1)
    assert "arxiv" in expect_ok(command("eval/perplexity.py", *flags))
    start = ("--init_from", tmp_path / "hf", "--model=auto", "--max_steps=1", "--eval_windows=1")
    expect_ok(run(data, tmp_path / "again", *start))


def test_no_token_is_added_to_an_exported_text(kinds, tmp_path):
    """The file of the original puts <s> before each text; no document of the training had one."""
    transformers = pytest.importorskip("transformers")
    from scripts.export_hf import write_tokenizer

    ours = tokenizer.load(str(kinds["sentencepiece"]))
    write_tokenizer(ours, 1024, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "one two three four five six seven é"
    ids = ours.encode_to_numpy(text).tolist()
    assert theirs(text)["input_ids"] == ids and len(ids) > 6
    assert theirs.decode(ids).strip() == text


def test_a_changed_tokenizer_of_a_data_folder(trained, tmp_path):
    _, data, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    with open(copy / "tokenizer" / "tokenizer.json", "a") as file:
        file.write(" ")
    expect_error(command("prepare_slimpajama.py", "--verify", copy), "no copy of it in", str(copy))


def test_workers_and_parts_share_the_tokenizer(trained, kinds, tmp_path):
    name, data, _ = trained
    flags = ("--source", "sample", "--tokenizer", kinds[name])
    for folder, more in (("workers", ("--workers", 2)), ("parts", ("--part", "1/1"))):
        done = command("prepare_slimpajama.py", *flags, "--out", tmp_path / folder, *more)
        expect_ok(done)
    copy = tmp_path / "parts" / "tokenizer"
    copy.rename(tmp_path / "away")
    merge = ("prepare_slimpajama.py", "--merge", "--out", tmp_path / "parts")
    expect_error(command(*merge), "tokenizer is missing", "copy it from one of the parts")
    (tmp_path / "away").rename(copy)
    expect_ok(command(*merge))
    expected = data_hash(read_manifest(data))
    for folder in ("workers", "parts"):
        assert data_hash(read_manifest(tmp_path / folder)) == expected


def test_a_second_start_and_another_tokenizer(kinds, few, tmp_path):
    out = tmp_path / "out"
    expect_ok(prepare_file(few, out, "--tokenizer", kinds["32k"]))
    elsewhere = shutil.copytree(kinds["32k"], tmp_path / "elsewhere")
    assert "complete already" in expect_ok(prepare_file(few, out, "--tokenizer", elsewhere))
    expect_error(
        prepare_file(few, out, "--tokenizer", kinds["128k"]), "holds other data", "tokenizer was"
    )
    own = out / "tokenizer"
    expect_ok(prepare_file(few, out, "--tokenizer", own, "--overwrite"))
    assert (own / "tokenizer.json").is_file()


# Bytes of text


def test_bytes_of_each_token(kinds):
    for name in ("32k", "128k"):
        tokens = tokenizer.load(str(kinds[name]))
        lengths = tokens.file.byte_lengths()
        assert tokens.adds_up and lengths[tokens.eot_token] == 0
        for text in TRICKY:
            ids = tokens.encode_to_numpy(text)
            assert lengths[ids].sum() == len(text.encode())
            assert b"".join(map(tokens.token_bytes, ids.tolist())) == text.encode()
    tokens = tokenizer.load(str(kinds["sentencepiece"]))
    lengths = tokens.file.byte_lengths()
    assert not tokens.adds_up
    for text in ("word and word", "日本 é", "x"):
        ids = tokens.encode_to_numpy(text)
        assert lengths[ids].sum() == len(text.encode()) + 1  # the space before each text


def test_byte_characters_are_gpt2s():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(byte_characters().values()) == sorted(alphabet)
    assert byte_characters()[ord(" ")] == "\u0120"


@pytest.mark.parametrize("name", KINDS)
def test_pieces_of_a_large_text_have_its_tokens(name, kinds):
    from corpus import units

    encoder = encoder_of(name, kinds)
    text = "Some words, 12 numbers.\n\n  And x1 y_2 é 日本 z " * 30
    before, units.PIECE = units.PIECE, 100
    try:
        pieces = list(units.encode(encoder, memoryview(text.encode()), 7))
    finally:
        units.PIECE = before
    assert np.concatenate(pieces).tolist() == [*encoder.encode(text).tolist(), 7]
    assert len(pieces) == 2 if name == "sentencepiece" else len(pieces) > 5


# The end of a text


@pytest.mark.parametrize(
    "special, config, eot, expected",
    [
        ([EOT], None, None, EOT),
        (["<s>", "</s>"], None, None, "</s>"),
        (["<s>", "</s>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, None, "<|im_end|>"),
        (["<a>", "<b>"], {"eos_token": {"content": "<b>"}}, None, "<b>"),
        (["<a>", "<b>"], {"eos_token": "<b>"}, "<a>", "<a>"),
        (["<a>", "<b>"], None, None, "does not say which token ends a text (special tokens: <a>"),
        (["</s>", EOT], {"eos_token": None}, None, "give it: --eot TOKEN"),
        (["<a>", "<b>"], {"eos_token": "<c>"}, None, "does not say which token ends a text"),
        (["<abc>", "<b>"], None, "<abd>", "--eot <abd>: no token of"),
        (["<abc>", "<b>"], None, "<abd>", "did you mean '<abc>'"),
    ],
)
def test_the_token_that_ends_a_text(special, config, eot, expected, tmp_path):
    spec = byte_level(2000)
    spec["added_tokens"] = [added(token, 1999 + i) for i, token in enumerate(special)]
    save(tmp_path, spec, config)
    try:
        found = TokenizerFile(tmp_path, eot).eot
    except UserError as error:
        found = str(error)
    assert found == expected or " " in expected and expected in found


def test_eot_of_a_named_tokenizer(tmp_path):
    done = prepare(tmp_path / "out", "--tokenizer", "gpt2", "--eot", EOT)
    expect_error(done, "--eot", "leave out")


# Files that are wrong


def test_files_that_are_no_tokenizers(kinds, tmp_path):
    spec = json.loads((kinds["32k"] / "tokenizer.json").read_text())
    wrong = {
        "broken JSON": "{",
        "it has no model": "[]",
        "no tokenizer that can be used": json.dumps({**spec, "model": {"type": "None"}}),
        "dropout": json.dumps({**spec, "model": {**spec["model"], "dropout": 0.1}}),
    }
    for words, content in wrong.items():
        path = tmp_path / "tokenizer.json"
        path.write_text(content)
        expect_error(prepare(tmp_path / "out", "--tokenizer", path), words, str(path))
    path.unlink()
    expect_error(prepare(tmp_path / "out", "--tokenizer", tmp_path), "no tokenizer.json in it")
    done = prepare(tmp_path / "out", "--tokenizer", "gpt4")
    expect_error(done, "unknown tokenizer 'gpt4'", "gpt2, bytes", "tokenizer.json")
    assert not (tmp_path / "out").exists()
