"""Results of several runs side by side: a row per domain, a column per setting, the best of each row in bold.

    python eval/tables.py runs/a runs/b --format markdown --metric ppl

Runs that differ only in the seed share a column, as mean ± standard deviation. The row "minus uniform" compares each
run with the uniform run of the same seed and settings. Reads RUN/config.json and RUN/eval/perplexity.json
(python eval/perplexity.py --run RUN). What is absent is "missing".
"""

import csv
import io
import json
import re
import sys
from pathlib import Path
from statistics import fmean

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from checkpoint import read_json
from configurator import Parser
from errors import UserError, run
from eval.perplexity import perplexity
from manifest import in_order

MISSING = "missing"
# Keys of config.json that say where and how a run was made, not what it measures.
NOT_IN_NAMES = {"reweight", "out_dir", "git_commit", "command", "versions", "identity", "resume", "dry_run", "wandb",
                "log_interval", "eval_interval", "eval_windows", "checkpoint_interval", "keep_checkpoints", "device",
                "record_samples", "max_skipped_steps", "compile", "parallel", "micro_batch_size", "world_size"}
NOT_OF_UNIFORM = {"r", "r_start", "r_steps", "r_schedule", "delta", "reweight_norm", "max_weight", "reweight_scope",
                  "reweight_warmup_steps"}  # without effect there


def read_runs(folders: list[str]) -> tuple[list[dict], list[dict | None]]:
    """(config, perplexity result or None) of each run; UserError where they cannot stand in one table."""
    configs, results, seen = [], [], {}
    for folder in map(Path, folders):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there; give run folders of train.py")
        configs.append(read_json(folder / "config.json"))
        result = folder / "eval" / "perplexity.json"
        results.append(read_json(result) if result.is_file() else None)
        if results[-1] is None:
            print(f"{folder}: not evaluated yet; run: python eval/perplexity.py --run {folder}", file=sys.stderr)
        elif results[-1]["step"] != configs[-1]["max_steps"]:  # a setting like any other: it tells columns apart
            configs[-1]["evaluated_at_step"] = results[-1]["step"]
            print(f"{folder}: evaluated at step {results[-1]['step']} of {configs[-1]['max_steps']}; to evaluate the "
                  f"newest checkpoint: python eval/perplexity.py --run {folder}", file=sys.stderr)
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


def columns(configs: list[dict]) -> list[tuple[str, list[int]]]:
    """(name, runs) of each column: runs that differ in nothing but the seed share one."""
    grouped: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        left_out = NOT_IN_NAMES | {"seed"} | (NOT_OF_UNIFORM if config["reweight"] == "uniform" else set())
        key = {k: v for k, v in config.items() if k == "reweight" or k not in left_out}
        grouped.setdefault(json.dumps(key, sort_keys=True), []).append(i)
    for runs in grouped.values():  # the same seed twice: both were meant to be seen
        if len({configs[i].get("seed") for i in runs}) < len(runs):
            return [(name, [i]) for i, name in enumerate(run_names(configs))]
    names = run_names([{k: v for k, v in configs[runs[0]].items() if k != "seed"} for runs in grouped.values()])
    return list(zip(names, grouped.values(), strict=True))


def minus_uniform(configs: list[dict], results: list[dict | None]) -> list[float | None]:
    """Average loss of each run minus that of the uniform run that is like it in all else, the seed included."""
    def common(config: dict) -> dict:
        return {k: v for k, v in config.items() if k not in NOT_IN_NAMES | NOT_OF_UNIFORM}
    uniform = [(common(c), r["mean_loss"]) for c, r in zip(configs, results, strict=True)
               if r and c["reweight"] == "uniform"]
    return [next((r["mean_loss"] - loss for other, loss in uniform if r and other == common(c)), None)
            for c, r in zip(configs, results, strict=True)]


def rows_of(results: list[dict | None], metric: str) -> list[tuple[str, list[float | str | None]]]:
    """(label, value per run) rows: domains, average, worst domain and which one that is."""
    held = in_order(d for r in results if r for d in r["domains"])
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


def cell(values: list[float | str | None], digits: int, sign: str = "") -> str:
    """The values of a column's runs as text: one value, mean ± standard deviation, or the names in it."""
    held = [v for v in values if v is not None]
    if not held:
        return MISSING
    if isinstance(held[0], str):
        return ", ".join(dict.fromkeys(held))
    with np.errstate(all="ignore"):  # a diverged run's perplexity may be inf
        spread = f" ± {np.std(held, ddof=1):.{digits}f}" if len(held) > 1 else ""
    short = f" ({len(held)} of {len(values)} runs)" if len(held) < len(values) else ""
    return f"{fmean(held):{sign}.{digits}f}{spread}{short}"


def lines_of(configs: list[dict], results: list[dict | None], metric: str, bold: str) -> list[list[str]]:
    """The table as cells of text, the head first; bold: a format for the lowest mean of a row, such as "**{}**"."""
    groups = columns(configs)
    digits = 3 if metric == "ppl" else 4
    lines = [["domain", *(name for name, _ in groups)]]
    for label, values in rows_of(results, metric):
        per_column = [[values[i] for i in runs] for _, runs in groups]
        texts = [cell(v, digits) for v in per_column]
        means = [text.split(" ")[0] for text in texts]
        numbers = [float(m) for m, v in zip(means, per_column, strict=True) if any(isinstance(x, float) for x in v)]
        if bold and len(numbers) > 1:
            best = f"{min(numbers):.{digits}f}"
            texts = [bold.format(text) if mean == best else text for text, mean in zip(texts, means, strict=True)]
        lines.append([label, *texts])
    against = minus_uniform(configs, results)
    if any(c["reweight"] != "uniform" and value is not None for c, value in zip(configs, against, strict=True)):
        lines.append(["average loss minus uniform", *(cell([against[i] for i in runs], 4, "+") for _, runs in groups)])
    return lines


def render(lines: list[list[str]], form: str) -> str:
    """The cells as markdown, latex or csv."""
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue().rstrip("\n")
    if form == "latex":
        text = [" & ".join(re.sub(r"([_%&#])", r"\\\1", c).replace("±", r"$\pm$") for c in line) + r" \\"
                for line in lines]
        summary = next(i for i, line in enumerate(lines) if line[0].split(" ")[0] in ("average", "exp(average"))
        return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", r"\hline", text[0], r"\hline",
                          *text[1:summary], r"\hline", *text[summary:], r"\hline", r"\end{tabular}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                              enumerate(zip(line, widths, strict=True))) + " |" for line in lines]
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
    bold = {"markdown": "**{}**", "latex": r"\textbf{{{}}}", "csv": ""}[args.format]
    text = render(lines_of(configs, results, args.metric, bold), args.format)
    if args.out is None:
        print(text)
        return
    try:
        args.out.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}; give a file in a folder that exists") from None


if __name__ == "__main__":
    run(main)
