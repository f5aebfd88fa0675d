"""Equality of records that hold arrays: `==` on them would otherwise raise."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


class Equal:
    """Dataclasses (declared with eq=False) are equal where their types and all fields are, NaN equal to NaN."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)  # type: ignore[arg-type]

    __hash__ = object.__hash__


def equal(one: Any, two: Any) -> bool:
    """Of values that may hold arrays at any depth."""
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        same = np.shape(one) == np.shape(two)
        return same and bool(np.all((one == two) | ((one != one) & (two != two))))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(equal(x, y) for x, y in zip(one, two, strict=True))
    if is_dataclass(one) and type(one) is type(two):
        return all(equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(one) if f.compare)
    if hasattr(one, "__dict__") and type(one) is type(two) and not callable(one) and type(one).__eq__ is object.__eq__:
        return equal(vars(one), vars(two))
    return bool(one == two) or (one != one and two != two)
