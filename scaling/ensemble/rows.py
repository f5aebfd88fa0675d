"""A table of one or two families as the rows of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling.ensemble.posterior import Rows
from scaling.laws.base import Law, middles
from scaling.tables.cells import matched_cells
from scaling.tables.runs import Runs

LN10 = np.log(10.0)
MOST_ROWS = 300  # more runs than these are taken together where they lie close


def rows_of(runs: Runs, families: Sequence[str], law: Law, centre: np.ndarray) -> Rows:
    """The runs of `families`, the first being number 0; of a large table, means over neighbours."""
    # Groups as numbers, so that a covariance is a comparison of two of them.
    family = np.array([list(families).index(f) for f in runs["family"]])
    rows = Rows(
        y=np.log(runs["loss"]),
        family=family,
        trunk=shared(np.array([f"{f}|{c}" for f, c in zip(family, runs["cluster"], strict=True)])),
        cell=matched_cells(runs, family),
        x=place(law, np.log(runs["N"]), np.log(runs["D"]), np.log(runs["flops"]), centre),
        features=law.features(runs, centre),
        count=np.ones(len(runs)),
    )
    return rows if len(runs) <= MOST_ROWS else gathered(rows)


def place(law: Law, log_n: np.ndarray, log_d: np.ndarray, log_c: np.ndarray | None, centre: np.ndarray) -> np.ndarray:
    """(m, inputs) where runs lie, in decades of the law's inputs from the middle of the ladder."""
    at, middle = {"N": log_n, "D": log_d, "C": np.asarray(log_c)}, middles(centre)
    return np.stack([(at[name] - middle[name]) / LN10 for name in law.inputs], axis=-1)


def shared(labels: np.ndarray) -> np.ndarray:
    """(n,) group numbers, -1 for what is alone in its group."""
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.where(counts[group] > 1, group, -1)


def gathered(rows: Rows) -> Rows:
    """Means over runs of a family that lie close in every input: the misfit is smooth, so little is lost."""
    # Cholesky factors cost the cube of the rows. Groups grow until few enough are left; a row that is the mean of k
    # runs has a k-th of their noise variance (`count`), and no trunk or cell of its own.
    spots, step = np.concatenate([rows.x.T * LN10, rows.features[rows.x.shape[1] :]]), 0.01
    while True:
        keys = np.column_stack([rows.family, *np.round(spots / step)])
        _, group = np.unique(keys, axis=0, return_inverse=True)
        if group.max() < MOST_ROWS:
            break
        step *= 1.25
    count = np.bincount(group.ravel()).astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(group.ravel(), values) / count

    nowhere = np.full(len(count), -1)
    x, features = (np.stack([mean(row) for row in table]) for table in (rows.x.T, rows.features))
    family = mean(rows.family.astype(float)).round().astype(int)
    return Rows(mean(rows.y), family, nowhere, nowhere, x.T, features, count)
