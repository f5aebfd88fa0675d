"""The second worked example: its numbers, and that the page says what the script says."""

import csv

import numpy as np
import pytest
from conftest import ROOT

from experiments import xlstm_claim as claim
from scaling import Runs
from scaling.__main__ import main

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def committed():
    with (DOCS / "xlstm-claim.csv").open() as stream:
        return {row["quantity"]: row["value"] for row in csv.DictReader(stream)}


def test_the_table_still_says_what_is_committed(committed):
    for name, value, _ in claim.table_rows():
        assert committed[name] == value


def test_runs_of_one_budget_cost_what_it_says_and_none_is_there_twice():
    runs = Runs.read(claim.TABLE)
    budget = runs["budget"].astype(float)
    known = np.isfinite(budget)
    assert len(runs) == len(set(runs["run_id"])) == 430
    assert np.abs(np.log(runs["flops"][known] / budget[known])).max() < 0.11
    assert (runs["flops"] > 6 * runs["N"] * runs["D"] * 0.7).all()


def test_the_lead_and_its_change_are_those_committed(committed):
    e = claim.ensemble()
    for name, value, _ in claim.frontier_rows(e):
        wanted, found = (text.replace("(", "").replace(")", "").split() for text in (committed[name], value))
        for old, new in zip(wanted, found, strict=True):
            if name != "headline" and old != "to":
                assert float(new) == pytest.approx(
                    float(old), abs=0.004 if "FLOP" in name or "change" in name else 0.02
                )
    assert claim.told(e, 3e19) != claim.told(claim.ensemble(mixing=False), 3e19)


def test_what_is_said_on_another_axis_is_said_of_that_axis(capsys):
    """In 6 N D both families reach from 6.7e18 to 2.0e19, not as far as in the authors' FLOP."""
    asked = ["--where", "context=16384", "--where", "loss<5", "--draws", "200", "--axis", "flops-6nd"]
    main(["compare", str(claim.TABLE), *asked])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Best allocation"))
    assert "at every compute measured, 6.7e+18 FLOP (6 N D) to 2.0e+19 FLOP (6 N D)" in line


def test_the_page_quotes_every_committed_value(committed):
    page = (DOCS / "xlstm-claim.md").read_text()
    for name, value in committed.items():
        assert f"| {name} | {value} |" in page
