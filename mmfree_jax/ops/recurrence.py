"""The element-wise linear recurrence h_t = f_t * h_{t-1} + x_t (Zhu et al. 2024, arXiv 2406.02528, section 3.2;
HGRN, Qin et al. 2023, arXiv 2311.04823).

The carry is at least float32 whatever the type of f and x. One backward pass serves every form:
g_t = dh_t + f_{t+1} * g_{t+1};  dx_t = g_t;  df_t = g_t * h_{t-1}.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.ternary import wide

Form = Literal["auto", "scan", "associative"]


def recurrence(
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    h_BD: jax.Array | None = None,
    *,
    resets_BT: jax.Array | None = None,
    impl: Form = "auto",
) -> jax.Array:
    """All states of h_t = f_t * h_{t-1} + x_t.

    Args:
        f_BTD: factors, in [0, 1] for a forget gate.
        x_BTD: inputs.
        h_BD: state before the first step; None is zero.
        resets_BT: true where the state before the step is forgotten (the first token of a document).
        impl: "scan" walks over time, "associative" is a parallel prefix (Martin & Cundy 2018, arXiv 1709.04057);
            "auto" walks on CPU, where that is up to four times faster, and for single steps.

    Returns:
        h_BTD in at least float32; the last step is the state to continue from.
    """
    exact = wide(x_BTD.dtype)
    f_BTD, x_BTD = f_BTD.astype(exact), x_BTD.astype(exact)
    if resets_BT is not None:
        f_BTD = jnp.where(resets_BT[..., None], 0, f_BTD)
    h_BD = jnp.zeros_like(x_BTD[:, 0]) if h_BD is None else h_BD.astype(exact)
    if x_BTD.shape[1] == 1:
        return f_BTD * h_BD[:, None] + x_BTD
    return _recurrence(_choose(impl), f_BTD, x_BTD, h_BD)


def _choose(impl: Form) -> str:
    if impl != "auto":
        return impl
    return "scan" if jax.default_backend() == "cpu" else "associative"


def _states(form: str, f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array, reverse: bool = False) -> jax.Array:
    return (_walk if form == "scan" else _prefix)(f_BTD, x_BTD, h_BD, reverse)


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
    """Parallel prefix over pairs (f, x): logarithmically many steps."""
    first = -1 if reverse else 0
    x_BTD = x_BTD.at[:, first].add(f_BTD[:, first] * h_BD)

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return jax.lax.associative_scan(combine, (f_BTD, x_BTD), axis=1, reverse=reverse)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(form: str, f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array) -> jax.Array:
    return _states(form, f_BTD, x_BTD, h_BD)


def _forward(form: str, f_BTD: jax.Array, x_BTD: jax.Array, h_BD: jax.Array):
    out_BTD = checkpoint_name(_states(form, f_BTD, x_BTD, h_BD), "state")
    return out_BTD, (f_BTD, h_BD, out_BTD)


def _backward(form: str, saved, dh_BTD: jax.Array):
    f_BTD, h_BD, out_BTD = saved
    later_BTD = jnp.concatenate([f_BTD[:, 1:], jnp.zeros_like(f_BTD[:, :1])], axis=1)
    g_BTD = _states(form, later_BTD, dh_BTD, jnp.zeros_like(h_BD), reverse=True)
    before_BTD = jnp.concatenate([h_BD[:, None], out_BTD[:, :-1]], axis=1)
    return g_BTD * before_BTD, g_BTD, f_BTD[:, 0] * g_BTD[:, 0]


_recurrence.defvjp(_forward, _backward)
