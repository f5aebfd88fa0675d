"""What a run that needs more memory than its device has should change: what dominates, and settings that need less."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax

from mmfree_jax import flops
from mmfree_jax.config import RunConfig
from mmfree_jax.devices import DEVICES
from mmfree_jax.lowering.memory import Memory, memory, policies
from mmfree_jax.lowering.program import Report

# GPUs and TPUs, XLA on CPU, NumPy: each says it in its own words.
MEMORY_IS_FULL = re.compile("RESOURCE_EXHAUSTED|out of memory|^MemoryError", re.IGNORECASE)
DISK_IS_FULL = re.compile("No space left on device|Disk quota exceeded")  # TensorStore calls it RESOURCE_EXHAUSTED too
SETTINGS = 3  # that are proposed


class OutOfMemory(RuntimeError):
    """The device has less memory than the run needs. The message says what dominates, and what would need less."""


@contextlib.contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turn the error of a device without memory, in whatever words, into OutOfMemory."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if not MEMORY_IS_FULL.search(said) or DISK_IS_FULL.search(said):
            raise
        raise OutOfMemory(f"{config.name}: out of memory; {advice(config)} ({said.splitlines()[0][:120]})") from error


def advice(config: RunConfig) -> str:
    """Return which part of a step needs most memory, and three settings that fit, or that need least.

    All numbers are predictions for one device (`lowering.memory`), in GB.
    """
    needed = _parts(config)
    name, most = max(dataclasses.asdict(needed).items(), key=lambda part: part[1])
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    offers = sorted(((_parts(one).total, flags) for flags, one in _changes(config)), key=lambda offer: offer[0])
    offers = [offer for offer in offers if offer[0] < needed.total]
    fitting = [offer for offer in offers if limit and offer[0] <= limit]
    # Of those that fit, the ones that change least: they need most.
    chosen = (fitting[::-1] or offers)[:SETTINGS]
    listed = (
        ", ".join(f"{flags} ({total / 1e9:.3g} GB)" for total, flags in chosen) or "a smaller model or more devices"
    )
    kind = "fit" if fitting else "need less"
    return f"{name} are {most / 1e9:.3g} of {needed.total / 1e9:.3g} GB that a step needs; these {kind}: {listed}"


def _parts(config: RunConfig) -> Memory:
    kind = jax.devices()[0].device_kind.lower()
    device = next((device for name, device in DEVICES.items() if name in kind), DEVICES["a100"])
    shards = config.mesh.fsdp * config.mesh.tensor
    weights = 4.0 * flops.parameters(config.model).total / shards
    return memory(config, Report(weights, 2 * weights, sharded=1.0, traffic=(), rematerialised=0), device)


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Changes that leave the results as they are, and a smaller batch, which does not."""
    for more in with_more_accumulation(config):
        yield f"--optim.accumulate {more.optim.accumulate}", more
        if config.remat != "full":
            full = dataclasses.replace(more, remat="full")
            yield f"--optim.accumulate {more.optim.accumulate} --remat full", full
    for remat in policies(config):
        yield f"--remat {remat}", dataclasses.replace(config, remat=remat)
    half = config.data.batch // 2
    if half and half % (config.mesh.batch_shards * config.optim.accumulate) == 0:
        yield f"--data.batch {half}", dataclasses.replace(config, data=dataclasses.replace(config.data, batch=half))


def with_more_accumulation(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the run with two, four, eight … times as many micro-batches of the same batch, as far as it divides."""
    rows, steps = config.data.batch // config.mesh.batch_shards, 2 * config.optim.accumulate
    while steps <= rows and rows % steps == 0:
        yield dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=steps))
        steps *= 2
