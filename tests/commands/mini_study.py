"""A study small enough for a test: two families, two widths, three budgets. The corpus comes from the environment."""

import os

from mmfree_jax.config import OptimConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from tests.conftest import MAIN_FAMILIES, tiny_model, tiny_run

BUDGETS = (20, 40, 80)


def study() -> Study:
    runs = []
    for width in (16, 24):
        for family in MAIN_FAMILIES:
            base = tiny_run(
                family,
                os.environ["MINI_CORPUS"],
                name=f"{family}-w{width}",
                model=tiny_model(family, width=width),
                optim=OptimConfig(lr=float(os.environ.get("MINI_RATE", "1e-2")), warmup_steps=4),
                steps=max(BUDGETS),
                checkpoint_every=10,
            )
            runs += trunk_and_decays(base, BUDGETS)
    return Study("mini", "A test", tuple(runs), "transformer++", {"hypothesis": "none"})
