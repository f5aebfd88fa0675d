"""Asking a run to stop: a signal sets a flag, the loop finishes its step, saves and leaves."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterable, Iterator

PREEMPTED = 75  # exit status: run the same command again
INTERRUPTED = 130  # exit status: stopped by Ctrl-C
TIMED_OUT = 124  # exit status: the run's time limit is over


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `status` is the exit status to leave with."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# Ctrl-C, a polite kill, a terminal that was closed, and what batch systems send before they preempt a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def handling(signals: Iterable[int], handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each of these signals that comes while the context is open.

    A SIGHUP that is ignored, as under `nohup`, stays ignored.
    """
    # Python runs handlers in the main thread between two bytecodes: a handler that only sets a flag is safe anywhere.
    heard = [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, _: handler(number)) for number in heard}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@dataclasses.dataclass
class StopFlag:
    """Which signal has asked this run to stop; None so far."""

    signal: int | None = None


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Set the flag on SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone), SIGUSR1 and SIGUSR2 (a notice before
    preemption) and SIGALRM (time is up), as long as the context is open.

    A second Ctrl-C is not caught, so that an impatient user gets out at once.
    """
    flag = StopFlag()

    def stop(number: int) -> None:
        flag.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with handling((*STOP_SIGNALS, signal.SIGALRM), stop):
        yield flag


def exit_status(number: int) -> int:
    """Return the exit status that a signal asks for."""
    return {signal.SIGINT: INTERRUPTED, signal.SIGALRM: TIMED_OUT}.get(signal.Signals(number), PREEMPTED)
