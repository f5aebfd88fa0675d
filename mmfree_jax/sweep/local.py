"""The local executor: a pool of workers over this machine's accelerators, or over its CPU cores."""

import ctypes
import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmfree_jax.config import RunConfig
from mmfree_jax.files import last_line
from mmfree_jax.sweep.experiment import chains, run_flops
from mmfree_jax.sweep.status import fail, run_folder, status
from mmfree_jax.training.interrupt import INTERRUPTED, PREEMPTED

WORKER = (sys.executable, "-m", "mmfree_jax.sweep.worker")
ATTEMPTS = 2  # a worker that is killed from outside (out of memory, say) is started once more
STOP_SECONDS = 60.0  # for workers to save themselves after a signal
POLL_SECONDS = 0.25


# XLA allocates its temporaries anew in every step. Left to itself, glibc returns them to the system and the next step
# faults every page in again, a sixth to a third of a small model's time on a CPU: let it keep what it has.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Room for one worker: the environment and the CPU cores it gets."""

    name: str
    env: dict[str, str]
    cores: frozenset[int]


@dataclasses.dataclass
class Job:
    """A chain of runs, the worker it is on, and how often it was started."""

    runs: list[RunConfig]
    attempts: int = 0
    slot: Slot | None = None
    process: subprocess.Popen | None = None


def find_slots(limit: int = 0) -> list[Slot]:
    """One slot a visible GPU, else one a CPU core: small models keep one core busy and gain nothing from two.

    `limit` > 0 takes that many at most.
    """
    cores = sorted(os.sched_getaffinity(0))
    gpus = _visible_gpus()
    if gpus:
        slots = [Slot(f"gpu{g}", {"CUDA_VISIBLE_DEVICES": g}, frozenset(cores)) for g in gpus]
    else:
        slots = [Slot(f"cpu{c}", {"JAX_PLATFORMS": "cpu", **KEEP_MEMORY}, frozenset([c])) for c in cores]
    return slots[:limit] if limit else slots


def _visible_gpus() -> list[str]:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [g for g in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if g]
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver: not an error, there simply is no GPU
        return []
    return [str(i) for i in range(pynvml.nvmlDeviceGetCount())]


def execute(out: Path, runs: Sequence[RunConfig], slots: Sequence[Slot], watch: Callable[[], None]) -> int:
    """Run everything that is not done yet; returns 0, or 1 if a run failed.

    `watch()` is called a few times a second. KeyboardInterrupt and SIGTERM stop the workers, which save themselves;
    the exit status is then 130 or 75.
    """
    queue = [
        Job(chain) for chain in chains(runs) if any(status(run_folder(out, run), run).state != "done" for run in chain)
    ]
    # Longest first, so that no long chain is left to run alone at the end.
    queue.sort(key=lambda job: -sum(run_flops(run) for run in job.runs))
    free, active = list(slots), list[Job]()
    stopped: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(PREEMPTED))
    try:
        while (queue or active) and not stopped:
            while free and queue:
                job = queue.pop(0)
                _start(out, job, free.pop(0))
                active.append(job)
            _wait_for_one([job.process for job in active if job.process], POLL_SECONDS)
            for job in [job for job in active if job.process and job.process.poll() is not None]:
                active.remove(job)
                if job.slot:
                    free.append(job.slot)
                if _wants_retry(job):
                    queue.insert(0, job)
                else:
                    _explain(out, job)
            watch()
    except KeyboardInterrupt:
        stopped.append(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop([job.process for job in active if job.process])
    watch()
    if stopped:
        return stopped[0]
    return 0 if all(status(run_folder(out, run), run).state == "done" for run in runs) else 1


def _wait_for_one(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    """Until one of the processes has ended, or for so long: a slot is filled again at once."""
    handles = [os.pidfd_open(process.pid) for process in processes if process.poll() is None]
    try:
        if len(handles) == len(processes):
            select.select(handles, [], [], seconds)
    finally:
        for handle in handles:
            os.close(handle)


def _start(out: Path, job: Job, slot: Slot) -> None:
    names = [run.name for run in job.runs]
    path = _worker_log(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        job.process = subprocess.Popen(
            [*WORKER, str(out), *names],
            env={**os.environ, **slot.env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its own session: Ctrl-C reaches the driver only, which then stops the workers in good order.
            start_new_session=True,
            preexec_fn=lambda: _settle(slot),
        )
    job.slot, job.attempts = slot, job.attempts + 1


def _settle(slot: Slot) -> None:
    """In the child, before it starts: keep to the slot's cores, and save and leave if the driver dies."""
    os.sched_setaffinity(0, slot.cores)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _wants_retry(job: Job) -> bool:
    killed = job.process is not None and (job.process.returncode < 0 or job.process.returncode == PREEMPTED)
    return killed and job.attempts < ATTEMPTS


def _explain(out: Path, job: Job) -> None:
    """A worker that died without saying why (killed, or broken before it began): say so in its first open run."""
    states = [status(run_folder(out, run), run) for run in job.runs]
    left = next((s for s in states if s.state != "done"), None)
    if left is None or left.error or job.process is None:
        return
    code = job.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    said = last_line(_worker_log(out, job)) or "nothing"
    fail(run_folder(out, left.config), f"its worker {how}; its last words: {said}")


def _worker_log(out: Path, job: Job) -> Path:
    return out / "workers" / f"{job.runs[0].name}.log"


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
