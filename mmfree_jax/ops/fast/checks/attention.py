"""Checks of attention: over a sequence, forward and backward, and of one token to a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.checks.problem import TOLERANCES, Problem, Use, as_float32, as_float64, repeated
from mmfree_jax.ops.fast.kernels import kernel_module


def attention(rng: np.random.Generator, use: Use) -> Problem:
    """Causal attention and its backward pass.

    sizes: sequences, steps of queries and keys, heads, heads of keys, channels. options: type, whether there are
    documents, and of how many chunks of time the last has the queries (the keys are those of all).
    """
    kernel = kernel_module("attention")
    (B, T, H, J, K), (dtype, apart, chunks) = use.sizes, use.options
    group, first = H // J, T - T // chunks  # queries that share a key; the first step of the chunk
    kept = min(J, 2)  # different heads of keys; those of queries repeat with them
    draw = lambda *shape: as_float64(rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    q, dy = (draw(1, T - first, kept * group, K) for _ in range(2))
    k, v = (draw(1, T, kept, K) for _ in range(2))
    segments = np.cumsum(rng.uniform(size=(1, T)) < 1 / 64, axis=1, dtype=np.int32) if apart else None

    def run(q, k, v, dy, segments):
        rows = lambda a, heads: repeated(jnp.take(a, jnp.arange(heads) % a.shape[2], axis=2), B)
        everyone = None if segments is None else repeated(segments, B)
        own = None if everyone is None else everyone[:, first:]
        attend = lambda q, k, v: kernel.causal_attention(q, k, v, own, everyone, (chunks - 1, chunks))
        y, pull = jax.vjp(attend, rows(q, H), rows(k, J), rows(v, J))
        found = zip(("result", "gradient to q", "gradient to k", "gradient to v"), (y, *pull(rows(dy, H))), strict=True)
        return {name: a.swapaxes(1, 3) for name, a in found}

    # By channel, [B, K, H, T]: the gradient to a token's query is exactly zero where it sees only itself.
    expected = _attention(as_float64(q), as_float64(k), as_float64(v), as_float64(dy), segments, first)
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


def decode_attention(rng: np.random.Generator, use: Use) -> Problem:
    """One new token a row attends to a cache. sizes: rows, slots, heads, heads of keys, channels. options: type."""
    from mmfree_jax.ops.attention import Cache
    from mmfree_jax.ops.fast.hopper.decode_attention import decode_attention as kernel

    (B, S, H, J, K), (dtype,) = use.sizes, use.options
    R = min(B, 8)
    draw = lambda *shape: np.asarray(2 * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))
    q, k, v, keys, values = draw(R, H, K), draw(R, J, K), draw(R, J, K), draw(R, S, J, K), draw(R, S, J, K)
    angles = rng.uniform(0, 2 * np.pi, (R, K // 2))
    cos, sin = as_float32(np.cos(angles)), as_float32(np.sin(angles))
    position = rng.integers(0, S, R, dtype=np.int32)
    position[0] = S - 1
    segments = (rng.uniform(size=(R, S)) < 0.8).astype(np.int32)
    rows = functools.partial(repeated, rows=B)

    def run(*arrays):
        *new, keys, values, segments = map(rows, arrays)
        y, cache = kernel(*new, Cache(keys, values, segments))
        return {"result": y, "keys": cache.k_BSJK, "values": cache.v_BSJK, "segments": cache.segments_BS}

    def rotated(x):
        a, b = np.split(as_float64(x), 2, axis=-1)
        c, s = as_float64(cos)[:, None], as_float64(sin)[:, None]
        return as_float64(np.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(jnp.dtype(dtype)))

    at = np.arange(R), position
    expected = {"keys": as_float64(keys), "values": as_float64(values), "segments": as_float64(segments)}
    for name, new in (("keys", rotated(k)), ("values", as_float64(v)), ("segments", 1)):
        expected[name][at] = new
    scores = np.einsum("bjgk,bsjk->bjgs", rotated(q).reshape(R, J, H // J, K), expected["keys"]) / np.sqrt(K)
    seen = (np.arange(S) <= position[:, None]) & (expected["segments"] == 1)
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected["result"] = np.einsum("bjgs,bsjk->bjgk", weights, expected["values"]).reshape(R, H, K)
    arrays = q, k, v, cos, sin, position, np.ones(R, np.int32), keys, values, segments
    return Problem(run, arrays, expected, dict.fromkeys(expected, TOLERANCES[dtype]))
