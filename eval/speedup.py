"""How many steps and minutes each run needs to reach the final loss of its uniform run."""

from eval.compare import speedup
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
    "speedup": "needs a finished uniform run and a run of another strategy that is like it in all "
    "else, evaluated on as many windows in training (--eval_windows)"
}
NOTE = (
    "Steps and minutes: after how many a run first reaches that loss, between evaluations by "
    "interpolation. Minutes of training, without evaluation and saving, on whatever machine each "
    "run had."
)
# Row -> digits, and which of its values is best.
ROWS = {
    "uniform's final loss": (4, None),
    "uniform's steps": (0, None),
    "steps": (0, min),
    "uniform's minutes": (1, None),
    "minutes": (1, min),
    "speed-up in steps": (2, max),
    "speed-up in time": (2, max),
}


def read(run: RunFolder) -> dict | None:
    """The curve of a run as compare.speedup takes it; None if it was not evaluated in training."""
    evals = run.records("eval")
    if not evals:
        return None
    return {
        "max_steps": run.config["max_steps"],
        "evals": evals,
        "trained": run.records("train"),
    }


def tables(runs: list[RunFolder]) -> list[Table]:
    """A table per model size."""
    settings = {run: run.settings for run in runs}
    speedups = {}
    for run, uniform in baselines(settings).items():
        curve, uniform_curve = read(run), read(uniform)
        if curve and uniform_curve:
            row = speedup(curve, uniform_curve)
            if row:
                speedups[run] = row
    by_size = compared_columns(settings, set(speedups))
    return [table(size, columns, speedups) for size, columns in by_size.items()]


def table(size: str, columns: list[Column], speedups: dict[RunFolder, dict]) -> Table:
    rows = []
    for label, (digits, best) in ROWS.items():
        values = {run: row.get(label) for run, row in speedups.items()}
        is_summary = label.startswith("speed-up")
        row = Row(label, per_column(columns, values), digits, best, is_summary=is_summary)
        rows.append(row)
    return Table(
        what="speedup",
        title=f"Reaching uniform's final loss, {size}",
        model=size,
        head="",
        columns=[column.name for column in columns],
        rows=rows,
        note=with_spread(NOTE, columns),
    )
