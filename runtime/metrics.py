"""Where the records of a run go: metrics.jsonl (the source of truth), the tqdm bar, wandb."""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError
from files import write_text

LINE_S = 10.0  # seconds between lines of training in a log file


class Metrics:
    """Writes the records of a run; rank 0 alone has one.

    A resumed run drops the lines past its checkpoint, which it is about to write again.
    failure: why a line could not be written.
    """

    def __init__(self, out_dir: Path, config: dict, start_step: int, max_steps: int):
        out_dir = Path(out_dir)
        self.path = out_dir / "metrics.jsonl"
        self.max_steps = max_steps
        self.r_moves = bool(config.get("r_start"))
        self.failure = ""
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            start = {"step": start_step, "world_size": config.get("world_size", 1), **versions()}
            starts = [*earlier_starts(out_dir), start]
            content = {**config, **versions(), "starts": starts}
            write_text(out_dir / "config.json", json.dumps(content, indent=1))
            keep_lines_until(start_step, self.path)
            self.file = open(self.path, "ab")
        except OSError as error:
            raise UserError(cannot_write(out_dir, error)) from None
        # Off a terminal, in a log file, there are lines in place of a bar.
        self.bar = tqdm(
            total=max_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None
        )
        self.shown_at = -math.inf
        self.wandb = None
        if config["wandb"] != "off":
            self.wandb = start_wandb(out_dir, config, start_step)

    def log(self, record: dict) -> None:
        self.append(json.dumps(record) + "\n")
        if self.failure:  # standard error may be on the same disk
            return
        step = record["step"]
        self.show(step, record)
        if self.wandb and (values := for_wandb(record)):
            if not self.r_moves:
                values.pop("train/r", None)
            self.wandb.log(values, step=step)

    def show(self, step: int, record: dict) -> None:
        """On the bar or, where there is none, as a line, training at most every LINE_S seconds."""
        text = describe(record)
        if record["kind"] != "train":
            if text:
                self.bar.write(f"step {step:>6}: {text}")
        elif not self.bar.disable:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.shown_at >= LINE_S or step == self.max_steps:
            self.shown_at = time.monotonic()
            print(f"step {step:>6} of {self.max_steps}: {text}", flush=True)

    def append(self, line: str) -> None:
        """Write the whole line or nothing of it; `failure` says why it could not be written."""
        file, rest = self.file.fileno(), line.encode()
        size_before = os.fstat(file).st_size
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError as error:
            os.truncate(self.path, size_before)
            self.failure = no_room(self.path, error)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def earlier_starts(out_dir: Path) -> list[dict]:
    """Step, command and versions of each start of this run so far."""
    try:
        content = json.loads((out_dir / "config.json").read_text())
    except (OSError, ValueError):
        return []
    return content.get("starts", []) if isinstance(content, dict) else []


def describe(record: dict) -> str:
    """A record as text for the terminal; "" for kinds that are not shown."""
    if record["kind"] == "train":
        return f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s"
    if record["kind"] == "skip":
        return (
            f"skipped, {record['reason']} not finite; {len(record['samples'])} samples named in "
            "metrics.jsonl"
        )
    if record["kind"] == "spike":
        skipped = ", skipped" if record["skipped"] else ""
        return f"gradient norm {record['grad_norm']:.3g}, above {record['limit']:.3g}{skipped}"
    if record["kind"] == "eval":
        worst = record["worst_domain"]
        worst_loss = record["domains"][worst]["loss"]
        return f"validation {record['mean_loss']:.4f} nats, worst {worst} {worst_loss:.4f}"
    return ""


# Keys of a train record that say what the weights did; they get a section of their own.
OF_WEIGHTS = (
    "ess",
    "entropy",
    "correlation",
    "max_weight",
    "above_bound",
    "weight_by_domain",
    "samples_by_domain",
    "weight_by_kind",
    "samples_by_kind",
)


def for_wandb(record: dict) -> dict[str, Any]:
    """A record under the names of its wandb charts, without what never changes or is text."""
    import wandb

    kind = record["kind"]
    values = {}
    if kind == "train":
        for key, value in record.items():
            if key in OF_WEIGHTS:
                values |= named(f"weights/{key}", value)
            elif key not in ("kind", "step"):
                values |= named(f"train/{key}", value)
    elif kind == "eval":
        values["eval/mean_loss"] = record["mean_loss"]
        for domain, result in record["domains"].items():
            for key in ("loss", "ppl", "bits_per_byte"):
                values[f"eval/{key}/{domain}"] = result[key]
    elif kind == "histogram":
        for of in ("loss", "weight"):
            edges = np.linspace(
                record[of]["low"], record[of]["high"], len(record[of]["counts"]) + 1
            )
            histogram = wandb.Histogram(np_histogram=(record[of]["counts"], edges))
            values[f"weights/{of}_histogram"] = histogram
    elif kind == "spike":
        values["train/spike"] = record["grad_norm"]
    return values


def named(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {f"{name}/{key}": part for key, part in value.items()}
    return {name: value}


def start_wandb(out_dir: Path, config: dict, start_step: int):
    """The run's page; a resumed run continues in its own one, and no other folder's run does.

    Offline, each start has a page of its own in the run's group: synced under one name, a later
    start would replace the earlier ones.
    """
    import wandb  # slow to import, and most runs do without

    run_id = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:8]
    group = None
    if config["wandb"] == "offline":
        run_id, group = f"{run_id}-{start_step}", run_id
    try:
        return wandb.init(
            project="nanoreweight",
            name=out_dir.name,
            dir=str(out_dir),
            config=config,
            mode=config["wandb"],
            id=run_id,
            group=group,
            resume="allow",
        )
    except wandb.errors.Error as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--wandb {config['wandb']}: {reason}; log in (wandb login), or use --wandb offline"
        ) from None


def cannot_write(out_dir: Path, error: OSError) -> str:
    """The error message for a run folder that cannot be made or written to."""
    return (
        f"--out_dir {out_dir}: {error.strerror}; give a folder that can be made and written to, "
        "with room on its disk"
    )


def no_room(path: Path, error: OSError) -> str:
    """The error message for a file that a run cannot add to."""
    return (
        f"{path} cannot be written ({error.strerror}); the checkpoints are intact; make room and "
        "give the same command again"
    )


@cache  # asked for at every checkpoint
def versions() -> dict:
    """What a result depends on besides the config."""
    git = ["git", "rev-parse", "HEAD"]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False, cwd=root)
        commit = done.stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {
        "git_commit": commit or None,
        "command": " ".join(sys.argv),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def read_lines(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without lines that a kill or a full disk cut short."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"kind", "step"} <= record.keys():
            records.append(record)
    return records


def keep_lines_until(step: int, path: Path) -> None:
    """Drop the records past a step; all of them where the run starts from scratch."""
    records = read_lines(path) if step else []
    kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
    write_text(path, "".join(kept))
