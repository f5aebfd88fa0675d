"""One writer under a URL, where there are no locks: an object names it, and shows that it lives."""

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from mmfree_jax.remote.bucket import Bucket, RemoteError

BEAT_SECONDS = 15.0  # between two heartbeats
STALE_SECONDS = 60.0  # a process whose heartbeat has not changed for so long has ended
SETTLE_SECONDS = 1.0  # of two processes that come at once, the one that wrote last finds its own heartbeat afterwards
LEASE = ".lease.json"


class Lease:
    """The right to write under a URL: an object that names its holder, who changes it every few seconds.

    No clocks are compared: whoever comes while there is a holder waits to see whether it still changes the object.
    """

    def __init__(self, bucket: Bucket):
        self.bucket, self.beats, self.token = bucket, 0, uuid.uuid4().hex
        self.host = socket.gethostname()
        self.run = ""  # names what is at this URL since it was first used
        self.place = ""  # names the folder that is as new as what is there: that of whoever wrote last
        self.successor = ""  # who has taken over from this process

    def take(self) -> None:
        """Become the holder. Raises RemoteError, naming the present one, if that lives."""
        held, deadline = self._read(), time.monotonic() + STALE_SECONDS
        while held and held["token"] and not _has_died_here(held) and time.monotonic() < deadline:
            time.sleep(STALE_SECONDS / 60)
            before, held = held, self._read()
            if held and held["token"] and held != before:
                raise RemoteError(f"{self.bucket.url}: {_holder(held)} is working here")
        self.run, self.place = (held["run"], held["place"]) if held else (uuid.uuid4().hex, "")
        self._write(self.token)
        time.sleep(SETTLE_SECONDS)
        self.beat()
        if self.successor:
            raise RemoteError(f"{self.bucket.url}: {self.successor} is working here")

    def beat(self) -> None:
        """Show that this process lives, or see who has taken over from it."""
        held = self._read()
        if held and held["token"] not in ("", self.token):
            self.successor = _holder(held)
        else:
            self._write(self.token)

    def release(self) -> None:
        """Let others in at once. If this fails, they wait until the heartbeat is stale."""
        with contextlib.suppress(RemoteError):
            if (held := self._read()) and held["token"] == self.token:
                self._write("")

    def _read(self) -> dict[str, Any] | None:
        content = self.bucket.read(LEASE)
        if content is None:
            return None
        try:
            found = json.loads(content)
            if not 0 < (pid := int(found["pid"])) < 2**31:
                raise ValueError(pid)
            about = {name: str(found[name]) for name in ("run", "token", "beats", "host")}
            return {"pid": pid, **about, **{name: str(found.get(name, "")) for name in ("boot", "space", "place")}}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise RemoteError(f"{self.bucket.url}/{LEASE} does not name a process: remove it") from None

    def _write(self, token: str) -> None:
        self.beats += 1
        about = {"run": self.run, "place": self.place, "token": token, "beats": self.beats, "pid": os.getpid()}
        self.bucket.write(LEASE, json.dumps({**about, **here(), "host": self.host}).encode())


def here() -> dict[str, str]:
    """Return what a process identifier belongs to: host, start of the system, and namespace of a container.

    Machines may have the same name. Empty where the system does not say.
    """
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    said = {"host": socket.gethostname(), "boot": "", "space": ""}
    with contextlib.suppress(OSError):
        said["boot"] = boot.read_text(encoding="ascii").strip()
        said["space"] = os.readlink(space)
    return said


def _holder(held: dict[str, Any]) -> str:
    return f"process {held['pid']} on {held['host']}"


def _has_died_here(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if any(held[name] != value for name, value in here().items()):
        return False
    try:
        os.kill(held["pid"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return held["pid"] == os.getpid()
