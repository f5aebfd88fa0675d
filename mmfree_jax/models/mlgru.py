"""The MatMul-free linear GRU (Zhu et al. 2024, arXiv 2406.02528, section 3.2), as the official code computes it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.architecture import ModelConfig
from mmfree_jax.models.layers import Context, Projection, RMSNorm, initialisers
from mmfree_jax.ops.glu import gated_norm
from mmfree_jax.ops.recurrence import gated_recurrence
from mmfree_jax.ops.ternary import wide


def floors(lower_bounds_LD: jax.Array) -> jax.Array:
    """Compute the floor of each layer's forget gate: softmax over depth, summed up to but without the first layer.

    Zero in the first layer and rising with depth (HGRN, Qin et al. 2023, arXiv 2311.04823, section 3.1); in the
    official code, not in the MatMul-free paper. Computed in at least float32.
    """
    # A softmax over layers keeps floors in order and below 1, whatever is learned: deeper layers remember longer.
    share_LD = jax.nn.softmax(lower_bounds_LD.astype(wide(lower_bounds_LD.dtype)), axis=0)
    return jnp.cumsum(share_LD, axis=0) - share_LD[0]


class MLGRU(nnx.Module):
    """f = sigmoid(W_f u), c = silu(W_i u); h_t = f_t h_{t-1} + (1 - f_t) c_t; then an output gate and W_o.

    The official gate norms W_g u and multiplies it by silu(h); the paper's multiplies sigmoid(W_g u) by h, normed here
    so that both have the same parameters (`config.output_gate`).
    """

    def __init__(self, config: ModelConfig, layer: jax.Array, *, rngs: nnx.Rngs, param_dtype: Any):
        D = config.width
        into, out = initialisers(config, "mixer")
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.official = config.output_gate == "official"
        self.gates = Projection(config, D, D, init=into, axes=("embed", "heads"), groups=3, **kwargs)
        self.gate_norm = RMSNorm(D, config.norm_eps, param_dtype)
        self.norm = RMSNorm(D, config.norm_eps, param_dtype) if config.sublayer_norm else None
        self.out = Projection(config, D, D, init=out, axes=("heads", "embed"), **kwargs)

    def __call__(
        self, u_BTD: jax.Array, context: Context, floor_D: jax.Array | None, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Mix over time.

        Args:
            u_BTD: normed activations.
            context: `starts_BT` resets the state at documents' first tokens.
            floor_D: of the forget gate; None for no floor.
            state: h_BD to continue from, in at least float32; None for zeros.

        Returns:
            [B, T, D] of u's type, and the state after the last token.
        """
        # Three projections of one input: candidate i, forget gate f, output gate g.
        i_BTD, f_BTD, g_BTD = self.gates(u_BTD)
        # The candidate goes through silu inside this op, and is weighed by 1 - f: what the gate keeps of the past and
        # what it takes of the present add up to one, so states stay bounded without a norm.
        h_BTD, state = gated_recurrence(i_BTD, f_BTD, floor_D, state, resets_BT=context.starts_BT)
        # The state is element-wise, so it never mixes channels: W_o, after the gate, is where they meet again.
        if self.official:
            y_BTD = gated_norm(g_BTD, h_BTD, self.gate_norm.gain[...], self.gate_norm.eps)
        else:
            y_BTD = jax.nn.sigmoid(g_BTD) * self.gate_norm(h_BTD)
        return self.out(y_BTD if self.norm is None else self.norm(y_BTD))[0], state

    @staticmethod
    def start(batch: int, capacity: int, config: ModelConfig, dtype: Any) -> jax.Array:
        """Return the state before the first token: zeros [B, D], in at least float32."""
        return jnp.zeros((batch, config.width), wide(dtype))
