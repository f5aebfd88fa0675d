"""What the kernels that stream over memory share: their compiler's settings and a function of the registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# No automatic barriers: these kernels have no shared memory that several threads both read and write between the
# explicit ones.
STREAMING = functools.partial(
    plgpu.CompilerParams,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    approx_math=True,
    unsafe_no_auto_barriers=True,
)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x), an exponential and a reciprocal."""
    return 1.0 / (1.0 + jnp.exp(-x))


def nearest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 values in [-128, 127] rounded half to even: as they are, and as int8.

    By an addition that leaves no bits for a fraction: a GPU rounds and converts a quarter as fast as it adds.
    """
    shift = 1.5 * 2**23
    held = x + shift
    return held - shift, lax.bitcast_convert_type(held, jnp.int32).astype(jnp.int8)


def spread(ref: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector in memory over an accumulator of this shape, along one of its axes and repeated on the other."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    values = plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # as of jax 0.11
    return lax.broadcast_in_dim(values, shape, (axis,))
