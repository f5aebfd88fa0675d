"""One lane of the vector unit: d = c + a * b on one element a cycle, in ten stages."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal, signed, unsigned
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.instructions import B

SQUARE_STAGE = 7  # from inputs to the square of a; `cycles.LANE_STAGES` lead to d
SHIFT_BITS = 6


def clip(value, bits: int):
    """Clip a signed value to so many bits, the most negative number included."""
    # A value fits if its upper bits are all like its sign: two wide gates, where comparing would be two subtractions.
    upper, sign = value[bits - 1 :], value[-1]
    return Mux(upper.all() | ~upper.any(), value[:bits], Cat((~sign).replicate(bits - 1), sign)).as_signed()


def saturate(value, bits: int):
    """Clip a signed value to symmetric integers of so many bits."""
    clipped = clip(value, bits)
    lowest = clipped[-1] & ~clipped[:-1].any()
    return Cat(clipped[0] | lowest, clipped[1:]).as_signed()


def add(x, y, carry):
    """Add signed values and a bit with one adder: the bit, added to itself below the others, carries."""
    return (Cat(carry, x).as_signed() + Cat(carry, y).as_signed()) >> 1


class Lane(Component):
    """Shift, sigmoid, multiply, shift and round, add, saturate (`arithmetic`; `machine.Machine._vector`).

    The settings a_shift to shift stay the same while elements are on the way. `scalar` is b where no vector is.
    """

    def __init__(self):
        word = signed(fixed.WORD)
        super().__init__({
            "a": In(word), "b": In(word), "c": In(word), "b_kind": In(B), "a_shift": In(4), "b_shift": In(4),
            "scalar": In(signed(fixed.OPERAND)), "shift": In(SHIFT_BITS),
            "d": Out(word), "square": Out(2 * fixed.OPERAND),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()

        def register(value, stages: int = 1):
            """The value, so many cycles later."""
            for _ in range(stages):
                value, before = Signal(Shape.cast(value.shape())), value
                m.d.sync += value.eq(before)
            return value

        # Stage 1: operands of the multiplier, and the magnitude of a sigmoid's argument.
        a1 = register(clip(self.a >> self.a_shift, fixed.OPERAND))
        b1 = register(clip(self.b >> self.b_shift, fixed.OPERAND))
        bits = (fixed.TABLE_RANGE * 2**-fixed.ARGUMENT - 1).bit_length()
        magnitude = Mux(self.b < 0, -self.b, self.b)
        magnitude1 = register(magnitude[:bits] | magnitude[bits:].any().replicate(bits))
        negative1 = register(Mux(self.b_kind == B.SIGMOID_MINUS, self.b > 0, self.b < 0))

        # Stages 2 to 6: the sigmoid of minus the magnitude lies on a line of the table; that of plus is its complement.
        start3, slope3 = (register(value) for value in self._table(m, magnitude1[fixed.FRACTION + 4 :]))
        fall4 = register(slope3 * register(magnitude1[4 : fixed.FRACTION + 4], 2))
        small5 = register(register(start3) - (fall4 >> fixed.FRACTION))
        sigmoid = Mux(register(negative1, 4), small5, clip(2**-fixed.SIGMOID - small5, fixed.OPERAND))

        b5, b6 = register(b1, 4), Signal(signed(fixed.OPERAND))
        with m.Switch(self.b_kind):
            with m.Case(B.SLOT, B.STREAM):
                m.d.sync += b6.eq(b5)
            with m.Case(B.SIGMOID, B.SIGMOID_MINUS):
                m.d.sync += b6.eq(sigmoid)
            with m.Default():
                m.d.sync += b6.eq(self.scalar)
        a6 = register(a1, 5)

        # Stages 7 to 10: multiply, shift, round and add, saturate.
        product7 = register(a6 * b6)
        m.d.comb += self.square.eq(register(a6 * a6))
        shifted8 = register((product7 << 1) >> self.shift)
        sum9 = register(add(shifted8[1:].as_signed(), register(self.c, 8), carry=shifted8[0]))
        m.d.sync += self.d.eq(saturate(sum9, fixed.WORD))
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
