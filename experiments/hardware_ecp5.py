"""What does the FPGA core take of a Lattice ECP5? `python -m experiments.hardware_ecp5` (needs the extra `hardware`).

Each core is synthesised with Yosys, placed and routed with nextpnr on an LFE5U-85F of the slowest speed grade, aimed at
100 MHz: results/hardware_ecp5.csv has its LUTs, flip-flops, block RAMs, multipliers and the clock it reaches. Then the
cycle model gives tokens a second of each model at that clock, in results/hardware_speed.csv, although a core for a
wider model has more block RAM (half of an LFE5U-85F's for 2.7b) and may reach a lower one.

The cores are one of 8 bits, as the paper's, for its block of d = 512; and one of 16 bits for matmul-free-tiny. About
six minutes on an idle CPU.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from experiments.hardware_core import write
from mmfree_jax.hardware.instructions import CoreShape
from mmfree_jax.hardware.report import core_rows
from mmfree_jax.hardware.synthesis import Placed, place

CORES = CoreShape(8, 1, 512, 1536), CoreShape(16, 2, 128, 384)


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    placed: list[Placed] = []
    for core in CORES:
        with tempfile.TemporaryDirectory() as folder:
            placed.append(place(core, Path(folder)))
        print(placed[-1], flush=True)
    write(out / "hardware_ecp5.csv", [dataclasses.asdict(one) for one in placed])
    speed = []
    for one in placed:
        for row in core_rows(one.memory_bits, one.lanes, one.mhz):
            figures = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            speed.append({"memory_bits": one.memory_bits, "lanes": one.lanes, "mhz": one.mhz, **figures})
    write(out / "hardware_speed.csv", speed)


if __name__ == "__main__":
    main()
