"""Figure of Hoffmann et al.'s three approaches to the best model size, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from scaling.fitting.approaches import envelope, isoflop
from scaling.report.plot import AXIS_NAMES, draw_band, draw_line, mark_extrapolation, new_figure
from scaling.report.views import AllocationView, FamilyView


def approaches_figure(views: Sequence[FamilyView], allocations: Sequence[AllocationView]) -> Figure:
    """N* against compute: runs on the envelope (approach 1), minima of IsoFLOP parabolas (2), the fitted law (3).

    The first two are shown and decide nothing: the envelope follows the grid's luck, and parabolas are biased when the
    exponents differ or the grid is off-centre.
    """
    figure, axes = new_figure()
    for view, best in zip(views, allocations, strict=True):
        runs, colour = view.runs, view.colour
        point, low, high = best.series()[0]
        draw_line(axes, best.flops, point, best.measured, colour)
        draw_band(axes, best.flops, low, high, best.measured, colour)
        axes.plot([], [], color=colour, lw=2, label=f"{view.name}: fitted law")
        rows = envelope(runs)
        look: Any = {"color": colour, "ls": "none", "mec": "white", "mew": 0.5}
        axes.plot(runs["flops"][rows], runs["N"][rows], "o", ms=5, label="envelope of the runs", **look)
        curves = isoflop(runs).curves
        if curves:
            axes.plot([c.flops for c in curves], [c.best_n for c in curves], "*", ms=12, label="IsoFLOP minima", **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    mark_extrapolation(axes, max(v.edge for v in allocations), max(v.flops[-1] for v in allocations))
    axes.set_xlabel(AXIS_NAMES["flops"])
    axes.set_ylabel("best parameters N*")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure
