"""One HTML page about a set of runs: tables, charts, configs, and the commands to make them again.

    python eval/report.py runs/a runs/b --out report.html

The page loads nothing, so it can be opened or sent as it is, and the same runs give the same bytes.
It shows the tables of all evaluations (EVALUATIONS in eval/tables.py) and the charts of
eval/plots.py, which need RUN/config.json and RUN/metrics.jsonl; what a run does not have is shown
as "missing". The style of the page, and the script that shows a chart's values, are in
report_template.html.

A line of a chart is a run, in the color of its setting, which is a column of the tables. Each chart
is a figure of its own, so that a phone can put them below each other.
"""

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from statistics import fmean, median
from string import Template

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

from cli import Parser, UserError
from cli import run as run_command
from eval import fewshot, perplexity, plots
from eval.plots import COLOURS, Chart
from eval.runs import MISSING, Column, Row, RunFolder, Table, cell, columns_of, read_runs
from eval.tables import EVALUATIONS
from files import write_text

# COLOURS, on a dark page.
DARK_COLOURS = ("#5aa9e6", "#f0813a", "#2dbd91", "#de96bf", "#f0b429", "#a5d8f6", "#ffffff")
DASHES = ("none", "7 3", "2 3")  # of settings 0 to 6, 7 to 13, and all others
TABS = {"ppl": "Perplexity", "loss": "Loss", "bits_per_byte": "Bits per byte"}
# Keys of config.json that the page shows elsewhere than in the table of runs.
SHOWN_ELSEWHERE = {"identity", "command", "starts", "out_dir", "versions", "seed"}

Labels = dict[RunFolder, str]  # what the page calls each run


# Tables


def table_html(table: Table, names: list[str]) -> str:
    """A table that scrolls in its own width.

    A column whose name is in `names`, the names of all settings, gets the line of its setting.
    """
    head = ""
    for text in (table.head, *table.columns):
        label = setting_label(names.index(text), text) if text in names else escape(text)
        head += f'<th scope="col">{label}</th>'
    first_summary = next((i for i, row in enumerate(table.rows) if row.is_summary), 0)
    body = ""
    for i, row in enumerate(table.rows):
        cells = "".join(cell_html(text, is_best) for text, is_best in row.texts())
        rule = ' class="sum"' if i > 0 and i == first_summary else ""
        body += f'<tr{rule}><th scope="row">{escape(row.label)}</th>{cells}</tr>'
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def cell_html(text: str, is_best: bool) -> str:
    kind = "best" if is_best else ""
    if text == MISSING:
        kind = "muted"
    return f'<td class="{kind}">{escape(text)}</td>'


def titled(tables: list[Table], names: list[str]) -> str:
    """Tables, each below its title and above its note."""
    html = ""
    for table in tables:
        html += f"<h3>{escape(table.title)}</h3>{table_html(table, names)}"
        if table.note:
            html += f'<p class="muted">{escape(table.note)}</p>'
    return html


def missing(why: str = "") -> str:
    return f'<p class="muted">{MISSING}{escape(why)}</p>'


def evaluation_sections(runs: list[RunFolder], columns: list[Column]) -> dict[str, str]:
    """Heading -> the tables of the evaluations with this heading."""
    names = [column.name for column in columns]
    sections = {}
    for evaluation in EVALUATIONS:
        tables = evaluation.tables(runs)
        if evaluation is perplexity:
            html = perplexity_section(runs, columns, tables)
        else:
            html = titled(tables, names)
        sections[evaluation.HEADING] = sections.get(evaluation.HEADING, "") + html
    return sections


def perplexity_section(runs: list[RunFolder], columns: list[Column], tables: list[Table]) -> str:
    """The lowest average loss of each size, then the tables, one metric at a time."""
    if not perplexity.read_all(runs):
        return missing(": no run is evaluated yet")
    leads = ""
    for model in dict.fromkeys(run.config["model"] for run in runs):
        leads += lead(model, [c for c in columns if c.runs[0].config["model"] == model])
    names = [column.name for column in columns]
    buttons, tabs = "", ""
    for metric, title in TABS.items():
        checked = " checked" if metric == "ppl" else ""
        buttons += f'<input type="radio" name="metric" id="{metric}"{checked}>'
        buttons += f'<label class="tabs" for="{metric}">{title}</label>'
        shown = titled([table for table in tables if table.what == metric], names)
        note = '<p class="muted">The lowest of a row is in bold.</p>'
        tabs += f'<div class="tab {metric}">{shown}{note}</div>'
    return f"{leads}<div>{buttons}{tabs}</div>"


def lead(model: str, columns: list[Column]) -> str:
    """A sentence on the setting of this model size with the lowest average loss."""
    results = perplexity.read_all([run for column in columns for run in column.runs])
    losses = {}
    for column in columns:
        of_column = [results[run]["mean_loss"] for run in column.runs if run in results]
        if of_column:
            losses[column.name] = of_column
    if not losses:
        return ""
    best = min(losses, key=lambda name: fmean(losses[name]))
    what = f"Lowest average loss, {model}: {best}" if len(losses) > 1 else f"Average loss, {best}"
    return f'<p class="lead">{escape(what)}, {cell(losses[best], 4)} nats per token.</p>'


# Charts


class Charts:
    """Draws charts for the page and numbers them, so that no two elements have the same id."""

    def __init__(self, names: list[str]):
        self.names = names
        self.count = 0

    def grid(self, charts: list[Chart]) -> str:
        """Charts side by side, as many as fit, below a legend of all settings."""
        drawn = {line.setting for chart in charts for line in chart.lines}
        legend = ""
        for i, name in enumerate(self.names):
            note = "" if i in drawn else f" ({MISSING})"
            legend += f"<span>{setting_label(i, name)}{note}</span>"
        figures = "".join(self.figure(chart) for chart in charts)
        return f'<div class="legend">{legend}</div><div class="grid">{figures}</div>'

    def figure(self, chart: Chart) -> str:
        self.count += 1
        svg = self.svg(chart) if chart.lines else missing()
        return f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg}</figure>"

    def svg(self, chart: Chart) -> str:
        """A chart as SVG that takes its colors from the page and has its points as data."""
        figure = plots.panel(chart)
        file = io.StringIO()
        options = {"svg.fonttype": "none", "svg.hashsalt": "report", "savefig.bbox": None}
        with matplotlib.rc_context(options):
            figure.savefig(file, format="svg")
        svg = file.getvalue()
        svg = svg[svg.index('<g id="figure_1">') :]  # without XML header, date and style
        svg = re.sub(r"(\.\d\d)\d+(?= )", r"\1", svg)  # coordinates of paths, not labels
        svg = re.sub(r"font-family: [^;]*; ", "", svg)
        svg = re.sub(r'( id="|url\(#)', rf"\g<1>chart{self.count}-", svg)
        svg = svg.replace(" \nL ", "L")
        svg = svg.replace(plots.MUTED, "var(--muted)")
        svg = svg.replace(plots.RULE, "var(--rule)")
        svg = re.sub(
            r'<g id="chart\d+-line-(\d+)">\s*<path (.*?) style="[^"]*"/>',
            lambda match: self.line(chart.lines[int(match[1])], match[2]),
            svg,
            flags=re.DOTALL,
        )

        # What the x axis would show at both ends of the picture, for the script.
        corners = [(0, 0), (figure.bbox.width, 0)]
        (left, _), (right, _) = figure.axes[0].transData.inverted().transform(corners)
        width, height = plots.PANEL
        attributes = (
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}" '
            f'data-x="{chart.x}" data-left="{left:.8g}" data-right="{right:.8g}"'
        )
        return f'<svg class="plot" {attributes}>{svg}'

    def line(self, line: plots.Line, path: str) -> str:
        """The opening of the group of a line, and its path with these attributes."""
        pairs = zip(line.x, line.y, strict=True)
        points = " ".join(f"{x:.8g},{y:.6g}" for x, y in pairs)
        name = escape(self.names[line.setting])
        attributes = f'data-name="{name}" data-points="{points}" {stroke(line.setting)}'
        return f'<g class="line" {attributes}><path {path}/>'


def stroke(i: int) -> str:
    """The color and dashes of setting i."""
    dashes = DASHES[min(i // 7, 2)]
    return f'style="stroke:var(--c{i % 7});stroke-dasharray:{dashes}"'


def setting_label(i: int, name: str) -> str:
    """The line of setting i in the charts, its strategy, and the rest of its name in small."""
    strategy, *others = name.split(" ", 1)
    line = f'<path d="M1 5H21" {stroke(i)}/>'
    key = f'<svg class="key line" viewBox="0 0 22 10" aria-hidden="true">{line}</svg>'
    small = "".join(f" <small>{escape(text)}</small>" for text in others)
    return key + escape(strategy) + small


def chart_sections(columns: list[Column]) -> dict[str, str]:
    """Heading -> charts."""
    charts = Charts([column.name for column in columns])
    losses = charts.grid([*plots.loss_charts(columns), *plots.gap_charts(columns)])
    training = charts.grid(plots.training_charts(columns))
    shares = ""
    for label, heading in (("domain", "By domain"), ("kind", "By kind of document")):
        of_label = plots.share_charts(columns, label)
        if of_label:
            shares += f"<h3>{heading}</h3>" + charts.grid(of_label)
    return {
        "Validation loss": "<p>Nats per token against optimizer steps. Point at a chart to read "
        "its values. A strategy's loss minus uniform is the cost of averaging over fewer samples, "
        "which its shuffled control shows alone, less its gain in direction.</p>"
        f"{losses}",
        "Training and weights": "<p>Running means over a twentieth of the run. Weights are times "
        f"the batch size G: uniform gives every sample 1.</p>{training}",
        "Which data gets the weight": "<p>Share of the weight over share of the samples: above 1, "
        "these samples count for more than as many others.</p>"
        + (shares or missing(": the runs did not log the shares of the samples")),
    }


# What is known of the runs


def distinct(values: Iterable) -> str:
    """The values as text, each once; None and "" are left out."""
    texts = []
    for value in values:
        if value not in (None, ""):
            texts.append(f"{value:,}" if type(value) is int else str(value))
    return ", ".join(dict.fromkeys(texts)) or MISSING


def speeds(run: RunFolder) -> list[float]:
    """Tokens per second."""
    records = run.records("train")
    return [record["tokens_per_s"] for record in records if "tokens_per_s" in record]


def length(config: dict) -> str | None:
    """How long a run is; None if its config does not say."""
    keys = ("max_steps", "global_batch_size", "block_size")
    steps, batch_size, block_size = (config.get(key, 0) for key in keys)
    tokens = steps * batch_size * block_size
    if not tokens:
        return None
    return f"{tokens:,} tokens ({steps:,} steps of {batch_size} sequences of {block_size} tokens)"


def facts(runs: list[RunFolder]) -> dict[str, str]:
    """What the runs were made of and on; where they differ, each value once."""

    def each(key: str) -> str:
        return distinct(run.config.get(key) for run in runs)

    windows, dates, versions, all_speeds = [], [], [], []
    for run in runs:
        windows.append(validation(run))
        dates.append(date_written(run))
        all_speeds += speeds(run)
        for name, version in (run.config.get("versions") or {}).items():
            versions.append(f"{name} {version}")
    commits = distinct((run.config.get("git_commit") or "")[:10] for run in runs)
    machine = f"{each('device')}, {each('dtype')}; ranks: {each('world_size')}"
    if all_speeds:
        machine += f"; {median(all_speeds):,.0f} tokens/s (median)"
    return {
        "Model": each("model"),
        "Data": f"{each('data_dir')}; mixture {each('mixture')}",
        "Training": distinct(length(run.config) for run in runs),
        "Seeds": each("seed"),
        "Validation": distinct(windows),
        "Machine": machine,
        "Versions": f"{distinct(versions)}; commit {commits}",
        "Last written": f"{distinct(sorted(dates))} (UTC)",
    }


def validation(run: RunFolder) -> str:
    """What the run was evaluated on; "" if it was not."""
    result = perplexity.read(run)
    if not result:
        return ""
    tokens = sum(domain["tokens"] for domain in result["domains"].values())
    return f"{tokens:,} tokens in fixed windows, unweighted ({result['val_hash']})"


def date_written(run: RunFolder) -> str:
    """The day of the last record in UTC; "" if there is none."""
    path = Path(run.path, "metrics.jsonl")
    if not path.is_file():
        return ""
    written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return f"{written:%Y-%m-%d}"


def notes(labels: Labels, columns: list[Column]) -> list[str]:
    """What a reader must know before believing the tables, in sentences."""
    sentences = []
    for run, label in labels.items():
        sentences += notes_on_run(run, label)
    hashes = {record["val_hash"] for run in labels for record in run.records("eval")}
    if len(hashes) > 1:
        sentences.append(
            "The validation curves are of different windows (data, --block_size or --eval_windows "
            "differ): their heights cannot be compared."
        )
    if len(columns) > 1 and any(len(column.runs) == 1 for column in columns):
        sentences.append(
            "Some settings have a single seed, so how far seeds differ is unknown: a small "
            "difference is no evidence."
        )
    return sentences


def notes_on_run(run: RunFolder, label: str) -> list[str]:
    steps = run.config["max_steps"]
    sentences = []
    if not perplexity.read(run):
        sentences.append(f"{label} is not evaluated: python eval/perplexity.py --run {run.path}")
    for what, evaluation in (("evaluated", perplexity), ("few-shot scores taken", fewshot)):
        result = evaluation.read(run)
        if result and result["step"] != steps:
            sentences.append(f"{label}: {what} at step {result['step']:,} of {steps:,}.")
    trained, skipped = run.records("train"), run.records("skip")
    if trained and trained[-1]["step"] < steps:
        sentences.append(f"{label} is not finished: step {trained[-1]['step']:,} of {steps:,}.")
    if skipped:
        sentences.append(
            f"{label}: skipped steps (loss or gradient not finite): {len(skipped):,}, the last one "
            f"step {skipped[-1]['step']:,}."
        )
    return sentences


def runs_table(labels: Labels) -> Table:
    """A row per run: the settings in which any differ, how far it got, and its results."""
    differing = []
    for key in dict.fromkeys(key for run in labels for key in run.config):
        values = {json.dumps(run.config.get(key)) for run in labels}
        if key not in SHOWN_ELSEWHERE and len(values) > 1:
            differing.append(key)
    rows = []
    for run, label in labels.items():
        trained = run.records("train")
        result = perplexity.read(run)
        texts = [distinct([run.config.get(key)]) for key in (*differing, "seed")]
        texts += [
            f"{trained[-1]['step']:,}" if trained else None,
            f"{len(run.records('skip')):,}" if run.metrics else None,
            f"{result['mean_loss']:.4f}" if result else None,
            f"{median(speeds(run)):,.0f}" if speeds(run) else None,
        ]
        rows.append(Row(label, [[text] for text in texts], best=None))
    return Table(
        what="runs",
        title="Runs",
        model="",
        head="run",
        columns=[*differing, "seed", "steps", "skipped", "average loss", "tokens/s"],
        rows=rows,
    )


def commands(runs: list[RunFolder]) -> str:
    """The commands of all starts of the runs, below the commit that they need."""
    lines, checked_out = [], None
    for run in runs:
        for start in run.config.get("starts") or [run.config]:  # older runs name the last alone
            commit, ranks = start.get("git_commit"), start.get("world_size") or 1
            if commit and commit != checked_out:
                lines.append(f"git checkout {commit}")
                checked_out = commit
            launcher = f"torchrun --nproc_per_node {ranks} --" if ranks > 1 else "python"
            note = f"  # continues from step {start['step']:,}" if start.get("step") else ""
            lines.append(f"{launcher} {start.get('command', MISSING)}{note}")
        lines.append(f"python eval/perplexity.py --run {run.path}")
    text = escape("\n".join(lines))
    # A browser would also break a line after a hyphen, within the -- of a flag.
    text = re.sub(r"(?<= )--\S+", r"<span>\g<0></span>", text)
    return f"<pre>{text}</pre>"


# The page


def page(runs: list[RunFolder]) -> str:
    columns = columns_of(perplexity.settings(runs))
    labels = labels_of(runs)
    sections = {
        **evaluation_sections(runs, columns),
        **chart_sections(columns),
        "Runs": table_html(runs_table(labels), names=[]) + configs(labels),
        "How to make these runs again": commands(runs),
    }
    links, body = "", ""
    for i, (title, html) in enumerate(sections.items()):
        if html:
            links += f'<a href="#part{i}">{title}</a>'
            body += f'<section><h2 id="part{i}">{title}</h2>{html}</section>'
    list_of_facts = "".join(f"<dt>{dt}</dt><dd>{escape(dd)}</dd>" for dt, dd in facts(runs).items())
    list_of_notes = "".join(f"<li>{escape(note)}</li>" for note in notes(labels, columns))
    if list_of_notes:
        list_of_notes = f'<ul class="notes">{list_of_notes}</ul>'
    strategies = dict.fromkeys(run.config["reweight"] for run in runs)

    template = Path(__file__).with_name("report_template.html").read_text()
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(
        # No other script may run, and nothing may be loaded.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        light="; ".join(f"--c{i}: {colour}" for i, colour in enumerate(COLOURS)),
        dark="; ".join(f"--c{i}: {colour}" for i, colour in enumerate(DARK_COLOURS)),
        title=escape(", ".join(strategies)),
        count=f"{count(len(runs), 'run')} in {count(len(columns), 'setting')}",
        links=links,
        facts=list_of_facts,
        notes=list_of_notes,
        body=body,
    )


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def configs(labels: Labels) -> str:
    """The config of each run, folded."""
    html = ""
    for run, label in labels.items():
        config = escape(json.dumps(run.config, indent=1))
        summary = f"<summary>config of {escape(label)}</summary>"
        html += f"<details>{summary}<pre>{config}</pre></details>"
    return html


def labels_of(runs: list[RunFolder]) -> Labels:
    """The name of each run's folder, or its path as given where two have the same name."""
    names = [Path(run.path).name for run in runs]
    labels = {}
    for run, name in zip(runs, names, strict=True):
        labels[run] = name if names.count(name) == 1 else run.path
    return labels


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument(
        "--out", required=True, type=Path, help="the page, an HTML file; an older one is replaced"
    )
    args = parser.parse_args()
    if args.out.is_dir():
        example = args.out / "report.html"
        raise UserError(f"--out {args.out}: is a folder; give a file, such as {example}")
    try:
        write_text(args.out, page(read_runs(args.runs)))
    except OSError as error:
        raise UserError(
            f"--out {args.out}: {error.strerror}; give a file in a folder that exists"
        ) from None
    print(args.out)


if __name__ == "__main__":
    run_command(main)
