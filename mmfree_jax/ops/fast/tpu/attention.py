"""Causal attention in memory that grows with time, not with its square: JAX's own splash attention for TPUs, which
keeps a row's largest score and sum in VMEM (Dao et al. 2022, arXiv 2205.14135), for any T, K and documents."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from mmfree_jax.ops.fast.tpu.mosaic import LANES, is_interpreted

# Splash attention takes one sequence, heads first, times in whole blocks of 128 and queries that are scaled already.
# Time is filled up at the end, where no earlier query sees a key, and what is computed there is cut off; documents are
# its segments. Two passes go backward, for queries and for keys and values: one pass for both would keep a gradient to
# the queries for every block of keys.

BLOCKS = (1024, 512, 256, 128)  # of queries, and of keys: these are read again for every block of queries
MOST_AT_ONCE = 512  # keys whose scores are there at once


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
    more = -S % LANES if count == 1 else 0
    kernel = _cut(_kernel(S + more, H, count), index, count)
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


def _kernel(time: int, heads: int, chunks: int) -> Any:
    block = next(block for block in BLOCKS if time // chunks % block == 0)
    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    at_once = lambda name: min(block, MOST_AT_ONCE) if name.endswith("compute") else block
    of_blocks: dict[str, Any] = {f"block_{name}": at_once(name) for name in names}
    mask = masks.MultiHeadMask([masks.CausalMask((time, time))] * heads)
    return splash.make_splash_mha(
        mask, block_sizes=splash.BlockSizes(**of_blocks), head_shards=1, q_seq_shards=chunks, interpret=is_interpreted()
    )


def _cut(kernel: Any, index: Any, count: int) -> Any:
    """The part of a kernel, which knows what all queries see, for the queries of one chunk."""
    if count == 1:
        return kernel

    def of_chunk(a: Any, axis: int) -> Any:
        size = 0 if a is None else a.shape[axis] // count
        return None if a is None else jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)

    def part(info: MaskInfo) -> MaskInfo:
        found: dict[str, Any] = {
            name: of_chunk(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")
        }
        return info._replace(**found, q_sequence=of_chunk(info.q_sequence, 0))

    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    return splash.SplashAttentionKernel(*map(part, infos), **kernel.kwargs)
