"""What all executors share: the interface, the command, which chains are open, and how often one is begun again.

A chain (a trunk and its decays) is one piece of work for one worker: it compiles once, finds its trunk's checkpoints
where it left them and waits in a queue once. Decays side by side would save little: with budgets that double and decays
of a fifth they are 30 % of a chain's steps, more than half of these in the longest.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mmfree_jax.config import RunConfig, require
from mmfree_jax.sweep.experiment import chains, run_flops
from mmfree_jax.sweep.heartbeat import is_locked
from mmfree_jax.sweep.status import can_begin, fail, run_folder, status

WORKER = (sys.executable, "-m", "mmfree_jax.sweep.worker")
RUN_FAILED = 1  # exit status of a worker: a run failed, and would again
LEFT_ALONE = 70  # exit status: of a worker's processes one failed for itself, or did not come
ATTEMPTS = 2  # starts of a worker that gets no further: killed for its memory, say, or on a broken machine


class Executor(Protocol):
    """Runs the chains of a sweep somewhere. Everything that it knows about them is in their folders."""

    def plan(self, runs: Sequence[RunConfig]) -> list[str]:
        """What it would do with runs that are all open, in lines (--dry-run)."""

    def execute(self, out: Path, work: list[list[RunConfig]], watch: Callable[[], None]) -> int:
        """Work until no run of these chains is open; calls `watch` a few times a second, or as often as it can.

        Returns 0, or 75 or 130 when it was stopped; what failed stands in the folders.
        """


def open_chains(out: Path, runs: Sequence[RunConfig], again: bool = False) -> list[list[RunConfig]]:
    """What is left of each chain, most FLOPs first, so that no long chain is left to run alone at the end.

    Diverged runs would fail again, and so would branches that a diverged trunk never got to: they are left out unless
    `again`. The errors of all others are forgotten.
    """
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
    """The runs of a chain that have neither ended nor failed."""
    return [run for run in chain if status(run_folder(out, run), run).state not in ("done", "failed")]


def steps_done(out: Path, chain: Sequence[RunConfig]) -> int:
    """How far a chain is: a worker that adds to this is not in vain, however often it is killed."""
    return sum(status(run_folder(out, run), run).step for run in chain)


@dataclasses.dataclass
class Pending:
    """What is left of a chain, and how many workers in a row got no further with it than `reached` steps."""

    runs: list[RunConfig]
    vain: int = 0
    reached: int = 0

    def look(self, out: Path, worked: bool = True) -> None:
        """Read from the folders what is left: after a worker has ended, or where there was none."""
        left = remaining(out, self.runs)
        reached = steps_done(out, left)
        further = len(left) < len(self.runs) or reached > self.reached
        self.runs, self.reached = left, reached
        self.vain = 0 if further or not worked else self.vain + 1

    def abandon(self, out: Path, why: str) -> None:
        """Give up on the run under way, and go on with those that can still succeed and that nobody else trains."""
        give_up(out, self.runs, why)
        self.runs, self.vain = [run for run in remaining(out, self.runs) if not is_locked(run_folder(out, run))], 0


def check_limit(hours: float) -> None:
    """Raises ConfigError for a time limit that is none."""
    require(hours >= 0, f"--limit-hours {hours:g}: must not be negative (0: any number)")


def give_up(out: Path, chain: Sequence[RunConfig], why: str) -> None:
    """Name the reason in the run that was under way, the first that is left; branches that it did not get to cannot
    begin, nor can theirs. Nothing is written where another process of this machine is at work."""
    first, *others = remaining(out, chain)
    if not is_locked(run_folder(out, first)):
        fail(run_folder(out, first), why)
    lost = {first.name}
    for run in others:
        if run.branch is not None and run.branch.run in lost and not can_begin(out, run):
            lost.add(run.name)
            fail(run_folder(out, run), f"not started: its trunk {run.branch.run} failed")


def worker_command(out: Path, chain: Sequence[RunConfig], limit_hours: float) -> list[str]:
    """What every executor runs."""
    limit = ["--limit-hours", f"{limit_hours:g}"] if limit_hours else []
    return [*WORKER, *limit, str(out), *(run.name for run in chain)]
