"""Bytes that one device needs at the peak of a training step, from a model.

State is exact (from the shardings). The residuals of each layer, which the forward pass stores for the backward pass,
are counted array by array, as compiled for an H200 (jax 0.11.2) and for TPUs (jax 0.10.2). The working set is a fit to
those compilations. The total is right within 10 % (tests/lowering/test_memory.py); `lower --compile` asks the compiler.
"""

import dataclasses
from dataclasses import dataclass

from mmfree_jax import flops
from mmfree_jax.config import Remat, RunConfig
from mmfree_jax.devices import Device
from mmfree_jax.lowering.program import Report

# Why tables, and not the residuals of the traced step, `jax.eval_shape` of its vjp? That was measured on the same 45
# compilations. Without remat it counts 20.5 GB for four layers of transformer++-1.3b, where the compiler stores 4.8:
# most of what JAX hands over is recomputed in fusions, or shared. And our kernels cannot be traced without their GPU's
# stack.

BLOCK = 128  # steps that attention's kernel for TPUs takes at once
WIDEST = 256  # channels of a head with those that keep documents apart (ops/fast/hopper/attention.py)
QUERIES_AT_ONCE = 256  # whose scores are made at once without a kernel (ops/fast/choice.py, which loads JAX)
LOGITS = 2**26  # of a chunk of tokens in the loss (ops/cross_entropy.py)


@dataclass(frozen=True)
class Residuals:
    """Residuals of a layer in bfloat16: bytes for each token and unit of a width."""

    replicated: float  # arrays as wide as the model, replicated over the tensor axis
    sharded: float  # arrays as wide as the model, sharded over the tensor axis
    glu: float  # arrays as wide as the GLU, sharded too
    weights: float = 0.0  # bytes for each weight: its code, or its copy in bfloat16


FULL = Residuals(2, 0, 0)  # the residual stream at the layer's start
ATTENTION = {
    "none": Residuals(8, 8, 6, 2),  # two residuals and their norms; q, k, v, y; gate, up, their product
    "looped": Residuals(12, 12, 4, 2),
    "products": Residuals(4, 6, 4, 2),
    "mixer": Residuals(4, 6, 0, 2),
    "full": FULL,
}
BITNET: dict[str, Residuals] = {
    "none": Residuals(6, 8, 5, 1),  # as attention without the norms, and the codes of every input
    "looped": Residuals(6, 9, 8, 1),
    "products": Residuals(6, 8, 5, 1),
    "mixer": Residuals(6, 8, 1, 1),
    "codes": Residuals(6, 1, 1, 1),
    "full": FULL,
}
MLGRU_KERNELS = {
    "none": Residuals(4, 8, 4, 1),  # two residuals; i, f, g, h; gate and up; kernels recompute everything else
    "products": Residuals(4, 8, 4, 1),
    "mixer": Residuals(5, 8, 0, 1),
    "codes": Residuals(8, 2, 0, 1),
    "full": FULL,
}
MLGRU_XLA = {
    "none": Residuals(7, 14, 5, 1),  # states in float32 and the codes as well
    "looped": Residuals(9, 39, 5, 1),
    "products": Residuals(7, 12, 5, 1),
    "mixer": Residuals(7, 12, 1, 1),
    "codes": Residuals(7, 6, 1, 1),
    "full": FULL,
}
RWKV4 = {
    "none": Residuals(13, 53, 5, 1),
    "products": Residuals(8, 15, 5, 1),
    "mixer": Residuals(8, 15, 1, 1),
    "codes": Residuals(8, 9, 1, 1),
    "full": FULL,
}
HGRN = {
    "none": Residuals(8, 10, 6, 2),
    "looped": Residuals(12, 14, 5, 2),
    "products": Residuals(4, 8, 4, 2),
    "mixer": Residuals(4, 8, 0, 2),
    "full": FULL,
}


# On TPUs layers run in a loop, whose residuals are stacks. Dense layers keep the sources of their inputs (`ops.fast`).
TPU: dict[tuple[str, str], Residuals] = {
    ("attention", "dense"): Residuals(4, 10, 4, 2),  # two residuals; q, k, v, y by the kernel and by time; gate, up
    ("mlgru", "dense"): Residuals(4, 8, 4, 2),  # two residuals; i, f, g, h; gate, up
    # Two residuals, the norm, its shift, their three mixtures and the codes of these; r, k, v, their average, its
    # gate and product, and the codes of that. The sums and exponents are made again.
    ("rwkv4", "ternary"): Residuals(17, 13, 4, 1),
}


class Parts:
    """Base of dataclasses whose fields are numbers that add up."""

    @property
    def total(self) -> float:
        """The sum of all fields."""
        return sum(dataclasses.astuple(self))  # type: ignore[call-overload]


@dataclass(frozen=True)
class Memory(Parts):
    """Bytes of one device at the peak of a step."""

    parameters: float
    optimizer: float
    activations: float
    gradients: float
    working: float  # of one layer's backward pass and of the loss


def layer_residuals(run: RunConfig, device: Device) -> Residuals:
    """Return the residuals of each layer under the run's remat policy, attention scores excepted."""
    model = run.model
    tables = {"attention": BITNET, "mlgru": MLGRU_XLA, "rwkv4": RWKV4}
    if model.mixer == "mlgru" and device.kernels and run.kernels == "auto":
        tables["mlgru"] = MLGRU_KERNELS
    if model.linear == "dense":
        tables = {"attention": ATTENTION, "mlgru": HGRN, "rwkv4": RWKV4}
    table = tables[model.mixer]
    found = table.get("looped", table["none"]) if looped(run, device) and run.remat == "none" else table[run.remat]
    if device.platform == "tpu" and run.remat == "none":
        found = TPU.get((model.mixer, model.linear), found)
    if device.platform == "tpu" and model.linear == "dense":  # the loops read copies of all weights in bfloat16
        found = dataclasses.replace(found, weights=2)
    # Kernels that recompute codes need entire rows. If tensor shards the rows of both output projections, their codes
    # are stored instead.
    stored_codes = 1 if table is MLGRU_KERNELS and run.mesh.tensor > 1 and run.remat != "full" else 0
    # Micro-batches share the codes of the weights, which are computed once before them, under every policy.
    weights = max(found.weights, 1.0 if model.linear == "ternary" and run.optim.accumulate > 1 else 0.0)
    return dataclasses.replace(
        found, sharded=found.sharded + stored_codes, glu=found.glu + stored_codes, weights=weights
    )


def looped(run: RunConfig, device: Device) -> bool:
    """Return whether a loop runs over the layers. It stacks more residuals than unrolled layers store."""
    unroll = run.unroll or (run.model.depth if device.platform == "cuda" else 1)
    return unroll < run.model.depth


def tokens_per_device(run: RunConfig) -> float:
    """Return the tokens of one micro-batch on one device."""
    return run.data.tokens_per_step / (run.mesh.batch_shards * run.mesh.sequence * run.optim.accumulate)


def memory(run: RunConfig, report: Report, device: Device) -> Memory:
    """Return the peak of a step.

    With unrolled layers the backward pass frees residuals while it makes gradients, and the peak is at its start or at
    its end. A loop over layers holds the stacks of both all the time. Accumulation adds a sum of gradients.
    """
    model, mesh, size = run.model, run.mesh, flops.parameters(run.model)
    shards, item = mesh.fsdp * mesh.tensor, _item(run)
    residuals, gradients = all_residuals(run, device), 4 * size.total / shards
    summed = gradients if run.optim.accumulate > 1 else 0.0

    # The working set: of one layer's backward pass or of a chunk of the loss (logits, exponentials and their gradient).
    backward = item * (4 * model.width + 12 * model.glu_width / mesh.tensor)  # gradients and inputs of one GLU
    scores = 2 * _scores(run, device)[1]
    logits = 10 * min(LOGITS, tokens_per_device(run) * model.vocab / mesh.tensor)
    # With fsdp: all-gathered weights of one layer and of the head in bfloat16, and their gradients before the
    # reduce-scatter, the head's in float32.
    weights = (4 * size.N_nonemb / model.depth + 6 * model.vocab * model.width) / mesh.tensor
    gathered = weights if mesh.fsdp > 1 else 0.0
    again = 0.0  # under `full` a ternary layer, on TPUs any, recomputes all its residuals in its backward pass
    if run.remat == "full" and (model.linear == "ternary" or device.platform == "tpu"):
        again = _layer(run, layer_residuals(dataclasses.replace(run, remat="none"), device))
    working = max(backward + scores, logits) + gathered + again

    if looped(run, device):
        return Memory(report.parameters, report.optimizer, residuals, gradients + summed, working)
    # Ternary layers turn codes into inputs again; dense layers recompute gate and up under `mixer`.
    half = 0.5 if model.linear == "dense" and run.remat != "mixer" else 1.0
    # At the start of the backward pass all residuals are there, and no gradients but the head's; at its end all
    # gradients, and of the residuals only the streams between blocks. The peak is the larger of the two.
    starting = max(half * backward + scores, logits) + gathered
    head = 4 * model.vocab * model.width / shards  # the loss computes the head's gradient already in its forward pass
    streams = model.depth * item * 2 * model.width
    at_start, at_end = (residuals, head + summed, starting), (streams, gradients - head + summed, working)
    return Memory(report.parameters, report.optimizer, *max(at_start, at_end, key=sum))


def all_residuals(run: RunConfig, device: Device) -> float:
    """Return the residuals of all layers."""
    residuals, shards = layer_residuals(run, device), run.mesh.fsdp * run.mesh.tensor
    weights = residuals.weights * flops.parameters(run.model).N_nonemb / shards
    scores = _scores(run, device)[0] if run.remat == "none" else 0.0
    return run.model.depth * (_layer(run, residuals) + scores) + weights


def _layer(run: RunConfig, residuals: Residuals) -> float:
    """Bytes of the residuals of one layer."""
    width, tensor = run.model.width, run.mesh.tensor
    per_token = (
        residuals.replicated + residuals.sharded / tensor
    ) * width + residuals.glu * run.model.glu_width / tensor
    return _item(run) * per_token


def whole_scores(run: RunConfig, device: Device) -> bool:
    """Return whether attention's scores go through memory, because no fused kernel is available."""
    if run.model.mixer != "attention":
        return False
    if device.platform == "tpu":
        whole_blocks = run.mesh.sequence == 1 or run.data.sequence % (run.mesh.sequence * BLOCK) == 0
        return not (device.kernels and run.kernels == "auto" and whole_blocks)
    # Documents are kept apart by a checked kernel, in channels beside those of the heads; without them the library
    # serves everywhere.
    channels = run.model.width // run.model.heads + (run.data.sequence - 1).bit_length()
    serves = device.kernels and run.kernels == "auto" and channels <= WIDEST
    apart = not run.data.separate_documents or serves
    fused = device.platform == "cuda" and run.mesh.sequence == 1 and apart
    return not (fused and run.precision != "float32")


def _scores(run: RunConfig, device: Device) -> tuple[float, float]:
    """One layer's scores in float32 and their softmax that are kept, and those that are there at once.

    Long windows, and windows that a mesh cuts, make them a block of queries at a time, and again in the backward pass.
    """
    if not whole_scores(run, device):
        return 0.0, 0.0
    queries = run.data.sequence / run.mesh.sequence
    whole = _item(run) * run.model.heads / run.mesh.tensor * run.data.sequence * 6
    if run.mesh.sequence == 1 and queries <= QUERIES_AT_ONCE:
        return whole, whole
    return 0.0, whole * min(1.0, QUERIES_AT_ONCE / queries)


def _item(run: RunConfig) -> float:
    """Tokens of a micro-batch on a device; twice as many in float32, because widths are given in bfloat16."""
    return tokens_per_device(run) * (2 if run.precision == "float32" else 1)


def policies(run: RunConfig) -> list[Remat]:
    """Return the remat policies that a run can have, the fastest first."""
    codes: list[Remat] = ["codes"] if run.model.linear == "ternary" else []
    return ["none", "products", "mixer", *codes, "full"]
