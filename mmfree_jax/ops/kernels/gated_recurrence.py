"""The MLGRU's gates and recurrence in one pass over time, forward and backward (Pallas Mosaic GPU).

A block owns 128 channels of one sequence and walks through time, ROWS steps a stage; stages are copied in ahead of
their use by the tensor memory accelerator, so that the walk is bound by memory bandwidth, not by its latency. Gates are
computed from the projections in registers and again in the backward pass: neither they nor the factors ever reach
memory, and the carry stays float32. Reads 2 and writes 1 element a step forward, 4 and 2 backward.

Few sequences leave most of the processor idle. They are then cut in time into segments that look like more sequences,
after a first walk (`segment_ends`, `segment_starts`) that only finds what each segment passes on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128  # channels of a block: one warpgroup, one channel a thread
ROWS = 32  # time steps of a stage
GROUP = 16  # rows loaded before the first of them is stored: a store may alias the loads behind it
STAGES = {"forward": 4, "backward": 3}  # copied ahead: 4 x 2 and 3 x 4 tiles of ROWS x LANES fit shared memory
BLOCKS = 128  # that keep an H200's 132 multiprocessors busy


def segments(batch: int, time: int, width: int) -> int:
    """How many pieces to cut time into: a power of two of whole stages that makes enough blocks."""
    count = 1
    while batch * width // LANES * count < BLOCKS and time % (2 * count * ROWS) == 0:
        count *= 2
    return count


def segment_ends(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array, keep_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(decay, end), both [B, D] in float32: a row that starts in state h ends in decay * h + end."""
    B, T, D = c_BTD.shape

    def segment_ends_walk(c_gmem, f_gmem, floor_gmem, keep_gmem, decay_gmem, end_gmem, smem):
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor = _lane_vector(floor_gmem.at[lanes])

        def stage(_, c_smem, f_smem, keep_smem, carry):
            decay, h = carry
            for r in range(ROWS):
                c, f, keep = c_smem[r].astype(jnp.float32), f_smem[r].astype(jnp.float32), keep_smem[r]
                factor = floor + (1 - floor) * _sigmoid(f)
                h = keep * factor * h + (1 - factor) * c * _sigmoid(c)
                decay = keep * factor * decay
            return decay, h

        walk = plgpu.emit_pipeline(
            stage,
            grid=(T // ROWS,),
            in_specs=[_tile(lambda t: (t, 0)), _tile(lambda t: (t, 0)), _scalars(lambda t: (t,))],
            max_concurrent_steps=STAGES["forward"],
            init_carry=(floor * 0.0 + 1.0, floor * 0.0),
        )
        smem[0], smem[1] = walk(c_gmem.at[b, :, lanes], f_gmem.at[b, :, lanes], keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[0], decay_gmem.at[b, lanes])
        plgpu.copy_smem_to_gmem(smem.at[1], end_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        segment_ends_walk,
        out_type=[jax.ShapeDtypeStruct((B, D), jnp.float32)] * 2,
        grid=(B, D // LANES),
        grid_names=("b", "d"),
        scratch_types=[plgpu.SMEM((2, LANES), jnp.float32)],
        compiler_params=_PARAMS(),
    )(c_BTD, f_BTD, floor_D, keep_BT)


def segment_starts(f_BTD: jax.Array, floor_D: jax.Array, keep_BT: jax.Array, dout_BTD: jax.Array) -> jax.Array:
    """Gradient [B, D] in float32 to the state before each row, if none comes from after it."""
    B, T, D = f_BTD.shape
    stages = T // ROWS

    def segment_starts_walk(f_gmem, floor_gmem, keep_gmem, dout_gmem, dstart_gmem, smem):
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor = _lane_vector(floor_gmem.at[lanes])

        def stage(_, f_smem, dout_smem, keep_smem, g):
            for r in reversed(range(ROWS)):
                factor = floor + (1 - floor) * _sigmoid(f_smem[r].astype(jnp.float32))
                g = (g + dout_smem[r].astype(jnp.float32)) * factor * keep_smem[r]
            return g

        back = lambda i: (stages - 1 - i, 0)
        walk = plgpu.emit_pipeline(
            stage,
            grid=(stages,),
            in_specs=[_tile(back), _tile(back), _scalars(lambda i: (stages - 1 - i,))],
            max_concurrent_steps=STAGES["forward"],
            init_carry=floor * 0.0,
        )
        smem[...] = walk(f_gmem.at[b, :, lanes], dout_gmem.at[b, :, lanes], keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, dstart_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        segment_starts_walk,
        out_type=jax.ShapeDtypeStruct((B, D), jnp.float32),
        grid=(B, D // LANES),
        grid_names=("b", "d"),
        scratch_types=[plgpu.SMEM((LANES,), jnp.float32)],
        compiler_params=_PARAMS(),
    )(f_BTD, floor_D, keep_BT, dout_BTD)


def forward(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array, h_BD: jax.Array, keep_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """States of h_t = keep_t F_t h_{t-1} + (1 - F_t) silu(c_t) with F_t = floor + (1 - floor) sigmoid(f_t).

    c_BTD, f_BTD: projections, bfloat16 or float32; floor_D, h_BD (initial state), keep_BT (0 where the state is
    forgotten, else 1): float32. Returns h_BTD in c's type and the last state [B, D] in float32.
    """
    B, T, D = c_BTD.shape

    def gated_recurrence(c_gmem, f_gmem, floor_gmem, h_gmem, keep_gmem, out_gmem, last_gmem, out_smem, last_smem):
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor = _lane_vector(floor_gmem.at[lanes])

        def stage(index, c_smem, f_smem, keep_smem, h):
            slot = lax.rem(index[0], 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for first in range(0, ROWS, GROUP):
                rows = range(first, first + GROUP)
                loaded = [(c_smem[r].astype(jnp.float32), f_smem[r].astype(jnp.float32), keep_smem[r]) for r in rows]
                for r, (c, f, keep) in zip(rows, loaded, strict=True):
                    factor = floor + (1 - floor) * _sigmoid(f)
                    h = keep * factor * h + (1 - factor) * c * _sigmoid(c)
                    out_smem[slot, r] = h.astype(out_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[slot], out_gmem.at[b, pl.ds(index[0] * ROWS, ROWS), lanes])
            return h

        walk = plgpu.emit_pipeline(
            stage,
            grid=(T // ROWS,),
            in_specs=[_tile(lambda t: (t, 0)), _tile(lambda t: (t, 0)), _scalars(lambda t: (t,))],
            max_concurrent_steps=STAGES["forward"],
            init_carry=_lane_vector(h_gmem.at[b, lanes]),
        )
        last_smem[...] = walk(c_gmem.at[b, :, lanes], f_gmem.at[b, :, lanes], keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(last_smem, last_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        gated_recurrence,
        out_type=[jax.ShapeDtypeStruct((B, T, D), c_BTD.dtype), jax.ShapeDtypeStruct((B, D), jnp.float32)],
        grid=(B, D // LANES),
        grid_names=("b", "d"),
        scratch_types={
            "out_smem": plgpu.SMEM((2, ROWS, LANES), c_BTD.dtype),
            "last_smem": plgpu.SMEM((LANES,), jnp.float32),
        },
        compiler_params=_PARAMS(),
    )(c_BTD, f_BTD, floor_D, h_BD, keep_BT)


def backward(
    c_BTD: jax.Array,
    f_BTD: jax.Array,
    floor_D: jax.Array,
    h_BD: jax.Array,
    keep_BT: jax.Array,
    out_BTD: jax.Array,
    dout_BTD: jax.Array,
    dlast_BD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` to c, f (in their type), floor [B, D] (one sum a sequence) and h_BD (both float32).

    out_BTD: what `forward` returned; dout_BTD, dlast_BD: gradients to its results.
    """
    B, T, D = c_BTD.shape
    stages = T // ROWS

    def gated_recurrence_backward(*refs):
        c_gmem, f_gmem, floor_gmem, h_gmem, keep_gmem, out_gmem, dout_gmem, dlast_gmem, *results = refs
        dc_gmem, df_gmem, dfloor_gmem, dh_gmem, dc_smem, df_smem, sums_smem = results
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor, initial = _lane_vector(floor_gmem.at[lanes]), _lane_vector(h_gmem.at[b, lanes])

        def stage(index, c_smem, f_smem, out_smem, dout_smem, keep_smem, carry):
            g, dfloor = carry
            slot, t = lax.rem(index[0], 2), stages - 1 - index[0]
            before = _lane_vector(out_gmem.at[b, jnp.maximum(t * ROWS - 1, 0), lanes]).astype(jnp.float32)
            before = jnp.where(t == 0, 1.0, 0.0) * (initial - before) + before
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for first in range(ROWS - GROUP, -1, -GROUP):
                rows = range(first, first + GROUP)
                loaded = [
                    (
                        c_smem[r].astype(jnp.float32),
                        f_smem[r].astype(jnp.float32),
                        out_smem[r - 1].astype(jnp.float32) if r else before,
                        dout_smem[r].astype(jnp.float32),
                        keep_smem[r],
                    )
                    for r in rows
                ]
                for r, (c, f, h_before, dout, keep) in reversed(list(zip(rows, loaded, strict=True))):
                    gate, open_c = _sigmoid(f), _sigmoid(c)
                    factor, g = floor + (1 - floor) * gate, g + dout
                    dfactor = g * (keep * h_before - c * open_c)
                    dc = g * (1 - factor) * open_c * (1 + c * (1 - open_c))
                    dc_smem[slot, r] = dc.astype(dc_smem.dtype)
                    df_smem[slot, r] = (dfactor * (1 - floor) * gate * (1 - gate)).astype(df_smem.dtype)
                    dfloor = dfloor + dfactor * (1 - gate)
                    g = g * factor * keep
            plgpu.commit_smem()
            here = pl.ds(t * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(dc_smem.at[slot], dc_gmem.at[b, here, lanes], commit_group=False)
            plgpu.copy_smem_to_gmem(df_smem.at[slot], df_gmem.at[b, here, lanes])
            return g, dfloor

        back = lambda i: (stages - 1 - i, 0)
        walk = plgpu.emit_pipeline(
            stage,
            grid=(stages,),
            in_specs=[_tile(back), _tile(back), _tile(back), _tile(back), _scalars(lambda i: (stages - 1 - i,))],
            max_concurrent_steps=STAGES["backward"],
            init_carry=(_lane_vector(dlast_gmem.at[b, lanes]), initial * 0.0),
        )
        whole = [ref.at[b, :, lanes] for ref in (c_gmem, f_gmem, out_gmem, dout_gmem)]
        sums_smem[0], sums_smem[1] = walk(*whole, keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_smem.at[0], dh_gmem.at[b, lanes])
        plgpu.copy_smem_to_gmem(sums_smem.at[1], dfloor_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    like = lambda a: jax.ShapeDtypeStruct((B, T, D), a.dtype)
    sums = jax.ShapeDtypeStruct((B, D), jnp.float32)
    return plgpu.kernel(
        gated_recurrence_backward,
        out_type=[like(c_BTD), like(f_BTD), sums, sums],
        grid=(B, D // LANES),
        grid_names=("b", "d"),
        scratch_types=[
            plgpu.SMEM((2, ROWS, LANES), c_BTD.dtype),
            plgpu.SMEM((2, ROWS, LANES), f_BTD.dtype),
            plgpu.SMEM((2, LANES), jnp.float32),
        ],
        compiler_params=_PARAMS(),
    )(c_BTD, f_BTD, floor_D, h_BD, keep_BT, out_BTD, dout_BTD, dlast_BD)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _lane_vector(ref: Any) -> jax.Array:
    """[LANES] from global memory, one element a thread."""
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # as of jax 0.11


def _tile(index: Any) -> Any:
    return plgpu.BlockSpec((ROWS, LANES), index, memory_space=plgpu.SMEM)


def _scalars(index: Any) -> Any:
    return plgpu.BlockSpec((ROWS,), index, memory_space=plgpu.SMEM)


# No automatic barriers: no shared memory here is both read and written by several threads between the explicit ones.
_PARAMS = functools.partial(
    plgpu.CompilerParams,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    approx_math=True,
    unsafe_no_auto_barriers=True,
)
