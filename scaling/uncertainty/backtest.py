"""Rolling-origin back-test: fit the cheap runs, predict the dear ones, and widen intervals by what was found.

A nominal 95 % bootstrap interval knows nothing of a wrong functional form: on twelve public tables it covered a median
of 31-49 % one decade out. The factor is computed from the user's own runs at run time; where
they are too few for that, the result says so and no factor is made up. Common errors cancel from the difference of two
families on one grid, so the difference has its own factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scaling.fitting.fit import count_sizes, fit
from scaling.laws.forms import law_named, tied
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import Draws, bootstrap, cluster_labels, sorted_clusters

ORIGINS = (2.0, 4.0, 10.0, 30.0, 100.0)
BINS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # decades beyond the fit, in which factors are pooled
SPARE_ROWS, MIN_SIZES = 3, 3  # rows beyond the number of parameters, and sizes, below which an origin is not fitted
MOST_HELD = 2000  # runs of a family predicted from one origin, evenly through the table; more would tell no more
LEVEL, NORMAL_95 = 0.95, 1.959964
LEVELS, DIFFERENCE = "loss", "difference"


@dataclass(frozen=True)
class Held:
    """One held-out quantity: kind ("loss" or "difference"), origin q, name of the run or cell, decades beyond the
    fit, error (observed minus predicted; log loss, or nats for a difference), sd that the raw interval assumes."""

    kind: str
    origin: float
    family: str
    run_id: str
    decades: float
    error: float
    sd: float

    @property
    def ratio(self) -> float:
        """|error| over the raw half-width; above one, the raw 95 % interval missed."""
        return abs(self.error) / (NORMAL_95 * self.sd)


@dataclass(frozen=True)
class BackTest:
    """All held-out points, and why origins were left out."""

    held: tuple[Held, ...]
    skipped: tuple[str, ...] = field(default=())

    def of(self, kind: str) -> list[Held]:
        return [h for h in self.held if h.kind == kind]

    def reach(self, kind: str) -> float:
        """Decades beyond a fit up to which there is evidence; 0 without any."""
        return max((h.decades for h in self.of(kind)), default=0.0)

    def coverage(self, kind: str) -> float:
        """Share of held-out points inside the raw 95 % interval; NaN without any."""
        ratios = [h.ratio for h in self.of(kind)]
        return float(np.mean(np.array(ratios) <= 1)) if ratios else float("nan")

    def bias(self, kind: str) -> float:
        """Mean error; positive when the fit promised too low a loss."""
        return float(np.mean([h.error for h in self.of(kind)])) if self.of(kind) else float("nan")

    def factor(self, kind: str, decades: float) -> tuple[float, int]:
        """What the raw half-width must be multiplied by at this distance, at least 1, and the points that say so.

        Split-conformal quantile (Vovk et al. 2005) of the ratios up to the bin that holds this distance; beyond the
        farthest held-out point the last factor is all there is, and `reach` says so.
        """
        edge = min((b for b in BINS if b >= min(decades, self.reach(kind))), default=BINS[-1])
        ratios = np.sort([h.ratio for h in self.of(kind) if h.decades <= max(edge, BINS[1])])
        if not len(ratios):
            return float("nan"), 0
        rank = min(int(np.ceil((len(ratios) + 1) * LEVEL)), len(ratios))
        return max(1.0, float(ratios[rank - 1])), len(ratios)

    def factors(self, kind: str, decades: np.ndarray) -> np.ndarray:
        """Factor at each distance, never falling with it; 1 within the data, NaN without evidence."""
        found = np.array([1.0 if x <= 0 else self.factor(kind, float(x))[0] for x in decades])
        return np.maximum.accumulate(found) if len(found) else found

    def sentence(self, kind: str) -> str:
        """The evidence in words."""
        points = self.of(kind)
        if not points:
            return f"No back-test of the {kind} is possible: {'; '.join(self.skipped) or 'too few runs'}."
        origins = len({h.origin for h in points})
        factor, count = self.factor(kind, self.reach(kind))
        thin = " (fewer than 19 points: the largest ratio stands in for the quantile)" if count < 19 else ""
        return (
            f"Back-test of the {kind}: the raw 95 % interval covers {self.coverage(kind):.0%} of {len(points)} "
            f"held-out points from {origins} origin(s), up to {self.reach(kind):.1f} decades beyond the fit; factor "
            f"{factor:.2f}{thin}. Beyond {self.reach(kind):.1f} decades these runs cannot speak."
        )


def backtest(
    runs: Runs,
    origins: Sequence[float] = ORIGINS,
    share: Sequence[str] | None = None,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float = 1e-3,
    draws: int = 300,
    seed: int = 0,
) -> BackTest:
    """Fits the runs with C <= C_max / q for each q and predicts the others, family by family and their differences.

    One family, or several jointly with `share` tied (None: E, where the law has one). Origins that leave too little to
    fit are skipped and listed.
    """
    held: list[Held] = []
    skipped = []
    common = tied(law, share) if len(runs.families) > 1 else None
    for q in sorted(origins):
        inside = runs["flops"] <= runs["flops"].max() / q
        reason = too_little(runs, inside, law)
        if reason:
            skipped.append(f"C_max/{q:g} leaves {reason}")
            continue
        early = fit(runs.select(inside), law, objective, delta, starts=24, seed=seed, share=common)
        sampled = bootstrap(early, draws, seed)
        held += held_levels(runs, inside, sampled, q)
        held += held_differences(runs, inside, sampled, q)
    return BackTest(tuple(held), tuple(skipped))


def too_little(runs: Runs, inside: np.ndarray, law: str) -> str:
    """Why these rows do not support a fit, or nothing."""
    need = len(law_named(law).names) + SPARE_ROWS
    for family in runs.families:
        part = runs["N"][inside & (runs["family"] == family)]
        if len(part) < need:
            return f"{len(part)} rows of {family}, {need} needed"
        if count_sizes(part) < MIN_SIZES:
            return f"{count_sizes(part)} sizes of {family}, {MIN_SIZES} needed"
    return ""


def new_run_sd(sampled: Draws, family: str, log_losses: np.ndarray) -> np.ndarray:
    """(n,) sd of log loss of a new run: spread of the mean curve in the draws (K, n), and the fit's residual noise."""
    residuals = sampled.fit.residuals()[sampled.fit.runs["family"] == family]
    spare = max(len(residuals) - len(sampled.fit.law.names), 1)
    return np.sqrt(robust_sd(log_losses) ** 2 + (residuals**2).sum() / spare)


def robust_sd(values: np.ndarray) -> np.ndarray:
    """(n,) half the central 95 % of the draws (K, n), as a normal sd."""
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return (high - low) / (2 * NORMAL_95)


def vectors(sampled: Draws) -> tuple[np.ndarray, np.ndarray]:
    """The fitted vector (1, P) and those of the draws (K, P)."""
    return sampled.fit.theta[None], sampled.theta


def held_levels(runs: Runs, inside: np.ndarray, sampled: Draws, q: float) -> list[Held]:
    """Errors of each family's held-out losses."""
    out = []
    edge = runs["flops"][inside].max()
    for family in runs.families:
        rows = np.flatnonzero(~inside & (runs["family"] == family))
        if not len(rows):
            continue
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_HELD)).astype(int))]
        point, drawn = (np.log(sampled.fit.predict_rows(x, runs.select(rows), family)) for x in vectors(sampled))
        sd = new_run_sd(sampled, family, drawn)
        for k, row in enumerate(rows):
            decades = float(np.log10(runs["flops"][row] / edge))
            error = float(np.log(runs["loss"][row]) - point[0, k])
            out.append(Held(LEVELS, q, family, str(runs["run_id"][row]), decades, error, float(sd[k])))
    return out


def held_differences(runs: Runs, inside: np.ndarray, sampled: Draws, q: float) -> list[Held]:
    """Errors of the differences between matching cells of the first family and each other, where designs match."""
    families = tuple(runs.families)
    if len(families) < 2 or not cluster_labels(runs, families)[1]:
        return []
    out = []
    edge = runs["flops"][inside].max()
    ordered = {f: np.concatenate(sorted_clusters(runs, f)) for f in families}
    for other in families[1:]:
        for one, two in zip(ordered[families[0]], ordered[other], strict=True):
            if inside[one] or inside[two]:
                continue
            pair = [(families[0], one), (other, two)]
            point, drawn = (
                [sampled.fit.predict_rows(x, runs.select(np.array([r])), f)[:, 0] for f, r in pair]
                for x in vectors(sampled)
            )
            error = (runs["loss"][two] - runs["loss"][one]) - (point[1] - point[0])[0]
            noise = residual_difference_sd(sampled, families[0], other)
            sd = np.hypot(robust_sd((drawn[1] - drawn[0])[:, None])[0], noise)
            decades = float(np.log10(min(runs["flops"][one], runs["flops"][two]) / edge))
            out.append(Held(DIFFERENCE, q, other, str(runs["run_id"][two]), max(decades, 0.0), float(error), float(sd)))
    return out


def residual_difference_sd(sampled: Draws, a: str, b: str) -> float:
    """Sd in nats of what the fit leaves unexplained of the difference, from cells that both families hold."""
    early = sampled.fit.runs
    fitted = np.exp(sampled.fit.model.value(sampled.fit.theta[None])[0])
    gap = early["loss"] - fitted
    first, second = (np.concatenate(sorted_clusters(early, f)) for f in (a, b))
    if len(first) == len(second):
        return float(np.sqrt(np.mean((gap[second] - gap[first]) ** 2)) * np.sqrt(len(first) / max(len(first) - 4, 1)))
    return float(np.sqrt(np.mean(gap[first] ** 2) + np.mean(gap[second] ** 2)))
