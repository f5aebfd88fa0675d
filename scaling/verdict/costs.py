"""Cost axes: FLOP under several conventions, energy by operation class, measured joules, seconds, money."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaling.tables.runs import Runs, ScalingError

AXES = {
    "flops": "FLOP",
    "flops-6nd": "FLOP (6 N D)",
    "flops-6nd-nonemb": "FLOP (6 N_nonemb D)",
    "energy": "J of arithmetic",
    "joules": "J measured",
    "seconds": "accelerator-seconds",
    "usd": "$",
}
# Picojoules per counted operation; a multiply-accumulate counts two. 45 nm, Horowitz, ISSCC 2014, figure 1.1.9: FP16
# multiply 1.1 and add 0.4, hence 0.75; FP32 add 0.9; INT32 add 0.1 for a ternary accumulation that counts two, hence
# 0.05. Arithmetic alone, no memory traffic, and as if the backward pass of ternary layers accumulated too: a bound.
ENERGY_PJ = {"dense": 0.75, "attention": 0.75, "head": 0.75, "elementwise": 0.9, "ternary": 0.05}


def axis_cost(
    runs: Runs, axis: str, energy: Mapping[str, float] | None = None, usd_per_hour: float | None = None
) -> np.ndarray:
    """(n,) cost of each run on the named axis; raises ScalingError when the table lacks what the axis needs.

    `energy` overrides picojoules per operation class; `usd_per_hour` is the price of an accelerator.
    """
    if axis not in AXES:
        raise ScalingError(f"unknown axis {axis!r}; choose from {', '.join(AXES)}")
    if axis == "flops-6nd":
        return 6 * runs["N"] * runs["D"]
    if axis == "flops-6nd-nonemb":
        return 6 * complete(runs, "N_nonemb", axis) * runs["D"]
    if axis == "energy":
        return arithmetic_energy(runs, dict(ENERGY_PJ) | dict(energy or {}))
    if axis == "usd":
        if usd_per_hour is None:
            raise ScalingError("axis usd needs a price: --usd-per-hour")
        return complete(runs, "seconds", axis) * usd_per_hour / 3600
    return complete(runs, axis, axis)


def complete(runs: Runs, column: str, axis: str) -> np.ndarray:
    """A column that every run must have."""
    values = runs[column]
    if np.isnan(values).any():
        missing = runs["run_id"][np.isnan(values)][0]
        raise ScalingError(f"axis {axis!r} needs {column} for every run; {missing!r} lacks it")
    return values


def arithmetic_energy(runs: Runs, table: Mapping[str, float]) -> np.ndarray:
    """(n,) joules of arithmetic from the columns flops_CLASS; all classes of the table that have a column count."""
    unknown = set(table) - set(ENERGY_PJ)
    if unknown:
        raise ScalingError(f"no operation class {sorted(unknown)[0]!r}; there are {', '.join(ENERGY_PJ)}")
    present = [name for name in table if f"flops_{name}" in runs.columns]
    if not present:
        raise ScalingError("axis 'energy' needs operation counts by class: columns flops_dense, flops_ternary, ...")
    counts = np.stack([complete(runs, f"flops_{name}", "energy") for name in present])
    return 1e-12 * np.array([table[name] for name in present]) @ counts


def ternary_share(runs: Runs) -> float:
    """Share of operations that are ternary accumulations (median over runs); 1 where nothing is counted by class."""
    if "flops_ternary" not in runs.columns:
        return 1.0
    return float(np.median(complete(runs, "flops_ternary", "energy") / runs["flops"]))
