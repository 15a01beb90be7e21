"""What surrounds the steps: ranks that do not run the same thing are refused at the start."""

import pytest
from conftest import free_port
from ranks import Ranks
from test_train import SMALL

from cli import UserError
from runtime import distributed
from runtime.run import check_same_on_all_ranks

OWN = {"seed": 42, "r": 0.4, "data": "abc", "max_steps": 12, "checkpoint step": 8, "code": "1f"}


def check(monkeypatch, *others: dict) -> None:
    of_all = [OWN, *(OWN | other for other in others)]
    monkeypatch.setattr(distributed, "gather_objects", lambda own: of_all)
    check_same_on_all_ranks(OWN, "runs/a")


@pytest.mark.parametrize("key, value", [*((key, "another") for key in OWN), ("checkpoint step", 0)])
def test_a_difference_is_named_with_its_ranks(monkeypatch, key, value):
    with pytest.raises(UserError) as error:
        check(monkeypatch, {}, {key: value}, {})
    assert f"{key} is " in str(error.value)
    assert "on ranks 0, 1, 3" in str(error.value) and "on rank 2;" in str(error.value)


def test_equal_ranks_go_on(monkeypatch):
    check(monkeypatch, {}, {})
    check_same_on_all_ranks(OWN, "runs/a")


@pytest.mark.parametrize(
    "key, value", [("seed", 7), ("r", 0.5), ("learning_rate", 0.1), ("max_steps", 4)]
)
def test_two_ranks_with_different_flags(sample_data, tmp_path, key, value):
    args = ["train.py", *SMALL, "--max_steps=3", "--data_dir", sample_data]
    args += ["--out_dir", tmp_path / "run"]
    out, err = tmp_path / "out", tmp_path / "err"
    patch = f"if rank == 1: sys.argv.append('--{key}={value}')"
    ranks = Ranks(2, args, free_port(), out, err, patch)
    assert ranks.wait() == [2, 2]
    lines = [line for line in err.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 2 and all(f"{key} is " in line for line in lines)
    assert not (tmp_path / "run").exists()
