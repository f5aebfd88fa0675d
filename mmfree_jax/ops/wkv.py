"""The WKV operator of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, equation 16), stable, and its token shift.

wkv_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t}) with a_t = e^{-w} a_{t-1} + e^{k_t} v_t and b_t the same
with v = 1. Sums of exponentials overflow, so both are kept times e^{-m_t} with m_t = max(m_{t-1} - w, k_t), the largest
exponent so far. The ratio does not depend on m, so m needs no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.ternary import wide


class WKVState(NamedTuple):
    """Scaled numerator and denominator and the exponent of their scale, [B, D] each, in at least float32."""

    a_BD: jax.Array
    b_BD: jax.Array
    m_BD: jax.Array


def empty(batch: int, width: int, dtype: DTypeLike) -> WKVState:
    """Return the state before the first token."""
    exact = wide(dtype)
    zeros_BD = jnp.zeros((batch, width), exact)
    return WKVState(zeros_BD, zeros_BD, jnp.full((batch, width), lowest(exact)))


def lowest(dtype: DTypeLike) -> float:
    """Return an exponent that stands for minus infinity and can still be added to."""
    return float(jnp.finfo(dtype).min) / 4


@op
def token_shift(x_BTD: jax.Array, first_BD: jax.Array) -> jax.Array:
    """Return each step's predecessor, [B, T, D]; first_BD stands before the first."""
    return jnp.concatenate([first_BD[:, None], x_BTD[:, :-1]], axis=1)


@op
def wkv(
    w_D: jax.Array,
    u_D: jax.Array,
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    state: WKVState | None = None,
    *,
    resets_BT: jax.Array | None = None,
) -> tuple[jax.Array, WKVState]:
    """Average the values so far, weighted by the exponentials of their keys and ages.

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
    start = empty(k_BTD.shape[0], k_BTD.shape[2], exact)
    resets_BT = jnp.zeros(k_BTD.shape[:2], bool) if resets_BT is None else resets_BT

    def step(state: WKVState, token: tuple[jax.Array, ...]) -> tuple[WKVState, jax.Array]:
        k_BD, v_BD, reset_B = token
        state = jax.tree.map(lambda new, old: jnp.where(reset_B[:, None], new, old), start, state)
        # The current token has a bonus and no age yet; afterwards it joins the sums like any other.
        y_BD = average(*state, u_D + k_BD, v_BD)
        m_BD = jax.lax.stop_gradient(jnp.maximum(state.m_BD - w_D, k_BD))
        decay_BD, weight_BD = jnp.exp(state.m_BD - w_D - m_BD), jnp.exp(k_BD - m_BD)
        return WKVState(decay_BD * state.a_BD + weight_BD * v_BD, decay_BD * state.b_BD + weight_BD, m_BD), y_BD

    by_time = tuple(a.swapaxes(0, 1) for a in (k_BTD, v_BTD, resets_BT))
    last, y_TBD = jax.lax.scan(step, state or start, by_time)
    return y_TBD.swapaxes(0, 1), last


def average(a: jax.Array, b: jax.Array, m: jax.Array, bonus: jax.Array, v: jax.Array) -> jax.Array:
    """Compute (a e^m + e^bonus v) / (b e^m + e^bonus), scaled by the larger exponent."""
    top = jax.lax.stop_gradient(jnp.maximum(m, bonus))
    old, new = jnp.exp(m - top), jnp.exp(bonus - top)
    return (old * a + new * v) / (old * b + new)
