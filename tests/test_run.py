"""What surrounds the steps: ranks that do not run the same thing are refused at the start, and so
is a second run in a folder.
"""

import errno
import fcntl
import gc
import os
import threading

import pytest
from conftest import expect_error, expect_ok, free_port
from ranks import Ranks
from test_train import SMALL, records
from test_train import run as train

import files
import runtime.run
from cli import UserError
from runtime import checkpoint, distributed
from runtime.run import FolderLock, check_same_on_all_ranks

OWN = {"seed": 42, "r": 0.4, "data": "abc", "max_steps": 12, "checkpoint step": 8, "code": "1f"}


def check(monkeypatch, *others: dict) -> None:
    of_all = [OWN, *(OWN | other for other in others)]
    monkeypatch.setattr(distributed, "gather_objects", lambda own: of_all)
    check_same_on_all_ranks(OWN, "runs/a")


@pytest.mark.parametrize("key, value", [*((key, "another") for key in OWN), ("checkpoint step", 0)])
def test_a_difference_is_named_with_its_ranks(monkeypatch, key, value):
    with pytest.raises(UserError) as error:
        check(monkeypatch, {}, {key: value}, {})
    assert f"{key} is " in str(error.value)
    assert "on ranks 0, 1, 3" in str(error.value) and "on rank 2;" in str(error.value)


def test_equal_ranks_go_on(monkeypatch):
    check(monkeypatch, {}, {})
    check_same_on_all_ranks(OWN, "runs/a")


@pytest.mark.parametrize(
    "key, value", [("seed", 7), ("r", 0.5), ("learning_rate", 0.1), ("max_steps", 4)]
)
def test_two_ranks_with_different_flags(sample_data, tmp_path, key, value):
    args = ["train.py", *SMALL, "--max_steps=3", "--data_dir", sample_data]
    args += ["--out_dir", tmp_path / "run"]
    out, err = tmp_path / "out", tmp_path / "err"
    patch = f"if rank == 1: sys.argv.append('--{key}={value}')"
    ranks = Ranks(2, args, free_port(), out, err, patch)
    assert ranks.wait() == [2, 2]
    lines = [line for line in err.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 2 and all(f"{key} is " in line for line in lines)
    assert not (tmp_path / "run").exists()


# The lock of a run folder


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(runtime.run, "LOCK_WAIT_S", 0.0)


def test_of_simultaneous_starts_exactly_one_gets_in(tmp_path, no_wait):
    """Threads, each with an open file of its own, which is what the system goes by."""
    for attempt in range(20):
        out = tmp_path / str(attempt) / "run"
        together, all_tried = threading.Barrier(6), threading.Barrier(6)
        outcomes = []

        def start(out=out, together=together, all_tried=all_tried, outcomes=outcomes):
            together.wait()
            lock = FolderLock(out)
            try:
                with lock:
                    outcomes.append("in")
                    all_tried.wait()
            except UserError as error:
                outcomes.append(str(error))
                all_tried.wait()

        threads = [threading.Thread(target=start) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        losers = [outcome for outcome in outcomes if outcome != "in"]
        assert len(outcomes) == 6 and len(losers) == 5, outcomes
        assert all(f"another run trains in {out}" in line for line in losers)


def test_the_lock_is_taken_before_the_folder_is_read(sample_data, tmp_path, no_wait):
    """Whatever the folder holds: nothing, a run without a checkpoint, a run of another seed."""
    out = tmp_path / "run"
    flags = ("--max_steps=2", "--record_samples=1")
    with FolderLock(out):
        expect_error(train(sample_data, out, *flags), f"another run trains in {out}")
        assert os.listdir(out) == [".lock"]
    expect_ok(train(sample_data, out, *flags))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with FolderLock(out):
        for flag in ("--seed=42", "--seed=7", "--max_steps=1", "--resume=never"):
            expect_error(train(sample_data, out, *flags, flag), f"another run trains in {out}")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert "is finished" in expect_ok(train(sample_data, out, *flags))


def test_the_locked_file_is_never_replaced(sample_data, tmp_path):
    out = tmp_path / "run"
    for steps in (2, 4):
        expect_ok(train(sample_data, out, f"--max_steps={steps}"))
        if steps == 2:
            before = os.stat(out / ".lock")
    assert os.path.samestat(os.stat(out / ".lock"), before)
    (out / ".lock").unlink()  # the folder of an older version
    assert "resumed from" in expect_ok(train(sample_data, out, "--max_steps=6"))


def test_a_dry_run_asks_for_no_lock(sample_data, tmp_path, no_wait):
    out = tmp_path / "run"
    with FolderLock(out):
        expect_ok(train(sample_data, out, "--dry_run"))
    (out / ".lock").unlink()
    expect_ok(train(sample_data, out, "--dry_run"))
    assert os.listdir(out) == []


@pytest.mark.parametrize("existed", [True, False])
def test_a_start_that_is_refused_leaves_no_folder(tmp_path, existed):
    out = tmp_path / "a" / "run"
    if existed:
        out.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), FolderLock(out):
        raise ZeroDivisionError
    assert out.exists() == existed


def test_a_start_that_waited_for_one_that_was_refused(tmp_path):
    """It does not go on with the lock of a file that the other one has removed."""
    out = tmp_path / "run"
    first, second = FolderLock(out), FolderLock(out)
    entered = threading.Event()
    locked = []

    def wait():
        with second:
            locked.append(os.path.sameopenfile(second.file.fileno(), os.open(out / ".lock", 0)))
            entered.set()

    waiting = threading.Thread(target=wait)
    with pytest.raises(ZeroDivisionError), first:
        waiting.start()
        assert not entered.wait(0.3)
        raise ZeroDivisionError
    waiting.join()
    assert locked == [True]


def test_the_folder_stays_locked_while_a_run_that_failed_still_writes(
    tmp_path, no_wait, monkeypatch
):
    go_on = threading.Event()
    monkeypatch.setattr(checkpoint, "write_part", lambda *args: go_on.wait(10) and {"model.pt": ""})
    writers = []

    def fail():
        with FolderLock(tmp_path) as lock:
            writer = checkpoint.Writer(tmp_path, 2, 0, lock.file)
            lock.is_in_use = writer.is_writing
            assert writer.begin(1)
            writer.save(1, ({}, {}), {})
            writers.append(writer.thread)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    gc.collect()
    with pytest.raises(UserError, match="another run trains"):
        FolderLock(tmp_path).__enter__()
    go_on.set()
    writers.pop().join()
    gc.collect()
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(sample_data, tmp_path, monkeypatch, number):
    def refusing(file, mode):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    said = expect_ok(train(sample_data, tmp_path / "run", "--max_steps=2"))
    (line,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert "two runs in one folder are not detected there" in line
    assert os.strerror(number) in line and str(tmp_path / "run") in line
    assert len(records(tmp_path / "run", "train")) == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written(sample_data, tmp_path, monkeypatch, number):
    """A finished run says so there; another one is refused."""
    out = tmp_path / "run"
    expect_ok(train(sample_data, out, "--max_steps=2"))

    def refusing(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "lock", refusing)
    assert "is finished" in expect_ok(train(sample_data, out, "--max_steps=2"))
    done = train(sample_data, out, "--max_steps=4")
    expect_error(done, f"--out_dir {out}: {os.strerror(number)}; give a folder")
    assert len(records(out, "train")) == 2


def test_all_ranks_learn_that_another_run_trains_in_the_folder(sample_data, tmp_path):
    out = tmp_path / "run"
    args = ["train.py", *SMALL, "--max_steps=3", "--data_dir", sample_data, "--out_dir", out]
    patch = "import runtime.run; runtime.run.LOCK_WAIT_S = 0.0"
    with FolderLock(out):
        ranks = Ranks(2, args, free_port(), tmp_path / "out", patch=patch)
        assert ranks.wait() == [2, 2]
    assert ranks.output().count(f"another run trains in {out}") == 2
    assert "Traceback" not in ranks.output()
