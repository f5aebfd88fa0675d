"""Is the power that `scaling plan` and `scaling power` state the power that ladders have? Simulated and scored.

    python -m experiments.planner --out experiments/results/planner.csv      (half an hour on one core; --ladders 60)

Two Chinchilla laws with a stated difference at a target compute one decade beyond the ladder, a smooth misfit of 0.2 %
and run noise of 0.1 to 0.2 %. A pilot ladder gives the ensemble that plans; then ladders of the stated design are drawn
from the truth and analysed, and the share is counted whose 95 % interval of the difference excludes zero with the right
sign; at a true difference of zero, the share that excludes it at all, with its sign. Expect shares near what was
stated, and about 5 % at zero.
"""

import argparse
import csv
import zlib
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from experiments.interval_coverage import Case, World
from scaling import Ensemble, Spec
from scaling.ensemble.answers import interval
from scaling.plan import Trunk, power

TARGET = 22.0  # log10 FLOP
DIFFERENCES = (0.0, 0.02, 0.04, 0.06)  # nats


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    header = ("sizes", "difference", "ladders", "stated sd", "found sd", "stated power", "right sign", "wrong sign")
    with a.out.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for sizes in (6, 10):
            for difference in DIFFERENCES:
                signs, half, stated = [], [], []
                for k in range(a.ladders):
                    seed = zlib.crc32(f"{sizes} {difference}".encode())
                    world = Stated(difference, sizes, np.random.default_rng([seed, k]))
                    e = Ensemble.of(world.runs, ("A", "B"), Spec(draws=400))
                    if k < 10:
                        ratios = (5.0, 20.0, 80.0, 160.0)
                        costs = [e.cost(f) for f in e.families]
                        ladder = [Trunk.of(n, ratios, costs) for n in np.geomspace(1e7, 1e9, sizes)]
                        p = power(e, ladder, 10**TARGET, (max(difference, 1e-9),))
                        stated.append((p.sd, p.chances[0] if difference else p.at_zero))
                    low, high = interval(e.gaps(np.array([10**TARGET]))[:, 0])
                    signs.append(1 if low > 0 else -1 if high < 0 else 0)
                    half.append((high - low) / 2 / 1.96)
                sd, chance = np.median(np.array(stated), axis=0)
                shares = [float(np.mean(np.array(signs) == s)) for s in (1, -1)]
                numbers = [f"{sd:.4f}", f"{np.median(half):.4f}", f"{chance:.3f}", *(f"{s:.3f}" for s in shares)]
                writer.writerow([sizes, difference, a.ladders, *numbers])
                stream.flush()
    print(a.out.read_text(), end="")


if __name__ == "__main__":
    main()
