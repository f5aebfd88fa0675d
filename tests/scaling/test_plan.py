"""Planning: cheapest ladder under caps, what it costs, power, and the experiment file."""

import re

import numpy as np
import pytest
from conftest import ladder_rows, write_csv

from experiments.simulated_ladders import Ladder, Noise, crossing_at, draw, optimal_loss
from scaling import Runs, ScalingError, analyse
from scaling.__main__ import main
from scaling.experiment_file import write_experiment
from scaling.plan import (
    Pool,
    Trunk,
    agreement,
    candidates,
    cheapest,
    default_target,
    own_spread,
    planned_noise,
    power,
    simulated_intervals,
)
from tests.in_process import called

TRUTH = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 320.0, 420.0, 0.365, 0.37)}
PILOT = Ladder(tuple(np.geomspace(1e6, 3e7, 5)), (5, 10, 20, 40))
RATIOS = (5, 10, 20, 40, 80, 160)
DEAR = {"transformer++": lambda n: 1 + 0.6 * (n / 1e6) ** -0.2}  # attention and head weigh on small models
TARGET = 1e18


@pytest.fixture(scope="module")
def pilot():
    return analyse(draw(TRUTH, PILOT.cells, Noise(0.001, 0.0005), np.random.default_rng(1)), draws=400)


@pytest.fixture(scope="module")
def costs(pilot):
    return [pilot.cost(f) for f in pilot.families]


@pytest.fixture(scope="module")
def options(costs):
    return candidates(np.geomspace(1e6, 1e9, 13), RATIOS, costs, max_run=1e19, max_bytes=5e9)


def test_assumed_laws_cross_where_they_are_told_to():
    first, second = crossing_at(1e22, 0.03).values()
    assert optimal_loss(first, 1e22) == pytest.approx(optimal_loss(second, 1e22), rel=1e-9)
    assert optimal_loss(first, 1e21) < optimal_loss(second, 1e21)
    assert optimal_loss(first, 1e23) > optimal_loss(second, 1e23)


def test_plan_and_comparison_agree_about_the_same_table(pilot, options):
    """The sd now is that of the comparison's own interval; the same ladder, simulated, shows one about as wide."""
    found = pilot.difference(TARGET)
    half = (found.high - found.low) / 2 / 1.96
    assert cheapest(pilot, options, 1e19, TARGET).sd_now == pytest.approx(half, rel=0.02)
    own = [Trunk.of(n, PILOT.ratios, [pilot.cost(f) for f in pilot.families]) for n in PILOT.sizes]
    assert power(pilot, own, TARGET, simulations=8).sd == pytest.approx(half, rel=0.4)


def test_spread_is_that_of_brute_force_sampling(pilot, costs):
    """Joint normal draws of the rows and of what is asked, conditioned by regression."""
    pool = Pool(pilot, [Trunk.of(1e8, (10.0, 40.0), costs)], TARGET)
    rows = np.arange(len(pool.covariance))
    joint = np.block([[pool.covariance, pool.with_asked[:, None]], [pool.with_asked[None], np.array([[pool.asked]])]])
    root = np.linalg.cholesky(joint + 1e-16 * np.eye(len(joint)))
    drawn = root @ np.random.default_rng(0).normal(size=(len(joint), 40_000))
    weights = np.linalg.lstsq(drawn[:-1].T, drawn[-1], rcond=None)[0]
    left = drawn[-1] - weights @ drawn[:-1]
    told = pool.with_asked @ np.linalg.solve(pool.covariance[np.ix_(rows, rows)], pool.with_asked)
    assert left.std() == pytest.approx(np.sqrt(pool.asked - told), rel=0.03)


def test_plan_keeps_to_its_caps(pilot, options):
    plan = cheapest(pilot, options, 3e19, TARGET)
    assert plan.flops <= 3e19
    assert max(t.largest_run for t in plan.trunks) <= 1e19
    assert max(t.n for t in plan.trunks) <= 5e9 / 16
    assert len({t.n for t in plan.trunks}) == len(plan.trunks)
    assert plan.sd_then < plan.sd_now
    with pytest.raises(ScalingError, match="no candidate fits"):
        cheapest(pilot, options, 1e9, TARGET)


def test_a_plan_beats_a_factorial_ladder_of_equal_cost(pilot, costs):
    factorial = [Trunk.of(n, RATIOS[:4], costs) for n in np.geomspace(1e9 / 30, 1e9, 5)]
    budget, cap = sum(t.flops for t in factorial), max(t.largest_run for t in factorial)
    options = candidates(np.geomspace(1e7, 1.5e9, 16), RATIOS, costs, cap, 1e13)
    planned = cheapest(pilot, options, budget, 1e21, keep_runs=False)
    assert planned.flops <= budget
    assert planned.sd_then < agreement(pilot, 1e21) * Pool(pilot, factorial, 1e21, keep_runs=False).spread(factorial)


def test_enough_is_not_overspent(pilot, options):
    now = own_spread(pilot, TARGET)
    loose, tight = (cheapest(pilot, options, 1e21, TARGET, target_sd=share * now) for share in (0.8, 0.6))
    assert loose.sd_then <= 0.8 * now
    assert loose.flops < tight.flops


def test_power_counts_intervals_that_exclude_zero_with_the_right_sign(pilot, costs, monkeypatch):
    """Of four ladders that show the truth +- 0.02, off by 0, 0, 0.01 and 0.03: one misses a difference of zero, and of
    the eight sides those at 0.02, 0.02, 0.01, -0.01 and 0.02, 0.02, 0.03, 0.05 are passed by a larger difference."""
    off = np.array([0.0, 0.0, 0.01, 0.03])
    shown = np.column_stack([0.1 + 0 * off, 0.1 + off - 0.02, 0.1 + off + 0.02])
    monkeypatch.setattr("scaling.plan.simulated_intervals", lambda *_: shown)
    found = power(pilot, [], TARGET, (0.0, 0.015, -0.015, 0.025, 0.04, 0.06))
    assert found.at_zero == pytest.approx(0.25)
    assert found.chances == pytest.approx([1 / 8, 2 / 8, 2 / 8, 6 / 8, 7 / 8, 1])
    assert found.sd == pytest.approx(0.02 / 1.96, rel=1e-4)


def test_a_larger_ladder_shows_smaller_differences(pilot, costs):
    large = [Trunk.of(n, (5, 20, 80), costs) for n in np.geomspace(1e6, 1e9, 6)]
    small = [Trunk.of(n, (5, 20), costs) for n in np.geomspace(1e6, 1e7, 5)]
    one, two = (power(pilot, x, TARGET, (0.01,), simulations=4) for x in (large, small))
    assert one.sd < two.sd
    assert one.chances[0] > two.chances[0]
    both = power(pilot, small, TARGET, (0.01,), keep_runs=True, simulations=4)
    assert both.sd < two.sd  # the runs at hand count


def test_simulated_intervals_lie_about_their_own_truths(pilot, costs):
    """At a compute of which the pilot knows little and the ladder much, intervals follow the truths they came from."""
    large = [Trunk.of(n, (5, 20, 80), costs) for n in np.geomspace(1e6, 3e9, 8)]
    truth, low, high = simulated_intervals(pilot, large, 1e20, False, 6).T
    assert np.corrcoef(truth, (low + high) / 2)[0, 1] > 0.9


def test_simulated_runs_scatter_as_the_runs_at_hand(pilot, costs):
    """Sd of a run about the others of its trunk, and of trunks, as the draws say; families share cells only."""
    ladder = [Trunk.of(n, (5, 10, 20, 40), costs) for n in np.geomspace(1e6, 1e8, 60)]
    picked = np.arange(40)
    noise = planned_noise(pilot, ladder, picked, np.random.default_rng(0))
    run, trunk, cell = (pilot.draws.h[picked, k] for k in (0, 1, 2))
    x, y = (noise[f].reshape(40, 60, 4) for f in pilot.families)
    tail = np.mean(pilot.posterior.scale[pilot.draws.noise[picked]] ** 2, axis=1)
    within = np.mean(x.var(axis=2, ddof=1))
    assert within == pytest.approx(np.mean(run**2 * tail + cell**2), rel=0.15)
    apart = np.mean(x.mean(axis=2).var(axis=1)) - within / 4
    assert apart == pytest.approx(np.mean(trunk**2), rel=0.25, abs=1e-8)
    assert np.mean(x * y) == pytest.approx(np.mean(cell**2), rel=0.3, abs=3e-8)


def test_the_default_target_is_a_decade_beyond_unless_the_crossing_lies_within(pilot):
    assert default_target(pilot) == pytest.approx(10 * pilot.measured()[1])
    first, second = crossing_at(1e18, 0.06, TRUTH["transformer++"]).values()
    ladder = Ladder(tuple(np.geomspace(1e6, 1e9, 8)), (5, 20, 80))
    crossed = analyse(draw({"a": first, "b": second}, ladder.cells, Noise(3e-4), np.random.default_rng(0)), draws=200)
    assert default_target(crossed) == crossed.crossing().estimate < crossed.measured()[1]


def test_trunks_cost_what_the_table_says():
    """A trunk of a size that was run costs its runs' own FLOP: the longest, and a fifth of each other decay."""
    rows = ladder_rows(sizes=PILOT.sizes, ratios=PILOT.ratios, truth=TRUTH, noise=1e-4, factors=DEAR)
    dear = analyse(Runs.from_rows(rows), draws=50)
    n = PILOT.sizes[2]
    trunk = Trunk.of(n, (5, 20), [dear.cost(f) for f in dear.families])
    own = dear.runs.family("transformer++")
    assert trunk.rates == pytest.approx((6 * DEAR["transformer++"](n), 6), rel=2e-3)
    assert trunk.largest_run == pytest.approx(own["flops"][(own["N"] == n) & (own["D"] == 20 * n)][0], rel=2e-3)
    assert trunk.flops == pytest.approx(sum(trunk.rates) * n * n * (20 + 0.2 * 5), rel=1e-12)


@pytest.fixture(scope="module")
def pilot_table(pilot, tmp_path_factory):
    known = {"lr": 0.004, "seq_len": 128, "batch_tokens": 1024, "vocab": 2048}
    return write_csv(tmp_path_factory.mktemp("plan") / "runs.csv", [row | known for row in pilot.runs.records()])


def test_a_plan_is_written_and_swept_as_it_is(pilot_table):
    """`plan` gates when the budget is too small for what was asked; the file it wrote is a valid sweep all the same."""
    launch = pytest.importorskip("launch")
    path = pilot_table.with_name("planned.py")
    settings = ("--target", 1e18, "--ratios", "5,10,20", "--max-run", 1e15, "--draws", 100, "--simulations", 2)
    planned = called(main, "plan", pilot_table, "--budget", 1e16, *settings, "--experiment", path)
    assert planned.returncode == 2, planned.stderr
    assert "GATE plan" in planned.stdout
    assert "excludes zero with the right sign" in planned.stdout
    swept = called(launch.main, "sweep", path, "--out", path.with_name("sweep"), "--dry-run")
    assert swept.returncode == 0, swept.stderr
    chosen = [line for line in planned.stdout.splitlines() if line.strip()[:1].isdigit()]
    runs = 2 * sum(1 + line.count(",") + 1 for line in chosen)
    assert f"{runs} runs in " in swept.stdout


def test_power_of_a_proposed_ladder_as_a_command(pilot_table):
    ladder = ("--sizes", "1e8,3e8,1e9", "--ratios", "5,20,80", "--differences", "0.01,0.02")
    done = called(main, "power", pilot_table, *ladder, "--draws", 50, "--simulations", 2)
    assert done.returncode == 0, done.stderr
    assert "3 sizes at 3 budgets" in done.stdout
    assert "if it is 0.01: P(" in done.stdout
    assert re.search(r"if it is zero: P\(the interval excludes zero\) = 0\.\d\d \+- 0\.\d\d", done.stdout)
    bad = called(main, "power", pilot_table, "--sizes", "1e8", "--ratios", "5,20", "--draws", 50)
    assert bad.returncode == 1
    assert "needs two sizes" in bad.stderr


def test_an_experiment_needs_learning_rates(pilot, costs, tmp_path):
    plan = cheapest(pilot, candidates(np.geomspace(1e6, 1e7, 4), RATIOS[:3], costs, 1e21, 1e12), 1e16, TARGET)
    with pytest.raises(ScalingError, match="no lr column"):
        write_experiment(plan, pilot.runs, pilot.families, tmp_path / "planned.py")


@pytest.mark.parametrize(
    ("verb", "flags", "said"),
    [
        ("plan", ["--budget", "1e18", "--law", "power"], "law 'power' is not a function of these two alone"),
        ("plan", ["--budget", "1e18", "--target", "1e18", "--ratios", "20"], "two ratios of tokens to parameters"),
        ("plan", ["--budget", "1e18", "--a", "matmul-free", "--b", "matmul-free"], "compared with itself"),
        ("plan", ["--budget", "1e18", "--axis", "energy"], "unrecognized arguments: --axis energy"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(pilot_table, capsys, verb, flags, said):
    try:
        status = main([verb, str(pilot_table), "--draws", "50", *flags])
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
