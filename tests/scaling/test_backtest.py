"""Rolling-origin back-tests: what they hold out, what they earn, and whether it is enough."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS, BackTest, Held, backtest
from scaling.uncertainty.calibration_trial import shares

SIZES = tuple(np.geomspace(1e6, 2.5e8, 7))


def made_up(ratios, decades=0.4):
    return BackTest(tuple(Held(LEVELS, 4.0, "a", str(k), decades, r * 1.959964, 1.0) for k, r in enumerate(ratios)))


def test_factor_is_the_conformal_quantile_and_never_below_one():
    ratios = np.arange(1, 40) / 10
    assert made_up(ratios).factor(LEVELS, 0.4) == (pytest.approx(3.8), 39)  # the 38th of 39: ceil(40 * 0.95)
    assert made_up([0.1] * 30).factor(LEVELS, 0.4)[0] == 1.0
    assert made_up([0.5, 7.0]).factor(LEVELS, 0.4) == (pytest.approx(7.0), 2)  # too few: the largest stands in


def test_no_evidence_no_factor():
    assert np.isnan(BackTest(()).factor(LEVELS, 1.0)[0])
    assert "No back-test" in BackTest((), ("too few",)).sentence(LEVELS)


def test_only_dearer_runs_are_held_out_and_the_difference_is_paired():
    runs = Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=0.002))
    found = backtest(runs, (10.0,), draws=60)
    edge = runs["flops"].max() / 10
    assert {h.run_id for h in found.of(LEVELS)} == set(runs["run_id"][runs["flops"] > edge].tolist())
    assert len(found.of(DIFFERENCE)) == len(found.of(LEVELS)) / 2
    assert all(h.decades > 0 for h in found.of(LEVELS))


def test_errors_common_to_both_families_cancel_from_the_difference():
    rows = ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=0.0005, common=0.01, seed=4)
    found = backtest(Runs.from_rows([row | {"cluster": ""} for row in rows]), (10.0,), draws=60)
    rms = {kind: np.sqrt(np.mean([h.error**2 for h in found.of(kind)])) for kind in (LEVELS, DIFFERENCE)}
    assert rms[DIFFERENCE] < 0.4 * rms[LEVELS]


def test_widened_intervals_hold_what_raw_ones_miss_where_the_law_is_wrong():
    raw, calibrated, count = shares(0.005, ladders=16)
    assert count == 96
    assert raw < 0.8
    assert calibrated > 0.85
