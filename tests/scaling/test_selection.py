"""Choices by noisy losses are made anew in every draw."""

import numpy as np
import pytest
from conftest import TRUTH

from scaling import Runs, ScalingError, fit
from scaling.uncertainty.bootstrap import bootstrap, interval
from scaling.fitting.selection import chosen, fit_chosen, rate_noise

SIZES, RATIOS, RATES = np.geomspace(1e6, 3e8, 7), (5, 20, 80), 2.0 ** np.arange(-2, 3)
TRUE = TRUTH["matmul-free"]


def true_loss(n, d):
    floor, a, b, alpha, beta = TRUE
    return floor + a / n**alpha + b / d**beta


def sweep(seed, noise=0.004, bend=0.0005):
    """Five learning rates a cell; a rate away from the best costs `bend` of the loss per squared doubling."""
    rng = np.random.default_rng(seed)
    n, ratio, rate = (x.ravel() for x in np.meshgrid(SIZES, RATIOS, RATES, indexing="ij"))
    d = n * ratio
    loss = true_loss(n, d) * np.exp(bend * np.log2(rate) ** 2 + noise * rng.normal(size=len(n)))
    return Runs.of(N=n, D=d, loss=loss, lr=rate * 1e-3)


def coverage(interval_at, ladders=60):
    """Share of ladders whose interval holds the true loss at the largest size, on ten times its tokens."""
    truth = true_loss(SIZES[-1], SIZES[-1] * 800)
    ends = [interval(interval_at(sweep(seed)).predict(SIZES[-1], SIZES[-1] * 800)[:, 0]) for seed in range(ladders)]
    return np.mean([low <= truth <= high for low, high in ends])


def selected_outside(runs):
    winners = runs.select(chosen(runs, "best", runs["loss"][None])[0])
    return bootstrap(fit(winners, objective="log-ls", starts=8), 200)


def test_intervals_that_choose_inside_the_draws_cover_and_those_that_do_not_fail():
    assert coverage(selected_outside) < 0.8
    assert coverage(lambda runs: fit_chosen(runs, "best", 200, objective="log-ls")) >= 0.9


def test_best_and_envelope_choose_what_they_say():
    runs = Runs.of(
        N=[1e6, 1e6, 2e6, 4e6], D=[1e8, 1e8, 1e8, 1e8], loss=[4.0, 3.9, 4.2, 3.5], lr=[1e-3, 2e-3, 1e-3, 1e-3]
    )
    losses = np.array([[4.0, 3.9, 4.2, 3.5], [3.8, 3.9, 3.7, 3.6]])
    assert chosen(runs, "best", losses).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert chosen(runs, "envelope", losses).tolist() == [[True, True, False, True], [True, False, True, True]]
    assert chosen(runs, "all", losses).all()
    with pytest.raises(ScalingError, match="choose from"):
        chosen(runs, "luckiest", losses)


def test_noise_is_measured_on_all_rates_not_on_the_winners():
    size, freedom = rate_noise(sweep(1))
    assert size == pytest.approx(0.004, rel=0.2)
    assert freedom == 2 * len(SIZES) * len(RATIOS)


def test_one_run_a_cell_is_the_plain_fit():
    runs = sweep(2)
    single = runs.select(runs["lr"] == 1e-3)
    assert fit_chosen(single, "best", 50).fit.params == fit(single).params
