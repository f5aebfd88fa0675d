"""Everything between a layer's stored activations and its integer codes in one pass over memory, and the way back
(Pallas Mosaic TPU). Signatures are those of `hopper.normed_codes`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmfree_jax.ops.fast.ternary import TOP
from mmfree_jax.ops.fast.tpu.mosaic import LANES, SUBLANES, VMEM_BYTES, along_lanes, call
from mmfree_jax.ops.ternary import SMALLEST

# A step of the grid has some whole rows (tokens) in VMEM and goes over them in groups of 32, a tile of int8: each group
# is combined, normalised, measured and rounded before the next. So each activation is read once and each code written
# once, and a row's statistics, of which XLA would make passes of their own, never leave the core. The backward pass
# computes them again, the codes as well, and from them everything that it needs.
#
# A column of one number a row would fill 128 lanes of memory each. Scales are therefore turned by the transposition
# unit, and leave as a line. Sums over rows, for the gradients to gains, stay in VMEM over the whole grid.

GROUP = 32  # rows at once: a tile of int8
MOST_ROWS = 512  # of a block
ALIVE = 12  # arrays of a group in float32 that are alive at once, at most


def supports(width: int, gains: int, dtype: Any, inputs: int = 1, outputs: int = 1) -> bool:
    """Whether the kernels take [rows, width] activations of this type with this many gain vectors.

    inputs, outputs: arrays of that size that the backward pass reads and writes.
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return False
    item = jnp.dtype(dtype).itemsize
    forward, backward = LANES * (2 * item + gains), GROUP * (inputs + outputs) * item
    return 2 * _whole(width) * max(forward, backward) <= _room(width, gains)


def _room(width: int, gains: int) -> int:
    """Bytes for blocks beside a group's arrays, the gains and the sums of their gradients."""
    return VMEM_BYTES - 4 * _whole(width) * (ALIVE * GROUP + 2 * gains * (1 + SUBLANES))


def _whole(width: int) -> int:
    return -(-width // LANES) * LANES


def forward(
    kind: str, sources: Sequence[jax.Array], norm_gain: jax.Array | None, gains: Sequence[jax.Array], eps: float
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Quantise the normed combination of `sources`, once for each of `gains`.

    kind: how the sources [M, D] are combined (`combine.combine`); norm_gain [D]: of a norm inside that combination;
    gains [D]: of the norm before the quantiser. Returns int8 codes [M, D] and float32 scales [M], one pair a gain.
    """
    (M, D), G, dtype = sources[0].shape, len(gains), sources[0].dtype
    vectors = [*([] if norm_gain is None else [norm_gain]), *gains]
    cut = _Cut(M, D, LANES, len(vectors), len(sources) * dtype.itemsize + G)

    def normed_codes(*refs):
        source_refs, gain_refs, refs = _split(refs, len(sources), len(vectors))
        code_refs, scale_refs, scale_rows = _split(refs, G, G)
        inner, outer = _gains(gain_refs, norm_gain is not None)

        def group(rows):
            x = _Combined(kind, [_load(ref, rows) for ref in source_refs], inner, eps, dtype).x
            rstd = _rstd(x, eps)
            for g, gain in enumerate(outer):
                # The maximum of x * gain needs no second pass for rstd: that is positive, and goes outside.
                largest = _largest(x * gain, rstd)
                code_refs[g][rows] = _codes(x * gain, rstd, largest)[1]
                scale_rows[g][rows] = jnp.broadcast_to(largest / TOP, (GROUP, LANES))

        cut.over(group)
        for ref, column in zip(scale_refs, scale_rows, strict=True):
            for first in range(0, cut.rows, LANES):
                ref[:, pl.ds(first, LANES)] = along_lanes(column[pl.ds(first, LANES)])

    results = [jax.ShapeDtypeStruct((M, D), jnp.int8)] * G + [jax.ShapeDtypeStruct((1, M), jnp.float32)] * G
    out = call(
        normed_codes,
        cut.grid,
        [cut.block] * len(sources) + [cut.vector] * len(vectors),
        [cut.block] * G + [pl.BlockSpec((1, cut.rows), lambda i: (0, i))] * G,
        results,
        scratch=[pltpu.VMEM((cut.rows, LANES), jnp.float32)] * G,
        parallel=1,
        name=f"{kind}_codes",
    )(*sources, *(gain[None] for gain in vectors))
    return list(out[:G]), [scales[0] for scales in out[G:]]


class Gradients(NamedTuple):
    """What `backward` returns; [M, D] and [D]."""

    sources: list[jax.Array]
    norm_gain: jax.Array | None
    gains: list[jax.Array]
    inputs: list[jax.Array]  # the quantised ones, once for each gain


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
    row_factors: None = None,
    dcopy: jax.Array | None = None,
) -> Gradients:
    """Compute the gradients of `forward`, straight through the quantiser, to sources and gains; and the codes again.

    scales [M]: as `forward` returned them, which are computed again. dinputs [M, D]: gradients to the quantised inputs,
    one a product, each yet to be multiplied by its factor (float32, [products], None for ones); with a single gain they
    are summed. dcopy [M, D]: an extra gradient for the first source (from the residual), added to the one that is
    computed here. Gradients to sources come in their type and not as codes, so `row_factors` has to be None.

    The gradients to sources come in their type, those to gains in float32. The gradient to the weights needs the codes,
    [M, D] one for each of gains: times their scale and in the sources' type or, `as_codes`, as they are.
    """
    assert row_factors is None
    (M, D), S, G, dtype = sources[0].shape, len(sources), len(gains), sources[0].dtype
    vectors = [*([] if norm_gain is None else [norm_gain]), *gains]
    inputs = [*sources, *dinputs, *([] if dcopy is None else [dcopy])]
    scalars = [] if factors is None else [factors]
    cut = _Cut(M, D, GROUP, len(vectors), (len(inputs) + S + G) * dtype.itemsize)

    def normed_codes_backward(*refs):
        source_refs, dy_refs, dcopy_refs, gain_refs, factor_refs, refs = _split(
            refs, S, len(dinputs), len(inputs) - S - len(dinputs), len(vectors), len(scalars)
        )
        dsource_refs, input_refs, sum_refs = _split(refs, S, G)
        inner, outer = _gains(gain_refs, norm_gain is not None)
        cut.zero_at_start(sum_refs)
        inside = cut.inside()

        def group(rows):
            dys = [_load(ref, rows) for ref in dy_refs]
            dys = [dy * ref[i] for ref in factor_refs for i, dy in enumerate(dys)] or dys
            dys = dys if len(dys) == G else [sum(dys[1:], dys[0])]
            made = _Combined(kind, [_load(ref, rows) for ref in source_refs], inner, eps, dtype)
            x, rstd = made.x, _rstd(made.x, eps)
            for gain, ref in zip(outer, input_refs, strict=True):  # the codes of `forward`, or those times their scale
                largest = _largest(x * gain, rstd)
                values, codes = _codes(x * gain, rstd, largest)
                ref[rows] = codes if as_codes else (values * (largest / TOP)).astype(dtype)
            through = [dy * gain for dy, gain in zip(dys, outer, strict=True)]
            dsources, dinner = made.pull(_norm_pull(x, rstd, sum(through[1:], through[0])))
            for ref in dcopy_refs:
                dsources[0] = dsources[0] + _load(ref, rows)
            for ref, d in zip(dsource_refs, dsources, strict=True):
                ref[rows] = d.astype(dtype)
            for ref, d in zip(sum_refs, [*dinner, *(dy * (x * rstd) for dy in dys)], strict=True):
                ref[...] += inside(rows, d).reshape(-1, SUBLANES, D).sum(axis=0)

        cut.over(group)

    sums = jax.ShapeDtypeStruct((SUBLANES, D), jnp.float32)
    made = [jax.ShapeDtypeStruct((M, D), dtype)] * S
    again = [jax.ShapeDtypeStruct((M, D), jnp.int8 if as_codes else dtype)] * G
    in_scalar_memory = pl.BlockSpec(memory_space=pltpu.SMEM)
    out = call(
        normed_codes_backward,
        cut.grid,
        [cut.block] * len(inputs) + [cut.vector] * len(vectors) + [in_scalar_memory] * len(scalars),
        [cut.block] * (S + G) + [cut.sums] * len(vectors),
        [*made, *again, *[sums] * len(vectors)],
        name=f"{kind}_codes_backward",
    )(*inputs, *(gain[None] for gain in vectors), *scalars)
    dvectors = [a.sum(axis=0) for a in out[S + G :]]
    dnorm_gain = dvectors.pop(0) if norm_gain is not None else None
    return Gradients(list(out[:S]), dnorm_gain, dvectors, list(out[S : S + G]))


class _Cut:
    """How [M, D] is cut into blocks of whole rows, and the loop over the groups of a block."""

    def __init__(self, M: int, D: int, unit: int, gains: int, bytes_of_an_element: int):
        # Every block is there twice: one is copied while the other is used.
        fitting = _room(D, gains) // (2 * _whole(D) * bytes_of_an_element) // unit * unit
        self.M, self.rows = M, max(unit, min(MOST_ROWS, fitting, -(-M // unit) * unit))
        self.grid = (-(-M // self.rows),)
        self.block = pl.BlockSpec((self.rows, D), lambda i: (i, 0))
        self.vector, self.sums = pl.BlockSpec((1, D), lambda i: (0, 0)), pl.BlockSpec((SUBLANES, D), lambda i: (0, 0))

    def over(self, group: Any) -> None:
        """Call `group` with the places of the rows of each group."""
        lax.fori_loop(0, self.rows // GROUP, lambda i, _: group(pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)), None)

    def zero_at_start(self, refs: Sequence[Any]) -> None:
        """Set sums over all rows to zero in the first block."""

        @pl.when(pl.program_id(0) == 0)
        def _():
            for ref in refs:
                ref[...] = jnp.zeros_like(ref)

    def inside(self) -> Any:
        """Return a function that sets rows beyond the end to zero."""
        if self.M % self.rows == 0:
            return lambda rows, a: a
        first = pl.program_id(0) * self.rows

        def zeroed(rows: Any, a: jax.Array) -> jax.Array:
            row = first + rows.start + lax.broadcasted_iota(jnp.int32, a.shape, 0)
            return jnp.where(row < self.M, a, 0.0)

        return zeroed


class _Combined:
    """`combine.combine` of a group of rows, rounded where that rounds and kept in float32, and its gradients.

    silu(h) = h s has the derivative s (1 + h (1 - s)), s the sigmoid of h.
    """

    gate: Any  # the sigmoid of the source that gates the other; None where none does

    def __init__(self, kind: str, sources: list[jax.Array], gain: jax.Array | None, eps: float, dtype: Any):
        rounded = lambda a: a.astype(dtype).astype(jnp.float32)
        self.kind, self.sources, self.gain = kind, sources, gain
        self.gate = None if kind == "norm" else jax.nn.sigmoid(sources[0 if kind == "swiglu" else 1])
        if gain is None:
            assert self.gate is not None
            self.x = rounded(sources[0] * self.gate * sources[1])
            return
        self.rstd = _rstd(sources[0], eps)
        self.x = rounded(sources[0] * self.rstd * gain)
        if self.gate is not None:
            self.x = rounded(self.x * sources[1] * self.gate)

    def pull(self, dx: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return the gradients to sources, and to the gain if there is one, given that to x."""
        first, gate = self.sources[0], self.gate
        if self.gain is None:
            through = dx * gate
            return [through * self.sources[1] * (1 + first * (1 - gate)), through * first], []
        normed = first * self.rstd
        dnormed = dx if gate is None else dx * self.sources[1] * gate
        dfirst = _norm_pull(first, self.rstd, dnormed * self.gain)
        if gate is None:
            return [dfirst], [dnormed * normed]
        slope = gate * (1 + self.sources[1] * (1 - gate))
        return [dfirst, dx * normed * self.gain * slope], [dnormed * normed]


def _norm_pull(x: jax.Array, rstd: jax.Array, through: jax.Array) -> jax.Array:
    """The gradient to x of x * rstd(x), given that to the product."""
    normed = x * rstd
    return rstd * (through - normed * jnp.mean(normed * through, axis=1, keepdims=True))


def _rstd(x: jax.Array, eps: float) -> jax.Array:
    return lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)


def _largest(scaled: jax.Array, rstd: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.max(jnp.abs(scaled), axis=1, keepdims=True) * rstd, SMALLEST)


def _codes(scaled: jax.Array, rstd: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """scaled * rstd in units of largest / TOP, as whole float32 numbers and as int8."""
    values = jnp.round(scaled * (rstd * TOP / largest))
    return values, values.astype(jnp.int32).astype(jnp.int8)


def _gains(refs: Sequence[Any], has_inner: bool) -> tuple[jax.Array | None, list[jax.Array]]:
    """That of the norm inside, and those before the quantiser, [1, D] each."""
    found = [ref[...] for ref in refs]
    return (found[0], found[1:]) if has_inner else (None, found)


def _load(ref: Any, rows: Any) -> jax.Array:
    return ref[rows].astype(jnp.float32)


def _split(items: Sequence, *counts: int) -> list:
    """The first `counts` items of a sequence in groups, and the rest."""
    groups, at = [], 0
    for count in counts:
        groups.append(items[at : at + count])
        at += count
    return [*groups, items[at:]]
