"""How far the answer moves with choices nobody can defend to the digit: the objective, and which rows are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scaling.fitting.fit import Fit, bounds_of, fit, row_fault
from scaling.fitting.solve import Objective, refit
from scaling.laws.forms import law_named
from scaling.lint import lint
from scaling.tables.runs import Runs, ScalingError

OBJECTIVES = ("huber", "lad", "log-ls", "raw-ls")
MOST_LEFT_OUT = 300  # rows that are left out one by one to measure their influence
DOUBTS = ("duplicates", "near duplicates", "loss rises with data", "off-centre IsoFLOP")  # findings about single rows
MAD_TO_SD = 1.4826  # of a normal distribution
CUSTOMARY_DELTA = 1e-3  # Hoffmann et al. 2022, section 3.3


@dataclass(frozen=True)
class Variant:
    """One refit: objective, rows left out, parameters, optimal-allocation exponent (NaN for laws without one)."""

    objective: str
    dropped: str
    rows: int
    params: dict[str, float]
    allocation: float


def sensitivity(
    runs: Runs,
    law: str = "chinchilla",
    delta: float = CUSTOMARY_DELTA,
    top: tuple[int, ...] = (1, 3, 5),
    starts: int = 24,
) -> list[Variant]:
    """One family refitted under each objective, without its highest losses, without its cheapest tenth, without
    the rows that lint doubts, and with a head that does not count as parameters where the table tells (`N_nonemb`).

    Variants that leave too few rows are left out.
    """
    # The highest losses come from the smallest runs, where warm-up and rounding of sizes weigh most, and published
    # exponents moved by a tenth when a few of them were left out (Besiroglu et al. 2024 leave out five).
    order = np.argsort(-runs["loss"], kind="stable")
    cuts = {"none": np.arange(len(runs))}
    cuts |= {"highest loss" if k == 1 else f"{k} highest losses": np.sort(order[k:]) for k in top}
    cuts["cheapest tenth"] = np.flatnonzero(runs["flops"] > np.quantile(runs["flops"], 0.1))
    doubted = {name for finding in lint(runs) if finding.name in DOUBTS for name in finding.rows}
    if doubted:
        cuts["the rows that lint doubts"] = np.flatnonzero(~np.isin(runs["run_id"].astype(str), list(doubted)))
    out = []
    for dropped, rows in cuts.items():
        for objective in OBJECTIVES if dropped == "none" else OBJECTIVES[:1]:
            found = variant(runs.select(rows), law, objective, delta, dropped, starts)
            out += [found] if found else []
    if "N_nonemb" in runs.columns and not np.isnan(runs["N_nonemb"]).any():
        headless = replace(runs, columns=runs.columns | {"N": runs["N_nonemb"]})
        found = variant(headless, law, OBJECTIVES[0], delta, "the head in N", starts)
        out += [found] if found else []
    return out


def variant(runs: Runs, law: str, objective: str, delta: float, dropped: str, starts: int) -> Variant | None:
    """One refit, or nothing where the rows that are left do not support the law."""
    if len(runs) <= len(law_named(law).names) or min(len(np.unique(runs[x])) for x in ("N", "D")) < 2:
        return None
    params = fit(runs, law, objective, delta, starts).params
    both = params.get("alpha", np.nan) + params.get("beta", np.nan)
    return Variant(objective, dropped, len(runs), params, float(params.get("beta", np.nan) / both))


def robust_delta(residuals: np.ndarray, multiple: float = 1.345) -> float:
    """Huber threshold from the data: 1.345 robust sds, 95 % efficient for normal noise (Huber 1981)."""
    return float(multiple * MAD_TO_SD * np.median(np.abs(residuals - np.median(residuals))))


def delta_from_noise(runs: Runs, law: str = "chinchilla", smallest: float = CUSTOMARY_DELTA, starts: int = 64) -> float:
    """Huber threshold that suits the noise of a table: `robust_delta` of each family's least-squares residuals.

    Far below the noise a Huber fit is a least-absolute-deviations fit, which passes exactly through as many points as
    it has parameters: with a dozen runs a family it follows whichever those are. Residuals are enlarged for the
    degrees of freedom that the fit has used up. Never below `smallest`, the customary threshold for large ladders.
    Families that cannot be fitted have no say; raises ScalingError where none can. One whose runs tell nothing of
    repetition or precision is fitted by Chinchilla's law, to which the others come down for it.
    """
    # The law takes up as many degrees of freedom as it has parameters, so that residuals are smaller than the noise
    # by the root of (n - p) / n.
    scaled, form = [], law_named(law)
    parts = [runs.family(family) for family in runs.families]
    faults = [row_fault(part, form) for part in parts]
    if all(faults):
        raise ScalingError(faults[0])
    for part in (part for part, fault in zip(parts, faults, strict=True) if not fault):
        squares = fit(part, "chinchilla" if form.untold(part) else law, "log-ls", starts=starts)
        rows, used = len(squares.runs), len(squares.law.names)
        scaled.append(squares.residuals() * np.sqrt(rows / (rows - used)))
    return max(smallest, robust_delta(np.concatenate(scaled)))


def objective_text(objective: Objective, found: bool) -> str:
    """An objective in words; of Huber's, the threshold and whether it was `found` by `delta_from_noise` or given."""
    if objective.name != "huber":
        return objective.name
    source = "as given" if not found else "from the noise" if objective.delta > CUSTOMARY_DELTA else "above the noise"
    return f"huber, delta {objective.delta:.3g} {source}"


def influence(fitted: Fit) -> np.ndarray:
    """(n,) relative change of the loss predicted at ten times the largest run when each row is left out in turn.

    Exact refits rather than a linear approximation, which fails just where a row matters. The point of prediction
    keeps the largest run's ratio of tokens to parameters. Beyond MOST_LEFT_OUT rows only those with the largest
    residuals are left out; the others count as zero.
    """
    rows = np.sort(np.argsort(-np.abs(fitted.residuals()), kind="stable")[:MOST_LEFT_OUT])
    # A weight of zero leaves a run out; all of them are refitted at once, from the optimum of all rows.
    weight = np.ones((len(rows), len(fitted.runs)))
    weight[np.arange(len(rows)), rows] = 0.0
    target = fitted.objective.target(fitted.runs["loss"])
    start = np.repeat(fitted.theta[None], len(rows), axis=0)
    theta = refit(fitted.model, fitted.objective, target, weight, start, bounds_of(fitted.model, fitted.runs["loss"]))
    further = enlarged(fitted.runs.select(np.array([np.argmax(fitted.runs["flops"])])), np.sqrt(10.0))
    change = np.zeros(len(fitted.runs))
    left, kept = (fitted.predict_rows(x, further, fitted.families[0])[:, 0] for x in (theta, fitted.theta[None]))
    change[rows] = left / kept - 1
    return change


def enlarged(runs: Runs, times: float) -> Runs:
    """The same runs at so many times the parameters and tokens, as often repeated, and the square of that in
    compute."""
    scale = {"N": times, "D": times, "U": times, "flops": times**2}
    return replace(
        runs, columns=runs.columns | {name: runs[name] * x for name, x in scale.items() if name in runs.columns}
    )
