"""The only place where a logical axis name becomes a mesh axis.

Modules say what each axis of an array *is* ("embed", "mlp", "batch"); `Rules` says which mesh axes shard it. Axis types
are Auto, explicitly: the compiler places what is not constrained here, and tests read the result. What the compiler
cannot shard, or would shard badly, runs on the shards of each device in `per_shard`.
"""

# A dense matrix of a layer is w_DF with the logical axes ("embed", "mlp"): fsdp shards D, tensor shards F. Activations
# are x_BTD with ("batch", "time", ...): data and fsdp shard B, sequence shards T. For a product, w is all-gathered over
# fsdp (D becomes complete on every device) and stays sharded over tensor; its gradient, a sum over B and T, is
# reduce-scattered back. So fsdp is a second data axis that also spreads the state, as in ZeRO-3 (Rajbhandari et al.
# 2020, arXiv 1910.02054).

import dataclasses
import functools
import math
from collections.abc import Callable, ItemsView, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.devices import backend

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
LANES = 128  # elements of the last axis in a tile of a TPU's memory
Axes = str | tuple[str, ...] | None
Names = tuple[Axes, ...]  # logical names of an array's axes; None: not sharded; several names share an axis, in order


@dataclass(frozen=True)
class Rules:
    """The mesh axes that shard each logical axis; None: never sharded."""

    # of parameters: fsdp shards one axis of every matrix, tensor the other
    embed: Axes = "fsdp"
    mlp: Axes = "tensor"
    heads: Axes = "tensor"
    vocab: Axes = "tensor"
    layers: Axes = None
    norm: Axes = None
    # of activations
    batch: Axes = ("data", "fsdp")
    time: Axes = "sequence"
    channels: Axes = "tensor"

    def items(self) -> ItemsView[str, Axes]:
        """Return pairs of a logical name and its mesh axes."""
        return dataclasses.asdict(self).items()

    def axes(self, name: Axes) -> tuple[str, ...]:
        """Return the mesh axes of a logical name, or of several, in order."""
        if name is None:
            return ()
        if isinstance(name, tuple):
            return tuple(axis for one in name for axis in self.axes(one))
        axes = getattr(self, name)
        return (axes,) if isinstance(axes, str) else axes or ()


RULES = Rules()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Return a (data, fsdp, tensor, sequence) mesh over the first `config.devices` devices (default: all of JAX's).

    Raises ConfigError if there are fewer devices than the mesh needs; and if several processes have more, because a
    process without a device in the mesh would have nothing to compute, and would end the others.
    """
    shape = (config.data, config.fsdp, config.tensor, config.sequence)
    devices = jax.devices() if devices is None else devices
    if config.devices > len(devices):
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {config.devices} devices, only {len(devices)} exist"
        )
    if jax.process_count() > 1 and config.devices < len(devices):
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} is {config.devices} of the {len(devices)} devices that "
            f"{jax.process_count()} processes bring: use all of them, for instance with --mesh.data {len(devices)}, or "
            "start a single process"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    # A TPU slice is a torus, whose axes are laid along those of the mesh, and split where a mesh has more of them than
    # the torus: `jax.make_mesh` refuses to.
    arranged = mesh_utils.create_device_mesh(shape, devices[: config.devices], allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=auto)


def idle_devices(config: MeshConfig) -> str:
    """Return a sentence about devices that a mesh leaves idle; empty if it uses all."""
    have = len(jax.devices())
    idle = have - config.devices
    return f"{idle} of {have} devices stay idle: --mesh.data and --mesh.fsdp set how many are used" if idle > 0 else ""


def spec(*axes: Axes) -> P:
    """Return the PartitionSpec of an array whose axes have these logical names (None: not sharded)."""
    return P(*(RULES.axes(axis) or None for axis in axes))


def gathered_axes(axes: Names) -> Names:
    """Return the logical names of a weight's axes after its all-gather over fsdp, where embed is not sharded.

    The products' inputs and outputs have these names on their last axis.
    """
    return tuple(None if name == "embed" else name for name in axes)


def activation_axes(ndim: int, last: Axes = None) -> Names:
    """Return the logical names of activations [B, T, ..., D]."""
    return (*("batch", "time", *(None,) * ndim)[: ndim - 1], last)


def divisible_spec(shape: tuple[int, ...], wanted: P, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> P:
    """Remove the mesh axes that do not divide their dimension from `wanted`: a vocabulary of 257 cannot be halved."""
    kept = []
    for size, axes in zip(shape, wanted, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        kept.append(axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return P(*kept)


def shard_count(name: Axes, size: int) -> int:
    """Return the number of shards of an axis of this size and logical name: 1 if the mesh does not divide the size.

    1 also outside a mesh and inside `per_shard`, where an array is one device's shard already.
    """
    mesh = _context_mesh()
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES.axes(name))
    return parts if size % parts == 0 else 1


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """Constrain the sharding of an array inside jit. Outside a mesh this returns x unchanged."""
    mesh = _context_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(x.shape, spec(*axes), mesh))


def uninitialised(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return an array whose values will be written later."""
    # XLA cannot shard an uninitialised array: every device would hold all of it.
    return jax.lax.empty(shape, dtype) if _context_mesh() is None else jnp.zeros(shape, dtype)


# Settings for what is traced (`tracing.during`). Sums in float32 double the bytes that devices exchange for gradients
# of the blocks' matrices (those of the embedding, the head and all vectors are float32 anyway), and the optimizer gets
# their sums without rounding.
packed_gathers: ContextVar[bool] = ContextVar("packed_gathers", default=False)  # gather ternary codes four in a byte
float32_sums: ContextVar[bool] = ContextVar("float32_sums", default=False)  # sum gradients over devices in float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_fsdp(w: jax.Array, axes: Names) -> jax.Array:
    """All-gather a weight over fsdp, in its own type; the gradient is sharded again.

    Other axes stay sharded. This needs a rule of its own, because the gradient of a sharding constraint has the same
    constraint: it would be replicated on every device.
    """
    return constrain(constrain(w, *axes), *gathered_axes(axes))


# The constraint before the gather is the weight's own place: without it the partitioner may compute the conversion of
# the weight to the type of the activations after the gather, and move twice the bytes.
gather_fsdp.defvjp(lambda w, axes: (gather_fsdp(w, axes), None), lambda axes, _, dw: (constrain(dw, *axes),))


class PartialSum(NamedTuple):
    """Names of a result of `per_shard` that is a sum over the device's own rows: it is summed over batch and time.

    An axis named embed is reduce-scattered: every fsdp shard receives only its piece.
    """

    names: Names


def per_shard(
    f: Callable[..., tuple], inputs: Sequence[Names], outputs: Sequence[Names | PartialSum], *args: Any
) -> tuple[Any, ...]:
    """Compute f(*args) with every device working on its own shards.

    args[i] is sharded along the logical axes inputs[i]; the results of f, a tuple, are assembled along `outputs`. An
    argument or result may be a tree of arrays that share their names, or None. An axis that cannot be sharded evenly in
    every argument is sharded in none; one of size 1 is broadcast. f itself fetches what it needs from other devices,
    along `sharding_axis`.
    """
    mesh = _context_mesh()
    if mesh is None:
        return f(*args)
    # A logical name is sharded if every array that has it can be: results could not be assembled otherwise.
    sizes = [
        (name, size)
        for names, arg in zip(inputs, args, strict=True)
        for leaf in jax.tree.leaves(arg)
        for name, size in zip(names, leaf.shape, strict=True)
        if size > 1
    ]
    sharded = {name for name, _ in sizes} - {name for name, size in sizes if shard_count(name, size) == 1}
    place = lambda names: spec(*(name if name in sharded else None for name in names))
    long = lambda names, leaf: tuple(n if size > 1 else None for n, size in zip(names, leaf.shape, strict=True))
    in_specs = tuple(
        jax.tree.map(lambda leaf, names=names: place(long(names, leaf)), arg)
        for names, arg in zip(inputs, args, strict=True)
    )
    # The mesh axes that partial sums are summed over, and those of them that may keep a piece of the sum each.
    several = lambda names: tuple(axis for axis in RULES.axes(names) if mesh.shape[axis] > 1)
    rows, pieces = several(tuple(name for name in ("batch", "time") if name in sharded)), several("embed")
    pieces = pieces if set(pieces) <= set(rows) else ()

    def local(*args: Any) -> tuple:
        added = lambda out, result: jax.tree.map(lambda part: _all_reduced(out.names, part, rows, pieces), result)
        pairs = zip(outputs, f(*args), strict=True)
        return tuple(added(out, result) if isinstance(out, PartialSum) else result for out, result in pairs)

    sharded |= {"embed"} if pieces else set()
    out_specs = tuple(place(out.names if isinstance(out, PartialSum) else out) for out in outputs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def _all_reduced(names: Names, part: jax.Array, rows: tuple[str, ...], pieces: tuple[str, ...]) -> jax.Array:
    """Sum parts over the mesh axes `rows`; over those in `pieces`, keep only this device's piece along embed."""
    if float32_sums.get() and rows and part.dtype.itemsize < 4:
        part = part.astype(jnp.float32)
    if pieces and "embed" in names:
        part = _scattered(part, pieces, names.index("embed"))
        # Otherwise XLA's GPU compiler keeps the layout of the reduce-scatter, and the optimizer copies the weights and
        # both moments into it and back.
        part = with_layout_constraint(part, Layout(major_to_minor=tuple(range(part.ndim))))
        rows = tuple(axis for axis in rows if axis not in pieces)
    return jax.lax.psum(part, rows) if rows else part


def _scattered(part: jax.Array, mesh_axes: tuple[str, ...], axis: int) -> jax.Array:
    """Sum parts over mesh axes, and keep only this device's piece along an axis of the array."""
    size, stacked = part.shape[axis] // jax.lax.axis_size(mesh_axes), math.prod(part.shape[:axis]) > 1
    whole = stacked and (axis < part.ndim - 1 or size % LANES == 0)
    if backend() != "tpu" or whole:
        return jax.lax.psum_scatter(part, mesh_axes, scatter_dimension=axis, tiled=True)
    # Where pieces are not whole tiles the compiler for TPUs sums the whole array on every device, which is twice the
    # bytes, or sends the ends of pieces after them. A piece with an index of its own is cut there; in a stack, where
    # that takes a copy, only a last axis of broken lanes has one.
    apart = part.reshape(*part.shape[:axis], -1, size, *part.shape[axis + 1 :])
    return jax.lax.psum_scatter(apart, mesh_axes, scatter_dimension=axis)


def sharding_axis(name: str, size: int) -> str | None:
    """Return the mesh axis along which `per_shard` shards an axis of this size; None if it is replicated."""
    return RULES.axes(name)[0] if shard_count(name, size) > 1 else None


def _context_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of the context; None on one device, and inside `per_shard`, where every array is local."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def shardings(mesh: jax.sharding.Mesh, shapes: Any) -> Any:
    """Return NamedShardings for abstract arrays with logical names. Without names, or if not divisible: replicated."""
    with nnx.logical_axis_rules(tuple(RULES.items())):
        specs = nnx.get_partition_spec(shapes)
    return jax.tree.map(lambda a, s: NamedSharding(mesh, divisible_spec(a.shape, s or P(), mesh)), shapes, specs)


def path_name(path: tuple[Any, ...]) -> str:
    """Return `blocks.mixer.out.kernel` for a path into the parameters of a model."""
    return ".".join(str(step.key) for step in path if isinstance(step, jax.tree_util.DictKey))


def replicated_parameters(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, shapes: Any) -> tuple[str, ...]:
    """Return a sentence for each parameter that the mesh should shard but does not divide: it is replicated.

    Raises ConfigError if an axis that should shard parameters shards none: every device would hold all of them.
    """
    with nnx.logical_axis_rules(tuple(RULES.items())):
        specs = nnx.get_partition_spec(shapes)
    messages, sharding, left = [], set[str](), dict[str, set[int]]()
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(specs), strict=True):
        for size, axes in zip(leaf.shape, wanted, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if parts > 1 and size % parts == 0:
                sharding |= set(names)
            elif parts > 1:
                along = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
                name = f"{path_name(path)} {list(leaf.shape)}"
                messages.append(f"{name} is replicated along {along}: {size} is not divisible by {parts}")
                for name in names:
                    left.setdefault(name, set()).add(size)
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1 and axis not in sharding:
            parts, sizes = mesh.shape[axis], sorted(left.get(axis, set()))
            fits = max((n for n in range(1, parts) if all(size % n == 0 for size in sizes)), default=1)
            raise ConfigError(
                f"mesh.{axis}={parts} would shard no parameter, so each device would hold all of them: it divides none "
                f"of the sizes {', '.join(map(str, sizes))}; use {axis}={fits}, or other sizes"
            )
    return tuple(messages)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of a [B, T] batch of tokens."""
    return NamedSharding(mesh, spec("batch", None))
