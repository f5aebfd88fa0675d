"""The gated linear unit of ternary layers as one op: down(silu(gate(x)) * up(x)) with a backward pass of its own.

It keeps what its two BitLinears keep. What it adds: with `Recipe.gradient_bits`, the gradients to gate and up leave the
kernel that computes them as integer codes, and are never written as values.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.bit_linear import Residuals, Weights, backward, codes_taken_by, forward, opened
from mmfree_jax.ops.prologue import Prologue
from mmfree_jax.ops.ternary_weights import Recipe


def bit_glu(into: Recipe, x: jax.Array | Prologue, gate_up: Weights, out: Recipe, down: Weights) -> jax.Array:
    """What `bit_linear(out, Prologue("swiglu", bit_linear(into, x, gate_up)), down)` is: [..., D] of x's type."""
    into, sources, source_gain = opened(into, x)
    return _bit_glu(into, out._replace(prologue="swiglu"), sources, source_gain, gate_up, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _bit_glu(into: Recipe, out: Recipe, sources, source_gain, gate_up: Weights, down: Weights) -> jax.Array:
    return _forward(into, out, sources, source_gain, gate_up, down)[0]


def _forward(into: Recipe, out: Recipe, sources, source_gain, gate_up: Weights, down: Weights):
    ys, of_into = forward(into, sources, source_gain, gate_up)
    gate_and_up = tuple(checkpoint_name(y, "projection") for y in ys)
    (y,), of_out = forward(out, gate_and_up, None, down)
    return y, (of_into, of_out)


def _backward(into: Recipe, out: Recipe, residuals: tuple[Residuals, Residuals], dy: jax.Array):
    of_into, of_out = residuals
    dgate_and_up, _, ddown = backward(out, of_out, (dy,), codes_taken_by(into, of_into))
    return *backward(into, of_into, dgate_and_up), ddown


_bit_glu.defvjp(_forward, _backward)
