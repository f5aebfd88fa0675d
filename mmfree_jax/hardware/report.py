"""What a core costs and gives: cycles, tokens a second and energy by the cycle model, next to published designs."""

import dataclasses
from collections.abc import Iterator

from mmfree_jax.config import ModelConfig
from mmfree_jax.hardware.assembler import skeleton
from mmfree_jax.hardware.cycles import ANSWERS, Cycles, MemoryModel, token_cycles
from mmfree_jax.hardware.instructions import CoreShape, D, Program, Vector, words_read
from mmfree_jax.presets import model_preset

MODELS = ("tiny", "370m", "1.3b", "2.7b")

# Energy of operations in 45 nm CMOS, in pJ: a bit from DRAM, 32 bits from a small SRAM, a 32-bit addition and
# multiplication (Han et al. 2016, arXiv 1602.01528, table I, after Horowitz, ISSCC 2014). Logic of an FPGA takes 14
# times the dynamic energy of standard cells (Kuon & Rose 2007, IEEE TCAD 26(2)).
DRAM_BIT, SRAM_WORD, ADD, MULTIPLY = 640 / 32, 5.0, 0.1, 3.1
FPGA = 14


def paper_block() -> ModelConfig:
    """Return the block that Zhu et al. 2024 ran on an FPGA: d = 512 (arXiv 2406.02528, section 5), in one layer."""
    return dataclasses.replace(model_preset("matmul-free", "370m"), width=512, glu_width=1536, depth=1)


def fitting(config: ModelConfig, memory_bits: int, lanes: int = 0) -> CoreShape:
    """Return the core of these sizes for a model; without lanes, one for each 8 bits."""
    return CoreShape(memory_bits, lanes or max(1, memory_bits // 8), config.width, config.glu_width)


def block_cycles(config: ModelConfig, shape: CoreShape, memory: MemoryModel = ANSWERS) -> Cycles:
    """Predict the cycles of one block: what a second layer adds to a token."""
    one, two = (token_cycles(skeleton(dataclasses.replace(config, depth=n), shape), memory) for n in (1, 2))
    return Cycles(*(b - a for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True)))


def model_cycles(config: ModelConfig, shape: CoreShape, memory: MemoryModel = ANSWERS) -> Cycles:
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
            words += 2 * program.shape.words * program.shape.beats(i.count) if i.d == D.MEMORY else 0
            additions += i.count * i.depth  # depth is zero but for products
    memory = words * program.shape.memory_bits * DRAM_BIT
    return memory * 1e-12, (additions * ADD + elements * (MULTIPLY + ADD + 4 * SRAM_WORD)) * 1e-12


@dataclasses.dataclass(frozen=True)
class Design:
    """A published design: what its authors state, and what follows from it.

    rate: tokens/s, or blocks/s of a single block. weights: ternary weights that a token or block reads. bits: of a
    weight in memory. bandwidth: GB/s; 0 if weights are on the chip, or if it is not stated.
    """

    name: str
    model: str
    rate: float
    weights: float
    bits: float
    bandwidth: float
    watts: float
    source: str

    @property
    def normalised(self) -> float:
        """Tokens (blocks) a second for each GB/s; 0 if unknown."""
        return self.rate / self.bandwidth if self.bandwidth else 0.0

    @property
    def share(self) -> float:
        """Of the rate at which the memory could give the weights; 0 if unknown."""
        return self.normalised * self.weights * self.bits / 8e9


W_370M, W_2_7B, W_BLOCK = 341_049_344, 2_619_473_920, 3_407_872
PUBLISHED = (
    Design("Zhu et al. 2024, one core at 60 MHz", "block d=512", 1 / 43e-3, W_BLOCK, 2, 0.06, 13.67,
           "arXiv 2406.02528, section 5: 43 ms; bandwidth nominal: 8 bits a cycle"),
    Design("TerEffic, on chip", "370m", 16_300, W_370M, 1.6, 0, 16_300 / 455, "arXiv 2502.16473v2"),
    Design("TerEffic, HBM", "2.7b", 727, W_2_7B, 1.6, 0, 46, "arXiv 2502.16473v2; bandwidth not in its abstract"),
    Design("TeLLMe v2, KV260", "BitNet", 25, 0, 1.6, 19.2, 5,
           "Qiao et al. 2025, TeLLMe v2; bandwidth nominal: DDR4-2400 of 64 bits"),
    Design("matmulfree_KRIA, K26", "370m, products only", 16e9 / (W_370M / 4), W_370M, 2, 16, 0,
           "github.com/aebarthyi/matmulfree_KRIA; nominal: the bound of 512 bits at 250 MHz"),
)  # fmt: skip


def core_rows(memory_bits: int, lanes: int, mhz: float, memory: MemoryModel = ANSWERS) -> Iterator[dict]:
    """Yield what a core gives for each model, and for the paper's block."""
    for name in ("block d=512", *MODELS):
        block = name.startswith("block")
        config = paper_block() if block else model_preset("matmul-free", name)
        shape = fitting(config, memory_bits, lanes)
        cycles = (block_cycles if block else model_cycles)(config, shape, memory)
        one = block_cycles(config, shape, memory)
        rate, bandwidth = mhz * 1e6 / cycles.total, memory_bits / 8 * mhz * memory.rate / 1e3
        read, computed = (0.0, 0.0) if block else energy(skeleton(config, shape))
        yield {
            "model": name,
            "cycles": round(cycles.total),
            "block_over_bound": round(one.total / one.bound, 3),
            "products_of_bound": round(one.bound / one.products, 4),
            "per_second": rate,
            "gb_per_s": bandwidth,
            "per_second_per_gb_per_s": rate / bandwidth,
            "mj_memory": read * 1e3,
            "mj_core_fpga": computed * 1e3 * FPGA,
        }


def core_table(memory_bits: int, lanes: int, mhz: float, memory: MemoryModel = ANSWERS) -> list[str]:
    """Return `core_rows` as a table in Markdown."""
    lines = [
        "| model | cycles | block / memory bound | products at | per s | per s per GB/s | mJ memory | mJ logic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in core_rows(memory_bits, lanes, mhz, memory):
        joules = f"{row['mj_memory']:.3g} | {row['mj_core_fpga']:.3g}" if row["mj_memory"] else "– | –"
        lines.append(
            f"| {row['model']} | {row['cycles']:,} | {row['block_over_bound']:.3f} | {row['products_of_bound']:.1%} | "
            f"{row['per_second']:.4g} | {row['per_second_per_gb_per_s']:.4g} | {joules} |"
        )
    return lines


def published_table() -> list[str]:
    """Return the published designs as a table in Markdown."""
    head = "| design | model | per s | GB/s | per s per GB/s | of its bound | W | source |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    known = lambda number, form: format(number, form) if number else "–"
    for d in PUBLISHED:
        figures = known(d.bandwidth, ".4g"), known(d.normalised, ".4g"), known(d.share, ".0%"), known(d.watts, ".3g")
        lines.append(f"| {d.name} | {d.model} | {d.rate:.4g} | {' | '.join(figures)} | {d.source} |")
    return lines
