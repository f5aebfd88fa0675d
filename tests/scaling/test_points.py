"""Laws of compute, of repetition and of precision, away from the rows they were fitted to: each point keeps its own."""

import json

import numpy as np
import pytest
from conftest import ladder_rows, with_costs, write_csv

from scaling import Runs, ScalingError, compare, fit
from scaling.__main__ import main
from scaling.uncertainty.backtest import backtest
from scaling.uncertainty.bootstrap import bootstrap
from scaling.fitting.sensitivity import influence
from scaling.verdict.compare import contrast, family_frontier, joint_draws
from scaling.costs import available_axes
from scaling.ensemble.frontier import Cost
from scaling.verdict.words import verdict

SIZES, RATIOS = tuple(np.geomspace(1e6, 2.5e8, 7)), (5, 10, 20, 80)
HALF = 15.0  # R* of the data-constrained law


def dear(n):
    """Exact counts: attention and head weigh on small models."""
    return 1 + 0.9 * (n / 1e6) ** -0.25


def cells(**columns):
    """A family without noise on a grid of sizes and ratios; `columns` are functions of the rows' N, D and place."""
    n = np.repeat(SIZES, len(RATIOS))
    d = n * np.tile(RATIOS, len(SIZES))
    given = {name: make(n, d, np.arange(len(n))) for name, make in columns.items()}
    return n, d, given


def of_compute():
    """The loss is a power of the table's own FLOP, which are not 6 N D."""
    n, d, known = cells(flops=lambda n, d, _: 6 * n * d * dear(n))
    return Runs.of(N=n, D=d, loss=1.8 + 800 / known["flops"] ** 0.16, **known)


def repeating(family="all"):
    """At most 2e8 unique tokens: most of the runs see them several times."""
    n, d, known = cells(U=lambda n, d, _: np.minimum(d, 2e8))
    unique = known["U"]
    worth = unique * (1 + HALF * -np.expm1(-(d / unique - 1) / HALF))
    return Runs.of(family, N=n, D=d, loss=1.8 + 180 / n**0.34 + 420 / worth**0.37, **known)


def rounded():
    """Two families, bf16 and ternary weights, one law of the effective size."""
    rows = []
    for family, bits in (("bf16", 16.0), ("ternary", np.log2(3))):
        n, d, _ = cells()
        loss = 1.8 + 180 / (n * -np.expm1(-bits / 2.5)) ** 0.34 + 420 / d**0.37
        rows += list(Runs.of(family, N=n, D=d, loss=loss, precision=family).records())
    return Runs.from_rows(rows)


EVERYTHING = ("E", "A", "B", "alpha", "beta", "gamma")
CASES = {"power-floor": of_compute, "data-constrained": repeating}


@pytest.mark.parametrize("law", CASES)
def test_a_backtest_of_an_exact_law_misses_nothing(law):
    """At 6 N D, or with every token new, the held-out runs would be off by several per cent."""
    found = backtest(CASES[law](), (30.0,), law=law, objective="log-ls", draws=20)
    assert len(found.held) > 5
    np.testing.assert_allclose([h.error for h in found.held], 0, atol=2e-3)


def test_a_backtest_of_a_difference_keeps_each_rows_own_columns():
    """Two families that differ in what they repeat, matched cell by cell."""
    one = list(repeating("a").records())
    two = [r | {"family": "b", "run_id": f"b{k}", "U": r["D"]} for k, r in enumerate(one)]
    for row in two:
        row["loss"] = 1.8 + 180 / row["N"] ** 0.34 + 420 / row["D"] ** 0.37
    rows = [r | {"cluster": ""} for r in (*one, *two)]
    found = backtest(
        Runs.from_rows(rows), (4.0,), ("E", "A", "B", "alpha", "beta", "R_D"), "data-constrained", "log-ls", draws=20
    )
    assert found.of("difference")
    np.testing.assert_allclose([h.error for h in found.of("difference")], 0, atol=5e-3)


def test_what_a_law_depends_on_must_be_given():
    compute, repeats = fit(of_compute(), "power-floor"), fit(repeating(), "data-constrained")
    with pytest.raises(ScalingError, match=r"give its FLOP \(--C\)"):
        compute.predict(1e8, 2e9)
    assert compute.predict(1e8, 2e9, flops=1e19)[0] == pytest.approx(1.8 + 800 / 1e19**0.16, rel=1e-3)
    with pytest.raises(ScalingError, match=r"give the unique tokens \(--U\)"):
        repeats.predict(1e8, 2e9)
    worth = 2e8 * (1 + HALF * -np.expm1(-9 / HALF))
    for unique, tokens in ((2e8, worth), (np.inf, 2e9)):
        expected = 1.8 + 180 / 1e8**0.34 + 420 / tokens**0.37
        assert repeats.predict(1e8, 2e9, unique=unique)[0] == pytest.approx(expected, rel=1e-3)
    drawn = bootstrap(repeats, 5).predict(1e8, 2e9, unique=[2e8, 2e9])
    assert (drawn[:, 0] > drawn[:, 1]).all()


def test_a_family_that_repeats_nothing_needs_not_say_so():
    """Nothing can be said of repetition by its own runs either; with another's worth of it, its tokens count as new."""
    fresh = repeating("fresh")
    fresh = fresh.select(fresh["U"] == fresh["D"])
    with pytest.raises(ScalingError, match="no run repeats its tokens"):
        fit(fresh, "data-constrained")
    both = Runs.from_rows([*fresh.records(), *repeating("scarce").records()])
    joint = fit(both, "data-constrained", "log-ls", share=("E", "A", "B", "alpha", "beta", "R_D"))
    assert joint.predict(1e8, 2e9, "fresh")[0] == pytest.approx(1.8 + 180 / 1e8**0.34 + 420 / 2e9**0.37, rel=1e-3)
    with pytest.raises(ScalingError, match="give the unique tokens"):
        joint.predict(1e8, 2e9, "scarce")


def test_one_precision_tells_nothing_of_what_bits_are_worth():
    with pytest.raises(ScalingError, match=r"a single precision \(bf16\)"):
        fit(rounded().family("bf16"), "precision")
    with pytest.raises(ScalingError, match="a single precision"):
        fit(rounded(), "precision", share=("E",))


def test_influence_enlarges_a_run_with_all_that_belongs_to_it():
    """The point of prediction has ten times the largest run's FLOP, and tokens repeated as often."""
    for law, table in CASES.items():
        change = influence(fit(table(), law, "log-ls"))
        assert np.abs(change).max() < 1e-3


def test_frontiers_are_of_the_familys_own_precision():
    """A ternary weight is worth 1 - exp(-1.585/2.5) of one of unlimited precision, a 16-bit one 1 - exp(-16/2.5)."""
    joint = joint_draws(rounded(), EVERYTHING, 5, law="precision", objective="log-ls")
    for family, bits in (("bf16", 16.0), ("ternary", np.log2(3))):
        found = family_frontier(
            joint.fit, joint.fit.theta[None], family, Cost.of(rounded().family(family)), np.log([1e20])
        )
        n, d = np.exp(found.log_n[0, 0]), np.exp(found.log_d[0, 0])
        expected = 1.8 + 180 / (n * -np.expm1(-bits / 2.5)) ** 0.34 + 420 / d**0.37
        assert found.loss[0, 0] == pytest.approx(expected, rel=1e-4)
        assert joint.fit.predict(n, d, family)[0] == pytest.approx(expected, rel=1e-4)
    assert contrast(joint, "bf16", "ternary").p_b_better.max() == 0.0


def test_a_frontier_of_several_precisions_is_refused():
    rows = [r | {"family": "a" if k % 2 else "b"} for k, r in enumerate(rounded().records())]
    with pytest.raises(ScalingError, match="--column family=precision"):
        compare(Runs.from_rows(rows), "a", "b", EVERYTHING, 5, law="precision")


@pytest.fixture(scope="module")
def by_compute():
    """Two families under a law of compute, with joules that are not proportional to it."""
    rows = with_costs(ladder_rows(SIZES, RATIOS, 1e-3, factors={"transformer++": dear}))
    return joint_draws(Runs.from_rows([r | {"joules": r["flops"] ** 1.1} for r in rows]), law="power-floor", draws=20)


def test_a_law_of_compute_is_compared_in_its_own_flop_alone(by_compute):
    runs = by_compute.fit.runs
    c = contrast(by_compute, "transformer++", "matmul-free")
    for family in (c.a, c.b):
        p = by_compute.fit.family_params(family)
        np.testing.assert_allclose(c.frontiers[family].loss[0], p["E"] + p["A"] / c.budgets ** p["alpha"], rtol=1e-9)
    assert not any("best allocation" in line for line in verdict(c))
    assert available_axes(runs, law=by_compute.fit.law) == ["flops"]
    for axis in ("joules", "flops-6nd", "energy"):
        with pytest.raises(ScalingError, match="knows the table's own FLOP only"):
            contrast(by_compute, "transformer++", "matmul-free", axis)
    with pytest.raises(ScalingError, match="depends on compute alone"):
        contrast(by_compute, "transformer++", "matmul-free", along="ratio=20")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Reports of one family under each of these laws."""
    out = {}
    for law, table in CASES.items():
        folder = tmp_path_factory.mktemp(law)
        noise = np.random.default_rng(0)
        rows = [r | {"loss": r["loss"] * np.exp(1e-5 * noise.normal())} for r in table().records()]
        path = write_csv(folder / "runs.csv", rows)
        assert main(["report", str(path), "--law", law, "--draws", "20", "--out", str(folder / "out")]) == 0
        out[law] = folder / "out"
    return out


@pytest.mark.parametrize(
    ("law", "flags", "expected"),
    [
        ("power-floor", ["--C", "1e19"], 1.8 + 800 / 1e19**0.16),
        ("data-constrained", ["--U", "1e10"], 1.8 + 180 / 1e9**0.34 + 420 / 1e10**0.37),
    ],
)
def test_predict_takes_what_the_law_depends_on(stored, capsys, law, flags, expected):
    asked = ["predict", str(stored[law]), "--N", "1e9", "--D", "1e10", "--json"]
    assert main([*asked, *flags]) == 0
    found = json.loads(capsys.readouterr().out)["all"]
    assert found["loss"] == pytest.approx(expected, rel=2e-3)
    if law == "power-floor":
        assert found["extrapolation"] == pytest.approx(1e19 / of_compute()["flops"].max(), rel=1e-9)
    assert main(asked) == 1
    assert f"({flags[0]})" in capsys.readouterr().err
    assert main([*asked, *flags, "--precision", "int8"]) == 1
    assert "does not depend on it" in capsys.readouterr().err


def test_reports_of_laws_without_an_allocation_have_no_such_figure(stored):
    assert not (stored["power-floor"] / "allocation.png").exists()
    assert (stored["data-constrained"] / "allocation.png").exists()
    assert "Best allocation" not in (stored["power-floor"] / "report.html").read_text()


def test_own_forecasts_of_a_law_of_compute_are_at_its_cost(stored):
    """The next size, at the family's own FLOP per parameter and token; none where repetition is unknown."""
    rows = [json.loads(line) for line in (stored["power-floor"] / "forecast.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["N"] != 1e9]  # that one was asked for by another test
    assert rows
    for row in rows:
        flops = Cost.of(of_compute()).rate(row["N"]) * row["N"] * row["D"]
        assert row["loss"] == pytest.approx(1.8 + 800 / flops**0.16, rel=2e-3)
    asked = (stored["data-constrained"] / "forecast.jsonl").read_text().splitlines()
    assert not [row for row in map(json.loads, asked) if row["N"] != 1e9]
