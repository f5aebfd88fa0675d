"""What a ladder would show if the laws were known: its power, before a single run is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from scaling.fitting.fit import Fit
from scaling.tables.runs import NATS
from scaling.uncertainty.simulate import AnyTruths, Cells, Noise, Truth, draw
from scaling.verdict.compare import Comparison, compare, family_frontier
from scaling.verdict.plan import Trunk

REACH = 1e3  # how far beyond target and largest run a crossing of a simulated ladder is looked for


@dataclass(frozen=True)
class Power:
    """Simulated ladders: share whose 95 % interval of the difference at the target excludes zero; share whose interval
    of the crossing is closed; half the middle 68 % of log10 C*, those without a crossing counted as infinite (hence inf
    where they are many); share without one; rms error of the difference at the target, in `unit`, that of the
    losses."""

    ladders: int
    target: float
    p_sign: float
    p_crossing: float
    sd_log_crossing: float
    p_none: float
    rms_difference: float
    unit: str = NATS

    def lines(self) -> list[str]:
        """The result as text."""
        spread = f"{self.sd_log_crossing:.2f}" if np.isfinite(self.sd_log_crossing) else "–, for too many fit none"
        return [
            f"power over {self.ladders} simulated ladders, if the laws are as assumed:",
            f"  P(the interval of the difference at {self.target:.1e} FLOP excludes zero) = {self.p_sign:.2f}",
            f"  P(the interval of the crossing is closed on both sides) = {self.p_crossing:.2f}",
            f"  P(no crossing is fitted) = {self.p_none:.2f}; sd of log10 C*: {spread}",
            f"  rms error of the difference there: {self.rms_difference:.4f} {self.unit}",
        ]


def truths_of(fitted: Fit) -> dict[str, Truth]:
    """The fitted laws as assumed truths."""
    return {family: partial(fitted.predict, family=family) for family in fitted.families}


def designs_of(trunks: Sequence[Trunk], families: Sequence[str]) -> dict[str, Cells]:
    """A plan's runs by family: the same sizes and tokens, each at the family's own cost."""
    counts = [len(t.ratios) for t in trunks]
    n = np.repeat([t.n for t in trunks], counts)
    d = n * np.concatenate([t.ratios for t in trunks])
    trunk = np.repeat(np.arange(len(trunks)), counts)
    rates = [np.repeat([t.rates[k] for t in trunks], counts) for k in range(len(families))]
    return {family: Cells(n, d, trunk, rate) for family, rate in zip(families, rates, strict=True)}


def own_designs(fitted: Fit) -> dict[str, Cells]:
    """Each family's runs at hand, to be drawn again beside a plan's."""
    out = {}
    for family in fitted.families:
        runs = fitted.runs.family(family)
        trunk = np.unique(runs["cluster"].astype(str), return_inverse=True)[1]
        out[family] = Cells(runs["N"], runs["D"], trunk, runs["flops"] / (runs["N"] * runs["D"]))
    return out


def joined(first: Cells, second: Cells) -> Cells:
    """Both sets of runs; trunks stay apart."""
    trunk = np.concatenate([first.trunk, second.trunk + first.trunk.max() + 1])
    n, d, rate = (np.concatenate([getattr(first, x), getattr(second, x)]) for x in ("n", "d", "rate"))
    return Cells(n, d, trunk, rate)


def power(
    truths: AnyTruths,
    designs: Mapping[str, Cells],
    noise: Noise,
    target: float,
    ladders: int = 50,
    seed: int = 0,
    share: Sequence[str] | None = None,
    draws: int = 200,
    law: str = "chinchilla",
    unit: str = NATS,
) -> Power:
    """Trains nothing: draws the ladder of two families that often, fits and compares each as the real one would be.

    `unit` is that of the truths' losses. The true difference at `target` FLOP is that of the same comparison of a
    ladder without noise. Raises ScalingError where the ladder is too small to fit `law` to.
    """

    def simulated(level: Noise, key: int | list[int], count: int) -> Comparison:
        """One simulated ladder, compared; the grid of budgets depends on the designs alone."""
        a, b = truths
        runs = draw(truths, designs, level, np.random.default_rng(key))
        horizon = REACH * max(target, float(runs["flops"].max()))
        return compare(runs, a, b, share, count, 0, law, "log-ls", starts=4, horizon=horizon)

    exact = simulated(Noise(1e-6), 0, 2)
    truth = gaps_at(exact, exact.fit.theta[None], target)[0]
    signs, closed, points, errors = [], [], [], []
    for k in range(ladders):
        c = simulated(noise, [seed, k], draws)
        low, high = c.band(gaps_at(c, c.draws.theta, target))
        signs.append(bool(low * high > 0))
        closed.append(bool(np.isfinite(c.crossover.high) and c.crossover.low > 0))
        points.append(c.crossover.estimate)
        errors.append(gaps_at(c, c.fit.theta[None], target)[0] - truth)
    low, high = np.quantile(np.maximum(points, exact.budgets[0]), [0.16, 0.84], method="nearest")
    rms = float(np.sqrt(np.mean(np.square(errors))))
    none = float(np.isinf(points).mean())
    half = float(np.log10(high / low) / 2) if np.isfinite(high) else np.inf
    return Power(ladders, target, float(np.mean(signs)), float(np.mean(closed)), half, none, rms, unit)


def gaps_at(c: Comparison, theta: np.ndarray, flops: float) -> np.ndarray:
    """(K,) difference of the frontiers at exactly this budget, for joint vectors (K, P)."""
    ends = [family_frontier(c.fit, theta, f, c.costs[f], np.log([flops])).loss[:, 0] for f in (c.a, c.b)]
    return ends[1] - ends[0]
