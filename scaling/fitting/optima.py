"""Best learning rates and batch sizes: how the optimum of a sweep moves with model size and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from scipy.stats import t as student

from scaling.tables.cells import cells
from scaling.tables.runs import Runs, ScalingError

NEAR = 0.05  # of log loss above a cell's best: within that the loss is a parabola in the logs of rate and batch
MIN_POINTS = 3  # runs of a cell for every setting that is swept, without which it says nothing of an optimum
OUTSIDE = 0.5  # share of runs whose cell may have its optimum outside of the whole table's sweep


@dataclass(frozen=True)
class Optimum:
    """Log of the best setting: intercept + N exponent log N + D exponent log D; each with a 95 % interval.

    coefficients (3,) and covariance (3, 3) of intercept, N and D exponents (zero where the law has none); the logs are
    centred at `centre`; freedom: cells less parameters, of Student's t.
    """

    setting: str
    coefficients: np.ndarray
    covariance: np.ndarray
    centre: np.ndarray
    freedom: int

    def at(self, N: float, D: float) -> tuple[float, float, float]:
        """Best setting at N parameters and D tokens, with its 95 % interval."""
        row = np.append(1.0, np.log([N, D]) - self.centre)
        middle, half = float(row @ self.coefficients), self.quantile * float(np.sqrt(row @ self.covariance @ row))
        low, value, high = np.exp([middle - half, middle, middle + half])
        return value, low, high

    @property
    def quantile(self) -> float:
        return float(student.ppf(0.975, self.freedom))

    @property
    def exponents(self) -> dict[str, tuple[float, float, float]]:
        """Exponents of N and D with their 95 % intervals."""
        half = self.quantile * np.sqrt(np.diag(self.covariance))
        rows = zip(("N", "D"), self.coefficients[1:], half[1:], strict=True)
        return {name: (float(x), float(x - h), float(x + h)) for name, x, h in rows if h > 0}

    @property
    def scale(self) -> float:
        """The factor c of c N^a D^b."""
        return float(np.exp(self.coefficients[0] - self.coefficients[1:] @ self.centre))


def optima(runs: Runs) -> dict[str, Optimum]:
    """Best learning rate c N^a D^b and, where the table has `batch_tokens`, best batch c D^b of one family (the Step
    Law: Li et al. 2025, arXiv 2503.04715, eq. 1).

    All cells of equal N and D are fitted together: log loss = level of the cell + a parabola about the optimum, of one
    curvature in log rate and log batch, a cross term included. Intervals: sandwich over cells (Liang & Zeger 1986).
    Raises ScalingError where too few cells sweep enough, or an optimum lies outside of what was swept.
    """
    swept: list[str] = [name for name in ("lr", "batch_tokens") if name in runs.columns]
    rows, cell = near_the_best(runs, swept)
    # Near its optimum the loss of a cell is a bowl over log rate and log batch. One cell hardly tells where the
    # bottom lies; all cells together do, if the bottom moves as a power of N and D and the bowl keeps its shape. The
    # optimum of the batch does not depend on N in the law, hence fewer inputs.
    centre = np.array([np.log(rows["N"]).mean(), np.log(rows["D"]).mean()])
    inputs = np.stack([np.ones(len(rows)), np.log(rows["N"]) - centre[0], np.log(rows["D"]) - centre[1]])
    kept = {"lr": [0, 1, 2], "batch_tokens": [0, 2]}
    settings = {name: np.log(rows[name]) for name in swept}
    found = parabolas(np.log(rows["loss"]), settings, {name: inputs[kept[name]] for name in swept}, cell)
    freedom, covariance = cell.max() + 1 - len(found.x), sandwich(found.jac, found.fun, cell)
    if freedom < 1:
        raise ScalingError(f"{cell.max() + 1} swept cells are too few for {len(found.x)} parameters of an optimum")
    out, place = {}, 0
    for name in swept:
        own = np.arange(place, place + len(kept[name]))
        coefficients, spread = np.zeros(3), np.zeros((3, 3))
        coefficients[kept[name]], spread[np.ix_(kept[name], kept[name])] = found.x[own], covariance[np.ix_(own, own)]
        best, low, high = coefficients @ inputs, settings[name].min(), settings[name].max()
        if np.mean((best < low) | (best > high)) > OUTSIDE:
            raise ScalingError(f"the best {name} lies outside of what was swept: sweep further")
        out[name], place = Optimum(name, coefficients, spread, centre, freedom), place + len(own)
    return out


def near_the_best(runs: Runs, swept: Sequence[str]) -> tuple[Runs, np.ndarray]:
    """The runs within NEAR of the best of their cell, in cells with enough of them, and the number of each cell."""
    if "lr" not in swept:
        raise ScalingError("the table has no column 'lr': an optimum needs a sweep of learning rates")
    known = runs.select(~np.any([np.isnan(runs[name]) for name in swept], axis=0))
    cell, loss = cells(known), np.log(known["loss"])
    best = np.full(cell.max() + 1, np.inf)
    np.minimum.at(best, cell, loss)
    # Farther up the bowl is steeper on the side of high rates, where training breaks down; a parabola there would
    # pull the optimum to lower rates.
    near = loss < best[cell] + NEAR
    enough = np.bincount(cell[near], minlength=len(best)) >= MIN_POINTS * len(swept)
    for name in swept:
        ends = [np.full(len(best), sign * np.inf) for sign in (1, -1)]
        np.minimum.at(ends[0], cell[near], known[name][near])
        np.maximum.at(ends[1], cell[near], known[name][near])
        enough &= ends[1] > ends[0]
    rows = near & enough[cell]
    if not rows.any():
        raise ScalingError(f"no cell of equal N and D sweeps {' and '.join(swept)} near its best loss")
    return known.select(rows), np.unique(cell[rows], return_inverse=True)[1]


def parabolas(
    y: np.ndarray, settings: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray], cell: np.ndarray
) -> OptimizeResult:
    """Least squares of log losses (n,): coefficients of every optimum in turn, then the root of the curvature."""
    names, level = list(settings), np.bincount(cell)
    start = [np.linalg.lstsq(inputs[name].T, settings[name], rcond=None)[0] for name in names]
    ends = np.cumsum([len(part) for part in start])
    triangle = np.tril_indices(len(names))

    def residual(x: np.ndarray) -> np.ndarray:
        """Losses less the parabola, about the mean of their cell: so the levels are fitted without being searched."""
        *parts, curvature = np.split(x, ends)
        off = np.stack([settings[name] - part @ inputs[name] for name, part in zip(names, parts, strict=True)])
        # L L' of a triangular root is never negative definite, so that the search cannot turn the bowl into a saddle.
        root = np.zeros((len(names), len(names)))
        root[triangle] = curvature
        left = y - ((root.T @ off) ** 2).sum(axis=0)
        return left - (np.bincount(cell, left) / level)[cell]

    first = np.concatenate([*start, 0.1 * np.eye(len(names))[triangle]])
    return least_squares(residual, first, x_scale="jac", xtol=1e-12, ftol=1e-12)


def sandwich(jacobian: np.ndarray, residual: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Covariance of a least-squares fit whose errors may depend on each other within a cell."""
    # The bread alone would be right for independent errors of one size. Runs of a cell share what the parabola gets
    # wrong there, so the scores (Jacobian times residual) are summed by cell before they are squared.
    bread, count = np.linalg.pinv(jacobian.T @ jacobian), cell.max() + 1
    scores = np.stack([np.bincount(cell, column * residual) for column in jacobian.T])
    return count / (count - 1) * bread @ (scores @ scores.T) @ bread
