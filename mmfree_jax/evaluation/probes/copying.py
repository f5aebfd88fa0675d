"""Copying: a string of random symbols, then the same string again."""

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
class Copying:
    """`( x1 .. xn = x1 .. xn`, with one string in each range of lengths [distances[q], distances[q + 1]).

    Source: Jelassi et al. 2024 (Repeat After Me, arXiv 2402.01032). A transformer of two layers copies strings that are
    exponentially long in its size: it finds the place by the last few symbols and reads on. A recurrent model has to
    carry the whole string through its state, n log2(symbols) bits, so it fails from some length on, whatever its
    training. Symbols are uniform and independent: chance is 1 in `symbols`.

    Distance: tokens from a symbol to its copy, n + 1.
    """

    symbols: int = 16
    distances: tuple[int, ...] = (4, 8, 16, 32, 64)

    def __post_init__(self) -> None:
        check_counts(self, symbols=2)
        check_distances(self.distances, 1)

    @property
    def description(self) -> str:
        return "The letters between ( and = come again, in the same order, after the =."

    @property
    def words(self) -> tuple[str, ...]:
        return (*names(self.symbols), "(", "=", ".")

    @property
    def answers(self) -> range:
        return range(self.symbols)

    @property
    def length(self) -> int:
        return 2 * (longest(self.distances) + len(self.distances) - 1)

    def rows(self, random: Random, count: int) -> Draw:
        begin, again, gap = range(self.symbols, self.symbols + 3)
        lengths = one_of_each(random, self.distances, count)
        starts = place(random, 2 * lengths + 2, self.length)
        tokens = np.full((count, self.length), gap)
        distance = np.zeros_like(tokens)
        every = np.arange(count)
        for start, n, most in zip(starts.T, lengths.T, self.distances[1:], strict=True):
            string = random.integers(self.symbols, count, most - 1)
            tokens[every, start], tokens[every, start + n + 1] = begin, again
            for first in (start + 1, start + n + 2):
                write(tokens, first, string, n)
            write(distance, start + n + 2, np.repeat(n[:, None] + 1, most - 1, axis=1), n)
        return at_tokens(tokens, distance)
