"""What a ladder would show if the laws were known: its power, before a single run is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit
from scaling.uncertainty.simulate import Cells, Noise, Truths, draw
from scaling.verdict.compare import Comparison, compare
from scaling.verdict.plan import Trunk


@dataclass(frozen=True)
class Power:
    """Simulated ladders: share whose 95 % interval of the difference at the target excludes zero; share whose interval
    of the crossing is closed; half the middle 68 % of log10 C*, those without a crossing counted as infinite (hence inf
    where they are many); share without one; rms error of the difference at the target, nats."""

    ladders: int
    target: float
    p_sign: float
    p_crossing: float
    sd_log_crossing: float
    p_none: float
    rms_difference: float

    def lines(self) -> list[str]:
        """The result as text."""
        spread = f"{self.sd_log_crossing:.2f}" if np.isfinite(self.sd_log_crossing) else "–, for too many fit none"
        return [
            f"power over {self.ladders} simulated ladders, if the laws are as assumed:",
            f"  P(the interval of the difference at {self.target:.1e} FLOP excludes zero) = {self.p_sign:.2f}",
            f"  P(the interval of the crossing is closed on both sides) = {self.p_crossing:.2f}",
            f"  P(no crossing is fitted) = {self.p_none:.2f}; sd of log10 C*: {spread}",
            f"  rms error of the difference there: {self.rms_difference:.4f} nats",
        ]


def truths_of(fitted: Fit) -> dict[str, tuple[float, ...]]:
    """The fitted laws of two families as assumed truths."""
    return {f: tuple(fitted.family_params(f).values()) for f in fitted.families}


def cells_of(trunks: Sequence[Trunk]) -> Cells:
    """The runs of one family of a plan."""
    n = np.concatenate([np.full(len(t.ratios), t.n) for t in trunks])
    trunk = np.concatenate([np.full(len(t.ratios), k) for k, t in enumerate(trunks)])
    return Cells(n, n * np.concatenate([t.ratios for t in trunks]), trunk)


def own_cells(fitted: Fit) -> Cells:
    """The runs at hand of the first family, to be drawn again for both beside a plan's."""
    runs = fitted.runs.family(fitted.families[0])
    return Cells(runs["N"], runs["D"], np.unique(runs["cluster"].astype(str), return_inverse=True)[1])


def joined(first: Cells, second: Cells) -> Cells:
    """Both sets of runs; trunks stay apart."""
    trunk = np.concatenate([first.trunk, second.trunk + first.trunk.max() + 1])
    return Cells(np.concatenate([first.n, second.n]), np.concatenate([first.d, second.d]), trunk)


def power(
    truths: Truths,
    cells: Cells,
    noise: Noise,
    target: float,
    ladders: int = 50,
    seed: int = 0,
    share: Sequence[str] = ("E",),
    draws: int = 200,
) -> Power:
    """Trains nothing: draws the ladder that often, fits and compares each as the real one would be.

    The true difference at `target` FLOP is that of the same comparison of a ladder without noise.
    """
    exact = simulated(truths, cells, Noise(1e-6), target, 0, share, 2)
    at = int(np.argmin(np.abs(np.log(exact.flops / target))))
    signs, closed, points, errors = [], [], [], []
    for k in range(ladders):
        c = simulated(truths, cells, noise, target, [seed, k], share, draws)
        low, high = (end[at] for end in c.band(c.difference_draws))
        signs.append(bool(low * high > 0))
        closed.append(bool(np.isfinite(c.crossover.high) and c.crossover.low > 0))
        points.append(c.crossover.estimate)
        errors.append(c.difference[at] - exact.difference[at])
    low, high = np.quantile(np.maximum(points, exact.measured[0]), [0.16, 0.84], method="nearest")
    rms = float(np.sqrt(np.mean(np.square(errors))))
    none = float(np.isinf(points).mean())
    half = float(np.log10(high / low) / 2) if np.isfinite(high) else np.inf
    return Power(ladders, target, float(np.mean(signs)), float(np.mean(closed)), half, none, rms)


def simulated(
    truths: Truths,
    cells: Cells,
    noise: Noise,
    target: float,
    seed: int | list[int],
    share: Sequence[str],
    draws: int,
) -> Comparison:
    """One simulated ladder, compared; the grid of budgets depends on the cells alone."""
    a, b = list(truths)
    runs = draw(truths, cells, noise, np.random.default_rng(seed))
    top = float(runs["flops"].max())
    return compare(runs, a, b, share, draws, 0, starts=4, objective="log-ls", horizon=max(target * 1e3, top * 1e3))
