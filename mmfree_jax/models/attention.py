"""Causal attention with rotary embeddings (RoFormer, Su et al. 2021, arXiv 2104.09864), as in
Llama (Touvron et al. 2023, arXiv 2307.09288)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.architecture import ModelConfig
from mmfree_jax.models.layers import Context, Projection, RMSNorm, mixer_inits
from mmfree_jax.ops.attention import attend, causal_attention
from mmfree_jax.ops.ternary import wide
from mmfree_jax.parametrisation import scales


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, S, H, K] with S the capacity, and their documents, [B, S]."""

    k_BSHK: jax.Array
    v_BSHK: jax.Array
    segments_BS: jax.Array


def rotary(positions: jax.Array, head_width: int, theta: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Compute cosines and sines [..., T, K/2] of position * theta^(-2i/K), in at least float32. Positions: [..., T]."""
    exact = wide(dtype)
    powers_K = jnp.arange(0, head_width, 2, dtype=exact) / head_width
    angles = positions.astype(exact)[..., None] * (1 / theta**powers_K)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate channel i with channel i + K/2 (the order of Llama checkpoints), in at least float32."""
    cos, sin = (a[..., None, :] for a in turn)
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
        into, out = mixer_inits(config)
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
        q_BTHK, k_BTHK = (rotate(heads(a), context.rotary) for a in (q, k))
        # Training and prefill see the whole window; decoding sees the cache, in which these tokens come last.
        if state is None:
            y_BTHK = causal_attention(q_BTHK, k_BTHK, heads(v), segments_BT=context.segments_BT)
        else:
            assert context.positions_BT is not None
            state = _append(state, k_BTHK, heads(v), context)
            y_BTHK = attend(q_BTHK, state.k_BSHK, state.v_BSHK, _cache_mask(state, context))
            full_B = context.positions_BT[:, -1] >= state.k_BSHK.shape[1]
            y_BTHK = jnp.where(full_B[:, None, None, None], jnp.nan, y_BTHK)
        y_BTD = y_BTHK.reshape(B, T, D)
        return self.out(y_BTD if self.norm is None else self.norm(y_BTD))[0], state

    @staticmethod
    def start(batch: int, capacity: int, config: ModelConfig, dtype: Any) -> Cache:
        """Return an empty cache for `capacity` tokens."""
        shape = (batch, capacity, config.kv_heads or config.heads, config.width // config.heads)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32))


def _append(cache: Cache, k_BTHK: jax.Array, v_BTHK: jax.Array, context: Context) -> Cache:
    """Put tokens at their positions. What has none, padding before a row's first token, is left out."""
    assert context.positions_BT is not None
    rows_B1, slots_BT = jnp.arange(k_BTHK.shape[0])[:, None], context.positions_BT
    slots_BT = jnp.where(slots_BT < 0, cache.k_BSHK.shape[1], slots_BT)  # a negative index would count from the end

    def put(old: jax.Array, new: Any) -> jax.Array:
        return old.at[rows_B1, slots_BT].set(new.astype(old.dtype), mode="drop")

    return Cache(*map(put, cache, (k_BTHK, v_BTHK, context.segments_BT)))


def _cache_mask(cache: Cache, context: Context) -> jax.Array:
    """Return which slots each token sees, [B, T, S]: those up to its own that hold its document."""
    assert context.positions_BT is not None
    assert context.segments_BT is not None
    earlier_BTS = jnp.arange(cache.k_BSHK.shape[1]) <= context.positions_BT[..., None]
    return earlier_BTS & (context.segments_BT[:, :, None] == cache.segments_BS[:, None, :])
