"""The ensemble: draws of two families' laws and misfits, from which every statement about scaling is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import CubicSpline

from scaling.costs import AXES, axis_cost, lacking
from scaling.ensemble.answers import (
    UNINFORMATIVE,
    Allocation,
    BreakEven,
    Crossing,
    Difference,
    Efficiency,
    Parameter,
    Prediction,
    interval,
)
from scaling.ensemble.backtest import BackTest, backtest
from scaling.ensemble.crossing import GIVEN, HORIZON, crossing_of, lowest, overtakes
from scaling.ensemble.discrepancy import CELL, RUN, TRUNK, Points
from scaling.ensemble.frontier import Cost, Frontier, frontier_along
from scaling.ensemble.posterior import Draws, Posterior, posterior
from scaling.ensemble.rows import place, rows_of
from scaling.fitting.fit import row_fault
from scaling.fitting.selection import selected
from scaling.laws.base import Law, centre_of
from scaling.laws.forms import law_named
from scaling.spec import Spec
from scaling.tables.equal import Equal
from scaling.tables.runs import Runs, ScalingError, check_comparable, frame_of

if TYPE_CHECKING:
    from scaling.ensemble.accuracy import Accuracy

POINTS_PER_DECADE = 8
FLOORS = 0.25  # posterior weight (half before any run) of equal floors below which they are not supported
IDENTIFIED = 0.7  # posterior over prior spread above which the runs have told nothing of a parameter
SPLINE_KNOTS = 14
REMEMBERED = 16  # frontiers, of a megabyte each
SERVING = 2.0  # FLOP a parameter and token of a forward pass


@dataclass(frozen=True, eq=False)
class Ensemble(Equal):
    """One family, or two: A (`a`) and B (`b`, compared with it). Its methods answer; `verdict()` says it in words.

    Every probability and interval is conditional on the laws, ties and kinds of misfit that were considered. `draws`
    are the headline's: all ties by weight where equal floors are supported, else the untied ones.
    """

    runs: Runs
    spec: Spec
    families: tuple[str, ...]
    law: Law
    centre: np.ndarray
    posterior: Posterior
    draws: Draws
    only_untied: bool = False
    pairs: tuple[Ensemble, ...] = field(default=(), repr=False)

    # ------------------------------------------------------------------ what it is

    @property
    def a(self) -> str:
        return self.families[0]

    @property
    def b(self) -> str:
        """The second family; raises ScalingError for a lone one."""
        if len(self.families) < 2:
            raise ScalingError(f"{self.a!r} is the only family: there is nothing to compare it with")
        return self.families[1]

    def __repr__(self) -> str:
        names = " and ".join(self.families)
        return f"<Ensemble of {names}: {len(self.runs)} runs, law {self.law.name}, {len(self.draws.theta)} draws>"

    def _repr_html_(self) -> str:
        from scaling.report.words import html_paragraphs

        return html_paragraphs(self)

    @cached_property
    def tie_weights(self) -> dict[tuple[str, ...], float]:
        """Posterior weight of every set of shared parameters."""
        # A tie's weight is its share of the evidence, summed over hyperparameters and noises. Evidence charges for
        # freedom that the data do not need, so that a tie gains where the runs do not contradict it.
        score = self.posterior.score
        weight = np.exp(score - score.max()).sum(axis=(0, 2))
        return dict(zip(self.posterior.ties, (weight / weight.sum()).tolist(), strict=True))

    @property
    def equal_floors(self) -> float:
        """Posterior weight of the ties that share E; NaN where there is no choice."""
        # Before any run half of the ties share E, whatever the law: 0.5 is where the runs say nothing.
        kinds = {"E" in tie for tie in self.posterior.ties}
        return sum(w for tie, w in self.tie_weights.items() if "E" in tie) if len(kinds) == 2 else float("nan")

    @cached_property
    def untied(self) -> Ensemble:
        """The same with nothing shared; itself where nothing can be, or where it is untied already."""
        free = np.array([not tie for tie in self.posterior.ties])
        if self.only_untied or free.all() or not free.any():
            return self
        return self.restricted(free)

    @cached_property
    def tied(self) -> Ensemble:
        """The same over all ties by weight."""
        return self.restricted(np.ones(len(self.posterior.ties), bool)) if self.only_untied else self

    def restricted(self, ties: np.ndarray) -> Ensemble:
        """With draws of some ties (a mask) only."""
        draws = self.posterior.draws(self.spec.draws, np.random.default_rng([self.spec.seed, 1]), ties)
        return replace(self, draws=draws, only_untied=not ties.all(), pairs=())

    # ------------------------------------------------------------------ where it may be asked

    def measured(self, axis: str = "flops") -> tuple[float, float]:
        """(low, high) budget that the runs of every family span; low lies above high where they have none in common."""
        spent = [axis_cost(self.runs.family(f), axis, self.spec.prices) for f in self.families]
        return max(float(s.min()) for s in spent), min(float(s.max()) for s in spent)

    def decades(self, budget: float, axis: str = "flops") -> float:
        """Decades beyond the largest budget that every family reached; 0 within the runs."""
        return max(0.0, float(np.log10(budget / self.measured(axis)[1])))

    @cached_property
    def test(self) -> BackTest:
        """The same analysis of the cheap runs alone, against the dear ones."""
        return backtest(self.runs, self.families, self.spec, type(self).of)

    @property
    def reach(self) -> float:
        """Decades beyond the largest run to which back-tests validate probabilities and intervals; 0 without any."""
        return self.test.reach

    def validated(self, budget: float, axis: str = "flops") -> bool:
        distance = self.decades(budget, axis)
        return distance <= 0 or distance <= self.reach + 1e-6

    # ------------------------------------------------------------------ curves

    @classmethod
    def of(cls, runs: Runs, families: Sequence[str], spec: Spec, **settings: Any) -> Ensemble:
        """Of one or two families; settings as for `posterior`."""
        law = law_named(spec.law)
        for family in families:
            fault = row_fault(runs.family(family), law)
            if fault:
                raise ScalingError(fault)
        chosen = in_order(runs, families)
        centre = centre_of(chosen)
        ties = spec.ties if len(families) > 1 else ((),)
        found = posterior(rows_of(chosen, families, law, centre), law, ties, spec.objective, spec.seed, **settings)
        draws = found.draws(spec.draws, np.random.default_rng([spec.seed, 1]))
        ensemble = cls(chosen, spec, tuple(families), law, centre, found, draws)
        return ensemble.untied if ensemble.equal_floors < FLOORS else ensemble

    @cached_property
    def middle(self) -> np.ndarray:
        """(families, P) centred parameters at the mean of the draws, exponents by their geometric mean."""
        logged = self.law.logged
        # Exponents are drawn as logarithms, so their mean is a geometric one; it is where the frontiers' paths are
        # taken.
        theta = self.draws.theta
        mean = np.where(logged, np.log(np.where(logged, theta, 1.0)), theta).mean(axis=0)
        return np.where(logged, np.exp(np.where(logged, mean, 0.0)), mean)

    def cost(self, family: str, axis: str = "flops") -> Cost:
        """What a parameter and token of a family costs by size, from its own runs."""
        runs = self.runs.family(family)
        reason = lacking(runs, axis, self.spec.prices, self.law)
        if reason:
            raise ScalingError(f"axis {axis!r} {reason}")
        return Cost.of(runs, axis_cost(runs, axis, self.spec.prices))

    def law_along(self, family: str) -> Law:
        """The law along a family's frontier, by what its runs have in common."""
        return self.law.along(self.runs.family(family))

    def path(self, family: str, budgets: np.ndarray, axis: str = "flops", along: str = "optimal") -> Frontier:
        """The path of a family at the mean of the draws: its best N and D at every budget (1, M)."""
        law, cost, own = self.law_along(family), self.cost(family, axis), self.families.index(family)
        return frontier_along(along, law, self.middle[[own]], self.centre, cost, np.log(budgets))

    def frontier(self, family: str, budgets: np.ndarray, axis: str = "flops", along: str = "optimal") -> np.ndarray:
        """(K, M) losses of a family's best allocation at budgets (M,), or along "ratio=20" or "size=1e9".

        The law's optimum is each draw's own; the misfit is taken where the mean of the draws has its optimum, to which
        the loss is flat.
        """
        budgets = np.asarray(budgets, dtype=float)
        asked = (family, axis, along, budgets.tobytes())
        if asked not in self.remembered:
            while len(self.remembered) >= REMEMBERED:
                self.remembered.pop(next(iter(self.remembered)))
            self.remembered[asked] = self.frontier_draws(family, np.log(budgets), axis, along)
        return self.remembered[asked]

    @cached_property
    def remembered(self) -> dict[tuple[str, str, str, bytes], np.ndarray]:
        """The last frontiers that were asked for: sentences, tables and figures ask for the same ones."""
        return {}

    def frontier_draws(self, family: str, log_c: np.ndarray, axis: str, along: str) -> np.ndarray:
        """(K, M) losses for `frontier`, at log budgets (M,)."""
        law, cost = self.law_along(family), self.cost(family, axis)
        # The law's own frontier is so smooth in log C that a spline through a few of its points is exact to 1e-7.
        few = log_c if len(log_c) <= SPLINE_KNOTS else np.linspace(log_c.min(), log_c.max(), SPLINE_KNOTS)
        near = self.path(family, np.exp(few), axis, along).log_n[0]
        # Every draw has its own optimum, which matters, since the loss at another draw's optimum is too high.
        theta = self.draws.theta[:, self.families.index(family)]
        own = np.log(frontier_along(along, law, theta, self.centre, cost, few, near).loss)
        own = own if few is log_c else CubicSpline(few, own, axis=1)(log_c)
        middle = self.path(family, np.exp(log_c), axis, along)
        return np.exp(own + self.misfit_at(family, middle.log_n[0], middle.log_d[0], log_c))

    def misfit_at(self, family: str, log_n: np.ndarray, log_d: np.ndarray, log_c: np.ndarray | None) -> np.ndarray:
        """(K, m) each draw's departure of log loss from its law."""
        x = place(self.law, log_n, log_d, log_c, self.centre)
        return self.draws.misfit(Points(x, np.full(len(x), self.families.index(family))))

    def budgets(self, axis: str = "flops", beyond: float = GIVEN) -> np.ndarray:
        """(M,) a grid from the lowest budget of the ladder to `beyond` decades above its largest; both ends of the
        ladder are points."""
        low, high = sorted(self.measured(axis))
        inside = np.geomspace(low, high, max(2, int(np.ceil(np.log10(high / low) * POINTS_PER_DECADE)) + 1))
        outside = high * 10 ** np.linspace(0, beyond, int(np.ceil(beyond * POINTS_PER_DECADE)) + 1)[1:]
        return np.concatenate([inside, outside])

    def gaps(self, budgets: np.ndarray, axis: str = "flops", along: str = "optimal") -> np.ndarray:
        """(K, M) loss of B minus loss of A at budgets (M,)."""
        return self.frontier(self.b, budgets, axis, along) - self.frontier(self.a, budgets, axis, along)

    # ------------------------------------------------------------------ answers

    def difference(self, budget: float, axis: str = "flops", along: str = "optimal") -> Difference:
        """The difference of the two frontiers at a budget, in units of the axis."""
        gaps = self.gaps(np.array([budget]), axis, along)[:, 0]
        level = float(np.median(self.frontier(self.a, np.array([budget]), axis, along)))
        low, high = interval(gaps)
        known = self.validated(budget, axis)
        chance = float((gaps < 0).mean()) if known else None
        unit, decades = AXES[axis], self.decades(budget, axis)
        value, clear = float(np.median(gaps)), high - low <= UNINFORMATIVE * level
        return Difference(budget, unit, value, low, high, chance, decades, known, clear)

    def crossing(self, axis: str = "flops", along: str = "optimal") -> Crossing:
        """From which budget on B leads: two-sided within the ladder's compute, one-sided beyond."""
        # Two decades beyond the runs are looked at, though no answer is given beyond one: a crossing there tells a
        # draw that crosses late from one that never does.
        budgets = self.budgets(axis, HORIZON)
        measured = self.measured(axis)
        draws = overtakes(np.log(budgets), self.gaps(budgets, axis, along), max(measured))
        return crossing_of(draws, measured, AXES[axis], self.only_untied)

    def predict(self, N: float, D: float, family: str | None = None, **known: Any) -> Prediction:
        """The loss of a run that has not been made; `known`: flops, and the column that stands beside the law."""
        family = family or self.lone("a prediction")
        curve, decades = self.point(N, D, family, known)
        # A draw's own noise is added to its own curve, so that the interval of a run holds both uncertainties.
        run = curve + self.run_noise()
        (low, high), (run_low, run_high) = interval(np.exp(curve)), interval(np.exp(run))
        loss = float(np.exp(np.median(curve)))
        ends = loss, low, high, min(run_low, low), max(run_high, high)
        validated = decades <= 0 or decades <= self.reach + 1e-6
        return Prediction(family, N, D, *ends, float(run.std()), decades, validated, high - low <= UNINFORMATIVE * loss)

    def point(self, N: float, D: float, family: str, known: Mapping[str, Any]) -> tuple[np.ndarray, float]:
        """(K,) log of the mean curve at a run that has not been made, and its decades beyond the family's largest."""
        log_n, log_d = np.log([N]), np.log([D])
        log_c = np.log([known["flops"]]) if known.get("flops") else None
        law = self.law.for_run(self.runs.family(family), known)
        features = law.features_at(log_n, log_d, self.centre, log_c)
        own = law.value(self.draws.theta[:, self.families.index(family)], features)[:, 0]
        spent = known.get("flops") or float(self.cost(family).rate(N)) * N * D
        decades = max(0.0, float(np.log10(spent / self.runs.family(family)["flops"].max())))
        return own + self.misfit_at(family, log_n, log_d, log_c)[:, 0], decades

    def accuracy(self, column: str, family: str | None = None) -> Accuracy:
        """The accuracy that a column of the table holds, by way of the loss: see `scaling.ensemble.accuracy`."""
        from scaling.ensemble.accuracy import Accuracy

        return Accuracy.of(self, family or self.lone("an accuracy"), column)

    def rows_curve(self, family: str, runs: Runs) -> np.ndarray:
        """(K, n) log of the mean curve at the rows of a table, with every column that the law depends on."""
        own = self.law.value(self.draws.theta[:, self.families.index(family)], self.law.features(runs, self.centre))
        return own + self.misfit_at(family, np.log(runs["N"]), np.log(runs["D"]), np.log(runs["flops"]))

    def run_noise(self, count: int = 1, cell: bool = True) -> np.ndarray:
        """(K,) or (K, count) noise of new runs on log loss; without what cells of two families have in common."""
        h, rng = self.draws.h, np.random.default_rng([self.spec.seed, 2])
        sd = np.sqrt((h[:, RUN] * self.draws.tail) ** 2 + h[:, TRUNK] ** 2 + cell * h[:, CELL] ** 2)
        noise = sd[:, None] * rng.normal(size=(len(sd), count))
        return noise[:, 0] if count == 1 else noise

    def lone(self, what: str) -> str:
        """The only family; raises ScalingError where there are two to choose from."""
        if len(self.families) > 1:
            raise ScalingError(f"{what} is of one family: name {' or '.join(self.families)}")
        return self.a

    def allocate(self, flops: float, family: str | None = None, serve_tokens: float = 0.0) -> Allocation:
        """The best model size and token budget for an amount of compute, misfit included.

        serve_tokens: tokens that the model will be asked for, at 2 FLOP a parameter and token, out of the same budget
        (Sardana et al. 2024, arXiv 2401.00448); the budget then is not the cost of a training run.
        """
        family = family or self.lone("an allocation")
        if not self.law.has_allocation:
            raise ScalingError(f"law {self.law.name!r} is not a function of N and D: it has no best allocation")
        best, loss = self.best_allocation(flops, family, serve_tokens)
        n, d = np.exp(best), np.exp(self.tokens_for(best, flops, family, serve_tokens))
        size = float(np.median(n))
        many = float(np.exp(self.tokens_for(np.log([size]), flops, family, serve_tokens)[0]))
        best_of = size, many, many / size, float(np.median(np.exp(loss)))
        ends = [interval(x) for x in (n, d, d / n, np.exp(loss))]
        pairs = (best_of[0], ends[0], best_of[1], ends[1], best_of[2], ends[2], best_of[3], ends[3])
        trained = float(self.cost(family).rate(size)) * size * many
        decades = max(0.0, float(np.log10(trained / self.runs.family(family)["flops"].max())))
        return Allocation(family, flops, *pairs, decades, decades <= 0 or decades <= self.reach + 1e-6)

    def tokens_for(self, log_n: np.ndarray, flops: float, family: str, serve_tokens: float = 0.0) -> np.ndarray:
        """Log of the tokens that sizes (m,) can be trained on, once what serving costs is set aside."""
        left = np.maximum(flops - SERVING * np.exp(log_n) * serve_tokens, 1e-30 * flops)
        return self.cost(family).log_tokens(log_n, np.log(left))

    def best_allocation(self, flops: float, family: str, serve_tokens: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(K,) log N of each draw's own best allocation, misfit included, and the log loss that it reaches."""
        # On a grid about the law's optimum the misfit can be added to every draw's curve; the parabola through the
        # three lowest points then finds the minimum between them.
        centre, law = self.path(family, np.array([flops])).log_n[0, 0], self.law_along(family)
        most = np.log(flops / (SERVING * serve_tokens)) - 0.01 if serve_tokens else np.inf
        log_n = min(centre, most - 2.5) + np.linspace(-2.5, 2.5, 81)
        log_d = self.tokens_for(log_n, flops, family, serve_tokens)
        features = law.features_at(log_n, log_d, self.centre, np.full_like(log_n, np.log(flops)))
        curves = law.value(self.draws.theta[:, self.families.index(family)], features)
        return lowest(log_n, curves + self.misfit_at(family, log_n, log_d, None))

    def exponent(self, family: str) -> tuple[float, float, float]:
        """Exponent of N* in compute over the ladder, by the law alone: median and 95 % interval."""
        runs = self.runs.family(family)
        log_c = np.log([runs["flops"].min(), runs["flops"].max()])
        theta = self.draws.theta[:, self.families.index(family)]
        found = frontier_along("optimal", self.law_along(family), theta, self.centre, self.cost(family), log_c)
        slope = np.diff(found.log_n)[:, 0] / np.diff(log_c)
        return float(np.median(slope)), *interval(slope)

    def efficiency(self) -> Efficiency:
        """What a parameter of B is worth in A's, at the middle of the ladder."""
        log_n, log_d = self.centre
        at = self.curve(self.b, np.array([log_n]), log_d)
        sizes = log_n + np.linspace(-4.6, 4.6, 47)
        # Misfit may let a curve rise somewhere: the least loss so far has an inverse, the curve itself has none.
        falls = np.minimum.accumulate(self.curve(self.a, sizes, log_d), axis=1)
        rho = np.array([np.interp(-y, -row, sizes) for y, row in zip(at[:, 0], falls, strict=True)]) - log_n
        low, high = interval(np.exp(rho))
        return Efficiency(float(np.exp(log_n)), float(np.exp(log_d)), float(np.exp(np.median(rho))), low, high)

    def curve(self, family: str, log_n: np.ndarray, log_d: float) -> np.ndarray:
        """(K, m) log loss at sizes (m,) and one number of tokens, misfit included."""
        law, place_ = self.law_along(family), self.families.index(family)
        tokens = np.full_like(log_n, log_d)
        own = law.value(self.draws.theta[:, place_], law.features_at(log_n, tokens, self.centre))
        return own + self.misfit_at(family, log_n, tokens, None)

    def break_even(self, flops: float) -> BreakEven | None:
        """kappa* at A's loss of `flops`; None where B has no counted ternary operations, or the law knows no size.

        B needs C_b FLOP for the loss that A reaches with C; with a share s of B's operations at price kappa, B is
        cheaper once (1 - s + s kappa) C_b < C. The share is that of the size at which B spends C_b.
        """
        runs = self.runs.family(self.b)
        spent = runs.columns.get("flops_ternary", np.zeros(len(runs)))
        if not (spent > 0).all() or not self.law.has_allocation:
            return None
        wide = np.geomspace(flops / 100, flops * 100, 65)
        # Draw by draw: what B must spend for A's loss. Both curves come from one draw, so that what they err by
        # together does not count twice.
        goal = self.frontier(self.a, np.array([flops]))[:, 0]
        curve = np.minimum.accumulate(self.frontier(self.b, wide), axis=1)
        need = np.array([np.interp(-g, -row, np.log(wide), right=np.inf) for g, row in zip(goal, curve, strict=True)])
        sizes = self.path(self.b, wide).log_n[0]
        n = np.exp(np.interp(need, np.log(wide), sizes))
        share = np.minimum(Cost.of(runs, spent).rate(n) / self.cost(self.b).rate(n), 1.0)
        kappa = (np.exp(np.log(flops) - need) - (1 - share)) / share
        return BreakEven(flops, float(np.median(kappa)), *interval(kappa), float(np.median(share)))

    def parameters(self, family: str) -> tuple[Parameter, ...]:
        """The parameters of a family's law as users know them."""
        k, size = self.families.index(family), len(self.law.names)
        theta = self.draws.theta[:, k]
        raw = self.law.raw(theta, self.centre)
        own = np.where(self.law.logged, np.log(np.where(self.law.logged, theta, 1.0)), theta)
        # Where the posterior is as wide as the prior, the interval repeats what was assumed.
        told = own.std(axis=0) < IDENTIFIED * self.posterior.sd[0][:size]
        return tuple(
            Parameter(name, float(np.median(values)), *interval(values), bool(known))
            for name, values, known in zip(self.law.names, raw.T, told, strict=True)
        )

    # ------------------------------------------------------------------ for people and programs

    def verdict(self) -> list[str]:
        """The answer in words, the headline first."""
        from scaling.report.words import verdict

        return verdict(self)

    def to_frame(self) -> Any:
        """The difference (of a lone family, the frontier) along budgets as a DataFrame, one row a budget."""
        rows = self.table()
        return frame_of({name: [row[name] for row in rows] for name in rows[0]})

    def table(self, axis: str = "flops") -> list[dict[str, Any]]:
        """Budgets with both frontiers, their difference and P(B better), None where that is not validated."""
        budgets = self.budgets(axis)
        levels = {f: np.median(self.frontier(f, budgets, axis), axis=0) for f in self.families}
        out = [
            {"budget": c, "unit": AXES[axis]} | {f: float(levels[f][k]) for f in self.families}
            for k, c in enumerate(budgets.tolist())
        ]
        if len(self.families) < 2:
            return out
        gaps = self.gaps(budgets, axis)
        low, middle, high = np.quantile(gaps, [0.025, 0.5, 0.975], axis=0, method="nearest")
        for k, row in enumerate(out):
            known = self.validated(row["budget"], axis)
            row |= {"difference": float(middle[k]), "low": float(low[k]), "high": float(high[k])}
            row["p_b_better"] = float((gaps[:, k] < 0).mean()) if known else None
        return out

    def plot(self, axis: str = "flops") -> Any:
        """The main figure: the difference along compute, or a lone family's frontier, as a Matplotlib figure."""
        from scaling.report.figures import main_chart
        from scaling.report.plot import drawn

        return drawn(main_chart(self, axis))

    def report(self, out: str | Path, **settings: Any) -> Any:
        """Writes the report into a folder: see `scaling.report.write.write_report`."""
        from scaling.analysis import Analysis
        from scaling.report.write import write_report

        return write_report(Analysis.of(self.runs, self.spec), out, **settings)

    def power(self, ladder: Any, budget: float | None = None, differences: Sequence[float] = ()) -> Any:
        """What a ladder would show: see `scaling.plan.power`."""
        from scaling.plan import power

        return power(self, ladder, budget, differences)


def in_order(runs: Runs, families: Sequence[str]) -> Runs:
    """The rows of these families in an order of their own, so that that of the table decides nothing."""
    place = np.array([families.index(f) if f in families else -1 for f in runs["family"]])
    order = np.lexsort((runs["loss"], runs["flops"], runs["D"], runs["N"], place))
    return runs.select(order[place[order] >= 0])


def analyse(runs: Any, spec: Spec | None = None, **choices: Any) -> Ensemble:
    """Analyses a table: `runs` is a Runs, a path, a DataFrame (any that narwhals reads) or rows; `choices` replace
    fields of the spec. With more than two families the ensemble is of the baseline and the first other one, and `pairs`
    holds one for every other family. Raises ScalingError on losses that do not compare."""
    spec = replace(spec or Spec(), **choices)
    table = selected(Runs.any(runs), spec.select, spec.seed)
    ordered = baseline_first(table, spec.baseline)
    if len(ordered) == 1:
        return Ensemble.of(table, ordered, spec)
    pairs = tuple(compare(table, ordered[0], other, replace(spec, select="all")) for other in ordered[1:])
    return replace(pairs[0], pairs=pairs)


def compare(runs: Any, a: str, b: str, spec: Spec | None = None, **choices: Any) -> Ensemble:
    """The ensemble of family a and of family b, which is compared with it; see `analyse`."""
    if a == b:
        raise ScalingError(f"family {a!r} cannot be compared with itself")
    spec, table = replace(spec or Spec(), **choices), Runs.any(runs)
    pair = table.select(
        np.concatenate([np.flatnonzero(table["family"] == table.family(f)["family"][0]) for f in (a, b)])
    )
    check_comparable(pair)
    return Ensemble.of(selected(pair, spec.select, spec.seed), (a, b), spec)


def baseline_first(runs: Runs, baseline: str | None) -> list[str]:
    """Families, the one that the others are compared with first: the one asked for, else Transformer++, else the
    table's first. Raises ScalingError on an unknown name."""
    first = baseline or ("transformer++" if "transformer++" in runs.families else runs.families[0])
    first = str(runs.family(first)["family"][0])
    return [first, *(f for f in runs.families if f != first)]
