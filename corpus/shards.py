"""Token shards: each file appears whole or not at all, and writing can continue after a kill."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from corpus.manifest import kinds_path
from files import write_npy

BLOCK = 1 << 20  # bytes written or read at once


class ShardWriter:
    """Writes one domain's tokens of one unit, in files of at most `shard_tokens`.

    The files are DOMAIN/SPLIT_UNIT.npy, then DOMAIN/SPLIT_UNIT_01.npy and so on, so that their
    names sort in the order of the documents. Each is renamed into place once it is whole.
    """

    def __init__(
        self,
        out: Path,
        domain: str,
        split: str,
        shard_tokens: int,
        unit: int = 0,
        dtype: str = "uint16",
    ):
        self.out = out
        self.dtype = np.dtype(dtype)
        self.stem = f"{domain}/{split}_{unit:05d}"
        self.shard_tokens = shard_tokens
        self.shards: list[dict] = []  # the manifest's entries of the finished shards
        self.tokens = 0  # in all shards
        self.file = None  # the open shard
        self.info: dict = {}  # what is in the open shard so far
        self.runs: list[tuple[int, str]] = []  # (end, kind) of its stretches of one kind

    def write(self, ids: np.ndarray, kind: str = "") -> None:
        """Append a part of a document. ids: (n,) of self.dtype; kind: its label, if any."""
        assert ids.dtype == self.dtype, f"{ids.dtype} ids for shards of {self.dtype}"
        self.tokens += len(ids)
        while True:
            if self.file is None:
                self._open_new()
            room = self.shard_tokens - self.info["tokens"]
            part = ids[:room]
            self.file.write(part)
            self.info["tokens"] += len(part)
            if self.runs and self.runs[-1][1] == kind:
                self.runs.pop()  # the next line appends it again, with a later end
            self.runs.append((self.info["tokens"], kind))
            ids = ids[len(part) :]
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

    def close(self) -> list[dict]:
        """Finish the last shard; returns the manifest's entries of all shards."""
        if self.file is not None:
            self._finish()
        return self.shards

    def state(self) -> dict:
        """What `restore` needs to continue from here, once all that was written is on the disk."""
        if self.file is None:
            return {"shards": self.shards, "open": None, "runs": []}
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"shards": self.shards, "open": self.info, "runs": self.runs}

    def restore(self, state: dict) -> None:
        """Continue from a state; FileNotFoundError if its open shard is gone."""
        self.shards = state["shards"]
        self.tokens = sum(shard["tokens"] for shard in self.shards)
        info = state["open"]
        if info is None:
            return
        self.tokens += info["tokens"]
        path = self.out / info["file"]
        temporary = temporary_path(path)
        if path.exists():  # it was finished after the state was written: open it again
            os.replace(path, temporary)
        if temporary.stat().st_size < self._size(info["tokens"]):
            raise FileNotFoundError(f"{temporary} is shorter than what was written to it")
        self._open(info, [tuple(run) for run in state["runs"]])

    def _size(self, tokens: int) -> int:
        """Bytes of a shard with so many tokens."""
        return HEADER_BYTES + self.dtype.itemsize * tokens

    def _open_new(self) -> None:
        number = len(self.shards)
        suffix = f"_{number:02d}" if number else ""
        info = {
            "file": f"{self.stem}{suffix}.npy",
            "tokens": 0,
            "documents": 0,
            "bytes": 0,
        }
        self._open(info, runs=[])

    def _open(self, info: dict, runs: list[tuple[int, str]]) -> None:
        """Open the shard that `info` describes, cut back to the tokens that it had then."""
        self.info = info
        self.runs = runs
        path = temporary_path(self.out / info["file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "r+b" if info["tokens"] else "w+b"
        self.file = open(path, mode, buffering=BLOCK)
        self.file.truncate(self._size(info["tokens"]))
        self.file.write(npy_header(0, self.dtype))  # _finish writes the number of tokens
        self.file.seek(0, os.SEEK_END)

    def _finish(self) -> None:
        """Complete the open shard's header, hash it and rename it into place."""
        file = self.file
        file.seek(0)
        file.write(npy_header(self.info["tokens"], self.dtype))
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self.file = None
        path = self.out / self.info["file"]
        entry = {
            **self.info,
            "file_bytes": temporary_path(path).stat().st_size,
            "sha256": digest.hexdigest(),
        }
        kinds = self._write_kinds(path)
        if kinds:
            entry["kinds"] = kinds
        os.replace(temporary_path(path), path)
        self.shards.append(entry)

    def _write_kinds(self, path: Path) -> list[str]:
        """Write the index of labels beside a shard; returns the labels, [] if there are none."""
        labels = {kind for _, kind in self.runs} - {""}
        if not labels:
            return []
        kinds = [*sorted(labels), ""]
        index = [(end, kinds.index(kind)) for end, kind in self.runs]
        write_npy(kinds_path(path), np.array(index, dtype=np.int64))
        return kinds


def temporary_path(path: Path) -> Path:
    """Where a shard is written until it is whole."""
    return path.with_name(f"{path.name}.tmp")


def npy_header(n: int, dtype: str | np.dtype = "uint16") -> bytes:
    """The header of an .npy file with n tokens.

    NumPy pads it, so its length depends neither on n nor on the type.
    """
    header = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    form = {"descr": descr, "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(header, form)
    return header.getvalue()


HEADER_BYTES = len(npy_header(0))
