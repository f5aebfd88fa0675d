"""The one list of gates: what each refuses, and at which limit."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, Spec, analyse, fit
from scaling.analysis import Analysis, exponent_gate
from scaling.fitting.fit import gates_of

SIZES = tuple(np.geomspace(1e6, 2.5e8, 7))


@pytest.fixture(scope="module")
def clean():
    return Analysis.of(Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 80), noise=0.002)), Spec(draws=200))


def test_a_good_ladder_passes_every_gate_and_each_is_listed_once(clean):
    assert clean.failed == ()
    names = [gate.name for gate in clean.gates]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("correlation", "passed"), [(0.98, True), (0.995, False)])
def test_correlated_parameters_are_not_identified(clean, correlation, passed):
    fitted = clean.fits["matmul-free"]
    gate = gates_of(replace(fitted, certificate=replace(fitted.certificate, correlation=correlation)))[-1]
    assert gate.passed is passed


@pytest.mark.parametrize(("factor", "passed"), [(1.9, True), (2.1, False)])
def test_an_exponent_known_within_a_factor_of_two_passes(clean, factor, passed):
    e = clean.own["matmul-free"]
    theta = e.draws.theta.copy()
    place = e.law.names.index("alpha")
    theta[:, 0, place] = 0.3 * factor ** np.linspace(0, 1 / 0.95, len(theta))
    gate = exponent_gate(replace(e, draws=replace(e.draws, theta=theta)), "matmul-free")
    assert gate.passed is passed


def test_an_exponent_that_the_runs_tell_nothing_of_fails():
    rows = ladder_rows(sizes=(1e6, 1.2e6, 1.5e6), ratios=(10, 12, 15), noise=0.05)
    e = analyse(Runs.from_rows(rows).family("matmul-free"), draws=200)
    assert not exponent_gate(e, "matmul-free").passed


def test_a_joint_prediction_names_its_family():
    runs = Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 20, 80), noise=0.002))
    joint = fit(runs, share=("E",))
    with pytest.raises(ValueError, match="name transformer"):
        joint.predict(1e7, 1e8)
    assert joint.predict(1e7, 1e8, "matmul-free") != joint.predict(1e7, 1e8, "transformer++")
