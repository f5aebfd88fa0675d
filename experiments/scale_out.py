"""One device against two: tokens a second at the same batch on each, and what travels between them.

    python experiments/scale_out.py > experiments/results/scale_out.md        # on a machine with two GPUs, 8 minutes

Expected on two H200s joined by NVLink: an efficiency of 95 % or more. A line is printed as soon as it is measured;
compiling takes most of the time, and presets that are named, `scale_out.py matmul-free-1.3b`, are the only ones.
`--small` tries the script on CPU, where XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two devices out of one
and the times mean nothing.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from mmfree_jax.config import MeshConfig, RunConfig
from mmfree_jax.lowering.program import Traffic, read_traffic
from mmfree_jax.presets import run_preset
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import make_program, program_key

PRESETS = ("transformer++-370m", "matmul-free-370m", "transformer++-1.3b", "matmul-free-1.3b")
SMALL = ("transformer++-tiny", "matmul-free-tiny")
WARM, ROUNDS, STEPS = 3, 5, 5  # steps before timing; timed rounds of steps queued one behind the other


@dataclass(frozen=True)
class Measurement:
    """One preset on so many devices."""

    tokens_per_s: float
    least: float
    most: float
    traffic: tuple[Traffic, ...]


def run_of(preset: str, devices: int, small: bool) -> RunConfig:
    """The same batch on every device, parameters cut over all of them, layers unrolled."""
    run = run_preset(preset)
    rows, sequence = (2, 64) if small else (8, 2048)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, batch=rows * devices, sequence=sequence),
        mesh=MeshConfig(fsdp=devices),
        remat="none",
        unroll=run.model.depth,
    )


def measure(run: RunConfig) -> Measurement:
    """Median, least and most of the rounds, waiting only at their ends."""
    program = make_program(program_key(run, end_of_document=None))
    shape = (run.data.batch, run.data.sequence + 1)
    tokens = np.random.default_rng(0).integers(0, run.model.vocab, shape, dtype=np.int32)
    rates = []
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        batch = program.place(tokens)
        now = program.repeat(Rates(np.float32(1e-4), np.float32(1)))
        compiled = program.train_step.lower(state, batch, now).compile()
        for steps in [WARM, *[STEPS] * ROUNDS]:
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = compiled(state, batch, now)
            jax.block_until_ready(metrics)
            rates.append(steps * run.data.tokens_per_step / (time.perf_counter() - began))
    rates, found = rates[1:], read_traffic(compiled.as_text() or "", run.mesh)
    return Measurement(statistics.median(rates), min(rates), max(rates), tuple(found))


def sent(found: Measurement, kind: str) -> str:
    """GB that one device sends in a step, by type."""
    parts = [f"{one.sent / 1e9:.3f} {one.dtype}" for one in found.traffic if one.kind == kind and one.sent > 0]
    return ", ".join(parts) or "none"


def rows(preset: str, small: bool) -> Iterator[str]:
    """The lines of one preset, each when it is measured: one device, then two."""
    alone = 0.0
    for devices in (1, 2):
        found = measure(run_of(preset, devices, small))
        alone = alone or found.tokens_per_s
        rates = f"{found.tokens_per_s:,.0f} | {found.least:,.0f} to {found.most:,.0f}"
        efficiency = f"{found.tokens_per_s / (devices * alone):.1%}"
        travelled = f"{sent(found, 'all-gather')} | {sent(found, 'reduce-scatter')}"
        yield f"| {preset} | {devices} | {rates} | {efficiency} | {travelled} |"
        make_program.cache_clear()
        jax.clear_caches()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="One device against two.")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("presets", nargs="*", help=f"which to measure (default: {', '.join(PRESETS)})")
    arguments = parser.parse_args()
    small = arguments.small
    if jax.device_count() < 2:
        raise SystemExit(f"scale_out: needs two devices, {jax.device_count()} found")
    shape = "2 x 64" if small else "8 x 2048"
    print(f"# One and two x {jax.devices()[0].device_kind}, jax {jax.__version__}, {shape} tokens on each\n")
    print("Median, least and most of five rounds of five queued steps. Sent: by one device in a step.\n")
    print("| preset | devices | tokens/s | least to most | efficiency | weights gathered, GB | gradients reduced, GB |")
    print("|---|---:|---:|---|---:|---|---|", flush=True)
    for preset in arguments.presets or (SMALL if small else PRESETS):
        for row in rows(preset, small):
            print(row, flush=True)


if __name__ == "__main__":
    main()
