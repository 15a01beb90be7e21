"""The study and the shell scripts: what they compute, on numbers worked by hand; that they run."""

import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command, expect_error, expect_ok

from cli import parse
from model import SIZES
from recipe import TrainConfig, settle
from reweight import STRATEGIES
from scripts.study_regime import BASE, VARIED, figure, final_loss, table, weights_of


def records(point, loss, gain):
    """Two reweighted log lines, one of the uniform steps before, and a last evaluation."""
    weight = {"arxiv": 0.5 + gain, "c4": 0.5 - gain}
    line = {
        "kind": "train",
        "weight_by_domain": weight,
        "samples_by_domain": {"arxiv": 0.5, "c4": 0.5},
    }
    before = {
        "ess": 1.0,
        "entropy": math.log(point.G),
        "weight_by_domain": {"arxiv": 0.9, "c4": 0.1},
    }
    return [
        {**line, "step": 1, **before},
        {**line, "step": 2, "ess": 0.6, "entropy": math.log(point.G) - 0.4},
        {**line, "step": 3, "ess": 0.8, "entropy": math.log(point.G) - 0.2},
        {"kind": "eval", "step": 0, "mean_loss": 5.0},
        {"kind": "eval", "step": 3, "mean_loss": loss},
    ]


def test_the_weights_distance_from_uniform_is_split_by_the_chain_rule():
    w = weights_of(BASE, records(BASE, 2.0, 0.25))
    assert w["ess"] == pytest.approx(0.7) and w["kl"] == pytest.approx(0.3)
    assert w["between"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert weights_of(BASE, records(BASE, 2.0, 0.0))["between"] == pytest.approx(0)


def test_table_and_figure_of_the_study(tmp_path):
    points = {p for row in VARIED.values() for q in row for p in (q, q.uniform())}
    results = {p: records(p, 2.0 + 0.25 * (p.reweight != "uniform"), 0.1) for p in points}
    assert final_loss(results[BASE]) == 2.25
    lines = table(results).splitlines()
    assert len(lines) == 2 + sum(map(len, VARIED.values()))
    assert "| 2.0000 | 2.2500 | +0.2500 | 0.70 | 0.300 |" in lines[2]
    figure(results, tmp_path / "regime.png")
    assert (tmp_path / "regime.png").read_bytes()[:4] == b"\x89PNG"


def test_the_study_refuses_what_it_cannot_use(tmp_path):
    expect_error(command("scripts/study_regime.py", "--data_dir", tmp_path / "none"), "not found")
    expect_error(
        command("scripts/study_regime.py", "--data_dir", tmp_path, "--steps=3"), "--steps 3"
    )


def test_slurm_script_says_what_it_would_submit():
    done = subprocess.run(
        ["bash", "scripts/slurm/prepare.sbatch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "DRY_RUN": "1", "INPUT": "/in", "OUT": "/out", "PARTS": "3"},
    )
    assert (
        done.returncode == 0
        and "--array 1-3" in done.stdout
        and "--merge --out '/out'" in done.stdout
    )


# name -> runs in its header
REPRODUCE = {"slimpajama": 36, "c4cc": 6, "mixtures": 12, "r_sweep": 7, "figures": 4}


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
    for word in (f"({REPRODUCE[name]})", "Hardware:", "Tokens:", "Time:"):
        assert word in header
    lines = expect_ok(reproduce(name, DRY_RUN="1", GPUS="4")).splitlines()
    trained = [line for line in lines if " train.py " in line]
    assert len(trained) == len(set(trained)) == REPRODUCE[name]
    assert all(
        line.startswith("torchrun --standalone --nproc_per_node 4 -- train.py config/gpt2_")
        for line in trained
    )
    folders = [line.split("--out_dir ")[1].split()[0] for line in trained]
    assert len(set(folders)) == len(folders)
    for what in ("eval/perplexity.py", "eval/fewshot.py"):
        assert [line.split("--run ")[1].split()[0] for line in lines if what in line] == folders
    (table,) = [line.split() for line in lines if "eval/tables.py" in line]
    assert table[2:] == [*folders, "--out", f"results/{name}"]
    small = expect_ok(reproduce(name, DRY_RUN="1", SMOKE="1"))
    assert 2 <= small.count("config/tiny_cpu.py") <= 8 and "data/slimpajama" not in small
    array, after = expect_ok(reproduce(name, DRY_RUN="1", SLURM="1")).splitlines()
    assert f"--array 0-{REPRODUCE[name] - 1} " in array and f"scripts/reproduce_{name}.sh" in array
    assert "--dependency afterok:JOB" in after


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
        ({"SMOKE": "1", "STEPS": "5"}, ["STEPS=5", "12"]),
        ({"SMOKE": "1", "STEPS": "many"}, ["STEPS=many"]),
        ({"DATA": "nowhere", "GPUS": "1"}, ["nowhere", "prepare_slimpajama.py"]),
    ],
)
def test_wrong_settings_of_a_reproduction_are_told_in_one_line(settings, words):
    expect_error(reproduce("slimpajama", **settings), *words)


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_short_smoke_run_fills_its_tables(tmp_path):
    """In a copy with less text, and with smaller batches and evaluations."""
    outside = shutil.ignore_patterns(".*", "data", "runs", "results", "wandb", "__pycache__")
    root = shutil.copytree(ROOT, tmp_path / "clone", ignore=outside)
    count = "documents_per_domain: int = "
    replace_in(root / "corpus" / "sample.py", f"{count}600", f"{count}60")
    small = "eval_windows = 4\nglobal_batch_size = 8"
    replace_in(root / "config" / "tiny_cpu.py", "eval_windows = 64", small)
    expect_ok(reproduce("c4cc", root, SMOKE="1", STEPS="12", TASKS="none", STRATEGIES="linupper"))
    made = root / "results" / "smoke" / "c4cc"
    names = {path.name for path in made.iterdir()}
    assert names >= {"table.md", "table.tex", "table.csv", "report.html"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made.glob("*.png"))
    text = (made / "table.md").read_text()
    assert "missing" not in text and "### Perplexity, tiny" in text and "| wikipedia" in text


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
