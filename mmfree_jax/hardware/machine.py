"""The fixed-point model: an interpreter of programs, in NumPy integers. It is the specification of the hardware.

It runs several sequences together, one a row. What the hardware computes in a pipeline is here one line after another;
`arithmetic` defines each step.
"""

from typing import NamedTuple

import numpy as np

from mmfree_jax.hardware import arithmetic as fixed
from mmfree_jax.hardware.arithmetic import Float, Integers
from mmfree_jax.hardware.instructions import A, B, C, D, Norm, Op, Program, Read, Slot, Sum, Vector, reads

ONE = Float(np.array(2**16), np.array(-16))
MINUS_ONE = Float(np.array(-(2**16)), np.array(-16))
LARGEST_CODE = fixed.constant(127)


class Block(NamedTuple):
    """A vector of each row with its exponent, and by how much its elements are shifted to be operands: [R, 1]."""

    elements: Integers  # [R, n]
    exponent: Integers
    shift: Integers


class Machine:
    """A core that runs a program, for `rows` sequences."""

    def __init__(self, program: Program, image: bytes, rows: int = 1):
        self.program, self.image, self.rows = program, np.frombuffer(image, np.uint8), rows
        self.reads = reads(program)
        self.constants: dict[int, np.ndarray] = {}  # what instructions read that is the same for each token, decoded
        self.stored: dict[int, Integers] = {}  # by address
        self.slots: dict[Slot, Block] = {}
        self.codes = np.zeros((rows, 0), np.int64)
        self.sums: dict[Sum, Float] = {}
        self.maximum = self.reciprocal = self.scale = fixed.to_float(self._zero(), 0)

    def _zero(self) -> Integers:
        return np.zeros((self.rows, 1), np.int64)

    def token(self, tokens: np.ndarray) -> Integers:
        """Read a token of each row, [R]. Returns the logits of the next one, integers [R, V] with exponent -16."""
        logits = self._zero()
        for index, instruction in enumerate(self.program.instructions):
            if isinstance(instruction, Norm):
                self._norm(instruction)
            elif instruction.op != Op.END:
                d = self._vector(instruction, self._read(index, instruction, np.asarray(tokens)))
                logits = d if instruction.d == D.LOGITS else logits
        return logits

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Read a prompt of one row and choose `count` tokens, each the first of those with the largest logit."""
        chosen: list[int] = []
        for step in range(len(prompt) + count - 1):
            logits = self.token(np.array([prompt[step] if step < len(prompt) else chosen[-1]]))
            if step >= len(prompt) - 1:
                chosen.append(int(logits[0].argmax()))
        return chosen

    def _vector(self, i: Vector, read: np.ndarray) -> Integers:
        """Compute d = c + a * b, keep it where it belongs, and return it."""
        (a, a_exponent), (b, b_exponent) = self._a(i, read), self._b(i, read)
        exponent = a_exponent + b_exponent  # of the product; that of d comes next
        result = exponent + fixed.BLOCK_SHIFT if i.floating else self._zero() + i.exponent
        product = self._zero() if i.a == A.ZERO else fixed.shift_rounded(a * b, result - exponent)
        c = {C.ZERO: self._zero, C.SLOT: lambda: self.slots[i.c_slot].elements, C.STREAM: lambda: read}[i.c]()
        d = np.broadcast_to(fixed.saturate(c + product, fixed.WORD), (self.rows, i.count))

        largest = np.abs(d).max(axis=1, keepdims=True)
        self.maximum = fixed.to_float(largest, result)
        if i.sum:
            self.sums[i.sum] = fixed.to_float((a * a).sum(axis=1, keepdims=True), 2 * a_exponent)
        match i.d:
            case D.SLOT | D.MEMORY:
                self.slots[i.d_slot] = Block(d, result, fixed.operand_shift(largest))
                self.stored |= {i.address: d} if i.d == D.MEMORY else {}
            case D.CODES:
                self.codes = np.clip(d, -(2 ** (fixed.CODE - 1)), 2 ** (fixed.CODE - 1) - 1)
        return d

    def _a(self, i: Vector, read: np.ndarray) -> tuple[Integers, Integers]:
        """The first operand and its exponent."""
        match i.a:
            case A.SLOT:
                return self._operand(i.a_slot)
            case A.STREAM:
                return read, self._zero() + i.stream_exponent
            case A.ACCUMULATORS:
                # float32 holds integers below 2^24 exactly, in whichever order they are added.
                sums = self.codes[:, : i.depth].astype(np.float32) @ read
                return fixed.operand(sums.astype(np.int64), 0), self._zero()
        return self._zero(), self._zero()

    def _b(self, i: Vector, read: np.ndarray) -> tuple[Integers, Integers]:
        """The second operand and its exponent."""
        match i.b:
            case B.SLOT:
                return self._operand(i.b_slot)
            case B.SIGMOID | B.SIGMOID_MINUS:
                v = self.slots[i.b_slot].elements
                return fixed.sigmoid(v if i.b == B.SIGMOID else -v), self._zero() + fixed.SIGMOID
            case B.STREAM:
                return read, self._zero() + i.stream_exponent
        return {B.ONE: ONE, B.MINUS_ONE: MINUS_ONE, B.RECIPROCAL: self.reciprocal, B.SCALE: self.scale}[i.b]

    def _operand(self, slot: Slot) -> tuple[Integers, Integers]:
        block = self.slots[slot]
        return fixed.operand(block.elements, block.shift), block.exponent + block.shift

    def _norm(self, i: Norm) -> None:
        """127 / maximum, and maximum * weight / sqrt(outer + eps * inner + floor)."""
        self.reciprocal = fixed.multiply(fixed.reciprocal(self.maximum), LARGEST_CODE)
        floor = fixed.add(fixed.multiply(self.sums[Sum.INNER], i.eps), i.floor) if i.inner else i.floor
        root = fixed.reciprocal_root(fixed.add(self.sums[Sum.OUTER], floor))
        self.scale = fixed.multiply(fixed.multiply(root, self.maximum), i.weight)

    def _read(self, index: int, i: Vector, tokens: np.ndarray) -> np.ndarray:
        """What an instruction reads from memory, decoded: integers [R or 1, n], or the codes of a matrix [K, F]."""
        read = self.reads[index]
        if read.stride:
            return np.concatenate(
                [self._decode(i, read._replace(address=read.address + t * read.stride)) for t in tokens]
            )
        if i.c == C.STREAM and read.address in self.stored:
            return self.stored[read.address]
        if index not in self.constants:
            self.constants[index] = self._decode(i, read)
        return self.constants[index]

    def _decode(self, i: Vector, read: Read) -> np.ndarray:
        shape = self.program.shape
        size = shape.memory_bits // 8
        data = self.image[read.address * size : (read.address + read.words) * size]
        if i.op == Op.TERNARY:
            pairs = (data[:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
            codes = pairs.astype(np.int8) - 4 * (pairs >> 1).astype(np.int8)
            groups = codes.reshape(-1, i.depth, shape.rows).swapaxes(1, 2)
            return groups.reshape(-1, i.depth)[: i.count].T.astype(np.float32)
        return data.view("<i4" if i.c == C.STREAM else "<i2").astype(np.int64)[None, : i.count]
