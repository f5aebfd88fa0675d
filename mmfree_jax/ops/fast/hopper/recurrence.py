"""The linear recurrence in one pass over time, forward and backward, with the MLGRU's gates or without them (Pallas
Mosaic GPU).

With a floor, c and f are projections and a step is h = keep F h + (1 - F) silu(c), F = floor + (1 - floor) sigmoid(f).
Without one (None) they are input and factor themselves: h = keep f h + c.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.ops.fast.hopper.mosaic import SHARED_BYTES, STREAMING, sigmoid

# A block owns 128 channels of one sequence and walks through time, ROWS steps a stage; stages are copied in ahead of
# their use by the tensor memory accelerator, so that the walk is bound by memory bandwidth, not by its latency. Gates
# are computed from the projections in registers and again in the backward pass: neither they nor the factors ever reach
# memory, and the carry stays float32. Reads 2 and writes 1 element a step forward; 4 (3 without gates) and 2 backward.
#
# Few sequences leave most of the processor idle. They are then cut in time into segments that look like more sequences,
# after a first walk (`segment_ends`, `segment_starts`) that only finds what each segment passes on.

# The recurrence is a loop over time in which nothing can be reordered, but channels are independent: one thread takes
# one channel, and 128 of them one warpgroup. A step is two floating-point operations, so all that counts is that the
# next values are there when they are needed. Hence the pipeline: while a stage of 32 steps is computed out of shared
# memory, the copy engine has the next two to four stages on the way. The backward pass walks the other way and meets
# the states that the forward pass wrote; the gates it computes again from the projections, which is cheaper than
# reading them.
#
# One sequence of 2,048 channels is 16 blocks, and the GPU has 132 multiprocessors. As a step is linear in the state, h
# -> decay * h + end describes any segment of time: a first walk finds (decay, end) of every segment at the same time, a
# few operations on [B, D] chain them, and then all segments are walked at once, each from its right state.

LANES = 128  # channels of a block: one warpgroup, one channel a thread
ROWS = 32  # time steps of a stage
TILE = ROWS, LANES  # steps and channels that arrays have to be whole multiples of
GROUP = 16  # rows loaded before the first of them is stored: a store may alias the loads behind it
STAGES = {2: 4, 3: 3, 4: 3}  # copied ahead at most, by how many arrays
BLOCKS = 128  # that keep an H200's 132 multiprocessors busy


def segments(batch: int, time: int, width: int) -> int:
    """How many pieces to cut time into: a power of two of whole stages that makes enough blocks."""
    count = 1
    while batch * width // LANES * count < BLOCKS and time % (2 * count * ROWS) == 0:
        count *= 2
    return count


def copied_ahead(arrays: int, dtype: Any) -> int:
    """How many stages of so many arrays are copied ahead: what shared memory has room for beside two tiles of each of
    two results, at most STAGES."""
    tiles = SHARED_BYTES // (ROWS * LANES * dtype.itemsize) - 4
    return min(STAGES[arrays], tiles // arrays)


@jax.jit
def segment_ends(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None, keep_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(decay, end), both [B, D] in float32: a row that starts in state h ends in decay * h + end."""
    B, T, D = c_BTD.shape

    def segment_ends_walk(c_gmem, f_gmem, *refs):
        *floor_gmem, keep_gmem, decay_gmem, end_gmem, smem = refs
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor = _floor(floor_gmem, lanes)

        def stage(_, c_smem, f_smem, keep_smem, carry):
            decay, h = carry
            for r in range(ROWS):
                factor, x = _step(c_smem[r].astype(jnp.float32), f_smem[r].astype(jnp.float32), floor)
                h = keep_smem[r] * factor * h + x
                decay = keep_smem[r] * factor * decay
            plgpu.commit_smem()  # all threads have read the buffers that the next copy overwrites
            return decay, h

        walk = _pipeline(stage, T, 2, c_BTD.dtype, lambda t: t, (_zeros() + 1.0, _zeros()))
        smem[0], smem[1] = walk(c_gmem.at[b, :, lanes], f_gmem.at[b, :, lanes], keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[0], decay_gmem.at[b, lanes])
        plgpu.copy_smem_to_gmem(smem.at[1], end_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    operands = [a for a in (c_BTD, f_BTD, floor_D, keep_BT) if a is not None]
    sums = [jax.ShapeDtypeStruct((B, D), jnp.float32)] * 2
    return _kernel(segment_ends_walk, sums, (B, D), [plgpu.SMEM((2, LANES), jnp.float32)])(*operands)


@jax.jit
def segment_starts(f_BTD: jax.Array, floor_D: jax.Array | None, keep_BT: jax.Array, dout_BTD: jax.Array) -> jax.Array:
    """Gradient [B, D] in float32 to the state before each row, if none comes from after it."""
    B, T, D = f_BTD.shape
    stages = T // ROWS

    def segment_starts_walk(f_gmem, *refs):
        *floor_gmem, keep_gmem, dout_gmem, dstart_gmem, smem = refs
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor = _floor(floor_gmem, lanes)

        def stage(_, f_smem, dout_smem, keep_smem, g):
            for r in reversed(range(ROWS)):
                factor = _factor(f_smem[r].astype(jnp.float32), floor)
                g = (g + dout_smem[r].astype(jnp.float32)) * factor * keep_smem[r]
            plgpu.commit_smem()  # all threads have read the buffers that the next copy overwrites
            return g

        walk = _pipeline(stage, T, 2, f_BTD.dtype, lambda i: stages - 1 - i, _zeros())
        smem[...] = walk(f_gmem.at[b, :, lanes], dout_gmem.at[b, :, lanes], keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, dstart_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    operands = [a for a in (f_BTD, floor_D, keep_BT, dout_BTD) if a is not None]
    sums = jax.ShapeDtypeStruct((B, D), jnp.float32)
    return _kernel(segment_starts_walk, sums, (B, D), [plgpu.SMEM((LANES,), jnp.float32)])(*operands)


@jax.jit
def forward(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None, h_BD: jax.Array, keep_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All states, and the last one.

    c_BTD, f_BTD: bfloat16 or float32; floor_D, h_BD (initial state), keep_BT (0 where the state is forgotten, else 1):
    float32. Returns h_BTD in c's type and the last state [B, D] in float32.
    """
    B, T, D = c_BTD.shape

    def recurrence(c_gmem, f_gmem, *refs):
        *floor_gmem, h_gmem, keep_gmem, out_gmem, last_gmem, out_smem, last_smem = refs
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor = _floor(floor_gmem, lanes)

        def stage(index, c_smem, f_smem, keep_smem, h):
            slot = lax.rem(index[0], 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            def group(i, h):
                rows = [i * GROUP + r for r in range(GROUP)]
                loaded = [(c_smem[r].astype(jnp.float32), f_smem[r].astype(jnp.float32), keep_smem[r]) for r in rows]
                for r, (c, f, keep) in zip(rows, loaded, strict=True):
                    factor, x = _step(c, f, floor)
                    h = keep * factor * h + x
                    out_smem[slot, r] = h.astype(out_smem.dtype)
                return h

            h = lax.fori_loop(0, ROWS // GROUP, group, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[slot], out_gmem.at[b, pl.ds(index[0] * ROWS, ROWS), lanes])
            return h

        walk = _pipeline(stage, T, 2, c_BTD.dtype, lambda t: t, _lane_vector(h_gmem.at[b, lanes]))
        last_smem[...] = walk(c_gmem.at[b, :, lanes], f_gmem.at[b, :, lanes], keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(last_smem, last_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    operands = [a for a in (c_BTD, f_BTD, floor_D, h_BD, keep_BT) if a is not None]
    results = [jax.ShapeDtypeStruct((B, T, D), c_BTD.dtype), jax.ShapeDtypeStruct((B, D), jnp.float32)]
    scratch = [plgpu.SMEM((2, ROWS, LANES), c_BTD.dtype), plgpu.SMEM((LANES,), jnp.float32)]
    return _kernel(recurrence, results, (B, D), scratch)(*operands)


@jax.jit
def backward(
    c_BTD: jax.Array | None,
    f_BTD: jax.Array,
    floor_D: jax.Array | None,
    h_BD: jax.Array,
    keep_BT: jax.Array,
    out_BTD: jax.Array,
    dout_BTD: jax.Array,
    dlast_BD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` to c, f (in f's type), floor [B, D] (one sum a sequence) and h_BD (both float32).

    out_BTD: what `forward` returned; dout_BTD, dlast_BD: gradients to its results. Without a floor the gradients need
    no c, and that to the floor is zero.
    """
    B, T, D = f_BTD.shape
    stages = T // ROWS
    streams = [a for a in (c_BTD if floor_D is not None else None, f_BTD, out_BTD, dout_BTD) if a is not None]

    def recurrence_backward(*refs):
        stream_gmem, (*floor_gmem, h_gmem, keep_gmem, dlast_gmem) = refs[: len(streams)], refs[len(streams) : -7]
        dc_gmem, df_gmem, dfloor_gmem, dh_gmem, dc_smem, df_smem, sums_smem = refs[-7:]
        out_gmem = stream_gmem[-2]
        b, lanes = lax.axis_index("b"), pl.ds(lax.axis_index("d") * LANES, LANES)
        floor, initial = _floor(floor_gmem, lanes), _lane_vector(h_gmem.at[b, lanes])

        def stage(index, *smem_and_carry):
            *c_smem, f_smem, out_smem, dout_smem, keep_smem, (g, dfloor) = smem_and_carry
            slot, t = lax.rem(index[0], 2), stages - 1 - index[0]
            before = _lane_vector(out_gmem.at[b, jnp.maximum(t * ROWS - 1, 0), lanes]).astype(jnp.float32)
            before = jnp.where(t == 0, 1.0, 0.0) * (initial - before) + before
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            def group(i, carry):
                (g, dfloor), first = carry, ROWS - (i + 1) * GROUP
                rows = [first + r for r in range(GROUP)]
                loaded = [
                    (
                        [ref[r].astype(jnp.float32) for ref in c_smem],
                        f_smem[r].astype(jnp.float32),
                        dout_smem[r].astype(jnp.float32),
                        keep_smem[r],
                    )
                    for r in rows
                ]
                # The state before the first row of a stage is not in it.
                earlier = out_smem[jnp.maximum(first - 1, 0)].astype(jnp.float32)
                earlier = jnp.where(first == 0, 1.0, 0.0) * (before - earlier) + earlier
                states = [earlier, *(out_smem[r].astype(jnp.float32) for r in rows[:-1])]
                for r, h_before, (c, f, dout, keep) in reversed(list(zip(rows, states, loaded, strict=True))):
                    g = g + dout
                    dc, df, more, factor = _step_backward(c, f, floor, keep * h_before, g)
                    dc_smem[slot, r] = dc.astype(dc_smem.dtype)
                    df_smem[slot, r] = df.astype(df_smem.dtype)
                    dfloor = dfloor + more
                    g = g * factor * keep
                return g, dfloor

            g, dfloor = lax.fori_loop(0, ROWS // GROUP, group, (g, dfloor))
            plgpu.commit_smem()
            here = pl.ds(t * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(dc_smem.at[slot], dc_gmem.at[b, here, lanes], commit_group=False)
            plgpu.copy_smem_to_gmem(df_smem.at[slot], df_gmem.at[b, here, lanes])
            return g, dfloor

        start = _lane_vector(dlast_gmem.at[b, lanes]), _zeros()
        walk = _pipeline(stage, T, len(streams), f_BTD.dtype, lambda i: stages - 1 - i, start)
        sums_smem[0], sums_smem[1] = walk(*(ref.at[b, :, lanes] for ref in stream_gmem), keep_gmem.at[b])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_smem.at[0], dh_gmem.at[b, lanes])
        plgpu.copy_smem_to_gmem(sums_smem.at[1], dfloor_gmem.at[b, lanes])
        plgpu.wait_smem_to_gmem(0)

    operands = [*streams, *([] if floor_D is None else [floor_D]), h_BD, keep_BT, dlast_BD]
    steps, sums = jax.ShapeDtypeStruct((B, T, D), f_BTD.dtype), jax.ShapeDtypeStruct((B, D), jnp.float32)
    tile = plgpu.SMEM((2, ROWS, LANES), f_BTD.dtype)
    scratch = [tile, tile, plgpu.SMEM((2, LANES), jnp.float32)]
    return _kernel(recurrence_backward, [steps, steps, sums, sums], (B, D), scratch)(*operands)


def _factor(f: jax.Array, floor: jax.Array | None) -> jax.Array:
    """On the state."""
    return f if floor is None else floor + (1 - floor) * sigmoid(f)


def _step(c: jax.Array, f: jax.Array, floor: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The factor on the state, and what is added to it."""
    factor = _factor(f, floor)
    return factor, c if floor is None else (1 - factor) * c * sigmoid(c)


def _step_backward(c: list, f: jax.Array, floor: jax.Array | None, h_before: jax.Array, g: jax.Array) -> tuple:
    """Gradients to c, f and floor of a step from state `h_before`, from that to the state after it; and the factor."""
    if floor is None:
        return g, g * h_before, 0.0, f
    gate, open_c = sigmoid(f), sigmoid(c[0])
    factor, dfactor = floor + (1 - floor) * gate, g * (h_before - c[0] * open_c)
    dc = g * (1 - factor) * open_c * (1 + c[0] * (1 - open_c))
    return dc, dfactor * (1 - floor) * gate * (1 - gate), dfactor * (1 - gate), factor


def _floor(refs: list, lanes: Any) -> jax.Array | None:
    return _lane_vector(refs[0].at[lanes]) if refs else None


def _zeros() -> jax.Array:
    """[LANES] in float32, laid out as the carry."""
    return plgpu.layout_cast(jnp.zeros(LANES, jnp.float32), _one_a_thread())


def _lane_vector(ref: Any) -> jax.Array:
    """[LANES] from global memory."""
    return plgpu.load(ref, layout=_one_a_thread(), optimized=False)  # type: ignore[call-arg]  # as of jax 0.11


def _one_a_thread() -> Any:
    return plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def _pipeline(stage: Any, time: int, arrays: int, dtype: Any, at: Any, start: Any) -> Any:
    """Walks over `arrays` [T, LANES] and the scalars [T] in stages; stage i sees the piece at(i)."""
    tile = plgpu.BlockSpec((ROWS, LANES), lambda i: (at(i), 0), memory_space=plgpu.SMEM)
    scalars = plgpu.BlockSpec((ROWS,), lambda i: (at(i),), memory_space=plgpu.SMEM)
    return plgpu.emit_pipeline(
        stage,
        grid=(time // ROWS,),
        in_specs=[tile] * arrays + [scalars],
        max_concurrent_steps=copied_ahead(arrays, dtype),
        init_carry=start,
    )


def _kernel(body: Any, results: Any, size: tuple[int, int], scratch: list) -> Any:
    """A block for every sequence and LANES channels of [B, D]."""
    return plgpu.kernel(
        body,
        out_type=results,
        grid=(size[0], size[1] // LANES),
        grid_names=("b", "d"),
        scratch_types=scratch,
        compiler_params=STREAMING(),
    )
