"""The training step of a run on a mesh that is not here: lowered for its platform, partitioned on simulated devices.

python -m mmfree_jax.lowering.program PLATFORM < config.json     # prints a Report as JSON
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

from mmfree_jax.config import MeshConfig, RunConfig, from_json, to_json
from mmfree_jax.devices import Platform

# XLA's partitioner is the same for all platforms, so the collectives of a step can be read from a program compiled for
# as many simulated CPU devices; nothing is allocated and nothing runs. This needs a process of its own, because the
# number of simulated devices is fixed when JAX starts.
#
# Compiled for eight H200s (jax 0.11.2, three layers of the 370m models of both main families, as in
# experiments/fsdp_bytes.py), the step has the same all-gathers and reduce-scatters, array for array. All-reduces
# differ: on GPUs XLA sums gradients to an input that several layers share before it sends them. So this counts 1.45
# times (matmul-free) to 1.64 times (transformer++) as many bytes along `tensor`.

# All-gathers of weights [G, D, F] and of keys or values [B, T, H, K], which are bfloat16 elsewhere. States [B, S, D] of
# S chunks, and scales, are float32 everywhere.
WIDENED_GATHER = re.compile(r"= f32\[((\d+,)*\d{3,},\d{3,}|\d+(,\d+){3,})\]\S* all-gather\(")
REMATERIALISED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, dtype and group of devices."""

    kind: str
    dtype: str
    count: int  # of arrays in a step
    sent: float  # bytes a step, by one device
    axes: tuple[str, ...]  # of the mesh, that the group lies along
    span: int  # device numbers from the first to the last of a group; shows whether it stays on an island


@dataclasses.dataclass(frozen=True)
class Report:
    """What lowering and partitioning a step show. Bytes are those of one device."""

    parameters: float
    optimizer: float
    sharded: float  # share of the parameters' bytes that fsdp and tensor shard completely
    traffic: tuple[Traffic, ...]
    rematerialised: int  # arrays that the partitioner replicates because it found no better way
    replicated: tuple[str, ...] = ()  # one sentence for each parameter that the mesh does not divide


def inspect(run: RunConfig, platform: Platform) -> Report:
    """Return the report on a run's step. Raises RuntimeError with the compiler's message if it cannot be
    partitioned."""
    flags = f"--xla_force_host_platform_device_count={run.mesh.devices} --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "mmfree_jax.lowering.program", platform],
        input=to_json(run),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = f"stopped by signal {-done.returncode}, as where memory is short; " if done.returncode < 0 else ""
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"the step cannot be made for this mesh: {why}{''.join(last)}")
    found = json.loads(done.stdout.splitlines()[-1])
    traffic = tuple(Traffic(**{**one, "axes": tuple(one["axes"])}) for one in found.pop("traffic"))
    found |= {"rematerialised": rematerialisations(done.stderr), "replicated": tuple(found["replicated"])}
    return Report(**found, traffic=traffic)


def rematerialisations(log: str) -> int:
    """Count the arrays that the partitioner replicates, by what the compiler logs."""
    return log.count(REMATERIALISED)


def lower_for(run: RunConfig, platform: Platform) -> Any:
    """Return the step lowered for a platform and a mesh that need not be here."""
    import jax
    from jax.sharding import AbstractMesh, AxisType

    from mmfree_jax.devices import traced_for
    from mmfree_jax.sharding import MESH_AXES

    sizes = tuple(dataclasses.asdict(run.mesh)[axis] for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with traced_for(platform):
        _, traced = traced_step(looped(run), mesh, jax.sharding.use_abstract_mesh)
        return traced.lower(lowering_platforms=(platform,))


def partition(run: RunConfig, platform: Platform) -> Report:
    """Return the report on a run's step, in a process with as many devices as its mesh, without `rematerialised`."""
    import jax

    from mmfree_jax.devices import traced_for
    from mmfree_jax.sharding import make_mesh, replicated_parameters

    # Compiled for simulated CPU devices, traced as for the platform: choices that depend on it, such as unrolling or
    # the form of attention, are those of the real program.
    mesh = make_mesh(run.mesh)
    with traced_for(platform):
        state, traced = traced_step(looped(run), mesh, jax.set_mesh)
        text = traced.lower().compile().as_text()
    on_a_device = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape))  # elements
    local_bytes = lambda tree: sum(on_a_device(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    parameters, shards = jax.tree.leaves(state.params), run.mesh.fsdp * run.mesh.tensor
    completely = sum(leaf.size for leaf in parameters if on_a_device(leaf) * shards == leaf.size)
    return Report(
        local_bytes(state.params),
        local_bytes(state.opt),
        completely / sum(leaf.size for leaf in parameters),
        tuple(read_traffic(text if run.precision == "float32" else in_bfloat16(text), run.mesh)),
        0,
        replicated_parameters(mesh, state.params),
    )


def looped(run: RunConfig) -> RunConfig:
    """Return the run with a loop over layers, so that depth costs nothing."""
    return dataclasses.replace(run, unroll=1)


def traced_step(run: RunConfig, mesh: Any, entering: Any) -> tuple[Any, Any]:
    """Return the abstract state of a run on a mesh, which `entering` makes the context's, and the step traced on it."""
    import jax
    import jax.numpy as jnp

    from mmfree_jax.sharding import batch_sharding
    from mmfree_jax.training.optim import Rates
    from mmfree_jax.training.step import build_program, program_key

    program = build_program(program_key(run, end_of_document=0), mesh)
    shape = (run.data.batch, run.data.sequence + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    with entering(mesh):
        return program.abstract_state, program.train_step.trace(program.abstract_state, tokens, Rates(rate, rate))


def in_bfloat16(text: str) -> str:
    """Give the collectives of a program for CPUs the types that they have elsewhere.

    On CPUs XLA promotes reductions of bfloat16 to float32, and moves conversions behind the following all-gather.
    """
    wide = [line for line in text.splitlines() if "_promoted" in line or WIDENED_GATHER.search(line)]
    for line in wide:
        text = text.replace(line, line.replace("f32[", "bf16["))
    return text


def read_traffic(text: str, mesh: MeshConfig) -> list[Traffic]:
    """Return the collectives of a program compiled for a mesh, equal ones together. Groups of one device send
    nothing."""
    from mmfree_jax import hlo

    groups: dict[tuple[int, tuple[str, ...]], list[hlo.Collective]] = {}
    for one in hlo.collectives(text):
        span = max(max(group) - min(group) for group in one.groups) + 1
        if axes := one.axes(dataclasses.asdict(mesh)):
            groups.setdefault((span, axes), []).append(one)
    return [
        Traffic(kind, dtype, count, sent, axes, span)
        for (span, axes), found in sorted(groups.items())
        for (kind, dtype), (count, sent) in hlo.total(found).items()
    ]


if __name__ == "__main__":
    described, wanted = from_json(RunConfig, sys.stdin.read()), sys.argv[1]
    lower_for(described, wanted)  # type: ignore[arg-type]
    print(json.dumps(dataclasses.asdict(partition(described, wanted))))  # type: ignore[arg-type]
