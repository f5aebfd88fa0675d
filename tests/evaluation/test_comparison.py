"""Paired comparisons: McNemar's test and bootstrap intervals against what can be computed otherwise."""

import numpy as np
import pytest
from scipy import stats

from mmfree_jax.evaluation.comparison import average, mcnemar, paired


def test_mcnemar_is_the_exact_binomial_test_of_items_that_one_side_alone_gets_right():
    first, second = np.array([1] * 9 + [0] * 2 + [1] * 30 + [0] * 30), np.array([0] * 9 + [1] * 2 + [1] * 30 + [0] * 30)
    assert mcnemar(first, second) == (9, 2, pytest.approx(2 * stats.binom.cdf(2, 11, 0.5)))
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_the_interval_of_independent_items_is_that_of_their_mean():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.2, 1, 900), rng.normal(0, 1, 900)
    found, error = paired(first, second), (first - second).std() / 30
    assert found.difference == pytest.approx((first - second).mean())
    for bound, sign in ((found.low, -1), (found.high, 1)):
        assert bound == pytest.approx(found.difference + sign * 1.96 * error, abs=0.15 * error)
    assert found.p is None  # these are no rights and wrongs


def test_items_of_one_document_are_drawn_together():
    """Ten copies of an item say no more than one."""
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    once = paired(first, second)
    again = paired(np.repeat(first, 10), np.repeat(second, 10), documents=np.repeat(np.arange(200), 10))
    assert (again.items, again.documents) == (2000, 200)
    assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.1)
    naive = paired(np.repeat(first, 10), np.repeat(second, 10))
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_losses_are_ratios_of_sums_over_documents():
    tokens = np.array([10, 1000])
    found = paired(np.array([30.0, 2000.0]), np.array([20.0, 1900.0]), tokens)
    assert (found.first, found.second) == (2030 / 1010, 1920 / 1010)
    assert found.difference == pytest.approx(110 / 1010)
    # Of two documents a draw has both, or one twice: no other ratio can occur.
    assert set(np.round(found.draws, 6)) == {round(x, 6) for x in (110 / 1010, 10 / 10, 100 / 1000)}


def test_families_are_drawn_by_pairs_of_models_too():
    """Three seeds that disagree make an interval that one seed's items alone do not show."""
    rng = np.random.default_rng(3)
    items = rng.normal(0, 0.01, 500)
    effects = np.array([-1.0, 0.0, 1.0])[:, None]
    found = paired(items + effects, np.zeros((3, 500)))
    assert found.difference == pytest.approx(items.mean())
    assert found.low < -0.5 < 0.5 < found.high
    with pytest.raises(ValueError, match=r"shapes \(3, 500\) and \(2, 500\)"):
        paired(items + effects, np.zeros((2, 500)))


def test_an_average_over_tasks_counts_each_the_same():
    rng = np.random.default_rng(4)
    large, small = (paired(rng.integers(0, 2, n), rng.integers(0, 2, n), seed=n) for n in (2000, 50))
    found = average([large, small])
    assert found.difference == pytest.approx((large.difference + small.difference) / 2)
    half = lambda one: (one.high - one.low) / 2
    assert half(found) == pytest.approx(np.hypot(half(large), half(small)) / 2, rel=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held, widths = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        hardness = rng.normal(0, 1, 150)
        first, second = ((hardness + rng.normal(shift, 1, 150) > 0) * 1 for shift in (0.3, 0))
        truth = stats.norm.cdf(0.3 / np.sqrt(2)) - 0.5
        found = paired(first, second, seed=seed)
        held += found.low <= truth <= found.high
        apart = np.hypot(first.std(), second.std()) / np.sqrt(150)
        widths.append((found.high - found.low) / (2 * 1.96 * apart))
    assert 89 <= held <= 99
    assert np.mean(widths) < 0.85  # of what two averages say: what is hard is hard for both
