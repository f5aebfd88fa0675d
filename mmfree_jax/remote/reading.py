"""Models in a bucket, to read: a folder of the cache is made equal to what is there now."""

import re
import shutil
from pathlib import Path

from mmfree_jax.config import require
from mmfree_jax.distributed import first_does, is_alone
from mmfree_jax.files import locked, read_object, url_of, write_json
from mmfree_jax.remote.bucket import Bucket, RemoteError
from mmfree_jax.remote.layout import PART, complete, others, place
from mmfree_jax.remote.working import check_shared, home_of

UNREAD = re.compile(r"(^|/)(\.|(tb|profile|anomalies)/)")  # what nobody reads who wants a model
ATTEMPTS = 3  # beside a run that works
WAIT_SECONDS = 600.0  # for another process that brings the same


def fetched(path: Path, every: bool = False) -> Path:
    """Return the folder of a model on disk: `path` itself or, for a URL, a copy of what is there now.

    Of a run only the newest checkpoint is copied, unless `every`. Raises RemoteError if nothing can be read there, and
    ConfigError if a package is missing or the processes of a run do not share the folder. All processes must call it.
    """
    if not (url := url_of(path)):
        return path
    folder = home_of(url) / "read" / path.name
    refresh = lambda: _refresh(Bucket(url), folder, every)
    if is_alone():
        refresh()
    else:
        first_does(refresh)
        check_shared(url, folder.parent)
    return folder


def _refresh(bucket: Bucket, folder: Path, every: bool) -> None:
    with locked(folder.parent, wait_s=WAIT_SECONDS):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _make_equal(bucket, folder, every)
                return
            except RemoteError as error:  # perhaps a checkpoint has been replaced since it was listed
                if attempt == ATTEMPTS or not isinstance(error.__cause__, FileNotFoundError):
                    raise


def _make_equal(bucket: Bucket, folder: Path, every: bool) -> None:
    names, note = bucket.names(), folder.parent / "objects.json"
    require(bool(names), f"{bucket.url} holds nothing")
    there = complete(names)
    newest = {run: max(step for other, step in there if other == run) for run, _ in there}
    wanted = tuple(place(unit) for unit in there if every or newest[unit[0]] == unit[1])
    for path in folder.glob("**/checkpoints/*"):
        if not f"{path.relative_to(folder).as_posix()}/".startswith(wanted):
            shutil.rmtree(path)
    plain = lambda name: not PART.fullmatch(name) and not UNREAD.search(name)
    keep = {name: state for name, state in names.items() if name.startswith(wanted) or plain(name)}
    for name in set(others(folder)) - keep.keys():
        (folder / name).unlink()
    have = read_object(note) if note.exists() else {}
    new = [name for name, state in keep.items() if have.get(name) != state or not (folder / name).exists()]
    note.unlink(missing_ok=True)  # until all of it is here
    bucket.download(folder, {name: name for name in new})
    write_json(note, keep)
