"""`scaling fit RUNS`: a law to every family."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.commands.arguments import delta_of, fit_arguments, new_verb, out_argument, read_table, table_arguments
from scaling.commands.output import exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.fitting.fit import Fit, fit, ladder_gate
from scaling.report.artefact import family_json
from scaling.uncertainty.bootstrap import Draws, bootstrap


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "fit", run, "fit a law to every family")
    table_arguments(verb)
    fit_arguments(verb)
    out_argument(verb)


def run(a: argparse.Namespace) -> int:
    runs = read_table(a)
    if a.out:
        return full_report(a, runs, share=("E",), gate=True)
    results: dict[str, tuple[Fit, Draws]] = {}
    for family in runs.families:
        fitted = fit(runs.family(family), a.law, a.objective, delta_of(a, runs), seed=a.seed)
        results[family] = fitted, bootstrap(fitted, a.draws, a.seed)
    gates = [g for f, _ in results.values() for g in f.gates] + [ladder_gate(runs, f) for f in runs.families]
    if a.json:
        families = {name: family_json(*pair) for name, pair in results.items()}
        print_json({"families": families, "notes": list(runs.notes)})
        return exit_code(gates)
    for family, (fitted, draws) in results.items():
        print_fit(family, fitted, draws)
    print_gates(gates)
    return exit_code(gates)


def print_fit(family: str, fitted: Fit, draws: Draws) -> None:
    c, ends = fitted.certificate, draws.intervals()
    rows = len(fitted.runs)
    print(f"{family}: {fitted.law.name}, {fitted.objective.name}, {rows} rows, {draws.clusters[0]} clusters")
    for name, value in fitted.params.items():
        print(f"  {name:<6} {value:<12.6g} 95 % {ends[name][0]:.5g} to {ends[name][1]:.5g}  ({draws.method} bootstrap)")
    gap = f"second solver {c.second_solver_gap:+.0e}"
    print(f"  {c.agreeing} of {c.starts} starts agree, gradient {c.gradient:.0e}, {gap}")
