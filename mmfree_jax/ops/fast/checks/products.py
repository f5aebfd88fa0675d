"""Checks of the kernels that multiply: codes with codes, and a few rows with packed or dense weights."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.checks.problem import (
    EPS,
    ROWS,
    TOLERANCES,
    Problem,
    Use,
    as_float32,
    as_float64,
    draw_rows,
    repeated,
    sigmoid,
)
from mmfree_jax.ops.fast.ternary import TOP
from mmfree_jax.ops.packed import aligned, pack, pack_planes
from mmfree_jax.ops.ternary import SMALLEST


def int8_matmul(rng: np.random.Generator, use: Use) -> Problem:
    """The product of int8 codes. sizes: rows, inner, columns. options: whether each column has its own scale."""
    from mmfree_jax.ops.fast.hopper.int8_matmul import int8_matmul as kernel

    (M, K, N), (per_column,) = use.sizes, use.options
    rows, columns = min(M, ROWS), min(N, ROWS)
    x = rng.integers(-TOP - 1, TOP + 1, (rows, K), dtype=np.int8)
    w = rng.integers(-TOP if per_column else -1, TOP + 1 if per_column else 2, (columns, K), dtype=np.int8)
    x_scale = as_float32(rng.uniform(0.5, 2, rows))
    w_scale = as_float32(rng.uniform(0.5, 2, columns if per_column else 1))

    def run(x, w, x_scale, w_scale):
        by_column = repeated(w_scale, N) if per_column else w_scale
        return {"product": kernel(repeated(x, M), repeated(w, N), repeated(x_scale, M), by_column)}

    product = as_float64(x) @ as_float64(w).T * as_float64(x_scale)[:, None] * as_float64(w_scale)
    return Problem(run, (x, w, x_scale, w_scale), {"product": product}, {"product": 2.0**-8})


class _FewRows(NamedTuple):
    """What kernels for a few rows read, and in float64 the input that it makes and the sum that is written."""

    sources: list[np.ndarray]
    gain: np.ndarray | None  # of the norm in it
    addend: np.ndarray | None
    factor: float
    exact: np.ndarray
    sums: dict[str, np.ndarray]  # empty without an addend


def _few_rows(rng: np.random.Generator, kind: str, dtype: str, rows: int, width: int, added: bool) -> _FewRows:
    sources = [draw_rows(rng, dtype, rows, width) for _ in range(2 if kind in ("gated", "swiglu") else 1)]
    gain = as_float32(rng.uniform(0.5, 2, width)) if kind in ("norm", "gated") else None
    addend, factor = (draw_rows(rng, dtype, rows, width), 0.5) if added else (None, 1.0)
    x, *others = map(as_float64, sources)
    if addend is not None:
        x = as_float64(np.asarray(x + factor * as_float64(addend)).astype(jnp.dtype(dtype)))
    u = x if gain is None else _normed(x) * as_float64(gain)
    if kind == "swiglu":
        u = u * sigmoid(u) * others[0]
    elif kind == "gated":
        u = u * others[0] * sigmoid(others[0])
    return _FewRows(sources, gain, addend, factor, u, {"sum": x} if added else {})


def _normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS)


def normed_product(rng: np.random.Generator, use: Use) -> Problem:
    """A BitLinear of packed weights and a few rows.

    sizes: rows, width, columns. options: kind of the input, products, gains, type, whether each column has its own
    scale, whether the first source is a sum, layout of the weights. The outputs are compared in codes: their unit is
    that of a code of the row times the scale of the weights.
    """
    from mmfree_jax.ops.fast.hopper.packed_product import normed_product as kernel

    (M, K, N), (kind, G, count, dtype, per_column, added, layout) = use.sizes, use.options
    rows = _few_rows(rng, kind, dtype, M, K, added)
    gain = as_float32(rng.uniform(0.5, 2, (count, K))) if count else None
    codes = rng.integers(-1, 2, (G, N, K), dtype=np.int8)
    scales = [as_float32(rng.uniform(0.5, 2, N if per_column else 1)) for _ in range(G)]

    def run(sources, inner, gain, weights, scales, addend, units):
        ys, total = kernel(kind, sources, inner, gain, weights, scales, EPS, addend, rows.factor, layout)
        found = {f"product {g} in codes": ys[g].astype(jnp.float32) / units[g] for g in range(G)}
        return found if total is None else found | {"sum": total}

    expected, units = dict(rows.sums), []
    for g in range(G):
        z = _normed(rows.exact) * as_float64(gain[g % count]) if gain is not None else rows.exact
        step = np.maximum(np.abs(z).max(axis=1, keepdims=True), SMALLEST) / TOP
        units.append(as_float32(step * as_float64(scales[g])))
        expected[f"product {g} in codes"] = np.rint(z / step) @ as_float64(codes[g]).T
    # Some codes fall the other way, each of which moves a product by one; results are rounded to their type.
    rounding = {"float32": 2.0**-20, "bfloat16": 2.0**-8}[dtype]
    tolerance = {name: rounding + 4 / np.sqrt(np.mean(values**2) + 1) for name, values in expected.items()}
    tolerance |= {"sum": TOLERANCES[dtype]} if added else {}
    weights = [aligned(pack(c, layout)) for c in codes]
    return Problem(run, (rows.sources, rows.gain, gain, weights, scales, rows.addend, units), expected, tolerance)


def dense_product(rng: np.random.Generator, use: Use) -> Problem:
    """Dense layers of a few rows. sizes: rows, width, columns. options: kind of the input, products, type, type of the
    weights, whether the first source is a sum."""
    from mmfree_jax.ops.fast.hopper.dense_product import dense_product as kernel

    (M, K, N), (kind, G, dtype, stored, added) = use.sizes, use.options
    rows = _few_rows(rng, kind, dtype, M, K, added)
    weights = list(rng.standard_normal((G, N, K), np.float32).astype(jnp.dtype(stored)))

    def run(sources, inner, weights, addend):
        ys, total = kernel(kind, sources, inner, weights, EPS, addend, rows.factor)
        found = {f"product {g}": y for g, y in enumerate(ys)}
        return found if total is None else found | {"sum": total}

    expected = rows.sums | {f"product {g}": rows.exact @ as_float64(weights[g]).T for g in range(G)}
    tolerance = dict.fromkeys(expected, TOLERANCES[dtype])
    return Problem(run, (rows.sources, rows.gain, weights, rows.addend), expected, tolerance)


def codes_product(rng: np.random.Generator, use: Use) -> Problem:
    """The product of codes with packed weights. sizes: rows, width, columns. options: whether each column has its own
    scale."""
    from mmfree_jax.ops.fast.hopper.packed_product import codes_product as kernel

    (M, K, N), (per_column,) = use.sizes, use.options
    x = rng.integers(-TOP - 1, TOP + 1, (M, K), dtype=np.int8)
    w = rng.integers(-1, 2, (N, K), dtype=np.int8)
    by_row, by_column = as_float32(rng.uniform(0.5, 2, M)), as_float32(rng.uniform(0.5, 2, N if per_column else 1))
    run = lambda x, by_row, w, by_column: {"product": kernel(x, by_row, w, by_column, jnp.float32)}
    expected = as_float64(x) @ as_float64(w).T * as_float64(by_row)[:, None] * as_float64(by_column)
    return Problem(run, (x, by_row, pack_planes(w), by_column), {"product": expected}, {"product": 2.0**-20})
