"""The verb `hardware`: build a core for a packed model, simulate it, or report what cores cost."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from mmfree_jax.command_line import parse
from mmfree_jax.config import ConfigError, ModelConfig, require
from mmfree_jax.errors import need
from mmfree_jax.hardware import report
from mmfree_jax.hardware.assembler import assemble, skeleton
from mmfree_jax.hardware.cycles import MemoryModel, token_cycles
from mmfree_jax.hardware.instructions import Program
from mmfree_jax.hardware.machine import Machine
from mmfree_jax.inference.packed import TOKENIZER, read_packed
from mmfree_jax.output import program as program_name


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters of the core."""

    memory_bits: int = 8
    """Bits of memory read in a cycle: half as many ternary weights."""
    lanes: int = 0
    """Elements of vectors computed in a cycle (0: one for each 8 bits of memory)."""


@dataclasses.dataclass(frozen=True)
class BuildArguments:
    """Compile a packed model (`export --format packed`) for a core: Verilog, program, memory image; and place it."""

    model: tyro.conf.Positional[Path]
    """Packed folder."""
    out: Path
    """Folder to write core.v, program.txt, program.hex, memory.bin and core.json to."""
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sizes)
    device: Literal["", "25k", "45k", "85k"] = ""
    """Also synthesise, place and route the core on this Lattice ECP5, which takes minutes."""


@dataclasses.dataclass(frozen=True)
class SimulateArguments:
    """Simulate a core that runs a packed model, and compare every token with the fixed-point model."""

    model: tyro.conf.Positional[Path]
    """Packed folder."""
    prompt: str = "The "
    """Text to continue."""
    tokens: int = 32
    """Tokens to generate."""
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sizes)
    latency: int = 20
    """Cycles until the memory answers."""


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Print cycles, tokens a second and energy of cores, by the cycle model, next to published designs."""

    memory_bits: tuple[int, ...] = (8, 64, 256)
    """Bits of memory read in a cycle, of each core."""
    lanes: int = 0
    """Elements of vectors computed in a cycle (0: one for each 8 bits of memory)."""
    mhz: float = 60.0
    """Clock."""
    bandwidth: float = 0.0
    """GB/s of the memory (0: as much as the core can take)."""
    latency: int = 20
    """Cycles until the memory answers."""


def main(arguments: list[str]) -> int:
    """Run `hardware build`, `simulate` or `report`. Returns the exit status."""
    verbs = {"build": build, "simulate": simulate, "report": show_report}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program_name()} hardware {{build,simulate,report}} … (VERB --help tells more)")
        return 0 if arguments else 1
    verb, *rest = arguments
    if verb not in verbs:
        raise ConfigError(f"hardware has no verb {verb!r}; one of {', '.join(verbs)}")
    return verbs[verb](rest)


def compile_for(model: Path, sizes: Sizes) -> tuple[Program, bytes]:
    """Compile a packed model for the smallest core that holds it."""
    facts, _ = read_packed(model)
    config: ModelConfig = facts["model"]
    shape = report.fitting(config, sizes.memory_bits, sizes.lanes)
    # Memories have a power of two of rows anyway.
    needed = skeleton(config, shape)
    rows = {name: 1 << (len(getattr(needed, name)) - 1).bit_length() for name in ("instructions", "loads")}
    return assemble(model, dataclasses.replace(shape, **rows))


def build(arguments: list[str]) -> int:
    """Write everything that a board needs."""
    chosen = parse(BuildArguments, arguments, f"{program_name()} hardware build")
    program, image = compile_for(chosen.model, chosen.sizes)
    synthesis = extra("synthesis")
    chosen.out.mkdir(parents=True, exist_ok=True)
    verilog = synthesis.write_verilog(program.shape, chosen.out)
    words = extra("core.core").program_words(program)
    (chosen.out / "memory.bin").write_bytes(image)
    (chosen.out / "program.txt").write_text(str(program), encoding="utf-8")
    (chosen.out / "program.hex").write_text("".join(f"{a:04x} {w:08x}\n" for a, w in words), encoding="utf-8")
    facts = {"core": dataclasses.asdict(program.shape), "vocab": program.vocab, "layers": program.depth}
    sizes = f"{program.shape.rows} ternary weights a cycle, {program.shape.lanes} lanes"
    print(f"{verilog}: {sizes}; {len(image):,} bytes of memory")
    if chosen.device:
        with tempfile.TemporaryDirectory() as folder:
            placed = synthesis.place(program.shape, Path(folder), chosen.device)
        facts["placed"] = dataclasses.asdict(placed)
        cells = f"{placed.luts} LUTs, {placed.block_rams} block RAMs, {placed.multipliers} multipliers"
        print(f"ECP5 {placed.device}: {cells}, {placed.mhz} MHz")
    (chosen.out / "core.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def simulate(arguments: list[str]) -> int:
    """Generate with the simulated core and with the fixed-point model."""
    chosen = parse(SimulateArguments, arguments, f"{program_name()} hardware simulate")
    require(chosen.tokens >= 1, f"--tokens {chosen.tokens}: must be at least 1")
    require(chosen.latency >= 1, f"--latency {chosen.latency}: must be at least 1")
    simulation = extra("simulate")
    program, image = compile_for(chosen.model, chosen.sizes)
    tokenizer = read_tokenizer(chosen.model)
    prompt = tokenizer.encode(chosen.prompt).ids
    require(bool(prompt), "--prompt: must hold at least one token")
    with tempfile.TemporaryDirectory() as folder:
        binary = simulation.build_simulation(program.shape, Path(folder))
        with simulation.Simulation(binary, program, image, Path(folder), latency=chosen.latency) as core:
            found, cycles = core.generate(prompt, chosen.tokens)
    expected = Machine(program, image).generate(prompt, chosen.tokens)
    print(chosen.prompt + tokenizer.decode(found))
    predicted = token_cycles(program, MemoryModel(chosen.latency))
    mean = float(np.mean(cycles))
    print(f"{mean:,.0f} cycles a token, {mean / predicted.total - 1:+.2%} of the cycle model")
    differ = next((n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
    require(differ is None, f"token {differ} is not that of the fixed-point model")
    print(f"{len(found)} tokens, equal to the fixed-point model's")
    return 0


def show_report(arguments: list[str]) -> int:
    """Print the tables."""
    chosen = parse(ReportArguments, arguments, f"{program_name()} hardware report")
    require(0 < chosen.mhz < math.inf, f"--mhz {chosen.mhz}: must be positive")
    require(chosen.latency >= 1, f"--latency {chosen.latency}: must be at least 1")
    require(chosen.bandwidth >= 0, f"--bandwidth {chosen.bandwidth}: must not be negative")
    for bits in chosen.memory_bits:
        most = bits / 8 * chosen.mhz / 1e3
        used = min(chosen.bandwidth or most, most)
        lanes = chosen.lanes or max(1, bits // 8)
        memory = MemoryModel(chosen.latency, used / most)
        table = report.core_table(bits, lanes, chosen.mhz, memory)
        print(f"core of {bits} bits of memory and {lanes} lanes at {chosen.mhz:g} MHz, {used:.4g} GB/s (modelled)\n")
        print("\n".join(table), end="\n\n")
    print("published designs (their authors' figures)\n")
    print("\n".join(report.published_table()))
    return 0


def read_tokenizer(model: Path):
    """Return the tokenizer of a packed folder. Raises ConfigError if it has none."""
    from tokenizers import Tokenizer

    require((model / TOKENIZER).is_file(), f"{model} has no {TOKENIZER}")
    return Tokenizer.from_file(str(model / TOKENIZER))


def extra(module: str):
    """Import a module that needs the extra `hardware`. Raises ConfigError, in one line, without it."""
    return need(f"mmfree_jax.hardware.{module}", "`hardware`", "'mmfree-jax[hardware]'")
