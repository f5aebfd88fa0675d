"""Quantisers as the fast layers need them: scales that do not depend on a mesh, a norm and a quantiser in one pass,
codes of gradients, and ternary codes as 2 bits each.

All of them compute in at least float32 and round half to even.
"""

import math

import jax
import jax.numpy as jnp

from mmfree_jax.ops.ternary import LLOYD_STEPS, NORMAL, SMALLEST, Quantised, wide
from mmfree_jax.sharding import Names, constrain

BLOCKS = 64  # per axis, in which weights are summed
TINY = 1e-30  # floor of a largest magnitude of gradients, whose unit is small
TOP = 127  # largest 8-bit code


def weight_scale(w: jax.Array, axes: tuple[int, ...], names: Names = ()) -> jax.Array:
    """Compute the scale of `quantise_weights`, bit for bit the same on every mesh whose parts of an axis divide BLOCKS.

    Each axis is summed in blocks that lie whole on a device; the sums of the blocks then travel, and every device adds
    them in the same order. `names` are the logical names of w's axes: those that are not summed stay where they are.
    """
    count = math.prod(w.shape[axis] for axis in axes)
    return jnp.maximum(_sum(jnp.abs(w.astype(wide(w.dtype))), axes, names) / count, SMALLEST)


def best_scale(w: jax.Array, axes: tuple[int, ...], mean: jax.Array, names: Names = ()) -> jax.Array:
    """Compute `ops.ternary.best_scale`, on meshes as `weight_scale`."""
    magnitude, scale = jnp.abs(w.astype(mean.dtype)), NORMAL * mean
    for _ in range(LLOYD_STEPS):
        large = magnitude > scale / 2
        count = _sum(large.astype(scale.dtype), axes, names)
        scale = _sum(jnp.where(large, magnitude, 0), axes, names) / jnp.maximum(count, 1)
    return jnp.maximum(scale, SMALLEST)


def _sum(a: jax.Array, axes: tuple[int, ...], names: Names) -> jax.Array:
    """The sum over axes, kept with size 1, in the same order on every mesh."""
    # A sum of floats depends on its order, and a mesh changes the order: another last bit of the scale flips codes of
    # weights that lie on the edge, and runs on two meshes would part. Hence sums in fixed blocks, added in a fixed
    # order.
    summed = sorted(axis % a.ndim for axis in axes)
    shape = [n for axis, size in enumerate(a.shape) for n in (_blocked(size) if axis in summed else (size,))]
    within = [axis + i + 1 for i, axis in enumerate(summed)]  # each summed axis is two: blocks, and what is in them
    sums = jnp.sum(a.reshape(shape), axis=within)
    placed = [None if axis in summed else name for axis, name in enumerate(names or (None,) * a.ndim)]
    # Behind a barrier, or the compiler makes one sum of the two, in an order of its own.
    sums = jax.lax.optimization_barrier(constrain(sums, *placed))
    return jnp.sum(sums, axis=summed, keepdims=True)


def _blocked(size: int) -> tuple[int, int]:
    """Into how many blocks an axis is cut, a power of two, and the size of each, 8 or more."""
    blocks = min(math.gcd(size, BLOCKS), 1 << max(size // 8, 1).bit_length() - 1)
    return blocks, size // blocks


def quantise_normed(x: jax.Array, bits: int, rstd: jax.Array, gain: jax.Array) -> Quantised:
    """Normalise and quantise in one pass: `quantise_activations` of x * rstd * gain.

    x: [..., D]. rstd, gain: [..., 1] and [D] in `wide(x.dtype)`. The maximum is taken of x * gain and scaled by rstd
    afterwards, so that it and the norm's mean of squares are one pass over x.
    """
    exact = x.astype(wide(x.dtype))
    if bits == 0:
        return Quantised(exact * rstd * gain, None)
    top = 2 ** (bits - 1) - 1
    largest = jnp.maximum(jnp.max(jnp.abs(exact * gain), axis=-1, keepdims=True) * rstd, SMALLEST)
    codes = jnp.clip(jnp.round(exact * rstd * gain * (top / largest)), -top - 1, top)
    return Quantised(codes.astype(jnp.int8), largest / top)


def quantise_gradients(dy: jax.Array, bits: int) -> Quantised:
    """Quantise a gradient [..., F] by absmax per token, as `quantise_activations`, however small it is."""
    exact = dy.astype(wide(dy.dtype))
    top = 2 ** (bits - 1) - 1
    largest = jnp.maximum(jnp.max(jnp.abs(exact), axis=-1, keepdims=True), TINY)
    return Quantised(jnp.round(exact * (top / largest)).astype(jnp.int8), largest / top)


def column_codes(q: Quantised, row_factors: jax.Array, largest: jax.Array | None = None) -> Quantised:
    """Requantise q * row_factors to 8 bits with one scale a column, for a sum over rows: no row's scale leaves the sum.

    Rounding is dithered: what is small beside the largest of its column is kept on average, and so in a sum over many
    rows (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551, with an additive sequence in place of chance).

    Args:
        q: codes [R, F], scale [R, 1].
        row_factors: [R, 1].
        largest: magnitude of q * row_factors in each column, [F], where it is known already.

    Returns:
        int8 codes [R, F]; scale [1, F] in q.scale's type.
    """
    assert q.scale is not None
    factor = q.scale * row_factors
    if largest is None:
        largest = jnp.max(jnp.abs(q.codes * factor), axis=0)
    scale = column_scale(largest)
    rows, columns = dither_phases(*q.codes.shape)
    values = q.codes * factor.astype(jnp.float32) * (1 / scale).astype(jnp.float32)
    return Quantised(round_with_dither(values, rows[:, None] + columns), scale[None])


def column_scale(largest: jax.Array) -> jax.Array:
    """Return the scale of 8-bit codes whose largest magnitude stands for `largest`."""
    return jnp.maximum(largest, TINY) / TOP


# Codes of gradients are summed over thousands of tokens. Rounding to nearest makes errors that do not average out,
# since small gradients all become zero; random rounding does average out, and needs random numbers. A fixed sequence
# whose values fill [0, 1) evenly, added before rounding, is as unbiased over any stretch of rows and costs an addition.
def dither_phases(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Return int32 [rows] and [columns] whose sums, modulo 1 in units of 2^-23, cover [0, 1) evenly in any rectangle.

    Steps are the first two inverse powers of the plastic number, as in Roberts' R2 sequence.
    """
    steps = (0.7548776662466927, 0.5698402909980532)
    # The product may wrap around 2^32, which 2^23 divides: the fraction stays the same.
    sequence = lambda n, step: jnp.arange(1, n + 1, dtype=jnp.int32) * int(step * 2**23)
    return sequence(rows, steps[0]), sequence(columns, steps[1])


def round_with_dither(values: jax.Array, phases: jax.Array) -> jax.Array:
    """Round float32 values in [-TOP, TOP] to int8: up where the fraction of a value and its phase together exceed 1.

    Phases become fractions, and sums whole numbers, by their bits: a GPU converts a quarter as fast as it adds.
    """
    fraction = jax.lax.bitcast_convert_type((phases & 0x7FFFFF) | 0x3F800000, jnp.float32)  # in [1, 2)
    return nearest_integer(jnp.clip(values + (fraction - 1.5), -TOP, TOP))[1]


def nearest_integer(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round float32 values in [-128, 127] half to even, and return them as float32 and as int8.

    Adding 1.5 * 2^23 leaves no bits for a fraction, so that the lowest byte of the sum is the integer: a GPU rounds and
    converts a quarter as fast as it adds. The constant is 64 larger, and the byte is corrected by an integer
    subtraction, because CUDA 13.0's ptxas takes a byte that is stored straight out of a float register for a float to
    be converted (F2IP.U8.F32, which saturates): every code became -1 wherever a thread stores one code at a time.
    """
    shift = 1.5 * 2**23 + 64
    shifted = x + shift
    return shifted - shift, (jax.lax.bitcast_convert_type(shifted, jnp.int32) - 64).astype(jnp.int8)


def pack(codes: jax.Array) -> jax.Array:
    """Pack ternary codes [..., D, F] in 2 bits each: uint8 [..., D / 4, F], the first of four rows lowest."""
    rows = (codes + 1).astype(jnp.uint8).reshape(*codes.shape[:-2], -1, 4, codes.shape[-1])
    return rows[..., 0, :] | rows[..., 1, :] << 2 | rows[..., 2, :] << 4 | rows[..., 3, :] << 6


def unpack(packed: jax.Array) -> jax.Array:
    """Undo `pack`: int8 codes [..., D, F]."""
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
    rows = (packed[..., None, :] >> shifts & 3).astype(jnp.int8) - 1
    return rows.reshape(*packed.shape[:-2], -1, packed.shape[-1])
