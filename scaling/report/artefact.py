"""What a report leaves for machines: `fit.json` in full precision and the draws beside it, written and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit, habits
from scaling.report.analysis import Analysis, Pair
from scaling.report.forecast import calibration_steps, run_noise
from scaling.report.ledger import Forecast, digest_of, scores
from scaling.tables.runs import ScalingError
from scaling.uncertainty.backtest import LEVELS, BackTest
from scaling.uncertainty.bootstrap import Draws
from scaling.uncertainty.profile import Intervals
from scaling.uncertainty.replicates import lack_of_fit
from scaling.verdict.break_even import BreakEven
from scaling.verdict.compare import Comparison
from scaling.verdict.crossing_profile import Profile
from scaling.verdict.nested import Nested
from scaling.verdict.words import verdict

MEASURED = ("joules", "seconds", "usd")  # axes that differ from one training of the same runs to the next


def fit_json(found: Analysis, ledger: Sequence[Forecast]) -> dict[str, Any]:
    """The verdict, then full-precision parameters, intervals and certificates, with everything they rest on."""
    return {
        "schema": 2,
        "verdict": list(found.verdict),
        "table": digest_of(found.runs),
        "families": {
            f: family_json(found.fits[f], found.draws[f], found.test_of(f), found.profiles[f]) for f in found.fits
        },
        "comparisons": [pair_json(pair) for pair in found.pairs],
        "measured_costs": [axis_json(c) for pair in found.pairs for axis, c in pair.axes.items() if axis in MEASURED],
        "other_pairs": [comparison_json(c) for c in found.others],
        "nested": nested_json(found.steps) if found.steps else None,
        "backtests": [backtest_json(test) for test in found.tests],
        "forecasts_scored": [asdict(f) | scores(f) for f in ledger if f.scored],
        "gates": [asdict(g) for g in found.gates],
        "provenance": found.provenance,
    }


def pair_json(pair: Pair) -> dict[str, Any]:
    """A pair in FLOP, with the profile of its crossing and the break-even price; then its other cost axes."""
    main = comparison_json(pair.main, pair.profile, pair.price)
    other = [axis_json(c) for axis, c in pair.axes.items() if axis not in (*MEASURED, "flops")]
    paths = {path: crossover_json(c, profile) for path, (c, profile) in pair.paths.items() if path != "optimal"}
    return main | {"other_axes": other, "other_paths": paths}


def axis_json(c: Comparison) -> dict[str, Any]:
    """A comparison on another cost axis, without what all axes have in common."""
    keep = ("a", "b", "axis", "unit", "measured", "crossover", "difference")
    return {name: comparison_json(c)[name] for name in keep}


def nested_json(found: Nested) -> dict[str, Any]:
    """Nested models without their fits."""
    skipped = ("fit",)
    steps = [{k: plain(v) for k, v in vars(s).items() if k not in skipped} for s in found.steps]
    worth = {f: {"rho": rho, "interval": [low, high]} for f, (rho, low, high) in found.efficiencies.items()}
    return {"baseline": found.baseline, "chosen": found.chosen.name, "efficiency": worth, "steps": steps}


def plain(value: Any) -> Any:
    """A value as JSON takes it: tuples as lists, NaN and infinity as None."""
    if isinstance(value, tuple):
        return list(value)
    return finite(value) if isinstance(value, float) else value


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


def family_json(
    fitted: Fit, draws: Draws, test: BackTest | None = None, profiles: Intervals | None = None
) -> dict[str, Any]:
    """One family's fit in full precision, with what a forecast needs."""
    family = fitted.families[0]
    fresh, precision = habits(fitted.runs)
    return {
        "law": fitted.law.name,
        "parameters": fitted.family_params(family),
        "intervals": {name: list(ends) for name, ends in draws.intervals().items()},
        "profile_intervals": profile_json(profiles or {}),
        "lack_of_fit": asdict(error) if (error := lack_of_fit(fitted)) else None,
        "objective": objective_json(fitted),
        "certificate": asdict(fitted.certificate),
        "bootstrap": bootstrap_json(draws),
        "rows": len(fitted.runs),
        "largest_flops_6nd": float(6 * (fitted.runs["N"] * fitted.runs["D"]).max()),
        "largest_flops": float(fitted.runs["flops"].max()),
        "repeats_tokens": fresh is None,
        "precision": precision,
        "loss_unit": fitted.runs.loss_unit,
        "centre": fitted.centre.tolist(),
        "theta": fitted.theta.tolist(),
        "run_noise": run_noise(fitted),
        "calibration": calibration_steps(test) if test else [],
        "calibration_evidence": test.sentence(LEVELS) if test else None,
        "gates": [asdict(g) for g in fitted.gates],
    }


def profile_json(profiles: Intervals) -> dict[str, Any]:
    """Ends by parameter, None where open; a parameter without a profile has no entry."""
    return {name: [finite(end) for end in ends] for name, ends in profiles.items() if ends}


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


def comparison_json(c: Comparison, profile: Profile | None = None, price: BreakEven | None = None) -> dict[str, Any]:
    low, high = c.band(c.difference_draws)
    return {
        "verdict": verdict(c),
        "a": c.a,
        "b": c.b,
        "axis": c.axis,
        "unit": c.unit,
        "along": c.along,
        "share": list(c.fit.share),
        "parameters": c.fit.params,
        "intervals": {name: list(ends) for name, ends in c.draws.intervals().items()},
        "certificate": asdict(c.fit.certificate),
        "bootstrap": bootstrap_json(c.draws),
        "measured": list(c.measured),
        "crossover": crossover_json(c, profile),
        "break_even": break_even_json(price) if price else None,
        "difference": {
            "budget": c.budgets.tolist(),
            "value": c.difference.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "p_b_better": c.p_b_better.tolist(),
        },
    }


def crossover_json(c: Comparison, profile: Profile | None = None) -> dict[str, Any]:
    """Intervals and probabilities over every draw; None where an end is open."""
    x = c.crossover
    out = {
        "estimate": finite(x.estimate),
        "interval": [finite(x.low), finite(x.high)],
        "one_sided": [finite(x.lower_bound()), finite(x.upper_bound())],
        "p_none": x.p_none,
        "p_always": x.p_always,
        "p_reverse": x.p_reverse,
        "p_never": x.p_never,
        "p_before": [[float(budget), x.p_before(float(budget))] for budget in c.budgets],
        "horizon": x.horizon,
        "unit": c.unit,
    }
    if profile is None:
        return out
    ratio = [finite(value) for value in profile.ratio]
    shape = {"budget": profile.budgets.tolist(), "log_ratio": ratio, "critical": profile.critical}
    return out | {"profile": {"interval": [finite(profile.low), finite(profile.high)]} | shape}


def break_even_json(price: BreakEven) -> dict[str, Any]:
    """kappa* along compute; None where B does not reach A's loss before the horizon."""
    curves = {name: [finite(v) for v in getattr(price, name)] for name in ("flops", "estimate", "low", "high")}
    return curves | {"ternary_share": price.share.tolist()}


def write_draws(folder: Path, draws: Mapping[str, np.ndarray]) -> None:
    """Each family's centred draws (K, P) as draws.npz. The names of families are data, stored beside the arrays: as
    names inside the archive they could be paths, or arguments of NumPy's."""
    arrays = {f"theta_{k}": theta for k, theta in enumerate(draws.values())}
    np.savez_compressed(folder / "draws.npz", families=np.array(list(draws)), **arrays)  # type: ignore[arg-type]


def read_draws(path: Path) -> dict[str, np.ndarray]:
    """Each family's centred draws (K, P), from the draws.npz beside a fit.json; raises ScalingError."""
    path = (path if path.is_dir() else path.parent) / "draws.npz"
    if not path.is_file():
        raise ScalingError(f"no {path}: an interval needs the draws that the report wrote beside fit.json")
    with np.load(path, allow_pickle=False) as stored:
        if "theta_0" not in stored:  # reports from before the names were stored apart
            return dict(stored)
        return {str(family): stored[f"theta_{k}"] for k, family in enumerate(stored["families"])}


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
    return data
