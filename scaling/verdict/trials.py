"""Trials by simulation of what the verdict rests on; their tables are in experiments/results.

    python -m scaling.verdict.trials crossing --ladders 100 --out experiments/results/crossing_coverage.csv
    python -m scaling.verdict.trials plan --ladders 300 --out experiments/results/planner.csv

crossing: whether 95 % intervals of the crossing hold the truth. Ladders of two families whose frontiers cross at a
known compute; per case and method (bootstrap, profile likelihood) the share of intervals that hold it, the share open
to the right, and the median width of the others.

plan: whether a planned ladder beats a 5 x 4 factorial one of the same cost. Runs have noise of run and trunk, and 0.5 %
lack of fit, a random wave about each family's law. The planner is given the laws, the noise and the factorial ladder's
budget and largest run; then both ladders are drawn, fitted and compared.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit, fit
from scaling.uncertainty.simulate import Ladder, Noise, Truths, draw
from scaling.verdict.assumed import crossing_at
from scaling.verdict.compare import compare
from scaling.verdict.crossing_profile import profile_crossing
from scaling.verdict.frontier import SIX_N_D
from scaling.verdict.plan import Pool, Question, Trunk, candidates, cheapest, question
from scaling.verdict.power import designs_of, power

CROSSING_SIZES = tuple(np.geomspace(1e7, 1e9, 6))
CROSSING_CASES = (
    ("crossing 1 decade out, run noise 0.1 %", 1e22, 0.04, Noise(0.001)),
    ("crossing 1 decade out, trunk noise 0.1 %", 1e22, 0.04, Noise(0.0005, 0.001)),
    ("crossing 2 decades out, run noise 0.3 %", 1e23, 0.02, Noise(0.003)),
)
PLAN_NOISE = Noise(0.001, 0.0005, misfit=0.005)
RATIOS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
COSTS = (SIX_N_D, SIX_N_D)  # of assumed laws
FACTORIAL = tuple(Trunk.of(n, RATIOS[:4], COSTS) for n in np.geomspace(1e9 / 30, 1e9, 5))
PLAN_CASES = (  # crossing in FLOP, gap of alpha, compute at which the difference is asked for, or None: the crossing
    (1e21, 0.04, None),
    (1e22, 0.03, None),
    (1e23, 0.02, 1e22),
)


def ends_of(truths: Truths, noise: Noise, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of one simulated ladder's crossing, by method."""
    runs = draw(truths, Ladder(CROSSING_SIZES, (5, 20, 80, 160)).cells, noise, np.random.default_rng([seed, 1]))
    c = compare(runs, "A", "B", ("E", "B", "beta"), draws=400, seed=seed, objective="log-ls", starts=4)
    profile = profile_crossing(c, simulations=200, seed=seed)
    return {"bootstrap": (c.crossover.low, c.crossover.high), "profile": (profile.low, profile.high)}


def summary(found: Sequence[tuple[float, float]], truth: float) -> dict[str, str]:
    """Coverage, share open to the right, and median width in decades of the closed ones."""
    ends = np.array(found)
    open_right = ~np.isfinite(ends[:, 1])
    closed = ends[~open_right & (ends[:, 0] > 0)]
    width = float(np.median(np.log10(closed[:, 1] / closed[:, 0]))) if len(closed) else float("nan")
    covered = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
    return {"covers": f"{covered:.3f}", "open to the right": f"{open_right.mean():.3f}", "decades wide": f"{width:.2f}"}


def crossing_rows(ladders: int) -> Iterator[dict[str, Any]]:
    """Two rows a case."""
    for name, at, gap, noise in CROSSING_CASES:
        found = [ends_of(crossing_at(at, gap), noise, seed) for seed in range(ladders)]
        for method in found[0]:
            row = {"case": name, "interval": method, "ladders": ladders}
            yield row | summary([ends[method] for ends in found], at)


def law_fit(truths: Truths) -> Fit:
    """The assumed laws as a fit, which is exact for a ladder without noise."""
    ladder = Ladder(tuple(np.geomspace(1e7, 3e9, 6)), (5, 20, 80))
    runs = draw(truths, ladder.cells, Noise(1e-7), np.random.default_rng(0))
    return fit(runs, objective="log-ls", share=("E",))


def both_ladders(q: Question) -> dict[str, tuple[Trunk, ...]]:
    """The factorial ladder, and the plan that may cost as much."""
    budget = sum(t.flops for t in FACTORIAL)
    largest = max(t.largest_run for t in FACTORIAL)
    options = candidates(np.geomspace(1e7, 1.5e9, 16).tolist(), RATIOS, COSTS, largest, 1e13)
    return {"factorial": FACTORIAL, "planned": cheapest(q, options, budget, keep_runs=False).trunks}


def plan_rows(ladders: int) -> Iterator[dict[str, Any]]:
    """Two rows a case."""
    for at, gap, target in PLAN_CASES:
        truths = crossing_at(at, gap)
        q = question(law_fit(truths), PLAN_NOISE, target)
        for name, trunks in both_ladders(q).items():
            row: dict[str, Any] = {"crossing": f"{at:.0e}", "alpha gap": gap, "asked": q.asked, "ladder": name}
            row |= {
                "runs per family": sum(len(t.ratios) for t in trunks),
                "FLOP": f"{sum(t.flops for t in trunks):.2e}",
            }
            row |= {"predicted sd": f"{Pool(q, trunks, False).spread(trunks):.4g}"}
            found = power(truths, designs_of(trunks, list(truths)), PLAN_NOISE, target or at, ladders)
            yield row | {k: f"{v:.4g}" for k, v in asdict(found).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=("crossing", "plan"))
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    with a.out.open("w", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for row in (crossing_rows if a.trial == "crossing" else plan_rows)(a.ladders):
            if writer is None:
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
