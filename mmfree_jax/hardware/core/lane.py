"""One lane of the vector unit: d = c + a * b on one element a cycle, in nine stages."""

from amaranth.hdl import Module, Mux, Shape, Signal, signed, unsigned
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.instructions import B

STAGES = 9  # from inputs to d
SQUARE_STAGE = 6  # from inputs to the square of a
SHIFT_BITS = 6


def clip(value, bits: int):
    """Clip a signed value to so many bits, the most negative number included."""
    top = 2 ** (bits - 1) - 1
    return Mux(value > top, top, Mux(value < ~top, ~top, value))


def saturate(value, bits: int):
    """Clip a signed value to symmetric integers of so many bits."""
    top = 2 ** (bits - 1) - 1
    return Mux(value > top, top, Mux(value < -top, -top, value))


class Lane(Component):
    """Shift, sigmoid, multiply, shift and round, add, saturate (`arithmetic`; `machine.Machine._vector`).

    The settings a_shift to shift stay the same while elements are on the way. `scalar` is b where no vector is.
    """

    a: In(signed(fixed.WORD))
    b: In(signed(fixed.WORD))
    c: In(signed(fixed.WORD))
    b_kind: In(B)
    a_shift: In(4)
    b_shift: In(4)
    scalar: In(signed(fixed.OPERAND))
    shift: In(SHIFT_BITS)
    d: Out(signed(fixed.WORD))
    square: Out(2 * fixed.OPERAND)

    def elaborate(self, platform):
        m = Module()

        def register(value, stages: int = 1):
            """The value, so many cycles later."""
            for _ in range(stages):
                value, before = Signal(Shape.cast(value.shape())), value
                m.d.sync += value.eq(before)
            return value

        # Stage 1: operands of the multiplier, and the magnitude of a sigmoid's argument.
        a1 = register(clip(self.a >> self.a_shift, fixed.OPERAND)[: fixed.OPERAND].as_signed())
        b1 = register(clip(self.b >> self.b_shift, fixed.OPERAND)[: fixed.OPERAND].as_signed())
        largest = fixed.TABLE_RANGE * 2**-fixed.ARGUMENT - 1
        magnitude = Mux(self.b < 0, -self.b, self.b)
        magnitude1 = register(Mux(magnitude > largest, largest, magnitude)[: largest.bit_length()])
        negative1 = register(Mux(self.b_kind == B.SIGMOID_MINUS, self.b > 0, self.b < 0))

        # Stages 2 to 5: the sigmoid of minus the magnitude lies on a line of the table; that of plus is its complement.
        start2, slope2 = self._table(m, magnitude1[fixed.FRACTION + 4 :])
        fall3 = register(slope2 * register(magnitude1[4 : fixed.FRACTION + 4]))
        small4 = register(register(start2) - (fall3 >> fixed.FRACTION))
        complement = 2**-fixed.SIGMOID - small4
        most = 2 ** (fixed.OPERAND - 1) - 1
        sigmoid = Mux(register(negative1, 3), small4, Mux(complement > most, most, complement))

        b4, b5 = register(b1, 3), Signal(signed(fixed.OPERAND))
        with m.Switch(self.b_kind):
            with m.Case(B.SLOT, B.STREAM):
                m.d.sync += b5.eq(b4)
            with m.Case(B.SIGMOID, B.SIGMOID_MINUS):
                m.d.sync += b5.eq(sigmoid)
            with m.Default():
                m.d.sync += b5.eq(self.scalar)
        a5 = register(a1, 4)

        # Stages 6 to 9: multiply, shift, round and add, saturate.
        product6 = register(a5 * b5)
        m.d.comb += self.square.eq(register(a5 * a5))
        shifted7 = register((product6 << 1) >> self.shift)
        sum8 = register(((shifted7 + 1) >> 1) + register(self.c, 7))
        m.d.sync += self.d.eq(saturate(sum8, fixed.WORD))
        return m

    def _table(self, m: Module, line):
        """Look a line up: its start and its slope, one cycle later."""
        starts, slopes = fixed.sigmoid_lines()
        init = [int(start) | int(slope) << fixed.MANTISSA for start, slope in zip(starts, slopes, strict=True)]
        shape = unsigned(fixed.MANTISSA + fixed.SLOPE)
        m.submodules.table = table = Memory(shape=shape, depth=fixed.TABLE, init=init)
        port = table.read_port()
        m.d.comb += port.addr.eq(line)
        return port.data[: fixed.MANTISSA], port.data[fixed.MANTISSA :]
