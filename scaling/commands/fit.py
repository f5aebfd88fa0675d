"""`scaling fit RUNS`: a law to every family."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from scaling.commands.arguments import delta_of, fit_arguments, new_verb, out_argument, read_table, table_arguments
from scaling.commands.output import exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.fitting.fit import fit, ladder_gate
from scaling.lint import lint_gates
from scaling.report.artefact import family_json
from scaling.tables.runs import Runs, ScalingError
from scaling.uncertainty.bootstrap import Draws, bootstrap
from scaling.uncertainty.profile import SIMULATIONS, Intervals, profile_intervals
from scaling.uncertainty.replicates import lack_of_fit
from scaling.uncertainty.selection import CHOICES, chosen, fit_chosen
from scaling.uncertainty.sensitivity import objective_text
from scaling.verdict.compare import spread_gate


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "fit", run, "fit a law to every family")
    table_arguments(verb)
    fit_arguments(verb)
    out_argument(verb)
    text = "rows to fit: all, the best learning rate of each cell, or the envelope; chosen anew in every draw"
    verb.add_argument("--select", default="all", choices=CHOICES, help=text)


def run(a: argparse.Namespace) -> int:
    runs = read_table(a)
    if a.out and a.select != "all":
        raise ScalingError("--select answers on the terminal or as --json; --out writes the report of a whole table")
    if a.out:
        return full_report(a, runs, gate=True)
    delta = delta_of(a, runs.select(chosen(runs, a.select, runs["loss"][None])[0]))
    sampled = {family: draws_of(a, runs.family(family), delta) for family in runs.families}
    profiles = {family: profiles_of(a, draws) for family, draws in sampled.items()}
    gates = [g for f, d in sampled.items() for g in (*d.fit.gates, spread_gate(d, f, f), ladder_gate(runs, f))]
    gates += lint_gates(runs)
    if a.json:
        families = {f: family_json(d.fit, d, profiles=profiles[f]) for f, d in sampled.items()}
        print_json({"families": families, "notes": list(runs.notes)})
        return exit_code(gates)
    for family, draws in sampled.items():
        print_fit(family, draws, profiles[family], objective_text(draws.fit.objective, a.delta is None))
    for note in runs.notes:
        print(f"note: {note}")
    print_gates(gates)
    return exit_code(gates)


def draws_of(a: argparse.Namespace, part: Runs, delta: float) -> Draws:
    """One family's fit, to the rows asked for, and its bootstrap."""
    if a.select == "all":
        return bootstrap(fit(part, a.law, a.objective, delta, seed=a.seed), a.draws, a.seed)
    return fit_chosen(part, a.select, a.draws, a.seed, a.law, a.objective, delta)


def profiles_of(a: argparse.Namespace, draws: Draws) -> Intervals:
    """Likelihood intervals; none where rows were chosen by their losses, of whose luck the likelihood knows nothing."""
    if a.select != "all":
        return dict.fromkeys(draws.fit.law.names)
    return profile_intervals(draws, min(SIMULATIONS, a.draws), a.seed)


def print_fit(family: str, draws: Draws, profiles: Intervals, objective: str) -> None:
    """Parameters with both intervals, lack of fit where runs repeat, certificate."""
    fitted = draws.fit
    c, ends = fitted.certificate, draws.intervals()
    print(f"{family}: {fitted.law.name}, {objective}, {len(fitted.runs)} rows, {draws.clusters[0]} clusters")
    print(f"  {'':<8}{'fit':<13}{f'95 % by {draws.method} bootstrap':<34}95 % by profile likelihood")
    for name, value in fitted.params.items():
        print(f"  {name:<8}{value:<13.6g}{span(ends[name]):<31}{span(profiles[name])}")
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
