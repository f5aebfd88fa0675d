"""The verdict in words. It claims what the ensemble carries and no more; failed checks soften it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scaling.ensemble.answers import UNINFORMATIVE, Crossing, Difference, TaskPrediction
from scaling.ensemble.backtest import HELD, MIN_HELD
from scaling.fitting.fit import Gate, ladder_gate
from scaling.tables.cells import matched_cells

if TYPE_CHECKING:
    from scaling.ensemble.accuracy import Accuracy
    from scaling.ensemble.ensemble import Ensemble


def rounded(value: float, low: float, high: float, sign: str = "") -> str:
    """`value (low to high)` with as many decimals as give the interval's width two digits."""
    # The interval decides the digits: two of its width, so that 3.2614 in 2.1 to 3.5 is 3.3. Where the ends lie
    # decades apart each gets two digits of its own.
    width = high - low
    form = f"{sign}.3g"
    if not sign and low > 0 and high > SKEWED * low:  # each to two digits of its own
        value, low, high = (float(f"{x:.2g}") for x in (value, low, high))
        form = f"{sign}.6g"
    elif np.isfinite(width) and width > 0:
        decimals = int(1 - np.floor(np.log10(width)))
        if max(abs(low), abs(high)) < 1e5:
            form = f"{sign}.{max(decimals, 0)}f"
            # What rounds to nothing has no sign: -0.0 + 0.0 is 0.0.
            value, low, high = (round(x, decimals) + 0.0 for x in (value, low, high))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def verdict(e: Ensemble, failed: Sequence[Gate] = ()) -> list[str]:
    """The answer, the headline first; `failed`: checks that did not pass."""
    return lone_verdict(e, failed) if len(e.families) == 1 else pairs_verdict(e.pairs or (e,), failed)


def pairs_verdict(pairs: Sequence[Ensemble], failed: Sequence[Gate]) -> list[str]:
    """The headline of every pair; what stands behind it too where there is one pair, for else nobody would read it."""
    if len(pairs) > 1:
        return [
            *(f"{p.b} against {p.a}: {headline(p)}" for p in pairs),
            *shortfalls(failed, "All of this"),
            CONDITIONAL,
        ]
    return [headline(pairs[0], failed), *carried(pairs[0]), *shortfalls(failed), CONDITIONAL]


WIDE = f"an uninformative interval (wider than {100 * UNINFORMATIVE:g} % of the loss)"
SKEWED = 5.0  # an interval whose ends are so many times apart is told on a logarithmic scale
CONDITIONAL = (
    "A frontier is the best loss that each amount of compute buys. Every interval and probability is conditional on "
    "the laws considered, each with a smooth misfit that the runs themselves measure."
)


def lone_verdict(e: Ensemble, failed: Sequence[Gate]) -> list[str]:
    """What a lone family's runs are good for."""
    top = float(e.runs["flops"].max())
    level = np.median(e.frontier(e.a, np.array([top]))[:, 0])
    first = f"{e.a}: the best loss at {top:.1e} FLOP, the largest run, is {level:.3f} {e.runs.loss_label}."
    return [first, backtest_sentence(e), *shortfalls(failed, "This"), CONDITIONAL]


def headline(e: Ensemble, failed: Sequence[Gate] = ()) -> str:
    """One sentence on who leads where, softened where checks fail or ladders are too small."""
    short = [g.message for g in (ladder_gate(e.runs, f) for f in e.families) if not g.passed]
    said = crossing_sentence(e, e.crossing())
    if short:
        return f"Not decided, as the ladder is too small ({short[0]}). What it suggests: {said}"
    return f"{said} Provisional: some checks fail." if failed else said


def crossing_sentence(e: Ensemble, x: Crossing, path: str = "", axis: str = "flops") -> str:
    """What is said of the crossing on a cost axis; two-sided within the ladder's budgets, one-sided beyond. path: where
    the sizes and tokens are not the best ones."""
    low, high = (f"{end:.1e} {x.unit}" for end in e.measured(axis))
    start = f"{path}: " if path else ""
    if x.kind == "inside":
        far = "" if x.high <= e.measured(axis)[1] else "; runs stand behind the lower part of that range"
        return f"{start}{e.b} overtakes {e.a} between {x.low:.1e} and {x.high:.1e} {x.unit} (95 %){far}."
    if x.kind == "not before":
        return f"{start}{e.b} does not overtake {e.a} before {x.low:.1e} {x.unit} (95 %, one-sided), if ever."
    if x.kind == "by":
        return f"{start}{e.b} leads {e.a} from {x.high:.1e} {x.unit} on, or from less (95 %, one-sided)."
    if x.kind == "throughout":
        return f"{start}{e.b} has the lower loss at every compute measured, {low} to {high}."
    return f"{start or 'The '}runs, from {low} to {high}, do not say which of {e.a} and {e.b} leads."


def carried(e: Ensemble) -> list[str]:
    """What stands behind a pair's headline."""
    return [*matched_sentences(e), *frontier_sentences(e), backtest_sentence(e)]


def frontier_sentences(e: Ensemble) -> list[str]:
    """What the frontiers of a pair say at the edge of the runs and a decade beyond, and what that rests on."""
    low, high = e.measured()
    out = []
    if low > high:
        out.append(
            f"No compute was measured for both families: those of one end at {high:.1e} FLOP, the other's start at "
            f"{low:.1e}. Every difference comes from the laws, not from runs."
        )
    at, ahead = e.difference(high), e.difference(high * 10)
    out.append(difference_sentence(e, at, f"At {high:.1e} FLOP, the largest that both families reached"))
    out.append(difference_sentence(e, ahead, f"At {high * 10:.1e} FLOP, one decade beyond the runs"))
    out += [floors_sentence(e), efficiency_sentence(e)]
    price = e.break_even(high)
    if price:
        out.append(price_sentence(e, price.value, price.low, price.high, price.share, price.flops))
    return [*(line for line in out if line), *outside_ladder(e)]


def difference_sentence(e: Ensemble, d: Difference, where: str) -> str:
    """A difference of the frontiers with its interval, and P where it is validated."""
    unit = e.runs.loss_label
    text = rounded(d.value, d.low, d.high, "+")
    start = f"{where}, the frontier of {e.b} minus that of {e.a} is {text} {unit} (95 %)"
    if not d.informative:
        start += f", {WIDE}"
    if d.p_better is None:
        return f"{start}. {reach_sentence(e)}"
    return f"{start}; P({e.b} better) {chance(d.p_better)}."


def chance(p: float) -> str:
    """A probability as draws can tell it."""
    return "> 0.99" if p > 0.995 else "< 0.01" if p < 0.005 else f"= {p:.2f}"


def reach_sentence(e: Ensemble | Accuracy) -> str:
    """How far probabilities are validated."""
    if not e.test.points:
        return "Not validated beyond the runs: no back-test is possible."
    return f"Not validated beyond {e.reach:.1f} decades." if e.reach else "Not validated beyond the runs."


def accuracy_lines(x: TaskPrediction, e: Accuracy) -> list[str]:
    """A forecast of an accuracy, with the loss that it goes by."""
    where = f"{x.decades:.1f} decades beyond the largest run" if x.decades > 0 else "within the runs"
    loss = rounded(x.loss, *x.loss_interval)
    return [
        f"{x.family}: {x.column} {rounded(x.accuracy, x.low, x.high)} (95 %), {where}, by a loss of {loss}",
        f"  a new run there: {rounded(x.accuracy, x.run_low, x.run_high)} (95 %)",
        *([] if x.validated else [f"  {reach_sentence(e)}"]),
    ]


def floors_sentence(e: Ensemble) -> str:
    """Tied and untied answers, and which of them is the headline's."""
    if np.isnan(e.equal_floors) or e.tied is e.untied:
        return ""
    budget = e.measured()[1] * 10
    ends = [(name, x.difference(budget)) for name, x in (("shared parameters", e.tied), ("nothing shared", e.untied))]
    both = "; ".join(f"with {name}, {rounded(d.value, d.low, d.high, '+')}" for name, d in ends)
    stand = "not supported, so the answers here share nothing" if e.only_untied else "compatible with the runs"
    weight = f"posterior weight {e.equal_floors:.2f}, 0.50 before any run"
    return f"Equal floors are {stand} ({weight}). One decade beyond the runs the difference is, {both}."


def efficiency_sentence(e: Ensemble) -> str:
    """What a parameter is worth."""
    if not e.law.has_allocation:
        return ""
    x = e.efficiency()
    where = f"at {short(x.N)} parameters and {short(x.D)} tokens, the middle of the ladder"
    return f"One parameter of {e.b} is worth {rounded(x.rho, x.low, x.high)} of {e.a}'s {where} (95 %)."


def price_sentence(e: Ensemble, value: float, low: float, high: float, share: float, flops: float) -> str:
    """The break-even price of a ternary operation."""
    where = f"To match {e.a}'s loss at {flops:.1e} FLOP for the same price"
    what = f"a ternary operation of {e.b} ({share:.0%} of its operations there)"
    if high <= 0:
        return f"{where}, no price of {what} is low enough."
    cost = rounded(value, max(low, 0.0), high)
    may = " It may be that no price is low enough." if low <= 0 else ""
    return f"{where}, {what} may cost {cost} of one multiply-accumulate operation of {e.a} (95 %).{may}"


def matched_sentences(e: Ensemble) -> list[str]:
    """What needs no law: runs of both families with N within 1 % and equal D."""
    one, two = matched_rows(e)
    gaps = e.runs["loss"][two] - e.runs["loss"][one]
    if not len(gaps):
        return ["No two runs of the families have equal N (within 1 %) and D, so only their laws can be compared."]
    worse = int((gaps > 0).sum())
    which, count = ("higher", worse) if 2 * worse > len(gaps) else ("lower", int((gaps < 0).sum()))
    span = f"between {gaps.min():+.3f} and {gaps.max():+.3f} {e.runs.loss_label}"
    cells = f"in {count} of {len(gaps)} matched cells (N within 1 %, equal D)"
    return [f"Run against run, {e.b} has the {which} loss {cells}; the difference lies {span}."]


def matched_rows(e: Ensemble) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of A and of B in matched cells, in order of compute."""
    family = (e.runs["family"] == e.b).astype(int)
    cell = matched_cells(e.runs, family)
    numbers = np.unique(cell[cell >= 0])
    one, two = (np.array([np.flatnonzero((cell == k) & (family == f))[0] for k in numbers], int) for f in (0, 1))
    order = np.argsort(e.runs["flops"][one], kind="stable")
    return one[order], two[order]


def outside_ladder(e: Ensemble) -> list[str]:
    """Where the best allocation asks for sizes or tokens that were not trained, though the compute was spent."""
    if not e.law.has_allocation or e.measured()[0] > e.measured()[1]:
        return []
    budgets, asked = e.budgets(beyond=0.0), []
    for family in e.families:
        runs, path = e.runs.family(family), e.path(family, budgets)
        for name, unit, best in (("N", "parameters", path.log_n[0]), ("D", "tokens", path.log_d[0])):
            low, high = np.exp([best.min(), best.max()])
            if low < runs[name].min() / 1.1 or high > runs[name].max() * 1.1:
                asked.append(f"{family} {short(low)} to {short(high)} {unit}")
    if not asked:
        return []
    return [
        f"Best allocations leave the sizes or tokens that were trained ({'; '.join(asked)}): there the frontier is "
        "extrapolated by the law."
    ]


def backtest_sentence(e: Ensemble) -> str:
    """What the check by left-out runs found."""
    points = e.test.points
    if not points:
        # The first origin keeps most runs; what it lacks, the others lack too.
        return f"No back-test is possible: {e.test.skipped[0]}."
    inside, far = sum(p.inside for p in points), max(p.decades for p in points)
    text = f"Back-test: {inside} of {len(points)} left-out losses and differences lay in their 95 % intervals"
    if e.reach:
        earned = f"that validates {e.reach:.1f} decades"
    elif len(points) < MIN_HELD:
        earned = f"too few to validate anything beyond the runs ({MIN_HELD} are needed)"
    else:
        earned = f"that validates nothing beyond the runs ({HELD:.0%} must lie inside at every distance)"
    return f"{text}, up to {far:.1f} decades beyond the runs fitted; {earned}."


def shortfalls(failed: Sequence[Gate], all_of: str = "") -> list[str]:
    """Failed checks, each said once; all_of: what they make provisional, where no headline has said so."""
    names = list(dict.fromkeys(gate.name for gate in failed))
    many = "1 check fails" if len(names) == 1 else f"{len(names)} checks fail"
    start = f"{all_of} is provisional: {many}" if all_of else many
    return [f"{start}: {', '.join(names)}."] if names else []


def short(value: float) -> str:
    """A count of parameters or tokens as people say it: 410k, 1.3M, 2.7B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def html_paragraphs(e: Ensemble) -> str:
    """The verdict for a notebook."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in e.verdict())
