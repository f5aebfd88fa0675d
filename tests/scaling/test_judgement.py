"""Back-test, sensitivity, nested models, IsoFLOP: what is said about a fit beyond the fit."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import DATA, ladder_rows

from scaling import Runs, fit
from scaling.fitting.approaches import envelope, isoflop
from scaling.fitting.solve import objective_named
from scaling.laws.forms import law_named
from scaling.report.forecast import Forecaster
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS, BackTest, Held, backtest
from scaling.fitting.sensitivity import (
    CUSTOMARY_DELTA,
    delta_from_noise,
    influence,
    objective_text,
    robust_delta,
    sensitivity,
)
from scaling.verdict.nested import nested

SIX = tuple(np.geomspace(1e6, 1e8, 6))
RATIOS = (5, 10, 20, 40, 80)
BASE = (1.8, 180.0, 420.0, 0.34, 0.37)


def held(ratio, decades, kind=LEVELS):
    return Held(kind, 4.0, "f", "r", decades, ratio * 1.959964 * 0.01, 0.01)


def test_factor_is_the_conformal_quantile_and_never_falls_with_distance():
    points = [held(0.1 * k, 0.3) for k in range(1, 40)] + [held(5.0, 1.4)] * 9
    test = BackTest(tuple(points))
    assert test.factor(LEVELS, 0.3) == (pytest.approx(3.8), 39)  # the ceil(40 * 0.95) = 38th of 39
    assert test.factor(LEVELS, 1.4)[0] == pytest.approx(5.0)
    curve = test.factors(LEVELS, np.linspace(0, 3, 31))
    assert curve[0] == 1.0
    assert (np.diff(curve) >= 0).all()
    assert test.reach(LEVELS) == 1.4


def test_a_forecast_is_widened_by_the_factor_of_its_distance():
    steps = ((0.5, 1.2), (1.0, 1.5), (2.0, 3.0))
    one = Forecaster(law_named("chinchilla"), np.zeros(2), np.zeros(5), np.zeros((1, 5)), 0.0, steps, 1e18, ())
    assert [one.factor(x) for x in (-1.0, 0.0, 0.3, 0.5, 0.7, 2.0, 9.0)] == [1.0, 1.0, 1.2, 1.2, 1.5, 3.0, 3.0]
    assert replace(one, calibration=()).factor(0.7) == 1.0


def test_coverage_counts_points_inside_the_raw_interval():
    test = BackTest((held(0.5, 0.3), held(0.9, 0.3), held(1.1, 0.3), held(3.0, 0.3)))
    assert test.coverage(LEVELS) == 0.5
    assert np.isnan(test.coverage(DIFFERENCE))


def test_true_law_needs_little_widening_and_a_wrong_one_much():
    """Data from a law with a break, fitted with one without, must earn a larger factor than data that obey it."""
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 1e9, 8)), ratios=RATIOS, noise=0.001)
    bent = [row | {"loss": row["loss"] * (1 + 0.02 * np.log10(row["flops"] / 1e15) ** 2)} for row in rows]
    right, wrong = (backtest(Runs.from_rows(r), draws=150) for r in (rows, bent))
    assert right.coverage(LEVELS) > 0.85
    assert wrong.coverage(LEVELS) < right.coverage(LEVELS)
    assert wrong.factor(LEVELS, 1.0)[0] > 1.5 * right.factor(LEVELS, 1.0)[0]


def test_errors_common_to_both_families_cancel_from_the_difference():
    """The same bend in both families spoils the levels far more than their difference."""
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 1e9, 8)), ratios=RATIOS, noise=0.0005)
    bent = [row | {"loss": row["loss"] * (1 + 0.02 * np.log10(row["flops"] / 1e15) ** 2)} for row in rows]
    test = backtest(Runs.from_rows(bent), draws=100)
    level = np.sqrt(np.mean([h.error**2 for h in test.of(LEVELS)])) * 3.0  # log error to nats, at a loss near 3
    difference = np.sqrt(np.mean([h.error**2 for h in test.of(DIFFERENCE)]))
    assert difference < 0.5 * level


def test_ladder_too_small_for_a_backtest_says_so():
    rows = ladder_rows(sizes=(1e6, 2e6, 4e6), ratios=(10, 20), noise=0.001)
    test = backtest(Runs.from_rows(rows), draws=20)
    assert not test.held
    assert "No back-test of the loss is possible" in test.sentence(LEVELS)
    assert "needed" in test.sentence(LEVELS)


def test_epoch_exclusions_move_the_exponent():
    """a_opt .565/.544/.524/.514/.509/.505 without the 0/1/3/5/8/12 highest losses."""
    path = DATA / "epoch_chinchilla" / "svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip("the public Epoch table is not at ../shared/data")
    from scaling.verify import epoch_table

    found = sensitivity(epoch_table(path, dropped=0), top=(1, 3, 5, 8, 12))
    huber = [v.allocation for v in found if v.objective == "huber"][:6]
    assert huber == pytest.approx([0.565, 0.544, 0.524, 0.514, 0.509, 0.505], abs=6e-4)


def test_spoilt_run_is_the_influential_one():
    rows = ladder_rows(sizes=SIX, ratios=RATIOS, noise=0.0005)
    rows[7]["loss"] *= 1.05
    runs = Runs.from_rows(rows).family("transformer++")
    change = influence(fit(runs, objective="log-ls"))
    assert runs["run_id"][np.argmax(np.abs(change))] == rows[7]["run_id"]


def test_robust_delta_tracks_the_noise_not_the_outliers():
    residuals = np.random.default_rng(0).normal(size=2000) * 0.01
    residuals[:100] = 1.0
    assert robust_delta(residuals) == pytest.approx(1.345 * 0.01, rel=0.15)


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 1e-3, 1e-3), (0.006, 0.004, 0.016)])
def test_the_threshold_follows_the_noise_of_a_small_ladder(noise, low, high):
    runs = Runs.from_rows(ladder_rows(sizes=SIX[:4], ratios=RATIOS[:3], noise=noise))
    assert low <= delta_from_noise(runs) <= high


def test_an_objective_in_words_says_where_its_threshold_is_from():
    said = {objective_text(objective_named("huber", delta), found) for delta, found in ((0.01, True), (0.01, False))}
    assert said == {"huber, delta 0.01 from the noise", "huber, delta 0.01 as given"}
    assert objective_text(objective_named("huber", CUSTOMARY_DELTA), True) == "huber, delta 0.001 above the noise"
    assert objective_text(objective_named("raw-ls"), True) == "raw-ls"


@pytest.mark.parametrize("rho", [0.6, 1.0])
def test_parameter_efficiency_is_recovered(rho):
    truth = {"a": BASE, "b": (1.8, 180.0 * rho**-0.34, 420.0, 0.34, 0.37)}
    found = nested(Runs.from_rows(ladder_rows(sizes=SIX, ratios=RATIOS, truth=truth, noise=0.001)), ("a", "b"), 100)
    point, low, high = found.efficiencies["b"]
    assert low < rho < high
    assert high - low < 0.15
    assert found.chosen.name == ("M0" if rho == 1.0 else "M1")
    assert f"worth {point:.2f}" in found.sentence()


def test_an_exponent_of_its_own_rejects_constant_efficiency():
    truth = {"a": BASE, "b": (1.8, 320.0, 420.0, 0.37, 0.37)}
    found = nested(Runs.from_rows(ladder_rows(sizes=SIX, ratios=RATIOS, truth=truth, noise=0.001)), ("a", "b"), 100)
    assert found.steps[1].p_value < 0.05
    assert found.chosen.name == "M2"
    assert "reject" in found.sentence()


def test_isoflop_finds_the_allocation_exponent():
    """A symmetric law (alpha = beta) has N* = C^(1/2) exactly, and its parabolas are unbiased."""
    budgets = np.repeat(np.geomspace(1e18, 1e21, 5), 9)
    n = np.sqrt(budgets / 6 / 20) * np.tile(np.geomspace(0.4, 2.5, 9), 5)
    d = budgets / 6 / n
    found = isoflop(Runs.of(N=n, D=d, loss=1.8 + 400 / n**0.35 + 400 * 20**0.35 / d**0.35))
    assert len(found.curves) == 5
    assert found.exponent_n == pytest.approx(0.5, abs=2e-3)
    assert found.exponent_n + found.exponent_d == pytest.approx(1.0, abs=2e-3)


def test_seeds_of_one_size_do_not_bend_a_parabola():
    n, d = np.repeat([[1e6, 1e7, 1e8]], 4, axis=0), np.geomspace(1, 100, 3)
    tables = [Runs.of(N=n.ravel(), D=(c / 6 / n).ravel(), loss=np.tile([3.1, 3.0, 3.2], 4)) for c in 1e17 * d]
    rows = Runs.of(**{name: np.concatenate([t[name] for t in tables]) for name in ("N", "D", "loss")})
    assert isoflop(rows).curves == ()


def test_envelope_keeps_only_runs_that_no_cheaper_one_beats():
    runs = Runs.of(N=[1e6, 2e6, 3e6, 4e6], D=1e8, loss=[4.0, 4.2, 3.5, 3.6])
    assert envelope(runs).tolist() == [0, 2]
