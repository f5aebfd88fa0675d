"""Quantisers: ternary weights by absmean, integer activations by absmax (BitNet b1.58, Ma et al. 2024, arXiv
2402.17764, equations 1-3, as used by Zhu et al. 2024, arXiv 2406.02528).

All of them compute in at least float32 (float64 for float64 inputs) and round half to even. They are not idempotent:
quantising `codes * scale` again multiplies the scale by the share of non-zeros, so whatever stores quantised weights
must store codes and scale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SMALLEST = 1e-5  # floor of a mean or maximum magnitude, in the unit of the quantised values: keeps zeros finite
NORMAL = 1.534  # the scale of least squares over the mean magnitude, of normal weights
LLOYD_STEPS = 4


class Quantised(NamedTuple):
    """A tensor as `codes * scale`. `scale` broadcasts against `codes`; None stands for 1 (codes are the values)."""

    codes: jax.Array
    scale: jax.Array | None


def wide(dtype: DTypeLike) -> jnp.dtype:
    """Return the type in which norms and quantisers compute: at least float32, float64 for a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def quantise_weights(w: jax.Array, axes: tuple[int, ...], best: bool = False) -> Quantised:
    """Quantise weights to ternary codes by absmean: t = clip(round(w / m), -1, 1) with m = mean |w| over `axes`.

    Args:
        w: weights of any shape, floating point.
        axes: the axes that share one scale, counted from the last: all for a scale per tensor, the input axis for one
            per output channel.
        best: m is the scale of least squares instead (`best_scale`).

    Returns:
        int8 codes in {-1, 0, 1} of w's shape; scale m in `wide(w.dtype)`, reduced axes kept with size 1.
    """
    # With the mean as unit, a weight becomes zero below half of it. For normal weights, whose mean magnitude is 0.8
    # standard deviations, 31 % of the codes are zeros.
    scale = weight_scale(w, axes)
    scale = best_scale(w, axes, scale) if best else scale
    return Quantised(ternary_codes(w, scale), scale)


def weight_scale(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the scale of `quantise_weights`: mean |w| over `axes`."""
    magnitude = jnp.abs(w.astype(wide(w.dtype)))
    return jnp.maximum(jnp.mean(magnitude, axis=axes, keepdims=True), SMALLEST)


def best_scale(w: jax.Array, axes: tuple[int, ...], mean: jax.Array) -> jax.Array:
    """Return the scale m over `axes` for which codes times m are nearest to w, in least squares (Lloyd 1982; as in
    Ternary Weight Networks, Li et al. 2016, arXiv 1605.04711, section 2.2, where the threshold is a fixed one).

    mean: `weight_scale` of w, without the part of padding.
    """
    # Weights above m / 2 have code 1, and of these the mean is the best scale: the two are made to agree in turn, which
    # comes nearer to the fixed point by a factor of about three each time. For normal weights it is known.
    magnitude, scale = jnp.abs(w.astype(mean.dtype)), NORMAL * mean
    for _ in range(LLOYD_STEPS):
        large = magnitude > scale / 2
        total = jnp.sum(jnp.where(large, magnitude, 0), axis=axes, keepdims=True)
        scale = total / jnp.maximum(jnp.sum(large, axis=axes, keepdims=True), 1)
    return jnp.maximum(scale, SMALLEST)


def ternary_codes(w: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the codes of `quantise_weights` for a given scale."""
    return jnp.clip(jnp.round(w.astype(scale.dtype) * (1 / scale)), -1, 1).astype(jnp.int8)


def quantise_activations(x: jax.Array, bits: int) -> Quantised:
    """Quantise activations by absmax per token: q = clip(round(x * s), -Q - 1, Q), s = Q / max |x|, Q = 2^(bits-1) - 1.

    Args:
        x: [..., D] activations, floating point.
        bits: 8 or 4; 0 returns x itself, unscaled.

    Returns:
        int8 codes of x's shape; scale 1/s in `wide(x.dtype)`, shape [..., 1].
    """
    if bits == 0:
        return Quantised(x, None)
    # One scale per token, because tokens differ in magnitude far more than the channels of one token do after a norm,
    # and because it can be taken out of the product: the sum over channels is then one of integers.
    exact, top = x.astype(wide(x.dtype)), 2 ** (bits - 1) - 1
    largest = jnp.maximum(jnp.max(jnp.abs(exact), axis=-1, keepdims=True), SMALLEST)
    codes = jnp.clip(jnp.round(exact * (top / largest)), -top - 1, top)
    return Quantised(codes.astype(jnp.int8), largest / top)


def dequantise(q: Quantised, dtype: DTypeLike) -> jax.Array:
    """Return codes * scale, computed in the scale's type, as `dtype`."""
    if q.scale is None:
        return q.codes.astype(dtype)
    return (q.codes.astype(q.scale.dtype) * q.scale).astype(dtype)


def straight_through(x: jax.Array, q: Quantised) -> jax.Array:
    """Return the quantised value of x with the gradient of x itself (Bengio et al. 2013, arXiv 1308.3432).

    Rounding has a gradient of zero almost everywhere, with which nothing would train; the estimator pretends that
    rounding is the identity and that scales are constants.
    """
    return x + jax.lax.stop_gradient(dequantise(q, x.dtype) - x)
