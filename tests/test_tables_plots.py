"""Tables and figures from run folders with known numbers."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import command, expect_error, expect_ok
from matplotlib.figure import Figure

from corpus.manifest import DOMAINS
from eval.compare import estimate, minutes_to, speedup, steps_to
from eval.plots import Chart, Line, gap_charts, loss_charts, panels, training_charts
from eval.runs import columns_of, read_runs, run_names

CONFIG = {
    "model": "tiny",
    "reweight": "uniform",
    "seed": 1,
    "r": 0.4,
    "out_dir": "x",
    "git_commit": "abc",
    "max_steps": 9,
}


def make_run(
    folder,
    losses,
    val_hash="same",
    kinds=False,
    domains=DOMAINS,
    windows=None,
    fewshot=None,
    **changes,
):
    """A run folder whose domains have these final losses; None: not evaluated."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    if losses is None:
        return folder
    domains = {
        d: {"loss": v, "ppl": math.exp(v), "tokens": 10, "bits_per_byte": v / math.log(2)}
        for d, v in zip(domains, losses, strict=False)
    }
    record = {
        "step": 9,
        "domains": domains,
        "mean_loss": sum(losses) / len(losses),
        "val_hash": val_hash,
        "worst_domain": max(domains, key=lambda d: domains[d]["loss"]),
    }
    (folder / "eval").mkdir()
    (folder / "eval" / "perplexity.json").write_text(json.dumps(record))
    if windows:
        arrays = {domain: np.float32(values) for domain, values in windows.items()}
        for domain, values in windows.items():  # each window is a document
            arrays[f"documents/{domain}"] = np.stack([values, np.ones(len(values))], axis=1)
        np.savez(folder / "eval" / "perplexity_windows.npz", **arrays)
    if fewshot:
        (folder / "eval" / "fewshot.json").write_text(json.dumps(fewshot))
    lines = [{"kind": "eval", **record, "step": step} for step in (0, 5, 9)]
    even = dict.fromkeys(domains, 1 / len(domains))
    lines += [
        {
            "kind": "train",
            "step": step,
            "ess": 0.9,
            "weight_by_domain": even,
            "samples_by_domain": even,
            "tokens": step * 10,
            "tokens_per_s": 5.0,
            **(
                {"weight_by_kind": {"noise": 1.0}, "samples_by_kind": {"noise": 1.0}}
                if kinds
                else {}
            ),
        }
        for step in range(1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def tables(*runs, what=None):
    """Of the printed Markdown {title: {row: cells}}; the head is the row "domain", "task" or ""."""
    text = expect_ok(command("eval/tables.py", *runs, *(["--what", what] if what else [])))
    found = {}
    for line in text.splitlines():
        if line.startswith("### "):
            found[line[4:]] = {}
        elif line.startswith("| "):
            label, *cells = (c.strip() for c in line.strip("|").split("|"))
            found[list(found)[-1]][label] = cells
    return found


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(tmp_path / "a", [1.0, 2.0, 3.0, 1.5, 1.5, 1.5, 1.5]),
        make_run(tmp_path / "b", [1.1, 1.9, 2.5, 1.5, 1.5, 1.5, 1.5], reweight="linupper"),
    ]


def test_markdown(runs):
    found = tables(*runs, what="loss,ppl")
    assert list(found) == ["Loss (log-perplexity, nats per token), tiny", "Perplexity, tiny"]
    rows = found["Loss (log-perplexity, nats per token), tiny"]
    assert list(rows)[1:8] == list(DOMAINS) and rows["domain"] == ["uniform", "linupper"]
    assert rows["arxiv"] == ["**1.0000**", "1.1000"] and rows["book"] == ["2.0000", "**1.9000**"]
    assert rows["average loss"] == ["1.7143", "**1.6429**"] and rows["worst domain"] == [
        "3.0000",
        "**2.5000**",
    ]
    assert rows["which one"] == ["cc", "cc"]
    rows = found["Perplexity, tiny"]
    assert rows["arxiv"] == [f"**{math.e:.3f}**", f"{math.exp(1.1):.3f}"]
    assert rows["exp(average loss)"] == [f"{math.exp(12 / 7):.3f}", f"**{math.exp(11.5 / 7):.3f}**"]


def test_without_a_choice_there_is_all_that_the_runs_have(runs):
    assert [title.split(",")[0] for title in tables(*runs)] == [
        "Perplexity",
        "Loss (log-perplexity",
        "Bits per byte",
        "Loss minus uniform",
        "Reaching uniform's final loss",
    ]
    assert len(tables(runs[0])) == 3


def test_csv(runs):
    rows = list(
        csv.DictReader(io.StringIO(expect_ok(command("eval/tables.py", *runs, "--format", "csv"))))
    )
    of = {(r["table"], r["row"], r["setting"]): r for r in rows}
    assert float(of["ppl", "arxiv", "linupper"]["value"]) == math.exp(1.1)
    assert float(of["difference", "cc", "linupper"]["value"]) == pytest.approx(-0.5)
    assert of["loss", "which one", "uniform"]["value"] == "cc"
    assert {r["model"] for r in rows} == {"tiny"} and {r["std"] for r in rows} == {""}


def test_no_text_in_the_csv_is_a_formula(tmp_path):
    """Spreadsheets run a cell that begins with one of = + - @, quoted or not."""
    formulas = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(1)", "\t=1", "+1.5 to =2", "-1"]
    names = [*formulas, "c4", "a=b", "1-2"]
    losses = [1.0 + i for i in range(len(names))]
    runs = [
        make_run(tmp_path / "a", losses, domains=names, model="=1+1"),
        make_run(
            tmp_path / "b",
            [0.5, *losses[1:]],
            domains=[*names[:-1], "=z"],
            model="=1+1",
            reweight="-1+1",
        ),
    ]
    text = expect_ok(command("eval/tables.py", *runs, "--format", "csv"))
    rows = list(csv.DictReader(io.StringIO(text)))
    of = {(row["table"], row["row"], row["setting"]): row for row in rows}
    assert {row["model"] for row in rows} == {"'=1+1"}
    assert {row["setting"] for row in rows} == {"uniform", "'-1+1"}
    labels = {row["row"] for row in rows if row["table"] == "loss"}
    assert {f"'{formula}" for formula in formulas} <= labels
    assert {"c4", "a=b", "1-2", "average loss"} <= labels
    assert of["loss", "which one", "'-1+1"]["value"] == "'=z"
    for row in rows:  # numbers stay numbers, also negative ones
        if row["table"] == "difference" and row["row"] == f"'{formulas[0]}":
            assert float(row["value"]) == -0.5
        for cell in row.values():
            assert cell[:1] not in "=@\t" or not cell
            assert cell[:1] not in ("+", "-") or float(cell) < 0


def test_an_interval_in_the_csv_is_no_formula():
    from eval.runs import Row, Table
    from eval.tables import as_csv

    values = ["-0.1250 to +0.0300", "+0.1 to +0.3", "+1.0 to 2+3", "-1"]
    row = Row("interval", [[value] for value in values])
    table = Table("loss", "", "tiny", "", ["a"] * len(values), [row])
    written = [line["value"] for line in csv.DictReader(io.StringIO(as_csv([table])))]
    assert written == [*values[:2], "'+1.0 to 2+3", "'-1"]


def test_latex(tmp_path):
    runs = [
        make_run(
            tmp_path / f"{s}{norm[0]}{k}", [loss, 2.0 + k], reweight=s, seed=k, reweight_norm=norm
        )
        for s, norm, loss in (
            ("uniform", "x", 1.0),
            ("upper", "a_%b&<c>\\d#$^~{", 1.1),
            ("upper", "y", 1.1),
        )
        for k in (1, 2)
    ]
    text = expect_ok(command("eval/tables.py", *runs, "--format", "latex"))
    assert text.startswith(r"% \usepackage{booktabs}")
    tabulars = re.findall(r"\\begin{tabular}{(.*?)}\n(.*?)\\end{tabular}", text, re.DOTALL)
    assert len(tabulars) == 5 and text.count(r"\begin{table}") == text.count(r"\caption{") == 5
    for columns, body in tabulars:
        for line in body.splitlines():
            if not re.fullmatch(r"\\(top|mid|bottom)rule", line):
                assert (
                    line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
                )
    names = r"a\_\%b\&$<$c$>$\textbackslash{}d\#\$\textasciicircum{}\textasciitilde{}\{"
    assert rf"reweight\_norm={names}" in text
    bare = re.sub(r"\\[_%&#${}]", "", text.split("\n", 1)[1])  # what is left is LaTeX's own
    assert (
        not re.search(r"[%#_^~±]", bare)
        and bare.count("{") == bare.count("}")
        and bare.count("$") % 2 == 0
    )
    assert r"\textbf{2.718 $\pm$ 0.000} & 3.004" in text and "\\midrule\nexp(average loss)" in text


def test_latex_has_real_minus_signs(runs):
    assert "cc & $-$0.5000" in expect_ok(
        command("eval/tables.py", *runs, "--what=difference", "--format=latex")
    )


def test_out_writes_the_three_formats(runs, tmp_path):
    to = tmp_path / "results" / "x"
    written = expect_ok(command("eval/tables.py", *runs, "--out", to)).split()
    assert written == [str(to / f"table.{end}") for end in ("md", "tex", "csv")]
    for form, end in (("markdown", "md"), ("latex", "tex"), ("csv", "csv")):
        assert (to / f"table.{end}").read_text() == expect_ok(
            command("eval/tables.py", *runs, "--format", form)
        )
    assert sorted(path.name for path in to.iterdir()) == ["table.csv", "table.md", "table.tex"]


def test_missing_says_missing(runs, tmp_path):
    done = command("eval/tables.py", runs[0], make_run(tmp_path / "c", None, reweight="upper"))
    assert "missing" in expect_ok(done) and "eval/perplexity.py --run" in done.stderr


def test_seeds_share_a_column_and_are_paired_with_uniform(tmp_path):
    runs = [
        make_run(
            tmp_path / f"{s}{k}",
            [1.0 + k * 0.1 + gap] * 7,
            reweight=s,
            seed=k,
            r=0.4 + (s == "uniform"),
        )
        for s, gap in (("uniform", 0.0), ("upper", 0.02))
        for k in (1, 2, 3)
    ]
    runs[5:] = [
        make_run(tmp_path / "more", [1.33] * 7, reweight="upper", seed=3),
        make_run(tmp_path / "other", [2.0] * 7, reweight="upper", seed=9, block_size=7),
    ]
    found = tables(*runs)
    rows = found["Loss (log-perplexity, nats per token), tiny"]
    assert rows["domain"] == [
        "uniform",
        "upper",
        "upper block_size=7",
    ]
    assert rows["book"] == ["**1.2000 ± 0.1000**", "1.2233 ± 0.1050", "2.0000"]
    rows = found["Loss minus uniform, tiny"]
    assert rows["domain"] == ["upper", "upper block_size=7"]
    assert rows["average loss"] == rows["book"] == ["+0.0233 ± 0.0058", "missing"]
    assert rows["p (documents)"] == ["missing", "missing"]  # no file with the documents
    rows = list(
        csv.DictReader(io.StringIO(expect_ok(command("eval/tables.py", *runs, "--format", "csv"))))
    )
    book = next(
        r for r in rows if (r["table"], r["row"], r["setting"]) == ("loss", "book", "upper")
    )
    assert (float(book["std"]), book["runs"]) == (
        pytest.approx(np.std([1.12, 1.22, 1.33], ddof=1)),
        "3",
    )


def test_the_paired_test_averages_the_seeds_documents_first(tmp_path):
    rng, runs, losses = np.random.default_rng(2), [], {}
    n_documents = {"arxiv": 40, "fineweb": 90}
    for strategy, worse in (("uniform", 0), ("upper", 0.1)):
        for seed in (1, 2):
            own = {domain: rng.normal(2 + worse, 0.3, n) for domain, n in n_documents.items()}
            losses[strategy, seed] = own
            means = [values.mean() for values in own.values()]
            out = tmp_path / f"{strategy}{seed}"
            changes = {"reweight": strategy, "seed": seed}
            runs.append(make_run(out, means, domains=tuple(own), windows=own, **changes))
    rows = tables(*runs, what="difference")["Loss minus uniform, tiny"]
    differences = []
    for domain, n in n_documents.items():
        of_seeds = [losses["upper", k][domain] - losses["uniform", k][domain] for k in (1, 2)]
        differences.append(np.stack([np.mean(of_seeds, axis=0), np.ones(n)], axis=1))
    expected = estimate(differences)
    assert rows["average loss"][0].startswith(f"{expected.mean:+.4f} ± ")
    interval = f"{expected.low:+.4f} to {expected.high:+.4f}"
    assert rows["95 % interval (documents)"] == [interval]
    assert rows["p (documents)"] == [f"{expected.p:.4f}" if expected.p >= 1e-4 else "<0.0001"]

    path = runs[3] / "eval" / "perplexity_windows.npz"
    with np.load(path) as saved:
        np.savez(path, arxiv=saved["arxiv"], fineweb=saved["fineweb"])
    done = command("eval/tables.py", *runs, "--what", "difference")
    assert "p (documents)" in expect_ok(done) and f"{path} is of an earlier version" in done.stderr
    path.unlink()
    done = command("eval/tables.py", *runs, "--what", "difference")
    expect_ok(done)
    assert f"{runs[3]}: no perplexity_windows.npz" in done.stderr


def test_too_few_documents_are_said(tmp_path):
    windows = {"arxiv": np.array([2.0])}
    runs = [
        make_run(tmp_path / name, [2.0], domains=("arxiv",), windows=windows, reweight=name)
        for name in ("uniform", "upper")
    ]
    rows = tables(*runs, what="difference")["Loss minus uniform, tiny"]
    assert rows["95 % interval (documents)"] == rows["p (documents)"] == ["too few to tell"]


def test_a_control_parts_the_gap_into_cost_and_direction(tmp_path):
    """Of each seed its own control; without one, the table says what is missing."""
    runs = []
    for seed, base in ((1, 2.0), (2, 2.2)):
        runs.append(make_run(tmp_path / f"u{seed}", [base] * 7, seed=seed))
        linupper = {"reweight": "linupper", "seed": seed}
        runs.append(make_run(tmp_path / f"l{seed}", [base + 0.03] * 7, **linupper))
        shuffled = {**linupper, "reweight_control": "shuffled"}
        loss = base + 0.05 * seed
        runs.append(make_run(tmp_path / f"c{seed}", [loss] * 7, **shuffled))
    rows = tables(*runs, what="difference")["Loss minus uniform, tiny"]
    assert rows["domain"] == ["linupper", "linupper reweight_control=shuffled"]
    assert rows["average loss"][0] == "+0.0300 ± 0.0000"
    assert rows["cost of fewer samples"] == ["+0.0750 ± 0.0354", "missing"]
    assert rows["gain in direction"] == ["+0.0450 ± 0.0354", "missing"]

    without = [run for run in runs if "c" not in run.name]
    text = expect_ok(command("eval/tables.py", *without, "--what=difference"))
    assert "cost of fewer samples" not in text and "--reweight_control shuffled would tell" in text


def test_gaps_are_drawn_with_their_controls(tmp_path):
    linupper = {"reweight": "linupper"}
    folders = [
        make_run(tmp_path / "u", [2.0] * 7),
        make_run(tmp_path / "l", [2.03] * 7, **linupper),
        make_run(tmp_path / "c", [2.05] * 7, **linupper, reweight_control="shuffled"),
    ]
    columns = columns_of({run: run.config for run in read_runs(folders)})
    gap, direction = gap_charts(columns)
    assert [line.setting for line in gap.lines] == [1, 2]
    np.testing.assert_allclose(gap.lines[0].y, 0.03)
    np.testing.assert_allclose(gap.lines[1].y, 0.05)
    assert [line.setting for line in direction.lines] == [1]
    np.testing.assert_allclose(direction.lines[0].y, 0.02)
    assert direction.lines[0].x.tolist() == [5, 9]  # step 0 is before any weights
    assert [chart.title for chart in gap_charts(columns[:2])] == ["loss minus uniform"]
    assert gap_charts(columns[:1]) == []


def curve(points, rates=((20, 50.0),), val_hash="same", max_steps=20):
    """A run with these (step, mean loss) evaluations.

    It takes 100 tokens a step; rates: (last step, tokens per second).
    """
    evals = [{"kind": "eval", "step": s, "mean_loss": v, "val_hash": val_hash} for s, v in points]
    trained = [
        {"kind": "train", "step": s, "tokens": 100 * s, "tokens_per_s": rate} for s, rate in rates
    ]
    return {"max_steps": max_steps, "evals": evals, "trained": trained}


def test_speedup_by_hand():
    points = [(0, 5.0), (10, 3.0), (20, 2.0)]
    uniform = curve(points)  # 2 seconds a step
    faster = curve([(0, 5.0), (10, 2.5), (20, 1.5)], rates=[(10, 100.0), (20, 50.0)])
    row = speedup(faster, uniform)
    assert (row["uniform's final loss"], row["uniform's steps"], row["steps"]) == (2.0, 20, 15)
    assert row["uniform's minutes"] == pytest.approx(40 / 60)
    assert row["minutes"] == pytest.approx(20 / 60)
    assert row["speed-up in steps"] == pytest.approx(20 / 15)
    assert row["speed-up in time"] == pytest.approx(2)
    never = [(0, 5.0), (20, 2.1)]
    assert speedup(curve(never), uniform)["steps"] == "not reached"
    assert "steps" not in speedup(curve(never, max_steps=40), uniform)  # it may still get to it
    assert speedup(faster, curve(points, max_steps=40)) == {}  # uniform is not finished
    assert speedup(curve([(20, 1.0)], val_hash="other"), uniform) == {}
    no_step_needed = curve([(0, 2.0), (20, 1.0)])
    assert speedup(no_step_needed, uniform)["speed-up in steps"] is None
    no_times = curve([(0, 5.0), (20, 1.0)], rates=())
    assert speedup(no_times, uniform)["speed-up in time"] is None


def test_the_curve_is_read_where_it_first_comes_down():
    evals = curve([(0, 5.0), (10, 1.0), (20, 3.0), (30, 2.0)])["evals"]
    assert steps_to(2.0, evals) == 7.5
    assert steps_to(5.0, evals) == 0
    assert steps_to(0.5, evals) is None
    trained = curve([])["trained"]
    assert minutes_to(None, trained) is None
    assert minutes_to(30, trained) == pytest.approx(40 / 60)


def test_training_time_is_counted_from_step_0():
    """Also before the first log line: at 2 seconds a step, step 5 of 20 comes after 10 seconds."""
    assert minutes_to(5, curve([])["trained"]) == pytest.approx(10 / 60)


def test_the_speedup_table(tmp_path):
    runs = []
    for s, k, losses in (
        ("uniform", 1, (5, 3, 2)),
        ("uniform", 2, (5, 3, 2)),
        ("upper", 1, (5, 2, 1)),
        ("upper", 2, (5, 4, 3)),
        ("linupper", 1, (5, 4, 3)),
    ):
        runs.append(make_run(tmp_path / f"{s}{k}", [1.0], reweight=s, seed=k, max_steps=20))
        made = curve([(step, float(loss)) for step, loss in zip((0, 10, 20), losses, strict=True)])
        lines = [json.dumps(line) + "\n" for line in made["evals"] + made["trained"]]
        (runs[-1] / "metrics.jsonl").write_text("".join(lines))
    rows = tables(*runs, what="speedup")["Reaching uniform's final loss, tiny"]
    assert rows[""] == ["upper", "linupper"]
    assert rows["steps"] == ["10 (1 of 2 runs)", "not reached"] and rows["uniform's steps"] == [
        "20 ± 0",
        "20",
    ]
    assert rows["speed-up in steps"] == ["2.00 (1 of 2 runs)", "not reached"]


def test_without_logged_times_there_are_no_minutes():
    """Of the run, or of its uniform run."""
    points = [(0, 5.0), (20, 1.0)]
    timed, untimed = curve(points), curve(points, rates=())
    assert speedup(untimed, timed)["minutes"] is None
    row = speedup(timed, untimed)
    assert row["uniform's minutes"] is None
    assert row["speed-up in time"] is None


def test_a_loss_that_is_never_reached_is_so_in_every_row():
    row = speedup(curve([(0, 5.0), (20, 2.1)]), curve([(0, 5.0), (20, 2.0)]))
    for label in ("steps", "minutes", "speed-up in steps", "speed-up in time"):
        assert row[label] == "not reached"


def scores(shots=5, step=9, **tasks):
    return {
        "step": step,
        "num_fewshot": shots,
        "tasks": {
            name: {
                "metric": "acc,none",
                "score": score,
                "stderr": 0.01,
                "requests": 40,
                "truncated": cut,
            }
            for name, (score, cut) in tasks.items()
        },
    }


def test_fewshot_scores(tmp_path):
    runs = [
        make_run(tmp_path / "a", [1.0], fewshot=scores(sciq=(0.5, 0), wic=(0.25, 7))),
        make_run(
            tmp_path / "b", [1.0], reweight="upper", fewshot=scores(sciq=(0.6, 0), wic=(0.2, 7))
        ),
        make_run(
            tmp_path / "c",
            [1.0],
            reweight="upper",
            seed=2,
            fewshot=scores(sciq=(0.7, 0), wic=(0.2, 9)),
        ),
        make_run(tmp_path / "d", [1.0], reweight="extremes", fewshot=scores(sciq=(0.1, 0))),
        make_run(tmp_path / "e", [1.0], reweight="quadratic"),
    ]
    rows = tables(*runs, what="fewshot")["Few-shot scores, tiny"]
    assert rows["sciq (acc)"] == [
        "0.5000 (0.0100)",
        "**0.6500 ± 0.0707**",
        "0.1000 (0.0100)",
        "missing",
    ]
    assert rows["wic (acc)"] == ["**0.2500 (0.0100)**", "0.2000 ± 0.0000", "missing", "missing"]
    assert rows["mean"] == ["0.3750", "**0.4250 ± 0.0354**", "missing", "missing"]
    text = expect_ok(command("eval/tables.py", *runs, "--what", "fewshot"))
    assert "5 examples in the prompt" in text and "context: wic 9 of 40." in text
    other = make_run(
        tmp_path / "f", [1.0], reweight="linupper", fewshot=scores(shots=0, sciq=(0.5, 0))
    )
    expect_error(
        command("eval/tables.py", *runs, other),
        "sciq",
        "5 examples",
        "0 examples",
        str(other),
        "--what",
    )
    assert tables(*runs, other, what="ppl")
    early = make_run(
        tmp_path / "g", [1.0], reweight="linupper", fewshot=scores(step=4, sciq=(0.5, 0))
    )
    assert (
        "linupper scored_at_step=4"
        in tables(early, runs[0], what="fewshot")["Few-shot scores, tiny"]["task"]
    )


def test_each_size_has_its_own_table(tmp_path):
    runs = [
        make_run(
            tmp_path / f"{m}{s}", [loss, loss + 1], model=m, reweight=s, global_batch_size=len(m)
        )
        for m, s, loss in (
            ("1.5b", "uniform", 1.0),
            ("1.5b", "upper", 0.9),
            ("tiny", "uniform", 3.0),
        )
    ]
    found = tables(*runs, what="loss,difference")
    assert [title.removeprefix("Loss (log-perplexity, nats per token)") for title in found] == [
        ", tiny",
        ", 1.5b",
        " by size",
        "Loss minus uniform, 1.5b",
    ]
    assert found["Loss (log-perplexity, nats per token), tiny"]["arxiv"] == ["3.0000"]
    assert found["Loss (log-perplexity, nats per token), 1.5b"]["arxiv"] == ["1.0000", "**0.9000**"]
    assert found["Loss (log-perplexity, nats per token) by size"] == {
        "size": ["uniform", "upper"],
        "tiny, average loss": ["3.5000", "missing"],
        "1.5b, average loss": ["1.5000", "**1.4000**"],
        "tiny, worst domain": ["4.0000", "missing"],
        "1.5b, worst domain": ["2.0000", "**1.9000**"],
    }


def test_other_domains_follow_the_known_ones(tmp_path):
    from eval import perplexity
    from eval.plots import domain_perplexity
    from eval.runs import Column, read_runs

    names = ("zulu", *reversed(DOMAINS), "fineweb")
    folder = make_run(tmp_path / "a", [1.0 + i for i in range(9)], domains=names)
    rows = tables(folder, what="ppl")["Perplexity, tiny"]
    in_order = list(rows)[1:10]
    assert in_order == [*DOMAINS, "fineweb", "zulu"]
    runs = read_runs([str(folder)])
    columns = [Column("a", runs)]
    losses = panels(loss_charts(columns), ["a"], "loss")
    assert [ax.get_title() for ax in losses.axes if ax.get_visible()][1:] == in_order
    bars = domain_perplexity(columns, perplexity.read_all(runs))
    assert [label.get_text() for label in bars.axes[0].get_xticklabels()] == in_order


def test_an_older_checkpoint_is_told(runs, tmp_path):
    short = make_run(tmp_path / "short", [1.0] * 7, max_steps=20)
    done = command("eval/tables.py", runs[1], short)
    assert "evaluated_at_step=9" in expect_ok(done) and "evaluated at step 9 of 20" in done.stderr


def test_what_is_no_setting_splits_no_column(tmp_path):
    a, b = (
        make_run(tmp_path / f"u{i}", [1.0] * 7, seed=i, r=i / 10, eval_interval=i) for i in (1, 2)
    )
    rows = tables(a, b)["Perplexity, tiny"]
    assert rows["domain"] == ["uniform"] and rows["arxiv"] == ["2.718 ± 0.000"]


def test_a_diverged_run_is_shown_as_it_is(tmp_path):
    runs = [make_run(tmp_path / f"d{i}", [700.0 + i] * 7, seed=i) for i in (1, 2)]
    for run in runs:
        path = run / "eval" / "perplexity.json"
        path.write_text(path.read_text().replace('"mean_loss": 70', '"mean_loss": 90'))
    assert tables(*runs, what="ppl")["Perplexity, tiny"]["exp(average loss)"] == ["inf ± nan"]


def test_runs_that_cannot_be_compared(runs, tmp_path):
    other = make_run(tmp_path / "c", [1.0] * 7, val_hash="other")
    expect_error(
        command("eval/tables.py", runs[0], other),
        str(runs[0]),
        str(other),
        "cannot be compared",
        "--stride",
    )
    expect_error(command("eval/tables.py", tmp_path), "no config.json")
    expect_error(
        command("eval/plots.py", make_run(tmp_path / "d", None), "--to", tmp_path), "no evaluation"
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--what=pll"], ["'pll'", "did you mean 'ppl'"]),
        (["--what="], ["''", "known"]),
        (["--what=fewshot"], ["fewshot.json", "eval/fewshot.py"]),
        (["--format=html"], ["--format", "markdown"]),
        (["--out=README.md"], ["README.md"]),
        (["--out=x", "--format=csv"], ["--format", "--out"]),
    ],
)
def test_wrong_flags(runs, flags, words):
    expect_error(command("eval/tables.py", *runs, *flags), *words)


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("config.json", "{", ["config.json cannot be read"]),
        ("config.json", '{"model": "x"}', ["'reweight'"]),
        ("eval/perplexity.json", "", ["perplexity.json cannot be read"]),
        ("eval/perplexity.json", '{"step": 1}', ["not what eval/perplexity.py writes", "--run"]),
        (
            "eval/perplexity.json",
            '{"step": 9, "mean_loss": 1, "val_hash": "same", "domains": {"c4": {"loss": 1}}}',
            ["not what eval/perplexity.py writes"],
        ),
        ("eval/perplexity_windows.npz", "PK", ["perplexity_windows.npz cannot be read", "--run"]),
        (
            "eval/fewshot.json",
            '{"step": 9, "num_fewshot": 5, "tasks": {}}',
            ["not what eval/fewshot.py writes"],
        ),
    ],
)
def test_damaged_runs(runs, file, text, words):
    (runs[0] / file).write_text(text)
    expect_error(command("eval/tables.py", *runs), str(runs[0]), *words)


def test_windows_of_another_evaluation_are_refused(tmp_path):
    windows = {"arxiv": [1.0, 2.0]}
    runs = [
        make_run(tmp_path / "a", [1.5], windows=windows),
        make_run(tmp_path / "b", [1.6], windows=windows, reweight="upper"),
    ]
    expect_error(command("eval/tables.py", *runs), str(runs[1]), "not of the same evaluation")
    expect_error(
        command("eval/tables.py", runs[0], "--what", "speedup"), "--what speedup", "uniform"
    )


def test_names_tell_runs_apart():
    assert run_names([CONFIG, {**CONFIG, "reweight": "upper"}]) == ["uniform", "upper"]
    assert run_names([CONFIG, {**CONFIG, "seed": 2}]) == ["uniform seed=1", "uniform seed=2"]
    assert len(set(run_names([CONFIG, CONFIG]))) == 2


def plot(runs, to) -> list[Path]:
    """The files that eval/plots.py has written."""
    written = expect_ok(command("eval/plots.py", *runs, "--to", to)).split()
    return [Path(path) for path in written]


def test_plots(runs, tmp_path):
    with_kinds = make_run(tmp_path / "k", [1.0] * 7, kinds=True, reweight="upper")
    written = plot([*runs, with_kinds], tmp_path / "figures")
    figures = (
        "weights",
        "loss_curves",
        "gap_to_uniform",
        "weight_by_domain",
        "weight_by_kind",
        "effective_sample_size",
        "domain_perplexity",
    )
    assert [path.name for path in written] == [
        f"{f}.{end}" for f in figures for end in ("png", "pdf")
    ]
    for path in written:
        content = path.read_bytes()
        begin = b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else b"%PDF-"
        assert content.startswith(begin) and len(content) > 5000


def test_loss_curves_begin_after_the_warm_up(tmp_path):
    """Evaluations are at steps 0, 5 and 9."""
    for warmup_steps, steps in ((0, [5, 9]), (3, [5, 9]), (6, [0, 5, 9])):
        out = tmp_path / str(warmup_steps)
        run = make_run(out, [1.0] * 7, warmup_steps=warmup_steps)
        columns = columns_of({run: run.settings for run in read_runs([run])})
        charts = loss_charts(columns)
        assert len(charts) == 8
        assert all(chart.lines[0].x.tolist() == steps for chart in charts)


def test_titles_of_panels_do_not_touch():
    """Also the longest ones, side by side."""
    lines = [Line(0, np.arange(3), np.ones(3))]
    titles = ("effective sample size (share of the batch)", "share of steps with a weight above 2")
    figure = panels([Chart(title, lines) for title in titles], ["a"], "share")
    figure.canvas.draw()
    left, right = (ax.title.get_window_extent() for ax in figure.axes)
    assert left.x1 < right.x0


def test_charts_without_a_line_are_left_out(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a", [1.0] * 7)])
    titles = [chart.title for chart in training_charts(columns_of({run: run.settings}))]
    assert titles == ["effective sample size (share of the batch)"]


def test_runs_without_kinds_have_no_plot_of_them(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: None)  # drawing takes seconds
    names = [path.name for path in plot(runs, tmp_path)]
    assert "loss_curves.png" in names and "weight_by_kind.png" not in names


def test_smoothing_is_a_centred_mean():
    from eval.plots import smooth

    assert smooth([1.0]).tolist() == [1.0] and smooth([]).tolist() == []
    assert smooth([0.0, 3.0, 6.0, 3.0]).tolist() == [1.5, 3.0, 4.0, 4.5]
    ramp = smooth(list(map(float, range(400))))
    assert ramp[200] == 200 and ramp[0] == 5
