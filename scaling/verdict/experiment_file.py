"""Writes a plan as an experiment that `launch.py sweep` runs as it is, without importing the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scaling.tables.runs import Runs, ScalingError
from scaling.verdict.plan import Plan

TEMPLATE = '''"""Planned ladder: {families}; {flops:.2e} FLOP in all.

    python launch.py sweep {path} --out runs/{name}

Written by `scaling plan` from {source}: sd of log10 C* {sd_now:.2f} before, {sd_then:.2f} expected with these runs.
Learning rates are the power law in N through the rates of that table; check them before a large run.
"""

from mmfree_jax import config, flops
from mmfree_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays

DATA = DataConfig(corpus={corpus!r}, vocab={vocab}, sequence={sequence}, batch={batch})
FAMILIES = {families!r}
TRUNKS = {trunks!r}  # parameters: tokens per parameter of each decay
RATES = {rates!r}  # family: (coefficient, exponent) of lr = coefficient * N ** exponent


def model(family: str, width: int) -> ModelConfig:
    """The shape rule: one layer per 64 of width, at least two; GLU width 8/3 of the width; heads of 32."""
    mixer, linear = config.FAMILIES[family]
    return ModelConfig(
        mixer,
        linear,
        vocab=DATA.vocab,
        width=width,
        depth=max(2, width // 64),
        glu_width=-(-width * 8 // 48) * 16,
        heads=max(1, width // 32) if mixer == "attention" else 1,
    )


def nearest(family: str, size: float) -> ModelConfig:
    """The model of the shape rule whose parameter count is nearest to a planned size."""
    models = [model(family, width) for width in range(32, 8193, 32)]
    return min(models, key=lambda m: abs(flops.parameters(m).N - size))


def study() -> Study:
    """One trunk and its decays for every planned size and family."""
    runs = []
    for size, ratios in TRUNKS.items():
        budgets = [max(16, round(ratio * size / DATA.tokens_per_step)) for ratio in ratios]
        for family in FAMILIES:
            coefficient, exponent = RATES[family]
            warmup = min(64, min(budgets) // 8)
            optim = OptimConfig(lr=coefficient * size**exponent, warmup_steps=warmup, weight_decay=0.1)
            name = f"{{family}}-{{size:.0f}}"
            base = RunConfig(name=name, model=nearest(family, size), data=DATA, optim=optim, steps=max(budgets))
            runs += trunk_and_decays(base, sorted(set(budgets)))
    return Study(name={name!r}, title="Planned ladder", runs=tuple(runs), baseline=FAMILIES[0], challenger=FAMILIES[1])
'''


def write_experiment(plan: Plan, runs: Runs, families: tuple[str, str], path: Path) -> None:
    """Writes the plan; data settings and learning rates come from the table's own columns. Raises ScalingError."""
    sequence = common(runs, "seq_len", 128.0)
    batch = max(1, round(common(runs, "batch_tokens", 8 * sequence) / sequence))
    text = TEMPLATE.format(
        families=families,
        flops=plan.flops,
        path=path,
        name=path.stem,
        source=runs.source,
        sd_now=plan.sd_now,
        sd_then=plan.sd_then,
        corpus="embedded",
        vocab=round(common(runs, "vocab", 2048.0)),
        sequence=round(sequence),
        batch=batch,
        trunks={float(f"{t.n:.4g}"): t.ratios for t in plan.trunks},
        rates={family: rate_law(runs.family(family)) for family in families},
    )
    path.write_text(text, encoding="utf-8")


def common(runs: Runs, column: str, otherwise: float) -> float:
    """The median of a column, or the fallback where the table lacks it."""
    values = runs.columns.get(column, np.array([np.nan]))
    return otherwise if np.isnan(values).all() else float(np.nanmedian(values))


def rate_law(part: Runs) -> tuple[float, float]:
    """(coefficient, exponent) of the learning rate along N; the rate must be recorded."""
    if "lr" not in part.columns or np.isnan(part["lr"]).all():
        raise ScalingError("an experiment file needs learning rates: the table has no lr column")
    known = ~np.isnan(part["lr"])
    log_n, log_rate = np.log(part["N"][known]), np.log(part["lr"][known])
    if np.ptp(log_n) == 0:
        return float(np.exp(log_rate.mean())), 0.0
    slope, level = np.polyfit(log_n, log_rate, 1)
    return float(np.exp(level)), float(slope)
