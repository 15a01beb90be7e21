"""The toy regression against loops in float64, and its script as a user runs it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import command, expect_error, expect_ok

from reweight import STRATEGIES
from scripts.reproduce_linear_regression import (
    BASE,
    SETTINGS,
    START,
    G,
    ahead,
    gradient,
    steps_to,
    train,
)

SCRIPT = "scripts/reproduce_linear_regression.py"


def test_gradient_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, generator=generator)
    theta = torch.randn(len(STRATEGIES), 1, 2, 3, generator=generator)
    got = gradient(theta, x, y, r=0.4)
    for s, f in enumerate(STRATEGIES.values()):
        for run in range(2):
            xs, errors = (
                x[run].double(),
                (x[run].double() @ theta[s, 0, run].double() - y[run].double()).tolist(),
            )
            losses = [e**2 / 2 for e in errors]
            low, high = min(losses), max(losses)
            h = torch.tensor(
                [(2 * v - low - high) / (high - low) for v in losses], dtype=torch.float64
            )
            scores = [math.exp(v / 0.4) for v in f(h, 1.0).tolist()]
            want = sum(
                v / sum(scores) * e * row for v, e, row in zip(scores, errors, xs, strict=True)
            )
            torch.testing.assert_close(got[s, 0, run].double(), want, rtol=1e-4, atol=1e-5)


def test_same_start_and_same_data():
    """With r = infinity all strategies are uniform: on the same samples they coincide."""
    lr = torch.full((len(STRATEGIES), 1), 0.1)
    result = train(replace(BASE, d=6, r=1e9), lr, runs=3, steps=20, seed=0)
    losses = result.losses
    torch.testing.assert_close(losses[0], torch.full_like(losses[0], START))
    torch.testing.assert_close(losses, losses[:, :1].expand_as(losses), rtol=1e-3, atol=1e-6)
    assert losses[-1].max() < 0.2 and result.gain.max() <= 1 + 1e-5
    assert abs(result.effective[:10].mean() - 1) < 0.2
    other = train(replace(BASE, d=6), lr, runs=3, steps=20, seed=0).losses
    again = train(replace(BASE, d=6), lr, runs=3, steps=20, seed=0).losses
    assert torch.equal(other[:, 0], again[:, 0])  # seeded
    assert (other[-1, 1:] - other[-1, :1]).abs().min() > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_test_loss_is_of_the_training_distribution(name):
    """The exact test loss has the covariance of the samples; labels are x theta_true and noise."""
    setting, generator = SETTINGS[name], torch.Generator().manual_seed(0)
    theta_true = torch.randn(2000, setting.d, generator=generator)
    x, y = setting.draw(theta_true, generator)
    assert x.shape == (2000, G, setting.d)
    torch.testing.assert_close((x**2).mean((0, 1)), setting.covariance(), rtol=0.15, atol=0.0)
    variance = (y - torch.einsum("rgd,rd->rg", x, theta_true)).var().item()
    assert math.isclose(
        variance, setting.noise**2 + 25 * setting.corrupt, rel_tol=0.15, abs_tol=1e-8
    )


def test_steps_and_verdict():
    losses = torch.tensor([[3.0, 3.0, math.nan], [2.0, 1.0, math.nan], [0.5, 2.0, math.nan]])
    assert steps_to(losses, 1.0).tolist() == [2, 1, 3]  # 3: not within 2 steps
    few, many = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([9.0, 9.0, 8.0])
    assert (ahead(few, many), ahead(many, few), ahead(few, few)) == ("yes", "no", "tie")


def test_command(tmp_path):
    out = expect_ok(command(SCRIPT, "--to", tmp_path / "out", "--seeds", 2, "--steps", 4))
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in out and (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    for word in (*SETTINGS, *STRATEGIES):
        assert f"| {word} |" in table
    assert "nan" not in table


def test_errors(tmp_path):
    expect_error(command(SCRIPT, "--seed", 3), "--seed", "--seeds")
    expect_error(command(SCRIPT, "--to", tmp_path, "--seeds", 1), "--seeds 1", "at least 2")
    (tmp_path / "file").write_text("")
    expect_error(command(SCRIPT, "--to", tmp_path / "file"), "--to", "folder")
