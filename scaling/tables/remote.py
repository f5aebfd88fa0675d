"""Tables and folders of runs in a bucket: what is read of them is copied to this machine first."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scaling.tables.readers import ScalingError

READ = re.compile(  # by `readers` and `curves`
    r"(^|/)(runs\.csv|runs/[^/]+/(result\.json|metrics\.jsonl|config\.json)|wandb-summary\.json"
    r"|events\.out\.tfevents\.[^/]*|[^/]+\.[ct]sv)$"
)
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)")  # `Path` makes one slash of the two


def is_url(place: str | Path) -> bool:
    """Whether a place is no path of this machine."""
    return URL.fullmatch(str(place)) is not None


def local(place: str | Path) -> Path:
    """The path of a table or a folder of runs: of a URL such as s3://BUCKET/SWEEP, a copy that lives as long as this
    process. Raises ScalingError."""
    if not is_url(place):
        return Path(place)
    url = URL.sub(r"\1://\2", str(place))
    if url.startswith(("file://", "local://")):
        raise ScalingError(f"{url} is of this machine: give the path, /{url.partition('://')[2]}")
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        copy(url, folder / Path(place).name)
    except ScalingError:
        raise
    except Exception as error:  # of many kinds: of fsspec, of a store's client, of its HTTP library
        why = " ".join(str(error).split()) or type(error).__name__
        raise ScalingError(f"{url}: {why} (pip install 'mmfree-jax[remote]' has s3:// and gs://)") from error
    return folder / Path(place).name


def copy(url: str, target: Path) -> None:
    """Copies a file, or of a folder the files that are read."""
    import fsspec

    fs: Any
    fs, root = fsspec.core.url_to_fs(url)
    if fs.isfile(root):
        fs.get_file(root, str(target))
        return
    paths = {path: path[len(root.rstrip("/")) + 1 :] for path in fs.find(root)}
    inside = lambda name: not {"", ".", ".."} & set(name.split("/"))  # of //a and a//b the end is a path of its own
    wanted = {path: name for path, name in paths.items() if READ.search(name) and inside(name)}
    if not wanted:
        raise ScalingError(f"{url} holds no table and no folder of runs")
    for path, name in wanted.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(path, str(target / name))
