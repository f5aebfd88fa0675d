"""A first scaling-law comparison on a laptop: two families, five sizes, three token budgets, real text.

    mmfree study experiments/quickstart.py --out runs/quickstart

About ten minutes on 2 CPU cores; its runs take 139 s on one H200. Expect held-out losses between about 3.9 and 5.6 nats
a token, Transformer++ ahead at every size, and a report which says that a ladder this small does not determine whether
or where the families cross.
"""

import math

from mmfree_jax.config import DataConfig, OptimConfig, RunConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.shapes import ladder_model

WIDTHS = (16, 32, 56, 88, 144)
BUDGETS = (256, 512, 1024)  # optimizer steps
DATA = DataConfig(corpus="embedded", vocab=2048, sequence=128, batch=8)

FAMILIES = ("transformer++", "matmul-free")

# Good rates at the smallest and the largest width: each family has its own, for a shared one would favour whichever it
# suits. The smallest rate within 0.01 nats of the best one in results/quickstart_rates.csv (from quickstart_rates.py).
BEST_RATES = {"transformer++": (8e-3, 2e-3), "matmul-free": (3.2e-2, 8e-3)}


def rate(family: str, width: int) -> float:
    """The rate at a width: the power law through the two that were measured."""
    small, large = BEST_RATES[family]
    share = math.log(width / WIDTHS[0]) / math.log(WIDTHS[-1] / WIDTHS[0])
    return small * (large / small) ** share


def base_run(family: str, width: int, lr: float) -> RunConfig:
    """What all runs of one size and family share."""
    optim = OptimConfig(lr=lr, warmup_steps=64, weight_decay=0.1)
    return RunConfig(
        name=f"{family}-w{width}",
        model=ladder_model(family, width, DATA.vocab, depth=2),
        data=DATA,
        optim=optim,
        steps=max(BUDGETS),
        unroll=2,
        log_every=16,
        checkpoint_every=256,
    )


def study() -> Study:
    """One trunk and three decays for every family and width; both families see the same data in the same order."""
    runs = [
        run
        for width in WIDTHS
        for family in FAMILIES
        for run in trunk_and_decays(base_run(family, width, rate(family, width)), BUDGETS)
    ]
    return Study(
        name="quickstart",
        title="Quickstart: Transformer++ and MatMul-free on documentation text",
        runs=tuple(runs),
        baseline="transformer++",
        notes={
            "hyperparameters": "learning rate per family from experiments/results/quickstart_rates.csv; "
            "AdamW (0.9, 0.95), weight decay 0.1, clip 1.0 for both",
            "shape rule": "two layers, GLU width 8/3 of the width rounded up to a multiple of 16",
        },
    )
