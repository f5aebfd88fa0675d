"""`scaling plan RUNS --budget FLOP` and `scaling power RUNS --sizes …`: the next runs, and what a ladder would show."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.commands.arguments import (
    count,
    delta_of,
    family_arguments,
    fit_arguments,
    new_verb,
    objective_line,
    pair_of,
    positive,
    positive_setting,
    read_table,
    shared,
    table_arguments,
)
from scaling.commands.output import GATE, OK, print_json
from scaling.laws.forms import law_named
from scaling.report.artefact import plain
from scaling.tables.runs import ScalingError
from scaling.verdict.compare import joint_fit, pick_families
from scaling.verdict.experiment_file import write_experiment
from scaling.verdict.plan import (
    MISFIT,
    Question,
    Trunk,
    candidates,
    cheapest,
    check_plannable,
    next_values,
    noise_of,
    question,
)
from scaling.verdict.power import Power, designs_of, joined, own_designs, power, truths_of

ENOUGH = {"log10 C*": 0.3, "difference": 0.002}  # sd of what is asked that decides: decades; the unit of the losses
SIZES_OFFERED = 24
VALUES_SHOWN = 5
DRAWS = 200  # of every simulated ladder


def add(verbs: Any) -> None:
    plan = new_verb(verbs, "plan", run_plan, "the cheapest ladder that would decide the crossing")
    common_arguments(plan)
    plan.add_argument("--budget", type=positive, required=True, help="FLOP for all planned runs of both families")
    plan.add_argument("--target-sd", type=positive, help="sd that is enough (default 0.3 decades, or 0.002 of loss)")
    plan.add_argument("--max-run", type=positive, default=float("inf"), help="FLOP that one run may cost")
    plan.add_argument("--max-memory", type=positive, default=float("inf"), help="bytes of weights and optimizer state")
    plan.add_argument("--max-hours", type=positive, default=float("inf"), help="hours that one run may take")
    plan.add_argument("--flops-per-second", type=positive, default=1e14, help="training speed, for --max-hours")
    plan.add_argument("--ratios", default="5,10,20,40,80,160", help="tokens per parameter to choose from")
    plan.add_argument("--fresh", action="store_true", help="do not count on the runs of the table")
    plan.add_argument("--experiment", type=Path, help="write the plan as an experiment file for launch.py sweep")
    proposed = new_verb(verbs, "power", run_power, "what a proposed ladder would show, before it is run")
    common_arguments(proposed)
    proposed.add_argument("--sizes", required=True, help="parameters of each size, e.g. 1e7,3e7,1e8")
    proposed.add_argument("--ratios", required=True, help="tokens per parameter of each size, e.g. 5,20,80")


def common_arguments(verb: argparse.ArgumentParser) -> None:
    table_arguments(verb)
    fit_arguments(verb, DRAWS, "bootstrap draws of every simulated ladder")
    family_arguments(verb)
    verb.add_argument("--target", type=positive, help="FLOP at which the difference is asked for, not the crossing")
    verb.add_argument("--misfit", type=positive, default=MISFIT, help="rms lack of fit to allow for (default 0.005)")
    verb.add_argument("--ladders", type=count, default=20, help="ladders simulated for the power (default 20)")


def numbers(text: str, flag: str) -> list[float]:
    """A comma-separated flag, sorted."""
    return sorted(positive_setting(part, flag) for part in text.split(","))


def asked(a: argparse.Namespace) -> Question:
    """What the ladder is to find out, about the joint fit of the two families."""
    check_plannable(law_named(a.law))
    runs = read_table(a)
    pair = pick_families(runs, pair_of(a, runs))
    fitted = joint_fit(pair, shared(a), a.law, a.objective, delta_of(a, runs), seed=a.seed)
    return question(fitted, noise_of(fitted, misfit=a.misfit), a.target)


def run_plan(a: argparse.Namespace) -> int:
    q = asked(a)
    runs, ratios = q.fit.runs, numbers(a.ratios, "--ratios")
    low = float(runs["N"].min())
    least = min(float(np.exp(cost.log_cost.min())) for cost in q.costs)
    sizes = np.geomspace(low, max(np.sqrt(a.budget / (least * min(ratios))), 2 * low), SIZES_OFFERED)
    cap = min(a.max_run, a.max_hours * 3600 * a.flops_per_second)
    options = candidates(sizes.tolist(), ratios, q.costs, cap, a.max_memory)
    enough_at = a.target_sd or ENOUGH[q.asked]
    plan = cheapest(q, options, a.budget, enough_at, not a.fresh)
    enough = plan.sd_then <= enough_at
    if a.experiment:
        write_experiment(plan, runs, q.fit.families, a.experiment)
    found = power_of(a, q, plan.trunks, not a.fresh)
    if a.json:
        print_json(asdict(plan) | {"enough": enough, "power": power_json(found)})
        return OK if enough else GATE
    print("\n".join([*plan.lines(), *found.lines()]))
    print_values(q, options)
    print(objective_line(a, q.fit.objective))
    if not enough:
        print(f"GATE plan: the budget leaves an sd of {plan.sd_then:.3g}; {enough_at:g} was asked for")
    return OK if enough else GATE


def print_values(q: Question, options: Sequence[Trunk]) -> None:
    """What each of the best next trunks alone would add."""
    print("value of the next trunk, best per FLOP first:")
    for value in next_values(q, options)[:VALUES_SHOWN]:
        ratio_text = ", ".join(f"{r:g}" for r in value.trunk.ratios)
        gain = f"sd falls by {value.shrink:.3g} for {value.trunk.flops:.1e} FLOP"
        print(f"  N {value.trunk.n:.3g} at {ratio_text} tokens a parameter: {gain}")


def run_power(a: argparse.Namespace) -> int:
    ratios, sizes = numbers(a.ratios, "--ratios"), numbers(a.sizes, "--sizes")
    if len(sizes) < 2 or len(ratios) < 2:
        raise ScalingError("a ladder needs two sizes and two ratios at least")
    q = asked(a)
    trunks = [Trunk.of(n, ratios, q.costs) for n in sizes]
    found = power_of(a, q, trunks, keep=False)
    if a.json:
        print_json(power_json(found))
        return OK
    print(f"{len(trunks)} sizes at {len(ratios)} budgets, {sum(t.flops for t in trunks):.2e} FLOP for both families")
    print("\n".join(found.lines()))
    print(objective_line(a, q.fit.objective))
    return OK


def power_json(found: Power) -> dict[str, Any]:
    """Power as JSON takes it: None for an sd that too many ladders without a crossing leave unbounded."""
    return {name: plain(value) for name, value in asdict(found).items()}


def power_of(a: argparse.Namespace, q: Question, trunks: Sequence[Trunk], keep: bool) -> Power:
    """Power of trunks, with the runs at hand if they count, under the fitted laws and the noise found."""
    designs = designs_of(trunks, q.fit.families)
    if keep:
        own = own_designs(q.fit)
        designs = {family: joined(own[family], cells) for family, cells in designs.items()}
    unit = q.fit.runs.loss_unit
    return power(truths_of(q.fit), designs, q.noise, q.target, a.ladders, a.seed, q.fit.share, a.draws, a.law, unit)
