"""How runs depart from their law: noise of runs, trunks and cells, and a smooth misfit that is a Gaussian process.

Log loss = law + misfit + trunk + cell + run. The misfit of a family at x = (log10 N, log10 D), from the middle of the
ladder, has the covariance

    tau^2 (g_1 g_2 + (g_1 + g_2) / 2) / 2 + kappa^2 (walk(x_1, y_1) + walk(x_2, y_2)),

where g_k = exp(-(x_k - y_k)^2 / 2 ell^2) and walk is that of an integrated random walk which starts at the middle:
what the ladder cannot see grows with the decades beyond it. Half of the smooth part is a function of N plus one of D:
a law most often misses because one of its terms does, and then runs of one size, or of one budget, all err together
(additive processes: Duvenaud et al. 2011). A part rho of both is common to the families. (Kennedy & O'Hagan 2001 put
a Gaussian process between a model and its data; Rasmussen & Williams 2006, chapter 2, for the algebra.) A function
with this covariance is also a sum of many features with normal weights (Rahimi & Recht 2007), so that a draw can be
asked for its value anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import t as student

# Columns of a table of hyperparameters (H, 7), all on log loss: standard deviations of a run, a trunk and a cell that
# the families have in common; amplitude and length (decades) of the smooth misfit; its common part; drift.
RUN, TRUNK, CELL, TAU, ELL, RHO, KAPPA = range(7)
LATENTS = 7
RUN_MEDIAN, RUN_SPREAD = 0.002, 0.8  # lognormal: half of all ladders scatter by less than 0.2 %, 95 % by 0.04 to 1 %
# Half-Student, since some ladders scatter and miss far more. What the decays of a trunk have in common (its seed, its
# order of the data) is noise of the same origin as a run's own: where runs scatter more than usual, so do trunks.
TRUNK_SCALE, CELL_SCALE, TAU_SCALE = 1.0, 0.001, 0.003  # the first in noises of a run
# Tails: with four degrees of freedom one ladder in ten has more than 2.1 times its scale, one in a hundred 4.6 times.
FREEDOM = 4  # of these
KAPPA_SCALE = 0.001  # half-normal
LEAST_DRIFT = 0.7  # of KAPPA_SCALE, where the law fits well
# Shorter than a third of a decade and the misfit would be noise of cells; longer than two and the law's own terms
# would absorb it.
ELL_MEDIAN, ELL_SPREAD = 0.75, 0.35  # lognormal
ADDITIVE = 0.5  # share of the smooth part's variance that is a function of N plus one of D
WAVES = 64  # frequencies that stand for the smooth part; each has a cosine and a sine
KNOT_STEP, KNOTS = 0.25, 24  # decades between, and number of, the kinks that stand for the walk


class Points(NamedTuple):
    """Where the misfit is asked for: x (m, d) decades from the middle of the ladder, family (m,) 0 or 1."""

    x: np.ndarray
    family: np.ndarray


def physical(z: np.ndarray, misfit: bool = True, scale: float = 1.0) -> np.ndarray:
    """Hyperparameters (H, 7) of standard normal latents (H, 7): this map is the prior. scale: of every departure, in
    those of losses."""

    out = np.empty_like(z)
    # A half-distribution is the upper half of a symmetric one: (1 + u) / 2 maps a uniform u to its quantiles.
    out[:, RUN] = RUN_MEDIAN * np.exp(RUN_SPREAD * z[:, RUN])
    upper = (1 + ndtr(z)) / 2
    trunk = TRUNK_SCALE * np.maximum(out[:, RUN], RUN_MEDIAN)
    for k, half in ((TRUNK, trunk), (CELL, CELL_SCALE), (TAU, TAU_SCALE)):
        out[:, k] = half * student.ppf(upper[:, k], FREEDOM)
    out[:, ELL] = ELL_MEDIAN * np.exp(ELL_SPREAD * z[:, ELL])
    out[:, RHO] = ndtr(z[:, RHO])
    # A law that misses inside the ladder by more than usual is trusted less outside of it.
    out[:, KAPPA] = KAPPA_SCALE * ndtri(upper[:, KAPPA]) * np.maximum(LEAST_DRIFT, out[:, TAU] / TAU_SCALE)
    if not misfit:
        out[:, [TAU, KAPPA]] = 0
    out[:, [RUN, TRUNK, CELL, TAU, KAPPA]] *= scale
    return out


@dataclass(frozen=True)
class Nearness:
    """What covariances of a fixed set of rows are made of, (n, m) each: squared distance in every direction (n, m, d),
    walk, equal families."""

    squares: np.ndarray
    walk: np.ndarray
    same: np.ndarray

    @classmethod
    def between(cls, one: Points, two: Points) -> Nearness:
        # A function that starts at the middle with slope zero and whose slope makes a random walk outwards: its
        # variance grows with the cube of the distance. Inside the ladder it is held by the runs; outside, nothing
        # holds it.
        first, second = one.x[:, None], two.x[None]
        short, long = np.minimum(abs(first), abs(second)), np.maximum(abs(first), abs(second))
        # Cov of two integrals of one random walk: int_0^short (x - t)(y - t) dt; the two sides of the middle are apart.
        walk = np.where(first * second > 0, short**2 * (3 * long - short) / 6, 0).sum(-1)
        return cls((first - second) ** 2, walk, (one.family[:, None] == two.family) * 1.0)

    def covariance(self, h: np.ndarray) -> np.ndarray:
        """(H, n, m) covariance of the misfit for hyperparameters (H, 7)."""
        h = h[:, :, None, None]
        # A product of exponentials is a function of N and D together, their mean a sum of functions of one each.
        near = [np.exp(-0.5 * self.squares[..., k] / h[:, ELL] ** 2) for k in range(self.squares.shape[-1])]
        smooth = (1 - ADDITIVE) * reduce(mul, near) + ADDITIVE / len(near) * sum(near)
        covariance = h[:, TAU] ** 2 * smooth + 3 * h[:, KAPPA] ** 2 * self.walk
        return covariance * (h[:, RHO] + (1 - h[:, RHO]) * self.same)


class Basis:
    """Features whose sum with standard normal weights is a misfit with given hyperparameters (7,); d dimensions."""

    def __init__(self, h: np.ndarray, dimensions: int, families: int, rng: np.random.Generator):
        self.h, self.families = h, families
        # A wave with a frequency in one direction only is a function of N, or of D, alone: the additive half of the
        # covariance. The others depend on both.
        self.waves = rng.normal(size=(dimensions, WAVES)) / h[ELL]
        alone = int(ADDITIVE * WAVES / dimensions)  # waves along each direction by itself
        for k in range(dimensions):
            self.waves[np.arange(dimensions) != k, k * alone : (k + 1) * alone] = 0.0
        self.knots = KNOT_STEP * (np.arange(KNOTS) + 0.5)

    def block(self, x: np.ndarray) -> np.ndarray:
        """(m, F) features of one family's misfit at x (m, d)."""
        # Bochner: a stationary covariance is the mean of cos(w (x - y)) over its spectrum, here normal with sd 1 / ell,
        # and cos(a - b) = cos a cos b + sin a sin b makes that a product of features.
        angle = x @ self.waves
        smooth = self.h[TAU] / np.sqrt(WAVES) * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        # An integrated random walk is a sum of small kinks, max(|x| - knot, 0), at all distances from the middle.
        kinks = np.maximum(np.abs(x)[:, :, None] - self.knots, 0) * np.sqrt(KNOT_STEP)
        sides = np.concatenate([kinks * (x > 0)[..., None], kinks * (x < 0)[..., None]], axis=1)
        return np.concatenate([smooth, np.sqrt(3) * self.h[KAPPA] * sides.reshape(len(x), -1)], axis=1)

    @property
    def parts(self) -> tuple[float, float]:
        """Weights of what the families have in common and of what each has of its own."""
        return float(np.sqrt(self.h[RHO])), float(np.sqrt(1 - self.h[RHO]))

    def at(self, points: Points) -> np.ndarray:
        """(m, features): a block common to the families, then one for each."""
        # Variance rho of the function is common to the families and 1 - rho is each one's own, hence the roots as
        # weights.
        block, (common, own) = self.block(points.x), self.parts
        apart = [own * block * (points.family == f)[:, None] for f in range(self.families)]
        return np.concatenate([common * block, *apart], axis=1)

    def values(self, weights: np.ndarray, points: Points) -> np.ndarray:
        """(K, m) misfits of weights (K, features) at the points: `weights @ at(points).T`, without the zeros."""
        block, (common, own) = self.block(points.x), self.parts
        first, *others = np.split(weights, 1 + self.families, axis=1)
        out = np.empty((len(weights), len(block)))
        for f in np.unique(points.family):
            mine = points.family == f
            out[:, mine] = (common * first + own * others[f]) @ block[mine].T
        return out
