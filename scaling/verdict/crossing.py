"""Where one family's frontier passes below the other's: in the fit, and in every draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.uncertainty.bootstrap import interval

LEVEL = 0.95


@dataclass(frozen=True)
class Crossover:
    """The budget from which B leads, over all draws.

    estimate: at the fitted optimum; inf where B does not lead at the horizon, 0 where it leads from the lowest measured
    budget on. low, high: percentile interval of the same quantity over every draw, those that never cross included.
    p_none: share of draws in which the order never changes; p_always: those in which B leads throughout. p_reverse:
    share in which A overtakes B instead. draws: (K,) the quantity itself; lost: (K,) the same for A, the budget from
    which A leads.
    """

    estimate: float
    low: float
    high: float
    p_none: float
    p_always: float
    p_reverse: float
    horizon: float
    draws: np.ndarray
    lost: np.ndarray

    def p_before(self, budget: float) -> float:
        """Share of draws in which B leads at or before this budget and crossed to do so (or always led)."""
        return float((self.draws <= budget).mean())

    @property
    def p_never(self) -> float:
        """Share of draws in which B does not lead at the horizon."""
        return float(np.isinf(self.draws).mean())

    def lower_bound(self, level: float = LEVEL) -> float:
        """One-sided: B takes the lead above this budget, if at all, in this share of the draws."""
        return float(np.quantile(self.draws, 1 - level, method="nearest"))

    def upper_bound(self, level: float = LEVEL) -> float:
        """One-sided: B has taken the lead by this budget in this share of the draws; inf where it has not."""
        return float(np.quantile(self.draws, level, method="nearest"))


def crossover(log_budget: np.ndarray, point: np.ndarray, drawn: np.ndarray) -> Crossover:
    """Last passage of B below A in the fit (1, M) and in every draw (K, M), from differences of loss, B minus A."""
    values, behind = overtakes(log_budget, drawn)
    low, high = interval(values, LEVEL)
    return Crossover(
        estimate=float(overtakes(log_budget, point)[0][0]),
        low=low,
        high=high,
        p_none=float(((np.isinf(values) | (values == 0)) & ~behind).mean()),
        p_always=float(((values == 0) & ~behind).mean()),
        p_reverse=float(behind.mean()),
        horizon=float(np.exp(log_budget[-1])),
        draws=values,
        lost=overtakes(log_budget, -drawn)[0],
    )


def overtakes(log_budget: np.ndarray, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row: budget from which B leads up to the horizon (inf: it does not, 0: throughout), and whether A overtakes.

    The last change of sign counts, since what is asked is who leads from there on.
    """
    leads = difference < 0
    changes = leads[:, 1:] != leads[:, :-1]
    last = np.where(changes.any(axis=1), changes.shape[1] - 1 - changes[:, ::-1].argmax(axis=1), -1)
    place = np.maximum(last, 0)
    rows = np.arange(len(difference))
    before, after = difference[rows, place], difference[rows, place + 1]
    step = log_budget[place + 1] - log_budget[place]
    gap = np.where(before == after, 1.0, before - after)
    crossing = np.exp(log_budget[place] + step * np.clip(before / gap, 0, 1))
    ends_ahead, never = leads[:, -1], last < 0
    values = np.where(ends_ahead, np.where(never, 0.0, crossing), np.inf)
    return values, ~ends_ahead & ~never
