"""`ops.recurrence` with backward passes of its own, on a mesh, and in the form that suits the device."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.ops.fast.choice import STEPS
from mmfree_jax.ops.fast.chunks import STATE, segment_states
from mmfree_jax.ops.fast.fused_recurrence import fused_recurrence
from mmfree_jax.ops.recurrence import WKVState, average, gates, lowest
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import per_shard, sharding_axis

# One backward pass serves every form: g_t = dh_t + f_{t+1} * g_{t+1}; dx_t = g_t; df_t = g_t * h_{t-1}.
#
# A mesh cuts batch and channels freely. Where it cuts time, every device first finds what its chunk does to a state,
# the product of its factors and its end from zero; these travel, and each device starts from the state before its
# chunk.


def gated_recurrence(
    c_BTD: jax.Array,
    f_BTD: jax.Array,
    floor_D: jax.Array | None,
    h_BD: jax.Array | None = None,
    *,
    resets_BT: jax.Array | None = None,
    form: str = "",
) -> tuple[jax.Array, jax.Array]:
    """`ops.recurrence.gated_recurrence`. form: that of `choice.recurrence_form`, which is asked where it is empty."""
    form = form or choice.recurrence_form(c_BTD, c_BTD.dtype, gated=True)
    if form == "kernel":
        floor_D = jnp.zeros(c_BTD.shape[-1], jnp.float32) if floor_D is None else floor_D
        return fused_recurrence(c_BTD, f_BTD, floor_D, h_BD, resets_BT)
    factor_BTD, x_BTD = gates(c_BTD, f_BTD, floor_D)
    out_BTD = recurrence(factor_BTD, x_BTD, h_BD, resets_BT=resets_BT)
    return out_BTD.astype(c_BTD.dtype), out_BTD[:, -1]


def recurrence(
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    h_BD: jax.Array | None = None,
    *,
    resets_BT: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    form: str = "",
) -> jax.Array:
    """`ops.recurrence.recurrence`. form: that of `choice.recurrence_form`, which is asked where it is empty."""
    exact = wide(x_BTD.dtype)
    dtype = exact if dtype is None else jnp.dtype(dtype)
    form = form or choice.recurrence_form(x_BTD, dtype, gated=False)
    if form == "kernel":
        return fused_recurrence(x_BTD.astype(dtype), f_BTD.astype(dtype), None, h_BD, resets_BT)[0]
    f_BTD, x_BTD = f_BTD.astype(exact), x_BTD.astype(exact)
    if resets_BT is not None:
        f_BTD = jnp.where(resets_BT[..., None], 0, f_BTD)
    h_BD = jnp.zeros_like(x_BTD[:, 0]) if h_BD is None else h_BD.astype(exact)
    if x_BTD.shape[1] == 1:
        return (f_BTD * h_BD[:, None] + x_BTD).astype(dtype)
    return _recurrence(form, f_BTD, x_BTD, h_BD).astype(dtype)


def _states(form: str, f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array, reverse: bool = False) -> jax.Array:
    return (_walk if form == "walk" else _prefix)(f_BTD, x_BTD, h_BD, reverse)


# Two forms for XLA. `_prefix` does log2(T) rounds over whole arrays, which is what a GPU or TPU needs to be busy, and
# reads and writes each array as often. `_walk` does T steps on [B, D], each of which fits a CPU's cache, and touches
# memory once.
def _walk(f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array, reverse: bool) -> jax.Array:
    """One step after the other, reading and writing in place: no copy with time in front is made."""

    def step(carry, t):
        h_BD, out_BTD = carry
        at_t = functools.partial(jax.lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
        h_BD = at_t(f_BTD) * h_BD + at_t(x_BTD)
        return (h_BD, jax.lax.dynamic_update_index_in_dim(out_BTD, h_BD, t, 1)), None

    times = jnp.arange(x_BTD.shape[1])
    (_, out_BTD), _ = jax.lax.scan(step, (h_BD, jnp.zeros_like(x_BTD)), times, reverse=reverse)
    return out_BTD


def _prefix(f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array, reverse: bool) -> jax.Array:
    """Parallel prefix over pairs (f, x): logarithmically many steps (Martin & Cundy 2018, arXiv 1709.04057).

    A pair stands for h -> f h + x, and two of them in a row for h -> f' f h + (f' x + x').
    """
    first = -1 if reverse else 0
    x_BTD = x_BTD.at[:, first].add(f_BTD[:, first] * h_BD)

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return jax.lax.associative_scan(combine, (f_BTD, x_BTD), axis=1, reverse=reverse)[1]


def _forward(form: str, f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array):
    axis = sharding_axis("time", f_BTD.shape[1])

    def local(f_BTD, x_BTD, h_BD):
        start_BSD = h_BD[:, None]
        if axis is not None:
            # What this device's chunk does to a state, h -> decay * h + end; all devices learn all of them.
            end_BSD = _states(form, f_BTD, x_BTD, jnp.zeros_like(h_BD))[:, -1:]
            start_BSD = segment_states(jnp.prod(f_BTD, axis=1, keepdims=True), end_BSD, h_BD, axis)
        return _states(form, f_BTD, x_BTD, start_BSD[:, 0]), start_BSD

    out_BTD, start_BSD = per_shard(local, [STEPS, STEPS, STATE], [STEPS, STEPS], f_BTD, x_BTD, h_BD)
    out_BTD = checkpoint_name(out_BTD, "state")
    return out_BTD, (f_BTD, start_BSD, out_BTD)


def _backward(form: str, saved, dh_BTD: jax.Array):
    f_BTD, start_BSD, out_BTD = saved
    axis = sharding_axis("time", f_BTD.shape[1])

    def local(f_BTD, start_BSD, out_BTD, dh_BTD):
        # What a chunk passes on to the one before it in time is f_0 g_0, which stands for f_{t+1} g_{t+1} there.
        later_BTD = jnp.concatenate([f_BTD[:, 1:], jnp.ones_like(f_BTD[:, :1])], axis=1)
        none_BD = jnp.zeros_like(f_BTD[:, 0])
        passed_BD = none_BD
        if axis is not None:
            first_BD = _states(form, later_BTD, dh_BTD, none_BD, reverse=True)[:, 0]
            decay_BSD = jnp.prod(f_BTD, axis=1, keepdims=True)
            passed_BD = segment_states(decay_BSD, (f_BTD[:, 0] * first_BD)[:, None], none_BD, axis, reverse=True)[:, 0]
        g_BTD = _states(form, later_BTD, dh_BTD, passed_BD, reverse=True)
        before_BTD = jnp.concatenate([start_BSD, out_BTD[:, :-1]], axis=1)
        return g_BTD * before_BTD, g_BTD, f_BTD[:, :1] * g_BTD[:, :1]

    df_BTD, dx_BTD, dstart_BSD = per_shard(local, [STEPS] * 4, [STEPS] * 3, f_BTD, start_BSD, out_BTD, dh_BTD)
    return df_BTD, dx_BTD, dstart_BSD[:, 0]


_recurrence = own_backward(_forward, _backward, static=(0,))


def token_shift(x_BTD: jax.Array, first_BD: jax.Array) -> jax.Array:
    """`ops.recurrence.token_shift` of the residual stream, which is whole on every device."""
    return _previous(x_BTD, first_BD, None)


def _previous(x_BTD: jax.Array, first_BD: jax.Array, channels: str | None = "channels") -> jax.Array:
    """Each step's predecessor; one step of each chunk travels. `channels` is the logical name of the last axis."""
    axis = sharding_axis("time", x_BTD.shape[1])

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
    """`ops.recurrence.wkv`; where memory is small the backward pass makes exponents and sums again."""
    # They are ten arrays in float32, and keys and values in bfloat16 make them.
    average_of = jax.checkpoint(_wkv) if choice.inputs_made_again() else _wkv
    return average_of(w_D, u_D, k_BTD, v_BTD, state, resets_BT)


def _wkv(w_D, u_D, k_BTD, v_BTD, state: WKVState | None, resets_BT) -> tuple[jax.Array, WKVState]:
    exact = wide(k_BTD.dtype)
    w_D, u_D, k_BTD, v_BTD = (a.astype(exact) for a in (w_D, u_D, k_BTD, v_BTD))
    state = state or WKVState.empty(k_BTD.shape[0], k_BTD.shape[2], exact)
    # Three dependent scans would be one step after the other. As m does not depend on a and b it comes first; a and b
    # share its factors.
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
    floor, axis = lowest(k_BTD.dtype), sharding_axis("time", k_BTD.shape[1])
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
