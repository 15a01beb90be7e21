"""Run folders side by side: what they found, which of them share a column, which uniform run each is compared with.

A run is named by its index in the list of folders given.
"""

import json
import sys
from pathlib import Path

import numpy as np

from checkpoint import read_json
from errors import UserError
from eval.perplexity import windows_path
from model import SIZES

# Keys of config.json that say where and how a run was made, not what it measures.
NOT_IN_NAMES = {"reweight", "out_dir", "git_commit", "command", "versions", "identity", "resume", "dry_run", "wandb",
                "log_interval", "eval_interval", "eval_windows", "checkpoint_interval", "keep_checkpoints", "device",
                "record_samples", "compile", "parallel", "micro_batch_size", "world_size", "keep_every", "on_nonfinite",
                "allow_data_change", "timeout_s", "loss_chunk", "recompute"}
NOT_OF_UNIFORM = {"r", "r_start", "r_steps", "r_schedule", "delta", "reweight_norm", "max_weight", "reweight_scope",
                  "reweight_warmup_steps"}  # without effect there

Groups = list[tuple[str, list[int]]]  # (name, runs) of each column


def read_result(folder: str | Path, name: str, keys: tuple[str, ...], part: str, its_keys: tuple[str, ...]
                ) -> dict | None:
    """RUN/eval/NAME.json, or None; UserError where it lacks one of `keys`, or an entry of `part` one of its_keys."""
    path = Path(folder) / "eval" / f"{name}.json"
    if not path.is_file():
        return None
    result = read_json(path)
    entries = result.get(part)
    if not all(key in result for key in keys) or not isinstance(entries, dict) or not entries or not all(
            isinstance(entry, dict) and key in entry for entry in entries.values() for key in its_keys):
        raise UserError(f"{path} is not what eval/{name}.py writes; run: python eval/{name}.py --run {folder}")
    return result


def read_runs(folders: list[str]) -> tuple[list[dict], list[dict | None]]:
    """(config, perplexity result or None) of each run; UserError where they cannot stand in one table."""
    configs, results, seen = [], [], {}
    for folder in map(Path, folders):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there; give run folders of train.py")
        configs.append(read_json(folder / "config.json"))
        if lacking := [key for key in ("model", "reweight", "max_steps") if key not in configs[-1]]:
            raise UserError(f"{folder}/config.json has no {lacking[0]!r}; restore it or train the run again")
        results.append(read_result(folder, "perplexity", ("step", "mean_loss", "val_hash"), "domains",
                                   ("loss", "ppl", "bits_per_byte")))
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
                        "evaluate both with the same --data_dir, --block_size and --stride")
    return configs, results


def read_fewshot(folders: list[str]) -> list[dict | None]:
    """RUN/eval/fewshot.json of each run, or None; UserError where their scores cannot be compared."""
    results, first = [], {}  # first: task -> (the first run that has it, what must agree)
    for folder in folders:
        results.append(read_result(folder, "fewshot", ("step", "num_fewshot"), "tasks",
                                   ("metric", "score", "stderr", "requests", "truncated")))
        for task, found in (results[-1] or {"tasks": {}})["tasks"].items():
            here = f"{found['metric']}, {results[-1]['num_fewshot']} examples, {found['requests']} requests"
            other, there = first.setdefault(task, (folder, here))
            if here != there:
                raise UserError(f"{task} was scored differently in {other} ({there}) and {folder} ({here}); such "
                                "scores cannot be compared: evaluate both alike, or leave them out with --what")
    return results


def read_windows(folder: str, result: dict) -> dict[str, np.ndarray] | None:
    """The loss of each window, (M,) float64 per domain, that belongs to a run's perplexity result, or None."""
    path = windows_path(Path(folder) / "eval" / "perplexity.json")
    again = f"run: python eval/perplexity.py --run {folder}"
    if not path.is_file():
        print(f"{folder}: no {path.name}, so no paired test; {again}", file=sys.stderr)
        return None
    try:
        with np.load(path) as saved:
            windows = {domain: saved[domain].astype(np.float64) for domain in result["domains"]}
    except Exception as error:  # a damaged archive makes the reader raise anything
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {again}") from None
    if not all(np.isclose(values.mean(), result["domains"][d]["loss"], rtol=1e-5, equal_nan=True)
               for d, values in windows.items()):
        raise UserError(f"{path} is not of the same evaluation as perplexity.json; {again}")
    return windows


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


def columns(configs: list[dict]) -> Groups:
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


def by_model(configs: list[dict]) -> dict[str, Groups]:
    """The columns of each size, sizes in the order of SIZES."""
    sizes = sorted({c["model"] for c in configs}, key=lambda m: (list(SIZES).index(m) if m in SIZES else 99, m))
    groups = {}
    for size in sizes:
        mine = [i for i, c in enumerate(configs) if c["model"] == size]
        groups[size] = [(name, [mine[i] for i in runs]) for name, runs in columns([configs[i] for i in mine])]
    return groups


def baselines(configs: list[dict]) -> list[int | None]:
    """Of each run the uniform run that is like it in all else, the seed included."""
    def common(config: dict) -> dict:
        return {k: v for k, v in config.items() if k not in NOT_IN_NAMES | NOT_OF_UNIFORM}
    uniform = [i for i, c in enumerate(configs) if c["reweight"] == "uniform"]
    return [next((i for i in uniform if common(configs[i]) == common(c)), None) for c in configs]
