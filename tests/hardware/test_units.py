"""The units of the core, each against the fixed-point arithmetic, in Amaranth's own simulator."""

import os

import numpy as np
import pytest

if "REQUIRE_SIMULATION" not in os.environ:  # else a missing package fails below
    pytest.importorskip("amaranth", reason="needs the extra `hardware`")

from amaranth.sim import Simulator

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.core.chooser import Chooser
from mmfree_jax.hardware.core.lane import SQUARE_STAGE, Lane
from mmfree_jax.hardware.core.memory import Gearbox, Reader, Writer
from mmfree_jax.hardware.core.norm import NormUnit
from mmfree_jax.hardware.core.ternary import TernaryUnit
from mmfree_jax.hardware.cycles import INNER, LANE_STAGES, QUANTISER, SCALE
from mmfree_jax.hardware.instructions import B, CoreShape
from mmfree_jax.hardware.tools import rtlil
from tests.hardware.small import integers

SHAPE = CoreShape(24, 3, 40, 60)


def simulate(unit, bench, *others) -> None:
    """Run coroutines on a unit until the first has ended."""
    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    for other in others:
        simulator.add_testbench(other, background=True)
    simulator.run()


@pytest.mark.parametrize("kind", B)
def test_a_lane_computes_the_specification(kind):
    rng, unit, count = np.random.default_rng(int(kind)), Lane(), 400
    a, b, c = (integers(rng, 32, count) for _ in range(3))
    a_shift, b_shift, shift = (int(rng.integers(*limits)) for limits in ((0, 15), (0, 15), (8, 20)))
    scalar = int(rng.integers(-(2**17), 2**17))
    results, squares = [], []

    async def bench(ctx):
        for name, value in {
            "b_kind": kind,
            "a_shift": a_shift,
            "b_shift": b_shift,
            "scalar": scalar,
            "shift": shift,
        }.items():
            ctx.set(getattr(unit, name), value)
        for step in range(count + LANE_STAGES):
            if step < count:
                for name, values in (("a", a), ("b", b), ("c", c)):
                    ctx.set(getattr(unit, name), int(values[step]))
            await ctx.tick()
            results.append(ctx.get(unit.d))
            squares.append(ctx.get(unit.square))

    simulate(unit, bench)
    left = fixed.operand(a, a_shift)
    right = {
        B.SLOT: fixed.operand(b, b_shift), B.STREAM: fixed.operand(b, b_shift),
        B.SIGMOID: fixed.sigmoid(b), B.SIGMOID_MINUS: fixed.sigmoid(-b),
    }.get(kind, np.int64(scalar))  # fmt: skip
    expected = fixed.saturate(c + fixed.shift_rounded(left * right, np.int64(shift)), 32)
    assert results[LANE_STAGES - 1 :][:count] == expected.tolist()
    assert squares[SQUARE_STAGE - 1 :][:count] == (left * left).tolist()


@pytest.mark.parametrize("shift", [0, 1, 35, 36, 63])
def test_every_shift_of_a_lane_rounds_and_saturates_alike(shift):
    rng, unit, count = np.random.default_rng(shift), Lane(), 60
    a, c = integers(rng, 18, count), integers(rng, 32, count)
    results = []

    async def bench(ctx):
        ctx.set(unit.b_kind, B.ONE)
        ctx.set(unit.scalar, -(2**17))
        ctx.set(unit.shift, shift)
        for step in range(count + LANE_STAGES):
            ctx.set(unit.a, int(a[step % count]))
            ctx.set(unit.c, int(c[step % count]))
            await ctx.tick()
            results.append(ctx.get(unit.d))

    simulate(unit, bench)
    expected = fixed.saturate(c + fixed.shift_rounded(a * -(2**17), np.int64(shift)), 32)
    assert results[LANE_STAGES - 1 :][:count] == expected.tolist()


NORMS = [(999, 0, 0), (999, 2**20, 0), (2**31 - 1, 2**49, 2**47), (1, 1, 0), (0, 0, 0), (12345, 2**40 + 7, 3)]
NORMS += [(2**16, 2**32, 2**20), (2**20 - 1, 77, 9)]


@pytest.mark.parametrize("inner", [True, False])
def test_the_norm_unit_computes_the_specification_in_the_stated_time(inner):
    unit, rng = NormUnit(), np.random.default_rng(1)
    cases = [*NORMS, *([int(n) for n in 2 ** rng.uniform((0, 0, 0), (31, 49, 49))] for _ in range(15))]
    exponents = rng.integers(-40, 20, (len(cases), 3))
    exponents[:2] = [0, 18, 18], [0, -60, 18]  # zeros with large exponents: zeros all the same
    eps, floor, weight = (fixed.constant(v) for v in (1e-6, 512e-12, 0.0123))

    async def bench(ctx):
        for name, constant in (("eps", eps), ("floor", floor), ("weight", weight)):
            ctx.set(getattr(unit, name).mantissa, int(constant.mantissa))
            ctx.set(getattr(unit, name).exponent, int(constant.exponent))
        ctx.set(unit.inner, inner)
        for case, exponent in zip(cases, exponents.tolist(), strict=True):
            for name, v, e in zip(("maximum", "outer_square", "inner_square"), case, exponent, strict=True):
                ctx.set(getattr(unit, name).value, v)
                ctx.set(getattr(unit, name).exponent, e)
            ctx.set(unit.start, 1)
            await ctx.tick()
            ctx.set(unit.start, 0)
            ready = {}
            for cycle in range(1, 200):
                for name, signal in (("quantiser", unit.quantiser_ready), ("scale", unit.ready)):
                    if ctx.get(signal):
                        ready.setdefault(name, cycle)
                if ctx.get(unit.ready):
                    break
                await ctx.tick()
            assert ready == {"quantiser": QUANTISER, "scale": SCALE + INNER * inner}
            maximum, outer, before = (fixed.to_float(np.int64(v), e) for v, e in zip(case, exponent, strict=True))
            reciprocal = fixed.multiply(fixed.reciprocal(maximum), fixed.constant(127))
            assert ctx.get(unit.reciprocal.mantissa) == reciprocal.mantissa
            assert reciprocal.mantissa == 0 or ctx.get(unit.reciprocal.exponent) == reciprocal.exponent
            total = fixed.add(outer, fixed.add(fixed.multiply(before, eps), floor) if inner else floor)
            scale = fixed.multiply(fixed.multiply(fixed.reciprocal_root(total), maximum), weight)
            assert ctx.get(unit.scale.mantissa) == scale.mantissa
            assert scale.mantissa == 0 or ctx.get(unit.scale.exponent) == scale.exponent

    simulate(unit, bench)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (12, 2), (25, 37), (13, 60), (24, 3)])
def test_the_ternary_unit_computes_products_of_any_size(rows, columns):
    """Words come now and then, sums are taken now and then."""
    rng, unit = np.random.default_rng(rows), TernaryUnit(SHAPE)
    groups, padded = SHAPE.groups(rows), SHAPE.groups(rows) * SHAPE.rows
    matrix = np.pad(rng.integers(-1, 2, (rows, columns)), ((0, padded - rows), (0, 0)))
    codes = rng.integers(-128, 128, columns)
    codes[0] = -128
    words = [
        sum(int(w & 3) << 2 * r for r, w in enumerate(column))
        for group in np.split(matrix, groups)
        for column in group.T
    ]
    found = []

    async def bench(ctx):
        for beat in range(SHAPE.beats(columns)):
            part = [*codes[3 * beat : 3 * beat + 3].tolist(), 0, 0][:3]
            ctx.set(unit.codes, sum((int(code) & 255) << 8 * n for n, code in enumerate(part)))
            ctx.set(unit.codes_index, beat)
            ctx.set(unit.codes_valid, 1)
            await ctx.tick()
        ctx.set(unit.codes_valid, 0)
        for _ in range(2):  # a second product begins where the first has ended
            rest, taken = list(words), []
            ctx.set(unit.groups, groups)
            ctx.set(unit.depth, columns)
            ctx.set(unit.start, 1)
            await ctx.tick()
            ctx.set(unit.start, 0)
            for _ in range(100 + 40 * groups * columns):  # enough, however seldom words come
                ctx.set(unit.word, rest[0] if rest else 0)
                ctx.set(unit.word_valid, bool(rest) and bool(rng.integers(0, 4)))
                ctx.set(unit.sums_ready, bool(rng.integers(0, 2)))
                await ctx.delay(0)
                if ctx.get(unit.word_ready):
                    assert ctx.get(unit.word_valid)
                    rest.pop(0)
                if ctx.get(unit.sums_valid) and ctx.get(unit.sums_ready):
                    sums = ctx.get(unit.sums)
                    taken += [(sums >> 24 * n & 0xFFFFFF ^ 0x800000) - 0x800000 for n in range(3)]
                await ctx.tick()
            found.append(taken[:rows])

    simulate(unit, bench)
    assert found == [(matrix @ codes)[:rows].tolist()] * 2


def test_the_ternary_unit_has_no_multiplier():
    text = rtlil(TernaryUnit(SHAPE))
    assert "cell $add" in text
    assert "cell $mul" not in text


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [CoreShape(24, 3, 40, 60), CoreShape(32, 2, 40, 60), CoreShape(8, 1, 9, 9)], ids=str)
def test_the_gearbox_joins_words_and_takes_no_more_than_it_needs(shape, wide):
    rng, unit, beats, bits = np.random.default_rng(0), Gearbox(shape), 7, shape.memory_bits
    per_beat = shape.words * (2 if wide else 1)
    words = [int(rng.integers(0, 2**bits)) for _ in range(2 * beats * per_beat)]
    found, position = [], 0

    async def bench(ctx):
        nonlocal position
        for _ in range(2):
            ctx.set(unit.beats, beats)
            ctx.set(unit.wide, wide)
            ctx.set(unit.start, 1)
            await ctx.tick()
            ctx.set(unit.start, 0)
            for _ in range(12 * beats * per_beat):
                ctx.set(unit.word, words[position] if position < len(words) else 0)
                ctx.set(unit.word_valid, position < len(words) and bool(rng.integers(0, 3)))
                ctx.set(unit.beat_ready, bool(rng.integers(0, 3)))
                await ctx.delay(0)
                if ctx.get(unit.beat_valid) and ctx.get(unit.beat_ready):
                    found.append(ctx.get(unit.beat) >> (0 if wide else 16 * shape.lanes))
                position += ctx.get(unit.word_ready)
                await ctx.tick()
            assert position == beats * per_beat * (len(found) // beats)

    simulate(unit, bench)
    assert found == [
        sum(word << bits * n for n, word in enumerate(words[i : i + per_beat])) for i in range(0, len(words), per_beat)
    ]


def test_the_writer_keeps_beats_in_order_and_its_promises():
    rng, unit = np.random.default_rng(0), Writer(SHAPE)
    beats = [int.from_bytes(rng.bytes(12), "little") for _ in range(40)]
    written = []

    async def memory(ctx):
        while True:
            ctx.set(unit.write_ready, bool(rng.integers(0, 2)))
            await ctx.delay(0)
            if ctx.get(unit.write_valid) and ctx.get(unit.write_ready):
                written.append((ctx.get(unit.write_address), ctx.get(unit.write_data)))
            await ctx.tick()

    async def bench(ctx):
        ctx.set(unit.address, 1000)
        ctx.set(unit.start, 1)
        await ctx.tick()
        ctx.set(unit.start, 0)
        waiting, rest = [], list(beats)  # reserved beats arrive five cycles later
        for _ in range(1000):
            room = bool(ctx.get(unit.room)) and bool(rest)
            ctx.set(unit.reserve, room)
            waiting = [(age + 1, beat) for age, beat in waiting] + ([(0, rest.pop(0))] if room else [])
            arrives = bool(waiting) and waiting[0][0] == 5
            ctx.set(unit.beat_valid, arrives)
            if arrives:
                ctx.set(unit.beat, waiting.pop(0)[1])
            assert not ctx.get(unit.idle) or not waiting or waiting[0][0] == 0
            await ctx.tick()
        ctx.set(unit.beat_valid, 0)
        ctx.set(unit.reserve, 0)
        for _ in range(1000):
            await ctx.tick()
        assert ctx.get(unit.idle)

    simulate(unit, bench, memory)
    expected = [beat >> 24 * n & 0xFFFFFF for beat in beats for n in range(4)]
    assert written == list(enumerate(expected, start=1000))


def test_the_reader_requests_its_loads_in_order_and_never_too_many():
    shape = CoreShape(24, 3, 40, 60, loads=4, queue=5)
    rng, unit = np.random.default_rng(0), Reader(shape)
    loads = [(100, 3, 11), (7, 9, 0), (0x12345678, 1, 0)]
    requests, taken, answers = [], [], []

    async def bench(ctx):
        ctx.set(unit.program_write, 1)
        for n, load in enumerate([*loads, (0, 0, 0)]):
            for part, word in enumerate(load):
                ctx.set(unit.program_address, (1 << 15) + 4 * n + part)
                ctx.set(unit.program_data, word)
                await ctx.tick()
        ctx.set(unit.program_address, 4)  # of an instruction: none of its business
        ctx.set(unit.program_data, 999)
        await ctx.tick()
        ctx.set(unit.program_write, 0)
        for token in (0, 6):
            ctx.set(unit.token, token)
            ctx.set(unit.start, 1)
            await ctx.tick()
            ctx.set(unit.start, 0)
            for _ in range(150):
                ctx.set(unit.read_ready, bool(rng.integers(0, 2)))
                answer = bool(answers) and bool(rng.integers(0, 2))
                ctx.set(unit.data_valid, answer)
                if answer:
                    ctx.set(unit.data, answers.pop(0) & 0xFFFFFF)
                ctx.set(unit.beats_take, 0)
                await ctx.delay(0)
                if ctx.get(unit.word_valid) and rng.integers(0, 2):
                    ctx.set(unit.beats_take, 1)
                    taken.append(ctx.get(unit.word))
                if ctx.get(unit.read_valid) and ctx.get(unit.read_ready):
                    requests.append(ctx.get(unit.read_address))
                    answers.append(requests[-1])
                assert len(requests) - len(taken) <= 5 + 1  # one is being taken
                await ctx.tick()
            ctx.set(unit.beats_take, 0)

    simulate(unit, bench)
    expected = [
        a
        for token in (0, 6)
        for base, n, stride in loads
        for a in range(base + stride * token, base + stride * token + n)
    ]
    assert requests == expected
    assert taken == [address & 0xFFFFFF for address in expected]


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_chooser_takes_the_first_largest_of_the_tokens_that_exist(lanes):
    unit, limit = Chooser(CoreShape(24 if lanes == 3 else 8, lanes, 4, 4)), 10
    rows = [
        [5, 9, 2, 9, 1, 9, 0, 3, 9, 8], [-7, -9, -7, -8, -9, -9, -9, -7, -9, -9], [0] * 10,
        [-(2**31) + 1] * 10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 2**31 - 1],
    ]  # fmt: skip
    chosen = []

    async def bench(ctx):
        ctx.set(unit.limit, limit)
        for row in rows:
            padded = [*row, *[2**30] * (-limit % lanes)]
            ctx.set(unit.start, 1)
            await ctx.tick()
            ctx.set(unit.start, 0)
            ctx.set(unit.logits_valid, 1)
            for index in range(0, len(padded), lanes):
                ctx.set(
                    unit.logits, sum((v & 0xFFFFFFFF) << 32 * n for n, v in enumerate(padded[index : index + lanes]))
                )
                ctx.set(unit.index, index // lanes)
                await ctx.tick()
            ctx.set(unit.logits_valid, 0)
            ctx.set(unit.finish, 1)
            await ctx.tick()
            ctx.set(unit.finish, 0)
            for _ in range(2 * lanes):
                await ctx.tick()
            assert ctx.get(unit.ready)
            chosen.append(ctx.get(unit.token))

    simulate(unit, bench)
    assert chosen == [row.index(max(row)) for row in rows]
