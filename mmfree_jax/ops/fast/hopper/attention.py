"""Causal attention within documents by NVIDIA's fused kernel, which knows no documents: a few more channels of queries
and keys keep them apart, so memory grows with time and not with its square, and a row may have any number of them."""

from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.ops.fast.attention import cudnn

# Documents are runs of steps, numbered along a row; each bit of the number is a channel. A query has -APART in the
# channels of its document's ones, a key has 1 in those of its zeros. A query's score for a key of its own document is
# what it was, to the last bit: in each of these channels one of the two is zero. A key of an earlier document has a
# smaller number, so at the highest bit where the two differ the query has a one and the key a zero: its score is below
# -APART, and its weight is zero. What comes later is hidden by the causal mask.

# Times the scale of the widest heads, 1/16, it is 4,096 more than a score. Not more: fused kernels subtract a row's
# maximum so far, and where they have met keys of earlier documents only, its rounding error is in an exponent.
APART = 2.0**16
WIDEST = 256  # channels of a head, on Hopper GPUs


def channels(time: int) -> int:
    """Return how many channels tell apart the documents of a row, of which there may be as many as steps."""
    return (time - 1).bit_length()


def supports(time: int, width: int) -> bool:
    """Whether queries [T, K] have room for these channels, in heads as wide as the fused kernel takes them."""
    return width + channels(time) <= WIDEST


def causal_attention(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJK: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array | None = None,
    chunk: tuple[Any, int] = (0, 1),
) -> jax.Array:
    """`ops.attention.causal_attention` with documents. `segments_BS` are the same ids: there is one chunk of time."""
    assert chunk == (0, 1), "all queries of a row are here"
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    begins_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    number_BT = jnp.pad(jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])
    bits_BTN = number_BT[:, :, None] >> jnp.arange(channels(T)) & 1

    def more(a: jax.Array, channels_BTN: jax.Array) -> jax.Array:
        of_heads = jnp.broadcast_to(channels_BTN[:, :, None], (*a.shape[:3], channels_BTN.shape[-1]))
        return jnp.concatenate([a, of_heads.astype(a.dtype)], axis=-1)

    return cudnn(more(q_BTHK, -APART * bits_BTN), more(k_BTJK, 1 - bits_BTN), v_BTJK, K**-0.5)
