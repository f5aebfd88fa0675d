"""The recurrence by the kernels that walk over time once, with the MLGRU's gates or without: any size, on any mesh."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.ops.fast.choice import STEPS
from mmfree_jax.ops.fast.chunks import STATE, segment_states
from mmfree_jax.ops.fast.kernels import kernel_module
from mmfree_jax.sharding import Names, PartialSum, per_shard, sharding_axis

OPEN = 40.0  # of a forget gate: its sigmoid is 1 in float32
CHANNELS, WEIGHTS = ("channels",), ("batch", "time")  # logical names of floor and keep


def fused_recurrence(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None, h_BD: jax.Array | None, resets_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """All states in c's type, bfloat16 or float32, and the last one in float32.

    With a floor, c_BTD and f_BTD are projections that the MLGRU's gates are made of; without, inputs and factors. T and
    D are filled up to whole tiles with steps that keep the state and channels that hold nothing.
    """
    # A step with factor 1 and input 0 keeps the state, so the last state is that of the last real step. With gates the
    # factor comes from a projection: far into the sigmoid's flat end it is 1, and the gated input is then 0.
    B, T, D = c_BTD.shape
    h_BD = jnp.zeros((B, D), jnp.float32) if h_BD is None else h_BD.astype(jnp.float32)
    keep_BT = jnp.ones((B, T), jnp.float32) if resets_BT is None else 1 - resets_BT.astype(jnp.float32)
    rows, lanes = kernel_module("recurrence").TILE
    more_T, more_D = (0, -T % rows), (0, -D % lanes)
    c_BTD = jnp.pad(c_BTD, ((0, 0), more_T, more_D))
    f_BTD = jnp.pad(f_BTD, ((0, 0), more_T, more_D), constant_values=1.0 if floor_D is None else OPEN)
    floor_D = None if floor_D is None else jnp.pad(floor_D.astype(jnp.float32), more_D)
    h_BD = jnp.pad(h_BD, ((0, 0), more_D))
    keep_BT = jnp.pad(keep_BT, ((0, 0), more_T), constant_values=1)
    out_BTD, last_BD = _fused(c_BTD, f_BTD, floor_D, h_BD, keep_BT)
    return out_BTD[:, :T, :D], last_BD[:, :D]


def _forward(c_BTD, f_BTD, floor_D, h_BD, keep_BT):
    axis, kernel = sharding_axis("time", c_BTD.shape[1]), kernel_module("recurrence")

    def local(c_BTD, f_BTD, floor_D, h_BD, keep_BT):
        S = kernel.segments(*c_BTD.shape)
        c, f, keep = (_cut(a, S) for a in (c_BTD, f_BTD, keep_BT))
        decay_BSD, starts_BSD = jnp.zeros((c_BTD.shape[0], S, c_BTD.shape[2])), h_BD[:, None]
        if S > 1 or axis is not None:
            decay_BSD, end_BSD = (_grouped(a, S) for a in kernel.segment_ends(c, f, floor_D, keep))
            starts_BSD = segment_states(decay_BSD, end_BSD, h_BD, axis)
        out, last = kernel.forward(c, f, floor_D, starts_BSD.reshape(-1, starts_BSD.shape[-1]), keep)
        return out.reshape(c_BTD.shape), _grouped(last, S)[:, -1:], starts_BSD, decay_BSD

    arguments = c_BTD, f_BTD, floor_D, h_BD, keep_BT
    names = [STEPS, STEPS, CHANNELS, STATE, WEIGHTS]
    out_BTD, last_BSD, starts_BSD, decay_BSD = per_shard(local, names, [STEPS] * 4, *arguments)
    out_BTD = checkpoint_name(out_BTD, "state")
    needed_BTD = None if floor_D is None else c_BTD
    return (out_BTD, last_BSD[:, -1]), (needed_BTD, f_BTD, floor_D, starts_BSD, decay_BSD, keep_BT, out_BTD)


def _backward(saved, dresults):
    axis, gated, kernel = sharding_axis("time", saved[1].shape[1]), saved[2] is not None, kernel_module("recurrence")

    def local(c_BTD, f_BTD, floor_D, starts_BSD, decay_BSD, keep_BT, out_BTD, dout_BTD, dlast_BD):
        S = starts_BSD.shape[1]
        f, keep, out, dout = (_cut(a, S) for a in (f_BTD, keep_BT, out_BTD, dout_BTD))
        c = _cut(c_BTD, S) if gated else None
        dlast_BSD = dlast_BD[:, None]
        if S > 1 or axis is not None:
            dstart_BSD = _grouped(kernel.segment_starts(f, floor_D, keep, dout), S)
            dlast_BSD = segment_states(decay_BSD, dstart_BSD, dlast_BD, axis, reverse=True)
        flat = lambda a: a.reshape(-1, a.shape[-1])
        dc, df, dfloor, dh = kernel.backward(c, f, floor_D, flat(starts_BSD), keep, out, dout, flat(dlast_BSD))
        dfloor_D = dfloor.sum(axis=0) if gated else None
        return dc.reshape(f_BTD.shape), df.reshape(f_BTD.shape), dfloor_D, _grouped(dh, S)[:, :1]

    names = [STEPS, STEPS, CHANNELS, STEPS, STEPS, WEIGHTS, STEPS, STEPS, STATE]
    results: list[Names | PartialSum] = [STEPS, STEPS, PartialSum(CHANNELS), STEPS]
    dc_BTD, df_BTD, dfloor_D, dh_BSD = per_shard(local, names, results, *saved, *dresults)
    return dc_BTD, df_BTD, dfloor_D, dh_BSD[:, 0], None


_fused = own_backward(_forward, _backward)


def _cut(a: jax.Array, count: int) -> jax.Array:
    """[B, T, ...] -> [B * count, T / count, ...]: segments as if they were sequences."""
    return a.reshape(a.shape[0] * count, a.shape[1] // count, *a.shape[2:])


def _grouped(a: jax.Array, count: int) -> jax.Array:
    """[B * count, ...] -> [B, count, ...]: what is left of each segment, by sequence."""
    return a.reshape(-1, count, *a.shape[1:])
