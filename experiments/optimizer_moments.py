"""What moments in bfloat16 or 8 bits cost in loss: both families, three types of moments, six seeds each.

    mmfree sweep experiments/optimizer_moments.py --out runs/optimizer-moments
    python -m experiments.optimizer_moments runs/optimizer-moments/runs.csv      # the paired differences

Ten minutes on 2 CPU cores. Runs of one seed start from the same weights and see the same data in the same order, so
differences are taken pair by pair. The runs table, cut to the columns that matter, is results/optimizer_moments.csv:
expect mean differences within two standard errors of zero. optimizer_moments_105m.py is the same for a GPU.
"""

import csv
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.quickstart import FAMILIES, base_run, rate
from mmfree_jax.config import RunConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid

WIDTH, STEPS = 56, 256
MOMENTS = ("float32", "bfloat16", "int8")
SEEDS = range(6)


def paired(base: RunConfig, seeds: range) -> list[RunConfig]:
    """One run for each seed and type of moments."""
    return list(grid(base, {"optim.moments": MOMENTS, "seed": tuple(seeds)}))


def study() -> Study:
    """The quickstart's middle size; warm-up in a tenth of the steps, decay in the last fifth."""
    runs: list[RunConfig] = []
    for family in FAMILIES:
        base = base_run(family, WIDTH, rate(family, WIDTH))
        optim = dataclasses.replace(base.optim, warmup_steps=STEPS // 10, decay_steps=STEPS // 5)
        runs += paired(dataclasses.replace(base, steps=STEPS, optim=optim, checkpoint_every=0), SEEDS)
    return Study(
        name="optimizer-moments",
        title="Optimizer moments in bfloat16 and 8 bits",
        runs=tuple(runs),
        baseline=FAMILIES[0],
    )


def moments_of(row: dict[str, str]) -> str:
    """The type of the moments of a row of the runs table."""
    found = [word.partition("=")[2] for word in row["settings"].split() if word.startswith("optim.moments=")]
    return found[0] if found else "float32"


def differences(rows: list[dict[str, str]]) -> Iterator[str]:
    """For each family and type: mean difference to float32 of the same seed, its 95 % interval, and pairs."""
    loss = {(row["family"], moments_of(row), row["seed"]): float(row["loss"]) for row in rows if row["loss"]}
    for family in sorted({family for family, _, _ in loss}):
        for moments in MOMENTS[1:]:
            pairs = [
                loss[key] - loss[family, "float32", key[2]]
                for key in loss
                if key[:2] == (family, moments) and (family, "float32", key[2]) in loss
            ]
            if len(pairs) > 1:
                half = students_t(len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
                yield f"{family},{moments},{statistics.mean(pairs):+.4f},{half:.4f},{len(pairs)}"


def students_t(freedom: int) -> float:
    """The quantile 0.975 of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


if __name__ == "__main__":
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        print("\n".join(["family,moments,difference,half_interval,pairs", *differences(list(csv.DictReader(file)))]))
