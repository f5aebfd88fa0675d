"""Generation: prompts are read in chunks, then tokens are chosen by a program that runs many steps at a time."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import require
from mmfree_jax.inference.model import ServedModel
from mmfree_jax.inference.sampling import PLAIN, Sampling, choose, stacked
from mmfree_jax.models.language_model import DecodeState

CHUNK = 256  # tokens of a prompt that are read at a time, at most: bounds the memory for activations
SHORTEST = 16  # a prompt is filled up to a power of two from here on, so that few programs are compiled
PADDING, TEXT = 0, 1  # documents of a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A batch of rows that is being generated."""

    state: DecodeState
    logits_BV: jax.Array  # of the next token
    seen_BV: jax.Array  # tokens that have occurred
    counts_B: jax.Array  # how many tokens were chosen


@dataclasses.dataclass(frozen=True)
class Step:
    """What one chunk of decoding gave: tokens and their log-probabilities under the model, [B, N]."""

    tokens: np.ndarray
    logprobs: np.ndarray


def read_prompts(model: ServedModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> Progress:
    """Read prompts of any lengths, filled up on the left; `max_tokens` more have room behind the longest.

    Raises ConfigError for an empty prompt, and for tokens outside of the vocabulary.
    """
    V, longest = model.config.vocab, max(map(len, prompts), default=0)
    require(all(map(len, prompts)), "a prompt is empty: it needs at least one token")
    require(
        all(0 <= token < V for prompt in prompts for token in prompt), f"a prompt has a token outside of 0 to {V - 1}"
    )
    size = _filled(longest)
    tokens = np.zeros((len(prompts), size), np.int32)
    segments = np.full(tokens.shape, PADDING, np.int32)
    seen = np.zeros((len(prompts), V), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, size - len(prompt) :] = prompt
        segments[row, size - len(prompt) :] = TEXT
        seen[row, list(prompt)] = True
    state, logits = model.start(len(prompts), size + max_tokens), None
    for first in range(0, size, CHUNK):
        part = slice(first, first + CHUNK)
        logits, state = _read(model, tokens[:, part], segments[:, part], state)
    assert logits is not None
    return Progress(state, logits, jnp.asarray(seen), jnp.zeros(len(prompts), jnp.int32))


def _filled(longest: int) -> int:
    """The number of tokens that a batch of prompts is filled up to: whole chunks, or a power of two below one."""
    if longest > CHUNK:
        return -(-longest // CHUNK) * CHUNK
    return max(SHORTEST, 1 << (longest - 1).bit_length())


@jax.jit
def _read(model: ServedModel, tokens_BT: jax.Array, segments_BT: jax.Array, state: DecodeState):
    logits_BTV, state = model.extend(tokens_BT, state, segments_BT=segments_BT, last_only=True)
    return logits_BTV[:, -1], state


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="progress")
def decode(model: ServedModel, progress: Progress, settings: dict[str, jax.Array], steps: int):
    """Choose and read `steps` tokens of every row, in one program: no round trip to the host on the way.

    Returns progress, tokens [B, steps] and their log-probabilities, before temperature and filters.
    """

    def step(progress: Progress, _):
        token_B = choose(progress.logits_BV, progress.seen_BV, progress.counts_B, settings)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(progress.logits_BV), token_B[:, None], axis=-1)[:, 0]
        seen_BV = progress.seen_BV | (jnp.arange(progress.seen_BV.shape[1]) == token_B[:, None])
        logits_BTV, state = model.extend(token_B[:, None], progress.state)
        return Progress(state, logits_BTV[:, 0], seen_BV, progress.counts_B + 1), (token_B, logprob_B)

    progress, (tokens_TB, logprobs_TB) = jax.lax.scan(step, progress, None, length=steps)
    return progress, tokens_TB.T, logprobs_TB.T


def generate_tokens(
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling] = PLAIN,
    chunk: int = 16,
) -> Iterator[Step]:
    """Yield the tokens of all rows, `chunk` at a time and `max_tokens` in all; whoever has enough stops asking.

    sampling: of all rows, whose seeds then differ by their place; or one a row.
    """
    rows = list(sampling) if not isinstance(sampling, Sampling) else _by_row(sampling, len(prompts))
    settings, progress, left = stacked(rows), read_prompts(model, prompts, max_tokens), max_tokens
    while left:
        steps = min(chunk, left)
        progress, tokens_BT, logprobs_BT = decode(model, progress, settings, steps)
        yield Step(np.asarray(tokens_BT), np.asarray(logprobs_BT))
        left -= steps


def _by_row(sampling: Sampling, rows: int) -> list[Sampling]:
    return [dataclasses.replace(sampling, seed=(sampling.seed + row) % 2**32) for row in range(rows)]
