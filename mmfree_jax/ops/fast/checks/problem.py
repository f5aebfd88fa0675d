"""What every check is made of: a use of a kernel, its inputs and expected results, and random rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The reference is computed for at most ROWS distinct rows. The kernel gets these rows repeated until the use's number
# of rows is reached, so every row that it writes is compared; sums over rows are compared with weighted sums. ROWS is
# prime, so that repetitions do not line up with tiles.

ROWS = 509
EPS = 1e-6  # of the norms
# See `checks._deviation`. On an H200 the largest deviations were 3.5e-3 and 5e-6 (exp and 1/x are approximate).
TOLERANCES = {"bfloat16": 2.0**-6, "float32": 2.0**-14}


class Use(NamedTuple):
    """One kernel at the shape, type and options that a program wants it for. Sizes are those of one device's part."""

    kernel: str  # a key of CHECKS
    sizes: tuple[int, ...]
    options: tuple[Any, ...] = ()  # strings, integers and booleans

    def __str__(self) -> str:
        return " ".join([self.kernel, "x".join(map(str, self.sizes)), *map(str, self.options)])


class Problem(NamedTuple):
    """A check's inputs and expected results.

    run: from `arrays` to results by name; it is compiled. expected: the results in float64. tolerance: of each result
    that is not codes. select: from a result to the part of it that is expected.
    """

    run: Callable[..., dict[str, jax.Array]]
    arrays: tuple[Any, ...]
    expected: dict[str, np.ndarray]
    tolerance: dict[str, float]
    select: Callable[[jax.Array], jax.Array] = lambda result: result


def repeated(a: jax.Array, rows: int) -> jax.Array:
    """The rows of `a`, repeated in order until there are `rows`."""
    return a[jnp.arange(rows) % a.shape[0]]


def sample(rows: int) -> tuple[int, np.ndarray]:
    """The number of distinct rows, and how often each of them occurs."""
    distinct = min(rows, ROWS)
    return distinct, np.bincount(np.arange(rows) % distinct).astype(np.float64)


def draw_rows(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Normal values of this type; the scale of a row varies by up to a factor of a thousand."""
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-1.5, 1.5, (*shape[:-1], 1))
    return values.astype(jnp.dtype(dtype))


def as_float64(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)


def as_float32(a: Any) -> np.ndarray:
    return np.asarray(a, np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))
