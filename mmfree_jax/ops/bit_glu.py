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


def bit_glu(into: Recipe, x: Prologue, gate_up: Weights, out: Recipe, down: Weights) -> tuple[jax.Array, Prologue]:
    """The unit of an input x, [..., D] of its type, and x once more as of `bit_linear_beside`.

    `into` and `gate_up` (two matrices) are what `bit_linear` takes for the first products, `out` and `down` for the
    second.
    """
    into, *sources = opened(into, x)
    recipes = into._replace(beside=True), out._replace(prologue="swiglu")
    y, first = _bit_glu(recipes, *sources, gate_up, down)
    return y, x.reread(first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bit_glu(recipes: tuple[Recipe, Recipe], sources, source_gain, gate_up: Weights, down: Weights):
    return _forward(recipes, sources, source_gain, gate_up, down)[0]


def _forward(recipes: tuple[Recipe, Recipe], sources, source_gain, gate_up: Weights, down: Weights):
    into, out = recipes
    ys, of_into = forward(into, sources, source_gain, gate_up)
    out = out._replace(onward=codes_taken_by(into, of_into) is not None)
    (y,), of_out = forward(out, tuple(checkpoint_name(y, "gate_up") for y in ys), None, down)
    return (y, sources[0]), (of_into, of_out)


def _backward(recipes: tuple[Recipe, Recipe], residuals: tuple[Residuals, Residuals], gradients):
    (into, out), (of_into, of_out), (dy, dfirst) = recipes, residuals, gradients
    dgate_and_up, _, ddown = backward(out, of_out, (dy,), by=codes_taken_by(into, of_into))
    return *backward(into, of_into, dgate_and_up, beside=dfirst), ddown


_bit_glu.defvjp(_forward, _backward)
