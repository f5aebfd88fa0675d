"""Hoffmann et al.'s approaches 1 (envelope) and 2 (IsoFLOP), for plots and comparison; nothing is decided by them.

Approach 2 is biased when alpha and beta differ or the grid is off-centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.tables.runs import Runs

SAME_BUDGET = 0.06  # runs whose compute agrees this closely form one IsoFLOP curve (natural log)
MIN_POINTS = 4


@dataclass(frozen=True)
class IsoCurve:
    """Runs of one budget: n, loss (k,); the parabola on `grid`; its minimum; positive curvature or not used."""

    flops: float
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    grid: np.ndarray
    fitted: np.ndarray
    best_n: float
    best_d: float
    best_loss: float


@dataclass(frozen=True)
class IsoFlop:
    """All curves and the power laws through their minima, N* = C^exponent_n and D* = C^exponent_d (up to a factor)."""

    curves: tuple[IsoCurve, ...]
    exponent_n: float
    exponent_d: float


def isoflop(runs: Runs, budgets: np.ndarray | None = None) -> IsoFlop:
    """Approach 2 (Hoffmann et al. 2022, section 3.2): a parabola in log N per budget, then a line through the minima.

    `budgets` (n,) labels the rows' budgets; without it rows of nearly equal compute are grouped. Curves with fewer than
    four sizes or without a minimum are left out; fewer than two curves give NaN exponents.
    """
    labels = budget_labels(runs["flops"]) if budgets is None else budgets
    groups = [runs.select(labels == label) for label in np.unique(labels)]
    curves = [c for group in groups if sizes(group) >= MIN_POINTS for c in iso_curve(group)]
    if len(curves) < 2:
        return IsoFlop(tuple(curves), float("nan"), float("nan"))
    # A line through the logarithms of a few minima: each is uncertain by far more than the line's own residuals show,
    # which is why no interval is given for the slope.
    log_c = np.log([c.flops for c in curves])
    slopes = [np.polyfit(log_c, np.log([getattr(c, best) for c in curves]), 1)[0] for best in ("best_n", "best_d")]
    return IsoFlop(tuple(curves), float(slopes[0]), float(slopes[1]))


def sizes(runs: Runs) -> int:
    """How many sizes there are, to about a hundredth: seeds of one size do not bend a parabola."""
    return len(np.unique(np.log(runs["N"]).round(2)))


def budget_labels(flops: np.ndarray) -> np.ndarray:
    """(n,) group numbers: sorted compute is cut wherever neighbours differ by more than 6 %."""
    order = np.argsort(flops, kind="stable")
    jumps = np.diff(np.log(flops[order])) > SAME_BUDGET
    labels = np.empty(len(flops), dtype=int)
    labels[order] = np.concatenate([[0], np.cumsum(jumps)])
    return labels


def iso_curve(part: Runs) -> list[IsoCurve]:
    """The parabolas of one budget in log N and in log D; none without an interior minimum."""
    # Loss along a budget is a sum of a falling and a rising exponential in log N: a parabola only near its minimum,
    # which is why wide or off-centre grids shift the vertex.
    fits = [np.polyfit(np.log(part[name]), part["loss"], 2) for name in ("N", "D")]
    if min(f[0] for f in fits) <= 0:
        return []
    best_n, best_d = (float(np.exp(-f[1] / (2 * f[0]))) for f in fits)
    grid = np.geomspace(part["N"].min(), part["N"].max(), 60)
    fitted = np.polyval(fits[0], np.log(grid))
    lowest = float(np.polyval(fits[0], np.log(best_n)))
    middle = float(np.exp(np.log(part["flops"]).mean()))
    return [IsoCurve(middle, part["N"], part["D"], part["loss"], grid, fitted, best_n, best_d, lowest)]


def envelope(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Approach 1: indices, in order of compute, of the best run of each budget that no cheaper budget's best beats.

    Runs of one budget are compared first: in order of compute alone the row order would decide among equals.
    """
    # A running minimum over budgets: a run stays on the envelope if no cheaper budget holds a lower loss.
    labels = budget_labels(flops)
    best = np.full(labels.max() + 1, np.inf)
    np.minimum.at(best, labels, loss)
    order = np.lexsort((np.arange(len(flops)), loss, labels))
    first = order[np.unique(labels[order], return_index=True)[1]]
    return first[best <= np.minimum.accumulate(best)]


def envelope_exponent(runs: Runs) -> float:
    """Exponent a of N* = C^a through the envelope; NaN with fewer than three runs on it."""
    rows = envelope(runs["flops"], runs["loss"])
    if len(rows) < 3:
        return float("nan")
    return float(np.polyfit(np.log(runs["flops"][rows]), np.log(runs["N"][rows]), 1)[0])
