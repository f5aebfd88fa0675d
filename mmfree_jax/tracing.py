"""Settings that hold while a program is traced, for what is decided deep inside it."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def during(setting: ContextVar[T], value: T) -> Iterator[None]:
    """`setting` has this value for what is traced inside. Also a decorator."""
    token = setting.set(value)
    try:
        yield
    finally:
        setting.reset(token)
