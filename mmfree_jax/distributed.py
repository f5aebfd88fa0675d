"""Several processes as one run: when they are meant, how they find each other, what they agree on.

`jax.distributed.initialize` ends the process when another does not come, without saying which. So before it there is a
roll call: process 0 listens at the coordinator's address until every other one has given its number.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import require

HEARTBEAT_SECONDS = 30  # a process silent for so long is taken for dead, and all others end
FAREWELL_SECONDS = 10  # how long one that ends waits for the others to end too
RETRY_SECONDS = 0.2
DIGITS = (0, 16, 32, 48)  # where the digits of `added` begin, in bits
GREETING_SECONDS = 5  # within which one that connects has said its number, or is not of this run


class MissingProcess(RuntimeError):
    """Processes did not come. The message names them and the coordinator, and says what to check."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run and this one's place among them.

    `coordinator` (HOST:PORT of process 0) is empty where JAX knows all of it from the machine (Cloud TPU).
    """

    coordinator: str
    count: int
    index: int
    local_devices: list[int] | None = None  # None: all that are visible


def meant(coordinator: str, processes: int, process: int, environment: Mapping[str, str] = os.environ) -> Group | None:
    """The group that flags or the environment ask for; None for a single process.

    Flags come first: HOST:PORT, a count and an index; then JAX's own variables for the same. Then SLURM, where `srun`
    started more than one task (variables of the job alone, as in the shell of an allocation, mean nothing), then a
    Cloud TPU slice of more than one host.
    Raises ConfigError for flags that do not go together.
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
    """A number in the environment; `otherwise` where it is not set, or set to nothing. Raises ConfigError."""
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
    """Process 0 runs on the step's first node; the port is made of the job's number."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    number = functools.partial(_number, environment)
    require(
        bool(nodes),
        "SLURM says that this is one of several processes, but not on which nodes (SLURM_STEP_NODELIST is not set): "
        "start them with srun, or give --coordinator, --processes and --process",
    )
    port = 61440 + number("SLURM_JOB_ID") % 4096
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # such as 10(x4)
    own_device = tasks is not None and int(tasks[0]) > 1 and _devices_are_shared(environment)
    return Group(
        f"{first_host(nodes)}:{port}",
        number("SLURM_STEP_NUM_TASKS"),
        number("SLURM_PROCID"),
        [number("SLURM_LOCALID")] if own_device else None,
    )


def first_host(nodes: str) -> str:
    """The first of a list of hosts in SLURM's notation: of `rack[1-2]node[03-04,7]-ib,login` it is rack1node03-ib.

    Raises ConfigError for what is no such list.
    """
    found = re.match(r"(?:[^,\[\]]|\[\d[\d,-]*\])+(?=,|$)", nodes.strip())
    require(found is not None, f"{nodes!r} is no list of hosts as SLURM writes them: give --coordinator HOST:PORT")
    assert found is not None
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", found[0])


def _devices_are_shared(environment: Mapping[str, str]) -> bool:
    """Whether the tasks of a node see the same GPUs, so that each has to take its own."""
    return "," in environment.get("CUDA_VISIBLE_DEVICES", "")


def join(group: Group, patience_s: float) -> None:
    """Make this process one of `group`; before anything asks JAX for its devices.

    Raises MissingProcess when the others do not come within `patience_s` seconds.
    """
    # The loop answers signals itself and agrees on the step to stop at; JAX's service would take SIGTERM away from it.
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
        shutdown_timeout_seconds=FAREWELL_SECONDS,
    )


def call_roll(group: Group, patience_s: float) -> None:
    """Return once every process of `group` is here. Raises MissingProcess, naming those that are not."""
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
    """Process 0: collect the others' numbers, tell each who is missing in the end, and return that."""
    missing, waiting = set(range(1, count)), []
    with contextlib.ExitStack() as stack, socket.create_server(("", port), backlog=count) as server:
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(GREETING_SECONDS)
                number = connection.recv(16)
                if number.isdigit():  # a stranger says something else
                    missing.discard(int(number))
                    waiting.append(connection)
        for connection in waiting:
            connection.sendall(f"here;{_numbers(missing)}".encode())
    return missing


def _report(host: str, port: int, index: int, deadline: float, patience_s: float) -> set[int] | None:
    """Another process: give process 0 this number; returns who is missing, None where process 0 cannot be reached.

    Process 0 may have come at the last moment: who has reached it waits for as long as it does.
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
    """Which devices each process brings, one line a process."""
    devices = collections.defaultdict(list)
    for device in jax.devices():
        devices[device.process_index].append(device)
    rows = [f"{'process':>7}  devices"]
    for index, own in sorted(devices.items()):
        here = "  (this one)" if index == jax.process_index() else ""
        rows.append(f"{index:>7}  {len(own)} x {own[0].device_kind}, numbers {own[0].id} to {own[-1].id}{here}")
    return "\n".join(rows)


def is_first() -> bool:
    """Whether this process writes what a run leaves behind."""
    return jax.process_index() == 0


def first_does(action: Callable[[], object]) -> None:
    """`action` in process 0 while the others wait for it; where it fails there, it fails everywhere."""
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


def total(value: float | None) -> float | None:
    """The sum of what every process measured; None where one of them measured nothing."""
    if jax.process_count() == 1:
        return value
    # All take part, whatever they have: one that stayed away would leave the others waiting for it.
    found = multihost_utils.process_allgather(np.float64(np.nan if value is None else value))
    return None if np.isnan(found).any() else float(found.sum())


def added(numbers: Sequence[int]) -> list[int]:
    """The sums over processes of whole numbers, each from 0 to 2^64 - 1 in every process; exact."""
    if jax.process_count() == 1:
        return list(numbers)
    # In digits of 16 bits: JAX exchanges numbers of 32.
    digits = [[number >> shift & 0xFFFF for shift in DIGITS] for number in numbers]
    found = np.asarray(multihost_utils.process_allgather(np.array(digits, np.int32)), np.int64).sum(axis=0)
    return [sum(int(digit) << shift for digit, shift in zip(row, DIGITS, strict=True)) for row in found]


class AgreedStop:
    """Turns signals that single processes got into one that all know of at the same step.

    Each call starts the exchange of one step and returns the result of the one before, so no step waits for it. A
    single process answers for itself at once.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._per_device = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda signals: signals.max(), out_shardings=NamedSharding(mesh, P()))
        self._shape, self._pending = (mesh.size,), None

    def __call__(self, signal: int | None) -> int | None:
        """The signal that this process got -> the one that all act on now; None for none."""
        if jax.process_count() == 1:
            return signal
        own = np.array([signal or 0], np.int32)
        before = self._pending
        self._pending = self._largest(jax.make_array_from_callback(self._shape, self._per_device, lambda _: own))
        return None if before is None else int(jax.device_get(before)) or None


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array out of one that every process holds whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def repeat(number: np.generic, sharding: NamedSharding) -> jax.Array:
    """A scalar, of which every process has the same, on each device of a sharding that cuts nothing.

    Device by device: told to do it at once, JAX asks all processes whether the number is the same.
    """
    pieces = [jax.device_put(number, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays((), sharding, pieces)


def own_rows(sharding: NamedSharding, batch: int) -> list[int]:
    """Which rows of a global batch the devices of this process hold, ascending: wherever the mesh puts them."""
    held = sharding.addressable_devices_indices_map((batch, 1)).values()
    return sorted({row for index in held if index is not None for row in range(batch)[index[0]]})


def counted_rows(sharding: NamedSharding, batch: int) -> list[int]:
    """The rows of `own_rows` that no process before this one holds: over all processes, each row of a batch once."""
    holder: dict[int, int] = {}
    device: Any
    for device, index in sharding.devices_indices_map((batch, 1)).items():
        for row in range(batch)[index[0]] if index is not None else ():
            holder[row] = min(device.process_index, holder.get(row, device.process_index))
    return sorted(row for row, process in holder.items() if process == jax.process_index())


def put_rows(array: np.ndarray, sharding: NamedSharding, batch: int, rows: list[int]) -> jax.Array:
    """A global batch [batch, ...] out of the rows [len(rows), ...] that each process has of it (`own_rows`)."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = range(batch)[index[0]]
        first = rows.index(wanted[0])
        return array[(slice(first, first + len(wanted)), *index[1:])]

    return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, shard)
