"""What the figures draw, computed once for Matplotlib and Plotly: curves, bands and where the data end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import Fit
from scaling.tables.runs import Runs
from scaling.uncertainty.backtest import DIFFERENCE, BackTest
from scaling.uncertainty.bootstrap import Draws
from scaling.verdict.break_even import BreakEven
from scaling.verdict.compare import Comparison, compute_grid, family_frontier
from scaling.verdict.crossing_profile import Profile
from scaling.verdict.frontier import Cost, Frontier
from scaling.verdict.words import headline

# Okabe & Ito 2008: distinguishable under every common colour-vision deficiency, on white and on near-black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
SHOWN_DECADES = 2.0  # how far beyond the largest run the figures extend
CURVE_POINTS = 200
SPARE = np.log(1.1)  # how far outside the sizes and tokens that were trained still counts as trained
SLACK = 1 + 1e-9  # against rounding at the ends of a range


@dataclass(frozen=True)
class FamilyView:
    """One family: its runs and its frontier over `flops` (M,) with a pointwise 95 % band. measured (M,): where the best
    allocation is one that runs support, see `supported`; edge: compute of the largest run."""

    name: str
    colour: str
    marker: str
    runs: Runs
    flops: np.ndarray
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    measured: np.ndarray
    edge: float
    size_lines: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class DifferenceView:
    """Difference of two frontiers, in `loss_label`, and the share of draws in which B is better, over budgets `flops`
    (M,) in `unit`. measured (M,): where both best allocations are ones that runs support."""

    a: str
    b: str
    unit: str
    loss_label: str
    headline: str
    flops: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_better: np.ndarray
    measured: np.ndarray
    edge: float
    crossover: tuple[float, float]
    calibrated: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class AllocationView:
    """Best N and D over `flops` (M,): draws (K, M) of both, and the point estimates (M,)."""

    name: str
    colour: str
    flops: np.ndarray
    measured: np.ndarray
    edge: float
    point: tuple[np.ndarray, np.ndarray]
    drawn: tuple[np.ndarray, np.ndarray]

    def series(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(point, low, high) of N*, D* and D*/N*."""
        points = [*self.point, self.point[1] / self.point[0]]
        draws = [*self.drawn, self.drawn[1] / self.drawn[0]]
        return [(p, *np.quantile(d, [0.025, 0.975], axis=0)) for p, d in zip(points, draws, strict=True)]


def family_view(draws: Draws, family: str, place: int) -> tuple[FamilyView, AllocationView]:
    """The frontier and its allocation, from the lowest measured compute to two decades beyond the largest."""
    fit = draws.fit
    runs = fit.runs.family(family)
    low_c, high_c = runs["flops"].min(), runs["flops"].max()
    log_c = compute_grid(low_c, high_c, high_c * 10**SHOWN_DECADES)
    cost = Cost.of(runs)
    point = family_frontier(fit, fit.theta[None], family, cost, log_c)
    drawn = family_frontier(fit, draws.theta, family, cost, log_c)
    low, high = np.quantile(drawn.loss, [0.025, 0.975], axis=0)
    measured = supported(runs, point, (low_c, high_c))
    view = FamilyView(
        family,
        PALETTE[place % len(PALETTE)],
        MARKERS[place % len(MARKERS)],
        runs,
        np.exp(log_c),
        point.loss[0],
        low,
        high,
        measured,
        float(high_c),
        tuple(size_lines(fit, runs, family, cost)),
    )
    best = np.exp(point.log_n[0]), np.exp(point.log_d[0])
    spread = np.exp(drawn.log_n), np.exp(drawn.log_d)
    return view, AllocationView(family, view.colour, view.flops, measured, view.edge, best, spread)


def supported(runs: Runs, found: Frontier, span: tuple[float, float]) -> np.ndarray:
    """(M,) whether runs stand behind the frontier at each budget: the budget lies within `span`, and the best size and
    number of tokens, for laws that know one, within those that were trained, with 10 % to spare."""
    budget = np.exp(found.log_flops)
    inside = (budget >= span[0] / SLACK) & (budget <= span[1] * SLACK)
    for name, best in (("N", found.log_n[0]), ("D", found.log_d[0])):
        trained = np.log(runs[name])
        inside &= np.isnan(best) | ((best >= trained.min() - SPARE) & (best <= trained.max() + SPARE))
    return inside


def segments(measured: np.ndarray) -> list[tuple[slice, bool]]:
    """Runs of equal flags as slices; those outside the data reach to their neighbours, so that lines join."""
    edges = np.flatnonzero(np.diff(measured.astype(int)))
    pairs = zip([0, *(edges + 1)], [*edges, len(measured) - 1], strict=True)
    return [
        (slice(start, end + 1), True) if measured[start] else (slice(max(start - 1, 0), end + 2), False)
        for start, end in pairs
    ]


def size_lines(fit: Fit, runs: Runs, family: str, cost: Cost) -> list[tuple[np.ndarray, np.ndarray]]:
    """(flops, fitted loss) along the token budgets of each model size, at most twelve sizes."""
    lines = []
    sizes = np.unique(runs["N"])
    for n in sizes if len(sizes) <= 12 else []:
        d = runs["D"][runs["N"] == n]
        tokens = np.geomspace(d.min() / 1.15, d.max() * 1.15, 24)
        flops = cost.rate(n) * n * tokens
        lines.append((flops, fit.predict(n, tokens, family, flops=flops, unique=np.inf)))
    return lines


def runs_views(runs: Runs) -> list[FamilyView]:
    """Families with their runs only, for figures without a fit."""
    nothing = np.empty(0)
    return [
        FamilyView(
            f,
            PALETTE[i % len(PALETTE)],
            MARKERS[i % len(MARKERS)],
            runs.family(f),
            nothing,
            nothing,
            nothing,
            nothing,
            nothing,
            0.0,
            (),
        )
        for i, f in enumerate(runs.families)
    ]


def difference_view(c: Comparison, test: BackTest | None = None) -> DifferenceView:
    """The difference from the lowest common compute to two decades beyond the largest, widened by the back-test."""
    keep = c.budgets <= c.measured[1] * 10**SHOWN_DECADES * 1.01
    low, high = c.band(c.difference_draws[:, keep])
    sides = [supported(c.fit.runs.family(f), c.frontiers[f], c.measured) for f in (c.a, c.b)]
    measured = (sides[0] & sides[1])[keep]
    ends = (c.crossover.low, c.crossover.high)
    flops, value = c.budgets[keep], c.difference[keep]
    wider = None
    if test is not None and test.of(DIFFERENCE):
        factor = test.factors(DIFFERENCE, np.log10(flops / c.measured[1]))
        if factor.max() > 1:
            wider = value + factor * (low - value), value + factor * (high - value)
    chance = c.p_b_better[keep]
    return DifferenceView(
        c.a,
        c.b,
        c.unit,
        c.fit.runs.loss_label,
        headline(c),
        flops,
        value,
        low,
        high,
        chance,
        measured,
        c.measured[1],
        ends,
        wider,
    )


def thin(curve: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(flops, loss) of a training curve, at most CURVE_POINTS of them, evenly spaced in log compute."""
    flops, loss = np.asarray(curve["flops"], float), np.asarray(curve["loss"], float)
    good = np.isfinite(flops) & np.isfinite(loss) & (flops > 0)
    flops, loss = flops[good], loss[good]
    if len(flops) <= CURVE_POINTS:
        return flops, loss
    wanted = np.geomspace(flops[0], flops[-1], CURVE_POINTS)
    pick = np.unique(np.searchsorted(flops, wanted).clip(0, len(flops) - 1))
    return flops[pick], loss[pick]


def loss_limits(views: Sequence[FamilyView]) -> tuple[float, float]:
    """Vertical range of loss against compute: all runs, and the frontiers one decade beyond the data."""
    ahead = [float(np.interp(np.log(10 * view.edge), np.log(view.flops), view.loss)) for view in views]
    losses = np.concatenate([view.runs["loss"] for view in views])
    return float(min(losses.min(), *ahead) * 0.97), float(losses.max() * 1.06)


def break_even_limits(price: BreakEven) -> tuple[float, float]:
    """Vertical range of kappa*: zero and one always, and as much of the band as leaves them readable."""
    return max(min(float(price.low.min()), 0.0) - 0.1, -1.0), min(max(float(price.high.max()), 1.0) + 0.1, 3.0)


def profile_signal(profile: Profile) -> tuple[np.ndarray, float]:
    """(M,) root of the ratio in units of its limit, NaN where B cannot be made to overtake; and the top of its axis."""
    signal = np.sqrt(np.where(np.isfinite(profile.ratio), profile.ratio, np.nan) / profile.critical)
    return signal, float(np.clip(1.15 * np.nanmax([*signal, 1.3]), 1.5, 4.0))


def loss_ticks(low: float, high: float) -> np.ndarray:
    """About six round tick values for a logarithmic loss axis."""
    step = (high - low) / 6
    unit = 10.0 ** np.floor(np.log10(step))
    step = unit * min((m for m in (1, 2, 2.5, 5, 10) if m * unit >= step), default=10)
    return np.round(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step, 10)


def short(value: float) -> str:
    """A count of parameters or tokens as people say it: 410k, 1.3M, 2.7B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
