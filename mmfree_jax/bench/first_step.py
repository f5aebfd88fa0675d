"""How long a training process waits before its first step: at a cold start, and where it finds compiled programs."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax.bench.steps import StepCase
from mmfree_jax.devices import use_compile_cache
from mmfree_jax.training.step import make_program, program_key

# Each start is a process of its own, as a user's are: within one process a kernel's name, and with it the key under
# which a program is kept, depends on what was compiled before.

FULL = (StepCase("transformer++-1.3b", 8, 2048), StepCase("matmul-free-1.3b", 8, 2048))
SMALL = (StepCase("transformer++-tiny", 2, 64), StepCase("matmul-free-tiny", 2, 64))


def measure(case: StepCase) -> Iterator[dict[str, Any]]:
    """A row for the cold start and one for the warm one. Raises RuntimeError with what a failed start printed last.

    Seconds: `start_s` until the process has started and set up the model, `lower_s` traces the step and lowers it,
    `compile_s` compiles it or loads it. `compiled`: programs that were not found and had to be compiled.
    """
    shape = {"preset": case.preset, "batch": case.batch, "sequence": case.sequence}
    # What the caller holds of the device's memory is not there for another process to reserve.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as cache:
        programs = lambda: sum(name.endswith("-cache") for name in os.listdir(cache))
        for start in ("cold", "warm"):
            before = programs()
            command = [sys.executable, "-m", __name__, *map(str, shape.values()), cache, str(time.time())]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                raise RuntimeError(f"the first step of {case.preset}: {done.stderr.strip().splitlines()[-1:]}")
            seconds = json.loads(done.stdout.splitlines()[-1])
            yield {**shape, "start": start, **seconds, "compiled": programs() - before}


def main() -> None:
    """Prepare the step as `train` does, and print the seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("preset")
    parser.add_argument("batch", type=int)
    parser.add_argument("sequence", type=int)
    parser.add_argument("cache", type=Path)
    parser.add_argument("began", type=float, help="when this process was started, in seconds since the epoch")
    asked = parser.parse_args()
    use_compile_cache(asked.cache)
    program = make_program(program_key(StepCase(asked.preset, asked.batch, asked.sequence).run(), end_of_document=None))
    started = time.time()
    with jax.set_mesh(program.mesh):
        tokens = jax.ShapeDtypeStruct((asked.batch, asked.sequence + 1), np.int32)
        rate = jax.ShapeDtypeStruct((), np.float32)
        lowered = program.train_step.lower(program.abstract_state, tokens, rate)
        lowered_at = time.time()
        lowered.compile()
    compile_s = time.time() - lowered_at
    print(json.dumps({"start_s": started - asked.began, "lower_s": lowered_at - started, "compile_s": compile_s}))


if __name__ == "__main__":
    main()
