"""Per-domain loss and perplexity of a model on fixed validation windows; all ranks share the work.

    python eval/perplexity.py --run runs/124m_uniform_linupper_seed42    # the newest checkpoint
    torchrun --nproc_per_node 8 -- eval/perplexity.py --run RUN/checkpoints/step_00020000
    python eval/perplexity.py --run RUN --stride 64 --to RUN/eval/sliding.json    # more context
    python eval/perplexity.py --hf gpt2 --data_dir data/slimpajama --to results/gpt2.json

Writes RUN/eval/perplexity.json, or the file of --to, and beside it the loss of each window and of
each document (perplexity_windows.npz). Validation is never weighted: every window counts once,
whatever the run trained on.

M windows of T tokens, K documents, R forward passes, B passes of a batch, D domains.
"""

import hashlib
import io
import json
import math
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from cli import Parser, UserError
from cli import run as run_command
from corpus.manifest import in_order, read_manifest
from data import validation_windows
from eval import models
from eval.compare import TOO_FEW, estimate
from eval.runs import (
    Column,
    Row,
    RunFolder,
    Settings,
    Table,
    Value,
    by_model,
    per_column,
    read_result,
    settings_at,
    with_spread,
)
from files import write_bytes, write_text
from runtime import distributed

RESULT = "perplexity.json"


# Losses of windows


class Shifted:
    """A split whose windows may start at any token of a domain's windows laid end to end."""

    def __init__(self, split: data.Split):
        self.split = split

    def window(self, domain: int, start: int) -> np.ndarray:
        """(T + 1,) token ids; `start` is at most the first token of its shard's last window."""
        index, offset = divmod(start, self.split.block_size)
        tokens = self.split.window(domain, index)
        if not offset:
            return tokens
        following = self.split.window(domain, index + 1)
        return np.concatenate([tokens[offset:], following[1 : offset + 1]])


class Passes(NamedTuple):
    """The forward passes of an evaluation."""

    rows: np.ndarray  # (R, 2) domain and first token
    first: np.ndarray  # (R,) first target that counts
    window: np.ndarray  # (R,) index of the window in which the pass starts


def plan_passes(split: data.Split, pairs: np.ndarray, stride: int | None) -> Passes:
    """(M, 2) domain and window -> the passes that score each target of these windows once.

    Without a stride, each window is scored on its own. With one, `pairs` are all windows, and
    passes start every `stride` tokens of a shard, so that only the context differs: every target
    but those of a shard's first pass has at least T - stride tokens before it.
    """
    T = split.block_size
    if stride is None:
        return Passes(pairs * [1, T], np.zeros(len(pairs), dtype=np.int64), np.arange(len(pairs)))
    rows, first = [], []
    for domain, ends in enumerate(split.ends):
        for end, n in zip(ends, np.diff(ends, prepend=0), strict=True):
            if n == 0:
                continue
            last = (n - 1) * T  # the pass that starts here ends with the last window's last target
            starts = np.minimum(np.arange(0, last + stride, stride), last)
            shard_start = (end - n) * T
            rows.append(np.stack([np.full_like(starts, domain), shard_start + starts], axis=1))
            first.append(T - np.diff(starts, prepend=-T))
    rows = np.concatenate(rows)
    windows_before = np.cumsum(split.n_windows) - split.n_windows  # (D,) of the domains before
    window = windows_before[rows[:, 0]] + rows[:, 1] // T
    return Passes(rows, np.concatenate(first), window)


class Scores(NamedTuple):
    """The losses of an evaluation, the same on every rank."""

    windows: np.ndarray  # (M,) float64 mean loss of each window, in nats per token
    documents: list[np.ndarray]  # per domain (K, 2) float64 nats and targets; [] if not asked for


class Tally:
    """Adds up the nats of passes by window and, with document_ends, by document."""

    def __init__(self, passes: Passes, n_windows: int, T: int, document_ends: Sequence):
        self.passes, self.n_windows, self.T = passes, n_windows, T
        self.document_ends = document_ends
        n_documents = [len(ends) for ends in document_ends]
        self.first_documents = n_windows + np.cumsum([0, *n_documents])  # (D + 1,) indices in nats
        self.nats = np.zeros(self.first_documents[-1])  # of the windows, then of the documents

    def add(self, i: int, losses: np.ndarray) -> None:
        """(T,) losses of the targets of pass i."""
        (domain, start), first = self.passes.rows[i], self.passes.first[i]
        losses, position = losses[first:], np.arange(start + first, start + self.T)
        window = self.passes.window[i] + position // self.T - start // self.T
        np.add.at(self.nats, window, losses)
        if self.document_ends:
            document = np.searchsorted(self.document_ends[domain], position, side="right")
            np.add.at(self.nats, self.first_documents[domain] + document, losses)

    def of_all_ranks(self, device: torch.device) -> Scores:
        """The scores, from what every rank has added."""
        nats = self.nats
        if distributed.ranks().world_size > 1:  # a single process may be on mps: it has no float64
            nats = distributed.reduce_sum(torch.from_numpy(nats).to(device)).cpu().numpy()
        documents = []
        for d, ends in enumerate(self.document_ends):
            of_domain = nats[self.first_documents[d] : self.first_documents[d + 1]]
            documents.append(np.stack([of_domain, np.diff(ends, prepend=0)], axis=1))
        return Scores(nats[: self.n_windows] / self.T, documents)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    split: data.Split,
    pairs: np.ndarray,
    batch_size: int,
    dtype: str,
    stride: int | None = None,
    document_ends: Sequence[np.ndarray] = (),
    progress: bool = False,
    stop: Callable[[], int] = lambda: 0,
) -> Scores | None:
    """The losses of windows and, with `document_ends`, of documents; then `pairs` are all windows.

    stop: called after each batch; a true value ends the evaluation early, with the result None. It
    must be the same on all ranks.
    """
    rank, _, world_size = distributed.ranks()
    device = next(model.parameters()).device
    passes = plan_passes(split, pairs, stride)
    tally = Tally(passes, len(pairs), split.block_size, document_ends)
    R = len(passes.rows)
    # Every batch of every rank has the same shape: the last ones are filled up with passes that do
    # not count.
    n_batches = math.ceil(R / (world_size * batch_size))
    own = np.arange(rank, n_batches * world_size * batch_size, world_size)

    def read(i: int) -> tuple[np.ndarray, Tensor, Tensor]:
        batch = own[i : i + batch_size]
        rows = passes.rows[batch % R]
        x, y, _ = data.read_batch(Shifted(split), rows, pin=device.type == "cuda")
        return batch, x, y

    was_training = model.training
    model.eval()
    n_scored = 0
    for batch, x, y in tqdm(
        data.prefetch(read, range(0, len(own), batch_size)),
        total=n_batches,
        unit="batch",
        dynamic_ncols=True,
        leave=False,
        disable=None if progress and rank == 0 else True,
    ):
        for i, losses in zip(batch, token_losses(model, x, y, dtype), strict=True):
            if i < R:
                tally.add(i, losses)
        n_scored += 1
        if stop():
            break
    model.train(was_training)
    if n_scored < n_batches:
        return None
    return tally.of_all_ranks(device)


def token_losses(model: torch.nn.Module, x: Tensor, y: Tensor, dtype: str) -> np.ndarray:
    """(B, T) inputs and targets -> (B, T) float64 losses in nats."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        losses = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
    return losses.cpu().double().numpy()


def find_document_ends(split: data.Split) -> list[np.ndarray]:
    """For each domain (K,): where its documents end, counted in targets of all its windows in turn.

    A document may go on in the next shard. What follows a shard's last window is in no window, so
    the documents that end there end with that window.
    """
    T, of_domains = split.block_size, []
    for paths, windows_up_to in zip(split.paths, split.ends, strict=True):
        ends, windows_before = [windows_up_to[-1:] * T], 0
        for path, windows in zip(paths, windows_up_to, strict=True):
            tokens = np.load(path, mmap_mode="r")
            end_of_text = np.flatnonzero(tokens[1:] == split.eot_token) + 1
            ends.append(np.minimum(windows_before * T + end_of_text, windows * T))
            windows_before = windows
        ends = np.unique(np.concatenate(ends))
        of_domains.append(ends[ends > 0])
    return of_domains


# The record of an evaluation


def evaluate(
    model: torch.nn.Module,
    split: data.Split,
    pairs: np.ndarray,
    batch_size: int,
    dtype: str,
    stop: Callable[[], int] = lambda: 0,
) -> dict:
    """What metrics.jsonl records of an evaluation, on every rank; {} if `stop` ended it early."""
    scores = score(model, split, pairs, batch_size, dtype, stop=stop)
    return {} if scores is None else summarize(split, pairs, scores.windows)


def summarize(
    split: data.Split, pairs: np.ndarray, losses: np.ndarray, stride: int | None = None
) -> dict:
    """(M,) losses of the windows -> loss (nats per token), perplexity, bits per byte per domain.

    mean_loss is the plain average over domains. Bits per byte takes the bytes per token from the
    domain's whole split. Records with the same val_hash were made on the same windows.
    """
    domains = {}
    for name, values in by_domain(split, pairs, losses).items():
        loss = values.mean().item()
        domains[name] = {
            "loss": loss,
            "ppl": perplexity(loss),
            "tokens": len(values) * split.block_size,
            "bits_per_byte": loss / math.log(2) * split.tokens[name] / split.bytes[name],
        }
    content = [split.sha256, split.block_size, pairs.tolist()]
    if stride is not None:
        content.append(stride)
    return {
        "domains": domains,
        "mean_loss": sum(domain["loss"] for domain in domains.values()) / len(domains),
        "worst_domain": max(domains, key=lambda name: domains[name]["loss"]),
        "val_hash": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
    }


def by_domain(split: data.Split, pairs: np.ndarray, losses: np.ndarray) -> dict[str, np.ndarray]:
    """(M,) losses of the windows -> those of each domain that has windows."""
    losses_of = {}
    for d, name in enumerate(split.domains):
        is_of_domain = pairs[:, 0] == d
        if is_of_domain.any():
            losses_of[name] = losses[is_of_domain]
    return losses_of


def add_intervals(record: dict, documents: dict[str, np.ndarray]) -> None:
    """Add the number of documents, and 95 % intervals in nats: loss_ci95 and mean_loss_ci95.

    An interval is None where there are too few documents to tell.
    """

    def interval(domains: list[np.ndarray]) -> list[float] | None:
        found = estimate(domains)
        return None if math.isnan(found.low) else [found.low, found.high]

    for domain, of_domain in documents.items():
        record["domains"][domain]["documents"] = len(of_domain)
        record["domains"][domain]["loss_ci95"] = interval([of_domain])
    record["mean_loss_ci95"] = interval(list(documents.values()))


def perplexity(loss: float) -> float:
    """exp(loss); inf where that is beyond a double (a diverged model)."""
    return math.exp(loss) if loss < 709 else math.inf


def as_text(record: dict) -> str:
    """The record for the terminal, a line per domain; the interval is that of the perplexity."""
    width = max(map(len, ["average", *record["domains"]])) + 1

    def line(name: str, loss: float, interval: list[float] | None) -> str:
        ends = TOO_FEW
        if interval:
            low, high = map(perplexity, interval)
            ends = f"{low:.3f} to {high:.3f}"
        return f"{name:<{width}}{loss:>12.4f}{perplexity(loss):>12.3f}{ends:>22}"

    if "mean_loss_ci95" not in record:  # --windows
        lines = [f"{'domain':<{width}}{'loss (nats)':>12}{'perplexity':>12}{'tokens':>12}"]
        for name, domain in record["domains"].items():
            loss, ppl = domain["loss"], domain["ppl"]
            lines.append(f"{name:<{width}}{loss:>12.4f}{ppl:>12.3f}{domain['tokens']:>12,}")
        loss = record["mean_loss"]
        lines.append(f"{'average':<{width}}{loss:>12.4f}{perplexity(loss):>12.3f}")
        return "\n".join(lines)

    head = f"{'domain':<{width}}{'loss (nats)':>12}{'perplexity':>12}{'95 % interval':>22}"
    lines = [f"{head}{'bits/byte':>11}{'tokens':>12}{'documents':>11}"]
    for name, domain in record["domains"].items():
        text = line(name, domain["loss"], domain["loss_ci95"])
        counts = f"{domain['tokens']:>12,}{domain['documents']:>11,}"
        lines.append(f"{text}{domain['bits_per_byte']:>11.4f}{counts}")
    lines.append(line("average", record["mean_loss"], record["mean_loss_ci95"]))
    lines.append(f"worst domain: {record['worst_domain']}")
    return "\n".join(lines)


def windows_path(result: Path) -> Path:
    """The file beside a result that has the losses by window and by document.

    Entries DOMAIN: (M,) float32, the loss of each window. Entries documents/DOMAIN: (K, 2) float64,
    nats and targets of each document; archives of earlier versions lack them.
    """
    return result.with_name(f"{result.stem}_windows.npz")


def write(
    result: Path, record: dict, windows: dict[str, np.ndarray], documents: dict[str, np.ndarray]
) -> None:
    """Write both files; the windows first, so that a result is never without them."""
    arrays = {name: values.astype(np.float32) for name, values in windows.items()}
    arrays |= {f"documents/{name}": values for name, values in documents.items()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # np.savez takes no array of the name "file"
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values)
    write_bytes(windows_path(result), content.getvalue())
    write_text(result, json.dumps(record, indent=1))


# Tables of several runs

HEADING = "Results"
NEEDS = "needs RUN/eval/perplexity.json (python eval/perplexity.py --run RUN)"
TABLES = {"ppl": NEEDS, "loss": NEEDS, "bits_per_byte": NEEDS}
TITLES = {
    "ppl": "Perplexity",
    "loss": "Loss (log-perplexity, nats per token)",
    "bits_per_byte": "Bits per byte",
}
AVERAGES = {
    "ppl": "exp(average loss)",
    "loss": "average loss",
    "bits_per_byte": "average bits per byte",
}
SUMMARY_ROWS = 3  # the average, the worst domain, and which one that is


@cache  # so that what it prints is printed once per run
def read(run: RunFolder) -> dict | None:
    """RUN/eval/perplexity.json, or None; says on standard error if it is missing or outdated."""
    result = read_result(
        run,
        "perplexity",
        keys=("step", "mean_loss", "val_hash"),
        part="domains",
        part_keys=("loss", "ppl", "bits_per_byte"),
    )
    command = f"python eval/perplexity.py --run {run.path}"
    if result is None:
        print(f"{run.path}: not evaluated yet; run: {command}", file=sys.stderr)
    elif result["step"] != run.config["max_steps"]:
        print(
            f"{run.path}: evaluated at step {result['step']} of {run.config['max_steps']}; "
            f"to evaluate the newest checkpoint: {command}",
            file=sys.stderr,
        )
    return result


def read_all(runs: list[RunFolder]) -> dict[RunFolder, dict]:
    """The results of the runs that have one; UserError where two are of different windows."""
    results = {}
    for run in runs:
        result = read(run)
        if result is not None:
            results[run] = result
    runs_by_hash = {}
    for run, result in results.items():
        runs_by_hash.setdefault(result["val_hash"], run)
    if len(runs_by_hash) > 1:
        a, b, *_ = runs_by_hash.values()
        raise UserError(
            f"{a.path} and {b.path} were evaluated on different validation windows and cannot be "
            "compared; evaluate both with the same --data_dir, --block_size and --stride"
        )
    return results


def settings(runs: list[RunFolder]) -> Settings:
    """What tells the runs apart, the step of the checkpoint evaluated included."""
    configs = {run: run.settings for run in runs}
    return settings_at(configs, read_all(runs), "evaluated_at_step")


def tables(runs: list[RunFolder]) -> list[Table]:
    """For each metric a table per model size; with several sizes, one more that sums them up."""
    results, by_size = read_all(runs), by_model(settings(runs))
    tables = []
    for metric in TABLES:
        rows = rows_of(results, metric)
        tables += [metric_table(size, columns, rows, metric) for size, columns in by_size.items()]
        if len(by_size) > 1:
            tables.append(table_by_size(by_size, rows, metric))
    return tables


def rows_of(
    results: dict[RunFolder, dict], metric: str
) -> list[tuple[str, dict[RunFolder, Value]]]:
    """(label, value of each run) rows: the domains, then the SUMMARY_ROWS."""
    names = in_order({name for result in results.values() for name in result["domains"]})
    rows = {name: {} for name in names}
    averages, worst_values, worst_names = {}, {}, {}
    for run, result in results.items():
        values = {name: domain[metric] for name, domain in result["domains"].items()}
        for name, value in values.items():
            rows[name][run] = value
        averages[run] = average(result, metric)
        worst_names[run] = max(values, key=values.get)
        worst_values[run] = values[worst_names[run]]
    return [
        *rows.items(),
        (AVERAGES[metric], averages),
        ("worst domain", worst_values),
        ("which one", worst_names),
    ]


def average(result: dict, metric: str) -> float:
    """Over the domains; of perplexities it is the geometric mean."""
    if metric == "ppl":
        return perplexity(result["mean_loss"])
    if metric == "loss":
        return float(result["mean_loss"])
    return fmean(domain[metric] for domain in result["domains"].values())


def digits_of(metric: str) -> int:
    return 3 if metric == "ppl" else 4


def metric_table(
    size: str, columns: list[Column], rows: list[tuple[str, dict[RunFolder, Value]]], metric: str
) -> Table:
    lines = []
    for i, (label, values) in enumerate(rows):
        is_summary = i >= len(rows) - SUMMARY_ROWS
        values = per_column(columns, values)
        lines.append(Row(label, values, digits_of(metric), is_summary=is_summary))
    return Table(
        what=metric,
        title=f"{TITLES[metric]}, {size}",
        model=size,
        head="domain",
        columns=[column.name for column in columns],
        rows=lines,
        note=with_spread("", columns),
    )


def table_by_size(
    by_size: dict[str, list[Column]], rows: list[tuple[str, dict[RunFolder, Value]]], metric: str
) -> Table:
    """The average and the worst domain of every size in one table."""
    names = dict.fromkeys(column.name for columns in by_size.values() for column in columns)
    lines = []
    for label, values in rows[-SUMMARY_ROWS:-1]:
        for size, columns in by_size.items():
            runs_of = {column.name: column.runs for column in columns}
            aligned = [Column(name, runs_of.get(name, [])) for name in names]
            lines.append(Row(f"{size}, {label}", per_column(aligned, values), digits_of(metric)))
    title = f"{TITLES[metric]} by size"
    return Table(metric, title, model="", head="size", columns=list(names), rows=lines)


# The command


def parse_args() -> Namespace:
    parser = Parser(__doc__)
    models.add_flags(parser, RESULT)
    parser.add_argument("--data_dir", help="data folder (default: the one the run was trained on)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from one window's start to the next; below the block size, "
        "each token is scored once, with more context (default: the block size)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="N windows per domain, for a quick look: no intervals, and no file without --to",
    )
    parser.add_argument(
        "--block_size", type=int, help="tokens per window (default: the model's context)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="windows per rank and forward pass (default: 32)"
    )
    args = parser.parse_args()
    for name in ("stride", "windows", "block_size", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be above 0")
    if args.windows and args.stride:
        raise UserError("--stride scores all windows; leave out --windows or --stride")
    if args.hf and not args.data_dir:
        raise UserError(
            "--hf needs --data_dir (for the released GPT-2 a folder prepared with --tokenizer gpt2)"
        )
    return args


def open_split(args: Namespace, evaluated: models.Evaluated) -> data.Split:
    """The validation split that the flags ask for; UserError where it does not suit the model."""
    data_dir = args.data_dir or evaluated.data_dir
    manifest = read_manifest(data_dir)
    tokens, context = evaluated.tokens, evaluated.model.config.block_size
    entry = manifest["tokenizer"]
    if entry["sha256"] != tokens.sha256:
        raise UserError(
            f"{data_dir} has tokenizer {entry['name']}, the model {tokens.name}; "
            f"give data prepared with --tokenizer {tokens.name}"
        )
    T = args.block_size or context
    if T > context:
        raise UserError(
            f"--block_size {T}: must be at most {context}, the model's context in tokens"
        )
    if args.stride and args.stride > T:
        raise UserError(
            f"--stride {args.stride}: must be at most the {T} tokens of a window, or tokens would "
            "be left out"
        )
    split = data.Split(data_dir, manifest, "val", T)
    for domain, n in zip(split.domains, split.n_windows, strict=True):
        if n == 0 and distributed.ranks().rank == 0:
            print(
                f"{domain}: left out, its validation split has no window of {T} tokens",
                file=sys.stderr,
            )
    return split


def main() -> None:
    args = parse_args()
    evaluated = models.open_model(args)
    split = open_split(args, evaluated)
    pairs = validation_windows(split, args.windows)
    result_path = None
    if args.to or not args.windows:
        result_path = models.result_path(args, RESULT)
    stride = args.stride or split.block_size
    sliding = stride if stride < split.block_size else None
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    try:
        scores = score(
            evaluated.model.to(device),
            split,
            pairs,
            args.batch_size,
            evaluated.about["dtype"],
            sliding,
            [] if args.windows else find_document_ends(split),
            progress=True,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {args.batch_size}: does not fit into the GPU's memory; lower it"
        ) from None
    if distributed.ranks().rank == 0:
        record = {
            **evaluated.about,
            "block_size": split.block_size,
            "stride": stride,
            **summarize(split, pairs, scores.windows, sliding),
        }
        windows = by_domain(split, pairs, scores.windows)
        documents = {}
        if scores.documents:
            of_domains = dict(zip(split.domains, scores.documents, strict=True))
            documents = {name: of_domains[name] for name in windows}
            add_intervals(record, documents)
        if result_path:
            write(result_path, record, windows, documents)
        print(as_text(record))
    distributed.cleanup()


if __name__ == "__main__":
    run_command(main)
