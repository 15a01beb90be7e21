"""One log(record) for everything that watches a run: metrics.jsonl (the source of truth), the tqdm bar, wandb."""

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from errors import UserError
from files import lock, write_text


class Metrics:
    """Only rank 0 makes one. A resumed run drops the lines past its checkpoint, which it is about to write again."""

    def __init__(self, out_dir: Path, config: dict, start_step: int, max_steps: int):
        self.path = Path(out_dir) / "metrics.jsonl"
        busy = f"a process is still training in {out_dir}"  # torchrun, killed, leaves its workers behind
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock(self.path, busy, wait=10).close()
            write_text(self.path.with_name("config.json"), json.dumps({**config, **versions()}, indent=1))
            kept = [line for line in read_lines(self.path) if line["step"] <= start_step] if start_step else []
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file, self.failure = lock(self.path, busy), ""  # failure: why a line could not be written
        except OSError as error:
            raise UserError(f"--out_dir {out_dir}: {error.strerror}; give a folder that can be made and written to, "
                            "with room on its disk") from None
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True)
        self.wandb = None
        if config["wandb"] != "off":
            import wandb  # only here: most runs have no account
            # One id per run folder: a resumed run goes on in its own page, and no other folder's run does.
            run_id = hashlib.sha256(str(Path(out_dir).resolve()).encode()).hexdigest()[:8]
            try:
                self.wandb = wandb.init(project="nanoreweight", name=Path(out_dir).name, dir=str(out_dir),
                                        config=config, mode=config["wandb"], id=run_id, resume="allow")
            except wandb.errors.Error as error:
                reason = str(error).split("\n")[0]
                raise UserError(f"--wandb {config['wandb']}: {reason}; log in (wandb login), or use --wandb offline"
                                ) from None

    def log(self, record: dict) -> None:
        self.append(json.dumps(record) + "\n")
        if self.failure:  # standard error may be on the same disk
            return
        step = record["step"]
        self.bar.update(step - self.bar.n)
        if record["kind"] == "train":
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s")
        elif record["kind"] == "skip":
            self.bar.write(f"step {step:>6}: skipped, {record['reason']} not finite; {len(record['samples'])} samples "
                           "named in metrics.jsonl")
        elif record["kind"] == "spike":
            self.bar.write(f"step {step:>6}: gradient norm {record['grad_norm']:.3g}, above {record['limit']:.3g}" +
                           (", skipped" if record["skipped"] else ""))
        elif record["kind"] == "eval":
            self.bar.write(f"step {step:>6}: validation {record['mean_loss']:.4f} nats, worst {record['worst_domain']} "
                           f"{record['domains'][record['worst_domain']]['loss']:.4f}")
        if self.wandb:
            self.wandb.log({record["kind"]: {k: v for k, v in record.items() if k != "kind"}}, step=step)

    def append(self, line: str) -> None:
        """The whole line or nothing of it; why it could not be written is in `failure`."""
        file, rest = self.file.fileno(), line.encode()
        before = os.fstat(file).st_size
        try:
            while rest:
                rest = rest[os.write(file, rest):]
        except OSError as error:
            os.truncate(self.path, before)
            self.failure = no_room(self.path, error)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def no_room(path: Path, error: OSError) -> str:
    """What to say of a file that a run cannot add to."""
    return (f"{path} cannot be written ({error.strerror}); the checkpoints are intact; make room and give the same "
            "command again")


@cache  # every checkpoint asks
def versions() -> dict:
    """What a result depends on besides the config."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
                             cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {"git_commit": git or None, "command": " ".join(sys.argv),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}


def read_lines(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that a kill or a full disk cut short is left out."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"kind", "step"} <= record.keys():
            lines.append(record)
    return lines
