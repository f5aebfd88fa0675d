"""Rows that are chosen by their losses: the best of several learning rates, or the envelope of a cloud of runs.

The winners are partly lucky, so that all chosen losses are too low and a fit of them knows nothing of it. What the luck
is worth is found by choosing again under the runs' own noise, and taken off.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scaling.fitting.approaches import envelope
from scaling.fitting.fit import fit
from scaling.fitting.replicates import least_squares_residuals
from scaling.tables.cells import cells
from scaling.tables.runs import Runs, ScalingError

CHOICES = ("all", "best", "envelope")
SIMULATIONS = 400  # repetitions of the choice
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
    """(K, n) the best run of each budget that no cheaper one of its family beats."""
    out = np.zeros(losses.shape, dtype=bool)
    for family in runs.families:
        rows = np.flatnonzero(runs["family"] == family)
        for k, own in enumerate(losses[:, rows]):
            out[k, rows[envelope(runs["flops"][rows], own)]] = True
    return out


def selected(runs: Runs, how: str, seed: int = 0) -> Runs:
    """The rows that are chosen, their losses raised by what the luck of the choice is worth.

    Noise of the size that runs of one cell show about a parabola in the log of the learning rate (or, without enough
    rates, about the law) is added to all rows again, and the choice made again: on average a chosen loss lies below its
    own by so much (the basic bootstrap: Davison & Hinkley 1997, section 5.2).
    """
    if how == "all":
        return runs
    # The best of several noisy losses is lower than the loss of the best: the minimum of k normal numbers lies 0.6, 0.8
    # and 1.0 sd below their mean for k = 2, 3 and 4. By how much here depends on how far apart the true losses are,
    # hence the simulation on the smoothed ones.
    mask = chosen(runs, how, runs["loss"][None])[0]
    log_loss, rng = smooth(runs) if how == "best" else np.log(runs["loss"]), np.random.default_rng(seed)
    noise = noise_of(runs, how) * rng.normal(size=(SIMULATIONS, len(runs)))
    again = chosen(runs, how, np.exp(log_loss + noise))
    place = cells(runs) if how == "best" else np.arange(len(runs))
    count = place.max() + 1
    luck, times = np.zeros(count), np.zeros(count)
    found = (log_loss + noise) * again
    for row, cell in enumerate(place):
        luck[cell] += found[:, row].sum()
        times[cell] += again[:, row].sum()
    # What was chosen again, on average, against the lowest smoothed loss of the cell: the difference is the luck.
    lowest_true = np.full(count, np.inf)
    np.minimum.at(lowest_true, place, log_loss)
    several = (times > 0) & ((np.bincount(place, minlength=count) > 1) | (how == "envelope"))
    shift = (lowest_true - luck / np.maximum(times, 1))[place].clip(0) * several[place]
    corrected = replace(runs, columns=runs.columns | {"loss": runs["loss"] * np.exp(shift)})
    raised = f"losses raised by {100 * shift[mask].mean():.2g} % on average for the luck of the choice"
    note = f"{int(mask.sum())} of {len(runs)} rows chosen ({how}); {raised}"
    return replace(corrected.select(mask), notes=(*runs.notes, note))


def smooth(runs: Runs) -> np.ndarray:
    """(n,) log losses, in cells of enough learning rates on their parabola in the log of the rate: every cell has its
    own height, all have one curvature, and the best rate may move with size."""
    out, place = np.log(runs["loss"]), cells(runs)
    rated = rated_rows(runs, place)
    if len(rated):
        design = rate_design(runs.select(rated), place[rated])
        out[rated] = design @ np.linalg.lstsq(design, out[rated], rcond=None)[0]
    return out


def rate_design(runs: Runs, place: np.ndarray) -> np.ndarray:
    """(n, cells + 3): one column a cell, then the log rate, its square, and how it goes with size."""
    # A common curvature: single cells of four rates could not tell theirs. The best rate may move with size (last
    # column).
    rate, size = np.log(runs["lr"]), np.log(runs["N"])
    rate, size = rate - rate.mean(), size - size.mean()
    own = (place[:, None] == np.unique(place)).astype(float)
    return np.column_stack([own, rate, rate**2, rate * size])


def rated_rows(runs: Runs, place: np.ndarray) -> np.ndarray:
    """Rows of every cell with enough different learning rates."""
    if "lr" not in runs.columns:
        return np.empty(0, int)
    groups = [np.flatnonzero(place == cell) for cell in range(place.max() + 1)]
    return np.concatenate([[], *(g for g in groups if len(np.unique(runs["lr"][g])) >= MIN_RATES)]).astype(int)


def noise_of(runs: Runs, how: str) -> float:
    """Sd of log loss of a run: about the cells' parabolas, or, where there are none, about each family's law."""
    size, freedom = rate_noise(runs) if how == "best" else (0.0, 0.0)
    if freedom:
        return size
    # Residuals of all families over the freedom that all fits left: one noise for the table.
    squares, spare = 0.0, 0
    for family in runs.families:
        residual, frame = least_squares_residuals(fit(runs.family(family), objective="log-ls", starts=16))
        squares, spare = squares + float((residual**2).sum()), spare + len(residual) - frame.shape[1]
    return float(np.sqrt(squares / max(spare, 1)))


def rate_noise(runs: Runs) -> tuple[float, float]:
    """Sd of log loss about the cells' parabolas, and its degrees of freedom; zeros without any."""
    place = cells(runs)
    rated = rated_rows(runs, place)
    freedom = len(rated) - len(np.unique(place[rated])) - 3
    if freedom < 1:
        return 0.0, 0.0
    left = (np.log(runs["loss"]) - smooth(runs))[rated]
    return float(np.sqrt((left**2).sum() / freedom)), float(freedom)
