"""The prediction for a run on a machine: memory, time, whether it fits, and what would fit."""

import dataclasses
from dataclasses import dataclass

from mmfree_jax.config import Remat, RunConfig
from mmfree_jax.devices import DEVICES, USABLE, Device
from mmfree_jax.lowering.compiled import Compiled
from mmfree_jax.lowering.memory import Memory, memory, policies
from mmfree_jax.lowering.program import Report, inspect
from mmfree_jax.lowering.roofline import StepTime, step_time

LARGEST = 2**14  # largest number of rows on each data shard that is tried


@dataclass(frozen=True)
class Proposal:
    """A batch, a remat policy and a number of micro-batches that fit, and the bytes that one device needs then."""

    batch: int
    remat: Remat
    accumulate: int
    memory: float


@dataclass(frozen=True)
class Verdict:
    """Everything that `lower` says about a run."""

    device: str
    report: Report
    memory: Memory
    time: StepTime
    usable: float  # bytes
    micro_batches: Proposal | None  # for a run that does not fit: the same batch in as few micro-batches as possible
    same_batch: Proposal | None  # the cheapest policy for the run's own batch and micro-batches
    largest: Proposal | None  # the largest batch, and the cheapest policy for it
    compiled: Compiled | None = None  # where the target's own compiler was asked

    @property
    def needed(self) -> float:
        """Bytes that one device needs: as compiled, if it was, otherwise by the model."""
        return self.memory.total if self.compiled is None else self.compiled.total

    @property
    def fits(self) -> bool:
        """Whether the run fits without changes."""
        return self.needed <= self.usable and not (self.compiled is not None and self.compiled.refused)


def judge(run: RunConfig, device_name: str) -> Verdict:
    """Lower and partition the run's step, and predict what it needs on a mesh of `DEVICES[device_name]`."""
    device = DEVICES[device_name]
    report = inspect(run, device.platform)
    return Verdict(
        device_name,
        report,
        memory(run, report, device),
        step_time(run, report, device),
        USABLE * device.memory,
        _micro_batches(run, report, device),
        _cheapest(run, report, device),
        _largest(run, report, device),
    )


def _cheapest(run: RunConfig, report: Report, device: Device) -> Proposal | None:
    """The fastest policy with which this batch fits."""
    for remat in policies(run):
        if (found := _fitting(dataclasses.replace(run, remat=remat), report, device)) is not None:
            return found
    return None


def _fitting(run: RunConfig, report: Report, device: Device) -> Proposal | None:
    """The run without changes, if it fits."""
    needed = memory(run, report, device).total
    fits = needed <= USABLE * device.memory
    return Proposal(run.data.batch, run.remat, run.optim.accumulate, needed) if fits else None


def _micro_batches(run: RunConfig, report: Report, device: Device) -> Proposal | None:
    """The fewest micro-batches with which the same batch fits, with the run's own policy or one that stores less.

    The result is the same, and other than with remat nothing is recomputed. But weights are all-gathered, and gradients
    reduced, in every micro-batch. None for a run that fits.
    """
    if _fitting(run, report, device) is not None:
        return None
    # Policies are ordered by speed, and the faster ones store more: try the run's own first, then those after it.
    rows, order = run.data.batch // run.mesh.batch_shards, policies(run)
    for remat in order[order.index(run.remat) :]:
        for accumulate in (n for n in range(run.optim.accumulate, rows + 1) if rows % n == 0):
            optim = dataclasses.replace(run.optim, accumulate=accumulate)
            found = _fitting(dataclasses.replace(run, remat=remat, optim=optim), report, device)
            if found is not None:
                return found
    return None


def _largest(run: RunConfig, report: Report, device: Device) -> Proposal | None:
    """The largest batch, a power of two of rows on each data shard, that fits with some policy."""
    # Memory grows with the batch under every policy, so the search can stop at the first batch that does not fit.
    shards, rows, found = run.mesh.batch_shards * run.optim.accumulate, 1, None
    while rows <= LARGEST:
        data = dataclasses.replace(run.data, batch=rows * shards)
        proposal = _cheapest(dataclasses.replace(run, data=data), report, device)
        if proposal is None:
            break
        found, rows = proposal, 2 * rows
    return found
