"""Nominal 95 % intervals on simulated ladders; the full table is experiments/results/scaling_coverage.csv."""

import csv

import pytest
from conftest import ROOT

from scaling.uncertainty.simulate import CASES, SIX, TRUTHS, Noise, coverage

LADDERS = 40


@pytest.mark.parametrize("noise", [Noise(0.003), Noise(0.001, 0.003)], ids=["run noise", "trunk noise"])
def test_intervals_of_six_trunks_cover_within_three_standard_errors(noise):
    shares = coverage(TRUTHS, SIX, noise, LADDERS, draws=150)
    assert min(shares.values()) >= 0.95 - 3 * (0.95 * 0.05 / LADDERS) ** 0.5
    assert sum(shares.values()) / len(shares) <= 0.99  # intervals that hold everything say nothing
    assert {"E", "alpha", "beta", "loss beyond", "difference beyond"} <= set(shares)


def test_committed_table_is_of_a_thousand_ladders_and_of_these_cases():
    with (ROOT / "experiments" / "results" / "scaling_coverage.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["bootstrap"]) for row in rows] == [(case.name, case.method) for case in CASES]
    assert {row["ladders"] for row in rows} == {"1000"}
