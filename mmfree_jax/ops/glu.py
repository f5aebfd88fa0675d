"""Gated units, SwiGLU as the channel mixer of every family and the output gate of the MLGRU; and the residual stream
that their outputs are added to."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.bit_linear import Recipe, linear, rms_norm
from mmfree_jax.ops.fast.choice import op


@op
def residual(x_BTD: jax.Array, y_BTD: jax.Array, scale: float = 1.0, name: str = "") -> jax.Array:
    """Add a sublayer's output to the residual stream: x + scale * y, [B, T, D]; `name`: for policies of remat."""
    x_BTD = x_BTD + (y_BTD if scale == 1 else y_BTD * scale)
    return checkpoint_name(x_BTD, name) if name else x_BTD


@op
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Gate one array by another: silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


@op
def gated_norm(g: jax.Array, h: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """Normalise g and gate it by h: RMSNorm(g) * silu(h), the MLGRU's output gate.

    The official code of Zhu et al. 2024 (arXiv 2406.02528) normalises the projection and takes the state as the gate.
    """
    return rms_norm(g, gain_D, eps) * jax.nn.silu(h)


@op
def glu(
    into: Recipe,
    gate_up: Any,
    out: Recipe,
    down: Any,
    x: jax.Array,
    gain_F: jax.Array | None = None,
    activation: str = "silu",
) -> jax.Array:
    """Mix channels: down(silu(gate(x)) * up(x)), [..., D] -> [..., D] (Zhu et al. 2024, section 3.3).

    Args:
        into, gate_up: what `linear` takes for the first products, two matrices.
        out, down: what it takes for the second.
        x: input of every token.
        gain_F: of an RMSNorm before the second (BitNet b1.58); None for no norm.
        activation: silu, or relu2 for max(x, 0)^2 in its place (So et al. 2021, arXiv 2109.08668).
    """
    # Two matrices of one input: the wide hidden layer is gated element by element, then a third one leads back.
    gate, up = linear(into, x, gate_up)
    y = swiglu(gate, up) if activation == "silu" else jnp.square(jax.nn.relu(gate)) * up
    (y,) = linear(out, y if gain_F is None else rms_norm(y, gain_F, out.eps), down)
    return y
