"""Checkpoints of a run: written by Orbax, asynchronous and atomic; the latest few and every milestone are kept."""

import contextlib
import glob
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

# A checkpoint is always restored into an abstract tree that was built from the config, never into what was saved, so it
# moves to any mesh. A small JSON object with everything else that a resumed run needs is stored with the state.

LONGEST_REASON = 300  # characters of Orbax's message
# What TensorStore and Orbax say about files that are missing or damaged.
DAMAGE = re.compile(r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|Error decoding|were not found in the checkpoint")
OTHER_TREE = re.compile(r"Requested shape|structures do not match")
_keep = ocp.training.preservation_policies

# Orbax logs every step of every save and warns about defaults. The run's own log has what matters.
for _name in ("absl", "orbax"):
    logging.getLogger(_name).setLevel(logging.ERROR)


# A workaround. etils' `glob` (as of 1.15) takes the entire path as a pattern: in a folder called `x[lr=3e-3]` Orbax
# then finds none of the parts that it merges at the end of a save, and the checkpoint cannot be read. This `glob`
# escapes the name of the folder. `tests/test_checkpoint.py` shows whether it is still needed.
_folder_type: Any = type(epath.Path("/"))
_plain_glob = _folder_type.glob


def _glob(folder: Any, pattern: str) -> Iterator[Any]:
    if "://" in str(folder):
        return _plain_glob(folder, pattern)
    return map(_folder_type, glob.glob(f"{glob.escape(str(folder))}/{pattern}"))


_folder_type.glob = _glob


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or cannot be read. The message names it."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoint folder of one run. Use it as a context manager, which waits for a save in progress at the end."""

    def __init__(self, folder: Path, keep: int = 1, milestones: tuple[int, ...] = ()):
        policies = [_keep.LatestN(keep), _keep.CustomSteps(list(milestones))]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._orbax = ocp.training.Checkpointer(
            folder.resolve(), preservation_policy=_keep.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, state: Any, meta: dict[str, Any], step: int) -> None:
        """Begin to save a tree of arrays, and return once they are copied. `meta` must be plain JSON."""
        self._orbax.save_checkpointables_async(step, {"state": state, "meta": meta}, force=True)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Return state and meta of the newest checkpoint. Raises CheckpointError if there is none."""
        return _load(self._orbax, self.folder, abstract_state, None)


def restore(folder: Path, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Read state and meta of `step` (default: the newest) from a checkpoint folder that this process does not write.

    The state has the structure of `abstract_state`, and its arrays are placed as that says.
    Raises CheckpointError when there is no such checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: there is no checkpoint to read")
    with ocp.training.Checkpointer(folder.resolve(), preservation_policy=_keep.PreserveAll()) as orbax:
        return _load(orbax, folder, abstract_state, step)


def restore_params(folder: Path, abstract_params: Any, step: int | None = None) -> Any:
    """Read only the parameters from a checkpoint of a run (default: the newest), placed as `abstract_params` says.

    Every process reads the shards that its own devices hold; the optimizer's moments are not read. Raises
    CheckpointError as `restore` does.
    """
    only_some = ocp.options.PyTreeOptions.Loading(partial_load=True)
    with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=only_some)):
        return restore(folder, {"params": abstract_params}, step)[0]["params"]


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the finished checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    with ocp.training.Checkpointer(folder.resolve(), preservation_policy=_keep.PreserveAll()) as orbax:
        return sorted(checkpoint.step for checkpoint in orbax.checkpoints)


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """Read what the checkpoint of a step holds besides its arrays."""
    with ocp.training.Checkpointer(folder.resolve(), preservation_policy=_keep.PreserveAll()) as orbax:
        return orbax.load_checkpointables(step, abstract_checkpointables={"meta": None})["meta"]


def _load(
    orbax: ocp.training.Checkpointer, folder: Path, abstract_state: Any, step: int | None
) -> tuple[Any, dict[str, Any]]:
    steps = sorted(checkpoint.step for checkpoint in orbax.checkpoints)
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(f"{folder} has no checkpoint{wanted} (it has: {steps or 'none'})")
    # The abstract tree is built from the config: Orbax then reads every array into the shape, type and sharding that
    # this run wants, whatever mesh saved it. What the file says of its own sharding is never used.
    chosen = steps[-1] if step is None else step
    try:
        found = orbax.load_checkpointables(chosen, abstract_checkpointables={"state": abstract_state, "meta": None})
    except Exception as error:  # of many kinds; Orbax says what is wrong only in the cause of what it raises
        raise CheckpointError(f"{folder / str(chosen)} cannot be read: {_reason(error, steps, chosen)}") from error
    return found["state"], found["meta"]


def _reason(error: Exception, steps: list[int], step: int) -> str:
    """Why a checkpoint cannot be read, and what to do if that is known. Only damaged ones should be removed."""
    cause = error.__cause__ or error
    why = " ".join(str(cause).split())[:LONGEST_REASON]
    if OTHER_TREE.search(why):
        return f"it holds other arrays than its run or model has now ({why})"
    if isinstance(cause, FileNotFoundError | json.JSONDecodeError) or DAMAGE.search(why):
        before = [str(earlier) for earlier in steps if earlier < step][-1:]
        there = f"the one before it is of step {before[0]}" if before else "there is no earlier one"
        return f"{why}; it is damaged, remove it: {there}"
    return f"{type(cause).__name__}: {why}"
