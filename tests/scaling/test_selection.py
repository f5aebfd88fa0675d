"""Choices by noisy losses are made anew in every draw."""

import numpy as np
import pytest
from conftest import TRUTH

from scaling import Runs, ScalingError, analyse, fit
from scaling.fitting.selection import chosen, rate_noise, selected

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


def test_the_luck_of_the_choice_is_taken_off():
    """The lowest of five noisy losses lies below its cell's best; on average the corrected ones do not."""
    bias = {"raw": [], "corrected": []}
    for seed in range(30):
        runs = sweep(seed)
        truth = np.log(true_loss(runs["N"], runs["D"]))
        raw = chosen(runs, "best", runs["loss"][None])[0]
        bias["raw"].append((np.log(runs["loss"]) - truth)[raw].mean())
        found = selected(runs, "best")
        bias["corrected"].append((np.log(found["loss"]) - np.log(true_loss(found["N"], found["D"]))).mean())
    assert np.mean(bias["raw"]) < -0.003
    assert abs(np.mean(bias["corrected"])) < 0.0008


def test_a_forecast_from_chosen_runs_holds_the_truth():
    """At the largest size, on ten times its tokens."""
    n, d = SIZES[-1], SIZES[-1] * 800
    found = [analyse(sweep(seed), select="best", draws=300).predict(n, d) for seed in range(12)]
    assert sum(p.low <= true_loss(n, d) <= p.high for p in found) >= 11


def test_intervals_of_the_best_of_a_sweep_hold_their_estimate_also_where_the_law_fits_badly():
    rng = np.random.default_rng(0)
    runs = sweep(0)
    bent = runs["loss"] * (1 + 0.05 * np.sin(3 * np.log10(runs["N"]))) * np.exp(0.02 * rng.normal(size=len(runs)))
    e = analyse(
        Runs.from_rows([r | {"loss": x} for r, x in zip(runs.records(), bent, strict=True)]), select="best", draws=300
    )
    for p in e.parameters("all"):
        assert p.low <= p.value <= p.high
        assert p.low > 0


def test_best_and_envelope_choose_what_they_say():
    runs = Runs.of(
        N=[1e6, 1e6, 2e6, 4e6], D=[1e8, 1e8, 1e8, 1e8], loss=[4.0, 3.9, 4.2, 3.5], lr=[1e-3, 2e-3, 1e-3, 1e-3]
    )
    losses = np.array([[4.0, 3.9, 4.2, 3.5], [3.8, 3.9, 3.7, 3.6]])
    assert chosen(runs, "best", losses).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert chosen(runs, "envelope", losses).tolist() == [[False, True, False, True], [True, False, True, True]]
    assert chosen(runs, "all", losses).all()
    with pytest.raises(ScalingError, match="choose from"):
        chosen(runs, "luckiest", losses)


def test_noise_is_measured_on_all_rates_not_on_the_winners():
    size, freedom = rate_noise(sweep(1))
    assert size == pytest.approx(0.004, rel=0.2)
    assert freedom == 4 * len(SIZES) * len(RATIOS) - 3


def test_one_run_a_cell_is_left_as_it_is():
    runs = sweep(2)
    single = runs.select(runs["lr"] == 1e-3)
    assert selected(single, "best")["loss"].tolist() == single["loss"].tolist()
    assert fit(selected(single, "all")).params == fit(single).params
