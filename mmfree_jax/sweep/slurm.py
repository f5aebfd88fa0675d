"""The SLURM executor: arrays of chains through submitit, watched with `squeue` and heartbeats, without accounting."""

import contextlib
import dataclasses
import getpass
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.config import ConfigError, RunConfig, require
from mmfree_jax.files import last_line, read_json, write_json
from mmfree_jax.output import Say
from mmfree_jax.sweep.executor import ATTEMPTS, Pending, steps_done, worker_command
from mmfree_jax.sweep.experiment import chains, machines
from mmfree_jax.sweep.heartbeat import last_beat
from mmfree_jax.sweep.local import KEEP_MEMORY
from mmfree_jax.sweep.status import run_folder
from mmfree_jax.training.interrupt import INTERRUPTED, PREEMPTED, STOP_SIGNALS, handling

# What is to be submitted is recorded in OUT/slurm before `sbatch` is called, under a label that becomes the name of the
# jobs. So a driver may be stopped or killed at any point: the next one finds the jobs by that name and submits none
# twice.
#
# A job replaces itself by the worker. When SLURM announces preemption or the end of the job's time (SIGUSR2), the
# worker saves its run and exits with 75, and the job puts itself back into the queue.

NOTICE_SECONDS = 300  # this long before its time limit a job is told to save itself
# When one process of a job has exited, the others get time to end as well. If SLURM killed them at once, as some
# clusters do, the exit status 75, by which the job knows that it must be queued again, would be lost.
LAST_PROCESSES = ["--kill-on-bad-exit=0", "--wait=60"]
LONGEST_ARRAY = 1000  # SLURM's own default for MaxArraySize
LONGEST_PAUSE = 300.0  # between two attempts to submit to a full queue
WATCH_SECONDS = 0.25
FULL = re.compile(r"limit|temporarily|unable to contact|timed out|array specification", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Options of SLURM jobs, and how they are watched."""

    partition: str = ""
    """Partition (the cluster's default where empty)."""
    account: str = ""
    """Account to charge."""
    qos: str = ""
    """Quality of service."""
    hours: float = 24.0
    """Time limit of a job. What is not done by then is saved and queued again."""
    gpus_per_node: int = 8
    """GPUs in a node, with one process for each; 0: no GPUs, one process for each device of a run's mesh."""
    cpus: int = 8
    """CPU cores for each process."""
    memory_gb: int = 0
    """Memory of each node (0: the partition's default)."""
    parallel: int = 64
    """Jobs of an array that may run at the same time."""
    setup: tuple[str, ...] = ()
    """Shell commands before the worker, such as "module load cuda"."""
    extra: tuple[str, ...] = ()
    """More options of sbatch, such as constraint=h100 exclusive."""
    poll_seconds: float = 10.0
    """Seconds between calls of squeue."""
    silent_minutes: float = 10.0
    """A running job without a heartbeat for this long is cancelled and submitted again."""

    def __post_init__(self) -> None:
        for name in ("hours", "cpus", "parallel", "poll_seconds", "silent_minutes"):
            require(getattr(self, name) > 0, f"slurm.{name}={getattr(self, name)}: must be positive")
        for name in ("gpus_per_node", "memory_gb"):
            require(getattr(self, name) >= 0, f"slurm.{name}={getattr(self, name)}: must not be negative")

    def parameters(self, chain: Sequence[RunConfig]) -> dict[str, Any]:
        """Return what the job of a chain asks for, under submitit's names. Raises ConfigError for part of a node."""
        nodes, tasks = machines(chain, self.gpus_per_node, "node")
        extra = {name: value if equals else True for name, equals, value in (o.partition("=") for o in self.extra)}
        minutes = max(1, round(self.hours * 60))
        # --gpus-per-node: with --gpus-per-task the processes of a node do not see each other's devices, and NCCL fails.
        options = {
            "time": minutes,
            "nodes": nodes,
            "ntasks_per_node": tasks,
            "cpus_per_task": self.cpus,
            "gpus_per_node": tasks if self.gpus_per_node else None,
            "mem": f"{self.memory_gb}GB" if self.memory_gb else None,
            "partition": self.partition or None,
            "account": self.account or None,
            "qos": self.qos or None,
            "signal_delay_s": min(NOTICE_SECONDS, minutes * 15),
            "array_parallelism": self.parallel,
            "setup": list(self.setup) or None,
            "srun_args": LAST_PROCESSES if nodes * tasks > 1 else None,
            "additional_parameters": {"requeue": True, **extra},
        }
        return {name: value for name, value in options.items() if value is not None}


# After the worker: 75 says that it is not done, 140 is a SIGUSR2 that came before it listened. In both cases the job
# queues itself again, unless somebody has cancelled it: the worker exits with 75 then too, and a requeue would undo
# what they asked for. $SLURM_JOB_ID is not enough: in one task of an array it is the number of the entire array.
TEARDOWN = (
    "status=$?",
    'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
    'job="${job:-$SLURM_JOB_ID}"',
    'state=$(squeue --noheader --jobs="$job" --format=%T)',
    f'case "$status $state" in "{PREEMPTED} RUNNING" | "{128 + signal.SIGUSR2} RUNNING")',
    '    scontrol requeue "$job" ;;',
    "esac",
    "exit $status",
)


@dataclasses.dataclass(frozen=True)
class Become:
    """The function that submitit calls in the job: it replaces the process by the worker, so that signals and exit
    status are the worker's."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def __call__(self) -> None:
        """Does not return."""
        os.execve(self.command[0], self.command, {**os.environ, **self.environment})


@dataclasses.dataclass(frozen=True)
class Ticket:
    """One task of an array that was submitted."""

    label: str
    index: int


@dataclasses.dataclass(frozen=True)
class Place:
    """What squeue says about a ticket."""

    job: str
    state: str


@dataclasses.dataclass
class Tracked(Pending):
    """A chain and its job."""

    ticket: Ticket | None = None
    job: str = ""
    beat: float = 0.0  # the last heartbeat, and when this process first saw it, by its own clock
    heard: float = 0.0


def live_tickets() -> dict[Ticket, Place]:
    """Return this user's waiting and running jobs. Raises OSError or CalledProcessError if SLURM does not answer."""
    # All jobs of the user in one question, however many chains there are: clusters limit how often squeue may be asked.
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%F|%K|%T|%j"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = {}
    # The label is last, since it is the only part that could hold the separator.
    for line in text.splitlines():
        job, index, state, label = line.split("|", 3)
        number = int(index) if index.isdigit() else 0
        found[Ticket(label, number)] = Place(f"{job}_{index}" if index.isdigit() else job, state)
    return found


def tickets(out: Path) -> dict[Ticket, list[str]]:
    """Return every ticket of a sweep with the names of its runs."""
    records = [(path.stem, read_json(path)) for path in sorted((out / "slurm").glob("*.json"))]
    return {Ticket(label, i): names for label, record in records for i, names in enumerate(record["chains"])}


def jobs_of_runs(out: Path) -> dict[str, Place]:
    """Return the job of each run that has one, by the run's name; empty if there is no SLURM, or none that answers."""
    if not (out / "slurm").is_dir() or shutil.which("squeue") is None:
        return {}
    try:
        live = live_tickets()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: live[ticket] for ticket, names in tickets(out).items() if ticket in live for name in names}


@dataclasses.dataclass(frozen=True)
class SlurmExecutor:
    """Submits jobs as `options` say. Each run may take `limit_hours` (0: no limit). Raises ConfigError without
    SLURM."""

    options: Slurm
    limit_hours: float = 0.0
    say: Say = print

    def plan(self, runs: Sequence[RunConfig]) -> list[str]:
        """Describe the arrays that would be submitted, and what each of their jobs asks for."""
        lines = []
        for chosen in _alike(self.options, chains(runs)):
            options = self.options.parameters(chosen[0])
            shown = ", ".join(f"{name} {value}" for name, value in options.items() if value)
            lines.append(f"SLURM: an array of {len(chosen)} jobs, {shown}")
        return lines

    def execute(self, out: Path, work: list[list[RunConfig]], watch: Callable[[], None]) -> int:
        """Submit and watch. Ctrl-C and SIGTERM only end the watching: jobs go on, and the same command finds them
        again.

        Raises ConfigError if SLURM's commands or submitit are missing.
        """
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise ConfigError("--executor slurm: no sbatch and squeue here; run it where SLURM's commands are")
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("--executor slurm needs submitit: pip install 'mmfree-jax[slurm]'")
        tracked = [Tracked(chain, reached=steps_done(out, chain)) for chain in work]
        return Driver(self, out.resolve(), tracked, watch).run()


def _alike(options: Slurm, work: Sequence[list[RunConfig]]) -> list[list[list[RunConfig]]]:
    """Group chains that ask for the same machines: each group can be one array."""
    groups = defaultdict(list)
    for chain in work:
        groups[machines(chain, options.gpus_per_node, "node")].append(chain)
    return list(groups.values())


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Remove the variables of the job that the driver itself may run in: sbatch would apply them to the new job."""
    from submitit.helpers import clean_env

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env():
        os.environ.update(kept)
        yield


class Driver:
    """Submits the chains that have no job, notices those that lost theirs, and ends when nothing is left."""

    def __init__(self, executor: SlurmExecutor, out: Path, tracked: list[Tracked], watch: Callable[[], None]):
        self.options, self.limit_hours, self.say = executor.options, executor.limit_hours, executor.say
        self.out, self.tracked, self.watch = out, tracked, watch
        self.largest, self.pause, self.not_before = LONGEST_ARRAY, 1.0, 0.0
        self.first_look = True
        self.stopped: list[int] = []

    def run(self) -> int:
        """Loop until nothing is left. Returns 0, or 75 or 130 if this process was told to stop."""
        (self.out / "slurm").mkdir(exist_ok=True)
        # Only a flag: after a KeyboardInterrupt in the middle of sbatch nobody would know whether it has submitted.
        with handling(STOP_SIGNALS, self._stop):
            while self.tracked and not self.stopped:
                live = self._look()
                if live is not None:
                    self._update(live)
                    self._submit()
                until = time.monotonic() + self.options.poll_seconds
                while time.monotonic() < until and self.tracked and not self.stopped:
                    self.watch()
                    time.sleep(WATCH_SECONDS)
        self.watch()
        if self.stopped:
            names = ",".join(sorted({one.ticket.label for one in self.tracked if one.ticket}))
            self.say(f"jobs go on, and the same command finds them again; to end them: scancel --name={names}")
        return self.stopped[0] if self.stopped else 0

    def _stop(self, number: int) -> None:
        self.stopped.append(INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        if number == signal.SIGINT:  # a second Ctrl-C is not caught
            signal.signal(number, signal.default_int_handler)

    def _look(self) -> dict[Ticket, Place] | None:
        try:
            return live_tickets()
        except (OSError, subprocess.SubprocessError) as error:
            if self.stopped:  # Ctrl-C in a terminal reaches squeue as well
                return None
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            self.say(f"squeue does not answer, so nothing is submitted: {said}")
            return None

    def _update(self, live: dict[Ticket, Place]) -> None:
        """Bring every chain up to date with what squeue says. Chains that are done are dropped."""
        # A chain is found by the names of its runs: an earlier driver may have submitted them in other chains.
        jobs = {name: ticket for ticket, names in tickets(self.out).items() if ticket in live for name in names}
        for one in self.tracked:
            names = [run.name for run in one.runs]
            ticket = next((jobs[name] for name in names if name in jobs), None)
            if ticket is not None:
                one.ticket, one.job = ticket, live[ticket].job
                self._check_heartbeat(one, live[ticket])
            else:
                self._job_ended(one)
        self.tracked = [one for one in self.tracked if one.runs]
        if self.first_look and (found := [one for one in self.tracked if one.ticket]):
            self.say(f"{len(found)} jobs are there already: {_ends(found)}")
        self.first_look = False

    def _job_ended(self, one: Tracked) -> None:
        """Read what is left of a chain without a job. Gives up a run after two jobs without progress."""
        had_job, one.ticket, one.heard = one.ticket is not None, None, 0.0
        one.look(self.out, worked=had_job)
        if one.runs and had_job:
            said = last_line(self.out / "slurm" / f"{one.job}_0_log.out") or "nothing"
            if one.vain < ATTEMPTS:
                self.say(f"{one.runs[0].name}: job {one.job} is gone; submitted again (its last words: {said})")
            else:
                one.abandon(self.out, f"its job {one.job} is gone, like the one before; its last words: {said}")

    def _check_heartbeat(self, one: Tracked, place: Place) -> None:
        """Cancel a job that runs according to SLURM and has had no heartbeat for too long: its node may be lost.

        Also one that never had a heartbeat: its worker may hang before it begins.
        """
        beats = [beat.at for run in one.runs if (beat := last_beat(run_folder(self.out, run)))]
        newest, now = max(beats, default=0.0), time.monotonic()
        if place.state != "RUNNING" or newest != one.beat or not one.heard:
            one.beat, one.heard = newest, now
        elif now - one.heard > self.options.silent_minutes * 60:
            self.say(f"{one.runs[0].name}: job {one.job} had no heartbeat for {self.options.silent_minutes:g} min")
            with contextlib.suppress(subprocess.TimeoutExpired):  # tried again after the same time
                subprocess.run(["scancel", one.job], check=False, capture_output=True, timeout=60)
            one.heard = now

    def _submit(self) -> None:
        """Submit every chain that has no job, in as few arrays as possible. A full queue is tried again later."""
        idle = [one for one in self.tracked if one.ticket is None]
        if not idle or time.monotonic() < self.not_before:
            return
        # One call of sbatch for an array, instead of one for each job.
        by_name = {one.runs[0].name: one for one in idle}
        for alike in _alike(self.options, [one.runs for one in idle]):
            for start in range(0, len(alike), self.largest):
                chosen = [by_name[chain[0].name] for chain in alike[start : start + self.largest]]
                try:
                    self._submit_array(chosen)
                except Exception as error:
                    if not self.stopped:
                        self._refused(error, len(chosen))
                    return
        self.pause = 1.0

    def _refused(self, error: Exception, count: int) -> None:
        said = str(error).strip().splitlines()[-1]
        if not FULL.search(str(error)):
            raise ConfigError(f"sbatch refuses: {said}") from error
        # Clusters limit arrays and queues in ways that cannot be asked for: halve the array and wait twice as long.
        self.largest = max(1, count // 2)
        self.not_before, self.pause = time.monotonic() + self.pause, min(2 * self.pause, LONGEST_PAUSE)
        self.say(f"the queue takes no array of {count} now, tried again with {self.largest}: {said}")

    def _submit_array(self, chosen: list[Tracked]) -> None:
        import submitit

        label = f"mmfree-{uuid.uuid4().hex[:10]}"
        names = [[run.name for run in one.runs] for one in chosen]
        record = self.out / "slurm" / f"{label}.json"
        write_json(record, {"chains": names})
        executor = submitit.SlurmExecutor(folder=self.out / "slurm")
        options = self.options.parameters(chosen[0].runs)
        executor.update_parameters(job_name=label, stderr_to_stdout=True, teardown=list(TEARDOWN), **options)
        environment = {} if self.options.gpus_per_node else {"JAX_PLATFORMS": "cpu", **KEEP_MEMORY}
        try:
            with _outside_any_job(), executor.batch():
                jobs = [
                    executor.submit(Become(tuple(worker_command(self.out, one.runs, self.limit_hours)), environment))
                    for one in chosen
                ]
        except Exception:
            if not self.stopped:  # else Ctrl-C may have ended sbatch after it had submitted
                record.unlink()
            raise
        for index, (one, job) in enumerate(zip(chosen, jobs, strict=True)):
            one.ticket, one.job = Ticket(label, index), job.job_id
        self.say(f"submitted {len(jobs)} jobs: {_ends(chosen)}, {label}")


def _ends(some: Sequence[Tracked]) -> str:
    return some[0].job + (f" to {some[-1].job}" if some[1:] else "")
