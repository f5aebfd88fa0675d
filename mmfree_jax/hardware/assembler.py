"""The assembler: a packed checkpoint becomes a program and a memory image.

The image holds, in this order, the states of all layers (zeros at the beginning of a text), the embedding, and all else
in the order in which a token needs it: that the memory is read in one sequence is what lets reading run ahead.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmfree_jax.architecture import ModelConfig, require, scales
from mmfree_jax.hardware.arithmetic import ARGUMENT, MANTISSA, constant
from mmfree_jax.hardware.instructions import (
    A,
    B,
    C,
    CoreShape,
    D,
    Instruction,
    Load,
    Norm,
    Op,
    Program,
    Slot,
    Sum,
    Vector,
)
from mmfree_jax.inference.packed import read_packed
from mmfree_jax.ops.packed import Packed

RESIDUAL = -16  # exponent of the residual stream and of the logits: magnitudes up to 32,768
LARGEST = 2**15 - 1  # largest 16-bit integer
LARGEST_CODE = 127


def assemble(folder: Path, shape: CoreShape) -> tuple[Program, bytes]:
    """Compile a packed folder into a program and a memory image for cores of a shape.

    Raises PackedError for other folders, ConfigError for models that the core does not compute or that do not fit it.
    """
    facts, tensors = read_packed(folder)
    config: ModelConfig = facts["model"]
    check_model(config)
    require(
        config.width <= shape.width and config.glu_width <= shape.glu_width,
        f"the model's widths {config.width} and {config.glu_width} are above the core's {shape.width} and "
        f"{shape.glu_width}",
    )
    build = _Builder(shape, config)
    program = build.model(_Tensors(tensors, config, facts["layout"]))
    for name, limit in (("instructions", shape.instructions), ("loads", shape.loads)):
        used = len(getattr(program, name))
        require(used <= limit, f"the program has {used} {name}, the core {limit}: build one with more")
    return program, b"".join(build.image)


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError unless the core computes this architecture."""
    require(
        config.family == "matmul-free",
        f"the core computes models of the family matmul-free; this one is {config.family}",
    )
    needed: dict[str, Any] = {
        "activation_bits": 8,
        "weight_scale": "tensor",
        "linear_norm": True,
        "sublayer_norm": False,
        "dense_head": False,
        "activation": "silu",
        "joint_glu": True,
    }
    for name, value in needed.items():
        found = getattr(config, name)
        require(found == value, f"the core computes models with {name}={value}; this one has {found}")
    largest = max(config.width, config.glu_width, config.vocab)
    require(largest < 2**16, f"the core counts to 65,535; this model has {largest:,} channels or tokens")


def skeleton(config: ModelConfig, shape: CoreShape) -> Program:
    """Return the program of an architecture without its weights: what a token costs does not depend on them.

    Raises ConfigError for models that the core does not compute.
    """
    check_model(config)
    return _Builder(shape, config, keep=False).model(_Zeros(config))


class _Tensors:
    """The tensors of a packed folder, in float64, and its matrices as codes [rows, columns] and a scale."""

    def __init__(self, tensors: dict[str, np.ndarray], config: ModelConfig, layout: Any):
        self.tensors, self.config, self.layout = tensors, config, layout

    def array(self, name: str, layer: int | None = None) -> np.ndarray:
        if name == "floors" and name not in self.tensors:
            return np.zeros(self.config.width)  # without lower bounds
        found = self.tensors[name]
        return np.asarray(found if layer is None else found[layer], np.float64)

    def matrix(self, name: str, layer: int = 0, group: int = 0) -> tuple[np.ndarray, float]:
        width = self.config.glu_width if name == "blocks.glu.down" else self.config.width
        packed = Packed(jnp.asarray(self.tensors[f"{name}.codes"][layer, group]), jnp.ones((1, 1)), self.layout)
        (scale,) = np.asarray(self.tensors[f"{name}.scale"][layer, group], np.float64)
        return np.asarray(packed.unpacked(width).codes).T, float(scale)


class _Zeros(_Tensors):
    """Tensors of the right shapes that take no memory."""

    def __init__(self, config: ModelConfig):
        D, F, V = config.width, config.glu_width, config.vocab
        self.shapes = {"embedding": (V, D), "blocks.mixer.gates.gain": (3, D), "blocks.glu.down.gain": (F,)}
        self.rows = {"blocks.glu.gate_up": F, "head": V}
        super().__init__({}, config, None)

    def array(self, name: str, layer: int | None = None) -> np.ndarray:
        return np.broadcast_to(0.0, self.shapes.get(name, (self.config.width,)))

    def matrix(self, name: str, layer: int = 0, group: int = 0) -> tuple[np.ndarray, float]:
        columns = self.config.glu_width if name == "blocks.glu.down" else self.config.width
        return np.broadcast_to(np.int8(0), (self.rows.get(name, self.config.width), columns)), 1.0


class _Builder:
    """Appends to the program and to the image together, so that both have the same order."""

    def __init__(self, shape: CoreShape, config: ModelConfig, keep: bool = True):
        self.shape, self.config, self.keep = shape, config, keep
        self.factor = scales(config).residual
        self.instructions: list[Instruction] = []
        self.loads: list[Load] = []
        self.image: list[bytes] = []
        self.largest_scale = 0.0  # of the next product
        self.size = self.begin = 0  # words of the image, and where what no load reads yet begins
        self.state_words = shape.beats(config.width) * 2 * shape.words

    def model(self, tensors: _Tensors) -> Program:
        """Compile a whole model."""
        config = self.config
        states = self.state_words * config.depth
        self.append(states, lambda: bytes(states * self.shape.memory_bits // 8))
        self.begin = self.size
        self.embedding(tensors)
        for layer in range(config.depth):
            self.mixer(tensors, layer)
            self.channels(tensors, layer)
        self.head(tensors)
        self.instructions.append(Vector(op=Op.END))
        self.load_rest()
        lists = tuple(self.instructions), tuple(self.loads)
        return Program(self.shape, *lists, config.vocab, config.width, config.depth)

    def embedding(self, tensors: _Tensors) -> None:
        """One row of the table becomes the residual stream."""
        table_VD, shape = tensors.array("embedding"), self.shape
        row = shape.beats(self.config.width) * shape.words
        exponent = exponent_of(table_VD) if self.keep else 0
        padding = (0, 0), (0, shape.beats(self.config.width) * shape.lanes - self.config.width)
        self.append(row * len(table_VD), lambda: np.pad(to_integers(table_VD, exponent), padding).tobytes())
        self.loads.append(Load(self.begin, row, row))
        self.begin = self.size
        self.vector(self.config.width, Slot.RESIDUAL, A.STREAM, stream_exponent=exponent, exponent=RESIDUAL)

    def mixer(self, tensors: _Tensors, layer: int) -> None:
        """The MLGRU (`models.mlgru`): three products of a normed input, the recurrence, the output gate, a product."""
        D_ = self.config.width
        # Two norms follow each other, RMSNorm(RMSNorm(x) * m) * g: the sum of squares of each is a by-product of
        # multiplying by its gain, and NORM takes both into the scale of the product.
        self.scaled(D_, Slot.NORMED, Slot.RESIDUAL, tensors.array("blocks.mixer_norm.gain", layer), Sum.INNER)
        gains = tensors.array("blocks.mixer.gates.gain", layer)
        for group, slot in enumerate((Slot.CANDIDATE, Slot.FORGET, Slot.OUTPUT)):
            codes, scale = tensors.matrix("blocks.mixer.gates", layer, group)
            self.quantised(D_, Slot.SCALED, Slot.NORMED, gains[group], scale)
            self.ternary(codes, d_slot=slot, exponent=ARGUMENT)
        # 1 - F = (1 - floor) * sigmoid(-f), and the candidate silu(i).
        keep = self.stream(1 - tensors.array("floors", layer))
        self.vector(D_, Slot.FORGET, A.STREAM, B.SIGMOID_MINUS, b_slot=Slot.FORGET, stream_exponent=keep, floating=True)
        self.silu(D_, Slot.CANDIDATE, Slot.CANDIDATE)
        # h = h + (1 - F) * (c - h). The state comes from memory and goes back there.
        self.load_rest()
        state = layer * self.state_words
        self.loads.append(Load(state, self.state_words))
        self.vector(D_, Slot.STATE, c=C.STREAM, exponent=ARGUMENT)
        self.vector(
            D_, Slot.SCALED, A.SLOT, B.MINUS_ONE, C.SLOT, a_slot=Slot.STATE, c_slot=Slot.CANDIDATE, exponent=ARGUMENT
        )
        update: dict[str, Any] = {"a_slot": Slot.SCALED, "b_slot": Slot.FORGET, "c_slot": Slot.STATE}
        self.vector(D_, Slot.STATE, A.SLOT, B.SLOT, C.SLOT, d=D.MEMORY, address=state, exponent=ARGUMENT, **update)
        self.output_gate(tensors.array("blocks.mixer.gate_norm.gain", layer))
        # The norm of the output gate comes before the norm of W_o, as the block's norm comes before those of its gates.
        codes, scale = tensors.matrix("blocks.mixer.out", layer)
        gain = tensors.array("blocks.mixer.out.gain", layer)
        self.quantised(D_, Slot.SCALED, Slot.OUTPUT, gain, scale * self.factor)
        self.ternary(codes, c=C.SLOT, exponent=RESIDUAL)

    def output_gate(self, gain: np.ndarray) -> None:
        """RMSNorm(g) * silu(h), or the paper's sigmoid(g) * RMSNorm(h); the division by the rms is left to NORM."""
        D_ = self.config.width
        if self.config.output_gate == "official":
            self.silu(D_, Slot.NORMED, Slot.STATE)
            self.scaled(D_, Slot.OUTPUT, Slot.OUTPUT, gain, Sum.INNER)
            gate, kind = Slot.NORMED, B.SLOT
        else:
            self.scaled(D_, Slot.STATE, Slot.STATE, gain, Sum.INNER)
            gate, kind = Slot.OUTPUT, B.SIGMOID
        normed = Slot.OUTPUT if kind == B.SLOT else Slot.STATE
        self.vector(D_, Slot.OUTPUT, A.SLOT, kind, a_slot=normed, b_slot=gate, floating=True)

    def channels(self, tensors: _Tensors, layer: int) -> None:
        """The GLU: down(silu(gate) * up)."""
        D_, F_ = self.config.width, self.config.glu_width
        self.scaled(D_, Slot.NORMED, Slot.RESIDUAL, tensors.array("blocks.glu_norm.gain", layer), Sum.INNER)
        # Gate and up are one tensor to the quantiser: they have the same codes, and the same scale.
        (gate, scale), (up, _) = (tensors.matrix("blocks.glu.gate_up", layer, group) for group in (0, 1))
        self.quantised(D_, Slot.SCALED, Slot.NORMED, tensors.array("blocks.glu.gate_up.gain", layer), scale)
        self.ternary(gate, d_slot=Slot.GATE, exponent=ARGUMENT)
        self.ternary(up, d_slot=Slot.UP, exponent=ARGUMENT)
        self.silu(F_, Slot.GATE, Slot.GATE)
        self.vector(F_, Slot.GATE, A.SLOT, B.SLOT, a_slot=Slot.GATE, b_slot=Slot.UP, floating=True)
        codes, scale = tensors.matrix("blocks.glu.down", layer)
        gain = tensors.array("blocks.glu.down.gain", layer)
        self.quantised(F_, Slot.UP, Slot.GATE, gain, scale * self.factor, inner=False)
        self.ternary(codes, c=C.SLOT, exponent=RESIDUAL)

    def head(self, tensors: _Tensors) -> None:
        """The last norm, and the logits."""
        D_ = self.config.width
        codes, scale = tensors.matrix("head")
        self.scaled(D_, Slot.NORMED, Slot.RESIDUAL, tensors.array("norm.gain"), Sum.INNER)
        scale *= scales(self.config).logits
        self.quantised(D_, Slot.SCALED, Slot.NORMED, tensors.array("head.gain"), scale)
        self.ternary(codes, d=D.LOGITS, exponent=RESIDUAL)

    def quantised(
        self, count: int, slot: Slot, source: Slot, gain: np.ndarray, scale: float, inner: bool = True
    ) -> None:
        """Norm, gain and quantiser of a BitLinear, and the scale of its product.

        u = v / sqrt(mean v^2 + eps) * g, q = round(127 u / max |u|). The division by the rms changes only the scale.
        `inner`: v = x * m comes from another norm that has not been divided by its rms either, of sum of squares INNER:
        then v / rms(x) is what is normed, and eps becomes eps * (mean x^2 + eps).
        """
        self.scaled(count, slot, source, gain, Sum.OUTER)
        eps = self.config.norm_eps
        floor, weight = count * eps * (eps if inner else 1), scale * math.sqrt(count) / LARGEST_CODE
        # No maximum is above sqrt(count) times the rms, so SCALE is at most this.
        self.largest_scale = weight * float(np.abs(gain).max())
        self.instructions.append(Norm(inner, constant(eps), constant(floor), constant(weight)))
        self.vector(count, Slot.RESIDUAL, A.SLOT, B.RECIPROCAL, d=D.CODES, a_slot=slot)

    def scaled(self, count: int, slot: Slot, source: Slot, gain: np.ndarray, square: Sum) -> None:
        """Multiply by a gain from memory, and sum the squares of what is multiplied."""
        exponent = self.stream(gain)
        self.vector(count, slot, A.SLOT, B.STREAM, a_slot=source, stream_exponent=exponent, sum=square, floating=True)

    def silu(self, count: int, slot: Slot, source: Slot) -> None:
        self.vector(count, slot, A.SLOT, B.SIGMOID, a_slot=source, b_slot=source, exponent=ARGUMENT)

    def vector(
        self, count: int, d_slot: Slot = Slot.RESIDUAL, a: A = A.ZERO, b: B = B.ONE, c: C = C.ZERO, **fields: Any
    ) -> None:
        self.instructions.append(Vector(Op.VECTOR, a, b, c, d_slot=d_slot, count=count, **fields))

    def ternary(self, codes_FK: np.ndarray, **fields: Any) -> None:
        """A product with a matrix. Raises ConfigError if it might not fit its exponent."""
        rows, depth = codes_FK.shape
        # The product of a sum and of SCALE's mantissa is shifted to the right only: SCALE's exponent must not be above
        # that of the result.
        limit = 2.0 ** (fields.get("exponent", 0) + MANTISSA)
        require(
            self.largest_scale < limit,
            f"a product's scale may reach {self.largest_scale:.3g} (gain, weight scale, width), and the core computes "
            f"it right below {limit:g}",
        )
        self.append(self.shape.groups(rows) * depth, lambda: matrix_bytes(codes_FK, self.shape.rows))
        self.instructions.append(Vector(Op.TERNARY, A.ACCUMULATORS, B.SCALE, count=rows, depth=depth, **fields))

    def stream(self, values: np.ndarray) -> int:
        """Append a vector as 16-bit integers and return their exponent."""
        beats, exponent = self.shape.beats(len(values)), exponent_of(values)
        padding = 0, beats * self.shape.lanes - len(values)
        self.append(beats * self.shape.words, lambda: np.pad(to_integers(values, exponent), padding).tobytes())
        return exponent

    def append(self, words: int, make: Callable[[], bytes]) -> None:
        """Append words to the image."""
        self.size += words
        if self.keep:
            self.image.append(make())
            assert len(self.image[-1]) * 8 == words * self.shape.memory_bits

    def load_rest(self) -> None:
        """Load all that has been appended since the last load."""
        if self.size > self.begin:
            self.loads.append(Load(self.begin, self.size - self.begin))
        self.begin = self.size


def matrix_bytes(codes_FK: np.ndarray, together: int) -> bytes:
    """Lay a ternary matrix out in groups of rows: word after word the weights of one column, two bits each.

    A weight's bits are its two's complement: 0, 1, or 3 for -1. The last group is filled up with zeros.
    """
    rows, depth = codes_FK.shape
    padded = np.pad(codes_FK, ((0, -rows % together), (0, 0)))
    four = padded.reshape(-1, together, depth).swapaxes(1, 2).reshape(-1, 4).astype(np.uint8) & 3
    return np.bitwise_or.reduce(four << np.array([0, 2, 4, 6], np.uint8), axis=1).tobytes()


def exponent_of(values: np.ndarray) -> int:
    """Return the smallest exponent with which all values are 16-bit integers."""
    largest = float(np.abs(values).max())
    return math.ceil(math.log2(largest / LARGEST)) if largest > 0 else 0


def to_integers(values: np.ndarray, exponent: int) -> np.ndarray:
    """Round values to 16-bit integers of an exponent."""
    return np.round(np.ldexp(values, -exponent)).astype("<i2")
