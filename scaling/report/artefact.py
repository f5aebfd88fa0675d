"""What a report leaves for machines: `fit.json` in full precision and the draws beside it, written and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit, Gate
from scaling.tables.runs import ScalingError
from scaling.uncertainty.backtest import BackTest
from scaling.uncertainty.bootstrap import Draws
from scaling.verdict.compare import Comparison


def fit_json(
    fits: Mapping[str, Fit],
    draws: Mapping[str, Draws],
    comparisons: Sequence[Comparison],
    tests: Sequence[BackTest],
    gates: Sequence[Gate],
    verdict: Sequence[str],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Full-precision parameters, intervals and certificates, per family and per pair, with everything they rest on."""
    return {
        "schema": 1,
        "families": {f: family_json(fits[f], draws[f]) for f in fits},
        "comparisons": [comparison_json(c) for c in comparisons],
        "backtests": [backtest_json(t) for t in tests],
        "gates": [asdict(g) for g in gates],
        "verdict": list(verdict),
        "provenance": dict(provenance),
    }


def backtest_json(test: BackTest) -> dict[str, Any]:
    """Every held-out point, and the factor that they earn at the farthest distance."""
    kinds = {h.kind for h in test.held}
    summary = {
        kind: {
            "coverage": test.coverage(kind),
            "factor": test.factor(kind, test.reach(kind))[0],
            "points": len(test.of(kind)),
            "decades": test.reach(kind),
        }
        for kind in sorted(kinds)
    }
    return {"summary": summary, "skipped": list(test.skipped), "held": [asdict(h) for h in test.held]}


def family_json(fitted: Fit, draws: Draws) -> dict[str, Any]:
    family = fitted.families[0]
    return {
        "law": fitted.law.name,
        "parameters": fitted.family_params(family),
        "intervals": {name: list(ends) for name, ends in draws.intervals().items()},
        "objective": objective_json(fitted),
        "certificate": asdict(fitted.certificate),
        "bootstrap": bootstrap_json(draws),
        "rows": len(fitted.runs),
        "largest_flops_6nd": float(6 * (fitted.runs["N"] * fitted.runs["D"]).max()),
        "centre": fitted.centre.tolist(),
        "theta": fitted.theta.tolist(),
        "gates": [asdict(g) for g in fitted.gates],
    }


def objective_json(fitted: Fit) -> dict[str, Any]:
    delta = fitted.objective.delta
    return {
        "name": fitted.objective.name,
        "delta": delta if np.isfinite(delta) else None,
        "residual": "log loss" if fitted.objective.log else "loss",
    }


def bootstrap_json(draws: Draws) -> dict[str, Any]:
    return {
        "method": draws.method,
        "unit": "cluster",
        "clusters": list(draws.clusters),
        "paired": draws.paired,
        "draws": len(draws.theta),
        "level": 0.95,
        "interval": "percentile",
        "seed": draws.seed,
    }


def finite(value: float) -> float | None:
    """JSON has no infinity; None says that there is no crossing before the horizon."""
    return float(value) if np.isfinite(value) else None


def comparison_json(c: Comparison) -> dict[str, Any]:
    x = c.crossover
    low, high = c.band(c.difference_draws)
    return {
        "a": c.a,
        "b": c.b,
        "share": list(c.fit.share),
        "parameters": c.fit.params,
        "intervals": {name: list(ends) for name, ends in c.draws.intervals().items()},
        "certificate": asdict(c.fit.certificate),
        "bootstrap": bootstrap_json(c.draws),
        "measured_flops": list(c.measured),
        "crossover": {
            "estimate": finite(x.estimate),
            "interval": [finite(x.low), finite(x.high)],
            "p_none": x.p_none,
            "p_always": x.p_always,
            "p_reverse": x.p_reverse,
            "horizon": x.horizon,
        },
        "difference": {
            "flops": c.flops.tolist(),
            "value": c.difference.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "p_b_better": c.p_b_better.tolist(),
        },
        "verdict": list(c.verdict),
    }


def read_draws(path: Path) -> dict[str, np.ndarray]:
    """Each family's centred draws (K, P), from the draws.npz beside a fit.json; raises ScalingError."""
    path = (path if path.is_dir() else path.parent) / "draws.npz"
    if not path.is_file():
        raise ScalingError(f"no {path}: an interval needs the draws that the report wrote beside fit.json")
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def read_fit_json(path: Path) -> dict[str, Any]:
    """A `fit.json`, or that of a report directory; raises ScalingError."""
    path = path / "fit.json" if path.is_dir() else path
    if not path.is_file():
        raise ScalingError(f"no fit.json at {path}")
    data = json.loads(path.read_text())
    if "families" not in data:
        raise ScalingError(f"{path} is not a fit.json: it has no 'families'")
    return data
