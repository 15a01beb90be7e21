"""A unit of work: a few segments of the source, from documents to shards, continued where it was interrupted.

OUT/preparing/plan.json has the settings and the units; unit_00012.json what unit 12 has done so far. Both are read from
disk by whoever works on a unit, so nothing but a number goes to a worker. A unit's shards depend on the plan alone.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np

import files
import tokenizer as tokenizers
from corpus.documents import BadRecord, Document, Schema, Segment, Text, place, read, to_document
from corpus.shards import ShardWriter
from errors import UserError
from manifest import DOMAINS, in_order

COMMIT_SECONDS = 2.0  # at most this much work is done again after a kill, beside the segment that was being read
PIECE = 1 << 20       # bytes; larger documents are tokenised piece by piece


def read_json(path: Path) -> dict:
    """A file of the preparation's own; UserError where it is not whole, as after a power cut."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; begin the preparation anew with --overwrite")
    return content


class Plan:
    """OUT/preparing/plan.json: what is prepared, from what, in which units."""

    def __init__(self, out: str | Path):
        self.out, self.folder = Path(out), Path(out) / "preparing"
        content = read_json(self.folder / "plan.json")
        self.settings, self.tokenizer, self.parts = content["source"], content["tokenizer"], content["parts"]
        self.units = [[Segment(*segment) for segment in unit] for unit in content["units"]]
        self.schema = Schema(*self.settings["schema"])
        self.splits = {source: ours for ours, source in
                       (pair.split("=") for pair in self.settings["split"].split(","))}

        there = [self.schema.constant] if self.schema.constant else DOMAINS
        self.domains = frozenset(self.settings["domains"] or there)
        self.trained = self.domains - set(self.settings["holdout"])

    def wants(self, domain: str, split: str) -> bool:
        """A domain that is held out is prepared for validation alone."""
        return domain in (self.trained if split == "train" else self.domains)

    def state_path(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:05d}.json"

    def state(self, unit: int) -> dict:
        """What a unit has done so far."""
        path = self.state_path(unit)
        if not path.exists():
            return {"segments": 0, "items": 0, "done": False, "writers": {}, "bad": [], "duplicates": {},
                    "closed": []}
        return read_json(path)

    def dropped_path(self, unit: int) -> Path:
        return self.folder / f"dropped_{unit:05d}.npy"


class Shared:
    """What workers and their parent tell each other: counters, and a wish to stop."""

    def __init__(self, context: Any, allowed_bad: int = 0, bad: int = 0):
        self.counters = context.Array("q", [0, 0, 0, bad])  # bytes on disk, bytes of text, tokens, bad records
        self.stop, self.allowed_bad = context.Event(), allowed_bad

    def add(self, *counts: int) -> None:
        with self.counters.get_lock():
            for i, n in enumerate(counts):
                self.counters[i] += n

    def count_bad(self, where: str, reason: str) -> None:
        """UserError at one bad record more than is allowed."""
        with self.counters.get_lock():
            self.counters[3] += 1
            too_many = self.counters[3] > self.allowed_bad
        if too_many:
            if self.allowed_bad:
                raise UserError(f"{where}: {reason} (one more than --skip_bad {self.allowed_bad})")
            raise UserError(f"{where}: {reason}; --skip_bad N leaves out up to N such records")


_shared: Shared  # of this worker
_tokenizer: tokenizers.Tokenizer
_lock: IO


def start_worker(shared: Shared, tokenizer: str, lock_path: Path | None) -> None:
    """Called once in each worker. lock_path: what a process of its own holds while it lives; None in a thread."""
    global _shared, _tokenizer, _lock
    _shared, _tokenizer = shared, tokenizers.load(tokenizer)
    if lock_path:
        # A killed parent cannot ask: its workers end with it, and the lock tells when the last one has.
        threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
        _lock = files.lock(lock_path, "another preparation starts", shared=True, wait=30)


def documents_of(plan: Plan, segment: Segment,
                 bad: Callable[[str, str], None]) -> Iterator[tuple[int, Document | None]]:
    """(bytes read so far, document or None) for each record of a segment; None for one that is not wanted."""
    for position, number, item in read(plan.settings, segment):
        try:
            document = to_document(item, segment.split, plan.schema, plan.splits)
        except BadRecord as error:
            bad(place(plan.settings, segment, number), str(error))
            document = None
        if document and not plan.wants(document.domain, document.split):
            document = None
        item = None  # a large document must be gone before the next is read
        yield position, document
        document = None


def work(out: Path, unit: int) -> None:
    """Bring a unit to its end, from where its state says; returns early when a stop is wished for."""
    if _shared.stop.is_set():
        return
    plan = Plan(out)
    try:
        _work(plan, unit)
    except UserError:
        _shared.stop.set()  # at once: the parent looks only five times a second
        raise
    except OSError as error:
        _shared.stop.set()
        if error.errno in files.NO_ROOM:
            raise UserError(f"no room left in {plan.out} ({error.strerror}); what was written is kept: make room and "
                            "run the same command again to go on") from None
        raise UserError(f"{plan.out}: {error}; --overwrite begins anew") from None


def _work(plan: Plan, unit: int) -> None:
    state, segments = plan.state(unit), plan.units[unit]
    dropped = frozenset(np.load(plan.dropped_path(unit)).tolist() if plan.settings["dedup"] else ())
    writers = restore_writers(plan, unit, state)
    limit, left, closed = plan.settings["max_tokens_per_domain"], {}, set(state["closed"])
    if limit:
        used, closed_before, _ = taken(plan, unit)
        left, closed = {d: limit - n for d, n in used.items()}, closed | closed_before
    committed = time.monotonic()

    def bad(where: str, reason: str) -> None:
        _shared.count_bad(where, reason)
        state["bad"].append([where, reason])

    for segment in segments[state["segments"]:]:
        seen = texts = tokens = 0  # not yet told to the parent
        told, of_val = time.monotonic(), plan.splits.get(segment.split) == "val"  # that one has no limit
        for position, document in documents_of(plan, segment, bad):
            if limit and closed.issuperset(plan.trained) and not of_val:
                break  # nothing that follows is wanted
            state["items"] += 1
            if document and state["items"] in dropped:
                state["duplicates"][document.domain] = state["duplicates"].get(document.domain, 0) + 1
            elif document and (of_val or document.domain not in closed):
                key = f"{document.domain}/{document.split}"
                if key not in writers:
                    writers[key] = ShardWriter(plan.out, document.domain, document.split,
                                               plan.settings["shard_tokens"], unit)
                pieces = encode(_tokenizer.encode_to_numpy, document.text, _tokenizer.eot_token)
                before = writers[key].tokens
                if limit and document.split == "train":
                    pieces = list(pieces)
                    if before + sum(map(len, pieces)) > left.get(document.domain, limit):
                        closed.add(document.domain)  # what follows in this domain is beyond the limit, also if shorter
                        continue
                for piece in pieces:
                    writers[key].write(piece, document.kind)
                writers[key].end_document(len(document.utf8))
                texts, tokens = texts + len(document.utf8), tokens + writers[key].tokens - before
            document = None
            if time.monotonic() - told > 0.2:
                told = time.monotonic()
                _shared.add(position - seen, texts, tokens)
                seen, texts, tokens = position, 0, 0
                if _shared.stop.is_set():
                    return
        _shared.add(segment.size - seen, texts, tokens)
        state["segments"] += 1
        state["closed"] = sorted(closed)
        if time.monotonic() - committed > COMMIT_SECONDS and state["segments"] < len(segments):
            state["writers"] = {key: writer.state() for key, writer in writers.items()}
            files.write_text(plan.state_path(unit), json.dumps(state))
            committed = time.monotonic()
    state["writers"] = {key: {"shards": writer.close(), "open": None, "runs": []} for key, writer in writers.items()}
    files.write_text(plan.state_path(unit), json.dumps({**state, "done": True}))


def restore_writers(plan: Plan, unit: int, state: dict) -> dict[str, ShardWriter]:
    """A unit's writers as its state has them; files that it does not know are removed."""
    known = {name for writer in state["writers"].values() for name in
             [*(s["file"] for s in writer["shards"]), *([writer["open"]["file"]] if writer["open"] else [])]}
    for path in shard_files(plan.out, unit):
        name = path.relative_to(plan.out).as_posix()
        if re.sub(r"(\.kinds\.npy|\.npy)(\.tmp)?$", ".npy", name) not in known:
            path.unlink()
    writers = {}
    for key, saved in state["writers"].items():
        writers[key] = ShardWriter(plan.out, *key.split("/"), plan.settings["shard_tokens"], unit)
        writers[key].restore(saved)
    return writers


def shard_files(out: Path, unit: int | None = None) -> list[Path]:
    """All files that the preparation names, or those of one unit; others' files are none of our business."""
    number = r"\d{5,}" if unit is None else f"{unit:05d}"
    pattern = re.compile(rf"(train|val)_{number}(_\d\d+)?(\.kinds)?\.npy(\.tmp)?")
    return [path for path in out.glob("*/*.npy*") if pattern.fullmatch(path.name)]


def encode(encode_to_numpy: Callable[[str], np.ndarray], text: Text, eot: int) -> Iterator[np.ndarray]:
    """A document's (n,) uint16 tokens and its end-of-text, of a large one in pieces: the tokens of the whole text.

    A piece ends between a character that is no whitespace and a space or line feed: no match of GPT-2's pattern
    reaches across, and none looks further than the whitespace that follows it.
    """
    if isinstance(text, str):
        ids = encode_to_numpy(text)
        whole = np.empty(len(ids) + 1, dtype=np.uint16)  # np.append takes three times as long
        whole[:-1], whole[-1] = ids, eot
        yield whole
        return
    start, size = 0, PIECE
    while start < len(text):
        stop = min(start + size, len(text))
        while stop < len(text) and text[stop] & 0xC0 == 0x80:  # inside a character
            stop -= 1
        piece = str(text[start:stop], "utf-8")
        if stop < len(text):
            cut = max((match.end() for match in re.finditer(r"\S(?=[ \n])", piece[-4096:])), default=0)
            if not cut and size < len(text):
                size *= 2  # no such place near the end: try further on
                continue
            piece = piece[:len(piece) - len(piece[-4096:]) + cut] if cut else piece
        yield encode_to_numpy(piece)
        start, size = start + len(piece.encode()), PIECE
    yield np.array([eot], dtype=np.uint16)


def write_hashes(out: Path, unit: int) -> None:
    """preparing/hashes_00012.npy: (3, n) uint64, two halves of each wanted document's hash and its number, sorted."""
    plan = Plan(out)
    path = plan.folder / f"hashes_{unit:05d}.npy"
    if path.exists():
        return
    rows, items = [], 0
    for segment in plan.units[unit]:
        for _, document in documents_of(plan, segment, lambda where, reason: None):  # told when tokens are made
            items += 1
            if document:
                digest = hashlib.blake2b(document.utf8, digest_size=16).digest()
                rows.append((*np.frombuffer(digest, "<u8").tolist(), items))
            if items % 1024 == 0 and _shared.stop.is_set():
                return
        _shared.add(segment.size)
    table = np.array(rows, dtype=np.uint64).reshape(-1, 3).T
    # Parts on several machines may make the same file at once: each under a temporary name of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.time_ns()}")
    files.write_npy(temporary, np.ascontiguousarray(table[:, np.lexsort(table[1::-1])]))
    os.replace(temporary, path)


def find_duplicates(plan: Plan, mine: set[int], memory: int = 256 << 20) -> None:
    """preparing/dropped_00012.npy of `mine` units: numbers of documents whose text an earlier one has.

    The first in the order of the source stays, but validation comes before training, so that no training document
    has a twin there. A slice of the hash space at a time: memory does not grow with the corpus.
    """
    order = sorted(range(len(plan.units)), key=lambda unit: (plan.splits.get(plan.units[unit][0].split) != "val", unit))
    hashes = [np.load(plan.folder / f"hashes_{unit:05d}.npy", mmap_mode="r") for unit in order]
    slices = -(-sum(h.shape[1] for h in hashes) * 64 // memory) or 1  # about 64 bytes a document while it is sorted
    edges = [np.uint64(i * 2**64 // slices) for i in range(slices)]
    cuts = [[*np.searchsorted(h[0], edges).tolist(), h.shape[1]] for h in hashes]
    dropped: dict[int, list[np.ndarray]] = {unit: [] for unit in mine}
    for s in range(slices):
        parts = [h[:, cut[s]:cut[s + 1]] for h, cut in zip(hashes, cuts, strict=True)]
        owner = np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])
        rows = np.concatenate(parts, axis=1)
        by_hash = np.lexsort(rows[1::-1])  # stable: equal hashes stay in their order
        rows, owner = rows[:, by_hash], owner[by_hash]
        again = np.flatnonzero((rows[:2, 1:] == rows[:2, :-1]).all(axis=0)) + 1
        for i in np.unique(owner[again]).tolist():
            if order[i] in mine:
                dropped[order[i]].append(rows[2, again[owner[again] == i]])
    for unit, found in dropped.items():
        numbers = np.sort(np.concatenate(found)) if found else np.zeros(0, np.uint64)
        files.write_npy(plan.dropped_path(unit), numbers)


def taken(plan: Plan, before: int) -> tuple[dict[str, int], set[str], int | None]:
    """(training tokens per domain, closed domains, first unit beyond the limit) of the units below `before`.

    A domain is closed by the first document that does not fit into max_tokens_per_domain. A unit that began before
    earlier ones were done may have taken more than they left to it: it is named, to be done again. Counting ends there,
    or at the first unit that is not done.
    """
    used: dict[str, int] = {}
    closed: set[str] = set()
    for unit in range(before):
        state = plan.state(unit)
        if not state["done"]:
            break
        for key, writer in state["writers"].items():
            domain, split = key.split("/")
            if split == "train" and domain not in closed:
                used[domain] = used.get(domain, 0) + sum(s["tokens"] for s in writer["shards"])
        if any(n > plan.settings["max_tokens_per_domain"] for n in used.values()):
            return used, closed, unit
        closed |= set(state["closed"])
    return used, closed, None


def summary(plan: Plan) -> dict:
    """What the manifest says of all units, which must be done: domains, bad records, duplicates."""
    domains: dict[str, dict[str, list]] = {}
    closed: set[str] = set()
    bad, duplicates = [], {}
    for unit in range(len(plan.units)):
        state = plan.state(unit)
        named_val = plan.splits.get(plan.units[unit][0].split) == "val"
        for key, writer in state["writers"].items():
            domain, split = key.split("/")
            if writer["shards"] and (named_val or domain not in closed):
                domains.setdefault(domain, {}).setdefault(split, []).extend(writer["shards"])
        closed |= set(state["closed"])
        bad += state["bad"]
        for domain, n in state["duplicates"].items():
            duplicates[domain] = duplicates.get(domain, 0) + n
    return {"domains": {d: {s: domains[d][s] for s in ("train", "val") if s in domains[d]} for d in in_order(domains)},
            **({"duplicates": {d: duplicates.get(d, 0) for d in in_order(domains)}} if plan.settings["dedup"] else {}),
            **({"skipped": bad} if bad else {})}
