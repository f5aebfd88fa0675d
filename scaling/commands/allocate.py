"""`scaling allocate RUNS --C 1e21`: the best model size and token budget for an amount of compute."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from scaling.analysis import Analysis
from scaling.commands.arguments import (
    accuracy_argument,
    new_verb,
    positive,
    read_table,
    spec_arguments,
    spec_of,
    table_arguments,
)
from scaling.commands.output import exit_code, plain, print_gates, print_json
from scaling.ensemble.answers import Allocation
from scaling.fitting.approaches import envelope_exponent, isoflop
from scaling.report.words import accuracy_lines, reach_sentence, rounded

ABSENT = "–"


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "allocate", run, "the best model size and token budget for an amount of compute")
    table_arguments(verb)
    spec_arguments(verb)
    verb.add_argument("--C", type=positive, action="append", required=True, metavar="FLOP", help="may be repeated")
    text = "tokens that the model will be asked for, out of the same budget at 2 N FLOP each"
    verb.add_argument("--serve-tokens", type=positive, default=0.0, help=text)
    accuracy_argument(verb)


def run(a: argparse.Namespace) -> int:
    """Every family by itself: what a family should be trained with does not depend on the others."""
    found = Analysis.of(read_table(a), spec_of(a))
    out = {f: [found.own[f].allocate(flops, f, a.serve_tokens) for flops in a.C] for f in found.families}
    tasks = {f: [found.own[f].accuracy(column, f) for column in a.accuracy] for f in found.families}
    right = {f: [[task.at(flops, a.serve_tokens) for task in tasks[f]] for flops in a.C] for f in found.families}
    if a.json:
        more = {f: [{"accuracy": plain(x)} if x else {} for x in right[f]] for f in out}
        print_json({f: [plain(x) | y for x, y in zip(out[f], more[f], strict=True)] for f in out})
        return exit_code(found.gates)
    for family, answers in out.items():
        for x, answered in zip(answers, right[family], strict=True):
            print(line(x))
            if not x.validated:
                print(f"  {reach_sentence(found.own[family])}")
            for task, answer in zip(tasks[family], answered, strict=True):
                print("\n".join(accuracy_lines(answer, task)))
        print(exponents(found, family))
    print_gates(found.gates)
    return exit_code(found.gates)


def line(x: Allocation) -> str:
    """One family's allocation."""
    n, d, r = (
        "{:.3g} ({:.3g} to {:.3g})".format(v, *ends)
        for v, ends in ((x.N, x.N_interval), (x.D, x.D_interval), (x.ratio, x.ratio_interval))
    )
    where = "within the runs" if x.decades <= 0 else f"{x.decades:.1f} decades beyond the largest run"
    loss = rounded(x.loss, *x.loss_interval)
    return f"{x.family} at {x.flops:.3g} FLOP ({where}): N* {n}, D* {d}, D*/N* {r}, loss {loss}"


def exponents(found: Analysis, family: str) -> str:
    """The exponent of N* in compute by three approaches (Hoffmann et al. 2022); the first two only for comparison."""
    runs = found.runs.family(family)
    value, low, high = found.own[family].exponent(family)
    text = f"{family}: N* goes as C^a, a = {rounded(value, low, high)} by the laws"
    others = (envelope_exponent(runs), isoflop(runs).exponent_n)
    shown = "envelope {}, IsoFLOP {}".format(*(ABSENT if np.isnan(x) else f"{x:.3f}" for x in others))
    return f"{text}; {shown}"
