"""Few-shot scores of a checkpoint, by EleutherAI's lm-evaluation-harness; all ranks share the work.

    python eval/fewshot.py --run runs/124m_uniform_linupper_seed42    # default tasks, 5 examples
    torchrun --nproc_per_node 8 -- eval/fewshot.py --run RUN --tasks sciq,piqa --num_fewshot 0
    python eval/fewshot.py --run RUN --tasks paper,wide    # sets of tasks (SETS)
    python eval/fewshot.py --run RUN --tasks mine --include_path folder_with_yaml  # local tasks
    HF_HUB_OFFLINE=1 python eval/fewshot.py --run RUN    # after scripts/fetch_tasks.py elsewhere

Writes RUN/eval/fewshot.json after each task, with why a task could not be scored; a second start
with the same settings scores only what is missing. Needs requirements-eval.txt.

A prompt longer than the context loses its first tokens, and with them some of its examples: of each
task's `requests`, `truncated` lost `tokens_cut` tokens in all.
"""

import hashlib
import json
import os
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cli import Parser, UserError
from cli import run as run_command
from eval import models, perplexity
from eval.runs import (
    Column,
    Row,
    RunFolder,
    Table,
    by_model,
    per_column,
    read_result,
    settings_at,
    with_spread,
)
from files import write_text
from runtime import checkpoint, distributed
from runtime.distributed import print0

TASKS = (
    "logiqa",
    "logiqa2",
    "sciq",
    "piqa",
    "copa",
    "wic",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "hellaswag",
    "lambada_openai",
    "triviaqa",
    "nq_open",
    "webqs",
    "lambada",
    "squadv2",
)
# Names of several tasks, for --tasks.
SETS = {
    "paper": (  # of the paper's Llamas
        "logiqa",
        "logiqa2",
        "sciq",
        "piqa",
    ),
    "wide": (
        "mmlu",
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "boolq",
        "truthfulqa_mc1",
        "truthfulqa_mc2",
    ),
}
RESULT = "fewshot.json"


# Tables of several runs

HEADING = "Few-shot"
TABLES = {"fewshot": "needs RUN/eval/fewshot.json (python eval/fewshot.py --run RUN)"}


def read(run: RunFolder) -> dict | None:
    """RUN/eval/fewshot.json, or None; its "tasks" are empty where none could be scored."""
    path = Path(run.path) / "eval" / RESULT
    if path.is_file():
        record = checkpoint.read_json(path)
        if record.get("tasks") == {} and record.get("failed") and "step" in record:
            return record
    return read_result(
        run,
        "fewshot",
        keys=("step", "num_fewshot"),
        part="tasks",
        part_keys=("metric", "score", "stderr", "requests", "truncated"),
    )


def read_all(runs: list[RunFolder]) -> dict[RunFolder, dict]:
    """The results of the runs that have one; UserError where their scores cannot be compared."""
    results = {}
    scored = {}  # task -> the first run that has it, and how it was scored
    for run in runs:
        result = read(run)
        if result is None:
            continue
        results[run] = result
        for name, task in result["tasks"].items():
            how = how_scored(result, task)
            first, first_how = scored.setdefault(name, (run, how))
            if how != first_how:
                raise UserError(
                    f"{name} was scored differently in {first.path} ({first_how}) and {run.path} "
                    f"({how}); such scores cannot be compared: evaluate both alike, or leave them "
                    "out with --what"
                )
    return results


def how_scored(result: dict, task: dict) -> str:
    """All that two scores of a task must share to be compared."""
    return (
        f"{task['metric']}, {result['num_fewshot']} examples, {task['requests']} requests, "
        f"seed {result.get('seed')}, {result.get('dtype')}, harness {result.get('harness')}, "
        f"task version {task.get('version')}"
    )


def tables(runs: list[RunFolder]) -> list[Table]:
    """A table per model size that has scores."""
    results = read_all(runs)
    settings = settings_at(perplexity.settings(runs), results, "scored_at_step")
    tasks = {}  # metric and requests are the same in all runs
    for result in results.values():
        tasks |= result["tasks"]
    scores = []
    for size, columns in by_model(settings).items():
        members = [run for column in columns for run in column.runs]
        of_size = {run: results[run] for run in members if run in results}
        if of_size:
            scores.append(table(size, columns, of_size, tasks))
    return scores


def table(
    size: str, columns: list[Column], results: dict[RunFolder, dict], tasks: dict[str, dict]
) -> Table:
    """The score of each task, and the mean of those in which more is better.

    A group counts by its tasks, not once more by itself.
    """
    rising = {name for name, task in tasks.items() if task.get("higher_is_better") is not False}
    averaged = {name for name in rising if not tasks[name].get("is_group")}
    rows = []
    for name, task in tasks.items():
        row = Row(
            f"{name} ({task['metric'].split(',')[0]})",
            per_column(columns, values_of(results, name, "score")),
            best=max if name in rising else min,
            errors=per_column(columns, values_of(results, name, "stderr")),
        )
        rows.append(row)
    reasons = reasons_of(results)
    for name in dict.fromkeys(name for names in reasons.values() for name in names):
        if name not in tasks:  # no run has a score of it
            rows.append(Row(name, per_column(columns, {}), best=None))
    if averaged:
        means = {}
        for run, result in results.items():
            if averaged <= result["tasks"].keys():
                means[run] = fmean(result["tasks"][name]["score"] for name in averaged)
        rows.append(Row("mean", per_column(columns, means), best=max, is_summary=True))

    shots = sorted({str(result["num_fewshot"]) for result in results.values()})
    note = (
        f"{' or '.join(shots)} examples in the prompt; in parentheses the standard error over a "
        "task's documents. Requests cut on the left to fit the context: "
        f"{describe_cuts(results, tasks)}."
    )
    for reason, names in reasons.items():
        note += f" Missing: {', '.join(names)}: {reason} (more in RUN/eval/fewshot.json)."
    return Table(
        what="fewshot",
        title=f"Few-shot scores, {size}",
        model=size,
        head="task",
        columns=[column.name for column in columns],
        rows=rows,
        note=with_spread(note, columns),
    )


def values_of(results: dict[RunFolder, dict], task: str, key: str) -> dict[RunFolder, float]:
    """A number of a task's record in each run that has it."""
    values = {}
    for run, result in results.items():
        value = result["tasks"].get(task, {}).get(key)
        if isinstance(value, int | float):
            values[run] = float(value)
    return values


def reasons_of(results: dict[RunFolder, dict]) -> dict[str, list[str]]:
    """Why tasks could not be scored in some run -> their names; a reason without its details."""
    reasons = {}
    for result in results.values():
        failed = result.get("failed")
        for name, reason in failed.items() if isinstance(failed, dict) else ():
            names = reasons.setdefault(str(reason).split(" (")[0], [])
            if name not in names:
                names.append(name)
    return reasons


def describe_cuts(results: dict[RunFolder, dict], tasks: dict[str, dict]) -> str:
    """The most requests that were cut in any run, of each task that has some."""
    parts = []
    for name, task in tasks.items():
        most = max(values_of(results, name, "truncated").values(), default=0)
        if most:
            parts.append(f"{name} {most:.0f} of {task['requests']}")
    return ", ".join(parts) or "none"


# The command


def parse_args() -> Namespace:
    parser = Parser(__doc__)
    models.add_flags(parser, RESULT)
    parser.add_argument(
        "--tasks",
        default=",".join(TASKS),
        help="names of tasks, groups or tags of the harness, or of our sets "
        f"({', '.join(SETS)}), with commas between them (default: {', '.join(TASKS)})",
    )
    parser.add_argument(
        "--num_fewshot",
        type=int,
        default=5,
        help="examples in a prompt, but none where a task itself says none (default: 5)",
    )
    parser.add_argument(
        "--include_path", type=Path, metavar="DIR", help="folder with YAML files of local tasks"
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="the first N documents of each task only, for a trial",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="requests per rank and forward pass (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="of the choice of examples (default: 1234, as in the harness)",
    )
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args: Namespace) -> None:
    """UserError for a wrong value; splits --tasks into names, each once."""
    for name, lowest in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name} {value}: must be {lowest} or more")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: must be below 2**32")
    args.tasks = names_of(args.tasks)
    check_include_path(args.include_path)
    check_installed()


def names_of(tasks: str) -> list[str]:
    """The names in --tasks, each once; those of a set in its place."""
    names = []
    for name in tasks.split(","):
        names += SETS.get(name.strip(), [name.strip()])
    names = [name for name in dict.fromkeys(names) if name]
    if not names:
        raise UserError("--tasks: no name given; such as --tasks sciq,piqa")
    return names


def check_include_path(folder: Path | None) -> None:
    if folder and not folder.is_dir():
        raise UserError(
            f"--include_path {folder}: no such folder; give one with YAML files of tasks"
        )


def check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed: pip install -r requirements-eval.txt"
        )


def open_record(path: Path | None, settings: dict) -> dict:
    """The record to add to: the file's if it has the same settings, otherwise an empty one."""
    empty = {**settings, "tasks": {}, "failed": {}}
    if path is None or not path.is_file():
        return empty
    record = checkpoint.read_json(path)
    differences = []
    for key, value in settings.items():
        if record.get(key) != value:
            differences.append(f"{key} {record.get(key)}")
    if differences or not isinstance(record.get("tasks"), dict):
        print0(
            f"{path} is of other settings ({', '.join(differences)}): "
            "what is scored now replaces it"
        )
        return empty
    return {**record, "failed": {}}


def hash_of_files(folder: Path | None) -> str | None:
    """A hash of the files of local tasks, which are edited more often than their version."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


def as_text(record: dict) -> str:
    """The record for the terminal: a line per task, then the tasks that could not be scored."""
    width = max(map(len, ("task", *record["tasks"])))
    head = f"{'task':<{width}}  {'metric':<16}{'score':>11}{'± s.e.':>9}{'examples':>10}"
    lines = [f"{head}{'requests':>10}{'cut on the left':>17}{'tokens each':>13}"]
    for name, task in record["tasks"].items():
        metric = task["metric"].split(",")[0]
        error = "" if task["stderr"] is None else f"{task['stderr']:.4f}"
        shots = "" if task["num_fewshot"] is None else task["num_fewshot"]
        cut = task["truncated"]
        each = f"{task['tokens_cut'] / cut:.1f}" if cut else ""
        scored = f"{name:<{width}}  {metric:<16}{task['score']:>11.4f}{error:>9}{shots:>10}"
        lines.append(f"{scored}{task['requests']:>10,}{cut:>17,}{each:>13}")
    for name, reason in record["failed"].items():
        lines.append(f"left out: {name}: {reason}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    from eval import harness  # takes seconds and is optional

    manager = harness.open_tasks(args.tasks, args.include_path)
    evaluated = models.open_model(args)
    result_path = models.result_path(args, RESULT)
    settings = {
        **evaluated.about,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "seed": args.seed,
        "harness": harness.VERSION,
        "local_tasks": hash_of_files(args.include_path),
    }
    record = open_record(result_path, settings)
    kept = [name for name in args.tasks if name in record["tasks"]]
    if kept:
        print0(
            f"scored before with these settings: {', '.join(kept)} "
            f"(remove {result_path} to score again)"
        )
    # Otherwise the harness's bootstrap would start a process per core, on every rank.
    os.environ["DISABLE_MULTIPROC"] = "1"
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    model = evaluated.model.to(device)
    lm = harness.Harness(model, evaluated.tokens, args.batch_size, evaluated.about["dtype"])
    for name in args.tasks:
        if name in record["tasks"]:
            continue
        try:
            record["tasks"] |= harness.evaluate(lm, manager, name, args, record["tasks"])
        except UserError as error:
            record["failed"][name] = str(error)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_size {args.batch_size}: does not fit in the GPU's memory; lower it"
            ) from None
        if result_path and distributed.ranks().rank == 0:
            write_text(result_path, json.dumps(record, indent=1))
    if not record["tasks"]:
        name, *others = record["failed"]
        more = f" ({len(others)} more failed as well)" if others else ""
        raise UserError(f"task {name}: {record['failed'][name]}{more}")
    if distributed.ranks().rank == 0:
        print(as_text(record))
    distributed.cleanup()


if __name__ == "__main__":
    run_command(main)
