"""The training step compiled for machines that are not here, by their own compilers: TPUs by libtpu, NVIDIA GPUs by the
CUDA plugin of JAX. Nothing is computed, and no accelerator is needed.

python -m mmfree_jax.lowering.compiled DEVICE < config.json     # prints what the compiler says as JSON
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmfree_jax.config import RunConfig, from_json, require, to_json
from mmfree_jax.devices import DEVICES, SLICES
from mmfree_jax.lowering.program import Traffic, read_traffic, rematerialisations, traced_step

# What XLA asks about a GPU, from NVIDIA's data sheets and the CUDA C programming guide: capability, multiprocessors,
# and bytes of the second-level cache, of a multiprocessor's shared memory and of what a block may have of it.
GPUS = {
    "h200": ("major: 9", 132, 60 << 20, 233472, 232448),
    "h100": ("major: 9", 132, 50 << 20, 233472, 232448),
    "a100": ("major: 8", 108, 40 << 20, 167936, 166912),
}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
  clock_rate_ghz: 1.98 device_memory_size: {memory:.0f} shared_memory_per_block_optin: {of_a_block}
  cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
# Compilers come in packages of their own, and look for machines: neither chips, a metadata server nor a lock is wanted.
PACKAGES = {"tpu": ("libtpu", "jax[tpu]"), "cuda": ("jax_cuda13_plugin", "jax[cuda13]")}
ABSENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",  # warnings: the partitioner's are counted
}
# libtpu's words for a program that is too large: all of it, or its temporaries, in the first group.
REFUSED = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT])(?: hbm|\))"
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler of the target says about a step. Bytes are those of one device."""

    state: float  # parameters, moments and the batch; the new state takes the place of the old one
    temporaries: float
    code: float
    traffic: tuple[Traffic, ...]
    products: dict[str, int]  # matrix products by the types of operands and result
    kernels: dict[str, int]  # hand-written kernels by name
    host_transfers: int  # instructions that exchange data with the host
    rematerialised: int  # arrays that the partitioner replicates because it found no better way
    refused: str = ""  # why there is no program; then `temporaries` is what the compiler says it would need, if it does

    @property
    def total(self) -> float:
        """What a device has to hold at the peak."""
        return self.state + self.temporaries + self.code


def compile_absent(run: RunConfig, device_name: str) -> Compiled:
    """Compile a run's step for a mesh of `DEVICES[device_name]`, in a process of its own.

    Raises ConfigError where the compiler is not installed, and RuntimeError with its message where it fails.
    """
    check_installed(device_name)
    done = subprocess.run(
        [sys.executable, "-m", "mmfree_jax.lowering.compiled", device_name],
        input=to_json(run),
        env={**os.environ, **ABSENT},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = f"stopped by signal {-done.returncode}, as where memory is short; " if done.returncode < 0 else ""
        raise RuntimeError(f"the step cannot be compiled: {why}{''.join(done.stderr.strip().splitlines()[-1:])}")
    found = json.loads(done.stdout.splitlines()[-1])
    traffic = tuple(Traffic(**{**one, "axes": tuple(one["axes"])}) for one in found.pop("traffic"))
    return Compiled(**{**found, "rematerialised": rematerialisations(done.stderr)}, traffic=traffic)


def check_installed(device_name: str) -> None:
    """Raise ConfigError, naming the package, where the compiler for a device is not installed."""
    module, package = PACKAGES[DEVICES[device_name].platform]
    require(
        importlib.util.find_spec(module) is not None,
        f"--compile for {device_name} needs its compiler: pip install '{package}' (no such device is needed)",
    )


def absent_devices(device_name: str, count: int) -> list[Any]:
    """Return `count` devices that are not here: of an island of GPUs, a TPU slice, or one chip of the smallest slice.

    Raises ConfigError where no slice has as many chips.
    """
    from jax.experimental import topologies

    device = DEVICES[device_name]
    if device.platform == "cuda":
        capability, cores, cache, shared, of_a_block = GPUS[device_name]
        facts = {"capability": capability, "cores": cores, "cache": cache, "shared": shared, "of_a_block": of_a_block}
        facts |= {"memory": device.memory, "bandwidth": device.bandwidth, "name": device_name.upper()}
        target = TARGET.format(**facts, fpus=128 if device.kernels else 64)
        described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
        return list(described.devices)
    slices = {count: topology for count, topology in SLICES[device_name].items() if count > 1}
    slices[1] = min(slices.items())[1]  # one chip of the smallest
    near = ", ".join(map(str, sorted(slices)))
    require(count in slices, f"--compile: no {device_name} slice has {count} chips: use a mesh of {near}")
    name = f"{device_name.removeprefix('tpu-')}:{slices[count]}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)[:count]


def compile_step(run: RunConfig, device_name: str) -> Any:
    """Return the compiled step (`jax.stages.Compiled`) of a run on absent devices, with the kernels of the target.

    For a process whose environment has `ABSENT`.
    """
    from jax.sharding import use_abstract_mesh

    from mmfree_jax.devices import compiled_for, traced_for
    from mmfree_jax.ops.fast.verification import kernels_assumed
    from mmfree_jax.sharding import make_mesh

    device, mesh = DEVICES[device_name], make_mesh(run.mesh, absent_devices(device_name, run.mesh.devices))
    known = capability_known(device_name) if device.platform == "cuda" else contextlib.nullcontext()
    with traced_for(device.platform), compiled_for(), kernels_assumed(device.kernels), known:
        _, traced = traced_step(run, mesh, lambda mesh: use_abstract_mesh(mesh.abstract_mesh))
        return traced.lower().compile()


@contextlib.contextmanager
def capability_known(device_name: str) -> Iterator[None]:
    """Let JAX's attention know an absent GPU: it asks the one that is here how wide heads may be, and there is none."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    major = int(GPUS[device_name][0].removeprefix("major: "))
    asks, attention.check_compute_capability = attention.check_compute_capability, lambda least: float(least) <= major
    try:
        yield
    finally:
        attention.check_compute_capability = asks


def described(run: RunConfig, device_name: str) -> Compiled:
    """Return what the compiler says, without `rematerialised`, which it only logs."""
    import jax

    from mmfree_jax import hlo

    try:
        compiled = compile_step(run, device_name)
    except jax.errors.JaxRuntimeError as error:
        found = REFUSED.search(str(error))
        if found is None:
            raise
        needed, unit, there, of = found.groups()
        why = f"the compiler refuses the program: {needed}{unit}iB where {there}{of}iB can be had"
        return Compiled(0.0, float(needed) * 1024.0 ** " KMGT".index(unit), 0.0, (), {}, {}, 0, 0, why)
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text() or ""
    return Compiled(
        kept,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        tuple(read_traffic(text, run.mesh)),
        {f"{a} x {b} -> {out}": count for (a, b, out), count in hlo.products(text).items()},
        dict(hlo.kernels(text)),
        len(hlo.host_transfers(text)),
        0,
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(described(from_json(RunConfig, sys.stdin.read()), sys.argv[1]))))
