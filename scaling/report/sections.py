"""The report as one list of sections, from which the page and its Markdown are made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling.analysis import Analysis
from scaling.costs import AXES, available_axes, axis_cost, lacking
from scaling.ensemble.ensemble import Ensemble
from scaling.fitting.sensitivity import influence, sensitivity
from scaling.lint import lint
from scaling.report import figures
from scaling.report.chart import Chart
from scaling.report.ledger import Forecast, ledger_sentence
from scaling.report.words import (
    backtest_sentence,
    chance,
    crossing_sentence,
    frontier_sentences,
    matched_rows,
    matched_sentences,
    reach_sentence,
    rounded,
    short,
)
from scaling.tables.runs import Runs

MOST_ROWS = 300  # of a table in the page; all of them are in runs.csv
PROPORTIONAL = 0.01  # spread of the log of cost over FLOP below which an axis shows nothing new
INFLUENTIAL = 5  # rows shown of the influence table, per family
RUN_COLUMNS = ("run_id", "family", "N", "D", "flops", "loss", "loss_se", "bpb", "lr", "cluster", "schedule", "seed")


@dataclass(frozen=True)
class Table:
    """Cells are plain text; `wide` columns may wrap; `folded`: shown when asked for, under this title."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    wide: tuple[int, ...] = ()
    folded: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order: sentences, tables and charts."""

    title: str
    parts: tuple[Any, ...] = field(default=())


def sections(
    found: Analysis, curves: figures.Curves, ledger: Sequence[Forecast], provenance: dict[str, Any]
) -> list[Section]:
    """Loss against compute, matched cells, frontiers, then the rest."""
    out = [Section("Loss against compute", (figures.loss_chart(found, curves),))]
    for k, pair in enumerate(found.pairs):
        tail = f"-{k + 1}" if len(found.pairs) > 1 else ""
        out += [matched_section(pair, tail), frontier_section(found, pair, tail)]
    out += [Section("Fitted laws", (PARAMETERS, parameter_table(found), *tie_tables(found)))]
    if (chart := figures.allocation_chart(found)) is not None:
        out.append(Section("Best allocation", (allocation_table(found), chart, *kept([figures.isoflop_chart(found)]))))
    out.append(checks_section(found))
    for k, e in enumerate(found.pairs or tuple(found.own.values())):
        tail = f"-{k + 1}" if len(found.pairs) > 1 else ""
        title = f"Back-test: {' and '.join(e.families)}"
        out.append(Section(title, (backtest_sentence(e), *kept([figures.backtest_chart(e.test, f"backtest{tail}")]))))
    out.append(sensitivity_section(found))
    out.append(Section("Residuals", (figures.residual_chart(found),)))
    out.append(Section("Runs", (runs_table(found.runs), set_aside(found.runs))))
    out.append(Section("Forecasts", (ledger_sentence(ledger), *forecast_tables(ledger))))
    out.append(Section("Provenance", (provenance_table(provenance),)))
    return out


def kept(parts: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(part for part in parts if part is not None)


def charts(parts: Sequence[Section]) -> list[Chart]:
    """Every chart of a report."""
    return [part for section in parts for part in section.parts if isinstance(part, Chart)]


def matched_section(pair: Ensemble, tail: str) -> Section:
    """What needs no law."""
    title = f"Matched cells: {pair.b} − {pair.a}"
    return Section(
        title, (*matched_sentences(pair), *kept([figures.cells_chart(pair, f"cells{tail}")]), *cells_table(pair))
    )


def cells_table(pair: Ensemble) -> tuple[Table, ...]:
    """Both losses and their difference in every matched cell."""
    one, two = matched_rows(pair)
    runs, rows = pair.runs, []
    for i, j in zip(one, two, strict=True):
        a, b = runs["loss"][i], runs["loss"][j]
        place = short(runs["N"][i]), short(runs["D"][i]), f"{runs['flops'][i]:.1e}"
        rows.append((*place, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"))
    header = ("N", "D", "FLOP", pair.a, pair.b, "difference")
    return (Table(header, tuple(rows[:MOST_ROWS]), folded="The numbers"),) if rows else ()


def frontier_section(found: Analysis, pair: Ensemble, tail: str) -> Section:
    """The difference of the frontiers on every cost axis, the crossing, and the price that would break even."""
    axes, same = axes_apart(pair, available_axes(pair.runs, found.spec.prices, pair.law))
    parts: list[Any] = crossing_sentences(pair) + frontier_sentences(pair) * (len(found.pairs) > 1)
    for axis in axes:
        name = f"difference{tail}" if axis == "flops" else f"difference-{axis}{tail}"
        parts += [figures.difference_chart(pair, name, axis), difference_table(pair, axis)]
    if same:
        parts.append(
            f"Proportional to FLOP in these runs, so that nothing differs: {', '.join(AXES[x] for x in same)}."
        )
    missing = [
        f"{AXES[axis]} {reason}" for axis in AXES if (reason := lacking(pair.runs, axis, found.spec.prices, pair.law))
    ]
    parts += [f"Not shown: {'; '.join(missing)}."] * bool(missing)
    return Section(f"Frontiers: {pair.b} − {pair.a}", tuple(parts))


def axes_apart(pair: Ensemble, axes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Axes on which something may differ from FLOP, this first, and those on which nothing can."""
    ratios = {axis: axis_cost(pair.runs, axis, pair.spec.prices) / pair.runs["flops"] for axis in axes}
    same = [axis for axis in axes if axis != "flops" and np.ptp(np.log(ratios[axis])) < PROPORTIONAL]
    return [axis for axis in axes if axis not in same], same


def crossing_sentences(pair: Ensemble) -> list[str]:
    """The crossing along the optimum, the middle ratio of tokens to parameters and the middle size; what is undecided
    everywhere is said once."""
    first = pair.crossing()
    out, open_too = [crossing_sentence(pair, first, "Best allocation")], []
    if pair.law.has_allocation:
        # Families may part where sizes are fixed (by memory) or the ratio is (by custom), and not where each has its
        # best allocation: three questions, three answers.
        # In the middle both have runs: the largest size may be one run of one family.
        ratio, size = (float(np.exp(np.median(np.log(x)))) for x in (pair.runs["D"] / pair.runs["N"], pair.runs["N"]))
        paths = {
            f"ratio={ratio:.2g}": f"At {ratio:.2g} tokens a parameter",
            f"size={size:.3g}": f"At {short(size)} parameters",
        }
        for path, words in paths.items():
            found = pair.crossing(along=path)
            if found.kind == first.kind == "open":
                open_too.append(words)
            else:
                out.append(crossing_sentence(pair, found, words))
    return [*out, *[f"Nor {' or '.join(open_too).replace('At', 'at')}."] * bool(open_too)]


def difference_table(pair: Ensemble, axis: str) -> Table:
    """The difference at two budgets a decade and at both ends of the ladder, P where it is validated."""
    # The table has eight budgets a decade, for curves; every fourth is enough to read, and both ends of the ladder.
    every = pair.table(axis)
    ends = {round(float(np.log10(end)), 9) for end in pair.measured(axis)}
    rows = []
    for k, row in enumerate(every):
        if k % 4 and k + 1 < len(every) and round(float(np.log10(row["budget"])), 9) not in ends:
            continue
        p = "not validated" if row["p_b_better"] is None else chance(row["p_b_better"]).removeprefix("= ")
        rows.append((f"{row['budget']:.2e}", rounded(row["difference"], row["low"], row["high"], "+"), p))
    header = (AXES[axis], f"{pair.b} − {pair.a}, 95 %", f"P({pair.b} better)")
    return Table(header, tuple(rows), folded="The numbers")


PARAMETERS = (
    "Each family by itself: median and 95 % interval of its ensemble, which weighs a misfit and what was assumed before"
    " any run. The single best fit knows neither, and may lie outside where the runs hardly tell the exponents."
)


def parameter_table(found: Analysis) -> Table:
    """Each family's law: the ensemble's interval, and the single best fit beside it."""
    rows = []
    for family in found.families:
        for p in found.own[family].parameters(family):
            told = "" if p.identified else "not told by the runs"
            best = f"{found.fits[family].params[p.name]:.6g}"
            rows.append((family, p.name, rounded(p.value, p.low, p.high), best, told))
    return Table(("family", "parameter", "ensemble, 95 %", "single best fit", "note"), tuple(rows))


def tie_tables(found: Analysis) -> tuple[Table, ...]:
    """How much the runs support each set of shared parameters."""
    out = []
    for pair in found.pairs:
        rows = [(", ".join(tie) or "nothing", f"{weight:.3f}") for tie, weight in pair.tie_weights.items()]
        out.append(Table((f"{pair.a} and {pair.b} share", "posterior weight"), tuple(rows)))
    return tuple(out)


def allocation_table(found: Analysis) -> Table:
    """Best N and D at the largest run and one decade beyond."""
    rows = []
    for family in found.families:
        e = found.own[family]
        for times in (1.0, 10.0):
            x = e.allocate(float(e.runs["flops"].max()) * times, family)
            ends = [
                "{} ({} to {})".format(*map(short, (v, *pair)))
                for v, pair in ((x.N, x.N_interval), (x.D, x.D_interval))
            ]
            where = "within the runs" if x.decades < 1e-6 else "yes" if x.validated else reach_sentence(e)
            rows.append((family, f"{x.flops:.1e}", *ends, rounded(x.loss, *x.loss_interval), where))
    return Table(("family", "FLOP", "best N", "best D", "loss", "validated"), tuple(rows), wide=(5,))


def checks_section(found: Analysis) -> Section:
    """Every check once, those that fail first; certificates, and what lint says beyond the checks."""
    ordered = sorted(found.gates, key=lambda g: g.passed)
    gates = [(g.name, "pass" if g.passed else "fails", g.message) for g in ordered]
    certificates = []
    for family, fitted in found.fits.items():
        c = fitted.certificate
        numbers = (
            f"{c.objective:.6g}",
            f"{c.gradient:.1e}",
            f"{c.agreeing} of {c.starts}",
            f"{c.second_solver_gap:+.1e}",
        )
        certificates.append((family, *numbers, f"{c.condition:.1e}"))
    findings = [(f.name, f.message, f.listed()) for f in lint(found.runs) if f.severity != "error"]
    header = ("fit", "objective", "gradient", "starts agreeing", "second solver", "condition")
    parts = [Table(("check", "result", "what was found"), tuple(gates), wide=(2,)), Table(header, tuple(certificates))]
    if findings:
        parts.append(Table(("note", "what was found", "runs"), tuple(findings), wide=(1, 2)))
    return Section("Checks", tuple(parts))


def sensitivity_section(found: Analysis) -> Section:
    """How far choices move single fits, and the runs that move them most."""
    variants = {f: sensitivity(found.runs.family(f), found.spec.law, found.delta) for f in found.families}
    kinds = dict.fromkeys((v.objective, v.dropped) for one in variants.values() for v in one)
    rows = []
    for objective, dropped in kinds:
        name = objective if dropped == "none" else f"{objective}, without {dropped}"
        own = [
            next((v for v in variants[f] if (v.objective, v.dropped) == (objective, dropped)), None)
            for f in found.families
        ]
        cells = [f"{v.allocation:.3f}" if v and np.isfinite(v.allocation) else "–" for v in own]
        cells += [f"{v.params['E']:.3f}" if v and "E" in v.params else "–" for v in own]
        rows.append((name, *cells))
    header = ("refit", *(f"{f}: exponent of N*" for f in found.families), *(f"{f}: E" for f in found.families))
    heavy = []
    for family, fitted in found.fits.items():
        change = influence(fitted)
        for k in np.argsort(-np.abs(change), kind="stable")[:INFLUENTIAL]:
            heavy.append((str(fitted.runs["run_id"][k]), family, f"{100 * change[k]:+.2f} %"))
    text = (
        "How far single best fits, which know no misfit, move under other objectives (lad: least absolute deviations; "
        "log-ls, raw-ls: least squares of log loss, of loss) and without some runs. N* goes as compute to the exponent."
    )
    table = Table(("run left out", "family", "change of the forecast at 10 times the compute"), tuple(heavy))
    return Section("Sensitivity of single fits", (text, Table(header, tuple(rows)), table))


def runs_table(runs: Runs) -> Table:
    """The runs, or the first of very many."""
    present = [c for c in RUN_COLUMNS if c in runs.columns]
    some = runs.select(np.arange(min(len(runs), MOST_ROWS)))
    rows = tuple(tuple(cell(name, row[name]) for name in present) for row in some.records())
    title = (
        ""
        if len(runs) <= 40
        else f"{len(runs)} runs"
        if len(runs) <= MOST_ROWS
        else f"{MOST_ROWS} of {len(runs)} runs; runs.csv holds all"
    )
    return Table(tuple(present), rows, folded=title)


def cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return short(value) if name in ("N", "D") else f"{value:.5g}"
    return str(value)


def set_aside(runs: Runs) -> str:
    if not runs.set_aside:
        return "No run was excluded."
    return "Excluded: " + "; ".join(f"{row['run_id']} ({row['reason']})" for row in runs.set_aside) + "."


def forecast_tables(ledger: Sequence[Forecast]) -> tuple[Table, ...]:
    """Scored forecasts, then those that wait for their runs."""
    out = []
    for scored in (True, False):
        rows = []
        for f in (f for f in ledger if f.scored is scored):
            row: tuple[str, ...] = (f.family, short(f.N), short(f.D), rounded(f.loss, f.low, f.high))
            if f.observed is not None:
                row += (f.run_id, f"{f.observed:.4f}", f"{100 * f.error:+.2f} %", "yes" if f.covered else "no")
            rows.append(row)
        header = (
            "family",
            "N",
            "D",
            "forecast of a run, 95 %",
            *(("run", "observed", "error", "inside") if scored else ()),
        )
        if rows:
            out.append(Table(header, tuple(rows[:MOST_ROWS])))
    return tuple(out)


def provenance_table(block: dict[str, Any]) -> Table:
    """What is known, and in one row what nobody recorded."""
    rows = [(k, figures_of(v)) for k, v in block.items() if v is not None]
    absent = ", ".join(k for k, v in block.items() if v is None)
    return Table(("item", "value"), (*rows, *[("missing", absent)] * bool(absent)), wide=(1,))


def figures_of(value: Any) -> str:
    """A provenance value as one line of text; of a SHA-256 the first digits, which tell two apart."""
    if isinstance(value, dict):
        return "; ".join(f"{k}: {figures_of(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(figures_of(v) for v in value) or "none"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
