"""Laws of compute, of repetition and of precision, away from the rows they were fitted to: each point keeps its own."""

import json

import numpy as np
import pytest
from conftest import ladder_rows, with_costs, write_csv

from scaling import Runs, ScalingError, analyse, compare, fit
from scaling.__main__ import main
from scaling.costs import available_axes
from scaling.ensemble.frontier import Cost
from scaling.fitting.sensitivity import influence

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


def noisy(runs, size=3e-4, seed=0):
    rng = np.random.default_rng(seed)
    return Runs.from_rows([r | {"loss": r["loss"] * np.exp(size * rng.normal())} for r in runs.records()])


@pytest.mark.parametrize("law", CASES)
def test_a_backtest_of_an_exact_law_misses_little(law):
    """At 6 N D, or with every token new, the left-out runs would be off by several per cent."""
    found = analyse(noisy(CASES[law]()), law=law, draws=200).test
    assert len(found.points) > 5
    assert max(abs(p.observed / p.expected - 1) for p in found.points) < 0.02


def test_what_a_law_depends_on_must_be_given():
    compute, repeats = fit(of_compute(), "power-floor"), fit(repeating(), "data-constrained")
    with pytest.raises(ScalingError, match=r"give its FLOP \(--C\)"):
        compute.predict(1e8, 2e9)
    assert compute.predict(1e8, 2e9, flops=1e19)[0] == pytest.approx(1.8 + 800 / 1e19**0.16, rel=1e-3)
    with pytest.raises(ScalingError, match=r"give it \(--U\)"):
        repeats.predict(1e8, 2e9)
    worth = 2e8 * (1 + HALF * -np.expm1(-9 / HALF))
    for unique, tokens in ((2e8, worth), (np.inf, 2e9)):
        expected = 1.8 + 180 / 1e8**0.34 + 420 / tokens**0.37
        assert repeats.predict(1e8, 2e9, U=unique)[0] == pytest.approx(expected, rel=1e-3)
    drawn = analyse(noisy(repeating()), law="data-constrained", draws=50)
    assert drawn.predict(1e8, 2e9, U=2e8).low > drawn.predict(1e8, 2e9, U=2e9).high


def test_a_family_that_repeats_nothing_needs_not_say_so():
    """Nothing can be said of repetition by its own runs either; with another's worth of it, its tokens count as new."""
    fresh = repeating("fresh")
    fresh = fresh.select(fresh["U"] == fresh["D"])
    with pytest.raises(ScalingError, match="no run repeats its tokens"):
        fit(fresh, "data-constrained")
    both = Runs.from_rows([*fresh.records(), *repeating("scarce").records()])
    joint = fit(both, "data-constrained", "log-ls", share=("E", "A", "B", "alpha", "beta", "R_D"))
    assert joint.predict(1e8, 2e9, "fresh")[0] == pytest.approx(1.8 + 180 / 1e8**0.34 + 420 / 2e9**0.37, rel=1e-3)
    with pytest.raises(ScalingError, match="depends on U"):
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
    e = compare(noisy(rounded(), 1e-4), "bf16", "ternary", law="precision", share=EVERYTHING, draws=100)
    budget = np.array([1e19])
    for family, bits in (("bf16", 16.0), ("ternary", np.log2(3))):
        path = e.path(family, budget)
        n, d = np.exp(path.log_n[0, 0]), np.exp(path.log_d[0, 0])
        expected = 1.8 + 180 / (n * -np.expm1(-bits / 2.5)) ** 0.34 + 420 / d**0.37
        assert np.median(e.frontier(family, budget)) == pytest.approx(expected, rel=3e-3)
        assert e.predict(n, d, family).loss == pytest.approx(expected, rel=3e-3)
    assert e.difference(1e18).low > 0


def test_a_frontier_of_several_precisions_is_refused():
    rows = [r | {"family": "a" if k % 2 else "b"} for k, r in enumerate(rounded().records())]
    with pytest.raises(ScalingError, match="--column family=precision"):
        compare(Runs.from_rows(rows), "a", "b", share=EVERYTHING, draws=5, law="precision").difference(1e18)


def test_a_law_of_compute_is_compared_in_its_own_flop_alone():
    """Also where joules are not proportional to it."""
    rows = with_costs(ladder_rows(SIZES, RATIOS, 1e-3, factors={"transformer++": dear}))
    runs = Runs.from_rows([r | {"joules": r["flops"] ** 1.1} for r in rows])
    e = analyse(runs, law="power-floor", draws=50)
    assert available_axes(e.runs, law=e.law) == ["flops"]
    assert not any("est allocation" in line for line in e.verdict())
    for axis in ("joules", "flops-6nd", "energy"):
        with pytest.raises(ScalingError, match="knows the table's own FLOP only"):
            e.difference(1e18, axis)
    with pytest.raises(ScalingError, match="depends on compute alone"):
        e.difference(1e18, along="ratio=20")


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
    assert found["loss"] == pytest.approx(expected, rel=4e-3)
    if law == "power-floor":
        assert found["decades"] == pytest.approx(max(0.0, np.log10(1e19 / of_compute()["flops"].max())))
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
        assert row["loss"] == pytest.approx(1.8 + 800 / flops**0.16, rel=3e-3)
    asked = (stored["data-constrained"] / "forecast.jsonl").read_text().splitlines()
    assert not [row for row in map(json.loads, asked) if row["N"] != 1e9]
