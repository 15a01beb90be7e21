"""From shards on disk to batches: which windows a step trains on, and their tokens.

A shard is one domain's token stream, `DATA/<domain>/{train,val}_00000.npy`: a row of uint16, or of
uint32 where the vocabulary is above 65,536. Its window i is tokens i*T to i*T+T inclusive: T inputs
and T targets, so that each token is a target once; windows do not cross shards.

T tokens of a window, G windows of the global batch, n of them on this rank, D domains.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from corpus.manifest import in_order, kinds_path, read_manifest
from reweight import shuffled_order

# name -> probability of each domain, on any scale; a domain left out is not trained on. The first
# two depend on the data: each domain as often as any other, or in proportion to training tokens.
MIXTURES: dict[str, dict[str, float] | None] = {
    "uniform": None,
    "natural": None,
    "doge": {
        "arxiv": 0.088,
        "book": 0.045,
        "cc": 0.269,
        "c4": 0.214,
        "github": 0.070,
        "stackexchange": 0.166,
        "wikipedia": 0.148,
    },
    "doremi": {
        "arxiv": 0.04235,
        "book": 0.08201,
        "cc": 0.381,
        "c4": 0.1141,
        "github": 0.0654,
        "stackexchange": 0.0847,
        "wikipedia": 0.2305,
    },
    "c4cc": {"cc": 0.5, "c4": 0.5},
}
RESTORE = "prepare the data again or restore the file"


class Split:
    """The windows of one split ("train" or "val") of a data folder; sizes are checked at once.

    Shards are opened when a window of theirs is first read.
    """

    def __init__(self, data_dir: str | Path, manifest: dict, split: str, block_size: int):
        self.block_size = block_size
        self.n_vocab = manifest["tokenizer"]["n_vocab"]
        self.dtype = np.dtype(manifest.get("dtype", "uint16")).newbyteorder("<")
        self.tokenizer_sha256 = manifest["tokenizer"]["sha256"]
        self.eot_token = manifest["tokenizer"]["eot_token"]  # the last token of each document
        self.held_out = manifest["source"].get("holdout", [])  # domains with validation text only
        shards = {
            domain: splits[split]
            for domain, splits in manifest["domains"].items()
            if splits.get(split)
        }
        self.domains = in_order(shards)
        self.infos = [shards[d] for d in self.domains]  # what the manifest says of each shard
        self.tokens = {d: sum(s["tokens"] for s in shards[d]) for d in self.domains}
        self.bytes = {d: sum(s["bytes"] for s in shards[d]) for d in self.domains}
        self.sha256 = {d: [s["sha256"] for s in shards[d]] for d in self.domains}

        # Per domain: paths of its shards; ends[d][k] = number of windows in its first k + 1 shards.
        self.paths, self.ends = [], []
        self.as_opened = {}  # path -> state_of it
        for infos in self.infos:
            paths = [Path(data_dir) / info["file"] for info in infos]
            for path, info in zip(paths, infos, strict=True):
                check_shard(path, info)
                self.as_opened[path] = state_of(path)
            windows = [max(info["tokens"] - 1, 0) // block_size for info in infos]
            self.paths.append(paths)
            self.ends.append(np.cumsum(windows))
        self.n_windows = np.array([ends[-1] for ends in self.ends], dtype=np.int64)  # (D,)

        self.header = lru_cache(maxsize=None)(partial(read_header, dtype=self.dtype))
        self.open = lru_cache(maxsize=64)(open_shard)  # systems allow 256 open files and more
        self.window_kinds = lru_cache(maxsize=None)(self._window_kinds)

    def changed(self) -> str:
        """An error message if a shard is not the file it was when the run began; "" otherwise.

        Where only the time of the last change differs, as after touch, the content decides.
        """
        for infos, paths in zip(self.infos, self.paths, strict=True):
            for info, path in zip(infos, paths, strict=True):
                state, now = self.as_opened[path], state_of(path)
                if now == state:
                    continue
                if now and now[0] == state[0] and sha256_of(path) == info["sha256"]:
                    self.as_opened[path] = now
                    continue
                return (
                    f"shard {path} was changed during the run; the checkpoints up to here are "
                    "intact; restore the file and give the same command again"
                )
        return ""

    def window(self, domain: int, index: int) -> np.ndarray:
        """(T + 1,) ids of self.dtype: the tokens of window `index` of the domain."""
        ends = self.ends[domain]
        shard = int(np.searchsorted(ends, index, side="right"))
        windows_before = ends[shard - 1] if shard else 0
        start = (index - windows_before) * self.block_size
        path = self.paths[domain][shard]
        # Read, not memory-mapped: resident memory would grow with every page ever touched.
        itemsize = self.dtype.itemsize
        size, offset = itemsize * (self.block_size + 1), self.header(path) + itemsize * start
        tokens = np.frombuffer(os.pread(self.open(path).fileno(), size, offset), dtype=self.dtype)
        if len(tokens) <= self.block_size or tokens.max() >= self.n_vocab:
            raise UserError(
                f"shard {path} was changed: expected tokens {start:,} to "
                f"{start + self.block_size:,}, each below {self.n_vocab}; {RESTORE}"
            )
        return tokens

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The labels (meta.kind) that documents of this split carry; empty for most data."""
        labels = set()
        for infos in self.infos:
            for info in infos:
                labels.update(info.get("kinds", []))
        return tuple(sorted(labels - {""}))

    def kind_of(self, pairs: np.ndarray) -> np.ndarray:
        """(n, 2) domain and window -> (n,) index into self.kinds; -1 where the window has no label.

        A window's label is that of most of its targets.
        """
        return np.array([self.window_kinds(d)[w] for d, w in pairs.tolist()], dtype=np.int64)

    def _window_kinds(self, domain: int) -> np.ndarray:
        """(n_windows,) kind_of all windows of a domain."""
        kinds = []
        for path, info in zip(self.paths[domain], self.infos[domain], strict=True):
            T, tokens = self.block_size, info["tokens"]
            first_targets = np.arange((tokens - 1) // T + 1) * T + 1
            names = info.get("kinds", [""])
            runs = np.array([[tokens, 0]])  # (R, 2) end and label of each stretch of one label
            if "kinds" in info:
                runs = np.load(kinds_path(path))
            ends = np.append(0, runs[:, 0])
            counts = []  # of each label's targets, per window
            for label in range(len(names)):
                lengths = np.diff(ends) * (runs[:, 1] == label)
                tokens_up_to = np.append(0, np.cumsum(lengths))  # grows linearly within a stretch
                counts.append(np.diff(np.interp(first_targets, ends, tokens_up_to)))
            index_of = np.array([self.kinds.index(name) if name else -1 for name in names])
            kinds.append(index_of[np.argmax(counts, axis=0)])
        return np.concatenate(kinds)


def check_shard(path: Path, info: dict) -> None:
    """UserError where a shard's file is missing or of another size than the manifest says."""
    if not path.is_file():
        raise UserError(f"shard {path} is missing; {RESTORE}")
    size = path.stat().st_size
    if size != info["file_bytes"]:
        raise UserError(
            f"shard {path} has {size:,} bytes, the manifest says {info['file_bytes']:,}: "
            f"it was cut short or changed; {RESTORE}"
        )
    if "kinds" in info and not kinds_path(path).is_file():
        raise UserError(f"{kinds_path(path)} is missing; {RESTORE}")


def state_of(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change of a file; None if stat fails."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open_shard(path) as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


class ShardFile(FileIO):
    """Closes itself with its last reference, without Python's warning that nobody closed it."""

    def __del__(self):
        self.close()


def open_shard(path: Path) -> ShardFile:
    """A shard's file."""
    try:
        return ShardFile(path)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error}); {RESTORE}") from None


def read_header(path: Path, dtype: np.dtype) -> int:
    """The bytes before a shard's first token; UserError where it is not one row of `dtype`."""
    with open_shard(path) as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
        except (OSError, ValueError) as error:
            raise UserError(f"shard {path} cannot be read ({error}); {RESTORE}") from None
        if found != dtype or len(shape) != 1:
            raise UserError(
                f"shard {path} holds {found} of shape {shape}, not a row of {dtype}; {RESTORE}"
            )
        return file.tell()


def probabilities(mixture: str) -> dict[str, float] | None:
    """A mixture's numbers with a sum of 1; None where they depend on the data."""
    weights = parse_mixture(mixture)
    if weights is None:
        return None
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in weights.items()}


def parse_mixture(mixture: str) -> dict[str, float] | None:
    """The numbers that a name in MIXTURES stands for, or those in "cc=0.5,c4=0.5"."""
    if mixture in MIXTURES:
        return MIXTURES[mixture]
    weights = {}
    for part in mixture.split(","):
        domain, _, number = part.partition("=")
        try:
            weights[domain.strip()] = float(number)
        except ValueError:
            weights[""] = math.nan
    is_valid = all(0 <= weight < math.inf for weight in weights.values())
    if not is_valid or "" in weights or sum(weights.values()) == 0:
        raise UserError(
            f"--mixture {mixture}: expected {', '.join(MIXTURES)}, or numbers of domains, such as "
            "cc=0.5,c4=0.5"
        )
    return weights


def mixture_weights(name: str, split: Split) -> np.ndarray:
    """(D,) probabilities of the split's domains; UserError if one has no windows to draw."""
    weights = parse_mixture(name)
    if weights is None:
        weights = split.tokens if name == "natural" else dict.fromkeys(split.domains, 1.0)
    weights = {d: p for d, p in weights.items() if p > 0 and d not in split.held_out}
    has_windows = {d for d, n in zip(split.domains, split.n_windows, strict=True) if n}
    empty = [d for d in weights if d not in has_windows]
    if (empty and name != "natural") or not has_windows.intersection(weights):
        raise UserError(
            f"mixture {name!r} asks for {', '.join(empty) or 'data'}, but the data folder has no "
            f"training window of {split.block_size} tokens there (it has: "
            f"{', '.join(sorted(has_windows)) or 'none'}); prepare these domains, or choose "
            "another --mixture or a smaller --block_size"
        )
    p = np.array([weights.get(d, 0.0) if d in has_windows else 0.0 for d in split.domains])
    return p / p.sum()


class DomainSampler:
    """Which windows each step trains on: a function of (seed, mixture, data, step) alone.

    Every sample's domain is drawn independently from the mixture. Within a domain, windows come
    without replacement, epoch after epoch: in a seeded pseudo-random order, by a permutation that
    needs no table, or (order "file") one after the other.
    """

    def __init__(
        self,
        weights: np.ndarray,
        n_windows: np.ndarray,
        global_batch_size: int,
        seed: int,
        order: str = "shuffled",
    ):
        self.n_windows, self.global_batch_size = n_windows, global_batch_size
        self.seed, self.order = seed, order
        self.weights = weights  # (D,)
        self.cumulative = np.cumsum(weights)
        last_domain = np.flatnonzero(weights)[-1]
        self.cumulative[last_domain:] = 1.0  # rounding must not reach past the last domain in use
        # A step and the samples of each domain before it. It is replaced as a whole, since batches
        # are drawn in a thread of their own.
        self.counted = (0, np.zeros(len(weights), dtype=np.int64))

    def domains_of(self, step: int) -> np.ndarray:
        """(G,) domain of each sample of a step."""
        # Raw output of a counter-based generator: NumPy keeps it stable across versions, unlike the
        # methods of Generator.
        raw = np.random.Philox(key=[self.seed, step]).random_raw(self.global_batch_size)
        uniform = (raw >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        return np.searchsorted(self.cumulative, uniform, side="right")

    def drawn_before(self, step: int) -> np.ndarray:
        """(D,) samples of each domain before a step, counted on or back from the last such call."""
        counted_step, drawn = self.counted
        sign = 1 if step > counted_step else -1
        for between in range(min(step, counted_step), max(step, counted_step)):  # 10 us each
            drawn = drawn + sign * np.bincount(self.domains_of(between), minlength=len(drawn))
        self.counted = (step, drawn)
        return drawn

    def draw(self, step: int) -> np.ndarray:
        """(G, 2) int64: domain and window of each sample of the global batch."""
        drawn = self.drawn_before(step)
        domain = self.domains_of(step)
        window = np.zeros_like(domain)
        for d in np.unique(domain):
            members = domain == d
            window[members] = self._windows(d, drawn[d] + np.arange(members.sum()))
        return np.stack([domain, window], axis=1)

    def state(self, step: int) -> dict:
        """What a checkpoint of `step` holds, so that a resumed run need not count again."""
        drawn = self.drawn_before(step).tolist()
        return {"step": step, "drawn": drawn, "sha256": self._fingerprint(step, drawn)}

    def load_state(self, saved: Any) -> None:
        """Continue from what `state` gave.

        Counts that are damaged, absent (in older checkpoints), or of another seed, mixture or batch
        are left alone: the next draw counts from where the sampler is, and draws the same.
        """
        if not isinstance(saved, dict):
            return
        step, drawn = saved.get("step"), saved.get("drawn")
        if saved.get("sha256") == self._fingerprint(step, drawn):
            self.counted = (step, np.array(drawn, dtype=np.int64))

    def _fingerprint(self, step: Any, drawn: Any) -> str:
        """Hash of counts and of all that they depend on."""
        content = [self.seed, self.global_batch_size, self.weights.tolist(), step, drawn]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _windows(self, domain: int, numbers: np.ndarray) -> np.ndarray:
        """The windows of a domain's samples, numbered from the start of training."""
        n = int(self.n_windows[domain])
        epoch, position = np.divmod(numbers, n)
        if self.order == "file":
            return position
        windows = [permute(position[epoch == e], n, self.seed, domain, e) for e in np.unique(epoch)]
        return np.concatenate(windows)


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Entries `index` of a pseudo-random permutation of range(n).

    A four-round Feistel network with cycle walking: no table, however large n is. Of the orders of
    few windows it reaches only some, so there is a table for n < 17.
    """
    if n < 17:
        return shuffled_order(n, *key)[index]
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    round_keys = np.random.SeedSequence(key).generate_state(4, np.uint64)

    def shuffle(value: np.ndarray) -> np.ndarray:
        left, right = value >> shift, value & mask
        for round_key in round_keys:
            mixed = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            mixed = mixed ^ (mixed >> np.uint64(32))
            left, right = right, left ^ (mixed & mask)
        return (left << shift) | right

    value = shuffle(index.astype(np.uint64))
    while (
        outside := value >= n
    ).any():  # the network permutes up to 4n numbers: walk on until below n
        value[outside] = shuffle(value[outside])
    return value.astype(np.int64)


def read_batch(split: Split, pairs: np.ndarray, pin: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 2) domain and window -> x, y (n, T) int64 and domain (n,) int64."""
    windows = np.stack([split.window(d, w) for d, w in pairs.tolist()])  # (n, T + 1)
    tokens = torch.from_numpy(windows.astype(np.int64))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
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


def validation_windows(split: Split, per_domain: int | None) -> np.ndarray:
    """(M, 2) domain and window: all of them, or `per_domain` evenly spaced ones.

    They are the same for every run and layout.
    """
    pairs = []
    for d, n in enumerate(split.n_windows.tolist()):
        m = min(n, per_domain or n)
        pairs += [(d, i * n // m) for i in range(m)]
    if not pairs:
        raise UserError(
            f"the validation split has no window of {split.block_size} tokens; prepare one (files "
            "or folders called validation), or use a smaller --block_size"
        )
    return np.array(pairs, dtype=np.int64)


class RunData(NamedTuple):
    """The data of a training run."""

    manifest: dict
    train: Split
    val: Split
    val_windows: np.ndarray  # (M, 2) domain and window of the fixed validation windows
    sampler: DomainSampler


class Batch(NamedTuple):
    """What one rank needs of a step's global batch."""

    x: Tensor  # (n, T) int64 token ids
    y: Tensor  # (n, T) int64 targets
    domain: Tensor  # (G,) int64 domain of each sample of the global batch
    pairs: np.ndarray  # (G, 2) int64 domain and window of each sample of the global batch


def open_data(
    data_dir: str,
    block_size: int,
    mixture: str,
    global_batch_size: int,
    seed: int,
    eval_windows: int,
    data_order: str = "shuffled",
) -> RunData:
    """The data of a run; UserError where the folder is damaged or lacks what the mixture draws."""
    manifest = read_manifest(data_dir)
    train = Split(data_dir, manifest, "train", block_size)
    val = Split(data_dir, manifest, "val", block_size)
    weights = mixture_weights(mixture, train)
    sampler = DomainSampler(weights, train.n_windows, global_batch_size, seed, data_order)
    return RunData(manifest, train, val, validation_windows(val, eval_windows), sampler)


def batches(
    data: RunData, first_step: int, max_steps: int, rank: int, world_size: int, pin: bool = False
) -> Iterator[Batch]:
    """A rank's part of each step, read ahead in the background. pin: for copies to a GPU."""
    n = data.sampler.global_batch_size // world_size

    def read(step: int) -> Batch:
        pairs = data.sampler.draw(step)
        x, y, _ = read_batch(data.train, pairs[rank * n : (rank + 1) * n], pin)
        return Batch(x, y, torch.from_numpy(pairs[:, 0].copy()), pairs)

    return prefetch(read, range(first_step, max_steps))
