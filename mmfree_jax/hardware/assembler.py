"""The assembler: a packed checkpoint becomes a program and a memory image.

The image holds, in this order, the states of all layers (zeros at the beginning of a text), the embedding, and all else
in the order in which a token needs it: that the memory is read in one sequence is what lets reading run ahead.
"""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import ModelConfig, require
from mmfree_jax.hardware.arithmetic import ARGUMENT, constant
from mmfree_jax.hardware.instructions import A, B, C, CoreShape, D, Instruction, Load, Norm, Op, Program, Slot, Sum, Vector
from mmfree_jax.inference.packed import read_packed
from mmfree_jax.ops.packed import Packed
from mmfree_jax.parametrisation import scales

RESIDUAL = -16  # exponent of the residual stream and of the logits: magnitudes up to 32,768
HALF = 2**15 - 1  # largest 16-bit integer
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
    build.embedding(np.asarray(tensors["embedding"], np.float64))
    for layer in range(config.depth):
        build.block(_Layer(tensors, layer, config, facts["layout"]))
    build.head(tensors, facts["layout"])
    program = build.program()
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
    require(max(config.width, config.glu_width) < 2**16, "the core computes widths up to 65,535")


class _Layer:
    """The tensors of one layer."""

    def __init__(self, tensors: dict[str, np.ndarray], layer: int, config: ModelConfig, layout: Any):
        self.tensors, self.layer, self.config, self.layout = tensors, layer, config, layout

    def gain(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[f"blocks.{name}.gain"][self.layer], np.float64)

    def floor(self) -> np.ndarray:
        """Of the forget gate: zero without lower bounds."""
        if "floors" not in self.tensors:
            return np.zeros(self.config.width)
        return np.asarray(self.tensors["floors"][self.layer], np.float64)

    def matrix(self, name: str, group: int = 0) -> tuple[np.ndarray, float]:
        width = self.config.glu_width if name == "glu.down" else self.config.width
        return unpack(self.tensors, f"blocks.{name}", (self.layer, group), width, self.layout)


def unpack(tensors: dict[str, np.ndarray], name: str, place: tuple[int, int], width: int, layout: Any):
    """Return a ternary matrix [rows, columns] as codes in {-1, 0, 1}, int8, and its scale."""
    codes = Packed(jnp.asarray(tensors[f"{name}.codes"][place]), jnp.ones((1, 1)), layout).unpacked(width).codes
    (scale,) = np.asarray(tensors[f"{name}.scale"][place], np.float64)
    return np.asarray(codes).T, float(scale)


class _Builder:
    """Appends to the program and to the image together, so that both have the same order."""

    def __init__(self, shape: CoreShape, config: ModelConfig):
        self.shape, self.config = shape, config
        self.instructions: list[Instruction] = []
        self.loads: list[Load] = []
        self.state_words = shape.beats(config.width) * 2 * shape.words
        self.image = [bytes(self.state_words * config.depth * shape.memory_bits // 8)]
        self.size = self.state_words * config.depth  # words of the image
        self.begin = self.size  # of what no load reads yet
        self.layers = 0

    def program(self) -> Program:
        self.instructions.append(Vector(op=Op.END))
        self.load_rest()
        config = self.config
        return Program(
            self.shape, tuple(self.instructions), tuple(self.loads), config.vocab, config.width, config.depth
        )

    def embedding(self, table_VD: np.ndarray) -> None:
        """One row of the table becomes the residual stream."""
        integers, exponent = to_integers(table_VD)
        count, row = self.config.width, self.shape.beats(self.config.width) * self.shape.words
        padded = np.pad(integers, ((0, 0), (0, self.shape.beats(count) * self.shape.lanes - count)))
        self.append(padded.astype("<i2").tobytes())
        self.loads.append(Load(self.begin, row, row))
        self.begin = self.size
        self.vector(count, Slot.RESIDUAL, A.STREAM, stream_exponent=exponent, exponent=RESIDUAL)

    def block(self, layer: _Layer) -> None:
        """Mixer and channel mixer, as `models.language_model.Block` computes them."""
        factor = scales(self.config).residual
        self.mixer(layer, factor)
        self.channels(layer, factor)
        self.layers += 1

    def mixer(self, layer: _Layer, factor: float) -> None:
        D_, fixed = self.config.width, {"exponent": ARGUMENT}
        # Two norms follow each other, RMSNorm(RMSNorm(x) * m) * g: the sum of squares of each is a by-product of
        # multiplying by its gain, and NORM takes both into the scale of the product.
        self.scaled(D_, Slot.NORMED, Slot.RESIDUAL, layer.gain("mixer_norm"), Sum.INNER)
        gains = layer.gain("mixer.gates")
        for group, slot in enumerate((Slot.CANDIDATE, Slot.FORGET, Slot.OUTPUT)):
            codes, scale = layer.matrix("mixer.gates", group)
            self.quantised(D_, Slot.SCALED, Slot.NORMED, gains[group], scale)
            self.ternary(codes, d_slot=slot, exponent=ARGUMENT)
        # 1 - F = (1 - floor) * sigmoid(-f), and the candidate silu(i).
        keep = self.stream(1 - layer.floor())
        self.vector(D_, Slot.FORGET, A.STREAM, B.SIGMOID_MINUS, b_slot=Slot.FORGET, stream_exponent=keep, floating=True)
        self.silu(D_, Slot.CANDIDATE, Slot.CANDIDATE)
        # h = h + (1 - F) * (c - h). The state comes from memory and goes back there.
        self.load_rest()
        state = self.layers * self.state_words
        self.loads.append(Load(state, self.state_words))
        self.vector(D_, Slot.STATE, c=C.STREAM, **fixed)
        self.vector(D_, Slot.SCALED, A.SLOT, B.MINUS_ONE, C.SLOT, a_slot=Slot.STATE, c_slot=Slot.CANDIDATE, **fixed)
        update = {"a_slot": Slot.SCALED, "b_slot": Slot.FORGET, "c_slot": Slot.STATE}
        self.vector(D_, Slot.STATE, A.SLOT, B.SLOT, C.SLOT, **update, **fixed)
        self.vector(D_, c=C.SLOT, d=D.MEMORY, c_slot=Slot.STATE, address=state, **fixed)
        self.output_gate(layer)
        # The norm of the output gate comes before the norm of W_o, as one block's norm does before those of its gates.
        codes, scale = layer.matrix("mixer.out")
        self.quantised(D_, Slot.SCALED, Slot.OUTPUT, layer.gain("mixer.out"), scale * factor)
        self.ternary(codes, c=C.SLOT, exponent=RESIDUAL)

    def output_gate(self, layer: _Layer) -> None:
        """RMSNorm(g) * silu(h), or the paper's sigmoid(g) * RMSNorm(h); the division by the rms is left to NORM."""
        D_, gain = self.config.width, layer.gain("mixer.gate_norm")
        if self.config.output_gate == "official":
            self.silu(D_, Slot.NORMED, Slot.STATE)
            self.scaled(D_, Slot.OUTPUT, Slot.OUTPUT, gain, Sum.INNER)
            gate, kind = Slot.NORMED, B.SLOT
        else:
            self.scaled(D_, Slot.STATE, Slot.STATE, gain, Sum.INNER)
            gate, kind = Slot.OUTPUT, B.SIGMOID
        normed = Slot.OUTPUT if kind == B.SLOT else Slot.STATE
        self.vector(D_, Slot.OUTPUT, A.SLOT, kind, a_slot=normed, b_slot=gate, floating=True)

    def channels(self, layer: _Layer, factor: float) -> None:
        D_, F_ = self.config.width, self.config.glu_width
        self.scaled(D_, Slot.NORMED, Slot.RESIDUAL, layer.gain("glu_norm"), Sum.INNER)
        # Gate and up are one tensor to the quantiser: they have the same codes, and the same scale.
        (gate, scale), (up, _) = (layer.matrix("glu.gate_up", group) for group in (0, 1))
        self.quantised(D_, Slot.SCALED, Slot.NORMED, layer.gain("glu.gate_up"), scale)
        self.ternary(gate, d_slot=Slot.GATE, exponent=ARGUMENT)
        self.ternary(up, d_slot=Slot.UP, exponent=ARGUMENT)
        self.silu(F_, Slot.GATE, Slot.GATE)
        self.vector(F_, Slot.GATE, A.SLOT, B.SLOT, a_slot=Slot.GATE, b_slot=Slot.UP, floating=True)
        codes, scale = layer.matrix("glu.down")
        self.quantised(F_, Slot.UP, Slot.GATE, layer.gain("glu.down"), scale * factor, inner=False)
        self.ternary(codes, c=C.SLOT, exponent=RESIDUAL)

    def head(self, tensors: dict[str, np.ndarray], layout: Any) -> None:
        D_ = self.config.width
        codes, scale = unpack(tensors, "head", (0, 0), D_, layout)
        self.scaled(D_, Slot.NORMED, Slot.RESIDUAL, np.asarray(tensors["norm.gain"], np.float64), Sum.INNER)
        gain = np.asarray(tensors["head.gain"], np.float64)
        self.quantised(D_, Slot.SCALED, Slot.NORMED, gain, scale * scales(self.config).logits)
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
        self.instructions.append(Norm(inner, constant(eps), constant(floor), constant(weight)))
        self.vector(count, Slot.RESIDUAL, A.SLOT, B.RECIPROCAL, d=D.CODES, a_slot=slot)

    def scaled(self, count: int, slot: Slot, source: Slot, gain: np.ndarray, square: Sum) -> None:
        """Multiply by a gain from memory, and sum the squares of what is multiplied."""
        exponent = self.stream(gain)
        self.vector(
            count, slot, A.SLOT, B.STREAM, a_slot=source, stream_exponent=exponent, sum=square, floating=True
        )

    def silu(self, count: int, slot: Slot, source: Slot) -> None:
        self.vector(count, slot, A.SLOT, B.SIGMOID, a_slot=source, b_slot=source, exponent=ARGUMENT)

    def vector(
        self, count: int, d_slot: Slot = Slot.RESIDUAL, a: A = A.ZERO, b: B = B.ONE, c: C = C.ZERO, **fields: Any
    ) -> None:
        self.instructions.append(Vector(Op.VECTOR, a, b, c, d_slot=d_slot, count=count, **fields))

    def ternary(self, codes_FK: np.ndarray, **fields: Any) -> None:
        """A product with a matrix, whose rows lie in groups: word after word the weights of one column."""
        rows, depth = codes_FK.shape
        groups = self.shape.groups(rows)
        padded = np.pad(codes_FK, ((0, groups * self.shape.rows - rows), (0, 0)))
        words = padded.reshape(groups, self.shape.rows, depth).swapaxes(1, 2).reshape(-1, 4) & 3
        self.append(np.bitwise_or.reduce(words.astype(np.uint8) << np.arange(0, 8, 2, np.uint8), axis=1).tobytes())
        operands = {"a": A.ACCUMULATORS, "b": B.SCALE}
        self.instructions.append(Vector(Op.TERNARY, **operands, **fields, count=rows, depth=depth))

    def stream(self, values: np.ndarray) -> int:
        """Append a vector as 16-bit integers and return their exponent."""
        integers, exponent = to_integers(values)
        padding = self.shape.beats(len(values)) * self.shape.lanes - len(values)
        self.append(np.pad(integers, (0, padding)).astype("<i2").tobytes())
        return exponent

    def append(self, data: bytes) -> None:
        self.image.append(data)
        self.size += len(data) * 8 // self.shape.memory_bits

    def load_rest(self) -> None:
        """Load all that has been appended since the last load."""
        if self.size > self.begin:
            self.loads.append(Load(self.begin, self.size - self.begin))
        self.begin = self.size


def to_integers(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return values as 16-bit integers and their common exponent: the smallest with which all fit."""
    largest = float(np.abs(values).max())
    exponent = math.ceil(math.log2(largest / HALF)) if largest > 0 else 0
    return np.round(np.ldexp(values, -exponent)).astype(np.int64), exponent
