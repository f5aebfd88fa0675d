"""The programs of generation: one reads a prompt in pieces, into a state that then takes a slot of a batch; one chooses
and reads tokens for all slots, many steps at a time."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.inference.model import ServedModel
from mmfree_jax.inference.sampling import choose, choose_greedily
from mmfree_jax.models.language_model import DecodeState

PIECE = 256  # tokens of a prompt that are read at a time, at most: bounds the memory for activations
SHORTEST = 16  # a prompt's first piece is filled up to a power of two from here on, so that few programs are compiled
TOP = 20  # most likely tokens that are reported where a request asks for some
PADDING, TEXT = 0, 1  # documents of a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A batch of rows that is being generated."""

    state: DecodeState
    logits_BV: jax.Array  # of the next token
    seen_BV: jax.Array  # tokens that have occurred
    counts_B: jax.Array  # how many tokens were chosen


class Scored(NamedTuple):
    """Tokens [..., N] and their log-probabilities under the model, before temperature and filters; and where they were
    asked for, the most likely tokens at each place and theirs, [..., N, TOP], zeros elsewhere."""

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


@functools.partial(jax.jit, static_argnames=("slots", "capacity"))
def start(model: ServedModel, slots: int, capacity: int) -> Progress:
    """Return a batch of `slots` rows that hold nothing; `capacity` as in `LanguageModel.start`."""
    V = model.config.vocab
    logits_BV, seen_BV = jnp.zeros((slots, V), jnp.float32), jnp.zeros((slots, V), bool)
    return Progress(model.start(slots, capacity), logits_BV, seen_BV, jnp.zeros(slots, jnp.int32))


@functools.partial(jax.jit, donate_argnames="progress")
def seated(progress: Progress, one: Progress, slot: jax.Array) -> Progress:
    """Put a row, a batch of one, into a slot of a batch, in the place of what was there."""
    put = lambda all, row: jax.lax.dynamic_update_index_in_dim(all, row[0].astype(all.dtype), slot, 0)
    return jax.tree.map(put, progress, one)


class Reading:
    """A prompt that is being read. Its first piece is filled up on the left, with padding that no state remembers.

    scored: whether to compute the log-probabilities of the prompt's own tokens, from the second on.
    """

    def __init__(self, model: ServedModel, prompt: Sequence[int], capacity: int, scored: bool = False):
        self.prompt = np.asarray(prompt, np.int32)
        self.scores: list[Scored] | None = [] if scored else None
        first = (len(prompt) - 1) % PIECE + 1
        padding = max(SHORTEST, 1 << (first - 1).bit_length()) - first
        tokens = np.concatenate([np.zeros(padding, np.int32), self.prompt])
        cuts = [0, *range(first + padding, len(tokens), PIECE), len(tokens)]
        self._pieces = collections.deque(tokens[a:b] for a, b in itertools.pairwise(cuts))
        self._model, self._state = model, _start_at(model, -padding, capacity)
        self._read = -padding  # tokens read, from the first of the prompt on
        self._logits_BV: jax.Array | None = None

    @property
    def done(self) -> bool:
        """Whether all of it is read."""
        return not self._pieces

    def read_piece(self) -> int:
        """Read the next piece. Returns the number of its tokens, padding included."""
        tokens_BT = self._pieces.popleft()[None]
        T = tokens_BT.shape[1]
        places_T = self._read + np.arange(T)
        segments_BT = np.where(places_T < 0, PADDING, TEXT).astype(np.int32)[None]
        if self.scores is None:
            self._logits_BV, self._state = _read(self._model, tokens_BT, segments_BT, self._state)
        else:
            targets_BT = self.prompt[np.clip(places_T + 1, 0, len(self.prompt) - 1)][None]
            arguments = self._model, tokens_BT, segments_BT, targets_BT, self._state
            self._logits_BV, scored, self._state = _read_and_score(*arguments)
            wanted = (places_T >= 0) & (places_T + 1 < len(self.prompt))
            self.scores.append(Scored(*(np.asarray(a)[0, wanted] for a in scored)))
        self._read += T
        return T

    def progress(self) -> Progress:
        """Return what has been read as a batch of one row."""
        assert self._logits_BV is not None
        seen_BV = np.zeros(self._logits_BV.shape, bool)
        seen_BV[0, self.prompt] = True
        return Progress(self._state, self._logits_BV, jnp.asarray(seen_BV), jnp.zeros(1, jnp.int32))


@functools.partial(jax.jit, static_argnames="capacity")
def _start_at(model: ServedModel, position: jax.Array, capacity: int) -> DecodeState:
    state = model.start(1, capacity)
    return dataclasses.replace(state, position_B=state.position_B + position)


@functools.partial(jax.jit, donate_argnames="state")
def _read(model: ServedModel, tokens_BT: jax.Array, segments_BT: jax.Array, state: DecodeState):
    logits_BTV, state = model.extend(tokens_BT, state, segments_BT=segments_BT, last_only=True)
    return logits_BTV[:, -1], state


@functools.partial(jax.jit, donate_argnames="state")
def _read_and_score(model: ServedModel, tokens_BT, segments_BT, targets_BT, state: DecodeState):
    logits_BTV, state = model.extend(tokens_BT, state, segments_BT=segments_BT)
    return logits_BTV[:, -1], _scored(logits_BTV, targets_BT, True), state


def _scored(logits: jax.Array, tokens: jax.Array, with_top: jax.Array | bool | None) -> Scored:
    """Score tokens [...] by logits [..., V]; None: without the most likely tokens."""
    normaliser, count = jax.nn.logsumexp(logits, axis=-1, keepdims=True), min(TOP, logits.shape[-1])
    logprobs = (jnp.take_along_axis(logits, tokens[..., None], axis=-1) - normaliser)[..., 0]

    def top() -> tuple[jax.Array, jax.Array]:
        values, numbers = jax.lax.top_k(logits, count)
        return numbers.astype(jnp.int32), values - normaliser

    shape = (*tokens.shape, count)
    none = lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype))
    return Scored(tokens, logprobs, *(none() if with_top is None else jax.lax.cond(with_top, top, none)))


@functools.partial(jax.jit, static_argnames=("steps", "greedy"), donate_argnames="progress")
def decode(
    model: ServedModel,
    progress: Progress,
    settings: dict[str, jax.Array],
    steps: int,
    with_top: jax.Array | bool = False,
    greedy: bool = False,
) -> tuple[Progress, Scored]:
    """Choose and read `steps` tokens of every row, in one program: no round trip to the host on the way.

    settings: of `sampling.stacked`. with_top: whether to report the most likely tokens too. greedy: compile for rows
    that all have temperature 0 and no `with_top`: nothing is left to decide on the way, which a GPU would ask its host.
    Returns the progress and what was chosen, [B, steps].
    """

    def step(progress: Progress, _):
        chosen = _choose(progress, settings, with_top, greedy)
        seen_BV = progress.seen_BV | (jnp.arange(progress.seen_BV.shape[1]) == chosen.tokens[:, None])
        logits_BTV, state = model.extend(chosen.tokens[:, None], progress.state)
        return Progress(state, logits_BTV[:, 0], seen_BV, progress.counts_B + 1), chosen

    progress, chosen = jax.lax.scan(step, progress, None, length=steps)
    return progress, Scored(*(a.swapaxes(0, 1) for a in chosen))


def _choose(
    progress: Progress, settings: dict[str, jax.Array], with_top: jax.Array | bool, greedy: bool = False
) -> Scored:
    choice = choose_greedily if greedy else choose
    token_B = choice(progress.logits_BV, progress.seen_BV, progress.counts_B, settings)
    return _scored(progress.logits_BV, token_B, None if greedy else with_top)


@jax.jit
def choose_next(progress: Progress, settings: dict[str, jax.Array]) -> Scored:
    """Choose one token of every row, [B, 1], and read nothing."""
    return Scored(*(a[:, None] for a in _choose(progress, settings, True)))
