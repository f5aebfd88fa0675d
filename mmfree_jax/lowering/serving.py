"""`mmfree lower MODEL --serve`: what a model needs to be served, and how long a token takes.

Weights and state are exact, from the shapes of what a packed folder holds and of what decoding remembers. Temporaries
and times come from a model: a step of decoding reads every weight and every state once, and each layer costs something
besides.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from mmfree_jax import flops
from mmfree_jax.command_line import parse
from mmfree_jax.config import ModelConfig, require
from mmfree_jax.devices import DEVICES, USABLE, Device
from mmfree_jax.inference.generate import PIECE, TOP
from mmfree_jax.inference.model import Place
from mmfree_jax.inference.packed import Stored, abstract_tensors, is_packed, read_packed, served_config
from mmfree_jax.lowering.memory import Parts
from mmfree_jax.ops.fast.cpu import half_product
from mmfree_jax.ops.fast.cpu.library import memory_rate
from mmfree_jax.ops.packed import Layout
from mmfree_jax.output import program
from mmfree_jax.presets import model_preset, split_name
from mmfree_jax.weights import model_config

DOES_NOT_FIT = 2  # exit status
CPU_FLOPS = 2e11  # of a few cores' vector units; decoding few sequences does not come near


class Rates(NamedTuple):
    """What decoding reaches on a kind of device, and what it costs besides."""

    weights: float  # share of the bandwidth at which weights are read
    state: float  # and states, caches and logits
    operations: float  # share of the peak of products, when many sequences decode together
    layer_s: float  # seconds of a layer in which neither goes on: launches, and kernels too small for a device


# cuda: fitted to experiments/results/h200_decode.csv (tests/lowering/test_serving.py holds them to it). cpu: two cores.
# tpu: not measured.
TRITS = 0.45  # of the rate at which 2-bit weights are read: base 3 takes longer to take apart
RATES = {
    ("cuda", "ternary"): Rates(0.34, 0.5, 0.043, 6.1e-6),
    ("cuda", "dense"): Rates(0.77, 0.74, 0.5, 19e-6),
    ("tpu", "ternary"): Rates(0.4, 0.8, 0.2, 20e-6),
    ("tpu", "dense"): Rates(0.6, 0.8, 0.5, 20e-6),
    ("cpu", "ternary"): Rates(0.75, 0.75, 1.0, 30e-6),
    ("cpu", "dense"): Rates(0.75, 0.75, 1.0, 30e-6),
}


@dataclasses.dataclass(frozen=True)
class ServingArguments:
    """Predict for a model that is served: does it fit on a device, and how long does a token take?"""

    model: tyro.conf.Positional[str]
    """Preset, or folder of a model."""
    context: int = 2048
    """Tokens of a prompt and its completion together."""
    batch: int = 1
    """Sequences that decode together."""
    device: Literal["h200", "h100", "a100", "tpu-v5e", "tpu-v5p", "tpu-v6e", "cpu"] = "h200"
    """Type of the device; cpu is that of this machine, whose rate of reading is measured."""
    stored: Stored = "bfloat16"
    """Type of the embedding and of dense matrices."""
    layout: Layout = "planes"
    """Of ternary codes: planes take 2 bits, trits 1.6."""
    embedding: Place = "device"
    """host: the embedding stays with the host, as of `generate --embedding host`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the activations and of the attention's cache."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print everything as one JSON object."""

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class ServingMemory(Parts):
    """Bytes on the device."""

    codes: float  # of ternary matrices, and their scales
    matrices: float  # embedding, head and dense matrices
    state: float  # of all sequences: recurrent states, or keys and values
    prompt: float  # the state of a prompt that is read meanwhile
    working: float  # while a prompt is read or a token is chosen


@dataclasses.dataclass(frozen=True)
class TokenTime:
    """Seconds of a step, which gives every sequence a token."""

    reading: float
    arithmetic: float
    layers: float

    @property
    def total(self) -> float:
        """All of it: where rows are many enough for arithmetic to count, little of it overlaps with reading."""
        return self.reading + self.arithmetic + self.layers


def main(arguments: list[str]) -> int:
    """Print the prediction. Returns 0 if the model fits, else 2."""
    options = parse(ServingArguments, arguments, f"{program()} lower --serve")
    config = find_config(options.model)
    if options.device == "cpu":  # this machine's: its free memory, and the rate at which it reads
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        device = Device("cpu", free, memory_rate(), CPU_FLOPS, CPU_FLOPS, 0.0, 0.0, 1)
    else:
        device = DEVICES[options.device]
    memory, time = serving_memory(config, options), token_time(config, options, device)
    usable = USABLE * device.memory
    fits = memory.total <= usable
    if options.json:
        found = {"memory": {**dataclasses.asdict(memory), "total": memory.total}}
        found["time"] = {**dataclasses.asdict(time), "total": time.total}
        print(json.dumps({**found, "tokens_per_s": options.batch / time.total, "usable": usable, "fits": fits}))
    else:
        width = None if Console().is_terminal else 120
        show(config, options, memory, time, usable, Console(highlight=False, markup=False, emoji=False, width=width))
    return 0 if fits else DOES_NOT_FIT


def find_config(name: str) -> ModelConfig:
    """Return the architecture of a preset or of a model's folder. Raises ConfigError if it is neither."""
    path = Path(name)
    if not path.exists():
        return model_preset(*split_name(name))
    return read_packed(path)[0]["model"] if is_packed(path) else served_config(model_config(path))


def serving_memory(config: ModelConfig, options: ServingArguments) -> ServingMemory:
    """Return the bytes that serving needs at its peak."""
    on_device = lambda one: one.name != "embedding" or options.embedding == "device"
    tensors = list(filter(on_device, abstract_tensors(config, options.stored, options.layout)))
    codes = sum(one.size for one in tensors if one.name.endswith((".codes", ".scale")))
    item = jnp.dtype(options.dtype).itemsize
    state, working = flops.decode_state_bytes(config, options.context, item), _working(config, options, item)
    return ServingMemory(codes, sum(one.size for one in tensors) - codes, options.batch * state, state, working)


def _working(config: ModelConfig, options: ServingArguments, item: int) -> float:
    """Of reading a piece of a prompt, or of choosing tokens; whichever is more."""
    piece, V = min(PIECE, options.context), config.vocab
    widest = 2 * config.glu_width + 4 * config.width
    unpacked = config.width * config.glu_width if config.linear == "ternary" else 0  # one matrix as int8
    scores = 2 * 4 * piece * options.context * config.heads if config.mixer == "attention" else 0
    reading = piece * widest * max(item, 4) + unpacked + scores + 4 * V
    choosing = options.batch * (V * (4 + 1 + 3 * 4) + 8 * TOP + widest * max(item, 4))  # logits, seen, and their copies
    return max(reading, choosing) + 2 * _converted(config, options)


def _converted(config: ModelConfig, options: ServingArguments) -> float:
    """Bytes in bfloat16 of the matrices that XLA makes float32 of on a CPU, where it has no such products: of prompts'
    tokens, or of all without a C++ compiler."""
    if options.device != "cpu" or options.stored != "bfloat16":
        return 0.0
    tensors = abstract_tensors(config, options.stored, options.layout)
    matrices = [one for one in tensors if one.dtype == jnp.bfloat16]
    return float(sum(one.size for one in matrices if one.name != "embedding" or config.tie_embeddings))


def bytes_read(config: ModelConfig, options: ServingArguments) -> tuple[float, float]:
    """Return what a step of decoding reads and writes: bytes of weights, each once, and of states and logits."""
    tensors = abstract_tensors(config, options.stored, options.layout)
    item = jnp.dtype(options.dtype).itemsize
    lookup = 0 if config.tie_embeddings else next(one.size for one in tensors if one.name == "embedding")
    copied = _converted(config, options)
    if copied and half_product.supports(options.batch):
        copied = 0.0
    weights = sum(one.size for one in tensors) - lookup + copied
    state = flops.decode_state_bytes(config, options.context, item) * (1 if config.mixer == "attention" else 2)
    return weights, options.batch * (state + 4 * 4 * config.vocab + config.width * item)


def token_time(config: ModelConfig, options: ServingArguments, device: Device) -> TokenTime:
    """Return the time of one step of decoding, with full caches."""
    rates, (weights, state) = RATES[device.platform, config.linear], bytes_read(config, options)
    operations = 2.0 * flops.parameters(config).N * options.batch
    peak = device.int8 if config.linear == "ternary" else device.bf16
    rate = rates.weights * (TRITS if options.layout == "trits" and config.linear == "ternary" else 1)
    reading = (weights / rate + state / rates.state) / device.bandwidth
    return TokenTime(reading, operations / (rates.operations * peak), config.depth * rates.layer_s)


def show(
    config: ModelConfig,
    options: ServingArguments,
    memory: ServingMemory,
    time: TokenTime,
    usable: float,
    console: Console,
) -> None:
    """Print tables, and the verdict as the last line."""
    console.print(
        f"{options.model}: {flops.parameters(config).total / 1e9:.3g}B parameters on one {options.device}, "
        f"{options.batch} x {options.context} tokens"
    )
    for title, unit, factor, parts in (("memory", "GB", 1e-9, memory), ("time of a step", "ms", 1e3, time)):
        table = Table(title, unit)
        for name, value in dataclasses.asdict(parts).items():
            table.add_row(name, f"{value * factor:.3f}")
        table.add_row("total", f"{parts.total * factor:.3f}", style="bold")
        console.print(table)
    console.print(f"{options.batch / time.total:,.0f} tokens/s")
    fits = memory.total <= usable
    console.print(
        f"{'fits' if fits else 'does not fit'}: {memory.total / 1e9:.2f} GB {'<=' if fits else '>'} "
        f"{usable / 1e9:.1f} GB usable"
    )
