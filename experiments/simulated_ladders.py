"""Ladders drawn from known laws, for planning and for studies: two families whose frontiers cross where it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from scaling.ensemble.frontier import SIX_N_D, frontier
from scaling.laws.forms import Chinchilla
from scaling.tables.runs import FLOPS_PER_PARAMETER_TOKEN, Runs, ScalingError

# Besiroglu et al. 2024 (arXiv 2404.10102), table 1: E, A, B, alpha, beta of Hoffmann et al.'s runs.
BASELINE = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)


@dataclass(frozen=True)
class Noise:
    """Standard deviations on log loss: of a run, of a trunk (all decays of one size), of a cell common to families;
    and of lack of fit, a smooth wave along log N and log D that the law cannot follow."""

    run: float = 0.003
    trunk: float = 0.0
    common: float = 0.0
    misfit: float = 0.0


@dataclass(frozen=True)
class Cells:
    """The runs of one family: sizes n and tokens d, which of them are decays off one trunk, and what they cost in FLOP
    per parameter and token; all (n,)."""

    n: np.ndarray
    d: np.ndarray
    trunk: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True)
class Ladder:
    """Sizes (parameters) and tokens per parameter; each size is one trunk with a decay per ratio."""

    sizes: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def flops(self) -> float:
        """Cost of one family: each trunk is trained once, to its largest budget, as decays branch off it."""
        return FLOPS_PER_PARAMETER_TOKEN * sum(n * n * max(self.ratios) for n in self.sizes)

    @property
    def cells(self) -> Cells:
        """Every size with every ratio."""
        n = np.repeat(self.sizes, len(self.ratios))
        trunk = np.repeat(np.arange(len(self.sizes)), len(self.ratios))
        rate = np.full(len(n), FLOPS_PER_PARAMETER_TOKEN)
        return Cells(n, n * np.tile(self.ratios, len(self.sizes)), trunk, rate)


Truth = Sequence[float] | Callable[[np.ndarray, np.ndarray], np.ndarray]
AnyTruths = Mapping[str, Truth]


def true_loss(law: Truth, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Loss at n parameters and d tokens, of (E, A, B, alpha, beta) or of any function of the two."""
    if callable(law):
        return law(n, d)
    floor, a, b, alpha, beta = law
    return floor + a / n**alpha + b / d**beta


def draw(
    truths: AnyTruths,
    cells: Cells | Mapping[str, Cells],
    noise: Noise,
    rng: np.random.Generator,
    clustered: bool = True,
) -> Runs:
    """One simulated table: every family on the same cells, or on its own. Raises ScalingError on noise in common to
    designs that have no cells in common."""
    designs = {family: cells for family in truths} if isinstance(cells, Cells) else cells
    longest = max(len(own.n) for own in designs.values())
    if noise.common and any(len(own.n) != longest for own in designs.values()):
        raise ScalingError("noise of cells in common needs the same cells in every family")
    shared = noise.common * rng.normal(size=longest)
    rows = []
    for family, law in truths.items():
        n, d, trunk, rate = (getattr(designs[family], name) for name in ("n", "d", "trunk", "rate"))
        error = noise.run * rng.normal(size=len(n)) + noise.trunk * rng.normal(size=trunk.max() + 1)[trunk]
        loss = true_loss(law, n, d) * np.exp(error + shared[: len(n)] + misfit(noise.misfit, n, d, rng))
        for k in range(len(n)):
            cluster = f"{family}-trunk-{trunk[k]}" if clustered else ""
            cell = {"N": n[k], "D": d[k], "flops": rate[k] * n[k] * d[k], "loss": loss[k], "cluster": cluster}
            rows.append({"run_id": f"{family}-{k}", "family": family} | cell)
    return Runs.from_rows(rows)


def misfit(size: float, n: np.ndarray, d: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random wave with a period of two to four decades in N and in D, rms `size`."""
    if size == 0:
        return np.zeros(len(n))
    period, phase = rng.uniform(2, 4, 2), rng.uniform(0, 2 * np.pi, 2)
    turns = [np.log10(x) / period[k] for k, x in enumerate((n, d))]
    return size * sum(np.sin(2 * np.pi * turn + phase[k]) for k, turn in enumerate(turns))


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
