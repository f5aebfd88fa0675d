"""Dense layers for the few rows of a decoding step (Pallas Triton, Hopper): norm or gated unit, and G products.

The Transformer++ decodes with it, so that the packed model is compared with a baseline at its best.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.fast.hopper import few_rows
from mmfree_jax.ops.fast.hopper.few_rows import Row, masked_load
from mmfree_jax.ops.fast.origin import Kind

WARPS = 8
BLOCKS = 2  # on a multiprocessor
VALUES = 48  # of the row of activations that a thread holds, at most
TILE_BYTES = 3 * 2**13  # of the columns that are multiplied at a time, at most
MOST_COLUMNS = 8  # of a tile
BYTES_AHEAD = 2**15  # of weights that a block has asked for before it needs them


def supports(rows: int, width: int, columns: int) -> bool:
    """Whether `dense_product` takes these sizes."""
    return 1 <= rows <= few_rows.MOST_ROWS and width % 64 == 0 and columns % MOST_COLUMNS == 0


@functools.partial(jax.jit, static_argnames=("kind", "eps", "factor"))
def dense_product(
    kind: Kind,
    sources: list[jax.Array],
    source_gain: jax.Array | None,
    weights: list[jax.Array],
    eps: float,
    addend: jax.Array | None = None,
    factor: float = 1.0,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Multiply a few rows by G dense matrices, from the sources of their input.

    weights: the matrices, [N, K] each: a column of the result in each row. The other arguments and the results are
    those of `packed_product.normed_product`.
    """
    (M, K), N, G, dtype = sources[0].shape, weights[0].shape[0], len(weights), sources[0].dtype
    width = _columns(K * weights[0].dtype.itemsize)
    tiles = few_rows.tiles_of_a_block(N // width, G * M, BLOCKS)
    optional = [a for a in (addend, source_gain) if a is not None]

    def kernel(*refs):
        taken = iter(refs)
        source_refs = [next(taken) for _ in sources]
        addend_ref = next(taken) if addend is not None else None
        inner_ref = next(taken) if source_gain is not None else None
        weights_refs, y_refs = [next(taken) for _ in range(G)], [next(taken) for _ in range(G)]
        block, m, own = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        writes = (block == 0) & (own == 0)
        row = Row(kind, m, source_refs, inner_ref, addend_ref, factor, next(taken, None), writes)
        for g in range(G):
            product = functools.partial(_product, row, weights_refs[g], y_refs[g], block * tiles, tiles, width, eps)
            pl.when(own == g)(product) if G > 1 else product()

    shapes = [jax.ShapeDtypeStruct((M, N), dtype)] * G + [jax.ShapeDtypeStruct((M, K), dtype)] * (addend is not None)
    call = pl.pallas_call(
        kernel,
        grid=(-(-N // (width * tiles)), M, G),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=few_rows.INTERPRET,
        name="dense_product",
    )
    found = call(*sources, *optional, *weights)
    return list(found[:G]), found[G] if addend is not None else None


def _product(row: Row, weights_ref, y_ref, first: Any, count: int, width: int, eps: float) -> None:
    """One block: `count` tiles of `width` columns, from tile `first` on, of one row of one product."""
    N, K = weights_ref.shape
    chunk = _chunk(K)
    starts = range(0, K, chunk)

    def load(tile: Any) -> list[jax.Array]:
        column, inside = few_rows.columns_of(first, tile, count, width, N)
        whole = jnp.broadcast_to(inside[:, None], (width, chunk))
        masks = [whole if start + chunk <= K else whole & (start + jnp.arange(chunk) < K)[None] for start in starts]
        at = [weights_ref.at[column[:, None], start + jnp.arange(chunk)[None]] for start in starts]
        return [masked_load(*one) for one in zip(at, masks, strict=True)]

    def multiply(chunks: list[jax.Array]) -> jax.Array:
        products = [v[None] * weights.astype(jnp.float32) for v, weights in zip(values, chunks, strict=True)]
        return jnp.sum(sum(products[1:], products[0]), axis=1)

    size = width * K * weights_ref.dtype.itemsize
    ahead = [load(tile) for tile in range(few_rows.tiles_ahead(count, size, BYTES_AHEAD))]
    values: list[jax.Array] = []
    squares = jnp.zeros(chunk, jnp.float32)
    for start in starts:
        place = start + jnp.arange(chunk)
        v, x = row.read(place, None if start + chunk <= K else place < K)
        values.append(v)
        squares += x * x
    # The factor of a norm is one of the whole row, so it may as well be one of the result.
    scale = lax.rsqrt(jnp.sum(squares) / K + eps) if row.has_norm else 1.0
    y = few_rows.pipelined(count, ahead, load, multiply) * scale
    column, inside = few_rows.all_columns(first, count, width, N)
    plt.store(y_ref.at[row.number, column], y.astype(y_ref.dtype), mask=inside)


def _chunk(width: int) -> int:
    """Values of a row of weights that are multiplied at a time, 8 a thread: the fewer, the more warps have columns of
    their own and add up fewer parts of them, but the more of the row of activations each thread holds."""
    chunk = 8 * 32
    while chunk < 8 * 32 * WARPS and 8 * width > VALUES * chunk:
        chunk *= 2
    return min(chunk, pl.next_power_of_2(width))


def _columns(size: int) -> int:
    """Columns of a tile, of `size` bytes each: a power of two."""
    columns = 1
    while columns < MOST_COLUMNS and 2 * columns * size <= TILE_BYTES:
        columns *= 2
    return columns
