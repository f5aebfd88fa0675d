"""Runs of one cell: equal in size, tokens and whatever else is recorded to make them differ."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from scaling.tables.runs import Runs

SAME_CELL = 0.005  # log N and log D this close are one cell of a family
SAME_N, SAME_D = 0.01, 1e-3  # cells of two families match where N agrees within 1 % and D is equal, but for rounding
# What parts cells of equal N and D.
BESIDE = ("U", "precision", "width", "depth", "activation_bits", "gradient_bits", "sparsity", "annealing")


def cells(runs: Runs) -> np.ndarray:
    """(n,) cell numbers: rows of one family and kind whose N and D agree within 0.5 %, directly or by way of others.

    By distance in both at once: in order of N alone, rows of a neighbouring number of tokens would stand between two
    whose N differs in the last digits.
    """
    kind = np.unique(
        [f"{f}|{k}" for f, k in zip(runs["family"], kinds(runs, BESIDE), strict=True)], return_inverse=True
    )[1]
    apart = 10 * SAME_CELL + np.ptp(np.log(runs["N"]))
    points, place = np.unique(
        np.column_stack([np.log(runs["N"]) + apart * kind, np.log(runs["D"])]), axis=0, return_inverse=True
    )
    # Pairs that are near are edges of a graph, cells its connected parts: no order of the rows decides anything.
    near = cKDTree(points).query_pairs(SAME_CELL, p=np.inf, output_type="ndarray")
    links = coo_matrix((np.ones(len(near)), near.T), shape=(len(points), len(points)))
    return connected_components(links, directed=False)[1][place.ravel()]


def kinds(runs: Runs, names: tuple[str, ...]) -> np.ndarray:
    """(n,) one word a row for the values of some columns; unique tokens count by how often they repeat."""
    words = np.full(len(runs), "", dtype=object)
    for name in names:
        if name in runs.columns:
            values = runs["D"] / runs["U"] if name == "U" else runs[name]
            words = words + np.array([f"|{v:.3g}" if isinstance(v, float) else f"|{v}" for v in values], dtype=object)
    return words


def matched_cells(runs: Runs, family: np.ndarray) -> np.ndarray:
    """(n,) numbers that one row of family 0 and one of family 1 share where N agrees within 1 %, D is equal and tokens
    repeat as often; -1 elsewhere. family: (n,), other numbers take no part."""
    # Each row of A takes the nearest row of B that is still free, so that a repeated cell pairs its repeats one to
    # one.
    out, taken = np.full(len(runs), -1), np.zeros(len(runs), bool)
    log_n, log_d, kind = np.log(runs["N"]), np.log(runs["D"]), kinds(runs, ("U",))
    order = np.flatnonzero(family == 1)
    order = order[np.argsort(log_d[order], kind="stable")]
    for k in np.flatnonzero(family == 0):
        first, last = np.searchsorted(log_d[order], [log_d[k] - SAME_D, log_d[k] + SAME_D])
        near = order[first:last]
        near = near[(np.abs(log_n[near] - log_n[k]) < SAME_N) & (kind[near] == kind[k]) & ~taken[near]]
        if len(near):
            best = near[np.argmin(np.abs(log_n[near] - log_n[k]))]
            out[[k, best]], taken[best] = k, True
    return out
