"""Times and memory of compiled functions."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = 5
ROUND_S = {"cpu": 0.1, "gpu": 0.05, "tpu": 0.05}  # calls are repeated for at least this long in a round


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of ROUNDS rounds, their least and their most."""

    median_s: float
    least_s: float
    most_s: float


def time_calls(call: Callable[[], Any]) -> Timing:
    """Time a function of no arguments that returns JAX arrays; it must be compiled already.

    Calls follow each other without waiting, so that an accelerator's queue never runs empty.
    """
    began = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - began
    calls = max(1, round(ROUND_S.get(jax.default_backend(), 0.05) / once))

    def one_round() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / calls

    rounds = [one_round() for _ in range(ROUNDS)]
    return Timing(statistics.median(rounds), min(rounds), max(rounds))


def memory_bytes(compiled: Any) -> dict[str, int]:
    """Bytes on the first device that a compiled function asks for: temporaries, and all of it at once."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"temporary": found.temp_size_in_bytes, "total": held + found.temp_size_in_bytes}


def ceilings() -> dict[str, float]:
    """What this device reaches at best: bytes a second read and written by a copy, FLOP/s of a bfloat16 product."""
    side, count = (1024, 2**24) if jax.default_backend() == "cpu" else (8192, 2**29)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    x = jnp.ones(count, jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    jax.block_until_ready((product(a, a), copy(x)))
    return {
        "copy_bytes_per_s": 2 * x.nbytes / time_calls(lambda: copy(x)).median_s,
        "bf16_flops": 2 * side**3 / time_calls(lambda: product(a, a)).median_s,
    }
