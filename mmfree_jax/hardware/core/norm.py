"""The norm unit: from a maximum and two sums of squares, the factors of a quantiser and of a product."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib.data import StructLayout
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.arithmetic import MANTISSA
from mmfree_jax.hardware.core.vector import SQUARES
from mmfree_jax.hardware.instructions import SHORT

EXPONENT = 11  # bits of an exponent
WIDE = 64  # bits of the register in which integers become floats
FLOAT = StructLayout({"mantissa": MANTISSA, "exponent": signed(EXPONENT)})
SHORT_FLOAT = StructLayout({"mantissa": MANTISSA, "exponent": signed(SHORT)})
INTEGER = StructLayout({"value": SQUARES, "exponent": signed(EXPONENT)})  # value * 2^exponent
RECIPROCAL_STEPS, ROOT_STEPS = 2 * MANTISSA - 17, 3 * MANTISSA - 17  # of a division that begins with 2^16
ROOT_BITS = MANTISSA + 1


class NormUnit(Component):
    """NORM, step by step (`machine.Machine._norm`): one multiplier, one adder, one subtractor that divides and takes
    roots a bit a cycle.

    `quantiser_ready` and `ready` say which results are there; both fall with `start`. The integers are read while it
    runs, and have to stay as they are.
    """

    def __init__(self):
        super().__init__({
            "start": In(1), "inner": In(1), "eps": In(SHORT_FLOAT), "floor": In(SHORT_FLOAT), "weight": In(SHORT_FLOAT),
            "maximum": In(INTEGER), "inner_square": In(INTEGER), "outer_square": In(INTEGER),
            "reciprocal": Out(FLOAT), "scale": Out(FLOAT), "quantiser_ready": Out(1), "ready": Out(1, init=1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        self.x, kept = Signal(FLOAT), Signal(FLOAT)  # each step computes x; `kept` waits for its turn
        maximum, operand = Signal(FLOAT), Signal(FLOAT)
        self.wide, self.shifts = Signal(WIDE), Signal(3)
        self.dividend, self.divisor, self.quotient = Signal(20), Signal(ROOT_BITS), Signal(2 * ROOT_BITS)
        self.count, odd = Signal(6), Signal()
        with m.FSM():
            with m.State("IDLE"), m.If(self.start):
                m.d.sync += [self.ready.eq(0), self.quantiser_ready.eq(0)]
                self._load(m, self.maximum, "MAXIMUM")
            self._normalise(m, "MAXIMUM", then="INVERT")
            with m.State("INVERT"):
                m.d.sync += maximum.eq(self.x)
                self._begin_division(m, self.x.mantissa, RECIPROCAL_STEPS, "DIVIDE")
            self._divide(m, "DIVIDE", then="RECIPROCAL")
            with m.State("RECIPROCAL"):
                # 2^17, of the mantissa 2^16, is one bit too long for a mantissa.
                exponent = -self.x.exponent - (2 * MANTISSA - 1)
                self._set_x(m, self.quotient[: MANTISSA + 1], exponent)
                with m.If(self.x.mantissa == 0):
                    m.d.sync += self.x.mantissa.eq(0)
                m.next = "TIMES 127"
            largest_code = fixed.constant(127)
            code = FLOAT.const({"mantissa": int(largest_code.mantissa), "exponent": int(largest_code.exponent)})
            self._multiply(m, "TIMES 127", code, then="QUANTISER")
            with m.State("QUANTISER"):
                m.d.sync += [self.reciprocal.eq(self.x), self.quantiser_ready.eq(1)]
                m.d.sync += [self.x.mantissa.eq(self.floor.mantissa), self.x.exponent.eq(self.floor.exponent)]
                m.next = "OUTER"
                with m.If(self.inner):
                    self._load(m, self.inner_square, "INNER")
            self._normalise(m, "INNER", then="TIMES EPS")
            self._multiply(m, "TIMES EPS", self.eps, then="PLUS FLOOR")
            self._add(m, "PLUS FLOOR", self.floor, then="OUTER")
            with m.State("OUTER"):
                m.d.sync += kept.eq(self.x)
                self._load(m, self.outer_square, "NORMALISE OUTER")
            self._normalise(m, "NORMALISE OUTER", then="PLUS OUTER")
            self._add(m, "PLUS OUTER", kept, then="ROOT")
            with m.State("ROOT"):
                m.d.sync += odd.eq(self.x.exponent[0])
                divisor = Mux(self.x.exponent[0], self.x.mantissa << 1, self.x.mantissa)
                self._begin_division(m, divisor, ROOT_STEPS, "DIVIDE ROOT")
            self._divide(m, "DIVIDE ROOT", then="TAKE ROOT")
            self._take_root(m, "TAKE ROOT", then="ROOT TAKEN")
            with m.State("ROOT TAKEN"):
                half = (self.x.exponent - odd) >> 1
                self._set_x(m, self.divisor, -half - (3 * MANTISSA - 1) // 2)
                m.d.sync += operand.eq(maximum)
                m.next = "TIMES MAXIMUM"
            self._multiply(m, "TIMES MAXIMUM", operand, then="TIMES WEIGHT")
            self._multiply(m, "TIMES WEIGHT", self.weight, then="SCALE")
            with m.State("SCALE"):
                m.d.sync += [self.scale.eq(self.x), self.ready.eq(1)]
                m.next = "IDLE"
        return m

    def _load(self, m: Module, integer, then: str) -> None:
        """Take an integer to be made a float."""
        m.d.sync += [self.wide.eq(integer.value), self.shifts.eq(0)]
        m.d.sync += self.x.exponent.eq(integer.exponent + WIDE - MANTISSA)
        m.next = then

    def _normalise(self, m: Module, name: str, then: str) -> None:
        """Shift left until the first bit is set: by 32 if 32 bits are clear, by 16, ... by 1."""
        with m.State(name):
            m.d.sync += self.shifts.eq(self.shifts + 1)
            with m.Switch(self.shifts):
                for index, places in enumerate((32, 16, 8, 4, 2, 1)):
                    with m.Case(index), m.If(self.wide[WIDE - places :] == 0):
                        m.d.sync += self.wide.eq(self.wide << places)
                        m.d.sync += self.x.exponent.eq(self.x.exponent - places)
                with m.Default():
                    m.d.sync += self.x.mantissa.eq(self.wide[WIDE - MANTISSA :])
                    m.next = then

    def _set_x(self, m: Module, mantissa, exponent) -> None:
        """x = mantissa * 2^exponent, where the mantissa may have one bit more than it should."""
        carry = mantissa[MANTISSA]
        m.d.sync += self.x.mantissa.eq(Mux(carry, mantissa[1:], mantissa[:MANTISSA]))
        m.d.sync += self.x.exponent.eq(exponent + carry)

    def _multiply(self, m: Module, name: str, other, then: str) -> None:
        """x = x * other."""
        product, exponent = Signal(2 * MANTISSA), Signal(signed(EXPONENT))
        with m.State(name):
            m.d.sync += product.eq(self.x.mantissa * other.mantissa)
            m.d.sync += exponent.eq(self.x.exponent + other.exponent + MANTISSA - 1)
            m.next = f"{name}, NORMALISE"
        with m.State(f"{name}, NORMALISE"):
            self._set_x(m, product[MANTISSA - 1 :], exponent)
            m.next = then

    def _add(self, m: Module, name: str, other, then: str) -> None:
        """x = x + other: the smaller one is shifted right, then they are added."""
        large, small = Signal(FLOAT), Signal(FLOAT)
        swap = (self.x.mantissa == 0) | ((other.mantissa != 0) & (other.exponent > self.x.exponent))
        with m.State(name):
            fields = lambda to, value: [getattr(to, part).eq(getattr(value, part)) for part in ("mantissa", "exponent")]
            m.d.sync += [*fields(large, self.x), *fields(small, other)]
            with m.If(swap):
                m.d.sync += [*fields(large, other), *fields(small, self.x)]
            m.next = f"{name}, ALIGN"
        with m.State(f"{name}, ALIGN"):
            distance = Signal(signed(EXPONENT + 1))
            m.d.comb += distance.eq(large.exponent - small.exponent)
            m.d.sync += small.mantissa.eq(Mux(distance[5:].any(), 0, small.mantissa >> distance[:5]))
            m.next = f"{name}, SUM"
        with m.State(f"{name}, SUM"):
            self._set_x(m, large.mantissa + small.mantissa, large.exponent)
            m.next = then

    def _begin_division(self, m: Module, divisor, steps: int, then: str) -> None:
        m.d.sync += [self.dividend.eq(2 ** (MANTISSA - 1)), self.divisor.eq(divisor), self.quotient.eq(0)]
        m.d.sync += self.count.eq(steps)
        m.next = then

    def _divide(self, m: Module, name: str, then: str) -> None:
        """quotient = floor(2^(16 + steps) / divisor), a bit a cycle."""
        with m.State(name):
            fits = self.dividend >= self.divisor
            rest = Mux(fits, self.dividend - self.divisor, self.dividend)
            m.d.sync += [self.dividend.eq(rest << 1), self.quotient.eq(Cat(fits, self.quotient))]
            m.d.sync += self.count.eq(self.count - 1)
            with m.If(self.count == 0):
                m.d.sync += [self.dividend.eq(0), self.count.eq(ROOT_BITS - 1)]
                m.d.sync += self.divisor.eq(0)
                m.next = then

    def _take_root(self, m: Module, name: str, then: str) -> None:
        """divisor = floor(sqrt(quotient)): a bit of the root from two of the quotient, a cycle."""
        with m.State(name):
            rest = Cat(self.quotient[-2:], self.dividend)
            trial = (self.divisor << 2) | 1
            fits = rest >= trial
            m.d.sync += self.dividend.eq(Mux(fits, rest - trial, rest))
            m.d.sync += [self.divisor.eq(Cat(fits, self.divisor)), self.quotient.eq(self.quotient << 2)]
            m.d.sync += self.count.eq(self.count - 1)
            with m.If(self.count == 0):
                m.next = then
