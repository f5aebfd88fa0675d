"""Printing that does not fail: any characters in names, any encoding of the terminal, with or without a reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


Say = Callable[[str], None]  # takes lines of progress
NO_READER = (errno.EPIPE, errno.EIO)  # a pipe without a reader, as after `… | head`; a terminal that was closed


class Stream(io.FileIO):
    """Writes to a file descriptor. When it has no reader any more, what is written is discarded."""

    def write(self, data: Any) -> int:
        """Return the number of bytes written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in NO_READER:
                raise
            # Later writes, also those of other libraries to this descriptor, then go nowhere instead of failing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes


def make_streams_tolerant() -> None:
    """Replace stdout and stderr by streams that take any text and survive their reader.

    Characters that the encoding lacks are written as \\u…. Call it once, at the start of a command.
    """
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if not isinstance(old, io.TextIOWrapper):
            continue
        old.flush()
        buffer = io.BufferedWriter(Stream(old.fileno(), "w", closefd=False))
        own = io.TextIOWrapper(buffer, old.encoding, "backslashreplace", line_buffering=old.line_buffering)
        setattr(sys, name, own)


def program() -> str:
    """Return the name of the running command, for messages: `mmfree` if it is the installed one, else `launch.py`."""
    return "mmfree" if Path(sys.argv[0]).stem == "mmfree" else "launch.py"


def quiet(line: str) -> None:
    """Print nothing."""


def line_printer(console: Console) -> Callable[[str | Text], None]:
    """Return a function that prints lines without wrapping them or interpreting them as markup."""
    return lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)
