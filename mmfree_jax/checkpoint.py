"""Checkpoints of a run: written by Orbax, asynchronous and atomic; the latest few and every milestone are kept."""

import contextlib
import glob
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mmfree_jax.checksums import first_damage, is_sealed, write_checksums
from mmfree_jax.distributed import sum_integers
from mmfree_jax.errors import sentence
from mmfree_jax.files import read_json, write_json

# A checkpoint is always restored into an abstract tree that was built from the config, never into what was saved, so it
# moves to any mesh. A small JSON object with everything else that a resumed run needs is stored with the state.

Meta = dict[str, Any] | Callable[[], dict[str, Any]]

LONGEST_REASON = 300  # characters of Orbax's message
PAUSES_SECONDS = (1.0, 5.0)  # before a save that must not fail is tried a second and a third time
# What TensorStore and Orbax say about files that are missing or damaged.
DAMAGE = re.compile(r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|Error decoding|were not found in the checkpoint")
SYSTEM = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|Permission denied|File too large"
)
OTHER_TREE = re.compile(r"Requested shape|structures do not match")
_keep = ocp.training.preservation_policies

# Orbax logs every step of every save, warns about defaults and prints a traceback for a full disk. The run's own log
# has what matters.
for _name in ("absl", "orbax"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


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
    """A checkpoint that is missing, or cannot be read or written. The message names it."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are not those that were written. `damage` says which, or what Orbax says."""

    def __init__(self, checkpoint: Path, damage: str, before: list[int]):
        there = f"the one before it is of step {before[-1]}" if before else "there is no earlier one"
        super().__init__(f"{checkpoint} cannot be read: {damage}; it is damaged, remove it: {there}")
        self.damage = damage


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoint folder of one run. Use it as a context manager, which waits for a save in progress at the end.

    Checkpoints are sealed: a thread writes checksums of every finished one beside its files. A save that fails is
    reported in `news`; until another one succeeds, `failed` is true.
    """

    def __init__(self, folder: Path, keep: int = 1, milestones: tuple[int, ...] = ()):
        policies = [_keep.LatestN(keep), _keep.CustomSteps(list(milestones))]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.note = folder.with_name(f"{folder.name}.json")  # says that there was a checkpoint, if all of them are gone
        self.news: list[str] = []  # lines for the log of the run, of what nobody asked for
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the last save
        self._orbax = ocp.training.Checkpointer(
            folder.resolve(), preservation_policy=_keep.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )

    def __exit__(self, kind: object, *_: object) -> None:
        self.wait()
        self._orbax.close()
        if self._error is not None and kind is None:
            raise self._lost() from self._error

    @property
    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def failed(self) -> bool:
        """Whether the last save has failed, as far as that is known now."""
        return self._error is not None

    def save(self, state: Any, meta: Meta, step: int) -> None:
        """Begin to save a tree of arrays, and return once they are copied. `meta` is plain JSON, or returns it.

        First waits for the save before this one. A save that fails raises nothing: see `failed`. All processes must
        call it.
        """
        self.wait()
        self._error = None
        try:
            # `meta` may have to write logs. What cannot be written in one process is not begun in the others.
            tree = {"state": state, "meta": _made_everywhere(meta)}
            saving = self._orbax.save_checkpointables_async(step, tree, force=True)
        except Exception as error:  # of many kinds: a full disk shows here or in the thread
            self._fails(step, error)
            self._forget()
            return
        self._begin(saving.result, step)

    def save_now(self, state: Any, meta: Meta, step: int) -> None:
        """Save and wait until that is done; try again if it fails in any process.

        Raises CheckpointError, in all of them, if it fails for good.
        """
        self.save(state, meta, step)
        for pause_s in (*PAUSES_SECONDS, None):
            self.wait()
            if not sum_integers([int(self.failed)])[0]:
                return
            self._error = self._error or RuntimeError("another process could not write its part")
            if pause_s is not None:
                time.sleep(pause_s)
                self._save_again(state, meta, step)
        error, self._error = self._lost(), None
        raise error

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Return state and meta of the newest checkpoint that is not damaged, and set those after it aside.

        Raises CheckpointError if there is none. All processes must call it.
        """
        bad: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                found = _load(self._orbax, self.folder, abstract_state, step)
            except DamagedCheckpoint as error:
                bad[step] = error.damage
                continue
            self._set_aside(bad, step)
            if not is_sealed(os.listdir(self.folder / str(step))):  # killed before it was, or of an older version
                self._begin(lambda: None, step)
            return found
        which = "; ".join(f"step {step}: {damage}" for step, damage in bad.items())
        raise CheckpointError(
            f"{self.folder} has no checkpoint that is not damaged ({which or 'it is empty'}): put one back from a "
            f"copy, or remove the folder {self.folder.parent} to start over"
        )

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, newest first."""
        self.wait()
        for later in reversed([one for one in self.steps if one > step]):
            self._orbax.delete(later)

    def check_not_lost(self) -> None:
        """Raise CheckpointError if there is no checkpoint although there was one: the run must not start over."""
        if not self.steps and self.note.exists():
            raise CheckpointError(
                f"{self.folder} has no checkpoint any more, although one of step {read_json(self.note)['newest']} was "
                f"written: put it back from a copy, or remove {self.note} to start over"
            )

    def _save_again(self, state: Any, meta: Meta, step: int) -> None:
        """Save what could not be; of a checkpoint that is there, which Orbax would not write twice, the checksums."""
        if step not in self.steps:
            self.save(state, meta, step)
            return
        self._error = None
        self._begin(lambda: None, step)

    def _begin(self, complete: Callable[[], Any], step: int) -> None:
        self._thread = threading.Thread(target=self._finish, args=(complete, step), name="checkpoint")
        self._thread.start()

    def _finish(self, complete: Callable[[], Any], step: int) -> None:
        """In the thread: wait until a checkpoint is complete, and seal it."""
        try:
            complete()
            write_checksums(self.folder / str(step), jax.process_index(), jax.process_count())
            if jax.process_index() == 0:
                write_json(self.note, {"newest": step})
        except Exception as error:
            self._fails(step, error)

    def _fails(self, step: int, error: Exception) -> None:
        self._error = error
        self.news.append(f"the checkpoint of step {step} was not written: {_brief(error)}; it is tried again")

    def wait(self) -> None:
        """Wait for the save in progress, and for its checksums."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._forget()

    def _forget(self) -> None:
        """Let Orbax forget a save that failed: it would raise its error at the next save, and not make that."""
        if self._error is not None:
            with contextlib.suppress(Exception):  # this same error, which is reported already
                self._orbax.wait()

    def _lost(self) -> CheckpointError:
        assert self._error is not None
        return CheckpointError(
            f"{self.folder} cannot be written ({_brief(self._error)}): make it writable or make room, and run "
            f"the same command again; the newest checkpoint is of step {self.steps[-1] if self.steps else 'none'}"
        )

    def _set_aside(self, bad: dict[int, str], step: int) -> None:
        """Rename damaged checkpoints, so that neither a reader nor the next save finds them."""
        for newer, why in bad.items():
            away = self.folder / f"damaged-{newer}"
            if jax.process_index() == 0:
                shutil.rmtree(away, ignore_errors=True)
                (self.folder / str(newer)).rename(away)
            self.news.append(
                f"the checkpoint of step {newer} is damaged ({why}) and set aside as {away.name}: the run goes on from "
                f"step {step}"
            )
        if bad:
            sum_integers([0])  # all processes wait for the first
            self._orbax.reload()


def restore(folder: Path, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Read state and meta of `step` (default: the newest) from a checkpoint folder that this process does not write.

    The state has the structure of `abstract_state`, and its arrays are placed as that says.
    Raises CheckpointError when there is no such checkpoint, DamagedCheckpoint when its files are not those written.
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
    chosen = steps[-1] if step is None else step
    if damage := _damage(folder / str(chosen)):
        raise DamagedCheckpoint(folder / str(chosen), damage, [earlier for earlier in steps if earlier < chosen])
    # The abstract tree is built from the config: Orbax then reads every array into the shape, type and sharding that
    # this run wants, whatever mesh saved it. What the file says of its own sharding is never used.
    try:
        found = orbax.load_checkpointables(chosen, abstract_checkpointables={"state": abstract_state, "meta": None})
    except Exception as error:  # of many kinds; Orbax says what is wrong only in the cause of what it raises
        raise _explained(error, folder, steps, chosen) from error
    return found["state"], found["meta"]


def _made_everywhere(meta: Meta) -> dict[str, Any]:
    """What a checkpoint holds besides its arrays. If making it fails in one process, all of them raise."""
    made, failure = None, None
    try:
        made = meta() if callable(meta) else meta
    except Exception as error:
        failure = error
    if sum_integers([int(failure is not None)])[0]:
        raise failure or RuntimeError("another process could not write")
    assert made is not None
    return made


def _brief(error: Exception) -> str:
    """An exception in one line that is not too long."""
    text = sentence(error)
    if len(text) <= LONGEST_REASON:
        return text
    # What the system says comes last in TensorStore's messages, behind several paths.
    cause = SYSTEM.search(text)
    return f"{cause[0]}: {text[:LONGEST_REASON]} …" if cause else f"{text[:LONGEST_REASON]} …"


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if nothing is known. All processes must call it."""
    # Each process reads its share of the files, and all of them come to the same decision.
    own = first_damage(folder, jax.process_index(), jax.process_count())
    return own or ("another process found it" if sum_integers([int(bool(own))])[0] else "")


def _explained(error: Exception, folder: Path, steps: list[int], step: int) -> CheckpointError:
    """Why a checkpoint cannot be read, and what to do if that is known. Only damaged ones should be removed."""
    name, cause = folder / str(step), error.__cause__ or error
    why = " ".join(str(cause).split())[:LONGEST_REASON]
    if OTHER_TREE.search(why):
        return CheckpointError(f"{name} cannot be read: it holds other arrays than its run or model has now ({why})")
    if isinstance(cause, FileNotFoundError | json.JSONDecodeError) or DAMAGE.search(why):
        return DamagedCheckpoint(name, why, [earlier for earlier in steps if earlier < step])
    return CheckpointError(f"{name} cannot be read: {type(cause).__name__}: {why}")
