"""Products of packed ternary weights with the few rows of a decoding step (Pallas Triton, Hopper).

`normed_product` is a whole BitLinear for one to four tokens: norm or gate, quantiser and G products, and the addition
of the residual before the norm. `codes_product` multiplies codes that exist, up to 256 rows of them, on tensor cores.
Both read the 2-bit weights of `packed.pack_planes` as they lie in memory, once. `dense_product` is the same step for
dense weights, so that the baseline is measured at its best.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.fast.origin import Kind
from mmfree_jax.ops.ternary import SMALLEST

# A decoding step reads every weight once and computes almost nothing, so it takes as long as its bytes, if nothing
# waits. What waits is the chain of small operations before each product: each would be a kernel of its own, and a
# kernel takes two microseconds to start and end, as long as the product itself. So every block of `normed_product`
# repeats that chain for the whole row: the row is some kilobytes that all blocks find in the second-level cache.
#
# The chain needs three sums over the row: the two norms' squares and the largest magnitude. None waits for another,
# because what a norm does is a factor of its whole row: with v = x * gain_1 and z = v * gain_2,
#     r_1 = 1 / rms(x),  r_2 = 1 / rms(r_1 v),  max |r_1 r_2 z| = r_1 r_2 max |z|.
#
# The product works on words: a 32-bit word of weights holds 16 codes, four in each of its four planes, and `dp4a`
# multiplies one plane (shifted and masked: codes + 1 in bytes) by a word of four int8 activations, and sums. What the
# ones add is the sum of the activations, subtracted at the end.

MOST_ROWS = 4  # of `normed_product`: from there on tensor cores pay
MOST_CODES = 256  # rows of `codes_product`: from there on it pays to unpack the weights for a product of large tiles
CODES_IN_A_WORD = 16
CHUNK = 128  # words of weights of one row that are multiplied at a time
AHEAD = 3  # chunks of weights on their way while norm and codes are computed
BLOCKS = 132  # at least, of a launch: one for each multiprocessor of an H200
DENSE_ROWS = 64  # rows of dense weights in a tile
DENSE_AHEAD = 16  # tiles on their way: 64 KiB a block, for what few blocks read has to be there when it is needed
MOST_COLUMNS = 64  # of a block
TOP = 127.0
INTERPRET = False  # True where tests run the kernels on a CPU
TO_INTEGER = 12582912.0  # 1.5 x 2^23: adding it rounds a float32 below 2^22 to an integer, half to even


class _Row(NamedTuple):
    """A row of activations: z of each chunk and plane, and the factor that makes codes of it."""

    z: list[list[jax.Array]]
    to_codes: jax.Array
    scale: jax.Array  # of the codes


def supports(rows: int, width: int, columns: int) -> bool:
    """Whether `normed_product` takes these sizes."""
    return 1 <= rows <= MOST_ROWS and width % CODES_IN_A_WORD == 0 and columns % 8 == 0


def supports_codes(rows: int, width: int, columns: int) -> bool:
    """Whether `codes_product` takes these sizes."""
    return 1 <= rows <= MOST_CODES and width % 128 == 0 and columns % 32 == 0


@functools.partial(jax.jit, static_argnames=("kind", "eps", "factor"))
def normed_product(
    kind: Kind,
    sources: list[jax.Array],
    source_gain: jax.Array | None,
    gain: jax.Array | None,
    weights: list[jax.Array],
    scales: list[jax.Array],
    eps: float,
    addend: jax.Array | None = None,
    factor: float = 1.0,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Compute G BitLinears of a few rows, from the sources of their input.

    Args:
        kind, sources, source_gain: what the input is made of (`origin.Origin`), [M, K] each; the gain is float32 [K].
        gain: of the norm before the quantiser, float32: [K], [G, K] for one each, or None for no norm.
        weights: uint8 [N, K / 4] of each product.
        scales: of the weights, float32, [1] or [N] each.
        addend: added to the first source, times `factor`, before anything else; the sum is returned too.

    Returns:
        [M, N] of each product in the sources' type, and the sum [M, K] (None without an addend).
    """
    (M, K), N, G, dtype = sources[0].shape, weights[0].shape[0], len(weights), sources[0].dtype
    words = [lax.bitcast_convert_type(w.reshape(N, K // CODES_IN_A_WORD, 4), jnp.int32) for w in weights]
    block = _columns(N, G)
    gain = None if gain is None else gain.reshape(-1, K)
    optional = [a for a in (addend, source_gain, gain) if a is not None]

    def kernel(*refs):
        taken = iter(refs)
        take = lambda count: [next(taken) for _ in range(count)]
        source_refs, addend_ref = take(len(sources)), next(taken) if addend is not None else None
        inner_ref = next(taken) if source_gain is not None else None
        gain_ref = next(taken) if gain is not None else None
        word_refs, scale_refs, y_refs = take(G), take(G), take(G)
        sum_ref = next(taken, None)
        first, m, own = pl.program_id(0) * block, pl.program_id(1), pl.program_id(2)
        for g in range(G):

            def product(g=g):
                gain_row = None if gain_ref is None else (gain_ref, g % gain_ref.shape[0])
                writes = None if g else sum_ref
                rows = functools.partial(
                    _row, kind, source_refs, inner_ref, gain_row, addend_ref, factor, K, eps, m, writes, first == 0
                )
                _product(rows, word_refs[g], scale_refs[g], y_refs[g], m, first, K, block)

            pl.when(own == g)(product) if G > 1 else product()

    shapes = [jax.ShapeDtypeStruct((M, N), dtype)] * G + [jax.ShapeDtypeStruct((M, K), dtype)] * (addend is not None)
    options = plt.CompilerParams(num_warps=8 if K > 4096 or block > 16 else 4, num_stages=1)
    call = pl.pallas_call(
        kernel,
        grid=(N // block, M, G),
        out_shape=shapes,
        compiler_params=options,
        interpret=INTERPRET,
        name="normed_product",
    )
    found = call(*sources, *optional, *words, *scales)
    return list(found[:G]), found[G] if addend is not None else None


def _columns(columns: int, products: int) -> int:
    """Columns of a block: a power of two, so many that there are still enough blocks."""
    block = 8
    while block < MOST_COLUMNS and columns % (2 * block) == 0 and products * columns >= 2 * block * BLOCKS:
        block *= 2
    return block


def _product(row_of: Callable[[], _Row], words_ref, scale_ref, y_ref, m, first, K: int, block: int) -> None:
    """One block: the columns from `first` on of row m of one product."""
    words, chunks = K // CODES_IN_A_WORD, -(-K // (CODES_IN_A_WORD * CHUNK))
    column = first + jnp.arange(block)

    def load(chunk: int) -> jax.Array:
        word = chunk * CHUNK + jnp.arange(CHUNK)
        mask = None if words % CHUNK == 0 else jnp.broadcast_to(word[None] < words, (block, CHUNK))
        return plt.load(words_ref.at[column[:, None], word[None]], mask=mask, other=None if mask is None else 0)

    ahead = {chunk: load(chunk) for chunk in range(min(AHEAD, chunks))}
    row = row_of()
    total, ones = jnp.zeros((block, CHUNK), jnp.int32), jnp.zeros(CHUNK, jnp.int32)
    for chunk in range(chunks):
        weights = ahead.pop(chunk, None)
        weights = load(chunk) if weights is None else weights
        for plane in range(4):
            codes = _code_words(row.z[chunk][plane] * row.to_codes)
            here = (weights >> (2 * plane)) & 0x03030303
            total = _dot4(here, jnp.broadcast_to(codes[None], here.shape), total)
            ones = _dot4(jnp.full(CHUNK, 0x01010101, jnp.int32), codes, ones)
    y = (jnp.sum(total, axis=1) - jnp.sum(ones)).astype(jnp.float32) * row.scale
    scale = scale_ref[0] if scale_ref.shape[0] == 1 else scale_ref[pl.ds(first, block)]
    y_ref[m, pl.ds(first, block)] = (y * scale).astype(y_ref.dtype)


def _row(kind, source_refs, inner_ref, gain_row, addend_ref, factor, K: int, eps: float, m, sum_ref, writes) -> _Row:
    """Load one row and compute what becomes its codes; where `writes` holds, write the sum with the addend."""
    piece, size = K // 4, 4 * CHUNK
    zero = jnp.zeros(size, jnp.float32)
    first_squares, squares, largest = zero, zero, zero
    z: list[list[jax.Array]] = []
    for chunk in range(-(-piece // size)):
        element = chunk * size + jnp.arange(size)
        mask = None if piece % size == 0 else element < piece
        z.append([])
        for plane in range(4):
            index = plane * piece + element
            other = None if mask is None else 0.0
            vector = functools.partial(plt.load, mask=mask, other=other)
            value = lambda ref, index=index, vector=vector: vector(ref.at[m, index]).astype(jnp.float32)
            x = value(source_refs[0])
            if addend_ref is not None:
                x = (x + factor * value(addend_ref)).astype(source_refs[0].dtype)
                if sum_ref is not None:
                    pl.when(writes)(functools.partial(plt.store, sum_ref.at[m, index], x, mask=mask))
                x = x.astype(jnp.float32)
            if kind == "swiglu":
                v = x * jax.nn.sigmoid(x) * value(source_refs[1])
            elif kind == "plain":
                v = x
            else:
                first_squares += x * x
                v = x * vector(inner_ref.at[index])
            if kind == "gated":
                h = value(source_refs[1])
                v = v * h * jax.nn.sigmoid(h)
            squares += v * v
            z[-1].append(v if gain_row is None else v * vector(gain_row[0].at[gain_row[1], index]))
            largest = jnp.maximum(largest, jnp.abs(z[-1][-1]))
    inner = lax.rsqrt(jnp.sum(first_squares) / K + eps) if kind in ("norm", "gated") else 1.0
    outer = 1.0 if gain_row is None else lax.rsqrt(inner * inner * jnp.sum(squares) / K + eps)
    most = jnp.maximum(jnp.max(largest) * inner * outer, SMALLEST)
    return _Row(z, inner * outer * (TOP / most), most * (1 / TOP))


def _code_words(z: jax.Array) -> jax.Array:
    """Round to int8 codes and pack four consecutive ones into a word: [4 W] -> int32 [W]."""
    codes = lax.bitcast_convert_type(z + TO_INTEGER, jnp.int32).reshape(-1, 4)  # the lowest byte is the code
    shifts = 8 * lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    return jnp.sum((codes & 0xFF) << shifts, axis=1)


def _dot4(weights: jax.Array, codes: jax.Array, total: jax.Array) -> jax.Array:
    """Add the product of four bytes each: total + sum_i weights_i codes_i, all int32."""
    if INTERPRET:  # the instruction, in words
        for shift in (0, 8, 16, 24):
            total = total + ((weights >> shift) & 0xFF) * ((codes << (24 - shift)) >> 24)
        return total
    shape = jax.ShapeDtypeStruct(total.shape, jnp.int32)
    asm, constraints = "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"
    return plt.elementwise_inline_asm(
        asm, args=[weights, codes, total], constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )[0]


def supports_dense(rows: int, width: int, columns: int) -> bool:
    """Whether `dense_product` takes these sizes."""
    return 1 <= rows <= MOST_ROWS and width % DENSE_ROWS == 0 and columns % 32 == 0


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
    """Multiply a few rows by G dense matrices, from the sources of their input; arguments as `normed_product`.

    A norm needs no pass of its own here: its factor is a factor of the result.
    """
    (M, K), (G, _, N), dtype = sources[0].shape, weights_GKN.shape, sources[0].dtype
    columns = 64 if N % 64 == 0 and G * N >= 64 * BLOCKS else 32
    steps = K // DENSE_ROWS
    unrolled = next(count for count in range(DENSE_AHEAD, 0, -1) if steps % count == 0)
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

        def value(row):
            """The input at some places before the norm's factor, and the first source there."""
            load = lambda ref: plt.load(ref.at[m, row]).astype(jnp.float32)
            x = load(source_refs[0])
            if addend_ref is not None and sum_ref is not None:
                x = (x + factor * load(addend_ref)).astype(dtype)
                pl.when((first == 0) & (g == 0))(functools.partial(plt.store, sum_ref.at[m, row], x))
                x = x.astype(jnp.float32)
            if kind == "swiglu":
                return x * jax.nn.sigmoid(x) * load(source_refs[1]), x
            return x if inner_ref is None else x * plt.load(inner_ref.at[row]), x

        def step(i, carry):
            total, squares = carry
            rows = [(i * unrolled + part) * DENSE_ROWS + jnp.arange(DENSE_ROWS) for part in range(unrolled)]
            # All tiles first: the exchange of values between threads is a barrier that no later load passes.
            tiles = [plt.load(weights_ref.at[g, row[:, None], column[None]]) for row in rows]
            for row, tile in zip(rows, tiles, strict=True):
                v, x = value(row)
                total, squares = total + v[:, None] * tile.astype(jnp.float32), squares + x * x
            return total, squares

        start = jnp.zeros((DENSE_ROWS, columns), jnp.float32), jnp.zeros(DENSE_ROWS, jnp.float32)
        total, squares = lax.fori_loop(0, steps // unrolled, step, start)
        y = jnp.sum(total, axis=0)
        if kind == "norm":
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
        interpret=INTERPRET,
        name="dense_product",
    )
    found = call(*sources, *optional, weights_GKN)
    return list(found[:G]), found[G] if addend is not None else None


def codes_product(
    codes_MK: jax.Array, scale_M: jax.Array, weights: jax.Array, scale: jax.Array, dtype: Any
) -> jax.Array:
    """Multiply int8 codes by packed weights, then apply both scales: [M, N] of `dtype`.

    codes_MK and its float32 scales [M]; weights: uint8 [N, K / 4]; scale: float32 [1] or [N].
    """
    (M, K), N = codes_MK.shape, weights.shape[0]
    piece = K // 4
    rows = min(64, max(16, pl.next_power_of_2(M)))
    columns = 64 if N % 64 == 0 and N >= 64 * BLOCKS else 32
    inner = next(size for size in (128, 64, 32) if piece % size == 0)

    def kernel(codes_ref, scale_M_ref, weights_ref, scale_ref, y_ref):
        column = pl.program_id(0) * columns + jnp.arange(columns)
        target = pl.program_id(1) * rows + jnp.arange(rows)
        row = jnp.minimum(target, M - 1)  # rows that are not there repeat the last, and are not written

        def step(i, total):
            at = i * inner + jnp.arange(inner)
            packed = plt.load(weights_ref.at[column[:, None], at[None]])
            for plane in range(4):
                codes = plt.load(codes_ref.at[row[:, None], (plane * piece + at)[None]])
                total += plt.dot(codes, _plane(packed, plane).T)
            return total

        total = lax.fori_loop(0, piece // inner, step, jnp.zeros((rows, columns), jnp.int32))
        by_row = plt.load(scale_M_ref.at[row])
        by_column = scale_ref[0] if scale_ref.shape[0] == 1 else plt.load(scale_ref.at[column])[None]
        y = total.astype(jnp.float32) * by_row[:, None] * by_column
        mask = jnp.broadcast_to((target < M)[:, None], (rows, columns))
        plt.store(y_ref.at[target[:, None], column[None]], y.astype(dtype), mask=mask)

    call = pl.pallas_call(
        kernel,
        grid=(N // columns, -(-M // rows)),
        out_shape=jax.ShapeDtypeStruct((M, N), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=INTERPRET,
        name="codes_product",
    )
    return call(codes_MK, scale_M, weights, scale)


def _plane(packed: jax.Array, plane: int) -> jax.Array:
    """Unpack one plane of bytes: int8 codes.

    Four bytes at a time: each then holds code + 1. To subtract 1 of each byte without a borrow from the next, its
    highest bit is set before and flipped after.
    """
    if INTERPRET:
        return ((packed >> jnp.uint8(2 * plane)) & jnp.uint8(3)).astype(jnp.int8) - jnp.int8(1)
    asm = (
        f"{{ .reg .b32 t; shr.u32 t, $1, {2 * plane}; and.b32 t, t, 0x03030303; or.b32 t, t, 0x80808080; "
        "sub.u32 t, t, 0x01010101; xor.b32 $0, t, 0x80808080; }"
    )
    shape = jax.ShapeDtypeStruct(packed.shape, jnp.int8)
    return plt.elementwise_inline_asm(asm, args=[packed], constraints="=r,r", pack=4, result_shape_dtypes=[shape])[0]
