"""scripts/study_when.py: branches go on exactly; numbers, verdicts and figures of made-up rows."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import command, expect_error, expect_ok

from corpus.manifest import data_hash, read_manifest
from data import Split
from runtime import checkpoint
from scripts.probe_utility import Choice, judge
from scripts.study_when import REFERENCE_SEED, Clock, Study
from scripts.when import measure, results
from scripts.when.data import shorten
from scripts.when.plans import BOTH, EXCESS, LINUPPER, MILD, PLANS, Plan, Regime, Setting
from scripts.when.results import Branch, OneSeed, table, verdict, write

FLAGS = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "global_batch_size": 8,
    "max_steps": 6,
    "warmup_steps": 1,
    "eval_interval": 2,
    "eval_windows": 2,
    "checkpoint_interval": 2,
    "log_interval": 1,
    "device": "cpu",
}
ROWS = [
    Setting("reference", "linupper, excess loss", LINUPPER | EXCESS, controls=BOTH),
    Setting("stage", "linupper, to step 4", LINUPPER | EXCESS, read_at=4, controls=()),
    Setting("norm", "linupper, domain", LINUPPER | {"reweight_norm": "domain"}, controls=()),
]
PLAN = Plan(["config/tiny_cpu.py"], FLAGS, 2, {"base": Regime(data="sample")}, ROWS)


class Here(Study):
    """Runs its commands in this process, which saves the time to start one."""

    def command(self, words, name):
        print(name)
        expect_ok(command(*words))

    def do_all(self, make, tasks):
        for task in tasks:
            make(*task)
        return True


@pytest.fixture(scope="module")
def study(sample_data, tmp_path_factory):
    """A finished study of one seed."""
    to = tmp_path_factory.mktemp("study")
    shutil.copytree(sample_data, to / "data" / "sample")
    study = Here(PLAN, to, [], jobs=1, minutes=10)
    assert study.run([42])
    return study


def test_a_branch_is_what_an_unbroken_run_with_these_weights_gives(study, tmp_path):
    """Bit for bit, though the branch took its first steps from the uniform run."""
    weights = LINUPPER | {"reweight_control": "within", "reweight_warmup_steps": 2}
    weights["reweight_ref"] = study.folder("base", "uniform", 42 + REFERENCE_SEED)
    flags = FLAGS | weights | {"seed": 42, "out_dir": tmp_path / "whole"}
    flags["data_dir"] = study.to / "data" / "sample"
    words = [f"--{key}={value}" for key, value in flags.items()]
    expect_ok(command("train.py", "config/tiny_cpu.py", *words))
    folders = (
        tmp_path / "whole",
        study.branch_folder(ROWS[0], "within", 42),
        study.folder("base", "uniform", 42),
    )
    whole, branch, uniform = (
        checkpoint.load_tensors(checkpoint.find_latest(folder), "model.pt") for folder in folders
    )
    assert all(torch.equal(whole[name], branch[name]) for name in whole)
    assert not all(torch.equal(whole[name], uniform[name]) for name in whole)


def test_rows_share_runs_and_nothing_is_run_twice(study, capsys):
    assert study.branch_folder(ROWS[0], "none", 42) == study.branch_folder(ROWS[1], "none", 42)
    assert len(list((study.to / "runs").iterdir())) == 2 + 3 + 1
    assert study.run([42])
    assert capsys.readouterr().out == ""


def test_the_numbers_of_a_row_are_those_of_its_runs(study):
    (_, first), (_, stage), (_, norm) = study.rows([42, 43])
    assert list(first) == [42] and list(norm) == [42]  # seed 43 was not run
    found = first[42]

    def loss(folder, step):
        return results.evaluations(folder)[step]["mean_loss"]

    uniform = study.folder("base", "uniform", 42)
    gaps = {}
    for control in ("none", "shuffled", "within"):
        gaps[control] = loss(study.branch_folder(ROWS[0], control, 42), 6) - loss(uniform, 6)
    assert found.strategy.gap == gaps["none"] and found.cost() == gaps["shuffled"]
    assert found.direction() == gaps["shuffled"] - gaps["none"]
    assert found.strategy.gaps.keys() == {4, 6} or found.strategy.gaps[2] == 0
    assert np.mean(list(found.strategy.of_domains.values())) == pytest.approx(gaps["none"])
    assert found.strategy.calibrated.keys() == {4, 6}
    at_6 = []
    for folder in (study.branch_folder(ROWS[0], "none", 42), uniform):
        at_6.append(measure.calibrated_loss(checkpoint.checkpoint_folder(folder, 6), 2))
    assert found.strategy.calibrated[6] == at_6[0] - at_6[1] != 0
    reference = study.folder("base", "uniform", 42 + REFERENCE_SEED)
    folds = measure.probed(checkpoint.checkpoint_folder(uniform, 2), reference)
    gain = judge(folds, 8, Choice("linupper", 0.4, has_reference=True)).gain
    assert found.predicted == gain * (loss(uniform, 2) - loss(uniform, 6))
    assert stage[42].strategy.gap == found.strategy.gaps[4] and stage[42].cost() is None
    assert norm[42].predicted is None  # the probe knows no running means of domains
    assert set(found.strategy.shares) == {"noise", "redundant", "ordinary"}


def test_a_clock_starts_nothing_that_may_not_end_in_time(study, monkeypatch, tmp_path):
    clock = Clock(minutes=1)
    assert clock.has_time()
    clock.longest = 61
    assert not clock.has_time()
    later = Study(PLAN, tmp_path, [], jobs=1, minutes=1)
    later.clock.longest = 61
    done = []
    assert not later.do_all(done.append, [(1,), (2,)]) and not done


# Data


def test_shortened_data_has_the_first_tokens_of_each_domain(sample_data, tmp_path):
    shorten(sample_data, tmp_path / "short", 1000)
    whole, short = read_manifest(sample_data), read_manifest(tmp_path / "short")
    for domain, splits in short["domains"].items():
        (info,) = splits["train"]
        shard = np.load(tmp_path / "short" / info["file"])
        original = np.load(sample_data / whole["domains"][domain]["train"][0]["file"])
        assert np.array_equal(shard, original[:1000])
        assert splits["val"][0]["sha256"] == whole["domains"][domain]["val"][0]["sha256"]
    assert data_hash(short) != data_hash(whole)
    expect_ok(command("prepare_slimpajama.py", "--verify", tmp_path / "short"))
    assert Split(tmp_path / "short", short, "train", 16).n_windows.tolist() == [62] * 7


# Measurements


def test_a_temperature_is_fitted_on_the_other_half():
    """Two domains, two temperatures: each half is best at the other's worst."""
    domain = np.array([0, 0, 1, 1])
    losses = np.array([[1.0, 2.0], [5.0, 3.0], [1.0, 2.0], [5.0, 3.0]])
    assert measure.cross_fitted(losses, domain) == ((2 + 5) / 2 + (2 + 5) / 2) / 2
    even = np.array([[1.0, 2.0], [3.0, 5.0], [1.0, 2.0], [3.0, 5.0]])
    assert measure.cross_fitted(even, domain) == 2.0


def test_losses_at_temperatures(study):
    """At temperature 1 they are the model's own; the others are those of scaled logits."""
    folder = checkpoint.find_latest(study.folder("base", "uniform", 42))
    model = checkpoint.load_model(folder)
    data_dir = study.to / "data" / "sample"
    split = Split(data_dir, read_manifest(data_dir), "val", 16)
    pairs = np.array([[0, 0], [3, 1], [6, 2]])
    losses = measure.losses_at_temperatures(model, split, pairs)
    tokens = torch.from_numpy(np.stack([split.window(*pair) for pair in pairs]).astype(np.int64))
    x, y = tokens[:, :-1], tokens[:, 1:]
    for k, temperature in enumerate(measure.TEMPERATURES):
        p = torch.log_softmax(model(x).double() / temperature, dim=2)
        expected = -p.gather(2, y[..., None]).mean((1, 2))
        np.testing.assert_allclose(losses[:, k], expected.detach(), rtol=1e-5)
    assert 1.0 in measure.TEMPERATURES.round(9)


# Verdicts, table and figures


def branch(gap, step=600):
    gaps = {400: gap / 2, step: gap}
    shares = {"noise": 3.0, "ordinary": 0.8}
    return Branch(gap, 2.0, gaps, {"c4": gap, "cc": -gap}, {400: 0.0, step: gap / 4}, 0.7, shares)


def row(*gaps, cost=0.02, within=None):
    seeds = {}
    for seed, gap in enumerate(gaps):
        controls = {"shuffled": branch(cost)}
        if within is not None:
            controls["within"] = branch(within)
        seeds[seed] = OneSeed(branch(gap), controls, predicted=-0.01)
    return seeds


def test_verdicts():
    assert verdict([0.10, 0.11, 0.12]) == "behind"
    assert verdict([-0.10, -0.11, -0.12]) == "ahead"
    assert verdict([0.10, -0.02, 0.12]) == "cannot tell"
    assert verdict([0.10, 0.15]) == "cannot tell"  # t with one degree of freedom
    assert verdict([0.1]) == "one seed"
    assert verdict([0.0, 0.0, 0.0]) == "level"


def test_the_table(tmp_path):
    rows = [
        (Setting("strategy", "linupper", LINUPPER), row(0.03, 0.04, 0.05)),
        (Setting("strategy", "not run", LINUPPER | MILD), {}),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert dict(zip(results.COLUMNS, cells, strict=True)) == {
        "axis": "strategy",
        "setting": "linupper",
        "seeds": "3",
        "ess": "0.70",
        "uniform": "2.0000",
        "gap": "+0.0400 ± 0.0100",
        "cost (shuffled)": "+0.0200 ± 0.0000",
        "gain in direction": "-0.0200 ± 0.0100",
        "predicted": "-0.0100 ± 0.0000",
        "gap, calibrated": "+0.0100 ± 0.0025",
        "domains ahead": "1 of 2",
        "p": "0.020",
        "verdict": "behind",
    }


def test_files_and_figures(tmp_path):
    rows = [
        (Setting("strategy", "linupper", LINUPPER, controls=BOTH), row(0.03, 0.04, within=0.03)),
        (Setting("repeated data", "1 epoch: linupper", LINUPPER, "1 epoch"), row(0.03, 0.02)),
        (Setting("repeated data", "30 epochs: linupper", LINUPPER, "30 epochs"), row(-0.01, 0.0)),
        (Setting("labelled corpus", "labelled corpus: linupper", LINUPPER), row(0.1)),
    ]
    files = write(rows, tmp_path)
    assert [path.name for path in files] == [
        "table.md",
        "results.json",
        *(f"{name}.png" for name in results.FIGURES),
    ]
    assert all(path.stat().st_size > 100 for path in files)
    saved = json.loads(files[1].read_text())
    assert saved[0]["seeds"]["1"]["strategy"]["gap"] == 0.04
    for draw in results.FIGURES.values():
        assert draw([(Setting("strategy", "none", LINUPPER), {})]) is None


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_whole(name):
    """Each row's regime is there; its branch and its end are steps with a checkpoint."""
    plan = PLANS[name]()
    labels = [setting.label for setting in plan.settings]
    assert len(set(labels)) == len(labels)
    for setting in plan.settings:
        flags = plan.flags | plan.regimes[setting.regime].flags
        end = setting.read_at or flags["max_steps"]
        assert 0 < plan.start(setting) < end <= flags["max_steps"]
        assert plan.start(setting) % flags["checkpoint_interval"] == 0
        assert end % flags["checkpoint_interval"] == 0
        assert end % flags["eval_interval"] == 0
    assert {setting.regime for setting in plan.settings} == set(plan.regimes)


def test_a_failed_command_is_named(tmp_path):
    done = command("scripts/study_when.py", "--input=/nowhere", "--to", tmp_path / "x")
    expect_error(done, "bytes: --input /nowhere")
