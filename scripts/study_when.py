"""When does reweighting help? Branches of uniform runs with controls, one thing varied at a time.

    python scripts/study_when.py --input SLIMPAJAMA --to results/when                    # on a CPU
    python scripts/study_when.py --input SLIMPAJAMA --to results/when_124m --plan h100 --minutes 8

    gap to uniform = cost of averaging over fewer samples - gain in direction

In each regime (model, data, optimizer) and with each seed, one run has uniform weights to its end:
the baseline. From a checkpoint of it branches go on, with a strategy and with its control, the same
weights shuffled over the samples. The control's gap is the cost; what the strategy is ahead of the
control is its direction. Verdicts are t tests over the seeds, in pairs.

The same command goes on where it stopped. --minutes ends it in time. Each call leaves table.md,
results.json and the figures of what there is. --input is text in SlimPajama's layout; it is
prepared once, under --to/data. The plans are in scripts/when/plans.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cli import Parser, UserError, run
from files import write_text
from recipe import TrainConfig
from runtime import checkpoint
from scripts.probe_utility import Choice, judge
from scripts.when.data import shorten
from scripts.when.measure import calibrated_loss, probed
from scripts.when.plans import PLANS, REFERENCE, Plan, Regime, Setting
from scripts.when.results import OneSeed, Rows, evaluations, read_branch, write

ROOT = Path(__file__).resolve().parents[1]
REFERENCE_SEED = 1000  # added to a run's seed: its reference has seen hardly any of its windows

# name -> flags of prepare_slimpajama.py
DATA = {
    "bytes": ["--tokenizer", "bytes"],
    "gpt2": [],
    "sample": ["--source", "sample", "--tokenizer", "bytes"],
}


class Clock:
    """Says whether there is time for one more task, going by the longest one so far."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.longest = 0.0

    def has_time(self) -> bool:
        return time.monotonic() + self.longest < self.end

    def timed(self, task: Callable[[], None]) -> None:
        began = time.monotonic()
        task()
        self.longest = max(self.longest, time.monotonic() - began)


class Study:
    """A plan's folders, and how what is missing in them is made."""

    def __init__(self, plan: Plan, to: Path, sources: list[str], jobs: int, minutes: float):
        self.plan, self.to, self.sources, self.jobs = plan, to, sources, jobs
        self.clock = Clock(minutes)

    def run(self, seeds: Iterable[int]) -> bool:
        """All runs, seed by seed; whether there was time for all of them."""
        for regime in self.plan.regimes.values():
            self.data(regime)
        return all(self.run_seed(seed) for seed in seeds)

    def run_seed(self, seed: int) -> bool:
        """First the uniform runs, then what branches from them or refers to them."""
        uniform, branches = {}, {}  # rows may share them
        for setting in self.plan.settings:
            uniform[setting.regime, seed] = None
            if REFERENCE in setting.weights.values():
                uniform[setting.regime, seed + REFERENCE_SEED] = None
            for control in ("none", *setting.controls):
                task = (setting, control, seed)
                branches.setdefault(self.branch_folder(*task), task)
        measured = {}
        for setting in self.plan.settings:
            for task in self.measurements(setting, seed):
                measured[task] = None
        return (
            self.do_all(self.uniform, uniform)
            and self.do_all(self.branch, branches.values())
            and self.do_all(self.measure, measured)
        )

    def do_all(self, make: Callable, tasks: Iterable[tuple]) -> bool:
        """Call `make` with each task, `jobs` at a time; whether there was time for all."""

        def do(task: tuple) -> bool:
            if not self.clock.has_time():
                return False
            self.clock.timed(lambda: make(*task))
            return True

        with ThreadPoolExecutor(self.jobs) as pool:
            return all(list(pool.map(do, tasks)))

    # Data

    def data(self, regime: Regime) -> Path:
        """The data folder of a regime, which is made if it is missing."""
        folder = self.to / "data" / regime.data
        if not (folder / "manifest.json").exists():
            flags = DATA[regime.data]
            if "--source" not in flags:
                flags = [*flags, "--source", "files", "--input", *self.sources]
            self.command(["prepare_slimpajama.py", *flags, "--out", str(folder)], folder.name)
        if not regime.tokens_per_domain:
            return folder
        short = folder.with_name(f"{regime.data}_{regime.tokens_per_domain}")
        if not (short / "manifest.json").exists():
            shorten(folder, short, regime.tokens_per_domain)
        return short

    # Runs

    def folder(self, regime: str, weights: str, seed: int) -> Path:
        """The run folder of a regime with these weights."""
        name = f"{regime}, {weights}, seed {seed}"
        return self.to / "runs" / name.replace(", ", "_").replace(" ", "-").replace("'", "")

    def branch_folder(self, setting: Setting, control: str, seed: int) -> Path:
        """The run folder of a row's strategy (control "none") or control."""
        weights = {"control": control, "from": self.plan.start(setting), **setting.weights}
        words = [f"{key} {value}" for key, value in weights.items()]
        return self.folder(setting.regime, ", ".join(words), seed)

    def uniform(self, regime: str, seed: int) -> None:
        """The uniform run of a regime."""
        self.train(regime, self.folder(regime, "uniform", seed), seed, {})

    def branch(self, setting: Setting, control: str, seed: int) -> None:
        """A row's strategy or control, from a checkpoint of the uniform run on."""
        weights = setting.weights | {
            "reweight_control": control,
            "reweight_warmup_steps": self.plan.start(setting),
        }
        reference = self.folder(setting.regime, "uniform", seed + REFERENCE_SEED)
        if REFERENCE in weights.values():
            weights["reweight_ref"] = reference
        folder = self.branch_folder(setting, control, seed)
        if not checkpoint.steps(folder):
            uniform = self.folder(setting.regime, "uniform", seed)
            fork(uniform, self.plan.start(setting), folder, weights)
        self.train(setting.regime, folder, seed, weights)

    def train(self, regime: str, folder: Path, seed: int, flags: dict) -> None:
        """Train to the end, unless it was done before; all checkpoints stay."""
        flags = self.plan.flags | self.plan.regimes[regime].flags | flags
        flags["data_dir"] = self.data(self.plan.regimes[regime])
        flags["keep_every"] = flags["checkpoint_interval"]
        flags |= {"seed": seed, "out_dir": folder}
        if checkpoint.steps(folder)[-1:] == [flags["max_steps"]]:
            return
        words = [f"--{key}={value}" for key, value in flags.items()]
        self.command(["train.py", *self.plan.config, *words], folder.name)

    def command(self, words: list[str], name: str) -> None:
        """Run a command of this repository; UserError with its last line where it fails."""
        print(name, flush=True)
        env = dict(os.environ)
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{name}: {lines[-1].removeprefix('error: ')}")

    # Measurements on checkpoints, and results

    def reference(self, regime: str, seed: int) -> Path | None:
        """The run folder of a regime's reference; None where no row needs one."""
        for setting in self.plan.settings:
            if setting.regime == regime and REFERENCE in setting.weights.values():
                return self.folder(regime, "uniform", seed + REFERENCE_SEED)
        return None

    def end(self, setting: Setting) -> int:
        """The step whose validation loss counts."""
        flags = self.plan.flags | self.plan.regimes[setting.regime].flags
        return setting.read_at or flags["max_steps"]

    def calibrated_steps(self, setting: Setting) -> list[int]:
        """The checkpoints of a row at which temperatures are fitted: several for a curve."""
        interval = self.plan.flags["checkpoint_interval"]
        end = self.end(setting)
        first = self.plan.start(setting) + interval if len(setting.controls) > 1 else end
        return list(range(first, end + 1, interval))

    def measurements(self, setting: Setting, seed: int) -> list[tuple]:
        """The tasks of `measure` that a row needs."""
        uniform = self.folder(setting.regime, "uniform", seed)
        tasks = []
        for run_folder in (uniform, self.branch_folder(setting, "none", seed)):
            for step in self.calibrated_steps(setting):
                folder = checkpoint.checkpoint_folder(run_folder, step)
                tasks.append(("calibrate", folder, setting.regime, seed))
        if self.choice(setting):
            folder = checkpoint.checkpoint_folder(uniform, self.plan.start(setting))
            tasks.append(("probe", folder, setting.regime, seed))
        return tasks

    def measure(self, what: str, folder: Path, regime: str, seed: int) -> None:
        """Fit a checkpoint's temperature or probe it, unless it was done before."""
        if what == "probe":
            probed(folder, self.reference(regime, seed))
        else:
            self.calibrate(folder, regime)

    def calibrate(self, folder: Path, regime: str) -> float:
        """The validation loss of a checkpoint at a fitted temperature."""
        flags = self.plan.flags | self.plan.regimes[regime].flags
        return calibrated_loss(folder, flags["eval_windows"])

    def choice(self, setting: Setting) -> Choice | None:
        """A row's weights as the probe knows them; None where it cannot tell."""
        flags = self.plan.regimes[setting.regime].flags
        known = {"reweight", "r", "reweight_unit", "reweight_ref"}
        if flags.get("optimizer") == "muon" or not known.issuperset(setting.weights):
            return None
        weights = {"r": TrainConfig.r, "reweight_unit": TrainConfig.reweight_unit}
        weights |= setting.weights
        has_reference = "reweight_ref" in weights
        return Choice(weights["reweight"], weights["r"], weights["reweight_unit"], has_reference)

    def predicted(self, setting: Setting, seed: int) -> float | None:
        """The gain in direction that the probe at the branch forecasts for the end of a row.

        It is the change of the mean utility, as a share, of what the uniform run gains meanwhile.
        """
        choice = self.choice(setting)
        if choice is None:
            return None
        start = self.plan.start(setting)
        uniform = self.folder(setting.regime, "uniform", seed)
        folder = checkpoint.checkpoint_folder(uniform, start)
        folds = probed(folder, self.reference(setting.regime, seed))
        state = checkpoint.read_json(folder / "state.json")
        found = judge(folds, state["identity"]["global_batch_size"], choice)
        losses = evaluations(uniform)
        fall = losses[start]["mean_loss"] - losses[self.end(setting)]["mean_loss"]
        return found.gain * fall

    def is_done(self, setting: Setting, seed: int) -> bool:
        """Whether all that a row needs is there."""
        for control in ("none", *setting.controls):
            record = self.branch_folder(setting, control, seed) / "metrics.jsonl"
            if not record.exists() or self.end(setting) not in evaluations(record.parent):
                return False
        files = {"calibrate": "calibrated.json", "probe": "probe.npz"}
        tasks = self.measurements(setting, seed)
        return all((folder / files[what]).exists() for what, folder, _, _ in tasks)

    def read(self, setting: Setting, seed: int) -> OneSeed:
        """The numbers of a row."""
        uniform = self.folder(setting.regime, "uniform", seed)
        branches = {}
        for control in ("none", *setting.controls):
            folder = self.branch_folder(setting, control, seed)
            start, end = self.plan.start(setting), self.end(setting)
            branches[control] = read_branch(folder, uniform, start, end)
        strategy = branches.pop("none")
        for step in self.calibrated_steps(setting):
            losses = []
            for run_folder in (self.branch_folder(setting, "none", seed), uniform):
                folder = checkpoint.checkpoint_folder(run_folder, step)
                losses.append(self.calibrate(folder, setting.regime))
            strategy.calibrated[step] = losses[0] - losses[1]
        return OneSeed(strategy, branches, self.predicted(setting, seed))

    def rows(self, seeds: Iterable[int]) -> Rows:
        """All rows with the seeds that are there."""
        rows = []
        for setting in self.plan.settings:
            done = [seed for seed in seeds if self.is_done(setting, seed)]
            rows.append((setting, {seed: self.read(setting, seed) for seed in done}))
        return rows


def fork(uniform: Path, step: int, to: Path, weights: dict) -> None:
    """Make a run folder that goes on from a checkpoint of a uniform run with other weights.

    weights: flags of train.py.
    """
    source = checkpoint.checkpoint_folder(uniform, step)
    folder = checkpoint.checkpoint_folder(to, step)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    state = checkpoint.read_json(temporary / "state.json")
    identity = state["identity"]
    identity |= {key: value for key, value in weights.items() if key in identity}
    if "reweight_ref" in weights:
        newest = checkpoint.find_latest(weights["reweight_ref"])
        of_reference = checkpoint.read_json(newest / "state.json")
        identity["reference"] = checkpoint.model_sha256(of_reference)
    write_text(temporary / "state.json", json.dumps(state, indent=1))
    os.replace(temporary, folder)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="text in SlimPajama's layout"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument(
        "--plan", choices=PLANS, default="cpu", help="what is run (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="from 42 on (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start nothing that may take longer"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time, one core each (default: 2; 1 on a GPU)"
    )
    args = parser.parse_args()
    plan = PLANS[args.plan]()
    jobs = args.jobs or (1 if args.plan == "h100" else 2)
    if args.seeds < 1 or jobs < 1 or args.minutes <= 0:
        raise UserError(
            f"--seeds {args.seeds} --jobs {jobs} --minutes {args.minutes}: must be above 0"
        )
    sources = [str(Path(path).resolve()) for path in args.input]
    to = args.to.resolve()
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; give a folder that can be made") from None
    if jobs > 1:
        torch.set_num_threads(1)
    study = Study(plan, to, sources, jobs, args.minutes)
    seeds = range(42, 42 + args.seeds)
    finished = study.run(seeds)
    rows = study.rows(seeds)
    for path in write(rows, study.to):
        print(path)
    if not finished:
        print("out of time; the same command goes on")


if __name__ == "__main__":
    run(main)
