"""What the benchmarks share: random data, taking turns, and how results are printed."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from cli import Parser
from corpus.manifest import DOMAINS, SCHEMA
from corpus.shards import npy_header
from runtime import distributed

SHARD_TOKENS = 40_000  # of a random shard


def new_parser(name: str, doc: str) -> Parser:
    """A parser whose usage line shows the subcommand."""
    parser = Parser(doc)
    parser.prog = f"bench.py {name}"
    return parser


def default_device() -> torch.device:
    return distributed.setup("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """The device and torch's version, for the line above the results."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def write_random_shards(folder: Path, n: int, n_vocab: int = 50257) -> None:
    """A data folder with n training shards of random tokens below n_vocab, dealt out to domains.

    A domain's first shard is its validation data as well.
    """
    rng = np.random.default_rng(0)
    domains = {domain: {"train": []} for domain in DOMAINS}
    for i in range(n):
        domain = DOMAINS[i % len(DOMAINS)]
        name = f"{domain}/train_{i:05d}.npy"
        tokens = rng.integers(0, n_vocab, SHARD_TOKENS, dtype=np.uint16)
        content = npy_header(SHARD_TOKENS) + tokens.tobytes()
        (folder / domain).mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        shard = {
            "file": name,
            "tokens": SHARD_TOKENS,
            "documents": 1,
            "bytes": SHARD_TOKENS,
            "file_bytes": len(content),
            "sha256": f"{i:064d}",
        }
        domains[domain]["train"].append(shard)
    for splits in domains.values():
        splits["val"] = splits["train"][:1]
    tokenizer = {"name": "gpt2", "sha256": "", "n_vocab": n_vocab, "eot_token": n_vocab - 1}
    manifest = {
        "schema": SCHEMA,
        "tokenizer": tokenizer,
        "dtype": "uint16",
        "source": {},
        "domains": domains,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def take_turns(
    variants: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> np.ndarray:
    """(rounds, V, 2) wall and processor seconds of V variants; in a round each runs once.

    The order changes from round to round. Warm up before: nothing is left out of the result.
    """
    seconds = np.zeros((rounds, len(variants), 2))
    for i in range(rounds):
        for j in np.roll(range(len(variants)), i):
            distributed.barrier(device)
            wall, processor = time.perf_counter(), time.process_time()
            variants[j]()
            distributed.barrier(device)
            seconds[i, j] = time.perf_counter() - wall, time.process_time() - processor
    return seconds


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return low, middle, high


def with_quartiles(values: np.ndarray, digits: int = 3) -> str:
    """The median of a value per round, and how far the rounds lie apart."""
    low, middle, high = quartiles(values)
    spread = f"quartiles {low:.{digits}f} to {high:.{digits}f}, {len(values)} rounds"
    return f"{middle:.{digits}f}  ({spread})"


def table_row(cells: Iterable[object]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
