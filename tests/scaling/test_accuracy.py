"""From loss to accuracy: the sigmoid, the uncertainty of both steps, and the OLMo ladder's 7B and 13B models."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv

from scaling import Runs, ScalingError, analyse
from scaling.__main__ import main
from scaling.laws.sigmoid import Sigmoid, angle, of_angle

# Ends of runs of the OLMo ladder (Bhagia et al. 2024, arXiv 2412.04403; Apache-2.0, (c) Allen Institute for AI), to
# five decimals: bits per byte of the right answer, and accuracy, of tasks with five examples and ranked answers.
# github.com/allenai/OLMo at 38789311, scripts/scaling/data/peteish-final-new: the ladder, and 7B-28xC-anneal-new.csv;
# github.com/allenai/OLMo-ladder at f14a8cfe, src/scripts/other/data/peteish-final-new: 13B-5T.csv.
OLMO = Path(__file__).with_name("olmo_ladder.csv")
SIZES, RATIOS, NOISE, ITEMS = tuple(np.geomspace(5e7, 1.6e9, 6)), (10, 20, 40, 80), 0.003, 2000
CEILING, FLOOR = 0.75, 0.08
LADDERS = 10


def loss_at(n, d):
    return 0.55 + 35 / n**0.28 + 50 / d**0.26


MIDDLE = (loss_at(5e7, 5e8) + loss_at(6e9, 6e11)) / 2
SLOPE = 6 / (loss_at(5e7, 5e8) - loss_at(6e9, 6e11))


def error_at(loss):
    return FLOOR + (CEILING - FLOOR) / (1 + np.exp(-SLOPE * (loss - MIDDLE)))


def rows(rng, items=ITEMS, noise=NOISE, sizes=SIZES, **more):
    """A ladder whose tasks have some number of items; None for their exact accuracy."""
    out = []
    for n in sizes:
        for ratio in RATIOS:
            loss = loss_at(n, ratio * n) * np.exp(noise * rng.normal())
            wrong = error_at(loss) if items is None else rng.binomial(items, error_at(loss)) / items
            cell = {"run_id": f"{n:.3g}-{ratio}", "family": "f", "N": n, "D": ratio * n, "loss": loss}
            out.append(cell | {"task": 1 - wrong} | more)
    return out


@pytest.fixture(scope="module")
def found():
    return analyse(Runs.from_rows(rows(np.random.default_rng(3))), draws=400).accuracy("task")


def test_the_sigmoids_derivatives_are_those_of_its_value():
    law, rng = Sigmoid(), np.random.default_rng(0)
    loss = np.linspace(-0.4, 0.4, 7)[None]
    theta = law.starts(20, angle(rng.uniform(0.2, 0.8, 7)), loss, rng)
    value, jacobian = law.value_jacobian(theta, loss)
    np.testing.assert_allclose(value, law.value(theta, loss))
    for p in range(4):
        step = 1e-6 * np.eye(4)[p]
        slope = (law.value(theta + step, loss) - law.value(theta - step, loss)) / 2e-6
        np.testing.assert_allclose(jacobian[:, p], slope, rtol=1e-4, atol=1e-7)


def test_errors_and_angles_are_one_another():
    errors = np.linspace(0, 1, 11)
    np.testing.assert_allclose(of_angle(angle(errors)), errors, atol=1e-12)
    assert of_angle(np.array([-0.1, 2.0])).tolist() == [0, 1]  # noise carries no error out of its range


def test_parameters_of_exact_rows_are_found():
    found = analyse(Runs.from_rows(rows(np.random.default_rng(0), items=None, noise=1e-4)), draws=400).accuracy("task")
    told = {p.name: p for p in found.parameters()}
    for name, truth in {"ceiling": CEILING, "floor": FLOOR, "L0": MIDDLE, "k": SLOPE}.items():
        assert told[name].low < truth < told[name].high
    assert told["L0"].value == pytest.approx(MIDDLE, rel=0.03)
    assert told["k"].value == pytest.approx(SLOPE, rel=0.15)
    assert found.predict(1e9, 2e10).accuracy == pytest.approx(1 - error_at(loss_at(1e9, 2e10)), abs=2e-3)


def test_intervals_hold_what_they_promise():
    """Within the runs, 0.2 and 1.1 decades beyond: the true mean, and a new run on its own items. Of 120 ladders 95, 93
    and 94 % of means lay inside, and 95, 98 and 95 % of runs; 25 of the 30 here is 2.9 standard errors below 95 %."""
    rng = np.random.default_rng(7)
    mean, run = [], []
    for seed in range(LADDERS):
        task = analyse(Runs.from_rows(rows(rng)), draws=200, seed=seed).accuracy("task")
        for n, d in ((1e9, 2e10), (3.2e9, 1.3e11), (6e9, 4e11)):
            p, loss = task.predict(n, d), loss_at(n, d)
            seen = 1 - rng.binomial(ITEMS, error_at(loss * np.exp(NOISE * rng.normal()))) / ITEMS
            mean.append(p.low <= 1 - error_at(loss) <= p.high)
            run.append(p.run_low <= seen <= p.run_high)
    assert sum(mean) >= 25 / 30 * len(mean)
    assert sum(run) >= 25 / 30 * len(run)


def test_an_interval_holds_what_neither_step_knows(found):
    curve, _ = found.losses.point(6e9, 4e11, "f", {})
    both, second = found.spans(curve), found.spans(np.full_like(curve, np.median(curve)))
    loss_alone = 1 - error_at(np.exp(np.quantile(curve, [0.975, 0.025])))  # through the true sigmoid
    assert both[2] - both[1] > 1.02 * (second[2] - second[1])
    assert both[2] - both[1] > 1.1 * np.ptp(loss_alone)
    assert both[3] < both[1] < both[0] < both[2] < both[4]


def test_accuracy_for_a_budget_is_that_of_its_best_allocation(found):
    best, answer = found.losses.allocate(1e21), found.at(1e21)
    assert (answer.N, answer.D, answer.flops) == (best.N, best.D, 1e21)
    assert answer.loss == pytest.approx(best.loss)
    assert answer.accuracy == pytest.approx(found.predict(best.N, best.D).accuracy, abs=0.005)
    assert found.at(1e20).accuracy < answer.accuracy


def test_accuracies_are_validated_by_their_own_back_test(found):
    points = found.test.points
    assert len(points) >= 5
    assert {p.kind for p in points} == {"accuracy"}
    assert all(0 < p.low < p.expected < p.high < 1 for p in points)
    assert found.reach > 0
    assert found.predict(1e9, 8e10).validated
    assert not found.predict(6e10, 4e12).validated


def ladder_of(task):
    runs = Runs.read(OLMO, {"loss": f"{task}_bpb"}, constants={"family": "olmo"})
    return runs.select(runs["N"] < 2e9), runs.select(runs["N"] > 2e9)


# Task, then for 7B and 13B: forecast less observed accuracy in points, and whether the 95 % interval of a run holds
# what was observed. The loss of ARC-Easy falls by more than any law of the ladder says (0.54 bits, 0.59 to 0.65
# forecast), as its authors found too (their error of the 13B model's accuracy: 11 %).
FORECASTS = {
    "hellaswag": ((-1.6, True), (-1.1, True)),
    "piqa": ((-2.2, True), (-2.8, True)),
    "arc_challenge": ((-7.4, True), (-10.7, True)),
    "arc_easy": ((-9.1, False), (-9.4, False)),
}


@pytest.mark.parametrize("task", FORECASTS)
def test_the_olmo_ladder_forecasts_its_7b_and_13b_models(task):
    ladder, large = ladder_of(task)
    found = analyse(ladder).accuracy(f"{task}_acc")
    for run, (points, inside) in zip(large.records(), FORECASTS[task], strict=True):
        p, seen = found.predict(run["N"], run["D"]), run[f"{task}_acc"]
        assert 100 * (p.accuracy - seen) == pytest.approx(points, abs=1.0)
        assert (p.run_low <= seen <= p.run_high) == inside
        assert p.decades > 1.9
        assert not p.validated  # two decades beyond a ladder of four sizes
        # The second step alone, at the loss that was observed, holds for every task.
        given = found.spans(np.full(len(found.draws.theta), np.log(run["loss"])))
        assert given[3] <= seen <= given[4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "no column 'tsk'; did you mean 'task'?"),
        ({"tsk": "good"}, "column 'tsk' holds text, no accuracies"),
        ({"tsk": ""}, "column 'tsk' holds an accuracy for 0 runs of 'f': 6 are needed"),
        ({"tsk": 0.25}, "the accuracy (tsk) of 'f' is 0.25 in every run: there is no curve to fit"),
        ({"tsk": 61.5}, "column 'tsk' must hold accuracies between 0 and 1 (percent: --column tsk=tsk/100)"),
    ],
)
def test_columns_that_tell_nothing_are_refused_in_one_line(change, said):
    losses = analyse(Runs.from_rows(rows(np.random.default_rng(3), **change)), draws=20)
    with pytest.raises(ScalingError) as refused:
        losses.accuracy("tsk")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_runs_without_an_accuracy_still_tell_of_the_loss():
    table = rows(np.random.default_rng(3))
    some = [row | ({"task": ""} if k % 2 else {}) for k, row in enumerate(table)]
    found = analyse(Runs.from_rows(some), draws=100).accuracy("task")
    assert len(found.posterior.rows.y) == len(table) / 2
    assert len(found.losses.posterior.rows.y) == len(table)


def test_verbs_tell_accuracies(tmp_path, capsys, brief_reports):
    table, out = write_csv(tmp_path / "t.csv", rows(np.random.default_rng(3), sizes=SIZES[:4])), tmp_path / "out"
    assert main(["report", str(table), "--draws", "50", "--out", str(out)]) in (0, 2)
    capsys.readouterr()
    asked = ["predict", str(out), "--N", "3e9", "--D", "6e10", "--accuracy", "task"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "f: task 0." in said
    assert "by a loss of " in said
    assert "Not validated beyond the runs: no back-test is possible." in said
    assert main([*asked, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["f"]["accuracy"][0]
    assert entry["run_low"] <= entry["low"] < entry["accuracy"] < entry["high"] <= entry["run_high"]
    main(["allocate", str(table), "--draws", "50", "--C", "1e20", "--accuracy", "task", "--json"])
    entry = json.loads(capsys.readouterr().out)["f"][0]
    assert entry["accuracy"][0]["N"] == entry["N"]
    main(["allocate", str(table), "--draws", "50", "--C", "1e20", "--accuracy", "task"])
    assert "f: task 0." in capsys.readouterr().out
    assert main([*asked[:-1], "tusk"]) == 1
    assert "did you mean 'task'?" in capsys.readouterr().err
