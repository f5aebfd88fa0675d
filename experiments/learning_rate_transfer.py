"""Does the best learning rate stay where it is when the model gets wider? Standard parametrisation against muP.

    mmfree corpus build s --vocab 4096
    mmfree sweep experiments/learning_rate_transfer.py --out runs/transfer
    python -m experiments.learning_rate_picture runs/transfer/runs.csv --out runs/transfer.png

Transformer++ and MatMul-free, width 256 to 2048, depth 4, 5M tokens a run, seven rates a factor of two apart at every
width: 98 runs. Expect the optimum to stay within one step of this grid under muP, and to fall by a factor of about 5
under the standard parametrisation, as in results/learning_rate_transfer.csv (discussed in
docs/parametrisation.md). That table is of 66 runs on this grid, with three seeds at the two narrow widths of
Transformer++ (15 minutes on one H200).
"""

import dataclasses
from collections.abc import Iterator

from mmfree_jax.config import FAMILIES, DataConfig, OptimConfig, Parametrisation, RunConfig
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid
from mmfree_jax.sweep.shapes import ladder_model

PARAMETRISATIONS: tuple[Parametrisation, ...] = ("standard", "mup")
WIDTHS = (256, 512, 1024, 2048)  # the first is the base of muP
DEPTH, HEAD = 4, 64
TOKENS = 5_000_000  # of a run
DATA = DataConfig("s", vocab=4096, sequence=512, batch=32)  # has more tokens than a run reads: repetition moves optima
STEP = 2.0  # factor between neighbouring rates
RATES = {"dense": [4e-3 * STEP**i for i in range(-5, 2)], "ternary": [8e-3 * STEP**i for i in range(-5, 2)]}


def cells() -> Iterator[tuple[str, Parametrisation, int]]:
    """Family, parametrisation and width; at the base width both parametrisations are the same."""
    for width in WIDTHS:
        for family in ("transformer++", "matmul-free"):
            for parametrisation in PARAMETRISATIONS if width > WIDTHS[0] else PARAMETRISATIONS[:1]:
                yield family, parametrisation, width


def base_run(family: str, parametrisation: Parametrisation, width: int) -> RunConfig:
    """What all rates of a cell share: warm-up over a tenth of the steps, decay to zero over the last fifth."""
    model = ladder_model(family, width, DATA.vocab, DEPTH)
    if model.mixer == "attention":
        model = dataclasses.replace(model, heads=max(1, width // HEAD))
    if parametrisation == "mup":
        model = dataclasses.replace(model, parametrisation="mup", base_width=WIDTHS[0], base_depth=DEPTH)
    steps = TOKENS // DATA.tokens_per_step
    optim = OptimConfig(warmup_steps=steps // 10, decay_steps=steps // 5)
    # Without kernels: four layers train for seconds, and compiling kernels for every width takes longer.
    return RunConfig(
        f"{family}-{parametrisation}-w{width}", model, DATA, optim, steps=steps, unroll=DEPTH, kernels="off"
    )


def study() -> Study:
    """Every rate for every family, parametrisation and width."""
    runs = [
        run
        for family, parametrisation, width in cells()
        for run in grid(base_run(family, parametrisation, width), {"optim.lr": RATES[FAMILIES[family][1]]})
    ]
    return Study("learning-rate-transfer", "Learning rates by width", tuple(runs), baseline="transformer++")
