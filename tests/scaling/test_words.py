"""Numbers and sentences: no more digits than the interval carries, no more claim than the ensemble."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, analyse
from scaling.ensemble.backtest import BackTest, LeftOut
from scaling.fitting.fit import Gate
from scaling.report.words import backtest_sentence, chance, headline, matched_sentences, rounded, short, verdict


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((3.2614, 2.093, 3.512), "3.3 (2.1 to 3.5)"),
        ((0.02344, 0.0139, 0.0402), "0.023 (0.014 to 0.040)"),
        ((1.78813, 1.75601, 1.81842), "1.788 (1.756 to 1.818)"),
        ((477.2, 380.1, 590.7), "480 (380 to 590)"),
        ((402.0, 0.31, 19023.0), "400 (0.31 to 19000)"),
        ((1.1e6, 9.7e5, 1.3e6), "1.1e+06 (9.7e+05 to 1.3e+06)"),
        ((2.0, 2.0, 2.0), "2 (2 to 2)"),
    ],
)
def test_numbers_have_the_digits_of_their_interval(numbers, said):
    assert rounded(*numbers) == said


def test_signs_are_kept_where_asked_for():
    assert rounded(-0.0131, -0.0204, 0.0012, "+") == "-0.013 (-0.020 to +0.001)"


def test_differences_are_told_on_one_scale_however_skewed():
    assert rounded(0.4702, 0.1094, 0.7969, "+") == "+0.47 (+0.11 to +0.80)"


def test_what_rounds_to_nothing_has_no_sign():
    assert rounded(-0.0002, -0.0081, 0.0042, "+") == "+0.000 (-0.008 to +0.004)"
    assert rounded(-0.0002, -0.0081, 0.0042) == "0.000 (-0.008 to 0.004)"


def test_a_chance_is_never_certain():
    assert [chance(p) for p in (0.0, 0.031, 0.5, 1.0)] == ["< 0.01", "= 0.03", "= 0.50", "> 0.99"]


def test_counts_read_as_people_say_them():
    assert [short(x) for x in (999, 4.1e5, 1.3e9, 2e12)] == ["999", "410k", "1.3B", "2T"]


@pytest.fixture(scope="module")
def wide():
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 2.5e8, 7)), ratios=(5, 10, 20, 80), noise=0.002)
    return analyse(Runs.from_rows(rows), draws=200)


def test_failed_checks_soften_the_headline_and_are_listed_once(wide):
    failed = [
        Gate("duplicates [a]", False, "x"),
        Gate("duplicates [a]", False, "y"),
        Gate("units of N [a]", False, "z"),
    ]
    said = verdict(wide, failed)
    assert said[0].endswith("Provisional: some checks fail.")
    assert "rovisional" not in headline(wide)
    assert "2 checks fail: duplicates [a], units of N [a]." in said


def test_matched_cells_and_frontiers_are_told_apart_and_everything_is_conditional(wide):
    said = wide.verdict()
    assert any("28 of 28 matched cells (N within 1 %, equal D)" in line for line in said)
    assert sum("the frontier of matmul-free minus that of transformer++" in line for line in said) == 2
    assert "conditional on the laws considered" in said[-1]


def test_matched_cells_are_told_from_the_side_of_most(wide):
    """B behind in all but one cell, and ahead in all."""
    gaps = np.append(-0.01, np.full(9, 0.02))
    for sign, said in ((1, "the higher loss in 9 of 10"), (-1, "the lower loss in 9 of 10")):
        rows = ladder_rows(sizes=(1e6, 3e6, 1e7, 3e7, 1e8), ratios=(10, 20), noise=0.0)
        known = {(r["N"], r["D"]): r["loss"] for r in rows if r["family"] == "transformer++"}
        place = {cell: k for k, cell in enumerate(known)}
        for r in rows:
            if r["family"] == "matmul-free":
                r["loss"] = known[r["N"], r["D"]] + sign * gaps[place[r["N"], r["D"]]]
        (line,) = matched_sentences(replace(wide, runs=Runs.from_rows(rows)))
        assert f"matmul-free has {said} matched cells" in line
        ends = sorted((-0.01 * sign, 0.02 * sign))
        assert f"the difference lies between {ends[0]:+.3f} and {ends[1]:+.3f}" in line


def test_sentences_and_tables_give_one_interval(wide):
    edge = wide.measured()[1]
    (row,) = [r for r in wide.table() if r["budget"] == edge]
    d = wide.difference(edge)
    assert (row["low"], row["high"]) == pytest.approx((d.low, d.high), rel=1e-4)


def test_a_family_of_other_sizes_has_no_matched_cells():
    rows = [r | {"N": r["N"] * (1.05 if r["family"] == "matmul-free" else 1)} for r in ladder_rows(noise=0.003)]
    said = analyse(Runs.from_rows(rows), draws=50).verdict()
    assert any("No two runs of the families have equal N" in line for line in said)


def test_a_small_ladder_decides_nothing(wide):
    e = analyse(Runs.from_rows(ladder_rows(noise=0.003)), draws=50)
    assert e.verdict()[0].startswith("Not decided, as the ladder is too small (4 sizes over")


@pytest.mark.parametrize(("inside", "said"), [(4, "too few to validate"), (3, "too few"), (6, "validates 0.3 decades")])
def test_a_backtest_says_what_it_lacks(inside, said):
    points = tuple(LeftOut("loss", 2.0, "a", str(k), 0.3, 2.0, 1.9, 2.1, 2.0) for k in range(inside))
    test = BackTest(points)
    assert said in backtest_sentence(SimpleNamespace(test=test, reach=test.reach))
    outside = tuple(LeftOut("loss", 2.0, "a", str(k), 0.3, 2.0, 1.9, 2.1, 3.0) for k in range(6))
    assert "85% must lie inside" in backtest_sentence(SimpleNamespace(test=BackTest(outside), reach=0.0))
