"""Two families: frontier, difference, crossover, words."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, ScalingError, compare
from scaling.laws.forms import Chinchilla
from scaling.verdict.crossing import crossover
from scaling.verdict.frontier import Cost, frontier
from scaling.verdict.words import verdict

SIZES = tuple(np.geomspace(1e6, 1e9, 8))


def crossing_truth(at=1e21, alpha=0.34, step=0.06):
    """Two laws that differ in the N term only and cross at compute `at` on their own frontiers."""
    a = {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": alpha, "beta": 0.37}

    def best(coefficient, exponent):
        n = np.geomspace(1e3, 1e13, 20001)
        return (1.8 + coefficient / n**exponent + 420.0 / (at / 6 / n) ** 0.37).min()

    low, high = 180.0, 180.0 * 1e4
    for _ in range(80):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if best(middle, alpha + step) < best(180.0, alpha) else (low, middle)
    own = (1.8, low, 420.0, alpha + step, 0.37)
    return {"transformer++": tuple(a.values()), "matmul-free": own}


def test_frontier_is_the_closed_form():
    """Hoffmann et al. 2022, eq. 4: with C = 6 N D, N* = G (C/6)^a, G = (alpha A / beta B)^(1/(alpha+beta))."""
    law, centre = Chinchilla(), np.array([18.0, 22.0])
    e, a, b, alpha, beta = 1.8, 180.0, 420.0, 0.34, 0.37
    theta = np.array([[np.log(e), np.log(a) - alpha * 18, np.log(b) - beta * 22, alpha, beta]])
    cost = Cost(np.array([18.0]), np.array([np.log(6.0)]))
    log_c = np.log(np.geomspace(1e17, 1e25, 9))
    found = frontier(law, theta, centre, cost, log_c)
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    expected = np.log(g) + beta / (alpha + beta) * (log_c - np.log(6))
    np.testing.assert_allclose(found.log_n[0], expected, atol=1e-5)
    np.testing.assert_allclose(found.log_n + found.log_d + np.log(6), log_c[None], atol=1e-12)


def test_known_crossing_is_found():
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), truth=crossing_truth(1e21), noise=1e-4)
    c = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=300)
    assert c.crossover.low < 1e21 < c.crossover.high
    assert c.crossover.high / c.crossover.low < 30
    assert c.crossover.p_none < 0.01
    assert "overtakes" in verdict(c)[0]
    assert f"{c.crossover.low:.1e}" in verdict(c)[0]


def test_parallel_laws_do_not_cross():
    truth = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 220.0, 420.0, 0.34, 0.37)}
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), truth=truth, noise=1e-4)
    c = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=300, horizon=1e22)
    assert c.crossover.p_none > 0.95
    assert np.isinf(c.crossover.high)
    assert (c.p_b_better < 0.05).all()


def test_draws_that_never_cross_count():
    """Three draws in ten cross; the interval must reach infinity and the share must be told."""
    log_c = np.linspace(0, 10, 11)
    crossing = 5.5 - log_c
    never = np.ones(11)
    always = -np.ones(11)
    reverse = log_c - 4.5
    drawn = np.array([crossing] * 3 + [never] * 5 + [always] + [reverse])
    found = crossover(log_c, crossing[None], drawn)
    assert found.estimate == pytest.approx(np.exp(5.5))
    assert found.high == np.inf
    assert found.low == 0.0
    assert found.p_none == pytest.approx(0.6)
    assert found.p_always == pytest.approx(0.1)
    assert found.p_reverse == pytest.approx(0.1)
    assert found.p_before(np.exp(6)) == pytest.approx(0.4)


def test_small_ladder_determines_no_crossing(small_ladder):
    """Four sizes allow no claim, whatever the fit says."""
    c = compare(small_ladder, "transformer++", "matmul-free", draws=200)
    said = verdict(c)
    assert said[0].startswith("The crossing is not determined")
    assert any("12 of 12 cells" in line for line in said)
    assert {g.name for g in c.gates if not g.passed} >= {"ladder [transformer++]", "ladder [matmul-free]"}


def test_order_of_families_flips_the_sign(wide_ladder):
    one = compare(wide_ladder, "transformer++", "matmul-free", draws=50)
    two = compare(wide_ladder, "matmul-free", "transformer++", draws=50)
    np.testing.assert_allclose(one.difference, -two.difference, atol=1e-6)


def test_nats_over_different_tokenizers_are_refused():
    """Nats over different vocabularies are refused."""
    rows = ladder_rows()
    for row in rows:
        row["tokenizer"] = row["family"]
    with pytest.raises(ScalingError, match="differ in tokenizer"):
        compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=10)


def test_unknown_family_names_the_nearest(wide_ladder):
    with pytest.raises(ScalingError, match="did you mean 'matmul-free'"):
        compare(wide_ladder, "transformer++", "matmulfree", draws=10)
