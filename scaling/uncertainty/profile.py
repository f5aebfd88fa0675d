"""Profile likelihood of a law's parameters: which values can one of them take without spoiling the fit.

For every value of a parameter the others are fitted again; the value stays in the interval unless the objective rises
too far (Venzon & Moolgavkar 1988). How far is too far is not taken from chi-squared, which would count decays of one
trunk as independent runs and knows nothing of Huber's objective, but from refits of simulated runs with the noise that
the residuals show. An interval may be open: a floor that the runs cannot tell from zero has no lower end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scaling.fitting.fit import LARGE_TABLE, Fit, bounds_of
from scaling.fitting.solve import minimise
from scaling.laws.base import Law, Model
from scaling.uncertainty.bootstrap import Draws, null_noise

LEVEL = 0.95
SIMULATIONS = 300
GRID_POINTS = 33
GRID_REACH = (3.0, 12.0)  # half-widths of the grid tried in turn, in units of the bootstrap's half interval
WIDE = 60.0  # bound of coordinates other than exponents: nothing that predicts a loss reaches it

Intervals = dict[str, tuple[float, float] | None]


@dataclass(frozen=True)
class Held(Model):
    """A model that shows the solver no derivative for one coordinate, which so stays where each problem put it."""

    place: int = 0

    def value_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, jacobian = super().value_jacobian(theta)
        jacobian[:, self.place] = 0.0
        return value, jacobian


def profile_intervals(draws: Draws, simulations: int = SIMULATIONS, seed: int = 0) -> Intervals:
    """95 % interval of every parameter of a lone family's fit, ends infinite where they are open.

    None for a parameter that is not one coordinate of its law, such as Kaplan's N_c, and for a table so large that its
    bootstrap uses a part of it. `draws`: the fit's bootstrap, which says how far to look.
    """
    fit: Fit = draws.fit
    if len(fit.runs) > LARGE_TABLE:
        return dict.fromkeys(fit.law.names)
    out: Intervals = {}
    rng = np.random.default_rng(seed)
    noise = null_noise(fit, simulations, rng)
    for place, name in enumerate(fit.law.names):
        moved = recentred(fit, place)
        out[name] = None if moved is None else interval_of(fit, moved, draws, place, noise)
    return out


def recentred(fit: Fit, place: int) -> np.ndarray | None:
    """A centre of log N and log D for which a raw parameter is one coordinate alone: a coefficient's needs no shift."""
    first, second = fit.centre
    for centre in (fit.centre, np.array([0.0, second]), np.array([first, 0.0])):
        shifted = fit.law.raw(fit.theta + 0.01 * np.vstack([np.zeros(fit.model.size), np.eye(fit.model.size)]), centre)
        moves = ~np.isclose(shifted[1:, place], shifted[0, place], rtol=1e-9, atol=0)
        if moves[place] and moves.sum() == 1:
            return centre
    return None


def at_centre(law: Law, theta: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Vectors (K, P) in coordinates centred elsewhere: only logarithms of coefficients move."""
    return theta + np.log(law.raw(theta, old) / law.raw(theta, new))


def interval_of(fit: Fit, centre: np.ndarray, draws: Draws, place: int, noise: np.ndarray) -> tuple[float, float]:
    """Ends of one parameter's interval, in raw units."""
    theta = at_centre(fit.law, fit.theta[None], fit.centre, centre)[0]
    spread = at_centre(fit.law, draws.theta, fit.centre, centre)[:, place]
    model = replace(fit.model, features=fit.law.features(fit.runs, centre))
    moved = replace(fit, model=model, theta=theta, centre=centre)
    half = float(np.ptp(np.quantile(spread, [0.025, 0.975]))) / 2 + 1e-9
    target = fit.objective.target(fit.runs["loss"])[None]
    critical = critical_value(moved, place, noise)
    for reach in GRID_REACH:
        grid = theta[place] + half * reach * np.linspace(-1, 1, GRID_POINTS)
        ends = accepted(grid, rise(moved, place, grid, np.repeat(target, GRID_POINTS, axis=0)), critical)
        if np.isfinite(ends).all():
            break
    vectors = np.repeat(theta[None], 2, axis=0)
    vectors[:, place] = np.where(np.isfinite(ends), ends, theta[place])
    low, high = np.where(np.isfinite(ends), moved.law.raw(vectors, centre)[:, place], ends)
    return float(low), float(high)


def rise(fit: Fit, place: int, values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(K,) log of the objective over its minimum for targets (K, n), with the parameter held at values (K,)."""
    model = fit.model
    held = Held(model.law, model.features, model.index, model.rows, model.names, place)
    start = np.repeat(fit.theta[None], len(values), axis=0)
    pinned = start.copy()
    pinned[:, place] = values
    weight, box = np.ones(target.shape[1]), wide_box(fit)
    found = [
        minimise(m, fit.objective, target, weight, s, box, 60, 1e-7)[1] for m, s in ((held, pinned), (model, start))
    ]
    return np.log(np.maximum(found[0] / np.maximum(found[1], 1e-300), 1.0))


def wide_box(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """The law's own bounds for exponents, and none to speak of for what depends on the centre."""
    low, high = bounds_of(fit.model, fit.runs["loss"])
    slopes = np.isin(fit.law.names, fit.law.exponents)
    return np.where(slopes, low, -WIDE), np.where(slopes, high, WIDE)


def critical_value(fit: Fit, place: int, noise: np.ndarray) -> float:
    """95 % quantile of the rise at the true value, from runs simulated at the fit with the noise (K, n)."""
    simulated = fit.model.value(fit.theta[None]) + noise
    target = simulated if fit.objective.log else np.exp(simulated)
    return float(np.quantile(rise(fit, place, np.full(len(noise), fit.theta[place]), target), LEVEL))


def accepted(grid: np.ndarray, found: np.ndarray, critical: float) -> np.ndarray:
    """(2,) ends of the values about the middle of the grid that the critical rise allows; infinite where open."""
    middle = len(grid) // 2
    ends = np.array([-np.inf, np.inf])
    for side, order in enumerate((np.arange(middle, -1, -1), np.arange(middle, len(grid)))):
        beyond = 1 + np.flatnonzero(found[order[1:]] > critical)  # the middle is the fit itself, whatever its rounding
        if len(beyond):
            pair = order[beyond[0] - 1 : beyond[0] + 1]
            root = np.sqrt(found[pair])  # near linear in the parameter
            ends[side] = np.interp(np.sqrt(critical), root, grid[pair])
    return ends
