"""The best size along compute, where every size has its own cost of a parameter and token."""

import numpy as np
import pytest

from scaling import Runs, analyse, fit
from scaling.ensemble.frontier import Cost, frontier


def runs_with_cost(cost):
    rng = np.random.default_rng(0)
    n = np.repeat(np.geomspace(1e7, 3e9, 16), 5)
    d = n * np.tile([2, 8, 20, 80, 200], 16)
    loss = (1.8 + 180 / n**0.34 + 420 / d**0.37) * np.exp(0.002 * rng.normal(size=len(n)))
    return Runs.of(N=n, D=d, loss=loss, flops=cost(n) * n * d)


def slopes(runs):
    """Local exponents of N* in compute."""
    fitted, log_c = fit(runs), np.linspace(np.log(1e17), np.log(1e20), 40)
    best = frontier(fitted.law, fitted.theta[None], fitted.centre, Cost.of(runs), log_c)
    return np.diff(best.log_n[0]) / np.diff(log_c)


def test_constant_cost_gives_the_law_of_hoffmann():
    found = slopes(runs_with_cost(lambda n: 6.0))
    assert found == pytest.approx(0.37 / (0.34 + 0.37), abs=0.03)


def test_costs_that_scatter_from_size_to_size_do_not_pin_the_allocation_to_the_sizes():
    wobble = dict(zip(np.geomspace(1e7, 3e9, 16), np.random.default_rng(1).uniform(-0.06, 0.06, 16), strict=True))
    found = slopes(runs_with_cost(lambda n: 6 * np.exp([wobble[x] for x in n])))
    assert found.min() > 0.4
    assert found.max() < 0.65


def test_smooth_extra_work_of_small_models_is_followed_exactly():
    runs = runs_with_cost(lambda n: 6 * (1 + 30 / n**0.25))
    cost = Cost.of(runs)
    expected = np.log(runs["flops"] / (runs["N"] * runs["D"]))
    np.testing.assert_allclose(np.interp(np.log(runs["N"]), cost.log_n, cost.log_cost), expected, atol=0.01)


def test_an_allocation_is_the_laws_and_pays_for_the_tokens_it_will_serve():
    """Against a search over N by the true law: 6 N D + 2 N T is the budget, and serving makes smaller models best."""
    e = analyse(runs_with_cost(lambda n: 6.0), draws=300)
    n = np.geomspace(1e7, 1e11, 200_001)
    sizes = []
    for serve in (0.0, 1e11, 1e12):
        found = e.allocate(1e21, serve_tokens=serve)
        d = (1e21 - 2 * n * serve) / (6 * n)
        loss = np.where(d > 0, 1.8 + 180 / n**0.34 + 420 / np.maximum(d, 1) ** 0.37, np.inf)
        assert found.N_interval[0] < n[loss.argmin()] < found.N_interval[1]
        assert found.loss_interval[0] < loss.min() < found.loss_interval[1]
        assert 6 * found.N * found.D + 2 * found.N * serve == pytest.approx(1e21, rel=1e-6)
        sizes.append(found.N)
    assert sizes[0] > sizes[1] > sizes[2]
