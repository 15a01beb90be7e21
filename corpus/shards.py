"""Token shards: written whole or not at all, continued after an interruption, read again to be verified."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from files import write_npy
from manifest import kinds_path

BLOCK = 1 << 20


class ShardWriter:
    """One domain's tokens of one unit, in files of `shard_tokens`; each is renamed into place when it is whole.

    DOMAIN/SPLIT_UNIT.npy, the next ones with _01, _02 and so on, so that names sort in the order of the documents.
    """

    def __init__(self, out: Path, domain: str, split: str, shard_tokens: int, unit: int = 0):
        self.out, self.stem, self.shard_tokens = out, f"{domain}/{split}_{unit:05d}", shard_tokens
        self.shards: list[dict] = []
        self.tokens = 0
        self.file = None

    def write(self, ids: np.ndarray, kind: str = "") -> None:
        """Append a part of a document. ids: (n,) uint16; kind: the document's label, where it has one."""
        self.tokens += len(ids)
        while True:
            if self.file is None:
                self._open({"file": self._name(), "tokens": 0, "documents": 0, "bytes": 0}, [])
            part = ids[:self.shard_tokens - self.info["tokens"]]
            self.file.write(part)
            self.info["tokens"] += len(part)
            if self.runs and self.runs[-1][1] == kind:
                self.runs.pop()  # neighbours of one kind are one run
            self.runs.append((self.info["tokens"], kind))
            ids = ids[len(part):]
            if not len(ids):
                return
            self._finish()

    def end_document(self, n_bytes: int) -> None:
        """Count the document whose last token was just written, to the shard that it ends in."""
        self.info["documents"] += 1
        self.info["bytes"] += n_bytes

    def add(self, ids: np.ndarray, n_bytes: int, kind: str = "") -> None:
        """Append a whole document."""
        self.write(ids, kind)
        self.end_document(n_bytes)

    def _name(self) -> str:
        return f"{self.stem}{f'_{len(self.shards):02d}' if self.shards else ''}.npy"

    def _open(self, info: dict, runs: list) -> None:
        """A new shard, or the one that `info` describes, cut back to what was written then."""
        self.info = info
        self.runs: list[tuple[int, str]] = runs  # (end, kind) of each stretch of tokens of one kind
        path = self.out / f"{info['file']}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "r+b" if info["tokens"] else "w+b", buffering=BLOCK)
        header = npy_header(0)
        self.file.truncate(len(header) + 2 * info["tokens"])
        self.file.write(header)
        self.file.seek(0, os.SEEK_END)

    def _finish(self) -> None:
        self.file.seek(0)
        self.file.write(npy_header(self.info["tokens"]))
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256") if hasattr(hashlib, "file_digest") else _digest(self.file)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = self.out / self.info["file"]
        if kinds := sorted({kind for _, kind in self.runs} - {""}):  # no index where no document has a label
            names = [*kinds, ""]
            index = np.array([(end, names.index(kind)) for end, kind in self.runs], dtype=np.int64)
            write_npy(kinds_path(path), index)
        os.replace(f"{path}.tmp", path)
        self.shards.append({**self.info, "file_bytes": path.stat().st_size, "sha256": digest.hexdigest(),
                            **({"kinds": names} if kinds else {})})
        self.file = None

    def state(self) -> dict:
        """What `restore` needs to go on from here, after everything written so far is on the disk."""
        if self.file is None:
            return {"shards": self.shards, "open": None, "runs": []}
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"shards": self.shards, "open": self.info, "runs": self.runs}

    def restore(self, state: dict) -> None:
        """Go on from a state; FileNotFoundError where its open shard is gone."""
        self.shards, info = state["shards"], state["open"]
        self.tokens = sum(s["tokens"] for s in self.shards) + (info["tokens"] if info else 0)
        if info:
            path = self.out / info["file"]
            if path.exists():  # it was finished after the state was written: open it again
                os.replace(path, f"{path}.tmp")
            if os.path.getsize(f"{path}.tmp") < len(npy_header(0)) + 2 * info["tokens"]:
                raise FileNotFoundError(f"{path}.tmp is shorter than what was written to it")
            self._open(info, [tuple(run) for run in state["runs"]])

    def close(self) -> list[dict]:
        """Finish the last shard; what the manifest says of all of them."""
        if self.file is not None:
            self._finish()
        return self.shards


def npy_header(n: int) -> bytes:
    """The header of an npy file with n uint16; NumPy pads it, so its length does not depend on n."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (n,)})
    return header.getvalue()


def _digest(file: io.BufferedRandom) -> "hashlib._Hash":
    """hashlib.file_digest, which Python 3.10 has not."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest


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
