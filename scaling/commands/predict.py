"""`scaling predict REPORT --N --D`: the loss of a run that has not been made, by the analysis of a report's folder."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaling.commands.arguments import accuracy_argument, new_verb, positive
from scaling.commands.output import OK, plain, print_json
from scaling.ensemble.answers import Prediction
from scaling.report.artefact import read_analysis, read_fit_json
from scaling.report.ledger import FILE, holds_cell, made_of, read_ledger, record, write_ledger
from scaling.report.words import WIDE, accuracy_lines, reach_sentence, rounded
from scaling.tables.runs import ScalingError


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "predict", run, "loss at given N and D, from a report's folder")
    verb.add_argument("artefact", type=Path)
    verb.add_argument("--N", type=positive, required=True, help="parameters")
    verb.add_argument("--D", type=positive, required=True, help="training tokens")
    verb.add_argument("--C", type=positive, help="training FLOP, for laws in compute")
    verb.add_argument("--U", type=positive, help="unique tokens among them, for laws of repeated data")
    verb.add_argument("--precision", help="of the weights (bf16, int8, ternary ...), for laws of number formats")
    verb.add_argument("--sparsity", type=float, help="share of weights or experts that are idle, for laws of sparsity")
    verb.add_argument("--annealing", type=float, help="share of it that has taken effect, for the law annealed")
    verb.add_argument("--family", help="one family; all of them without it")
    accuracy_argument(verb)


def run(a: argparse.Namespace) -> int:
    folder = a.artefact if a.artefact.is_dir() else a.artefact.parent
    found, table = read_analysis(folder), read_fit_json(a.artefact)["table"]
    names = [a.family] if a.family else list(found.families)
    if names[0] not in found.families:
        raise ScalingError(f"the report has no family {names[0]!r}; it has {', '.join(found.families)}")
    law = found.ensemble(names[0]).law
    if a.C and "C" not in law.inputs:
        raise ScalingError(f"--C: the prediction of law {law.name!r} does not depend on it")
    known = {"flops": a.C, "U": a.U, "precision": a.precision, "sparsity": a.sparsity, "annealing": a.annealing}
    out = {name: found.ensemble(name).predict(a.N, a.D, name, **known) for name in names}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = [made_of(p, now, table) for name, p in out.items() if not holds_cell(found.runs, name, a.N, a.D)]
    write_ledger(folder, record(read_ledger(folder), new))
    tasks = {name: [found.ensemble(name).accuracy(c, name) for c in a.accuracy] for name in names}
    right = {name: [task.predict(a.N, a.D, **known) for task in tasks[name]] for name in names}
    if a.json:
        print_json({n: plain(p) | ({"accuracy": plain(right[n])} if a.accuracy else {}) for n, p in out.items()})
        return OK
    for name, p in out.items():
        print("\n".join(lines(p, found.runs.loss_label, reach_sentence(found.ensemble(name)))))
        for task, answer in zip(tasks[name], right[name], strict=True):
            print("\n".join(accuracy_lines(answer, task)))
    if new:
        print(f"recorded in {folder / FILE}, to be scored when the run is in a report's table")
    return OK


def lines(p: Prediction, unit: str, reach: str) -> list[str]:
    """A forecast in words."""
    where = f"{p.decades:.1f} decades beyond the largest run" if p.decades > 0 else "within the runs"
    out = [
        f"{p.family}: {rounded(p.loss, p.low, p.high)} {unit} (95 %), {where}",
        f"  a new run there: {rounded(p.loss, p.run_low, p.run_high)} (95 %)",
    ]
    out += [f"  {WIDE}"] * (not p.informative)
    return out + [f"  {reach}"] * (not p.validated)
