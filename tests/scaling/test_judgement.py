"""Sensitivity, influence, thresholds, IsoFLOP: what is said about a single fit."""

import numpy as np
import pytest
from conftest import DATA, ladder_rows

from scaling import Runs, fit
from scaling.fitting.approaches import envelope, isoflop
from scaling.fitting.sensitivity import (
    CUSTOMARY_DELTA,
    delta_from_noise,
    influence,
    objective_text,
    robust_delta,
    sensitivity,
)
from scaling.fitting.solve import objective_named

SIX = tuple(np.geomspace(1e6, 1e8, 6))
RATIOS = (5, 10, 20, 40, 80)


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


def test_envelope_keeps_the_best_of_each_budget_that_no_cheaper_budget_beats():
    flops, loss = np.array([1e18, 2e18, 3e18, 4e18]), np.array([4.0, 4.2, 3.5, 3.6])
    assert envelope(flops, loss).tolist() == [0, 2]


def test_the_order_of_rows_decides_nothing_on_the_envelope():
    """Runs of one budget, as an IsoFLOP table has them: the best of each is on the envelope, wherever it stands."""
    flops = np.repeat([1e18, 1e19, 1e20], 4)
    loss = np.array([3.3, 3.1, 3.2, 3.4, 2.9, 2.7, 2.8, 3.0, 2.5, 2.4, 2.6, 2.8])
    for order in (np.arange(12), np.arange(12)[::-1], np.random.default_rng(0).permutation(12)):
        assert sorted(order[envelope(flops[order], loss[order])].tolist()) == [1, 5, 9]
