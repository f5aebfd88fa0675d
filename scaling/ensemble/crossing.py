"""Where one curve comes to lie below another, in every draw; and the kind of answer that this allows."""

from __future__ import annotations

import numpy as np

from scaling.ensemble.answers import Crossing, interval

HORIZON = 2.0  # decades beyond the runs in which a crossing is looked for
GIVEN = 1.0  # decades beyond the runs to which differences and forecasts are given, validated or not


def overtakes(log_budget: np.ndarray, gaps: np.ndarray, edge: float) -> np.ndarray:
    """(K,) budget from which B leads, from gaps (K, M): its last taking of the lead up to `edge`, the largest measured
    budget, if it leads there (0: it led from the first); else the first beyond, inf where there is none.

    What happens again far beyond the runs does not undo a crossing within them.
    """
    # Three kinds of draw: B leads at the edge of the runs (its last taking of the lead within them counts, or 0 if it
    # led throughout), B leads somewhere beyond (the first place there), or nowhere (inf).
    count = int(np.searchsorted(log_budget, np.log(edge) * (1 + 1e-12), side="right"))
    leads, rows = gaps < 0, np.arange(len(gaps))
    inside = leads[:, :count]
    changes = inside[:, 1:] & ~inside[:, :-1]
    last = np.where(changes.any(axis=1), changes.shape[1] - 1 - changes[:, ::-1].argmax(axis=1), -1)
    first = count - 1 + np.argmax(leads[:, count:], axis=1) if count < gaps.shape[1] else np.zeros(len(gaps), int)
    ahead, later = inside[:, -1], leads[:, count:].any(axis=1)
    k = np.where(ahead, np.maximum(last, 0), first)
    before, after = gaps[rows, k], gaps[rows, np.minimum(k + 1, gaps.shape[1] - 1)]
    # Linear between grid points: the share of the step at which the gap is zero.
    part = np.clip(before / np.where(before == after, 1.0, before - after), 0, 1)
    crossing = np.exp(log_budget[k] + part * (log_budget[np.minimum(k + 1, len(log_budget) - 1)] - log_budget[k]))
    return np.where(ahead, np.where(last < 0, 0.0, crossing), np.where(later, crossing, np.inf))


def crossing_of(draws: np.ndarray, measured: tuple[float, float], unit: str, untied: bool = False) -> Crossing:
    """What draws (K,) of the budget from which B leads say. Their median decides the kind of answer: two-sided where it
    lies within the ladder's compute, one-sided elsewhere, no farther than differences are given."""
    # Draws that never cross are infinite and count: dropping them would tell a crossing only where there is one. The
    # median decides the kind, since a rule on the interval's ends would pick the narrow intervals, which err most.
    (low, high), middle = interval(draws), float(np.quantile(draws, 0.5, method="nearest"))
    first, last = measured
    if first <= low and middle <= last and np.isfinite(high):
        return Crossing("inside", low, high, unit, middle, untied)
    # One-sided at 95 %: each tail holds 5 % of the draws here, where the two-sided interval leaves 2.5 % on either
    # side.
    later, sooner = (float(q) for q in np.quantile(draws, [0.05, 0.95], method="nearest"))
    if later > first:
        return Crossing("not before", min(later, last * 10**GIVEN), np.inf, unit, middle, untied)
    if sooner <= last:
        return Crossing("throughout" if sooner <= 0 else "by", 0.0, max(sooner, 0.0), unit, middle, untied)
    return Crossing("open", 0.0, np.inf, unit, middle, untied)


def lowest(log_n: np.ndarray, curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) place and value of the minimum of curves (K, m), by the parabola through the three lowest points."""
    k = curves.argmin(axis=1).clip(1, len(log_n) - 2)
    rows = np.arange(len(curves))
    left, middle, right = (curves[rows, k + step] for step in (-1, 0, 1))
    # The vertex of the parabola through three equidistant points, in steps from the middle one.
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0).clip(-1, 1)
    return log_n[k] + shift * (log_n[1] - log_n[0]), middle - 0.25 * (left - right) * shift
