"""Every fault that lint knows: a table that has it is told so, with the rows; the table without it is not."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, ScalingError, Spec, fit
from scaling.analysis import Analysis
from scaling.lint import lint, lint_gates
from scaling.tables.cells import cells

SIZES = tuple(np.geomspace(1e6, 2.5e8, 7))
STATED = {"val_set": "c4", "loss_unit": "nats", "flops_rule": "exact", "embedding_counted": "false"}


def rows_with(change=None, **columns):
    """A clean two-family ladder, every row changed by `change(index, row)`."""
    rows = [row | STATED | columns for row in ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=0.002)]
    return [row | (change(i, row) if change else {}) for i, row in enumerate(rows)]


def findings(rows):
    return {f.name: f for f in lint(Runs.from_rows(rows, allow_midrun=True))}


def test_a_clean_table_has_no_findings():
    assert findings(rows_with()) == {}


def nth(number, **changes):
    return lambda i, row: changes if i == number else {}


def third(name, value, others):
    """A column that says `others` of every run but one."""
    return lambda i, row: {name: value if i == 3 else others}


@pytest.mark.parametrize(
    ("name", "severity", "change", "row"),
    [
        ("duplicates", "error", lambda i, r: rows_with()[0] | {"run_id": "copy"} if i == 1 else {}, "copy"),
        ("near duplicates", "warning", lambda i, r: {"D": r["D"] * 0.501} if i == 1 else {}, "transformer++-0-10"),
        ("mid-schedule points", "error", nth(2, ended="false"), "transformer++-0-20"),
        ("mixed tokenizer", "error", nth(3, tokenizer="other"), "transformer++-0-80"),
        ("mixed optimizer", "error", third("optimizer", "muon", "adamw"), "transformer++-0-80"),
        ("mixed gradient_bits", "error", third("gradient_bits", 8, 0), "transformer++-0-80"),
        ("mixed init", "error", third("init", "runs/imported", "random"), "transformer++-0-80"),
        ("mixed settings", "error", third("settings", "optim.clip=0.5", "usual"), "transformer++-0-80"),
        ("mixed device", "warning", third("device", "NVIDIA H200", "cpu"), "transformer++-0-80"),
        (
            "mixed code",
            "warning",
            third("code", "1e5", "100000"),
            "transformer++-0-80",
        ),  # no numbers, though equal ones
        ("mixed loss_unit", "error", nth(3, loss_unit="bits per byte"), "transformer++-0-80"),
        ("mixed embedding_counted", "error", nth(3, embedding_counted="true"), "transformer++-0-80"),
        ("mixed schedule", "warning", nth(3, schedule="cosine"), "transformer++-0-80"),
        ("long warm-up", "warning", lambda i, r: {"warmup_tokens": r["D"] * (0.3 if i == 3 else 0.001)}, "++-0-80"),
        ("repeated data", "warning", lambda i, r: {"U": r["D"] / (5 if i == 4 else 1)}, "transformer++-1-5"),
        ("loss rises with data", "warning", lambda i, r: {"loss": r["loss"] * 1.2} if i == 3 else {}, "++-0-80"),
        ("looks diverged", "warning", lambda i, r: {"loss": r["loss"] * 1.5} if i == 3 else {}, "++-0-80"),
        ("shape rule varies", "warning", lambda i, r: {"width": 64, "depth": 4 if i == 5 else 1}, "transformer++-1-10"),
    ],
)
def test_fault_is_found_with_its_row(name, severity, change, row):
    found = findings(rows_with(change))[name]
    assert found.severity == severity
    assert any(row in run_id for run_id in found.rows)


def test_a_family_of_two_recipes_is_no_law_in_silence_and_two_families_may_differ():
    mixed = Runs.from_rows(rows_with(third("optimizer", "muon", "adamw")))
    assert [(gate.name, gate.passed) for gate in lint_gates(mixed)] == [("mixed optimizer [transformer++]", False)]
    own = rows_with(lambda i, row: {"optimizer": "muon" if row["family"] == "matmul-free" else "adamw"})
    weights = [row | {"init": f"imported-{row['N']}"} for row in own]  # each size starts from its own
    assert findings(weights) == {}


def test_numbers_of_targets_and_of_positions_are_told_apart():
    """A row that does not say counts positions, which are the targets where documents are joined."""
    blank = lambda documents: rows_with(lambda i, row: {"documents": documents, "D_rule": "" if i == 3 else "targets"})
    found = findings(blank("separate"))["mixed D_rule"]
    assert (found.severity, found.message, found.rows) == ("error", "positions, targets", (rows_with()[3]["run_id"],))
    assert findings(blank("joined")) == findings(rows_with(D_rule="targets")) == findings(rows_with()) == {}


def test_conventions_that_nobody_recorded_are_listed():
    found = lint(Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80))))
    assert [f.message for f in found if f.name == "conventions not recorded"] == [
        "val_set, loss_unit, flops_rule, embedding_counted (add with --set COLUMN=VALUE)"
    ]


def test_identical_losses_and_one_learning_rate():
    found = findings(rows_with(loss=3.0, lr=1e-3))
    assert found["identical losses"].severity == "error"
    assert "lr = 0.001" in found["one learning rate"].message


def test_learning_rates_within_a_cell_are_a_sweep():
    rows = [row | {"run_id": f"{row['run_id']}-{lr}", "lr": lr} for row in rows_with() for lr in (1e-3, 2e-3)]
    assert len(findings(rows)["learning-rate sweep"].rows) == len(rows)


def test_off_centre_isoflop_curves_are_named():
    """Two budgets; on the second all sizes lie on one side of the best one."""
    rows = []
    for budget, sizes in ((1e18, np.geomspace(2e7, 8e8, 7)), (1e19, np.geomspace(2e6, 2e7, 7))):
        for n in sizes:
            d = budget / (6 * n)
            loss = 1.8 + 180 / n**0.34 + 420 / d**0.37
            rows.append({"run_id": f"{budget:g}-{n:.0f}", "family": "a", "N": n, "D": d, "loss": loss, "flops": budget})
    found = findings(rows)["off-centre IsoFLOP"]
    assert "1e+19" in found.message
    assert all(run_id.startswith("1e+19") for run_id in found.rows)


def test_unequal_designs_of_two_families():
    assert "unequal designs" in findings(rows_with()[:-1])


@pytest.mark.parametrize("column", ["tokenizer", "val_set", "loss_unit", "flops_rule", "embedding_counted"])
def test_a_fit_refuses_a_family_with_mixed_conventions(column):
    odd = {"embedding_counted": "true", "loss_unit": "bits per byte"}.get(column, "other")
    runs = Runs.from_rows(rows_with(nth(3, **{column: odd}))).family("transformer++")
    with pytest.raises(ScalingError, match=f"mixes {column}"):
        fit(runs)


def test_near_duplicates_are_found_although_their_sizes_differ_in_the_last_digits():
    """In order of N the rows of other budgets stand between the two that are one cell."""
    rows = rows_with()
    for i, row in enumerate(rows):
        row["N"] *= 1 + 1e-5 * ((7 * i) % 11)
    again = rows[2] | {"run_id": "again", "N": rows[2]["N"] * 1.00004, "loss": rows[2]["loss"] * 1.001}
    assert "near duplicates" not in findings(rows)
    assert set(findings([*rows, again])["near duplicates"].rows) == {"again", rows[2]["run_id"]}
    place = cells(Runs.from_rows([*rows, again]))
    assert place[-1] == place[2]
    assert len(set(place)) == len(rows)


def test_errors_of_lint_are_gates_of_fits_and_keep_their_rows():
    rows = rows_with()
    runs = Runs.from_rows([*rows, rows[0] | {"run_id": "copy"}])
    assert lint_gates(Runs.from_rows(rows)) == []
    (gate,) = lint_gates(runs)
    assert (gate.name, gate.passed) == ("duplicates [transformer++]", False)
    assert "transformer++-0-5, copy" in gate.message
    assert gate in Analysis.of(runs, Spec(draws=5)).gates
    midrun = Runs.from_rows(rows_with(nth(2, ended="false")), allow_midrun=True)
    assert lint_gates(midrun) == []


def test_a_blank_is_no_agreement():
    """Half of a family's rows counted exactly and half not said: they do not compare."""
    found = findings(rows_with(lambda i, row: {"flops_rule": "" if i % 2 else "exact"}))["mixed flops_rule"]
    assert found.severity == "error"
    assert "(blank)" in found.message


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda i, r: {"flops": r["flops"] * 1e-9}, "units of flops"),
        (lambda i, r: {"flops": r["flops"] * 1e3}, "units of flops"),
        (lambda i, r: {"N": r["N"] * 1e-6, "flops": r["flops"] * 1e-6}, "units of N"),
        (lambda i, r: {"D": r["D"] * 1e-9, "flops": r["flops"] * 1e-9}, "units of D"),
    ],
)
def test_numbers_in_other_units_are_an_error_of_every_verb(change, name):
    found = findings(rows_with(change))[name]
    assert found.severity == "error"
    assert "units" in found.message or "millions" in found.message


def test_only_losses_far_above_a_smaller_run_on_fewer_tokens_look_diverged():
    """As by comparing every run with every other; runs that merely waste compute do not."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes, losses = rng.choice([1e6, 2e6, 4e6], 20), rng.uniform(2, 4, 20)
        tokens = rng.choice([1e8, 2e8, 4e8], 20) + rng.random(20)
        rows = [
            {"run_id": f"r{i}", "family": "f", "N": float(n), "D": float(d), "loss": float(loss)}
            for i, (n, d, loss) in enumerate(zip(sizes, tokens, losses, strict=True))
        ]
        expected = {
            a["run_id"]
            for a in rows
            if any(b["N"] <= a["N"] and b["D"] <= a["D"] and a["loss"] > 1.25 * b["loss"] for b in rows)
        }
        found = findings(rows).get("looks diverged")
        assert (set(found.rows) if found else set()) == expected
