"""Figure of a fit's certificate: whether the random starts ended at one optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scaling.fitting.fit import AGREEMENT, Fit
from scaling.report.plot import SHAPES, new_figure
from scaling.report.views import FamilyView

ROUNDING, TOP = 1e-16, 10.0  # gaps outside are drawn at the edge


def starts_figure(fits: Mapping[str, Fit], views: Sequence[FamilyView]) -> Figure:
    """Relative excess of every start's objective over the best, ascending; starts below the line agree."""
    figure, axes = new_figure(3.4)
    for view in views:
        c = fits[view.name].certificate
        share = (np.arange(c.starts) + 1) / c.starts
        look: Any = {
            "color": view.colour,
            "ms": 5,
            "mec": "white",
            "mew": 0.5,
            "ls": "none",
            "marker": SHAPES[view.marker],
        }
        label = f"{view.name}: {c.agreeing} of {c.starts} starts agree"
        axes.plot(share, np.clip(c.gaps, ROUNDING, TOP), label=label, **look)
    axes.axhline(AGREEMENT, color="0.3", lw=1, ls="--")
    axes.text(0.01, AGREEMENT * 1.6, f"agreement: {AGREEMENT:g}", fontsize=8, color="0.35")
    axes.set_yscale("log")
    axes.set_ylim(ROUNDING / 3, 3 * TOP)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the starts")
    axes.set_ylabel("objective above the best\n(relative)")
    axes.legend(loc="center", frameon=False, fontsize=9)
    return figure
