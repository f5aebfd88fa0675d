"""Checks of the kernels that make codes: of activations, with norms and gates, and of gradients."""

import functools

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
    sample,
    sigmoid,
)
from mmfree_jax.ops.fast.kernels import kernel_module
from mmfree_jax.ops.fast.ternary import TINY, TOP, dither_phases
from mmfree_jax.ops.ternary import SMALLEST

LARGEST = 1 / 8  # relative error of a column's largest magnitude: its code may be off by one


def normed_codes(rng: np.random.Generator, use: Use) -> Problem:
    """The pass from activations to codes and its backward pass.

    sizes: rows, width. options: kind of the input, gains, products, type, bits of gradients, whether the gradient of a
    residual is added, whether the gradients to the sources come as codes.

    With 8 bits of gradients the normed inputs come as codes, and the gradients to them have their factors already.
    """
    kernel = kernel_module("normed_codes")
    (M, D), (kind, G, products, dtype, bits, has_residual, onward_codes) = use.sizes, use.options
    R, counts = sample(M)
    as_codes = bits == 8
    sources = [draw_rows(rng, dtype, R, D) for _ in range(1 if kind == "norm" else 2)]
    inner = None if kind == "swiglu" else as_float32(rng.uniform(0.5, 2, D))
    gains = [as_float32(rng.uniform(0.5, 2, D)) for _ in range(G)]
    dys = [draw_rows(rng, dtype, R, D) for _ in range(products)]
    factors = None if bits == 8 else as_float32(rng.uniform(0.01, 0.1, products))
    row_factors = as_float32(rng.uniform(0.5, 2, R)) if onward_codes else None
    residual = draw_rows(rng, dtype, R, D) if has_residual else None

    def run(sources, inner, gains, dys, factors, row_factors, residual):
        rows = functools.partial(repeated, rows=M)
        sources, dys = [rows(a) for a in sources], [rows(a) for a in dys]
        row_factors = None if row_factors is None else rows(row_factors)
        residual = None if residual is None else rows(residual)
        codes, scales = kernel.forward(kind, sources, inner, gains, EPS)
        found = kernel.backward(kind, sources, inner, gains, scales, dys, factors, EPS, as_codes, row_factors, residual)
        results = {f"codes {g}": a for g, a in enumerate(codes)} | {f"scales {g}": a for g, a in enumerate(scales)}
        results |= {f"gradient to gain {g}": a for g, a in enumerate(found.gains)}
        in_codes = [a if as_codes else a / scale[:, None] for a, scale in zip(found.inputs, scales, strict=True)]
        results |= {f"inputs {g} in codes": a for g, a in enumerate(in_codes)}
        if inner is not None:
            results["gradient to inner gain"] = found.norm_gain
        for i, d in enumerate(found.sources):
            parts = zip(("codes", "scales", "largest"), d, strict=True) if onward_codes else [("", d)]
            results |= {f"gradient to source {i} {part}".strip(): a for part, a in parts}
        return results

    expected = _normed_codes(kind, sources, inner, gains, dys, factors, row_factors, residual, counts, dtype)
    tolerance = {name: TOLERANCES[dtype] for name in expected if "codes" not in name}
    tolerance |= {name: LARGEST for name in expected if name.endswith("largest")}
    return Problem(run, (sources, inner, gains, dys, factors, row_factors, residual), expected, tolerance)


def _normed_codes(kind, sources, inner, gains, dys, factors, row_factors, residual, counts, dtype) -> dict:
    """`normed_codes.forward` and `.backward` by their definitions: `combine.combine`, a norm, absmax, and gradients
    straight through the quantiser."""
    inputs = [as_float64(a) for a in sources]
    rounded = lambda a: as_float64(a.astype(jnp.dtype(dtype)))
    mean = lambda a: a.mean(axis=1, keepdims=True)
    if kind == "swiglu":
        gate, up = inputs
        share = sigmoid(gate)
        x = rounded(gate * share * up)
    else:
        inner = as_float64(inner)
        first_rstd = 1 / np.sqrt(mean(inputs[0] ** 2) + EPS)
        first_normed = inputs[0] * first_rstd
        x = u = rounded(first_normed * inner)
        if kind == "gated":
            h, share = inputs[1], sigmoid(inputs[1])
            x = rounded(u * h * share)
    rstd = 1 / np.sqrt(mean(x**2) + EPS)
    normed = x * rstd

    results: dict[str, np.ndarray] = {}
    for g, gain in enumerate(gains):
        y = normed * as_float64(gain)
        scale = np.maximum(np.abs(y).max(axis=1, keepdims=True), SMALLEST) / TOP
        codes = np.rint(y / scale)
        results[f"codes {g}"], results[f"scales {g}"] = codes, scale[:, 0]
        results[f"inputs {g} in codes"] = codes

    dy = [as_float64(d) * (1 if factors is None else as_float64(factors[p])) for p, d in enumerate(dys)]
    dy = [sum(dy)] if len(gains) == 1 else dy
    for g in range(len(gains)):
        results[f"gradient to gain {g}"] = counts @ (dy[g] * normed)
    through = sum(d * as_float64(gain) for d, gain in zip(dy, gains, strict=True))
    dx = rstd * (through - normed * mean(normed * through))

    if kind == "swiglu":
        found = [dx * up * share * (1 + gate * (1 - share)), dx * gate * share]
    else:
        dnormed = dx if kind == "norm" else dx * h * share
        results["gradient to inner gain"] = counts @ (dnormed * first_normed)
        through = dnormed * inner
        found = [first_rstd * (through - first_normed * mean(first_normed * through))]
        if kind == "gated":
            found.append(dx * first_normed * inner * share * (1 + h * (1 - share)))
    if residual is not None:
        found[0] = found[0] + as_float64(residual)
    for i, d in enumerate(found):
        name = f"gradient to source {i}"
        if row_factors is None:
            results[name] = d
            continue
        scale = np.maximum(np.abs(d).max(axis=1, keepdims=True), TINY) / TOP
        codes = np.rint(d / scale)
        results[f"{name} codes"], results[f"{name} scales"] = codes, scale[:, 0]
        results[f"{name} largest"] = np.abs(codes * scale * as_float64(row_factors)[:, None]).max(axis=0)
    return results


def row_codes(rng: np.random.Generator, use: Use) -> Problem:
    """The codes of gradients, row by row. sizes: rows, width. options: type, whether rows have factors."""
    from mmfree_jax.ops.fast.hopper import normed_codes as kernel

    (M, D), (dtype, factored) = use.sizes, use.options
    R, _ = sample(M)
    x, row_factors = draw_rows(rng, dtype, R, D), as_float32(rng.uniform(0.5, 2, R)) if factored else None
    x[rng.integers(R)] = 0

    def run(x, row_factors):
        found = kernel.codes(repeated(x, M), None if row_factors is None else repeated(row_factors, M))
        return {"codes": found.codes, "scales": found.scales, "largest": found.largest}

    exact = as_float64(x)
    scale = np.maximum(np.abs(exact).max(axis=1, keepdims=True), TINY) / TOP
    expected = {"codes": np.rint(exact / scale), "scales": scale[:, 0]}
    if row_factors is not None:
        expected["largest"] = np.abs(expected["codes"] * scale * as_float64(row_factors)[:, None]).max(axis=0)
    tolerance = {"scales": TOLERANCES["float32"], "largest": LARGEST}
    return Problem(run, (x, row_factors), expected, tolerance)


def transposed_codes(rng: np.random.Generator, use: Use) -> Problem:
    """Transposed codes. sizes: rows, columns. options: whether rows and columns are rescaled as well.

    Rescaled codes are rounded with a different dither at each place, so rows cannot repeat: at most ROWS of all rows
    are expected, the first and the last among them.
    """
    from mmfree_jax.ops.fast.hopper.transposed_codes import transpose as kernel

    (M, D), (scaled,) = use.sizes, use.options
    R, _ = sample(M)
    codes = rng.integers(-TOP, TOP + 1, (R, D), dtype=np.int8)
    if not scaled:
        plain = lambda codes: {"codes": kernel(repeated(codes, M)).T}
        return Problem(plain, (codes,), {"codes": codes}, {"codes": 2.0**-20})
    row_factors = as_float32(rng.uniform(0.1, 1, R))
    scale = as_float32(np.abs(codes * as_float64(row_factors)[:, None]).max(axis=0) / TOP * rng.uniform(1, 3, D))
    picked = np.unique(np.r_[0, M - 1, rng.choice(M, min(M, ROWS - 2), replace=False)])
    run = lambda codes, row_factors, scale: {"codes": kernel(repeated(codes, M), repeated(row_factors, M), scale).T}
    values = as_float64(codes) * as_float64(row_factors)[:, None] / as_float64(scale)
    phase_M, phase_D = (np.asarray(a) for a in dither_phases(M, D))
    fraction = ((phase_M[picked, None] + phase_D) & 0x7FFFFF) / 2.0**23
    expected = np.rint(np.clip(values[picked % R] + fraction - 0.5, -TOP, TOP))
    return Problem(run, (codes, row_factors, scale), {"codes": expected}, {}, lambda found: found[picked])
