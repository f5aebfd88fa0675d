"""`scaling fit RUNS`: a law to every family."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from scaling.commands.arguments import delta_of, fit_arguments, new_verb, out_argument, read_table, table_arguments
from scaling.commands.output import exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.fitting.fit import Fit, fit, ladder_gate
from scaling.report.artefact import family_json
from scaling.uncertainty.bootstrap import Draws, bootstrap
from scaling.uncertainty.profile import SIMULATIONS, Intervals, profile_intervals
from scaling.uncertainty.replicates import lack_of_fit


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
    profiles = {f: profile_intervals(d, min(SIMULATIONS, a.draws), a.seed) for f, (_, d) in results.items()}
    gates = [g for f, _ in results.values() for g in f.gates] + [ladder_gate(runs, f) for f in runs.families]
    if a.json:
        families = {name: family_json(*pair, profiles=profiles[name]) for name, pair in results.items()}
        print_json({"families": families, "notes": list(runs.notes)})
        return exit_code(gates)
    for family, (fitted, draws) in results.items():
        print_fit(family, fitted, draws, profiles[family])
    print_gates(gates)
    return exit_code(gates)


def print_fit(family: str, fitted: Fit, draws: Draws, profiles: Intervals) -> None:
    """Parameters with both intervals, lack of fit where runs repeat, certificate."""
    c, ends = fitted.certificate, draws.intervals()
    print(
        f"{family}: {fitted.law.name}, {fitted.objective.name}, {len(fitted.runs)} rows, {draws.clusters[0]} clusters"
    )
    print(f"  {'':<8}{'fit':<13}{f'95 % by {draws.method} bootstrap':<29}95 % by profile likelihood")
    for name, value in fitted.params.items():
        print(f"  {name:<8}{value:<13.6g}{span(ends[name]):<29}{span(profiles[name])}")
    error = lack_of_fit(fitted)
    if error:
        print(f"  {error.sentence()}")
    gap = f"second solver {c.second_solver_gap:+.0e}"
    print(f"  {c.agreeing} of {c.starts} starts agree, gradient {c.gradient:.0e}, {gap}")


def span(ends: tuple[float, float] | None) -> str:
    """An interval in words; open ends are said to be open."""
    if ends is None:
        return "–"
    low, high = ("open" if np.isinf(end) else f"{end:.5g}" for end in ends)
    return f"{low} to {high}"
