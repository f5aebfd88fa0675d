"""Writes a plan as an experiment that `launch.py sweep` runs as it is, without importing the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling.plan import Plan
from scaling.tables.runs import Runs, ScalingError

TEMPLATE = '''"""Planned ladder: {names}; {flops:.2e} FLOP in all.

    python launch.py sweep {path} --out runs/{name}

Written by `scaling plan` from {source}: sd of the difference at {target:.1e} FLOP
{sd_now:.3g} before, {sd_then:.3g} expected with these runs.
Learning rates are the power law in N through the rates of that table; check them before a large run.
The largest run reads {tokens:.1e} tokens: name a corpus that holds them.
"""

from mmfree_jax.config import DataConfig, OptimConfig, RunConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.shapes import nearest_model

DATA = DataConfig(corpus={corpus!r}, vocab={vocab}, sequence={sequence}, batch={batch})
FAMILIES = {families!r}
TRUNKS = {{  # parameters: tokens per parameter of each decay
{trunks}
}}
RATES = {{  # family: (coefficient, exponent) of lr = coefficient * N ** exponent
{rates}
}}


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
            shape = nearest_model(family, size, DATA.vocab)
            base = RunConfig(name=name, model=shape, data=DATA, optim=optim, steps=max(budgets))
            runs += trunk_and_decays(base, sorted(set(budgets)))
    return Study(name={name!r}, title="Planned ladder", runs=tuple(runs), baseline=FAMILIES[0])
'''


def write_experiment(plan: Plan, runs: Runs, families: tuple[str, ...], path: Path) -> None:
    """Writes the plan; data settings and learning rates come from the table's own columns. Raises ScalingError."""
    sequence = common(runs, "seq_len", 128.0)
    batch = max(1, round(common(runs, "batch_tokens", 8 * sequence) / sequence))
    text = TEMPLATE.format(
        families=families,
        names=" and ".join(families),
        tokens=max(t.n * max(t.ratios) for t in plan.trunks),
        flops=plan.flops,
        path=path,
        name=path.stem,
        source=runs.source,
        sd_now=plan.sd_now,
        sd_then=plan.sd_then,
        target=plan.target,
        corpus="embedded",
        vocab=round(common(runs, "vocab", 2048.0)),
        sequence=round(sequence),
        batch=batch,
        trunks=entries({float(f"{t.n:.4g}"): t.ratios for t in plan.trunks}),
        rates=entries({family: rate_law(runs.family(family)) for family in families}),
    )
    path.write_text(text, encoding="utf-8")


def entries(values: Mapping[Any, Any]) -> str:
    """The lines of a dict's literal."""
    return "\n".join(f"    {key!r}: {value!r}," for key, value in values.items())


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
        return float(f"{np.exp(log_rate.mean()):.6g}"), 0.0
    slope, level = np.polyfit(log_n, log_rate, 1)
    return float(f"{np.exp(level):.6g}"), round(float(slope), 6)
