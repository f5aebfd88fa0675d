"""The recurrence h_t = F_t h_{t-1} + x_t in one pass over memory each way, with the MLGRU's gates or without (Pallas
Mosaic TPU). Signatures are those of `hopper.recurrence`.

With a floor [D] c and f are projections and a step is h = keep F h + (1 - F) silu(c), F = floor + (1 - floor)
sigmoid(f). Without one (None) they are input and factor themselves: h = keep f h + c.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmfree_jax.ops.fast.tpu.mosaic import LANES, along_rows, call, wider

# The grid is (sequence, block of channels, block of time), time walked in order with the state in scratch. Within a
# block time goes in groups of 16 steps, two registers of rows: a step is h -> a h + x, and a parallel prefix over the
# rows of a group (four rounds of rotations, Martin & Cundy 2018, arXiv 1709.04057) finds what each of its 16 beginnings
# does to a state. Then one multiplication and one addition give all 16 states: what has to wait for the state before is
# a sixteenth of a plain loop's, and no row of a register is idle.
#
# T and D are not filled up. Where a block hangs over the end, its reads beyond it are undefined and its writes there
# are dropped; steps beyond the end get factor one and input zero, and so keep the state.

TILE = 1, 1  # steps and channels that arrays have to be whole multiples of
STEPS, CHANNELS = 256, 512  # of a block
GROUP = 16  # steps at once: a tile of bfloat16


def segments(batch: int, time: int, width: int) -> int:
    """Return into how many pieces time is cut: a core walks over all of it anyway."""
    return 1


def segment_ends(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None, keep_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(decay, end), both [B, D] in float32: a row that starts in state h ends in decay * h + end."""
    walk, gated = _Walk(c_BTD.shape), floor_D is not None

    def segment_ends_walk(c_ref, f_ref, *refs):
        *floor_ref, keep_ref, decay_ref, end_ref, keep_rows = refs
        inside = walk.start([(decay_ref, 1.0), (end_ref, 0.0)], keep_ref, keep_rows)

        def group(g, carry):
            decay, h = carry
            rows, keep = walk.rows(g), walk.keep(keep_rows, g)
            a, x = _step(_load(c_ref, rows), _load(f_ref, rows), floor_ref, keep)
            a, x = inside(g, (a, 1.0), (x, 0.0))
            a, x = _prefix(a, x)
            return decay * a[-1:], a[-1:] * h + x[-1:]

        decay_ref[...], end_ref[...] = walk.over(group, (decay_ref[...], end_ref[...]))

    streams = [c_BTD, f_BTD, *walk.floor(floor_D), walk.filled(keep_BT)]
    specs = [walk.steps, walk.steps, *([walk.vector] if gated else []), walk.weights]
    decay, end = walk.call(segment_ends_walk, specs, [walk.state] * 2, [walk.a_state] * 2)(*streams)
    return decay[:, 0], end[:, 0]


def segment_starts(f_BTD: jax.Array, floor_D: jax.Array | None, keep_BT: jax.Array, dout_BTD: jax.Array) -> jax.Array:
    """Gradient [B, D] in float32 to the state before each row, if none comes from after it."""
    walk, gated = _Walk(f_BTD.shape, backward=True), floor_D is not None

    def segment_starts_walk(f_ref, *refs):
        *floor_ref, keep_ref, dout_ref, dstart_ref, keep_rows = refs
        inside = walk.start([(dstart_ref, 0.0)], keep_ref, keep_rows)

        def group(g, passed):
            rows, keep = walk.rows(g), walk.keep(keep_rows, g)
            a = keep * _factor(_load(f_ref, rows), floor_ref)
            a, x = inside(g, (a, 1.0), (a * _load(dout_ref, rows), 0.0))
            a, x = _prefix(a, x, reverse=True)
            return a[:1] * passed + x[:1]

        dstart_ref[...] = walk.over(group, dstart_ref[...])

    streams = [f_BTD, *walk.floor(floor_D), walk.filled(keep_BT), dout_BTD]
    specs = [walk.steps, *([walk.vector] if gated else []), walk.weights, walk.steps]
    return walk.call(segment_starts_walk, specs, [walk.state], [walk.a_state])(*streams)[0][:, 0]


def forward(
    c_BTD: jax.Array, f_BTD: jax.Array, floor_D: jax.Array | None, h_BD: jax.Array, keep_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All states, and the last one.

    c_BTD, f_BTD: bfloat16 or float32; floor_D, h_BD (initial state), keep_BT (0 where the state is forgotten, else 1):
    float32. Returns h_BTD in c's type and the last state [B, D] in float32.
    """
    walk, gated = _Walk(c_BTD.shape), floor_D is not None

    def recurrence(c_ref, f_ref, *refs):
        *floor_ref, h_ref, keep_ref, out_ref, last_ref, keep_rows = refs
        inside = walk.start([(last_ref, h_ref[...])], keep_ref, keep_rows)

        def group(g, h):
            rows, keep = walk.rows(g), walk.keep(keep_rows, g)
            a, x = _step(_load(c_ref, rows), _load(f_ref, rows), floor_ref, keep)
            a, x = inside(g, (a, 1.0), (x, 0.0))
            a, x = _prefix(a, x)
            states = a * h + x
            out_ref[rows] = states.astype(out_ref.dtype)
            return states[-1:]

        last_ref[...] = walk.over(group, last_ref[...])

    streams = [c_BTD, f_BTD, *walk.floor(floor_D), h_BD[:, None], walk.filled(keep_BT)]
    specs = [walk.steps, walk.steps, *([walk.vector] if gated else []), walk.state, walk.weights]
    results = [jax.ShapeDtypeStruct(c_BTD.shape, c_BTD.dtype), walk.a_state]
    out, last = walk.call(recurrence, specs, [walk.steps, walk.state], results)(*streams)
    return out, last[:, 0]


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
    # With p_t what step t passes on to the state before it: g_t = dout_t + p_{t+1} is the gradient to the state after
    # step t, and p_t = a_t (p_{t+1} + dout_t), a recurrence that runs backward.
    walk, gated = _Walk(f_BTD.shape, backward=True), floor_D is not None
    streams = [a for a in (c_BTD if gated else None, f_BTD, out_BTD, dout_BTD) if a is not None]

    def recurrence_backward(*refs):
        *c_ref, f_ref, out_ref, dout_ref = refs[: len(streams)]
        before_ref, *floor_ref, h_ref, keep_ref, dlast_ref = refs[len(streams) : -5]
        dc_ref, df_ref, dfloor_ref, dh_ref, keep_rows = refs[-5:]
        inside = walk.start([(dfloor_ref, 0.0), (dh_ref, dlast_ref[...])], keep_ref, keep_rows)
        # The state before the first step of the block is the last of the block before, or the initial one.
        before = jnp.where(walk.first(), h_ref[...], _load(before_ref, slice(None))[-1:])
        row = lax.broadcasted_iota(jnp.int32, (GROUP, walk.channels), 0)

        def group(g, carry):
            passed, dfloor = carry
            rows, keep = walk.rows(g), walk.keep(keep_rows, g)
            f, dout = _load(f_ref, rows), _load(dout_ref, rows)
            factor = _factor(f, floor_ref)
            a, x, dout = inside(g, (keep * factor, 1.0), (keep * factor * dout, 0.0), (dout, 0.0))
            a, x = _prefix(a, x, reverse=True)
            p = a * passed + x
            gradient = dout + jnp.where(row == GROUP - 1, passed, _turned(p, -1))
            earlier = _load(out_ref, walk.rows(jnp.maximum(walk.group(g) - 1, 0), absolute=True))[-1:]
            earlier = jnp.where(walk.group(g) == 0, before, earlier)
            h = keep * jnp.where(row == 0, earlier, _turned(_load(out_ref, rows), 1))
            if not gated:
                dc, df = gradient, gradient * h
            else:
                c, floor = _load(c_ref[0], rows), floor_ref[0][...]
                gate, open_c = jax.nn.sigmoid(f), jax.nn.sigmoid(c)
                dfactor = gradient * (h - c * open_c)
                dc = gradient * (1 - factor) * open_c * (1 + c * (1 - open_c))
                df = dfactor * (1 - floor) * gate * (1 - gate)
                (more,) = inside(g, (dfactor * (1 - gate), 0.0))
                dfloor = dfloor + jnp.sum(more, axis=0, keepdims=True)
            dc_ref[rows], df_ref[rows] = dc.astype(dc_ref.dtype), df.astype(df_ref.dtype)
            return p[:1], dfloor

        dh_ref[...], dfloor_ref[...] = walk.over(group, (dh_ref[...], dfloor_ref[...]))

    vectors = [*walk.floor(floor_D), h_BD[:, None], walk.filled(keep_BT), dlast_BD[:, None]]
    specs = [*([walk.vector] if gated else []), walk.state, walk.weights, walk.state]
    steps = jax.ShapeDtypeStruct(f_BTD.shape, f_BTD.dtype)
    dc, df, dfloor, dh = walk.call(
        recurrence_backward,
        [walk.steps] * len(streams) + [walk.before, *specs],
        [walk.steps, walk.steps, walk.state, walk.state],
        [steps, steps, walk.a_state, walk.a_state],
    )(*streams, out_BTD, *vectors)
    return dc, df, dfloor[:, 0], dh[:, 0]


class _Walk:
    """A walk over [B, T, D] in blocks of time, forward or backward: how arrays are cut, and the loop over groups."""

    def __init__(self, shape: tuple[int, ...], backward: bool = False):
        B, T, D = shape
        self.T, self.backward = T, backward
        self.length = min(STEPS, -(-T // LANES) * LANES)
        self.channels = min(CHANNELS, -(-D // LANES) * LANES)
        self.blocks = -(-T // self.length)
        self.grid = B, -(-D // self.channels), self.blocks
        self.a_state = jax.ShapeDtypeStruct((B, 1, D), jnp.float32)
        at = (lambda i: self.blocks - 1 - i) if backward else (lambda i: i)
        of_a_block, tiles = (None, self.length, self.channels), self.length // GROUP
        self.steps = pl.BlockSpec(of_a_block, lambda b, d, i: (b, at(i), d))
        # The tile before a block; before the first block any will do.
        self.before = pl.BlockSpec((None, GROUP, self.channels), lambda b, d, i: (b, at(i) * tiles - (at(i) > 0), d))
        self.weights = pl.BlockSpec((None, 1, self.length), lambda b, d, i: (b, 0, at(i)))
        self.state = pl.BlockSpec((None, 1, self.channels), lambda b, d, i: (b, 0, d))
        self.vector = pl.BlockSpec((1, self.channels), lambda b, d, i: (0, d))

    def call(self, body: Any, inputs: list, outputs: list, results: list) -> Any:
        """Return the kernel, whose scratch holds `keep` in rows."""
        keep_rows = pltpu.VMEM((self.length, LANES), jnp.float32)
        return call(body, self.grid, inputs, outputs, results, scratch=[keep_rows], parallel=2, name=body.__name__)

    def filled(self, keep_BT: jax.Array) -> jax.Array:
        """[B, 1, whole blocks of time]."""
        return jnp.pad(keep_BT, ((0, 0), (0, -self.T % self.length)), constant_values=1)[:, None]

    def floor(self, floor_D: jax.Array | None) -> list[jax.Array]:
        """[1, D], if there is one."""
        return [] if floor_D is None else [floor_D[None]]

    def start(self, states: list, keep_ref: Any, keep_rows: Any) -> Callable[..., list[jax.Array]]:
        """Give the states that are carried their first value in the first block, and turn `keep` into rows.

        Returns a function of a group and of pairs: each array, with its other value at steps beyond the end of time.
        """

        @pl.when(pl.program_id(2) == 0)
        def _():
            for ref, value in states:
                ref[...] = jnp.broadcast_to(value, ref.shape)

        for first in range(0, self.length, LANES):
            keep_rows[pl.ds(first, LANES)] = along_rows(keep_ref[:, pl.ds(first, LANES)])
        block = self.blocks - 1 - pl.program_id(2) if self.backward else pl.program_id(2)

        def inside(i: Any, *pairs: tuple[jax.Array, float]) -> list[jax.Array]:
            step = block * self.length + self.group(i) * GROUP
            step = step + lax.broadcasted_iota(jnp.int32, (GROUP, self.channels), 0)
            return [jnp.where(step < self.T, array, other) for array, other in pairs]

        return inside if self.T % self.length else lambda _, *pairs: [array for array, _ in pairs]

    def first(self) -> jax.Array:
        """Whether this block is the first in time."""
        return pl.program_id(2) == (self.blocks - 1 if self.backward else 0)

    def group(self, i: Any) -> Any:
        """The place in time of the i-th group of the walk."""
        return self.length // GROUP - 1 - i if self.backward else i

    def rows(self, i: Any, absolute: bool = False) -> Any:
        """The rows of the i-th group of the walk, or of the i-th in time."""
        return pl.ds(pl.multiple_of((i if absolute else self.group(i)) * GROUP, GROUP), GROUP)

    def keep(self, keep_rows: Any, i: Any) -> jax.Array:
        """[GROUP, channels]"""
        return wider(keep_rows[self.rows(i)], self.channels)

    def over(self, group: Callable, carry: Any) -> Any:
        """Run the groups of a block in the walk's order."""
        return lax.fori_loop(0, self.length // GROUP, group, carry)


def _load(ref: Any, rows: Any) -> jax.Array:
    return ref[rows].astype(jnp.float32)


def _factor(f: jax.Array, floor: list) -> jax.Array:
    """On the state."""
    return floor[0][...] + (1 - floor[0][...]) * jax.nn.sigmoid(f) if floor else f


def _step(c: jax.Array, f: jax.Array, floor: list, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factor on the state, and what is added to it."""
    factor = _factor(f, floor)
    return keep * factor, (1 - factor) * c * jax.nn.sigmoid(c) if floor else c


def _turned(a: jax.Array, steps: int) -> jax.Array:
    """Rows moved by so many places, around the end."""
    return pltpu.roll(a, steps % GROUP, 0)


def _prefix(a: jax.Array, x: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """Of steps h -> a h + x in rows [GROUP, D]: what all steps up to each row do to a state; or from each row on."""
    row = lax.broadcasted_iota(jnp.int32, a.shape, 0)
    for distance in (1, 2, 4, 8):
        exists = row < GROUP - distance if reverse else row >= distance
        move = functools.partial(_turned, steps=-distance if reverse else distance)
        x = jnp.where(exists, a * move(x) + x, x)
        a = jnp.where(exists, a * move(a), a)
    return a, x
