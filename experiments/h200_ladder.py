"""Attention or MLGRU, dense or ternary: a ladder of all four, real English text, one H200.

    mmfree corpus build l --vocab 4096
    mmfree sweep experiments/h200_rates.py --out runs/h200-rates
    mmfree sweep experiments/h200_ladder.py --out runs/h200-ladder

The cells differ in the token mixer and in the linear layers, and in nothing else: dense untied heads, norms before each
sublayer and before its last projection, one rule of shapes, one ternary recipe, the same data in the same order. (The
presets `bitnet` and `matmul-free` differ in heads and norms, which would be taken for the mixer's effect.) Six sizes,
0.6M to 36M parameters in blocks; each is a trunk with a decay for every budget from 5 tokens a parameter to 80, or to
four epochs of the corpus where that is less. 1.3e18 FLOP in all; the largest run costs 1.1e17.

Two cells of the grid are there with three seeds, of weights and of the order of data, for the noise of a run. Learning
rates are those that h200_rates.py found at two widths, and between and beyond them a power law of the width.
"""

import csv
import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

from mmfree_jax import flops
from mmfree_jax.config import FAMILIES, ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.grids import repeats
from mmfree_jax.sweep.ladder import batch_sequences

CELLS = ("transformer++", "bitnet", "hgrn", "matmul-free")  # families: attention or MLGRU, dense or ternary
SHAPES = ((128, 3), (192, 4), (256, 5), (384, 5), (512, 5), (640, 7))  # width and depth
HEAD, GLU_MULTIPLE = 64, 128  # kernels take whole 128 channels
RATIOS = (5, 10, 20, 40, 80)  # tokens a parameter
EPOCHS = 4
CORPUS_TOKENS = 129_000_000  # of the training split of tier l with a vocabulary of 4,096, rounded down
DATA = DataConfig(corpus="l", vocab=4096, sequence=1024)
REPEATED = ((192, 20), (384, 20))  # width and ratio of the runs with all seeds
SEEDS = (0, 1, 2)

RATES = Path(__file__).parent / "results" / "h200_rates.csv"
RATE_SHAPES = (SHAPES[0], SHAPES[2])
TOLERANCE = 0.003  # nats above the best in which a smaller rate is taken: a trunk at constant rate prefers it


def model(family: str, width: int, depth: int) -> ModelConfig:
    """A cell of the 2 x 2 at a size."""
    mixer, linear = FAMILIES[family]
    recipe: dict[str, Any] = {"dense_head": True, "linear_norm": False} if linear == "ternary" else {}
    return ModelConfig(
        mixer,
        linear,
        vocab=DATA.vocab,
        width=width,
        depth=depth,
        glu_width=-(-width * 8 // (3 * GLU_MULTIPLE)) * GLU_MULTIPLE,
        heads=width // HEAD if mixer == "attention" else 1,
        sublayer_norm=True,
        **recipe,
    )


def tokens(N: int) -> list[int]:
    """The budgets of a size, none above EPOCHS of the corpus: at the first ratio that would be, it takes its place."""
    most = EPOCHS * CORPUS_TOKENS
    return sorted({min(ratio * N, most) for ratio in RATIOS})


def base_run(family: str, width: int, depth: int, lr: float) -> RunConfig:
    """What all runs of a family and size share."""
    shape = model(family, width, depth)
    N = flops.parameters(shape).N
    budgets = tokens(N)
    data = dataclasses.replace(DATA, batch=batch_sequences(6 * N * budgets[-1], DATA.sequence))
    shortest = budgets[0] // data.tokens_per_step
    optim = OptimConfig(lr=lr, warmup_steps=max(20, shortest // 10), weight_decay=0.1)
    steps = round(budgets[-1] / data.tokens_per_step)
    return RunConfig(f"{family}-w{width}", shape, data, optim, steps=steps, checkpoint_every=1000)


def ladder(base: RunConfig, budgets: list[int]) -> list[RunConfig]:
    """The trunk of a size and its decays."""
    return trunk_and_decays(base, [round(budget / base.data.tokens_per_step) for budget in budgets])


def study() -> Study:
    """Every family at every size, and the repeats of two runs. Raises ConfigError before h200_rates.py has run."""
    runs: list[RunConfig] = []
    for width, depth in SHAPES:
        for family in CELLS:
            base = base_run(family, width, depth, rate(family, width))
            N = flops.parameters(base.model).N
            runs += ladder(base, tokens(N))
            ratios = [ratio for repeated, ratio in REPEATED if repeated == width]
            for again in repeats(base, SEEDS)[1:] if ratios else ():
                runs += ladder(again, [ratio * N for ratio in ratios])
    return Study(
        name="h200-ladder",
        title="Attention or MLGRU, dense or ternary",
        runs=tuple(runs),
        baseline="transformer++",
        notes={
            "hyperparameters": "learning rate per family from experiments/results/h200_rates.csv, a power law of the "
            "width; batch by compute (mmfree_jax/sweep/ladder.py); AdamW (0.9, 0.95), weight decay 0.1, clip 1.0",
            "shape rule": "heads of 64, GLU width 8/3 of the width rounded up to a multiple of 128",
            "corpus": f"tier l, {EPOCHS} epochs at most: technical English",
        },
    )


def rate(family: str, width: int) -> float:
    """The rate at a width: the power law through the two that were measured."""
    (first, _), (last, _) = RATE_SHAPES
    small, large = best_rates()[family]
    return small * (large / small) ** (math.log(width / first) / math.log(last / first))


@cache
def best_rates() -> dict[str, tuple[float, float]]:
    """The best rates of each family at both widths: the smallest within TOLERANCE of the least loss."""
    if not RATES.is_file():
        raise ConfigError(f"no {RATES}: run experiments/h200_rates.py first, and cut its runs.csv to what it needs")
    found: dict[tuple[str, int], dict[float, float]] = {}
    with RATES.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["family"], int(row["width"])), {})[float(row["lr"])] = float(row["loss"])
    best = lambda losses: min(lr for lr, loss in losses.items() if loss < min(losses.values()) + TOLERANCE)
    return {f: (best(found[f, RATE_SHAPES[0][0]]), best(found[f, RATE_SHAPES[1][0]])) for f in CELLS}
