"""Attention of one new token a row to a cache of keys and values (Pallas Triton, Hopper).

One kernel rotates the token's queries and keys, puts its key and value into the cache, in place, and attends. The cache
is read once. Its slots are cut into pieces, so that there are blocks enough for all multiprocessors where few rows
decode; each block keeps a running maximum and sums (Dao et al. 2022, arXiv 2205.14135, section 3.1), and the pieces are
joined at the end (Flash-Decoding). The new token itself is not read from the cache, as the block that writes it may be
late: the same block adds it from its registers.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.attention import Cache
from mmfree_jax.ops.fast.hopper import few_rows
from mmfree_jax.ops.fast.hopper.few_rows import masked_load

SLOTS = 64  # of a tile
BLOCKS = 264  # at least, where there are slots enough: two for each multiprocessor of an H200
MOST_QUERIES = 8  # heads of one key
WIDTHS = (32, 64, 128, 256)
LOWEST = -1e30  # a score that no key has; finite, so that differences of two are numbers


def supports(heads: int, key_heads: int, width: int) -> bool:
    """Whether the kernel takes these heads."""
    return width in WIDTHS and heads // key_heads <= MOST_QUERIES


@jax.jit
def decode_attention(
    q_BHK: jax.Array,
    k_BJK: jax.Array,
    v_BJK: jax.Array,
    cos_BK: jax.Array,
    sin_BK: jax.Array,
    position_B: jax.Array,
    segment_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Compute `ops.attention.attend_to_cache` for one token a row: [B, H, K], and the cache with it.

    cos_BK, sin_BK: of the half rotations, [B, K/2]. Scores, softmax and sums are float32. A row that sees nothing gets
    zeros, one beyond the cache's capacity NaN.
    """
    (B, H, K), (S, J) = q_BHK.shape, cache.k_BSJK.shape[1:3]
    G = H // J
    tiles = -(-S // SLOTS)
    pieces = min(tiles, max(1, -(-BLOCKS // (B * J))))
    rounds = -(-tiles // pieces)
    q_BJGK = q_BHK.reshape(B, J, G, K)

    def kernel(q_ref, k_ref, v_ref, cos_ref, sin_ref, position_ref, segment_ref, keys, values, segments, *results):
        sum_ref, most_ref, weight_ref, new_keys, new_values, new_segments = results
        (b, j, piece), half = map(pl.program_id, range(3)), jnp.arange(K // 2)
        position, segment = position_ref[b], segment_ref[b]
        begin, end = piece * rounds * SLOTS, jnp.minimum((piece + 1) * rounds * SLOTS, S)
        cos, sin = plt.load(cos_ref.at[b, half]), plt.load(sin_ref.at[b, half])

        def rotated(ref, *place) -> list[jax.Array]:
            """The two halves of a head, rounded to its type as `rotate` does, as float32."""
            x, y = (plt.load(ref.at[b, j, *place, half + offset]).astype(jnp.float32) for offset in (0, K // 2))
            turned = x * cos - y * sin, y * cos + x * sin
            return [a.astype(ref.dtype).astype(jnp.float32) for a in turned]

        queries = [[a / math.sqrt(K) for a in rotated(q_ref, g)] for g in range(G)]
        key, value = rotated(k_ref), plt.load(v_ref.at[b, j, jnp.arange(K)])
        mine = (begin <= position) & (position < end)

        def keep() -> None:
            for part, offset in zip(key, (0, K // 2), strict=True):
                plt.store(new_keys.at[b, position, j, half + offset], part.astype(new_keys.dtype))
            plt.store(new_values.at[b, position, j, jnp.arange(K)], value)
            new_segments[b, position] = segment

        pl.when(mine)(keep)

        def step(i, carry):
            slot = begin + i * SLOTS + jnp.arange(SLOTS)
            inside = slot < jnp.minimum(position, end)
            mask = lambda width: jnp.broadcast_to(inside[:, None], (SLOTS, width))
            at = lambda ref, places: masked_load(ref.at[b, slot[:, None], j, places[None]], mask(places.shape[0]))
            k = [at(keys, half + offset).astype(jnp.float32) for offset in (0, K // 2)]
            v = at(values, jnp.arange(K)).astype(jnp.float32)
            seen = inside & (masked_load(segments.at[b, slot], inside) == segment)
            return [_joined(one, q, k, v, seen) for one, q in zip(carry, queries, strict=True)]

        def start(q: list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            score = sum(jnp.sum(a * b) for a, b in zip(q, key, strict=True))
            own = value.astype(jnp.float32)
            return jnp.where(mine, score, LOWEST), mine.astype(jnp.float32), jnp.where(mine, own, jnp.zeros_like(own))

        # Slots from the new token on hold nothing, and are not read.
        needed = jnp.clip(-(-(jnp.minimum(position, S) - begin) // SLOTS), 0, rounds)
        found = lax.fori_loop(0, needed, step, [start(q) for q in queries])
        for g, (most, weight, total) in enumerate(found):
            plt.store(sum_ref.at[b, j, g, piece, jnp.arange(K)], total)
            most_ref[b, j, g, piece], weight_ref[b, j, g, piece] = most, weight

    parts = jax.ShapeDtypeStruct((B, J, G, pieces), jnp.float32)
    sums, most, weights, *kept = pl.pallas_call(
        kernel,
        grid=(B, J, pieces),
        out_shape=[jax.ShapeDtypeStruct((B, J, G, pieces, K), jnp.float32), parts, parts, *jax.tree.leaves(cache)],
        input_output_aliases={7: 3, 8: 4, 9: 5},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=few_rows.INTERPRET,
        name="decode_attention",
    )(q_BJGK, k_BJK, v_BJK, cos_BK, sin_BK, position_B, segment_B, *cache)
    share = jnp.exp(most - jnp.max(most, axis=-1, keepdims=True))
    whole = jnp.maximum(jnp.sum(weights * share, axis=-1), jnp.finfo(jnp.float32).tiny)
    y_BJGK = jnp.sum(sums * share[..., None], axis=-2) / whole[..., None]
    y_BHK = jnp.where(position_B[:, None, None] < S, y_BJGK.reshape(B, H, K), jnp.nan)
    return y_BHK.astype(v_BJK.dtype), Cache(*kept)


def _joined(carry: tuple[jax.Array, jax.Array, jax.Array], q, k, v, seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add a tile of slots to a query's maximum, sum of weights and weighted sum of values."""
    most, weight, total = carry
    scores = sum(jnp.sum(k_half * q_half[None], axis=1) for k_half, q_half in zip(k, q, strict=True))
    scores = jnp.where(seen, scores, LOWEST)
    higher = jnp.maximum(most, jnp.max(scores))
    weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
    old = jnp.exp(most - higher)
    return higher, weight * old + jnp.sum(weights), total * old + jnp.sum(weights[:, None] * v, axis=0)
