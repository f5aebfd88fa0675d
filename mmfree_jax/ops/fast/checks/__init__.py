"""Checks of the kernels against NumPy in float64, on the device that they are to serve on.

A check runs one kernel, forward and backward, at the shapes and in the type of one use.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.checks import attention, codes, products, recurrence
from mmfree_jax.ops.fast.checks.problem import Problem, Use, as_float32
from mmfree_jax.ops.fast.ternary import TINY

__all__ = ["CHECKS", "Outcome", "Problem", "Use", "check"]

MOST_OFF, MEAN_OFF = 1.5, 1 / 8  # largest and mean error of codes; rounding to bfloat16 first costs half a code

CHECKS: dict[str, Callable[[np.random.Generator, Use], Problem]] = {
    "normed_codes": codes.normed_codes,
    "row_codes": codes.row_codes,
    "int8_matmul": products.int8_matmul,
    "transposed_codes": codes.transposed_codes,
    "recurrence": recurrence.recurrence,
    "normed_product": products.normed_product,
    "codes_product": products.codes_product,
    "dense_product": products.dense_product,
    "decode_attention": attention.decode_attention,
    "attention": attention.attention,
}


class Outcome(NamedTuple):
    """What a check found."""

    deviations: dict[str, float]  # of each result the largest, as a multiple of its tolerance
    error: str = ""  # what went wrong, where the check could not be finished

    @property
    def passed(self) -> bool:
        """Whether every result is within its tolerance. NaN is not."""
        return not self.error and all(deviation <= 1 for deviation in self.deviations.values())

    @property
    def worst(self) -> str:
        """The error, or the result that deviates most, in words."""
        if self.error:
            return self.error
        name, deviation = max(self.deviations.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
        return f"{name} deviates by {deviation:.3g} times the tolerance"


def check(use: Use, device: Any = None) -> Outcome:
    """Run the check of a use on a device (default: the first local one). Seconds, nearly all of them compilation."""
    problem = CHECKS[use.kernel](np.random.default_rng(zlib.crc32(str(use).encode())), use)
    names = sorted(problem.expected)

    @jax.jit
    def deviations(arrays, expected):
        found = problem.run(*arrays)
        return [_deviation(problem.select(found[name]), expected[name], problem.tolerance.get(name)) for name in names]

    device = device or jax.local_devices()[0]
    expected = {name: as_float32(values) for name, values in problem.expected.items()}
    arrays, expected = jax.device_put((problem.arrays, expected), device)
    return Outcome(dict(zip(names, map(float, deviations(arrays, expected)), strict=True)))


# The allowance of an element is relative to itself and to its row: results near zero are differences of terms as large
# as the row's others, and carry their rounding. A tolerance per array would hide a wrong row among larger ones, since
# rows differ by a factor of up to a thousand on purpose (`draw_rows`).
def _deviation(found: jax.Array, expected: jax.Array, tolerance: float | None) -> jax.Array:
    """The largest of |found - expected| over its allowance: `tolerance` times the expected value's magnitude plus the
    root mean square of its row. Rows and columns of `found` repeat those expected.

    `tolerance` is None for codes: a few may differ by one, where rounding fell the other way.
    """
    index = [jnp.arange(size) % limit for size, limit in zip(found.shape, expected.shape, strict=True)]
    expected = expected[jnp.ix_(*index)]
    off = jnp.abs(found.astype(jnp.float32) - expected)
    off = jnp.where(jnp.isnan(off), jnp.inf, off)  # compilers may leave NaN out of a maximum
    if tolerance is None:
        return jnp.maximum(jnp.max(off) / MOST_OFF, jnp.mean(off) / MEAN_OFF)
    typical = jnp.sqrt(jnp.mean(expected**2, axis=-1, keepdims=True))
    return jnp.max(off / (tolerance * (jnp.abs(expected) + typical + TINY)))
