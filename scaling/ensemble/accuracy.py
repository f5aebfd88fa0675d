"""From loss to accuracy: an ensemble of a loss, and behind it one of a task's error as a sigmoid of that loss.

Two steps (Gadre et al. 2024, arXiv 2403.08540; Bhagia et al. 2024, arXiv 2412.04403): the law of the loss in N and D,
and the error against the loss. Each draw of the first step goes on through a draw of the second, misfit and noise of
both included, so that the interval of an accuracy holds what neither step knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from scaling.ensemble.answers import Parameter, TaskPrediction, interval
from scaling.ensemble.backtest import BackTest, LeftOut, backtest, spread
from scaling.ensemble.discrepancy import RUN
from scaling.ensemble.ensemble import IDENTIFIED, Ensemble
from scaling.ensemble.posterior import Draws, Posterior, Rows, posterior
from scaling.ensemble.rows import MOST_ROWS, gathered
from scaling.laws.sigmoid import Sigmoid, angle, of_angle
from scaling.spec import Spec
from scaling.tables.equal import Equal
from scaling.tables.runs import Runs, ScalingError

LAW = Sigmoid()
SPARE_ROWS = 2  # rows beyond the number of parameters that a sigmoid needs
# A task has some hundreds or thousands of items, so that errors scatter by some percent where losses scatter by some
# tenths: every prior of a departure is that of losses times this.
SCATTER = 10.0
SPAN = 2.0  # decades that the range of a ladder's losses counts as, for the length of the misfit
ACCURACY = "accuracy"


@dataclass(frozen=True, eq=False)
class Accuracy(Equal):
    """Accuracy in a task, the column `column` of the table, of one family of an ensemble of losses. centre (1,): mean
    loss of its rows; step: loss that counts as a decade. `draws` are as many as the losses', and go with them."""

    losses: Ensemble
    family: str
    column: str
    centre: np.ndarray
    step: float
    posterior: Posterior
    draws: Draws

    @classmethod
    def of(cls, losses: Ensemble, family: str, column: str) -> Accuracy:
        """Fits the second step to the rows of the family that hold an accuracy; raises ScalingError where they are too
        few, or tell nothing."""
        part, spec = measured(losses.runs.family(family), column), losses.spec
        fault = row_fault(part, column, family)
        if fault:
            raise ScalingError(fault)
        centre, step = np.array([part["loss"].mean()]), float(np.ptp(part["loss"])) / SPAN
        features, alone = LAW.features(part, centre), np.full(len(part), -1)
        rows = Rows(angle(1 - part[column]), 0 * alone, alone, alone, features.T / step, features, np.ones(len(part)))
        rows = rows if len(part) <= MOST_ROWS else gathered(rows)
        found = posterior(rows, LAW, ((),), spec.objective, spec.seed, scale=SCATTER)
        rng = np.random.default_rng([spec.seed, 3])
        draws = found.draws(len(losses.draws.theta), rng)
        # Draws come in the order of their hyperparameters, in both steps; neither knows anything of the other's.
        return cls(losses, family, column, centre, step, found, draws.part(rng.permutation(len(draws.theta))))

    def error(self, log_loss: np.ndarray) -> np.ndarray:
        """(K,) angle of the mean error, each draw's at a log loss (K,) of its own."""
        apart = np.exp(log_loss) - self.centre[0]
        own = LAW.value(self.draws.theta[:, 0], apart[None, :, None])[:, 0]
        return own + self.draws.misfit_each(apart[:, None] / self.step)

    def noise(self) -> np.ndarray:
        """(K,) noise of a new run on the angle of its error."""
        rng = np.random.default_rng([self.losses.spec.seed, 4])
        return self.draws.h[:, RUN] * self.draws.tail * rng.normal(size=len(self.draws.h))

    def spans(self, log_loss: np.ndarray) -> tuple[float, float, float, float, float]:
        """Accuracy at log losses (K,) of the mean curve: median and 95 %, and 95 % of a new run."""
        curve = 1 - of_angle(self.error(log_loss))
        low, high = interval(curve)
        run_low, run_high = interval(1 - of_angle(self.error(log_loss + self.losses.run_noise()) + self.noise()))
        return float(np.median(curve)), low, high, min(run_low, low), max(run_high, high)

    def predict(self, N: float, D: float, **known: Any) -> TaskPrediction:
        """Accuracy of a run that has not been made; `known` as for `Ensemble.predict`."""
        curve, decades = self.losses.point(N, D, self.family, known)
        spent = known.get("flops") or float(self.losses.cost(self.family).rate(N)) * N * D
        return self.answer(N, D, spent, curve, decades)

    def at(self, flops: float, serve_tokens: float = 0.0) -> TaskPrediction:
        """Accuracy of the best model for a budget, as `Ensemble.allocate` finds it by the loss."""
        best = self.losses.allocate(flops, self.family, serve_tokens)
        curve = self.losses.best_allocation(flops, self.family, serve_tokens)[1]
        return self.answer(best.N, best.D, flops, curve, best.decades)

    def answer(self, N: float, D: float, flops: float, curve: np.ndarray, decades: float) -> TaskPrediction:
        """The answer for draws of the log loss (K,)."""
        loss = float(np.exp(np.median(curve))), interval(np.exp(curve))
        known = decades <= 0 or decades <= self.reach + 1e-6
        where = self.family, self.column, N, D, flops
        return TaskPrediction(*where, *self.spans(curve), *loss, decades, known)

    def parameters(self) -> tuple[Parameter, ...]:
        """Floor and ceiling of the error, midpoint and slope of the sigmoid."""
        theta = self.draws.theta[:, 0]
        wide = np.where(LAW.logged, np.log(np.where(LAW.logged, theta, 1.0)), theta).std(axis=0)
        values = LAW.raw(theta, self.centre).T
        kept = (wide < IDENTIFIED * self.posterior.sd[0]).tolist()
        return tuple(
            Parameter(name, float(np.median(v)), *interval(v), known)
            for name, v, known in zip(LAW.names, values, kept, strict=True)
        )

    @cached_property
    def test(self) -> BackTest:
        """Both steps fitted to the cheap runs alone, against the accuracies of the dear ones."""
        runs, column, family = measured(self.losses.runs.family(self.family), self.column), self.column, self.family

        def early(part: Runs, families: Any, spec: Spec) -> Accuracy:
            return Accuracy.of(Ensemble.of(part, families, spec), family, column)

        def fault(part: Runs) -> str:
            return row_fault(part, column, family)

        return backtest(runs, (family,), self.losses.spec, early, forecasts, fault)

    @property
    def reach(self) -> float:
        """Decades beyond the largest run to which the back-test validates accuracies; 0 without any."""
        return self.test.reach


def forecasts(found: Accuracy, left_out: Runs, family: str, q: float) -> list[LeftOut]:
    """What an early analysis says of the accuracies of other runs."""
    part, out = left_out.select(spread(np.arange(len(left_out)))), []
    curves = found.losses.rows_curve(family, part)
    decades = np.log10(part["flops"] / found.losses.runs["flops"].max()).clip(0)
    for k in range(len(part)):
        value, _, _, low, high = found.spans(curves[:, k])
        seen = float(part[found.column][k])
        out.append(LeftOut(ACCURACY, q, family, str(part["run_id"][k]), float(decades[k]), value, low, high, seen))
    return out


def measured(part: Runs, column: str) -> Runs:
    """The rows that hold an accuracy. Raises ScalingError on a column that is not there or is text."""
    values = part[column]
    if values.dtype == object:
        raise ScalingError(f"column {column!r} holds text, no accuracies")
    return part.select(~np.isnan(values))


def row_fault(part: Runs, column: str, family: str) -> str:
    """Why rows tell no curve of accuracy against loss; "" where they do."""
    values, needed = part[column], len(LAW.names) + SPARE_ROWS
    if len(part) < needed:
        return f"column {column!r} holds an accuracy for {len(part)} runs of {family!r}: {needed} are needed"
    beyond = (values < 0) | (values > 1)
    if beyond.any():
        run = f"run {part['run_id'][beyond][0]!r} has {values[beyond][0]:g}"
        return (
            f"column {column!r} must hold accuracies between 0 and 1 (percent: --column {column}={column}/100): {run}"
        )
    for name, what in ((column, "accuracy"), ("loss", "loss")):
        if np.ptp(part[name]) == 0:
            return f"the {what} ({name}) of {family!r} is {part[name][0]:g} in every run: there is no curve to fit"
    return ""
