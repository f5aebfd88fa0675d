"""int8 codes [M, D] as [D, M], on the way brought to one scale a column (Pallas Mosaic GPU, Hopper)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.ops.fast.hopper.mosaic import STREAMING, broadcast
from mmfree_jax.ops.fast.ternary import dither_phases, round_with_dither

# Hopper's integer units sum along the last axis of both operands; the gradient to weights sums over tokens, the first
# axis of both. A tile is transposed by those units themselves: its product with an identity is exact, and they leave
# each value in the register from which its place in the other order is written. XLA's transpositions of bytes reach a
# third of the memory's bandwidth.

# Why a product: each thread of a warpgroup holds scattered values of a tile, and moving bytes between threads goes
# through shared memory, a byte at a time. The tensor cores read a tile of shared memory in either order at full speed,
# and multiplying it by the identity changes nothing but the place of its values. Scaling and rounding to one scale a
# column then happen in registers, on int32 sums that are the codes.

TILE = 128  # rows and columns transposed at a time, by one warpgroup
HALF = 64  # columns in registers at a time: three or four blocks then share a multiprocessor's
STAGES = 2  # copied ahead
RESIDENT = {"plain": 396, "scaled": 528}  # blocks at a time: three and four for each of an H200's 132 multiprocessors


def supports(rows: int, columns: int) -> bool:
    """Whether [rows, columns] consists of whole tiles."""
    return rows % TILE == 0 and columns % TILE == 0


@jax.jit
def transpose(
    codes_MD: jax.Array, row_factors_M: jax.Array | None = None, scale_D: jax.Array | None = None
) -> jax.Array:
    """Transpose int8 codes to [D, M]; with float32 factors, codes * row_factors_M / scale_D, rounded with dither."""
    M, D = codes_MD.shape
    columns, tiles = D // TILE, M // TILE
    # Blocks walk down a column of tiles, in whole waves of blocks and with few starts, which take the time of a tile.
    resident = RESIDENT["plain" if row_factors_M is None else "scaled"]
    rounds = lambda n: -(-n * columns // resident) * (tiles // n + 1)
    walks = min((n for n in range(1, tiles + 1) if tiles % n == 0), key=rounds)
    swizzle = plgpu.find_swizzle(TILE * 8)
    tiled = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    vectors: list[jax.Array] = []
    if row_factors_M is not None and scale_D is not None:
        by_row, by_column = dither_phases(M, D)
        vectors = [row_factors_M, 1 / scale_D, by_row, by_column]

    def transpose_codes(codes_gmem, identity_gmem, *refs):
        *vector_gmem, out_gmem, identity_smem, out_smem, arrived = refs
        at_d = pl.ds(lax.axis_index("column") * TILE, TILE)
        first = lax.axis_index("walk") * (tiles // walks)
        plgpu.copy_gmem_to_smem(identity_gmem, identity_smem, arrived)
        plgpu.barrier_wait(arrived)
        halves = [pl.ds(half * HALF, HALF) for half in range(TILE // HALF)]
        down = [[broadcast(ref.at[at_d].at[half], (HALF, TILE), 0) for ref in vector_gmem[1::2]] for half in halves]

        def stage(index, codes_smem, *across_smem):
            at_m = pl.ds((first + index[0]) * TILE, TILE)
            across = [broadcast(ref, (HALF, TILE), 1) for ref in across_smem]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for half, of_columns in zip(halves, down, strict=True):

                @functools.partial(pl.run_scoped, tile=plgpu.ACC((HALF, TILE), jnp.int32))
                def _(tile, half=half, of_columns=of_columns):
                    plgpu.wgmma(tile, identity_smem.at[half], codes_smem.T)
                    plgpu.wgmma_wait(0)
                    values = tile[...]
                    if vectors:
                        (factor, row), (scale, column) = across, of_columns
                        values = round_with_dither(values.astype(jnp.float32) * factor * scale, row + column)
                    out_smem[half] = values.astype(jnp.int8)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[at_d, at_m])

        tile = plgpu.BlockSpec((TILE, TILE), lambda i: (first + i, 0), transforms=tiled, memory_space=plgpu.SMEM)
        of_rows = plgpu.BlockSpec((TILE,), lambda i: (first + i,), memory_space=plgpu.SMEM)
        steps, across_gmem = tiles // walks, vector_gmem[::2]
        plgpu.emit_pipeline(
            stage,
            grid=(steps,),
            in_specs=[tile] + [of_rows] * len(across_gmem),
            max_concurrent_steps=min(STAGES, steps),
        )(codes_gmem.at[:, at_d], *across_gmem)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        transpose_codes,
        out_type=jax.ShapeDtypeStruct((D, M), jnp.int8),
        grid=(walks, columns),
        grid_names=("walk", "column"),
        scratch_types=[
            plgpu.SMEM((TILE, TILE), jnp.int8, transforms=tiled),
            plgpu.SMEM((TILE, TILE), jnp.int8, transforms=tiled),
            plgpu.Barrier(),
        ],
        compiler_params=STREAMING(),
    )(codes_MD, jnp.eye(TILE, dtype=jnp.int8), *vectors)
