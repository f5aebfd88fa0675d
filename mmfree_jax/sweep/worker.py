"""One process that trains runs of a sweep one after another: `python -m mmfree_jax.sweep.worker OUT RUN [RUN …]`.

The runs of one chain share a compiled step, so a worker compiles once for a chain. The command is idempotent: it passes
over finished runs and resumes interrupted ones. It reads each run's config from its folder in OUT; with
`--experiment FILE` it takes the configs from there and makes the folders itself. Several processes, started by `srun`
or with JAX's variables (`mmfree_jax.distributed.find_group`), are one worker.

Exit status: 0 all done; 1 a run failed; 70 this process failed alone, or others of the worker did not start; 75 or 130
stopped; 124 a run did not stop when its time was over.
"""

import argparse
import contextlib
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from mmfree_jax import distributed
from mmfree_jax.config import ConfigError, RunConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.data.corpora import resolve_data
from mmfree_jax.devices import check_platform, use_compile_cache
from mmfree_jax.errors import is_explained
from mmfree_jax.files import LockedError, cache_folder
from mmfree_jax.lowering.out_of_memory import (
    DISK_IS_FULL,
    MEMORY_IS_FULL,
    OutOfMemory,
    explained,
    with_more_accumulation,
)
from mmfree_jax.output import make_streams_tolerant
from mmfree_jax.run_folder import corpus_places, read_run
from mmfree_jax.sweep.executor import LEFT_ALONE, RUN_FAILED
from mmfree_jax.sweep.experiment import load_study
from mmfree_jax.sweep.heartbeat import heartbeat, wait_until_free
from mmfree_jax.sweep.status import can_begin, fail
from mmfree_jax.training.interrupt import TIMED_OUT, Interrupted
from mmfree_jax.training.loop import train
from mmfree_jax.training.metrics import Diverged

PATIENCE_SECONDS = 300.0  # time for the other processes of this worker to start
GRACE_SECONDS = 900.0  # grace period, for a last step, save or evaluation, before a run counts as hung


class TrunkFailed(RuntimeError):
    """There is no checkpoint to branch from, and there will be none."""


class TimedOut(RuntimeError):
    """A run has reached its time limit."""


EVERYWHERE = (Diverged, ConfigError, TrunkFailed, TimedOut)  # errors that all processes of a run have at once


def main(out: Path, names: list[str], experiment: Path | None = None, limit_hours: float = 0.0) -> int:
    """Train the named runs of the sweep in `out`, in order; each may take `limit_hours` (0: no limit)."""
    check_platform()
    use_compile_cache(cache_folder() / "compiled")
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # except while a run listens for it
    resolve = functools.cache(resolve_data)  # the runs of a chain read one corpus: it is opened once
    failed: set[str] = set()
    for config in find_runs(out, names, experiment):
        folder = out / "runs" / config.name
        try:
            if config.branch and not can_begin(out, config):
                trunk = out / "runs" / config.branch.run
                gave_up = (trunk / "error.txt").exists() and not (trunk / "result.json").exists()
                if gave_up or trunk.name in failed:
                    raise TrunkFailed(f"its trunk {trunk.name} failed")
            try:
                _train(config, folder, resolve, limit_hours)
            except OutOfMemory as error:
                _train_in_parts(config, folder, resolve, limit_hours, error)
        except Interrupted as stop:
            return stop.status
        except Exception as error:  # one bad run must not take the rest of its chain with it
            failed.add(config.name)
            _record(folder, error)
            if jax.process_count() > 1 and not isinstance(error, EVERYWHERE):
                return LEFT_ALONE  # the other processes may be waiting for this one: only its end ends them
    return RUN_FAILED if failed else 0


def find_runs(out: Path, names: list[str], experiment: Path | None) -> list[RunConfig]:
    """Return the named runs: from their folders, or from an experiment file. Raises ConfigError for unknown names."""
    if experiment is None:
        return [read_run(out / "runs" / name / "config.json") for name in names]
    known = {run.name: run for run in load_study(experiment).runs}
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"{experiment} has no run named {', '.join(missing)}")
    return [known[name] for name in names]


def _train(config: RunConfig, folder: Path, resolve: Callable[..., TokenSet], limit_hours: float) -> None:
    """Train one run, with a heartbeat and a time limit.

    At the limit the run gets SIGALRM and saves itself as after any other signal. The signal comes again every second,
    because a run that is still opening its data does not listen yet.
    """
    first = distributed.is_first()
    if first:
        wait_until_free(folder)
        (folder / "error.txt").unlink(missing_ok=True)
    # Two limits: at the first the run is asked to save itself, at the second, from the heartbeat's thread, the process
    # ends. A run that hangs in a collective operation does not run Python, so a signal's handler would never be called.
    deadline = time.monotonic() + limit_hours * 3600 + GRACE_SECONDS

    def end_if_hung() -> None:
        if limit_hours and time.monotonic() > deadline:
            fail(folder, f"TimedOut: did not stop when its limit of {limit_hours:g} hours was over; ended")
            os._exit(TIMED_OUT)

    signal.setitimer(signal.ITIMER_REAL, limit_hours * 3600, 1.0)
    try:
        with heartbeat(folder, end_if_hung) if first else contextlib.nullcontext(), explained(config):
            train(config, folder, resolve(config.data, places=corpus_places(folder)))
    except Interrupted as stop:
        if stop.status == TIMED_OUT:
            raise TimedOut(f"{stop}; its limit of {limit_hours:g} hours is over: raise --limit-hours") from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _train_in_parts(
    config: RunConfig, folder: Path, resolve: Callable[..., TokenSet], limit_hours: float, error: OutOfMemory
) -> None:
    """Try a run again that was too large, in ever more micro-batches of the same batch. Raises the last error."""
    # Several processes would have to agree on it: there the run fails, and the message says what to set.
    for more in with_more_accumulation(config) if jax.process_count() == 1 else ():
        print(f"{error}\n{config.name}: tried again with optim.accumulate={more.optim.accumulate}", file=sys.stderr)
        try:
            return _train(more, folder, resolve, limit_hours)
        except OutOfMemory as again:
            error = again
    raise error


def _record(folder: Path, error: Exception) -> None:
    """Print the error for the worker's log, and leave one line of it in the run's folder for `--status`."""
    message = f"{type(error).__name__}: {error}"
    if is_explained(error):
        print(message, file=sys.stderr)
    else:
        traceback.print_exception(error)
    if isinstance(error, TrunkFailed):
        message = f"not started: {error}"
    elif DISK_IS_FULL.search(message):
        message = f"disk full: make room there and run the same command again ({message})"
    elif MEMORY_IS_FULL.search(message):
        message = f"out of memory: lower data.batch, raise optim.accumulate, or set remat ({message})"
    if distributed.is_first() and not isinstance(error, LockedError):  # a locked folder belongs to another process
        folder.mkdir(parents=True, exist_ok=True)
        fail(folder, message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse OUT RUN … and the options before them."""
    parser = argparse.ArgumentParser(prog="python -m mmfree_jax.sweep.worker")
    parser.add_argument("--experiment", type=Path, help="take the runs from this file, not from their folders")
    parser.add_argument("--limit-hours", type=float, default=0.0, help="time limit of a run (0: no limit)")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+", metavar="run")
    return parser.parse_args(arguments)


def start(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse(arguments)
    group = distributed.find_group("", 0, -1)
    if group is not None:
        try:
            distributed.join(group, PATIENCE_SECONDS)
        except distributed.MissingProcess as error:
            print(error, file=sys.stderr)
            return LEFT_ALONE
    return main(options.out, options.names, options.experiment, options.limit_hours)


if __name__ == "__main__":
    make_streams_tolerant()
    sys.exit(start(sys.argv[1:]))
