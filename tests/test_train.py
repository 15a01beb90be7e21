"""Runs of train.py from end to end: learning, resume, the run folder, evaluation of the result."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, command, expect_error, expect_ok, write_shards

import data
from cli import parse, read_comments
from corpus.manifest import read_manifest
from data import Batch, validation_windows
from recipe import TrainConfig, lr_at, r_at
from reweight import STRATEGIES
from runtime import checkpoint, telemetry
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


def run(sample_data, out, *flags, ranks=1):
    return command(
        "train.py", *SMALL, "--data_dir", sample_data, "--out_dir", out, *flags, ranks=ranks
    )


def records(out, kind):
    return [
        r
        for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if r["kind"] == kind
    ]


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def model_of(folder):
    return torch.load(folder / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(sample_data, tmp_path_factory):
    """Twelve steps of linupper with dropout, checkpoints every four."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    expect_ok(run(sample_data, out, *TWELVE))
    return out


TWELVE = (
    "--max_steps=12",
    "--checkpoint_interval=4",
    "--eval_interval=6",
    "--reweight=linupper",
    "--dropout=0.1",
)


def test_run_folder(unbroken):
    config = json.loads((unbroken / "config.json").read_text())
    assert config["reweight"] == "linupper" and config["versions"]["torch"] == torch.__version__
    assert set(config) >= {f for f in TrainConfig.__dataclass_fields__} | {
        "git_commit",
        "command",
    }
    rows, evals = records(unbroken, "train"), records(unbroken, "eval")
    assert [r["step"] for r in rows] == list(range(1, 13)) and [r["step"] for r in evals] == [
        0,
        6,
        12,
    ]
    assert all(r["ess"] == pytest.approx(1) for r in rows[:3]) and all(
        r["ess"] < 0.99 for r in rows[3:]
    )
    for r in rows:
        assert sum(r["weight_by_domain"].values()) == pytest.approx(1, abs=1e-5)
        assert (
            r["weighted_loss"] == pytest.approx(r["loss"])
            if r["step"] <= 3
            else r["weighted_loss"] > r["loss"]
        )
        assert r["tokens"] == r["step"] * 8 * 32
    assert tuple(evals[0]["domains"]) == data.DOMAINS
    assert evals[0]["domains"]["book"]["ppl"] == pytest.approx(
        math.exp(evals[0]["domains"]["book"]["loss"])
    )
    assert evals[-1]["mean_loss"] < evals[0]["mean_loss"] - 0.2
    assert checkpoint.steps(unbroken) == [8, 12]  # keep_checkpoints = 2
    assert not list(unbroken.rglob("*.tmp"))


def test_resume_equals_the_unbroken_run_bit_for_bit(unbroken, sample_data, tmp_path):
    out = tmp_path / "broken"
    shutil.copytree(unbroken, out)
    shutil.rmtree(
        out / "checkpoints" / "step_00000012"
    )  # stopped between step 8 and 12, with lines past 8 written
    assert "resumed from" in expect_ok(run(sample_data, out, *TWELVE))
    for kind in ("train", "eval"):
        assert without_times(records(out, kind)) == without_times(records(unbroken, kind))
    a, b = (model_of(folder / "checkpoints" / "step_00000012") for folder in (out, unbroken))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resume_of_fsdp_and_running_means(sample_data, tmp_path):
    """Two ranks with FSDP, weights against the domains' running means: broken off at 8, and gone
    on with at 12.
    """
    flags = (*TWELVE, "--parallel=fsdp", "--reweight_norm=domain", "--record_samples=3")
    expect_ok(run(sample_data, tmp_path / "a", *flags, ranks=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_00000012")
    expect_ok(run(sample_data, tmp_path / "b", *flags, ranks=2))
    assert without_times(records(tmp_path / "a", "train")) == without_times(
        records(tmp_path / "b", "train")
    )
    a, b = (model_of(tmp_path / x / "checkpoints" / "step_00000012") for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "a" / "samples.bin").read_bytes() == (
        tmp_path / "b" / "samples.bin"
    ).read_bytes()
    # its checkpoint is a whole one: a single process goes on with it, and its losses are those of
    # two ranks
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_00000012")
    expect_ok(
        run(sample_data, tmp_path / "b", *flags, "--micro_batch_size=4")
    )  # dropout noise belongs to the 4
    np.testing.assert_allclose(
        *([r["loss"] for r in records(tmp_path / x, "train")] for x in "ab"), atol=1e-5
    )


def poisoned(monkeypatch, bad):
    """Make the loss of the samples NaN for which bad(idx of one sample, step so far) says so."""
    import model

    forward, calls = model.GPT.forward, [0]

    def patched(self, idx, targets=None):
        out = forward(self, idx, targets)
        if self.training:
            calls[0] += 1
            out = (
                out
                + torch.tensor([math.nan if bad(row, calls[0]) else 0.0 for row in idx])[:, None]
            )
        return out

    monkeypatch.setattr(model.GPT, "forward", patched)


def test_a_step_with_a_nan_is_skipped_and_named(sample_data, tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda row, call: call == 5 and row[0] % 2 == 0)
    flags = ("--max_steps=8", "--reweight=linupper", "--log_interval=4", "--record_samples=1")
    expect_ok(run(sample_data, tmp_path / "run", *flags))
    (skip,), rows = records(tmp_path / "run", "skip"), records(tmp_path / "run", "train")
    assert skip["step"] == 5 and skip["reason"] == "loss" and 0 < len(skip["samples"]) < 8
    split = data.Split(sample_data, read_manifest(sample_data), "train", 32)
    for sample in skip["samples"]:
        assert split.window(split.domains.index(sample["domain"]), sample["window"])[0] % 2 == 0
    assert [r["step"] for r in rows] == [4, 8] and all(math.isfinite(r["loss"]) for r in rows)
    assert all(
        p.isfinite().all()
        for p in model_of(tmp_path / "run" / "checkpoints" / "step_00000008").values()
    )


@pytest.mark.parametrize("strategy", ["uniform", "extremes"])
def test_too_many_skipped_steps_stop_the_run_with_the_state_before(
    sample_data, tmp_path, monkeypatch, strategy
):
    monkeypatch.setattr(telemetry, "MAX_SKIPPED", 3)
    flags = ("--eval_interval=100", f"--reweight={strategy}")
    with monkeypatch.context() as patch:
        poisoned(patch, lambda row, call: call > 6)
        done = run(
            sample_data, tmp_path / "run", "--max_steps=30", "--checkpoint_interval=4", *flags
        )
        expect_error(done, "3 steps in a row, from step 7 on", "saved as step 6", "--learning_rate")
    assert checkpoint.steps(tmp_path / "run") == [4, 6]
    for name in ("run", "whole"):  # without the NaNs: resumed from step 6, and from the start
        expect_ok(
            run(sample_data, tmp_path / name, "--max_steps=30", "--checkpoint_interval=4", *flags)
        )
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 31))
    a, b = (model_of(tmp_path / x / "checkpoints" / "step_00000030") for x in ("run", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_histograms_and_kinds_are_logged(unbroken):
    rows, histograms = records(unbroken, "train"), records(unbroken, "histogram")
    assert [h["step"] for h in histograms] == [6, 12] and all(
        sum(h["loss"]["counts"]) == 48 for h in histograms
    )
    assert set().union(*(r["weight_by_kind"] for r in rows)) == {"ordinary", "redundant", "noise"}
    for r in rows:
        assert sum(r["weight_by_kind"].values()) == pytest.approx(1, abs=1e-5)
        assert sum(r["samples_by_kind"].values()) == pytest.approx(1)


def test_temperature_schedule():
    def r(step, **settings):
        return r_at(step, TrainConfig(reweight_warmup_steps=100, **settings))

    assert r(50) == r(5000) == 0.4 and r(0, r_start=10.0, r_steps=200) == 10
    linear = {"r_start": 10.0, "r_steps": 200, "r": 1.0}
    assert [r(s, **linear) for s in (100, 200, 300, 9999)] == pytest.approx([10, 5.5, 1, 1])
    cosine = {**linear, "r_schedule": "cosine"}
    assert [r(s, **cosine) for s in (100, 150, 200, 300, 9999)] == pytest.approx(
        [10, 8.682, 5.5, 1, 1], abs=1e-3
    )


def test_a_finished_run_says_so(unbroken, sample_data):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert "is finished" in expect_ok(run(sample_data, unbroken, *TWELVE))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_two_ranks_and_accumulation_train_alike(sample_data, tmp_path):
    losses = {}
    for name, flags, ranks in (("one", (), 1), ("two", ("--micro_batch_size=2",), 2)):
        expect_ok(
            run(
                sample_data,
                tmp_path / name,
                "--max_steps=6",
                "--reweight=quadratic",
                *flags,
                ranks=ranks,
            )
        )
        losses[name] = [r["loss"] for r in records(tmp_path / name, "train")]
        last = records(tmp_path / name, "eval")[-1]
        losses[name].append(last["mean_loss"])
    np.testing.assert_allclose(losses["one"], losses["two"], atol=1e-5)
    assert last["val_hash"] == records(tmp_path / "one", "eval")[-1]["val_hash"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns(sample_data, tmp_path, strategy):
    expect_ok(
        run(
            sample_data,
            tmp_path / "run",
            "--max_steps=30",
            f"--reweight={strategy}",
            "--eval_interval=30",
        )
    )
    evals = records(tmp_path / "run", "eval")
    assert evals[-1]["mean_loss"] < evals[0]["mean_loss"] - 1.0


def test_validation_windows_are_spread_and_fixed(sample_data):
    split = data.Split(sample_data, read_manifest(sample_data), "val", 32)
    few = validation_windows(split, 5)
    assert np.bincount(few[:, 0]).tolist() == [5] * 7 and len(np.unique(few, axis=0)) == 35
    assert len(validation_windows(split, None)) == split.n_windows.sum()


def test_dry_run_prints_the_plan_and_writes_nothing(sample_data, tmp_path):
    text = expect_ok(
        run(
            sample_data,
            tmp_path / "run",
            "--dry_run",
            "--micro_batch_size=4",
            "--reweight=linupper",
        )
    )
    for words in (
        "1 ranks (ddp) x 2 micro-steps x 4 sequences",
        "first pass",
        "838,400 parameters",
    ):
        assert words in text
    assert not (tmp_path / "run").exists()


def test_wandb_offline_needs_no_account(sample_data, tmp_path):
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=2", "--wandb=offline"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_learning_rate_schedule():
    config = TrainConfig()
    assert lr_at(0, config) == pytest.approx(1e-7) and lr_at(500, config) == pytest.approx(5e-4)
    assert lr_at(250, config) == pytest.approx(2.5e-4, rel=1e-3)
    assert lr_at(10_250, config) == pytest.approx(3e-4) and lr_at(20_000, config) == pytest.approx(
        1e-4
    )


def test_weight_decay_is_on_matrices_only():
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(1, 1, 8, 8, 16))
    decayed, free = make_optimizer(model, TrainConfig()).param_groups
    assert all(p.dim() == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.01
    assert all(p.dim() == 1 for p in free["params"]) and free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_gradients_survive_the_memory_of_cuda_graphs(monkeypatch):
    """A replayed graph writes where the last one wrote; here that memory becomes NaN when a
    forward pass begins.
    """
    from model import GPT, GPTConfig

    def after(compiled, steps, state=None):
        torch.manual_seed(0)
        raw, written = GPT(GPTConfig(1, 2, 8, 8, 64)), []
        monkeypatch.setattr(raw, "compile", lambda mode=None: None)
        for parameter in (
            raw.parameters()
        ):  # the storage alone: a reference to the tensor would make autograd copy it
            parameter.register_hook(lambda gradient: written.append(gradient.untyped_storage()))

        def forget(*args):
            while written:
                written.pop().fill_(255)

        raw.register_forward_pre_hook(forget)
        config = TrainConfig(
            global_batch_size=4,
            micro_batch_size=2,
            compile=compiled,
            reweight="linupper",
            reweight_warmup_steps=0,
            warmup_steps=0,
            dtype="float32",
            loss_chunk=0,
        )
        trainer = Trainer(raw, config, 1, torch.device("cpu"))
        if state:
            trainer.load_state(*state)
        for step in steps:
            x = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
            trainer.step(step, Batch(x[:, :-1], x[:, 1:], None, None))
        return trainer.state_dict(), trainer.optimizer.found_inf

    def same(a, b, atol):  # parameters and moments
        (a, _), (b, _) = a, b
        torch.testing.assert_close((a[0], a[1]["state"]), (b[0], b[1]["state"]), atol=atol, rtol=0)

    graphs, skipped = after("graphs", range(3))
    assert not skipped and after("on", range(3))[1]  # what it is there for
    resumed, _ = after("graphs", range(2, 3), after("graphs", range(2))[0])
    same(resumed, graphs, atol=0)
    monkeypatch.setattr(torch.UntypedStorage, "fill_", lambda *args: None)
    same(graphs, after("off", range(3))[0], atol=1e-6)


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_configs_differ_from_the_defaults_in_every_line(path, sample_data, tmp_path):
    expect_ok(
        command(
            "train.py",
            f"config/{path}",
            "--data_dir",
            sample_data,
            "--out_dir",
            tmp_path,
            "--dry_run",
            "--device=cpu",
        )
    )
    names = {
        k: v
        for k, v in __import__("runpy").run_path(f"{ROOT}/config/{path}").items()
        if not k.startswith("_")
    }
    default = TrainConfig()
    assert all(getattr(default, key) != value for key, value in names.items()), names
    if path.startswith("gpt2_"):
        size, strategy, *_ = [*path.removesuffix(".py").split("_")[1:], "uniform"]
        assert names.get("model", "124m") == size
        assert names.get("reweight", "uniform") == strategy


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
    "unknown normalisation": (["--reweight_norm=median"], ["--reweight_norm", "quantile"]),
    "seed too large": ([f"--seed={2**63}"], ["--seed", "below 2**63"]),
    "learning rates swapped": (["--min_lr=1"], ["--min_lr 1.0", "--learning_rate"]),
    "window too long": (["--block_size=100000000"], ["--block_size"]),
    "no such device": (["--device=mps"], ["mps", "--device auto"]),
    "CUDA graphs without CUDA": (["--compile=graphs"], ["--compile graphs", "use --compile on"]),
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

    fails("'uniform' asks for book, cc, github", "it has: arxiv, c4", mixture="uniform")
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
    a, b = write(tmp_path / "a.py", "r = 0.1\nseed = 5\n"), write(tmp_path / "b.py", "r = 0.2\n")
    config = parse(TrainConfig, "", [str(a), str(b), "--seed=7", "--reweight", "upper"])
    assert (config.r, config.seed, config.reweight) == (0.2, 7, "upper")


def test_checkpoint_of_another_run(unbroken, sample_data, tmp_path):
    expect_error(
        run(sample_data, unbroken, *TWELVE, "--model=124m"),
        "another run",
        "model tiny there, 124m here",
    )
    expect_error(
        run(sample_data, unbroken, *TWELVE, "--r=0.9"), "r 0.4 there, 0.9 here", "--out_dir"
    )
    expect_error(run(sample_data, unbroken, *TWELVE, "--resume=never"), "already holds a run")
    expect_error(run(sample_data, unbroken, *TWELVE, "--max_steps=6"), "past --max_steps 6")
    expect_error(command("eval/perplexity.py", "--run", tmp_path), "no checkpoint")
    expect_error(run(sample_data, "/dev/null", *TWELVE), "/dev/null")


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
    flags = ("--reweight=linupper", "--reweight_scope=micro")
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=2", "--micro_batch_size=4", *flags))
    expect_error(
        run(sample_data, tmp_path / "run", "--max_steps=4", "--micro_batch_size=2", *flags),
        "samples weighted together 4 there, 2 here",
    )
    done = run(
        sample_data, tmp_path / "run", "--max_steps=4", "--micro_batch_size=2", *flags, ranks=2
    )
    assert "--max_steps was 2" in expect_ok(done)


def test_damaged_checkpoints(unbroken, sample_data, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_00000012"
    shutil.copytree(
        folder, folder.with_name("step_00000012_backup")
    )  # a user's copy is no checkpoint of ours
    assert checkpoint.steps(tmp_path / "run") == [8, 12]
    content = (folder / "model.pt").read_bytes()
    for damaged in (content[:5000], b"", b"\x80garbage"):
        (folder / "model.pt").write_bytes(damaged)
        expect_error(
            command("eval/perplexity.py", "--run", tmp_path / "run"),
            "model.pt is damaged",
            "remove",
        )
    (folder / "model.pt").unlink()
    assert "model.pt is missing; going on from" in expect_ok(
        run(sample_data, tmp_path / "run", *TWELVE)
    )
    assert checkpoint.steps(tmp_path / "run") == [8, 12]
    for text in ("", "{", "[]", "{}"):
        (folder / "state.json").write_text(text)
        done = run(sample_data, tmp_path / "run", *TWELVE, "--dry_run")
        assert "state.json" in done.stdout and "going on from" in expect_ok(done)


def test_checkpoint_of_another_model(unbroken):
    from model import SIZES

    with pytest.raises(
        checkpoint.UserError, match="another model: .*vocab_size 320 there, 50257 here"
    ):
        checkpoint.read_tensors(checkpoint.find_latest(unbroken), SIZES["tiny"])


def test_checkpoints_run_no_code(unbroken, tmp_path):
    shutil.copytree(checkpoint.find_latest(unbroken), tmp_path / "c")

    class Evil:
        def __reduce__(self):
            return (write, (tmp_path / "owned", ""))

    torch.save({"wte.weight": Evil()}, tmp_path / "c" / "model.pt")
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    state["sha256"]["model.pt"] = hashlib.sha256(
        (tmp_path / "c" / "model.pt").read_bytes()
    ).hexdigest()
    (tmp_path / "c" / "state.json").write_text(json.dumps(state))
    with pytest.raises(checkpoint.UserError, match="more than tensors"):
        checkpoint.load_model(tmp_path / "c")
    assert not (tmp_path / "owned").exists()


def test_help_lists_every_key_with_a_text():
    help_texts, groups = read_comments(TrainConfig)
    assert help_texts.keys() == TrainConfig.__dataclass_fields__.keys()
    text = expect_ok(command("train.py", "--help", process=True))
    for name, help_text in help_texts.items():
        assert f"--{name} " in text
        assert help_text in " ".join(text.split())
    assert len(groups) == 5 and all(f"{title}:" in text for title, _ in groups.values())
    assert "sequences per optimizer step" in text and "(default: 0.4)" in text
