"""The core: the units, the wires between them, and the sequencer that runs the program of a token."""

from collections.abc import Callable

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib.data import StructLayout
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.core.chooser import Chooser
from mmfree_jax.hardware.core.memory import ADDRESS, LOAD_WORDS, TOKEN, Gearbox, Reader, Writer
from mmfree_jax.hardware.core.norm import EXPONENT, FLOAT, INTEGER, SHORT_FLOAT, NormUnit
from mmfree_jax.hardware.core.ternary import TernaryUnit
from mmfree_jax.hardware.core.vector import SQUARES, VectorUnit
from mmfree_jax.hardware.instructions import (
    NORM_FIELDS,
    VECTOR_FIELDS,
    WIDTH,
    A,
    B,
    C,
    CoreShape,
    D,
    Load,
    Op,
    Program,
    Slot,
    Sum,
    encode,
)

LOADS = 15  # bit of a program's address that is set for loads and clear for instructions


def layout(fields: dict[str, int]) -> StructLayout:
    """Return an instruction's fields as Amaranth knows them."""
    return StructLayout({name: signed(-bits) if bits < 0 else bits for name, bits in fields.items()})


VECTOR, NORM = layout(VECTOR_FIELDS), layout(NORM_FIELDS)


class Sequencer(Component):
    """Runs the program: fetches an instruction, prepares its settings from what is known of the slots, starts the
    units, and takes their by-products when they are done.

    Of each slot it keeps the exponent and by how much elements are shifted to be operands; of the last vector the
    maximum; and the sums of squares INNER and OUTER.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape, address = shape, range(shape.bases()[-1])
        super().__init__({
            "start": In(1), "idle": Out(1),
            "program_write": In(1), "program_address": In(16), "program_data": In(32),
            "vector_start": Out(1), "vector_done": In(1), "beats": Out(16), "wide": Out(1),
            "a_kind": Out(A), "b_kind": Out(B), "c_kind": Out(C), "d_kind": Out(D),
            "a_base": Out(address), "b_base": Out(address), "c_base": Out(address), "d_base": Out(address),
            "a_shift": Out(4), "b_shift": Out(4), "scalar": Out(signed(fixed.OPERAND)), "shift": Out(6),
            "largest": In(fixed.WORD - 1), "square": In(SQUARES),
            "ternary_start": Out(1), "groups": Out(16), "depth": Out(16),
            "norm_start": Out(1), "norm_inner": Out(1), "eps": Out(SHORT_FLOAT), "floor": Out(SHORT_FLOAT),
            "weight": Out(SHORT_FLOAT), "maximum": Out(INTEGER), "inner_square": Out(INTEGER),
            "outer_square": Out(INTEGER), "reciprocal": In(FLOAT), "scale": In(FLOAT), "quantiser_ready": In(1),
            "norm_ready": In(1),
            "gears_start": Out(1), "writer_start": Out(1), "address": Out(32), "writer_idle": In(1),
            "logits_start": Out(1), "logits_finish": Out(1), "chooser_ready": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m, shape = Module(), self.core_shape
        program = Memory(shape=unsigned(WIDTH), depth=shape.instructions, init=[])
        m.submodules.program = program
        port, write = program.read_port(), program.write_port(granularity=32)
        m.d.comb += [
            write.addr.eq(self.program_address[2:LOADS]),
            write.data.eq(Cat(*[self.program_data] * (WIDTH // 32))),
            write.en.eq((self.program_write & ~self.program_address[LOADS]) << self.program_address[:2]),
        ]
        counter, word = Signal(range(shape.instructions)), Signal(WIDTH)
        m.d.comb += port.addr.eq(counter)
        self.i, norm = Signal(VECTOR), Signal(NORM)
        m.d.comb += self.i.eq(word)
        self.exponents = Array(Signal(signed(EXPONENT), name=f"exponent_{slot.name}") for slot in Slot)
        self.shifts = Array(Signal(4, name=f"shift_{slot.name}") for slot in Slot)
        self._settings(m, norm)
        a_exponent, result = self._exponents(m)

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(1)
                with m.If(self.start):
                    m.next = "FETCH"
            with m.State("FETCH"):
                m.d.sync += [word.eq(port.data), counter.eq(counter + 1)]
                m.next = "DISPATCH"
            with m.State("DISPATCH"):
                self._dispatch(m, counter, word, norm)
            with m.State("WAIT FOR SCALE"), m.If(self.norm_ready):
                self._begin(m)
            with m.State("RUN"), m.If(self.vector_done):
                m.d.comb += self.logits_finish.eq(self.i.d == D.LOGITS)
                m.next = "RECORD"
            with m.State("RECORD"):
                self._record(m, a_exponent, result)
                m.next = "FETCH"
        return m

    def _settings(self, m: Module, norm) -> None:
        """What the units get from the instruction itself."""
        i, bases = self.i, Array(self.core_shape.bases()[:-1])
        for name in ("a", "b", "c", "d"):
            m.d.comb += getattr(self, f"{name}_kind").eq(getattr(i, name))
            m.d.comb += getattr(self, f"{name}_base").eq(bases[getattr(i, f"{name}_slot")])
        m.d.comb += [
            self.beats.eq(i.beats),
            self.groups.eq(i.groups),
            self.depth.eq(i.depth),
            self.address.eq(i.address),
            self.wide.eq(i.c == C.STREAM),
            self.norm_inner.eq(norm.inner),
        ]
        for name in ("eps", "floor", "weight"):
            m.d.comb += getattr(self, name).mantissa.eq(getattr(norm, name))
            m.d.comb += getattr(self, name).exponent.eq(getattr(norm, f"{name}_exponent"))

    def _exponents(self, m: Module) -> tuple[Signal, Signal]:
        """Exponents of a, a cycle after the instruction, and of d; two cycles later the shift to d is set."""
        i = self.i
        a_exponent, b_exponent = Signal(signed(EXPONENT)), Signal(signed(EXPONENT))
        a_shift, b_shift = self.shifts[i.a_slot], self.shifts[i.b_slot]
        m.d.sync += [a_exponent.eq(0), self.a_shift.eq(0), self.b_shift.eq(0)]
        with m.Switch(i.a):
            with m.Case(A.SLOT):
                m.d.sync += [a_exponent.eq(self.exponents[i.a_slot] + a_shift), self.a_shift.eq(a_shift)]
            with m.Case(A.STREAM):
                m.d.sync += a_exponent.eq(i.stream_exponent)
        with m.Switch(i.b):
            with m.Case(B.ONE):
                m.d.sync += [b_exponent.eq(-16), self.scalar.eq(2**16)]
            with m.Case(B.MINUS_ONE):
                m.d.sync += [b_exponent.eq(-16), self.scalar.eq(-(2**16))]
            with m.Case(B.SLOT):
                m.d.sync += [b_exponent.eq(self.exponents[i.b_slot] + b_shift), self.b_shift.eq(b_shift)]
            with m.Case(B.SIGMOID, B.SIGMOID_MINUS):
                m.d.sync += b_exponent.eq(fixed.SIGMOID)
            with m.Case(B.STREAM):
                m.d.sync += b_exponent.eq(i.stream_exponent)
            with m.Case(B.RECIPROCAL):
                m.d.sync += [b_exponent.eq(self.reciprocal.exponent), self.scalar.eq(self.reciprocal.mantissa)]
            with m.Case(B.SCALE):
                m.d.sync += [b_exponent.eq(self.scale.exponent), self.scalar.eq(self.scale.mantissa)]
        product, result, shift = (Signal(signed(EXPONENT + 1)) for _ in range(3))
        m.d.sync += product.eq(a_exponent + b_exponent)
        m.d.sync += result.eq(Mux(i.floating, product + fixed.BLOCK_SHIFT, i.exponent))
        m.d.comb += shift.eq(Mux(i.floating, fixed.BLOCK_SHIFT, i.exponent - product))
        low, high = shift[: len(self.shift)], shift[len(self.shift) :]
        m.d.sync += self.shift.eq(Mux(shift < 0, 0, low | high.any().replicate(len(low))))
        return a_exponent, result

    def _dispatch(self, m: Module, counter: Signal, word: Signal, norm: Signal) -> None:
        """Begin an instruction, once what it needs is there."""
        with m.Switch(self.i.op):
            # A quantiser waits for the norm unit, which then goes on to the scale of the product.
            with m.Case(Op.VECTOR), m.If((self.i.b != B.RECIPROCAL) | self.quantiser_ready):
                self._begin(m)
            with m.Case(Op.TERNARY):
                m.d.comb += self.ternary_start.eq(1)
                m.next = "WAIT FOR SCALE"
            with m.Case(Op.NORM), m.If(self.norm_ready):
                m.d.comb += self.norm_start.eq(1)
                m.d.sync += norm.eq(word)
                m.next = "FETCH"
            with m.Case(Op.END), m.If(self.writer_idle & self.chooser_ready):
                m.d.sync += counter.eq(0)
                m.next = "IDLE"

    def _begin(self, m: Module) -> None:
        """Start the vector unit and what it works with. Shifts follow before the first element needs them."""
        i = self.i
        m.d.comb += [
            self.vector_start.eq(1),
            self.gears_start.eq((i.a == A.STREAM) | (i.b == B.STREAM) | (i.c == C.STREAM)),
            self.writer_start.eq(i.d == D.MEMORY),
            self.logits_start.eq(i.d == D.LOGITS),
        ]
        m.next = "RUN"

    def _record(self, m: Module, a_exponent: Signal, result: Signal) -> None:
        """Keep an instruction's by-products."""
        i, shift = self.i, Signal(4)
        surplus = self.largest[fixed.OPERAND - 1 :]
        for bit in range(len(surplus)):
            with m.If(surplus[bit]):
                m.d.comb += shift.eq(bit + 1)
        with m.If((i.d == D.SLOT) | (i.d == D.MEMORY)):
            m.d.sync += [self.exponents[i.d_slot].eq(result), self.shifts[i.d_slot].eq(shift)]
        m.d.sync += [self.maximum.value.eq(self.largest), self.maximum.exponent.eq(result)]
        for kind, register in ((Sum.INNER, self.inner_square), (Sum.OUTER, self.outer_square)):
            with m.If(i.sum == kind):
                m.d.sync += [register.value.eq(self.square), register.exponent.eq(a_exponent << 1)]


UNITS: dict[str, Callable[[CoreShape], Component]] = {
    "sequencer": Sequencer,
    "reader": Reader,
    "gearbox": Gearbox,
    "ternary": TernaryUnit,
    "vector": VectorUnit,
    "norm": lambda shape: NormUnit(),
    "writer": Writer,
    "chooser": Chooser,
}
# Which output drives which inputs. The block diagram of docs/hardware.md is drawn from this table.
WIRES: dict[str, tuple[str, ...]] = {
    "sequencer.vector_start": ("vector.start",),
    **{
        f"sequencer.{name}": (f"vector.{name}",)
        for name in (
            *("a_kind", "b_kind", "c_kind", "d_kind", "a_base", "b_base", "c_base", "d_base"),
            *("a_shift", "b_shift", "scalar", "shift"),
        )
    },
    "sequencer.beats": ("vector.beats", "gearbox.beats"),
    "sequencer.gears_start": ("gearbox.start",),
    "sequencer.wide": ("gearbox.wide",),
    "sequencer.ternary_start": ("ternary.start",),
    "sequencer.groups": ("ternary.groups",),
    "sequencer.depth": ("ternary.depth",),
    "sequencer.norm_start": ("norm.start",),
    "sequencer.norm_inner": ("norm.inner",),
    **{
        f"sequencer.{name}": (f"norm.{name}",)
        for name in ("eps", "floor", "weight", "maximum", "inner_square", "outer_square")
    },
    "sequencer.writer_start": ("writer.start",),
    "sequencer.address": ("writer.address", "chooser.limit"),
    "sequencer.logits_start": ("chooser.start",),
    "sequencer.logits_finish": ("chooser.finish",),
    "norm.reciprocal": ("sequencer.reciprocal",),
    "norm.scale": ("sequencer.scale",),
    "norm.quantiser_ready": ("sequencer.quantiser_ready",),
    "norm.ready": ("sequencer.norm_ready",),
    "reader.word": ("gearbox.word", "ternary.word"),
    "reader.word_valid": ("gearbox.word_valid", "ternary.word_valid"),
    "gearbox.word_ready": ("reader.beats_take",),
    "gearbox.beat": ("vector.beat",),
    "gearbox.beat_valid": ("vector.beat_valid",),
    "ternary.word_ready": ("reader.weights_take",),
    "ternary.sums": ("vector.sums",),
    "ternary.sums_valid": ("vector.sums_valid",),
    "vector.sums_ready": ("ternary.sums_ready",),
    "vector.beat_ready": ("gearbox.beat_ready",),
    "vector.done": ("sequencer.vector_done",),
    "vector.largest": ("sequencer.largest",),
    "vector.square": ("sequencer.square",),
    "vector.codes": ("ternary.codes",),
    "vector.codes_valid": ("ternary.codes_valid",),
    "vector.result": ("writer.beat", "chooser.logits", "core.logits"),
    "vector.result_index": ("ternary.codes_index", "chooser.index"),
    "vector.logits_valid": ("chooser.logits_valid", "core.logits_valid"),
    "vector.store_valid": ("writer.beat_valid",),
    "vector.reserve": ("writer.reserve",),
    "writer.room": ("vector.room",),
    "writer.idle": ("sequencer.writer_idle",),
    "chooser.ready": ("sequencer.chooser_ready",),
    "chooser.token": ("core.next_token",),
    "sequencer.idle": ("core.idle",),
    "core.start": ("sequencer.start", "reader.start"),
    "core.token": ("reader.token",),
    **{f"core.{name}": (f"sequencer.{name}", f"reader.{name}") for name in ("program_address", "program_data")},
    "core.program_write": ("sequencer.program_write", "reader.program_write"),
    **{f"core.{name}": (f"reader.{name}",) for name in ("read_ready", "data_valid", "data")},
    **{f"reader.{name}": (f"core.{name}",) for name in ("read_valid", "read_address")},
    "core.write_ready": ("writer.write_ready",),
    **{f"writer.{name}": (f"core.{name}",) for name in ("write_valid", "write_address", "write_data")},
}


class Core(Component):
    """The core as it is seen from outside.

    Write the program, instructions and loads, 32 bits at a time (`program_words`). Then for each token: wait for
    `idle`, give `token` and `start`; when the core is idle again, `next_token` is the likeliest. Its logits leave in
    beats of `lanes`. Memory: requests of words are answered in order, whenever; states are written.
    """

    def __init__(self, shape: CoreShape):
        self.core_shape, bits = shape, shape.memory_bits
        super().__init__({
            "start": In(1), "token": In(TOKEN), "idle": Out(1), "next_token": Out(32),
            "logits": Out(fixed.WORD * shape.lanes), "logits_valid": Out(1),
            "program_write": In(1), "program_address": In(16), "program_data": In(32),
            "read_valid": Out(1), "read_ready": In(1), "read_address": Out(ADDRESS),
            "data_valid": In(1), "data": In(bits),
            "write_valid": Out(1), "write_ready": In(1), "write_address": Out(ADDRESS), "write_data": Out(bits),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        units = {name: unit(self.core_shape) for name, unit in UNITS.items()}
        for name, unit in units.items():
            m.submodules[name] = unit
        units["core"] = self
        port = lambda path: getattr(units[path.partition(".")[0]], path.partition(".")[2])
        for source, sinks in WIRES.items():
            m.d.comb += [port(sink).eq(port(source)) for sink in sinks]
        return m


def program_words(program: Program) -> list[tuple[int, int]]:
    """Return what is written to a core before it runs a program: addresses and words of 32 bits."""
    cut = lambda place, number, words: [(place + n, number >> 32 * n & 0xFFFFFFFF) for n in range(words)]
    instructions = [encode(instruction, program.shape) for instruction in program.instructions]
    loads = [load.address | load.words << 32 | load.stride << 64 for load in (*program.loads, Load(0, 0))]
    written = [cut(4 * n, number, WIDTH // 32) for n, number in enumerate(instructions)]
    written += [cut((1 << LOADS) + 4 * n, number, LOAD_WORDS) for n, number in enumerate(loads)]
    return [pair for part in written for pair in part]
