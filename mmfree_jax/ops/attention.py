"""Causal softmax attention over whole windows (Vaswani et al. 2017, arXiv 1706.03762, equation 1), with grouped queries
(Ainslie et al. 2023, arXiv 2305.13245) and documents that do not see each other."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from mmfree_jax.devices import backend
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import axis_if_cut, per_shard, ways

Form = Literal["auto", "full", "rows", "cudnn"]
QUERIES = 64  # queries in a block of the "rows" form: their scores against 256 keys and four heads fill 256 KiB


def causal_attention(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJK: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    impl: Form = "auto",
) -> jax.Array:
    """Each token attends to itself and to what came before it in its own document.

    A mesh cuts batch and heads freely; where it cuts time, keys and values are gathered and queries stay.

    Args:
        q_BTHK: queries of H heads.
        k_BTJK, v_BTJK: keys and values of J heads; H is a multiple of J.
        segments_BT: document ids; None is one document a row.
        impl: "full" makes all scores at once; "rows" one row of the batch and one block of queries at a time, leaving
            out the keys that the block cannot see and recomputing its scores in the backward pass (up to four times
            faster on CPU, where scores then stay in cache); "cudnn" is NVIDIA's fused kernel; "auto" chooses by device.

    Returns:
        [B, T, H, K] of v's type; scores and softmax are in at least float32.
    """
    axis, form = axis_if_cut("time", q_BTHK.shape[1]), choose(q_BTHK, segments_BT) if impl == "auto" else impl
    form = "full" if axis is not None else form  # queries of a chunk see more keys than there are queries

    def local(q_BTHK, k_BTJK, v_BTJK, segments_BT):
        if axis is not None:
            return (_chunk(q_BTHK, k_BTJK, v_BTJK, segments_BT, axis),)
        return (_whole(form, q_BTHK, k_BTJK, v_BTJK, segments_BT),)

    # Heads are cut only where each part has its own keys.
    heads = "heads" if ways("heads", q_BTHK.shape[2]) == ways("heads", k_BTJK.shape[2]) else None
    names = ("batch", "time", heads, None)
    arguments = q_BTHK, k_BTJK, v_BTJK, segments_BT
    return per_shard(local, [names, names, names, names[:2]], [names], *arguments)[0]


def _whole(form: str, q_BTHK, k_BTJK, v_BTJK, segments_BT) -> jax.Array:
    if form == "cudnn":
        return _cudnn(q_BTHK, k_BTJK, v_BTJK)
    if form == "rows":
        return _by_rows(q_BTHK, k_BTJK, v_BTJK, segments_BT)
    return attend(q_BTHK, k_BTJK, v_BTJK, visible(segments_BT, q_BTHK.shape[1]))


def choose(q_BTHK: jax.Array, segments_BT: jax.Array | None) -> str:
    """The form for this device; the fused kernel takes half precision, no documents and heads up to a width."""
    if backend() == "cpu":
        return "rows"
    fused = q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and segments_BT is None
    return "cudnn" if fused and q_BTHK.shape[-1] <= _widest_fused_head() else "full"


def _widest_fused_head() -> int:
    """The widest head that cuDNN's kernel takes on the GPU here; 0 without one."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "")) if jax.default_backend() == "gpu" else ""
    if not capability.replace(".", "").isdigit():  # as gfx942 of another maker
        return 0
    return 256 if float(capability) >= 9 else 128


def _cudnn(q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJK: jax.Array) -> jax.Array:
    """Attention by NVIDIA's fused kernel, which takes head widths of a multiple of 8 and an even number of steps.

    Zeros fill up the rest, and their part of the result is cut off. They change nothing else: a zero adds nothing to a
    score, and no earlier query sees a key that is added at the end.
    """
    time, width = q_BTHK.shape[1], q_BTHK.shape[-1]
    fill = lambda a: jnp.pad(a, [(0, 0), (0, time % 2), (0, 0), (0, -width % 8)])
    q, k, v = map(fill, (q_BTHK, k_BTJK, v_BTJK))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=width**-0.5, implementation="cudnn")
    return y[:, :time, :, :width]


def _chunk(q_BTHK, k_BTJK, v_BTJK, segments_BT, axis: str) -> jax.Array:
    """Queries of one chunk of time against the keys and values of all chunks, fetched along a mesh axis."""
    fetch = lambda a: jax.lax.all_gather(a, axis, axis=1, tiled=True)
    k_BSJK, v_BSJK = fetch(k_BTJK), fetch(v_BTJK)
    positions_T = jax.lax.axis_index(axis) * q_BTHK.shape[1] + jnp.arange(q_BTHK.shape[1])
    seen = positions_T[:, None] >= jnp.arange(k_BSJK.shape[1])
    if segments_BT is not None:
        seen = seen & (segments_BT[:, :, None] == fetch(segments_BT)[:, None, :])
    return attend(q_BTHK, k_BSJK, v_BSJK, seen)


def visible(segments_BT: jax.Array | None, time: int) -> jax.Array:
    """Which keys [.., T, S] each query sees: [T, T], or [B, T, T] with documents."""
    causal_TT = jnp.tri(time, dtype=bool)
    return causal_TT if segments_BT is None else causal_TT & (segments_BT[..., None] == segments_BT[..., None, :])


def attend(q_BTHK: jax.Array, k_BSJK: jax.Array, v_BSJK: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention under any mask, [T, S] or [B, T, S], true where visible; shapes as `causal_attention`."""
    B, T, H, K = q_BTHK.shape
    J = k_BSJK.shape[2]
    exact = wide(q_BTHK.dtype)
    q_BTJGK = q_BTHK.reshape(B, T, J, H // J, K)
    scores = jnp.einsum("btjgk,bsjk->bjgts", q_BTJGK, k_BSJK, preferred_element_type=exact) / math.sqrt(K)
    seen = mask if mask.ndim == 2 else mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(exact).min), axis=-1).astype(v_BSJK.dtype)
    y = jnp.einsum("bjgts,bsjk->btjgk", weights, v_BSJK, preferred_element_type=exact)
    return y.reshape(B, T, H, K).astype(v_BSJK.dtype)


def _by_rows(q_BTHK, k_BTJK, v_BTJK, segments_BT) -> jax.Array:
    """`attend` on one row at a time, its queries in blocks that meet only the keys up to their own end."""
    time = q_BTHK.shape[1]

    @jax.checkpoint
    def row(operands):
        q, k, v, segments_T = operands
        mask_TT = visible(segments_T, time)
        blocks = [(start, min(start + QUERIES, time)) for start in range(0, time, QUERIES)]
        return jnp.concatenate([_block(q[a:b], k[:b], v[:b], mask_TT[a:b, :b]) for a, b in blocks], axis=1)

    heads_first = jax.lax.map(row, (q_BTHK, k_BTJK, v_BTJK, segments_BT))
    return heads_first.swapaxes(1, 2)


def _block(q_THK, k_SJK, v_SJK, mask_TS) -> jax.Array:
    """[H, T, K]: some queries of one row against the keys that they may see."""
    T, H, K = q_THK.shape
    J = k_SJK.shape[1]
    exact = wide(q_THK.dtype)
    q_JNK = q_THK.swapaxes(0, 1).reshape(J, H // J * T, K)
    scores_JNS = jnp.matmul(q_JNK, k_SJK.transpose(1, 2, 0), preferred_element_type=exact) * (1 / math.sqrt(K))
    scores_JGTS = scores_JNS.reshape(J, H // J, T, -1)
    weights = jax.nn.softmax(jnp.where(mask_TS, scores_JGTS, jnp.finfo(exact).min), axis=-1)
    weights_JNS = weights.astype(v_SJK.dtype).reshape(scores_JNS.shape)
    y_JNK = jnp.matmul(weights_JNS, v_SJK.swapaxes(0, 1), preferred_element_type=exact)
    return y_JNK.reshape(H, T, K).astype(v_SJK.dtype)
