"""The verdict in words; it never claims more than the ladder and the draws support."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling.uncertainty.bootstrap import Draws, interval, sorted_clusters
from scaling.verdict.compare import Comparison, family_frontier
from scaling.verdict.crossing import LEVEL
from scaling.verdict.frontier import Cost


def verdict(c: Comparison) -> list[str]:
    """The answer, the headline first."""
    short = short_ladders(c)
    measured = [at_measured(c), p_measured(c), *outside_ladder(c)] if c.overlap else [no_overlap(c)]
    lines = [headline(c), *on_matched_cells(c), *measured, beyond(c)]
    failed = [g for g in c.gates if not g.passed and g.message not in short]
    if failed:
        lines.append(f"{len(failed)} of {len(c.gates)} checks fail; the first: {failed[0].message}.")
    return lines


def short_ladders(c: Comparison) -> list[str]:
    """What is missing from ladders that are too small for any claim beyond the runs."""
    return [g.message for g in c.gates if g.name.startswith("ladder") and not g.passed]


def headline(c: Comparison) -> str:
    """One sentence on the crossing; an interval or a one-sided bound, never a bare point."""
    short = short_ladders(c)
    return f"The crossing is not determined: {short[0]}." if short else crossing_sentence(c)


def crossing_sentence(c: Comparison) -> str:
    """What the draws say of the crossing, whatever the ladder; a lead that is lost again is not passed over."""
    x = c.crossover
    if x.p_reverse > LEVEL:
        low, high = interval(x.lost, LEVEL)
        return (
            f"{c.b} leads at first and is overtaken by {c.a} {between(low, high, c.unit)} (95 % interval), "
            f"{place_of(c, low, high)} (P = {x.p_reverse:.2f})."
        )
    lost = f" In {x.p_reverse:.0%} of the draws {c.b} leads at first and {c.a} overtakes it."
    return gaining_sentence(c) + (lost if x.p_reverse > 1 - LEVEL else "")


def gaining_sentence(c: Comparison) -> str:
    """What the draws say of B's taking the lead."""
    x = c.crossover
    if x.p_always > LEVEL:
        span = f"{c.budgets[0]:.1e} to {x.horizon:.0e} {c.unit}"
        return f"{c.b} has the lower loss at every budget from {span} (P = {x.p_always:.2f})."
    if np.isinf(x.lower_bound()):
        return f"{c.b} does not overtake {c.a} before {x.horizon:.0e} {c.unit} (P = {x.p_never:.2f})."
    if np.isinf(x.high):
        bound = x.lower_bound()
        if bound == 0:
            return f"The crossing is not determined: the draws range from {c.b} leading throughout to never leading."
        return (
            f"{c.b} overtakes {c.a}, if at all, above {bound:.1e} {c.unit} (95 % one-sided); "
            f"it never does before {x.horizon:.0e} in {x.p_never:.0%} of draws."
        )
    if x.low == 0:
        return f"{c.b} leads {c.a} by {x.upper_bound():.1e} {c.unit} at the latest (95 % one-sided)."
    span = between(x.low, x.high, c.unit)
    return f"{c.b} overtakes {c.a} {span} (95 % interval), {place_of(c, x.low, x.high)}."


def between(low: float, high: float, unit: str) -> str:
    """An interval of budgets, open ends named."""
    if low == 0 or np.isinf(high):
        return f"by {high:.1e} {unit}" if low == 0 else f"above {low:.1e} {unit}"
    return f"between {low:.1e} and {high:.1e} {unit}"


def place_of(c: Comparison, low: float, high: float) -> str:
    """Where an interval of budgets lies against the runs of both families."""
    if not c.overlap:
        return "where no budget was measured for both"
    if high <= c.measured[1]:
        return "within the measured range"
    return "beyond the largest run" if low > c.measured[1] else "near the largest run"


def no_overlap(c: Comparison) -> str:
    """What stands in for the measured range where there is none."""
    first, last = c.measured
    return (
        f"No budget was measured for both families: the runs of one end at {last:.1e} {c.unit}, those of the other "
        f"begin at {first:.1e}. Every difference is the law's word, not the runs'."
    )


def bound_text(value: float, unit: str) -> str:
    """A one-sided bound; its two ends stand for what happened in none of the budgets searched."""
    return "beyond the horizon" if np.isinf(value) else "the cheapest run" if value == 0 else f"{value:.2e} {unit}"


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
        f"the difference goes from {gaps.min():+.3f} to {gaps.max():+.3f} {runs.loss_unit}."
    ]


def at_measured(c: Comparison) -> str:
    """The difference where there are data: at the largest budget that both families reached."""
    k = c.last_measured
    low, high = (float(v[k]) for v in c.band(c.difference_draws))
    value, unit = float(c.difference[k]), c.fit.runs.loss_unit
    side = "higher" if value > 0 else "lower"
    clear = "" if low * high > 0 else ", which does not tell the two apart"
    return (
        f"At {c.budgets[k]:.1e} {c.unit}, the largest measured, {c.b} has a loss {abs(value):.3f} {unit} {side} "
        f"than {c.a} (95 % interval of the difference {low:+.3f} to {high:+.3f}){clear}."
    )


def p_measured(c: Comparison) -> str:
    """P(B better) over the budgets that were measured."""
    if not c.overlap:
        return no_overlap(c)
    chance = c.p_b_better[c.within]
    low, high = f"{chance.min():.2f}", f"{chance.max():.2f}"
    span = low if low == high else f"{low} to {high}"
    return f"P({c.b} better) is {span} over the measured range, {c.measured[0]:.1e} to {c.measured[1]:.1e} {c.unit}."


def outside_ladder(c: Comparison) -> list[str]:
    """Where the best allocation asks for sizes or tokens that were not trained, though the budget itself was spent."""
    asked = []
    for family in (c.a, c.b):
        runs, found = c.fit.runs.family(family), c.frontiers[family]
        for name, unit, path in (("N", "parameters", found.log_n), ("D", "tokens", found.log_d)):
            best = np.exp(path[0][c.within])
            if best.min() < runs[name].min() / 1.1:
                asked.append(f"{family} down to {best.min():.1e} {unit} (least trained {runs[name].min():.1e})")
            if best.max() > runs[name].max() * 1.1:
                asked.append(f"{family} up to {best.max():.1e} {unit} (most trained {runs[name].max():.1e})")
    if not asked:
        return []
    return [
        f"Within the measured budgets the best allocation leaves the ladder, for {', '.join(asked)}: "
        "there the frontier is the law's word, not a run's."
    ]


def ranking(joint: Draws, families: Sequence[str]) -> list[str]:
    """Several families at the largest compute that all of them reached: the chance that each has the lowest loss."""
    runs = joint.fit.runs
    top = min(float(runs.family(f)["flops"].max()) for f in families)
    at = np.log([top])
    drawn = [family_frontier(joint.fit, joint.theta, f, Cost.of(runs.family(f)), at).loss[:, 0] for f in families]
    first = np.argmin(drawn, axis=0)
    chances = sorted(((float((first == k).mean()), f) for k, f in enumerate(families)), reverse=True)
    listed = ", ".join(f"{f} {p:.2f}" for p, f in chances)
    return [f"Of {len(families)} families at {top:.1e} FLOP, the largest that all reached, P(lowest loss): {listed}."]


def beyond(c: Comparison) -> str:
    """What the extrapolated draws say, with the share that never cross."""
    x = c.crossover
    return (
        f"Extrapolated to {x.horizon:.0e} {c.unit} ({np.log10(x.horizon / c.measured[1]):.0f} decades beyond data), "
        f"the order of the two changes in {1 - x.p_none:.0%} of {len(x.draws)} draws; {c.b} ends ahead in "
        f"{1 - x.p_never:.0%}. These shares assume that the law holds that far, which no run here can show."
    )
