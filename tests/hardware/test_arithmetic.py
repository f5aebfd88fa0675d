"""Fixed-point arithmetic against exact fractions and float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.special

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.arithmetic import Float

RNG = np.random.default_rng(0)
MANTISSAS = np.concatenate([[2**16, 2**16 + 1, 2**17 - 1], RNG.integers(2**16, 2**17, 300)])
EXPONENTS = np.concatenate([[0, -1, 7], RNG.integers(-60, 60, 300)])
FLOATS = Float(MANTISSAS, EXPONENTS)
OTHERS = Float(MANTISSAS[::-1], EXPONENTS[::-1] % 20)


def exact(x: Float) -> list[Fraction]:
    return [Fraction(int(m)) * Fraction(2) ** int(e) for m, e in zip(*np.broadcast_arrays(*x), strict=True)]


def assert_rounded_down(found: Float, expected: list[Fraction], units: int) -> None:
    """Mantissas have 17 bits, and at most `units` of their last bit are missing."""
    assert ((found.mantissa >= 2**16) & (found.mantissa < 2**17)).all()
    for value, truth, exponent in zip(exact(found), expected, found.exponent, strict=True):
        assert 0 <= truth - value < units * Fraction(2) ** int(exponent)


def test_the_sigmoid_is_within_its_stated_error_everywhere():
    x = np.concatenate([np.arange(-(2**25), 2**25, 97), [0, 1, -1, 2**31 - 1, -(2**31) + 1, 2**24 - 1, -(2**24)]])
    truth = scipy.special.expit(x / 2**20)
    error = np.abs(fixed.sigmoid(x) / 2**17 - truth)
    assert 2.0e-5 < error.max() < 2.1e-5


def test_the_sigmoid_of_minus_x_is_one_minus_that_of_x():
    x = RNG.integers(1, 2**26, 1000)
    both = fixed.sigmoid(x) + fixed.sigmoid(-x)
    assert ((both == 2**17) | (both == 2**17 - 1)).all()
    assert fixed.sigmoid(np.array([0])).tolist() == [2**16]


def test_the_largest_sigmoid_is_an_operand():
    assert fixed.sigmoid(np.array([2**31 - 1])).tolist() == [2**17 - 1]
    assert fixed.sigmoid(np.array([-(2**31) + 1])).tolist() == [0]


def test_lines_of_the_sigmoid_fit_the_bits_of_the_table():
    starts, slopes = fixed.sigmoid_lines()
    assert 0 <= starts.min() <= starts.max() < 2**fixed.MANTISSA
    assert 0 <= slopes.min() <= slopes.max() < 2**fixed.SLOPE


@pytest.mark.parametrize("shift", [0, 1, 2, 17, 36, 63])
def test_shifting_rounds_halves_up(shift):
    v = np.concatenate([RNG.integers(-(2**35), 2**35, 200), [2**shift >> 1, -(2**shift >> 1), 0, -1, 1]])
    v = v[np.abs(v) < 2**36]
    expected = [math.floor(Fraction(int(n), 2**shift) + Fraction(1, 2)) for n in v]
    assert fixed.shift_rounded(v, np.array(shift)).tolist() == expected


def test_shifts_that_no_hardware_has_are_the_nearest_that_it_has():
    assert fixed.shift_rounded(np.array([12345]), np.array(-3)).tolist() == [12345]
    assert fixed.shift_rounded(np.array([2**35, -(2**35)]), np.array(70)).tolist() == [0, 0]


def test_operands_have_18_bits_whatever_the_maximum():
    largest = np.array([0, 1, 2**17 - 1, 2**17, 2**18 - 1, 2**31 - 1])
    assert fixed.operand_shift(largest).tolist() == [0, 0, 0, 1, 1, 14]
    assert (np.abs(fixed.operand(largest, fixed.operand_shift(largest))) < 2**17).all()
    assert fixed.operand(np.array([2**20, -(2**20), -5]), 1).tolist() == [2**17 - 1, -(2**17), -3]


def test_saturation_is_symmetric():
    values = np.array([2**40, -(2**40), 2**31 - 1, -(2**31), 7])
    assert fixed.saturate(values, 32).tolist() == [2**31 - 1, -(2**31) + 1, 2**31 - 1, -(2**31) + 1, 7]


def test_lengths_of_integers():
    n = np.concatenate([2 ** np.arange(50), 2 ** np.arange(1, 50) - 1, [0]])
    assert fixed.bit_length(n).tolist() == [int(k).bit_length() for k in n]


def test_integers_become_floats():
    n = np.concatenate([RNG.integers(1, 2**48, 300), [1, 2**16, 2**17 - 1, 2**17, 2**17 + 1, 2**48 - 1]])
    found = fixed.to_float(n, -20)
    assert_rounded_down(found, [Fraction(int(k), 2**20) for k in n], 1)
    assert fixed.to_float(np.array(0), 5).mantissa == 0


def test_products_of_floats():
    expected = [a * b for a, b in zip(exact(FLOATS), exact(OTHERS), strict=True)]
    assert_rounded_down(fixed.multiply(FLOATS, OTHERS), expected, 1)
    assert fixed.multiply(FLOATS, fixed.to_float(np.array([0]), 0)).mantissa.max() == 0


def test_sums_of_floats():
    expected = [a + b for a, b in zip(exact(FLOATS), exact(OTHERS), strict=True)]
    for found in (fixed.add(FLOATS, OTHERS), fixed.add(OTHERS, FLOATS)):
        assert_rounded_down(found, expected, 2)
    zero = fixed.to_float(np.array([0]), 100)
    for found in (fixed.add(FLOATS, zero), fixed.add(zero, FLOATS)):
        assert exact(found) == exact(FLOATS)


def test_reciprocals():
    assert_rounded_down(fixed.reciprocal(FLOATS), [1 / a for a in exact(FLOATS)], 1)
    assert fixed.reciprocal(fixed.to_float(np.array([0]), 0)).mantissa.tolist() == [0]


def test_reciprocal_roots():
    found = fixed.reciprocal_root(FLOATS)
    assert ((found.mantissa >= 2**16) & (found.mantissa < 2**17)).all()
    for value, a, exponent in zip(exact(found), exact(FLOATS), found.exponent, strict=True):
        # value <= 1 / sqrt(a) < value + two units, squared so that fractions stay exact
        unit = Fraction(2) ** int(exponent)
        assert value**2 * a <= 1 < (value + 2 * unit) ** 2 * a


def test_roots_of_integers():
    roots = np.concatenate([np.arange(1, 100), RNG.integers(1, 2**26, 500), [2**26 - 1]])
    n = np.concatenate([roots**2, roots**2 - 1, roots**2 + 1])
    assert fixed.integer_root(n).tolist() == [math.isqrt(int(k)) for k in n]


@pytest.mark.parametrize("value", [1e-6, 1.0, 127.0, 0.99999999, 3e-12, 2.0**20])
def test_constants_are_the_nearest_floats(value):
    found = fixed.constant(value)
    assert 2**16 <= found.mantissa < 2**17
    assert abs(float(fixed.value(found)) / value - 1) <= 2**-17
