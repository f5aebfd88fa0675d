"""The report of a study: verdict, figures, tables, provenance, as HTML, Markdown, JSON, PNG and a terminal summary."""

from __future__ import annotations

import base64
import gzip
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from scaling.analysis import Analysis
from scaling.commands.output import plain
from scaling.ensemble.frontier import Cost
from scaling.report import interactive, plot
from scaling.report.artefact import fit_json, read_analysis, read_fit_json, report_verdict
from scaling.report.figures import Curves
from scaling.report.ledger import (
    Forecast,
    digest_of,
    holds_cell,
    ledger_sentence,
    made_of,
    next_cells,
    read_ledger,
    record,
    score,
    unasked,
    write_ledger,
)
from scaling.report.provenance import provenance_block
from scaling.report.sections import Section, charts, sections
from scaling.report.words import rounded, short
from scaling.spec import Spec
from scaling.tables.runs import Runs

SHOWN = 4  # sentences of the verdict that are shown at once
LONG_TABLE = 40  # rows beyond which the terminal shows only how many there are


@dataclass(frozen=True)
class Report:
    """A written report: where it lies, what was found, and the forecasts on record."""

    out_dir: Path
    title: str
    found: Analysis
    verdict: tuple[str, ...]
    ledger: tuple[Forecast, ...]

    def terminal_summary(self, width: int = 100) -> str:
        """Plain text that is read in ten seconds: runs, parameters with intervals, verdict."""
        found, runs = self.found, self.found.runs
        out = [f"RUNS  held-out loss, {runs.loss_label}"]
        out += (
            run_lines(runs) if len(runs) <= LONG_TABLE else [f"{f}: {len(runs.family(f))} runs" for f in found.families]
        )
        out += ["", f"LAW   {found.spec.law}; 95 % intervals of the ensemble"]
        for family in found.families:
            parts = [f"{p.name} {rounded(p.value, p.low, p.high)}" for p in found.own[family].parameters(family)]
            out += textwrap.wrap(f"{family}: {', '.join(parts)}", width, subsequent_indent="  ")
        out += ["", "VERDICT"]
        for line in self.verdict[: max(SHOWN, len(found.pairs))]:
            out += textwrap.wrap(line, width)
        out += ["", "FORECASTS", *textwrap.wrap(ledger_sentence(self.ledger), width)]
        return "\n".join(line[:width] for line in out)


def run_lines(runs: Runs) -> list[str]:
    """One line a run."""
    names = [str(name) for name in runs["run_id"]]
    width = min(max(map(len, names)), 44)
    return [
        f"{name[:width]:<{width}}  N {short(n):>6}  D {short(d):>6}  {c:.1e} FLOP  {loss:.4f}"
        for name, n, d, c, loss in zip(names, *(runs[x] for x in ("N", "D", "flops", "loss")), strict=True)
    ]


def write_report(
    runs: Runs | Analysis,
    out_dir: str | Path,
    *,
    curves: Curves | None = None,
    title: str = "",
    provenance: Mapping[str, Any] | None = None,
    spec: Spec | None = None,
    **choices: Any,
) -> Report:
    """Analyses every family, compares each with the baseline, and writes the report into `out_dir`.

    Files: report.html (self-contained), report.md, fit.json, runs.csv, forecast.jsonl (see `ledger`), one PNG a figure.
    `curves` maps run_id to arrays "tokens", "flops", "loss" of its training curve, drawn faintly. `provenance` holds
    what the table cannot tell (how rates were tuned, which data); what is absent is listed as missing. `choices` are
    fields of the Spec. Equal input gives equal bytes, the ledger's dates apart.
    """
    found = runs if isinstance(runs, Analysis) else Analysis.of(runs, spec or Spec(**choices))
    title = title or f"{name_of(found.families)}: loss against compute"
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    remove_pictures(out)
    ledger, block = updated_ledger(found, out), provenance_block(found, provenance or {})
    said = report_verdict(found)
    parts = sections(found, curves or {}, ledger, block)
    data = json.dumps(fit_json(found, ledger, block), indent=1, allow_nan=False)
    (out / "fit.json").write_text(data + "\n", encoding="utf-8")
    (out / "report.html").write_text(html_page(found, title, said, parts), encoding="utf-8")
    (out / "report.md").write_text(markdown(found, title, said, parts), encoding="utf-8")
    for chart in charts(parts):
        plot.save(plot.drawn(chart), out / f"{chart.name}.png")
    found.runs.write_csv(out / "runs.csv")
    write_ledger(out, ledger)
    return Report(out, title, found, tuple(said), tuple(ledger))


def name_of(families: Sequence[str]) -> str:
    """The families in a title, if they are few."""
    return " and ".join(families) if len(families) < 3 else f"{families[0]} and {len(families) - 1} other families"


def counts(found: Analysis) -> str:
    """How many runs every family has."""
    return ", ".join(f"{len(found.runs.family(f))} runs of {f}" for f in found.families)


def remove_pictures(out: Path) -> None:
    """Removes the pictures that an earlier report in this folder names: this one may have no successor to them."""
    old = out / "report.md"
    for name in re.findall(r"\]\(([\w.-]+\.png)\)$", old.read_text(encoding="utf-8"), re.M) if old.is_file() else ():
        (out / name).unlink(missing_ok=True)


def templates(escape: bool) -> jinja2.Environment:
    """The folder of templates; every value is escaped, for HTML by Jinja2 and for Markdown by the filter `md`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found = jinja2.Environment(loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined)
    found.filters["md"] = markdown_text
    return found


def markdown_text(text: object) -> str:
    """Text that means itself in Markdown, also inside a table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", str(text).replace("\n", " "))


def html_page(found: Analysis, title: str, said: Sequence[str], parts: Sequence[Section]) -> str:
    """One file without network; plotly.js travels compressed."""
    drawn = {chart.name: json.loads(interactive.drawn(chart).to_json()) for chart in charts(parts)}
    for figure in drawn.values():
        figure["layout"].pop("template", None)
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    return (
        templates(True)
        .get_template("page.html.j2")
        .render(
            title=title,
            counts=counts(found),
            verdict=said,
            shown=max(SHOWN, len(found.pairs)),
            sections=parts,
            charts=jinja2.utils.htmlsafe_json_dumps(plain(drawn)),
            library=packed,
        )
    )


def markdown(found: Analysis, title: str, said: Sequence[str], parts: Sequence[Section]) -> str:
    """The same as Markdown; long tables are folded where a viewer can fold."""
    page = templates(False).get_template("page.md.j2")
    return page.render(title=title, counts=counts(found), verdict=said, sections=parts)


def updated_ledger(found: Analysis, out: Path) -> list[Forecast]:
    """The folder's ledger with what the new runs score, and this table's own forecasts of the next ones."""
    runs, table = found.runs, digest_of(found.runs)
    ledger = read_ledger(out)
    if ledger and (out / "fit.json").is_file() and (out / "runs.csv").is_file():
        earlier = json.loads((out / "fit.json").read_text())
        if earlier.get("table") != table and "spec" in earlier:
            ledger = record(ledger, unasked(ledger, runs, read_analysis(out), read_fit_json(out)["table"]))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return record(score(ledger, runs, table), next_forecasts(found, now, table))


def next_forecasts(found: Analysis, now: str, table: str) -> list[Forecast]:
    """What this analysis says of the next size of each family's ladder."""
    out = []
    for family in found.families:
        e, part = found.ensemble(family), found.runs.family(family)
        if e.law.beside:  # nobody can say how often the next size will see its tokens, or how precise it is
            continue
        for n, d in next_cells(part):
            if not holds_cell(found.runs, family, n, d):
                flops = float(Cost.of(part).rate(n) * n * d)
                out.append(made_of(e.predict(n, d, family, flops=flops), now, table))
    return [f for f in out if np.isfinite(f.sd)]
