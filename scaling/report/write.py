"""The report of a study: verdict, figures, tables, provenance, as HTML, Markdown, JSON, PNG and a terminal summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaling.fitting.fit import Gate
from scaling.report import diagnostics, plot
from scaling.report.agreement import starts_figure
from scaling.report.analysis import Analysis, Settings, analyse
from scaling.report.approaches import approaches_figure
from scaling.report.artefact import family_json, fit_json, read_draws, read_fit_json, write_draws
from scaling.report.forecast import Forecaster
from scaling.report.html import html_page
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
from scaling.report.markdown import markdown
from scaling.report.summary import terminal_summary
from scaling.tables.runs import Runs
from scaling.uncertainty.sensitivity import delta_from_noise, objective_text
from scaling.verdict.costs import CITED, Prices
from scaling.verdict.frontier import Cost


@dataclass(frozen=True)
class Report:
    """A written report: where it lies, what was found, and the forecasts on record."""

    out_dir: Path
    title: str
    found: Analysis
    ledger: tuple[Forecast, ...]

    @property
    def gates(self) -> tuple[Gate, ...]:
        return self.found.gates

    @property
    def verdict(self) -> tuple[str, ...]:
        return self.found.verdict

    def terminal_summary(self, width: int = 100) -> str:
        """Plain text that is read in ten seconds: runs, fitted parameters with intervals, verdict."""
        found = self.found
        goal = objective_text(next(iter(found.fits.values())).objective, found.settings.delta_found)
        forecasts = ledger_sentence(self.ledger)
        return terminal_summary(found.runs, found.fits, found.draws, goal, found.verdict, forecasts, width)


def write_report(
    runs: Runs,
    out_dir: str | Path,
    *,
    curves: plot.Curves | None = None,
    title: str = "Loss against compute",
    provenance: Mapping[str, Any] | None = None,
    draws: int = 2000,
    seed: int = 0,
    law: str = "chinchilla",
    objective: str = "huber",
    delta: float | None = None,
    share: Sequence[str] | None = None,
    baseline: str | None = None,
    prices: Prices = CITED,
) -> Report:
    """Fits every family, compares each with the baseline, and writes the report into `out_dir`.

    Files: report.html (self-contained), report.md, fit.json, draws.npz (each family's centred draws), runs.csv,
    forecast.jsonl (see `ledger`), one PNG per figure. `curves` maps run_id to arrays "tokens", "flops", "loss" of its
    training curve, drawn faintly. `provenance` holds what the table cannot tell (how rates were tuned, which data);
    what is absent is listed as missing. `delta` is the Huber threshold, None for `delta_from_noise`. Equal input gives
    equal bytes, the ledger's dates apart.
    """
    threshold = delta_from_noise(runs, law) if delta is None else delta
    settings = Settings(law, objective, threshold, draws, seed, share, baseline, prices, delta is None)
    found, out = analyse(runs, settings, provenance or {}), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    ledger = updated_ledger(found, out)
    data = fit_json(found, ledger)
    write_figures(found, out, curves)
    (out / "fit.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_draws(out, {family: draws.theta for family, draws in found.draws.items()})
    (out / "report.html").write_text(html_page(found, title, ledger, curves), encoding="utf-8")
    (out / "report.md").write_text(markdown(found, title, ledger), encoding="utf-8")
    runs.write_csv(out / "runs.csv")
    write_ledger(out, ledger)
    return Report(out, title, found, tuple(ledger))


def updated_ledger(found: Analysis, out: Path) -> list[Forecast]:
    """The folder's ledger with what the new runs score, and this table's own forecasts of the next ones."""
    runs, table = found.runs, digest_of(found.runs)
    ledger = read_ledger(out)
    if ledger and all((out / name).is_file() for name in ("fit.json", "draws.npz", "runs.csv")):
        data, draws = read_fit_json(out), read_draws(out)
        earlier = {f: Forecaster.of(entry, draws[f]) for f, entry in data["families"].items()}
        if data["table"] != table:
            seen = Runs.read(out / "runs.csv", allow_midrun=True)
            ledger = record(ledger, unasked(ledger, runs, seen, data["table"], earlier))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return record(score(ledger, runs, table), [made_of(p, now, table, *cell) for cell, p in next_forecasts(found)])


def next_forecasts(found: Analysis) -> list[tuple[tuple[str, float, float], Any]]:
    """What this table's fits say of the next size of each family's ladder."""
    out = []
    for family, fitted in found.fits.items():
        draws, part = found.draws[family], found.runs.family(family)
        forecaster, cost = Forecaster.of(family_json(fitted, draws, found.test_of(family)), draws.theta), Cost.of(part)
        if set(forecaster.asks) - {"flops"}:  # nobody can say how often the next size will see its tokens
            continue
        for n, d in next_cells(part):
            if not holds_cell(found.runs, family, n, d):
                out.append(((family, n, d), forecaster.at(n, d, flops=float(cost.rate(n) * n * d))))
    return out


def write_figures(found: Analysis, out: Path, curves: plot.Curves | None) -> None:
    """One PNG per figure; those without content are not written."""
    figures = {
        "loss": plot.loss_figure(found.views, curves),
        "residuals": plot.residual_figure(found.fits, found.views),
        "sensitivity": diagnostics.sensitivity_figure(found.variants, found.views),
        "influence": diagnostics.influence_figure(found.fits, found.influences, found.views),
        "starts": starts_figure(found.fits, found.views),
    }
    if found.allocations:
        figures["allocation"] = diagnostics.allocation_figure(found.allocations)
        figures["approaches"] = approaches_figure(found.views, found.allocations)
    for pair in found.pairs:
        tail = found.tail(pair.main.b)
        figures[f"difference{tail}"] = plot.difference_figure(pair.views["flops"])
        figures[f"probability{tail}"] = plot.probability_figure(pair.views["flops"])
        if len(pair.views) > 1:
            figures[f"axes{tail}"] = plot.axes_figure(list(pair.views.values()))
        figures[f"profile{tail}"] = diagnostics.profile_figure(pair.profile, pair.main)
        if pair.price:
            figures[f"break-even{tail}"] = diagnostics.break_even_figure(pair.price, pair.views["flops"])
    for test, family in zip(found.tests, [pair.main.b for pair in found.pairs] or [""], strict=True):
        if test.held:
            figures[f"backtest{found.tail(family)}"] = diagnostics.backtest_figure(test)
    if all(isoflops.curves for isoflops in found.isoflops.values()):
        figures["isoflop"] = diagnostics.isoflop_figure(found.isoflops, found.views)
    for name, figure in figures.items():
        plot.save(figure, out / f"{name}.png")
