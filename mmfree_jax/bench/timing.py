"""Times and memory of compiled functions."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = 5
ROUND_S = {"cpu": 0.1, "gpu": 0.05, "tpu": 0.05}  # calls are repeated for at least this long in a round
PROGRAM_S = 2e-3  # a program that repeats an operation should run this long: the 10 us between programs are then 0.5%
MOST, RESULT_BYTES = 16, 4e9  # applications in such a program, and what all their results may take


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


def repetitions(least_s: float, result_bytes: int) -> int:
    """How often a program should repeat an operation of at least `least_s` whose results take `result_bytes`.

    Once on a CPU: there is no gap to hide, and its compiler ignores the barriers of `repeat`.
    """
    if jax.default_backend() == "cpu":
        return 1
    wanted = math.ceil(PROGRAM_S / max(least_s, PROGRAM_S / MOST))
    return max(1, min(wanted, int(RESULT_BYTES / max(result_bytes, 1))))


def repeat(function: Callable, times: int) -> Callable:
    """A function of the same arguments that applies `function` that often, one after the other; returns all results.

    Each application waits for the one before: a barrier joins its arguments to those results. Both have to be used
    after the barrier, arguments by the application and results by the caller: the compiler takes out what is not, and
    would find that all applications compute the same. It may still share what needs no argument, such as zeros.
    """
    once = jax.jit(function)  # traced and lowered once, however often it is applied

    def program(*arguments):
        results = []
        for _ in range(times - 1):
            arguments, result = jax.lax.optimization_barrier((arguments, once(*arguments)))
            results.append(result)
        return [*results, once(*arguments)]

    return program


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
