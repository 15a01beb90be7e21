"""--reweight_ref: the loss over a reference's, from a run and from a file."""

import json

import numpy as np
import pytest
import torch
from conftest import command, expect_error, expect_ok
from test_train import SMALL, assert_same_model, model_of, records, run

from data import Batch
from reweight import sample_weights
from runtime import checkpoint, reference
from runtime.telemetry import SAMPLE
from step import View

FLAGS = ("--max_steps=6", "--checkpoint_interval=3", "--reweight=linupper", "--log_interval=1")
FLAGS += ("--reweight_warmup_steps=0", "--eval_interval=6")


@pytest.fixture(scope="module")
def a_reference(sample_data, tmp_path_factory):
    """A run that serves as reference."""
    out = tmp_path_factory.mktemp("reference") / "run"
    expect_ok(run(sample_data, out, "--max_steps=8", "--seed=7"))
    return out


def score(a_reference, sample_data, to, *flags):
    args = ["eval/score_windows.py", "--run", a_reference, "--to", to, "--"]
    return command(*args, *SMALL, "--data_dir", sample_data, *FLAGS, *flags)


@pytest.fixture(scope="module")
def a_file(a_reference, sample_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "reference.npz"
    assert "windows scored" in expect_ok(score(a_reference, sample_data, path))
    return path


def test_what_the_weights_see():
    losses = torch.tensor([2.0, 4.0, 6.0, 8.0])
    of_reference, n_bytes = torch.tensor([1.0, 4.0, 2.0, 9.0]), torch.tensor([0.5, 1.0, 2.0, 1.0])
    view = View(1 / n_bytes)
    view = view.minus(view.of(of_reference))
    assert torch.equal(view.of(losses), (losses - of_reference) / n_bytes)
    assert torch.equal(view.of(losses[2:], 2), ((losses - of_reference) / n_bytes)[2:])
    assert torch.equal(View().of(losses), losses)
    both = view.minus(torch.ones(4))
    assert torch.equal(both.of(losses), (losses - of_reference) / n_bytes - 1)


def test_the_weights_are_those_of_the_excess(a_reference, sample_data, tmp_path):
    """Against the losses that eval/perplexity.py's code gives the reference on the same windows."""
    out = tmp_path / "run"
    flags = (*FLAGS, f"--reweight_ref={a_reference}", "--record_samples=1")
    assert "reference  " in expect_ok(run(sample_data, out, *flags))
    rows = np.fromfile(out / "samples.bin", SAMPLE)
    path = tmp_path / "reference.npz"
    expect_ok(score(a_reference, sample_data, path))
    scored = reference.read_file(path)
    domains = list(scored.windows)
    for step in (1, 4):
        own = rows[rows["step"] == step]
        of_reference = []
        for domain, window in zip(own["domain"], own["window"], strict=True):
            name = domains[domain]
            place = np.searchsorted(scored.windows[name], window)
            of_reference.append(scored.losses[name][place])
        excess = torch.tensor(own["loss"] - np.array(of_reference))
        expected = sample_weights(excess, "linupper", 0.4) * len(own)
        torch.testing.assert_close(
            torch.tensor(own["weight"].copy()), expected, atol=1e-4, rtol=1e-4
        )


def test_a_file_trains_as_the_run_does(a_reference, a_file, sample_data, tmp_path):
    for name, source in (("run", a_reference), ("file", a_file)):
        expect_ok(run(sample_data, tmp_path / name, *FLAGS, f"--reweight_ref={source}"))
    a, b = (records(tmp_path / name, "train") for name in ("run", "file"))
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], abs=1e-4)
    assert [row["ess"] for row in a] == pytest.approx([row["ess"] for row in b], abs=1e-3)
    plain = tmp_path / "plain"
    expect_ok(run(sample_data, plain, *FLAGS))
    assert records(plain, "train")[0]["ess"] != pytest.approx(a[0]["ess"], abs=1e-3)


@pytest.mark.parametrize("flags", [(), ("--reweight_norm=domain", "--reweight_unit=byte")], ids=str)
def test_a_run_with_a_reference_resumes_bit_for_bit(a_file, sample_data, tmp_path, flags):
    flags = (*FLAGS, *flags, f"--reweight_ref={a_file}")
    for name in ("whole", "broken"):
        expect_ok(run(sample_data, tmp_path / name, *flags))
    step_6 = checkpoint.checkpoint_folder(tmp_path / "broken", 6)
    expected = model_of(step_6)
    for path in sorted(step_6.glob("*")):
        path.unlink()
    step_6.rmdir()
    moved = tmp_path / "moved.npz"
    moved.write_bytes(a_file.read_bytes())  # the file may move: its model counts
    expect_ok(run(sample_data, tmp_path / "broken", *flags, f"--reweight_ref={moved}"))
    assert_same_model(tmp_path / "whole", tmp_path / "broken", 6)
    assert torch.equal(model_of(step_6)["wte.weight"], expected["wte.weight"])


def test_two_ranks_and_accumulation_see_the_same_excess(a_reference, sample_data, tmp_path):
    flags = (*FLAGS, f"--reweight_ref={a_reference}")
    expect_ok(run(sample_data, tmp_path / "one", *flags))
    expect_ok(run(sample_data, tmp_path / "two", *flags, "--micro_batch_size=2", ranks=2))
    losses = [[row["loss"] for row in records(tmp_path / name, "train")] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_another_reference_is_another_run(a_reference, a_file, sample_data, tmp_path):
    out = tmp_path / "run"
    expect_ok(run(sample_data, out, *FLAGS, f"--reweight_ref={a_file}"))
    expect_error(run(sample_data, out, *FLAGS, "--max_steps=9"), "reference")
    flags = (*FLAGS, "--max_steps=9", f"--reweight_ref={a_file}")
    done = run(sample_data, out, *flags)
    expect_error(done, "has no loss of window", "eval/score_windows.py and the flags of this run")


def test_wrong_references(a_reference, a_file, sample_data, tmp_path):
    def fails(source, *words, flags=()):
        done = run(sample_data, tmp_path / "run", *FLAGS, f"--reweight_ref={source}", *flags)
        expect_error(done, f"--reweight_ref {source}", *words)

    fails(tmp_path / "nowhere", "no checkpoint in it")
    garbage = tmp_path / "garbage.npz"
    garbage.write_bytes(b"garbage")
    fails(garbage, "is no file of eval/score_windows.py")
    fails(a_file, "made for block_size 32", "this run has 16", flags=["--block_size=16"])
    fails(a_reference, "context of 32 tokens", flags=["--block_size=64"])
    other = tmp_path / "other.npz"
    with np.load(a_file) as saved:
        arrays = {name: saved[name] for name in saved}
    about = json.loads(str(arrays["about"]))
    arrays["about"] = np.array(json.dumps({**about, "data": "another"}))
    np.savez(other, **arrays)
    fails(other, "made for data another")


def test_the_plan_says_what_data_a_reference_saw(a_file, a_reference, sample_data, tmp_path):
    for source in (a_file, a_reference):
        flags = (*FLAGS, f"--reweight_ref={source}", "--dry_run")
        assert f"reference  {source}, trained on this data" in expect_ok(
            run(sample_data, tmp_path / "run", *flags)
        )
    about = reference.About("m", "another")
    assert about.describe("x", "this") == "x, trained on other data"


def test_a_batch_of_another_rank(a_file, monkeypatch):
    """Rank 1 of 2 looks up the second half of the global batch."""
    scored = reference.read_file(a_file)
    domains = tuple(scored.windows)
    looked_up = reference.FromFile(a_file, domains, torch.device("cpu"))
    pairs = np.array([(d, scored.windows[domains[d]][0]) for d in (0, 1, 2, 3)])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    x = torch.zeros(2, 4, dtype=torch.long)
    found = looked_up(Batch(x, x, None, pairs), x, x)
    assert found.tolist() == [scored.losses[domains[d]][0].item() for d in (2, 3)]
