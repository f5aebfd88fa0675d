"""Rolling-origin back-test: the analysis of the cheap runs, scored on the dear ones. A check, never a correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.fitting.fit import ladder_gate, row_fault
from scaling.laws.forms import law_named
from scaling.tables.cells import matched_cells
from scaling.tables.runs import Runs

if TYPE_CHECKING:
    from scaling.ensemble.ensemble import Ensemble
    from scaling.spec import Spec

ORIGINS = (2.0, 4.0, 10.0, 30.0)  # the early runs are those below C_max over each
SPARE_ROWS = 3  # rows beyond the number of parameters, below which an origin is left out
DISTANCES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # decades at which the reach may end
HELD, MIN_HELD = 0.85, 5  # share of left-out runs that must lie in their 95 % intervals, and how many there must be
DRAWS, MOST_LEFT_OUT = 400, 40
LOSS, DIFFERENCE = "loss", "difference"


@dataclass(frozen=True)
class LeftOut:
    """One run, or the difference of a matched cell, that an early analysis forecast: decades of compute beyond its
    largest run, interval, what was observed, and what was expected."""

    kind: str
    origin: float
    family: str
    run_id: str
    decades: float
    expected: float
    low: float
    high: float
    observed: float

    @property
    def inside(self) -> bool:
        return self.low <= self.observed <= self.high


@dataclass(frozen=True)
class BackTest:
    """All left-out points, and why origins were left out."""

    points: tuple[LeftOut, ...]
    skipped: tuple[str, ...] = ()

    def of(self, kind: str) -> list[LeftOut]:
        return [p for p in self.points if p.kind == kind]

    @property
    def reach(self) -> float:
        """Decades up to which intervals held what they promised: the farthest distance such that the points up to it,
        and up to every shorter one, were covered; no farther than the farthest point."""
        out = 0.0
        for distance in DISTANCES:
            # All points up to a distance, not those of one bin: a bin of three decides nothing.
            near = [p.inside for p in self.points if p.decades <= distance]
            if len(near) >= MIN_HELD and np.mean(near) < HELD:
                break
            farthest = max((p.decades for p in self.points if p.decades <= distance), default=0.0)
            out = farthest if len(near) >= MIN_HELD else out
        return out

    def coverage(self, kind: str | None = None) -> float:
        """Share inside their intervals; NaN without any."""
        found = [p.inside for p in self.points if kind in (None, p.kind)]
        return float(np.mean(found)) if found else float("nan")


def backtest(
    runs: Runs,
    families: Sequence[str],
    spec: Spec,
    of: Callable[..., Any],
    forecasts: Callable[..., list[LeftOut]] | None = None,
    fault: Callable[[Runs], str] = lambda _: "",
) -> BackTest:
    """Fits the runs with C <= C_max / q for each q, and forecasts the others; C_max is the largest that every family
    reached. of: the analysis of some runs; forecasts: what it says of others, their losses unless told; fault: why some
    runs do not support it, "" where they do."""
    # Rolling origin: at each one the dear runs are hidden, the cheap ones analysed in full, and the hidden ones asked
    # for. One run may be forecast from several origins, at several distances; its forecasts are not independent,
    # which is why this is a check and no correction.
    top = min(float(runs.family(f)["flops"].max()) for f in families)
    points: list[LeftOut] = []
    skipped = []
    # Fewer draws: what is asked is a share of points inside, and that is coarse anyway. The selection was made before.
    quick = replace(spec, draws=min(DRAWS, spec.draws), select="all")
    for q in ORIGINS:
        early = runs.select(runs["flops"] <= top / q)
        reason = too_few(early, families, spec) or fault(early)
        if reason:
            skipped.append(f"runs below 1/{q:g} of the largest compute: {reason}")
            continue
        ensemble = of(early, families, quick)
        left_out = runs.select(runs["flops"] > top / q)
        points += [p for f in families for p in (forecasts or losses)(ensemble, left_out, f, q)]
        points += differences(ensemble, left_out, q) if len(families) > 1 else []
    return BackTest(tuple(points), tuple(skipped))


def too_few(early: Runs, families: Sequence[str], spec: Spec) -> str:
    """Why these rows do not support an analysis, or nothing."""
    law = law_named(spec.law)
    for family in families:
        n = early["N"][early["family"] == family]
        if len(n) < len(law.names) + SPARE_ROWS:
            return f"{len(n)} of {family}, {len(law.names) + SPARE_ROWS} needed"
        gate = ladder_gate(early, family)  # nobody should extrapolate from a ladder that fails it
        if not gate.passed:
            return f"{family} has {gate.message}"
        fault = row_fault(early.family(family), law)
        if fault:
            return fault
    return ""


def spread(rows: np.ndarray) -> np.ndarray:
    """At most MOST_LEFT_OUT of them, evenly."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_LEFT_OUT)).astype(int))]


def losses(ensemble: Ensemble, left_out: Runs, family: str, q: float) -> list[LeftOut]:
    """Forecasts of single runs."""
    part = left_out.select(spread(np.flatnonzero(left_out["family"] == family)))
    if not len(part):
        return []
    curve = ensemble.rows_curve(family, part)
    # What is observed is a run, so its own noise belongs to the interval.
    run = np.exp(curve + ensemble.run_noise()[:, None])
    decades = np.log10(part["flops"] / ensemble.runs.family(family)["flops"].max()).clip(0)
    expected, (low, high) = np.exp(np.median(curve, axis=0)), np.quantile(run, [0.025, 0.975], axis=0)
    columns = (part["run_id"], decades, expected, low, high, part["loss"])
    return [LeftOut(LOSS, q, family, str(name), *map(float, rest)) for name, *rest in zip(*columns, strict=True)]


def differences(ensemble: Ensemble, left_out: Runs, q: float) -> list[LeftOut]:
    """Forecasts of B minus A in matched cells."""
    a, b = ensemble.families
    family = np.where(left_out["family"] == a, 0, np.where(left_out["family"] == b, 1, 2))
    cell = matched_cells(left_out, family)
    numbers = spread(np.unique(cell[cell >= 0]))
    if not len(numbers):
        return []
    one, two = (
        left_out.select(np.array([np.flatnonzero((cell == k) & (family == f))[0] for k in numbers])) for f in (0, 1)
    )
    # What matched runs have in common cancels from their difference, so only their own noise counts, of both.
    noise = ensemble.run_noise(2, cell=False)
    first, second = (np.exp(ensemble.rows_curve(f, x) + noise[:, [k]]) for k, (f, x) in enumerate(((a, one), (b, two))))
    gaps = second - first
    decades = np.log10(np.minimum(one["flops"], two["flops"]) / ensemble.measured()[1]).clip(0)
    low, high = np.quantile(gaps, [0.025, 0.975], axis=0)
    columns = (two["run_id"], decades, np.median(gaps, axis=0), low, high, two["loss"] - one["loss"])
    return [LeftOut(DIFFERENCE, q, b, str(name), *map(float, rest)) for name, *rest in zip(*columns, strict=True)]
