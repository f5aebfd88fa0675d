"""Attention of one new token a row to a cache of keys and values (Pallas Triton, Hopper).

The cache is read once. Its slots are cut into pieces, so that there are blocks enough for all multiprocessors where few
rows decode; each block keeps a running maximum and sums (Dao et al. 2022, arXiv 2205.14135, section 3.1), and the
pieces are joined at the end (Flash-Decoding).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.fast.hopper import few_rows

SLOTS = 64  # of a tile
BLOCKS = 264  # at least, where there are slots enough: two for each multiprocessor of an H200
MOST_QUERIES = 8  # heads of one key
WIDTHS = (32, 64, 128, 256)
LOWEST = -1e30  # a score that no key has; finite, so that differences of two are numbers


def supports(heads: int, key_heads: int, width: int) -> bool:
    """Whether the kernel takes these heads."""
    return width in WIDTHS and heads // key_heads <= MOST_QUERIES


@jax.jit
def decode_attention(q_BHK: jax.Array, k_BSJK: jax.Array, v_BSJK: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Attend from one query of each row and head to the slots where the mask is true: [B, H, K] of v's type.

    Scores, softmax and sums are float32. A row that sees nothing gets zeros.
    """
    (B, H, K), (S, J) = q_BHK.shape, k_BSJK.shape[1:3]
    G = H // J
    tiles = -(-S // SLOTS)
    pieces = min(tiles, max(1, -(-BLOCKS // (B * J))))
    rounds = -(-tiles // pieces)
    q_BJGK = q_BHK.reshape(B, J, G, K)

    def kernel(q_ref, k_ref, v_ref, mask_ref, sum_ref, most_ref, weight_ref):
        b, j, piece = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        channel = jnp.arange(K)
        queries = [plt.load(q_ref.at[b, j, g, channel]).astype(jnp.float32) / math.sqrt(K) for g in range(G)]

        def step(i, carry):
            slot = (piece * rounds + i) * SLOTS + jnp.arange(SLOTS)
            inside, slot = slot < S, jnp.minimum(slot, S - 1)
            k = plt.load(k_ref.at[b, slot[:, None], j, channel[None]]).astype(jnp.float32)
            v = plt.load(v_ref.at[b, slot[:, None], j, channel[None]]).astype(jnp.float32)
            seen = inside & (plt.load(mask_ref.at[b, slot]) != 0)
            return [_joined(one, q, k, v, seen) for one, q in zip(carry, queries, strict=True)]

        nothing = jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(K, jnp.float32)
        found = lax.fori_loop(0, rounds, step, [nothing] * G)
        for g, (most, weight, total) in enumerate(found):
            plt.store(sum_ref.at[b, j, g, piece, channel], total)
            most_ref[b, j, g, piece], weight_ref[b, j, g, piece] = most, weight

    parts = jax.ShapeDtypeStruct((B, J, G, pieces), jnp.float32)
    sums, most, weights = pl.pallas_call(
        kernel,
        grid=(B, J, pieces),
        out_shape=[jax.ShapeDtypeStruct((B, J, G, pieces, K), jnp.float32), parts, parts],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=few_rows.INTERPRET,
        name="decode_attention",
    )(q_BJGK, k_BSJK, v_BSJK, mask_BS.astype(jnp.int8))
    share = jnp.exp(most - jnp.max(most, axis=-1, keepdims=True))
    whole = jnp.maximum(jnp.sum(weights * share, axis=-1), jnp.finfo(jnp.float32).tiny)
    y_BJGK = jnp.sum(sums * share[..., None], axis=-2) / whole[..., None]
    return y_BJGK.reshape(B, H, K).astype(v_BSJK.dtype)


def _joined(carry: tuple[jax.Array, jax.Array, jax.Array], q, k, v, seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add a tile of slots to a query's maximum, sum of weights and weighted sum of values."""
    most, weight, total = carry
    scores = jnp.where(seen, jnp.sum(k * q[None], axis=1), LOWEST)
    higher = jnp.maximum(most, jnp.max(scores))
    weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
    old = jnp.exp(most - higher)
    return higher, weight * old + jnp.sum(weights), total * old + jnp.sum(weights[:, None] * v, axis=0)
