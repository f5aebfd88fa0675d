"""What choices nobody can defend do to the answer."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs
from scaling.fitting.sensitivity import sensitivity

SIZES = tuple(np.geomspace(1e6, 2.5e8, 7))


def family(change=None, **columns):
    rows = [
        r | columns
        for r in ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=0.002)
        if r["family"] != "matmul-free"
    ]
    return Runs.from_rows([row | (change(i, row) if change else {}) for i, row in enumerate(rows)])


def variants(runs):
    return {(v.objective, v.dropped): v for v in sensitivity(runs, starts=8)}


def test_every_objective_and_exclusion_of_a_clean_table():
    found = variants(family())
    assert [objective for objective, dropped in found if dropped == "none"] == ["huber", "lad", "log-ls", "raw-ls"]
    assert {dropped for _, dropped in found} == {
        "none",
        "highest loss",
        "3 highest losses",
        "5 highest losses",
        "cheapest tenth",
    }
    assert all(v.allocation == pytest.approx(0.37 / 0.71, abs=0.05) for v in found.values())


def test_rows_that_lint_doubts_are_left_out_once():
    found = variants(family(lambda i, r: {"loss": r["loss"] * 1.3} if i == 11 else {}))[
        ("huber", "the rows that lint doubts")
    ]
    assert found.rows == 27
    assert found.params["E"] == pytest.approx(1.8, abs=0.05)


def test_a_head_that_does_not_count_changes_the_exponent():
    runs = family(lambda i, r: {"N_nonemb": r["N"] - 2e3 * r["N"] ** 0.4})
    found = variants(runs)
    assert found[("huber", "the head in N")].params["alpha"] < found[("huber", "none")].params["alpha"]
