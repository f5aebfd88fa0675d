"""What integer products in the backward pass cost in loss at 105M parameters: with and without, three seeds each.

    mmfree corpus build m --vocab 8192
    mmfree sweep experiments/integer_gradients_105m.py --out runs/integer-gradients-105m

Seven minutes on two H100s, compiling included. As experiments/integer_gradients.py, but in bfloat16 and on the kernels:
49M tokens of tier M, each seen once. Expect a difference within two standard errors of zero
(results/integer_gradients_105m.csv).
"""

from mmfree_jax.config import DataConfig, OptimConfig, RunConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid
from mmfree_jax.sweep.shapes import ladder_model

FAMILY = "matmul-free"
WIDTH, DEPTH = 768, 14
SEEDS = range(3)
STEPS = 1500  # of 32 x 1024 tokens


def study() -> Study:
    """One run for each seed and width of the gradients; warm-up in a tenth of the steps, decay in the last fifth."""
    data = DataConfig(corpus="m", vocab=8192, sequence=1024, batch=32)
    optim = OptimConfig(lr=4e-3, warmup_steps=STEPS // 10, decay_steps=STEPS // 5, weight_decay=0.1)
    base = RunConfig(
        name=f"{FAMILY}-w{WIDTH}",
        model=ladder_model(FAMILY, WIDTH, data.vocab, DEPTH),
        data=data,
        optim=optim,
        steps=STEPS,
        unroll=DEPTH,
        checkpoint_every=0,
        diagnose_every=0,
    )
    return Study(
        name="integer-gradients-105m",
        title="Integer products in the backward pass at 105M parameters",
        runs=tuple(grid(base, {"model.gradient_bits": (0, 8), "seed": tuple(SEEDS)})),
        baseline=FAMILY,
    )
