"""python train.py --doctor: what is there, and what is wrong."""

import json
import os
import shutil

import pytest
from conftest import command, expect_error, expect_ok

from corpus.manifest import data_hash, read_manifest


def marks(done) -> dict[str, str]:
    """What of -> its mark."""
    lines = [
        line
        for line in done.stdout.splitlines()
        if line.split(" ")[0] in ("ok", "warning", "wrong")
    ]
    return {line[9:25].strip(): line[:9].strip() for line in lines}


@pytest.fixture
def here(sample_data, tmp_path):
    return [
        f"--data_dir={sample_data}",
        f"--out_dir={tmp_path}/run",
        "--model=tiny",
        "--device=cpu",
    ]


def test_nothing_is_wrong(here, sample_data):
    done = command("train.py", "--doctor", *here)
    text, found = expect_ok(done), marks(done)
    assert {
        "command",
        "commit",
        "torch",
        "numpy",
        "tiktoken",
        "GPUs",
        "open files",
        "out_dir",
        "data_dir",
        "tokenizer gpt2",
        "tokenizer bytes",
        "train tokens",
        "val tokens",
        "mixture",
    } <= set(found)
    manifest = read_manifest(sample_data)
    assert "wrong" not in found.values() and data_hash(manifest) in text and "0 wrong" in text
    assert f"book {sum(s['tokens'] for s in manifest['domains']['book']['train']):,}" in text


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--data_dir=/nowhere"], "data_dir"),
        (["--mixture=c4cc", "--block_size=1000000"], "data_dir"),
        (["--out_dir=/proc/x"], "out_dir"),
        (["--out_dir=/etc/hostname/x"], "out_dir"),
        (["--device=cuda"], "GPUs"),
    ],
    ids=str,
)
def test_what_is_wrong_is_marked(here, flags, what):
    done = command("train.py", *here, *flags, "--doctor")
    assert done.returncode == 1 and not done.stderr
    assert {name for name, mark in marks(done).items() if mark == "wrong"} == {what}


def test_a_shard_that_is_cut_short_and_another_tokenizer(here, sample_data, tmp_path):
    shutil.copytree(sample_data, tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps({**manifest, "tokenizer": {**manifest["tokenizer"], "sha256": "0" * 64}})
    )
    assert (
        marks(command("train.py", *here, f"--data_dir={tmp_path}/d", "--doctor"))["its tokenizer"]
        == "warning"
    )
    os.truncate(tmp_path / "d" / "c4" / "val_00000.npy", 200)
    done = command("train.py", *here, f"--data_dir={tmp_path}/d", "--doctor")
    assert done.returncode == 1 and "c4/val_00000.npy has 200 bytes" in done.stdout


def test_a_full_disk_few_files_and_a_wrong_launcher(here, monkeypatch):
    import resource

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    monkeypatch.setenv("RANK", "7")
    done = command("train.py", *here, "--doctor")
    found = marks(done)
    assert (
        done.returncode == 1
        and found["open files"] == "warning"
        and found["out_dir"] == found["ranks"] == "wrong"
    )


def test_flags_are_checked_first(here):
    expect_error(command("train.py", *here, "--doctor", "--lerning_rate=1"), "--learning_rate")
