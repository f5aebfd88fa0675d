"""How a run lies in a bucket.

It has the same files there by the same names, except that its checkpoints are complete: their checksums are written
last, so one that is being uploaded counts as absent. logs/STEP holds the logs as they were when the checkpoint of that
step was complete, because a run that goes on cuts its logs back to a length, and must find as much.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from mmfree_jax.checksums import LIST, is_sealed

RESULT = "result.json"
LAST = ("checkpoints.json", RESULT)  # say that something is there, so they come after it
LOGS = ("metrics.jsonl", "log.txt", "tb/events.*")
# Not complete, or of this machine only. Checkpoints have their own rules.
LEFT_OUT = re.compile(r"(^|/)(\.|heartbeat\.json$|checkpoints/)|orbax-checkpoint-tmp")
PART = re.compile(r"((?:.*/)?)(checkpoints|logs)/(\d+)/(.+)")  # a file of a checkpoint, or of the logs beside it

Unit = tuple[str, int]  # a checkpoint: the folder of its run, such as "" or "runs/a/", and its step


def place(unit: Unit, kind: str = "checkpoints") -> str:
    """Return the folder of a checkpoint, or of the `logs` beside it, with a slash at its end."""
    return f"{unit[0]}{kind}/{unit[1]}/"


def places(unit: Unit) -> tuple[str, str]:
    """Return both."""
    return place(unit), place(unit, "logs")


def complete(names: Iterable[str]) -> set[Unit]:
    """Return the checkpoints that are complete among the names of files."""
    files: dict[Unit, list[str]] = defaultdict(list)
    for name in names:
        if (found := PART.fullmatch(name)) and found[2] == "checkpoints":
            files[found[1], int(found[3])].append(found[4])
    return {unit for unit, own in files.items() if is_sealed(own)}


def begun(names: Iterable[str]) -> set[Unit]:
    """Return the checkpoints of which a file is among the names."""
    parts = filter(None, map(PART.fullmatch, names))
    return {(found[1], int(found[3])) for found in parts if found[2] == "checkpoints"}


def reached(names: Collection[str], units: Iterable[Unit]) -> dict[str, tuple[int, bool]]:
    """Return how far each run has come: the step of the newest of these checkpoints, and whether it has a result."""
    newest = {name.removesuffix(RESULT): -1 for name in names if name.rpartition("/")[2] == RESULT}
    for run, step in units:
        newest[run] = max(step, newest.get(run, -1))
    return {run: (step, run + RESULT in names) for run, step in newest.items()}


def is_list(name: str) -> bool:
    """Return whether a file is a list of checksums."""
    return LIST.fullmatch(name.rpartition("/")[2]) is not None


def lists(folder: Path) -> Iterator[str]:
    """Return the lists of checksums in a folder of runs."""
    return filter(is_list, files(folder))


def others(folder: Path) -> Iterator[str]:
    """Return the files of a folder of runs that are complete and belong to no checkpoint."""
    return (name for name in files(folder) if not LEFT_OUT.search(name) and (folder / name).is_file())


def files(folder: Path) -> Iterator[str]:
    """Yield the names of all files, in order. What is removed meanwhile is left out or not."""
    for root, folders, own in os.walk(folder):
        folders.sort()
        inside = Path(root).relative_to(folder)
        yield from ((inside / file).as_posix() for file in sorted(own))
