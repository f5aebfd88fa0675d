"""The logs of a run: metrics.jsonl, TensorBoard, log.txt.

In metrics.jsonl, `tokens` are the targets that carried a loss so far (at the end: D) and `flops` what had to be
computed for them; `tokens_per_s` counts positions, padding included; `mfu` is `flops` per second over the devices'
peak.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from mmfree_jax import flops, nvidia
from mmfree_jax.config import RunConfig
from mmfree_jax.data import Counts
from mmfree_jax.devices import EnergyMeter, peak_flops
from mmfree_jax.distributed import sum_integers, sum_or_none
from mmfree_jax.training.lines import Lines, drop_what_is_refused

# Every file is append-only and its length is part of each checkpoint. A resumed run first cuts its logs back to the
# checkpoint, so no step is ever logged twice, however the run died.


class Diverged(RuntimeError):
    """The loss is no longer a number. The message says at which step, and what to try. Steps before it are logged."""


@dataclasses.dataclass
class Progress:
    """The state of a run apart from its arrays: the other part of a checkpoint.

    `seconds` and `joules` are those of training steps, the trunk's included, without compilation, evaluation and
    saving. The first step of each process, which compiles, counts as much as the mean of the next ones. What a killed
    process did after its last checkpoint does not count, like its steps.
    """

    step: int = 0
    data: int = 0  # examples read so far, over all hosts
    counts: Counts = dataclasses.field(default_factory=Counts)  # of these examples
    seconds: float = 0.0
    joules: float | None = None
    uncounted: int = 0  # steps whose seconds and joules will be estimated from later ones
    shared: bool = False  # some of it was computed on a GPU with other runs: times and energy are not its own
    train_loss: float | None = None
    attempts: int = 0
    held: list[Any] = dataclasses.field(default_factory=list)  # steps not logged yet (`Interval.hold`)
    # What `training.anomalies` decides by: steps not applied, in all and just now; losses before this step; steps of a
    # spike so far; and how often the run went back.
    skipped: int = 0
    in_a_row: int = 0
    recent: list[float] = dataclasses.field(default_factory=list)
    spiking: int = 0
    rewinds: int = 0


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that is not logged yet: its 1-based number, metrics, rate, and the counts of all steps up to it."""

    step: int
    metrics: Mapping[str, Any]
    rate: float
    before: Counts  # when this process began, over all processes
    counted: Counts  # what this process has counted since


class RunLog(contextlib.AbstractContextManager):
    """Writes the logs of one run. `marks`, from the checkpoint being resumed, are the lengths to cut them back to."""

    def __init__(self, folder: Path, marks: dict[str, int]):
        self.folder = folder
        for path in self._files():
            keep = marks.get(str(path.relative_to(folder)), 0)
            if keep == 0:  # begun after the checkpoint
                path.unlink()
            else:
                os.truncate(path, min(keep, path.stat().st_size))
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._text = Lines(folder / "metrics.jsonl"), Lines(folder / "log.txt")
        self._board = SummaryWriter(str(folder / "tb"), flush_secs=30)
        drop_what_is_refused(self._board)

    def _files(self) -> list[Path]:
        named = [self.folder / "metrics.jsonl", self.folder / "log.txt", *(self.folder / "tb").glob("events.*")]
        return [path for path in named if path.exists()]

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            # A run that ends well must have all of its lines; one that fails has an error of its own.
            with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
                self.mark()
        finally:
            self._board.close()
            self._metrics.close()
            self._text.close()

    def event(self, text: str) -> None:
        """Write a line to log.txt, with the time."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def describe(self, title: str, text: str) -> None:
        """Write a text page of TensorBoard."""
        self._board.add_text(title, f"```\n{text}\n```", 0)

    def metrics(self, row: dict[str, Any]) -> None:
        """Write an object to metrics.jsonl and a point to every TensorBoard curve; row["step"] is the step."""
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        for name, value in _curves(row):
            self._board.add_scalar(name, value, row["step"])

    def diagnostics(self, step: int, scalars: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        """Write TensorBoard curves and histograms that are too large for metrics.jsonl."""
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        for name, values in histograms.items():
            self._board.add_histogram(name, values, step)

    def rewind(self, marks: dict[str, int]) -> None:
        """Cut metrics.jsonl back to its length in a checkpoint. log.txt goes on, and says why."""
        self._metrics.cut(marks.get("metrics.jsonl", 0))

    def mark(self) -> dict[str, int]:
        """Write everything to disk and return the length of each file in bytes. Raises OSError, naming the file."""
        for file in (self._metrics, self._text):
            file.sync()
        self._board.flush()
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in self._files()}


class SilentLog(contextlib.AbstractContextManager):
    """The log of all processes except the first, which alone writes."""

    def ignore(self, *_: Any) -> dict[str, int]:
        """Write nothing. Checkpoints take the lengths from the first process."""
        return {}

    event = describe = metrics = diagnostics = rewind = mark = ignore
    __exit__ = ignore  # type: ignore[assignment]


Log = RunLog | SilentLog


def as_numbers(tree: Any) -> Any:
    """Convert arrays to numbers and lists that JSON can hold; None replaces what is not finite."""
    if isinstance(tree, dict):
        return {name: as_numbers(value) for name, value in tree.items()}
    if np.ndim(tree):
        return [as_numbers(value) for value in tree]
    return float(tree) if np.isfinite(tree) else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _curves(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The curves of a row in TensorBoard: train/loss, held_out/loss, grad_norm/blocks.glu.down.kernel/03."""
    for name, value in row.items():
        if value is None or name in ("step", "diagnostics"):
            continue
        if name.startswith("held_out_"):
            yield f"held_out/{name.removeprefix('held_out_')}", value
        else:
            yield f"train/{name}", value
    yield from _flat(row.get("diagnostics", {}), "")


def _flat(tree: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{name}/{key}".lstrip("/"))
    elif isinstance(tree, list):
        for layer, value in enumerate(tree):
            yield from _flat(value, f"{name}/{layer:02}")
    elif tree is not None:
        yield name, tree


class Interval:
    """The steps since the last logged one. Keeps their metrics on the device, and logs their means when asked."""

    def __init__(self, config: RunConfig, progress: Progress, counts: Counts, log: Log):
        """`counts` are those of the steps up to `progress.step`."""
        # Two clocks: `timed` and `elapsed` give the speed of the next row, `progress.seconds` the time of the entire
        # run. Both stop for what is not training, and wait for the device first, because steps are only queued by the
        # host.
        self.config, self.progress, self.log = config, progress, log
        progress.shared = progress.shared or nvidia.is_shared()
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = None if peak is None or progress.shared else peak * config.mesh.devices
        self.meter = EnergyMeter()
        self.pending = [
            Pending(one["step"], one["metrics"], one["rate"], Counts(**one["counts"]), Counts())
            for one in progress.held
        ]
        progress.held = []
        self.before = counts
        self.reached = progress.step, counts  # the step up to which FLOPs are in earlier rows, and counts up to it
        self.notes: dict[str, Any] = {}  # further entries of the next row
        self.waited = 0.0
        self.compiled = False  # a first step of this process has been compiled and run
        self.began: float | None = None  # when the clocks were started; None while they stand still
        self.running = 0  # steps taken since then
        self.timed, self.elapsed = 0, 0.0  # steps of this row that were timed, and their seconds

    def timed_next(self, rows: Iterator[jax.Array]) -> jax.Array:
        """Return the next batch, and log how long it took: the device may have waited for it."""
        start = time.perf_counter()
        tokens_BT = next(rows)
        self.waited += time.perf_counter() - start
        return tokens_BT

    def add(self, step: int, metrics: dict[str, jax.Array], rate: float, counts: Counts) -> None:
        """Add the metrics of 0-based step `step`, and what this process has counted in the batches up to it.

        Does not wait for them, except for those of the first step, which compiles.
        """
        self.pending.append(Pending(step + 1, metrics, rate, self.before, counts))
        self.running += 1
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
            self.progress.uncounted += 1
            self.resume()

    def note(self, **values: Any) -> None:
        """Add numbers, or trees of numbers, to the next row."""
        self.notes |= as_numbers(values)

    def pause(self) -> bool:
        """Wait for the steps taken so far, stop the clocks, and add time and energy to the progress.

        Returns whether there were such steps. If not, the clocks go on.
        """
        jax.block_until_ready([one.metrics for one in self.pending])
        drawn = sum_or_none(self.meter.joules())
        if self.began is None or self.running == 0:
            return False
        # Steps that could not be timed (the first one compiles) count as much as the mean of those that were.
        elapsed, share = time.perf_counter() - self.began, 1 + self.progress.uncounted / self.running
        known = self.progress.joules is not None or self.progress.seconds == 0  # else a part was not measured
        self.progress.joules = (self.progress.joules or 0.0) + drawn * share if known and drawn is not None else None
        self.progress.seconds += elapsed * share
        self.progress.uncounted = 0
        self.timed, self.elapsed = self.timed + self.running, self.elapsed + elapsed
        self.began, self.running = None, 0
        return True

    def resume(self) -> None:
        """Start the clocks again, after something that is not training."""
        if self.compiled:
            self.meter.restart()
            self.began, self.running = time.perf_counter(), 0

    def hold(self) -> None:
        """Put what is not logged yet into the progress, so that a run saved here logs the same rows in the end."""
        self.pause()
        metrics, counts = self._fetch()
        self.progress.held = [
            {
                "step": one.step,
                "rate": one.rate,
                "metrics": {name: float(value) for name, value in values.items()},
                "counts": dataclasses.asdict(up_to),
            }
            for one, values, up_to in zip(self.pending, metrics, counts, strict=True)
        ]
        self.progress.counts = counts[-1] if counts else self.progress.counts

    def _fetch(self) -> tuple[list[Mapping[str, Any]], list[Counts]]:
        """The metrics of the pending steps as NumPy scalars, and the counts of all processes up to each of them.

        All processes must call it.
        """
        metrics = jax.device_get([one.metrics for one in self.pending])
        numbers = iter(sum_integers([number for one in self.pending for number in dataclasses.astuple(one.counted)]))
        return metrics, [one.before + Counts(*itertools.islice(numbers, 3)) for one in self.pending]

    def flush(self) -> None:
        """Wait for the steps taken so far and log their means.

        Raises Diverged if a loss is not finite, after logging the steps before it.
        """
        if not self.pending:
            return
        stopped = self.pause()
        fetched, counts = self._fetch()
        steps = [one.step for one in self.pending]
        metrics = {name: np.array([one[name] for one in fetched], np.float64) for name in fetched[0]}
        # Steps that were not applied count in no mean.
        applied = metrics.pop("applied", np.ones(len(steps))) > 0
        # A diverged run still logs the steps before the first loss that is no number: they show how it got there.
        finite = np.isfinite(metrics["loss"] + metrics["grad_norm"]) | ~applied
        count = len(steps) if finite.all() else int(np.argmin(finite))
        notes = self.notes if count == len(steps) else {}
        means = {name: _mean(one[:count][applied[:count]]) for name, one in metrics.items() if count}
        if self.config.skip_nonfinite:
            notes = {"skipped": int((~applied[:count]).sum()), **notes}
        if count:
            self.progress.counts = counts[count - 1]
            self._log(steps[count - 1], means, self.pending[count - 1].rate, notes)
        if count < len(steps):
            if self.notes:
                self.log.metrics({"step": steps[-1], **self.notes})
            raise Diverged(
                f"{self.config.name}: loss {metrics['loss'][count]:.4g} and gradient norm "
                f"{metrics['grad_norm'][count]:.4g} at step {steps[count]}: lower optim.lr or raise optim.warmup_steps"
            )
        self.pending.clear()
        self.waited, self.notes = 0.0, {}
        self.timed, self.elapsed = 0, 0.0
        if stopped:
            self.resume()

    def _log(self, step: int, means: dict[str, float | None], rate: float, notes: dict[str, Any]) -> None:
        # FLOPs of a step are the difference of two totals, as the number of visible pairs varies from batch to batch
        # when documents are separate.
        own, steps_per_s = not self.progress.shared, self.timed / self.elapsed if self.elapsed else None
        counts, since = self.progress.counts, step - self.reached[0]
        done, before = (
            flops.train_flops(self.config.model, steps * self.config.data.tokens_per_step, so_far.pairs).products
            for steps, so_far in ((step, counts), self.reached)
        )
        each = (done - before) / since if since > 0 else None  # FLOPs of a step: the mean over those of this row
        self.reached = (step, counts) if since > 0 else self.reached
        self.progress.train_loss = self.progress.train_loss if means["loss"] is None else means["loss"]
        self.log.metrics(
            {
                "step": step,
                "tokens": counts.targets,
                "flops": done,
                "loss": means["loss"],
                "lr": rate,
                **{name: mean for name, mean in means.items() if name != "loss"},
                "tokens_per_s": steps_per_s and steps_per_s * self.config.data.tokens_per_step,
                "mfu": self.peak and steps_per_s and each and steps_per_s * each / self.peak,
                "data_wait_s": self.waited / len(self.pending),
                "seconds": self.progress.seconds if own else None,
                "joules": self.progress.joules if own else None,
                **notes,
            }
        )
