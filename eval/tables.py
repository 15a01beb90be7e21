"""Results of several runs side by side: a row per domain, a column per run, the best of each row in bold.

    python eval/tables.py runs/a runs/b --format markdown --metric ppl

Reads RUN/config.json and RUN/eval/perplexity.json (python eval/perplexity.py --run RUN). What is absent is "missing".
"""

import csv
import io
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import Parser
from data import DOMAINS
from errors import UserError, run

MISSING = "missing"
# Keys of config.json that say where and how a run was made, not what it measures.
NOT_IN_NAMES = {"reweight", "out_dir", "git_commit", "command", "versions", "resume", "dry_run", "log_interval",
                "checkpoint_interval", "keep_checkpoints", "wandb"}
NOT_OF_UNIFORM = {"r", "delta", "reweight_scope", "reweight_warmup_steps"}  # without effect there


def read_json(path: Path) -> dict | None:
    """The file's content, None where there is no file; UserError where it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or make it again") from None


def read_runs(folders: list[str]) -> tuple[list[dict], list[dict | None]]:
    """(config, perplexity result or None) of each run; UserError where they cannot stand in one table."""
    configs, results, seen = [], [], {}
    for folder in map(Path, folders):
        configs.append(read_json(folder / "config.json"))
        if configs[-1] is None:
            raise UserError(f"{folder}: no config.json there; give run folders of train.py")
        results.append(read_json(folder / "eval" / "perplexity.json"))
        if results[-1] is None:
            print(f"{folder}: not evaluated yet; run: python eval/perplexity.py --run {folder}", file=sys.stderr)
    for folder, result in zip(folders, results, strict=True):
        if result is not None:
            seen.setdefault(result["val_hash"], folder)
    if len(seen) > 1:
        a, b = list(seen.values())[:2]
        raise UserError(f"{a} and {b} were evaluated on different validation windows and cannot be compared; "
                        "evaluate both with the same --data_dir")
    return configs, results


def run_names(configs: list[dict]) -> list[str]:
    """The strategy of each run, with the settings in which any of the runs differ; always unique."""
    keys = [key for key in dict.fromkeys(key for c in configs for key in c) if key not in NOT_IN_NAMES]
    names = []
    for config in configs:  # uniform's r may be any: it makes no run differ from a uniform one
        held = {key: [c.get(key) for c in configs if c["reweight"] != "uniform" or key not in NOT_OF_UNIFORM]
                for key in keys if config["reweight"] != "uniform" or key not in NOT_OF_UNIFORM}
        differ = [key for key, values in held.items() if any(value != config.get(key) for value in values)]
        names.append(" ".join([config["reweight"], *(f"{key}={config.get(key)}" for key in differ)]))
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def rows_of(results: list[dict | None], metric: str) -> list[tuple[str, list[float | str | None]]]:
    """(label, value per run) rows: domains, average, worst domain and which one that is."""
    held = [d for d in DOMAINS if any(r and d in r["domains"] for r in results)]
    rows = [(d, [r["domains"][d][metric] if r and d in r["domains"] else None for r in results]) for d in held]
    domains = [r["domains"] if r else None for r in results]
    worst = [max(d, key=lambda name: d[name][metric]) if d else None for d in domains]
    if metric == "bits_per_byte":
        rows.append(("average bits per byte", [fmean(v[metric] for v in d.values()) if d else None for d in domains]))
    else:
        label, mean = ("exp(average loss)", math.exp) if metric == "ppl" else ("average loss", float)
        rows.append((label, [mean(r["mean_loss"]) if r else None for r in results]))
    rows.append(("worst domain", [d[name][metric] if d else None for d, name in zip(domains, worst, strict=True)]))
    return [*rows, ("which one", worst)]


def render(names: list[str], rows: list[tuple[str, list[float | str | None]]], form: str, digits: int) -> str:
    """The table as markdown, latex or csv; the lowest value of a row in bold."""
    def cell(value: float | str | None, best: float | None) -> str:
        if isinstance(value, str):
            return value
        text = MISSING if value is None else f"{value:.{digits}f}"
        if form == "csv" or value is None or text != f"{best:.{digits}f}" or len(names) == 1:
            return text
        return rf"\textbf{{{text}}}" if form == "latex" else f"**{text}**"
    lines = []
    for label, values in rows:
        best = min((v for v in values if isinstance(v, float)), default=None)
        lines.append([label, *(cell(v, best) for v in values)])
    head = ["domain", *names]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *lines])
        return out.getvalue().rstrip("\n")
    if form == "latex":
        body = [" & ".join(re.sub(r"([_%&#])", r"\\\1", c) for c in line) + r" \\" for line in (head, *lines)]
        return "\n".join([rf"\begin{{tabular}}{{l{'r' * len(names)}}}", r"\hline", body[0], r"\hline", *body[1:-3],
                          r"\hline", *body[-3:], r"\hline", r"\end{tabular}"])
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                              enumerate(zip(line, widths, strict=True))) + " |" for line in (head, *lines)]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--format", choices=("markdown", "latex", "csv"), default="markdown",
                        help="(default: markdown)")
    parser.add_argument("--metric", choices=("ppl", "loss", "bits_per_byte"), default="ppl",
                        help="perplexity, nats per token, or bits per byte of text (default: ppl)")
    parser.add_argument("--out", type=Path, help="write the table to this file (default: print it)")
    args = parser.parse_args()
    configs, results = read_runs(args.runs)
    text = render(run_names(configs), rows_of(results, args.metric), args.format, 3 if args.metric == "ppl" else 4)
    if args.out is None:
        print(text)
        return
    try:
        args.out.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}; give a file in a folder that exists") from None


if __name__ == "__main__":
    run(main)
