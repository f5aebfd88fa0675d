"""Element-wise recurrences over time: h_t = f_t * h_{t-1} + x_t, the MLGRU's gates around it (Zhu et al. 2024, arXiv
2406.02528, section 3.2; HGRN, Qin et al. 2023, arXiv 2311.04823), and the WKV operator of RWKV-4.

The carry is at least float32 whatever the type of the inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.ternary import wide


@op
def recurrence(
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    h_BD: jax.Array | None = None,
    *,
    resets_BT: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Compute all states of h_t = f_t * h_{t-1} + x_t, [B, T, D].

    Args:
        f_BTD: factors, in [0, 1] for a forget gate.
        x_BTD: inputs.
        h_BD: state before the first step; None is zero.
        resets_BT: true where the state before the step is forgotten (the first token of a document).
        dtype: of the result; None is at least float32.
    """
    exact = wide(x_BTD.dtype)
    f_BTD, x_BTD = f_BTD.astype(exact), x_BTD.astype(exact)
    if resets_BT is not None:
        # A document begins: what came before has no part in the state.
        f_BTD = jnp.where(resets_BT[..., None], 0, f_BTD)

    def step(h_BD, f_and_x):
        f_BD, x_BD = f_and_x
        h_BD = f_BD * h_BD + x_BD
        return h_BD, h_BD

    h_BD = jnp.zeros_like(x_BTD[:, 0]) if h_BD is None else h_BD.astype(exact)
    _, h_TBD = jax.lax.scan(step, h_BD, (f_BTD.swapaxes(0, 1), x_BTD.swapaxes(0, 1)))
    return h_TBD.swapaxes(0, 1).astype(exact if dtype is None else dtype)


@op
def gated_recurrence(
    c_BTD: jax.Array,
    f_BTD: jax.Array,
    floor_D: jax.Array | None,
    h_BD: jax.Array | None = None,
    *,
    resets_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute the MLGRU's states: h_t = F_t h_{t-1} + (1 - F_t) silu(c_t) with F = floor + (1 - floor) sigmoid(f).

    Args:
        c_BTD, f_BTD: projections for candidate and forget gate.
        floor_D: of the forget gate; None is zero.
        h_BD: state before the first step, in at least float32; None is zero.
        resets_BT: true where the state before the step is forgotten (the first token of a document).

    Returns:
        h_BTD in c's type and the last state [B, D] in at least float32. Gates and carry are at least float32.
    """
    factor_BTD, x_BTD = gates(c_BTD, f_BTD, floor_D)
    h_BTD = recurrence(factor_BTD, x_BTD, h_BD, resets_BT=resets_BT)
    return h_BTD.astype(c_BTD.dtype), h_BTD[:, -1]


def gates(c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Compute forget factors F and gated candidates (1 - F) silu(c), in at least float32."""
    exact = wide(c_BTD.dtype)
    # Cast before the sigmoid: a factor near 1 has to be told from 1, and its complement is what the candidate gets. In
    # bfloat16 the largest factor below 1 is 0.996, which forgets half within 177 steps.
    factor_BTD = jax.nn.sigmoid(f_BTD.astype(exact))
    if floor_D is not None:
        factor_BTD = floor_D + (1 - floor_D) * factor_BTD
    return factor_BTD, jax.nn.silu(c_BTD.astype(exact)) * (1 - factor_BTD)


class WKVState(NamedTuple):
    """Scaled numerator and denominator and the exponent of their scale, [B, D] each, in at least float32."""

    a_BD: jax.Array
    b_BD: jax.Array
    m_BD: jax.Array

    @staticmethod
    def empty(batch: int, width: int, dtype: DTypeLike) -> "WKVState":
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
    """Average the values so far, weighted by the exponentials of their keys and ages (RWKV-4, Peng et al. 2023, arXiv
    2305.13048, equation 16).

    wkv_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t}) with a_t = e^{-w} a_{t-1} + e^{k_t} v_t and b_t the
    same with v = 1.

    Args:
        w_D: decay of the exponents per step, positive.
        u_D: bonus of the current token.
        k_BTD, v_BTD: keys (exponents) and values.
        state: to continue from; None starts from nothing.
        resets_BT: true where the state before the step is forgotten.

    Returns:
        [B, T, D] in at least float32 and the state after the last step.
    """
    # Sums of exponentials overflow, so a and b are kept times e^{-m_t} with m_t = max(m_{t-1} - w, k_t), the largest
    # exponent so far. The ratio does not depend on m, so m needs no gradient.
    exact = wide(k_BTD.dtype)
    w_D, u_D, k_BTD, v_BTD = (a.astype(exact) for a in (w_D, u_D, k_BTD, v_BTD))
    start = WKVState.empty(k_BTD.shape[0], k_BTD.shape[2], exact)
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
    # As in a softmax: relative to the largest exponent no term overflows, and the ratio is the same.
    top = jax.lax.stop_gradient(jnp.maximum(m, bonus))
    old, new = jnp.exp(m - top), jnp.exp(bonus - top)
    return (old * a + new * v) / (old * b + new)
