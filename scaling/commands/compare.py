"""`scaling compare RUNS` and `scaling crossover RUNS`: two families against each other."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.analysis import Analysis
from scaling.commands.arguments import (
    axis_arguments,
    new_verb,
    out_argument,
    pair_arguments,
    pair_of,
    read_table,
    spec_arguments,
    spec_of,
    table_arguments,
)
from scaling.commands.output import OK, exit_code, print_gates, print_json
from scaling.commands.report import full_report
from scaling.report.artefact import pair_json
from scaling.report.words import crossing_sentence, difference_sentence, verdict


def add(verbs: Any) -> None:
    for name, run, text in (
        ("compare", run_compare, "compare two families: difference, crossing, verdict"),
        ("crossover", run_crossover, "from which compute on one family leads"),
    ):
        verb = new_verb(verbs, name, run, text)
        table_arguments(verb)
        spec_arguments(verb)
        pair_arguments(verb)
        axis_arguments(verb)
        if name == "compare":
            out_argument(verb)


def analysed(a: argparse.Namespace) -> Analysis:
    """The pair that the flags ask for."""
    runs = read_table(a)
    return Analysis.of(runs, spec_of(a), pair_of(a, runs))


def run_compare(a: argparse.Namespace) -> int:
    if a.out:
        found = analysed(a) if a.b else Analysis.of(read_table(a), spec_of(a))
        return full_report(a, found, gate=True)
    found = analysed(a)
    (pair,) = found.pairs
    if a.json:
        answers = [pair.difference(budget, a.axis, a.along) for budget in a.at]
        print_json(pair_json(pair, a.axis, a.along) | {"at": answers, "gates": found.gates})
        return exit_code(found.gates)
    print("\n".join(verdict(pair, found.failed)))
    if a.axis != "flops" or a.along != "optimal":
        print(crossing_sentence(pair, pair.crossing(a.axis, a.along), path_of(a), a.axis))
    for budget in a.at:
        d = pair.difference(budget, a.axis, a.along)
        print(difference_sentence(pair, d, f"At {budget:.1e} {d.unit}"))
    print_gates(found.gates)
    return exit_code(found.gates)


def run_crossover(a: argparse.Namespace) -> int:
    found = analysed(a)
    (pair,) = found.pairs
    answers = {name: e.crossing(a.axis, a.along) for name, e in (("tied", pair.tied), ("untied", pair.untied))}
    said = pair.crossing(a.axis, a.along)
    if a.json:
        print_json({"crossing": said} | answers | {"measured": pair.measured(a.axis), "reach": pair.reach})
        return OK
    print(crossing_sentence(pair, said, "" if a.along == "optimal" else path_of(a), a.axis))
    for name, answer in answers.items():
        print(f"  {name}: {crossing_sentence(pair, answer, axis=a.axis)}")
    return OK


def path_of(a: argparse.Namespace) -> str:
    """How the sizes and tokens that are compared were chosen, in words."""
    return "Best allocation" if a.along == "optimal" else f"Along {a.along}"
