"""Profile likelihood of the crossing: at which budgets can B overtake A without spoiling the fit.

A crossing's standard deviation is useless once the two exponents are nearly equal, for then its distribution has no
finite moments. The profile needs none: for every budget C the joint law is refitted under the constraint that the
frontiers meet at C, and C stays in the interval unless the sum of squares rises too far (Venzon & Moolgavkar 1988).
How far is too far is not taken from chi-squared, which would count decays of one trunk as independent runs, but from
refits of simulated runs whose frontiers do meet, with the noise that the residuals show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scaling.fitting.fit import Fit, bounds_of
from scaling.fitting.solve import Objective, minimise
from scaling.laws.base import Model
from scaling.uncertainty.bootstrap import null_noise
from scaling.verdict.compare import Comparison, family_frontier
from scaling.verdict.crossing import LEVEL
from scaling.verdict.frontier import Frontier

SQUARES = Objective("log-ls", True, np.inf)
# Weights of the constraint beside a row's weight of one, each with so many of the solver's steps. The first leaves room
# to move along the constraint, where the last alone would take hundreds; with the last, frontiers meet to about 1e-6.
STIFFNESS = ((1e2, 20), (1e6, 8))
PER_DECADE = 4
REFINEMENTS, POINTS_BETWEEN = 2, 10
NEIGHBOURS = (0, 1, -1, 4, -4)  # whose places a pass starts from
PASSES, SETTLED = 12, 1e-3  # at most; the gain in log squares at which that search ends
WRONG_WAY = 1e100  # on the squares of a fit in which B falls behind
JUST_AFTER = 0.05  # natural log of a budget
SIMULATIONS = 300


@dataclass(frozen=True)
class Profile:
    """budgets (M,) at which the frontiers were made to meet; ratio (M,) = log of the sum of squares over its minimum,
    inf where B falls behind there instead of taking the lead; critical: the 95 % quantile of the same under frontiers
    that do meet; bound: the 90 % one, for one-sided statements.

    low, high: ends of the 95 % interval; 0 and inf where it is open at the end of the grid. Both NaN where no budget of
    the grid is compatible with the runs. one_sided: lower 95 % bound, 0 where there is none.
    """

    budgets: np.ndarray
    ratio: np.ndarray
    critical: float
    bound: float
    low: float
    high: float
    one_sided: float

    def sentence(self, a: str, b: str, unit: str) -> str:
        """The interval in words; open ends are said to be open."""
        first, last = self.budgets[0], self.budgets[-1]
        span = f"{first:.1e} to {last:.0e} {unit}"
        if np.isnan(self.low):
            return f"Profile likelihood: no budget from {span} is compatible with {b} overtaking {a} there."
        if self.low == 0 and np.isinf(self.high):
            return f"Profile likelihood: {b} may overtake {a} anywhere from {span}."
        if np.isinf(self.high):
            return (
                f"Profile likelihood: {b} overtakes {a}, if at all, above {self.one_sided:.1e} {unit} (95 % one-sided)."
            )
        start = "" if self.low == 0 else f"above {self.low:.1e} and "
        return f"Profile likelihood: {b} overtakes {a} {start}below {self.high:.1e} {unit} (95 % interval)."


@dataclass(frozen=True)
class Meeting(Model):
    """A joint model with one row and one coordinate more: the last coordinate is log C, and the last row is the gap in
    log loss between the two frontiers there, which a heavy weight holds at zero."""

    pair: Comparison  # whose own model is the one without the additional row

    @property
    def size(self) -> int:
        return len(self.names) + 1

    def value(self, theta: np.ndarray) -> np.ndarray:
        """(K, n + 1) log losses and the gap."""
        losses = self.pair.fit.model.value(theta[:, :-1])
        ends = [np.log(self.frontier(theta, f).loss) for f in (self.pair.a, self.pair.b)]
        return np.concatenate([losses, ends[1] - ends[0]], axis=1)

    def value_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Model`; at the best allocation the gap's derivative needs no derivative of the allocation (envelope)."""
        losses, inner = self.pair.fit.model.value_jacobian(theta[:, :-1])
        jacobian = np.zeros((len(theta), self.size, losses.shape[1] + 1))
        jacobian[:, :-1, :-1] = inner
        gap = np.zeros((len(theta), 1))
        for family, sign in ((self.pair.a, -1.0), (self.pair.b, 1.0)):
            found = self.frontier(theta, family)
            columns, law = self.pair.fit.columns(family), self.pair.fit.frontier_law(family)
            features = law.features_at(found.log_n, found.log_d, self.pair.fit.centre, found.log_flops)
            value, own = law.value_jacobian(theta[:, columns], features)
            gap += sign * value
            jacobian[:, columns, -1] += sign * own[:, :, 0]
        return np.concatenate([losses, gap], axis=1), jacobian

    def frontier(self, theta: np.ndarray, family: str) -> Frontier:
        """Each vector's frontier at its own budget, (K, 1)."""
        pair = self.pair
        return family_frontier(pair.fit, theta[:, :-1], family, pair.costs[family], theta[:, -1:], pair.along)


def profile_crossing(c: Comparison, simulations: int = SIMULATIONS, seed: int = 0) -> Profile:
    """Profile of the budget at which the frontiers meet, from the lowest measured one to the comparison's horizon."""
    seen = np.log(c.fit.runs["loss"])[None]
    free = free_fit(c.fit, seen)
    grid, met = refined_grid(c, free, seen)
    ratio = np.log(squares(c.fit.model, met, seen) / squares(c.fit.model, free, seen))
    ratio = np.where(overtaking(c, met, grid), np.maximum(ratio, 0.0), np.inf)
    nearest = int(np.argmin(ratio))
    critical, bound = critical_values(c, met[nearest], grid[nearest], simulations, seed)
    ends = accepted(grid, ratio, critical)
    return Profile(np.exp(grid), ratio, critical, bound, *ends, accepted(grid, ratio, bound)[0])


def overtaking(c: Comparison, theta: np.ndarray, log_budget: np.ndarray) -> np.ndarray:
    """(M,) whether B is ahead just after the budget at which each fit's frontiers meet: A may overtake B as well."""
    after = log_budget[:, None] + JUST_AFTER
    ends = [family_frontier(c.fit, theta, f, c.costs[f], after, c.along).loss[:, 0] for f in (c.a, c.b)]
    return ends[1] < ends[0]


def misfit(c: Comparison, theta: np.ndarray, log_budget: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(M,) sums of squares of fits whose frontiers meet at these budgets, those of the wrong way behind all others: at
    one budget both may be optima, and only the better of the right ones belongs to the profile."""
    return squares(c.fit.model, theta, target) * np.where(overtaking(c, theta, log_budget), 1.0, WRONG_WAY)


def refined_grid(c: Comparison, free: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log budgets (M,) and the fits held to them (M, P): a regular grid, then ever finer about the best of them, since
    a precise ladder's whole interval may lie between two points."""
    low, high = np.log(c.budgets[[0, -1]])
    grid = np.linspace(low, high, max(9, int(PER_DECADE * (high - low) / np.log(10)) + 1))
    met = smoothed(c, grid, constrained(c, np.repeat(free, len(grid), axis=0), grid, target), target)
    for _ in range(REFINEMENTS):
        best = int(np.argmin(misfit(c, met, grid, target)))
        left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        more = np.linspace(left, right, POINTS_BETWEEN + 2)[1:-1]
        added = constrained(c, np.repeat(met[[best]], len(more), axis=0), more, target)
        grid, first = np.unique(np.concatenate([grid, more]), return_index=True)
        met = np.concatenate([met, added])[first]
    return grid, smoothed(c, grid, met, target)


def smoothed(c: Comparison, grid: np.ndarray, met: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each budget's fit carried on from its own place and from neighbours', the best kept, until none improves: one
    start may end in a worse valley far from the unconstrained optimum, and a profile has no jumps."""
    found = misfit(c, met, grid, target)
    for _ in range(PASSES):
        starts = np.concatenate([np.roll(met, shift, axis=0) for shift in NEIGHBOURS])
        again = constrained(c, starts, np.tile(grid, len(NEIGHBOURS)), target).reshape(-1, *met.shape)
        every = np.stack([found, *(misfit(c, theta, grid, target) for theta in again)])
        met = np.concatenate([met[None], again])[np.argmin(every, axis=0), np.arange(len(grid))]
        gain, found = np.log(found / every.min(axis=0)).max(), every.min(axis=0)
        if gain < SETTLED:
            break
    return met


def free_fit(fitted: Fit, target: np.ndarray) -> np.ndarray:
    """(K, P) unconstrained least-squares fits to the log losses `target` (K, n)."""
    start = np.repeat(fitted.theta[None], len(target), axis=0)
    box = bounds_of(fitted.model, fitted.runs["loss"])
    return minimise(fitted.model, SQUARES, target, np.ones(target.shape[1]), start, box, 100, 1e-8)[0]


def constrained(c: Comparison, start: np.ndarray, log_budget: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(K, P) least-squares fits to `target` (K, n) or (1, n) whose frontiers meet at exp(log_budget) (K,)."""
    plain = c.fit.model
    model = Meeting(plain.law, np.pad(plain.features, ((0, 0), (0, 1))), plain.index, plain.rows, plain.names, c)
    low, high = bounds_of(plain, c.fit.runs["loss"])
    box = np.append(low, -np.inf), np.append(high, np.inf)
    goal = np.column_stack([np.broadcast_to(target, (len(start), target.shape[1])), np.zeros(len(start))])
    theta = np.column_stack([start, log_budget])
    for stiffness, steps in STIFFNESS:
        weight = np.append(np.ones(target.shape[1]), stiffness)
        theta, _ = minimise(model, SQUARES, goal, weight, theta, box, steps, 1e-8)
    return theta[:, :-1]


def squares(model: Model, theta: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(K,) sums of squared residuals of log loss."""
    return np.maximum(((model.value(theta) - target) ** 2).sum(axis=1), 1e-300)


def critical_values(
    c: Comparison, theta: np.ndarray, log_budget: float, simulations: int, seed: int
) -> tuple[float, float]:
    """95 % and 90 % quantiles of the log ratio of squares when the frontiers do meet at this budget."""
    met = replace(c.fit, theta=theta)
    target = met.model.value(theta[None]) + null_noise(c.fit, simulations, np.random.default_rng(seed))
    free = squares(met.model, free_fit(met, target), target)
    held, budget = np.repeat(theta[None], simulations, axis=0), np.full(simulations, log_budget)
    for _ in range(2):  # the second takes up the few that a weak ladder leaves on the way
        held = constrained(c, held, budget, target)
    ratio = np.log(np.maximum(squares(met.model, held, target) / free, 1.0))
    return float(np.quantile(ratio, LEVEL)), float(np.quantile(ratio, 2 * LEVEL - 1))


def accepted(grid: np.ndarray, ratio: np.ndarray, critical: float) -> tuple[float, float]:
    """Outermost budgets with a ratio below the critical value, interpolated; 0 and inf where the grid ends first."""
    inside = np.flatnonzero(ratio <= critical)
    if not len(inside):
        return float("nan"), float("nan")
    first, last = inside[0], inside[-1]
    low, high = 0.0, float("inf")
    if first > 0:
        low = edge(grid[first - 1 : first + 1], ratio[first - 1 : first + 1], critical)
    if last < len(grid) - 1:
        high = edge(grid[last : last + 2], ratio[last : last + 2], critical)
    return low, high


def edge(place: np.ndarray, ratio: np.ndarray, critical: float) -> float:
    """Budget between two neighbours at which the ratio reaches the critical value (the square root is near linear)."""
    root = np.sqrt(ratio)
    order = np.argsort(root)
    return float(np.exp(np.interp(np.sqrt(critical), root[order], place[order])))
