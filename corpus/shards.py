"""Token shards: written whole or not at all, continued after an interruption."""

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
