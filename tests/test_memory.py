"""The predicted peak of a step against what torch allocated; what the plan says and chooses."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT, command, expect_error, expect_ok

from families import SIZES
from llama import LlamaConfig
from model import GPTConfig
from recipe import TrainConfig, settle
from runtime import memory
from scripts.benchmarks.memory import CASES, Case, largest_batch, measure, predict

DEEP = GPTConfig(n_layer=6, n_head=4, n_embd=64, block_size=64, vocab_size=320)
DEEP_DROPOUT = replace(DEEP, dropout=0.1)
LARGE_HEAD = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=64, vocab_size=8000)
WIDE = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=16, vocab_size=320)
LLAMA = LlamaConfig(6, 4, 64, n_kv_head=1, n_ffn=192, block_size=64, vocab_size=320)
TIED = replace(LLAMA, n_layer=2, vocab_size=8000, tied=True)
SHAPES = {
    "activations": Case(DEEP, 8),
    "activations with dropout": Case(DEEP_DROPOUT, 8),
    "selective": Case(DEEP, 8, {"recompute": "selective"}),
    "full": Case(DEEP, 8, {"recompute": "full"}),
    "full with dropout": Case(DEEP_DROPOUT, 8, {"recompute": "full"}),
    "activations in bfloat16": Case(DEEP, 8, {"dtype": "bfloat16"}),
    "full in bfloat16": Case(DEEP, 8, {"dtype": "bfloat16", "recompute": "full"}),
    "logits": Case(LARGE_HEAD, 8),
    "logits in bfloat16": Case(LARGE_HEAD, 8, {"dtype": "bfloat16"}),
    "chunks": Case(LARGE_HEAD, 8, {"loss_chunk": 64}),
    "chunks in bfloat16": Case(LARGE_HEAD, 8, {"loss_chunk": 64, "dtype": "bfloat16"}),
    "accumulation": Case(LARGE_HEAD, 8, A=2),
    "gradients": Case(WIDE, 2),
    "Muon": Case(replace(WIDE, n_layer=1), 2, {"optimizer": "muon"}),
    "Muon's momentum": Case(WIDE, 64, {"optimizer": "muon"}),
    "Llama": Case(LLAMA, 8),
    "Llama, selective": Case(LLAMA, 8, {"recompute": "selective"}),
    "Llama, full in bfloat16": Case(LLAMA, 8, {"dtype": "bfloat16", "recompute": "full"}),
    "Llama in bfloat16": Case(replace(LLAMA, n_kv_head=4), 8, {"dtype": "bfloat16"}),
    "Llama, untied head": Case(replace(LLAMA, n_layer=2, vocab_size=8000), 8),
    "Llama, tied head in chunks": Case(TIED, 8, {"loss_chunk": 64}),
    "Llama, gradients": Case(replace(LLAMA, n_layer=2, n_embd=256, n_ffn=704, block_size=16), 2),
    "Llama, Muon's momentum": Case(LLAMA, 16, {"optimizer": "muon"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_prediction_is_within_a_tenth(name):
    case = SHAPES[name]
    assert predict(case, "cpu") == pytest.approx(measure(case)["peak"], rel=0.1)


@pytest.mark.parametrize("name", ["wide, ddp"])
def test_the_prediction_holds_for_two_ranks(name):
    case = CASES[name]
    text = expect_ok(command("scripts/bench.py", "memory", "--case", name, ranks=case.W))
    measured = json.loads(text.splitlines()[-1])
    assert predict(case, "cpu") == pytest.approx(measured["peak"], rel=0.1)


def test_with_chunks_the_heads_share_does_not_grow_with_the_tokens():
    def share(B, chunk):
        """Measured bytes beyond those of a model that has almost no vocabulary."""
        settings = {"loss_chunk": chunk}
        large = measure(Case(LARGE_HEAD, B, settings))
        small = measure(Case(replace(LARGE_HEAD, vocab_size=64), B, settings))
        return large["peak"] - small["peak"]

    assert share(16, 64) < 1.05 * share(4, 64)
    assert share(16, 0) > 3 * share(4, 0)


def test_fsdp_spreads_the_model_and_chunks_and_recomputation_save():
    gpt = replace(SIZES["1.5b"], dropout=0.1)

    def peak(**settings):
        return sum(memory.predict(gpt, 8, **settings).values())

    assert peak(W=8, parallel="fsdp") < peak(W=2, parallel="fsdp") < peak(W=2)
    chunks = peak(loss_chunk=512)
    selective = peak(loss_chunk=512, recompute="selective")
    assert peak(loss_chunk=512, recompute="full") < selective < chunks
    assert largest_batch(gpt, 80) < largest_batch(gpt, 80, loss_chunk=2048)


@pytest.mark.parametrize("gigabytes, chunk", [(2, memory.CHUNK), (200, 0)])
def test_chunks_are_chosen_where_all_logits_would_not_fit(monkeypatch, gigabytes, chunk):
    monkeypatch.setattr(memory, "device_bytes", lambda device: gigabytes * 1e9)
    config = settle(TrainConfig(device="cpu"), 1)
    gpt = replace(SIZES["124m"], block_size=config.block_size)
    assert memory.settle_loss_chunk(config, gpt, 1).loss_chunk == chunk
    assert memory.settle_loss_chunk(replace(config, loss_chunk=7), gpt, 1).loss_chunk == 7


def test_the_plan_says_the_peak(sample_data, tmp_path):
    folders = ("--data_dir", sample_data, "--out_dir", tmp_path / "run")
    flags = ("config/tiny_cpu.py", *folders, "--device=cpu", "--dry_run")
    text = expect_ok(command("train.py", *flags, "--recompute=full", "--loss_chunk=100"))
    gpt = replace(SIZES["tiny"], block_size=128, vocab_size=320)
    expected = predict(Case(gpt, 32, {"loss_chunk": 100, "recompute": "full"}), "cpu")
    assert f"{expected / 1e9:.2f} GB per rank" in text
    assert "loss_chunk 100, recompute full" in text
    expect_error(command("train.py", *flags, "--loss_chunk=-2"), "--loss_chunk -2", "-1 or more")
    expect_error(command("train.py", *flags, "--recompute=some"), "--recompute", "selective")


def test_the_prediction_for_compiled_code_is_near_what_an_h200_took():
    """9.06 GB: 124m, 32 x 512, bfloat16, without dropout (docs/performance.md)."""
    gpt = replace(SIZES["124m"], block_size=512, vocab_size=50304)
    compiled = sum(memory.predict(gpt, 32, compiled=True).values())
    assert compiled == pytest.approx(9.06e9, rel=0.1)
    assert compiled < 0.6 * sum(memory.predict(gpt, 32).values())


def test_the_table_of_the_documentation_is_the_formulas():
    text = expect_ok(command("scripts/bench.py", "memory", "--what", "fits"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "memory.md").read_text()
    assert len(rows) == 13
    for row in rows:
        assert row in page
