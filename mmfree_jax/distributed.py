"""Several processes as one run: when that is intended, how they find each other, and how they agree."""

import collections
import contextlib
import dataclasses
import functools
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import require

# `jax.distributed.initialize` ends the process if another one does not start, without saying which. So there is a roll
# call before it: process 0 listens at the coordinator's address until every other process has reported its number.

HEARTBEAT_SECONDS = 30  # after so long without a heartbeat a process counts as dead, and all others end
SHUTDOWN_SECONDS = 10  # how long a process waits at its end for the others to end too
RETRY_SECONDS = 0.2
DIGITS = (0, 16, 32, 48)  # first bits of the digits in `sum_integers`
GREETING_SECONDS = 5  # a process that connects must report its number within this time


class MissingProcess(RuntimeError):
    """Processes did not start. The message names them and the coordinator, and says what to check."""


class PeerLost(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


# What JAX says where a connection to another process breaks: in a collective operation, or in the coordination service.
BROKEN = re.compile("Gloo|heartbeat|[Cc]onnection (reset|closed|refused)|coordination service|NCCL")


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn the error of a connection that has broken into PeerLost, in one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not BROKEN.search(str(error)):
            raise
        raise PeerLost(
            "another process of this run has ended or cannot be reached: start all of them again with the same command "
            f"({' '.join(str(error).split())[:160]})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Group:
    """The number of processes of a run, and the index of this one.

    `coordinator` (HOST:PORT of process 0) is empty if JAX knows everything from the machine (Cloud TPU).
    """

    coordinator: str
    count: int
    index: int
    local_devices: list[int] | None = None  # None: all that are visible


def find_group(
    coordinator: str, processes: int, process: int, environment: Mapping[str, str] = os.environ
) -> Group | None:
    """Return the group that the flags or the environment describe; None for a single process.

    Flags come first: HOST:PORT, a count and an index; then JAX's variables for the same. Then SLURM, if `srun` started
    more than one task (the variables of a job, which the shell of an allocation has too, are not enough), then a Cloud
    TPU slice of more than one host. Raises ConfigError for flags that do not fit together.
    """
    if coordinator or processes or process >= 0:
        return _from_flags(coordinator, processes, process)
    number = functools.partial(_number, environment)
    if (count := number("JAX_NUM_PROCESSES", 1)) > 1:
        return _from_flags(environment.get("JAX_COORDINATOR_ADDRESS", ""), count, number("JAX_PROCESS_ID", -1))
    if number("SLURM_STEP_NUM_TASKS", 1) > 1 and environment.get("SLURM_PROCID"):
        return _from_slurm(environment)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    return Group("", hosts, number("TPU_WORKER_ID", 0)) if hosts > 1 else None


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    """A number from the environment; `otherwise` if the variable is not set or empty. Raises ConfigError."""
    text = environment.get(name, "").strip()
    if not text and otherwise is not None:
        return otherwise
    require(bool(re.fullmatch(r"-?\d+", text)), f"{name}={text!r} in the environment: must be a number")
    return int(text)


def _from_flags(coordinator: str, processes: int, process: int) -> Group:
    flags = f"--coordinator {coordinator!r} --processes {processes} --process {process}"
    require(
        bool(re.fullmatch(r".+:\d+", coordinator)) and 0 <= process < processes,
        f"{flags}: give all three, HOST:PORT of process 0, how many there are and which one this is (from 0)",
    )
    return Group(coordinator, processes, process)


def _from_slurm(environment: Mapping[str, str]) -> Group:
    """Process 0 runs on the first node of the step; the port is derived from the job's number."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    number = functools.partial(_number, environment)
    require(
        bool(nodes),
        "SLURM says that this is one of several processes, but not on which nodes (SLURM_STEP_NODELIST is not set): "
        "start them with srun, or give --coordinator, --processes and --process",
    )
    port = 61440 + number("SLURM_JOB_ID") % 4096
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # such as 10(x4)
    # If the tasks of a node see the same GPUs, each has to take its own.
    all_visible = "," in environment.get("CUDA_VISIBLE_DEVICES", "")
    own_device = tasks is not None and int(tasks[0]) > 1 and all_visible
    return Group(
        f"{first_host(nodes)}:{port}",
        number("SLURM_STEP_NUM_TASKS"),
        number("SLURM_PROCID"),
        [number("SLURM_LOCALID")] if own_device else None,
    )


def first_host(nodes: str) -> str:
    """Return the first host of a list in SLURM's notation: of `rack[1-2]node[03-04,7]-ib,login` rack1node03-ib.

    Raises ConfigError for text that is not such a list.
    """
    found = re.match(r"(?:[^,\[\]]|\[\d[\d,-]*\])+(?=,|$)", nodes.strip())
    require(found is not None, f"{nodes!r} is no list of hosts as SLURM writes them: give --coordinator HOST:PORT")
    assert found is not None
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", found[0])


def join(group: Group, patience_s: float) -> None:
    """Make this process a member of `group`. Call it before anything asks JAX for its devices.

    Raises MissingProcess if the others do not start within `patience_s` seconds.
    """
    # The loop handles signals itself and agrees on the step to stop at. JAX's service would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    if not group.coordinator:
        jax.distributed.initialize(initialization_timeout=int(patience_s))
        return
    call_roll(group, patience_s)
    jax.distributed.initialize(
        group.coordinator,
        group.count,
        group.index,
        local_device_ids=group.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(patience_s)),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def call_roll(group: Group, patience_s: float) -> None:
    """Return when every process of `group` has reported. Raises MissingProcess, naming those that have not."""
    host, _, port = group.coordinator.rpartition(":")
    deadline = time.monotonic() + patience_s
    missing: set[int] | None
    if group.index == 0:
        missing = _wait_for_others(int(port), group.count, deadline)
        absent = f"of {group.count} processes, {_numbers(missing)} did not come"
    else:
        missing = _report(host, int(port), group.index, deadline, patience_s)
        absent = f"processes {_numbers(missing)} did not come" if missing else "nobody answers there"
    if missing is None or missing:
        raise MissingProcess(
            f"coordinator {group.coordinator}: {absent} within {patience_s:g} s; check that every process was started "
            f"with --processes {group.count} and its own --process, and that this address can be reached from all"
        )


def _numbers(indices: set[int] | None) -> str:
    return ", ".join(map(str, sorted(indices or ())))


def _wait_for_others(port: int, count: int, deadline: float) -> set[int]:
    """In process 0: collect the numbers of the others, tell each of them at the end which are missing, return these."""
    missing, waiting = set(range(1, count)), []
    with contextlib.ExitStack() as stack, socket.create_server(("", port), backlog=count) as server:
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(GREETING_SECONDS)
                number = connection.recv(16)
                if number.isdigit():  # it is a process of this run
                    missing.discard(int(number))
                    waiting.append(connection)
        for connection in waiting:
            connection.sendall(f"here;{_numbers(missing)}".encode())
    return missing


def _report(host: str, port: int, index: int, deadline: float, patience_s: float) -> set[int] | None:
    """In the others: report to process 0. Returns which are missing; None if process 0 cannot be reached.

    Process 0 may have started at the last moment, so a process that has reached it waits as long as it does.
    """
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as connection:
            connection.sendall(str(index).encode())
            connection.settimeout(left + patience_s)
            answer = connection.recv(65536).decode()
            if answer.startswith("here;"):
                return {int(number) for number in answer[5:].split(", ") if number}
        time.sleep(RETRY_SECONDS)
    return None


def process_table() -> str:
    """Return a table of the devices of each process."""
    devices = collections.defaultdict(list)
    for device in jax.devices():
        devices[device.process_index].append(device)
    rows = [f"{'process':>7}  devices"]
    for index, own in sorted(devices.items()):
        here = "  (this one)" if index == jax.process_index() else ""
        rows.append(f"{index:>7}  {len(own)} x {own[0].device_kind}, numbers {own[0].id} to {own[-1].id}{here}")
    return "\n".join(rows)


def is_alone() -> bool:
    """Return whether this process has joined no others. Does not ask JAX for its devices."""
    return not jax.distributed.is_initialized()


def is_first() -> bool:
    """Return whether this process is the one that writes files."""
    return jax.process_index() == 0


def first_does(action: Callable[[], object]) -> None:
    """Call `action` in process 0 while the others wait. If it fails there, an error is raised in all of them."""
    failure = None
    if is_first():
        try:
            action()
        except Exception as error:
            failure = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(failure is not None)):
        raise failure or RuntimeError("process 0 failed; its own message says why")
    if failure is not None:
        raise failure


def sum_or_none(value: float | None) -> float | None:
    """Return the sum over all processes; None if one of them has None."""
    if jax.process_count() == 1:
        return value
    # All processes must take part, also those with None, or the others would wait for them.
    found = multihost_utils.process_allgather(np.float64(np.nan if value is None else value))
    return None if np.isnan(found).any() else float(found.sum())


def sum_integers(numbers: Sequence[int]) -> list[int]:
    """Return the exact sums over processes of integers from 0 to 2^64 - 1."""
    if jax.process_count() == 1:
        return list(numbers)
    # Counts of tokens pass 2^32 within hours, and without x64 JAX has no 64-bit integers.
    # In digits of 16 bits, because JAX exchanges numbers of 32 bits.
    # A sum of digits may exceed 16 bits; adding the shifted sums carries it over.
    digits = [[number >> shift & 0xFFFF for shift in DIGITS] for number in numbers]
    found = np.asarray(multihost_utils.process_allgather(np.array(digits, np.int32)), np.int64).sum(axis=0)
    return [sum(int(digit) << shift for digit, shift in zip(row, DIGITS, strict=True)) for row in found]


class AgreedStop:
    """Turns signals to single processes into one signal that all of them act on after the same step.

    Each call starts the exchange for one step and returns the result of the previous one, so no step waits for it. If
    there is a single process, its own signal is returned at once.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._per_device = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda signals: signals.max(), out_shardings=NamedSharding(mesh, P()))
        self._shape, self._pending = (mesh.size,), None

    def __call__(self, signal: int | None, save: bool = False) -> tuple[int | None, bool]:
        """Takes the signal to this process, and returns the one that all act on now; None for none.

        `save`: this process wants to save. Returned true if one of them does; a signal may hide it.
        """
        if jax.process_count() == 1:
            return signal, save
        own = np.array([2 * (signal or 0) + save], np.int32)
        before = self._pending
        self._pending = self._largest(jax.make_array_from_callback(self._shape, self._per_device, lambda _: own))
        agreed = 0 if before is None else int(jax.device_get(before))
        return agreed // 2 or None, agreed % 2 == 1


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Make a global array from one that every process has in full."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def repeat(number: np.generic, sharding: NamedSharding) -> jax.Array:
    """Put a scalar that is equal in all processes on each device of a replicated sharding.

    Device by device, because `jax.device_put` to all of them would compare the numbers of all processes.
    """
    # A comparison would be a collective operation in every step.
    pieces = [jax.device_put(number, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays((), sharding, pieces)


def own_rows(sharding: NamedSharding, batch: int) -> list[int]:
    """Return the rows of a global batch that the devices of this process hold, ascending."""
    held = sharding.addressable_devices_indices_map((batch, 1)).values()
    return sorted({row for index in held if index is not None for row in range(batch)[index[0]]})


def counted_rows(sharding: NamedSharding, batch: int) -> list[int]:
    """Return the rows of `own_rows` that no earlier process holds, so that all processes together count each row
    once."""
    holder: dict[int, int] = {}
    device: Any
    for device, index in sharding.devices_indices_map((batch, 1)).items():
        for row in range(batch)[index[0]] if index is not None else ():
            holder[row] = min(device.process_index, holder.get(row, device.process_index))
    return sorted(row for row, process in holder.items() if process == jax.process_index())


def put_rows(array: np.ndarray, sharding: NamedSharding, batch: int, rows: list[int]) -> jax.Array:
    """Make a global batch [batch, ...] from the rows [len(rows), ...] that each process has of it (`own_rows`)."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = range(batch)[index[0]]
        first = rows.index(wanted[0])
        return array[(slice(first, first + len(wanted)), *index[1:])]

    return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, shard)
