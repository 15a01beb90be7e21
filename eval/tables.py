"""The results of several runs side by side: a row per domain or task, a column per setting.

    python eval/tables.py runs/a runs/b                                # all tables, as Markdown
    python eval/tables.py runs/* --what ppl,difference --format latex  # \\usepackage{booktabs}
    python eval/tables.py runs/* --out results/mine                    # table.md, .tex and .csv

The best value of a row is in bold. Each model size (config key `model`) has its own table. Runs
that differ only in the seed share a column, as mean ± standard deviation. Reads config.json and
metrics.jsonl of each RUN, and what eval/perplexity.py and eval/fewshot.py wrote to RUN/eval. A
result that does not exist is shown as "missing".
"""

import csv
import io
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, UserError, nearest, run
from eval import difference, fewshot, perplexity, speedup
from eval.runs import RunFolder, Table, cell, numbers, read_runs, std
from files import write_text

# All evaluations, in the order of their tables; eval/runs.py says what such a module has.
EVALUATIONS = (perplexity, difference, fewshot, speedup)

KINDS = {}  # name of a kind of table, as in --what -> what runs need to have one
for evaluation in EVALUATIONS:
    KINDS |= evaluation.TABLES

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "_%&#${}"},
}


# Text that begins like this is a formula to a spreadsheet, but an interval of ours is not.
FORMULA = re.compile(r"[=+\-@\t\r]")
INTERVAL = re.compile(r"[+-]\d+\.\d+ to [+-]\d+\.\d+")


def collect_tables(runs: list[RunFolder], what: list[str] | None = None) -> list[Table]:
    """The tables of the kinds in `what`, in that order; by default all that the runs have data for.

    UserError where the runs have nothing for a chosen kind.
    """
    tables = []
    for evaluation in EVALUATIONS:
        if what is None or not evaluation.TABLES.keys().isdisjoint(what):
            tables += evaluation.tables(runs)
    chosen = []
    for kind in dict.fromkeys(KINDS if what is None else what):
        of_kind = [table for table in tables if table.what == kind]
        if what is not None and not of_kind:
            raise UserError(f"--what {kind}: {KINDS[kind]}; none of these runs has that")
        chosen += of_kind
    return chosen


def lines_of(table: Table, bold: str, escape: Callable[[str], str]) -> list[list[str]]:
    """The table as cells of text, the head first; bold: a format for the best, such as "**{}**"."""
    lines = [[escape(text) for text in (table.head, *table.columns)]]
    for row in table.rows:
        line = [escape(row.label)]
        for text, is_best in row.texts():
            text = escape(text)
            line.append(bold.format(text) if is_best else text)
        lines.append(line)
    return lines


def markdown(tables: list[Table]) -> str:
    parts = []
    for table in tables:
        lines = lines_of(table, "**{}**", lambda text: text.replace("|", r"\|"))
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        text = []
        for label, *cells in lines:
            padded = [label.ljust(widths[0])]
            for content, width in zip(cells, widths[1:], strict=True):
                padded.append(content.rjust(width))
            text.append("| " + " | ".join(padded) + " |")
        rules = ["-" * (widths[0] + 2)]
        rules += ["-" * (width + 1) + ":" for width in widths[1:]]
        text.insert(1, "|" + "|".join(rules) + "|")
        parts += [f"### {table.title}", "\n".join(text)]
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts)


def escape_latex(text: str) -> str:
    special = "|".join(map(re.escape, LATEX))
    text = re.sub(special, lambda match: LATEX[match[0]], text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text)  # a minus sign, not a hyphen


def latex(tables: list[Table]) -> str:
    parts = [r"% \usepackage{booktabs}"]
    for table in tables:
        lines = lines_of(table, r"\textbf{{{}}}", escape_latex)
        head, *body = [" & ".join(line) + r" \\" for line in lines]
        summaries = [i for i, row in enumerate(table.rows) if row.is_summary]
        if summaries:
            body.insert(summaries[0], r"\midrule")
        caption = escape_latex(f"{table.title}. {table.note}".strip())
        text = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(text))
    return "\n\n".join(parts)


def as_csv(tables: list[Table]) -> str:
    """A line per number, at full precision, for other programs.

    The tables over several sizes are left out: they repeat what the others have.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "model", "row", "setting", "value", "std", "stderr", "runs"])
    for table in tables:
        if not table.model:
            continue
        for row in table.rows:
            for i, (name, values) in enumerate(zip(table.columns, row.values, strict=True)):
                known = numbers(values)
                value = fmean(known) if known else cell(values, row.digits)
                spread = std(known) if len(known) > 1 else None
                error = row.errors[i][0] if row.errors and len(values) == 1 else None
                line = [table.what, table.model, row.label, name, value, spread, error, len(known)]
                writer.writerow(map(without_formula, line))
    return out.getvalue().rstrip("\n")


def without_formula(value: float | str | None) -> float | str | None:
    """A cell for a CSV file; text that a spreadsheet would run gets an apostrophe before it.

    Names of runs, domains and tasks may come from other people's files.
    """
    if isinstance(value, str) and FORMULA.match(value) and not INTERVAL.fullmatch(value):
        return f"'{value}"
    return value


FORMATS = {  # name -> function, ending of the file
    "markdown": (markdown, "md"),
    "latex": (latex, "tex"),
    "csv": (as_csv, "csv"),
}


def parse_args() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    kinds = ",".join(KINDS)
    parser.add_argument(
        "--what", help=f"some of {kinds}, with commas between (default: all there is)"
    )
    parser.add_argument("--format", choices=FORMATS, help="what is printed (default: markdown)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write table.md, table.tex and table.csv to it instead of printing",
    )
    args = parser.parse_args()
    if args.what is not None:
        args.what = [name.strip() for name in args.what.split(",")]
        for name in args.what:
            if name not in KINDS:
                hint = f"{nearest(name, KINDS)} (known: {', '.join(KINDS)})"
                raise UserError(f"--what {name!r}: unknown{hint}")
    if args.out and args.format:
        raise UserError(
            "--format says what is printed, and --out FOLDER writes all three formats; "
            "give one of them"
        )
    if args.out == Path():
        raise UserError("--out: give a folder of its own, such as results/mine")
    return args


def main() -> None:
    args = parse_args()
    tables = collect_tables(read_runs(args.runs), args.what)
    made = {table.what for table in tables}
    for kind in KINDS:
        if args.what is None and kind not in made:
            print(f"no table {kind}: {KINDS[kind]}", file=sys.stderr)
    if not args.out:
        render, _ = FORMATS[args.format or "markdown"]
        print(render(tables))
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for render, ending in FORMATS.values():
            path = args.out / f"table.{ending}"
            write_text(path, render(tables) + "\n")
            print(path)
    except OSError as error:
        raise UserError(
            f"--out {args.out}: {error.strerror}; give a folder that can be made and written to"
        ) from None


if __name__ == "__main__":
    run(main)
