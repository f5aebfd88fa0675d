"""Second solvers, independent of the first: variable projection for sums of powers, SciPy's trust region otherwise."""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.stats import qmc

from scaling.fitting.solve import LAD_DELTA, MAX_DAMPING, Objective, evaluate, linearised, predicted
from scaling.laws.base import EXPONENT_BOUNDS, Model

TRUST_REGION_STARTS = 12
GRID_RANGE, GRID_POINTS = (0.02, 1.6), 32  # exponents that VarPro looks at first, and how many of them for each


def second_solution(
    model: Model,
    objective: Objective,
    loss: np.ndarray,
    weight: np.ndarray,
    starts: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, float]:
    """Centred optimum (P,) and its objective, found without the first solver. Only `trust_region` uses starts, box."""
    if model.law.terms:
        return varpro(model, objective, loss, weight)
    return trust_region(model, objective, loss, weight, starts[:TRUST_REGION_STARTS], box)


def trust_region(
    model: Model,
    objective: Objective,
    loss: np.ndarray,
    weight: np.ndarray,
    starts: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, float]:
    """SciPy's bounded trust-region reflective method (Branch, Coleman & Li 1999) with its own Huber loss."""
    # Laws that are no sums of powers cannot be taken apart; for them the second opinion is a library's.
    target, root = objective.target(loss), np.sqrt(weight)

    def residual(theta: np.ndarray) -> np.ndarray:
        return root * (predicted(model, objective, theta[None])[0] - target)

    def jacobian(theta: np.ndarray) -> np.ndarray:
        return (linearised(model, objective, theta[None])[1][0] * root).T

    best, best_value = starts[0], np.inf
    for start in starts:
        theta = np.clip(start, box[0] + 1e-9, box[1] - 1e-9)
        for delta in trust_region_stages(objective):
            shape = {"loss": "linear"} if np.isinf(delta) else {"loss": "huber", "f_scale": delta}
            found = least_squares(
                residual, theta, jacobian, box, x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=400, **shape
            )
            theta = np.clip(found.x, box[0] + 1e-9, box[1] - 1e-9)
        value = float(evaluate(model, objective, found.x[None], target, weight)[0])
        if value < best_value:
            best, best_value = found.x, value
    return best, best_value


def trust_region_stages(objective: Objective) -> list[float]:
    """Thresholds from wide to the objective's own."""
    if np.isinf(objective.delta):
        return [np.inf]
    wide = [0.1, 1e-2] + ([1e-3, 1e-4, 1e-5, 1e-6, 1e-7] if objective.delta <= LAD_DELTA else [])
    return [*(d for d in wide if d > objective.delta), objective.delta]


def slope_parameters(model: Model) -> np.ndarray:
    """Joint indices of the exponents, the only parameters that VarPro searches."""
    slopes = [slope for term in model.law.terms for slope, _ in term.powers]
    return np.unique(model.index[:, slopes]) if slopes else np.empty(0, dtype=int)


def basis(model: Model, slopes: dict[int, float]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Columns that the coefficients multiply (n, c), their slope derivatives (n, c, s), and each column's parameter."""
    intercepts = sorted({int(columns[t.intercept]) for columns in model.index for t in model.law.terms})
    places = {p: k for k, p in enumerate(sorted(slopes))}
    design = np.zeros((model.features.shape[1], len(intercepts)))
    change = np.zeros((*design.shape, len(slopes)))
    for columns, rows in zip(model.index, model.rows, strict=True):
        for term in model.law.terms:
            place = intercepts.index(int(columns[term.intercept]))
            own = [(int(columns[slope]), model.features[feature, rows]) for slope, feature in term.powers]
            power = np.exp(-sum(slopes[slope] * x for slope, x in own)) if own else np.ones(len(rows))
            design[rows, place] += power
            for slope, x in own:
                change[rows, place, places[slope]] -= x * power
    return design, change, intercepts


def varpro(
    model: Model, objective: Objective, loss: np.ndarray, weight: np.ndarray, iterations: int = 3000
) -> tuple[np.ndarray, float]:
    """Minimises the objective over raw coefficients and exponents; returns the centred vector (P,) and its objective.

    Golub & Pereyra 1973 with Kaufman's step inside IRLS weights: for given exponents the coefficients are a
    non-negative linear least-squares problem, so only the exponents are searched. The weights
    psi(r) / (L_hat (L_hat - L)) make its fixed point the optimum of the log objective itself. Shares no code with
    `minimise` beyond the definition of rho.
    """
    # A certificate by an algorithm that shares nothing with the first: it searches other variables (exponents alone),
    # in another space (raw losses), with another step. If both end at the same objective to 1e-6, a mistake would
    # have to be in both.
    which = slope_parameters(model)
    slopes, damping, idle = first_slopes(model, which, loss, weight / loss**2), 1e-3, 0
    coefficients, fitted, _ = projected(model, slopes, which, loss, weight / loss**2)
    best = varpro_objective(objective, fitted, loss, weight)
    for _ in range(iterations):
        mass = varpro_weights(objective, fitted, loss, weight)
        step = varpro_step(model, slopes, which, coefficients, fitted, loss, mass, damping)
        trial = np.clip(slopes + step, *EXPONENT_BOUNDS)
        new_coefficients, new_fitted, _ = projected(model, trial, which, loss, mass)
        score = varpro_objective(objective, new_fitted, loss, weight)
        gain = best - score
        if gain > 0:
            slopes, coefficients, fitted, best = trial, new_coefficients, new_fitted, score
        damping = max(damping / 4, 1e-12) if gain > 0 else damping * 5
        idle = 0 if gain > 1e-13 * abs(best) else idle + 1
        if idle > 10 or damping > MAX_DAMPING:
            break
    return varpro_vector(model, slopes, which, coefficients), best


def first_slopes(model: Model, which: np.ndarray, loss: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """The best exponents by weighted least squares among points spread evenly over their plausible range."""
    if not len(which):
        return np.empty(0)
    low, high = np.log(GRID_RANGE)
    grid = np.exp(low + (high - low) * qmc.Halton(len(which), seed=0).random(GRID_POINTS * len(which)))
    # A coarse look over all exponents at once: for given ones the best coefficients are a linear problem, so that no
    # start is needed for them.
    norms = [projected(model, slopes, which, loss, mass)[2] for slopes in grid]
    return grid[int(np.argmin(norms))]


def projected(
    model: Model, slopes: np.ndarray, which: np.ndarray, loss: np.ndarray, mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Best non-negative coefficients for given exponents: (c,), fitted losses (n,), weighted residual norm."""
    design, _, _ = basis(model, dict(zip(which.tolist(), slopes, strict=True)))
    root = np.sqrt(mass)
    scale = np.linalg.norm(design * root[:, None], axis=0)
    coefficients, norm = nnls(design * root[:, None] / scale, loss * root)
    return coefficients / scale, design @ (coefficients / scale), float(norm)


def varpro_objective(objective: Objective, fitted: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> float:
    residual = np.log(np.maximum(fitted, 1e-300) / loss) if objective.log else fitted - loss
    return float(objective.rho(residual[None], weight)[0])


def varpro_weights(objective: Objective, fitted: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weights w with w (fitted - loss) = d objective / d fitted, so that a fixed point is stationary."""
    if not objective.log:
        return weight
    # By the chain rule d rho(log(fitted / loss)) / d fitted = psi(residual) / fitted; written as weight times gap, the
    # log objective becomes a weighted least-squares problem that is solved again until the weights stand still.
    residual = np.log(fitted / loss)
    gap = fitted - loss
    ratio = np.where(np.abs(gap) > 1e-9 * loss, residual / np.where(gap == 0, 1.0, gap), 1 / loss)
    return weight * ratio * np.minimum(1.0, objective.delta / np.maximum(np.abs(residual), 1e-300)) / fitted


def varpro_step(
    model: Model,
    slopes: np.ndarray,
    which: np.ndarray,
    coefficients: np.ndarray,
    fitted: np.ndarray,
    loss: np.ndarray,
    mass: np.ndarray,
    damping: float,
) -> np.ndarray:
    """Damped Kaufman step for the exponents: their derivatives with the coefficients' span projected out."""
    design, change, _ = basis(model, dict(zip(which.tolist(), slopes, strict=True)))
    # The coefficients follow every change of the exponents, so only the part of a change that they cannot make up for
    # moves the residual: the derivative's part orthogonal to the design's columns.
    root = np.sqrt(mass)[:, None]
    frame, _ = np.linalg.qr(design * root)
    tangent = np.einsum("ncs,c->ns", change, coefficients) * root
    tangent -= frame @ (frame.T @ tangent)
    normal = tangent.T @ tangent
    right = tangent.T @ ((loss - fitted) * root[:, 0])
    ridge = damping * np.diag(np.diag(normal) + 1e-300)
    return np.linalg.lstsq(normal + ridge, right, rcond=None)[0]


def varpro_vector(model: Model, slopes: np.ndarray, which: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    theta = np.empty(model.size)
    theta[which] = slopes
    _, _, intercepts = basis(model, dict(zip(which.tolist(), slopes, strict=True)))
    theta[intercepts] = np.log(np.maximum(coefficients, 1e-300))
    return theta
