"""How fast text becomes shards, against nanoGPT's script and datatrove on the same files.

    git clone https://github.com/karpathy/nanoGPT
    pip install datatrove zstandard
    python scripts/bench.py prepare_peers --input mini_slimpajama --nanogpt \\
        nanoGPT/data/openwebtext/prepare.py

All make tokens of gpt2 from the same JSON lines, in as many processes, and take turns: whole
commands, start and end included. Prints tokens per second, ours over theirs in the same round, and
the peak memory of the largest process. Ours also sorts by domain, hashes and verifies.

nanoGPT's script is run as it is, but for four things: the files in place of the hub's data set, the
number of processes, no more batches than documents where it writes, and a gpt2 for tiktoken that
needs no internet. datatrove, which prepared FineWeb, reads and tokenizes with its defaults, each
file a task.
"""

import runpy
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from cli import UserError
from corpus import documents, fast, tokenizer
from scripts.benchmarks.common import new_parser, table_row
from scripts.benchmarks.prepare import Rate, make_copies, run_command, timed


def main(argv: list[str]) -> None:
    parser = new_parser("prepare_peers", __doc__)
    parser.add_argument(
        "--input", required=True, help="SlimPajama's schema, train/ and validation/ inside"
    )
    parser.add_argument(
        "--nanogpt", type=Path, required=True, help="nanoGPT's data/openwebtext/prepare.py"
    )
    parser.add_argument("--repeat", type=int, default=1, help="copies of the input (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--only", choices=PEERS, help="run this one, into the folder --out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if min(args.repeat, args.rounds, args.workers) < 1:
        raise UserError(
            f"--repeat {args.repeat} --rounds {args.rounds} --workers {args.workers}: "
            "all at least 1"
        )
    if not args.nanogpt.is_file():
        raise UserError(f"--nanogpt {args.nanogpt}: no such file; give nanoGPT's prepare.py")
    if not find_spec("datatrove"):
        raise UserError("datatrove is not installed: pip install datatrove")
    if args.only:
        return PEERS[args.only](args.input, args.out, args.workers, args.nanogpt.resolve())
    with tempfile.TemporaryDirectory() as folder:
        make_copies(args.input, Path(folder), args.repeat)
        print_table(folder, args.nanogpt.resolve(), args.workers, args.rounds)


def print_table(folder: str, nanogpt: Path, n: int, rounds: int) -> None:
    """Rates of each one over the rounds; the first is ours."""
    names = ("ours", *PEERS)
    rates, peaks = {name: [] for name in names}, {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            if name == "ours":
                rate, peak = run_command(folder, n)
            else:
                rate, peak = run_peer(name, folder, nanogpt, n)
            # Not by processor time: that of datatrove's workers cannot be read afterwards.
            rates[name].append(rate.wall)
            peaks[name].append(peak)
    print(table_row(["", "M tokens/s", "ours / theirs", "peak MB"]))
    print("|---|--:|--:|--:|")
    for name, own in rates.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(rates["ours"], own, strict=True))
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed = f"{median(own) / 1e6:.2f}"
        print(table_row([name, speed, ratio, f"{median(peaks[name]):.0f}"]))


def run_peer(name: str, folder: str, nanogpt: Path, n: int) -> tuple[Rate, float]:
    """The rate of a peer's whole command, and its peak in MB."""
    with tempfile.TemporaryDirectory() as out:
        command = ["scripts/bench.py", "prepare_peers", "--input", folder, "--only", name]
        command += ["--nanogpt", str(nanogpt), "--out", out, "--workers", str(n)]
        return timed(command, lambda: tokens_of_two_bytes(Path(out)))


def tokens_of_two_bytes(out: Path) -> int:
    """Tokens in the files that a peer has written: nanoGPT's *.bin, datatrove's *.ds."""
    files = [path for path in out.rglob("*") if path.suffix in (".bin", ".ds")]
    return sum(path.stat().st_size for path in files) // 2


def prepare_as_nanogpt(folder: str, out: Path, n: int, script: Path) -> None:
    """Run nanoGPT's script on the files; it writes beside itself, so it is copied to `out`."""
    import datasets
    import tiktoken

    load = datasets.load_dataset
    paths = [str(path) for path, _ in documents.find_files([folder])]

    def load_files(name: str, num_proc: int):
        loaded = load("json", data_files=paths, num_proc=num_proc, cache_dir=str(out / "cache"))
        return loaded.select_columns("text")  # as openwebtext has it

    datasets.load_dataset = load_files
    tiktoken.get_encoding = lambda name: tokenizer.gpt2_encoding()
    text = script.read_text()
    for old, new in (("num_proc = 8", f"num_proc = {n}"), ("= 1024", "= min(1024, len(dset))")):
        assert text.count(old) == 1, f"{script} has changed: no {old}"
        text = text.replace(old, new)
    copy = out / script.name
    copy.write_text(text)
    sys.argv = [str(copy)]
    runpy.run_path(str(copy), run_name="__main__")


def prepare_as_datatrove(folder: str, out: Path, n: int, _: Path) -> None:
    """datatrove's reader and tokenizer, as in its own example."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out.mkdir(parents=True, exist_ok=True)
    tokenizer_json = out / "tokenizer.json"
    tokenizer_json.write_text(fast.gpt2_spec())
    pipeline = [
        JsonlReader(folder),
        DocumentTokenizer(
            str(out / "tokens"),
            str(tokenizer_json),
            local_working_dir=str(out / "local"),
            eos_token="<|endoftext|>",
        ),
    ]
    n_files = len(documents.find_files([folder]))
    LocalPipelineExecutor(pipeline, tasks=n_files, workers=n, logging_dir=str(out / "logs")).run()


Peer = Callable[[str, Path, int, Path], None]  # folder, where to, processes, nanoGPT's script
PEERS: dict[str, Peer] = {"nanogpt": prepare_as_nanogpt, "datatrove": prepare_as_datatrove}
