"""`scaling compare RUNS` and `scaling crossover RUNS`: two families against each other."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np

from scaling.commands.arguments import (
    assignments,
    delta_of,
    fit_arguments,
    new_verb,
    out_argument,
    pair_arguments,
    positive_setting,
    read_table,
    shared,
    table_arguments,
)
from scaling.commands.output import OK, exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.report.artefact import comparison_json
from scaling.tables.runs import ScalingError
from scaling.verdict.compare import Comparison, break_even, compare, headline


def add(verbs: Any) -> None:
    for name, run, text in (
        ("compare", run_compare, "compare two families: difference, crossover, verdict"),
        ("crossover", run_crossover, "where B overtakes A, with its interval"),
    ):
        verb = new_verb(verbs, name, run, text)
        table_arguments(verb)
        fit_arguments(verb)
        pair_arguments(verb)
        if name == "compare":
            out_argument(verb)


def comparison(a: argparse.Namespace) -> Comparison:
    """The comparison that the flags ask for."""
    runs = read_table(a)
    names = runs.families
    first = a.a or names[0]
    rest = [name for name in names if name != first]
    if not a.b and not rest:
        raise ScalingError(f"the table holds one family, {names[0]!r}; a comparison needs two")
    energy = {name: positive_setting(value, "--energy") for name, value in assignments(a.energy, "--energy").items()}
    options = {"law": a.law, "objective": a.objective, "delta": delta_of(a, runs), "horizon": a.horizon}
    axes = {"axis": a.axis, "along": a.along, "energy": energy, "usd_per_hour": a.usd_per_hour}
    return compare(runs, first, a.b or rest[0], shared(a), a.draws, a.seed, **options, **axes)


def run_compare(a: argparse.Namespace) -> int:
    if a.out:
        runs = read_table(a)
        return full_report(a, runs, share=shared(a), baseline=a.a, gate=True)
    c = comparison(a)
    if a.json:
        print_json(comparison_json(c) | {"gates": [asdict(g) for g in c.gates]})
        return exit_code(c.gates)
    print("\n".join(c.verdict))
    if c.axis == "flops" and c.along == "optimal":
        print(break_even(c, c.measured[1]).sentence(c.a, c.b))
    print_gates(c.gates)
    return exit_code(c.gates)


def run_crossover(a: argparse.Namespace) -> int:
    c = comparison(a)
    if a.json:
        print_json(comparison_json(c)["crossover"])
        return OK
    x = c.crossover
    print(c.verdict[0] if any(not g.passed for g in c.gates if g.name.startswith("ladder")) else headline(c))
    print(f"share of draws in which the order never changes before {x.horizon:.1e} {c.unit}: {x.p_none:.3f}")
    for flops in 10.0 ** np.arange(np.ceil(np.log10(c.measured[0])), np.log10(x.horizon) + 1e-9):
        print(f"  P({c.b} leads for good by {flops:.0e} {c.unit}) = {x.p_before(flops):.3f}")
    return OK
