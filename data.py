"""From shards on disk to batches: which windows a step trains on, and their tokens.

A shard is one domain's token stream, `DATA/<domain>/{train,val}_00000.npy` (uint16, one dimension). Its window i is
tokens i*T to i*T+T inclusive: T inputs and T targets, so that each token is a target once; windows do not cross shards.

T tokens of a window, G windows of the global batch, D domains of the data folder.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from manifest import DOMAINS, in_order, kinds_path

# name -> probability of each domain, any scale; a domain left out is not trained on. "natural": by training tokens.
MIXTURES: dict[str, dict[str, float] | None] = {
    "uniform": dict.fromkeys(DOMAINS, 1.0),
    "doge": {"arxiv": 0.088, "book": 0.045, "cc": 0.269, "c4": 0.214, "github": 0.070, "stackexchange": 0.166,
             "wikipedia": 0.148},
    "doremi": {"arxiv": 0.04235, "book": 0.08201, "cc": 0.381, "c4": 0.1141, "github": 0.0654,
               "stackexchange": 0.0847, "wikipedia": 0.2305},
    "c4cc": {"cc": 0.5, "c4": 0.5},
    "natural": None,
}


class Split:
    """The windows of one split ("train" or "val") of a data folder; opened lazily, checked for size at once."""

    def __init__(self, data_dir: str | Path, manifest: dict, split: str, block_size: int):
        self.block_size = block_size
        shards = {d: splits[split] for d, splits in manifest["domains"].items() if splits.get(split)}
        self.domains = in_order(shards)
        self.held_out = manifest["source"].get("holdout", [])  # domains that were prepared for validation only
        self.tokens = {d: sum(s["tokens"] for s in shards[d]) for d in self.domains}
        self.bytes = {d: sum(s["bytes"] for s in shards[d]) for d in self.domains}
        self.sha256 = {d: [s["sha256"] for s in shards[d]] for d in self.domains}
        self.paths = [[Path(data_dir) / s["file"] for s in shards[d]] for d in self.domains]
        # ends[d][k]: number of windows in the first k + 1 shards of domain d
        self.ends = [np.cumsum([max(s["tokens"] - 1, 0) // block_size for s in shards[d]]) for d in self.domains]
        self.n_windows = np.array([ends[-1] for ends in self.ends], dtype=np.int64)  # (D,)
        self.header = lru_cache(maxsize=None)(read_header)
        self.open = lru_cache(maxsize=64)(open_shard)  # of thousands of shards: systems allow 256 open files and more
        self.n_vocab = manifest["tokenizer"]["n_vocab"]
        self.infos = [shards[d] for d in self.domains]  # what the manifest says of each shard
        self.window_kinds = lru_cache(maxsize=None)(self._window_kinds)
        for paths, infos in zip(self.paths, self.infos, strict=True):
            for path, info in zip(paths, infos, strict=True):
                check_shard(path, info)
        self.as_opened = {path: state_of(path) for paths in self.paths for path in paths}

    def changed(self) -> str:
        """What to say if a shard is no longer the file it was when the run began, or nothing."""
        path = next((path for path, then in self.as_opened.items() if state_of(path) != then), None)
        return (f"shard {path} was changed during the run; the checkpoints up to here are intact; restore the file and "
                "give the same command again") if path else ""

    def window(self, domain: int, index: int) -> np.ndarray:
        """(T + 1,) uint16: the tokens of window `index` of the domain."""
        shard = int(np.searchsorted(self.ends[domain], index, side="right"))
        start = (index - (self.ends[domain][shard - 1] if shard else 0)) * self.block_size
        path = self.paths[domain][shard]
        # Not memory-mapped: a process's resident memory would grow with every page it has ever touched.
        offset, file = self.header(path) + 2 * start, self.open(path)
        tokens = np.frombuffer(os.pread(file.fileno(), 2 * (self.block_size + 1), offset), dtype="<u2")
        if len(tokens) <= self.block_size or tokens.max() >= self.n_vocab:
            raise UserError(f"shard {path} was changed: tokens {start:,} to {start + self.block_size:,} must be there, "
                            f"each below {self.n_vocab}; prepare the data again or restore the file")
        return tokens


    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The labels (meta.kind) that documents of this split carry; empty for most data."""
        return tuple(sorted({name for infos in self.infos for info in infos for name in info.get("kinds", []) if name}))

    def kind_of(self, pairs: np.ndarray) -> np.ndarray:
        """(n, 2) domain and window -> (n,) index into self.kinds of the label of most of its targets; -1 for none."""
        return np.array([self.window_kinds(d)[w] for d, w in pairs.tolist()], dtype=np.int64)

    def _window_kinds(self, domain: int) -> np.ndarray:
        """(n_windows,) what kind_of says of all windows of a domain."""
        out = []
        for path, info in zip(self.paths[domain], self.infos[domain], strict=True):
            first_targets = np.arange((info["tokens"] - 1) // self.block_size + 1) * self.block_size + 1
            runs = np.load(kinds_path(path)) if "kinds" in info else np.array([[info["tokens"], 0]])  # (R, 2) end, kind
            names = info.get("kinds", [""])
            counts = []  # of each kind, per window: tokens of the kind up to a position grow linearly within a run
            for kind in range(len(names)):
                total = np.cumsum(np.diff(runs[:, 0], prepend=0) * (runs[:, 1] == kind))
                counts.append(np.diff(np.interp(first_targets, np.append(0, runs[:, 0]), np.append(0, total))))
            here = np.array([self.kinds.index(name) if name else -1 for name in names])
            out.append(here[np.argmax(counts, axis=0)])
        return np.concatenate(out)


def check_shard(path: Path, info: dict) -> None:
    if not path.is_file():
        raise UserError(f"shard {path} is missing; prepare the data again or restore the file")
    if path.stat().st_size != info["file_bytes"]:
        raise UserError(f"shard {path} has {path.stat().st_size:,} bytes, the manifest says {info['file_bytes']:,}: "
                        "it was cut short or changed; prepare the data again or restore the file")
    if "kinds" in info and not kinds_path(path).is_file():
        raise UserError(f"{kinds_path(path)} is missing; prepare the data again or restore the file")


def state_of(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change of a file; None if it cannot be asked for."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return None


def open_shard(path: Path) -> BinaryIO:
    """A shard's file; it is closed with the last reference to it."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error}); prepare the data again or restore the file") from None


def read_header(path: Path) -> int:
    """The bytes before a shard's first token; UserError where it holds anything but a row of uint16."""
    with open_shard(path) as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except (OSError, ValueError) as error:
            raise UserError(f"shard {path} cannot be read ({error}); prepare the data again or restore the "
                            "file") from None
        if dtype != np.dtype("<u2") or len(shape) != 1:
            raise UserError(f"shard {path} holds {dtype} of shape {shape}, not a row of uint16; prepare the data again "
                            "or restore the file")
        return file.tell()


def mixture_weights(name: str, split: Split) -> np.ndarray:
    """(D,) probabilities of the split's domains; UserError if the mixture asks for a domain without windows."""
    weights = MIXTURES[name] if MIXTURES[name] is not None else split.tokens
    weights = {d: p for d, p in weights.items() if d not in split.held_out}
    full = {d for d, n in zip(split.domains, split.n_windows, strict=True) if n}
    empty = [d for d in weights if weights[d] > 0 and d not in full]
    if (empty and MIXTURES[name] is not None) or not full & {d for d in weights if weights[d] > 0}:
        raise UserError(f"mixture {name!r} asks for {', '.join(empty) or 'data'}, but the data folder has no training "
                        f"window of {split.block_size} tokens there (it has: {', '.join(sorted(full)) or 'none'}); "
                        "prepare these domains, or choose another --mixture or a smaller --block_size")
    p = np.array([weights.get(d, 0.0) if d in full else 0.0 for d in split.domains])
    return p / p.sum()


class DomainSampler:
    """Which windows each step trains on: a function of (seed, mixture, data, step) and nothing else.

    Every sample's domain is drawn independently from the mixture. Within a domain, windows come in a seeded
    pseudo-random order without replacement, epoch after epoch, by a permutation that needs no table.
    """

    def __init__(self, weights: np.ndarray, n_windows: np.ndarray, global_batch_size: int, seed: int):
        self.n_windows, self.global_batch_size, self.seed = n_windows, global_batch_size, seed
        self.cumulative = np.cumsum(weights)
        self.cumulative[np.flatnonzero(weights)[-1]:] = 1.0  # rounding must not reach past the last domain in use
        self.step, self.drawn = 0, np.zeros(len(weights), dtype=np.int64)  # samples of each domain before `step`

    def domains_of(self, step: int) -> np.ndarray:
        """(G,) domain of each sample of a step."""
        # Raw output of a counter-based generator: NumPy keeps it stable across versions, unlike Generator's methods.
        raw = np.random.Philox(key=[self.seed, step]).random_raw(self.global_batch_size)
        return np.searchsorted(self.cumulative, (raw >> np.uint64(11)) * 2.0**-53, side="right")

    def draw(self, step: int) -> np.ndarray:
        """(G, 2) int64: domain and window of each sample of the global batch."""
        if step < self.step:
            self.step, self.drawn[:] = 0, 0
        while self.step < step:  # a jump (resume) counts through the steps between: about 10 microseconds each
            self.drawn += np.bincount(self.domains_of(self.step), minlength=len(self.drawn))
            self.step += 1
        domain = self.domains_of(step)
        pairs = np.stack([domain, np.zeros_like(domain)], axis=1)
        for d in np.unique(domain):
            mine = domain == d
            epoch, position = np.divmod(self.drawn[d] + np.arange(mine.sum()), self.n_windows[d])
            pairs[mine, 1] = np.concatenate([permute(position[epoch == e], int(self.n_windows[d]), self.seed, d, e)
                                             for e in np.unique(epoch)])
        return pairs


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Entries `index` of a pseudo-random permutation of range(n): a four-round Feistel network with cycle walking."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    round_keys = np.random.SeedSequence(key).generate_state(4, np.uint64)

    def shuffle(value: np.ndarray) -> np.ndarray:
        left, right = value >> shift, value & mask
        for k in round_keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << shift) | right

    value = shuffle(index.astype(np.uint64))
    while (outside := value >= n).any():  # the network permutes up to 4n numbers: walk on until back below n
        value[outside] = shuffle(value[outside])
    return value.astype(np.int64)


def read_batch(split: Split, pairs: np.ndarray, pin: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 2) domain and window -> x, y (n, T) int64 and domain (n,) int64."""
    tokens = torch.from_numpy(np.stack([split.window(d, w) for d, w in pairs.tolist()]).astype(np.int64))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (n, T)
    if pin:
        x, y = x.pin_memory(), y.pin_memory()
    return x, y, torch.from_numpy(pairs[:, 0].copy())


def prefetch(read: Callable[[int], Any], steps: Iterable[int], depth: int = 2) -> Iterator[Any]:
    """read(step) for each step in order, up to `depth` steps ahead in a background thread."""
    steps = iter(steps)
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(read, step) for step in islice(steps, depth))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(read, step) for step in islice(steps, 1))
            yield batch
