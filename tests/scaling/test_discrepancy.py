"""The misfit's covariance, and that its features are that covariance."""

import numpy as np
import pytest

from scaling.ensemble.discrepancy import (
    ELL,
    KAPPA,
    LATENTS,
    RHO,
    RUN,
    TAU,
    TRUNK,
    Basis,
    Nearness,
    Points,
    physical,
)

RNG = np.random.default_rng(0)
POINTS = Points(RNG.uniform(-1.5, 1.5, (12, 2)), np.arange(12) % 2)


def hyper(**values):
    h = physical(np.zeros((1, LATENTS)))
    for name, value in values.items():
        h[0, {"tau": TAU, "ell": ELL, "rho": RHO, "kappa": KAPPA}[name]] = value
    return h


@pytest.mark.parametrize(
    "values", [{"tau": 0.01, "kappa": 0}, {"tau": 0, "kappa": 0.01}, {"tau": 0.004, "kappa": 0.003}]
)
def test_features_have_the_covariance_that_is_written_down(values):
    """On average over frequencies; a draw of weights is then a draw of the process."""
    h = hyper(**values)
    exact = Nearness.between(POINTS, POINTS).covariance(h)[0]
    rng = np.random.default_rng(1)
    found = np.mean([(f := Basis(h[0], 2, 2, rng).at(POINTS)) @ f.T for _ in range(200)], axis=0)
    np.testing.assert_allclose(found, exact, atol=0.04 * exact.max())


def test_families_have_a_part_in_common_and_the_rest_apart():
    h = hyper(tau=0.01, kappa=0.0, rho=0.3)
    same = Points(np.zeros((2, 2)), np.array([0, 1]))
    covariance = Nearness.between(same, same).covariance(h)[0]
    assert covariance[0, 1] / covariance[0, 0] == pytest.approx(0.3)


def test_the_walk_is_that_of_an_integrated_random_walk_from_the_middle():
    """Integral of (x - t)(y - t) from 0 to the nearer of x and y on one side; nothing across the middle."""
    one, two = Points(np.array([[0.7]]), np.zeros(1)), Points(np.array([[1.6], [-0.7]]), np.zeros(2))
    t = np.linspace(0, 0.7, 100_001)
    expected = np.trapezoid((0.7 - t) * (1.6 - t), t)
    np.testing.assert_allclose(Nearness.between(one, two).walk[0], [expected, 0], rtol=1e-6)


def test_where_runs_scatter_more_trunks_are_expected_to():
    """An absolute scale would take a noisy ladder's trunks for quiet, and its intervals of rho would be too narrow."""
    z, found = np.random.default_rng(0).normal(size=(64, LATENTS)), []
    for run in (-1.0, 0.0, 1.5):
        z[:, RUN] = run
        found.append(physical(z)[:, [RUN, TRUNK]])
    quiet, usual, loud = found
    np.testing.assert_allclose(quiet[:, 1], usual[:, 1])
    np.testing.assert_allclose(loud[:, 1] / usual[:, 1], loud[:, 0] / usual[:, 0])
    assert 0.5 < np.median(usual[:, 1] / usual[:, 0]) < 1.0


def test_half_of_the_misfit_errs_alike_along_whole_sizes_and_budgets():
    """Runs of one size far apart in tokens, or of one budget far apart in size, share a quarter of the variance."""
    h = hyper(tau=0.01, kappa=0.0, ell=0.3)
    far = Points(np.array([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]]), np.zeros(4))
    share = Nearness.between(far, far).covariance(h)[0, 0] / 1e-4
    np.testing.assert_allclose(share, [1.0, 0.25, 0.25, 0.0], atol=1e-12)


def test_without_a_misfit_there_is_none():
    h = physical(np.random.default_rng(0).normal(size=(5, LATENTS)), misfit=False)
    assert not h[:, [TAU, KAPPA]].any()
    assert (h[:, :3] > 0).all()


def test_a_law_that_misses_inside_is_trusted_less_outside():
    z = np.zeros((2, LATENTS))
    z[1, TAU] = 2.0
    drift = physical(z)[:, KAPPA]
    assert drift[1] > 2 * drift[0]
