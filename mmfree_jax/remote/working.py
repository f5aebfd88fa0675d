"""Where a run at a URL works: in a local folder, of which a thread keeps a copy in the bucket.

Locks, renames and appended logs need a file system, and object stores are none, so nothing works in the bucket itself.
"""

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax

from mmfree_jax.checksums import first_damage
from mmfree_jax.config import require
from mmfree_jax.distributed import PeerLost, first_does, is_alone, is_first, sum_integers
from mmfree_jax.files import LockedError, cache_folder, locked, read_json, url_of, write_atomically
from mmfree_jax.remote.bucket import Bucket, Closed, RemoteError
from mmfree_jax.remote.copy import Copy, note_of
from mmfree_jax.remote.layout import PART, Unit, begun, complete, files, is_list, place, reached
from mmfree_jax.remote.lease import BEAT_SECONDS, LEASE, Lease
from mmfree_jax.threads import repeated

# Files of a run of several processes: in the first one it ends; the copy has ended too.
ENDING, ENDED = "ending", "ended"
FOLLOW_SECONDS = 60.0  # in which the first process fails where another one has; network file systems show it late
LOOK_SECONDS = 0.2


class NotCopied(RemoteError):
    """A run has ended, but not everything is in its bucket: the same command goes on."""


@contextlib.contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """Yield the folder that a run at `out` works in: `out` itself or, for a URL, a folder of the cache.

    What the bucket has and the folder lacks is brought first. At the end, waits until everything is in the bucket.
    Raises RemoteError (no such bucket, another process works there), NotCopied; ConfigError if a package is missing or
    the processes of the run do not share the folder. All processes must use it.
    """
    if not (url := url_of(out)):
        yield out
        return
    home = home_of(url)
    folder = home / "run" / out.name
    with contextlib.ExitStack() as stack:
        begin = lambda: stack.enter_context(_copied(url, home, folder))
        if is_alone():  # as the driver of a sweep, which must leave the devices to its workers
            begin()
            yield folder
            return
        first_does(begin)
        check_shared(url, home)
        with _first_ending(home, stack) if is_first() else _waiting_for_first(home):
            yield folder


@contextlib.contextmanager
def _first_ending(home: Path, stack: contextlib.ExitStack) -> Iterator[None]:
    """In the first process: say when the run's end begins, close the copy, and say that it has ended."""
    try:
        with stack:
            try:
                yield
            finally:
                (home / ENDING).touch()
    finally:
        (home / ENDED).touch()


@contextlib.contextmanager
def _waiting_for_first(home: Path) -> Iterator[None]:
    """In the others: end after the first process, to which JAX gives little time to follow them to their end."""
    try:
        yield
    except PeerLost:  # perhaps it is gone
        raise
    except BaseException:  # if it has not failed too, it waits for this process
        _wait_for(home / ENDING, FOLLOW_SECONDS)
        if (home / ENDING).exists():
            _wait_for(home / ENDED)
        raise
    _wait_for(home / ENDED)


def _wait_for(file: Path, seconds: float = math.inf) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def check_shared(url: str, home: Path) -> None:
    """Raise ConfigError if not all processes of this run see what the first one writes into `home`. All must call it.

    The name of the file is new, because a network file system may show for a while that an old one is (not) there.
    """
    number = sum_integers([secrets.randbits(63) if is_first() else 0])[0]
    mark = home / f".seen-{number:x}"
    first_does(mark.touch)
    seen = sum_integers([int(mark.exists())])[0]
    if is_first():
        mark.unlink()
    require(
        seen == jax.process_count(),
        f"{url}: not all processes of this run share the folder {home}: let MMFREE_JAX_CACHE name one that they "
        "share, or mount the bucket",
    )


def home_of(url: str) -> Path:
    """Return the folder of the cache for what belongs to a URL."""
    return cache_folder() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _copied(url: str, home: Path, folder: Path) -> Iterator[None]:
    """Hold the lease of a URL, bring what is there, and keep it equal to the folder while the context is open."""
    bucket, lease, ended = Bucket(url), Lease(Bucket(url)), threading.Event()
    with _alone_here(url, home):
        for name in (ENDING, ENDED):
            (home / name).unlink(missing_ok=True)
        try:
            lease.take()
            with repeated(lambda: _beat(lease, bucket, ended), BEAT_SECONDS):  # until the last upload has ended
                _check_same(url, home, lease.run)
                own = _name_of(home)
                _bring(bucket, folder, home / "stage", is_old=lease.place != own)
                lease.place = own
                _beat(lease, bucket, ended)  # from now on what is here is as new as what is there
                copy, failure = Copy(bucket, folder, home / "stage"), None
                with _repeating(copy, ended):
                    try:
                        yield
                    except Exception as error:  # what was stopped or has failed is copied too
                        failure = error
                why = copy.finish()
            _beat(lease, bucket, ended)  # a last look
            if bucket.closed:
                raise Closed(f"{url}: {bucket.closed}")
            if failure is not None:
                raise failure
            if why:
                raise NotCopied(f"{why}: not everything is there, and the same command goes on")
        finally:
            lease.release()


@contextlib.contextmanager
def _repeating(copy: Copy, ended: threading.Event) -> Iterator[None]:
    """Copy in a thread while the context is open. Where it is left in haste, as by a second Ctrl-C, no object follows
    the present one."""
    thread = threading.Thread(target=copy.repeat, args=(ended,), name="copy", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        copy.bucket.closed = copy.bucket.closed or "this process was interrupted"
        raise
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _alone_here(url: str, home: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(home))
        except LockedError as error:
            raise RemoteError(f"{url}: {error}") from None
        yield


def _beat(lease: Lease, bucket: Bucket, ended: threading.Event) -> None:
    """In a thread, because an upload may take longer than the time between two heartbeats."""
    with contextlib.suppress(RemoteError):  # copying fails then too, and says so
        lease.beat()
    if lease.successor and not bucket.closed:
        bucket.closed = f"{lease.successor} has taken over, having heard nothing from this process"
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # the run saves what it has, here, and ends


def _name_of(home: Path) -> str:
    """A name of this folder that no other machine's has."""
    note = home / "name"
    if not note.exists():
        write_atomically(note, uuid.uuid4().hex)
    return note.read_text(encoding="utf-8")


def _check_same(url: str, home: Path, run: str) -> None:
    """Raise RemoteError if this machine holds another run of this URL than the bucket, which may be empty by now."""
    note = home / "id"
    if note.exists() and note.read_text(encoding="utf-8") != run and any((home / "run").glob("*/*")):
        raise RemoteError(
            f"{url} is not what {home} is a copy of: put that back into the bucket, or remove this folder"
        )
    write_atomically(note, run)


def _bring(bucket: Bucket, folder: Path, stage: Path, is_old: bool = False) -> None:
    """Bring the runs of which the bucket has a newer checkpoint, and files that the folder lacks.

    is_old: another machine has written there since this one has. What it wrote and removed counts, except of runs that
    have come further here.
    """
    names, local = bucket.names(), list(files(folder))
    there, here = complete(names), begun(local)
    far, near = reached(names, there), reached(local, here)
    ahead = tuple(run for run in near if near[run] > far.get(run, (-1, False)))
    is_replaced = lambda name: is_old and not name.startswith(ahead)
    shutil.rmtree(stage, ignore_errors=True)
    behind = {}
    for run, (newest, _) in far.items():
        if newest > near.get(run, (-1, False))[0]:
            steps = sorted(step for other, step in there - here if other == run)
            behind[run] = [step for step in steps if _intact(bucket, stage, (run, step), names)]
    wanted = lambda name: name.startswith(tuple(behind)) or is_replaced(name) or not (folder / name).exists()
    own = (name for name in names if name != LEASE and not PART.fullmatch(name))
    bucket.download(folder, {name: name for name in own if wanted(name)})
    for name in set(read_json(note_of(stage)) if note_of(stage).exists() else ()) - names.keys():
        if is_replaced(name):
            (folder / name).unlink(missing_ok=True)
    for run, steps in behind.items():
        if steps and f"{run}result.json" not in names:
            logs = place((run, steps[-1]), "logs")
            bucket.download(folder, {name: run + name.removeprefix(logs) for name in names if name.startswith(logs)})
        for step in steps:  # the newest comes last: as long as it is not here, all of this is done again
            (folder / run / "checkpoints").mkdir(parents=True, exist_ok=True)
            (stage / place((run, step))).rename(folder / place((run, step)))


def _intact(bucket: Bucket, stage: Path, unit: Unit, names: Iterable[str]) -> bool:
    """Bring a checkpoint into the stage. Returns whether it is what was written; if not, it is not used any more."""
    own = [name for name in names if name.startswith(place(unit))]
    bucket.download(stage, {name: name for name in own})
    if damage := first_damage(stage / place(unit)):
        print(f"{bucket.url}/{place(unit)} is damaged ({damage}) and not used", file=sys.stderr, flush=True)
        bucket.delete(name for name in own if is_list(name))
    return not damage
