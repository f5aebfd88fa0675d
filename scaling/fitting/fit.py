"""One fit with its certificate: centred multi-start solve, Newton polish, an independent second solver, and gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling.fitting.second import second_solution
from scaling.fitting.solve import (
    AT_BOUND,
    Objective,
    evaluate,
    free_gradient,
    linearised,
    minimise,
    multistart,
    objective_named,
    polish,
)
from scaling.laws.base import Law, Model, centre_of, joint_model, single_model
from scaling.laws.forms import law_named
from scaling.tables.equal import Equal
from scaling.tables.runs import CONVENTIONS, Runs, ScalingError

AGREEMENT = 1e-6  # relative gap in objective within which two optima are the same one
GRADIENT_LIMIT = 1e-6
WORST_GAP = 1e9
LARGE_TABLE = 4_000  # above this many rows the search for the optimum uses a random subset
EXPONENT_RANGE = (0.02, 1.5)
CORRELATION_LIMIT = 0.99
MIN_SIZES, MIN_DECADES = 5, 1.5  # what a ladder must span before a crossing may be claimed


@dataclass(frozen=True)
class Gate:
    """One check: its name, whether it passed, and a sentence for the reader."""

    name: str
    passed: bool
    message: str


@dataclass(frozen=True)
class Certificate:
    """Why the optimum is believed; `success` flags of libraries play no part.

    objective: the minimised sum. gradient: largest cosine between residuals and a Jacobian column,
    those that a bound holds back left out. agreeing, starts:
    how many starts ended within 1e-6 of the best. moved: distance to the nearest start. bounds_hit: parameters at the
    box. second_solver_gap: relative objective of VarPro minus ours. condition: of the centred Gauss-Newton matrix.
    correlation: the largest between two parameters of one family. gaps: relative excess of each start's objective over
    the best, ascending.
    """

    objective: float
    gradient: float
    agreeing: int
    starts: int
    moved: float
    bounds_hit: tuple[str, ...]
    second_solver_gap: float
    condition: float
    correlation: float
    gaps: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Fit(Equal):
    """A fitted law: one family, or several with shared parameters (`share`).

    theta: (P,) centred parameters; centre: (2,) mean log N and log D; names: joint parameter names, those of a family's
    own carry its name in brackets; model: the law bound to its rows; runs: those rows.
    """

    runs: Runs
    law: Law
    families: tuple[str, ...]
    share: tuple[str, ...]
    objective: Objective
    model: Model
    centre: np.ndarray
    theta: np.ndarray
    certificate: Certificate
    gates: tuple[Gate, ...]

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.params.items())
        return f"<Fit of {self.law.name} to {' and '.join(self.families)}, {len(self.runs)} runs: {values}>"

    @property
    def names(self) -> tuple[str, ...]:
        return self.model.names

    @property
    def params(self) -> dict[str, float]:
        """Raw parameters in full precision; with several families the own ones are named like `A[family]`."""
        return {name: float(values[0]) for name, values in self.raw(self.theta[None]).items()}

    def raw(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Raw values (K,) by joint name for centred vectors (K, P)."""
        out: dict[str, np.ndarray] = {}
        for columns in self.model.index:
            values = self.law.raw(theta[:, columns], self.centre)
            out |= {self.names[c]: values[:, p] for p, c in enumerate(columns) if self.names[c] not in out}
        return out

    def family_params(self, family: str) -> dict[str, float]:
        """Raw parameters of one family under the law's own names, shared ones included."""
        values = self.law.raw(self.theta[None, self.model.index[self.families.index(family)]], self.centre)[0]
        return dict(zip(self.law.names, map(float, values), strict=True))

    def residuals(self) -> np.ndarray:
        """(n,) log observed minus log fitted loss."""
        return np.log(self.runs["loss"]) - self.model.value(self.theta[None])[0]

    def predict(
        self, N: np.ndarray | float, D: np.ndarray | float, family: str | None = None, **known: Any
    ) -> np.ndarray:
        """(n,) losses at N parameters and D tokens, in the unit of the table; `known` as for `predict_theta`."""
        return self.predict_theta(self.theta[None], N, D, family, **known)[0]

    def predict_theta(
        self,
        theta: np.ndarray,
        N: np.ndarray | float,
        D: np.ndarray | float,
        family: str | None = None,
        **known: Any,
    ) -> np.ndarray:
        """(K, n) losses for centred vectors (K, P); `known`: flops for a law in compute, and the column that stands
        beside the law, without which the family's own habit counts. Raises ScalingError where neither says it."""
        if family is None and len(self.families) > 1:
            raise ScalingError(f"a prediction is of one family: name {' or '.join(self.families)}")
        family = family or self.families[0]
        law, flops = self.law.for_run(self.runs.family(family), known), known.get("flops")
        log_n, log_d, log_c = np.log(np.broadcast_arrays(*np.atleast_1d(N, D, np.nan if flops is None else flops)))
        features = law.features_at(log_n, log_d, self.centre, None if flops is None else log_c)
        return np.exp(law.value(theta[:, self.columns(family)], features))

    def predict_rows(self, theta: np.ndarray, runs: Runs, family: str) -> np.ndarray:
        """(K, n) losses of one family's curve at the rows of a table, with every column that the law depends on."""
        return np.exp(self.law.value(theta[:, self.columns(family)], self.law.features(runs, self.centre)))

    def columns(self, family: str) -> np.ndarray:
        """(p,) places of one family's parameters in the joint vector."""
        return self.model.index[self.families.index(family)]


def fit(
    runs: Runs,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
    starts: int = 64,
    seed: int = 0,
    share: Sequence[str] | None = None,
) -> Fit:
    """Fits a law to one family, or to several families jointly with the parameters in `share` tied.

    objective: huber (default; log residuals, threshold delta), lad, log-ls or raw-ls. Raises ScalingError when the rows
    cannot support the law at all; what they support badly comes back as failed gates.
    """
    form, families = law_named(law), runs.families
    if len(families) > 1 and share is None:
        raise ScalingError(
            f"the table holds {len(families)} families ({', '.join(families)}): choose one, or share parameters"
        )
    runs = runs.select(np.argsort([families.index(f) for f in runs["family"]], kind="stable"))
    centre = centre_of(runs)
    if len(families) == 1:
        model = single_model(form, runs, centre)
    else:
        model = joint_model(form, runs, families, share or (), centre)
    check_rows(runs, model)
    goal = objective_named(objective, delta)
    theta, certificate = solve(model, goal, runs["loss"], starts, seed)
    fitted = Fit(runs, form, tuple(families), tuple(share or ()), goal, model, centre, theta, certificate, ())
    return replace(fitted, gates=tuple(gates_of(fitted)))


def check_rows(runs: Runs, model: Model) -> None:
    """Refuses tables on which some parameter has no data at all."""
    faults = [row_fault(runs.family(family), model.law) for family in runs.families]
    last = model.index[:, -1]  # what only the column beside tells; families that share it tell of it together
    for place in np.unique(last) if model.law.beside else []:
        sharing = [rows for rows, own in zip(model.rows, last, strict=True) if own == place]
        faults.append(model.law.untold(runs.select(np.concatenate(sharing))))
    fault = next(filter(None, faults), "")
    if fault:
        raise ScalingError(fault)


def row_fault(part: Runs, law: Law) -> str:
    """Why the rows of one family cannot support a law at all; "" where they can."""
    family = part["family"][0]
    for name in CONVENTIONS:
        kinds = part.kinds(name)
        if len(kinds) > 1:
            mixed = f"family {family!r} mixes {name} ({', '.join(kinds[:4])})"
            return f"{mixed}, so that its rows do not compare: keep one with --where {name}=VALUE"
    if len(part) <= len(law.names):
        has = f"family {family!r} has {len(part)} rows; law {law.name!r} has {len(law.names)} parameters"
        return f"{has} and needs more rows than that"
    for name in law.inputs:
        if len(np.unique(part["flops" if name == "C" else name])) < 2:
            return f"family {family!r} has a single value of {name}: its effect cannot be fitted"
    if np.ptp(part["loss"]) == 0:
        return f"family {family!r}: all losses are identical, there is nothing to fit"
    return ""


def bounds_of(model: Model, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joint box (P,), (P,) from each family's own."""
    low, high = np.full(model.size, np.inf), np.full(model.size, -np.inf)
    for columns, rows in zip(model.index, model.rows, strict=True):
        one_low, one_high = model.law.bounds(np.log(loss[rows]), model.features[:, rows])
        low[columns] = np.minimum(low[columns], one_low)
        high[columns] = np.maximum(high[columns], one_high)
    return low, high


def starts_of(model: Model, loss: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, P) random starts; each family draws its own, shared parameters take the first family's."""
    rng = np.random.default_rng(seed)
    own = [model.law.starts(count, np.log(loss[rows]), model.features[:, rows], rng) for rows in model.rows]
    return model.scatter(own)


def solve(
    model: Model, objective: Objective, loss: np.ndarray, starts: int, seed: int
) -> tuple[np.ndarray, Certificate]:
    """Best vector (P,) and its certificate. If the second solver finds a better optimum, that one is returned.

    On a large table both solvers work on a random subset of the rows, and their optimum is finished on all of them.
    """
    # The place of the optimum hardly depends on thousands of further rows, its exact value does: search on some, finish
    # on all.
    chosen = model.sample(LARGE_TABLE, seed)
    small, seen = (model.subset(chosen), loss[chosen]) if len(chosen) < len(loss) else (model, loss)
    weight, target = np.ones(len(seen)), objective.target(seen)
    box, first = bounds_of(small, seen), starts_of(small, seen, starts, seed)
    finals, values = solve_starts(small, objective, seen, first, box)
    best = polish(small, objective, target, weight, finals[np.nanargmin(values)], box)
    other, other_value = second_solution(small, objective, seen, weight, first, box)
    # The second solver is not only a witness: where it finds less, its optimum is polished and returned, and the gate
    # tells that the first had failed.
    value = evaluate(small, objective, best[None], target, weight)[0]
    if other_value < value * (1 - AGREEMENT):
        candidate = polish(small, objective, target, weight, np.clip(other, *box), box)
        if evaluate(small, objective, candidate[None], target, weight)[0] < value:
            best = candidate
    certificate = certify(small, objective, seen, best, first, values, box, other_value)
    if small is model:
        return best, certificate
    return finish(model, objective, loss, best, bounds_of(model, loss), certificate)


def finish(
    model: Model,
    objective: Objective,
    loss: np.ndarray,
    start: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
    certificate: Certificate,
) -> tuple[np.ndarray, Certificate]:
    """The subset's optimum carried to all rows; objective, gradient and conditioning are those of all rows."""
    target, weight = objective.target(loss), np.ones(len(loss))
    theta, _ = minimise(model, objective, target, weight, start[None], box, iterations=40)
    best = polish(model, objective, target, weight, theta[0], box)
    size = free_gradient(model, objective, best, target, weight, box)
    value = float(evaluate(model, objective, best[None], target, weight)[0])
    condition, correlation = conditioning(model, objective, best)
    measured = replace(certificate, objective=value, gradient=size)
    return best, replace(measured, condition=condition, correlation=correlation)


def solve_starts(
    model: Model, objective: Objective, loss: np.ndarray, first: np.ndarray, box: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """All starts carried to the end: finals (K, P), objectives (K,)."""
    return multistart(model, objective, loss, np.ones(len(loss)), first, box)


def certify(
    model: Model,
    objective: Objective,
    loss: np.ndarray,
    theta: np.ndarray,
    starts: np.ndarray,
    values: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
    other_value: float,
) -> Certificate:
    """Measures the returned vector itself, whatever the solver said about it."""
    # Nothing here comes from the solver's own report. A solver that stops at its start says "converged" as readily as
    # one that has arrived; gradient, distance moved and agreement of starts do not.
    weight, target = np.ones(len(loss)), objective.target(loss)
    value = float(evaluate(model, objective, theta[None], target, weight)[0])
    # A fit that is exact to rounding has an objective of nothing, relative to which any gap would be infinite.
    floor = float(objective.rho(np.full((1, len(loss)), 1e-9), weight)[0])  # below this a fit is exact to rounding
    at_box = (theta <= box[0] + AT_BOUND) | (theta >= box[1] - AT_BOUND)
    size = free_gradient(model, objective, theta, target, weight, box)
    condition, correlation = conditioning(model, objective, theta)
    return Certificate(
        objective=value,
        gradient=0.0 if value <= floor else size,
        agreeing=int((values <= max(value, floor) * (1 + AGREEMENT)).sum()),
        starts=len(values),
        moved=float(np.abs(starts - theta).max(axis=1).min()),
        bounds_hit=tuple(np.array(model.names)[at_box].tolist()),
        second_solver_gap=float((other_value - value) / max(value, floor)),
        condition=condition,
        correlation=correlation,
        gaps=gaps(values, max(value, floor)),
    )


def gaps(values: np.ndarray, best: float) -> tuple[float, ...]:
    """Relative excess of objectives over the best one, ascending; a start that led nowhere counts as WORST_GAP."""
    excess = np.nan_to_num(values / best - 1, nan=WORST_GAP, posinf=WORST_GAP)
    return tuple(np.sort(np.clip(excess, 0.0, WORST_GAP)).tolist())


def conditioning(model: Model, objective: Objective, theta: np.ndarray) -> tuple[float, float]:
    """Condition number of J'J and the largest correlation between two parameters that it implies."""
    _, jacobian = linearised(model, objective, theta[None])
    # The inverse of J'J is the shape of the parameters' covariance under normal noise: off-diagonal entries near 1 say
    # that two parameters can be changed against each other without the residuals noticing.
    normal = jacobian[0] @ jacobian[0].T
    scale = np.sqrt(np.diag(normal)) + 1e-300
    covariance = np.linalg.pinv(normal / np.outer(scale, scale), hermitian=True)
    sd = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    correlation = np.abs(covariance / np.outer(sd, sd)) - np.eye(len(theta))
    return float(np.linalg.cond(normal)), float(min(correlation.max(), 1.0)) if len(theta) > 1 else 0.0


def gates_of(fitted: Fit) -> list[Gate]:
    """Convergence gates and physical sense, with sentences."""
    c = fitted.certificate
    at_bound = f", with {', '.join(c.bounds_hit)} at its bound here," if c.bounds_hit else ""
    return [
        Gate("moved", c.moved > 1e-9, f"distance from the nearest start {c.moved:.2g}"),
        Gate(
            "starts agree", c.agreeing >= min(3, c.starts), f"{c.agreeing} of {c.starts} starts reach the same optimum"
        ),
        Gate(
            "gradient",
            c.gradient < GRADIENT_LIMIT,
            f"scale-free gradient {c.gradient:.1e} (limit {GRADIENT_LIMIT:g})",
        ),
        Gate(
            "second solver",
            abs(c.second_solver_gap) < AGREEMENT,
            f"the independent solver{at_bound} ends {c.second_solver_gap:+.1e} of the objective away",
        ),
        *[identified_gate(fitted, family) for family in fitted.families],
    ]


def identified_gate(fitted: Fit, family: str) -> Gate:
    """An optimum without physical sense predicts, but its exponents mean nothing."""
    # Where two parameters trade off along a valley, predictions inside the data are as good as ever; what they say of
    # E or of an exponent is not.
    params, part = fitted.family_params(family), fitted.runs.family(family)
    own = [fitted.names[place] for place in fitted.columns(family)]
    faults = [f"{name} at its bound" for name in fitted.certificate.bounds_hit if name in own]
    floor = params.get("E", 0.0)
    if "E" in params and floor < 1e-3 * part["loss"].min():
        faults.append("E has gone to zero")
    if floor >= part["loss"].min():
        faults.append("E lies above the lowest loss")
    for name in fitted.law.exponents:
        if not EXPONENT_RANGE[0] <= params[name] <= EXPONENT_RANGE[1]:
            faults.append(f"{name} = {params[name]:.3g} is outside {EXPONENT_RANGE}")
    if fitted.certificate.correlation > CORRELATION_LIMIT:
        faults.append(f"two parameters are {fitted.certificate.correlation:.4f} correlated")
    message = (
        "; ".join(faults) + ": exponents not identified, predictions only" if faults else "exponents are identified"
    )
    return Gate(f"identified [{family}]", not faults, message)


def ladder_gate(runs: Runs, family: str) -> Gate:
    """Enough sizes over enough compute before anything is claimed beyond the measured range."""
    part = runs.family(family)
    sizes = count_sizes(part["N"])
    decades = float(np.log10(part["flops"].max() / part["flops"].min()))
    enough = sizes >= MIN_SIZES and decades >= MIN_DECADES
    need = "" if enough else f"; a claim needs at least {MIN_SIZES} sizes and {MIN_DECADES} decades"
    return Gate(f"ladder [{family}]", enough, f"{sizes} sizes over {decades:.2f} decades of compute{need}")


def count_sizes(N: np.ndarray) -> int:
    """Model sizes that differ by more than 10 % from the next smaller one counted."""
    count, last = 0, -np.inf
    for size in np.unique(np.log(N)):
        if size > last + np.log(1.1):
            count, last = count + 1, size
    return count
