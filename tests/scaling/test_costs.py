"""Cost axes, fixed paths and the break-even price."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, ScalingError, compare
from scaling.costs import Prices, arithmetic_energy, available_axes, axis_cost

BASE = (1.8, 180.0, 420.0, 0.34, 0.34)
RHO = 0.5


@pytest.fixture(scope="module")
def half_worth():
    """A family whose parameters are worth half, with 80 % of its operations ternary."""
    truth = {"a": BASE, "b": (1.8, 180.0 * RHO**-0.34, 420.0, 0.34, 0.34)}
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 1e9, 7)), ratios=(5, 10, 20, 80), truth=truth, noise=2e-4)
    for row in rows:
        ternary = 0.8 if row["family"] == "b" else 0.0
        row |= {"flops_dense": (1 - ternary) * row["flops"], "flops_ternary": ternary * row["flops"], "seconds": 3600.0}
    return Runs.from_rows(rows)


@pytest.fixture(scope="module")
def pair(half_worth):
    return compare(half_worth, "a", "b", draws=300)


def test_constant_efficiency_never_crosses_in_flops_but_wins_in_energy(pair):
    assert pair.crossing().kind == "not before"
    assert pair.difference(1e19).p_better < 0.02
    energy = pair.crossing("energy")
    assert (energy.kind, energy.unit) == ("throughout", "J of arithmetic")


def test_break_even_price_is_the_closed_form(pair):
    """Half the worth of a parameter costs twice the compute at equal loss: 0.2 + 0.8 kappa = 1/2, kappa = 0.375."""
    found = pair.break_even(1e18)
    assert found.share == pytest.approx(0.8, abs=1e-3)
    assert found.low < 0.375 < found.high
    assert found.high - found.low < 0.1
    assert found.low <= found.value <= found.high


def test_break_even_price_takes_the_share_of_the_size_asked_about():
    """Small models do relatively less ternary work. B needs twice A's compute, at half of which it must cost: with the
    share s(N) of the size that it needs, 1 - s + s kappa = 1/2."""

    def share(n):
        return 0.95 - 0.45 * (n / 1e6) ** -0.3

    truth = {"a": BASE, "b": (1.8, 180.0 * RHO**-0.34, 420.0, 0.34, 0.34)}
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 1e9, 9)), ratios=(5, 10, 20, 80), truth=truth, noise=1e-5)
    for row in rows:
        ternary = share(row["N"]) if row["family"] == "b" else 0.0
        row |= {"flops_dense": (1 - ternary) * row["flops"], "flops_ternary": ternary * row["flops"]}
    c = compare(Runs.from_rows(rows), "a", "b", draws=100, share=("E", "B", "alpha", "beta"))
    shares = []
    for budget in (1e15, 1e17, 1e19):
        n = np.exp(c.path("b", np.array([2 * budget])).log_n[0, 0])
        found = c.break_even(budget)
        shares.append(share(n))
        assert found.share == pytest.approx(share(n), abs=0.02)
        assert found.value == pytest.approx((0.5 - (1 - share(n))) / share(n), abs=0.04)
    assert shares[-1] - shares[0] > 0.15


def test_the_price_of_a_family_that_is_worth_less_than_any_price_says_so():
    """Where the rest of B's work alone costs more than A, no price of its ternary operations is low enough."""
    truth = {"a": BASE, "b": (1.8, 180.0 * 0.2**-0.34, 420.0 * 0.2**-0.34, 0.34, 0.34)}
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 1e9, 7)), ratios=(5, 10, 20, 80), truth=truth, noise=1e-4)
    for row in rows:
        ternary = 0.3 if row["family"] == "b" else 0.0
        row |= {"flops_dense": (1 - ternary) * row["flops"], "flops_ternary": ternary * row["flops"]}
    c = compare(Runs.from_rows(rows), "a", "b", draws=100)
    assert c.break_even(1e18).high < 0
    assert any("no price of a ternary operation of b" in line for line in c.verdict())


def test_a_family_without_ternary_operations_has_no_break_even_price(half_worth):
    assert compare(half_worth, "b", "a", draws=10).break_even(1e18) is None


@pytest.mark.parametrize("counts", [None, [*[1e15] * 3, np.nan]], ids=["no column", "a blank"])
def test_nothing_is_said_of_a_price_whose_operations_are_not_counted(half_worth, counts):
    columns = {name: half_worth[name] for name in half_worth.columns if name != "flops_ternary"}
    if counts:
        columns["flops_ternary"] = np.resize(counts, len(half_worth))
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert compare(Runs.from_rows(rows), "a", "b", draws=10).break_even(1e18) is None


def test_fixed_paths_spend_the_budget_and_lose_to_the_best_one(pair):
    budgets = pair.budgets()
    best = pair.frontier("a", budgets)
    for along, name, value in (("ratio=20", "ratio", 20.0), ("size=1e8", "size", 1e8)):
        path = pair.path("a", budgets, along=along)
        n, d = np.exp(path.log_n[0]), np.exp(path.log_d[0])
        np.testing.assert_allclose(6 * n * d, budgets, rtol=1e-9)
        np.testing.assert_allclose(d / n if name == "ratio" else n, value, rtol=1e-9)
        assert (np.median(best, axis=0) <= np.median(pair.frontier("a", budgets, along=along), axis=0) + 5e-3).all()


def test_energy_table_is_editable(half_worth):
    cheap = arithmetic_energy(half_worth)
    dear = arithmetic_energy(half_worth, Prices.of({"ternary": 0.75}))
    np.testing.assert_allclose(dear, 0.75e-12 * half_worth["flops"])
    assert (cheap[half_worth["family"] == "b"] < 0.3 * dear[half_worth["family"] == "b"]).all()
    with pytest.raises(ScalingError, match="no operation class 'quantum'"):
        Prices.of({"quantum": 1.0})


def test_money_is_hours_times_price(half_worth):
    np.testing.assert_allclose(axis_cost(half_worth, "usd", Prices.of(usd_per_hour=2.5)), 2.5)
    with pytest.raises(ScalingError, match="needs a price"):
        axis_cost(half_worth, "usd")


def test_axes_are_those_the_table_can_be_put_on(half_worth):
    assert available_axes(half_worth) == ["flops", "flops-6nd", "energy", "seconds"]
    assert available_axes(half_worth, Prices.of(usd_per_hour=2.0))[-1] == "usd"


def test_axis_without_its_column_is_refused(pair):
    with pytest.raises(ScalingError, match="needs a column 'joules'"):
        pair.difference(1.0, axis="joules")
    with pytest.raises(ScalingError, match="unknown path"):
        pair.difference(1e18, along="ratio=-1")
