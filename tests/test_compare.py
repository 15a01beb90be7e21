"""The intervals and p-values of eval/compare.py: by hand, and how often they are wrong."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.compare import estimate


def documents(nats, targets=None):
    nats = np.asarray(nats, dtype=float)
    targets = np.ones(len(nats)) if targets is None else np.asarray(targets, dtype=float)
    return np.stack([nats, targets], axis=1)


def test_documents_of_one_length_give_students_t():
    values = np.random.default_rng(0).normal(0.3, 1, 12)
    found = estimate([documents(values * 40, np.full(12, 40))])
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert found == pytest.approx((values.mean(), interval.low, interval.high, expected.pvalue))


def test_two_documents_are_enough():
    """Of the same length: one degree of freedom. Fewer give no interval."""
    found = estimate([documents([1.0, 1.5])])
    expected = stats.ttest_1samp([1.0, 1.5], 0)
    interval = expected.confidence_interval()
    assert found == pytest.approx((1.25, interval.low, interval.high, expected.pvalue))


def test_a_lower_loss_is_as_significant_as_a_higher_one():
    """Differences of the opposite sign: the mirrored interval and the same p."""
    values = np.random.default_rng(2).normal(0.3, 1, 12)
    above, below = estimate([documents(values)]), estimate([documents(-values)])
    assert below == pytest.approx((-above.mean, -above.high, -above.low, above.p))


def test_two_domains_give_welchs_t():
    """The average of two domains is half a difference: that of a domain and the other, negated."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 1, 5), rng.normal(0, 3, 20)
    found = estimate([documents(a), documents(b)])
    expected = stats.ttest_ind(a, -b, equal_var=False)
    interval = expected.confidence_interval()
    by_hand = ((a.mean() + b.mean()) / 2, interval.low / 2, interval.high / 2, expected.pvalue)
    assert found == pytest.approx(by_hand)


def test_documents_of_different_lengths_by_hand():
    """Against a loop that leaves one document out at a time."""
    nats, targets = np.array([3.0, 10.0, 4.0, 20.0]), np.array([1.0, 4.0, 2.0, 5.0])
    found = estimate([documents(nats, targets)])
    mean = nats.sum() / targets.sum()
    without = [(nats.sum() - nats[k]) / (targets.sum() - targets[k]) for k in range(len(targets))]
    error = math.sqrt(3 / 4 * sum((value - mean) ** 2 for value in without))
    df = 46**2 / (1 + 256 + 16 + 625) - 1
    half = stats.t(df).ppf(0.975) * error
    assert found[:3] == pytest.approx((mean, mean - half, mean + half))
    assert found.p == pytest.approx(2 * stats.t(df).sf(mean / error))


@pytest.mark.parametrize(
    "domains",
    [
        [documents([3.0])],  # one document
        [documents([3.0, 0.1], [1000, 1])],  # nearly one
        [documents(np.arange(50.0)), documents([3.0])],  # in one of the domains
        [documents(np.zeros(50)), documents([0.0, 0.0], [1000, 1])],  # of two equal models
    ],
)
@pytest.mark.filterwarnings("error")  # of NumPy, of a division by 0
def test_too_few_documents_give_no_interval(domains):
    found = estimate(domains)
    assert math.isfinite(found.mean)
    assert all(map(math.isnan, (found.low, found.high, found.p)))


def test_equal_models_are_equal():
    found = estimate([documents(np.zeros(9), np.arange(1, 10))])
    assert found == (0, 0, 0, 1)


def in_two_forms(short: int, full: int):
    return pytest.mark.parametrize("repeats", [short, pytest.param(full, marks=pytest.mark.long)])


def window_differences(rng, n_windows: int, per_document: int) -> np.ndarray:
    """Two equal models: differences per window, alike within a document; (K, 2) documents."""
    starts = np.arange(0, n_windows, per_document)
    targets = np.diff(starts, append=n_windows)
    nats = [rng.normal(0, 0.02, n).sum() + n * rng.normal(0, 0.02) for n in targets]
    return documents(nats, targets)


# Windows of a domain and of a document.
SHAPES = [(283, 40), (700, 40), (600, 200), (500, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@in_two_forms(400, 1000)
def test_equal_models_seldom_differ(shape, repeats):
    """One false alarm in twenty, for one domain and for the average of seven."""
    rng = np.random.default_rng(1)
    for n_domains in (1, 7):
        ps = []
        for _ in range(repeats):
            domains = [window_differences(rng, *shape) for _ in range(n_domains)]
            ps.append(estimate(domains).p)
        assert 0.03 <= np.mean(np.array(ps) < 0.05) <= 0.07


@in_two_forms(400, 2000)
def test_intervals_cover_with_documents_of_all_lengths(repeats):
    rng, held = np.random.default_rng(6), 0
    for _ in range(repeats):
        targets = rng.lognormal(5, 1, 60)
        means = 3 + rng.normal(0, 0.3, 60)
        found = estimate([documents(means * targets, targets)])
        held += found.low < 3 < found.high
    assert held / repeats >= 0.93
