"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) and its backward pass, shared with the fused BitLinear."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.ternary import wide


def reciprocal_rms(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept with size 1, in `wide(x.dtype)`."""
    x = x.astype(wide(x.dtype))
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm_backward(x: jax.Array, rstd: jax.Array, dy_gain: jax.Array) -> jax.Array:
    """Gradient to x of x * rstd, given the gradient `dy_gain` to that product (already times the gain)."""
    x_hat = x.astype(rstd.dtype) * rstd
    return (dy_gain - x_hat * jnp.mean(x_hat * dy_gain, axis=-1, keepdims=True)) * rstd


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last axis, computed in at least float32, returned in x's type.

    Its backward pass keeps x and one number per token. Shapes: x [..., D], gain [D].
    """
    return _forward(x, gain_D, eps)[0]


def _forward(x: jax.Array, gain_D: jax.Array, eps: float):
    rstd = checkpoint_name(reciprocal_rms(x, eps), "per_token")
    y = x.astype(rstd.dtype) * rstd * gain_D.astype(rstd.dtype)
    return y.astype(x.dtype), (x, rstd, gain_D)


def _backward(eps: float, saved, dy: jax.Array):
    x, rstd, gain_D = saved
    dy = dy.astype(rstd.dtype)
    dgain_D = jnp.sum(dy * (x.astype(rstd.dtype) * rstd), axis=tuple(range(dy.ndim - 1)))
    dx = rms_norm_backward(x, rstd, dy * gain_D.astype(rstd.dtype))
    return dx.astype(x.dtype), dgain_D.astype(gain_D.dtype)


rms_norm.defvjp(_forward, _backward)
