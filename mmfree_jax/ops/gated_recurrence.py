"""The MLGRU's gates and recurrence as one op: F = floor + (1 - floor) sigmoid(f), h_t = F_t h_{t-1} + (1 - F_t) silu(c)
(Zhu et al. 2024, arXiv 2406.02528, section 3.2; the floor is HGRN's, Qin et al. 2023, arXiv 2311.04823)."""

from typing import Literal

import jax
import jax.numpy as jnp

from mmfree_jax.ops.fused_recurrence import fused_recurrence, serves
from mmfree_jax.ops.recurrence import recurrence
from mmfree_jax.ops.ternary import wide

Form = Literal["auto", "reference", "kernel"]


def gated_recurrence(
    c_BTD: jax.Array,
    f_BTD: jax.Array,
    floor_D: jax.Array | None,
    h_BD: jax.Array | None = None,
    *,
    resets_BT: jax.Array | None = None,
    impl: Form = "auto",
) -> tuple[jax.Array, jax.Array]:
    """All states, and the last one.

    Args:
        c_BTD, f_BTD: projections for candidate and forget gate.
        floor_D: of the forget gate; None is zero.
        h_BD: state before the first step, in at least float32; None is zero.
        resets_BT: true where the state before the step is forgotten (the first token of a document).
        impl: "reference" gates in XLA and then `recurrence`; "kernel" is one pass over memory on Hopper GPUs; "auto"
            takes the kernel where it serves.

    Returns:
        h_BTD in c's type and the last state [B, D] in at least float32. Gates and carry are at least float32.
    """
    if impl == "kernel" or (impl == "auto" and serves(c_BTD, gated=True)):
        floor_D = jnp.zeros(c_BTD.shape[-1], jnp.float32) if floor_D is None else floor_D
        return fused_recurrence(c_BTD, f_BTD, floor_D, h_BD, resets_BT)
    factor_BTD, x_BTD = gates(c_BTD, f_BTD, floor_D)
    out_BTD = recurrence(factor_BTD, x_BTD, h_BD, resets_BT=resets_BT)
    return out_BTD.astype(c_BTD.dtype), out_BTD[:, -1]


def gates(c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Forget factors F and gated candidates (1 - F) silu(c), in at least float32."""
    exact = wide(c_BTD.dtype)
    factor_BTD = jax.nn.sigmoid(f_BTD.astype(exact))
    if floor_D is not None:
        factor_BTD = floor_D + (1 - floor_D) * factor_BTD
    return factor_BTD, jax.nn.silu(c_BTD.astype(exact)) * (1 - factor_BTD)
