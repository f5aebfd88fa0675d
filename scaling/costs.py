"""Cost axes: FLOP under several conventions, energy by operation class, measured joules, seconds, money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaling.laws.base import Law
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
NEEDS = {"flops": "flops", "flops-6nd-nonemb": "N_nonemb", "joules": "joules", "seconds": "seconds", "usd": "seconds"}


@dataclass(frozen=True)
class Energy:
    """Picojoules of one counted operation (a multiply-accumulate counts two), and where the number is from."""

    picojoules: float
    source: str


# Arithmetic alone, without memory traffic, and as if the backward pass of ternary layers accumulated too: a bound.
HOROWITZ = "45 nm, 0.9 V: Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9"
FP16_MAC = Energy(0.75, f"half of FP16 multiply 1.1 and add 0.4; {HOROWITZ}")
ENERGIES = {
    "dense": FP16_MAC,
    "attention": FP16_MAC,
    "head": FP16_MAC,
    "elementwise": Energy(0.9, f"FP32 add 0.9; {HOROWITZ}"),
    "ternary": Energy(0.05, f"half of INT32 add 0.1, one accumulation counts two; {HOROWITZ}"),
}


@dataclass(frozen=True)
class Prices:
    """What operations and hours cost: energy by operation class, dollars per accelerator-hour (None: not known)."""

    energies: Mapping[str, Energy] = field(default_factory=lambda: ENERGIES)
    usd_per_hour: float | None = None

    @classmethod
    def of(cls, picojoules: Mapping[str, float] | None = None, usd_per_hour: float | None = None) -> Prices:
        """The cited table with some classes replaced (pJ per counted operation); raises ScalingError on another one."""
        given = {name: Energy(value, "given by the user") for name, value in (picojoules or {}).items()}
        unknown = sorted(set(given) - set(ENERGIES))
        if unknown:
            raise ScalingError(f"no operation class {unknown[0]!r}; there are {', '.join(ENERGIES)}")
        return cls(ENERGIES | given, usd_per_hour)


CITED = Prices()


def axis_cost(runs: Runs, axis: str, prices: Prices = CITED) -> np.ndarray:
    """(n,) cost of each run on the named axis; raises ScalingError when the table lacks what the axis needs."""
    reason = lacking(runs, axis, prices)
    if reason:
        raise ScalingError(f"axis {axis!r} {reason}")
    if axis == "flops-6nd":
        return 6 * runs["N"] * runs["D"]
    if axis == "flops-6nd-nonemb":
        return 6 * runs["N_nonemb"] * runs["D"]
    if axis == "energy":
        return arithmetic_energy(runs, prices)
    if axis == "usd":
        return runs["seconds"] * (prices.usd_per_hour or 0.0) / 3600
    return runs[axis]


def lacking(runs: Runs, axis: str, prices: Prices = CITED, law: Law | None = None) -> str:
    """What a table lacks for an axis, or why a law cannot be put on it, in words; nothing where the axis can be had."""
    if axis not in AXES:
        return f"is unknown; choose from {', '.join(AXES)}"
    if law is not None and not law.has_allocation and axis != "flops":
        return f"needs a law of N and D: law {law.name!r} knows the table's own FLOP only"
    if axis == "usd" and prices.usd_per_hour is None:
        return "needs a price: --usd-per-hour"
    # An axis is refused for a single blank: a family that lacks it in some runs would be compared on others.
    needed = counted_classes(runs) if axis == "energy" else [NEEDS[axis]] if axis in NEEDS else []
    if axis == "energy" and not needed:
        return "needs operation counts by class: columns flops_dense, flops_ternary, ..."
    for column in needed:
        if column not in runs.columns:
            return f"needs a column {column!r}"
        absent = np.isnan(runs[column])
        if absent.any():
            return f"needs {column} for every run; {runs['run_id'][absent][0]!r} lacks it"
    return ""


def available_axes(runs: Runs, prices: Prices = CITED, law: Law | None = None) -> list[str]:
    """Axes that the table, and a law fitted to it, can be put on, the first being its own FLOP count."""
    return [axis for axis in AXES if not lacking(runs, axis, prices, law)]


def counted_classes(runs: Runs) -> list[str]:
    """Columns of operation counts by class."""
    return [f"flops_{name}" for name in ENERGIES if f"flops_{name}" in runs.columns]


def arithmetic_energy(runs: Runs, prices: Prices = CITED) -> np.ndarray:
    """(n,) joules of arithmetic from the columns flops_CLASS; every class that has a column counts."""
    present: Sequence[str] = counted_classes(runs)
    picojoules = [prices.energies[column.removeprefix("flops_")].picojoules for column in present]
    return 1e-12 * np.array(picojoules) @ np.stack([runs[column] for column in present])
