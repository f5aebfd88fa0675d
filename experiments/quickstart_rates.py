"""Which learning rate suits each family of the quickstart: seven rates at the smallest and the largest width.

    mmfree sweep experiments/quickstart_rates.py --out runs/quickstart-rates

About ten minutes on 2 CPU cores. Its runs table, cut to the columns that matter, is results/quickstart_rates.csv. The
quickstart takes, at either width, each family's smallest rate within 0.01 nats of the best (a trunk at constant rate is
better off below an optimum than above it), and between them the power law of the width; a test holds it to the table.
"""

import dataclasses

from experiments.quickstart import FAMILIES, WIDTHS, base_run
from mmfree_jax.config import RunConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
STEPS = 512


def decaying(base: RunConfig) -> RunConfig:
    """The run of STEPS steps whose last fifth decays."""
    return dataclasses.replace(base, steps=STEPS, optim=dataclasses.replace(base.optim, decay_steps=STEPS // 5))


def study() -> Study:
    """One run with warm-up and decay for every rate, width and family."""
    runs = [
        run
        for width in (WIDTHS[0], WIDTHS[-1])
        for family in FAMILIES
        for run in grid(decaying(base_run(family, width, GRID[0])), {"optim.lr": GRID})
    ]
    return Study(
        name="quickstart-rates",
        title="Learning rates of the quickstart",
        runs=tuple(runs),
        baseline="transformer++",
    )
