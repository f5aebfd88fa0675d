"""Profile likelihood of the crossing."""

import numpy as np
import pytest
from conftest import ladder_rows
from test_compare import SIZES, crossing_truth

from scaling import Runs, compare
from scaling.verdict.crossing_profile import Profile, accepted, constrained, profile_crossing, squares

PARALLEL = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 220.0, 420.0, 0.34, 0.37)}


def compared(truth, noise, horizon=None, share=("E",)):
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), truth=truth, noise=noise)
    return compare(Runs.from_rows(rows), "transformer++", "matmul-free", share, draws=200, horizon=horizon)


@pytest.fixture(scope="module")
def crossing():
    return compared(crossing_truth(1e21), 1e-3)


def test_constrained_fits_meet_where_they_are_told_to(crossing):
    """An independent reference: the frontiers of the constrained fits, compared at their budgets."""
    from scaling.verdict.compare import family_frontier

    c, budgets = crossing, np.log([1e20, 1e22])
    target = np.log(c.fit.runs["loss"])[None]
    theta = constrained(c, np.repeat(c.fit.theta[None], 2, axis=0), budgets, target)
    for vector, at in zip(theta, budgets, strict=True):
        ends = [family_frontier(c.fit, vector[None], f, c.costs[f], np.array([at])).loss for f in (c.a, c.b)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    least = squares(c.fit.model, c.fit.theta[None], target)
    assert (squares(c.fit.model, theta, target) > least).all()


def test_constraint_of_no_consequence_changes_nothing(crossing):
    """Held to the crossing that the least-squares fit has anyway, the fit stays as good."""
    profile = profile_crossing(crossing, simulations=60)
    assert profile.ratio.min() < 1e-3
    assert np.isfinite(profile.ratio[np.abs(np.log10(profile.budgets / 1e21)) < 0.5]).all()
    assert profile.low < 1e21 < profile.high
    assert profile.low < profile.one_sided < profile.budgets[np.argmin(profile.ratio)]
    assert profile.bound < profile.critical


def test_only_b_taking_the_lead_counts(crossing):
    """With the families exchanged the same frontiers meet at the same budgets, but the other one falls behind."""
    c = compare(crossing.fit.runs, crossing.b, crossing.a, draws=20)
    profile = profile_crossing(c, simulations=30)
    near = np.abs(np.log10(profile.budgets / 1e21)) < 0.5
    assert np.isinf(profile.ratio[near]).all()


def test_profile_of_a_weak_ladder_has_one_valley(small_ladder):
    """Twelve runs a family leave other valleys to the solver: where an interval could end, the profile has no jumps."""
    c = compare(small_ladder, "transformer++", "matmul-free", draws=20, objective="log-ls")
    profile = profile_crossing(c, simulations=30)
    ratio = np.minimum(profile.ratio, 3 * profile.critical)
    lowest = int(np.argmin(ratio))
    tolerance = 0.02 * profile.critical
    assert (np.diff(ratio[: lowest + 1]) < tolerance).all()
    assert (np.diff(ratio[lowest:]) > -tolerance).all()


def test_parallel_laws_of_precise_runs_leave_no_budget_to_cross_at():
    profile = profile_crossing(compared(PARALLEL, 1e-3, horizon=1e24), simulations=60)
    assert np.isnan([profile.low, profile.high, profile.one_sided]).all()
    assert "no budget" in profile.sentence("A", "B", "FLOP")


def test_parallel_laws_of_noisy_runs_have_no_upper_end():
    profile = profile_crossing(compared(PARALLEL, 1e-2, horizon=1e24), simulations=60)
    assert profile.low > 0
    assert profile.high == np.inf
    assert f"if at all, above {profile.one_sided:.1e} FLOP" in profile.sentence("A", "B", "FLOP")


@pytest.mark.parametrize(
    ("ratio", "low", "high"),
    [
        ([4, 1, 0, 1, 4], np.exp(0.5), np.exp(3.5)),
        ([0, 0, 0, 1, 4], 0.0, np.exp(3.5)),
        ([4, 1, 0, 0, 0], np.exp(0.5), np.inf),
        ([9, 9, 9, 9, 9], np.nan, np.nan),
    ],
)
def test_interval_is_read_off_where_the_root_of_the_ratio_crosses(ratio, low, high):
    """Between roots 1 and 2 the critical 1.5 squared lies half way."""
    found = accepted(np.arange(5.0), np.array(ratio, float), 1.5**2)
    np.testing.assert_allclose(found, (low, high))


def test_sentences_never_name_a_point():
    budgets, ratio = np.array([1e15, 1e20]), np.zeros(2)
    said = [
        Profile(budgets, ratio, 1.0, 0.5, *ends).sentence("A", "B", "FLOP")
        for ends in ((0.0, np.inf, 0.0), (1e18, np.inf, 2e18), (1e18, 1e19, 2e18), (0.0, 1e19, 0.0), (np.nan,) * 3)
    ]
    assert "anywhere from" in said[0]
    assert "if at all, above 2.0e+18" in said[1]
    assert "above 1.0e+18 and below 1.0e+19" in said[2]
    assert "below 1.0e+19" in said[3]
    assert "no budget" in said[4]
