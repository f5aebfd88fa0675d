"""What the compiler asks for: the training step compiled for an H200 that is not here, as a table of bytes.

    JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=-1 python experiments/h200_memory.py > experiments/results/h200_memory.csv

Needs jax 0.11 or later with its CUDA plugin, but no GPU (`pip install 'jax[cuda13]'`, 5 GB); about half an hour on one
core. `mmfree_jax.lowering.memory` is held to these figures by tests/lowering/test_memory.py.
"""

import csv
import dataclasses
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mmfree_jax.config import MeshConfig, RunConfig
from mmfree_jax.ops.kernels import choice
from mmfree_jax.presets import run_preset
from mmfree_jax.sharding import MESH_AXES, batch_sharding
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import build_program, program_key

# NVIDIA H200 data sheet and CUDA C programming guide, compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 141000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
COLUMNS = (
    "preset",
    "depth",
    "batch",
    "sequence",
    "remat",
    "unroll",
    "kernels",
    "accumulate",
    "fsdp",
    "tensor",
    "bytes",
)


def cases() -> list[tuple]:
    """Rows of the table but for their last column: shallow models, as every further layer asks for the same."""
    policies: dict[str, tuple[str, ...]] = {
        "transformer++-1.3b": ("none", "products", "full"),
        "matmul-free-1.3b": ("none", "products", "codes", "full"),
    }
    found = [
        (preset, depth, 8, 2048, remat, unroll, "auto", 1, 1, 1)
        for preset, remats in policies.items()
        for depth, unroll in ((4, 4), (4, 1), (8, 1))
        for remat in remats
    ]
    others = itertools.product(("matmul-free-rwkv4-1.3b", "bitnet-1.3b", "hgrn-1.3b"), ("none", "products"))
    found += [(preset, 4, 8, 2048, remat, 1, "auto", 1, 1, 1) for preset, remat in others]
    found += [("matmul-free-1.3b", 4, 8, 2048, remat, 1, "off", 1, 1, 1) for remat in ("none", "products")]
    found += [
        (preset, 4, 8 * fsdp, 2048, remat, 1, "auto", 1, fsdp, tensor)
        for preset in policies
        for remat in ("none", "products")
        for fsdp, tensor in ((8, 1), (4, 2))
    ]
    return [*found, ("transformer++-1.3b", 4, 8, 2048, "full", 1, "auto", 2, 1, 1)]


def run_of(preset: str, depth: int, batch: int, sequence: int, *more: Any) -> RunConfig:
    """The run of a row."""
    run = run_preset(preset)
    remat, unroll, kernels, accumulate, fsdp, tensor = more
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, depth=depth),
        data=dataclasses.replace(run.data, batch=batch, sequence=sequence),
        optim=dataclasses.replace(run.optim, accumulate=accumulate),
        mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
        precision="bfloat16",
        remat=remat,
        unroll=unroll,
        kernels=kernels,
    )


def compiled_bytes(run: RunConfig) -> int:
    """State, batch and temporaries of the compiled step on one device of its mesh."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{run.mesh.devices}")
    sizes = dataclasses.asdict(run.mesh)
    mesh = topologies.make_mesh(topology, tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES)
    program = build_program(program_key(run, None), mesh)
    shape = (run.data.batch, run.data.sequence + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = program.train_step.lower(program.abstract_state, tokens, Rates(rate, rate)).compile()
    found: Any = compiled.memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def main() -> None:
    """Print the table, row by row."""
    # Choosers ask JAX for the device that is here: let them find the one that is compiled for.
    vars(jax)["default_backend"] = lambda: "gpu"
    vars(choice)["_is_hopper"] = lambda: True
    table = csv.writer(sys.stdout)
    table.writerow(COLUMNS)
    for case in cases():
        table.writerow((*case, compiled_bytes(run_of(*case))))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
