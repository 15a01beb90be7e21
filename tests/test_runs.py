"""Which runs eval/tables.py puts side by side, and which value it calls the best."""

import pytest
from conftest import command, expect_error, expect_ok
from test_tables_plots import make_run, scores, tables

from eval.runs import Row, read_runs

UNIFORM = {"mixture": "uniform", "data": "d1", "tokenizer": "t1", "samples weighted together": 0}


def perplexities(*runs):
    return tables(*runs, what="ppl")["Perplexity, tiny"]["domain"]


def test_the_same_data_in_another_folder_shares_a_column(tmp_path):
    a = make_run(tmp_path / "a", [1.0], data_dir="data/x", identity=UNIFORM)
    b = make_run(tmp_path / "b", [1.2], data_dir="/disk/x", identity=UNIFORM, seed=2)
    assert perplexities(a, b) == ["uniform"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("data", "d2"),
        ("tokenizer", "t2"),
        ("mixture probabilities", {"cc": 0.9, "c4": 0.1}),
    ],
)
def test_other_data_in_the_same_folder_is_another_setting(tmp_path, key, value):
    other = {**UNIFORM, key: value}
    a = make_run(tmp_path / "a", [1.0], data_dir="data/x", identity=UNIFORM)
    b = make_run(tmp_path / "b", [1.2], data_dir="data/x", identity=other, seed=2)
    c = make_run(tmp_path / "c", [1.1], data_dir="data/x", identity=other, reweight="upper")
    names = perplexities(a, b, c)
    assert len(names) == 3 and all(key in name for name in names[1:])
    done = command("eval/tables.py", a, c, "--what", "difference")  # a is no baseline for c
    expect_error(done, "difference", "a run of another strategy that is like it in all else")


def test_samples_weighted_together_tell_runs_apart_that_weight_them(tmp_path):
    together = {**UNIFORM, "samples weighted together": 4}
    a = make_run(tmp_path / "a", [1.0], identity=UNIFORM)
    b = make_run(tmp_path / "b", [1.2], identity=together, seed=2)
    assert perplexities(a, b) == ["uniform"]
    c = make_run(tmp_path / "c", [1.0], identity=UNIFORM, reweight="upper")
    d = make_run(tmp_path / "d", [1.2], identity=together, reweight="upper", seed=2)
    assert len(perplexities(c, d)) == 2


def test_a_run_from_before_the_mixture_numbers_were_saved(tmp_path):
    """It counts as one with today's numbers of that name."""
    numbers = dict.fromkeys(("cc", "c4"), 0.5)
    new = {**UNIFORM, "mixture": "c4cc", "mixture probabilities": numbers}
    old = {**UNIFORM, "mixture": "c4cc"}
    a = make_run(tmp_path / "a", [1.0], identity=new)
    b = make_run(tmp_path / "b", [1.2], identity=old, seed=2)
    assert perplexities(a, b) == ["uniform"]


NO_BOLD = [
    # A column with a missing or censored run is not the best, though its mean is.
    [[1.0, None], [1.2, 1.4]],
    [[100.0, "not reached"], [200.0, 250.0]],
    # With fewer than two numbers there is nothing to be better than.
    [[1.0], [None]],
]


@pytest.mark.parametrize("values", NO_BOLD, ids=str)
def test_incomplete_columns_are_never_in_bold(values):
    assert not any(is_best for _, is_best in Row("steps", values).texts())


def test_complete_columns_are():
    row = Row("steps", [[3.0, None], [1.0, 2.0], [5.0], ["not reached"]])
    assert [is_best for _, is_best in row.texts()] == [False, True, False, False]


def test_the_mean_of_tasks_counts_a_group_once(tmp_path):
    """A group of three tasks at 0.4 and one at 0.8: 0.5, not 0.48 with the group's own row."""
    found = scores(a=(0.4, 0), b=(0.4, 0), c=(0.4, 0), other=(0.8, 0), group=(0.4, 0))
    found["tasks"]["group"]["is_group"] = True
    run = make_run(tmp_path / "a", [1.0], fewshot=found)
    rows = tables(run, what="fewshot")["Few-shot scores, tiny"]
    assert rows["mean"] == ["0.5000"]


@pytest.mark.parametrize(
    "key, value", [("seed", 7), ("harness", "0.1"), ("dtype", "bfloat16"), ("version", 2.0)]
)
def test_scores_that_were_made_differently_are_refused(tmp_path, key, value):
    runs = []
    for name in ("uniform", "upper"):
        found = scores(sciq=(0.5, 0))
        place = found["tasks"]["sciq"] if key == "version" else found
        if name == "upper":
            place[key] = value
        runs.append(make_run(tmp_path / name, [1.0], fewshot=found, reweight=name))
    done = command("eval/tables.py", *runs, "--what", "fewshot")
    expect_error(done, "sciq was scored differently", str(value))


def test_a_result_of_another_model_than_the_checkpoint_is_refused(tmp_path):
    run = make_run(tmp_path / "a", [1.0], fewshot={**scores(sciq=(0.5, 0)), "model_sha256": "m1"})
    folder = run / "checkpoints" / "step_00000009"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"sha256": {"model.pt": "m1"}}')
    expect_ok(command("eval/tables.py", run))
    (folder / "state.json").write_text('{"sha256": {"model.pt": "m2"}}')
    done = command("eval/tables.py", run)
    expect_error(done, "fewshot.json is of another model", "python eval/fewshot.py --run")


def test_names_leave_out_what_a_run_does_not_have(tmp_path):
    """As after a resume: one run was evaluated before its end, the other at its end."""
    runs = [make_run(tmp_path / name, [1.0], max_steps=n) for name, n in (("a", 9), ("b", 60))]
    names = perplexities(*runs)
    assert names == ["uniform max_steps=9", "uniform max_steps=60 evaluated_at_step=9"]


def test_a_missing_table_is_one_line(tmp_path):
    done = command("eval/tables.py", make_run(tmp_path / "a", [1.0]))
    expect_ok(done)
    lines = [line for line in done.stderr.splitlines() if line.startswith("no table")]
    assert [line.split(":")[0] for line in lines] == [
        "no table difference",
        "no table fewshot",
        "no table speedup",
    ]
    assert "needs a uniform run" in lines[0] and "eval/fewshot.py" in lines[1]


def test_settings_of_a_run_without_an_identity_are_its_config(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a", [1.0], data_dir="data/x")])
    assert run.settings == run.config
