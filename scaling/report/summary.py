"""Numbers as text: the tables that the terminal summary, the HTML page and the Markdown share."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit
from scaling.report.ledger import Forecast
from scaling.report.views import DifferenceView, short
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import Draws, sorted_clusters
from scaling.verdict.compare import Comparison
from scaling.verdict.crossing_profile import Profile
from scaling.verdict.words import bound_text

TERMINAL_SENTENCES = 4  # the rest of the verdict is in the report
LONG_TABLE = 40  # rows beyond which the terminal shows only how many there are


def interval_text(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.3g}, {ends[1]:.3g}]"


def parameter_table(fits: Mapping[str, Fit], draws: Mapping[str, Draws]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a parameter, one column a family, intervals in brackets.

    Six digits: a prediction from the printed values is within 0.01 % of the fit.
    """
    ends = {family: draws[family].intervals() for family in fits}
    names = list(dict.fromkeys(name for fitted in fits.values() for name in fitted.law.names))
    rows = [[n, *(f"{fits[f].params[n]:.6g} {interval_text(ends[f][n])}" for f in fits)] for n in names]
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


def difference_rows(view: DifferenceView) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the difference, its band and P(better) along the budgets shown."""
    kinds = ["runs" if inside else "law" for inside in view.measured]
    rows = [
        [f"{x:.2e}", f"{d:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{p:.3f}", kind]
        for x, d, low, high, p, kind in zip(
            view.flops, view.value, view.low, view.high, view.p_better, kinds, strict=True
        )
    ]
    return [view.unit, f"{view.b} − {view.a}", "95 % band", f"P({view.b} better)", "rests on"], rows


def crossing_rows(c: Comparison, profile: Profile) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every way to put the crossing, none of them a bare point."""
    x, unit = c.crossover, c.unit
    rows = [
        ["95 % interval, draws", ends_text(x.low, x.high, unit)],
        ["95 % interval, profile likelihood", ends_text(profile.low, profile.high, unit)],
        [f"{c.b} takes the lead above (95 % one-sided)", bound_text(x.lower_bound(), unit)],
        [f"{c.b} leads by (95 % one-sided)", bound_text(x.upper_bound(), unit)],
        [f"P(no crossing before {x.horizon:.0e} {unit})", f"{x.p_none:.3f}"],
        [f"P({c.b} leads throughout)", f"{x.p_always:.3f}"],
        [f"P({c.b} does not lead at {x.horizon:.0e} {unit})", f"{x.p_never:.3f}"],
    ]
    tens = 10.0 ** np.arange(np.ceil(np.log10(c.budgets[0])), np.log10(x.horizon) + 1e-9)
    chances = [[f"P({c.b} leads for good by {at:.0e} {unit})", f"{x.p_before(at):.3f}"] for at in tens]
    return ["crossing", "value"], rows + chances


def path_rows(paths: Mapping[str, tuple[Comparison, Profile]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the crossing along every path, by draws and by profile."""
    rows = []
    for path, (c, profile) in paths.items():
        kind, _, number = path.partition("=")
        names = {"ratio": f"{number} tokens a parameter", "size": f"{short(float(number or 0))} parameters"}
        by_draws = ends_text(c.crossover.low, c.crossover.high, c.unit)
        by_profile = ends_text(profile.low, profile.high, c.unit)
        chances = [f"{c.p_b_better[c.last_measured]:.3f}", f"{c.crossover.p_none:.3f}"]
        rows.append([names.get(kind, "best allocation"), by_draws, by_profile, *chances])
    some = next(iter(paths.values()))[0]
    better = f"P({some.b} better), largest measured"
    return ["along", "95 % interval, draws", "95 % interval, profile", better, "P(no crossing)"], rows


def ends_text(low: float, high: float, unit: str) -> str:
    """An interval whose open ends are said to be open."""
    if np.isnan(low):
        return "none before the horizon"
    if np.isinf(low) or (low == 0 and np.isinf(high)):
        return "no crossing before the horizon" if np.isinf(low) else "anything, or none"
    if np.isinf(high):
        return f"above {low:.2e} {unit}, or none"
    return f"below {bound_text(high, unit)}" if low == 0 else f"{low:.2e} to {high:.2e} {unit}"


def pair_rows(every: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each pair at the largest compute that both reached, and its crossing."""
    rows = []
    for c in every:
        k = c.last_measured
        low, high = (float(v[k]) for v in c.band(c.difference_draws))
        crossing = ends_text(c.crossover.low, c.crossover.high, c.unit)
        difference = f"{c.difference[k]:+.4f} [{low:+.4f}, {high:+.4f}]"
        rows.append([f"{c.b} − {c.a}", f"{c.budgets[k]:.1e}", difference, f"{c.p_b_better[k]:.3f}", crossing])
    return ["pair", "FLOP", "difference, 95 %", "P(first better)", "crossing, 95 %"], rows


def forecast_rows(ledger: Sequence[Forecast], scored: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of scored forecasts, or of those that wait."""
    header = ["family", "N", "D", "forecast", "95 % interval of a run", "from table"]
    rows = [
        [f.family, short(f.N), short(f.D), f"{f.loss:.4f}", f"[{f.low:.4f}, {f.high:.4f}]", f.table[:8]] for f in ledger
    ]
    if not scored:
        return header, rows
    outcomes = [
        [
            f.made,
            f.run_id,
            f"{f.observed:.4f}",
            f"{100 * f.error:+.2f} %",
            "yes" if f.covered else "no",
            f"{f.log_score:+.2f}",
            f"{f.interval_score:.4f}",
            f"{f.pit:.2f}",
        ]
        for f in ledger
    ]
    told = ["made", "run", "observed", "error", "covered", "log score", "interval score", "PIT"]
    return header + told, [one + two for one, two in zip(rows, outcomes, strict=True)]


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
    runs: Runs,
    fits: Mapping[str, Fit],
    draws: Mapping[str, Draws],
    objective: str,
    verdict: Sequence[str],
    forecasts: str,
    width: int,
) -> str:
    """Runs, fitted parameters with intervals, verdict, how forecasts did; lines no longer than `width`."""
    header, rows = paired_rows(runs)
    out = [f"RUNS  held-out loss, {runs.loss_label}"]
    if len(rows) <= LONG_TABLE:
        out += columns(header, rows, width)
    else:
        out += [f"{f}: {len(runs.family(f))} runs" for f in runs.families]
    some = next(iter(fits.values()))
    how = f"95 % intervals by {next(iter(draws.values())).method} bootstrap"
    out += ["", *textwrap.wrap(f"FIT   {some.law.name}, {objective}; {how}", width)]
    out += columns(*parameter_table(fits, draws), width)
    out += ["", "VERDICT"]
    for line in verdict[:TERMINAL_SENTENCES]:
        out += textwrap.wrap(line, width)
    out += ["", "FORECASTS", *textwrap.wrap(forecasts, width)]
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
