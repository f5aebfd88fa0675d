"""Planning: noise, cheapest ladder, value of the next run, power, and the experiment file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ladder_rows, write_csv

from scaling import Runs, ScalingError, compare
from scaling.__main__ import main
from scaling.commands.plan import power_json
from scaling.uncertainty.simulate import Ladder, Noise, draw
from scaling.verdict.assumed import crossing_at, optimal_loss
from scaling.verdict.experiment_file import write_experiment
from scaling.verdict.plan import Pool, Trunk, candidates, cheapest, next_values, noise_of, question
from scaling.verdict.power import designs_of, own_designs, power, truths_of
from scaling.verdict.trials import COSTS, FACTORIAL, PLAN_CASES, PLAN_NOISE, both_ladders, law_fit
from tests.in_process import called

TRUTH = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 320.0, 420.0, 0.365, 0.37)}
PILOT = Ladder(tuple(np.geomspace(1e6, 3e7, 5)), (5, 10, 20, 40))
RATIOS = (5, 10, 20, 40, 80, 160)


def alike(ladder):
    """The same ladder for both families."""
    return dict.fromkeys(TRUTH, ladder.cells)


@pytest.fixture(scope="module")
def pilot():
    runs = draw(TRUTH, PILOT.cells, Noise(0.001, 0.0005), np.random.default_rng(1))
    return compare(runs, "transformer++", "matmul-free", draws=100)


@pytest.fixture(scope="module")
def asked(pilot):
    return question(pilot.fit, noise_of(pilot.fit, misfit=1e-3))


def test_noise_is_estimated_from_the_runs():
    ladder = Ladder(tuple(np.geomspace(1e6, 1e9, 10)), (5, 10, 20, 40))
    runs = draw(TRUTH, ladder.cells, Noise(0.002, 0.004), np.random.default_rng(3))
    found = noise_of(compare(runs, "transformer++", "matmul-free", draws=20).fit)
    assert found.run == pytest.approx(0.002, rel=0.35)
    assert found.trunk == pytest.approx(0.004, rel=0.5)


def test_assumed_laws_cross_where_they_are_told_to():
    first, second = crossing_at(1e22, 0.03).values()
    assert optimal_loss(first, 1e22) == pytest.approx(optimal_loss(second, 1e22), rel=1e-9)
    assert optimal_loss(first, 1e21) < optimal_loss(second, 1e21)
    assert optimal_loss(first, 1e23) > optimal_loss(second, 1e23)


def test_spread_is_the_textbook_one_without_lack_of_fit(pilot):
    """Independent noise: s' (J J' / sigma^2 + I)^-1 s, the posterior under a unit prior."""
    q = question(pilot.fit, Noise(0.01, misfit=1e-12))
    _, jacobian = pilot.fit.model.value_jacobian(pilot.fit.theta[None])
    precision = jacobian[0] @ jacobian[0].T / 0.01**2 + np.eye(len(q.slope))
    expected = np.sqrt(q.slope @ np.linalg.solve(precision, q.slope))
    assert Pool(q, [Trunk.of(1e7, (5.0, 10.0), COSTS)], keep_runs=True).spread([]) == pytest.approx(expected, rel=1e-6)


def test_plan_keeps_to_its_caps(asked):
    options = candidates(np.geomspace(1e6, 1e9, 13), RATIOS, COSTS, max_run=1e19, max_bytes=5e9)
    plan = cheapest(asked, options, budget=3e19)
    assert plan.flops <= 3e19
    assert max(t.largest_run for t in plan.trunks) <= 1e19
    assert max(t.n for t in plan.trunks) <= 5e9 / 16
    assert len({t.n for t in plan.trunks}) == len(plan.trunks)
    assert plan.sd_then < plan.sd_now
    with pytest.raises(ScalingError, match="no candidate fits"):
        cheapest(asked, options, budget=1e9)


@pytest.mark.parametrize("case", PLAN_CASES)
def test_plan_beats_a_factorial_ladder_of_equal_cost(case):
    """By the planner's own account, under 0.5 % lack of fit."""
    at, gap, target = case
    q = question(law_fit(crossing_at(at, gap)), PLAN_NOISE, target)
    planned = both_ladders(q)["planned"]
    assert sum(t.flops for t in planned) <= sum(t.flops for t in FACTORIAL)
    assert Pool(q, planned, False).spread(planned) < 0.9 * Pool(q, FACTORIAL, False).spread(FACTORIAL)


def test_plan_beats_a_factorial_ladder_in_simulation():
    """Drawn, fitted and compared; the whole table is experiments/results/planner.csv."""
    at, gap, target = PLAN_CASES[-1]
    truths = crossing_at(at, gap)
    both = both_ladders(question(law_fit(truths), PLAN_NOISE, target))
    found = {
        name: power(truths, designs_of(trunks, list(truths)), PLAN_NOISE, target, ladders=30, draws=20)
        for name, trunks in both.items()
    }
    assert found["planned"].rms_difference < 0.8 * found["factorial"].rms_difference


def test_enough_is_not_overspent(asked):
    options = candidates(np.geomspace(1e6, 1e9, 13), RATIOS, COSTS, 1e21, 1e12)
    loose = cheapest(asked, options, 1e21, target_sd=0.8)
    tight = cheapest(asked, options, 1e21, target_sd=0.6)
    assert loose.sd_then <= 0.8
    assert loose.flops < tight.flops
    pool = Pool(asked, loose.trunks, keep_runs=True)
    for trunk in loose.trunks:
        assert pool.spread([t for t in loose.trunks if t is not trunk]) > 0.8, f"{trunk} is not needed"


def test_next_run_is_ranked_by_what_it_buys_per_flop(asked):
    values = next_values(asked, candidates(np.geomspace(1e6, 1e8, 5), RATIOS, COSTS, 1e21, 1e12))
    assert values[0].shrink > 0
    assert [v.per_flop for v in values] == sorted((v.per_flop for v in values), reverse=True)


def test_parallel_laws_need_a_target():
    truth = {"transformer++": TRUTH["transformer++"], "matmul-free": (1.8, 260.0, 420.0, 0.34, 0.37)}
    runs = draw(truth, PILOT.cells, Noise(1e-5), np.random.default_rng(0))
    c = compare(runs, "transformer++", "matmul-free", draws=20, share=("E", "B", "alpha", "beta"))
    options = candidates(np.geomspace(1e6, 1e8, 7), RATIOS, COSTS, 1e21, 1e12)
    with pytest.raises(ScalingError, match="do not cross"):
        question(c.fit, PLAN_NOISE)
    asked = question(c.fit, PLAN_NOISE, 1e20)
    assert cheapest(asked, options, 1e19, keep_runs=False).sd_then < 0.1


def test_power_grows_with_the_ladder():
    small = alike(Ladder((1e6, 2e6, 4e6), (10, 20, 40)))
    large = alike(Ladder(tuple(np.geomspace(1e6, 1e9, 8)), (5, 20, 80)))
    weak, strong = (
        power(TRUTH, small, Noise(0.01), 1e18, ladders=6),
        power(TRUTH, large, Noise(0.0005), 1e18, ladders=6),
    )
    assert strong.p_sign == 1.0
    assert weak.p_sign < strong.p_sign
    assert strong.rms_difference < weak.rms_difference


@pytest.fixture(scope="module")
def pilot_table(pilot, tmp_path_factory):
    known = {"lr": 0.004, "seq_len": 128, "batch_tokens": 1024, "vocab": 2048}
    return write_csv(tmp_path_factory.mktemp("plan") / "runs.csv", [row | known for row in pilot.fit.runs.records()])


def test_a_plan_is_written_and_swept_as_it_is(pilot_table):
    """`plan` gates when the budget is too small for what was asked; the file it wrote is a valid sweep all the same."""
    launch = pytest.importorskip("launch")
    path = pilot_table.with_name("planned.py")
    settings = ("--target", 1e18, "--ratios", "5,10,20", "--max-run", 1e15, "--ladders", 3, "--draws", 100)
    planned = called(main, "plan", pilot_table, "--budget", 1e16, *settings, "--experiment", path)
    assert planned.returncode == 2, planned.stderr
    assert "GATE plan" in planned.stdout
    assert "P(the interval of the difference at 1.0e+18 FLOP excludes zero)" in planned.stdout
    swept = called(launch.main, "sweep", path, "--out", path.with_name("sweep"), "--dry-run")
    assert swept.returncode == 0, swept.stderr
    chosen = [line for line in planned.stdout.splitlines() if line.strip()[:1].isdigit()]
    runs = 2 * sum(1 + line.count(",") + 1 for line in chosen)
    assert f"{runs} runs in " in swept.stdout


def test_an_sd_of_no_crossing_at_all_is_a_dash():
    """The second family has the higher loss at every budget."""
    truth = {"a": (1.8, 180.0, 420.0, 0.34, 0.37), "b": (1.8, 220.0, 420.0, 0.30, 0.37)}
    found = power(
        truth, dict.fromkeys(truth, Ladder((1e6, 1e7, 1e8), (10, 20, 40)).cells), Noise(1e-4), 1e18, ladders=3, draws=20
    )
    assert (found.p_none, found.sd_log_crossing) == (1.0, np.inf)
    assert "P(no crossing is fitted) = 1.00; sd of log10 C*: –" in "\n".join(found.lines())
    assert json.loads(json.dumps(power_json(found), allow_nan=False))["sd_log_crossing"] is None


def test_power_of_a_proposed_ladder_as_a_command(pilot_table):
    done = called(
        main, "power", pilot_table, "--sizes", "1e8,3e8,1e9", "--ratios", "5,20,80", "--ladders", 3, "--draws", 50
    )
    assert done.returncode == 0, done.stderr
    assert "3 sizes at 3 budgets" in done.stdout
    assert "over 3 simulated ladders" in done.stdout
    bad = called(main, "power", pilot_table, "--sizes", "1e8", "--ratios", "5,20", "--draws", 50)
    assert bad.returncode == 1
    assert "needs two sizes" in bad.stderr


def test_an_experiment_needs_learning_rates(pilot, asked, tmp_path):
    plan = cheapest(asked, candidates(np.geomspace(1e6, 1e7, 4), RATIOS[:3], COSTS, 1e21, 1e12), 1e16)
    with pytest.raises(ScalingError, match="no lr column"):
        write_experiment(plan, pilot.fit.runs, ("transformer++", "matmul-free"), tmp_path / "planned.py")


DEAR = {"transformer++": lambda n: 1 + 0.6 * (n / 1e6) ** -0.2}  # attention and head weigh on small models
UNLIKE = {"matmul-free": (tuple(np.geomspace(2e6, 5e7, 5)), (10, 40))}


@pytest.fixture(scope="module")
def dear():
    """Exact counts: a parameter and token of Transformer++ costs up to 1.6 times as much, by size; unequal designs."""
    rows = ladder_rows(sizes=PILOT.sizes, ratios=PILOT.ratios, truth=TRUTH, noise=1e-4, factors=DEAR, designs=UNLIKE)
    return compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=20)


def test_a_plan_asks_for_the_crossing_that_the_comparison_finds(dear):
    """At 6 N D the frontiers would meet more than a decade away."""
    q = question(dear.fit, noise_of(dear.fit))
    assert np.log10(q.target) == pytest.approx(np.log10(dear.crossover.estimate), abs=0.01)
    six = replace(dear.fit, runs=Runs.from_rows([r | {"flops": 6 * r["N"] * r["D"]} for r in dear.fit.runs.records()]))
    assert abs(np.log10(question(six, noise_of(dear.fit)).target / q.target)) > 1


def test_the_difference_at_a_target_follows_from_each_familys_own_cost(dear):
    """Against a full search over N at the budget, by each family's true cost, for a shift of one parameter."""
    target, step = 1e17, 1e-4
    q = question(dear.fit, noise_of(dear.fit), target)
    n = np.geomspace(1e6, 1e8, 200_001)

    def gap(theta):
        ends = []
        for family, cost in zip(dear.fit.families, q.costs, strict=True):
            ends.append(dear.fit.predict_theta(theta[None], n, target / (cost.rate(n) * n), family).min())
        return ends[1] - ends[0]

    for k in range(len(q.slope)):
        shift = step * np.eye(len(q.slope))[k]
        by_search = (gap(dear.fit.theta + shift) - gap(dear.fit.theta - shift)) / (2 * step)
        assert q.slope[k] == pytest.approx(by_search, abs=1e-5)


def test_trunks_cost_what_the_table_says(dear):
    """A trunk of a size that was run costs its runs' own FLOP: the longest, and a fifth of each other decay."""
    q = question(dear.fit, noise_of(dear.fit))
    n = PILOT.sizes[2]
    trunk = Trunk.of(n, (5, 20), q.costs)
    own = dear.fit.runs.family("transformer++")
    row = (own["N"] == n) & (own["D"] == 20 * n)
    assert trunk.rates == pytest.approx((6 * DEAR["transformer++"](n), 6), rel=2e-3)
    assert trunk.largest_run == pytest.approx(own["flops"][row][0], rel=2e-3)
    assert trunk.flops == pytest.approx(sum(trunk.rates) * n * n * (20 + 0.2 * 5), rel=1e-12)


def test_simulated_ladders_repeat_each_familys_own_design_and_cost(dear):
    designs = own_designs(dear.fit)
    drawn = draw(truths_of(dear.fit), designs, Noise(0.0), np.random.default_rng(0))
    for family in dear.fit.families:
        one, two = drawn.family(family), dear.fit.runs.family(family)
        for name in ("N", "D", "flops"):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-12)
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-3)
        assert len(np.unique(one["cluster"])) == len(np.unique(two["cluster"]))


def test_power_is_of_the_costs_it_is_given(dear):
    """Dear Transformers move the crossing: simulated ladders find it where the table's own comparison does."""
    q = question(dear.fit, noise_of(dear.fit))
    trunks = [Trunk.of(n, (5, 20, 80), q.costs) for n in np.geomspace(1e6, 3e7, 6)]
    designs, truths = designs_of(trunks, dear.fit.families), truths_of(dear.fit)
    exact = compare(draw(truths, designs, Noise(1e-6), np.random.default_rng(0)), dear.a, dear.b, draws=2)
    assert np.log10(exact.crossover.estimate) == pytest.approx(np.log10(q.target), abs=0.05)
    near, far = (power(truths, designs, Noise(3e-3), q.target * x, 6, draws=40) for x in (1.0, 1e-3))
    assert far.p_sign == 1.0
    assert near.p_sign < 1.0


@pytest.mark.parametrize("law", ["tied", "kaplan"])
def test_power_is_that_of_the_law_that_was_fitted(law):
    rows = ladder_rows(sizes=PILOT.sizes, ratios=PILOT.ratios, truth=TRUTH, noise=1e-3)
    fitted = compare(Runs.from_rows(rows), "transformer++", "matmul-free", draws=20, law=law).fit
    assert question(fitted, noise_of(fitted), 1e16).asked == "difference"
    found = power(truths_of(fitted), own_designs(fitted), Noise(1e-4), 1e16, 3, draws=20, law=law)
    assert 0 < found.rms_difference < 2e-3


@pytest.mark.parametrize(
    ("verb", "flags", "said"),
    [
        ("plan", ["--budget", "1e18", "--law", "power"], "law 'power' is not a function of these two alone"),
        ("power", ["--sizes", "1e7,1e8", "--ratios", "5,20", "--law", "precision"], "law 'precision' is not"),
        ("plan", ["--budget", "1e18", "--target", "1e18", "--ratios", "20"], "two ratios of tokens to parameters"),
        ("plan", ["--budget", "1e18", "--a", "matmul-free", "--b", "matmul-free"], "compared with itself"),
        ("plan", ["--budget", "1e18", "--axis", "energy"], "unrecognized arguments: --axis energy"),
        ("power", ["--sizes", "1e7,1e8", "--ratios", "5,20", "--horizon", "1e25"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(pilot_table, capsys, verb, flags, said):
    try:
        status = main([verb, str(pilot_table), *flags])
    except SystemExit as stopped:
        status = stopped.code
    err = capsys.readouterr().err
    assert status == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_noise_in_common_needs_cells_in_common():
    designs = {"a": PILOT.cells, "b": Ladder((1e6, 2e6), (5, 10)).cells}
    truths = dict(zip("ab", TRUTH.values(), strict=True))
    with pytest.raises(ScalingError, match="the same cells in every family"):
        draw(truths, designs, Noise(0.001, common=0.001), np.random.default_rng(0))
