"""What all executors share: the interface, the worker's command, which chains are open, and when to give one up."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mmfree_jax.config import RunConfig
from mmfree_jax.sweep.experiment import chains, run_flops
from mmfree_jax.sweep.heartbeat import is_locked
from mmfree_jax.sweep.status import can_begin, fail, run_folder, status

# A chain is a trunk and the decays that branch off it. It is one piece of work for one worker, which compiles once,
# finds the trunk's checkpoints where it left them and waits in a queue once. Running the decays in parallel would save
# little: with budgets that double and decays of a fifth they are 30 % of a chain's steps, more than half of it in the
# longest.

WORKER = (sys.executable, "-m", "mmfree_jax.sweep.worker")
RUN_FAILED = 1  # exit status of a worker: a run failed, and would fail again
LEFT_ALONE = 70  # exit status: one of the worker's processes failed on its own, or did not start
ATTEMPTS = 2  # starts of a worker that makes no progress: one killed for its memory, say, or on a broken machine


class Executor(Protocol):
    """Runs the chains of a sweep somewhere. Everything that it knows about them is in their folders."""

    def plan(self, runs: Sequence[RunConfig]) -> list[str]:
        """Describe in lines what it would do if all of these runs were open (--dry-run)."""

    def execute(self, out: Path, work: list[list[RunConfig]], watch: Callable[[], None]) -> int:
        """Work until no run of these chains is open. Calls `watch` a few times a second, or as often as it can.

        Returns 0, or 75 or 130 if it was stopped. Failures are recorded in the folders.
        """


def open_chains(out: Path, runs: Sequence[RunConfig], again: bool = False) -> list[list[RunConfig]]:
    """Return what is left of each chain, most FLOPs first, so that no long chain runs alone at the end.

    Diverged runs would diverge again, and branches whose checkpoint their trunk never reached cannot begin: both are
    left out unless `again`. The errors of all other runs are deleted, because the runs are tried again.
    """
    # Longest first is the classic rule for few machines: a long job that begins last would run alone at the end.
    found = {run.name: status(run_folder(out, run), run) for run in runs}
    hopeless = set() if again else {name for name, s in found.items() if s.diverged}
    for run in runs:  # trunks come before their branches
        if run.branch and run.branch.run in hopeless and not can_begin(out, run):
            hopeless.add(run.name)
    wanted = [run for run in runs if found[run.name].state != "done" and run.name not in hopeless]
    for run in wanted:
        if found[run.name].state == "failed":
            (run_folder(out, run) / "error.txt").unlink(missing_ok=True)
    return sorted(chains(wanted), key=lambda chain: -sum(run_flops(run) for run in chain))


def remaining(out: Path, chain: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the runs of a chain that have neither ended nor failed."""
    return [run for run in chain if status(run_folder(out, run), run).state not in ("done", "failed")]


def steps_done(out: Path, chain: Sequence[RunConfig]) -> int:
    """Return the steps of all runs of a chain together. A worker that adds to them makes progress."""
    return sum(status(run_folder(out, run), run).step for run in chain)


@dataclasses.dataclass
class Pending:
    """What is left of a chain, and how many workers in a row made no progress beyond `reached` steps."""

    runs: list[RunConfig]
    vain: int = 0
    reached: int = 0  # steps of all runs together

    def look(self, out: Path, worked: bool = True) -> None:
        """Read from the folders what is left. `worked`: a worker has just ended."""
        left = remaining(out, self.runs)
        reached = steps_done(out, left)
        progress = len(left) < len(self.runs) or reached > self.reached
        self.runs, self.reached = left, reached
        self.vain = 0 if progress or not worked else self.vain + 1

    def abandon(self, out: Path, reason: str) -> None:
        """Record that the current run, the first one left, has failed, and so have branches that now cannot begin.

        Goes on with the runs that can still succeed and that no other process of this machine trains; for those that
        one trains nothing is recorded.
        """
        first, *others = remaining(out, self.runs)
        if not is_locked(run_folder(out, first)):
            fail(run_folder(out, first), reason)
        lost = {first.name}
        for run in others:
            if run.branch is not None and run.branch.run in lost and not can_begin(out, run):
                lost.add(run.name)
                fail(run_folder(out, run), f"not started: its trunk {run.branch.run} failed")
        self.runs, self.vain = [run for run in remaining(out, self.runs) if not is_locked(run_folder(out, run))], 0


def worker_command(out: Path, chain: Sequence[RunConfig], limit_hours: float) -> list[str]:
    """Return the command of a worker for a chain: the same for every executor."""
    limit = ["--limit-hours", f"{limit_hours:g}"] if limit_hours else []
    return [*WORKER, *limit, str(out), *(run.name for run in chain)]
