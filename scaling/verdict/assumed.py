"""Assumed laws for simulations: two families whose frontiers cross at a chosen compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq

from scaling.laws.forms import Chinchilla
from scaling.verdict.frontier import SIX_N_D, frontier

# Besiroglu et al. 2024 (arXiv 2404.10102), table 1: E, A, B, alpha, beta of Hoffmann et al.'s runs.
BASELINE = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def optimal_loss(law: Sequence[float], flops: float) -> float:
    """Lowest loss of (E, A, B, alpha, beta) that `flops` = 6 N D buys."""
    e, a, b, alpha, beta = law
    theta = np.array([[np.log(e), np.log(a), np.log(b), alpha, beta]])
    return float(frontier(Chinchilla(), theta, np.zeros(2), SIX_N_D, np.log([flops])).loss[0, 0])


def crossing_at(flops: float, gap: float, baseline: Sequence[float] = BASELINE) -> dict[str, tuple[float, ...]]:
    """Two laws, "A" and "B": B's alpha is larger by `gap`, E, B and beta are shared, and the frontiers meet at `flops`;
    B is behind below and ahead above."""
    e, _, b, alpha, beta = baseline
    goal = optimal_loss(baseline, flops)

    def excess(log_a: float) -> float:
        return optimal_loss((e, np.exp(log_a), b, alpha + gap, beta), flops) - goal

    return {"A": tuple(baseline), "B": (e, float(np.exp(brentq(excess, 0.0, 30.0))), b, alpha + gap, beta)}
