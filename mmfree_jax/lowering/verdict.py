"""What is known beforehand about a run on a machine: memory, time, whether it fits, and what would."""

import dataclasses
from dataclasses import dataclass

from mmfree_jax.config import Remat, RunConfig
from mmfree_jax.devices import DEVICES, Device
from mmfree_jax.lowering.memory import Memory, memory, policies
from mmfree_jax.lowering.program import Report, inspect
from mmfree_jax.lowering.roofline import StepTime, step_time

USABLE = 0.92  # of a device's memory: the rest is the context's, the libraries' and lost between allocations
LARGEST = 2**14  # rows of a batch on each data shard that are tried


@dataclass(frozen=True)
class Proposal:
    """A batch and remat policy that fit."""

    batch: int
    remat: Remat


@dataclass(frozen=True)
class Verdict:
    """All that `lower` says about a run."""

    device: str
    report: Report
    memory: Memory
    time: StepTime
    usable: float  # bytes
    same_batch: Proposal | None  # the cheapest policy for the run's own batch
    largest: Proposal | None  # the largest batch, and the cheapest policy for it

    @property
    def fits(self) -> bool:
        """Whether the run fits as it stands."""
        return self.memory.total <= self.usable


def judge(run: RunConfig, device_name: str) -> Verdict:
    """Lower and partition the run's step, and estimate what it needs on a mesh of `DEVICES[device_name]`."""
    device = DEVICES[device_name]
    report = inspect(run, device.platform)
    return Verdict(
        device_name,
        report,
        memory(run, report, device),
        step_time(run, report, device),
        USABLE * device.memory,
        _cheapest(run, report, device),
        _largest(run, report, device),
    )


def _cheapest(run: RunConfig, report: Report, device: Device) -> Proposal | None:
    """The fastest policy with which this batch fits."""
    for remat in policies(run):
        if memory(dataclasses.replace(run, remat=remat), report, device).total <= USABLE * device.memory:
            return Proposal(run.data.batch, remat)
    return None


def _largest(run: RunConfig, report: Report, device: Device) -> Proposal | None:
    """The largest batch, a power of two of rows on each data shard, that fits with some policy."""
    shards, rows, found = run.mesh.batch_shards * run.optim.accumulate, 1, None
    while rows <= LARGEST:
        data = dataclasses.replace(run.data, batch=rows * shards)
        proposal = _cheapest(dataclasses.replace(run, data=data), report, device)
        if proposal is None:
            break
        found, rows = proposal, 2 * rows
    return found
