"""Charts in Plotly, for the page: the same marks, with details when pointed at."""

from __future__ import annotations

import html
from functools import singledispatch
from typing import Any

import numpy as np
import plotly.graph_objects as go

from scaling.report.chart import Band, Chart, Line, Points, Rule, segments

DIGITS = 6  # significant, of every number in the page


def drawn(chart: Chart) -> go.Figure:
    """A chart as a figure; colours of text and grid are set by the page, which knows light from dark."""
    figure = go.Figure()
    for mark in chart.marks:
        add(mark, figure, chart)
    figure.update_layout(
        height=int(100 * chart.height),
        margin={"l": 64, "r": 18, "t": 44, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a949e", "activecolor": "#0072B2"},
        font={"family": "system-ui, sans-serif", "size": 13},
        showlegend=any(getattr(mark, "name", "") for mark in chart.marks),
    )
    scale = {"type": "log", "exponentformat": "power", "dtick": 1}
    figure.update_xaxes(title=safe(chart.x_label), zeroline=False, ticks="outside", **(scale if chart.x_log else {}))
    figure.update_yaxes(title=safe(chart.y_label), zeroline=False, ticks="outside", automargin=True)
    if chart.y_log:
        figure.update_yaxes(**({"type": "log"} if chart.y_ticks else scale))
    if chart.y_range:
        ends = np.log10(chart.y_range) if chart.y_log else np.array(chart.y_range)
        figure.update_yaxes(range=ends.tolist())
    if chart.y_ticks:
        figure.update_yaxes(tickvals=list(chart.y_ticks))
    return figure


def safe(text: str) -> str:
    """Names are data: Plotly reads some HTML in every text, and mathematics between dollar signs."""
    return html.escape(str(text)).replace("$", "&#36;").replace("\n", "<br>")


def few_digits(values: np.ndarray) -> list[float]:
    return [float(f"{v:.{DIGITS}g}") for v in np.asarray(values, float)]


def faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


@singledispatch
def add(mark: Any, figure: go.Figure, chart: Chart) -> None:
    """One mark into the figure."""
    raise TypeError(f"no way to draw a {type(mark).__name__}")


@add.register
def add_line(mark: Line, figure: go.Figure, chart: Chart) -> None:
    measured = np.ones(len(mark.x), bool) if mark.measured is None else mark.measured
    for k, (part, inside) in enumerate(segments(measured)):
        style = {"color": faded(mark.colour, mark.faint), "width": mark.width} | ({} if inside else {"dash": "dash"})
        shown = bool(mark.name) and k == 0
        hover = {"hoverinfo": "skip"} if mark.faint < 1 else {"hovertemplate": "%{x:.3g}: %{y:.5g}<extra></extra>"}
        ends = {"x": few_digits(mark.x[part]), "y": few_digits(mark.y[part]), "mode": "lines", "line": style}
        figure.add_trace(go.Scatter(**ends, name=safe(mark.name), showlegend=shown, **hover))


@add.register
def add_band(mark: Band, figure: go.Figure, chart: Chart) -> None:
    measured = np.ones(len(mark.x), bool) if mark.measured is None else mark.measured
    hatch = {"shape": "/", "size": 7, "solidity": 0.25, "fgcolor": faded(mark.colour, 0.55), "bgcolor": "rgba(0,0,0,0)"}
    for part, inside in segments(measured):
        x = few_digits(np.concatenate([mark.x[part], mark.x[part][::-1]]))
        y = few_digits(np.concatenate([mark.high[part], mark.low[part][::-1]]))
        fill = {} if inside else {"fillpattern": hatch}
        common = {"fill": "toself", "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip", "showlegend": False}
        figure.add_trace(go.Scatter(x=x, y=y, fillcolor=faded(mark.colour, 0.22 if inside else 0.3), **common, **fill))


@add.register
def add_points(mark: Points, figure: go.Figure, chart: Chart) -> None:
    look = {"color": mark.colour, "symbol": mark.shape, "size": 8, "line": {"color": "white", "width": 1}}
    told = {"text": [safe(t) for t in mark.text], "hovertemplate": "%{text}<extra></extra>"} if len(mark.text) else {}
    ends = {"x": few_digits(mark.x), "y": few_digits(mark.y), "mode": "markers", "marker": look}
    figure.add_trace(go.Scatter(**ends, name=safe(mark.name), showlegend=bool(mark.name), **told))


@add.register
def add_rule(mark: Rule, figure: go.Figure, chart: Chart) -> None:
    if mark.axis == "y":
        figure.add_hline(y=mark.at, line={"color": "#888", "width": 1.2})
        return
    figure.add_vline(x=mark.at, line={"color": "#888", "width": 1, "dash": "dot"})
    place = float(np.log10(mark.at)) if chart.x_log else mark.at
    where = {"x": place, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top", "xshift": 4}
    figure.add_annotation(text=safe(mark.words), showarrow=False, **where)
