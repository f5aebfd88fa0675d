"""Two families on one axis: joint fit with shared terms, difference of the frontiers, crossover over all draws."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit, Gate, fit, ladder_gate
from scaling.laws.forms import tied
from scaling.lint import lint_gates
from scaling.tables.runs import BITS, Runs, ScalingError
from scaling.uncertainty.bootstrap import Draws, bootstrap
from scaling.verdict.costs import AXES, CITED, Prices, axis_cost, lacking
from scaling.verdict.crossing import LEVEL, Crossover, crossover
from scaling.verdict.frontier import Cost, Frontier, frontier_along

HORIZON_DECADES = 6.0  # how far beyond the largest run a crossing is looked for, unless told otherwise
IN_BITS = "nats per token do not compare, bits per byte would (--column loss=bpb)"
POINTS_PER_DECADE = 8


@dataclass(frozen=True)
class Comparison:
    """B against A along budgets. Arrays over the grid `budgets` (M,), in units of the axis; draws have shape (K, M).

    difference: loss of B minus loss of A on the two frontiers, nats per token; below zero B is better. measured: (low,
    high) budget that both families' runs span; low lies above high where there is none, see `overlap`. The fit may hold
    more families than these two.
    """

    a: str
    b: str
    draws: Draws
    budgets: np.ndarray
    costs: dict[str, Cost]
    frontiers: dict[str, Frontier]
    frontier_draws: dict[str, Frontier]
    crossover: Crossover
    measured: tuple[float, float]
    gates: tuple[Gate, ...]
    axis: str = "flops"
    along: str = "optimal"

    @property
    def fit(self) -> Fit:
        """The joint fit behind the draws."""
        return self.draws.fit

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

    @property
    def overlap(self) -> bool:
        """Whether any budget lies within the runs of both families."""
        return self.measured[0] <= self.measured[1]

    @property
    def last_measured(self) -> int:
        """Place on the grid of the largest budget that both families reached."""
        return int(np.argmin(np.abs(np.log(self.budgets / self.measured[1]))))

    @property
    def within(self) -> np.ndarray:
        """(M,) which points of the grid lie where both families were measured."""
        slack = 1 + 1e-9
        return (self.budgets >= self.measured[0] / slack) & (self.budgets <= self.measured[1] * slack)

    def band(self, values: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise percentile band (M,), (M,) of draws (K, M)."""
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def compare(
    runs: Runs,
    a: str,
    b: str,
    share: Sequence[str] | None = None,
    draws: int = 2000,
    seed: int = 0,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
    starts: int = 64,
    horizon: float | None = None,
    axis: str = "flops",
    along: str = "optimal",
    prices: Prices = CITED,
) -> Comparison:
    """Compares family b with family a on their compute-optimal frontiers, or along another path.

    One joint fit ties the parameters in `share` (None: E, where the law has one): the same data and tokenizer have one
    irreducible loss, and separate 5-parameter fits cannot place a crossing. For the rest see `contrast`. Raises
    ScalingError where the two sets of losses are not comparable.
    """
    if a == b:
        raise ScalingError(f"family {a!r} cannot be compared with itself")
    sampled = joint_draws(pick_families(runs, (a, b)), share, draws, seed, law, objective, delta, starts)
    return contrast(sampled, a, b, axis, along, horizon, prices)


def joint_draws(
    runs: Runs,
    share: Sequence[str] | None = None,
    draws: int = 2000,
    seed: int = 0,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
    starts: int = 64,
) -> Draws:
    """One joint fit of every family of the table, and its bootstrap; raises ScalingError on incomparable losses."""
    return bootstrap(joint_fit(runs, share, law, objective, delta, starts, seed), draws, seed)


def joint_fit(
    runs: Runs,
    share: Sequence[str] | None = None,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
    starts: int = 64,
    seed: int = 0,
) -> Fit:
    """One fit of every family of the table; raises ScalingError on incomparable losses."""
    check_comparable(runs)
    return fit(runs, law, objective, delta, starts, seed, tied(law, share))


def contrast(
    sampled: Draws,
    a: str,
    b: str,
    axis: str = "flops",
    along: str = "optimal",
    horizon: float | None = None,
    prices: Prices = CITED,
) -> Comparison:
    """Two families of a joint fit against each other; the same draws serve every pair, axis and path.

    axis: what is on the horizontal axis, see `costs.AXES`. along: "optimal", "ratio=20" (tokens per parameter) or
    "size=1e9" (parameters). `horizon` (in units of the axis) ends the search for crossings.
    """
    joint = sampled.fit
    reason = lacking(pick_families(joint.runs, (a, b)), axis, prices, joint.law)
    if reason:
        raise ScalingError(f"axis {axis!r} {reason}")
    spent = {f: axis_cost(joint.runs.family(f), axis, prices) for f in (a, b)}
    costs = {f: Cost.of(joint.runs.family(f), spent[f]) for f in (a, b)}
    measured = measured_range(spent[a], spent[b])
    horizon = horizon or max(measured) * 10**HORIZON_DECADES
    if horizon < max(measured):
        raise ScalingError(f"the horizon {horizon:.3g} lies below the dearest run, {max(measured):.3g} {AXES[axis]}")
    log_flops = compute_grid(*sorted({*measured, horizon}))
    point = {f: family_frontier(joint, joint.theta[None], f, costs[f], log_flops, along) for f in (a, b)}
    drawn = {f: family_frontier(joint, sampled.theta, f, costs[f], log_flops, along) for f in (a, b)}
    found = crossover(log_flops, point[b].loss - point[a].loss, drawn[b].loss - drawn[a].loss)
    gates = (*own_gates(joint, a, b), spread_gate(sampled, a, b))
    return Comparison(a, b, sampled, np.exp(log_flops), costs, point, drawn, found, measured, gates, axis, along)


def pick_families(runs: Runs, families: Sequence[str]) -> Runs:
    """Rows of these families, in this order."""
    return runs.select(
        np.concatenate([np.flatnonzero(runs["family"] == runs.family(f)["family"][0]) for f in families])
    )


def check_comparable(runs: Runs) -> None:
    """Losses in nats compare only over one tokenizer, vocabulary and validation set, sizes and costs by one count."""
    advice = {} if runs.kinds("loss_unit") == [BITS] else dict.fromkeys(("tokenizer", "vocab"), IN_BITS)
    advice["val_set"] = "evaluate both on one text"
    advice |= dict.fromkeys(("loss_unit", "flops_rule", "embedding_counted"), "count and measure both alike first")
    for name, mend in advice.items():
        kinds = runs.kinds(name)
        if len(kinds) > 1:
            raise ScalingError(f"the two families differ in {name} ({', '.join(kinds)}): {mend}")


def measured_range(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    """Cost that the runs of both families span: from the higher of their least to the lower of their largest, the first
    being the larger where they have none in common."""
    return float(max(one.min(), two.min())), float(min(one.max(), two.max()))


def compute_grid(*ends: float) -> np.ndarray:
    """(M,) log budgets from the first end to the last, evenly spaced between ends, all of which are points."""
    parts = [np.log(ends[:1])]
    for low, high in itertools.pairwise(ends):
        count = max(2, int(np.ceil(np.log10(high / low) * POINTS_PER_DECADE)) + 1)
        parts.append(np.linspace(np.log(low), np.log(high), count)[1:])
    return np.concatenate(parts)


def family_frontier(
    joint: Fit, theta: np.ndarray, family: str, cost: Cost, log_flops: np.ndarray, along: str = "optimal"
) -> Frontier:
    """One family's frontier for joint vectors (K, P); tokens are taken to be new, weights as precise as its runs'."""
    own = theta[:, joint.columns(family)]
    return frontier_along(along, joint.frontier_law(family), own, joint.centre, cost, log_flops)


def own_gates(joint: Fit, a: str, b: str) -> list[Gate]:
    """Checks of the fit that concern these two families, and whether each ladder is large enough."""
    others = [f"[{family}]" for family in joint.families if family not in (a, b)]
    kept = [gate for gate in joint.gates if not any(gate.name.endswith(other) for other in others)]
    return [
        *kept,
        ladder_gate(joint.runs, a),
        ladder_gate(joint.runs, b),
        *lint_gates(pick_families(joint.runs, (a, b))),
    ]


def spread_gate(sampled: Draws, a: str, b: str) -> Gate:
    """An exponent whose interval spans more than a factor of two carries no meaning of its own."""
    slopes = [name + tail for name in sampled.fit.law.exponents for tail in ("", f"[{a}]", f"[{b}]")]
    wide = [
        f"{name} {low:.2g} to {high:.2g}"
        for name, (low, high) in sampled.intervals().items()
        if name in slopes and (low <= 0 or high > 2 * low)
    ]
    message = (
        "exponents wider than a factor of two: " + ", ".join(wide) if wide else "exponents known within a factor of two"
    )
    return Gate("exponent intervals", not wide, message)
