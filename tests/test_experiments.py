"""The committed experiments: what they promise about themselves, and that their constants come from their tables."""

import csv
import dataclasses
import math
import statistics
from pathlib import Path

import pytest

from experiments import (
    h200_ladder,
    h200_rates,
    integer_gradients,
    integer_gradients_105m,
    ladder,
    quickstart,
    quickstart_rates,
    scale_out,
)
from experiments.learning_rate_picture import curves, optimum, read
from experiments.learning_rate_transfer import STEP
from mmfree_jax import flops
from mmfree_jax.config import ConfigError
from mmfree_jax.sweep.experiment import run_flops

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
END_POINTS = [run for run in quickstart.study().runs if run.evaluate]


@pytest.mark.parametrize("family", quickstart.FAMILIES)
def test_the_quickstart_ladder_is_as_wide_as_it_says(family):
    runs = [run for run in END_POINTS if run.model.family == family]
    sizes = {flops.parameters(run.model).N_nonemb for run in runs}
    assert len(sizes) >= 4
    assert max(sizes) >= 16 * min(sizes)
    for size in sizes:
        budgets = {run.positions for run in runs if flops.parameters(run.model).N_nonemb == size}
        assert len(budgets) >= 3
        assert max(budgets) >= 4 * min(budgets)


def test_both_families_see_the_same_data_and_have_the_same_sizes():
    first, second = ([run for run in END_POINTS if run.model.family == f] for f in quickstart.FAMILIES)
    assert [run.data for run in first] == [run.data for run in second]
    assert [run.seed for run in first] == [run.seed for run in second]
    for a, b in zip(first, second, strict=True):
        assert a.positions == b.positions
        assert flops.parameters(a.model).N == flops.parameters(b.model).N


def test_the_quickstart_costs_what_it_says():
    assert sum(map(run_flops, quickstart.study().runs)) == pytest.approx(2.1e13, rel=0.1)


@pytest.mark.parametrize("family", quickstart.FAMILIES)
def test_the_rates_are_those_that_the_committed_table_gives(family):
    with (RESULTS / "quickstart_rates.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["family"] == family]
    ends = quickstart.WIDTHS[0], quickstart.WIDTHS[-1]
    for width, best in zip(ends, quickstart.BEST_RATES[family], strict=True):
        tried = {float(row["lr"]): float(row["loss"]) for row in rows if int(row["width"]) == width}
        assert set(tried) == set(quickstart_rates.GRID)
        assert min(rate for rate, loss in tried.items() if loss < min(tried.values()) + 0.01) == best
        assert quickstart.rate(family, width) == pytest.approx(best)
    inside = [quickstart.rate(family, width) for width in quickstart.WIDTHS]
    assert inside == sorted(inside, reverse=True)
    assert all(math.isfinite(rate) for rate in inside)


def test_integer_gradients_cost_no_more_than_the_seeds_do():
    """The table is that of the experiment's runs, and shows what its header says."""
    with (RESULTS / "integer_gradients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run_id"] for row in rows] == [run.name for run in integer_gradients.study().runs]
    losses = {(row["gradient_bits"], row["seed"]): float(row["loss"]) for row in rows}
    differences = [losses["8", str(seed)] - losses["0", str(seed)] for seed in integer_gradients.SEEDS]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert abs(statistics.mean(differences)) < 2 * error < 0.02


def test_integer_gradients_at_105m_parameters_cost_no_more_than_the_seeds_do():
    """The runs that there was time for, none of them of another experiment."""
    with (RESULTS / "integer_gradients_105m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run_id"] for row in rows} <= {run.name for run in integer_gradients_105m.study().runs}
    exact, integer = ([float(row["loss"]) for row in rows if row["gradient_bits"] == bits] for bits in ("0", "8"))
    error = math.hypot(*(statistics.stdev(losses) / math.sqrt(len(losses)) for losses in (exact, integer)))
    assert abs(statistics.mean(integer) - statistics.mean(exact)) < 2 * error < 0.02


def optima(family, parametrisation):
    """Best rate by width in the committed table."""
    found = curves(read(RESULTS / "learning_rate_transfer.csv"))[family, parametrisation]
    return {width: optimum(losses) for width, losses in sorted(found.items())}


@pytest.mark.parametrize("family", quickstart.FAMILIES)
def test_the_best_rate_stays_put_under_mup_and_falls_under_the_standard_parametrisation(family):
    steps = lambda best: [math.log(rate / best[256], STEP) for rate in best.values()]
    kept, standard = optima(family, "mup"), optima(family, "standard")
    assert set(kept) == set(standard) == {256, 512, 1024, 2048}
    assert max(map(abs, steps(kept))) < 1
    assert steps(standard)[-1] < -2
    assert ladder.BASES[family].lr == pytest.approx(kept[256], rel=0.05)


@pytest.fixture
def h200_runs(monkeypatch):
    monkeypatch.setattr(h200_ladder, "best_rates", lambda: dict.fromkeys(h200_ladder.CELLS, (4e-3, 2e-3)))
    return h200_ladder.study().runs


def whole_flops(run):
    """Of a run from its first step on, the trunk's included."""
    return flops.train_flops_per_token(run.model, run.data.sequence).products * run.positions


def test_the_cells_of_the_ladder_on_an_h200_differ_in_mixer_and_linear_layers_only(h200_runs):
    first, *others = ([run for run in h200_runs if run.model.family == f] for f in h200_ladder.CELLS)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert (a.data, a.seed, a.steps, a.optim) == (b.data, b.seed, b.steps, b.optim)
            own, its = (dataclasses.asdict(run.model) for run in (a, b))
            differing = {name for name in own if own[name] != its[name]}
            # Head and norm of a ternary layer are switches that dense layers do not have: set to what those are.
            assert differing <= {"mixer", "linear", "heads", "dense_head", "linear_norm"}
            assert b.model.dense_head == (not b.model.linear_norm) == (b.model.linear == "ternary")
            assert flops.parameters(a.model).N == flops.parameters(b.model).N


def test_the_ladder_on_an_h200_is_as_wide_as_it_says(h200_runs):
    assert sum(map(run_flops, h200_runs)) == pytest.approx(1.31e18, rel=0.03)
    assert sum(map(run_flops, h200_rates.study().runs)) == pytest.approx(5.6e16, rel=0.03)
    for family in h200_ladder.CELLS:
        ends = [run for run in h200_runs if run.model.family == family and run.evaluate]
        sizes = {flops.parameters(run.model).N_nonemb for run in ends}
        assert len(sizes) == 6
        assert max(sizes) > 50 * min(sizes)
        spent = sorted(map(whole_flops, ends))
        assert spent[-1] > max(5e16, 100 * spent[0])
        for run in ends:
            ratio = run.positions / flops.parameters(run.model).N
            assert 4.9 < ratio < 80.5
            assert run.positions < 4.01 * h200_ladder.CORPUS_TOKENS
        seeds = {(run.model.width, run.steps, run.seed, run.data.seed) for run in ends}
        cells = {(width, steps) for width, steps, seed, _ in seeds if seed == 2}
        assert len(cells) == 2
        assert all({(w, s, seed, seed) for w, s in cells} <= seeds for seed in (0, 1, 2))


def test_the_ladder_on_an_h200_takes_its_rates_from_the_table_and_from_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(h200_ladder, "RATES", tmp_path / "rates.csv")
    h200_ladder.best_rates.cache_clear()
    with pytest.raises(ConfigError, match=r"run experiments/h200_rates.py first"):
        h200_ladder.study()
    rows = [f"{f},{w},{lr},{3 + abs(math.log(lr / best))}" for f in h200_ladder.CELLS
            for w, best in ((128, 4e-3), (256, 2e-3)) for lr in h200_rates.GRID]  # fmt: skip
    h200_ladder.RATES.write_text("\n".join(["family,width,lr,loss", *rows]))
    assert h200_ladder.best_rates() == dict.fromkeys(h200_ladder.CELLS, (4e-3, 2e-3))
    assert h200_ladder.rate("hgrn", 512) == pytest.approx(1e-3)
    h200_ladder.best_rates.cache_clear()


def test_scale_out_compares_like_with_like():
    for small in (False, True):
        cases = scale_out.cases(small)
        runs = [case.run() for case in cases]  # meshes, batches and micro-batches that a run may have
        assert len({scale_out.key_of(dataclasses.asdict(case)) for case in cases}) == len(cases)
        assert all(run.mesh.devices == case.devices for run, case in zip(runs, cases, strict=True))
    strong = [case for case in scale_out.cases(False) if case.kind == "strong"]
    assert {case.batch for case in strong} == {64}
    assert {case.batch // case.accumulate // case.devices for case in strong} == {8}  # what a device holds at once
    rate = lambda kind, devices, tokens: {
        "kind": kind, "preset": "a", "gather": "int8", "devices": devices, "tokens_per_s": tokens,
    }  # fmt: skip
    rows = [rate("weak", 4, 360), rate("weak", 2, 200), rate("strong", 4, 100)]
    scale_out.with_efficiency(rows)
    assert [row["efficiency"] for row in rows] == ["0.900", "1.000", "1.000"]
