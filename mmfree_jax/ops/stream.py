"""The residual stream: token embeddings start it, sublayers read it through RMSNorm and add to it."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.ternary import wide


@op
def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Look up token embeddings: rows of the table as `dtype`, [B, T, D]."""
    return table_VD[tokens_BT].astype(dtype)


@op
def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """Normalise by the root mean square: x / rms(x) * gain (Zhang & Sennrich 2019, arXiv 1910.07467).

    Shapes: x [..., D], gain [D]. Computed in at least float32, returned in x's type.
    """
    exact = x.astype(wide(x.dtype))
    rstd = jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
    return (exact * rstd * gain_D.astype(exact.dtype)).astype(x.dtype)


@op
def residual(x_BTD: jax.Array, y_BTD: jax.Array, scale: float = 1.0) -> jax.Array:
    """Add a sublayer's output to the residual stream: x + scale * y, [B, T, D]."""
    return x_BTD + (y_BTD if scale == 1 else y_BTD * scale)
