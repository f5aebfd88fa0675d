"""Pure error against lack of fit: what repeated runs say that residuals alone cannot.

Runs of equal family, N and D differ by chance only; what the residuals show beyond that is the law's own fault, and no
number of seeds will cure it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import f as fisher

from scaling.fitting.fit import LARGE_TABLE, Fit, bounds_of
from scaling.fitting.solve import Objective, linearised, minimise
from scaling.tables.cells import cells

COPIES = 1e-9  # of log loss: repeats that differ by less are no runs of their own


@dataclass(frozen=True)
class LackOfFit:
    """Analysis of variance of log loss about the least-squares fit (Draper & Smith 1998, section 2.1).

    pure: standard deviation of a run; misfit: that of cells about the law beyond what their runs' noise explains; their
    degrees of freedom; ratio: F; p: its tail.
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
    # Runs about the mean of their cell tell of chance alone; cell means about the law, of chance and misfit. The law's
    # own freedom is the rank of its tangent, which counts parameters that the design cannot tell apart once.
    pure_freedom, misfit_freedom = len(residual) - count, count - frame.shape[1]
    if pure_freedom < 1 or misfit_freedom < 1:
        return None
    inside = residual - (np.bincount(place, residual) / np.bincount(place))[place]
    pure = float((inside**2).sum())
    if pure < pure_freedom * COPIES**2:
        return None
    misfit = float((residual**2).sum()) - pure
    # F is 1 on average where the law holds, since both mean squares then estimate the variance of one run.
    ratio = (misfit / misfit_freedom) / (pure / pure_freedom)
    chance = float(fisher.sf(ratio, misfit_freedom, pure_freedom))
    # A cell of r runs lies off the law by its misfit and by 1 / sqrt(r) of a run's noise; the sum of squares over
    # runs counts both r times.
    variance, runs_a_cell = pure / pure_freedom, len(residual) / count
    sizes = np.sqrt([variance, max(misfit / misfit_freedom - variance, 0.0) / runs_a_cell])
    return LackOfFit(float(sizes[0]), float(sizes[1]), pure_freedom, misfit_freedom, float(ratio), chance)


def least_squares_residuals(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Log residuals (n,) about the least-squares fit of the same rows, and an orthonormal basis (n, q) of its tangent.

    Not about the fit itself: a Huber fit with a threshold below the noise passes through P points exactly, and its
    residuals say nothing about the noise there.
    """
    squares = Objective("log-ls", True, np.inf)
    log_loss = np.log(fit.runs["loss"])
    box = bounds_of(fit.model, fit.runs["loss"])
    theta, _ = minimise(fit.model, squares, log_loss, np.ones(len(log_loss)), fit.theta[None], box, 200)
    value, jacobian = linearised(fit.model, squares, theta)
    design = jacobian[0].T
    # Columns of unit length, so that the rank does not depend on the units of the parameters.
    left, spectrum, _ = np.linalg.svd(design / (np.linalg.norm(design, axis=0) + 1e-300), full_matrices=False)
    return log_loss - value[0], left[:, spectrum > 1e-7 * spectrum[0]]
