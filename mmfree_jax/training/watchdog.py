"""A watchdog: a run that makes no step for long says where it stands, and ends so that the same command can go on.

A reader may wait for a file server forever, and a collective operation for a process that hangs. Neither runs Python in
the main thread, so only another thread can say so and end the process.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mmfree_jax.training.interrupt import PREEMPTED

STACKS = "stacks.txt"
LOOKS = 20  # within the limit


class Watchdog(contextlib.AbstractContextManager):
    """Watches the phases of a run while the context is open. A limit of 0 `seconds` watches nothing."""

    def __init__(self, name: str, folder: Path, seconds: float):
        self.name, self.folder, self.seconds = name, folder, seconds
        self._phase, self._since = "", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.seconds:
            self._thread.join()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Watch this phase: it must not take longer than the limit."""
        self._since, self._phase = time.monotonic(), phase
        try:
            yield
        finally:
            self._phase = ""

    def _watch(self) -> None:
        while not self._ended.wait(self.seconds / LOOKS):
            phase, since = self._phase, self._since
            if phase and time.monotonic() - since > self.seconds:
                self._end(phase)

    def _end(self, phase: str) -> None:
        """Leave the stacks of all threads, and end the process: what hangs cannot be asked to."""
        line = f"{self.name}: no progress for {self.seconds:g} s, {phase}; stacks are in {self.folder / STACKS}"
        with contextlib.suppress(OSError):
            with (self.folder / STACKS).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  process {os.getpid()}: {phase}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        print(f"{line}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(PREEMPTED)
