"""Checkpoints that several ranks write in parts: any rows, any number of ranks, no whole copy."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import command, expect_error, expect_ok, free_port
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from test_faults import flip_a_bit
from test_train import SMALL, model_of, records

from cli import UserError
from families import SIZES, build, build_empty
from recipe import TrainConfig
from runtime import checkpoint, init_from, parts
from runtime.parts import Share

STEPS = 4
FLAGS = (
    *SMALL,
    f"--max_steps={STEPS}",
    "--checkpoint_interval=2",
    f"--eval_interval={STEPS}",
    "--reweight=linupper",
    "--parallel=fsdp",
    "--model=llama_tiny",
)


def train(sample_data, out, *flags, ranks=2, patch="one_layer()"):
    args = ["train.py", *FLAGS, "--data_dir", sample_data, "--out_dir", out, *flags]
    return command(*args, ranks=ranks, patch=patch)


@pytest.fixture(scope="module")
def spread(sample_data, tmp_path_factory):
    """A run of two ranks that share one copy of the model."""
    out = tmp_path_factory.mktemp("spread") / "run"
    expect_ok(train(sample_data, out))
    return out


# Rows


@given(rows=st.integers(0, 9), wrote=st.integers(1, 5), reads=st.integers(1, 5))
def test_rows_of_any_number_of_parts_go_to_any_other(rows, wrote, reads):
    whole = torch.arange(rows * 2.0).view(rows, 2)
    written = list(whole.split(max(1, -(-rows // wrote))))
    written += [whole[:0]] * (wrote - len(written))  # the last ranks may have none
    chunk = -(-rows // reads)
    for i in range(reads):
        expected = whole[i * chunk : (i + 1) * chunk]
        own = torch.full_like(expected, -1)
        parts.copy_rows(own, written, Share(i, reads), "x")
        assert torch.equal(own, expected)


def test_rows_of_another_shape_are_refused():
    for shape in ((3, 2), (4, 3), (5, 2)):
        with pytest.raises(UserError, match="another model: x has .*4, 2. there"):
            parts.copy_rows(torch.zeros(shape), [torch.ones(4, 2)], parts.ALL, "x")
    with pytest.raises(UserError, match="it lacks y"):
        parts.take_rows({"y": torch.zeros(2)}, [{"x": torch.ones(2)}], parts.ALL)


@pytest.mark.parametrize("name", ["tiny", "llama_tiny", "llama_1b"])
def test_weights_drawn_one_by_one_are_those_of_the_model(name):
    shape = replace(SIZES[name], n_layer=2, vocab_size=50, block_size=16)
    torch.manual_seed(3)
    expected = build(shape).state_dict()
    torch.manual_seed(3)
    model = build_empty(shape).to_empty(device="cpu")
    parts.fill(model, init_from.starting_weights(TrainConfig(), shape))
    got = model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


@pytest.mark.parametrize("parallel, n", [("fsdp", 4), ("hsdp", 2)])
def test_no_rank_needs_more_than_its_share_and_a_block(tmp_path, parallel, n):
    """Four ranks. The share of training: weights, two moments, gradients. Saving copies three."""
    out = tmp_path / "run"
    expect_ok(command("tests/peak_worker.py", out, parallel, ranks=4))
    for rank in range(4):
        peaks = json.loads((tmp_path / f"run.{rank}.json").read_text())
        share, block = peaks["share"], peaks["block"]
        assert share == pytest.approx(peaks["model"] / n, rel=0.01)
        assert peaks["equal"]
        assert share <= peaks["start"] <= share + block
        assert 3 * share <= peaks["save"] <= 3 * share + block
        mapped = 3 * peaks["model"]  # files, whose pages the profiler counts as memory
        assert 3 * share <= peaks["resume"] - mapped <= 4 * share + block


# Checkpoints


def test_each_rank_writes_its_rows_and_evaluation_reads_them(spread, sample_data, tmp_path):
    folder = checkpoint.find_latest(spread)
    names = sorted(path.name for path in folder.iterdir())
    of_ranks = [f"{kind}_0000{rank}.pt" for kind in checkpoint.KINDS for rank in (0, 1)]
    assert names == [*of_ranks, "state.json"]
    whole = model_of(folder)
    for rank in (0, 1):
        part = torch.load(folder / f"model_0000{rank}.pt", weights_only=True)
        for name, rows in part.items():
            chunk = -(-len(whole[name]) // 2)
            assert torch.equal(rows, whole[name][rank * chunk : (rank + 1) * chunk])
            # Without the storage of other rows.
            assert rows.untyped_storage().nbytes() == rows.nbytes
    assert records(spread, "train")[-1]["loss"] < records(spread, "train")[0]["loss"]
    expect_ok(command("eval/perplexity.py", "--run", spread))
    result = json.loads((spread / "eval" / "perplexity.json").read_text())
    state = checkpoint.read_json(folder / "state.json")
    assert result["model_sha256"] == state["model_sha256"] == checkpoint.model_sha256(state)
    # Equal to the same weights in one piece.
    checkpoint.save(tmp_path, STEPS, (whole, {}), {**state, "sha256": {}}, keep=1)
    shutil.copy(spread / "config.json", tmp_path)
    expect_ok(command("eval/perplexity.py", "--run", tmp_path))
    again = json.loads((tmp_path / "eval" / "perplexity.json").read_text())
    assert again["domains"] == result["domains"]
    assert again["model_sha256"] != result["model_sha256"]


def test_the_hash_of_a_model_is_that_of_its_parts(spread):
    state = checkpoint.read_json(checkpoint.find_latest(spread) / "state.json")
    hashes = state["sha256"]
    assert checkpoint.hash_of_model(hashes) == checkpoint.model_sha256(state)
    for name in hashes:
        changed = checkpoint.hash_of_model({**hashes, name: "0" * 64})
        assert (changed == state["model_sha256"]) == name.startswith("optimizer")
    assert checkpoint.model_sha256({}) is None
    assert checkpoint.model_sha256({"sha256": {"model.pt": "a"}}) == "a"


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "swapped"])
def test_a_part_that_is_damaged(spread, sample_data, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(spread, out)
    part = checkpoint.find_latest(out) / "optimizer_00001.pt"
    if damage == "flip":
        flip_a_bit(part)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "missing":
        part.unlink()
    else:
        shutil.copy(part.with_name("optimizer_00000.pt"), part)
    text = expect_ok(train(sample_data, out))
    assert f"warning: {part} is" in text and "step_00000002" in text
    assert records(out, "train")[-1]["loss"] == records(spread, "train")[-1]["loss"]


def test_parts_run_no_code(spread, sample_data, tmp_path):
    """Even where the hash is right."""

    class Evil:
        def __reduce__(self):
            return (write, (tmp_path / "owned", ""))

    for kind in checkpoint.KINDS:
        out = tmp_path / kind
        shutil.copytree(spread, out)
        folder = checkpoint.find_latest(out)
        name = f"{kind}_00001.pt"
        torch.save({"wte.weight": Evil()}, folder / name)
        state = checkpoint.read_json(folder / "state.json")
        state["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state))
        expect_error(train(sample_data, out, "--max_steps=6"), name, "holds more than tensors")
        if kind == "model":
            expect_error(command("eval/perplexity.py", "--run", out), name, "more than tensors")
        assert not (tmp_path / "owned").exists()


def write(path, text):
    path.write_text(text)


def test_a_new_run_starts_with_the_weights_of_parts(spread, sample_data, tmp_path):
    """One and two ranks, whole and in parts, and with a shorter context."""
    flags = ("--model=auto", f"--init_from={spread}", "--max_steps=2")
    for ranks, parallel in ((1, "ddp"), (2, "fsdp")):
        out = tmp_path / parallel
        expect_ok(train(sample_data, out, *flags, f"--parallel={parallel}", ranks=ranks))
    first = [records(tmp_path / name, "eval")[0]["mean_loss"] for name in ("ddp", "fsdp")]
    assert first == [pytest.approx(records(spread, "eval")[-1]["mean_loss"], abs=1e-6)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_cannot_be_written_ends_the_run_on_all_ranks(sample_data, tmp_path, rank):
    patch = f"""if True:
        one_layer()
        from runtime import checkpoint
        real = checkpoint.write_part
        def failing(out_dir, step, *args):
            if step == 4 and rank == {rank}:
                raise OSError(28, "No space left on device")
            return real(out_dir, step, *args)
        checkpoint.write_part = failing
    """
    args = ["train.py", *FLAGS, "--data_dir", sample_data, "--out_dir", tmp_path / "run"]
    args += ["--max_steps=12"]
    run = Ranks(2, args, free_port(), tmp_path / "log", patch=patch)
    assert run.wait() == [2, 2], run.output()
    said = "error: the checkpoint of step 4 cannot be written to"
    assert run.output().count(said) == 1 and "(No space left on device;" in run.output()
    assert "the newest one is of step 2; make room" in run.output()
    assert "Traceback" not in run.output()
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step_00000002"]


def test_nodes_of_different_sizes_cannot_hold_copies(monkeypatch, sample_data):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    done = command(
        *("train.py", *SMALL, "--data_dir", sample_data, "--global_batch_size=6"),
        *("--parallel=hsdp", "--dry_run"),
    )
    expect_error(done, "--parallel hsdp: 2 ranks on this node, but 3 in all", "--parallel fsdp")
