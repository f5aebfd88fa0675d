"""`scaling fit RUNS`: a law to every family."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.analysis import Analysis
from scaling.commands.arguments import new_verb, out_argument, read_table, spec_arguments, spec_of, table_arguments
from scaling.commands.output import exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.fitting.replicates import lack_of_fit
from scaling.fitting.sensitivity import objective_text
from scaling.report.artefact import family_json
from scaling.report.words import rounded


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "fit", run, "fit a law to every family")
    table_arguments(verb)
    spec_arguments(verb)
    out_argument(verb)


def run(a: argparse.Namespace) -> int:
    found = Analysis.of(read_table(a), spec_of(a))
    if a.out:
        return full_report(a, found, gate=True)
    if a.json:
        families = {f: family_json(found, f) for f in found.families}
        print_json({"families": families, "notes": list(found.runs.notes), "gates": found.gates})
        return exit_code(found.gates)
    for family in found.families:
        print_fit(found, family)
    for note in found.runs.notes:
        print(f"note: {note}")
    print_gates(found.gates)
    return exit_code(found.gates)


def print_fit(found: Analysis, family: str) -> None:
    """Parameters with their intervals, lack of fit where runs repeat, certificate."""
    fitted, c = found.fits[family], found.fits[family].certificate
    goal = objective_text(fitted.objective, found.spec.delta is None)
    print(f"{family}: {fitted.law.name}, {len(fitted.runs)} rows; best single fit by {goal}")
    print(f"  {'':<8}{'best fit':<13}ensemble, 95 %")
    for p in found.own[family].parameters(family):
        told = "" if p.identified else "  not told by the runs: the interval is what was assumed before them"
        print(f"  {p.name:<8}{fitted.params[p.name]:<13.6g}{rounded(p.value, p.low, p.high)}{told}")
    error = lack_of_fit(fitted)
    if error:
        print(f"  {error.sentence()}")
    gap = f"second solver {c.second_solver_gap:+.0e}"
    print(f"  {c.agreeing} of {c.starts} starts agree, gradient {c.gradient:.0e}, {gap}")
