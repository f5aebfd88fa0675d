"""`scaling allocate RUNS --C 1e21`: the best model size and token budget for an amount of compute."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scaling.commands.arguments import (
    delta_of,
    fit_arguments,
    new_verb,
    objective_line,
    positive,
    read_table,
    table_arguments,
)
from scaling.commands.output import exit_code, print_gates, print_json
from scaling.fitting.approaches import envelope_exponent, isoflop
from scaling.fitting.fit import fit, ladder_gate
from scaling.fitting.solve import objective_named
from scaling.lint import lint_gates
from scaling.tables.runs import Runs, ScalingError
from scaling.uncertainty.bootstrap import Draws, bootstrap, interval
from scaling.verdict.compare import family_frontier
from scaling.verdict.frontier import Cost

ABSENT = "–"


@dataclass(frozen=True)
class Allocation:
    """Best parameters N, tokens D, D / N and loss (nats) at `flops`, with 95 % intervals; extrapolation: flops over
    those of the largest run fitted."""

    flops: float
    N: float
    N_interval: tuple[float, float]
    D: float
    D_interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    extrapolation: float

    def line(self, family: str) -> str:
        """One family's allocation."""
        n, d, r = ("{:.3g} to {:.3g}".format(*ends) for ends in (self.N_interval, self.D_interval, self.ratio_interval))
        low, high = self.loss_interval
        where = "within the runs" if self.extrapolation <= 1 else f"{self.extrapolation:.3g} times the largest run"
        return (
            f"{family} at {self.flops:.3g} FLOP ({where}): N* {self.N:.3g} ({n}), D* {self.D:.3g} ({d}), "
            f"D*/N* {self.ratio:.3g} ({r}), loss {self.loss:.4f} ({low:.4f} to {high:.4f})"
        )


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "allocate", run, "the best model size and token budget for an amount of compute")
    table_arguments(verb)
    fit_arguments(verb)
    verb.add_argument("--C", type=positive, action="append", required=True, metavar="FLOP", help="may be repeated")


def run(a: argparse.Namespace) -> int:
    runs = read_table(a)
    delta = delta_of(a, runs)
    out, gates, sampled = {}, [], {}
    for family in runs.families:
        fitted = fit(runs.family(family), a.law, a.objective, delta, seed=a.seed)
        if not fitted.law.has_allocation:
            raise ScalingError(f"law {a.law!r} is not a function of N and D: it has no best allocation")
        sampled[family] = bootstrap(fitted, a.draws, a.seed)
        out[family] = [allocation(sampled[family], runs.family(family), flops) for flops in a.C]
        gates += [*fitted.gates, ladder_gate(runs, family), *lint_gates(runs.family(family))]
    if a.json:
        print_json({family: [asdict(x) for x in found] for family, found in out.items()})
    else:
        print("\n".join(x.line(family) for family, found in out.items() for x in found))
        slopes = "\n".join(exponents(sampled[family], runs.family(family)) for family in out)
        print(slopes)
        if ABSENT in slopes:
            print(f"  {ABSENT}: the runs give none; an envelope takes three, IsoFLOP two budgets with four sizes each")
        print(objective_line(a, objective_named(a.objective, delta)))
        print_gates(gates)
    return exit_code(gates)


def exponents(sampled: Draws, runs: Runs) -> str:
    """The exponent of N* in compute by three approaches (Hoffmann et al. 2022); the first two only for comparison."""
    cost, log_c = Cost.of(runs), np.log([runs["flops"].min(), runs["flops"].max()])
    family = str(runs["family"][0])
    slopes = [
        np.diff(family_frontier(sampled.fit, theta, family, cost, log_c).log_n)[:, 0] / np.diff(log_c)
        for theta in (sampled.fit.theta[None], sampled.theta)
    ]
    low, high = interval(slopes[1])
    found = (envelope_exponent(runs), isoflop(runs).exponent_n)
    others = "envelope {}, IsoFLOP {}".format(*(ABSENT if np.isnan(x) else f"{x:.3f}" for x in found))
    return f"{family}: N* goes as C^{slopes[0][0]:.3f} ({low:.3f} to {high:.3f}) by the fitted law; {others}"


def allocation(sampled: Draws, runs: Runs, flops: float) -> Allocation:
    """The minimum of the loss along the budget, by the cost that this family's own runs measured."""
    fitted, cost, log_c = sampled.fit, Cost.of(runs), np.log([flops])
    point, drawn = (
        family_frontier(fitted, theta, fitted.families[0], cost, log_c) for theta in (fitted.theta[None], sampled.theta)
    )
    n, d, loss = float(np.exp(point.log_n[0, 0])), float(np.exp(point.log_d[0, 0])), float(point.loss[0, 0])
    spread = [np.exp(drawn.log_n), np.exp(drawn.log_d), np.exp(drawn.log_d - drawn.log_n), drawn.loss]
    ends = [interval(values[:, 0]) for values in spread]
    beyond = flops / float(runs["flops"].max())
    return Allocation(flops, n, ends[0], d, ends[1], d / n, ends[2], loss, ends[3], beyond)
