"""A bucket as files: the objects under a URL of any store that fsspec knows, such as s3:// and gs://."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.config import ConfigError, require
from mmfree_jax.errors import need, sentence

INCOMING = ".incoming"  # a folder: objects that are being downloaded


class RemoteError(RuntimeError):
    """A bucket that cannot be read or written, or that another process writes. The message names the URL."""


class Closed(RemoteError):
    """This process may not change the bucket any more."""


class Bucket:
    """The objects under a URL, by the names of files in a folder. Whatever fails is a RemoteError."""

    def __init__(self, url: str):
        scheme, _, path = url.partition("://")
        require(scheme not in ("file", "local"), f"{url} is of this machine: give the path, /{path}")
        self.url = url
        fsspec: Any = need("fsspec", url, "'mmfree-jax[remote]'")
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url}: {sentence(error)} (pip install 'mmfree-jax[remote]' has s3:// and gs://)"
            ) from None
        self.root = root.rstrip("/")
        self.closed = ""  # why nothing may be changed here any more

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds: of fsspec, of a store's client, of its HTTP library
            raise RemoteError(f"{self.url}: {sentence(error)}") from error

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        if self.closed:
            raise Closed(f"{self.url}: {self.closed}")
        with self._naming():
            yield

    def names(self) -> dict[str, str]:
        """The name of every object, with its state, which changes when it is written again."""
        with self._naming():
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        names = {path[len(self.root) + 1 :]: repr(sorted(info.items(), key=str)) for path, info in found.items()}
        names.pop("", None)  # the folder itself
        for name in names:
            if {"", ".", ".."} & set(name.removesuffix("/").split("/")):  # a//b: b would be a path of its own
                raise RemoteError(f"{self.url}: {name!r} would lead out of a folder: remove it")
        return {name: state for name, state in names.items() if not name.endswith("/")}  # no folders

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none."""
        with self._naming(), contextlib.suppress(FileNotFoundError):
            return self.fs.cat_file(f"{self.root}/{name}")
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        with self._changing():
            self.fs.pipe_file(f"{self.root}/{name}", content)

    def upload(self, folder: Path, names: list[str]) -> None:
        """Write files of a folder, several at a time."""
        with self._changing():
            self.fs.put([str(folder / name) for name in names], [f"{self.root}/{name}" for name in names])

    def download(self, folder: Path, places: dict[str, str]) -> None:
        """Write objects into files of a folder, each of which appears complete. A file that was there is replaced:
        who has it open goes on with the old one. `places`: name of the object -> name of the file.

        Nobody else may download into the folder.
        """
        if not places:
            return
        incoming = folder / INCOMING
        shutil.rmtree(incoming, ignore_errors=True)  # what a process that was killed has left
        incoming.mkdir(parents=True)
        try:
            partial = [incoming / str(number) for number in range(len(places))]
            with self._naming():
                self.fs.get([f"{self.root}/{name}" for name in places], [str(path) for path in partial])
            for path, place in zip(partial, places.values(), strict=True):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                path.replace(folder / place)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in order."""
        for name in names:
            with self._changing(), contextlib.suppress(FileNotFoundError):  # somebody else has
                self.fs.rm_file(f"{self.root}/{name}")
