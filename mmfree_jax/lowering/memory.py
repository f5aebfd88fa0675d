"""Bytes that one device holds at the peak of a training step: an analytic model.

State is exact (from the shardings). What the backward pass keeps of each layer is counted array by array, as compiled
for an H200 (jax 0.11.2); the working set around it is a fit to those compilations, good to 10 % of the total (see
tests/lowering/test_memory.py).
"""

import dataclasses
from dataclasses import dataclass

from mmfree_jax import flops
from mmfree_jax.config import Remat, RunConfig
from mmfree_jax.devices import Device
from mmfree_jax.lowering.program import Report

LOGITS = 2**26  # of a chunk of tokens in the loss (ops/cross_entropy.py)


@dataclass(frozen=True)
class Kept:
    """What a layer's forward pass leaves for its backward pass: bytes a token for each unit of a width, in bfloat16."""

    whole: float  # arrays as wide as the model that every device of a tensor axis holds
    cut: float  # those that the tensor axis cuts
    glu: float  # as wide as the GLU, cut as well
    weights: float = 0.0  # bytes a weight: its code, or its bfloat16 copy


FULL = Kept(2, 0, 0)  # the residual stream at the layer's start
ATTENTION = {
    "none": Kept(8, 8, 6, 2),  # two residuals and their norms; q, k, v, y; gate, up, their product
    "looped": Kept(12, 12, 4, 2),
    "products": Kept(4, 6, 4, 2),
    "mixer": Kept(4, 6, 0, 2),
    "full": FULL,
}
BITNET: dict[str, Kept] = {
    "none": Kept(6, 8, 5, 1),  # as attention without the norms, and the codes of every input
    "looped": Kept(6, 9, 8, 1),
    "products": Kept(6, 8, 5, 1),
    "mixer": Kept(6, 8, 1, 1),
    "codes": Kept(6, 1, 1, 1),
    "full": FULL,
}
MLGRU_KERNELS = {
    "none": Kept(4, 8, 4, 1),  # two residuals; i, f, g, h; gate and up: kernels make all else again
    "products": Kept(4, 8, 4, 1),
    "mixer": Kept(5, 8, 0, 1),
    "codes": Kept(8, 2, 0, 1),
    "full": FULL,
}
MLGRU_XLA = {
    "none": Kept(7, 14, 5, 1),  # states in float32 and the codes as well
    "looped": Kept(9, 39, 5, 1),
    "products": Kept(7, 12, 5, 1),
    "mixer": Kept(7, 12, 1, 1),
    "codes": Kept(7, 6, 1, 1),
    "full": FULL,
}
RWKV4 = {
    "none": Kept(13, 53, 5, 1),
    "products": Kept(8, 15, 5, 1),
    "mixer": Kept(8, 15, 1, 1),
    "codes": Kept(8, 9, 1, 1),
    "full": FULL,
}
HGRN = {
    "none": Kept(8, 10, 6, 2),
    "looped": Kept(12, 14, 5, 2),
    "products": Kept(4, 8, 4, 2),
    "mixer": Kept(4, 8, 0, 2),
    "full": FULL,
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a step."""

    parameters: float
    optimizer: float
    activations: float
    gradients: float
    working: float  # of one layer's backward pass and of the loss

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


def kept(run: RunConfig, device: Device) -> Kept:
    """What each layer keeps under the run's remat policy, score matrices aside."""
    model = run.model
    tables = {"attention": BITNET, "mlgru": MLGRU_XLA, "rwkv4": RWKV4}
    if model.mixer == "mlgru" and device.kernels and run.kernels == "auto":
        tables["mlgru"] = MLGRU_KERNELS
    if model.linear == "dense":
        tables = {"attention": ATTENTION, "mlgru": HGRN, "rwkv4": RWKV4}
    table = tables[model.mixer]
    found = table.get("looped", table["none"]) if looped(run, device) and run.remat == "none" else table[run.remat]
    # Kernels that make codes again need whole rows: those of both output projections are kept where tensor cuts them.
    cut_codes = 1 if table is MLGRU_KERNELS and run.mesh.tensor > 1 and run.remat != "full" else 0
    # Several micro-batches share codes that are made ahead of them all, whatever the policy.
    weights = max(found.weights, 1.0 if model.linear == "ternary" and run.optim.accumulate > 1 else 0.0)
    return dataclasses.replace(found, cut=found.cut + cut_codes, glu=found.glu + cut_codes, weights=weights)


def looped(run: RunConfig, device: Device) -> bool:
    """Whether a loop goes over the layers: what they keep is then stacked, intermediates included that unrolled layers
    make again."""
    unroll = run.unroll or (run.model.depth if device.platform == "cuda" else 1)
    return unroll < run.model.depth


def tokens_per_device(run: RunConfig) -> float:
    """Tokens of one micro-batch that one device computes."""
    return run.data.tokens_per_step / (run.mesh.batch_shards * run.mesh.sequence * run.optim.accumulate)


def memory(run: RunConfig, report: Report, device: Device) -> Memory:
    """The peak of a step.

    Unrolled, the backward pass frees residuals while gradients come up, and the peak lies at its start or at its end;
    a loop over layers holds the stacks of both all the time. Accumulation keeps a sum of gradients besides.
    """
    residuals, gradients = stored(run, device), _gradients(run)
    summed = gradients if run.optim.accumulate > 1 else 0.0
    working = _working(run, device)
    if looped(run, device):
        return Memory(report.parameters, report.optimizer, residuals, gradients + summed, working)
    head, streams = _head_gradient(run), run.model.depth * _item(run) * 2 * run.model.width
    at_start = residuals, head + summed, _starting(run, device)
    at_end = streams, gradients - head + summed, working
    peak = max(at_start, at_end, key=sum)
    return Memory(report.parameters, report.optimizer, *peak)


def stored(run: RunConfig, device: Device) -> float:
    """What the forward pass leaves for the backward pass, all layers."""
    per_layer = kept(run, device)
    weights = per_layer.weights * flops.parameters(run.model).N_nonemb / (run.mesh.fsdp * run.mesh.tensor)
    scores = _scores(run, device) if run.remat == "none" else 0.0
    return run.model.depth * (_layer(run, per_layer) + scores) + weights


def _layer(run: RunConfig, per_layer: Kept) -> float:
    """Activations that one layer keeps."""
    width, tensor = run.model.width, run.mesh.tensor
    per_token = (per_layer.whole + per_layer.cut / tensor) * width + per_layer.glu * run.model.glu_width / tensor
    return _item(run) * per_token


def whole_scores(run: RunConfig, device: Device) -> bool:
    """Whether attention makes all scores at once, as it does where no fused kernel serves (ops/attention.py)."""
    fused = device.platform == "cuda" and run.mesh.sequence == 1 and not run.data.separate_documents
    return run.model.mixer == "attention" and not (fused and run.precision != "float32")


def _scores(run: RunConfig, device: Device) -> float:
    """One layer's scores in float32 and their softmax, where attention makes them whole."""
    heads = run.model.heads / run.mesh.tensor
    return _item(run) * heads * run.data.sequence * 6 if whole_scores(run, device) else 0.0


def _item(run: RunConfig) -> float:
    """Tokens of a micro-batch on a device; twice as many for a run in float32, as widths are given in bfloat16."""
    return tokens_per_device(run) * (2 if run.precision == "float32" else 1)


def _gradients(run: RunConfig) -> float:
    return 4 * flops.parameters(run.model).total / (run.mesh.fsdp * run.mesh.tensor)


def _head_gradient(run: RunConfig) -> float:
    """It is there when the backward pass begins: the loss makes it in its forward pass."""
    return 4 * run.model.vocab * run.model.width / (run.mesh.fsdp * run.mesh.tensor)


def _logits(run: RunConfig) -> float:
    """Of a chunk of the loss: logits, exponentials and their gradient."""
    return 10 * min(LOGITS, tokens_per_device(run) * run.model.vocab / run.mesh.tensor)


def _backward(run: RunConfig) -> float:
    """Gradients and inputs of one GLU."""
    return _item(run) * (4 * run.model.width + 12 * run.model.glu_width / run.mesh.tensor)


def _starting(run: RunConfig, device: Device) -> float:
    """Working set when the backward pass begins; dense layers have no codes to be made into inputs again, but make gate
    and up again under `mixer`."""
    half = run.model.linear == "dense" and run.remat != "mixer"
    backward = _backward(run) * (0.5 if half else 1.0) + 2 * _scores(run, device)
    return max(backward, _logits(run)) + _gathered(run)


def _working(run: RunConfig, device: Device) -> float:
    """Working set of a layer's backward pass; under `full`, what a ternary layer would have kept comes up in it."""
    again = 0.0
    if run.model.linear == "ternary" and run.remat == "full":
        again = _layer(run, kept(dataclasses.replace(run, remat="none"), device))
    return max(_backward(run) + 2 * _scores(run, device), _logits(run)) + _gathered(run) + again


def _gathered(run: RunConfig) -> float:
    """Where the fsdp axis cuts weights: those of one layer and of the head whole in bfloat16, and their gradients
    before they are scattered, the head's in float32."""
    layer = flops.parameters(run.model).N_nonemb / run.model.depth
    whole = 4 * layer + 6 * run.model.vocab * run.model.width
    return whole / run.mesh.tensor if run.mesh.fsdp > 1 else 0.0


def policies(run: RunConfig) -> list[Remat]:
    """The remat policies that a run can have, the fastest first."""
    codes: list[Remat] = ["codes"] if run.model.linear == "ternary" else []
    return ["none", "products", "mixer", *codes, "full"]
