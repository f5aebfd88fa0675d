"""Heartbeats: a file that a worker touches while it trains, for other machines, which may not see its lock."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmfree_jax.files import LockedError, read_object, write_json
from mmfree_jax.threads import repeated

# A shared file system may not share locks, and clocks differ. So nothing here compares the clocks of two machines: the
# age of a file is the difference of two time stamps that the file system itself gave.

FILE = "heartbeat.json"
BEAT_SECONDS = 5.0
THIS_MACHINE = "this machine"  # stands for a process that holds the lock and left no name
STALE_SECONDS = 120.0  # NFS may show a time stamp a minute late
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class Beat:
    """The process that trains a run, and the time of its last heartbeat by the file system's clock."""

    host: str
    pid: int
    job: str  # SLURM's number, or empty
    at: float

    def __str__(self) -> str:
        return f"job {self.job} on {self.host}" if self.job else f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def heartbeat(folder: Path, also: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Touch the file in `folder` while the context is open, and call `also` each time."""

    def beat() -> None:
        with contextlib.suppress(OSError):  # the shared file system may fail for a moment
            os.utime(folder / FILE)  # without a time, so that the server of a shared file system takes its own
        also()

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"host": socket.gethostname(), "pid": os.getpid(), "job": own_job()})
    # From a thread, not from the training loop: a step, a compilation or a save may take longer than the period.
    try:
        with repeated(beat, BEAT_SECONDS):
            yield
    finally:
        (folder / FILE).unlink(missing_ok=True)


def own_job() -> str:
    """Return SLURM's number of the job that this process runs in, as ARRAY_TASK or JOB; empty outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def last_beat(folder: Path) -> Beat | None:
    """Return the heartbeat in a run's folder; None if no process trains it, or one has just stopped."""
    path = folder / FILE
    try:
        found, at = read_object(path), path.stat().st_mtime
    except FileNotFoundError:
        return None
    host, pid, job = (found.get(name) for name in ("host", "pid", "job"))
    if not (isinstance(host, str) and type(pid) is int and isinstance(job, str)):
        raise ValueError(f"{path} names no process: remove it")
    return Beat(host, pid, job, at)


def file_clock(folder: Path) -> float:
    """Return the time of the file system that holds `folder`, or of this machine if nothing can be written there."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        with tempfile.TemporaryFile() as file:
            return os.fstat(file.fileno()).st_mtime


def holder(folder: Path, now: float | None = None) -> Beat | None:
    """Return the process that trains in `folder`, or None. `now`: its `file_clock`, for callers with many folders.

    For this machine the lock decides, without delay: the system releases it however a process ends. For another machine
    the heartbeat decides, up to STALE_SECONDS late.
    """
    beat = last_beat(folder)
    if is_locked(folder):
        return beat or Beat(THIS_MACHINE, 0, "", 0.0)
    if beat is None or beat.host == socket.gethostname():
        return None
    return beat if (file_clock(folder) if now is None else now) - beat.at < STALE_SECONDS else None


def is_locked(folder: Path) -> bool:
    """Return whether a process of this machine holds the folder's lock now."""
    try:
        file = (folder / ".lock").open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def wait_until_free(folder: Path, patience_s: float = 120.0) -> None:
    """Wait until no other process trains in `folder`. The heartbeat of a dead machine expires.

    Raises LockedError if the other process goes on: on this machine after `patience_s` (one that was told to stop may
    first have to finish compiling, a step or an evaluation), on another machine at its next heartbeat.
    """
    # Two rules. A process of this machine holds a lock, which ends with it: wait for it. One elsewhere is known by its
    # heartbeat only: if that moves on while we look, somebody works there.
    deadline, seen = time.monotonic() + patience_s, None
    while (beat := holder(folder)) is not None:
        here = beat.host in (socket.gethostname(), THIS_MACHINE)
        if not here and beat.job and beat.job == own_job():
            return  # it is this same job, which SLURM has restarted on another node
        if time.monotonic() > deadline if here else seen is not None and beat.at > seen.at:
            raise LockedError(f"{folder}: {beat} is working here")
        seen = beat
        time.sleep(0.2)
