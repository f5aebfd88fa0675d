"""RWKV-4 time mixing (Peng et al. 2023, arXiv 2305.13048, sections 3.1 and 3.2, appendix D for the initial values).

With ternary projections and the GLU of the other families as channel mixing this is the MatMul-free RWKV-4 that Zhu et
al. 2024 (arXiv 2406.02528, table 1) compare with; they published no code for it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.architecture import ModelConfig
from mmfree_jax.models.layers import Context, Projection, RMSNorm, initialisers, param
from mmfree_jax.ops.recurrence import WKVState, token_shift, wkv


class TimeMixState(NamedTuple):
    """The last token's input [B, D] and the WKV state."""

    last_BD: jax.Array
    wkv: WKVState


def initial_vectors(width: int, depth: int, layer: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the initial mix of r, k and v, [3, D], the decay [D] and the bonus [D] of a layer (paper, appendix D).

    They are spread out instead of random, so that channels begin with time scales from one token to a hundred.
    """
    channel_D, through = jnp.arange(width), layer / max(depth - 1, 1)  # 0 in the first layer, 1 in the last
    # The current token's share in r, k and v: more of the token before in deeper layers and early channels.
    key_D = (channel_D / width) ** (1 - layer / depth)
    mix_GD = jnp.stack([0.5 * key_D, key_D, key_D + 0.3 * through])
    # The log of the decay per step, from -5 to 3: e^(-e^-5) forgets half in 100 tokens, e^(-e^3) all at once.
    decay_D = -5 + 8 * (channel_D / max(width - 1, 1)) ** (0.7 + 1.3 * through)
    # The current token counts 0.3 times what it will count as the last one; a zigzag makes neighbours differ.
    bonus_D = math.log(0.3) + 0.5 * ((channel_D + 1) % 3 - 1)
    return mix_GD, decay_D, bonus_D


class RWKV4(nnx.Module):
    """r = W_r x_r, k = W_k x_k, v = W_v x_v of inputs mixed with the token before; W_o (sigmoid(r) * wkv(k, v))."""

    def __init__(self, config: ModelConfig, layer: jax.Array, *, rngs: nnx.Rngs, param_dtype: Any):
        D = config.width
        into, out = initialisers(config, "mixer")
        project = lambda init, axes: Projection(config, D, D, init=init, axes=axes, rngs=rngs, param_dtype=param_dtype)
        constant = lambda value, *axes: param(
            value.shape, param_dtype, *axes, init=lambda key, shape, dtype: value.astype(dtype)
        )
        mix_GD, decay_D, bonus_D = initial_vectors(D, config.depth, layer)
        self.mix = constant(mix_GD, None, "norm")
        self.decay = constant(decay_D, "norm")
        self.bonus = constant(bonus_D, "norm")
        self.receptance, self.key, self.value = (project(into, ("embed", "heads")) for _ in range(3))
        self.norm = RMSNorm(D, config.norm_eps, param_dtype) if config.sublayer_norm else None
        self.out = project(out, ("heads", "embed"))

    def __call__(
        self, u_BTD: jax.Array, context: Context, floor_D: None, state: TimeMixState | None
    ) -> tuple[jax.Array, TimeMixState]:
        """Mix over time: [B, T, D] -> [B, T, D], and the state after the last token."""
        # Token shift: r, k and v each read their own mixture of this token and the one before it in its document.
        last_BD = jnp.zeros_like(u_BTD[:, 0]) if state is None else state.last_BD.astype(u_BTD.dtype)
        before_BTD = token_shift(u_BTD, last_BD)
        if context.starts_BT is not None:
            before_BTD = jnp.where(context.starts_BT[..., None], 0, before_BTD)
        r_BTD, k_BTD, v_BTD = (
            layer(u_BTD * share_D + before_BTD * (1 - share_D))[0]
            for layer, share_D in zip(
                (self.receptance, self.key, self.value), self.mix[...].astype(u_BTD.dtype), strict=True
            )
        )
        # The decay is kept as a logarithm: e^(-e^w) lies between 0 and 1 for every w.
        decay_D, earlier = jnp.exp(self.decay[...]), None if state is None else state.wkv
        y_BTD, after = wkv(decay_D, self.bonus[...], k_BTD, v_BTD, earlier, resets_BT=context.starts_BT)
        y_BTD = jax.nn.sigmoid(r_BTD) * y_BTD.astype(u_BTD.dtype)
        y_BTD = self.out(y_BTD if self.norm is None else self.norm(y_BTD))[0]
        return y_BTD, TimeMixState(u_BTD[:, -1], after)

    @staticmethod
    def start(batch: int, capacity: int, config: ModelConfig, dtype: Any) -> TimeMixState:
        """Return the state before the first token."""
        return TimeMixState(jnp.zeros((batch, config.width), dtype), WKVState.empty(batch, config.width, dtype))
