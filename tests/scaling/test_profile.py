"""Likelihood intervals of parameters, and pure error against lack of fit."""

import numpy as np
import pytest
from conftest import TRUTH, ladder_rows

from scaling import Runs, fit
from scaling.uncertainty.bootstrap import bootstrap
from scaling.uncertainty.profile import profile_intervals
from scaling.fitting.replicates import lack_of_fit

SIZES = tuple(np.geomspace(1e6, 2.5e8, 7))


def family(noise=0.002, seed=0, **changes):
    return Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=noise, seed=seed, **changes)).family(
        "matmul-free"
    )


def test_profile_holds_the_truth_and_agrees_with_the_bootstrap_where_noise_is_small():
    sampled = bootstrap(fit(family()), 500)
    found, drawn = profile_intervals(sampled), sampled.intervals()
    for name, truth in zip(("E", "A", "B", "alpha", "beta"), TRUTH["matmul-free"], strict=True):
        low, high = found[name]
        assert low < truth < high
        assert high - low == pytest.approx(drawn[name][1] - drawn[name][0], rel=0.3)


def test_profile_of_least_squares_agrees_with_student():
    """Straight lines in the logarithms (a power law under log least squares) have exact intervals: Student's."""
    rng = np.random.default_rng(1)
    n = np.geomspace(1e6, 1e9, 12)
    runs = Runs.of(N=n, D=20 * n, loss=60 / (120 * n * n) ** 0.05 * np.exp(0.01 * rng.normal(size=12)))
    fitted = fit(runs, law="power", objective="log-ls")
    low, high = profile_intervals(bootstrap(fitted, 400), simulations=4000)["alpha"]
    x = np.log(runs["flops"]) - np.log(runs["flops"]).mean()
    half = 2.228 * np.sqrt((fitted.residuals() ** 2).sum() / 10 / (x @ x))
    assert (low, high) == pytest.approx((fitted.params["alpha"] - half, fitted.params["alpha"] + half), rel=0.01)


def test_a_floor_that_cannot_be_told_from_zero_has_no_lower_end():
    truth = {"matmul-free": (1e-6, 40.0, 60.0, 0.12, 0.14)}
    runs = Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 20, 80), noise=0.02, seed=2, truth=truth))
    assert profile_intervals(bootstrap(fit(runs), 200), simulations=100)["E"][0] == -np.inf


def test_parameters_that_are_no_coordinate_have_no_profile():
    found = profile_intervals(bootstrap(fit(family(), law="kaplan"), 100), simulations=50)
    assert found["N_c"] is None
    assert found["alpha_N"] is not None


def repeated(misfit, noise=0.003):
    """Three seeds a cell; `misfit` bends the losses in a way that the law cannot follow."""
    rng = np.random.default_rng(3)
    n = np.repeat(SIZES, 12)
    d = n * np.tile(np.repeat([5.0, 10, 20, 80], 3), len(SIZES))
    bend = misfit * np.sin(2 * np.pi * np.log10(n)) * np.cos(2 * np.pi * np.log10(d))
    return Runs.of(
        N=n, D=d, loss=(1.8 + 320 / n**0.36 + 420 / d**0.37) * np.exp(bend + noise * rng.normal(size=len(n)))
    )


def test_lack_of_fit_is_told_from_pure_error():
    good, bad = (lack_of_fit(fit(repeated(size))) for size in (0.0, 0.01))
    assert good.p > 0.05
    assert bad.p < 1e-6
    assert good.pure == pytest.approx(0.003, rel=0.25)
    assert bad.pure == pytest.approx(0.003, rel=0.25)
    assert (bad.pure_freedom, bad.misfit_freedom) == (56, 23)
    assert "the law misses more" in bad.sentence()


def test_no_replicates_no_test():
    assert lack_of_fit(fit(family())) is None


def test_copied_rows_tell_nothing_of_chance():
    copied = family()
    assert lack_of_fit(fit(copied.select(np.tile(np.arange(len(copied)), 2)))) is None
