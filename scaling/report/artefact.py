"""What a report leaves for machines: `fit.json` in full precision, and the analysis read back from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.analysis import Analysis
from scaling.commands.output import plain
from scaling.costs import Prices
from scaling.ensemble.ensemble import Ensemble
from scaling.fitting.fit import Fit
from scaling.fitting.replicates import lack_of_fit
from scaling.report.ledger import Forecast, digest_of, scores
from scaling.report.words import pairs_verdict, verdict
from scaling.spec import Spec
from scaling.tables.runs import Runs, ScalingError

SCHEMA = 3


def fit_json(found: Analysis, ledger: Sequence[Forecast], provenance: dict[str, Any]) -> dict[str, Any]:
    """The verdict, then parameters, intervals and certificates, with everything they rest on."""
    return plain(
        {
            "schema": SCHEMA,
            "verdict": report_verdict(found),
            "table": digest_of(found.runs),
            "spec": spec_json(found.spec),
            "families": {f: family_json(found, f) for f in found.families},
            "comparisons": [pair_json(pair) for pair in found.pairs],
            "forecasts_scored": [asdict(f) | scores(f) for f in ledger if f.scored],
            "gates": found.gates,
            "provenance": provenance,
        }
    )


def report_verdict(found: Analysis) -> list[str]:
    """The verdict of all pairs, or of a lone family."""
    if found.pairs:
        return pairs_verdict(found.pairs, found.failed)
    return verdict(found.own[found.families[0]], found.failed)


def spec_json(spec: Spec) -> dict[str, Any]:
    """The choices, from which `read_analysis` makes the same analysis again."""
    out = asdict(spec)
    prices = {name: energy.picojoules for name, energy in spec.prices.energies.items()}
    return out | {"prices": {"picojoules": prices, "usd_per_hour": spec.prices.usd_per_hour}}


def family_json(found: Analysis, family: str) -> dict[str, Any]:
    """One family: its best fit, and what its own ensemble says of the parameters."""
    fitted, ensemble = found.fits[family], found.own[family]
    parameters = ensemble.parameters(family)
    error = lack_of_fit(fitted)
    return plain(
        {
            "law": fitted.law.name,
            "parameters": fitted.family_params(family),
            "intervals": {p.name: [p.low, p.high] for p in parameters},
            "identified": {p.name: p.identified for p in parameters},
            "noise": noise_json(ensemble),
            "lack_of_fit": error,
            "objective": objective_json(fitted),
            "certificate": fitted.certificate,
            "rows": len(fitted.runs),
            "loss_unit": fitted.runs.loss_unit,
            "reach_decades": ensemble.reach,
        }
    )


def noise_json(e: Ensemble) -> dict[str, list[float]]:
    """Median and 95 % of the standard deviations on log loss, and of the misfit's length in decades."""
    names = ("run", "trunk", "cell", "misfit", "misfit_decades", "misfit_common", "drift")
    return {n: np.quantile(e.draws.h[:, k], [0.025, 0.5, 0.975]).tolist() for k, n in enumerate(names)}


def objective_json(fitted: Fit) -> dict[str, Any]:
    return {
        "name": fitted.objective.name,
        "delta": fitted.objective.delta,
        "residual": "log loss" if fitted.objective.log else "loss",
    }


def pair_json(e: Ensemble, axis: str = "flops", along: str = "optimal") -> dict[str, Any]:
    """A pair: crossing, difference along budgets, ties, efficiency, back-test."""
    top = e.measured(axis)[1]
    ahead = {"measured": top, "one decade beyond": 10 * top}
    return plain(
        {
            "verdict": verdict(e),
            "a": e.a,
            "b": e.b,
            "axis": axis,
            "along": along,
            "measured": e.measured(axis),
            "reach_decades": e.reach,
            "crossing": {"headline": e.crossing(axis, along)}
            | {name: x.crossing(axis, along) for name, x in (("tied", e.tied), ("untied", e.untied))},
            "difference": e.table(axis),
            "at": {where: e.difference(c, axis, along) for where, c in ahead.items()},
            "at_untied": {where: e.untied.difference(c, axis, along) for where, c in ahead.items()},
            "ties": {", ".join(tie) or "nothing": weight for tie, weight in e.tie_weights.items()},
            "equal_floors": e.equal_floors,
            "efficiency": e.efficiency() if e.law.has_allocation else None,
            "break_even": e.break_even(e.measured()[1]),
            "noise": noise_json(e),
            "backtest": {"points": e.test.points, "skipped": e.test.skipped, "coverage": e.test.coverage()},
        }
    )


def read_fit_json(path: Path) -> dict[str, Any]:
    """A `fit.json`, or that of a report directory; raises ScalingError."""
    path = path / "fit.json" if path.is_dir() else path
    if not path.is_file():
        raise ScalingError(f"no fit.json at {path}")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ScalingError(f"{path} is not a fit.json: {error}") from error
    if not isinstance(data, dict) or "families" not in data:
        raise ScalingError(f"{path} is not a fit.json: it has no 'families'")
    if data.get("schema") != SCHEMA or "spec" not in data:
        raise ScalingError(f"{path} was written by another version: write the report again")
    return data


def read_analysis(folder: Path) -> Analysis:
    """The analysis behind a report's folder, made again from its runs.csv by its own spec; raises ScalingError."""
    data = read_fit_json(folder)
    if not (folder / "runs.csv").is_file():
        raise ScalingError(f"no {folder / 'runs.csv'}: a forecast needs the runs that the report was made of")
    choices = data["spec"]
    prices = Prices.of(choices["prices"]["picojoules"], choices["prices"]["usd_per_hour"])
    share = None if choices["share"] is None else tuple(choices["share"])
    spec = Spec(**choices | {"prices": prices, "share": share, "select": "all"})
    return Analysis.of(Runs.read(folder / "runs.csv", allow_midrun=True), spec)
