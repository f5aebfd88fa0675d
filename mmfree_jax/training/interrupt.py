"""Asking a run to stop: a signal sets a flag, the loop finishes its step, saves and leaves."""

import signal
from types import FrameType

PREEMPTED = 75  # exit status: run the same command again
INTERRUPTED = 130  # exit status: stopped by Ctrl-C
TIMED_OUT = 124  # exit status: the run's time limit is over


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `status` is the exit status to leave with."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class StopFlag:
    """Set by SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone), SIGUSR2 (SLURM's notice before preemption) and
    SIGALRM (time is up).

    Only while the context is open. An ignored SIGHUP, as under `nohup`, stays ignored. A second Ctrl-C is not caught,
    so an impatient user gets out at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGALRM)

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "StopFlag":
        heard = [n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._set) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_status(number: int) -> int:
    """The exit status that a signal asks for."""
    return {signal.SIGINT: INTERRUPTED, signal.SIGALRM: TIMED_OUT}.get(signal.Signals(number), PREEMPTED)
