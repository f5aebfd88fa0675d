"""`ops.glu` with backward passes of its own, and placed on a mesh."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.bit_linear import Recipe, Weights
from mmfree_jax.ops.fast import combine
from mmfree_jax.ops.fast.autodiff import own_backward_of_used
from mmfree_jax.ops.fast.bit_linear import Fusion, Residuals, backward, codes_onward, forward, linear, source
from mmfree_jax.ops.fast.combine import rms_norm
from mmfree_jax.ops.fast.origin import Origin, Sum, hand_on, latest, note
from mmfree_jax.ops.served_linear import PackedWeights
from mmfree_jax.sharding import constrain

# A ternary GLU keeps what its two BitLinears keep. As one op it gains with `Recipe.gradient_bits`: the gradients to
# gate and up leave the kernel that computes them as integer codes, and are never written as values.


def residual(x_BTD: jax.Array, y_BTD: jax.Array, scale: float = 1.0, name: str = "") -> jax.Array:
    """`ops.glu.residual`; a BitLinear that has read the stream adds both gradients to it (`origin`)."""
    x_BTD = latest(x_BTD, last=True)
    scaled_BTD = y_BTD if scale == 1 else y_BTD * scale
    total_BTD = constrain(x_BTD + scaled_BTD, "batch", "time", None)
    return note(checkpoint_name(total_BTD, name) if name else total_BTD, Sum(x_BTD, y_BTD, scale))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`ops.glu.swiglu`."""
    return note(combine.swiglu(gate, up), Origin("swiglu", (gate, up)))


def gated_norm(g: jax.Array, h: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """`ops.glu.gated_norm`."""
    return note(combine.combine("gated", (g, h), gain_D, eps), Origin("gated", (g, h), gain_D, eps))


def glu(
    into: Recipe,
    gate_up: Weights | PackedWeights,
    out: Recipe,
    down: Weights | PackedWeights,
    x: jax.Array,
    gain_F: jax.Array | None = None,
    activation: str = "silu",
) -> jax.Array:
    """`ops.glu.glu`; ternary, with silu and without a norm inside, one op, unless the weights are packed."""
    packed = isinstance(gate_up, PackedWeights) or isinstance(down, PackedWeights)
    if packed or not (into.ternary and out.ternary and gain_F is None and activation == "silu"):
        gate, up = (checkpoint_name(y, "gate_up") for y in linear(into, x, gate_up))
        y = swiglu(gate, up) if activation == "silu" else jnp.square(jax.nn.relu(gate)) * up
        return linear(out, y if gain_F is None else rms_norm(y, gain_F, out.eps), down)[0]
    kind, sources, source_gain, _ = source(into, x)
    fusions = Fusion(into, kind, residual=kind == "norm"), Fusion(out, "swiglu")
    y, copy = _glu(fusions, sources, source_gain, gate_up, down)
    if fusions[0].residual:
        hand_on(sources[0], copy)
    return y


def _forward(fusions: tuple[Fusion, Fusion], sources, source_gain, gate_up: Weights, down: Weights):
    into, out = fusions
    ys, of_into = forward(into, sources, source_gain, gate_up)
    out = out._replace(onward=codes_onward(into.recipe, of_into) is not None)
    (y,), of_out = forward(out, tuple(checkpoint_name(y, "gate_up") for y in ys), None, down)
    return (y, sources[0] if into.residual else None), (of_into, of_out)


def _backward(fusions: tuple[Fusion, Fusion], residuals: tuple[Residuals, Residuals], gradients):
    (into, out), (of_into, of_out), (dy, dcopy) = fusions, residuals, gradients
    # Gradients to gate and up are quantised where down's backward kernel has them in registers: with the scales of the
    # tokens' inputs, which the products with those gradients need in their codes.
    row_factors = codes_onward(into.recipe, of_into)
    dgate_and_up, _, ddown = backward(out, of_out, (dy,), row_factors=row_factors)
    return *backward(into, of_into, dgate_and_up, dcopy=dcopy), ddown


_glu = own_backward_of_used(_forward, _backward)
