"""Asking a run to stop: a signal sets a flag, the loop finishes its step, saves and leaves."""

import signal
from types import FrameType

PREEMPTED = 75  # exit status: run the same command again
INTERRUPTED = 130  # exit status: stopped by Ctrl-C


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `status` is the exit status to leave with."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class StopFlag:
    """Set by SIGINT (Ctrl-C), SIGTERM and SIGUSR2 (SLURM's notice before preemption) while the context is open.

    A second Ctrl-C is not caught, so an impatient user gets out at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "StopFlag":
        self._previous = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def status(self) -> int:
        """The exit status that the signal asks for."""
        return INTERRUPTED if self.signal == signal.SIGINT else PREEMPTED
