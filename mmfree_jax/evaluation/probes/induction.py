"""Induction: .. A B .. A, and B follows again."""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.architecture import require
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
)


@dataclass(frozen=True)
class Induction:
    """Noise in which some symbols A occur exactly twice, and what followed the first follows the second.

    Source: Olsson et al. 2022 (In-context Learning and Induction Heads, arXiv 2209.11895): two layers of attention form
    a head that looks for the token after an earlier occurrence of the present one. Unlike in `Recall`, nothing marks
    keys: every symbol may turn out to be one, and answers come from the same alphabet as the noise, so a recurrent
    state that cannot know what will be asked for has to hold all that it read. One pair of occurrences lies in each
    range of distances [distances[q], distances[q + 1]), and `noise` symbols at least lie around them. Which symbols are
    A differs from row to row, so over rows all symbols answer equally often: chance is 1 in `symbols`.

    Distance: tokens from the first B to the second.
    """

    symbols: int = 16
    distances: tuple[int, ...] = (4, 8, 16, 32, 64)
    noise: int = 8

    def __post_init__(self) -> None:
        check_counts(self, noise=0)
        check_distances(self.distances, 2)
        least = len(self.distances) + 1
        require(self.symbols >= least, f"symbols={self.symbols}: {least} are needed, one A a range and two for noise")

    @property
    def description(self) -> str:
        return "Some letters occur exactly twice, and both times the same letter follows."

    @property
    def words(self) -> tuple[str, ...]:
        return names(self.symbols)

    @property
    def answers(self) -> range:
        return range(self.symbols)

    @property
    def length(self) -> int:
        return longest(self.distances) + 2 * (len(self.distances) - 1) + self.noise

    def rows(self, random: Random, count: int) -> Draw:
        distances = one_of_each(random, self.distances, count)
        starts = place(random, distances + 2, self.length)
        symbols, asked = random.permutations(count, self.symbols), len(self.distances) - 1
        others = random.integers(self.symbols - asked, count, self.length)
        tokens = np.take_along_axis(symbols, asked + others, axis=1)
        distance = np.zeros_like(tokens)
        every = np.arange(count)
        for start, d, symbol in zip(starts.T, distances.T, symbols.T, strict=False):
            tokens[every, start] = tokens[every, start + d] = symbol
            tokens[every, start + d + 1] = tokens[every, start + 1]
            distance[every, start + d + 1] = d
        return at_tokens(tokens, distance)
