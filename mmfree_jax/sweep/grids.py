"""Many runs out of one: every combination of some values, or values taken together."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmfree_jax.config import RunConfig, require, suggestion
from mmfree_jax.sweep.experiment import check_names

Values = Mapping[str, Sequence[Any]]  # dotted field of RunConfig -> its values: {"optim.lr": (1e-3, 2e-3)}


def grid(base: RunConfig, values: Values) -> list[RunConfig]:
    """A run for every combination, the last field varying fastest; named after base and the values.

    Raises ConfigError for a field that does not exist, a value that is not of its kind, or an impossible run.
    """
    return [_varied(base, dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def zipped(base: RunConfig, values: Values) -> list[RunConfig]:
    """A run for the first value of every field, one for the second of every field, and so on; named as in `grid`.

    Raises ConfigError as `grid` does, and for fields with different numbers of values.
    """
    counts = {name: len(column) for name, column in values.items()}
    require(len(set(counts.values())) <= 1, f"zipped: fields have different numbers of values: {counts}")
    return [_varied(base, dict(zip(values, chosen, strict=True))) for chosen in zip(*values.values(), strict=True)]


def chain(*parts: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs of all parts, one after the other. Raises ConfigError for two runs of one name."""
    runs = list(itertools.chain(*parts))
    check_names(runs, "chain")
    return runs


def _varied(base: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    run = base
    for name, value in chosen.items():
        run = _replaced(run, name.split("."), value, name)
    parts = [base.name, *(f"{name.rpartition('.')[2]}{_shown(value)}" for name, value in chosen.items())]
    return dataclasses.replace(run, name="-".join(parts))


def _replaced(config: Any, path: list[str], value: Any, whole: str) -> Any:
    """`config` with the field at `path` replaced; dataclasses on the way are checked anew."""
    name, *rest = path
    fields = [field.name for field in dataclasses.fields(config)]
    require(name in fields, f"{whole}: no such field{suggestion(name, fields)}")
    old = getattr(config, name)
    require(bool(rest) == dataclasses.is_dataclass(old), f"{whole}: names a group of fields, or goes past a field")
    if rest:
        return dataclasses.replace(config, **{name: _replaced(old, rest, value, whole)})
    kinds = (int, float) if isinstance(old, float) else type(old)
    fits = old is None or (isinstance(value, kinds) and isinstance(value, bool) == isinstance(old, bool))
    require(fits, f"{whole}={value!r}: must be of type {type(old).__name__}")
    return dataclasses.replace(config, **{name: value})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
