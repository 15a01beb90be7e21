"""What a data folder is: its domains, and manifest.json, which lists the shards. No torch: preparation imports it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from errors import UserError

SCHEMA = 1  # version of manifest.json

# SlimPajama's meta.redpajama_set_name -> our name, in the order of the published weight lists
SET_NAMES = {
    "RedPajamaArXiv": "arxiv", "RedPajamaBook": "book", "RedPajamaCommonCrawl": "cc", "RedPajamaC4": "c4",
    "RedPajamaGithub": "github", "RedPajamaStackExchange": "stackexchange", "RedPajamaWikipedia": "wikipedia",
}
DOMAINS = tuple(SET_NAMES.values())
SHARD = {"file": str, "tokens": int, "documents": int, "bytes": int, "file_bytes": int, "sha256": str}


def in_order(domains: Iterable[str]) -> tuple[str, ...]:
    """Domains as they stand in shards, tables and plots: ours in the order of DOMAINS, then any others by name."""
    domains = set(domains)
    return (*(d for d in DOMAINS if d in domains), *sorted(domains - set(DOMAINS)))


def read_manifest(data_dir: str | Path) -> dict:
    """DATA/manifest.json, which is written last: where there is none, the data is absent or not complete."""
    path = Path(data_dir) / "manifest.json"
    if not data_dir or not Path(data_dir).is_dir():
        raise UserError(f"data folder {str(data_dir)!r} not found; make it with: python prepare_slimpajama.py "
                        f"--source sample --out {data_dir}")
    if not path.is_file():
        raise UserError(f"{path} is missing, so the preparation of {data_dir} did not finish; run it again")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this code reads {SCHEMA}; prepare the data again")
    if wrong := misfit(manifest):
        raise UserError(f"{path} is damaged ({wrong}); prepare the data again")
    return manifest


def misfit(manifest: dict) -> str | None:
    """What in a manifest is not of the form that the preparation writes."""
    if wrong := lacking("the manifest", manifest, {"tokenizer": dict, "source": dict, "domains": dict}):
        return wrong
    tokenizer = manifest["tokenizer"]
    if wrong := lacking("the tokenizer", tokenizer, {"name": str, "sha256": str, "n_vocab": int, "eot_token": int}):
        return wrong
    if not 0 <= tokenizer["eot_token"] < tokenizer["n_vocab"] <= 2**16:  # ids are uint16
        return f"n_vocab {tokenizer['n_vocab']}, eot_token {tokenizer['eot_token']}"
    if not manifest["domains"]:
        return "no domains"
    for domain, splits in manifest["domains"].items():
        for split, shards in splits.items() if isinstance(splits, dict) else [("splits", None)]:
            if not isinstance(shards, list):
                return f"no list of shards for {domain}, {split}"
            for i, shard in enumerate(shards):
                if wrong := lacking(f"shard {i} of {domain}, {split}", shard, SHARD):
                    return wrong
                labels = shard.get("kinds", [])
                if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                    return f"shard {i} of {domain}, {split}: kinds {labels}"
    return None


def lacking(what: str, entry: Any, form: dict[str, type]) -> str | None:
    """What keeps an entry from being a dictionary with these keys, their values of these types, numbers 0 or more."""
    if not isinstance(entry, dict):
        return f"{what} is {entry!r:.60}"
    for key, kind in form.items():
        value = entry.get(key)
        if type(value) is not kind or kind is int and value < 0:
            return f"{what} has {key} {value!r:.60}" if key in entry else f"{what} has no {key}"
    return None


def data_hash(manifest: dict) -> str:
    """A fingerprint of all tokens: tokenizer and sha256 of every shard."""
    content = [manifest["tokenizer"]["sha256"], [(domain, split, [shard["sha256"] for shard in shards])
               for domain, splits in sorted(manifest["domains"].items()) for split, shards in sorted(splits.items())]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def kinds_path(shard: Path) -> Path:
    """The index beside a shard whose documents carry a label: (R, 2) end and label of each stretch of one label."""
    return shard.with_suffix(".kinds.npy")
