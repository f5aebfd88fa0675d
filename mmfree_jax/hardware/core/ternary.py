"""The ternary unit: products of a matrix in {-1, 0, 1}, streamed from memory, with a vector of 8-bit codes."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware.arithmetic import CODE
from mmfree_jax.hardware.core.lane import add
from mmfree_jax.hardware.instructions import CoreShape

SUM = 24  # bits that a sum leaves with


class TernaryUnit(Component):
    """A word of memory is one column's weights of `rows` rows; each row adds the column's code, subtracts or skips it.

    After the last column of a group the sums move on to be taken, `lanes` a cycle, while the next group begins. A
    weight has two bits: not zero, negative. There is no multiplier.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape = shape
        self.columns = max(shape.width, shape.glu_width)
        super().__init__({
            "start": In(1), "groups": In(16), "depth": In(16),
            "codes": In(CODE * shape.lanes), "codes_valid": In(1), "codes_index": In(16),
            "word": In(shape.memory_bits), "word_valid": In(1), "word_ready": Out(1),
            "sums": Out(SUM * shape.lanes), "sums_valid": Out(1), "sums_ready": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m, shape = Module(), self.core_shape
        lanes, rows = shape.lanes, shape.rows
        memory = Memory(shape=unsigned(CODE * lanes), depth=shape.beats(self.columns), init=[])
        m.submodules.codes = memory
        port, write = memory.read_port(), memory.write_port()
        m.d.comb += [write.addr.eq(self.codes_index), write.data.eq(self.codes), write.en.eq(self.codes_valid)]

        # Stage 0: take a word. `lane` and `beat` say where the column's code lies. The last column of a group waits
        # until the sums of the group before have left.
        column, beat, lane = Signal(16), Signal(16), Signal(range(max(lanes, 2)))
        groups, busy, take = Signal(16), Signal(), Signal()
        last = column + 1 == self.depth
        m.d.comb += [
            take.eq((groups != 0) & self.word_valid & ~(last & busy)),
            self.word_ready.eq(take),
            port.addr.eq(beat),
        ]
        with m.If(self.start):
            m.d.sync += [groups.eq(self.groups), column.eq(0), beat.eq(0), lane.eq(0)]
        with m.Elif(take):
            m.d.sync += [column.eq(column + 1), lane.eq(lane + 1)]
            with m.If(lane == lanes - 1):
                m.d.sync += [lane.eq(0), beat.eq(beat + 1)]
            with m.If(last):
                m.d.sync += [column.eq(0), lane.eq(0), beat.eq(0), groups.eq(groups - 1)]

        # Stages 1 and 2: the code arrives, then every row adds.
        word1, lane1, valid1, first1, last1 = (Signal.like(s) for s in (self.word, lane, take, take, take))
        word2, code2, valid2, first2, last2 = Signal.like(word1), Signal(signed(CODE)), Signal(), Signal(), Signal()
        last3 = Signal()
        choices = Array(port.data.word_select(n, CODE).as_signed() for n in range(lanes))
        m.d.sync += [
            word1.eq(self.word),
            lane1.eq(lane),
            valid1.eq(take),
            first1.eq(column == 0),
            last1.eq(take & last),
        ]
        m.d.sync += [word2.eq(word1), code2.eq(choices[lane1]), valid2.eq(valid1)]
        m.d.sync += [first2.eq(first1), last2.eq(last1), last3.eq(last2)]
        bits = (self.columns * 2 ** (CODE - 1)).bit_length() + 1
        sums = [Signal(signed(bits), name=f"sum{row}") for row in range(rows)]
        for row, total in enumerate(sums):
            nonzero, negative = word2[2 * row], word2[2 * row + 1]
            before = Mux(first2, 0, total)
            # Minus the code is its complement plus 1.
            code = (Mux(nonzero, code2, 0)[:CODE] ^ negative.replicate(CODE)).as_signed()
            with m.If(valid2):
                m.d.sync += total.eq(add(before, code, carry=negative))

        # The finished sums leave, `lanes` at a time.
        leaving = [Signal(signed(bits), name=f"leaving{row}") for row in range(rows)]
        left = Signal(range(rows // lanes + 1))
        m.d.comb += [
            busy.eq(last1 | last2 | last3 | (left != 0)),
            self.sums_valid.eq(left != 0),
            self.sums.eq(Cat(*(self._extended(m, total) for total in leaving[:lanes]))),
        ]
        with m.If(self.start):
            m.d.sync += left.eq(0)  # of padding, which nobody has taken
        with m.Elif(last3):
            m.d.sync += [left.eq(rows // lanes), *(to.eq(total) for to, total in zip(leaving, sums, strict=True))]
        with m.Elif(self.sums_valid & self.sums_ready):
            m.d.sync += left.eq(left - 1)
            m.d.sync += [to.eq(total) for to, total in zip(leaving, leaving[lanes:], strict=False)]
        return m

    def _extended(self, m: Module, total) -> Signal:
        wide = Signal(signed(SUM))
        m.d.comb += wide.eq(total)
        return wide
