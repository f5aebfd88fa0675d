"""How many workers share a GPU, and how much of it each one gets.

The rule: at most one worker for each chain, and at most

- `MOST`;
- `WHOLE_STEP` divided by the FLOPs of the run's own step;
- what fits into the GPU's memory, each with `SPARE` times the analytic peak of its step (`lowering.memory`);
- the CPU cores and the host's memory a GPU, as each worker is a process that compiles.
"""

import math
import os
from collections.abc import Sequence

from mmfree_jax import flops
from mmfree_jax.config import RunConfig, require
from mmfree_jax.devices import DEVICES, USABLE
from mmfree_jax.lowering.memory import memory as peak_memory
from mmfree_jax.lowering.program import Report

# A small model leaves a GPU idle most of the time: while its worker starts, while it compiles on the CPU, and between
# the few short kernels of a step. Several workers fill these gaps. Large models would only slow each other down; and on
# a shared device time, energy and memory of a single run cannot be measured.

MOST = 12
WHOLE_STEP = 1e12  # FLOP: a millisecond of an H200's matrix units, several of a smaller GPU's
SPARE = 2.0  # evaluation, workspaces and autotuning come on top of a step
LEAST = 1e9  # bytes of GPU memory that any worker gets
CONTEXT = 1e9  # bytes that CUDA and its libraries hold of a GPU for each process, outside XLA's pool
HOST = 3e9  # bytes of the host's memory for each worker: jaxlib, CUDA, a compilation


def workers(chain: Sequence[RunConfig], memory: float | None, cores: float, host: float) -> int:
    """Return how many workers with chains like this one may share a GPU of `memory` bytes; 1 if that is not known.

    `cores` and `host` (bytes) are what the machine has for each of its GPUs.
    """
    # Runs over several devices communicate in every step: a neighbour that delays one of them delays all.
    if memory is None or any(run.mesh.devices > 1 for run in chain):
        return 1
    step = max(
        flops.train_flops_per_token(run.model, run.data.sequence).products * run.data.tokens_per_step for run in chain
    )
    each = max(LEAST, SPARE * max(step_bytes(run) for run in chain)) + CONTEXT
    return max(1, math.floor(min(MOST, WHOLE_STEP / step, USABLE * memory / each, cores, host / HOST)))


def step_bytes(run: RunConfig) -> float:
    """Return the peak bytes of a training step on one GPU without kernels of our own: state, activations, gradients."""
    weights = 4.0 * flops.parameters(run.model).total
    report = Report(weights, 2 * weights, sharded=1.0, traffic=(), rematerialised=0)
    return peak_memory(run, report, DEVICES["a100"]).total


def fraction(memory: float | None, sharers: int) -> float:
    """Return the share of a GPU's memory for each of several workers (XLA_PYTHON_CLIENT_MEM_FRACTION).

    Raises ConfigError if the CUDA contexts of so many processes leave nothing.
    """
    # XLA reserves its share when the process starts, so the shares and what CUDA takes outside them have to fit
    # together.
    contexts = sharers * CONTEXT / memory if memory else 0.1
    each = (USABLE - contexts) / sharers
    have = f"a GPU of {memory / 1e9:.0f} GB" if memory else "one GPU"
    require(each >= 0.01, f"--slots {sharers}: {have} has no memory for so many workers: use fewer")
    return each


def host_memory() -> float:
    """Return the bytes of main memory of this machine."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
