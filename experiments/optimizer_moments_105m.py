"""What moments in bfloat16 or 8 bits cost in loss at 105M parameters: both families, three types, three seeds each.

    mmfree corpus build m --vocab 8192
    mmfree sweep experiments/optimizer_moments_105m.py --out runs/optimizer-moments-105m
    python -m experiments.optimizer_moments runs/optimizer-moments-105m/runs.csv      # the paired differences

About forty minutes on one H200. As optimizer_moments.py, but in bfloat16 and on the kernels: 49M
tokens of tier M, each seen once.
"""

import dataclasses

from experiments.integer_gradients_105m import study as integer_gradients
from experiments.optimizer_moments import paired
from mmfree_jax.config import RunConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.shapes import ladder_model

RATES = {"transformer++": 2e-3, "matmul-free": 4e-3}
SEEDS = range(3)


def study() -> Study:
    """The run of integer_gradients_105m.py without its integer gradients, of both families."""
    base, runs = integer_gradients().runs[0], list[RunConfig]()
    for family, rate in RATES.items():
        model = ladder_model(family, base.model.width, base.model.vocab, base.model.depth)
        optim = dataclasses.replace(base.optim, lr=rate)
        runs += paired(dataclasses.replace(base, name=f"{family}-w{base.model.width}", model=model, optim=optim), SEEDS)
    return Study(
        name="optimizer-moments-105m",
        title="Optimizer moments in bfloat16 and 8 bits at 105M parameters",
        runs=tuple(runs),
        baseline="transformer++",
    )
