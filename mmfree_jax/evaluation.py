"""How good a model is on text that it was not trained on."""

import math
from typing import Any, TypedDict

import jax
import numpy as np

from mmfree_jax.data import TokenSet, evaluation_windows
from mmfree_jax.ops.fast import verification
from mmfree_jax.training.step import Program

EVALUATION_BATCH = 16  # sequences a device: enough to keep it busy, few enough for a laptop's memory
BLOCK = 16  # sequences of consecutive text that the standard error takes together, whatever the devices


class Scores(TypedDict, total=False):
    """What `evaluate` finds; empty where it was not asked."""

    loss: float
    loss_se: float | None
    bpb: float
    tokens: int


def shown(scores: Scores) -> list[str]:
    """What is known, as NAME VALUE."""
    return [f"{name} {value:.6g}" for name, value in scores.items() if isinstance(value, int | float)]


def evaluate(program: Program, params: Any, token_set: TokenSet, sequence: int) -> Scores:
    """Mean loss over the whole held-out split, every token but the first predicted once.

    Returns `loss` (nats a token), `loss_se` (its standard error from the spread between blocks of `BLOCK` sequences of
    consecutive text: tokens within a document are not independent; None for a single block), `bpb` (bits per byte of
    text) and `tokens`: but for rounding the same on every mesh.
    """
    shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    batch = EVALUATION_BATCH * shards
    tokens_BT, mask_BT = (jax.ShapeDtypeStruct((batch, sequence + n), t) for n, t in ((1, np.int32), (0, bool)))
    with jax.set_mesh(program.mesh):
        verification.prepare(lambda: jax.eval_shape(program.evaluate, params, tokens_BT, mask_BT))
    sums = [
        program.evaluate(params, program.place(tokens_BT), program.place(mask_BT))
        for tokens_BT, mask_BT in evaluation_windows(token_set, sequence, batch)
    ]
    nats, counts = (np.concatenate(list(map(np.float64, of_all))) for of_all in zip(*jax.device_get(sums), strict=True))
    nats, counts = nats[counts > 0], counts[counts > 0]  # without what filled up the last batch
    loss = nats.sum() / counts.sum()
    bits_per_token = loss / math.log(2)
    return {
        "loss": float(loss),
        "loss_se": _ratio_standard_error(_blocks(nats), _blocks(counts)),
        "bpb": float(bits_per_token / token_set.bytes_per_token("valid")),
        "tokens": int(counts.sum()),
    }


def _blocks(of_sequences: np.ndarray) -> np.ndarray:
    """Sums over `BLOCK` sequences each; the last block has what is left."""
    return np.add.reduceat(of_sequences, np.arange(0, len(of_sequences), BLOCK))


def _ratio_standard_error(nats: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sum(nats)/sum(counts) over blocks (Cochran 1977, eq. 6.9); None for a single one."""
    blocks = len(nats)
    if blocks < 2:
        return None
    residual = nats - nats.sum() / counts.sum() * counts
    return float(math.sqrt(blocks / (blocks - 1) * (residual**2).sum()) / counts.sum())
