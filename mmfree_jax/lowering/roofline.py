"""Seconds that a training step takes on one device, from a roofline model.

Rates are shares of the data sheet's, measured on an H200 (experiments/results/h200_bench.md) and assumed elsewhere. An
operation is bound by arithmetic or by memory, and neither operations nor communication overlap. The result is within
25 % of measured steps (tests/lowering/test_memory.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mmfree_jax import flops
from mmfree_jax.config import RunConfig
from mmfree_jax.devices import Device
from mmfree_jax.lowering.memory import Parts, tokens_per_device, whole_scores
from mmfree_jax.lowering.program import Report, Traffic

PRODUCTS, COPY = 0.70, 0.69  # shares of the data sheet: 691 of 989 TFLOP/s, 3.31 of 4.8 TB/s
ATTENTION = 0.55  # share of the rate of products
LINKS = 0.80  # share of a link's data sheet; assumed
ADAM = 12  # bytes for each parameter: gradient and weight are read, the weight is written; the moments come on top

# Bytes for each token and unit of width that element-wise work of a layer reads and writes, forward and backward, in
# bfloat16, from profiles of the two main families. A quarter of it belongs to the forward pass.
ELEMENTWISE = {
    ("attention", "dense"): 148,
    ("mlgru", "ternary"): 222,
    ("attention", "ternary"): 300,
    ("rwkv4", "ternary"): 500,
    ("mlgru", "dense"): 240,
}
WITHOUT_KERNELS = 1.6  # factor on these bytes if XLA computes the ternary layers and the recurrence
FORWARD = 0.25
# Further bytes if gradients are quantised: codes of 5 widths of them in a pass of their own, and 10.5 widths of codes
# and 7.75 of inputs' codes transposed, minus what is written as codes instead of values.
GRADIENT_CODES = 38
SCORES = 24  # bytes for each score that is stored: float32 out and in, softmax, and all of it backward


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of one optimizer step, in parts that do not overlap."""

    products: float
    attention: float
    elementwise: float
    optimizer: float
    communication: float


def step_time(run: RunConfig, report: Report, device: Device) -> StepTime:
    """Return the time of one optimizer step of a run on a mesh of such devices."""
    model = run.model
    per_token = flops.forward_flops(model, 1, (run.data.sequence + 1) / 2)
    tokens = tokens_per_device(run) * run.optim.accumulate / run.mesh.tensor  # whose work one device does
    memory_rate, product_rate = COPY * device.bandwidth, PRODUCTS * device.bf16
    # With a tensor axis some of our kernels lack the entire rows that they need, and XLA computes the same.
    kernels = device.kernels and run.kernels == "auto" and run.mesh.tensor == 1

    # The backward pass recomputes the products under `full` and `codes` (from their codes), and gate and up under
    # `mixer`.
    blocks = per_token.dense + per_token.ternary
    gate_up = 4 * model.depth * model.width * model.glu_width / blocks
    forwards = 1 + {"codes": 1.0, "full": 1.0, "mixer": gate_up}.get(run.remat, 0.0)
    forward_rate = PRODUCTS * device.int8 if kernels and model.linear == "ternary" else product_rate
    backward_rate = forward_rate if model.gradient_bits else product_rate
    products = blocks * (forwards / forward_rate + 2 / backward_rate) + 3 * per_token.head / product_rate

    passes = 4 if run.remat in ("products", "mixer", "full") else 3
    masked = 2 if whole_scores(run, device) else 1  # a fused kernel does not compute the masked half
    attention = passes * masked * per_token.attention / (ATTENTION * product_rate)

    moved = float(ELEMENTWISE[model.mixer, model.linear] * model.width)
    moved *= 1 if kernels or model.family == "transformer++" else WITHOUT_KERNELS
    moved *= 1 if run.remat == "none" else 1 + FORWARD
    moved += GRADIENT_CODES * model.width if model.gradient_bits and kernels else 0
    moved += SCORES * model.heads * run.data.sequence if whole_scores(run, device) else 0
    moved *= (2 if run.precision == "float32" else 1) * model.depth
    return StepTime(
        tokens * products,
        tokens * attention,
        tokens * moved / memory_rate,
        (ADAM * report.parameters / 4 + 2 * report.optimizer) / memory_rate,
        communication(report.traffic, device),
    )


def communication(traffic: Iterable[Traffic], device: Device) -> float:
    """Return the seconds of all collectives, without overlap. Those within an island use its links."""
    rate = lambda one: device.link if one.span <= device.island else device.network
    return sum(one.sent / (LINKS * rate(one)) for one in traffic)
