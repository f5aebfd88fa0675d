"""Settings that apply while a program is traced, for decisions deep inside it."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def during(setting: ContextVar[T], value: T) -> Iterator[None]:
    """Give `setting` a value for what is traced inside the context. Also a decorator."""
    token = setting.set(value)
    try:
        yield
    finally:
        setting.reset(token)
