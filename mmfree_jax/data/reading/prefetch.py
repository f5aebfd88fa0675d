"""A thread that works ahead, so that the consumer does not wait for what could have been prepared before."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Prefetched(Iterator[T]):
    """Iterates over the items of an iterator in order. A daemon thread prepares up to `size` of them in advance.

    An exception of the iterator is raised to the consumer at its place. The thread ends with the items, or at `close`.
    """

    def __init__(self, items: Iterator[T], size: int):
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=size)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="data-prefetch", daemon=True)
        self._thread.start()

    def _put(self, item: T | None, error: BaseException | None) -> None:
        # `put` without a limit would keep the thread, and with it the process, alive when the consumer has gone.
        while not self._stop.is_set():
            try:
                return self._ready.put((item, error), timeout=0.1)
            except queue.Full:  # the consumer is busy: look whether it has gone
                continue

    def _work(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item, None)
                if self._stop.is_set():
                    return
            self._put(None, StopIteration())
        except BaseException as error:
            self._put(None, error)

    def __next__(self) -> T:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # every later call says the same
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and drop what it had prepared."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)
