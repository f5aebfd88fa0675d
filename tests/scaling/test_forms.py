"""Every law: its Jacobian, and its truth recovered from data that obey it exactly."""

import warnings

import numpy as np
import pytest

from scaling import Runs, ScalingError, fit
from scaling.laws.base import centre_of
from scaling.laws.formats import bits_of, gaussian_error
from scaling.laws.forms import LAWS

N = np.repeat(np.geomspace(1e6, 1e9, 7), 5)
D = (N.reshape(7, 5) * np.array([2, 8, 20, 80, 320])).ravel()
C = 6 * N * D
UNIQUE = np.minimum(D, 4e9)
BITS = np.tile([16, 8, 4, 3, 2], 7).astype(float)
IDLE = np.tile([0.0, 0.5, 0.75, 0.9, 0.3], 7) + 0.05 * (np.arange(35) % 2)
ANNEALED = np.tile([0.0, 0.3, 1.0, 0.6, 0.1], 7)


def repeated(tokens, half, unique=UNIQUE):
    return unique * (1 + half * -np.expm1(-(tokens / unique - 1) / half))


def excessive(half):
    """Effective N: the best size for U tokens, and what the parameters beyond it are worth."""
    suited = np.minimum(N, (0.34 * 180 / (0.37 * 420)) ** (1 / 0.34) * UNIQUE ** (0.37 / 0.34))
    return repeated(N, half, suited)


def bounded(first, second, third):
    h = first / N**0.3 + second / D**0.35 + third * N**0.25 / UNIQUE**0.4
    return 1.7 + (9.0 - 1.7) * h / (1 + h)


FIDELITY = np.array([-np.log(gaussian_error(f"{bits:g}")) / np.log(4) for bits in BITS])
TRUTHS = {
    "power": ({"A": 60.0, "alpha": 0.05}, 60.0 / C**0.05),
    "power-floor": ({"E": 1.8, "A": 800.0, "alpha": 0.16}, 1.8 + 800.0 / C**0.16),
    "chinchilla": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37},
        1.8 + 180 / N**0.34 + 420 / D**0.37,
    ),
    "tied": ({"E": 1.8, "A": 300.0, "B": 900.0, "alpha": 0.35}, 1.8 + 300 / N**0.35 + 900 / D**0.35),
    "kaplan": (
        {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
        ((8.8e13 / N) ** (0.076 / 0.095) + 5.4e13 / D) ** 0.095,
    ),
    "gamma": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37, "gamma": 1.2},
        1.8 + (180 / N**0.34 + 420 / D**0.37) ** 1.2,
    ),
    "data-constrained": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37, "R_D": 15.0},
        1.8 + 180 / N**0.34 + 420 / repeated(D, 15.0) ** 0.37,
    ),
    "data-constrained-excess": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37, "R_D": 15.0, "R_N": 5.0},
        1.8 + 180 / excessive(5.0) ** 0.34 + 420 / repeated(D, 15.0) ** 0.37,
    ),
    "bounded": (
        {"E": 1.7, "L0": 9.0, "A": 40.0, "B": 200.0, "C": 8.0, "alpha": 0.3, "beta": 0.35, "gamma": 0.25, "delta": 0.4},
        bounded(40.0, 200.0, 8.0),
    ),
    "capacity": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37, "F": 0.5, "C": 0.8},
        1.8 + 180 / (N * np.tanh(0.5 * FIDELITY) ** 0.8) ** 0.34 + 420 / D**0.37,
    ),
    # The published coefficients: T5 on C4 (Frantar et al. 2023, eq. 1, where B is a_D^b_D), and mixtures of experts
    # (Abnar et al. 2025, eq. 6 and table 3, where f is -delta and c is -lambda).
    "sparse": (
        {"E": 0.651, "A0": 45.0, "A1": 16.8, "B": 6.9e8**0.203, "alpha": 0.245, "beta": 0.203, "b": 0.722},
        (16.8 * (1 - IDLE) ** 0.722 + 45.0) * (1 / N) ** 0.245 + (6.9e8 / D) ** 0.203 + 0.651,
    ),
    "mixture": (
        {"E": 0.94, "A": 16612.5, "B": 5455.67, "C": 0.4598, "F": 17.26}
        | {"alpha": 0.5962, "beta": 0.3954, "gamma": 0.1595, "f": -0.1603, "c": 0.1666},
        16612.5 / N**0.5962
        + 5455.67 / D**0.3954
        + 0.4598 / (1 - IDLE) ** -0.1666
        + 17.26 / ((1 - IDLE) ** 0.1603 * N**0.1595)
        + 0.94,
    ),
    "annealed": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37, "G": 0.12},
        1.8 + 180 / N**0.34 + 420 / D**0.37 - 0.12 * ANNEALED,
    ),
    "precision": (
        {"E": 1.8, "A": 180.0, "B": 420.0, "alpha": 0.34, "beta": 0.37, "gamma": 2.5},
        1.8 + 180 / (N * -np.expm1(-BITS / 2.5)) ** 0.34 + 420 / D**0.37,
    ),
    "broken-power": (
        {"E": 1.0, "A": 60.0, "c0": 0.05, "c1": 0.12, "d1": 1e18, "f1": 0.7},
        1.0 + 60 * C**-0.05 * (1 + (C / 1e18) ** (1 / 0.7)) ** (-0.12 * 0.7),
    ),
}


def table(name):
    beside = {"U": UNIQUE, "precision": BITS, "sparsity": IDLE, "annealing": ANNEALED}
    return Runs.of(N=N, D=D, loss=TRUTHS[name][1], **beside)


def test_every_law_is_tested():
    assert set(TRUTHS) == set(LAWS)


@pytest.mark.parametrize("name", sorted(LAWS))
def test_jacobian_is_the_derivative(name):
    runs, law = table(name), LAWS[name]()
    centre = centre_of(runs)
    features = law.features(runs, centre)
    theta = law.starts(4, np.log(runs["loss"]), features, np.random.default_rng(3))
    value, jacobian = law.value_jacobian(theta, features)
    np.testing.assert_allclose(value, law.value(theta, features), rtol=1e-12)
    for p, step in enumerate(1e-4 * np.eye(theta.shape[1])):
        near, far = (
            (law.value(theta + k * step, features) - law.value(theta - k * step, features)) / k for k in (1, 2)
        )
        numeric = (4 * near - far) / 6e-4  # Richardson: the error is of order step^4
        np.testing.assert_allclose(jacobian[:, p], numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(LAWS))
def test_truth_is_recovered_and_both_solvers_agree(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit(table(name), law=name, objective="log-ls")
    truth = TRUTHS[name][0]
    np.testing.assert_allclose(fitted.residuals(), 0, atol=1e-6)
    tolerance = 0.05 if name in ("broken-power", "gamma") else 5e-3  # their parameters trade off along a ridge
    for parameter, value in truth.items():
        assert fitted.params[parameter] == pytest.approx(value, rel=tolerance), parameter


@pytest.mark.parametrize("name", ["gamma", "kaplan"])
def test_second_solver_confirms_noisy_fits(name):
    rng = np.random.default_rng(0)
    runs = Runs.of(N=N, D=D, loss=TRUTHS[name][1] * np.exp(0.003 * rng.normal(size=len(N))))
    fitted = fit(runs, law=name)
    assert abs(fitted.certificate.second_solver_gap) < 1e-6


def test_prediction_uses_the_same_coordinates_as_the_fit():
    for name in ("kaplan", "power-floor", "broken-power"):
        runs = table(name)
        fitted = fit(runs, law=name, objective="log-ls")
        np.testing.assert_allclose(fitted.predict(N, D, flops=C), runs["loss"], rtol=1e-5)


def test_columns_that_a_law_needs_are_asked_for():
    with pytest.raises(ScalingError, match="no column 'U'"):
        fit(Runs.of(N=N, D=D, loss=TRUTHS["chinchilla"][1]), law="data-constrained")


@pytest.mark.parametrize("value", [1.0, 1.5, np.nan])
def test_a_row_that_says_nothing_of_what_a_law_needs_is_named(value):
    idle = IDLE.copy()
    idle[3] = value
    with pytest.raises(ScalingError, match=r"'sparsity' holds nothing .* in run 'all-4'"):
        fit(Runs.of(N=N, D=D, loss=TRUTHS["sparse"][1], sparsity=idle), law="sparse")


def test_bits_by_name():
    assert bits_of("ternary") == pytest.approx(1.585, abs=1e-3)
    assert bits_of("int8") == 8.0
    assert bits_of("bf16") == 16.0
    with pytest.raises(ScalingError, match="no number of bits"):
        bits_of("wide")


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        ("e4m3", 8),
        ("fp8_e5m2", 8),
        ("bf16", 16),
        ("int8", 8),
        ("ternary", np.log2(3)),
        ("4", 4),
        ("6.5 bits", 6.5),
        ("w2", 2),
    ],
)
def test_a_precision_is_read_as_its_bits(word, bits):
    assert bits_of(word) == pytest.approx(bits)


@pytest.mark.parametrize("word", ["", "half", "v3.2-beta", "int8x16"])
def test_a_precision_that_names_no_bits_is_refused(word):
    with pytest.raises(ScalingError, match="names no number of bits"):
        bits_of(word)


@pytest.mark.parametrize("name", ["chinchilla", "sparse", "mixture"])
def test_priors_of_powers_lie_where_powers_do(name):
    """An exponent is drawn as its logarithm, a power that may be negative as itself; both lie about 0.35."""
    runs, law = table(name), LAWS[name]()
    prior = law.prior(np.log(runs["loss"]), law.features(runs, centre_of(runs)))
    middle = np.where(law.logged, np.exp(prior.mean), prior.mean)
    slopes = [slope for term in law.terms for slope, _ in term.powers]
    assert middle[slopes] == pytest.approx(0.35, abs=0.01)
