"""Causal softmax attention (Vaswani et al. 2017, arXiv 1706.03762, equation 1), over whole windows or to a cache, with
grouped queries (Ainslie et al. 2023, arXiv 2305.13245) and documents that do not see each other."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.ternary import wide


@op
def causal_attention(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJK: jax.Array, *, segments_BT: jax.Array | None = None
) -> jax.Array:
    """Attend from each token to itself and to what came before it in its own document.

    Args:
        q_BTHK: queries of H heads.
        k_BTJK, v_BTJK: keys and values of J heads; H is a multiple of J.
        segments_BT: ids that tell each document, a run of tokens, from the next; None is one document a row.

    Returns:
        [B, T, H, K] of v's type; scores and softmax are in at least float32.
    """
    return attend(q_BTHK, k_BTJK, v_BTJK, visible(segments_BT, q_BTHK.shape[1]))


def visible(segments_BT: jax.Array | None, time: int) -> jax.Array:
    """Return which keys [.., T, S] each query sees: [T, T], or [B, T, T] with documents."""
    causal_TT = jnp.tri(time, dtype=bool)
    return causal_TT if segments_BT is None else causal_TT & (segments_BT[..., None] == segments_BT[..., None, :])


def attend(q_BTHK: jax.Array, k_BSJK: jax.Array, v_BSJK: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend under any mask, [T, S] or [B, T, S], true where visible; shapes as `causal_attention`."""
    # Each group of H // J queries shares the keys and values of one head.
    B, T, H, K = q_BTHK.shape
    J = k_BSJK.shape[2]
    exact = wide(q_BTHK.dtype)
    q_BTJGK = q_BTHK.reshape(B, T, J, H // J, K)
    scores = jnp.einsum("btjgk,bsjk->bjgts", q_BTJGK, k_BSJK, preferred_element_type=exact) / math.sqrt(K)
    # The lowest finite number and not -inf: a row that sees nothing would be NaN, and so would its gradient.
    seen = mask if mask.ndim == 2 else mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(exact).min), axis=-1).astype(v_BSJK.dtype)
    y = jnp.einsum("bjgts,bsjk->btjgk", weights, v_BSJK, preferred_element_type=exact)
    return y.reshape(B, T, H, K).astype(v_BSJK.dtype)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, S, J, K] with S the capacity, and their documents, [B, S]."""

    k_BSJK: jax.Array
    v_BSJK: jax.Array
    segments_BS: jax.Array


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair of channels by its angle, in at least float32."""
    # Channel i turns with channel i + K/2, not with its neighbour as in the paper: the order of Llama's checkpoints. A
    # permutation of the channels of W_q and W_k leads from one order to the other.
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = jnp.split(x_BTHK.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


@op
def attend_to_cache(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJK: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Rotate queries and keys, put keys and values into the cache, and attend from each new token up to itself.

    Args:
        q_BTHK, k_BTJK, v_BTJK: of the new tokens, not yet rotated.
        turn: cosines and sines of their positions, [B, T, K/2] each.
        positions_BT, segments_BT: their places in the cache, and their documents.
        cache: of the tokens before them.

    Returns:
        [B, T, H, K], and the cache with them. Beyond the cache's capacity a row's result is NaN.
    """
    q_BTHK, k_BTJK = rotate(q_BTHK, *turn), rotate(k_BTJK, *turn)
    rows_B1, capacity = jnp.arange(q_BTHK.shape[0])[:, None], cache.k_BSJK.shape[1]
    # Padding before a row's first token lies below zero and gets no place; a negative index would count from the end.
    places_BT = jnp.where(positions_BT < 0, capacity, positions_BT)
    put = lambda old, new: old.at[rows_B1, places_BT].set(new.astype(old.dtype), mode="drop")
    cache = Cache(put(cache.k_BSJK, k_BTJK), put(cache.v_BSJK, v_BTJK), put(cache.segments_BS, segments_BT))
    earlier_BTS = jnp.arange(capacity) <= positions_BT[..., None]
    mask_BTS = earlier_BTS & (segments_BT[:, :, None] == cache.segments_BS[:, None, :])
    y_BTHK = attend(q_BTHK, cache.k_BSJK, cache.v_BSJK, mask_BTS)
    # A traced program cannot raise, and what has no place is dropped without a word.
    full_B = positions_BT[:, -1] >= capacity
    return jnp.where(full_B[:, None, None, None], jnp.nan, y_BTHK), cache
