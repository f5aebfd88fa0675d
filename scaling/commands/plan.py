"""`scaling plan RUNS --budget FLOP`: the next runs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.commands.arguments import (
    fit_arguments,
    new_verb,
    pair_arguments,
    positive,
    positive_setting,
    table_arguments,
)
from scaling.commands.compare import comparison
from scaling.commands.output import GATE, OK, print_json
from scaling.verdict.experiment_file import write_experiment
from scaling.verdict.plan import candidates, cheapest, next_values


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "plan", run, "the cheapest ladder that would decide the crossing")
    table_arguments(verb)
    fit_arguments(verb)
    pair_arguments(verb)
    verb.add_argument("--budget", type=positive, required=True, help="FLOP for all planned runs of both families")
    verb.add_argument("--target-sd", type=positive, default=0.3, help="sd of log10 C* that is enough (default 0.3)")
    verb.add_argument("--target", type=positive, help="FLOP at which the difference is asked for, not the crossing")
    verb.add_argument("--max-run", type=positive, default=float("inf"), help="FLOP that one run may cost")
    verb.add_argument("--max-memory", type=positive, default=float("inf"), help="bytes of weights and optimizer state")
    verb.add_argument("--max-hours", type=positive, default=float("inf"), help="hours that one run may take")
    verb.add_argument("--flops-per-second", type=positive, default=1e14, help="training speed, for --max-hours")
    verb.add_argument("--ratios", default="5,10,20,40,80,160", help="tokens per parameter to choose from")
    verb.add_argument("--experiment", type=Path, help="write the plan as an experiment file for launch.py sweep")


def run(a: argparse.Namespace) -> int:
    c = comparison(a)
    ratios = [positive_setting(text, "--ratios") for text in a.ratios.split(",")]
    low = float(c.fit.runs["N"].min())
    sizes = np.geomspace(low, max(np.sqrt(a.budget / (6 * min(ratios))), 2 * low), 24)
    cap = min(a.max_run, a.max_hours * 3600 * a.flops_per_second)
    options = candidates(sizes.tolist(), sorted(ratios), cap, a.max_memory)
    plan = cheapest(c, options, a.budget, a.target_sd, a.target)
    enough = plan.sd_then <= a.target_sd
    if a.experiment:
        write_experiment(plan, c.fit.runs, (c.a, c.b), a.experiment)
    if a.json:
        print_json(asdict(plan) | {"enough": enough})
        return OK if enough else GATE
    print("\n".join(plan.lines()))
    print("value of the next trunk, best per FLOP first:")
    for value in next_values(c, options, a.target)[:5]:
        ratio_text = ", ".join(f"{r:g}" for r in value.trunk.ratios)
        gain = f"sd falls by {value.shrink:.3f} for {value.trunk.flops:.1e} FLOP"
        print(f"  N {value.trunk.n:.3g} at {ratio_text} tokens a parameter: {gain}")
    if not enough:
        print(f"GATE plan: the budget leaves an sd of {plan.sd_then:.2f}; {a.target_sd:g} was asked for")
    return OK if enough else GATE
