"""Held-out loss: the mean over the entire held-out text, from a compiled function that scores a batch."""

import math
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import numpy as np

from mmfree_jax.data import TokenSet, evaluation_windows
from mmfree_jax.distributed import put
from mmfree_jax.ops.fast import verification
from mmfree_jax.sharding import batch_sharding

EVALUATION_BATCH = 16  # sequences a device: enough to keep it busy, few enough for a laptop's memory
BLOCK = 16  # sequences of consecutive text that the standard error takes together, whatever the devices


Score = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Scores(TypedDict, total=False):
    """The result of `evaluate`; empty for a run that is not evaluated."""

    loss: float
    loss_se: float | None
    bpb: float
    tokens: int


def score_lines(scores: Scores) -> list[str]:
    """Return the scores as lines, NAME VALUE."""
    return [f"{name} {value:.6g}" for name, value in scores.items() if isinstance(value, int | float)]


def evaluate(score: Score, mesh: jax.sharding.Mesh, params: Any, token_set: TokenSet, sequence: int) -> Scores:
    """Compute the mean loss over the entire held-out split, every token except the first predicted once.

    score: compiled for `mesh`; (params, tokens_BT int32 [B, T+1], mask_BT bool [B, T]) -> nats and targets of each row.

    Returns `loss` (nats a token), `loss_se` (its standard error from the spread between blocks of `BLOCK` sequences of
    consecutive text, because tokens within a document are not independent; None for a single block), `bpb` (bits per
    byte of text) and `tokens`. On every mesh they are the same except for rounding.
    """
    batch = EVALUATION_BATCH * mesh.shape["data"] * mesh.shape["fsdp"]
    tokens_BT, mask_BT = (jax.ShapeDtypeStruct((batch, sequence + n), t) for n, t in ((1, np.int32), (0, bool)))
    with jax.set_mesh(mesh):
        verification.prepare(lambda: jax.eval_shape(score, params, tokens_BT, mask_BT))
    # Sums stay on the device until the end, so batches follow one another without waiting for the host.
    rows = batch_sharding(mesh)
    sums = [
        score(params, put(tokens_BT, rows), put(mask_BT, rows))
        for tokens_BT, mask_BT in evaluation_windows(token_set, sequence, batch)
    ]
    nats, counts = (np.concatenate(list(map(np.float64, column))) for column in zip(*jax.device_get(sums), strict=True))
    nats, counts = nats[counts > 0], counts[counts > 0]  # without the rows that fill up the last batch
    loss = nats.sum() / counts.sum()
    first_rows = np.arange(0, len(nats), BLOCK)
    return {
        "loss": float(loss),
        "loss_se": _ratio_standard_error(np.add.reduceat(nats, first_rows), np.add.reduceat(counts, first_rows)),
        "bpb": float(loss / math.log(2) / token_set.bytes_per_token("valid")),
        "tokens": int(counts.sum()),
    }


def _ratio_standard_error(nats: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sum(nats)/sum(counts) over blocks (Cochran 1977, eq. 6.9); None for a single one."""
    blocks = len(nats)
    if blocks < 2:
        return None
    # The loss is a ratio of two sums that both vary between blocks: its variance is that of nats - loss x count.
    residual = nats - nats.sum() / counts.sum() * counts
    return float(math.sqrt(blocks / (blocks - 1) * (residual**2).sum()) / counts.sum())
