"""python train.py --doctor: what this machine and the data are, and what is wrong with them."""

import json
import os
import resource
import shutil

import pytest
import torch.utils.collect_env
from conftest import command, expect_error, expect_ok

from corpus.manifest import data_hash, read_manifest

CHECKS = (
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
)


def marks(done) -> dict[str, str]:
    """What was checked -> its mark."""
    lines = done.stdout.splitlines()
    marked = [line for line in lines if line.split(" ")[0] in ("ok", "warning", "wrong")]
    return {line[9:25].strip(): line[:9].strip() for line in marked}


def wrong(done) -> set[str]:
    """What was marked as wrong."""
    return {name for name, mark in marks(done).items() if mark == "wrong"}


@pytest.fixture
def flags(sample_data, tmp_path):
    folders = (f"--data_dir={sample_data}", f"--out_dir={tmp_path}/run")
    return [*folders, "--model=tiny", "--device=cpu", "--doctor"]


@pytest.fixture
def without_report(monkeypatch):
    """torch's own report takes a second."""
    monkeypatch.setattr(torch.utils.collect_env, "get_pretty_env_info", lambda: "")


def test_nothing_is_wrong(flags, sample_data):
    done = command("train.py", *flags)
    text = expect_ok(done)
    assert "PyTorch version: " in text
    assert set(CHECKS) <= set(marks(done)) and not wrong(done) and "0 wrong" in text
    manifest = read_manifest(sample_data)
    tokens = sum(shard["tokens"] for shard in manifest["domains"]["book"]["train"])
    assert data_hash(manifest) in text and f"book {tokens:,}" in text


@pytest.mark.parametrize(
    "more, what",
    [
        (["--data_dir=/nowhere"], "data_dir"),
        (["--mixture=c4cc", "--block_size=1000000"], "data_dir"),
        (["--out_dir=/proc/x"], "out_dir"),
        (["--out_dir=/etc/hostname/x"], "out_dir"),
        (["--device=cuda"], "GPUs"),
    ],
    ids=str,
)
def test_what_is_wrong_is_marked(without_report, flags, more, what):
    done = command("train.py", *flags, *more)
    assert done.returncode == 1 and not done.stderr
    assert wrong(done) == {what}


def test_a_shard_that_is_cut_short_and_another_tokenizer(
    without_report, flags, sample_data, tmp_path
):
    shutil.copytree(sample_data, tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    flags.append(f"--data_dir={tmp_path}/d")
    assert marks(command("train.py", *flags))["its tokenizer"] == "warning"
    os.truncate(tmp_path / "d" / "c4" / "val_00000.npy", 200)
    done = command("train.py", *flags)
    assert done.returncode == 1 and "c4/val_00000.npy has 200 bytes" in done.stdout


def test_a_full_disk_few_files_and_a_wrong_launcher(without_report, flags, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    monkeypatch.setenv("RANK", "7")
    done = command("train.py", *flags)
    assert done.returncode == 1 and wrong(done) == {"out_dir", "ranks"}
    assert marks(done)["open files"] == "warning"


def test_flags_are_checked_first(flags):
    expect_error(command("train.py", *flags, "--lerning_rate=1"), "--learning_rate")
