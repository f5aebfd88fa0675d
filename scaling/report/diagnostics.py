"""Diagnostic figures in Matplotlib: back-test, allocation, sensitivity, influence, IsoFLOP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling.fitting.approaches import IsoFlop
from scaling.fitting.fit import Fit
from scaling.report.plot import (
    AXIS_NAMES,
    SHAPES,
    SIZE,
    STYLE,
    draw_band,
    draw_line,
    log_loss_axis,
    mark_extrapolation,
    new_figure,
)
from scaling.report.views import PALETTE, AllocationView, DifferenceView, FamilyView, break_even_limits, profile_signal
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS, BackTest
from scaling.uncertainty.sensitivity import Variant
from scaling.verdict.break_even import BreakEven
from scaling.verdict.compare import Comparison
from scaling.verdict.crossing_profile import Profile


def backtest_figure(test: BackTest) -> Figure:
    """Held-out error over the raw 95 % half-width, by distance: points above one were missed by the raw interval."""
    figure, axes = new_figure(3.8)
    for kind, colour, shape in ((LEVELS, PALETTE[0], "o"), (DIFFERENCE, PALETTE[3], "s")):
        points = test.of(kind)
        if points:
            decades, ratios = [h.decades for h in points], [h.ratio for h in points]
            axes.plot(decades, ratios, shape, color=colour, ms=5, mec="white", mew=0.5, label=kind)
            grid = np.linspace(0.01, test.reach(kind), 60)
            axes.step(grid, test.factors(kind, grid), color=colour, lw=1.5, where="post", label=f"{kind}: factor")
    axes.axhline(1, color="0.3", lw=1, ls="--")
    axes.set_yscale("log")
    axes.set_xlabel("decades of compute beyond the fit")
    axes.set_ylabel("|error| / raw 95 % half-width")
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def profile_figure(profile: Profile, c: Comparison) -> Figure:
    """How far the sum of squares rises when the frontiers are made to meet at each compute, and what is too far."""
    figure, axes = new_figure(3.4)
    signal, top = profile_signal(profile)
    axes.plot(profile.budgets, signal, color=PALETTE[3], lw=2)
    axes.axhline(1, color="0.3", lw=1, ls="--", label="95 % limit, simulated")
    axes.set_xscale("log")
    axes.set_ylim(0, top)
    mark_extrapolation(axes, c.measured[1], profile.budgets[-1])
    axes.set_xlabel("compute at which the second family is made to overtake (FLOP)")
    axes.set_ylabel("signal: √(ratio / limit)")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def break_even_figure(price: BreakEven, view: DifferenceView) -> Figure:
    """kappa* along compute with its 95 % band; below zero no price is low enough."""
    figure, axes = new_figure(3.4)
    draw_line(axes, price.flops, price.estimate, view.measured, PALETTE[4])
    draw_band(axes, price.flops, price.low, price.high, view.measured, PALETTE[4])
    for level, text in ((0.0, ""), (1.0, "a multiply-accumulate")):
        axes.axhline(level, color="0.4", lw=0.8)
        axes.text(price.flops[0], level, text, fontsize=8, color="0.35", va="bottom")
    axes.set_xscale("log")
    axes.set_ylim(*break_even_limits(price))
    mark_extrapolation(axes, view.edge, price.flops[-1])
    axes.set_xlabel(f"compute of {price.a} (FLOP)")
    axes.set_ylabel("break-even cost κ* of a\nternary operation")
    return figure


def allocation_figure(views: Sequence[AllocationView]) -> Figure:
    """Best N, best D and their ratio along compute, with 95 % bands."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * 1.35, 3.7), layout="constrained")
        panels = figure.subplots(1, 3)
    for view in views:
        for panel, (point, low, high) in zip(panels, view.series(), strict=True):
            draw_line(panel, view.flops, point, view.measured, view.colour)
            draw_band(panel, view.flops, low, high, view.measured, view.colour)
            panel.plot([], [], color=view.colour, lw=2, label=view.name)
    for panel, label in zip(panels, ("best parameters N*", "best tokens D*", "D* / N*"), strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(label, fontsize=10)
        panel.set_xlabel(AXIS_NAMES["flops"])
        mark_extrapolation(panel, max(v.edge for v in views), max(v.flops[-1] for v in views), words="")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(views), frameon=False)
    return figure


def sensitivity_figure(variants: Mapping[str, Sequence[Variant]], views: Sequence[FamilyView]) -> Figure:
    """Optimal-allocation exponent and E under every objective and exclusion, one row each."""
    kinds = list(dict.fromkeys((v.objective, v.dropped) for found in variants.values() for v in found))
    labels = [objective if dropped == "none" else f"{objective}, without {dropped}" for objective, dropped in kinds]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * 1.25, 1.2 + 0.32 * len(labels)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
    for i, view in enumerate(views):
        places = [kinds.index((v.objective, v.dropped)) for v in variants[view.name]]
        rows = np.array(places) + 0.18 * (i - (len(views) - 1) / 2)
        look = {"color": view.colour, "ls": "none", "marker": SHAPES[view.marker], "ms": 6}
        panels[0].plot([v.allocation for v in variants[view.name]], rows, label=view.name, **look)
        panels[1].plot([v.params.get("E", np.nan) for v in variants[view.name]], rows, **look)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("allocation exponent: N* ∝ C^a")
    panels[1].set_xlabel(f"irreducible loss E ({views[0].runs.loss_unit})")
    figure.legend(loc="outside upper right", ncols=len(views), frameon=False)
    return figure


def influence_figure(fits: Mapping[str, Fit], changes: Mapping[str, np.ndarray], views: Sequence[FamilyView]) -> Figure:
    """The runs that move a ten-fold extrapolation most when left out."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * 1.25, 3.4), layout="constrained")
        panels = figure.subplots(1, len(views), squeeze=False, sharex=True)[0]
    for panel, view in zip(panels, views, strict=True):
        change = 100 * changes[view.name]
        top = np.argsort(-np.abs(change), kind="stable")[:8][::-1]
        names = [str(fits[view.name].runs["run_id"][k]) for k in top]
        panel.barh(range(len(top)), change[top], color=view.colour)
        panel.set_yticks(range(len(top)), [name if len(name) < 24 else "…" + name[-22:] for name in names], fontsize=8)
        panel.set_title(view.name, fontsize=10)
        panel.axvline(0, color="0.3", lw=0.8)
        panel.set_xlabel("change of loss at 10× compute (%)", fontsize=9)
    return figure


def isoflop_figure(found: Mapping[str, IsoFlop], views: Sequence[FamilyView]) -> Figure:
    """Approach 2, for the eye only: loss against N at equal compute, parabolas and their minima."""
    figure, axes = new_figure()
    losses = []
    for view in views:
        for curve in found[view.name].curves:
            losses.append(curve.loss)
            axes.plot(curve.n, curve.loss, SHAPES[view.marker], color=view.colour, ms=4, mec="white", mew=0.4)
            axes.plot(curve.grid, curve.fitted, color=view.colour, lw=1)
            axes.plot([curve.best_n], [curve.best_loss], "*", color=view.colour, ms=11, mec="black", mew=0.5)
        slope = found[view.name].exponent_n
        power = "" if np.isnan(slope) else f": N* ∝ C^{slope:.3f}"
        axes.plot([], [], color=view.colour, label=f"{view.name}{power}")
    everything = np.concatenate(losses)
    axes.set_xscale("log")
    log_loss_axis(axes, everything.min() * 0.98, everything.max() * 1.02, views[0].runs.loss_label)
    axes.set_xlabel(AXIS_NAMES["N"])
    axes.legend(frameon=False, fontsize=9)
    return figure
