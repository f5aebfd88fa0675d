"""The instruction set, the sizes of a core, and programs: what assembler, fixed-point model and hardware share.

A program computes one token. Two lists run beside each other: the loads tell the memory unit what to read, in the order
in which the instructions consume it, so that reading runs ahead of computing; the instructions run one after another.

    VECTOR   d = c + a * b, element by element, `lanes` a cycle. The maximum magnitude of d and, if asked for, the sum
             of squares of a are by-products.
    NORM     from these: 127 / maximum (RECIPROCAL, to quantise the vector just written) and, some cycles later and
             beside whatever runs, the scale of the product that follows (SCALE).
    TERNARY  d = c + SCALE * (W codes), W being streamed from memory: a VECTOR instruction whose a is the accumulators.
    END      the token is done.

A vector is loaded by VECTOR with a stream as c, and stored by VECTOR with memory as d.
"""

import dataclasses
import enum
from typing import NamedTuple

from mmfree_jax.architecture import require
from mmfree_jax.hardware.arithmetic import Float


class Op(enum.IntEnum):
    """What an instruction does."""

    VECTOR = 0
    TERNARY = 1
    NORM = 2
    END = 3


class A(enum.IntEnum):
    """First factor of each lane. STREAM: 16-bit integers from memory. ACCUMULATORS: in TERNARY only."""

    ZERO = 0
    SLOT = 1
    STREAM = 2
    ACCUMULATORS = 3


class B(enum.IntEnum):
    """Second factor. SIGMOID and SIGMOID_MINUS are sigmoids of a slot's elements v and of -v."""

    ONE = 0
    MINUS_ONE = 1
    SLOT = 2
    SIGMOID = 3
    SIGMOID_MINUS = 4
    STREAM = 5
    RECIPROCAL = 6
    SCALE = 7


class C(enum.IntEnum):
    """What is added, of the result's exponent. STREAM: 32-bit integers from memory."""

    ZERO = 0
    SLOT = 1
    STREAM = 2


class D(enum.IntEnum):
    """Where results go: a slot; the 8-bit codes that TERNARY multiplies; out of the core; a slot and memory too."""

    SLOT = 0
    CODES = 1
    LOGITS = 2
    MEMORY = 3


class Sum(enum.IntEnum):
    """Which register gets the sum of squares of a: that of a norm, or that of a norm before it (see NORM)."""

    NONE = 0
    INNER = 1
    OUTER = 2


class Slot(enum.IntEnum):
    """Vectors on the chip, named for what they mostly hold. GATE and UP lie where SCALED to STATE do."""

    RESIDUAL = 0
    NORMED = 1
    SCALED = 2
    CANDIDATE = 3
    FORGET = 4
    OUTPUT = 5
    STATE = 6
    GATE = 7
    UP = 8


WIDTH = 128  # bits of an instruction
SHORT = 8  # bits of an exponent in an instruction
# Fields of VECTOR, TERNARY and END: name -> bits, negative for signed fields.
VECTOR_FIELDS = {
    "op": 2, "a": 2, "b": 3, "c": 2, "d": 2, "sum": 2, "floating": 1,
    "a_slot": 4, "b_slot": 4, "c_slot": 4, "d_slot": 4,
    "exponent": -SHORT, "stream_exponent": -SHORT, "beats": 16, "groups": 16, "depth": 16, "address": 32,
}  # fmt: skip
NORM_FIELDS = {
    "op": 2, "inner": 1, "eps": 17, "eps_exponent": -SHORT, "floor": 17, "floor_exponent": -SHORT,
    "weight": 17, "weight_exponent": -SHORT,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Vector:
    """VECTOR and TERNARY.

    floating: d gets an exponent of its own, with which no bits are lost; else `exponent`. count: elements of d; of
    TERNARY its rows. depth: columns of TERNARY. address: of MEMORY, in words. stream_exponent: of the 16-bit integers.
    """

    op: Op = Op.VECTOR
    a: A = A.ZERO
    b: B = B.ONE
    c: C = C.ZERO
    d: D = D.SLOT
    sum: Sum = Sum.NONE
    floating: bool = False
    a_slot: Slot = Slot.RESIDUAL
    b_slot: Slot = Slot.RESIDUAL
    c_slot: Slot = Slot.RESIDUAL
    d_slot: Slot = Slot.RESIDUAL
    exponent: int = 0
    stream_exponent: int = 0
    count: int = 0
    depth: int = 0
    address: int = 0

    def __str__(self) -> str:
        name = lambda kind, slot: slot.name if kind.name == "SLOT" else kind.name
        a, c = name(self.a, self.a_slot), name(self.c, self.c_slot)
        b = name(self.b, self.b_slot)
        if self.b in (B.SIGMOID, B.SIGMOID_MINUS):
            b = f"sigmoid({'-' * (self.b == B.SIGMOID_MINUS)}{self.b_slot.name})"
        d = f"{self.d_slot.name}, MEMORY[{self.address}]" if self.d == D.MEMORY else name(self.d, self.d_slot)
        terms = ([] if self.c == C.ZERO else [c]) + ([] if self.a == A.ZERO else [f"{a} * {b}"])
        size = f"{self.count} x {self.depth}" if self.op == Op.TERNARY else f"{self.count}"
        scale = "own exponent" if self.floating else f"2^{self.exponent}"
        square = f", {self.sum.name} = |{a}|^2" if self.sum else ""
        return f"{self.op.name:<8}{size:>12}  {d} = {' + '.join(terms)}{square}  ({scale})"


@dataclasses.dataclass(frozen=True)
class Norm:
    """NORM: SCALE = maximum * weight / sqrt(OUTER + eps * INNER + floor), the second term only if `inner`."""

    inner: bool
    eps: Float
    floor: Float
    weight: Float
    op: Op = Op.NORM

    def __str__(self) -> str:
        return f"{self.op.name:<20}  RECIPROCAL, SCALE of the last vector{', after another norm' * self.inner}"


Instruction = Vector | Norm


class Load(NamedTuple):
    """`words` words of memory from `address` + `stride` * token."""

    address: int
    words: int
    stride: int = 0


@dataclasses.dataclass(frozen=True)
class CoreShape:
    """The parameters of a core. Raises ConfigError for sizes that do not fit together."""

    memory_bits: int = 8  # of weights and other data read in a cycle: half as many ternary weights
    lanes: int = 1  # elements of a vector computed in a cycle
    width: int = 512  # of the model, at most
    glu_width: int = 1536
    instructions: int = 512
    loads: int = 64
    queue: int = 64  # words read ahead

    def __post_init__(self) -> None:
        bits, lanes = self.memory_bits, self.lanes
        require(bits >= 8 and bits % 8 == 0, f"memory bits {bits}: must be a multiple of 8")
        require(
            lanes >= 1 and 16 * lanes % bits == 0 and self.rows % lanes == 0,
            f"{lanes} lanes do not fit {bits} bits of memory: 16 times the lanes must be a multiple of the bits, and "
            f"half the bits a multiple of the lanes",
        )
        require(self.queue >= 2, f"queue {self.queue}: must be at least 2")
        for name, most in (("width", 2**15), ("glu_width", 2**16), ("instructions", 2**13), ("loads", 2**13)):
            size = getattr(self, name)
            require(1 <= size <= most, f"{name} {size}: must be from 1 to {most:,}")

    @property
    def rows(self) -> int:
        """Ternary weights a cycle: rows of a matrix that are computed together."""
        return self.memory_bits // 2

    @property
    def words(self) -> int:
        """Words of memory that hold a 16-bit integer for each lane."""
        return 16 * self.lanes // self.memory_bits

    def beats(self, count: int) -> int:
        """Cycles in which the lanes compute so many elements."""
        return -(-count // self.lanes)

    def groups(self, count: int) -> int:
        """Groups of rows that a matrix of so many rows has."""
        return -(-count // self.rows)

    def bases(self) -> list[int]:
        """Where each slot begins, in beats, and at the end how many there are."""
        narrow, wide = (self.groups(n) * self.rows // self.lanes for n in (self.width, self.glu_width))
        shared = 2 * narrow
        return [*(i * narrow for i in range(7)), shared, shared + wide, shared + max(5 * narrow, 2 * wide)]


def encode(instruction: Instruction, shape: CoreShape) -> int:
    """Return an instruction as an integer of `WIDTH` bits, for cores of a shape.

    Counts become numbers of beats and of groups of rows. The address of LOGITS is the number of tokens.
    """
    if isinstance(instruction, Vector):
        values = dataclasses.asdict(instruction)
        values |= {"beats": shape.beats(instruction.count), "groups": shape.groups(instruction.count)}
        values |= {"address": instruction.count} if instruction.d == D.LOGITS else {}
        return _fields(VECTOR_FIELDS, values)
    floats = {name: getattr(instruction, name) for name in ("eps", "floor", "weight")}
    values = {"op": instruction.op, "inner": instruction.inner, **{name: x.mantissa for name, x in floats.items()}}
    values |= {f"{name}_exponent": x.exponent for name, x in floats.items()}
    return _fields(NORM_FIELDS, values)


def _fields(fields: dict[str, int], values: dict) -> int:
    word = place = 0
    for name, bits in fields.items():
        number, size = int(values[name]), abs(bits)
        low, high = (-(1 << size - 1), (1 << size - 1) - 1) if bits < 0 else (0, (1 << size) - 1)
        require(low <= number <= high, f"{name} = {number} does not fit an instruction: {low} to {high}")
        word |= (number & ((1 << size) - 1)) << place
        place += size
    return word


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled model: what runs for each token, and how large the vocabulary is."""

    shape: CoreShape
    instructions: tuple[Instruction, ...]
    loads: tuple[Load, ...]
    vocab: int
    width: int
    depth: int  # layers

    def __str__(self) -> str:
        stride = lambda load: f" + {load.stride} * token" if load.stride else ""
        loads = [f"LOAD    {load.words:>12}  words at {load.address}{stride(load)}" for load in self.loads]
        return "\n".join([*loads, *map(str, self.instructions)]) + "\n"


class Read(NamedTuple):
    """What an instruction takes from the memory's words: where they lie, for token 0, and how far apart tokens' are."""

    address: int
    words: int
    stride: int


def reads(program: Program) -> list[Read]:
    """Return what each instruction reads: the words of the loads, one after another.

    Raises ConfigError if loads and instructions do not fit together.
    """
    found, rest = [], iter(program.loads)
    load = Load(0, 0)
    for instruction in program.instructions:
        used = words_read(instruction, program.shape)
        if used and load.words == 0:
            load = next(rest, load)
        require(used <= load.words, f"{instruction}: needs {used} words, its load has {load.words} left")
        found.append(Read(load.address, used, load.stride))
        load = Load(load.address + used, load.words - used, load.stride)
    require(load.words == 0 and next(rest, None) is None, "the loads read more than the instructions use")
    return found


def words_read(instruction: Instruction, shape: CoreShape) -> int:
    """Count the words of memory that an instruction consumes."""
    if isinstance(instruction, Norm):
        return 0
    if instruction.op == Op.TERNARY:
        return shape.groups(instruction.count) * instruction.depth
    if instruction.c == C.STREAM:
        return 2 * shape.words * shape.beats(instruction.count)
    if instruction.a == A.STREAM or instruction.b == B.STREAM:
        return shape.words * shape.beats(instruction.count)
    return 0
