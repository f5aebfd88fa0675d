"""Whether a planned ladder beats a factorial one of the same cost: `python -m scaling.verdict.plan_trial --out FILE`.

Two assumed families whose frontiers cross at a known compute; runs with noise of run and trunk, and with 0.5 % lack of
fit, a random wave about each family's law. The planner is given the laws, the noise and the budget of a 5 x 4 factorial
ladder; then both ladders are drawn, fitted and compared that often.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np

from scaling.fitting.fit import Fit, fit
from scaling.uncertainty.simulate import Ladder, Noise, Truths, draw
from scaling.verdict.assumed import crossing_at
from scaling.verdict.plan import Pool, Question, Trunk, candidates, cheapest, question
from scaling.verdict.power import cells_of, power

NOISE = Noise(0.001, 0.0005, misfit=0.005)
RATIOS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
FACTORIAL = tuple(Trunk(float(n), RATIOS[:4]) for n in np.geomspace(1e9 / 30, 1e9, 5))
CASES = (  # crossing in FLOP, gap of alpha, compute at which the difference is asked for (None: the crossing itself)
    (1e21, 0.04, None),
    (1e22, 0.03, None),
    (1e23, 0.02, 1e22),
)


def law_fit(truths: Truths) -> Fit:
    """The assumed laws as a fit, which is exact for a ladder without noise."""
    ladder = Ladder(tuple(np.geomspace(1e7, 1e9, 5)), (5, 20, 80))
    runs = draw(truths, ladder.cells, Noise(1e-7), np.random.default_rng(0))
    return fit(runs, objective="log-ls", share=("E",))


def ladders(q: Question) -> dict[str, tuple[Trunk, ...]]:
    """The factorial ladder, and the plan that may cost as much; its largest run may be no larger either."""
    budget = sum(t.flops for t in FACTORIAL)
    options = candidates(np.geomspace(1e7, 1.5e9, 16).tolist(), RATIOS, max(t.largest_run for t in FACTORIAL), 1e13)
    return {"factorial": FACTORIAL, "planned": cheapest(q, options, budget, keep_runs=False).trunks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ladders", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows = []
    for at, gap, target in CASES:
        truths = crossing_at(at, gap)
        q = question(law_fit(truths), NOISE, target)
        for name, trunks in ladders(q).items():
            found = power(truths, cells_of(trunks), NOISE, target or at, a.ladders)
            row = {"crossing": f"{at:.0e}", "alpha gap": gap, "asked": q.asked, "ladder": name}
            row |= {
                "runs per family": sum(len(t.ratios) for t in trunks),
                "FLOP": f"{sum(t.flops for t in trunks):.2e}",
            }
            row |= {"predicted sd": f"{Pool(q, trunks, False).spread(trunks):.4g}"}
            rows.append(row | {k: f"{v:.4g}" for k, v in asdict(found).items()})
            print(rows[-1], flush=True)
    with a.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
