"""Documents to token shards: each document goes to its domain, meta.redpajama_set_name.

    python prepare_slimpajama.py --source files --input SlimPajama-627B --out data/slimpajama
    python prepare_slimpajama.py --source hub --dataset DKYoon/SlimPajama-6B --out data/slimpajama
    python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample  # seconds
    python prepare_slimpajama.py --source hub --dataset HuggingFaceFW/fineweb --name sample-10BT \\
        --tokenizer llama/tokenizer.json --out data/fineweb
    python prepare_slimpajama.py --source files --input fineweb \\
        --schema text=text,constant=fineweb --out data/fineweb
    python prepare_slimpajama.py --verify data/slimpajama  # read everything again

Writes OUT/<domain>/{train,val}_00000.npy: the tokens of each document followed by end-of-text, as
uint16, or uint32 for a vocabulary above 65,536. The number is that of a unit of the input, so the
shards do not depend on --workers, --part or interruptions. OUT/manifest.json is written last: if it
exists, the data is complete.

After an interruption, the same command goes on where it stopped. On several machines, run
--part 1/4 to --part 4/4 with one folder (or with folders that are then copied into one), and then
--merge.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import (
    FIRST_EXCEPTION,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH

import files
from cli import Parser, Progress, UserError, nearest, run
from corpus import documents as sources
from corpus import fast, units
from corpus import sample as sample_corpus
from corpus import tokenizer as tokenizers
from corpus.documents import Segment
from corpus.hf_tokenizer import find_copy
from corpus.inputs import SUFFIXES
from corpus.manifest import (
    DOMAINS,
    PREPARING,
    SCHEMA,
    TOKENIZER,
    all_shards,
    dtype_for,
    read_manifest,
)
from corpus.plan import (
    Plan,
    differences,
    label_of,
    make_units,
    open_plan,
    parse_splits,
    shard_files,
    total_size,
)
from corpus.verify import table, verify

# For estimates: so many segments are read, so much text of each, of which one byte in so many is
# tokenized.
SAMPLES = 32
SAMPLE_BYTES = 8 << 20
TOKENIZED = 32

SPAWN = multiprocessing.get_context("spawn")


# Flags and settings


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_source_flags(parser)
    add_output_flags(parser)
    add_execution_flags(parser)
    args = parser.parse_args()
    for name, lowest, highest in (
        ("shard_tokens", 1, 2**40),
        ("workers", 1, 4096),
        ("skip_bad", 0, 2**40),
        ("max_tokens_per_domain", 1, 2**63),
    ):
        check_range(name, getattr(args, name), lowest, highest)
    if args.verify is not None:
        return args
    if not args.out:
        raise UserError("--out is needed (--help lists all flags)")
    if not args.source and not args.merge:
        raise UserError("--source is needed (--help lists all flags)")
    if not args.merge and (args.source == "files") != bool(args.input):
        raise UserError("--source files needs --input PATH ..., and the other sources take none")
    if args.name and args.source != "hub":
        raise UserError(f"--name {args.name}: only a dataset of the hub has one; leave it out")
    if not args.split and args.source != "hub":
        args.split = "train=train,val=validation"
    return args


def add_source_flags(parser: Parser) -> None:
    group = parser.add_argument_group("Source", "Which documents are prepared.")
    add = group.add_argument
    add("--source", choices=("sample", "files", "hub"), help="where the documents come from")
    add(
        "--input",
        nargs="+",
        metavar="PATH",
        help=f"with --source files: files ({', '.join(SUFFIXES)}), folders or glob patterns",
    )
    add(
        "--dataset",
        default="DKYoon/SlimPajama-6B",
        help="with --source hub: name, or a local folder laid out like one (default: %(default)s)",
    )
    add("--name", help="with --source hub: a part that the dataset names, such as sample-10BT")
    add("--revision", help="with --source hub: branch, tag or commit of the dataset")
    add("--seed", type=int, default=0, help="with --source sample: of the corpus (default: 0)")
    add(
        "--split",
        help="the source's names for our two splits (default: train=train,val=validation; with "
        "--source hub: train=train,val=test, or val=hash where it has only train); where it has no "
        "validation, train=train,val=hash "
        f"holds out one training document in {sources.HELD_OUT}, by a hash of its text",
    )
    add(
        "--schema",
        help="another corpus: text=FIELD,domain=FIELD or text=FIELD,constant=DOMAIN; dots lead "
        "into nested fields (default: text=text,domain=meta.redpajama_set_name)",
    )
    add("--domains", metavar="A,B", help="prepare only these domains (default: all)")
    add(
        "--holdout",
        metavar="A,B",
        help="prepare these domains for validation only, for out-of-domain evaluation",
    )
    add(
        "--max_tokens_per_domain",
        type=int,
        metavar="N",
        help="end each domain's training data before it exceeds N tokens",
    )
    add(
        "--dedup",
        action="store_true",
        help="drop documents with the same text as an earlier one; reads the input twice",
    )
    add(
        "--skip_bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N broken records (default: stop at the first)",
    )


def add_output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("Output", "What is written, and where.")
    add = group.add_argument
    add("--out", help="folder to write")
    add(
        "--tokenizer",
        default="gpt2",
        metavar="NAME_OR_PATH",
        help="gpt2, bytes (257 symbols, for tiny models on a CPU), or a tokenizer.json of Hugging "
        "Face's or its folder, of which OUT keeps a copy (default: gpt2)",
    )
    add(
        "--eot",
        metavar="TOKEN",
        help="with a tokenizer.json: the token that ends a text, where neither the file nor "
        "tokenizer_config.json beside it says so",
    )
    add(
        "--shard_tokens",
        type=int,
        default=100_000_000,
        help="most tokens per shard (default: %(default)s)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="begin anew: delete what an earlier preparation wrote to --out",
    )


def add_execution_flags(parser: Parser) -> None:
    group = parser.add_argument_group("Execution", "How it is done; the shards stay the same.")
    add = group.add_argument
    add(
        "--workers",
        type=int,
        default=available_cores(),
        help="processes, each with up to 700 MB of memory "
        "(default: one for each core, on this machine %(default)s)",
    )
    add(
        "--part",
        metavar="K/M",
        help="prepare only the K-th of M parts; all with one --out, or copied into one later",
    )
    add("--merge", action="store_true", help="write the manifest of --out once all parts are done")
    add(
        "--dry_run",
        action="store_true",
        help="print what would be read, and estimate tokens, disk and time",
    )
    add(
        "--verify",
        metavar="DIR",
        help="only compare a prepared folder with its manifest: tokens, documents, bytes, sha256",
    )


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return 1


def check_range(name: str, value: int | None, lowest: int, highest: int) -> None:
    """UserError where a flag's number is too small or too large."""
    if value is None:
        return
    if value < lowest:
        raise UserError(f"--{name} {value}: must be at least {lowest}")
    if value > highest:
        raise UserError(f"--{name} {value}: must be at most {highest:,}")


def parse_domains(flag: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """ "c4,cc" -> ["c4", "cc"]; UserError for an unknown domain."""
    if not text:
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(
                f"--{flag} {text}: no domain {name!r}{nearest(name, known)} "
                f"(known: {', '.join(known)})"
            )
    return names


def parse_part(text: str | None) -> tuple[int, int]:
    """ "2/4" -> (2, 4); without the flag (1, 1)."""
    k, _, m = (text or "1/1").partition("/")
    if not (k.isdecimal() and m.isdecimal() and 1 <= int(k) <= int(m) <= 100_000):
        raise UserError(f"--part {text}: expected K/M with K from 1 to M, at most 100,000")
    return int(k), int(m)


def make_settings(args: argparse.Namespace) -> dict:
    """What the shards depend on besides inputs and tokenizer: the manifest's "source"."""
    if args.source == "hub":
        fill_in_from_hub(args)
    parse_splits(args.split)
    schema = sources.parse_schema(args.schema)
    known = (schema.constant,) if schema.constant else DOMAINS
    domains = parse_domains("domains", args.domains, known)
    holdout = parse_domains("holdout", args.holdout, known)
    absent = [domain for domain in holdout if domain not in domains]
    if domains and absent:
        raise UserError(
            f"--holdout {args.holdout}: {', '.join(absent)} is not in --domains {args.domains}"
        )
    if args.max_tokens_per_domain and args.part:
        raise UserError(
            "--max_tokens_per_domain counts from the first document on, so it takes no --part"
        )
    if args.overwrite and args.part:
        raise UserError(
            "--overwrite would delete the other parts too: use it without --part, "
            "or delete the folder"
        )
    settings = {"source": args.source}
    if args.source == "sample":
        settings |= {"seed": args.seed, "note": sample_corpus.NOTE}
    elif args.source == "files":
        settings |= {"input": args.input}
    else:
        settings |= {"dataset": args.dataset, "revision": args.revision}
        if args.name:
            settings["name"] = args.name
    return settings | {
        "split": args.split,
        "schema": list(schema),
        "domains": domains,
        "holdout": holdout,
        "max_tokens_per_domain": args.max_tokens_per_domain,
        "dedup": args.dedup,
        "shard_tokens": args.shard_tokens,
    }


def fill_in_from_hub(args: argparse.Namespace) -> None:
    """--split and --schema where they were not given, by what the dataset has; prints them."""
    dataset = sources.Dataset(args.dataset, args.name, args.revision)
    if not args.split:
        only_train = sources.split_names(dataset) == ["train"]
        args.split = f"train=train,val={sources.HASH if only_train else 'test'}"
        if only_train:
            print(
                f"{args.dataset} has only train: one document in {sources.HELD_OUT} is for "
                "validation, by a hash of its text"
            )
    if not args.schema and not sources.has_domains(dataset, parse_splits(args.split)):
        domain = sources.domain_of_dataset(args.dataset)
        args.schema = f"text=text,constant={domain}"
        print(f"{args.dataset} names no domains: all of it is domain {domain} (see --schema)")


# Estimates


def estimate(
    settings: dict, segments: list[Segment], encode: Callable[[str], np.ndarray]
) -> tuple[float, float, float]:
    """(bytes of text and tokens per byte on disk, bytes of text per second and core).

    From the beginnings of some segments, each of which stands for those up to the next one: text
    of one domain may be compressed three times as far as that of another.
    """
    size = total_size(segments)
    text = tokens = seconds = 0.0
    encoded = 0
    step = math.ceil(len(segments) / SAMPLES)
    for first in range(0, len(segments), step):
        stratum = total_size(segments[first : first + step])
        sample = read_beginning(settings, segments[first])
        start = time.perf_counter()
        n_tokens = sum(len(encode(beginning)) + 1 for beginning in sample.texts)
        seconds += time.perf_counter() - start
        n_bytes = sum(len(beginning.encode()) for beginning in sample.texts)
        stratum_text = stratum * sample.text / max(sample.disk, 1)
        text += stratum_text
        tokens += stratum_text * n_tokens / max(n_bytes, 1)
        encoded += n_bytes
    return text / size, tokens / size, encoded / max(seconds, 1e-9)


class Sample(NamedTuple):
    """What was read of a segment for an estimate."""

    disk: int  # bytes on disk
    text: int  # bytes of text in them, of the domains that are prepared
    texts: list[str]  # beginnings of documents, to be tokenized


def read_beginning(settings: dict, segment: Segment) -> Sample:
    """Up to SAMPLE_BYTES of a segment's text."""
    schema = sources.Schema(*settings["schema"])
    wanted = settings["domains"]
    n_read = n_wanted = n_taken = 0
    texts = []
    for position, _, item in sources.read(settings, segment):
        try:
            document = sources.to_document(item, None, schema, {})
        except sources.BadRecord:
            continue
        n_bytes = len(document.utf8)
        n_read += n_bytes
        if not wanted or document.domain in wanted:
            n_wanted += n_bytes
            if n_taken <= n_wanted // TOKENIZED:
                texts.append(str(document.utf8[: 1 << 16], "utf-8", "ignore"))
                n_taken += min(n_bytes, 1 << 16)
        if n_read > SAMPLE_BYTES:
            return Sample(position, n_wanted, texts)
    return Sample(segment.size, n_wanted, texts)


def free_space(out: Path) -> int:
    """Bytes that are free on the disk where `out` is or will be."""
    folders = (out, *out.absolute().parents)
    existing = next(folder for folder in folders if folder.exists())
    return shutil.disk_usage(existing).free


def check_disk(out: Path, needed: float) -> None:
    """UserError if `needed` bytes do not fit."""
    free = free_space(out)
    if free < needed:
        raise UserError(
            f"--out {out}: the shards need about {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB "
            "are free there; make room or choose another --out (--max_tokens_per_domain or "
            "--domains take less)"
        )


def print_plan(
    own_units: list[list[Segment]],
    rates: tuple[float, float, float] | None,
    workers: int,
    itemsize: int,
) -> None:
    """What --dry_run prints: the files, and what is known of the result."""
    sizes = Counter()
    n_segments = 0
    for unit in own_units:
        n_segments += len(unit)
        for segment in unit:
            sizes[segment.path] += segment.size
    for path, size in sizes.items():
        print(f"{size:>16,} bytes  {path}")
    size = sizes.total()
    print(
        f"{n_segments:,} segments of {len(sizes):,} files in {len(own_units):,} units, "
        f"{size / 1e9:,.3f} GB on disk"
    )
    if rates:
        text_rate, token_rate, speed = rates
        minutes = size * text_rate / speed / workers / 60
        shards = size * itemsize * token_rate
        print(
            f"about {size * text_rate / 1e9:,.3f} GB of text, "
            f"{size * token_rate / 1e6:,.1f}M tokens, {shards / 1e9:,.3f} GB of "
            f"shards, {minutes:,.1f} minutes with {workers} workers"
        )


# From units to shards


class Crew(NamedTuple):
    """The workers of a part."""

    n: int
    lock_path: Path  # each process keeps it locked while it lives
    allowed_bad: int  # broken records that may be left out
    n_bad: int  # those that earlier attempts left out


def prepare_part(plan: Plan, k: int, args: argparse.Namespace, rate: float) -> None:
    """Complete all units of the k-th part, whatever state they are in.

    rate: bytes of shards per byte of input; 0: unknown.
    """
    own_units = plan.part(k)
    states = [plan.state(unit) for unit in own_units]
    remove_leftovers(plan, own_units)
    lock_path = plan.folder / f"lock_workers_{k}"
    files.lock(lock_path, f"{plan.out}: workers of a killed preparation still end", wait=30).close()
    dedup = plan.settings["dedup"]
    limit = plan.settings["max_tokens_per_domain"]
    workers = args.workers
    if limit and (args.skip_bad or dedup):
        workers = 1  # or the counts would depend on how far the others read beyond the limit
    n_bad = sum(len(state["bad"]) for state in states)
    crew = Crew(workers, lock_path, args.skip_bad, n_bad)
    if dedup:
        drop_duplicates(plan, own_units, crew)
    unfinished = [unit for unit, state in zip(own_units, states, strict=True) if not state["done"]]
    if unfinished:
        title = f"{plan.settings['source']} -> {plan.tokenizer['name']}"
        total = plan.size(own_units)
        with progress_bar(title, total, total - plan.size_left(own_units)) as bar:
            run_units(plan, units.work, unfinished, crew, bar, 0 if limit else rate)
    while limit:
        overshot = units.count_taken(plan, len(plan.units)).overshot
        if overshot is None:
            break
        plan.state_path(overshot).unlink()  # again, now that the units before it are done
        with progress_bar(f"unit {overshot} up to the limit", plan.size([overshot])) as bar:
            run_units(plan, units.work, [overshot], crew, bar)


def remove_leftovers(plan: Plan, own_units: range) -> None:
    """Delete an earlier preparation's shards: of units that have not begun, or do not exist now."""
    for path in shard_files(plan.out):
        unit = int(path.name.split("_")[1].split(".")[0])
        has_begun = unit not in own_units or plan.state_path(unit).exists()
        if unit >= len(plan.units) or not has_begun:
            path.unlink()


def drop_duplicates(plan: Plan, own_units: range, crew: Crew) -> None:
    """Find out which documents of a part are duplicates, if it is not known yet."""
    missing = {unit for unit in own_units if not plan.dropped_path(unit).exists()}
    if not missing:
        return
    # The hashes of all units are needed. Other parts begin with theirs.
    others = [unit for unit in range(len(plan.units)) if unit not in own_units]
    todo = [*own_units, *others]
    with progress_bar("looking for duplicates", plan.size(todo)) as bar:
        run_units(plan, units.write_hashes, todo, crew, bar)
    units.find_duplicates(plan, missing)


def progress_bar(title: str, total: int, done: int = 0) -> Progress:
    return Progress(total=total or None, initial=done, unit="B", unit_scale=True, desc=title)


def run_units(
    plan: Plan,
    work: Callable[[Path, int], None],
    todo: list[int],
    crew: Crew,
    bar: Progress,
    rate: float = 0.0,
) -> None:
    """Call work(out, unit) for each unit in several processes; a worker's UserError stops all.

    rate: bytes of shards per byte of input, to see early if the disk is too small; 0: unknown.
    """
    shared = units.Shared(SPAWN, crew.allowed_bad, crew.n_bad)
    tokenizer = plan.tokenizer if work == units.work else None
    pool = start_pool(plan.out, tokenizer, min(crew.n, len(todo)), crew.lock_path, shared)
    try:
        # Workers inherit the blocked signal from their first moment on. So Ctrl-C reaches only the
        # parent, which asks them to stop.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        unit_of = {pool.submit(work, plan.out, unit): unit for unit in todo}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        wait_for_units(unit_of, shared, bar, plan.out, rate)
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for lack of memory; run the same command again to go on, "
            "with fewer --workers"
        ) from None
    finally:
        shared.stop.set()
        pool.shutdown(cancel_futures=True)


def start_pool(
    out: Path, tokenizer: dict | None, n: int, lock_path: Path, shared: units.Shared
) -> Executor:
    """tokenizer: the manifest's entry; None for work that needs none."""
    if n == 1:  # a thread of this process: a second process would only take time to start
        arguments = (shared, tokenizer, out, None)
        return ThreadPoolExecutor(1, initializer=units.start_worker, initargs=arguments)
    arguments = (shared, tokenizer, out, lock_path)
    return ProcessPoolExecutor(n, SPAWN, initializer=units.start_worker, initargs=arguments)


def wait_for_units(
    unit_of: dict[Future, int], shared: units.Shared, bar: Progress, out: Path, rate: float
) -> None:
    """Wait until all units are done, with the bar and the free disk space watched meanwhile."""
    start = disk_checked = time.monotonic()
    done_before = bar.n
    pending = set(unit_of)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in sorted(done, key=unit_of.get):
            future.result()  # raises the worker's error: of several, the first in the source
        n_read, text, tokens, _ = shared.counters
        now = time.monotonic()
        seconds = now - start
        rates = f"text {text / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s"
        bar.set_postfix_str(rates, refresh=False)
        bar.update(done_before + n_read - bar.n)
        if rate and bar.total and now - disk_checked > 5:
            disk_checked = now
            check_disk(out, (bar.total - bar.n) * rate * 0.9)


# The folder as a whole


def is_complete(out: Path, settings: dict, tokenizer: dict) -> bool:
    """Whether the folder has this data, which is then reported; UserError if it has other data."""
    if not (out / "manifest.json").exists():
        return False
    manifest = read_manifest(out)
    difference = differences(
        {**manifest["source"], "tokenizer": label_of(manifest["tokenizer"])},
        {**settings, "tokenizer": label_of(tokenizer)},
    )
    if not difference and manifest["tokenizer"]["sha256"] != tokenizer["sha256"]:
        difference = "another version of the tokenizer"
    if difference:
        raise UserError(
            f"{out} holds other data: {difference}; choose another --out, "
            "or begin anew with --overwrite"
        )
    print_complete(out, manifest)
    return True


def print_complete(out: Path, manifest: dict) -> None:
    print(f"{out} is complete already; nothing to do\n{table(manifest['domains'])}")


def delete(out: Path) -> None:
    """Delete what an earlier preparation wrote.

    The manifest goes first, so that what is left never counts as complete.
    """
    (out / "manifest.json").unlink(missing_ok=True)
    for path in shard_files(out):
        path.unlink()
    for path in (out / PREPARING).glob("*"):
        if not path.name.startswith("lock"):
            path.unlink()
    shutil.rmtree(out / TOKENIZER, ignore_errors=True)


def finish(plan: Plan) -> None:
    """Write the manifest of all units and remove what only the preparation needed."""
    content = units.summary(plan)
    domains = content["domains"]
    if not domains:
        raise UserError("the source holds no document")
    manifest = {
        "schema": SCHEMA,
        "tokenizer": plan.tokenizer,
        "dtype": dtype_for(plan.tokenizer["n_vocab"]),
        "source": plan.settings,
        **content,
    }
    listed = {shard["file"] for shard in all_shards(domains)}
    for path in shard_files(plan.out):
        name = path.relative_to(plan.out).as_posix()
        if name.replace(".kinds", "") not in listed:  # it is beyond the limit of tokens
            path.unlink()
    files.write_text(plan.out / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(plan.folder, ignore_errors=True)
    print(table(domains))
    for domain, n in content.get("duplicates", {}).items():
        print(f"duplicates dropped in {domain}: {n:,}")
    if "skipped" in content:
        print(f"broken records left out: {len(content['skipped'])} (listed in the manifest)")
    note = f" ({sample_corpus.NOTE})" if plan.settings["source"] == "sample" else ""
    print(f"written to {plan.out}{note}")


def merge(out: Path) -> None:
    """Write the manifest of a folder whose parts are all done."""
    if (out / "manifest.json").exists():
        print_complete(out, read_manifest(out))
        return
    if not (out / PREPARING / "plan.json").is_file():
        raise UserError(f"--merge: no parts in {out}; make them with --part 1/M to --part M/M")
    plan = Plan(out)
    states = [plan.state(unit) for unit in range(len(plan.units))]
    missing = {i % plan.parts + 1 for i, state in enumerate(states) if not state["done"]}
    if missing:
        parts = ", ".join(map(str, sorted(missing)))
        raise UserError(
            f"--merge: part {parts} of {plan.parts} in {out} is not done; run it: "
            f"--part {min(missing)}/{plan.parts}"
        )
    name, sha256 = plan.tokenizer["name"], plan.tokenizer["sha256"]
    if name not in tokenizers.NAMES and find_copy(out, sha256) is None:
        raise UserError(
            f"--merge: {out / TOKENIZER} is missing or another tokenizer's; copy it from one of "
            "the parts"
        )
    for state in states:
        for writer in state["writers"].values():
            for shard in writer["shards"]:
                check_copied(out / shard["file"], shard["file_bytes"])
    finish(plan)


def check_copied(path: Path, size: int) -> None:
    """UserError if a shard of a part is missing or incomplete."""
    if not path.is_file() or path.stat().st_size != size:
        raise UserError(
            f"--merge: {path} is missing or cut short; copy it again, "
            "or begin anew with --overwrite"
        )


def prepare(args: argparse.Namespace) -> None:
    """Prepare all of the source or one part: check everything, then write."""
    out = Path(args.out)
    settings = make_settings(args)
    k, n_parts = parse_part(args.part)
    tokens = None  # of a file: gpt2 and bytes are known without being opened
    if args.tokenizer not in tokenizers.NAMES or args.eot is not None:
        tokens = tokenizers.load(args.tokenizer, args.eot)
    file = tokens.file if tokens else None
    tokenizer = tokenizers.entry_of(tokens) if tokens else tokenizers.describe(args.tokenizer)
    if not args.overwrite and is_complete(out, settings, tokenizer):
        return
    all_units = make_units(settings)
    own_units = all_units[k - 1 :: n_parts]
    segments = [segment for unit in own_units for segment in unit]
    size = total_size(segments)
    print(fast.describe(tokenizer, file))
    rates = None
    # Compressed text grows at most tenfold, and has hardly more than one token per byte.
    itemsize = np.dtype(dtype_for(tokenizer["n_vocab"])).itemsize
    if size and (args.dry_run or 15 * itemsize * size > free_space(out)):
        rates = estimate(settings, segments, fast.make_encoder(tokenizer, file).encode)
    elif segments and settings["source"] == "files":
        # Fail at a wrong --schema or file before a plan is written that remembers it.
        next(sources.read(settings, segments[0]), None)
    if args.dry_run:
        print_plan(own_units, rates, args.workers, itemsize)
        return
    rate = itemsize * rates[1] if rates else 0.0
    try:
        (out / PREPARING).mkdir(parents=True, exist_ok=True)
        name = f"lock_{k}" if args.part else "lock"
        with files.lock(out / PREPARING / name, f"{out}: another preparation writes there"):
            if args.overwrite:
                for path in (out / PREPARING).glob("lock_[0-9]*"):  # no part may be running
                    files.lock(path, f"{out}: a part is prepared there").close()
                delete(out)
            elif is_complete(out, settings, tokenizer):  # another process has just finished it
                shutil.rmtree(out / PREPARING)
                return
            plan = open_plan(out, settings, tokenizer, n_parts, all_units)
            if tokens:
                tokenizers.copy_to(out, tokens)
            write(plan, k, args, rate)
    except OSError as error:
        if error.errno in files.NO_ROOM:
            raise units.no_room(out, error) from None
        raise UserError(
            f"--out {out}: {error.strerror or error}; give a folder that can be written"
        ) from None


def write(plan: Plan, k: int, args: argparse.Namespace, rate: float) -> None:
    """Write the shards of the k-th part, and the manifest if it is the only one."""
    left = plan.size_left(plan.part(k))
    if args.max_tokens_per_domain:
        # Validation data, which has no limit, is checked while it is written.
        itemsize = np.dtype(dtype_for(plan.tokenizer["n_vocab"])).itemsize
        most = itemsize * args.max_tokens_per_domain * len(plan.trained)
        left = min(left, most / max(rate, 1e-9))
    check_disk(plan.out, left * rate * 0.9)
    prepare_part(plan, k, args, rate)
    if args.part:
        print(
            f"part {args.part} is done; when all are: "
            f"python prepare_slimpajama.py --merge --out {plan.out}"
        )
    else:
        finish(plan)


def main() -> None:
    args = parse_args()
    if args.verify is not None:
        verify(Path(args.verify), args.workers)
    elif args.merge:
        merge(Path(args.out))
    else:
        prepare(args)


if __name__ == "__main__":
    run(main)
