"""Making the shards of a unit, in a worker; and what all units have together.

A worker reads the plan and the unit's state from disk, so only the unit's number is sent to it. The
shards of a unit depend on the plan alone.
"""

import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

import files
from cli import UserError
from corpus import fast
from corpus.documents import BadRecord, Document, Segment, Text, place, read, to_document
from corpus.manifest import dtype_for, in_order
from corpus.plan import Plan, shard_files
from corpus.shards import ShardWriter

COMMIT_SECONDS = 2.0  # a kill loses about this much work, plus the segment that was being read
REPORT_SECONDS = 0.2  # between a worker's reports to its parent
PIECE = 1 << 20  # bytes; larger documents are tokenized piece by piece
HASH_BYTES = 64  # memory for each document while hashes are sorted, roughly


def no_room(out: Path, error: OSError) -> UserError:
    return UserError(
        f"no room left in {out} ({error.strerror}); what was written is kept: make room and run "
        "the same command again to go on"
    )


# Workers


class Shared:
    """What workers and their parent share: counters, and a request to stop."""

    def __init__(self, context: Any, allowed_bad: int = 0, bad: int = 0):
        # bytes on disk, bytes of text, tokens, bad records
        self.counters = context.Array("q", [0, 0, 0, bad])
        self.stop = context.Event()
        self.allowed_bad = allowed_bad

    def add(self, *counts: int) -> None:
        """Increase the first counters."""
        with self.counters.get_lock():
            for i, n in enumerate(counts):
                self.counters[i] += n

    def count_bad(self, where: str, reason: str) -> None:
        """Count a bad record; UserError if it is one more than is allowed."""
        with self.counters.get_lock():
            self.counters[3] += 1
            n_bad = self.counters[3]
        if n_bad <= self.allowed_bad:
            return
        if self.allowed_bad:
            raise UserError(f"{where}: {reason} (one more than --skip_bad {self.allowed_bad})")
        raise UserError(f"{where}: {reason}; --skip_bad N leaves out up to N such records")


# Of this worker; set by start_worker.
_shared: Shared
_encoder: fast.Encoder
_lock: IO


def start_worker(shared: Shared, tokenizer: dict | None, out: Path, lock_path: Path | None) -> None:
    """Called once in each worker.

    tokenizer: the manifest's entry; None where nothing is tokenized.
    lock_path: the file that a worker process locks while it lives; None for a thread.
    """
    global _shared, _encoder, _lock
    _shared = shared
    if tokenizer:
        _encoder = fast.make_encoder(tokenizer, fast.file_of(tokenizer, out))
    if lock_path:
        threading.Thread(target=end_with_parent, daemon=True).start()
        _lock = files.lock(lock_path, "another preparation starts", shared=True, wait=30)


def end_with_parent() -> None:
    """End this process once its parent is gone: a killed parent cannot ask its workers to stop."""
    parent_process().join()
    os._exit(1)


def work(out: Path, unit: int) -> None:
    """Complete a unit, from where its state says; returns early if a stop is requested."""
    if _shared.stop.is_set():
        return
    try:
        UnitWork(Plan(out), unit).run()
    except UserError:
        _shared.stop.set()  # at once, as the parent looks only five times a second
        raise
    except OSError as error:
        _shared.stop.set()
        if error.errno in files.NO_ROOM:
            raise no_room(out, error) from None
        raise UserError(f"{out}: {error}; --overwrite begins anew") from None


class UnitWork:
    """One unit while a worker makes its shards."""

    def __init__(self, plan: Plan, unit: int):
        self.plan = plan
        self.unit = unit
        self.state = plan.state(unit)
        self.writers = restore_writers(plan, unit, self.state)
        self.dropped = frozenset()  # numbers of the records that are duplicates
        if plan.settings["dedup"]:
            self.dropped = frozenset(np.load(plan.dropped_path(unit)).tolist())
        self.limit = plan.settings["max_tokens_per_domain"]
        if plan.is_validation(unit):
            self.limit = None  # it is for training data
        self.closed = set(self.state["closed"])
        self.taken = {}  # each domain's training tokens in earlier units
        if self.limit:
            earlier = count_taken(plan, unit)
            self.closed |= earlier.closed
            self.taken = earlier.tokens

    def run(self) -> None:
        segments = self.plan.units[self.unit]
        committed = time.monotonic()
        for segment in segments[self.state["segments"] :]:
            if not self.do_segment(segment):
                return
            self.state["segments"] += 1
            self.state["closed"] = sorted(self.closed)
            is_last = self.state["segments"] == len(segments)
            if not is_last and time.monotonic() - committed > COMMIT_SECONDS:
                self.commit()
                committed = time.monotonic()
        for writer in self.writers.values():
            writer.close()
        self.state["done"] = True
        self.commit()

    def commit(self) -> None:
        """Write to the disk how far the unit is."""
        for key, writer in self.writers.items():
            self.state["writers"][key] = writer.state()
        files.write_text(self.plan.state_path(self.unit), json.dumps(self.state))

    def do_segment(self, segment: Segment) -> bool:
        """Write a segment's documents; False if a stop was requested on the way."""
        reported = 0  # bytes of the segment that the parent knows of
        texts = tokens = 0  # not reported yet
        reported_at = time.monotonic()
        for position, number, document in documents_of(self.plan, segment, self.skip_bad):
            if self.limit and self.closed.issuperset(self.plan.trained):
                break  # nothing that follows is wanted
            self.state["items"] += 1
            if document:
                if self.is_checked():
                    self.compare(document, segment, number)
                n_bytes, n_tokens = self.add(document)
                texts += n_bytes
                tokens += n_tokens
            document = None  # a large one must be gone before the next is read
            if time.monotonic() - reported_at > REPORT_SECONDS:
                _shared.add(position - reported, texts, tokens)
                reported = position
                texts = tokens = 0
                reported_at = time.monotonic()
                if _shared.stop.is_set():
                    return False
        _shared.add(segment.size - reported, texts, tokens)
        return True

    def add(self, document: Document) -> tuple[int, int]:
        """Write a document, unless it is a duplicate or beyond the limit.

        Returns the bytes of text and the tokens that were written.
        """
        domain = document.domain
        if self.state["items"] in self.dropped:
            duplicates = self.state["duplicates"]
            duplicates[domain] = duplicates.get(domain, 0) + 1
            return 0, 0
        if self.limit and domain in self.closed:
            return 0, 0
        key = f"{domain}/{document.split}"
        if key not in self.writers:
            self.writers[key] = make_writer(self.plan, self.unit, key)
        writer = self.writers[key]
        pieces = encode(_encoder, document.text, self.plan.tokenizer["eot_token"])
        if self.limit and document.split == "train":
            pieces = list(pieces)
            n_tokens = self.taken.get(domain, 0) + writer.tokens
            n_tokens += sum(map(len, pieces))
            if n_tokens > self.limit:
                self.closed.add(domain)  # later documents are beyond the limit too, even if shorter
                return 0, 0
        before = writer.tokens
        for piece in pieces:
            writer.write(piece, document.kind)
        n_bytes = len(document.utf8)
        writer.end_document(n_bytes)
        return n_bytes, writer.tokens - before

    def is_checked(self) -> bool:
        """Whether the record is the one in CHECK_EVERY that the reference encodes as well."""
        # In each unit another number, so that units of a few documents have their share.
        return (617 * self.unit + self.state["items"]) % fast.CHECK_EVERY == 0

    def compare(self, document: Document, segment: Segment, number: int) -> None:
        """UserError if the reference gives a document other tokens."""
        if not _encoder.reference:
            return
        text = document.text
        if not isinstance(text, str):
            text = next_piece(text, 0, _encoder.cut)
        ours, theirs = _encoder.encode(text), _encoder.reference()(text)
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"{place(self.plan.settings, segment, number)}: {_encoder.about}, and the tokens "
                f"differ from number {fast.first_difference(ours, theirs)} on; report this "
                "document, and prepare the data without it: pip uninstall fastokens, --overwrite"
            )

    def skip_bad(self, where: str, reason: str) -> None:
        """Leave out a record; UserError if too many were left out."""
        _shared.count_bad(where, reason)
        self.state["bad"].append([where, reason])


def restore_writers(plan: Plan, unit: int, state: dict) -> dict[str, ShardWriter]:
    """The writers as a unit's state says; files that the state does not name are removed."""
    known = set()
    for saved in state["writers"].values():
        shards = list(saved["shards"])
        if saved["open"]:
            shards.append(saved["open"])
        known.update(shard["file"] for shard in shards)
    for path in shard_files(plan.out, unit):
        name = path.relative_to(plan.out).as_posix()
        shard = re.sub(r"(\.kinds\.npy|\.npy)(\.tmp)?$", ".npy", name)
        if shard not in known:
            path.unlink()
    writers = {}
    for key, saved in state["writers"].items():
        writer = make_writer(plan, unit, key)
        writer.restore(saved)
        writers[key] = writer
    return writers


def make_writer(plan: Plan, unit: int, key: str) -> ShardWriter:
    """A new writer for "DOMAIN/SPLIT"."""
    domain, split = key.split("/")
    shard_tokens = plan.settings["shard_tokens"]
    dtype = dtype_for(plan.tokenizer["n_vocab"])
    return ShardWriter(plan.out, domain, split, shard_tokens, unit, dtype)


def documents_of(
    plan: Plan, segment: Segment, on_bad: Callable[[str, str], None]
) -> Iterator[tuple[int, int, Document | None]]:
    """(bytes read so far, number, document) for each record of a segment.

    The document is None where it is not wanted. number: that of `read`.
    on_bad: called with place and reason for each record that is not a document.
    """
    for position, number, item in read(plan.settings, segment):
        try:
            document = to_document(item, segment.split, plan.schema, plan.splits)
        except BadRecord as error:
            on_bad(place(plan.settings, segment, number), str(error))
            document = None
        if document and not plan.wants(document.domain, document.split):
            document = None
        item = None  # a large document must be gone before the next is read
        yield position, number, document
        document = None


def encode(encoder: fast.Encoder, text: Text, eot: int) -> Iterator[np.ndarray]:
    """A document's tokens # (n,), then end-of-text; those of a large one in pieces."""
    if isinstance(text, str):
        ids = encoder.encode(text)
        whole = np.empty(len(ids) + 1, dtype=ids.dtype)  # np.append takes three times as long
        whole[:-1] = ids
        whole[-1] = eot
        yield whole
        return
    start = 0
    while start < len(text):
        piece = next_piece(text, start, encoder.cut)
        yield encoder.encode(piece)
        start += len(piece.encode())
    yield np.array([eot], dtype=encoder.encode("").dtype)


def next_piece(text: memoryview, start: int, cut: str | None) -> str:
    """About PIECE bytes of a large UTF-8 text, cut so that the pieces have the whole text's tokens.

    cut: a pattern of the places where it may be cut; None: nowhere.
    """
    size = PIECE if cut else len(text)
    while True:
        stop = min(start + size, len(text))
        while stop < len(text) and text[stop] & 0xC0 == 0x80:  # inside a character
            stop -= 1
        piece = str(text[start:stop], "utf-8")
        if stop == len(text):
            return piece
        tail = piece[-4096:]
        cuts = [match.end() for match in re.finditer(cut, tail)]
        if cuts:
            return piece[: len(piece) - len(tail) + cuts[-1]]
        size *= 2  # no such place near the end: try further on


# Duplicates


def write_hashes(out: Path, unit: int) -> None:
    """Write preparing/hashes_00012.npy # (3, n) uint64, sorted; for --dedup.

    Its rows are the two halves of each wanted document's hash and the number of the record.
    """
    plan = Plan(out)
    path = plan.hashes_path(unit)
    if path.exists():
        return
    rows = []
    number = 0
    for segment in plan.units[unit]:
        for _, _, document in documents_of(plan, segment, ignore_bad):
            number += 1
            if document:
                digest = hashlib.blake2b(document.utf8, digest_size=16).digest()
                first, second = np.frombuffer(digest, "<u8").tolist()
                rows.append((first, second, number))
            if number % 1024 == 0 and _shared.stop.is_set():
                return
        _shared.add(segment.size)
    table = np.array(rows, dtype=np.uint64).reshape(-1, 3).T
    table = table[:, sort_by_hash(table)]
    # Parts on several machines may make the same file at once, so each uses a name of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.time_ns()}")
    files.write_npy(temporary, np.ascontiguousarray(table))
    os.replace(temporary, path)


def ignore_bad(where: str, reason: str) -> None:
    """Bad records are reported when their unit's tokens are made, not when documents are hashed."""


def find_duplicates(plan: Plan, units: set[int], memory: int = 256 << 20) -> None:
    """Write preparing/dropped_00012.npy of each of `units`: numbers of records to leave out.

    Of documents with the same text, the first in the order of the source stays. But validation
    comes before training, so that no training document is in the validation data too. Hashes are
    compared in slices of the hash space, so that `memory` bytes suffice for any corpus.
    """
    order = sorted(range(len(plan.units)), key=lambda unit: not plan.is_validation(unit))
    tables = [np.load(plan.hashes_path(unit), mmap_mode="r") for unit in order]
    n_documents = sum(table.shape[1] for table in tables)
    n_slices = max(1, math.ceil(n_documents * HASH_BYTES / memory))
    sliced = [cut_hash_space(table, n_slices) for table in tables]
    dropped = {unit: [np.zeros(0, np.uint64)] for unit in units}
    for parts in zip(*sliced, strict=True):
        owners, numbers = find_repeated(parts)
        for owner in np.unique(owners).tolist():
            unit = order[owner]
            if unit in units:
                dropped[unit].append(numbers[owners == owner])
    for unit, parts in dropped.items():
        numbers = np.sort(np.concatenate(parts))
        files.write_npy(plan.dropped_path(unit), numbers)


def cut_hash_space(table: np.ndarray, n_slices: int) -> list[np.ndarray]:
    """A sorted table of hashes # (3, n), cut into n_slices equal ranges of the hash."""
    edges = [i * 2**64 // n_slices for i in range(1, n_slices)]
    cuts = np.searchsorted(table[0], np.array(edges, np.uint64))
    return np.split(table, cuts, axis=1)


def find_repeated(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(index of the table, number of the record) of each document whose hash came before.

    Before: in an earlier table, or earlier in the same one.
    """
    sizes = [table.shape[1] for table in tables]
    owners = np.repeat(np.arange(len(tables)), sizes)
    table = np.concatenate(tables, axis=1)
    by_hash = sort_by_hash(table)
    table = table[:, by_hash]
    owners = owners[by_hash]
    is_same = table[:2, 1:] == table[:2, :-1]
    repeated = np.flatnonzero(is_same.all(axis=0)) + 1
    return owners[repeated], table[2, repeated]


def sort_by_hash(table: np.ndarray) -> np.ndarray:
    """The order that sorts a table of hashes # (3, n). Equal hashes keep their order."""
    first_half, second_half, _ = table
    return np.lexsort((second_half, first_half))  # the last key counts most


# All units together


class Taken(NamedTuple):
    """What the first units have of each domain, against --max_tokens_per_domain."""

    tokens: dict[str, int]  # training tokens per domain
    closed: set[str]  # domains of which nothing more is taken
    overshot: int | None  # the first unit that took more than the limit allows


def count_taken(plan: Plan, stop: int) -> Taken:
    """What the units before `stop` have taken, up to the first that is not done.

    The first document that does not fit into the limit closes its domain. A unit that was begun
    before earlier ones were done may have taken more than they leave it: counting ends at this one,
    which must be done again.
    """
    limit = plan.settings["max_tokens_per_domain"]
    tokens: dict[str, int] = {}
    closed: set[str] = set()
    for unit in range(stop):
        state = plan.state(unit)
        if not state["done"]:
            break
        for key, writer in state["writers"].items():
            domain, split = key.split("/")
            if split == "train" and domain not in closed:
                n_tokens = sum(shard["tokens"] for shard in writer["shards"])
                tokens[domain] = tokens.get(domain, 0) + n_tokens
        if any(n_tokens > limit for n_tokens in tokens.values()):
            return Taken(tokens, closed, overshot=unit)
        closed |= set(state["closed"])
    return Taken(tokens, closed, overshot=None)


def summary(plan: Plan) -> dict:
    """The manifest's entries that come from the units, which must all be done."""
    shards: dict[tuple[str, str], list[dict]] = {}
    closed: set[str] = set()
    duplicates: dict[str, int] = {}
    bad = []
    for unit in range(len(plan.units)):
        state = plan.state(unit)
        for key, writer in state["writers"].items():
            domain, split = key.split("/")
            beyond_limit = domain in closed and not plan.is_validation(unit)
            if writer["shards"] and not beyond_limit:
                unit_shards = shards.setdefault((domain, split), [])
                unit_shards += writer["shards"]
        closed |= set(state["closed"])
        bad += state["bad"]
        for domain, n in state["duplicates"].items():
            duplicates[domain] = duplicates.get(domain, 0) + n
    domains = {}
    for domain in in_order(domain for domain, _ in shards):
        domains[domain] = {}
        for split in ("train", "val"):
            if (domain, split) in shards:
                domains[domain][split] = shards[domain, split]
    entries = {"domains": domains}
    if plan.settings["dedup"]:
        entries["duplicates"] = {domain: duplicates.get(domain, 0) for domain in domains}
    if bad:
        entries["skipped"] = bad
    return entries
