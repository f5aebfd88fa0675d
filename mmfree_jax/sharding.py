"""The only place where a logical axis name becomes a mesh axis.

Modules name what each axis of an array *is* ("embed", "mlp", "batch"); `RULES` says where that lives. Axis types are
Auto, spelled out: the compiler places what is not constrained here, and the tests read what it made of it.
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Parameters: the embed axis is split over fsdp, the wide axis over tensor. Activations: rows over data and fsdp.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "layers": None,
    "norm": None,
    "batch": ("data", "fsdp"),
    "time": "sequence",
    "channels": "tensor",
}

# Modules are built without a mesh; shardings are applied once, where the state is made by a jitted initialiser.
nnx.use_eager_sharding(False)


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """A (data, fsdp, tensor, sequence) mesh over the first `config.devices` devices.

    Raises ConfigError when there are fewer devices than the mesh needs.
    """
    shape = (config.data, config.fsdp, config.tensor, config.sequence)
    devices = jax.devices()
    if config.devices > len(devices):
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {config.devices} devices, only {len(devices)} exist"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[: config.devices])


def spec(*axes: str | None) -> P:
    """The PartitionSpec of an array whose axes carry these logical names (None: not split)."""
    return P(*(None if axis is None else RULES[axis] for axis in axes))


def fitted(shape: tuple[int, ...], wanted: P, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> P:
    """`wanted` without the mesh axes that do not divide their dimension: a vocabulary of 257 cannot be halved."""

    def fit(size: int, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return P(*(fit(size, axes) for size, axes in zip(shape, wanted, strict=False)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fix the placement of an activation inside jit; outside a mesh context this returns x unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitted(x.shape, spec(*axes), mesh))


def partitioned(initializer: Any, *axes: str | None) -> Any:
    """An initialiser whose parameter carries logical axis names."""
    return nnx.with_partitioning(initializer, axes)


def shardings(mesh: jax.sharding.Mesh, shapes: Any) -> Any:
    """NamedShardings for abstract arrays with logical names; what has none, or cannot be cut, is replicated."""
    with nnx.logical_axis_rules(tuple(RULES.items())):
        specs = nnx.get_partition_spec(shapes)
    return jax.tree.map(lambda a, s: NamedSharding(mesh, fitted(a.shape, s or P(), mesh)), shapes, specs)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a [B, T] batch of tokens lives."""
    return NamedSharding(mesh, spec("batch", None))
