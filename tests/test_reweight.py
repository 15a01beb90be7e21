"""Weights against the formulas of the paper, evaluated in float64 and worked by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe import TrainConfig
from reweight import (
    NORMS,
    STRATEGIES,
    cap_weights,
    domain_means,
    normalize_losses,
    order_within,
    sample_weights,
    shuffled_order,
    track_domain_losses,
)

STRATEGY_NAMES = list(STRATEGIES)
# Written again from the paper's table, without the code under test. A new strategy is compared
# once it is here.
FORMULAS = {  # top: the h that a third of the batch is above
    "uniform": None,
    "linupper": lambda h, delta, top: min(h + delta, delta),
    "quadratic": lambda h, delta, top: 1 - h**2 / delta**2,
    "extremes": lambda h, delta, top: abs(h),
    "upper": lambda h, delta, top: (h + delta) / 2,
    "band": lambda h, delta, top: (
        min(h + delta, delta) * (1 - max(h - top, 0) / max(delta - top, 1e-6))
    ),
}
SIZES = (1, 2, 3, 7, 32, 48, 512, 4096)


def reference(
    losses: np.ndarray, strategy: str, r: float, delta: float = 1.0, cap: float = 0.0
) -> np.ndarray:
    """The formulas sample by sample in float64, written without the code under test.

    cap: of the weights times N, by moving the surplus of capped samples to the others until none
    is above.
    """
    if strategy == "uniform":
        return np.full(len(losses), 1 / len(losses))
    losses = losses.astype(np.float64)
    low, high = losses.min(), losses.max()
    h = delta * (2 * losses - high - low) / max(high - low, 1e-6)
    top = np.sort(h)[2 * (len(h) - 1) // 3]
    f = [FORMULAS[strategy](value, delta, top) for value in h]
    e = np.exp((np.array(f) - max(f)) / r)
    w, limit = e / e.sum(), cap / len(losses) if cap else 1.0
    capped = np.zeros(len(w), dtype=bool)
    while (w > limit * (1 + 1e-12)).any():
        capped |= w > limit
        w = np.where(capped, limit, e * (1 - limit * capped.sum()) / e[~capped].sum())
    return w


def loss_vectors(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    return {
        "usual": rng.normal(3, 0.5, n),
        "equal": np.full(n, 2.7),
        "nearly equal": 2.7 + rng.normal(0, 1e-6, n),
        "close": 10 + rng.normal(0, 1e-3, n),
        "huge": rng.uniform(0, 1, n) * 1e30,
        "tiny": rng.uniform(0, 1, n) * 1e-8,
        "outlier": np.append(rng.normal(3, 0.1, n - 1), 1e4),
        "tied": rng.integers(0, 3, n).astype(float),
    }


@pytest.mark.parametrize("strategy", FORMULAS)
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


@pytest.mark.parametrize(
    "strategy, expected",
    [  # losses 1, 2, 3 -> h = -1, 0, 1
        ("uniform", [1, 1, 1]),
        ("linupper", [1, math.e, math.e]),
        ("quadratic", [1, math.e, 1]),
        ("extremes", [math.e, 1, math.e]),
        ("upper", [1, math.exp(0.5), math.e]),
        ("band", [1, math.e, 1]),
    ],
)
def test_worked_by_hand(strategy, expected):
    expected = torch.tensor(expected) / sum(expected)
    torch.testing.assert_close(
        sample_weights(torch.tensor([1.0, 2.0, 3.0]), strategy, r=1.0), expected
    )


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("uniform", [0, 0, 0]),
        ("linupper", [0, 1, 1]),
        ("quadratic", [0, 1, 0]),
        ("extremes", [1, 0, 1]),
        ("upper", [0, 0.5, 1]),
        ("band", [0, 1, 0]),
    ],
)
def test_f_by_hand(strategy, expected):
    """A constant added to f changes no weight, but the figure that draws f (eval/plots.py)."""
    h = torch.tensor([-1.0, 0.0, 1.0])
    assert STRATEGIES[strategy](h, 1.0).tolist() == expected


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_float32_for_losses_of_any_precision(strategy, dtype):
    losses = torch.linspace(2, 4, 7).to(dtype)
    weights = sample_weights(losses, strategy, 0.4)
    torch.testing.assert_close(weights, sample_weights(losses.float(), strategy, 0.4))


def test_band_is_linupper_below_the_highest_third():
    losses = torch.linspace(0, 1, 41)
    band, linupper = (sample_weights(losses, name, 0.4) for name in ("band", "linupper"))
    below = losses <= 0.65
    ratio = band[below] / linupper[below]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0].item()))
    assert (band[~below].diff() < 0).all()
    assert band[-1].item() == pytest.approx(band[0].item())  # f is 0 at both ends


def test_a_shuffled_order_is_stable_and_is_one():
    """A golden value: the control of a run must not change with the version of NumPy."""
    assert shuffled_order(6, 42, 3, 0).tolist() == [1, 3, 2, 4, 5, 0]
    orders = {tuple(shuffled_order(5, 42, step, 0)) for step in range(50)}
    assert len(orders) > 30 and all(sorted(order) == list(range(5)) for order in orders)


def test_an_order_within_groups_moves_no_sample_to_another_group():
    group = np.array([2, 0, 1, 0, 2, 2, 0])
    order = shuffled_order(7, 42)
    within = order_within(order, group)
    assert sorted(within) == list(range(7))
    assert (group[within] == group).all()
    for g in range(3):  # each group's samples come as they did
        assert within[group == g].tolist() == [i for i in order if group[i] == g]


def test_delta_bounds_the_normalised_losses():
    for delta in (0.5, 1.0, 2.0):
        h = normalize_losses(torch.randn(64), delta)
        assert h.min() == -delta and h.max() == delta
    assert not normalize_losses(torch.full((5,), 3.3)).any()


@pytest.mark.parametrize("n", SIZES)
def test_uniform_is_exactly_one_over_n(n):
    weights = sample_weights(torch.randn(n), "uniform", r=0.4)
    assert weights.eq(torch.tensor(1 / n, dtype=torch.float32)).all()


def test_a_cap_leaves_uniform_exactly_one_over_n():
    """41 times the nearest float32 to 1 / 41 is not 1, so that the cap would scale the weights."""
    weights = sample_weights(torch.randn(41), "uniform", r=0.4, max_weight=1.5)
    assert weights.eq(torch.tensor(1 / 41, dtype=torch.float32)).all()


def test_uniform_gradient_is_the_plain_means_bit_for_bit():
    for n in (32, 48):
        x, theta = torch.randn(n, 10), torch.randn(10)
        gradients = []
        for weighted in (True, False):
            p = theta.clone().requires_grad_()
            losses = torch.nn.functional.softplus(x @ p)
            total = (
                (sample_weights(losses, "uniform", 0.4) * losses).sum()
                if weighted
                else losses.mean()
            )
            total.backward()
            gradients.append(p.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_weights_carry_no_gradient(strategy):
    losses = torch.randn(8, requires_grad=True)
    assert not sample_weights(losses, strategy, 0.4).requires_grad


losses_of_a_batch = st.lists(st.floats(0, 20, width=32), min_size=2, max_size=40).map(torch.tensor)
strategies, temperatures = (
    st.sampled_from(STRATEGY_NAMES),
    st.sampled_from([0.05, 0.1, 0.4, 1.0, 10.0]),
)
properties = settings(max_examples=60, deadline=None, derandomize=True)


@properties
@given(
    losses_of_a_batch,
    strategies,
    temperatures,
    st.sampled_from(list(NORMS)),
    st.sampled_from([0.0, 1.0, 1.5, 5.0]),
)
def test_weights_are_positive_bounded_and_sum_to_one(losses, strategy, r, norm, max_weight):
    w = sample_weights(losses, strategy, r, norm=norm, max_weight=max_weight)
    assert (w > 0).all() and w.sum().item() == pytest.approx(1, abs=1e-5)
    if max_weight:
        assert w.max().item() * len(losses) <= max_weight * (1 + 1e-6)


@properties
@given(losses_of_a_batch, strategies, temperatures, st.floats(-5, 5), st.floats(0.1, 10))
def test_shifting_and_scaling_all_losses_changes_nothing(losses, strategy, r, shift, scale):
    losses = losses.double()
    if losses.max() - losses.min() < 0.5:  # the shifted float32 losses must still be told apart
        losses[0] += 1.0
    moved = sample_weights(losses * scale + shift, strategy, r)
    # float32 keeps 24 bits of a loss of up to 205; h is off by that, and 1 / r magnifies it
    torch.testing.assert_close(
        moved, sample_weights(losses, strategy, r), atol=1e-5 / r, rtol=1e-4 / r
    )


@properties
@given(
    losses_of_a_batch,
    strategies,
    temperatures,
    st.sampled_from(list(NORMS)),
    st.randoms(use_true_random=False),
)
def test_permuting_the_batch_permutes_the_weights(losses, strategy, r, norm, rng):
    """So no weight depends on the rank that holds the sample: ranks only order the batch."""
    order = torch.tensor(rng.sample(range(len(losses)), len(losses)))
    expected = sample_weights(losses, strategy, r, norm=norm)[order]
    torch.testing.assert_close(
        sample_weights(losses[order], strategy, r, norm=norm), expected, atol=1e-6, rtol=1e-5
    )


@properties
@given(losses_of_a_batch, strategies)
def test_temperature(losses, strategy):
    """Larger r: larger effective sample size, up to the plain mean."""
    weights = [
        sample_weights(losses, strategy, r).double() for r in (0.05, 0.1, 0.4, 1.0, 10.0, 1e6)
    ]
    ess = [1 / (w**2).sum().item() for w in weights]
    assert all(a <= b + 1e-4 for a, b in zip(ess, ess[1:], strict=False))
    torch.testing.assert_close(
        weights[-1], torch.full_like(weights[-1], 1 / len(losses)), atol=1e-6, rtol=0
    )


@properties
@given(losses_of_a_batch, st.sampled_from([1.0, 1.2, 2.0, 7.0]))
def test_capped_weights_are_the_best_ones_under_the_cap(losses, cap):
    """min(cap, scale * w) with one scale for all: what the optimum of the capped problem looks
    like.
    """
    free = sample_weights(losses, "upper", 0.1)
    capped = sample_weights(losses, "upper", 0.1, max_weight=cap)
    np.testing.assert_allclose(
        capped.numpy(), reference(losses.numpy(), "upper", 0.1, cap=cap), atol=1e-5
    )
    below = capped < cap / len(losses) * (1 - 1e-5)
    if below.any():
        ratio = (capped / free)[below]
        assert (
            ratio.max().item() == pytest.approx(ratio.min().item(), rel=1e-4)
            and ratio.min() >= 1 - 1e-5
        )


def test_a_cap_can_feed_weights_of_zero():
    torch.testing.assert_close(
        cap_weights(torch.tensor([1.0, 0.0, 0.0]), 0.5), torch.tensor([0.5, 0.25, 0.25])
    )


@pytest.mark.parametrize("n", [4, 8, 16, 31])
def test_one_corrupt_sample(n):
    """Minmax: one sample of very high loss pushes all others to one end of h, and their weights
    together.

    Quantile: their weights keep their spread, and the corrupt one weighs no more than the highest
    of them.
    """
    losses = torch.linspace(2.5, 3.5, n)
    with_corrupt = torch.cat([losses, torch.tensor([60.0])])
    spread, full = {}, pytest.approx(math.exp(1 / 0.4), rel=1e-4)
    for norm in ("minmax", "quantile"):
        clean, corrupt = (
            sample_weights(x, "linupper", 0.4, norm=norm)[:n] for x in (losses, with_corrupt)
        )
        spread[norm] = [(w.max() / w.min()).item() for w in (clean, corrupt)]
    assert spread["minmax"][0] == full and spread["minmax"][1] < 1.1
    assert spread["quantile"] == [full, full]
    weights = {
        norm: sample_weights(with_corrupt, "upper", 0.4, norm=norm)
        for norm in ("minmax", "quantile")
    }
    assert weights["minmax"][n] > 8 * weights["minmax"][:n].max()
    assert weights["quantile"][n] == weights["quantile"][:n].max()


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize(
    "extreme", [{"r": 3e-39}, {"r": 1e-20, "delta": 1e9}, {"r": 0.4, "delta": 1e-38}]
)
def test_extreme_settings_that_are_allowed_give_finite_weights(strategy, extreme):
    config = TrainConfig(**extreme)
    losses = torch.linspace(1.0, 5.0, 8)
    weights = sample_weights(losses, strategy, config.r, config.delta)
    assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1)


def test_quantile_norm_by_hand():
    """A tenth of the samples is clipped at each end; of fewer than four, none."""
    h = normalize_losses(
        torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0]), norm="quantile"
    )
    assert h.tolist() == pytest.approx([1, -1, -5 / 7, -3 / 7, -1 / 7, 1 / 7, 3 / 7, 5 / 7, 1, -1])
    for few in ([2.0], [1.0, 5.0], [1.0, 2.0, 5.0]):
        assert torch.equal(
            *(normalize_losses(torch.tensor(few), norm=norm) for norm in ("quantile", "minmax"))
        )


@pytest.mark.parametrize("n, clipped", [(4, 1), (10, 1), (11, 2), (30, 3), (31, 4)])
def test_the_quantile_norm_clips_a_tenth_rounded_up_at_each_end(n, clipped):
    h = normalize_losses(torch.arange(float(n)), norm="quantile")
    assert h.eq(-1).sum() == clipped + 1  # and the lowest that is left
    assert h.eq(1).sum() == clipped + 1


def test_domain_means_are_debiased_running_means():
    state = torch.zeros(2, 3)
    state = track_domain_losses(state, torch.tensor([2.0, 4.0, 8.0]), torch.tensor([0, 0, 2]))
    assert domain_means(torch.zeros(2, 3)).tolist() == [0.0] * 3
    assert domain_means(state).tolist() == [
        3.0,
        pytest.approx(14 / 3),
        8.0,
    ]  # the unseen one: the mean of all
    state = track_domain_losses(state, torch.tensor([6.0]), torch.tensor([0]))
    expected = (0.95 * 6 + 6) / (0.95 * 2 + 1)
    assert domain_means(state)[[0, 2]].tolist() == pytest.approx([expected, 8.0])
