"""Checks of the kernels against NumPy in float64, on the device that they are to serve on."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.kernels import kernel_module
from mmfree_jax.ops.fast.ternary import TINY, TOP, dither_phases
from mmfree_jax.ops.packed import aligned, pack, pack_planes
from mmfree_jax.ops.ternary import SMALLEST

# A check runs one kernel, forward and backward, at the shapes and in the type of one use. The reference is computed for
# at most ROWS distinct rows. The kernel gets these rows repeated until the use's number of rows is reached, so every
# row that it writes is compared; sums over rows are compared with weighted sums. ROWS is prime, so that repetitions do
# not line up with tiles.

ROWS = 509
EPS = 1e-6  # of the norms
# See `_deviation`. On an H200 the largest deviations were 3.5e-3 and 5e-6 (exp and 1/x are approximate).
TOLERANCES = {"bfloat16": 2.0**-6, "float32": 2.0**-14}
MOST_OFF, MEAN_OFF = 1.5, 1 / 8  # largest and mean error of codes; rounding to bfloat16 first costs half a code
LARGEST = 1 / 8  # relative error of a column's largest magnitude: its code may be off by one


class Use(NamedTuple):
    """One kernel at the shape, type and options that a program wants it for. Sizes are those of one device's part."""

    kernel: str  # a key of CHECKS
    sizes: tuple[int, ...]
    options: tuple[Any, ...] = ()  # strings, integers and booleans

    def __str__(self) -> str:
        return " ".join([self.kernel, "x".join(map(str, self.sizes)), *map(str, self.options)])


class Outcome(NamedTuple):
    """What a check found."""

    deviations: dict[str, float]  # of each result the largest, as a multiple of its tolerance
    error: str = ""  # what went wrong, where the check could not be finished

    @property
    def passed(self) -> bool:
        """Whether every result is within its tolerance. NaN is not."""
        return not self.error and all(deviation <= 1 for deviation in self.deviations.values())

    @property
    def worst(self) -> str:
        """The error, or the result that deviates most, in words."""
        if self.error:
            return self.error
        name, deviation = max(self.deviations.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
        return f"{name} deviates by {deviation:.3g} times the tolerance"


class Problem(NamedTuple):
    """A check's inputs and expected results.

    run: from `arrays` to results by name; it is compiled. expected: the results in float64. tolerance: of each result
    that is not codes. select: from a result to the part of it that is expected.
    """

    run: Callable[..., dict[str, jax.Array]]
    arrays: tuple[Any, ...]
    expected: dict[str, np.ndarray]
    tolerance: dict[str, float]
    select: Callable[[jax.Array], jax.Array] = lambda result: result


def check(use: Use, device: Any = None) -> Outcome:
    """Run the check of a use on a device (default: the first local one). Seconds, nearly all of them compilation."""
    problem = CHECKS[use.kernel](np.random.default_rng(zlib.crc32(str(use).encode())), use)
    names = sorted(problem.expected)

    @jax.jit
    def deviations(arrays, expected):
        found = problem.run(*arrays)
        return [_deviation(problem.select(found[name]), expected[name], problem.tolerance.get(name)) for name in names]

    device = device or jax.local_devices()[0]
    expected = {name: _single(values) for name, values in problem.expected.items()}
    arrays, expected = jax.device_put((problem.arrays, expected), device)
    return Outcome(dict(zip(names, map(float, deviations(arrays, expected)), strict=True)))


# The allowance of an element is relative to itself and to its row: results near zero are differences of terms as large
# as the row's others, and carry their rounding. A tolerance per array would hide a wrong row among larger ones, since
# rows differ by a factor of up to a thousand on purpose (`_draw`).
def _deviation(found: jax.Array, expected: jax.Array, tolerance: float | None) -> jax.Array:
    """The largest of |found - expected| over its allowance: `tolerance` times the expected value's magnitude plus the
    root mean square of its row. Rows and columns of `found` repeat those expected.

    `tolerance` is None for codes: a few may differ by one, where rounding fell the other way.
    """
    index = [jnp.arange(size) % limit for size, limit in zip(found.shape, expected.shape, strict=True)]
    expected = expected[jnp.ix_(*index)]
    off = jnp.abs(found.astype(jnp.float32) - expected)
    off = jnp.where(jnp.isnan(off), jnp.inf, off)  # compilers may leave NaN out of a maximum
    if tolerance is None:
        return jnp.maximum(jnp.max(off) / MOST_OFF, jnp.mean(off) / MEAN_OFF)
    typical = jnp.sqrt(jnp.mean(expected**2, axis=-1, keepdims=True))
    return jnp.max(off / (tolerance * (jnp.abs(expected) + typical + TINY)))


def _repeated(a: jax.Array, rows: int) -> jax.Array:
    """The rows of `a`, repeated in order until there are `rows`."""
    return a[jnp.arange(rows) % a.shape[0]]


def _sample(rows: int) -> tuple[int, np.ndarray]:
    """The number of distinct rows, and how often each of them occurs."""
    distinct = min(rows, ROWS)
    return distinct, np.bincount(np.arange(rows) % distinct).astype(np.float64)


def _draw(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Normal values of this type; the scale of a row varies by up to a factor of a thousand."""
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-1.5, 1.5, (*shape[:-1], 1))
    return values.astype(jnp.dtype(dtype))


def _exact(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)


def _single(a: Any) -> np.ndarray:
    return np.asarray(a, np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def normed_codes(rng: np.random.Generator, use: Use) -> Problem:
    """The pass from activations to codes and its backward pass.

    sizes: rows, width. options: kind of the input, gains, products, type, bits of gradients, whether the gradient of a
    residual is added, whether the gradients to the sources come as codes.

    With 8 bits of gradients the normed inputs come as codes, and the gradients to them have their factors already.
    """
    kernel = kernel_module("normed_codes")
    (M, D), (kind, G, products, dtype, bits, has_residual, onward_codes) = use.sizes, use.options
    R, counts = _sample(M)
    as_codes = bits == 8
    sources = [_draw(rng, dtype, R, D) for _ in range(1 if kind == "norm" else 2)]
    inner = None if kind == "swiglu" else _single(rng.uniform(0.5, 2, D))
    gains = [_single(rng.uniform(0.5, 2, D)) for _ in range(G)]
    dys = [_draw(rng, dtype, R, D) for _ in range(products)]
    factors = None if bits == 8 else _single(rng.uniform(0.01, 0.1, products))
    row_factors = _single(rng.uniform(0.5, 2, R)) if onward_codes else None
    residual = _draw(rng, dtype, R, D) if has_residual else None

    def run(sources, inner, gains, dys, factors, row_factors, residual):
        rows = functools.partial(_repeated, rows=M)
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
    exact = [_exact(a) for a in sources]
    rounded = lambda a: _exact(a.astype(jnp.dtype(dtype)))
    mean = lambda a: a.mean(axis=1, keepdims=True)
    if kind == "swiglu":
        gate, up = exact
        share = _sigmoid(gate)
        x = rounded(gate * share * up)
    else:
        inner = _exact(inner)
        first_rstd = 1 / np.sqrt(mean(exact[0] ** 2) + EPS)
        first_normed = exact[0] * first_rstd
        x = u = rounded(first_normed * inner)
        if kind == "gated":
            h, share = exact[1], _sigmoid(exact[1])
            x = rounded(u * h * share)
    rstd = 1 / np.sqrt(mean(x**2) + EPS)
    normed = x * rstd

    results: dict[str, np.ndarray] = {}
    for g, gain in enumerate(gains):
        y = normed * _exact(gain)
        scale = np.maximum(np.abs(y).max(axis=1, keepdims=True), SMALLEST) / TOP
        codes = np.rint(y / scale)
        results[f"codes {g}"], results[f"scales {g}"] = codes, scale[:, 0]
        results[f"inputs {g} in codes"] = codes

    dy = [_exact(d) * (1 if factors is None else _exact(factors[p])) for p, d in enumerate(dys)]
    dy = [sum(dy)] if len(gains) == 1 else dy
    for g in range(len(gains)):
        results[f"gradient to gain {g}"] = counts @ (dy[g] * normed)
    through = sum(d * _exact(gain) for d, gain in zip(dy, gains, strict=True))
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
        found[0] = found[0] + _exact(residual)
    for i, d in enumerate(found):
        name = f"gradient to source {i}"
        if row_factors is None:
            results[name] = d
            continue
        scale = np.maximum(np.abs(d).max(axis=1, keepdims=True), TINY) / TOP
        codes = np.rint(d / scale)
        results[f"{name} codes"], results[f"{name} scales"] = codes, scale[:, 0]
        results[f"{name} largest"] = np.abs(codes * scale * _exact(row_factors)[:, None]).max(axis=0)
    return results


def row_codes(rng: np.random.Generator, use: Use) -> Problem:
    """The codes of gradients, row by row. sizes: rows, width. options: type, whether rows have factors."""
    from mmfree_jax.ops.fast.hopper import normed_codes as kernel

    (M, D), (dtype, factored) = use.sizes, use.options
    R, _ = _sample(M)
    x, row_factors = _draw(rng, dtype, R, D), _single(rng.uniform(0.5, 2, R)) if factored else None
    x[rng.integers(R)] = 0

    def run(x, row_factors):
        found = kernel.codes(_repeated(x, M), None if row_factors is None else _repeated(row_factors, M))
        return {"codes": found.codes, "scales": found.scales, "largest": found.largest}

    exact = _exact(x)
    scale = np.maximum(np.abs(exact).max(axis=1, keepdims=True), TINY) / TOP
    expected = {"codes": np.rint(exact / scale), "scales": scale[:, 0]}
    if row_factors is not None:
        expected["largest"] = np.abs(expected["codes"] * scale * _exact(row_factors)[:, None]).max(axis=0)
    tolerance = {"scales": TOLERANCES["float32"], "largest": LARGEST}
    return Problem(run, (x, row_factors), expected, tolerance)


def int8_matmul(rng: np.random.Generator, use: Use) -> Problem:
    """The product of int8 codes. sizes: rows, inner, columns. options: whether each column has its own scale."""
    from mmfree_jax.ops.fast.hopper.int8_matmul import int8_matmul as kernel

    (M, K, N), (per_column,) = use.sizes, use.options
    rows, columns = min(M, ROWS), min(N, ROWS)
    x = rng.integers(-TOP - 1, TOP + 1, (rows, K), dtype=np.int8)
    w = rng.integers(-TOP if per_column else -1, TOP + 1 if per_column else 2, (columns, K), dtype=np.int8)
    x_scale = _single(rng.uniform(0.5, 2, rows))
    w_scale = _single(rng.uniform(0.5, 2, columns if per_column else 1))

    def run(x, w, x_scale, w_scale):
        by_column = _repeated(w_scale, N) if per_column else w_scale
        return {"product": kernel(_repeated(x, M), _repeated(w, N), _repeated(x_scale, M), by_column)}

    product = _exact(x) @ _exact(w).T * _exact(x_scale)[:, None] * _exact(w_scale)
    return Problem(run, (x, w, x_scale, w_scale), {"product": product}, {"product": 2.0**-8})


def transposed_codes(rng: np.random.Generator, use: Use) -> Problem:
    """Transposed codes. sizes: rows, columns. options: whether rows and columns are rescaled as well.

    Rescaled codes are rounded with a different dither at each place, so rows cannot repeat: at most ROWS of all rows
    are expected, the first and the last among them.
    """
    from mmfree_jax.ops.fast.hopper.transposed_codes import transpose as kernel

    (M, D), (scaled,) = use.sizes, use.options
    R, _ = _sample(M)
    codes = rng.integers(-TOP, TOP + 1, (R, D), dtype=np.int8)
    if not scaled:
        plain = lambda codes: {"codes": kernel(_repeated(codes, M)).T}
        return Problem(plain, (codes,), {"codes": codes}, {"codes": 2.0**-20})
    row_factors = _single(rng.uniform(0.1, 1, R))
    scale = _single(np.abs(codes * _exact(row_factors)[:, None]).max(axis=0) / TOP * rng.uniform(1, 3, D))
    picked = np.unique(np.r_[0, M - 1, rng.choice(M, min(M, ROWS - 2), replace=False)])
    run = lambda codes, row_factors, scale: {"codes": kernel(_repeated(codes, M), _repeated(row_factors, M), scale).T}
    values = _exact(codes) * _exact(row_factors)[:, None] / _exact(scale)
    phase_M, phase_D = (np.asarray(a) for a in dither_phases(M, D))
    fraction = ((phase_M[picked, None] + phase_D) & 0x7FFFFF) / 2.0**23
    expected = np.rint(np.clip(values[picked % R] + fraction - 0.5, -TOP, TOP))
    return Problem(run, (codes, row_factors, scale), {"codes": expected}, {}, lambda found: found[picked])


def recurrence(rng: np.random.Generator, use: Use) -> Problem:
    """The recurrence and its backward pass.

    sizes: sequences, steps, channels. options: type, whether the MLGRU's gates are fused in, whether these steps are
    one device's chunk of longer sequences (then what a chunk does to a state is checked too).
    """
    from mmfree_jax.ops.fast.fused_recurrence import fused_recurrence

    kernel = kernel_module("recurrence")
    (B, T, D), (dtype, gated, chunk) = use.sizes, use.options
    R, counts = min(B, 2), np.bincount(np.arange(B) % min(B, 2)).astype(np.float64)
    draw = lambda *shape: _exact(rng.standard_normal(shape))
    c, dout = (draw(R, T, D).astype(jnp.dtype(dtype)) for _ in range(2))
    f = (draw(R, T, D) if gated else _exact(rng.uniform(0, 1, (R, T, D)))).astype(jnp.dtype(dtype))
    floor = _single(rng.uniform(0, 0.9, D)) if gated else None
    h, dlast = (_single(draw(R, D)) for _ in range(2))
    resets = rng.uniform(size=(R, T)) < 1 / 64

    def run(c, f, floor, h, resets, dout, dlast):
        rows = functools.partial(_repeated, rows=B)
        forward = lambda c, f, floor, h: fused_recurrence(c, f, floor, h, rows(resets))
        (out, last), pull = jax.vjp(forward, rows(c), rows(f), floor, rows(h))
        dc, df, dfloor, dh = pull((rows(dout), rows(dlast)))
        found = {"states": out, "last state": last, "gradient to c": dc, "gradient to f": df, "gradient to h": dh}
        if chunk:
            keep = 1 - rows(resets).astype(jnp.float32)
            found["decay"], found["end"] = kernel.segment_ends(rows(c), rows(f), floor, keep)
            found["start"] = kernel.segment_starts(rows(f), floor, keep, rows(dout))
        return found | ({"gradient to floor": dfloor} if gated else {})

    expected = _recurrence(c, f, floor, h, resets, dout, dlast, counts)
    if chunk:
        alone = _recurrence(c, f, floor, 0 * h, resets, dout, 0 * dlast, counts)
        expected |= {"end": alone["last state"], "start": alone["gradient to h"], "decay": alone["decay"]}
    else:
        del expected["decay"]
    tolerance = dict.fromkeys(expected, TOLERANCES[dtype])
    # The gradient to f is dF (1 - floor) sigmoid'(f) with dF = g (h_{t-1} - silu(c)).
    # Its factor h - silu(c) may be small beside h, which is kept in the type of the states.
    tolerance["gradient to f"] *= 4
    return Problem(run, (c, f, floor, h, resets, dout, dlast), expected, tolerance)


def _recurrence(c, f, floor, h, resets, dout, dlast, counts) -> dict[str, np.ndarray]:
    """h_t = keep F h + (1 - F) silu(c), F = floor + (1 - floor) sigmoid(f); without a floor h_t = keep f h + c. One
    step after the other, forward and then backward."""
    c, f, h, dout, g = (np.asarray(a, np.float64) for a in (c, f, h, dout, dlast))
    keep = 1 - _exact(resets)[:, :, None]
    if floor is None:
        factor, x = f, c
    else:
        gate, open_c = _sigmoid(f), _sigmoid(c)
        factor = floor + (1 - floor) * gate
        x = (1 - factor) * c * open_c
    before, states = np.empty_like(x), np.empty_like(x)
    for t in range(x.shape[1]):
        before[:, t] = keep[:, t] * h
        states[:, t] = h = factor[:, t] * before[:, t] + x[:, t]
    dx = np.empty_like(x)
    for t in reversed(range(x.shape[1])):
        dx[:, t] = g = g + dout[:, t]
        g = g * factor[:, t] * keep[:, t]
    results = {"states": states, "last state": h, "gradient to h": g, "decay": np.prod(factor * keep, axis=1)}
    if floor is None:
        return results | {"gradient to c": dx, "gradient to f": dx * before}
    dfactor = dx * (before - c * open_c)
    results["gradient to c"] = dx * (1 - factor) * open_c * (1 + c * (1 - open_c))
    results["gradient to f"] = dfactor * (1 - floor) * gate * (1 - gate)
    results["gradient to floor"] = counts @ (dfactor * (1 - gate)).sum(axis=1)
    return results


class _FewRows(NamedTuple):
    """What kernels for a few rows read, and in float64 the input that it makes and the sum that is written."""

    sources: list[np.ndarray]
    gain: np.ndarray | None  # of the norm in it
    addend: np.ndarray | None
    factor: float
    exact: np.ndarray
    sums: dict[str, np.ndarray]  # empty without an addend


def _few_rows(rng: np.random.Generator, kind: str, dtype: str, rows: int, width: int, added: bool) -> _FewRows:
    sources = [_draw(rng, dtype, rows, width) for _ in range(2 if kind in ("gated", "swiglu") else 1)]
    gain = _single(rng.uniform(0.5, 2, width)) if kind in ("norm", "gated") else None
    addend, factor = (_draw(rng, dtype, rows, width), 0.5) if added else (None, 1.0)
    x, *others = map(_exact, sources)
    if addend is not None:
        x = _exact(np.asarray(x + factor * _exact(addend)).astype(jnp.dtype(dtype)))
    u = x if gain is None else _normed(x) * _exact(gain)
    if kind == "swiglu":
        u = u * _sigmoid(u) * others[0]
    elif kind == "gated":
        u = u * others[0] * _sigmoid(others[0])
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
    gain = _single(rng.uniform(0.5, 2, (count, K))) if count else None
    codes = rng.integers(-1, 2, (G, N, K), dtype=np.int8)
    scales = [_single(rng.uniform(0.5, 2, N if per_column else 1)) for _ in range(G)]

    def run(sources, inner, gain, weights, scales, addend, units):
        ys, total = kernel(kind, sources, inner, gain, weights, scales, EPS, addend, rows.factor, layout)
        found = {f"product {g} in codes": ys[g].astype(jnp.float32) / units[g] for g in range(G)}
        return found if total is None else found | {"sum": total}

    expected, units = dict(rows.sums), []
    for g in range(G):
        z = _normed(rows.exact) * _exact(gain[g % count]) if gain is not None else rows.exact
        step = np.maximum(np.abs(z).max(axis=1, keepdims=True), SMALLEST) / TOP
        units.append(_single(step * _exact(scales[g])))
        expected[f"product {g} in codes"] = np.rint(z / step) @ _exact(codes[g]).T
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

    expected = rows.sums | {f"product {g}": rows.exact @ _exact(weights[g]).T for g in range(G)}
    tolerance = dict.fromkeys(expected, TOLERANCES[dtype])
    return Problem(run, (rows.sources, rows.gain, weights, rows.addend), expected, tolerance)


def codes_product(rng: np.random.Generator, use: Use) -> Problem:
    """The product of codes with packed weights. sizes: rows, width, columns. options: whether each column has its own
    scale."""
    from mmfree_jax.ops.fast.hopper.packed_product import codes_product as kernel

    (M, K, N), (per_column,) = use.sizes, use.options
    x = rng.integers(-TOP - 1, TOP + 1, (M, K), dtype=np.int8)
    w = rng.integers(-1, 2, (N, K), dtype=np.int8)
    by_row, by_column = _single(rng.uniform(0.5, 2, M)), _single(rng.uniform(0.5, 2, N if per_column else 1))
    run = lambda x, by_row, w, by_column: {"product": kernel(x, by_row, w, by_column, jnp.float32)}
    expected = _exact(x) @ _exact(w).T * _exact(by_row)[:, None] * _exact(by_column)
    return Problem(run, (x, by_row, pack_planes(w), by_column), {"product": expected}, {"product": 2.0**-20})


def decode_attention(rng: np.random.Generator, use: Use) -> Problem:
    """One new token a row attends to a cache. sizes: rows, slots, heads, heads of keys, channels. options: type."""
    from mmfree_jax.ops.attention import Cache
    from mmfree_jax.ops.fast.hopper.decode_attention import decode_attention as kernel

    (B, S, H, J, K), (dtype,) = use.sizes, use.options
    R = min(B, 8)
    draw = lambda *shape: np.asarray(2 * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))
    q, k, v, keys, values = draw(R, H, K), draw(R, J, K), draw(R, J, K), draw(R, S, J, K), draw(R, S, J, K)
    angles = rng.uniform(0, 2 * np.pi, (R, K // 2))
    cos, sin = _single(np.cos(angles)), _single(np.sin(angles))
    position = rng.integers(0, S, R, dtype=np.int32)
    position[0] = S - 1
    segments = (rng.uniform(size=(R, S)) < 0.8).astype(np.int32)
    rows = functools.partial(_repeated, rows=B)

    def run(*arrays):
        *new, keys, values, segments = map(rows, arrays)
        y, cache = kernel(*new, Cache(keys, values, segments))
        return {"result": y, "keys": cache.k_BSJK, "values": cache.v_BSJK, "segments": cache.segments_BS}

    def rotated(x):
        a, b = np.split(_exact(x), 2, axis=-1)
        c, s = _exact(cos)[:, None], _exact(sin)[:, None]
        return _exact(np.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(jnp.dtype(dtype)))

    at = np.arange(R), position
    expected = {"keys": _exact(keys), "values": _exact(values), "segments": _exact(segments)}
    for name, new in (("keys", rotated(k)), ("values", _exact(v)), ("segments", 1)):
        expected[name][at] = new
    scores = np.einsum("bjgk,bsjk->bjgs", rotated(q).reshape(R, J, H // J, K), expected["keys"]) / np.sqrt(K)
    seen = (np.arange(S) <= position[:, None]) & (expected["segments"] == 1)
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected["result"] = np.einsum("bjgs,bsjk->bjgk", weights, expected["values"]).reshape(R, H, K)
    arrays = q, k, v, cos, sin, position, np.ones(R, np.int32), keys, values, segments
    return Problem(run, arrays, expected, dict.fromkeys(expected, TOLERANCES[dtype]))


def attention(rng: np.random.Generator, use: Use) -> Problem:
    """Causal attention and its backward pass.

    sizes: sequences, steps of queries and keys, heads, heads of keys, channels. options: type, whether there are
    documents, and of how many chunks of time the last has the queries (the keys are those of all).
    """
    kernel = kernel_module("attention")
    (B, T, H, J, K), (dtype, apart, chunks) = use.sizes, use.options
    group, first = H // J, T - T // chunks  # queries that share a key; the first step of the chunk
    kept = min(J, 2)  # different heads of keys; those of queries repeat with them
    draw = lambda *shape: _exact(rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    q, dy = (draw(1, T - first, kept * group, K) for _ in range(2))
    k, v = (draw(1, T, kept, K) for _ in range(2))
    segments = np.cumsum(rng.uniform(size=(1, T)) < 1 / 64, axis=1, dtype=np.int32) if apart else None

    def run(q, k, v, dy, segments):
        rows = lambda a, heads: _repeated(jnp.take(a, jnp.arange(heads) % a.shape[2], axis=2), B)
        everyone = None if segments is None else _repeated(segments, B)
        own = None if everyone is None else everyone[:, first:]
        attend = lambda q, k, v: kernel.causal_attention(q, k, v, own, everyone, (chunks - 1, chunks))
        y, pull = jax.vjp(attend, rows(q, H), rows(k, J), rows(v, J))
        found = zip(("result", "gradient to q", "gradient to k", "gradient to v"), (y, *pull(rows(dy, H))), strict=True)
        return {name: a.swapaxes(1, 3) for name, a in found}

    # By channel, [B, K, H, T]: the gradient to a token's query is exactly zero where it sees only itself.
    expected = _attention(_exact(q), _exact(k), _exact(v), _exact(dy), segments, first)
    expected = {name: a.swapaxes(1, 3) for name, a in expected.items()}
    # Weights and gradients to scores are rounded to the type before they are multiplied, as scaled queries are.
    tolerance = {name: TOLERANCES[dtype] * (4 if "gradient" in name else 1) for name in expected}
    return Problem(run, (q, k, v, dy, segments), expected, tolerance)


def _attention(q, k, v, dy, segments, first) -> dict[str, np.ndarray]:
    """softmax(q k^T / sqrt(K)) v under the mask of `ops.attention.visible`, one head of one row after the other."""
    results = {"result": np.zeros_like(q), "gradient to q": np.zeros_like(q)}
    results |= {"gradient to k": np.zeros_like(k), "gradient to v": np.zeros_like(v)}
    steps, factor, group = np.arange(k.shape[1]), q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    seen = steps[first:, None] >= steps
    if segments is not None:
        seen = seen & (segments[0, first:, None] == segments[0])
    for h in range(q.shape[2]):
        of_query, of_key = (0, slice(None), h), (0, slice(None), h // group)
        scores = np.where(seen, q[of_query] @ k[of_key].T * factor, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        results["result"][of_query] = weights @ v[of_key]
        dweights = dy[of_query] @ v[of_key].T
        dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True)) * factor
        results["gradient to q"][of_query] = dscores @ k[of_key]
        results["gradient to k"][of_key] += dscores.T @ q[of_query]
        results["gradient to v"][of_key] += weights.T @ dy[of_query]
    return results


CHECKS: dict[str, Callable[[np.random.Generator, Use], Problem]] = {
    "normed_codes": normed_codes,
    "row_codes": row_codes,
    "int8_matmul": int8_matmul,
    "transposed_codes": transposed_codes,
    "recurrence": recurrence,
    "normed_product": normed_product,
    "codes_product": codes_product,
    "dense_product": dense_product,
    "decode_attention": decode_attention,
    "attention": attention,
}
