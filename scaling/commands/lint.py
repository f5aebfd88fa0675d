"""`scaling lint RUNS`: faults of the table and the design."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from scaling.commands.arguments import new_verb, read_table, table_arguments
from scaling.commands.output import OK, print_json
from scaling.lint import lint


def add(verbs: Any) -> None:
    table_arguments(new_verb(verbs, "lint", run, "faults of the table and the design, with row ids"))


def run(a: argparse.Namespace) -> int:
    findings = lint(read_table(a, allow_midrun=True))
    if a.json:
        print_json([asdict(f) for f in findings])
        return OK
    for finding in findings:
        rows = f" [{finding.listed()}]" if finding.rows else ""
        print(f"{finding.severity} {finding.name}: {finding.message}{rows}")
    print("no faults found" if not findings else f"{len(findings)} finding(s)")
    return OK
