"""Causal attention in memory that grows with time, not with its square: JAX's own splash attention for TPUs, which
keeps a row's largest score and sum in VMEM (Dao et al. 2022, arXiv 2205.14135), for any T, K and documents."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from mmfree_jax.ops.fast.tpu.mosaic import LANES, is_interpreted

# Splash attention takes one sequence, heads first, times in whole blocks and queries that are scaled already. Time is
# filled up at the end, where no earlier query sees a key, and what is computed there is cut off; documents are its
# segments. Forward, keys are read again for every block of queries that sees them.
#
# Backward, one pass for all three gradients makes scores once, and writes a gradient to the queries for every block of
# keys, whose sum XLA makes: with one block nothing is written twice. Where there are more than a few, two passes, one
# for queries and one for keys and values, need less memory.

QUERIES, KEYS = 2**18, 2**19  # bytes of a block at most: 1,024 queries and 2,048 keys of 128 channels in bfloat16
MOST_AT_ONCE = 512  # keys whose scores are there at once
MOST_APART = 4  # blocks of keys whose gradients to the queries are kept apart


class Blocks(NamedTuple):
    """How time is cut for the kernels."""

    time: int  # of keys, filled up to whole blocks
    queries: int  # of a block; also keys of one where queries stay and keys pass by
    keys: int  # of a block in the pass for the gradients to keys and values
    at_once: int  # keys whose scores are there at once
    one_pass: bool  # backward


def blocks(time: int, chunks: int, channels: int, dtype: Any) -> Blocks:
    """Return the blocks for `time` keys, and for queries of one of several equal chunks, which cannot be filled up."""
    row = -(-channels // LANES) * LANES * jnp.dtype(dtype).itemsize
    whole = lambda lanes, size: max(lanes, size // row // lanes * lanes)
    queries, keys = whole(LANES, QUERIES), whole(2 * LANES, KEYS)
    if chunks > 1:
        keys, queries = _divisor(time, keys), _divisor(time // chunks, queries)
    else:
        count, step = -(-time // keys), LANES if time <= queries else 2 * LANES  # two blocks of queries in one of keys
        keys = -(-time // (count * step)) * step
        time, queries = count * keys, _divisor(keys, queries)
    return Blocks(time, queries, keys, _divisor(math.gcd(queries, keys), MOST_AT_ONCE), time // keys <= MOST_APART)


def _divisor(size: int, most: int) -> int:
    """The largest part of whole lanes, `most` at most, that divides a size of whole lanes."""
    return next(part for part in range(most, 0, -LANES) if size % part == 0)


def supports(time: int, heads: int, key_heads: int, chunks: int) -> bool:
    """Whether the kernel takes queries [T / chunks, H] of one device and keys [T, J] of all: whole blocks if cut."""
    return heads % key_heads == 0 and (chunks == 1 or time % (chunks * LANES) == 0)


def causal_attention(
    q_BTHK: jax.Array,
    k_BSJK: jax.Array,
    v_BSJK: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None = None,
    chunk: tuple[Any, int] = (0, 1),
) -> jax.Array:
    """`ops.attention.causal_attention`, of the queries in one of several equal chunks of time.

    chunk: which of how many; keys and values, and `segments_BS`, are those of all of them.
    """
    (_, T, H, K), S, (index, count) = q_BTHK.shape, k_BSJK.shape[1], chunk
    cut = blocks(S, count, K, q_BTHK.dtype)
    kernel, more = _cut(_kernel(cut, H, count), index, count), cut.time - S
    scaled = (q_BTHK.astype(jnp.float32) * K**-0.5).astype(q_BTHK.dtype)
    heads_first = lambda a: jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
    arrays = [heads_first(a) for a in (scaled, k_BSJK, v_BSJK)]
    if segments_BT is None:
        y_BHTK = jax.vmap(kernel)(*arrays)
    else:
        filled = lambda a: jnp.pad(a.astype(jnp.int32), ((0, 0), (0, more)))
        of_keys = segments_BT if segments_BS is None else segments_BS
        y_BHTK = jax.vmap(kernel)(*arrays, splash.SegmentIds(filled(segments_BT), filled(of_keys)))
    return y_BHTK.swapaxes(1, 2)[:, :T]


def _kernel(cut: Blocks, heads: int, chunks: int) -> Any:
    names = ("q", "kv", "q_dkv") if cut.one_pass else ("q", "kv", "q_dkv", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": cut.queries for name in names} | {"block_kv_dkv": cut.keys}
    sizes |= {f"block_{name}_compute": cut.at_once for name in ("kv", "kv_dkv")}
    mask = masks.MultiHeadMask([masks.CausalMask((cut.time, cut.time))] * heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=cut.one_pass),
        head_shards=1,
        q_seq_shards=chunks,
        interpret=is_interpreted(),
    )


def _cut(kernel: Any, index: Any, count: int) -> Any:
    """The part of a kernel, which knows what all queries see, for the queries of one chunk."""
    if count == 1:
        return kernel

    def of_chunk(a: Any, axis: int) -> Any:
        size = 0 if a is None else a.shape[axis] // count
        return None if a is None else jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)

    def part(info: Any) -> Any:
        if info is None:  # of a pass that there is not
            return None
        found: dict[str, Any] = {
            name: of_chunk(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")
        }
        return info._replace(**found, q_sequence=of_chunk(info.q_sequence, 0))

    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    return splash.SplashAttentionKernel(*map(part, infos), **kernel.kwargs)
