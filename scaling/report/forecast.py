"""What a stored fit forecasts: the mean curve, and a run that has not been made, each with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit
from scaling.laws.base import Law
from scaling.laws.forms import law_named
from scaling.uncertainty.backtest import BINS, LEVELS, NORMAL_95, BackTest, robust_sd
from scaling.uncertainty.bootstrap import interval


@dataclass(frozen=True)
class Prediction:
    """Loss in nats per token at N parameters and D tokens. low, high: 95 % of the mean curve's draws. run_low,
    run_high: 95 % interval of a new run, residual noise and the back-test's widening included, with `sd` of log loss.
    factor: that widening; extrapolation: 6 N D over that of the largest run fitted."""

    loss: float
    low: float
    high: float
    run_low: float
    run_high: float
    sd: float
    factor: float
    extrapolation: float


@dataclass(frozen=True)
class Forecaster:
    """One family's fit: law, centre (2,), theta (p,), draws (K, p), sd of a run about the curve (log loss), and
    calibration: (decades beyond the data, factor) steps from the back-test, empty where there is none."""

    law: Law
    centre: np.ndarray
    theta: np.ndarray
    draws: np.ndarray
    run_noise: float
    calibration: tuple[tuple[float, float], ...]
    largest: float

    @classmethod
    def of(cls, entry: dict[str, Any], draws: np.ndarray) -> Forecaster:
        """From a family's entry of a fit.json and its stored draws."""
        steps = tuple((float(x), float(f)) for x, f in entry["calibration"])
        centre, theta = np.array(entry["centre"]), np.array(entry["theta"])
        return cls(law_named(entry["law"]), centre, theta, draws, entry["run_noise"], steps, entry["largest_flops_6nd"])

    def at(self, n: float, d: float) -> Prediction:
        """Prediction at n parameters and d tokens."""
        features = self.law.features_at(np.log([n]), np.log([d]), self.centre)
        loss = float(np.exp(self.law.value(self.theta[None], features))[0, 0])
        drawn = self.law.value(self.draws, features)
        low, high = interval(np.exp(drawn[:, 0]))
        ratio = float(6 * n * d / self.largest)
        factor = self.factor(np.log10(ratio))
        sd = factor * float(np.hypot(robust_sd(drawn)[0], self.run_noise))
        edges = [loss * float(np.exp(side * NORMAL_95 * sd)) for side in (-1, 1)]
        return Prediction(loss, low, high, edges[0], edges[1], sd, factor, ratio)

    def factor(self, decades: float) -> float:
        """What the back-test multiplies a half-width by at this distance; 1 within the data or without a back-test."""
        if decades <= 0 or not self.calibration:
            return 1.0
        return next((f for x, f in self.calibration if x >= decades), self.calibration[-1][1])


def run_noise(fitted: Fit) -> float:
    """Sd of log loss of a run about a lone family's fitted curve, with the degrees of freedom taken off."""
    residuals = fitted.residuals()
    return float(np.sqrt((residuals**2).sum() / max(len(residuals) - len(fitted.theta), 1)))


def calibration_steps(test: BackTest) -> list[list[float]]:
    """[decades, factor] of the loss up to the farthest held-out run; empty without a back-test."""
    if not test.of(LEVELS):
        return []
    edges = [b for b in BINS[1:] if b < test.reach(LEVELS)] + [test.reach(LEVELS)]
    return [[float(x), float(f)] for x, f in zip(edges, test.factors(LEVELS, np.array(edges)), strict=True)]
