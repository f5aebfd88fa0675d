"""A copy of a folder of runs in a bucket, kept up to date while they work."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from mmfree_jax.checksums import first_damage
from mmfree_jax.errors import sentence
from mmfree_jax.files import write_json
from mmfree_jax.remote.bucket import Bucket, Closed, RemoteError
from mmfree_jax.remote.layout import LAST, LOGS, Unit, complete, is_list, lists, others, place, places

PERIOD_SECONDS = 20.0  # between two looks at the folder
LONGEST_PAUSE_SECONDS = 60.0  # between two attempts
PATIENCE_SECONDS = 600.0  # how long a run waits at its end until everything is in the bucket


def note_of(stage: Path) -> Path:
    """Return the file that names what was in the bucket after the last pass, besides checkpoints."""
    return stage.with_name("sent.json")


class Copy:
    """Makes what is under a URL equal to a folder, one pass after another."""

    def __init__(self, bucket: Bucket, folder: Path, stage: Path):
        self.bucket, self.folder, self.stage = bucket, folder, stage
        names = bucket.names()
        # Checkpoints that are equal there, and when they were sealed here. Others may be of a machine that is gone.
        self.there = self._equal(complete(names))
        # Time of change and size of each other file that is there; not known of those that were there before.
        self.sent = {name: (0, 0) for name in others(folder) if name in names}
        self.noted: set[str] = set()  # the names in the note of what is there
        self.pause = 0.0  # before the next attempt, if the last one has failed

    def repeat(self, ended: threading.Event) -> None:
        """Make a pass every few seconds, after failures with ever longer pauses. For a thread."""
        with contextlib.suppress(Closed):
            while not ended.wait(self.pause or PERIOD_SECONDS):
                self.attempt()

    def finish(self) -> str:
        """Make passes until one is complete, when nothing changes any more. Returns why none was; raises Closed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while why := self.attempt(look=True):
            if time.monotonic() + self.pause > deadline:
                return why
            time.sleep(self.pause)
        return ""

    def attempt(self, look: bool = False) -> str:
        """Make a pass. Returns why it failed; the first failure in a row is also reported on stderr.

        look: first see what is there, which somebody may have removed. Raises Closed.
        """
        try:
            if look:
                names = self.bucket.names()
                self.sent = {name: state for name, state in self.sent.items() if name in names}
                self.there = {unit: self.there[unit] for unit in complete(names) & self.there.keys()}
            self._update()
            if self.noted != self.sent.keys():
                write_json(note_of(self.stage), sorted(self.sent))
                self.noted = set(self.sent)
        except Closed:
            raise
        except (RemoteError, OSError) as error:
            why = sentence(error)
            if not self.pause:
                print(f"{why}: the run goes on, and what is missing there is tried again", file=sys.stderr, flush=True)
            self.pause = min(max(1.0, 2 * self.pause), LONGEST_PAUSE_SECONDS)
            return why
        if self.pause:
            print(f"{self.bucket.url}: everything is there again", file=sys.stderr, flush=True)
        self.pause = 0.0
        return ""

    def _update(self) -> None:
        shutil.rmtree(self.stage, ignore_errors=True)  # what could not be sent; it may be gone here
        # A file of `LAST` is looked for before the checkpoint that it tells of, and sent after it.
        files, here = list(others(self.folder)), self._here()
        new = [unit for unit in sorted(here, key=lambda unit: -unit[1]) if here[unit] != self.there.get(unit)]
        taken = [unit for unit in new if self._take(unit)]
        self._send(name for name in files if not name.endswith(LAST))
        for unit in taken:
            self._send_checkpoint(unit)
            self.there[unit] = here[unit]
        # What was removed here is removed there once the run has another one there.
        safe = {unit[0] for unit in here.keys() & self.there.keys()}
        for unit in [unit for unit in self.there.keys() - here.keys() if unit[0] in safe]:
            self._remove_checkpoint(unit)
            del self.there[unit]
        self._send(name for name in files if name.endswith(LAST))
        for name in self.sent.keys() - set(files):
            self.bucket.delete([name])
            del self.sent[name]

    def _here(self) -> dict[Unit, int]:
        """The complete checkpoints in the folder, and when they were sealed: after a rewind one may come again."""
        found = list(lists(self.folder))
        return {unit: self._sealed_at(unit) for unit in complete(found)}

    def _sealed_at(self, unit: Unit) -> int:
        with contextlib.suppress(FileNotFoundError):
            return max(path.stat().st_mtime_ns for path in self._lists(unit))
        return 0

    def _lists(self, unit: Unit) -> list[Path]:
        return [path for path in (self.folder / place(unit)).iterdir() if is_list(path.name)]

    def _equal(self, units: set[Unit]) -> dict[Unit, int]:
        """Of these checkpoints in the bucket, those that are the same as here: their checksums are equal."""
        same = lambda unit, path: self.bucket.read(place(unit) + path.name) == path.read_bytes()
        here = self._here()
        return {unit: here[unit] for unit in units & here.keys() if all(same(unit, p) for p in self._lists(unit))}

    def _send(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                about = (self.folder / name).stat()
                state = about.st_mtime_ns, about.st_size
                if self.sent.get(name) != state:
                    content = (self.folder / name).read_bytes()  # as it is now: a log may grow during the upload
                    self.bucket.write(name, content)
                    self.sent[name] = state

    def _take(self, unit: Unit) -> bool:
        """Set a checkpoint apart with its logs, because the run may remove it first. Returns whether that is done."""
        run, (own, beside) = self.folder / unit[0], (self.stage / one for one in places(unit))
        for folder in (own, beside):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            shutil.copytree(self.folder / place(unit), own, copy_function=_link)
            for path in (path for pattern in LOGS for path in run.glob(pattern)):
                (beside / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, beside / path.relative_to(run))
        except OSError:
            if (self.folder / place(unit)).is_dir():
                raise
        # While a checkpoint is here, no rewind has cut the logs that were copied.
        return (self.folder / place(unit)).is_dir() and not first_damage(own, contents=False)

    def _send_checkpoint(self, unit: Unit) -> None:
        self._remove_checkpoint(unit)  # an older one of this step, or a part of this one
        found = [path for one in places(unit) for path in (self.stage / one).rglob("*") if path.is_file()]
        names = [path.relative_to(self.stage).as_posix() for path in found]
        self.bucket.upload(self.stage, [name for name in names if not is_list(name)])
        self.bucket.upload(self.stage, [name for name in names if is_list(name)])
        for one in places(unit):
            shutil.rmtree(self.stage / one, ignore_errors=True)

    def _remove_checkpoint(self, unit: Unit) -> None:
        names = [name for name in self.bucket.names() if name.startswith(places(unit))]
        self.bucket.delete(sorted(names, key=is_list, reverse=True))  # lists first: from then on it is not complete


def _link(source: str, target: str) -> None:
    """Link a file, which takes no room; copy it where a file system has no links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
