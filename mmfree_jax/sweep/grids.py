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


def repeats(base: RunConfig, seeds: Sequence[int]) -> list[RunConfig]:
    """The run once for each seed, with other initial weights and its data in another order; named NAME-seedN.

    What varies between them is what varies between two runs of the same study made anew: `seed` alone would leave the
    order of the data out of it, `data.seed` alone the weights. The held-out text stays the same.
    """
    return [
        dataclasses.replace(
            base, name=f"{base.name}-seed{seed}", seed=seed, data=dataclasses.replace(base.data, seed=seed)
        )
        for seed in seeds
    ]


def chain(*parts: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs of all parts, one after the other. Raises ConfigError for two runs of one name."""
    runs = list(itertools.chain(*parts))
    check_names(runs, "chain")
    return runs


def _varied(base: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    run = _replaced(base, {tuple(name.split(".")): value for name, value in chosen.items()}, ())
    parts = [base.name, *(f"{name.rpartition('.')[2]}{_shown(value)}" for name, value in chosen.items())]
    return dataclasses.replace(run, name="-".join(parts))


def _replaced(config: Any, chosen: Mapping[tuple[str, ...], Any], at: tuple[str, ...]) -> Any:
    """`config`, itself the field `at`, with the fields at these paths replaced, all at once: values that go together
    need not be possible one by one. Dataclasses on the way are checked anew."""
    groups: dict[str, dict[tuple[str, ...], Any]] = {}
    for (name, *rest), value in chosen.items():
        groups.setdefault(name, {})[tuple(rest)] = value
    return dataclasses.replace(config, **{name: _field(config, name, inner, at) for name, inner in groups.items()})


def _field(config: Any, name: str, chosen: Mapping[tuple[str, ...], Any], at: tuple[str, ...]) -> Any:
    """The new value of one field: the only one of `chosen`, or the old one with the fields in it replaced."""
    fields = [field.name for field in dataclasses.fields(config)]
    whole = ".".join((*at, name, *next(iter(chosen))))
    require(name in fields, f"{whole}: no such field{suggestion(name, fields)}")
    old, inside = getattr(config, name), () not in chosen
    require(inside == dataclasses.is_dataclass(old), f"{whole}: names a group of fields, or goes past a field")
    if inside:
        return _replaced(old, chosen, (*at, name))
    value = chosen[()]
    kinds = (int, float) if isinstance(old, float) else type(old)
    fits = old is None or (isinstance(value, kinds) and isinstance(value, bool) == isinstance(old, bool))
    require(fits, f"{whole}={value!r}: must be of type {type(old).__name__}")
    return value


def _shown(value: Any) -> str:
    """As part of a name, which is that of a folder: of a path its end, of several values all."""
    if isinstance(value, tuple):
        return "+".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]
