"""Pure error against lack of fit, and what counts as a repeated run."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, fit
from scaling.fitting.replicates import lack_of_fit
from scaling.tables.cells import cells

SIZES = tuple(np.geomspace(1e6, 2.5e8, 7))


def family(noise=0.002, seed=0, **changes):
    return Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=noise, seed=seed, **changes)).family(
        "matmul-free"
    )


def repeated(misfit, noise=0.003):
    """Three seeds a cell; `misfit` bends the losses in a way that the law cannot follow."""
    rng = np.random.default_rng(3)
    n = np.repeat(SIZES, 12)
    d = n * np.tile(np.repeat([5.0, 10, 20, 80], 3), len(SIZES))
    bend = misfit * np.sin(2 * np.pi * np.log10(n)) * np.cos(2 * np.pi * np.log10(d))
    return Runs.of(
        N=n, D=d, loss=(1.8 + 320 / n**0.36 + 420 / d**0.37) * np.exp(bend + noise * rng.normal(size=len(n)))
    )


def test_lack_of_fit_is_told_from_pure_error():
    good, bad = (lack_of_fit(fit(repeated(size))) for size in (0.0, 0.01))
    assert good.p > 0.05
    assert bad.p < 1e-6
    assert good.pure == pytest.approx(0.003, rel=0.25)
    assert bad.pure == pytest.approx(0.003, rel=0.25)
    assert (bad.pure_freedom, bad.misfit_freedom) == (56, 23)
    assert "the law misses more" in bad.sentence()


def test_the_size_of_the_misfit_is_told_as_it_is_however_many_seeds_there_are():
    """The bend below has an rms of 0.5 %; counted by runs it would be told as the root of three times that."""
    assert lack_of_fit(fit(repeated(0.01))).misfit == pytest.approx(0.005, rel=0.25)


@pytest.mark.parametrize("column", ["U", "precision", "width", "depth", "activation_bits", "sparsity", "annealing"])
def test_runs_that_differ_in_what_is_recorded_are_no_repeats(column):
    runs = family()
    values = {"precision": ["bf16", "int8"], "sparsity": [0.0, 0.5], "annealing": [0.2, 0.9]}.get(column, [1e5, 2e5])
    rows = [r | {"run_id": f"{r['run_id']}-{v}", column: v} for r in runs.records() for v in values]
    assert len(np.unique(cells(Runs.from_rows(rows)))) == 2 * len(runs)
    alike = [r | {column: values[0]} for r in rows]
    assert len(np.unique(cells(Runs.from_rows(alike)))) == len(runs)


def test_no_replicates_no_test():
    assert lack_of_fit(fit(family())) is None


def test_copied_rows_tell_nothing_of_chance():
    copied = family()
    assert lack_of_fit(fit(copied.select(np.tile(np.arange(len(copied)), 2)))) is None
