"""Pure error against lack of fit: what repeated runs say that residuals alone cannot.

Runs of equal family, N and D differ by chance only; what the residuals show beyond that is the law's own fault, and no
number of seeds will cure it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.stats import f as fisher

from scaling.fitting.fit import LARGE_TABLE, Fit
from scaling.tables.runs import Runs
from scaling.uncertainty.noise import least_squares_residuals

SAME_CELL = 0.005  # log N and log D this close are one cell
COPIES = 1e-9  # of log loss: repeats that differ by less are no runs of their own


@dataclass(frozen=True)
class LackOfFit:
    """Analysis of variance of log loss about the least-squares fit (Draper & Smith 1998, section 2.1).

    pure, misfit: standard deviations, pure error and beyond it; their degrees of freedom; ratio: F; p: its tail.
    """

    pure: float
    misfit: float
    pure_freedom: int
    misfit_freedom: int
    ratio: float
    p: float

    def sentence(self) -> str:
        """The test in words."""
        says = "the law misses more than chance explains" if self.p < 0.05 else "no lack of fit beyond chance"
        freedom = f"F({self.misfit_freedom}, {self.pure_freedom}) = {self.ratio:.3g}, p = {self.p:.2g}"
        sizes = f"Repeated runs differ by {100 * self.pure:.2g} %, cells from the law by {100 * self.misfit:.2g} %"
        return f"{sizes}: {says} ({freedom})."


def lack_of_fit(fit: Fit) -> LackOfFit | None:
    """The test on the rows of a fit; None without repeated cells, with too few cells for the law, where repeats are
    copies of each other, or where the rows are so many that any law fails it."""
    if len(fit.runs) > LARGE_TABLE:
        return None
    residual, frame = least_squares_residuals(fit)
    place = cells(fit.runs)
    count = int(place.max()) + 1
    pure_freedom, misfit_freedom = len(residual) - count, count - frame.shape[1]
    if pure_freedom < 1 or misfit_freedom < 1:
        return None
    inside = residual - (np.bincount(place, residual) / np.bincount(place))[place]
    pure = float((inside**2).sum())
    if pure < pure_freedom * COPIES**2:
        return None
    misfit = float((residual**2).sum()) - pure
    ratio = (misfit / misfit_freedom) / (pure / pure_freedom)
    chance = float(fisher.sf(ratio, misfit_freedom, pure_freedom))
    sizes = np.sqrt([pure / pure_freedom, max(misfit, 0.0) / misfit_freedom])
    return LackOfFit(float(sizes[0]), float(sizes[1]), pure_freedom, misfit_freedom, float(ratio), chance)


def cells(runs: Runs) -> np.ndarray:
    """(n,) cell numbers: rows of one family whose N and D agree within 0.5 %, directly or by way of others.

    By distance in both at once: in order of N alone, rows of a neighbouring number of tokens would stand between two
    whose N differs in the last digits.
    """
    family = np.unique(runs["family"].astype(str), return_inverse=True)[1]
    apart = 10 * SAME_CELL + np.ptp(np.log(runs["N"]))
    points, place = np.unique(
        np.column_stack([np.log(runs["N"]) + apart * family, np.log(runs["D"])]), axis=0, return_inverse=True
    )
    near = cKDTree(points).query_pairs(SAME_CELL, p=np.inf, output_type="ndarray")
    links = coo_matrix((np.ones(len(near)), near.T), shape=(len(points), len(points)))
    return connected_components(links, directed=False)[1][place.ravel()]
