"""Held-out loss, from a compiled function that scores a batch: sums by document, and by how much text a target is
predicted from."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from mmfree_jax.data import TokenSet, evaluation_windows
from mmfree_jax.data.reading.documents import tokens_seen
from mmfree_jax.distributed import put
from mmfree_jax.ops.fast import verification
from mmfree_jax.sharding import batch_sharding

EVALUATION_BATCH = 16  # sequences a device: enough to keep it busy, few enough for a laptop's memory
AHEAD = 2  # batches that the device has waiting while the host sums up the one before

Nats = Callable[[Any, jax.Array], jax.Array]


class Scores(TypedDict, total=False):
    """The result of `evaluate`; empty for a run that is not evaluated."""

    loss: float
    loss_se: float | None
    bpb: float
    tokens: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens to score, every one but the first predicted once.

    tokens: slices of it are arrays. starts: int64 [documents], the first token of each. bytes: of the UTF-8 text that
    the tokens stand for. name: what a row calls it.
    """

    tokens: Any
    starts: np.ndarray
    bytes: int
    name: str = ""

    @staticmethod
    def held_out(token_set: TokenSet) -> "Text":
        """Return the held-out split of a token set."""
        split = token_set.split("valid")
        name = f"{token_set.sets[0].fingerprint}:valid"
        return Text(split, split.document_starts(), token_set.text_bytes("valid"), name)


class Sums(NamedTuple):
    """Sums over targets, float64 [documents, reaches]: a target of reach r is predicted from 2^r to 2^(r+1) - 1 tokens
    before it in its window (with separate documents: in its document too)."""

    nats: np.ndarray
    targets: np.ndarray


def score_lines(scores: Scores) -> list[str]:
    """Return the scores as lines, NAME VALUE."""
    return [f"{name} {value:.6g}" for name, value in scores.items() if isinstance(value, int | float)]


def evaluate(nats: Nats, mesh: jax.sharding.Mesh, params: Any, token_set: TokenSet, sequence: int) -> Scores:
    """Compute the mean loss over the entire held-out split; arguments as in `document_sums`.

    Returns `loss` (nats a token), `loss_se` (its standard error from the spread between documents, because tokens
    within one are not independent; None for a single document), `bpb` (bits per byte of text), `tokens` and
    `documents`. On every mesh they are the same except for rounding.
    """
    text = Text.held_out(token_set)
    return scores(document_sums(nats, mesh, params, text, sequence), text)


def document_sums(
    nats: Nats,
    mesh: jax.sharding.Mesh,
    params: Any,
    text: Text,
    sequence: int,
    separator: int | None = None,
) -> Sums:
    """Score a text in windows of `sequence` tokens, in order.

    nats: compiled for `mesh`; (params, tokens_BT int32 [B, T+1]) -> nats of each target [B, T], whole in every process.
    separator: the token after which a document begins, where documents do not see each other; else None.
    """
    batch = EVALUATION_BATCH * mesh.shape["data"] * mesh.shape["fsdp"]
    with jax.set_mesh(mesh):
        shape = jax.ShapeDtypeStruct((batch, sequence + 1), np.int32)
        verification.prepare(lambda: jax.eval_shape(nats, params, shape))
    starts, reaches = text.starts, sequence.bit_length()
    sums = Sums(*(np.zeros((len(starts), reaches)) for _ in Sums._fields))
    rows, first = batch_sharding(mesh), 1

    def started() -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array]]:
        for tokens_BT, mask_BT in evaluation_windows(text.tokens, sequence, batch):
            yield tokens_BT, mask_BT, nats(params, put(tokens_BT, rows))

    for tokens_BT, mask_BT, found_BT in _in_flight(started()):
        count = int(mask_BT.sum())
        seen_BT = tokens_seen(tokens_BT[:, :-1], separator)
        reach = np.frexp(seen_BT[mask_BT])[1] - 1  # floor of the binary logarithm, exactly
        document = np.searchsorted(starts, np.arange(first, first + count), side="right") - 1
        _add(sums, document, reach, np.asarray(jax.device_get(found_BT), np.float64)[mask_BT])
        first += count
    return sums


def _in_flight(started: Iterator[Any]) -> Iterator[Any]:
    """Yield what was started in order, each once AHEAD more have been: the device never waits for the host."""
    waiting: collections.deque[Any] = collections.deque()
    for one in started:
        waiting.append(one)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def _add(sums: Sums, document: np.ndarray, reach: np.ndarray, nats: np.ndarray) -> None:
    """Add the targets of a stretch of text, whose documents ascend, to the sums."""
    low, high, reaches = document[0], document[-1] + 1, sums.nats.shape[1]
    place = (document - low) * reaches + reach
    for total, weights in ((sums.nats, nats), (sums.targets, None)):
        found = np.bincount(place, weights, minlength=(high - low) * reaches)
        total[low:high] += found.reshape(-1, reaches)


def scores(sums: Sums, text: Text) -> Scores:
    """Return the means of all targets of a text; see `evaluate`."""
    nats, targets = sums.nats.sum(axis=1), sums.targets.sum(axis=1)
    loss = float(nats.sum() / targets.sum())
    return {
        "loss": loss,
        "loss_se": ratio_standard_error(nats, targets),
        "bpb": loss / math.log(2) / (text.bytes / len(text.tokens)),
        "tokens": int(targets.sum()),
        "documents": int((targets > 0).sum()),
    }


def by_reach(sums: Sums) -> list[dict[str, Any]]:
    """Return the loss at each reach: `seen_from` and `seen_to` (tokens before the target), loss, loss_se, tokens."""
    rows = []
    for reach, (nats, targets) in enumerate(zip(sums.nats.T, sums.targets.T, strict=True)):
        if targets.sum():
            loss, error = float(nats.sum() / targets.sum()), ratio_standard_error(nats, targets)
            seen = {"seen_from": 1 << reach, "seen_to": (2 << reach) - 1}
            rows.append({**seen, "loss": loss, "loss_se": error, "tokens": int(targets.sum())})
    return rows


def ratio_standard_error(nats: np.ndarray, targets: np.ndarray) -> float | None:
    """Standard error of sum(nats)/sum(targets) over documents (Cochran 1977, eq. 6.9); None for a single one."""
    nats, targets = nats[targets > 0], targets[targets > 0]
    documents = len(nats)
    if documents < 2:
        return None
    # The loss is a ratio of two sums that both vary between documents: its variance is that of nats - loss x targets.
    residual = nats - nats.sum() / targets.sum() * targets
    return float(math.sqrt(documents / (documents - 1) * (residual**2).sum()) / targets.sum())
