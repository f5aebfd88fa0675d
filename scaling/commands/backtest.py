"""`scaling backtest RUNS --q 2,4,10`: what cheaper runs would have predicted for dearer ones."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from typing import Any

from scaling.commands.arguments import (
    delta_of,
    fit_arguments,
    new_verb,
    objective_line,
    positive_setting,
    read_table,
    share_argument,
    shared,
    table_arguments,
)
from scaling.commands.output import GATE, OK, print_json
from scaling.fitting.solve import objective_named
from scaling.tables.runs import ScalingError
from scaling.uncertainty.backtest import BINS, DIFFERENCE, LEVELS, ORIGINS, BackTest, backtest


def add(verbs: Any) -> None:
    verb = new_verb(
        verbs, "backtest", run, "fit the cheap runs, predict the dear ones, and calibrate by what was found"
    )
    table_arguments(verb)
    fit_arguments(verb)
    share_argument(verb)
    every = ",".join(f"{q:g}" for q in ORIGINS)
    verb.add_argument("--q", default=every, help=f"fit the runs below C_max / q, for each q (default {every})")


def run(a: argparse.Namespace) -> int:
    """Gate: no origin leaves enough runs to fit."""
    runs = read_table(a)
    origins = [positive_setting(text, "--q") for text in a.q.split(",")]
    if min(origins) <= 1:
        raise ScalingError(f"--q {a.q}: every q must be above 1, else nothing is held out")
    delta = delta_of(a, runs)
    found = backtest(runs, origins, shared(a), a.law, a.objective, delta, a.draws, a.seed)
    if a.json:
        print_json({"held": [asdict(h) for h in found.held], "skipped": list(found.skipped)})
    else:
        print("\n".join(lines(found, len(runs.families) > 1)))
        print(objective_line(a, objective_named(a.objective, delta)))
    return OK if found.held else GATE


def lines(found: BackTest, several: bool) -> list[str]:
    """A sentence and a table by distance for losses, and for differences of families."""
    out = []
    for kind in (LEVELS, DIFFERENCE) if several else (LEVELS,):
        out.append(found.sentence(kind))
        for low, high in itertools.pairwise(BINS):
            ratios = [h.ratio for h in found.of(kind) if low < h.decades <= high]
            if ratios:
                inside = sum(r <= 1 for r in ratios) / len(ratios)
                factor, count = found.factor(kind, high)
                text = f"  {low:g} to {high:g} decades beyond: raw interval covers {inside:.0%} of {len(ratios)}"
                out.append(f"{text}; half-widths times {factor:.2f} (from {count} points)")
    return [*out, *(f"left out: {reason}" for reason in found.skipped)]
