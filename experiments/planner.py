"""Is the power that `scaling plan` and `scaling power` state the power that ladders have? Simulated and scored.

    python -m experiments.planner --out experiments/results/planner.csv      (--workers 2; ten minutes of one core)

Two Chinchilla laws with a stated difference at a target compute one decade beyond the ladder, a smooth misfit of 0.2 %
and run noise of 0.1 to 0.2 %. A pilot ladder gives the ensemble that plans; then ladders of the stated design are drawn
from the truth and analysed, and the share is counted whose 95 % interval of the difference excludes zero with the right
sign; at a true difference of zero, the share that excludes it at all, with its sign. Expect shares near what was
stated, and about 5 % at zero.
"""

import argparse
import csv
import zlib
from itertools import product
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from experiments.interval_coverage import RATIOS, Case, World
from experiments.workers import in_processes
from scaling import Ensemble, Spec
from scaling.ensemble.answers import interval
from scaling.plan import Trunk, power

TARGET = 22.0  # log10 FLOP
DIFFERENCES = (0.0, 0.02, 0.04, 0.06)  # nats
PILOTS = 10  # ladders of each design that `power` is asked about
HEADER = ("sizes", "difference", "ladders", "stated sd", "found sd", "stated power", "right sign", "wrong sign")


class Stated(World):
    """A truth whose difference at TARGET, misfit included, is a stated one."""

    def __init__(self, difference: float, sizes: int, rng: np.random.Generator):
        self.wanted = difference
        super().__init__(Case(TARGET, 0.002, sizes=sizes), rng)

    def meeting(self, case: Case) -> list[np.ndarray]:
        first, second = super().meeting(case)
        at = np.array([TARGET])

        def gap(shift: float) -> float:
            self.laws = [first, second + np.array([0, shift, 0, 0, 0])]
            return float(np.exp(self.best(1, at)[0]) - np.exp(self.best(0, at)[0])) - self.wanted

        shift = float(brentq(gap, -3, 3))
        return [first, second + np.array([0, shift, 0, 0, 0])]


def trial(sizes: int, difference: float, k: int) -> tuple[float, ...]:
    """Sign that one ladder's interval shows (0: none) and its sd; of a pilot, what `power` states: sd and chance."""
    seed = zlib.crc32(f"{sizes} {difference}".encode())
    world = Stated(difference, sizes, np.random.default_rng([seed, k]))
    e = Ensemble.of(world.runs, ("A", "B"), Spec(draws=400))
    low, high = interval(e.gaps(np.array([10**TARGET]))[:, 0])
    found = float(low > 0) - float(high < 0), (high - low) / 2 / 1.96
    if k >= PILOTS:
        return (*found, np.nan, np.nan)
    costs = [e.cost(f) for f in e.families]
    ladder = [Trunk.of(n, RATIOS.tolist(), costs) for n in np.geomspace(1e7, 1e9, sizes)]
    p = power(e, ladder, 10**TARGET, (max(difference, 1e-9),))
    return (*found, p.sd, p.chances[0] if difference else p.at_zero)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1, help="processes; the figures do not depend on them")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    designs = list(product((6, 10), DIFFERENCES))
    work = [(*design, k) for design in designs for k in range(a.ladders)]
    found = np.array(list(in_processes(trial, work, a.workers))).reshape(len(designs), a.ladders, -1)
    with a.out.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        for design, trials in zip(designs, found, strict=True):
            sign, (sd, stated_sd, chance) = trials[:, 0], np.nanmedian(trials[:, 1:], axis=0)
            numbers = [
                f"{stated_sd:.4f}",
                f"{sd:.4f}",
                *(f"{x:.3f}" for x in (chance, *(np.mean(sign == s) for s in (1, -1)))),
            ]
            writer.writerow([*design, a.ladders, *numbers])
    print(a.out.read_text(), end="")


if __name__ == "__main__":
    main()
