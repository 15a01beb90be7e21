"""Reading a prepared folder again from beginning to end, and the table of what is in it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from cli import Progress, UserError
from corpus import tokenizer as tokenizers
from corpus.manifest import all_shards, kinds_path, read_manifest
from corpus.shards import BLOCK, HEADER_BYTES, npy_header

N_IDS = 2**16  # of uint16


def verify(folder: Path, workers: int) -> None:
    """Compare every shard with the manifest; UserError after a line for each that differs."""
    manifest = read_manifest(folder)
    domains = manifest["domains"]
    tokenizer = tokenizers.load(manifest["tokenizer"]["name"])
    if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{folder} was made with another version of tokenizer {tokenizer.name!r}")
    token_bytes = tokenizers.byte_lengths(tokenizer.sha256)
    shards = list(all_shards(domains))
    size = sum(shard["file_bytes"] for shard in shards)
    check = partial(verify_shard, folder, tokenizer.eot_token, token_bytes)
    problems = []
    # Threads are enough: hashing and counting release the interpreter's lock.
    with (
        Progress(total=size, unit="B", unit_scale=True, desc="verify") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for shard, problem in zip(shards, pool.map(check, shards), strict=True):
            bar.update(shard["file_bytes"])
            if problem:
                problems.append(f"{folder / shard['file']} {problem}")
    if not problems:
        problems = compare_bytes(folder, domains)
    print(table(domains))
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} of {len(shards)} shards are not as the manifest says, the "
            f"first: {problems[0]}; restore them or prepare the data again with --overwrite"
        )
    print(f"{folder}: {len(shards):,} shards are as the manifest says")


def verify_shard(folder: Path, eot: int, token_bytes: np.ndarray, info: dict) -> str | None:
    """What is wrong with one shard; None if nothing is.

    token_bytes: (n_vocab,) length of each token's text, 0 for end-of-text.
    info: the manifest's entry. Its new key "counted_bytes" gets the bytes of text in the file.
    A document counts for the shard that it ends in, so bytes are only compared per domain.
    """
    path = folder / info["file"]
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != info["file_bytes"]:
        return f"has {size:,} bytes, the manifest says {info['file_bytes']:,}"
    try:
        header, counts, sha256 = read_shard(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    n_vocab = len(token_bytes)
    unknown = np.flatnonzero(counts[n_vocab:])
    if sha256 != info["sha256"]:
        return "has another sha256 than the manifest says"
    if header != npy_header(info["tokens"]) or counts.sum() != info["tokens"]:
        return f"holds {counts.sum():,} tokens, the manifest says {info['tokens']:,}"
    if len(unknown):
        return f"holds token {n_vocab + unknown[0]}, the tokenizer has {n_vocab:,}"
    if counts[eot] != info["documents"]:
        return f"holds {counts[eot]:,} ends of documents, the manifest says {info['documents']:,}"
    info["counted_bytes"] = int(counts[:n_vocab] @ token_bytes)
    return verify_kinds(path, info) if "kinds" in info else None


def read_shard(path: Path) -> tuple[bytes, np.ndarray, str]:
    """(header, how often each id occurs # (65536,), sha256) of a shard."""
    counts = np.zeros(N_IDS, dtype=np.int64)
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        digest = hashlib.sha256(header)
        while block := file.read(BLOCK):
            digest.update(block)
            ids = np.frombuffer(block, "<u2")
            counts += np.bincount(ids, minlength=N_IDS)
    return header, counts, digest.hexdigest()


def verify_kinds(path: Path, info: dict) -> str | None:
    """What is wrong with the index of labels beside a shard; None if nothing is."""
    try:
        index = np.load(kinds_path(path))
    except (OSError, ValueError):
        return f"has no readable {kinds_path(path).name}"
    if index[-1, 0] != info["tokens"]:
        return f"has an index of {index[-1, 0]:,} tokens, not of {info['tokens']:,}"
    return None


def compare_bytes(folder: Path, domains: dict) -> list[str]:
    """A line for each domain and split whose bytes of text are not those in the manifest."""
    problems = []
    for domain, splits in domains.items():
        for split, shards in splits.items():
            listed = sum(shard["bytes"] for shard in shards)
            counted = sum(shard["counted_bytes"] for shard in shards)
            if counted != listed:
                problems.append(
                    f"{folder}/{domain}: {split} holds {counted:,} bytes of text, the manifest "
                    f"says {listed:,}"
                )
    return problems


def table(domains: dict) -> str:
    """Tokens, documents and bytes per domain and split, from a manifest's "domains"."""
    lines = [
        f"{'domain':<15}{'split':<7}{'documents':>12}{'MB of text':>12}"
        f"{'tokens':>17}{'bytes/token':>13}{'shards':>8}"
    ]
    for domain, splits in domains.items():
        for split, shards in splits.items():
            documents = sum(shard["documents"] for shard in shards)
            n_bytes = sum(shard["bytes"] for shard in shards)
            tokens = sum(shard["tokens"] for shard in shards)
            lines.append(
                f"{domain:<15}{split:<7}{documents:>12,}{n_bytes / 1e6:>12,.2f}"
                f"{tokens:>17,}{n_bytes / tokens:>13.2f}{len(shards):>8,}"
            )
    lines.append("(tokens: with one end-of-text for each document)")
    return "\n".join(lines)
