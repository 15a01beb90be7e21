"""What a data folder is: its domains, and manifest.json, which lists the shards.

This module imports no torch, so that the data preparation starts quickly.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cli import UserError

SCHEMA = 1  # version of manifest.json

# SlimPajama's meta.redpajama_set_name -> our name, in the order of the published weight lists
SET_NAMES = {
    "RedPajamaArXiv": "arxiv",
    "RedPajamaBook": "book",
    "RedPajamaCommonCrawl": "cc",
    "RedPajamaC4": "c4",
    "RedPajamaGithub": "github",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wikipedia",
}
DOMAINS = tuple(SET_NAMES.values())
DTYPES = {"uint16": 2**16, "uint32": 2**32}  # type of a shard's ids -> how many it can tell apart
PREPARING = "preparing"  # the folder, beside the domains', of an unfinished preparation
TOKENIZER = "tokenizer"  # the folder of a tokenizer that is a file

# The keys that must be in a manifest and in its parts, and the types of their values.
MANIFEST_FORM = {"tokenizer": dict, "source": dict, "domains": dict}
TOKENIZER_FORM = {"name": str, "sha256": str, "n_vocab": int, "eot_token": int}
SHARD_FORM = {
    "file": str,
    "tokens": int,
    "documents": int,
    "bytes": int,
    "file_bytes": int,
    "sha256": str,
}


def dtype_for(n_vocab: int) -> str:
    """The smallest of DTYPES that holds all ids below n_vocab."""
    return next(name for name, n_ids in DTYPES.items() if n_vocab <= n_ids)


def find_name_defect(domain: str) -> str | None:
    """Why no domain may have this name, which is that of a folder in the data folder; else None."""
    if domain in (PREPARING, TOKENIZER):
        return "the preparation keeps its own files in a folder of that name"
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,99}", domain):
        return "it names a folder: 1 to 100 small letters, digits, - and _, first a letter or digit"
    return None


def in_order(domains: Iterable[str]) -> tuple[str, ...]:
    """The order of domains in shards, tables and plots: as in DOMAINS, then any others by name."""
    domains = set(domains)
    ours = [domain for domain in DOMAINS if domain in domains]
    others = sorted(domains - set(DOMAINS))
    return (*ours, *others)


def all_shards(domains: dict) -> Iterator[dict]:
    """The entries of all shards, from a manifest's "domains"."""
    for splits in domains.values():
        for shards in splits.values():
            yield from shards


def read_manifest(data_dir: str | Path) -> dict:
    """DATA/manifest.json; UserError where it is missing or damaged.

    The preparation writes it last, so a folder without it is not complete.
    """
    path = Path(data_dir) / "manifest.json"
    if not data_dir or not Path(data_dir).is_dir():
        # The synthetic text only where its own folder is asked for: it must not pass for another.
        source = "--source hub --dataset DKYoon/SlimPajama-6B"
        if Path(data_dir).name == "sample":
            source = "--source sample --tokenizer bytes"
        raise UserError(
            f"data folder {str(data_dir)!r} not found; make it with: python prepare_slimpajama.py "
            f"{source} --out {data_dir or 'data/slimpajama'}"
        )
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so the preparation of {data_dir} did not finish; run it again"
        )
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema}, this code reads {SCHEMA}; prepare the data again"
        )
    defect = find_defect(manifest)
    if defect:
        raise UserError(f"{path} is damaged ({defect}); prepare the data again")
    return manifest


def find_defect(manifest: dict) -> str | None:
    """The first thing in a manifest that is not as the preparation writes it; None if all is."""
    defect = find_wrong_key("the manifest", manifest, MANIFEST_FORM)
    if defect:
        return defect
    tokenizer = manifest["tokenizer"]
    defect = find_wrong_key("the tokenizer", tokenizer, TOKENIZER_FORM)
    if defect:
        return defect
    dtype = manifest.get("dtype", "uint16")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {dtype!r:.60}"
    if not 0 <= tokenizer["eot_token"] < tokenizer["n_vocab"] <= DTYPES[dtype]:
        return f"n_vocab {tokenizer['n_vocab']}, eot_token {tokenizer['eot_token']}, dtype {dtype}"
    if not manifest["domains"]:
        return "no domains"
    for domain, splits in manifest["domains"].items():
        if not isinstance(splits, dict):
            return f"no splits for {domain}"
        for split, shards in splits.items():
            if not isinstance(shards, list):
                return f"no list of shards for {domain}, {split}"
            for i, shard in enumerate(shards):
                defect = find_shard_defect(f"shard {i} of {domain}, {split}", shard)
                if defect:
                    return defect
    return None


def find_shard_defect(what: str, shard: Any) -> str | None:
    """What is wrong with one shard's entry; None if nothing is."""
    defect = find_wrong_key(what, shard, SHARD_FORM)
    if defect:
        return defect
    labels = shard.get("kinds", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return f"{what}: kinds {labels}"
    return None


def find_wrong_key(what: str, entry: Any, form: dict[str, type]) -> str | None:
    """The first of form's keys that is missing, negative or of another type; None if none is."""
    if not isinstance(entry, dict):
        return f"{what} is {entry!r:.60}"
    for key, kind in form.items():
        if key not in entry:
            return f"{what} has no {key}"
        value = entry[key]
        if type(value) is not kind or (kind is int and value < 0):
            return f"{what} has {key} {value!r:.60}"
    return None


def data_hash(manifest: dict) -> str:
    """A fingerprint of all tokens: of the tokenizer and the sha256 of every shard."""
    shards = []
    for domain, splits in sorted(manifest["domains"].items()):
        for split, entries in sorted(splits.items()):
            shards.append([domain, split, [entry["sha256"] for entry in entries]])
    content = json.dumps([manifest["tokenizer"]["sha256"], shards])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def kinds_path(shard: Path) -> Path:
    """The index beside a shard whose documents carry a label (meta.kind).

    It is an array # (R, 2): where each stretch of tokens of one label ends, and the label's number.
    """
    return shard.with_suffix(".kinds.npy")
