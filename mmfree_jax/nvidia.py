"""Questions to NVIDIA's management library (NVML) about GPUs. It may be absent, old or without permission to answer.

GPUs are named as CUDA names them: by a number, a UUID or the beginning of one, or a MIG instance's name. Nothing here
imports JAX.
"""

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARERS = "MMFREE_JAX_SHARERS"  # number of workers on a GPU, set by the sweep that starts them


def named_by_cuda() -> list[str] | None:
    """The GPU names in CUDA_VISIBLE_DEVICES up to a negative one, as CUDA reads it; None if it is not set."""
    if VISIBLE not in os.environ:
        return None
    named = [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    return list(itertools.takewhile(lambda name: not name.startswith("-"), named))


def visible() -> list[str]:
    """The GPUs that a process started here may use; empty if no driver answers."""
    named = named_by_cuda()
    if named is not None:
        return named
    return [str(number) for number in range(_asked(lambda nvml: nvml.nvmlDeviceGetCount()) or 0)]


def is_shared() -> bool:
    """Whether other workers of the same sweep use this process's GPU, so that its times and energy mean nothing."""
    return int(os.environ.get(SHARERS) or 1) > 1


def memory_bytes(name: str) -> int | None:
    """The memory of a GPU or MIG instance; None where NVML does not say."""
    found = _asked(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, name)).total)
    return None if found is None else int(found)


def joules(name: str) -> float | None:
    """What a GPU has drawn since its driver was loaded; None for a MIG instance, and where no counter answers."""
    found = _asked(lambda nvml: nvml.nvmlDeviceGetTotalEnergyConsumption(_handle(nvml, name)))
    return None if found is None else found / 1e3  # it counts millijoules


def _asked(question: Callable[[Any], Any]) -> Any:
    """Ask NVML one question; None if it does not answer, for whatever reason.

    Drivers differ in what they raise: errors of their own, or missing functions. None of them may end a training run.
    """
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
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        if nvml.nvmlDeviceGetUUID(handle).startswith(name):
            return handle
    raise LookupError(name)
