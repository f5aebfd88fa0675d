"""What a core costs and gives: cycles, tokens a second and energy by the cycle model, next to published designs."""

import dataclasses
from collections.abc import Iterator

from mmfree_jax.config import ModelConfig
from mmfree_jax.hardware.assembler import skeleton
from mmfree_jax.hardware.cycles import Cycles, MemoryModel, token_cycles
from mmfree_jax.hardware.instructions import A, B, C, CoreShape, Norm, Op, Program, Vector, words_read
from mmfree_jax.presets import model_preset

MODELS = ("tiny", "370m", "1.3b", "2.7b")

# Energy of operations in 45 nm CMOS, in pJ: 32 bits from DRAM and from a small SRAM, a 32-bit addition and
# multiplication (Han et al. 2016, arXiv 1602.01528, table I, after Horowitz, ISSCC 2014). Logic of an FPGA takes 14 times
# the dynamic energy of standard cells (Kuon & Rose 2007, IEEE TCAD 26(2), table IV).
DRAM_BIT, SRAM_WORD, ADD, MULTIPLY = 640 / 32, 5.0, 0.1, 3.1
FPGA = 14


def paper_block() -> ModelConfig:
    """Return the block that Zhu et al. 2024 ran on an FPGA: d = 512 (arXiv 2406.02528, section 5), in one layer."""
    return dataclasses.replace(model_preset("matmul-free", "370m"), width=512, glu_width=1536, depth=1)


def fitting(config: ModelConfig, memory_bits: int, lanes: int = 0) -> CoreShape:
    """Return the core of these sizes for a model; without lanes, one for each 8 bits."""
    return CoreShape(memory_bits, lanes or max(1, memory_bits // 8), config.width, config.glu_width)


def block_cycles(config: ModelConfig, shape: CoreShape, memory: MemoryModel = MemoryModel()) -> Cycles:
    """Predict the cycles of one block: what a second layer adds to a token."""
    one, two = (token_cycles(skeleton(dataclasses.replace(config, depth=n), shape), memory) for n in (1, 2))
    return Cycles(*(b - a for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True)))


def model_cycles(config: ModelConfig, shape: CoreShape, memory: MemoryModel = MemoryModel()) -> Cycles:
    """Predict the cycles of a token of a whole model: one layer, and as many more blocks."""
    one = token_cycles(skeleton(dataclasses.replace(config, depth=1), shape), memory)
    block = block_cycles(config, shape, memory)
    parts = zip(dataclasses.astuple(one), dataclasses.astuple(block), strict=True)
    return Cycles(*(a + (config.depth - 1) * b for a, b in parts))


def energy(program: Program) -> tuple[float, float]:
    """Estimate the dynamic energy of a token in joules: of the memory, and of the core in standard cells.

    Every word that is read or written counts as DRAM; a weight as an addition; an element of a vector as one
    multiplication, one addition and four words of SRAM. Leakage, clocks and wires are not in it.
    """
    words = additions = elements = 0
    for i in program.instructions:
        words += words_read(i, program.shape)
        if isinstance(i, Vector):
            elements += i.count
            words += 2 * program.shape.words * program.shape.beats(i.count) if i.address and i.op != Op.TERNARY else 0
            additions += i.count * i.depth if i.op == Op.TERNARY else 0
    memory = words * program.shape.memory_bits * DRAM_BIT
    return memory * 1e-12, (additions * ADD + elements * (MULTIPLY + ADD + 4 * SRAM_WORD)) * 1e-12
