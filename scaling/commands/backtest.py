"""`scaling backtest RUNS`: what cheaper runs would have said about dearer ones."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from scaling.analysis import Analysis
from scaling.commands.arguments import new_verb, read_table, spec_arguments, spec_of, table_arguments
from scaling.commands.output import GATE, OK, print_json
from scaling.ensemble.backtest import DIFFERENCE, DISTANCES, LOSS
from scaling.report.words import backtest_sentence


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "backtest", run, "analyse the cheap runs, forecast the dear ones")
    table_arguments(verb)
    spec_arguments(verb)


def run(a: argparse.Namespace) -> int:
    """Gate: no origin leaves enough runs to analyse."""
    found = Analysis.of(read_table(a), spec_of(a))
    ensembles = found.pairs or (found.own[found.families[0]],)
    if a.json:
        print_json({" and ".join(e.families): {"reach": e.reach} | vars(e.test) for e in ensembles})
        return OK if all(e.test.points for e in ensembles) else GATE
    for e in ensembles:
        print(f"{' and '.join(e.families)}: {backtest_sentence(e)}")
        for kind in (LOSS, DIFFERENCE):
            for low, high in itertools.pairwise((0.0, *DISTANCES)):
                near = [p.inside for p in e.test.of(kind) if low < p.decades <= high]
                if near:
                    print(f"  {kind}, {low:g} to {high:g} decades beyond: {sum(near)} of {len(near)} inside")
        print("\n".join(f"  left out: {reason}" for reason in e.test.skipped))
    return OK if all(e.test.points for e in ensembles) else GATE
