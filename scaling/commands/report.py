"""`scaling report RUNS --out DIR`: fits, comparison, figures and verdict in one folder."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.analysis import Analysis
from scaling.commands.arguments import new_verb, path_here, read_table, spec_arguments, spec_of, table_arguments
from scaling.commands.output import OK, exit_code
from scaling.tables.curves import sweep_curves


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "report", run, "fits, comparison, figures and verdict in one folder")
    table_arguments(verb)
    spec_arguments(verb)
    verb.add_argument("--out", type=path_here, required=True, help="folder to write into")
    verb.add_argument("--title", default="", help="of the page (default: the families)")


def run(a: argparse.Namespace) -> int:
    return full_report(a, Analysis.of(read_table(a), spec_of(a)), title=a.title)


def full_report(a: argparse.Namespace, found: Analysis, gate: bool = False, **options: Any) -> int:
    """Writes the report folder; `fit` and `compare` answer with their gates, `report` prints them as verdicts."""
    from scaling.report.write import write_report

    report = write_report(found, a.out, curves=sweep_curves(a.runs), **options)
    if a.json:
        print((a.out / "fit.json").read_text(), end="")
    else:
        print(report.terminal_summary())
        print(f"\n{a.out / 'report.html'}")
    return exit_code(found.gates) if gate else OK
