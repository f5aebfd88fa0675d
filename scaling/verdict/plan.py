"""Which runs would decide: the cheapest ladder under caps on one run, and what one more trunk is worth.

The criterion is c-optimal (Elfving 1952): the standard deviation of log10 C*, or of the difference at a target compute.
It is that of the least-squares fit which will be made, under noise of runs and trunks and under lack of fit: a smooth
departure of each family from its law, correlated over half a decade in N and in D, that the fit knows nothing of. A
criterion that trusts the law would put everything on two far ends; this one pays for runs between them.
Both families get the same grid, and each pays for it what its own runs cost per parameter and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit
from scaling.laws.base import Law
from scaling.tables.runs import ScalingError
from scaling.uncertainty.bootstrap import cluster_labels, null_noise
from scaling.uncertainty.simulate import Noise
from scaling.verdict.compare import family_frontier
from scaling.verdict.crossing import overtakes
from scaling.verdict.frontier import Cost

DECAY_SHARE = 0.2  # steps of a decay off a trunk, relative to its budget
BYTES_PER_PARAMETER = 16.0  # weights, gradient and two AdamW moments in 4 bytes each
MISFIT = 0.005  # rms lack of fit of log loss that a plan allows for
MISFIT_REACH = 0.5  # decades of N or D over which a departure from the law keeps its sign
PRIOR_SD = 1.0  # of every centred parameter before any run: exponents to +-1, terms to a factor of e
SEARCH_DECADES = 12.0
STEP = 1e-4


@dataclass(frozen=True)
class Trunk:
    """One size trained in every family: n parameters, decays at these tokens per parameter; rates: FLOP per parameter
    and token of each family at this size."""

    n: float
    ratios: tuple[float, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, n: float, ratios: Sequence[float], costs: Sequence[Cost]) -> Trunk:
        """A size at what it costs in each family."""
        return cls(float(n), tuple(ratios), tuple(float(cost.rate(n)) for cost in costs))

    @property
    def flops(self) -> float:
        """All families: a trunk to the largest budget, and a decay's steps for every smaller one."""
        longest = max(self.ratios)
        steps = longest + DECAY_SHARE * sum(r for r in self.ratios if r != longest)
        return sum(self.rates) * self.n * self.n * steps

    @property
    def largest_run(self) -> float:
        """FLOP of the dearest run of any family."""
        return max(self.rates) * self.n * self.n * max(self.ratios)


@dataclass(frozen=True)
class Plan:
    """Trunks chosen, what they cost in FLOP, sd of what is asked now and with them, and where it is asked: the compute
    at which the fitted frontiers cross, or the target (`asked` = "log10 C*" or "difference"); unit of the
    difference."""

    trunks: tuple[Trunk, ...]
    flops: float
    sd_now: float
    sd_then: float
    target: float
    asked: str
    unit: str

    def lines(self) -> list[str]:
        """The plan as text, one trunk a line."""
        out = [f"{'N':>10}  {'tokens per parameter':<28}{'FLOP, both families':>20}"]
        for t in self.trunks:
            out.append(f"{t.n:>10.3g}  {', '.join(f'{r:g}' for r in t.ratios):<28}{t.flops:>20.2e}")
        change = f"{self.sd_now:.3g} now, {self.sd_then:.3g} with these runs"
        what = "log10 C*" if self.asked == "log10 C*" else f"the difference at {self.target:.1e} FLOP ({self.unit})"
        out.append(f"total {self.flops:.2e} FLOP; sd of {what}: {change}")
        return out


@dataclass(frozen=True)
class Value:
    """What one more trunk buys: the shrink of the sd of what is asked, and that per FLOP."""

    trunk: Trunk
    shrink: float
    per_flop: float


@dataclass(frozen=True)
class Question:
    """What is to be known, linearised about a fit of two families: slope (P,) of log10 C* or of the difference at
    `target` FLOP along the centred parameters; costs: FLOP by size, in the order of the fit's families, as a comparison
    has them; noise of the runs, lack of fit included."""

    fit: Fit
    costs: tuple[Cost, ...]
    slope: np.ndarray
    target: float
    asked: str
    noise: Noise


def question(fitted: Fit, noise: Noise, target: float | None = None) -> Question:
    """The crossing of the fitted frontiers, or their difference at `target`. Raises ScalingError where there is no
    crossing to ask for, or where the law is not one of N and D alone."""
    check_plannable(fitted.law)
    parts = [fitted.runs.family(family) for family in fitted.families]
    costs = tuple(Cost.of(part) for part in parts)
    if target is not None:
        return Question(fitted, costs, sensitivity_of_difference(fitted, costs, target), target, "difference", noise)
    lowest = max(float(part["flops"].min()) for part in parts)
    point, slope = sensitivity_of_crossing(fitted, costs, lowest)
    return Question(fitted, costs, slope, 10**point, "log10 C*", noise)


def check_plannable(law: Law) -> None:
    """A ladder is sizes and tokens; a law that asks for more leaves its runs undefined."""
    if not law.has_allocation or law.beside:
        raise ScalingError(f"a ladder is planned in N and D, and law {law.name!r} is not a function of these two alone")


def noise_of(fitted: Fit, seed: int = 0, misfit: float = MISFIT) -> Noise:
    """Run and trunk standard deviations of log loss, medians over noise drawn with the residuals' own structure, and
    the lack of fit to allow for, which no table can show beyond its own range."""
    labels, _ = cluster_labels(fitted.runs, fitted.families)
    noise = null_noise(fitted, 2000, np.random.default_rng(seed))
    groups = [
        np.flatnonzero((labels == k) & (fitted.runs["family"] == f)) for f in fitted.families for k in set(labels)
    ]
    groups = [rows for rows in groups if len(rows) > 1]
    total = float(np.median((noise**2).mean(axis=1)))
    if not groups:
        return Noise(np.sqrt(total), misfit=misfit)
    within = np.mean([noise[:, rows].var(axis=1, ddof=1) for rows in groups], axis=0)
    inside = min(float(np.median(within)), total)
    return Noise(np.sqrt(inside), np.sqrt(total - inside), misfit=misfit)


def frontier_losses(fitted: Fit, costs: Sequence[Cost], theta: np.ndarray, log_c: np.ndarray) -> list[np.ndarray]:
    """Each family's best loss (K, M) for joint vectors (K, P)."""
    return [
        family_frontier(fitted, theta, family, cost, log_c).loss
        for family, cost in zip(fitted.families, costs, strict=True)
    ]


def sensitivity_of_crossing(fitted: Fit, costs: Sequence[Cost], low: float) -> tuple[float, np.ndarray]:
    """log10 C* above `low` FLOP and its gradient (P,) by central differences; raises ScalingError if there is none."""
    steps = STEP * np.eye(len(fitted.theta))
    shifted = np.concatenate([fitted.theta[None], fitted.theta + steps, fitted.theta - steps])
    log_c = np.linspace(np.log(low), np.log(low) + SEARCH_DECADES * np.log(10), 241)
    first, second = frontier_losses(fitted, costs, shifted, log_c)
    crossing, _ = overtakes(log_c, second - first)
    if not (np.isfinite(crossing) & (crossing > 0)).all():
        raise ScalingError("the fitted laws do not cross: give a target compute (--target)")
    found, half = np.log10(crossing), len(steps)
    return float(found[0]), (found[1 : half + 1] - found[half + 1 :]) / (2 * STEP)


def sensitivity_of_difference(fitted: Fit, costs: Sequence[Cost], flops: float) -> np.ndarray:
    """Gradient (P,) of the difference of the frontiers at one compute, for a target where the fit has no crossing."""
    steps = STEP * np.eye(len(fitted.theta))
    shifted = np.concatenate([fitted.theta + steps, fitted.theta - steps])
    first, second = frontier_losses(fitted, costs, shifted, np.log([flops]))
    gap = (second - first)[:, 0]
    return (gap[: len(steps)] - gap[len(steps) :]) / (2 * STEP)


@dataclass(frozen=True)
class Rows:
    """Runs that exist or could be made: jacobian (P, n) of log loss, covariance (n, n) of log loss about the law."""

    jacobian: np.ndarray
    covariance: np.ndarray

    def spread(self, q: Question, chosen: np.ndarray) -> float:
        """Sd of what is asked from a least-squares fit of the chosen rows (indices), by the sandwich formula; the prior
        counts as one more observation of every parameter."""
        jacobian = self.jacobian[:, chosen] / q.noise.run
        covariance = self.covariance[np.ix_(chosen, chosen)] / q.noise.run**2
        weight = np.linalg.solve(jacobian @ jacobian.T + np.eye(len(q.slope)) / PRIOR_SD**2, q.slope)
        along = jacobian.T @ weight
        return float(np.sqrt(along @ covariance @ along + weight @ weight / PRIOR_SD**2))


def rows_of(q: Question, families: Sequence[np.ndarray], n: np.ndarray, d: np.ndarray, trunk: np.ndarray) -> Rows:
    """Rows with sizes n, tokens d and trunk numbers (all (n,)); `families` says which rows are which family's."""
    fitted = q.fit
    features = fitted.law.features_at(np.log(n), np.log(d), fitted.centre)
    jacobian = np.zeros((len(fitted.theta), len(n)))
    covariance = q.noise.run**2 * np.eye(len(n))
    for index, rows in zip(fitted.model.index, families, strict=True):
        _, own = fitted.law.value_jacobian(fitted.theta[None, index], features[:, rows])
        jacobian[np.ix_(index, rows)] = own[0]
        same = trunk[rows][:, None] == trunk[rows]
        near = sum(
            np.exp(-0.5 * ((np.log10(x[rows])[:, None] - np.log10(x[rows])) / MISFIT_REACH) ** 2) for x in (n, d)
        )
        covariance[np.ix_(rows, rows)] += q.noise.trunk**2 * same + 0.5 * q.noise.misfit**2 * near
    return Rows(jacobian, covariance)


class Pool:
    """All runs that a plan may count on: those at hand, and one cell per family for every size and ratio on offer."""

    def __init__(self, q: Question, options: Sequence[Trunk], keep_runs: bool):
        runs = q.fit.runs.select(np.arange(len(q.fit.runs)) if keep_runs else np.arange(0))
        cells = sorted({(t.n, r) for t in options for r in t.ratios})
        n, ratio = np.array([c[0] for c in cells]), np.array([c[1] for c in cells])
        own, planned = len(runs), len(cells)
        trunk = np.unique(runs["cluster"].astype(str), return_inverse=True)[1] if own else np.empty(0, int)
        sizes = own + np.unique(n, return_inverse=True)[1]
        families = [
            np.concatenate([np.flatnonzero(runs["family"] == f), own + k * planned + np.arange(planned)])
            for k, f in enumerate(q.fit.families)
        ]
        count = len(families)
        every_n = np.concatenate([runs["N"], np.tile(n, count)])
        every_d = np.concatenate([runs["D"], np.tile(n * ratio, count)])
        self.question = q
        self.rows = rows_of(q, families, every_n, every_d, np.concatenate([trunk, np.tile(sizes, count)]))
        self.own = np.arange(own)
        place = {cell: own + i for i, cell in enumerate(cells)}
        self.place = {
            t: np.array([place[t.n, r] + k * planned for k in range(count) for r in t.ratios]) for t in options
        }

    def spread(self, trunks: Sequence[Trunk]) -> float:
        """Sd of what is asked with these trunks beside the runs at hand."""
        return self.rows.spread(self.question, np.concatenate([self.own, *(self.place[t] for t in trunks)]).astype(int))


def candidates(
    sizes: Sequence[float], ratios: Sequence[float], costs: Sequence[Cost], max_run: float, max_bytes: float
) -> list[Trunk]:
    """Every size with every set of ratios that starts at the smallest, under the caps on one run (FLOP of the dearest
    family; bytes). Raises ScalingError for fewer than two ratios, which would leave N and D unparted."""
    if len(ratios) < 2:
        raise ScalingError("a plan needs two ratios of tokens to parameters at least: with one, N and D rise together")
    sets = [tuple(ratios[:k]) for k in range(2, len(ratios) + 1)]
    every = [Trunk.of(n, r, costs) for n in sizes for r in sets]
    return [t for t in every if t.largest_run <= max_run and BYTES_PER_PARAMETER * t.n <= max_bytes]


def cheapest(
    q: Question, options: Sequence[Trunk], budget: float, target_sd: float = 0.0, keep_runs: bool = True
) -> Plan:
    """Trunks, at most one per size, added by shrink per cost until `target_sd` or the budget (FLOP, both families);
    then those are dropped without which it is as good.

    keep_runs: count on the runs that were fitted. Raises ScalingError when the caps leave nothing to choose from.
    """
    affordable = [t for t in options if t.flops <= budget]
    if not affordable:
        raise ScalingError("no candidate fits the budget and the caps on one run")
    pool = Pool(q, affordable, keep_runs)
    chosen = greedy(pool, affordable, budget, target_sd)
    if not chosen:
        now = f"the runs at hand give an sd of {q.asked} of {pool.spread([]):.2g}"
        raise ScalingError(f"{now}: that is enough, or no candidate lowers it")
    ordered = tuple(sorted(chosen, key=lambda t: t.n))
    total = sum(t.flops for t in chosen)
    return Plan(ordered, total, pool.spread([]), pool.spread(chosen), q.target, q.asked, q.fit.runs.loss_unit)


def greedy(pool: Pool, options: Sequence[Trunk], budget: float, target_sd: float) -> list[Trunk]:
    """Adds, or replaces at its size, the trunk that buys most log spread per root of its cost; then drops idle ones."""
    chosen: list[Trunk] = []
    now = pool.spread([])
    while now > target_sd:
        moves = [[*(x for x in chosen if x.n != t.n), t] for t in options if t not in chosen]
        extra = [sum(t.flops for t in move) - sum(t.flops for t in chosen) for move in moves]
        spent = sum(t.flops for t in chosen)
        gains = [
            np.log(now / pool.spread(move)) / cost**0.5 if cost > 0 and spent + cost <= budget else -np.inf
            for move, cost in zip(moves, extra, strict=True)
        ]
        if max(gains, default=-np.inf) <= 0:
            break
        chosen = moves[int(np.argmax(gains))]
        now = pool.spread(chosen)
    for trunk in sorted(chosen, key=lambda t: -t.flops):
        rest = [t for t in chosen if t is not trunk]
        if pool.spread(rest) <= max(target_sd, now):
            chosen, now = rest, pool.spread(rest)
    return chosen


def next_values(q: Question, options: Sequence[Trunk]) -> list[Value]:
    """Every candidate by what it alone would add to the runs at hand, best per FLOP first."""
    pool = Pool(q, options, keep_runs=True)
    now = pool.spread([])
    shrinks = [now - pool.spread([t]) for t in options]
    found = [Value(t, s, s / t.flops) for t, s in zip(options, shrinks, strict=True)]
    return sorted(found, key=lambda v: -v.per_flop)
