"""Runs of train.py from end to end: learning, resume, the run folder, evaluation of the result."""

import gc
import hashlib
import json
import math
import os
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, expect_error, expect_ok, write_shards
from torch.utils._pytree import tree_leaves

import data
from cli import parse, read_comments
from corpus.manifest import DOMAINS, read_manifest
from data import Batch, validation_windows
from families import SIZES, build
from llama import LlamaConfig
from model import GPT, GPTConfig
from recipe import TrainConfig, lr_at, r_at, settle
from reweight import STRATEGIES
from runtime import checkpoint, distributed, parts, telemetry
from runtime.metrics import for_wandb
from step import Trainer, make_optimizer

SMALL = (
    "config/tiny_cpu.py",
    "--block_size=32",
    "--global_batch_size=8",
    "--warmup_steps=2",
    "--eval_windows=4",
    "--reweight_warmup_steps=3",
    "--log_interval=1",
    "--device=cpu",
)


TWELVE = (
    "--max_steps=12",
    "--checkpoint_interval=4",
    "--eval_interval=6",
    "--reweight=linupper",
    "--dropout=0.1",
)


def run(sample_data, out, *flags, ranks=1, patch=""):
    args = ["train.py", *SMALL, "--data_dir", sample_data, "--out_dir", out, *flags]
    return command(*args, ranks=ranks, patch=patch)


def records(out, kind):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def model_of(folder):
    return parts.joined(checkpoint.load_parts(folder, "model"))


def assert_same_model(a, b, step):
    """The checkpoints of two runs at a step hold the same parameters, bit for bit."""
    a, b = (model_of(checkpoint.checkpoint_folder(out, step)) for out in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def unbroken(sample_data, tmp_path_factory):
    """Twelve steps of linupper with dropout, checkpoints every four."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    expect_ok(run(sample_data, out, *TWELVE))
    return out


def test_run_folder(unbroken):
    config = json.loads((unbroken / "config.json").read_text())
    assert config["reweight"] == "linupper" and config["versions"]["torch"] == torch.__version__
    assert set(config) >= {*TrainConfig.__dataclass_fields__, "git_commit", "command"}
    rows, evals = records(unbroken, "train"), records(unbroken, "eval")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in evals] == [0, 6, 12]
    for row in rows:
        assert sum(row["weight_by_domain"].values()) == pytest.approx(1, abs=1e-5)
        assert row["tokens"] == row["step"] * 8 * 32
        if row["step"] <= 3:
            assert row["ess"] == pytest.approx(1)
            assert row["weighted_loss"] == pytest.approx(row["loss"])
        else:
            assert row["ess"] < 0.99
            assert row["weighted_loss"] > row["loss"]
    first, last = evals[0], evals[-1]
    assert tuple(first["domains"]) == DOMAINS
    book = first["domains"]["book"]
    assert book["ppl"] == pytest.approx(math.exp(book["loss"]))
    assert last["mean_loss"] < first["mean_loss"] - 0.2
    assert checkpoint.steps(unbroken) == [8, 12]  # keep_checkpoints = 2
    assert not list(unbroken.rglob("*.tmp"))


def test_resume_equals_the_unbroken_run_bit_for_bit(unbroken, sample_data, tmp_path):
    """Stopped between step 8 and 12, with lines past 8 written."""
    out = tmp_path / "broken"
    shutil.copytree(unbroken, out)
    shutil.rmtree(checkpoint.checkpoint_folder(out, 12))
    assert "resumed from" in expect_ok(run(sample_data, out, *TWELVE))
    for kind in ("train", "eval"):
        assert without_times(records(out, kind)) == without_times(records(unbroken, kind))
    assert_same_model(out, unbroken, 12)


@pytest.mark.parametrize(
    "model, ranks, parallel", [("tiny", 2, "fsdp"), ("llama_tiny", 2, "zero2"), ("tiny", 4, "hsdp")]
)
def test_resume_of_fsdp_and_running_means(
    sample_data, tmp_path, monkeypatch, model, ranks, parallel
):
    """Against the domains' running means, on nodes of two ranks: stopped at 4 of 8 steps."""
    patch = 'one_layer(); os.environ["LOCAL_WORLD_SIZE"] = "2"'
    flags = (
        "--max_steps=8",
        "--checkpoint_interval=4",
        "--eval_interval=8",
        "--reweight=linupper",
        "--dropout=0.1",
        f"--parallel={parallel}",
        "--reweight_norm=domain",
        "--record_samples=3",
        f"--model={model}",
    )
    a, b = tmp_path / "a", tmp_path / "b"
    expect_ok(run(sample_data, a, *flags, ranks=ranks, patch=patch))
    shutil.copytree(a, b)
    shutil.rmtree(checkpoint.checkpoint_folder(b, 8))
    expect_ok(run(sample_data, b, *flags, ranks=ranks, patch=patch))
    assert without_times(records(a, "train")) == without_times(records(b, "train"))
    assert_same_model(a, b, 8)
    assert (a / "samples.bin").read_bytes() == (b / "samples.bin").read_bytes()

    # A single process continues with the losses of several ranks. Dropout noise belongs to the
    # micro-batch.
    shutil.rmtree(checkpoint.checkpoint_folder(b, 8))
    monkeypatch.setitem(SIZES, model, replace(SIZES[model], n_layer=1))
    expect_ok(run(sample_data, b, *flags, f"--micro_batch_size={8 // ranks}"))
    losses_a, losses_b = ([row["loss"] for row in records(out, "train")] for out in (a, b))
    np.testing.assert_allclose(losses_a, losses_b, atol=1e-5)


def poisoned(monkeypatch, bad):
    """Make a sample's loss NaN where bad(its tokens, number of the forward pass) is true."""
    import model

    forward = model.GPT.forward
    calls = 0

    def patched(self, idx, targets=None):
        nonlocal calls
        out = forward(self, idx, targets)
        if self.training:
            calls += 1
            addends = [math.nan if bad(row, calls) else 0.0 for row in idx]
            out = out + torch.tensor(addends)[:, None]
        return out

    monkeypatch.setattr(model.GPT, "forward", patched)


def test_a_step_with_a_nan_is_skipped_and_named(sample_data, tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda row, call: call == 5 and row[0] % 2 == 0)
    out = tmp_path / "run"
    flags = ("--max_steps=8", "--reweight=linupper", "--log_interval=4", "--record_samples=1")
    expect_ok(run(sample_data, out, *flags))
    (skip,), rows = records(out, "skip"), records(out, "train")
    assert skip["step"] == 5 and skip["reason"] == "loss" and 0 < len(skip["samples"]) < 8
    split = data.Split(sample_data, read_manifest(sample_data), "train", 32)
    for sample in skip["samples"]:
        window = split.window(split.domains.index(sample["domain"]), sample["window"])
        assert window[0] % 2 == 0
    assert [row["step"] for row in rows] == [4, 8]
    assert all(math.isfinite(row["loss"]) for row in rows)
    parameters = model_of(checkpoint.checkpoint_folder(out, 8)).values()
    assert all(parameter.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("strategy", ["uniform", "extremes"])
def test_too_many_skipped_steps_stop_the_run_with_the_state_before(
    sample_data, tmp_path, monkeypatch, strategy
):
    monkeypatch.setattr(telemetry, "MAX_SKIPPED", 3)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    flags = ("--max_steps=12", "--checkpoint_interval=4", "--eval_interval=100")
    flags += (f"--reweight={strategy}",)
    with monkeypatch.context() as patch:
        poisoned(patch, lambda row, call: call > 6)
        done = run(sample_data, stopped, *flags)
        expect_error(done, "3 steps in a row, from step 7 on", "saved as step 6", "--learning_rate")
    assert checkpoint.steps(stopped) == [4, 6]
    for out in (stopped, whole):  # without the NaNs: resumed from step 6, and from the start
        expect_ok(run(sample_data, out, *flags))
    assert [row["step"] for row in records(stopped, "train")] == list(range(1, 13))
    assert_same_model(stopped, whole, 12)


class LateCopy:
    """Stands in for the event of a GPU's copy: the numbers are there once it is waited for."""

    reads = []  # how many steps were computed at each

    def __init__(self, copies, tensors):
        self.copies, self.tensors = copies, [tensor.clone() for tensor in tensors]

    def synchronize(self):
        for copy, tensor in zip(self.copies, self.tensors, strict=True):
            copy.copy_(tensor)
        self.reads.append(Trainer.computed)


@pytest.fixture
def late_copies(monkeypatch):
    def to_host(tensors):
        copies = [torch.full_like(tensor, math.nan) for tensor in tensors]
        return copies, LateCopy(copies, tensors)

    take = Trainer.step

    def counted(self, number, batch):
        Trainer.computed = number + 1
        return take(self, number, batch)

    monkeypatch.setattr(distributed, "to_host", to_host)
    monkeypatch.setattr(Trainer, "computed", 0, raising=False)
    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(LateCopy, "reads", [])


def test_a_gpu_is_read_while_it_computes_the_next_step(
    late_copies, sample_data, tmp_path, unbroken
):
    """Except before a checkpoint. The lines are those of a run without delay."""
    out = tmp_path / "run"
    expect_ok(run(sample_data, out, *TWELVE))
    assert without_times(records(out, "train")) == without_times(records(unbroken, "train"))
    assert LateCopy.reads == [2, 3, 4, 4, 6, 7, 8, 8, 10, 11, 12, 12]


def test_a_step_taken_before_skipped_ones_were_read_lets_the_run_go_on(
    late_copies, sample_data, tmp_path, monkeypatch
):
    """The state is then no longer the one before them, under whose name it would be saved."""
    monkeypatch.setattr(telemetry, "MAX_SKIPPED", 3)
    poisoned(monkeypatch, lambda row, call: 5 <= call < 8)
    out = tmp_path / "run"
    expect_ok(run(sample_data, out, "--max_steps=10", "--log_interval=1"))
    assert [row["step"] for row in records(out, "skip")] == [5, 6, 7]
    assert checkpoint.steps(out)[-1] == 10


def test_histograms_and_kinds_are_logged(unbroken):
    rows, histograms = records(unbroken, "train"), records(unbroken, "histogram")
    assert [row["step"] for row in histograms] == [6, 12]
    assert all(sum(row["loss"]["counts"]) == 48 for row in histograms)
    kinds = set().union(*(row["weight_by_kind"] for row in rows))
    assert kinds == {"ordinary", "redundant", "noise"}
    for row in rows:
        assert sum(row["weight_by_kind"].values()) == pytest.approx(1, abs=1e-5)
        assert sum(row["samples_by_kind"].values()) == pytest.approx(1)


def test_a_rank_takes_its_gpu_before_it_asks_for_anything(monkeypatch):
    """The first question opens a context, which must not be on the first GPU for all ranks."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.append(index))
    answer = lambda including_emulation: asked.append("bf16") or True  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert settle(TrainConfig(global_batch_size=8), world_size=2).dtype == "bfloat16"
    assert asked == [1, "bf16"]
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"


def test_temperature_schedule():
    def r(step, **settings):
        return r_at(step, TrainConfig(reweight_warmup_steps=100, **settings))

    assert r(50) == r(5000) == 0.4 and r(0, r_start=10.0, r_steps=200) == 10
    linear = {"r_start": 10.0, "r_steps": 200, "r": 1.0}
    assert [r(s, **linear) for s in (100, 200, 300, 9999)] == pytest.approx([10, 5.5, 1, 1])
    cosine = {**linear, "r_schedule": "cosine"}
    values = [r(s, **cosine) for s in (100, 150, 200, 300, 9999)]
    assert values == pytest.approx([10, 8.682, 5.5, 1, 1], abs=1e-3)


def test_a_finished_run_says_so(unbroken, sample_data):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert "is finished" in expect_ok(run(sample_data, unbroken, *TWELVE))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_two_ranks_and_accumulation_train_alike(sample_data, tmp_path):
    losses, evals = {}, {}
    for name, flags, ranks in (("one", (), 1), ("two", ("--micro_batch_size=2",), 2)):
        out = tmp_path / name
        flags = ("--max_steps=6", "--reweight=quadratic", *flags)
        expect_ok(run(sample_data, out, *flags, ranks=ranks))
        losses[name] = [row["loss"] for row in records(out, "train")]
        evals[name] = records(out, "eval")[-1]
    np.testing.assert_allclose(losses["one"], losses["two"], atol=1e-5)
    assert evals["one"]["mean_loss"] == pytest.approx(evals["two"]["mean_loss"], abs=1e-5)
    assert evals["one"]["val_hash"] == evals["two"]["val_hash"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns(sample_data, tmp_path, strategy):
    flags = ("--max_steps=15", "--eval_interval=15", f"--reweight={strategy}")
    expect_ok(run(sample_data, tmp_path / "run", *flags))
    first, last = records(tmp_path / "run", "eval")
    assert last["mean_loss"] < first["mean_loss"] - 1.0


def test_validation_windows_are_spread_and_fixed(sample_data):
    split = data.Split(sample_data, read_manifest(sample_data), "val", 32)
    few = validation_windows(split, 5)
    assert np.bincount(few[:, 0]).tolist() == [5] * 7 and len(np.unique(few, axis=0)) == 35
    assert len(validation_windows(split, None)) == split.n_windows.sum()


def test_dry_run_prints_the_plan_and_writes_nothing(sample_data, tmp_path):
    flags = ("--dry_run", "--micro_batch_size=4", "--reweight=linupper")
    text = expect_ok(run(sample_data, tmp_path / "run", *flags))
    assert "1 ranks (ddp) x 2 micro-steps x 4 sequences" in text
    assert "first pass" in text and "838,400 parameters" in text
    assert not (tmp_path / "run").exists()


def test_wandb_offline_needs_no_account(sample_data, tmp_path):
    flags = ("--wandb=offline", "--checkpoint_interval=2")
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=2", *flags))
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=4", *flags))
    names = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    # Under one id, syncing the second would replace the first.
    assert sorted(name.rsplit("-", 1)[1] for name in names) == ["0", "2"]


def test_a_log_file_has_lines_and_no_bar(sample_data, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.metrics.LINE_S", 0.0)
    flags = ("--max_steps=4", "--log_interval=2", "--eval_interval=4")
    done = run(sample_data, tmp_path / "run", *flags)
    lines = expect_ok(done).splitlines()
    shown = [line for line in lines if line.startswith("step")]
    assert shown[0].startswith("step      0: validation")
    assert re.match(r"step      2 of 4: loss \d\.\d{3}, [\d,]+ tokens/s$", shown[1])
    assert "\r" not in done.stdout + done.stderr and "it/s" not in done.stderr


def test_wandb_has_sections_and_nothing_constant(unbroken):
    import wandb

    values = {}
    for kind in ("train", "eval", "histogram"):
        values |= for_wandb(records(unbroken, kind)[0])
    assert {name.split("/")[0] for name in values} == {"train", "eval", "weights"}
    assert {"train/loss", "train/lr", "weights/ess", "weights/weight_by_domain/c4"} <= set(values)
    assert {"eval/mean_loss", "eval/ppl/book"} <= set(values)
    assert isinstance(values["weights/loss_histogram"], wandb.Histogram)
    numbers = [value for value in values.values() if not isinstance(value, wandb.Histogram)]
    assert all(isinstance(value, int | float) for value in numbers)
    assert not any("hash" in name or name.endswith("/tokens/c4") for name in values)


def test_learning_rate_schedule():
    steps = [0, 250, 500, 10_250, 20_000]
    rates = [lr_at(step, TrainConfig()) for step in steps]
    assert rates == pytest.approx([1e-7, 2.5e-4, 5e-4, 3e-4, 1e-4], rel=1e-3)


def test_a_quadratic_warm_up_is_steep_at_first():
    def rates(shape):
        config = TrainConfig(warmup_shape=shape)
        return [lr_at(step, config) / config.learning_rate for step in (0, 125, 250, 500, 10_250)]

    quadratic, linear = rates("quadratic"), rates("linear")
    assert quadratic[1:3] == pytest.approx([1 - 0.75**2, 1 - 0.5**2], rel=1e-3)
    assert quadratic[::3] == linear[::3] and quadratic[4] == linear[4]


@pytest.mark.parametrize("shape", [GPTConfig(1, 1, 8, 8, 16), LlamaConfig(1, 1, 8, 1, 16)])
def test_weight_decay_is_on_matrices_only(shape):
    model = build(shape)
    decayed, free = make_optimizer(model, TrainConfig()).param_groups
    assert all(p.dim() == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.01
    assert all(p.dim() == 1 for p in free["params"]) and free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_survive_the_memory_of_cuda_graphs(monkeypatch, optimizer):
    """A replayed CUDA graph writes its gradients where it wrote the last ones.

    In this test that memory becomes NaN when a forward pass begins.
    """
    config = TrainConfig(
        optimizer=optimizer,
        global_batch_size=4,
        micro_batch_size=2,
        reweight="linupper",
        reweight_warmup_steps=0,
        warmup_steps=0,
        dtype="float32",
        loss_chunk=0,
    )

    def train(compiled, steps, state=None):
        """Parameters and moments after the steps, the whole state, and whether a step failed."""
        raw = model_that_forgets(monkeypatch)
        trainer = Trainer(raw, replace(config, compile=compiled), 1, torch.device("cpu"))
        if state:
            tensors, numbers = state
            trainer.load_state([tensors], numbers)
        for step in steps:
            x = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
            trainer.step(step, Batch(x[:, :-1], x[:, 1:], None, None))
        state = trainer.state_dict()
        (parameters, optimizer), _ = state
        return (parameters, optimizer["state"]), state, trainer.optimizer.found_inf

    unbroken, _, failed = train("graphs", range(3))
    assert not failed
    assert train("on", range(3))[2]  # without memory of their own they are lost
    _, half, _ = train("graphs", range(2))
    resumed, _, _ = train("graphs", range(2, 3), half)
    torch.testing.assert_close(resumed, unbroken, atol=0, rtol=0)
    monkeypatch.setattr(torch.UntypedStorage, "fill_", lambda *args: None)
    plain, _, _ = train("off", range(3))
    torch.testing.assert_close(unbroken, plain, atol=1e-6, rtol=0)


def model_that_forgets(monkeypatch):
    """A small model, not compiled; each forward pass turns the last gradients' memory into NaN."""
    torch.manual_seed(0)
    raw = GPT(GPTConfig(1, 2, 8, 8, 64))
    monkeypatch.setattr(raw, "compile", lambda **how: None)
    written = []
    # The storage alone: with a reference to the tensor, autograd would copy it.
    for parameter in raw.parameters():
        parameter.register_hook(lambda gradient: written.append(gradient.untyped_storage()))

    def forget(*args):
        while written:
            written.pop().fill_(255)

    raw.register_forward_pre_hook(forget)
    return raw


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_configs_differ_from_the_defaults_in_every_line(path, sample_data, tmp_path):
    args = ["train.py", f"config/{path}", "--data_dir", sample_data, "--out_dir", tmp_path]
    expect_ok(command(*args, "--dry_run", "--device=cpu"))
    names = runpy.run_path(f"{ROOT}/config/{path}")
    values = {name: value for name, value in names.items() if not name.startswith("_")}
    default = TrainConfig()
    if path != "published.py":  # that one stays as it is when a default changes
        assert all(getattr(default, key) != value for key, value in values.items()), values
    if path.startswith("llama_"):
        size = path.removesuffix("_linupper.py")
        assert (values["model"], values["reweight"]) == (size, "linupper")
    if path.startswith("gpt2_"):
        size, strategy, *_ = [*path.removesuffix(".py").split("_")[1:], "uniform"]
        assert values.get("model", "124m") == size
        assert values.get("reweight", "uniform") == strategy


PUBLISHED = {  # what the public code sets; and how a dry run says so
    "block_size": (512, "x 512 tokens"),
    "dropout": (0.1, "dropout 0.1"),
    "data_order": ("file", "; windows file"),
    "seed": (42, "seed 42"),
    "r": (0.4, "r 0.4,"),
    "r_start": (0.0, "r 0.4,"),
    "delta": (1.0, "delta 1.0"),
    "reweight_norm": ("minmax", "minmax"),
    "reweight_scope": ("global", "over each global batch"),
    "max_weight": (0.0, "no cap"),
    "reweight_warmup_steps": (1000, "after 1,000 uniform steps"),
    "max_steps": (20_000, "20,000 steps"),
    "optimizer": ("adamw", "optimizer  AdamW, learning rate"),
    "learning_rate": (0.0005, "learning rate 0.0005 to 0.0001"),
    "min_lr": (0.0001, "learning rate 0.0005 to 0.0001"),
    "warmup_steps": (500, "after 500 steps of warm-up"),
    "weight_decay": (0.01, "weight decay 0.01"),
    "beta1": (0.9, "betas 0.9 and 0.999"),
    "beta2": (0.999, "betas 0.9 and 0.999"),
    "grad_clip": (1.0, "clip 1.0"),
    "skip_grad_norm": (0.0, "dropout 0.1\n"),
    "dtype": ("float32", "cpu, float32"),
}
# Two defaults differ, for a GPU's speed and for mixed batches; docs/reproduction.md names them.
OTHER_DEFAULTS = {"data_order": "shuffled", "dtype": "auto"}
# Layers, heads, width, sequences per step.
PUBLISHED_SIZES = {"124m": (12, 12, 768, 32), "210m": (24, 16, 768, 48), "684m": (36, 24, 1200, 48)}


@pytest.mark.parametrize("size", ["124m", "210m", "355m", "684m", "774m", "1.5b"])
def test_the_published_recipe_stacks_on_every_size(size, sample_data, tmp_path):
    values = runpy.run_path(f"{ROOT}/config/published.py")
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    assert values == {name: value for name, (value, _) in PUBLISHED.items()}
    args = ["train.py", f"config/gpt2_{size}.py", "config/published.py", "--dry_run"]
    args += ["--device=cpu", "--reweight=linupper", "--data_dir", sample_data]
    text = expect_ok(command(*args, "--out_dir", tmp_path))
    for name, (_, words) in PUBLISHED.items():
        assert words in text, name
    assert f"model      {size}:" in text and "reweight   linupper" in text
    if size in PUBLISHED_SIZES:
        *shape, batch = PUBLISHED_SIZES[size]
        own = SIZES[size]
        assert [own.n_layer, own.n_head, own.n_embd] == shape
        assert f"batch      {batch} sequences" in text


def test_layers_heads_and_width_have_keys_of_their_own(sample_data, tmp_path):
    text = expect_ok(run(sample_data, tmp_path / "a", "--dry_run", "--n_layer=2"))
    assert "441,856 parameters" in text  # of tiny's 838,400, without two layers of 198,272
    shape = ("--n_layer=1", "--n_head=3", "--n_embd=96")
    expect_ok(run(sample_data, tmp_path / "b", "--max_steps=2", *shape))
    weights = model_of(next((tmp_path / "b" / "checkpoints").iterdir()))
    assert weights["wte.weight"].shape == (320, 96) and "h.1.ln_1.weight" not in weights
    expect_error(run(sample_data, tmp_path / "b", "--max_steps=2"), "n_layer 1 there, 0 here")
    done = run(sample_data, tmp_path / "c", "--n_embd=100", "--n_head=3")
    expect_error(done, "--n_embd 100", "not a multiple of --n_head 3", "use 99")
    done = run(sample_data, tmp_path / "c", "--n_embd=100", "--init_from=gpt2")
    expect_error(done, "--n_embd 100", "--init_from has a shape of its own")


def test_the_defaults_are_the_published_recipe():
    config = TrainConfig()
    for name, (value, _) in PUBLISHED.items():
        assert getattr(config, name) == OTHER_DEFAULTS.get(name, value), name
    assert config.global_batch_size == 32 and config.mixture == "uniform"


def test_the_published_mixtures():
    """DoGE's and DoReMi's weights, in the published order of domains."""
    order = ("arxiv", "book", "cc", "c4", "github", "stackexchange", "wikipedia")
    doge = (0.088, 0.045, 0.269, 0.214, 0.070, 0.166, 0.148)
    doremi = (0.04235, 0.08201, 0.381, 0.1141, 0.0654, 0.0847, 0.2305)
    assert data.MIXTURES["doge"] == dict(zip(order, doge, strict=True))
    assert data.MIXTURES["doremi"] == dict(zip(order, doremi, strict=True))
    assert data.MIXTURES["uniform"] is None
    assert data.MIXTURES["c4cc"] == {"cc": 0.5, "c4": 0.5}


def write(path, text):
    path.write_text(text)
    return path


WRONG = {  # case -> flags, words of the error
    "unknown key": (["--learning_rat=1"], ["--learning_rat", "did you mean '--learning_rate'"]),
    "wrong type": (["--max_steps=abc"], ["--max_steps", "'abc'"]),
    "unknown strategy": (["--reweight=linuper"], ["--reweight", "linuper", "linupper"]),
    "unknown size": (["--model=125m"], ["--model", "124m"]),
    "missing value": (["--seed"], ["--seed"]),
    "not a boolean": (["--dry_run=maybe"], ["--dry_run", "true or false"]),
    "negative": (["--max_steps=-1"], ["--max_steps -1", "above 0"]),
    "dropout": (["--dropout=1"], ["--dropout 1", "below 1"]),
    "missing data": (["--data_dir=nowhere"], ["nowhere", "prepare_slimpajama.py"]),
    "batch that does not divide": (
        ["--global_batch_size=8", "--micro_batch_size=3"],
        ["8", "--micro_batch_size 8"],
    ),
    "cap below the mean": (["--max_weight=0.5"], ["--max_weight 0.5", "at least 1"]),
    "schedule without steps": (["--r_start=2"], ["--r_start 2.0 --r_steps 0", "give both"]),
    "r too small": (["--r=1e-45"], ["--r 1e-45 --delta 1.0", "float32", "larger --r"]),
    "r of zero in float32": (["--r=1e-60"], ["--r 1e-60 --delta 1.0", "float32"]),
    "r too small for delta": (
        ["--r=1e-30", "--delta=1e9"],
        ["--r 1e-30 --delta 1000000000.0", "smaller --delta"],
    ),
    "r_start too small": (
        ["--r_start=1e-45", "--r_steps=5"],
        ["--r_start 1e-45 --delta 1.0", "float32", "larger --r_start"],
    ),
    "delta too small": (["--delta=1e-45"], ["--delta 1e-45", "float32", "larger --delta"]),
    "delta too large": (["--delta=1e30", "--r=1e-30"], ["--delta 1e+30", "below 2**31"]),
    "unknown normalisation": (["--reweight_norm=median"], ["--reweight_norm", "quantile"]),
    "seed too large": ([f"--seed={2**63}"], ["--seed", "below 2**63"]),
    "learning rates swapped": (["--min_lr=1"], ["--min_lr 1.0", "--learning_rate"]),
    "window too long": (["--block_size=100000000"], ["--block_size"]),
    "no such device": (["--device=mps"], ["mps", "--device auto"]),
    "CUDA graphs without CUDA": (["--compile=graphs"], ["--compile graphs", "use --compile on"]),
    "Muon with FSDP": (
        ["--optimizer=muon", "--parallel=fsdp"],
        ["--optimizer muon --parallel fsdp", "whole matrices", "use --parallel ddp"],
    ),
    "no such config": (["config/absent.py"], ["config/absent.py", "not found"]),
    "stray argument": (["linupper"], ["'linupper'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags(case, sample_data, tmp_path):
    flags, words = WRONG[case]
    expect_error(run(sample_data, tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run").exists()


def test_wrong_config_files(sample_data, tmp_path):
    for text, words in (
        ("reweight = 'linupper'\nr = = 1\n", ["line 2"]),
        ("learning_rat = 1\n", ["--learning_rat"]),
        ("r = 'high'\n", ["--r", "high"]),
        ("r = 1 / 0\n", ["ZeroDivisionError"]),
        ("out_dir = None\n", ["out_dir = None", "must be a string"]),
        ("data_dir = ['a']\n", ["data_dir = ['a']"]),
        ("exit()\n", ["SystemExit"]),
    ):
        config = write(tmp_path / "mine.py", text)
        expect_error(run(sample_data, tmp_path / "run", config), str(config), *words)


def test_wrong_data(tmp_path):
    tokens = np.arange(200) % 250
    write_shards(tmp_path / "d", {d: {"train": tokens, "val": tokens} for d in ("arxiv", "c4")})

    def fails(*words, mixture="natural"):
        expect_error(run(tmp_path / "d", tmp_path / "run", f"--mixture={mixture}"), *words)

    fails("'doge' asks for", "book, cc, github", "it has: arxiv, c4", mixture="doge")
    fails("--mixture c4=x: expected uniform, natural", "cc=0.5,c4=0.5", mixture="c4=x")
    shard = tmp_path / "d" / "c4" / "val_00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + b"\xff" * 40 + whole[240:])  # as long as it was
    fails("c4/val_00000.npy was changed", "below 257")
    shard.write_bytes(b"\0" * 40 + whole[40:])
    fails("c4/val_00000.npy cannot be read")
    shutil.rmtree(tmp_path / "run")
    shard.write_bytes(whole[:-1])
    fails("c4/val_00000.npy has 527 bytes, the manifest says 528")
    shard.unlink()
    fails("c4/val_00000.npy is missing")
    (tmp_path / "d" / "manifest.json").write_text("{")
    fails("manifest.json is damaged")
    (tmp_path / "d" / "manifest.json").unlink()
    fails("manifest.json is missing", "did not finish")


def test_later_config_files_and_flags_win(sample_data, tmp_path):
    a = write(tmp_path / "a.py", "r = 0.1\nseed = 5\n")
    b = write(tmp_path / "b.py", "r = 0.2\n")
    config = parse(TrainConfig, "", [str(a), str(b), "--seed=7", "--reweight", "upper"])
    assert (config.r, config.seed, config.reweight) == (0.2, 7, "upper")


def test_checkpoint_of_another_run(unbroken, sample_data, tmp_path):
    def fails(flag, *words):
        expect_error(run(sample_data, unbroken, *TWELVE, flag), *words)

    fails("--model=124m", "another run", "model tiny there, 124m here")
    fails("--r=0.9", "r 0.4 there, 0.9 here", "--out_dir")
    fails("--resume=never", "already holds a run")
    fails("--max_steps=6", "past --max_steps 6")
    fails("--out_dir=/dev/null", "/dev/null")
    expect_error(command("eval/perplexity.py", "--run", tmp_path), "no checkpoint")


def test_a_run_stopped_before_its_first_checkpoint(sample_data, tmp_path):
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=2"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = (sample_data, tmp_path / "run", "--max_steps=2")
    expect_error(run(*again, "--seed=7"), "another run", "seed 42 there, 7 here")
    expect_error(run(*again, "--resume=never"), "already holds a run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=2"))


def test_micro_scope_keeps_who_is_weighted_with_whom(sample_data, tmp_path):
    out = tmp_path / "run"
    flags = ("--reweight=linupper", "--reweight_scope=micro")
    expect_ok(run(sample_data, out, *flags, "--max_steps=2", "--micro_batch_size=4"))
    flags += ("--max_steps=4", "--micro_batch_size=2")
    words = "samples weighted together 4 there, 2 here"
    expect_error(run(sample_data, out, *flags), words)
    assert "--max_steps was 2" in expect_ok(run(sample_data, out, *flags, ranks=2))


def test_damaged_checkpoints(unbroken, sample_data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    folder = checkpoint.checkpoint_folder(out, 12)
    # A user's copy is no checkpoint of ours.
    shutil.copytree(folder, folder.with_name("step_00000012_backup"))
    assert checkpoint.steps(out) == [8, 12]
    content = (folder / "model.pt").read_bytes()
    for damaged in (content[:5000], b"", b"\x80garbage"):
        (folder / "model.pt").write_bytes(damaged)
        done = command("eval/perplexity.py", "--run", out)
        expect_error(done, "model.pt is damaged", "remove")
    (folder / "model.pt").unlink()
    text = expect_ok(run(sample_data, out, *TWELVE))
    assert "model.pt is missing; going on from" in text
    assert checkpoint.steps(out) == [8, 12]
    for text in ("", "{", "[]", "{}"):
        (folder / "state.json").write_text(text)
        said = expect_ok(run(sample_data, out, *TWELVE, "--dry_run"))
        assert "state.json" in said and "going on from" in said


def test_checkpoint_of_another_model(unbroken):
    words = "another model: .*vocab_size 320 there, 50257 here"
    with pytest.raises(checkpoint.UserError, match=words):
        checkpoint.read_parts(checkpoint.find_latest(unbroken), SIZES["tiny"])


def test_checkpoints_run_no_code(unbroken, tmp_path):
    shutil.copytree(checkpoint.find_latest(unbroken), tmp_path / "c")

    class Evil:
        def __reduce__(self):
            return (write, (tmp_path / "owned", ""))

    torch.save({"wte.weight": Evil()}, tmp_path / "c" / "model.pt")
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    content = (tmp_path / "c" / "model.pt").read_bytes()
    state["sha256"]["model.pt"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "c" / "state.json").write_text(json.dumps(state))
    with pytest.raises(checkpoint.UserError, match="more than tensors"):
        checkpoint.load_model(tmp_path / "c")
    assert not (tmp_path / "owned").exists()


def test_help_lists_every_key_with_a_text():
    help_texts, groups = read_comments(TrainConfig)
    assert help_texts.keys() == TrainConfig.__dataclass_fields__.keys()
    text = expect_ok(command("train.py", "--help"))
    for name, help_text in help_texts.items():
        assert f"--{name} " in text
        assert help_text in " ".join(text.split())
    assert len(groups) == 5 and all(f"{title}:" in text for title, _ in groups.values())
    assert "sequences per optimizer step" in text and "(default: 0.4)" in text


def test_a_checkpoint_has_the_counts_of_its_own_step(sample_data, tmp_path, monkeypatch):
    """Batches are read ahead, so the sampler has counted on. Resuming draws no earlier step."""
    out = tmp_path / "run"
    flags = ("--max_steps=12", "--checkpoint_interval=4", "--keep_checkpoints=9")
    expect_ok(run(sample_data, out, *flags, "--eval_interval=100"))
    for step in (4, 8, 12):
        state = checkpoint.read_json(checkpoint.checkpoint_folder(out, step) / "state.json")
        assert state["sampler"]["step"] == step
        assert sum(state["sampler"]["drawn"]) == step * 8
    counted = []
    real = data.DomainSampler.domains_of

    def noting(self, step):
        counted.append(step)
        return real(self, step)

    monkeypatch.setattr(data.DomainSampler, "domains_of", noting)
    broken = tmp_path / "broken"
    for keeps_counts in (True, False):  # without them it is a checkpoint of an older version
        shutil.copytree(out, broken)
        shutil.rmtree(checkpoint.checkpoint_folder(broken, 12))
        path = checkpoint.checkpoint_folder(broken, 8) / "state.json"
        state = checkpoint.read_json(path)
        if not keeps_counts:
            del state["sampler"]
            path.write_text(json.dumps(state))
        counted.clear()
        expect_ok(run(sample_data, broken, *flags, "--eval_interval=100"))
        assert min(counted) == (8 if keeps_counts else 0)
        assert_same_model(out, broken, 12)
        ends = [checkpoint.find_latest(folder) / "state.json" for folder in (out, broken)]
        assert len({json.dumps(checkpoint.read_json(path)["sampler"]) for path in ends}) == 1
        shutil.rmtree(broken)


def test_the_log_is_on_the_disk_before_a_checkpoint_that_follows_it(
    sample_data, tmp_path, monkeypatch
):
    """The order of fsync and rename, and the size that the log had at the fsync."""
    out = tmp_path / "run"
    logs = ("metrics.jsonl", "samples.bin")
    synced, seen_by = {name: [] for name in logs}, {}
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.parent == out and path.name in synced:
            synced[path.name].append(path.read_bytes())
        real_sync(handle)

    def replace(source, target):
        if re.fullmatch(r"step_\d+", Path(target).name):
            seen_by[int(Path(target).name[5:])] = [synced[name][-1:] for name in logs]
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    flags = ("--max_steps=12", "--checkpoint_interval=4", "--record_samples=1")
    expect_ok(run(sample_data, out, *flags))
    assert list(seen_by) == [4, 8, 12]
    for step, (metrics, samples) in seen_by.items():
        rows = [json.loads(line) for line in b"".join(metrics).splitlines()]
        logged = [row["step"] for row in rows if row["kind"] == "train"]
        assert logged[:step] == list(range(1, step + 1))
        rows = np.frombuffer(b"".join(samples), telemetry.SAMPLE)
        assert sorted(set(rows["step"].tolist()))[:step] == list(range(1, step + 1))
    # Not at every line: that would hold up the steps.
    assert all(len(synced[name]) == 3 for name in logs)


def test_the_tensors_of_a_checkpoint_are_shared_until_they_are_loaded(unbroken):
    """The ranks of a node map the same pages; what was loaded no longer needs the files."""
    folder = checkpoint.find_latest(unbroken)
    shape = checkpoint.read_shape(folder)
    config = TrainConfig(device="cpu", micro_batch_size=8, loss_chunk=0, compile="off")
    trainer = Trainer(GPT(shape), config, len(DOMAINS), torch.device("cpu"))

    def mapped() -> list[bool]:
        maps = Path("/proc/self/maps").read_text()
        return [str(folder / name) in maps for name in ("model.pt", "optimizer.pt")]

    (tensors,) = checkpoint.read_parts(folder, shape)
    assert mapped() == [True, True]
    trainer.load_state([tensors], checkpoint.read_json(folder / "state.json"))
    loaded, _ = trainer.state_dict()
    for ours, theirs in zip(tree_leaves(loaded), tree_leaves(tensors), strict=True):
        same = torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
        assert same
    del tensors, theirs
    gc.collect()
    assert mapped() == [False, False]
