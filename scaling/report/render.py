"""The report as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit
from scaling.report import interactive, page
from scaling.report.plot import Curves
from scaling.report.summary import figures_of, interval_text, paired_rows, parameter_table
from scaling.report.views import short
from scaling.report.write import Report, pair_tail
from scaling.tables.runs import Runs
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS
from scaling.verdict.nested import MEANING, Nested

RUN_COLUMNS = ("run_id", "family", "N", "D", "flops", "loss", "loss_se", "bpb", "lr", "cluster", "schedule", "seed")
INFLUENTIAL = 5  # rows shown of the influence table, per family
CAPTIONS = {
    "difference": "Difference of the two compute-optimal frontiers with its 95 % band. Below zero the second family is "
    "better. Dashed and hatched: no run is that large; dotted: the band as the back-test would have it.",
    "probability": "Share of bootstrap draws in which the second family has the lower loss.",
    "loss": "Held-out loss against training compute. Points: end-of-schedule runs; thin lines: fitted loss along each "
    "size's token budgets; thick lines: best allocation at each compute, with 95 % band; dashed and hatched: beyond "
    "the data; faint: training curves.",
    "allocation": "Best number of parameters (thick) and of tokens (thin) at each compute, with 95 % bands.",
    "backtest": "What cheaper runs would have predicted for dearer ones: error over the raw 95 % half-width. Points "
    "above one were missed.",
    "residuals": "What each family's own fit leaves unexplained.",
}


def html_page(report: Report, curves: Curves | None) -> str:
    """Verdict first, then difference, loss against compute, parameters, runs, checks, diagnostics, provenance."""
    counts = ", ".join(f"{len(v.runs)} runs of {v.name}" for v in report.views)
    title = page.escape(report.title)
    parts = [f"<h1>{title}</h1><p class='soft'>{page.escape(counts)}</p>", page.verdict_box(report.verdict)]
    for i, view in enumerate(report.differences):
        parts.append(
            page.section(
                f"Difference: {view.b} − {view.a}",
                page.figure(f"difference-{i}", interactive.difference_figure(view), CAPTIONS["difference"]),
                page.figure(f"probability-{i}", interactive.probability_figure(view), CAPTIONS["probability"]),
            )
        )
    loss = interactive.loss_figure(report.views, curves)
    allocation = interactive.allocation_figure(report.allocations)
    residuals = interactive.residual_figure(report.fits, report.views)
    parts += [
        page.section("Loss against compute", page.figure("loss", loss, CAPTIONS["loss"])),
        page.section("Fitted parameters", *parameter_tables(report), *[nested_table(n) for n in report.steps]),
        page.section("Best allocation", page.figure("allocation", allocation, CAPTIONS["allocation"])),
        page.section("Runs", runs_table(report.runs), set_aside(report.runs)),
        page.section("Checks", gate_table(report), certificate_table(report), findings_table(report)),
        page.section("Back-test", *backtest_parts(report)),
        page.section("Sensitivity", sensitivity_table(report), influence_table(report)),
        page.section("Residuals", page.figure("residuals", residuals, CAPTIONS["residuals"])),
        page.section("Provenance", provenance_table(report)),
    ]
    return page.document(report.title, "".join(parts))


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


def backtest_parts(report: Report) -> list[str]:
    """Sentence and figure of each back-test."""
    out = []
    for i, test in enumerate(report.tests):
        kinds = [LEVELS, DIFFERENCE] if report.comparisons else [LEVELS]
        out += [f"<p>{page.escape(test.sentence(kind))}</p>" for kind in kinds]
        if test.held:
            out.append(page.figure(f"backtest-{i}", interactive.backtest_figure(test), CAPTIONS["backtest"]))
    return out


def sensitivity_table(report: Report) -> str:
    """Allocation exponent and floor under other objectives and exclusions, a column a family."""
    families = list(report.variants)
    header = ["refit", *(f"{f}: a" for f in families), *(f"{f}: E" for f in families)]
    kinds = dict.fromkeys((v.objective, v.dropped) for f in families for v in report.variants[f])
    rows = []
    for objective, dropped in kinds:
        name = objective if dropped == "none" else f"{objective}, without {dropped}"
        found = {f: v for f in families for v in report.variants[f] if (v.objective, v.dropped) == (objective, dropped)}
        exponents = [dash(found[f].allocation, ".3f") if f in found else "–" for f in families]
        floors = [f"{found[f].params['E']:.3f}" if f in found and "E" in found[f].params else "–" for f in families]
        rows.append([page.escape(name), *exponents, *floors])
    return "<p class='soft'>N* ∝ C^a. How far choices move the fit:</p>" + page.table(header, rows)


def influence_table(report: Report) -> str:
    """The runs whose absence would move a ten-fold extrapolation most."""
    rows = []
    for family, change in report.influences.items():
        ids = report.fits[family].runs["run_id"]
        for k in np.argsort(-np.abs(change), kind="stable")[:INFLUENTIAL]:
            rows.append([page.escape(ids[k]), page.escape(family), f"{100 * change[k]:+.2f} %"])
    return page.table(["run left out", "family", "loss at 10× compute"], rows)


def findings_table(report: Report) -> str:
    """What lint has to say about the design."""
    rows = [[page.escape(f.name), page.escape(f.severity), page.escape(f.message)] for f in report.findings]
    return (
        page.table(["design", "kind", "finding"], rows, wrap=[2]) if rows else "<p class='soft'>No design faults.</p>"
    )


def parameter_tables(report: Report) -> list[str]:
    """Each family's own fit, then the joint one with its shared terms."""
    names = next(iter(report.fits.values())).law.names
    form = "L = E + A/N^α + B/D^β" if names == ("E", "A", "B", "alpha", "beta") else ", ".join(names)
    intro = f"<p class='soft'>{page.escape(form)}; 95 % intervals in brackets. First each family fitted on its own.</p>"
    out = [intro, page.table(*parameter_table(report.fits, report.draws))]
    for c in report.comparisons:
        ends = c.draws.intervals()
        rows = [[page.escape(n), f"{v:.5g}", interval_text(ends[n])] for n, v in c.fit.params.items()]
        shared = ", ".join(c.fit.share) or "nothing"
        out.append(f"<p class='soft'>{page.escape(f'Joint fit of {c.a} and {c.b}, sharing {shared}.')}</p>")
        out.append(page.table(["parameter", "value", "95 % interval"], rows))
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


def gate_table(report: Report) -> str:
    rows = [[page.escape(g.name), page.mark(g.passed), page.escape(g.message)] for g in report.gates]
    return page.table(["check", "result", "what was found"], rows, wrap=[2])


def certificate_table(report: Report) -> str:
    rows = []
    for name, fitted in certified(report):
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


def certified(report: Report) -> list[tuple[str, Fit]]:
    joint = [(f"joint: {c.a}, {c.b}", c.fit) for c in report.comparisons]
    return [*report.fits.items(), *joint]


def provenance_table(report: Report) -> str:
    rows = []
    for name, value in report.provenance.items():
        shown = '<span class="missing">missing</span>' if value is None else page.escape(figures_of(value))
        rows.append([page.escape(name), shown])
    return page.table(["item", "value"], rows, wrap=[1])


def markdown(report: Report) -> str:
    """The same report as Markdown, figures linked."""
    out = [f"# {report.title}", "", *(f"{line}\n" for line in report.verdict)]
    for i in range(len(report.comparisons)):
        for name in ("difference", "probability"):
            out += [f"![{CAPTIONS[name]}]({name}{pair_tail(report, i)}.png)", ""]
    out += [f"![{CAPTIONS['loss']}](loss.png)", "", "## Fitted parameters", ""]
    out += markdown_table(*parameter_table(report.fits, report.draws))
    out += ["", "## Runs", "", *markdown_table(*paired_rows(report.runs)), "", "## Checks", ""]
    rows = [[g.name, "pass" if g.passed else "**fails**", g.message] for g in report.gates]
    out += [
        *markdown_table(["check", "result", "what was found"], rows),
        "",
        f"![{CAPTIONS['residuals']}](residuals.png)",
        "",
    ]
    out += ["## Provenance", ""]
    block = report.provenance.items()
    out += markdown_table(["item", "value"], [[k, "missing" if v is None else figures_of(v)] for k, v in block])
    return "\n".join(out) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]
