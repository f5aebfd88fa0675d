"""`scaling predict FIT --N --D`: the loss of a run that has not been made."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaling.commands.arguments import new_verb, positive
from scaling.commands.output import OK, print_json
from scaling.laws.base import Law
from scaling.laws.forms import law_named
from scaling.report.artefact import read_draws, read_fit_json
from scaling.report.forecast import Forecaster, Prediction
from scaling.report.ledger import FILE, holds_cell, made_of, read_ledger, record, write_ledger
from scaling.tables.runs import NATS, NATS_PER_TOKEN, Runs, ScalingError


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "predict", run, "loss at given N and D from a fit.json or its folder")
    verb.add_argument("artefact", type=Path)
    verb.add_argument("--N", type=positive, required=True, help="parameters")
    verb.add_argument("--D", type=positive, required=True, help="training tokens")
    verb.add_argument("--C", type=positive, help="training FLOP, for laws in compute")
    verb.add_argument("--U", type=positive, help="unique tokens among them, for the law data-constrained")
    verb.add_argument("--precision", default="", help="of the weights (bf16, int8, ternary ...), for the law precision")
    verb.add_argument("--family", help="one family; all of them without it")


def run(a: argparse.Namespace) -> int:
    data, draws = read_fit_json(a.artefact), read_draws(a.artefact)
    names = [a.family] if a.family else list(data["families"])
    unknown = [name for name in names if name not in data["families"]]
    if unknown:
        raise ScalingError(f"fit.json has no family {unknown[0]!r}; it has {', '.join(data['families'])}")
    for name in names:
        check_told(law_named(data["families"][name]["law"]), a)
    known = {"flops": a.C, "unique": a.U, "precision": a.precision}
    out = {name: Forecaster.of(data["families"][name], draws[name]).at(a.N, a.D, **known) for name in names}
    folder = a.artefact if a.artefact.is_dir() else a.artefact.parent
    recorded = remember(folder, data["table"], out, a.N, a.D)
    if a.json:
        print_json({name: asdict(p) for name, p in out.items()})
        return OK
    for name, p in out.items():
        within = p.extrapolation <= 1
        beyond = "within the fitted range" if within else f"{p.extrapolation:.3g} times the largest fitted compute"
        print(f"{name}: {p.loss:.4f} {loss_label(data['families'][name])}, 95 % {p.low:.4f} to {p.high:.4f}; {beyond}")
        widened = f", widened {p.factor:.2f} times by the back-test" if p.factor > 1 else ""
        print(f"  a new run there: 95 % {p.run_low:.4f} to {p.run_high:.4f}{widened}")
        if not within:
            print(f"  {data['families'][name]['calibration_evidence']}")
    if recorded:
        print(f"recorded in {folder / FILE}, to be scored when the run is in a report's table")
    return OK


def loss_label(entry: Mapping[str, Any]) -> str:
    """Unit of a stored fit's losses; fits from before it was stored are in nats."""
    unit = entry.get("loss_unit", NATS)
    return NATS_PER_TOKEN if unit == NATS else unit


def check_told(law: Law, a: argparse.Namespace) -> None:
    """Refuses to be told what the law does not depend on, which would change nothing."""
    uses = {"--C": "C" in law.inputs, "--U": law.beside == "U", "--precision": law.beside == "precision"}
    for flag, value in {"--C": a.C, "--U": a.U, "--precision": a.precision}.items():
        if value and not uses[flag]:
            raise ScalingError(f"{flag}: the prediction of law {law.name!r} does not depend on it")


def remember(folder: Path, table: str, found: Mapping[str, Prediction], n: float, d: float) -> bool:
    """Adds the forecasts of runs that do not exist yet to the ledger beside the fit; whether there were any."""
    runs = Runs.read(folder / "runs.csv", allow_midrun=True)  # whoever wrote the report has accepted them
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = [made_of(p, now, table, family, n, d) for family, p in found.items() if not holds_cell(runs, family, n, d)]
    write_ledger(folder, record(read_ledger(folder), new))
    return bool(new)
