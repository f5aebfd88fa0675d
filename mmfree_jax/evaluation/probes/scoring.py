"""Accuracy of a model on rows of a probe, as a whole and by distance, with honest intervals."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from mmfree_jax.evaluation.probes.drawing import Draw

Logits = Callable[[np.ndarray], Any]  # tokens int32 [B, T] -> logits [B, T, V] of the next token, any kind of array


@dataclass(frozen=True)
class Accuracy:
    """The share of scored targets that a model's largest logit names, at distances from `nearest` to `farthest`."""

    nearest: int
    farthest: int
    targets: int
    rows: int
    accuracy: float
    low: float
    high: float


def score(
    logits: Logits, drawn: Draw, limits: Sequence[int] = (), batch: int = 64, confidence: float = 0.95
) -> list[Accuracy]:
    """Score a model: first over all targets, then over those of each range of distances [limits[i], limits[i + 1]).

    limits: powers of two if none are given. Ranges without a target are left out. `batch` rows at a time go through the
    model, always as many, so that a compiled one is compiled once.
    """
    correct = predictions(logits, drawn.tokens[:, :-1], batch) == drawn.tokens[:, 1:]
    limits = limits or [1 << power for power in range(int(drawn.distance.max(initial=0)).bit_length() + 1)]
    ranges = [(1, int(drawn.distance.max(initial=0)) + 1), *itertools.pairwise(limits)]
    masks = [(drawn.distance >= low) & (drawn.distance < high) & drawn.mask for low, high in ranges]
    return [accuracy(correct, mask, drawn.distance, confidence) for mask in masks if mask.any()]


def predictions(logits: Logits, tokens: np.ndarray, batch: int) -> np.ndarray:
    """The token with the largest logit after each of tokens int32 [N, T]; int64 [N, T]."""
    parts = []
    for first in range(0, len(tokens), batch):
        rows = tokens[first : first + batch]
        full = np.concatenate([rows, np.repeat(rows[:1], batch - len(rows), axis=0)])
        parts.append(np.asarray(logits(full))[: len(rows)].argmax(axis=-1))
    return np.concatenate(parts) if parts else np.zeros(tokens.shape, np.int64)


def accuracy(correct: np.ndarray, mask: np.ndarray, distance: np.ndarray, confidence: float = 0.95) -> Accuracy:
    """The share of `correct` [N, T] under `mask` [N, T], and its interval, for which a row is one observation.

    Targets of one row are not independent: a model that lost a row's string misses many of them. So Wilson's interval
    (1927) is taken at the number of independent targets that would have the variance found between rows (as Korn and
    Graubard 1998 do for the exact interval). Where all or none are right, no variance is seen, and a row counts once.
    """
    hits, counts = (np.where(mask, correct, False).sum(axis=1), mask.sum(axis=1))
    hits, counts = hits[counts > 0], counts[counts > 0]
    targets, rows = int(counts.sum()), len(counts)
    share = float(hits.sum() / targets)
    variance = ((hits - share * counts) ** 2).sum() / targets**2 * rows / max(rows - 1, 1)
    effective = targets if 0 < share < 1 else rows
    if variance > 0:
        effective = min(targets, share * (1 - share) / variance)
    low, high = wilson(share, effective, confidence)
    distances = distance[mask]
    return Accuracy(int(distances.min()), int(distances.max()), targets, rows, share, low, high)


def wilson(share: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) of a proportion found in `count` independent trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
