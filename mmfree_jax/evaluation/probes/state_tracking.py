"""State tracking: the product of a sequence of elements of a finite group."""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmfree_jax.architecture import check_choices
from mmfree_jax.evaluation.probes.drawing import (
    Draw,
    Random,
    at_tokens,
    check_distances,
    longest,
    one_of_each,
    place,
    write,
)

Permutation = tuple[int, ...]  # the image of each point
Group = Literal["Z2", "Z60", "S3", "A4xZ5", "A5", "S5"]


def _cycle(order: int) -> Permutation:
    return (*range(1, order), 0)


# Z60, A4xZ5 and A5 have 60 elements each, so they differ in structure only: commutative, solvable, not solvable.
GENERATORS: dict[Group, tuple[Permutation, ...]] = {
    "Z2": (_cycle(2),),
    "Z60": (_cycle(60),),
    "S3": ((1, 0, 2), _cycle(3)),
    "A4xZ5": ((1, 2, 0, 3, 4, 5, 6, 7, 8), (0, 2, 3, 1, 4, 5, 6, 7, 8), (0, 1, 2, 3, 5, 6, 7, 8, 4)),
    "A5": ((1, 2, 0, 3, 4), _cycle(5)),
    "S5": ((1, 0, 2, 3, 4), _cycle(5)),
}


@dataclass(frozen=True)
class StateTracking:
    """`( g1 .. gn = s` with s = gn ... g2 g1, the first applied first; one sequence in each range of lengths.

    Every element may change the answer, so no position may be skipped, and an answer to a shorter sequence is nowhere
    in the row: each sequence starts from the identity.

    Z2 is parity. For groups that are not solvable the product is complete for NC1 (Barrington 1989), while transformers
    and linear recurrences whose transition is diagonal stay within TC0: unless TC0 is all of NC1, no fixed depth of
    them follows A5 or S5 at every length (Merrill et al. 2024, The Illusion of State, arXiv 2404.08819). Solvable
    groups have shallow solutions, which transformers find, but which do not hold beyond the lengths trained on (Liu et
    al. 2022, Transformers Learn Shortcuts to Automata, arXiv 2210.10749). A diagonal recurrence whose factors lie
    between 0 and 1, such as the forget gate of the MLGRU, cannot flip a state, so in finite precision not even parity
    is followed at every length (Grazzi et al. 2024, arXiv 2411.12537). It can count the ones and tell odd counts from
    even ones as far as it was trained. So short sequences separate less than sequences beyond those trained on.

    Elements are uniform and independent, therefore so is the product: chance is 1 in the order of the group, even for
    a model that misses but one element. Distance: n, the elements multiplied.
    """

    group: Group = "Z2"
    distances: tuple[int, ...] = (2, 4, 8, 16, 32, 64)

    def __post_init__(self) -> None:
        check_choices(self)
        check_distances(self.distances, 1)

    @property
    def description(self) -> str:
        if self.group == "Z2":
            return "After the = stands 1 if the number of ones since the ( is odd, else 0."
        if self.group.startswith("Z"):
            return f"After the = stands the sum of the numbers since the (, modulo {len(elements(self.group))}."
        return "After the = stands the product of the permutations since the (, the first applied first."

    @property
    def words(self) -> tuple[str, ...]:
        cyclic = self.group.startswith("Z")
        spell = lambda g: str(g[0]) if cyclic else "".join(str(point + 1) for point in g)
        return (*map(spell, elements(self.group)), "(", "=", ".")

    @property
    def answers(self) -> range:
        return range(len(elements(self.group)))

    @property
    def length(self) -> int:
        return longest(self.distances) + 3 * (len(self.distances) - 1)

    def rows(self, random: Random, count: int) -> Draw:
        table = products(self.group)
        begin, equals, gap = range(len(table), len(table) + 3)
        lengths = one_of_each(random, self.distances, count)
        starts = place(random, lengths + 3, self.length)
        tokens = np.full((count, self.length), gap)
        distance = np.zeros_like(tokens)
        every = np.arange(count)
        for start, n, most in zip(starts.T, lengths.T, self.distances[1:], strict=True):
            factors = random.integers(len(table), count, most - 1)
            state = np.zeros(count, np.int64)
            for place_, factor in enumerate(factors.T):
                state = np.where(place_ < n, table[factor, state], state)
            tokens[every, start], tokens[every, start + n + 1] = begin, equals
            write(tokens, start + 1, factors, n)
            tokens[every, start + n + 2] = state
            distance[every, start + n + 2] = n
        return at_tokens(tokens, distance)


@functools.cache
def elements(group: Group) -> tuple[Permutation, ...]:
    """All elements of a group, in the order of their images: the identity is the first."""
    found = {tuple(range(len(GENERATORS[group][0])))}
    new = set(found)
    while new := {compose(g, h) for g in GENERATORS[group] for h in new} - found:
        found |= new
    return tuple(sorted(found))


def compose(g: Permutation, h: Permutation) -> Permutation:
    """The permutation that applies h, then g."""
    return tuple(g[point] for point in h)


@functools.cache
def products(group: Group) -> np.ndarray:
    """The table of the group: [a, b] is the element that applies b, then a; int64 [order, order]."""
    every = elements(group)
    number = {g: i for i, g in enumerate(every)}
    return np.array([[number[compose(g, h)] for h in every] for g in every])
