"""Resampling by cluster: what the fit would have been with other runs, trunk by trunk, family by family.

A cluster is everything that shares randomness: all decays off one trunk, all checkpoints of a run. With 20 clusters or
more the clusters themselves are resampled ("pairs"). With fewer, such draws often lose a whole size and with it the
law, and multiplying each cluster's residuals by a random sign ("wild") covers too little, because the fit has absorbed
most of what so few clusters could show (`python -m scaling.uncertainty.simulate` measures it for every method).
There the noise is drawn from a model of it instead ("parametric": noise.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling.fitting.fit import LARGE_TABLE, Fit, bounds_of
from scaling.fitting.solve import minimise, refit
from scaling.tables.runs import Runs, ScalingError
from scaling.uncertainty.noise import least_squares_residuals, parametric_noise, sorted_clusters

MIN_CLUSTERS_FOR_PAIRS = 20
MANY_ROWS = 1000  # above this the noise model's projections would take longer than all the refits of a test
WEBB = np.sqrt([1.5, 1.0, 0.5, 0, 0, 0]) - np.sqrt(
    [0, 0, 0, 0.5, 1.0, 1.5]
)  # six-point weights, variance 1 (Webb 2014)
MATCH_N, MATCH_D = np.log(1.3), np.log(1.05)  # how close two families' cells must be to count as the same cell


@dataclass(frozen=True)
class Draws:
    """Refits of one fit: theta (K, P) centred; method; clusters per family; paired: same multipliers across
    families."""

    fit: Fit
    theta: np.ndarray
    method: str
    clusters: tuple[int, ...]
    paired: bool
    seed: int

    def raw(self) -> dict[str, np.ndarray]:
        """Raw parameters (K,) by joint name."""
        return self.fit.raw(self.theta)

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile intervals of the raw parameters by joint name."""
        return {name: interval(values, level) for name, values in self.raw().items()}

    def predict(
        self, N: np.ndarray | float, D: np.ndarray | float, family: str | None = None, **known: Any
    ) -> np.ndarray:
        """(K, n) losses of the mean curve in each draw; `known` as for `Fit.predict_theta`."""
        return self.fit.predict_theta(self.theta, N, D, family, **known)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Equal-tailed percentile interval; infinite values count."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def bootstrap(fit: Fit, draws: int = 2000, seed: int = 0, method: str = "auto") -> Draws:
    """Refits `draws` times by cluster. method: auto, pairs, parametric or wild; raises ScalingError on another name.

    Families whose designs match cell by cell get common draws, so that noise they share cancels from their difference.
    """
    if len(fit.runs) > LARGE_TABLE:
        return bootstrap_large(fit, draws, seed, method)
    labels, paired = cluster_labels(fit.runs, fit.families)
    counts = tuple(len(np.unique(labels[fit.runs["family"] == family])) for family in fit.families)
    if method == "auto":
        method = "pairs" if min(counts) >= MIN_CLUSTERS_FOR_PAIRS else "parametric"
    rng = np.random.default_rng(seed)
    loss, weight = fit.runs["loss"], np.ones(len(fit.runs))
    target: np.ndarray = fit.objective.target(loss)
    if method == "pairs":
        weight = pair_weights(labels, fit.runs["family"], paired, draws, rng)
    elif method in ("parametric", "wild"):
        noise = (parametric_noise if method == "parametric" else wild_noise)(fit, labels, paired, draws, rng)
        shifted = fit.model.value(fit.theta[None]) + noise
        target = shifted if fit.objective.log else np.exp(shifted)
    else:
        raise ScalingError(f"unknown bootstrap {method!r}; choose from auto, pairs, parametric, wild")
    start = np.repeat(fit.theta[None], draws, axis=0)
    theta = refit(fit.model, fit.objective, target, weight, start, bounds_of(fit.model, loss))
    return Draws(fit, theta, method, counts, paired, seed)


def bootstrap_large(fit: Fit, draws: int, seed: int, method: str) -> Draws:
    """Draws of a random subset of the clusters, their deviations shrunk by sqrt(m / n): m out of n bootstrap (Bickel,
    Goetze & van Zwet 1997). A table this large has small errors, and refits of all its rows would take hours."""
    rng = np.random.default_rng(seed)
    rows = np.sort(np.concatenate([sampled_clusters(fit, family, rng) for family in fit.families]))
    model, loss = fit.model.subset(rows), fit.runs["loss"][rows]
    target, weight = fit.objective.target(loss), np.ones(len(rows))
    theta, _ = minimise(model, fit.objective, target, weight, fit.theta[None], bounds_of(model, loss), 100)
    part = replace(fit, runs=fit.runs.select(rows), model=model, theta=theta[0])
    drawn = bootstrap(part, draws, seed, method)
    shrink = np.sqrt(len(rows) / len(fit.runs))
    return replace(drawn, fit=fit, theta=fit.theta + shrink * (drawn.theta - theta[0]))


def sampled_clusters(fit: Fit, family: str, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of one family's clusters, drawn at random until they fill its part of LARGE_TABLE; what of the last
    one would go beyond it is left out, at random."""
    room = max(len(fit.law.names) + 1, LARGE_TABLE * int((fit.runs["family"] == family).sum()) // len(fit.runs))
    rows, labels = np.flatnonzero(fit.runs["family"] == family), fit.runs["cluster"].astype(str)
    _, place = np.unique(labels[rows], return_inverse=True)
    order = np.lexsort((rng.random(len(rows)), rng.permutation(place.max() + 1)[place]))
    return rows[order[:room]]


def cluster_labels(runs: Runs, families: tuple[str, ...]) -> tuple[np.ndarray, bool]:
    """(n,) integer clusters; matching clusters of different families share one when all designs pair up."""
    ordered = [sorted_clusters(runs, family) for family in families]
    paired = len(families) > 1 and all(same_design(runs, ordered[0], other) for other in ordered[1:])
    labels = np.empty(len(runs), dtype=int)
    count = 0
    for clusters in ordered:
        for k, rows in enumerate(clusters):
            labels[rows] = k if paired else count
            count += 1
    return labels, paired


def same_design(runs: Runs, first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """Whether two families' clusters hold the same cells: N within 30 % (counts differ by family), D within 5 %."""
    if [len(c) for c in first] != [len(c) for c in second]:
        return False
    one, two = np.concatenate(first), np.concatenate(second)
    gap_n = np.abs(np.log(runs["N"][one] / runs["N"][two]))
    gap_d = np.abs(np.log(runs["D"][one] / runs["D"][two]))
    return bool((gap_n < MATCH_N).all() and (gap_d < MATCH_D).all())


def pair_weights(
    labels: np.ndarray, families: np.ndarray, paired: bool, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """(draws, n) how often each row's cluster was drawn; stratified by family unless the families share draws."""
    weight = np.empty((draws, len(labels)))
    strata = [np.arange(len(labels))] if paired else [np.flatnonzero(families == f) for f in dict.fromkeys(families)]
    for rows in strata:
        names, place = np.unique(labels[rows], return_inverse=True)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        weight[:, rows] = counts[:, place]
    return weight


def wild_noise(fit: Fit, labels: np.ndarray, paired: bool, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) noise on log loss: each cluster's residuals times a Webb weight.

    Residuals are enlarged by their cluster's leverage (CV2: Bell & McCaffrey 2002), and each draw by
    sqrt(f / chi2_f), since their scale is itself uncertain. Paired families share labels, hence weights.
    """
    residual, frame = least_squares_residuals(fit)
    corrected = np.empty_like(residual)
    names, place = np.unique(labels, return_inverse=True)
    for name in names:
        rows = np.flatnonzero(labels == name)
        spectrum, turn = np.linalg.eigh(np.eye(len(rows)) - frame[rows] @ frame[rows].T)
        corrected[rows] = turn @ np.diag(np.maximum(spectrum, 1e-2) ** -0.5) @ turn.T @ residual[rows]
    freedom = max(len(residual) - frame.shape[1], 1)
    widen = np.sqrt(freedom / rng.chisquare(freedom, draws))
    return rng.choice(WEBB, (draws, len(names)))[:, place] * corrected * widen[:, None]


def null_noise(fit: Fit, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) noise on log loss with the trunk and cell structure that the residuals show: for simulated tests."""
    labels, paired = cluster_labels(fit.runs, fit.families)
    drawn = parametric_noise if len(fit.runs) <= MANY_ROWS else wild_noise
    return drawn(fit, labels, paired, draws, rng)
