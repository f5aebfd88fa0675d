"""The training step itself: the very program that `train` builds, on random tokens."""

import dataclasses
import math
import statistics
import time
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from mmfree_jax import flops
from mmfree_jax.bench.operations import DOCUMENT
from mmfree_jax.bench.timing import memory_bytes
from mmfree_jax.config import Moments, RunConfig
from mmfree_jax.devices import peak_flops
from mmfree_jax.lowering.memory import policies
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.fast.choice import definitions, kernels_allowed
from mmfree_jax.presets import run_preset
from mmfree_jax.training.optim import make_optimizer
from mmfree_jax.training.step import Program, TrainState, make_program, program_key

WARM, ROUNDS, STEPS = 2, 3, 3  # steps before timing; timed rounds of steps queued one behind the other, as in `train`
END = 0  # the token after which a document begins
TIMES = ("tokens_per_s", "step_ms", "step_ms_least", "step_ms_most", "of_bf16", "of_data_sheet", "loss")


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A preset with the batch and window that one device is given, and what differs from the preset."""

    preset: str
    batch: int
    sequence: int
    remat: str = "none"
    kernels: str = "auto"
    gradient_bits: Literal[0, 8] = 0
    moments: Moments = "float32"
    documents: Literal["joined", "apart"] = "joined"
    unoptimised: Literal["", "bfloat16", "float32"] = ""  # the model by its definitions (`defined_loss`) in this type

    @property
    def name(self) -> str:
        """Preset, shape, and what differs from the preset: what `--only` is looked for in."""
        fields = dataclasses.fields(self)[3:]
        changed = [f"{f.name}={value}" for f in fields if (value := getattr(self, f.name)) != f.default]
        return " ".join([f"{self.preset}, B={self.batch} T={self.sequence}", *changed])

    def tokens(self, vocab: int) -> np.ndarray:
        """Random tokens [B, T + 1]; where documents are apart, END ends one after `DOCUMENT` tokens on average."""
        rng, shape = np.random.default_rng(0), (self.batch, self.sequence + 1)
        tokens = rng.integers(END + 1, vocab, shape, dtype=np.int32)
        return np.where(rng.uniform(size=shape) < 1 / DOCUMENT, END, tokens) if self.documents == "apart" else tokens

    def run(self) -> RunConfig:
        """The run whose step is timed."""
        run = run_preset(self.preset)
        apart = self.documents == "apart"
        data = dataclasses.replace(run.data, batch=self.batch, sequence=self.sequence, separate_documents=apart)
        model = dataclasses.replace(run.model, gradient_bits=self.gradient_bits)
        changes: dict[str, Any] = {"remat": self.remat, "kernels": self.kernels}
        changes["optim"] = dataclasses.replace(run.optim, moments=self.moments)
        changes["precision"] = self.unoptimised or run.precision
        return dataclasses.replace(run, model=model, data=data, **changes)


FULL = (
    StepCase("transformer++-1.3b", 8, 2048),
    StepCase("matmul-free-1.3b", 8, 2048),
    StepCase("matmul-free-1.3b", 8, 2048, gradient_bits=8),
    StepCase("transformer++-1.3b", 2, 8192),
    StepCase("matmul-free-1.3b", 2, 8192),
    StepCase("matmul-free-1.3b", 2, 8192, gradient_bits=8),
    StepCase("transformer++-370m", 8, 2048),
    StepCase("matmul-free-370m", 8, 2048),
    StepCase("transformer++-1.3b", 8, 2048, documents="apart"),
    StepCase("matmul-free-1.3b", 8, 2048, documents="apart"),
    StepCase("transformer++-1.3b", 2, 8192, documents="apart"),
    StepCase("matmul-free-1.3b", 8, 2048, moments="bfloat16"),
    StepCase("matmul-free-1.3b", 8, 2048, moments="int8"),
    StepCase("matmul-free-1.3b", 8, 2048, remat="mixer"),
    StepCase("matmul-free-1.3b", 8, 2048, remat="codes"),
    StepCase("matmul-free-1.3b", 8, 2048, unoptimised="bfloat16"),
    StepCase("matmul-free-1.3b", 4, 2048, unoptimised="float32"),
    StepCase("matmul-free-1.3b", 4, 2048),
    StepCase("matmul-free-1.3b", 8, 2048, unoptimised="float32"),
    StepCase("matmul-free-1.3b", 8, 2048, kernels="off"),
)
SMALL = (
    StepCase("transformer++-tiny", 2, 64),
    StepCase("matmul-free-tiny", 2, 64),
    StepCase("matmul-free-tiny", 2, 64, gradient_bits=8),
    StepCase("transformer++-tiny", 2, 64, documents="apart"),
    StepCase("matmul-free-tiny", 2, 64, moments="int8"),
    StepCase("matmul-free-tiny", 2, 64, unoptimised="float32"),
)
FULL_MEMORY = (
    *(StepCase("matmul-free-1.3b", 4, 2048, remat=remat) for remat in policies(run_preset("matmul-free-1.3b"))),
    StepCase("matmul-free-1.3b", 4, 2048, unoptimised="bfloat16"),
    StepCase("matmul-free-1.3b", 4, 2048, unoptimised="float32"),
    *(StepCase("transformer++-1.3b", 4, 2048, remat=remat) for remat in policies(run_preset("transformer++-1.3b"))),
)
SMALL_MEMORY = (
    *(StepCase("matmul-free-tiny", 16, 128, remat=remat) for remat in ("none", "full")),
    StepCase("matmul-free-tiny", 16, 128, unoptimised="float32"),
    StepCase("transformer++-tiny", 16, 128),
)


def measure(case: StepCase, limits: dict[str, float] | None) -> dict[str, Any]:
    """Measure memory and compile time of one case; with the `limits` of the device also its step's time and rates.

    `total_gb` is what the compiled step asks for at once: state, batch, temporaries. The memory that other cases left
    allocated does not count. `compile_s` traces, lowers and compiles. A step that asks for more than the device has is
    not run: it has no times.
    """
    run = case.run()
    program = make_program(program_key(run, end_of_document=END))
    step = _unoptimised(run, program) if case.unoptimised else program.train_step
    shape = (case.batch, case.sequence + 1)
    with jax.set_mesh(program.mesh):
        jax.clear_caches()  # or tracing would find what an earlier case has traced
        began = time.perf_counter()
        abstract = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct((), np.float32)
        compiled = step.lower(program.abstract_state, *abstract).compile()
        compile_s, memory = time.perf_counter() - began, memory_bytes(compiled)
        asked = {
            **dataclasses.asdict(case),
            "total_gb": memory["total"] / 1e9,
            "temporary_gb": memory["temporary"] / 1e9,
            "compile_s": compile_s,
        }
        if limits is None:
            return asked
        held = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
        if memory["total"] > held:
            return asked | dict.fromkeys(TIMES)
        state, rate = program.init(jax.random.key(0)), program.repeat(np.float32(1e-4))
        batch = program.place(case.tokens(run.model.vocab))
        seconds, loss = [], float("nan")
        # Steps of a round are queued without waiting, as in training; the loss of the last one waits for all of them.
        for steps in [WARM, *[STEPS] * ROUNDS]:
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = compiled(state, batch, rate)
            loss = float(metrics["loss"])
            seconds.append((time.perf_counter() - began) / steps)
    seconds = seconds[1:]
    median = statistics.median(seconds)
    products = flops.train_flops_per_token(run.model, case.sequence).products * case.batch * case.sequence
    peak = peak_flops(jax.devices()[0].device_kind)
    figures = (
        case.batch * case.sequence / median,
        *(s * 1e3 for s in (median, min(seconds), max(seconds))),
        products / median / limits["bf16_flops"],
        products / median / peak if peak else None,
        loss,
    )
    return asked | dict(zip(TIMES, figures, strict=True))


def defined_loss(model: LanguageModel, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy in nats of the model as a first version would be written.

    Fake quantisation with gradients by autodiff, all scores and logits at once, no recomputation: the model itself with
    its ops by their definitions. Only the recurrence is a parallel prefix, as no first version on a GPU would go step
    by step.
    """
    with definitions(but=("recurrence",)), kernels_allowed(False):
        found = model.loss(tokens_BT, targets_BT)
        return found.total / found.targets


def _unoptimised(run: RunConfig, program: Program) -> jax.stages.Wrapped:
    """`train_step` with `defined_loss` in place of the model's own."""
    optimizer = make_optimizer(run.optim, run.model)

    def step(state: TrainState, tokens_BT: jax.Array, rate: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        loss = lambda params: defined_loss(nnx.merge(program.graphdef, params), tokens_BT[:, :-1], tokens_BT[:, 1:])
        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(state.step + 1, params, opt), {"loss": value}

    return jax.jit(step, donate_argnums=0)
