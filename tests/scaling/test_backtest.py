"""The back-test: what it leaves out, what it validates, and that errors keep their sign and their axis."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, Spec, analyse
from scaling.ensemble.backtest import DIFFERENCE, LOSS, BackTest, LeftOut, differences, losses
from scaling.ensemble.discrepancy import CELL

SIZES = tuple(np.geomspace(1e6, 1e9, 8))


def point(decades, inside, kind=LOSS):
    return LeftOut(kind, 4.0, "f", "r", decades, 3.0, 2.9, 3.1, 3.0 if inside else 3.5)


def test_the_reach_is_as_far_as_the_intervals_held():
    good = [point(0.2, True)] * 6 + [point(0.6, True)] * 6
    assert BackTest(tuple(good)).reach == pytest.approx(0.6)
    assert BackTest((*good, *[point(0.9, False)] * 6)).reach == pytest.approx(0.6)
    assert BackTest((*[point(0.2, False)] * 6, *[point(0.6, True)] * 60)).reach == 0.0
    assert BackTest(tuple(good[:3])).reach == 0.0  # three points validate nothing


def test_coverage_counts_the_points_inside():
    test = BackTest((point(0.3, True), point(0.3, False), point(0.3, True, DIFFERENCE)))
    assert test.coverage(LOSS) == 0.5
    assert test.coverage() == pytest.approx(2 / 3)
    assert np.isnan(BackTest(()).coverage())


@pytest.fixture(scope="module")
def paired():
    rows = ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 40, 80), noise=0.001)
    return analyse(Runs.from_rows(rows), draws=300)


def test_only_dearer_runs_are_left_out_and_differences_are_of_matched_cells(paired):
    top = paired.measured()[1]
    found = [p for p in paired.test.of(LOSS) if p.origin == 10.0]
    dear = paired.runs["run_id"][paired.runs["flops"] > top / 10]
    assert {p.run_id for p in found} == set(dear.tolist())
    assert len([p for p in paired.test.of(DIFFERENCE) if p.origin == 10.0]) == len(dear) / 2
    assert all(p.decades > 0 for p in found)


def test_intervals_of_true_laws_hold(paired):
    assert paired.test.coverage() > 0.9
    assert paired.reach > 1.0


def test_a_left_out_difference_is_b_minus_a_at_its_own_cell(paired):
    """B is worse in every cell by the two laws; sizes and tokens exchanged, or signs, would be off by far more."""
    for p in paired.test.of(DIFFERENCE):
        row = paired.runs.select(paired.runs["run_id"] == p.run_id)
        n, d = float(row["N"][0]), float(row["D"][0])
        law = (1.8 + 320 / n**0.36 + 420 / d**0.37) - (1.8 + 180 / n**0.34 + 420 / d**0.37)
        assert p.observed == pytest.approx(law, abs=0.03)
        assert p.expected == pytest.approx(law, abs=0.1)


def test_a_law_with_a_break_is_validated_less_far():
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), noise=0.0005)
    bent = [r | {"loss": r["loss"] * (1 + 0.4 * max(0, np.log10(r["flops"] / 3e17)) ** 2)} for r in rows]
    right, wrong = (analyse(Runs.from_rows(r), draws=200) for r in (rows, bent))
    assert wrong.reach < right.reach
    assert wrong.test.coverage() < right.test.coverage()


def test_errors_common_to_both_families_cancel_from_the_difference():
    """The same bend in both families spoils the losses far more than their difference."""
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), noise=0.0005)
    bent = [r | {"loss": r["loss"] * (1 + 0.02 * np.log10(r["flops"] / 1e15) ** 2)} for r in rows]
    test = analyse(Runs.from_rows(bent), draws=200).test
    level, gap = (np.sqrt(np.mean([(p.observed - p.expected) ** 2 for p in test.of(k)])) for k in (LOSS, DIFFERENCE))
    assert gap < 0.6 * level


def test_a_backtest_keeps_what_a_law_depends_on():
    """A law of compute, where FLOP are not 6 N D: at 6 N D the left-out runs would be off by several per cent."""
    n = np.repeat(SIZES[:6], 4)
    d = n * np.tile([5, 10, 20, 80], 6)
    flops = 6 * n * d * (1 + 0.9 * (n / 1e6) ** -0.25)
    rng = np.random.default_rng(0)
    loss = (1.8 + 800 / flops**0.16) * np.exp(3e-4 * rng.normal(size=24))
    test = analyse(Runs.of(N=n, D=d, loss=loss, flops=flops), Spec(law="power-floor", draws=200)).test
    assert len(test.points) > 5
    assert max(abs(p.observed / p.expected - 1) for p in test.points) < 0.01


def test_what_matched_runs_have_in_common_widens_no_difference(paired):
    """Noise of cells is in the forecast of a single run, and cancels from that of a difference."""
    h = paired.draws.h.copy()
    h[:, CELL] = 0.05
    shaken = replace(paired, draws=replace(paired.draws, h=h))
    for found, wider in ((differences, False), (lambda e, runs, q: losses(e, runs, e.a, q), True)):
        before, after = (np.array([p.high - p.low for p in found(e, paired.runs, 4.0)]) for e in (paired, shaken))
        assert np.allclose(after, before) != wider
        assert (after > 2 * before).all() == wider
