"""Results of several runs side by side: a row per domain, a column per run, the best of each row in bold.

    python eval/tables.py runs/a runs/b --format markdown --metric ppl

Reads RUN/config.json and RUN/eval/perplexity.json (python eval/perplexity.py --run RUN). What is absent is "missing".
"""

import csv
import io
import json
import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import Parser
from data import DOMAINS
from errors import UserError, run

MISSING = "missing"
# Keys of config.json that say where and how a run was made, not what it measures.
NOT_IN_NAMES = {"reweight", "out_dir", "git_commit", "command", "versions", "resume", "dry_run"}


def read_runs(folders: list[str]) -> tuple[list[dict], list[dict | None]]:
    """(config, perplexity result or None) of each run; UserError where they cannot stand in one table."""
    configs, results = [], []
    for folder in map(Path, folders):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there; give run folders of train.py")
        configs.append(json.loads((folder / "config.json").read_text()))
        result = folder / "eval" / "perplexity.json"
        if not result.is_file():
            print(f"{folder}: not evaluated yet; run: python eval/perplexity.py --run {folder}", file=sys.stderr)
        results.append(json.loads(result.read_text()) if result.is_file() else None)
    seen = {}
    for folder, result in zip(folders, results, strict=True):
        if result is not None:
            seen.setdefault(result["val_hash"], folder)
    if len(seen) > 1:
        a, b = list(seen.values())[:2]
        raise UserError(f"{a} and {b} were evaluated on different validation windows and cannot be compared; "
                        "evaluate both with the same --data_dir")
    return configs, results


def run_names(configs: list[dict]) -> list[str]:
    """The strategy of each run, with the settings that tell runs of one strategy apart; always unique."""
    keys = [key for key in configs[0] if key not in NOT_IN_NAMES]
    names = []
    for config in configs:
        same = [c for c in configs if c["reweight"] == config["reweight"]]
        differ = [key for key in keys if any(c.get(key) != config.get(key) for c in same)]
        names.append(" ".join([config["reweight"], *(f"{key}={config.get(key)}" for key in differ)]))
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def rows_of(results: list[dict | None], metric: str) -> list[tuple[str, list[float | None]]]:
    """(label, value per run) rows: domains, average, worst domain."""
    held = [d for d in DOMAINS if any(r and d in r["domains"] for r in results)]
    rows = [(d, [r["domains"][d][metric] if r and d in r["domains"] else None for r in results]) for d in held]
    mean = math.exp if metric == "ppl" else float
    rows.append(("average loss" if metric == "loss" else "exp(average loss)",
                 [mean(r["mean_loss"]) if r else None for r in results]))
    rows.append(("worst domain", [r["domains"][r["worst_domain"]][metric] if r else None for r in results]))
    return rows


def render(names: list[str], rows: list[tuple[str, list[float | None]]], form: str, digits: int) -> str:
    """The table as markdown, latex or csv; the lowest value of a row in bold."""
    def cell(value: float | None, best: float | None) -> str:
        text = MISSING if value is None else f"{value:.{digits}f}"
        if form == "csv" or value is None or text != f"{best:.{digits}f}" or len(names) == 1:
            return text
        return rf"\textbf{{{text}}}" if form == "latex" else f"**{text}**"
    lines = []
    for label, values in rows:
        best = min((v for v in values if v is not None), default=None)
        lines.append([label, *(cell(v, best) for v in values)])
    head = ["domain", *names]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *lines])
        return out.getvalue().rstrip("\n")
    if form == "latex":
        body = [" & ".join(line).replace("_", r"\_") + r" \\" for line in (head, *lines)]
        return "\n".join([rf"\begin{{tabular}}{{l{'r' * len(names)}}}", r"\hline", body[0], r"\hline", *body[1:-2],
                          r"\hline", *body[-2:], r"\hline", r"\end{tabular}"])
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
    args = parser.parse_args()
    configs, results = read_runs(args.runs)
    print(render(run_names(configs), rows_of(results, args.metric), args.format, 3 if args.metric == "ppl" else 4))


if __name__ == "__main__":
    run(main)
