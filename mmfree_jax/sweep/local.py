"""The local executor: a pool of workers over this machine's accelerators, or over its CPU cores."""

import ctypes
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from mmfree_jax import nvidia
from mmfree_jax.config import RunConfig, require
from mmfree_jax.files import last_line
from mmfree_jax.sweep import sharing
from mmfree_jax.sweep.executor import ATTEMPTS, Pending, steps_done, worker_command
from mmfree_jax.sweep.experiment import chains, machines
from mmfree_jax.training.interrupt import INTERRUPTED, PREEMPTED, STOP_SIGNALS, handling

# A run whose mesh has several devices takes as many GPUs; on CPUs its devices are simulated, one core each. Workers
# with small runs share a GPU (`sharing`).

STOP_SECONDS = 60.0  # time for workers to save themselves after a signal
POLL_SECONDS = 0.25
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
GPU = nvidia.VISIBLE
TPU = "TPU_VISIBLE_CHIPS"
TPU_PORT = 8476  # of the first chip's process
TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # one for each chip, of older and of newer drivers

# XLA allocates its temporaries in every step. By default glibc returns them to the system, and the next step faults
# every page in again: a sixth to a third of a small model's time on a CPU. With these settings it keeps them.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """Room for one worker or several small ones: their environment and CPU cores."""

    name: str
    env: dict[str, str]
    cores: frozenset[int]
    memory: float | None = None  # bytes of a GPU; None if not known


@dataclasses.dataclass
class Job(Pending):
    """A chain, its worker, and the slots that the worker takes: entire ones, or a share of one."""

    slots: list[int] = dataclasses.field(default_factory=list)
    share: Fraction = Fraction(1)
    log: Path = Path()  # what the worker prints
    process: subprocess.Popen | None = None


def this_machine(workers: int = 0, limit_hours: float = 0.0) -> "Local":
    """Return the executor for this machine, with `workers` on each GPU, or in total if there are only CPU cores.

    0 means as many as `sharing` allows on each GPU, or one on each core. Raises ConfigError for more workers than there
    is room for, and on systems other than Linux, whose ways of starting, pinning and ending processes are used.
    """
    require(
        sys.platform == "linux",
        f"workers on this machine need Linux, and this is {sys.platform}: use --executor slurm or --render, or train "
        "the runs one by one",
    )
    # Each kind of device has its own rule for sharing: GPUs by size of the models, TPU chips never, cores one a worker.
    slots = find_slots()
    if any(GPU in slot.env for slot in slots):
        return Local(slots, limit_hours, workers)
    if any(TPU in slot.env for slot in slots):
        require(workers in (0, 1), f"--slots {workers}: a TPU chip belongs to one worker: leave it out")
        return Local(slots, limit_hours)
    require(workers <= len(slots), f"--slots {workers}: this machine has {len(slots)} CPU cores, for a worker each")
    require(workers >= 0, f"--slots {workers}: must not be negative (0: one a CPU core)")
    return Local(slots[:workers] if workers else slots, limit_hours)


def find_slots() -> list[Slot]:
    """Return one slot for each visible GPU or TPU chip, else for each CPU core.

    A small model gains nothing from two cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpus := _visible_gpus():
        return [Slot(f"gpu{g}", {GPU: g}, frozenset(cores), nvidia.memory_bytes(g)) for g in gpus]
    wanted = os.environ.get("JAX_PLATFORMS") or "tpu"  # JAX takes the best platform that there is, or one of a list
    if "tpu" in wanted.split(",") and importlib.util.find_spec("libtpu") is not None:
        # Counted from the system's files: libtpu would take all chips in order to count them.
        chips = max(len(glob.glob(pattern)) for pattern in TPU_FILES)
        if chips:
            return [Slot(f"tpu{c}", {TPU: str(c)}, frozenset(cores)) for c in range(chips)]
    return [Slot(f"cpu{c}", {"JAX_PLATFORMS": "cpu", **KEEP_MEMORY}, frozenset([c])) for c in cores]


def _visible_gpus() -> list[str]:
    """The GPUs that JAX would use, by CUDA's names. A plain `pip install jax` has no CUDA plugin and uses none."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not any("cuda" in plugin.name for plugin in plugins):
        return []
    return nvidia.visible()


def combine_slots(slots: Sequence[Slot], devices: int, sharers: int = 1) -> Slot:
    """Combine slots for one worker whose runs use `devices` devices: the slots' GPUs, or simulated ones on their cores.

    One of several `sharers` of a GPU gets its part of the memory, and its environment says that the GPU is shared.
    """
    env = {name: value for slot in slots for name, value in slot.env.items()}
    if GPU in env:
        # Names, not numbers counted anew: CUDA_VISIBLE_DEVICES of this process may already be a selection.
        env[GPU] = ",".join(slot.env[GPU] for slot in slots)
    elif TPU in env:
        env = one_chip(int(env[TPU])) if devices == 1 else {}  # libtpu takes all chips unless it is told not to
    elif devices > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    if sharers > 1:
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{sharing.fraction(slots[0].memory, sharers):.4f}"
        env[nvidia.SHARERS] = str(sharers)
    return Slot("+".join(slot.name for slot in slots), env, frozenset().union(*(slot.cores for slot in slots)))


def one_chip(number: int) -> dict[str, str]:
    """Return the environment of a process that uses one of a host's TPU chips while other processes use the others."""
    port = str(TPU_PORT + number)
    return {
        TPU: str(number),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
        "TPU_PROCESS_PORT": port,
        "CLOUD_TPU_TASK_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


@dataclasses.dataclass(frozen=True)
class Local:
    """A pool of workers on this machine. Each run may take `limit_hours` (0: no limit).

    `sharers` is the number of workers on each GPU; 0: as many as `sharing` allows for their runs. A worker whose runs
    need several slots does not share them.
    """

    slots: Sequence[Slot]
    limit_hours: float = 0.0
    sharers: int = 0

    def __post_init__(self) -> None:
        require(self.sharers >= 0, f"--slots {self.sharers}: must not be negative (0: by the size of the models)")
        for slot in self.slots if self.sharers > 1 else ():
            sharing.fraction(slot.memory, self.sharers)

    @property
    def kind(self) -> str:
        """What each slot is: GPU, TPU chip or CPU core."""
        names = {name for slot in self.slots for name in slot.env}
        return "GPU" if GPU in names else "TPU chip" if TPU in names else "CPU core"

    def plan(self, runs: Sequence[RunConfig]) -> list[str]:
        """Describe in a line how many workers would run. Raises ConfigError as `room` does."""
        work = chains(runs)
        most = max(map(self.room, work))
        joint = f", {most} of them as one if a mesh needs it" if most > 1 else ""
        crowd = max(self.crowd(chain, len(work)) for chain in work)
        each = "one" if crowd == 1 else f"up to {crowd}"
        return [
            f"{len(runs)} runs in {len(work)} chains on {crowd * len(self.slots)} workers, {each} a {self.kind}{joint}"
        ]

    def room(self, chain: Sequence[RunConfig]) -> int:
        """Return the number of slots that a chain takes.

        Raises ConfigError for more GPUs or TPU chips than there are, for some but not all of several chips, and for
        runs on different meshes.
        """
        _, devices = machines(chain, 0, "machine")
        have, kind = len(self.slots), self.kind
        if kind != "CPU core":
            fits = f"{chain[0].name}: its mesh needs {devices} {kind}s, and {have} may be used here: change its mesh"
            require(devices <= have, fits)
        if kind == "TPU chip":
            one = f"{chain[0].name}: a mesh of {devices} of the {have} TPU chips of a host: use one, or all"
            require(devices in (1, have), one)
        return min(devices, len(self.slots))

    def crowd(self, chain: Sequence[RunConfig], waiting: int) -> int:
        """Return the number of workers that share the slot of a chain, if `waiting` chains are there in total."""
        if self.kind != "GPU" or self.room(chain) > 1:
            return 1
        have = len(self.slots)
        memory = min((slot.memory for slot in self.slots if slot.memory), default=None)
        cores, host = len(self.slots[0].cores) / have, sharing.host_memory() / have
        right = self.sharers or sharing.workers(chain, memory, cores, host)
        return min(right, math.ceil(waiting / have))

    def execute(self, out: Path, work: list[list[RunConfig]], watch: Callable[[], None]) -> int:
        """Run the chains in the order of `work`. Smaller chains do not overtake one that needs several slots.

        SIGINT (Ctrl-C), SIGTERM and SIGHUP stop the workers, which save themselves; then 130 or 75 is returned.
        """
        queue = []
        for chain in work:
            share, log = Fraction(1, self.crowd(chain, len(work))), out / "workers" / f"{chain[0].name}.log"
            queue.append(Job(chain, reached=steps_done(out, chain), share=share, log=log))
        # Shares are fractions, so that three workers with a third of a GPU each fill it exactly.
        free, active = [Fraction(1) for _ in self.slots], list[Job]()
        stopped: list[int] = []
        # Handlers instead of KeyboardInterrupt, which would be swallowed if it were raised inside a destructor.
        with handling(STOP_SIGNALS, stopped.append):
            try:
                while (queue or active) and not stopped:
                    while queue and self._start(out, queue[0], free):
                        active.append(queue.pop(0))
                    _wait_for_one([job.process for job in active if job.process], POLL_SECONDS)
                    for job in [job for job in active if job.process and job.process.poll() is not None]:
                        active.remove(job)
                        for slot in job.slots:
                            free[slot] += job.share
                        if _needs_another_worker(out, job):
                            queue.insert(0, job)
                    watch()
            finally:
                _stop([job.process for job in active if job.process])
        watch()
        return 0 if not stopped else INTERRUPTED if stopped[0] == signal.SIGINT else PREEMPTED

    def _start(self, out: Path, job: Job, free: list[Fraction]) -> bool:
        """Start a worker on the slots with most room, and take its share of them. Returns False if it does not fit."""
        fitting = [slot for slot, share in enumerate(free) if share >= job.share]
        room = self.room(job.runs)
        if len(fitting) < room:
            return False
        job.slots = sorted(fitting, key=lambda slot: -free[slot])[:room]
        for number in job.slots:
            free[number] -= job.share
        taken = [self.slots[number] for number in job.slots]
        slot = combine_slots(taken, job.runs[0].mesh.devices, job.share.denominator)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            job.process = subprocess.Popen(
                worker_command(out, job.runs, self.limit_hours),
                env={**os.environ, **slot.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: Ctrl-C reaches only the driver, which then stops the workers in good order.
                start_new_session=True,
                preexec_fn=functools.partial(_prepare_child, slot, os.getpid()),
            )
        return True


def _wait_for_one(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    """Wait until one of the processes has ended, so that its slot is filled at once, or for `seconds`."""
    # A file descriptor of each process becomes readable when it ends: one `select` waits for all, without polling.
    handles = [os.pidfd_open(process.pid) for process in processes if process.poll() is None]
    try:
        if len(handles) == len(processes):
            select.select(handles, [], [], seconds)
    finally:
        for handle in handles:
            os.close(handle)


def _prepare_child(slot: Slot, driver: int) -> None:
    """In the child, before it starts: pin it to the slot's cores, and have it save and end if the driver dies.

    Nothing here may take a lock that another thread of the driver could hold: it would never be released in the child.
    """
    os.sched_setaffinity(0, slot.cores)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != driver:  # it died before it could be asked for the signal
        os._exit(PREEMPTED)


def _needs_another_worker(out: Path, job: Job) -> bool:
    """Whether runs are left in the chain of a worker that has ended. Gives up a run after two without progress."""
    job.look(out)
    if job.runs and job.vain == ATTEMPTS and job.process is not None:
        code = job.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        said = last_line(job.log) or "nothing"
        job.abandon(out, f"its worker {how}; its last words: {said}")
    return bool(job.runs)


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
