"""Planning: noise, cheapest ladder, value of the next run, power, and the experiment file."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from scaling import Runs, ScalingError, compare
from scaling.uncertainty.simulate import Ladder, Noise, draw
from scaling.verdict.experiment_file import write_experiment
from scaling.verdict.plan import (
    Trunk,
    candidates,
    cheapest,
    next_values,
    noise_of,
    own_information,
    power,
    sensitivity_of_crossing,
    spread,
    trunk_information,
)

TRUTH = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 320.0, 420.0, 0.365, 0.37)}
PILOT = Ladder(tuple(np.geomspace(1e6, 3e7, 5)), (5, 10, 20, 40))
RATIOS = (5, 10, 20, 40, 80, 160)


@pytest.fixture(scope="module")
def pilot():
    runs = draw(TRUTH, PILOT, Noise(0.001, 0.0005), np.random.default_rng(1))
    return compare(runs, "transformer++", "matmul-free", draws=100)


def test_noise_is_estimated_from_the_runs():
    ladder = Ladder(tuple(np.geomspace(1e6, 1e9, 10)), (5, 10, 20, 40))
    runs = draw(TRUTH, ladder, Noise(0.002, 0.004), np.random.default_rng(3))
    found = noise_of(compare(runs, "transformer++", "matmul-free", draws=20).fit)
    assert found.run == pytest.approx(0.002, rel=0.35)
    assert found.trunk == pytest.approx(0.004, rel=0.5)


def test_plan_keeps_to_its_caps_and_beats_a_factorial_ladder_of_equal_cost(pilot):
    options = candidates(np.geomspace(1e6, 1e9, 13), RATIOS, max_run=1e20, max_bytes=1e10)
    plan = cheapest(pilot, options, budget=3e19)
    assert plan.flops <= 3e19
    assert max(t.largest_run for t in plan.trunks) <= 1e20
    assert plan.sd_then < plan.sd_now
    point, slope = sensitivity_of_crossing(pilot.fit, pilot.measured[0])
    noise = noise_of(pilot.fit)
    total = own_information(pilot.fit, noise, 10**point)
    top = 1e9
    factorial = [Trunk(n, RATIOS[:4]) for n in np.geomspace(top / 30, top, 5)]
    scale = np.sqrt(sum(t.flops for t in factorial) / plan.flops)
    factorial = [Trunk(t.n / scale, t.ratios) for t in factorial]
    assert sum(t.flops for t in factorial) == pytest.approx(plan.flops, rel=1e-6)
    rival = spread(total + sum(trunk_information(pilot.fit, t, noise, 10**point) for t in factorial), slope)
    assert plan.sd_then < rival


def test_enough_is_not_overspent(pilot):
    options = candidates(np.geomspace(1e6, 1e9, 13), RATIOS, 1e21, 1e12)
    loose = cheapest(pilot, options, 1e21, target_sd=1.0)
    tight = cheapest(pilot, options, 1e21, target_sd=0.5)
    assert loose.sd_then <= 1.0
    assert loose.flops < tight.flops


def test_next_run_is_ranked_by_what_it_buys_per_flop(pilot):
    values = next_values(pilot, candidates(np.geomspace(1e6, 1e8, 5), RATIOS, 1e21, 1e12))
    assert all(v.shrink > 0 for v in values)
    assert [v.per_flop for v in values] == sorted((v.per_flop for v in values), reverse=True)


def test_parallel_laws_need_a_target():
    truth = {"transformer++": TRUTH["transformer++"], "matmul-free": (1.8, 260.0, 420.0, 0.34, 0.37)}
    runs = draw(truth, PILOT, Noise(1e-5), np.random.default_rng(0))
    c = compare(runs, "transformer++", "matmul-free", draws=20, share=("E", "B", "alpha", "beta"))
    options = candidates(np.geomspace(1e6, 1e8, 7), RATIOS, 1e21, 1e12)
    with pytest.raises(ScalingError, match="do not cross"):
        cheapest(c, options, 1e19)
    assert cheapest(c, options, 1e19, target=1e20).sd_then < np.inf


def test_power_grows_with_the_ladder():
    small = power(TRUTH, Ladder((1e6, 2e6, 4e6), (10, 20, 40)), Noise(0.01), 1e18, ladders=6)
    large = power(TRUTH, Ladder(tuple(np.geomspace(1e6, 1e9, 8)), (5, 20, 80)), Noise(0.0005), 1e18, ladders=6)
    assert large.p_sign == 1.0
    assert small.p_sign < large.p_sign


def test_experiment_file_is_loaded_by_the_trainer(pilot, tmp_path):
    pytest.importorskip("mmfree_jax")
    options = candidates(np.geomspace(1e6, 1e7, 4), RATIOS[:3], 1e21, 1e12)
    plan = cheapest(pilot, options, 1e16)
    rows = [
        row | {"lr": 0.004, "seq_len": 128, "batch_tokens": 1024, "vocab": 2048} for row in pilot.fit.runs.records()
    ]
    path = tmp_path / "planned.py"
    write_experiment(plan, Runs.from_rows(rows), ("transformer++", "matmul-free"), path)
    code = (
        "import sys, pathlib; from mmfree_jax.sweep.experiment import load_study; "
        "study = load_study(pathlib.Path(sys.argv[1])); print(len(study.runs))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * sum(1 + len(t.ratios) for t in plan.trunks)
    with pytest.raises(ScalingError, match="no lr column"):
        write_experiment(plan, pilot.fit.runs, ("transformer++", "matmul-free"), path)
