"""Grids: many runs from one, with every combination of some values, or with several values at a time."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmfree_jax.config import RunConfig, require, with_changes

Values = Mapping[str, Sequence[Any]]  # dotted field of RunConfig -> its values: {"optim.lr": (1e-3, 2e-3)}


def grid(base: RunConfig, values: Values) -> list[RunConfig]:
    """Return a run for every combination, the last field varying fastest, named after base and the values.

    Raises ConfigError for a field that does not exist, a value that is not of its kind, or an impossible run.
    """
    # `product` varies its last argument fastest.
    return _varied(base, values, itertools.product(*values.values()))


def zipped(base: RunConfig, values: Values) -> list[RunConfig]:
    """Return a run for the first value of every field, one for the second of every field, and so on; named as in
    `grid`.

    Raises ConfigError as `grid` does, and for fields with different numbers of values.
    """
    counts = {name: len(column) for name, column in values.items()}
    require(len(set(counts.values())) <= 1, f"zipped: fields have different numbers of values: {counts}")
    return _varied(base, values, zip(*values.values(), strict=True))


def repeats(base: RunConfig, seeds: Sequence[int]) -> list[RunConfig]:
    """Return the run once for each seed, with other initial weights and another order of the data; named NAME-seedN.

    They vary as much as if the study were repeated: with `seed` alone the order of the data would stay the same, with
    `data.seed` alone the initial weights. The held-out text is always the same.
    """
    return [
        dataclasses.replace(
            base, name=f"{base.name}-seed{seed}", seed=seed, data=dataclasses.replace(base.data, seed=seed)
        )
        for seed in seeds
    ]


def _varied(base: RunConfig, names: Iterable[str], rows: Iterable[Sequence[Any]]) -> list[RunConfig]:
    """One run for each row of values, which its name shows."""
    runs = []
    for row in rows:
        chosen = dict(zip(names, row, strict=True))
        parts = [base.name, *(f"{name.rpartition('.')[2]}{_shown(value)}" for name, value in chosen.items())]
        runs.append(dataclasses.replace(with_changes(base, chosen), name="-".join(parts)))
    return runs


def _shown(value: Any) -> str:
    """A value as part of a run's name, which is also that of its folder: of a path only the last part."""
    if isinstance(value, tuple):
        return "+".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]
