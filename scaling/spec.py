"""What an analysis assumes: one set of choices, with one set of defaults for Python and for every verb."""

from __future__ import annotations

from dataclasses import dataclass, field

from scaling.costs import CITED, Prices
from scaling.ensemble.posterior import NOISES
from scaling.fitting.selection import CHOICES
from scaling.laws.forms import law_named
from scaling.tables.runs import ScalingError


@dataclass(frozen=True)
class Spec:
    """law: see `scaling.laws.forms`. objective: huber, lad, log-ls or raw-ls; auto weighs normal against Huber's noise.
    delta: Huber threshold of single fits (None: from the noise). share: parameters that families have in common (None:
    every tie, by its weight). select: which rows count (all, best learning rate of each cell, envelope). draws and seed
    are the ensemble's. prices: of operations and hours. baseline: the family that others are compared with.

    Raises ScalingError on a value that means nothing.
    """

    law: str = "chinchilla"
    objective: str = "auto"
    delta: float | None = None
    share: tuple[str, ...] | None = None
    select: str = "all"
    draws: int = 2000
    seed: int = 0
    prices: Prices = field(default_factory=lambda: CITED)
    baseline: str | None = None

    def __post_init__(self) -> None:
        law_named(self.law)
        for name, value, choices in (("objective", self.objective, NOISES), ("select", self.select, CHOICES)):
            if value not in choices:
                raise ScalingError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        if self.draws < 1 or not (self.delta is None or self.delta > 0):
            raise ScalingError("draws and delta must be positive")

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """The sets of shared parameters that the ensemble considers."""
        law = law_named(self.law)
        return law.ties() if self.share is None else (law.checked_share(self.share),)

    @property
    def point_objective(self) -> str:
        """Objective of a single best fit: Huber's where noises are weighed."""
        return "huber" if self.objective == "auto" else self.objective
