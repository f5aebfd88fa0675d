"""What the kernels would cost with automatic barriers, and what the integer operation of their rounding costs.

    python -m experiments.kernel_barriers                     # on a Hopper GPU; two minutes

Prints microseconds of each kernel at the sizes of a 1.3B model with 8 x 2048 tokens; the table is in docs/kernels.md.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.bench.timing import repeat, time_calls
from mmfree_jax.ops.fast.hopper import normed_codes, recurrence, transposed_codes
from mmfree_jax.ops.fast.hopper.mosaic import STREAMING
from mmfree_jax.ops.fast.ternary import nearest_integer, round_with_dither

ROWS, WIDTH, GLU_WIDTH, TIMES = 16384, 2048, 5632, 8
EPS = 1e-6
AUTOMATIC = functools.partial(plgpu.CompilerParams, lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True)

Case = tuple[str, Callable, tuple[jax.Array, ...]]


def cases() -> Iterator[Case]:
    """Name, function and arguments of each kernel."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    x, dx, gate, up, du = (normal(ROWS, width) for width in (WIDTH, WIDTH, *[GLU_WIDTH] * 3))
    gain, wide_gain, scale, by = (jnp.ones(size) for size in (WIDTH, GLU_WIDTH, ROWS, ROWS))
    codes = jnp.asarray(rng.integers(-127, 128, (ROWS, GLU_WIDTH)), jnp.int8)
    c, f, out, dout = (normal(8, ROWS // 8, WIDTH) for _ in range(4))
    floor, start, keep, one = jnp.full(WIDTH, 0.1), jnp.zeros((8, WIDTH)), jnp.ones((8, ROWS // 8)), jnp.ones(1)
    forward, backward = normed_codes.forward, normed_codes.backward

    yield "norm to codes", lambda x: forward("norm", [x], gain, [gain], EPS), (x,)
    yield "gated unit to codes", lambda a, b: forward("swiglu", [a, b], None, [wide_gain], EPS), (gate, up)
    norm = lambda x, d: backward("norm", [x], gain, [gain], [scale], [d], one, EPS, False, None, d)
    yield "norm, backward", norm, (x, dx)
    unit = lambda a, b, d: backward("swiglu", [a, b], None, [wide_gain], [scale], [d], one, EPS)
    yield "gated unit, backward", unit, (gate, up, du)
    to_codes = lambda a, b, d: backward("swiglu", [a, b], None, [wide_gain], [scale], [d], None, EPS, True, by)
    yield "gated unit, backward to codes", to_codes, (gate, up, du)
    yield "rows to codes", lambda x: normed_codes.codes(x, by), (x,)
    yield "transposed", transposed_codes.transpose, (codes,)
    yield "transposed to one scale a column", lambda q: transposed_codes.transpose(q, by, wide_gain), (codes,)
    yield "recurrence, forward", lambda c, f: recurrence.forward(c, f, floor, start, keep), (c, f)
    walk_back = lambda c, f, out, dout: recurrence.backward(c, f, floor, start, keep, out, dout, start)
    yield "recurrence, backward", walk_back, (c, f, out, dout)
    yield "recurrence, first walk over segments", lambda c, f: recurrence.segment_ends(c, f, floor, keep), (c, f)


def lowest_byte(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`ternary.nearest_integer` without the integer operation: what ptxas 13.0 gets wrong."""
    shift = 1.5 * 2**23
    shifted = x + shift
    return shifted - shift, lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)


def dithered_lowest_byte(values: jax.Array, phases: jax.Array) -> jax.Array:
    """`ternary.round_with_dither` by `lowest_byte`."""
    fraction = lax.bitcast_convert_type((phases & 0x7FFFFF) | 0x3F800000, jnp.float32)
    return lowest_byte(jnp.clip(values + (fraction - 1.5), -127, 127))[1]


def set_variant(streaming: Any, nearest: Callable, dither: Callable) -> None:
    """Give the kernels other compiler settings and another rounding."""
    for module in (normed_codes, recurrence, transposed_codes):
        vars(module)["STREAMING"] = streaming
    vars(normed_codes)["nearest_integer"], vars(transposed_codes)["round_with_dither"] = nearest, dither
    jax.clear_caches()


VARIANTS: dict[str, tuple[Any, Callable, Callable]] = {
    "now": (STREAMING, nearest_integer, round_with_dither),
    "without the integer operation": (STREAMING, lowest_byte, dithered_lowest_byte),
    "with automatic barriers": (AUTOMATIC, nearest_integer, round_with_dither),
}


def main() -> None:
    """Print a row for each kernel."""
    found: dict[str, list[float]] = {}
    for variant in VARIANTS.values():
        set_variant(*variant)
        for name, kernel, arguments in cases():
            program = jax.jit(repeat(kernel, TIMES)).lower(*arguments).compile()
            call = functools.partial(program, *arguments)
            found.setdefault(name, []).append(time_calls(call).median_s / TIMES * 1e6)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, microseconds: {', '.join(VARIANTS)}")
    for name, row in found.items():
        print(f"{name:40s}" + "".join(f"{figure:8.1f}" for figure in row))


if __name__ == "__main__":
    main()
