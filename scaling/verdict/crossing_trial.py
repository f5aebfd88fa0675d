"""Whether intervals of the crossing hold the truth: `python -m scaling.verdict.crossing_trial --out FILE`.

Simulated ladders of two families whose frontiers cross at a known compute; per case the share of 95 % intervals, by
bootstrap and by profile likelihood, that hold it, the share open to the right, and the median width of the others.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling.uncertainty.simulate import Ladder, Noise, Truths, draw
from scaling.verdict.assumed import crossing_at
from scaling.verdict.compare import compare
from scaling.verdict.crossing_profile import profile_crossing

SIZES = tuple(np.geomspace(1e7, 1e9, 6))
CASES = (
    ("crossing 1 decade out, run noise 0.1 %", 1e22, 0.04, Noise(0.001)),
    ("crossing 1 decade out, trunk noise 0.1 %", 1e22, 0.04, Noise(0.0005, 0.001)),
    ("crossing 2 decades out, run noise 0.3 %", 1e23, 0.02, Noise(0.003)),
)


def interval_holds(ends: Sequence[float], truth: float) -> bool:
    return bool(ends[0] <= truth <= ends[1])


def ends_of(truths: Truths, noise: Noise, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of one simulated ladder's crossing, by method."""
    runs = draw(truths, Ladder(SIZES, (5, 20, 80, 160)).cells, noise, np.random.default_rng([seed, 1]))
    c = compare(runs, "A", "B", ("E", "B", "beta"), draws=400, seed=seed, objective="log-ls", starts=4)
    profile = profile_crossing(c, simulations=200, seed=seed)
    return {"bootstrap": (c.crossover.low, c.crossover.high), "profile": (profile.low, profile.high)}


def summary(found: Sequence[tuple[float, float]], truth: float) -> dict[str, str]:
    """Coverage, share open to the right, and median width in decades of the closed ones."""
    ends = np.array(found)
    open_right = ~np.isfinite(ends[:, 1])
    closed = ends[~open_right & (ends[:, 0] > 0)]
    width = float(np.median(np.log10(closed[:, 1] / closed[:, 0]))) if len(closed) else float("nan")
    covered = np.mean([interval_holds(pair, truth) for pair in found])
    return {"covers": f"{covered:.3f}", "open to the right": f"{open_right.mean():.3f}", "decades wide": f"{width:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ladders", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows = []
    for name, at, gap, noise in CASES:
        found = [ends_of(crossing_at(at, gap), noise, seed) for seed in range(a.ladders)]
        for method in found[0]:
            row = {"case": name, "interval": method, "ladders": a.ladders}
            rows.append(row | summary([ends[method] for ends in found], at))
            print(rows[-1], flush=True)
    with a.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
