"""The benchmark of the step: its formula, its parts, and that it measures and reports with one rank and with two."""

import json

import pytest
import torch
from conftest import command, expect_error, expect_ok

import train
from scripts.bench_train import PARTS, Clock, datasheet_flops, flops_per_token, shape

SMALL = ("scripts/bench_train.py", "--sizes", "1x2x32", "--micro_batch", 2, "--block_size=8", "--n_vocab=64",
         "--rounds=2", "--log_interval=2", "--device=cpu")


def test_flops_per_token_by_hand():
    embedding, layer_norms, attention, mlp = 64 * 8, 3 * 16, 8 * 24 + 24 + 8 * 8 + 8, 8 * 32 + 32 + 32 * 8 + 8
    products = 2 * 2 * 8 * 16 * 3  # scores and their sum of values, 2 C T each; backward costs twice the forward pass
    assert flops_per_token(shape("1x1x8", 16, 64, 0.0)) == 6 * (embedding + layer_norms + attention + mlp) + products


def test_only_a_known_gpu_has_a_datasheet():
    peaks = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
             "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165}
    for name, peak in peaks.items():
        assert datasheet_flops(name, "bfloat16") == peak * 1e12
        assert datasheet_flops(name, "float32") is None
    assert datasheet_flops("NVIDIA L40", "bfloat16") is datasheet_flops("cpu", "bfloat16") is None


def test_a_part_inside_another_counts_as_the_outer_one():
    clock = Clock(torch.device("cpu"))
    inner = clock.timed("inner", lambda: 3)
    assert inner() == clock.timed("outer", inner)() == 3
    assert [name for name, _, _ in clock.spans] == ["inner", "outer"]


@pytest.mark.parametrize("ranks, flags", [(1, ["--reweight", "linupper", "extremes"]),
                                          (2, ["--micro_steps=2", "--parallel=fsdp"])])
def test_every_strategy_is_measured_and_taken_apart(tmp_path, ranks, flags):
    functions = torch.Tensor.backward, train.sample_weights, train.distributed.gather
    text = expect_ok(command(*SMALL, *flags, "--to", tmp_path / "out.json", "--profile", tmp_path / "trace.json",
                             ranks=ranks))
    assert functions == (torch.Tensor.backward, train.sample_weights, train.distributed.gather)
    result = json.loads((tmp_path / "out.json").read_text())
    strategies = ["uniform", "linupper", "extremes"][:4 - ranks]
    assert [row["reweight"] for row in result["rows"]] == strategies and result["ranks"] == ranks
    for row in result["rows"]:
        tokens = 2 * 8 * ranks * result["micro_steps"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_s"])
        flops = flops_per_token(shape("1x2x32", 8, 64, 0.0))
        assert row["flops_per_s"] == pytest.approx(flops * row["tokens_per_s"] / ranks)
        assert tuple(row["parts_s"]) == PARTS and all(row["parts_s"][part] > 0 for part in PARTS[1:2] + PARTS[3:])
        assert (row["parts_s"]["gather and weights"] > 1e-6) == (row["reweight"] != "uniform")
        assert row["over_uniform"]["wall"][0] > 0 and row["matmul_flops"] > 0
        assert f"| 1x2x32 | 2 | {row['reweight']} |" in text
    named = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert named >= set(PARTS) - {"rest"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "trace.json"]


@pytest.mark.parametrize("flags, words", [
    (["--sizes", "125m"], ["--sizes 125m", "124m"]), (["--sizes", "1x3x32"], ["--sizes 1x3x32"]),
    (["--rounds=0"], ["--rounds"]), (["--micro_batch_size=4"], ["--micro_batch_size=4", "--micro_batch"]),
    (["--blocksize=4"], ["did you mean '--block_size'"]), (["--data=none"], ["'none' not found"])])
def test_wrong_flags(flags, words):
    expect_error(command(*SMALL, *flags), *words)
