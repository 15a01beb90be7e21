"""Documents to shards: every source through the same path, and what goes wrong on the way."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, command, expect_error, expect_ok

from corpus import tokenizer
from corpus.manifest import DOMAINS, find_name_defect, read_manifest

TEXTS = {
    "RedPajamaC4": ["Buy now.", "Grüße, <|endoftext|> and more"],
    "RedPajamaGithub": ["def f():\n    return 1\n"],
}
RECORDS = [
    {"text": t, "meta": {"redpajama_set_name": name}}
    for name, texts in TEXTS.items()
    for t in texts
]


def write(path, records=RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps(r) + "\n" for r in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    else:
        if path.suffix != ".jsonl":
            raw = (
                gzip.compress(raw)
                if path.suffix == ".gz"
                else pa.compress(raw, "zstd", asbytes=True)
            )
        path.write_bytes(raw)
    return path


def prepare(out, *args, kind="bytes", source="files"):
    """With one worker, in this process; tests/test_prepare_parallel.py has several."""
    flags = ("--source", source, "--tokenizer", kind, "--workers", 1, "--out", out)
    return command("prepare_slimpajama.py", *flags, *args)


def tokens(out, domain, split):
    shards = read_manifest(out)["domains"][domain][split]
    return np.concatenate([np.load(out / s["file"]) for s in shards])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("kind", tokenizer.NAMES)
def test_every_format_gives_the_documents_tokens(tmp_path, suffix, kind):
    for split in ("train", "validation"):
        write(tmp_path / "in" / split / f"part-0{suffix}")
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", kind=kind))
    t = tokenizer.load(kind)
    for name, domain in (("RedPajamaC4", "c4"), ("RedPajamaGithub", "github")):
        expected = [
            i for text in TEXTS[name] for i in [*t.encode_to_numpy(text).tolist(), t.eot_token]
        ]
        for split in ("train", "val"):
            found = tokens(tmp_path / "out", domain, split)
            assert found.dtype == np.uint16 and found.tolist() == expected
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_manifest_tells_the_truth(tmp_path):
    import hashlib

    write(tmp_path / "train.jsonl"), write(tmp_path / "val.jsonl")
    out = tmp_path / "out"
    expect_ok(
        prepare(
            out, "--input", tmp_path / "train.jsonl", tmp_path / "val.jsonl", "--shard_tokens", 20
        )
    )
    manifest = read_manifest(out)
    assert manifest["tokenizer"]["name"] == "bytes" and manifest["dtype"] == "uint16"
    for domain, name in (("c4", "RedPajamaC4"), ("github", "RedPajamaGithub")):
        shards = manifest["domains"][domain]["train"]
        assert sum(s["documents"] for s in shards) == len(TEXTS[name])
        assert sum(s["bytes"] for s in shards) == sum(len(t.encode()) for t in TEXTS[name])
        for s in shards:
            content = (out / s["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (
                s["file_bytes"],
                s["sha256"],
            )
            assert len(np.load(out / s["file"])) == s["tokens"] <= 20


def test_split_by_hash_where_names_tell_none(tmp_path):
    records = [
        {"text": f"document {i}", "meta": {"redpajama_set_name": "RedPajamaBook"}}
        for i in range(2000)
    ]
    write(tmp_path / "corpus.jsonl", records)
    expect_ok(prepare(tmp_path / "a", "--input", tmp_path / "corpus.jsonl"))
    splits = read_manifest(tmp_path / "a")["domains"]["book"]
    count = {split: sum(s["documents"] for s in shards) for split, shards in splits.items()}
    assert sum(count.values()) == 2000 and 20 <= count["val"] <= 70


def test_test_split_takes_the_place_of_validation_when_asked(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "in" / f"{split}-00000-of-00001.parquet")
    expect_error(
        prepare(tmp_path / "out", "--input", tmp_path / "in"),
        "no file of split validation",
        "--split",
    )
    expect_ok(
        prepare(tmp_path / "out", "--input", tmp_path / "in", "--split", "train=train,val=test")
    )
    assert set(read_manifest(tmp_path / "out")["domains"]["c4"]) == {"train", "val"}


def test_splits_of_globs_and_folders_count(tmp_path):
    """The folders that the user typed tell the split too, and one file counts once."""
    for split in ("train", "validation"):
        for part in ("a", "b"):
            write(tmp_path / "in" / split / part / "0.jsonl")
    expect_ok(prepare(tmp_path / "whole", "--input", tmp_path / "in"))
    for i, inputs in enumerate(
        (
            [f"{tmp_path}/in/train/*/*.jsonl", f"{tmp_path}/in/validation/*/*.jsonl"],
            [tmp_path / "in" / s / p for s in ("train", "validation") for p in "ab"],
            [tmp_path / "in", tmp_path / "in" / "train" / "a"],
        )
    ):
        text = expect_ok(prepare(tmp_path / str(i), "--input", *inputs))
        assert "by a hash" not in text
        assert (
            read_manifest(tmp_path / str(i))["domains"]
            == read_manifest(tmp_path / "whole")["domains"]
        )


def test_links_count_by_their_own_names(tmp_path):
    """As in the hub's cache, where names are links to files called by their hashes."""
    for split in ("train", "validation"):
        blob = write(tmp_path / "blobs" / f"{split[0]}.jsonl")
        (tmp_path / "in" / split).mkdir(parents=True)
        (tmp_path / "in" / split / "0.jsonl").symlink_to(blob)
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    assert set(read_manifest(tmp_path / "out")["domains"]["c4"]) == {"train", "val"}


def test_folders_above_the_inputs_tell_nothing(tmp_path):
    """A corpus that lies somewhere below a folder called dev or test is not a validation split."""
    write(tmp_path / "dev" / "corpus" / "0.jsonl", RECORDS * 40)
    text = expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "dev" / "corpus" / "0.jsonl"))
    assert "1 of 1 files" in text and "by a hash" in text
    assert "train" in read_manifest(tmp_path / "out")["domains"]["c4"]


def test_other_files_in_out_are_left_alone(tmp_path):
    write(tmp_path / "train.jsonl")
    mine = tmp_path / "out" / "book" / "my_features.npy"
    mine.parent.mkdir(parents=True)
    mine.touch()
    leftover = mine.with_name("train_00003.npy")
    leftover.touch()
    expect_error(prepare(tmp_path / "out", "--input", "/nope"), "/nope")
    assert mine.exists() and leftover.exists()
    expect_ok(
        prepare(tmp_path / "out", "--input", tmp_path / "train.jsonl", "--split", "train=train")
    )
    assert mine.exists() and not leftover.exists()


def test_a_part_of_the_sample(tmp_path):
    expect_ok(prepare(tmp_path / "out", "--split", "val=validation", source="sample"))
    assert set(read_manifest(tmp_path / "out")["domains"]["c4"]) == {"val"}


def test_hub_layout_equals_files(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    expect_ok(prepare(tmp_path / "a", "--dataset", tmp_path / "hub", source="hub"))
    expect_ok(
        prepare(tmp_path / "b", "--input", tmp_path / "hub", "--split", "train=train,val=test")
    )
    a, b = (read_manifest(tmp_path / x) for x in "ab")
    assert a["domains"] == b["domains"]


def test_unreachable_hub(tmp_path):
    expect_error(
        prepare(tmp_path / "a", source="hub"), "DKYoon/SlimPajama-6B", "--source files --input"
    )


def test_counts_of_real_text(real_text, tmp_path):
    """The token counts that were published with the corpus (without end-of-text)."""
    expect_ok(
        prepare(
            tmp_path, "--input", real_text / "validation", "--split", "val=validation", kind="gpt2"
        )
    )
    domains = read_manifest(tmp_path)["domains"]
    found = {d: sum(s["tokens"] - s["documents"] for s in domains[d]["val"]) for d in domains}
    assert found == {
        "arxiv": 360_964,
        "book": 145_147,
        "cc": 199_353,
        "c4": 62_047,
        "github": 199_532,
        "stackexchange": 62_681,
        "wikipedia": 152_091,
    }


def test_a_second_start(tmp_path):
    write(tmp_path / "train.jsonl"), write(tmp_path / "val.jsonl")
    inputs = ("--input", tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    expect_ok(prepare(tmp_path / "out", *inputs))
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert "complete already" in expect_ok(prepare(tmp_path / "out", *inputs))
    expect_error(prepare(tmp_path / "out", *inputs, kind="gpt2"), "holds other data", "--out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    (tmp_path / "out" / "manifest.json").unlink()  # as if interrupted
    (tmp_path / "out" / "c4" / "train_00007.npy.tmp").touch()
    expect_ok(prepare(tmp_path / "out", *inputs))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert not list((tmp_path / "out").rglob("*.tmp"))


def broken(case, folder):
    """(arguments, words of the error) of a wrong input."""
    good = write(folder / "train.jsonl")
    write(folder / "val.jsonl")
    if case == "json":
        good.write_bytes(good.read_bytes() + b'{"text": "cut\n' + good.read_bytes())
        return ("--input", folder), ("train.jsonl, line 4", "broken JSON")
    if case == "domain":
        write(good, [*RECORDS, {"text": "x", "meta": {"redpajama_set_name": "RedPajamaWiki"}}])
        return ("--input", folder), (
            "train.jsonl, line 4",
            "'RedPajamaWiki'",
            "did you mean 'RedPajamaWikipedia'",
        )
    if case == "no meta":
        write(good, [{"text": "x"}])
        return ("--input", folder), ("train.jsonl, line 1", "redpajama_set_name None")
    if case == "domain is a list":
        write(good, [{"text": "x", "meta": {"redpajama_set_name": ["RedPajamaC4"]}}])
        return ("--input", folder), ("train.jsonl, line 1", "redpajama_set_name ['RedPajamaC4']")
    if case == "deep json":
        good.write_text("[" * 100_000 + "\n")
        return ("--input", folder), ("train.jsonl, line 1", "broken JSON")
    if case == "no text":
        write(good, [{"content": "x", "meta": {}}])
        return ("--input", folder), ("train.jsonl, line 1", "'text'")
    if case == "zstd":
        zst = write(folder / "train2.jsonl.zst", RECORDS * 500)
        zst.write_bytes(zst.read_bytes()[:-20])
        return ("--input", folder), ("train2.jsonl.zst", "damaged")
    if case == "gzip":
        gz = write(folder / "train2.jsonl.gz", RECORDS * 500)
        gz.write_bytes(gz.read_bytes()[:200])
        return ("--input", folder), ("train2.jsonl.gz", "damaged")
    if case == "parquet":
        parquet = write(folder / "train2.parquet")
        parquet.write_bytes(parquet.read_bytes()[:300])
        return ("--input", folder), ("train2.parquet", "damaged")
    return {
        "no such input": (("--input", folder / "absent"), ("absent", "no such file")),
        "empty folder": (("--input", ROOT / "config"), ("config", "no .jsonl")),
        "no input": ((), ("--source files needs --input",)),
        "same split twice": (
            ("--input", folder, "--split", "train=train,val=train"),
            ("two different splits",),
        ),
        "split": (
            ("--input", folder, "--split", "validation"),
            ("--split validation", "train=NAME,val=NAME"),
        ),
        "shard size": (("--input", folder, "--shard_tokens", "0"), ("--shard_tokens 0",)),
        "flag": (
            ("--input", folder, "--tokeniser", "gpt2"),
            ("--tokeniser", "did you mean '--tokenizer'"),
        ),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "json",
        "deep json",
        "domain",
        "domain is a list",
        "no meta",
        "no text",
        "zstd",
        "gzip",
        "parquet",
        "no such input",
        "empty folder",
        "no input",
        "split",
        "same split twice",
        "shard size",
        "flag",
    ],
)
def test_wrong_input(case, tmp_path):
    args, words = broken(case, tmp_path / "in")
    expect_error(prepare(tmp_path / "out", *args), *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "preparing",
        "manifest.json",
        "manifest.json.tmp",
        "a/b",
        "a/",
        "..",
        ".hidden",
        "-flag",
        "_x",
        "two words",
        "line\nbreak",
        "web\n",
        "Web",
        "a" * 101,
    ],
)
def test_names_that_no_domain_may_have(name, tmp_path):
    """A domain is a folder in --out, beside what the preparation keeps there."""
    write(tmp_path / "in" / "train.jsonl", RECORDS * 20)
    inputs = ("--input", tmp_path / "in", "--split", "train=train")
    done = prepare(tmp_path / "out", *inputs, "--schema", f"text=text,constant={name}")
    expect_error(done, "--schema text=text,constant=", "domain", "choose another name")
    assert not (tmp_path / "out").exists()


def test_an_empty_name_of_a_domain(tmp_path):
    write(tmp_path / "train.jsonl")
    done = prepare(
        tmp_path / "out",
        "--input",
        tmp_path,
        "--schema",
        "text=text,constant=",
        "--split",
        "train=train",
    )
    expect_error(done, "--schema text=text,constant=", "expected text=FIELD")


@pytest.mark.parametrize("name", ["file", "a" * 100, "9_b-c", "train", "manifest"])
def test_names_that_a_domain_may_have(name, tmp_path):
    write(tmp_path / "train.jsonl", RECORDS * 20)
    schema = ("--split", "train=train", "--schema", f"text=text,constant={name}")
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "train.jsonl", *schema))
    assert list(read_manifest(tmp_path / "out")["domains"]) == [name]
    assert len(tokens(tmp_path / "out", name, "train")) > 0
    expect_ok(command("prepare_slimpajama.py", "--verify", tmp_path / "out"))


def test_domains_that_documents_name_have_such_names():
    """A document can only name one of DOMAINS, and a new one of these must be a folder's name."""
    assert [find_name_defect(domain) for domain in DOMAINS] == [None] * len(DOMAINS)


def test_a_document_cannot_name_the_folder_that_is_written(tmp_path):
    for name in ("preparing", "../c4", "manifest.json", ""):
        write(tmp_path / "train.jsonl", [{"text": "x", "source": name}])
        flags = ("--split", "train=train", "--schema", "text=text,domain=source")
        done = prepare(tmp_path / "out", "--input", tmp_path, *flags)
        expect_error(done, "train.jsonl, line 1", f"unknown domain source {name!r}")
        shutil.rmtree(tmp_path / "out")


def test_sample_is_deterministic_and_labelled(sample_data, tmp_path):
    out = tmp_path / "again"
    expect_ok(
        command("prepare_slimpajama.py", "--source", "sample", "--tokenizer", "bytes", "--out", out)
    )
    assert read_manifest(out) == read_manifest(sample_data)
    manifest = read_manifest(out)
    assert tuple(manifest["domains"]) == DOMAINS and "synthetic" in manifest["source"]["note"]
    shutil.rmtree(out)


def test_a_log_file_has_lines_and_no_carriage_returns(tmp_path):
    done = prepare(tmp_path / "out", source="sample")
    expect_ok(done)
    assert "sample -> bytes" in done.stderr and "\r" not in done.stderr
    done = command("prepare_slimpajama.py", "--verify", tmp_path / "out")
    expect_ok(done)
    assert "verify" in done.stderr and "\r" not in done.stderr


def test_help_lists_every_flag():
    text = expect_ok(command("prepare_slimpajama.py", "--help"))
    assert all(
        flag in text
        for flag in ("--source", "--input", "--dataset", "--revision", "--split", "--tokenizer")
    )


def test_out_that_is_no_folder_or_damaged(tmp_path):
    write(tmp_path / "train.jsonl"), write(tmp_path / "val.jsonl")
    expect_error(prepare("/dev/null", "--input", tmp_path), "--out /dev/null")
    (tmp_path / "out").mkdir()
    for text in ("{", "{}", "[]"):
        (tmp_path / "out" / "manifest.json").write_text(text)
        expect_error(prepare(tmp_path / "out", "--input", tmp_path), "manifest.json")
