"""Number formats of weights: the bits of one, and how well it holds numbers that are normally distributed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtri

from scaling.tables.runs import ScalingError

TERNARY_BITS = float(np.log2(3))
NAMED_BITS = {"ternary": TERNARY_BITS, "1.58bit": TERNARY_BITS, "binary": 1.0, "bf16": 16.0, "fp16": 16.0, "fp32": 32.0}
MANTISSA = {"bf16": 7, "fp16": 10, "fp32": 23}  # bits of those that are floating-point numbers
POINTS = 20_001  # quantiles that stand for the normal distribution
ABSMEAN = "ternary-absmean"  # BitNet b1.58: codes of w / mean |w|, times that mean


def bits_of(text: object) -> float:
    """Bits of a weight from its precision's name; raises ScalingError.

    A format such as e4m3 has a sign beside its exponent and mantissa.
    """
    word = str(text).strip().lower()
    word = "ternary" if word == ABSMEAN else word
    if word in NAMED_BITS:
        return NAMED_BITS[word]
    parts = floating(word)
    if parts:
        return 1.0 + sum(parts)
    number = re.fullmatch(r"(?:[a-z_-]*?)(\d+(?:\.\d+)?)(?:[\s_-]?bits?)?", word)
    if number and 1 <= float(number[1]) <= 64:
        return float(number[1])
    raise ScalingError(f"precision {text!r} names no number of bits (bf16, int8, ternary, e4m3, 4 ...)")


def floating(word: str) -> tuple[int, int] | None:
    """Bits of exponent and mantissa of a format such as e4m3."""
    parts = re.search(r"e(\d)m(\d)", word)
    return (int(parts[1]), int(parts[2])) if parts else None


def of_each(values: np.ndarray, number: Callable[[str], float]) -> np.ndarray:
    """A number for each name in an array, asked for once."""
    kinds, which = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    return np.array([number(str(kind)) for kind in kinds])[which.reshape(np.shape(values))]


@cache
def gaussian_error(text: str) -> float:
    """Mean squared error of a format on standard normal numbers, at the scale that makes it least.

    Integers are rounded to 2^bits levels, symmetric about zero; ternary to -1, 0 and 1, or for "ternary-absmean" with
    the mean magnitude as scale. Floating-point numbers keep the sign, exponent and rounded mantissa; range is not what
    limits them. Raises ScalingError for a name that is no format, and for a fraction of a bit that is not ternary.
    """
    x, word = ndtri((np.arange(POINTS) + 0.5) / POINTS), text.strip().lower()
    bits, parts = bits_of(word), floating(word)
    mantissa = MANTISSA.get(word, parts[1] if parts else None)
    if mantissa is not None:
        # The spacing of floating-point numbers grows with the number: relative error is what a mantissa bounds.
        step = 2.0 ** (np.floor(np.log2(np.abs(x) + 1e-300)) - mantissa)
        return float(np.mean((x - step * np.round(x / step)) ** 2))
    if word == ABSMEAN:
        mean = np.abs(x).mean()
        return float(np.mean((x - mean * np.clip(np.round(x / mean), -1, 1)) ** 2))
    # The mean over evenly spaced quantiles is the integral over the normal density, without a random number.
    levels = 3 if bits == TERNARY_BITS else 2**bits
    if levels != round(levels):
        raise ScalingError(f"precision {text!r}: {bits:g} bits are no whole number of levels")

    def error(scale: float) -> float:
        low, shift = -(levels - 1) / 2, 0.0 if levels % 2 else 0.5
        return float(np.mean((x - scale * (np.clip(np.round(x / scale - shift) + shift, low, -low))) ** 2))

    return error(minimize_scalar(error, (8 / levels * 0.2, 8 / levels), method="golden", tol=1e-5).x)
