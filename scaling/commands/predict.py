"""`scaling predict FIT --N --D`: the loss of a run that has not been made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from scaling.commands.arguments import new_verb, positive
from scaling.commands.output import OK, print_json
from scaling.laws.forms import law_named
from scaling.report.artefact import read_draws, read_fit_json
from scaling.tables.runs import ScalingError
from scaling.uncertainty.bootstrap import interval


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "predict", run, "loss at given N and D from a fit.json or its folder")
    verb.add_argument("artefact", type=Path)
    verb.add_argument("--N", type=positive, required=True, help="parameters")
    verb.add_argument("--D", type=positive, required=True, help="training tokens")
    verb.add_argument("--family", help="one family; all of them without it")


def run(a: argparse.Namespace) -> int:
    data, draws = read_fit_json(a.artefact), read_draws(a.artefact)
    names = [a.family] if a.family else list(data["families"])
    out = {}
    for name in names:
        if name not in data["families"]:
            raise ScalingError(f"fit.json has no family {name!r}; it has {', '.join(data['families'])}")
        entry = data["families"][name]
        out[name] = predict_entry(entry, draws[name], a.N, a.D)
    if a.json:
        print_json(out)
        return OK
    for name, result in out.items():
        ratio = result["extrapolation"]
        beyond = "within the fitted range" if ratio <= 1 else f"{ratio:.3g} times the largest fitted compute"
        print(
            f"{name}: {result['loss']:.4f} nats per token, 95 % {result['low']:.4f} to {result['high']:.4f}; {beyond}"
        )
    return OK


def predict_entry(entry: dict[str, Any], draws: np.ndarray, n: float, d: float) -> dict[str, float]:
    """Prediction of one family's entry of a fit.json, with the interval of its stored draws."""
    law, centre = law_named(entry["law"]), np.array(entry["centre"])
    features = law.features_at(np.log([n]), np.log([d]), centre)
    loss = np.exp(law.value(np.array([entry["theta"]]), features))[0, 0]
    low, high = interval(np.exp(law.value(draws, features))[:, 0])
    ratio = 6 * n * d / entry["largest_flops_6nd"]
    return {"loss": float(loss), "low": low, "high": high, "extrapolation": float(ratio)}
