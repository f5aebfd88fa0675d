"""`scaling plan RUNS --budget FLOP` and `scaling power RUNS --sizes …`: the next runs, and what a ladder would show."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling.analysis import Analysis
from scaling.commands.arguments import (
    count,
    new_verb,
    pair_arguments,
    pair_of,
    positive,
    positive_setting,
    read_table,
    spec_arguments,
    spec_of,
    table_arguments,
)
from scaling.commands.output import GATE, OK, plain, print_json
from scaling.ensemble.ensemble import Ensemble
from scaling.experiment_file import write_experiment
from scaling.plan import (
    SIMULATIONS,
    Pool,
    Trunk,
    agreement,
    candidates,
    cheapest,
    check_plannable,
    default_target,
    power,
)
from scaling.tables.runs import ScalingError

ENOUGH = 0.002  # sd of the difference that decides, in the unit of the losses
SIZES_OFFERED, VALUES_SHOWN = 24, 5


def add(verbs: Any) -> None:
    plan = new_verb(verbs, "plan", run_plan, "the cheapest ladder that would decide which family wins")
    common_arguments(plan)
    plan.add_argument("--budget", type=positive, required=True, help="FLOP for all planned runs of both families")
    plan.add_argument("--target-sd", type=positive, default=ENOUGH, help=f"sd that is enough (default {ENOUGH:g})")
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
    spec_arguments(verb)
    pair_arguments(verb)
    text = "FLOP at which the difference is asked for (default: the crossing within the runs, else a decade beyond)"
    verb.add_argument("--target", type=positive, help=text)
    verb.add_argument("--differences", default="", help="true differences to state the power for, e.g. 0.005,0.01")
    text = f"ladders drawn from the ensemble and analysed to find the power (default {SIMULATIONS})"
    verb.add_argument("--simulations", type=count, default=SIMULATIONS, help=text)


def numbers(text: str, flag: str) -> list[float]:
    """A comma-separated flag, sorted."""
    return sorted(positive_setting(part, flag) for part in text.split(",")) if text else []


def asked(a: argparse.Namespace) -> tuple[Ensemble, float]:
    """The ensemble of the two families, and the compute at which the difference is asked for."""
    runs = read_table(a)
    (pair,) = Analysis.of(runs, spec_of(a), pair_of(a, runs)).pairs
    check_plannable(pair)
    return pair, a.target or default_target(pair)


def run_plan(a: argparse.Namespace) -> int:
    (pair, target), ratios = asked(a), numbers(a.ratios, "--ratios")
    costs = [pair.cost(f) for f in pair.families]
    low, least = float(pair.runs["N"].min()), min(float(np.exp(cost.log_cost.min())) for cost in costs)
    sizes = np.geomspace(low, max(np.sqrt(a.budget / (least * min(ratios))), 2 * low), SIZES_OFFERED)
    cap = min(a.max_run, a.max_hours * 3600 * a.flops_per_second)
    options = candidates(sizes.tolist(), ratios, costs, cap, a.max_memory)
    plan = cheapest(pair, options, a.budget, target, a.target_sd, not a.fresh)
    enough = plan.sd_then <= a.target_sd
    if a.experiment:
        write_experiment(plan, pair.runs, pair.families, a.experiment)
    found = power(pair, plan.trunks, target, numbers(a.differences, "--differences"), not a.fresh, a.simulations)
    if a.json:
        print_json(plain(plan) | {"enough": enough, "power": found})
        return OK if enough else GATE
    print("\n".join([*plan.lines(), *found.lines()]))
    print_values(pair, options, target)
    if not enough:
        print(f"GATE plan: the budget leaves an sd of {plan.sd_then:.3g}; {a.target_sd:g} was asked for")
    return OK if enough else GATE


def print_values(pair: Ensemble, options: Sequence[Trunk], target: float) -> None:
    """What each of the best next trunks alone would add."""
    pool, scale = Pool(pair, options, target), agreement(pair, target)
    gains = [scale * (pool.spread([]) - pool.spread([t])) for t in options]
    worth = sorted(zip(gains, options, strict=True), key=lambda x: -x[0] / x[1].flops ** 0.5)
    print("value of the next trunk, best per root of its cost first:")
    for gain, trunk in worth[:VALUES_SHOWN]:
        text = ", ".join(f"{r:g}" for r in trunk.ratios)
        print(f"  N {trunk.n:.3g} at {text} tokens a parameter: sd falls by {gain:.3g} for {trunk.flops:.1e} FLOP")


def run_power(a: argparse.Namespace) -> int:
    ratios, sizes = numbers(a.ratios, "--ratios"), numbers(a.sizes, "--sizes")
    if len(sizes) < 2 or len(ratios) < 2:
        raise ScalingError("a ladder needs two sizes and two ratios at least")
    pair, target = asked(a)
    trunks = [Trunk.of(n, ratios, [pair.cost(f) for f in pair.families]) for n in sizes]
    found = power(pair, trunks, target, numbers(a.differences, "--differences"), False, a.simulations)
    if a.json:
        print_json(found)
        return OK
    print(f"{len(trunks)} sizes at {len(ratios)} budgets, {sum(t.flops for t in trunks):.2e} FLOP for both families")
    print("\n".join(found.lines()))
    return OK
