"""The report of a study: verdict, figures, tables, provenance, as HTML, Markdown, JSON, PNG and a terminal summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling.fitting.approaches import IsoFlop, isoflop
from scaling.fitting.fit import Fit, Gate, fit, ladder_gate
from scaling.lint import Finding, lint
from scaling.report import diagnostics, plot
from scaling.report.artefact import fit_json
from scaling.report.provenance import provenance_block
from scaling.report.summary import terminal_summary
from scaling.report.views import AllocationView, DifferenceView, FamilyView, difference_view, family_view
from scaling.tables.runs import Runs
from scaling.uncertainty.backtest import DIFFERENCE, LEVELS, BackTest, backtest
from scaling.uncertainty.bootstrap import Draws, bootstrap
from scaling.uncertainty.sensitivity import Variant, influence, sensitivity
from scaling.verdict.compare import Comparison, compare
from scaling.verdict.nested import Nested, nested

BASELINE = "transformer++"
NESTED_DRAWS = 200


@dataclass(frozen=True)
class Report:
    """What a report found and where it lies. `gates`: every check; `verdict`: the sentences at its top.

    Per family: fits, draws, variants (sensitivity), influences (n,), isoflops. Per comparison, in the same order: tests
    (back-tests) and steps (nested models); a lone family has one back-test and no steps.
    """

    out_dir: Path
    title: str
    runs: Runs
    fits: dict[str, Fit]
    draws: dict[str, Draws]
    comparisons: tuple[Comparison, ...]
    tests: tuple[BackTest, ...]
    steps: tuple[Nested, ...]
    variants: dict[str, list[Variant]]
    influences: dict[str, np.ndarray]
    isoflops: dict[str, IsoFlop]
    findings: tuple[Finding, ...]
    gates: tuple[Gate, ...]
    verdict: tuple[str, ...]
    provenance: dict[str, Any]
    views: tuple[FamilyView, ...]
    allocations: tuple[AllocationView, ...]
    differences: tuple[DifferenceView, ...]

    def terminal_summary(self, width: int = 100) -> str:
        """Plain text that is read in ten seconds: runs, fitted parameters with intervals, verdict."""
        return terminal_summary(self.runs, self.fits, self.draws, self.verdict, width)


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
    delta: float = 1e-3,
    share: Sequence[str] = ("E",),
    baseline: str | None = None,
) -> Report:
    """Fits every family, compares each with the baseline, and writes the report into `out_dir`.

    Files: report.html (self-contained), report.md, fit.json, draws.npz (each family's centred draws), runs.csv, one
    PNG per figure. `curves` maps run_id to arrays "tokens", "flops", "loss" of its training curve, drawn faintly.
    `provenance` holds what the table cannot tell (how rates were tuned, which data); what is absent is listed as
    missing. Equal input gives equal bytes.
    """
    from scaling.report.render import html_page, markdown

    report = analyse(runs, Path(out_dir), title, provenance or {}, draws, seed, law, objective, delta, share, baseline)
    out = report.out_dir
    out.mkdir(parents=True, exist_ok=True)
    write_figures(report, curves)
    data = fit_json(
        report.fits, report.draws, report.comparisons, report.tests, report.gates, report.verdict, report.provenance
    )
    (out / "fit.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    np.savez_compressed(out / "draws.npz", **{f: d.theta for f, d in report.draws.items()})  # type: ignore[arg-type]
    (out / "report.html").write_text(html_page(report, curves), encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    runs.write_csv(out / "runs.csv")
    return report


def analyse(
    runs: Runs,
    out: Path,
    title: str,
    provenance: Mapping[str, Any],
    draws: int,
    seed: int,
    law: str,
    objective: str,
    delta: float,
    share: Sequence[str],
    baseline: str | None,
) -> Report:
    """Everything a report says, before any of it is written."""
    fits = {f: fit(runs.family(f), law, objective, delta, seed=seed) for f in runs.families}
    sampled = {f: bootstrap(fits[f], draws, seed) for f in fits}
    first = pick_baseline(runs, baseline)
    others = [f for f in runs.families if f != first]
    pairs = tuple(compare(runs, first, f, share, draws, seed, law, objective, delta) for f in others)
    tested = [c.fit.runs for c in pairs] or [runs]
    tests = tuple(backtest(r, share=share, law=law, objective=objective, delta=delta, seed=seed) for r in tested)
    steps = tuple(nested(runs, first, f, NESTED_DRAWS, seed) for f in others if law == "chinchilla")
    gates = report_gates(runs, fits, pairs)
    seen = family_views(sampled, pairs)
    return Report(
        out_dir=out,
        title=title,
        runs=runs,
        fits=fits,
        draws=sampled,
        comparisons=pairs,
        tests=tests,
        steps=steps,
        variants={f: sensitivity(runs.family(f), law, delta) for f in fits},
        influences={f: influence(fits[f]) for f in fits},
        isoflops={f: isoflop(runs.family(f)) for f in fits},
        findings=tuple(lint(runs)),
        gates=gates,
        verdict=tuple(report_verdict(fits, pairs, tests, steps, gates)),
        provenance=provenance_block(runs, fits, sampled, provenance, draws, seed),
        views=tuple(view for view, _ in seen),
        allocations=tuple(allocation for _, allocation in seen),
        differences=tuple(difference_view(c, t) for c, t in zip(pairs, tests, strict=False)),
    )


def pick_baseline(runs: Runs, baseline: str | None) -> str:
    """The family that the others are compared with: the one asked for, else Transformer++, else the first."""
    if baseline is None:
        return BASELINE if BASELINE in runs.families else runs.families[0]
    return str(runs.family(baseline)["family"][0])


def report_gates(runs: Runs, fits: Mapping[str, Fit], pairs: Sequence[Comparison]) -> tuple[Gate, ...]:
    """Every check once, the fit's own named by family."""
    own = [(f, g) for f in fits for g in fits[f].gates]
    out = [Gate(g.name if "[" in g.name else f"{g.name} [{f}]", g.passed, g.message) for f, g in own]
    out += [ladder_gate(runs, family) for family in fits]
    for c in pairs:
        out += [Gate(f"{g.name} [{c.b} v. {c.a}]", g.passed, g.message) for g in c.gates if "[" not in g.name]
    return tuple(out)


def report_verdict(
    fits: Mapping[str, Fit],
    pairs: Sequence[Comparison],
    tests: Sequence[BackTest],
    steps: Sequence[Nested],
    gates: Sequence[Gate],
) -> list[str]:
    """The comparisons' verdicts with what back-test and nested models add, or what a lone family's fit is good for."""
    if pairs:
        out = []
        for i, c in enumerate(pairs):
            out += list(c.verdict) + [n.sentence() for n in steps[i : i + 1]]
            out.append(tests[i].sentence(DIFFERENCE if c.draws.paired else LEVELS))
        return out
    family = next(iter(fits))
    failed = [g for g in gates if not g.passed]
    if failed:
        return [f"{family}: {len(failed)} of {len(gates)} checks fail.", *(f"{g.name}: {g.message}." for g in failed)]
    return [
        f"{family}: all {len(gates)} checks pass; there is no second family to compare with.",
        tests[0].sentence(LEVELS),
    ]


def family_views(sampled: Mapping[str, Draws], pairs: Sequence[Comparison]) -> list[tuple[FamilyView, AllocationView]]:
    """Frontiers from the joint fit that the verdict rests on, or from the lone fit."""
    if not pairs:
        return [family_view(draws, family, i) for i, (family, draws) in enumerate(sampled.items())]
    baseline = family_view(pairs[0].draws, pairs[0].a, 0)
    return [baseline, *(family_view(c.draws, c.b, i + 1) for i, c in enumerate(pairs))]


def write_figures(report: Report, curves: plot.Curves | None) -> None:
    """One PNG per figure; those without content are not written."""
    figures = {
        "loss": plot.loss_figure(report.views, curves),
        "residuals": plot.residual_figure(report.fits, report.views),
        "allocation": diagnostics.allocation_figure(report.allocations),
        "sensitivity": diagnostics.sensitivity_figure(report.variants, report.views),
        "influence": diagnostics.influence_figure(report.fits, report.influences, report.views),
    }
    for i, view in enumerate(report.differences):
        tail = pair_tail(report, i)
        figures[f"difference{tail}"] = plot.difference_figure(view)
        figures[f"probability{tail}"] = plot.probability_figure(view)
    for i, test in enumerate(report.tests):
        if test.held:
            figures[f"backtest{pair_tail(report, i)}"] = diagnostics.backtest_figure(test)
    if all(found.curves for found in report.isoflops.values()):
        figures["isoflop"] = diagnostics.isoflop_figure(report.isoflops, report.views)
    for name, figure in figures.items():
        plot.save(figure, report.out_dir / f"{name}.png")


def pair_tail(report: Report, place: int) -> str:
    """File name ending of a comparison's figures: nothing when there is one, else the second family's name."""
    return "" if len(report.comparisons) < 2 else f"-{report.comparisons[place].b}"
