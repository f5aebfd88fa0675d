"""The straight-through estimator written as arithmetic: what the quantisers' backward passes are held to."""

import jax

from mmfree_jax.ops.ternary import Quantised, dequantise


def straight_through(x: jax.Array, q: Quantised) -> jax.Array:
    """The quantised value of x, with the gradient of x itself (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + jax.lax.stop_gradient(dequantise(q, x.dtype) - x)
