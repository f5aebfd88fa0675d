"""Which runs would decide: the runs' noise, the cheapest ladder for the crossing, a ladder's power before it runs.

The criterion is c-optimal (Elfving 1952): the standard deviation of log10 C*, propagated from a linearised joint fit
with run, trunk and lack-of-fit variance. Lack of fit grows with the distance from the target compute, so that the
cheapest runs, which the law alone would favour, count for less. Both families get the same grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit
from scaling.tables.runs import FLOPS_PER_PARAMETER_TOKEN, Runs, ScalingError
from scaling.uncertainty.bootstrap import cluster_labels, parametric_noise
from scaling.uncertainty.simulate import Ladder, Noise, Truths, draw
from scaling.verdict.compare import Comparison, compare
from scaling.verdict.crossing import overtakes
from scaling.verdict.frontier import Cost, frontier

DECAY_SHARE = 0.2  # steps of a decay off a trunk, relative to its budget
BYTES_PER_PARAMETER = 16.0  # weights, gradient and two AdamW moments in 4 bytes each
MISFIT_PER_DECADE = 0.0005  # sd of log loss that lack of fit adds per decade between a run and the target
SEARCH_DECADES = 12.0
STEP = 1e-4


@dataclass(frozen=True)
class Trunk:
    """One size trained in both families: n parameters, decays at these tokens per parameter."""

    n: float
    ratios: tuple[float, ...]

    @property
    def flops(self) -> float:
        """Both families: a trunk to the largest budget, and a decay's steps for every smaller one."""
        longest = max(self.ratios)
        steps = longest + DECAY_SHARE * sum(r for r in self.ratios if r != longest)
        return 2 * FLOPS_PER_PARAMETER_TOKEN * self.n * self.n * steps

    @property
    def largest_run(self) -> float:
        return FLOPS_PER_PARAMETER_TOKEN * self.n * self.n * max(self.ratios)


@dataclass(frozen=True)
class Plan:
    """Trunks chosen, what they cost in FLOP, sd of log10 C* now (inf without runs to count on) and with them."""

    trunks: tuple[Trunk, ...]
    flops: float
    sd_now: float
    sd_then: float
    target: float

    def lines(self) -> list[str]:
        """The plan as text, one trunk a line."""
        out = [f"{'N':>10}  {'tokens per parameter':<28}{'FLOP, both families':>20}"]
        for t in self.trunks:
            out.append(f"{t.n:>10.3g}  {', '.join(f'{r:g}' for r in t.ratios):<28}{t.flops:>20.2e}")
        change = f"{self.sd_now:.2f} now, {self.sd_then:.2f} with these runs"
        out.append(f"total {self.flops:.2e} FLOP; sd of what is to be known: {change}")
        return out


@dataclass(frozen=True)
class Value:
    """What one more trunk buys: the shrink of sd(log10 C*) and that per FLOP."""

    trunk: Trunk
    shrink: float
    per_flop: float


def noise_of(fitted: Fit, seed: int = 0) -> Noise:
    """Run and trunk standard deviations of log loss, medians over noise drawn with the residuals' own structure."""
    labels, paired = cluster_labels(fitted.runs, fitted.families)
    noise, _ = parametric_noise(fitted, labels, paired, 2000, np.random.default_rng(seed))
    groups = [
        np.flatnonzero((labels == k) & (fitted.runs["family"] == f)) for f in fitted.families for k in set(labels)
    ]
    groups = [rows for rows in groups if len(rows) > 1]
    total = float(np.median((noise**2).mean(axis=1)))
    if not groups:
        return Noise(np.sqrt(total))
    within = np.mean([noise[:, rows].var(axis=1, ddof=1) for rows in groups], axis=0)
    inside = min(float(np.median(within)), total)
    return Noise(np.sqrt(inside), np.sqrt(total - inside))


def log_crossing(fitted: Fit, theta: np.ndarray, low: float) -> np.ndarray:
    """(K,) log10 FLOP at which the second family's frontier passes below the first's; inf where it never does."""
    log_c = np.linspace(np.log(low), np.log(low) + SEARCH_DECADES * np.log(10), 241)
    cost = Cost(np.zeros(1), np.log([FLOPS_PER_PARAMETER_TOKEN]))
    ends = [frontier(fitted.law, theta[:, index], fitted.centre, cost, log_c).loss for index in fitted.model.index]
    values, _ = overtakes(log_c, ends[1] - ends[0])
    with np.errstate(divide="ignore"):
        return np.log10(values)


def sensitivity_of_crossing(fitted: Fit, low: float) -> tuple[float, np.ndarray]:
    """log10 C* and its gradient (P,) by central differences; raises ScalingError where the fit has no crossing."""
    steps = STEP * np.eye(len(fitted.theta))
    shifted = np.concatenate([fitted.theta[None], fitted.theta + steps, fitted.theta - steps])
    found = log_crossing(fitted, shifted, low)
    if not np.isfinite(found).all():
        raise ScalingError("the fitted laws do not cross: give an assumed law or a target compute (--target)")
    half = len(steps)
    return float(found[0]), (found[1 : half + 1] - found[half + 1 :]) / (2 * STEP)


def sensitivity_of_difference(fitted: Fit, flops: float) -> np.ndarray:
    """Gradient (P,) of the difference of the frontiers at one compute, for a target where the fit has no crossing."""
    steps = STEP * np.eye(len(fitted.theta))
    shifted = np.concatenate([fitted.theta + steps, fitted.theta - steps])
    cost = Cost(np.zeros(1), np.log([FLOPS_PER_PARAMETER_TOKEN]))
    log_c = np.log([flops])
    ends = [frontier(fitted.law, shifted[:, i], fitted.centre, cost, log_c).loss[:, 0] for i in fitted.model.index]
    gap = ends[1] - ends[0]
    return (gap[: len(steps)] - gap[len(steps) :]) / (2 * STEP)


def trunk_information(fitted: Fit, trunk: Trunk, noise: Noise, target: float) -> np.ndarray:
    """(P, P) Fisher information of one trunk in both families, rows correlated by their trunk's own noise."""
    n, d = np.full(len(trunk.ratios), trunk.n), trunk.n * np.array(trunk.ratios)
    features = fitted.law.features_at(np.log(n), np.log(d), fitted.centre)
    distance = np.abs(np.log10(target / (FLOPS_PER_PARAMETER_TOKEN * n * d)))
    covariance = np.diag(noise.run**2 + (MISFIT_PER_DECADE * distance) ** 2) + noise.trunk**2
    information = np.zeros((len(fitted.theta), len(fitted.theta)))
    for index in fitted.model.index:
        _, own = fitted.law.value_jacobian(fitted.theta[None, index], features)
        information[np.ix_(index, index)] += own[0] @ np.linalg.solve(covariance, own[0].T)
    return information


def spread(information: np.ndarray, slope: np.ndarray) -> float:
    """Standard deviation of a linear function of the parameters; inf where the information does not determine it."""
    scale = np.sqrt(np.diag(information)) + 1e-300
    spectrum, turn = np.linalg.eigh(information / np.outer(scale, scale))
    if spectrum[0] < 1e-12 * spectrum[-1]:
        return float("inf")
    return float(np.sqrt(np.sum((turn.T @ (slope / scale)) ** 2 / spectrum)))


def candidates(sizes: Sequence[float], ratios: Sequence[float], max_run: float, max_bytes: float) -> list[Trunk]:
    """Every size with every set of ratios that starts at the smallest, under the caps on one run."""
    sets = [tuple(ratios[:k]) for k in range(2, len(ratios) + 1)]
    every = [Trunk(float(n), r) for n in sizes for r in sets]
    return [t for t in every if t.largest_run <= max_run and BYTES_PER_PARAMETER * t.n <= max_bytes]


def cheapest(
    c: Comparison,
    options: Sequence[Trunk],
    budget: float,
    target_sd: float = 0.0,
    target: float | None = None,
    keep_runs: bool = True,
) -> Plan:
    """Trunks, at most one per size, added by shrink per FLOP until `target_sd` or the budget; then each is tried out.

    keep_runs: count on the runs that the comparison holds. `target` (FLOP) replaces the crossing by the difference
    there, in nats, as what is to be known. Raises ScalingError when the caps leave too little to choose from.
    """
    noise = noise_of(c.fit)
    point, slope = (np.log10(target), sensitivity_of_difference(c.fit, target)) if target else (0.0, np.empty(0))
    if not target:
        point, slope = sensitivity_of_crossing(c.fit, c.measured[0])
    information = {t: trunk_information(c.fit, t, noise, 10**point) for t in options}
    base = own_information(c.fit, noise, 10**point) if keep_runs else np.zeros((len(c.fit.theta),) * 2)
    chosen = greedy(options, information, base, slope, budget, target_sd)
    if not chosen:
        raise ScalingError("no candidate fits the budget and the caps on one run")
    then = spread(base + sum(information[t] for t in chosen), slope)
    ordered = tuple(sorted(chosen, key=lambda t: t.n))
    return Plan(ordered, sum(t.flops for t in chosen), spread(base, slope), then, 10**point)


def own_information(fitted: Fit, noise: Noise, target: float) -> np.ndarray:
    """Information of the runs at hand, trunk by trunk."""
    runs, out = fitted.runs, np.zeros((len(fitted.theta),) * 2)
    _, jacobian = fitted.model.value_jacobian(fitted.theta[None])
    for name in np.unique(runs["cluster"].astype(str)):
        rows = np.flatnonzero(runs["cluster"] == name)
        distance = np.abs(np.log10(target / runs["flops"][rows]))
        covariance = np.diag(noise.run**2 + (MISFIT_PER_DECADE * distance) ** 2) + noise.trunk**2
        own = jacobian[0][:, rows]
        out += own @ np.linalg.solve(covariance, own.T)
    return out


def greedy(
    options: Sequence[Trunk],
    information: dict[Trunk, np.ndarray],
    base: np.ndarray,
    slope: np.ndarray,
    budget: float,
    target_sd: float,
) -> list[Trunk]:
    """Adds the trunk that buys most log spread per log cost, one per size, within the budget; then drops idle ones."""
    ridge = base + 1e-9 * np.diag(np.diag(sum(information.values()) + base) + 1e-300)
    chosen: list[Trunk] = []
    total, spent, now = ridge, 0.0, spread(ridge, slope)
    while now > target_sd:
        open_options = [t for t in options if t.n not in {x.n for x in chosen} and spent + t.flops <= budget]
        if not open_options:
            break
        gains = [np.log(now / spread(total + information[t], slope)) / t.flops**0.5 for t in open_options]
        best = open_options[int(np.argmax(gains))]
        chosen.append(best)
        total, spent = total + information[best], spent + best.flops
        now = spread(total, slope)
    for trunk in sorted(chosen, key=lambda t: -t.flops):
        rest = total - information[trunk]
        if target_sd > 0 and spread(rest, slope) <= target_sd:
            chosen.remove(trunk)
            total = rest
    return chosen


def next_values(c: Comparison, options: Sequence[Trunk], target: float | None = None) -> list[Value]:
    """Every candidate by what it alone would add to the runs at hand, best per FLOP first."""
    noise = noise_of(c.fit)
    if target:
        point, slope = np.log10(target), sensitivity_of_difference(c.fit, target)
    else:
        point, slope = sensitivity_of_crossing(c.fit, c.measured[0])
    base = own_information(c.fit, noise, 10**point)
    now = spread(base, slope)
    out = []
    for t in options:
        shrink = now - spread(base + trunk_information(c.fit, t, noise, 10**point), slope)
        out.append(Value(t, shrink, shrink / t.flops))
    return sorted(out, key=lambda v: -v.per_flop)


@dataclass(frozen=True)
class Power:
    """Simulated ladders: share whose interval of the difference at the target excludes zero, share whose crossing
    interval is finite on both sides, sd of log10 C* over those that cross, share without a crossing."""

    ladders: int
    p_sign: float
    p_crossing: float
    sd_log_crossing: float
    p_none: float


def power(truths: Truths, ladder: Ladder, noise: Noise, target: float, ladders: int = 50, seed: int = 0) -> Power:
    """What a ladder would show if the truth were `truths`, before a single run is trained."""
    a, b = list(truths)
    signs, crossings, points = [], [], []
    for k in range(ladders):
        runs: Runs = draw(truths, ladder, noise, np.random.default_rng([seed, k]))
        top = float((6 * runs["N"] * runs["D"]).max())
        c = compare(runs, a, b, draws=200, seed=k, starts=4, horizon=max(target * 1e3, top * 1e3))
        place = int(np.argmin(np.abs(np.log(c.flops / target))))
        low, high = (end[place] for end in c.band(c.difference_draws))
        signs.append(bool(low * high > 0))
        crossings.append(bool(np.isfinite(c.crossover.high) and c.crossover.low > 0))
        points.append(c.crossover.estimate)
    crossed = [np.log10(p) for p in points if np.isfinite(p) and p > 0]
    spread_found = float(np.std(crossed)) if len(crossed) > 2 else float("nan")
    return Power(ladders, float(np.mean(signs)), float(np.mean(crossings)), spread_found, 1 - len(crossed) / ladders)
