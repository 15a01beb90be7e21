"""A prepared folder read again from beginning to end, and its table."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from corpus.shards import BLOCK, npy_header
from errors import UserError
from manifest import kinds_path, read_manifest


def verify(folder: Path, workers: int) -> None:
    """Read a prepared folder again; a line for each shard that is not as the manifest says, then UserError."""
    manifest = read_manifest(folder)
    tokenizer = tokenizers.load(manifest["tokenizer"]["name"])
    if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{folder} was made with another version of tokenizer {tokenizer.name!r}")
    token_bytes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)])
    token_bytes[tokenizer.eot_token] = 0
    listed = [s for splits in manifest["domains"].values() for shards in splits.values() for s in shards]
    wrong = []
    with tqdm(total=sum(s["file_bytes"] for s in listed), unit="B", unit_scale=True, desc="verify") as bar, \
            ThreadPoolExecutor(workers) as pool:  # hashing and counting let go of the interpreter's lock
        def check(info: dict) -> str | None:
            return verify_shard(folder, info, tokenizer.n_vocab, tokenizer.eot_token, token_bytes)
        for info, problem in zip(listed, pool.map(check, listed), strict=True):
            bar.update(info["file_bytes"])
            if problem:
                wrong.append(f"{folder / info['file']} {problem}")
    for domain, splits in manifest["domains"].items():
        for split, shards in splits.items():
            held = sum(s["bytes"] for s in shards)
            counted = sum(s.get("counted_bytes", 0) for s in shards)
            if not wrong and counted != held:
                wrong.append(f"{folder}/{domain}: {split} holds {counted:,} bytes of text, the manifest says {held:,}")
    print(table(manifest["domains"]))
    for line in wrong:
        print(line)
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} of {len(listed)} shards are not as the manifest says, the first: "
                        f"{wrong[0]}; restore them or prepare the data again with --overwrite")
    print(f"{folder}: {len(listed):,} shards are as the manifest says")


def table(domains: dict) -> str:
    """Tokens, documents and bytes per domain and split."""
    lines = [f"{'domain':<15}{'split':<7}{'documents':>12}{'MB of text':>12}{'tokens':>17}{'bytes/token':>13}"
             f"{'shards':>8}"]
    for domain, splits in domains.items():
        for split, shards in splits.items():
            documents, n_bytes, tokens = (sum(s[key] for s in shards) for key in ("documents", "bytes", "tokens"))
            lines.append(f"{domain:<15}{split:<7}{documents:>12,}{n_bytes / 1e6:>12,.2f}{tokens:>17,}"
                         f"{n_bytes / tokens:>13.2f}{len(shards):>8,}")
    return "\n".join([*lines, "(tokens: with one end-of-text for each document)"])


def verify_shard(out: Path, info: dict, n_vocab: int, eot: int, token_bytes: np.ndarray) -> str | None:
    """What is wrong with a shard, read again from beginning to end; None if nothing is.

    token_bytes: (n_vocab,) length of each token's text, 0 for end-of-text. A shard's documents are those that end in
    it, so bytes of text are compared over a whole domain, by the caller, through info["counted_bytes"].
    """
    path = out / info["file"]
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != info["file_bytes"]:
        return f"has {size:,} bytes, the manifest says {info['file_bytes']:,}"
    counts = np.zeros(65536, dtype=np.int64)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            header = file.read(len(npy_header(0)))
            digest.update(header)
            while block := file.read(BLOCK):
                digest.update(block)
                counts += np.bincount(np.frombuffer(block, "<u2"), minlength=65536)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if digest.hexdigest() != info["sha256"]:
        return "has another sha256 than the manifest says"
    if header != npy_header(info["tokens"]) or counts.sum() != info["tokens"]:
        return f"holds {counts.sum():,} tokens, the manifest says {info['tokens']:,}"
    if len(outside := np.flatnonzero(counts[n_vocab:])):
        return f"holds token {n_vocab + outside[0]}, the tokenizer has {n_vocab:,}"
    if counts[eot] != info["documents"]:
        return f"holds {counts[eot]:,} ends of documents, the manifest says {info['documents']:,}"
    info["counted_bytes"] = int(counts[:n_vocab] @ token_bytes)
    if "kinds" in info:
        try:
            index = np.load(kinds_path(path))
        except (OSError, ValueError):
            return f"has no readable {kinds_path(path).name}"
        if index[-1, 0] != info["tokens"]:
            return f"has an index of {index[-1, 0]:,} tokens, not of {info['tokens']:,}"
    return None
