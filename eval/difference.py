"""The loss of each run minus that of its uniform run, with a paired test."""

import math
import sys
from pathlib import Path

import numpy as np

from cli import UserError
from eval import perplexity
from eval.compare import TOO_FEW, estimate
from eval.runs import (
    Column,
    Row,
    RunFolder,
    Table,
    baselines,
    compared_columns,
    controls,
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
    "t test over validation documents; they cover the choice of text, not of training seeds, and "
    "two seeds of one setting can differ significantly."
)
COST = (
    "Cost of fewer samples: the gap of the control, whose weights are the same but on other "
    "samples. Gain in direction: by how much the run is ahead of its control."
)
NO_CONTROL = (
    "How much of it is the cost of averaging over fewer samples, runs of --reweight_control "
    "shuffled would tell."
)
Pairs = dict[RunFolder, RunFolder]  # a run -> the uniform run that it is compared with
Documents = dict[str, np.ndarray]  # domain -> (K, 2) nats and targets of each of its documents


def read(run: RunFolder) -> Documents | None:
    """The losses of the validation documents, from the file beside the run's perplexity.json.

    None, and a line on standard error, where there is no such file or it has none.
    """
    result = perplexity.read(run)
    path = perplexity.windows_path(Path(run.path) / "eval" / perplexity.RESULT)
    again = f"run: python eval/perplexity.py --run {run.path}"
    if not path.is_file():
        print(f"{run.path}: no {path.name}, so no paired test; {again}", file=sys.stderr)
        return None
    try:
        with np.load(path) as saved:
            if not any(name.startswith("documents/") for name in saved):
                print(
                    f"{path} is of an earlier version, so no paired test; {again}", file=sys.stderr
                )
                return None
            documents = {domain: saved[f"documents/{domain}"] for domain in result["domains"]}
    except Exception as error:  # a damaged archive makes the reader raise anything
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {again}") from None
    for domain, of_domain in documents.items():
        nats, targets = of_domain.sum(0)
        loss = result["domains"][domain]["loss"]
        if not np.isclose(nats / targets, loss, rtol=1e-5, equal_nan=True):
            raise UserError(f"{path} is not of the same evaluation as perplexity.json; {again}")
    return documents


def tables(runs: list[RunFolder]) -> list[Table]:
    """A table per model size."""
    results = perplexity.read_all(runs)
    settings = perplexity.settings(runs)
    pairs = {}
    for run, uniform in baselines(settings).items():
        if run in results and uniform in results:
            pairs[run] = uniform
    compared = {*pairs, *pairs.values()}
    documents = {run: read(run) for run in runs if run in compared}

    gaps = []
    for label, losses in perplexity.rows_of(results, "loss")[:-2]:  # without the worst domain
        gap = {}
        for run, uniform in pairs.items():
            if run in losses and uniform in losses:
                gap[run] = losses[run] - losses[uniform]
        gaps.append((label, gap))

    parts = parts_of_gap(dict(gaps).get("average loss", {}), controls(settings))
    by_size = compared_columns(settings, set(pairs))
    return [
        table(size, columns, gaps, parts, pairs, documents) for size, columns in by_size.items()
    ]


def parts_of_gap(gap: dict[RunFolder, float], control_of: Pairs) -> list[tuple[str, dict]]:
    """Label -> value of each run that has a control, from the gaps of the average loss."""
    known = {run: c for run, c in control_of.items() if run in gap and c in gap}
    if not known:
        return []
    cost = {run: gap[control] for run, control in known.items()}
    direction = {run: gap[control] - gap[run] for run, control in known.items()}
    return [("cost of fewer samples", cost), ("gain in direction", direction)]


def table(
    size: str,
    columns: list[Column],
    gaps: list[tuple[str, dict[RunFolder, float]]],
    parts: list[tuple[str, dict[RunFolder, float]]],
    pairs: Pairs,
    documents: dict[RunFolder, Documents | None],
) -> Table:
    """gaps, parts: label -> value of each run that has one."""
    rows = []
    for label, gap in gaps:
        values = per_column(columns, gap)
        is_summary = label == "average loss"
        rows.append(Row(label, values, sign="+", best=None, is_summary=is_summary))

    intervals, ps = [], []
    for column in columns:
        interval, p = interval_and_p(column, pairs, documents)
        intervals.append([interval])
        ps.append([p])
    rows.append(Row("95 % interval (documents)", intervals, best=None, is_summary=True))
    rows.append(Row("p (documents)", ps, best=None, is_summary=True))
    own_parts = [(label, per_column(columns, values)) for label, values in parts]
    own_parts = [(label, values) for label, values in own_parts if any_number(values)]
    for label, values in own_parts:
        rows.append(Row(label, values, sign="+", best=None, is_summary=True))
    return Table(
        what="difference",
        title=f"Loss minus uniform, {size}",
        model=size,
        head="domain",
        columns=[column.name for column in columns],
        rows=rows,
        note=with_spread(f"{NOTE} {COST if own_parts else NO_CONTROL}", columns),
    )


def any_number(values: list[list]) -> bool:
    return any(value is not None for column in values for value in column)


def interval_and_p(
    column: Column, pairs: Pairs, documents: dict[RunFolder, Documents | None]
) -> tuple[str | None, str | None]:
    """Interval and p of a column, seeds averaged document by document; None without documents."""
    paired = [(documents[run], documents[pairs[run]]) for run in column.runs if run in pairs]
    if not paired or any(own is None or uniform is None for own, uniform in paired):
        return None, None
    differences = []
    for domain, of_domain in paired[0][0].items():
        nats = [own[domain][:, 0] - uniform[domain][:, 0] for own, uniform in paired]
        differences.append(np.stack([np.mean(nats, axis=0), of_domain[:, 1]], axis=1))
    found = estimate(differences)
    if math.isnan(found.low):
        return TOO_FEW, TOO_FEW
    p = f"{found.p:.4f}" if found.p >= 1e-4 else "<0.0001"
    return f"{found.low:+.4f} to {found.high:+.4f}", p
