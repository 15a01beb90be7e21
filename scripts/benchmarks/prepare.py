"""How fast text becomes shards, against tiktoken alone on text that is already in memory.

    python scripts/bench.py prepare --input mini_slimpajama              # 3 rounds, 1 and 2 workers
    python scripts/bench.py prepare --input mini_slimpajama --repeat 21 --rounds 1

A round is plain tiktoken's `encode_to_numpy` on preloaded documents in as many processes as
workers, then the whole command, start and end included, into a new folder. Prints tokens per second
of both, their ratio, the ratio per second of processor time, which other programs on the machine
disturb less, and the peak memory of the largest process. At the end, what each step takes in one
process. --repeat: prepare the input this many times over, in copies.
"""

import json
import multiprocessing
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from tiktoken_ext.openai_public import r50k_pat_str

from cli import UserError
from corpus import documents, fast, tokenizer
from corpus.documents import Document, Schema, Segment
from corpus.manifest import read_manifest
from corpus.shards import ShardWriter
from scripts.benchmarks.common import new_parser

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {"source": "files", "schema": list(Schema())}
SPLITS = {"train": "train", "validation": "val"}


class Rate(NamedTuple):
    """Tokens per second, by the wall clock and by processor time."""

    wall: float
    processor: float


class Share(NamedTuple):
    """What one of several processes has encoded."""

    tokens: int  # with an end-of-text for each document
    wall_s: float
    processor_s: float


def main(argv: list[str]) -> None:
    parser = new_parser("prepare", __doc__)
    parser.add_argument(
        "--input", required=True, help="SlimPajama's schema, train/ and validation/ inside"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, help="copies of the input to prepare (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    args = parser.parse_args(argv)
    if min(args.repeat, args.rounds, *args.workers) < 1:
        raise UserError(
            f"--repeat {args.repeat} --rounds {args.rounds} --workers {args.workers}: "
            "all at least 1"
        )
    if not Path(args.input).is_dir() or not load(args.input):
        raise UserError(
            f"--input {args.input}: expected a folder with documents, train/ and validation/ inside"
        )
    with tempfile.TemporaryDirectory() as links:
        folder = args.input
        if args.repeat > 1:
            folder = links
            make_copies(args.input, Path(links), args.repeat)
        for n in args.workers:
            print(json.dumps(compare(args.input, folder, n, args.rounds)), flush=True)
    print_steps(args.input)


def make_copies(folder: str, to: Path, n: int) -> None:
    """n copies of the files of a folder, in folders called as their splits."""
    for path, split in documents.find_files([folder]):
        for i in range(n):
            copy = to / f"{i:04d}" / str(split) / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def compare(folder: str, repeated: str, n: int, rounds: int) -> dict:
    """tiktoken alone on a folder and the command on its copies, in turn, with n processes each."""
    alone, command, peaks = [], [], []
    for _ in range(rounds):
        alone.append(encoding_rate(folder, n))
        rate, peak_mb = run_command(repeated, n)
        command.append(rate)
        peaks.append(peak_mb)
    pairs = list(zip(command, alone, strict=True))
    ratios = sorted(ours.wall / theirs.wall for ours, theirs in pairs)
    processor_ratios = [ours.processor / theirs.processor for ours, theirs in pairs]
    encoding = median(rate.wall for rate in alone)
    whole = median(rate.wall for rate in command)
    return {
        "workers": n,
        "encode alone, M tokens/s": round(encoding / 1e6, 2),
        "command, M tokens/s": round(whole / 1e6, 2),
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio per processor time": round(median(processor_ratios), 3),
        "peak MB": round(median(peaks)),
    }


# tiktoken alone


def encoding_rate(folder: str, n: int) -> Rate:
    """The rate of n processes that only encode, each its share of the documents."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(n), context.Queue()
    processes = []
    for i in range(n):
        arguments = (folder, i, n, ready, results)
        processes.append(context.Process(target=encode_share, args=arguments))
    for process in processes:
        process.start()
    shares = [results.get() for _ in processes]
    for process in processes:
        process.join()
    tokens = sum(share.tokens for share in shares)
    wall = max(share.wall_s for share in shares)
    processor = sum(share.processor_s for share in shares)
    return Rate(tokens / wall, tokens / processor)


def encode_share(folder: str, i: int, n: int, ready, results) -> None:
    """Load every n-th document, wait for the other processes, encode; put a Share in `results`."""
    encode = plain_encoding()
    texts = [document.text for document in load(folder)[i::n]]
    ready.wait()
    wall, processor = time.perf_counter(), time.process_time()
    tokens = sum(len(encode(text)) + 1 for text in texts)
    wall = time.perf_counter() - wall
    processor = time.process_time() - processor
    results.put(Share(tokens, wall, processor))


def plain_encoding() -> Callable[[str], np.ndarray]:
    """tiktoken's own encoding of "gpt2", with its own pattern."""
    encoding = tokenizer.gpt2_encoding(r50k_pat_str)
    return partial(encoding.encode_to_numpy, disallowed_special=())


def load(folder: str) -> list[Document]:
    """All documents of a folder."""
    loaded = []
    for segment in segments(folder):
        for _, _, item in documents.read(SOURCE, segment):
            document = documents.to_document(item, segment.split, Schema(), SPLITS)
            if document:
                loaded.append(document)
    return loaded


def segments(folder: str) -> list[Segment]:
    """Each file of a folder as a whole."""
    files = documents.find_files([folder])
    return [Segment(str(path), split, 0, None, 0) for path, split in files]


# The command


def run_command(folder: str, n: int) -> tuple[Rate, float]:
    """The rate of the whole command, and the peak memory of its largest process in MB."""
    flags = ["--source", "files", "--input", folder, "--workers", str(n)]
    with tempfile.TemporaryDirectory() as out:
        command = ["prepare_slimpajama.py", *flags, "--out", out]
        return timed(command, lambda: tokens_in(Path(out)))


def tokens_in(out: Path) -> int:
    """Tokens in the shards of a data folder."""
    tokens = 0
    for splits in read_manifest(out)["domains"].values():
        for shards in splits.values():
            tokens += sum(shard["tokens"] for shard in shards)
    return tokens


def timed(command: list[str], count_tokens: Callable[[], int]) -> tuple[Rate, float]:
    """The rate of a Python script, start and end included, and the peak of its largest process.

    The peak is in MB. count_tokens: how many it has made, asked once it has ended.
    """
    wall, processor = time.perf_counter(), processor_seconds()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak_kb = 0
    while process.poll() is None:
        peak_kb = max(peak_kb, largest_kb(process.pid))
        time.sleep(0.05)
    wall = time.perf_counter() - wall
    processor = processor_seconds() - processor
    if process.returncode:
        raise UserError(f"failed; run it alone to see why: python {shlex.join(command)}")
    tokens = count_tokens()
    return Rate(tokens / wall, tokens / processor), peak_kb / 1024


def largest_kb(pid: int) -> int:
    """The most memory in kB that a process or one of its descendants has had so far; Linux only."""
    largest, pids = 0, [pid]
    while pids:
        each = Path(f"/proc/{pids.pop()}")
        try:
            status = (each / "status").read_text()
            largest = max(largest, int(status.split("VmHWM:")[1].split()[0]))
            pids += (each / f"task/{each.name}/children").read_text().split()
        except (OSError, IndexError):  # it has just ended
            continue
    return largest


def processor_seconds() -> float:
    """Seconds of processor time of all children that have ended.

    The children's own children count as well.
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# Its steps


def print_steps(folder: str) -> None:
    """Seconds of each step of the preparation in one process, and of tiktoken alone."""
    times = step_seconds(folder)
    total = sum(times.values())
    for name, seconds in times.items():
        print(f"{name:<22}{seconds:8.2f} s {seconds / total:7.1%}")
    encode = plain_encoding()
    texts = [document.text for document in load(folder)]
    began = time.perf_counter()
    for text in texts:
        encode(text)
    print(f"plain tiktoken takes {time.perf_counter() - began:.2f} s to tokenise")


def step_seconds(folder: str) -> dict[str, float]:
    """Seconds of one process for each step over the whole folder, one step after the other."""
    seconds = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    lines, loaded, writers = [], [], {}
    with timed("read and decompress"):
        for segment in segments(folder):
            for _, _, item in documents.read(SOURCE, segment):
                lines.append((item, segment.split))
    with timed("decode JSON"):
        for item, split in lines:
            loaded.append(documents.to_document(item, split, Schema(), SPLITS))
    with timed("open the tokenizer"):
        encode = fast.make_encoder(tokenizer.describe("gpt2"), None).encode
    with timed("tokenise"):
        ids = [encode(document.text) for document in loaded]
    with tempfile.TemporaryDirectory() as out, timed("write, hash and sync"):
        for document, tokens in zip(loaded, ids, strict=True):
            key = (document.domain, document.split)
            if key not in writers:
                writers[key] = ShardWriter(Path(out), *key, 100_000_000)
            writers[key].add(tokens, len(document.utf8))
        for writer in writers.values():
            writer.close()
    return seconds
