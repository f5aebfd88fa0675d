"""Rows of a probe from a seed: the same on every platform and with every version of Python and NumPy.

Most probes fill a row with one question at each range of distances, in random order and with random gaps. So distances
are balanced in every row, no position tells the distance, and a row is a lesson at all distances at once.
"""

import itertools
import math
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal, Protocol

import numpy as np

from mmfree_jax.architecture import require

Split = Literal["train", "test"]
STREAMS = ("train", "test", "choice")  # the last chooses among targets of rows of the second, independently of them


@dataclass(frozen=True)
class Draw:
    """Rows as a language model reads them: from tokens[:, :-1] it predicts tokens[:, 1:].

    tokens: int32 [N, T+1]. distance: int32 [N, T], at a scored target how far back its question reaches (each probe
    says in what), and 0 at all other targets, which mostly are random and cannot be predicted.
    """

    tokens: np.ndarray
    distance: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Which targets are scored, bool [N, T]."""
        return self.distance > 0


class Probe(Protocol):
    """What every probe has, beside the sizes that are its fields."""

    @property
    def description(self) -> str: ...  # the rule of the task, as a sentence for a reader or a language model
    @property
    def words(self) -> tuple[str, ...]: ...  # the text of each token; their number is the vocabulary
    @property
    def answers(self) -> range: ...  # the tokens that can be a scored target, each equally often: chance is 1 in that
    @property
    def length(self) -> int: ...  # T + 1, tokens of a row
    def rows(self, random: "Random", count: int) -> Draw: ...
    def __hash__(self) -> int: ...


class Random:
    """Random integers of one of `STREAMS`: raw output of PCG64 (O'Neill 2014), seeded through NumPy's SeedSequence.

    NumPy promises that these two stay as they are, but not the methods of its Generator (NEP 19): none is used.
    """

    def __init__(self, stream: str, seed: int) -> None:
        # The stream is part of the entropy: no seed of one gives the numbers of another.
        self._source = np.random.PCG64(np.random.SeedSequence([STREAMS.index(stream), seed]))

    def raw(self, *shape: int) -> np.ndarray:
        """Uniform 64-bit numbers, uint64 of this shape."""
        return self._source.random_raw(math.prod(shape)).reshape(shape)

    def integers(self, bounds: Any, *shape: int) -> np.ndarray:
        """Uniform integers from 0 to under `bounds` (a number or an array that broadcasts), int64 of this shape."""
        # High bits times the bound, shifted back (Lemire 2019): for a bound b the bias is under b / 2^32.
        high = self.raw(*shape) >> np.uint64(32)
        return ((high * np.asarray(bounds, np.uint64)) >> np.uint64(32)).astype(np.int64)

    def permutations(self, count: int, size: int) -> np.ndarray:
        """Independent permutations of 0 .. size - 1, int64 [count, size]."""
        return np.argsort(self.raw(count, size), axis=1, kind="stable")


def draw(probe: Probe, seed: int, count: int, split: Split = "train") -> Draw:
    """Draw `count` rows of a probe. Seeds are non-negative; each seed of each split is a stream of its own.

    Rows of the two splits are different because the streams are, and a row holds far more random bits than it takes to
    make repetition improbable; the shortest questions inside rows (a parity of two bits) recur of necessity.
    """
    return probe.rows(Random(split, seed), count)


def check_distances(distances: tuple[int, ...], least: int) -> None:
    """Raise ConfigError unless there are two limits or more, increasing, the first at least `least`."""
    rising = all(low < high for low, high in itertools.pairwise(distances))
    require(
        len(distances) >= 2 and rising and distances[0] >= least,
        f"distances={distances}: two or more increasing limits are needed, the first at least {least}",
    )


def check_counts(probe: Any, **least: int) -> None:
    """Raise ConfigError unless each field named is at least as large as said."""
    for name, bound in least.items():
        require(getattr(probe, name) >= bound, f"{name}={getattr(probe, name)}: must be at least {bound}")


def longest(distances: tuple[int, ...]) -> int:
    """Sum of the largest distances of all ranges: what a row has to have room for."""
    return sum(distances[1:]) - len(distances) + 1


def one_of_each(random: Random, distances: tuple[int, ...], count: int) -> np.ndarray:
    """Draw one distance in each range [distances[q], distances[q + 1]): int64 [count, Q]."""
    low, high = np.array(distances[:-1]), np.array(distances[1:])
    return low + random.integers(high - low, count, len(low))


def place(random: Random, lengths: np.ndarray, total: int) -> np.ndarray:
    """Place segments of these lengths, int [N, Q], in random order in `total` positions, with random gaps.

    Returns the first position of each, int64 [N, Q].
    """
    count, segments = lengths.shape
    order = random.permutations(count, segments)
    ordered = np.take_along_axis(lengths, order, axis=1)
    spare = total - lengths.sum(axis=1, keepdims=True)
    before = np.sort(random.integers(spare + 1, count, segments), axis=1)  # positions left free before each segment
    starts = np.empty_like(order)
    np.put_along_axis(starts, order, before + ordered.cumsum(axis=1) - ordered, axis=1)
    return starts


def write(tokens: np.ndarray, starts: np.ndarray, values: np.ndarray, lengths: np.ndarray | int | None = None) -> None:
    """Write the first lengths[n] of values[n] into row n of tokens [N, T+1], from starts[n] on; all if no lengths."""
    width = values.shape[1]
    used = np.arange(width) < np.reshape(width if lengths is None else lengths, (-1, 1))
    rows, columns = np.nonzero(np.broadcast_to(used, values.shape))
    tokens[rows, starts[rows] + columns] = values[rows, columns]


def at_tokens(tokens: np.ndarray, distance: np.ndarray) -> Draw:
    """Make a Draw from distances that are given at the answers' own positions, [N, T+1]."""
    return Draw(tokens.astype(np.int32), distance[:, 1:].astype(np.int32))


def names(count: int) -> tuple[str, ...]:
    """Distinct short words: A to Z, A1 to Z1, A2 ..."""
    return tuple(ascii_uppercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count))
