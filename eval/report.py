"""One HTML page about a set of runs: tables, curves, what the weights did, configs, how to make the runs again.

    python eval/report.py runs/a runs/b --out report.html

The page holds all that it shows and loads nothing, so it can be opened or sent as it is; the same runs give the same
bytes. Reads RUN/config.json, RUN/metrics.jsonl, RUN/eval/perplexity.json and RUN/eval/fewshot.json; what is absent is
"missing". report_template.html beside this file has the style and the script of the read-out.

The charts are drawn here and not by eval/plots.py, whose figures put up to eight panels into one picture: a phone
cannot rearrange them nor a dark page recolour them. A line is a run, in the colour of its setting, which is a column
of the tables.
"""

import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from statistics import fmean, median
from string import Template
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.ticker import MaxNLocator

from configurator import Parser
from errors import UserError, run
from eval.plots import COLOURS, smooth
from eval.runs import Groups, columns, read_fewshot, read_runs
from eval.tables import MISSING, Table, cell, lines_of, sections
from files import write_text
from manifest import in_order
from metrics import read_lines

BEST = "\x02"  # before the text of a cell in bold
METRICS = {"ppl": "Perplexity", "loss": "Loss", "bits_per_byte": "Bits per byte"}  # a tab each
DARK_COLOURS = ("#5aa9e6", "#f0813a", "#2dbd91", "#de96bf", "#f0b429", "#a5d8f6", "#ffffff")  # COLOURS, on black
DASHES = ("none", "7 3", "2 3")  # of settings 0 to 6, 7 to 13, and those after
ELSEWHERE = {"identity", "command", "out_dir", "versions", "seed"}  # keys with a place of their own on the page
POINTS = 150  # of a smoothed line, at most
Line = tuple[int, list[float], list[float]]  # setting, x, y


class Run(NamedTuple):
    folder: str
    label: str
    setting: int  # column of the tables
    config: dict
    result: dict | None  # of eval/perplexity.py
    fewshot: dict | None  # of eval/fewshot.py
    metrics: list[dict]

    def lines(self, kind: str) -> list[dict]:
        return [line for line in self.metrics if line["kind"] == kind]


def distinct(values: Iterable) -> str:
    """The values that are there, each once, as text."""
    texts = (f"{v:,}" if type(v) is int else str(v) for v in values if v not in (None, ""))
    return ", ".join(dict.fromkeys(texts)) or MISSING


def stroke(i: int) -> str:
    return f'style="stroke:var(--c{i % 7});stroke-dasharray:{DASHES[min(i // 7, 2)]}"'


def data_name(name: str) -> str:
    return f'data-name="{escape(name)}"'


def setting_label(i: int, name: str) -> str:
    """The line of setting i as the charts have it, its strategy, its other settings in small."""
    strategy, *others = name.split(" ", 1)
    line = f'<svg class="key" viewBox="0 0 22 10" aria-hidden="true"><polyline points="1,5 21,5" {stroke(i)}/></svg>'
    return line + escape(strategy) + "".join(f" <small>{escape(text)}</small>" for text in others)


def table(lines: list[list[str]], names: list[str] = (), summary: int | None = None) -> str:
    """Cells of text, the head first, as HTML that scrolls in its own width; a head among `names` gets its line, and a
    rule stands above row `summary`."""
    head = "".join(f'<th scope="col">{setting_label(names.index(c), c) if c in names else escape(c)}</th>'
                   for c in lines[0])
    body = []
    for i, (first, *cells) in enumerate(lines[1:]):
        row = "".join(f'<td class="{"best" if c.startswith(BEST) else "muted" if c == MISSING else ""}">'
                      f"{escape(c.lstrip(BEST))}</td>" for c in cells)
        rule = ' class="sum"' if i == summary else ""
        body.append(f'<tr{rule}><th scope="row">{escape(first)}</th>{row}</tr>')
    return (f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
            "</table></div>")


def titled(found: Table, names: list[str]) -> str:
    """One of eval/tables.py's tables below its title and above its note."""
    summary = next((i for i, row in enumerate(found.rows) if row.summary and i), None)
    note = f'<p class="muted">{escape(found.note)}</p>' if found.note else ""
    return f"<h3>{escape(found.title)}</h3>{table(lines_of(found, BEST + '{}', str), names, summary)}{note}"


def chart(title: str, names: list[str], lines: list[Line], low: float | None = None, high: float | None = None,
          x: str = "step") -> str:
    """A figure of lines, without the values that are not finite. low, high: of the y axis (default: of what is seen).

    The points stand in the page as they are, so that the read-out needs nothing else: the inner svg's view is the
    range of the data, turned over since y goes down there.
    """
    finite = [(i, [(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(b)]) for i, xs, ys in lines]
    lines = [(i, points) for i, points in finite if points]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not lines:
        return f'<figure>{caption}<p class="muted">{MISSING}</p></figure>'
    left, right = min(points[0][0] for _, points in lines), max(points[-1][0] for _, points in lines)
    # The untrained model's loss would squeeze all that matters, so the first tenth of a run does not count.
    seen = [b for _, points in lines for a, b in points if x != "step" or a >= 0.1 * points[-1][0]]
    margin = 0.08 * (max(seen) - min(seen)) + 1e-3 * max(map(abs, seen)) + 1e-9
    low, high = min(seen) - margin if low is None else low, max(seen) + margin if high is None else high
    width, height = right - left or 1, high - low
    ys, xs = ([t for t in MaxNLocator(4).tick_values(*ends) if ends[0] <= t <= ends[1]]
              for ends in ((low, high), (left, left + width)))
    marks = "".join(f'<line class="rule" x1="46" x2="326" y1="{at:.1f}" y2="{at:.1f}"/><text x="40" y="{at + 4:.1f}" '
                    f'text-anchor="end">{t:,.6g}</text>' for t in ys for at in [10 + (high - t) / height * 160])
    marks += "".join(f'<text x="{46 + (t - left) / width * 280:.1f}" y="188" text-anchor="middle">{t:,.6g}</text>'
                     for t in xs)
    drawn = "".join(f'<polyline {data_name(names[i])} {stroke(i)} points="'
                    + " ".join(f"{a:.8g},{b:.6g}" for a, b in (points if len(points) > 1 else 2 * points)) + '"/>'
                    for i, points in lines)
    return (f'<figure>{caption}<svg viewBox="0 0 344 194" role="img" aria-label="{escape(title)}">{marks}'
            f'<svg class="plot" data-x="{x}" x="46" y="10" width="280" height="160" preserveAspectRatio="none" '
            f'viewBox="{left:.8g} {-high:.6g} {width:.8g} {height:.6g}"><rect x="{left:.8g}" y="{-high:.6g}" '
            f'width="{width:.8g}" height="{height:.6g}" fill="transparent"/><g transform="scale(1 -1)">{drawn}</g>'
            "</svg></svg></figure>")


def grid(names: list[str], charts: list[str]) -> str:
    """Charts side by side, as many as fit, below one legend that says which settings are in none of them."""
    drawn = "".join(charts)
    legend = "".join(f"<span>{setting_label(i, name)}{'' if data_name(name) in drawn else f' ({MISSING})'}</span>"
                     for i, name in enumerate(names))
    return f'<div class="legend">{legend}</div><div class="grid">{drawn}</div>'


def over_steps(runs: list[Run], kind: str, value: Callable[[dict], float | None]) -> list[Line]:
    """A line per run of what `value` finds in its records; those of training are smoothed and thinned."""
    lines = []
    for r in runs:
        points = [(record["step"], v) for record in r.lines(kind) if (v := value(record)) is not None]
        steps, values = [step for step, _ in points], [v for _, v in points]
        if kind == "train":
            every = -(-len(points) // POINTS) or 1
            steps, values = steps[::every], smooth(values)[::every].tolist()
        lines.append((r.setting, steps, values))
    return lines


def share_lines(runs: list[Run], label: str, group: str) -> list[Line]:
    """Share of the weight over share of the samples of a domain or kind."""
    weight, samples = (over_steps(runs, "train", lambda record, key=key: record[f"{key}_by_{label}"].get(group, 0.0)
                                  if f"samples_by_{label}" in record else None) for key in ("weight", "samples"))
    return [(i, steps, [a / b if b else math.nan for a, b in zip(w, s, strict=True)])
            for (i, steps, w), (_, _, s) in zip(weight, samples, strict=True)]


def histogram_lines(runs: list[Run], of: str) -> list[Line]:
    """Percent of the samples in 50 bins common to the runs, at the last evaluation; no line where all are alike."""
    last = [(r.setting, r.lines("histogram")[-1][of]) for r in runs if r.lines("histogram")]
    last = [(i, h) for i, h in last if sum(count > 0 for count in h["counts"]) > 1]
    if not last:
        return []
    edges = np.linspace(min(h["low"] for _, h in last), max(h["high"] for _, h in last), 51)
    lines = []
    for i, h in last:
        below = 100 * np.cumsum([0, *h["counts"]]) / sum(h["counts"])
        percent = np.diff(np.interp(edges, np.linspace(h["low"], h["high"], len(below)), below))
        lines.append((i, ((edges[1:] + edges[:-1]) / 2).tolist(), percent.tolist()))
    return lines


def facts(runs: list[Run]) -> list[tuple[str, str]]:
    """(label, text) of what the runs were made of and on; where they differ, each value once."""
    def each(*keys: str) -> str:
        return ", ".join(distinct(r.config.get(k) for r in runs) for k in keys)

    sizes = [[r.config.get(k, 0) for k in ("max_steps", "global_batch_size", "block_size")] for r in runs]
    windows = [(r.result["val_hash"], sum(d["tokens"] for d in r.result["domains"].values()))
               for r in runs if r.result]
    speeds = [line["tokens_per_s"] for r in runs for line in r.lines("train") if "tokens_per_s" in line]
    written = sorted(path.stat().st_mtime for r in runs if (path := Path(r.folder, "metrics.jsonl")).is_file())
    dates = distinct(f"{datetime.fromtimestamp(t, timezone.utc):%Y-%m-%d}" for t in written)
    versions = distinct(f"{name} {v}" for r in runs for name, v in (r.config.get("versions") or {}).items())
    commits = distinct((r.config.get("git_commit") or "")[:10] for r in runs)
    return [("Model", each("model")), ("Data", f"{each('data_dir')}; mixture {each('mixture')}"),
            ("Training", distinct(f"{s * b * t:,} tokens ({s:,} steps of {b} sequences of {t} tokens)" if s * b * t
                                  else None for s, b, t in sizes)), ("Seeds", each("seed")),
            ("Validation", distinct(f"{n:,} tokens in fixed windows, unweighted ({h})" for h, n in windows)),
            ("Machine", f"{each('device', 'dtype')}; ranks: {each('world_size')}"
                        + (f"; {median(speeds):,.0f} tokens/s (median)" if speeds else "")),
            ("Versions", f"{versions}; commit {commits}"), ("Last written", f"{dates} (UTC)")]


def notes(runs: list[Run], groups: Groups) -> list[str]:
    """What a reader must know before believing the tables, in sentences."""
    found = []
    for r in runs:
        steps, trained, skips = r.config["max_steps"], r.lines("train"), r.lines("skip")
        if not r.result:
            found.append(f"{r.label} is not evaluated: python eval/perplexity.py --run {r.folder}")
        for what, record in (("evaluated", r.result), ("few-shot scores taken", r.fewshot)):
            if record and record["step"] != steps:
                found.append(f"{r.label}: {what} at step {record['step']:,} of {steps:,}.")
        if trained and trained[-1]["step"] < steps:
            found.append(f"{r.label} is not finished: step {trained[-1]['step']:,} of {steps:,}.")
        if skips:
            found.append(f"{r.label}: skipped steps (loss or gradient not finite): {len(skips):,}, the last one step "
                         f"{skips[-1]['step']:,}.")
    if len({line["val_hash"] for r in runs for line in r.lines("eval")}) > 1:
        found.append("The validation curves are of different windows (data, --block_size or --eval_windows differ): "
                     "their heights cannot be compared.")
    if len(groups) > 1 and any(len(members) == 1 for _, members in groups):
        found.append("Some settings have a single seed, so how far seeds differ is unknown: a small difference is no "
                     "evidence.")
    return found


def results(runs: list[Run], names: list[str], tables: list[Table]) -> str:
    """The per-domain tables, one metric shown at a time, below each size's setting with the lowest average loss."""
    losses = {name: [r.result["mean_loss"] for r in runs if names[r.setting] == name and r.result] for name in names}
    if not any(losses.values()):
        return f'<p class="muted">{MISSING}: no run is evaluated yet</p>'
    lead = ""
    for size in dict.fromkeys(r.config["model"] for r in runs):
        here = [name for name in dict.fromkeys(names[r.setting] for r in runs if r.config["model"] == size)
                if losses[name]]
        if here:
            best = min(here, key=lambda name: fmean(losses[name]))
            what = f"Lowest average loss, {size}: {best}" if len(here) > 1 else f"Average loss, {best}"
            lead += f'<p class="lead">{escape(f"{what}, {cell(losses[best], 4)} nats per token.")}</p>'
    tabs = "".join(f'<input type="radio" name="metric" id="{metric}"{" checked" * (metric == "ppl")}>'
                   f'<label class="tabs" for="{metric}">{title}</label>' for metric, title in METRICS.items())
    for metric in METRICS:
        shown = "".join(titled(t, names) for t in tables if t.what == metric)
        tabs += f'<div class="tab {metric}">{shown}<p class="muted">The lowest of a row is in bold.</p></div>'
    return f"{lead}<div>{tabs}</div>"


def curves(runs: list[Run], names: list[str]) -> str:
    """Validation loss, the mean first."""
    held = in_order(d for r in runs for line in r.lines("eval") for d in line["domains"])
    lines = {"mean of the domains": over_steps(runs, "eval", lambda line: line["mean_loss"])}
    lines |= {d: over_steps(runs, "eval", lambda line, d=d: line["domains"].get(d, {}).get("loss")) for d in held}
    return grid(names, [chart(title, names, of) for title, of in lines.items()])


def training(runs: list[Run], names: list[str]) -> str:
    """Loss, effective sample size and largest weight over the steps, histograms at the last evaluation."""
    loss, ess, largest = (over_steps(runs, "train", lambda line, field=field: line.get(field))
                          for field in ("loss", "ess", "max_weight"))
    return grid(names, [chart("training loss, unweighted (nats)", names, loss),
                        chart("effective sample size (share of the batch)", names, ess, 0, 1.05),
                        chart("largest weight (1: the mean)", names, largest, 0),
                        chart("% of samples by loss, last evaluation", names, histogram_lines(runs, "loss"), 0,
                              x="loss"),
                        chart("% of samples by weight, last evaluation", names, histogram_lines(runs, "weight"), 0,
                              x="weight")])


def shares(runs: list[Run], names: list[str]) -> str:
    """A chart per domain, and per kind of document where the runs know it; each set with one y axis."""
    parts = ""
    for label in ("domain", "kind"):
        there = {group for r in runs for line in r.lines("train") for group in line.get(f"samples_by_{label}", {})}
        lines = {group: share_lines(runs, label, group) for group in in_order(there)}
        values = [v for drawn in lines.values() for _, _, ys in drawn for v in ys if math.isfinite(v)]
        if values:
            ends = min(values) - 0.05, max(values) + 0.05
            parts += grid(names, [chart(group, names, drawn, *ends) for group, drawn in lines.items()])
    return parts or f'<p class="muted">{MISSING}: the runs did not log the shares of the samples</p>'


def runs_table(runs: list[Run]) -> list[list[str]]:
    """A row per run: the settings in which any differ, how far it came, what came out."""
    differ = [k for k in dict.fromkeys(k for r in runs for k in r.config)
              if k not in ELSEWHERE and len({json.dumps(r.config.get(k)) for r in runs}) > 1]
    lines = [["run", *differ, "seed", "steps", "skipped", "average loss", "tokens/s"]]
    for r in runs:
        trained = r.lines("train")
        speeds = [line["tokens_per_s"] for line in trained if "tokens_per_s" in line]
        lines.append([r.label, *(distinct([r.config.get(k)]) for k in [*differ, "seed"]),
                      f"{trained[-1]['step']:,}" if trained else MISSING,
                      f"{len(r.lines('skip')):,}" if r.metrics else MISSING,
                      f"{r.result['mean_loss']:.4f}" if r.result else MISSING,
                      f"{median(speeds):,.0f}" if speeds else MISSING])
    return lines


def reproduce(runs: list[Run]) -> str:
    """The commands run by run, below the commit that they need."""
    commands, there = [], None
    for r in runs:
        commit, ranks = r.config.get("git_commit"), r.config.get("world_size") or 1
        if commit and commit != there:
            commands.append(f"git checkout {commit}")
            there = commit
        launcher = f"torchrun --nproc_per_node {ranks} --" if ranks > 1 else "python"
        commands += [f"{launcher} {r.config.get('command', MISSING)}", f"python eval/perplexity.py --run {r.folder}"]
    return f"<pre>{escape(chr(10).join(commands))}</pre>"


def page(runs: list[Run], groups: Groups, tables: list[Table]) -> str:
    names = [name for name, _ in groups]
    against, scores, speed = ("".join(titled(t, names) for t in tables if t.what == what)
                              for what in ("difference", "fewshot", "speedup"))
    configs = "".join(f"<details><summary>config of {escape(r.label)}</summary>"
                      f"<pre>{escape(json.dumps(r.config, indent=1))}</pre></details>" for r in runs)
    parts = {
        "Results": results(runs, names, tables),
        "Against uniform": against + speed,
        "Few-shot": scores,
        "Validation loss": "<p>Nats per token against optimizer steps. Point at a chart to read its values.</p>"
                           + curves(runs, names),
        "Training and weights": "<p>Running means over a twentieth of the run. Weights are times the batch size: "
                                "uniform gives every sample 1.</p>" + training(runs, names),
        "Which data gets the weight": "<p>Share of the weight over share of the samples: above 1, these samples count "
                                      "for more than as many others.</p>" + shares(runs, names),
        "Runs": table(runs_table(runs)) + configs,
        "How to make these runs again": reproduce(runs)}
    parts = {name: part for name, part in parts.items() if part}
    form = Path(__file__).with_name("report_template.html").read_text()
    script = re.search("<script>(.*)</script>", form, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script may run
    light, dark = ("; ".join(f"--c{i}: {c}" for i, c in enumerate(palette)) for palette in (COLOURS, DARK_COLOURS))
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(runs, groups))
    return Template(form).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'", light=light, dark=dark,
        title=escape(", ".join(dict.fromkeys(r.config["reweight"] for r in runs))),
        count=f"{len(runs)} {'runs' if len(runs) > 1 else 'run'} in {len(names)} setting{'s' * (len(names) > 1)}",
        links="".join(f'<a href="#part{i}">{name}</a>' for i, name in enumerate(parts)),
        facts="".join(f"<dt>{label}</dt><dd>{escape(text)}</dd>" for label, text in facts(runs)),
        notes=f'<ul class="notes">{said}</ul>' if said else "",
        body="".join(f'<section><h2 id="part{i}">{name}</h2>{part}</section>'
                     for i, (name, part) in enumerate(parts.items())))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", required=True, type=Path, help="the page, an HTML file; an older one is replaced")
    args = parser.parse_args()
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; give a file, such as {args.out / 'report.html'}")
    configs, results = read_runs(args.runs)
    groups, scores = columns(configs), read_fewshot(args.runs)
    short = [Path(folder).name for folder in args.runs]
    runs = []
    for i, (folder, name) in enumerate(zip(args.runs, short, strict=True)):
        setting = next(column for column, (_, members) in enumerate(groups) if i in members)
        runs.append(Run(folder, name if short.count(name) == 1 else folder, setting, configs[i], results[i], scores[i],
                        read_lines(Path(folder, "metrics.jsonl"))))
    try:
        write_text(args.out, page(runs, groups, sections(args.runs, configs, results)))
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}; give a file in a folder that exists") from None
    print(args.out)


if __name__ == "__main__":
    run(main)
