"""Tables and figures from run folders with known numbers."""

import csv
import io
import json
import math

import pytest
from conftest import command, expect_error, expect_ok

from data import DOMAINS
from eval.tables import run_names

CONFIG = {"model": "tiny", "reweight": "uniform", "seed": 1, "r": 0.4, "out_dir": "x", "git_commit": "abc",
          "max_steps": 9}


def make_run(folder, losses, val_hash="same", kinds=False, **changes):
    """A run folder whose domains have these final losses; None: not evaluated."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    if losses is None:
        return folder
    domains = {d: {"loss": v, "ppl": math.exp(v), "tokens": 10, "bits_per_byte": v / math.log(2)}
               for d, v in zip(DOMAINS, losses, strict=False)}
    record = {"step": 9, "domains": domains, "mean_loss": sum(losses) / len(losses), "val_hash": val_hash,
              "worst_domain": max(domains, key=lambda d: domains[d]["loss"])}
    (folder / "eval").mkdir()
    (folder / "eval" / "perplexity.json").write_text(json.dumps(record))
    lines = [{"kind": "eval", **record, "step": step} for step in (0, 5, 9)]
    even = dict.fromkeys(domains, 1 / len(domains))
    lines += [{"kind": "train", "step": step, "ess": 0.9, "weight_by_domain": even, "samples_by_domain": even,
               **({"weight_by_kind": {"noise": 1.0}, "samples_by_kind": {"noise": 1.0}} if kinds else {})}
              for step in range(1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "a", [1.0, 2.0, 3.0, 1.5, 1.5, 1.5, 1.5]),
            make_run(tmp_path / "b", [1.1, 1.9, 2.5, 1.5, 1.5, 1.5, 1.5], reweight="linupper")]


def test_markdown(runs):
    text = expect_ok(command("eval/tables.py", *runs, "--metric", "loss"))
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()}
    assert rows["domain"] == ["uniform", "linupper"]
    assert rows["arxiv"] == ["**1.0000**", "1.1000"] and rows["book"] == ["2.0000", "**1.9000**"]
    assert rows["average loss"] == ["1.7143", "**1.6429**"] and rows["worst domain"] == ["3.0000", "**2.5000**"]
    assert rows["which one"] == ["cc", "cc"]


def test_csv_and_latex(runs):
    rows = list(csv.reader(io.StringIO(expect_ok(command("eval/tables.py", *runs, "--format", "csv")))))
    assert rows[1] == ["arxiv", f"{math.e:.3f}", f"{math.exp(1.1):.3f}"] and len(rows) == 12
    latex = expect_ok(command("eval/tables.py", *runs, "--format", "latex"))
    assert latex.count("{") == latex.count("}") and latex.count(r"\\") == 12 and r"\textbf{2.718}" in latex


def test_missing_says_missing(runs, tmp_path):
    done = command("eval/tables.py", runs[0], make_run(tmp_path / "c", None, reweight="upper"))
    assert "missing" in expect_ok(done) and "eval/perplexity.py --run" in done.stderr


def test_seeds_share_a_column_and_are_paired_with_uniform(tmp_path):
    runs = [make_run(tmp_path / f"{s}{k}", [1.0 + k * 0.1 + gap] * 7, reweight=s, seed=k, r=0.4 + (s == "uniform"))
            for s, gap in (("uniform", 0.0), ("upper", 0.02)) for k in (1, 2, 3)]
    runs[5:] = [make_run(tmp_path / "more", [1.33] * 7, reweight="upper", seed=3),
                make_run(tmp_path / "other", [2.0] * 7, reweight="upper", seed=9, block_size=7)]
    text = expect_ok(command("eval/tables.py", *runs, "--metric", "loss"))
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()}
    assert rows["domain"] == ["uniform block_size=None", "upper block_size=None", "upper block_size=7"]
    assert rows["book"] == ["**1.2000 ± 0.1000**", "1.2233 ± 0.1050", "2.0000"]
    assert rows["average loss minus uniform"] == ["+0.0000 ± 0.0000", "+0.0233 ± 0.0058", "missing"]
    latex = expect_ok(command("eval/tables.py", *runs, "--format", "latex"))
    assert r"$\pm$" in latex


def test_an_older_checkpoint_is_told(runs, tmp_path):
    short = make_run(tmp_path / "short", [1.0] * 7, max_steps=20)
    done = command("eval/tables.py", runs[1], short)
    assert "evaluated_at_step=9" in expect_ok(done) and "evaluated at step 9 of 20" in done.stderr


def test_what_is_no_setting_splits_no_column(tmp_path):
    a, b = (make_run(tmp_path / f"u{i}", [1.0] * 7, seed=i, r=i / 10, eval_interval=i) for i in (1, 2))
    head, _, first, *_ = expect_ok(command("eval/tables.py", a, b)).splitlines()
    assert head.split()[1:] == ["domain", "|", "uniform", "|"] and "± 0.000" in first


def test_a_diverged_run_is_shown_as_it_is(tmp_path):
    runs = [make_run(tmp_path / f"d{i}", [700.0 + i] * 7, seed=i) for i in (1, 2)]
    for run in runs:
        path = run / "eval" / "perplexity.json"
        path.write_text(path.read_text().replace('"mean_loss": 70', '"mean_loss": 90'))
    assert "inf ± nan" in expect_ok(command("eval/tables.py", *runs))


def test_runs_that_cannot_be_compared(runs, tmp_path):
    other = make_run(tmp_path / "c", [1.0] * 7, val_hash="other")
    expect_error(command("eval/tables.py", runs[0], other), str(runs[0]), str(other), "cannot be compared")
    expect_error(command("eval/tables.py", tmp_path), "no config.json")
    expect_error(command("eval/plots.py", make_run(tmp_path / "d", None), "--to", tmp_path), "no evaluation")


def test_names_tell_runs_apart():
    assert run_names([CONFIG, {**CONFIG, "reweight": "upper"}]) == ["uniform", "upper"]
    assert run_names([CONFIG, {**CONFIG, "seed": 2}]) == ["uniform seed=1", "uniform seed=2"]
    assert len(set(run_names([CONFIG, CONFIG]))) == 2


def test_plots(runs, tmp_path):
    def names(*folders):
        written = expect_ok(command("eval/plots.py", *folders, "--to", tmp_path / "figures")).split()
        return written, [path.rsplit("/", 1)[1] for path in written]
    assert "weight_by_kind.png" not in names(*runs)[1]
    written, found = names(*runs, make_run(tmp_path / "k", [1.0] * 7, kinds=True, reweight="upper"))
    assert found == ["weights.png", "loss_curves.png", "weight_by_domain.png", "weight_by_kind.png",
                     "effective_sample_size.png", "domain_perplexity.png"]
    for path in written:
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n" and len(file.read()) > 5000


def test_smoothing_is_a_centred_mean():
    from eval.plots import smooth
    assert smooth([1.0]).tolist() == [1.0] and smooth([]).tolist() == []
    assert smooth([0.0, 3.0, 6.0, 3.0]).tolist() == [1.5, 3.0, 4.0, 4.5]
    ramp = smooth(list(map(float, range(400))))
    assert ramp[200] == 200 and ramp[0] == 5
