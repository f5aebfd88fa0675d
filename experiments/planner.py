"""Is the power that `scaling plan` and `scaling power` state the power that ladders have? Simulated and scored.

    python -m experiments.planner --workers 14 --out experiments/results/planner.csv      (two core-hours)

Two Chinchilla laws with a stated difference at a target compute (1e22 FLOP), a smooth misfit of 0.2 % and run noise of
0.1 to 0.2 %. A pilot ladder of 6 sizes from 1e7 to 1e9 parameters gives the ensemble that states what a ladder of some
design would show: the pilot's own design (target one decade beyond it), or 10 sizes to 3e9 (target within it). Then
ladders of that design are drawn, one from each of --ladders truths, and analysed; the share is counted whose 95 %
interval of the difference excludes zero with the right sign, and at a true difference of zero the share that excludes
it at all. "+-" is one standard error; the stated power is a mean over --pilots pilots, whose interval (middle 80 %)
stands beside it. Expect stated and found within two of their errors, and at most 5 % at zero.
"""

import argparse
import csv
import zlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import sem

from experiments.interval_coverage import RATIOS, Case, World
from experiments.workers import in_processes
from scaling import Ensemble, Spec
from scaling.ensemble.answers import interval
from scaling.plan import Trunk, power

TARGET = 22.0  # log10 FLOP
DIFFERENCES = (0.0, 0.01, 0.02, 0.03, 0.04)  # nats
DESIGNS = ((6, 1e9), (10, 3e9))  # sizes of the ladder that is planned, and the largest in parameters
PILOT = DESIGNS[0]
HEADER = ("sizes", "largest", "difference", "pilots", "stated sd", "stated power", "+-", "from", "to")
FOUND = ("ladders", "found sd", "found power", "+-", "wrong sign")


class Stated(World):
    """A truth whose difference at TARGET, misfit included, is a stated one."""

    def __init__(self, difference: float, rng: np.random.Generator):
        self.wanted = difference
        sizes, largest = PILOT
        super().__init__(Case(TARGET, 0.002, sizes=sizes, largest=largest), rng)

    def meeting(self, case: Case) -> list[np.ndarray]:
        first, second = super().meeting(case)
        at = np.array([TARGET])

        def gap(shift: float) -> float:
            self.laws = [first, second + np.array([0, shift, 0, 0, 0])]
            return float(np.exp(self.best(1, at)[0]) - np.exp(self.best(0, at)[0])) - self.wanted

        shift = float(brentq(gap, -3, 3))
        return [first, second + np.array([0, shift, 0, 0, 0])]


def trial(design: tuple[int, float], difference: float, k: int, states: bool) -> tuple[float, ...]:
    """Sign that one ladder's interval shows (0: none) and its sd; of a pilot of the same truth what `power` states of
    that ladder: sd and chance."""
    (sizes, largest), rng = design, np.random.default_rng([zlib.crc32(f"{design} {difference}".encode()), k])
    world = Stated(difference, rng)
    pilot, (run, trunk) = world.runs, world.hyper[0, :2]
    world.case = replace(world.case, sizes=sizes, largest=largest)
    e = Ensemble.of(world.ladder(run, trunk, rng), ("A", "B"), Spec(draws=400))
    low, high = interval(e.gaps(np.array([10**TARGET]))[:, 0])
    found = float(low > 0) - float(high < 0), (high - low) / 2 / 1.96
    if not states:
        return (*found, np.nan, np.nan)
    e = Ensemble.of(pilot, ("A", "B"), Spec(draws=400, seed=k))
    costs = [e.cost(f) for f in e.families]
    ladder = [Trunk.of(n, RATIOS.tolist(), costs) for n in np.geomspace(1e7, largest, sizes)]
    p = power(e, ladder, 10**TARGET, (difference,))
    return (*found, p.sd, p.chances[0] if difference else p.at_zero)


def row_of(trials: np.ndarray, difference: float) -> list[str]:
    """What the ladders of one design and difference stated and showed."""
    (sign, sd), (stated_sd, stated) = trials[:, :2].T, trials[np.isfinite(trials[:, 2]), 2:].T
    shown = sign == 1 if difference else sign != 0
    error = np.sqrt(shown.mean() * (1 - shown.mean()) / len(shown))
    spread = (*np.quantile(stated, [0.1, 0.9]),)
    before = [f"{np.median(stated_sd):.4f}", *(f"{x:.3f}" for x in (stated.mean(), sem(stated), *spread))]
    after = [f"{np.median(sd):.4f}", *(f"{x:.3f}" for x in (shown.mean(), error, (sign == -1).mean()))]
    return [str(len(stated)), *before, str(len(trials)), *after]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--pilots", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1, help="processes; the figures do not depend on them")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows = list(product(DESIGNS, DIFFERENCES))
    work = [(*row, k, k < a.pilots) for row in rows for k in range(a.ladders)]
    found = np.array(list(in_processes(trial, work, a.workers))).reshape(len(rows), a.ladders, -1)
    with a.out.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((*HEADER, *FOUND))
        for (design, difference), trials in zip(rows, found, strict=True):
            writer.writerow([design[0], f"{design[1]:g}", difference, *row_of(trials, difference)])
    print(a.out.read_text(), end="")


if __name__ == "__main__":
    main()
