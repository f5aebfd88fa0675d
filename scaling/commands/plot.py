"""`scaling plot RUNS --out FILE`: end points and whole curves."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.commands.arguments import new_verb, path_here, read_table, table_arguments
from scaling.commands.output import OK, print_json
from scaling.tables.curves import sweep_curves
from scaling.tables.runs import ScalingError


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "plot", run, "draw end points and whole curves")
    table_arguments(verb)
    verb.add_argument("--x", default="flops", choices=("flops", "D", "N"))
    verb.add_argument("--out", type=path_here, required=True, help="PNG, SVG or PDF file")


def run(a: argparse.Namespace) -> int:
    from scaling.report.figures import runs_chart
    from scaling.report.plot import drawn, save

    if a.out.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise ScalingError(f"--out {a.out} must end in .png, .svg or .pdf")
    runs = read_table(a, allow_midrun=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    save(drawn(runs_chart(runs, a.x, sweep_curves(a.runs))), a.out)
    if a.json:
        print_json({"file": str(a.out), "x": a.x, "runs": {f: len(runs.family(f)) for f in runs.families}})
    else:
        print(a.out)
    return OK
