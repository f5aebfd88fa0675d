"""How tests have XLA compile: many small programs that each run a few times want little of a compiler."""

from importlib.metadata import version

QUICKLY = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):
    # Later ones know only the emitters that take several times as long, and with the preset the threads of a kernel
    # that is interpreted wait for each other forever.
    QUICKLY += ["--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE", "--xla_cpu_use_fusion_emitters=false"]


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with that many simulated devices; read when JAX starts."""
    count = [f"--xla_force_host_platform_device_count={devices}"] if devices > 1 else []
    return " ".join(count + QUICKLY)
