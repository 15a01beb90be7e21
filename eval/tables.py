"""Results of several runs side by side, in sections: a row per domain or task, a column per setting, the best in bold.

    python eval/tables.py runs/a runs/b                                # all there is, as Markdown
    python eval/tables.py runs/* --what ppl,difference --format latex  # needs \\usepackage{booktabs}
    python eval/tables.py runs/* --out results/mine                    # table.md, table.tex, table.csv

Each size (config key `model`) has its own table. Runs that differ only in the seed share a column, as mean ± standard
deviation. Reads of each RUN config.json, eval/perplexity.json and the windows beside it (eval/perplexity.py),
eval/fewshot.json (eval/fewshot.py) and metrics.jsonl. What is absent is "missing".
"""

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from configurator import Parser
from errors import UserError, nearest, run
from eval.compare import paired_difference, speedup
from eval.perplexity import perplexity
from eval.runs import Groups, baselines, by_model, read_fewshot, read_runs, read_windows
from files import write_text
from manifest import in_order
from metrics import read_lines

MISSING = "missing"
METRICS = {"ppl": "Perplexity", "loss": "Loss (log-perplexity, nats per token)", "bits_per_byte": "Bits per byte"}
NEEDS = {"difference": "needs a uniform run and a run of another strategy that is like it in all else, both evaluated",
         "fewshot": "needs RUN/eval/fewshot.json (python eval/fewshot.py --run RUN)",
         "speedup": "needs a finished uniform run and a run of another strategy that is like it in all else, evaluated "
                    "on as many windows in training (--eval_windows)"}
WHAT = (*METRICS, *NEEDS)
SPEEDUP = {"uniform's final loss": (4, None), "uniform's steps": (0, None), "steps": (0, min),  # row -> digits, best
           "uniform's minutes": (1, None), "minutes": (1, min),
           "speed-up in steps": (2, max), "speed-up in time": (2, max)}


class Row(NamedTuple):
    """A line of a table: of each column the values of its runs, None for a missing one."""
    label: str
    values: list[list[float | str | None]]
    digits: int = 4
    best: Callable | None = min  # which mean is in bold
    sign: str = ""
    errors: list[list[float | None]] | None = None  # standard errors, shown where a column has a single run
    summary: bool = False  # belongs below the line

    def texts(self) -> list[tuple[str, bool]]:
        """What each column shows, and whether it is in bold."""
        errors = self.errors or [()] * len(self.values)
        texts = [cell(v, self.digits, self.sign, e) for v, e in zip(self.values, errors, strict=True)]
        means = [text.split(" ")[0] for text in texts]
        numbers = [float(mean) for mean, v in zip(means, self.values, strict=True) if numbers_of(v)]
        if self.best is None or len(set(numbers)) < 2:
            return [(text, False) for text in texts]
        best = f"{self.best(numbers):{self.sign}.{self.digits}f}"
        return [(text, mean == best) for text, mean in zip(texts, means, strict=True)]


class Table(NamedTuple):
    what: str  # an entry of WHAT
    title: str
    model: str  # the size; "" where the table has several
    head: str  # of the column of labels
    columns: list[str]
    rows: list[Row]
    note: str = ""


def numbers_of(values: list[float | str | None]) -> list[float]:
    return [v for v in values if isinstance(v, int | float)]


def std(numbers: list[float]) -> float:
    with np.errstate(all="ignore"):  # a diverged run's perplexity may be inf
        return float(np.std(numbers, ddof=1))


def cell(values: list[float | str | None], digits: int, sign: str = "", errors: Sequence[float | None] = ()) -> str:
    """The values of a column's runs as text: one value with its standard error, mean ± standard deviation, or names."""
    numbers = numbers_of(values)
    if not numbers:
        return ", ".join(dict.fromkeys(v for v in values if v is not None)) or MISSING
    spread = f" ± {std(numbers):.{digits}f}" if len(numbers) > 1 else ""
    if len(values) == len(errors) == 1 and errors[0] is not None:
        spread = f" ({errors[0]:.{digits}f})"
    short = f" ({len(numbers)} of {len(values)} runs)" if len(numbers) < len(values) else ""
    return f"{fmean(numbers):{sign}.{digits}f}{spread}{short}"


def rows_of(results: list[dict | None], metric: str) -> list[tuple[str, list[float | str | None]]]:
    """(label, value per run) rows: domains, average, worst domain and which one that is."""
    held = in_order({d for r in results if r for d in r["domains"]})
    rows = [(d, [r["domains"][d][metric] if r and d in r["domains"] else None for r in results]) for d in held]
    domains = [r["domains"] if r else None for r in results]
    worst = [max(d, key=lambda name: d[name][metric]) if d else None for d in domains]
    if metric == "bits_per_byte":
        rows.append(("average bits per byte", [fmean(v[metric] for v in d.values()) if d else None for d in domains]))
    else:
        label, mean = ("exp(average loss)", perplexity) if metric == "ppl" else ("average loss", float)
        rows.append((label, [mean(r["mean_loss"]) if r else None for r in results]))
    rows.append(("worst domain", [d[name][metric] if d else None for d, name in zip(domains, worst, strict=True)]))
    return [*rows, ("which one", worst)]


def per_column(values: list, groups: Groups) -> list[list]:
    """A value per run -> the values of each column."""
    return [[values[i] for i in runs] for _, runs in groups]


def spread_note(groups: Groups) -> str:
    """What ± means, and of how many runs, where a column has several."""
    counts = ", ".join(f"{name} {len(runs)}" for name, runs in groups)
    return f"± is the standard deviation over seeds ({counts})." if any(len(runs) > 1 for _, runs in groups) else ""


def metric_tables(configs: list[dict], results: list[dict | None], metric: str) -> list[Table]:
    """A table per size with the metric of each domain; with several sizes, one more with average and worst domain."""
    rows, digits, tables, sizes = rows_of(results, metric), 3 if metric == "ppl" else 4, [], by_model(configs)
    for size, groups in sizes.items():
        lines = [Row(label, per_column(values, groups), digits, summary=i >= len(rows) - 3)
                 for i, (label, values) in enumerate(rows)]
        tables.append(Table(metric, f"{METRICS[metric]}, {size}", size, "domain", [name for name, _ in groups], lines,
                            spread_note(groups)))
    if len(sizes) > 1:
        names = list(dict.fromkeys(name for groups in sizes.values() for name, _ in groups))
        aligned = {size: [(name, dict(groups).get(name, [])) for name in names] for size, groups in sizes.items()}
        lines = [Row(f"{size}, {label}", per_column(values, groups), digits)
                 for label, values in rows[-3:-1] for size, groups in aligned.items()]
        tables.append(Table(metric, f"{METRICS[metric]} by size", "", "size", names, lines))
    return tables


def difference_tables(configs: list[dict], results: list[dict | None], folders: list[str]) -> list[Table]:
    """Per size, the loss of each run minus that of the uniform run that is like it in all else, and a paired test."""
    pairs = {i: b for i, (c, b) in enumerate(zip(configs, baselines(configs), strict=True))
             if c["reweight"] != "uniform" and b is not None and results[i] and results[b]}
    windows = {i: read_windows(folders[i], results[i]) for i in sorted({*pairs, *pairs.values()})}

    def tested(runs: list[int]) -> tuple[str | None, str | None]:  # interval and p of a column, seeds averaged first
        mine = [(windows[i], windows[pairs[i]]) for i in runs if i in pairs]
        if not mine or not all(a and b for a, b in mine):
            return None, None
        _, low, high, p = paired_difference({d: np.mean([a[d] - b[d] for a, b in mine], axis=0) for d in mine[0][0]})
        if math.isnan(p):
            return None, None
        return f"{low:+.4f} to {high:+.4f}", f"{p:.4f}" if p >= 1e-4 else "<0.0001"

    tables = []
    for size, groups in other_strategies(configs, pairs).items():
        gaps = [(label, [v - values[pairs[i]] if i in pairs else None for i, v in enumerate(values)])
                for label, values in rows_of(results, "loss")[:-2]]
        rows = [Row(label, per_column(values, groups), sign="+", best=None, summary=label == "average loss")
                for label, values in gaps]
        intervals, ps = zip(*(tested(runs) for _, runs in groups), strict=True)
        rows += [Row("95 % interval (windows)", [[text] for text in intervals], best=None, summary=True),
                 Row("p (windows)", [[text] for text in ps], best=None, summary=True)]
        note = ("Nats per token, against the uniform run of the same seed and settings. Interval and p: paired z test "
                "over blocks of validation windows; they cover the choice of text, not of training seeds, and two "
                "seeds of one setting can differ significantly.")
        tables.append(Table("difference", f"Loss minus uniform, {size}", size, "domain", [name for name, _ in groups],
                            rows, f"{note} {spread_note(groups)}".strip()))
    return tables


def other_strategies(configs: list[dict], wanted: dict) -> dict[str, Groups]:
    """by_model without the uniform columns and without sizes that have no run in `wanted`."""
    groups = {size: [(name, runs) for name, runs in here if configs[runs[0]]["reweight"] != "uniform"]
              for size, here in by_model(configs).items()}
    return {size: here for size, here in groups.items() if any(i in wanted for _, runs in here for i in runs)}


def fewshot_tables(configs: list[dict], results: list[dict | None]) -> list[Table]:
    """Per size, the score of each task and their mean."""
    configs = [{**c, "scored_at_step": r["step"]} if r and r["step"] != c["max_steps"] else c
               for c, r in zip(configs, results, strict=True)]
    tasks = {name: task for r in results if r for name, task in r["tasks"].items()}  # metric and requests are alike
    rising = {name for name, task in tasks.items() if task.get("higher_is_better") is not False}  # not a perplexity

    def of(task: str, key: str, groups: Groups) -> list[list[float | None]]:
        values = [r["tasks"].get(task, {}).get(key) if r else None for r in results]
        return per_column([float(v) if isinstance(v, int | float) else None for v in values], groups)

    tables = []
    for size, groups in by_model(configs).items():
        here = [results[i] for _, runs in groups for i in runs if results[i]]
        if not here:
            continue
        rows = [Row(f"{name} ({task['metric'].split(',')[0]})", of(name, "score", groups),
                    best=max if name in rising else min, errors=of(name, "stderr", groups))
                for name, task in tasks.items()]
        means = [fmean(r["tasks"][name]["score"] for name in rising) if r and rising <= r["tasks"].keys() else None
                 for r in results]
        if rising:
            rows.append(Row("mean", per_column(means, groups), best=max, summary=True))
        most = {name: max(r["tasks"].get(name, {}).get("truncated", 0) for r in here) for name in tasks}
        cut = ", ".join(f"{name} {n} of {tasks[name]['requests']}" for name, n in most.items() if n) or "none"
        shots = " or ".join(sorted({str(r["num_fewshot"]) for r in here}))
        note = (f"{shots} examples in the prompt; in parentheses the standard error over a task's documents. Requests "
                f"cut on the left to fit the context: {cut}.")
        tables.append(Table("fewshot", f"Few-shot scores, {size}", size, "task", [name for name, _ in groups], rows,
                            f"{note} {spread_note(groups)}".strip()))
    return tables


def speedup_tables(configs: list[dict], folders: list[str]) -> list[Table]:
    """Per size, the steps and the time in which each run reaches the final loss of its uniform run."""
    configs = [{k: v for k, v in c.items() if k != "evaluated_at_step"} for c in configs]  # says nothing of the curve
    records = [read_lines(Path(folder) / "metrics.jsonl") for folder in folders]
    found = {i: speedup(records[i], c["max_steps"], records[b], configs[b]["max_steps"])
             for i, (c, b) in enumerate(zip(configs, baselines(configs), strict=True))
             if c["reweight"] != "uniform" and b is not None}
    tables = []
    for size, groups in other_strategies(configs, {i for i, row in found.items() if row}).items():
        rows = [Row(label, per_column([found.get(i, {}).get(label) for i in range(len(configs))], groups), digits, best,
                    summary=label.startswith("speed-up")) for label, (digits, best) in SPEEDUP.items()]
        note = ("Evaluation curve, interpolated between evaluations; training time without evaluation and saving, on "
                "whatever machine each run had.")
        tables.append(Table("speedup", f"Reaching uniform's final loss, {size}", size, "", [name for name, _ in groups],
                            rows, f"{note} {spread_note(groups)}".strip()))
    return tables


def sections(folders: list[str], configs: list[dict], results: list[dict | None], what: list[str] | None = None
             ) -> list[Table]:
    """The tables of the chosen kinds (entries of WHAT), by default all that the runs have something for.

    configs, results: of the run folders, as read_runs gives them.
    """
    make = {**{metric: lambda metric=metric: metric_tables(configs, results, metric) for metric in METRICS},
            "difference": lambda: difference_tables(configs, results, folders),
            "fewshot": lambda: fewshot_tables(configs, read_fewshot(folders)),
            "speedup": lambda: speedup_tables(configs, folders)}
    found = {name: make[name]() for name in what or WHAT}
    empty = [name for name in what or () if not found[name]]
    if empty:
        raise UserError(f"--what {empty[0]}: {NEEDS[empty[0]]}; none of these runs has that")
    return [table for tables in found.values() for table in tables]


def lines_of(table: Table, bold: str, escape: Callable[[str], str]) -> list[list[str]]:
    """The table as cells of text, the head first; bold: a format for the best of a row, such as "**{}**"."""
    lines = [[escape(text) for text in (table.head, *table.columns)]]
    for row in table.rows:
        lines.append([escape(row.label)] + [bold.format(escape(text)) if best else escape(text)
                                            for text, best in row.texts()])
    return lines


def markdown(tables: list[Table]) -> str:
    parts = []
    for table in tables:
        lines = lines_of(table, "**{}**", lambda text: text.replace("|", r"\|"))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                                  enumerate(zip(line, widths, strict=True))) + " |" for line in lines]
        rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
        parts += [f"### {table.title}", "\n".join([text[0], rule, *text[1:]]), *([table.note] if table.note else [])]
    return "\n\n".join(parts)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
         "±": r"$\pm$", **{c: f"\\{c}" for c in "_%&#${}"}}


def latex_escape(text: str) -> str:
    text = re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text)


def latex(tables: list[Table]) -> str:
    parts = [r"% \usepackage{booktabs}"]
    for table in tables:
        text = [" & ".join(line) + r" \\" for line in lines_of(table, r"\textbf{{{}}}", latex_escape)]
        first = next((i for i, row in enumerate(table.rows) if row.summary), len(table.rows))
        body = [*text[1:first + 1], *([r"\midrule"] if first < len(table.rows) else []), *text[first + 1:]]
        caption = latex_escape(f"{table.title}. {table.note}".strip())
        parts.append("\n".join([r"\begin{table}", r"\centering", rf"\caption{{{caption}}}",
                                rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", text[0], r"\midrule",
                                *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts)


def as_csv(tables: list[Table]) -> str:
    """A line per number, at full precision, for other programs; without the tables over several sizes, which repeat."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["table", "model", "row", "setting", "value", "std", "stderr", "runs"])
    for table in tables:
        for row in table.rows if table.model else ():
            for i, (name, values) in enumerate(zip(table.columns, row.values, strict=True)):
                numbers = numbers_of(values)
                value = fmean(numbers) if numbers else cell(values, row.digits)
                spread = std(numbers) if len(numbers) > 1 else None
                error = row.errors[i][0] if row.errors and len(values) == 1 else None
                lines.writerow([table.what, table.model, row.label, name, value, spread, error, len(numbers)])
    return out.getvalue().rstrip("\n")


def render(tables: list[Table], form: str) -> str:
    """The tables as text in one of FORMS."""
    return FORMS[form][0](tables)


FORMS = {"markdown": (markdown, "md"), "latex": (latex, "tex"), "csv": (as_csv, "csv")}  # name -> render, file ending


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--what", help=f"some of {','.join(WHAT)}, with commas between (default: all there is)")
    parser.add_argument("--format", choices=FORMS, help="what is printed (default: markdown)")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="write table.md, table.tex and table.csv there instead")
    args = parser.parse_args()
    what = [name.strip() for name in args.what.split(",")] if args.what is not None else None
    for name in what or ():
        if name not in WHAT:
            raise UserError(f"--what {name!r}: unknown{nearest(name, WHAT)} (known: {', '.join(WHAT)})")
    if args.out and args.format:
        raise UserError("--format says what is printed, and --out FOLDER writes all three formats; give one of them")
    if args.out == Path():
        raise UserError("--out: give a folder of its own, such as results/mine")
    tables = sections(args.runs, *read_runs(args.runs), what)
    if not args.out:
        print(render(tables, args.format or "markdown"))
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for form, (_, ending) in FORMS.items():
            write_text(args.out / f"table.{ending}", render(tables, form) + "\n")
            print(args.out / f"table.{ending}")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}; give a folder that can be made and written to") from None


if __name__ == "__main__":
    run(main)
