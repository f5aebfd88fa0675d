"""The solver: batched damped IRLS/Newton from many starts, then a Newton polish.

It minimises the *sum* over rows of rho(residual), never the mean, and does not rely on a library's stopping rule:
the published fits that went wrong did so there. Shapes: K problems solved at once, P
parameters, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scaling.laws.base import Model
from scaling.tables.runs import ScalingError

CHUNK_ELEMENTS = 250_000  # rows x problems solved together; keeps the Jacobian within a few MB of cache
CONTINUATION = (3e-2, 5e-3)  # wide Huber thresholds passed through on the way from a cold start to a narrow one
LAD_CONTINUATION = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
LAD_DELTA = 1e-8  # least absolute deviations, as the limit of a Huber threshold far below any residual
SEARCH_ROWS = 12  # for each parameter, while thresholds are wide
ROUND = 8  # iterations after which starts are looked through for pairs that have met
MEETING = 1e-3  # centred distance within which two starts are on the same way to the same optimum
MAX_DAMPING = 1e12
AT_BOUND = 1e-9  # how near a bound a parameter counts as lying at it


@dataclass(frozen=True)
class Objective:
    """Sum of Huber(residual, delta); residuals of log loss (`log`) or of nats; delta = inf is least squares."""

    name: str
    log: bool
    delta: float

    def rho(self, residual: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """(K,) objective: sum over rows of weight * rho."""
        # Huber's rho is r^2 / 2 up to delta and delta |r| - delta^2 / 2 beyond; with inner = min(|r|, delta) both are
        # one expression.
        if np.isinf(self.delta):
            return 0.5 * (weight * residual * residual).sum(-1)
        size = np.abs(residual)
        inner = np.minimum(size, self.delta)
        return (weight * inner * (size - 0.5 * inner)).sum(-1)

    def target(self, loss: np.ndarray) -> np.ndarray:
        """What the model is compared with."""
        return np.log(loss) if self.log else loss


def objective_named(name: str, delta: float = 1e-3) -> Objective:
    """huber (log loss, threshold delta), lad (log), log-ls, raw-ls; raises ScalingError."""
    if not delta > 0:
        raise ScalingError(f"delta must be positive, got {delta:g}")
    choices = {
        "huber": Objective("huber", True, delta),
        "lad": Objective("lad", True, LAD_DELTA),
        "log-ls": Objective("log-ls", True, np.inf),
        "raw-ls": Objective("raw-ls", False, np.inf),
    }
    if name not in choices:
        raise ScalingError(f"unknown objective {name!r}; choose from {', '.join(choices)}")
    return choices[name]


def predicted(model: Model, objective: Objective, theta: np.ndarray) -> np.ndarray:
    """(K, n) model value in the objective's space."""
    value = model.value(theta)
    return value if objective.log else np.exp(value)


def linearised(model: Model, objective: Objective, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Model value (K, n) and Jacobian (K, P, n) in the objective's space."""
    value, jacobian = model.value_jacobian(theta)
    if objective.log:
        return value, jacobian
    return np.exp(value), jacobian * np.exp(value)[:, None, :]


def evaluate(
    model: Model, objective: Objective, theta: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """(K,) objective values."""
    return objective.rho(predicted(model, objective, theta) - target, weight)


def gradient(
    model: Model, objective: Objective, theta: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (K, P) and its scale-free size (K,): the largest cosine between the clipped residuals and a column.

    The second is MINPACK's gtol measure: unchanged by units, weights or duplicated rows.
    """
    slope, cosines = gradient_cosines(model, objective, theta, target, weight)
    return slope, np.abs(cosines).max(axis=1)


def gradient_cosines(
    model: Model, objective: Objective, theta: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (K, P), and its cosines (K, P) between the clipped residuals and each column."""
    # The derivative of rho is the residual clipped at delta. Cosines instead of slopes, since a slope changes with
    # the unit of a parameter and with the number of rows, and no limit for it would mean the same twice.
    value, jacobian = linearised(model, objective, theta)
    clipped = np.clip(value - target, -objective.delta, objective.delta)
    slope = np.einsum("kpn,kn->kp", jacobian, weight * clipped)
    norms = np.sqrt(np.einsum("kpn,kn->kp", jacobian**2, np.broadcast_to(weight, clipped.shape)))
    size = np.sqrt((weight * clipped**2).sum(-1))[:, None]
    return slope, slope / np.maximum(norms * size, 1e-300)


def damped_steps(
    jacobian: np.ndarray, residual: np.ndarray, weight: np.ndarray, delta: float, damping: np.ndarray
) -> list[np.ndarray]:
    """Steps (K, P) of the IRLS-weighted and of the Newton-weighted damped Gauss-Newton systems; one for least squares.

    IRLS weights delta/|r| are safe far away; Newton weights (1 inside the threshold, 0 outside) are fast near the end.
    """
    # Two quadratic models of Huber's loss at the same point, and the better step is taken. Iteratively reweighted
    # least squares bounds the loss from above, so its step never fails far away, but it converges slowly where
    # residuals lie beyond delta. Newton's uses the true curvature there, none, and converges fast once the right rows
    # are inside.
    size = np.abs(residual)
    outer = delta / np.maximum(size, delta) if np.isfinite(delta) else np.ones_like(size)
    slope = (jacobian @ (weight * residual * outer)[:, :, None])[:, :, 0]
    count = jacobian.shape[1]
    moved = np.swapaxes(jacobian, 1, 2)
    irls = (jacobian * (weight * outer)[:, None, :]) @ moved
    scale = np.einsum("kpp->kp", irls)
    floor = scale + 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300
    ridge = (damping[:, None] * floor)[:, :, None] * np.eye(count) + 1e-13 * floor[:, :, None] * np.eye(count)
    first = -np.linalg.solve(irls + ridge, slope[:, :, None])[:, :, 0]
    if np.isinf(delta):
        return [first]
    newton = (jacobian * (weight * (size <= delta))[:, None, :]) @ moved
    # Fewer rows inside the threshold than parameters leave this system singular, hence the larger ridge.
    second = -np.linalg.solve(newton + ridge + 1e-9 * floor[:, :, None] * np.eye(count), slope[:, :, None])[:, :, 0]
    return [first, second]


def minimise(
    model: Model,
    objective: Objective,
    target: np.ndarray,
    weight: np.ndarray,
    theta: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    iterations: int = 80,
    tolerance: float = 1e-11,
) -> tuple[np.ndarray, np.ndarray]:
    """Solves K problems from the starts `theta` (K, P); returns the final (K, P) and objectives (K,).

    `target` and `weight` are (n,) for one problem from many starts or (K, n) for many problems. A problem stops when
    three accepted steps in a row gain less than `tolerance` of its objective, or its damping runs away.
    """
    final, value = np.array(theta, dtype=np.float64), np.empty(len(theta))
    rows = model.features.shape[1]
    chunk = max(1, CHUNK_ELEMENTS // rows)
    target, weight = np.broadcast_to(target, (len(theta), rows)), np.broadcast_to(weight, (len(theta), rows))
    for begin in range(0, len(theta), chunk):
        part = slice(begin, begin + chunk)
        final[part], value[part] = minimise_chunk(
            model, objective, target[part], weight[part], final[part], bounds, iterations, tolerance
        )
    return final, value


def minimise_chunk(
    model: Model,
    objective: Objective,
    target: np.ndarray,
    weight: np.ndarray,
    theta: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    iterations: int,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    # All problems go on together until each has stopped; those that have drop out of the batch.
    theta = np.clip(theta, *bounds)
    best = evaluate(model, objective, theta, target, weight)
    damping, idle = np.full(len(theta), 1e-3), np.zeros(len(theta), dtype=int)
    active = np.arange(len(theta))
    for _ in range(iterations):
        if not len(active):
            break
        now, goal, mass = theta[active], target[active], weight[active]
        value, jacobian = linearised(model, objective, now)
        steps = damped_steps(jacobian, value - goal, mass, objective.delta, damping[active])
        trial, score = best_step(model, objective, now, steps, goal, mass, bounds)
        gain = best[active] - score
        better = gain > 0
        theta[active[better]] = trial[better]
        best[active[better]] = score[better]
        damping[active] = np.where(better, damping[active] / 5, damping[active] * 6).clip(1e-14, 10 * MAX_DAMPING)
        idle[active] = np.where(gain > tolerance * np.abs(score), 0, idle[active] + 1)
        active = active[((idle[active] < 3) | ~better & (idle[active] < 12)) & (damping[active] < MAX_DAMPING)]
    return theta, best


def best_step(
    model: Model,
    objective: Objective,
    theta: np.ndarray,
    steps: list[np.ndarray],
    target: np.ndarray,
    weight: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The better of each problem's trial steps: vectors (K, P) and their objectives (K,), infinite where undefined."""
    count, every = len(steps), np.arange(len(theta))
    trials = np.clip(np.concatenate([theta + step for step in steps]), *bounds)
    if count > 1:
        target, weight = np.concatenate([target] * count), np.concatenate([weight] * count)
    scores = evaluate(model, objective, trials, target, weight).reshape(count, -1)
    scores = np.where(np.isnan(scores), np.inf, scores)
    pick = scores.argmin(axis=0)
    return trials.reshape(count, *theta.shape)[pick, every], scores[pick, every]


def multistart(
    model: Model,
    objective: Objective,
    loss: np.ndarray,
    weight: np.ndarray,
    starts: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Every start carried to the end through easier problems; (K, P) finals, (K,) objectives.

    The wide thresholds at the beginning only lead the way, and see a sample of the rows. Starts that have met go on as
    one.
    """
    # Most starts run into one valley long before they reach its floor. Where two have met, one goes on for both: of
    # 64 starts a handful is left for the accurate part, and `origin` remembers whose end each one is.
    theta, origin = starts, np.arange(len(starts))
    seen = model.sample(SEARCH_ROWS * model.size)
    rounds = [(stage, rows) for stage in narrowing(objective, cold=True) for rows in (seen, seen, None)]
    for stage, rows in [*rounds, (objective, None)]:
        part, goal, mass = (model, loss, weight) if rows is None else (model.subset(rows), loss[rows], weight[rows])
        theta, _ = minimise(part, stage, objective.target(goal), mass, theta, bounds, ROUND, 1e-4)
        theta, place = merged(theta)
        origin = place[origin]
    theta, value = minimise(model, objective, objective.target(loss), weight, theta, bounds, 200, 1e-9)
    return theta[origin], value[origin]


def merged(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (K, P) without those within MEETING of an earlier one, and which of them each became (K,)."""
    kept: list[int] = []
    place = np.empty(len(theta), dtype=int)
    for k, vector in enumerate(theta):
        near = np.flatnonzero(np.abs(theta[kept] - vector).max(axis=1) < MEETING) if kept else place[:0]
        if not len(near):
            kept.append(k)
        place[k] = near[0] if len(near) else len(kept) - 1
    return theta[kept], place


def narrowing(objective: Objective, cold: bool) -> list[Objective]:
    """Easier problems on the way: wide thresholds for a cold start, and for least absolute deviations down to none."""
    steps = (*(CONTINUATION if cold else ()), *(LAD_CONTINUATION if objective.delta <= LAD_DELTA else ()))
    return [replace(objective, delta=step) for step in steps if step > objective.delta]


def refit(
    model: Model,
    objective: Objective,
    target: np.ndarray,
    weight: np.ndarray,
    theta: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """(K, P) optima of K resampled problems from a common warm start; `target` and `weight` as for `minimise`."""
    for stage in narrowing(objective, cold=False):
        theta, _ = minimise(model, stage, target, weight, theta, bounds, iterations=20, tolerance=1e-4)
    return minimise(model, objective, target, weight, theta, bounds, iterations=60, tolerance=1e-7)[0]


def polish(
    model: Model,
    objective: Objective,
    target: np.ndarray,
    weight: np.ndarray,
    theta: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Full Newton steps (curvature of the law included) on one vector (P,), until the gradient is at rounding level;
    parameters that a bound holds back stay there, and the step is that of the others."""
    best = evaluate(model, objective, theta[None], target, weight)[0]
    for _ in range(20):
        slope, cosines = (x[0] for x in gradient_cosines(model, objective, theta[None], target, weight))
        # At a bound that pushes back the gradient need not vanish; only the free directions are brought to zero.
        free = ~held_back(theta, slope, bounds)
        if not free.any() or np.abs(cosines[free]).max() < 1e-12:
            break
        curvature = numeric_hessian(model, objective, target, weight, theta)[np.ix_(free, free)]
        step = np.zeros(len(theta))
        step[free] = -np.linalg.lstsq(curvature, slope[free], rcond=1e-14)[0]
        trials = np.clip(theta + step * (0.5 ** np.arange(12))[:, None], *bounds)
        scores = evaluate(model, objective, trials, target, weight)
        pick = int(np.nanargmin(scores))
        # Near the optimum the objective is flat to rounding: there a smaller gradient decides.
        there = gradient_cosines(model, objective, trials[[pick]], target, weight)[1][0]
        smaller = np.abs(there[free]).max() < np.abs(cosines[free]).max()
        if not (scores[pick] < best or (scores[pick] <= best * (1 + 1e-14) and smaller)):
            break
        theta, best = trials[pick], min(best, scores[pick])
    return theta


def held_back(theta: np.ndarray, slope: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(P,) which parameters lie at a bound beyond which the objective would fall (Karush-Kuhn-Tucker)."""
    low, high = theta <= bounds[0] + AT_BOUND, theta >= bounds[1] - AT_BOUND
    return (low & (slope > 0)) | (high & (slope < 0))


def free_gradient(
    model: Model,
    objective: Objective,
    theta: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
) -> float:
    """Scale-free gradient of one vector (P,) in the directions that the box leaves open."""
    slope, cosines = (x[0] for x in gradient_cosines(model, objective, theta[None], target, weight))
    return float(np.abs(np.where(held_back(theta, slope, bounds), 0.0, cosines)).max())


def numeric_hessian(
    model: Model, objective: Objective, target: np.ndarray, weight: np.ndarray, theta: np.ndarray
) -> np.ndarray:
    """(P, P) Hessian by central differences of the analytic gradient."""
    step = 1e-5
    shifted = np.concatenate([theta + step * np.eye(len(theta)), theta - step * np.eye(len(theta))])
    slope, _ = gradient(model, objective, shifted, target, weight)
    hessian = (slope[: len(theta)] - slope[len(theta) :]) / (2 * step)
    return 0.5 * (hessian + hessian.T)
