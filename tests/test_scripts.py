"""The shell scripts: what they would run, and that they run."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, expect_error, expect_ok

from cli import parse
from corpus import tokenizer
from eval import models
from families import SIZES
from model import GPT, GPTConfig
from recipe import TrainConfig, settle
from reweight import STRATEGIES
from runtime import checkpoint

# name -> runs in its header
REPRODUCE = {"slimpajama": 36, "c4cc": 18, "mixtures": 36, "r_sweep": 21, "figures": 12, "llama": 8}


def reproduce(name, root=ROOT, **settings):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", f"scripts/reproduce_{name}.sh"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **settings},
    )


@pytest.mark.parametrize("name", REPRODUCE)
def test_what_a_reproduction_would_do(name):
    assert {
        path.stem.split("_", 1)[1] for path in (ROOT / "scripts").glob("reproduce_*.sh")
    } == set(REPRODUCE)
    header = (ROOT / "scripts" / f"reproduce_{name}.sh").read_text()
    for word in (f"({REPRODUCE[name]})", "Hardware:", "Tokens:", "Time:", "Disk:"):
        assert word in header
    lines = expect_ok(reproduce(name, DRY_RUN="1", GPUS="4")).splitlines()
    trained = [line for line in lines if " train.py " in line]
    assert len(trained) == len(set(trained)) == REPRODUCE[name]
    family = "llama_" if name == "llama" else "gpt2_"
    start = f"torchrun --standalone --nproc_per_node 4 -- train.py config/{family}"
    assert all(line.startswith(start) for line in trained)
    folders = [line.split("--out_dir ")[1].split()[0] for line in trained]
    assert len(set(folders)) == len(folders)
    for what in ("eval/perplexity.py", "eval/fewshot.py"):
        assert [line.split("--run ")[1].split()[0] for line in lines if what in line] == folders
    (table,) = [line.split() for line in lines if "eval/tables.py" in line]
    assert table[2:] == [*folders, "--out", f"results/{name}"]
    small = expect_ok(reproduce(name, DRY_RUN="1", SMOKE="1"))
    assert 2 <= small.count("config/tiny_cpu.py") <= 8 and "data/slimpajama" not in small
    assert "data/fineweb" not in small
    array, after = expect_ok(reproduce(name, DRY_RUN="1", SLURM="1")).splitlines()
    assert f"--array 0-{REPRODUCE[name] - 1} " in array and f"scripts/reproduce_{name}.sh" in array
    assert "--gpus-per-node 1 " in array and "--cpus-per-task 4 " in array
    assert "--dependency afterany:JOB" in after and "--cpus-per-task 4 " in after
    assert "--gpus" not in after and "GPUS=1" in after  # no torchrun over GPUs that it lacks


def trained(name, **settings):
    """Folder of each run that a reproduction would train -> its TrainConfig."""
    runs = {}
    for line in expect_ok(reproduce(name, DRY_RUN="1", GPUS="0", **settings)).splitlines():
        if " train.py " in line:
            flags = shlex.split(line.split(" train.py ")[1])
            config = parse(TrainConfig, "", flags)
            runs[config.out_dir] = config
    return runs


def test_a_reproduction_trains_with_the_published_settings():
    runs = trained("slimpajama", SEEDS="42")
    assert len(runs) == 12
    for folder, config in runs.items():
        size, strategy, seed = folder.removeprefix("runs/").split("_")
        assert (config.reweight, f"seed{config.seed}") == (strategy, seed)
        assert config.model == ("auto" if size == "124m" else size)  # 124m is the default
        assert config.global_batch_size == (32 if size == "124m" else 48)
        assert config.r == (1.0 if (size, strategy) == ("124m", "quadratic") else 0.4)
        recipe = {"model": config.model, "reweight": strategy, "r": config.r, "seed": config.seed}
        recipe |= {"global_batch_size": config.global_batch_size, "out_dir": folder}
        assert config == TrainConfig(**recipe)  # all else is the default
    sweep = trained("r_sweep", SEEDS="42", STRATEGIES="linupper quadratic", R="0.2 3")
    assert {folder: config.r for folder, config in sweep.items() if "_r" in folder} == {
        f"runs/124m_r{r}_{strategy}_seed42": float(r)
        for r in ("0.2", "3")
        for strategy in ("linupper", "quadratic")
    }
    small = trained("slimpajama", SEEDS="42", SMOKE="1", STRATEGIES="quadratic")
    (config,) = small.values()
    assert (config.model, config.max_steps, config.r) == ("tiny", 120, 1.0)


def test_runs_that_scripts_share_are_the_same():
    table = trained("slimpajama")
    for name in ("figures", "r_sweep"):
        runs = trained(name)
        common = table.keys() & runs.keys()
        assert len(common) == (12 if name == "figures" else 6)
        assert all(runs[folder] == table[folder] for folder in common)
    assert {config.r for config in trained("r_sweep", SEEDS="42").values()} > {0.1, 0.4, 3.2}


def test_presets_are_the_recipe_of_their_size():
    for path in (ROOT / "config").glob("gpt2_*.py"):
        size = path.stem.split("_")[1]
        config = settle(parse(TrainConfig, "", [str(path), "--device=cpu"]), 1)
        assert config.model == size and size in SIZES
        assert f"x {config.global_batch_size} sequences x {config.block_size}" in path.read_text()
        assert config.reweight == ("linupper" if path.stem.endswith("linupper") else "uniform")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"SMOKE": "yes"}, ["SMOKE=yes", "1"]),
        ({"DRY_RUN": "0"}, ["DRY_RUN=0"]),
        ({"SLURM": "true"}, ["SLURM=true"]),
        ({"GPUS": "two"}, ["GPUS=two", "number"]),
        ({"SIZES": "125m"}, ["125m", "gpt2_124m.py"]),
        ({"STRATEGIES": "upward"}, ["STRATEGIES", "upward", *STRATEGIES]),
        ({"STRATEGIES": "quantile"}, ["quantile"]),
        ({"SEEDS": "a"}, ["SEEDS=a", "42"]),
        ({"PARALLEL": "2"}, ["PARALLEL=2", "runs"]),
        ({"SIZE": "124m"}, ["SIZE=124m", "SIZES", "unset SIZE"]),
        ({"STRATEGY": "uniform"}, ["STRATEGIES"]),
        ({"SMOKE": "1", "TASKS": "where last_word"}, ["last_word", "'last_words'"]),
        ({"PUBLISHED": "yes"}, ["PUBLISHED=yes", "1"]),
        ({"KEEP_OPTIMIZER": "0"}, ["KEEP_OPTIMIZER=0", "not set"]),
        ({"SMOKE": "1", "SLURM": "1", "PATH": "/usr/bin:/bin"}, ["SLURM=1", "no sbatch here"]),
        ({"SMOKE": "1", "STEPS": "5"}, ["STEPS=5", "12"]),
        ({"SMOKE": "1", "STEPS": "many"}, ["STEPS=many"]),
        ({"DATA": "nowhere", "GPUS": "1"}, ["nowhere", "prepare_slimpajama.py"]),
    ],
)
def test_wrong_settings_of_a_reproduction_are_told_in_one_line(settings, words):
    expect_error(reproduce("slimpajama", **settings), *words)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("r_sweep", {"R": "0.4 high"}, ["R=0.4 high", "numbers"]),
        ("r_sweep", {"R": "0.0"}, ["R=0.0"]),
        ("mixtures", {"MIXTURES": "doge dorem"}, ["dorem", "doremi", "c4cc", "cc=0.5"]),
    ],
)
def test_wrong_values_of_one_reproduction(name, settings, words):
    expect_error(reproduce(name, DRY_RUN="1", **settings), *words)


def test_a_reproduction_takes_no_arguments():
    process = ["bash", "scripts/reproduce_c4cc.sh", "TASKS=none"]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
    expect_error(done, "TASKS=none", "before the command")


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def small_clone(to: Path) -> Path:
    """A copy of the repository with less text, and with smaller batches and evaluations."""
    outside = shutil.ignore_patterns(".*", "data", "runs", "results", "wandb", "__pycache__")
    shutil.copytree(ROOT, to, ignore=outside)
    count = "documents_per_domain: int = "
    replace_in(to / "corpus" / "sample.py", f"{count}600", f"{count}60")
    small = "eval_windows = 4\nglobal_batch_size = 8"
    replace_in(to / "config" / "tiny_cpu.py", "eval_windows = 64", small)
    return to


def test_a_short_smoke_run_fills_its_tables(tmp_path):
    root = small_clone(tmp_path / "clone")
    expect_ok(reproduce("c4cc", root, SMOKE="1", STEPS="12", TASKS="none", STRATEGIES="linupper"))
    made = root / "results" / "smoke" / "c4cc"
    names = {path.name for path in made.iterdir()}
    assert names >= {"table.md", "table.tex", "table.csv", "report.html"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made.glob("*.png"))
    text = (made / "table.md").read_text()
    assert "missing" not in text and "### Perplexity, tiny" in text and "| wikipedia" in text
    (optimizer,) = (root / "runs").glob("smoke/*/checkpoints/*/optimizer.pt")
    assert optimizer.read_bytes() == b""  # the scripts read what train.py and perplexity.py write


def test_training_starts_without_what_only_some_runs_need():
    heavy = (
        "datasets",
        "lm_eval",
        "matplotlib",
        "pyarrow",
        "torch._dynamo",
        "transformers",
        "wandb",
    )
    code = f"import sys, train; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert expect_ok(done).strip() == "[]"


# Stand-ins for python, torchrun and sbatch: they note how they were called, and leave what the real
# commands would leave, in a folder that has only what the scripts themselves read.

STAND_IN = """#!{python} -SE
import json, os, signal, sys, time
from pathlib import Path

args = sys.argv[1:]
if Path(sys.argv[0]).name == "torchrun":
    args = args[args.index("--") + 1 :]
if args[0] == "-c":  # environment.sh asks for the packages
    sys.exit()
what = Path(args[0]).stem


def flag(name, default=None):
    return args[args.index(name) + 1] if name in args else default


def note(event):
    call = [event, what, os.environ.get("CUDA_VISIBLE_DEVICES"), sys.argv]
    with open("calls", "a") as file:
        file.write(json.dumps(call) + "\\n")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def save(run, step, of):
    folder = run / "checkpoints" / f"step_{{step:08d}}"
    state = {{"step": step, "gpt": {{}}, "max_steps": of, "evaluated": step == of}}
    hashes = {{"model.pt": run.name, "optimizer.pt": "o"}}
    write(folder / "state.json", {{**state, "sha256": hashes}})
    (folder / "model.pt").write_text("weights")
    (folder / "optimizer.pt").write_text("moments")


def train(run, fault):
    of = int(flag("--max_steps", 20))
    if (run / "checkpoints" / f"step_{{of:08d}}").exists():
        print(f"{{run}} is finished: step {{of}} of {{of}}; nothing to do")
        return
    if fault == "fail":
        sys.exit(1)
    write(run / "config.json", {{}})
    if fault.startswith("killed"):
        if fault == "killed with its task":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        def end(*_):
            save(run, 2, of)
            note("stopped")
            sys.exit()

        signal.signal(signal.SIGTERM, end)
        Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
    time.sleep(float(os.environ.get("SECONDS_OF_A_STEP", 0)))
    save(run, of // 2, of)
    save(run, of, of)
    note("trained")


def evaluate(run, fault):
    if fault == "fail":
        sys.exit(2)
    step = max((run / "checkpoints").iterdir()).name
    result = {{"step": int(step[5:]), "model_sha256": run.name, "tasks": {{}}, "failed": {{}}}}
    if what == "fewshot":
        for task in flag("--tasks", os.environ["TASKS_OF_THE_TEST"]).split(","):
            if fault == "no internet":
                result["failed"][task] = "its data is not in the cache"
            else:
                result["tasks"][task] = {{"score": 0.5}}
    write(run / "eval" / f"{{what}}.json", result)
    if result["failed"]:
        sys.exit(2)


note("called")
run = Path(flag("--out_dir") or flag("--run") or "none")
faults = json.loads(Path("faults.json").read_text())
fault = faults.get(what, faults.get(run.name if what == "train" else f"{{run.name}} {{what}}", ""))
print("this is", what)
if what == "train":
    train(run, fault)
elif what in ("perplexity", "fewshot"):
    evaluate(run, fault)
note("ended")
"""

# Runs all tasks of a job in turn before it returns. As sbatch does, it takes --export apart at its
# commas, and hands out the number of the job with its cluster.
SBATCH = """#!{python} -SE
import json, os, subprocess, sys
from pathlib import Path

options, rest, args = {{}}, [], sys.argv[1:]
while args:
    arg = args.pop(0)
    if arg == "--parsable" or arg == "--requeue":
        continue
    if arg.startswith("--"):
        options[arg] = args.pop(0)
    else:
        rest = [arg, *args]
        break
env = {{**os.environ}}
for part in options.get("--export", "ALL").split(","):
    if "=" in part:
        env.update([part.split("=", 1)])
first, _, last = options.get("--array", "0").partition("-")
codes = []
for task in range(int(first), int(last or first) + 1):
    if "--array" in options:
        env["SLURM_ARRAY_TASK_ID"] = str(task)
    process = ["sh", "-c", options["--wrap"]] if "--wrap" in options else ["bash", *rest]
    with open("slurm.out", "a") as file:
        codes.append(subprocess.run(process, env=env, stdout=file, stderr=file).returncode)
with open("jobs", "a") as file:
    file.write(json.dumps([options, codes]) + "\\n")
print("17;cluster")
"""
ALL_TASKS = "logiqa,sciq"  # instead of the default tasks


@pytest.fixture
def stage(tmp_path):
    """The scripts with stand-ins for the commands that they run."""
    for name in ("scripts", "config"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ("reweight.py", "eval/fewshot.py", *ROOT.glob("requirements*.txt")):
        to = (
            tmp_path / Path(path).relative_to(ROOT) if Path(path).is_absolute() else tmp_path / path
        )
        to.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, to)
    known = "\n".join(f'    "{name}",' for name in ALL_TASKS.split(","))
    (tmp_path / "eval" / "fewshot.py").write_text(f"TASKS = (\n{known}\n)\n")
    (tmp_path / "bin").mkdir()
    for names, text in ((("python", "torchrun"), STAND_IN), (("sbatch",), SBATCH)):
        for name in names:
            path = tmp_path / "bin" / name
            path.write_text(text.format(python=sys.executable))
            path.chmod(0o755)
    (tmp_path / "data" / "slimpajama").mkdir(parents=True)
    (tmp_path / "data" / "slimpajama" / "manifest.json").write_text('{"revision": "abc"}')
    return tmp_path


def start(stage, script, faults=None, **settings):
    """A script on the stage, as a process in a group of its own."""
    (stage / "faults.json").write_text(json.dumps(faults or {}))
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    env |= {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    env |= {"TASKS_OF_THE_TEST": ALL_TASKS, **settings}
    return subprocess.Popen(
        ["bash", f"scripts/{script}"],
        cwd=stage,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's & makes commands ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def act(stage, script, faults=None, **settings):
    """The same to its end, where it must come by itself."""
    process = start(stage, script, faults, **settings)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def calls(stage, event, what):
    """(run's name, GPU, arguments) of each call of a command that got to an event."""
    found = []
    for line in (stage / "calls").read_text().splitlines():
        its_event, its_what, gpu, args = json.loads(line)
        if (its_event, its_what) == (event, what):
            folders = [
                b for a, b in zip(args, args[1:], strict=False) if a in ("--out_dir", "--run")
            ]
            found.append((Path(folders[0]).name if folders else "", gpu, args))
    return found


FOUR = {"SIZES": "124m", "SEEDS": "1 2", "STRATEGIES": "uniform linupper"}
RUNS_OF_FOUR = [f"124m_c4cc_{s}_seed{k}" for s in ("uniform", "linupper") for k in (1, 2)]


@pytest.mark.parametrize("mode", ["one after another", "PARALLEL", "SLURM"])
def test_a_week_with_faults(stage, mode):
    """One run killed, one failing, one not evaluated, no internet: the rest is done and shown.

    A second start makes up for what is missing, and trains nothing twice.
    """
    settings = {"GPUS": "2", **FOUR}
    if mode == "PARALLEL":
        settings["PARALLEL"] = "runs"
    if mode == "SLURM":
        settings["SLURM"] = "1"
    one, killed, failing, unevaluated = RUNS_OF_FOUR
    faults = {
        killed: "killed with its task" if mode == "SLURM" else "killed",
        failing: "fail",
        f"{unevaluated} perplexity": "fail",
        "fewshot": "no internet",
    }
    for faults_of_start, code in ((faults, 1), ({}, 0)):
        done = act(stage, "reproduce_c4cc.sh", faults_of_start, **settings)
        told = done.stdout + done.stderr
        if mode == "SLURM":
            assert done.returncode == 0
            told = (stage / "slurm.out").read_text()
            (array, codes), (_, of_tables) = (
                json.loads(line) for line in (stage / "jobs").read_text().splitlines()[-2:]
            )
            assert of_tables == [code] and any(codes) == bool(code)
            assert array["--array"] == "0-3" and "--gpus-per-node" in array
        else:
            assert done.returncode == code, told
        *_, (_, _, table) = calls(stage, "ended", "tables")
        begun = RUNS_OF_FOUR if code == 0 else [one, killed, unevaluated]
        assert [Path(arg).name for arg in table[2:-2]] == begun
        assert calls(stage, "ended", "plots") and calls(stage, "ended", "report")
        if code:
            lines = told.split("== missing\n")[1].splitlines()
            assert f"runs/{one}: no few-shot score for logiqa sciq" in lines[0]
            assert f"runs/{killed}: not trained to the end (no checkpoint)" in lines[1]
            assert f"runs/{failing}: not trained to the end (no checkpoint)" in lines[2]
            assert f"runs/{unevaluated}: no perplexity" in lines[3]
            assert "scripts/fetch_tasks.py" in lines[4] and "TASKS=none" in lines[4]
            assert lines[5].startswith("4 of 4 runs are not complete")
            if mode == "PARALLEL":
                assert lines[0].endswith(f"see runs/{one}/output.log")
    assert sorted(run for run, *_ in calls(stage, "trained", "train")) == sorted(RUNS_OF_FOUR)


def test_a_third_start_evaluates_nothing_again(stage):
    for _ in range(2):
        said = expect_ok(act(stage, "reproduce_c4cc.sh", **FOUR))
    for what in ("perplexity", "fewshot"):
        assert [run for run, *_ in calls(stage, "ended", what)] == RUNS_OF_FOUR
    assert said.count("is finished: step 20 of 20; nothing to do") == 4


def test_more_tasks_later_are_scored(stage):
    for tasks, n in (("none", 0), ("sciq", 4), ("", 8), ("", 8)):
        expect_ok(act(stage, "reproduce_c4cc.sh", TASKS=tasks, **FOUR))
        assert len((stage / "calls").read_text().split('"called", "fewshot"')) - 1 == n


@pytest.mark.parametrize("script", ["reproduce_c4cc.sh", "quickstart.sh"])
@pytest.mark.parametrize(
    "number, whom, code",
    [
        (signal.SIGINT, "terminal", 130),
        (signal.SIGTERM, "script", 143),
        (signal.SIGHUP, "script", 129),
        (signal.SIGTERM, "train.py", 143),
    ],
)
def test_a_signal_stops_a_script(stage, script, number, whom, code):
    """train.py saves and ends with exit code 0; nothing else is begun."""
    faults = {RUNS_OF_FOUR[0]: "hang", "uniform": "hang"}
    process = start(stage, script, faults, **FOUR, GPUS="1", STEPS="20")
    while not (stage / "pid").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if whom == "terminal":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if whom == "script" else int((stage / "pid").read_text()), number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    (line,) = [line for line in err.splitlines() if line.startswith("stopped")]
    assert line.endswith("the same command goes on where it was")
    if whom == "train.py":
        assert "is at step 2 of 20" in line
    assert len(calls(stage, "called", "train")) == len(calls(stage, "stopped", "train")) == 1
    for what in ("perplexity", "fewshot", "tables"):
        assert not calls(stage, "called", what)


def test_ctrl_c_stops_the_runs_of_all_gpus(stage):
    faults = dict.fromkeys(RUNS_OF_FOUR, "hang")
    process = start(stage, "reproduce_c4cc.sh", faults, **FOUR, GPUS="2", PARALLEL="runs")
    while not (stage / "calls").exists() or len(calls(stage, "called", "train")) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.splitlines()[-1].startswith("stopped by SIGINT")
    assert len(calls(stage, "called", "train")) == len(calls(stage, "stopped", "train")) == 2


@pytest.mark.parametrize("visible, gpus", [(None, ("0", "1")), ("5,7", ("5", "7"))])
def test_one_run_per_gpu_at_a_time(stage, visible, gpus):
    settings = {"PARALLEL": "runs", "SECONDS_OF_A_STEP": "0.3", **FOUR}
    settings |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {"GPUS": "2"}
    done = act(stage, "reproduce_c4cc.sh", **settings)
    assert done.returncode == 0, done.stderr
    running = {}  # GPU -> what runs there
    for line in (stage / "calls").read_text().splitlines():
        event, what, gpu, args = json.loads(line)
        if what in ("train", "perplexity", "fewshot"):
            assert Path(args[0]).name == "python"  # not torchrun
            if event == "called":
                assert running.setdefault(gpu, args) is args
            elif event == "ended":
                del running[gpu]
    used = [gpu for _, gpu, _ in calls(stage, "trained", "train")]
    assert set(used) == set(gpus) and len(used) == 4
    for run in RUNS_OF_FOUR:
        said = (stage / "runs" / run / "output.log").read_text()
        assert "this is train" in said and "this is fewshot" in said
        assert "this is train" not in done.stdout


def test_the_environment_is_made_once_before_the_array(stage):
    (stage / ".venv" / "bin").mkdir(parents=True)
    (stage / ".venv" / "bin" / "activate").touch()
    settings = {**FOUR, "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "SLURM": "1", "GPUS": "1"}
    assert "== installing" in expect_ok(act(stage, "reproduce_c4cc.sh", **settings))
    assert "== installing" not in (stage / "slurm.out").read_text()
    order = [json.loads(line)[1] for line in (stage / "calls").read_text().splitlines()]
    assert order[0] == "-m" and "-m" not in order[2:] and "train" in order  # python -m pip


def test_the_paths_of_the_preparation_survive_slurm(stage):
    """A comma in one, a quotation mark in the other."""
    paths = {"INPUT": "/in, two", "OUT": """/it's "out" $HOME"""}
    expect_ok(act(stage, "slurm/prepare.sbatch", PARTS="2", **paths))
    *parts, merge = [args for *_, args in calls(stage, "ended", "prepare_slimpajama")]
    for number, args in enumerate(parts, 1):
        assert args[args.index("--input") + 1] == paths["INPUT"]
        assert args[args.index("--out") + 1] == paths["OUT"]
        assert args[args.index("--part") + 1] == f"{number}/2"
    assert len(parts) == 2 and merge[1:] == [
        "prepare_slimpajama.py",
        "--merge",
        "--out",
        paths["OUT"],
    ]
    said = expect_ok(act(stage, "slurm/prepare.sbatch", PARTS="2", DRY_RUN="1", **paths))
    assert "--array 1-2" in said and "afterok:JOB" in said
    assert shlex.split(said)[:2] == [f"{name}={path}" for name, path in paths.items()]


def test_the_revision_of_the_data_is_checked(stage):
    expect_ok(act(stage, "reproduce_c4cc.sh", REVISION="abc", **FOUR))
    done = act(stage, "reproduce_c4cc.sh", REVISION="abd", **FOUR)
    expect_error(done, "REVISION=abd", "data/slimpajama", "--revision abd")


def test_the_optimizer_of_a_finished_run_is_dropped(stage):
    expect_ok(act(stage, "reproduce_c4cc.sh", **FOUR, KEEP_OPTIMIZER="1"))
    files = sorted((stage / "runs").glob("*/checkpoints/*/optimizer.pt"))
    assert [path.read_text() for path in files] == ["moments"] * 8
    unfinished = {RUNS_OF_FOUR[0]: "hang"}
    shutil.rmtree(stage / "runs" / RUNS_OF_FOUR[0])
    process = start(stage, "reproduce_c4cc.sh", unfinished, **FOUR)
    while not (stage / "pid").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)
    first = stage / "runs" / RUNS_OF_FOUR[0] / "checkpoints" / "step_00000002"
    assert (first / "optimizer.pt").read_text() == "moments"  # it is needed to go on
    expect_ok(act(stage, "reproduce_c4cc.sh", **FOUR))
    files = sorted((stage / "runs").glob("*/checkpoints/*/optimizer.pt"))
    assert [path.read_text() for path in files] == [""] * 4  # of the last step alone


def test_a_checkpoint_without_optimizer_opens(tmp_path):
    """It is the newest intact one of its run, which is still finished; its model is evaluated."""
    run, tokens = tmp_path / "run", tokenizer.load("bytes")
    shape = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=320)
    state = {"gpt": asdict(shape), "max_steps": 4, "identity": {"dtype": "float32"}}
    state |= {"data_dir": "gone", "tokenizer_sha256": tokens.sha256, "evaluated": True}
    model = GPT(shape)
    for step in (2, 4):
        checkpoint.save(run, step, (model.state_dict(), {"a": model.wte.weight}), state, 2)
    code = "run=$1; shift; source scripts/reproduce.sh && "
    code += 'is_finished "$run" && drop_optimizer "$run" && progress "$run"'
    process = ["bash", "-c", code, "reproduce_slimpajama.sh", run]
    for _ in range(2):  # twice is once
        done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
        assert expect_ok(done) == "step 4 of 4\n"
    newest = run / "checkpoints" / "step_00000004"
    assert checkpoint.steps(run) == [4] and checkpoint.newest_intact(run) == newest
    assert sorted(path.name for path in newest.iterdir()) == [
        "model.pt",
        "optimizer.pt",
        "state.json",
    ]
    found = checkpoint.find_resumable(run, state["identity"], "auto", 4)
    assert checkpoint.already_finished(found, TrainConfig(out_dir=str(run), max_steps=4))
    evaluated = models.open_model(Namespace(run=run, hf=None, dtype=None))
    assert evaluated.model.wte.weight.equal(model.wte.weight)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["one after another", "SLURM"])
def test_a_week_with_faults_and_real_runs(tmp_path, stage, mode):
    """The same as test_a_week_with_faults with the code itself, in the smoke test's size."""
    root = small_clone(tmp_path / "clone")
    shutil.rmtree(stage / "bin")
    (stage / "bin").mkdir()
    sbatch = stage / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(python=sys.executable))
    sbatch.chmod(0o755)
    settings = {"SMOKE": "1", "STEPS": "12", "SEEDS": "1 2", "TASKS": "where,gone", "GPUS": "1"}
    settings |= {"PATH": f"{stage / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if mode == "SLURM":
        settings["SLURM"] = "1"
    gone = "include: where.yaml\ntask: gone\n"
    data = "dataset_kwargs: {data_files: {train: gone.jsonl, test: gone.jsonl}}\n"
    (root / "tests" / "tasks" / "gone.yaml").write_text(gone + data)
    killed, failing = (root / "runs" / "smoke" / f"tiny_c4cc_linupper_seed{k}" for k in (1, 2))
    failing.parent.mkdir(parents=True)
    failing.write_text("a file where the run's folder should be")
    train = (root / "train.py").read_text()
    kill = "import os, sys\n" + 'if "linupper" in sys.argv and "1" in sys.argv: os.kill('
    who = "os.getppid()" if mode == "SLURM" else "os.getpid()"
    for code in (1, 0):
        if code:
            (root / "train.py").write_text(f"{kill}{who}, 9)\n{train}")
        else:
            (root / "train.py").write_text(train)
            failing.unlink()
            (root / "tests" / "tasks" / "gone.yaml").write_text(gone)
        done = reproduce("c4cc", root, **settings)
        if mode == "SLURM":
            expect_ok(done)
            _, codes = json.loads((root / "jobs").read_text().splitlines()[-1])
            assert codes == [code], (root / "slurm.out").read_text()
        else:
            assert done.returncode == code, done.stdout + done.stderr
        table = (root / "results" / "smoke" / "c4cc" / "table.md").read_text()
        assert "### Perplexity, tiny" in table and "| gone" in table
        assert ("Missing: gone: its data is not in the cache" in table) == (code == 1)
        assert ("linupper" in table.split("### Perplexity")[1].split("\n")[2]) == (code == 0)
    for path in (root / "runs" / "smoke").glob("*/checkpoints/*/optimizer.pt"):
        assert path.read_bytes() == b""
    assert killed.is_dir() and len(list((root / "runs" / "smoke").iterdir())) == 4
