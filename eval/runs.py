"""Run folders side by side: what they hold, which of them share a column, and tables of them.

An evaluation is a module of this folder with these four names, and an entry in EVALUATIONS of
eval/tables.py; the command line and the report follow from them:

    HEADING        title of the section of the report that shows its tables
    TABLES         dict: name of a kind of table, as in --what -> what runs need to have one
    read(run)      what the evaluation found for a RunFolder (RUN/eval/NAME.json, checked), or None
    tables(runs)   list of Table, of all its kinds; [] where no run has what they need
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from cli import UserError
from families import SIZES
from recipe import EXECUTION_KEYS, with_added_keys
from runtime.checkpoint import checkpoint_folder, model_sha256, read_json
from runtime.metrics import read_lines

# Keys of config.json that do not tell one setting from another. The strategy is in every name.
NOT_IN_NAMES = EXECUTION_KEYS | {
    "reweight",
    "git_commit",
    "command",
    "starts",
    "versions",
    "identity",
    "world_size",
}
# Keys of a run's identity that config.json has nowhere else. They tell runs apart, in place of
# data_dir: a folder may move, and what it holds may change.
OF_IDENTITY = (
    "data",
    "tokenizer",
    "mixture probabilities",
    "samples weighted together",
    "reference",
)
# Keys that have no effect on a uniform run.
NOT_OF_UNIFORM = {
    "samples weighted together",
    "reference",
    "r",
    "r_start",
    "r_steps",
    "r_schedule",
    "delta",
    "reweight_norm",
    "max_weight",
    "reweight_scope",
    "reweight_unit",
    "reweight_control",
    "reweight_warmup_steps",
}
MISSING = "missing"


# Run folders


@dataclass(frozen=True, eq=False)  # each object is a run of its own: a folder may be given twice
class RunFolder:
    """What train.py wrote to a run folder."""

    path: str
    config: dict  # config.json
    metrics: list[dict]  # the records of metrics.jsonl

    def records(self, kind: str) -> list[dict]:
        """The records of one kind: "train", "eval", "histogram", "skip" or "spike"."""
        return [record for record in self.metrics if record["kind"] == kind]

    @property
    def settings(self) -> dict:
        """What tells this run from others: its config, and the data itself in place of data_dir."""
        identity = self.config.get("identity")
        if not identity:
            return self.config
        identity = with_added_keys(identity)
        paths = ("data_dir", "reweight_ref")
        settings = {key: value for key, value in self.config.items() if key not in paths}
        return settings | {key: identity[key] for key in OF_IDENTITY if key in identity}

    @property
    def is_uniform(self) -> bool:
        return self.config["reweight"] == "uniform"


class Column(NamedTuple):
    """A column of a table: runs that differ in nothing but the seed."""

    name: str
    runs: list[RunFolder]


# The settings that tell runs apart: RunFolder.settings, to which an evaluation may add.
Settings = dict[RunFolder, dict]


def read_runs(folders: list[str]) -> list[RunFolder]:
    """The run folders in the order given; UserError where one is not a run's or lacks a key."""
    runs = []
    for folder in map(Path, folders):
        path = folder / "config.json"
        if not path.is_file():
            inside = any(folder.glob("*/config.json"))
            hint = f", such as {folder}/*" if inside else ""
            raise UserError(f"{folder}: no config.json in it; give run folders of train.py{hint}")
        config = read_json(path)
        for key in ("model", "reweight", "max_steps"):
            if key not in config:
                raise UserError(f"{path} has no {key!r}; restore it or train the run again")
        runs.append(RunFolder(str(folder), config, read_lines(folder / "metrics.jsonl")))
    return runs


def read_result(
    run: RunFolder,
    name: str,
    keys: tuple[str, ...],
    part: str,
    part_keys: tuple[str, ...],
) -> dict | None:
    """RUN/eval/NAME.json; None where there is no such file.

    UserError unless it has all of `keys`, "step" among them, and a dict `part` whose entries have
    all of `part_keys`.
    """
    path = Path(run.path) / "eval" / f"{name}.json"
    if not path.is_file():
        return None
    result = read_json(path)
    entries = result.get(part)
    is_complete = isinstance(entries, dict) and len(entries) > 0 and has_keys(result, keys)
    is_complete = is_complete and isinstance(result["step"], int)
    if not is_complete or not all(has_keys(entry, part_keys) for entry in entries.values()):
        raise UserError(
            f"{path} is not what eval/{name}.py writes; run: python eval/{name}.py --run {run.path}"
        )
    check_model(run, path, result, again=f"python eval/{name}.py --run {run.path}")
    return result


def check_model(run: RunFolder, path: Path, result: dict, again: str) -> None:
    """UserError where the checkpoint of a result's step holds another model than was evaluated.

    Nothing is checked where that checkpoint is gone, or one of them names no model.
    """
    state_json = checkpoint_folder(run.path, result["step"]) / "state.json"
    if not state_json.is_file():
        return
    own = model_sha256(read_json(state_json))
    evaluated = result.get("model_sha256")
    if own and evaluated and own != evaluated:
        raise UserError(
            f"{path} is of another model than the checkpoint of step {result['step']}; run: {again}"
        )


def has_keys(entry: object, keys: tuple[str, ...]) -> bool:
    return isinstance(entry, dict) and all(key in entry for key in keys)


def settings_at(settings: Settings, results: dict[RunFolder, dict], key: str) -> Settings:
    """The settings, and as `key` the step of each result that is not of its run's last step.

    Such a result belongs in a column of its own, like that of any other setting.
    """
    extended = {}
    for run, config in settings.items():
        extended[run] = config
        if run in results and results[run]["step"] != run.config["max_steps"]:
            extended[run] = {**config, key: results[run]["step"]}
    return extended


# Columns


def run_names(configs: list[dict]) -> list[str]:
    """A unique name for each run: its strategy, and the settings in which any runs differ."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_IN_NAMES)
    names = []
    for config in configs:
        parts = [config["reweight"]]
        for key in keys:
            if has_no_effect(key, config):
                continue
            values = [other.get(key) for other in configs if not has_no_effect(key, other)]
            own = config.get(key)
            if own is not None and any(value != own for value in values):
                parts.append(f"{key}={as_words(own)}")
        names.append(" ".join(parts))
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def as_words(value: object) -> str:
    if isinstance(value, dict):  # the numbers of a mixture
        return " ".join(f"{name}:{number:.3g}" for name, number in value.items())
    return str(value)


def has_no_effect(key: str, config: dict) -> bool:
    return config["reweight"] == "uniform" and key in NOT_OF_UNIFORM


def columns_of(settings: Settings) -> list[Column]:
    """The runs grouped into columns.

    Where a setting was run twice with the same seed, every run has a column of its own: whoever
    gives both wants to see both.
    """
    groups: dict[str, list[RunFolder]] = {}
    for run, config in settings.items():
        groups.setdefault(setting_of(config), []).append(run)
    for members in groups.values():
        seeds = {settings[run].get("seed") for run in members}
        if len(seeds) < len(members):
            names = run_names(list(settings.values()))
            return [Column(name, [run]) for name, run in zip(names, settings, strict=True)]

    configs = []  # one of each column
    for members in groups.values():
        config = settings[members[0]]
        configs.append({key: value for key, value in config.items() if key != "seed"})
    names = run_names(configs)
    return [Column(name, members) for name, members in zip(names, groups.values(), strict=True)]


def setting_of(config: dict) -> str:
    """The same text for two configs that differ in nothing but the seed."""
    telling = {"reweight": config["reweight"]}
    for key, value in config.items():
        if key not in NOT_IN_NAMES and key != "seed" and not has_no_effect(key, config):
            telling[key] = value
    return json.dumps(telling, sort_keys=True)


def by_model(settings: Settings) -> dict[str, list[Column]]:
    """The columns of each model size, sizes in the order of SIZES, then any others by name."""
    models = {config["model"] for config in settings.values()}
    known = [model for model in SIZES if model in models]
    by_size = {}
    for model in [*known, *sorted(models - set(known))]:
        of_model = {run: config for run, config in settings.items() if config["model"] == model}
        by_size[model] = columns_of(of_model)
    return by_size


def baselines(settings: Settings) -> dict[RunFolder, RunFolder]:
    """For each run of another strategy, the uniform run that is like it in all else, seed included.

    Runs that have no such uniform run are left out.
    """
    pairs = {}
    for run, config in settings.items():
        if run.is_uniform:
            continue
        for other, other_config in settings.items():
            if other.is_uniform and common_part(other_config) == common_part(config):
                pairs[run] = other
                break
    return pairs


def controls(settings: Settings) -> dict[RunFolder, RunFolder]:
    """For each run with weights on their own samples, the one that shuffles them, else like it.

    Runs that have no such control are left out.
    """
    pairs = {}
    for run, config in settings.items():
        if run.is_uniform or config.get("reweight_control", "none") != "none":
            continue
        shuffled = setting_of({**config, "reweight_control": "shuffled"})
        for other, other_config in settings.items():
            same_seed = other_config.get("seed") == config.get("seed")
            if same_seed and setting_of(other_config) == shuffled:
                pairs[run] = other
                break
    return pairs


def common_part(config: dict) -> dict:
    """What a run has in common with the uniform run that it is compared with."""
    left_out = NOT_IN_NAMES | NOT_OF_UNIFORM
    return {key: value for key, value in config.items() if key not in left_out}


def compared_columns(settings: Settings, compared: set[RunFolder]) -> dict[str, list[Column]]:
    """by_model without uniform columns, and without sizes that have no run in `compared`."""
    by_size = {}
    for model, all_columns in by_model(settings).items():
        others = [column for column in all_columns if not column.runs[0].is_uniform]
        if any(compared.intersection(column.runs) for column in others):
            by_size[model] = others
    return by_size


def per_column(columns: list[Column], values: dict[RunFolder, object]) -> list[list]:
    """The values of each column's runs; None for a run that has none."""
    lists = []
    for column in columns:
        lists.append([values.get(run) for run in column.runs])
    return lists


# Tables

Value = float | str | None  # None: missing


class Row(NamedTuple):
    """A line of a table; per column a list with the value of each of its runs."""

    label: str
    values: list[list[Value]]
    digits: int = 4
    best: Callable | None = min  # the best mean is in bold: min, max, or None for no bold
    sign: str = ""  # "+": positive numbers get a sign
    errors: list[list[float | None]] | None = None  # standard errors; shown for a single run
    is_summary: bool = False  # belongs below the line

    def texts(self) -> list[tuple[str, bool]]:
        """What each column shows, and whether it is in bold.

        A column with a run that has no number is never the best: the mean of the others may look
        better than it is.
        """
        errors = self.errors or [[]] * len(self.values)
        texts, means = [], []
        for values, column_errors in zip(self.values, errors, strict=True):
            text = cell(values, self.digits, self.sign, column_errors)
            texts.append(text)
            known = numbers(values)
            means.append(float(text.split(" ")[0]) if known else None)  # as it is shown

        shown = {mean for mean in means if mean is not None}
        if self.best is None or len(shown) < 2:
            return [(text, False) for text in texts]
        best = self.best(shown)
        is_best = []
        for values, mean in zip(self.values, means, strict=True):
            is_best.append(mean == best and len(numbers(values)) == len(values))
        return list(zip(texts, is_best, strict=True))


class Table(NamedTuple):
    """A table of any evaluation; eval/tables.py and eval/report.py turn it into text."""

    what: str  # its kind: a key of the evaluation's TABLES
    title: str
    model: str  # the size; "" where the table has several
    head: str  # above the labels
    columns: list[str]
    rows: list[Row]
    note: str = ""  # below the table


def numbers(values: list[Value]) -> list[float]:
    return [value for value in values if isinstance(value, int | float)]


def std(values: list[float]) -> float:
    with np.errstate(all="ignore"):  # a diverged run's perplexity may be inf
        return float(np.std(values, ddof=1))


def cell(
    values: list[Value], digits: int, sign: str = "", errors: list[float | None] | None = None
) -> str:
    """A column's values as text: mean ± standard deviation, one value with its error, or names."""
    known = numbers(values)
    if not known:
        names = dict.fromkeys(value for value in values if value is not None)
        return ", ".join(names) or MISSING
    text = f"{fmean(known):{sign}.{digits}f}"
    if len(known) > 1:
        text += f" ± {std(known):.{digits}f}"
    elif len(values) == 1 and errors and errors[0] is not None:
        text += f" ({errors[0]:.{digits}f})"
    if len(known) < len(values):
        text += f" ({len(known)} of {len(values)} runs)"
    return text


def with_spread(note: str, columns: list[Column]) -> str:
    """The note, and what ± means if any column has several runs."""
    if all(len(column.runs) == 1 for column in columns):
        return note
    counts = ", ".join(f"{column.name} {len(column.runs)}" for column in columns)
    return f"{note} ± is the standard deviation over seeds ({counts}).".strip()
