"""Every figure of a report, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scaling.costs import AXES
from scaling.ensemble.backtest import DIFFERENCE, LOSS, BackTest
from scaling.fitting.approaches import isoflop
from scaling.report.chart import (
    MOST_POINTS,
    PALETTE,
    SHAPES,
    UNSUPPORTED,
    Band,
    Chart,
    Line,
    Points,
    Rule,
    loss_ticks,
)
from scaling.report.words import matched_rows, short
from scaling.tables.runs import Runs

if TYPE_CHECKING:
    from scaling.analysis import Analysis
    from scaling.ensemble.ensemble import Ensemble

Curves = Mapping[str, Mapping[str, np.ndarray]]
AXIS_NAMES = {"flops": "training compute (FLOP)", "D": "training tokens", "N": "parameters"}
HOVERED = ("N", "D", "flops", "lr", "batch_tokens", "schedule", "seed", "cluster")
CURVE_POINTS = 200
EDGE_WORDS = "no runs beyond →"
DIFFERENCE_COLOUR = PALETTE[3]


def look(place: int) -> tuple[str, str]:
    """Colour and marker of the k-th family: no two of the first eighty are alike in both."""
    return PALETTE[place % len(PALETTE)], SHAPES[(place + place // len(PALETTE)) % len(SHAPES)]


def end_points(runs: Runs, x: str, place: int, y: np.ndarray | None = None) -> Points:
    """Runs of one family, which tell everything about themselves when pointed at."""
    rows = np.unique(np.linspace(0, len(runs) - 1, min(len(runs), MOST_POINTS)).astype(int))
    part, (colour, shape) = runs.select(rows), look(place)
    text = []
    for row in part.records():
        known = [f"{name} {described(name, row[name])}" for name in HOVERED if row.get(name, "") != ""]
        text.append("\n".join([str(row["run_id"]), f"loss {row['loss']:.4f}", *known]))
    heights = part["loss"] if y is None else y[rows]
    return Points(part[x], heights, colour, shape, str(runs["family"][0]), text)


def described(name: str, value: object) -> str:
    if isinstance(value, float):
        return short(value) if name in ("N", "D", "batch_tokens") else f"{value:.4g}"
    return str(value)


def curve_lines(runs: Runs, curves: Curves, place: int, x: str = "flops") -> list[Line]:
    """Whole training curves of a family's runs, faint."""
    colour, out = look(place)[0], []
    for name in runs["run_id"]:
        if name in curves and x in ("flops", "D"):
            horizontal, loss = thin(curves[name], "flops" if x == "flops" else "tokens")
            out.append(Line(horizontal, loss, colour, width=0.7, faint=0.3))
    return out


def thin(curve: Mapping[str, np.ndarray], x: str = "flops") -> tuple[np.ndarray, np.ndarray]:
    """(x, loss) of a training curve, at most CURVE_POINTS of them, evenly spaced in log x."""
    horizontal, loss = np.asarray(curve[x], float), np.asarray(curve["loss"], float)
    good = np.isfinite(horizontal) & np.isfinite(loss) & (horizontal > 0) & (loss > 0)
    horizontal, loss = horizontal[good], loss[good]
    if len(horizontal) <= CURVE_POINTS:
        return horizontal, loss
    # Evenly in the logarithm, as the axis shows it.
    wanted = np.geomspace(horizontal[0], horizontal[-1], CURVE_POINTS)
    pick = np.unique(np.searchsorted(horizontal, wanted).clip(0, len(horizontal) - 1))
    return horizontal[pick], loss[pick]


def runs_chart(runs: Runs, x: str, curves: Curves) -> Chart:
    """End points, and whole curves where there are any, against flops, D or N, without any fit."""
    marks: list[object] = []
    for place, family in enumerate(runs.families):
        part = runs.family(family)
        marks += [*curve_lines(part, curves, place, x), end_points(part, x, place)]
    low, high = float(runs["loss"].min()) * 0.97, float(runs["loss"].max()) * (1.35 if curves else 1.03)
    return loss_chart_of("runs", "End points of runs.", AXIS_NAMES[x], runs.loss_label, marks, low, high)


def loss_chart_of(
    name: str, caption: str, x_label: str, unit: str, marks: Sequence[object], low: float, high: float
) -> Chart:
    """A chart with losses on a logarithmic axis."""
    ticks, y_label = loss_ticks(low, high), f"held-out loss ({unit})"
    return Chart(name, caption, x_label, y_label, tuple(marks), y_log=True, y_range=(low, high), y_ticks=ticks)


def loss_chart(found: Analysis, curves: Curves) -> Chart:
    """Loss against compute: whole curves, end points, and each family's frontier with its band."""
    marks: list[object] = []
    lowest, edges = [float(found.runs["loss"].min())], []
    for place, family in enumerate(found.families):
        runs, colour = found.runs.family(family), look(place)[0]
        low_c, top = float(runs["flops"].min()), float(runs["flops"].max())
        budgets = np.geomspace(low_c, top * 10, 41)
        draws = found.ensemble(family).frontier(family, budgets)
        low, middle, high = np.quantile(draws, [0.025, 0.5, 0.975], axis=0)
        measured = budgets <= top * 1.001
        marks += curve_lines(runs, curves, place)
        marks += [Band(budgets, low, high, colour, measured), Line(budgets, middle, colour, "", measured)]
        marks.append(end_points(runs, "flops", place))
        lowest.append(float(max(low[-1], 0.9 * middle[-1])))
        edges.append(top)
    marks.append(Rule(max(edges), "x", EDGE_WORDS))
    caption = (
        "Held-out loss against training compute. Points: runs at the end of their schedule; faint: training curves; "
        f"thick: the frontier, the best loss that each compute buys, with its 95 % band. {UNSUPPORTED}"
    )
    low_y, high_y = min(lowest) * 0.97, float(found.runs["loss"].max()) * 1.06
    return loss_chart_of("loss", caption, AXIS_NAMES["flops"], found.runs.loss_label, marks, low_y, high_y)


def cells_chart(e: Ensemble, name: str) -> Chart | None:
    """Differences of matched cells: no law is needed for them."""
    one, two = matched_rows(e)
    if not len(one):
        return None
    gaps = e.runs["loss"][two] - e.runs["loss"][one]
    text = [
        f"{short(n)} parameters, {short(d)} tokens\n{g:+.4f}"
        for n, d, g in zip(e.runs["N"][one], e.runs["D"][one], gaps, strict=True)
    ]
    marks = (Rule(0.0), Points(e.runs["flops"][one], gaps, DIFFERENCE_COLOUR, "square", "", text))
    caption = f"Loss of {e.b} minus loss of {e.a}, run against run, where N agrees within 1 % and D is equal."
    return Chart(name, caption, AXIS_NAMES["flops"], f"{e.b} − {e.a}\n({e.runs.loss_label})", marks, height=3.6)


def difference_chart(e: Ensemble, name: str, axis: str = "flops") -> Chart:
    """The difference of the frontiers with its band, to one decade beyond the runs: the main figure."""
    budgets, last = e.budgets(axis), max(e.measured(axis))
    low, middle, high = np.quantile(e.gaps(budgets, axis), [0.025, 0.5, 0.975], axis=0)
    measured = (budgets >= e.measured(axis)[0] * 0.999) & (budgets <= e.measured(axis)[1] * 1.001)
    marks: list[object] = [Rule(0.0), Band(budgets, low, high, DIFFERENCE_COLOUR, measured)]
    marks += [Line(budgets, middle, DIFFERENCE_COLOUR, "", measured), Rule(last, "x", EDGE_WORDS)]
    crossing = e.crossing(axis)
    if crossing.kind == "inside":
        marks.append(
            Line(
                np.clip([crossing.low, crossing.high], budgets[0], budgets[-1]),
                np.zeros(2),
                "#333333",
                "crossing, 95 %",
                width=6,
            )
        )
    if 0 < e.reach < 1:
        marks.append(Rule(last * 10**e.reach, "x", "not validated beyond"))
    unit = AXES[axis]
    earned = f"Validated by back-tests to {e.reach:.1f} decades" if e.reach else "Not validated"
    caption = (
        f"Frontier of {e.b} minus frontier of {e.a} against {unit}, with its 95 % band; below zero {e.b} is better. "
        f"{UNSUPPORTED} {earned} beyond the runs."
    )
    label = AXIS_NAMES["flops"] if axis == "flops" else f"training cost ({unit})"
    inside = budgets <= last
    # Beyond the runs a band may be ten times as wide as within; the part that runs support stays readable.
    reach = 2.5 * max(np.abs(low[inside]).max(), np.abs(high[inside]).max(), 1e-4)
    span = max(min(low.min(), 0.0), -reach), min(max(high.max(), 0.0), reach)
    pad = 0.1 * (span[1] - span[0])
    y_range = (span[0] - pad, span[1] + pad)
    return Chart(name, caption, label, f"{e.b} − {e.a}\n({e.runs.loss_label})", tuple(marks), y_range=y_range)


def main_chart(e: Ensemble, axis: str = "flops") -> Chart:
    """The difference, or a lone family's frontier with its runs."""
    if len(e.families) > 1:
        return difference_chart(e, "difference", axis)
    runs = e.runs
    budgets = np.geomspace(runs["flops"].min(), runs["flops"].max() * 10, 41)
    low, middle, high = np.quantile(e.frontier(e.a, budgets, axis), [0.025, 0.5, 0.975], axis=0)
    measured = budgets <= runs["flops"].max() * 1.001
    marks = [Band(budgets, low, high, PALETTE[0], measured), Line(budgets, middle, PALETTE[0], "", measured)]
    ends = float(min(low.min(), runs["loss"].min())) * 0.97, float(runs["loss"].max()) * 1.05
    caption = f"Runs of {e.a} and the best loss that each compute buys. {UNSUPPORTED}"
    every = [*marks, end_points(runs, "flops", 0)]
    return loss_chart_of("loss", caption, AXIS_NAMES["flops"], runs.loss_label, every, *ends)


def allocation_chart(found: Analysis) -> Chart | None:
    """Best number of parameters along compute, by the laws; minima of IsoFLOP parabolas beside it."""
    marks: list[object] = []
    edges: list[float] = []
    for place, family in enumerate(found.families):
        e, colour = found.own[family], look(place)[0]
        if not e.law.has_allocation:
            return None
        runs = e.runs
        top = float(runs["flops"].max())
        budgets = np.concatenate([np.geomspace(runs["flops"].min(), top, 7), top * np.array([3.0, 10.0])])
        answers = [e.allocate(float(c), family) for c in budgets]
        ends = np.array([a.N_interval for a in answers])
        edges.append(top)
        measured = budgets <= top * 1.001
        marks.append(Band(budgets, ends[:, 0], ends[:, 1], colour, measured))
        marks.append(Line(budgets, np.array([a.N for a in answers]), colour, family, measured))
        curves = isoflop(runs).curves
        if curves:
            minima = np.array([[c.flops, c.best_n] for c in curves])
            marks.append(Points(minima[:, 0], minima[:, 1], colour, "star", f"{family}: IsoFLOP minima"))
    stars = " Stars: minima of IsoFLOP parabolas, for comparison only." * any(isinstance(m, Points) for m in marks)
    caption = f"Best number of parameters at each compute with its 95 % band. {UNSUPPORTED}{stars}"
    marks.append(Rule(max(edges), "x", EDGE_WORDS))
    return Chart("allocation", caption, AXIS_NAMES["flops"], "best number of parameters", tuple(marks), y_log=True)


def residual_chart(found: Analysis) -> Chart:
    """What each family's own best fit leaves unexplained."""
    marks: list[object] = [Rule(0.0)]
    for place, family in enumerate(found.families):
        fitted = found.fits[family]
        marks.append(end_points(fitted.runs, "flops", place, 100 * np.expm1(fitted.residuals())))
    caption = "Observed minus fitted loss of every run, about each family's own best fit."
    return Chart("residuals", caption, AXIS_NAMES["flops"], "observed − fitted loss (%)", tuple(marks), height=3.6)


def backtest_chart(test: BackTest, name: str) -> Chart | None:
    """Left-out points against their forecasts, in half-widths of the 95 % interval."""
    if not test.points:
        return None
    marks: list[object] = [Rule(1.0), Rule(-1.0)]
    for kind, colour, shape in ((LOSS, PALETTE[0], "circle"), (DIFFERENCE, PALETTE[3], "square")):
        points = test.of(kind)
        if points:
            x = np.array([p.decades for p in points])
            y = np.array([2 * (p.observed - (p.low + p.high) / 2) / (p.high - p.low) for p in points])
            text = [f"{p.run_id}\nfitted below 1/{p.origin:g} of the largest compute" for p in points]
            marks.append(Points(x, y, colour, shape, kind, text))
    caption = (
        "Left-out runs and differences against what the cheaper runs forecast, in half-widths of the 95 % interval: "
        "between the lines they lay inside."
    )
    return Chart(
        name,
        caption,
        "decades of compute beyond the runs fitted",
        "error / half-width",
        tuple(marks),
        x_log=False,
        height=3.6,
    )


def isoflop_chart(found: Analysis) -> Chart | None:
    """IsoFLOP curves with their parabolas (approach 2), for comparison only."""
    marks: list[object] = []
    for place, family in enumerate(found.families):
        colour, shape = look(place)
        for k, curve in enumerate(isoflop(found.runs.family(family)).curves[:12]):
            marks.append(Line(curve.grid, curve.fitted, colour, "", width=1))
            marks.append(Points(curve.n, curve.loss, colour, shape, family if k == 0 else ""))
    if not marks:
        return None
    caption = "Runs of one budget and a parabola through them (approach 2); nothing is decided by it."
    return Chart(
        "isoflop", caption, AXIS_NAMES["N"], f"held-out loss ({found.runs.loss_label})", tuple(marks), height=3.8
    )
