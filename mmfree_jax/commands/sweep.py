"""The verbs `study` and `sweep`: run an experiment, or say where it stands."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from mmfree_jax.command_line import parse
from mmfree_jax.config import require
from mmfree_jax.files import url_of
from mmfree_jax.output import line_printer, program
from mmfree_jax.remote.reading import fetched
from mmfree_jax.remote.working import NotCopied, working_folder
from mmfree_jax.sweep import study as flow
from mmfree_jax.sweep.executor import Executor
from mmfree_jax.sweep.experiment import load_study
from mmfree_jax.sweep.local import this_machine
from mmfree_jax.sweep.render import Cloud, render
from mmfree_jax.sweep.slurm import Slurm, SlurmExecutor
from mmfree_jax.training.interrupt import PREEMPTED


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    """Run an experiment: start the runs that have not begun, resume those that were interrupted."""

    experiment: tyro.conf.Positional[Path]
    """Python file that defines study()."""
    out: Path
    """Folder for the runs, or a URL such as s3://BUCKET/SWEEP. A sweep that is already there is continued."""
    slots: int = 0
    """Workers on each GPU (0: one, or several if the models are small).
    Without GPUs, workers in total (0: one for each CPU core).
    Runs that shared a GPU have no seconds, joules, mfu or peak memory in their rows."""
    executor: Literal["local", "slurm"] = "local"
    """Workers on this machine (Linux only), or SLURM jobs."""
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    """Options of SLURM jobs."""
    limit_hours: float = 0.0
    """Time limit of a run in hours. When it is over, the run is saved and counts as failed (0: no limit)."""
    again: bool = False
    """Run diverged runs again too."""
    dry_run: bool = False
    """Print what would be run, then exit."""
    status: bool = False
    """Print the state of each run, then exit."""
    collect: bool = False
    """Write runs.csv from the runs that are done so far, then exit."""
    render: Literal["", "skypilot", "jobset"] = ""
    """Write the sweep as SkyPilot tasks or Kubernetes JobSets into OUT, then exit."""
    cloud: Cloud = dataclasses.field(default_factory=Cloud)
    """Machines for rendered tasks."""


def study(arguments: list[str]) -> int:
    """Train a sweep, fit it and write the report."""
    return _run("study", arguments)


def sweep(arguments: list[str]) -> int:
    """Train the runs of a sweep and write runs.csv."""
    return _run("sweep", arguments)


def _run(verb: str, arguments: list[str]) -> int:
    options = parse(SweepArguments, arguments, f"{program()} {verb}", urls=("out",))
    modes = [name for name in ("dry_run", "status", "collect", "render") if getattr(options, name)]
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in modes)
    require(len(modes) < 2, f"{flags} are asked for together: choose one")
    require(options.limit_hours >= 0, f"--limit-hours {options.limit_hours:g}: must not be negative (0: no limit)")
    # A sweep meant for a cluster must not begin on this machine because a flag is missing.
    only_looks = options.status or options.collect
    unused = "would do nothing: it needs"
    require(
        only_looks or options.executor == "slurm" or options.slurm == Slurm(), f"--slurm.… {unused} --executor slurm"
    )
    require(only_looks or bool(options.render) or options.cloud == Cloud(), f"--cloud.… {unused} --render")

    # --status, --collect and --render need no device and no executor: they work on a laptop while the sweep runs on a
    # cluster.
    declared, url = load_study(options.experiment), url_of(options.out)
    if options.status:
        print("\n".join(flow.status_lines(declared, fetched(options.out))))
        return 0
    if options.collect:
        with working_folder(options.out) as out:
            print(f"runs table: {flow.collect(out, declared.runs)}")
        return 0
    where = "work in a folder that they share: mount the bucket, or leave this out"
    require(not (url and (options.executor == "slurm" or options.render)), f"--out {url}: jobs of a cluster {where}")
    if options.render:
        target = declared, options.experiment, options.out, options.render
        print(*render(*target, options.cloud, options.limit_hours), sep="\n")
        return 0
    # An executor is built before anything is trained: it refuses runs for which it has no machines.
    console = Console()
    executor: Executor
    if options.executor == "slurm":
        require(options.slots == 0, "--slots is for workers of this machine: with SLURM use --slurm.parallel")
        executor = SlurmExecutor(options.slurm, options.limit_hours, line_printer(console))
    else:
        executor = this_machine(options.slots, options.limit_hours)
    if options.dry_run:
        print("\n".join(flow.plan_lines(declared, executor)))
        return 0
    run = flow.run_study if verb == "study" else flow.sweep
    try:
        with working_folder(options.out) as out:
            status = run(declared, out, console, executor, options.again)
        if url:
            print(f"all of it is in {url}")
        return status
    except NotCopied as error:
        print(error, file=sys.stderr)
        return PREEMPTED
