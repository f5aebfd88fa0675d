"""Log-likelihoods of continuations, for any number of requests of any length, in few compiled shapes.

Requests with the same input share one forward pass, as the choices of a question do whose answers are single tokens.
Inputs are packed into rows as documents that do not see each other, longest first; a row has the length of the power of
two that holds its longest input. The head computes the logits of scored places only. Every device has a copy of the
model, and batches go to the devices in turn.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.config import require
from mmfree_jax.inference.model import ServedModel
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.cross_entropy import head_logits
from mmfree_jax.ops.fast import verification

SHORTEST = 128  # tokens of a row, at least
BATCH_TOKENS = 8192  # of a batch, unless a single row is longer
PLACES = 512  # scored in one call of the head
AHEAD = 2  # batches a device that wait for it while others are read back
PADDING = 0  # the document number of what fills up a row

Request = tuple[Sequence[int], Sequence[int]]  # context and continuation
Answer = tuple[float, bool]  # log-probability in nats; whether every token was the most likely one


class Scorable(NamedTuple):
    """A model as jitted functions take it: `arrays` make the model with `graph`, or are it where that is None."""

    graph: nnx.GraphDef | None
    arrays: Any


def scorable(model: LanguageModel | ServedModel) -> Scorable:
    """Make a model ready to score."""
    return Scorable(None, model) if isinstance(model, ServedModel) else Scorable(*nnx.split(model))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef | None, arrays: Any, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    model = arrays if graph is None else nnx.merge(graph, arrays)
    return model.hidden(tokens_BT, segments_BT=segments_BT)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graph: nnx.GraphDef | None, arrays: Any, x_BTD: jax.Array, places_P: jax.Array, targets_P: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target after its place, and whether no token has a higher one."""
    x_1PD = x_BTD.reshape(1, -1, x_BTD.shape[-1])[:, places_P]
    if graph is None:
        logits_PV = arrays.logits(x_1PD)[0]
    else:
        model = nnx.merge(graph, arrays)
        logits_PV = head_logits(*model.head(x_1PD, model.embedding[...]))[0]
    hit_P = jnp.take_along_axis(logits_PV, targets_P[:, None], axis=-1)[:, 0]
    return hit_P - jax.nn.logsumexp(logits_PV, axis=-1), hit_P >= jnp.max(logits_PV, axis=-1)


@dataclasses.dataclass
class Input:
    """Tokens to read, and what to score: for each target its request, its place among the tokens, and itself."""

    tokens: tuple[int, ...]
    targets: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of inputs. Targets are scored at `places`, counted over all rows; `requests` says for whom."""

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    places_N: np.ndarray
    targets_N: np.ndarray
    requests_N: np.ndarray


def log_likelihoods(
    model: Scorable,
    requests: Sequence[Request],
    max_length: int,
    done: Callable[[int, Answer], None] = lambda request, answer: None,
    devices: Sequence[jax.Device] | None = None,
) -> list[Answer]:
    """Compute the log-probability of each continuation after its context, and whether greedy decoding would give it.

    max_length: tokens that the model reads at most; of longer requests the first are left out. done: called as soon as
    a request is answered, in any order. devices: default all of this process.
    Raises ConfigError for an empty context or continuation, or a continuation longer than max_length.
    """
    inputs = unique_inputs(requests, max_length)
    devices = list(devices or jax.local_devices())
    copies = [jax.device_put(model.arrays, device) for device in devices]
    left = np.bincount([n for one in inputs for n, _, _ in one.targets], minlength=len(requests))
    totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for batch, (logprobs_N, greedy_N) in _computed(model, batches(inputs), copies, devices):
        np.add.at(totals, batch.requests_N, logprobs_N)
        np.logical_and.at(greedy, batch.requests_N, greedy_N)
        np.subtract.at(left, batch.requests_N, 1)
        for n in np.unique(batch.requests_N):
            if left[n] == 0:
                done(int(n), (float(totals[n]), bool(greedy[n])))
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))


def unique_inputs(requests: Sequence[Request], max_length: int) -> list[Input]:
    """Return the different inputs of requests, longest first. Raises as `log_likelihoods`."""
    found: dict[tuple[int, ...], Input] = {}
    for n, (context, continuation) in enumerate(requests):
        require(len(context) > 0 and len(continuation) > 0, "a context and a continuation need a token each")
        fits = f"a continuation has {len(continuation)} tokens, and the model reads {max_length} at most"
        require(len(continuation) <= max_length, fits)
        tokens = (*context, *continuation)[-max_length - 1 : -1]
        one = found.setdefault(tokens, Input(tokens))
        first = len(tokens) - len(continuation)
        one.targets += [(n, first + i, token) for i, token in enumerate(continuation)]
    return sorted(found.values(), key=lambda one: -len(one.tokens))


def batches(inputs: Sequence[Input]) -> Iterator[Batch]:
    """Pack inputs, longest first, into rows and rows of one length into batches."""
    by_length: dict[int, list[list[Input]]] = collections.defaultdict(list)
    for row in rows(inputs):
        by_length[row_length(len(row[0].tokens))].append(row)
    for length, of_length in by_length.items():
        most = max(1, BATCH_TOKENS // length)
        for first in range(0, len(of_length), most):
            some = of_length[first : first + most]
            yield _batch(some, length, min(most, 1 << (len(some) - 1).bit_length()))


def rows(inputs: Sequence[Input]) -> list[list[Input]]:
    """Put each input into the row that it fills best (best fit by falling length), or open one."""
    found: list[list[Input]] = []
    by_room: dict[int, list[list[Input]]] = collections.defaultdict(list)  # rows by the tokens that they have room for
    for one in inputs:
        size = len(one.tokens)
        fitting = [room for room, rows_with in by_room.items() if room >= size and rows_with]
        room = min(fitting, default=row_length(size))
        row = by_room[room].pop() if fitting else []
        if not fitting:
            found.append(row)
        row.append(one)
        by_room[room - size].append(row)
    return found


def row_length(tokens: int) -> int:
    """Return the length of the row that an input opens: a power of two."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def _batch(some: Sequence[Sequence[Input]], length: int, count: int) -> Batch:
    tokens_BT, segments_BT = (np.zeros((count, length), np.int32) for _ in range(2))
    scored: list[tuple[int, int, int]] = []
    for b, row in enumerate(some):
        first = 0
        for number, one in enumerate(row, start=PADDING + 1):
            part = slice(first, first + len(one.tokens))
            tokens_BT[b, part], segments_BT[b, part] = one.tokens, number
            scored += [(n, b * length + first + place, token) for n, place, token in one.targets]
            first = part.stop
    requests_N, places_N, targets_N = np.array(scored, np.int32).T
    return Batch(tokens_BT, segments_BT, places_N, targets_N, requests_N)


def _computed(
    model: Scorable, every: Iterable[Batch], copies: Sequence[Any], devices: Sequence[jax.Device]
) -> Iterator[tuple[Batch, tuple[np.ndarray, np.ndarray]]]:
    """Yield each batch with the log-probability of each target, and whether it is the most likely token."""
    waiting: collections.deque[tuple[Batch, list[Any]]] = collections.deque()
    for number, batch in enumerate(every):
        turn = number % len(devices)
        waiting.append((batch, _start(model, batch, copies[turn], devices[turn])))
        if len(waiting) > AHEAD * len(devices):
            yield _finish(*waiting.popleft())
    while waiting:
        yield _finish(*waiting.popleft())


def _start(model: Scorable, batch: Batch, arrays: Any, device: jax.Device) -> list[Any]:
    """Begin to compute a batch on a device; returns arrays [PLACES] that may not be there yet."""
    put = lambda a: jax.device_put(a, device)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (batch.tokens_BT, batch.segments_BT))
    hidden, score = (functools.partial(program, model.graph) for program in (_hidden, _score))
    verification.prepare(lambda: jax.eval_shape(hidden, arrays, *shapes))
    x_BTD = hidden(arrays, put(batch.tokens_BT), put(batch.segments_BT))
    padding = -len(batch.places_N) % PLACES
    places, targets = (np.pad(a, (0, padding)).reshape(-1, PLACES) for a in (batch.places_N, batch.targets_N))
    return [score(arrays, x_BTD, put(p), put(t)) for p, t in zip(places, targets, strict=True)]


def _finish(batch: Batch, pieces: list[Any]) -> tuple[Batch, tuple[np.ndarray, np.ndarray]]:
    logprobs, greedy = zip(*jax.device_get(pieces), strict=True)
    count = len(batch.places_N)
    return batch, (np.concatenate(logprobs)[:count].astype(np.float64), np.concatenate(greedy)[:count])
