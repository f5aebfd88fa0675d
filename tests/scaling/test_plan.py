"""Planning: noise, cheapest ladder, value of the next run, power, and the experiment file."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_csv

from scaling import ScalingError, compare
from scaling.commands.plan import power_json
from scaling.uncertainty.simulate import Ladder, Noise, draw
from scaling.verdict.assumed import crossing_at, optimal_loss
from scaling.verdict.experiment_file import write_experiment
from scaling.verdict.plan import Pool, Trunk, candidates, cheapest, next_values, noise_of, question
from scaling.verdict.power import cells_of, power
from scaling.verdict.trials import FACTORIAL, PLAN_CASES, PLAN_NOISE, both_ladders, law_fit

TRUTH = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 320.0, 420.0, 0.365, 0.37)}
PILOT = Ladder(tuple(np.geomspace(1e6, 3e7, 5)), (5, 10, 20, 40))
RATIOS = (5, 10, 20, 40, 80, 160)


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
    assert Pool(q, [Trunk(1e7, (5.0, 10.0))], keep_runs=True).spread([]) == pytest.approx(expected, rel=1e-6)


def test_plan_keeps_to_its_caps(asked):
    options = candidates(np.geomspace(1e6, 1e9, 13), RATIOS, max_run=1e19, max_bytes=5e9)
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
        name: power(truths, cells_of(trunks), PLAN_NOISE, target, ladders=30, draws=20) for name, trunks in both.items()
    }
    assert found["planned"].rms_difference < 0.8 * found["factorial"].rms_difference


def test_enough_is_not_overspent(asked):
    options = candidates(np.geomspace(1e6, 1e9, 13), RATIOS, 1e21, 1e12)
    loose = cheapest(asked, options, 1e21, target_sd=0.8)
    tight = cheapest(asked, options, 1e21, target_sd=0.6)
    assert loose.sd_then <= 0.8
    assert loose.flops < tight.flops


def test_next_run_is_ranked_by_what_it_buys_per_flop(asked):
    values = next_values(asked, candidates(np.geomspace(1e6, 1e8, 5), RATIOS, 1e21, 1e12))
    assert values[0].shrink > 0
    assert [v.per_flop for v in values] == sorted((v.per_flop for v in values), reverse=True)


def test_parallel_laws_need_a_target():
    truth = {"transformer++": TRUTH["transformer++"], "matmul-free": (1.8, 260.0, 420.0, 0.34, 0.37)}
    runs = draw(truth, PILOT.cells, Noise(1e-5), np.random.default_rng(0))
    c = compare(runs, "transformer++", "matmul-free", draws=20, share=("E", "B", "alpha", "beta"))
    options = candidates(np.geomspace(1e6, 1e8, 7), RATIOS, 1e21, 1e12)
    with pytest.raises(ScalingError, match="do not cross"):
        question(c.fit, PLAN_NOISE)
    asked = question(c.fit, PLAN_NOISE, 1e20)
    assert cheapest(asked, options, 1e19, keep_runs=False).sd_then < 0.1


def test_power_grows_with_the_ladder():
    small = Ladder((1e6, 2e6, 4e6), (10, 20, 40)).cells
    large = Ladder(tuple(np.geomspace(1e6, 1e9, 8)), (5, 20, 80)).cells
    weak, strong = (
        power(TRUTH, small, Noise(0.01), 1e18, ladders=6),
        power(TRUTH, large, Noise(0.0005), 1e18, ladders=6),
    )
    assert strong.p_sign == 1.0
    assert weak.p_sign < strong.p_sign
    assert strong.rms_difference < weak.rms_difference


def call(*arguments):
    command = [sys.executable, "launch.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def pilot_table(pilot, tmp_path_factory):
    known = {"lr": 0.004, "seq_len": 128, "batch_tokens": 1024, "vocab": 2048}
    return write_csv(tmp_path_factory.mktemp("plan") / "runs.csv", [row | known for row in pilot.fit.runs.records()])


def test_a_plan_is_written_and_swept_as_it_is(pilot_table):
    """`plan` gates when the budget is too small for what was asked; the file it wrote is a valid sweep all the same."""
    pytest.importorskip("mmfree_jax")
    path = pilot_table.with_name("planned.py")
    settings = ("--target", 1e18, "--ratios", "5,10,20", "--max-run", 1e15, "--ladders", 3, "--draws", 100)
    planned = call("plan", pilot_table, "--budget", 1e16, *settings, "--experiment", path)
    assert planned.returncode == 2, planned.stderr
    assert "GATE plan" in planned.stdout
    assert "P(the interval of the difference at 1.0e+18 FLOP excludes zero)" in planned.stdout
    swept = call("sweep", path, "--out", path.with_name("sweep"), "--dry-run")
    assert swept.returncode == 0, swept.stderr
    chosen = [line for line in planned.stdout.splitlines() if line.strip()[:1].isdigit()]
    runs = 2 * sum(1 + line.count(",") + 1 for line in chosen)
    assert f"{runs} runs in " in swept.stdout


def test_an_sd_of_no_crossing_at_all_is_a_dash():
    """The second family has the higher loss at every budget."""
    truth = {"a": (1.8, 180.0, 420.0, 0.34, 0.37), "b": (1.8, 220.0, 420.0, 0.30, 0.37)}
    found = power(truth, Ladder((1e6, 1e7, 1e8), (10, 20, 40)).cells, Noise(1e-4), 1e18, ladders=3, draws=20)
    assert (found.p_none, found.sd_log_crossing) == (1.0, np.inf)
    assert "P(no crossing is fitted) = 1.00; sd of log10 C*: –" in "\n".join(found.lines())
    assert json.loads(json.dumps(power_json(found), allow_nan=False))["sd_log_crossing"] is None


def test_power_of_a_proposed_ladder_as_a_command(pilot_table):
    done = call("power", pilot_table, "--sizes", "1e8,3e8,1e9", "--ratios", "5,20,80", "--ladders", 3, "--draws", 50)
    assert done.returncode == 0, done.stderr
    assert "3 sizes at 3 budgets" in done.stdout
    assert "over 3 simulated ladders" in done.stdout
    bad = call("power", pilot_table, "--sizes", "1e8", "--ratios", "5,20", "--draws", 50)
    assert bad.returncode == 1
    assert "needs two sizes" in bad.stderr


def test_an_experiment_needs_learning_rates(pilot, asked, tmp_path):
    plan = cheapest(asked, candidates(np.geomspace(1e6, 1e7, 4), RATIOS[:3], 1e21, 1e12), 1e16)
    with pytest.raises(ScalingError, match="no lr column"):
        write_experiment(plan, pilot.fit.runs, ("transformer++", "matmul-free"), tmp_path / "planned.py")
