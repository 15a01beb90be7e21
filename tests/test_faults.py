"""What breaks in long runs: kills, signals, full disks, damaged files, bad numbers, late ranks.

The short form kills a few times, `-m long` a hundred; both print how many kills the run survived.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import command, expect_error, expect_ok, free_port
from ranks import Ranks, torchrun
from test_train import SMALL, model_of, poisoned, records
from torch.utils._pytree import tree_leaves

import step as step_module
from runtime import checkpoint, parts

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
STEPS = 16
EVAL_INTERVAL = 8
FLAGS = (
    f"--max_steps={STEPS}",
    "--checkpoint_interval=1",
    f"--eval_interval={EVAL_INTERVAL}",
    "--reweight=linupper",
    "--dropout=0.1",
    "--micro_batch_size=4",
)


def arguments(sample_data, out, *flags):
    return ["train.py", *SMALL, *FLAGS, "--data_dir", sample_data, "--out_dir", out, *flags]


def newest(out) -> int:
    return max(checkpoint.steps(out), default=0)


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def tensors_of(run, kind):
    return tree_leaves(checkpoint.load_parts(checkpoint.find_latest(run), kind))


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def losses_of(run, kind):
    """Step -> loss of the lines of one kind."""
    return {row["step"]: row.get("loss", row.get("mean_loss")) for row in records(run, kind)}


def assert_same_end(a, b):
    """Two finished runs have the same files, parameters, optimizer and losses, bit for bit."""
    assert files(a) == files(b)
    for kind in checkpoint.KINDS:
        assert all(map(same, tensors_of(a, kind), tensors_of(b, kind)))
    for kind in ("train", "eval"):
        losses_a, losses_b = losses_of(a, kind), losses_of(b, kind)
        shared = set(losses_a) & set(losses_b)
        assert max(shared) == STEPS
        assert all(losses_a[step] == losses_b[step] for step in shared)


@pytest.fixture(scope="module")
def start(sample_data, tmp_path_factory):
    """start(out, *flags, ranks=2, patch="") -> Ranks of a run that has begun.

    None is left running at the end.
    """
    runs = []
    logs = tmp_path_factory.mktemp("logs")

    def begin(out, *flags, ranks=2, patch=""):
        args = arguments(sample_data, out, *flags)
        log = logs / str(len(runs))
        runs.append(Ranks(ranks, args, free_port(), log, patch=patch))
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


# Kills and signals


def count(times: int, early: float, start, unbroken, out, end) -> None:
    """End a run `times` times at random moments and start it again.

    Each run that gets to its last step must equal the unbroken one.

    early: share of the times that come at any moment from the start on; the others wait until a
        checkpoint is written.
    end: end(run, out) -> whether it survived: it ended as it should, and what is in the folder can
        be continued. A run that was over before is not counted.
    """
    rng = random.Random(1)
    survived = finished = tried = 0
    while tried < times or finished == 0:
        before = newest(out)
        run = start(out)
        if tried < times:
            anywhere = rng.random() < early
            if not anywhere:
                wait_for_checkpoint(run, out, before)
            time.sleep(rng.uniform(0, 1.5 if anywhere else 0.6))
            well = end(run, out)
        else:
            well = set(run.wait()) == {0}
        assert well, run.output()
        if "finished" in run.output():
            finished += 1
            assert_same_end(out, unbroken)
            shutil.rmtree(out)
        else:
            tried += 1
            survived += well
    print(f"survived {survived} of {tried}, {finished} runs finished and equal")


def wait_for_checkpoint(run, out, before: int) -> None:
    """Wait until a checkpoint later than `before` is written, or the run is over."""
    run.wait_for(lambda: newest(out) > before or not run.processes[0].is_alive())


def killed(run, out) -> bool:
    run.signal(signal.SIGKILL)
    # Until then it had continued from what the kill before had left.
    return set(run.wait()) <= {-signal.SIGKILL, 0}


def terminated(run, out) -> bool:
    run.signal(signal.SIGTERM)
    codes, output = run.wait(30), run.output()
    stopped = re.search(r"stopped by SIGTERM at step (\d+);", output)
    saved = checkpoint.read_json(checkpoint.find_latest(out) / "state.json")["step"]
    return codes == [0, 0] and ("finished" in output or int(stopped[1]) == saved)


def test_kills(start, unbroken, tmp_path):
    count(4, 0.25, start, unbroken, tmp_path / "run", killed)


def test_kills_of_a_llama(start, tmp_path):
    flags = ("--model=llama_tiny", "--n_layer=1", "--parallel=fsdp")
    run = start(tmp_path / "unbroken", *flags)
    assert run.wait() == [0, 0], run.output()

    def start_llama(out):
        return start(out, *flags)

    count(2, 0.25, start_llama, tmp_path / "unbroken", tmp_path / "run", killed)


@pytest.mark.long
def test_a_hundred_kills(start, unbroken, tmp_path):
    count(100, 0.25, start, unbroken, tmp_path / "run", killed)


@pytest.mark.long
def test_twenty_sigterms(start, unbroken, tmp_path):
    count(20, 0, start, unbroken, tmp_path / "run", terminated)


@pytest.mark.long
@pytest.mark.parametrize("ranks, parallel", [(2, "fsdp"), (4, "hsdp")])
def test_twenty_kills_of_ranks_that_write_a_part_each(start, tmp_path, ranks, parallel):
    flags = ("--model=llama_tiny", "--n_layer=1", "--dropout=0", f"--parallel={parallel}")
    flags += (f"--micro_batch_size={8 // ranks}",)
    patch = 'os.environ["LOCAL_WORLD_SIZE"] = "2"'
    run = start(tmp_path / "unbroken", *flags, ranks=ranks, patch=patch)
    assert run.wait() == [0] * ranks, run.output()

    def start_parts(out):
        return start(out, *flags, ranks=ranks, patch=patch)

    count(20, 0.25, start_parts, tmp_path / "unbroken", tmp_path / "run", killed)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_one_rank_stops_all_at_one_step(start, unbroken, tmp_path, number):
    out = tmp_path / "run"
    run = start(out, "--checkpoint_interval=100")
    run.wait_for(lambda: (out / "metrics.jsonl").exists() and records(out, "train"))
    run.signal(number, 1)
    assert run.wait(30) == [0, 0], run.output()
    (step,) = checkpoint.steps(out)  # saved once, by the signal
    assert 2 <= step < STEPS
    assert f"stopped by {number.name} at step {step}; resume with: python" in run.output()
    assert "Traceback" not in run.output()
    if number == signal.SIGTERM:
        run = start(out)
        assert run.wait() == [0, 0], run.output()
        assert f"resumed from {checkpoint.checkpoint_folder(out, step)}" in run.output()
        assert_same_end(out, unbroken)


def without_the_end(unbroken, out):
    """A copy of the run that lacks the last step."""
    shutil.copytree(unbroken, out)
    shutil.rmtree(checkpoint.checkpoint_folder(out, STEPS))
    return out


def test_a_signal_during_evaluation_leaves_it_and_the_resumed_run_makes_up_for_it(
    start, unbroken, tmp_path
):
    out = without_the_end(unbroken, tmp_path / "run")
    run = start(out, "--eval_windows=100000")
    run.wait_for(lambda: f"of {STEPS}: loss" in run.output().split(f"step {STEPS:>6} ")[-1])
    time.sleep(0.5)  # the last evaluation is of many thousand windows
    run.signal(signal.SIGTERM)
    assert run.wait(15) == [0, 0], run.output()
    assert f"stopped by SIGTERM at step {STEPS};" in run.output()
    assert records(out, "eval")[-1]["step"] == STEPS - EVAL_INTERVAL
    run = start(out)
    assert run.wait() == [0, 0] and "finished" in run.output()
    assert_same_end(out, unbroken)
    run = start(out)
    assert run.wait() == [0, 0] and "is finished" in run.output()


def test_a_kill_after_the_last_checkpoint_leaves_nothing_for_good(start, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    being_deleted, not_yet_deleted = "step_00000013.old.tmp", "step_00000014"
    for name in (being_deleted, not_yet_deleted):
        shutil.copytree(checkpoint.checkpoint_folder(out, STEPS), out / "checkpoints" / name)
    run = start(out)
    assert run.wait() == [0, 0] and "is finished" in run.output()
    assert_same_end(out, unbroken)


# Checkpoints


def flip_a_bit(path):
    """In the middle of the file, among the numbers."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(start, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    last = checkpoint.checkpoint_folder(out, STEPS) / "optimizer.pt"
    flip_a_bit(last)
    run = start(out)
    assert run.wait() == [0, 0], run.output()
    damaged = f"warning: {last} is damaged (its sha256 is not the one in state.json); going on from"
    assert run.output().count(damaged) == 1
    assert_same_end(out, unbroken)

    flip_a_bit(last)
    flip_a_bit(checkpoint.checkpoint_folder(out, STEPS - 1) / "model.pt")
    run = start(out)
    assert run.wait() == [2, 2]
    assert "error: " in run.output() and "has no intact checkpoint" in run.output()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_of_a_node_reads_a_checkpoint_to_check_it(start, unbroken, tmp_path, parallel):
    """Four ranks, two of them on each of two nodes; the newest checkpoint is damaged."""
    out, log = tmp_path / "run", tmp_path / "hashed"
    shutil.copytree(unbroken, out)
    damaged = checkpoint.checkpoint_folder(out, STEPS) / "optimizer.pt"
    flip_a_bit(damaged)
    patch = f"""if True:
        os.environ["LOCAL_RANK"] = str(rank % 2)
        from runtime import checkpoint
        sha256 = checkpoint.sha256
        def noting(file):
            print(rank, file.name, file=open({str(log)!r}, "a"))
            return sha256(file)
        checkpoint.sha256 = noting
    """
    run = start(out, f"--parallel={parallel}", "--micro_batch_size=2", ranks=4, patch=patch)
    assert run.wait() == [0] * 4, run.output()
    assert run.output().count(f"warning: {damaged} is damaged") == 1
    being_written = f"{damaged.parent.name}.tmp/"
    hashed = [line for line in log.read_text().splitlines() if being_written not in line]
    expected = []
    for rank in (0, 2):
        for step in (STEPS, STEPS - 1):
            folder = checkpoint.checkpoint_folder(out, step)
            expected += [f"{rank} {folder / name}" for name in ("model.pt", "optimizer.pt")]
    assert sorted(hashed) == sorted(expected)


def test_checkpoints_that_are_kept(tmp_path):
    kept = []
    for step in range(2, 21, 2):
        steps = [*kept, step]
        outdated = checkpoint.outdated(steps, step, 2, 6)
        kept = [s for s in steps if s not in outdated]
    assert kept == [6, 12, 18, 20]
    # 18 is damaged, or the run would have continued from it.
    assert checkpoint.outdated([6, 12, 18], 12, 2, 0) == [18]
    left = tmp_path / "checkpoints" / "step_00000004.tmp"
    left.mkdir(parents=True)
    (left.parent / "mine").mkdir()
    checkpoint.Writer(tmp_path, 2, 0)
    assert files(tmp_path) == ["checkpoints", "checkpoints/mine"]


def test_the_next_step_does_not_change_what_is_being_written():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.ones(2)).sum().backward()
        optimizer.step()

    step()
    state = parts.copy_to_host(parts.own_state(model, optimizer))
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    step()
    assert len(tensors) == 2 * 4
    assert all(map(torch.equal, tensors, before))
    assert not torch.equal(state[0]["weight"], model.weight)


def test_a_failed_write_is_reported_and_nothing_is_written_after_it(tmp_path, monkeypatch):
    writer = checkpoint.Writer(tmp_path, 2, 0)
    tensors = ({"a": torch.ones(3)}, {})
    (tmp_path / "checkpoints").mkdir()
    assert writer.begin(1)
    writer.save(1, tensors, {})
    writer.wait()
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    assert writer.begin(2)
    writer.save(2, tensors, {})
    assert not writer.begin(3)
    assert "step 2 cannot be written" in writer.failure and "ZeroDivisionError" in writer.failure
    assert checkpoint.steps(tmp_path) == [1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


# Ranks


@pytest.mark.parametrize("model, parallel", [("tiny", "fsdp"), ("llama_tiny", "hsdp")])
def test_a_run_of_four_ranks_continues_with_one_two_or_three(start, tmp_path, model, parallel):
    """FSDP and DDP in turn; dropout noise belongs to the micro-batch, which is the same for all."""
    flags = (
        "--global_batch_size=12",
        "--micro_batch_size=1",
        "--max_steps=6",
        "--checkpoint_interval=3",
        "--keep_checkpoints=9",
        "--eval_interval=100",
        "--eval_windows=1",
        f"--model={model}",
        f"--dropout={0.1 if model == 'tiny' else 0.0}",
    )
    patch = "one_layer(); os.environ['LOCAL_WORLD_SIZE'] = '2'"  # two nodes
    run = start(tmp_path / "four", *flags, f"--parallel={parallel}", ranks=4, patch=patch)
    assert run.wait(120) == [0] * 4, run.output()
    expected = list(losses_of(tmp_path / "four", "train").values())
    assert len(expected) == 6 and expected[-1] < expected[0] - 0.1
    written = checkpoint.read_json(checkpoint.find_latest(tmp_path / "four") / "state.json")
    n_parts = {"fsdp": 4, "hsdp": 2}[parallel]
    assert len(checkpoint.part_files(written, "optimizer")) == n_parts
    for ranks, parallel in ((1, "ddp"), (2, "fsdp"), (3, "ddp")):
        out = tmp_path / str(ranks)
        shutil.copytree(tmp_path / "four", out)
        shutil.rmtree(checkpoint.checkpoint_folder(out, 6))
        run = start(out, *flags, f"--parallel={parallel}", ranks=ranks, patch="one_layer()")
        assert run.wait(120) == [0] * ranks, run.output()
        assert f"x {12 // ranks} micro-steps" in run.output()
        assert re.search("resumed from .*step_00000003", run.output())
        assert list(losses_of(out, "train").values()) == pytest.approx(expected, abs=1e-5)


def test_a_slow_rank_is_named(start, tmp_path):
    """It is reported after a twentieth of the time-out."""
    run = start(tmp_path / "run", "--timeout_s=20", patch="if rank == 1: slow_read(4)")
    assert run.wait() == [0, 0], run.output()
    late = "rank 1 is late: reading its batch at step . since . s, others computing at step"
    assert re.search(late, run.output())
    assert "rank 0 is late" not in run.output()


def test_a_rank_that_hangs_ends_the_others_after_the_time_out(start, tmp_path):
    run = start(tmp_path / "run", "--timeout_s=5", patch="if rank == 1: slow_read(600)")
    run.wait_for(lambda: not run.processes[0].is_alive())
    assert run.processes[0].exitcode == 1, run.output()
    assert "rank 1 is late: reading its batch" in run.output()
    run.signal(signal.SIGTERM, 1)  # it waits for its data: the first signal waits for the step
    time.sleep(2.5)
    assert run.processes[1].is_alive()
    run.signal(signal.SIGTERM, 1)
    assert run.wait(5)[1] == -signal.SIGTERM


def rank_of(pid: str) -> int:
    environment = Path(f"/proc/{pid}/environ").read_text()
    return int(re.search(r"\0RANK=(\d+)", environment)[1])


def test_a_dead_rank_takes_the_others_down_and_is_reported(sample_data, tmp_path):
    """By the real torchrun."""
    out = tmp_path / "run"
    args = arguments(sample_data, out, "--max_steps=100000", "--checkpoint_interval=10")
    port = f"--master_port={free_port()}"
    # The -- keeps torchrun from taking our flags for abbreviations of its own.
    agent = torchrun(tmp_path / "log", "--nproc_per_node=2", port, "--", *args)
    agent.wait_for(lambda: newest(out) >= 10)
    pid = agent.processes[0].pid
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = {rank_of(worker): int(worker) for worker in workers}
    os.kill(ranks[1], signal.SIGKILL)
    assert agent.wait() == [1]
    report = agent.output().split("Root Cause")[1]
    assert "rank      : 1 " in report and "exitcode  : -9" in report, report
    assert not Path(f"/proc/{ranks[0]}").exists()
    assert newest(out) >= 10


SHORT_WAIT = "import runtime.run; runtime.run.LOCK_WAIT_S = 0.5"  # for the lock of the run folder


def test_two_runs_in_one_folder(start, tmp_path):
    out = tmp_path / "run"
    first = start(out, "--max_steps=100000", "--checkpoint_interval=100000", ranks=1)
    first.wait_for(lambda: (out / "metrics.jsonl").exists() and records(out, "train"))
    first.signal(signal.SIGSTOP)  # it costs nothing meanwhile, and holds its lock
    second = start(out, "--max_steps=100000", ranks=1, patch=SHORT_WAIT)
    assert second.wait() == [2]
    assert "error: another run trains in" in second.output()
    first.signal(signal.SIGCONT)
    first.signal(signal.SIGTERM)
    assert first.wait(30) == [0], first.output()


def test_runs_that_start_at_the_same_moment(start, tmp_path):
    """Each is slow where the folder is prepared, so that all of them are there at once."""
    out = tmp_path / "run"
    flags = ("--max_steps=100000", "--checkpoint_interval=100000")
    slow = "from runtime import metrics; keep = metrics.keep_lines_until; "
    slow += "metrics.keep_lines_until = lambda *args: (time.sleep(2), keep(*args)); "
    runs = [start(out, *flags, ranks=1, patch=slow + SHORT_WAIT) for _ in range(3)]

    def alive():
        return [run for run in runs if run.processes[0].is_alive()]

    alive()[0].wait_for(lambda: len(alive()) == 1, 30)
    (winner,) = alive()
    for run in runs:
        if run is not winner:
            assert run.wait() == [2]
            assert f"error: another run trains in {out}" in run.output()
    winner.wait_for(lambda: (out / "metrics.jsonl").exists() and records(out, "train"))
    winner.signal(signal.SIGTERM)
    assert winner.wait(30) == [0], winner.output()
    logged = [row["step"] for row in records(out, "train")]
    assert logged == list(range(1, newest(out) + 1))


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 60 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
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
    run = start(out, patch="" if guessed else "no_check_of_space()")
    codes = run.wait()
    output = run.output()
    assert codes[0] == 2 and codes[1] in (0, 2), output
    assert f"error: the checkpoint of step {STEPS} cannot be written" in output
    assert ("(0.01 GB are needed; 0.00 GB are free)" in output) == guessed
    assert "GB are free)" in output
    assert f"the newest one is of step {STEPS - 1}" in output
    assert "Traceback" not in output
    assert files(out / "checkpoints") == before
    (small_disk / "filler").unlink()
    run = start(out)
    assert run.wait() == [0, 0], run.output()
    assert_same_end(out, unbroken)


def test_a_disk_that_is_full_for_the_metrics(start, unbroken, small_disk):
    out = small_disk / "run"
    # 200 steps: the disk must be full before the last one.
    run = start(out, "--checkpoint_interval=4", "--max_steps=200")
    run.wait_for(lambda: newest(out) >= 4)
    run.signal(signal.SIGKILL)
    run.wait()
    saved = newest(out)
    # Without checkpoints, the metrics are the first to need room.
    run = start(out, "--checkpoint_interval=1000", "--max_steps=200")
    # A line of training appears once the lines past the checkpoint are gone.
    run.wait_for(
        lambda: " of 200: loss" in run.output() and records(out, "train")[-1]["step"] > saved
    )
    fill(small_disk, leave=0)
    assert run.wait()[0] == 2 and "Traceback" not in run.output(), run.output()
    assert "metrics.jsonl cannot be written (No space left on device)" in run.output()
    last = saved + 8
    run = start(out, f"--max_steps={last}")  # before there is room
    assert 2 in run.wait(), run.output()
    assert f"error: --out_dir {out}: No space left on device" in run.output()
    (small_disk / "filler").unlink()
    run = start(out, f"--max_steps={last}")
    assert run.wait() == [0, 0], run.output()
    assert [row["step"] for row in records(out, "train")] == list(range(1, last + 1))


# Bad numbers and changed data


def run_alone(sample_data, out, *flags):
    base = (*SMALL, "--data_dir", sample_data, "--out_dir", out, "--eval_interval=100")
    return command("train.py", *base, *flags)


def final_model(out, step):
    return model_of(checkpoint.checkpoint_folder(out, step))


def test_stopping_at_a_nan_keeps_the_state_before_it(sample_data, tmp_path, monkeypatch):
    """Seen by the host three steps later: the device has taken none of them."""
    flags = ("--max_steps=8", "--log_interval=4", "--on_nonfinite=stop")
    with monkeypatch.context() as patch:
        poisoned(patch, lambda row, call: call == 5)
        done = run_alone(sample_data, tmp_path / "run", *flags)
        expect_error(done, "in step 5", "saved as step 4")
    for name in ("run", "whole"):
        expect_ok(run_alone(sample_data, tmp_path / name, *flags))
    a, b = (final_model(tmp_path / name, 8) for name in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_spike_is_named_and_skipped_if_asked(sample_data, tmp_path, monkeypatch):
    """A loss times 1000 at step 9; the median of the steps before 7 comes from the checkpoint."""
    import model

    forward = model.GPT.forward
    calls = 0

    def spiking(self, idx, targets=None):
        nonlocal calls
        calls += self.training
        is_spike = self.training and calls == 9
        return forward(self, idx, targets) * (1000 if is_spike else 1)

    monkeypatch.setattr(model.GPT, "forward", spiking)
    monkeypatch.setattr(step_module, "WINDOW", 8)
    ends = []
    for name, flags in (("logged", ()), ("skipped", ("--skip_grad_norm=5",))):
        out = tmp_path / name
        calls = 0
        for steps in (6, 12):
            expect_ok(run_alone(sample_data, out, f"--max_steps={steps}", *flags))
        (spike,) = records(out, "spike")
        assert (spike["step"], spike["skipped"]) == (9, name == "skipped")
        assert len(spike["samples"]) == 8
        norms = [row["grad_norm"] for row in records(out, "train")]
        assert len(norms) == (11 if name == "skipped" else 12)
        multiple = 5 if flags else 10
        assert spike["limit"] == pytest.approx(multiple * sorted(norms[:8])[3], rel=1e-6)
        ends.append(final_model(out, 12))
    assert not all(map(torch.equal, ends[0].values(), ends[1].values()))
    done = run_alone(sample_data, tmp_path / "x", "--skip_grad_norm=0.5")
    expect_error(done, "--skip_grad_norm 0.5", "above 1")


def test_data_that_changes(sample_data, tmp_path):
    data_dir, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(sample_data, data_dir)
    expect_ok(run_alone(data_dir, out, "--max_steps=2"))
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest["domains"]["c4"]["train"][0]["sha256"] = "0" * 64  # prepared anew
    (data_dir / "manifest.json").write_text(json.dumps(manifest))
    done = run_alone(data_dir, out, "--max_steps=4")
    expect_error(done, "another run: data", "--allow_data_change accepts it")
    done = run_alone(data_dir, out, "--max_steps=4", "--allow_data_change", "--seed=1")
    expect_error(done, "seed 42 there, 1 here")
    expect_ok(run_alone(data_dir, out, "--max_steps=4", "--allow_data_change"))
    assert checkpoint.steps(out) == [2, 4]


def test_data_that_changes_during_a_run(start, sample_data, tmp_path):
    data_dir, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(sample_data, data_dir)
    run = start(out, "--data_dir", data_dir, "--checkpoint_interval=4", "--max_steps=1000")
    run.wait_for(lambda: newest(out) >= 4)
    os.utime(data_dir / "c4" / "train_00000.npy")  # the content decides
    reached = newest(out) + 8
    run.wait_for(lambda: newest(out) >= reached)
    with open(data_dir / "book" / "train_00000.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\1\0")
    assert run.wait()[0] == 2, run.output()
    assert "book/train_00000.npy was changed during the run" in run.output()
    assert "Traceback" not in run.output()
