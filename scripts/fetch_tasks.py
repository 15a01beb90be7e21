"""Fill the cache of few-shot tasks, on a machine with internet, for machines without.

    python scripts/fetch_tasks.py                        # the default tasks of eval/fewshot.py
    python scripts/fetch_tasks.py --tasks sciq,logiqa
    python scripts/fetch_tasks.py --tasks sciq,logiqa --dry_run    # are these names of tasks?

One line per task, and exit code 1 if some failed; a second start fetches what is missing. It goes
to the cache of the hub's library, ~/.cache/huggingface or HF_HOME, which the other machines must
see; with HF_HUB_OFFLINE=1 they then do not try to reach the internet. Needs requirements-eval.txt.

The harness's data sets of LogiQA and LogiQA 2.0 are loading scripts, which datasets 4 and later do
not run. So this script does what they do: it downloads the authors' files and converts them to
data/tasks/NAME/SPLIT.jsonl, from where the tasks in eval/tasks read them.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, UserError, run
from eval import fewshot
from files import write_text

FOLDER = Path("data/tasks")  # as in eval/tasks/*.yaml
TIMEOUT_S = 60
# Metrics that a task loads from the hub as well, when its points are counted.
METRICS = {"squadv2": "squad_v2"}


# Conversion


def from_logiqa(text: str) -> Iterator[dict]:
    """Questions of LogiQA: blocks of a letter, the passage, the question and four times "A.OPTION".

    As in the harness's loading script, a space follows each period.
    """
    for number, block in enumerate(text.strip().split("\n\n"), 1):
        lines = [line.strip() for line in block.split("\n")]
        if len(lines) < 4 or lines[0] not in ("a", "b", "c", "d"):
            raise UserError(f"block {number} of its file is not a question: {block[:40]!r}")
        yield {
            "label": lines[0],
            "context": spaced(lines[1]),
            "question": spaced(lines[2]),
            "options": [spaced(line[2:]) for line in lines[3:]],
        }


def spaced(text: str) -> str:
    return text.replace(".", ". ").strip()


def from_logiqa2(text: str) -> Iterator[dict]:
    """Questions of LogiQA 2.0. Each line is a JSON object; the prompt needs some of its fields."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            yield {
                "id": question["id"],
                "answer": question["answer"],
                "text": question["text"].strip(),
                "question": question["question"].strip(),
                "options": [option.strip() for option in question["options"]],
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"line {number} of its file is not a question: {line[:40]!r}") from None


class Source(NamedTuple):
    """Where a task's data comes from, and how a file of it becomes questions."""

    url: str
    files: dict[str, str]  # split -> file
    convert: Callable[[str], Iterator[dict]]


SOURCES = {
    "logiqa": Source(
        "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/master/",
        {"train": "Train.txt", "validation": "Eval.txt", "test": "Test.txt"},
        from_logiqa,
    ),
    "logiqa2": Source(
        "https://raw.githubusercontent.com/csitfun/LogiQA2.0/main/logiqa/DATA/LOGIQA/",
        {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"},
        from_logiqa2,
    ),
}


def convert(name: str, folder: Path) -> None:
    """Write the questions of a task to folder/NAME/SPLIT.jsonl, unless they are there."""
    source = SOURCES[name]
    for split, file in source.files.items():
        path = folder / name / f"{split}.jsonl"
        if path.exists():
            continue
        with urlopen(source.url + file, timeout=TIMEOUT_S) as response:
            text = response.read().decode().replace("\r\n", "\n")
        lines = [json.dumps(question) + "\n" for question in source.convert(text)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(lines))


# The command


def parse_args() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--tasks",
        default=",".join(fewshot.TASKS),
        help=f"names with commas between them (default: {', '.join(fewshot.TASKS)})",
    )
    parser.add_argument(
        "--include_path", type=Path, metavar="DIR", help="folder with YAML files of local tasks"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only check the names of the tasks; needs no internet",
    )
    args = parser.parse_args()
    args.tasks = fewshot.names_of(args.tasks)
    fewshot.check_include_path(args.include_path)
    fewshot.check_installed()
    return args


def fetch(name: str, open_task: Callable[[str], dict]) -> int:
    """Bring all that a task needs onto this machine -> how many documents it has."""
    if name in SOURCES:
        convert(name, FOLDER)
    tasks = open_task(name)["tasks"].values()
    if name in METRICS:
        import evaluate

        evaluate.load(METRICS[name])
    return sum(len(task.eval_docs) for task in tasks)


def main() -> None:
    args = parse_args()
    from eval import harness  # takes seconds and is optional

    manager = harness.open_tasks(args.tasks, args.include_path)
    if args.dry_run:
        print(f"{', '.join(args.tasks)}: known")
        return
    n_failed = 0
    for name in args.tasks:
        try:
            documents = fetch(name, manager.load)
        except Exception as error:  # anything: it comes from the internet or the task's own code
            reason = str(error) if isinstance(error, UserError) else harness.what_is_wrong(error)
            print(f"{name}: failed: {reason}", flush=True)
            n_failed += 1
        else:
            print(f"{name}: ok, {documents:,} documents", flush=True)
    if n_failed:
        print(f"{n_failed} of {len(args.tasks)} tasks failed; the same command tries them again")
        sys.exit(1)


if __name__ == "__main__":
    run(main)
