"""Charts in Matplotlib: colour-blind safe, dashed and hatched where no runs stand behind them."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from scaling.report.chart import Band, Chart, Line, Points, Rule, segments

MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "x": "X",
    "star": "*",
    "pentagon": "p",
}
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
LEGEND_ROWS = 14  # more families than this go into several columns


def words(text: str) -> str:
    """Names are data: Matplotlib would read mathematics between dollar signs."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Writes PNG or SVG by suffix, without a time stamp so that equal input gives equal bytes."""
    stamp = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=160, metadata=None if path.suffix.lower() == ".pdf" else stamp)
    return path


def drawn(chart: Chart) -> Figure:
    """A chart as a figure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], chart.height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log" if chart.x_log else "linear")
        axes.set_yscale("log" if chart.y_log else "linear")
        for mark in chart.marks:
            draw(mark, axes)
        if chart.y_range:
            axes.set_ylim(*chart.y_range)
        if chart.y_ticks:
            axes.yaxis.set_major_locator(FixedLocator(list(chart.y_ticks)))
            axes.yaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in chart.y_ticks]))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(words(chart.x_label))
        axes.set_ylabel(words(chart.y_label))
        names = axes.get_legend_handles_labels()[1]
        if names:  # outside the axes, where it can neither cover data nor be cut off
            columns = 2 if len(names) <= LEGEND_ROWS else 3
            figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return figure


@singledispatch
def draw(mark: Any, axes: Axes) -> None:
    """One mark on the axes."""
    raise TypeError(f"no way to draw a {type(mark).__name__}")


@draw.register
def draw_line(mark: Line, axes: Axes) -> None:
    measured = np.ones(len(mark.x), bool) if mark.measured is None else mark.measured
    for k, (part, inside) in enumerate(segments(measured)):
        name = words(mark.name) if k == 0 and mark.name else None
        style = "-" if inside else (0, (4, 2))
        axes.plot(mark.x[part], mark.y[part], color=mark.colour, lw=mark.width, ls=style, alpha=mark.faint, label=name)


@draw.register
def draw_band(mark: Band, axes: Axes) -> None:
    measured = np.ones(len(mark.x), bool) if mark.measured is None else mark.measured
    for part, inside in segments(measured):
        fill: Any = {"color": mark.colour, "alpha": 0.22, "lw": 0}
        hatch: Any = {"facecolor": "none", "edgecolor": mark.colour, "hatch": "///", "alpha": 0.45, "lw": 0}
        axes.fill_between(mark.x[part], mark.low[part], mark.high[part], **(fill if inside else hatch))


@draw.register
def draw_points(mark: Points, axes: Axes) -> None:
    edge: Any = {"mec": "white", "mew": 0.5, "ls": "none", "zorder": 4}
    axes.plot(mark.x, mark.y, MARKERS[mark.shape], color=mark.colour, ms=5.5, label=words(mark.name) or None, **edge)


@draw.register
def draw_rule(mark: Rule, axes: Axes) -> None:
    (axes.axhline if mark.axis == "y" else axes.axvline)(
        mark.at, color="0.35", lw=0.9, ls="-" if mark.axis == "y" else ":"
    )
    if mark.words:
        axes.text(
            mark.at, 1.005, mark.words, transform=axes.get_xaxis_transform(), fontsize=8, color="0.35", va="bottom"
        )
