"""The code of a GPU's step, on a machine without one (tests/gpu_compiler.py).

Shown: the model in bfloat16 is traced without a break, Inductor lowers it for sm_90, its Triton
kernels compile, attention is one fused operator, and there are no more launches than before. Not
shown: that a real GPU chooses this attention (it is put in here), CUDA graphs, NCCL, the numbers,
memory and speed. Nothing is run.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or shutil.which("g++") is None,
    reason="needs triton and g++",
)

GPT2 = {"n_head": 12, "n_embd": 768, "block_size": 512, "vocab_size": 50304}
LLAMA = {
    "family": "llama",
    "n_head": 32,
    "n_embd": 2048,
    "n_kv_head": 8,
    "n_ffn": 8192,
    "block_size": 512,
    "tied": True,
}
FLASH = "torch.ops.aten._scaled_dot_product_flash_attention"

ONE_LAYER, TWO_LAYERS = {"n_layer": 1}, {"n_layer": 2}
# As tests/gpu_compiler.py takes them; of one layer only the launches are looked at.
MODELS = {
    "gpt2, 1 layer": (GPT2 | ONE_LAYER, {}, False),
    "gpt2, 2 layers": (GPT2 | TWO_LAYERS, {}),
    "llama, 1 layer": (LLAMA | ONE_LAYER, {}, False),
    "llama, 2 layers": (LLAMA | TWO_LAYERS, {}),
    "head in chunks": (GPT2 | ONE_LAYER, {"loss_chunk": 1024}),
    # 684m has 50 numbers a head.
    "684m with dropout": (GPT2 | ONE_LAYER | {"n_head": 24, "n_embd": 1200, "dropout": 0.1}, {}),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, list[dict]]:
    """The graphs of a step of each model, all made in one process: to start one takes long."""
    arguments = [json.dumps(model) for model in MODELS.values()]
    command = [sys.executable, "tests/gpu_compiler.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(MODELS, json.loads(done.stdout), strict=True))


def launches(graph: dict) -> int:
    return graph["triton"] + len(graph["others"])


def check_attention_and_kernels(graphs: list[dict], n_layer: int) -> None:
    called = [name for graph in graphs for name in graph["others"]]
    attention = [name for name in called if "attention" in name]
    forward, backward = f"{FLASH}.default", f"{FLASH}_backward.default"
    assert sorted(attention) == sorted([forward, backward] * n_layer)
    matmuls = {"extern_kernels.mm", "extern_kernels.addmm"}
    assert set(called) - set(attention) <= matmuls | {"aten.randint.low_out"}  # seeds of dropout
    sizes = [size for graph in graphs for size in graph["kernels"].values()]
    assert sizes and all(size > 1000 for size in sizes)


@pytest.mark.parametrize(
    "family, at_most, of_12_layers", [("gpt2", (9, 22), 383), ("llama", (11, 20), None)]
)
def test_launches_of_a_layer(graphs, family, at_most, of_12_layers):
    """Forward and backward. docs/performance.md has the numbers of 124M, which has 12 layers."""
    one, two = graphs[f"{family}, 1 layer"], graphs[f"{family}, 2 layers"]
    assert [graph["kind"] for graph in two] == ["forward", "backward"]  # one graph, no break
    check_attention_and_kernels(two, 2)
    per_layer = [launches(b) - launches(a) for a, b in zip(one, two, strict=True)]
    assert per_layer[0] <= at_most[0] and per_layer[1] <= at_most[1]
    if of_12_layers:
        total = sum(launches(a) + 11 * more for a, more in zip(one, per_layer, strict=True))
        assert total <= of_12_layers


@pytest.mark.parametrize("name", ["head in chunks", "684m with dropout"])
def test_other_ways_compile(graphs, name):
    check_attention_and_kernels(graphs[name], 1)
