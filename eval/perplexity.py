"""Per-domain loss and perplexity of a model on fixed validation windows; all ranks share the work.

    python eval/perplexity.py --run runs/124m_uniform_linupper_seed42          # the newest checkpoint, all windows
    torchrun --nproc_per_node 8 -- eval/perplexity.py --run RUN/checkpoints/step_00020000
    python eval/perplexity.py --run RUN --stride 64 --to RUN/eval/sliding.json             # more context per token
    python eval/perplexity.py --hf gpt2 --data_dir data/slimpajama --block_size 512 --to results/gpt2.json

Writes RUN/eval/perplexity.json, or --to, and beside it the loss of each window (perplexity_windows.npz, an array per
domain). Validation is never weighted: every window counts once, whatever the run trained on.
M windows of T tokens, R forward passes, D domains.
"""

import hashlib
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import data
import distributed
from configurator import Parser
from errors import UserError, run
from eval import models
from eval.compare import bootstrap
from files import write_bytes, write_text
from manifest import read_manifest

RESULT = "perplexity.json"


def validation_windows(split: data.Split, per_domain: int | None) -> np.ndarray:
    """(M, 2) domain and window: all of them, or `per_domain` evenly spaced ones; the same for every run and layout."""
    pairs = []
    for d, n in enumerate(split.n_windows.tolist()):
        m = min(n, per_domain or n)
        pairs += [(d, i * n // m) for i in range(m)]
    if not pairs:
        raise UserError(f"the validation split has no window of {split.block_size} tokens; prepare one (files or "
                        "folders called validation), or use a smaller --block_size")
    return np.array(pairs, dtype=np.int64)


class Shifted:
    """A split whose windows are named by their first token, counted over the domain's windows laid end to end."""

    def __init__(self, split: data.Split):
        self.split = split

    def window(self, domain: int, start: int) -> np.ndarray:
        """(T + 1,) uint16; `start` is at most the first token of its shard's last window."""
        index, into = divmod(start, self.split.block_size)
        tokens = self.split.window(domain, index)
        return np.concatenate([tokens[into:], self.split.window(domain, index + 1)[1:into + 1]]) if into else tokens


def passes(split: data.Split, pairs: np.ndarray, stride: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R, 2) domain and first token of each forward pass, (R,) its first target that counts, (R,) its window's index.

    Without a stride each of the (M, 2) pairs is scored on its own. With one, `pairs` are all windows, and passes start
    every `stride` tokens of a shard. They score the very targets that its windows have, each once, so that only the
    context differs: at least T - stride tokens before every target, but for a shard's first pass.
    """
    T = split.block_size
    if stride is None:
        return pairs * [1, T], np.zeros(len(pairs), dtype=np.int64), np.arange(len(pairs))
    rows, first = [], []
    for d, ends in enumerate(split.ends):
        for end, n in zip(ends, np.diff(ends, prepend=0), strict=True):
            if n:
                last = (n - 1) * T  # a pass from here on ends with the last window's last target
                starts = np.minimum(np.arange(0, last + stride, stride), last)
                rows.append(np.stack([np.full_like(starts, d), (end - n) * T + starts], axis=1))
                first.append(T - np.diff(starts, prepend=-T))
    rows = np.concatenate(rows)
    before = np.cumsum(split.n_windows) - split.n_windows  # windows of the domains before
    return rows, np.concatenate(first), before[rows[:, 0]] + rows[:, 1] // T


@torch.no_grad()
def window_losses(model: torch.nn.Module, split: data.Split, pairs: np.ndarray, batch_size: int, dtype: str,
                  stride: int | None = None, progress: bool = False, stop: Callable[[], int] = lambda: 0
                  ) -> np.ndarray | None:
    """(M,) float64 mean loss of each window in nats per token; the same on every rank.

    None if `stop`, which is called after each batch and must say the same on all ranks, ends it early.
    """
    rank, _, W = distributed.ranks()
    device, T = next(model.parameters()).device, split.block_size
    rows, first, window = passes(split, pairs, stride)
    # Every rank and batch gets the same shape; the rows that fill up the last ones count nothing.
    filled = np.resize(np.arange(len(rows)), -(-len(rows) // (W * batch_size)) * W * batch_size)
    mine, counted = filled[rank::W], np.arange(len(filled))[rank::W] < len(rows)
    bounds = np.stack([first, T - rows[:, 1] % T], axis=1)  # (R, 2) first target that counts, first of the next window
    shifted, position = Shifted(split), torch.arange(T, device=device)
    training = model.training
    model.eval()
    nats = []  # of (2, batch_size): sums over the targets in the window where a pass starts, and in the next one

    def read(i: int):
        x, y, _ = data.read_batch(shifted, rows[mine[i:i + batch_size]], pin=device.type == "cuda")
        return x, y, torch.from_numpy(bounds[mine[i:i + batch_size]])

    batches = data.prefetch(read, range(0, len(mine), batch_size))
    for x, y, bound in tqdm(batches, total=len(mine) // batch_size, unit="batch", dynamic_ncols=True, leave=False,
                            disable=None if progress and rank == 0 else True):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            losses = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True))  # (batch_size, T)
        begin, border = bound.to(device, non_blocking=True).T.unsqueeze(2)  # (batch_size, 1) each
        scored = position >= begin
        nats.append(torch.stack([torch.where(scored & part, losses, 0.0).sum(1)
                                 for part in (position < border, position >= border)]))
        if stop():
            break
    model.train(training)
    if len(nats) * batch_size < len(mine):
        return None
    here, following = torch.cat(nats, dim=1).cpu().double()[:, torch.from_numpy(counted)]
    at = torch.from_numpy(window[mine[counted]])
    sums = torch.zeros(len(pairs) + 1, dtype=torch.float64)  # the last one's following window gets zeros only
    sums.index_add_(0, at, here).index_add_(0, at + 1, following)
    return distributed.reduce_sum(sums.to(device) if W > 1 else sums)[:-1].cpu().numpy() / T  # W > 1: not on mps


def evaluate(model: torch.nn.Module, split: data.Split, pairs: np.ndarray, batch_size: int, dtype: str,
             stop: Callable[[], int] = lambda: 0) -> dict:
    """What metrics.jsonl records of an evaluation, the same on every rank; {} if `stop` ended it early."""
    losses = window_losses(model, split, pairs, batch_size, dtype, stop=stop)
    return {} if losses is None else summarize(split, pairs, losses)


def summarize(split: data.Split, pairs: np.ndarray, losses: np.ndarray, stride: int | None = None) -> dict:
    """(M,) losses of the windows -> mean loss in nats per token, perplexity and bits per byte of each domain.

    mean_loss is the plain average over domains; bits per byte takes bytes per token from the domain's whole split.
    """
    domains = {}
    for name, values in by_domain(split, pairs, losses).items():
        loss = values.mean().item()
        domains[name] = {"loss": loss, "ppl": perplexity(loss), "tokens": len(values) * split.block_size,
                         "bits_per_byte": loss / math.log(2) * split.tokens[name] / split.bytes[name]}
    content = [split.sha256, split.block_size, pairs.tolist(), *([] if stride is None else [stride])]
    return {"domains": domains, "mean_loss": sum(d["loss"] for d in domains.values()) / len(domains),
            "worst_domain": max(domains, key=lambda d: domains[d]["loss"]),
            "val_hash": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}


def by_domain(split: data.Split, pairs: np.ndarray, losses: np.ndarray) -> dict[str, np.ndarray]:
    """(M,) losses of the windows -> those of each domain that has windows."""
    return {name: losses[pairs[:, 0] == d] for d, name in enumerate(split.domains) if (pairs[:, 0] == d).any()}


def add_intervals(record: dict, windows: dict[str, np.ndarray]) -> None:
    """Put the bootstrap's intervals into the record, as loss_ci95 of each domain and mean_loss_ci95 (nats)."""
    *each, record["mean_loss_ci95"] = bootstrap(windows).tolist()
    for domain, interval in zip(windows, each, strict=True):
        record["domains"][domain]["loss_ci95"] = interval


def perplexity(loss: float) -> float:
    """exp(loss); inf where that is beyond a double (a diverged model)."""
    return math.exp(loss) if loss < 709 else math.inf


def table(record: dict) -> str:
    """The record as text, a line per domain; the interval is of the perplexity."""
    def line(name: str, loss: float, interval: list[float]) -> str:
        low, high = map(perplexity, interval)
        return f"{name:<{width}}{loss:>12.4f}{perplexity(loss):>12.3f}{f'{low:.3f} to {high:.3f}':>22}"

    width = max(map(len, ["average", *record["domains"]])) + 1
    lines = [f"{'domain':<{width}}{'loss (nats)':>12}{'perplexity':>12}{'95 % interval':>22}{'bits/byte':>11}"
             f"{'tokens':>12}"]
    lines += [f"{line(name, d['loss'], d['loss_ci95'])}{d['bits_per_byte']:>11.4f}{d['tokens']:>12,}"
              for name, d in record["domains"].items()]
    return "\n".join([*lines, line("average", record["mean_loss"], record["mean_loss_ci95"]),
                      f"worst domain: {record['worst_domain']}"])


def windows_path(result: Path) -> Path:
    """The file beside a result of this script that has the loss of each window: float32, an array per domain."""
    return result.with_name(f"{result.stem}_windows.npz")


def write(result: Path, record: dict, windows: dict[str, np.ndarray]) -> None:
    """The two files of a result; the windows first, so that a result is never without them."""
    content = io.BytesIO()
    np.savez(content, **{name: values.astype(np.float32) for name, values in windows.items()})
    write_bytes(windows_path(result), content.getvalue())
    write_text(result, json.dumps(record, indent=1))


def parse_args():
    parser = Parser(__doc__)
    models.add_flags(parser, RESULT)
    parser.add_argument("--data_dir", help="data folder (default: the one the run was trained on)")
    parser.add_argument("--stride", type=int, help="tokens from one window's start to the next; below the block size, "
                        "each token is scored once, with more context (default: the block size)")
    parser.add_argument("--block_size", type=int, help="tokens per window (default: the model's context)")
    parser.add_argument("--batch_size", type=int, default=32, help="windows per rank and forward pass (default: 32)")
    args = parser.parse_args()
    for name in ("stride", "block_size", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.hf and not args.data_dir:
        raise UserError("--hf needs --data_dir (for the released GPT-2 a folder prepared with --tokenizer gpt2)")
    return args


def main() -> None:
    args = parse_args()
    model, tokens, about, data_dir = models.open_model(args)
    data_dir = args.data_dir or data_dir
    manifest = read_manifest(data_dir)
    if manifest["tokenizer"]["sha256"] != tokens.sha256:
        raise UserError(f"{data_dir} has tokenizer {manifest['tokenizer']['name']}, the model {tokens.name}; give data "
                        f"prepared with --tokenizer {tokens.name}")
    T = args.block_size or model.config.block_size
    stride = args.stride or T
    if T > model.config.block_size:
        raise UserError(f"--block_size {T}: the model has a context of {model.config.block_size} tokens, at most that")
    if stride > T:
        raise UserError(f"--stride {stride}: must be at most the {T} tokens of a window, or tokens would be left out")
    split = data.Split(data_dir, manifest, "val", T)
    pairs = validation_windows(split, None)
    for domain, n in zip(split.domains, split.n_windows, strict=True):
        if not n and distributed.ranks().rank == 0:
            print(f"{domain}: left out, its validation split has no window of {T} tokens", file=sys.stderr)
    result = models.result_path(args, RESULT)
    sliding = stride if stride < T else None
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    try:
        losses = window_losses(model.to(device), split, pairs, args.batch_size, about["dtype"], sliding, progress=True)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch_size {args.batch_size}: does not fit into the GPU's memory; lower it") from None
    record = {**about, "block_size": T, "stride": stride, **summarize(split, pairs, losses, sliding)}
    if distributed.ranks().rank == 0:
        windows = by_domain(split, pairs, losses)
        add_intervals(record, windows)
        if result:
            write(result, record, windows)
        print(table(record))
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
