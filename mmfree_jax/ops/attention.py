"""Causal softmax attention over whole windows (Vaswani et al. 2017, arXiv 1706.03762, equation 1), with grouped queries
(Ainslie et al. 2023, arXiv 2305.13245) and documents that do not see each other."""

import math

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
        segments_BT: document ids; None is one document a row.

    Returns:
        [B, T, H, K] of v's type; scores and softmax are in at least float32.
    """
    return attend(q_BTHK, k_BTJK, v_BTJK, visible(segments_BT, q_BTHK.shape[1]))


def visible(segments_BT: jax.Array | None, time: int) -> jax.Array:
    """Return which keys [.., T, S] each query sees: [T, T], or [B, T, T] with documents."""
    causal_TT = jnp.tri(time, dtype=bool)
    return causal_TT if segments_BT is None else causal_TT & (segments_BT[..., None] == segments_BT[..., None, :])


@op
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
