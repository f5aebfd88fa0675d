"""Causal attention with rotary embeddings (RoFormer, Su et al. 2021, arXiv 2104.09864), as in
Llama (Touvron et al. 2023, arXiv 2307.09288)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.architecture import ModelConfig, scales
from mmfree_jax.models.layers import Context, Projection, RMSNorm, initialisers
from mmfree_jax.ops.attention import attend, causal_attention
from mmfree_jax.ops.ternary import wide


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, S, H, K] with S the capacity, and their documents, [B, S]."""

    k_BSHK: jax.Array
    v_BSHK: jax.Array
    segments_BS: jax.Array


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


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair of channels by its angle, in at least float32."""
    # Channel i turns with channel i + K/2, not with its neighbour as in the paper: the order of Llama's checkpoints. A
    # permutation of the channels of W_q and W_k leads from one order to the other.
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = jnp.split(x_BTHK.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


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
        q_BTHK, k_BTHK = (rotate(heads(a), *context.rotary) for a in (q, k))
        # Training sees the whole window; decoding and prefill see the cache, in which these tokens come last.
        if state is None:
            y_BTHK = causal_attention(q_BTHK, k_BTHK, heads(v), segments_BT=context.segments_BT)
        else:
            y_BTHK, state = attend_cache(q_BTHK, k_BTHK, heads(v), context, state)
        y_BTD = y_BTHK.reshape(B, T, D)
        return self.out(y_BTD if self.norm is None else self.norm(y_BTD))[0], state

    @staticmethod
    def start(batch: int, capacity: int, config: ModelConfig, dtype: Any) -> Cache:
        """Return an empty cache for `capacity` tokens."""
        shape = (batch, capacity, config.kv_heads or config.heads, config.width // config.heads)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32))


def attend_cache(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, context: Context, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Put keys and values at their positions in the cache, and attend from each new token to the cache up to itself.

    Beyond the cache's capacity a row's result is NaN.
    """
    positions_BT, segments_BT = context.positions_BT, context.segments_BT
    assert positions_BT is not None
    assert segments_BT is not None
    rows_B1, capacity = jnp.arange(q_BTHK.shape[0])[:, None], cache.k_BSHK.shape[1]
    # Padding before a row's first token lies below zero and gets no place; a negative index would count from the end.
    places_BT = jnp.where(positions_BT < 0, capacity, positions_BT)
    put = lambda old, new: old.at[rows_B1, places_BT].set(new.astype(old.dtype), mode="drop")
    cache = Cache(put(cache.k_BSHK, k_BTHK), put(cache.v_BSHK, v_BTHK), put(cache.segments_BS, segments_BT))
    earlier_BTS = jnp.arange(capacity) <= positions_BT[..., None]
    mask_BTS = earlier_BTS & (segments_BT[:, :, None] == cache.segments_BS[:, None, :])
    y_BTHK = attend(q_BTHK, cache.k_BSHK, cache.v_BSHK, mask_BTS)
    # A traced program cannot raise, and what has no place is dropped without a word.
    full_B = positions_BT[:, -1] >= capacity
    return jnp.where(full_B[:, None, None, None], jnp.nan, y_BTHK), cache
