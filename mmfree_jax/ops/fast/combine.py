"""RMSNorm and SwiGLU with backward passes of their own, and whatever else a BitLinear can make its input of
(`origin.Kind`), computed by XLA."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.ops.fast.origin import Kind, Origin, note
from mmfree_jax.ops.ternary import wide


def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """`ops.bit_linear.rms_norm`. Its backward pass keeps x and one number per token."""
    return note(_rms_norm(x, gain_D, eps), Origin("norm", (x,), gain_D, eps))


def reciprocal_rms(x: jax.Array, eps: float) -> jax.Array:
    """Compute 1 / sqrt(mean(x^2) + eps) over the last axis, kept with size 1, in `wide(x.dtype)`."""
    x = x.astype(wide(x.dtype))
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm_backward(x: jax.Array, rstd: jax.Array, dy_gain: jax.Array) -> jax.Array:
    """Compute the gradient to x of x * rstd, given the gradient `dy_gain` to that product (already times the gain)."""
    x_hat = x.astype(rstd.dtype) * rstd
    return (dy_gain - x_hat * jnp.mean(x_hat * dy_gain, axis=-1, keepdims=True)) * rstd


def _rms_norm_forward(x: jax.Array, gain_D: jax.Array, eps: float):
    rstd = checkpoint_name(reciprocal_rms(x, eps), "per_token")
    y = x.astype(rstd.dtype) * rstd * gain_D.astype(rstd.dtype)
    return y.astype(x.dtype), (x, rstd, gain_D)


def _rms_norm_backward(eps: float, saved, dy: jax.Array):
    # y = x_hat * gain, x_hat = x * rstd: dx = rstd (dy gain - x_hat mean(x_hat dy gain)).
    x, rstd, gain_D = saved
    dy = dy.astype(rstd.dtype)
    dgain_D = jnp.sum(dy * (x.astype(rstd.dtype) * rstd), axis=tuple(range(dy.ndim - 1)))
    dx = rms_norm_backward(x, rstd, dy * gain_D.astype(rstd.dtype))
    return dx.astype(x.dtype), dgain_D.astype(gain_D.dtype)


_rms_norm = own_backward(_rms_norm_forward, _rms_norm_backward, static=(2,))


# `combine` is what a kernel computes in registers (`hopper.normed_codes`); here XLA does, for shapes that no kernel
# takes. Types matter: each intermediate is rounded to the sources' type, as separate ops of the model would round it,
# so that kernel, XLA and definition give the same codes but for the last bit.
def combine(kind: Kind, sources: tuple[jax.Array, ...], gain: jax.Array | None, eps: float) -> jax.Array:
    """Make the input of its sources, in their type; norms compute in at least float32."""
    if kind == "plain":
        return sources[0]
    if kind == "swiglu":
        return swiglu(*sources)
    assert gain is not None
    normed = rms_norm(sources[0], gain, eps)
    return normed if kind == "norm" else normed * jax.nn.silu(sources[1])


def _swiglu_forward(gate: jax.Array, up: jax.Array):
    return jax.nn.silu(gate) * up, (gate, up)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Behind a barrier, or XLA's GPU compiler makes two passes of the two gradients.
    gate, up, d = (a.astype(wide(a.dtype)) for a in jax.lax.optimization_barrier((*saved, d)))
    share = jax.nn.sigmoid(gate)
    dgate, dup = d * up * share * (1 + gate * (1 - share)), d * gate * share
    return dgate.astype(saved[0].dtype), dup.astype(saved[1].dtype)


# silu(gate) * up; the backward pass computes in at least float32.
swiglu = own_backward(_swiglu_forward, _swiglu_backward)
