"""The core's fixed-point arithmetic, on NumPy integers: the definitions that the hardware equals bit for bit.

Three kinds of numbers exist. Vectors are 32-bit integers with one binary exponent a vector: element v stands for
v * 2^exponent. Operands of a multiplier are the 18 most significant bits of a vector, as wide as the multipliers of
small FPGAs. Scalars are floats with mantissas of 17 bits.

All functions take arrays of int64, one row a sequence, and broadcast. Shifts to the right are arithmetic (they round
down) unless it is said that they round to the nearest.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

WORD = 32  # bits of a vector's element
OPERAND = 18  # bits of an operand of a multiplier, sign included
MANTISSA = 17  # bits of a float's mantissa
CODE = 8  # bits of a quantised activation
LARGEST_SHIFT = 63
BLOCK_SHIFT = 4  # by which a product of operands becomes an element of a vector with its own exponent

# The sigmoid: a table of straight lines over [0, 16), for arguments of exponent -20.
ARGUMENT = -20  # exponent of the arguments, and of the vectors that come near a sigmoid
SIGMOID = -17  # exponent of its values
TABLE, TABLE_RANGE = 512, 16  # lines, and where the last one ends
FRACTION = 11  # bits of the place on a line
SLOPE = 11  # bits of a slope

Integers = np.ndarray  # of int64


class Float(NamedTuple):
    """Scalars mantissa * 2^exponent: mantissas are zero or have exactly 17 bits."""

    mantissa: Integers
    exponent: Integers


def bit_length(n: Integers) -> Integers:
    """Count the bits of integers from 0 to 2^53."""
    return np.where(n > 0, np.frexp(n.astype(np.float64))[1], 0).astype(np.int64)


def saturate(v: Integers, bits: int) -> Integers:
    """Clip to symmetric integers of so many bits: the most negative number is not used."""
    top = 2 ** (bits - 1) - 1
    return np.clip(v, -top, top)


def operand_shift(largest: Integers) -> Integers:
    """Return by how much a vector is shifted right so that magnitudes up to `largest` fit an operand."""
    return np.maximum(bit_length(largest) - (OPERAND - 1), 0)


def operand(v: Integers, shift: Integers | int) -> Integers:
    """Make operands of a vector's elements: shifted right, clipped to 18 bits."""
    return np.clip(v >> shift, -(2 ** (OPERAND - 1)), 2 ** (OPERAND - 1) - 1)


def shift_rounded(v: Integers, shift: Integers) -> Integers:
    """Shift right and round to the nearest, halves up. Shifts outside 0 to 63 count as the nearest of these."""
    shift = np.clip(shift, 0, LARGEST_SHIFT)
    return (((v << 1) >> shift) + 1) >> 1


def sigmoid(x: Integers) -> Integers:
    """Compute the sigmoid of arguments x * 2^-20: integers in units of 2^-17, at most 2^17 - 1.

    Arguments beyond +-16 count as +-16. For the absolute error see `sigmoid_lines`.
    """
    magnitude = np.minimum(np.abs(x), TABLE_RANGE * 2**-ARGUMENT - 1)
    line = magnitude >> (FRACTION + 4)
    place = (magnitude >> 4) & (2**FRACTION - 1)
    start, slope = sigmoid_lines()
    small = start[line] - (slope[line] * place >> FRACTION)
    return np.minimum(np.where(x < 0, small, 2**-SIGMOID - small), 2 ** (OPERAND - 1) - 1)


@cache
def sigmoid_lines() -> tuple[Integers, Integers]:
    """Return the table of sigmoid(-x): the value at the start of each line, and how far it falls along the line.

    A chord of width h lies above a convex curve by at most h^2 / 8 times the second derivative, here 1.2e-5; half of
    each line's largest distance is taken off. Half a unit of 2^-17 comes from rounding the start, and the same from the
    slope and from the place on the line; a whole one from rounding down what is read off the line. The largest absolute
    error of all arguments is 2.1e-5.
    """
    edges = np.linspace(0, TABLE_RANGE, TABLE + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    value = lambda x: 1 / (1 + np.exp(x))
    above = (value(edges[:-1]) + value(edges[1:])) / 2 - value(middles)
    start = (value(edges[:-1]) - above / 2) * 2**-SIGMOID
    slope = (value(edges[:-1]) - value(edges[1:])) * 2**-SIGMOID
    return np.round(start).astype(np.int64), np.round(slope).astype(np.int64)


def to_float(n: Integers, exponent: Integers | int) -> Float:
    """Make floats of non-negative integers n * 2^exponent, below 2^53; mantissas are rounded down."""
    n, exponent = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(exponent, np.int64))
    surplus = bit_length(n) - MANTISSA
    mantissa = np.where(surplus > 0, n >> np.maximum(surplus, 0), n << np.clip(-surplus, 0, MANTISSA))
    return Float(mantissa, exponent + surplus)


def constant(value: float) -> Float:
    """Return the nearest float of a positive number."""
    fraction, exponent = np.frexp(value)
    mantissa = round(float(fraction) * 2**MANTISSA)
    return to_float(np.array(mantissa), int(exponent) - MANTISSA)


def value(x: Float) -> np.ndarray:
    """Return floats as float64."""
    return np.ldexp(np.asarray(x.mantissa, np.float64), np.asarray(x.exponent, np.int64))


def multiply(a: Float, b: Float) -> Float:
    """Multiply floats; the product is rounded down."""
    product = a.mantissa * b.mantissa
    carry = product >> (2 * MANTISSA - 1)
    return Float(product >> (MANTISSA - 1 + carry), a.exponent + b.exponent + MANTISSA - 1 + carry)


def add(a: Float, b: Float) -> Float:
    """Add floats; what is shifted out of the smaller one and of the sum is lost."""
    swap = (a.mantissa == 0) | ((b.mantissa != 0) & (b.exponent > a.exponent))
    large = Float(np.where(swap, b.mantissa, a.mantissa), np.where(swap, b.exponent, a.exponent))
    small = Float(np.where(swap, a.mantissa, b.mantissa), np.where(swap, a.exponent, b.exponent))
    distance = np.clip(large.exponent - small.exponent, 0, MANTISSA)
    total = large.mantissa + (small.mantissa >> distance)
    carry = total >> MANTISSA
    return Float(total >> carry, large.exponent + carry)


def reciprocal(a: Float) -> Float:
    """Divide 1 by floats: floor(2^33 / mantissa). That of zero is zero."""
    steps = 2 * MANTISSA - 1
    quotient = np.where(a.mantissa > 0, 2**steps // np.maximum(a.mantissa, 1), 0)
    carry = quotient >> MANTISSA
    return Float(quotient >> carry, -a.exponent - steps + carry)


def reciprocal_root(a: Float) -> Float:
    """Compute 1 / sqrt of positive floats: floor(sqrt(floor(2^50 / m))), m = mantissa or, if the exponent is odd, twice
    that."""
    odd = a.exponent & 1
    quotient = 2 ** (3 * MANTISSA - 1) // np.maximum(a.mantissa << odd, 1)
    root = integer_root(quotient)
    carry = root >> MANTISSA
    return Float(root >> carry, -((a.exponent - odd) >> 1) - (3 * MANTISSA - 1) // 2 + carry)


def integer_root(n: Integers) -> Integers:
    """Compute floor(sqrt(n)) of integers below 2^52."""
    root = np.sqrt(n.astype(np.float64)).astype(np.int64)
    root -= root * root > n
    return root + ((root + 1) * (root + 1) <= n)
