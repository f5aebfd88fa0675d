"""int8 x int8 product with both scales applied in registers (Pallas Mosaic GPU, Hopper's integer wgmma)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.ops.fast.hopper.mosaic import broadcast

# XLA writes the int32 product to memory and reads it back to scale it, which costs what the integer units save. Here a
# block of 256 x 128 outputs is accumulated by two warpgroups while a third copies operands in ahead of them; the
# accumulators are scaled, rounded to the output type and stored once. Two neighbours share their rows: each copies half
# of them for both, so that a third less is read from the second-level cache. Copying goes on across outputs: while one
# is stored, operands of the next come in.

# Three warpgroups share a block, and each has one job. The first two multiply: each has 128 x 128 sums of int32 in its
# registers and feeds the tensor cores from shared memory, K in steps of 128. The third only asks the copy engine for
# operands, four steps ahead. A block stays on its multiprocessor and goes from output to output in a snake over the
# result, so that the rows and columns which its neighbours read at the same time are still in the second-level cache.
# At the end of an output the sums are multiplied by both scales in registers, rounded to bfloat16, and leave through
# two small buffers of shared memory in turn, while the third warpgroup is already copying for the next output.

TILE_M, TILE_N, TILE_K = 128, 128, 128  # of one warpgroup; two of them share a block's columns
COMPUTE_GROUPS = 2
STAGES = 4  # operand tiles in flight: 4 x (32 + 16) KiB
PAIR = 2  # blocks beside each other that share their rows, where the columns divide so
PIECE = 64  # rows and columns of the output that are staged through shared memory at a time
SNAKE = 8  # blocks of rows visited before the columns advance: keeps both operands in the second-level cache


def supports(rows: int, inner: int, columns: int) -> bool:
    """Whether [rows, inner] x [columns, inner] consists of whole blocks."""
    return rows % (COMPUTE_GROUPS * TILE_M) == 0 and columns % TILE_N == 0 and inner % TILE_K == 0


@jax.jit
def int8_matmul(x_MK: jax.Array, w_NK: jax.Array, x_scale_M: jax.Array, w_scale: jax.Array) -> jax.Array:
    """Compute (x @ w.T) * x_scale * w_scale in bfloat16 [M, N].

    x_MK, w_NK: int8, both with the summed axis last; the sum is exact. x_scale_M [M], w_scale [1] or [N]: float32.
    """
    (M, K), N = x_MK.shape, w_NK.shape[0]
    pair = PAIR if N % (PAIR * TILE_N) == 0 else 1
    sharing = ("pair",) if pair > 1 else ()
    rows, columns, steps = M // (COMPUTE_GROUPS * TILE_M), N // (pair * TILE_N), K // TILE_K
    cores = _cores() // pair
    # Copies can run ahead into the next output where the first and the last of a core's outputs are not the same, and
    # where an output ends in the last of the buffers.
    ahead = rows * columns >= 2 * cores and steps % STAGES == 0
    swizzle = plgpu.find_swizzle(TILE_K * 8)
    operand = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    out_swizzle = plgpu.find_swizzle(PIECE * 16)
    staged = (plgpu.TilingTransform((8, out_swizzle // 2)), plgpu.SwizzleTransform(out_swizzle))

    def int8_product(x_gmem, w_gmem, x_scale_gmem, w_scale_gmem, out_gmem, out_smem):
        def pipeline(body, context, state=None):
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(steps,),
                memory_registers=40,
                in_specs=[
                    _operand_tile((COMPUTE_GROUPS * TILE_M, TILE_K), operand, sharing),
                    _operand_tile((TILE_N, TILE_K), operand),
                ],
                wg_axis="group",
                num_compute_wgs=COMPUTE_GROUPS,
                max_concurrent_steps=STAGES,
                compute_context=context,
                pipeline_state=state,
            )

        unused = lambda *_, **__: None
        buffers = pipeline(unused, unused).get_allocations(x_gmem, w_gmem)

        @functools.partial(pl.run_scoped, allocations=buffers, collective_axes="group")
        def _(allocations):
            group = lax.axis_index("group")
            mine = pl.ds(group * TILE_M, TILE_M)

            @plgpu.nd_loop((rows * columns,), collective_axes="core")
            def _(loop):
                m, n = plgpu.planar_snake(loop.index[0], (rows, columns), 1, SNAKE)
                n = n * pair + (lax.axis_index("pair") if sharing else 0)
                at_m, at_n = pl.ds(m * COMPUTE_GROUPS * TILE_M, COMPUTE_GROUPS * TILE_M), pl.ds(n * TILE_N, TILE_N)

                def finish(accumulate):
                    @functools.partial(pl.run_scoped, sums=plgpu.ACC((TILE_M, TILE_N), jnp.int32))
                    def _(sums):
                        accumulate(sums)
                        scale = broadcast(x_scale_gmem.at[at_m].at[mine], (TILE_M, TILE_N), 0)
                        by_column = w_scale.size > 1
                        scale *= broadcast(w_scale_gmem.at[at_n], scale.shape, 1) if by_column else w_scale_gmem[0]
                        values = (sums[...].astype(jnp.float32) * scale).astype(jnp.bfloat16)
                        store(values, out_smem.at[group], out_gmem.at[at_m, at_n].at[mine])

                def step(_, x_smem, w_smem, sums):
                    plgpu.wgmma(sums, x_smem.at[mine], w_smem.T)
                    plgpu.wgmma_wait(0)
                    return sums

                state = _place(loop.local_index, loop.num_local_steps) if ahead else None
                pipeline(step, finish, state)(x_gmem.at[at_m, :], w_gmem.at[at_n, :], allocations=allocations)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store(values, smem, gmem):
        """Pieces through two alternating buffers: one is written while the other is on its way out."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(TILE_M // PIECE):
            for j in range(TILE_N // PIECE):
                slot = (i * (TILE_N // PIECE) + j) % 2
                piece = slice(i * PIECE, (i + 1) * PIECE), slice(j * PIECE, (j + 1) * PIECE)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                smem[slot] = values[piece]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem.at[slot], gmem.at[piece])

    return plgpu.kernel(
        int8_product,
        out_type=jax.ShapeDtypeStruct((M, N), jnp.bfloat16),
        grid=(cores,),
        grid_names=("core",),
        cluster=(pair,) if sharing else (),
        cluster_names=sharing,
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="group",
        scratch_types={"out_smem": plgpu.SMEM((COMPUTE_GROUPS, 2, PIECE, PIECE), jnp.bfloat16, transforms=staged)},
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
    )(x_MK, w_NK, x_scale_M, w_scale)


def _operand_tile(shape: tuple[int, int], transforms: tuple, shared_by: tuple[str, ...] = ()) -> Any:
    place = lambda k: (0, k)
    return plgpu.BlockSpec(shape, place, transforms=transforms, memory_space=plgpu.SMEM, collective_axes=shared_by)


def _place(index: jax.Array, count: jax.Array) -> jax.Array:
    """Of an output among those of its core: the first, one between, or the last."""
    first, between, last = plgpu.PipelinePipeline
    return jnp.where(index == 0, first, jnp.where(index + 1 == count, last, between)).astype(jnp.int32)


def _cores() -> int:
    """Streaming multiprocessors of the device: one block stays on each."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract is not None and abstract.num_cores else jax.devices()[0].core_count
