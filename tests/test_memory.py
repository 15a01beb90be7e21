"""The predicted peak of a step against what torch's allocator gave out; what the plan says and chooses."""

import json
from dataclasses import replace

import pytest
from conftest import command, expect_error, expect_ok

import memory
import train
from model import SIZES, GPTConfig
from scripts.bench_memory import CASES, measure

DEEP = GPTConfig(n_layer=6, n_head=4, n_embd=64, block_size=64, vocab_size=320)
LARGE_HEAD = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=64, vocab_size=8000)
# case -> shape, A, settings
SHAPES = {
    "activations": (DEEP, 1, {}),
    "activations with dropout": (replace(DEEP, dropout=0.1), 1, {}),
    "selective": (DEEP, 1, {"recompute": "selective"}),
    "full": (DEEP, 1, {"recompute": "full"}),
    "full with dropout": (replace(DEEP, dropout=0.1), 1, {"recompute": "full"}),
    "activations in bfloat16": (DEEP, 1, {"dtype": "bfloat16"}),
    "full in bfloat16": (DEEP, 1, {"dtype": "bfloat16", "recompute": "full"}),
    "logits": (LARGE_HEAD, 1, {}),
    "logits in bfloat16": (LARGE_HEAD, 1, {"dtype": "bfloat16"}),
    "chunks": (LARGE_HEAD, 1, {"loss_chunk": 64}),
    "chunks in bfloat16": (LARGE_HEAD, 1, {"loss_chunk": 64, "dtype": "bfloat16"}),
    "accumulation": (LARGE_HEAD, 2, {}),
    "gradients": (GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=16, vocab_size=320), 1, {}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_the_prediction_is_within_a_tenth(case):
    gpt, A, settings = SHAPES[case]
    B = 8 if gpt.block_size == 64 else 2
    expected = memory.predict(gpt, B, A, device="cpu", **{"dtype": "float32", **settings})
    assert sum(expected.values()) == pytest.approx(measure((gpt, B, A, 1, settings))["peak"], rel=0.1)


@pytest.mark.parametrize("name", ["wide, ddp"])
def test_the_prediction_holds_for_two_ranks(name):
    gpt, B, A, W, settings = CASES[name]
    found = json.loads(expect_ok(command("scripts/bench_memory.py", "--case", name, ranks=W)).splitlines()[-1])
    expected = memory.predict(gpt, B, A, W, device="cpu", **{"dtype": "float32", **settings})
    assert sum(expected.values()) == pytest.approx(found["peak"], rel=0.1)


def test_with_chunks_the_heads_share_does_not_grow_with_the_tokens():
    def share(B, chunk):
        """Measured bytes beyond those of a model that has almost no vocabulary."""
        settings = {"loss_chunk": chunk}
        peaks = [measure((gpt, B, 1, 1, settings))["peak"] for gpt in (LARGE_HEAD, replace(LARGE_HEAD, vocab_size=64))]
        return peaks[0] - peaks[1]
    assert share(16, 64) < 1.05 * share(4, 64)
    assert share(16, 0) > 3 * share(4, 0)


def test_fsdp_spreads_the_model_and_chunks_and_recomputation_save():
    gpt = replace(SIZES["1.5b"], dropout=0.1)

    def peak(**settings):
        return sum(memory.predict(gpt, 8, **settings).values())
    assert peak(W=8, parallel="fsdp") < peak(W=2, parallel="fsdp") < peak(W=2)
    assert peak(loss_chunk=512, recompute="full") < peak(loss_chunk=512, recompute="selective") < peak(loss_chunk=512)
    assert memory.largest_batch(gpt, 80) < memory.largest_batch(gpt, 80, loss_chunk=2048)


@pytest.mark.parametrize("gigabytes, chunk", [(2, memory.CHUNK), (200, 0)])
def test_chunks_are_chosen_where_all_logits_would_not_fit(monkeypatch, gigabytes, chunk):
    monkeypatch.setattr(memory, "device_bytes", lambda device: gigabytes * 1e9)
    config = train.settle(train.TrainConfig(device="cpu"), 1)
    gpt = replace(SIZES["124m"], block_size=config.block_size)
    assert memory.settle_loss_chunk(config, gpt, 1).loss_chunk == chunk
    assert memory.settle_loss_chunk(replace(config, loss_chunk=7), gpt, 1).loss_chunk == 7


def test_the_plan_says_the_peak(sample_data, tmp_path):
    flags = ("config/tiny_cpu.py", "--data_dir", sample_data, "--out_dir", tmp_path / "run", "--device=cpu",
             "--dry_run")
    text = expect_ok(command("train.py", *flags, "--recompute=full", "--loss_chunk=100"))
    gpt = replace(SIZES["tiny"], block_size=128, vocab_size=320)
    expected = memory.predict(gpt, 32, device="cpu", dtype="float32", loss_chunk=100, recompute="full")
    assert f"{sum(expected.values()) / 1e9:.2f} GB per rank" in text and "loss_chunk 100, recompute full" in text
    expect_error(command("train.py", *flags, "--loss_chunk=-2"), "--loss_chunk -2", "-1 or more")
    expect_error(command("train.py", *flags, "--recompute=some"), "--recompute", "selective")


def test_the_table_of_the_documentation_is_the_formulas():
    rows = [line for line in expect_ok(command("memory.py")).splitlines() if line.startswith("|")]
    page = (train.Path(memory.__file__).parent / "docs" / "memory.md").read_text()
    assert len(rows) == 11 and all(row in page for row in rows)
