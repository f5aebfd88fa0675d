"""The compute-optimal frontier of a fitted law: best loss at each budget, with the FLOP cost that the runs measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.laws.base import Law
from scaling.tables.runs import FLOPS_PER_PARAMETER_TOKEN, Runs, ScalingError, as_number

GOLDEN = (np.sqrt(5) - 1) / 2
SEARCH_STEPS = 34  # golden sections; 60 e-folds of N shrink to 5e-6, and the loss is flat to second order there
NEAR, NEAR_STEPS = 6.0, 19  # e-folds to either side of a known neighbour's optimum, and the sections that leave 1e-3
RATIO_STEPS = 60  # at most, to the size of a prescribed ratio
COST_DEGREE, COST_POINTS = 2, 65  # of log cost in log N, and the points at which it is tabulated


@dataclass(frozen=True)
class Cost:
    """FLOP per parameter and token against log N, from a family's own rows; constant beyond the measured sizes.

    Small models pay relatively more for attention and element-wise work, so a single factor of 6 would shift the two
    families against each other by different amounts.
    """

    log_n: np.ndarray
    log_cost: np.ndarray

    @classmethod
    def of(cls, runs: Runs, spent: np.ndarray | None = None) -> Cost:
        """Parabola of log cost / (N D) in log N through the rows; `spent` (n,) is flops unless given.

        A line from size to size instead would have a kink at each, and the best allocations would gather there.
        """
        log_n = np.log(runs["N"])
        ratio = np.log((runs["flops"] if spent is None else spent) / (runs["N"] * runs["D"]))
        sizes, middle = np.unique(log_n.round(6)), log_n.mean()
        # Attention, head and element-wise work fall off relative to 6 N D in a smooth way, which a parabola in log N
        # follows.
        smooth = np.polyfit(log_n - middle, ratio, min(COST_DEGREE, len(sizes) - 1))
        grid = np.linspace(sizes[0], sizes[-1], COST_POINTS if len(sizes) > 1 else 1)
        return cls(grid, np.polyval(smooth, grid - middle))

    def rate(self, n: np.ndarray | float) -> np.ndarray:
        """FLOP per parameter and token at n parameters, shaped like n."""
        return np.exp(np.interp(np.log(n), self.log_n, self.log_cost))

    def log_tokens(self, log_n: np.ndarray, log_flops: np.ndarray) -> np.ndarray:
        """log D that spends the whole budget at size log N."""
        return log_flops - log_n - np.interp(log_n, self.log_n, self.log_cost)


SIX_N_D = Cost(np.zeros(1), np.log([FLOPS_PER_PARAMETER_TOKEN]))  # for laws that are assumed and have no runs


@dataclass(frozen=True)
class Frontier:
    """Along budgets: loss (K, M), log N and log D (K, M) of the best allocation, or of the one prescribed; these two
    NaN for a law of compute alone, which knows no allocation."""

    log_flops: np.ndarray
    loss: np.ndarray
    log_n: np.ndarray
    log_d: np.ndarray


def is_positive(text: str) -> bool:
    value = as_number(text)
    return value is not None and 0 < value < np.inf


def frontier_along(
    path: str,
    law: Law,
    theta: np.ndarray,
    centre: np.ndarray,
    cost: Cost,
    log_flops: np.ndarray,
    near: np.ndarray | None = None,
) -> Frontier:
    """The frontier on a named path: "optimal", "ratio=20" (tokens per parameter) or "size=1e9" (parameters).

    theta: (K, p) one family's centred vectors; log_flops: (M,), or (K, 1) for a budget of its own for every vector.
    Raises ScalingError on another path, or on any but the first for a law of compute alone.
    """
    if path == "optimal":
        return frontier(law, theta, centre, cost, log_flops, near)
    if not law.has_allocation:
        raise ScalingError(f"law {law.name!r} depends on compute alone: no ratio or size can be prescribed to it")
    kind, _, number = path.partition("=")
    if kind not in ("ratio", "size") or not is_positive(number):
        raise ScalingError(f"unknown path {path!r}; choose optimal, ratio=TOKENS_PER_PARAMETER or size=PARAMETERS")
    follow = fixed_ratio if kind == "ratio" else fixed_size
    log_n, log_d = follow(cost, log_flops, float(number))
    shape = np.broadcast_shapes((len(theta), 1), log_flops.shape)
    loss = np.exp(law.value(theta, law.features_at(log_n, log_d, centre, log_flops)))
    return Frontier(log_flops, loss, np.broadcast_to(log_n, shape), np.broadcast_to(log_d, shape))


def fixed_ratio(cost: Cost, log_flops: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """log N and log D along budgets at a fixed number of tokens per parameter."""
    log_n = (log_flops - np.log(ratio) - cost.log_cost.mean()) / 2
    for _ in range(RATIO_STEPS):  # cost per parameter and token varies slowly with N, so this contracts
        before, log_n = log_n, (log_flops - np.log(ratio) - np.interp(log_n, cost.log_n, cost.log_cost)) / 2
        if np.allclose(log_n, before, rtol=0, atol=1e-13):
            break
    return log_n, log_n + np.log(ratio)


def fixed_size(cost: Cost, log_flops: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """log N and log D along budgets at a fixed number of parameters."""
    log_n = np.full_like(log_flops, np.log(size))
    return log_n, cost.log_tokens(log_n, log_flops)


def frontier(
    law: Law,
    theta: np.ndarray,
    centre: np.ndarray,
    cost: Cost,
    log_flops: np.ndarray,
    near: np.ndarray | None = None,
) -> Frontier:
    """Minimises the loss over N at each budget, by golden section for all K vectors and M budgets at once.

    theta: (K, p) one family's centred vectors; log_flops: (M,) or (K, 1); near: (M,) log N of an optimum not far away,
    which shortens the search. The loss is a sum of exponentials in log N along a budget, hence convex there, so the
    search cannot end in a wrong valley.
    """
    # Along a budget tokens follow from size, so that the best allocation is a search in one number, log N.
    shape = np.broadcast_shapes((len(theta), 1), log_flops.shape)
    if not law.has_allocation:
        nowhere = np.full(shape, np.nan)
        loss = np.exp(law.value(theta, law.features_at(nowhere, nowhere, centre, log_flops)))
        return Frontier(log_flops, loss, nowhere, nowhere)
    # Draws of one posterior have their optima near each other: with a neighbour's optimum known the bracket is short,
    # and 19 sections do where 34 would be needed.
    low = np.full(shape, np.log(10.0)) if near is None else np.broadcast_to(near - NEAR, shape)
    high = np.broadcast_to(log_flops - cost.log_cost.max() - np.log(10.0) if near is None else near + NEAR, shape)

    def log_loss(log_n: np.ndarray) -> np.ndarray:
        return law.value(theta, law.features_at(log_n, cost.log_tokens(log_n, log_flops), centre, log_flops))

    # Each step keeps one of the two inner points, as the golden ratio makes it an inner point of the shorter bracket
    # too: one new loss a step for every draw and budget, and no derivative.
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = log_loss(left), log_loss(right)
    for _ in range(SEARCH_STEPS if near is None else NEAR_STEPS):
        down = at_left < at_right
        high, low = np.where(down, right, high), np.where(down, low, left)
        probe = np.where(down, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        seen = log_loss(probe)
        left, right = np.where(down, probe, right), np.where(down, left, probe)
        at_left, at_right = np.where(down, seen, at_right), np.where(down, at_left, seen)
    best = (low + high) / 2
    return Frontier(log_flops, np.exp(log_loss(best)), best, cost.log_tokens(best, log_flops))
