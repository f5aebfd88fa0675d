"""Decoding: the very program that `generate` and `serve` run, greedy, on models of random weights.

A row says what one token costs: milliseconds, bytes that have to be read, the share of the device's read bandwidth that
this is, and joules. `resident_gb` is all that the device holds while it decodes: weights, state and temporaries.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.bench.timing import memory_bytes, time_calls
from mmfree_jax.config import ModelConfig
from mmfree_jax.devices import EnergyMeter
from mmfree_jax.inference.generate import Progress, decode, start
from mmfree_jax.inference.model import HostTable, Place, ServedModel, served
from mmfree_jax.inference.packed import abstract_tensors, served_config
from mmfree_jax.inference.sampling import GREEDY, stacked
from mmfree_jax.ops.fast.choice import kernels_allowed
from mmfree_jax.ops.fast.cpu.library import memory_rate
from mmfree_jax.ops.packed import Layout
from mmfree_jax.presets import model_preset, split_name

STEPS = 32  # tokens of a program
LEAST_S = {"cpu": 2.0, "gpu": 1.0, "tpu": 1.0}  # of timed decoding, so that energy counters move
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A preset, the rows that decode together, and the tokens that they have read before."""

    preset: str
    batch: int
    context: int
    kernels: str = "auto"
    layout: Layout = "planes"
    embedding: Place = "device"

    @property
    def name(self) -> str:
        """Preset, shape, and what differs from the usual: what `--only` is looked for in."""
        usual = {"kernels": "auto", "layout": "planes", "embedding": "device"}
        other = [f" {name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]]
        return f"{self.preset}, B={self.batch} C={self.context}{''.join(other)}"

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return model_preset(*split_name(self.preset))

    @property
    def dtype(self) -> str:
        """Of the activations: bfloat16 for a dense model on an accelerator, which it reads its weights in."""
        return "bfloat16" if self.config.linear == "dense" and jax.default_backend() != "cpu" else "float32"


SMALL = (DecodeCase("matmul-free-tiny", 1, 64), DecodeCase("transformer++-tiny", 2, 64))
GPU = (
    DecodeCase("matmul-free-1.3b", 1, 2048),
    DecodeCase("transformer++-1.3b", 1, 2048),
    DecodeCase("matmul-free-1.3b", 64, 2048),
    DecodeCase("transformer++-1.3b", 64, 2048),
    DecodeCase("matmul-free-13b", 1, 2048),
    DecodeCase("transformer++-13b", 1, 2048),
    DecodeCase("matmul-free-13b", 8, 2048),
    DecodeCase("transformer++-13b", 8, 2048),
    DecodeCase("matmul-free-13b", 1, 2048, layout="trits", embedding="host"),
    DecodeCase("matmul-free-13b", 1, 12288),
    DecodeCase("transformer++-13b", 1, 12288),
    DecodeCase("bitnet-1.3b", 1, 2048),
    DecodeCase("matmul-free-370m", 1, 2048),
    DecodeCase("matmul-free-1.3b", 1, 2048, kernels="off"),
    DecodeCase("transformer++-1.3b", 1, 2048, kernels="off"),
)
CPU = (
    DecodeCase("matmul-free-370m", 1, 256),
    DecodeCase("matmul-free-370m", 1, 256, kernels="off"),
    DecodeCase("bitnet-370m", 1, 256),
    DecodeCase("transformer++-370m", 1, 256),
    DecodeCase("matmul-free-1.3b", 1, 256),
)


def measure(cases: tuple[DecodeCase, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each case, and leave nothing on the device."""
    rate = read_bytes_per_s()
    for case in cases:
        yield _measured(case, rate)
        jax.clear_caches()


def _measured(case: DecodeCase, read_rate: float) -> dict[str, Any]:
    model = random_model(case.config, case.dtype, case.layout, case.embedding)
    progress = _after(model, case.batch, case.context)
    settings = stacked([GREEDY] * case.batch)
    began = time.perf_counter()
    with kernels_allowed(case.kernels == "auto"):
        program = decode.lower(model, progress, settings, STEPS, greedy=True).compile()
    compile_s = time.perf_counter() - began
    resident = memory_bytes(program)["total"]
    read = bytes_read(model, progress)
    timing, joules = _timed(program, model, progress, settings)
    token_s = timing / STEPS
    return {
        **dataclasses.asdict(case),
        "ms": 1e3 * token_s,
        "tokens_per_s": case.batch / token_s,
        "joules": None if joules is None else joules / STEPS / case.batch,
        "resident_gb": resident / 1e9,
        "read_gb": read / 1e9,
        "of_read": read / token_s / read_rate,
        "compile_s": compile_s,
    }


def _timed(program: Any, model: ServedModel, progress: Progress, settings: dict) -> tuple[float, float | None]:
    """Seconds of a call, the median of rounds, and joules of a call. Every call goes on from the same context.

    Calls of a round follow each other, so that the host starts the next while the device computes.
    """
    position_B = progress.state.position_B + 0

    def run(progress: Progress) -> Progress:
        # The program takes over its arguments' memory, so the counts of tokens, which decide nothing but places in a
        # cache, are put back by hand.
        progress, _ = program(model, progress, settings)
        state = dataclasses.replace(progress.state, position_B=position_B + 0)
        return dataclasses.replace(progress, state=state)

    began = time.perf_counter()
    progress = jax.block_until_ready(run(run(progress)))
    calls = max(1, round(LEAST_S[jax.default_backend()] / ROUNDS / (time.perf_counter() - began) * 2))
    meter, rounds = EnergyMeter(), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            progress = run(progress)
        jax.block_until_ready(progress)
        rounds.append((time.perf_counter() - began) / calls)
    joules = meter.joules()
    return float(np.median(rounds)), None if joules is None else joules / calls / ROUNDS


def _after(model: ServedModel, batch: int, context: int) -> Progress:
    """A batch whose rows have read `context` tokens, less those that are to be decoded."""
    progress = start(model, batch, context)
    state = dataclasses.replace(progress.state, position_B=progress.state.position_B + context - STEPS)
    return dataclasses.replace(progress, state=state)


def random_model(
    config: ModelConfig, dtype: str, layout: Layout = "planes", embedding: Place = "device"
) -> ServedModel:
    """Return a served model of random codes and matrices, made on the device; dense matrices are bfloat16.

    An embedding on the host is zeros.
    """
    # Arrays of the right shapes that take no memory.
    tensors = abstract_tensors(config, layout=layout)
    shapes = {one.name: np.broadcast_to(np.zeros((), one.dtype), one.shape) for one in tensors}
    model = served(served_config(config), shapes, layout, dtype, embedding)
    leaves, structure = jax.tree.flatten(model)
    del model
    for i, leaf in enumerate(leaves):
        leaves[i] = _random(jax.random.key(i), leaf.shape, leaf.dtype)
        del leaf
    return jax.tree.unflatten(structure, leaves)


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Bytes of four ternary codes; matrices of small values; vectors, which are gains, floors and scales, of 0.5."""
    if dtype == jnp.uint8:
        codes = jax.random.bits(key, shape, jnp.uint8)
        return codes & ~((codes & 0x55) << 1)  # no field of 2 bits is 3; every byte is one of five trits
    if dtype == jnp.uint16:  # an embedding in bfloat16
        return jax.lax.bitcast_convert_type(_random(key, shape, jnp.bfloat16), dtype)
    if len(shape) == 1 or 1 in shape:
        return jnp.full(shape, 0.5, dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def bytes_read(model: ServedModel, progress: Progress) -> int:
    """Count the bytes that a step has to read: all weights but the embedding's other rows, and the state."""
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    tied, table = model.config.tie_embeddings, model.embedding
    unread = 0 if tied or isinstance(table, HostTable) else table.nbytes
    return size(model) - unread + size(progress.state.mixers)


def read_bytes_per_s() -> float:
    """Measure how fast this device reads memory: a CPU by `memory_rate`, others by a sum over 2 GB."""
    if jax.default_backend() == "cpu":
        return memory_rate()
    x = jnp.ones(2**30, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    jax.block_until_ready(total(x))
    return x.nbytes / time_calls(lambda: total(x)).median_s


def cases(small: bool) -> tuple[DecodeCase, ...]:
    """Return the cases of this device; tiny ones if `small`."""
    return SMALL if small else CPU if jax.default_backend() == "cpu" else GPU
