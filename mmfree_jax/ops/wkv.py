"""The WKV operator of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, equation 16), numerically stable.

wkv_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t}) with a_t = e^{-w} a_{t-1} + e^{k_t} v_t and b_t the same
with v = 1. Sums of exponentials overflow, so both are kept times e^{-m_t} with m_t = max(m_{t-1} - w, k_t), the largest
exponent so far: then a and b are two ordinary linear recurrences whose factors e^{m_{t-1} - w - m_t} are at most one.
The ratio does not depend on m, so m needs no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.ops.chunks import STATE, STEPS, previous
from mmfree_jax.ops.recurrence import recurrence
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import axis_if_cut, per_shard


class WKVState(NamedTuple):
    """Scaled numerator and denominator and the exponent of their scale, [B, D] each, in at least float32."""

    a_BD: jax.Array
    b_BD: jax.Array
    m_BD: jax.Array


def empty(batch: int, width: int, dtype) -> WKVState:
    """The state before the first token."""
    exact = wide(dtype)
    zeros_BD = jnp.zeros((batch, width), exact)
    return WKVState(zeros_BD, zeros_BD, jnp.full((batch, width), lowest(exact)))


def lowest(dtype) -> float:
    """An exponent that stands for minus infinity and can still be added to."""
    return float(jnp.finfo(dtype).min) / 4


def wkv(
    w_D: jax.Array,
    u_D: jax.Array,
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    state: WKVState | None = None,
    *,
    resets_BT: jax.Array | None = None,
) -> tuple[jax.Array, WKVState]:
    """Weighted average of the values so far.

    Args:
        w_D: decay of the exponents per step, positive.
        u_D: bonus of the current token.
        k_BTD, v_BTD: keys (exponents) and values.
        state: to continue from; None starts anew.
        resets_BT: true where the state before the step is forgotten.

    Returns:
        [B, T, D] in at least float32 and the state after the last step.
    """
    exact = wide(k_BTD.dtype)
    w_D, u_D, k_BTD, v_BTD = (a.astype(exact) for a in (w_D, u_D, k_BTD, v_BTD))
    state = state or empty(k_BTD.shape[0], k_BTD.shape[2], exact)
    m_BTD = jax.lax.stop_gradient(_largest_exponent(w_D, k_BTD, state.m_BD, resets_BT))
    before_BTD = previous(m_BTD, state.m_BD)
    if resets_BT is not None:
        before_BTD = jnp.where(resets_BT[..., None], lowest(exact), before_BTD)
    factor_BTD = jnp.exp(before_BTD - w_D - m_BTD)
    input_BTD = jnp.exp(k_BTD - m_BTD)
    a_BTD = recurrence(factor_BTD, input_BTD * v_BTD, state.a_BD)
    b_BTD = recurrence(factor_BTD, input_BTD, state.b_BD)
    y_BTD = _average(previous(a_BTD, state.a_BD), previous(b_BTD, state.b_BD), before_BTD, u_D + k_BTD, v_BTD)
    return y_BTD, WKVState(a_BTD[:, -1], b_BTD[:, -1], m_BTD[:, -1])


def _average(a_BTD, b_BTD, m_BTD, bonus_BTD, v_BTD) -> jax.Array:
    """(a e^m + e^bonus v) / (b e^m + e^bonus), scaled by the larger exponent."""
    top_BTD = jax.lax.stop_gradient(jnp.maximum(m_BTD, bonus_BTD))
    old_BTD, new_BTD = jnp.exp(m_BTD - top_BTD), jnp.exp(bonus_BTD - top_BTD)
    return (old_BTD * a_BTD + new_BTD * v_BTD) / (old_BTD * b_BTD + new_BTD)


def _largest_exponent(w_D, k_BTD, m_BD, resets_BT) -> jax.Array:
    """m_t = max(m_{t-1} - w, k_t): a linear recurrence in the algebra of (max, +), as a parallel prefix."""
    floor, axis = lowest(k_BTD.dtype), axis_if_cut("time", k_BTD.shape[1])
    decay_BTD = jnp.broadcast_to(-w_D, k_BTD.shape)
    if resets_BT is not None:
        decay_BTD = jnp.where(resets_BT[..., None], floor, decay_BTD)

    def combine(left, right):
        return jnp.maximum(left[0] + right[0], floor), jnp.maximum(left[1] + right[0], right[1])

    def local(decay_BTD, k_BTD, m_BD):
        decay_BTD, end_BTD = jax.lax.associative_scan(combine, (decay_BTD, k_BTD), axis=1)
        if axis is not None:  # of the chunks before this one
            chunks = zip(*(jax.lax.all_gather(a[:, -1], axis) for a in (decay_BTD, end_BTD)), strict=True)
            for i, (decay_BD, end_BD) in enumerate(chunks):
                m_BD = jnp.where(i < jax.lax.axis_index(axis), jnp.maximum(m_BD + decay_BD, end_BD), m_BD)
        return (jnp.maximum(m_BD[:, None] + decay_BTD, end_BTD),)

    return per_shard(local, [STEPS, STEPS, STATE], [STEPS], decay_BTD, k_BTD, m_BD)[0]
