"""Causal attention with rotary embeddings (RoFormer, Su et al. 2021, arXiv 2104.09864), as in
Llama (Touvron et al. 2023, arXiv 2307.09288)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.architecture import ModelConfig
from mmfree_jax.models.layers import Context, Projection, RMSNorm, initialisers
from mmfree_jax.ops.attention import Cache, attend_to_cache, causal_attention, rotate
from mmfree_jax.ops.ternary import wide
from mmfree_jax.parametrisation import scales


def rotary(config: ModelConfig, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array] | None:
    """Compute cosines and sines of position * theta^(-2i/K); None for mixers without rotary embeddings.

    positions: [T], or [B, T] where rows differ; results have K/2 behind. At least float32: a bfloat16 holds no position
    above 256 exactly.
    """
    if config.mixer != "attention":
        return None
    exact, head_width = wide(dtype), config.width // config.heads
    powers_K = jnp.arange(0, head_width, 2, dtype=exact) / head_width
    angles = positions.astype(exact)[..., None] * (1 / config.rope_theta**powers_K)
    return jnp.cos(angles), jnp.sin(angles)


class Attention(nnx.Module):
    """Queries, keys and values of the normed input, rotated, attended, projected back."""

    def __init__(self, config: ModelConfig, layer: jax.Array, *, rngs: nnx.Rngs, param_dtype: Any):
        D, H = config.width, config.heads
        K = D // H
        self.head_width = K
        self.kv_heads = config.kv_heads or H
        self.score_scale = scales(config).scores
        into, out = initialisers(config, "mixer")
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.query = Projection(config, D, D, init=into, axes=("embed", "heads"), **kwargs)
        self.key_value = Projection(
            config, D, self.kv_heads * K, init=into, axes=("embed", "heads"), groups=2, **kwargs
        )
        self.norm = RMSNorm(D, config.norm_eps, param_dtype) if config.sublayer_norm else None
        self.out = Projection(config, D, D, init=out, axes=("heads", "embed"), **kwargs)

    def __call__(
        self, u_BTD: jax.Array, context: Context, floor_D: None, state: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Mix over time: [B, T, D] -> [B, T, D], and the cache with these tokens added (None without a cache)."""
        assert context.rotary is not None
        B, T, D = u_BTD.shape
        heads = lambda a: a.reshape(B, T, -1, self.head_width)
        (q,), (k, v) = self.query(u_BTD), self.key_value(u_BTD)
        q = q if self.score_scale == 1 else q * self.score_scale
        # Training sees the whole window; decoding and prefill see the cache, in which these tokens come last.
        if state is None:
            q_BTHK, k_BTHK = (rotate(heads(a), *context.rotary) for a in (q, k))
            y_BTHK = causal_attention(q_BTHK, k_BTHK, heads(v), segments_BT=context.segments_BT)
        else:
            assert context.positions_BT is not None
            assert context.segments_BT is not None
            new = heads(q), heads(k), heads(v), context.rotary, context.positions_BT, context.segments_BT
            y_BTHK, state = attend_to_cache(*new, state)
        y_BTD = y_BTHK.reshape(B, T, D)
        return self.out(y_BTD if self.norm is None else self.norm(y_BTD))[0], state

    @staticmethod
    def start(batch: int, capacity: int, config: ModelConfig, dtype: Any) -> Cache:
        """Return an empty cache for `capacity` tokens."""
        shape = (batch, capacity, config.kv_heads or config.heads, config.width // config.heads)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32))
