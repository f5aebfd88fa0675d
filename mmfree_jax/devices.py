"""Facts about hardware, the current one and others: peak rates, memory, links, energy.

The tables are read without importing JAX, because the driver of a sweep, which forks, needs them too.
"""

import dataclasses
import os
import resource
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from mmfree_jax import nvidia
from mmfree_jax.config import ConfigError, require
from mmfree_jax.tracing import during

GENERATOR = "threefry2x32"  # random number generator of initial weights, whatever the environment says
# Settings of JAX that would change what a run computes. Another value would have to be part of the config.
SETTINGS = {"jax_enable_x64": False, "jax_threefry_partitionable": True, "jax_default_matmul_precision": None}

USABLE = 0.92  # share of a device's memory; context, libraries and fragmentation take the rest
Platform = Literal["cuda", "tpu", "cpu"]


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet: dense rates, bytes, and bytes per second in one direction, of one device."""

    platform: Platform
    memory: float
    bandwidth: float  # of the memory
    bf16: float  # FLOP/s
    int8: float  # operations per second
    link: float  # to devices of the same island, as used by a ring along one mesh axis
    network: float  # beyond the island
    island: int  # devices that the fast links connect
    kernels: bool = False  # whether our kernels run on it


# NVIDIA H200, H100 SXM and A100 80GB SXM data sheets: NVLink 900, 900 and 600 GB/s both ways; in DGX systems of eight a
# network card of 400 (A100: 200) Gb/s for each.
#
# TPU, docs.cloud.google.com/tpu/docs/v6e, which has v5e beside it, and v5p: peaks, memory in GiB, as their compiler
# counts it, and its bandwidth. Links: a chip of v5e sends 1,600 Gb/s through four ports and one of v6e 3,200 (800 GB/s
# both ways), one of v5p 4,800 through six (1,200 GB/s both ways); a ring along one axis uses two of them. Network: 2 x
# 100 and 4 x 200 Gb/s for each host of eight chips, v5p 50 Gb/s for each chip. The pages have no int8 for v5p: that is
# of Google's announcement (6 December 2023).
DEVICES = {
    "h200": Device("cuda", 141e9, 4.8e12, 989e12, 1979e12, 450e9, 50e9, 8, kernels=True),
    "h100": Device("cuda", 80e9, 3.35e12, 989e12, 1979e12, 450e9, 50e9, 8, kernels=True),
    "a100": Device("cuda", 80e9, 2.039e12, 312e12, 624e12, 300e9, 25e9, 8),
    "tpu-v5e": Device("tpu", 16 * 2**30, 800e9, 197e12, 393e12, 100e9, 3.1e9, 256, kernels=True),
    "tpu-v5p": Device("tpu", 95 * 2**30, 2765e9, 459e12, 918e12, 200e9, 6.25e9, 8960, kernels=True),
    "tpu-v6e": Device("tpu", 32 * 2**30, 1600e9, 918e12, 1836e12, 200e9, 12.5e9, 256, kernels=True),
}

# Dense bfloat16 FLOP/s by a part of jax's device_kind.
# Topologies of TPU slices by their number of chips (docs.cloud.google.com/tpu/docs/v5e, v5p and v6e).
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CUBES |= {1024: "8x8x16"}
SLICES = {"tpu-v5e": FLAT, "tpu-v5p": CUBES, "tpu-v6e": FLAT}
PEAK_FLOPS = {
    "H200": DEVICES["h200"].bf16,
    "H100": DEVICES["h100"].bf16,
    "A100": DEVICES["a100"].bf16,
    "TPU v4": 275e12,
    "TPU v5 lite": DEVICES["tpu-v5e"].bf16,
    "TPU v5p": DEVICES["tpu-v5p"].bf16,
    "TPU v6 lite": DEVICES["tpu-v6e"].bf16,
}

_absent: ContextVar[Platform | None] = ContextVar("absent", default=None)
_compiled: ContextVar[bool] = ContextVar("compiled", default=False)


def traced_for(platform: Platform) -> AbstractContextManager[None]:
    """Trace what is inside the context for a platform that need not be here."""
    return during(_absent, platform)


def compiled_for() -> AbstractContextManager[None]:
    """Promise that the compiler of the platform that is traced for takes what is inside: libraries of its own serve."""
    return during(_compiled, True)


def has_libraries() -> bool:
    """Whether the platform that is used, or traced for, has its own libraries at hand, such as cuDNN."""
    return _absent.get() is None or _compiled.get()


def backend() -> str:
    """Return the platform that is used, or traced for: "cpu", "gpu" or "tpu"."""
    import jax

    absent = _absent.get()
    return jax.default_backend() if absent is None else {"cuda": "gpu"}.get(absent, absent)


def check_platform() -> None:
    """Raise ConfigError if JAX has no device, as for JAX_PLATFORMS=cuda on a machine without GPU or plugin.

    Call it after `distributed.join`, because it asks JAX for devices.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = " ".join(str(error).split()) or "there is no such device, or not the plugin that JAX needs for it"
        raise ConfigError(
            f"JAX finds no device{f' for JAX_PLATFORMS={asked}' if asked else ''}: {why}; install jax for it "
            "(pip install 'jax[cuda13]', 'jax[tpu]'), or set JAX_PLATFORMS=cpu"
        ) from error


def peak_flops(kind: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a device kind; None if it is not in the table (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def peak_memory_bytes() -> int:
    """Return the peak memory so far: of the first accelerator, or of this process on a CPU."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def use_compile_cache(folder: Path) -> None:
    """Store compiled programs in `folder`, so that a resumed run or the next run of a sweep does not compile again."""
    import jax

    # JAX keeps only programs that took a second to compile by default; a sweep of small runs has hundreds below that.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_settings() -> None:
    """Raise ConfigError if settings in the environment would change what a run computes."""
    import jax

    for name, usual in SETTINGS.items():
        found = getattr(jax.config, name, usual)
        require(
            found == usual,
            f"{name}={found!r} would change the numbers of the run and is no part of it: unset {name.upper()}",
        )


class EnergyMeter:
    """Measures the energy of this process's NVIDIA GPUs since the last restart, in joules.

    None on other hardware, and forever once one of the GPUs does not report, because the sum would not be the energy of
    the run.
    """

    def __init__(self) -> None:
        import jax

        self._names: list[str] = []
        if jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind:
            named = nvidia.named_by_cuda() or []
            numbers = [device.local_hardware_id for device in jax.local_devices()]
            self._names = [named[n] if n < len(named) else str(n) for n in numbers]
        self.restart()

    def restart(self) -> None:
        """Start to count."""
        self._start = self._total()

    def _total(self) -> float | None:
        drawn = [joules for name in self._names if (joules := nvidia.joules(name)) is not None]
        return sum(drawn) if self._names and len(drawn) == len(self._names) else None

    def joules(self) -> float | None:
        """Return the energy since the last restart; None if it cannot be measured."""
        now = None if self._start is None else self._total()
        if now is None or self._start is None:
            self._names = []
            return None
        return now - self._start
