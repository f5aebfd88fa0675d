"""Which learning rate suits each cell of the ladder on an H200: seven rates at two widths, ten tokens a parameter.

    mmfree corpus build l --vocab 4096
    mmfree sweep experiments/h200_rates.py --out runs/h200-rates

5.6e16 FLOP. Its runs table, cut to the columns family, width, lr and loss, is results/h200_rates.csv, from which
h200_ladder.py takes each family's smallest rate within 0.003 nats of the best at either width.
"""

import dataclasses

from experiments.h200_ladder import CELLS, RATE_SHAPES, base_run
from mmfree_jax import flops
from mmfree_jax.config import RunConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
RATIO = 10


def decaying(base: RunConfig) -> RunConfig:
    """The run of RATIO tokens a parameter whose last fifth decays."""
    steps = round(RATIO * flops.parameters(base.model).N / base.data.tokens_per_step)
    return dataclasses.replace(base, steps=steps, optim=dataclasses.replace(base.optim, decay_steps=steps // 5))


def study() -> Study:
    """One run with warm-up and decay for every rate, width and family."""
    runs = [
        run
        for width, depth in RATE_SHAPES
        for family in CELLS
        for run in grid(decaying(base_run(family, width, depth, GRID[0])), {"optim.lr": GRID})
    ]
    return Study(name="h200-rates", title="Learning rates of the ladder", runs=tuple(runs), baseline="transformer++")
