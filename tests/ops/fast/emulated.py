"""C++ kernels compiled for ARM and run by an emulator."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from mmfree_jax.ops.fast.cpu import library


def arm_program(folder: Path, code: str) -> Callable[..., tuple[list[str], bytes]]:
    """Compile a program; returns a function from a kind of CPU and arrays to the names and the bytes that it writes."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        assert "REQUIRE_ARM" not in os.environ, "g++-aarch64-linux-gnu or qemu-user is missing, and REQUIRE_ARM is set"
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    (folder / "main.cc").write_text(code)
    program = folder / "main"
    flags = [flag for flag in library.FLAGS if flag not in ("-shared", "-fPIC")]
    command = [compiler, *flags, "-static", f"-I{jax.ffi.include_dir()}", str(folder / "main.cc"), "-o", str(program)]
    subprocess.run(command, check=True)

    def run(cpu: str, *arrays: np.ndarray) -> tuple[list[str], bytes]:
        given = b"".join(a.tobytes() for a in arrays)
        done = subprocess.run([emulator, "-cpu", cpu, str(program)], input=given, capture_output=True, check=True)
        return done.stderr.decode().split(), done.stdout

    return run
