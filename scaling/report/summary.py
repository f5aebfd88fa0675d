"""Numbers as text: the tables that the terminal summary, the HTML page and the Markdown share."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit
from scaling.report.views import short
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import Draws, sorted_clusters

TERMINAL_SENTENCES = 4  # the rest of the verdict is in the report
LONG_TABLE = 40  # rows beyond which the terminal shows only how many there are


def interval_text(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.3g}, {ends[1]:.3g}]"


def parameter_table(fits: Mapping[str, Fit], draws: Mapping[str, Draws]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a parameter, one column a family, intervals in brackets."""
    ends = {family: draws[family].intervals() for family in fits}
    names = list(dict.fromkeys(name for fitted in fits.values() for name in fitted.law.names))
    rows = [[n, *(f"{fits[f].params[n]:.4g} {interval_text(ends[f][n])}" for f in fits)] for n in names]
    return ["parameter", *fits], rows


def paired_rows(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Header and rows: families side by side where their cells match in number, else one row a run."""
    ordered = {f: np.concatenate(sorted_clusters(runs, f)) for f in runs.families}
    matched = len(ordered) > 1 and len({len(rows) for rows in ordered.values()}) == 1
    if matched:
        tokens = [runs["D"][rows] for rows in ordered.values()]
        matched = all(np.allclose(tokens[0], t, rtol=0.05) for t in tokens[1:])
    if not matched:
        rows = [
            [r["run_id"], r["family"], short(r["N"]), short(r["D"]), f"{r['flops']:.2e}", f"{r['loss']:.4f}"]
            for r in runs.records()
        ]
        return ["run", "family", "N", "D", "FLOP", "loss"], rows
    first = next(iter(ordered.values()))
    rows = []
    for place, row in enumerate(first):
        losses = [runs["loss"][ordered[f][place]] for f in ordered]
        gaps = [f"{other - losses[0]:+.4f}" for other in losses[1:]]
        flops = f"{runs['flops'][row]:.1e}"
        rows.append([short(runs["N"][row]), short(runs["D"][row]), flops, *(f"{x:.4f}" for x in losses), *gaps])
    names = list(ordered)
    return [
        "N",
        "D",
        "FLOP",
        *names,
        *(["difference"] if len(names) == 2 else [f"{n} − {names[0]}" for n in names[1:]]),
    ], rows


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Aligned text columns; too wide a table is set one field a line."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    if sum(widths) + 2 * len(widths) > width:
        return [line for row in rows for line in stacked(header, row)]
    align = [str.ljust] + [str.rjust] * (len(header) - 1)
    return ["  ".join(align[i](str(r[i]), widths[i]) for i in range(len(header))) for r in [header, *rows]]


def stacked(header: Sequence[str], row: Sequence[str]) -> list[str]:
    return [str(row[0]), *(f"  {name:<8} {value}" for name, value in zip(header[1:], row[1:], strict=True))]


def terminal_summary(
    runs: Runs, fits: Mapping[str, Fit], draws: Mapping[str, Draws], verdict: Sequence[str], width: int
) -> str:
    """Runs, fitted parameters with intervals, verdict; lines no longer than `width`."""
    header, rows = paired_rows(runs)
    out = ["RUNS  held-out loss, nats per token"]
    if len(rows) <= LONG_TABLE:
        out += columns(header, rows, width)
    else:
        out += [f"{f}: {len(runs.family(f))} runs" for f in runs.families]
    some = next(iter(fits.values()))
    how = f"95 % intervals by {next(iter(draws.values())).method} bootstrap"
    out += ["", f"FIT   {some.law.name}, {some.objective.name}; {how}"]
    out += columns(*parameter_table(fits, draws), width)
    out += ["", "VERDICT"]
    for line in verdict[:TERMINAL_SENTENCES]:
        out += textwrap.wrap(line, width)
    return "\n".join(line[:width] for line in out)


def figures_of(value: Any) -> str:
    """A provenance value as one line of text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {figures_of(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(figures_of(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
