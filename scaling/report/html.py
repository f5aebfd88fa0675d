"""The report as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit
from scaling.report import interactive, page
from scaling.report.analysis import Analysis, Pair
from scaling.report.captions import CAPTIONS
from scaling.report.ledger import Forecast, ledger_sentence
from scaling.report.plot import Curves
from scaling.report.summary import (
    crossing_rows,
    difference_rows,
    figures_of,
    forecast_rows,
    interval_text,
    pair_rows,
    parameter_table,
    path_rows,
)
from scaling.report.views import DifferenceView, short
from scaling.tables.runs import Runs
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS
from scaling.verdict.costs import AXES, Prices, lacking
from scaling.verdict.nested import MEANING, Nested
from scaling.verdict.words import headline, p_measured

RUN_COLUMNS = ("run_id", "family", "N", "D", "flops", "loss", "loss_se", "bpb", "lr", "cluster", "schedule", "seed")
INFLUENTIAL = 5  # rows shown of the influence table, per family


def html_page(found: Analysis, title: str, ledger: Sequence[Forecast], curves: Curves | None) -> str:
    """Verdict first, then difference, crossing and prices, loss against compute, parameters, runs, checks, diagnostics,
    forecasts, provenance."""
    counts = ", ".join(f"{len(v.runs)} runs of {v.name}" for v in found.views)
    parts = [f"<h1>{page.escape(title)}</h1><p class='soft'>{page.escape(counts)}</p>", page.verdict_box(found.verdict)]
    for place, pair in enumerate(found.pairs):
        parts += [difference_section(place, pair, found), crossing_section(place, pair)]
    if found.others:
        parts.append(page.section("Every pair", every_pair(found)))
    loss = interactive.loss_figure(found.views, curves)
    residuals = interactive.residual_figure(found.fits, found.views)
    parts += [
        page.section("Loss against compute", page.figure("loss", loss, CAPTIONS["loss"])),
        page.section("Fitted parameters", *parameter_tables(found), nested_table(found.steps) if found.steps else ""),
        *allocation_section(found),
        page.section("Runs", runs_table(found.runs), set_aside(found.runs)),
        page.section("Checks", gate_table(found), certificate_table(found), findings_table(found)),
        page.section("Back-test", *backtest_parts(found)),
        page.section("Sensitivity", sensitivity_table(found), influence_table(found)),
        page.section("Residuals", page.figure("residuals", residuals, CAPTIONS["residuals"])),
        page.section("Forecasts", forecast_tables(ledger)),
        page.section("Provenance", provenance_table(found)),
    ]
    return page.document(title, "".join(parts))


def difference_section(place: int, pair: Pair, found: Analysis) -> str:
    """The difference and P(better) on every cost axis, one shown at a time, and the break-even price."""
    c, group = pair.main, f"pair-{place}"
    panels = {axis: axis_panel(f"{place}-{axis}", view, pair) for axis, view in pair.views.items()}
    chooser = page.chooser(group, "Cost axis", {axis: AXES[axis] for axis in panels}, panels)
    prices = found.settings.prices
    rest = missing_axes(c.fit, prices) + price_part(place, pair, prices)
    return page.section(f"Difference: {c.b} − {c.a}", chooser, rest)


def allocation_section(found: Analysis) -> list[str]:
    """Best N and D, for laws that know one."""
    if not found.allocations:
        return []
    drawn = interactive.allocation_figure(found.allocations)
    return [page.section("Best allocation", page.figure("allocation", drawn, CAPTIONS["allocation"]))]


def axis_panel(name: str, view: DifferenceView, pair: Pair) -> str:
    """One cost axis: what it says, the difference, P(better), and the numbers behind both."""
    axis = name.partition("-")[2]
    c = pair.axes[axis]
    said = f"<p>{page.escape(headline(c))} {page.escape(p_measured(c))}</p>"
    header, rows = difference_rows(view)
    return (
        said
        + page.figure(f"difference-{name}", interactive.difference_figure(view), CAPTIONS["difference"])
        + page.figure(f"probability-{name}", interactive.probability_figure(view), CAPTIONS["probability"])
        + page.details("The numbers", page.table(header, rows, tall=True))
    )


def missing_axes(fitted: Fit, prices: Prices) -> str:
    """Which axes cannot be shown, and what the table or the law would need for them."""
    found = {axis: lacking(fitted.runs, axis, prices, fitted.law) for axis in AXES}
    reasons = [f"{AXES[axis]} {reason}" for axis, reason in found.items() if reason]
    return f"<p class='soft'>Not shown: {page.escape('; '.join(reasons))}.</p>" if reasons else ""


def price_part(place: int, pair: Pair, prices: Prices) -> str:
    """Break-even cost of a ternary operation, and the table of energies behind the axis of arithmetic energy."""
    if pair.price is None:
        return ""
    said = f"<h3>Break-even cost κ*</h3><p>{page.escape(pair.price.sentence(pair.main.measured[1]))}</p>"
    figure = interactive.break_even_figure(pair.price, pair.views["flops"])
    rows = [[page.escape(name), f"{e.picojoules:g}", page.escape(e.source)] for name, e in prices.energies.items()]
    energies = page.table(["operation class", "pJ per operation", "source"], rows, wrap=[2])
    return (
        said
        + page.figure(f"break-even-{place}", figure, CAPTIONS["break-even"])
        + page.details("Energy per operation (replace any with --energy CLASS=PJ)", energies)
    )


def crossing_section(place: int, pair: Pair) -> str:
    """The crossing by profile and by draws: intervals, one-sided bounds, chances."""
    c = pair.main
    figure = interactive.profile_figure(pair.profile, c)
    return page.section(
        f"Crossing: {c.b} and {c.a}",
        f"<p>{page.escape(pair.profile.sentence(c.a, c.b, c.unit))}</p>",
        page.figure(f"profile-{place}", figure, CAPTIONS["profile"]),
        page.table(*crossing_rows(pair.main, pair.profile)),
        page.table(*path_rows(pair.paths)),
    )


def every_pair(found: Analysis) -> str:
    """All pairs at the largest compute that both of a pair reached."""
    header, rows = pair_rows([pair.main for pair in found.pairs] + list(found.others))
    return page.table(header, [[page.escape(c) for c in row] for row in rows])


def forecast_tables(ledger: Sequence[Forecast]) -> str:
    """Scored forecasts, then those that wait for their runs."""
    out = [f"<p>{page.escape(ledger_sentence(ledger))}</p>"]
    for scored in (True, False):
        header, rows = forecast_rows([f for f in ledger if f.scored is scored], scored)
        if rows:
            out.append(page.table(header, [[page.escape(c) for c in row] for row in rows], tall=True))
    return "".join(out)


def nested_table(found: Nested) -> str:
    """Nested models with their tests, and the sentence on parameter efficiency."""
    header = ["model", "shared", "parameters", "AICc", "p against the next", "held-out error"]
    rows = []
    for s in found.steps:
        shared = ", ".join(s.share) or "nothing"
        numbers = [f"{s.aicc:.1f}", dash(s.p_value, ".3f"), dash(s.held_out, ".4f")]
        rows.append([f"{s.name} {MEANING[s.name]}", shared, str(s.parameters), *numbers])
    text = f"<p class='soft'>{page.escape(found.sentence())}</p>"
    return text + page.table(header, [[page.escape(c) for c in row] for row in rows])


def dash(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "–"


def backtest_parts(found: Analysis) -> list[str]:
    """Sentence and figure of each back-test."""
    out = []
    for place, test in enumerate(found.tests):
        kinds = [LEVELS, DIFFERENCE] if found.pairs else [LEVELS]
        out += [f"<p>{page.escape(test.sentence(kind))}</p>" for kind in kinds]
        if test.held:
            out.append(page.figure(f"backtest-{place}", interactive.backtest_figure(test), CAPTIONS["backtest"]))
    return out


def sensitivity_table(found: Analysis) -> str:
    """Allocation exponent and floor under other objectives and exclusions, a column a family."""
    families = list(found.variants)
    header = ["refit", *(f"{f}: a" for f in families), *(f"{f}: E" for f in families)]
    kinds = dict.fromkeys((v.objective, v.dropped) for f in families for v in found.variants[f])
    rows = []
    for objective, dropped in kinds:
        name = objective if dropped == "none" else f"{objective}, without {dropped}"
        own = {f: v for f in families for v in found.variants[f] if (v.objective, v.dropped) == (objective, dropped)}
        exponents = [dash(own[f].allocation, ".3f") if f in own else "–" for f in families]
        floors = [f"{own[f].params['E']:.3f}" if f in own and "E" in own[f].params else "–" for f in families]
        rows.append([page.escape(name), *exponents, *floors])
    return "<p class='soft'>N* ∝ C^a. How far choices move the fit:</p>" + page.table(header, rows)


def influence_table(found: Analysis) -> str:
    """The runs whose absence would move a ten-fold extrapolation most."""
    rows = []
    for family, change in found.influences.items():
        ids = found.fits[family].runs["run_id"]
        for k in np.argsort(-np.abs(change), kind="stable")[:INFLUENTIAL]:
            rows.append([page.escape(ids[k]), page.escape(family), f"{100 * change[k]:+.2f} %"])
    return page.table(["run left out", "family", "loss at 10× compute"], rows)


def findings_table(found: Analysis) -> str:
    """What lint has to say about the design."""
    rows = [[page.escape(x) for x in (f.name, f.severity, f.message, f.listed())] for f in found.findings]
    return (
        page.table(["design", "kind", "finding", "rows"], rows, wrap=[2, 3])
        if rows
        else "<p class='soft'>No design faults.</p>"
    )


def parameter_tables(found: Analysis) -> list[str]:
    """Each family's own fit, then the joint one with its shared terms."""
    names = next(iter(found.fits.values())).law.names
    form = "L = E + A/N^α + B/D^β" if names == ("E", "A", "B", "alpha", "beta") else ", ".join(names)
    intro = f"<p class='soft'>{page.escape(form)}; 95 % intervals in brackets. First each family fitted on its own.</p>"
    out = [intro, page.table(*parameter_table(found.fits, found.draws))]
    if found.joint:
        fitted, ends = found.joint.fit, found.joint.intervals()
        rows = [[page.escape(n), f"{v:.5g}", interval_text(ends[n])] for n, v in fitted.params.items()]
        shared = ", ".join(fitted.share) or "nothing"
        text = f"Joint fit of {', '.join(fitted.families)}, sharing {shared}; the comparisons rest on it."
        out += [f"<p class='soft'>{page.escape(text)}</p>", page.table(["parameter", "value", "95 % interval"], rows)]
    return out


def runs_table(runs: Runs) -> str:
    present = [c for c in RUN_COLUMNS if c in runs.columns]
    rows = [[page.escape(cell(name, row[name])) for name in present] for row in runs.records()]
    return page.table(present, rows, tall=True)


def cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return short(value) if name in ("N", "D") else f"{value:.5g}"
    return str(value)


def set_aside(runs: Runs) -> str:
    if not runs.set_aside:
        return "<p class='soft'>No run was excluded.</p>"
    listed = "; ".join(f"{row['run_id']} ({row['reason']})" for row in runs.set_aside)
    return f"<p class='soft'>Excluded: {page.escape(listed)}.</p>"


def gate_table(found: Analysis) -> str:
    rows = [[page.escape(g.name), page.mark(g.passed), page.escape(g.message)] for g in found.gates]
    return page.table(["check", "result", "what was found"], rows, wrap=[2])


def certificate_table(found: Analysis) -> str:
    rows = []
    for name, fitted in certified(found):
        c = fitted.certificate
        cells = [
            f"{c.objective:.6g}",
            f"{c.gradient:.1e}",
            f"{c.agreeing} of {c.starts}",
            f"{c.second_solver_gap:+.1e}",
        ]
        rows.append([page.escape(name), *cells, f"{c.condition:.1e}"])
    header = ["fit", "objective", "gradient", "starts agreeing", "second solver", "condition"]
    return page.table(header, rows)


def certified(found: Analysis) -> list[tuple[str, Fit]]:
    return [*found.fits.items(), *([("joint fit", found.joint.fit)] if found.joint else [])]


def provenance_table(found: Analysis) -> str:
    rows = []
    for name, value in found.provenance.items():
        shown = '<span class="missing">missing</span>' if value is None else page.escape(figures_of(value))
        rows.append([page.escape(name), shown])
    return page.table(["item", "value"], rows, wrap=[1])
