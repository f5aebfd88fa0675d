"""Which runs would decide, and what a ladder would show before any of it is trained.

A plan compares thousands of ladders, so it needs a formula. The spread of the difference of two frontiers at a target
compute is that of the ensemble itself: parameters and misfit are jointly normal once the laws are linear, with the
noise and misfit that the table's own ensemble found (medians), so that a plan and a comparison of the same table agree.
A criterion that trusted the law would put everything on two far ends; with a misfit it pays for runs between them and
towards the target (c-optimal design: Elfving 1952). Both families get the same grid, and each pays for it what its own
runs cost per parameter and token.

The power of one ladder is found by simulation instead. Each draw of the ensemble is a possible truth with its own
noise, misfit and ties; the ladder's losses are drawn from it and analysed as a table would be. A formula with one
spread states too much: the interval of the ladder to come is known no better than the misfit is, and a pilot whose
interval came out narrow by luck would promise a power of 0.99 where 0.83 is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling.ensemble.answers import interval
from scaling.ensemble.discrepancy import CELL, RUN, TRUNK, Nearness, Points
from scaling.ensemble.ensemble import Ensemble
from scaling.ensemble.frontier import Cost
from scaling.ensemble.posterior import shared_sd
from scaling.ensemble.rows import place
from scaling.fitting.fit import MIN_SIZES
from scaling.tables.runs import Runs, ScalingError

DECAY_SHARE = 0.2  # steps of a decay off a trunk, relative to its budget
BYTES_PER_PARAMETER = 16.0  # weights, gradient and two AdamW moments in 4 bytes each
IDLE = 0.05  # trunks are left out while that costs less than so much of what the plan gains
TWO_SIDED = 1.959964  # standard deviations of a 95 % interval
SIMULATIONS, SIMULATED_DRAWS = 40, 400  # ladders by which a power is found, and the draws that analyse each


@dataclass(frozen=True)
class Trunk:
    """One size trained in both families: n parameters, decays at these tokens per parameter; rates: FLOP per parameter
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
    """Trunks chosen and what they cost in FLOP; sd of the difference at `target` FLOP now and with them, in `unit`."""

    trunks: tuple[Trunk, ...]
    flops: float
    sd_now: float
    sd_then: float
    target: float
    unit: str

    def lines(self) -> list[str]:
        """The plan as text, one trunk a line."""
        out = [f"{'N':>10}  {'tokens per parameter':<28}{'FLOP, both families':>20}"]
        for t in self.trunks:
            out.append(f"{t.n:>10.3g}  {', '.join(f'{r:g}' for r in t.ratios):<28}{t.flops:>20.2e}")
        change = f"{self.sd_now:.2g} now, {self.sd_then:.2g} with these runs ({self.unit}), by the formula of plans"
        return [*out, f"total {self.flops:.2e} FLOP; sd of the difference at {self.target:.1e} FLOP: {change}"]


@dataclass(frozen=True)
class Power:
    """Chance that the 95 % interval of the difference at `target` FLOP excludes zero with the right sign, for true
    differences; at zero, the chance that it excludes zero at all. sd: of the difference, in `unit`, in the middle of
    the `simulations`."""

    target: float
    sd: float
    differences: tuple[float, ...]
    chances: tuple[float, ...]
    at_zero: float
    unit: str
    simulations: int

    def lines(self) -> list[str]:
        """The result as text."""
        found = f"sd of the difference at {self.target:.1e} FLOP: {self.sd:.2g} {self.unit}"
        out = [f"{found} (median of {self.simulations} simulated ladders)"]
        for difference, p in zip(self.differences, self.chances, strict=True):
            what = "P(the 95 % interval excludes zero with the right sign)"
            out.append(f"  if it is {difference:.3g}: {what} = {self.with_error(p)}")
        return [*out, f"  if it is zero: P(the interval excludes zero) = {self.with_error(self.at_zero)}"]

    def with_error(self, p: float) -> str:
        """A share with the standard error that so many simulations leave."""
        return f"{p:.2f} +- {np.sqrt(p * (1 - p) / self.simulations):.2f}"


class Pool:
    """Runs at hand and runs that could be made, with the covariance of their log losses and of what is asked."""

    def __init__(self, e: Ensemble, options: Sequence[Trunk], target: float, keep_runs: bool = True):
        check_plannable(e)
        own = len(e.runs) if keep_runs else 0
        cells = sorted({(t.n, r) for t in options for r in t.ratios})
        n, ratio = np.array(cells).reshape(-1, 2).T
        log_n = np.concatenate([np.log(e.runs["N"][:own]), np.tile(np.log(n), 2)])
        log_d = np.concatenate([np.log(e.runs["D"][:own]), np.tile(np.log(n * ratio), 2)])
        # One covariance holds the runs at hand and every run that could be made; a plan is a subset of its rows. So
        # thousands of plans are compared by taking rows out of one matrix.
        known = (e.runs["family"][:own] == e.b).astype(int)
        family = np.concatenate([known, np.repeat([0, 1], len(cells))])
        _, trunk = np.unique(e.runs["cluster"][:own].astype(str), return_inverse=True)
        sizes = np.unique(n, return_inverse=True)[1] + (trunk.max() + 1 if own else 0)
        planned = np.concatenate([sizes, sizes + len(n)])  # a trunk of one family is none of the other's
        self.h = np.median(e.draws.h, axis=0)
        self.own, spots = np.arange(own), {cell: own + k for k, cell in enumerate(cells)}
        self.place = {t: np.array([spots[t.n, r] + k * len(cells) for k in (0, 1) for r in t.ratios]) for t in options}
        every = log_n, log_d, family, np.concatenate([trunk, planned])
        self.covariance, self.with_asked, self.asked = covariances(e, self.h, target, *every)

    def spread(self, trunks: Sequence[Trunk]) -> float:
        """Sd of the difference at the target with these trunks beside the runs that count."""
        rows = np.concatenate([self.own, *(self.place[t] for t in trunks)]).astype(int)
        if not len(rows):
            return float(np.sqrt(self.asked))
        # The variance of what is asked, less what the rows tell of it: conditioning of a normal distribution (Schur
        # complement).
        told = self.with_asked[rows] @ np.linalg.solve(self.covariance[np.ix_(rows, rows)], self.with_asked[rows])
        return float(np.sqrt(max(self.asked - told, 0.0)))


def covariances(
    e: Ensemble,
    h: np.ndarray,
    target: float,
    log_n: np.ndarray,
    log_d: np.ndarray,
    family: np.ndarray,
    trunk: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of log losses (n, n), of log losses with the difference at the target (n,), and its own variance, before any run
    is made: the laws' parameters by their prior under the likeliest tie, the misfit by h (7,)."""
    paths = [e.path(f, np.array([target])) for f in e.families]
    at_n, at_d = (np.concatenate([getattr(p, name)[0] for p in paths]) for name in ("log_n", "log_d"))
    every_n, every_d = np.concatenate([log_n, at_n]), np.concatenate([log_d, at_d])
    every = np.concatenate([family, [0, 1]])
    slopes = jacobian(e, every_n, every_d, every)
    tie = max(e.tie_weights, key=lambda t: e.tie_weights[t]) if not e.only_untied else ()
    sd = np.append(
        e.posterior.sd[0][: len(e.law.names)],
        shared_sd(e.law, tie, e.law.prior(e.posterior.rows.y, e.posterior.rows.features).apart),
    )
    points = Points(place(e.law, every_n, every_d, None, e.centre), every)
    whole = (slopes * sd**2) @ slopes.T + Nearness.between(points, points).covariance(h[None])[0]
    count = len(log_n)
    levels = np.array([-1.0, 1.0]) * [float(np.median(e.frontier(f, np.array([target])))) for f in e.families]
    # Loss is linear in all of this near the middle of the draws, so before any run is made everything is normal, and
    # what runs would tell of the difference needs covariances only, no simulated losses.
    noise = (h[RUN] ** 2 + h[CELL] ** 2) * np.eye(count) + h[TRUNK] ** 2 * (trunk[:, None] == trunk)
    return whole[:count, :count] + noise, whole[:count, count:] @ levels, float(levels @ whole[count:, count:] @ levels)


def jacobian(e: Ensemble, log_n: np.ndarray, log_d: np.ndarray, family: np.ndarray) -> np.ndarray:
    """(n, 2 P) derivatives of log loss with respect to the mean and the difference of the families' parameters."""
    size = len(e.law.names)
    out = np.zeros((len(log_n), 2 * size))
    for f in (0, 1):
        rows = np.flatnonzero(family == f)
        features = e.law.features_at(log_n[rows], log_d[rows], e.centre)
        slope = e.law.value_jacobian(e.middle[[f]], features)[1][0].T * np.where(e.law.logged, e.middle[f], 1.0)
        out[rows, :size], out[rows, size:] = slope, (f - 0.5) * slope
    return out


def check_plannable(e: Ensemble) -> None:
    """A ladder is sizes and tokens; a law that asks for more leaves its runs undefined. Raises ScalingError."""
    if not e.law.has_allocation or e.law.beside:
        raise ScalingError(
            f"a ladder is planned in N and D, and law {e.law.name!r} is not a function of these two alone"
        )


def default_target(e: Ensemble) -> float:
    """Where the difference is asked for: the crossing where it lies within the ladder, else one decade beyond."""
    crossing = e.crossing()
    return crossing.estimate if crossing.kind == "inside" else 10 * e.measured()[1]


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
    e: Ensemble, options: Sequence[Trunk], budget: float, target: float, target_sd: float = 0.0, keep_runs: bool = True
) -> Plan:
    """Trunks, at most one per size, added by gain per root of cost until `target_sd` or the budget (FLOP, both
    families); then those are dropped without which it is as good.

    keep_runs: count on the runs at hand. Raises ScalingError when the caps leave nothing to choose from.
    """
    affordable = [t for t in options if t.flops <= budget]
    if not affordable:
        raise ScalingError("no candidate fits the budget and the caps on one run")
    pool, scale = Pool(e, affordable, target, keep_runs), agreement(e, target)
    chosen = greedy(pool, affordable, budget, target_sd / scale)
    if not chosen:
        raise ScalingError(
            f"the runs at hand give an sd of {scale * pool.spread([]):.2g}: that is enough, or no candidate lowers it"
        )
    ordered = tuple(sorted(chosen, key=lambda t: t.n))
    ends = (scale * pool.spread([]), scale * pool.spread(chosen))
    return Plan(ordered, sum(t.flops for t in chosen), *ends, target, e.runs.loss_label)


def own_spread(e: Ensemble, target: float) -> float:
    """Sd of the difference in the ensemble itself, by its 95 % interval."""
    low, high = np.quantile(e.gaps(np.array([target]))[:, 0], [0.025, 0.975])
    return float(high - low) / (2 * TWO_SIDED)


def agreement(e: Ensemble, target: float) -> float:
    """The ensemble's own spread over that of the linear form for its own runs: ties that disagree, mostly. Plans are
    scaled by it, so that they agree with a comparison of the same table."""
    return own_spread(e, target) / Pool(e, [], target).spread([])


def greedy(pool: Pool, options: Sequence[Trunk], budget: float, target_sd: float) -> list[Trunk]:
    """Adds, or replaces at its size, the trunk that buys most log spread per root of its cost; then drops idle ones."""
    # All subsets would be too many: a trunk at a time, one in the place of another of its size, idle ones dropped last.
    chosen: list[Trunk] = []
    now = pool.spread([])
    while now > target_sd:
        spent = sum(t.flops for t in chosen)
        moves = [[*(x for x in chosen if x.n != t.n), t] for t in options if t not in chosen]
        extra = [sum(t.flops for t in move) - spent for move in moves]
        # Per root of the cost: a spread falls as one over the root of the number of runs, so this compares dear trunks
        # with cheap ones fairly.
        gains = [
            np.log(now / pool.spread(move)) / cost**0.5 if cost > 0 and spent + cost <= budget else -np.inf
            for move, cost in zip(moves, extra, strict=True)
        ]
        if max(gains, default=-np.inf) <= 0:
            break
        chosen = moves[int(np.argmax(gains))]
        now = pool.spread(chosen)
    good = max(target_sd, now + IDLE * min(pool.spread([]) - now, now))
    for trunk in sorted(chosen, key=lambda t: -t.flops):
        rest = [t for t in chosen if t is not trunk]
        if pool.spread(rest) <= good and (len(pool.own) or len(rest) >= MIN_SIZES):  # a ladder must pass its gate
            chosen = rest
    return chosen


def power(
    e: Ensemble,
    ladder: Sequence[Trunk],
    target: float | None = None,
    differences: Sequence[float] = (),
    keep_runs: bool = False,
    simulations: int = SIMULATIONS,
) -> Power:
    """What a ladder would show of the difference at `target` FLOP (see `default_target`), for true `differences` (by
    default the one that the table's own ensemble expects, its half and its double). keep_runs: it is analysed together
    with the runs at hand."""
    check_plannable(e)
    target = target or default_target(e)
    truth, low, high = simulated_intervals(e, ladder, target, keep_runs, simulations).T
    sd = (high - low) / (2 * TWO_SIDED)
    if not differences:
        expected = abs(float(np.median(e.gaps(np.array([target])))))
        differences = tuple(x * max(expected, float(np.median(sd)) / 4) for x in (0.5, 1.0, 2.0))
    # A shift of one family's loss moves truth and interval alike, so each simulation tells how large a difference its
    # interval would have shown, with either sign. In units of its own sd that hardly depends on how wide the interval
    # is, so every width is paired with every error: a smoother share than that of the simulations themselves.
    needed = np.concatenate([truth - low, high - truth]) / np.tile(sd, 2)
    chances = tuple(float((np.outer(sd, needed) < abs(d)).mean()) for d in differences)
    missed = float(((truth < low) | (truth > high)).mean())
    return Power(target, float(np.median(sd)), tuple(differences), chances, missed, e.runs.loss_label, simulations)


def simulated_intervals(
    e: Ensemble, ladder: Sequence[Trunk], target: float, keep_runs: bool, simulations: int
) -> np.ndarray:
    """(simulations, 3) true difference at `target` FLOP, and both ends of the interval that a ladder drawn from that
    truth shows."""
    # Draws lie in the order of their hyperparameters, so even steps take every kind of truth by its weight.
    picked = np.linspace(0, len(e.draws.theta) - 1, simulations).round().astype(int)
    at, rng = np.array([target]), np.random.default_rng([e.spec.seed, 3])
    truths, spec = replace(e, draws=e.draws.part(picked)), replace(e.spec, draws=SIMULATED_DRAWS, select="all")
    grid = {f: planned_rows(e, ladder, f) for f in e.families}
    clean = {f: truths.rows_curve(f, Runs.from_rows(rows)) for f, rows in grid.items()}
    noise = planned_noise(e, ladder, picked, rng)
    out = np.empty((simulations, 3))
    for k in range(simulations):
        # What a truth's best runs would differ by: its own best sizes, its misfit there. Along the path of the ensemble
        # it would be another number wherever the pilot hardly knows the best size.
        one = replace(e, draws=e.draws.part(picked[[k]]))
        truth = float(np.diff([np.exp(one.best_allocation(target, f)[1][0]) for f in e.families])[0])
        rows = list(e.runs.records()) if keep_runs else []
        for f in e.families:
            losses = np.exp(clean[f][k] + noise[f][k])
            rows += [row | {"loss": float(loss)} for row, loss in zip(grid[f], losses, strict=True)]
        found = Ensemble.of(Runs.from_rows(rows), e.families, replace(spec, seed=k))
        out[k] = truth, *interval(found.gaps(at)[:, 0])
    return out


def planned_rows(e: Ensemble, ladder: Sequence[Trunk], family: str) -> list[dict[str, Any]]:
    """The rows of a table that a ladder will fill, with a loss of one in place of those to come."""
    cost = e.cost(family)
    cells = [(k, t.n, t.n * r) for k, t in enumerate(ladder) for r in t.ratios]
    return [
        {"run_id": f"planned-{family}-{i}", "family": family, "cluster": f"planned-{family}-{k}"}
        | {"N": n, "D": d, "flops": float(cost.rate(n)) * n * d, "loss": 1.0}
        for i, (k, n, d) in enumerate(cells)
    ]


def planned_noise(
    e: Ensemble, ladder: Sequence[Trunk], picked: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """(simulations, runs) noise of log loss in each family by the picked draws: of runs, trunks and matched cells."""
    trunk = np.repeat(np.arange(len(ladder)), [len(t.ratios) for t in ladder])
    count, shape = len(picked), (len(picked), len(trunk))
    run_sd, trunk_sd, cell_sd = (e.draws.h[picked][:, [k]] for k in (RUN, TRUNK, CELL))
    cell = cell_sd * rng.normal(size=shape)
    out = {}
    for f in e.families:
        # Each run takes the noise of a run at hand, so that a table with outliers foretells outliers.
        tail = e.posterior.scale[e.draws.noise[picked][:, None], rng.integers(len(e.posterior.rows.y), size=shape)]
        own = run_sd * tail * rng.normal(size=shape)
        out[f] = cell + own + trunk_sd * rng.normal(size=(count, len(ladder)))[:, trunk]
    return out
