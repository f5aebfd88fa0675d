"""Files of lines that a full disk cannot tear: what it does not take waits in memory, and training goes on."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from mmfree_jax.files import naming


class Lines:
    """Appends to a file. Lines that cannot be written now are written later, in order; `sync` says if they are not."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("ab", buffering=0)  # unbuffered: how many bytes were taken is known
        self._waiting = b""
        self._refused = False

    def write(self, text: str) -> None:
        """Append text. The first line that the disk refuses is reported on stderr."""
        self._waiting += text.encode()
        try:
            self._drain()
        except OSError as error:
            if not self._refused:
                print(f"{error}: training goes on, and the lines wait in memory", file=sys.stderr, flush=True)
            self._refused = True

    def sync(self) -> None:
        """Write everything to the disk. Raises OSError, naming the file, if it takes less."""
        self._drain()
        with naming(self.path):
            os.fsync(self._file.fileno())

    def cut(self, size: int) -> None:
        """Keep only the first `size` bytes, of what waits too."""
        written = os.fstat(self._file.fileno()).st_size
        self._waiting = self._waiting[: max(0, size - written)]
        os.ftruncate(self._file.fileno(), min(size, written))

    def close(self) -> None:
        """Close the file. Lines that wait still are lost."""
        self._file.close()

    def _drain(self) -> None:
        # A write may take some of the bytes and refuse the rest, so the rest is what waits: no line is torn or doubled.
        with naming(self.path):
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        self._refused = False


def drop_what_is_refused(board: SummaryWriter) -> None:
    """Let TensorBoard's writer drop what a full disk refuses.

    An error would end its thread, and training would wait forever for room in its queue. metrics.jsonl has the numbers.
    """
    events: Any = board.file_writer.event_writer._ev_writer
    events._py_recordio_writer = _Dropping(events._py_recordio_writer)


class _Dropping:
    """Stands before a record writer and suppresses its errors."""

    def __init__(self, records: Any):
        self._records = records

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._records.write(data)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._records.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._records.close()
