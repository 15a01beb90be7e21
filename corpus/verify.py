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


def verify(folder: Path, workers: int) -> None:
    """Compare every shard with the manifest; UserError after a line for each that differs."""
    manifest = read_manifest(folder)
    domains = manifest["domains"]
    entry = manifest["tokenizer"]
    if entry["name"] in tokenizers.NAMES:
        if tokenizers.describe(entry["name"])["sha256"] != entry["sha256"]:
            raise UserError(f"{folder} was made with another version of tokenizer {entry['name']}")
    tokenizer = tokenizers.find(entry["sha256"], folder)
    token_bytes = tokenizers.byte_lengths(entry["sha256"], folder)
    dtype = manifest.get("dtype", "uint16")
    shards = list(all_shards(domains))
    size = sum(shard["file_bytes"] for shard in shards)
    check = partial(verify_shard, folder, entry["eot_token"], token_bytes, dtype)
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
    if not problems and tokenizer.adds_up:
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


def verify_shard(
    folder: Path, eot: int, token_bytes: np.ndarray, dtype: str, info: dict
) -> str | None:
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
    n_vocab = len(token_bytes)
    try:
        header, counts, sha256 = read_shard(path, dtype, n_vocab)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if sha256 != info["sha256"]:
        return "has another sha256 than the manifest says"
    if header != npy_header(info["tokens"], dtype) or counts.sum() != info["tokens"]:
        return f"holds {counts.sum():,} tokens, the manifest says {info['tokens']:,}"
    if counts[n_vocab]:
        return f"holds {counts[n_vocab]:,} ids that the tokenizer, of {n_vocab:,}, does not have"
    if counts[eot] != info["documents"]:
        return f"holds {counts[eot]:,} ends of documents, the manifest says {info['documents']:,}"
    info["counted_bytes"] = int(counts[:n_vocab] @ token_bytes)
    return verify_kinds(path, info) if "kinds" in info else None


def read_shard(path: Path, dtype: str, n_vocab: int) -> tuple[bytes, np.ndarray, str]:
    """(header, how often each id occurs # (n_vocab + 1,), sha256) of a shard.

    The last count is that of all ids that are too large.
    """
    counts = np.zeros(n_vocab + 1, dtype=np.int64)
    little_endian = np.dtype(dtype).newbyteorder("<")
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        digest = hashlib.sha256(header)
        while block := file.read(BLOCK):
            digest.update(block)
            whole = len(block) - len(block) % little_endian.itemsize
            ids = np.frombuffer(block[:whole], little_endian).astype(np.intp)
            counts += np.bincount(np.minimum(ids, n_vocab), minlength=n_vocab + 1)
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
