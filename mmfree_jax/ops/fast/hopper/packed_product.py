"""Products of packed ternary weights with the few rows of a decoding step (Pallas Triton, Hopper).

`normed_product` is a whole BitLinear for one to four tokens: norm or gate, quantiser and G products, and the addition
of the residual before the norm. `codes_product` multiplies codes that exist, up to 256 rows of them, on tensor cores.
Both read the weights of `packed.pack_planes` as they lie in memory, once; the first also those of `packed.pack_trits`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.fast.hopper import few_rows
from mmfree_jax.ops.fast.hopper.few_rows import Row, masked_load
from mmfree_jax.ops.fast.origin import Kind
from mmfree_jax.ops.packed import CODES_IN_A_BYTE, PLANES, TRITS, Layout
from mmfree_jax.ops.ternary import SMALLEST

# `few_rows` says why each block computes the whole row again. Codes need three sums of it: the two norms' squares and
# the largest magnitude. With v = x * gain_1 and z = v * gain_2,
#     r_1 = 1 / rms(x),  r_2 = 1 / rms(r_1 v),  max |r_1 r_2 z| = r_1 r_2 max |z|.
#
# The product works on words: a 32-bit word of weights holds 16 codes, four in each of its four planes, and `dp4a`
# multiplies one plane (shifted and masked: codes + 1 in bytes) by a word of four int8 activations, and sums. What the
# ones add is the sum of the activations, subtracted at the end. A word of `packed.pack_trits` holds 20 codes, as the
# digits of four fractions: two multiplications by 3, of two bytes each with room for a digit between them, give four.

MOST_CODES = 256  # rows of `codes_product`: from there on it pays to unpack the weights for a product of large tiles
CHUNK = 128  # words of one row of weights that are multiplied at a time
MANY_COLUMNS = 40 * few_rows.PROCESSORS  # from there on two blocks share a multiprocessor
BYTES_AHEAD = 2**15  # of weights that a block has asked for before it needs them
TOP = 127.0
TO_INTEGER = 12582912.0  # 1.5 x 2^23: adding it rounds a float32 below 2^22 to an integer, half to even


class _Scaled(NamedTuple):
    """A row by chunk and plane, before the factors of its norms, and the factor that makes codes of it."""

    z: list[list[jax.Array]]
    to_codes: jax.Array
    scale: jax.Array  # of the codes


def supports(rows: int, width: int, columns: int, layout: Layout) -> bool:
    """Whether `normed_product` takes these sizes."""
    words = layout == "trits" or width % (4 * PLANES) == 0
    return 1 <= rows <= few_rows.MOST_ROWS and words and columns % 8 == 0


def supports_codes(rows: int, width: int, columns: int) -> bool:
    """Whether `codes_product` takes these sizes."""
    return 1 <= rows <= MOST_CODES and width % 128 == 0 and columns % 32 == 0


@functools.partial(jax.jit, static_argnames=("kind", "eps", "factor", "layout"))
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
    layout: Layout = "planes",
) -> tuple[list[jax.Array], jax.Array | None]:
    """Compute G BitLinears of a few rows, from the sources of their input.

    Args:
        kind, sources, source_gain: what the input is made of (`origin.Origin`), [M, K] each; the gain is float32 [K].
        gain: of the norm before the quantiser, float32: [K], [G, K] for one each, or None for no norm.
        weights: uint8 [N, I] of each product, in whole words.
        scales: of the weights, float32, [1] or [N] each.
        layout: of the weights.
        addend: added to the first source, times `factor`, before anything else; the sum is returned too.

    Returns:
        [M, N] of each product in the sources' type, and the sum [M, K] (None without an addend).
    """
    (M, K), N, G, dtype = sources[0].shape, weights[0].shape[0], len(weights), sources[0].dtype
    words = [lax.bitcast_convert_type(w.reshape(N, -1, 4), jnp.int32) for w in weights]
    # Measured: many columns take two blocks, whose waits overlap; where there are few, a second row costs more.
    warps, blocks, width = (4, 2, 16) if G * N >= MANY_COLUMNS else (8, 1, 8)
    tiles = few_rows.tiles_of_a_block(-(-N // width), G * M, blocks)
    gain = None if gain is None else gain.reshape(-1, K)
    optional = [a for a in (addend, source_gain, gain) if a is not None]

    def kernel(*refs):
        taken = iter(refs)
        take = lambda count: [next(taken) for _ in range(count)]
        source_refs, addend_ref = take(len(sources)), next(taken) if addend is not None else None
        inner_ref = next(taken) if source_gain is not None else None
        gain_ref = next(taken) if gain is not None else None
        word_refs, scale_refs, y_refs = take(G), take(G), take(G)
        block, m, own = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        row = Row(kind, m, source_refs, inner_ref, addend_ref, factor, next(taken, None), block == 0)
        for g in range(G):

            def product(g=g):
                own_row = row if g == 0 else row._replace(total=None)
                read = functools.partial(_scaled, own_row, gain_ref, g, K, eps, CODES_IN_A_BYTE[layout])
                _product(read, word_refs[g], scale_refs[g], y_refs[g], m, block * tiles, tiles, width, layout)

            pl.when(own == g)(product) if G > 1 else product()

    shapes = [jax.ShapeDtypeStruct((M, N), dtype)] * G + [jax.ShapeDtypeStruct((M, K), dtype)] * (addend is not None)
    call = pl.pallas_call(
        kernel,
        grid=(-(-N // (width * tiles)), M, G),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=few_rows.INTERPRET,
        name="normed_product",
    )
    found = call(*sources, *optional, *words, *scales)
    return list(found[:G]), found[G] if addend is not None else None


def _product(
    read: Callable[[], _Scaled], words_ref, scale_ref, y_ref, m, first: Any, count: int, width: int, layout: Layout
) -> None:
    """One block: `count` tiles of `width` columns, from tile `first` on, of row m of one product."""
    N, words = words_ref.shape

    def load(tile: Any) -> list[jax.Array]:
        column, inside = few_rows.columns_of(first, tile, count, width, N)
        chunks = []
        for start in range(0, words, CHUNK):
            word = start + jnp.arange(CHUNK)
            mask = jnp.broadcast_to(inside[:, None], (width, CHUNK))
            mask = mask if start + CHUNK <= words else mask & (word < words)[None]
            chunks.append(masked_load(words_ref.at[column[:, None], word[None]], mask))
        return chunks

    def multiply(chunks: list[jax.Array]) -> jax.Array:
        total = jnp.zeros((width, CHUNK), jnp.int32)
        for weights, planes in zip(chunks, codes, strict=True):
            for here, codes_here in zip(_digits(weights, layout), planes, strict=True):
                total = _dot4(here, jnp.broadcast_to(codes_here[None], here.shape), total)
        return jnp.sum(total, axis=1)

    ahead = [load(tile) for tile in range(few_rows.tiles_ahead(count, 4 * width * words, BYTES_AHEAD))]
    row = read()
    codes = [[_code_words(z * row.to_codes) for z in planes] for planes in row.z]
    ones = jnp.zeros(CHUNK, jnp.int32)
    for codes_here in itertools.chain(*codes):
        ones = _dot4(jnp.full(CHUNK, 0x01010101, jnp.int32), codes_here, ones)
    totals = few_rows.pipelined(count, ahead, load, multiply) - jnp.sum(ones)
    column, inside = few_rows.all_columns(first, count, width, N)
    scale = scale_ref[0] if scale_ref.shape[0] == 1 else masked_load(scale_ref.at[column], inside)
    y = totals.astype(jnp.float32) * row.scale * scale
    plt.store(y_ref.at[m, column], y.astype(y_ref.dtype), mask=inside)


def _digits(words: jax.Array, layout: Layout) -> Iterator[jax.Array]:
    """Yield the codes + 1 of each plane in words of packed weights, a byte each."""
    if layout == "planes":
        for plane in range(PLANES):
            yield (words >> (2 * plane)) & 0x03030303
        return
    even, odd = words & 0x00FF00FF, (words >> 8) & 0x00FF00FF
    for _ in range(TRITS):
        even, odd = 3 * even, 3 * odd
        yield ((even >> 8) & 0x00030003) | (odd & 0x03000300)
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF


def _scaled(row: Row, gain_ref, g: int, K: int, eps: float, planes: int) -> _Scaled:
    """Read a whole row, and compute what makes codes of it; `gain_ref` [1 or G, K] is of the norm before them."""
    piece, size = -(-K // planes), 4 * CHUNK
    zero = jnp.zeros(size, jnp.float32)
    first_squares, squares, largest = zero, zero, zero
    z: list[list[jax.Array]] = []
    for chunk in range(-(-piece // size)):
        element = chunk * size + jnp.arange(size)
        z.append([])
        for plane in range(planes):
            index = plane * piece + element
            end = (chunk + 1) * size
            mask = None if end <= piece and plane * piece + end <= K else (element < piece) & (index < K)
            v, x = row.read(index, mask)
            first_squares, squares = first_squares + x * x, squares + v * v
            z[-1].append(v if gain_ref is None else v * masked_load(gain_ref.at[g % gain_ref.shape[0], index], mask))
            largest = jnp.maximum(largest, jnp.abs(z[-1][-1]))
    inner = lax.rsqrt(jnp.sum(first_squares) / K + eps) if row.has_norm else 1.0
    outer = 1.0 if gain_ref is None else lax.rsqrt(inner * inner * jnp.sum(squares) / K + eps)
    most = jnp.maximum(jnp.max(largest) * inner * outer, SMALLEST)
    return _Scaled(z, inner * outer * (TOP / most), most * (1 / TOP))


def _code_words(z: jax.Array) -> jax.Array:
    """Round to int8 codes and pack four consecutive ones into a word: [4 W] -> int32 [W]."""
    codes = lax.bitcast_convert_type(z + TO_INTEGER, jnp.int32).reshape(-1, 4)  # the lowest byte is the code
    shifts = 8 * lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    return jnp.sum((codes & 0xFF) << shifts, axis=1)


def _dot4(weights: jax.Array, codes: jax.Array, total: jax.Array) -> jax.Array:
    """Add the product of four bytes each: total + sum_i weights_i codes_i, all int32."""
    if few_rows.INTERPRET:  # the instruction, in words
        for shift in (0, 8, 16, 24):
            total = total + ((weights >> shift) & 0xFF) * ((codes << (24 - shift)) >> 24)
        return total
    shape = jax.ShapeDtypeStruct(total.shape, jnp.int32)
    asm, constraints = "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"
    return plt.elementwise_inline_asm(
        asm, args=[weights, codes, total], constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )[0]


def codes_product(
    codes_MK: jax.Array, scale_M: jax.Array, weights: jax.Array, scale: jax.Array, dtype: Any
) -> jax.Array:
    """Multiply int8 codes by packed weights, then apply both scales: [M, N] of `dtype`.

    codes_MK and its float32 scales [M]; weights: uint8 [N, K / 4]; scale: float32 [1] or [N].
    """
    (M, K), N = codes_MK.shape, weights.shape[0]
    piece = K // 4
    rows = min(64, max(16, pl.next_power_of_2(M)))
    columns = 64 if N % 64 == 0 and N >= 64 * few_rows.PROCESSORS else 32
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
        interpret=few_rows.INTERPRET,
        name="codes_product",
    )
    return call(codes_MK, scale_M, weights, scale)


def _plane(packed: jax.Array, plane: int) -> jax.Array:
    """Unpack one plane of bytes: int8 codes.

    Four bytes at a time: each then holds code + 1. To subtract 1 of each byte without a borrow from the next, its
    highest bit is set before and flipped after.
    """
    if few_rows.INTERPRET:
        return ((packed >> jnp.uint8(2 * plane)) & jnp.uint8(3)).astype(jnp.int8) - jnp.int8(1)
    asm = (
        f"{{ .reg .b32 t; shr.u32 t, $1, {2 * plane}; and.b32 t, t, 0x03030303; or.b32 t, t, 0x80808080; "
        "sub.u32 t, t, 0x01010101; xor.b32 $0, t, 0x80808080; }"
    )
    shape = jax.ShapeDtypeStruct(packed.shape, jnp.int8)
    return plt.elementwise_inline_asm(asm, args=[packed], constraints="=r,r", pack=4, result_shape_dtypes=[shape])[0]
