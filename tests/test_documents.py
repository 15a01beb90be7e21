"""Which documents the input has: nothing is left out without a word, and nothing is taken twice.

Most of these inputs are from public reports on other projects.
"""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command, expect_error, expect_ok
from test_train import records as records_of
from test_train import run

from corpus import documents, sample
from corpus.documents import BadRecord, Schema, to_document
from corpus.manifest import read_manifest

C4 = {"redpajama_set_name": "RedPajamaC4"}


def rows(n: int, start: int = 0) -> list[dict]:
    return [{"text": f"text {i} é", "meta": C4} for i in range(start, start + n)]


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def put(path: Path, content: bytes | None = None) -> Path:
    """Write a file; its content is four records if none is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(rows(4)) if content is None else content)
    return path


def prepare(out, *args, source="files", split="train=train"):
    flags = ["--source", source, "--tokenizer", "bytes", "--workers", 1, "--out", out]
    if split:
        flags += ["--split", split]
    return command("prepare_slimpajama.py", *flags, *args)


def count(out, split="train") -> int:
    """The documents of a split in all domains."""
    domains = read_manifest(out)["domains"].values()
    return sum(shard["documents"] for splits in domains for shard in splits.get(split, []))


def texts(out, split="train") -> set[bytes]:
    """The documents of a split, as bytes are their tokens."""
    import numpy as np

    found = []
    for splits in read_manifest(out)["domains"].values():
        for shard in splits.get(split, []):
            ids = np.load(Path(out) / shard["file"])
            ends = np.flatnonzero(ids == 256)
            for piece in np.split(ids, ends + 1)[:-1]:
                found.append(piece[:-1].astype(np.uint8).tobytes())
    assert len(found) == len(set(found))
    return set(found)


def shards(out) -> dict[str, str]:
    """A hash of each file of the domains."""
    paths = sorted(Path(out).glob("*/*.npy"))
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


# Nothing is left out without a word


def test_linked_folders_are_read(tmp_path):
    put(tmp_path / "in" / "train_a.jsonl")
    put(tmp_path / "elsewhere" / "deep" / "train_b.jsonl", lines(rows(3, 10)))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    inputs = {"folder": tmp_path / "in", "glob": f"{tmp_path}/in/**/*.jsonl"}
    for name, given in inputs.items():
        expect_ok(prepare(tmp_path / name, "--input", given))
        assert count(tmp_path / name) == 7


def test_a_linked_folder_tells_the_split(tmp_path):
    for split in ("train", "validation"):
        put(tmp_path / "elsewhere" / split[:1] / "0.jsonl", lines(rows(4, len(split))))
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / split).symlink_to(tmp_path / "elsewhere" / split[:1])
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", split=None))
    assert count(tmp_path / "out") == count(tmp_path / "out", "val") == 4


def test_loops_of_links_end(tmp_path):
    """Up to a folder around it, and between two neighbors."""
    put(tmp_path / "in" / "a" / "train_a.jsonl")
    put(tmp_path / "in" / "b" / "deep" / "train_b.jsonl", lines(rows(3, 10)))
    (tmp_path / "in" / "a" / "up").symlink_to("..")
    (tmp_path / "in" / "b" / "deep" / "itself").symlink_to(".")
    for name, given in {"folder": tmp_path / "in", "glob": f"{tmp_path}/in/**/*.jsonl"}.items():
        expect_ok(prepare(tmp_path / name, "--input", given))
        assert count(tmp_path / name) == 7


def test_many_links_among_folders_without_files(tmp_path):
    """As in node_modules. Whoever follows every path through them does not end."""
    for i in range(20):
        (tmp_path / "in" / f"f{i}").mkdir(parents=True)
        for j in range(20):
            (tmp_path / "in" / f"f{i}" / f"to{j}").symlink_to(f"../f{j}")
    put(tmp_path / "in" / "train.jsonl")
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    assert count(tmp_path / "out") == 4


@pytest.mark.parametrize("given", ["", "/train_b.jsonl", "/*.jsonl", "/**/*.jsonl"])
def test_a_link_to_nothing(tmp_path, given):
    put(tmp_path / "in" / "train_a.jsonl")
    (tmp_path / "in" / "train_b.jsonl").symlink_to("gone.jsonl")
    done = prepare(tmp_path / "out", "--input", f"{tmp_path}/in{given}")
    expect_error(done, f"{tmp_path}/in/train_b.jsonl: it is a link to gone.jsonl", "not there")


def test_a_link_to_itself(tmp_path):
    put(tmp_path / "in" / "train_a.jsonl")
    (tmp_path / "in" / "train_b.jsonl").symlink_to("train_b.jsonl")
    done = prepare(tmp_path / "out", "--input", tmp_path / "in")
    expect_error(done, "in/train_b.jsonl: it cannot be read (Too many levels")


@pytest.mark.parametrize("call", ["listdir", "stat"])
@pytest.mark.parametrize("given", ["", "/**/*.jsonl"])
@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(13, "Permission denied"), "no permission to read it"),
        (OSError(5, "Input/output error"), "it cannot be read (Input/output error)"),
        (OSError(116, "Stale file handle"), "it cannot be read (Stale file handle)"),
    ],
    ids=["permission", "disk", "stale"],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, call, given, error, words):
    """By failing calls, since the tests may run as root, who may read everything."""
    put(tmp_path / "in" / "train_a.jsonl")
    broken = put(tmp_path / "in" / "sub" / "train_b.jsonl").parent
    if call == "stat":
        broken = broken / "train_b.jsonl"
    real = getattr(os, call)

    def fail(path, *args, **kwargs):
        if str(path) == str(broken):
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, call, fail)
    done = prepare(tmp_path / "out", "--input", f"{tmp_path}/in{given}")
    expect_error(done, f"--input {broken}: {words}")


def test_a_disk_that_fails_while_it_is_read(tmp_path, monkeypatch):
    path = put(tmp_path / "in" / "train.jsonl.gz", gzip.compress(lines(rows(4))))

    def fail(self, buffer):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(documents.Counted, "readinto", fail)
    done = prepare(tmp_path / "out", "--input", tmp_path / "in")
    expect_error(done, f"{path}: cannot be read (Input/output error)", "look at the disk")


@pytest.mark.parametrize(
    "name, encode",
    [
        ("train_b.json", bytes),
        ("train_b.json.gz", gzip.compress),
        ("train_b.json.zst", zstd),
        ("train_b.JSONL", bytes),
        ("TRAIN_B.JSONL.GZ", gzip.compress),
        ("train_b.Jsonl.Zst", zstd),
    ],
)
def test_other_endings_of_records_per_line(tmp_path, name, encode):
    put(tmp_path / "in" / "train_a.jsonl")
    put(tmp_path / "in" / name, encode(lines(rows(3, 10))))
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    assert texts(tmp_path / "out") == {f"text {i} é".encode() for i in (0, 1, 2, 3, 10, 11, 12)}


def test_parquet_in_capital_letters(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows(4)), tmp_path / "in" / "TRAIN.PARQUET")
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    assert count(tmp_path / "out") == 4


def test_large_json_is_cut_like_jsonl(tmp_path, monkeypatch):
    from corpus import plan

    monkeypatch.setattr(plan, "MIN_UNIT", 1000)
    for suffix in ("json", "jsonl"):
        put(tmp_path / suffix / f"train.{suffix}", lines(rows(300)))
        expect_ok(prepare(tmp_path / f"out_{suffix}", "--input", tmp_path / suffix))
    assert shards(tmp_path / "out_json") == shards(tmp_path / "out_jsonl")
    assert len(shards(tmp_path / "out_json")) > 5


def test_the_rest_is_listed_once(tmp_path):
    put(tmp_path / "in" / "train.jsonl")
    for name in ("b.txt", "c.jsonl.tar.gz", "d.zip", "e.jsonl.xz", "f.parquet.part", "g"):
        put(tmp_path / "in" / name)
    os.mkfifo(tmp_path / "in" / "train_h.jsonl")
    put(tmp_path / "in" / "train_i.jsonl", b"")
    put(tmp_path / "in" / "dataset_info.json", b'{\n "features": 3\n}\n')
    put(tmp_path / "in" / "dataset_infos.json", b'{"default": {"features": 3}}')
    put(tmp_path / "in" / "rows.json", json.dumps(rows(3)).encode())
    text = expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", tmp_path / "in"))
    (line,) = [line for line in text.splitlines() if line.startswith("left out")]
    top = tmp_path / "in"
    for words in (
        f"6 with another ending ({top}/b.txt, {top}/c.jsonl.tar.gz, {top}/d.zip, "
        f"{top}/e.jsonl.xz, {top}/f.parquet.part and 1 more)",
        f"1 that is a pipe, a socket or a device ({top}/train_h.jsonl)",
        f"1 of 0 bytes ({top}/train_i.jsonl)",
        f"1 with JSON that is not a record per line ({top}/dataset_info.json)",
        f"1 with one line of JSON that has no 'text' ({top}/dataset_infos.json)",
        f"1 with a JSON array, not a record per line (jq -c '.[]' FILE makes them) "
        f"({top}/rows.json)",
    ):
        assert line.count(words) == 1, line
    assert count(tmp_path / "out") == 4


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    put(tmp_path / "in" / "train.jsonl")
    assert "left out" not in expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))


def test_an_array_alone_is_an_error_that_says_what_to_do(tmp_path):
    put(tmp_path / "in" / "train.json", json.dumps(rows(3)).encode())
    for given in (tmp_path / "in", tmp_path / "in" / "train.json"):
        done = prepare(tmp_path / "out", "--input", given)
        expect_error(done, "train.json", "a JSON array", "jq -c '.[]'")


def test_json_whose_second_line_is_a_record_is_data(tmp_path):
    """Then what is wrong with the first one is an error, as in a .jsonl."""
    put(tmp_path / "in" / "train.json", lines([{"content": "x"}, *rows(3)]))
    done = prepare(tmp_path / "out", "--input", tmp_path / "in")
    expect_error(done, "train.json, line 1", "the record has no 'text' (it has: content)")


# Nothing is taken twice


def twice(tmp_path, *args, source="files") -> str:
    """The error's words; the input is tmp_path/in."""
    given = ("--input", tmp_path / "in") if source == "files" else ("--dataset", tmp_path / "in")
    done = prepare(tmp_path / "out", *(args or given), source=source)
    expect_error(done, "so their documents would be taken twice")
    assert not (tmp_path / "out" / "manifest.json").exists()
    return done.stderr


@pytest.mark.parametrize("source", ["files", "hub"])
@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl.zst", "train.parquet"])
def test_one_file_in_two_formats(tmp_path, name, source):
    put(tmp_path / "in" / "train.jsonl")
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows(4)), tmp_path / "in" / name)
    else:
        put(tmp_path / "in" / name, {"gz": gzip.compress, "zst": zstd}[name[12:]](lines(rows(4))))
    if source == "hub" and name.endswith("parquet"):
        pytest.skip("the library of the hub refuses folders of two formats, or reads one of them")
    words = twice(tmp_path, source=source)
    assert f"{tmp_path}/in/train.jsonl and {tmp_path}/in/{name} differ in their format" in words


def test_two_snapshots_of_a_repository(tmp_path):
    """As the hub's cache has them after an update: of two blobs, or of one that did not change."""
    top = tmp_path / "in" / "datasets--a--b"
    blobs = [put(top / "blobs" / name, lines(rows(n))) for name, n in (("x", 3), ("y", 4))]
    for case in (blobs, blobs[:1] * 2):
        shutil.rmtree(top / "snapshots", ignore_errors=True)
        for commit, blob in zip("ab", case, strict=True):
            folder = top / "snapshots" / (commit * 40)
            folder.mkdir(parents=True)
            (folder / "train.jsonl").symlink_to(blob)
        words = twice(tmp_path)
        assert f"{top}/snapshots/{'a' * 40} and {top}/snapshots/{'b' * 40} are two snapsh" in words
    out = tmp_path / "one"
    text = expect_ok(prepare(out, "--input", top / "snapshots" / ("a" * 40)))
    assert count(out) == 3 and "left out" not in text


def test_the_blobs_of_a_snapshot_are_not_called_left_out(tmp_path):
    top = tmp_path / "in" / "datasets--a--b"
    blob, main = put(top / "blobs" / "x"), put(top / "refs" / "main")
    folder = top / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "train.jsonl").symlink_to(blob)
    text = expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    assert f"left out: 1 with another ending ({main})\n" in text and count(tmp_path / "out") == 4


@pytest.mark.parametrize("link", ["file", "folder", "hard", "given"])
def test_two_names_of_one_file(tmp_path, link):
    first = put(tmp_path / "in" / "a" / "train_a.jsonl")
    second = tmp_path / "in" / "b"
    args = ()
    if link == "folder":
        second.symlink_to("a")
        second = second / "train_a.jsonl"
    elif link == "given":
        second = tmp_path / "b"
        second.symlink_to("in")
        args = ("--input", tmp_path / "in", second)
        second = second / "a" / "train_a.jsonl"
    else:
        second.mkdir()
        second = second / "train_b.jsonl"
        os.link(first, second) if link == "hard" else second.symlink_to(first)
    assert f"{first} and {second} are one file" in twice(tmp_path, *args)


def test_a_link_to_a_split_that_is_not_wanted(tmp_path):
    put(tmp_path / "in" / "train" / "a.jsonl")
    put(tmp_path / "in" / "validation" / "b.jsonl", lines(rows(2, 20)))
    (tmp_path / "in" / "test").symlink_to("validation")
    text = expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", split=None))
    assert "left out: 1 files of split 'test'" in text
    assert (count(tmp_path / "out"), count(tmp_path / "out", "val")) == (4, 2)


def test_equal_inode_numbers_without_links(tmp_path, monkeypatch):
    """Some network file systems make the numbers up."""
    for i, name in enumerate(("train_a.jsonl", "train_b.jsonl")):
        put(tmp_path / "in" / name, lines(rows(4, 4 * i)))
    real = os.stat

    def made_up(path, *args, **kwargs):
        status = real(path, *args, **kwargs)
        if str(path).endswith(".jsonl"):
            status = os.stat_result((status[0], 7, *status[2:]))
        return status

    monkeypatch.setattr(os, "stat", made_up)
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    assert count(tmp_path / "out") == 8


def test_names_that_begin_with_a_dot(tmp_path):
    put(tmp_path / "in" / "train.jsonl")
    put(tmp_path / "in" / ".ipynb_checkpoints" / "train-checkpoint.jsonl")
    put(tmp_path / "in" / "._train.jsonl", b"\0\5\x16\7\0\2\0\0Mac OS X")
    for name, given in {"folder": tmp_path / "in", "glob": f"{tmp_path}/in/**/*.jsonl"}.items():
        text = expect_ok(prepare(tmp_path / name, "--input", given))
        assert count(tmp_path / name) == 4
        if name == "folder":
            top = tmp_path / "in"
            names = f"({top}/.ipynb_checkpoints, {top}/._train.jsonl)"
            assert f"2 whose name begins with a dot {names}" in text
    hidden = put(tmp_path / ".train.jsonl")  # given by its name, it is meant
    expect_ok(prepare(tmp_path / "hidden", "--input", hidden))
    assert count(tmp_path / "hidden") == 4


def test_copies_are_told(tmp_path):
    """They are allowed: some people give a text more weight so."""
    content = lines(rows(4))
    put(tmp_path / "in" / "train.jsonl", content)
    put(tmp_path / "in" / "train (1).jsonl", content)
    put(tmp_path / "in" / "train_2.jsonl", content.replace(b"3", b"7"))
    text = expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in"))
    pair = f"{tmp_path}/in/train.jsonl of {tmp_path}/in/train (1).jsonl"
    assert f"copies, by size, beginning and end: {pair}; --dedup" in text
    text = expect_ok(prepare(tmp_path / "once", "--input", tmp_path / "in", "--dedup"))
    assert "copies, by" not in text and count(tmp_path / "once") == 5


# Only a split for training


@pytest.mark.parametrize("source", ["files", "hub"])
def test_training_data_alone(tmp_path, source):
    """As OpenWebText's and FineWeb's repositories have it; the error says how to hold out, and of
    the hub's datasets, whose splits are known, documents are held out at once.
    """
    content = [*rows(1000), *rows(1000)]
    folder = tmp_path / "in" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(content), folder / "train-00000-of-00001.parquet")
    given = ("--input" if source == "files" else "--dataset", tmp_path / "in")
    done = prepare(tmp_path / "out", *given, source=source, split=None)
    if source == "files":
        words = "hold out one document in 50 of the training data by a hash of its text"
        expect_error(done, words, "--split train=NAME,val=hash", "train")
    else:
        words = "has only train: one document in 50 is for validation, by a hash of its text"
        assert words in expect_ok(done)
    expect_ok(prepare(tmp_path / "out", *given, source=source, split="train=train,val=hash"))
    is_held_out = [
        int.from_bytes(hashlib.sha1(row["text"].encode()).digest()[:4], "big") % 50 == 0
        for row in content
    ]
    assert 10 < sum(is_held_out) < 70
    assert count(tmp_path / "out", "val") == sum(is_held_out)
    assert count(tmp_path / "out") == 2000 - sum(is_held_out)


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    """Not on format, source, workers or parts, and duplicates are on one side."""
    content = [*rows(900), *rows(900)]
    (tmp_path / "p" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "p" / "data" / "train.parquet")
    put(tmp_path / "j" / "data" / "train.jsonl", lines(content))
    put(tmp_path / "u" / "data" / "corpus.jsonl", lines(content))
    split = "train=train,val=hash"
    for name in "pj":
        expect_ok(prepare(tmp_path / f"{name}1", "--input", tmp_path / name, split=split))
    expect_ok(prepare(tmp_path / "h1", "--dataset", tmp_path / "p", source="hub", split=split))
    expect_ok(prepare(tmp_path / "u1", "--input", tmp_path / "u"))  # no name tells a split
    for k in (1, 2):
        expect_ok(
            prepare(tmp_path / "j2", "--input", tmp_path / "j", "--part", f"{k}/2", split=split)
        )
    expect_ok(command("prepare_slimpajama.py", "--merge", "--out", tmp_path / "j2"))
    expected = shards(tmp_path / "p1")
    assert set(expected) == {"c4/train_00000.npy", "c4/val_00000.npy"}
    for name in ("j1", "h1", "u1", "j2"):
        assert shards(tmp_path / name) == expected, name
    expect_ok(
        prepare(tmp_path / "d1", "--input", tmp_path / "j", "--dedup", split=split, source="files")
    )
    train, val = texts(tmp_path / "d1"), texts(tmp_path / "d1", "val")
    assert not train & val and len(train) + len(val) == 900


def test_other_splits_are_told_when_some_is_held_out(tmp_path):
    for name in ("train", "validation"):
        put(tmp_path / "in" / f"{name}.jsonl", lines(rows(400)))
    text = expect_ok(
        prepare(tmp_path / "out", "--input", tmp_path / "in", split="train=train,val=hash")
    )
    assert "left out: 1 files of split 'validation' (see --split)" in text
    assert "1 of 1 files: one document in 50 of theirs is for validation, by a hash" in text
    assert count(tmp_path / "out") + count(tmp_path / "out", "val") == 400


def test_a_part_of_the_sample_is_held_out(tmp_path):
    expect_ok(prepare(tmp_path / "out", source="sample", split="train=train,val=hash"))
    n = count(tmp_path / "out") + count(tmp_path / "out", "val")
    assert n == 7 * 540 and 40 <= count(tmp_path / "out", "val") <= 120


@pytest.mark.parametrize("split", ["val=hash", "train=hash", "train=hash,val=hash"])
def test_wrong_uses_of_hash(tmp_path, split):
    put(tmp_path / "in" / "train.jsonl")
    done = prepare(tmp_path / "out", "--input", tmp_path / "in", split=split)
    expect_error(done, f"--split {split}", "train=NAME,val=")


def test_a_split_that_a_dataset_of_the_hub_lacks(tmp_path):
    put(tmp_path / "in" / "data" / "train.jsonl")
    done = prepare(tmp_path / "out", "--dataset", tmp_path / "in", source="hub", split="train=tran")
    expect_error(done, "no split 'tran'; did you mean 'train'?", "it has: train")


def test_what_the_library_of_the_hub_leaves_out(tmp_path):
    put(tmp_path / "in" / "data" / "train.jsonl")
    ignored = put(tmp_path / "elsewhere" / "train_b.jsonl")
    (tmp_path / "in" / "data" / "link").symlink_to(ignored.parent)
    readme = put(tmp_path / "in" / "README.md", b"# text\n")
    text = expect_ok(prepare(tmp_path / "out", "--dataset", tmp_path / "in", source="hub"))
    assert f"1 with another ending ({readme})" in text
    name = tmp_path / "in" / "data" / "link" / "train_b.jsonl"
    assert f"1 that the library of the hub does not take ({name})" in text
    assert count(tmp_path / "out") == 4


def fineweb(folder: Path, n: int) -> list[dict]:
    """A dataset as FineWeb has it: parts by name, only train, no domains, many columns."""
    records = [
        {"text": f"page {i} has words", "url": f"https://x/{i}", "dump": "CC-MAIN-2024-10"}
        for i in range(n)
    ]
    for part, some in (("data/CC-MAIN-2024-10", records), ("sample/10BT", records[: n // 2])):
        path = folder / part / "000_00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(some), path, row_group_size=100, compression="none")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/*/*.parquet\n"
        "- config_name: sample-10BT\n  data_files: sample/10BT/*.parquet\n---\n"
    )
    return records


def test_a_dataset_of_one_domain(tmp_path):
    """FineWeb, by the hub's name of a part and by its files: the same shards of one domain."""
    folder = tmp_path / "FineWeb.edu"
    fineweb(folder, 2000)
    hub = ("--dataset", folder, "--name", "sample-10BT")
    text = expect_ok(prepare(tmp_path / "hub", *hub, source="hub", split=None))
    assert "names no domains: all of it is domain fineweb-edu" in text
    manifest = read_manifest(tmp_path / "hub")
    assert set(manifest["domains"]) == {"fineweb-edu"}
    assert manifest["source"]["name"] == "sample-10BT"
    assert count(tmp_path / "hub") + count(tmp_path / "hub", "val") == 1000
    assert 8 < count(tmp_path / "hub", "val") < 35
    schema = "text=text,constant=fineweb-edu"
    files = ("--input", folder / "sample", "--schema", schema)
    expect_ok(prepare(tmp_path / "files", *files, split=None))
    assert shards(tmp_path / "files") == shards(tmp_path / "hub")
    expect_ok(prepare(tmp_path / "all", *hub[:2], source="hub", split=None))
    assert count(tmp_path / "all") + count(tmp_path / "all", "val") == 2000


@pytest.mark.parametrize("source", ["files", "hub"])
def test_other_columns_are_not_read(tmp_path, source):
    """Their pages may be damaged."""
    folder = tmp_path / "fineweb"
    fineweb(folder, 2000)
    path = folder / "data" / "CC-MAIN-2024-10" / "000_00000.parquet"
    content = path.read_bytes()
    metadata = pq.read_metadata(path)
    for i in range(metadata.num_row_groups):
        chunk = metadata.row_group(i).column(1)
        assert chunk.path_in_schema == "url"
        start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
        stop = start + chunk.total_compressed_size
        content = content[:start] + b"\xff" * (stop - start) + content[stop:]
    given = ("--input", folder / "data", "--schema", "text=text,constant=fineweb")
    if source == "hub":
        given = ("--dataset", folder, "--schema", "text=text,constant=fineweb")
    path.write_bytes(content)
    expect_ok(prepare(tmp_path / "out", *given, source=source, split="train=train,val=hash"))
    assert count(tmp_path / "out") + count(tmp_path / "out", "val") == 2000


def test_one_domain_from_text_to_tables(tmp_path):
    folder, data = tmp_path / "fineweb", tmp_path / "data"
    fineweb(folder, 4000)
    expect_ok(prepare(data, "--dataset", folder, source="hub", split=None))
    runs = []
    for mixture in ("uniform", "natural"):
        out = tmp_path / mixture
        flags = ("--max_steps=2", "--reweight=linupper", f"--mixture={mixture}")
        expect_ok(run(data, out, *flags))
        expect_ok(command("eval/perplexity.py", "--run", out))
        runs.append(out)
    losses = [[row["loss"] for row in records_of(out, "train")] for out in runs]
    assert losses[0] == losses[1]
    assert set(records_of(runs[0], "train")[0]["loss_by_domain"]) == {"fineweb"}
    assert "fineweb" in expect_ok(command("eval/tables.py", *runs))
    expect_ok(command("eval/plots.py", *runs, "--to", tmp_path / "figures"))


def test_name_without_the_hub(tmp_path):
    given = ("--input", put(tmp_path / "train.jsonl"), "--name", "sample-10BT")
    expect_error(prepare(tmp_path / "out", *given), "--name sample-10BT", "hub")


# The forms of a record


def flattened(record: dict) -> dict:
    fields = {f"meta.{name}": value for name, value in record["meta"].items()}
    return {"text": record["text"], **fields}


def with_json(record: dict) -> dict:
    return {**record, "meta": json.dumps(record["meta"])}


def table(records: list[dict], text_type: pa.DataType, meta: str = "struct") -> pa.Table:
    """The records as Arrow columns."""
    values = [record["text"] for record in records]
    if pa.types.is_dictionary(text_type):
        columns = {"text": pa.array(values).dictionary_encode()}
    elif "binary" in str(text_type):
        columns = {"text": pa.array([value.encode() for value in values], text_type)}
    else:
        columns = {"text": pa.array(values, text_type)}
    metas = [record["meta"] for record in records]
    if meta == "struct":
        columns["meta"] = pa.array(metas)
    elif meta == "JSON":
        columns["meta"] = pa.array([json.dumps(value) for value in metas])
    elif meta == "map":
        pairs = [list(value.items()) for value in metas]
        columns["meta"] = pa.array(pairs, pa.map_(pa.string(), pa.string()))
    elif meta == "binary map":
        pairs = [[(a.encode(), b.encode()) for a, b in value.items()] for value in metas]
        columns["meta"] = pa.array(pairs, pa.map_(pa.binary(), pa.binary()))
    else:
        for name in metas[0]:
            columns[f"meta.{name}"] = pa.array([value[name] for value in metas])
    return pa.table(columns)


def in_pieces(content: bytes, compress) -> bytes:
    """Several frames or members, which end inside lines."""
    size = len(content) // 7
    starts = range(0, len(content), size)
    return b"".join(compress(content[start : start + size]) for start in starts)


LINES = {  # name of the form -> ending, bytes of the records
    "jsonl": ("jsonl", lines),
    "json": ("json", lines),
    "gz": ("jsonl.gz", lambda some: gzip.compress(lines(some))),
    "zst": ("jsonl.zst", lambda some: zstd(lines(some))),
    "several members in a gz": ("json.gz", lambda some: in_pieces(lines(some), gzip.compress)),
    "several frames in a zst": ("jsonl.zst", lambda some: in_pieces(lines(some), zstd)),
    "flattened": ("jsonl", lambda some: lines(list(map(flattened, some)))),
    "meta as JSON": ("jsonl", lambda some: lines(list(map(with_json, some)))),
    "byte order mark": ("jsonl", lambda some: b"\xef\xbb\xbf" + lines(some)),
    "byte order mark in .json": ("json", lambda some: b"\xef\xbb\xbf" + lines(some)),
    "carriage returns": ("jsonl", lambda some: lines(some).replace(b"\n", b"\r\n")),
    "no newline at the end": ("jsonl", lambda some: lines(some)[:-1]),
    "not in ASCII": (
        "jsonl",
        lambda some: "\n".join(json.dumps(r, ensure_ascii=False) for r in some).encode(),
    ),
}
TABLES = {  # name of the form -> type of the text, form of meta
    "string": (pa.string(), "struct"),
    "large_string": (pa.large_string(), "struct"),
    "string_view": (pa.string_view(), "struct"),
    "binary": (pa.binary(), "struct"),
    "large_binary": (pa.large_binary(), "struct"),
    "binary_view": (pa.binary_view(), "struct"),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), "struct"),
    "parquet, meta as JSON": (pa.string(), "JSON"),
    "parquet, meta as a map": (pa.string(), "map"),
    "parquet, binary": (pa.binary(), "binary map"),
    "parquet, flattened": (pa.string(), "flattened"),
}


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    """Synthetic records of all seven domains, with labels, by split."""
    records = {"train": [], "validation": []}
    for split, record in sample.documents(3, 40):
        records[split].append(record)
    records["train"].append({"text": "a\u2028b\x85c\0d\r\n\u00e9 😀", "meta": {**C4, "kind": "x"}})
    return records


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, str]:
    """The shards of the corpus as .jsonl."""
    folder = tmp_path_factory.mktemp("expected")
    for split, some in corpus.items():
        put(folder / "in" / split / "0.jsonl", lines(some))
    expect_ok(prepare(folder / "out", "--input", folder / "in", split=None))
    found = shards(folder / "out")
    assert len(found) == 2 * 2 * 7  # train and val, tokens and labels, seven domains
    return found


@pytest.mark.parametrize("form", [*LINES, *TABLES])
def test_all_forms_give_the_same_shards(corpus, expected, tmp_path, form):
    for split, some in corpus.items():
        folder = tmp_path / "in" / split
        if form in LINES:
            ending, encode = LINES[form]
            put(folder / f"0.{ending}", encode(some))
        else:
            folder.mkdir(parents=True)
            pq.write_table(table(some, *TABLES[form]), folder / "0.parquet", row_group_size=100)
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", split=None))
    assert shards(tmp_path / "out") == expected


@pytest.mark.parametrize("form", ["links", "linked folders", "chunks", "linked chunks"])
def test_all_layouts_give_the_same_shards(corpus, expected, tmp_path, form):
    for split, some in corpus.items():
        folder = tmp_path / "in" / split
        real = tmp_path / "blobs" / split
        folder.mkdir(parents=True)
        step = len(some) // 5 + 1
        for i, start in enumerate(range(0, len(some), step)):
            part = real / f"chunk{i + 1}" / f"example_{i}.jsonl"
            put(part, lines(some[start : start + step]))
            if form == "links":
                (folder / part.name).symlink_to(part)
            elif form == "linked chunks":
                (folder / part.parent.name).symlink_to(part.parent)
        if form == "linked folders":
            folder.rmdir()
            folder.symlink_to(real)
        elif form == "chunks":
            shutil.move(real, folder / "deep")
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", split=None))
    assert shards(tmp_path / "out") == expected


@pytest.mark.parametrize("form", ["jsonl", "json.gz", "parquet"])
def test_all_forms_of_real_text_give_the_same_shards(real_text, tmp_path, form):
    (tmp_path / "in" / "validation").mkdir(parents=True)
    for path in sorted((real_text / "validation").iterdir()):
        content = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read()
        target = tmp_path / "in" / "validation" / path.name.replace("jsonl.zst", form)
        if form == "parquet":
            records = [json.loads(line) for line in content.split(b"\n") if line]
            pq.write_table(table(records, pa.large_binary(), "map"), target)
        else:
            target.write_bytes(gzip.compress(content) if form == "json.gz" else content)
    split = "val=validation"
    expect_ok(prepare(tmp_path / "a", "--input", real_text / "validation", split=split))
    expect_ok(prepare(tmp_path / "b", "--input", tmp_path / "in", split=split))
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": None, "meta": C4}, "no string called 'text': text is null"),
        ({"text": 5, "meta": C4}, "text is a number"),
        ({"text": ["a"], "meta": C4}, "text is a list"),
        ({"text": {"raw": "a"}, "meta": C4}, "text is an object"),
        ({"content": "x", "id": 1}, "the record has no 'text' (it has: content, id)"),
        ([{"text": "x"}], "the record is a list"),
        (None, "the record is null"),
        ({"text": "x", "meta": ["a"]}, "redpajama_set_name None (meta is a list; known: "),
        ({"text": "x", "meta": "RedPajamaC4"}, "(meta is a string; known: "),
        ({"text": "x", "meta": "{broken"}, "(meta is a string; known: "),
        ({"text": "x", "meta": None}, "(meta is null; known: "),
        ({"text": "x"}, "(the record has no 'meta' (it has: text); known: "),
        ({"text": "x", "meta": {"a": 1}}, "meta has no 'redpajama_set_name' (it has: a)"),
        ({"text": "x", "meta.redpajama_set_name": None}, "meta.redpajama_set_name is null"),
        ({"text": b"\xff\xfe", "meta": C4}, "text is not UTF-8"),
        ({"text": memoryview(b"ab\xc3"), "meta": C4}, "text is not UTF-8"),
    ],
)
def test_messages_say_what_was_found(record, words):
    with pytest.raises(BadRecord) as caught:
        to_document(record, "train", Schema(), {"train": "train"})
    assert words in str(caught.value)


def test_a_whole_name_comes_before_nested_fields():
    schema = Schema("body.raw", "a.b.c")
    for record in (
        {"body.raw": "x", "body": {"raw": "y"}, "a.b.c": "c4", "a": {"b": {"c": "cc"}}},
        {"body": {"raw": "x"}, "a": {"b.c": "c4"}},
        {"body": '{"raw": "x"}', "a": {"b": '{"c": "c4"}'}},
    ):
        document = to_document(record, "train", schema, {"train": "train"})
        assert (document.text, document.domain) == ("x", "c4")


LARGE_TEXT = "word é " * 2_500_000


@pytest.mark.parametrize(
    "record, schema",
    [
        ({"text": LARGE_TEXT, "meta": C4}, Schema()),
        ({"text": LARGE_TEXT, "meta": json.dumps(C4)}, Schema()),
        (flattened({"text": LARGE_TEXT, "meta": C4}), Schema()),
        ({"body": {"raw": LARGE_TEXT}, "meta": C4}, Schema("body.raw")),
        ({"body.raw": LARGE_TEXT, "meta": C4}, Schema("body.raw")),
    ],
    ids=["nested", "JSON", "flattened", "nested text", "flattened text"],
)
def test_large_lines_have_all_forms(record, schema):
    """Arrow reads them, not json."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    assert len(line) > documents.LARGE
    document = to_document(line, "train", schema, {"train": "train"})
    assert (bytes(document.utf8), document.domain) == (LARGE_TEXT.encode(), "c4")


def test_large_lines_that_are_broken():
    for text, words in ((b"a\xff b ", "text is not UTF-8"), (b"ab c ", "two fields called 'text'")):
        line = b'{"meta": {"redpajama_set_name": "RedPajamaC4"}, "text": "' + text * 4_000_000
        line += b'", "text": "b"}\n' if b"\xff" not in text else b'"}\n'
        with pytest.raises(BadRecord, match=words):
            to_document(line, "train", Schema(), {"train": "train"})


def test_two_texts_in_one_record():
    meta = b'"meta": {"redpajama_set_name": "RedPajamaC4"'
    with pytest.raises(BadRecord, match="two fields called 'text'"):
        line = b'{"text": "a", ' + meta + b'}, "text": "b"}'
        to_document(line, "train", Schema(), {"train": "train"})
    line = b'{"text": "a \\"text\\": \\"b\\"", ' + meta + b', "text": "c"}}'
    document = to_document(line, "train", Schema(), {"train": "train"})
    assert document.text == 'a "text": "b"'


def test_columns_of_parquet_that_are_wrong(tmp_path):
    twins = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array([C4])], names=["text", "text", "meta"]
    )
    latin = pa.array([b"\xff\xfe", b"ok"], pa.binary())
    for text, words in (
        (twins, "2 columns 'text'"),
        (pa.table({"text": latin, "meta": [C4] * 2}), "row 1: text is not UTF-8"),
        (pa.table({"text": latin.view(pa.string()), "meta": [C4] * 2}), "row 1: text is not UTF-8"),
        (pa.table({"text": ["a"], "meta": [["x"]]}), "meta is a list"),
    ):
        pq.write_table(text, tmp_path / "train.parquet")
        expect_error(prepare(tmp_path / "out", "--input", tmp_path), "train.parquet", words)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "jsonl.gz"])
@pytest.mark.parametrize(
    "content, words",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            ("a Git-LFS pointer", "git lfs pull"),
        ),
        (b"/annex/objects/SHA256E-s12--ab.jsonl\n", ("a git-annex pointer", "git annex get")),
    ],
    ids=["lfs", "annex"],
)
def test_pointers_are_named(tmp_path, suffix, content, words):
    """Also with --skip_bad, which would leave out their three lines."""
    put(tmp_path / "in" / "train_a.jsonl")
    put(tmp_path / "in" / f"train_b.{suffix}", content)
    done = prepare(tmp_path / "out", "--input", tmp_path / "in", "--skip_bad", 9)
    expect_error(done, f"train_b.{suffix}", *words)


def test_a_zstd_window_that_is_too_large(tmp_path):
    content = lines(rows(4))
    window = (28 - 10) << 3  # of 2**28 bytes, as zstd's format writes it
    size = (len(content) << 3 | 1).to_bytes(3, "little")  # one raw block, the last
    frame = bytes.fromhex("28b52ffd") + bytes([0, window]) + size + content
    path = put(tmp_path / "in" / "train.jsonl.zst", frame)
    done = prepare(tmp_path / "out", "--input", tmp_path / "in")
    expect_error(done, "window above 128 MB", "intact", f"zstd -dc --long=31 {path} | zstd -o")


# Without the time of day, which would be in the tests' names: the workers must agree on them.
GZIPPED = gzip.compress(lines(rows(2)), mtime=0)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", lines(rows(2)).replace(b"}}\n", b"}},\n"), "line 1: broken JSON"),
        ("a.jsonl", b"[\n" + lines(rows(2)) + b"]\n", "line 1: broken JSON"),
        ("a.jsonl", json.dumps(rows(2)).encode(), "line 1: no string called 'text': the record is"),
        ("a.jsonl", lines(rows(2)).replace(b"\n", b""), "line 1: broken JSON (Extra data"),
        ("a.jsonl", lines(rows(2)).replace(b"\n", b"\r"), "line 1: broken JSON (Extra data"),
        ("a.jsonl", lines(rows(2)) + b"\0" * 9, "line 3: broken JSON"),
        ("a.jsonl", GZIPPED, "line 1: broken JSON"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>\n", "line 1: broken JSON"),
        ("a.jsonl.gz", lines(rows(2)), "damaged or cut short"),
        ("a.jsonl.gz", GZIPPED + b"\0" * 512, "damaged or cut short"),
        ("a.jsonl.gz", GZIPPED + GZIPPED[:-3], "damaged or cut"),
        ("a.jsonl.zst", zstd(b"\n") + zstd(b"\n" * 99)[:-1], "damaged or cut short"),
    ],
)
def test_broken_files_are_errors_that_name_them(tmp_path, name, content, words):
    put(tmp_path / "in" / "train_b.jsonl")
    put(tmp_path / "in" / f"train_{name}", content)
    expect_error(prepare(tmp_path / "out", "--input", tmp_path / "in"), f"train_{name}", words)


def test_odd_names(tmp_path):
    names = [
        "train %s{}.jsonl",
        "train'\".jsonl",
        "train日本.jsonl",
        "train[1].jsonl",
        "train-.json",
    ]
    names += [os.fsdecode(b"train\xff.jsonl"), "train\n.jsonl"]
    for i, name in enumerate(names):
        put(tmp_path / "in" / name, lines(rows(4, 10 * i)))
    put(tmp_path / "in" / "train.jsonl" / "part-0.json", lines(rows(4, 900)))  # as Spark writes it
    expect_ok(prepare(tmp_path / "out", "--input", tmp_path / "in", "--split", "train=train"))
    assert count(tmp_path / "out") + count(tmp_path / "out", "val") == 32
    for name in names:
        out = tmp_path / "each" / str(names.index(name))
        expect_ok(prepare(out, "--input", tmp_path / "in" / name))
        assert count(out) == 4


def test_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "in" / "data" / "train.jsonl")
    flags = ("--tokenizer=bytes", "--workers=1", "--split=train=train")
    for source in ("--source=files --input=~/in", "--source=hub --dataset=~/in"):
        out = f"~/out_{source[9:12]}"
        expect_ok(command("prepare_slimpajama.py", *source.split(), *flags, f"--out={out}"))
        assert count(Path(out).expanduser()) == 4
        expect_ok(command("prepare_slimpajama.py", f"--verify={out}"))
    expect_ok(
        command(
            "prepare_slimpajama.py",
            "--source=files",
            "--input=~/in/*/*.jsonl",
            *flags,
            "--out=~/glob",
        )
    )
    assert count(tmp_path / "glob") == 4


# The estimate


def estimated(folder: Path, *flags) -> tuple[float, float, float]:
    """GB of text, millions of tokens and GB of shards that --dry_run expects."""
    args = ("--source", "files", "--input", folder, "--out", "/nowhere/out", "--dry_run", *flags)
    text = expect_ok(command("prepare_slimpajama.py", *args))
    numbers = re.search(r"about ([\d.]+) GB of text, ([\d.]+)M tokens, ([\d.]+) GB", text)
    return tuple(map(float, numbers.groups()))


def compressible(n: int, n_words: int, seed: int) -> list[dict]:
    """n records; fewer different words are compressed further."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(n_words)]
    return [
        {"text": " ".join(rng.choices(words, k=rng.randrange(50, 900))), "meta": C4}
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def uneven() -> dict[str, list[dict]]:
    """Files of 0.4 to 3 MB, the text of some of which is compressed four times as far."""
    files = {}
    for i, (n, n_words) in enumerate(((150, 20), (900, 50_000), (300, 3), (600, 400))):
        files[f"train_{i}"] = compressible(n, n_words, i)
    return files


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_the_estimate(tmp_path, suffix, uneven):
    size = 0
    for name, records in uneven.items():
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=200)
        else:
            encode = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstd}[suffix]
            path.write_bytes(encode(lines(records)))
        size += sum(len(record["text"]) + 1 for record in records)
    _, tokens, _ = estimated(tmp_path, "--tokenizer", "bytes", "--split", "train=train")
    assert tokens == pytest.approx(size / 1e6, rel=0.02, abs=0.06)


@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl", "json.gz", "parquet"])
def test_the_estimate_of_real_text(real_text, tmp_path, suffix):
    """Of the published counts: 98.19 MB of text, 27.46M tokens, one end-of-text per document."""
    folder = real_text
    if suffix != "jsonl.zst":
        folder = tmp_path
        for path in sorted(real_text.glob("*/*.zst")):
            target = tmp_path / path.parent.name / path.name.replace("jsonl.zst", suffix)
            target.parent.mkdir(exist_ok=True)
            content = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read()
            if suffix == "parquet":
                records = [json.loads(line) for line in content.split(b"\n") if line]
                pq.write_table(pa.Table.from_pylist(records), target, row_group_size=1000)
            else:
                target.write_bytes(gzip.compress(content, 1) if "gz" in suffix else content)
    text, tokens, gb = estimated(folder)
    n_tokens = 26_281_231 + 1_181_815 + 22_677 + 950
    assert text == pytest.approx(0.09819, rel=0.1)
    assert tokens == pytest.approx(n_tokens / 1e6, rel=0.1)
    assert gb == pytest.approx(2 * n_tokens / 1e9, rel=0.1)
    print(suffix, text, tokens, gb)


def test_the_estimate_counts_only_the_domains_that_are_prepared(tmp_path):
    for name, n in (("RedPajamaC4", 40), ("RedPajamaBook", 400)):
        some = [{**r, "meta": {"redpajama_set_name": name}} for r in compressible(n, 900, n)]
        put(tmp_path / f"train_{name}.jsonl", lines(some))
    flags = ("--tokenizer", "bytes", "--split", "train=train")
    whole, part = estimated(tmp_path, *flags), estimated(tmp_path, *flags, "--domains", "c4")
    assert part[1] == pytest.approx(whole[1] / 11, rel=0.3)


def test_progress_of_a_compressed_file_is_that_of_its_lines(tmp_path):
    """The buffers read ahead, which is not what was done with."""
    records = compressible(2000, 5000, 1)
    path = put(tmp_path / "train.jsonl.zst", zstd(lines(records)))
    size = path.stat().st_size
    segment = documents.Segment(str(path), "train", 0, None, size)
    places = [place for place, _, _ in documents.read({"source": "files"}, segment)]
    assert places == sorted(places) and places[-1] == size
    for i in (400, 1000, 1600):
        done = len(lines(records[:i])) / len(lines(records))
        assert places[i - 1] / size == pytest.approx(done, abs=0.04)
