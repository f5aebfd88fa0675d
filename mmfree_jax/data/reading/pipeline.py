"""Batches for training and evaluation: a pure function of one integer, the number of examples consumed.

An example is a window of `sequence + 1` tokens; windows start every `sequence` tokens, so every token but the first is
a target exactly once an epoch. Grain shuffles and mixes the windows with random access, so any process can compute its
rows of any batch, and a run can be continued from the integer in any number of processes, with any batch size. What is
read is counted (`data.reading.documents`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfree_jax.data.reading.documents import Counts, count_windows
from mmfree_jax.data.reading.prefetch import Prefetched
from mmfree_jax.data.reading.token_set import Split, TokenSet

if TYPE_CHECKING:
    import grain

Put = Callable[[np.ndarray], Any]


class Windows:
    """The windows of one split, for Grain to read from: `len`, and `[i]` -> int32 [sequence + 1]."""

    def __init__(self, split: Split, sequence: int):
        self.split, self.sequence = split, sequence
        # The last tokens that fill no window are left out: a shorter one would need padding.
        if len(split) < sequence + 1:
            raise ValueError(
                f"split {split.name!r} has {len(split)} tokens, fewer than one window of {sequence} + 1: "
                "use a shorter sequence or more text"
            )

    def __len__(self) -> int:
        return (len(self.split) - 1) // self.sequence

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.sequence
        return self.split[start : start + self.sequence + 1].astype(np.int32)


def examples(sources: Sequence[Windows], weights: Sequence[float], seed: int) -> "grain.MapDataset":
    """Return all examples of a run in order, without end: each source shuffled again every epoch, mixed in proportion.

    An example is a window, and whether it is read for the first time.
    """
    import grain  # here, because it takes a second to load and few uses of this package read batches

    if any(weight <= 0 for weight in weights):
        raise ValueError(f"mixture weights must be positive, not {list(weights)}")

    endless = []
    for number, windows in enumerate(sources):
        # Each source gets a seed of its own, so that adding a source does not change the order of the others. Grain
        # shuffles by a permutation that is computed, not stored: example i of any epoch is found in constant time and
        # memory. That makes the position in the data one integer, and resuming on any number of processes exact.
        shuffled = grain.MapDataset.source(windows).seed(seed + number).shuffle().repeat(None)
        first_epoch = len(windows)
        endless.append(shuffled.map_with_index(lambda i, window, end=first_epoch: (window, i < end)))
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, list(weights))


class Batches(Iterator[Any], contextlib.AbstractContextManager):
    """An endless iterator over `rows` of each batch, int32 [len(rows), sequence + 1].

    A thread makes them ahead of time and calls `put` on them. `state` is the number of examples that all processes
    together have consumed: pass it as `start` to continue, in any number of processes and with any batch size. `counts`
    are those of the `counting` rows of the batches returned here. Use it as a context manager, or call `close`, to stop
    the thread.
    """

    def __init__(
        self,
        dataset: "grain.MapDataset",
        batch: int,
        start: int,
        rows: Sequence[int],
        prefetch: int,
        put: Put,
        counting: Sequence[int],
        end_of_document: int | None,
    ):
        if batch <= 0 or len(rows) == 0 or not set(rows) <= set(range(batch)):
            raise ValueError(f"rows {list(rows)} must be some of the {batch} of a batch")
        if start < 0:
            raise ValueError(f"start {start} must not be negative")
        self.dataset, self.batch, self.state, self.put = dataset, batch, start, put
        self.counts = Counts()
        self._rows, self._end_of_document = rows, end_of_document
        self._counting = np.isin(rows, list(counting))
        self._prefetched = Prefetched(self._generate(start), prefetch)

    def _generate(self, start: int) -> Iterator[tuple[Any, Counts]]:
        while True:
            windows, first = map(np.stack, zip(*(self.dataset[start + row] for row in self._rows), strict=True))
            counts = count_windows(windows[self._counting], first[self._counting], self._end_of_document)
            yield self.put(windows), counts
            start += self.batch

    def __next__(self) -> Any:
        # The state counts what was handed out, not what the thread has prepared: a run saved now reads those again.
        tokens, counts = next(self._prefetched)
        self.state += self.batch
        self.counts += counts
        return tokens

    def close(self, *_: object) -> None:
        """Stop working ahead. The iterator must not be used afterwards."""
        self._prefetched.close()

    __exit__ = close


def batches(
    token_set: TokenSet,
    *,
    sequence: int,
    batch: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    split: str = "train",
    prefetch: int = 4,
    put: Put = lambda rows: rows,
    counting: Sequence[int] | None = None,
    separate: bool = False,
) -> Batches:
    """Return shuffled training batches of a token set or a `Mixture`.

    batch: windows of all processes together; `rows`: which of them this process wants, None for all. start: examples
    consumed before (`Batches.state`). prefetch: batches prepared in advance, at least 1. put: done to each batch ahead,
    such as the copy to a device. counting: which of its rows this process counts, None for all; each row is counted in
    one process. separate: count as documents are that do not see each other. Raises ValueError for impossible sizes.
    """
    rows = range(batch) if rows is None else rows
    return Batches(
        examples([Windows(one.split(split), sequence) for one in token_set.sets], token_set.weights, seed),
        batch,
        start,
        rows,
        prefetch,
        put,
        rows if counting is None else counting,
        token_set.end_of_document if separate else None,
    )


def evaluation_windows(tokens: Any, sequence: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a text once, in order: tokens int32 [batch, sequence + 1] and a mask bool [batch, sequence].

    tokens: a split, or anything else whose slices are arrays.

    Every token except the first is a target (mask True) exactly once; what fills up the last batch is False.
    """
    targets = len(tokens) - 1
    if targets < 1 or sequence < 1 or batch < 1:
        raise ValueError(f"nothing to evaluate: {len(tokens)} tokens, sequence {sequence}, batch {batch}")
    # Windows overlap by one token: the last target of one is the first input of the next.
    for first in range(0, targets, sequence * batch):
        chunk = tokens[first : first + sequence * batch + 1].astype(np.int32)
        padded = np.zeros(sequence * batch + 1, np.int32)
        padded[: len(chunk)] = chunk
        starts = np.arange(batch)[:, None] * sequence
        mask = np.arange(sequence * batch).reshape(batch, sequence) < len(chunk) - 1
        yield padded[starts + np.arange(sequence + 1)], mask
