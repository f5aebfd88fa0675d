"""Dense layers for the few rows of a decoding step (Pallas Triton, Hopper): norm or gated unit, and G products.

The Transformer++ decodes with it, so that the packed model is compared with a baseline at its best.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.fast.hopper import few_rows
from mmfree_jax.ops.fast.hopper.few_rows import Row
from mmfree_jax.ops.fast.origin import Kind

TILE_ROWS = 64  # rows of weights in a tile
AHEAD = 16  # tiles on their way: 64 KiB a block, for what few blocks read has to be there when it is needed


def supports(rows: int, width: int, columns: int) -> bool:
    """Whether `dense_product` takes these sizes."""
    return 1 <= rows <= few_rows.MOST_ROWS and width % TILE_ROWS == 0 and columns % 32 == 0


@functools.partial(jax.jit, static_argnames=("kind", "eps", "factor"))
def dense_product(
    kind: Kind,
    sources: list[jax.Array],
    source_gain: jax.Array | None,
    weights_GKN: jax.Array,
    eps: float,
    addend: jax.Array | None = None,
    factor: float = 1.0,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Multiply a few rows by G dense matrices, from the sources of their input.

    weights_GKN: the matrices. The other arguments and the results are those of `packed_product.normed_product`.

    A norm needs no pass of its own here: its factor is a factor of the result.
    """
    (M, K), (G, _, N), dtype = sources[0].shape, weights_GKN.shape, sources[0].dtype
    columns = 64 if N % 64 == 0 and G * N >= 64 * few_rows.BLOCKS else 32
    steps = K // TILE_ROWS
    unrolled = next(count for count in range(AHEAD, 0, -1) if steps % count == 0)
    optional = [a for a in (addend, source_gain) if a is not None]

    def kernel(*refs):
        taken = iter(refs)
        source_refs = [next(taken) for _ in sources]
        addend_ref = next(taken) if addend is not None else None
        inner_ref = next(taken) if source_gain is not None else None
        weights_ref, y_refs = next(taken), [next(taken) for _ in range(G)]
        sum_ref = next(taken, None)
        first, m, g = pl.program_id(0) * columns, pl.program_id(1), pl.program_id(2)
        column = first + jnp.arange(columns)

        row = Row(kind, m, source_refs, inner_ref, addend_ref, factor, sum_ref, (first == 0) & (g == 0))

        def step(i, carry):
            total, squares = carry
            places = [(i * unrolled + part) * TILE_ROWS + jnp.arange(TILE_ROWS) for part in range(unrolled)]
            # All tiles first: the exchange of values between threads is a barrier that no later load passes.
            tiles = [plt.load(weights_ref.at[g, place[:, None], column[None]]) for place in places]
            for place, tile in zip(places, tiles, strict=True):
                v, x = row.read(place)
                total, squares = total + v[:, None] * tile.astype(jnp.float32), squares + x * x
            return total, squares

        start = jnp.zeros((TILE_ROWS, columns), jnp.float32), jnp.zeros(TILE_ROWS, jnp.float32)
        total, squares = lax.fori_loop(0, steps // unrolled, step, start)
        y = jnp.sum(total, axis=0)
        if row.has_norm:
            y = y * lax.rsqrt(jnp.sum(squares) / K + eps)
        for i, y_ref in enumerate(y_refs):
            store = functools.partial(plt.store, y_ref.at[m, column], y.astype(dtype))
            pl.when(g == i)(store) if G > 1 else store()

    shapes = [jax.ShapeDtypeStruct((M, N), dtype)] * G + [jax.ShapeDtypeStruct((M, K), dtype)] * (addend is not None)
    call = pl.pallas_call(
        kernel,
        grid=(N // columns, M, G),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=few_rows.INTERPRET,
        name="dense_product",
    )
    found = call(*sources, *optional, weights_GKN)
    return list(found[:G]), found[G] if addend is not None else None
