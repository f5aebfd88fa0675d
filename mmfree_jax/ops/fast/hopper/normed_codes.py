"""Everything between a layer's stored activations and its integer codes in one pass over memory, and the way back
(Pallas Mosaic GPU)."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.ops.fast.hopper.mosaic import SHARED_BYTES, STREAMING, sigmoid
from mmfree_jax.ops.fast.ternary import TINY, TOP, nearest_integer
from mmfree_jax.ops.ternary import SMALLEST

# A row (one token) stays in the registers of one warpgroup while it is combined, normalised and quantised, so each
# activation is read once forward and once backward, and neither normed values nor float copies of the codes reach
# memory. XLA makes three passes of the first and up to five of the second, because every mean or maximum over a row
# ends a fusion.

# How it works. A block of 128 threads owns a stretch of rows. The copy engine (TMA) brings the next rows into shared
# memory while the block computes on the last ones, and takes results out from there. A row of D values is seen as [D
# / 128, 128] and cut into pieces of up to eight lines; of a piece each thread holds one vector of up to eight
# values, so that a row of 2,048 is two pieces of eight registers a thread. A sum or maximum over the row first joins
# the pieces thread by thread and then goes once through the warpgroup. The backward pass needs a row several times,
# for a mean and then for the gradients: it reads it again from shared memory each time, as registers are scarcer.
# Gains have no such place: they stay in registers for all rows of a block, and so do the sums of their gradients,
# which leave once, a line a block.

THREADS = 128  # of a warpgroup
LANES = 128  # a row is seen as [D / LANES, LANES]: the copy engine moves at most 256 elements along an axis
STAGE_VALUES = {"forward": 4096, "backward": 2048}  # of one input copied ahead at a time
STAGES = 2  # copied ahead
BLOCKS = {"forward": 528, "backward": 264}  # at most: four and two for each of an H200's 132 multiprocessors
REGISTERS = 100  # a thread has for gains, which stay there for all rows of a block

Row = list[jax.Array]  # a row in registers, in pieces of which each thread holds one vector


def supports(width: int, gains: int, dtype: Any, inputs: int = 1, outputs: int = 1) -> bool:
    """Whether the kernels take [rows, width] activations of this type with this many gain vectors.

    inputs, outputs: arrays of that size that the backward pass reads and writes.
    """
    if width % LANES or gains * width // THREADS > REGISTERS or dtype not in (jnp.bfloat16, jnp.float32):
        return False
    values = max(width, STAGE_VALUES["backward"])
    return (STAGES * inputs + outputs) * values * jnp.dtype(dtype).itemsize <= SHARED_BYTES


@functools.partial(jax.jit, static_argnames=("kind", "eps"))
def forward(
    kind: str, sources: Sequence[jax.Array], norm_gain: jax.Array | None, gains: Sequence[jax.Array], eps: float
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Quantise the normed combination of `sources`, once for each of `gains`.

    kind: how the sources [M, D] are combined (`combine.combine`); norm_gain [D]: of a norm inside that combination;
    gains [D]: of the norm before the quantiser. Returns int8 codes [M, D] and float32 scales [M], one pair a gain.
    """
    (M, D), G, dtype = sources[0].shape, len(gains), sources[0].dtype
    blocks, rows = _cut(M, D, "forward")
    vectors = [*([] if norm_gain is None else [norm_gain]), *gains]

    def normed_codes(*refs):
        source_gmem, gain_gmem, refs = _split(refs, len(sources), len(vectors))
        code_gmem, scale_gmem, (code_smem,) = _split(refs, G, G)
        block = lax.axis_index("block")
        resident = [_row(ref) for ref in gain_gmem]
        inner, outer = (resident[0], resident[1:]) if norm_gain is not None else (None, resident)

        def stage(index, *source_smem):
            slot = lax.rem(index[0], 2)
            first = block * (M // blocks) + index[0] * rows
            # Two buffers take turns: the copy out of this one, two stages ago, has to have read it.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for r in range(rows):
                read = lambda r=r: [_row(ref.at[r]) for ref in source_smem]
                rstd = _rstd(read()[0], D, eps) if inner else None
                x = _combine(kind, read(), _gate(kind, read()), rstd, inner, dtype)
                rstd = _rstd(x, D, eps)
                for g, gain in enumerate(outer):
                    # The maximum of x * gain needs no second pass for rstd: that is positive, and goes outside.
                    largest = jnp.max(_peak(jnp.zeros_like(x[0]), _each(jnp.multiply, x, gain)))
                    largest = jnp.maximum(largest * rstd, SMALLEST)
                    scale = rstd * TOP / largest
                    codes = _each(lambda a, b, scale=scale: nearest_integer(a * b * scale)[1], x, gain)
                    _store(codes, code_smem.at[slot, g, r])
                    scale_gmem[g][first + r] = largest / TOP
            plgpu.commit_smem()
            for g in range(G):
                here = code_gmem[g].at[pl.ds(first, rows)]
                plgpu.copy_smem_to_gmem(code_smem.at[slot, g], here, commit_group=g == G - 1)

        _walk(stage, M, D, blocks, rows, source_gmem)
        plgpu.wait_smem_to_gmem(0)

    normed_codes.__name__, shape = f"{kind}_codes", (D // LANES, LANES)  # profiles show the name
    out = plgpu.kernel(
        normed_codes,
        out_type=[jax.ShapeDtypeStruct((M, *shape), jnp.int8)] * G + [jax.ShapeDtypeStruct((M,), jnp.float32)] * G,
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((2, G, rows, *shape), jnp.int8)],
        compiler_params=STREAMING(),
    )(*(a.reshape(*a.shape[:-1], *shape) for a in (*sources, *vectors)))
    return [codes.reshape(M, D) for codes in out[:G]], list(out[G:])


class RowCodes(NamedTuple):
    """A matrix [M, D] as int8 codes, float32 scales [M] of its rows and, where rows had factors, the largest magnitude
    of codes * scale * factor in each column, [D]."""

    codes: jax.Array
    scales: jax.Array
    largest: jax.Array | None


@jax.jit
def codes(x: jax.Array, row_factors: jax.Array | None = None) -> RowCodes:
    """Quantise x [M, D] by absmax per row; rows of zeros have codes zero. row_factors: [M], float32.

    The largest of each column is found on the way, as a maximum over a block's rows, which stays in registers.
    """
    M, D = x.shape
    blocks, rows = _cut(M, D, "forward")

    def row_codes(x_gmem, *refs):
        factor_gmem, (code_gmem, scale_gmem), largest_gmem, (code_smem,) = _split(
            refs, len(factor_arrays), 2, len(factor_arrays)
        )
        block = lax.axis_index("block")

        def stage(index, x_smem, tops):
            slot = lax.rem(index[0], 2)
            first = block * (M // blocks) + index[0] * rows
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for r in range(rows):
                x, factors = _row(x_smem.at[r]), [ref[first + r] for ref in factor_gmem]
                largest = jnp.max(_peak(jnp.zeros_like(x[0]), x))
                scale_gmem[first + r] = _absmax_codes(x, largest, code_smem.at[slot, r], factors, tops)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(code_smem.at[slot], code_gmem.at[pl.ds(first, rows)])
            return tops

        for ref, top in zip(largest_gmem, _walk(stage, M, D, blocks, rows, [x_gmem], len(factor_arrays)), strict=True):
            _store(top, ref.at[block])
        plgpu.wait_smem_to_gmem(0)

    shape, factor_arrays = (D // LANES, LANES), [] if row_factors is None else [row_factors]
    found, scales, *largest = plgpu.kernel(
        row_codes,
        out_type=[jax.ShapeDtypeStruct((M, *shape), jnp.int8), jax.ShapeDtypeStruct((M,), jnp.float32)]
        + [jax.ShapeDtypeStruct((blocks, *shape), jnp.float32)] * len(factor_arrays),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((2, rows, *shape), jnp.int8)],
        compiler_params=STREAMING(),
    )(x.reshape(M, *shape), *factor_arrays)
    return RowCodes(found.reshape(M, D), scales, jnp.max(largest[0], axis=0).reshape(D) if largest else None)


class Gradients(NamedTuple):
    """What `backward` returns; [M, D] and [D]."""

    sources: list[jax.Array] | list[RowCodes]
    norm_gain: jax.Array | None
    gains: list[jax.Array]
    inputs: list[jax.Array]  # the quantised ones, once for each gain


@functools.partial(jax.jit, static_argnames=("kind", "eps", "as_codes"))
def backward(
    kind: str,
    sources: Sequence[jax.Array],
    norm_gain: jax.Array | None,
    gains: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    dinputs: Sequence[jax.Array],
    factors: jax.Array | None,
    eps: float,
    as_codes: bool = False,
    row_factors: jax.Array | None = None,
    dcopy: jax.Array | None = None,
) -> Gradients:
    """Compute the gradients of `forward`, straight through the quantiser, to sources and gains; and the codes again.

    scales [M]: as `forward` returned them. dinputs [M, D]: gradients to the quantised inputs, one a product, each yet
    to be multiplied by its factor (float32, [products], None for ones); with a single gain they are summed. dcopy
    [M, D]: an extra gradient for the first source (from the residual), added to the one that is computed here.

    The gradients to sources come in their type or, with `row_factors` ([M], float32), as the codes that `codes` would
    make of them; those to gains in float32. The gradient to the weights needs the codes, [M, D] one for each of gains:
    times their scale and in the sources' type or, `as_codes`, as they are.
    """
    (M, D), S, G, dtype = sources[0].shape, len(sources), len(gains), sources[0].dtype
    blocks, rows = _cut(M, D, "backward")
    vectors = [*([] if norm_gain is None else [norm_gain]), *gains]
    inputs = [*sources, *dinputs, *([] if dcopy is None else [dcopy])]
    scalars, onward = [] if factors is None else [factors], [] if row_factors is None else [row_factors]
    input_type, source_type = jnp.int8 if as_codes else dtype, jnp.int8 if onward else dtype

    def normed_codes_backward(*refs):
        counts = len(inputs), len(vectors), G, len(scalars), len(onward)
        input_gmem, gain_gmem, scale_gmem, factor_gmem, row_factor_gmem, refs = _split(refs, *counts)
        out_gmem, onward_gmem, (sums_gmem,), refs = _split(refs, S + G, S * len(onward), 1)
        (source_smem,), (input_smem,), code_smem = _split(refs, 1, 1)
        staged = [*(source_smem.at[i] for i in range(S)), *(input_smem.at[g] for g in range(G))]
        code_smem = [ref.at[i] for ref in code_smem for i in range(S)]
        block = lax.axis_index("block")
        # Columns' maxima take the registers in which gains could stay.
        resident = [] if onward else [_row(ref) for ref in gain_gmem]
        product_factors = [ref[i] for ref in factor_gmem for i in range(len(dinputs))]

        def gains_of(parts=None):
            pick = lambda row: row if parts is None else [row[part] for part in parts]
            found = [pick(row) for row in resident] or [_row(ref, parts) for ref in gain_gmem]
            return (None, found) if norm_gain is None else (found[0], found[1:])

        def stage(index, *refs_and_sums):
            *stage_smem, sums = refs_and_sums
            source_rows, dy_rows, dcopy_rows = _split(stage_smem, S, len(dinputs))
            first = block * (M // blocks) + index[0] * rows
            for r in range(rows):
                # Read again for every pass over the row: shared memory is near, registers are few.
                read = lambda parts=None, r=r: [_row(ref.at[r], parts) for ref in source_rows]

                def read_dys(parts=None, r=r):
                    dys = [_row(ref.at[r], parts) for ref in dy_rows]
                    if product_factors:
                        pairs = zip(dys, product_factors, strict=True)
                        dys = [_each(lambda a, factor=factor: a * factor, dy) for dy, factor in pairs]
                    return dys if len(dys) == G else [_sum(dys)]  # products that share a gain share the input

                inner, outer = gains_of()
                rstd_inner, gate = _rstd(read()[0], D, eps) if inner else None, _gate(kind, read())
                x = _combine(kind, read(), gate, rstd_inner, inner, dtype)
                rstd, mean = _rstd(x, D, eps), _dot(x, _through(outer, read_dys())) * (1 / D)
                if r == 0:  # the results of the stage before have left
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                peaks = [jnp.zeros_like(x[0]) for _ in code_smem]
                # A norm inside needs a mean over the whole row of what comes out of the outer one: all pieces at once.
                # Without one, piece by piece, with fewer registers.
                for parts in [range(len(x))] if inner else [[part] for part in range(len(x))]:
                    (inner, gains), gate_here = gains_of(parts), gate and [gate[part] for part in parts]
                    x = _combine(kind, read(parts), gate_here, rstd_inner, inner, dtype)
                    dx, dgains = _norm_pull(x, rstd, rstd * mean, gains, read_dys(parts))
                    dsources, dinner = _pull(kind, read(parts), gate_here, rstd_inner, inner, dx, D)
                    for ref in dcopy_rows:
                        dsources[0] = _sum([dsources[0], _row(ref.at[r], parts)])
                    for total, new in zip(sums[: len(vectors)], [*dinner, *dgains], strict=True):
                        for part, values in zip(parts, new, strict=True):
                            total[part] = total[part] + values
                    again = []  # the codes of `forward`, or those times their scale
                    for gain, ref in zip(gains, scale_gmem, strict=True):
                        scale = ref[first + r]
                        found = _each(lambda a, g, ratio=rstd / scale: nearest_integer(a * g * ratio), x, gain)
                        again.append([q if as_codes else values * scale for values, q in found])
                    dsources = [[values.astype(dtype) for values in row] for row in dsources]
                    for smem, row in zip(staged, [*dsources, *again], strict=True):
                        _store(row, smem.at[r], parts)
                    peaks = [_peak(peak, row) for peak, row in zip(peaks, dsources, strict=False)]
                for i, (smem, peak, top) in enumerate(zip(code_smem, peaks, sums[len(vectors) :], strict=True)):
                    d, factors = _row(staged[i].at[r]), [ref[first + r] for ref in row_factor_gmem]
                    onward_gmem[i][first + r] = _absmax_codes(d, jnp.max(peak), smem.at[r], factors, [top])
            plgpu.commit_smem()
            leaving = [*(code_smem or staged[:S]), *staged[S:]]
            for i, (smem, gmem) in enumerate(zip(leaving, out_gmem, strict=True)):
                plgpu.copy_smem_to_gmem(smem, gmem.at[pl.ds(first, rows)], commit_group=i == S + G - 1)
            return sums

        carried = len(vectors) + len(code_smem)
        for i, total in enumerate(_walk(stage, M, D, blocks, rows, input_gmem, carried, gain_gmem[0])):
            _store(total, sums_gmem.at[block, i])
        plgpu.wait_smem_to_gmem(0)

    normed_codes_backward.__name__, shape = f"{kind}_codes_backward", (D // LANES, LANES)  # profiles show the name
    maxima = S * len(onward)
    *made, sums = plgpu.kernel(
        normed_codes_backward,
        out_type=[jax.ShapeDtypeStruct((M, *shape), source_type)] * S
        + [jax.ShapeDtypeStruct((M, *shape), input_type)] * G
        + [jax.ShapeDtypeStruct((M,), jnp.float32)] * maxima
        + [jax.ShapeDtypeStruct((blocks, len(vectors) + maxima, *shape), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((S, rows, *shape), dtype),
            plgpu.SMEM((G, rows, *shape), input_type),
            *[plgpu.SMEM((S, rows, *shape), jnp.int8)] * len(onward),
        ],
        compiler_params=STREAMING(),
    )(*(a.reshape(*a.shape[:-1], *shape) for a in (*inputs, *vectors)), *scales, *scalars, *onward)
    made, row_scales = [a.reshape(M, D) for a in made[: S + G]], made[S + G :]
    sums, tops = (a.reshape(blocks, -1, D) for a in (sums[:, : len(vectors)], sums[:, len(vectors) :]))
    dvectors = list(jnp.sum(sums, axis=0))
    dnorm_gain = dvectors.pop(0) if norm_gain is not None else None
    dsources = made[:S]
    if onward:
        dsources = [RowCodes(*found) for found in zip(made[:S], row_scales, jnp.max(tops, axis=0), strict=True)]
    return Gradients(dsources, dnorm_gain, dvectors, made[S:])


def _absmax_codes(x: Row, largest: Any, code_smem: Any, factors: list, tops: list[Row]) -> Any:
    """Store the codes of a row whose largest magnitude is known, and return its scale.

    For each factor of the row, raise `tops` to the magnitude of codes * scale * factor.
    """
    largest = jnp.maximum(largest, TINY)
    scale, found = largest / TOP, [nearest_integer(values * (TOP / largest)) for values in x]
    _store([codes for _, codes in found], code_smem)
    for factor, top in zip(factors, tops, strict=True):
        for part, (values, _) in enumerate(found):
            top[part] = jnp.maximum(top[part], jnp.abs(values) * (scale * factor))
    return scale


def _gate(kind: str, sources: list[Row]) -> Row | None:
    """The sigmoid of the source that gates the other, in a combination that has a gate: computed once a row."""
    gating = {"swiglu": 0, "gated": 1}.get(kind)
    return None if gating is None else [sigmoid(a) for a in sources[gating]]


def _combine(kind: str, sources: list[Row], gate: Row | None, rstd: Any, gain: Row | None, dtype: Any) -> Row:
    """`combine.combine` of one row, rounded where that rounds and kept in float32; rstd: of the norm inside it."""
    rounded = lambda a: a.astype(dtype).astype(jnp.float32)
    if kind == "swiglu":
        assert gate is not None
        return _each(lambda a, up, share: rounded(a * share * up), *sources, gate)
    assert gain is not None
    normed = _each(lambda a, g: rounded(a * rstd * g), sources[0], gain)
    if gate is None:
        return normed
    return _each(lambda n, h, share: rounded(n * h * share), normed, sources[1], gate)


def _pull(
    kind: str, sources: list[Row], gate: Row | None, rstd: Any, gain: Row | None, dx: Row, D: int
) -> tuple[list[Row], list[Row]]:
    """Gradients of `_combine` to its sources, and to its gain if it has one. silu(h) = h s has the derivative
    s (1 + h (1 - s)), s the sigmoid of h."""
    first = sources[0]
    if kind == "swiglu":
        assert gate is not None
        through = _each(jnp.multiply, dx, gate)
        dgate = _each(lambda a, up, s, d: d * up * (1 + a * (1 - s)), *sources, gate, through)
        return [dgate, _each(jnp.multiply, through, first)], []
    assert gain is not None
    dnormed = dx if gate is None else _each(lambda d, h, s: d * h * s, dx, sources[1], gate)
    mean = _dot(first, _through([gain], [dnormed])) * (1 / D)
    dfirst, dgain = _norm_pull(first, rstd, rstd * mean, [gain], [dnormed])
    if gate is None:
        return [dfirst], dgain
    slope = _each(lambda h, s: s * (1 + h * (1 - s)), sources[1], gate)
    return [dfirst, _each(lambda d, a, g, s: d * a * rstd * g * s, dx, first, gain, slope)], dgain


def _norm_pull(x: Row, rstd: Any, mean: Any, gains: list[Row], dys: list[Row]) -> tuple[Row, list[Row]]:
    """Gradients of x * rstd * gain to x and to each gain; mean: of x times `_through`, times rstd."""
    normed, shift = [a * rstd for a in x], rstd * mean
    dx = _each(lambda t, n: rstd * t - n * shift, _through(gains, dys), normed)
    return dx, [_each(jnp.multiply, dy, normed) for dy in dys]


def _through(gains: list[Row], dys: list[Row]) -> Row:
    return _sum([_each(jnp.multiply, dy, gain) for dy, gain in zip(dys, gains, strict=True)])


def _each(f: Callable, *rows: Row) -> list:
    """f of the rows, piece by piece."""
    return [f(*pieces) for pieces in zip(*rows, strict=True)]


def _sum(rows: list[Row]) -> Row:
    return [functools.reduce(jnp.add, pieces) for pieces in zip(*rows, strict=True)]


def _dot(x: Row, y: Row) -> jax.Array:
    return jnp.sum(functools.reduce(jnp.add, _each(jnp.multiply, x, y)))


def _rstd(x: Row, D: int, eps: float) -> Any:
    return lax.rsqrt(_dot(x, x) * (1 / D) + eps)


def _peak(least: jax.Array, row: Row) -> jax.Array:
    """The largest of some pieces' magnitudes, and at least this, place by place."""
    return functools.reduce(jnp.maximum, [jnp.abs(part.astype(jnp.float32)) for part in row], least)


def _cut(M: int, D: int, direction: str) -> tuple[int, int]:
    """Blocks, and rows of a stage: both whole divisors of what they cut."""
    blocks = next(n for n in range(min(BLOCKS[direction], M), 0, -1) if M % n == 0)
    rows = next(n for n in range(max(1, STAGE_VALUES[direction] // D), 0, -1) if M // blocks % n == 0)
    return blocks, rows


def _split(items: Sequence, *counts: int) -> list:
    """The first `counts` items of a sequence in groups, and the rest."""
    groups, at = [], 0
    for count in counts:
        groups.append(items[at : at + count])
        at += count
    return [*groups, items[at:]]


def _row(ref: Any, parts: Iterable[int] | None = None) -> Row:
    """A row [D / LANES, LANES] in float32, or some pieces of it; a thread takes the widest vectors that divide it."""
    count = ref.shape[0]
    size = next(n for n in (8, 4, 2, 1) if count % n == 0)
    layout = plgpu.Layout.WG_STRIDED((size, LANES), vec_size=size)
    # As of jax 0.11, `load` has these arguments and no types for them.
    load = lambda part: plgpu.load(ref.at[pl.ds(part * size, size)], layout=layout, optimized=False)  # type: ignore[call-arg]
    return [load(part).astype(jnp.float32) for part in (range(count // size) if parts is None else parts)]


def _store(row: Row, ref: Any, parts: Iterable[int] | None = None) -> None:
    """Store a row, or some pieces of it, in the type of its place."""
    for part, values in zip(range(len(row)) if parts is None else parts, row, strict=True):
        size = values.shape[0]
        ref[pl.ds(part * size, size)] = values.astype(ref.dtype)


def _walk(
    stage: Any, M: int, D: int, blocks: int, rows: int, gmem: Sequence, carried: int | None = None, row_ref: Any = None
) -> list[Row]:
    """Walk a block through its rows of the arrays `gmem`, a stage at a time, and return the rows that it carries.

    They start at zero, in the registers of a row (of `row_ref`): what a loop carries has its layout from the start.
    """
    spec = plgpu.BlockSpec((rows, D // LANES, LANES), lambda i: (i, 0, 0), memory_space=plgpu.SMEM)
    mine = pl.ds(lax.axis_index("block") * (M // blocks), M // blocks)
    row_ref = gmem[0].at[0] if row_ref is None else row_ref
    start = None if carried is None else [[part * 0 for part in _row(row_ref)] for _ in range(carried)]
    return plgpu.emit_pipeline(
        stage,
        grid=(M // blocks // rows,),
        in_specs=[spec] * len(gmem),
        max_concurrent_steps=min(STAGES, M // blocks // rows),
        init_carry=start,
    )(*(ref.at[mine] for ref in gmem))
