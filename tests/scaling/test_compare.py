"""Two families: frontier, difference, crossover, words."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ladder_rows, write_csv

from scaling import Runs, ScalingError, compare
from scaling.laws.forms import Chinchilla
from scaling.report import interactive
from scaling.report.plot import difference_figure, runs_figure
from scaling.report.views import difference_view, runs_views, segments
from scaling.verdict.compare import contrast, joint_draws
from scaling.verdict.crossing import crossover
from scaling.ensemble.frontier import Cost, frontier
from scaling.verdict.nested import nested
from scaling.verdict.words import ranking, verdict

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


def test_a_known_crossing_moves_with_what_a_family_pays():
    """Transformer++ pays 1.3 times 6 N D, so that its frontier at C is the one it would have at C / 1.3."""
    truth, factor = crossing_truth(1e21), 1.3

    def best(family, flops):
        floor, a, b, alpha, beta = truth[family]
        n = np.geomspace(1e3, 1e13, 20_001)
        return (floor + a / n**alpha + b / (flops / 6 / n) ** beta).min()

    budgets = np.geomspace(1e18, 1e22, 801)
    ahead = [best("matmul-free", c) < best("transformer++", c / factor) for c in budgets]
    expected = budgets[ahead.index(True)]
    assert expected < 0.3e21
    own = {"matmul-free": (tuple(np.geomspace(2e6, 5e8, 7)), (10, 30, 60))}
    for designs in ({}, own):
        rows = ladder_rows(SIZES, (5, 20, 80), 1e-6, truth=truth, factors={"transformer++": factor}, designs=designs)
        c = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=20)
        assert c.draws.paired is not bool(designs)
        assert np.log10(c.crossover.estimate) == pytest.approx(np.log10(expected), abs=0.02)


def test_a_law_without_a_floor_shares_nothing_unless_told_to(wide_ladder):
    c = compare(wide_ladder, "transformer++", "matmul-free", draws=5, law="kaplan")
    assert c.fit.share == ()
    assert compare(wide_ladder, "transformer++", "matmul-free", draws=5).fit.share == ("E",)
    with pytest.raises(ScalingError, match="cannot share 'E'"):
        compare(wide_ladder, "transformer++", "matmul-free", ("E",), draws=5, law="kaplan")


def test_parallel_laws_do_not_cross():
    truth = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 220.0, 420.0, 0.34, 0.37)}
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), truth=truth, noise=1e-4)
    c = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=300, horizon=1e22)
    assert c.crossover.p_none > 0.95
    assert np.isinf(c.crossover.high)
    assert (c.p_b_better < 0.05).all()


def test_a_lead_that_is_lost_is_the_headline():
    """The second family leads first; that it "does not overtake" would hide the crossing."""
    rows = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), truth=crossing_truth(1e19), noise=1e-4)
    runs = Runs.from_rows(rows)
    gained = compare(runs, "transformer++", "matmul-free", draws=100)
    lost = compare(runs, "matmul-free", "transformer++", draws=100)
    assert lost.crossover.p_reverse > 0.95
    said = verdict(lost)[0]
    low, high = np.quantile(lost.crossover.lost, [0.025, 0.975], method="nearest")
    assert f"leads at first and is overtaken by matmul-free between {low:.1e} and {high:.1e} FLOP" in said
    assert "within the measured range" in said
    assert np.log10([low, high]) == pytest.approx(np.log10([gained.crossover.low, gained.crossover.high]), abs=0.05)
    some = replace(lost.crossover, p_reverse=0.3)
    assert verdict(replace(lost, crossover=some))[0].endswith(
        "In 30% of the draws transformer++ leads at first and matmul-free overtakes it."
    )


def test_budgets_that_one_family_never_saw_are_not_measured():
    small = {"matmul-free": (tuple(np.geomspace(1e6, 5e6, 5)), (5, 20))}
    rows = ladder_rows(np.geomspace(1e8, 1e9, 5), (5, 20, 80), 1e-3, designs=small)
    c = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=20)
    assert not c.overlap
    assert not c.within.any()
    said = verdict(c)
    assert any("No budget was measured for both families: the runs of one end at 3.0e+15 FLOP" in s for s in said)
    assert not any("the largest measured" in s or "over the measured range" in s for s in said)
    view = difference_view(c)
    assert not view.measured.any()
    shared = {"matmul-free": (tuple(np.geomspace(1e6, 2e8, 5)), (5, 20))}
    rows = ladder_rows(np.geomspace(1e8, 1e9, 5), (5, 20, 80), 1e-3, designs=shared)
    c = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=20)
    assert c.measured == pytest.approx((6 * 5 * 1e8**2, 6 * 20 * 2e8**2))


def test_losses_in_bits_per_byte_are_never_called_nats():
    rows = [row | {"loss_unit": "bits per byte"} for row in ladder_rows(noise=0.003)]
    runs = Runs.from_rows(rows)
    c = compare(runs, "transformer++", "matmul-free", draws=20)
    labels = [axes.get_ylabel() for view in [difference_view(c)] for axes in difference_figure(view).axes]
    labels += [axes.get_ylabel() for axes in runs_figure(runs_views(runs), "flops").axes]
    labels.append(interactive.difference_figure(difference_view(c)).layout.yaxis.title.text)
    said = [*verdict(c), *labels]
    assert not [line for line in said if "nats" in line]
    assert sum("bits per byte" in line for line in said) >= 5
    nats = compare(Runs.from_rows(ladder_rows(noise=0.003)), "transformer++", "matmul-free", draws=20)
    assert sum("nats" in line for line in verdict(nats)) >= 2


def test_a_horizon_below_the_dearest_run_is_refused():
    runs = Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 20, 80)))
    with pytest.raises(ScalingError, match=r"the horizon 1e\+16 lies below the dearest run"):
        compare(runs, "transformer++", "matmul-free", draws=20, horizon=1e16)


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


def test_bits_per_byte_compare_over_different_tokenizers(tmp_path):
    rows = [row | {"tokenizer": row["family"], "bpb": row["loss"], "loss_unit": "nats"} for row in ladder_rows()]
    table = write_csv(tmp_path / "runs.csv", rows)
    runs = Runs.read(table, columns={"loss": "bpb"})
    assert runs.kinds("loss_unit") == ["bits per byte"]
    compare(runs, "transformer++", "matmul-free", draws=10)


@pytest.mark.parametrize("name", ["loss_unit", "flops_rule", "embedding_counted", "val_set"])
def test_families_counted_or_measured_differently_are_refused(name):
    truth = {"transformer++": "true", "matmul-free": "false"}
    rows = [row | {name: truth[row["family"]]} for row in ladder_rows()]
    with pytest.raises(ScalingError, match=f"differ in {name}"):
        compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=10)


def test_unknown_family_names_the_nearest(wide_ladder):
    with pytest.raises(ScalingError, match="did you mean 'matmul-free'"):
        compare(wide_ladder, "transformer++", "matmulfree", draws=10)


@pytest.fixture(scope="module")
def three():
    """Three families: the third is the first with half-worth parameters."""
    truth = {"a": (1.8, 180.0, 420.0, 0.34, 0.37), "b": (1.8, 320.0, 420.0, 0.37, 0.37)}
    truth["c"] = (1.8, 180.0 * 0.5**-0.34, 420.0, 0.34, 0.37)
    return Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 20, 80), truth=truth, noise=0.001))


def test_one_joint_fit_serves_every_pair_and_axis(three):
    """The differences of three families add up draw by draw, which separate fits of pairs could not promise."""
    joint = joint_draws(three, ("E",), draws=100)
    ab, bc, ac = (contrast(joint, *pair).difference_draws for pair in (("a", "b"), ("b", "c"), ("a", "c")))
    np.testing.assert_allclose(ab + bc, ac, atol=1e-9)
    assert contrast(joint, "a", "b", "flops-6nd").draws is joint
    chances = ranking(joint, ["a", "b", "c"])[0]
    assert chances.startswith("Of 3 families")
    assert sum(float(part.split()[-1]) for part in chances.rstrip(".").split(": ")[1].split(", ")) == pytest.approx(1)


def test_gates_of_a_pair_leave_the_other_families_out(three):
    c = contrast(joint_draws(three, ("E",), draws=20), "a", "c")
    assert not [g.name for g in c.gates if "[b]" in g.name]
    assert {"ladder [a]", "ladder [c]"} <= {g.name for g in c.gates}


def test_nested_models_take_every_family(three):
    large = three.select(three["N"] > 1e7)
    found = nested(large, ["a", "b", "c"], draws=100)
    assert set(found.efficiencies) == {"b", "c"}
    _, low, high = found.efficiencies["c"]
    assert low < 0.5 < high
    assert high / low < 1.3
    assert nested(large.select(large["family"] != "b"), ["a", "c"], draws=100).chosen.name == "M1"
    assert [s.parameters for s in found.steps] == [5, 7, 9, 13, 15]
    assert found.chosen.name in ("M2", "M3")


def test_measured_range_and_sizes_bound_what_is_drawn_solid(small_ladder):
    """Ratios of 10-40 at four sizes: the best allocation of the larger budgets asks for sizes beyond the largest."""
    c = compare(small_ladder, "transformer++", "matmul-free", draws=50)
    view = difference_view(c)
    best = {f: np.exp(c.frontiers[f].log_n[0][: len(view.flops)]) for f in (c.a, c.b)}
    top = small_ladder["N"].max()
    asks_too_much = (best[c.a] > 1.1 * top) | (best[c.b] > 1.1 * top)
    assert asks_too_much.any()
    assert not view.measured[asks_too_much].any()
    assert not view.measured[view.flops > 1.001 * c.measured[1]].any()
    assert view.measured.any()
    tokens = [np.exp(c.frontiers[f].log_d[0][: len(view.flops)]) for f in (c.a, c.b)]
    asks_too_little = np.minimum(*tokens) < small_ladder["D"].min() / 1.1
    assert (view.measured | asks_too_much | asks_too_little | (view.flops > c.measured[1])).all()
    assert any("the best allocation leaves the ladder" in line for line in verdict(c))


def test_segments_join_and_cover():
    flags = np.array([False, True, True, False, False, True])
    found = segments(flags)
    assert [inside for _, inside in found] == [False, True, False, True]
    assert [list(range(6))[part] for part, _ in found] == [[0, 1], [1, 2], [2, 3, 4, 5], [5]]
