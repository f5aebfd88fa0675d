"""A ladder for one GPU, from one dial: two families, five sizes, three horizons; learning rates transferred by muP.

    mmfree corpus build m --vocab 4096
    mmfree study experiments/ladder.py --out runs/ladder

0.6M to 2.8M parameters, 5 to 20 tokens a parameter, as many as tier M holds without repetition. Add sizes and a larger
corpus as the budget allows: everything else follows (mmfree_jax/sweep/ladder.py).
"""

from mmfree_jax.config import DataConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.ladder import Base, rungs

SIZES = (0.5e6, 0.8e6, 1.3e6, 2e6, 3.2e6)
RATIOS = (5, 10, 20)
DATA = DataConfig(corpus="m", vocab=4096, sequence=512)
# The optima at the base width in results/learning_rate_transfer.csv, found by learning_rate_transfer.py.
BASES = {
    "transformer++": Base(lr=1.4e-3, width=256, depth=4, batch_tokens=32 * 512),
    "matmul-free": Base(lr=5e-3, width=256, depth=4, batch_tokens=32 * 512),
}


def study() -> Study:
    """Both families at every size, on the same data in the same order."""
    runs = [run for family, base in BASES.items() for run in rungs(family, base, SIZES, RATIOS, DATA)]
    return Study(
        name="ladder",
        title="Transformer++ and MatMul-free, rates transferred by muP",
        runs=tuple(runs),
        baseline="transformer++",
        notes={
            "hyperparameters": "one learning rate a family at width 256, transferred by muP with depth; batch, weight "
            "decay and horizon as mmfree_jax/sweep/ladder.py cites",
            "shape rule": "one layer per 64 of width, GLU width 8/3 of the width rounded up to a multiple of 16",
        },
    )
