"""H200s that are not here, to compile for: needs jax 0.11 or later with its CUDA plugin (`pip install 'jax[cuda13]'`,
5 GB), but no GPU. Nothing is computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmfree_jax.config import RunConfig
from mmfree_jax.sharding import MESH_AXES, batch_sharding
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import build_program, program_key

# NVIDIA H200 data sheet and CUDA C programming guide, compute capability 9.0: what the compiler asks about a device.
TARGET = """
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


def compiled_step(run: RunConfig) -> Any:
    """The training step of a run on the H200s of its mesh."""
    absent = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=f"1x1x{run.mesh.devices}")
    sizes = [getattr(run.mesh, axis) for axis in MESH_AXES]
    mesh = Mesh(np.array(absent.devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    program = build_program(program_key(run, None), mesh)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    shape = run.data.batch, run.data.sequence + 1
    tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return program.train_step.lower(program.abstract_state, tokens_BT, Rates(rate, rate)).compile()
