"""The MLGRU's gates and recurrence as one op: F = floor + (1 - floor) sigmoid(f), h_t = F_t h_{t-1} + (1 - F_t) silu(c)
(Zhu et al. 2024, arXiv 2406.02528, section 3.2; the floor is HGRN's, Qin et al. 2023, arXiv 2311.04823)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.kernels.choice import on_hopper
from mmfree_jax.ops.recurrence import STATE, STEPS, carried, recurrence
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import Names, Summed, axis_if_cut, per_shard, ways

Form = Literal["auto", "reference", "kernel"]
NAMES = (STEPS, STEPS, ("channels",), STATE, ("batch", "time"))  # of c, f, floor, h and keep
OPEN = 40.0  # of a forget gate: its sigmoid is 1 in float32


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
    if impl == "kernel" or (impl == "auto" and _kernel_serves(c_BTD)):
        return _kernel(c_BTD, f_BTD, floor_D, h_BD, resets_BT)
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


def _kernel_serves(c_BTD: jax.Array) -> bool:
    if not on_hopper() or c_BTD.dtype not in (jnp.bfloat16, jnp.float32):
        return False
    from mmfree_jax.ops.kernels.gated_recurrence import LANES, ROWS

    # What is filled up to whole tiles is cut evenly only if it was whole tiles on every device before.
    cut = (ways(name, size) for name, size in zip(("time", "channels"), c_BTD.shape[1:], strict=True))
    return all(
        n == 1 or size % (n * tile) == 0 for n, size, tile in zip(cut, c_BTD.shape[1:], (ROWS, LANES), strict=True)
    )


def _kernel(c_BTD, f_BTD, floor_D, h_BD, resets_BT) -> tuple[jax.Array, jax.Array]:
    """Any T and D: filled up to whole tiles with steps that keep the state and channels that hold nothing."""
    from mmfree_jax.ops.kernels.gated_recurrence import LANES, ROWS

    B, T, D = c_BTD.shape
    floor_D = jnp.zeros(D, jnp.float32) if floor_D is None else floor_D.astype(jnp.float32)
    h_BD = jnp.zeros((B, D), jnp.float32) if h_BD is None else h_BD.astype(jnp.float32)
    keep_BT = jnp.ones((B, T), jnp.float32) if resets_BT is None else 1 - resets_BT.astype(jnp.float32)
    more_T, more_D = (0, -T % ROWS), (0, -D % LANES)
    c_BTD = jnp.pad(c_BTD, ((0, 0), more_T, more_D))
    f_BTD = jnp.pad(f_BTD, ((0, 0), more_T, more_D), constant_values=OPEN)
    floor_D, h_BD = jnp.pad(floor_D, more_D), jnp.pad(h_BD, ((0, 0), more_D))
    keep_BT = jnp.pad(keep_BT, ((0, 0), more_T), constant_values=1)
    out_BTD, last_BD = _fused(c_BTD, f_BTD, floor_D, h_BD, keep_BT)
    return out_BTD[:, :T, :D], last_BD[:, :D]


@jax.custom_vjp
def _fused(c_BTD, f_BTD, floor_D, h_BD, keep_BT):
    return _forward(c_BTD, f_BTD, floor_D, h_BD, keep_BT)[0]


def _forward(c_BTD, f_BTD, floor_D, h_BD, keep_BT):
    # Imported here: only machines with such a GPU need to have what the kernel language needs.
    from mmfree_jax.ops.kernels import gated_recurrence as kernel

    axis = axis_if_cut("time", c_BTD.shape[1])

    def local(c_BTD, f_BTD, floor_D, h_BD, keep_BT):
        S = kernel.segments(*c_BTD.shape)
        c, f, keep = (_cut(a, S) for a in (c_BTD, f_BTD, keep_BT))
        decay_BSD, starts_BSD = jnp.zeros((c_BTD.shape[0], S, c_BTD.shape[2])), h_BD[:, None]
        if S > 1 or axis is not None:
            decay_BSD, end_BSD = (_grouped(a, S) for a in kernel.segment_ends(c, f, floor_D, keep))
            starts_BSD = carried(decay_BSD, end_BSD, h_BD, axis)
        out, last = kernel.forward(c, f, floor_D, starts_BSD.reshape(-1, starts_BSD.shape[-1]), keep)
        return out.reshape(c_BTD.shape), _grouped(last, S)[:, -1:], starts_BSD, decay_BSD

    arguments = c_BTD, f_BTD, floor_D, h_BD, keep_BT
    out_BTD, last_BSD, starts_BSD, decay_BSD = per_shard(local, NAMES, [STEPS] * 4, *arguments)
    out_BTD = checkpoint_name(out_BTD, "state")
    return (out_BTD, last_BSD[:, -1]), (c_BTD, f_BTD, floor_D, starts_BSD, decay_BSD, keep_BT, out_BTD)


def _backward(saved, dresults):
    from mmfree_jax.ops.kernels import gated_recurrence as kernel

    axis = axis_if_cut("time", saved[0].shape[1])

    def local(c_BTD, f_BTD, floor_D, starts_BSD, decay_BSD, keep_BT, out_BTD, dout_BTD, dlast_BD):
        S = starts_BSD.shape[1]
        c, f, keep, out, dout = (_cut(a, S) for a in (c_BTD, f_BTD, keep_BT, out_BTD, dout_BTD))
        dlast_BSD = dlast_BD[:, None]
        if S > 1 or axis is not None:
            dstart_BSD = _grouped(kernel.segment_starts(f, floor_D, keep, dout), S)
            dlast_BSD = carried(decay_BSD, dstart_BSD, dlast_BD, axis, reverse=True)
        flat = lambda a: a.reshape(-1, a.shape[-1])
        dc, df, dfloor, dh = kernel.backward(c, f, floor_D, flat(starts_BSD), keep, out, dout, flat(dlast_BSD))
        return dc.reshape(c_BTD.shape), df.reshape(c_BTD.shape), dfloor.sum(axis=0), _grouped(dh, S)[:, :1]

    names = [STEPS, STEPS, ("channels",), STEPS, STEPS, NAMES[-1], STEPS, STEPS, STATE]
    results: list[Names | Summed] = [STEPS, STEPS, Summed(("channels",)), STEPS]
    dc_BTD, df_BTD, dfloor_D, dh_BSD = per_shard(local, names, results, *saved, *dresults)
    return dc_BTD, df_BTD, dfloor_D, dh_BSD[:, 0], None


_fused.defvjp(_forward, _backward)


def _cut(a: jax.Array, count: int) -> jax.Array:
    """[B, T, ...] -> [B * count, T / count, ...]: segments as if they were sequences."""
    return a.reshape(a.shape[0] * count, a.shape[1] // count, *a.shape[2:])


def _grouped(a: jax.Array, count: int) -> jax.Array:
    """[B * count, ...] -> [B, count, ...]: what is left of each segment, by sequence."""
    return a.reshape(-1, count, *a.shape[1:])
