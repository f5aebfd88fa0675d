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


class Quantised(NamedTuple):
    """A tensor as `codes * scale`. `scale` broadcasts against `codes`; None stands for 1 (codes are the values)."""

    codes: jax.Array
    scale: jax.Array | None


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The type in which norms and quantisers compute: at least float32, float64 for a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def quantise_weights(w: jax.Array, axes: tuple[int, ...]) -> Quantised:
    """Ternary codes by absmean: t = clip(round(w / m), -1, 1) with m = mean |w| over `axes`.

    Args:
        w: weights of any shape, floating point.
        axes: the axes that share one scale: all for a scale per tensor, the input axis for one per output channel.

    Returns:
        int8 codes in {-1, 0, 1} of w's shape; scale m in `wide(w.dtype)`, reduced axes kept with size 1.
    """
    scale = weight_scale(w, axes)
    return Quantised(ternary_codes(w, scale), scale)


def weight_scale(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The scale of `quantise_weights`."""
    return jnp.maximum(jnp.mean(jnp.abs(w.astype(wide(w.dtype))), axis=axes, keepdims=True), SMALLEST)


def ternary_codes(w: jax.Array, scale: jax.Array) -> jax.Array:
    """The codes of `quantise_weights`."""
    return jnp.clip(jnp.round(w.astype(scale.dtype) * (1 / scale)), -1, 1).astype(jnp.int8)


def quantise_activations(
    x: jax.Array, bits: int, rstd: jax.Array | None = None, gain: jax.Array | None = None
) -> Quantised:
    """Integer codes by absmax per token: q = clip(round(x * s), -Q - 1, Q) with s = Q / max |x|, Q = 2^(bits-1) - 1.

    Args:
        x: [..., D] activations, floating point.
        bits: 8 or 4; 0 returns x itself, unscaled.
        rstd, gain: of a norm to apply first, [..., 1] and [D] in `wide(x.dtype)`: x * rstd * gain is quantised. The
            maximum is then taken of x * gain, so that it and the norm's mean of squares are one pass over x.

    Returns:
        int8 codes of x's shape; scale 1/s in `wide(x.dtype)`, shape [..., 1].
    """
    exact = x.astype(wide(x.dtype))
    normed = exact if rstd is None or gain is None else exact * rstd * gain
    if bits == 0:
        return Quantised(x if rstd is None else normed, None)
    top = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(exact if gain is None else exact * gain), axis=-1, keepdims=True)
    largest = jnp.maximum(largest if rstd is None else largest * rstd, SMALLEST)
    codes = jnp.clip(jnp.round(normed * (top / largest)), -top - 1, top)
    return Quantised(codes.astype(jnp.int8), largest / top)


def dequantise(q: Quantised, dtype: DTypeLike) -> jax.Array:
    """codes * scale, computed in the scale's type and returned as `dtype`."""
    if q.scale is None:
        return q.codes.astype(dtype)
    return (q.codes.astype(q.scale.dtype) * q.scale).astype(dtype)
