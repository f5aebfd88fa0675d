"""int8 x int8 product with both scales applied in registers (Pallas Mosaic GPU, Hopper's integer wgmma).

XLA writes the int32 product to memory and reads it back to scale it, which costs what the integer units save. Here a
block of 256 x 128 outputs is accumulated by two warpgroups while a third copies operands in ahead of them; the
accumulators are scaled, rounded to the output type and stored once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.ops.kernels.mosaic import spread

TILE_M, TILE_N, TILE_K = 128, 128, 128  # of one warpgroup; two of them share a block's columns
COMPUTE_GROUPS = 2
STAGES = 4  # operand tiles in flight: 4 x (32 + 16) KiB
PIECE = 64  # rows and columns of the output that are staged through shared memory at a time
SNAKE = 8  # blocks of rows visited before the columns advance: keeps both operands in the second-level cache


def supports(rows: int, inner: int, columns: int) -> bool:
    """Whether [rows, inner] x [columns, inner] falls into whole blocks."""
    return rows % (COMPUTE_GROUPS * TILE_M) == 0 and columns % TILE_N == 0 and inner % TILE_K == 0


@functools.partial(jax.jit, static_argnames="dtype")
def int8_matmul(
    x_MK: jax.Array, w_NK: jax.Array, x_scale_M: jax.Array, w_scale: jax.Array, dtype: Any = jnp.bfloat16
) -> jax.Array:
    """(x @ w.T) * x_scale * w_scale as `dtype` [M, N].

    x_MK, w_NK: int8, both with the summed axis last; the sum is exact. x_scale_M [M], w_scale [1] or [N]: float32.
    """
    (M, K), N = x_MK.shape, w_NK.shape[0]
    rows, columns = M // (COMPUTE_GROUPS * TILE_M), N // TILE_N
    swizzle = plgpu.find_swizzle(TILE_K * 8)
    operand = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    bits = jnp.dtype(dtype).itemsize * 8
    out_swizzle = plgpu.find_swizzle(PIECE * bits)
    staged = (plgpu.TilingTransform((8, out_swizzle * 8 // bits)), plgpu.SwizzleTransform(out_swizzle))

    def int8_product(x_gmem, w_gmem, x_scale_gmem, w_scale_gmem, out_gmem, out_smem):
        def pipeline(body, context):
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(K // TILE_K,),
                memory_registers=40,
                in_specs=[
                    _operand_tile((COMPUTE_GROUPS * TILE_M, TILE_K), operand),
                    _operand_tile((TILE_N, TILE_K), operand),
                ],
                wg_axis="group",
                num_compute_wgs=COMPUTE_GROUPS,
                max_concurrent_steps=STAGES,
                compute_context=context,
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
                at_m, at_n = pl.ds(m * COMPUTE_GROUPS * TILE_M, COMPUTE_GROUPS * TILE_M), pl.ds(n * TILE_N, TILE_N)

                def finish(accumulate):
                    @functools.partial(pl.run_scoped, sums=plgpu.ACC((TILE_M, TILE_N), jnp.int32))
                    def _(sums):
                        accumulate(sums)
                        scale = spread(x_scale_gmem.at[at_m].at[mine], (TILE_M, TILE_N), 0)
                        by = w_scale_gmem[0] if w_scale.size == 1 else spread(w_scale_gmem.at[at_n], scale.shape, 1)
                        values = (sums[...].astype(jnp.float32) * (scale * by)).astype(dtype)
                        store(values, out_smem.at[group], out_gmem.at[at_m, at_n].at[mine])

                def step(_, x_smem, w_smem, sums):
                    plgpu.wgmma(sums, x_smem.at[mine], w_smem.T)
                    plgpu.wgmma_wait(0)
                    return sums

                pipeline(step, finish)(x_gmem.at[at_m, :], w_gmem.at[at_n, :], allocations=allocations)

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
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(_cores(),),
        grid_names=("core",),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="group",
        scratch_types={"out_smem": plgpu.SMEM((COMPUTE_GROUPS, 2, PIECE, PIECE), dtype, transforms=staged)},
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(x_MK, w_NK, x_scale_M, w_scale)


def _operand_tile(shape: tuple[int, int], transforms: tuple) -> Any:
    return plgpu.BlockSpec(shape, lambda k: (0, k), transforms=transforms, memory_space=plgpu.SMEM)


def _cores() -> int:
    """Streaming multiprocessors of the device: one block stays on each."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract is not None and abstract.num_cores else jax.devices()[0].core_count
