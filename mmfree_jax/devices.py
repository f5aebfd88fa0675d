"""Facts about the hardware a run is on: peak rates, memory, energy."""

import importlib
import resource
from pathlib import Path
from typing import Any

import jax

# Dense bfloat16 FLOP/s of one device by its makers' data sheets, by a part of jax's device_kind.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device kind; None where the data sheet does not name one (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def peak_memory_bytes() -> int:
    """The most memory held so far: of the first accelerator, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def use_compile_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, so that a resumed run or the next run of a sweep does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class EnergyMeter:
    """Joules drawn by this process's NVIDIA GPUs since the last restart (NVML); None on other hardware."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        if jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(d.local_hardware_id) for d in jax.local_devices()]
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self._start = self._total()

    def _total(self) -> float:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles) / 1e3  # millijoules

    def joules(self) -> float | None:
        """Energy since the last restart, or None where it cannot be measured."""
        return self._total() - self._start if self._handles else None
