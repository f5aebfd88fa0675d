"""What docs/scaling.md says of the committed studies is what their tables hold."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.interval_coverage import METHODS, cases

ROOT = Path(__file__).parents[2]
ANSWERS = ("crossing", "difference", "new run", "rho")
KINDS = {
    "misfit as assumed": "assumed",
    "another law": "power",
    "slopes that drift": "drift",
    "long waves": "waves",
    "floors 2 % apart": "floors",
    "parallel laws": "never",
}


@pytest.fixture(scope="module")
def coverage():
    rows = csv.DictReader((ROOT / "experiments/results/interval_coverage.csv").open())
    return {(row["case"], row["method"]): row for row in rows}


def test_every_case_has_at_least_two_hundred_ladders(coverage):
    assert set(coverage) == {(name, method) for name in cases() for method in METHODS}
    assert min(int(row["ladders"]) for row in coverage.values()) >= 200


def test_documented_coverage_is_that_of_the_table(coverage):
    text = (ROOT / "docs/scaling.md").read_text().split("<!-- coverage -->")[1]
    lines = re.findall(r"^\| ([a-z][^|]*?)(?:, 0 to[^|]*)? \(\d+\) \| (\w+) \| (.*) \|$", text, re.M)
    assert len(lines) >= 18
    for label, method, numbers in lines:
        own = [coverage[name, method] for name, case in cases().items() if case.kind == KINDS[label]]
        found = [100 * np.mean([float(row[answer]) for row in own]) for answer in ANSWERS]
        said = [float(number) for number in numbers.split("|")]
        wrong = 100 * np.mean([float(row["false two-sided"]) for row in own])
        np.testing.assert_allclose(said, [*found, np.mean(found), wrong], atol=0.11)


def test_intervals_keep_their_word_in_the_table(coverage):
    """Assumed misfit: 94 to 97 % pooled and no row of tied answers below 92 %; false crossings in at most 5 %."""
    assumed = [name for name, case in cases().items() if case.kind == "assumed"]
    tied = np.array([[float(coverage[name, "tied"][answer]) for answer in ANSWERS] for name in assumed])
    assert 0.94 <= tied.mean() <= 0.9751
    assert tied.min() >= 0.92
    for kind, least in (("power", 0.9), ("drift", 0.9), ("floors", 0.9), ("waves", 0.85)):
        own = [name for name, case in cases().items() if case.kind == kind]
        head = np.array([[float(coverage[name, "headline"][answer]) for answer in ANSWERS] for name in own])
        assert head.mean(axis=0).min() >= least, kind
    never = [name for name, case in cases().items() if case.kind == "never"]
    assert max(float(coverage[name, "headline"]["false two-sided"]) for name in never) <= 0.05
