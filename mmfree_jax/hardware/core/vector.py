"""The vector unit: vectors on the chip, lanes that compute with them, maxima and sums of squares."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.core.lane import SHIFT_BITS, SQUARE_STAGE, Lane, clip
from mmfree_jax.hardware.cycles import LANE_STAGES, READ_STAGES, REDUCE_STAGES
from mmfree_jax.hardware.instructions import A, B, C, CoreShape, D

SQUARES = 50  # bits of a sum of squares
COUNT = 16  # bits of a number of beats


def tree(m: Module, values: list, combine) -> tuple[Signal, int]:
    """Combine values in pairs, a register after each level. Returns the result and the levels."""
    levels = 0
    while len(values) > 1:
        values = [
            *(combine(x, y) for x, y in zip(values[::2], values[1::2], strict=False)),
            *values[len(values) & ~1 :],
        ]
        registers = [Signal(unsigned(len(value))) for value in values]
        m.d.sync += [register.eq(value) for register, value in zip(registers, values, strict=True)]
        values, levels = registers, levels + 1
    return values[0], levels


class VectorUnit(Component):
    """Runs one VECTOR instruction, or the results of one TERNARY, in beats of `lanes` elements.

    The sequencer holds the settings from `start` until `done`. A beat begins when all that it reads is there: beats
    from memory (`beat`), accumulators (`sums`), room in the writer. Each goes to the vectors, to the ternary unit as
    codes, to the writer, or out of the core.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape, lanes, depth = shape, shape.lanes, shape.bases()[-1]
        address = range(depth)
        super().__init__({
            "start": In(1), "done": Out(1),
            "a_kind": In(A), "b_kind": In(B), "c_kind": In(C), "d_kind": In(D), "beats": In(COUNT),
            "a_base": In(address), "b_base": In(address), "c_base": In(address), "d_base": In(address),
            "a_shift": In(4), "b_shift": In(4), "scalar": In(signed(fixed.OPERAND)), "shift": In(SHIFT_BITS),
            "beat": In(fixed.WORD * lanes), "beat_valid": In(1), "beat_ready": Out(1),
            "sums": In(24 * lanes), "sums_valid": In(1), "sums_ready": Out(1),
            "room": In(1), "reserve": Out(1),
            "result": Out(fixed.WORD * lanes), "result_index": Out(COUNT),
            "codes": Out(fixed.CODE * lanes), "codes_valid": Out(1), "logits_valid": Out(1), "store_valid": Out(1),
            "largest": Out(fixed.WORD - 1), "square": Out(SQUARES),
        })  # fmt: skip

    def elaborate(self, platform):
        m, lanes = Module(), self.core_shape.lanes
        memory = Memory(shape=unsigned(fixed.WORD * lanes), depth=self.core_shape.bases()[-1], init=[])
        m.submodules.memory = memory
        a_port, b_port, c_port, write = *(memory.read_port() for _ in range(3)), memory.write_port()

        # Issue: the next beat, as soon as what it reads is there.
        issued, active = Signal(COUNT), Signal()
        streams, sums = Signal(), Signal()
        m.d.comb += streams.eq((self.a_kind == A.STREAM) | (self.b_kind == B.STREAM) | (self.c_kind == C.STREAM))
        m.d.comb += sums.eq(self.a_kind == A.ACCUMULATORS)
        stores = self.d_kind == D.MEMORY
        issue, last = Signal(), Signal()
        m.d.comb += [
            issue.eq(active & (~streams | self.beat_valid) & (~sums | self.sums_valid) & (~stores | self.room)),
            last.eq(issued + 1 == self.beats),
            self.beat_ready.eq(issue & streams),
            self.sums_ready.eq(issue & sums),
            self.reserve.eq(issue & stores),
            a_port.addr.eq(self.a_base + issued),
            b_port.addr.eq(self.b_base + issued),
            c_port.addr.eq(self.c_base + issued),
        ]
        with m.If(self.start):
            m.d.sync += [active.eq(1), issued.eq(0)]
        with m.Elif(issue):
            m.d.sync += [issued.eq(issued + 1), active.eq(~last)]

        beat, sums1 = Signal.like(self.beat), Signal.like(self.sums)
        m.d.sync += [beat.eq(self.beat), sums1.eq(self.sums)]
        results, squares = [], []
        for lane in range(lanes):
            unit = Lane()
            m.submodules[f"lane{lane}"] = unit
            word = slice(fixed.WORD * lane, fixed.WORD * (lane + 1))
            self._operands(m, unit, lane, beat, sums1, a_port.data[word], b_port.data[word], c_port.data[word])
            results.append(unit.d)
            squares.append(unit.square)

        # What arrives, so many cycles after its issue; the last beat of the instruction carries a mark.
        arrived = self._delay(m, issue, READ_STAGES + LANE_STAGES)
        squared = self._delay(m, issue, READ_STAGES + SQUARE_STAGE)
        ended = self._delay(m, issue & last, READ_STAGES + LANE_STAGES)
        m.d.comb += [
            self.result.eq(Cat(*results)),
            self.codes.eq(Cat(*(clip(d, fixed.CODE) for d in results))),
            write.addr.eq(self.d_base + self.result_index),
            write.data.eq(self.result),
            write.en.eq(arrived & ((self.d_kind == D.SLOT) | stores)),
            self.codes_valid.eq(arrived & (self.d_kind == D.CODES)),
            self.logits_valid.eq(arrived & (self.d_kind == D.LOGITS)),
            self.store_valid.eq(arrived & stores),
        ]
        with m.If(self.start):
            m.d.sync += self.result_index.eq(0)
        with m.Elif(arrived):
            m.d.sync += self.result_index.eq(self.result_index + 1)
        self._reduce(m, results, squares, arrived, squared, ended)
        return m

    def _operands(self, m: Module, unit: Lane, lane: int, beat, sums, a_word, b_word, c_word) -> None:
        """Choose what a lane computes with."""
        short = beat[16 * self.core_shape.lanes :].word_select(lane, 16).as_signed()
        long = beat.word_select(lane, fixed.WORD).as_signed()
        a, b, c = Signal.like(unit.a), Signal.like(unit.b), Signal.like(unit.c)
        with m.Switch(self.a_kind):
            with m.Case(A.SLOT):
                m.d.comb += a.eq(a_word.as_signed())
            with m.Case(A.STREAM):
                m.d.comb += a.eq(short)
            with m.Case(A.ACCUMULATORS):
                m.d.comb += a.eq(sums.word_select(lane, 24).as_signed())
        m.d.comb += b.eq(Mux(self.b_kind == B.STREAM, short, b_word.as_signed()))
        with m.Switch(self.c_kind):
            with m.Case(C.SLOT):
                m.d.comb += c.eq(c_word.as_signed())
            with m.Case(C.STREAM):
                m.d.comb += c.eq(long)
        m.d.sync += [unit.a.eq(a), unit.b.eq(b), unit.c.eq(c)]
        for name in ("b_kind", "a_shift", "b_shift", "scalar", "shift"):
            m.d.comb += getattr(unit, name).eq(getattr(self, name))

    def _delay(self, m: Module, bit, cycles: int) -> Signal:
        bits = Signal(cycles)
        m.d.sync += bits.eq(Cat(bit, bits[:-1]))
        return bits[-1]

    def _reduce(self, m: Module, results: list, squares: list, arrived, squared, ended) -> None:
        """Maximum of |d| and sum of a^2: in each lane for itself, then over lanes."""
        maxima, sums = [], []
        for d, square in zip(results, squares, strict=True):
            magnitude, maximum, total = Signal(fixed.WORD - 1), Signal(fixed.WORD - 1), Signal(SQUARES)
            m.d.sync += magnitude.eq(Mux(d < 0, -d, d))
            with m.If(self.start):
                m.d.sync += [maximum.eq(0), total.eq(0)]
            with m.Else():
                with m.If(self._delay(m, arrived, 1) & (magnitude > maximum)):
                    m.d.sync += maximum.eq(magnitude)
                with m.If(squared):
                    m.d.sync += total.eq(total + square)
            maxima.append(maximum)
            sums.append(total)
        largest, levels = tree(m, maxima, lambda x, y: Mux(x > y, x, y))
        square, _ = tree(m, sums, lambda x, y: (x + y)[:SQUARES])
        m.d.comb += [
            self.largest.eq(largest),
            self.square.eq(square),
            self.done.eq(self._delay(m, ended, REDUCE_STAGES + levels)),
        ]
