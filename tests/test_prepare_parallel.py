"""Preparation by many: workers, parts, interruptions and limits leave the same bytes behind."""

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, command, expect_error, expect_ok
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import fast, tokenizer, units
from corpus.documents import Segment, place, read
from corpus.manifest import DOMAINS, SET_NAMES, read_manifest

NAMES = list(SET_NAMES)
SCRIPT, GPT2 = "prepare_slimpajama.py", tokenizer.load("gpt2")


WORDS = [f"w{i}é" for i in range(1000)]


def record(i: int) -> dict:
    rng = random.Random(i)
    text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 400)))
    return {"text": f"{text} {i}\n", "meta": {"redpajama_set_name": NAMES[i % 7]}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of every format, each above the size of a unit, so that all of them are cut where they
    can be.
    """
    folder = tmp_path_factory.mktemp("corpus")
    records = [record(i) for i in range(9000)]
    for split, some in (("train", records[:8000]), ("validation", records[8000:])):
        (folder / split).mkdir()
        lines = "".join(json.dumps(r) + "\n" for r in some).encode()
        (folder / split / "a.jsonl").write_bytes(lines)
        (folder / split / "b.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
        pq.write_table(pa.Table.from_pylist(some), folder / split / "c.parquet", row_group_size=500)
    return folder


def arguments(corpus, out, *more, workers=2):
    return [
        SCRIPT,
        "--source",
        "files",
        "--tokenizer",
        "bytes",
        "--input",
        corpus,
        "--out",
        out,
        "--shard_tokens",
        "700_000",
        "--workers",
        workers,
        *more,
    ]


def contents(folder) -> dict:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """What one worker makes of it."""
    out = tmp_path_factory.mktemp("alone")
    expect_ok(command(*arguments(corpus, out, workers=1)))
    return out


def tokens_of(out, domain, split):
    return np.concatenate(
        [np.load(out / s["file"]) for s in read_manifest(out)["domains"][domain][split]]
    )


def test_the_corpus_is_cut_and_whole(alone):
    domains = read_manifest(alone)["domains"]
    numbers = {
        s["file"].split("_")[1][:5]
        for splits in domains.values()
        for shards in splits.values()
        for s in shards
    }
    assert len(numbers) >= 6 and any("_01.npy" in s["file"] for s in domains["c4"]["train"])
    mine = [record(i)["text"].encode() for i in range(8000) if i % 7 == NAMES.index("RedPajamaC4")]
    expected = [t for text in mine for t in [*text, 256]]
    assert (
        tokens_of(alone, "c4", "train").tolist() == expected * 3
    )  # of the .jsonl, the .jsonl.zst and the .parquet


def test_workers_change_nothing(alone, corpus, tmp_path):
    """Three of them; those that are killed and those on a full disk are two."""
    expect_ok(command(*arguments(corpus, tmp_path, workers=3), process=True))
    assert contents(tmp_path) == contents(alone)


def test_parts_merge_to_the_same(alone, corpus, tmp_path):
    for k in (3, 1, 2):
        expect_error(
            command(SCRIPT, "--merge", "--out", tmp_path),
            "--merge",
            "no parts" if k == 3 else "is not done",
        )
        expect_ok(command(*arguments(corpus, tmp_path, "--part", f"{k}/3", workers=1)))
    expect_error(
        command(*arguments(corpus, tmp_path, "--part", "1/2", workers=1)), "parts was 3, is now 2"
    )
    expect_ok(command(SCRIPT, "--merge", "--out", tmp_path))
    assert contents(tmp_path) == contents(alone)


def survived(corpus, folder, kills: int, seed: int, expected: dict) -> int:
    """How many of `kills` preparations, killed at a random moment (or one of their workers), came
    to the same end.

    The same command goes on until it is killed again or done; what is done is checked and begun
    anew.
    """
    rng, done, good, open_kills, out = random.Random(seed), 0, 0, 0, folder / "0"
    while done < kills or open_kills:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments(corpus, out))],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if done < kills:
            time.sleep(rng.uniform(0.3, 2.5))
            workers = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
            victim = int(rng.choice(workers)) if workers and rng.random() < 0.3 else process.pid
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(victim, signal.SIGKILL)
        if process.wait(60) != 0:
            assert done < kills  # nobody killed this one
            done, open_kills = done + 1, open_kills + 1
        else:
            good += open_kills * (contents(out) == expected)
            open_kills, out = 0, folder / str(int(out.name) + 1)
    print(f"survived {good} of {kills} kills")
    return good


@pytest.fixture
def quick_commits(monkeypatch):
    monkeypatch.setattr(units, "COMMIT_SECONDS", 0.0)


def test_kills_lose_nothing(alone, corpus, tmp_path):
    assert survived(corpus, tmp_path, 3, 1, contents(alone)) == 3


@pytest.mark.long
def test_fifty_kills_lose_nothing(alone, corpus, tmp_path):
    assert survived(corpus, tmp_path, 50, 2, contents(alone)) == 50


def test_every_state_can_be_continued(alone, corpus, tmp_path, quick_commits, monkeypatch):
    """Stop at every commit in turn, with what was written since thrown in as a kill would leave
    it.
    """
    real, left = units.files.write_text, [0]

    def write_then_stop(path, text):
        real(path, text)
        if path.name.startswith("unit_"):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(units.files, "write_text", write_then_stop)
    rounds = 0
    while not (tmp_path / "manifest.json").exists():
        rounds, left[0] = rounds + 1, 2
        (tmp_path / "c4").mkdir(exist_ok=True)
        (tmp_path / "c4" / "train_00001_07.npy.tmp").write_bytes(b"half")
        try:
            expect_ok(command(*arguments(corpus, tmp_path, workers=1)))
        except (KeyboardInterrupt, AssertionError):
            pass
        assert rounds < 60
    assert rounds > 2 and contents(tmp_path) == contents(alone)


def test_changed_inputs_and_settings_are_refused_by_name(corpus, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("train.jsonl", "val.jsonl"):
        (source / name).write_text("".join(json.dumps(record(i)) + "\n" for i in range(20)))
    out = tmp_path / "out"
    expect_ok(command(*arguments(source, out, "--part", "1/2", workers=1)))
    for flags, word in (
        (("--dedup",), "dedup was False, is now True"),
        (("--domains", "c4"), "domains was []"),
        (("--shard_tokens", "5"), "shard_tokens was 700000, is now 5"),
    ):
        expect_error(
            command(*arguments(source, out, "--part", "1/2", *flags, workers=1)),
            word,
            "--overwrite",
        )
    (source / "train.jsonl").write_text(json.dumps(record(1)))
    expect_error(
        command(*arguments(source, out, "--part", "1/2", workers=1)), "train.jsonl was changed"
    )
    expect_ok(command(*arguments(source, out, "--overwrite", workers=1)))
    assert (
        not (out / "preparing").exists()
        and read_manifest(out)["domains"]["book"]["train"][0]["documents"] == 1
    )


def test_two_at_once(corpus, tmp_path):
    import files

    (tmp_path / "preparing").mkdir()
    with files.lock(tmp_path / "preparing" / "lock", "held"):
        expect_error(
            command(*arguments(corpus, tmp_path, workers=1)), "another preparation writes there"
        )
    expect_ok(command(*arguments(corpus, tmp_path, workers=1)))


def test_limit_takes_the_first_documents(alone, corpus, tmp_path):
    for workers, out in ((1, tmp_path / "1"), (3, tmp_path / "3")):
        limit = ("--max_tokens_per_domain", "1_000_000")
        args = arguments(corpus, out, *limit, workers=workers)
        expect_ok(command(*args, process=workers > 1))
        for domain in DOMAINS:
            whole, part = tokens_of(alone, domain, "train"), tokens_of(out, domain, "train")
            after = np.flatnonzero(whole[len(part) :] == 256)[0] + 1
            assert len(part) <= 1_000_000 < len(part) + after and part[-1] == 256
            assert (whole[: len(part)] == part).all()
            assert (tokens_of(alone, domain, "val") == tokens_of(out, domain, "val")).all()
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_domains_and_holdout(alone, corpus, tmp_path):
    out = tmp_path / "out"
    expect_ok(
        command(
            *arguments(corpus, out, "--domains", "c4,book,arxiv", "--holdout", "book", workers=1)
        )
    )
    domains = read_manifest(out)["domains"]
    assert tuple(domains) == ("arxiv", "book", "c4") and set(domains["book"]) == {"val"}
    assert (tokens_of(out, "c4", "train") == tokens_of(alone, "c4", "train")).all()
    import data

    split = data.Split(out, read_manifest(out), "train", 64)
    assert data.mixture_weights("natural", split).sum() == pytest.approx(1) and split.domains == (
        "arxiv",
        "c4",
    )


def test_duplicates_go_and_validation_stays(alone, corpus, tmp_path):
    """The corpus holds every training text three times."""
    for workers, parts in ((1, 1), (2, 2)):
        out = tmp_path / f"{workers}_{parts}"
        for k in range(parts):
            part = ("--part", f"{k + 1}/{parts}") if parts > 1 else ()
            args = arguments(corpus, out, "--dedup", *part, workers=workers)
            expect_ok(command(*args, process=workers > 1))
        if parts > 1:
            expect_ok(command(SCRIPT, "--merge", "--out", out))
        whole = tokens_of(alone, "c4", "train")
        assert (tokens_of(out, "c4", "train") == whole[: len(whole) // 3]).all()
        assert sum(read_manifest(out)["duplicates"].values()) == 2 * 9000
        assert contents(out) == contents(tmp_path / "1_1")
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "train.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in (1, 2, 1)))
    (twin / "val.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in (3, 2)))
    expect_ok(command(*arguments(twin, tmp_path / "out", "--dedup", workers=1)))
    manifest = read_manifest(tmp_path / "out")
    assert sum(s["documents"] for d in manifest["domains"].values() for s in d.get("val", [])) == 2
    assert sum(manifest["duplicates"].values()) == 2


def test_slices_of_the_hash_space_find_the_same(corpus, tmp_path, monkeypatch):
    real = units.find_duplicates
    monkeypatch.setattr(
        units, "find_duplicates", lambda plan, mine: real(plan, mine, memory=64 * 500)
    )
    expect_ok(command(*arguments(corpus, tmp_path, "--dedup", workers=1)))
    assert sum(read_manifest(tmp_path)["duplicates"].values()) == 2 * 9000


def test_bad_records_are_counted_and_listed(tmp_path):
    lines = [json.dumps(record(i)) for i in range(20)]
    lines[3], lines[7], lines[11] = (
        "{broken",
        '{"text": 5}',
        '{"text": "x", "meta": {"redpajama_set_name": "Books"}}',
    )
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_bytes(("\n".join(lines) + "\n").encode() + b'{"text": "\xff"}\n')
    out = tmp_path / "out"
    expect_error(
        command(*arguments(tmp_path, out, workers=1)), "train.jsonl, line 4", "--skip_bad N"
    )
    expect_error(
        command(*arguments(tmp_path, out, "--skip_bad", "7", workers=1)), "more than --skip_bad 7"
    )
    expect_ok(command(*arguments(tmp_path, out, "--skip_bad", "8", workers=1)))
    skipped = read_manifest(out)["skipped"]
    assert (
        len(skipped) == 8
        and skipped[0][0].endswith("train.jsonl, line 4")
        and "'Books'" in skipped[2][1]
    )


def test_other_corpora_by_schema(tmp_path):
    """FineWeb's layout: .parquet with text, id, dump, url and so on; one domain, no validation
    files.
    """
    rows = [
        {"text": f"page {i} of the web", "id": str(i), "dump": "CC-MAIN", "score": 0.9}
        for i in range(2000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "000_00000.parquet", row_group_size=300)
    out = tmp_path / "out"
    expect_error(command(*arguments(tmp_path, out, workers=1)), "no column 'meta'", "--schema")
    expect_error(
        command(*arguments(tmp_path, out, "--schema", "text=txt,constant=fineweb", workers=1)),
        "no column 'txt'",
        "did you mean 'text'",
    )
    expect_ok(
        command(*arguments(tmp_path, out, "--schema", "text=text,constant=fineweb", workers=1))
    )
    domains = read_manifest(out)["domains"]
    assert list(domains) == ["fineweb"]
    assert sum(s["documents"] for shards in domains["fineweb"].values() for s in shards) == 2000
    import data

    split = data.Split(out, read_manifest(out), "train", 64)
    assert split.domains == ("fineweb",) and data.mixture_weights("natural", split).tolist() == [
        1.0
    ]
    lines = [{"body": {"raw": "x y"}, "source": name} for name in ("c4", "RedPajamaBook")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expect_ok(
        command(
            *arguments(
                tmp_path / "train.jsonl",
                tmp_path / "2",
                "--schema",
                "text=body.raw,domain=source",
                "--split",
                "train=train",
                workers=1,
            )
        )
    )
    assert list(read_manifest(tmp_path / "2")["domains"]) == ["book", "c4"]


def test_verify(alone, tmp_path):
    import shutil

    assert "are as the manifest says" in expect_ok(command(SCRIPT, "--verify", alone))
    shutil.copytree(alone, tmp_path / "d")
    shard = tmp_path / "d" / read_manifest(alone)["domains"]["c4"]["train"][0]["file"]
    whole = shard.read_bytes()
    for damaged, word in (
        (whole[:-2], "bytes, the manifest says"),
        (whole[:-2] + b"\x00\x00", "another sha256"),
    ):
        shard.write_bytes(damaged)
        expect_error(command(SCRIPT, "--verify", tmp_path / "d"), shard.name, word)
    shard.write_bytes(whole)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    manifest["domains"]["c4"]["train"][0]["documents"] += 1
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    expect_error(command(SCRIPT, "--verify", tmp_path / "d"), "ends of documents")


def test_line_numbers_in_byte_ranges(corpus):
    path = corpus / "train" / "a.jsonl"
    lines, source = path.read_bytes().splitlines(keepends=True), {"source": "files"}
    seen, size = [], path.stat().st_size
    for start in range(0, size, 300_001):
        segment = Segment(str(path), "train", start, min(start + 300_001, size), 0)
        for _, number, line in read(source, segment):
            if len(seen) % 97 == 0:
                assert place(source, segment, number) == f"{path}, line {len(seen) + 1}"
            seen.append(line)
    assert seen == lines


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.sampled_from("ab '1.\n\t\u00a0\u2003\x1cé中😀"), max_size=300), st.integers(1, 40)
)
def test_pieces_have_the_tokens_of_the_whole(text, size):
    encode, before = GPT2.encode_to_numpy, units.PIECE
    encoder = fast.Encoder(encode, None, "", tokenizer.GPT2_CUT)
    units.PIECE = size
    try:
        pieces = list(units.encode(encoder, memoryview(text.encode()), 50256))
    finally:
        units.PIECE = before
    assert np.concatenate(pieces).tolist() == [*encode(text).tolist(), 50256]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_large_documents_need_little_memory(tmp_path, suffix):
    """30 MB with an emoji: 120 MB as a str, which was made twice; now it stays UTF-8.

    With one worker, so that the process whose memory is read does the work.
    """
    line = "A line that is said again and again. 😀\n"
    lines = 30_000_000 // 42
    end = "a" * 1_000_000
    row = {"text": line * lines + end, "meta": {"redpajama_set_name": "RedPajamaBook"}}
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    # Not ru_maxrss: that includes what the parent process had.
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    args = [SCRIPT, "--source=files", f"--input={path}", "--split=train=train", "--workers=1"]
    args += [f"--out={tmp_path}/out"]
    process = [sys.executable, "-c", code, *args]
    text = expect_ok(subprocess.run(process, cwd=ROOT, capture_output=True, text=True))
    assert int(text.split("peak")[1]) / 1024 < 500
    ids = GPT2.encode_to_numpy(line)
    expected = np.concatenate([np.tile(ids, lines), GPT2.encode_to_numpy(end)])
    assert np.array_equal(tokens_of(tmp_path / "out", "book", "train")[:-1], expected)


def test_full_disk_can_go_on(alone, corpus, tmp_path):
    """A limit on the size of a file says what a full disk says; then the same command goes on."""

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    args = [sys.executable, *map(str, arguments(corpus, tmp_path))]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, preexec_fn=small)
    expect_error(done, "no room left", "run the same command again")
    expect_ok(command(*arguments(corpus, tmp_path), process=True))
    assert contents(tmp_path) == contents(alone)


def test_disk_is_checked_before(corpus, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    expect_error(
        command(*arguments(corpus, tmp_path / "out", workers=1)), "need about", "are free", "--out"
    )
    assert not list(tmp_path.rglob("*.npy"))


def test_dry_run_writes_nothing(corpus, tmp_path):
    text = expect_ok(command(*arguments(corpus, tmp_path / "out", "--dry_run")))
    assert "a.jsonl" in text and "GB of shards" in text and not (tmp_path / "out").exists()


def test_a_tmpfs_that_is_full(alone, corpus, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", small], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs takes more rights")
    try:
        expect_error(command(*arguments(corpus, small / "out")), "need about", "are free")
        filler = small / "filler"
        filler.write_bytes(bytes(20 << 20))
        code = (
            # guessed wrong
            "import runpy, sys, prepare_slimpajama as p; p.estimate = lambda *_: (0.0, 0.0, 1.0); "
            "sys.argv = sys.argv[1:]; p.run(p.main)"
        )
        args = [sys.executable, "-c", code, *map(str, arguments(corpus, small / "out"))]
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        expect_error(done, "no room left", "run the same command again")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        expect_ok(command(*arguments(corpus, small / "out")))
        assert contents(small / "out") == contents(alone)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_large_documents_count_in_the_estimate(tmp_path, monkeypatch):
    import shutil

    (tmp_path / "train.jsonl").write_text(
        json.dumps({**record(0), "text": "word " * 1_000_000}) + "\n"
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    expect_error(
        command(*arguments(tmp_path, tmp_path / "out", "--split", "train=train")),
        "need about 0.01 GB",
    )
    expect_ok(
        command(*arguments(tmp_path, tmp_path / "out", "--split", "train=train", "--dry_run"))
    )


def test_a_limit_needs_little_room(corpus, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    expect_ok(command(*arguments(corpus, tmp_path, "--max_tokens_per_domain", "9_000", workers=1)))


def test_duplicates_among_unwanted_domains(corpus, tmp_path):
    """A unit without a wanted document, and duplicates that only unwanted ones have."""
    for name, domain in (
        ("train_a", "RedPajamaBook"),
        ("train_b", "RedPajamaC4"),
        ("val", "RedPajamaC4"),
    ):
        row = {"text": "the same", "meta": {"redpajama_set_name": domain}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + " " * (5 << 20) + "\n")
    expect_ok(
        command(*arguments(tmp_path, tmp_path / "out", "--dedup", "--domains", "c4", workers=1))
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest["duplicates"] == {"c4": 1} and set(manifest["domains"]["c4"]) == {"val"}


def test_nothing_left_of_a_mixture(corpus, tmp_path):
    import data
    from cli import UserError

    expect_ok(command(*arguments(corpus, tmp_path, "--holdout", "c4,cc", workers=1)))
    split = data.Split(tmp_path, read_manifest(tmp_path), "train", 64)
    with pytest.raises(UserError, match="'c4cc' asks for data"):
        data.mixture_weights("c4cc", split)


def test_no_permission_to_read(corpus, tmp_path, monkeypatch):
    real = os.access  # the tests may run as root, who may read everything
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith("b.jsonl.zst") and real(path, mode)
    )
    expect_error(command(*arguments(corpus, tmp_path)), "b.jsonl.zst: no permission to read it")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "jsonl.gz", "parquet"])
def test_empty_files(tmp_path, suffix):
    (tmp_path / f"train.{suffix}").touch()
    expect_error(
        command(*arguments(tmp_path, tmp_path / "out", "--split", "train=train")),
        *(
            ["train.parquet", "damaged"]
            if suffix == "parquet"
            else ["the source holds no document"]
        ),
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--part", "0/3"), ("--part 0/3", "K/M")),
        (("--part", "4/3"), ("--part 4/3",)),
        (("--part", "x"), ("--part x",)),
        (
            ("--part", "1/2", "--max_tokens_per_domain", "5"),
            ("--max_tokens_per_domain", "no --part"),
        ),
        (("--part", "1/2", "--overwrite"), ("--overwrite would delete the other parts",)),
        (("--domains", "c4,books"), ("no domain 'books'", "did you mean 'book'")),
        (("--holdout", "web"), ("--holdout web", "known: arxiv")),
        (("--domains", "c4", "--holdout", "cc"), ("cc is not in --domains c4",)),
        (("--schema", "text"), ("--schema text", "text=FIELD")),
        (("--schema", "text=t,constant=A B"), ("names a folder",)),
        (("--schema", "text=t,constant=web", "--domains", "c4"), ("no domain 'c4'", "known: web")),
        (("--skip_bad", "-1"), ("--skip_bad -1", "at least 0")),
        (("--workers", "0"), ("--workers 0",)),
        (("--max_tokens_per_domain", "0"), ("--max_tokens_per_domain 0",)),
        (("--workers", "two"), ("--workers",)),
    ],
)
def test_wrong_flags(corpus, tmp_path, flags, words):
    expect_error(command(*arguments(corpus, tmp_path / "out", *flags)), *words)
    assert not (tmp_path / "out").exists()


def test_calls_that_lack_something(tmp_path):
    expect_error(command(SCRIPT), "--out is needed")
    expect_error(command(SCRIPT, "--out", tmp_path), "--source is needed")
    expect_error(command(SCRIPT, "--verify", tmp_path / "absent"), "not found")
    expect_error(command(SCRIPT, "--merge", "--out", tmp_path), "no parts in")
