"""How fast text becomes shards, against tiktoken alone on text that is in memory already, in one run.

    python scripts/bench_prepare.py --input mini_slimpajama                      # three rounds, 1 and 2 workers
    python scripts/bench_prepare.py --input mini_slimpajama --repeat 21 --rounds 1

Rounds of: plain tiktoken's `encode_to_numpy` on preloaded documents in as many processes; then the whole command in a
folder of its own, with its start and end. Tokens per second of both, their ratio, the ratio of tokens per second of
processor time (which other programs on the machine disturb less), and the peak memory of the largest process. At the
end the steps of one process apart. --repeat: the input as often, through links.
"""

import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from tiktoken_ext.openai_public import r50k_pat_str

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizer
from configurator import Parser
from corpus import documents as sources
from corpus.shards import ShardWriter
from errors import UserError, run
from manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": "train", "validation": "val"}


def load(folder: str) -> list[sources.Document]:
    """All documents of a folder."""
    source = {"source": "files", "schema": list(sources.Schema())}
    segments = [sources.Segment(str(path), split, 0, None, 0) for path, split in sources.find_files([folder])]
    found = (sources.to_document(item, segment.split, sources.Schema(), SPLITS)
             for segment in segments for _, _, item in sources.read(source, segment))
    return [document for document in found if document]


def plain() -> Callable[[str], np.ndarray]:
    """tiktoken's own encoding of "gpt2", with its own pattern."""
    return partial(tokenizer.gpt2_encoding(r50k_pat_str).encode_to_numpy, disallowed_special=())


def encode_alone(folder: str, i: int, n: int, ready, results) -> None:
    """Every n-th document, preloaded: tokens (with end-of-text) and seconds of this process."""
    encode, texts = plain(), [d.text for d in load(folder)[i::n]]
    ready.wait()
    begin, used = time.perf_counter(), time.process_time()
    tokens = sum(len(encode(text)) + 1 for text in texts)
    results.put((tokens, time.perf_counter() - begin, time.process_time() - used))


def raw_rate(folder: str, n: int) -> tuple[float, float]:
    """Tokens per second, and per second of processor time, of n processes that only encode."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(n), context.Queue()
    processes = [context.Process(target=encode_alone, args=(folder, i, n, ready, results)) for i in range(n)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    tokens, seconds, used = zip(*found, strict=True)
    return sum(tokens) / max(seconds), sum(tokens) / sum(used)


def command_rate(folder: str, n: int) -> tuple[float, float, float]:
    """raw_rate's two numbers of the whole command, and the MB of memory that its largest process ever had."""
    with tempfile.TemporaryDirectory() as out:
        begin, used = time.perf_counter(), processor_time()
        process = subprocess.Popen([sys.executable, "prepare_slimpajama.py", "--source", "files", "--input", folder,
                                    "--out", out, "--workers", str(n)], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for pid in [str(process.pid), *(children.read_text().split() if children.exists() else [])]:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
                except (OSError, IndexError):  # it has just ended
                    continue
            time.sleep(0.05)
        seconds, used = time.perf_counter() - begin, processor_time() - used
        if process.returncode:
            raise UserError(f"the preparation of {folder} failed; run it alone to see why")
        shards = [s for splits in read_manifest(out)["domains"].values() for some in splits.values() for s in some]
        tokens = sum(s["tokens"] for s in shards)
        return tokens / seconds, tokens / used, peak / 1024


def processor_time() -> float:
    """Seconds that all ended children have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def steps(folder: str) -> dict[str, float]:
    """Seconds of one process for each step over the whole folder."""
    source, schema = {"source": "files", "schema": list(sources.Schema())}, sources.Schema()
    encode, out, times = tokenizer.load("gpt2").encode_to_numpy, tempfile.TemporaryDirectory(), {}
    segments = [sources.Segment(str(path), split, 0, None, 0) for path, split in sources.find_files([folder])]
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        times[name], begin = time.perf_counter() - begin, time.perf_counter()

    lines = [(s.split, item) for s in segments for _, _, item in sources.read(source, s)]
    lap("read and decompress")
    found = [sources.to_document(item, split, schema, SPLITS) for split, item in lines]
    lap("decode JSON")
    ids = [encode(document.text) for document in found]
    lap("tokenise")
    writers = {}
    for document, tokens in zip(found, ids, strict=True):
        key = document.domain, document.split
        if key not in writers:
            writers[key] = ShardWriter(Path(out.name), *key, 100_000_000)
        writers[key].add(tokens, len(document.utf8))
    for writer in writers.values():
        writer.close()
    lap("write, hash and sync")
    out.cleanup()
    return times


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--input", required=True, help="folder in SlimPajama's schema, train/ and validation/ inside")
    parser.add_argument("--repeat", type=int, default=1, help="(default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    args = parser.parse_args()
    if min(args.repeat, args.rounds, *args.workers) < 1:
        raise UserError(f"--repeat {args.repeat} --rounds {args.rounds} --workers {args.workers}: all at least 1")
    if not Path(args.input).is_dir() or not load(args.input):
        raise UserError(f"--input {args.input}: expected a folder with documents, train/ and validation/ inside")
    with tempfile.TemporaryDirectory() as links:
        for i in range(args.repeat if args.repeat > 1 else 0):
            for path, split in sources.find_files([args.input]):
                link = Path(links) / f"{i:04d}" / str(split) / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        folder = links if args.repeat > 1 else args.input
        for n in args.workers:
            rows = [(*raw_rate(args.input, n), *command_rate(folder, n)) for _ in range(args.rounds)]
            raw, _, whole, _, peak = (median(column) for column in zip(*rows, strict=True))
            ratios, per_processor = sorted(r[2] / r[0] for r in rows), sorted(r[3] / r[1] for r in rows)
            print(json.dumps({"workers": n, "encode alone, M tokens/s": round(raw / 1e6, 2),
                              "command, M tokens/s": round(whole / 1e6, 2), "ratio": round(median(ratios), 3),
                              "ratios": [round(r, 3) for r in ratios],
                              "ratio per processor time": round(median(per_processor), 3),
                              "peak MB": round(peak)}), flush=True)
    times, encode, texts = steps(args.input), plain(), [document.text for document in load(args.input)]
    begin = time.perf_counter()
    for text in texts:
        encode(text)
    alone = time.perf_counter() - begin
    for name, seconds in times.items():
        print(f"{name:<22}{seconds:8.2f} s {seconds / sum(times.values()):7.1%}")
    print(f"plain tiktoken takes {alone:.2f} s to tokenise")


if __name__ == "__main__":
    run(main)
