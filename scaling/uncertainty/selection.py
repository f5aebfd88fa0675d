"""Rows that are chosen by their losses, and a bootstrap that chooses anew in every draw.

The best of several learning rates, and the envelope of a cloud of runs, are chosen by noisy losses: the winners are
partly lucky, all fitted losses are too low, and a bootstrap of the winners knows nothing of it. Here every draw adds
noise to *all* runs, chooses, and refits. What that does to the fit is what chance did to the fit itself, so the draws
are reflected about it (the basic bootstrap: Davison & Hinkley 1997, section 5.2), which takes the luck out.
"""

from __future__ import annotations

import numpy as np

from scaling.fitting.fit import Fit, bounds_of, fit
from scaling.fitting.solve import refit
from scaling.laws.base import single_model
from scaling.tables.runs import Runs, ScalingError
from scaling.uncertainty.bootstrap import Draws
from scaling.uncertainty.noise import least_squares_residuals
from scaling.uncertainty.replicates import cells

CHOICES = ("all", "best", "envelope")
MIN_RATES = 4  # learning rates in a cell from which a parabola leaves something to judge the noise by


def chosen(runs: Runs, how: str, losses: np.ndarray) -> np.ndarray:
    """(K, n) whether each row is chosen under losses (K, n): "best" is the lowest of each (family, N, D) cell,
    "envelope" the rows that no cheaper row of their family beats, "all" is all."""
    if how == "all":
        return np.ones_like(losses, dtype=bool)
    if how == "best":
        return lowest_in_cell(cells(runs), losses)
    if how == "envelope":
        return on_envelope(runs, losses)
    raise ScalingError(f"unknown selection {how!r}; choose from {', '.join(CHOICES)}")


def lowest_in_cell(place: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(K, n) the row of each cell with the lowest loss; the first of equal ones."""
    out = np.zeros(losses.shape, dtype=bool)
    for cell in range(place.max() + 1):
        rows = np.flatnonzero(place == cell)
        out[np.arange(len(losses)), rows[losses[:, rows].argmin(axis=1)]] = True
    return out


def on_envelope(runs: Runs, losses: np.ndarray) -> np.ndarray:
    """(K, n) rows that no cheaper row of their family beats."""
    out = np.zeros(losses.shape, dtype=bool)
    for family in runs.families:
        rows = np.flatnonzero(runs["family"] == family)
        rows = rows[np.argsort(runs["flops"][rows], kind="stable")]
        out[:, rows] = losses[:, rows] <= np.minimum.accumulate(losses[:, rows], axis=1)
    return out


def fit_chosen(
    runs: Runs,
    how: str,
    draws: int = 2000,
    seed: int = 0,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
) -> Draws:
    """One family fitted to the rows that are chosen, with draws that choose anew; raises ScalingError."""
    fitted = fit(runs.select(chosen(runs, how, runs["loss"][None])[0]), law, objective, delta, seed=seed)
    rng = np.random.default_rng(seed)
    size, freedom = noise_of(runs, how, fitted)
    scale = size * np.sqrt(freedom / rng.chisquare(freedom, draws))
    log_losses = np.log(runs["loss"]) + scale[:, None] * rng.normal(size=(draws, len(runs)))
    weight = chosen(runs, how, log_losses).astype(float)
    model = single_model(fitted.law, runs, fitted.centre)
    target = log_losses if fitted.objective.log else np.exp(log_losses)
    start = np.repeat(fitted.theta[None], draws, axis=0)
    theta = refit(model, fitted.objective, target, weight, start, bounds_of(model, runs["loss"]))
    low, high = bounds_of(model, runs["loss"])
    reflected = np.clip(2 * fitted.theta - theta, low, high)
    return Draws(fitted, reflected, f"{how}-of-sweep", (len(fitted.runs),), False, seed)


def noise_of(runs: Runs, how: str, fitted: Fit) -> tuple[float, float]:
    """Sd of log loss of a run, and its degrees of freedom: the larger of what the chosen rows show about the law (the
    luck of the choice makes it too small) and what all rows of a cell show about a parabola in the log of the rate."""
    residual, frame = least_squares_residuals(fitted)
    freedom = max(len(residual) - frame.shape[1], 1)
    about_law = float(np.sqrt((residual**2).sum() / freedom)), float(freedom)
    about_rates = rate_noise(runs) if how == "best" else (0.0, 0.0)
    return max(about_law, about_rates)


def rate_noise(runs: Runs) -> tuple[float, float]:
    """Sd of log loss about each cell's parabola in log lr, pooled, and its degrees of freedom; zeros without any."""
    if "lr" not in runs.columns:
        return 0.0, 0.0
    place, squares, freedom = cells(runs), 0.0, 0
    for cell in np.flatnonzero(np.bincount(place) >= MIN_RATES):
        rates, losses = np.log(runs["lr"][place == cell]), np.log(runs["loss"][place == cell])
        if len(np.unique(rates)) < MIN_RATES:
            continue
        x = rates - rates.mean()
        squares += float(((losses - np.polyval(np.polyfit(x, losses, 2), x)) ** 2).sum())
        freedom += len(x) - 3
    return (float(np.sqrt(squares / freedom)), float(freedom)) if freedom else (0.0, 0.0)
