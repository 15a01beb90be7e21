"""A data folder of which each domain has only its first tokens, to repeat them for many epochs."""

import json
import shutil
from pathlib import Path

import numpy as np

from corpus.hf_tokenizer import pass_copy_on
from corpus.manifest import read_manifest
from corpus.tokenizer import byte_lengths
from data import sha256_of
from files import write_text


def shorten(source: Path, to: Path, tokens: int) -> None:
    """Copy a data folder with the first `tokens` training tokens of each domain, or fewer."""
    manifest = read_manifest(source)
    lengths = byte_lengths(manifest["tokenizer"]["sha256"], source)
    for splits in manifest["domains"].values():
        splits["train"] = splits["train"][:1]
        for info in (*splits["train"], *splits["val"]):
            (to / info["file"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / info["file"], to / info["file"])
            info.pop("kinds", None)
        (info,) = splits["train"]
        path = to / info["file"]
        shard = np.load(path)[:tokens]
        np.save(path, shard)
        info |= {
            "tokens": len(shard),
            "documents": int((shard == manifest["tokenizer"]["eot_token"]).sum()),
            "bytes": int(lengths[shard].sum()),
            "file_bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
    pass_copy_on(source, to, manifest["tokenizer"]["sha256"])
    # Last: a folder with a manifest is complete.
    write_text(to / "manifest.json", json.dumps(manifest, indent=1))
