"""Documents in windows of tokens: which targets carry a loss, and how much training reads.

Counts are made on the host, where batches are made: exact integers, at no cost to the device. A position is an input
token, padding included; batch x sequence of them make a step, and throughput is in positions. A target is the token
after a position, if it carries a loss: with joined documents every one does; with separate documents all do except an
end of document that follows another (`is_target`). D and U are numbers of targets.
"""

import dataclasses
from typing import Any

import numpy as np


def document_ids(tokens: Any, end_of_document: int) -> Any:
    """Number the document of its row that each input token belongs to: int32 like `tokens` ([..., T]), NumPy or JAX.

    An end-of-document token belongs to the document that it stands before: as an input it is all that this document's
    first token is predicted from, as a target it is predicted from the document that it ends.
    """
    # Ids count from 0 in every row, which is all that masks and resets need: they compare ids within a row.
    return (tokens == end_of_document).cumsum(axis=-1).astype(np.int32)


def is_target(tokens: Any, end_of_document: int) -> Any:
    """Mark the targets of windows ([..., T + 1]) that are text, bool [..., T]: not an end of document after another."""
    ends = tokens == end_of_document
    return ~(ends[..., 1:] & ends[..., :-1])


def tokens_seen(inputs: np.ndarray, end_of_document: int | None) -> np.ndarray:
    """Count the tokens that each position of windows, int32 [n, T], sees, itself included: int [n, T].

    end_of_document: where documents are separate the token that ends one, None where they are joined.
    """
    place = np.arange(inputs.shape[1])
    if end_of_document is None:
        return np.broadcast_to(place + 1, inputs.shape)
    # A position sees itself and what came before it in its document, which begins with the end of the document before
    # (`document_ids`). A running maximum carries the place of the last such end along the row.
    begins = np.maximum.accumulate(np.where(inputs == end_of_document, place, 0), axis=1)
    return place - begins + 1


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over training windows. They add up: over processes, and a branch's with its trunk's."""

    targets: int = 0  # that carried a loss: D
    unique: int = 0  # of them, in windows that were read for the first time: U
    pairs: int = 0  # of a position and one that it sees, itself included: what attention has to compute

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.targets + other.targets, self.unique + other.unique, self.pairs + other.pairs)


def count_windows(windows: np.ndarray, first: np.ndarray, end_of_document: int | None) -> Counts:
    """Count what is in windows, int32 [n, T + 1]; `first`, bool [n], is true where one was not read before.

    end_of_document: where documents are separate the token that ends one, None where they are joined.
    """
    inputs = windows[:, :-1]
    if end_of_document is None:
        targets, pairs = np.full(len(inputs), inputs.shape[1]), inputs.size * (inputs.shape[1] + 1) // 2
    else:
        targets = is_target(windows, end_of_document).sum(axis=1)
        pairs = int(tokens_seen(inputs, end_of_document).sum())
    return Counts(int(targets.sum()), int(targets[first].sum()), pairs)
