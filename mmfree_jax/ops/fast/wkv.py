"""`ops.wkv` by parallel recurrences: a and b are two linear recurrences whose factors e^{m_{t-1} - w - m_t} are at most
one, and the exponent m is a third, in the algebra of (max, +)."""

import jax
import jax.numpy as jnp

from mmfree_jax.ops.fast.choice import STEPS
from mmfree_jax.ops.fast.chunks import STATE
from mmfree_jax.ops.fast.recurrence import recurrence
from mmfree_jax.ops.ternary import wide
from mmfree_jax.ops.wkv import WKVState, average, empty, lowest
from mmfree_jax.sharding import axis_if_cut, per_shard


def token_shift(x_BTD: jax.Array, first_BD: jax.Array) -> jax.Array:
    """`ops.wkv.token_shift` of the residual stream, which is whole on every device."""
    return _previous(x_BTD, first_BD, None)


def _previous(x_BTD: jax.Array, first_BD: jax.Array, channels: str | None = "channels") -> jax.Array:
    """Each step's predecessor; one step of each chunk travels. `channels` is the logical name of the last axis."""
    axis = axis_if_cut("time", x_BTD.shape[1])

    def local(x_BTD, first_BD):
        if axis is not None:
            size = jax.lax.axis_size(axis)
            before_BD = jax.lax.ppermute(x_BTD[:, -1], axis, [(i, i + 1) for i in range(size - 1)])
            first_BD = jnp.where(jax.lax.axis_index(axis) == 0, first_BD, before_BD)
        return (jnp.concatenate([first_BD[:, None], x_BTD[:, :-1]], axis=1),)

    steps, state = (*STEPS[:2], channels), (STATE[0], channels)
    return per_shard(local, [steps, state], [steps], x_BTD, first_BD)[0]


def wkv(
    w_D: jax.Array,
    u_D: jax.Array,
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    state: WKVState | None = None,
    *,
    resets_BT: jax.Array | None = None,
) -> tuple[jax.Array, WKVState]:
    """`ops.wkv.wkv`."""
    exact = wide(k_BTD.dtype)
    w_D, u_D, k_BTD, v_BTD = (a.astype(exact) for a in (w_D, u_D, k_BTD, v_BTD))
    state = state or empty(k_BTD.shape[0], k_BTD.shape[2], exact)
    # The exponents first, in parallel over time; then a and b, relative to them, are recurrences like any other.
    m_BTD = jax.lax.stop_gradient(_largest_exponent(w_D, k_BTD, state.m_BD, resets_BT))
    before_BTD = _previous(m_BTD, state.m_BD)
    if resets_BT is not None:
        before_BTD = jnp.where(resets_BT[..., None], lowest(exact), before_BTD)
    factor_BTD = jnp.exp(before_BTD - w_D - m_BTD)
    input_BTD = jnp.exp(k_BTD - m_BTD)
    a_BTD = recurrence(factor_BTD, input_BTD * v_BTD, state.a_BD)
    b_BTD = recurrence(factor_BTD, input_BTD, state.b_BD)
    y_BTD = average(_previous(a_BTD, state.a_BD), _previous(b_BTD, state.b_BD), before_BTD, u_D + k_BTD, v_BTD)
    return y_BTD, WKVState(a_BTD[:, -1], b_BTD[:, -1], m_BTD[:, -1])


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
