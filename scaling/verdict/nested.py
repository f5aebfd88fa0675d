"""Nested models of families: the same law, a constant parameter efficiency, shared terms, or nothing in common.

M0 one law for all; M1 a parameter of B is worth rho of A's (N -> rho N, Kumar et al. 2024: A differs, nothing else),
and the frontiers never cross in compute; M2 own A and alpha; M3 shared E; M4 separate. M1 against M2 is the question
of a crossover. Each step is tested against noise drawn as the runs' own, trunk by trunk, not against a chi-squared that
takes decays of one trunk for independent runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit, bounds_of, fit
from scaling.fitting.solve import evaluate, refit
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import bootstrap, interval, null_noise

MODELS: dict[str, tuple[str, ...]] = {
    "M0": ("E", "A", "B", "alpha", "beta"),
    "M1": ("E", "B", "alpha", "beta"),
    "M2": ("E", "B", "beta"),
    "M3": ("E",),
    "M4": (),
}
MEANING = {
    "M0": "the same law",
    "M1": "constant parameter efficiency",
    "M2": "own parameter term",
    "M3": "shared floor only",
    "M4": "separate laws",
}
REJECTION = 0.05
HELD_OUT_ORIGIN = 4.0  # the held-out test fits the runs below a quarter of the largest compute
HELD_OUT_ROWS = 8  # of each family, below which that fit is not made


@dataclass(frozen=True)
class Step:
    """One model: parameters, log-loss residual sum of squares, AICc, p of it against the next richer model (NaN for
    the last), rms held-out error of the difference between the families (nats; NaN where too few runs)."""

    name: str
    share: tuple[str, ...]
    parameters: int
    squares: float
    aicc: float
    p_value: float
    held_out: float
    fit: Fit


@dataclass(frozen=True)
class Nested:
    """All steps; the parameter efficiency rho of every other family against the baseline under M1, with its 95 %
    interval: {family: (rho, low, high)}."""

    baseline: str
    steps: tuple[Step, ...]
    efficiencies: dict[str, tuple[float, float, float]]

    @property
    def chosen(self) -> Step:
        """The simplest model that no richer neighbour rejects."""
        return next(s for s in self.steps if not s.p_value < REJECTION)

    def sentence(self) -> str:
        """Parameter efficiency in words, with its standing."""
        worth = [f"{rho:.2f} ({low:.2f}-{high:.2f})" for rho, low, high in self.efficiencies.values()]
        parts = [f"one {b} parameter is worth {w}" for b, w in zip(self.efficiencies, worth, strict=True)]
        text = f"{', '.join(parts)} {self.baseline} parameters"
        text = text[0].upper() + text[1:]
        first = next(s for s in self.steps if s.name == "M1")
        if self.steps[0].p_value >= REJECTION:
            return text + "; the families cannot be told apart (M0 is not rejected)."
        if first.p_value < REJECTION:
            return text + f", if that worth is constant, which these runs reject (p = {first.p_value:.3f})."
        return text + f"; that it is constant is not rejected (p = {first.p_value:.2f})."


def nested(runs: Runs, families: Sequence[str], draws: int = 400, seed: int = 0) -> Nested:
    """Fits M0-M4 to two or more families, the baseline first, by least squares on log loss, and tests each model
    against the next; `draws` simulations per test."""
    chosen = runs.select(np.concatenate([np.flatnonzero(runs["family"] == f) for f in families]))
    fits = {
        name: fit(chosen, "chinchilla", "log-ls", starts=24, seed=seed, share=share) for name, share in MODELS.items()
    }
    names = list(MODELS)
    steps = []
    for name, richer in zip(names, [*names[1:], None], strict=True):
        p = simulated_p(fits[name], fits[richer], draws, seed) if richer else float("nan")
        steps.append(step(name, fits[name], p, held_out_error(chosen, families, MODELS[name], seed)))
    constant = fits["M1"]
    sampled = bootstrap(constant, max(draws, 1000), seed).theta
    found = {}
    for other in families[1:]:
        point = float(efficiency(constant, constant.theta[None], families[0], other)[0])
        found[other] = (point, *interval(efficiency(constant, sampled, families[0], other)))
    return Nested(families[0], tuple(steps), found)


def step(name: str, fitted: Fit, p_value: float, held_out: float) -> Step:
    """Corrected Akaike criterion (Hurvich & Tsai 1989) of a least-squares fit, the noise variance counted."""
    squares, rows, k = float((fitted.residuals() ** 2).sum()), len(fitted.runs), len(fitted.names) + 1
    spare = rows - k - 1
    aicc = rows * np.log(squares / rows) + 2 * k + 2 * k * (k + 1) / spare if spare > 0 else float("inf")
    return Step(name, fitted.share, k - 1, squares, float(aicc), p_value, held_out, fitted)


def simulated_p(small: Fit, large: Fit, draws: int, seed: int) -> float:
    """Chance, under the smaller model, of a drop in squares as large as the one seen (likelihood ratio, simulated).

    Noise is drawn with the trunk and cell structure that the larger fit's residuals show.
    """
    simulated = small.model.value(small.theta[None]) + null_noise(large, draws, np.random.default_rng(seed))
    weight, loss = np.ones(simulated.shape[1]), small.runs["loss"]
    ends = []
    for one in (small, large):
        start = np.repeat(one.theta[None] if one is small else start_of(small, large), draws, axis=0)
        theta = refit(one.model, one.objective, simulated, weight, start, bounds_of(one.model, loss))
        ends.append(evaluate(one.model, one.objective, theta, simulated, weight))
    ratio = np.log(np.maximum(ends[0], 1e-300) / np.maximum(ends[1], 1e-300))
    seen = np.log((small.residuals() ** 2).sum() / (large.residuals() ** 2).sum())
    return float((1 + (ratio >= seen).sum()) / (1 + draws))


def start_of(small: Fit, large: Fit) -> np.ndarray:
    """(1, P) the smaller model's optimum in the larger one's coordinates."""
    theta = np.empty((1, large.model.size))
    for own, shared in zip(large.model.index, small.model.index, strict=True):
        theta[0, own] = small.theta[shared]
    return theta


def efficiency(fitted: Fit, theta: np.ndarray, a: str, b: str) -> np.ndarray:
    """(K,) rho with A_b / N^alpha = A_a / (rho N)^alpha."""
    raw = fitted.raw(theta)
    return (raw[f"A[{a}]"] / raw[f"A[{b}]"]) ** (1 / raw["alpha"])


def held_out_error(runs: Runs, families: Sequence[str], share: tuple[str, ...], seed: int) -> float:
    """Rms error in nats, over all families but the first, of the difference from the first at the held-out cells of a
    fit on C <= C_max / 4; NaN with too few rows or unequal designs."""
    inside = runs["flops"] <= runs["flops"].max() / HELD_OUT_ORIGIN
    counts = [(inside & (runs["family"] == f)).sum() for f in families]
    outside = [np.flatnonzero(~inside & (runs["family"] == f)) for f in families]
    if min(counts) < HELD_OUT_ROWS or len({len(rows) for rows in outside}) > 1 or not len(outside[0]):
        return float("nan")
    early = fit(runs.select(inside), "chinchilla", "log-ls", starts=16, seed=seed, share=share)
    gaps = []
    for family, rows in zip(families, outside, strict=True):
        order = rows[np.lexsort((runs["D"][rows], runs["N"][rows]))]
        gaps.append(runs["loss"][order] - early.predict(runs["N"][order], runs["D"][order], family))
    return float(np.sqrt(np.mean((np.array(gaps[1:]) - gaps[0]) ** 2)))
