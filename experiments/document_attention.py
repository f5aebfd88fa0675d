"""Ways to keep documents apart in causal attention on a GPU, against attention that joins them.

    python -m experiments.document_attention          # on a Hopper GPU; three minutes

Prints, for attention and its gradients in bfloat16 at the shapes of transformer++-1.3b, milliseconds, temporaries, and
the largest error of a result or gradient in float32's terms: |error| over the largest value. "packed" is cuDNN's layout
of runs of tokens, which JAX does not export.
"""

import csv
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.bench.timing import memory_bytes, repeat, time_calls
from mmfree_jax.ops.fast.attention import causal_attention, cudnn
from mmfree_jax.ops.fast.hopper.attention import APART, WIDEST, channels

SHAPES = ((8, 2048, 16, 128), (2, 8192, 16, 128))  # B, T, H, K
MEAN_LENGTH = 512  # tokens of a document; their lengths are exponential
TIMES = 4  # applications in a program that is timed
FIELDS = ("B", "T", "H", "K", "way", "ms", "temporary_mb", "error", "failed")


def documents(rng: np.random.Generator, B: int, T: int) -> np.ndarray:
    """Ids [B, T] of documents of exponential lengths."""
    return np.cumsum(rng.uniform(size=(B, T)) < 1 / MEAN_LENGTH, axis=1, dtype=np.int32)


def packed(most: int) -> Callable:
    """Attention in cuDNN's packed layout, of at most that many documents a row."""

    def attend(q, k, v, segments):
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        T = segments.shape[1]
        ids = jnp.arange(most)
        begins = jax.vmap(lambda row: jnp.searchsorted(row, ids, side="left"))(segments).astype(jnp.int32)
        ends = jax.vmap(lambda row: jnp.searchsorted(row, ids, side="right"))(segments).astype(jnp.int32)
        lengths = jnp.where(begins < T, ends - begins, -1)
        offsets = jnp.concatenate([begins, jnp.full_like(begins[:, :1], T)], axis=1)
        count = segments[:, -1:] + 1
        offsets = jnp.where(jnp.arange(most + 1) <= count, offsets, -1)
        return dot_product_attention(
            *(q, k, v, None, None, lengths, lengths, offsets, offsets),
            scale=q.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING_CAUSAL,
        )

    return attend


def narrow_values(q, k, v, segments):
    """`hopper.attention` whose values keep their width: cuDNN knows it, JAX does not export it."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    bits = segments[:, :, None] >> jnp.arange(channels(segments.shape[1])) & 1
    fill = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, -a.shape[-1] % 8)])
    more = lambda a, b: jnp.concatenate(
        [a, jnp.broadcast_to(b[:, :, None], (*a.shape[:3], b.shape[-1])).astype(a.dtype)], axis=-1
    )
    arrays = fill(more(q, -APART * bits)), fill(more(k, 1 - bits)), v
    return dot_product_attention(*arrays, scale=q.shape[-1] ** -0.5, mask_type=MaskType.CAUSAL)


def joined_as_wide(q, k, v, segments):
    """Documents joined, with as many channels: what these cost alone."""
    wide = min(WIDEST, q.shape[-1] + channels(q.shape[1])) - q.shape[-1]
    q_wide, k_wide = (jnp.pad(a, [(0, 0)] * 3 + [(0, wide)]) for a in (q, k))
    return cudnn(q_wide, k_wide, v, q.shape[-1] ** -0.5)


def triton(block: int) -> Callable:
    """JAX's Pallas kernels for Triton, with blocks of this many keys and queries in the backward pass."""

    def attend(q, k, v, segments):
        from jax.experimental.pallas.ops.gpu import attention as pallas

        sizes = pallas.BlockSizes(128, 64, block, block, block, block)
        return pallas.mha(q, k, v, segments, q.shape[-1] ** -0.5, True, sizes)

    return attend


def ways() -> dict[str, Callable]:
    """From (q, k, v, segments) to the result; the first is the reference."""
    form = lambda name: lambda q, k, v, segments: causal_attention(q, k, v, segments_BT=segments, form=name)
    return {
        "blocks": form("blocks"),
        "joined": lambda q, k, v, segments: cudnn(q, k, v),
        "channels": form("channels"),
        "joined, heads as wide": joined_as_wide,
        "channels, narrow values": narrow_values,
        "packed, at most 32": packed(32),
        "packed, at most 256": packed(256),
        "Triton, 32": triton(32),
        "Triton, 64": triton(64),
        "full": form("full"),
    }


def gradients(attend: Callable) -> Callable:
    """From (q, k, v, dy, segments) to the result and its gradients."""

    def of(q, k, v, dy, segments):
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return y, *pull(dy)

    return of


def rows(B: int, T: int, H: int, K: int) -> Iterator[dict[str, Any]]:
    """Measure all ways at one shape. What fails is a row that says why."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((B, T, H, K), np.float32), jnp.bfloat16) for _ in range(4)]
    arrays.append(jnp.asarray(documents(rng, B, T)))
    expected = None
    for name, attend in ways().items():
        row: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"B": B, "T": T, "H": H, "K": K, "way": name}
        try:
            once = jax.jit(gradients(attend)).lower(*arrays).compile()
            found = [np.asarray(a[:1, :, :2], np.float32) for a in once(*arrays)]
            expected = expected or found
            wrong = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
            row["error"] = f"{np.max(wrong):.2g}"
            many = jax.jit(repeat(gradients(attend), TIMES)).lower(*arrays).compile()
            row["ms"] = f"{time_calls(functools.partial(many, *arrays)).median_s / TIMES * 1e3:.3f}"
            row["temporary_mb"] = f"{memory_bytes(once)['temporary'] / 1e6:.0f}"
        except Exception as error:  # the row says so, and the others are measured
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        yield row


def main() -> None:
    """Print the table."""
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    for shape in SHAPES:
        for row in rows(*shape):
            table.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
