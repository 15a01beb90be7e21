"""Documents to token shards: each document to its domain by meta.redpajama_set_name, then manifest.json.

    python prepare_slimpajama.py --source files --input SlimPajama-627B --out data/slimpajama --workers 16
    python prepare_slimpajama.py --source hub --dataset DKYoon/SlimPajama-6B --out data/slimpajama
    python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample      # synthetic, in seconds
    python prepare_slimpajama.py --source files --input fineweb --schema text=text,constant=fineweb --out data/fineweb
    python prepare_slimpajama.py --verify data/slimpajama                                 # read everything again

Writes OUT/<domain>/{train,val}_00000.npy: the tokens of each document followed by end-of-text, uint16. The number is
that of a unit of the input, so the shards do not depend on --workers, --part or interruptions. The manifest comes last:
where it is, the data is complete. The same command continues a preparation that was stopped. Several machines:
--part 1/4 to --part 4/4 into one folder (or folders that are copied into one), then --merge.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

import files
import sample_corpus
import tokenizer as tokenizers
from configurator import Parser
from corpus import documents as sources
from corpus import units
from corpus.documents import HELD_OUT, SUFFIXES, Segment
from corpus.verify import table, verify
from errors import UserError, nearest, run
from manifest import DOMAINS, SCHEMA, read_manifest

MAX_UNITS = 256           # of a small corpus; a large one has units of MAX_UNIT
MIN_UNIT, MAX_UNIT = 4 << 20, 512 << 20  # bytes on disk
MAX_SEGMENT = 32 << 20    # bytes on disk


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", choices=("sample", "files", "hub"), help="where the documents come from")
    add("--input", nargs="+", metavar="PATH", help=f"files: {', '.join(SUFFIXES)}; folders; glob patterns")
    add("--dataset", default="DKYoon/SlimPajama-6B", help="hub: name, or a folder laid out so (default: %(default)s)")
    add("--revision", help="hub: branch, tag or commit of the dataset")
    add("--split", help="our splits from the source's (default: train=train,val=validation; hub: train=train,val=test)")
    add("--schema", help="another corpus: text=FIELD,domain=FIELD or text=FIELD,constant=DOMAIN; dots lead into nested "
        "fields (default: text=text,domain=meta.redpajama_set_name)")
    add("--domains", metavar="A,B", help="only these domains (default: all)")
    add("--holdout", metavar="A,B", help="domains that are prepared for validation only: out-of-domain evaluation")
    add("--max_tokens_per_domain", type=int, metavar="N", help="stop each domain's training data before it exceeds N")
    add("--dedup", action="store_true", help="drop documents whose text an earlier one has; reads the input twice")
    add("--skip_bad", type=int, default=0, metavar="N",
        help="leave out up to N broken records (default: stop there)")
    add("--tokenizer", choices=tokenizers.NAMES, default="gpt2", help="bytes: 257 symbols, for a CPU (default: gpt2)")
    add("--out", help="folder to write")
    add("--shard_tokens", type=int, default=100_000_000, help="most tokens per shard (default: %(default)s)")
    add("--seed", type=int, default=0, help="sample: of the corpus (default: 0)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        help="processes, each with up to 700 MB of memory (default: one for each core, here %(default)s)")
    add("--part", metavar="K/M", help="prepare the K-th of M parts only; all parts the same --out or copied into one")
    add("--merge", action="store_true", help="write the manifest of --out, whose parts are all there")
    add("--overwrite", action="store_true", help="begin anew: delete what is in --out of an earlier preparation")
    add("--dry_run", action="store_true", help="say what would be read, and estimate tokens, disk and time")
    add("--verify", metavar="DIR", help="read a prepared folder again: sizes, sha256, tokens, documents, bytes")
    args = parser.parse_args()
    for name, least, most in (("shard_tokens", 1, 2**40), ("workers", 1, 4096), ("skip_bad", 0, 2**40),
                              ("max_tokens_per_domain", 1, 2**63)):
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            allowed = f"at most {most:,}" if value > most else f"at least {least}"
            raise UserError(f"--{name} {value}: must be {allowed}")
    if args.verify is not None:
        return args
    if not args.out or not (args.source or args.merge):
        raise UserError(f"{'--source' if args.out else '--out'} is needed (--help lists all flags)")
    if not args.merge and (args.source == "files") != bool(args.input):
        raise UserError("--source files needs --input PATH ..., and the other sources take none")
    args.split = args.split or ("train=train,val=test" if args.source == "hub" else "train=train,val=validation")
    return args


def parse_split_map(text: str) -> dict[str, str]:
    """"train=train,val=test" -> {"train": "train", "val": "test"}: our splits from the source's."""
    pairs = dict(part.split("=", 1) for part in text.split(",") if part.count("=") == 1)
    if not pairs or len(pairs) != text.count(",") + 1 or not set(pairs) <= {"train", "val"} or (
            len(set(pairs.values())) < len(pairs)):
        raise UserError(f"--split {text}: expected two different splits of the source as train=NAME,val=NAME, or one")
    return pairs


def parse_domains(flag: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """"c4,cc" -> ["c4", "cc"]; UserError for a domain that cannot be there."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in known:
            raise UserError(f"--{flag} {text}: no domain {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return names


def parse_part(text: str | None) -> tuple[int, int]:
    """"2/4" -> (2, 4); without one (1, 1)."""
    k, _, m = (text or "1/1").partition("/")
    if not (k.isdecimal() and m.isdecimal() and 1 <= int(k) <= int(m) <= 100_000):
        raise UserError(f"--part {text}: expected K/M with K from 1 to M, at most 100,000")
    return int(k), int(m)


def settings_of(args: argparse.Namespace) -> dict:
    """What the shards depend on, beside the inputs and the tokenizer; the manifest's "source"."""
    parse_split_map(args.split)
    schema = sources.parse_schema(args.schema)
    known = (schema.constant,) if schema.constant else DOMAINS
    source = {"sample": {"seed": args.seed, "note": sample_corpus.NOTE}, "files": {"input": args.input},
              "hub": {"dataset": args.dataset, "revision": args.revision}}[args.source]
    domains, holdout = (parse_domains(flag, getattr(args, flag), known) for flag in ("domains", "holdout"))
    if wrong := [d for d in holdout if domains and d not in domains]:
        raise UserError(f"--holdout {args.holdout}: {', '.join(wrong)} is not in --domains {args.domains}")
    if args.max_tokens_per_domain and args.part:
        raise UserError("--max_tokens_per_domain counts from the first document on, so it takes no --part")
    if args.overwrite and args.part:
        raise UserError("--overwrite would delete the other parts too: use it without --part, or delete the folder")
    return {"source": args.source, **source, "split": args.split, "schema": list(schema), "domains": domains,
            "holdout": holdout, "max_tokens_per_domain": args.max_tokens_per_domain, "dedup": args.dedup,
            "shard_tokens": args.shard_tokens}


def differences(there: dict, here: dict) -> str:
    """"shard_tokens 100 there, 200 here" for each setting that is not the same; "" if all are."""
    return "; ".join(f"{key} {there.get(key)} there, {here.get(key)} here"
                     for key in {**there, **here} if there.get(key) != here.get(key))


def choose_files(inputs: list[str], split_map: dict[str, str]) -> list[tuple[Path, str | None]]:
    """The files whose split is asked for; says which are left out."""
    found = sources.find_files(inputs)
    kept = [(path, split) for path, split in found if split is None or split in split_map.values()]
    for name in sorted({split for _, split in found if split} - set(split_map.values())):
        print(f"left out: {sum(split == name for _, split in found)} files of split {name!r} (see --split)")
    seen = {split for _, split in kept}
    if unnamed := sum(split is None for _, split in kept):
        print(f"{unnamed} of {len(kept)} files: no name tells a split; one document in {HELD_OUT} of theirs is for "
              "validation, by a hash of its text")
    if None not in seen and (absent := sorted(set(split_map.values()) - seen)):
        there = ", ".join(sorted({str(split) for _, split in found}))
        raise UserError(f"no file of split {', '.join(absent)} in --input (there: {there}); choose with "
                        "--split train=NAME,val=NAME")
    order = [None, *(split_map[ours] for ours in ("train", "val") if ours in split_map)]
    return sorted(kept, key=lambda file: order.index(file[1]))


def make_units(settings: dict) -> list[list[Segment]]:
    """The source in segments, and these in units: neighbours of one split, up to a size that depends on the whole."""
    split_map = parse_split_map(settings["split"])
    if settings["source"] == "sample":
        return [[Segment("sample", "sample", 0, None, 0)]]
    if settings["source"] == "hub":
        segments = sources.hub_segments(settings["dataset"], settings["revision"],
                                         [split_map[ours] for ours in ("train", "val") if ours in split_map])
        most, weight = -(-len(segments) // MAX_UNITS), lambda segment: 1
    else:
        found = choose_files(settings["input"], split_map)
        total = sum(path.stat().st_size for path, _ in found)
        most, weight = min(max(total // MAX_UNITS, MIN_UNIT), MAX_UNIT), lambda segment: segment.size
        segments = sources.file_segments(found, min(most, MAX_SEGMENT))
    made, held = [], 0
    for segment in segments:
        if not made or held >= most or made[-1][-1].split != segment.split:
            made.append([])
            held = 0
        made[-1].append(segment)
        held += weight(segment)
    return made


def estimate(settings: dict, segments: list[Segment], tokenizer: tokenizers.Tokenizer) -> tuple[float, float, float]:
    """(bytes of text and tokens per byte on disk, bytes of text per second and core) from the begin of 8 segments."""
    schema, disk, size = sources.Schema(*settings["schema"]), 0, 0
    texts: list[str] = []
    for segment in segments[::-(-len(segments) // 8)]:
        read, position = 0, segment.size
        for at, _, item in sources.read(settings, segment):
            try:
                document = sources.to_document(item, None, schema, {})
            except sources.BadRecord:
                continue
            if read < 1 << 16:
                texts.append(str(document.utf8[:1 << 16], "utf-8", "ignore"))
            read += len(document.utf8)
            if read > 2 << 20:
                position = at
                break
        disk, size = disk + position, size + read
    begin = time.perf_counter()
    tokens = sum(len(tokenizer.encode_to_numpy(text)) + 1 for text in texts)
    seconds, sampled = time.perf_counter() - begin, sum(len(text.encode()) for text in texts)
    return size / max(disk, 1), size / max(disk, 1) * tokens / max(sampled, 1), sampled / max(seconds, 1e-9)


def free_space(out: Path) -> int:
    """Bytes that are free where `out` is or will be."""
    return shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free


def check_disk(out: Path, needed: float) -> None:
    """UserError where `needed` bytes do not fit."""
    if (free := free_space(out)) < needed:
        raise UserError(f"--out {out}: the shards need about {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free "
                        "there; make room or choose another --out (--max_tokens_per_domain or --domains take less)")


def run_units(plan: units.Plan, work: Callable, todo: list[int], workers: int, shared: units.Shared, lock: Path,
              bar: tqdm, rate: float) -> None:
    """work(out, unit) for each unit, on several processes; UserError of a worker stops all.

    rate: bytes of shards per byte of input, to see early that the disk will not hold the rest; 0: unknown.
    """
    if workers == 1 or len(todo) == 1:  # in this process: a second one would only take time to start
        pool = ThreadPoolExecutor(1, initializer=units.start_worker, initargs=(shared, plan.tokenizer["name"], None))
    else:
        pool = ProcessPoolExecutor(min(workers, len(todo)), multiprocessing.get_context("spawn"),
                                   initializer=units.start_worker, initargs=(shared, plan.tokenizer["name"], lock))
    begin, checked, start = time.monotonic(), time.monotonic(), bar.n
    try:
        # Workers inherit the block, from their first moment on: Ctrl-C reaches the parent, which asks for a stop.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        unit_of = {pool.submit(work, plan.out, unit): unit for unit in todo}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pending = set(unit_of)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in sorted(done, key=unit_of.get):  # of several errors the first in the source
                future.result()
            n, text, tokens, _ = shared.counters
            seconds = time.monotonic() - begin
            bar.set_postfix_str(f"text {text / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s", False)
            bar.update(start + n - bar.n)
            if rate and bar.total and time.monotonic() - checked > 5:
                checked = time.monotonic()
                check_disk(plan.out, (bar.total - bar.n) * rate * 0.9)
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for lack of memory; run the same command again to go on, with "
                        "fewer --workers") from None
    finally:
        shared.stop.set()
        pool.shutdown(cancel_futures=True)


def prepare(plan: units.Plan, args: argparse.Namespace, part: tuple[int, int], rate: float) -> None:
    """All units of a part to their end."""
    k, m = part
    mine = list(range(k - 1, len(plan.units), m))
    states = {unit: plan.state(unit) for unit in mine}
    for path in units.shard_files(plan.out):  # of units that have not begun: of an earlier preparation
        unit = int(path.name.split("_")[1].split(".")[0])
        if unit in states and not plan.state_path(unit).exists() or unit >= len(plan.units):
            path.unlink()
    context = multiprocessing.get_context("spawn")
    lock = plan.folder / f"lock_workers_{k}"
    files.lock(lock, f"{plan.out}: workers of a killed preparation still end", wait=30).close()
    workers, limit = args.workers, plan.settings["max_tokens_per_domain"]
    if limit and (args.skip_bad or plan.settings["dedup"]):
        workers = 1  # what is counted must not depend on how far others have read beyond the limit

    def go(work: Callable, todo: list[int], what: str, total: int, initial: int = 0) -> None:
        shared = units.Shared(context, args.skip_bad, sum(len(state["bad"]) for state in states.values()))
        with tqdm(total=total or None, initial=initial, unit="B", unit_scale=True, desc=what) as bar:
            run_units(plan, work, todo, workers, shared, lock, bar, rate if work is units.work and not limit else 0)

    def size(some: list[int]) -> int:
        return sum(segment.size for unit in some for segment in plan.units[unit])

    if plan.settings["dedup"] and (missing := [u for u in mine if not plan.dropped_path(u).exists()]):
        rotated = [*mine, *(u for u in range(len(plan.units)) if u not in states)]  # other parts do theirs meanwhile
        go(units.write_hashes, rotated, "looking for duplicates", size(rotated))
        units.find_duplicates(plan, set(missing))
    todo = [unit for unit in mine if not states[unit]["done"]]
    finished = sum(segment.size for unit in mine for segment in plan.units[unit][:states[unit]["segments"]])
    what = f"{plan.settings['source']} -> {plan.tokenizer['name']}"
    if todo:
        go(units.work, todo, what, size(mine), finished)
    while limit and (unit := units.taken(plan, len(plan.units))[2]) is not None:
        plan.state_path(unit).unlink()  # now that those before it are done
        go(units.work, [unit], f"unit {unit} up to the limit", size([unit]))


def finish(plan: units.Plan) -> None:
    """The manifest of all units, and an end to the preparation."""
    content = units.summary(plan)
    if not content["domains"]:
        raise UserError("the source holds no document")
    manifest = {"schema": SCHEMA, "tokenizer": plan.tokenizer, "dtype": "uint16", "source": plan.settings, **content}
    listed = {s["file"] for splits in content["domains"].values() for shards in splits.values() for s in shards}
    for path in units.shard_files(plan.out):  # beyond the limit of tokens
        if path.relative_to(plan.out).as_posix().replace(".kinds", "") not in listed:
            path.unlink()
    files.write_text(plan.out / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(plan.folder, ignore_errors=True)
    print(table(content["domains"]))
    for domain, n in content.get("duplicates", {}).items():
        print(f"duplicates dropped in {domain}: {n:,}")
    if "skipped" in content:
        print(f"broken records left out: {len(content['skipped'])} (listed in the manifest)")
    print(f"written to {plan.out}" + (f" ({sample_corpus.NOTE})" if plan.settings["source"] == "sample" else ""))


def merge(out: Path) -> None:
    """The manifest of a folder whose parts are all done."""
    if (out / "manifest.json").exists():
        print(f"{out} is complete already; nothing to do\n{table(read_manifest(out)['domains'])}")
        return
    if not (out / "preparing" / "plan.json").is_file():
        raise UserError(f"--merge: no parts in {out}; make them with --part 1/M to --part M/M")
    plan = units.Plan(out)
    states = [plan.state(unit) for unit in range(len(plan.units))]
    if missing := sorted({unit % plan.parts + 1 for unit, state in enumerate(states) if not state["done"]}):
        raise UserError(f"--merge: part {', '.join(map(str, missing))} of {plan.parts} in {out} is not done; run it: "
                        f"--part {missing[0]}/{plan.parts}")
    for shard in (s for state in states for writer in state["writers"].values() for s in writer["shards"]):
        path = out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["file_bytes"]:
            raise UserError(f"--merge: {path} is missing or cut short; copy it again, or begin anew with --overwrite")
    finish(plan)


def is_complete(out: Path, settings: dict, tokenizer: dict) -> bool:
    """Whether the data is there; says so. UserError where other data is."""
    if not (out / "manifest.json").exists():
        return False
    there = read_manifest(out)
    differ = differences({**there["source"], "tokenizer": there["tokenizer"]["name"]},
                         {**settings, "tokenizer": tokenizer["name"]})
    if differ or there["tokenizer"] != tokenizer:
        raise UserError(f"{out} holds other data: {differ or 'another version of the tokenizer'}; choose another "
                        "--out, or begin anew with --overwrite")
    print(f"{out} is complete already; nothing to do\n{table(there['domains'])}")
    return True


def open_plan(out: Path, settings: dict, tokenizer: dict, parts: int, made: list[list[Segment]]) -> units.Plan:
    """The plan of a folder: this one, or the same begun earlier; UserError where another was begun."""
    path = out / "preparing" / "plan.json"
    here = {"source": settings, "tokenizer": tokenizer, "parts": parts, "units": made}
    if not path.exists():
        # Parts may start at the same moment: the first link stays, whole.
        temporary = path.with_name(f"plan.json.{os.getpid()}.{time.time_ns()}")
        files.write_text(temporary, json.dumps(here))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    there = units.read_json(path)
    differ = differences({**there["source"], "tokenizer": there["tokenizer"]["name"], "parts": there["parts"]},
                         {**settings, "tokenizer": tokenizer["name"], "parts": parts})
    before, now = ([tuple(segment) for unit in x["units"] for segment in unit] for x in (there, here))
    if not differ and before != now:
        first = next((a or b for a, b in zip([*before, None], [*now, None], strict=False) if a != b), now[-1])
        differ = f"the inputs are not the same as then ({first[0]} was changed, added or removed)"
    if differ:
        raise UserError(f"{out} holds a preparation that was begun with other settings: {differ}; choose another "
                        "--out, or begin anew with --overwrite")
    return units.Plan(out)


def delete(out: Path) -> None:
    """What an earlier preparation wrote; the manifest first, so that what is left never counts as complete."""
    (out / "manifest.json").unlink(missing_ok=True)
    for path in units.shard_files(out):
        path.unlink()
    for path in (out / "preparing").glob("*"):
        if not path.name.startswith("lock"):
            path.unlink()


def main() -> None:
    args = parse_args()
    if args.verify is not None:
        return verify(Path(args.verify), args.workers)
    out = Path(args.out)
    if args.merge:
        return merge(out)
    settings, part = settings_of(args), parse_part(args.part)
    described = tokenizers.describe(args.tokenizer)
    if not args.overwrite and is_complete(out, settings, described):
        return None
    made = make_units(settings)
    mine = made[part[0] - 1::part[1]]
    segments = [segment for unit in mine for segment in unit]
    size, rate = sum(segment.size for segment in segments), 0.0
    # Compressed text grows tenfold at most and has hardly more than a token of two bytes for each of its own.
    if size and (args.dry_run or 30 * size > free_space(out)):
        text_rate, token_rate, speed = estimate(settings, segments, tokenizers.load(args.tokenizer))
        rate = 2 * token_rate
    elif settings["source"] == "files":  # a wrong --schema or file is told before there is a plan that remembers it
        next(sources.read(settings, segments[0]), None)
    if args.dry_run:
        for path in dict.fromkeys(segment.path for segment in segments):
            print(f"{sum(s.size for s in segments if s.path == path):>16,} bytes  {path}")
        print(f"{len(segments):,} segments of {len({s.path for s in segments}):,} files in "
              f"{len(mine):,} units, {size / 1e9:,.3f} GB on disk")
        if size:
            print(f"about {size * text_rate / 1e9:,.3f} GB of text, {size * token_rate / 1e6:,.1f}M tokens, "
                  f"{size * rate / 1e9:,.3f} GB of shards, "
                  f"{size * text_rate / speed / args.workers / 60:,.1f} minutes with {args.workers} workers")
        return None
    try:
        (out / "preparing").mkdir(parents=True, exist_ok=True)
        name = f"lock_{part[0]}" if args.part else "lock"
        with files.lock(out / "preparing" / name, f"{out}: another preparation writes there"):
            if args.overwrite:
                for other in (out / "preparing").glob("lock_[0-9]*"):  # of parts that may be under way
                    files.lock(other, f"{out}: a part is prepared there").close()
                delete(out)
            elif is_complete(out, settings, described):  # another one finished it just now
                shutil.rmtree(out / "preparing")
                return None
            plan = open_plan(out, settings, described, part[1], made)
            left = size - sum(segment.size for unit in range(part[0] - 1, len(made), part[1])
                              for segment in made[unit][:plan.state(unit)["segments"]])
            if args.max_tokens_per_domain:  # validation, which has no limit, is checked while it is written
                left = min(left, 2 * args.max_tokens_per_domain * len(plan.trained) / max(rate, 1e-9))
            check_disk(out, left * rate * 0.9)
            prepare(plan, args, part, rate)
            if args.part:
                print(f"part {args.part} is done; when all are: python prepare_slimpajama.py --merge --out {out}")
            else:
                finish(plan)
    except OSError as error:
        if error.errno in files.NO_ROOM:
            raise UserError(f"no room left in {out} ({error.strerror}); what was written is kept: make room and run "
                            "the same command again to go on") from None
        raise UserError(f"--out {out}: {error.strerror or error}; give a folder that can be written") from None
    return None


if __name__ == "__main__":
    run(main)
