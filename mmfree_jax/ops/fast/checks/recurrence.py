"""The check of the recurrence's kernels, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.checks.problem import TOLERANCES, Problem, Use, as_float32, as_float64, repeated, sigmoid
from mmfree_jax.ops.fast.kernels import kernel_module


def recurrence(rng: np.random.Generator, use: Use) -> Problem:
    """The recurrence and its backward pass.

    sizes: sequences, steps, channels. options: type, whether the MLGRU's gates are fused in, whether these steps are
    one device's chunk of longer sequences (then what a chunk does to a state is checked too).
    """
    from mmfree_jax.ops.fast.fused_recurrence import fused_recurrence

    kernel = kernel_module("recurrence")
    (B, T, D), (dtype, gated, chunk) = use.sizes, use.options
    R, counts = min(B, 2), np.bincount(np.arange(B) % min(B, 2)).astype(np.float64)
    draw = lambda *shape: as_float64(rng.standard_normal(shape))
    c, dout = (draw(R, T, D).astype(jnp.dtype(dtype)) for _ in range(2))
    f = (draw(R, T, D) if gated else as_float64(rng.uniform(0, 1, (R, T, D)))).astype(jnp.dtype(dtype))
    floor = as_float32(rng.uniform(0, 0.9, D)) if gated else None
    h, dlast = (as_float32(draw(R, D)) for _ in range(2))
    resets = rng.uniform(size=(R, T)) < 1 / 64

    def run(c, f, floor, h, resets, dout, dlast):
        rows = functools.partial(repeated, rows=B)
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
    keep = 1 - as_float64(resets)[:, :, None]
    if floor is None:
        factor, x = f, c
    else:
        gate, open_c = sigmoid(f), sigmoid(c)
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
