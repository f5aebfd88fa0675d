"""What NVIDIA's management library (NVML) says of GPUs; it may be absent, old or forbidden to answer.

GPUs go by the names that CUDA gives them: a number, a UUID or the beginning of one, a MIG instance's name. Nothing here
imports JAX.
"""

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARERS = "MMFREE_JAX_SHARERS"  # set for a worker that is one of so many on its GPU


def named_by_cuda() -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES; CUDA sees those before a negative one. None where all GPUs are visible."""
    if VISIBLE not in os.environ:
        return None
    named = [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    return list(itertools.takewhile(lambda name: not name.startswith("-"), named))


def visible() -> list[str]:
    """The GPUs that a process started here may use; none without a driver that answers."""
    named = named_by_cuda()
    if named is not None:
        return named
    return [str(number) for number in range(_asked(lambda nvml: nvml.nvmlDeviceGetCount()) or 0)]


def is_shared() -> bool:
    """Whether other workers of the same sweep use this process's GPU: its times and energy are then not its own."""
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
    """The answer to one question; None for each of the many reasons why there is none.

    Drivers differ in what they raise for what they cannot tell: errors of their own, missing functions, or nothing that
    carries a name. No answer of theirs is worth a training run.
    """
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return question(nvml)
    except Exception:
        return None


def _handle(nvml: Any, name: str) -> Any:
    """NVML's own for a GPU of this name. Raises LookupError for a name of none."""
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        if nvml.nvmlDeviceGetUUID(handle).startswith(name):  # it may be cut
            return handle
    raise LookupError(name)
