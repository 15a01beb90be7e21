"""What breaks in long runs: kills, signals, full disks, damaged files, bad numbers, dead and slow
ranks.

The short form kills a few times, `-m long` a hundred; both print how many it survived.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, expect_error, expect_ok, free_port
from ranks import Ranks
from test_train import SMALL, model_of, poisoned, records

import step as step_module
from runtime import checkpoint

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
STEPS = 24
FLAGS = (
    f"--max_steps={STEPS}",
    "--checkpoint_interval=1",
    "--eval_interval=8",
    "--reweight=linupper",
    "--dropout=0.1",
    "--micro_batch_size=4",
)


def arguments(sample_data, out, *flags):
    return ["train.py", *SMALL, *FLAGS, "--data_dir", sample_data, "--out_dir", out, *flags]


def newest(out) -> int:
    return max(checkpoint.steps(out), default=0)


def files(out):
    return sorted(str(p.relative_to(out)) for p in out.rglob("*"))


def assert_same_end(a, b):
    """Parameters, optimizer and logged losses of two finished runs, bit for bit, and no file more
    or less.
    """
    assert files(a) == files(b)
    for name in checkpoint.FILES:
        x, y = (
            torch.utils._pytree.tree_leaves(
                torch.load(checkpoint.find_latest(run) / name, weights_only=True)
            )
            for run in (a, b)
        )
        assert all(
            torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q
            for p, q in zip(x, y, strict=True)
        )
    for kind in ("train", "eval"):
        losses = [
            {r["step"]: r.get("loss", r.get("mean_loss")) for r in records(run, kind)}
            for run in (a, b)
        ]
        shared = set(losses[0]) & set(losses[1])
        assert max(shared) == STEPS and all(losses[0][s] == losses[1][s] for s in shared)


@pytest.fixture(scope="module")
def start(sample_data, tmp_path_factory):
    """start(out, *flags, ranks=2, fault="") -> Ranks; none is left running."""
    runs, logs = [], tmp_path_factory.mktemp("logs")

    def begin(out, *flags, ranks=2, fault=""):
        args = arguments(sample_data, out, *flags)
        log = logs / str(len(runs))
        runs.append(Ranks(ranks, args, free_port(), log, fault=fault))
        runs[-1].folder = out
        return runs[-1]

    yield begin
    for run in runs:
        run.signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The finished run of two ranks that the others are compared with."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run = start(out)
    assert run.wait() == [0, 0], run.output()
    return out


def count(times: int, early: float, start, unbroken, out, end) -> None:
    """End a run `times` times at random moments and start it again; each run that finishes equals
    the unbroken one.

    early: share of the times that come at any moment from the start on; the others wait until a
    checkpoint is written. end(run) -> whether it survived: it ended as it should, and what is in
    the folder can be gone on from. A run that was over before is not counted.
    """
    rng, survived, finished, tried = random.Random(1), 0, 0, 0
    while tried < times or finished == 0:
        before, run = newest(out), start(out)
        if tried < times:
            anywhere = rng.random() < early
            if not anywhere:
                run.wait_for(
                    lambda before=before, run=run: (
                        newest(out) > before or not run.processes[0].is_alive()
                    )
                )
            time.sleep(rng.uniform(0, 3 if anywhere else 0.6))
            well = end(run)
        else:
            well = run.wait() == [0, 0]
        assert well, run.output()
        if "finished" in run.output():
            finished += 1
            assert_same_end(out, unbroken)
            shutil.rmtree(out)
        else:
            tried, survived = tried + 1, survived + well
    print(f"survived {survived} of {tried}, {finished} runs finished and equal")


def killed(run) -> bool:
    run.signal(signal.SIGKILL)
    return set(run.wait()) <= {-9, 0}  # until then it had gone on from what the kill before left


def terminated(run) -> bool:
    run.signal(signal.SIGTERM)
    codes, output = run.wait(30), run.output()
    stopped = re.search(r"stopped by SIGTERM at step (\d+);", output)
    saved = checkpoint.read_json(checkpoint.find_latest(run.folder) / "state.json")["step"]
    return codes == [0, 0] and ("finished" in output or int(stopped[1]) == saved)


def test_kills(start, unbroken, tmp_path):
    count(4, 0.25, start, unbroken, tmp_path / "run", killed)


@pytest.mark.long
def test_a_hundred_kills(start, unbroken, tmp_path):
    count(100, 0.25, start, unbroken, tmp_path / "run", killed)


@pytest.mark.long
def test_twenty_sigterms(start, unbroken, tmp_path):
    count(20, 0, start, unbroken, tmp_path / "run", terminated)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_one_rank_stops_all_at_one_step(start, unbroken, tmp_path, number):
    out = tmp_path / "run"
    run = start(out, "--checkpoint_interval=100")
    run.wait_for(lambda: (out / "metrics.jsonl").exists() and records(out, "train"))
    run.signal(number, 1)
    assert run.wait(30) == [0, 0], run.output()
    (step,) = checkpoint.steps(out)  # saved once, by the signal
    assert (
        2 <= step < STEPS
        and f"stopped by {number.name} at step {step}; resume with: python" in run.output()
    )
    assert "Traceback" not in run.output()
    if number == signal.SIGTERM:
        run = start(out)
        assert (
            run.wait() == [0, 0]
            and f"resumed from {checkpoint.checkpoint_folder(out, step)}" in run.output()
        )
        assert_same_end(out, unbroken)


def without_the_end(unbroken, out):
    """A copy that lacks the last step."""
    shutil.copytree(unbroken, out)
    shutil.rmtree(checkpoint.checkpoint_folder(out, STEPS))
    return out


def test_a_signal_during_evaluation_leaves_it_and_the_resumed_run_makes_up_for_it(
    start, unbroken, tmp_path
):
    out = without_the_end(unbroken, tmp_path / "run")
    run = start(out, "--eval_windows=100000")
    run.wait_for(lambda: f"{STEPS}/{STEPS} " in run.output())
    time.sleep(0.5)  # the last evaluation is of many thousand windows
    run.signal(signal.SIGTERM)
    assert run.wait(15) == [0, 0] and f"stopped by SIGTERM at step {STEPS};" in run.output(), (
        run.output()
    )
    assert records(out, "eval")[-1]["step"] == STEPS - 8
    run = start(out)
    assert run.wait() == [0, 0] and "finished" in run.output()
    assert_same_end(out, unbroken)
    run = start(out)
    assert run.wait() == [0, 0] and "is finished" in run.output()


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(start, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for step, name in ((STEPS, "optimizer.pt"), (STEPS - 1, "model.pt")):
        path = checkpoint.checkpoint_folder(out, step) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # a single bit, in the middle of the numbers
        path.write_bytes(content)
        if step == STEPS:
            run = start(out)
            assert run.wait() == [0, 0], run.output()
            damage = "is damaged (its sha256 is not the one in state.json)"
            warning = f"warning: {path} {damage}; going on from"
            assert run.output().count(warning) == 1
            assert_same_end(out, unbroken)
            path.write_bytes(content)
    run = start(out)
    assert (
        run.wait() == [2, 2]
        and "error: " in run.output()
        and "has no intact checkpoint" in run.output()
    )


def test_a_run_of_four_ranks_goes_on_with_one_two_or_three(start, tmp_path):
    """FSDP and DDP in turn; dropout noise belongs to the micro-batch, which is the same for all."""
    flags = (
        "--global_batch_size=12",
        "--micro_batch_size=1",
        "--max_steps=12",
        "--checkpoint_interval=2",
        "--keep_checkpoints=9",
        "--eval_interval=100",
        "--eval_windows=1",
    )
    run = start(tmp_path / "four", *flags, "--parallel=fsdp", ranks=4)
    assert run.wait(120) == [0] * 4, run.output()
    expected = [r["loss"] for r in records(tmp_path / "four", "train")]
    assert len(expected) == 12 and expected[-1] < expected[0] - 0.1
    for ranks, parallel in ((1, "ddp"), (2, "fsdp"), (3, "ddp")):
        out = tmp_path / str(ranks)
        shutil.copytree(tmp_path / "four", out)
        for step in (4, 6, 8, 10, 12):
            shutil.rmtree(checkpoint.checkpoint_folder(out, step))
        run = start(out, *flags, f"--parallel={parallel}", ranks=ranks)
        assert run.wait(120) == [0] * ranks and f"x {12 // ranks} micro-steps" in run.output(), (
            run.output()
        )
        losses = [r["loss"] for r in records(out, "train")]
        assert losses == pytest.approx(expected, abs=1e-5) and losses != expected


def test_a_slow_rank_is_named(start, tmp_path):
    run = start(
        tmp_path / "run", "--timeout_s=20", fault="slow rank"
    )  # told after a twentieth of it
    assert run.wait() == [0, 0], run.output()
    assert re.search(
        "rank 1 is late: reading its batch at step . since . s, others computing at step",
        run.output(),
    )
    assert "rank 0 is late" not in run.output()


def test_a_rank_that_hangs_ends_the_others_after_the_time_out(start, tmp_path):
    run = start(tmp_path / "run", "--timeout_s=5", fault="hanging rank")
    run.wait_for(lambda: not run.processes[0].is_alive())
    assert run.processes[0].exitcode == 1 and "rank 1 is late: reading its batch" in run.output(), (
        run.output()
    )
    run.signal(
        signal.SIGTERM, 1
    )  # it waits for its data: the first signal waits for the step's end
    time.sleep(2.5)
    assert run.processes[1].is_alive()
    run.signal(signal.SIGTERM, 1)
    assert run.wait(5)[1] == -signal.SIGTERM


def test_a_dead_rank_takes_the_others_down_and_is_reported(sample_data, tmp_path):
    args = arguments(
        sample_data, tmp_path / "run", "--max_steps=100000", "--checkpoint_interval=10"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(
            [*torchrun, "--", *map(str, args)], cwd=ROOT, stdout=log, stderr=log
        ) as agent,
    ):
        until = time.monotonic() + 60
        while newest(tmp_path / "run") < 20 and time.monotonic() < until:
            time.sleep(0.1)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        ranks = {
            int(re.search(r"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_text())[1]): int(pid)
            for pid in workers
        }
        os.kill(ranks[1], signal.SIGKILL)
        assert agent.wait(60) == 1
    report = (tmp_path / "log").read_text().split("Root Cause")[1]
    assert "rank      : 1 " in report and "exitcode  : -9" in report, report
    assert not Path(f"/proc/{ranks[0]}").exists() and newest(tmp_path / "run") >= 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 60 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs takes more rights")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave: int) -> None:
    with contextlib.suppress(OSError):  # a run that is writing was faster
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - leave))


@pytest.mark.parametrize("guessed", [True, False])
def test_a_disk_that_is_full_for_a_checkpoint(start, unbroken, small_disk, guessed):
    out = without_the_end(unbroken, small_disk / "run")
    before = files(out / "checkpoints")
    fill(small_disk, leave=4_000_000)  # of the 10 MB it takes
    run = start(out, fault="" if guessed else "free space guessed wrong")
    codes = run.wait()
    assert codes[0] == 2 and codes[1] in (0, 2), run.output()
    assert f"error: the checkpoint of step {STEPS} cannot be written" in run.output()
    assert (
        "(0.01 GB are needed; 0.00 GB are free)" in run.output()
    ) == guessed and "GB are free)" in run.output()
    assert (
        f"the newest one is of step {STEPS - 1}" in run.output() and "Traceback" not in run.output()
    )
    assert files(out / "checkpoints") == before
    (small_disk / "filler").unlink()
    run = start(out)
    assert run.wait() == [0, 0], run.output()
    assert_same_end(out, unbroken)


def test_a_disk_that_is_full_for_the_metrics(start, unbroken, small_disk):
    out = small_disk / "run"
    run = start(out, "--checkpoint_interval=4")
    run.wait_for(lambda: newest(out) >= 4)
    run.signal(signal.SIGKILL)
    run.wait()
    saved = newest(out)
    run = start(
        out, "--checkpoint_interval=100"
    )  # the checkpoint at the end would be the first to need room
    # the bar is there once the lines past the checkpoint have gone
    run.wait_for(
        lambda: f"/{STEPS} [" in run.output() and records(out, "train")[-1]["step"] > saved
    )
    fill(small_disk, leave=0)
    assert run.wait()[0] == 2 and "Traceback" not in run.output(), run.output()
    assert "metrics.jsonl cannot be written (No space left on device)" in run.output()
    run = start(out)  # before there is room
    assert 2 in run.wait() and f"error: --out_dir {out}: No space left on device" in run.output(), (
        run.output()
    )
    (small_disk / "filler").unlink()
    run = start(out)
    assert run.wait() == [0, 0], run.output()
    assert [r["step"] for r in records(out, "train")] == list(range(1, STEPS + 1))


def run_alone(sample_data, out, *flags):
    return command(
        "train.py",
        *SMALL,
        "--data_dir",
        sample_data,
        "--out_dir",
        out,
        "--eval_interval=100",
        *flags,
    )


def test_stopping_at_a_nan_keeps_the_state_before_it(sample_data, tmp_path, monkeypatch):
    """Seen by the host three steps later: the device has taken none of them."""
    flags = ("--max_steps=8", "--log_interval=4", "--on_nonfinite=stop")
    with monkeypatch.context() as patch:
        poisoned(patch, lambda row, call: call == 5)
        expect_error(
            run_alone(sample_data, tmp_path / "run", *flags), "in step 5", "saved as step 4"
        )
    for name in ("run", "whole"):
        expect_ok(run_alone(sample_data, tmp_path / name, *flags))
    a, b = (model_of(tmp_path / x / "checkpoints" / "step_00000008") for x in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_spike_is_named_and_skipped_if_asked(sample_data, tmp_path, monkeypatch):
    """A loss times 1000 at step 9; the median of the steps before 7 comes from the checkpoint."""
    import model

    forward, calls = model.GPT.forward, [0]

    def spiking(self, idx, targets=None):
        calls[0] += self.training
        return forward(self, idx, targets) * (1000 if self.training and calls[0] == 9 else 1)

    monkeypatch.setattr(model.GPT, "forward", spiking)
    monkeypatch.setattr(step_module, "WINDOW", 8)
    ends = []
    for name, flags in (("logged", ()), ("skipped", ("--skip_grad_norm=5",))):
        calls[0] = 0
        for steps in (6, 12):
            expect_ok(run_alone(sample_data, tmp_path / name, f"--max_steps={steps}", *flags))
        (spike,) = records(tmp_path / name, "spike")
        assert (spike["step"], spike["skipped"]) == (9, name == "skipped") and len(
            spike["samples"]
        ) == 8
        norms = [r["grad_norm"] for r in records(tmp_path / name, "train")]
        assert len(norms) == (11 if name == "skipped" else 12)
        assert spike["limit"] == pytest.approx(
            (5 if flags else 10) * sorted(norms[:8])[3], rel=1e-6
        )
        ends.append(model_of(tmp_path / name / "checkpoints" / "step_00000012"))
    assert any(
        not torch.equal(p, q) for p, q in zip(ends[0].values(), ends[1].values(), strict=True)
    )
    expect_error(
        run_alone(sample_data, tmp_path / "x", "--skip_grad_norm=0.5"),
        "--skip_grad_norm 0.5",
        "above 1",
    )


def test_data_that_changes(sample_data, tmp_path):
    data_dir, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(sample_data, data_dir)
    expect_ok(run_alone(data_dir, out, "--max_steps=2"))
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest["domains"]["c4"]["train"][0]["sha256"] = "0" * 64  # prepared anew
    (data_dir / "manifest.json").write_text(json.dumps(manifest))
    expect_error(
        run_alone(data_dir, out, "--max_steps=4"),
        "another run: data",
        "--allow_data_change accepts it",
    )
    expect_error(
        run_alone(data_dir, out, "--max_steps=4", "--allow_data_change", "--seed=1"),
        "seed 42 there, 1 here",
    )
    expect_ok(run_alone(data_dir, out, "--max_steps=4", "--allow_data_change"))
    assert checkpoint.steps(out) == [2, 4]


def test_data_that_changes_during_a_run(start, sample_data, tmp_path):
    data_dir, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(sample_data, data_dir)
    run = start(out, "--data_dir", data_dir, "--checkpoint_interval=4", "--max_steps=1000")
    run.wait_for(lambda: newest(out) >= 4)
    os.utime(data_dir / "book" / "train_00000.npy")
    assert run.wait()[0] == 2, run.output()
    assert (
        "book/train_00000.npy was changed during the run" in run.output()
        and "Traceback" not in run.output()
    )


def test_checkpoints_that_are_kept(tmp_path):
    found = []
    for step in range(2, 21, 2):
        found = [
            s for s in [*found, step] if s not in checkpoint.outdated([*found, step], step, 2, 6)
        ]
    assert found == [6, 12, 18, 20]
    assert checkpoint.outdated([6, 12, 18], 12, 2, 0) == [
        18
    ]  # damaged, or the run would have gone on from it
    left = tmp_path / "checkpoints" / "step_00000004.tmp"
    left.mkdir(parents=True)
    (left.parent / "mine").mkdir()
    checkpoint.Writer(tmp_path, 2, 0)
    assert files(tmp_path) == ["checkpoints", "checkpoints/mine"]


def test_the_next_step_does_not_change_what_is_being_written():
    from runtime import distributed

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.ones(2)).sum().backward()
        optimizer.step()

    step()
    state = distributed.get_state(model, optimizer)
    leaves = [
        leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)
    ]
    before = [leaf.clone() for leaf in leaves]
    step()
    assert len(leaves) == 2 * 4 and all(
        torch.equal(a, b) for a, b in zip(leaves, before, strict=True)
    )
    assert not torch.equal(state[0]["weight"], model.weight)


def test_a_failed_write_is_told_and_nothing_is_written_after_it(tmp_path, monkeypatch):
    writer, tensors = checkpoint.Writer(tmp_path, 2, 0), ({"a": torch.ones(3)}, {})
    (tmp_path / "checkpoints").mkdir()
    writer.save(1, tensors, {})
    writer.wait()
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    writer.save(2, tensors, {})
    writer.wait()
    assert "step 2 cannot be written" in writer.failure and "ZeroDivisionError" in writer.failure
    writer.save(3, tensors, {})
    writer.wait()
    assert (
        checkpoint.steps(tmp_path) == [1] and len(list((tmp_path / "checkpoints").iterdir())) == 1
    )


def test_a_kill_after_the_last_checkpoint_leaves_nothing_for_good(start, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for name in ("step_00000021.old.tmp", "step_00000022"):  # being deleted, and not yet
        shutil.copytree(checkpoint.checkpoint_folder(out, STEPS), out / "checkpoints" / name)
    run = start(out)
    assert run.wait() == [0, 0] and "is finished" in run.output()
    assert_same_end(out, unbroken)


def test_two_runs_in_one_folder(start, tmp_path):
    first = start(tmp_path / "run", "--max_steps=100000", "--checkpoint_interval=100000", ranks=1)
    first.wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and records(tmp_path / "run", "train")
    )
    second = start(tmp_path / "run", "--max_steps=100000", ranks=1)
    assert second.wait() == [2] and "error: a process is still training in" in second.output()
    first.signal(signal.SIGTERM)
    assert first.wait(30) == [0], first.output()
