"""The noise of a ladder, estimated from what its fit leaves unexplained, and drawn again.

Runs that share a trunk err together, and so do cells that two families trained on the same data. The space of the n
residuals is cut into strata, as in the analysis of variance: averages over a trunk and deviations from them, each in
turn averaged over paired families and deviating from that. A stratum has one variance. One ratio says how much more
trunks vary than single runs, another how much more families vary in common than apart, and a scale multiplies all. The
ratios may fall below one: otherwise what few trunks cannot tell would always be read as noise between trunks. Coverage
by design and noise: experiments/results/scaling_coverage.csv.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit, bounds_of
from scaling.fitting.solve import Objective, linearised, minimise
from scaling.tables.runs import Runs, ScalingError

RATIO_STEP = 0.5  # of the grid of log variance ratios
TRUNK_RATIOS = np.arange(-3.0, 25.1, RATIO_STEP)  # so far that single runs without any noise are no special case
COMMON_RATIOS = np.arange(-3.0, 8.1, RATIO_STEP)


@dataclass(frozen=True)
class Stratum:
    """A part of the residual space: its projection (n, n), and whether the trunk ratio and the common one apply."""

    projection: np.ndarray
    between_trunks: bool
    common: bool


def sorted_clusters(runs: Runs, family: str) -> list[np.ndarray]:
    """Row numbers of each cluster of a family, clusters in order of (N, D), rows within in order of (N, D)."""
    rows = np.flatnonzero(runs["family"] == family)
    rows = rows[np.lexsort((runs["D"][rows], runs["N"][rows]))]
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(runs["cluster"][row], []).append(int(row))
    return [np.array(group) for group in groups.values()]


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
    left, spectrum, _ = np.linalg.svd(design / (np.linalg.norm(design, axis=0) + 1e-300), full_matrices=False)
    return log_loss - value[0], left[:, spectrum > 1e-7 * spectrum[0]]


def parametric_noise(fit: Fit, labels: np.ndarray, paired: bool, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) noise on log loss; raises ScalingError where the runs leave no degrees of freedom to judge it by.

    Every draw takes its own variances from their posterior, so that what few trunks cannot tell about themselves widens
    the draws: restricted likelihood (Patterson & Thompson 1971) under its Jeffreys prior, which for a balanced design
    is the prior whose intervals are Student's with the trunks' own degrees of freedom (Box & Tiao 1973, section 5.2).
    """
    residual, frame = least_squares_residuals(fit)
    freedom = len(residual) - frame.shape[1]
    if freedom < 1:
        raise ScalingError(f"{len(residual)} runs leave nothing to judge the noise by: more runs are needed")
    parts = strata(fit, labels, paired)
    log_ratios = ratio_grid(parts)
    score, size = restricted_posterior(parts, log_ratios, residual, frame)
    chance = np.exp(score - score.max())
    pick = rng.choice(len(chance), draws, p=chance / chance.sum())
    scale = size[pick] / rng.chisquare(freedom, draws)
    normal = rng.normal(size=(draws, len(residual)))
    noise = np.zeros_like(normal)
    for k, part in enumerate(parts):
        noise += np.sqrt(scale * np.exp(log_ratios[pick, k]))[:, None] * (normal @ part.projection)
    return noise


def strata(fit: Fit, labels: np.ndarray, paired: bool) -> list[Stratum]:
    """Two by whether there are trunks, times two by whether families are paired."""
    rows = len(labels)
    trunk = np.unique([f"{f}|{k}" for f, k in zip(fit.runs["family"], labels, strict=True)], return_inverse=True)[1]
    whole = Stratum(np.eye(rows), False, False)
    parts = split(whole, averaging(trunk), between_trunks=True) if trunk.max() + 1 < rows else [whole]
    if not paired:
        return parts
    cell = np.empty(rows, dtype=int)
    for family in fit.families:
        ordered = np.concatenate(sorted_clusters(fit.runs, family))
        cell[ordered] = np.arange(len(ordered))
    return [piece for part in parts for piece in split(part, averaging(cell), common=True)]


def averaging(place: np.ndarray) -> np.ndarray:
    """(n, n) projection that replaces each row by the mean over its group."""
    member = np.eye(place.max() + 1)[place]
    return member @ (member / member.sum(axis=0)).T


def split(part: Stratum, mean: np.ndarray, between_trunks: bool = False, common: bool = False) -> list[Stratum]:
    """A stratum's averages, flagged, and its deviations from them; projections of a matched design commute."""
    inner = mean @ part.projection
    flagged = Stratum(inner, part.between_trunks or between_trunks, part.common or common)
    return [flagged, Stratum(part.projection - inner, part.between_trunks, part.common)]


def ratio_grid(parts: list[Stratum]) -> np.ndarray:
    """(G, strata) log variance of each stratum over that of the last one."""
    nothing = np.zeros(1)
    trunks = TRUNK_RATIOS if any(p.between_trunks for p in parts) else nothing
    commons = COMMON_RATIOS if any(p.common for p in parts) else nothing
    pairs = np.stack(np.meshgrid(trunks, commons, indexing="ij"), -1).reshape(-1, 2)
    return pairs @ np.array([[p.between_trunks, p.common] for p in parts], dtype=float).T


def restricted_posterior(
    parts: list[Stratum], log_ratios: np.ndarray, residual: np.ndarray, frame: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log posterior (G,) of the ratios with the scale integrated out, and the quadratic form (G,) that sets the scale.

    The projections commute, so that everything is a sum over strata of (q, q) matrices, q the fit's own parameters.
    """
    weight = np.exp(-log_ratios)
    sizes = np.array([np.trace(p.projection) for p in parts])
    blocks = np.stack([frame.T @ p.projection @ frame for p in parts])
    right = weight @ np.stack([frame.T @ p.projection @ residual for p in parts])
    squares = weight @ np.array([residual @ p.projection @ residual for p in parts])
    normal = np.einsum("gk,kpq->gpq", weight, blocks)
    fitted = np.linalg.solve(normal, right[:, :, None])[:, :, 0]
    size = np.maximum(squares - (right * fitted).sum(axis=1), 1e-30)
    freedom = len(residual) - frame.shape[1]
    score = -0.5 * (log_ratios @ sizes + np.linalg.slogdet(normal)[1] + freedom * np.log(size))
    absorbed = np.linalg.solve(normal[:, None], weight[:, :, None, None] * blocks)
    return score + 0.5 * log_information(parts, sizes, absorbed), size


def log_information(parts: list[Stratum], sizes: np.ndarray, absorbed: np.ndarray) -> np.ndarray:
    """(G,) log determinant of the restricted likelihood's Fisher information about log scale and log ratios.

    absorbed: (G, strata, q, q), the share of each stratum in the information about the fit's parameters.
    """
    info = np.einsum("gipr,gjrp->gij", absorbed, absorbed)
    every = np.arange(len(parts))
    info[:, every, every] += sizes - 2 * np.einsum("gkpp->gk", absorbed)
    flags = np.array([[1, p.between_trunks, p.common] for p in parts], dtype=float)
    flags = flags[:, flags.any(axis=0)]
    sign, log_determinant = np.linalg.slogdet(np.einsum("ka,gkl,lb->gab", flags, info, flags))
    return np.where(sign > 0, log_determinant, -np.inf)
