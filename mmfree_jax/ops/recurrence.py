"""The element-wise linear recurrence h_t = f_t * h_{t-1} + x_t and the MLGRU's gates around it (Zhu et al. 2024, arXiv
2406.02528, section 3.2; HGRN, Qin et al. 2023, arXiv 2311.04823).

The carry is at least float32 whatever the type of f and x.
"""

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
    factor_BTD = jax.nn.sigmoid(f_BTD.astype(exact))
    if floor_D is not None:
        factor_BTD = floor_D + (1 - floor_D) * factor_BTD
    return factor_BTD, jax.nn.silu(c_BTD.astype(exact)) * (1 - factor_BTD)
