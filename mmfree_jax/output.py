"""What is printed never decides how a command ends: no name in it, no terminal's encoding, no reader that has left."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


NOBODY = (errno.EPIPE, errno.EIO)  # a pipe without a reader, as after `… | head`; a terminal that was closed


class Stream(io.FileIO):
    """A file descriptor to write to; what nobody can read any more is thrown away."""

    def write(self, data: Any) -> int:
        """Number of bytes taken."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in NOBODY:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes


def settle() -> None:
    """Give this process standard streams that take any text: characters that the encoding has not are written as \\u….

    Once, at the start of a command.
    """
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if not isinstance(old, io.TextIOWrapper):
            continue
        old.flush()
        buffer = io.BufferedWriter(Stream(old.fileno(), "w", closefd=False))
        own = io.TextIOWrapper(buffer, old.encoding, "backslashreplace", line_buffering=old.line_buffering)
        setattr(sys, name, own)


def teller(console: Console) -> Callable[[str | Text], None]:
    """Prints lines as they are, however long, and whatever brackets and colons the names in them have."""
    return lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)
