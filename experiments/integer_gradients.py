"""What integer products in the backward pass cost in loss: MatMul-free with and without, twelve seeds each.

    mmfree sweep experiments/integer_gradients.py --out runs/integer-gradients

About half an hour on 2 CPU cores. Runs differ in the initial weights and in whether the gradient that reaches a ternary
layer is quantised to 8 bits for both of its products (`model.gradient_bits`); pairs of one seed see the same data. Its
runs table, cut to the columns that matter, is results/integer_gradients.csv: expect a mean difference within two
standard errors of zero.
"""

from experiments.quickstart import WIDTHS, base_run, rate
from experiments.quickstart_rates import decaying
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid

FAMILY = "matmul-free"
SEEDS = range(12)


def study() -> Study:
    """The quickstart's largest model, one run for each seed and width of the gradients."""
    base = decaying(base_run(FAMILY, WIDTHS[-1], rate(FAMILY, WIDTHS[-1])))
    return Study(
        name="integer-gradients",
        title="Integer products in the backward pass",
        runs=tuple(grid(base, {"model.gradient_bits": (0, 8), "seed": tuple(SEEDS)})),
        baseline=FAMILY,
    )
