"""The same figures in Plotly, for the report: hover for details, dashed and hatched beyond the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from scaling.fitting.fit import Fit
from scaling.report.plot import Curves, axis_label, difference_limits
from scaling.report.views import (
    PALETTE,
    SLACK,
    AllocationView,
    DifferenceView,
    FamilyView,
    break_even_limits,
    loss_limits,
    loss_ticks,
    profile_signal,
    segments,
    short,
    thin,
)
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS, BackTest
from scaling.verdict.break_even import BreakEven
from scaling.verdict.compare import Comparison
from scaling.verdict.crossing_profile import Profile

HOVERED = ("N", "D", "flops", "lr", "batch_tokens", "schedule", "seed", "cluster")


def layout(figure: go.Figure, x: str, y: str, height: int = 460) -> go.Figure:
    """Common look; colours of text and grid are set by the page, which knows light from dark."""
    figure.update_layout(
        height=height,
        margin={"l": 64, "r": 18, "t": 44, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a949e", "activecolor": "#0072B2"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(title=x, type="log", exponentformat="power", dtick=1, zeroline=False, ticks="outside")
    figure.update_yaxes(title=y, zeroline=False, ticks="outside", automargin=True)
    return figure


def faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def bands(x: np.ndarray, low: np.ndarray, high: np.ndarray, measured: np.ndarray, colour: str) -> list[go.Scatter]:
    """Closed bands; hatched where no run stands behind them."""
    hatch = {"shape": "/", "size": 7, "solidity": 0.25, "fgcolor": faded(colour, 0.55), "bgcolor": "rgba(0,0,0,0)"}
    hatched, filled = {"fillpattern": hatch, "fillcolor": faded(colour, 0.3)}, {"fillcolor": faded(colour, 0.22)}
    return [
        go.Scatter(
            x=np.concatenate([x[part], x[part][::-1]]),
            y=np.concatenate([high[part], low[part][::-1]]),
            fill="toself",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            **(filled if inside else hatched),
        )
        for part, inside in segments(measured)
    ]


def lines(
    x: np.ndarray, y: np.ndarray, measured: np.ndarray, colour: str, name: str, hover: str, width: float = 3
) -> list[go.Scatter]:
    """Solid where runs stand behind the line, dashed elsewhere; one entry in the legend."""
    solid, dashed = {"color": colour, "width": width}, {"color": colour, "width": 0.8 * width, "dash": "dash"}
    common = {"mode": "lines", "hovertemplate": hover, "legendgroup": name, "name": name}
    traces = [
        go.Scatter(x=x[part], y=y[part], line=solid if inside else dashed, showlegend=False, **common)
        for part, inside in segments(measured)
    ]
    return [*traces, go.Scatter(x=[None], y=[None], line=solid, showlegend=True, **common)]


def mark_edge(figure: go.Figure, edge: float) -> None:
    figure.add_vline(x=edge, line={"color": "#888", "width": 1, "dash": "dot"})
    figure.add_annotation(
        x=np.log10(edge),
        y=1,
        yref="paper",
        text="no data beyond →",
        showarrow=False,
        xanchor="left",
        yanchor="top",
        xshift=4,
    )


def loss_figure(views: Sequence[FamilyView], curves: Curves | None = None) -> go.Figure:
    """Loss against compute with frontier, band and per-size fits."""
    figure = go.Figure()
    for view in views:
        add_curves(figure, view, curves or {})
        figure.add_traces(bands(view.flops, view.low, view.high, view.measured, view.colour))
        for flops, loss in view.size_lines:
            thin_line = {"color": faded(view.colour, 0.6), "width": 1}
            figure.add_trace(
                go.Scatter(x=flops, y=loss, mode="lines", line=thin_line, hoverinfo="skip", showlegend=False)
            )
        hover = f"{view.name}, best allocation<br>%{{x:.3g}} FLOP: %{{y:.4f}} {view.runs.loss_unit}<extra></extra>"
        figure.add_traces(lines(view.flops, view.loss, view.measured, view.colour, view.name, hover))
        figure.add_trace(end_points(view))
    mark_edge(figure, max(view.edge for view in views))
    low, high = loss_limits(views)
    left, right = min(view.flops[0] for view in views) / 2, max(view.flops[-1] for view in views)
    layout(figure, "training compute (FLOP)", f"held-out loss ({views[0].runs.loss_label})", 520)
    figure.update_xaxes(range=[np.log10(left), np.log10(right)])
    figure.update_yaxes(type="log", range=[np.log10(low), np.log10(high)], tickvals=loss_ticks(low, high))
    return figure


def add_curves(figure: go.Figure, view: FamilyView, curves: Curves) -> None:
    """All training curves of a family as one faint trace."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for run_id in view.runs["run_id"]:
        if run_id in curves:
            flops, loss = thin(curves[run_id])
            xs += [*flops.tolist(), None]
            ys += [*loss.round(5).tolist(), None]
    if xs:
        look = {"color": faded(view.colour, 0.25), "width": 1}
        name = f"{view.name}, training curves"
        figure.add_trace(go.Scatter(x=xs, y=ys, mode="lines", line=look, hoverinfo="skip", name=name, showlegend=False))


def end_points(view: FamilyView) -> go.Scatter:
    """Markers that tell everything about their run when pointed at."""
    text = []
    for row in view.runs.records():
        known = [f"{name} {describe(name, row[name])}" for name in HOVERED if row.get(name, "") != ""]
        text.append(f"<b>{row['run_id']}</b><br>loss {row['loss']:.4f}<br>" + "<br>".join(known))
    mark = {"color": view.colour, "symbol": view.marker, "size": 8, "line": {"color": "white", "width": 1}}
    return go.Scatter(
        x=view.runs["flops"],
        y=view.runs["loss"],
        mode="markers",
        marker=mark,
        text=text,
        hovertemplate="%{text}<extra></extra>",
        name=f"{view.name}, runs",
        legendgroup=view.name,
        showlegend=False,
    )


def describe(name: str, value: object) -> str:
    if isinstance(value, float):
        return short(value) if name in ("N", "D", "batch_tokens") else f"{value:.4g}"
    return str(value)


def difference_figure(view: DifferenceView) -> go.Figure:
    """B minus A with band, zero line and the crossing's interval."""
    figure, colour = go.Figure(), PALETTE[3]
    figure.add_traces(bands(view.flops, view.low, view.high, view.measured, colour))
    figure.add_hline(y=0, line={"color": "#888", "width": 1.5})
    if view.calibrated is not None:
        add_calibrated(figure, view, colour)
    hover = f"%{{x:.3g}} {view.unit}: %{{y:+.4f}} {view.loss_label}<extra></extra>"
    figure.add_traces(lines(view.flops, view.value, view.measured, colour, f"{view.b} − {view.a}", hover))
    low, high = (float(np.clip(end, view.flops[0], view.flops[-1])) for end in view.crossover)
    if low < high:
        bar = {"color": "rgba(128,128,128,0.75)", "width": 7}
        name = "crossing, 95 % interval" + (" (open to the right)" if view.crossover[1] > view.flops[-1] else "")
        figure.add_trace(go.Scatter(x=[low, high], y=[0, 0], mode="lines", line=bar, name=name, hoverinfo="name"))
    for y, name, anchor in ((1, view.a, "top"), (0.07, view.b, "bottom")):
        figure.add_annotation(
            x=0,
            y=y,
            xref="paper",
            yref="paper",
            text=f"{name} better",
            showarrow=False,
            xanchor="left",
            yanchor=anchor,
            xshift=6,
        )
    mark_edge(figure, view.edge)
    layout(figure, axis_label(view.unit), f"{view.b} − {view.a} ({view.loss_label})")
    figure.update_yaxes(range=list(difference_limits(view)))
    return figure


def add_calibrated(figure: go.Figure, view: DifferenceView, colour: str) -> None:
    """Dotted edges of the band that the back-test asks for."""
    outside = view.flops >= view.edge / SLACK
    for k, edge in enumerate(view.calibrated or ()):
        look = {"color": colour, "width": 1.5, "dash": "dot"}
        name = "band widened by the back-test"
        trace = go.Scatter(
            x=view.flops[outside], y=edge[outside], mode="lines", line=look, name=name, showlegend=k == 0
        )
        figure.add_trace(trace.update(legendgroup="calibrated", hoverinfo="skip"))


def probability_figure(view: DifferenceView) -> go.Figure:
    """P(B better) along compute."""
    figure = go.Figure()
    hover = f"%{{x:.3g}} {view.unit}: P = %{{y:.2f}}<extra></extra>"
    figure.add_traces(lines(view.flops, view.p_better, view.measured, PALETTE[2], f"P({view.b} better)", hover))
    figure.add_hline(y=0.5, line={"color": "#888", "width": 1})
    mark_edge(figure, view.edge)
    layout(figure, axis_label(view.unit), f"P({view.b} better)", 340)
    figure.update_layout(showlegend=False)
    figure.update_yaxes(range=[-0.03, 1.2], tickvals=[0, 0.25, 0.5, 0.75, 1])
    return figure


def profile_figure(profile: Profile, c: Comparison) -> go.Figure:
    """How far the squares rise when the frontiers are made to meet at each compute; one is the simulated limit."""
    figure = go.Figure()
    signal, top = profile_signal(profile)
    hover = "meeting at %{x:.3g} FLOP: %{y:.2f} of the limit<extra></extra>"
    look = {"color": PALETTE[3], "width": 3}
    figure.add_trace(go.Scatter(x=profile.budgets, y=signal, mode="lines", line=look, hovertemplate=hover))
    figure.add_hline(y=1, line={"color": "#888", "width": 1.5, "dash": "dash"})
    mark_edge(figure, c.measured[1])
    layout(figure, "compute at which it is made to overtake (FLOP)", "√(ratio / 95 % limit)", 340)
    figure.update_layout(showlegend=False)
    figure.update_xaxes(dtick=None, range=np.log10(profile.budgets[[0, -1]]).tolist())
    return figure.update_yaxes(range=[0, top])


def break_even_figure(price: BreakEven, view: DifferenceView) -> go.Figure:
    """kappa* along compute with its band."""
    figure = go.Figure()
    figure.add_traces(bands(price.flops, price.low, price.high, view.measured, PALETTE[4]))
    hover = "%{x:.3g} FLOP: κ* = %{y:.3f}<extra></extra>"
    figure.add_traces(lines(price.flops, price.estimate, view.measured, PALETTE[4], "κ*", hover))
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": "#888", "width": 1})
    mark_edge(figure, view.edge)
    layout(figure, f"compute of {price.a} (FLOP)", "break-even cost κ*", 340)
    figure.update_layout(showlegend=False)
    return figure.update_yaxes(range=list(break_even_limits(price)))


def allocation_figure(views: Sequence[AllocationView]) -> go.Figure:
    """Best number of parameters and of tokens along compute."""
    figure = go.Figure()
    for view in views:
        for (point, low, high), what in zip(view.series()[:2], ("N*", "D*"), strict=True):
            figure.add_traces(bands(view.flops, low, high, view.measured, view.colour))
            hover = f"{view.name}<br>%{{x:.3g}} FLOP: {what} = %{{y:.3g}}<extra></extra>"
            width = 3 if what == "N*" else 1.5
            name = f"{view.name}: {what}"
            figure.add_traces(lines(view.flops, point, view.measured, view.colour, name, hover, width))
    mark_edge(figure, max(view.edge for view in views))
    layout(figure, "training compute (FLOP)", "best N* (thick), D* (thin)")
    return figure.update_yaxes(type="log", exponentformat="power", dtick=1)


def backtest_figure(test: BackTest) -> go.Figure:
    """Held-out error over the raw half-width, by distance."""
    figure = go.Figure()
    for kind, colour, symbol in ((LEVELS, PALETTE[0], "circle"), (DIFFERENCE, PALETTE[3], "square")):
        points = test.of(kind)
        text = [f"{h.run_id}<br>fitted up to C_max/{h.origin:g}" for h in points]
        mark = {"color": colour, "symbol": symbol, "size": 7}
        x, y = [h.decades for h in points], [h.ratio for h in points]
        figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=mark, name=kind, text=text))
    figure.add_hline(y=1, line={"color": "#888", "width": 1, "dash": "dash"})
    layout(figure, "decades of compute beyond the fit", "|error| / raw 95 % half-width", 360)
    figure.update_yaxes(range=[0, 1.15 * max([1.0, *(h.ratio for h in test.held)])])
    figure.update_xaxes(type="linear", dtick=0.5, exponentformat="none")
    return figure


def residual_figure(fits: Mapping[str, Fit], views: Sequence[FamilyView]) -> go.Figure:
    """Observed against fitted loss in percent along compute."""
    figure = go.Figure()
    for view in views:
        percent = 100 * np.expm1(fits[view.name].residuals())
        points = end_points(view)
        points.update(y=percent, showlegend=True, name=view.name)
        points.update(hovertemplate="%{text}<br>%{y:+.2f} % from the fit<extra></extra>")
        figure.add_trace(points)
    figure.add_hline(y=0, line={"color": "#888", "width": 1})
    return layout(figure, "training compute (FLOP)", "observed − fitted loss (%)", 360)
