"""A figure as data: marks on two axes, drawn by Matplotlib (`plot.py`) and by Plotly (`interactive.py`) alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5D3A9B", "#4D4D4D", "#B8B000")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
MOST_POINTS = 1500  # of one family in a picture; more are thinned evenly, and the page says so
UNSUPPORTED = "Dashed or hatched: no run stands behind it."


@dataclass(frozen=True)
class Line:
    """y along x; dashed where `measured` is false; without a name it has no entry in the legend."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    name: str = ""
    measured: np.ndarray | None = None
    width: float = 2.2
    faint: float = 1.0


@dataclass(frozen=True)
class Band:
    """Between low and high; hatched where `measured` is false."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    colour: str
    measured: np.ndarray | None = None


@dataclass(frozen=True)
class Points:
    """Markers; text: what each says when pointed at; bars: half-open intervals (n, 2) about them."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    shape: str = "circle"
    name: str = ""
    text: Sequence[str] = ()
    bars: np.ndarray | None = None


@dataclass(frozen=True)
class Rule:
    """A straight line across: at a height (axis "y") or a place (axis "x"), with words beside it."""

    at: float
    axis: str = "y"
    words: str = ""


@dataclass(frozen=True)
class Chart:
    """What to draw, and what it shows in words: the caption is also the text alternative. The horizontal axis is
    logarithmic unless told; y_ticks: values to mark on a logarithmic loss axis."""

    name: str
    caption: str
    x_label: str
    y_label: str
    marks: tuple[Any, ...]
    x_log: bool = True
    y_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    y_ticks: tuple[float, ...] = ()
    height: float = 4.6


def segments(measured: np.ndarray) -> list[tuple[slice, bool]]:
    """Stretches of equal flags as slices; those outside the data reach to their neighbours, so that lines join."""
    edges = np.flatnonzero(np.diff(measured.astype(int)))
    pairs = zip([0, *(edges + 1)], [*edges, len(measured) - 1], strict=True)
    return [
        (slice(start, end + 1), True) if measured[start] else (slice(max(start - 1, 0), end + 2), False)
        for start, end in pairs
    ]


def loss_ticks(low: float, high: float) -> tuple[float, ...]:
    """About six round tick values for a logarithmic loss axis."""
    step = (high - low) / 6
    unit = 10.0 ** np.floor(np.log10(step))
    step = unit * min((m for m in (1, 2, 2.5, 5, 10) if m * unit >= step), default=10)
    return tuple(np.round(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step, 10).tolist())
