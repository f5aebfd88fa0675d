"""The report as Markdown, figures linked."""

from __future__ import annotations

from collections.abc import Sequence

from scaling.report.analysis import Analysis
from scaling.report.captions import CAPTIONS
from scaling.report.ledger import Forecast, ledger_sentence
from scaling.report.summary import (
    crossing_rows,
    figures_of,
    forecast_rows,
    pair_rows,
    paired_rows,
    parameter_table,
    path_rows,
)
from scaling.verdict.costs import AXES
from scaling.verdict.words import headline


def markdown(found: Analysis, title: str, ledger: Sequence[Forecast]) -> str:
    """Verdict first, then what the page holds, in the same order."""
    out = [f"# {title}", "", *(f"{line}\n" for line in found.verdict)]
    for pair in found.pairs:
        tail, c = found.tail(pair.main.b), pair.main
        out += [f"## Difference: {c.b} − {c.a}", ""]
        for name in ("difference", "probability", "profile", *(["break-even"] if pair.price else [])):
            out += [picture(name, f"{name}{tail}"), ""]
        out += [*markdown_table(*crossing_rows(c, pair.profile)), "", *markdown_table(*path_rows(pair.paths)), ""]
        out += [picture("axes", f"axes{tail}"), ""] if len(pair.axes) > 1 else []
        other = [[AXES[axis], headline(other)] for axis, other in pair.axes.items() if axis != "flops"]
        out += [*markdown_table(["cost axis", "verdict"], other), ""]
    if found.others:
        every = [pair.main for pair in found.pairs] + list(found.others)
        out += ["## Every pair", "", *markdown_table(*pair_rows(every)), ""]
    out += ["## Loss against compute", "", picture("loss", "loss"), "", "## Fitted parameters", ""]
    out += markdown_table(*parameter_table(found.fits, found.draws))
    out += ["", "## Best allocation", "", picture("allocation", "allocation")] if found.allocations else []
    out += ["", "## Runs", "", *markdown_table(*paired_rows(found.runs)), "", "## Checks", ""]
    rows = [[g.name, "pass" if g.passed else "**fails**", g.message] for g in found.gates]
    faults = [[f.name, f.severity, f.message, f.listed()] for f in found.findings]
    out += [*markdown_table(["check", "result", "what was found"], rows), ""]
    out += [*markdown_table(["design", "kind", "finding", "rows"], faults), "", picture("residuals", "residuals"), ""]
    out += ["## Forecasts", "", ledger_sentence(ledger), ""]
    for scored in (True, False):
        out += [*markdown_table(*forecast_rows([f for f in ledger if f.scored is scored], scored)), ""]
    out += ["## Provenance", ""]
    block = found.provenance.items()
    out += markdown_table(["item", "value"], [[k, "missing" if v is None else figures_of(v)] for k, v in block])
    return "\n".join(out) + "\n"


def picture(caption: str, name: str) -> str:
    return f"![{CAPTIONS[caption]}]({name}.png)"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, or nothing where there are no rows."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)] if rows else []
