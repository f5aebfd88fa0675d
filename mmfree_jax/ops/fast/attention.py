"""`ops.attention` in the form that suits the device, and on a mesh."""

import math

import jax
import jax.numpy as jnp

from mmfree_jax.ops.attention import Cache, attend, visible
from mmfree_jax.ops.attention import attend_to_cache as defined
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.kernels import kernel_module
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import constrain, per_shard, shard_count, sharding_axis

QUERIES = 64  # queries in a block of the "rows" form: their scores against 256 keys and four heads fill 256 KiB
HEADS = ("batch", "time", "heads", None)  # logical names of [B, T, H, K]


def attend_to_cache(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJK: jax.Array, turn, positions_BT, segments_BT, cache: Cache
) -> tuple[jax.Array, Cache]:
    """`ops.attention.attend_to_cache`; one kernel serves one token a row, as in decoding."""
    if not choice.decode_attention(q_BTHK, cache):
        return defined.definition(q_BTHK, k_BTJK, v_BTJK, turn, positions_BT, segments_BT, cache)
    from mmfree_jax.ops.fast.hopper.decode_attention import decode_attention

    cos_BK, sin_BK = (a[:, 0] for a in turn)
    new = q_BTHK[:, 0], k_BTJK[:, 0], v_BTJK[:, 0], cos_BK, sin_BK, positions_BT[:, 0], segments_BT[:, 0]
    y_BHK, cache = decode_attention(*new, cache)
    return y_BHK[:, None], cache


def causal_attention(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJK: jax.Array, *, segments_BT: jax.Array | None = None, form: str = ""
) -> jax.Array:
    """`ops.attention.causal_attention`. form: that of `choice.attention_form`, which is asked where it is empty.

    A mesh cuts batch and heads freely; where it cuts time, keys and values are gathered and queries stay.
    """
    axis, form = sharding_axis("time", q_BTHK.shape[1]), form or choice.attention_form(q_BTHK, k_BTJK, segments_BT)

    def local(q_BTHK, k_BTJK, v_BTJK, segments_BT):
        if axis is not None:
            return (_chunk(form, q_BTHK, k_BTJK, v_BTJK, segments_BT, axis),)
        return (_whole(form, q_BTHK, k_BTJK, v_BTJK, segments_BT),)

    # Heads are cut only where each part has its own keys.
    heads = "heads" if shard_count("heads", q_BTHK.shape[2]) == shard_count("heads", k_BTJK.shape[2]) else None
    names = ("batch", "time", heads, None)
    arguments = *(constrain(a, *HEADS) for a in (q_BTHK, k_BTJK, v_BTJK)), segments_BT
    return per_shard(local, [names, names, names, names[:2]], [names], *arguments)[0]


def _whole(form: str, q_BTHK, k_BTJK, v_BTJK, segments_BT) -> jax.Array:
    if form == "cudnn":
        return cudnn(q_BTHK, k_BTJK, v_BTJK)
    if form in ("splash", "channels"):
        return kernel_module("attention").causal_attention(q_BTHK, k_BTJK, v_BTJK, segments_BT)
    if form == "rows":
        return _by_rows(q_BTHK, k_BTJK, v_BTJK, segments_BT)
    if form == "blocks":
        positions_T = jnp.arange(q_BTHK.shape[1])
        return _by_blocks(q_BTHK, k_BTJK, v_BTJK, positions_T, segments_BT, segments_BT)
    return attend(q_BTHK, k_BTJK, v_BTJK, visible(segments_BT, q_BTHK.shape[1]))


def cudnn(q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJK: jax.Array, scale: float | None = None) -> jax.Array:
    """Causal attention by NVIDIA's fused kernel, which takes an even number of steps and one head width of queries,
    keys and values: a multiple of 8. Values may be narrower than queries and keys. scale: of scores, by default K^-1/2.

    Zeros fill up the rest, and their part of the result is cut off. They change nothing else: a zero adds nothing to a
    score, and no earlier query sees a key that is added at the end.
    """
    time, width = q_BTHK.shape[1], q_BTHK.shape[-1]
    widest = width + -width % 8
    fill = lambda a: jnp.pad(a, [(0, 0), (0, time % 2), (0, 0), (0, widest - a.shape[-1])])
    q, k, v = map(fill, (q_BTHK, k_BTJK, v_BTJK))
    scale = width**-0.5 if scale is None else scale
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale, implementation="cudnn")
    return y[:, :time, :, : v_BTJK.shape[-1]]


def _chunk(form: str, q_BTHK, k_BTJK, v_BTJK, segments_BT, axis: str) -> jax.Array:
    """Queries of one chunk of time against the keys and values of all chunks, fetched along a mesh axis."""
    fetch = lambda a: jax.lax.all_gather(a, axis, axis=1, tiled=True)
    k_BSJK, v_BSJK = fetch(k_BTJK), fetch(v_BTJK)
    segments_BS = None if segments_BT is None else fetch(segments_BT)
    if form == "splash":
        chunk = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
        return kernel_module("attention").causal_attention(q_BTHK, k_BSJK, v_BSJK, segments_BT, segments_BS, chunk)
    positions_T = jax.lax.axis_index(axis) * q_BTHK.shape[1] + jnp.arange(q_BTHK.shape[1])
    return _by_blocks(q_BTHK, k_BSJK, v_BSJK, positions_T, segments_BT, segments_BS)


def _by_blocks(q_BTHK, k_BSJK, v_BSJK, positions_T, segments_BT, segments_BS) -> jax.Array:
    """`attend` from a block of queries of all rows at a time to all keys: memory grows with T, not with its square.

    positions_T: places of the queries among the keys. Scores are recomputed in the backward pass.
    """
    (B, T, *_), block = q_BTHK.shape, min(choice.QUERIES_AT_ONCE, q_BTHK.shape[1])

    def cut(a: jax.Array) -> jax.Array:  # into blocks, [n, B, block, ..], the last filled up with zeros
        filled = jnp.pad(a, [(0, 0), (0, -T % block), *[(0, 0)] * (a.ndim - 2)])
        return filled.reshape(len(a), -1, block, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend_block(operands):
        q, positions, segments = operands
        seen = positions[:, :, None] >= jnp.arange(k_BSJK.shape[1])
        if segments is not None:
            seen = seen & (segments[:, :, None] == segments_BS[:, None, :])
        return attend(q, k_BSJK, v_BSJK, seen)

    segments = None if segments_BT is None else cut(segments_BT)
    y = jax.lax.map(attend_block, (cut(q_BTHK), cut(positions_T[None]), segments))
    return y.swapaxes(0, 1).reshape(B, -1, *y.shape[3:])[:, :T]


def _by_rows(q_BTHK, k_BTJK, v_BTJK, segments_BT) -> jax.Array:
    """`attend` on one row at a time, its queries in blocks that meet only the keys up to their own end."""
    time = q_BTHK.shape[1]

    # The mask is causal, so a block of queries needs no key behind its last query: half of all scores are never made.
    # Scores are recomputed in the backward pass, as reading them back from memory takes longer on a CPU.
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
    # The H // J heads that share keys are stacked in time: one product of J matrices, as large as it can be.
    T, H, K = q_THK.shape
    # N = H / J * T queries share the keys of one head: the groups become rows of one product, where a batched product
    # of H small ones would read each key H / J times.
    J = k_SJK.shape[1]
    exact = wide(q_THK.dtype)
    q_JNK = q_THK.swapaxes(0, 1).reshape(J, H // J * T, K)
    scores_JNS = jnp.matmul(q_JNK, k_SJK.transpose(1, 2, 0), preferred_element_type=exact) * (1 / math.sqrt(K))
    scores_JGTS = scores_JNS.reshape(J, H // J, T, -1)
    weights = jax.nn.softmax(jnp.where(mask_TS, scores_JGTS, jnp.finfo(exact).min), axis=-1)
    weights_JNS = weights.astype(v_SJK.dtype).reshape(scores_JNS.shape)
    y_JNK = jnp.matmul(weights_JNS, v_SJK.swapaxes(0, 1), preferred_element_type=exact)
    return y_JNK.reshape(H, T, K).astype(v_SJK.dtype)
