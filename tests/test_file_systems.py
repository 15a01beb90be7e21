"""What odd file systems, shells and networks do: each has its outcome."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, expect_ok, write_shards

import data
import files
from cli import Parser, UserError, parse
from corpus import plan
from corpus.manifest import read_manifest
from recipe import TrainConfig
from runtime import checkpoint, distributed, watch

TENSORS = ({"a": torch.ones(3)}, {})


def refuse(number: int):
    """A function that raises this error."""

    def refusing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("what", ["contents", "name"])
@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EACCES, errno.EBUSY])
def test_old_checkpoints_that_cannot_be_deleted(tmp_path, monkeypatch, capfd, what, number):
    """They are named, the run goes on, and a later one deletes them."""
    remove_all, replace = shutil.rmtree, os.replace

    def rmtree(path, ignore_errors=False):
        if what == "contents" and ".old" in str(path):
            refuse(number)()
        remove_all(path, ignore_errors)

    def replace_new_ones(source, target):
        if what == "name" and ".old" in str(target):
            refuse(number)()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        patch.setattr(os, "replace", replace_new_ones)
        writer = checkpoint.Writer(tmp_path, keep=1, every=0)
        for step in (1, 2, 3):
            assert writer.begin(step)
            writer.save(step, TENSORS, {})
            writer.wait()
            assert not writer.failure
    warnings = capfd.readouterr().err
    assert f"cannot be deleted ({os.strerror(number)})" in warnings
    assert "step_00000001" in warnings and "step_00000002" in warnings
    assert 3 in checkpoint.steps(tmp_path)
    checkpoint.save(tmp_path, 4, TENSORS, {}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


def test_tidying_leaves_what_is_not_ours(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (".syncthing.x.tmp", "mine.tmp", "step_00000003.tmp", "step_00000002.old1.tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "step_1.tmp").write_text("a file")
    checkpoint.Writer(tmp_path, 2, 0)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".syncthing.x.tmp", "mine.tmp", "step_1.tmp"]


def test_a_touched_shard_is_the_same_data(tmp_path):
    tokens = {"c4": {"val": np.arange(100), "train": np.arange(300)}}
    folder = write_shards(tmp_path / "d", tokens)
    path = folder / "c4" / "train_00000.npy"
    manifest = read_manifest(folder)
    manifest["domains"]["c4"]["train"][0]["sha256"] = data.sha256_of(path)
    split = data.Split(folder, manifest, "train", 8)
    os.utime(path, (1, 1))
    assert split.changed() == ""
    calls = []
    with pytest.MonkeyPatch.context() as patch:  # hashed once
        patch.setattr(data, "sha256_of", calls.append)
        assert split.changed() == "" and not calls
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\7\7")
    assert "train_00000.npy was changed during the run" in split.changed()
    path.unlink()
    assert "train_00000.npy was changed during the run" in split.changed()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def of_files_alone(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            refuse(number)()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    checkpoint.save(tmp_path, 1, TENSORS, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [1]


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    (tmp_path / "x").write_text("x")
    with pytest.raises(OSError):
        files.sync(tmp_path / "x")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_no_hard_links(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "link", refuse(number))
    path = tmp_path / "plan.json"
    for text in ("first", "second"):
        plan.create_once(path, text)
    assert path.read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.json.lock"]


def test_the_home_folder_in_flags_and_config_files(tmp_path, monkeypatch):
    """No shell expands --out_dir=~/x, nor a config file's string."""
    monkeypatch.setenv("HOME", "/home/me")
    config_file = tmp_path / "mine.py"
    config_file.write_text('data_dir = "~/data"\n')
    argv = [str(config_file), "--out_dir=~/runs/a", "--init_from", "~/b"]
    config = parse(TrainConfig, "", argv)
    found = (config.data_dir, config.out_dir, config.init_from)
    assert found == ("/home/me/data", "/home/me/runs/a", "/home/me/b")
    parser = Parser("")
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--prompt")
    args = parser.parse_args(["~/a", "b~/", "--to=~/c", "--prompt=~/d"])
    assert args.runs == ["/home/me/a", "b~/"] and args.to == Path("/home/me/c")
    assert args.prompt == "~/d"


@pytest.mark.parametrize(
    "script", ["train.py", "prepare_slimpajama.py", "eval/tables.py", "scripts/export_hf.py"]
)
def test_pythonsafepath(script, tmp_path):
    """Then Python does not look for modules beside the script."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(process, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "usage: " in expect_ok(done)


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_nohup(monkeypatch, under_torchrun):
    """A run goes on after SIGHUP; torchrun's workers do not, since it would kill them."""
    before = [signal.getsignal(number) for number in watch.SIGNALS]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if under_torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        stop = watch.Stop(60)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == (signal.SIGHUP if under_torchrun else 0)
    finally:
        for number, handler in zip(watch.SIGNALS, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "address, ranks_here", [("127.0.1.1", 1), ("10.0.0.5", 1), ("127.0.1.1", 2)]
)
def test_a_node_whose_name_is_its_own_loopback(monkeypatch, address, ranks_here):
    """Ubuntu gives a machine's name the address 127.0.1.1, at which gloo's other nodes look."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)

    def fail(*args, **kwargs):
        raise RuntimeError("Gloo connectFullMesh failed with ...\nmore")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    if address.startswith("127.") and ranks_here == 1:
        with pytest.raises(UserError, match="stands for 127.0.1.1.*set GLOO_SOCKET_IFNAME"):
            distributed.join_by_gloo(None)
    else:
        with pytest.raises(RuntimeError, match="connectFullMesh"):
            distributed.join_by_gloo(None)
