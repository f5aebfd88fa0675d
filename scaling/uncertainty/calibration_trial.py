"""Whether the back-test's widening is enough where the law is wrong: simulated ladders whose dearest decade is hidden.

`python -m scaling.uncertainty.calibration_trial --ladders 200 --out FILE` writes, by size of the lack of fit, the share
of hidden runs that the raw 95 % interval of a new run holds, and the share that the calibrated one holds.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling.fitting.fit import fit
from scaling.tables.runs import Runs
from scaling.uncertainty.backtest import LEVELS, backtest, held_levels
from scaling.uncertainty.bootstrap import bootstrap
from scaling.uncertainty.simulate import TRUTHS, Ladder, Noise, draw

LADDER = Ladder(tuple(np.geomspace(1e6, 1e9, 10)), (5, 10, 20, 40, 80))
RUN_NOISE, MISFITS = 0.002, (0.0, 0.002, 0.005)
HIDDEN = 10.0  # runs dearer than C_max / 10 are hidden
DRAWS = 150


def hidden_runs(runs: Runs, seed: int) -> list[tuple[bool, bool]]:
    """For every hidden run whether the raw and the calibrated interval hold it; the back-test sees none of them."""
    inside = runs["flops"] <= runs["flops"].max() / HIDDEN
    seen = runs.select(inside)
    test = backtest(seen, share=(), draws=DRAWS, seed=seed)
    sampled = bootstrap(fit(seen, starts=16), DRAWS, seed)
    held = held_levels(runs, inside, sampled, HIDDEN)
    return [(h.ratio <= 1, h.ratio <= test.factor(LEVELS, h.decades)[0]) for h in held]


def shares(misfit: float, ladders: int) -> tuple[float, float, int]:
    """Shares of hidden runs in the raw and in the calibrated interval, and their number."""
    found: list[tuple[bool, bool]] = []
    for k in range(ladders):
        noise, truth = Noise(RUN_NOISE, misfit=misfit), {"A": TRUTHS["A"]}
        found += hidden_runs(draw(truth, LADDER.cells, noise, np.random.default_rng([5, k]), clustered=False), k)
    raw, calibrated = np.mean(found, axis=0)
    return float(raw), float(calibrated), len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(arguments)
    with a.out.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["lack_of_fit", "run_noise", "ladders", "hidden_runs", "raw", "calibrated"])
        for misfit in MISFITS:
            raw, calibrated, count = shares(misfit, a.ladders)
            writer.writerow([misfit, RUN_NOISE, a.ladders, count, f"{raw:.3f}", f"{calibrated:.3f}"])
            stream.flush()


if __name__ == "__main__":
    main()
