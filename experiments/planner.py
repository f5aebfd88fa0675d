"""Is the power that `scaling plan` and `scaling power` state the power that ladders have? Simulated and scored.

    python -m experiments.planner --workers 14 --out experiments/results/planner.csv      (40 core-minutes)

Two Chinchilla laws with a stated difference at a target compute (1e22 FLOP), a smooth misfit of 0.2 % and run noise of
0.1 to 0.2 %. A pilot ladder of 6 sizes from 1e7 to 1e9 parameters gives the ensemble that states what a ladder of some
design would show: the pilot's own design (target one decade beyond it), or 10 sizes to 3e9 (target within it). Then
ladders of that design are drawn, one from each of --ladders truths, and analysed; the share is counted whose 95 %
interval of the difference excludes zero with the right sign, and at a true difference of zero the share that excludes
it at all. "+-" is one standard error; the stated power is a mean over --pilots pilots (their truths differ by each of
the differences in turn), whose interval (middle 80 %) stands beside it. Expect stated and found within two of their
errors, and at most 5 % at zero. --scores keeps single results: a run that was stopped goes on from them.
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
from experiments.workers import resumed
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


def shown(design: tuple[int, float], difference: float, k: int) -> tuple[float, float]:
    """Draw one ladder from a truth, and return the sign that its interval shows (0: none) and its sd."""
    (sizes, largest), (world, rng) = design, drawn(design, difference, k)
    run, trunk = world.hyper[0, :2]
    world.case = replace(world.case, sizes=sizes, largest=largest)
    e = Ensemble.of(world.ladder(run, trunk, rng), ("A", "B"), Spec(draws=400))
    low, high = interval(e.gaps(np.array([10**TARGET]))[:, 0])
    return float(low > 0) - float(high < 0), (high - low) / 2 / 1.96


def stated(design: tuple[int, float], k: int) -> tuple[float, ...]:
    """Of one pilot, what `power` states of a ladder of that design: its sd, and the chance for each difference."""
    world, _ = drawn(design, DIFFERENCES[k % len(DIFFERENCES)], k)
    e = Ensemble.of(world.runs, ("A", "B"), Spec(draws=400, seed=k))
    costs, (sizes, largest) = [e.cost(f) for f in e.families], design
    ladder = [Trunk.of(n, RATIOS.tolist(), costs) for n in np.geomspace(1e7, largest, sizes)]
    p = power(e, ladder, 10**TARGET, DIFFERENCES)
    return (p.sd, p.at_zero, *p.chances[1:])


def drawn(design: tuple[int, float], difference: float, k: int) -> tuple[Stated, np.random.Generator]:
    """The k-th truth of a design and difference, with its pilot, and the generator that it was drawn with."""
    rng = np.random.default_rng([zlib.crc32(f"{design} {difference}".encode()), k])
    return Stated(difference, rng), rng


def row_of(pilots: np.ndarray, ladders: np.ndarray, difference: float) -> list[str]:
    """What the pilots of a design stated of one difference, and what ladders showed."""
    sign, sd = ladders.T
    stated_sd, chance = pilots[:, 0], pilots[:, 1 + DIFFERENCES.index(difference)]
    right = sign == 1 if difference else sign != 0
    error = np.sqrt(right.mean() * (1 - right.mean()) / len(right))
    spread = (*np.quantile(chance, [0.1, 0.9]),)
    before = [f"{np.median(stated_sd):.4f}", *(f"{x:.3f}" for x in (chance.mean(), sem(chance), *spread))]
    after = [f"{np.median(sd):.4f}", *(f"{x:.3f}" for x in (right.mean(), error, (sign == -1).mean()))]
    return [str(len(chance)), *before, str(len(sign)), *after]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--pilots", type=int, default=30)
    parser.add_argument("--workers", type=int, default=1, help="processes; the figures do not depend on them")
    parser.add_argument("--scores", type=Path, help="JSONL file of single results: those in it are not made again")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    pilots = {("pilot", i, k): (d, k) for k in range(a.pilots) for i, d in enumerate(DESIGNS)}
    ladders = {
        ("ladder", i, difference, k): (d, difference, k)
        for k in range(a.ladders)
        for (i, d), difference in product(enumerate(DESIGNS), DIFFERENCES)
    }
    found = resumed(shown, ladders, a.workers, a.scores) | resumed(stated, pilots, a.workers, a.scores)
    with a.out.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((*HEADER, *FOUND))
        for (i, (sizes, largest)), difference in product(enumerate(DESIGNS), DIFFERENCES):
            of_pilots = np.array([found[key] for key in pilots if key[1] == i])
            of_ladders = np.array([found[key] for key in ladders if key[1:3] == (i, difference)])
            writer.writerow([sizes, f"{largest:g}", difference, *row_of(of_pilots, of_ladders, difference)])
    print(a.out.read_text(), end="")


if __name__ == "__main__":
    main()
