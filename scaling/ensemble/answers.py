"""What an ensemble answers, as small records: an interval with what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
UNINFORMATIVE = 0.05  # an interval wider than this share of the loss says nothing that was not known


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Equal-tailed percentile interval of draws (K,); infinite values count."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Loss of B minus loss of A on their frontiers at one budget, in the unit of the table; below zero B is better.

    low, high: 95 % of the draws. p_better: share of draws in which B is better, conditional on the laws considered;
    None beyond the validated distance. decades: beyond the largest budget that both families reached, 0 within.
    informative: the interval is no wider than `UNINFORMATIVE` times the loss.
    """

    budget: float
    unit: str
    value: float
    low: float
    high: float
    p_better: float | None
    decades: float
    validated: bool
    informative: bool


@dataclass(frozen=True)
class Crossing:
    """From which budget on B leads. kind:

    "inside": between low and high (95 %, two-sided); the estimate lies within the ladder's compute.
    "not before": above low, if at all (95 %, one-sided); high is inf.
    "by": by high at the latest (95 %, one-sided); low is 0.
    "throughout": B leads over the whole ladder. "open": the runs do not say.

    estimate: the median of the draws, 0 for throughout and inf for never within two decades beyond the runs.
    """

    kind: str
    low: float
    high: float
    unit: str
    estimate: float
    untied: bool = False

    def contains(self, budget: float) -> bool:
        """Whether what is said holds if B leads from this budget on (0: throughout, inf: never)."""
        return self.low <= budget <= self.high


@dataclass(frozen=True)
class Prediction:
    """Loss of one family at N parameters and D tokens, in the unit of the table. low, high: 95 % of the mean curve;
    run_low, run_high: of a new run, whose interval contains the other. decades: of compute beyond the family's largest
    run, 0 within."""

    family: str
    N: float
    D: float
    loss: float
    low: float
    high: float
    run_low: float
    run_high: float
    sd: float
    decades: float
    validated: bool
    informative: bool


@dataclass(frozen=True)
class TaskPrediction:
    """Accuracy in the task `column` of one family, by its loss. low, high: 95 % of the mean curve; run_low, run_high:
    of a new run, measured on as many items as the runs were. N, D: of the run, or the best for a budget of `flops`.
    decades, validated: as of a loss, by back-tests of the accuracy."""

    family: str
    column: str
    N: float
    D: float
    flops: float
    accuracy: float
    low: float
    high: float
    run_low: float
    run_high: float
    loss: float
    loss_interval: tuple[float, float]
    decades: float
    validated: bool


@dataclass(frozen=True)
class Allocation:
    """Best parameters N, tokens D and their ratio at a budget of `flops`, and the loss they reach, with 95 % intervals;
    decades: beyond the family's largest run."""

    family: str
    flops: float
    N: float
    N_interval: tuple[float, float]
    D: float
    D_interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    decades: float
    validated: bool


@dataclass(frozen=True)
class Efficiency:
    """One parameter of B is worth rho of A's at N parameters and D tokens: A reaches B's loss with rho N parameters."""

    N: float
    D: float
    rho: float
    low: float
    high: float


@dataclass(frozen=True)
class BreakEven:
    """kappa* at A's budget `flops`: what one of B's ternary operations may cost, in operations of A, for B to reach A's
    loss at A's price. share: of B's operations that are ternary at the size that it needs for that. Zero or less: no
    price is low enough."""

    flops: float
    value: float
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class Parameter:
    """A parameter of a law: median and 95 % interval of the draws. Not identified: the runs have hardly narrowed what
    was assumed before them."""

    name: str
    value: float
    low: float
    high: float
    identified: bool
