"""scripts/bench.py: its formulas, and that each command measures and reports.

The benchmark of the step is tested with one rank and with two; that of memory in test_memory.py.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import command, expect_error, expect_ok

import step
from families import SIZES
from model import GPTConfig
from runtime import distributed
from runtime.memory import flops_per_token
from scripts.bench import COMMANDS
from scripts.benchmarks.common import quartiles, take_turns, with_quartiles
from scripts.benchmarks.train import PARTS, Clock, datasheet_flops, named_shape

BENCH = "scripts/bench.py"
SMALL = (
    BENCH,
    "train",
    "--sizes",
    "1x2x32",
    "--micro_batch",
    2,
    "--block_size=8",
    "--n_vocab=64",
    "--rounds=2",
    "--log_interval=2",
    "--device=cpu",
)


def test_help_has_a_sentence_for_each_command():
    text = expect_ok(command(BENCH, "--help"))
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w.{{30,}}", text, re.MULTILINE)
        own = expect_ok(command(BENCH, name, "--help"))
        assert f"usage: bench.py {name} " in own and f"python {BENCH} {name}" in own


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["no command", "train, options, peers"]),
        (["trian"], ["'trian'", "did you mean 'train'"]),
    ],
)
def test_wrong_commands(arguments, words):
    expect_error(command(BENCH, *arguments), *words)


def test_variants_take_turns_and_none_is_always_first():
    order = []
    variants = [lambda name=name: order.append(name) for name in "abc"]
    seconds = take_turns(variants, rounds=3, device=torch.device("cpu"))
    assert "".join(order) == "abccabbca"
    assert seconds.shape == (3, 3, 2) and (seconds >= 0).all()


def test_quartiles():
    values = torch.arange(1.0, 6.0).numpy()
    assert quartiles(values) == (2.0, 3.0, 4.0)
    assert with_quartiles(values, digits=1) == "3.0  (quartiles 2.0 to 4.0, 5 rounds)"


def test_the_loader_reports_times_and_memory():
    text = expect_ok(command(BENCH, "loader", "--shards=100", "--batches=100"))
    memory = text.split("resident MB after each tenth of the batches: ")[1].split(", ")
    assert len(memory) == 10 and all(float(value) > 0 for value in memory)
    assert float(re.search(r"batch of 32 x 1024: ([\d.]+) ms", text)[1]) > 0


def test_the_options_are_compared_with_linupper(sample_data, tmp_path):
    flags = ("config/tiny_cpu.py", "--data_dir", sample_data, "--block_size=32", "--device=cpu")
    flags += ("--global_batch_size=8", "--max_steps=12", "--eval_windows=1")
    reference, scores = tmp_path / "reference", tmp_path / "scores.npz"
    expect_ok(command("train.py", *flags, "--out_dir", reference))
    expect_ok(command("eval/score_windows.py", "--run", reference, "--to", scores, "--", *flags))
    options = ("--run", reference, "--scores", scores, "--rounds=1")
    text = expect_ok(command(BENCH, "options", *options, *flags))
    rows = re.findall(r"^\| (.+) \| [\d.]+ \| ([\d.]+) \(", text, re.MULTILINE)
    assert len(rows) == 9 and rows[0] == ("linupper", "1.000")
    assert {"uniform", "band", "reference by file", "reference by run", "muon"} <= dict(rows).keys()


def test_a_peer_without_its_file():
    expect_error(command(BENCH, "peers", "--nanogpt", "nowhere.py"), "nowhere.py", "model.py")


def test_flops_per_token_by_hand():
    embedding, layer_norms = 64 * 8, 3 * 16
    attention = 8 * 24 + 24 + 8 * 8 + 8
    mlp = 8 * 32 + 32 + 32 * 8 + 8
    # Scores and their sum of values, 2 C T each; backward costs twice the forward pass.
    products = 2 * 2 * 8 * 16 * 3
    gpt = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=64)
    assert flops_per_token(gpt) == 6 * (embedding + layer_norms + attention + mlp) + products

    gpt = replace(SIZES["124m"], block_size=1024, vocab_size=50304)
    parameters = 124_439_808 + 47 * 768  # those of GPT-2, with 50304 rows in place of 50257
    positions = 1024 * 768
    assert flops_per_token(gpt) == 6 * (parameters - positions) + 12 * 12 * 768 * 1024


def test_only_a_known_gpu_has_a_datasheet():
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA L40S": 362,
        "NVIDIA L4": 121,
        "NVIDIA GeForce RTX 4090": 165,
    }
    for name, peak in peaks.items():
        assert datasheet_flops(name, "bfloat16") == peak * 1e12
        assert datasheet_flops(name, "float32") is None
    assert datasheet_flops("NVIDIA L40", "bfloat16") is datasheet_flops("cpu", "bfloat16") is None


def test_a_part_inside_another_counts_as_the_outer_one():
    clock = Clock(torch.device("cpu"))
    inner = clock.timed("inner", lambda: 3)
    assert inner() == clock.timed("outer", inner)() == 3
    assert [name for name, _, _ in clock.spans] == ["inner", "outer"]


@pytest.mark.parametrize(
    "ranks, flags",
    [(1, ["--reweight", "linupper", "extremes"]), (2, ["--micro_steps=2", "--parallel=fsdp"])],
)
def test_every_strategy_is_measured_and_taken_apart(tmp_path, ranks, flags):
    functions = torch.Tensor.backward, step.sample_weights, distributed.gather
    text = expect_ok(
        command(
            *SMALL,
            *flags,
            "--to",
            tmp_path / "out.json",
            "--profile",
            tmp_path / "trace.json",
            ranks=ranks,
        )
    )
    assert functions == (torch.Tensor.backward, step.sample_weights, distributed.gather)
    result = json.loads((tmp_path / "out.json").read_text())
    strategies = ["uniform", "linupper", "extremes"][: 4 - ranks]
    assert [row["reweight"] for row in result["rows"]] == strategies and result["ranks"] == ranks
    assert result["peak_flops"]["matrix product"] > 0
    for row in result["rows"]:
        tokens = 2 * 8 * ranks * result["micro_steps"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_s"])
        flops = flops_per_token(replace(named_shape("1x2x32"), block_size=8, vocab_size=64))
        assert row["flops_per_s"] == pytest.approx(flops * row["tokens_per_s"] / ranks)
        assert tuple(row["parts_s"]) == PARTS and all(
            row["parts_s"][part] > 0 for part in PARTS[1:2] + PARTS[3:]
        )
        assert (row["parts_s"]["gather and weights"] > 1e-6) == (row["reweight"] != "uniform")
        assert row["over_uniform"]["wall"][0] > 0
        assert f"| 1x2x32 | 2 | {row['reweight']} |" in text
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {event.get("name") for event in events}
    assert named >= set(PARTS) - {"rest"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "trace.json"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sizes", "125m"], ["--sizes 125m", "124m"]),
        (["--sizes", "1x3x32"], ["--sizes 1x3x32"]),
        (["--rounds=0"], ["--rounds"]),
        (["--micro_batch_size=4"], ["--micro_batch_size=4", "--micro_batch"]),
        (["--blocksize=4"], ["did you mean '--block_size'"]),
        (["--data=none"], ["'none' not found"]),
    ],
)
def test_wrong_flags(flags, words):
    expect_error(command(*SMALL, *flags), *words)
