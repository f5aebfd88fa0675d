"""Atomic writes, and folders that only one process writes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


class LockedError(RuntimeError):
    """Another process holds the folder. The message names it."""


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that appears complete or not at all: yield a sibling, and rename it to `path` afterwards."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(partial)
        os.chmod(partial, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, even after a crash."""
    with naming(path), new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # before the rename, or some file systems show an empty file after a crash


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears complete or not at all: yield a sibling, and rename it to `path` afterwards.

    Raises FileExistsError if something other than an empty folder is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder: choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp makes folders that only their owner can read
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Raises ValueError for NaN and infinities, which JSON does not have."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, numbers of thousands of digits, nested too deeply
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ValueError that names the file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return found


def sha256(files: Iterable[Path]) -> str:
    """Return one SHA-256, in hexadecimal, of the content of several files in order."""
    # Contents follow one another without a separator: the list of files is fixed where this is used.
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:  # in pieces: a model's tensors need not fit the memory
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def last_line(path: Path, window: int = 65536) -> str:
    """Return the last complete line of a text file that another process may be writing; empty if there is none."""
    return "".join(last_lines(path, 1, window))


def last_lines(path: Path, count: int, window: int = 65536) -> list[str]:
    """Return the last complete lines of such a file: at most `count`, from its last `window` bytes."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - window))
        tail = file.read()
    complete = tail[: tail.rfind(b"\n") + 1].splitlines()[-count:]
    return [line.decode("utf-8", "replace") for line in complete]


# What systems say of a lock where there are none: NFS without its lock service, Lustre without flock, some FUSE.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def _told(file: TextIO) -> str:
    """Who holds a lock, if its file says so: ` (process 7 on HOST)`."""
    file.seek(0)
    told = file.read(200).strip()
    return f" ({told})" if told and told.isprintable() else ""


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Lock the folder for this process. The system releases the lock however the process ends.

    Raises LockedError, naming host and process, if another one still holds it after `wait_s` seconds, and for a file
    system without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        while True:
            try:
                # A lock of the system, not a file that says "locked": nobody has to clean up after a process that was
                # killed. What the file says is only for the message of those who find it locked.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LockedError(f"{folder}: another process is working here{_told(file)}") from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                raise LockedError(
                    f"{folder} lies on a file system without locks ({error.strerror}), where two processes could write "
                    "into one folder: mount it with them (NFS: without nolock; Lustre: with flock), or choose another"
                ) from None
        with contextlib.suppress(OSError):  # a full disk does not take the note, and needs none
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def url_of(path: str | Path) -> str:
    """Return the URL that a path stands for, such as s3://BUCKET/RUN; empty for a path of this machine."""
    # `Path` makes one slash of the two. A scheme of one letter is a drive.
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", str(path))
    return f"{found[1]}://{found[2]}" if found else ""


def cache_folder() -> Path:
    """Return the folder of the cache: `$MMFREE_JAX_CACHE`, else `~/.cache/mmfree_jax`."""
    named = os.environ.get("MMFREE_JAX_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mmfree_jax"
