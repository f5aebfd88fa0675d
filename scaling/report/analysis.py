"""Everything that a report says, computed before any of it is written."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling.fitting.approaches import IsoFlop, isoflop
from scaling.fitting.fit import Fit, Gate, fit, ladder_gate
from scaling.laws.forms import law_named
from scaling.lint import Finding, lint, lint_gates
from scaling.report.provenance import provenance_block
from scaling.report.views import (
    AllocationView,
    DifferenceView,
    FamilyView,
    difference_view,
    family_view,
)
from scaling.tables.runs import Runs
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS, BackTest, backtest
from scaling.uncertainty.bootstrap import Draws, bootstrap
from scaling.uncertainty.profile import Intervals, profile_intervals
from scaling.uncertainty.sensitivity import Variant, influence, sensitivity
from scaling.verdict.break_even import BreakEven, break_even
from scaling.verdict.compare import Comparison, contrast, joint_draws, pick_families
from scaling.verdict.costs import CITED, Prices, available_axes
from scaling.verdict.crossing_profile import SIMULATIONS, Profile, profile_crossing
from scaling.verdict.nested import Nested, nested
from scaling.verdict.words import headline, ranking, verdict

BASELINE = "transformer++"
NESTED_DRAWS = 200


@dataclass(frozen=True)
class Settings:
    """How a report is made: law, objective and its threshold, bootstrap draws, seed, parameters that the joint fit
    shares (None: E, where the law has one), the family compared with (None: Transformer++ or else the first), prices
    for the cost axes; delta_found: whether the threshold is that of the table's noise."""

    law: str = "chinchilla"
    objective: str = "huber"
    delta: float = 1e-3
    draws: int = 2000
    seed: int = 0
    share: Sequence[str] | None = None
    baseline: str | None = None
    prices: Prices = field(default_factory=lambda: CITED)
    delta_found: bool = False


@dataclass(frozen=True)
class Pair:
    """One family against the baseline. axes: the comparison on every cost axis that the table has, FLOP first, all
    from the same draws; paths: in FLOP along the best allocation, at fixed tokens per parameter and at a fixed size,
    each with the profile of its crossing; test: back-test of the two; price: None where there is nothing ternary."""

    axes: dict[str, Comparison]
    paths: dict[str, tuple[Comparison, Profile]]
    test: BackTest
    price: BreakEven | None
    views: dict[str, DifferenceView]

    @property
    def main(self) -> Comparison:
        """The comparison in FLOP on the best allocation."""
        return self.axes["flops"]

    @property
    def profile(self) -> Profile:
        """The profile of that comparison's crossing."""
        return self.paths["optimal"][1]


@dataclass(frozen=True)
class Analysis:
    """What was found. gates: every check; verdict: the sentences at the top.

    Per family: fits, draws, profiles (likelihood intervals), variants (sensitivity), influences (n,), isoflops, views,
    allocations (none for a law of compute alone). joint: draws of the joint fit of all families, None for a lone one;
    pairs: every other family against the baseline; others: the pairs without the baseline; lone_test: the back-test of
    a lone family; steps: nested models of all families, None for a lone one or a law other than Chinchilla's.
    """

    runs: Runs
    settings: Settings
    fits: dict[str, Fit]
    draws: dict[str, Draws]
    profiles: dict[str, Intervals]
    joint: Draws | None
    pairs: tuple[Pair, ...]
    others: tuple[Comparison, ...]
    lone_test: BackTest | None
    steps: Nested | None
    variants: dict[str, list[Variant]]
    influences: dict[str, np.ndarray]
    isoflops: dict[str, IsoFlop]
    findings: tuple[Finding, ...]
    gates: tuple[Gate, ...]
    verdict: tuple[str, ...]
    provenance: dict[str, Any]
    views: tuple[FamilyView, ...]
    allocations: tuple[AllocationView, ...]

    @property
    def tests(self) -> list[BackTest]:
        """Back-tests, one a pair, or the lone family's."""
        return [pair.test for pair in self.pairs] or ([self.lone_test] if self.lone_test else [])

    def tail(self, family: str) -> str:
        """Ending of the file names of a pair's figures: nothing where there is one pair, else the second family, or its
        number where the name is none for a file or would be another's."""
        if len(self.pairs) < 2:
            return ""
        names = [re.sub(r"[^\w.+-]", "_", pair.main.b).lower() for pair in self.pairs]
        place = [pair.main.b for pair in self.pairs].index(family)
        plain = re.fullmatch(r"[\w.+-]+", family) and names.count(names[place]) == 1
        return f"-{family}" if plain else f"-{names[place]}-{place + 1}"

    def test_of(self, family: str) -> BackTest | None:
        """The back-test that a family took part in; the baseline's first one."""
        held = [pair.test for pair in self.pairs if family in (pair.main.a, pair.main.b)]
        return held[0] if held else self.lone_test


def analyse(runs: Runs, settings: Settings, known: Mapping[str, Any]) -> Analysis:
    """Fits, comparisons and checks of a table; `known` is what the table cannot tell about its provenance."""
    s = settings
    fits = {f: fit(runs.family(f), s.law, s.objective, s.delta, seed=s.seed) for f in runs.families}
    sampled = {f: bootstrap(fits[f], s.draws, s.seed) for f in fits}
    ordered = baseline_first(runs, s.baseline)
    joint = joint_fit(runs, ordered, s) if len(ordered) > 1 else None
    pairs = tuple(pair_analysis(joint, ordered[0], other, s) for other in ordered[1:]) if joint else ()
    rest = itertools.combinations(ordered[1:], 2)
    others = tuple(contrast(joint, a, b) for a, b in rest) if joint else ()
    lone = None if joint else tested(runs, s)
    steps = nested(runs, ordered, NESTED_DRAWS, s.seed) if joint and s.law == "chinchilla" else None
    gates = report_gates(runs, fits, joint, pairs)
    seen = [family_view(joint or sampled[f], f, place) for place, f in enumerate(ordered)]
    return Analysis(
        runs=runs,
        settings=settings,
        fits=fits,
        draws=sampled,
        profiles={f: profile_intervals(d, min(SIMULATIONS, s.draws), s.seed) for f, d in sampled.items()},
        joint=joint,
        pairs=pairs,
        others=others,
        lone_test=lone,
        steps=steps,
        variants={f: sensitivity(runs.family(f), s.law, s.delta) for f in fits},
        influences={f: influence(fits[f]) for f in fits},
        isoflops={f: isoflop(runs.family(f)) for f in fits},
        findings=tuple(lint(runs)),
        gates=gates,
        verdict=tuple(pairs_verdict(joint, ordered, pairs, steps) if joint else lone_verdict(ordered[0], lone, gates)),
        provenance=provenance_block(runs, fits, sampled, known, s.draws, s.seed),
        views=tuple(view for view, _ in seen),
        allocations=tuple(allocation for _, allocation in seen) if law_named(s.law).has_allocation else (),
    )


def baseline_first(runs: Runs, baseline: str | None) -> list[str]:
    """Families, the one that the others are compared with first: the one asked for, else Transformer++, else the
    table's first. Raises ScalingError on an unknown name."""
    if baseline is None:
        baseline = BASELINE if BASELINE in runs.families else runs.families[0]
    first = str(runs.family(baseline)["family"][0])
    return [first, *(f for f in runs.families if f != first)]


def joint_fit(runs: Runs, ordered: Sequence[str], s: Settings) -> Draws:
    """One fit of all families with shared terms, and its draws, behind every comparison."""
    return joint_draws(pick_families(runs, ordered), s.share, s.draws, s.seed, s.law, s.objective, s.delta)


def tested(runs: Runs, s: Settings) -> BackTest:
    return backtest(runs, share=s.share, law=s.law, objective=s.objective, delta=s.delta, seed=s.seed)


def pair_analysis(joint: Draws, a: str, b: str, s: Settings) -> Pair:
    """Everything about one family against the baseline."""
    runs = pick_families(joint.fit.runs, (a, b))
    offered = available_axes(runs, s.prices, joint.fit.law)
    axes = {axis: contrast(joint, a, b, axis, prices=s.prices) for axis in offered}
    test, main = tested(runs, s), axes["flops"]
    views = {axis: difference_view(c, test if axis == "flops" else None) for axis, c in axes.items()}
    along = {"optimal": main} | {path: contrast(joint, a, b, along=path) for path in fixed_paths(joint.fit)}
    paths = {path: (c, profile_crossing(c, min(SIMULATIONS, s.draws), s.seed)) for path, c in along.items()}
    return Pair(axes, paths, test, break_even(main), views)


def fixed_paths(joint: Fit) -> list[str]:
    """The middle ratio of tokens to parameters and the largest size of a table, as paths to compare along; none for a
    law of compute alone."""
    if not joint.law.has_allocation:
        return []
    runs = joint.runs
    ratio = float(np.exp(np.median(np.log(runs["D"] / runs["N"]))))
    return [f"ratio={ratio:.2g}", f"size={runs['N'].max():.3g}"]


def report_gates(runs: Runs, fits: Mapping[str, Fit], joint: Draws | None, pairs: Sequence[Pair]) -> tuple[Gate, ...]:
    """Every check once: those of each family's own fit, of the joint fit and of each pair, named by what they check."""
    own = [(f, g) for f in fits for g in fits[f].gates]
    out = [Gate(g.name if "[" in g.name else f"{g.name} [{f}]", g.passed, g.message) for f, g in own]
    out += [ladder_gate(runs, family) for family in fits]
    out += lint_gates(runs)
    if joint is not None:
        out += [Gate(f"joint fit: {g.name}", g.passed, g.message) for g in joint.fit.gates]
    for c in (pair.main for pair in pairs):
        spread = c.gates[-1]
        out.append(Gate(f"{spread.name} [{c.b} v. {c.a}]", spread.passed, spread.message))
    return tuple(out)


def pairs_verdict(joint: Draws, ordered: Sequence[str], pairs: Sequence[Pair], steps: Nested | None) -> list[str]:
    """The headline of every pair, then what carries each, then what nested models add."""
    several = len(pairs) > 1
    out = ranking(joint, ordered) if several else []
    out += [f"{pair.main.b} against {pair.main.a}: " * several + headline(pair.main) for pair in pairs]
    for pair in pairs:
        out += pair_sentences(pair)
    return out + ([steps.sentence()] if steps else [])


def pair_sentences(pair: Pair) -> list[str]:
    """What follows a pair's headline: the comparison's own sentences, profile, break-even price, back-test."""
    c = pair.main
    _, *rest = verdict(c)
    price = [pair.price.sentence(c.measured[1])] if pair.price else []
    tested_on = DIFFERENCE if c.draws.paired else LEVELS
    return [*rest, pair.profile.sentence(c.a, c.b, c.unit), *price, pair.test.sentence(tested_on)]


def lone_verdict(family: str, test: BackTest | None, gates: Sequence[Gate]) -> list[str]:
    """What a lone family's fit is good for."""
    failed = [g for g in gates if not g.passed]
    if failed:
        return [f"{family}: {len(failed)} of {len(gates)} checks fail.", *(f"{g.name}: {g.message}." for g in failed)]
    out = [f"{family}: all {len(gates)} checks pass; there is no second family to compare with."]
    return out + ([test.sentence(LEVELS)] if test else [])
