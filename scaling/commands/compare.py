"""`scaling compare RUNS` and `scaling crossover RUNS`: two families against each other."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np

from scaling.commands.arguments import (
    axis_arguments,
    delta_of,
    family_arguments,
    fit_arguments,
    new_verb,
    objective_line,
    out_argument,
    pair_of,
    prices_of,
    read_table,
    shared,
    table_arguments,
)
from scaling.commands.output import OK, exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.report.artefact import comparison_json, crossover_json
from scaling.tables.runs import ScalingError
from scaling.verdict.break_even import break_even
from scaling.verdict.compare import Comparison, compare, pick_families
from scaling.verdict.crossing_profile import profile_crossing
from scaling.verdict.words import bound_text, crossing_sentence, headline, short_ladders, verdict


def add(verbs: Any) -> None:
    for name, run, text in (
        ("compare", run_compare, "compare two families: difference, crossover, verdict"),
        ("crossover", run_crossover, "where B overtakes A, with its interval"),
    ):
        verb = new_verb(verbs, name, run, text)
        table_arguments(verb)
        fit_arguments(verb)
        family_arguments(verb)
        axis_arguments(verb)
        if name == "compare":
            out_argument(verb)


def comparison(a: argparse.Namespace) -> Comparison:
    """The comparison that the flags ask for."""
    runs = read_table(a)
    first, second = pair_of(a, runs)
    delta = delta_of(a, runs)
    options = {"law": a.law, "objective": a.objective, "delta": delta, "horizon": a.horizon}
    axes: dict[str, Any] = {"axis": a.axis or "flops", "along": a.along or "optimal", "prices": prices_of(a)}
    return compare(runs, first, second, shared(a), a.draws, a.seed, **options, **axes)


def run_compare(a: argparse.Namespace) -> int:
    if a.out:
        return written(a)
    c = comparison(a)
    price = break_even(c) if c.axis == "flops" else None
    if a.json:
        print_json(comparison_json(c, price=price) | {"gates": [asdict(g) for g in c.gates]})
        return exit_code(c.gates)
    print("\n".join(verdict(c)))
    if price:
        print(price.sentence(c.measured[1]))
    print(objective_line(a, c.fit.objective))
    print_gates(c.gates)
    return exit_code(c.gates)


def written(a: argparse.Namespace) -> int:
    """The report of the pair that --b asks for, or of all families; it shows every axis and path that the table has."""
    for flag in ("axis", "along", "horizon"):
        if getattr(a, flag):
            raise ScalingError(
                f"--{flag} answers on the terminal or as --json; --out writes every axis and path there is"
            )
    runs = read_table(a)
    pair = pair_of(a, runs)
    chosen = pick_families(runs, pair) if a.b else runs
    return full_report(a, chosen, share=shared(a), baseline=pair[0] if a.b else a.a, prices=prices_of(a), gate=True)


def run_crossover(a: argparse.Namespace) -> int:
    c = comparison(a)
    profile = profile_crossing(c, seed=a.seed)
    if a.json:
        print_json(crossover_json(c, profile))
        return OK
    x = c.crossover
    print(headline(c))
    if short_ladders(c):
        print(f"What the draws would say of a larger ladder: {crossing_sentence(c)}")
    print(profile.sentence(c.a, c.b, c.unit))
    print(f"share of draws in which the order never changes before {x.horizon:.1e} {c.unit}: {x.p_none:.3f}")
    above, by = (bound_text(bound, c.unit) for bound in (x.lower_bound(), x.upper_bound()))
    print(f"one-sided 95 % bounds: {c.b} takes the lead above {above}; it leads by {by}")
    for flops in 10.0 ** np.arange(np.ceil(np.log10(c.budgets[0])), np.log10(x.horizon) + 1e-9):
        print(f"  P({c.b} leads for good by {flops:.0e} {c.unit}) = {x.p_before(flops):.3f}")
    print(objective_line(a, c.fit.objective))
    return OK
