"""Figures in Matplotlib: colour-blind safe, logarithmic axes, everything beyond the data dashed and hatched."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from scaling.fitting.fit import Fit
from scaling.report.views import PALETTE, SLACK, DifferenceView, FamilyView, loss_limits, loss_ticks, segments, thin

SHAPES = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X"}
Curves = Mapping[str, Mapping[str, np.ndarray]]
AXIS_NAMES = {"flops": "training compute (FLOP)", "D": "training tokens", "N": "parameters"}
SIZE = (7.6, 4.8)
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "scaling",
}


def axis_label(unit: str) -> str:
    """Name of a cost axis."""
    return AXIS_NAMES["flops"] if unit == "FLOP" else f"training cost ({unit})"


def new_figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        return figure, figure.add_subplot()


def save(figure: Figure, path: Path) -> Path:
    """Writes PNG or SVG by suffix, without a time stamp so that equal input gives equal bytes."""
    stamp = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=160, metadata=stamp)
    return path


def loss_figure(views: Sequence[FamilyView], curves: Curves | None = None) -> Figure:
    """Loss against compute: end points, fitted loss per size (thin), compute-optimal frontier (thick) with its band."""
    figure, axes = new_figure()
    axes.set_xscale("log")
    for view in views:
        draw_curves(axes, view, curves or {})
        draw_family(axes, view)
    mark_extrapolation(axes, max(view.edge for view in views), max(view.flops[-1] for view in views))
    axes.set_xlim(left=min(view.flops[0] for view in views) / 2)
    log_loss_axis(axes, *loss_limits(views), views[0].runs.loss_label)
    axes.set_xlabel(AXIS_NAMES["flops"])
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def draw_family(axes: Axes, view: FamilyView) -> None:
    """Points, per-size lines and the frontier of one family."""
    for flops, loss in view.size_lines:
        axes.plot(flops, loss, color=view.colour, lw=0.8, alpha=0.6)
    shape = SHAPES[view.marker]
    axes.plot(view.runs["flops"], view.runs["loss"], shape, color=view.colour, ms=5, mec="white", mew=0.6, zorder=4)
    draw_line(axes, view.flops, view.loss, view.measured, view.colour)
    draw_band(axes, view.flops, view.low, view.high, view.measured, view.colour)
    axes.plot([], [], color=view.colour, lw=2.2, label=view.name, marker=shape, ms=5, mec="white", mew=0.6)


def draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, measured: np.ndarray, colour: str) -> None:
    """Solid where runs stand behind the line, dashed elsewhere."""
    for part, inside in segments(measured):
        axes.plot(x[part], y[part], color=colour, lw=2.2 if inside else 1.8, ls="-" if inside else (0, (4, 2)))


def draw_band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, measured: np.ndarray, colour: str) -> None:
    """Filled where runs stand behind the band, hatched elsewhere."""
    for part, inside in segments(measured):
        if inside:
            axes.fill_between(x[part], low[part], high[part], color=colour, alpha=0.22, lw=0)
        else:
            hatched_band(axes, x[part], low[part], high[part], colour)


def hatched_band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    axes.fill_between(x, low, high, facecolor="none", edgecolor=colour, hatch="///", alpha=0.45, lw=0)


def draw_curves(axes: Axes, view: FamilyView, curves: Curves) -> None:
    """Whole training curves, faint, behind the end points."""
    for run_id in view.runs["run_id"]:
        if run_id in curves:
            axes.plot(*thin(curves[run_id]), color=view.colour, lw=0.6, alpha=0.22, zorder=1)


def mark_extrapolation(axes: Axes, edge: float, end: float, words: str = "no data beyond →") -> None:
    """A line where the largest run ends, and the words that say so."""
    axes.axvline(edge, color="0.45", lw=0.9, ls=":")
    axes.axvspan(edge, end, color="0.5", alpha=0.06, lw=0)
    axes.text(edge, 1.005, words, transform=axes.get_xaxis_transform(), fontsize=8, color="0.35", va="bottom")
    axes.set_xlim(right=end)


def log_loss_axis(axes: Axes, low: float, high: float, unit: str) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = loss_ticks(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(f"held-out loss ({unit})")


def difference_figure(view: DifferenceView) -> Figure:
    """Loss of B minus loss of A along the frontiers, with band and zero line: the main figure."""
    figure, axes = new_figure()
    colour, outside = PALETTE[3], view.flops >= view.edge / SLACK
    axes.axhline(0, color="0.25", lw=1)
    draw_line(axes, view.flops, view.value, view.measured, colour)
    draw_band(axes, view.flops, view.low, view.high, view.measured, colour)
    if view.calibrated is not None:
        for edge in view.calibrated:
            axes.plot(view.flops[outside], edge[outside], color=colour, lw=1, ls=":")
        axes.plot([], [], color=colour, lw=1, ls=":", label="band widened by the back-test")
    axes.set_xscale("log")
    axes.set_ylim(*difference_limits(view))
    draw_crossover(axes, view)
    mark_extrapolation(axes, view.edge, view.flops[-1])
    axes.set_title("\n".join(textwrap.wrap(view.headline, 92)), fontsize=9.5, loc="left", pad=18)
    axes.set_xlabel(axis_label(view.unit))
    axes.set_ylabel(f"loss difference ({view.loss_label})\n{view.b} minus {view.a}")
    for height, side, name in ((0.985, "top", view.a), (0.075, "bottom", view.b)):
        axes.text(0.012, height, f"{name} better", transform=axes.transAxes, fontsize=9, color="0.3", va=side)
    return figure


def axes_figure(views: Sequence[DifferenceView]) -> Figure:
    """The difference on every cost axis side by side, from the same draws."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(views) + 0.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(views), sharey=True, squeeze=False)[0]
    for panel, view in zip(panels, views, strict=True):
        panel.axhline(0, color="0.25", lw=1)
        draw_line(panel, view.flops, view.value, view.measured, PALETTE[3])
        draw_band(panel, view.flops, view.low, view.high, view.measured, PALETTE[3])
        panel.set_xscale("log")
        panel.set_xlabel(view.unit)
        mark_extrapolation(panel, view.edge, view.flops[-1], words="")
    limits = [difference_limits(view) for view in views]
    panels[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    panels[0].set_ylabel(f"{views[0].b} − {views[0].a}\n({views[0].loss_label})")
    return figure


def difference_limits(view: DifferenceView) -> tuple[float, float]:
    """Vertical range: zero, all up to the largest run, and of the rest as much as leaves that part readable."""
    inside = view.flops <= view.edge * SLACK
    reach = max(np.abs(view.low[inside]).max(), np.abs(view.high[inside]).max(), 1e-4)
    low = max(view.low.min(), -2.5 * reach, view.value.min() - 2.5 * reach)
    high = min(view.high.max(), max(2.5 * reach, view.value.max() * 1.2))
    pad = 0.16 * (max(high, 0) - min(low, 0))
    return min(low, 0) - pad, max(high, 0) + pad


def draw_crossover(axes: Axes, view: DifferenceView) -> None:
    """The 95 % interval of the crossing on the zero line; an arrow where it leaves the figure."""
    low, high = (float(np.clip(end, view.flops[0], view.flops[-1])) for end in view.crossover)
    if low < high:
        look: Any = {"color": "0.1", "lw": 4, "alpha": 0.55, "solid_capstyle": "butt"}
        axes.plot([low, high], [0, 0], label="crossing, 95 % interval", **look)
        if view.crossover[1] > view.flops[-1]:
            axes.plot([view.flops[-1]], [0], ">", color="0.1", ms=8, clip_on=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=False, fontsize=9)


def probability_figure(view: DifferenceView) -> Figure:
    """Share of draws in which B's frontier lies below A's."""
    figure, axes = new_figure(3.4)
    axes.axhline(0.5, color="0.6", lw=0.8)
    draw_line(axes, view.flops, view.p_better, view.measured, PALETTE[2])
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    mark_extrapolation(axes, view.edge, view.flops[-1])
    axes.set_xlabel(axis_label(view.unit))
    axes.set_ylabel(f"P({view.b} better)")
    return figure


def residual_figure(fits: Mapping[str, Fit], views: Sequence[FamilyView]) -> Figure:
    """Observed against fitted loss in percent, along compute, tokens per parameter and as a normal QQ plot."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * 1.35, 3.5), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
    for view in views:
        percent = 100 * np.expm1(fits[view.name].residuals())
        look = {"color": view.colour, "ms": 5, "mec": "white", "mew": 0.5, "ls": "none", "marker": SHAPES[view.marker]}
        panels[0].plot(view.runs["flops"], percent, label=view.name, **look)
        panels[1].plot(view.runs["D"] / view.runs["N"], percent, **look)
        panels[2].plot(normal_scores(len(percent)), np.sort(percent), **look)
    for panel, label in zip(panels, (AXIS_NAMES["flops"], "tokens per parameter", "normal score"), strict=True):
        panel.axhline(0, color="0.3", lw=0.8)
        panel.set_xlabel(label)
    for panel in panels[:2]:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())  # over a decade or two they would run into each other
    panels[0].set_ylabel("observed − fitted loss (%)")
    figure.legend(loc="outside upper right", ncols=len(views), frameon=False, fontsize=9)
    return figure


def normal_scores(count: int) -> np.ndarray:
    """Expected normal order statistics (Blom 1958)."""
    from scipy.special import ndtri

    return ndtri((np.arange(1, count + 1) - 0.375) / (count + 0.25))


def runs_figure(runs_by_family: Sequence[FamilyView], x: str, curves: Curves | None = None) -> Figure:
    """End points (and whole curves where there are any) against flops, D or N, without any fit."""
    figure, axes = new_figure()
    for view in runs_by_family:
        for run_id in view.runs["run_id"]:
            if curves and run_id in curves and x in ("flops", "D"):
                curve = curves[run_id]
                horizontal = np.asarray(curve["flops" if x == "flops" else "tokens"], float)
                axes.plot(horizontal, curve["loss"], color=view.colour, lw=0.8, alpha=0.45)
        shape = SHAPES[view.marker]
        axes.plot(
            view.runs[x],
            view.runs["loss"],
            shape,
            color=view.colour,
            ms=6,
            mec="white",
            mew=0.6,
            label=view.name,
            zorder=4,
        )
    axes.set_xscale("log")
    loss = np.concatenate([view.runs["loss"] for view in runs_by_family])
    unit = ", ".join(dict.fromkeys(view.runs.loss_label for view in runs_by_family))
    log_loss_axis(axes, loss.min() * 0.97, loss.max() * (1.35 if curves else 1.03), unit)
    axes.set_xlabel(AXIS_NAMES.get(x, x))
    axes.legend(frameon=False)
    return figure
