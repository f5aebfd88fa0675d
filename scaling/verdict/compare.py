"""Two families on one axis: joint fit with shared terms, difference of the frontiers, crossover over all draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit, Gate, fit, ladder_gate
from scaling.tables.runs import Runs, ScalingError, as_number
from scaling.uncertainty.bootstrap import Draws, bootstrap, interval, sorted_clusters
from scaling.verdict.costs import AXES, axis_cost, ternary_share
from scaling.verdict.frontier import Cost, Frontier, fixed_ratio, fixed_size, frontier

HORIZON_DECADES = 6.0  # how far beyond the largest run a crossing is looked for, unless told otherwise
POINTS_PER_DECADE = 8
LEVEL = 0.95


@dataclass(frozen=True)
class Crossover:
    """Where B's frontier passes below A's, over all draws.

    estimate: FLOP at the fitted optimum, inf where B never leads before the horizon, 0 where it leads from the lowest
    measured compute on. low, high: percentile interval of the same quantity over every draw, those that never cross
    included. p_none: share of draws in which the order never changes; p_always: those in which B leads throughout.
    p_reverse: share in which A overtakes B instead. draws: (K,) the quantity itself.
    """

    estimate: float
    low: float
    high: float
    p_none: float
    p_always: float
    p_reverse: float
    horizon: float
    draws: np.ndarray

    def p_before(self, flops: float) -> float:
        """Share of draws in which B leads at or before this compute and crossed to do so (or always led)."""
        return float((self.draws <= flops).mean())


@dataclass(frozen=True)
class Comparison:
    """B against A along compute. Arrays over the grid `flops` (M,); draws have shape (K, M).

    difference: loss of B minus loss of A on the compute-optimal frontiers, nats per token; below zero B is better.
    measured: (low, high) compute that both families' runs span.
    """

    a: str
    b: str
    fit: Fit
    draws: Draws
    flops: np.ndarray
    frontiers: dict[str, Frontier]
    frontier_draws: dict[str, Frontier]
    crossover: Crossover
    measured: tuple[float, float]
    gates: tuple[Gate, ...]
    verdict: tuple[str, ...]
    axis: str = "flops"
    along: str = "optimal"

    @property
    def unit(self) -> str:
        """Unit of the horizontal axis."""
        return AXES[self.axis]

    @property
    def difference(self) -> np.ndarray:
        return self.frontiers[self.b].loss[0] - self.frontiers[self.a].loss[0]

    @property
    def difference_draws(self) -> np.ndarray:
        return self.frontier_draws[self.b].loss - self.frontier_draws[self.a].loss

    @property
    def p_b_better(self) -> np.ndarray:
        """(M,) share of draws in which B's frontier lies below A's."""
        return (self.difference_draws < 0).mean(axis=0)

    def band(self, values: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise percentile band (M,), (M,) of draws (K, M)."""
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def compare(
    runs: Runs,
    a: str,
    b: str,
    share: Sequence[str] = ("E",),
    draws: int = 2000,
    seed: int = 0,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
    starts: int = 64,
    horizon: float | None = None,
    axis: str = "flops",
    along: str = "optimal",
    energy: Mapping[str, float] | None = None,
    usd_per_hour: float | None = None,
) -> Comparison:
    """Compares family b with family a on their compute-optimal frontiers, or along another path.

    along: "optimal", "ratio=20" (tokens per parameter) or "size=1e9" (parameters). axis: what is on the horizontal
    axis, see `costs.AXES`; the same draws serve every axis.

    One joint fit ties the parameters in `share`: the same data and tokenizer have one irreducible loss, and separate
    5-parameter fits cannot place a crossing. `horizon` (FLOP) ends the search for crossings.
    Raises ScalingError where the two sets of losses are not comparable.
    """
    if a == b:
        raise ScalingError(f"family {a!r} cannot be compared with itself")
    both = pick_families(runs, a, b)
    check_comparable(both)
    joint = fit(both, law, objective, delta, starts, seed, share=share)
    sampled = bootstrap(joint, draws, seed)
    spent = {f: axis_cost(both.family(f), axis, energy, usd_per_hour) for f in (a, b)}
    costs = {f: Cost.of(both.family(f), spent[f]) for f in (a, b)}
    measured = measured_range(spent[a], spent[b])
    horizon = horizon or measured[1] * 10**HORIZON_DECADES
    log_flops = compute_grid(measured[0], horizon)
    point = {f: family_frontier(joint, joint.theta[None], f, costs[f], log_flops, along) for f in (a, b)}
    drawn = {f: family_frontier(joint, sampled.theta, f, costs[f], log_flops, along) for f in (a, b)}
    found = crossover(log_flops, point[b].loss - point[a].loss, drawn[b].loss - drawn[a].loss)
    gates = (*joint.gates, ladder_gate(both, a), ladder_gate(both, b), spread_gate(sampled))
    result = Comparison(a, b, joint, sampled, np.exp(log_flops), point, drawn, found, measured, gates, (), axis, along)
    return Comparison(**{**vars(result), "verdict": tuple(verdict(result))})


def pick_families(runs: Runs, a: str, b: str) -> Runs:
    """Rows of both families, a first."""
    return runs.select(np.concatenate([np.flatnonzero(runs["family"] == runs.family(f)["family"][0]) for f in (a, b)]))


def check_comparable(runs: Runs) -> None:
    """Losses in nats compare only over one tokenizer, vocabulary and validation set."""
    for name in ("tokenizer", "vocab", "val_set"):
        if name not in runs.columns:
            continue
        values = {str(v) for v in runs[name].tolist() if v != "" and v == v}
        if len(values) > 1:
            raise ScalingError(
                f"the two families differ in {name} ({', '.join(sorted(values))}): nats per token do not compare; "
                "use bits per byte as the loss (--column loss=bpb)"
            )


def measured_range(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    """Cost that the runs of both families span; falls back to the union when they do not overlap."""
    low, high = max(one.min(), two.min()), min(one.max(), two.max())
    both = np.concatenate([one, two])
    return (float(low), float(high)) if low < high else (float(both.min()), float(both.max()))


def compute_grid(low: float, high: float) -> np.ndarray:
    """(M,) log FLOP, evenly spaced."""
    count = max(2, int(np.ceil(np.log10(high / low) * POINTS_PER_DECADE)) + 1)
    return np.linspace(np.log(low), np.log(high), count)


def family_frontier(
    joint: Fit, theta: np.ndarray, family: str, cost: Cost, log_flops: np.ndarray, along: str = "optimal"
) -> Frontier:
    """Loss of one family along budgets: at the best allocation, at "ratio=R" tokens a parameter or at "size=N"."""
    own = theta[:, joint.model.index[joint.families.index(family)]]
    kind, _, number = along.partition("=")
    if along == "optimal":
        return frontier(joint.law, own, joint.centre, cost, log_flops)
    if kind not in ("ratio", "size") or not is_positive(number):
        raise ScalingError(f"unknown path {along!r}; choose optimal, ratio=TOKENS_PER_PARAMETER or size=PARAMETERS")
    path = fixed_ratio if kind == "ratio" else fixed_size
    return path(joint.law, own, joint.centre, cost, log_flops, float(number))


def is_positive(text: str) -> bool:
    value = as_number(text)
    return value is not None and 0 < value < np.inf


def crossover(log_flops: np.ndarray, point: np.ndarray, drawn: np.ndarray) -> Crossover:
    """First passage of B below A in the fit (1, M) and in every draw (K, M)."""
    values, behind = overtakes(log_flops, drawn)
    low, high = interval(values, LEVEL)
    return Crossover(
        estimate=float(overtakes(log_flops, point)[0][0]),
        low=low,
        high=high,
        p_none=float((np.isinf(values) & ~behind | (values == 0) & ~behind).mean()),
        p_always=float(((values == 0) & ~behind).mean()),
        p_reverse=float(behind.mean()),
        horizon=float(np.exp(log_flops[-1])),
        draws=values,
    )


def overtakes(log_flops: np.ndarray, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row: FLOP from which B leads up to the horizon (inf: it does not, 0: throughout), and whether A overtakes B.

    The last change of sign counts, since what is asked is who leads from there on.
    """
    leads = difference < 0
    changes = leads[:, 1:] != leads[:, :-1]
    last = np.where(changes.any(axis=1), changes.shape[1] - 1 - changes[:, ::-1].argmax(axis=1), -1)
    place = np.maximum(last, 0)
    rows = np.arange(len(difference))
    before, after = difference[rows, place], difference[rows, place + 1]
    step = log_flops[place + 1] - log_flops[place]
    gap = np.where(before == after, 1.0, before - after)
    crossing = np.exp(log_flops[place] + step * np.clip(before / gap, 0, 1))
    ends_ahead, never = leads[:, -1], last < 0
    values = np.where(ends_ahead, np.where(never, 0.0, crossing), np.inf)
    return values, ~ends_ahead & ~never


def spread_gate(sampled: Draws) -> Gate:
    """An exponent whose interval spans more than a factor of two carries no meaning of its own."""
    slopes = sampled.fit.law.exponents
    wide = [
        f"{name} {low:.2g} to {high:.2g}"
        for name, (low, high) in sampled.intervals().items()
        if name.split("[")[0] in slopes and (low <= 0 or high > 2 * low)
    ]
    message = (
        "exponents wider than a factor of two: " + ", ".join(wide) if wide else "exponents known within a factor of two"
    )
    return Gate("exponent intervals", not wide, message)


def verdict(c: Comparison) -> list[str]:
    """The answer in words, the headline first; it never claims more than ladder and draws support."""
    short = [g for g in c.gates if g.name.startswith("ladder") and not g.passed]
    lines = [f"The crossing is not determined: {short[0].message}."] if short else [headline(c)]
    lines += [*on_matched_cells(c), at_measured(c)]
    lines.append(beyond(c))
    failed = [g for g in c.gates if not g.passed and g not in short]
    if failed:
        lines.append(f"{len(failed)} of {len(c.gates)} checks fail; the first: {failed[0].message}.")
    return lines


def headline(c: Comparison) -> str:
    """One sentence on the crossing; an interval or a one-sided bound, never a bare point."""
    x = c.crossover
    if x.p_always > LEVEL:
        span = f"{c.measured[0]:.1e} to {x.horizon:.0e} {c.unit}"
        return f"{c.b} has the lower loss at every compute from {span} (P = {x.p_always:.2f})."
    if np.isinf(x.low):
        return f"{c.b} does not overtake {c.a} before {x.horizon:.0e} {c.unit} (P = {np.isinf(x.draws).mean():.2f})."
    if np.isinf(x.high):
        bound = float(np.quantile(x.draws, 1 - LEVEL, method="nearest"))
        if bound == 0:
            return f"The crossing is not determined: the draws range from {c.b} leading throughout to never leading."
        return (
            f"{c.b} overtakes {c.a}, if at all, above {bound:.1e} {c.unit} (95 % one-sided); "
            f"it never does before {x.horizon:.0e} in {np.isinf(x.draws).mean():.0%} of draws."
        )
    where = (
        "within the measured range"
        if x.high <= c.measured[1]
        else "beyond the largest run"
        if x.low > c.measured[1]
        else "near the largest run"
    )
    return f"{c.b} overtakes {c.a} between {x.low:.1e} and {x.high:.1e} {c.unit} (95 % interval), {where}."


def on_matched_cells(c: Comparison) -> list[str]:
    """What needs no law at all: runs of equal size and tokens, side by side."""
    if not c.draws.paired:
        return []
    runs = c.fit.runs
    first, second = (np.concatenate(sorted_clusters(runs, family)) for family in (c.a, c.b))
    gaps = runs["loss"][second] - runs["loss"][first]
    worse = int((gaps > 0).sum())
    return [
        f"Run against run, at equal size and tokens, {c.b} has the higher loss in {worse} of {len(gaps)} cells; "
        f"the difference goes from {gaps.min():+.3f} to {gaps.max():+.3f} nats."
    ]


def at_measured(c: Comparison) -> str:
    """The difference where there are data: at the largest compute that both families reached."""
    k = int(np.argmin(np.abs(np.log(c.flops / c.measured[1]))))
    low, high = (float(v[k]) for v in c.band(c.difference_draws))
    value = float(c.difference[k])
    side = "higher" if value > 0 else "lower"
    clear = "" if low * high > 0 else ", which does not tell the two apart"
    return (
        f"At {c.flops[k]:.1e} {c.unit}, the largest measured, {c.b} has a loss {abs(value):.3f} nats {side} "
        f"than {c.a} "
        f"(95 % interval of the difference {low:+.3f} to {high:+.3f}){clear}."
    )


def beyond(c: Comparison) -> str:
    """What the extrapolated draws say, with the share that never cross."""
    x = c.crossover
    return (
        f"Extrapolated to {x.horizon:.0e} {c.unit} ({np.log10(x.horizon / c.measured[1]):.0f} decades beyond data), "
        f"the order of the two changes in {1 - x.p_none:.0%} of {len(x.draws)} draws; {c.b} ends ahead in "
        f"{np.isfinite(x.draws).mean():.0%}. These shares assume that the law holds that far, which no run here "
        "can show."
    )


@dataclass(frozen=True)
class BreakEven:
    """What one of B's cheap operations may cost, in operations of A, for B to match A at A's budget `flops`."""

    flops: float
    estimate: float
    low: float
    high: float
    share: float

    def sentence(self, a: str, b: str) -> str:
        """The result in words; at or below zero no price is low enough."""
        if self.high <= 0:
            return f"At {a}'s loss of {self.flops:.1e} FLOP no price of its ternary operations lets {b} win."
        return (
            f"{b} wins at {self.flops:.1e} FLOP once one of its ternary operations ({self.share:.0%} of all) costs "
            f"less than {self.estimate:.2f} ({self.low:.2f} to {self.high:.2f}) of a multiply-accumulate operation."
        )


def break_even(c: Comparison, flops: float) -> BreakEven:
    """Break-even cost kappa*: B needs C_b FLOP for the loss that A reaches with `flops`; with a share s of B's
    operations at price kappa, B is cheaper once (1 - s + s kappa) C_b < flops. Where B does not reach that loss before
    the horizon no price helps, and kappa* is negative."""
    share = ternary_share(c.fit.runs.family(c.b))
    log_c = np.log(c.flops)

    def price(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        goal = np.array([np.interp(np.log(flops), log_c, row) for row in first])
        need = np.array([np.interp(-g, -row, log_c, right=np.inf) for g, row in zip(goal, second, strict=True)])
        return (np.exp(np.log(flops) - need) - (1 - share)) / share

    low, high = interval(price(c.frontier_draws[c.a].loss, c.frontier_draws[c.b].loss))
    estimate = float(price(c.frontiers[c.a].loss, c.frontiers[c.b].loss)[0])
    return BreakEven(flops, estimate, low, high, share)
