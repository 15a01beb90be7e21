"""Step times from 1 to 512 GPUs on paper: the tables of docs/scaling.md, from its formulas. Nothing here is measured.

    python scripts/predict_scaling.py
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import SIZES
from scripts.bench_train import flops_per_token, n_parameters

T = 1024  # tokens of a sequence
FLOPS = 0.5 * 989e12  # of one GPU: half of an H100's datasheet
NODE = 8  # GPUs
# Bytes/s that a GPU sends and receives at once, at 0.8 of the datasheet, and seconds for a message of no length.
NVLINK = 0.8 * 450e9, 2e-6
NETWORKS = {"InfiniBand": (0.8 * 400e9 / 8, 5e-6),            # 400 Gb/s for each GPU
            "Ethernet": (0.8 * 100e9 / 8 / NODE, 30e-6)}      # 100 Gb/s for each node
# Bytes per parameter and step: all-reduce of float32; two all-gathers and a reduce-scatter of bfloat16.
BYTES = {"ddp": 2 * 4, "fsdp": 3 * 2}
CASES = {("124m", "ddp"): 32, ("1.5b", "ddp"): 8, ("1.5b", "fsdp"): 8}  # sequences per GPU in the first table
WORLDS = (1, 8, 16, 64, 128, 512)
JITTER = 0.01  # standard deviation of a rank's forward and of its backward time, as a fraction of it


def gpt(size: str):
    return replace(SIZES[size], block_size=T, vocab_size=50304)


def compute_seconds(size: str, sequences: float) -> float:
    return sequences * T * flops_per_token(gpt(size)) / FLOPS


def link(W: int, network: str) -> tuple[float, float]:
    """Bytes/s of the slowest part of a ring over the GPUs of all nodes, a ring per GPU of a node; s per message."""
    if W <= NODE:
        return NVLINK
    rate, latency = NETWORKS[network]
    return min(NVLINK[0], NODE * rate), latency


def communication_seconds(size: str, parallel: str, W: int, network: str) -> float:
    rate, latency = link(W, network)
    messages = SIZES[size].n_layer * (2 if parallel == "ddp" else 3)  # about a layer at a time
    return (W - 1) / W * BYTES[parallel] * n_parameters(gpt(size)) / rate + messages * math.log2(W) * latency


def step_seconds(size: str, parallel: str, W: int, network: str, sequences: float) -> float:
    """Compute, and what communication cannot be hidden behind it: DDP hides behind backward, FSDP behind all."""
    compute, communication = compute_seconds(size, sequences), communication_seconds(size, parallel, W, network)
    hidden = compute * (2 / 3 if parallel == "ddp" else 1)
    return compute + max(communication - hidden, communication / SIZES[size].n_layer)


def gather_seconds(W: int, network: str) -> float:
    """All-gather of the losses: 4 bytes a sample take no time, W - 1 messages one after the other do."""
    between = math.ceil(W / NODE) if W > NODE else 0
    return (W - 1 - between) * NVLINK[1] + between * NETWORKS[network][1]


def waiting(W: int) -> float:
    """Fraction of a step lost to meeting twice instead of once: the slowest of W forward and of W backward passes,
    in place of the slowest of their sums."""
    forward, backward = JITTER / 3, JITTER * 2 / 3
    return (forward + backward - math.hypot(forward, backward)) * math.sqrt(2 * math.log(W))


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = "|---|---|" + "--:|" * len(WORLDS)
    first, *rest = (f"| {' | '.join(line)} |" for line in [head, *rows])
    return "\n".join([first, rule, *rest])


def scaling(sequences_of) -> str:
    """Step time in ms and, in brackets, the share of it that is compute; sequences_of(case, W): per GPU."""
    rows = []
    for (size, parallel), B in CASES.items():
        for network in NETWORKS:
            cells = []
            for W in WORLDS:
                n = sequences_of(B, W)
                step = step_seconds(size, parallel, W, network, n)
                cells.append(f"{1e3 * step:,.0f} ({100 * compute_seconds(size, n) / step:.0f} %)")
            rows.append([f"{size}, {parallel}", network, *cells])
    return table(["model", "between nodes", *map(str, WORLDS)], rows)


def gathers() -> str:
    rows = [["gather itself, ms", network, *(f"{1e3 * gather_seconds(W, network):.2f}" for W in WORLDS)]
            for network in NETWORKS]
    rows.append(["waiting, % of a step", "any", *(f"{100 * waiting(W):.2f}" for W in WORLDS)])
    for (size, parallel), B in list(CASES.items())[:2]:
        both = [gather_seconds(W, "InfiniBand") / step_seconds(size, parallel, W, "InfiniBand", B) + waiting(W)
                for W in WORLDS]
        rows.append([f"both, % of a {size} step", "InfiniBand", *(f"{100 * part:.2f}" for part in both)])
    return table(["cost", "between nodes", *map(str, WORLDS)], rows)


def main() -> None:
    print("\n\n".join([scaling(lambda B, W: B), scaling(lambda B, W: 512 / W), gathers()]))


if __name__ == "__main__":
    main()
