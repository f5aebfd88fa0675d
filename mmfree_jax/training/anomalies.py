"""Steps that go wrong: a loss or gradient that is not finite, and spikes of the loss.

With `skip_nonfinite` a step that is not finite is not applied (`step._train_step`): parameters and moments stay as they
were. The batch and this state are dumped into the folder `anomalies`, and after so many such steps in a row the run
stops and names the first layer that is not finite. With `spike_sigmas` a loss far above those before it is logged or,
with `on_spike="rewind"`, undone: the run goes on from the last checkpoint before the spike, past the batches that led
to it (PaLM, arXiv 2204.02311, section 5.1).

Everything that decisions depend on is in the checkpoints, so a run that is killed decides the same again.
"""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmfree_jax.checkpoint import CheckpointError, Checkpoints
from mmfree_jax.config import RunConfig
from mmfree_jax.distributed import is_first
from mmfree_jax.training.metrics import Diverged, Interval, Log, Progress
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import Program, TrainState

WINDOW, LEAST = 64, 16  # losses that a spike is measured against, at most and at least
SUSTAINED = 3  # steps in a row above the limit that are a spike: a single hard batch is none
FLOOR = 1e-3  # of the median: the least deviation that counts, where losses hardly vary
MOST_REWINDS = 10  # of a run
MOST_DUMPS = 3  # the newest are kept
FOLDER = "anomalies"


class Anomalies:
    """Looks at the metrics of every step, if the config asks for it, because each look waits for the step."""

    def __init__(self, config: RunConfig, program: Program, folder: Path, log: Log):
        self.config, self.program, self.folder, self.log = config, program, folder, log
        self.looks = config.skip_nonfinite > 0 or config.spike_sigmas > 0

    def after(
        self,
        interval: Interval,
        step: int,
        state: TrainState,
        tokens_BT: jax.Array,
        rates: Rates,
        metrics: dict[str, jax.Array],
    ) -> bool:
        """Look at 0-based step `step`, which has led to `state`. Returns whether to rewind.

        Raises Diverged, naming a layer, after `skip_nonfinite` steps in a row that were not applied.
        """
        if not self.looks:
            return False
        seen = {name: float(value) for name, value in jax.device_get(metrics).items()}
        progress = interval.progress
        if seen.get("applied") == 0:
            progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
            interval.pause()
            self._report(progress, step, state, tokens_BT, seen)
            if progress.in_a_row >= self.config.skip_nonfinite:
                interval.flush()
                where = first_bad_layer(jax.device_get(self.program.inspect(state, tokens_BT, rates)))
                raise Diverged(
                    f"{self.config.name}: {progress.in_a_row} steps in a row up to {step + 1} had no finite loss or "
                    f"gradient; the first that is not finite is {where}"
                )
            interval.resume()
            return False
        progress.in_a_row = 0
        return self.config.spike_sigmas > 0 and self._spikes(progress, step, seen["loss"])

    def _report(
        self, progress: Progress, step: int, state: TrainState, tokens_BT: jax.Array, seen: dict[str, float]
    ) -> None:
        """Dump batch and state of the first step in a row, and log every one."""
        where = ""
        if progress.in_a_row == 1:
            try:
                self._dump(step, state, tokens_BT, seen)
                where = f"; batch and state are in {FOLDER}/{step + 1}"
            except (CheckpointError, OSError) as error:
                where = f"; batch and state could not be written: {error}"
        values = f"loss {seen['loss']:.4g} and gradient norm {seen['grad_norm']:.4g}"
        self.log.event(f"step {step + 1}: {values}, not applied{where}")

    def _dump(self, step: int, state: TrainState, tokens_BT: jax.Array, seen: dict[str, float]) -> None:
        """Write the batch as an array of NumPy, and the state before the step (but for its number) as a checkpoint."""
        batch = np.asarray(multihost_utils.process_allgather(tokens_BT, tiled=True))
        with Checkpoints(self.folder / FOLDER, MOST_DUMPS) as dumps:
            if step + 1 not in dumps.steps:  # as after a kill
                meta = {name: repr(value) for name, value in seen.items()}  # JSON has no NaN
                dumps.save_now(state, {"step": step + 1, "metrics": meta}, step + 1)
            if is_first():
                np.save(self.folder / FOLDER / str(step + 1) / "batch.npy", batch)

    def _spikes(self, progress: Progress, step: int, loss: float) -> bool:
        """Compare a loss with those before it. Returns whether to rewind."""
        limit = spike_limit(progress.recent, self.config.spike_sigmas)
        if not loss > limit:
            progress.spiking = 0
            progress.recent = [*progress.recent, loss][-WINDOW:]
            return False
        progress.spiking += 1
        if progress.spiking != SUSTAINED:
            return False
        self.log.event(f"loss spike: {SUSTAINED} losses in a row above {limit:.4g}, of step {step + 1} {loss:.4g}")
        return self.config.on_spike == "rewind" and progress.rewinds < MOST_REWINDS


def spike_limit(recent: list[float], sigmas: float) -> float:
    """Return the loss above which a step may begin a spike: median plus `sigmas` robust standard deviations.

    Infinite as long as there are fewer than LEAST losses. The deviation is 1.4826 times the median absolute one.
    """
    if len(recent) < LEAST:
        return math.inf
    middle = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in recent)
    return middle + sigmas * max(deviation, FLOOR * abs(middle))


def first_bad_layer(seen: dict[str, Any]) -> str:
    """Name what is not finite first: a parameter, an activation in forward order, a gradient in backward order.

    seen: what `Program.inspect` returns.
    """
    for name in _bad(seen["param_norm"]):
        return f"the parameter {name}"
    stream = seen["activation_rms"]
    for name, value in (("embedding", stream["embedding"]), *_numbered("block", stream["blocks"])):
        if not np.isfinite(value):
            return f"the output of the {name}"
    if not np.isfinite(stream["norm"]):
        return "the output of the last norm"
    if not np.isfinite(seen["largest_logit"]):
        return "the logits"
    # Backwards a gradient comes through the head first, then from the last block to the first.
    found = list(_bad(seen["grad_norm"]))
    depth = lambda name: int(name.rpartition(" of block ")[2]) if " of block " in name else -1
    order = sorted(found, key=lambda name: (not name.startswith(("head", "norm")), -depth(name)))
    return f"the gradient of {order[0]}" if order else "the loss itself"


def _bad(norms: dict[str, Any]) -> Iterator[str]:
    """Names of the norms that are not finite, with the layer."""
    for name, norm in norms.items():
        if np.ndim(norm) == 0:
            if not np.isfinite(norm):
                yield name
            continue
        yield from (f"{name} of {layer}" for layer, value in _numbered("block", norm) if not np.isfinite(value))


def _numbered(name: str, values: Any) -> list[tuple[str, Any]]:
    return [(f"{name} {number}", value) for number, value in enumerate(values)]
