"""The worked example: its numbers, and that the page says what the script says."""

import csv

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import t as student

from experiments import paper_claim as claim
from experiments.simulated_ladders import optimal_loss

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def committed():
    with (DOCS / "paper-claim.csv").open() as stream:
        return {row["quantity"]: (row["value"], row["how"]) for row in csv.DictReader(stream)}


def test_the_points_still_say_what_is_committed(committed):
    for name, value, how in claim.point_rows():
        assert committed[name] == (value, how)


def test_the_planned_ladder_is_the_committed_one(committed):
    plan = claim.deciding_plan()
    shape = "; ".join(f"{t.n:.2g} x {len(t.ratios)}" for t in plan.trunks)
    assert committed["a ladder for that price"][0] == shape
    assert committed["its cost"][0] == f"{plan.flops:.2e} FLOP"
    assert max(t.largest_run for t in plan.trunks) <= claim.LARGEST_RUN


def test_the_page_quotes_every_committed_value(committed):
    page = (DOCS / "paper-claim.md").read_text()
    for name, (value, _) in committed.items():
        assert f"| {name} | {value} |" in page


def test_crossings_are_those_of_the_digitised_lines():
    """As drawn 10^22.9; refitted about 10^24.5, under 0.02 nats of reading error 10^22.9 to 10^31."""
    assert claim.as_drawn() == pytest.approx(22.9, abs=0.02)
    rounding = (2 * 5e-4 + 2 * 5e-5 * 22.9) / (0.3505 - 0.2685)  # of four-digit coefficients, carried to the crossing
    assert abs(np.log10(claim.CLAIM) - claim.as_drawn()) < rounding
    line, _, freedom = claim.lines(claim.table(), power=False)
    slopes = [np.polyfit(np.log10(f[:, 0]), f[:, 1], 1) for f in claim.table()]
    assert claim.crossing(line) == pytest.approx(
        -np.diff([s[1] for s in slopes])[0] / np.diff([s[0] for s in slopes])[0]
    )
    assert freedom == 2
    low, high = np.quantile(claim.jittered(False, 4000), [0.05, 0.95], method="nearest")
    assert low == pytest.approx(22.9, abs=0.1)
    assert high == pytest.approx(31, abs=1)


def test_fieller_ends_are_where_the_difference_is_just_not_significant():
    line, covariance, freedom = np.array([10.0, -0.4]), np.diag([1e-4, 1e-7]), 5
    low, high = claim.fieller(line, covariance, freedom)
    for end in (low, high):
        gap, sd = line[0] + line[1] * end, np.sqrt(covariance[0, 0] + end**2 * covariance[1, 1])
        assert abs(gap) / sd == pytest.approx(student.ppf(0.975, freedom), rel=0.05)
    assert low < claim.crossing(line) < high


def test_assumed_laws_agree_with_the_figure():
    for laws, ahead in ((claim.claimed_laws(), True), (claim.parallel_laws(), False)):
        first, second = laws.values()
        gap = optimal_loss(second, claim.GAP_AT) - optimal_loss(first, claim.GAP_AT)
        assert gap == pytest.approx(claim.GAP, abs=1e-6)
        assert (optimal_loss(second, 1e24) < optimal_loss(first, 1e24)) is ahead
