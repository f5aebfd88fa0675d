"""Counting: how often did this symbol occur in the string?"""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.evaluation.probes.drawing import (
    Draw,
    Random,
    at_tokens,
    check_counts,
    check_distances,
    longest,
    names,
    one_of_each,
    place,
    write,
)


@dataclass(frozen=True)
class Counting:
    """`( x1 .. xn ? A c`: A occurs c times among x1 .. xn; one string in each range of lengths.

    Source: Yehudai et al. 2024 (When Can Transformers Count to n?, arXiv 2407.15160). A recurrence adds: one channel a
    symbol is enough. Attention averages, so it has a frequency and must multiply it by a length that it does not know,
    and gets harder as strings grow longer than those in training. A is named only after the string, so all symbols
    have to be counted. The count is uniform from 0 to `most` whatever the length, so neither length nor frequency of
    the other symbols gives it away: chance is 1 in most + 1.

    Distance: n, the symbols counted over.
    """

    symbols: int = 8
    most: int = 9
    distances: tuple[int, ...] = (16, 32, 64, 128)

    def __post_init__(self) -> None:
        check_counts(self, symbols=2, most=1)
        check_distances(self.distances, self.most)  # the shortest string has room for the largest count

    @property
    def description(self) -> str:
        return "After the ? stands a letter, and how many times it occurs between the ( and the ?."

    @property
    def words(self) -> tuple[str, ...]:
        return (*names(self.symbols), *map(str, range(self.most + 1)), "(", "?", ".")

    @property
    def answers(self) -> range:
        return range(self.symbols, self.symbols + self.most + 1)

    @property
    def length(self) -> int:
        return longest(self.distances) + 4 * (len(self.distances) - 1)

    def rows(self, random: Random, count: int) -> Draw:
        begin, ask, gap = range(self.answers.stop, self.answers.stop + 3)
        lengths = one_of_each(random, self.distances, count)
        starts = place(random, lengths + 4, self.length)
        tokens = np.full((count, self.length), gap)
        distance = np.zeros_like(tokens)
        every = np.arange(count)
        for start, n, longest_n in zip(starts.T, lengths.T, self.distances[1:], strict=True):
            asked, times = random.integers(self.symbols, count), random.integers(self.most + 1, count)
            others = asked[:, None] + 1 + random.integers(self.symbols - 1, count, longest_n - 1)
            string = np.where(_chosen(random, n, times, longest_n - 1), asked[:, None], others % self.symbols)
            tokens[every, start], tokens[every, start + n + 1] = begin, ask
            write(tokens, start + 1, string, n)
            write(tokens, start + n + 2, np.stack([asked, self.symbols + times], axis=1))
            distance[every, start + n + 3] = n
        return at_tokens(tokens, distance)


def _chosen(random: Random, lengths: np.ndarray, times: np.ndarray, width: int) -> np.ndarray:
    """Choose times[n] of the first lengths[n] positions of row n at random, bool [N, width]."""
    keys = random.raw(len(lengths), width)
    keys[np.arange(width) >= lengths[:, None]] = np.iinfo(np.uint64).max  # behind all that count
    ranks = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable")
    return ranks < times[:, None]
