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
    factor: that widening; extrapolation: 6 N D over that of the largest run fitted (FLOP over FLOP for a law in
    compute)."""

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
    """One family's fit: law, centre (2,), theta (p,), draws (K, p), sd of a run about the curve (log loss);
    calibration: (decades beyond the data, factor) steps from the back-test, empty where there is none; largest: FLOP of
    the largest run fitted, the table's own for a law in compute and 6 N D else; asks: what a prediction must be told
    besides N and D ("flops", "unique", "precision")."""

    law: Law
    centre: np.ndarray
    theta: np.ndarray
    draws: np.ndarray
    run_noise: float
    calibration: tuple[tuple[float, float], ...]
    largest: float
    asks: tuple[str, ...]

    @classmethod
    def of(cls, entry: dict[str, Any], draws: np.ndarray) -> Forecaster:
        """From a family's entry of a fit.json and its stored draws."""
        steps = tuple((float(x), float(f)) for x, f in entry["calibration"])
        centre, theta = np.array(entry["centre"]), np.array(entry["theta"])
        law = law_named(entry["law"])
        unique, precision = None if entry.get("repeats_tokens", True) else np.inf, entry.get("precision", "")
        open_to = {"flops": "C" in law.inputs}
        open_to |= {"unique": law.beside == "U" and unique is None}
        open_to |= {"precision": law.beside == "precision" and not precision}
        six_n_d = entry["largest_flops_6nd"]
        largest = entry.get("largest_flops", six_n_d) if "C" in law.inputs else six_n_d
        asks = tuple(name for name, needed in open_to.items() if needed)
        return cls(law.given(unique, precision), centre, theta, draws, entry["run_noise"], steps, largest, asks)

    def at(
        self, n: float, d: float, flops: float | None = None, unique: float | None = None, precision: str = ""
    ) -> Prediction:
        """Prediction at n parameters and d tokens; the rest for the laws that ask for it. Raises ScalingError where it
        is not given."""
        law = self.law.given(unique, precision)
        log_c = None if flops is None else np.log([flops])
        features = law.features_at(np.log([n]), np.log([d]), self.centre, log_c)
        loss = float(np.exp(law.value(self.theta[None], features))[0, 0])
        drawn = law.value(self.draws, features)
        low, high = interval(np.exp(drawn[:, 0]))
        spent = flops if "C" in law.inputs and flops is not None else 6 * n * d
        ratio = float(spent / self.largest)
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
