"""Weights against the formulas of the paper, evaluated in float64 and worked by hand."""

import math

import numpy as np
import pytest
import torch

from reweight import STRATEGIES, normalize_losses, sample_weights, weight_statistics

STRATEGY_NAMES = list(STRATEGIES)
SIZES = (1, 2, 3, 7, 32, 48, 512, 4096)


def reference(losses: np.ndarray, strategy: str, r: float, delta: float = 1.0) -> np.ndarray:
    """The formulas sample by sample in float64, written without the code under test."""
    if strategy == "uniform":
        return np.full(len(losses), 1 / len(losses))
    losses = losses.astype(np.float64)
    low, high = losses.min(), losses.max()
    f = []
    for loss in losses:
        h = delta * (2 * loss - high - low) / max(high - low, 1e-6)
        f.append({"linupper": min(h + delta, delta), "quadratic": 1 - h**2 / delta**2, "extremes": abs(h),
                  "upper": (h + delta) / 2}[strategy])
    e = np.exp((np.array(f) - max(f)) / r)
    return e / e.sum()


def loss_vectors(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    return {
        "usual": rng.normal(3, 0.5, n), "equal": np.full(n, 2.7), "nearly equal": 2.7 + rng.normal(0, 1e-6, n),
        "close": 10 + rng.normal(0, 1e-3, n), "huge": rng.uniform(0, 1, n) * 1e30, "tiny": rng.uniform(0, 1, n) * 1e-8,
        "outlier": np.append(rng.normal(3, 0.1, n - 1), 1e4), "tied": rng.integers(0, 3, n).astype(float),
    }


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize("n", SIZES)
def test_weights_equal_the_formulas_in_float64(strategy, n):
    for name, losses in loss_vectors(n).items():
        losses = losses.astype(np.float32)  # the same numbers for both
        for r in (0.01, 0.1, 0.4, 1.0, 10.0, 100.0):
            got = sample_weights(torch.from_numpy(losses), strategy, r)
            assert got.dtype == torch.float32
            error = np.abs(got.double().numpy() - reference(losses, strategy, r)).max()
            assert error <= (1e-6 if r >= 0.1 else 1e-5), (name, r, error)
            assert abs(got.double().sum().item() - 1) < 1e-5


@pytest.mark.parametrize("strategy, expected", [  # losses 1, 2, 3 -> h = -1, 0, 1
    ("uniform", [1, 1, 1]), ("linupper", [1, math.e, math.e]), ("quadratic", [1, math.e, 1]),
    ("extremes", [math.e, 1, math.e]), ("upper", [1, math.exp(0.5), math.e]),
])
def test_worked_by_hand(strategy, expected):
    expected = torch.tensor(expected) / sum(expected)
    torch.testing.assert_close(sample_weights(torch.tensor([1.0, 2.0, 3.0]), strategy, r=1.0), expected)


def test_every_strategy_is_worked_by_hand_or_new():
    assert set(STRATEGY_NAMES) >= {"uniform", "linupper", "quadratic", "extremes", "upper"}


def test_delta_bounds_the_normalised_losses():
    for delta in (0.5, 1.0, 2.0):
        h = normalize_losses(torch.randn(64), delta)
        assert h.min() == -delta and h.max() == delta
    assert not normalize_losses(torch.full((5,), 3.3)).any()


@pytest.mark.parametrize("n", SIZES)
def test_uniform_is_exactly_one_over_n(n):
    weights = sample_weights(torch.randn(n), "uniform", r=0.4)
    assert weights.eq(torch.tensor(1 / n, dtype=torch.float32)).all()


def test_uniform_gradient_is_the_plain_means_bit_for_bit():
    for n in (32, 48):
        x, theta = torch.randn(n, 10), torch.randn(10)
        gradients = []
        for weighted in (True, False):
            p = theta.clone().requires_grad_()
            losses = torch.nn.functional.softplus(x @ p)
            total = (sample_weights(losses, "uniform", 0.4) * losses).sum() if weighted else losses.mean()
            total.backward()
            gradients.append(p.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_weights_carry_no_gradient(strategy):
    losses = torch.randn(8, requires_grad=True)
    assert not sample_weights(losses, strategy, 0.4).requires_grad


def test_statistics():
    losses, weights = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.5, 0.25, 0.25, 0.0])
    s = weight_statistics(losses, weights, torch.tensor([0, 0, 2, 2]), ("a", "b", "c"))
    assert s["loss"] == 3 and s["weighted_loss"] == 1.75 and s["max_weight"] == 2
    assert s["ess"] == pytest.approx(1 / 0.375 / 4)
    assert s["weight_by_domain"] == {"a": 0.75, "c": 0.25} and s["loss_by_domain"] == {"a": 1.5, "c": 4.5}
