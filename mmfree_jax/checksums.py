"""Checksums of the files in a folder, kept beside them: what was written once is known again, byte for byte.

A storage system may return fewer or other bytes than it was given. The libraries that read them do not always notice.
"""

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmfree_jax.files import sha256, write_json

# Several processes share the work: each one takes every n-th file and writes a list of its own. A list is written when
# its files are complete, and last, so a folder without lists was not finished, or is of an older version.
PATTERN = "checksums-*-of-*.json"
LIST = re.compile(r"checksums-(\d{1,9})-of-(\d{1,9})\.json")
UNLISTED = ("checksums-", ".checksums-")  # how lists are called, and what they are while another process writes one
READERS = 4  # files that are read at the same time


def write_checksums(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Write the list of every `parts`-th file of a folder: path, bytes, SHA-256. Nobody else may write into it."""
    # All processes must see the same files, or their shares would neither cover all nor be apart.
    files = [path for path in sorted(folder.rglob("*")) if not path.name.startswith(UNLISTED) and path.is_file()]
    paths = files[part::parts]
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(lambda path: sha256([path]), paths))
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(paths, sums, strict=True)
    }
    write_json(folder / f"checksums-{part}-of-{parts}.json", listed)


def is_sealed(names: Iterable[str]) -> bool:
    """Return whether the lists of all processes are among the names of the files in a folder."""
    found = {(int(match[2]), int(match[1])) for name in names if (match := LIST.fullmatch(name))}
    count = lambda parts: sum(of == parts and part < parts for of, part in found)
    return any(0 < parts == count(parts) for parts in {parts for parts, _ in found})


def first_damage(folder: Path, part: int = 0, parts: int = 1, contents: bool = True) -> str:
    """Compare every `parts`-th listed file with its list. Returns what is wrong with the first bad one, or nothing.

    Files that no list names are not looked at. `contents`: not only whether they are there, and of the right size.
    """
    try:
        listed = sorted(_listed(folder))[part::parts]
    except ValueError as error:
        return str(error)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda entry: _damage(folder, entry, contents), listed)
        return next(filter(None, found), "")


def _listed(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Path, bytes and SHA-256 of all lists of a folder. Raises ValueError for a list that is damaged itself."""
    for path in sorted(folder.glob(PATTERN)):
        try:
            entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            yield from ((name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items())
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise ValueError(f"{path.name} is no list of checksums") from None


def _damage(folder: Path, entry: tuple[str, int, str], contents: bool) -> str:
    name, size, expected = entry
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} is not in the folder"
    if not path.is_file():
        return f"{name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{name} has {found} bytes instead of {size}"
    return "" if not contents or sha256([path]) == expected else f"{name} has other bytes than were written (SHA-256)"
