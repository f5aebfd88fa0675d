"""Moments of the optimizer in less memory: bfloat16, or 8-bit codes with a scale for each block of 64 (Dettmers et al.
2022, arXiv 2110.02861), both rounded stochastically."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmfree_jax.config import Moments

# A moving average moves by a small share of itself each step: by 5 % of the second moment with beta2 = 0.95, 0.1 % with
# 0.999. Rounded to nearest it would stay where it is as soon as that is less than half the distance of two codes, 0.2 %
# in bfloat16, 4 % in 8 bits. Rounded up or down with probabilities that make the mean right it follows on average. The
# update of a step is computed from the moments before they are rounded.
#
# Codes of 8 bits are logarithms: code k stands for scale x 2^((k - top) / 8), and 0 for 0. What is kept is off by less
# than 9 % wherever it lies between the largest of its block and 2^-16 of it, or 2^-32 where there is no sign: the
# ranges of a gradient and of its square. Equal steps, as integers have, would round the second moment of small
# gradients to zero, by whose root the update is divided.
#
# The random bits are a hash of step, leaf and place, the place in the whole array: they are the same on every mesh.

BLOCK = 64  # neighbours along the last axis that share a scale; few, so that the shards of a mesh hold whole blocks
PER_OCTAVE = 8  # codes from one power of two to the next
SIGNED, UNSIGNED = 127, 255  # largest codes of 8 bits, with a sign and without
TINY = 1e-38


class Stored(NamedTuple):
    """State of an optimizer whose moments are stored in fewer bits."""

    step: jax.Array  # int32 []: updates so far
    state: Any  # that of the optimizer, its moments in bfloat16 or as codes, int8 or uint8
    scales: Any  # of the codes: the largest magnitude of each block, float32, in a tree like `state`


def stored(optimizer: optax.GradientTransformation, moments: Moments) -> optax.GradientTransformation:
    """Store the moments of an optimizer in bfloat16 or 8 bits: the float32 arrays in its state.

    Those in a field `nu` are not negative. An update is that of the optimizer on what is stored.
    """
    if moments == "float32":
        return optimizer

    def encoded(step: jax.Array, state: Any) -> Stored:
        def one(path: tuple, leaf: jax.Array) -> Any:
            if leaf.dtype != jnp.float32:
                return leaf, None
            noise = random_bits(step, zlib.crc32(jax.tree_util.keystr(path).encode()), leaf.shape)
            return (to_bfloat16(leaf, noise), None) if moments == "bfloat16" else to_codes(leaf, noise, _positive(path))

        pairs = jax.tree_util.tree_map_with_path(one, state)
        part = lambda i: jax.tree.map(lambda _, pair: pair[i], state, pairs)
        return Stored(step, part(0), part(1) if moments == "int8" else ())

    def decoded(kept: Stored) -> Any:
        if moments == "bfloat16":
            return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, kept.state)
        one = lambda leaf, scale: leaf if scale is None else from_codes(leaf, scale)
        return jax.tree.map(one, kept.state, kept.scales)

    def update(updates: Any, kept: Stored, params: Any = None) -> tuple[Any, Stored]:
        updates, state = optimizer.update(updates, decoded(kept), params)
        return updates, encoded(kept.step + 1, state)

    def init(params: Any) -> Stored:
        # All moments begin at zero, whose code is zero. Encoding them would have XLA compute every one as it compiles.
        shapes = jax.eval_shape(lambda params: encoded(jnp.int32(0), optimizer.init(params)), params)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    return optax.GradientTransformation(init, update)


def _positive(path: tuple) -> bool:
    return any(getattr(key, "name", "") == "nu" for key in path)


def to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up with the probability that makes the mean right. noise: uint32 of x's shape."""
    # What bfloat16 drops are 16 bits of the float: a random number of 16 bits carries into the rest that often.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def to_codes(x: jax.Array, noise: jax.Array, positive: bool) -> tuple[jax.Array, jax.Array]:
    """Return codes of x [.., F], of its shape, and the scales of its blocks [.., ceil(F / BLOCK)], float32.

    noise: uint32 of x's shape. positive: that x has no sign; its codes are uint8, otherwise int8. What is positive and
    far below the largest of its block becomes the smallest code and not zero.
    """
    top = UNSIGNED if positive else SIGNED
    scales = jnp.max(jnp.abs(_blocks(x)), axis=-1)
    share = jnp.abs(x) / jnp.maximum(_spread(scales, x.shape), TINY)
    below = jnp.clip(jnp.floor(top + PER_OCTAVE * jnp.log2(jnp.maximum(share, TINY))), 0, top - 1)
    low, high = _value(below, top), _value(below + 1, top)
    chance = (noise >> 8).astype(jnp.float32) * 2.0**-24
    code = below + (share - low > chance * (high - low))
    if positive:
        return jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scales
    return (jnp.sign(x) * code).astype(jnp.int8), scales


def from_codes(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Undo `to_codes`: float32."""
    top = UNSIGNED if codes.dtype == jnp.uint8 else SIGNED
    k = codes.astype(jnp.float32)
    return jnp.sign(k) * _value(jnp.abs(k), top) * _spread(scales, codes.shape)


def _value(code: jax.Array, top: int) -> jax.Array:
    """What a code stands for, as a share of its block's largest."""
    return jnp.where(code > 0, jnp.exp2((code - top) / PER_OCTAVE), 0.0)


def _blocks(x: jax.Array) -> jax.Array:
    """[.., F] as [.., blocks, BLOCK]; a single block may be shorter, and zeros fill up the last of several."""
    size = min(BLOCK, x.shape[-1])
    filled = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % size)])
    return filled.reshape(*x.shape[:-1], -1, size)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of each element of an array of this shape."""
    size = min(BLOCK, shape[-1])
    return jnp.broadcast_to(scales[..., None], (*scales.shape, size)).reshape(*shape[:-1], -1)[..., : shape[-1]]


def random_bits(step: jax.Array, leaf: int, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 of this shape that differ from step to step, leaf to leaf and place to place."""
    # One counter for a place could exceed 32 bits, so each axis is hashed in turn. It costs a few integer operations an
    # element and no memory, where jax.random costs twenty rounds.
    found = _mixed(step.astype(jnp.uint32) + jnp.uint32(leaf))
    for axis in range(len(shape)):
        found = _mixed(found + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(0x9E3779B9))
    return found


def _mixed(x: jax.Array) -> jax.Array:
    """Hash 32 bits: every bit of x changes half of the result's (Wellons 2018, nullprogram.com/blog/2018/07/31)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 15)
