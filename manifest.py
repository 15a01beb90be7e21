"""What a data folder is: its domains, and manifest.json, which lists the shards. No torch: preparation imports it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from errors import UserError

SCHEMA = 1  # version of manifest.json

# SlimPajama's meta.redpajama_set_name -> our name, in the order of the published weight lists
SET_NAMES = {
    "RedPajamaArXiv": "arxiv", "RedPajamaBook": "book", "RedPajamaCommonCrawl": "cc", "RedPajamaC4": "c4",
    "RedPajamaGithub": "github", "RedPajamaStackExchange": "stackexchange", "RedPajamaWikipedia": "wikipedia",
}
DOMAINS = tuple(SET_NAMES.values())


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
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this code reads {SCHEMA}; prepare the data again")
    return manifest


def data_hash(manifest: dict) -> str:
    """A fingerprint of all tokens: tokenizer and sha256 of every shard."""
    content = [manifest["tokenizer"]["sha256"], [(domain, split, [shard["sha256"] for shard in shards])
               for domain, splits in sorted(manifest["domains"].items()) for split, shards in sorted(splits.items())]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def kinds_path(shard: Path) -> Path:
    """The index beside a shard whose documents carry a label: (R, 2) end and label of each stretch of one label."""
    return shard.with_suffix(".kinds.npy")
