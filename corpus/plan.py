"""What is prepared: the segments of the source, grouped into units of work.

OUT/preparing/plan.json has the settings and the units, unit_00012.json says how far unit 12 is.
Both stay until the manifest is written, so that the same command can continue.
"""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import files
from cli import UserError
from corpus import inputs
from corpus.documents import (
    HASH,
    HELD_OUT,
    SPLIT_HELP,
    Schema,
    Segment,
    dataset_of,
    file_segments,
    find_files,
    hub_segments,
)
from corpus.manifest import DOMAINS, PREPARING
from corpus.tokenizer import NAMES

MAX_UNITS = 256  # of a small corpus; a large one has units of MAX_UNIT bytes
MIN_UNIT, MAX_UNIT = 4 << 20, 512 << 20  # bytes on disk
MAX_SEGMENT = 32 << 20  # bytes on disk


class Plan:
    """OUT/preparing/plan.json: what is prepared, from what, in which units."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.folder = self.out / PREPARING
        content = read_json(self.folder / "plan.json")
        self.settings = content["source"]
        self.tokenizer = content["tokenizer"]
        self.parts = content["parts"]
        self.units = [list(map(Segment._make, unit)) for unit in content["units"]]
        self.schema = Schema(*self.settings["schema"])
        names = parse_splits(self.settings["split"])
        self.splits = {theirs: ours for ours, theirs in names.items()}
        domains = self.settings["domains"] or DOMAINS
        if self.schema.constant:
            domains = [self.schema.constant]
        self.domains = frozenset(domains)
        self.trained = self.domains - set(self.settings["holdout"])

    def wants(self, domain: str, split: str) -> bool:
        """Whether documents are prepared; a domain that is held out only has validation data."""
        if split == "train":
            return domain in self.trained
        return domain in self.domains

    def is_validation(self, unit: int) -> bool:
        """Whether the source's name of the split says that a unit is for validation."""
        first_segment = self.units[unit][0]
        return self.splits.get(first_segment.split) == "val"

    def part(self, k: int) -> range:
        """The units of the k-th part, from 1."""
        return range(k - 1, len(self.units), self.parts)

    def size(self, units: Iterable[int]) -> int:
        """Bytes on disk."""
        return sum(total_size(self.units[unit]) for unit in units)

    def size_left(self, units: Iterable[int]) -> int:
        """Bytes on disk of the segments that are not done."""
        size = 0
        for unit in units:
            n_done = self.state(unit)["segments"]
            size += total_size(self.units[unit][n_done:])
        return size

    def state_path(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:05d}.json"

    def hashes_path(self, unit: int) -> Path:
        return self.folder / f"hashes_{unit:05d}.npy"

    def dropped_path(self, unit: int) -> Path:
        return self.folder / f"dropped_{unit:05d}.npy"

    def state(self, unit: int) -> dict:
        """How far a unit is."""
        path = self.state_path(unit)
        if path.exists():
            return read_json(path)
        return {
            "segments": 0,  # how many are done
            "items": 0,  # records read in them
            "done": False,
            "writers": {},  # "DOMAIN/SPLIT" -> ShardWriter.state()
            "bad": [],  # (place, reason) of each broken record
            "duplicates": {},  # documents dropped per domain
            "closed": [],  # domains that have reached the limit of tokens
        }


def read_json(path: Path) -> dict:
    """One of the preparation's own files; UserError if it is damaged, as after a power cut."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; begin the preparation anew with --overwrite")
    return content


def total_size(segments: Iterable[Segment]) -> int:
    """Bytes on disk."""
    return sum(segment.size for segment in segments)


def shard_files(out: Path, unit: int | None = None) -> list[Path]:
    """All files that the preparation has named, or those of one unit; never anybody else's."""
    if unit is None:
        number = r"\d{5,}"
    else:
        number = f"{unit:05d}"
    pattern = re.compile(rf"(train|val)_{number}(_\d\d+)?(\.kinds)?\.npy(\.tmp)?")
    paths = out.glob("*/*.npy*")
    return [path for path in paths if pattern.fullmatch(path.name)]


# From the source to units


def parse_splits(text: str) -> dict[str, str]:
    """ "train=train,val=test" -> {"train": "train", "val": "test"}: the source's name for each."""
    names = {}
    parts = text.split(",")
    for part in parts:
        ours, _, theirs = part.partition("=")
        if ours in ("train", "val") and theirs and "=" not in theirs:
            names[ours] = theirs
    if len(set(names.values())) < len(parts) or names.get("train") == HASH:
        raise UserError(
            f"--split {text}: expected two different splits of the source as "
            "train=NAME,val=NAME, or one of them"
        )
    if names.get("val") == HASH and "train" not in names:
        raise UserError(
            f"--split {text}: {HASH} holds out some of the training data; give train=NAME,val=hash"
        )
    return {ours: names[ours] for ours in ("train", "val") if ours in names}


def make_units(settings: dict) -> list[list[Segment]]:
    """The source's segments, grouped into units, which are larger if the source is large."""
    splits = parse_splits(settings["split"])
    if settings["source"] == "sample":
        return [[Segment("sample", "sample", 0, None, 0)]]
    if settings["source"] == "hub":
        names = [name for name in splits.values() if name != HASH]
        segments = hub_segments(dataset_of(settings), names)
        most = math.ceil(len(segments) / MAX_UNITS)
        return group_segments(segments, [1] * len(segments), most)
    all_files = find_files(settings["input"], Schema(*settings["schema"]))
    chosen = choose_files(all_files, splits)
    inputs.refuse_twice([path for path, _ in chosen])
    if not settings["dedup"]:
        inputs.print_copies([path for path, _ in chosen])
    total = sum(path.stat().st_size for path, _ in chosen)
    most = min(max(total // MAX_UNITS, MIN_UNIT), MAX_UNIT)
    segments = file_segments(chosen, min(most, MAX_SEGMENT))
    return group_segments(segments, [segment.size for segment in segments], most)


def choose_files(
    all_files: list[tuple[Path, str | None]], splits: dict[str, str]
) -> list[tuple[Path, str | None]]:
    """(file, split) of the wanted splits, training first; prints which files are left out."""
    counts = Counter(split for _, split in all_files)
    order = [None, *splits.values()]
    chosen = [(path, split) for path, split in all_files if split in order]
    for name in sorted(counts.keys() - set(order)):
        print(f"left out: {counts[name]} files of split {name!r} (see --split)")
    absent = sorted(set(splits.values()) - counts.keys() - {HASH})
    if absent and not counts[None]:
        raise UserError(
            f"no file of split {', '.join(absent)} in --input (there are: "
            f"{', '.join(sorted(counts))}); {SPLIT_HELP}"
        )
    print_held_out(counts, splits, len(chosen))
    return sorted(chosen, key=lambda file: order.index(file[1]))


def print_held_out(counts: Counter, splits: dict[str, str], n_files: int) -> None:
    """Say of which files some documents are held out."""
    how = f"one document in {HELD_OUT} of theirs is for validation, by a hash of its text"
    if HASH in splits.values():
        print(f"{counts[splits['train']] + counts[None]} of {n_files} files: {how}")
    elif counts[None]:
        print(f"{counts[None]} of {n_files} files: no name tells a split; {how}")


def group_segments(segments: list[Segment], weights: list[int], most: int) -> list[list[Segment]]:
    """Neighbors of one split, a new group as soon as one has reached the weight `most`."""
    groups = []
    weight = 0
    for segment, segment_weight in zip(segments, weights, strict=True):
        if not groups or weight >= most or groups[-1][-1].split != segment.split:
            groups.append([])
            weight = 0
        groups[-1].append(segment)
        weight += segment_weight
    return groups


# The plan of a folder


def open_plan(
    out: Path, settings: dict, tokenizer: dict, parts: int, all_units: list[list[Segment]]
) -> Plan:
    """The folder's plan: a new one, or the same from an earlier start; UserError if it differs."""
    path = out / PREPARING / "plan.json"
    if not path.exists():
        plan = {"source": settings, "tokenizer": tokenizer, "parts": parts, "units": all_units}
        create_once(path, json.dumps(plan))
    plan = read_json(path)
    difference = differences(
        {**plan["source"], "tokenizer": label_of(plan["tokenizer"]), "parts": plan["parts"]},
        {**settings, "tokenizer": label_of(tokenizer), "parts": parts},
    )
    if not difference:
        changed = changed_input(plan["units"], all_units)
        if changed:
            difference = (
                f"the inputs are not the same as then ({changed} was changed, added or removed)"
            )
    if difference:
        raise UserError(
            f"{out} holds a preparation that was begun with other settings: {difference}; choose "
            "another --out, or begin anew with --overwrite"
        )
    return Plan(out)


def create_once(path: Path, text: str) -> None:
    """Write a file unless it exists. Parts may start at the same moment: the first file stays."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.time_ns()}")
    files.write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in files.NO_LINKS:
            raise
        with files.lock(path.with_name(f"{path.name}.lock"), "another part starts", wait=60):
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def label_of(tokenizer: dict) -> str:
    """A tokenizer in a message about settings. A file's is its content, wherever it lies."""
    if tokenizer["name"] in NAMES:
        return tokenizer["name"]
    return f"file {tokenizer['sha256'][:16]} with end of text {tokenizer['eot_token']}"


def changed_input(before: list[list], now: list[list]) -> str | None:
    """The path of the first segment that differs between two lists of units; None if none does."""
    flat_before = [tuple(segment) for unit in before for segment in unit]
    flat_now = [tuple(segment) for unit in now for segment in unit]
    for old, new in zip_longest(flat_before, flat_now):
        if old != new:
            return (old or new)[0]
    return None


def differences(before: dict, now: dict) -> str:
    """ "shard_tokens was 100, is now 200" for each setting that has changed; "" if none has."""
    changed = []
    for key in {**before, **now}:
        if before.get(key) != now.get(key) and key != "note":
            changed.append(f"{key} was {before.get(key)}, is now {now.get(key)}")
    return "; ".join(changed)
