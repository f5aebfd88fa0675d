"""The compiled programs of a run: initialise, train one step, evaluate one batch, look at a step without taking it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import (
    Gather,
    Kernels,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Reduction,
    Remat,
    RunConfig,
)
from mmfree_jax.data.reading.documents import document_ids, is_target
from mmfree_jax.devices import backend
from mmfree_jax.distributed import put, repeat
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.fast import verification
from mmfree_jax.ops.fast.choice import kernels_allowed
from mmfree_jax.sharding import (
    batch_sharding,
    float32_sums,
    make_mesh,
    packed_gathers,
    path_name,
    replicated_parameters,
    shardings,
    uninitialised,
)
from mmfree_jax.tracing import during
from mmfree_jax.training.optim import Rates, make_optimizer, role_of

# A `Program` depends on the shape of a run only: not on its learning rate, schedule, length or seed. Runs that agree in
# `program_key` share one, so a sweep compiles once per (family, size).


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an optimizer step reads and replaces: step int32 [], float32 parameters, moments."""

    step: jax.Array
    params: nnx.State
    opt: optax.OptState


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """What a compiled step depends on. Runs with equal keys share a Program."""

    model: ModelConfig
    optim: OptimConfig
    mesh: MeshConfig
    precision: Precision
    remat: Remat
    kernels: Kernels
    gather: Gather
    reduction: Reduction
    unroll: int
    separator: int | None  # the token after which a document begins, if documents are separate; else None
    guarded: bool  # a step whose loss or gradient is not finite leaves parameters and moments as they are


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted functions over an explicit mesh. Shape: tokens_BT int32 [B, T+1]."""

    mesh: Any  # a Mesh; abstract where the program is only lowered
    graphdef: nnx.GraphDef  # nnx.merge(graphdef, params) is the LanguageModel
    abstract_state: TrainState  # ShapeDtypeStructs that carry shardings: what a checkpoint is restored into
    init: Callable[[jax.Array], TrainState]  # key -> state, made directly with its shardings
    train_step: jax.stages.Wrapped  # (TrainState, tokens_BT, Rates) -> (TrainState, metrics)
    gradients: jax.stages.Wrapped  # (params, tokens_BT) -> (mean loss, gradients), as the step computes them
    nats: Callable[[nnx.State, jax.Array], jax.Array]  # (params, tokens_BT) -> nats of each target [B, T]
    # (TrainState, tokens_BT, Rates) -> a description of the next step; see `_inspect`
    inspect: Callable[[TrainState, jax.Array, Rates], dict[str, Any]]
    replicated: tuple[str, ...] = ()  # one sentence for each parameter that the mesh does not divide

    def place(self, array: Any) -> jax.Array:
        """Put a [B, ...] host array, which every process has in full, where the step expects it."""
        return put(array, batch_sharding(self.mesh))

    def prepare(self, shape: tuple[int, int], diagnosed: bool = False) -> None:
        """Check the kernels of a step on tokens [B, T+1], and of `inspect` if `diagnosed`, before they are traced."""
        tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.mesh))
        rate = self.repeat(Rates(np.float32(0), np.float32(0)))
        with jax.set_mesh(self.mesh):
            for program in (self.train_step, self.inspect) if diagnosed else (self.train_step,):
                verification.prepare(functools.partial(jax.eval_shape, program, self.abstract_state, tokens_BT, rate))

    def repeat(self, numbers: Any) -> Any:
        """Put host numbers, equal in all processes, on all devices, so that steps need not copy them from one."""
        return jax.tree.map(lambda number: repeat(number, NamedSharding(self.mesh, P())), numbers)


def program_key(config: RunConfig, end_of_document: int | None) -> ProgramKey:
    """Return the part of a run that its compiled program depends on. Rate, schedule and durations are reset.

    end_of_document: of the corpus; None where nothing is computed from tokens.
    """
    neutral = OptimConfig()
    reset = {name: getattr(neutral, name) for name in ("lr", "warmup_steps", "decay_steps", "final_lr")}
    optim = dataclasses.replace(config.optim, schedule="constant", **reset)
    same: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(ProgramKey)}
    separator = end_of_document if config.data.separate_documents else None
    return ProgramKey(**same | {"optim": optim, "separator": separator, "guarded": config.skip_nonfinite > 0})


def concrete(precision: Precision) -> Precision:
    """Replace "auto" by what it stands for here: bfloat16 on accelerators, float32 on a CPU."""
    if precision == "auto":
        return "float32" if backend() == "cpu" else "bfloat16"
    return precision


@functools.cache
def make_program(key: ProgramKey) -> Program:
    """Build the programs for a key. Each is compiled at its first call."""
    return build_program(key, make_mesh(key.mesh))


def build_program(key: ProgramKey, mesh: Any) -> Program:
    """Build the programs for a key on a Mesh, or on an AbstractMesh, where they can only be lowered.

    Raises ConfigError for a mesh with an axis that would shard no parameter (`sharding.replicated_parameters`).
    """
    # Parameters are float32 always; only activations have this type. A scan over layers saves compile time, but on GPUs
    # each iteration copies the layer's weights out of the stack and gradients into it: a loop costs a sixth of the
    # step.
    dtype = jnp.dtype(concrete(key.precision))
    key = dataclasses.replace(key, unroll=key.unroll or (key.model.depth if backend() == "gpu" else 1))
    build = lambda rngs: LanguageModel(key.model, rngs=rngs, dtype=dtype, remat=key.remat, unroll=key.unroll)
    optimizer = make_optimizer(key.optim, key.model)

    def init(rng: jax.Array) -> TrainState:
        params = nnx.state(build(nnx.Rngs(rng)), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(init, jax.random.key(0))
    place = shardings(mesh, shapes)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, place)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    rows, scalar = batch_sharding(mesh), NamedSharding(mesh, P())

    packing, summing = during(packed_gathers, key.gather == "packed"), during(float32_sums, key.reduction == "float32")
    choosing = lambda f: kernels_allowed(key.kernels == "auto")(packing(summing(f)))
    # Donation lets the new state take the place of the old one: without it both would be in memory. `out_shardings` put
    # the state where the next call expects it.
    train_step = jax.jit(
        choosing(functools.partial(_train_step, graphdef, optimizer, key)),
        donate_argnums=0,
        in_shardings=(place, rows, None),
        out_shardings=(place, scalar),
    )
    gradients = jax.jit(
        choosing(functools.partial(_loss_and_gradients, graphdef, key)),
        in_shardings=(place.params, rows),
        out_shardings=(scalar, place.params),
    )
    nats = jax.jit(
        choosing(functools.partial(_nats, graphdef, key.separator)),
        in_shardings=(place.params, rows),
        out_shardings=scalar,
    )
    # Random number generators compile slowly and run once, so their code is not optimised.
    start = jax.jit(init, out_shardings=place, compiler_options={"xla_backend_optimization_level": 0})
    inspect = jax.jit(
        choosing(functools.partial(_inspect, graphdef, optimizer, key)),
        in_shardings=(place, rows, None),
        out_shardings=scalar,
    )
    functions = start, train_step, gradients, nats, inspect
    return Program(mesh, graphdef, abstract, *functions, replicated_parameters(mesh, shapes.params))


def _documents(tokens_BT: jax.Array, separator: int | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Document ids of the inputs of windows [B, T+1], and which targets count; None if documents are joined."""
    if separator is None:
        return None, None
    return document_ids(tokens_BT[:, :-1], separator), is_target(tokens_BT, separator)


def _gradients(graphdef: Any, key: ProgramKey, params: nnx.State, tokens_BT: jax.Array) -> tuple[tuple, nnx.State]:
    """((loss, z-loss in it), gradient): means over the targets of a batch [B, T+1], as the optimizer takes them."""
    separator, accumulate = key.separator, key.optim.accumulate
    counted_BT = _documents(tokens_BT, separator)[1]
    # With separate documents micro-batches have different numbers of targets, and a mean of their means would weigh
    # targets of short ones more. So sums are divided by the count over all micro-batches.
    count = tokens_BT[:, 1:].size if counted_BT is None else jnp.sum(counted_BT)

    # Codes are computed once a step instead of once a micro-batch. A single batch computes them layer by layer.
    codes = nnx.merge(graphdef, params).make_codes() if accumulate > 1 else None

    def mean_loss(params: nnx.State, rows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        segments_BT, mask_BT = _documents(rows_BT, separator)
        model = nnx.merge(graphdef, params)
        if codes is not None:
            model.use_codes(codes)
        targets_BT, z_loss = rows_BT[:, 1:], key.optim.z_loss
        total, _, z = model.loss(rows_BT[:, :-1], targets_BT, mask_BT, segments_BT=segments_BT, z_loss=z_loss)
        return total / (count / accumulate), z / (count / accumulate)

    losses, grads = _accumulated(jax.value_and_grad(mean_loss, has_aux=True), params, tokens_BT, accumulate)
    if accumulate == 1 and key.unroll >= key.model.depth:
        grads = _stacked(grads, jnp.dtype("float32" if key.reduction == "float32" else concrete(key.precision)))
    return losses, grads


def _loss_and_gradients(
    graphdef: Any, key: ProgramKey, params: nnx.State, tokens_BT: jax.Array
) -> tuple[jax.Array, nnx.State]:
    """The loss that is minimised, z-loss included, and its gradients."""
    (loss, _), grads = _gradients(graphdef, key, params, tokens_BT)
    return loss, grads


def _train_step(
    graphdef: Any,
    optimizer: Any,
    key: ProgramKey,
    state: TrainState,
    tokens_BT: jax.Array,
    rates: Rates | jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step. Returns the new state and metrics: `loss`, the mean cross-entropy in nats without the
    z-loss; `z_loss`, where there is one; `grad_norm`, before clipping; `applied`, of a guarded step, 0 or 1."""
    rate, decay = rates if isinstance(rates, Rates) else Rates(rates)  # a rate alone leaves weight decay as it is
    (loss, z), grads = _gradients(graphdef, key, state.params, tokens_BT)
    updates, opt = optimizer.update(grads, state.opt, state.params, decay=decay)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    apart = {"loss": loss - z, "z_loss": z} if key.optim.z_loss else {"loss": loss}
    norm = optax.tree.norm(grads)
    if key.guarded:
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt = jax.tree.map(lambda new, old: jnp.where(good, new, old), (params, opt), (state.params, state.opt))
        apart["applied"] = good.astype(jnp.float32)
    return TrainState(state.step + 1, params, opt), {**apart, "grad_norm": norm}


def _accumulated(loss_and_grad: Callable, params: nnx.State, tokens_BT: jax.Array, steps: int) -> tuple:
    """Mean loss and gradient over `steps` micro-batches of equal size, one after another."""
    if steps == 1:
        return loss_and_grad(params, tokens_BT)
    # Strided micro-batches keep every row on its device; contiguous ones would move rows between devices.
    tokens_ABT = tokens_BT.reshape(-1, steps, tokens_BT.shape[1]).swapaxes(0, 1)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(loss_and_grad, params, tokens_ABT[0]))
    add = lambda total, rows: (jax.tree.map(jnp.add, total, loss_and_grad(params, rows)), None)
    total, _ = jax.lax.scan(add, zero, tokens_ABT)
    return jax.tree.map(lambda a: a / steps, total)


def _stacked(grads: nnx.State, dtype: Any) -> nnx.State:
    """Stack the gradients to the matrices of unrolled blocks, once and in the type in which they were computed.

    The backward pass makes them layer by layer. Without this, XLA's GPU compiler stacks them in the optimizer, which
    then takes three passes over the state instead of one: 36 bytes for each parameter instead of 30. Writing each into
    a preallocated stack is three times as fast as the concatenation that XLA would make of jnp.stack.
    """

    def one(path: tuple, grad: jax.Array) -> jax.Array:
        if role_of(path) != "matrix":
            return grad
        stack = uninitialised(grad.shape, dtype)
        for layer, index in enumerate(jax.lax.optimization_barrier(tuple(map(jnp.int32, range(len(grad)))))):
            stack = jax.lax.dynamic_update_index_in_dim(stack, grad[layer].astype(dtype), index, 0)
        return jax.lax.optimization_barrier(stack).astype(grad.dtype)

    return jax.tree_util.tree_map_with_path(one, grads)


def _inspect(
    graphdef: Any, optimizer: Any, key: ProgramKey, state: TrainState, tokens_BT: jax.Array, rates: Rates
) -> dict[str, Any]:
    """Describe the step on this batch without taking it.

    Returns `grad_norm`, `update_norm` and `param_norm` (before the step) of every parameter by name, those of the
    blocks layer by layer [L]; `activation_rms` and `largest_logit` of the first micro-batch
    (`LanguageModel.activations`).
    It is a separate program, so the training step stays the same; it computes the gradient again, and a forward pass.
    """
    _, grads = _gradients(graphdef, key, state.params, tokens_BT)
    updates, _ = optimizer.update(grads, state.opt, state.params, decay=rates.decay)
    rows_BT = tokens_BT.reshape(-1, key.optim.accumulate, tokens_BT.shape[1])[:, 0]
    segments_BT, _ = _documents(rows_BT, key.separator)
    seen = nnx.merge(graphdef, state.params).activations(rows_BT[:, :-1], segments_BT=segments_BT)
    return {
        "grad_norm": _norms(grads),
        "update_norm": jax.tree.map(lambda norm: rates.learning * norm, _norms(updates)),
        "param_norm": _norms(state.params),
        "largest_logit": seen.pop("largest_logit"),
        "activation_rms": seen,
    }


def _norms(tree: Any) -> dict[str, jax.Array]:
    """Euclidean norms by name; one for each layer of stacked parameters."""
    norms = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        first = int(name.startswith(("blocks.", "lower_bounds")))  # their first axis is that of layers
        norms[name] = jnp.sqrt(jnp.sum(jnp.square(leaf), axis=tuple(range(first, leaf.ndim))))
    return norms


def _nats(graphdef: Any, separator: int | None, params: nnx.State, tokens_BT: jax.Array) -> jax.Array:
    """Nats of each target, [B, T]."""
    segments_BT, _ = _documents(tokens_BT, separator)
    return nnx.merge(graphdef, params).nats(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT=segments_BT)
