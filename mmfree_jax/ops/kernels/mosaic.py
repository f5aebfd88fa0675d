"""What the kernels that stream over memory share: their compiler's settings and a function of the registers."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

# No automatic barriers: these kernels have no shared memory that several threads both read and write between the
# explicit ones.
STREAMING = functools.partial(
    plgpu.CompilerParams,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    approx_math=True,
    unsafe_no_auto_barriers=True,
)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x), an exponential and a reciprocal."""
    return 1.0 / (1.0 + jnp.exp(-x))
