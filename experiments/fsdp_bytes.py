"""Bytes that one device of eight sends in a training step of a sharded model, read from the compiled program.

Weights that are gathered and gradients that are reduced, apart and together; the scan over layers is counted as often
as it runs. Compiled for eight H200s, which need not be there (`pip install 'jax[cuda13]'` has to be); on the CPU XLA
would carry bfloat16 as float32. Nothing is computed:
    JAX_PLATFORMS=cpu python -m experiments.fsdp_bytes 1.3b > experiments/results/fsdp_bytes.md   (two minutes)

Expected: codes are gathered in half the bytes of bfloat16 weights, packed codes in an eighth.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmfree_jax.config import MeshConfig, RunConfig
from mmfree_jax.devices import meant_for
from mmfree_jax.hlo import Collective, collectives
from mmfree_jax.presets import run_preset
from mmfree_jax.sharding import MESH_AXES, batch_sharding
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import build_program, program_key

MESH = MeshConfig(fsdp=8)
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("transformer++, bfloat16 weights", "transformer++", {}),
    ("matmul-free, int8 codes", "matmul-free", {}),
    ("matmul-free, packed codes", "matmul-free", {"gather": "packed"}),
)
H200 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "H200"
"""  # what the compiler asks about a device


def step_collectives(run: RunConfig) -> list[Collective]:
    """All collectives of the run's training step, compiled for H200s."""
    absent = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{run.mesh.devices}")
    sizes = [getattr(run.mesh, axis) for axis in MESH_AXES]
    mesh = Mesh(np.array(absent.devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    shape = run.data.batch, run.data.sequence + 1
    program = build_program(program_key(run, None), mesh)
    with meant_for("cuda"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        compiled = program.train_step.lower(program.abstract_state, tokens_BT, Rates(number, number)).compile()
    return collectives(compiled.as_text() or "")


def sent(family: str, size: str, changes: dict[str, Any]) -> list[float]:
    """GB that a device sends: gathers of block and head weights, of the embedding table, and gradients."""
    run = run_preset(f"{family}-{size}")
    data = dataclasses.replace(run.data, batch=MESH.devices, sequence=1024)  # bytes of weights do not depend on these
    run = dataclasses.replace(run, data=data, mesh=MESH, precision="bfloat16", kernels="off", **changes)
    table = run.model.vocab, run.model.width
    found = step_collectives(run)
    gathers = [one for one in found if one.kind == "all-gather"]
    tables = [one for one in gathers if one.arrays[0][1] == table]
    gigabytes = lambda some: sum(one.sent for one in some) / 1e9
    return [gigabytes(gathers) - gigabytes(tables), gigabytes(tables), gigabytes(found) - gigabytes(gathers)]


def main() -> None:
    size = sys.argv[1]
    print(f"# Bytes of a training step of the {size} models on eight H200s, fsdp=8\n")
    print(f"`python -m experiments.fsdp_bytes {size}`, jax {jax.__version__}; GB that each device sends, by a ring.\n")
    print("| | weights | of bf16's | embedding | gradients | together |\n|---|---:|---:|---:|---:|---:|")
    first = None
    for name, family, changes in CASES:
        weights, table, gradients = sent(family, size, changes)
        first = first or weights
        share = f"{weights / first:.3f}"
        print(
            f"| {name} | {weights:.3f} | {share} | {table:.3f} | {gradients:.3f} | {weights + table + gradients:.3f} |"
        )


if __name__ == "__main__":
    main()
