"""Verifies token sets before they are trained on, each only once as long as its files stay as they are."""

import contextlib
import socket
from pathlib import Path
from typing import Any

from mmfree_jax.data.reading.token_set import INDEX, TOKENIZER, TokenSet
from mmfree_jax.files import cache_folder, read_json, write_json

# Reading a corpus takes a second for each gigabyte or so. What was found good is noted in the cache with size, inode
# and time of change of each file; a flipped bit on a disk changes none of them, so a set is also read again on another
# machine, and whenever the cache is removed.


def verify_once(token_set: TokenSet) -> None:
    """Verify all sets of a run (`TokenSet.verify`) that have changed since they were verified on this machine.

    Raises TokenSetError, which names the first file that is wrong.
    """
    for one in token_set.sets:
        note = cache_folder() / "verified" / f"{one.fingerprint[:32]}-{socket.gethostname()}.json"
        now = {"path": str(one.path.absolute()), "files": _signatures(one)}
        if _noted(note) == now:
            continue
        one.verify()
        with contextlib.suppress(OSError):  # without a cache it is read again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, now)


def _signatures(token_set: TokenSet) -> dict[str, list[int]]:
    """Size, inode and times of change of every file of a set."""
    names = [INDEX, TOKENIZER]
    names += [name for split in token_set.splits.values() for shard in split.shards for name, _ in shard.sums()]
    found = {}
    for name in names:
        facts = (token_set.path / name).stat()
        found[name] = [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]
    return found


def _noted(note: Path) -> Any:
    try:
        return read_json(note)
    except (OSError, ValueError):
        return None  # never verified here, or the note itself is damaged
