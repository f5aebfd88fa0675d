"""Associative recall: which value belongs to this key? `Recall` asks for many pairs, `LongRecall` for distant ones.

Chance, for a guess that reads nothing, is 1 in `values`. A model that knows the row's values but not their keys is
right with probability 1/pairs + (1 - 1/pairs)/values: 0.09 in the default `Recall`, 0.18 in the default `LongRecall`.
"""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.architecture import require
from mmfree_jax.evaluation.probes.drawing import Draw, Random, at_tokens, check_counts, check_distances, names, write

DESCRIPTION = "Each key in capital letters is followed by its value in small letters."


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall: pairs of a key and a value, then as many of them again, drawn with replacement.

    Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), who find that this explains most of the difference in
    perplexity between attention and gated convolutions or recurrences on text. Attention looks a pair up however many
    there are; a recurrent state has to hold all of them, so its accuracy falls when `pairs` outgrows the state. Keys
    asked for and values are drawn with replacement: answers already given exclude nothing. (If every key came once, a
    model could name the values left over. Small transformers learn that first, and then nothing else.)

    Distance: tokens from the last place where the value stood after its key.
    """

    pairs: int = 16
    keys: int = 32
    values: int = 32

    def __post_init__(self) -> None:
        check_counts(self, pairs=1, values=2)
        require(self.pairs <= self.keys, f"pairs={self.pairs}: keys of a row are distinct, and there are {self.keys}")

    @property
    def description(self) -> str:
        return DESCRIPTION

    @property
    def words(self) -> tuple[str, ...]:
        return names(self.keys) + tuple(map(str.lower, names(self.values)))

    @property
    def answers(self) -> range:
        return range(self.keys, self.keys + self.values)

    @property
    def length(self) -> int:
        return 4 * self.pairs

    def rows(self, random: Random, count: int) -> Draw:
        pairs = _pairs(self, random, count)  # [N, pairs, 2]
        asked = random.integers(self.pairs, count, self.pairs)
        again = np.take_along_axis(pairs, asked[:, :, None], axis=1)
        tokens = np.concatenate([pairs, again], axis=1).reshape(count, self.length)
        distance = np.zeros_like(tokens)
        every, last = np.arange(count), np.tile(2 * np.arange(self.pairs) + 1, (count, 1))
        for answer, pair in zip(range(2 * self.pairs + 1, self.length, 2), asked.T, strict=True):
            distance[:, answer] = answer - last[every, pair]
            last[every, pair] = answer
        return at_tokens(tokens, distance)


@dataclass(frozen=True)
class LongRecall:
    """A few pairs, then noise of other symbols, in which keys come back with their values, farther and farther away.

    The pairs are so few that a small state holds them. What is tested is how long it holds them: a gate that forgets
    one part in a hundred at each token has lost the pair after some hundreds, attention reads it wherever it is.
    One question lies in each range of positions after the pairs, [distances[q], distances[q + 1]), about a pair drawn
    with replacement. The pairs begin after up to `lead` symbols of noise.

    Distance: tokens from the last place where the value stood after its key.
    """

    pairs: int = 8
    keys: int = 16
    values: int = 16
    noise: int = 16
    distances: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    lead: int = 32

    def __post_init__(self) -> None:
        check_counts(self, pairs=1, values=2, noise=1, lead=0)
        check_distances(self.distances, 0)
        require(self.pairs <= self.keys, f"pairs={self.pairs}: keys of a row are distinct, and there are {self.keys}")
        wide = all(high - low >= 2 for low, high in zip(self.distances, self.distances[1:], strict=False))
        require(wide, f"distances={self.distances}: a question takes two tokens, so limits differ by 2 at least")

    @property
    def description(self) -> str:
        return f"{DESCRIPTION} Numbers mean nothing."

    @property
    def words(self) -> tuple[str, ...]:
        return names(self.keys) + tuple(map(str.lower, names(self.values))) + tuple(map(str, range(self.noise)))

    @property
    def answers(self) -> range:
        return range(self.keys, self.keys + self.values)

    @property
    def length(self) -> int:
        return self.lead + 2 * self.pairs + self.distances[-1]

    def rows(self, random: Random, count: int) -> Draw:
        pairs = _pairs(self, random, count)
        tokens = self.keys + self.values + random.integers(self.noise, count, self.length)
        distance = np.zeros_like(tokens)
        start = random.integers(self.lead + 1, count)
        write(tokens, start, pairs.reshape(count, 2 * self.pairs))
        # The answer to question q stands `after` tokens after the pairs, its key just before it.
        low, high = np.array(self.distances[:-1]), np.array(self.distances[1:])
        after = low + 1 + random.integers(high - low - 1, count, len(low))
        asked = random.integers(self.pairs, count, len(low))
        every, last = np.arange(count), start[:, None] + 2 * np.arange(self.pairs) + 1
        for q, pair in enumerate(asked.T):
            answer = start + 2 * self.pairs + after[:, q]
            write(tokens, answer - 1, pairs[every, pair])
            distance[every, answer] = answer - last[every, pair]
            last[every, pair] = answer
        return at_tokens(tokens, distance)


def _pairs(probe: Recall | LongRecall, random: Random, count: int) -> np.ndarray:
    """Pairs of a key and a value, int64 [count, pairs, 2]: keys of a row distinct, values independent."""
    keys = random.permutations(count, probe.keys)[:, : probe.pairs]
    return np.stack([keys, probe.keys + random.integers(probe.values, count, probe.pairs)], axis=2)
