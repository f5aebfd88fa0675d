"""`scaling report RUNS --out DIR`: fits, comparison, figures and verdict in one folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scaling.commands.arguments import (
    fit_arguments,
    new_verb,
    price_arguments,
    prices_of,
    read_table,
    share_argument,
    shared,
    table_arguments,
)
from scaling.commands.output import OK, exit_code
from scaling.tables.curves import sweep_curves
from scaling.tables.runs import Runs


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "report", run, "fits, comparison, figures and verdict in one folder")
    table_arguments(verb)
    fit_arguments(verb)
    verb.add_argument("--out", type=Path, required=True, help="folder to write into")
    verb.add_argument("--title", default="Loss against compute")
    verb.add_argument("--baseline", help="family that the others are compared with")
    share_argument(verb)
    price_arguments(verb)


def run(a: argparse.Namespace) -> int:
    options = {"share": shared(a), "baseline": a.baseline, "title": a.title, "prices": prices_of(a)}
    return full_report(a, read_table(a), **options)


def full_report(a: argparse.Namespace, runs: Runs, gate: bool = False, **options: Any) -> int:
    """Writes the report folder; `fit` and `compare` answer with their gates, `report` prints them as verdicts."""
    from scaling.report.write import write_report

    settings = {"law": a.law, "objective": a.objective, "delta": a.delta, "draws": a.draws, "seed": a.seed}
    report = write_report(runs, a.out, curves=sweep_curves(a.runs), provenance={}, **settings, **options)
    if a.json:
        print((a.out / "fit.json").read_text(), end="")
    else:
        print(report.terminal_summary())
        print(f"\n{a.out / 'report.html'}")
    return exit_code(report.gates) if gate else OK
