"""Paired comparison of models or families: differences item by item, with bootstrap intervals by document.

Two models are asked the same questions, and most of what makes a score vary is how hard the questions are. That part is
common to both, so it leaves the differences: their interval is far narrower than two averages suggest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

DRAWS = 2000  # of a bootstrap
BLOCK = 1 << 22  # numbers drawn at once
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Paired:
    """Means of two sides, and their difference (first less second) with its interval.

    only_first, only_second: items of which one side alone is right, and `p` the exact p-value of McNemar's test; None
    where items are no rights and wrongs of one pair of models. draws: the bootstrapped differences.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    items: int
    documents: int
    draws: np.ndarray = dataclasses.field(repr=False)
    only_first: int | None = None
    only_second: int | None = None
    p: float | None = None


def paired(
    first: np.ndarray,
    second: np.ndarray,
    weights: np.ndarray | None = None,
    documents: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> Paired:
    """Compare sums over items of two sides, divided by the sum of the weights.

    first, second: [items], or [models, items] of two families whose models are pairs (equal seed, size, data): then
    pairs are drawn too. weights: of items (tokens of a document, for losses); default 1, the mean. documents: a name
    for each item; items of one are drawn together (Efron and Tibshirani 1993, section 8); default: each by itself.
    Raises ValueError for sides of different shapes, or nothing to compare.
    """
    first, second = np.atleast_2d(np.asarray(first, float)), np.atleast_2d(np.asarray(second, float))
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"sides of shapes {first.shape} and {second.shape}: they must be equal, and not empty")
    models, items = first.shape
    weights = np.ones(items) if weights is None else np.asarray(weights, float)
    number = np.arange(items) if documents is None else np.unique(np.asarray(documents), return_inverse=True)[1]
    count = int(number.max()) + 1
    sums = np.stack([np.bincount(number, row, minlength=count) for row in first - second])  # [models, documents]
    total = np.bincount(number, weights, minlength=count)
    draws = _bootstrap(sums, total, np.random.default_rng(seed))
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    one, other = (float(side.mean(axis=0).sum() / weights.sum()) for side in (first, second))
    found = Paired(one, other, one - other, float(low), float(high), items, count, draws)
    if models == 1 and np.isin([first, second], (0, 1)).all():
        only_first, only_second, p = mcnemar(first[0], second[0])
        found = dataclasses.replace(found, only_first=only_first, only_second=only_second, p=p)
    return found


def average(each: Sequence[Paired]) -> Paired:
    """Compare the means over several sets of items, each of which counts the same, whatever its size."""
    draws = np.mean([one.draws for one in each], axis=0)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    mean = lambda name: float(np.mean([getattr(one, name) for one in each]))
    items, documents = (sum(getattr(one, name) for one in each) for name in ("items", "documents"))
    means = mean("first"), mean("second"), mean("difference")
    return Paired(*means, float(low), float(high), items, documents, draws)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Return how often one side alone is right, and the two-sided exact p-value (McNemar 1947; binomial)."""
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(stats.binomtest(only_first, only_first + only_second).pvalue)


def _bootstrap(sums: np.ndarray, total: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw documents, and pairs of models if there are several, with replacement: differences [DRAWS]."""
    models, documents = sums.shape
    found, block = [], max(1, BLOCK // documents)
    for first in range(0, DRAWS, block):
        size = min(block, DRAWS - first)
        times = rng.multinomial(documents, np.full(documents, 1 / documents), size)  # [size, documents]
        pairs = rng.multinomial(models, np.full(models, 1 / models), size) / models  # [size, models]
        found.append(np.sum(times @ sums.T * pairs, axis=1) / (times @ total))
    return np.concatenate(found)
