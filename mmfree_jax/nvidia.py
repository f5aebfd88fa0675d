"""Asks NVIDIA's management library (NVML) about GPUs. It may be missing, old, or not permitted to answer.

GPUs have the names that CUDA uses: a number, a UUID or the beginning of one, or the name of a MIG instance. Nothing
here imports JAX.
"""

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARERS = "MMFREE_JAX_SHARERS"  # number of workers on a GPU; set by the sweep that starts them


def named_by_cuda() -> list[str] | None:
    """Return the GPU names in CUDA_VISIBLE_DEVICES up to a negative one, as CUDA does; None if it is not set."""
    if VISIBLE not in os.environ:
        return None
    named = [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    return list(itertools.takewhile(lambda name: not name.startswith("-"), named))


def visible() -> list[str]:
    """Return the GPUs that a process started here may use; empty if no driver answers."""
    named = named_by_cuda()
    if named is not None:
        return named
    return [str(number) for number in range(_ask(lambda nvml: nvml.nvmlDeviceGetCount()) or 0)]


def is_shared() -> bool:
    """Return whether other workers of the sweep use this process's GPU, so that times and energy mean nothing."""
    return int(os.environ.get(SHARERS) or 1) > 1


def memory_bytes(name: str) -> int | None:
    """Return the memory of a GPU or MIG instance; None if NVML does not say."""
    found = _ask(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, name)).total)
    return None if found is None else int(found)


def joules(name: str) -> float | None:
    """Return the energy that a GPU has used since its driver was loaded; None if it has no counter (MIG instances)."""
    found = _ask(lambda nvml: nvml.nvmlDeviceGetTotalEnergyConsumption(_handle(nvml, name)))
    return None if found is None else found / 1e3  # it counts millijoules


def _ask(question: Callable[[Any], Any]) -> Any:
    """Ask NVML a question; None if it does not answer, for any reason.

    Drivers raise different things: their own errors, or missing functions. None of them may end a training run.
    """
    # Initialising it again is cheap and allowed, so no state has to be kept between questions.
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return question(nvml)
    except Exception:
        return None


def _handle(nvml: Any, name: str) -> Any:
    """NVML's handle of the GPU with this name. Raises LookupError if there is none."""
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    # CUDA accepts the beginning of a UUID; NVML wants all of it.
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        if nvml.nvmlDeviceGetUUID(handle).startswith(name):
            return handle
    raise LookupError(name)
