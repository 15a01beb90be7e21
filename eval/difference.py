"""The loss of each run minus that of its uniform run, with a paired test."""

import math
import sys
from pathlib import Path

import numpy as np

from cli import UserError
from eval import perplexity
from eval.compare import paired_difference
from eval.runs import (
    Column,
    Row,
    RunFolder,
    Table,
    baselines,
    compared_columns,
    per_column,
    with_spread,
)

HEADING = "Against uniform"
TABLES = {
    "difference": "needs a uniform run and a run of another strategy that is like it in all else, "
    "both evaluated"
}
NOTE = (
    "Nats per token, against the uniform run of the same seed and settings. Interval and p: paired "
    "z test over blocks of validation windows; they cover the choice of text, not of training "
    "seeds, and two seeds of one setting can differ significantly."
)
Pairs = dict[RunFolder, RunFolder]  # a run -> the uniform run that it is compared with
Windows = dict[str, np.ndarray]  # domain -> (M,) float64 loss of each of its windows


def read(run: RunFolder) -> Windows | None:
    """The loss of each validation window, which stands beside the run's perplexity.json.

    None, and a line on standard error, where there is no such file.
    """
    result = perplexity.read(run)
    path = perplexity.windows_path(Path(run.path) / "eval" / perplexity.RESULT)
    again = f"run: python eval/perplexity.py --run {run.path}"
    if not path.is_file():
        print(f"{run.path}: no {path.name}, so no paired test; {again}", file=sys.stderr)
        return None
    try:
        with np.load(path) as saved:
            windows = {domain: saved[domain].astype(np.float64) for domain in result["domains"]}
    except Exception as error:  # a damaged archive makes the reader raise anything
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {again}") from None
    for domain, values in windows.items():
        loss = result["domains"][domain]["loss"]
        if not np.isclose(values.mean(), loss, rtol=1e-5, equal_nan=True):
            raise UserError(f"{path} is not of the same evaluation as perplexity.json; {again}")
    return windows


def tables(runs: list[RunFolder]) -> list[Table]:
    """A table per model size."""
    results = perplexity.read_all(runs)
    settings = perplexity.settings(runs)
    pairs = {}
    for run, uniform in baselines(settings).items():
        if run in results and uniform in results:
            pairs[run] = uniform
    compared = {*pairs, *pairs.values()}
    windows = {run: read(run) for run in runs if run in compared}

    gaps = []
    for label, losses in perplexity.rows_of(results, "loss")[:-2]:  # without the worst domain
        gap = {}
        for run, uniform in pairs.items():
            if run in losses and uniform in losses:
                gap[run] = losses[run] - losses[uniform]
        gaps.append((label, gap))

    by_size = compared_columns(settings, set(pairs))
    return [table(size, columns, gaps, pairs, windows) for size, columns in by_size.items()]


def table(
    size: str,
    columns: list[Column],
    gaps: list[tuple[str, dict[RunFolder, float]]],
    pairs: Pairs,
    windows: dict[RunFolder, Windows | None],
) -> Table:
    rows = []
    for label, gap in gaps:
        values = per_column(columns, gap)
        is_summary = label == "average loss"
        rows.append(Row(label, values, sign="+", best=None, is_summary=is_summary))

    intervals, ps = [], []
    for column in columns:
        interval, p = interval_and_p(column, pairs, windows)
        intervals.append([interval])
        ps.append([p])
    rows.append(Row("95 % interval (windows)", intervals, best=None, is_summary=True))
    rows.append(Row("p (windows)", ps, best=None, is_summary=True))
    return Table(
        what="difference",
        title=f"Loss minus uniform, {size}",
        model=size,
        head="domain",
        columns=[column.name for column in columns],
        rows=rows,
        note=with_spread(NOTE, columns),
    )


def interval_and_p(
    column: Column, pairs: Pairs, windows: dict[RunFolder, Windows | None]
) -> tuple[str | None, str | None]:
    """Interval and p of a column, seeds averaged window by window; None without the windows."""
    paired = [(windows[run], windows[pairs[run]]) for run in column.runs if run in pairs]
    if not paired or any(own is None or uniform is None for own, uniform in paired):
        return None, None
    differences = {}
    for domain in paired[0][0]:
        of_seeds = [own[domain] - uniform[domain] for own, uniform in paired]
        differences[domain] = np.mean(of_seeds, axis=0)
    _, low, high, p = paired_difference(differences)
    if math.isnan(p):
        return None, None
    return f"{low:+.4f} to {high:+.4f}", f"{p:.4f}" if p >= 1e-4 else "<0.0001"
